"""Archives of files of each kind of source: an S3 bucket, other HTTP servers, and generated content."""

import asyncio
import io
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.sources import archive as archive_module
from downloadview_async.testing import call
from tests.live import ask, live
from tests.observed import Observed
from tests.s3 import S3

pytestmark = pytest.mark.asyncio

LARGE = os.urandom(700_000)


@pytest.fixture(autouse=True)
def no_layout_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "SHARED_SECONDS", 0.0)


def unpacked(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


async def check(make: "Make", url: str, files: dict[str, bytes]) -> None:
    """Fetch an archive as a whole, and then its parts from servers that have just been started."""
    async with live(make()) as port:
        whole = await ask(port, url)
        assert whole.status == 200
        assert whole.complete
        assert unpacked(whole.body) == files
    size = len(whole.body)
    for start, stop in ((0, 10), (31, size // 2), (size // 2, size - 1), (size - 200, size)):
        async with live(make()) as port:
            headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": whole.headers["etag"]}
            part = await ask(port, url, headers=headers)
            assert (part.status, part.body == whole.body[start:stop]) == (206, True)


class Make:
    """Makes an endpoint, as a new process would."""

    def __call__(self) -> ASGIApp:
        raise NotImplementedError


async def test_a_bucket(s3: S3) -> None:
    prefix = "archives"
    files = {"d/a.txt": b"a", "d/e/large.bin": LARGE, "d/e/none": b"", "d/größe 文.txt": b"unicode"}
    for name, content in files.items():
        s3.put(f"{prefix}/{name}", content)

    class Bucket(Make):
        def __call__(self) -> ASGIApp:
            return dv.Download(dv.StorageSource(s3.storage(prefix)), archive=True)

    await check(Bucket(), "/d/?archive=zip", files | {"d/": b"", "d/e/": b""})


async def test_an_object_that_is_described_when_it_is_listed_is_opened_once(s3: S3) -> None:
    s3.put("once/d/a.txt", b"a")
    storage = s3.storage("once")
    entries = [entry async for entry in storage.list("d")]
    async with storage.open("d/a.txt") as opened:
        (entry,) = entries
        assert isinstance(entry, dv.DescribedEntry)
        described = entry.describe()
        assert (described.size, described.etag) == (opened.metadata.size, opened.metadata.etag)


async def test_an_object_that_changes_aborts_the_archive(s3: S3) -> None:
    for name in ("a", "b"):
        s3.put(f"changes/d/{name}", LARGE)
    file = await dv.ArchiveSource(dv.StorageSource(s3.storage("changes"))).resolve("d")
    async with file.open() as opened:
        s3.put("changes/d/b", LARGE[::-1])
        with pytest.raises(dv.TransferAborted):
            async for _ in opened.stream(None):
                pass


async def test_files_of_another_server(tmp_path: Path) -> None:
    files = {"a.txt": b"a", "large.bin": LARGE}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1_700_000_000,) * 2)
    async with live(dv.Download(dv.PathSource(tmp_path))) as upstream:

        class Remote(Make):
            def __call__(self) -> ASGIApp:
                source = dv.RemoteSource(f"http://127.0.0.1:{upstream}/", allow_hosts=["127.0.0.1"])

                async def answer(scope: Scope, receive: Receive, send: Send) -> None:
                    try:
                        chosen = [(f"d/{name}", await source.resolve(name)) for name in files]
                        await dv.DownloadResponse(dv.Archive(chosen, name="d.zip"))(scope, receive, send)
                    finally:
                        await source.aclose()

                return answer

        await check(Remote(), "/", {f"d/{name}": content for name, content in files.items()})


class Tables:
    """Generated files with a size, as an application may list them."""

    async def list(self, folder: str = "", /) -> AsyncIterator[dv.Entry]:
        if folder != "tables":
            raise dv.FileMissing(folder)
        for name in ("one.csv", "two.csv"):
            yield dv.Entry(name)

    async def resolve(self, name: str, /) -> dv.AsyncFile:
        async def rows() -> AsyncIterator[str]:
            for number in range(3000):
                yield f"{name},{number:08}\n"

        size = sum(len(f"{name},{number:08}\n") for number in range(3000))
        return dv.VirtualFile(rows, name=name, size=size, etag=dv.ETag(name.replace("/", "-")))


async def test_generated_content_with_a_size() -> None:
    class Generated(Make):
        def __call__(self) -> ASGIApp:
            return dv.Download(Tables(), archive=True)

    names = ["tables/one.csv", "tables/two.csv"]
    files = {name: "".join(f"{name},{number:08}\n" for number in range(3000)).encode() for name in names}
    await check(Generated(), "/tables/?archive=zip", {"tables/": b""} | files)


async def test_the_kernel_sends_cached_files_of_another_server(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        (tmp_path / "files" / name).write_bytes(LARGE)
        os.utime(tmp_path / "files" / name, (1_700_000_000,) * 2)
    cache, checksums = dv.Cache(tmp_path / "cache", max_age=3600), dv.MemoryChecksums()
    async with live(dv.Download(dv.PathSource(tmp_path / "files"))) as upstream:
        remote = dv.RemoteSource(f"http://127.0.0.1:{upstream}/", allow_hosts=["127.0.0.1"])
        source = dv.CachedSource(remote, cache, name="remote")

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            chosen = [(name, await source.resolve(name)) for name in ("a", "b")]
            archive = dv.Archive(chosen, name="d.zip", checksums=checksums, name_in_checksums="remote")
            await dv.DownloadResponse(archive)(scope, receive, send)

        async with live(dv.Download(source)) as port:
            for name in ("a", "b"):
                assert (await ask(port, f"/{name}")).body == LARGE
            while fetches := list(cache._running):
                await asyncio.wait([fetch.task for fetch in fetches])
        app = Observed(answer)
        async with live(app, http=DownloadProtocol) as port:
            bodies = [(await ask(port, "/")).body for _ in range(2)]
        await source.aclose()
    await cache.aclose()
    assert unpacked(bodies[0]) == {"a": LARGE, "b": LARGE}
    assert bodies[0] == bodies[1]
    assert [outcome.kind for outcome in app.outcomes] == ["chunks", "zero-copy"]


def rows(directory: Path, names: list[str]) -> dv.ObjectSource:
    """Rows whose files are in a directory. Their listing tells neither the sizes nor the versions."""

    async def get(key: str) -> SimpleNamespace | None:
        return SimpleNamespace(file=key.rpartition("/")[2]) if key.rpartition("/")[2] in names else None

    async def entries(folder: str) -> AsyncIterator[dv.Entry]:
        if not folder:
            yield dv.Entry("d", is_folder=True)
        for name in names:
            yield dv.Entry(name)

    return dv.ObjectSource(get, source=dv.PathSource(directory), list_folder=entries)


async def test_a_file_that_changes_without_a_sign_in_the_listing_gives_another_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")
    download = dv.Download(rows(tmp_path, ["a.txt"]), archive=True)
    first = await call(download, "/d/", query="archive=zip")
    assert first.status == 200
    file.write_bytes(b"new bytes")
    headers = {"If-None-Match": first.headers["etag"]}
    second = await call(download, "/d/", query="archive=zip", headers=headers)
    assert second.status == 200
    assert unpacked(second.body) == {"d/": b"", "d/a.txt": b"new bytes"}


async def test_a_row_whose_file_does_not_exist_is_left_out_unless_it_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    download = dv.Download(rows(tmp_path, ["a.txt", "gone.txt"]), archive=True)
    answer = await call(download, "/d/", query="archive=zip")
    assert (answer.status, unpacked(answer.body)) == (200, {"d/": b"", "d/a.txt": b"a"})
    chosen = await call(download, "/", query="archive=zip&name=d")
    assert (chosen.status, unpacked(chosen.body)) == (200, {"d/": b"", "d/a.txt": b"a"})
    assert (await call(download, "/", query="archive=zip&name=gone.txt")).status == 404
    (tmp_path / "gone.txt").write_bytes(b"back")
    assert unpacked((await call(download, "/d/", query="archive=zip")).body)["d/gone.txt"] == b"back"
