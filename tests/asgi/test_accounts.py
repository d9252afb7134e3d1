"""`Accounts` on real servers: exactly one outcome for each request, with the bytes that its client has received."""

import asyncio
import contextlib
import fcntl
import json
import os
import random
import select
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.types import Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.extensions import CONNECTION
from downloadview_async.asgi.server import DownloadProtocol
from tests.asgi.accounts_app import ONE, SIZES, TINY
from tests.asgi.ways import WAYS
from tests.contrib.django.served_app import KINDS
from tests.live import live
from tests.s3 import BUCKET, S3
from tests.servers import Server, free_port, serving

RECEIVE_BUFFER = 1 << 16
"""What a client asks for. The kernel doubles it."""

SEND_BUFFER = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]) + (1 << 20)
"""Bytes that a server holds at most that does not tell: in its socket, and in what it has made for that."""

MESSAGE = 256 << 10
"""Bytes of one message at most."""

RECORDS = 1 << 15
"""Bytes that the TLS of a client has taken from its kernel at most, but not decrypted, with the framing of TLS."""

COUNT = int(os.environ.get("OUTCOMES", "1000"))
"""How many requests the slow tests send to each server: `make outcomes` sends 20,000."""

SECRETS = ("token-in-the-query", "password-in-the-header")

OF_ASGI = {
    "/files/small.bin": 3,
    "/files/medium.bin": 3,
    "/files/large.bin": 3,
    "/files/huge.bin": 8,
    "/files/none.bin": 1,
    "/files/": 1,
    "/files/?archive=zip": 3,
    "/memory/medium.bin": 2,
    "/memory/huge.bin": 4,
    "/object/large": 2,
    "/object/none": 1,
    "/remote/large.bin": 2,
    "/remote/huge.bin": 3,
    "/foreign/large.bin": 2,
    "/foreign/huge.bin": 4,
    "/proxied/huge.bin": 2,
    "/sent/huge.bin": 1,
    "/generated": 4,
    "/broken": 2,
    "/streamed": 4,
    "/plain": 2,
    "/fail": 1,
}
"""The requests, and how many of each there are."""

OF_S3 = {"/s3/large.bin": 2, "/s3/huge.bin": 2, "/redirected/huge.bin": 1}

OF_DJANGO = {
    f"/{kind}/{name}": 1
    for kind in KINDS
    if kind != "memory"  # Django's storage opens one object, with one position, for everybody: see docs/limits.md
    for name in ("small.bin", "large.bin", "huge.bin")
}

FIELDS = [
    *["" for _ in range(4)],
    "Range: bytes=1-299998\r\n",
    "Range: bytes=0-0,5-9,100-70000\r\n",
    "Range: bytes=99999999-\r\n",
    "If-None-Match: *\r\n",
]


@dataclass
class Received:
    """What one client has seen of one answer.

    is_abandoned: whether the client has closed the connection, or its side of it, or has stopped reading. is_chunked:
    whether the body may have some bytes of the next answers, because its length is not known.
    """

    method: str
    target: str
    status: int = 0
    body: int = 0
    is_complete: bool = False
    is_abandoned: bool = False
    is_chunked: bool = False


class Client:
    """Sends requests with numbers, and leaves some answers at a random byte, in each of the ways to leave."""

    def __init__(self, site: "Site", seed: int, results: dict[str, Received]) -> None:
        self._site = site
        self._random = random.Random(seed)
        self._results = results
        self._socket: socket.socket | None = None
        self._descriptor = -1
        self._rest = b""

    def ask(self, numbers: list[str]) -> None:
        """Send requests, one after the other without waiting, and read their answers, or a part of them."""
        chance = self._random
        asked: list[Received] = []
        heads, is_half_closed = [], False
        for number in numbers:
            target = chance.choices([*self._site.targets], [*self._site.targets.values()])[0]
            target += f"{'&' if '?' in target else '?'}token={SECRETS[0]}"
            method = chance.choices(["GET", "HEAD"], [9, 1])[0]
            asked.append(Received(method, target))
            self._results[number] = asked[-1]
            fields = f"Host: x\r\nAuthorization: Bearer {SECRETS[1]}\r\n{chance.choice(FIELDS)}"
            heads.append(f"{method} {target} HTTP/1.1\r\n{fields}X-Number: {number}\r\n\r\n")
        try:
            self._connect().sendall("".join(heads).encode())
            is_half_closed = len(numbers) == 1 and chance.random() < 0.05 and not self._site.certificate
            if is_half_closed:
                self._connect().shutdown(socket.SHUT_WR)
                asked[0].is_abandoned = not self._site.is_ours  # other servers take that for the end
            for received in asked:
                leaves_after = chance.choice([None, None, 0, 1, chance.randrange(1 << 12), chance.randrange(1 << 23)])
                self._read(received, leaves_after)
                if not received.is_complete or self._socket is None:
                    for unanswered in asked[asked.index(received) + 1 :]:
                        unanswered.is_abandoned = True
                    break
        except OSError:
            if not self._site.may_break:
                raise
            for received in asked:
                received.is_abandoned = received.is_abandoned or not received.is_complete
        finally:
            if is_half_closed or not all(received.is_complete for received in asked) or chance.random() < 0.2:
                self.close()

    def _connect(self) -> socket.socket:
        if self._socket is None:
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            plain.settimeout(60)
            self._socket = plain
            plain.connect(("127.0.0.1", self._site.port))
            if self._site.certificate:
                trusting = _trusting(self._site.certificate)
                trusting.suppress_ragged_eofs = True  # type: ignore[attr-defined]
                self._socket = trusting.wrap_socket(plain, server_hostname="localhost")
            self._descriptor = self._socket.fileno()
            self._rest = b""
        return self._socket

    def close(self) -> None:
        """Close the connection: the kernel resets it if it has unread bytes."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _more(self, most: int = 1 << 14) -> bytes:
        try:
            return self._connect().recv(most)
        except ssl.SSLEOFError:
            return b""

    def _line(self) -> bytes | None:
        while b"\r\n" not in self._rest:
            if not (piece := self._more()):
                return None
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line

    def _read(self, received: Received, leaves_after: int | None) -> None:
        lines = []
        while line := self._line():
            lines.append(line.decode("latin-1").lower())
        if line is None:
            received.is_abandoned = received.is_abandoned or self._site.may_break
            return
        version, status, *_ = lines[0].split()
        received.status = int(status)
        fields: dict[str, str] = {name: value for name, _, value in (line.partition(": ") for line in lines[1:])}
        received.is_chunked = "transfer-encoding" in fields
        if received.method == "HEAD" or received.status == 304:
            received.is_complete = True
        elif "content-length" in fields:
            received.is_complete = self._take(received, int(fields["content-length"]), leaves_after)
        elif "transfer-encoding" in fields:
            received.is_complete = self._read_chunked(received, leaves_after)
        else:
            received.is_complete = self._take(received, 1 << 40, leaves_after) or not received.is_abandoned
        is_failure = received.target.startswith("/fail")  # the server closes the connection after it
        if fields.get("connection") == "close" or version == "http/1.0" or is_failure:
            self.close()

    def _take(self, received: Received, left: int, leaves_after: int | None, framing: int = 0) -> bool:
        """Take bytes of the body. Return whether these were all."""
        while left:
            if leaves_after is not None and received.body >= leaves_after:
                self._leave(received, left, framing)
                return False
            if not self._rest and not (piece := self._more(min(1 << 14, left))):
                received.is_abandoned = received.is_abandoned or self._site.may_break
                return False
            piece, self._rest = (self._rest[:left], self._rest[left:]) if self._rest else (piece, b"")
            received.body += len(piece)
            left -= len(piece)
        return True

    def _read_chunked(self, received: Received, leaves_after: int | None) -> bool:
        while line := self._line():
            size = int(line, 16)
            if not self._take(received, size, leaves_after, 64 * 16) or self._line() is None:
                return False
            if not size:
                return True
        received.is_abandoned = received.is_abandoned or self._site.may_break
        return False

    def _leave(self, received: Received, left: int, framing: int) -> None:
        received.is_abandoned = True
        if self._site.is_ours and self._random.random() < 0.02:
            self._stall()
        arrived = max(0, self._unread() - framing) + len(self._rest)
        received.body += arrived if framing else min(left, arrived)  # the rest is of the next answers
        if self._random.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            self._connect().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def _stall(self) -> None:
        """Read nothing until the server ends the connection, or has sent all."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLRDHUP)
        poll.poll(20_000)

    def _unread(self) -> int:
        return int(struct.unpack("i", fcntl.ioctl(self._descriptor, termios.FIONREAD, b"\0" * 4))[0])


@dataclass
class Site:
    """A server that is tested.

    targets: of the requests, with their weights. is_ours: whether it has our protocol. has_bounds: whether it makes the
    application wait for slow clients. pipelines: whether it takes several requests at once. may_break: whether the
    server may end answers, or connections.
    """

    server: Server
    outcomes: Path
    targets: dict[str, int]
    is_ours: bool = False
    certificate: dict[str, str] | None = None
    has_bounds: bool = True
    pipelines: bool = True
    may_break: bool = False

    @property
    def port(self) -> int:
        """The port of the server."""
        assert isinstance(self.server.address, int)
        return self.server.address


def outcomes_in(log: Path, wanted: int) -> dict[str, list[dict[str, Any]]]:
    """Return the outcomes by the number of their request, once there are as many as wanted."""
    deadline = time.monotonic() + 30
    while (text := log.read_text()).count("\n") < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    found: dict[str, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        outcome = json.loads(line)
        found.setdefault(outcome["number"], []).append(outcome)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    root.mkdir()
    for name, size in SIZES.items():
        (root / name).write_bytes(os.urandom(size))
        os.utime(root / name, (1_700_000_000,) * 2)
    return root


Serving = Callable[..., contextlib.AbstractContextManager[Site]]


@pytest.fixture
def serve(root: Path, tmp_path: Path) -> Serving:
    """Return a function that serves the application in a way."""
    log = tmp_path / "outcomes.jsonl"
    log.touch()

    @contextmanager
    def serve(name: str, certificate: dict[str, str] | None = None, **env: str) -> Iterator[Site]:
        way, is_ours = WAYS[name], name.startswith("zero-copy")
        options = tuple(option.replace(*IMPATIENT) for option in way.options)
        options += tuple(f"--{key.replace('_', '-')}={path}" for key, path in (certificate or {}).items())
        env = {"ACCOUNTS_ROOT": str(root), "ACCOUNTS_LOG": str(log), "ACCOUNTS_PORT": "{port}", **env}
        with replace(way, options=options).serving(
            "tests.asgi.accounts_app:make_app", log=tmp_path / "log", env=env
        ) as server:
            yield Site(server, log, OF_ASGI, is_ours, certificate, has_bounds=way.server != "granian")

    return serve


IMPATIENT = ("downloadview_async.asgi.server:DownloadProtocol", "tests.asgi.accounts_app:impatient")


@contextmanager
def serving_django(kind: str, root: Path, tmp_path: Path) -> Iterator[Site]:
    """Serve the Django project by a function of its module, or as a WSGI application."""
    log, port = tmp_path / "outcomes.jsonl", free_port()
    log.touch()
    env = {
        "SERVED_ROOT": str(root),
        "SERVED_PORT": str(port),
        "SERVED_DATABASE": str(tmp_path / "database.sqlite3"),
        "SERVED_OUTCOMES": str(log),
    }
    app = "tests.contrib.django.served_app"
    command = [sys.executable, "-m", app]
    if kind != "wsgi":
        protocol = IMPATIENT[1] if kind == "ours" else "httptools"
        options = ["--http", protocol, "--lifespan", "off", "--no-access-log", "--port", str(port)]
        command = [sys.executable, "-m", "uvicorn", "--factory", *options, f"{app}:{kind}"]
    with serving(command, port, log=tmp_path / "log", env=env) as server:
        yield Site(server, log, OF_DJANGO, kind == "ours", pipelines=kind != "wsgi")


def stress(site: Site, count: int, *, then: Callable[[], object] = lambda: None) -> None:
    """Send requests by eight clients, call a function in between, and compare the outcomes."""
    results: dict[str, Received] = {}
    seed = random.randrange(1 << 30)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        client, chance = Client(site, seed + worker, results), random.Random(seed - worker)
        try:
            waiting = [str(number) for number in range(worker, count, 8)]
            while waiting:
                many = chance.choice([1, 1, 1, 2, 5]) if site.pipelines else 1
                numbers, waiting = waiting[:many], waiting[many:]
                client.ask(numbers)
        except ConnectionRefusedError as exc:
            if not site.may_break:
                failures.append(exc)
        except BaseException as exc:
            failures.append(RuntimeError(numbers, [results.get(number) for number in numbers], exc))
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    then()
    for thread in threads:
        thread.join()
    assert not failures, (seed, failures[:3])
    begun = {number for number, received in results.items() if received.status or not received.is_abandoned}
    if site.may_break:
        site.server.process.wait(30)
    else:
        outcomes_in(site.outcomes, len(begun))
        site.server.stop()  # without a lifespan, what waits then would be lost
    outcomes = outcomes_in(site.outcomes, 0)
    text = site.outcomes.read_text()
    assert not [secret for secret in SECRETS if secret in text]
    wrong = []
    for number, received in results.items():
        these = outcomes.get(number, [])
        if len(these) != 1:
            if these or number in begun:
                wrong.append((number, received, these))
        elif problem := problem_of(received, these[0], site):
            wrong.append((problem, received, these))
    assert not wrong, "\n".join(map(repr, (seed, len(wrong), *wrong[:20])))
    assert outcomes.keys() <= results.keys()
    assert len(begun) > count / 2 or site.may_break


def problem_of(received: Received, outcome: dict[str, Any], site: Site) -> str | None:
    """Return what is wrong with an outcome, or None."""
    assert outcome["method"] == received.method
    sent, body = outcome["sent"], received.body
    if received.status and outcome["status"] != received.status:
        return "another status"
    slack = 2 * RECEIVE_BUFFER * received.is_chunked
    if received.is_complete:
        if outcome["result"] == "aborted":
            # A reset hides the last acknowledgement, and a client of TLS that closes at once sends one: see limits.md.
            all_bytes = sent + outcome["unacknowledged"]
            is_hidden = site.certificate and (outcome["reason"], all_bytes) == ("client-left", body)
            return None if is_hidden else "aborted, but the client has all"
        return None if sent == body else "other bytes"
    if (outcome["path"], outcome["status"], outcome["kind"], outcome["result"]) == (
        "/broken",
        200,
        "chunks",
        "completed",
    ):
        return "not aborted"
    more, less = 2 * RECEIVE_BUFFER + slack, 2 * RECEIVE_BUFFER + RECORDS * bool(site.certificate)
    if not site.is_ours:
        more, less = more + MESSAGE, SEND_BUFFER if site.has_bounds else 1 << 62
    if not received.is_abandoned:
        if outcome["path"] != "/broken":
            return "the server has aborted the answer"
        # Other servers may drop what they still hold when the application fails, and do not tell that.
        return None if 0 <= sent - body <= less * (not site.is_ours) else "other bytes of a broken answer"
    is_reset = outcome["unacknowledged"] > 0
    if outcome["result"] != "aborted" or (outcome["reason"] == "failed" and not is_reset):  # it has left the process
        return None if sent >= body - slack else "the client has received more"
    # What has arrived but was not acknowledged counts as not sent. Other servers do not tell what they still hold, nor
    # how much of a last message they have sent. Some hold all that they are given.
    return None if -more <= sent - body <= less else f"{sent - body} bytes off"


@pytest.mark.parametrize("way", ["zero-copy, asyncio", "zero-copy, uvloop", "chunks, httptools on uvloop"])
def test_each_request_has_one_outcome_although_clients_leave(serve: Serving, way: str) -> None:
    with serve(way) as site:
        stress(site, 400)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_each_request_has_one_outcome_if_files_are_sent_when_the_application_has_returned(
    serve: Serving, loop: str
) -> None:
    with serve(f"zero-copy, {loop}", ACCOUNTS_LATER="1") as site:
        stress(site, 400)


@pytest.mark.parametrize(
    ("is_second", "pieces"), [(False, "1"), (False, "12"), (False, "32"), (True, "32"), (False, "12,600")]
)
@pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_bytes_that_a_reset_drops_do_not_count(
    loop: str,
    is_encrypted: bool,
    is_second: bool,
    pieces: str,
    serve: Serving,
    tmp_path: Path,
    certificate: dict[str, str],
) -> None:
    """The application sends on and returns before the server learns of the reset from its event loop.

    is_second: whether the server still holds most of another answer when this one begins. pieces: that the application
    sends before the reset, and after it without waiting, up to the end of the answer.
    """
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with serve(f"zero-copy, {loop}", certificate if is_encrypted else None, ACCOUNTS_GATE=str(gate)) as site:
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            plain.connect(("127.0.0.1", site.port))
            sock = _trusting(certificate).wrap_socket(plain, server_hostname="localhost") if is_encrypted else plain
            number = sock.fileno()
            request = f"GET /gate/?{pieces} HTTP/1.1\r\nHost: x\r\nX-Number: 1\r\n\r\n"
            received = 0
            if is_second:
                request = f"GET /one HTTP/1.1\r\nHost: x\r\nX-Number: 0\r\n\r\n{request}"
                received -= ONE
            sock.sendall(request.encode())
            while received < 1 << 15:
                piece = sock.recv(1 << 13)
                assert piece
                received += len(piece)
            with gate.open("wb") as opened:  # returns when the event loop has stopped at the gate
                unread = struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, b"\0" * 4))[0]
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
                opened.write(b"1")
        (outcome,) = outcomes_in(site.outcomes, 1 + is_second)["1"]
    assert (outcome["result"], outcome["reason"]) == ("aborted", "client-left")
    assert abs(outcome["sent"] - received - unread) < 2 * RECEIVE_BUFFER, (outcome["sent"], received, unread)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_tiny_records_before_an_answer_over_tls_do_not_change_its_bytes(
    loop: str, version: ssl.TLSVersion, serve: Serving, tmp_path: Path, certificate: dict[str, str]
) -> None:
    """TLS adds more to them than they have, and the kernel knows only what it adds to all together."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    context = _trusting(certificate)
    context.minimum_version = context.maximum_version = version
    with serve(f"zero-copy, {loop}", certificate, ACCOUNTS_GATE=str(gate)) as site:
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            plain.settimeout(60)
            plain.connect(("127.0.0.1", site.port))
            sock = context.wrap_socket(plain, server_hostname="localhost")
            number = sock.fileno()
            sock.sendall(b"GET /gate/?tiny HTTP/1.1\r\nHost: x\r\n\r\n")
            received = -TINY
            while received < 0:
                received += len(sock.recv(1 << 13).rpartition(b"\r\n\r\n")[2])
            sock.sendall(b"GET /gate/?60 HTTP/1.1\r\nHost: x\r\nX-Number: 1\r\n\r\n")
            while received < 1 << 15:
                received += len(sock.recv(1 << 13))
            with gate.open("wb") as opened:
                unread = struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, b"\0" * 4))[0]
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
                opened.write(b"1")
        (outcome,) = outcomes_in(site.outcomes, 1)["1"]
    assert (outcome["result"], outcome["reason"]) == ("aborted", "client-left")
    assert abs(outcome["sent"] - received - unread) < 2 * RECEIVE_BUFFER, (outcome["sent"], received, unread)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_websocket_over_tls_leaves_no_descriptor(loop: str, serve: Serving, certificate: dict[str, str]) -> None:
    upgrade = (
        "GET /none HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with serve(f"zero-copy, {loop}", certificate) as site:
        descriptors = Path(f"/proc/{site.server.process.pid}/fd")

        def ask() -> bytes:
            plain = socket.create_connection(("127.0.0.1", site.port), 60)
            with _trusting(certificate).wrap_socket(plain, server_hostname="localhost") as sock:
                sock.sendall(upgrade.encode())
                return sock.recv(1 << 16)

        assert ask().startswith(b"HTTP/1.1 403 ")
        before = len([*descriptors.iterdir()])
        for _ in range(8):
            ask()
        deadline = time.monotonic() + 20
        while (after := len([*descriptors.iterdir()])) > before:
            assert time.monotonic() < deadline, (before, after)
            time.sleep(0.05)


def _trusting(certificate: dict[str, str]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate["ssl_certfile"])


SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("way", [pytest.param(way, marks=SLOW) for way in WAYS if way != "zero-copy, oldest uvicorn"])
def test_each_of_many_requests_has_one_outcome(serve: Serving, way: str) -> None:
    with serve(way) as site:
        stress(site, COUNT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_each_of_many_requests_over_tls_has_one_outcome(serve: Serving, loop: str, certificate: dict[str, str]) -> None:
    with serve(f"zero-copy, {loop}", certificate) as site:
        stress(site, COUNT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_of_many_requests_for_objects_of_s3_has_one_outcome(serve: Serving, s3: S3) -> None:
    for name in ("large.bin", "huge.bin"):
        s3.put(f"outcomes/{name}", b"s" * SIZES[name])
    options = json.dumps({"url": f"s3://{BUCKET}/outcomes/", **s3.options})
    with serve("zero-copy, uvloop", ACCOUNTS_S3=options) as site:
        stress(replace(site, targets=OF_S3), COUNT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["ours", "stock", "wsgi"])
def test_each_of_many_requests_to_django_has_one_outcome(kind: str, root: Path, tmp_path: Path) -> None:
    with serving_django(kind, root, tmp_path) as site:
        stress(site, COUNT)


@pytest.mark.parametrize("is_later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_each_request_has_one_outcome_although_the_server_is_stopped(serve: Serving, loop: str, is_later: bool) -> None:
    with serve(f"zero-copy, {loop}", **({"ACCOUNTS_LATER": "1"} if is_later else {})) as site:

        def stop() -> None:
            outcomes_in(site.outcomes, 100)
            site.server.process.send_signal(signal.SIGTERM)

        stress(replace(site, may_break=True), 4000, then=stop)
        assert site.server.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_answer_that_the_kernel_has_is_complete_although_the_connection_closes(loop: str) -> None:
    """The transport tells that it has passed everything on, and then at once that the connection is lost."""
    outcomes: list[dv.Outcome] = []
    body = bytes(8 << 20)

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})
        scope["extensions"][CONNECTION].transport.close()

    async def run() -> None:
        async with live(dv.Accounts(endpoint, observers=[outcomes.append]), http=DownloadProtocol) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(body)) == body
            writer.close()
            with anyio.fail_after(20):
                while not outcomes:
                    await asyncio.sleep(0.01)

    runner: Any = pytest.importorskip(loop).run
    runner(run())
    (outcome,) = outcomes
    assert (outcome.result, outcome.sent) == ("completed", len(body))
