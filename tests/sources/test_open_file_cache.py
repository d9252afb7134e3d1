"""Files that stay open for a second: never another version than the one that has the name now."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import downloadview_async as dv
from downloadview_async.errors import FileError
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.open_file_cache import MAX_FILES, OpenFileCache
from downloadview_async.sources.local.root import Root, Symlinks, has_openat2
from downloadview_async.sources.workers import Workers

pytestmark = pytest.mark.skipif(not has_openat2(), reason="openat2: this kernel or sandbox has none: nothing is kept")


def cache_of(root: Path, symlinks: Symlinks = "inside") -> OpenFileCache:
    return OpenFileCache(Root(root, symlinks=symlinks), Workers())


def opened(cache: OpenFileCache, name: str) -> OpenLocalFile:
    """Open a file, as a response does where the kernel does not have it at hand."""
    return cache.open(name) or OpenLocalFile(*cache._root.open(name), workers=Workers())


def content(cache: OpenFileCache, name: str) -> bytes:
    file = opened(cache, name)
    try:
        assert file.metadata.size is not None
        return os.pread(file.descriptor, file.metadata.size, 0)
    finally:
        file.close()


async def kept(cache: OpenFileCache, name: str) -> int:
    """Open a file until it is kept, and return the descriptor."""
    for _ in range(3):
        file = opened(cache, name)
        file.close()
    os.fstat(file.descriptor)  # still open
    return file.descriptor


@pytest.mark.asyncio
async def test_a_file_that_is_asked_for_again_is_not_opened_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    cache = cache_of(tmp_path)
    descriptor = await kept(cache, "a")
    one, two = opened(cache, "a"), opened(cache, "a")
    assert one.descriptor == two.descriptor == descriptor
    one.close()
    assert two.read_nowait(ByteRange(0, 1)) in (b"a", None)
    two.close()


def replaced(path: Path) -> bytes:
    other = path.with_name("other")
    other.write_bytes(b"new")
    os.replace(other, path)
    return b"new"


def rewritten(path: Path) -> bytes:
    path.write_bytes(b"longer than it was")
    return b"longer than it was"


def replaced_with_its_times(path: Path) -> bytes:
    found = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"OLD")
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, path)
    return b"OLD"


def in_another_directory(path: Path) -> bytes:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.mkdir()
    path.write_bytes(b"elsewhere")
    return b"elsewhere"


@pytest.mark.parametrize("change", [replaced, rewritten, replaced_with_its_times, in_another_directory])
@pytest.mark.asyncio
async def test_a_changed_file_is_seen_at_once(tmp_path: Path, change: Callable[[Path], bytes]) -> None:
    path = tmp_path / "sub" / "a"
    path.parent.mkdir()
    path.write_bytes(b"old")
    cache = cache_of(tmp_path)
    for _ in range(5):
        await kept(cache, "sub/a")
        expected = change(path)
        assert content(cache, "sub/a") == expected
        path.write_bytes(b"old")
        if (tmp_path / "moved").exists():
            os.unlink(tmp_path / "moved" / "a")
            os.rmdir(tmp_path / "moved")


@pytest.mark.parametrize("how", ["deleted", "forbidden", "a link out", "a directory"])
@pytest.mark.asyncio
async def test_what_is_no_longer_there_is_not_given(tmp_path: Path, how: str) -> None:
    root = tmp_path / "root"
    path = root / "a"
    root.mkdir()
    path.write_bytes(b"old")
    (tmp_path / "secret").write_bytes(b"out")
    cache = cache_of(root)
    await kept(cache, "a")
    if how == "forbidden":
        if os.geteuid() == 0:
            path.unlink()  # nothing is forbidden to root
        else:
            path.chmod(0)
    else:
        path.unlink()
    if how == "a link out":
        path.symlink_to("../secret")
    elif how == "a directory":
        path.mkdir()
    try:
        file = cache.open("a")
    except FileError:
        return
    assert file is None, "a link out is for the slow way to refuse"
    assert how == "a link out"


@pytest.mark.asyncio
async def test_links_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "link").symlink_to("a")
    cache = cache_of(tmp_path)
    for target in ("b", "a", "b"):
        for _ in range(3):
            content(cache, "link")
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to(target)
        assert content(cache, "link") == target.encode()


@pytest.mark.asyncio
async def test_all_is_let_go_in_time_but_what_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    cache = cache_of(tmp_path)
    let_go = await kept(cache, "a")
    await kept(cache, "b")
    used = opened(cache, "b")
    for _ in range(500):
        try:
            os.fstat(let_go)
        except OSError:
            break
        await asyncio.sleep(0.01)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(let_go)
    assert os.pread(used.descriptor, 1, 0) == b"b"
    used.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(used.descriptor)


@pytest.mark.asyncio
async def test_no_more_are_kept_than_allowed(tmp_path: Path) -> None:
    names = [str(number) for number in range(2 * MAX_FILES)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    cache = cache_of(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for name in names:
            assert content(cache, name) == name.encode()
    assert len(os.listdir("/proc/self/fd")) <= before + MAX_FILES


@pytest.mark.asyncio
async def test_what_is_kept_is_closed_with_its_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")

    def in_a_loop_that_ends() -> None:
        async def main() -> None:
            descriptors.append(await kept(cache_of(tmp_path), "a"))

        asyncio.run(main())

    descriptors: list[int] = []
    before = len(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=in_a_loop_that_ends)
    thread.start()
    thread.join()
    assert descriptors
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_one_loop_has_kept_the_next_one_lets_go(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    cache = cache_of(tmp_path)
    descriptor = asyncio.run(kept(cache, "a"))
    os.fstat(descriptor)  # the loop has ended before its second was over

    async def another_request() -> None:
        opened(cache, "b").close()

    asyncio.run(another_request())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_threads_that_end_leave_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    cache = cache_of(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        thread = threading.Thread(target=lambda: asyncio.run(kept(cache, "a")))
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.asyncio
async def test_requests_while_a_file_is_replaced_all_get_one_version(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    cache = cache_of(tmp_path)
    running = True

    def replace() -> None:
        number = 0
        while running:
            number += 1
            other = tmp_path / "other"
            other.write_bytes(bytes([number % 256]) * (100 + number % 50))
            os.replace(other, path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(20_000):
            try:
                file = cache.open("a")
            except dv.FileMissing:
                continue
            if file is None:
                continue
            assert file.metadata.size is not None
            body = os.pread(file.descriptor, 1000, 0)
            assert len(body) == file.metadata.size
            assert len(set(body)) == 1
            file.close()
    finally:
        running = False
        thread.join()
