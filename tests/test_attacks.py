"""The running service under attack: raw sockets, hostile upstreams, cut connections, signals, no descriptors left."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live import Answer, parse
from tests.servers import Server, free_port, serving

MIB = 1 << 20
PATIENCE = 20.0  # seconds; only what hangs takes as long
ROUTES = ["path", "storage", "object", "remote"]

SETTINGS = """
[sources.path]
type = "path"
root = "files"
[sources.storage]
type = "storage"
url = "file:files"
[sources.object]
type = "object"
database = "sqlite+aiosqlite:///rows.db"
table = "rows"
key = "key"
file = "file"
source = "path"
[sources.remote]
type = "remote"
url = "http://127.0.0.1:{port}/path/"
allow_hosts = ["127.0.0.1"]
[sources.hostile]
type = "remote"
url = "http://127.0.0.1:{upstream}/"
allow_hosts = ["127.0.0.1"]
read_timeout = 1
[sources.virtual]
type = "virtual"
factory = "made:make"
"""
ROUTE = '[[routes]]\npath = "/{0}/{{name:path}}"\nsource = "{0}"\n'

# A generator that waits for a file called `go` beside it: plain code that blocks for as long as a test wants.
MADE = """
import time
from pathlib import Path
from downloadview_async import VirtualFile

def held():
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    yield b"went on"

def endless():
    while True:
        yield bytes(65536)

async def make(name):
    return VirtualFile({"held": held, "endless": endless}[name], name=name)
"""


class Upstream(socketserver.ThreadingTCPServer):
    """An HTTP server that answers whatever it is told to, byte by byte, and then waits or closes."""

    allow_reuse_address = True
    daemon_threads = True
    answer = b""
    wait = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Upstream)
        with contextlib.suppress(ConnectionError):
            received = b""
            while b"\r\n\r\n" not in received:
                block = self.request.recv(65536)
                if not block:
                    return
                received += block
            self.request.sendall(self.server.answer)
            if self.server.wait:
                self.request.recv(1)  # until the client gives up


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(MIB) * 12


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """A directory with settings and a tree of hostile entries."""
    site = tmp_path_factory.mktemp("site")
    files = site / "files"
    (files / "sub").mkdir(parents=True)
    (files / "ten.txt").write_bytes(b"0123456789")
    (files / "empty.txt").write_bytes(b"")
    (files / "big.bin").write_bytes(content)
    (site / "secret.txt").write_text("SECRET")
    (site / "files-private").mkdir()
    (site / "files-private" / "secret.txt").write_text("SECRET")
    os.mkfifo(files / "fifo")
    for name, target in [
        ("out", "../secret.txt"),
        ("absolute", str(site / "secret.txt")),
        ("proc", "/proc/self/environ"),
        ("loop", "loop"),
        ("up", ".."),
        ("back", "../files/ten.txt"),
        ("zero", "/dev/zero"),
    ]:
        (files / name).symlink_to(target)
    (site / "made.py").write_text(MADE)
    with contextlib.closing(sqlite3.connect(site / "rows.db")) as rows:
        rows.execute("CREATE TABLE rows (key TEXT, file TEXT)")
        names = ["big.bin", "ten.txt", "../secret.txt", "/etc/passwd", "sub", "fifo", "ten.txt\0", "", "out"]
        rows.executemany("INSERT INTO rows VALUES (?, ?)", [(name.replace("/", "|"), name) for name in names])
        rows.commit()
    return site


@contextlib.contextmanager
def service(
    site: Path, upstream_port: int, log: Path, *arguments: str, descriptors: int | None = None
) -> Iterator[Server]:
    """Serve the site on a free port, with no more descriptors than that."""
    port = free_port()
    settings = site / f"{port}.toml"
    settings.write_text(
        SETTINGS.format(port=port, upstream=upstream_port)
        + "".join(ROUTE.format(name) for name in [*ROUTES, "hostile", "virtual"])
    )
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", str(settings), "--port", str(port)]
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    with serving([*command, *arguments], port, log=log) as server:
        yield server


@pytest.fixture(scope="module")
def server(site: Path, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(site, upstream.server_address[1], tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def connected(server: Server, request: bytes = b"", *, buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(PATIENCE)
    try:
        connection.connect(("127.0.0.1", int(server.address)))
        connection.sendall(request)
    except OSError:
        connection.close()
        raise
    return connection


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *headers, "", ""]).encode()


def read_to_the_end(connection: socket.socket) -> bytes:
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while block := connection.recv(1 << 16):
            received += block
    return bytes(received)


def ask_raw(server: Server, request: bytes) -> Answer:
    with connected(server, request) as connection:
        return parse(read_to_the_end(connection))


def ask(server: Server, path: str, *headers: str, method: str = "GET") -> Answer:
    with connected(server, get(path, "Connection: close", *headers, method=method)) as connection:
        return parse(read_to_the_end(connection), method=method)


def eventually(condition: Callable[[], bool], message: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.02)


OUTSIDE = [
    *["/../x", "/%2e%2e/x", "/..%2fsecret.txt", "/%252e%252e/x", "//etc/passwd", "/%2fetc/passwd", "/../../secret.txt"],
    *[
        "/../files-private/secret.txt",
        "/..%2ffiles-private%2fsecret.txt",
        "/sub/../ten.txt",
        "/ten.txt/.",
        "/./../ten.txt",
    ],
    *[
        "/ten.txt/",
        "/ten.txt/x",
        "/ten.txt;x=1",
        "/ten.txt%00",
        "/%00",
        "/%ed%a0%80",
        "/%ff",
        "/%c0%ae%c0%ae/secret.txt",
    ],
    *["/ten.txt%0d%0aX-Evil:%201", "/c:/x", "/C%3a%5cx", "/%5c%5chost%5cx", "/ten.txt::$DATA", "/CON", "/nul.txt"],
    *[
        "/" + "n" * 300,
        "/" + "a/" * 2500,
        "/" + "n" * 5000,
        "/sub",
        "/sub/",
        "/",
        "/fifo",
        "/out",
        "/absolute",
        "/proc",
    ],
    *["/loop", "/up/secret.txt", "/up/files/ten.txt", "/back", "/zero", "/%", "/%zz", "/.", "/.."],
]


@pytest.mark.parametrize("route", ["path", "storage", "remote"])
@pytest.mark.parametrize("target", ["/./ten.txt", "//ten.txt", "/.//./ten.txt", "/%2e/ten.txt", "/%2ften.txt"])
def test_single_dots_and_empty_segments_name_the_same_file(server: Server, route: str, target: str) -> None:
    assert ask(server, f"/{route}{target}").body == ask(server, f"/{route}/ten.txt").body == b"0123456789"


@pytest.mark.parametrize("route", ["path", "storage", "remote"])
def test_whatever_the_target_spells_nothing_outside_is_told_apart_from_nothing(server: Server, route: str) -> None:
    missing = ask(server, f"/{route}/none")
    assert missing.status == 404
    for path in OUTSIDE:
        answer = ask(server, f"/{route}{path}")
        differing = {"date", "x-request-id"}
        assert (answer.status, answer.body) == (404, missing.body), path
        assert {name: value for name, value in answer.headers.items() if name not in differing} == {
            name: value for name, value in missing.headers.items() if name not in differing
        }, path


def test_rows_that_name_what_is_outside_are_missing(server: Server) -> None:
    assert ask(server, "/object/ten.txt").body == b"0123456789"
    for key in ["..|secret.txt", "|etc|passwd", "sub", "fifo", "ten.txt%00", "", "out", "'%20or%201=1", "x" * 5000]:
        assert ask(server, f"/object/{key}").status == 404, key


def test_one_connection_survives_every_answer_that_has_no_file(server: Server) -> None:
    """What is answered without a body, or with another than was asked for, leaves the next answer where it belongs."""
    for route in ROUTES:
        path = f"/{route}/ten.txt"
        etag = ask(server, path, method="HEAD").headers["etag"]
        requests = [
            (get(path, f"If-None-Match: {etag}"), 304),
            (get(path, "Range: bytes=50-"), 416),
            (get(path, 'If-Match: "other"'), 412),
            (get(path, method="HEAD"), 200),
            (get(f"/{route}/none"), 404),
            (get(f"/{route}/none", method="HEAD"), 404),
            (get(path, "Content-Length: 0", method="POST"), 405),
            (get(path, method="OPTIONS"), 204),
            (get(path, "Range: bytes=0-1,4-5"), 206),
            (get("/path/empty.txt", "Range: bytes=0-"), 200),
            (get("/nope"), 404),
            (get(path, "Connection: close"), 200),
        ]
        with connected(server, b"".join(request for request, _ in requests)) as connection:
            received = read_to_the_end(connection)
        statuses = [int(answer[:3]) for answer in received.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [status for _, status in requests], route
        assert received.endswith(b"\r\n\r\n0123456789"), route


@pytest.mark.parametrize("route", ROUTES)
def test_files_asked_for_together_come_one_after_the_other(server: Server, content: bytes, route: str) -> None:
    path = f"/{route}/big.bin"
    requests = [get(path), get(path, "Range: bytes=100-9000000"), get(f"/{route}/none"), get(path, "Connection: close")]
    with connected(server, b"".join(requests)) as connection:
        received = read_to_the_end(connection)
    for status, body in [
        (b"200", content),
        (b"206", content[100:9000001]),
        (b"404", b"Not Found"),
        (b"200", content),
    ]:
        head, _, received = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        assert received.startswith(body)
        received = received[len(body) :]
    assert received == b""


def test_a_client_of_http_1_0_needs_no_host(server: Server) -> None:
    answer = ask_raw(server, b"GET /path/ten.txt HTTP/1.0\r\nRange: bytes=2-3\r\n\r\n")
    assert (answer.status, answer.body, answer.complete) == (206, b"23", True)


@pytest.mark.parametrize("route", ROUTES)
def test_an_interim_answer_never_comes_amid_the_file(server: Server, content: bytes, route: str) -> None:
    with connected(
        server, get(f"/{route}/big.bin", "Expect: 100-continue", "Content-Length: 5", "Connection: close")
    ) as connection:
        received = read_to_the_end(connection)
    head, _, body = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert body == content


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/path/ten.txt"),
        ("GET", "/path/none"),
        ("GET", "/nope"),
        ("POST", "/path/ten.txt"),
        ("GET", "/hostile/x"),
    ],
)
def test_a_body_that_no_answer_needs_is_not_read(server: Server, upstream: Upstream, method: str, path: str) -> None:
    upstream.answer = b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n"
    with connected(server, get(path, "Content-Length: 10000000000", method=method)) as connection:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * MIB:
                sent += connection.send(bytes(65536))
    assert sent < 64 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("filler", [b"a" * 65536, b"X: a\r\n" * 10000], ids=["one field", "many fields"])
def test_an_endless_head_is_refused(server: Server, filler: bytes) -> None:
    with connected(server, b"GET / HTTP/1.1\r\nHost: x\r\nX: ") as connection:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 16 * MIB:
                sent += connection.send(filler)
    assert sent < 16 * MIB
    assert ask(server, "/path/ten.txt").status == 200


FAILING = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", False, 502),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", True, 504),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", False, 502),
    (b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:99999/\r\nContent-Length: 0\r\n\r\n", False, 502),
    (b"HTTP/1.1 302 X\r\nLocation: http://[::1/\r\nContent-Length: 0\r\n\r\n", False, 502),
    (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 200_000, True, 502),
]


@pytest.mark.parametrize("answer, wait, status", FAILING, ids=["ends", "stalls", "chunk", "port", "url", "head"])
def test_an_upstream_that_fails_before_the_first_byte_is_the_upstreams_fault(
    server: Server, upstream: Upstream, answer: bytes, wait: bool, status: int
) -> None:
    upstream.answer, upstream.wait = answer, wait
    try:
        assert ask(server, "/hostile/x").status == status
    finally:
        upstream.wait = False


def test_a_header_of_an_upstream_that_is_none_costs_nobody_the_file(server: Server, upstream: Upstream) -> None:
    upstream.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Language: x\x7f\r\nExpires: \x01\r\nVary: Origin\r\n"
        b'Content-Type: a/b\x01\r\nETag: "\x7f"\r\n\r\nhi'
    )
    answer = ask(server, "/hostile/x")
    assert (answer.status, answer.body, answer.headers["vary"]) == (200, b"hi", "Origin")
    assert {"content-language", "expires", "etag"}.isdisjoint(answer.headers)


def test_every_field_line_of_an_upstreams_list_counts(server: Server, upstream: Upstream) -> None:
    upstream.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nCache-Control: no-store\r\nCache-Control: max-age=60\r\n"
        b"Vary: Origin\r\nVary: Cookie\r\n\r\nhi"
    )
    headers = ask(server, "/hostile/x").headers
    assert (headers["cache-control"], headers["vary"]) == ("no-store, max-age=60", "Origin, Cookie")


class Cutter(socketserver.ThreadingTCPServer):
    """A relay that cuts every connection after some bytes, by reset and by a plain end in turn."""

    allow_reuse_address = True
    daemon_threads = True
    cuts = 0

    def __init__(self, port: int, length: int) -> None:
        super().__init__(("127.0.0.1", 0), _Cut)
        self.port = port
        self.length = length


class _Cut(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        cutter = self.server
        assert isinstance(cutter, Cutter)
        with socket.create_connection(("127.0.0.1", cutter.port)) as origin, contextlib.suppress(ConnectionError):
            origin.sendall(self.request.recv(65536))
            left = cutter.length
            while left and (block := origin.recv(min(left, 65536))):
                self.request.sendall(block)
                left -= len(block)
            if not left:
                cutter.cuts += 1
                if cutter.cuts % 2:
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def cutting(server: Server, length: int) -> Iterator[Cutter]:
    with Cutter(int(server.address), length) as cutter:
        thread = threading.Thread(target=cutter.serve_forever)
        thread.start()
        try:
            yield cutter
        finally:
            cutter.shutdown()
            thread.join()


CLIENTS = {
    "curl": ["curl", "-sS", "-C", "-", "-o", "file"],
    "wget": ["wget", "-q", "-c", "-t", "20", "--waitretry=0", "-O", "file"],
    "aria2c": [
        "aria2c",
        "-q",
        "-x4",
        "-s4",
        "-k1M",
        "-m30",
        "--retry-wait=0",
        "--enable-http-keep-alive=false",
        "-o",
        "file",
    ],
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "client", [pytest.param(client, marks=[] if client == "curl" else pytest.mark.slow) for client in CLIENTS]
)
def test_a_download_over_connections_that_are_cut_ends_as_the_file(
    server: Server, content: bytes, tmp_path: Path, client: str, route: str
) -> None:
    if shutil.which(client) is None:
        pytest.skip(f"{client} is not installed: apt install {client.replace('aria2c', 'aria2')}")
    with cutting(server, 5 * MIB // 2) as cutter:
        command = [*CLIENTS[client], f"http://127.0.0.1:{cutter.server_address[1]}/{route}/big.bin"]
        for _ in range(20):  # curl leaves trying again to its caller
            if subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0:
                break
        assert cutter.cuts >= 1  # how many depends on which of its connections a client is using
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_the_service_is_in_time_whoever_is_still_downloading(
    site: Path, upstream: Upstream, tmp_path: Path, number: int
) -> None:
    """A hundred downloads go on for as long as they may; one client reads nothing; nobody new is let in."""
    paths = ["/path/big.bin", "/storage/big.bin", "/object/big.bin", "/remote/big.bin", "/virtual/endless"]
    with (
        service(site, upstream.server_address[1], tmp_path / "log", "--timeout-graceful-shutdown", "2") as running,
        contextlib.ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(connected(running, get(paths[index % len(paths)]), buffer=4096)) for index in range(100)
        ]
        for client in clients:
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        running.process.send_signal(number)
        running.wait_for_log("Waiting for connections to close")
        with pytest.raises(ConnectionRefusedError):
            connected(running)
        for client in clients[1:]:
            assert client.recv(65536)
        assert running.process.wait(2 + 2) == 0
        assert "Traceback" not in running.log
        # the service is its own upstream, so a download of a remote file is two of them
        assert running.log.count("Transfer aborted: ") <= len(clients) * (len(paths) + 1) // len(paths)


@pytest.mark.slow
def test_plain_code_that_blocks_does_not_hold_up_the_end(site: Path, upstream: Upstream, tmp_path: Path) -> None:
    with service(site, upstream.server_address[1], tmp_path / "log", "--timeout-graceful-shutdown", "1") as running:
        try:
            with connected(running, get("/virtual/held")):
                eventually(lambda: threads(running) > 1, lambda: running.log)
                running.process.send_signal(signal.SIGTERM)
                assert running.process.wait(1 + 2) == 0
        finally:
            (site / "go").touch()
            running.stop()
            (site / "go").unlink()


def threads(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def test_forty_generators_that_block_hold_up_nobody_else(server: Server, site: Path) -> None:
    before = threads(server)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(server, get("/virtual/held", "Connection: close"))) for _ in range(40)]
        eventually(lambda: threads(server) >= before + 30, lambda: f"{threads(server)} threads")
        try:
            for path in [*(f"/{route}/ten.txt" for route in ROUTES), "/-/livez", "/-/readyz", "/"]:
                assert ask(server, path).status == 200, path
        finally:
            (site / "go").touch()
        for client in held:
            assert b"went on" in read_to_the_end(client)
    (site / "go").unlink()


@pytest.mark.slow
def test_without_descriptors_clients_are_turned_away_and_then_served_again(
    site: Path, upstream: Upstream, tmp_path: Path
) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 64
    paths = ["/path/big.bin", "/object/big.bin", "/remote/big.bin", "/storage/big.bin"]
    with service(site, upstream.server_address[1], tmp_path / "log", descriptors=64) as running:
        statuses = set()
        with contextlib.ExitStack() as stack:
            clients = []
            for index in range(200):
                with contextlib.suppress(ConnectionError):
                    clients.append(stack.enter_context(connected(running, get(paths[index % len(paths)]), buffer=4096)))
            for client in clients:
                with contextlib.suppress(ConnectionError):
                    statuses.add(client.recv(12))
        assert b"HTTP/1.1 200" in statuses
        assert statuses <= {b"HTTP/1.1 200", b"HTTP/1.1 502", b"HTTP/1.1 503", b""}
        eventually(lambda: _answers(running), lambda: running.log)
        for route in ROUTES:
            assert ask(running, f"/{route}/ten.txt").body == b"0123456789", route
        assert "Traceback" not in running.log


def _answers(server: Server) -> bool:
    try:
        return ask(server, "/path/ten.txt").status == 200
    except (OSError, ValueError, IndexError):  # turned away
        return False
