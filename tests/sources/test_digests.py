"""The digests of files: kept in a store, read from sidecars, computed in the background."""

import asyncio
import contextlib
import hashlib
import os
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

import downloadview_async as dv
from downloadview_async.http.digest import ALGORITHMS
from downloadview_async.http.digest import Digests as Values
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.digests.sidecar import checksum_line, parse_sidecar
from tests.live import make_old

pytestmark = pytest.mark.asyncio
CONTENT = bytes(range(256)) * 8192 + b"the end"
HEX = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64
SHA256 = ("sha-256", hashlib.sha256(CONTENT).digest())
SHA512 = ("sha-512", hashlib.sha512(CONTENT).digest())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_bytes(CONTENT)
    make_old(tmp_path)
    return tmp_path / "files"


@asynccontextmanager
async def stored(root: Path) -> AsyncIterator[dv.DigestStore]:
    store = dv.DigestStore(root.parent / "digests.db")
    try:
        yield store
    finally:
        await store.aclose()


async def found_for(digests: dv.Digests, name: str = "a.bin") -> Values:
    async with (await digests.source.resolve(name)).open() as opened:
        return (await digests.find(name, opened)).digests


@pytest.mark.parametrize(
    "text, digest",
    [
        (f"{HEX}  a.bin\n", HEX),
        (f"{HEX}  a.bin", HEX),
        (f"{HEX} *a.bin\r\n", HEX),
        (f"{HEX.upper()}  a.bin\n", HEX),
        (f"{HEX}  ./dist/a.bin\n", HEX),
        (f"{HEX}\n", HEX),
        (f"{OTHER}  b.bin\n{HEX}  a.bin\n", HEX),
        (f"{HEX}  a.bin\n{HEX}  old/a.bin\n", HEX),
        # not about this file, or not certainly
        (f"{HEX}  b.bin\n", None),
        (f"{HEX}  xa.bin\n", None),
        (f"{HEX}  a.bin\n{OTHER}  old/a.bin\n", None),
        (f"{HEX}\n{HEX}  a.bin\n", None),
        (f"{HEX}  a.bin\n\nhello\n", None),
        (f"{HEX[1:]}  a.bin\n", None),
        (f"{HEX}0  a.bin\n", None),
        (f"{HEX}\ta.bin\n", None),
        (f"SHA256 (a.bin) = {HEX}\n", None),
        ("", None),
        ("<html>404</html>", None),
    ],
)
async def test_the_lines_of_a_sidecar(text: str, digest: str | None) -> None:
    expected = () if digest is None else (("sha-256", bytes.fromhex(digest)),)
    assert parse_sidecar(text, "a.bin") == expected


@pytest.mark.parametrize("name", ["a.bin", "ä b", "back\\slash", "new\nline", "re\rturn", "\\n", " a "])
async def test_a_line_is_that_of_sha256sum(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENT)
    line = checksum_line(SHA256[1], name)
    assert subprocess.check_output(["sha256sum", name], cwd=tmp_path).decode() == line
    assert parse_sidecar(line, name) == (SHA256,)


async def test_a_sidecar_has_the_digest_of_its_file(root: Path) -> None:
    sidecar = root / "a.bin.sha256"
    sidecar.write_text(f"{HEX}  a.bin\n")
    assert await found_for(dv.Digests(dv.PathSource(root), sidecars=True)) == (SHA256,)
    assert await found_for(dv.Digests(dv.PathSource(root))) == ()
    # older by its modification time
    os.utime(sidecar, (1, 1))
    assert await found_for(dv.Digests(dv.PathSource(root), sidecars=True)) == ()


async def test_a_sidecar_of_a_replaced_file_is_ignored_whatever_the_times_of_the_new_file(root: Path) -> None:
    (root / "a.bin.sha256").write_text(f"{HEX}  a.bin\n")
    before = (root / "a.bin.sha256").stat().st_ctime_ns
    while True:  # until the clock of the file system has advanced
        new = root / "new"
        new.write_bytes(CONTENT[::-1])
        os.utime(new, (1_600_000_000,) * 2)  # as `cp -p` and `rsync -t` do
        if new.stat().st_ctime_ns > before:
            break
    new.replace(root / "a.bin")
    assert await found_for(dv.Digests(dv.PathSource(root), sidecars=True)) == ()


@pytest.mark.parametrize("content", ["", "x", f"{OTHER}  b.bin\n", f"{HEX}  a.bin\n" * 2000])
async def test_another_file_with_the_name_of_a_sidecar(root: Path, content: str) -> None:
    (root / "a.bin.sha256").write_text(content)
    assert await found_for(dv.Digests(dv.PathSource(root), sidecars=True)) == ()


async def test_a_computed_digest_is_kept_for_its_version_alone(root: Path) -> None:
    async with stored(root) as store:
        digests = dv.Digests(dv.PathSource(root), store, algorithms=["sha-512", "sha-256"])
        assert await found_for(digests) == ()
        counted: list[int] = []
        described = await digests.compute(".//a.bin", progress=counted.append)
        assert described is not None
        assert described.digests == (SHA256, SHA512)
        assert sum(counted) == len(CONTENT)
        again = dv.Digests(dv.PathSource(root), store)
        assert await found_for(again) == (SHA256, SHA512)
        assert await found_for(again, "./a.bin") == (SHA256, SHA512)
        assert await found_for(dv.Digests(dv.PathSource(root), store, name="others")) == ()
        os.utime(root / "a.bin", (1_600_000_000,) * 2)
        assert await found_for(again) == ()
        assert await found_for(dv.Digests(dv.PathSource(root), store)) == ()
        # the version before is forgotten once another one is known
        await again.compute("a.bin")
        make_old(root)
        assert await found_for(dv.Digests(dv.PathSource(root), store)) == ()


async def test_a_digest_that_is_known_is_not_computed_again(root: Path) -> None:
    async with stored(root) as store:
        await dv.Digests(dv.PathSource(root), store).compute("a.bin")
        file = root / "a.bin"
        file.write_bytes(CONTENT[::-1])
        make_old(root)  # with the old size and time, this is the same version by its entity tag
        described = await dv.Digests(dv.PathSource(root), store).compute("a.bin")
        assert described is not None
        assert described.digests == (SHA256,)


@pytest.mark.parametrize("mtime", [0, 1, 1_580_601_600])
async def test_a_file_without_a_strong_tag_has_no_digest(root: Path, mtime: int) -> None:
    os.utime(root / "a.bin", (mtime, mtime))
    (root / "a.bin.sha256").write_text(f"{HEX}  a.bin\n")
    digests = dv.Digests(dv.PathSource(root), sidecars=True)
    assert await found_for(digests) == ()
    assert await digests.compute("a.bin") is None


async def test_content_that_is_made_on_demand_is_not_hashed() -> None:
    async def make(name: str) -> dv.VirtualFile:
        return dv.VirtualFile(CONTENT, name=name)

    assert await dv.Digests(dv.VirtualSource(make)).compute("a.bin") is None


async def test_the_files_of_a_storage() -> None:
    digests = dv.Digests(dv.StorageSource(dv.MemoryStorage({"a.bin": CONTENT})))
    described = await digests.compute("a.bin")
    assert described is not None
    assert described.digests == (SHA256,)
    assert await found_for(digests) == (SHA256,)


async def test_a_file_that_changes_while_it_is_hashed_has_no_digest(root: Path) -> None:
    file = root / "a.bin"

    def change(size: int) -> None:
        file.write_bytes(CONTENT[::-1])

    def cut(size: int) -> None:
        os.truncate(file, 10)

    for damage in (change, cut):
        file.write_bytes(CONTENT * 9)  # more than one part
        make_old(root)
        assert await dv.Digests(dv.PathSource(root)).compute("a.bin", progress=damage) is None


async def test_a_requested_file_is_hashed_in_the_background_once(root: Path) -> None:
    async with stored(root) as store:
        digests = dv.Digests(dv.PathSource(root), store, background=True)
        async with digests.running():
            assert await found_for(digests) == ()
            assert await digests.computed("./a.bin", 10)
            assert await found_for(digests) == (SHA256,)
        assert await found_for(dv.Digests(dv.PathSource(root), store)) == (SHA256,)


async def test_nothing_is_hashed_unless_it_is_wanted(root: Path) -> None:
    for options in ({"background": False}, {"background": True, "max_bytes": len(CONTENT) - 1}):
        digests = dv.Digests(dv.PathSource(root), **options)
        assert await found_for(digests) == ()  # outside of `running`
        async with digests.running():
            assert await found_for(digests) == ()
            assert not digests._background.get().waiting


async def test_each_event_loop_computes_what_its_own_requests_ask_for(root: Path) -> None:
    (root / "b.bin").write_bytes(CONTENT)
    make_old(root)
    digests = dv.Digests(dv.PathSource(root), background=True)
    is_open, is_over = threading.Event(), threading.Event()

    async def other_loop() -> Values:
        async with digests.running():
            is_open.set()
            await asyncio.to_thread(is_over.wait, 30)
            assert await digests.computed("b.bin", 30)
            return await found_for(digests, "b.bin")

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, other_loop()))
    try:
        await asyncio.to_thread(is_open.wait, 30)
        with anyio.fail_after(10):
            assert await digests.computed("a.bin", 30)
        assert await found_for(digests) == ()  # this event loop computes nothing yet
        async with digests.running():
            with anyio.fail_after(10):
                assert await digests.computed("a.bin", 30)
            assert await found_for(digests) == (SHA256,)
    finally:
        is_over.set()
    assert await other == (SHA256,)


async def test_a_file_that_cannot_be_hashed_does_not_end_the_background(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = dv.Digests(dv.PathSource(root), background=True)
    async with digests.running():
        assert await digests.computed("missing.bin", 10)
        assert "'missing.bin'" in caplog.text
        assert await digests.computed("a.bin", 10)
        assert await found_for(digests) == (SHA256,)


async def test_a_store_that_fails_hides_no_file(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root.parent / "digests.db").write_bytes(b"not a database" * 100)
    async with stored(root) as store:
        (root / "a.bin.sha256").write_text(f"{HEX}  a.bin\n")
        assert await found_for(dv.Digests(dv.PathSource(root), store, sidecars=True)) == (SHA256,)
    assert "The store of digests fails" in caplog.text


@pytest.mark.parametrize("damage", ["removed", "corrupt", "read-only", "locked"])
async def test_a_digest_that_cannot_be_stored_is_kept_in_memory(
    root: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = root.parent / "digests.db"
    async with stored(root) as store, contextlib.AsyncExitStack() as stack:
        digests = dv.Digests(dv.PathSource(root), store, background=True)
        await stack.enter_async_context(digests.running())
        if damage == "corrupt":
            path.write_bytes(b"not a database" * 100)
        else:
            assert await found_for(dv.Digests(dv.PathSource(root), store)) == ()  # the store is in use
        if damage == "removed":
            path.unlink()
        elif damage == "locked":
            other = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            other.execute("BEGIN IMMEDIATE")
        elif damage == "read-only":
            await store._file.rows("PRAGMA query_only = ON")
        assert await digests.computed("a.bin", 20)
        assert "The digest of 'a.bin' in 'files' is not " in caplog.text
        assert await found_for(digests) == await found_for(digests, "./a.bin") == (SHA256,)


async def test_a_file_that_has_changed_since_it_was_opened_has_no_digest(root: Path) -> None:
    file = root / "a.bin"
    for changed in (CONTENT[::-1], CONTENT * 2):
        file.write_bytes(CONTENT)
        make_old(root)

        class Changing:
            """A source whose file changes after it was opened."""

            async def resolve(self, name: str, /) -> dv.AsyncFile:
                return self

            name = "a.bin"
            location = None

            @asynccontextmanager
            async def open(self, request: DownloadRequest = GET) -> AsyncIterator[dv.OpenFile]:
                async with (await dv.PathSource(root).resolve("a.bin")).open(request) as opened:
                    file.write_bytes(changed)  # noqa: B023
                    yield opened

        assert await dv.Digests(Changing()).compute("a.bin") is None


async def test_hashing_leaves_the_page_cache_as_it_was(root: Path) -> None:
    file = root / "a.bin"
    file.write_bytes(CONTENT)
    make_old(root)
    with contextlib.closing(os.fdopen(os.open(file, os.O_RDONLY), "rb")) as held:
        os.fsync(held.fileno())
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def is_cached(offset: int) -> bool:
            try:
                return os.preadv(held.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
            except OSError:
                return False

        middle = len(CONTENT) // 2
        if is_cached(middle):
            pytest.skip("this file system keeps its files in memory")
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        await dv.Digests(dv.PathSource(root)).compute("a.bin")
        assert not is_cached(middle)
        file.read_bytes()
        await dv.Digests(dv.PathSource(root)).compute("a.bin")
        assert is_cached(middle)


@pytest.mark.parametrize("algorithms", [[], ["md5"], "sha-256", ["sha-256", "crc32"]])
async def test_algorithms_that_are_refused(root: Path, algorithms: list[str]) -> None:
    with pytest.raises(dv.ConfigurationError, match=", ".join(ALGORITHMS)):
        dv.Digests(dv.PathSource(root), algorithms=algorithms)


async def test_many_lookups_at_once(root: Path) -> None:
    async with stored(root) as store:
        digests = dv.Digests(dv.PathSource(root), store, background=True)
        async with digests.running():
            results = await asyncio.gather(*(found_for(digests) for _ in range(50)))
            assert set(results) <= {(), (SHA256,)}
            assert await digests.computed("a.bin", 10)
