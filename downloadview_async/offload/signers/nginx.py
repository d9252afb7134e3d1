"""nginx on another machine, which checks URLs by its module secure_link.

https://nginx.org/en/docs/http/ngx_http_secure_link_module.html
"""

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from urllib.parse import quote, unquote, unquote_to_bytes

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.signers.base import (
    KEY_ID,
    LONGEST,
    ORIGIN,
    SECRET,
    Edge,
    Signed,
    SignerKind,
    SignerOption,
    joined,
)
from downloadview_async.offload.signers.keys import secret_text

EXPRESSION = "$secret $secure_link_expires $arg_disposition $arg_filename $arg_type $uri $secret"
"""The default. Only the path may have a space, so that no two URLs have the same text. The secret is at both ends."""

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_KNOWN = {
    "secret",
    "secure_link_expires",
    "arg_expires",
    "arg_key",
    "arg_disposition",
    "arg_filename",
    "arg_type",
    "uri",
}
_EXACT_NAME = re.compile(r"filename\*=UTF-8''(\S+)", re.IGNORECASE)
_NAME = re.compile('filename="([^"]*)"', re.IGNORECASE)


class _Nginx:
    max_seconds = LONGEST

    def __init__(self, edge: Edge, *, secret: str | None, key_id: str | None, expression: str, origin: str) -> None:
        if key_id is not None and not re.fullmatch("[A-Za-z0-9_.-]{1,64}", key_id):
            raise ConfigurationError(f"key_id: {key_id!r} is not an id: use letters, digits, _, . and -")
        self.edge = edge
        self._key_id = key_id
        self._secret = secret_text("secret", secret)
        names = [match[1] or match[2] for match in _VARIABLE.finditer(expression)]
        for name in names:
            if name not in _KNOWN:
                known = ", ".join(f"${one}" for one in sorted(_KNOWN))
                raise ConfigurationError(f"expression: ${name} is not known when the client is redirected: use {known}")
        for needed in (("secret",), ("uri",), ("secure_link_expires", "arg_expires")):
            if not {*needed} & {*names}:
                raise ConfigurationError(f"expression: without ${needed[0]}, anyone could change the URL: add it")
        carried = {"content-disposition": {"arg_disposition", "arg_filename"}, "content-type": {"arg_type"}}
        self.carries = frozenset(header for header, needed in carried.items() if needed <= {*names})
        if origin == "s3":
            raise ConfigurationError(
                'origin: nginx sends the name and the type itself, by its configuration: remove "s3"'
            )
        self.is_served_alike = origin == "service"
        if self.is_served_alike:
            self.carries = frozenset()
        # the texts between the variables, and the names of the variables
        self._parts = [
            (index % 2 == 1, part) for index, part in enumerate(_VARIABLE.sub("\0\\1\\2\0", expression).split("\0"))
        ]

    def __repr__(self) -> str:
        return f"<signer of nginx at {self.edge.url}>"

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        expires = str(int(now) + seconds)
        disposition, filename = _presented(headers.get("content-disposition", ""))
        arguments = {
            "expires": expires,
            "key": self._key_id or "",
            "disposition": disposition,
            "filename": filename,
            "type": quote(re.sub(r"\s+", "", headers.get("content-type", "")), safe="/;=+"),
        }
        values = {f"arg_{name}": value.encode() for name, value in arguments.items()}
        values |= {"secret": self._secret.encode(), "secure_link_expires": expires.encode()}
        values["uri"] = unquote_to_bytes(self.edge.prefix + path)
        text = b"".join(values[part] if is_name else part.encode() for is_name, part in self._parts)
        md5 = urlsafe_b64encode(hashlib.md5(text, usedforsecurity=False).digest()).decode().rstrip("=")
        pairs = [f"{name}={value}" for name, value in arguments.items() if value]
        return Signed(joined(self.edge.url + path, f"md5={md5}", *pairs), seconds)


def _presented(disposition: str) -> tuple[str, str]:
    """Return the kind of a Content-Disposition, and the name of the file as RFC 8187 encodes it."""
    exact, plain = _EXACT_NAME.search(disposition), _NAME.search(disposition)
    name = unquote(exact[1]) if exact else plain[1] if plain else ""
    kind = disposition.partition(";")[0].strip().lower()
    return (kind if re.fullmatch("[a-z-]+", kind) else ""), quote(name, safe="")


KIND = SignerKind(
    name="nginx",
    title="nginx",
    signer=_Nginx,
    options={
        "secret": SECRET,
        "key_id": KEY_ID,
        "origin": ORIGIN,
        "expression": SignerOption(
            str, takes="the text of secure_link_md5, with $secret in place of the secret", default=EXPRESSION
        ),
    },
)
