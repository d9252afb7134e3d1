"""`Archives`: answers `?archive=zip` with the archive of a folder, or of the entries that `name=` chooses."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.asgi.disconnect import calling_at_the_end
from downloadview_async.asgi.errors import send_error
from downloadview_async.errors import ConfigurationError, FileMissing, TooManyArchives
from downloadview_async.policy.addresses import network_of
from downloadview_async.policy.hiding import Hidden
from downloadview_async.sources.archive import AllowedEntries, ArchiveLimits, ArchiveSource, selection
from downloadview_async.sources.base import AsyncFile, Source
from downloadview_async.sources.cache.index import Cache
from downloadview_async.sources.cache.source import CachedSource
from downloadview_async.sources.checksums import Checksums


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveOptions:
    """How `Download` makes the archives of folders: `Download(source, archive=ArchiveOptions(...))`.

    limits: what an archive may hold. checksums: keeps the CRC-32s of the files, by default in memory. cache: keeps
    complete archives, so that a proxy can send them. name: identifies the source in `checksums` and `cache`, which need
    it. per_client: how many different archives one client may get at the same time; None: any number. All connections
    that fetch the same archive count as one. A client is an IPv4 address, or a /64 network of IPv6.
    """

    limits: ArchiveLimits | None = None
    checksums: Checksums | None = None
    cache: Cache | None = None
    name: str = ""
    per_client: int | None = 1


class NoSuchArchive(FileMissing):
    """The query asks for an archive of another kind than ZIP."""

    detail = "the archive of a folder is at archive=zip"


class Archives:
    """Makes archives of the folders of a source.

    hide: patterns for names that are left out: see `Hidden`.

    Raises `ConfigurationError` for a source that does not list folders, and for options without a name that they need.
    """

    def __init__(self, source: Source, options: ArchiveOptions, hide: Sequence[str] = ()) -> None:
        if (options.checksums is not None or options.cache is not None) and not options.name:
            raise ConfigurationError("ArchiveOptions with checksums or a cache needs a name for the source: give name=")
        hidden = Hidden(hide)

        def leave_out(name: str) -> bool:
            last = name.rpartition("/")[2]
            return hidden.hides(last) if "\\" in last else hidden.matches(last) is not None

        archives = ArchiveSource(
            source,
            limits=options.limits,
            checksums=options.checksums,
            name=options.name,
            leave_out=leave_out if hide else None,
        )
        self.allowed: Callable[[str, Callable[[str], Awaitable[bool]]], Awaitable[AllowedEntries]] = archives.allowed
        self._source: Source = archives
        if options.cache is not None:
            # other patterns make other archives
            name = f"archives of {options.name} without {sorted({*hide})}"
            self._source = CachedSource(archives, options.cache, name=name)
        self._per_client = options.per_client
        self._sending: dict[str, Counter[str]] = {}

    async def resolve(self, key: str) -> AsyncFile:
        """Return the archive that `key_of` has named, or `AllowedEntries`."""
        return await self._source.resolve(key)

    def counted(self, key: str, app: ASGIApp) -> ASGIApp:
        """Return an application that answers with an archive, if the client does not get too many others meanwhile."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            client = network_of(scope["client"][0] if scope.get("client") else None)
            if self._per_client is None or not client or scope["method"] == "HEAD":
                await app(scope, receive, send)
                return
            try:
                end = self._begin(client, key)
            except TooManyArchives as exc:
                await send_error(exc, scope, send)
                return
            try:
                await app(scope, receive, calling_at_the_end(send, end))
            finally:
                end()

        return answer

    def _begin(self, client: str, key: str) -> Callable[[], None]:
        """Count an answer, and return a function that ends it. Raises `TooManyArchives`."""
        sending = self._sending.setdefault(client, Counter())
        if key not in sending and self._per_client is not None and len(sending) >= self._per_client:
            raise TooManyArchives(f"{client} already gets {len(sending)} archives at the same time")
        sending[key] += 1
        is_over = False

        def end() -> None:
            nonlocal is_over
            if is_over:
                return
            is_over = True
            sending[key] -= 1
            if not sending[key]:
                del sending[key]
            if not sending:
                self._sending.pop(client, None)

        return end


def key_of(key: Any, scope: Scope) -> str | None:
    """Return which archive a request asks for, or None if it does not: its query has no `archive=zip`.

    key: that of the folder. Raises `FileMissing` for a folder or a name that cannot exist, and for another archive of
    a folder; a file has no archive, so its URL may have such a query.
    """
    if b"archive" not in scope["query_string"] or not isinstance(key, str):
        return None
    try:
        query = parse_qsl(scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise FileMissing("the query is not valid UTF-8") from None
    if ("archive", "zip") not in query:
        if key and not key.endswith("/"):
            return None
        if any(name == "archive" for name, _ in query):
            raise NoSuchArchive("the query asks for another archive than archive=zip")
        return None
    names = [value.removesuffix("/") for name, value in query if name == "name"]
    if any(not name or "\0" in name for name in names):
        raise FileMissing("an empty name is not in any folder")
    return selection(key, names)
