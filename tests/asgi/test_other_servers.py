"""Servers of others: Zero Copy Send where it works, the right bytes and one right outcome everywhere."""

import asyncio
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.asgi.ways import OTHER_SERVERS, needs_other_servers
from tests.live import ask, make_old
from tests.servers import Server, free_port, serving

SIZE = (20 << 20) + 7  # more than a socket takes
pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

SERVERS = {
    "nonecorn": ("hypercorn", ()),
    "anycorn, trio": ("anycorn", ("-k", "trio")),
    "anycorn, asyncio": ("anycorn", ()),
}
ZERO_COPY = ("nonecorn", "anycorn, trio")
"""On asyncio, anycorn fails where the socket takes no more: see `downloadview_async.asgi.zero_copy`."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    (root / "large.bin").write_bytes(os.urandom(SIZE))
    (root / "small.txt").write_bytes(b"small")
    make_old(root)
    return root


@pytest.fixture(scope="module", params=SERVERS)
def server(root: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs_other_servers()
    module, options = SERVERS[request.param]
    port = free_port()
    app = "tests.asgi.other_servers_app:make_app()"
    command = [sys.executable, "-m", module, *options, "--bind", f"127.0.0.1:{port}", app]
    log = tmp_path_factory.mktemp("log") / "server.log"
    env = {"SERVERS_ROOT": str(root), "PYTHONPATH": str(OTHER_SERVERS)}
    with serving(command, port, log=log, env=env) as server:
        yield server


@pytest.fixture
def is_zero_copy(request: pytest.FixtureRequest, server: Server) -> bool:
    return request.node.callspec.params["server"] in ZERO_COPY


@pytest.fixture
def port(server: Server) -> int:
    assert isinstance(server.address, int)
    return server.address


async def state_of(port: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((await ask(port, "/state")).body)
    return found


async def ended(port: int, path: str, count: int) -> dict[str, Any]:
    """Return the last outcome of a path, once there are so many of them, and nothing is open."""
    deadline = time.monotonic() + 20
    while True:
        state = await state_of(port)
        outcomes = [one for one in state["outcomes"] if one["path"] == path]
        if len(outcomes) >= count and not state["held"]:
            assert len(outcomes) == count
            last: dict[str, Any] = outcomes[-1]
            return last
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("through", ["plain", "gzip", "limited", "basehttp", "dropping", "keeping", "foreign"])
async def test_bytes_and_outcomes(port: int, root: Path, is_zero_copy: bool, through: str) -> None:
    content, path = (root / "large.bin").read_bytes(), f"/{through}/large.bin"
    before = (await state_of(port))["kernel"]
    whole = await ask(port, path)
    assert (whole.status, whole.complete, whole.body == content) == (200, True, True)
    outcome = await ended(port, path, 1)
    assert (outcome["result"], outcome["reason"], outcome["sent"]) == ("completed", None, SIZE)

    part = await ask(port, path, headers={"Range": "bytes=1000-9000000"})
    assert (part.status, part.complete, part.body == content[1000:9000001]) == (206, True, True)
    outcome = await ended(port, path, 2)
    assert (outcome["status"], outcome["result"], outcome["sent"]) == (206, "completed", 8_999_001)
    if through != "foreign":
        is_used = is_zero_copy and through == "plain"
        assert outcome["kind"] == ("zero-copy" if is_used else "chunks")
        sent = (await state_of(port))["kernel"] - before
        assert (sent >= 0.9 * (SIZE + 8_999_001)) if is_used else sent == 0  # what is not in the cache goes in chunks

    head = await ask(port, path, method="HEAD")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(SIZE), b"")
    assert (await ended(port, path, 3))["result"] == "completed"


@pytest.mark.parametrize(
    "target, headers, status",
    [
        ("/plain/small.txt", {}, 200),
        ("/plain/large.bin", {"Range": "bytes=0-99999,5000000-5999999"}, 206),
        ("/plain/large.bin", {"Range": "bytes=5-", "If-Range": '"another"'}, 200),
        ("/plain/?archive=zip", {}, 200),
        ("/plain/none", {}, 404),
    ],
)
async def test_other_answers(port: int, target: str, headers: dict[str, str], status: int) -> None:
    path = target.partition("?")[0]
    before = sum(one["path"] == path for one in (await state_of(port))["outcomes"])
    answer = await ask(port, target, headers=headers)
    assert (answer.status, answer.complete) == (status, True)
    outcome = await ended(port, path, before + 1)
    assert outcome["result"] == ("completed" if status < 400 else "refused")
    assert outcome["sent"] == len(answer.body)


async def test_one_connection_has_many_answers(port: int, root: Path) -> None:
    content = (root / "large.bin").read_bytes()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for start in range(0, SIZE - 2_000_000, 4_000_000):
        span = f"bytes={start}-{start + 1_999_999}"
        writer.write(f"GET /plain/large.bin HTTP/1.1\r\nHost: x\r\nRange: {span}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(2_000_000) == content[start : start + 2_000_000]
    writer.close()


@pytest.mark.parametrize("headers", ["", "Range: bytes=1-\r\n"])
async def test_a_client_that_leaves(port: int, server: Server, headers: str) -> None:
    path = "/plain/large.bin"
    before = sum(one["path"] == path for one in (await state_of(port))["outcomes"])
    for number in range(1, 6):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
            client.recv(1000)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        outcome = await ended(port, path, before + number)
        assert (outcome["result"], outcome["reason"]) == ("aborted", "client-left")
        assert outcome["sent"] < SIZE
    assert "Traceback" not in server.log


async def test_a_file_that_shrinks_aborts_the_connection(port: int, root: Path) -> None:
    content = os.urandom(SIZE)
    path = root / "shrinking.bin"
    path.write_bytes(content)
    answer = await ask(port, "/shrinking/shrinking.bin", headers={"Range": "bytes=10-19000000"})
    assert (answer.status, answer.complete) == (206, False)
    assert content[10:].startswith(answer.body)
    outcome = await ended(port, "/shrinking/shrinking.bin", 1)
    assert (outcome["result"], outcome["reason"]) == ("aborted", "file-changed")
