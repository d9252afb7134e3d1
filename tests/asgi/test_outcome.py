"""Every answer with a file ends in exactly one outcome, whoever made it and whoever sends its bytes."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.background import BackgroundTask
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi import delivery
from downloadview_async.asgi.descriptor_paths import LastingPaths
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.metadata import ByteRange
from downloadview_async.testing import call
from tests.live import ask, live, make_old
from tests.observed import Observed

pytestmark = pytest.mark.asyncio

SMALL = b"the small content"
LARGE = b"%08d" * 50_000 % (*range(50_000),)
HUGE = 64 << 20
NGINX = "x-accel-redirect"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "small.txt").write_bytes(SMALL)
    (tmp_path / "large.bin").write_bytes(LARGE)
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(HUGE)
    make_old(tmp_path)
    return tmp_path


def download(root: Path, **options: Any) -> ASGIApp:
    return dv.Download(dv.PathSource(root), **options)


def behind_nginx(app: ASGIApp, root: Path, **options: Any) -> ASGIApp:
    return dv.OffloadMiddleware(app, dv.XAccelRedirect([dv.Rule(str(root), "/_files/")]), **options)


class Redirects:
    async def headers_for(self, file: dv.AsyncFile, described: Any) -> dict[str, str]:
        return {"location": "https://store.example/large.bin"}


WHOLE = (ByteRange(0, len(LARGE)),)
TABLE: dict[str, tuple[str, dict[str, str], str, tuple[int, str, Any, int]]] = {
    "small": ("/small.txt", {}, "GET", (200, "inline", (ByteRange(0, len(SMALL)),), len(SMALL))),
    "a small part": ("/small.txt", {"Range": "bytes=4-8"}, "GET", (206, "inline", (ByteRange(4, 9),), 5)),
    "HEAD": ("/large.bin", {}, "HEAD", (200, "empty", (), 0)),
    "304": ("/large.bin", {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}, "GET", (304, "empty", (), 0)),
    "416": ("/large.bin", {"Range": "bytes=400000-"}, "GET", (416, "error", (), 0)),
    "404": ("/none", {}, "GET", (404, "error", (), 9)),
    "HEAD of a missing file": ("/none", {}, "HEAD", (404, "error", (), 0)),
}
LARGE_ONES = {
    "large": ("/large.bin", {}, (200, WHOLE, len(LARGE))),
    "a large part": ("/large.bin", {"Range": "bytes=1-300000"}, (206, (ByteRange(1, 300_001),), 300_000)),
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_answers_in_one_message(root: Path, http: Any, case: str) -> None:
    path, headers, method, (status, how, spans, sent) = TABLE[case]
    app = Observed(download(root))
    async with live(app, http=http) as port:
        await ask(port, path, headers=headers, method=method)
    outcome = app.only()
    assert (outcome.status, outcome.kind, outcome.spans, outcome.sent) == (status, how, spans, sent)
    assert (outcome.is_complete, outcome.delegated_to) == (True, None)
    result = "refused" if status >= 400 else "not-modified" if status == 304 else "completed"
    assert (outcome.result, outcome.reason, outcome.name) == (result, None, path[1:])
    assert (outcome.method, outcome.path, outcome.client) == (method, path, "127.0.0.1")


@pytest.mark.parametrize("case", LARGE_ONES)
@pytest.mark.parametrize(
    "http, how", [("httptools", "chunks"), (DownloadProtocol, "zero-copy")], ids=["uvicorn", "ours"]
)
async def test_large_answers(root: Path, http: Any, how: str, case: str) -> None:
    path, headers, (status, spans, sent) = LARGE_ONES[case]
    app = Observed(download(root))
    async with live(app, http=http) as port:
        answer = await ask(port, path, headers=headers)
        assert len(answer.body) == sent
    outcome = app.only()
    assert (outcome.status, outcome.kind, outcome.spans, outcome.sent) == (status, how, spans, sent)
    assert outcome.is_complete


async def test_several_parts(root: Path) -> None:
    app = Observed(download(root))
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/large.bin", headers={"Range": "bytes=0-1,1000-1002"})
    outcome = app.only()
    assert (outcome.status, outcome.kind, outcome.sent) == (206, "chunks", len(answer.body))
    assert outcome.spans == (ByteRange(0, 2), ByteRange(1000, 1003))


@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_a_client_that_leaves(root: Path, http: Any) -> None:
    app = Observed(download(root))
    async with live(app, http=http) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /huge.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readexactly(1 << 20)
        writer.close()
        async with asyncio.timeout(20):
            while not app.outcomes:
                await asyncio.sleep(0.01)
    outcome = app.only()
    assert outcome.status == 200
    assert (outcome.result, outcome.reason) == ("aborted", "client-left")
    assert 1 << 19 < outcome.sent < HUGE


@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_a_file_that_shrinks_is_an_aborted_answer(root: Path, http: Any) -> None:
    async def shrinking(scope: Scope, receive: Receive, send: Send) -> None:
        async def shrink(message: Any) -> None:
            if message["type"] == "http.response.start":
                os.truncate(root / "huge.bin", 1 << 20)
            await send(message)

        await download(root)(scope, receive, shrink)

    app = Observed(shrinking)
    async with live(app, http=http) as port:
        assert not (await ask(port, "/huge.bin")).complete
    outcome = app.only()
    assert (outcome.result, outcome.reason) == ("aborted", "file-changed")
    assert outcome.sent <= 1 << 20


@pytest.mark.parametrize("offload", [None, True])
async def test_an_offloaded_answer(root: Path, offload: bool | None) -> None:
    app = Observed(behind_nginx(download(root, offload=offload), root))
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/large.bin", headers={"Range": "bytes=1-2"})
        assert answer.headers[NGINX] == "/_files/large.bin"
    outcome = app.only()
    assert (outcome.status, outcome.kind, outcome.delegated_to, outcome.sent) == (200, "offloaded:nginx", NGINX, 0)
    assert outcome.is_complete


async def test_an_answer_that_would_be_offloaded_and_whose_file_is_deleted(root: Path) -> None:
    response = dv.DownloadResponse(
        dv.LocalFile(root / "large.bin"), background=BackgroundTask(os.unlink, root / "large.bin")
    )

    async def deleting(scope: Scope, receive: Receive, send: Send) -> None:
        await dv.DownloadResponse(dv.LocalFile(root / "large.bin"))(scope, receive, send)
        (root / "large.bin").unlink()

    for inner in (deleting, response):
        app = Observed(behind_nginx(inner, root))
        async with live(app, http=DownloadProtocol) as port:
            assert (await ask(port, "/large.bin")).body == LARGE
        outcome = app.only()
        assert (outcome.status, outcome.sent, outcome.delegated_to) == (200, len(LARGE), None)
        assert outcome.kind in ("chunks", "zero-copy")
        (root / "large.bin").write_bytes(LARGE)
        make_old(root)


@pytest.mark.parametrize("offload", [None, True])
async def test_an_offload_that_middleware_replaces_is_that_answer(root: Path, offload: bool | None) -> None:
    async def forbidding(scope: Scope, receive: Receive, send: Send) -> None:
        async def forbid(message: Any) -> None:
            await send({**message, "status": 403} if "status" in message else message)

        await dv.DownloadResponse(dv.LocalFile(root / "large.bin"), offload=offload)(scope, receive, forbid)

    app = Observed(behind_nginx(forbidding, root))
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/large.bin")
        assert (answer.status, NGINX in answer.headers) == (403, False)
    outcome = app.only()
    assert (outcome.status, outcome.kind, outcome.result) == (403, "other", "refused")
    assert outcome.delegated_to is None


async def test_a_redirect(root: Path) -> None:
    app = Observed(download(root, redirect=Redirects()))
    async with live(app, http=DownloadProtocol) as port:
        assert (await ask(port, "/large.bin")).status == 307
    outcome = app.only()
    assert (outcome.status, outcome.kind, outcome.delegated_to, outcome.sent) == (307, "redirected", "location", 0)


@pytest.mark.parametrize(
    "http, rule, how",
    [
        ("httptools", True, "offloaded:nginx"),
        (DownloadProtocol, True, "offloaded:nginx"),
        ("httptools", False, "chunks"),
        (DownloadProtocol, False, "zero-copy"),
    ],
)
async def test_responses_of_others(root: Path, http: Any, rule: bool, how: str) -> None:
    source = root if rule else root / "elsewhere"
    nested = behind_nginx(behind_nginx(FileResponse(root / "large.bin"), source, pathsend=True), source, pathsend=True)
    for inner in (behind_nginx(FileResponse(root / "large.bin"), source, pathsend=True), nested):
        app = Observed(inner)
        async with live(app, http=http) as port:
            answer = await ask(port, "/")
            assert (answer.body == LARGE) == (how != "offloaded:nginx")
            outcome = app.only()
            assert (outcome.status, outcome.kind, outcome.sent) == (200, how, len(answer.body))
            assert outcome.is_complete
            await ask(port, "/", method="HEAD")
            outcome = app.only()
            assert (outcome.status, outcome.sent, outcome.result) == (200, 0, "completed")


async def test_a_remote_file_and_generated_content(root: Path) -> None:
    async def generated() -> Any:
        for _ in range(3):
            yield LARGE

    async with live(download(root)) as upstream:
        source = dv.RemoteSource(f"http://127.0.0.1:{upstream}/", allow_hosts=["127.0.0.1"])
        app = Observed(dv.Download(source))
        async with live(app, http=DownloadProtocol) as port:
            assert (await ask(port, "/large.bin")).body == LARGE
            outcome = app.only()
            assert (outcome.kind, outcome.spans, outcome.sent) == ("chunks", WHOLE, len(LARGE))
            assert (await ask(port, "/none")).status == 404
            assert app.only().status == 404
        await source.aclose()
        assert (await ask(upstream, "/small.txt")).status == 200
    respond: Callable[..., Awaitable[None]] = dv.DownloadResponse(dv.VirtualFile(generated, name="a.bin"))
    app = Observed(respond)
    async with live(app, http=DownloadProtocol) as port:
        await ask(port, "/")
    outcome = app.only()
    assert (outcome.kind, outcome.spans, outcome.sent, outcome.reason) == ("chunks", (None,), 3 * len(LARGE), None)


class Slow:
    """A file whose opening tells that it has begun, and waits."""

    name, location = "a.bin", None

    def __init__(self) -> None:
        self.is_opening = asyncio.Event()

    @contextlib.asynccontextmanager
    async def open(self, request: dv.DownloadRequest) -> AsyncIterator[dv.OpenFile]:
        self.is_opening.set()
        await asyncio.Event().wait()
        async with dv.VirtualFile(b"", name=self.name).open() as opened:
            yield opened


@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_a_client_that_leaves_before_its_answer_has_begun(http: Any) -> None:
    file: Any = Slow()
    app = Observed(dv.DownloadResponse(file))
    async with live(app, http=http) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await file.is_opening.wait()
        client = writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets the connection
        writer.transport.abort()
        async with asyncio.timeout(20):
            while not app.outcomes:
                await asyncio.sleep(0.01)
    outcome = app.only()
    assert (outcome.status, outcome.sent, outcome.reason) == (0, 0, "client-left")


async def test_middleware_that_fails_after_an_offloaded_answer_has_left(root: Path) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        async def fail(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                raise ValueError("boom")

        await download(root)(scope, receive, fail)

    app = Observed(behind_nginx(failing, root))
    async with live(app, http=DownloadProtocol) as port:
        await ask(port, "/large.bin")
    assert len(app.outcomes) == 1


async def test_the_status_of_a_response_of_others_without_a_length(root: Path) -> None:
    async def created(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(root / "large.bin")})

    for http, how, sent in (("httptools", "chunks", len(LARGE)), (DownloadProtocol, "zero-copy", len(LARGE))):
        app = Observed(behind_nginx(created, root, pathsend=True))
        async with live(app, http=http) as port:
            assert (await ask(port, "/")).body == LARGE
        outcome = app.only()
        assert (outcome.status, outcome.kind, outcome.sent) == (201, how, sent)


async def test_a_path_that_is_sent_in_chunks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def with_path_send(scope: Scope, receive: Receive, send: Send) -> None:
        extensions: dict[str, Any] = {"http.response.pathsend": {}}
        await download(root)({**scope, "extensions": extensions}, receive, send)

    monkeypatch.setattr(delivery._of_thread, "lasting_paths", LastingPaths(max_kept=0))
    app = Observed(with_path_send)
    async with live(app, http="httptools") as port:
        assert (await ask(port, "/large.bin")).body == LARGE
    outcome = app.only()
    assert (outcome.kind, outcome.sent, outcome.is_complete) == ("chunks", len(LARGE), True)


async def test_the_repr_of_an_outcome_shows_no_secret() -> None:
    seen: list[dv.Outcome] = []
    secrets = ("token-in-the-query", "password-in-the-header")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise ValueError(f"no answer to {scope['query_string']!r} with {scope['headers']!r}")

    headers = {"Authorization": f"Bearer {secrets[1]}", "Cookie": f"session={secrets[1]}"}
    with pytest.raises(ValueError, match="no answer"):
        await call(dv.Accounts(app, observers=[seen.append]), "/a", query=f"token={secrets[0]}", headers=headers)
    assert [(outcome.result, outcome.reason) for outcome in seen] == [("aborted", "failed")]
    assert not [secret for secret in secrets if secret in repr(seen)]
    assert secrets[0] in str(seen[0].detail)  # for those who want it
