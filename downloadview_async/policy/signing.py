"""`URLSigner`: makes links to files that expire, and checks them. Any process with the same keys can check a link."""

import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

from downloadview_async.errors import ConfigurationError, FileError, LinkInvalid, WrongType
from downloadview_async.policy.folders import MAX_FOLDER
from downloadview_async.policy.formats import link_formats
from downloadview_async.policy.formats.base import LinkFormat
from downloadview_async.policy.grants import GRANT, Grant
from downloadview_async.policy.link_ids import LINK_ID, new_link_id
from downloadview_async.policy.stores.base import GrantStore
from downloadview_async.policy.stores.guarded import GuardedStore, WhenStoreFails
from downloadview_async.policy.uses import MARGIN, TOGETHER, USE, Use, client_network

MIN_SECRET_BYTES = 32
"""The shortest secret: as long as the output of the hash function [RFC 2104 3]."""

MOST_USES = 1_000_000
"""The most downloads that a link may be limited to."""

_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE_IN_QUERY = "%!$&()*+,;=:@/?"  # a client would encode the others


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

    Raises `ConfigurationError` for a key that is too short or has an invalid id, if there is none, and for an invalid
    store or option of it.
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
        if not isinstance(keys, Mapping):
            raise WrongType("keys is not a mapping: give {'2026a': secrets.token_bytes(32)}")
        if not keys:
            raise ConfigurationError("URLSigner needs a key: URLSigner({'2026a': secrets.token_bytes(32)})")
        if max_age is not None and not isinstance(max_age, timedelta):
            raise WrongType(f"max_age is {max_age!r}: give a timedelta, such as timedelta(hours=1)")
        if max_age is not None and max_age < timedelta(seconds=1):
            raise ConfigurationError(f"max_age is {max_age}: give one second or more, or None for links without an end")
        self._keys = {name: _checked_secret(name, secret) for name, secret in keys.items()}
        self._formats = {name: format_(self._keys) for name, format_ in link_formats().items()}
        self._max_age = max_age
        if not (store_timeout > 0 and session_seconds > 0):
            raise ConfigurationError("store_timeout and session_seconds are seconds: give numbers above 0")
        self._store = (
            None if store is None else GuardedStore(store, when_it_fails=when_store_fails, timeout=store_timeout)
        )
        self._session_seconds = session_seconds
        if not callable(client_of):
            raise WrongType(f"client_of is {client_of!r}: give a function of the scope of a request")
        self._client_of = client_of
        self._counts = {"verified": 0, "refused": 0}

    @property
    def counts(self) -> Mapping[str, int]:
        """How many requests had a link that was `verified` or `refused` in this process.

        With a store: how many were counted (`used`) or refused by it (`used-up`), and how often it failed
        (`store-failed`).
        """
        return self._counts if self._store is None else {**self._counts, **self._store.counts}

    async def aclose(self) -> None:
        """Close the connections of the store in the running event loop, at the end of the application."""
        if self._store is not None:
            await self._store.aclose()

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
        below: bool = False,
        query: str = "",
        base: str = "",
        format: str = "complete",  # noqa: A002
    ) -> str:
        """Return the link to a file: `base`, the path and a query.

        path: the path that the application gets, not percent-encoded, such as `/files/Q3 report.pdf`. expires_in,
        until: how long, or until when, the link is valid; by default for the signer's `max_age`. filename, attachment,
        content_type: take the place of what the file and the application say. client: the address or the network from
        which alone the link is valid. shareable: whether shared caches may keep the answer, until the link expires.
        uses: how many downloads the link allows; this needs a store. below: whether a link to a folder, whose path ends
        with a slash, is also one to all that is below it; such a link has no filename, content_type, shareable, uses
        and query. query: what the URL has in its query besides, such
        as `version=3`. base: the scheme, the host and the prefix that a proxy removes, such as
        `https://example.org/dl`; they are not signed. format: one of `link_formats`; nginx verifies a link of the
        format `secure_link`, which has fewer options.

        Raises `ValueError` for an argument that is refused.
        """
        checked = _checked_path(path)
        if checked.startswith("//") and not base:
            raise ValueError(f"the link to {path!r} would name another host: give base")
        network = None if client is None else str(_network(client))
        grant = Grant(
            filename=None if filename is None else _checked_filename(filename),
            attachment=attachment,
            content_type=content_type,
            expires=self._expiry(expires_in, until),
            is_shareable=shareable,
            link_id=new_link_id(),
            uses=uses,
            folder=_checked_folder(checked) if below else None,
        )
        if below:
            _check_options_of_folder(filename, content_type, uses, query, shareable=shareable)
        if not isinstance(uses, int | None):
            raise ValueError(f"uses is {uses!r}: give a number from 1 to {MOST_USES}")
        signed = self._format(format).query(checked, grant, network, quote(query, safe=_SAFE_IN_QUERY))
        if uses is not None:
            self._check_uses(uses, shareable=shareable)
        return f"{_checked_base(base)}{quote(checked)}?{signed}"

    def check(
        self,
        path: bytes,
        query: bytes,
        client: str | None,
        now: float,
        *,
        format: str = "complete",  # noqa: A002
    ) -> Grant:
        """Return what a link grants.

        path: as the client has sent it, with its percent-encoding decoded. client: the address of the client, if it is
        known. now: seconds since 1970 UTC. format: as in `sign`. Uses are not counted, and revocations not looked up:
        `verify` does that.

        Raises `LinkInvalid`, or `LinkExpired` if the link was valid until a time before `now`.
        """
        return self._format(format).check(path, query, client, now)

    async def verify(self, scope: MutableMapping[str, Any], *, format: str = "complete") -> Grant:  # noqa: A002
        """Return what the link of a request grants.

        scope: that of ASGI. It gets an entry, by which `DownloadResponse` presents the file as the link says, and for a
        GET of a link with `uses` another, by which it counts the download when it is about to send the file. format: as
        in `sign`.

        Raises what `check` raises, `LinkInvalid` for a link that is revoked, and `SourceUnavailable` if the store does
        not answer.
        """
        try:
            grant = await self._verified(scope, format)
        except FileError:
            if scope["query_string"]:  # else it has no link
                self._counts["refused"] += 1
            raise
        self._counts["verified"] += 1
        return grant

    @property
    def is_immediate(self) -> bool:
        """Whether a link is verified without waiting, and by the link alone: there is no store."""
        return type(self) is URLSigner and self._store is None

    def grant_at_once(
        self,
        sent: bytes,
        query: bytes,
        address: str | None,
        *,
        format: str = "complete",  # noqa: A002
    ) -> Grant | None:
        """Return what the link of a GET grants if it changes nothing in the answer but who gets it, as most do.

        None: `verify` decides, and counts. sent: the path as the client has sent it. query: that of the URL. address:
        of the client. format: as in `sign`. Only a signer that `is_immediate` may be asked. What it returns counts as
        verified only with `note_verified`.
        """
        try:
            grant = self._granted(self._format(format), unquote_to_bytes(sent), sent, query, address)
        except FileError:
            return None
        return grant if self.is_plain(grant, query, format=format) else None

    def is_plain(self, grant: Grant, query: bytes, *, format: str = "complete") -> bool:  # noqa: A002
        """Return whether a valid link, which grants this, changes nothing in the answer but who gets it.

        query: that of the URL. format: as in `sign`.
        """
        return grant.is_of_plain_link and self._format(format).is_alone(query)

    def note_verified(self) -> None:
        """Count a link that `grant_at_once` has verified, whose answer is about to be sent."""
        self._counts["verified"] += 1

    def _granted(self, format_: LinkFormat, path: bytes, sent: bytes, query: bytes, address: str | None) -> Grant:
        grant = format_.check(path, query, address, time.time())
        if grant.folder is not None and path.count(b"/") > sent.count(b"/"):
            raise LinkInvalid("a path below the folder of a link has no encoded slash: it may mean another folder")
        return grant

    async def _verified(self, scope: MutableMapping[str, Any], format_: str) -> Grant:
        if scope["method"] not in ("GET", "HEAD"):
            raise LinkInvalid("a link is for GET and HEAD alone")
        raw_path, client = scope.get("raw_path"), scope.get("client")
        sent = scope["path"].encode() if raw_path is None else raw_path.partition(b"?")[0]
        path = sent if raw_path is None else unquote_to_bytes(sent)
        address = client[0] if client else None
        grant = self._granted(self._format(format_), path, sent, scope["query_string"], address)
        if self._store is None:
            if grant.uses is not None:
                raise LinkInvalid(f"the link {grant.link_id} is for {grant.uses} downloads, and there is no store")
        elif not ((together := scope.get(TOGETHER)) and together.defers(self._store, grant, self._note_revoked)):
            await self.refuse_revoked(grant)
        scope[GRANT] = grant
        if self._store is not None and grant.uses is not None and scope["method"] == "GET":
            scope[USE] = Use(self._store, grant, self._client_of(scope), self._session_seconds)
        return grant

    def _note_revoked(self) -> None:
        """Count a link as refused that was counted as verified."""
        self._counts["verified"] -= 1
        self._counts["refused"] += 1

    async def refuse_revoked(self, grant: Grant) -> None:
        """Raise `LinkInvalid` if the link or its key is revoked, `SourceUnavailable` if the store does not answer."""
        if self._store is None:
            return
        identifiers = [name for name in (grant.link_id, grant.key_id) if name is not None]
        if await self._store.is_revoked(identifiers):
            raise LinkInvalid(f"the link {grant.link_id}, or its key {grant.key_id}, is revoked")

    async def revoke(self, identifier: str) -> float | None:
        """Revoke a link, or all links of a key, by its id: from the next request on, in every process with this store.

        Returns until when the entry is kept, in seconds since 1970 UTC: for a link, until every link of this `max_age`
        has expired. If a link was made with a longer one, revoke its key. None: for ever, as for a key, which other
        processes may have, whose links live longer.

        Raises `ConfigurationError` without a store, `ValueError` for what cannot be an id, and `SourceUnavailable` if
        the store does not answer.
        """
        if self._store is None:
            raise ConfigurationError("links are revoked in a store: give URLSigner a store")
        if not _KEY_ID.fullmatch(identifier):
            raise ValueError(f"{identifier!r} is not the id of a link or of a key: `downloadview verify` prints both")
        until = None
        if self._max_age is not None and identifier not in self._keys and LINK_ID.fullmatch(identifier):
            until = time.time() + self._max_age.total_seconds() + MARGIN
        await self._store.revoke(identifier, until)
        return until

    def _format(self, name: str) -> LinkFormat:
        format_ = self._formats.get(name)
        if format_ is None:
            raise ConfigurationError(f"format is {name!r}: give one of {', '.join(self._formats)}")
        return format_

    def _check_uses(self, uses: int, *, shareable: bool) -> None:
        if self._store is None:
            raise ConfigurationError("uses are counted in a store: give URLSigner a store")
        if not 1 <= uses <= MOST_USES:
            raise ValueError(f"uses is {uses}: give a number from 1 to {MOST_USES}")
        if shareable:
            raise ValueError("a link with uses cannot be shareable, because caches do not count")

    def _expiry(self, expires_in: timedelta | None, until: datetime | None) -> int | None:
        now = time.time()
        if until is not None:
            if expires_in is not None or not isinstance(until, datetime) or until.tzinfo is None:
                raise ValueError(f"until is {until}: give a time with a zone, and no expires_in")
            age = timedelta(seconds=until.timestamp() - now)
        elif expires_in is not None:
            if not isinstance(expires_in, timedelta):
                raise ValueError(f"expires_in is {expires_in!r}: give a timedelta")
            age = expires_in
        elif self._max_age is not None:
            age = self._max_age
        else:
            return None
        if age < timedelta(seconds=1):
            raise ValueError("the link would have expired already: give a time that is a second or more from now")
        if self._max_age is not None and age > self._max_age:
            longest = str(self._max_age).removesuffix(", 0:00:00")
            raise ValueError(f"the link would be valid for more than max_age, {longest}: give a shorter time")
        return int(now + age.total_seconds()) if until is None else int(until.timestamp())


def _network(client: str) -> IPv4Network | IPv6Network:
    try:
        if isinstance(client, str):  # a number would be an address, too
            return ip_network(client, strict=False)
    except ValueError:
        pass
    raise ValueError(f"client is {client!r}: give an address or a network, such as 203.0.113.0/24")


def _checked_secret(key_id: str, secret: bytes | str) -> bytes:
    if not isinstance(key_id, str) or not isinstance(secret, bytes | str):
        raise WrongType("a key is a text with a secret: give {'2026a': secrets.token_bytes(32)}")
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


def _checked_folder(path: str) -> str:
    if not path.endswith("/") or "//" in path or "\0" in path or len(path.encode()) > MAX_FOLDER:
        raise ValueError(
            f"the path {path!r} is not that of a folder: give one such as /files/2026/, with a slash at its end and no "
            f"empty segment, of at most {MAX_FOLDER} bytes"
        )
    return path


def _check_options_of_folder(
    filename: str | None, content_type: str | None, uses: int | None, query: str, *, shareable: bool
) -> None:
    for option, is_given, reason in (
        ("filename", filename is not None, "each file has its name"),
        ("content_type", content_type is not None, "each file has its type"),
        ("uses", uses is not None, "its pages and files are many requests, of which each would count"),
        ("shareable", shareable, "caches would still answer when it has been revoked"),
        ("query", bool(query), "its pages have their parameters there"),
    ):
        if is_given:
            raise ValueError(f"a link to all that is below a folder cannot have {option}: {reason}")


def _checked_filename(filename: str) -> str:
    if not filename.strip() or _CONTROL.search(filename):
        raise ValueError(f"filename is {filename!r}: give a name without control characters")
    return filename


def _checked_base(base: str) -> str:
    if base:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"base is {base!r}: give a scheme and a host, such as https://example.org")
    return base.rstrip("/")
