"""ASGI 2.4: `send` raises `OSError` when the client has left. Each answer then ends in one outcome, and in silence."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message

import downloadview_async as dv
from tests.descriptors import open_paths
from tests.live import make_old
from tests.observed import Observed

pytestmark = pytest.mark.asyncio
LARGE = b"x" * 1_500_000
PATHSEND, ZERO_COPY = "http.response.pathsend", "http.response.zerocopysend"


def download(root: Path, **options: Any) -> ASGIApp:
    return dv.Download(dv.PathSource(root), **options)


def behind_nginx(app: ASGIApp, root: Path, **options: Any) -> ASGIApp:
    return dv.OffloadMiddleware(app, dv.XAccelRedirect([dv.Rule(str(root), "/_files/")]), **options)


def in_starlette(app: ASGIApp, *middleware: Any) -> ASGIApp:
    return Starlette(routes=[Mount("/", app)], middleware=[Middleware(cls, **options) for cls, options in middleware])


async def passed_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


def foreign(root: Path) -> ASGIApp:
    async def endpoint(request: Request) -> FileResponse:
        return FileResponse(root / "large.bin")

    return Starlette(routes=[Route("/large.bin", endpoint)])


def stream(root: Path) -> ASGIApp:
    async def endpoint(request: Request) -> StreamingResponse:
        async def chunks() -> Any:
            for _ in range(5):
                yield b"x" * 100_000

        return StreamingResponse(chunks())

    return Starlette(routes=[Route("/large.bin", endpoint)])


def in_memory(root: Path, **options: Any) -> ASGIApp:
    return dv.Download(dv.StorageSource(dv.MemoryStorage({"large.bin": LARGE})), **options)


BASE = BaseHTTPMiddleware, {"dispatch": passed_on}
LIMITS = dv.Limits(concurrent=1)
OURS: dict[str, tuple[Callable[[Path], ASGIApp], str, dict[str, Any]]] = {
    "inline": (download, "/small.txt", {}),
    "path": (download, "/large.bin", {PATHSEND: {}}),
    "zero copy": (download, "/large.bin", {ZERO_COPY: {}}),
    "chunks": (download, "/large.bin", {}),
    "chunks of memory": (in_memory, "/large.bin", {}),
    "a 404": (download, "/none", {}),
    "an archive": (lambda root: download(root, archive=True), "/?archive=zip", {}),
    "a listing": (lambda root: download(root, listing=True), "/", {}),
    "a listing as JSON": (lambda root: download(root, listing=True), "/?format=json", {}),
    "limits": (lambda root: download(root, limits=LIMITS), "/large.bin", {}),
    "a rate": (lambda root: download(root, limits=dv.Limits(concurrent=1, rate="1GB/s")), "/large.bin", {}),
    "a quota": (lambda root: download(root, limits=dv.Limits(concurrent=1, quota="1GB/day")), "/large.bin", {}),
    "a response": (lambda root: dv.DownloadResponse(dv.LocalFile(root / "large.bin")), "/large.bin", {}),
}
OTHERS: dict[str, tuple[Callable[[Path], ASGIApp], str, dict[str, Any]]] = {
    "offloaded": (lambda root: behind_nginx(download(root), root), "/large.bin", {}),
    "a foreign file, offloaded": (lambda root: behind_nginx(foreign(root), root, pathsend=True), "/large.bin", {}),
    "a foreign file, kept here": (
        lambda root: behind_nginx(foreign(root), root / "x", pathsend=True),
        "/large.bin",
        {},
    ),
    "a foreign file": (foreign, "/large.bin", {}),
    "a foreign file by its path": (foreign, "/large.bin", {PATHSEND: {}}),
    "a foreign stream": (stream, "/large.bin", {}),
    "a foreign file with limits": (lambda root: dv.LimitsMiddleware(foreign(root), LIMITS), "/large.bin", {}),
    "in Starlette": (lambda root: in_starlette(download(root)), "/large.bin", {}),
    "in GZip": (lambda root: in_starlette(download(root), (GZipMiddleware, {})), "/large.bin", {}),
    "in BaseHTTPMiddleware": (lambda root: in_starlette(download(root), BASE), "/large.bin", {}),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "small.txt").write_bytes(b"small")
    (tmp_path / "large.bin").write_bytes(LARGE)
    make_old(tmp_path)
    (tmp_path / "x").mkdir()
    return tmp_path


class Client:
    """Leaves after so many messages: `send` raises then, and `receive` waits for ever."""

    def __init__(self, stays_for: int) -> None:
        self._left = stays_for
        self.messages: list[str] = []
        self.has_left = False

    async def send(self, message: Message) -> None:
        await asyncio.sleep(0)
        if self._left == 0:
            self.has_left = True
            raise ConnectionResetError("the client has left")
        self._left -= 1
        if message["type"] == ZERO_COPY:
            message["file"].fileno()
        self.messages.append(message["type"])

    async def asks(self, app: ASGIApp, target: str, extensions: dict[str, Any]) -> None:
        path, _, query = target.partition("?")
        requests: asyncio.Queue[Message] = asyncio.Queue()
        requests.put_nowait({"type": "http.request"})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"test"), (b"accept-encoding", b"gzip")],
            "client": ("127.0.0.1", 1),
            "extensions": dict(extensions),
        }
        await asyncio.wait_for(app(scope, requests.get, self.send), 20)


@pytest.mark.parametrize("case", [*OURS, *OTHERS])
async def test_one_outcome_and_nothing_else(root: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, target, extensions = (OURS | OTHERS)[case]
    caplog.set_level(logging.WARNING)
    app = Observed(make(root))
    whole = Client(100_000)
    await whole.asks(app, target, extensions)
    completed = app.only()
    is_delegated = completed.result == "delegated"  # its head is all that the proxy needs
    for stays_for in [0] if is_delegated else range(min(3, len(whole.messages))):
        for _ in range(2):  # a place that is not given back would refuse the second
            client = Client(stays_for)
            await client.asks(app, target, extensions)
            assert client.has_left
            outcome = app.only()
            assert (outcome.status, outcome.result, outcome.reason) == (completed.status, "aborted", "client-left")
    await Client(100_000).asks(app, target, extensions)
    assert app.only().result == completed.result
    assert [record.getMessage() for record in caplog.records] == []
    kept = 2 if PATHSEND in extensions else 1  # for the next request, and for a server that opens its path later
    assert open_paths().count(str(root / "large.bin")) <= kept


@pytest.mark.parametrize("case", OURS)
async def test_without_accounts_the_server_gets_no_error_of_its_own_back(root: Path, case: str) -> None:
    make, target, extensions = OURS[case]
    client = Client(1)
    await client.asks(make(root), target, extensions)
    assert client.has_left


async def test_an_error_of_the_file_is_raised(root: Path) -> None:
    class Broken(dv.LocalFile):
        def open(self, request: Any = None) -> Any:
            raise OSError("the disk")

        open_nowait: Any = None

    with pytest.raises(OSError, match="the disk"):
        await Client(9).asks(dv.DownloadResponse(Broken(root / "large.bin")), "/large.bin", {})


async def test_a_background_task_runs_after_the_client_has_left(root: Path) -> None:
    ran = asyncio.Event()
    response = dv.DownloadResponse(dv.LocalFile(root / "large.bin"), background=BackgroundTask(ran.set))
    await Client(1).asks(response, "/large.bin", {})
    assert ran.is_set()
