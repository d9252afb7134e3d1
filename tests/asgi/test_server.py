"""The protocol that sends by `sendfile`: every loop and socket, cold files, and clients that do not read."""

import asyncio
import functools
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from tests.live import ask, ask_raw, live, parse

MIB = 1 << 20
LOOPS = ["asyncio", "uvloop"]
pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["disk", "tmpfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("tmpfs: there is no /dev/shm")
    path = Path("/dev/shm") / f"downloadview-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def big(root: Path) -> Path:
    path = root / "big.bin"
    path.write_bytes(os.urandom(MIB) * 16 + b"the end")
    return path


async def passed_on(request: Any, call_next: Any) -> Any:
    return await call_next(request)


def app_for(root: Path, *middleware: Middleware) -> Starlette:
    async def response(request: Any) -> FileResponse:
        return FileResponse(root / request.path_params["name"])

    return Starlette(
        routes=[
            Route("/ours/{path:path}", dv.Download(dv.PathSource(root))),
            Route("/response/{name}", response),
            Mount("/static", StaticFiles(directory=root)),
        ],
        middleware=list(middleware),
    )


WRAPPED = {
    "plain": [],
    "gzip": [Middleware(GZipMiddleware)],
    "basehttp": [Middleware(BaseHTTPMiddleware, dispatch=passed_on)] * 2,
    "all": [Middleware(BaseHTTPMiddleware, dispatch=passed_on), Middleware(GZipMiddleware)],
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("route", ["ours", "response", "static"])
async def test_whole_files_and_ranges_of_every_response(big: Path, route: str, wrapped: str) -> None:
    content = big.read_bytes()
    async with live(app_for(big.parent, *WRAPPED[wrapped]), http=DownloadProtocol) as port:
        whole = await ask(port, f"/{route}/big.bin")
        assert (whole.status, whole.complete, whole.body == content) == (200, True, True)
        part = await ask(port, f"/{route}/big.bin", headers={"Range": "bytes=1000000-9000000"})
        assert (part.status, part.complete, part.body == content[1000000:9000001]) == (206, True, True)
        head = await ask(port, f"/{route}/big.bin", method="HEAD")
        assert (head.headers["content-length"], head.body) == (str(len(content)), b"")


async def test_the_bytes_do_not_come_by_way_of_python(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    original = os.sendfile

    def counted(*args: Any) -> int:
        sent.append(original(*args))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", counted)
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        for route in ("ours", "response", "static"):
            sent.clear()
            await ask(port, f"/{route}/big.bin")
            assert sum(sent) == big.stat().st_size
        sent.clear()
        await ask(port, "/ours/big.bin", headers={"Range": "bytes=5-3000004"})
        assert sum(sent) == 3_000_000


async def test_a_cold_file(big: Path) -> None:
    content = big.read_bytes()
    with big.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        assert (await ask(port, "/ours/big.bin")).body == content


async def test_requests_that_arrive_together_are_answered_in_order(big: Path) -> None:
    content = big.read_bytes()
    request = b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-%d\r\n%s\r\n"
    requests = [(n * MIB, n * MIB + 100_000 + n) for n in range(8)]
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)
        lines = [request % (start, stop, b"") for start, stop in requests]
        writer.write(b"".join(lines))
        for start, stop in requests:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 206 " in head
            assert await reader.readexactly(stop + 1 - start) == content[start : stop + 1]
        writer.close()


async def test_a_unix_socket(big: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    config = uvicorn.Config(
        app_for(big.parent), uds=path, http=DownloadProtocol, log_config=None, lifespan="off", access_log=False
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = parse(await reader.read())
    writer.close()
    server.should_exit = True
    await task
    assert answer.complete
    assert answer.body == big.read_bytes()


async def test_tls_is_served_in_chunks(big: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil
    import subprocess

    if shutil.which("openssl") is None:
        pytest.skip("TLS: openssl is not installed")
    pem = tmp_path_factory.mktemp("tls") / "pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", f"{pem}.key", "-out", f"{pem}.crt"], check=True, capture_output=True)
    options = {"ssl_keyfile": f"{pem}.key", "ssl_certfile": f"{pem}.crt"}
    async with live(app_for(big.parent), http=DownloadProtocol, **options) as port:
        trusting = ssl.create_default_context(cafile=f"{pem}.crt")
        trusting.check_hostname = False
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = parse(await reader.read())
        writer.close()
    assert answer.complete
    assert answer.body == big.read_bytes()


async def test_a_path_send_without_a_length_is_framed(big: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(big)})

    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/")
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.complete
    assert answer.body == big.read_bytes()


async def test_a_path_send_of_less_than_was_promised_aborts(big: Path) -> None:
    length = str(big.stat().st_size + 1).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.pathsend", "path": str(big)})

    async with live(app, http=DownloadProtocol) as port:
        assert not (await ask(port, "/")).complete
        assert not (await ask_raw(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")).complete


async def test_a_response_that_has_ended_lends_nothing(big: Path) -> None:
    """Some middleware cancels the response while its message is still on the way to the server."""
    ended: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        messages: list[Any] = []
        kept = asyncio.Event()

        async def keep(message: Any) -> None:
            messages.append(message)
            kept.set()

        inner = asyncio.create_task(dv.DownloadResponse(dv.LocalFile(big))(scope, receive, keep))
        while len(messages) < 2:
            kept.clear()
            await kept.wait()
        inner.cancel()
        await asyncio.gather(inner, return_exceptions=True)
        other = os.open("/etc/passwd", os.O_RDONLY)  # takes the number that is free now
        try:
            for message in messages:
                await send(message)
        except dv.TransferAborted:
            ended.append(True)
            raise
        finally:
            os.close(other)

    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/")
    assert not answer.complete
    assert answer.body == b""
    assert ended == [True]


async def test_a_path_that_cannot_be_opened_aborts(big: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.pathsend", "path": f"{big}.none"})

    async with live(app, http=DownloadProtocol) as port:
        assert not (await ask(port, "/")).complete


def small_buffers(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    return client


def endless() -> Any:
    while True:
        yield b"x" * 65536


@pytest.mark.parametrize("path", ["/ours/big.bin", "/endless/x"])
async def test_a_client_that_stops_reading_is_reset_and_holds_nothing(
    big: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_for(big.parent)
    source = dv.VirtualSource(lambda name: dv.VirtualFile(endless, name=name))
    app.router.routes.append(Route("/endless/{name}", dv.Download(source)))
    http = functools.partial(DownloadProtocol, stall_seconds=0.2, minimum_rate=1000)
    async with live(app, http=http) as port:
        await ask(port, "/none")
        before = len(os.listdir("/proc/self/fd"))
        client = small_buffers(port)
        client.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while "took less than 1000 bytes a second" not in caplog.text:
            await asyncio.sleep(0.01)
        while len(os.listdir("/proc/self/fd")) > before + 1:  # the client's own
            await asyncio.sleep(0.01)
        with pytest.raises(ConnectionResetError):
            await drain(client)
        client.close()


async def drain(client: socket.socket) -> int:
    received = 0
    while block := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
        received += len(block)
    return received


async def test_a_client_that_reads_slowly_but_enough_gets_everything(big: Path) -> None:
    os.truncate(big, MIB)
    http = functools.partial(DownloadProtocol, stall_seconds=1, minimum_rate=1000)
    async with live(app_for(big.parent), http=http) as port:
        client = small_buffers(port)
        client.send(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = bytearray()
        while block := await asyncio.get_running_loop().sock_recv(client, 1 << 14):
            received += block
            await asyncio.sleep(0.005)
        client.close()
    assert parse(bytes(received)).complete
