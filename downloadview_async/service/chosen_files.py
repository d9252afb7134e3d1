"""`ChosenFiles`: some files and directories, each under its name, as the folders and files of one source."""

import os
from collections.abc import AsyncIterator, Hashable, Sequence
from datetime import UTC, datetime

from downloadview_async import AsyncFile, ConfigurationError, Entry, FileError, FileMissing, PathSource


class ChosenFiles:
    """A source that has the given files and directories at its top, and nothing else.

    A file may be given by a link to it, wherever that leads.

    Raises `ConfigurationError` for a path that does not exist or whose name no URL can have, and for two with the same
    name.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._directories: dict[str, PathSource] = {}
        self._files: dict[str, PathSource] = {}
        for path in paths:
            parent, name = os.path.split(os.path.abspath(path))
            if name in self._directories or name in self._files:
                raise ConfigurationError(f"two of the paths have the name {name!r}: rename one, or leave it out")
            if os.path.isdir(path):
                source = self._directories[name] = PathSource(path, names="any")
            elif os.path.isfile(path):
                source = self._files[name] = PathSource(parent, names="any", symlinks="follow")
            else:
                raise ConfigurationError(f"{path!r} is neither a file nor a directory: correct it")
            self._canonical = source.canonical
            try:
                self._canonical(name)
            except FileMissing:
                raise ConfigurationError(f"no URL can have the name {name!r}: rename it") from None

    def canonical(self, name: str) -> str:
        """Return the one name for `./a//b`, `/a/b` and `a/b`. Raises `FileMissing` for a name no file can have."""
        return self._canonical(name)

    async def resolve(self, name: str) -> AsyncFile:
        """Return the file with a name, such as `notes.txt` or `photos/one.jpg`. Raises `FileMissing`."""
        first, slash, rest = self.canonical(name).partition("/")
        if slash and first in self._directories:
            return await self._directories[first].resolve(rest)
        if not slash and first in self._files:
            return await self._files[first].resolve(first)
        raise FileMissing(f"not one of the files that are served: {name!r}")

    def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Return the entries of a folder: see `SupportsListing`."""
        directory, rest = self._place_of(folder)
        return self._top() if directory is None else directory.list(rest)

    def list_batches(self, folder: str = "", /, *, described: int | None = None) -> AsyncIterator[Sequence[Entry]]:
        """Return the entries of a folder in batches, as `PathSource` does."""
        directory, rest = self._place_of(folder)
        return self._top_batch() if directory is None else directory.list_batches(rest, described=described)

    async def describe(self, folder: str, names: Sequence[str], /) -> Sequence[Entry]:
        """Return the entries of a folder with these names, as `PathSource` does."""
        directory, rest = self._place_of(folder)
        if directory is not None:
            return await directory.describe(rest, names)
        entries = {entry.name: entry async for entry in self._top()}
        return [entries[name] for name in names if name in entries]

    async def folder_identity(self, folder: str = "", /) -> Hashable:
        """Return a value that is equal for all paths of one folder, as `PathSource` does."""
        directory, rest = self._place_of(folder)
        return None if directory is None else await directory.folder_identity(rest)

    def _place_of(self, folder: str) -> tuple[PathSource | None, str]:
        """Return the source of a folder, or None for the top, and the name of the folder in it."""
        first, _, rest = "/".join(part for part in folder.split("/") if part not in ("", ".")).partition("/")
        if first and first not in self._directories:
            raise FileMissing(f"not one of the directories that are served: {folder!r}")
        return self._directories.get(first), rest

    async def _top_batch(self) -> AsyncIterator[Sequence[Entry]]:
        yield [entry async for entry in self._top()]

    async def _top(self) -> AsyncIterator[Entry]:
        for name in self._directories:
            yield Entry(name, is_folder=True)
        for name, source in self._files.items():
            try:
                async with (await source.resolve(name)).open() as opened:
                    metadata = opened.metadata
            except FileError:  # it has been removed, or nobody may read it
                continue
            modified = None if metadata.last_modified is None else datetime.fromtimestamp(metadata.last_modified, UTC)
            yield Entry(name, size=metadata.size, modified=modified)
