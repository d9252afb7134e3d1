"""`URLSigner`: makes links to files that expire, and checks them. Any process with the same keys can check a link.

The format of a link is that of the path, and of a query with these parameters, in this order. `k`, `i` and `s` are in
every link. If the URL has a query besides, that comes before them, and is signed too:

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
`s`   the signature: 43 characters of base64url [RFC 4648 5]
===== ======================================================================================

The signature is HMAC-SHA256 over four byte strings, each after its length in eight bytes: the version of this format,
the class of methods (`GET`, which includes HEAD), the path with its percent-encoding decoded, and the query before
`&s=`. Each value in the query has exactly one percent-encoding. So a parameter that is added, removed, repeated, moved
or written in another way changes the signed bytes.
"""

import hmac
import re
import secrets
import time
from binascii import b2a_base64
from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from downloadview_async.errors import ConfigurationError, LinkExpired, LinkInvalid
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.policy.addresses import address_of
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.stores.base import GrantStore
from downloadview_async.policy.stores.guarded import GuardedStore, WhenStoreFails
from downloadview_async.policy.uses import MARGIN, USE, Use, client_network

MIN_SECRET_BYTES = 32
"""The shortest secret: as long as the output of the hash function [RFC 2104 3]."""

MAX_QUERY_BYTES = 8192
"""The longest query that is looked at."""

MOST_USES = 1_000_000
"""The most downloads that a link may be limited to."""

_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE_IN_QUERY = "%!$&()*+,;=:@/?"  # a client would encode the others
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_VERSION_AND_METHODS = b"".join(len(part).to_bytes(8) + part for part in (b"downloadview 1", b"GET"))


class URLSigner:
    """Signs the URLs of files, and checks them.

        signer = URLSigner({"2026a": secrets.token_bytes(32)}, max_age=timedelta(days=7))
        url = signer.sign("/files/report.pdf", expires_in=timedelta(hours=1))

    keys: the secrets by their ids. The first signs, all of them verify. max_age: the longest life of a link, and its
    default; None: a link may be valid for ever.

    store: keeps how often links with `uses` were used, and which links and keys are revoked. Without a store, such
    links are refused, and nothing can be revoked. when_store_fails: "refuse" answers 503 while the store does not
    answer, "allow" sends the file. store_timeout: seconds to wait for an answer of the store. session_seconds: how long
    a download may take, with all its pauses, before a further request counts as another one. client_of: gets the ASGI
    scope of a request and returns the client, by default its address, or its /64 network with IPv6.

    Raises `ConfigurationError` for a key that is too short or has an invalid id, if there is none, and for a store or
    an option of it that is not one.
    """

    def __init__(
        self,
        keys: Mapping[str, bytes | str],
        *,
        max_age: timedelta | None = timedelta(days=7),
        store: GrantStore | None = None,
        when_store_fails: WhenStoreFails = "refuse",
        store_timeout: float = 2.0,
        session_seconds: float = 86_400,
        client_of: Callable[[Mapping[str, Any]], str] = client_network,
    ) -> None:
        if not keys:
            raise ConfigurationError("URLSigner needs a key: URLSigner({'2026a': secrets.token_bytes(32)})")
        if max_age is not None and max_age < timedelta(seconds=1):
            raise ConfigurationError(f"max_age is {max_age}: give one second or more, or None for links without an end")
        self._keys = {name: _checked_secret(name, secret) for name, secret in keys.items()}
        self._max_age = max_age
        if not (store_timeout > 0 and session_seconds > 0):
            raise ConfigurationError("store_timeout and session_seconds are seconds: give numbers above 0")
        self._store = (
            None if store is None else GuardedStore(store, when_it_fails=when_store_fails, timeout=store_timeout)
        )
        self._session_seconds = session_seconds
        self._client_of = client_of

    def sign(
        self,
        path: str,
        *,
        expires_in: timedelta | None = None,
        until: datetime | None = None,
        filename: str | None = None,
        attachment: bool | None = None,
        content_type: str | None = None,
        client: str | None = None,
        shareable: bool = False,
        uses: int | None = None,
        query: str = "",
        base: str = "",
    ) -> str:
        """Return the link to a file: `base`, the path and a query.

        path: the path that the application gets, not percent-encoded, such as `/files/Q3 report.pdf`. expires_in,
        until: how long, or until when, the link is valid; by default for the signer's `max_age`. filename, attachment,
        content_type: take the place of what the file and the application say. client: the address or the network from
        which alone the link is valid. shareable: whether shared caches may keep the answer, until the link expires.
        uses: how many downloads the link allows; this needs a store. query: what the URL has in its query besides, such
        as `version=3`. base: the scheme, the host and the prefix that a proxy removes, such as
        `https://example.org/dl`; they are not signed.

        Raises `ValueError` for an argument that is refused.
        """
        checked = _checked_path(path)
        key_id = next(iter(self._keys))
        values = {
            "k": key_id,
            "i": _new_link_id(),
            "e": self._expiry(expires_in, until),
            "f": None if filename is None else _checked_filename(filename),
            "d": None if attachment is None else "a" if attachment else "i",
            "t": None if content_type is None else _checked_content_type(content_type),
            "c": None if client is None else str(_network(client)),
            "p": "1" if shareable else None,
            "u": None if uses is None else self._checked_uses(uses, shareable=shareable),
        }
        pairs = [f"{name}={quote(value, safe='')}" for name, value in values.items() if value is not None]
        signed = "&".join([*filter(None, [quote(query, safe=_SAFE_IN_QUERY)]), *pairs])
        signature = _signature(self._keys[key_id], checked.encode(), signed.encode())
        return f"{_checked_base(base)}{quote(checked)}?{signed}&s={signature.decode()}"

    def check(self, path: bytes, query: bytes, client: str | None, now: float) -> Grant:
        """Return what a link grants.

        path: as the client has sent it, with its percent-encoding decoded. client: the address of the client, if it is
        known. now: seconds since 1970 UTC. Uses are not counted, and revocations not looked up: `verify` does that.

        Raises `LinkInvalid`, or `LinkExpired` if the link was valid until a time before `now`.
        """
        signed, _, signature = query.rpartition(b"&s=")
        link = signed[signed.rfind(b"&k=") + 1 :]  # a value of a link has no `&`, so what precedes is the URL's query
        key_id = link[2 : link.find(b"&")].decode("latin-1") if link.startswith(b"k=") else ""
        secret = self._keys.get(key_id) if len(query) <= MAX_QUERY_BYTES else None
        if secret is None or not hmac.compare_digest(_signature(secret, path, signed), signature):
            raise LinkInvalid("the link is not signed by one of the keys")
        values = {pair[0]: pair[2:] for pair in link.decode("ascii").split("&")}  # as `sign` has made them
        expires = int(values["e"]) if "e" in values else None
        if expires is not None and expires <= now:
            raise LinkExpired(f"the link {values['i']} has expired")
        network = values.get("c")
        if network is not None and not _is_in(client, unquote(network)):
            raise LinkInvalid(f"the link {values['i']} is not for this client")
        filename, disposition, content_type = values.get("f"), values.get("d"), values.get("t")
        return Grant(
            filename=None if filename is None else unquote(filename),
            attachment=None if disposition is None else disposition == "a",
            content_type=None if content_type is None else unquote(content_type),
            expires=expires,
            is_shareable="p" in values,
            link_id=values["i"],
            key_id=key_id,
            uses=int(values["u"]) if "u" in values else None,
        )

    async def verify(self, scope: MutableMapping[str, Any]) -> Grant:
        """Return what the link of a request grants.

        scope: that of ASGI. For a GET of a link with `uses` it gets an entry, by which `DownloadResponse` counts the
        download when it is about to send the file.

        Raises what `check` raises, `LinkInvalid` for a link that is revoked, and `SourceUnavailable` if the store does
        not answer.
        """
        if scope["method"] not in ("GET", "HEAD"):
            raise LinkInvalid("a link is for GET and HEAD alone")
        raw_path, client = scope.get("raw_path"), scope.get("client")
        path = scope["path"].encode() if raw_path is None else unquote_to_bytes(raw_path.partition(b"?")[0])
        grant = self.check(path, scope["query_string"], client[0] if client else None, time.time())
        if self._store is None:
            if grant.uses is not None:
                raise LinkInvalid(f"the link {grant.link_id} is for {grant.uses} downloads, and there is no store")
            return grant
        await self.refuse_revoked(grant)
        if grant.uses is not None and scope["method"] == "GET":
            scope[USE] = Use(self._store, grant, self._client_of(scope), self._session_seconds)
        return grant

    async def refuse_revoked(self, grant: Grant) -> None:
        """Raise `LinkInvalid` if the link or its key is revoked, `SourceUnavailable` if the store does not answer."""
        if self._store is None:
            return
        identifiers = [name for name in (grant.link_id, grant.key_id) if name is not None]
        if await self._store.is_revoked(identifiers):
            raise LinkInvalid(f"the link {grant.link_id}, or its key {grant.key_id}, is revoked")

    async def revoke(self, identifier: str) -> float | None:
        """Revoke a link, or all links of a key, by its id: from the next request on, in every process with this store.

        Returns until when the entry is kept, in seconds since 1970 UTC: until every link that can exist now has
        expired. None: for ever, as for a key.

        Raises `ConfigurationError` without a store, `ValueError` for what cannot be an id, and `SourceUnavailable` if
        the store does not answer.
        """
        if self._store is None:
            raise ConfigurationError("links are revoked in a store: give URLSigner a store")
        if not _KEY_ID.fullmatch(identifier):
            raise ValueError(f"{identifier!r} is not the id of a link or of a key")
        until = None
        if self._max_age is not None and identifier not in self._keys:
            until = time.time() + self._max_age.total_seconds() + MARGIN
        await self._store.revoke(identifier, until)
        return until

    def _checked_uses(self, uses: int, *, shareable: bool) -> str:
        if self._store is None:
            raise ConfigurationError("uses are counted in a store: give URLSigner a store")
        if not 1 <= uses <= MOST_USES:
            raise ValueError(f"uses is {uses}: give a number from 1 to {MOST_USES}")
        if shareable:
            raise ValueError("a link with uses cannot be shareable, because caches do not count")
        return f"{uses:d}"

    def _expiry(self, expires_in: timedelta | None, until: datetime | None) -> str | None:
        now = time.time()
        if until is not None:
            if expires_in is not None or until.tzinfo is None:
                raise ValueError(f"until is {until}: give a time with a zone, and no expires_in")
            age = timedelta(seconds=until.timestamp() - now)
        elif expires_in is not None:
            age = expires_in
        elif self._max_age is not None:
            age = self._max_age
        else:
            return None
        if age < timedelta(seconds=1) or (self._max_age is not None and age > self._max_age):
            raise ValueError(
                f"the link would be valid for {age}: give a second or more, at most max_age, {self._max_age}"
            )
        return str(int(now + age.total_seconds()) if until is None else int(until.timestamp()))


def _signature(secret: bytes, path: bytes, signed: bytes) -> bytes:
    message = b"".join((_VERSION_AND_METHODS, len(path).to_bytes(8), path, len(signed).to_bytes(8), signed))
    return b2a_base64(hmac.digest(secret, message, "sha256"), newline=False)[:-1].translate(_URL_SAFE)


def _is_in(client: str | None, network: str) -> bool:
    address = address_of(client)
    return address is not None and address in ip_network(network)


def _network(client: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(client, strict=False)
    except ValueError:
        raise ValueError(f"client is {client!r}: give an address or a network, such as 203.0.113.0/24") from None


def _new_link_id() -> str:
    """Return a random id that is not taken for an option of a command."""
    while (link_id := secrets.token_urlsafe(9)).startswith("-"):
        pass
    return link_id


def _checked_secret(key_id: str, secret: bytes | str) -> bytes:
    if not _KEY_ID.fullmatch(key_id):
        raise ConfigurationError(f"{key_id!r} is not the id of a key: use letters, digits, dots, _ and -, at most 64")
    secret = secret.encode() if isinstance(secret, str) else secret
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"the secret of the key {key_id!r} has {len(secret)} bytes: give {MIN_SECRET_BYTES} random bytes or more"
        )
    return secret


def _checked_path(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f"the path {path!r} does not begin with a slash: give the path of a URL, such as /files/a.txt")
    if not {".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(f"the path {path!r} has a segment '.' or '..', which clients remove")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {path!r} is not valid UTF-8") from None
    return path


def _checked_filename(filename: str) -> str:
    if not filename.strip() or _CONTROL.search(filename):
        raise ValueError(f"filename is {filename!r}: give a name without control characters")
    return filename


def _checked_content_type(content_type: str) -> str:
    if valid_content_type(content_type) is None:
        raise ValueError(f"{content_type!r} is not a content type: write one such as 'text/html; charset=utf-8'")
    return content_type


def _checked_base(base: str) -> str:
    if base:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"base is {base!r}: give a scheme and a host, such as https://example.org")
    return base.rstrip("/")
