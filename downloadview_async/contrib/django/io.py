"""File objects that read from an iterator: `TextIteratorIO` and `BytesIteratorIO`."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from django.utils.encoding import force_bytes, force_str


class _IteratorIO:
    """Shared by `TextIteratorIO` and `BytesIteratorIO`: reads from an iterator, and consumes no more than needed."""

    _empty: Any
    _newline: Any
    _convert: Callable[[Any], Any]

    def __init__(self, iterator: Iterable[Any]) -> None:
        self._iterator = iter(iterator)
        self._left = self._empty

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return False: an iterator cannot go back."""
        return False

    def close(self) -> None:
        """Close the file and its iterator. A generator ends at its current `yield`."""
        if (close := getattr(self._iterator, "close", None)) is not None:
            close()
        super().close()  # type: ignore[misc]

    def read(self, size: int | None = None, /) -> Any:
        """Return `size` bytes or characters, fewer only at the end. Without a size, return the rest."""
        pieces, wanted = [], -1 if size is None or size < 0 else size
        while wanted and self._fill():
            piece = self._left if wanted < 0 else self._left[:wanted]
            pieces.append(piece)
            self._left = self._left[len(piece) :]
            wanted = wanted if wanted < 0 else wanted - len(piece)
        return self._empty.join(pieces)

    def readline(self, size: int | None = None, /) -> Any:
        """Return the next line with its line end, which the last line may lack: at most `size` bytes or characters."""
        pieces, wanted = [], -1 if size is None or size < 0 else size
        while wanted and self._fill():
            end = self._left.find(self._newline) + 1 or len(self._left)
            piece = self._left[: end if wanted < 0 else min(end, wanted)]
            pieces.append(piece)
            self._left = self._left[len(piece) :]
            wanted = wanted if wanted < 0 else wanted - len(piece)
            if piece.endswith(self._newline):
                break
        return self._empty.join(pieces)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not (line := self.readline()):
            raise StopIteration
        return line

    def _fill(self) -> bool:
        while not self._left:
            try:
                self._left = self._convert(next(self._iterator))
            except StopIteration:
                return False
        return True


class TextIteratorIO(_IteratorIO, io.TextIOBase):
    """A text file that reads from an iterator of text or bytes (UTF-8)."""

    _empty, _newline, _convert = "", "\n", staticmethod(force_str)


class BytesIteratorIO(_IteratorIO, io.RawIOBase):
    """A binary file that reads from an iterator of bytes or text (encoded as UTF-8)."""

    _empty, _newline, _convert = b"", b"\n", staticmethod(force_bytes)
