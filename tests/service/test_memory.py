"""Memory after many clients have left."""

import ctypes
import itertools
import os
import re
import socket
import ssl
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from downloadview_async.service.memory import SpareMemory
from tests.certificates import make_certificate
from tests.servers import Server, free_port, serving

MIB = 1 << 20


@pytest.mark.parametrize(
    ("clients", "times"),
    [
        ([0, 255, 0, 0], 0),
        ([0, 256, 65, 65, 65], 0),
        ([0, 256, 64], 0),  # more may be leaving
        ([0, 256, 64, 64], 1),
        ([0, 200, 256, 100, 64, 10, 0, 0, 0], 1),
        ([0, 256, 10, 20, 0, 0], 1),
        ([2000, 0, 0, 2000, 1, 1], 2),
        ([1000] * 5, 0),
    ],
)
def test_memory_is_given_back_when_three_of_four_clients_have_left(clients: list[int], times: int) -> None:
    given: list[int] = []
    memory = SpareMemory(lambda: given.append(1), clock=itertools.count(0, 10).__next__)
    for count in clients:
        memory.look(count)
    assert len(given) == times


def test_memory_is_given_back_seldom_where_clients_come_and_go_quickly() -> None:
    given: list[float] = []
    now = 0.0
    memory = SpareMemory(lambda: given.append(now), clock=lambda: now)
    for step in range(300):  # 30 seconds
        now = step / 10
        memory.look((256, 0, 0)[step % 3])
    assert len(given) == 3
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(given))


def resident(server: Server) -> int:
    found = re.search(r"VmRSS:\s+([0-9]+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc_trim: needs glibc")
def test_memory_of_a_thousand_clients_is_given_back(tmp_path: Path) -> None:
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(64 * MIB)
    (tmp_path / "small.bin").write_bytes(bytes(1024))
    port = free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", str(tmp_path), "--port", str(port)]
    with serving(command, port, env={"PYTHONMALLOC": "malloc"}, log=tmp_path / "log") as server, ExitStack() as stack:
        for _ in range(50):  # what the first requests need stays
            urllib.request.urlopen(f"{server.url}/files/small.bin", timeout=30).close()
        before = resident(server)
        clients = [stack.enter_context(socket.socket()) for _ in range(1000)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /files/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"
        grown = resident(server) - before
        assert grown > 4 * MIB
        for client in clients:
            client.close()
        until = time.monotonic() + 30
        while (kept := resident(server) - before) > grown / 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert kept <= grown / 2


def test_a_client_that_stalls_over_tls_takes_little_memory(tmp_path: Path) -> None:
    """What is encrypted for it is held by TLS, and by the transport until the kernel has room for it."""
    (folder := tmp_path / "files").mkdir()
    (folder / "big.bin").write_bytes(bytes(16 * MIB))
    os.utime(folder / "big.bin", (1_700_000_000,) * 2)
    files, port = make_certificate(tmp_path), free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", str(folder), "--port", str(port)]
    command += ["--ssl-certfile", files["ssl_certfile"], "--ssl-keyfile", files["ssl_keyfile"]]
    context = ssl.create_default_context(cafile=files["ssl_certfile"])
    with serving(command, port, log=tmp_path / "log") as server, ExitStack() as stack:

        def begin() -> None:
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.connect(("127.0.0.1", port))
            client = stack.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            client.sendall(b"GET /files/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"

        def held() -> int:
            """Return the memory when it has not changed for half a second, which begins when all buffers are full."""
            now, since, until = resident(server), time.monotonic(), time.monotonic() + 30
            while time.monotonic() < min(since + 0.5, until):
                time.sleep(0.05)
                if (new := resident(server)) != now:
                    now, since = new, time.monotonic()
            return now

        for _ in range(4):  # what the first ones need stays
            begin()
        before = held()
        for _ in range(40):
            begin()
        assert (held() - before) / 40 < 1200 * 1024
