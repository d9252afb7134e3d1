"""A Django project on real servers: the HTTP table for every kind of download, clients that leave, and what is used."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import test_bounds as bounds
from tests.asgi import test_http_table as table
from tests.asgi.ways import BODY, PATH
from tests.contrib.django.served_app import KINDS
from tests.live import Answer, ask
from tests.servers import Server, free_port, serving

GIB = 1 << 30
MIB = 1 << 20
_ZERO_COPY = "downloadview_async.asgi.server:DownloadProtocol"
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Way:
    """A handler of the project, on a server."""

    app: str
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def serving(self, root: Path, directory: Path) -> Iterator[Server]:
        """Serve the files of `root`, with the log and the database in `directory`."""
        port = free_port()
        module = "tests.contrib.django.served_app"
        command = [sys.executable, "-m", module]
        if self.app != "wsgi":
            command = [sys.executable, "-m", "uvicorn", "--factory", f"{module}:{self.app}", "--port", str(port)]
            command += ["--no-access-log", *self.options]
        env = {"SERVED_ROOT": str(root), "SERVED_PORT": str(port), "SERVED_DATABASE": str(directory / "db"), **self.env}
        with serving(command, port, log=directory / "log", env=env) as server:
            yield server
        assert "Traceback" not in server.log


WAYS = {
    "zero-copy": Way("ours", ("--http", _ZERO_COPY), {"TABLE_SMALL": "0"}),
    "zero-copy, small files at once": Way("ours", ("--http", _ZERO_COPY)),
    "stock": Way("stock"),
}
WHOLE_ONLY = ["generated"]
RANGED = [kind for kind in KINDS if kind not in WHOLE_ONLY]
TAGGED = [kind for kind in RANGED if kind != "fileobject"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_ranged_kind = pytest.mark.parametrize("kind", RANGED)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, content in {"ten.txt": table.CONTENT, "empty.txt": b"", "page.html": b"<p>", "a.tar.gz": b"gz"}.items():
        (root / name).write_bytes(content)
        os.utime(root / name, ns=(0, table.MODIFIED * 1_000_000_000 + 500_000_005))
    return root


@pytest.fixture(
    scope="module",
    # test_files_of_a_disk_leave_by_path_send has a quick look at zero-copy
    params=[pytest.param(way, marks=[] if way == "stock" else pytest.mark.slow) for way in WAYS],
)
def server(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with WAYS[request.param].serving(root, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def port(server: Server) -> int:
    assert isinstance(server.address, int)
    return server.address


# --- the HTTP table


@each_ranged_kind
@pytest.mark.parametrize("value, expected", table.RANGES, ids=[value[:24] for value, _ in table.RANGES])
async def test_range(port: int, kind: str, value: str, expected: tuple[int, str | None, bytes]) -> None:
    await table.test_range(port, kind, value, expected)


@each_ranged_kind
async def test_several_parts(port: int, kind: str) -> None:
    for order in ("0-1,3-4", "8-9,0-0", "5-6,-1,0-1"):
        await table.test_several_parts_are_a_multipart_of_exact_length(port, kind, order)


@pytest.mark.parametrize("kind", WHOLE_ONLY)
async def test_what_is_made_while_it_is_sent_has_no_parts_and_no_length(port: int, kind: str) -> None:
    for value, _ in table.RANGES:
        answer = await ask(port, f"/{kind}/ten.txt", headers={"Range": value, "If-None-Match": '"x"'})
        assert (answer.status, answer.body, answer.complete) == (200, table.CONTENT, True)
        assert not {"content-length", "accept-ranges", "etag", "last-modified"} & answer.headers.keys()
    assert answer.headers["transfer-encoding"] == "chunked"
    head = await ask(port, f"/{kind}/ten.txt", method="HEAD")
    assert (head.status, head.body, head.headers["content-type"]) == (200, b"", answer.headers["content-type"])


@each_ranged_kind
async def test_head_empty_files_and_two_fields(port: int, kind: str) -> None:
    await table.test_head_gives_the_headers_of_get_and_no_body(port, kind)
    for value in ("bytes=0-0", "bytes=-1", "bytes=-0", "bytes=5-"):
        await table.test_any_range_of_an_empty_file_is_the_whole_of_it(port, kind, value)
    await table.test_two_range_fields_are_ignored(port, kind)


@pytest.mark.parametrize("kind", TAGGED)
async def test_conditions(port: int, kind: str) -> None:
    await table.test_entity_tag_conditions(port, kind)
    await table.test_date_conditions(port, kind)


@each_kind
async def test_types_and_dispositions(port: int, kind: str) -> None:
    await table.test_types_and_dispositions(port, kind)


@each_kind
async def test_a_missing_file_ignores_conditions_and_says_one_thing(port: int, kind: str) -> None:
    conditions = {"If-Match": '"x"', "If-None-Match": "*", "Range": "bytes=0-1"}
    plain = await ask(port, f"/{kind}/none.txt")
    conditional = await ask(port, f"/{kind}/none.txt", headers=conditions)
    elsewhere = await ask(port, "/not-any-url")
    for answer in (plain, conditional):
        assert (answer.status, answer.body) == (404, elsewhere.body)
        assert answer.headers["content-type"] == elsewhere.headers["content-type"]
        assert "none" not in str(answer.headers)


@each_kind
async def test_other_methods(port: int, kind: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = await ask(port, f"/{kind}/ten.txt", method=method, headers={"Content-Length": "0"})
        assert (answer.status, answer.headers["allow"], answer.body) == (405, "GET, HEAD, OPTIONS", b"")
    options = await ask(port, f"/{kind}/ten.txt", method="OPTIONS")
    assert (options.status, options.headers["allow"], options.body) == (200, "GET, HEAD, OPTIONS", b"")


async def test_requests_that_arrive_together_are_answered_in_order(port: int) -> None:
    await table.test_requests_that_arrive_together_are_answered_in_order(port)


# --- large files: memory, descriptors, connections to the database

_BRIEFLY = {"SERVED_KEEP": "0.1"}  # so that a test need not wait a second until all files are closed
LARGE_WAYS = {
    "zero-copy": Way("ours", ("--http", _ZERO_COPY), _BRIEFLY),
    "stock": Way("stock", env=_BRIEFLY),
}
ON_DISK = ["path", "blocking", "function", "blocking-function", "object", "async-object", "storage", "custom"]


@pytest.fixture(scope="module")
def large_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    with (root / "big.bin").open("wb") as file:
        file.truncate(GIB)  # sparse: it costs no disk, and is read like any other
    (root / "small.bin").write_bytes(b"small")
    return root


@pytest.fixture(scope="module", params=LARGE_WAYS)
def large(
    request: pytest.FixtureRequest, large_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with LARGE_WAYS[request.param].serving(large_root, tmp_path_factory.mktemp("server")) as server:
        yield server


def open_beneath(server: Server, path: Path) -> list[str]:
    """Return the files that the server has open in a directory, once for each descriptor; or the file itself."""
    directory, found = f"/proc/{server.process.pid}/fd", []
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"{directory}/{name}"))
    return [target for target in found if target.startswith(f"{path}/") or (target == str(path) and path.is_file())]


async def becomes(found: Callable[[], Any], wanted: Any) -> None:
    """Return when `found` returns what is wanted: it is on its way, and nobody says when it is there."""
    deadline = time.monotonic() + 20
    while (now := found()) != wanted:
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.01)


@contextmanager
def reading(server: Server, path: str, *, read: int = 4 * MIB) -> Iterator[socket.socket]:
    """Ask for a file, read some of it, and no more."""
    with socket.create_connection(("127.0.0.1", int(server.address))) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = 0
        while received < read:
            block = client.recv(1 << 16)
            assert block, "it ended"
            received += len(block)
        yield client


@pytest.mark.parametrize("kind", ["path", "blocking", "async-object", "custom", "remote", "generated"])
async def test_a_client_that_leaves_closes_the_file_at_once(large: Server, large_root: Path, kind: str) -> None:
    with reading(large, f"/{kind}/big.bin"):
        assert open_beneath(large, large_root) != []
    await becomes(lambda: open_beneath(large, large_root), [])
    assert (await ask(int(large.address), f"/{kind}/small.bin")).body == b"small"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "blocking", "object", "storage", "custom", "remote", "generated"])
async def test_a_gib_grows_memory_by_less_than_48_mib(large: Server, kind: str) -> None:
    assert (await ask(int(large.address), f"/{kind}/small.bin")).body == b"small"
    idle = bounds.reset_peak(large)
    assert await bounds.download(large, f"/{kind}/big.bin") >= GIB
    assert bounds.resident_peak(large) - idle < 48 * MIB


@pytest.mark.slow
async def test_a_gib_under_wsgi_grows_memory_by_less_than_48_mib(large_root: Path, tmp_path: Path) -> None:
    with Way("wsgi").serving(large_root, tmp_path) as server:
        assert (await ask(int(server.address), "/path/small.bin")).body == b"small"
        idle = bounds.reset_peak(server)
        assert await bounds.download(server, "/path/big.bin") == GIB
        assert bounds.resident_peak(server) - idle < 48 * MIB
        await becomes(lambda: open_beneath(server, large_root), [])
        with reading(server, "/path/big.bin"):
            assert open_beneath(server, large_root) != []
        await becomes(lambda: open_beneath(server, large_root), [])


# --- by what the bytes leave


async def last(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((await ask(int(server.address), "/last")).body)
    return found


@pytest.mark.parametrize("kind", ON_DISK)
async def test_files_of_a_disk_leave_by_path_send(kind: str, path_send: Server) -> None:
    content = (path_send.log_file.parent / "files" / "large.bin").read_bytes()
    whole = await ask(int(path_send.address), f"/{kind}/large.bin")
    assert (whole.status, whole.complete, whole.body == content) == (200, True, True)
    left = await last(path_send)
    assert left["offered"] == {"descriptor": True, "downloadview_async.prepared": True}
    assert set(left["messages"][1:]) == {BODY if kind == "custom" else PATH}
    part = await ask(int(path_send.address), f"/{kind}/large.bin", headers={"Range": "bytes=7-700000"})
    assert (part.status, part.complete, part.body == content[7:700001]) == (206, True, True)
    assert set((await last(path_send))["messages"][1:]) == {BODY if kind == "custom" else PATH}
    await ask(int(path_send.address), f"/{kind}/small.bin")
    assert (await last(path_send))["messages"] == ["http.response.start", BODY]


@pytest.fixture(scope="module")
def path_send(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("path-send")
    (directory / "files").mkdir()
    (directory / "files" / "large.bin").write_bytes(os.urandom(1_000_003))
    (directory / "files" / "small.bin").write_bytes(b"small")
    with LARGE_WAYS["zero-copy"].serving(directory / "files", directory) as server:
        yield server


@pytest.fixture(scope="module")
def offloaded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Way("offloaded", ("--http", _ZERO_COPY)).serving(root, tmp_path_factory.mktemp("offloaded")) as server:
        yield server


@pytest.mark.parametrize("kind", [kind for kind in ON_DISK if kind != "custom"])
async def test_the_asgi_middleware_around_django_hands_files_over(offloaded: Server, kind: str) -> None:
    for headers in ({}, {"Range": "bytes=0-1"}, {"If-None-Match": "*"}):
        answer = await ask(int(offloaded.address), f"/{kind}/ten.txt", headers=headers)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
        assert answer.headers["x-accel-redirect"] == "/internal/ten.txt"
        assert "accept-ranges" not in answer.headers
    assert (await ask(int(offloaded.address), f"/{kind}/none.txt")).status == 404


@pytest.mark.parametrize("path", ["memory/ten.txt", "custom/ten.txt", "generated/ten.txt", "refused/ten.txt"])
async def test_what_the_proxy_cannot_reach_and_what_is_refused_has_no_header(offloaded: Server, path: str) -> None:
    answer: Answer = await ask(int(offloaded.address), f"/{path}")
    assert (answer.status, answer.body == table.CONTENT) == ((403, False) if "refused" in path else (200, True))
    assert "x-accel-redirect" not in answer.headers


async def test_a_refusal_closes_the_file(path_send: Server) -> None:
    for _ in range(10):
        assert (await ask(int(path_send.address), "/refused/large.bin")).status == 403
    await becomes(lambda: open_beneath(path_send, path_send.log_file.parent / "files"), [])


@pytest.mark.slow
async def test_five_hundred_aborts_leave_nothing_open(path_send: Server) -> None:
    files, kinds = path_send.log_file.parent / "files", [*ON_DISK, "remote", "generated"]
    for number in range(500):
        bounds.abort(path_send, f"/{kinds[number % len(kinds)]}/large.bin", read=(0, 1, 65536)[number % 3])
    for kind in kinds:
        assert (await ask(int(path_send.address), f"/{kind}/small.bin")).body == b"small"
    await becomes(lambda: open_beneath(path_send, files / "large.bin"), [])


def database_of(server: Server) -> Path:
    return server.log_file.parent / "db"


async def threads_of_requests(server: Server) -> list[str]:
    names: list[str] = json.loads((await ask(int(server.address), "/threads")).body)
    return [name for name in names if name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("kind", ["object", "async-object"])
async def test_no_connection_to_a_database_is_held_while_bytes_flow(large: Server, kind: str) -> None:
    with reading(large, f"/{kind}/big.bin"):
        await becomes(lambda: open_beneath(large, database_of(large)), [])


@pytest.mark.parametrize("large", ["zero-copy"], indirect=True)  # Django's own handler keeps the request's thread
@pytest.mark.parametrize("kind", ["blocking", "object", "async-object"])
async def test_our_handler_keeps_no_thread_while_bytes_flow(large: Server, kind: str) -> None:
    with reading(large, f"/{kind}/big.bin"):
        async with asyncio.timeout(20):
            while await threads_of_requests(large):
                await asyncio.sleep(0.01)
