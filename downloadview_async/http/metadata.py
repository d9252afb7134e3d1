"""The metadata of one version of a file (`FileMetadata`), its entity tag (`ETag`), and a span of it (`ByteRange`)."""

import re
from dataclasses import dataclass, field

from downloadview_async.http.dates import http_seconds
from downloadview_async.http.digest import Digests

# etagc = %x21 / %x23-7E / obs-text [RFC 9110 8.8.3]; header text is latin-1.
_VALUE = re.compile(r"[\x21\x23-\x7e\x80-\xff]*+")
_ETAG = re.compile(rf'(W/)?"({_VALUE.pattern})"')


@dataclass(frozen=True, slots=True)
class ETag:
    """An entity tag, RFC 9110 section 8.8.3. `value` is what stands between the quotes.

    Raises `ValueError` for a value that cannot stand there: a quote, a blank, a control or anything beyond latin-1.
    """

    value: str
    weak: bool = False

    def __post_init__(self) -> None:
        if not _VALUE.fullmatch(self.value):
            raise ValueError(f"not the value of an entity tag: {self.value!r}")

    def __str__(self) -> str:
        return f'W/"{self.value}"' if self.weak else f'"{self.value}"'

    @classmethod
    def parse(cls, text: str) -> "ETag | None":
        """Return the entity tag, or None if `text` is not one."""
        match = _ETAG.fullmatch(text)
        return cls(match[2], weak=match[1] is not None) if match else None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes of a file from `start` up to, but not including, `stop`: `ByteRange(0, 10)` is the first ten."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a byte range starts at 0 or later and ends no earlier than it starts: {self!r}")

    def __len__(self) -> int:
        return self.stop - self.start

    def content_range(self, size: int) -> str:
        """Return the value of Content-Range for this part of a file of `size` bytes, RFC 9110 section 14.4."""
        return f"bytes {self.start}-{self.stop - 1}/{size}"


MAX_READS = 4
"""The usual `max_reads` of a remote file, and of one that may have to read everything before a position to seek."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMetadata:
    """The metadata of one version of a file. A value that is not known is None.

    size: bytes. last_modified: seconds since the epoch, UTC. content_type: the whole value of Content-Type.
    accept_ranges: whether a part of the file can be sent; only a file of known size has parts.
    max_reads: how many separate reads one answer may cost, if each is a request or a long seek; None: any number.
    headers: further headers that describe this version, such as Content-Encoding or Vary, names in lower case.
    digests: of the whole of this version, as it is without a Content-Encoding.
    """

    size: int | None = None
    etag: ETag | None = None
    last_modified: int | None = None
    content_type: str | None = None
    accept_ranges: bool = True
    max_reads: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    digests: Digests = field(default=(), hash=False)  # the hash is needed for each answer that is kept

    @property
    def is_pinned(self) -> bool:
        """Whether a strong validator identifies this version, so that it can be read by several requests."""
        return (self.etag is not None and not self.etag.weak) or self.changed_at is not None

    @property
    def version(self) -> str:
        """Other bytes have another text; empty without a strong validator."""
        if self.etag is not None and not self.etag.weak:
            return str(self.etag)
        return "" if self.changed_at is None else f"{self.changed_at}"

    @property
    def changed_at(self) -> int | None:
        """`last_modified` where it can be the time of a change, else None: see `is_meaningful`."""
        return self.last_modified if self.last_modified is not None and is_meaningful(self.last_modified) else None


_SECOND = 1_000_000_000
_GRAIN = 30_000_000  # ns: kernels advance the clock for file times every 1 to 10 ms, and a write may take 20 ms
_COARSE_GRAIN = 2 * _SECOND  # for file systems that keep whole seconds; FAT has steps of two seconds
# Times that tools write instead of the true one, so that the same content gives the same archive. Nix, OSTree, OCI
# layers and Bazel write 0 or 1. The first days that a ZIP archive can name, in any time zone, cover its empty date
# (1979-11-30) and the dates of most tools (1980-01-01), of RubyGems (1980-01-02) and of Gradle (1980-02-01).
_FIRST_DAYS_OF_ZIP = range(312_768_000 - 14 * 3600, 318_211_200 + 12 * 3600 + 1)
_CONSTANT_TIMES = frozenset(
    {
        456_789_000,  # Yarn
        499_162_500,  # npm: 1985-10-26 08:15
        1_153_704_088,  # Cargo, maturin: 2006-07-24
        # A ZIP archive has local time, and time zones differ by quarters of an hour. Android's packages have 1981-01-01
        # 01:01:02, Bazel's jars 2010-01-01, the wheels of Flit and Poetry 2016-01-01, those of Hatch 2020-02-02.
        *(
            time + quarter * 900
            for time in (347_158_862, 1_262_304_000, 1_451_606_400, 1_580_601_600)
            for quarter in range(-14 * 4, 12 * 4 + 1)
        ),
    }
)


def is_meaningful(seconds: int) -> bool:
    """Return whether a time in seconds since the epoch, UTC, can be the time of a change.

    A constant that reproducible builds give to every file cannot: 0 and 1, the first days that a ZIP archive can name,
    and those of npm, Yarn, Cargo, Android, Bazel, Flit, Poetry and Hatch. A time before 0 cannot be one either.
    """
    return seconds > 1 and seconds not in _FIRST_DAYS_OF_ZIP and seconds not in _CONSTANT_TIMES


def is_telling(mtime_ns: int, now_ns: int, *, is_coarse: bool) -> bool:
    """Return whether other bytes would have another modification time [RFC 9110 8.8.1].

    With a time that is not meaningful they would not. A time in whole seconds, from a file system or a storage that
    keeps nothing finer (`is_coarse`), does not show a change within two seconds of `now_ns`, when it was read.
    """
    return is_meaningful(mtime_ns // _SECOND) and (not is_coarse or abs(now_ns - mtime_ns) >= _COARSE_GRAIN)


def unsettled_seconds(mtime_ns: int, now_ns: int) -> float:
    """Return for how many more seconds a file may change and keep its modification time: 0, or less than 0.06."""
    age = now_ns - mtime_ns
    return (_GRAIN - age) / _SECOND if -_GRAIN < age < _GRAIN else 0.0


def stat_validators(size: int, mtime_ns: int) -> tuple[ETag, int | None]:
    """Return the strong entity tag and the Last-Modified time of a stored file, from its size and its mtime.

    The tag is the same on every replica that keeps mtimes, as it does not contain the inode. It has nanoseconds, so a
    file that is replaced within one second gets another tag. Only for a time that `is_telling`.
    """
    return ETag(f"{mtime_ns:x}-{size:x}"), http_seconds(mtime_ns // _SECOND)


def stat_version(size: int, mtime_ns: int) -> str:
    """Return `FileMetadata.version` of a stored file with the validators of `stat_validators`."""
    return f'"{mtime_ns:x}-{size:x}"'
