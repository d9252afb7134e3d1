"""`Dechunker`: decodes a body that is sent in chunks [RFC 9112 7.1]. Nothing here does I/O."""

import re

from downloadview_async.errors import UpstreamError

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00\r\n]*)?")
_MAX_LINE = 4096  # bytes: the size of a chunk with its extensions, or a field of the trailer
_MAX_TRAILER = 64 * 1024  # bytes


class Dechunker:
    """Gets the bytes of a connection as they arrive, and returns those of the body. Trailer fields are dropped.

    is_complete: whether the body has ended. rest: the bytes that have come after its end.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self.rest = b""
        self._held = b""
        """The beginning of a line."""
        self._left = 0
        """Bytes that are left of the current chunk."""
        self._expects = "size"
        self._trailer = 0

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of the body that are in `data`. Raises `UpstreamError` for an error in the framing."""
        if self._left > len(data):
            self._left -= len(data)
            return data
        pieces: list[bytes] = []
        data, self._held, place = self._held + data if self._held else data, b"", 0
        while not self.is_complete:
            if self._left:
                piece = data[place : place + self._left]
                place += len(piece)
                self._left -= len(piece)
                pieces.append(piece)
                if self._left:
                    break
            end = data.find(b"\r\n", place)
            if end < 0 or end - place > _MAX_LINE:
                self._held = data[place:]
                if len(self._held.removesuffix(b"\r")) > _MAX_LINE:
                    raise UpstreamError(f"the chunked body has a line of more than {_MAX_LINE} bytes")
                break
            self._take_line(data[place:end])
            place = end + 2
        if self.is_complete:
            self.rest = data[place:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_line(self, line: bytes) -> None:
        match self._expects:
            case "size":
                if (match := _SIZE_LINE.fullmatch(line)) is None:
                    raise UpstreamError(f"{line[:100]!r} is not the size of a chunk")
                self._left = int(match[1], 16)
                self._expects = "end" if self._left else "trailer"
            case "end":
                if line:
                    raise UpstreamError("a chunk is longer than its size")
                self._expects = "size"
            case _:
                self._trailer += len(line) + 2
                if self._trailer > _MAX_TRAILER:
                    raise UpstreamError(f"the trailer has more than {_MAX_TRAILER} bytes")
                self.is_complete = not line
