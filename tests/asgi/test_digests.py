"""Repr-Digest of downloads, over real servers: whoever sends the bytes, and whichever part of them."""

import asyncio
import base64
import gzip
import hashlib
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi import checksum
from downloadview_async.asgi.server import DownloadProtocol
from tests.live import ask, live, make_old

pytestmark = pytest.mark.asyncio
Served = Callable[[ASGIApp], AbstractAsyncContextManager[int]]
CONTENT = bytes(range(256)) * 2000


def field(algorithm: str, content: bytes = CONTENT) -> str:
    value = hashlib.new(algorithm.replace("-", ""), content).digest()
    return f"{algorithm}=:{base64.b64encode(value).decode()}:"


@pytest.fixture(params=["auto", DownloadProtocol], ids=["uvicorn", "ours"])
def served(request: pytest.FixtureRequest) -> Served:
    """Serve an application by uvicorn's protocol, or by ours, which sends files by their descriptors."""
    return partial(live, http=request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.bin").write_bytes(CONTENT)
    (files / "small.txt").write_bytes(b"0123456789")
    (files / "small.txt.gz").write_bytes(gzip.compress(b"0123456789"))
    make_old(tmp_path)
    return files


def application(source: dv.Source, digests: dv.Digests, *middleware: Middleware, **options: Any) -> ASGIApp:
    download = dv.Download(source, digests=digests, **options)
    return Starlette(routes=[Route("/files/{path:path}", download)], middleware=list(middleware))


async def test_the_digest_of_the_whole_file_is_sent_with_every_part_of_it(served: Served, root: Path) -> None:
    source = dv.PathSource(root)
    digests = dv.Digests(source, algorithms=["sha-256", "sha-512"])
    await digests.compute("a.bin")
    async with served(application(source, digests)) as port:
        for _ in range(3):  # the second answer is kept, the third comes from a file that is kept open
            whole = await ask(port, "/files/a.bin")
            assert (whole.status, whole.body) == (200, CONTENT)
            assert whole.headers["repr-digest"] == field("sha-256")
        for method, fields, status, algorithm in [
            ("HEAD", {}, 200, "sha-256"),
            ("GET", {"Range": "bytes=5-9"}, 206, "sha-256"),
            ("GET", {"Range": "bytes=5-9,90-99"}, 206, "sha-256"),
            ("GET", {"Want-Repr-Digest": "sha-512=2, sha-256=1"}, 200, "sha-512"),
            ("HEAD", {"Want-Repr-Digest": "sha-512=2, sha-256=1"}, 200, "sha-512"),
            ("GET", {"Want-Repr-Digest": "sha-512=2", "Range": "bytes=5-9"}, 206, "sha-512"),
            ("GET", {"If-None-Match": whole.headers["etag"]}, 304, "sha-256"),
            ("GET", {"Want-Repr-Digest": "sha-512=0, sha-256=0"}, 200, None),
            ("GET", {"Range": f"bytes={len(CONTENT)}-"}, 416, None),
            ("GET", {}, 200, "sha-256"),
        ]:
            answer = await ask(port, "/files/a.bin", method=method, headers=fields)
            digest = None if algorithm is None else field(algorithm)
            assert (answer.status, answer.headers.get("repr-digest")) == (status, digest), fields
        unknown = await ask(port, "/files/small.txt")
        assert (unknown.status, unknown.headers.get("repr-digest")) == (200, None)


async def test_the_first_answer_of_a_process_has_the_digest_that_another_one_has_stored(
    served: Served, root: Path
) -> None:
    source, store = dv.PathSource(root), dv.DigestStore(root.parent / "digests.db")
    try:
        for name in ("a.bin", "small.txt"):
            await dv.Digests(source, store).compute(name)
        async with served(application(source, dv.Digests(source, store))) as port:
            for name in ("a.bin", "small.txt"):
                answer = await ask(port, f"/files/{name}")
                assert answer.headers["repr-digest"] == field("sha-256", (root / name).read_bytes())
            (root / "a.bin").write_bytes(CONTENT[::-1])
            assert "repr-digest" not in (await ask(port, "/files/a.bin")).headers
    finally:
        await store.aclose()


@pytest.mark.parametrize("offload", [None, True])
async def test_a_proxy_gets_the_digest(served: Served, root: Path, offload: bool | None) -> None:
    source = dv.PathSource(root)
    digests = dv.Digests(source, algorithms=["sha-256", "sha-512"])
    await digests.compute("a.bin")
    backend = dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])
    middleware = Middleware(dv.OffloadMiddleware, backend=backend)
    async with served(application(source, digests, middleware, offload=offload)) as port:
        for _ in range(2):
            for want, expected in [
                (None, field("sha-256")),
                ("sha-512=1", field("sha-512")),
                ("sha-256=0, sha-512=0", None),
            ]:
                fields = {"Range": "bytes=0-1", **({} if want is None else {"Want-Repr-Digest": want})}
                answer = await ask(port, "/files/a.bin", headers=fields)
                assert (answer.status, answer.headers["x-accel-redirect"]) == (200, "/_files/a.bin")
                assert answer.headers.get("repr-digest") == expected


async def test_an_encoded_file_has_no_digest(served: Served, root: Path) -> None:
    source = dv.PathSource(root, precompressed=["gzip"])
    digests = dv.Digests(source)
    await digests.compute("small.txt")
    async with served(application(source, digests)) as port:
        for _ in range(2):
            encoded = await ask(port, "/files/small.txt", headers={"Accept-Encoding": "gzip"})
            assert encoded.headers["content-encoding"] == "gzip"
            assert "repr-digest" not in encoded.headers
            plain = await ask(port, "/files/small.txt")
            assert plain.headers["repr-digest"] == field("sha-256", b"0123456789")


async def test_a_file_in_a_storage_is_hashed_after_its_first_download(served: Served) -> None:
    source = dv.StorageSource(dv.MemoryStorage({"a.bin": CONTENT}))
    digests = dv.Digests(source, background=True)
    async with served(application(source, digests)) as port, digests.running():
        assert "repr-digest" not in (await ask(port, "/files/a.bin")).headers
        assert await digests.computed("a.bin", 10)
        for fields in ({}, {"Range": "bytes=-1"}):
            assert (await ask(port, "/files/a.bin", headers=fields)).headers["repr-digest"] == field("sha-256")


async def test_a_source_may_know_the_digests_itself(served: Served) -> None:
    class Hashed(dv.MemoryStorage):
        """A storage that keeps the digest of its only file."""

        @asynccontextmanager
        async def open(self, name: str, request: dv.DownloadRequest | None = None) -> AsyncIterator[Any]:
            async with super().open(name, request or dv.DownloadRequest()) as opened:
                digest = ("sha-256", hashlib.sha256(CONTENT).digest())
                opened.metadata = replace(opened.metadata, digests=(digest,))
                yield opened

    source = dv.StorageSource(Hashed({"a.bin": CONTENT}))
    async with served(Starlette(routes=[Route("/{path:path}", dv.Download(source))])) as port:
        assert (await ask(port, "/a.bin")).headers["repr-digest"] == field("sha-256")


@pytest.mark.parametrize("query, algorithm", [("checksum=sha256", "sha256"), ("a=b&checksum=sha512", "sha512")])
async def test_a_checksum_is_a_line_for_sha256sum(served: Served, root: Path, query: str, algorithm: str) -> None:
    source = dv.PathSource(root)
    digests = dv.Digests(source, background=True, algorithms=["sha-256", "sha-512"])
    async with served(application(source, digests)) as port, digests.running():
        for _ in range(2):
            answer = await ask(port, f"/files/a.bin?{query}")
            assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
            assert answer.headers["cache-control"] == "private, no-store"
            checked = subprocess.run([f"{algorithm}sum", "-c"], input=answer.body, cwd=root, capture_output=True)
            assert checked.stdout == b"a.bin: OK\n"
        head = await ask(port, f"/files/a.bin?{query}", method="HEAD")
        assert (head.status, head.headers["content-length"], head.body) == (200, str(len(answer.body)), b"")


async def test_the_checksums_of_a_folder_are_those_that_are_known(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "_LINES", 1)
    (root / "folder").mkdir()
    for name in ("b.bin", "c.bin", ".hidden"):
        (root / "folder" / name).write_bytes(CONTENT)
    make_old(root)
    source = dv.PathSource(root)
    digests = dv.Digests(source)
    async with served(application(source, digests, listing=True, hide=[".*"])) as port:
        assert (await ask(port, "/files/folder/?checksum=sha256")).body == b""
        for name in ("a.bin", "folder/b.bin", "folder/.hidden"):
            await digests.compute(name)
        line = f"{hashlib.sha256(CONTENT).hexdigest()}  b.bin\n".encode()
        answer = await ask(port, "/files/folder/?checksum=sha256")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert (answer.body, answer.headers["cache-control"]) == (line, "private, no-store")
        await digests.compute("folder/c.bin")
        answer = await ask(port, "/files/folder/?checksum=sha256")
        assert sorted(answer.body.splitlines(True)) == [line, line.replace(b"b.bin", b"c.bin")]
        assert b"  a.bin\n" in (await ask(port, "/files/?checksum=sha256")).body
        head = await ask(port, "/files/folder/?checksum=sha256", method="HEAD")
        assert (head.status, head.body) == (200, b"")
        for path, status in [
            ("folder/?checksum=md5", 400),
            ("none/?checksum=sha256", 404),
            ("none/?checksum=md5", 404),
            ("a.bin?checksum=md5", 400),
            ("none.bin?checksum=md5", 404),
            ("folder?checksum=md5", 308),
        ]:
            assert (await ask(port, f"/files/{path}")).status == status
        assert (await ask(port, "/files/folder?checksum=sha256")).status == 308
    async with served(application(source, digests, listing=True, access=nobody)) as port:
        assert (await ask(port, "/files/folder/?checksum=sha256")).body == b"Not Found"

    async def not_c(request: Any, name: str) -> bool:
        return name != "folder/c.bin"

    async with served(application(source, digests, listing=True, hide=[".*"], access=not_c)) as port:
        for folder in ("folder/", "/folder//"):
            assert (await ask(port, f"/files/{folder}?checksum=sha256")).body == line


async def test_an_archive_has_no_digest_and_the_view_page_of_a_file_has(served: Served, root: Path) -> None:
    source = dv.PathSource(root)
    digests = dv.Digests(source, background=True)
    async with served(application(source, digests, listing=True, archive=True)) as port, digests.running():
        assert b"SHA-256" not in (await ask(port, "/files/small.txt?view")).body
        await digests.compute("small.txt")
        shown = f"SHA-256 <code>{hashlib.sha256(b'0123456789').hexdigest()}</code>"
        assert shown.encode() in (await ask(port, "/files/small.txt?view")).body
        for _ in range(2):
            archive = await ask(port, "/files/?archive=zip")
            assert (archive.status, "repr-digest" in archive.headers) == (200, False)


async def nobody(request: Any, key: str) -> bool:
    return False


async def test_checksums_that_cannot_be_given(served: Served, root: Path) -> None:
    (root / "ä \\.bin").write_bytes(CONTENT)
    source = dv.PathSource(root, names="any")
    digests = dv.Digests(source, background=True)

    async def secret(request: Any, key: str) -> dv.Grant | None:
        return None if key == "secret" else dv.Grant()

    async with served(application(source, digests, access=secret)) as port:
        for path, status in [
            ("a.bin?checksum=sha256", 404),  # nothing runs in the background
            ("a.bin?checksum=md5", 400),
            ("a.bin?checksum=", 400),
            ("missing?checksum=sha256", 404),
            ("a.bin?checksum=sha256&checksum=sha256", 200),
            ("a.bin?xchecksum=sha256", 200),
        ]:
            answer = await ask(port, f"/files/{path}")
            assert answer.status == status, path
            assert (answer.body == CONTENT) == (status == 200)
        hidden = await ask(port, "/files/secret?checksum=sha256")
        assert (hidden.status, hidden.body) == (404, b"Not Found")
        await digests.compute("ä \\.bin")
        answer = await ask(port, "/files/%C3%A4%20%5C.bin?checksum=sha256")
        assert answer.body.decode() == f"\\{hashlib.sha256(CONTENT).hexdigest()}  ä \\\\.bin\n"
        assert (await ask(port, "/files/a.bin?checksum=sha512")).status == 404
    plain = dv.Download(source)
    async with served(Starlette(routes=[Route("/{path:path}", plain)])) as port:
        assert (await ask(port, "/a.bin?checksum=sha256")).body == CONTENT


async def test_the_checksum_of_a_file_that_takes_long_is_for_later(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    class Slow(dv.MemoryStorage):
        """A storage whose files can be described at once, but read only later."""

        @asynccontextmanager
        async def open(self, name: str, request: dv.DownloadRequest | None = None) -> AsyncIterator[Any]:
            request = request or dv.DownloadRequest()
            if request.method == "GET":
                await go_on.wait()
            async with super().open(name, request) as opened:
                yield opened

    monkeypatch.setattr(checksum, "_PATIENCE", 0.05)
    source = dv.StorageSource(Slow({"a.bin": CONTENT}))
    digests = dv.Digests(source, background=True)
    async with served(application(source, digests)) as port, digests.running():
        answer = await ask(port, "/files/a.bin?checksum=sha256")
        assert (answer.status, "retry-after" in answer.headers) == (202, True)
        go_on.set()
        assert await digests.computed("a.bin", 10)
        assert (await ask(port, "/files/a.bin?checksum=sha256")).status == 200
