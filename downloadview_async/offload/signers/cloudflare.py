"""Cloudflare: tokens that a custom rule checks with `is_timed_hmac_valid_v0`.

https://developers.cloudflare.com/waf/custom-rules/use-cases/configure-token-authentication/
"""

import hmac
from base64 import b64encode
from collections.abc import Mapping
from urllib.parse import quote

from downloadview_async.offload.signers.base import (
    LONGEST,
    ORIGIN,
    PARAMETER,
    S3_HEADERS,
    SECRET,
    Edge,
    Signed,
    SignerKind,
    joined,
    parameter_name,
    s3_query,
)
from downloadview_async.offload.signers.keys import secret_text


class _Cloudflare:
    max_seconds = LONGEST

    def __init__(self, edge: Edge, *, secret: str | None, parameter: str | None, origin: str) -> None:
        self.edge = edge
        self.carries = S3_HEADERS if origin == "s3" else frozenset()
        self.is_served_alike = origin == "service"
        self._secret = secret_text("secret", secret).encode()
        self._parameter = parameter_name(parameter or "verify")

    def __repr__(self) -> str:
        return f"<signer of Cloudflare at {self.edge.url}>"

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`. The rule knows for how many seconds a token is valid: `seconds` has to be the same."""
        query = s3_query(headers)
        message = joined(self.edge.prefix + path, query)
        issued = int(now)
        mac = b64encode(hmac.digest(self._secret, f"{message}{issued}".encode(), "sha256")).decode()
        token = f"{self._parameter}={issued}-{quote(mac, safe='')}"
        return Signed(joined(self.edge.url + path, query, token), seconds)


KIND = SignerKind(
    name="cloudflare",
    title="Cloudflare",
    signer=_Cloudflare,
    options={"secret": SECRET, "parameter": PARAMETER, "origin": ORIGIN},
)
