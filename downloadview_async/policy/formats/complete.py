"""`CompleteLinks`: the default format, which has every option of `URLSigner.sign`.

The query has these parameters, in this order. `k`, `i` and `s` are in every link. If the URL has a query besides, that
comes before them, and is signed too:

===== ======================================================================================
`k`   the id of the key
`i`   the id of the link
`e`   when it expires, in seconds since 1970 UTC
`f`   the name under which the client saves the file
`d`   `a`: the client saves the file, `i`: it shows the file inline
`t`   the Content-Type
`c`   the network of the client, such as `203.0.113.0/24`
`p`   `1`: shared caches may keep the answer
`u`   how many downloads the link allows
`b`   the link is to a folder and all that is below it: the bytes of the folder's path
`s`   the signature: 43 characters of base64url [RFC 4648 5]
===== ======================================================================================

The signature is HMAC-SHA256 over four byte strings, each after its length in eight bytes: the version of this format,
the class of methods (`GET`, which includes HEAD), the path with its percent-encoding decoded, and the query before
`&s=`. Each value in the query has exactly one percent-encoding. So a parameter that is added, removed, repeated, moved
or written in another way changes the signed bytes.

In a link to a folder and all that is below it, the class of methods is `GET below`, and the path is that of the folder:
the first `b` bytes of the path that is requested. So it is never taken for a link of the other kind. Its query may have
the parameters of the pages besides, which are not signed: see `policy/folders.py`.
"""

import hashlib
import hmac
from binascii import b2a_base64
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_network
from urllib.parse import quote, unquote_to_bytes

from downloadview_async.errors import LinkExpired, LinkInvalid
from downloadview_async.policy.addresses import address_of
from downloadview_async.policy.folders import carried, link_to_folder
from downloadview_async.policy.grants import Grant

_MAX_QUERY = 8192  # bytes that are looked at
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_VERSION = b"downloadview 1"
_KEPT = 1024  # valid links
_BLOCK = 64  # bytes of SHA-256
_INNER, _OUTER = bytes(byte ^ 0x36 for byte in range(256)), bytes(byte ^ 0x5C for byte in range(256))

_Sign = Callable[[bytes, bytes], bytes]


class CompleteLinks:
    """Links that `URLSigner` verifies."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._key_id = next(iter(keys))
        self._signers = {key_id.encode(): _signer_of(secret, b"GET") for key_id, secret in keys.items()}
        self._folder_signers = {key_id.encode(): _signer_of(secret, b"GET below") for key_id, secret in keys.items()}
        # Valid links by path and query. A player that seeks and a download in parts use the same link again and again.
        self._verified: dict[tuple[bytes, bytes], tuple[Grant, str | None]] = {}

    def query(self, path: str, grant: Grant, client: str | None, others: str = "") -> str:
        """Return the query of a link to a path."""
        values = {
            "k": self._key_id,
            "i": grant.link_id,
            "e": None if grant.expires is None else str(grant.expires),
            "f": grant.filename,
            "d": None if grant.attachment is None else "a" if grant.attachment else "i",
            "t": grant.content_type,
            "c": client,
            "p": "1" if grant.is_shareable else None,
            "u": None if grant.uses is None else f"{grant.uses:d}",
            "b": None if grant.folder is None else f"{len(grant.folder.encode()):d}",
        }
        pairs = [f"{name}={quote(value, safe='')}" for name, value in values.items() if value is not None]
        query = "&".join([others, *pairs] if others else pairs)
        signers = self._signers if grant.folder is None else self._folder_signers
        return f"{query}&s={signers[self._key_id.encode()](path.encode(), query.encode()).decode()}"

    def check(self, path: bytes, query: bytes, client: str | None, now: float) -> Grant:
        """Return what a link grants. Raises `LinkInvalid` and `LinkExpired`."""
        signers = self._signers
        if b"&b=" in query and (link := link_to_folder(path, query)) is not None:
            (path, query), signers = link, self._folder_signers
        if (verified := self._verified.get((path, query))) is None:
            verified = _verified(path, query, signers)
            if len(self._verified) >= _KEPT:
                self._verified.pop(next(iter(self._verified)), None)  # another thread may have removed it
            self._verified[path, query] = verified
        grant, network = verified
        if grant.expires is not None and grant.expires <= now:
            raise LinkExpired(f"the link {grant.link_id} has expired")
        if network is not None and not _is_in(client, network):
            raise LinkInvalid(f"the link {grant.link_id} is not for this client")
        return grant

    def is_alone(self, query: bytes) -> bool:
        """Return whether a valid query has the link alone."""
        return (
            query.startswith(b"k=")
            and b"&k=" not in query  # the first would be one of the URL
            and (b"&b=" not in query or carried(query) == query)
        )


def _verified(path: bytes, query: bytes, signers: Mapping[bytes, _Sign]) -> tuple[Grant, str | None]:
    """Return what a link grants, whenever and to whom, and the network of its client. Raises `LinkInvalid`."""
    signed, _, signature = query.rpartition(b"&s=")
    link = signed[signed.rfind(b"&k=") + 1 :]  # a value of a link has no `&`, so what precedes is the URL's query
    sign = signers.get(link[2 : link.find(b"&")]) if link.startswith(b"k=") else None
    if sign is None or len(query) > _MAX_QUERY or not hmac.compare_digest(sign(path, signed), signature):
        raise LinkInvalid("the link is not signed by one of the keys")
    values = {pair[0]: pair[2:] for pair in link.decode("ascii").split("&")}  # as `query` has made them
    grant = Grant(
        filename=_decoded(values["f"]) if "f" in values else None,
        attachment=values["d"] == "a" if "d" in values else None,
        content_type=_decoded(values["t"]) if "t" in values else None,
        expires=int(values["e"]) if "e" in values else None,
        is_shareable="p" in values,
        link_id=values["i"],
        key_id=values["k"],
        uses=int(values["u"]) if "u" in values else None,
        folder=path.decode() if "b" in values else None,
    )
    return grant, _decoded(values["c"]) if "c" in values else None


def _signer_of(secret: bytes, methods: bytes) -> _Sign:
    """Return a function that signs a path and a query. methods: the class of methods.

    It is HMAC [RFC 2104 2] with the two hashes of the key made once: `hmac.digest` makes them again each time.
    """
    key = (hashlib.sha256(secret).digest() if len(secret) > _BLOCK else secret).ljust(_BLOCK, b"\0")
    keyed_inner = hashlib.sha256(
        key.translate(_INNER) + b"".join(len(part).to_bytes(8) + part for part in (_VERSION, methods))
    )
    keyed_outer = hashlib.sha256(key.translate(_OUTER))

    def sign(path: bytes, signed: bytes) -> bytes:
        inner, outer = keyed_inner.copy(), keyed_outer.copy()
        inner.update(b"".join((len(path).to_bytes(8), path, len(signed).to_bytes(8), signed)))
        outer.update(inner.digest())
        return b2a_base64(outer.digest(), newline=False)[:-1].translate(_URL_SAFE)

    return sign


def _decoded(value: str) -> str:
    return unquote_to_bytes(value).decode()


@lru_cache(maxsize=_KEPT)  # a download in parts comes from one address
def _is_in(client: str | None, network: str) -> bool:
    address = address_of(client)
    return address is not None and address in ip_network(network)
