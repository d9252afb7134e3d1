"""Google Cloud Storage: signed URLs of the form V4, by a service account or an HMAC key.

https://docs.cloud.google.com/storage/docs/access-control/signed-urls
"""

import json
from collections.abc import Mapping
from functools import lru_cache

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.sigv4 import GOOGLE_HMAC, GOOGLE_RSA, MAX_SECONDS, Credentials, presigned_url, unsigned_url
from downloadview_async.offload.signers.base import (
    KEPT,
    KEY_ID,
    SECRET,
    Edge,
    Signed,
    Signer,
    SignerKind,
    SignerOption,
    moment_of,
)
from downloadview_async.offload.signers.keys import private_key, read_key_file, rsa_bits, secret_text, signing

_REGION = "auto"


class _Google:
    """A signer of objects, by one of the two kinds of keys."""

    max_seconds = MAX_SECONDS
    # the only two that it replaces: https://docs.cloud.google.com/storage/docs/xml-api/reference-headers
    carries = frozenset({"content-disposition", "content-type"})
    is_served_alike = False

    def __init__(self, edge: Edge) -> None:
        self.edge = edge

    def __repr__(self) -> str:
        return f"<signer of Google Cloud Storage at {self.edge.url}>"


class _ByHmac(_Google):
    """Signs with an HMAC key of Google."""

    def __init__(self, edge: Edge, credentials: Credentials) -> None:
        super().__init__(edge)
        self._credentials = credentials

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        url = presigned_url(
            self.edge.url + path,
            self._credentials,
            region=_REGION,
            seconds=seconds,
            now=now,
            parameters={f"response-{name}": value for name, value in headers.items()},
            dialect=GOOGLE_HMAC,
        )
        return Signed(url, seconds)


class _ByAccount(_Google):
    """Signs with the private key of a service account."""

    def __init__(self, edge: Edge, key_file: str) -> None:
        super().__init__(edge)
        text = read_key_file("key_file", key_file)
        try:
            account = json.loads(text)
            self._email, pem = str(account["client_email"]), str(account["private_key"]).encode()
        except (KeyError, TypeError, ValueError):  # the error may have a part of the text
            raise ConfigurationError(
                f"key_file: {key_file!r} is not the JSON of a service account with a private key: create one with "
                "`gcloud iam service-accounts keys create`"
            ) from None
        key = private_key("key_file", pem, missing=lambda key: "an RSA key" if rsa_bits(key) is None else None)
        sign = signing("key_file", key, "sha256")
        self._signature = lru_cache(KEPT)(lambda text: sign(text).hex())

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        moment = moment_of(now, seconds)
        unsigned, to_sign = unsigned_url(
            self.edge.url + path,
            self._email,
            region=_REGION,
            seconds=seconds,
            now=moment,
            parameters={f"response-{name}": value for name, value in headers.items()},
            dialect=GOOGLE_RSA,
        )
        url = f"{unsigned}&X-Goog-Signature={self._signature(to_sign)}"
        return Signed(url, int(moment + seconds - now))


def _signer(edge: Edge, *, key_file: str | None, key_id: str | None, secret: str | None) -> Signer:
    if (key_file is None) == (secret is None):
        raise ConfigurationError(
            "key_file: give either this, of a service account, or key_id and secret of an HMAC key"
        )
    if key_file is not None:
        return _ByAccount(edge, key_file)
    if key_id is None:
        raise ConfigurationError("key_id: missing: give the access id of the HMAC key, such as GOOG1E...")
    return _ByHmac(edge, Credentials(key_id, secret_text("secret", secret)))


KIND = SignerKind(
    name="gcs",
    title="Google Cloud Storage",
    signer=_signer,
    options={
        "key_file": SignerOption(str, takes="the JSON file of a service account with its private key", is_path=True),
        "key_id": KEY_ID,
        "secret": SECRET,
    },
)
