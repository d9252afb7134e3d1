"""Signed URLs of a store: `PresignedRedirect` gives them to clients, `StoreSigner` makes them."""

import math
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from downloadview_async.errors import ConfigurationError, SourceUnavailable, wrong_type
from downloadview_async.http.fields import REQUEST_ID_PARAMETER
from downloadview_async.http.sigv4 import MAX_SECONDS, Credentials, presigned_url
from downloadview_async.offload.renewed import Renewed
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.names import has_dot_segment
from downloadview_async.sources.object_store import ObjectStorage

# The headers that a signed URL can replace in the answer of S3. The parameter is "response-" and the name.
_OVERRIDES = ("content-type", "content-disposition", "cache-control", "content-encoding", "content-language")


class PresignedRedirect:
    """Redirects clients to the signed URLs of an S3 bucket: `Download(source, redirect=PresignedRedirect(storage))`.

    The URL makes the store send our Content-Disposition, Content-Type, Cache-Control and Content-Encoding. Each
    redirect costs a HEAD of the object, so a missing object gives a 404 here.

    storage: the store that has the files. Files of other places are not redirected. Its `access_key_id`,
    `secret_access_key`, `session_token` and `region` sign the URLs; they come from its options, the environment or its
    `credential_provider`.
    expires: seconds that a URL is valid, at most seven days. A client may cache the redirect for half that time.
    public_endpoint: where clients reach the store, if that differs from the endpoint of this process. The store has to
    accept this host name.

    A file that a browser might run when it is shown inline is not redirected, because the store sends no
    Content-Security-Policy.

    logs_request_id: whether the URL has the id of the request as the parameter `x-request-id`, if there is an
    `Accounts`. S3 ignores a parameter whose name begins with `x-`, and writes it to its server access log, by which
    `ProxyLog` counts what clients have got. Clients must not cache such a redirect.

    Raises `ConfigurationError` for a storage that is not S3, and if there is no key to sign with.
    """

    def __init__(
        self,
        storage: ObjectStorage,
        *,
        expires: float = 600,
        public_endpoint: str | None = None,
        logs_request_id: bool = False,
    ) -> None:
        if not isinstance(storage, ObjectStorage):
            raise wrong_type("PresignedRedirect takes a storage, such as ObjectStorage('s3://bucket')", storage)
        scheme = urlsplit(storage.url).scheme
        if scheme in ("gs", "az"):
            kind = "gcs" if scheme == "gs" else "azure"
            other = ", or write the bucket as s3:// with an HMAC key" if scheme == "gs" else ""
            raise ConfigurationError(
                f"{storage.url!r} is not S3: use EdgeRedirect with signer_of({kind!r}, ...), or [sources.NAME.edge] in "
                f"the service: its URLs carry the file's name and type{other}"
            )
        if scheme != "s3":
            raise ConfigurationError(f"{storage.url!r} has no signed URLs: use a storage at s3://")
        if not 1 <= expires <= MAX_SECONDS:
            raise ConfigurationError(
                f"expires is {expires!r}: a signed URL can be valid for 1 to {MAX_SECONDS} seconds (7 days)"
            )
        if public_endpoint is not None:
            _check_endpoint(public_endpoint)
        self._public_endpoint = public_endpoint
        self._logs_request_id = logs_request_id
        self._signer = StoreSigner(storage, expires=expires)

    async def url_for(
        self, file: AsyncFile, described: Mapping[str, str], *, request_id: str | None = None
    ) -> tuple[str, int] | None:
        """Return the signed URL of a file and the seconds that it is valid, or None for a file of another place.

        described: headers of the answer, names in lower case. Those that S3 can replace are in the URL. request_id: for
        the log of the store.

        Raises `SourceUnavailable` if the `credential_provider` gives no valid key.
        """
        parameters = {f"response-{name}": described[name] for name in _OVERRIDES if name in described}
        if request_id is not None:
            parameters[REQUEST_ID_PARAMETER] = request_id
        return await self._signer.sign(file.location, endpoint=self._public_endpoint, parameters=parameters)

    async def headers_for(self, file: AsyncFile, described: Mapping[str, str]) -> Mapping[str, str] | None:
        """Return Location and Cache-Control of the redirect, or None: send the file yourself."""
        if "content-security-policy" in described:
            return None
        if (url_and_seconds := await self.url_for(file, described)) is None:
            return None
        url, seconds = url_and_seconds
        kept = "no-store" if "no-store" in described.get("cache-control", "").lower() else f"max-age={seconds // 2}"
        return {"location": url, "cache-control": f"private, {kept}"}

    async def counted_headers_for(
        self, file: AsyncFile, described: Mapping[str, str], request_id: str
    ) -> Mapping[str, str] | None:
        """Return what `headers_for` does; with `logs_request_id`, the id is in the URL, and nothing is cached."""
        if not self._logs_request_id or "content-security-policy" in described:
            return await self.headers_for(file, described)
        if (url_and_seconds := await self.url_for(file, described, request_id=request_id)) is None:
            return None
        return {"location": url_and_seconds[0], "cache-control": "private, no-store"}


class StoreSigner:
    """Signs URLs of an S3 bucket, each for a GET and for `expires` seconds.

    Raises `ConfigurationError` if there is no key to sign with.
    """

    def __init__(self, storage: ObjectStorage, *, expires: float) -> None:
        self._storage = storage
        self._expires = int(expires)
        self._region = storage.config.get("region", "us-east-1")
        self._credentials: Credentials | None = None
        self._renewed: Renewed[Credentials] | None = None
        if (provider := storage.credential_provider) is None:
            self._credentials = _credentials(storage.config, storage.url)
        else:
            self._renewed = Renewed(provider, name="credential_provider", read=self._read, ahead=self._expires)

    def _read(self, given: Mapping[str, Any]) -> tuple[Credentials, float]:
        expires_at: datetime | None = given.get("expires_at")
        return _credentials(given, self._storage.url), math.inf if expires_at is None else expires_at.timestamp()

    async def sign(
        self, location: str | None, *, endpoint: str | None = None, parameters: Mapping[str, str] | None = None
    ) -> tuple[str, int] | None:
        """Return the signed URL of an object and the seconds that it is valid, or None if it is not in this bucket.

        None as well for a name with a segment `.` or `..`: HTTP clients would ask for another URL than was signed.

        location: the unsigned URL. endpoint: the endpoint in the signed URL, by default the storage's own.
        parameters: further parameters of the query.

        Raises `SourceUnavailable` if the `credential_provider` gives no valid key.
        """
        base = self._storage.url_of("")
        if base is None or location is None or not location.startswith(f"{base}/") or "?" in location:
            return None  # a URL with a query is signed already, or names something else
        name = unquote(location[len(base) + 1 :])
        if has_dot_segment(name):
            return None
        credentials, good_until = self._credentials, math.inf
        if self._renewed is not None:
            credentials, good_until = await self._renewed.get()
        assert credentials is not None
        now = time.time()
        seconds = int(min(self._expires, good_until - now))
        if seconds < 1:
            raise SourceUnavailable("the credentials that sign URLs have expired")
        url = self._storage.url_of(name, endpoint)
        assert url is not None
        signed = presigned_url(url, credentials, region=self._region, seconds=seconds, now=now, parameters=parameters)
        return signed, seconds


def _credentials(config: Mapping[str, Any], url: str) -> Credentials:
    try:
        return Credentials(
            config["access_key_id"], config["secret_access_key"], config.get("session_token") or config.get("token")
        )
    except KeyError as exc:
        raise ConfigurationError(
            f"{url!r} has no {exc.args[0]} to sign URLs with: set access_key_id and secret_access_key in the options, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a credential_provider"
        ) from None


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{endpoint!r} is not an endpoint: write the URL of a server, such as https://files.example.org"
        )
