"""Answers that the server gives again: they are those of the application, and are forgotten when they would differ."""

import asyncio
import contextlib
import gc
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from downloadview_async import Accounts, Download, Limits, Outcome, add_content_types
from downloadview_async.asgi.kept_answers import MAX_ANSWERS, MAX_FIELDS, MAX_KNOWN_FIELDS
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.service.reload import Generation, Generations
from downloadview_async.service.server import config_for
from tests.live import live, make_old, uvicorn_for
from tests.service.loading import FILES, load

pytestmark = pytest.mark.asyncio

LOG = '[log]\nformat = "json"\npath = "log"\n'
CONTENT = b"the content of a file\n" * 100


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files/folder").mkdir(parents=True)
    for name, content in (("a.txt", CONTENT), ("folder/b.txt", CONTENT.upper())):
        (tmp_path / "files" / name).write_bytes(content)
    make_old(tmp_path)
    return tmp_path


class Counting(Generations):
    """The application of `downloadview serve`, with the number of requests that its service has seen."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation)
        self.service = generation._service
        self.calls = 0
        self._answer_by_service = self.service.answer
        self.service.answer = self._count  # type: ignore[method-assign]

    def _count(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        self.calls += 1
        return self._answer_by_service(scope, receive, send)


class Client:
    """A connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, app: Counting) -> None:
        self.reader, self.writer, self.app = reader, writer, app

    async def ask(self, *lines: str, target: str = "/files/a.txt", method: str = "GET") -> tuple[bytes, bytes]:
        """Send a request, and return the head and the body of its answer."""
        self.writer.write("\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *lines, "\r\n"]).encode())
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> tuple[bytes, bytes]:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)
        length = re.search(rb"content-length: ([0-9]+)", head)
        has_body = method != "HEAD" and length is not None and not head.startswith(b"HTTP/1.1 304")
        return head, await self.reader.readexactly(int(length[1]) if length is not None and has_body else 0)

    async def kept(self, *lines: str, **options: Any) -> bool:
        """Return whether the next answer does not come from the application."""
        before = self.app.calls
        await self.ask(*lines, **options)
        return self.app.calls == before


@contextlib.asynccontextmanager
async def client_of(
    directory: Path,
    text: str = FILES,
    *,
    keeps: bool = True,
    protocol: type[DownloadProtocol] = DownloadProtocol,
    **options: Any,
) -> AsyncIterator[Client]:
    """Serve a directory by settings and options of uvicorn, and give a client. keeps: whether answers are kept."""
    app = Counting(Generation(load(directory, text)))
    http = partial(protocol, kept_answers=app.kept_answers if keeps else None)
    async with (
        app.service.router.lifespan_context(app.service),
        live(app, http=http, proxy_headers=False, **options) as port,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield Client(reader, writer, app)
        writer.close()


def without_time(head: bytes) -> bytes:
    return re.sub(rb"(?m)^(date|x-request-id): [^\r]*", rb"\1", head)


GET = "GET /files/a.txt HTTP/1.1\r\nHost: x\r\n"
LAST = "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.mark.parametrize(
    "request_text, is_kept",
    [
        (f"{GET}\r\n", True),
        (f"{GET}User-Agent: another\r\nAccept-Encoding: gzip, br\r\nCookie: a=b\r\nAccept: text/html\r\n\r\n", True),
        (f"{GET}Content-Length: 0\r\n\r\n", True),
        (f"{GET}Connection: keep-alive\r\n\r\n", True),
        ("GET http://y/files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (f"{GET}Range: bytes=3-5\r\n\r\n", False),
        (f"{GET}Range: bytes=3-2,5-9\r\n\r\n", False),
        (f"{GET}Range: nothing\r\n\r\n", False),
        (f'{GET}If-None-Match: "x"\r\n\r\n', False),
        (f"{GET}If-None-Match: *\r\n\r\n", False),
        (f"{GET}If-Modified-Since: {LAST}\r\n\r\n", False),
        (f"{GET}If-Unmodified-Since: Tue, 14 Nov 2000 22:13:20 GMT\r\n\r\n", False),
        (f'{GET}If-Match: "x"\r\n\r\n', False),
        (f'{GET}If-Range: "x"\r\nRange: bytes=3-5\r\n\r\n', False),
        (f"{GET}Want-Repr-Digest: sha-256=1\r\n\r\n", False),
        (f"{GET}Connection: close\r\n\r\n", False),
        (f"{GET}Expect: 100-continue\r\n\r\n", False),
        (f"{GET}Content-Length: 3\r\n\r\nabc", False),
        (f"{GET}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
        (f"{GET}Upgrade: x\r\nConnection: upgrade\r\n\r\n", False),
        (f"{GET}Host: y\r\n\r\n", False),
        ("GET /files/a.txt HTTP/1.1\r\n\r\n", False),
        ("GET /files/a.txt HTTP/1.1\r\nHost: a b\r\n\r\n", False),
        ("GET /files/a.txt HTTP/1.0\r\n\r\n", False),
        ("GET /files/a.txt HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
        ("HEAD /files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("POST /files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("OPTIONS /files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/a.txt?a HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/a.txt? HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/a.txt#a HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/%61.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET //files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/./a.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/folder/../a.txt HTTP/1.1\r\nHost: x\r\n\r\n", False),
    ],
)
async def test_an_answer_that_is_given_again_is_the_one_of_the_application(
    directory: Path, request_text: str, is_kept: bool
) -> None:
    answers = []
    for keeps in (True, False):
        async with client_of(directory, FILES + LOG, keeps=keeps) as client:
            assert (await client.ask())[1] == CONTENT
            assert await client.kept() is keeps
            before, each = client.app.calls, []
            for _ in range(3 if is_kept else 1):  # the second time, the head of the request is known
                client.writer.write(request_text.encode())
                head, body = await client.answer(request_text.partition(" ")[0])
                each.append((without_time(head), body))
            answers.append(each)
            assert (client.app.calls == before) == ((keeps and is_kept) or b" 400 " in head)
    assert answers[0] == answers[1]


LARGE = os.urandom(1_000_000)
GET_LARGE = "GET /files/large.bin HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("text", [FILES + LOG, f"{FILES}[server]\naccess_log = false\n"], ids=["counted", "uncounted"])
@pytest.mark.parametrize(
    "request_text, is_kept",
    [
        (f"{GET_LARGE}\r\n", True),
        (f"{GET_LARGE}User-Agent: another\r\nAccept-Encoding: gzip, br\r\nCookie: a=b\r\n\r\n", True),
        (f"{GET_LARGE}Connection: close\r\n\r\n", True),
        ("GET /files/large.bin HTTP/1.0\r\n\r\n", True),
        ("GET http://y/files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (f"{GET_LARGE}Range: bytes=3-500000\r\n\r\n", False),
        (f'{GET_LARGE}If-None-Match: "x"\r\n\r\n', False),
        (f"{GET_LARGE}Expect: 100-continue\r\n\r\n", False),
        (f"{GET_LARGE}Content-Length: 3\r\n\r\nabc", False),
        (f"{GET_LARGE}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
        ("HEAD /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("POST /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/large.bin?a HTTP/1.1\r\nHost: x\r\n\r\n", False),
        ("GET /files/l%61rge.bin HTTP/1.1\r\nHost: x\r\n\r\n", False),
    ],
)
async def test_a_large_file_is_sent_again_as_the_application_sends_it(
    directory: Path, request_text: str, is_kept: bool, text: str
) -> None:
    (directory / "files/large.bin").write_bytes(LARGE)
    make_old(directory)
    answers: list[Any] = []
    for keeps in (True, False):
        async with client_of(directory, text, keeps=keeps) as client:
            assert (await client.ask(target="/files/large.bin"))[1] == LARGE
            assert await client.kept(target="/files/large.bin") is keeps
            before = client.app.calls
            client.writer.write(request_text.encode())
            head, body = await client.answer(request_text.partition(" ")[0])
            answers.append((without_time(head), body))
            assert (client.app.calls == before) == (keeps and is_kept)
            if "Connection: close" in request_text or "HTTP/1.0" in request_text:
                assert await asyncio.wait_for(client.reader.read(), 10) == b""
            if text != FILES + LOG:
                continue
            lines = [json.loads(line) for line in await written(directory, 3)]
            (directory / "log").unlink()
            differ = ("time", "request_id", "seconds", "first_byte", "user_agent")
            answers[-1] += ([{name: value for name, value in line.items() if name not in differ} for line in lines],)
    assert answers[0] == answers[1]


async def test_clients_that_leave_a_large_file_have_their_outcomes_and_it_is_closed(directory: Path) -> None:
    (directory / "files/large.bin").write_bytes(LARGE * 10)
    make_old(directory)
    async with client_of(directory, FILES + LOG) as client:
        assert not await client.kept(target="/files/large.bin")
        port = client.writer.get_extra_info("peername")[1]
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as slow:
                slow.sendall(f"{GET_LARGE}\r\n".encode())
                slow.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(slow, 100)
        lines = [json.loads(line) for line in await written(directory, 4)]
        assert [line["reason"] for line in lines] == [None] + ["client-left"] * 3
        assert all(line["bytes"] < 10_000_000 for line in lines[1:])
        assert (client.app.calls, client.app.service.in_progress) == (1, 0)
        async with asyncio.timeout(30):  # a file that is sent often is kept open for a second
            while str(directory / "files/large.bin") in map(os.path.realpath, Path("/proc/self/fd").iterdir()):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("size", [len(CONTENT), len(LARGE)])
async def test_a_large_file_that_has_changed_is_answered_anew(directory: Path, size: int) -> None:
    file = directory / "files/large.bin"
    file.write_bytes(LARGE)
    make_old(directory)
    async with client_of(directory) as client:
        await client.ask(target="/files/large.bin")
        assert await client.kept(target="/files/large.bin")
        for content in (os.urandom(size), LARGE[::-1]):
            file.write_bytes(content)
            assert (await client.ask(target="/files/large.bin"))[1] == content
        file.unlink()
        assert (await client.ask(target="/files/large.bin"))[0].startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "change, status",
    [
        (lambda file: file.write_bytes(CONTENT[:-1] + b"!"), 200),
        (lambda file: os.utime(file, (1_600_000_000,) * 2), 200),
        (lambda file: os.truncate(file, 10), 200),
        (lambda file: file.write_bytes(CONTENT + b"more"), 200),
        (lambda file: file.with_name("folder").joinpath("b.txt").replace(file), 200),
        (lambda file: file.unlink(), 404),
        (lambda file: (file.unlink(), file.mkdir()), 404),
        (lambda file: subprocess.run(["ln", "-sf", "/dev/null", file], check=True), 404),
        (lambda file: (file.unlink(), file.symlink_to("/etc/hostname")), 404),
    ],
    ids=["written", "time", "cut", "grown", "replaced", "deleted", "folder", "device", "outside"],
)
async def test_a_file_that_has_changed_is_answered_anew(
    directory: Path, change: Callable[[Path], Any], status: int
) -> None:
    file = directory / "files/a.txt"
    async with client_of(directory) as client:
        head, _ = await client.ask()
        assert await client.kept()
        change(file)
        changed, body = await client.ask()
        assert changed.startswith(b"HTTP/1.1 %d " % status)
        if status == 200:
            assert body == file.read_bytes()
            assert (body != CONTENT) or without_time(changed) != without_time(head)


@pytest.mark.parametrize(
    "more, target",
    [
        ('access = ["hook:hooks_of_kept:everyone"]\n', "/files/a.txt"),
        ('limits = { rate = "1GB/s" }\n', "/files/a.txt"),
        ('cors = { origins = ["*"] }\n', "/files/a.txt"),
        ('headers = { Set-Cookie = "a=b" }\n', "/files/a.txt"),
        ('headers = { X-Request-Id = "mine" }\n', "/files/a.txt"),
        ("list = true\n", "/files/"),
        ("list = true\narchive = true\n", "/files/?archive=zip"),
        ("", "/files/missing"),
        ('[limits]\ntotal_rate = "1GB/s"\n', "/files/a.txt"),
        ('[limits]\nconcurrent = 3\nclient = "link"\n', "/files/a.txt"),
        ('[limits]\nconcurrent = 3\nmode = "queue"\n', "/files/a.txt"),
        ("[accounts]\ntraces = true\n", "/files/a.txt"),
    ],
)
async def test_what_does_not_depend_on_the_file_alone_is_not_kept(
    directory: Path, more: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(directory)
    (directory / "hooks_of_kept.py").write_text("async def everyone(request, name):\n    return True\n")
    async with client_of(directory, FILES + more) as client:
        for _ in range(3):
            assert not await client.kept(target=target)


@pytest.mark.parametrize(
    "server, can_keep",
    [
        ("", True),
        ('root_path = "/x"', False),
        ("limit_concurrency = 9", False),
        ("port = 1", True),
        ('log_level = "trace"', False),
        ('log_level = "debug"', False),
        ('log_level = "warning"', True),
    ],
)
async def test_what_uvicorn_has_a_part_in_is_not_kept(directory: Path, server: str, can_keep: bool) -> None:
    settings = load(directory, f"{FILES}[server]\n{server}\n")
    generations = Generations(Generation(settings))
    protocol: Any = config_for(generations, settings).http
    expected = generations.kept_answers if can_keep else None
    assert (protocol.func, protocol.keywords["kept_answers"]) == (DownloadProtocol, expected)


@pytest.mark.parametrize("more", ["", 'cache_control = "max-age=60"\n', 'hide = ["*.key"]\n', "list = true\n"])
async def test_what_depends_on_the_file_alone_is_kept(directory: Path, more: str) -> None:
    async with client_of(directory, FILES + more) as client:
        assert [await client.kept() for _ in range(3)] == [False, True, True]


async def test_an_answer_whose_digest_may_become_known_is_not_kept(directory: Path) -> None:
    text = FILES.replace('root = "files"', 'root = "files"\ndigests = "known"')
    async with client_of(directory, f'{text}[digests]\nstore = "digests.db"\n') as client:
        assert not any([await client.kept() for _ in range(3)])


async def test_files_with_precompressed_siblings_are_not_kept(directory: Path) -> None:
    text = FILES.replace('root = "files"', 'root = "files"\nprecompressed = ["gzip"]')
    async with client_of(directory, text) as client:
        await client.ask()
        (directory / "files/a.txt.gz").write_bytes(b"compressed")
        os.utime(directory / "files/a.txt.gz", (1_700_000_000,) * 2)
        head, body = await client.ask("Accept-Encoding: gzip")
        assert (b"content-encoding: gzip" in head, body) == (True, b"compressed")


OFFLOAD = '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'


async def test_an_offloaded_answer_is_kept(directory: Path) -> None:
    async with client_of(directory, FILES + OFFLOAD + LOG) as client:
        head, body = await client.ask()
        assert await client.kept()
        again = await client.ask()
        assert (without_time(again[0]), again[1]) == (without_time(head), body)
        assert b"x-accel-redirect: /_files/a.txt\r\n" in head
        assert await client.kept("Range: bytes=3-5") is False
        (directory / "files/a.txt").unlink()
        assert (await client.ask())[0].startswith(b"HTTP/1.1 404 ")
        lines = [json.loads(line) for line in await written(directory, 5)]
    assert [line["kind"] for line in lines] == ["offloaded:nginx"] * 4 + ["error"]
    assert [line["result"] for line in lines] == ["delegated"] * 4 + ["refused"]


async def written(directory: Path, count: int) -> list[str]:
    """Return the lines of the log when there are so many."""
    async with asyncio.timeout(30):
        while len(lines := (directory / "log").read_text().splitlines()) < count:
            await asyncio.sleep(0.01)
    return lines


async def test_each_answer_has_its_outcome(directory: Path) -> None:
    async with client_of(directory, FILES + LOG) as client:
        ids = []
        for agent in ("one", "two", "three", "three", "three"):  # at last, the head of the request is known
            head, _ = await client.ask(f"User-Agent: {agent}")
            match = re.search(rb"x-request-id: ([0-9a-f]{32})\r\n", head)
            assert match is not None
            ids.append(match[1].decode())
        lines = [json.loads(line) for line in await written(directory, 5)]
    assert [line["request_id"] for line in lines] == ids
    assert len(set(ids)) == 5
    assert [line["user_agent"] for line in lines] == ["one", "two", "three", "three", "three"]
    differ = ("time", "request_id", "seconds", "first_byte", "user_agent")
    for line in lines:
        assert 0 <= line["first_byte"] <= line["seconds"] < 30
    shown = [{name: value for name, value in line.items() if name not in differ} for line in lines]
    assert shown == [shown[0]] * 5
    assert (shown[0]["bytes"], shown[0]["kind"], shown[0]["result"]) == (len(CONTENT), "inline", "completed")
    assert (shown[0]["route"], shown[0]["source"], shown[0]["name"]) == ("/files/{path:path}", "files", "a.txt")


async def test_a_trusted_proxy_tells_the_client_and_the_id(directory: Path) -> None:
    fields = ("X-Forwarded-For: 192.0.2.7", "X-Request-Id: of-the-proxy")
    for trusted, client_then, id_then in (("127.0.0.1", "192.0.2.7", "of-the-proxy"), ("192.0.2.1", "127.0.0.1", None)):
        (directory / "log").unlink(missing_ok=True)
        settings = f'{FILES}{LOG}[server]\nforwarded_allow_ips = "{trusted}"\n'
        async with client_of(directory, settings) as client:
            await client.ask()
            assert await client.kept(*fields)
            line = json.loads((await written(directory, 2))[1])
        assert line["client"] == client_then
        assert (line["request_id"] == "of-the-proxy") == (id_then is not None)


@pytest.mark.parametrize(
    ("field", "member", "told"),
    [
        ("X-Forwarded-For: 192.0.2.7", "client", "192.0.2.7"),
        ("X-Request-Id: of-the-proxy", "request_id", "of-the-proxy"),
    ],
)
async def test_a_trusted_proxy_is_heard_in_a_head_that_is_known(
    directory: Path, field: str, member: str, told: str
) -> None:
    settings = f'{FILES}{LOG}[server]\nforwarded_allow_ips = "127.0.0.1"\n'
    async with client_of(directory, settings) as client:
        await client.ask(field)
        assert [await client.kept(field) for _ in range(3)] == [True] * 3
        lines = [json.loads(line) for line in await written(directory, 4)]
    assert [line[member] for line in lines] == [told] * 4


async def test_requests_in_one_packet_are_answered_in_order_by_the_application(directory: Path) -> None:
    async with client_of(directory, FILES + LOG) as client:
        await client.ask()
        assert await client.kept()
        before = client.app.calls
        client.writer.write(f"{GET}\r\nGET /files/folder/b.txt HTTP/1.1\r\nHost: x\r\n\r\n{GET}\r\n".encode())
        names = [re.search(rb'filename="([^"]*)', (await client.answer())[0]) for _ in range(3)]
        assert [name and name[1] for name in names] == [b"a.txt", b"b.txt", b"a.txt"]
        assert client.app.calls == before + 3
        assert await client.kept()


async def test_a_head_in_two_pieces_is_answered_by_the_application(directory: Path) -> None:
    received = asyncio.Queue[bytes]()

    class Telling(DownloadProtocol):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            received.put_nowait(data)

    async with client_of(directory, protocol=Telling) as client:
        await client.ask()
        assert await client.kept()
        before = client.app.calls
        client.writer.write(GET.encode())
        async with asyncio.timeout(30):
            while await received.get() != GET.encode():
                pass
        client.writer.write(b"User-Agent: late\r\n\r\n")
        assert (await client.answer())[1] == CONTENT
        assert client.app.calls == before + 1


async def test_the_last_answer_of_a_server_that_drains_says_so(directory: Path) -> None:
    connections: list[DownloadProtocol] = []

    class Followed(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)

    async with client_of(directory, protocol=Followed) as client:
        await client.ask()
        assert await client.kept()
        connections[0].drain()
        head, body = await client.ask()
        assert (b"connection: close\r\n" in head, body) == (True, CONTENT)
        assert await asyncio.wait_for(client.reader.read(), 10) == b""


@pytest.mark.parametrize("text", [FILES, FILES + LOG], ids=["uncounted", "counted"])
async def test_a_connection_with_such_an_answer_leaves_nothing_to_the_garbage_collector(
    directory: Path, text: str
) -> None:
    connections: list[weakref.ref[DownloadProtocol]] = []

    class Followed(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(weakref.ref(self))

    async with client_of(directory, text, protocol=Followed) as client:
        await client.ask()
        gc.collect()
        gc.disable()
        try:
            port = client.writer.get_extra_info("peername")[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await Client(reader, writer, client.app).kept()
            writer.close()
            async with asyncio.timeout(30):
                while connections[1]() is not None:
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def test_the_pace_of_an_answer_ends_before_another_one_is_given_again(directory: Path) -> None:
    paced = '[[routes]]\npath = "/paced/{path:path}"\nsource = "files"\nlimits = { rate = "1GB/s" }\n'
    connections: list[DownloadProtocol] = []

    class Followed(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)

    async with client_of(directory, FILES + paced, protocol=Followed) as client:
        await client.ask()
        assert await client.kept()
        (directory / "files/large.bin").write_bytes(bytes(200_000))
        await client.ask(target="/paced/large.bin")
        assert connections[0].paced_at is not None
        assert not await client.kept()
        async with asyncio.timeout(30):
            while not await client.kept():
                await asyncio.sleep(0.01)
        assert connections[0].paced_at is None


async def test_no_answer_to_a_long_target_is_kept(directory: Path) -> None:
    async with client_of(directory) as client:
        target = f"/files/{'./' * 1_000}a.txt"
        assert (await client.ask(target=target))[1] == CONTENT
        assert not await client.kept(target=target)
        kept_answers = client.app.service.kept_answers
        assert kept_answers is not None
        assert len(kept_answers) == 0


@contextlib.asynccontextmanager
async def client_that_does_not_read(directory: Path) -> AsyncIterator[tuple[Client, socket.socket, bytes]]:
    """Give a client, and the socket of another one that has asked 100 times for a file, and the file.

    These are 6 MB, more than the kernel holds.
    """
    content = os.urandom(60_000)
    (directory / "files/large.bin").write_bytes(content)
    make_old(directory)
    async with client_of(directory, FILES + LOG) as client:
        await client.ask(target="/files/large.bin")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(client.writer.get_extra_info("peername"))
            slow.setblocking(False)
            for _ in range(100):
                await asyncio.get_running_loop().sock_sendall(slow, b"GET /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
                await asyncio.sleep(0)
            yield client, slow, content


async def test_a_client_that_does_not_read_gets_all_when_it_does(directory: Path) -> None:
    async with client_that_does_not_read(directory) as (_, slow, content):
        received, loop = bytearray(), asyncio.get_running_loop()
        while received.count(b"HTTP/1.1 200 OK\r\n") < 100 or not received.endswith(content):
            received += await asyncio.wait_for(loop.sock_recv(slow, 1 << 16), 30)
        assert received.count(content) == 100
        lines = [json.loads(line) for line in await written(directory, 101)]
        assert {(line["result"], line["bytes"]) for line in lines} == {("completed", 60_000)}
        assert len({line["request_id"] for line in lines}) == 101


async def test_a_connection_is_idle_since_its_last_answer(directory: Path) -> None:
    async with client_of(directory) as client:
        await client.ask()
        port = client.writer.get_extra_info("sockname")[1]
        (server,) = [
            one
            for one in gc.get_objects()
            if type(one) is DownloadProtocol and one.client is not None and one.client[1] == port
        ]
        for _ in range(3):
            since = server._idle_since
            assert since is not None
            assert await client.kept()
            assert server._idle_since is not None
            assert server._idle_since > since


async def test_a_client_that_leaves_has_not_got_all(directory: Path) -> None:
    async with client_that_does_not_read(directory) as (client, slow, _):
        async with asyncio.timeout(30):
            while not client.app.service.in_progress:  # an answer waits for the client
                await asyncio.sleep(0.01)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        slow.close()
        assert (await client.ask())[1] == CONTENT
        async with asyncio.timeout(30):
            while not (aborted := [line for line in await written(directory, 1) if '"aborted"' in line]):
                await asyncio.sleep(0.01)
        assert {json.loads(line)["reason"] for line in aborted} == {"client-left"}


async def test_a_connection_that_only_got_kept_answers_is_idle_and_ends(directory: Path) -> None:
    async with client_of(directory) as client:
        await client.ask()
        port = client.writer.get_extra_info("peername")[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        other = Client(reader, writer, client.app)
        assert await other.kept()
        assert await other.kept()
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_head_that_is_known_is_in_time(directory: Path) -> None:
    connections: list[DownloadProtocol] = []

    class Followed(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)

        def on_headers_complete(self) -> None:
            parsed.append(self)
            super().on_headers_complete()

    parsed: list[DownloadProtocol] = []
    async with client_of(directory, protocol=Followed) as client:
        assert [await client.kept() for _ in range(3)] == [False, True, True]
        assert len(parsed) == 2
        reader, writer = await asyncio.open_connection("127.0.0.1", client.writer.get_extra_info("peername")[1])
        other = Client(reader, writer, client.app)
        assert await other.kept()
        assert len(parsed) == 2
        assert connections[1]._head_timer is None
        writer.close()


async def test_empty_lines_before_heads_that_are_known_do_not_add_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downloadview_async.asgi.uvicorn.protocol.MAX_HEAD_BYTES", 200)
    received = asyncio.Queue[bytes]()

    class Telling(DownloadProtocol):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            received.put_nowait(data)

    async with client_of(directory, protocol=Telling) as client:
        for _ in range(100):
            client.writer.write(b"\r\n\r\n")
            async with asyncio.timeout(30):
                while await received.get() != b"\r\n\r\n":
                    pass
            assert (await client.ask())[1] == CONTENT


async def test_heads_are_forgotten_beyond_a_number(directory: Path) -> None:
    async with client_of(directory) as client:
        await client.ask()
        kept = client.app.service.kept_answers
        assert kept is not None
        for number in range(MAX_KNOWN_FIELDS + 1):
            assert await client.kept(f"User-Agent: {number}")
        section = "\r\nHost: x\r\nUser-Agent: %s\r\n\r\n"
        known = [kept.known_fields((section % number).encode()) is not None for number in range(MAX_KNOWN_FIELDS + 1)]
        assert known == [False] + [True] * MAX_KNOWN_FIELDS
        long = "x" * MAX_FIELDS
        assert await client.kept(f"User-Agent: {long}")
        assert kept.known_fields((section % long).encode()) is None


async def test_fields_that_are_known_are_those_of_every_target_and_no_other_first_line(directory: Path) -> None:
    targets = (
        "/files/a.txt",
        "/files/folder/b.txt",
        "/files/none.txt",
        "/files/a.txt?",
        "/files/a.txt?a",
        "/files/a.txt#a",
    )
    lines = [f"GET {target} HTTP/1.1" for target in targets]
    lines += ["HEAD /files/a.txt HTTP/1.1", "POST /files/a.txt HTTP/1.1", "GET http://y/files/a.txt HTTP/1.1"]
    lines += [
        "GET  /files/a.txt HTTP/1.1",
        "GET /files/a.txt  HTTP/1.1",
        "GET /files/a.txt\tHTTP/1.1",
        "GET /files/a.txt",
    ]
    lines += [f"GET /files/a.txt HTTP/{version}" for version in ("1.0", "1.2", "2.0", "1.1 ", "1.10", "0.9")]
    lines += [
        "get /files/a.txt HTTP/1.1",
        "XGET /files/a.txt HTTP/1.1",
        "GET /files/a.txt\nHTTP/1.1",
        "",
        "\r\nGET /files/a.txt HTTP/1.1",
    ]
    found = []
    for keeps in (True, False):
        answers = []
        async with client_of(directory, FILES + LOG, keeps=keeps) as client:
            for target in targets[:2]:
                assert [await client.kept(target=target) for _ in range(3)] == [False, keeps, keeps]
            address = client.writer.get_extra_info("peername")[:2]
            for line in lines:
                other = Client(*await asyncio.open_connection(*address), client.app)
                other.writer.write(f"{line}\r\nHost: x\r\n\r\n".encode())
                other.writer.write_eof()
                answers.append((line, without_time(await asyncio.wait_for(other.reader.read(), 30))))
                other.writer.close()
        found.append(answers)
    assert found[0] == found[1]


async def test_answers_are_forgotten_beyond_a_number(directory: Path) -> None:
    async with client_of(directory) as client:
        for number in range(MAX_ANSWERS + 1):
            await client.ask(target=f"/files/{'./' * (number % 40)}{'%61' if number % 2 else 'a'}.txt")
        for number in range(MAX_ANSWERS + 1):
            name = "".join(f"%{ord(one):x}" if number >> place & 1 else one for place, one in enumerate("folder/b.tx"))
            await client.ask(target=f"/files/{name}t")
        kept_answers = client.app.service.kept_answers
        assert kept_answers is not None
        assert len(kept_answers) == MAX_ANSWERS
        assert not await client.kept()
        assert await client.kept()


async def test_a_clock_that_is_set_back_and_another_type_have_the_answer_made_anew(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(directory) as client:
        await client.ask()
        assert await client.kept()
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 1_600_000_000.0)
            assert not await client.kept()
        await client.ask()
        try:
            add_content_types({".txt": "text/x-other"})
            head, _ = await client.ask()
            assert b"content-type: text/x-other" in head
        finally:
            add_content_types({".txt": None})


async def test_the_service_counts_nothing_if_nothing_listens(directory: Path) -> None:
    settings = load(directory, f"{FILES}[server]\naccess_log = false\n")
    app = Counting(Generation(settings))
    assert not app.service._settings.listens
    async with live(app, http=partial(DownloadProtocol, kept_answers=app.kept_answers)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer, app)
        head, _ = await client.ask()
        assert await client.kept()
        assert without_time((await client.ask())[0]) == without_time(head)
        assert b"x-request-id" not in head
        writer.close()


async def test_observers_get_each_outcome(directory: Path) -> None:
    seen: list[Outcome] = []
    app = Counting(Generation(load(directory, FILES + LOG)))
    app.service._observers = [seen.append]
    async with live(app, http=partial(DownloadProtocol, kept_answers=app.kept_answers)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer, app)
        for _ in range(3):
            await client.ask()
        writer.close()
    assert app.calls == 1
    assert len(seen) == 3
    assert app.service.in_progress == 0
    first = seen[0]
    for outcome in seen[1:]:
        for field in fields(Outcome):
            if field.name not in ("request_id", "time", "first_byte", "seconds", "headers"):
                assert getattr(outcome, field.name) == getattr(first, field.name), field.name
        assert (outcome.path, outcome.http_version, outcome.method) == ("/files/a.txt", "1.1", "GET")
        assert abs(outcome.time - time.time()) < 60


async def test_an_answer_that_has_no_id_is_given_without_one(directory: Path) -> None:
    seen: list[Outcome] = []
    async with client_of(directory) as client:
        await client.ask()
        kept_answers = client.app.service.kept_answers
        assert kept_answers is not None
        kept_answers.accounts = Accounts(client.app, observers=[seen.append])
        head, _ = await client.ask()
    assert (client.app.calls, len(seen), b"x-request-id" in head) == (1, 1, False)


async def test_what_no_server_gives_again_is_not_kept(directory: Path) -> None:
    async with client_of(directory, keeps=False) as client:
        await client.ask()
        kept_answers = client.app.service.kept_answers
        assert kept_answers is not None
        assert len(kept_answers) == 0


async def test_a_client_that_has_left_before_its_answer_has_an_outcome(directory: Path) -> None:
    async with client_of(directory, FILES + LOG) as client:
        assert not await client.kept()
        port = client.writer.get_extra_info("peername")[1]
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await Client(reader, writer, client.app).kept()
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.write(f"{GET}\r\n".encode())
            writer.transport.abort()
        lines = [json.loads(line) for line in await written(directory, 7)]
        left = [line["bytes"] for line in lines if (line["result"], line["reason"]) == ("aborted", "client-left")]
        assert left == [0] * 3
        assert client.app.calls == 1
        assert client.app.service.in_progress == 0  # a reload waits for that


async def test_a_connection_is_freed_with_its_last_answer(directory: Path) -> None:
    def connections() -> int:
        return sum(type(one) is DownloadProtocol for one in gc.get_objects())

    async with client_of(directory) as client:
        await client.ask()
        port = client.writer.get_extra_info("peername")[1]
        gc.collect()
        before = connections()
        gc.disable()
        try:
            for lines in ((), ("Range: bytes=3-5",)):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                other = Client(reader, writer, client.app)
                await other.ask(*lines)
                assert await other.kept()
                writer.close()
                await writer.wait_closed()
                async with asyncio.timeout(10):
                    while connections() > before:
                        await asyncio.sleep(0.01)
        finally:
            gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells what a client has taken")
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_client_that_leaves_has_got_what_its_machine_has_taken(directory: Path, is_chunked: bool) -> None:
    (directory / "files/large.bin").write_bytes(os.urandom(60_000))
    make_old(directory)
    app = Counting(Generation(load(directory, f"{FILES}list = true\n{LOG}")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that the transport holds most of the answer
        http = partial(DownloadProtocol, kept_answers=app.kept_answers)
        lifespan = app.service.router.lifespan_context(app.service)
        async with lifespan, uvicorn_for(app, sockets=[listener], http=http):
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(listener.getsockname())
            slow.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=slow)
            client = Client(reader, writer, app)
            head, _ = await client.ask(target="/files/large.bin")
            assert await client.kept(target="/files/large.bin")
            if is_chunked:
                writer.write(b"GET /files/?format=ndjson HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"transfer-encoding: chunked\r\n" in await reader.readuntil(b"\r\n\r\n")
                await reader.readuntil(b"\r\n0\r\n\r\n")
            transport: Any = writer.transport
            transport.pause_reading()
            taken_before, calls = taken_by(slow), app.calls
            writer.write(b"GET /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            taken = -1
            while taken < (taken := taken_by(slow) - taken_before - len(head)) or taken <= 0:
                await asyncio.sleep(0.2)
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
            line = json.loads((await written(directory, 4 if is_chunked else 3))[-1])
            assert (line["result"], line["reason"], line["bytes"]) == ("aborted", "client-left", taken)
            assert app.calls == calls


def taken_by(sock: socket.socket) -> int:
    """Return how many bytes the machine of a client has taken: `tcpi_bytes_received`."""
    return int(struct.unpack_from("Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 128)[0])


LIMITED = """
[limits]
{limits}
"""


async def statuses(client: Client, targets: list[str]) -> list[str]:
    answers = [await client.ask(target=target) for target in targets]
    return [head.split()[1].decode() for head, _ in answers]


def counted(client: Client) -> Any:
    """Return what the limits in memory have counted, without its times."""
    apps = [getattr(route, "app", None) for route in client.app.service.router.routes]
    limits = [one for app in apps if isinstance(app, Download) for one in app.limits]
    stores = [one._memory for one in limits if isinstance(one, Limits)]
    clients = [known for store in stores if store is not None for known in store._clients.values()]
    sessions = [
        (one.size, one.coverage.edges, one.charged, one.running) for each in clients for one in each.sessions.values()
    ]
    return [(each.current, each.previous, each.leases, each.spent) for each in clients], sessions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LIMITED.format(limits='requests = "5/hour"'), ["200"] * 5 + ["429"] * 2),
        (LIMITED.format(limits="concurrent = 1"), ["200"] * 7),
        (LIMITED.format(limits='quota = ["8kB/day"]'), ["200"] * 4 + ["429"] * 3),
        (LIMITED.format(limits='quota = ["5 downloads/day", "1GB/day"]'), ["200"] * 5 + ["429"] * 2),
        (LIMITED.format(limits='requests = "9/hour"\nquota = ["3 downloads/day"]'), ["200"] * 3 + ["429"] * 4),
    ],
)
@pytest.mark.parametrize(
    "of_route", [None, 'requests = "6/hour"', 'quota = ["5kB/day"]', 'quota = ["2 downloads/day"]']
)
async def test_limits_count_a_kept_answer_as_any_other(
    directory: Path, text: str, expected: list[str], of_route: str | None
) -> None:
    (directory / "files/empty.txt").touch()
    os.utime(directory / "files/empty.txt", (1_700_000_000,) * 2)
    files = FILES if of_route is None else FILES + f"limits = {{ {of_route} }}\n"
    targets = ["/files/a.txt"] * 7
    found, made = [], []
    for keeps in (False, True):
        async with client_of(directory, files + text, keeps=keeps) as client:
            found.append([await statuses(client, targets), await statuses(client, ["/files/empty.txt"] * 3)])
            found[-1].append(counted(client))
            made.append(client.app.calls)
    assert found[0] == found[1]
    if of_route is None:
        assert found[0][0] == expected
    assert made[0] == 10
    assert made[1] < 10  # the first of each target, and those that are refused


async def test_a_kept_answer_takes_part_in_the_limit_of_transfers(directory: Path) -> None:
    with (directory / "files/big.bin").open("wb") as file:
        file.truncate(64 << 20)
    make_old(directory)
    async with client_of(directory, FILES + LIMITED.format(limits="concurrent = 1")) as client:
        assert await statuses(client, ["/files/a.txt"] * 2) == ["200", "200"]
        assert await client.kept()
        other = Client(*await asyncio.open_connection(*client.writer.get_extra_info("peername")[:2]), client.app)
        other.writer.write(b"GET /files/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await other.reader.readuntil(b"\r\n\r\n")
        assert await statuses(client, ["/files/a.txt"]) == ["429"]
        other.writer.transport.abort()
        while await statuses(client, ["/files/a.txt"]) == ["429"]:
            await asyncio.sleep(0.01)
        assert await client.kept()


@pytest.mark.parametrize("more", ["", "[server]\naccess_log = false\n"], ids=["counted", "uncounted"])
async def test_limits_of_a_kept_answer_know_the_client_of_a_proxy(directory: Path, more: str) -> None:
    text = FILES + LIMITED.format(limits='requests = "3/hour"') + more
    async with client_of(directory, text) as client:
        found = []
        for number in (1, 2, 1, 2, 1, 2, 1, 2, 3):
            head, _ = await client.ask(f"X-Forwarded-For: 192.0.2.{number}")
            found.append(head.split()[1])
        assert found == [b"200"] * 6 + [b"429"] * 2 + [b"200"]
        assert client.app.calls == 3  # the first one, and those that were refused
