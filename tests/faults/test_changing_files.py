"""Files that are written to in place, cut or replaced while they are sent: no complete body has bytes of two versions.

FAULT_ROUNDS is the number of downloads in each case: FAULT_ROUNDS=1000 takes an hour.
"""

import asyncio
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from downloadview_async import Accounts, Outcome
from downloadview_async.asgi.uvicorn.protocol import DownloadProtocol
from tests.asgi.test_server import CLOSE, MIB, app_for, get
from tests.asgi.test_slow_clients import TRANSPORTS, Place
from tests.live import parse, uvicorn_for

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "10"))
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
async def test_a_change_to_what_the_kernel_still_holds(
    tmp_path: Path, certificate: dict[str, str], transport: str, size: int, change: Callable[[Path, bytes], None]
) -> None:
    """The client takes the last bytes only after the change, when the answer is complete for the server."""
    content = os.urandom(size)
    (path := tmp_path / "file.bin").write_bytes(content)
    ended = asyncio.Event()
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        ended.set()

    place = Place(transport, tmp_path, certificate)
    app = Accounts(app_for(tmp_path), observers=[note])
    with place.listener:
        async with uvicorn_for(app, sockets=[place.listener], http=DownloadProtocol, **place.options):
            os.utime(path)  # somebody may be writing to it
            client = await asyncio.to_thread(place.asking, get("/ours/file.bin", CLOSE))
            received = b""
            while not ended.is_set():  # what does not fit into the queue of the kernel has to be read
                received += await asyncio.to_thread(client.recv, 1 << 16)
            change(path, os.urandom(size))
            answer = parse(await asyncio.to_thread(all_of, client, received))
    assert [outcome.result for outcome in outcomes] == ["completed"]
    assert answer.complete
    assert answer.body == content


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

    def change_it() -> None:
        for number in count():
            change(path, version(number, size))
            if is_over.wait(number % 7 * 0.05):
                return

    def ask() -> tuple[int, bool, bool]:
        """Return the status, whether the body is complete, and whether it has the bytes of one version."""
        answer = parse(all_of(place.asking(get("/ours/file.bin", CLOSE))))
        body = answer.body
        return answer.status, answer.complete, body == (body[:8] * (len(body) // 8 + 1))[: len(body)]

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
