"""Local files: precompressed siblings, every way of reading, and what is refused when a source is made."""

import gc
import os
import resource
import time
import tracemalloc
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import (
    ByteRange,
    ConfigurationError,
    DirectoryStorage,
    Download,
    LocalFile,
    OffloadMiddleware,
    PathSource,
    Rule,
    TransferAborted,
    XAccelRedirect,
)
from downloadview_async.sources.local import open_file
from downloadview_async.sources.local.open_file import CHUNK_SIZE, OpenLocalFile
from downloadview_async.sources.local.root import Root
from downloadview_async.sources.workers import Workers
from downloadview_async.testing import assert_x_accel_redirect, call

pytestmark = pytest.mark.asyncio
PLAIN = b"body {} " * 100


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    root = tmp_path / "root"
    for name, content in {
        "style.css": PLAIN,
        "style.css.br": b"BROTLI",
        "style.css.gz": b"GZIP",
        "lone.css": PLAIN,
    }.items():
        (root / name).write_bytes(content)
        os.utime(root / name, ns=(0, 1_700_000_000_000_000_000))
    (tmp_path / "secret.gz").write_bytes(b"SECRET")
    (root / "lone.css.gz").symlink_to(tmp_path / "secret.gz")
    (root / "lone.css.zst").mkdir()
    return root


PREFERENCES = [
    ("gzip, br", "br", b"BROTLI"),
    ("gzip;q=1, br;q=0.5", "gzip", b"GZIP"),
    ("gzip", "gzip", b"GZIP"),
    ("x-gzip", "gzip", b"GZIP"),
    ("zstd", None, PLAIN),
    ("*", "br", b"BROTLI"),
    ("br;q=0, gzip;q=0", None, PLAIN),
    ("gzip;q=0.1, identity", None, PLAIN),
    ("identity", None, PLAIN),
    ("", None, PLAIN),
]


@pytest.mark.parametrize("accept, encoding, body", PREFERENCES)
async def test_a_sibling_is_sent_to_who_prefers_it(root: Path, accept: str, encoding: str | None, body: bytes) -> None:
    app = Download(PathSource(root, precompressed=("br", "zstd", "gzip")))
    answer = await call(app, "/style.css", headers={"Accept-Encoding": accept})
    assert (answer.body, answer.headers.get("content-encoding")) == (body, encoding)
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="style.css"'
    assert answer.headers["content-length"] == str(len(body))
    again = await call(app, "/style.css", headers={"Accept-Encoding": accept, "If-None-Match": answer.headers["etag"]})
    assert (again.status, again.headers["vary"]) == (304, "Accept-Encoding")


async def test_every_encoding_has_a_tag_of_its_own_even_with_one_size_and_time(root: Path) -> None:
    (root / "style.css.br").write_bytes(b"x" * len(PLAIN))
    os.utime(root / "style.css.br", ns=(0, 1_700_000_000_000_000_000))
    app = Download(PathSource(root, precompressed=("br",)))
    plain = await call(app, "/style.css")
    packed = await call(app, "/style.css", headers={"Accept-Encoding": "br"})
    assert plain.headers["etag"] != packed.headers["etag"]
    mixed = {"Accept-Encoding": "br", "Range": "bytes=0-1", "If-Range": plain.headers["etag"]}
    assert (await call(app, "/style.css", headers=mixed)).status == 200
    resumed = {"Accept-Encoding": "br", "Range": "bytes=0-1", "If-Range": packed.headers["etag"]}
    assert (await call(app, "/style.css", headers=resumed)).body == b"xx"


async def test_a_sibling_that_leads_out_of_the_root_or_is_no_file_is_not_sent(root: Path) -> None:
    app = Download(PathSource(root, precompressed=("gzip", "zstd")))
    for accept in ("gzip", "zstd"):
        answer = await call(app, "/lone.css", headers={"Accept-Encoding": accept})
        assert answer.body == PLAIN
        assert "content-encoding" not in answer.headers


async def test_siblings_are_for_those_who_ask_for_them(root: Path) -> None:
    answer = await call(Download(PathSource(root)), "/style.css", headers={"Accept-Encoding": "br, gzip"})
    assert answer.body == PLAIN
    assert not {"vary", "content-encoding"} & set(answer.headers)
    with pytest.raises(ConfigurationError, match="br, zstd, gzip, not deflate"):
        PathSource(root, precompressed=["deflate"])


async def test_a_proxy_gets_the_plain_file_and_packs_it_itself(root: Path) -> None:
    app = OffloadMiddleware(
        Download(PathSource(root, precompressed=("br",))), XAccelRedirect([Rule(str(root), "/_files/")])
    )
    answer = await call(app, "/style.css", headers={"Accept-Encoding": "br"})
    assert_x_accel_redirect(answer, redirect_url="/_files/style.css")
    assert "content-encoding" not in answer.headers


@pytest.fixture(params=["page cache", "cannot tell", "never asked"])
def big(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of several chunks: on a disk; on tmpfs, which cannot tell what is cached; and without RWF_NOWAIT."""
    directory = tmp_path
    if request.param == "cannot tell":
        if not Path("/dev/shm").is_dir():
            pytest.skip("tmpfs: there is no /dev/shm")
        directory = Path("/dev/shm")
    if request.param == "never asked":
        monkeypatch.setattr(open_file, "_RWF_NOWAIT", None)
    path = directory / f"downloadview-{os.getpid()}.bin"
    path.write_bytes(os.urandom(3 * CHUNK_SIZE + 7))
    yield path
    path.unlink()


async def test_every_way_of_reading_gives_the_same_bytes(big: Path) -> None:
    content = big.read_bytes()
    for span in (
        None,
        ByteRange(0, len(content)),
        ByteRange(5, CHUNK_SIZE + 6),
        ByteRange(len(content) - 1, len(content)),
    ):
        async with LocalFile(big).open() as opened:
            read = b"".join([chunk async for chunk in opened.stream(span)])
        assert read == (content if span is None else content[span.start : span.stop])


async def test_a_cold_file_is_read_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "cold.bin"
    content = os.urandom(4 * CHUNK_SIZE)
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    async with LocalFile(path).open() as opened:
        assert b"".join([chunk async for chunk in opened.stream(None)]) == content


async def test_a_descriptor_that_cannot_be_read_aborts(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        opened = OpenLocalFile(directory, os.stat(tmp_path), workers=Workers())
        with pytest.raises(TransferAborted, match="at byte 0"):
            _ = [chunk async for chunk in opened.stream(ByteRange(0, 10))]
    finally:
        os.close(directory)


async def test_what_is_in_the_page_cache_is_not_remembered_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each client that stalls would hold 84 bytes for each 128 KiB that it has taken before."""
    path, size = tmp_path / "large.bin", 64 << 20
    path.write_bytes(bytes(size))
    now = time.monotonic()
    async with LocalFile(path).open() as opened:
        monkeypatch.setattr(time, "monotonic", lambda: now)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for offset in range(0, size, CHUNK_SIZE):
                opened.is_cached(offset, CHUNK_SIZE)
                now += 0.01
            held = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert held < 12_000


async def test_names_and_locations(root: Path) -> None:
    file = LocalFile(root / "style.css")
    assert (file.name, file.location) == ("style.css", str(root / "style.css"))
    assert LocalFile(root / "style.css", name="x").name == "x"
    found = await PathSource(root).resolve("style.css")
    assert (found.name, found.location) == ("style.css", str(root / "style.css"))


@pytest.mark.parametrize("name", ["sub/b.txt", "./sub/b.txt", "//sub/b.txt", "sub/././b.txt", "sub//b.txt"])
async def test_single_dots_and_empty_segments_are_dropped(root: Path, name: str) -> None:
    (root / "sub").mkdir(exist_ok=True)
    (root / "sub" / "b.txt").write_text("b")
    file = await PathSource(root).resolve(name)
    assert (file.location, file.name) == (str(root / "sub" / "b.txt"), "b.txt")
    async with file.open() as opened:
        assert [chunk async for chunk in opened.stream(None)] == [b"b"]


@pytest.mark.parametrize("name", ["a:b.txt", "a\\b.txt", "aux.notes", "NUL"])
async def test_any_name_of_this_system_can_be_sent_where_that_is_wanted(root: Path, name: str) -> None:
    (root / name).write_text("x")
    assert (await call(Download(PathSource(root)), f"/{name}")).status == 404
    assert (await call(Download(PathSource(root, names="any")), f"/{name}")).body == b"x"


async def test_names_that_are_no_choice_are_refused(root: Path) -> None:
    wrong: Any = "all"
    for make in (PathSource, DirectoryStorage):
        with pytest.raises(ConfigurationError, match="names must be one of portable, any, exact, not 'all'"):
            make(root, names=wrong)


@pytest.mark.parametrize(
    "sibling_ns, sent",
    [
        (2_000_000_500, "gzip"),
        (2_000_000_501, "gzip"),
        (2_000_000_499, None),
        (1_000_000_500, None),
        (2_000_000_000, "gzip"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
async def test_a_precompressed_sibling_older_than_its_file_is_not_sent(
    root: Path, sibling_ns: int, sent: str | None, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "page.html").write_text("new")
    (root / "page.html.gz").write_bytes(b"old")
    second = 1_700_000_000 * 10**9
    os.utime(root / "page.html", ns=(0, second + 2_000_000_500))
    os.utime(root / "page.html.gz", ns=(0, second + sibling_ns))
    source = PathSource(root, precompressed=["gzip"])
    if not cached:
        monkeypatch.setattr(Root, "open_nowait", lambda self, name: None)
    answer = await call(Download(source), "/page.html", headers={"Accept-Encoding": "gzip"})
    assert (answer.headers.get("content-encoding"), answer.body) == (sent, b"old" if sent else b"new")
    assert answer.headers["vary"] == "Accept-Encoding"


async def test_a_precompressed_sibling_is_closed_where_no_descriptor_is_left_for_its_file(root: Path) -> None:
    (root / "page.html").write_text("page")
    (root / "page.html.gz").write_bytes(b"packed")
    for name in ("page.html", "page.html.gz"):
        os.utime(root / name, (1_700_000_000, 1_700_000_000))
    app = Download(PathSource(root, precompressed=["gzip"]))
    headers = {"Accept-Encoding": "gzip"}
    assert (await call(app, "/page.html", headers=headers)).body == b"packed"
    gc.collect()  # files of other tests must not be closed meanwhile
    before = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
    try:
        refused = await call(app, "/page.html", headers=headers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused.status == 503
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("mtime", [0, 1, 315_532_800])
async def test_a_normalised_time_makes_no_validator(root: Path, mtime: int) -> None:
    path = root / "layer.bin"
    path.write_bytes(b"0123456789")
    os.utime(path, (mtime, mtime))
    app = Download(PathSource(root))
    first = await call(app, "/layer.bin")
    assert {"etag", "last-modified"}.isdisjoint(first.headers)
    assert first.headers["accept-ranges"] == "bytes"
    path.write_bytes(b"9876543210")
    os.utime(path, (mtime, mtime))
    tag = f'"{mtime * 10**9:x}-a"'  # what 0.1 made of it
    date = formatdate(mtime, usegmt=True)
    assert (await call(app, "/layer.bin", headers={"If-None-Match": tag})).status == 200
    assert (await call(app, "/layer.bin", headers={"If-Modified-Since": date})).status == 200
    for validator in (tag, date):
        resumed = await call(app, "/layer.bin", headers={"Range": "bytes=5-", "If-Range": validator})
        assert (resumed.status, resumed.body) == (200, b"9876543210")
    part = await call(app, "/layer.bin", headers={"Range": "bytes=5-"})
    assert (part.status, part.body) == (206, b"43210")


async def test_a_file_that_changes_again_at_once_has_another_tag(root: Path) -> None:
    app = Download(PathSource(root))
    tags: list[str] = []
    for number in range(50):
        content = b"%010d" % number
        (root / "quick.bin").write_bytes(content)  # in place: the same inode, the same size, at times the same time
        answer = await call(app, "/quick.bin", headers={"If-None-Match": ", ".join(tags[-1:])} if tags else {})
        assert (answer.status, answer.body) == (200, content)
        tags.append(answer.headers["etag"])
    assert len(set(tags)) == 50
