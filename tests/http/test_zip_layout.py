"""The layout of ZIP archives: record by record, as zipfile reads them, and any span of them."""

import hashlib
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.zip_layout import LAYOUT, Checked, Content, Member, ZipLayout, has_checksum

GIB = 1 << 30
MAX_32 = 0xFFFFFFFF
NEW_YEAR = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())


def rendered(layout: ZipLayout, contents: Mapping[int, bytes], span: ByteRange) -> bytes:
    """The bytes of a span of an archive whose files have these contents."""
    crcs = {index: zlib.crc32(content) for index, content in contents.items()}
    out = bytearray()
    for piece in layout.pieces(span):
        match piece:
            case Content(index, part):
                assert len(part) > 0
                out += contents[index][part.start : part.stop]
            case Checked(index):
                out += layout.checked(piece, crcs[index])
            case bytes():
                out += piece
    return bytes(out)


def archive_of(files: Mapping[str, bytes], modified: int | None = NEW_YEAR) -> bytes:
    layout = ZipLayout([Member(name, len(content), modified) for name, content in files.items()])
    archive = rendered(layout, dict(enumerate(files.values())), ByteRange(0, layout.size))
    assert len(archive) == layout.size
    return archive


FILES = {"d/": b"", "d/empty/": b"", "d/a.txt": b"hello", "d/none": b"", "é/文 😀.txt": b"PK\x07\x08" * 9}


def test_zipfile_reads_it() -> None:
    with zipfile.ZipFile(io.BytesIO(archive_of(FILES))) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == FILES
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(2024, 1, 1, 0, 0, 0)}
        assert all(info.flag_bits & 0x800 for info in archive.infolist())
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert modes["d/"] == stat.S_IFDIR | 0o755
    assert modes["d/a.txt"] == stat.S_IFREG | 0o644


def test_a_mode_is_kept_without_its_kind() -> None:
    layout = ZipLayout([Member("run", 0, mode=stat.S_IFLNK | 0o751), Member("d/", mode=0o700)])
    archive = rendered(layout, {}, ByteRange(0, layout.size))
    modes = [info.external_attr >> 16 for info in zipfile.ZipFile(io.BytesIO(archive)).infolist()]
    assert modes == [stat.S_IFREG | 0o751, stat.S_IFDIR | 0o700]


def test_an_archive_without_files_is_one() -> None:
    assert archive_of({}) == struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0, 0, 0, 0, 0)
    assert zipfile.ZipFile(io.BytesIO(archive_of({}))).namelist() == []


@pytest.mark.parametrize(
    "modified, dos, has_extra",
    [
        (None, (1980, 1, 1, 0, 0, 0), False),
        (0, (1980, 1, 1, 0, 0, 0), True),
        (-1, (1980, 1, 1, 0, 0, 0), True),
        (NEW_YEAR + 3601, (2024, 1, 1, 1, 0, 0), True),  # two seconds are the grain of DOS
        (2**31 - 1, (2038, 1, 19, 3, 14, 6), True),
        (2**31, (2038, 1, 19, 3, 14, 8), False),
        (-(2**31), (1980, 1, 1, 0, 0, 0), True),
        (-(2**31) - 1, (1980, 1, 1, 0, 0, 0), False),
        (10**12, (2107, 12, 31, 23, 59, 58), False),
    ],
)
def test_times_are_those_of_dos_and_of_unix(modified: int | None, dos: tuple[int, ...], has_extra: bool) -> None:
    info = zipfile.ZipFile(io.BytesIO(archive_of({"a": b"x"}, modified))).infolist()[0]
    assert info.date_time == dos
    assert info.extra == (struct.pack("<HHBi", 0x5455, 5, 1, modified) if has_extra else b"")


@pytest.mark.parametrize("name", ["", "é" * 32_768])
def test_a_name_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no place for a name"):
        ZipLayout([Member(name)])


def test_the_longest_name_has_a_place() -> None:
    name = "n" * 65_535
    assert zipfile.ZipFile(io.BytesIO(archive_of({name: b"x"}))).read(name) == b"x"


@dataclass
class Record:
    """A file, as the records of an archive describe it."""

    name: bytes
    offset: int
    size: int
    crc: int
    is_zip64: bool


def zip64_values(extra: bytes, count: int) -> list[int]:
    """The values of the Zip64 field among the extra fields, which has exactly as many."""
    position, values = 0, []
    while position < len(extra):
        tag, length = struct.unpack_from("<HH", extra, position)
        if tag == 1:
            assert length == 8 * count
            values = [*struct.unpack_from(f"<{count}Q", extra, position + 4)]
        position += 4 + length
    assert position == len(extra)
    return values


def records_of(layout: ZipLayout) -> Iterator[Record]:
    """Follow each record from the end of an archive, as `zipdetails` does, and check what it says of the others.

    The CRC-32 of each file counts as 7, so nothing is read.
    """

    def read(start: int, length: int) -> bytes:
        out = b""
        for piece in layout.pieces(ByteRange(start, start + length)):
            match piece:
                case bytes():
                    out += piece
                case Checked():
                    out += layout.checked(piece, 7)
                case Content():
                    raise AssertionError("a record is where a file should be")
        assert len(out) == length
        return out

    end = layout.size - 22
    signature, disk, disk_of, here, count, length, offset, comment = struct.unpack("<IHHHHIIH", read(end, 22))
    assert (signature, disk, disk_of, comment) == (0x06054B50, 0, 0, 0)
    assert here == count
    needs_zip64 = count == 0xFFFF or MAX_32 in (length, offset)
    stop = end
    if needs_zip64:
        stop = end - 20 - 56
        locator, disk, at, disks = struct.unpack("<IIQI", read(end - 20, 20))
        assert (locator, disk, at, disks) == (0x07064B50, 0, stop, 1)
        fields = struct.unpack("<IQHHIIQQQQ", read(stop, 56))
        assert fields[:2] == (0x06064B50, 44)
        assert fields[4:6] == (0, 0)
        assert fields[6] == fields[7]
        count, length, offset = fields[7:]
    position = offset
    following = 0
    for _ in range(count):
        fields = struct.unpack("<IHHHHHHIIIHHHHHII", read(position, 46))
        (signature, made_by, needed, flags, method, time, date, crc, size, full, name_length, extra_length) = fields[
            :12
        ]
        assert (signature, made_by >> 8, method) == (0x02014B50, 3, 0)
        assert size == full
        name = read(position + 46, name_length)
        extra = read(position + 46 + name_length, extra_length)
        start = fields[16]
        values = zip64_values(extra, 2 * (size == MAX_32) + (start == MAX_32))
        is_zip64 = bool(values)
        is_large = size == MAX_32
        if is_large:
            size, full, *values = values
            assert size == full
        if start == MAX_32:
            (start,) = values
        assert needed == (45 if is_zip64 else 20)
        # the local header, right after the file before it
        assert start == following
        local = struct.unpack("<IHHHHHIIIHH", read(start, 30))
        assert local[:6] == (0x04034B50, 45 if is_large else 20, flags, method, time, date)
        assert local[6:9] == (0, *[MAX_32 if is_large else 0] * 2)
        assert read(start + 30, local[9]) == name
        assert zip64_values(read(start + 30 + local[9], local[10]), 2) == ([0, 0] if is_large else [])
        following = start + 30 + local[9] + local[10] + size
        assert bool(flags & 8) == (size > 0)
        assert flags & ~8 == 1 << 11
        if size:
            form = "<IIQQ" if is_large else "<IIII"
            assert struct.unpack(form, read(following, struct.calcsize(form))) == (0x08074B50, 7, size, size)
            following += struct.calcsize(form)
        yield Record(name, start, size, crc, is_zip64)
        position += 46 + name_length + extra_length
    assert following == offset
    assert position == offset + length == stop


@pytest.mark.parametrize(
    "sizes, zip64",
    [
        ([5, 0, 7], [False] * 3),
        ([MAX_32 - 1, 1], [False, True]),
        ([MAX_32, 1], [True, True]),
        ([MAX_32 - 1 - 31 - 16, 1], [False, False]),  # the second file begins at 0xFFFFFFFE
        ([MAX_32 - 31 - 16, 1], [False, True]),
        ([5 * GIB, 5 * GIB, 0], [True] * 3),
        ([1 << 50], [True]),
    ],
)
def test_large_files_and_offsets_have_zip64_fields(sizes: list[int], zip64: list[bool]) -> None:
    members = [Member(f"{index}", size) for index, size in enumerate(sizes)]
    records = [*records_of(ZipLayout(members))]
    assert [record.size for record in records] == sizes
    assert [record.is_zip64 for record in records] == zip64
    assert [record.crc for record in records] == [7 if size else 0 for size in sizes]


@pytest.mark.parametrize("count, has_zip64", [(65_534, False), (65_535, True)])
def test_more_files_than_16_bits_count_have_zip64_records(count: int, has_zip64: bool) -> None:
    layout = ZipLayout([Member(f"{index}") for index in range(count)])
    end = rendered(layout, {}, ByteRange(layout.size - 98, layout.size))
    assert end[-12:-10] == min(count, 0xFFFF).to_bytes(2, "little")
    assert (b"PK\x06\x06" in end) == has_zip64
    if has_zip64:
        assert end[32:40] == count.to_bytes(8, "little")


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
trees = st.dictionaries(names, st.binary(max_size=50), max_size=8).map(
    lambda tree: {name: b"" if name.endswith("/") else content for name, content in tree.items()}
)


@settings(max_examples=50)
@given(trees, st.none() | st.integers(-(2**40), 2**40))
def test_every_tree_has_the_records_that_it_should(tree: dict[str, bytes], modified: int | None) -> None:
    layout = ZipLayout([Member(name, len(content), modified) for name, content in tree.items()])
    assert [(record.name.decode(), record.size) for record in records_of(layout)] == [
        (name, len(content)) for name, content in tree.items()
    ]


@settings(max_examples=100)
@given(trees, st.data())
def test_any_span_is_that_slice_of_the_whole(tree: dict[str, bytes], data: st.DataObject) -> None:
    archive = archive_of(tree)
    layout = ZipLayout([Member(name, len(content), NEW_YEAR) for name, content in tree.items()])
    start = data.draw(st.integers(0, len(archive)))
    stop = data.draw(st.integers(start, len(archive)))
    assert rendered(layout, dict(enumerate(tree.values())), ByteRange(start, stop)) == archive[start:stop]


@given(st.lists(st.sampled_from([0, 1, 3 * GIB, MAX_32, 9 * GIB]), max_size=6), st.data())
def test_pieces_of_large_archives_have_the_length_of_their_span(sizes: list[int], data: st.DataObject) -> None:
    layout = ZipLayout([Member(f"{index}", size) for index, size in enumerate(sizes)])
    start = data.draw(st.integers(0, layout.size))
    stop = data.draw(st.integers(start, layout.size))
    pieces = [*layout.pieces(ByteRange(start, stop))]
    assert sum(len(piece if isinstance(piece, bytes) else piece.span) for piece in pieces) == stop - start
    assert all(has_checksum(layout.members[piece.index]) for piece in pieces if not isinstance(piece, bytes))


def test_other_bytes_for_the_same_members_need_another_layout_number() -> None:
    members = [
        Member("folder/", 0, NEW_YEAR),
        Member("folder/empty", 0, None),
        Member("folder/é", 5, NEW_YEAR + 1, 0o600),
        Member("1970", 1, -1),
        Member("large", 5 * GIB, 2**31),
        Member("behind", 3, NEW_YEAR),
    ]
    layout = ZipLayout(members)
    digest = hashlib.sha256()
    for piece in layout.pieces(ByteRange(0, layout.size)):
        match piece:
            case Content(index, part):
                digest.update(f"{index}: {part}".encode())
            case Checked(index):
                digest.update(layout.checked(piece, index))
            case bytes():
                digest.update(piece)
    assert (LAYOUT, digest.hexdigest()) == (1, "531cd2c7d1bb76cc9efdeaf571a5b390b3fd0ef147ad932d19c3dd7b1ecc7c58")


def test_checksums_that_are_known_are_in_their_place_at_once() -> None:
    layout = ZipLayout([Member("a.txt", 3, NEW_YEAR), Member("b.txt", 5, NEW_YEAR)])
    span = ByteRange(0, layout.size)
    crcs = {0: zlib.crc32(b"one"), 1: zlib.crc32(b"three")}
    needed = [piece for piece in layout.pieces(span) if isinstance(piece, Checked) and piece.is_descriptor]
    pieces = [piece for piece in layout.pieces(span, crcs) if not isinstance(piece, Content)]
    assert len(needed) == 2
    for descriptor in needed:
        assert layout.checked(descriptor, crcs[descriptor.index]) in pieces
    assert not [piece for piece in pieces if isinstance(piece, Checked) and piece.is_descriptor]


def test_the_places_of_members_follow_each_other_and_a_span_has_those_that_it_touches() -> None:
    layout = ZipLayout([Member("folder/"), Member("a", 3, NEW_YEAR), Member("b", 5)])
    places = [layout.place(index) for index in range(3)]
    assert places[0][0] == 0
    assert [start for start, _ in places[1:]] == [stop for _, stop in places[:-1]]
    for index, (start, stop) in enumerate(places):
        assert layout.members_in(ByteRange(start, stop)) == range(index, index + 1)
    assert layout.members_in(ByteRange(places[0][1] - 1, places[2][0] + 1)) == range(3)
    assert not layout.members_in(ByteRange(places[2][1], layout.size))


def test_many_entries_of_the_directory_are_one_piece() -> None:
    layout = ZipLayout([Member(f"{index}/") for index in range(1200)])
    directory = ByteRange(layout.place(1199)[1], layout.size)
    pieces = [*layout.pieces(directory)]
    assert len(pieces) == 3
    assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == b"".join(
        [*(layout.entry(index, 0) for index in range(1200)), layout._end_records]
    )
