"""The clients: wrk for many small requests, our own for large ones, for slow ones and for ones that stop reading."""

import contextlib
import functools
import multiprocessing
import os
import re
import selectors
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
_PATIENCE = 120.0  # seconds without a byte
_BUFFER = 256 * 1024
_PACED_BUFFER = 128 * 1024
_PIECE = 64 * 1024  # bytes that a client of a limited rate reads at once
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}

_Counter = Any  # multiprocessing has no type for a shared number


class LoadError(Exception):
    """A server answered something else than it should, or not at all."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer; `begun` is how many bytes of the body came with it."""

    status: int
    headers: dict[str, str]
    length: int
    begun: int


@dataclass(frozen=True, slots=True)
class Wrk:
    """What wrk found: its requests, those per second, and percentiles of their time in seconds."""

    requests: int
    rate: float
    p50: float
    p99: float


def wrk_program() -> str | None:
    """Return the path of wrk, or None where it is not installed."""
    return shutil.which("wrk")


def run_wrk(
    url: str, *, seconds: int, connections: int, core: int, headers: Sequence[str] = (), script: str | None = None
) -> Wrk:
    """Request `url` over and over on connections that are kept. Raises `LoadError` if any answer was an error.

    script: Lua that makes the requests.
    """
    program = wrk_program()
    assert program is not None, "asked for at the start"
    command = [program, "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--timeout=30s"]
    with pinned(core), tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        if script is not None:
            file.write(script)
            file.flush()
            command += ["--script", file.name]
        done = subprocess.run(
            [*command, "--latency", *(f"--header={header}" for header in headers), url],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise LoadError(f"wrk failed: {done.stderr or done.stdout}")
    return parse_wrk(done.stdout)


def parse_wrk(output: str) -> Wrk:
    """Read wrk's report. Raises `LoadError` for one with failed requests, or none at all."""
    for problem in re.findall(r"Non-2xx or 3xx responses: \d+|Socket errors: .*", output):
        if re.search(r"[1-9]", problem.partition("responses" if problem.startswith("Non") else "errors")[2]):
            raise LoadError(f"wrk: {problem}")
    requests = re.search(r"^\s*(\d+) requests in ", output, re.MULTILINE)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    percentiles = {
        match[1]: float(match[2]) * _UNITS[match[3]]
        for match in re.finditer(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)$", output, re.MULTILINE)
    }
    if requests is None or rate is None or float(rate[1]) == 0 or len(percentiles) < 2:
        raise LoadError(f"wrk says nothing that can be read: {output}")
    return Wrk(int(requests[1]), float(rate[1]), percentiles["50"], percentiles["99"])


@contextlib.contextmanager
def pinned(*cores: int) -> Iterator[None]:
    """Run what is inside, and the processes it starts, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def connect(port: int, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None) -> socket.socket:
    """Open a connection; receive_buffer: how many bytes the kernel may take in for us."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(_PATIENCE)
    connection.connect((HOST, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection if tls is None else tls.wrap_socket(connection)


def ask(connection: socket.socket, path: str, *headers: str) -> Head:
    """Send a GET and read until the head of the answer has come."""
    connection.sendall("\r\n".join([f"GET {path} HTTP/1.1", f"Host: {HOST}", *headers, "", ""]).encode())
    return read_head(connection, path)


def read_head(connection: socket.socket, path: str) -> Head:
    """Read until the head of an answer has come."""
    received = b""
    while b"\r\n\r\n" not in received:
        block = connection.recv(4096)
        if not block:
            raise LoadError(f"{path}: the connection was closed before the head of an answer")
        received += block
    first, *lines = received.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not fields.get("content-length", "").isdecimal():
        raise LoadError(f"{path}: an answer without Content-Length: {first}")
    begun = len(received.partition(b"\r\n\r\n")[2])
    return Head(int(first.split()[1]), fields, int(fields["content-length"]), begun)


def read_body(connection: socket.socket, head: Head) -> None:
    """Read the rest of an answer as fast as it comes. Raises `LoadError` if it ends early."""
    buffer = bytearray(_BUFFER)
    remaining = head.length - head.begun
    while remaining:
        got = connection.recv_into(buffer, min(_BUFFER, remaining))
        if not got:
            raise LoadError(f"the connection was closed {remaining} bytes before the end")
        remaining -= got


def first_byte_seconds(port: int, path: str, tls: ssl.SSLContext | None = None) -> float:
    """Return how long it takes from opening a connection to the first byte of the body, and leave."""
    start = time.perf_counter()
    with connect(port, tls=tls) as connection:
        if not ask(connection, path).begun:
            connection.recv(1)
        return time.perf_counter() - start


@contextlib.contextmanager
def stalled(port: int, path: str, clients: int, tls: ssl.SSLContext | None = None) -> Iterator[None]:
    """Have clients that ask for a large file, take its first bytes, and take no more."""
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            connection = stack.enter_context(connect(port, receive_buffer=4096, tls=tls))
            if not ask(connection, path).begun:
                connection.recv(1024)
        yield


@contextlib.contextmanager
def downloading(
    port: int,
    path: str,
    clients: int,
    *,
    core: int,
    rate: float | None = None,
    niceness: int = 19,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Callable[[], int]]:
    """Have clients that download a file again and again, in a process of low priority.

    rate: bytes per second of each client; without it, as fast as they can. Gives a function that returns how many bytes
    of bodies they have received.
    """
    with contextlib.ExitStack() as stack:
        connections: dict[socket.socket, int] = {}
        for _ in range(clients):
            # a client of a limited rate must not let the kernel take seconds of its bytes in advance
            buffer = None if rate is None else _PACED_BUFFER
            connection = stack.enter_context(connect(port, receive_buffer=buffer, tls=tls))
            head = ask(connection, path)
            connections[connection] = head.length - head.begun
        # Forked, for it has the connections then. What measures beside it must not wait for it.
        context = multiprocessing.get_context("fork")
        received = context.Value("Q", 0)
        download = _download_on if rate is None else functools.partial(_download_at, rate)
        process = context.Process(target=download, args=(connections, path, core, niceness, received), daemon=True)
        process.start()
        try:
            yield lambda: int(received.value)
            if not process.is_alive():
                raise LoadError("the downloads ended early")
        finally:
            process.kill()
            process.join()


def _download_on(
    connections: dict[socket.socket, int], path: str, core: int, niceness: int, received: _Counter
) -> None:
    os.sched_setaffinity(0, {core})
    os.nice(niceness)
    buffer = bytearray(_BUFFER)
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                _receive(connections, key.fileobj, path, buffer, received)


def _download_at(
    rate: float, connections: dict[socket.socket, int], path: str, core: int, niceness: int, received: _Counter
) -> None:
    """Read at a rate: each connection has its turn, in which it takes what it may have by then."""
    os.sched_setaffinity(0, {core})
    os.nice(niceness)
    buffer = bytearray(_PIECE)
    turn = _PIECE / rate / len(connections)
    at = time.monotonic()
    while True:
        for connection in connections:
            time.sleep(max(at - time.monotonic(), 0.0))
            at += turn
            left = _PIECE
            while left > 0:  # TLS gives a record of 16 KiB at a time
                left -= _receive(connections, connection, path, buffer, received)


def _receive(
    connections: dict[socket.socket, int], connection: socket.socket, path: str, buffer: bytearray, received: _Counter
) -> int:
    """Receive a part of a body, and begin the next download at its end. Returns how many bytes of bodies came."""
    begun = 0
    got = connection.recv_into(buffer, min(len(buffer), connections[connection]))
    if not got:
        raise LoadError("a download was cut off")
    connections[connection] -= got
    if not connections[connection]:  # now: without a request, the connection never becomes readable
        head = ask(connection, path)
        connections[connection] = head.length - head.begun
        begun = head.begun
    received.value += begun + got
    return begun + got


def ask_each(port: int, paths: Sequence[str], connections: int, tls: ssl.SSLContext | None = None) -> None:
    """Request each path once, with a few requests at once, and read the answers. Raises `LoadError` for an error.

    A proxy seems to have got each request from another client.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connect(port, tls=tls)) for _ in range(connections)]
        for start in range(0, len(paths), connections):
            turn = [*zip(sockets, paths[start : start + connections], strict=False)]
            for number, (connection, path) in enumerate(turn, start):
                client = f"X-Forwarded-For: 10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n{client}\r\n\r\n".encode())
            for connection, path in turn:
                head = read_head(connection, path)
                if head.status not in (200, 307):
                    raise LoadError(f"{path} was answered with {head.status}")
                read_body(connection, head)
