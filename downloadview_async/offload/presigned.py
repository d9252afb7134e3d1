"""Signed URLs of a store: `PresignedRedirect` gives them to clients, `StoreSigner` to whoever else sends the file."""

import inspect
import math
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from downloadview_async.errors import ConfigurationError, SourceUnavailable
from downloadview_async.offload.sigv4 import MAX_SECONDS, Credentials, presigned_url
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.names import has_dot_segment
from downloadview_async.sources.object_store import ObjectStorage
from downloadview_async.sources.workers import Slots, Workers

# What S3 sends in place of what it has stored. "response-" and the name is what is signed.
_OVERRIDES = ("content-type", "content-disposition", "cache-control", "content-encoding", "content-language")


class PresignedRedirect:
    """Redirects clients to the signed URLs of an S3 bucket: `Download(source, redirect=PresignedRedirect(storage))`.

    The name, the disposition and the type of the file are in the signature, as are Cache-Control and Content-Encoding.
    Each redirect costs a HEAD of the object: one that is missing is a 404 here.

    storage: where the files live; others are not redirected. Its `access_key_id`, `secret_access_key`, `session_token`
    and `region` sign, from its options, the environment or its `credential_provider`.
    expires: seconds that a URL is good for, at most seven days; a client may keep the redirect for half of them.
    public_endpoint: where clients reach the store, if not where this process does. The store has to take its host name.

    A file that a browser might run when it is shown inline is not redirected: the store sends no
    Content-Security-Policy.

    Raises `ConfigurationError` for a storage that is not S3, and where there is no key to sign with.
    """

    def __init__(self, storage: ObjectStorage, *, expires: float = 600, public_endpoint: str | None = None) -> None:
        scheme = urlsplit(storage.url).scheme
        if scheme in ("gs", "az"):
            instead = (
                "give the bucket as s3:// with the endpoint https://storage.googleapis.com and an HMAC key"
                if scheme == "gs"
                else "stream it, or have a proxy send it"
            )
            raise ConfigurationError(
                f"{storage.url!r}: the signature of {scheme}:// cannot carry the file's name and type: {instead}"
            )
        if scheme != "s3":
            raise ConfigurationError(f"{storage.url!r} has no signed URLs: only s3:// has")
        if not 1 <= expires <= MAX_SECONDS:
            raise ConfigurationError(f"a signed URL is good for 1 to {MAX_SECONDS} seconds (7 days), not {expires!r}")
        if public_endpoint is not None:
            _check_endpoint(public_endpoint)
        self._public_endpoint = public_endpoint
        self._signer = StoreSigner(storage, expires=expires)

    async def url_for(self, file: AsyncFile, described: Mapping[str, str]) -> tuple[str, int] | None:
        """Return the signed URL of a file and how many seconds it is good for, or None for a file that lives elsewhere.

        described: headers of the answer, names in lower case; those that S3 can be told are in the URL.

        Raises `SourceUnavailable` where no key can be had.
        """
        parameters = {f"response-{name}": described[name] for name in _OVERRIDES if name in described}
        return await self._signer.sign(file.location, endpoint=self._public_endpoint, parameters=parameters)

    async def headers_for(self, file: AsyncFile, described: Mapping[str, str]) -> Mapping[str, str] | None:
        """Return Location and Cache-Control of the redirect, or None for a file to be sent by ourselves."""
        if "content-security-policy" in described:
            return None
        if (found := await self.url_for(file, described)) is None:
            return None
        url, seconds = found
        kept = "no-store" if "no-store" in described.get("cache-control", "").lower() else f"max-age={seconds // 2}"
        return {"location": url, "cache-control": f"private, {kept}"}


class StoreSigner:
    """Signs the URLs of an S3 bucket, each for a GET and for `expires` seconds.

    Raises `ConfigurationError` where there is no key to sign with.
    """

    def __init__(self, storage: ObjectStorage, *, expires: float) -> None:
        self._storage = storage
        self._expires = int(expires)
        self._region = storage.config.get("region", "us-east-1")
        self._workers = Workers(1)
        self._turn = Slots(1)
        self._renew_at = math.inf
        self._current: tuple[Credentials, float] | None = None
        if storage.credential_provider is None:
            self._current = (_credentials(storage.config, storage.url), math.inf)

    async def sign(
        self, location: str | None, *, endpoint: str | None = None, parameters: Mapping[str, str] | None = None
    ) -> tuple[str, int] | None:
        """Return the signed URL of what is at a plain one, and how many seconds it is good for; None: it is elsewhere.

        None as well for a name with a segment `.` or `..`: HTTP clients would ask for another URL than was signed.

        endpoint: where the store is for whoever gets the URL. parameters: what else is signed.

        Raises `SourceUnavailable` where no key can be had.
        """
        base = self._storage.url_of("")
        if base is None or location is None or not location.startswith(f"{base}/") or "?" in location:
            return None  # with a query it is signed already, or is about something else
        name = unquote(location[len(base) + 1 :])
        if has_dot_segment(name):
            return None
        credentials, good_until = await self._sign_with()
        now = time.time()
        seconds = int(min(self._expires, good_until - now))
        if seconds < 1:
            raise SourceUnavailable("the credentials to sign with have expired")
        url = self._storage.url_of(name, endpoint)
        assert url is not None
        signed = presigned_url(url, credentials, region=self._region, seconds=seconds, now=now, parameters=parameters)
        return signed, seconds

    async def _sign_with(self) -> tuple[Credentials, float]:
        """Return the key to sign with, and the time until which it is good."""
        try:
            if self._current is None or time.time() >= self._renew_at:
                await self._renew()
        except SourceUnavailable:
            if self._current is None or time.time() >= self._current[1]:
                raise
        assert self._current is not None
        return self._current

    async def _renew(self) -> None:
        """Ask for a new key, one at a time: who has waited for another to do so has it."""
        before = self._current
        provider = self._storage.credential_provider
        turn = await self._turn.take()
        try:
            if provider is None or self._current is not before:
                return
            found = await self._workers.run_or_abandon(provider)
            found = await found if inspect.isawaitable(found) else found
            expires_at: datetime | None = found.get("expires_at")
            good_until = math.inf if expires_at is None else expires_at.timestamp()
            self._current = (_credentials(found, self._storage.url), good_until)
            self._renew_at = good_until - min(self._expires, (good_until - time.time()) / 2)
        except SourceUnavailable:
            raise
        except Exception as exc:  # whatever errors a provider has of its own
            raise SourceUnavailable(f"the credential_provider failed: {type(exc).__name__}: {exc}") from exc
        finally:
            self._turn.free(turn)


def _credentials(config: Mapping[str, Any], url: str) -> Credentials:
    try:
        return Credentials(
            config["access_key_id"], config["secret_access_key"], config.get("session_token") or config.get("token")
        )
    except KeyError as exc:
        raise ConfigurationError(
            f"{url!r} has no {exc.args[0]} to sign URLs with: give access_key_id and secret_access_key in the options, "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a credential_provider"
        ) from None


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{endpoint!r} is no endpoint: give the URL of a server, such as https://files.example.org"
        )
