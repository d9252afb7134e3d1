"""Files with versions: which bytes a client may get, and when."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

OUTSIDE = b"no client may ever get this outside file\n"
"""What the files outside of all roots are made of."""


@lru_cache(32)
def content(name: str, number: int, size: int) -> bytes:
    """Return the bytes of a version: each line of 64 bytes names the file, the version and its place."""
    lines = [f"{name[-30:]:<30} {number:012d} {index:019d}\n" for index in range(size // 64 + 1)]
    return "".join(lines).encode()[:size]


def is_cleared(body: bytes, whole: bytes) -> bool:
    """Return whether bytes are the first ones of a content, but end with zeros, which no content has."""
    return whole.startswith(body.rstrip(b"\0")) and len(body) <= len(whole)


@dataclass(slots=True)
class Version:
    """A content that a file had from `born` to `died`. is_cut: it ended because the file was cut in place."""

    number: int
    size: int  # 0 and number 0: there was no such file
    born: float
    died: float = float("inf")
    is_cut: bool = False

    def lived(self, since: float, until: float) -> bool:
        """Return whether the file had this content at some time between."""
        return self.born <= until and self.died >= since


class Tree:
    """A directory whose files change. All times are monotonic."""

    def __init__(self, root: Path, sizes: dict[str, int]) -> None:
        self.root = root
        self._sizes = sizes
        self._number = 0
        self.versions: dict[str, list[Version]] = {name: [] for name in sizes}
        for name in sizes:
            self.replace(name)

    @property
    def names(self) -> list[str]:
        """The names of all files, those that are missing now too."""
        return list(self._sizes)

    def replace(self, name: str, *, size: int | None = None) -> None:
        """Give a file a new content by a rename."""
        self._number += 1
        size = self._sizes[name] if size is None else size
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.root.parent / f"{self.root.name}.new"
        new.write_bytes(content(name, self._number, size))
        self._begin(name, Version(self._number, size, time.monotonic()))
        new.rename(path)
        self._end_others(name)

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._begin(name, Version(0, 0, time.monotonic()))
        with contextlib.suppress(FileNotFoundError):
            (self.root / name).unlink()
        self._end_others(name)

    def resize(self, name: str, size: int) -> None:
        """Let a file grow, or cut it, in place."""
        old = self.versions[name][-1]
        if old.number == 0:
            return
        is_cut = size < old.size
        self._begin(name, Version(old.number, size, time.monotonic()))
        old.is_cut = old.is_cut or is_cut
        if is_cut:
            os.truncate(self.root / name, size)
        else:
            with (self.root / name).open("ab") as file:
                file.write(content(name, old.number, size)[old.size :])
        self._end_others(name)

    def _begin(self, name: str, version: Version) -> None:
        self.versions[name].append(version)

    def _end_others(self, name: str) -> None:
        for version in self.versions[name][:-1]:
            version.died = min(version.died, time.monotonic())
        del self.versions[name][:-40]

    def lived(self, name: str, since: float, until: float) -> list[Version]:
        """Return the contents that a file had between."""
        return [version for version in self.versions[name] if version.lived(since, until)]

    def was_missing(self, name: str, since: float, until: float) -> bool:
        """Return whether the file was missing at some time between."""
        return any(version.number == 0 for version in self.lived(name, since, until))

    def was_cut(self, name: str, since: float, until: float) -> bool:
        """Return whether the file was cut in place after `since`, as it was before `until`."""
        return any(version.is_cut for version in self.lived(name, since, until))

    def match(self, name: str, body: bytes, start: int, size: int, *, since: float, until: float) -> Version | None:
        """Return the newest version with these bytes from `start`, if the file had it and that size between."""
        return next(self.matches(name, body, start, size, since=since, until=until), None)

    def matches(
        self, name: str, body: bytes, start: int, size: int, *, since: float, until: float
    ) -> Iterator[Version]:
        """Yield all versions of which these bytes are, the newest one first: see `match`."""
        for version in reversed(self.lived(name, since, until)):
            if version.number and version.size == size:
                whole = content(name, version.number, version.size)
                if whole[start : start + len(body)] == body:
                    yield version
