"""The query signature of Amazon S3 (Signature Version 4), which other stores with S3's API accept too. No I/O here.

Google Cloud Storage has the same signature with other names: its V4. Each of the two is a `Dialect`.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
https://docs.cloud.google.com/storage/docs/authentication/canonical-requests
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

MAX_SECONDS = 7 * 24 * 3600
"""The longest time that a signed URL can be valid."""

_USUAL_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """The names of one store in a query signature.

    prefix: of the parameters. algorithm: the value of the parameter that names it. key: what is written before a secret
    key. service, end: the last two parts of the scope of a signature.
    """

    prefix: str
    algorithm: str
    key: str
    service: str
    end: str


S3 = Dialect("X-Amz-", "AWS4-HMAC-SHA256", "AWS4", "s3", "aws4_request")
GOOGLE_HMAC = Dialect("X-Goog-", "GOOG4-HMAC-SHA256", "GOOG4", "storage", "goog4_request")
GOOGLE_RSA = Dialect("X-Goog-", "GOOG4-RSA-SHA256", "", "storage", "goog4_request")
"""The last is signed with the private key of a service account, see `unsigned_url`."""


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
    dialect: Dialect = S3,
) -> str:
    """Return `url` with a signature, with which anyone can request it by `method` for `seconds` from `now` on.

    url: the percent-encoded URL of the object, without a query. parameters: further parameters of the query, which are
    signed too, such as `response-content-type`. now: seconds since the epoch, UTC.
    """
    parameters = dict(parameters or {})
    if credentials.token is not None:
        parameters[f"{dialect.prefix}Security-Token"] = credentials.token
    unsigned, to_sign = unsigned_url(
        url,
        credentials.access_key_id,
        region=region,
        seconds=seconds,
        now=now,
        parameters=parameters,
        method=method,
        dialect=dialect,
    )
    key = f"{dialect.key}{credentials.secret_access_key}".encode()
    for part in to_sign.split("\n")[2].split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return f"{unsigned}&{dialect.prefix}Signature={hmac.digest(key, to_sign.encode(), 'sha256').hex()}"


def unsigned_url(
    url: str,
    key_id: str,
    *,
    region: str,
    seconds: int,
    now: float,
    parameters: Mapping[str, str],
    method: str = "GET",
    dialect: Dialect,
) -> tuple[str, str]:
    """Return the URL without its last parameter, which is the signature, and the text to sign.

    key_id: names the key that signs. The other arguments are those of `presigned_url`.
    """
    parts = urlsplit(url)
    # as in a client's Host: in lower case, and with a port only if it is not the default
    host = parts.netloc.lower().removesuffix(_USUAL_PORTS.get(parts.scheme, ":"))
    time = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{time[:8]}/{region}/{dialect.service}/{dialect.end}"
    query = dict(parameters) | {
        f"{dialect.prefix}Algorithm": dialect.algorithm,
        f"{dialect.prefix}Credential": f"{key_id}/{scope}",
        f"{dialect.prefix}Date": time,
        f"{dialect.prefix}Expires": str(seconds),
        f"{dialect.prefix}SignedHeaders": "host",
    }
    pairs = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in query.items())
    canonical_query = "&".join("=".join(pair) for pair in pairs)
    # "S3 [...] do not normalize URI paths". The body is not signed: another client sends the request.
    request = "\n".join([method, parts.path or "/", canonical_query, f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"])
    to_sign = "\n".join([dialect.algorithm, time, scope, hashlib.sha256(request.encode()).hexdigest()])
    return f"{parts.scheme}://{parts.netloc}{parts.path or '/'}?{canonical_query}", to_sign
