"""`Accounts` on real servers: exactly one outcome for each request, with the bytes that its client has received."""

import fcntl
import json
import os
import random
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.asgi.accounts_app import SIZES
from tests.asgi.ways import WAYS
from tests.servers import Server

RECEIVE_BUFFER = 1 << 16
"""What a client asks for. The kernel doubles it."""

SEND_BUFFER = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
"""Bytes that the socket of a server holds at most."""

TARGETS = {
    "/files/small.bin": 3,
    "/files/medium.bin": 3,
    "/files/large.bin": 3,
    "/files/huge.bin": 8,
    "/files/none.bin": 1,
    "/files/": 1,
    "/files/?archive=zip": 3,
    "/memory/medium.bin": 2,
    "/memory/huge.bin": 4,
    "/foreign/large.bin": 2,
    "/foreign/huge.bin": 4,
    "/proxied/huge.bin": 2,
    "/sent/huge.bin": 1,
    "/generated": 4,
    "/streamed": 4,
    "/plain": 2,
    "/fail": 1,
}
"""The requests, and how many of each there are."""

RANGES = ["", "", "", "Range: bytes=1-299998\r\n", "Range: bytes=0-0,5-9,100-70000\r\n", "Range: bytes=99999999-\r\n"]


@dataclass
class Received:
    """What one client has seen of one answer."""

    method: str
    target: str
    status: int = 0
    body: int = 0
    is_complete: bool = False
    is_abandoned: bool = False
    """Whether the client has closed the connection."""


class Client:
    """Sends requests with numbers, and leaves some answers at a random byte."""

    def __init__(self, port: int, seed: int, results: dict[str, Received]) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._results = results
        self._socket: socket.socket | None = None

    def ask(self, number: str) -> None:
        """Send one request, and read its answer or a part of it."""
        chance = self._random
        target = chance.choices([*TARGETS], [*TARGETS.values()])[0]
        method = chance.choices(["GET", "HEAD"], [9, 1])[0]
        received = self._results[number] = Received(method, target)
        leaves_after = chance.choice([None, None, 0, 1, chance.randrange(1 << 12), chance.randrange(1 << 23)])
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {number}\r\n{chance.choice(RANGES)}\r\n"
        self._connect().sendall(head.encode())
        try:
            self._read(received, leaves_after)
        finally:
            if not received.is_complete or target == "/fail" or chance.random() < 0.2:
                self.close()

    def _connect(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._socket.settimeout(30)
            self._socket.connect(("127.0.0.1", self._port))
        return self._socket

    def close(self) -> None:
        """Close the connection: the kernel resets it if it has unread bytes."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _read(self, received: Received, leaves_after: int | None) -> None:
        sock = self._connect()
        buffered, ended = b"", False
        while b"\r\n\r\n" not in buffered:
            if not (piece := sock.recv(1 << 14)):
                received.is_abandoned = leaves_after is not None
                return
            buffered += piece
        head, _, rest = buffered.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        received.status = int(lines[0].split()[1])
        fields = dict(line.split(": ", 1) for line in lines[1:])
        if fields.get("connection") == "close":
            self._socket, closing = sock, True
        else:
            closing = False
        if received.method == "HEAD" or received.status == 304:
            received.is_complete = True
        elif "content-length" in fields:
            left = int(fields["content-length"])
            received.body = len(rest)
            while received.body < left:
                if leaves_after is not None and received.body >= leaves_after:
                    self._leave(received)
                    return
                if not (piece := sock.recv(min(1 << 14, left - received.body))):
                    return
                received.body += len(piece)
            received.is_complete = True
        else:
            ended = self._read_chunked(sock, rest, received, leaves_after)
            received.is_complete = ended
        if closing:
            self.close()

    def _leave(self, received: Received, framing: int = 0) -> None:
        assert self._socket is not None
        unread = struct.unpack("i", fcntl.ioctl(self._socket, termios.FIONREAD, b"\0" * 4))[0]
        received.body += max(0, unread - framing)
        received.is_abandoned = True
        self.close()

    def _read_chunked(self, sock: socket.socket, rest: bytes, received: Received, leaves_after: int | None) -> bool:
        while True:
            while b"\r\n" not in rest:
                if not (piece := sock.recv(1 << 14)):
                    return False
                rest += piece
            size, _, rest = rest.partition(b"\r\n")
            left = int(size, 16)
            if left == 0:
                while len(rest) < 2:
                    if not (piece := sock.recv(1 << 14)):
                        return False
                    rest += piece
                return True
            while left:
                if leaves_after is not None and received.body >= leaves_after:
                    self._leave(received, framing=64 * 16)
                    return False
                if not rest and not (rest := sock.recv(1 << 14)):
                    return False
                taken = min(left, len(rest))
                received.body, left, rest = received.body + taken, left - taken, rest[taken:]
            while len(rest) < 2:
                if not (piece := sock.recv(1 << 14)):
                    return False
                rest += piece
            rest = rest[2:]


def outcomes_in(log: Path, wanted: int) -> dict[str, list[dict[str, Any]]]:
    """Return the outcomes by the number of their request, once there are as many as wanted."""
    deadline = time.monotonic() + 30
    while (text := log.read_text()).count("\n") < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    found: dict[str, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        outcome = json.loads(line)
        found.setdefault(outcome["request_id"], []).append(outcome)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    root.mkdir()
    for name, size in SIZES.items():
        (root / name).write_bytes(os.urandom(size))
        os.utime(root / name, (1_700_000_000,) * 2)
    return root


@pytest.fixture(params=["zero-copy, asyncio", "zero-copy, uvloop", "chunks, httptools on uvloop"])
def served(request: pytest.FixtureRequest, root: Path, tmp_path: Path) -> Iterator[tuple[str, Server, Path]]:
    log = tmp_path / "outcomes.jsonl"
    log.touch()
    env = {"ACCOUNTS_ROOT": str(root), "ACCOUNTS_LOG": str(log)}
    with WAYS[request.param].serving("tests.asgi.accounts_app:make_app", log=tmp_path / "log", env=env) as server:
        yield request.param, server, log


def stress(served: tuple[str, Server, Path], count: int) -> None:
    way, server, log = served
    assert isinstance(server.address, int)
    port = server.address
    results: dict[str, Received] = {}
    seed = random.randrange(1 << 30)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        client = Client(port, seed + worker, results)
        try:
            for number in range(worker, count, 8):
                client.ask(str(number))
        except BaseException as exc:
            failures.append(RuntimeError(number, results.get(str(number)), exc))
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, (seed, failures)
    outcomes = outcomes_in(log, count)
    wrong = []
    for number, received in results.items():
        these = outcomes.get(number, [])
        if len(these) != 1:
            wrong.append((number, received, these))
        elif problem := problem_of(received, these[0], is_ours=way.startswith("zero-copy")):
            wrong.append((problem, received, these))
    assert not wrong, (seed, len(wrong), wrong[:20])
    assert len(outcomes) == count


def problem_of(received: Received, outcome: dict[str, Any], *, is_ours: bool) -> str | None:
    """Return what is wrong with an outcome, or None."""
    assert outcome["method"] == received.method
    sent, body = outcome["sent"], received.body
    if received.status and outcome["status"] != received.status:
        return "another status"
    if received.is_complete:
        if outcome["result"] == "aborted":
            return "aborted, but the client has all"
        return None if sent == body or outcome["path"] == "/fail" else "other bytes"
    if not received.is_abandoned:
        return "the server has aborted the answer"
    if outcome["result"] == "completed":  # it has left the process
        return None if sent >= body else "the client has received more"
    # What has arrived but was not acknowledged counts as not sent. If the loop closes the socket before it tells, what
    # its send buffer holds may count. Other servers do not tell what they still hold.
    more, less = 2 * RECEIVE_BUFFER, SEND_BUFFER + 2 * RECEIVE_BUFFER if is_ours else 16 << 20
    return None if -more <= sent - body <= less else f"{sent - body} bytes off"


def test_each_request_has_one_outcome_although_clients_leave(served: tuple[str, Server, Path]) -> None:
    stress(served, 400)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_of_20_000_requests_has_one_outcome(served: tuple[str, Server, Path]) -> None:
    stress(served, 20_000)
