"""The watch over clients that are waited for: one timer for all of them. On asyncio alone: uvloop shows no timers."""

import asyncio
import socket
from pathlib import Path
from typing import Any

from downloadview_async.asgi.server import DownloadProtocol
from tests.asgi.test_server import MIB, app_for
from tests.live import live


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
