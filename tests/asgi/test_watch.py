"""The watch over clients that are waited for: one timer for all of them. On asyncio alone: uvloop shows no timers."""

import asyncio
import functools
import socket
from pathlib import Path
from typing import Any

import pytest

from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn import watchdog
from tests.asgi.test_server import MIB, app_for
from tests.live import live, uvicorn_for


async def read_slowly(port: int) -> int:
    """Download the file by little sips, so that the server has to wait again and again. Return the bytes that came."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection)
    writer.write(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = 0
    while block := await reader.read(64 << 10):
        received += len(block)
        for _ in range(8):  # turns of the loop in which the server goes on, until nothing more fits
            await asyncio.sleep(0)
    writer.close()
    return received


def test_one_timer_watches_a_client_however_often_it_pauses(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    pauses: list[None] = []

    class Counting(DownloadProtocol):
        def pause_writing(self) -> None:
            pauses.append(None)
            super().pause_writing()

    async def main() -> int:
        loop: Any = asyncio.get_running_loop()
        async with live(app_for(tmp_path), http=Counting) as port:
            before = len(loop._scheduled)
            while len(pauses) < 50:
                assert await read_slowly(port) > 16 * MIB
            return len([timer for timer in loop._scheduled if not timer.cancelled()]) - before

    assert asyncio.run(main()) < 10


class Clock:
    """A clock that stands still until it is set. times_read: how often it was asked for the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times_read = 0

    def __call__(self) -> float:
        self.times_read += 1
        return self.now


@pytest.mark.parametrize(
    "family, again, end", [(socket.AF_INET, 0.15, 0.25), (socket.AF_UNIX, 0.001, 0.2005)], ids=["TCP", "Unix"]
)
def test_a_client_has_its_whole_time_after_it_has_taken_all_that_waited(
    family: socket.AddressFamily, again: float, end: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    clock = Clock()
    monkeypatch.setattr(watchdog, "monotonic", clock)
    connections: list[DownloadProtocol] = []

    def made(*args: Any, **options: Any) -> DownloadProtocol:
        connections.append(DownloadProtocol(*args, **options))
        return connections[-1]

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def read(client: socket.socket) -> None:
            count = 4 * MIB
            while count > 0:
                count -= len(await loop.sock_recv(client, 64 << 10))
            while not connections[0].flow.write_paused:
                await asyncio.sleep(0)

        http: Any = functools.partial(made, stall_seconds=0.2, minimum_rate=10**9)
        with socket.socket(family) as listener, socket.socket(family) as client:
            listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "socket"))
            listener.listen()
            async with uvicorn_for(app_for(tmp_path), sockets=[listener], http=http):
                client.setblocking(False)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)  # else it takes nothing for a while
                await loop.sock_connect(client, listener.getsockname())
                await loop.sock_sendall(client, b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
                await read(client)
                clock.now = again
                await read(client)
                clock.now = end
                looks = clock.times_read + 3
                while clock.times_read < looks and not connections[0].is_stalled:
                    await asyncio.sleep(0.01)
                assert not connections[0].is_stalled
                client.close()

    asyncio.run(main())
