"""`ZipLayout`: where each byte of a ZIP archive is, from the names, the sizes and the times of its files alone.

The files are stored without compression, so the length of the archive and the place of each file are known before any
file is read. The layout is a pure function: the same files give the same bytes in each process and after each restart.
The CRC-32 of a file is not part of it. It stands in 4 bytes of the data descriptor, which follows the file, and in 4
bytes of the central directory at the end. APPNOTE is https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
"""

import stat
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from struct import Struct, pack
from time import gmtime
from types import MappingProxyType

from downloadview_async.http.metadata import ByteRange

LAYOUT = 1
"""Part of the entity tag of an archive: increase it if the same members give other bytes than in an earlier version.

A download that began before an update of this library could otherwise be resumed with other bytes.
"""

_LOCAL_HEADER = Struct("<IHHHIIIIHH")
_DIRECTORY_ENTRY = Struct("<IHHHHIIIIHHHHHII")
_SAME_ENTRY = Struct("<IH10sIII4sHHHII")  # what is as in the local header stays as it is there
_DESCRIPTOR = Struct("<IIII")
_DESCRIPTOR_64 = Struct("<IIQQ")
_EXTRA = Struct("<HHBi")
_EXTRA_64 = 20  # bytes of the Zip64 field in a local header
_END = Struct("<IHHHHIIH")
_END_64 = Struct("<IQHHIIQQQQ")
_LOCATOR_64 = Struct("<IIQI")

_UNIX = 3 << 8  # "version made by": tells that the external attributes have a Unix mode
_VERSION, _VERSION_64 = 20, 45  # "version needed to extract", for folders and for Zip64
_UTF8, _HAS_DESCRIPTOR = 1 << 11, 1 << 3  # general purpose bit flags
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF  # these values mean: it is in the Zip64 field
_DOS_FOLDER = 0x10
_ORDINARY_FILE = (stat.S_IFREG | 0o644) << 16
_ORDINARY_FOLDER = (stat.S_IFDIR | 0o755) << 16 | _DOS_FOLDER
_DOS_FIRST = int(datetime(1980, 1, 1, tzinfo=UTC).timestamp())
_DOS_LAST = int(datetime(2107, 12, 31, 23, 59, 58, tzinfo=UTC).timestamp())

_ENTRIES_AT_ONCE = 500  # of the central directory
_NOTHING: Mapping[int, int] = MappingProxyType({})


@dataclass(slots=True)
class Member:
    """A file or a folder of an archive.

    name: its path, with `/` between the segments; that of a folder ends with `/`. size: bytes, 0 for a folder.
    modified: seconds since the epoch, UTC; None if unknown. mode: the permissions; None is 0o755 for a folder, and
    0o644 for a file.
    """

    name: str
    size: int = 0
    modified: int | None = None
    mode: int | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.name.endswith("/")


@dataclass(slots=True)
class Content:
    """A piece of an archive: a span of a file, which is not empty. index: that of the file's `Member`."""

    index: int
    span: ByteRange


@dataclass(slots=True)
class Checked:
    """A piece of an archive that needs the CRC-32 of a file: a span of a record.

    index: that of the file's `Member`. is_descriptor: whether the record is that of `ZipLayout.descriptor`, after the
    file, or that of `ZipLayout.entry`, in the central directory.
    """

    index: int
    span: ByteRange
    is_descriptor: bool


Piece = bytes | Content | Checked


class ZipLayout:
    """The layout of an archive with `members`, in their order. Names are taken as they are, and should be distinct.

    size: the length of the archive in bytes.

    Raises `ValueError` for a name that is empty or longer than 65,535 bytes of UTF-8.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._headers: list[bytes | None] = [None] * len(members)  # those that have been made
        self._offsets = array("Q")
        self._entries = array("Q")  # offsets of the entries of the central directory
        position = 0
        lengths = array("I")  # of the name and the extra field that both records of a member have
        for member in members:
            length = len(member.name.encode())
            if not 0 < length <= _MAX_16:
                raise ValueError(f"an archive has no place for a name of {length} bytes: {member.name[:80]!r}")
            if _has_extra(member.modified):
                length += _EXTRA.size
            self._offsets.append(position)
            lengths.append(length)
            size = member.size
            position += _LOCAL_HEADER.size + length + size
            if size >= _MAX_32:
                position += _EXTRA_64 + _DESCRIPTOR_64.size
            elif size:
                position += _DESCRIPTOR.size
        self._directory = position
        for index, length in enumerate(lengths):
            self._entries.append(position)
            position += _DIRECTORY_ENTRY.size + length
            if self._offsets[index] >= _MAX_32 or members[index].size >= _MAX_32:
                position += len(self._zip64_of_entry(index))
        self._end = position
        self._end_records = self._make_end_records()
        self.size = position + len(self._end_records)

    def pieces(self, span: ByteRange, crcs: Mapping[int, int] = _NOTHING) -> Iterator[Piece]:
        """Yield the pieces of a span of the archive, in order.

        crcs: the CRC-32s that are known by the time at which they are needed. The others are needed for `Checked`.
        """
        for index in self.members_in(span):
            yield from self.pieces_of(index, span, crcs)
        yield from self.pieces_at_end(span, crcs)

    def members_in(self, span: ByteRange) -> range:
        """Return the indexes of the members of which a span has bytes before the central directory."""
        first = _index_of(self._offsets, span.start) if span.start < self._directory else len(self.members)
        return range(first, bisect_left(self._offsets, span.stop, first))

    def place(self, index: int) -> tuple[int, int]:
        """Return where a member begins, with its header, and where it ends, with its descriptor."""
        following = index + 1
        return self._offsets[index], self._offsets[following] if following < len(self._offsets) else self._directory

    def pieces_of(self, index: int, span: ByteRange, crcs: Mapping[int, int] = _NOTHING) -> Iterator[Piece]:
        """Yield the pieces of one of `members_in` a span: see `pieces`."""
        member, position = self.members[index], self._offsets[index]
        header, described = self.header(index), _descriptor_length(member)
        content = position + len(header)
        end = content + member.size
        if (part := _within(span, position, len(header))) is not None:
            yield header[part.start : part.stop]
        if (part := _within(span, content, member.size)) is not None:
            yield Content(index, part)
        if (part := _within(span, end, described)) is not None:
            crc = crcs.get(index)
            checked = Checked(index, part, is_descriptor=True)
            yield checked if crc is None else self.checked(checked, crc)

    def pieces_at_end(self, span: ByteRange, crcs: Mapping[int, int] = _NOTHING) -> Iterator[Piece]:
        """Yield the pieces of a span that follow the members: see `pieces`."""
        entries: list[bytes] = []
        if span.start < self._end:
            first = _index_of(self._entries, span.start)
            for index in range(first, bisect_left(self._entries, span.stop, first)):
                start = self._entries[index]
                crc = crcs.get(index) if has_checksum(self.members[index]) else 0
                if crc is not None:
                    entry = self.entry(index, crc)
                    is_whole = span.start <= start and start + len(entry) <= span.stop
                    entries.append(entry if is_whole else entry[max(span.start - start, 0) : span.stop - start])
                    if len(entries) < _ENTRIES_AT_ONCE:
                        continue
                if entries:
                    yield b"".join(entries)
                    entries.clear()
                if crc is None and (part := _within(span, start, self._length_of_entry(index))) is not None:
                    yield Checked(index, part, is_descriptor=False)
        if (part := _within(span, self._end, len(self._end_records))) is not None:
            entries.append(self._end_records[part.start : part.stop])
        if entries:
            yield b"".join(entries)

    def header(self, index: int) -> bytes:
        """Return the local header of a member [APPNOTE 4.3.7].

        Its CRC-32 and sizes are 0, because a descriptor follows [4.4.4, bit 3] or the file is empty.
        """
        header = self._headers[index]
        if header is None:
            header = self._headers[index] = _local_header(self.members[index])
        return header

    def checked(self, piece: Checked, crc: int) -> bytes:
        """Return the bytes of a piece, with the CRC-32 of its file."""
        record = self.descriptor if piece.is_descriptor else self.entry
        return record(piece.index, crc)[piece.span.start : piece.span.stop]

    def descriptor(self, index: int, crc: int) -> bytes:
        """Return the data descriptor of a file [APPNOTE 4.3.9]. crc: its CRC-32."""
        size = self.members[index].size
        layout = _DESCRIPTOR_64 if _is_large(self.members[index]) else _DESCRIPTOR
        return layout.pack(0x08074B50, crc, size, size)

    def entry(self, index: int, crc: int) -> bytes:
        """Return the entry of a file in the central directory [APPNOTE 4.3.12]. crc: its CRC-32."""
        member, offset = self.members[index], self._offsets[index]
        size, made_by = member.size, _UNIX | _VERSION_64
        if size < _MAX_32 and offset < _MAX_32:
            header = self.header(index)
            version_to_time, lengths = header[4:14], header[26:30]
            fields = (0x02014B50, made_by, version_to_time, crc, size, size, lengths, 0, 0, 0, _attributes(member))
            return _SAME_ENTRY.pack(*fields, offset) + header[30:]
        name, extra = member.name.encode(), self._zip64_of_entry(index) + _extra(member)
        size, offset = min(size, _MAX_32), min(offset, _MAX_32)
        fixed = _DIRECTORY_ENTRY.pack(
            0x02014B50,
            made_by,
            _VERSION_64,
            _flags(member),
            0,
            _dos_time(member.modified),
            crc,
            size,
            size,
            len(name),
            len(extra),
            0,
            0,
            0,
            _attributes(member),
            offset,
        )
        return fixed + name + extra

    def _length_of_entry(self, index: int) -> int:
        following = index + 1
        return (self._entries[following] if following < len(self._entries) else self._end) - self._entries[index]

    def _zip64_of_entry(self, index: int) -> bytes:
        """Return the Zip64 field, with the values that do not fit into 32 bits, or nothing [APPNOTE 4.5.3]."""
        member, offset = self.members[index], self._offsets[index]
        values = [member.size] * 2 if _is_large(member) else []
        if offset >= _MAX_32:
            values.append(offset)
        return pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""

    def _make_end_records(self) -> bytes:
        """Return what follows the central directory [APPNOTE 4.3.14 to 4.3.16]."""
        count, length, offset = len(self.members), self._end - self._directory, self._directory
        zip64 = b""
        if count >= _MAX_16 or length >= _MAX_32 or offset >= _MAX_32:
            record_length = _END_64.size - 12  # without the signature and this field
            versions = (_UNIX | _VERSION_64, _VERSION_64)
            zip64 = _END_64.pack(0x06064B50, record_length, *versions, 0, 0, count, count, length, offset)
            zip64 += _LOCATOR_64.pack(0x07064B50, 0, self._end, 1)
        count = min(count, _MAX_16)
        return zip64 + _END.pack(0x06054B50, 0, 0, count, count, min(length, _MAX_32), min(offset, _MAX_32), 0)


def _local_header(member: Member) -> bytes:
    name, extra, modified = member.name.encode(), _extra(member), member.modified
    version, size = _VERSION, 0
    if _is_large(member):
        # A reader that meets this field knows that the descriptor has sizes of 8 bytes [4.3.9.2].
        extra = pack("<HHQQ", 1, 16, 0, 0) + extra
        version, size = _VERSION_64, _MAX_32
    fields = (0x04034B50, version, _flags(member), 0, _dos_time(modified), 0, size, size, len(name), len(extra))
    return _LOCAL_HEADER.pack(*fields) + name + extra


def has_checksum(member: Member) -> bool:
    """Return whether a member has a CRC-32 that depends on its content. That of an empty file, or of a folder, is 0."""
    return member.size > 0


def _is_large(member: Member) -> bool:
    return member.size >= _MAX_32


def _attributes(member: Member) -> int:
    """Return the Unix mode, and the attributes of DOS."""
    mode, is_folder = member.mode, member.is_folder
    if mode is None:
        return _ORDINARY_FOLDER if is_folder else _ORDINARY_FILE
    kind = stat.S_IFDIR if is_folder else stat.S_IFREG
    return (kind | stat.S_IMODE(mode)) << 16 | (_DOS_FOLDER if is_folder else 0)


def _flags(member: Member) -> int:
    return _UTF8 | (_HAS_DESCRIPTOR if has_checksum(member) else 0)


def _descriptor_length(member: Member) -> int:
    if not has_checksum(member):
        return 0
    return _DESCRIPTOR_64.size if _is_large(member) else _DESCRIPTOR.size


def _extra(member: Member) -> bytes:
    """Return the extended timestamp: the time in UTC, which the time of DOS does not tell."""
    modified = member.modified
    return _EXTRA.pack(0x5455, 5, 1, modified) if _has_extra(modified) else b""


def _has_extra(modified: int | None) -> bool:
    return modified is not None and -(2**31) <= modified < 2**31


def _dos_time(modified: int | None) -> int:
    """Return the time and the date of DOS [APPNOTE 4.4.6], in UTC. A year that it does not have is the nearest."""
    seconds = _DOS_FIRST if modified is None else min(max(modified, _DOS_FIRST), _DOS_LAST)
    day, second = divmod(seconds, 86_400)
    minute = second // 60
    return _dos_date(day) << 16 | minute // 60 << 11 | minute % 60 << 5 | second % 60 // 2


@lru_cache(maxsize=1024)
def _dos_date(day: int) -> int:
    """Return the date of DOS for a number of days since 1970-01-01."""
    year, month, day_of_month, *_ = gmtime(day * 86_400)
    return year - 1980 << 9 | month << 5 | day_of_month


def _index_of(offsets: "array[int]", position: int) -> int:
    """Return the index of the record in which a position is; the first record begins at or before it."""
    return max(bisect_right(offsets, position) - 1, 0)


def _within(span: ByteRange, position: int, length: int) -> ByteRange | None:
    """Return which bytes of a record at a position are in a span; None if none is."""
    start, stop = max(span.start - position, 0), min(span.stop - position, length)
    return ByteRange(start, stop) if start < stop else None
