"""`Fill`: fetches a file into the cache (single-flight), and feeds all clients that want it meanwhile."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from downloadview_async.errors import (
    DownloadError,
    SourceUnavailable,
    TransferAborted,
)
from downloadview_async.http.conditional import failed_precondition
from downloadview_async.http.digest import ALGORITHMS, digests_of, new_hashes
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.metadata import MAX_READS, ByteRange, ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received
from downloadview_async.sources.base import AsyncFile, OpenFile, closing_stream, on_demand_of
from downloadview_async.sources.cache.entry import Entry, data_name, is_describable
from downloadview_async.sources.cache.files import Part
from downloadview_async.sources.cache.freshness import asking_for_news, is_current, max_age_of, updated
from downloadview_async.sources.cache.purges import Position
from downloadview_async.sources.cache.spool import Arriving, ArrivingFile
from downloadview_async.sources.local.open_file import OpenLocalFile

if TYPE_CHECKING:
    from downloadview_async.sources.cache.index import Cache, Kept

logger = logging.getLogger("downloadview_async")


class Fill:
    """One file on its way into the cache, fetched by a separate task.

    It ends when the last client leaves. But once a client has got all bytes that it asked for, the file is fetched to
    its end, unless too many other fills run without clients.
    """

    def __init__(
        self,
        cache: "Cache",
        source: str,
        key: str,
        inner: AsyncFile,
        stale: Entry | None,
        before: "Fill | None" = None,
        algorithms: Sequence[str] = (),
        *,
        began: Position,
    ) -> None:
        self.source = source
        self.key = key
        self.loop = asyncio.get_running_loop()
        self.arriving = Arriving()
        self.result: Kept | None = None
        self.is_kept = False
        """Whether the file will be kept in the cache, as far as is known."""
        self.task: asyncio.Task[None]
        self._cache = cache
        self._inner = inner
        self._on_demand = on_demand_of(inner)
        self._stale = stale
        self.is_for_one = False
        """Whether the answer is uncacheable, so that only the first client may get it."""
        self.began = began
        """The end of the log of purges before the source was asked for this file, or for its name."""
        self.is_purged = False
        """Whether the file is known to have been purged since then, so that it is not kept."""
        self._before = before
        """Another fill of the same file that still arrives. The source is asked whether its version is current."""
        self._same: Fill | None = None
        """That fill, once the source has confirmed its version."""
        self._described_as: FileMetadata | None = None
        """The metadata that the source has answered."""
        self._entry: Entry | None = None
        """The entry of the file that arrives, once the source has described it."""
        self._fresh_until = math.inf
        self._algorithms = algorithms
        self._clients = 0
        self._is_given = False
        self._is_wanted = False
        self._scope = anyio.CancelScope()
        self._settled = anyio.Event()

    def start(self) -> None:
        """Begin to fetch."""
        # not in a task group: it may outlive each of the requests that want the file, and a `Cache` has no coroutine
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """End the task soon, and let no other client join."""
        self._cache.withdraw(self)
        self.arriving.fail(SourceUnavailable("the fetch was ended"))
        self._scope.cancel()

    def purge(self) -> None:
        """Keep nothing of what is fetched, and let no other client join."""
        self.is_purged = True
        self._cache.withdraw(self)

    @property
    def is_fresh(self) -> bool:
        """Whether a client that asks now may get the source's answer to this fill.

        A file that is made on demand stays fresh until it is complete.
        """
        return time.monotonic() < self._fresh_until

    @property
    def arrives(self) -> "Fill | None":
        """The fill that others can join: this one, or the one whose version the source has confirmed; or None."""
        if self._same is not None:
            return self._same
        is_joinable = self.is_kept and self._entry is not None and self.arriving.failure is None
        return self if is_joinable and not self._settled.is_set() else None

    @property
    def is_unattended(self) -> bool:
        """Whether it goes on without clients."""
        return not self._clients and not self._settled.is_set()

    @property
    def needs_source(self) -> bool:
        """Whether the source has not sent all yet: it holds a connection."""
        return not self.arriving.has_all

    async def settled(self) -> None:
        """Wait until it has ended or turns out not to be kept. Raises the error that it failed with.

        Raises `SourceUnavailable` instead of `TransferAborted`, because nothing has been sent to the client that waits.
        """
        while not self._settled.is_set() and self.arriving.is_on_disk:
            await self.arriving.wait()
        if self.arriving.failure is not None:
            failure = self.arriving.failure_again()
            raise SourceUnavailable(str(failure)) if isinstance(failure, TransferAborted) else failure
        if self.result is None:
            self._cache.withdraw(self)
            if not self.is_purged:
                self._cache.refuse(self.source, self.key)

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[tuple["Fill", ArrivingFile | None]]:
        """Give the fill that has the file, and the file as it arrives, or None if the kept file is current."""
        arriving, joined_at = self.arriving, time.time()
        async with self._attended() as attendance:
            if self._before is not None:
                await attendance.enter_async_context(self._before._attended())  # noqa: SLF001
            while arriving.metadata is None and arriving.failure is None and not self._settled.is_set():
                await arriving.wait()
            if arriving.failure is not None:
                raise arriving.failure_again()
            if self._same is not None:
                yield await attendance.enter_async_context(self._same.joined())
                return
            if arriving.metadata is None or (self._settled.is_set() and self.is_kept):
                yield self, None
                return
            if self.is_for_one and self._is_given:
                yield self, None
                return
            self._is_given = True
            file = await attendance.enter_async_context(self._reading())
            if self._entry is not None and (self._entry.validated < joined_at or self._entry.age >= 1):
                file.made_at = self._entry.made_at
            yield self, file

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[ArrivingFile]:
        again = self._again if self._on_demand is None else None
        described = self._described_as
        max_reads = _max_reads(described) if described is not None else MAX_READS
        async with aclosing(self.arriving.open(again=again, max_reads=max_reads)) as file:
            try:
                yield file
            finally:
                self._is_wanted = self._is_wanted or file.is_satisfied

    async def _again(self, span: ByteRange) -> AsyncGenerator[bytes, None]:
        """Yield a span of the version that arrives, by another read of the source."""
        async with self._inner.open(DownloadRequest(range=f"bytes={span.start}-{span.stop - 1}")) as opened:
            if self._described_as is None or not _is_same_version(opened.metadata, self._described_as):
                raise TransferAborted(
                    f"{self._inner.name!r} can no longer be shown to be the same version", reason="file-changed"
                )
            async with closing_stream(opened.stream(span)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @asynccontextmanager
    async def _attended(self) -> AsyncIterator[AsyncExitStack]:
        """Count one more client, and end the fill after the last one, unless it may go on without clients."""
        self._clients += 1
        try:
            async with AsyncExitStack() as attendance:
                yield attendance
        finally:
            self._clients -= 1
            goes_on = self._is_wanted and self.arriving.is_on_disk and self._cache.may_go_on(self)
            if self.is_unattended and not self.arriving.is_complete and not goes_on:
                self.stop()

    async def _run(self) -> None:
        async with aclosing(self.arriving):
            try:
                with self._scope:
                    await self._fetch()
            except BaseException as exc:
                self.arriving.fail(exc if isinstance(exc, Exception) else SourceUnavailable("the fetch was cancelled"))
                if not isinstance(exc, Exception):
                    raise
                if not isinstance(exc, DownloadError) and not self._clients:
                    problem = escaped(f"{type(exc).__name__}: {exc}")
                    logger.warning("fetching %s for the cache failed: %s", shown(self._inner.name), problem)
            finally:
                self._cache.withdraw(self)
                self._settled.set()
                self.arriving.notify()

    async def _fetch(self) -> None:
        before = self._before
        known = self._stale if before is None or before._entry is None else before._entry  # noqa: SLF001
        request = asking_for_news(known)
        if known is not None and self._on_demand is not None:
            given, now = self._on_demand.validators, time.time()
            is_same = failed_precondition(request, given) == 304 and is_current(known, given)
            if is_same and await self._confirmed(known, given, Received(date=now, at=now)):
                return
        async with self._inner.open(request) as opened:
            if known is None or failed_precondition(request, opened.metadata) != 304:
                await self._receive(opened)
                return
            is_same = is_current(known, opened.metadata)
            if is_same and await self._confirmed(known, opened.metadata, _received(opened)):
                return
        async with self._inner.open(GET) as opened:  # the 304 was for another version, or forbids to keep it
            await self._receive(opened)

    async def _confirmed(self, known: Entry, metadata: FileMetadata, received: Received) -> bool:
        """Renew the entry that the source has just confirmed, and return whether the file may still be kept."""
        if (complete := self._completed_meanwhile(known)) is not None:
            known, self._before = complete, None
        described = updated(known.metadata, metadata)
        max_age = max_age_of(self._on_demand, described, self._cache.max_age, received)
        entry = self._described(described, received, max_age, data=known.data)
        if self._before is not None:
            self._same = None if max_age is None else self._before.arrives
            return self._same is not None
        if max_age is None or not is_describable(self.source, self.key, entry):
            await self._cache.forget(self.source, self.key, known.data)
            return False
        self.result = await self._cache.renew(self, entry)
        return self.result is not None

    def _completed_meanwhile(self, known: Entry) -> Entry | None:
        """Return the entry of the fill `before` if it has been kept meanwhile and is the confirmed version."""
        kept = None if self._before is None or self._before.arrives is not None else self._before.result
        if kept is None or kept.entry.metadata.etag != known.metadata.etag:
            return None
        return kept.entry if kept.entry.metadata.last_modified == known.metadata.last_modified else None

    def _described(self, metadata: FileMetadata, received: Received, max_age: float | None, *, data: str = "") -> Entry:
        """Return the entry of a file that the source has just described, and note until when others may get it."""
        if self._on_demand is None or not max_age:
            self._fresh_until = time.monotonic() + (max_age or 0.0)
        return Entry(
            data=data,
            name=self._inner.name,
            metadata=metadata,
            validated=received.at,
            max_age=None if max_age == self._cache.max_age else max_age,
            age=received.age,
        )

    async def _receive(self, opened: OpenFile) -> None:
        self.arriving.received = received = _received(opened)
        self.arriving.ends_with_connection = getattr(opened, "ends_with_connection", False)
        metadata = self._described_as = opened.metadata
        max_age = max_age_of(self._on_demand, metadata, self._cache.max_age, received)
        size = metadata.size
        kept = replace(
            metadata,
            accept_ranges=True,
            max_reads=None,
            headers=tuple((name, value) for name, value in metadata.headers if name != "age"),
        )
        self._entry = self._described(kept, received, max_age)
        # a file that only ends with its connection may be incomplete
        if self.arriving.ends_with_connection or not self._is_describable(kept):
            max_age = None
        if max_age is not None:
            async with self._cache.part(self.source, self.key, size) as begun:
                if begun is not None:
                    await self._keep(*begun, opened, kept)
                    return
        self.is_for_one = True
        self._cache.withdraw(self)
        self._cache.refuse(self.source, self.key)
        if max_age is None and self._stale is not None:  # else it might be sent as a stale answer
            await self._cache.forget(self.source, self.key, self._stale.data)
        self.arriving.describe(metadata)
        await self._take_all(opened, size)

    async def _keep(self, part: Part, file: OpenLocalFile, opened: OpenFile, metadata: FileMetadata) -> None:
        """Fetch a file into a part, and keep it if the disk takes it."""
        assert self._entry is not None
        self.is_kept = True
        try:
            if metadata.etag is None and metadata.changed_at is None:
                # so that a client can resume with the rest of this copy
                metadata = replace(metadata, etag=ETag(secrets.token_hex(16)))
            self._entry = replace(self._entry, metadata=metadata)
            await self._describe(part, file, metadata)
            is_coded = any(name == "content-encoding" for name, _ in metadata.headers)
            hashes = new_hashes(() if is_coded else self._algorithms)
            await self._take_all(opened, metadata.size, hashes)
            if not self.arriving.is_on_disk:
                return
            assert self.arriving.metadata is not None
            complete = self._with_digests(self.arriving.metadata, hashes)
            entry = replace(self._entry, data=data_name(part.key, complete), metadata=complete)
            if self._on_demand is not None:
                entry = replace(entry, validated=time.time())  # its `max_age` counts from its completion
            with anyio.CancelScope(shield=True):
                self.result = await self._cache.commit(part, self, entry)
        finally:
            self.is_kept = self.result is not None

    def _with_digests(self, metadata: FileMetadata, hashes: Mapping[str, Any]) -> FileMetadata:
        """Return the metadata with the digests that have been computed, if a K.meta has room for them.

        Raises `SourceUnavailable` if the source has told another digest.
        """
        computed = dict(digests_of(hashes))
        if wrong := [name for name, value in metadata.digests if computed.get(name, value) != value]:
            problem = f"the bytes of {shown(self._inner.name)} do not have the {wrong[0]} digest that its source tells"
            logger.warning("%s: they are not kept in the cache", problem)
            raise SourceUnavailable(problem)
        known = dict(metadata.digests) | computed
        described = replace(metadata, digests=tuple((name, known[name]) for name in ALGORITHMS if name in known))
        return described if self._is_describable(described) else metadata

    def _is_describable(self, metadata: FileMetadata) -> bool:
        entry = Entry(data=data_name("", metadata), name=self._inner.name, metadata=metadata, validated=0.0)
        return is_describable(self.source, self.key, entry)

    async def _describe(self, part: Part, file: OpenLocalFile, metadata: FileMetadata) -> None:
        cache = self._cache
        writer = await cache.open_to_write(part)

        async def write(block: memoryview) -> int:
            count: int = await writer.write(block)
            return count

        # Without room, new bytes only go to the clients that are there: one that joins later would miss the beginning.
        async def reserve(size: int) -> bool:
            has_room = await cache.grow(part, size)
            if not has_room:
                cache.withdraw(self)
            return has_room

        def complain(exc: BaseException) -> None:
            cache.complain(exc)
            cache.withdraw(self)

        self.arriving.describe(metadata, file=file.shared(), write=write, reserve=reserve, complain=complain)

    async def _take_all(self, opened: OpenFile, size: int | None, hashes: Mapping[str, Any] | None = None) -> None:
        """Take exactly the promised bytes, and update the hashes. Raises `TransferAborted` if there are fewer."""
        arriving, left = self.arriving, size
        async with arriving.writing():
            if size != 0:
                async with closing_stream(opened.stream(None if size is None else ByteRange(0, size))) as chunks:
                    async for chunk in chunks:
                        taken = chunk if left is None else chunk[:left]
                        for value in (hashes or {}).values():
                            value.update(taken)
                        await arriving.take(taken)
                        if not arriving.is_on_disk:
                            self._cache.withdraw(self)
                            if not self._clients or arriving.is_given_up:
                                self.stop()
                        if left is not None and (left := left - len(chunk)) <= 0:
                            break
            if left is not None and left > 0:
                raise TransferAborted(f"the file ended {left} bytes before its promised size", reason="file-changed")
        arriving.finish()


def _max_reads(metadata: FileMetadata) -> int:
    """Return how many spans one reader may read from the source, where each may be a request."""
    if not metadata.accept_ranges:
        return 1  # each read is a read of the whole file
    return MAX_READS if metadata.max_reads is None else metadata.max_reads


def _received(opened: OpenFile) -> Received:
    now = time.time()
    return getattr(opened, "received", None) or Received(date=now, at=now)


def _is_same_version(metadata: FileMetadata, other: FileMetadata) -> bool:
    """Return whether two descriptions are of the same bytes, which only a strong validator proves."""
    if metadata.size != other.size or metadata.etag != other.etag:
        return False
    if metadata.etag is not None and not metadata.etag.weak:
        return True
    return metadata.changed_at is not None and metadata.changed_at == other.changed_at
