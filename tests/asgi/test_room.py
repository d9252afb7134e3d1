"""A path send waits for room in the kernel by an `epoll` of ours, or by the transport where there is none."""

import asyncio
import gc
import hashlib
import os
import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvloop
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn import room
from downloadview_async.sources.per_loop import PerLoop
from tests.live import live, make_old

SIZE = 16 << 20
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
each_loop = pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    content = os.urandom(1 << 20) * (SIZE >> 20)
    (tmp_path / "large.bin").write_bytes(content)
    make_old(tmp_path)
    return content


def _app(root: Path) -> Starlette:
    return Starlette(routes=[Route("/files/{path:path}", dv.Download(dv.PathSource(root)))])


@asynccontextmanager
async def asking(port: int) -> AsyncIterator[socket.socket]:
    """Ask for the large file as a client that has little room."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        yield client


async def hash_of_body(client: socket.socket) -> str:
    """Return the hash of the whole answer."""
    loop, received, digest = asyncio.get_running_loop(), b"", hashlib.sha256()
    while b"\r\n\r\n" not in received:
        received += await loop.sock_recv(client, 1 << 16)
    body = received.partition(b"\r\n\r\n")[2]
    count = 0
    while True:
        digest.update(body)
        count += len(body)
        if count >= SIZE:
            return digest.hexdigest()
        body = await loop.sock_recv(client, 1 << 16)
        assert body


def run(new_loop: Callable[[], asyncio.AbstractEventLoop], main: Any) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main)


class Calls:
    """What `os.sendfile` has returned, with -1 for a full socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[int] = []
        self._sendfile = os.sendfile
        monkeypatch.setattr(os, "sendfile", self)

    def __call__(self, *arguments: Any) -> int:
        try:
            sent = self._sendfile(*arguments)
        except BlockingIOError:
            self.results.append(-1)
            raise
        self.results.append(sent)
        return sent


@each_loop
def test_clients_that_read_slowly_get_all_and_few_calls_are_in_vain(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)

    async def main() -> None:
        async with live(_app(tmp_path), http=DownloadProtocol) as port, anyio.create_task_group() as group:

            async def take() -> None:
                async with asking(port) as client:
                    assert await hash_of_body(client) == hashlib.sha256(content).hexdigest()

            for _ in range(5):
                group.start_soon(take)

    run(new_loop, main())
    sent = [result for result in calls.results if result >= 0]
    assert sum(sent) == 5 * SIZE  # the transport has sent none of it
    assert calls.results.count(-1) <= len(sent) / 4, calls.results


@each_loop
def test_without_a_descriptor_for_it_the_transport_waits(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)

    def refused() -> Any:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        monkeypatch.setattr(select, "epoll", refused)  # after the loop has its own
        async with live(_app(tmp_path), http=DownloadProtocol) as port, asking(port) as client:
            assert await hash_of_body(client) == hashlib.sha256(content).hexdigest()

    run(new_loop, main())
    assert SIZE / 2 < sum(result for result in calls.results if result >= 0) < SIZE


@each_loop
def test_a_client_that_stops_for_a_while_is_woken(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_KEPT", 0.02)

    async def main() -> None:
        async with live(_app(tmp_path), http=DownloadProtocol) as port, asking(port) as client:
            await asyncio.sleep(0.3)  # in which the `epoll` would be closed, if nothing waited
            async with asyncio.timeout(30):
                assert await hash_of_body(client) == hashlib.sha256(content).hexdigest()

    run(new_loop, main())


@each_loop
@pytest.mark.parametrize("ending", ["taken", "dropped", "left"])
def test_nothing_stays_open_when_nothing_waits(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    ending: str,
    tmp_path: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_rooms", PerLoop())  # that of another test would be closed meanwhile
    monkeypatch.setattr(room, "_KEPT", 0.02)
    protocol = partial(DownloadProtocol, stall_seconds=0.2 if ending == "dropped" else 60)

    async def main() -> None:
        gc.collect()  # the loops of other tests
        before = _number_of_epolls()
        async with live(_app(tmp_path), http=protocol) as port:
            async with asking(port) as client, asyncio.timeout(30):
                if ending == "taken":
                    await hash_of_body(client)
                elif ending == "dropped":
                    await asyncio.sleep(1)  # takes nothing
                    with pytest.raises((ConnectionResetError, AssertionError)):
                        await hash_of_body(client)
                else:
                    await asyncio.get_running_loop().sock_recv(client, 1 << 16)
            async with asyncio.timeout(30):
                while room._rooms.get(asyncio.get_running_loop()) is not None:
                    await asyncio.sleep(0.02)
            assert _number_of_epolls() == before

    run(new_loop, main())


def _number_of_epolls() -> int:
    names = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum("eventpoll" in name for name in names)
