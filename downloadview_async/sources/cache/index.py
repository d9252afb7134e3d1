"""`Cache`: the complete files that this process knows, the running fills, and how full the directory is."""

import asyncio
import logging
import math
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple

import anyio

from downloadview_async.errors import (
    AccessDenied,
    ConfigurationError,
    FileError,
    FileMissing,
    SourceUnavailable,
)
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.cache.directory import CacheDirectory
from downloadview_async.sources.cache.entry import Entry, key_hash
from downloadview_async.sources.cache.files import Part, protect
from downloadview_async.sources.cache.fill import Fill
from downloadview_async.sources.cache.freshness import is_failure, is_withdrawal, stale_seconds
from downloadview_async.sources.cache.purges import Position, Purge
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.open_file_cache import OpenFileCache
from downloadview_async.sources.local.root import Opened, close_unwritten
from downloadview_async.sources.workers import STUCK_DISK, Workers

if TYPE_CHECKING:
    from downloadview_async.sources.cache.source import CachedSource

logger = logging.getLogger("downloadview_async")

REMEMBER_SECONDS = 60.0
"""Seconds before a file found uncacheable is tried again."""

UNUSED_SECONDS = 3600.0
UNUSED_AGES = 10
"""A file is removed after it was not used for this many seconds and for this many times `max_age`."""

RETRY_SECONDS = 5.0
"""Seconds for which a source that failed is not asked again about a file that may be sent although it is stale."""

MAX_BACKGROUND = 16
"""Files that are revalidated in the background at the same time, for each process."""

_NEVER = -math.inf
_CHECK_SECONDS = 5.0  # how long a file counts as present without another look into the directory
_GROW = 8 << 20  # bytes: the room that is reserved at a time for a file that arrives
_MAX_KNOWN = 16384
_MAX_UNATTENDED = 4
_THREADS = 4

StaleUse = Literal["stale-while-revalidate", "stale-if-error"]
"""Why a file that is not fresh is sent."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Counts of what a cache has done in this process, and how full it is.

    hits: requests served from the cache without asking the source. misses: requests for a file that was not in the
    cache. A file that has been removed behind the cache's back counts as a hit and as a miss. revalidated: requests
    for which the source was asked whether the cached file is still current. passed: how many of all these the source
    answered itself. evictions: files that were removed because there was no room, or because nobody had requested them
    for long. bytes: what all processes together had on the disk when one last counted it.
    """

    hits: int
    misses: int
    revalidated: int
    passed: int
    bytes: int
    evictions: int = 0

    @property
    def stale(self) -> int:
        """The old name of `revalidated`. Deprecated."""
        warnings.warn(
            "CacheCounters.stale has a new name: use CacheCounters.revalidated", DeprecationWarning, stacklevel=2
        )
        return self.revalidated


@dataclass(slots=True, eq=False)
class Kept:
    """A complete file that this process knows. All times are by the monotonic clock.

    checked: when the file was last seen in the directory, or put there. current: until when it is sent without any
    check. leased: when a proxy was last told to send it. used: when it was last requested. is_gone: whether it was
    found to be removed. file: what `CachedSource.resolve` returns for it, once it was requested. retry: until when the
    source is not asked about it, because it has just failed.
    """

    source: str
    key: str
    hashed: str
    entry: Entry
    checked: float
    current: float
    leased: float
    used: float
    is_gone: bool = False
    file: AsyncFile | None = None
    retry: float = _NEVER


class Cache:
    """Files in a directory on a local disk, for any number of sources and processes: see `CachedSource`.

    directory: a directory that only this cache uses. It is made if it does not exist.
    max_bytes: the most bytes that all its files may take, in whole blocks of the disk. The least recently used files
    are evicted.
    max_age: seconds for which a file is sent without asking the source whether it is still current.
    stale_while_revalidate: seconds after that in which it is sent at once and revalidated in the background, if the
    source names no others [RFC 5861 3].
    stale_if_error: seconds after that in which it is sent if the source fails, if the source names no others
    [RFC 5861 4]. A source fails by no answer, by one that is not valid, or by one with the status 500, 502, 503 or 504.

    Raises `ConfigurationError` if the directory cannot be made or read, for an invalid number, and if aiofiles is not
    installed. A directory that is full, or that cannot be written to later, is not an error: files that are not in the
    cache are then sent without being kept, and the log tells it once a minute.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_bytes: int = 10 << 30,
        max_age: float = 86_400.0,
        stale_while_revalidate: float = 0.0,
        stale_if_error: float = 0.0,
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise ConfigurationError(f"max_bytes must be a number of bytes, more than 0, not {max_bytes!r}")
        for option, seconds in (
            ("max_age", max_age),
            ("stale_while_revalidate", stale_while_revalidate),
            ("stale_if_error", stale_if_error),
        ):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
                raise ConfigurationError(f"{option} must be a number of seconds, 0 or more, not {seconds!r}")
        try:
            import aiofiles  # only writing needs it
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "a cache needs aiofiles: install downloadview_async with its extra `cache`"
            ) from exc
        self._open_async: Callable[..., Any] = aiofiles.open
        self.max_bytes = max_bytes
        self.max_age = float(max_age)
        self.stale_while_revalidate = float(stale_while_revalidate)
        self.stale_if_error = float(stale_if_error)
        self.directory = CacheDirectory(
            directory,
            max_bytes=max_bytes,
            max_unused=max(UNUSED_SECONDS, UNUSED_AGES * self.max_age, self.max_age + self.stale_if_error),
            used=self._used,
        )
        self._workers = Workers(stuck=STUCK_DISK)
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="downloadview-cache")
        self._open_files = OpenFileCache(self.directory.root, self._workers)
        self.kept: dict[tuple[str, str], Kept] = {}
        self._refused: dict[tuple[str, str], float] = {}
        self._fetches: dict[tuple[asyncio.AbstractEventLoop, str, str], Fill] = {}
        self._running: set[Fill] = set()
        """The fills that have not ended, including those that no client may join any more."""
        self._sweeping: set[asyncio.Task[None]] = set()
        self._revalidating: dict[tuple[asyncio.AbstractEventLoop, str, str], asyncio.Task[None]] = {}
        self._read_to = self.directory.purges.position()
        self._names: dict[str, CachedSource] = {}
        self._is_offloaded = False
        self._complained = -60.0
        self.counts = {"hits": 0, "misses": 0, "revalidated": 0, "passed": 0}

    @property
    def path(self) -> str:
        """The absolute path of the directory, which an offload rule names as its source."""
        return self.directory.root.path

    @property
    def counters(self) -> CacheCounters:
        """The counters as they are now."""
        return CacheCounters(**self.counts, bytes=self.directory.bytes, evictions=self.directory.evictions)

    async def sweep(self) -> None:
        """Count the files, and remove unused ones and those that killed processes have left.

        A cache in use does this automatically once a minute; an application may call it when it starts.
        """
        await self._attempt(self.directory.sweep)

    async def purge(self, source: str, name: str, *, is_prefix: bool = False) -> int:
        """Remove a file of a source, or with `is_prefix` all whose names begin with `name`; return how many there were.

        source: the name of the source in this cache. See `CachedSource.purge`. Raises `SourceUnavailable` if the disk
        fails.
        """
        try:
            return await self._workers.run(self.directory.purge, Purge(source, name, is_prefix))
        except OSError as exc:
            raise SourceUnavailable(f"the cache {self.path!r} cannot be purged: {exc}") from exc
        finally:
            self.catch_up()

    async def aclose(self) -> None:
        """End the running fills, and remove incomplete files. Clients that wait for them are aborted."""
        await self._end_revalidations(None)
        await self._end(list(self._running))
        for task in list(self._sweeping):
            await asyncio.wait([task])

    # The methods below are for `CachedSource` and its files.

    def enlist(self, source: "CachedSource") -> None:
        """Register a source by its name. Raises `ConfigurationError` if another source has it."""
        if self._names.setdefault(source.name, source) is not source:
            raise ConfigurationError(
                f"two sources are called {source.name!r} in the cache {self.path!r}: give each another name="
            )

    async def end_of(self, source: str) -> None:
        """End the fills from a source, and free its name."""
        await self._end_revalidations(source)
        await self._end([fetch for fetch in self._running if fetch.source == source])
        self._names.pop(source, None)
        for kept in list(self.kept.values()):
            if kept.source == source:
                kept.file = None  # it would use the source again

    async def _end_revalidations(self, source: str | None) -> None:
        for (loop, name, _), task in list(self._revalidating.items()):
            if source in (None, name) and loop is asyncio.get_running_loop():
                task.cancel()
                await asyncio.wait([task])

    async def _end(self, fetches: "list[Fill]") -> None:
        for fetch in fetches:
            fetch.stop()
        for fetch in fetches:
            if fetch.loop is asyncio.get_running_loop():
                await asyncio.wait([fetch.task])

    async def find(self, source: str, key: str) -> Kept | None:
        """Return the complete file of a key, fresh or not. Looks at the disk if the last look was too long ago."""
        kept = self.kept.get((source, key))
        if kept is not None and time.monotonic() - kept.checked < _CHECK_SECONDS:
            return kept
        self._sweep_if_due()
        is_leased, now, position = self._is_offloaded, time.monotonic(), self.directory.purges.position()
        entry = await self._attempt(partial(self.directory.find, source, key, lease=is_leased))
        newer = self.kept.get((source, key))
        if newer is not None and newer is not kept:  # it was kept during the look, which may have missed it
            return newer
        if entry is not None and not self.directory.is_purged(source, key, since=position):
            return self.remember(source, key, entry, leased=now if is_leased else _NEVER)
        self.kept.pop((source, key), None)
        return None

    def remember(self, source: str, key: str, entry: Entry, *, leased: float = _NEVER) -> Kept:
        """Remember the complete file of a key."""
        before = self.kept.pop((source, key), None)
        now, retry = time.monotonic(), _NEVER
        if before is not None and before.entry.data == entry.data:
            leased = max(leased, before.leased)
            if before.entry.validated == entry.validated:
                retry = before.retry
        while len(self.kept) >= _MAX_KNOWN:
            del self.kept[next(iter(self.kept))]
        kept = self.kept[source, key] = Kept(
            source=source,
            key=key,
            hashed=key_hash(source, key),
            entry=entry,
            checked=now,
            current=now + min(_CHECK_SECONDS, entry.fresh_for(self.max_age)),
            leased=leased,
            used=now,
            retry=retry,
        )
        return kept

    def catch_up(self) -> None:
        """Forget what has been purged since the last call, by this process or another one."""
        position = self.directory.purges.position()
        if position == self._read_to:
            return
        purges = self.directory.purges.since(self._read_to)
        self._read_to = position

        def is_purged(source: str, key: str) -> bool:
            return purges is None or any(purge.covers(source, key) for purge in purges)

        for place in [place for place in {*self.kept, *self._refused} if is_purged(*place)]:
            self.kept.pop(place, None)
            self._refused.pop(place, None)
        for fill in list(self._running):
            if is_purged(fill.source, fill.key):
                fill.purge()

    def staleness(self, kept: Kept) -> StaleUse | None:
        """Return why a file that is not fresh may be sent without waiting for the source; None if it may not."""
        overdue = kept.entry.overdue(self.max_age)
        while_revalidate, if_error = self._stale_seconds(kept)
        if overdue < while_revalidate:
            return "stale-while-revalidate"
        return "stale-if-error" if overdue < if_error and time.monotonic() < kept.retry else None

    async def replaces(self, kept: Kept, exc: FileError) -> bool:
        """Return whether a file that is not fresh may be sent because the source has failed.

        If so, the source is not asked again at once. If the source gives the file no longer, it is removed.
        """
        if is_withdrawal(exc):
            await self.forget(kept.source, kept.key, kept.entry.data)
            return False
        if not is_failure(exc) or kept.entry.overdue(self.max_age) >= self._stale_seconds(kept)[1]:
            return False
        self.catch_up()
        current = self.kept.get((kept.source, kept.key))
        if current is None or current.entry.data != kept.entry.data:  # purged, or replaced
            return False
        if time.monotonic() >= current.retry:
            name, problem = shown(kept.entry.name), escaped(f"{type(exc).__name__}: {exc}")
            logger.warning("the cached %s is sent although it is stale, as its source failed: %s", name, problem)
        current.retry = time.monotonic() + RETRY_SECONDS
        return True

    def rest(self, kept: Kept, exc: Exception) -> None:
        """Do not ask the source again at once, after an error of a revalidation in the background."""
        seconds = RETRY_SECONDS
        if isinstance(exc, FileError) and not is_failure(exc):  # then there is no stale-if-error: see `staleness`
            seconds = min(seconds, self._stale_seconds(kept)[0] - kept.entry.overdue(self.max_age))
        kept.retry = time.monotonic() + seconds

    def _stale_seconds(self, kept: Kept) -> tuple[float, float]:
        return stale_seconds(
            kept.entry.metadata, while_revalidate=self.stale_while_revalidate, if_error=self.stale_if_error
        )

    def revalidate_soon(self, kept: Kept) -> None:
        """Revalidate a file in the background, once, unless too many are, or its source has just failed."""
        place = asyncio.get_running_loop(), kept.source, kept.key
        is_due = place not in self._revalidating and time.monotonic() >= kept.retry
        if (source := self._names.get(kept.source)) is None or not is_due or len(self._revalidating) >= MAX_BACKGROUND:
            return
        # not in a task group: the request that finds it due does not wait for it
        task = self._revalidating[place] = asyncio.create_task(source.revalidate(kept))
        task.add_done_callback(lambda _: self._revalidating.pop(place, None))

    def _used(self) -> dict[str, float]:
        """Return when files were last used, in seconds since the epoch, by their K."""
        began = time.time() - time.monotonic()
        return {kept.hashed: began + kept.used for kept in list(self.kept.values())}

    async def forget(self, source: str, key: str, data: str) -> None:
        """Remove a version of a key, unless there is another version by now."""
        if (kept := self.kept.get((source, key))) is not None and kept.entry.data == data:
            del self.kept[source, key]
        await self._attempt(self.directory.forget, source, key, data)

    def location(self, kept: Kept) -> str | None:
        """Return the path of a complete file, and lease it long enough for a proxy to open it; or None."""
        if kept.is_gone:
            return None
        now = time.monotonic()
        if now - kept.leased >= _CHECK_SECONDS:
            # Only once for each file and process: after the first lease, each look into the directory is one.
            self._is_offloaded = True
            try:
                self.directory.lease(kept.hashed)
            except OSError:
                return None
            kept.leased = now
        return self.directory.root.locate(kept.entry.data)

    def open_nowait(self, kept: Kept) -> OpenLocalFile | None:
        """Open a complete file without waiting, or return None. The caller closes it."""
        try:
            local = self._open_files.open(kept.entry.data)
        except FileError:
            return None
        if local is None:
            return None
        # A file from the cache of open files has been accepted before: then its metadata is this very object.
        if local.metadata is not kept.entry.metadata and not _accept(local, kept):
            local.close()
            return None
        local.made_at = kept.entry.made_at
        return local

    @asynccontextmanager
    async def open(self, kept: Kept) -> AsyncIterator[OpenLocalFile | None]:
        """Open a complete file; None if it has been removed or changed."""
        local, is_accepted = self.open_nowait(kept), True
        if local is None:
            try:
                opened = await self._workers.run_or_abandon(self.directory.root.open, kept.entry.data, discard=_close)
            except (FileMissing, AccessDenied):  # a link, or another user's by now: it counts as removed
                yield None
                return
            local = OpenLocalFile(*opened, workers=self._workers)
            is_accepted = _accept(local, kept)
        async with aclosing(local):
            yield local if is_accepted else None

    def is_refused(self, source: str, key: str) -> bool:
        """Return whether a file was recently found uncacheable."""
        until = self._refused.get((source, key))
        if until is None:
            return False
        if time.monotonic() < until:
            return True
        del self._refused[source, key]
        return False

    def refuse(self, source: str, key: str) -> None:
        """Note that a file is uncacheable."""
        while len(self._refused) >= _MAX_KNOWN:
            del self._refused[next(iter(self._refused))]
        self._refused[source, key] = time.monotonic() + REMEMBER_SECONDS

    def may_go_on(self, fetch: "Fill") -> bool:
        """Return whether a fill may go on without clients: a few may that need the source."""
        if not fetch.needs_source:
            return True
        others = [other for other in self._running if other is not fetch and other.is_unattended]
        return sum(other.needs_source for other in others) < _MAX_UNATTENDED

    def running(self, source: str, key: str) -> "Fill | None":
        """Return the fill of a file that is running and can be joined."""
        fill = self._fetches.get((asyncio.get_running_loop(), source, key))
        return fill if fill is not None and fill.is_fresh else None

    def fetch(self, source: str, key: str, inner: AsyncFile, stale: Entry | None, *, began: Position) -> "Fill":
        """Return the fill of a file: one that is running, or a new one (single-flight).

        A running fill whose answer is not fresh any more is joined only after the source has confirmed it. began: the
        end of the log of purges before the source was asked for `inner`.
        """
        place = asyncio.get_running_loop(), source, key
        fill, before = self._fetches.get(place), None
        if fill is not None and not fill.is_fresh:
            before = fill.arrives
            fill = None
        if fill is None:
            enlisted = self._names.get(source)
            algorithms = () if enlisted is None else enlisted.digests
            fill = self._fetches[place] = Fill(self, source, key, inner, stale, before, algorithms, began=began)
            self._running.add(fill)
            fill.start()
            fill.task.add_done_callback(partial(self._ended, fill))
            if self.directory.is_purged(source, key, since=began):  # before the fill began
                fill.purge()
        return fill

    def _ended(self, fetch: "Fill", task: asyncio.Task[None]) -> None:
        self._running.discard(fetch)

    def withdraw(self, fetch: "Fill") -> None:
        """Let no other client join a fill."""
        place = fetch.loop, fetch.source, fetch.key
        if self._fetches.get(place) is fetch:
            del self._fetches[place]

    @asynccontextmanager
    async def part(self, source: str, key: str, size: int | None) -> AsyncIterator[tuple[Part, OpenLocalFile] | None]:
        """Give a part to write into and its open file, or None if there is no room or the disk fails.

        The part is removed when the context ends, unless it is kept.
        """
        part = await self._attempt(self.directory.begin, key_hash(source, key), size)
        if part is None:
            yield None
            return
        is_quick = self.directory.root.is_quick
        async with aclosing(OpenLocalFile(part.descriptor, part.status, is_quick, workers=self._workers)) as file:
            try:
                yield part, file
            finally:
                if not part.is_kept:
                    with anyio.CancelScope(shield=True):
                        await self._attempt(self.directory.discard, part)

    async def grow(self, part: Part, size: int) -> bool:
        """Return whether there is room for a part to grow to `size` bytes."""
        if size <= part.reserved:
            return True
        room = size + _GROW if part.size is None else min(size + _GROW, part.size)
        return bool(await self._attempt(self.directory.grow, part, room))

    async def commit(self, part: Part, fill: Fill, entry: Entry) -> Kept | None:
        """Keep a complete part and return it, or return a newer version of its key.

        Returns None if the disk fails, or if the file was purged since the fill began.
        """
        self.catch_up()
        newer = self.kept.get((fill.source, fill.key))
        if newer is not None and newer.entry.validated > entry.validated:
            return newer
        commit = partial(self.directory.commit, part, fill.source, fill.key, entry, began=fill.began)
        is_kept = await self._attempt(commit)
        if self.directory.is_purged(fill.source, fill.key, since=fill.began):  # before, or right after it was kept
            fill.purge()
            return None
        return self.remember(fill.source, fill.key, entry) if is_kept else None

    async def renew(self, fill: Fill, entry: Entry) -> Kept | None:
        """Note that a file is still current, with its new description; None if it has been removed or replaced."""
        renew = partial(self.directory.renew, fill.source, fill.key, entry, began=fill.began)
        is_current = await self._attempt(renew)
        if self.directory.is_purged(fill.source, fill.key, since=fill.began):
            fill.purge()
            return None
        return None if is_current is False else self.remember(fill.source, fill.key, entry)

    async def open_to_write(self, part: Part) -> Any:
        """Return a part as an aiofiles file, to write to."""
        return await self._open_async(part.descriptor, "r+b", buffering=0, closefd=False, executor=self._executor)

    def complain(self, exc: BaseException) -> None:
        """Log that the disk failed, once a minute."""
        if time.monotonic() - self._complained >= 60.0:
            self._complained = time.monotonic()
            problem = escaped(str(exc))
            logger.warning("the cache %a cannot be used, files are sent without being kept: %s", self.path, problem)

    def _sweep_if_due(self) -> None:
        if self.directory.is_sweep_due and not self._sweeping:
            task = asyncio.create_task(self.sweep())  # the request that finds it due does not wait for it
            self._sweeping.add(task)
            task.add_done_callback(self._sweeping.discard)

    async def _attempt(self, function: Callable[[*Ts], T], *args: *Ts) -> T | None:
        """Return what a call to the directory returns, or None if the disk fails."""
        try:
            return await self._workers.run(function, *args)
        except OSError as exc:
            self.complain(exc)
            return None


def _close(opened: Opened) -> None:
    close_unwritten(opened.descriptor)


def _accept(local: OpenLocalFile, kept: Kept) -> bool:
    """Give an open file the metadata of its entry, and protect it; False if the file has been changed."""
    if local.size != kept.entry.metadata.size:
        return False
    protect(local.descriptor)
    local.metadata, local.made_at = kept.entry.metadata, kept.entry.made_at
    return True
