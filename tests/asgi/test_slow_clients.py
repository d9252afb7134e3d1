"""Clients that take too little, at every end of a connection: nothing of them stays in the process or the kernel."""

import asyncio
import contextlib
import functools
import itertools
import os
import select
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.asgi import deadline
from downloadview_async.asgi.uvicorn import protocol as module
from downloadview_async.asgi.uvicorn.protocol import DownloadProtocol
from tests.asgi.test_server import CLOSE, MIB, app_for, endless, get, sipped, small_buffers
from tests.asgi.ways import WAYS
from tests.live import ask, live, parse, uvicorn_for

LOOPS = ["asyncio", "uvloop"]
pytestmark = pytest.mark.asyncio

TRANSPORTS = ["plain", "TLS", "Unix"]
PATHS = ["/ours/big.bin", "/ours/small.bin", "/text/20000", "/text/3000000", "/generated", "/virtual/x", "/folder/"]
REQUESTS = {
    "keep-alive": ("1.1", ("X-None: 1",), 1),
    "pipelined": ("1.1", ("X-None: 1",), 3),
    "close": ("1.1", (CLOSE,), 1),
    "HTTP/1.0": ("1.0", ("X-None: 1",), 1),
    "a body that is not read": ("1.1", ("Content-Length: 90000000",), 1),
}
_LEFT_TO_THE_CLIENT = (5, 6)  # FIN-WAIT-2 and TIME-WAIT: nothing is queued any more


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("root")
    (path / "big.bin").write_bytes(os.urandom(MIB) * 16)
    (path / "small.bin").write_bytes(bytes(60_000))
    (path / "folder").mkdir()
    for number in range(6):
        (path / "folder" / f"{number}.bin").write_bytes(bytes(MIB))
    return path


def app(root: Path) -> Any:
    async def text(request: Request) -> Response:
        return PlainTextResponse(b"x" * int(request.path_params["size"]))

    async def generated(request: Request) -> Response:
        return StreamingResponse(iter([b"x" * 65536] * 100))

    served = app_for(root)
    virtual = dv.VirtualSource(lambda name: dv.VirtualFile(endless, name=name))
    served.router.routes += [
        Route("/text/{size}", text),
        Route("/generated", generated),
        Route("/virtual/{name}", dv.Download(virtual)),
        Route("/folder/{path:path}", dv.Download(dv.PathSource(root / "folder"), archive=True)),
    ]
    return served


class Place:
    """Where a server listens, and how clients come there: with small buffers, unless `is_slow` is false."""

    def __init__(self, transport: str, directory: Path, certificate: dict[str, str], *, is_slow: bool = True) -> None:
        self.transport = transport
        self._is_slow = is_slow
        self.options = certificate if transport == "TLS" else {}
        self.listener = socket.socket(socket.AF_UNIX if transport == "Unix" else socket.AF_INET)
        self.listener.bind(str(directory / "socket") if transport == "Unix" else ("127.0.0.1", 0))
        self.listener.listen(500)
        self.address = self.listener.getsockname()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE

    def connect(self) -> socket.socket:
        """Return a connected client."""
        client = socket.socket(self.listener.family)
        if self._is_slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(self.address)
        return self._context.wrap_socket(client) if self.transport == "TLS" else client

    def asking(self, request: bytes, *, half_closes: bool = False) -> socket.socket:
        """Return a client that has sent a request, and reads nothing of the answer."""
        client = self.connect()
        client.sendall(request)
        if half_closes:
            client.shutdown(socket.SHUT_WR)
        return client

    def held(self) -> dict[int, int]:
        """Return what the kernel holds for clients: by their ports, the bytes in the queues of the server's sockets."""
        if self.transport == "Unix":
            return {}
        port = self.address[1]
        found = {}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, ours, theirs, state, queues, *_ = line.split()
            client = int(theirs.rpartition(":")[2], 16)
            if int(ours.rpartition(":")[2], 16) == port and client and int(state, 16) not in _LEFT_TO_THE_CLIENT:
                found[client] = int(queues.partition(":")[0], 16)
        return found


@contextlib.asynccontextmanager
async def served(
    transport: str, root: Path, directory: Path, certificate: dict[str, str], **watch: Any
) -> AsyncIterator[Place]:
    place = Place(transport, directory, certificate)
    with place.listener:
        http = functools.partial(DownloadProtocol, **watch)
        async with uvicorn_for(app(root), sockets=[place.listener], http=http, timeout_keep_alive=0.2, **place.options):
            yield place


def sips(clients: list[socket.socket]) -> None:
    """Read a byte of each client, if there is one: that is far less than the minimum rate."""
    for client in clients:
        if select.select([client], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                client.recv(1)


def requests(name: str) -> Iterator[bytes]:
    version, lines, count = REQUESTS[name]
    for path in PATHS:
        target = f"{path}?archive=zip" if path == "/folder/" else path
        yield get(target, *lines, version=version) * count


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_nothing_stays_of_clients_that_take_too_little(
    root: Path,
    tmp_path: Path,
    certificate: dict[str, str],
    transport: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.3)
    watch = {"stall_seconds": 0.5, "minimum_rate": 10_000}
    async with served(transport, root, tmp_path, certificate, **watch) as place:
        before = len(os.listdir("/proc/self/fd"))

        def ask() -> list[socket.socket]:
            ways = [False] if transport == "TLS" else [False, True]  # asyncio ends TLS in both directions at once
            asked = itertools.product(itertools.chain.from_iterable(map(requests, REQUESTS)), ways)
            return [place.asking(request, half_closes=half_closes) for request, half_closes in asked]

        clients = await asyncio.to_thread(ask)
        async with asyncio.timeout(100):
            # the server may not have accepted a client yet: so at least one has to be dropped first
            while (
                "took less than 10000 bytes a second" not in caplog.text
                or place.held()
                or len(os.listdir("/proc/self/fd")) > before + len(clients)
            ):
                await asyncio.sleep(0.05)
                sips(clients[::3])
        for client in clients:
            client.close()
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize("transport, half_closes", [("plain", False), ("plain", True), ("TLS", False), ("Unix", True)])
async def test_the_last_answer_has_the_time_that_the_minimum_rate_allows(
    root: Path, tmp_path: Path, certificate: dict[str, str], transport: str, half_closes: bool
) -> None:
    async with served(transport, root, tmp_path, certificate, stall_seconds=1, minimum_rate=1000) as place:
        client = await asyncio.to_thread(place.asking, get("/text/120000", CLOSE), half_closes=half_closes)

        def read() -> bytes:
            received = b""
            while block := client.recv(1024):
                received += block
                select.select([], [], [], 0.02)
            return received

        if transport == "TLS":
            received = await asyncio.to_thread(read)
        else:
            client.setblocking(False)
            received = await sipped(client, 1024, 0.02)
        client.close()
    assert parse(received).body == b"x" * 120_000


@pytest.mark.parametrize("transport", ["plain", "TLS"])
@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\n", get("/text/5")])
async def test_who_never_says_that_it_has_seen_the_end_is_not_waited_for(
    root: Path,
    tmp_path: Path,
    certificate: dict[str, str],
    transport: str,
    begun: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.3)
    async with served(transport, root, tmp_path, certificate, stall_seconds=0.3) as place:
        before = len(os.listdir("/proc/self/fd"))
        client = await asyncio.to_thread(place.asking, begun)
        async with asyncio.timeout(20):  # asyncio itself waits for 30 seconds
            while place.held() or len(os.listdir("/proc/self/fd")) > before + 1:
                await asyncio.sleep(0.02)
        client.close()


@pytest.mark.parametrize("is_shutting_down", [False, True])
async def test_the_kernel_does_not_keep_what_a_closed_socket_had_left(
    root: Path, tmp_path: Path, certificate: dict[str, str], is_shutting_down: bool
) -> None:
    """A shutdown leaves the rest of a last answer to the kernel, which then has the limit of a stalled client."""
    async with served("plain", root, tmp_path, certificate, stall_seconds=2, minimum_rate=1) as place:
        client = await asyncio.to_thread(place.asking, get("/text/20000", CLOSE))
        while not any(place.held().values()):
            await asyncio.sleep(0.01)
        if not is_shutting_down:
            client.close()
    if is_shutting_down:
        assert any(place.held().values())
    async with asyncio.timeout(30):
        while place.held():
            await asyncio.sleep(0.05)
    client.close()


@pytest.mark.parametrize("http", ["httptools", "h11"])
@pytest.mark.parametrize("path", ["/ours/big.bin", "/virtual/x", "/folder/?archive=zip", "/response/big.bin"])
async def test_another_server_has_a_deadline_for_each_chunk(
    root: Path, http: Any, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The application, its file and its slot are free then; the server closes the connection in its own way."""
    monkeypatch.setattr(deadline, "STALL_SECONDS", 0.2)
    outcomes: asyncio.Queue[dv.Outcome] = asyncio.Queue()
    offload = dv.OffloadMiddleware(app(root), dv.XAccelRedirect([dv.Rule(str(root / "none"), "/none/")]), pathsend=True)
    async with live(dv.Accounts(offload, [outcomes.put]), http=http) as port:
        assert (await ask(port, "/ours/small.bin")).complete
        await outcomes.get()
        before = len(os.listdir("/proc/self/fd"))
        client = small_buffers(port)
        client.send(get(path))
        outcome = await asyncio.wait_for(outcomes.get(), 30)
        assert (outcome.result, outcome.reason) == ("aborted", "stalled")
        while len(os.listdir("/proc/self/fd")) > before + 2:  # both ends of the connection
            await asyncio.sleep(0.01)
        assert not parse(await received_by(client)).complete


def impatient_app() -> Any:
    """Make the application of a server process: it prints how its answers have ended."""
    deadline.STALL_SECONDS = 0.5
    source = dv.VirtualSource(lambda name: dv.VirtualFile(endless, name=name))
    return dv.Accounts(Starlette(routes=[Route("/{name}", dv.Download(source))]), [_print])


def _print(outcome: dv.Outcome) -> None:
    print(outcome.result, outcome.reason, flush=True)


@pytest.mark.parametrize("way", ["path send, granian", "chunks, hypercorn"])
async def test_granian_and_hypercorn_have_it_too(way: str, tmp_path: Path) -> None:
    with WAYS[way].serving(f"{__name__}:impatient_app", log=tmp_path / "log") as server:
        client = small_buffers(int(server.address))
        client.send(get("/x"))
        await asyncio.to_thread(server.wait_for_log, "aborted stalled")
        client.close()


async def received_by(client: socket.socket) -> bytes:
    """Read all that still comes, and close."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while block := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            received += block
    client.close()
    return bytes(received)


async def test_a_deadline_is_for_each_chunk_and_not_for_the_whole_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "STALL_SECONDS", 0.5)  # a chunk has two seconds, and the answer takes four
    async with live(app(root), http="h11") as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.setblocking(False)
        client.send(get("/ours/big.bin", CLOSE))
        assert parse(await sipped(client, 1 << 16, 0.015)).complete
