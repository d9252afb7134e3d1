"""`Digests`: what is known about the digests of a source's files, and computing them in the background.

A digest belongs to one version of a file, which its strong entity tag and its size identify. A file without both, and
content that is made on demand, has none.
"""

import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
from anyio.lowlevel import RunVar

from downloadview_async.errors import ConfigurationError, DownloadError, wrong_type
from downloadview_async.http.digest import ALGORITHMS, check_algorithms, digests_of, new_hashes
from downloadview_async.http.digest import Digests as Values
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.sources.base import HasCanonicalNames, OpenFile, Source, check_source, on_demand_of
from downloadview_async.sources.digests.hashing import hash_file
from downloadview_async.sources.digests.sidecar import SUFFIX, read_sidecar
from downloadview_async.sources.digests.store import DigestStore
from downloadview_async.sources.local.open_file import local_of
from downloadview_async.sources.shared_facts import SharedDigests

_KEPT = 16_384  # names with what is known of them; each takes about 1 KiB
_WAITING = 1_000  # names of files to hash
_LOOK_UP_SECONDS = 1.0  # no download waits longer for the store
_LOOKED_UP_AGAIN = 60.0  # seconds: another process may have computed it, or a sidecar may have been written

_logger = logging.getLogger("downloadview_async")


class _Background:
    """The names of files that one event loop is to hash, each with the event of its end, and the event of a new one."""

    def __init__(self) -> None:
        self.waiting: dict[str, anyio.Event] = {}
        self.wake = anyio.Event()


class Digests:
    """The digests of a source's files, for `Download(digests=...)`.

    source: the same source as that of the `Download`.
    store: keeps digests over restarts: a `DigestStore`, or for several machines `SharedDigests`. Needs asyncio.
    name: identifies the source in the store.
    sidecars: whether `NAME.sha256` beside a local file NAME has its digest, as `sha256sum NAME > NAME.sha256` writes
    it. A sidecar that is older than the file is ignored.
    background: whether the digest of a file that was requested is computed if it is not known, one file at a time,
    while `running` is open.
    algorithms: those that are computed, of "sha-256" and "sha-512".
    max_bytes: a file with more bytes is not hashed in the background.
    etags: whether the SHA-256 of a file is its entity tag, so that all copies have the same one, whatever their times.
    A file whose digest is not known yet has no validators then. The source may be a `PathSource(etag="inode")`, which
    tells versions apart on this machine by more than the modification time.

    Raises `ConfigurationError` for an invalid source or algorithm.
    """

    def __init__(
        self,
        source: Source,
        store: DigestStore | SharedDigests | None = None,
        *,
        name: str = "files",
        sidecars: bool = False,
        background: bool = False,
        algorithms: Sequence[str] = ("sha-256",),
        max_bytes: int | None = None,
        etags: bool = False,
    ) -> None:
        check_source(source, "Digests")
        if not (store is None or isinstance(store, DigestStore | SharedDigests)):
            raise wrong_type("store takes a DigestStore, such as DigestStore('digests.db')", store)
        check_algorithms(algorithms or "none", "algorithms")
        self.source = source
        self.store = store
        self.name = name
        self.sidecars = sidecars
        self.background = background
        self.algorithms = tuple(algorithm for algorithm in ALGORITHMS if algorithm in algorithms)
        self.max_bytes = max_bytes
        self.etags = etags
        if etags and "sha-256" not in self.algorithms:
            raise ConfigurationError("entity tags are made of sha-256: add it to algorithms")
        self._canonical: Callable[[str], str] | None = (
            source.canonical if isinstance(source, HasCanonicalNames) else None
        )
        # by name: metadata of the last version, the same with its digests, and until when that holds; None: for good
        self._kept: dict[str, tuple[FileMetadata, FileMetadata, float | None]] = {}
        self._background: RunVar[_Background] = RunVar("downloadview_async.digests")

    def kept(self, name: str, metadata: FileMetadata) -> FileMetadata | None:
        """Return the metadata with the digests of this version from memory; None: `find` has to be called first."""
        if (known := self._kept.get(name)) is None:
            return None if _is_version(metadata) else self._described(metadata, ())
        before, described, until = known
        if before is metadata and until is None:
            return described
        if not _is_version(metadata):
            return self._described(metadata, ())
        is_over = until is not None and until <= time.monotonic()
        if is_over or before.etag != metadata.etag or before.size != metadata.size:
            return None
        if metadata.digests and metadata.digests != before.digests:
            return None  # the source has learnt them meanwhile
        return described if before is metadata else self._described(metadata, described.digests)

    async def find(self, name: str, opened: OpenFile) -> FileMetadata:
        """Return the metadata of an open file with the digests of this version, where they are known.

        If they are not, they may be computed in the background. A store that fails is logged, and nothing is known.
        """
        metadata = opened.metadata
        if (kept := self.kept(name, metadata) or self.kept(self._plain(name), metadata)) is not None:
            return kept
        until: float | None = None
        values = metadata.digests
        with anyio.move_on_after(_LOOK_UP_SECONDS):
            if not values:
                values = await self._stored(name, metadata)
            if not values and self.sidecars:
                values, until = await self._from_sidecar(name, opened), time.monotonic() + _LOOKED_UP_AGAIN
        if not values:
            until = time.monotonic() + _LOOKED_UP_AGAIN
            if self.background and (self.max_bytes is None or (metadata.size or 0) <= self.max_bytes):
                self._want(self._plain(name))
        return self._keep(name, metadata, values, until)

    async def compute(self, name: str, *, progress: Callable[[int], object] = lambda size: None) -> FileMetadata | None:
        """Return the metadata of a file with its digests, from the store or from its bytes, and keep the digests.

        None: they cannot be those of a version, or the file has changed meanwhile. progress: gets numbers of bytes that
        have been hashed. Raises `FileError`, and `sqlite3.Error` of the store.
        """
        name = self._plain(name)
        file = await self.source.resolve(name)
        if on_demand_of(file) is not None:
            return None
        async with file.open() as opened:
            metadata = opened.metadata
            if not _is_version(metadata):
                return None
            values = metadata.digests or await self._stored(name, metadata)
            if {algorithm for algorithm, _ in values}.issuperset(self.algorithms):
                progress(metadata.size or 0)
            else:
                hashes = new_hashes(self.algorithms)
                if not await hash_file(opened, list(hashes.values()), progress):
                    return None
                values = digests_of(hashes)
                # before it is stored: while the store fails, the file is not hashed again for each request
                described = self._keep(name, metadata, values, None)
                if self.store is not None:
                    await self.store.put(self.name, name, metadata, values)
                return described
        return self._keep(name, metadata, values, None)

    async def computed(self, name: str, seconds: float) -> bool:
        """Have a digest computed in the background, and return whether that has ended within some seconds.

        It ends at once if `running` is not open in this event loop. If too many files are waiting, it does not begin.
        """
        if self._background.get(None) is None:
            return True
        done = self._want(self._plain(name))
        if done is None:
            return False
        with anyio.move_on_after(seconds):
            await done.wait()
        return done.is_set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Compute digests in the background while the context is open, and close the store at its end.

        Several event loops may have this open at the same time. Each computes what its own requests ask for.
        """
        background = _Background()
        token = self._background.set(background)
        try:
            async with anyio.create_task_group() as group:
                if self.background:
                    group.start_soon(self._work, background)
                yield
                group.cancel_scope.cancel()
        finally:
            self._background.reset(token)
            if self.store is not None:
                await self.store.aclose()

    async def _work(self, background: _Background) -> None:
        while True:
            while not background.waiting:
                background.wake = anyio.Event()
                await background.wake.wait()
            name = next(iter(background.waiting))
            try:
                await self.compute(name)
            except Exception as exc:
                _logger.warning("The digest of %r in %r is not known: %s", name, self.name, exc)
            finally:
                background.waiting.pop(name).set()

    def _want(self, name: str) -> anyio.Event | None:
        """Return the event that ends the computation of a digest, or None if too many are waiting or none can run."""
        background = self._background.get(None)
        if background is None or (name not in background.waiting and len(background.waiting) >= _WAITING):
            return None
        done = background.waiting.setdefault(name, anyio.Event())
        background.wake.set()
        return done

    async def _stored(self, name: str, metadata: FileMetadata) -> Values:
        if self.store is None:
            return ()
        try:
            return await self.store.get(self.name, self._plain(name), metadata)
        except (OSError, sqlite3.Error, ConfigurationError) as exc:
            _logger.warning("The store of digests fails: %s", exc)
            return ()

    async def _from_sidecar(self, name: str, opened: OpenFile) -> Values:
        if (local := local_of(opened)) is None:
            return ()
        plain = self._plain(name)
        try:
            async with (await self.source.resolve(plain + SUFFIX)).open() as sidecar:
                if (beside := local_of(sidecar)) is None:
                    return ()
                basename = plain.rpartition("/")[2]
                return await local.workers.run(read_sidecar, beside.descriptor, local.descriptor, basename)
        except (DownloadError, OSError):
            return ()

    def _plain(self, name: str) -> str:
        return name if self._canonical is None else self._canonical(name)

    def _described(self, metadata: FileMetadata, values: Values) -> FileMetadata:
        if self.etags:
            return replace(metadata, digests=values, etag=_tag_of(values), last_modified=None)
        return replace(metadata, digests=values) if values and values != metadata.digests else metadata

    def _keep(self, name: str, metadata: FileMetadata, values: Values, until: float | None) -> FileMetadata:
        described = self._described(metadata, values)
        if len(self._kept) >= _KEPT and name not in self._kept:
            self._kept.pop(next(iter(self._kept)), None)
        self._kept[name] = metadata, described, until
        return described


def _tag_of(values: Values) -> ETag | None:
    """Return the entity tag of a file with some digests."""
    value = dict(values).get("sha-256")
    return None if value is None else ETag(f"sha256-{value.hex()}")


def _is_version(metadata: FileMetadata) -> bool:
    """Return whether the metadata identifies bytes that a digest can be about: a coded file has other bytes."""
    etag = metadata.etag
    is_coded = any(name == "content-encoding" for name, _ in metadata.headers)
    return etag is not None and not etag.weak and metadata.size is not None and not is_coded
