"""`SendLater`: the application has returned when its file is sent, and everything else is as if it had waited."""

import asyncio
import gc
import logging
import os
import socket
import weakref
from collections.abc import Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol, SendLater
from tests.descriptors import open_paths
from tests.live import ask, live

SIZE = 16 << 20  # more than a kernel holds for a client
pytestmark = pytest.mark.asyncio


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    os.utime(path, (1_700_000_000,) * 2)
    return path


class Outermost:
    """What a service has around its application. It tells what has become of the answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.outcomes: list[dv.Outcome] = []
        self.has_returned = asyncio.Event()
        self.has_ended = asyncio.Event()
        self.was_used: list[bool] = []
        self._app = dv.Accounts(app, observers=[self.outcomes.append])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with SendLater(scope) as later:
                await self._app(scope, receive, send)
                self.was_used.append(later.is_used)
                self.has_returned.set()
                if later.is_used:
                    await later.send()
        finally:
            self.has_ended.set()

    async def outcome(self) -> dv.Outcome:
        with anyio.fail_after(30):
            while not self.outcomes:
                await asyncio.sleep(0.01)
        (outcome,) = self.outcomes
        return outcome


@asynccontextmanager
async def stalled(port: int, request: bytes = b"GET /big.bin HTTP/1.1\r\nHost: x\r\n\r\n") -> Any:
    """Give the streams of a client that has the head of an answer, and reads no more for now."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(request)
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    try:
        yield reader, writer
    finally:
        writer.close()


async def is_closed(path: Path) -> None:
    """Wait until nothing has the file open: a file that is asked for again stays open for a second."""
    with anyio.fail_after(30):
        while str(path) in open_paths():
            await asyncio.sleep(0.05)


def of(path: Path, **options: Any) -> ASGIApp:
    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        source = dv.PathSource(path.parent)
        await dv.DownloadResponse(await source.resolve(scope["path"][1:]), **options)(scope, receive, send)

    return endpoint


async def test_the_application_returns_while_the_client_stalls(big: Path) -> None:
    app = Outermost(of(big))
    async with live(app, http=DownloadProtocol) as port, stalled(port) as (reader, _):
        await asyncio.wait_for(app.has_returned.wait(), 30)
        assert not app.outcomes
        assert await reader.readexactly(SIZE) == big.read_bytes()
        outcome = await app.outcome()
    assert (outcome.result, outcome.kind, outcome.sent, outcome.spans) == (
        "completed",
        "zero-copy",
        SIZE,
        (dv.ByteRange(0, SIZE),),
    )
    assert app.was_used == [True]
    await is_closed(big)


async def test_the_next_request_waits_for_the_file(big: Path) -> None:
    app = Outermost(of(big))
    request = b"GET /big.bin HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-\r\n\r\n"
    async with live(app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request % 1 + request % (SIZE - 70_000))
        for start in (1, SIZE - 70_000):
            assert b" 206 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(SIZE - start) == big.read_bytes()[start:]
        writer.write(b"GET /big.bin HTTP/1.3\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        assert await reader.read(-1) == big.read_bytes()
        writer.close()
    assert [outcome.sent for outcome in app.outcomes] == [SIZE - 1, 70_000, SIZE]


async def test_a_client_that_leaves_ends_the_answer(big: Path) -> None:
    app = Outermost(of(big))
    async with live(app, http=DownloadProtocol) as port:
        async with stalled(port):
            await asyncio.wait_for(app.has_returned.wait(), 30)
        outcome = await app.outcome()
    assert (outcome.result, outcome.reason) == ("aborted", "client-left")
    assert outcome.sent < SIZE
    await is_closed(big)


async def test_a_client_that_stalls_is_dropped(big: Path) -> None:
    app = Outermost(of(big))

    def impatient(*args: Any, **options: Any) -> DownloadProtocol:
        return DownloadProtocol(*args, stall_seconds=0.2, minimum_rate=1 << 30, **options)

    async with live(app, http=impatient) as port, stalled(port):
        outcome = await app.outcome()
    assert (outcome.result, outcome.reason) == ("aborted", "stalled")


async def test_a_file_that_is_cut_aborts_the_answer(
    big: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])  # a service in this process has added one
    app = Outermost(of(big))
    async with live(app, http=DownloadProtocol) as port, stalled(port) as (reader, _):
        await asyncio.wait_for(app.has_returned.wait(), 30)
        os.truncate(big, SIZE - 1)
        with pytest.raises(asyncio.IncompleteReadError):
            await reader.readexactly(SIZE)
        outcome = await app.outcome()
        await asyncio.wait_for(app.has_ended.wait(), 30)
    assert (outcome.result, outcome.reason) == ("aborted", "file-changed")
    (record,) = [record for record in caplog.records if record.name == "uvicorn.error"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], dv.TransferAborted)
    assert record.exc_info[1].__notes__ == [f"request {outcome.request_id}"]


async def test_a_task_that_is_cancelled_ends_the_answer(big: Path) -> None:
    inner = Outermost(of(big))
    tasks: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(asyncio.current_task())
        await inner(scope, receive, send)

    async with live(app, http=DownloadProtocol) as port, stalled(port):
        await asyncio.wait_for(inner.has_returned.wait(), 30)
        tasks[0].cancel()
        outcome = await inner.outcome()
    assert (outcome.result, outcome.reason) == ("aborted", "server-stopped")
    await is_closed(big)


async def fail(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("this application fails")


async def send_more(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.body", "body": b"more", "more_body": True})


async def sends_only_the_head(failing: ASGIApp) -> None:
    app = Outermost(failing)
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/big.bin")
        outcome = await app.outcome()
    assert (answer.status, answer.body, answer.complete) == (200, b"", False)
    assert (outcome.result, outcome.reason, outcome.sent) == ("aborted", "failed", 0)


@pytest.mark.parametrize("then", [fail, send_more])
async def test_an_application_that_fails_afterwards_sends_nothing(
    then: ASGIApp, big: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await of(big)(scope, receive, send)
        await then(scope, receive, send)

    await sends_only_the_head(failing)
    assert [record.levelno for record in caplog.records if record.name == "uvicorn.error"] == [logging.ERROR]
    await is_closed(big)


@pytest.mark.parametrize("limits", [None, dv.Limits(concurrent=1)])
async def test_an_answer_that_fails_after_its_file_was_left_is_not_sent(big: Path, limits: dv.Limits | None) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        async def fail_at_the_end(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.pathsend":
                raise ValueError("this middleware fails")

        with suppress(ValueError):
            await limited(big, limits)(scope, receive, fail_at_the_end)

    await sends_only_the_head(failing)
    await is_closed(big)


async def test_what_follows_an_answer_follows_its_end(big: Path) -> None:
    events: list[str] = []
    app = Outermost(of(big, background=BackgroundTask(lambda: events.append("task"))))
    async with live(app, http=DownloadProtocol) as port, stalled(port) as (reader, _):
        await asyncio.sleep(0)
        assert events == []
        await reader.readexactly(SIZE)
        await asyncio.wait_for(app.has_ended.wait(), 30)
    assert events == ["task"]
    assert app.was_used == [False]


def limited(path: Path, limits: dv.Limits | None) -> dv.Download:
    return dv.Download(dv.PathSource(path.parent), key=lambda request: path.name, limits=limits)


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_file_counts_as_a_download_until_it_has_been_sent(big: Path, leaves: bool) -> None:
    app = Outermost(limited(big, dv.Limits(concurrent=1)))
    async with live(app, http=DownloadProtocol) as port:
        async with stalled(port) as (reader, _):
            await asyncio.wait_for(app.has_returned.wait(), 30)
            assert (await ask(port, "/")).status == 429
            app.has_ended.clear()
            if not leaves:
                await reader.readexactly(SIZE)
                await asyncio.wait_for(app.has_ended.wait(), 30)
        await asyncio.wait_for(app.has_ended.wait(), 30)
        assert (await ask(port, "/")).status == 200
    assert app.was_used == [True, False, True]


async def test_a_quota_gets_back_what_a_client_does_not_take(big: Path) -> None:
    app = Outermost(limited(big, dv.Limits(quota="40MB/day")))  # a download may begin until it is used up
    async with live(app, http=DownloadProtocol) as port:
        async with stalled(port):
            await asyncio.wait_for(app.has_returned.wait(), 30)
        await asyncio.wait_for(app.has_ended.wait(), 30)
        assert [(await ask(port, "/")).status for _ in range(4)] == [200, 200, 200, 429]
    assert app.outcomes[0].sent < SIZE // 2
    assert app.was_used == [True, True, True, True, False]


async def test_a_rate_holds_when_the_application_has_returned(big: Path) -> None:
    app, loop = Outermost(limited(big, dv.Limits(rate="32MB/s"))), asyncio.get_running_loop()
    async with live(app, http=DownloadProtocol) as port:
        began = loop.time()
        assert (await ask(port, "/")).body == big.read_bytes()
        assert loop.time() - began > 0.3
    assert app.was_used == [True]


def drop_path_sends(app: ASGIApp) -> ASGIApp:
    """Return an application with a middleware that does not know path sends."""

    async def dropping(scope: Scope, receive: Receive, send: Send) -> None:
        async def drop(message: Any) -> None:
            if message["type"] != "http.response.pathsend":
                await send(message)

        await app(scope, receive, drop)

    return dropping


def keep_until_the_end(app: ASGIApp) -> ASGIApp:
    """Return an application with a middleware that passes messages on when the application has returned."""

    async def keeping(scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Any] = []

        async def keep(message: Any) -> None:
            messages.append(message)

        await app(scope, receive, keep)
        for message in messages:
            await send(message)

    return keeping


@pytest.mark.parametrize("middleware", [drop_path_sends, keep_until_the_end])
async def test_middleware_that_passes_no_path_send_on(
    middleware: Callable[[ASGIApp], ASGIApp], big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downloadview_async.asgi.loan._PATIENCE", 0.05)
    app = Outermost(middleware(of(big)))
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/big.bin")
        outcome = await app.outcome()
    assert (answer.status, answer.body) == (200, big.read_bytes())
    assert (outcome.result, outcome.sent) == ("completed", SIZE)
    assert app.was_used == [False]
    await is_closed(big)


async def test_another_server_sends_at_once(big: Path) -> None:
    app = Outermost(of(big))
    async with live(app, http="h11") as port:
        assert (await ask(port, "/big.bin")).body == big.read_bytes()
    assert app.was_used == [False]


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("name", ["small.bin", "big.bin"])
async def test_a_connection_that_has_ended_leaves_nothing_to_the_garbage_collector(
    big: Path, name: str, leaves: bool
) -> None:
    (big.parent / "small.bin").write_bytes(bytes(1000))
    connections: list[weakref.ref[DownloadProtocol]] = []

    class Followed(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(weakref.ref(self))

    app = Outermost(of(big.parent / name))
    gc.collect()
    gc.disable()
    try:
        async with live(app, http=Followed) as port:
            async with stalled(port, f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) as (reader, _):
                if not leaves:
                    await reader.readexactly((big.parent / name).stat().st_size)
            with anyio.fail_after(30):
                while connections[0]() is not None:
                    await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_everything_ends_if_the_end_of_something_fails() -> None:
    ended: list[str] = []

    class Left:
        request_id, is_held = "1", True

        def leave(self, exc: BaseException | None = None) -> None:
            ended.append("account")

    later, failing, lease = SendLater({}), ExitStack(), ExitStack()
    failing.callback(lambda: 1 // 0)
    lease.callback(ended.append, "lease")
    later.contexts, later.accounts = (failing, lease), [Left()]
    with pytest.raises(ZeroDivisionError):
        later.__exit__(None, None, None)
    assert ended == ["lease", "account"]
