"""`Entry`: one file or one folder in the listing of a folder. `accepted_entries` checks what other code lists."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import NamedTuple, TypeAlias, TypeVar

from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.names import Names, canonical_folder, entry_check


class Entry(NamedTuple):
    """One file or one folder, as `SupportsListing.list` yields it.

    name: the last segment of its path, without a slash. is_folder: whether it can be listed in turn. size: in bytes;
    None if it is not known. modified: with a time zone; None if it is not known. content_type: the media type that the
    source stores with the file; None if it stores none.
    """

    name: str
    is_folder: bool = False
    size: int | None = None
    modified: datetime | None = None
    content_type: str | None = None


class DescribedEntry(Entry):
    """An entry of a source that knows the version of a file when it lists it, so that it need not be opened for that.

    describe: returns the size and the validators that opening the file now would give, without any I/O.
    """

    describe: Callable[[], FileMetadata]

    def identity(self) -> tuple[int | None, str]:
        """Return the size and the version (`FileMetadata.version`), which `describe` tells too."""
        metadata = self.describe()
        return metadata.size, metadata.version

    @classmethod
    def of(cls, entry: Entry, describe: Callable[[], FileMetadata]) -> "DescribedEntry":
        """Return the entry, with this function."""
        described = cls(*entry)
        described.describe = describe
        return described


Version: TypeAlias = tuple[str, bool, int | None, int | None, str | None]
"""An entry for an archive: its name, whether it is a folder, its size, its time, and its `FileMetadata.version`.

The time is in whole seconds since the epoch, UTC. The version of a file is None if it has to be opened for that.
"""

T = TypeVar("T")


def aware_time(text: str) -> datetime:
    """Return a time of ISO 8601 with a time zone, in UTC. Raises `ValueError` for any other text."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    try:
        return time.astimezone(UTC)
    except OverflowError:  # a day before the year 1, or after 9999
        raise ValueError(f"{text!r} is out of range") from None


@asynccontextmanager
async def closing_entries(entries: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Give what `SupportsListing.list` has returned, and close it at the end if it has `aclose`, as a generator has."""
    try:
        yield entries
    finally:
        if (close := getattr(entries, "aclose", None)) is not None:
            await close()


async def accepted_entries(
    list_folder: Callable[[str], AsyncIterator[Entry]], names: Names, folder: str = "", /
) -> AsyncIterator[Entry]:
    """Yield what a function lists, without the entries whose names a source refuses: see `SupportsListing`."""
    folder = canonical_folder(folder, names)
    is_valid = entry_check(folder, names)
    async with closing_entries(list_folder(folder)) as entries:
        async for entry in entries:
            if is_valid(entry.name):
                content_type = valid_content_type(entry.content_type)
                yield entry if content_type == entry.content_type else entry._replace(content_type=content_type)
