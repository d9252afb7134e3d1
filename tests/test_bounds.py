"""What the library may use at most: memory for a GiB through each source, and nothing left after 10,000 aborts."""

import asyncio
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server, free_port, serving

GIB = 1 << 30
MIB = 1 << 20
KINDS = ["path", "storage", "sync", "object", "remote", "virtual", "store", "cached"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bounds")
    with (root / "big.bin").open("wb") as file:
        file.truncate(GIB)  # sparse: it costs no disk, and is read like any other
    return root


@pytest.fixture(params=["httptools", "downloadview_async.asgi.server:DownloadProtocol"], ids=["chunks", "zero-copy"])
def server(request: pytest.FixtureRequest, root: Path, tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.bounds_app:app", "--port", str(port), "--no-access-log"]
    command += ["--http", request.param]
    env = {"BOUNDS_ROOT": str(root), "BOUNDS_PORT": str(port)}
    with serving(command, port, env=env, log=tmp_path / "log") as server:
        yield server


def status_of(server: Server, field: str) -> int:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"^{field}:\s*([0-9]+)", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def resident_peak(server: Server) -> int:
    return status_of(server, "VmHWM") * 1024


def reset_peak(server: Server) -> int:
    """Set the peak back to what is resident now, and return that."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    return status_of(server, "VmRSS") * 1024


async def download(server: Server, path: str) -> int:
    """Return how many bytes of a body came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.address))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    received = 0
    loop = asyncio.get_running_loop()
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    client: socket.socket = writer.get_extra_info("socket")
    received += len(reader._buffer)  # type: ignore[attr-defined]
    with socket.socket(fileno=os.dup(client.fileno())) as raw:
        raw.setblocking(False)
        buffer = bytearray(MIB)
        while count := await loop.sock_recv_into(raw, buffer):
            received += count
    writer.close()
    assert b" 200 OK" in head
    return received


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_a_gib_grows_memory_by_less_than_32_mib(server: Server, kind: str) -> None:
    idle = reset_peak(server)
    received = await download(server, f"/{kind}/big.bin")
    assert received >= GIB
    assert resident_peak(server) - idle < 32 * MIB


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "store"])  # see docs/limits.md
async def test_fifty_downloads_at_once_grow_memory_by_less_than_64_mib(server: Server, kind: str) -> None:
    """Each client takes some of a GiB, stops reading for a while, and takes some more: buffers are full everywhere."""
    idle = reset_peak(server)
    clients = [await asyncio.open_connection("127.0.0.1", int(server.address), limit=65536) for _ in range(50)]
    for _, writer in clients:
        writer.write(f"GET /{kind}/big.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    for _ in range(40):
        await asyncio.gather(*[reader.readexactly(65536) for reader, _ in clients])
    grown = resident_peak(server) - idle
    for _, writer in clients:
        writer.transport.abort()
    assert grown < 64 * MIB


def in_use(server: Server) -> tuple[int, int]:
    """Return the descriptors and the threads of the server."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd")), status_of(server, "Threads")


def abort(server: Server, path: str, *, read: int) -> None:
    """Ask for a file, read some of it, and reset the connection."""
    with socket.create_connection(("127.0.0.1", int(server.address))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        if read:
            client.recv(read)


def test_ten_thousand_aborted_downloads_leave_nothing_open(server: Server) -> None:
    for kind in KINDS:
        for read in (0, 1, 65536):
            abort(server, f"/{kind}/big.bin", read=read)
    for _ in range(20):
        asyncio.run(_ten_small(server))
    before = _settled(server)
    for number in range(10_000):
        abort(server, f"/{KINDS[number % len(KINDS)]}/big.bin", read=(0, 1, 65536)[number % 3])
    asyncio.run(_ten_small(server))
    allowed = before[0] + 2, before[1] + 8  # idle workers end by themselves
    descriptors, threads = _settled(server, allowed)
    assert descriptors <= allowed[0], _opened(server)
    assert threads <= allowed[1]
    assert "Traceback" not in server.log


async def _ten_small(server: Server) -> None:
    """Prove that every source still answers."""
    for kind in KINDS:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.address))
        writer.write(f"HEAD /{kind}/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b" 200 OK" in await reader.read()
        writer.close()


def _settled(server: Server, allowed: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Return what is in use once it is allowed or has not shrunk for five seconds, after 60 seconds at most."""
    now = in_use(server)
    started = shrank = time.monotonic()
    while not (now[0] <= allowed[0] and now[1] <= allowed[1]) and time.monotonic() < min(shrank + 5, started + 60):
        time.sleep(0.1)
        before, now = now, in_use(server)
        if now[0] < before[0] or now[1] < before[1]:
            shrank = time.monotonic()
    return now


def _opened(server: Server) -> list[str]:
    """Return what each descriptor of the server is."""
    directory = Path(f"/proc/{server.process.pid}/fd")
    return sorted(os.readlink(entry) for entry in directory.iterdir())
