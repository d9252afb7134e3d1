"""Any other edge whose token is an HMAC of texts that it knows, such as Akamai and Fastly."""

import base64
import hmac
import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Literal
from urllib.parse import quote

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.signers.base import (
    LONGEST,
    ORIGIN,
    PARAMETER,
    S3_HEADERS,
    SECRET,
    Edge,
    Signed,
    SignerKind,
    SignerOption,
    joined,
    parameter_name,
    s3_query,
)
from downloadview_async.offload.signers.keys import secret_base64, secret_hex, secret_text

_OF_TEXT = frozenset({"path", "query", "host", "expires", "now", "seconds"})
_OF_TOKEN = frozenset({"expires", "now", "seconds", "signature"})
_AS_IS = "=~*!/,:-_.;@"
_NEEDS_NOTHING = re.compile(f"[A-Za-z0-9{re.escape(_AS_IS)}]*").fullmatch


class _Hmac:
    max_seconds = LONGEST

    def __init__(
        self,
        edge: Edge,
        *,
        secret: str | None,
        secret_encoding: str,
        algorithm: str,
        text: str,
        token: str,
        signature_encoding: str,
        parameter: str | None,
        origin: str,
    ) -> None:
        read = {"hex": secret_hex, "base64": secret_base64}.get(secret_encoding)
        self._secret = read("secret", secret) if read else secret_text("secret", secret).encode()
        self.edge = edge
        in_text, in_token = _names("text", text, _OF_TEXT), _names("token", token, _OF_TOKEN)
        if "path" not in in_text or not in_text & {"expires", "now"}:
            raise ConfigurationError("text: without {path} and {expires}, anyone could change the URL: add both")
        if "signature" not in in_token:
            raise ConfigurationError("token: without {signature}, the edge has nothing to check: add it")
        if origin == "s3" and "query" not in in_text:
            raise ConfigurationError(
                "text: without {query}, anyone could change the type and the name that the URL carries: add it, or use "
                "another origin"
            )
        self.carries = S3_HEADERS if origin == "s3" else frozenset()
        self.is_served_alike = origin == "service"
        self._algorithm = algorithm
        self._text = text
        self._token = token
        self._encode = _ENCODINGS[signature_encoding]
        self._parameter = parameter_name(parameter or "token")

    def __repr__(self) -> str:
        return f"<signer of tokens at {self.edge.url}>"

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        query = s3_query(headers) if headers else ""
        begins = int(now)
        ends = begins + seconds
        text = self._text.format(
            path=self.edge.prefix + path, query=query, host=self.edge.host, expires=ends, now=begins, seconds=seconds
        )
        signature = self._encode(hmac.digest(self._secret, text.encode(), self._algorithm))
        token = self._token.format(signature=signature, expires=ends, now=begins, seconds=seconds)
        if not _NEEDS_NOTHING(token):
            token = quote(token, safe=_AS_IS)
        return Signed(joined(self.edge.url + path, query, f"{self._parameter}={token}"), seconds)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


_ENCODINGS: dict[str, Callable[[bytes], str]] = {"hex": bytes.hex, "base64": _base64, "base64url": _base64url}


def _names(option: str, template: str, known: frozenset[str]) -> set[str]:
    """Return the names in braces of a template. Raises `ConfigurationError` for other names and for formats."""
    takes = ", ".join(f"{{{name}}}" for name in sorted(known))
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        raise ConfigurationError(f"{option}: {template!r} has a brace without its counterpart: use {takes}") from None
    for _, name, form, conversion in parts:
        if name is not None and (name not in known or form or conversion):
            raise ConfigurationError(f"{option}: {{{name}}} is unknown: use {takes}")
    return {name for _, name, _, _ in parts if name is not None}


KIND = SignerKind(
    name="hmac",
    title="HMAC",
    signer=_Hmac,
    options={
        "secret": SECRET,
        "secret_encoding": SignerOption(
            Literal["text", "hex", "base64"], takes="text, hex or base64: how the secret is written", default="text"
        ),
        "algorithm": SignerOption(
            Literal["sha1", "sha256", "sha384", "sha512"], takes="sha1, sha256, sha384 or sha512", default="sha256"
        ),
        "text": SignerOption(
            str,
            takes="what is signed, with {path}, {query}, {host}, {expires}, {now} and {seconds}",
            default="{expires}{path}",
        ),
        "token": SignerOption(
            str, takes="the token, with {signature}, {expires}, {now} and {seconds}", default="{expires}_{signature}"
        ),
        "signature_encoding": SignerOption(
            Literal["hex", "base64", "base64url"], takes="hex, base64 or base64url", default="hex"
        ),
        "parameter": PARAMETER,
        "origin": ORIGIN,
    },
)
