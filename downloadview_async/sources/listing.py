"""`Entry`: one file or one folder in the listing of a folder. `closing_entries` closes a listing that is left early."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

from downloadview_async.http.metadata import FileMetadata


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or one folder, as `SupportsListing.list` yields it.

    name: the last segment of its path, without a slash. is_folder: whether it can be listed in turn. size: in bytes;
    None if it is not known. modified: with a time zone; None if it is not known. content_type: the media type that the
    source stores with the file; None if it stores none. describe: returns the metadata that opening the file now would
    give, as far as they tell its version, without any I/O; None if the file has to be opened for them.
    """

    name: str
    is_folder: bool = False
    size: int | None = None
    modified: datetime | None = None
    content_type: str | None = None
    describe: Callable[[], FileMetadata] | None = field(default=None, repr=False, compare=False)


@asynccontextmanager
async def closing_entries(entries: AsyncIterator[Entry]) -> AsyncIterator[AsyncIterator[Entry]]:
    """Give what `SupportsListing.list` has returned, and close it at the end if it has `aclose`, as a generator has."""
    try:
        yield entries
    finally:
        if (close := getattr(entries, "aclose", None)) is not None:
            await close()
