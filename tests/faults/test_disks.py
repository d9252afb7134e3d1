"""Disks that fail, answer reads with few bytes, hang, are full, or cannot be written to."""

import asyncio
import errno
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import downloadview_async as dv
from tests.faults import confined
from tests.faults.site import RIGHT, Site, eventually, site, upstream
from tests.slow_fs import SlowDisk, content_of, mounted, why_not

SIZE = (4 << 20) + 3
SETTINGS = """
[sources.fuse]
type = "path"
root = "{root}"
threads = 4
[[routes]]
path = "/fuse/{{path:path}}"
source = "fuse"
"""


@pytest.fixture(scope="module")
def upstream_port() -> Iterator[int]:
    with upstream() as port:
        yield port


@contextmanager
def site_on(disk: SlowDisk, tmp_path: Path, upstream_port: int) -> Iterator[Site]:
    """Run a site with one more source, on a disk of FUSE."""
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    (root := tmp_path / "fuse").mkdir()
    with mounted(disk, root) as mount:
        settings = SETTINGS.format(root=root)
        with site(tmp_path, upstream_port, settings=settings, prefix=mount.prefix, pass_fds=mount.pass_fds) as running:
            try:
                yield running
            finally:
                disk.release()


def open_files(running: Site, *below: str) -> list[str]:
    return [path for path in running.descriptors().elements() if any(f"/{part}" in path for part in below)]


def cached(running: Site) -> list[Path]:
    return list(running.seen_state.glob("cache/*.meta"))


async def answers_counted(running: Site, directory: Path) -> int:
    for file in running.seen_state.glob("accounts.db*"):  # SQLite would resolve the path, and lose the mount
        shutil.copy(file, directory)
    store = dv.CompletionStore(f"sqlite+aiosqlite:///{directory}/accounts.db")
    try:
        return sum(row["answers"] for row in await store.report("file"))
    finally:
        await store.aclose()


def test_a_disk_that_fails_or_reads_little_or_hangs(tmp_path: Path, upstream_port: int) -> None:
    disk = SlowDisk({"file": SIZE, "other": SIZE, "small": 1000}, direct=True)
    content = content_of("file", SIZE)
    with site_on(disk, tmp_path, upstream_port) as running:
        # short reads are not the end
        disk.read_at_most(10_000)
        for path, fields, wanted in (
            ("/fuse/file", (), content),
            ("/fuse/file", ("Range: bytes=5-3000000",), content[5:3_000_001]),
            ("/fuse/small", (), content_of("small", 1000)),
        ):
            answer = running.get(path, *fields)
            assert answer is not None
            assert (answer.complete, answer.body == wanted) == (True, True), (path, fields, running.server.log)
        disk.read_at_most(1 << 20)

        # EIO at the 20th read: the connection is aborted after an exact prefix, with one line in the log
        for asked in range(3):
            disk.fail("read", errno.EIO, after=20)
            answer = running.get("/fuse/file")
            assert answer is not None
            assert (answer.status, answer.complete, content.startswith(answer.body)) == (200, False, True)
            assert 0 < len(answer.body) < SIZE
            running.server.wait_for_log("Transfer aborted", times=asked + 1)
        # at the first read, before the first byte
        disk.fail("read", errno.EIO)
        answer = running.get("/fuse/small")
        assert answer is not None
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        disk.fail("read", 0)
        for operation in ("lookup", "open", "getattr"):
            disk.fail(operation, errno.EIO)
            answer = running.get("/fuse/file")
            assert answer is not None
            assert answer.status == 503, operation
            disk.fail(operation, 0)
        assert running.server.log.count("Transfer aborted") == 3
        assert "Traceback" not in running.server.log
        eventually(lambda: not open_files(running, "fuse/"), lambda: running.descriptors())

        # it hangs: its own four threads wait, its other clients are told soon, and all other sources go on
        disk.hang("open")
        waiting = [threading.Thread(target=running.get, args=("/fuse/small",)) for _ in range(4)]
        for thread in waiting:
            thread.start()
        disk.wait_until_held("open", 4)
        answer = running.get("/fuse/other")
        assert answer is not None
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert running.round() == RIGHT, running.server.log
        disk.release()
        for thread in waiting:
            thread.join()
        answer = running.get("/fuse/other")
        assert answer is not None
        assert answer.body == content_of("other", SIZE)
        assert "Traceback" not in running.server.log


def test_a_full_disk_costs_no_download_and_is_used_again(tmp_path: Path, upstream_port: int) -> None:
    """The cache, the databases and the log are on it."""
    if (missing := confined.why_not()) is not None:
        pytest.skip(missing)
    prefix = confined.confined(confined.tmpfs(tmp_path / "state", "16m"))
    with site(tmp_path, upstream_port, prefix=prefix) as running:
        assert running.round() == RIGHT, running.server.log
        filling = running.seen_state / "filling"
        with suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for _ in range(3):
            assert running.round() == RIGHT, running.server.log
        running.server.wait_for_log("outcomes were lost, because the listener AccessLog has raised: [Errno 28]")
        running.server.wait_for_log("cannot be used, files are sent without being kept: [Errno 28]")
        eventually(lambda: not list(running.seen_state.glob("cache/*.part")), lambda: running.server.log)
        filling.unlink()
        kept = len(cached(running))
        eventually(lambda: running.round() == RIGHT and len(cached(running)) > kept, lambda: running.server.log)
        # what was sent while the database was on a full disk is counted, too
        wanted = 4 * len([name for name in RIGHT if "listing" not in name])
        eventually(lambda: asyncio.run(answers_counted(running, tmp_path)) >= wanted, lambda: running.server.log)
        assert "Traceback" not in running.server.log
        eventually(lambda: not open_files(running, "cache/", "files/"), lambda: running.descriptors())
