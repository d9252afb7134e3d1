"""Files that are written to in place, cut or replaced while they are sent: no complete body has bytes of two versions.

FAULT_ROUNDS is the number of downloads in each case: FAULT_ROUNDS=1000 with `--timeout 0` takes an hour.
"""

import asyncio
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import Accounts, Outcome
from downloadview_async.asgi.uvicorn.protocol import DownloadProtocol
from tests.asgi.test_server import CLOSE, MIB, app_for, get
from tests.asgi.test_slow_clients import TRANSPORTS, Place
from tests.live import parse, uvicorn_for

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "10"))
SETTLED = 0.02  # seconds after which a change counts as complete, although a write may still be under way
SIZES = {"inline": 40_000, "copied": 300_000, "by page": 6 * MIB}


def written_in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def cut(path: Path, content: bytes) -> None:
    os.truncate(path, len(content) // 3)
    written_in_place(path, content)


def replaced(path: Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content)
    other.rename(path)


def removed(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def grown(path: Path, content: bytes) -> None:
    replaced(path, content)
    with path.open("ab") as file:
        file.write(content)


CHANGES = [written_in_place, cut, replaced, removed, grown]


def version(number: int, size: int) -> bytes:
    """Return a content in which each 8 bytes are the number."""
    return (number.to_bytes(8, "big") * (size // 8 + 1))[:size]


def all_of(client: socket.socket, received: bytes = b"") -> bytes:
    with suppress(ConnectionResetError):
        while block := client.recv(1 << 18):
            received += block
    client.close()
    return received


@pytest.mark.asyncio
@pytest.mark.parametrize("change", [written_in_place, cut])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("is_slow", [True, False], ids=["small buffer", "large buffer"])
async def test_a_change_to_what_the_kernel_still_holds(
    tmp_path: Path,
    certificate: dict[str, str],
    transport: str,
    size: int,
    change: Callable[[Path, bytes], None],
    is_slow: bool,
) -> None:
    """The client takes the last bytes only after the change, when the answer is complete for the server.

    With a large buffer, these are megabytes: on the same machine, they are acknowledged before the client reads them.
    """
    content = os.urandom(size)
    (path := tmp_path / "file.bin").write_bytes(content)
    ended = asyncio.Event()
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        ended.set()

    place = Place(transport, tmp_path, certificate, is_slow=is_slow)
    app = Accounts(app_for(tmp_path), observers=[note])
    with place.listener:
        async with uvicorn_for(app, sockets=[place.listener], http=DownloadProtocol, **place.options):
            os.utime(path)  # somebody may be writing to it
            client = await asyncio.to_thread(place.connect)
            if not is_slow:
                for _ in range(3):  # the kernel gives a client that reads fast a large buffer
                    await asyncio.to_thread(read_one, client, size)
                ended.clear()
                outcomes.clear()
            await asyncio.to_thread(client.sendall, get("/ours/file.bin", CLOSE))
            received = b""
            while not await is_soon(ended):  # what does not fit into the queues of the kernel has to be read
                received += await asyncio.to_thread(client.recv, 1 << 16)
            change(path, os.urandom(size))
            answer = parse(await asyncio.to_thread(all_of, client, received))
    assert [outcome.result for outcome in outcomes] == ["completed"]
    assert answer.complete
    assert answer.body == content


def read_one(client: socket.socket, size: int) -> None:
    """Ask for the file, and read the answer."""
    client.sendall(get("/ours/file.bin"))
    received = b""
    while len(received.partition(b"\r\n\r\n")[2]) < size:
        received += client.recv(1 << 18)


async def is_soon(event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), 0.05)
    return event.is_set()


@asynccontextmanager
async def waited_for(root: Path, *, route: str = "ours", **options: Any) -> AsyncIterator[tuple[socket.socket, Any]]:
    """Give a client that reads nothing, and its connection at the server, which sends a file that may be changing."""
    app = Accounts(app_for(root), **options)
    (path := root / "file.bin").write_bytes(os.urandom(6 * MIB))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        client.setblocking(False)
        async with uvicorn_for(app, sockets=[listener], http=DownloadProtocol) as server:
            os.utime(path)
            client.send(get(f"/{route}/file.bin", CLOSE))
            connections: Any = server.server_state.connections
            while not any(connection.flow.write_paused for connection in connections):
                await asyncio.sleep(0)
            yield client, next(iter(connections))
            client.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("route", ["ours", "response"])
async def test_a_client_that_leaves_is_not_waited_for(tmp_path: Path, route: str) -> None:
    ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    async with waited_for(tmp_path, route=route, observers=[ended.set_result]) as (client, _):
        client.close()
        outcome = await asyncio.wait_for(ended, 10)
    assert (outcome.result, outcome.reason) == ("aborted", "client-left")


@pytest.mark.asyncio
async def test_a_client_that_leaves_while_reading_is_paused(tmp_path: Path) -> None:
    ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    async with waited_for(tmp_path, observers=[ended.set_result]) as (client, connection):
        client.send(get("/ours/file.bin") * 1000)
        while not connection.flow.read_paused:
            await asyncio.sleep(0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # resets the connection
        outcome = await asyncio.wait_for(ended, 10)
    assert (outcome.result, outcome.reason) == ("aborted", "client-left")


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_file_that_changes_all_the_time(
    tmp_path: Path, certificate: dict[str, str], transport: str, size: int, change: Callable[[Path, bytes], None]
) -> None:
    path = tmp_path / "file.bin"
    place = Place(transport, tmp_path, certificate, is_slow=False)
    is_over = threading.Event()
    slow: list[tuple[float, float]] = []  # changes that take so long that nobody can notice them: see limits.md

    def change_it() -> None:
        for number in count():
            began = time.monotonic()
            change(path, version(number, size))
            if time.monotonic() - began > SETTLED:
                slow.append((began, time.monotonic()))
            if is_over.wait(number % 7 * 0.05):
                return

    def ask() -> tuple[int, bool, bool]:
        """Return the status, whether the body is complete, and whether it has the bytes of one version, or may not."""
        began = time.monotonic()
        answer = parse(all_of(place.asking(get("/ours/file.bin", CLOSE))))
        body, ended = answer.body, time.monotonic()
        is_of_one = body == (body[:8] * (len(body) // 8 + 1))[: len(body)]
        if not is_of_one:
            time.sleep(0.3)  # the change is noted when it has ended
            is_of_one = any(since < ended and began < until for since, until in slow)
        return answer.status, answer.complete, is_of_one

    path.write_bytes(version(0, size))
    changing = asyncio.create_task(asyncio.to_thread(change_it))
    with place.listener:
        async with uvicorn_for(app_for(tmp_path), sockets=[place.listener], http=DownloadProtocol, **place.options):
            found = Counter([await asyncio.to_thread(ask) for _ in range(ROUNDS)])
            is_over.set()
            await changing
            assert await asyncio.to_thread(ask) == (200, True, True)
    print(found)
    assert not [one for one in found if one[:2] == (200, True) and not one[2]]
