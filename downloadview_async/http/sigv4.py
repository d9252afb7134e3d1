"""The query signature of Amazon S3 (Signature Version 4), which other stores with S3's API accept too. No I/O here.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

MAX_SECONDS = 7 * 24 * 3600
"""The longest time that a signed URL can be valid."""

_ALGORITHM = "AWS4-HMAC-SHA256"
_USUAL_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key of S3. token: the session token of a temporary key. `repr` shows no secret."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


def presigned_url(
    url: str,
    credentials: Credentials,
    *,
    region: str,
    seconds: int,
    now: float,
    parameters: Mapping[str, str] | None = None,
    method: str = "GET",
) -> str:
    """Return `url` with a signature, with which anyone can request it by `method` for `seconds` from `now` on.

    url: the percent-encoded URL of the object, without a query. parameters: further parameters of the query, which are
    signed too, such as `response-content-type`. now: seconds since the epoch, UTC.
    """
    parts = urlsplit(url)
    # as in a client's Host: in lower case, and with a port only if it is not the default
    host = parts.netloc.lower().removesuffix(_USUAL_PORTS.get(parts.scheme, ":"))
    time = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{time[:8]}/{region}/s3/aws4_request"
    query = dict(parameters or {}) | {
        "X-Amz-Algorithm": _ALGORITHM,
        "X-Amz-Credential": f"{credentials.access_key_id}/{scope}",
        "X-Amz-Date": time,
        "X-Amz-Expires": str(seconds),
        "X-Amz-SignedHeaders": "host",
    }
    if credentials.token is not None:
        query["X-Amz-Security-Token"] = credentials.token
    pairs = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in query.items())
    canonical_query = "&".join("=".join(pair) for pair in pairs)
    # "S3 [...] do not normalize URI paths". The body is not signed: another client sends the request.
    request = "\n".join([method, parts.path or "/", canonical_query, f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"])
    to_sign = "\n".join([_ALGORITHM, time, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    return f"{parts.scheme}://{parts.netloc}{parts.path or '/'}?{canonical_query}&X-Amz-Signature={signature}"
