"""Files that are far away or made on demand, kept on a local disk: `CachedSource` over any source, and the `Cache`.

A complete file is a local one: it has a path for a proxy to send it by, ranges, and costs what local files cost. A file
that is not there yet is fetched once, by a task of its own, and everybody who wants it is fed while it arrives.
"""

import asyncio
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import isfunction
from typing import Any, TypeVar, TypeVarTuple

import anyio

from downloadview_async.errors import (
    ConfigurationError,
    DownloadError,
    FileError,
    FileMissing,
    SourceUnavailable,
    TransferAborted,
)
from downloadview_async.http.conditional import failed_precondition
from downloadview_async.http.dates import format_http_date, parse_http_date
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.ranges import parse_range
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.arriving import Arriving, ArrivingFile
from downloadview_async.sources.base import AsyncFile, OpenFile, Source
from downloadview_async.sources.cache_directory import (
    CacheDirectory,
    Entry,
    Part,
    data_name,
    is_describable,
    key_hash,
    protect,
)
from downloadview_async.sources.local import OpenLocalFile
from downloadview_async.sources.open_file_cache import OpenFileCache
from downloadview_async.sources.root import Opened
from downloadview_async.sources.virtual import VirtualFile
from downloadview_async.sources.workers import Workers

logger = logging.getLogger("downloadview_async")

MAX_AHEAD = 8 << 20
"""Bytes: a range that begins further on than that behind what has arrived is asked of the source itself."""

REMEMBER_SECONDS = 60.0
"""How long a file that was found not to be one for the cache is not tried again."""

UNUSED_SECONDS = 3600.0
UNUSED_AGES = 10
"""A file that nobody has used for so long, and for so many times `max_age`, is removed."""

_CHECK_SECONDS = 5.0  # how long what was found in the directory is believed without another look
_GROW = 8 << 20  # bytes of room that a file which arrives is given at a time
_MAX_KNOWN = 16384
_MAX_UNATTENDED = 4
_MAX_TRIES = 3
_THREADS = 4
_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9a-z-]+)(?:=("[^"]*"|[^",\s]*))?')

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """What a cache has done in this process, and how full it is.

    hits: answered by a complete file, without a question. stale: the source was asked whether a file is still current.
    misses: it was not there. passed: of all, those that were answered by the source itself. bytes: on the disk, by all
    processes together, when they were last looked at.
    """

    hits: int
    misses: int
    stale: int
    passed: int
    bytes: int


@dataclass(slots=True)
class _Known:
    """What was found in the directory, or put there; when, by the monotonic clock; and when it was last used."""

    hashed: str
    entry: Entry
    checked: float
    used: float
    leased: float = 0.0


class Cache:
    """Files in a directory on a local disk, for any number of sources and processes: see `CachedSource`.

    directory: is made if there is none, and belongs to the cache alone.
    max_bytes: what all files in it may take together, in whole blocks of the disk; those least recently used make room.
    max_age: seconds for which a file is sent without asking whether it is still current.

    Raises `ConfigurationError` for a directory that cannot be made or read, for numbers that are none, and where
    aiofiles is not installed. A directory that cannot be written to later, or that is full, is no error: what is not
    there then is sent without being kept, and the log says so once a minute.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_bytes: int = 10 << 30, max_age: float = 86_400.0
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise ConfigurationError(f"max_bytes is a number of bytes, more than 0, not {max_bytes!r}")
        if isinstance(max_age, bool) or not isinstance(max_age, int | float) or not max_age >= 0:
            raise ConfigurationError(f"max_age is a number of seconds, 0 or more, not {max_age!r}")
        try:
            import aiofiles  # the writing side alone needs it
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "a cache needs aiofiles: install downloadview_async with its extra `cache`"
            ) from exc
        self._open_async: Callable[..., Any] = aiofiles.open
        self.max_bytes = max_bytes
        self.max_age = float(max_age)
        self.directory = CacheDirectory(
            directory,
            max_bytes=max_bytes,
            max_unused=max(UNUSED_SECONDS, UNUSED_AGES * self.max_age),
            used=lambda: {known.hashed: known.used for known in list(self._known.values())},
        )
        self._workers = Workers()
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="downloadview-cache")
        self._open_files = OpenFileCache(self.directory.root, self._workers)
        self._known: dict[tuple[str, str], _Known] = {}
        self._refused: dict[tuple[str, str], float] = {}
        self._fetches: dict[tuple[asyncio.AbstractEventLoop, str, str], _Fetch] = {}
        self._running: set[_Fetch] = set()
        """Those that have not ended, though nobody may join some of them any more."""
        self._sweeping: set[asyncio.Task[None]] = set()
        self._names: dict[str, CachedSource] = {}
        self._is_offloaded = False
        self._complained = -60.0
        self._hits = self._misses = self._stale = self._passed = 0

    @property
    def path(self) -> str:
        """The absolute path of the directory, which an offload rule names as its source."""
        return self.directory.root.path

    @property
    def counters(self) -> CacheCounters:
        """The counters as they are now."""
        return CacheCounters(self._hits, self._misses, self._stale, self._passed, self.directory.bytes)

    async def sweep(self) -> None:
        """Count what is there, and remove what killed processes and disuse have left.

        A cache that is used does this by itself once a minute; an application that starts may want to do it at once.
        """
        await self._attempt(self.directory.sweep)

    async def aclose(self) -> None:
        """End what is being fetched; what has not all arrived is removed. Those who wait for it are aborted."""
        await self._end(list(self._running))
        for task in list(self._sweeping):
            await asyncio.wait([task])

    # What follows is for `CachedSource` and its files.

    def enlist(self, source: "CachedSource") -> None:
        """Note who uses a name. Raises `ConfigurationError` where that is two, who would get each other's files."""
        if self._names.setdefault(source.name, source) is not source:
            raise ConfigurationError(
                f"two sources are called {source.name!r} in the cache {self.path!r}: give each a name= of its own"
            )

    async def end_of(self, source: str) -> None:
        """End what is being fetched from a source, and let go of its name."""
        await self._end([fetch for fetch in self._running if fetch.source == source])
        self._names.pop(source, None)

    async def _end(self, fetches: "list[_Fetch]") -> None:
        for fetch in fetches:
            fetch.stop()
        for fetch in fetches:
            if fetch.loop is asyncio.get_running_loop():
                await asyncio.wait([fetch.task])

    async def find(self, source: str, key: str) -> Entry | None:
        """Return what is kept of a key, fresh or not, after a look at the disk."""
        self._sweep_if_due()
        entry = await self._attempt(self._find, source, key)
        if entry is None:
            self._known.pop((source, key), None)
        else:
            self.remember(source, key, entry)
        return entry

    def known(self, source: str, key: str) -> Entry | None:
        """Return what this process knows to be kept of a key, without a look at the disk."""
        known = self._known.get((source, key))
        return None if known is None or time.monotonic() - known.checked >= _CHECK_SECONDS else known.entry

    def remember(self, source: str, key: str, entry: Entry) -> None:
        """Note what is kept of a key."""
        before = self._known.pop((source, key), None)
        known = _Known(key_hash(source, key), entry, time.monotonic(), time.time())
        if self._is_offloaded:
            known.leased = known.checked
        if before is not None and before.entry.data == entry.data:
            known.leased = max(known.leased, before.leased)
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[source, key] = known

    def _find(self, source: str, key: str) -> Entry | None:
        return self.directory.find(source, key, lease=self._is_offloaded)

    async def forget(self, source: str, key: str) -> None:
        """Drop what is kept of a key."""
        self._known.pop((source, key), None)
        await self._attempt(self.directory.forget, source, key)

    def location(self, source: str, key: str, entry: Entry) -> str | None:
        """Return the path of a complete file, which is kept long enough for a proxy to open it, or None."""
        known = self._known.get((source, key))
        now = time.monotonic()
        if known is None or now - known.leased >= _CHECK_SECONDS:
            # Once per file and process: from the first one on, each look into the directory is a lease.
            self._is_offloaded = True
            try:
                self.directory.lease(key_hash(source, key))
            except OSError:
                return None
            if known is not None:
                known.leased = now
        return self.directory.root.locate(entry.data)

    def open_at_once(self, source: str, key: str, entry: Entry) -> "OpenCachedFile | None":
        """Open a complete file, if that waits for nothing."""
        try:
            local = self._open_files.open(entry.data)
        except FileError:
            return None
        opened = None if local is None else self._opened(source, key, entry, local)
        if local is not None and opened is None:
            local.close()
        return opened

    @asynccontextmanager
    async def open(self, source: str, key: str, entry: Entry) -> AsyncIterator["OpenCachedFile | None"]:
        """Open a complete file; None if it is not there any more."""
        opened = self.open_at_once(source, key, entry)
        if opened is not None:
            try:
                yield opened
            finally:
                await opened.local.aclose()
            return
        try:
            found = await self._workers.run_or_abandon(self.directory.root.open, entry.data, discard=_close)
        except FileMissing:
            yield None
            return
        local = OpenLocalFile(*found, workers=self._workers)
        try:
            yield self._opened(source, key, entry, local)
        finally:
            await local.aclose()

    def _opened(self, source: str, key: str, entry: Entry, local: OpenLocalFile) -> "OpenCachedFile | None":
        if local.size != entry.metadata.size:  # somebody has changed it
            return None
        if not local.is_protected:  # one that is opened again and again stays open, and so protected
            protect(local.descriptor)
            local.is_protected = True
        if (known := self._known.get((source, key))) is not None:
            known.used = time.time()
        return OpenCachedFile(entry.metadata, local)

    def is_refused(self, source: str, key: str) -> bool:
        """Return whether a file has been found not to be one for the cache, not long ago."""
        until = self._refused.get((source, key))
        if until is None:
            return False
        if time.monotonic() < until:
            return True
        del self._refused[source, key]
        return False

    def refuse(self, source: str, key: str) -> None:
        """Note that a file is none for the cache."""
        while len(self._refused) >= _MAX_KNOWN:
            del self._refused[next(iter(self._refused))]
        self._refused[source, key] = time.monotonic() + REMEMBER_SECONDS

    def may_go_on(self, fetch: "_Fetch") -> bool:
        """Return whether a fetch may go on though nobody waits for it: a few may."""
        return sum(other.is_unattended for other in self._running if other is not fetch) < _MAX_UNATTENDED

    def fetch(self, source: str, key: str, inner: AsyncFile | None, stale: Entry | None) -> "_Fetch | None":
        """Return the fetch of a file, which may have begun long ago; without `inner`, only one that has."""
        place = asyncio.get_running_loop(), source, key
        if (found := self._fetches.get(place)) is None and inner is not None:
            found = self._fetches[place] = _Fetch(self, source, key, inner, stale)
            self._running.add(found)
            found.start()
            found.task.add_done_callback(partial(self._ended, found))
        return found

    def _ended(self, fetch: "_Fetch", task: asyncio.Task[None]) -> None:
        self._running.discard(fetch)

    def withdraw(self, fetch: "_Fetch") -> None:
        """Let nobody else join a fetch."""
        place = fetch.loop, fetch.source, fetch.key
        if self._fetches.get(place) is fetch:
            del self._fetches[place]

    def count(self, *, hit: int = 0, miss: int = 0, stale: int = 0, passed: int = 0) -> None:
        """Count an answer."""
        self._hits += hit
        self._misses += miss
        self._stale += stale
        self._passed += passed

    async def begin(self, source: str, key: str, size: int | None) -> Part | None:
        """Return a file to fetch into, or None."""
        return await self._attempt(self.directory.begin, key_hash(source, key), size)

    async def grow(self, part: Part, size: int) -> bool:
        """Return whether a part may get so long."""
        if size <= part.reserved:
            return True
        room = size + _GROW if part.size is None else min(size + _GROW, part.size)
        return bool(await self._attempt(self.directory.grow, part, room))

    async def commit(self, part: Part, source: str, key: str, entry: Entry) -> bool:
        """Keep a part that is complete, and return whether that went well."""

        def commit() -> bool:
            self.directory.commit(part, source, key, entry)
            return True

        if not await self._attempt(commit):
            return False
        self.remember(source, key, entry)
        return True

    async def discard(self, part: Part) -> None:
        """Remove a part."""
        await self._attempt(self.directory.discard, part)

    async def renew(self, source: str, key: str, entry: Entry) -> Entry:
        """Note that a file is still current."""
        renewed = await self._attempt(self.directory.renew, source, key, entry)
        renewed = renewed or replace(entry, validated=time.time())
        self.remember(source, key, renewed)
        return renewed

    async def open_to_write(self, part: Part) -> Any:
        """Return a part as a file of aiofiles."""
        return await self._open_async(part.descriptor, "r+b", buffering=0, closefd=False, executor=self._executor)

    async def local_file(self, part: Part) -> OpenLocalFile:
        """Return a part to read from."""
        found = await self._workers.run(os.fstat, part.descriptor)
        return OpenLocalFile(part.descriptor, found, self.directory.root.is_quick, workers=self._workers)

    def complain(self, exc: BaseException) -> None:
        """Log that the disk failed, once a minute."""
        if time.monotonic() - self._complained >= 60.0:
            self._complained = time.monotonic()
            logger.warning("the cache %a cannot be used, files are sent without being kept: %s", self.path, exc)

    def _sweep_if_due(self) -> None:
        if self.directory.is_sweep_due and not self._sweeping:
            task = asyncio.create_task(self.sweep())
            self._sweeping.add(task)
            task.add_done_callback(self._sweeping.discard)

    async def _attempt(self, function: Callable[[*Ts], T], *args: *Ts) -> T | None:
        """Return what a call to the directory returns, or None where the disk fails."""
        try:
            return await self._workers.run(function, *args)
        except OSError as exc:
            self.complain(exc)
            return None


def _close(opened: Opened) -> None:
    os.close(opened.descriptor)


class OpenCachedFile:
    """A complete file of a cache, open: a local one, with the description that came with it."""

    __slots__ = ("local", "metadata")

    def __init__(self, metadata: FileMetadata, local: OpenLocalFile) -> None:
        self.metadata = metadata
        self.local = local

    def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span."""
        return self.local.stream(span)


class CachedSource:
    """The files of another source, kept in a cache.

    source: a `RemoteSource`, a `StorageSource`, a `VirtualSource`, or any other whose names are texts and stand for the
    same file whoever asks.
    name: what the source is called in the cache, in every process and after every restart: whoever has the same name in
    the same directory gets the same files. By default the URL of a `RemoteSource`, that of an `ObjectStorage`, with its
    endpoint, or the file and name of a `VirtualSource`'s function. Others need one.

    Raises `ConfigurationError` if another source in the cache has that name, and where one is needed.
    """

    def __init__(self, source: Source, cache: Cache, *, name: str | None = None) -> None:
        self.source = source
        self.cache = cache
        self.name = _name_of(source) if name is None else name
        cache.enlist(self)

    async def resolve(self, name: Any, /) -> AsyncFile:
        """Return the file called `name`: from the cache if it is there and fresh, else as the source finds it.

        Raises what the source raises.
        """
        if not isinstance(name, str):
            return await self.source.resolve(name)
        entry = self.cache.known(self.name, name) or await self.cache.find(self.name, name)
        if entry is not None and entry.is_fresh(self.cache.max_age):
            return CachedFile(self, name, entry=entry)
        inner = await self.source.resolve(name)
        if _is_local(inner) or (isinstance(inner, VirtualFile) and not inner.is_keepable):
            return inner
        return CachedFile(self, name, inner=inner, stale=entry)

    async def aclose(self) -> None:
        """End what is being fetched, and close the source if it has to be."""
        await self.cache.end_of(self.name)
        close = getattr(self.source, "aclose", None)
        if close is not None:
            await close()


def _name_of(source: Source) -> str:
    """Return what tells a source from all others, here and in any other process that has the same directory.

    Raises `ConfigurationError` where that is not known.
    """
    kind = type(source).__qualname__
    if isinstance(url := getattr(source, "url", None), str):
        return f"{kind} {url}"
    if isinstance(place := getattr(getattr(source, "storage", None), "place", None), str):
        return f"{kind} {place}"
    make = getattr(source, "make", None)
    if isfunction(make) and make.__closure__ is None and "<" not in make.__qualname__:
        return f"{kind} {make.__code__.co_filename} {make.__module__}.{make.__qualname__}"
    raise ConfigurationError(
        f"what tells this {kind} from another one in the same directory is not known: give CachedSource a name= for it"
    )


def _is_local(file: AsyncFile) -> bool:
    return file.location is not None and os.path.isabs(file.location)


class CachedFile:
    """A file of a `CachedSource`. It has a location while it is known to be in the cache and current."""

    __slots__ = ("_counted", "_entry", "_inner", "_key", "_source", "_stale", "name")

    def __init__(
        self,
        source: CachedSource,
        key: str,
        *,
        entry: Entry | None = None,
        inner: AsyncFile | None = None,
        stale: Entry | None = None,
    ) -> None:
        if entry is not None:
            self.name = entry.name
        else:
            assert inner is not None
            self.name = inner.name
        self._counted = False
        self._source = source
        self._key = key
        self._entry = entry
        self._inner = inner
        self._stale = stale

    @property
    def location(self) -> str | None:
        """The path of the complete file, or None while there is none."""
        if self._entry is None:
            return None
        return self._source.cache.location(self._source.name, self._key, self._entry)

    def open_cached(self, request: DownloadRequest) -> OpenCachedFile | None:
        """Open the file if it is complete, fresh, and that waits for nothing: see `open_at_once`."""
        if self._entry is None:
            return None
        cache = self._source.cache
        opened = cache.open_at_once(self._source.name, self._key, self._entry)
        if opened is not None:
            self._count(hit=1)
        return opened

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Open the file: the complete one, the one that arrives, or the source's own."""
        cache, source, key = self._source.cache, self._source.name, self._key
        for _ in range(_MAX_TRIES):
            entry = self._entry or self._completed()
            if entry is not None:
                async with cache.open(source, key, entry) as opened:
                    if opened is not None:
                        self._entry = entry
                        self._count(hit=1)
                        yield opened
                        return
                self._entry = self._stale = None
                await cache.forget(source, key)
            self._count(miss=self._stale is None, stale=self._stale is not None)
            async with self._passed(request) as passed:
                if passed is not None:
                    cache.count(passed=1)
                    yield passed
                    return
            fetch = cache.fetch(source, key, await self._inner_file(), self._stale)
            assert fetch is not None
            async with fetch.joined() as arriving:
                if arriving is not None and not (request.range and arriving.metadata.size is None and fetch.is_kept):
                    yield arriving
                    return
                if arriving is None and fetch.is_for_one:
                    continue
                # it is current, or has no size yet, without which there are no ranges
                if arriving is not None:
                    arriving.position = None
                await fetch.settled()
            self._entry = fetch.entry
        raise SourceUnavailable(f"{self.name!r} does not stay in the cache")

    def _count(self, *, hit: int = 0, miss: int = 0, stale: int = 0) -> None:
        # one answer may take several tries, and is one
        if not self._counted:
            self._counted = True
            self._source.cache.count(hit=hit, miss=miss, stale=stale)

    def _completed(self) -> Entry | None:
        """Return the file if somebody else has fetched it since it was looked for."""
        entry = self._source.cache.known(self._source.name, self._key)
        return entry if entry is not None and entry.is_fresh(self._source.cache.max_age) else None

    async def _inner_file(self) -> AsyncFile:
        if self._inner is None:
            self._inner = await self._source.source.resolve(self._key)
        return self._inner

    @asynccontextmanager
    async def _passed(self, request: DownloadRequest) -> AsyncIterator[OpenFile | None]:
        """Open the source's own file where the cache is not to be asked, else give None.

        For a HEAD of one that nobody fetches; for a file that is none for the cache; and for a range that begins far
        behind what has arrived, if the source has ranges.
        """
        cache, source, key = self._source.cache, self._source.name, self._key
        fetch = cache.fetch(source, key, None, None)
        inner = await self._inner_file()
        is_far = not isinstance(inner, VirtualFile) and _is_far(request, fetch)
        if not (is_far or (fetch is None and (request.method == "HEAD" or cache.is_refused(source, key)))):
            yield None
            return
        async with inner.open(request) as opened:
            # a source that reads over what comes before a range had better be read once
            if not (is_far and getattr(opened, "reads_over", False)):
                yield opened
                return
        yield None


def _is_far(request: DownloadRequest, fetch: "_Fetch | None") -> bool:
    if request.method != "GET" or request.range is None:
        return False
    specs = parse_range(request.range)
    if specs is None or len(specs) != 1:
        return False
    first, last = specs[0]
    arrived = 0 if fetch is None else fetch.arriving.arrived
    size = None if fetch is None or fetch.arriving.metadata is None else fetch.arriving.metadata.size
    if first is None:
        if size is None or last is None:
            return True  # the end of a file of any size
        first = max(size - last, 0)
    return first > arrived + MAX_AHEAD


class _Fetch:
    """One file on its way into the cache, by a task of its own.

    It ends when the last client breaks off; but once a client has been given all that it asked for, the file is
    fetched to its end, unless too many others are.
    """

    def __init__(self, cache: Cache, source: str, key: str, inner: AsyncFile, stale: Entry | None) -> None:
        self.source = source
        self.key = key
        self.loop = asyncio.get_running_loop()
        self.arriving = Arriving()
        self.entry: Entry | None = None
        self.is_kept = False
        """Whether it will be in the cache, as far as is known."""
        self.task: asyncio.Task[None]
        self._cache = cache
        self._inner = inner
        self._stale = stale
        self.is_for_one = False
        """Whether the answer is for the first who asked alone: it is not for a cache, so not for others either."""
        self._clients = 0
        self._is_given = False
        self._is_wanted = False
        self._scope = anyio.CancelScope()
        self._settled = anyio.Event()

    def start(self) -> None:
        """Begin."""
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Let the task end soon, and nobody join."""
        self._cache.withdraw(self)
        self.arriving.fail(SourceUnavailable("the fetch was ended"))
        self._scope.cancel()

    @property
    def is_unattended(self) -> bool:
        """Whether it goes on though nobody waits for it."""
        return not self._clients and not self._settled.is_set()

    async def settled(self) -> None:
        """Wait until it has ended, or turns out not to be kept. Raises what it failed of."""
        while not self._settled.is_set() and self.arriving.is_on_disk:
            await self.arriving.wait()
        if self.arriving.failure is not None:
            raise self.arriving.failure_again()
        if self.entry is None:
            self._cache.withdraw(self)
            self._cache.refuse(self.source, self.key)

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[ArrivingFile | None]:
        """Give the file as it arrives, or None if the one that is kept has been found to be current."""
        arriving = self.arriving
        file: ArrivingFile | None = None
        self._clients += 1
        try:
            while arriving.metadata is None and arriving.failure is None and not self._settled.is_set():
                await arriving.wait()
            if arriving.failure is not None:
                raise arriving.failure_again()
            if arriving.metadata is not None and not (self.is_for_one and self._is_given):
                self._is_given = True
                file = arriving.open()
            yield file
        finally:
            self._clients -= 1
            if file is not None:
                self._is_wanted = self._is_wanted or file.is_satisfied
                with anyio.CancelScope(shield=True):
                    await file.aclose()
            goes_on = self._is_wanted and arriving.is_on_disk and self._cache.may_go_on(self)
            if self.is_unattended and not arriving.is_complete and not goes_on:
                self.stop()

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._fetch()
        except BaseException as exc:
            self.arriving.fail(exc if isinstance(exc, Exception) else SourceUnavailable("the fetch was cancelled"))
            if not isinstance(exc, Exception):
                raise
            if not isinstance(exc, DownloadError) and not self._clients:
                logger.warning("fetching %a for the cache failed: %r", self._inner.name, exc)
        finally:
            self._cache.withdraw(self)
            self._settled.set()
            self.arriving.notify()
            await self.arriving.aclose()

    async def _fetch(self) -> None:
        request = _asking_for_news(self._stale)
        if self._stale is not None and isinstance(self._inner, VirtualFile):
            said = self._inner.validators
            if failed_precondition(request, said) == 304 and _is_current(self._stale, said):
                self.entry = await self._cache.renew(self.source, self.key, self._stale)
                return
        try:
            async with self._inner.open(request) as opened:
                if self._stale is None or failed_precondition(request, opened.metadata) != 304:
                    await self._receive(opened)
                    return
                if _is_current(self._stale, opened.metadata):
                    self.entry = await self._cache.renew(self.source, self.key, self._stale)
                    return
        except FileMissing:
            if self._stale is not None:
                await self._cache.forget(self.source, self.key)
            raise
        async with self._inner.open(GET) as opened:  # it says "not modified" of another version
            await self._receive(opened)

    async def _receive(self, opened: OpenFile) -> None:
        metadata, max_age = opened.metadata, _max_age_of(self._inner, opened.metadata, self._cache.max_age)
        size = metadata.size
        # where the connection's end is all that ends a file, nobody knows whether it is whole
        if getattr(opened, "ends_with_connection", False) or not self._is_describable(metadata):
            max_age = None
        part = None if max_age is None else await self._cache.begin(self.source, self.key, size)
        if part is None:
            self.is_for_one = True
            self._cache.withdraw(self)
            self._cache.refuse(self.source, self.key)
            self.arriving.describe(metadata)
            await self._take_all(opened, size)
            return
        self.is_kept = True
        is_committed = False
        try:
            if metadata.etag is None and metadata.last_modified is None:
                # so that whoever resumes gets the rest of this very copy
                metadata = replace(metadata, etag=ETag(secrets.token_hex(16)))
            metadata = replace(metadata, accept_ranges=True)
            await self._describe(part, metadata)
            await self._take_all(opened, size)
            if not self.arriving.is_on_disk:
                return
            assert self.arriving.metadata is not None
            complete = self.arriving.metadata
            entry = Entry(
                data=data_name(part.key, complete),
                name=self._inner.name,
                metadata=complete,
                validated=time.time(),
                max_age=None if max_age == self._cache.max_age else max_age,
            )
            with anyio.CancelScope(shield=True):
                is_committed = await self._cache.commit(part, self.source, self.key, entry)
            if is_committed:
                self.entry = entry
        finally:
            if not is_committed:
                self.is_kept = False
                with anyio.CancelScope(shield=True):
                    await self._cache.discard(part)

    def _is_describable(self, metadata: FileMetadata) -> bool:
        entry = Entry(data=data_name("", metadata), name=self._inner.name, metadata=metadata, validated=0.0)
        return is_describable(self.source, self.key, entry)

    async def _describe(self, part: Part, metadata: FileMetadata) -> None:
        cache = self._cache
        local = await cache.local_file(part)
        try:
            file = await cache.open_to_write(part)
        except OSError:
            local.close()
            raise

        async def write(block: memoryview) -> int:
            count: int = await file.write(block)
            return count

        # From then on what arrives is handed on to those who are there, and who comes later would miss the beginning.
        async def reserve(size: int) -> bool:
            has_room = await cache.grow(part, size)
            if not has_room:
                cache.withdraw(self)
            return has_room

        def complain(exc: BaseException) -> None:
            cache.complain(exc)
            cache.withdraw(self)

        self.arriving.describe(metadata, file=local, write=write, reserve=reserve, complain=complain)

    async def _take_all(self, opened: OpenFile, size: int | None) -> None:
        """Take exactly what was promised. Raises `TransferAborted` where there is less."""
        arriving, left = self.arriving, size
        if size != 0:
            async with _closing(opened.stream(None if size is None else ByteRange(0, size))) as chunks:
                async for chunk in chunks:
                    await arriving.take(chunk if left is None else chunk[:left])
                    if not arriving.is_on_disk:
                        self._cache.withdraw(self)
                        if not self._clients:
                            self.stop()
                    if left is not None and (left := left - len(chunk)) <= 0:
                        break
        if left is not None and left > 0:
            raise TransferAborted(f"the file ended {left} bytes before what was promised of it")
        await arriving.flush()
        arriving.finish()


@asynccontextmanager
async def _closing(chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    if isinstance(chunks, AsyncGenerator):
        async with aclosing(chunks):
            yield chunks
    else:
        yield chunks


def _asking_for_news(stale: Entry | None) -> DownloadRequest:
    """Return the request for a file, or for one that is not the one we have."""
    if stale is None:
        return GET
    if stale.metadata.etag is not None:
        return DownloadRequest(if_none_match=str(stale.metadata.etag))
    assert stale.metadata.last_modified is not None
    return DownloadRequest(if_modified_since=format_http_date(stale.metadata.last_modified))


def _is_current(stale: Entry, metadata: FileMetadata) -> bool:
    """Return whether what was answered, with "not modified", is said of the very version we have."""
    if metadata.size not in (None, stale.metadata.size):
        return False
    return stale.metadata.etag is not None or metadata.last_modified == stale.metadata.last_modified


def _max_age_of(file: AsyncFile, metadata: FileMetadata, max_age: float) -> float | None:
    """Return for how many seconds a file is fresh; None for one that is not to be kept."""
    if isinstance(file, VirtualFile):
        if file.max_age is not None:
            return file.max_age
        return max_age if metadata.etag is not None or metadata.last_modified is not None else None
    headers: Mapping[str, str] = dict(metadata.headers)
    if "*" in headers.get("vary", ""):
        return None
    found = _DIRECTIVE.findall(headers.get("cache-control", "").lower())
    directives = {name for name, _ in found}
    if not directives.isdisjoint({"no-store", "private"}):
        return None
    if "no-cache" in directives:
        return 0.0
    said = [value.strip('"') for name, value in found if name in ("s-maxage", "max-age")]
    if said:
        # "If there is [...] an invalid value, the response is stale" and so it is asked for again [RFC 9111 4.2.1]
        return min(max_age, *(float(value) if re.fullmatch("[0-9]{1,10}", value) else 0.0 for value in said))
    if "expires" in headers:
        expires = parse_http_date(headers["expires"])
        return 0.0 if expires is None else min(max_age, max(0.0, expires - time.time()))
    return max_age
