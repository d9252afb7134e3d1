"""Which entries of a folder a listing shows: reads them in batches, leaves out what is hidden, and searches below."""

import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from anyio.lowlevel import checkpoint

from downloadview_async.asgi.listing.order import Window
from downloadview_async.asgi.listing.query import ListingQuery
from downloadview_async.errors import AccessDenied, FileError, FileMissing
from downloadview_async.policy.hiding import Hidden
from downloadview_async.sources.base import IdentifiesFolders, ListsBatches, SupportsListing
from downloadview_async.sources.listing import Entry, closing_entries

BATCH = 125
"""Entries that are treated before other requests get their turn."""

PAGE_SIZE = 500
"""Entries of a page."""

MAX_DEEP_FOLDERS = 1000
"""Folders that a search below a folder reads."""

MAX_DEEP_ENTRIES = 100_000
"""Entries that a search below a folder looks at."""

MAX_DESCRIBED = 5000
"""Entries up to which each is described for a page in the order of names, so that it has the total size."""

NEIGHBOURS = 100
"""Files on each side of one among which the previous and the next that can be read are searched for."""

_NOT_NAMES = frozenset({"", ".", ".."})
_BAD_CHARACTER = re.compile(r"[/\x00-\x1f\x7f\ud800-\udfff]")
_BAD_IN_LINES = re.compile(r"[/\x00-\x09\x0b-\x1f\x7f\ud800-\udfff]")  # all but the line feed between them


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some entries and their paths below the folder.

    is_described: whether sizes and times are among them. is_cut: whether a search below has ended at its limits.
    """

    paths: list[str]
    entries: list[Entry]
    is_described: bool = True
    is_cut: bool = False

    @classmethod
    def of(cls, prefix: str, entries: list[Entry], text: str, *, is_described: bool) -> "_Batch":
        """Return the batch of the entries of a folder whose names contain a text."""
        if text:
            folded = text.casefold()
            entries = [entry for entry in entries if folded in entry[0].casefold()]
        paths = [prefix + entry[0] for entry in entries] if prefix else [entry[0] for entry in entries]
        return cls(paths, entries, is_described)


async def _in_batches(
    source: SupportsListing, folder: str, described: int | None
) -> AsyncGenerator[Sequence[Entry], None]:
    """Yield the entries of a folder in lists; see `ListsBatches`."""
    if isinstance(source, ListsBatches):
        async with closing_entries(source.list_batches(folder, described=described)) as batches:
            async for batch in batches:
                yield batch
        return
    async with closing_entries(source.list(folder)) as entries:
        listed: list[Entry] = []
        async for entry in entries:
            listed.append(entry)
            if len(listed) == BATCH:
                yield listed
                listed = []
        yield listed


@dataclass(frozen=True, slots=True)
class FolderEntries:
    """The entries of the folders of a source that may be shown.

    hidden: which names are left out, if any. may_enter: returns whether a search below may read a folder, by its name
    with a slash at its end; None: each.
    """

    source: SupportsListing
    hidden: Hidden | None = None
    may_enter: Callable[[str], Awaitable[bool]] | None = None

    async def has(self, folder: str) -> bool:
        """Return whether the source has a folder, and may read it. Raises `SourceUnavailable` and `UpstreamError`."""
        try:
            async with closing_entries(self.source.list(folder)) as entries:
                async for _ in entries:
                    break
        except (FileMissing, AccessDenied):
            return False
        return True

    async def files(self, folder: str) -> AsyncGenerator[str, None]:
        """Yield the name of each file in a folder that is listed. Raises what `SupportsListing.list` raises."""
        async with aclosing(self.batches(folder, ListingQuery(), described=0)) as batches:
            async for batch in batches:
                for entry in batch.entries:
                    if not entry.is_folder:
                        yield entry.name

    async def window(self, folder: str, query: ListingQuery) -> Window:
        """Return the entries of a page. Of a large folder, only those of the page are described, if that suffices.

        To describe each file takes most of the time. Raises what `SupportsListing.list` raises.
        """
        window = Window(query, PAGE_SIZE)
        described = MAX_DESCRIBED if query.sort in ("name", "type") else None
        async with aclosing(self.batches(folder, query, described=described)) as batches:
            async for batch in batches:
                window.add(batch.paths, batch.entries)
                window.is_cut = window.is_cut or batch.is_cut
                window.has_sizes = window.has_sizes and (batch.is_described or not batch.entries)
        if not window.has_sizes:
            await self._complete(window, folder)
        return window

    async def neighbours(self, folder: str, name: str) -> tuple[str | None, str | None]:
        """Return the names of the files before and after one, in natural order, of those that can be read.

        Raises what `SupportsListing.list` raises.
        """
        place = f"f,,{name}"
        before = Window(ListingQuery(before=place), NEIGHBOURS)
        after = Window(ListingQuery(after=place), NEIGHBOURS)
        async with aclosing(self.batches(folder, ListingQuery(), described=0)) as batches:
            async for batch in batches:
                files = [entry for entry in batch.entries if not entry.is_folder]
                names = [entry.name for entry in files]
                before.add(names, files)
                after.add(names, files)
        previous = [name for name, _ in reversed(before.entries)]
        following = [name for name, _ in after.entries]
        if isinstance(self.source, ListsBatches):  # its names are also those of files that cannot be read
            described = await self.source.describe(folder, [*previous, *following])
            readable = {entry.name for entry in described}
            previous = [name for name in previous if name in readable]
            following = [name for name in following if name in readable]
        return next(iter(previous), None), next(iter(following), None)

    async def batches(
        self, folder: str, query: ListingQuery, *, described: int | None = None
    ) -> AsyncGenerator[_Batch, None]:
        """Yield the entries in batches of at most `BATCH`.

        described: after so many entries, the others have no sizes and times if that saves time.

        Raises what `SupportsListing.list` raises.
        """
        top = folder.strip("/")
        left = deque([""])  # paths of folders below the top, each with a slash at its end
        searched: set[Hashable] = set()
        read_folders = read_entries = 0
        while left:
            if read_folders >= MAX_DEEP_FOLDERS:
                yield _Batch([], [], is_cut=True)
                return
            prefix = left.popleft()
            read_folders += 1
            below: list[str] = []
            more = None if described is None else max(described - read_entries, 0)
            read_here = 0
            path = f"{top}/{prefix}".strip("/")
            try:
                if prefix and self.may_enter is not None and not await self.may_enter(f"{path}/"):
                    continue
                if query.is_deep and not await self._is_new(path, searched):
                    continue
                async with aclosing(_in_batches(self.source, path, more)) as batches:
                    async for batch in batches:
                        is_described = more is None or read_here < more or not isinstance(self.source, ListsBatches)
                        read_here += len(batch)
                        for start in range(0, len(batch) or 1, BATCH):
                            shown = self._shown(batch[start : start + BATCH])
                            if query.is_deep:
                                below += [f"{prefix}{entry.name}/" for entry in shown if entry.is_folder]
                            yield _Batch.of(prefix, shown, query.text, is_described=is_described)
                            await checkpoint()
                        if query.is_deep and read_entries + read_here >= MAX_DEEP_ENTRIES:
                            yield _Batch([], [], is_cut=True)
                            return
            except FileError as exc:
                if not prefix or exc.status >= 500:
                    raise  # any other folder was removed meanwhile, or may not be read
            read_entries += read_here
            left.extend(sorted(below))  # so that of two paths to one folder, always the same one is searched

    async def _is_new(self, folder: str, searched: set[Hashable]) -> bool:
        """Return whether a folder is none of those that have been searched, and note it. Raises what `list` raises."""
        if not isinstance(self.source, IdentifiesFolders):
            return True
        identity = await self.source.folder_identity(folder)
        is_new = identity is None or identity not in searched
        searched.add(identity)
        return is_new

    async def _complete(self, window: Window, folder: str) -> None:
        """Describe the entries of a page, folder by folder. Those that do not exist any more are dropped."""
        source, top = self.source, folder.strip("/")
        assert isinstance(source, ListsBatches)
        by_prefix: dict[str, list[str]] = {}
        for path, entry in window.entries:
            by_prefix.setdefault(path.removesuffix(entry.name), []).append(entry.name)
        described: dict[str, Entry] = {}
        for prefix, names in by_prefix.items():
            try:
                entries = await source.describe(f"{top}/{prefix}".strip("/"), names)
            except FileError as exc:
                if not prefix or exc.status >= 500:
                    raise
                continue
            described |= {prefix + entry.name: entry for entry in entries}
        window.complete(described)

    def _shown(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries whose names can be in a URL, and are not hidden."""
        names = [entry[0] for entry in entries]
        lines = "\n".join(names)  # one search for all of them takes a fifth of the time
        if lines.count("\n") >= len(names) or _BAD_IN_LINES.search(lines) or not _NOT_NAMES.isdisjoint(names):
            entries = [entry for entry in entries if entry[0] not in _NOT_NAMES and not _BAD_CHARACTER.search(entry[0])]
        if self.hidden is None:
            return list(entries)
        if "\\" in lines:
            return [entry for entry in entries if not self.hidden.hides(entry.name)]
        matches = self.hidden.matches  # takes a third of the time of `hides`
        return [entry for entry in entries if matches(entry[0]) is None]
