"""Many slow clients on one worker: what they cost, whether they are dropped in time, and what a fast client sees.

    python -m benchmarks.slow_clients [stalled|readers] [CLIENTS] [service|quiet|nginx]

`stalled` counts clients that read the first bytes of an answer and no more. `readers` each take a KiB a second, while
new connections ask for a file of a KiB. Each client is one descriptor here, and one in the server: see `ulimit -n`.

`service` is `downloadview serve` with its defaults but for the limit, `quiet` the same without its log of answers.
"""

import os
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import proc
from benchmarks.nginx import nginx_command
from benchmarks.running import Place
from tests.servers import Server, free_port, serving

STALL_SECONDS = 20
"""The limit of the server. A shorter one would end before all clients have come."""

_CLIENTS = {"stalled": 2000, "readers": 5000}
_READING_SECONDS = 30.0
_ROUNDS = 20  # a second
_HELD = 1 << 20  # bytes of the answers: as much as the kernel holds for one client, and more

_SETTINGS = """
[server]
stall_timeout = {seconds}
access_log = {is_logged}
backlog = 8192

[sources.files]
type = "path"
root = "{root}"

[[routes]]
path = "/{{path:path}}"
source = "files"
"""


@contextmanager
def _server(root: Path, kind: str) -> Iterator[Server]:
    port, scratch = free_port(), root.parent / kind
    scratch.mkdir(exist_ok=True)
    if kind == "nginx":
        place = Place(root, scratch, port, port)
        location = f"location / {{ root {root}; send_timeout {STALL_SECONDS}s; }}"
        command = nginx_command(place, location).arguments
    else:
        is_logged = "true" if kind == "service" else "false"
        settings = scratch / "settings.toml"
        settings.write_text(_SETTINGS.format(seconds=STALL_SECONDS, is_logged=is_logged, root=root))
        command = [sys.executable, "-m", "downloadview_async", "serve", "--config", str(settings), "--port", str(port)]
    with serving(command, port, log=scratch / "log") as server:
        for _ in range(50):
            _ask(int(server.address))
        yield server


def _connect(port: int, name: str) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect(("127.0.0.1", port))
    client.send(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client


def _ask(port: int) -> float:
    """Download the small file over a new connection, and return the seconds."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.send(b"GET /small.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while block := client.recv(1 << 16):
            received += len(block)
    assert received > 1024
    return time.monotonic() - began


def _used(server: Server) -> tuple[int, int]:
    processes = proc.of_sessions([server.process.pid])
    return proc.resident(processes), proc.descriptors(processes)


def _cost(server: Server, before: tuple[int, int], count: int) -> str:
    memory, descriptors = (now - then for now, then in zip(_used(server), before, strict=True))
    return f"{memory / 1024 / count:.1f} KiB of RSS and {descriptors / count:.2f} descriptors each"


def _stalled(server: Server, count: int) -> None:
    port = int(server.address)
    before, began = _used(server), time.monotonic()
    clients = [_connect(port, "large.bin") for _ in range(count)]
    for client in clients:
        client.recv(12)
    connected = time.monotonic()
    time.sleep(3)  # until the server has filled the buffers of all of them
    print(f"{count} stalled clients, connected in {connected - began:.1f} s: {_cost(server, before, count)}")
    while _used(server)[1] > before[1]:
        time.sleep(0.1)
    print(f"all gone {time.monotonic() - connected - STALL_SECONDS:.1f} s after the limit, since the last one came")
    for client in clients:
        client.close()
    time.sleep(1)
    memory, descriptors = _used(server)
    print(f"afterwards: {(memory - before[0]) / 1024 / 1024:+.1f} MiB of RSS, {descriptors - before[1]:+} descriptors")


def _read_slowly(clients: list[socket.socket], ended: threading.Event, reset: set[socket.socket]) -> None:
    """Read a KiB a second of each client, some clients at a time, and note those that are reset."""
    turn = 0
    while not ended.is_set():
        began = time.monotonic()
        for client in clients[turn::_ROUNDS]:
            try:
                client.recv(1024, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                reset.add(client)
        turn = (turn + 1) % _ROUNDS
        time.sleep(max(0.0, 1 / _ROUNDS - (time.monotonic() - began)))


def _readers(server: Server, count: int) -> None:
    port, before = int(server.address), _used(server)
    clients: list[socket.socket] = []
    ended, reset = threading.Event(), set[socket.socket]()
    reading = threading.Thread(target=_read_slowly, args=(clients, ended, reset))
    reading.start()
    for _ in range(count):
        client = _connect(port, "large.bin")
        client.recv(12)
        clients.append(client)
    time.sleep(5)
    print(f"{count} readers: {_cost(server, before, count)}")
    samples, until = [], time.monotonic() + _READING_SECONDS
    while time.monotonic() < until:
        samples.append(_ask(port))
        time.sleep(0.02)
    ended.set()
    reading.join()
    p99 = statistics.quantiles(samples, n=100)[98]
    print(f"a new download of 1 KiB: p50 {statistics.median(samples) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms")
    print(f"{len(reset)} readers were reset")
    for client in clients:
        client.close()


def main(arguments: list[str]) -> None:
    """Measure what the arguments say, or both."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, a limit of {STALL_SECONDS:g} s")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        root.mkdir()
        (root / "small.bin").write_bytes(bytes(1024))
        (root / "large.bin").write_bytes(bytes(64 * _HELD))
        for file in root.iterdir():
            os.utime(file, (1_700_000_000,) * 2)
        kind = arguments[2] if len(arguments) > 2 else "service"
        for name in arguments[:1] or _CLIENTS:
            count = int(arguments[1]) if len(arguments) > 1 else _CLIENTS[name]
            print(f"{kind}:")
            with _server(root, kind) as server:
                {"stalled": _stalled, "readers": _readers}[name](server, count)


if __name__ == "__main__":
    main(sys.argv[1:])
