"""Entity tags, byte ranges and the validators of a stored file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.metadata import (
    ByteRange,
    ETag,
    FileMetadata,
    is_telling,
    stat_validators,
    stat_version,
    unsettled_seconds,
)
from tests.http.asking import LARGE


@pytest.mark.parametrize(
    "text, etag",
    [
        ('"xyzzy"', ETag("xyzzy")),
        ('W/"xyzzy"', ETag("xyzzy", weak=True)),
        ('""', ETag("")),
        ('W/""', ETag("", weak=True)),
        ('"a,b"', ETag("a,b")),
        ('"W/"', ETag("W/")),
        ('"\\"', ETag("\\")),
        ('"\xe9"', ETag("\xe9")),
        ("", None),
        ("xyzzy", None),
        ('"', None),
        ('"a', None),
        ("'a'", None),
        ('w/"a"', None),
        ('W"a"', None),
        ('W/a"', None),
        ('"a"b"', None),
        ('"a", "b"', None),
        (' "a"', None),
        ('"a" ', None),
        ('"a b"', None),
        ('"a\x00"', None),
        ('"a\x7f"', None),
        ('"a"\n', None),
        ('"\u0100"', None),
        ("*", None),
    ],
)
def test_an_entity_tag_is_read_as_it_stands_there(text: str, etag: ETag | None) -> None:
    assert ETag.parse(text) == etag
    assert etag is None or str(etag) == text


@pytest.mark.parametrize("value", ['"', 'a"b', "a b", "\t", "a\r\nSet-Cookie: a=b", "\x00", "\x7f", "π", "\u2028"])
def test_what_cannot_stand_in_a_tag_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="entity tag"):
        ETag(value)


@given(st.text() | st.text('W/"a').map('W/"{}"'.format))
def test_no_text_raises_and_what_is_read_is_written_the_same(text: str) -> None:
    etag = ETag.parse(text)
    assert etag is None or str(etag) == text


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ['"', "a", "W/", " ", '""', "\x00"], ids=repr)
def test_a_huge_tag_is_decided(text: str) -> None:
    assert ETag.parse('"' + text * (LARGE // len(text)) + "\n") is None


def test_a_byte_range_counts_from_its_first_byte_to_before_its_stop() -> None:
    part = ByteRange(2, 5)
    assert len(part) == 3
    assert b"0123456789"[part.start : part.stop] == b"234"
    assert part.content_range(10) == "bytes 2-4/10"


@pytest.mark.parametrize("start, stop", [(-1, 5), (5, 4), (-2, -1)])
def test_a_byte_range_that_is_none_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="byte range"):
        ByteRange(start, stop)


def test_a_stored_file_has_a_strong_tag_that_changes_with_the_nanosecond_and_the_size() -> None:
    second = 1_700_000_000
    etag, modified = stat_validators(10, second * 10**9)
    assert not etag.weak
    assert ETag.parse(str(etag)) == etag
    assert modified == second
    assert stat_validators(10, second * 10**9 + 999_999_999)[1] == second
    tags = {
        stat_validators(size, second * 10**9 + nanosecond)[0] for size in (10, 11, 0x10) for nanosecond in (0, 1, 16)
    }
    assert len(tags) == 9


@given(st.integers(0, 1 << 63), st.integers(-(1 << 63), 1 << 63))
def test_any_stat_gives_validators(size: int, mtime_ns: int) -> None:
    etag, modified = stat_validators(size, mtime_ns)
    assert ETag.parse(str(etag)) == etag
    assert (modified is None) == (mtime_ns < 0)


NOW = 1_700_000_000 * 10**9


@pytest.mark.parametrize(
    "mtime_ns, coarse, telling",
    [
        (0, False, False),  # OSTree, OCI layers
        (10**9, False, False),  # Nix
        (1, False, False),
        (-(10**9), False, False),
        (315_532_800 * 10**9, False, False),  # what is unpacked from a ZIP with the time of SOURCE_DATE_EPOCH
        (499_162_500 * 10**9, False, False),  # npm
        (315_532_801 * 10**9, False, False),  # ZIP has local time
        (312_768_000 * 10**9, False, False),  # the date 0 of ZIP
        (315_619_200 * 10**9, False, False),  # RubyGems
        (318_211_200 * 10**9 - 14 * 3600 * 10**9, False, False),  # Gradle, in the first time zone
        (318_211_200 * 10**9 + 12 * 3600 * 10**9, False, False),  # and in the last
        (347_158_862 * 10**9, False, False),  # Android
        (2 * 10**9, False, True),
        (456_789_000 * 10**9, False, False),  # Yarn
        (456_789_001 * 10**9, False, True),
        (1_153_704_088 * 10**9, False, False),  # Cargo
        (1_153_704_089 * 10**9, False, True),
        (1_262_304_000 * 10**9, False, False),  # Bazel's jars
        (1_451_606_400 * 10**9 + (5 * 60 + 45) * 60 * 10**9, False, False),  # a wheel of Flit, unpacked in Nepal
        (1_580_601_600 * 10**9 - 14 * 3600 * 10**9, False, False),  # a wheel of Hatch, in the first time zone
        (1_580_601_600 * 10**9 - 13 * 3600 * 10**9 - 10**9, False, True),
        (318_211_200 * 10**9 + 13 * 3600 * 10**9, False, True),
        (347_158_863 * 10**9, False, True),
        (NOW - 365 * 86_400 * 10**9, True, True),
        (NOW - 10**9, False, True),
        (NOW - 10**9, True, False),  # FAT counts in twos
        (NOW - 2 * 10**9, True, True),
        (NOW + 10**9, True, False),  # the clocks of file servers are not quite ours
        (NOW + 365 * 86_400 * 10**9, True, True),
    ],
)
def test_a_time_is_telling_if_other_bytes_would_have_another_one(mtime_ns: int, coarse: bool, telling: bool) -> None:
    assert is_telling(mtime_ns, NOW, is_coarse=coarse) is telling


@pytest.mark.parametrize(
    "age_ns, seconds",
    [(0, 0.03), (5_000_000, 0.025), (30_000_000, 0.0), (10**12, 0.0), (-5_000_000, 0.035), (-(10**9), 0.0)],
)
def test_how_long_a_file_may_change_without_another_time(age_ns: int, seconds: float) -> None:
    assert unsettled_seconds(NOW - age_ns, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "etag, modified, is_pinned",
    [
        (None, None, False),
        (ETag("x"), None, True),
        (ETag("x", weak=True), None, False),
        (None, 1_700_000_000, True),
        (None, 0, False),
        (None, 1, False),
        (None, 315_532_800, False),
        (None, 499_162_500, False),
        (ETag("x"), 0, True),
        (ETag("x", weak=True), 0, False),
    ],
)
def test_only_a_strong_validator_pins_a_version(etag: ETag | None, modified: int | None, is_pinned: bool) -> None:
    metadata = FileMetadata(etag=etag, last_modified=modified)
    assert metadata.is_pinned == is_pinned
    assert metadata.changed_at == (modified if modified == 1_700_000_000 else None)


@pytest.mark.parametrize(
    "metadata, version",
    [
        (FileMetadata(size=1, etag=ETag("a")), '"a"'),
        (FileMetadata(size=1, etag=ETag("a", weak=True)), ""),
        (FileMetadata(size=1, etag=ETag("a", weak=True), last_modified=1_700_000_000), "1700000000"),
        (FileMetadata(size=1), ""),
    ],
)
def test_the_version_is_a_text_for_a_strong_validator(metadata: FileMetadata, version: str) -> None:
    assert metadata.version == version


def test_the_version_of_a_stored_file_is_that_of_its_validators() -> None:
    etag, modified = stat_validators(7, 1_700_000_000_123_456_789)
    described = FileMetadata(size=7, etag=etag, last_modified=modified)
    assert stat_version(7, 1_700_000_000_123_456_789) == described.version
