"""Amazon CloudFront: signed URLs and signed cookies, with a canned or a custom policy.

https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/PrivateContent.html
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.signers.base import (
    KEPT,
    KEY_ID,
    LONGEST,
    ORIGIN,
    S3_HEADERS,
    Edge,
    Signed,
    SignerKind,
    SignerOption,
    joined,
    moment_of,
    s3_query,
)
from downloadview_async.offload.signers.keys import curve_of, pem_of, private_key, rsa_bits, signing

_IN_URLS = str.maketrans("+=/", "-_~")


class _CloudFront:
    max_seconds = LONGEST

    def __init__(
        self,
        edge: Edge,
        *,
        key_id: str | None,
        private_key: str,
        digest: str,
        policy: str,
        covers: str,
        cookies: bool,
        cookie_domain: str | None,
        origin: str,
    ) -> None:
        if key_id is None or not re.fullmatch("[A-Z0-9]{8,64}", key_id):
            raise ConfigurationError(
                "key_id: missing, or not an id: give that of the public key, such as K2JCJMDEHXQW5F"
            )
        if covers == "all" and origin == "s3":
            raise ConfigurationError(
                "covers: a signature for all files leaves the type and the name in the query to anyone: use covers = "
                '"file", or another origin'
            )
        domain = (cookie_domain or "").lstrip(".").lower()
        if cookie_domain is not None and not cookies:
            raise ConfigurationError("cookie_domain: only cookies have a domain: set cookies = true, or remove it")
        if domain and not f".{edge.host}".endswith(f".{domain}"):
            raise ConfigurationError(f"cookie_domain: {edge.host} is not in {domain!r}: give a domain that contains it")
        self.edge = edge
        self.carries = S3_HEADERS if origin == "s3" else frozenset()
        self.is_served_alike = origin == "service"
        self._key_id = key_id
        self._digest = digest
        self._is_custom = policy == "custom" or covers == "all"
        self._covers_all = covers == "all"
        self._cookies = cookies
        self._attributes = f"{f'; Domain={domain}' if domain else ''}; Secure; HttpOnly; SameSite=Lax"
        sign = signing("private_key", _key(private_key), digest)
        self._signature = lru_cache(KEPT)(lambda text: _encoded(sign(text)))

    def __repr__(self) -> str:
        return f"<signer of CloudFront at {self.edge.url}>"

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        query = s3_query(headers)
        url = joined(self.edge.url + path, query)
        moment = moment_of(now, seconds)
        expires = moment + seconds
        resource = f"{self.edge.url}*" if self._covers_all else url
        text = json.dumps(
            {"Statement": [{"Resource": resource, "Condition": {"DateLessThan": {"AWS:EpochTime": expires}}}]},
            separators=(",", ":"),
        )
        parameters = {"Policy": _encoded(text.encode())} if self._is_custom else {"Expires": str(expires)}
        parameters |= {"Signature": self._signature(text), "Key-Pair-Id": self._key_id}
        if self._digest != "sha1":
            parameters["Hash-Algorithm"] = self._digest.upper()
        left = int(expires - now)
        if not self._cookies:
            signature = "&".join("=".join(pair) for pair in parameters.items())
            return Signed(joined(self.edge.url + path, query, signature), left)
        place = self.edge.prefix if self._covers_all else self.edge.prefix + path
        if ";" in place:
            return None
        end = f"; Path={place}; Max-Age={left}{self._attributes}"
        return Signed(url, left, tuple(f"CloudFront-{name}={value}{end}" for name, value in parameters.items()))


def _encoded(value: bytes) -> str:
    return b64encode(value).decode().translate(_IN_URLS)


def _key(value: str) -> Any:
    def missing(key: Any) -> str | None:
        suits = rsa_bits(key) == 2048 or curve_of(key) == "secp256r1"
        return None if suits else "an RSA key of 2,048 bits, or an ECDSA key with the curve P-256"

    return private_key("private_key", pem_of("private_key", value), missing=missing)


KIND = SignerKind(
    name="cloudfront",
    title="CloudFront",
    signer=_CloudFront,
    options={
        "key_id": KEY_ID,
        "private_key": SignerOption(
            str, takes="a file in PEM with the private key, or its text", is_required=True, is_secret=True, is_path=True
        ),
        "digest": SignerOption(Literal["sha1", "sha256"], takes="sha1 or sha256", default="sha1"),
        "policy": SignerOption(Literal["canned", "custom"], takes="canned or custom", default="canned"),
        "covers": SignerOption(
            Literal["file", "all"], takes="file, or all for signatures of all files of the source", default="file"
        ),
        "cookies": SignerOption(bool, takes="true to sign by cookies, and not in the URL", default=False),
        "cookie_domain": SignerOption(str, takes="the domain of the cookies, such as example.org"),
        "origin": ORIGIN,
    },
)
