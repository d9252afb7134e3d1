"""`SecureLinks`: links that nginx verifies without us, by its module secure_link.

The query is `md5=...&expires=...&key=...`, and `&client=1` at the end of a link for one address. `md5` is the MD5 in
base64url of these, with a space between each: the secret, `expires`, the path as `sign` percent-encodes it, the address
(or nothing) and the secret again. With the secret at both ends, neither a collision of MD5 nor a longer text helps an
attacker. See https://nginx.org/en/docs/http/ngx_http_secure_link_module.html.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from ipaddress import ip_network
from urllib.parse import quote

from downloadview_async.errors import LinkExpired, LinkInvalid, WrongType
from downloadview_async.policy.addresses import address_of
from downloadview_async.policy.grants import Grant

QUERY = "md5=[A-Za-z0-9_-]{21}[AQgw]&expires=[1-9][0-9]{0,11}&key=[A-Za-z0-9_.-]{1,64}(&client=1)?"
"""A regular expression for the whole query. The template `nginx-links.conf` has the same.

nginx alone would ignore everything else in a query, and the four bits of `md5` that are not part of the hash.
"""

_QUERY = re.compile(QUERY.encode())


class SecureLinks:
    """Links that nginx verifies, for a file, a time, and a client or everyone."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._key_id = next(iter(keys))
        self._secrets = secrets_of(keys)

    def query(self, path: str, grant: Grant, client: str | None, others: str = "") -> str:
        """Return the query of a link to a path. Raises `ValueError` for what nginx cannot verify or do."""
        for option, value, reason in (
            ("filename", grant.filename, "nginx sends the name in the path"),
            ("attachment", grant.attachment, "nginx sends the disposition of the route"),
            ("content_type", grant.content_type, "nginx takes it from the name in the path"),
            ("shareable", grant.is_shareable or None, "nginx sends `private, no-store` for each link"),
            ("uses", grant.uses, "nginx does not count downloads"),
            ("below", grant.folder, "nginx compares the whole path"),
            ("query", others or None, "nginx accepts the query of the link alone"),
        ):
            if value is not None:
                raise ValueError(f"a link of the format secure_link cannot have {option}: {reason}")
        if grant.expires is None:
            raise ValueError("a link of the format secure_link has to expire: give expires_in or until")
        network = None if client is None else ip_network(client)
        if network is not None and network.num_addresses > 1:
            raise ValueError(
                f"a link of the format secure_link cannot have the client {client}: nginx compares one address, not a "
                "network"
            )
        address = "" if network is None else str(address_of(str(network.network_address)))
        md5 = _md5(self._secrets[self._key_id], grant.expires, quote(path), address)
        return f"md5={md5}&expires={grant.expires}&key={self._key_id}{'&client=1' if address else ''}"

    def check(self, path: bytes, query: bytes, client: str | None, now: float) -> Grant:
        """Return what a link grants. Raises `LinkInvalid` and `LinkExpired`."""
        if _QUERY.fullmatch(query) is None:
            raise LinkInvalid("the link does not have the format secure_link")
        values = dict(pair.split("=") for pair in query.decode("ascii").split("&"))
        secret, expires = self._secrets.get(values["key"]), int(values["expires"])
        address = str(address_of(client) or "-") if "client" in values else ""
        if secret is None or not hmac.compare_digest(_md5(secret, expires, quote(path), address), values["md5"]):
            raise LinkInvalid("the link is not signed by one of the keys, or not for this client")
        link_id = hashlib.sha256(query).hexdigest()[:16]  # tells nothing about the signature
        if expires <= now:
            raise LinkExpired(f"the link {link_id} has expired")
        return Grant(expires=expires, link_id=link_id, key_id=values["key"])

    def is_alone(self, query: bytes) -> bool:
        """Return True: `check` accepts nothing else in a query."""
        return True


def secure_link_secrets(keys: Mapping[str, bytes | str]) -> str:
    """Return the file that nginx's configuration includes: a `map` from the ids of keys to their secrets.

    Whoever can read it can make links. keys: those of `URLSigner`.
    """
    if not isinstance(keys, Mapping):  # which may be a secret: the message does not show it
        raise WrongType("secure_link_secrets takes the keys of URLSigner, as in {'2026a': secret}")
    secrets = secrets_of({key_id: key.encode() if isinstance(key, str) else key for key_id, key in keys.items()})
    lines = (f'    "~^{key_id.replace(".", "[.]")}$" "{secret}";\n' for key_id, secret in secrets.items())
    return f"map $arg_key $link_secret {{\n{''.join(lines)}}}\n"


def secrets_of(keys: Mapping[str, bytes]) -> dict[str, str]:
    """Return the secret that nginx gets for each key. It is derived from the key, and does not reveal it."""
    label = b"downloadview secure_link"
    return {
        key_id: urlsafe_b64encode(hmac.digest(secret, label, "sha256")).decode().rstrip("=")
        for key_id, secret in keys.items()
    }


def _md5(secret: str, expires: int, path: str, address: str) -> str:
    text = f"{secret} {expires} {path} {address} {secret}"
    return urlsafe_b64encode(hashlib.md5(text.encode(), usedforsecurity=False).digest()).decode().rstrip("=")
