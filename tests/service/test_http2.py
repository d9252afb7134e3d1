"""HTTP/2 by uvicorn's zttp: the bytes are right, and a client that does not read costs little and is dropped."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from downloadview_async.asgi import deadline
from tests.asgi.test_server import app_for
from tests.asgi.ways import OTHER_SERVERS, needs_other_servers
from tests.live import live
from tests.servers import PROJECT, Server, free_port, serving

SIZE = 200_000_000
CONTENT = os.urandom(5_000_000)
STALL = 1.0
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs_other_servers()
    directory = tmp_path_factory.mktemp("service")
    (directory / "files").mkdir()
    with (directory / "files" / "large.bin").open("wb") as file:
        file.write(CONTENT)
        file.truncate(SIZE)
    (directory / "files" / "small.txt").write_bytes(b"small")
    port = free_port()
    (directory / "settings.toml").write_text(
        f"[server]\nport = {port}\nhttp2 = true\nstall_timeout = {STALL}\n"
        "[sources.files]\ntype = 'path'\nroot = 'files'\n[[routes]]\npath = '/files/{path:path}'\nsource = 'files'\n"
    )
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", str(directory / "settings.toml")]
    env = {"PYTHONPATH": f"{OTHER_SERVERS}{os.pathsep}{PROJECT}"}
    with serving(command, port, log=directory / "log", env=env, cwd=directory) as server:
        yield server


class Client:
    """A connection of HTTP/2 with prior knowledge, which takes what its windows allow."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(20)
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.http.initiate_connection()
        self._flush()

    def request(self, path: str, method: str = "GET", **headers: str) -> int:
        stream = self.http.get_next_available_stream_id()
        fields = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "test")]
        self.http.send_headers(stream, [*fields, *headers.items()], end_stream=True)
        self._flush()
        return stream

    def _flush(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def events(self, *, reads: bool = True) -> Iterator[Any]:
        while block := self.socket.recv(1 << 16):
            for event in self.http.receive_data(block):
                if isinstance(event, h2.events.DataReceived) and reads:
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                yield event
            self._flush()

    def answer(self, stream: int) -> tuple[dict[str, str], bytes]:
        headers: dict[str, str] = {}
        body = bytearray()
        for event in self.events():
            if event.stream_id != stream if hasattr(event, "stream_id") else True:
                continue
            if isinstance(event, h2.events.ResponseReceived):
                headers = {str(name): str(value) for name, value in event.headers}
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.StreamEnded):
                return headers, bytes(body)
            elif isinstance(event, h2.events.StreamReset):
                raise ConnectionResetError(f"the stream was reset after {len(body)} bytes")
        raise ConnectionResetError("the connection ended")


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    assert isinstance(server.address, int)
    client = Client(server.address)
    yield client
    client.socket.close()


def test_the_costs_are_told_at_the_start(server: Server) -> None:
    assert server.log.count("HTTP/2 is experimental in uvicorn") == 1


def test_answers(client: Client) -> None:
    headers, body = client.answer(client.request("/files/small.txt"))
    assert (headers[":status"], body) == ("200", b"small")
    headers, body = client.answer(client.request("/files/large.bin", range="bytes=1000000-4999999"))
    assert (headers[":status"], body == CONTENT[1_000_000:]) == ("206", True)
    headers, body = client.answer(client.request("/files/large.bin", "HEAD"))
    assert (headers["content-length"], body) == (str(SIZE), b"")
    assert client.answer(client.request("/files/none"))[0][":status"] == "404"


def test_http_1_is_zero_copy_as_ever(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(server.address))) as plain:
        plain.sendall(
            b"GET /files/large.bin HTTP/1.1\r\nHost: x\r\nRange: bytes=0-2999999\r\nConnection: close\r\n\r\n"
        )
        received = b"".join(iter(lambda: plain.recv(1 << 16), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206")
    assert body == CONTENT[:3_000_000]


@pytest.mark.parametrize("reads", [True, False], ids=["gives no window", "reads nothing"])
def test_a_client_that_stalls_costs_little_and_is_dropped(server: Server, reads: bool) -> None:
    def memory() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, dropped = memory(), server.log.count("Transfer aborted")
    client = Client(int(server.address))
    if not reads:
        client.http.increment_flow_control_window(1 << 30)
        client.http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30})
    client.request("/files/large.bin")
    server.wait_for_log("Transfer aborted: the client took less than 64 bytes a second", times=dropped + 1)
    assert memory() - before < 40_000_000
    if reads:
        ends = (h2.events.StreamReset, h2.events.ConnectionTerminated)
        assert any(isinstance(event, ends) for event in client.events(reads=False))
    client.socket.close()


def test_a_slow_client_gets_all(client: Client) -> None:
    stream = client.request("/files/large.bin", range="bytes=0-999999")
    taken = 0
    for event in client.events():
        if isinstance(event, h2.events.DataReceived):
            taken += len(event.data)
            time.sleep(0.02)
        elif isinstance(event, h2.events.StreamEnded):
            break
    assert (event.stream_id, taken) == (stream, 1_000_000)


@pytest.mark.asyncio
async def test_the_deadline_for_other_servers_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_other_servers()
    monkeypatch.setattr(sys, "path", [*sys.path, str(OTHER_SERVERS)])
    from downloadview_async.asgi.http2 import protocols

    monkeypatch.setattr(deadline, "STALL_SECONDS", 0.1)  # for each 64 KiB
    (tmp_path / "file.bin").write_bytes(CONTENT)
    async with live(app_for(tmp_path), http=protocols()) as port:
        client = await asyncio.to_thread(Client, port)
        stream = client.request("/ours/file.bin")
        await asyncio.sleep(1)
        _, body = await asyncio.to_thread(client.answer, stream)
        client.socket.close()
    assert body == CONTENT
