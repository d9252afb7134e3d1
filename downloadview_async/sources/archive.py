"""ZIP archives that are made while they are sent: `Archive` has given files, `ArchiveSource` those of a folder.

The names, sizes and tags of the files give the length, the tag and the place of each byte (`http.zip_layout`), so an
archive has ranges like a file. Only the CRC-32s come from the content. They are computed while a file passes through,
and kept in a `Checksums`. If a range needs one that is not known, it waits until a worker has read that file.
"""

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from mmap import mmap
from operator import itemgetter
from typing import TypeVar
from weakref import WeakValueDictionary, ref

import anyio
import anyio.to_thread
from anyio.lowlevel import checkpoint

from downloadview_async.errors import (
    AccessDenied,
    ArchiveTooLarge,
    ConfigurationError,
    DownloadError,
    FileMissing,
    TransferAborted,
    WrongType,
    wrong_type,
)
from downloadview_async.http.archive_names import distinct_names, safe_name
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.request import GET, HEAD, DownloadRequest
from downloadview_async.http.zip_layout import LAYOUT, Checked, Content, Member, ZipLayout, has_checksum
from downloadview_async.sources.base import (
    AsyncFile,
    HasManyFiles,
    IdentifiesFolders,
    OpenFile,
    Piece,
    Source,
    SupportsListing,
    check_source,
    closing_stream,
    is_file,
)
from downloadview_async.sources.checksums import Checksums, MemoryChecksums, crc32
from downloadview_async.sources.listing import DescribedEntry, Version, closing_entries
from downloadview_async.sources.local.open_file import CHUNK_SIZE, REWRITTEN, OpenLocalFile, local_of, open_nowait
from downloadview_async.sources.names import canonical_folder
from downloadview_async.sources.workers import MID_TRANSFER, Slots, unlimited

Key = TypeVar("Key")

SMALL = 64 * 1024
"""Up to this many bytes, reading a file is less work than having the kernel send it."""

CONTENT_TYPE = "application/zip"
SHARED_SECONDS = 1.0
"""For how many seconds a layout is given to other connections, such as those of a client that opens sixteen."""

_ENOUGH = 128 * 1024  # bytes that are sent together: many small files are one chunk
_ENOUGH_LENT = 256 * 1024  # bytes that are sent together by a server that takes files, too
_LENT = 4  # files that are open at the same time for one answer
_LOOKED_UP = 500  # files whose CRC-32s are looked up together
_NOTED = 64 << 20  # bytes after which the CRC-32s of the files that have passed are stored
_DESCRIBED = 8  # files that are opened at the same time to describe them
_READERS = 4  # files that are read at the same time for their CRC-32s alone
_READ = 16 << 20  # bytes of a local file that one call of a worker reads
_BEGUN = 1_000  # files of which is kept how far they have been read
_LAID_OUT = 4  # archives of a source that are laid out at the same time: each file takes about 1 KiB
_KEPT = 20_000  # files of which a source keeps layouts that are not used: each takes about 1 KiB
_MANY = 1_000  # files whose layout takes too long for the event loop
_ASKED = 50  # names about which access decides before other requests get their turn
_ASKING = 4  # archives of a source for which access is asked about each name at the same time
_SEPARATOR = "\0"  # no name has it
_ALLOWED = _SEPARATOR * 2  # before the digest of the names that are allowed: no name is empty
_Chosen = tuple[str, ...]  # a folder, names in it, and the name of the `AllowedEntries`, if not all are allowed
_Tree = dict[str, list[Version]]  # the entries of each folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """The most that an archive may hold. None: any number.

    files: files and folders. size: bytes of the archive. depth: folders within folders.
    """

    files: int | None = 100_000
    size: int | None = None
    depth: int | None = 32


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """A file or an empty folder for an `Archive`.

    path: where it is in the archive, such as `reports/2026/june.pdf`; that of a folder ends with a slash. A path is
    made safe: see `safe_name`. file: None for a folder. modified: seconds since the epoch, UTC; None is the time of the
    file. mode: the permissions; None is 0o644, or 0o755 for a folder.
    """

    path: str
    file: AsyncFile | None = None
    modified: int | None = None
    mode: int | None = None


def _listed(entries: object) -> Iterable[object]:
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise wrong_type("Archive takes a list of paths with files, such as [('a.txt', LocalFile('a.txt'))]", entries)
    return entries


def _entry(value: object) -> ArchiveEntry:
    """Return an entry that may be given as a pair. Raises `WrongType`."""
    entry = ArchiveEntry(*value) if isinstance(value, tuple) and 0 < len(value) <= 4 else value
    is_entry = isinstance(entry, ArchiveEntry) and isinstance(entry.path, str)
    file = getattr(entry, "file", None)
    if not (is_entry and (file is None or (is_file(file) and hasattr(file, "location")))):
        raise WrongType(
            f"{value!r} is not an entry of an archive: give a path and a file, such as ('a.txt', LocalFile('a.txt'))"
            + (", and `await` a coroutine first" if hasattr(file, "__await__") else "")
            + (", or ('a.txt', async_file_of(file)) for a file of Django" if is_file(file) else "")
        )
    assert isinstance(entry, ArchiveEntry)
    return entry


@dataclass(slots=True)
class _Item(Member):
    """A file or a folder of an archive.

    version: see `FileMetadata.version`; None until the file is described. file: None for a folder, and for a file that
    the source of the archive has as `source_name`.
    """

    version: str | None = ""
    file: AsyncFile | None = None
    source_name: str = ""

    def describe(self, size: int | None, version: str) -> None:
        """Note the size and the version of the file. Raises `ArchiveTooLarge` if the size is not known."""
        if size is None:
            raise ArchiveTooLarge(f"the size of {self.name!r} is not known", "a file has no known size")
        self.size, self.version = size, version


@dataclass(slots=True, weakref_slot=True)
class _LaidOut:
    """An archive whose files have been described.

    source: that of the files which have a name in it. crcs: the CRC-32s that are known, by the index of the file.
    is_stale: whether a file may have changed meanwhile.
    """

    items: Sequence[_Item]
    source: Source | None
    layout: ZipLayout
    metadata: FileMetadata
    crcs: dict[int, int]
    is_stale: bool = False


@dataclass(slots=True)
class _Begun:
    """How far a file has been read for its CRC-32 alone."""

    crc: int = 0
    position: int = 0


class _Knowledge:
    """The CRC-32s of one source. source: identifies it in the `Checksums`."""

    def __init__(self, source: str, checksums: Checksums) -> None:
        self.checksums = checksums
        self.readers = Slots(_READERS, patience=MID_TRANSFER)
        self.reading: dict[bytes | None, anyio.Lock] = {}
        self.begun: dict[bytes, _Begun] = {}
        self._source = source

    def key(self, name: str, version: str, size: int) -> bytes:
        """Return the key of a version of a file."""
        # the source may be called by the path of a directory, which need not be UTF-8
        text = f"{self._source}\0{name}\0{version}\0{size}"
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def keep(self, key: bytes, begun: _Begun) -> None:
        """Keep how far a file has been read, and forget the oldest beyond `_BEGUN`."""
        self.begun[key] = begun
        while len(self.begun) > _BEGUN:
            del self.begun[next(iter(self.begun))]


class Archive:
    """A ZIP archive of files, which is made while it is sent.

    entries: `ArchiveEntry` objects, or pairs of a path and a file. name: what the client calls the archive. limits:
    what it may hold. name_in_checksums: identifies the files by their paths in `checksums`, which keeps their CRC-32s
    for other archives with this name; without a name they are kept with this object.

    Two entries with the same path get different names: see `distinct_names`. Opening the archive opens each file once,
    to describe it. It has a strong tag, and ranges, if each file has a strong validator. Without, it can only be sent
    as a whole.

    Opening raises `ArchiveTooLarge`, also for a file whose size is not known, and what opening a file raises.
    """

    location: str | None = None

    def __init__(
        self,
        entries: Iterable[ArchiveEntry | tuple[str, AsyncFile]],
        *,
        name: str = "archive.zip",
        limits: ArchiveLimits | None = None,
        checksums: Checksums | None = None,
        name_in_checksums: str | None = None,
    ) -> None:
        self.name = name
        self._limits = limits or ArchiveLimits()
        self._entries = [_entry(entry) for entry in _listed(entries)]
        for entry in self._entries:
            if (entry.file is None) != entry.path.endswith("/"):
                raise ConfigurationError(
                    f"{entry.path!r} is in an archive: give it a file, or a slash at its end for a folder"
                )
        is_shared = checksums is not None and name_in_checksums is not None
        kept = checksums if is_shared and checksums is not None else MemoryChecksums()
        self._knowledge = _Knowledge(name_in_checksums or "", kept)

    async def _items(self) -> list[_Item]:
        return [
            _Item(entry.path, 0, entry.modified, entry.mode, "" if entry.file is None else None, entry.file)
            for entry in self._entries
        ]

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator["OpenArchive"]:
        """Describe the files and lay the archive out. No file is read before its part is streamed."""
        yield OpenArchive(await self._laid_out(), self._knowledge)

    async def _laid_out(self) -> _LaidOut:
        return await _laid_out(await self._items(), None, self._limits)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class AllowedEntries:
    """The entries of a folder that one request may have.

    name: that of the archive which has nothing else; `ArchiveSource.resolve` takes it as long as this object exists.
    entries: the names in the source; those of folders end in a slash.
    """

    name: str
    entries: frozenset[str]


class FolderArchive(Archive):
    """An archive of a folder of a source, or of some of its entries. `ArchiveSource` makes it.

    allowed: the only entries that it may have; None: all.
    """

    def __init__(
        self, source: "ArchiveSource", folder: str, names: Sequence[str], allowed: AllowedEntries | None = None
    ) -> None:
        last = folder.rpartition("/")[2]
        self.name = f"{last or 'archive'}.zip"
        self._source = source
        self._limits = source.limits
        self._knowledge = source.knowledge
        self._folder = folder
        self._names = {*names}
        self._allowed = allowed
        self._may_have: Callable[[str], Awaitable[bool]] | None = None

    async def ask(self, may_have: Callable[[str], Awaitable[bool]]) -> frozenset[str]:
        """Return which entries a request may have, as `AllowedEntries.entries`: see `ArchiveSource.allowed`."""
        self._may_have = may_have
        tree: _Tree = {}
        await self._look(tree)
        return frozenset(
            _name_in_source(f"{folder}/" if folder else "", entry) for folder in tree for entry in tree[folder]
        )

    async def _laid_out(self) -> _LaidOut:
        """Return the layout that another connection has made in the last `SHARED_SECONDS`, or a new one."""
        only = () if self._allowed is None else (self._allowed.name,)
        recent, key = self._source.recent, (self._folder, *sorted(self._names), *only)
        async with _one_at_a_time(self._source.laying_out, key):
            now = time.monotonic()
            for old in [old for old, (until, _) in recent.items() if until <= now]:
                del recent[old]
            laid_out = recent[key][1]() if key in recent else None
            if laid_out is None or laid_out.is_stale:
                with await self._source.layouts.take():
                    laid_out = await self._listed(key)
                recent[key] = time.monotonic() + SHARED_SECONDS, ref(laid_out)
            return laid_out

    async def _listed(self, key: _Chosen) -> _LaidOut:
        """Look at the folder. Return the layout that is kept if nothing has changed, or a new one."""
        tree: _Tree = {}
        is_whole = await self._look(tree)
        last, kept = self._folder.rpartition("/")[2], self._source.kept
        known, can_keep = kept.pop(key, None), True
        if known is None or known[0] != tree:
            items = [_Item(f"{last}/")] if is_whole else []
            _add_items(items, tree, self._folder, f"{last}/" if is_whole else "")
            await _describe(items, self._source.source, self._is_chosen)
            known = tree, await _laid_out(items, self._source.source, self._limits)
            # else a file may change without a sign in the listing
            can_keep = known[1].metadata.etag is not None and _has_versions(tree)
        if can_keep:
            kept[key] = known
            while len(kept) > 1 and sum(len(laid_out.items) for _, laid_out in kept.values()) > _KEPT:
                del kept[next(iter(kept))]
        return replace(known[1])  # a new object, which lives as long as it is used

    async def _look(self, tree: _Tree) -> bool:
        """Note the entries of each folder. Return whether the archive has the folder itself at its top."""
        is_whole = bool(self._folder) and not self._names
        above = set() if self._names else {await self._identity_of(self._folder)}
        await self._collect(tree, self._folder, above, 0, int(is_whole), self._names)
        return is_whole

    def _is_chosen(self, item: "_Item") -> bool:
        """Return whether a file is one that the request has named, so that it must not be left out."""
        folder, _, name = item.source_name.rpartition("/")
        return folder == self._folder and name in self._names

    async def _identity_of(self, folder: str) -> Hashable:
        listing = self._source.listing
        return await listing.folder_identity(folder) if isinstance(listing, IdentifiesFolders) else None

    async def _collect(
        self,
        tree: _Tree,
        folder: str,
        above: set[Hashable],
        depth: int,
        count: int,
        only: set[str] | None = None,
    ) -> int:
        """Note the entries of a folder, and of those in it, sorted by their names. Return their count, with `count`.

        A link that leads back to one of the folders above, with these identities, is left out. The names about which
        access has been asked count, too, if it refuses them.
        """
        entries: list[Version] = []
        leave_out, limit = self._source.leave_out, self._limits.files
        allowed = None if self._allowed is None else self._allowed.entries
        prefix = f"{folder}/" if folder else ""
        async with closing_entries(_batches_of(self._source.listing, folder)) as listing:
            async for batch in listing:
                if only:
                    batch = [entry for entry in batch if entry[0] in only]
                if leave_out is not None:
                    batch = [entry for entry in batch if not leave_out(prefix + entry[0])]
                if allowed is not None:
                    batch = [entry for entry in batch if _name_in_source(prefix, entry) in allowed]
                entries += batch
                if limit is not None and count + len(entries) > limit:
                    _check(limit + 1, limit, "files and folders")
        entries.sort(key=itemgetter(0))  # the name
        count += len(entries)
        if self._may_have is not None:
            entries = await _allowed_of(entries, prefix, self._may_have)
        if only and (missing := only - {entry[0] for entry in entries}):
            raise FileMissing(f"{folder!r} does not have {sorted(missing)}")
        tree[folder] = entries
        for entry in [entry for entry in entries if entry[1]]:
            inner = prefix + entry[0]
            identity = await self._identity_of(inner)
            if identity is not None and identity in above:
                entries.remove(entry)
                count -= self._may_have is None
                continue
            _check(depth + 1, self._limits.depth, "folders within folders")
            count = await self._collect(tree, inner, {*above, identity}, depth + 1, count)
        return count


async def _allowed_of(entries: list[Version], prefix: str, may_have: Callable[[str], Awaitable[bool]]) -> list[Version]:
    """Return the entries of a folder that a request may have. They are asked about one after another."""
    allowed = []
    for number, entry in enumerate(entries):
        if not number % _ASKED:
            await checkpoint()
        if await may_have(_name_in_source(prefix, entry)):
            allowed.append(entry)
    return allowed


def _name_in_source(prefix: str, entry: Version) -> str:
    """Return the name by which a request asks for an entry. That of a folder ends in a slash."""
    return f"{prefix}{entry[0]}/" if entry[1] else prefix + entry[0]


def _add_items(items: list[_Item], tree: _Tree, folder: str, path: str) -> None:
    """Add what is below a folder, in the order of the names. path: that of the folder in the archive."""
    above = f"{folder}/" if folder else ""
    for name, is_folder, size, modified, version in tree[folder]:
        if is_folder:
            items.append(_Item(f"{path}{name}/", modified=modified))
            _add_items(items, tree, above + name, f"{path}{name}/")
        else:
            item = _Item(path + name, 0, modified, None, None, None, above + name)
            if version is not None:
                item.describe(size, version)
            items.append(item)


class ArchiveSource:
    """The folders of another source as ZIP archives: `resolve("reports/2026")` gives `2026.zip`.

    The archive of a folder has that folder at its top: `2026/june.pdf`. That of the whole source is `archive.zip`, and
    has the files and folders at its top, as an archive of a selection does: see `selection`.

    source: one that lists its folders: see `SupportsListing`. limits: what an archive may hold. checksums: keeps the
    CRC-32s of the files, by default in memory. name: identifies the source in `checksums`; only a `Checksums` that
    several sources share needs it. leave_out: returns whether a file or folder is left out; it gets the name in the
    source.

    Raises `ConfigurationError` for a source that does not list folders.
    """

    def __init__(
        self,
        source: Source,
        *,
        limits: ArchiveLimits | None = None,
        checksums: Checksums | None = None,
        name: str = "",
        leave_out: Callable[[str], bool] | None = None,
    ) -> None:
        check_source(source, "ArchiveSource")
        if not isinstance(source, SupportsListing):
            raise ConfigurationError(f"ArchiveSource takes a source that lists its folders, which {source!r} does not")
        self.source = source
        self.limits = limits or ArchiveLimits()
        self.knowledge = _Knowledge(name, checksums or MemoryChecksums())
        # Layouts, and what they are of. The one that is used last is the last.
        self.kept: dict[_Chosen, tuple[_Tree, _LaidOut]] = {}
        # Layouts, and until when others get them without looking at the folder, as long as a connection uses them.
        self.recent: dict[_Chosen, tuple[float, ref[_LaidOut]]] = {}
        self.laying_out: dict[_Chosen, anyio.Lock] = {}
        self.layouts = Slots(_LAID_OUT, patience=MID_TRANSFER)
        self._asking = Slots(_ASKING, patience=MID_TRANSFER)
        self._allowed: WeakValueDictionary[str, AllowedEntries] = WeakValueDictionary()
        self.listing: SupportsListing = source
        self.leave_out = leave_out

    def canonical(self, name: str) -> str:
        """Return the one key for an archive: see `HasCanonicalNames`."""
        chosen, mark, digest = name.partition(_ALLOWED)
        folder, *names = chosen.split(_SEPARATOR)
        return f"{selection(folder, names)}{mark}{digest}"

    async def allowed(self, name: str, may_have: Callable[[str], Awaitable[bool]]) -> AllowedEntries:
        """Return which entries of an archive a request may have.

        The name of the result stands for the archive that has nothing else, so no cache gives it to a request that may
        have other entries. may_have: decides about a name in the source; that of a folder ends in a slash. It is asked
        about each that is not left out, one after another, and about nothing below a folder that it refuses.

        Raises `ArchiveTooLarge` before more names than `limits.files` are asked about, `FileMissing` for a selection
        with a name that is refused, and what `may_have` raises.
        """
        chosen = self.canonical(name)
        folder, *names = chosen.split(_SEPARATOR)
        with await self._asking.take():
            entries = await FolderArchive(self, folder, names).ask(may_have)
        digest = blake2b(_SEPARATOR.join(sorted(entries)).encode("utf-8", "surrogatepass"), digest_size=16)
        allowed = AllowedEntries(f"{chosen}{_ALLOWED}{digest.hexdigest()}", entries)
        return self._allowed.setdefault(allowed.name, allowed)

    async def resolve(self, name: str, /) -> FolderArchive:
        """Return the archive of a folder, of a `selection` or of `AllowedEntries`.

        A missing folder is noticed when it is opened. Raises `FileMissing` for `AllowedEntries` that do not exist.
        """
        name = self.canonical(name)
        chosen, mark, _ = name.partition(_ALLOWED)
        folder, *names = chosen.split(_SEPARATOR)
        allowed = self._allowed.get(name)
        if mark and allowed is None:
            raise FileMissing(f"nobody has been allowed these entries of {folder!r}")
        return FolderArchive(self, folder, names, allowed)


def selection(folder: str, names: Iterable[str] = ()) -> str:
    """Return the name in an `ArchiveSource` for an archive of some entries of a folder; without names, of all.

    Raises `FileMissing` for a name that no folder has.
    """
    return _SEPARATOR.join([canonical_folder(folder, "any"), *sorted({*names})])


class OpenArchive:
    """An archive whose files have been described. Each file is opened when its part is streamed."""

    def __init__(self, laid_out: _LaidOut, knowledge: _Knowledge) -> None:
        self._laid_out = laid_out  # as long as this exists, others get it too
        self.metadata = laid_out.metadata
        self._items = laid_out.items
        self._layout = laid_out.layout
        self._crcs = laid_out.crcs
        self._knowledge = knowledge
        source = laid_out.source
        self._many: HasManyFiles | None = source if source is not None and isinstance(source, HasManyFiles) else None
        self._unstored: dict[bytes, int] = {}
        self._passed = 0  # bytes of files whose CRC-32s are not stored yet
        self._looked_up = range(0)
        self._keys: dict[int, bytes] = {}  # those of the files whose CRC-32s have been looked up last

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of a span. Raises `TransferAborted` if a file is not that which was described."""
        span = ByteRange(0, self._layout.size) if span is None else span
        async with aclosing(self._batches(span, is_lending=False)) as batches:
            async for batch in batches:
                for piece in batch:
                    assert not isinstance(piece, tuple)
                    yield bytes(piece)  # the memory of a batch is used again

    def pieces(self, span: ByteRange) -> AsyncGenerator[Sequence[Piece], None]:
        """Yield the pieces of a span: see `InPieces`. A local file that need not be read for its CRC-32 is lent.

        There are none if the span does not begin in a local file.
        """
        return self._batches(span, is_lending=True)

    async def _batches(self, span: ByteRange, *, is_lending: bool) -> AsyncGenerator[Sequence[Piece], None]:
        items, crcs, layout, many = self._items, self._crcs, self._layout, self._many
        is_first = True
        batch = _Batch(is_lending=is_lending)
        try:
            for index in chain[int | None](layout.members_in(span), (None,)):
                if index is not None:
                    if index not in self._looked_up:
                        await self._look_up(index)
                    start, stop = layout.place(index)
                    if span.start <= start and stop <= span.stop and self._add_member(index, batch):
                        is_first = is_first and not items[index].size
                        if batch.is_full:
                            yield batch.take()
                            await batch.release()
                        if self._passed >= _NOTED:
                            await self._store()
                        continue
                pieces = layout.pieces_at_end(span, crcs) if index is None else layout.pieces_of(index, span, crcs)
                for piece in pieces:
                    if isinstance(piece, bytes):
                        batch.add(piece)
                    elif isinstance(piece, Checked):
                        if not await self._is_known(piece.index):
                            if batch.length:
                                yield batch.take()  # the client need not wait for these
                                await batch.release()
                            await self._read(piece.index)
                        batch.add(self._layout.checked(piece, self._crcs[piece.index]))
                    else:
                        number, part = piece.index, piece.span
                        item, length = items[number], part.stop - part.start
                        is_whole = length == item.size
                        is_lent = is_lending and length > SMALL and (number in crcs or not is_whole)
                        local: OpenLocalFile | None = None
                        if is_lent or length <= CHUNK_SIZE:
                            if many is not None and item.source_name and item.version is not None:
                                local = many.open_nowait(item.source_name, item.size, item.version)
                            else:
                                opened = open_nowait(await self._find(number), GET)
                                local = None if opened is None else local_of(opened)
                                if opened is not None and local is not None and not _is_same(item, opened.metadata):
                                    local.close()
                                    raise self._has_changed(number)
                        if local is None:
                            if is_lending and is_first and not await self._is_local(number):
                                return
                            async with self._opened(number, GET if is_whole else _request_for(part)) as opened:
                                local = local_of(opened)
                                if is_lent and local is not None:
                                    batch.lend(local.shared(), part)
                                else:
                                    async with aclosing(self._content(opened, piece)) as chunks:
                                        async for chunk in chunks:
                                            batch.add(chunk)
                                            if batch.is_full:
                                                yield batch.take()
                                                await batch.release()
                        elif is_lent:
                            batch.lend(local, part)
                        else:
                            with closing(local):
                                batch.add(await self._content_of_small(local, piece))
                        is_first = False
                        if self._passed >= _NOTED:
                            await self._store()
                    if batch.is_full:
                        yield batch.take()
                        await batch.release()
            if batch.length:
                yield batch.take()
                await batch.release()
        except (DownloadError, OSError) as exc:
            self._laid_out.is_stale = True  # a file may have changed: the next request looks at the folder again
            if isinstance(exc, FileMissing | AccessDenied):  # it was a file when the archive was laid out
                raise TransferAborted(str(exc), reason="file-changed") from exc
            if isinstance(exc, DownloadError):
                raise
            raise TransferAborted(f"reading a file for the archive failed: {exc}") from exc
        finally:
            with anyio.CancelScope(shield=True):
                await batch.close()
                await self._store()

    def _add_member(self, index: int, batch: "_Batch") -> bool:
        """Add a whole folder or local file; return whether that needs no waiting, and the file has not changed."""
        item, header = self._items[index], self._layout.header(index)
        if not item.size:
            batch.add(header)
            return True
        size, crc = item.size, self._crcs.get(index)
        is_lent = batch.is_lending and size > SMALL and crc is not None
        if self._many is None or not item.source_name or item.version is None or not (is_lent or size <= CHUNK_SIZE):
            return False
        file = self._many.open_nowait(item.source_name, size, item.version)
        if file is None:
            return False
        if crc is not None and is_lent:
            batch.add(header)
            batch.lend(file, ByteRange(0, size))
        else:
            with closing(file):
                memory = batch.space(len(header) + size)
                content = memory[len(header) :]
                if file.read_into(content, 0) != size or not file.is_same():
                    return False
                memory[: len(header)] = header
                batch.fill(len(memory))
                if crc is None:
                    crc = crc32(content)
                    self._note(index, crc)
        batch.add(self._layout.descriptor(index, crc))
        return True

    async def _is_local(self, index: int) -> bool:
        """Return whether a file may have a local file with its bytes, as far as that is known before it is opened."""
        location = (await self._find(index)).location
        return location is not None and os.path.isabs(location)

    async def _content_of_small(self, local: OpenLocalFile, piece: Content) -> bytes:
        """Return a short span of a local file."""
        index, span = piece.index, piece.span
        content = await local.read(span)
        if len(content) < len(span) or not local.is_same():
            raise self._has_changed(index)
        if index not in self._crcs and len(span) == self._items[index].size:
            self._note(index, crc32(content))
        return content

    async def _content(self, opened: OpenFile, piece: Content) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a span of a file, and compute its CRC-32 if that is not known and all bytes pass."""
        index, span = piece.index, piece.span
        is_whole = len(span) == self._items[index].size
        is_computed = is_whole and index not in self._crcs
        left, crc = len(span), 0
        # generated content can only be read from its beginning
        skipped = 0 if is_whole or opened.metadata.accept_ranges else span.start
        async with closing_stream(opened.stream(None if is_whole or skipped else span)) as chunks:
            async for received in chunks:
                chunk = received[skipped : skipped + left]
                skipped -= min(skipped, len(received))
                left -= len(chunk)
                if is_computed:
                    crc = crc32(chunk, crc)
                yield chunk
                if not left:
                    break
        if left:
            raise TransferAborted(
                f"{self._items[index].name!r} ended {left} bytes before its end", reason="file-changed"
            )
        if is_computed:
            self._note(index, crc)

    async def _find(self, index: int) -> AsyncFile:
        return await _find(self._items[index], self._laid_out.source)

    def _has_changed(self, index: int) -> TransferAborted:
        name = self._items[index].name
        return TransferAborted(f"{name!r} has changed since the archive was laid out", reason="file-changed")

    @asynccontextmanager
    async def _opened(self, index: int, request: DownloadRequest) -> AsyncIterator[OpenFile]:
        """Give the open file. Raises `TransferAborted` if it is not the version in the layout."""
        item = self._items[index]
        async with (await self._find(index)).open(request) as opened:
            if not _is_same(item, opened.metadata):
                raise self._has_changed(index)
            yield opened

    def _note(self, index: int, crc: int) -> None:
        self._crcs[index] = crc
        self._passed += self._items[index].size
        if (key := self._keys.get(index) or self._key(index)) is not None:
            self._unstored[key] = crc

    async def _store(self) -> None:
        self._passed = 0
        if self._unstored:
            unstored, self._unstored = self._unstored, {}
            await self._knowledge.checksums.put(unstored)

    def _key(self, index: int) -> bytes | None:
        """Return the key of a file in the `Checksums`; None for a file that may change without a sign."""
        item = self._items[index]
        return self._knowledge.key(item.source_name or item.name, item.version, item.size) if item.version else None

    async def _look_up(self, index: int) -> None:
        """Look up the CRC-32s of a file and of those after it."""
        if index in self._looked_up:
            return
        self._looked_up = range(index, min(index + _LOOKED_UP, len(self._items)))
        self._keys = {
            each: key
            for each in self._looked_up
            if each not in self._crcs and has_checksum(self._items[each]) and (key := self._key(each)) is not None
        }
        if self._keys:
            known = await self._knowledge.checksums.get(list(self._keys.values()))
            self._crcs.update({each: known[key] for each, key in self._keys.items() if key in known})

    async def _is_known(self, index: int) -> bool:
        if index not in self._crcs:
            await self._look_up(index)
        return index in self._crcs

    async def _read(self, index: int) -> None:
        """Read a file for its CRC-32 alone, or wait until another range has."""
        key = self._key(index)
        async with _one_at_a_time(self._knowledge.reading, key):
            if key is not None and (known := await self._knowledge.checksums.get([key])):
                self._crcs[index] = known[key]
                return
            with await self._knowledge.readers.take():
                begun = _Begun() if key is None else self._knowledge.begun.pop(key, _Begun())
                try:
                    async with self._opened(index, GET) as opened:
                        self._note(index, await _crc_of(opened, self._items[index].size, begun))
                except anyio.get_cancelled_exc_class():
                    if key is not None:
                        self._knowledge.keep(key, begun)  # the client has given up: the next one goes on from here
                    raise
            await self._store()


class _Batch:
    """The pieces that are yielded next. Their memory is used again, and their files are closed, when it is released."""

    __slots__ = ("_begin", "_enough", "_files", "_filled", "_memory", "_pieces", "_sum", "is_lending")

    def __init__(self, *, is_lending: bool) -> None:
        self.is_lending = is_lending
        self._enough = _ENOUGH_LENT if is_lending else _ENOUGH
        self._memory = memoryview(mmap(-1, _ENOUGH_LENT + CHUNK_SIZE))  # the kernel gives what is used of it
        self._pieces: list[Piece] = []
        self._files: list[OpenLocalFile] = []
        self._sum = 0  # bytes of the pieces
        self._begin = self._filled = 0  # what of the memory is the next piece

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return self._sum + self._filled - self._begin

    @property
    def is_full(self) -> bool:
        """Whether the batch has to be yielded now."""
        return self._sum + self._filled - self._begin >= self._enough or len(self._files) >= _LENT

    def add(self, content: bytes) -> None:
        """Add bytes. Many are a piece alone, but a server that takes no files should not get few bytes before them."""
        length, start = len(content), self._filled
        if length <= SMALL or (self.length and not self.is_lending and length <= CHUNK_SIZE):
            self._filled = stop = start + length
            self._memory[start:stop] = content
        else:
            self._end_piece()
            self._pieces.append(content)
            self._sum += length

    def space(self, length: int) -> memoryview:
        """Return the memory in which the next bytes have to be, at most `CHUNK_SIZE` of them: see `fill`."""
        return self._memory[self._filled : self._filled + length]

    def fill(self, length: int) -> None:
        """Add the bytes that have been written into the `space`."""
        self._filled += length

    def lend(self, file: OpenLocalFile, span: ByteRange) -> None:
        """Add a span of a file, which is closed with the batch."""
        self._end_piece()
        self._files.append(file)
        self._pieces.append((file, span))
        self._sum += span.stop - span.start

    def take(self) -> Sequence[Piece]:
        """Return the pieces, and begin anew."""
        self._end_piece()
        pieces, self._pieces, self._sum = self._pieces, [], 0
        self._begin = self._filled = 0
        return pieces

    async def release(self) -> None:
        """Close the files, which have been sent. Raises `TransferAborted` if one has changed meanwhile."""
        for file in self._files:
            if not file.is_same():
                raise TransferAborted(REWRITTEN, reason="file-changed")
        await self.close()

    async def close(self) -> None:
        """Close the files, whether they have been sent or not."""
        while self._files:
            file = self._files.pop()
            if file.is_quick:
                file.close()
            else:
                await file.aclose()

    def _end_piece(self) -> None:
        if self._begin < self._filled:
            self._pieces.append(self._memory[self._begin : self._filled])
            self._sum += self._filled - self._begin
            self._begin = self._filled


async def _batches_of(source: SupportsListing, folder: str) -> AsyncIterator[Sequence[Version]]:
    """Yield the entries of a folder."""
    batches = source.list_versions(folder) if isinstance(source, HasManyFiles) else None
    if batches is not None:
        async with closing_entries(batches):
            async for batch in batches:
                yield batch
        return
    async with closing_entries(source.list(folder)) as entries:
        async for entry in entries:
            size, version = entry.identity() if isinstance(entry, DescribedEntry) else (None, None)
            modified = None if entry.modified is None else int(entry.modified.timestamp() // 1)
            yield ((entry.name, entry.is_folder, size, modified, version),)


@asynccontextmanager
async def _one_at_a_time(locks: dict[Key, anyio.Lock], key: Key) -> AsyncIterator[None]:
    """Wait until nobody else does this for the key. A lock is kept only while it is used, so each loop has its own."""
    lock = locks.setdefault(key, anyio.Lock())
    try:
        async with lock:
            yield
    finally:
        if not lock.locked() and locks.get(key) is lock:
            del locks[key]


async def _crc_of(opened: OpenFile, size: int, begun: _Begun) -> int:
    """Return the CRC-32 of a file, which has been read as far as `begun` says.

    Raises `TransferAborted` if it is shorter than `size`.
    """
    local = local_of(opened)
    while local is not None and begun.position < size:
        length = min(_READ, size - begun.position)
        crc, count = await local.workers.run(
            _crc_of_span, local, begun.position, length, begun.crc, patience=MID_TRANSFER
        )
        if not count or local.is_rewritten():
            raise TransferAborted("a file changed while it was read for its CRC-32", reason="file-changed")
        begun.crc, begun.position = crc, begun.position + count
    if local is None:
        if not opened.metadata.accept_ranges:  # it can only be read from its beginning
            begun.crc = begun.position = 0
        async with closing_stream(opened.stream(ByteRange(begun.position, size) if begun.position else None)) as chunks:
            async for chunk in chunks:
                begun.crc, begun.position = crc32(chunk, begun.crc), begun.position + len(chunk)
    if begun.position != size:
        raise TransferAborted("a file changed while it was read for its CRC-32", reason="file-changed")
    return begun.crc


def _crc_of_span(local: OpenLocalFile, position: int, length: int, crc: int) -> tuple[int, int]:
    """Return the CRC-32 that continues with a span, and how many bytes of it there are. Runs in a worker thread."""
    count = 0
    while count < length and (chunk := os.pread(local.descriptor, min(1 << 20, length - count), position + count)):
        crc = crc32(chunk, crc)
        count += len(chunk)
    return crc, count


async def _laid_out(items: list[_Item], source: Source | None, limits: ArchiveLimits) -> _LaidOut:
    """Return the archive of these items. Raises `ArchiveTooLarge`."""
    _check(len(items), limits.files, "files and folders")
    await _describe(items, source)
    if len(items) < _MANY:
        return _arranged(items, source, limits)
    return await anyio.to_thread.run_sync(_arranged, items, source, limits, limiter=unlimited())


def _arranged(items: list[_Item], source: Source | None, limits: ArchiveLimits) -> _LaidOut:
    """Return the archive of items that have been described. Raises `ArchiveTooLarge`."""
    names = distinct_names([safe_name(item.name) for item in items])
    kept: dict[str, _Item] = {}
    digest = blake2b(digest_size=16)
    is_pinned = True
    for item, name in zip(items, names, strict=True):
        if name in kept:
            continue  # the same folder again
        kept[name] = item
        item.name = name
        is_pinned = is_pinned and (bool(item.version) or not item.size)
        digest.update(f"{name}\0{item.size}\0{item.modified}\0{item.mode}\0{item.version}\0".encode())
    members = list(kept.values())
    try:
        layout = ZipLayout(members)
    except ValueError as exc:
        raise ArchiveTooLarge(str(exc), "a path would be too long") from exc
    _check(layout.size, limits.size, "bytes")
    metadata = FileMetadata(
        size=layout.size,
        etag=ETag(f"zip{LAYOUT}-{digest.hexdigest()}") if is_pinned else None,
        content_type=CONTENT_TYPE,
        accept_ranges=is_pinned,
        headers=(("cache-control", "no-cache"),),  # a cache asks each time whether the folder has changed
    )
    return _LaidOut(members, source, layout, metadata, {})


def _is_same(item: _Item, metadata: FileMetadata) -> bool:
    return metadata.size == item.size and metadata.version == item.version


async def _find(item: _Item, source: Source | None) -> AsyncFile:
    if item.file is not None:
        return item.file
    assert source is not None
    return await source.resolve(item.source_name)


async def _describe(
    items: list[_Item], source: Source | None, is_needed: Callable[[_Item], bool] = lambda item: True
) -> None:
    """Open each file that has not been described, and describe it.

    A file that does not exist or may not be read is dropped from the items, unless it is needed. Raises `FileError`.
    """
    pending = iter([item for item in items if item.version is None])
    missing: list[_Item] = []
    failures: list[Exception] = []

    async def work() -> None:
        try:
            for item in pending:
                try:
                    async with (await _find(item, source)).open(HEAD) as opened:
                        item.describe(opened.metadata.size, opened.metadata.version)
                        if item.modified is None:
                            item.modified = opened.metadata.last_modified
                except (FileMissing, AccessDenied):
                    if is_needed(item):
                        raise
                    missing.append(item)
        except Exception as exc:  # raised as it is, and not in a group
            failures.append(exc)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(_DESCRIBED):
            group.start_soon(work)
    if failures:
        raise failures[0]
    if missing:
        items[:] = [item for item in items if item.version is not None]


def _has_versions(tree: _Tree) -> bool:
    """Return whether the listings tell the version of each file, so that each change of a file changes the tree."""
    return all(is_folder or version is not None for entries in tree.values() for _, is_folder, _, _, version in entries)


def _request_for(span: ByteRange) -> DownloadRequest:
    return DownloadRequest(range=f"bytes={span.start}-{span.stop - 1}")


def _check(number: int, limit: int | None, what: str) -> None:
    if limit is not None and number > limit:
        raise ArchiveTooLarge(
            f"an archive of {number} or more {what}", f"it would have more than {limit} {what}, the limit"
        )
