"""bunny.net: tokens of a pull zone, with HMAC-SHA256.

https://github.com/BunnyWay/BunnyCDN.TokenAuthentication
"""

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Mapping

from downloadview_async.offload.signers.base import (
    LONGEST,
    ORIGIN,
    S3_HEADERS,
    SECRET,
    Edge,
    Signed,
    SignerKind,
    joined,
    s3_query,
)
from downloadview_async.offload.signers.keys import secret_text


class _Bunny:
    max_seconds = LONGEST

    def __init__(self, edge: Edge, *, secret: str | None, origin: str) -> None:
        self.edge = edge
        self.carries = S3_HEADERS if origin == "s3" else frozenset()
        self.is_served_alike = origin == "service"
        self._secret = secret_text("secret", secret).encode()

    def __repr__(self) -> str:
        return f"<signer of bunny.net at {self.edge.url}>"

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        expires = int(now) + seconds
        parameters = "&".join(f"response-{name}={value}" for name, value in sorted(headers.items()))
        text = f"{self.edge.prefix}{path}{expires}{parameters}"  # with the decoded values
        token = urlsafe_b64encode(hmac.digest(self._secret, text.encode(), "sha256")).decode().rstrip("=")
        url = joined(self.edge.url + path, f"token=HS256-{token}", s3_query(headers), f"expires={expires}")
        return Signed(url, seconds)


KIND = SignerKind(name="bunny", title="bunny.net", signer=_Bunny, options={"secret": SECRET, "origin": ORIGIN})
