"""Which entries of a folder are on a page: `Window` takes any number of entries and keeps those of one page.

The whole folder is never sorted at once, and never kept. Each batch of entries is sorted into those that are kept, and
what is beyond the page is dropped. So a page costs the memory of a page, and no step holds up other requests for long.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

from downloadview_async.asgi.listing.query import MAX_TEXT, ListingQuery, Sort
from downloadview_async.http.content_types import content_type_for
from downloadview_async.sources.listing import Entry

_DIGITS = re.compile(r"([0-9]+)")
_SIZE = re.compile("-1|[0-9]{1,40}")  # a source may tell any number
_WIDTH = 20  # digits to which numbers are filled up with zeros, so that they compare like numbers
_LONG_AGO = datetime(1, 1, 1, tzinfo=UTC)

_Key = tuple[Any, ...]


def natural_keys(names: Sequence[str]) -> list[str]:
    """Return a key for each name, by which `file2` is before `File10`. The names have no line breaks.

    All names are treated in one text, which takes half the time.
    """
    if not names:
        return []
    parts = _DIGITS.split("\n".join(names).casefold())
    parts[1::2] = [number.zfill(_WIDTH) for number in parts[1::2]]
    return "".join(parts).split("\n")


def type_of(entry: Entry) -> str:
    """Return the media type of an entry without its parameters; the empty text for a folder."""
    if entry.is_folder:
        return ""
    return (entry.content_type or content_type_for(entry.name)).partition(";")[0].strip().lower()


def _modified_of(entry: Entry) -> datetime:
    return entry.modified or _LONG_AGO


def _size_of(entry: Entry) -> int:
    return -1 if entry.size is None else entry.size


def _size_at(text: str) -> int:
    """Return a size in a place, as `_size_of` gives it. Raises `ValueError` for any other text."""
    if _SIZE.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is not a size")
    return int(text)


@dataclass(frozen=True, slots=True)
class _Value:
    """The value by which entries are sorted, and its text in a place."""

    of: Callable[[Entry], Any]
    to_text: Callable[[Any], str] = str
    from_text: Callable[[str], Any] = str


_VALUES: dict[Sort, _Value | None] = {
    "name": None,
    "size": _Value(_size_of, from_text=_size_at),
    "modified": _Value(_modified_of, datetime.isoformat, datetime.fromisoformat),
    "type": _Value(type_of, quote, unquote),  # a source may tell a type with a comma, which ends the value in a place
}


class Window:
    """The entries of one page of a listing in their order. The entries are added in batches, in any order.

    limit: how many entries the page has at most.
    entries: those of the page, each with its path relative to the folder. files, folders, size: the totals of all
    entries that were added; `size` is in bytes, of the files whose size is known. preceding, following: how many
    entries are before and after the page.
    """

    def __init__(self, query: ListingQuery, limit: int) -> None:
        self.files = self.folders = self.size = 0
        self.has_sizes = True
        """Whether the entries that were added had their sizes."""
        self.is_cut = False
        """Whether a search has ended at its limits, so that entries may be missing."""
        self._limit = limit
        self._value = _VALUES[query.sort]
        self._reverse = query.is_descending
        self._after = self._key_at(query.after)
        self._before = self._key_at(query.before) if self._after is None else None
        self._beyond = 0  # entries on the other side of the place
        self._kept: list[_Key] = []
        self._complete: list[_Key] | None = None  # those of `_kept` that still exist

    @property
    def entries(self) -> list[tuple[str, Entry]]:
        """The entries of the page, each with its path."""
        return [(key[-3], key[-1]) for key in (self._kept if self._complete is None else self._complete)]

    @property
    def total(self) -> int:
        """How many entries were added."""
        return self.files + self.folders

    @property
    def preceding(self) -> int:
        """How many entries are before the page."""
        return self._beyond if self._before is None else self.total - self._beyond - len(self._kept)

    @property
    def following(self) -> int:
        """How many entries are after the page."""
        return self.total - self.preceding - len(self._kept)

    def add(self, paths: Sequence[str], entries: Sequence[Entry]) -> None:
        """Take a batch of entries and their paths."""
        keys = self._keys(paths, entries)
        before, after = self._before, self._after
        if after is not None:
            keys = [key for key in keys if (key[:-2] < after if self._reverse else key[:-2] > after)]
        elif before is not None:
            keys = [key for key in keys if (key[:-2] > before if self._reverse else key[:-2] < before)]
        self._beyond += len(entries) - len(keys)
        if len(self._kept) == self._limit and before is None:  # most entries of a large folder end here
            last = self._kept[-1]
            keys = [key for key in keys if (key > last if self._reverse else key < last)]
        if not keys:
            return
        self._kept = sorted(self._kept + keys, reverse=self._reverse)
        if len(self._kept) > self._limit:
            self._kept = self._kept[: self._limit] if before is None else self._kept[-self._limit :]

    def complete(self, described: Mapping[str, Entry]) -> None:
        """Replace the entries by those that are given by their paths. Those that are missing are dropped.

        The places stay, so that the pages after this one can be reached even if all of its entries are missing.
        """
        self._complete = [(*key[:-1], described[key[-3]]) for key in self._kept if key[-3] in described]

    def places(self) -> tuple[str | None, str | None]:
        """Return the places of the first and the last entry of the page; None for a page beyond all entries."""
        return (self._place_of(self._kept[0]), self._place_of(self._kept[-1])) if self._kept else (None, None)

    def _keys(self, paths: Sequence[str], entries: Sequence[Entry]) -> list[_Key]:
        """Return what the entries are sorted by: kind, value, natural name, path. Then follow a number and the entry.

        The number is there so that two entries are never compared.
        """
        numbers = range(self.total, self.total + len(entries))
        kinds = [entry.is_folder for entry in entries]
        folders = sum(kinds)
        self.folders += folders
        self.files += len(entries) - folders
        self.size += sum([entry.size for entry in entries if entry.size and not entry.is_folder])
        if not self._reverse:
            kinds = [not is_folder for is_folder in kinds]  # so that folders are first in both orders
        naturals = natural_keys(paths)
        if self._value is None:
            return list(zip(kinds, naturals, paths, numbers, entries, strict=True))
        values = [self._value.of(entry) for entry in entries]
        return list(zip(kinds, values, naturals, paths, numbers, entries, strict=True))

    def _place_of(self, key: _Key) -> str:
        """Return the place of an entry: its kind, the value by which it is sorted, and its path."""
        text = "" if self._value is None else self._value.to_text(key[1])
        return f"{'d' if key[0] is self._reverse else 'f'},{text},{key[-3]}"

    def _key_at(self, place: str | None) -> _Key | None:
        """Return the key of an entry without its last two items; None for a text that is not a place."""
        kind, _, rest = (place or "").partition(",")
        text, comma, path = rest.partition(",")
        if kind not in ("d", "f") or not comma or "\n" in path or len(path) > 4 * MAX_TEXT:
            return None
        head: tuple[Any, ...] = ((kind == "d") is self._reverse,)
        if self._value is not None:
            try:
                value = self._value.from_text(text)
            except ValueError:
                return None
            if isinstance(value, datetime) and value.tzinfo is None:
                return None
            head += (value,)
        return (*head, *natural_keys([path]), path)
