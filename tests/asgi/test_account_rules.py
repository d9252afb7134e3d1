"""`Accounts`: who gets an outcome, when, and what is in it; listeners that are slow, hang or raise."""

import asyncio
import contextlib
import gc
import logging
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.accounts import listeners as module
from downloadview_async.accounts.listeners import Listeners
from downloadview_async.asgi import accounts
from downloadview_async.asgi.accounts import new_request_id
from downloadview_async.asgi.extensions import CONNECTION
from downloadview_async.asgi.server import DownloadProtocol
from tests.live import ask, live, make_old
from tests.observed import Observed

pytestmark = pytest.mark.asyncio

LARGE = os.urandom(300_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    (tmp_path / "large.bin").write_bytes(LARGE)
    (tmp_path / "folder").mkdir()
    make_old(tmp_path)
    return tmp_path


def application(root: Path, **options: Any) -> Starlette:
    download = dv.Download(dv.PathSource(root), listing=True, archive=True, source_name="mine", **options)
    return Starlette(routes=[Mount("/mount", Starlette(routes=[Route("/files/{path:path}", download)]))])


KINDS = [
    ("/mount/files/a.txt", "GET", 200, "inline", "completed"),
    ("/mount/files/large.bin", "GET", 200, "zero-copy", "completed"),
    ("/mount/files/large.bin", "HEAD", 200, "empty", "completed"),
    ("/mount/files/", "GET", 200, "listing", "completed"),
    ("/mount/files/?archive=zip", "GET", 200, "archive", "completed"),
    ("/mount/files/a.txt?view", "GET", 200, "view", "completed"),
    ("/mount/files/folder", "GET", 308, "other", "completed"),
    ("/mount/files/none", "GET", 404, "error", "refused"),
    ("/mount/files/none/", "GET", 404, "error", "refused"),
    ("/mount/files/a.txt", "PUT", 405, "other", "refused"),
    ("/elsewhere", "GET", 404, "other", "refused"),
]


async def test_the_kinds_of_answers(root: Path) -> None:
    app = Observed(application(root))
    async with live(app, http=DownloadProtocol) as port:
        for target, method, status, kind, result in KINDS:
            answer = await ask(port, target, method=method)
            outcome = app.only()
            assert (outcome.status, outcome.kind, outcome.result) == (status, kind, result), target
            assert outcome.sent == len(answer.body) or "transfer-encoding" in answer.headers
            if target.startswith("/mount") and method != "PUT":
                key = target.removeprefix("/mount/files/").partition("?")[0]
                assert (outcome.route, outcome.source) == ("/mount/files/{path:path}", "mine")
                assert outcome.name == key
            if kind in ("inline", "zero-copy"):
                assert (outcome.etag, outcome.size) == (answer.headers["etag"], len(answer.body))
            assert outcome.first_byte is not None
            assert 0 <= outcome.first_byte <= outcome.seconds


@pytest.mark.parametrize(
    "between", [GZipMiddleware, None], ids=["a middleware that drops descriptors", "BaseHTTPMiddleware"]
)
async def test_facts_pass_middleware(root: Path, between: Any) -> None:
    async def dispatch(request: Request, call_next: Any) -> Any:
        dv.note_facts(request.scope, user="ada")
        return await call_next(request)

    inner = [Middleware(between)] if between else [Middleware(BaseHTTPMiddleware, dispatch=dispatch)]
    download = dv.Download(dv.PathSource(root))
    app = Observed(Starlette(routes=[Route("/{path:path}", download)], middleware=inner))
    async with live(app, http=DownloadProtocol) as port:
        assert (await ask(port, "/large.bin")).body == LARGE
    outcome = app.only()
    assert (outcome.result, outcome.sent, outcome.name) == ("completed", len(LARGE), "large.bin")
    assert outcome.user == (None if between else "ada")


@pytest.mark.parametrize(
    "http, kind", [("httptools", "other"), (DownloadProtocol, "zero-copy")], ids=["uvicorn", "ours"]
)
async def test_the_file_of_a_response_of_others(root: Path, http: Any, kind: str) -> None:
    app = Observed(FileResponse(root / "large.bin"))
    async with live(app, http=http) as port:
        answer = await ask(port, "/")
        outcome = app.only()
        assert (outcome.kind, outcome.result, outcome.sent) == (kind, "completed", len(LARGE))
        assert (outcome.etag, outcome.size, outcome.spans) == (
            answer.headers["etag"],
            len(LARGE),
            (dv.ByteRange(0, len(LARGE)),),
        )
        assert outcome.name == ("large.bin" if kind == "zero-copy" else None)
        await ask(port, "/", headers={"Range": "bytes=5-9"})
        assert ((outcome := app.only()).spans, outcome.size, outcome.sent) == ((dv.ByteRange(5, 10),), len(LARGE), 5)


ROUTES = [
    ("/f/1", "/f/{x}"),
    ("/m/f/1", "/m/f/{x}"),
    ("/m/ours/1", "/m/ours/{x}"),
    ("/m/n/f/1", "/m/n/f/{x}"),
    ("/m/none", "/m"),
    ("/of/ada/f/1", "/of/{user}/f/{x}"),
    ("/of/ada/none", "/of/{user}"),
    ("/of/of/f/1", "/f/{x}"),
    ("/of/ada/files/a.txt", "/of/{user}/files"),
    ("/elsewhere", None),
]


def routes(root: Path) -> list[Mount | Route]:
    async def foreign(request: Request) -> FileResponse:
        return FileResponse(root / "a.txt")

    async def ours(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.LocalFile(root / "a.txt"))

    inner = [Route("/f/{x}", foreign), Route("/ours/{x}", ours)]
    download = dv.Download(dv.PathSource(root))
    return [
        *inner,
        Mount("/m", routes=[*inner, Mount("/n", routes=inner)]),
        Mount("/of/{user}", routes=[*inner, Mount("/files", download)]),
    ]


@pytest.mark.parametrize("prefix", ["", "/root"])
@pytest.mark.parametrize("around", ["nothing", "an offload", "path sends", "accounts", "a mount"])
async def test_the_route(root: Path, around: str, prefix: str) -> None:
    inner: ASGIApp = Starlette(routes=routes(root))
    backend = dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])
    match around:
        case "an offload" | "path sends":
            inner = dv.OffloadMiddleware(inner, backend, pathsend=around == "path sends")
        case "accounts":
            inner = dv.Accounts(inner, observers=[lambda one: None])
        case "a mount":
            inner = Starlette(routes=[Mount("/", inner)])
    app = Observed(inner)
    async with live(app, http=DownloadProtocol, root_path=prefix) as port:
        for target, route in ROUTES:
            await ask(port, target)
            assert (one := app.only()).route == (route or ("" if around == "a mount" else None)), (target, one)


async def test_a_refused_request_has_its_source_and_name(root: Path) -> None:
    async def refuse(request: Request, key: str) -> None:
        raise dv.AccessDenied("no")

    app = Observed(dv.Download(dv.PathSource(root), access=refuse, source_name="mine"))
    async with live(app, http=DownloadProtocol) as port:
        await ask(port, "/a.txt")
    assert ((one := app.only()).result, one.source, one.name) == ("refused", "mine", "a.txt")


async def test_facts_of_other_names_are_refused() -> None:
    with pytest.raises(TypeError, match="note_facts takes kind, link_id, name, route, source, user, not password"):
        dv.note_facts({}, password="x")
    dv.note_facts({}, user="ada")  # nobody listens


async def test_the_user_and_the_link(root: Path) -> None:
    signer = dv.URLSigner({"k": "0123456789abcdef0123456789abcdef"})

    async def user(request: Request, name: Any) -> dv.Grant | None:
        return dv.Grant(user="ada") if "x-user" in request.headers else None

    app = Observed(application(root, access=[dv.SignedLinks(signer), user]))
    async with live(app, http=DownloadProtocol) as port:
        await ask(port, signer.sign("/mount/files/a.txt"))
        link_id = (outcome := app.only()).link_id
        assert link_id
        assert outcome.user is None
        assert "?" not in outcome.path
        await ask(port, "/mount/files/a.txt", headers={"X-User": "1"})
        assert ((outcome := app.only()).user, outcome.link_id) == ("ada", None)
        await ask(port, "/mount/files/a.txt")
        assert ((outcome := app.only()).status, outcome.result) == (404, "refused")


async def test_one_counted_link_has_one_outcome_with_what_was_sent(root: Path) -> None:
    signer = dv.URLSigner({"k": "0123456789abcdef0123456789abcdef"}, store=dv.MemoryGrantStore())
    inner: list[dv.Outcome] = []

    async def endpoint(request: Request) -> dv.DownloadResponse:
        await signer.verify(request.scope)
        return dv.DownloadResponse(dv.LocalFile(root / "large.bin"), on_outcome=inner.append)

    errors = {dv.FileError: dv.download_error}
    app = Observed(Starlette(routes=[Route("/file", endpoint)], exception_handlers=errors))
    async with live(app, http=DownloadProtocol) as port:
        await ask(port, signer.sign("/file", uses=1))
        outer = app.only()
        await until(inner)
    assert (outer.sent, outer.result, outer.kind) == (len(LARGE), "completed", "zero-copy")
    assert [(one.sent, one.result, one.request_id) for one in inner] == [(len(LARGE), "completed", outer.request_id)]


async def until(outcomes: list[dv.Outcome], count: int = 1) -> None:
    async with asyncio.timeout(20):
        while len(outcomes) < count:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("is_async", [True, False])
async def test_on_outcome_without_accounts(root: Path, is_async: bool) -> None:
    outcomes: list[dv.Outcome] = []

    async def listen(outcome: dv.Outcome) -> None:
        outcomes.append(outcome)

    response = dv.DownloadResponse(
        dv.LocalFile(root / "a.txt"), on_outcome=listen if is_async else outcomes.append, filename="b.txt"
    )
    async with live(response, http=DownloadProtocol) as port:
        await ask(port, "/", headers={"Range": "bytes=2-3"})
        await until(outcomes)
    assert [(one.status, one.sent, one.name) for one in outcomes] == [(206, 2, "a.txt")]


async def test_nested_accounts_both_get_one(root: Path) -> None:
    inner: list[dv.Outcome] = []
    app = Observed(GZipMiddleware(dv.Accounts(application(root), observers=[inner.append]), minimum_size=5))
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/mount/files/a.txt", headers={"Accept-Encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip"
    outer = app.only()
    assert [(one.sent, one.name, one.request_id) for one in inner] == [(10, "a.txt", outer.request_id)]
    assert (outer.sent, outer.name) == (len(answer.body), "a.txt")


@pytest.mark.parametrize("outcome_of", ["the proxy", "us", "another answer"])
async def test_accounts_inside_an_offload(root: Path, outcome_of: str) -> None:
    """Middleware in the wrong order: the answer is held outside of `Accounts`, and may still become another one."""
    outcomes: list[dv.Outcome] = []

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        await dv.DownloadResponse(dv.LocalFile(root / "large.bin"))(scope, receive, send)
        if outcome_of == "us":
            (root / "large.bin").unlink()

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def forbid(message: Message) -> None:
            if outcome_of == "another answer" and message["type"] == "http.response.start":
                message = {**message, "status": 403}
            await send(message)

        await dv.Accounts(endpoint, observers=[outcomes.append])(scope, receive, forbid)

    app = dv.OffloadMiddleware(middleware, dv.XAccelRedirect([dv.Rule(str(root), "/_files/")]), proxy="caddy")
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/")
    (outcome,) = outcomes
    if outcome_of == "the proxy":
        assert (outcome.kind, outcome.result, outcome.sent) == ("offloaded:nginx", "delegated", 0)
    elif outcome_of == "us":
        assert answer.body == LARGE
        assert (outcome.kind, outcome.result, outcome.sent) == ("chunks", "completed", len(LARGE))
    else:
        assert (outcome.result, outcome.reason) == ("aborted", "failed")


async def test_the_name_of_the_proxy(root: Path) -> None:
    offload = dv.OffloadMiddleware(
        application(root), dv.XAccelRedirect([dv.Rule(str(root), "/_files/")]), proxy="caddy"
    )
    app = Observed(offload)
    async with live(app, http=DownloadProtocol) as port:
        await ask(port, "/mount/files/a.txt")
    assert ((outcome := app.only()).kind, outcome.result) == ("offloaded:caddy", "delegated")
    assert outcome.size == 10


async def answer_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("boom")


async def answer_a_part(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
    await send({"type": "http.response.body", "body": b"12345", "more_body": True})
    raise ValueError("boom")


async def return_early(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
    await send({"type": "http.response.body", "body": b"12345", "more_body": True})


async def fail_afterwards(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("all of it")(scope, receive, send)
    raise ValueError("boom")


@pytest.mark.parametrize(
    "app, wanted",
    [
        (answer_nothing, (500, "refused", None, 0, "boom")),
        (answer_a_part, (200, "aborted", "failed", 5, "boom")),
        (return_early, (200, "aborted", "failed", 5, None)),
        (fail_afterwards, (200, "completed", None, 9, None)),
    ],
)
async def test_errors(app: ASGIApp, wanted: tuple[Any, ...], caplog: pytest.LogCaptureFixture) -> None:
    for http in ("httptools", DownloadProtocol):
        observed = Observed(app)
        async with live(observed, http=http) as port:
            await ask(port, "/")
        outcome = observed.only()
        assert (outcome.status, outcome.result, outcome.reason, outcome.sent, outcome.detail) == wanted, http


async def test_a_source_that_fails_in_the_middle() -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"a" * 100
        raise OSError("the disk")

    app = Observed(dv.DownloadResponse(dv.VirtualFile(content, name="a.bin")))
    async with live(app, http=DownloadProtocol) as port:
        assert not (await ask(port, "/")).complete
    outcome = app.only()
    assert (outcome.result, outcome.reason, outcome.sent) == ("aborted", "source-failed", 100)


async def test_an_upstream_that_breaks_off() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000")]})
        await send({"type": "http.response.body", "body": b"1" * 1000, "more_body": True})
        raise dv.TransferAborted("broken")

    async with live(broken, http=DownloadProtocol) as upstream:
        source = dv.RemoteSource(f"http://127.0.0.1:{upstream}/", allow_hosts=["127.0.0.1"])
        app = Observed(dv.Download(source))
        async with live(app, http=DownloadProtocol) as port:
            assert not (await ask(port, "/a.bin")).complete
        await source.aclose()
    outcome = app.only()
    assert (outcome.result, outcome.reason, outcome.sent) == ("aborted", "upstream-failed", 1000)


@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_a_server_that_stops(http: Any) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"1234"
            await asyncio.sleep(0.01)

    app = Observed(StreamingResponse(endless()))
    async with live(app, http=http, timeout_graceful_shutdown=0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"1234")
    async with asyncio.timeout(20):
        while not app.outcomes:
            await asyncio.sleep(0.01)
    outcome = app.only()
    assert (outcome.status, outcome.result, outcome.reason) == (200, "aborted", "server-stopped")
    assert outcome.sent >= 4
    writer.close()


async def test_a_client_that_stalls(root: Path) -> None:
    import functools

    with (root / "huge.bin").open("wb") as file:
        file.truncate(64 << 20)
    app = Observed(dv.Download(dv.PathSource(root)))
    async with live(app, http=functools.partial(DownloadProtocol, stall_seconds=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET /huge.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readexactly(1000)
        async with asyncio.timeout(20):
            while not app.outcomes:
                await asyncio.sleep(0.01)
        writer.close()
    outcome = app.only()
    assert (outcome.result, outcome.reason) == ("aborted", "stalled")
    assert 1000 <= outcome.sent < 64 << 20


@pytest.mark.parametrize("leaves", [False, True])
async def test_background_runs_after_the_answer_and_after_a_client_that_left(root: Path, leaves: bool) -> None:
    ran = asyncio.Event()
    order: list[str] = []

    async def background() -> None:
        order.append("background")
        ran.set()

    async def endless() -> AsyncIterator[bytes]:
        yield b"1" * 100
        while leaves:
            await asyncio.sleep(0.01)
            yield b"1"

    response = dv.DownloadResponse(dv.VirtualFile(endless, name="a"), background=BackgroundTask(background))
    app = dv.Accounts(response, observers=[lambda outcome: order.append(outcome.result)])
    async with live(app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"1" * 100)
        writer.close()
        await asyncio.wait_for(ran.wait(), 20)
    assert sorted(order) == sorted(["background", "aborted" if leaves else "completed"])


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_a_temporary_file_is_removed(root: Path, leaves: bool, http: Any) -> None:
    path = root / "temporary.bin"
    path.write_bytes(b"1" * (16 << 20))
    is_open = asyncio.Event()

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            assert not path.exists()
            is_open.set()
            await send(message)

        await dv.DownloadResponse(dv.LocalFile(path, delete=True))(scope, receive, note)

    app = Observed(dv.OffloadMiddleware(endpoint, dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])))
    async with live(app, http=http) as port:
        if leaves:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await is_open.wait()
            writer.transport.abort()
            async with asyncio.timeout(20):
                while not app.outcomes:
                    await asyncio.sleep(0.01)
        else:
            assert len((await ask(port, "/")).body) == 16 << 20
            assert (await ask(port, "/")).status == 404  # another `LocalFile`
    assert app.outcomes[0].result == ("aborted" if leaves else "completed")


async def test_a_temporary_file_is_removed_if_the_client_has_left_before_it_could_be_opened(tmp_path: Path) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("made")
        await dv.DownloadResponse(dv.LocalFile(tmp_path / f"{number}.txt", delete=True))(scope, receive, send)
    async with asyncio.timeout(20):
        while any(tmp_path.iterdir()):
            await asyncio.sleep(0.01)


async def test_a_temporary_file_can_be_opened_by_several_requests_at_once(tmp_path: Path) -> None:
    async def size(file: dv.LocalFile) -> int | None:
        async with file.open() as opened:
            return opened.metadata.size

    def run(file: dv.LocalFile, barrier: threading.Barrier) -> int | None:
        barrier.wait(20)
        return asyncio.run(size(file))

    with ThreadPoolExecutor(4) as threads:
        for number in range(50):
            (tmp_path / "made.txt").write_text("made")
            file, barrier = dv.LocalFile(tmp_path / "made.txt", delete=True), threading.Barrier(4)
            assert [*threads.map(run, [file] * 4, [barrier] * 4)] == [4] * 4, number


async def test_a_temporary_file_can_be_opened_again_and_others_stay(root: Path) -> None:
    file = dv.LocalFile(root / "a.txt", delete=True)
    assert file.location is None
    for _ in range(2):
        async with file.open() as opened:
            assert not (root / "a.txt").exists()
            assert [chunk async for chunk in opened.stream(None)] == [b"0123456789"]
    (root / "link").symlink_to(root / "large.bin")
    async with dv.LocalFile(root / "link", delete=True).open():
        pass
    assert (root / "large.bin").exists()
    assert (root / "link").is_symlink()


# --- ids of requests


@pytest.mark.parametrize(
    "trusted, sent, believed",
    [
        (["127.0.0.1"], "abc-1", True),
        (["127.0.0.0/8"], "abc-1", True),
        (["*"], "abc-1", True),
        ([], "abc-1", False),
        (["10.0.0.1"], "abc-1", False),
        (["*"], "a b", False),
        (["*"], "x" * 129, False),
        (["*"], 'a"b', False),
    ],
)
async def test_the_id_of_a_request(
    root: Path, trusted: list[str], sent: str, believed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[dv.Outcome] = []
    app = dv.Accounts(application(root), observers=[outcomes.append], trusted_proxies=trusted, sends_request_id=True)
    caplog.set_level(logging.INFO, logger="downloadview_async")
    async with live(app, http=DownloadProtocol) as port:
        for name in ("a.txt", "a.txt", "large.bin", "none"):
            answer = await ask(port, f"/mount/files/{name}", headers={"X-Request-Id": sent})
            request_id = outcomes[-1].request_id
            assert answer.headers["x-request-id"] == request_id
            assert (request_id == sent) == believed
            assert believed or re.fullmatch("[0-9a-f]{32}", request_id)
    assert f"(request {outcomes[-1].request_id})" in caplog.text


async def test_an_address_that_is_not_one_is_refused() -> None:
    with pytest.raises(dv.ConfigurationError, match=r"'example\.org' is not a trusted address"):
        dv.Accounts(answer_nothing, trusted_proxies=["example.org"])
    listeners: Any = [1]
    with pytest.raises(dv.ConfigurationError, match="give a list of functions"):
        dv.Accounts(answer_nothing, listeners)
    with pytest.raises(dv.ConfigurationError, match="give a list of functions"):
        dv.Accounts(answer_nothing, observers=listeners)


async def test_ids_are_all_different() -> None:
    assert len({new_request_id() for _ in range(1000)}) == 1000


# --- listeners


def outcome(number: int = 0) -> dv.Outcome:
    return dv.Outcome(request_id=str(number), time=0, method="GET", path="/", http_version="1.1")


async def test_listeners_get_all_outcomes_in_order() -> None:
    of_async: list[str] = []
    of_plain: list[str] = []

    async def listen(one: dv.Outcome) -> None:
        await asyncio.sleep(0)
        of_async.append(one.request_id)

    listeners = Listeners([listen, lambda one: of_plain.append(one.request_id)])
    for number in range(500):
        listeners.put(outcome(number))
        if number % 100 == 0:
            await asyncio.sleep(0.03)
    await listeners.drain(20)
    assert of_async == of_plain == [str(number) for number in range(500)]


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_listener_that_hangs_loses_only_its_own(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    release, got = threading.Event(), list[str]()

    async def hang(one: dv.Outcome) -> None:
        await asyncio.Event().wait()

    def block(one: dv.Outcome) -> None:
        release.wait(20)

    listeners = Listeners([hang if is_async else block, lambda one: got.append(one.request_id)], 50)
    for number in range(200):
        listeners.put(outcome(number))
        if number % 20 == 0:
            await asyncio.sleep(0.06)
    await listeners.drain(0.2)
    listeners.end()
    release.set()
    assert len(got) == 200
    messages = [record.getMessage() for record in caplog.records]
    dropped = [int(message.split()[0]) for message in messages if "were dropped" in message]
    assert len(dropped) == 2  # the first one at once, the others at the end, and none of them in between
    undelivered = [int(message.split()[0]) for message in messages if "not delivered" in message]
    assert sum(dropped) + sum(undelivered) == 200
    assert sum(undelivered) <= 51


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_listener_that_raises_gets_the_next_one(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    got: list[str] = []

    def fail(one: dv.Outcome) -> None:
        got.append(one.request_id)
        raise ValueError("boom")

    async def fail_too(one: dv.Outcome) -> None:
        fail(one)

    listeners = Listeners([fail_too if is_async else fail])
    for number in range(10):
        listeners.put(outcome(number))
    await listeners.drain(20)
    assert len(got) == 10
    listeners.end()
    lines = [record for record in caplog.records if "has raised" in record.getMessage()]
    assert [record.getMessage().split()[0] for record in lines] == ["1", "9"]
    assert all(record.exc_info for record in lines)


@pytest.mark.parametrize("exc", [asyncio.CancelledError(), SystemExit(1)], ids=["cancelled", "exits"])
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_listener_that_is_cancelled_or_exits_gets_the_next_one(is_async: bool, exc: BaseException) -> None:
    got: list[str] = []

    def fail(one: dv.Outcome) -> None:
        got.append(one.request_id)
        raise exc

    async def fail_too(one: dv.Outcome) -> None:
        fail(one)

    if is_async and isinstance(exc, SystemExit):
        return  # it ends the event loop, and so the server
    listeners = Listeners([fail_too if is_async else fail])
    for number in range(3):
        listeners.put(outcome(number))
        await listeners.drain(20)
    assert got == ["0", "1", "2"]


@pytest.mark.parametrize("begins", [True, False])
async def test_a_listener_whose_task_is_cancelled_gets_the_next_one(begins: bool) -> None:
    got: list[str] = []
    begun = asyncio.Event()

    async def listen(one: dv.Outcome) -> None:
        got.append(one.request_id)
        begun.set()
        if begins and one.request_id == "0":
            await asyncio.Event().wait()

    listeners = Listeners([listen])
    before = asyncio.all_tasks()
    listeners.put(outcome(0))
    if begins:
        await begun.wait()
    for task in (cancelled := asyncio.all_tasks() - before):
        task.cancel()
    await asyncio.wait(cancelled)
    listeners.put(outcome(1))
    await listeners.drain(20)
    assert got[-1] == "1"


@pytest.mark.parametrize("is_async", [True, False])
async def test_listeners_of_single_answers_that_hang_are_bounded(
    is_async: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_AT_ONCE", 5)
    monkeypatch.setattr(module, "_of_answers", {})
    monkeypatch.setattr(module, "_too_many", module._Count("%d outcomes were dropped, because %s are busy", "too many"))
    release, busy = threading.Event(), list[str]()
    released = asyncio.Event()

    def make(is_shared: bool) -> Any:
        async def hang(one: dv.Outcome) -> None:
            busy.append(one.request_id)
            await released.wait()

        def block(one: dv.Outcome) -> None:
            busy.append(one.request_id)
            release.wait(20)

        return hang if is_async else block

    shared = make(True)
    for number in range(50):
        module.tell(shared, outcome(number))  # they wait for the first one
        module.tell(make(False), outcome(number))
    async with asyncio.timeout(20):
        while len(busy) < 5:
            await asyncio.sleep(0.01)
    assert len(module._of_answers) == 5
    assert "1 outcomes were dropped, because too many are busy" in caplog.text
    release.set()
    released.set()
    async with asyncio.timeout(20):
        while module._of_answers:
            await asyncio.sleep(0.01)
    assert len(busy) == 50 + 4


async def test_single_answers_of_a_loop_that_has_ended_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_AT_ONCE", 1)
    monkeypatch.setattr(module, "_of_answers", {})
    got: list[str] = []

    def put(number: int) -> None:
        async def run() -> None:
            module.tell(lambda one: got.append(one.request_id), outcome(number))

        asyncio.run(run())

    await asyncio.to_thread(put, 0)
    module.tell(lambda one: got.append(one.request_id), outcome(1))
    await Listeners([]).drain(20)
    assert got == ["1"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


async def raise_unprintable(scope: Scope, receive: Receive, send: Send) -> None:
    raise Unprintable


async def raise_with_strange_notes(scope: Scope, receive: Receive, send: Send) -> None:
    exc = ValueError("boom")
    exc.__notes__ = ()  # type: ignore[assignment]
    raise exc


async def send_text_as_header(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [("etag", "1")]})


async def send_no_status(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": None})


async def send_fields_once(scope: Scope, receive: Receive, send: Send) -> None:
    fields = iter([(b"content-length", b"1"), (b"etag", b'"1"')])
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": b"1"})


@pytest.mark.parametrize("http", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
async def test_strange_applications_end_in_one_outcome_too(http: Any) -> None:
    for app, result, size in [
        (raise_unprintable, "refused", None),
        (raise_with_strange_notes, "refused", None),
        (send_text_as_header, "aborted", None),
        (send_no_status, "refused", None),
        (send_fields_once, "completed", 1),
    ]:
        observed = Observed(app)
        async with live(observed, http=http) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await reader.read()
            writer.close()
        assert ((one := observed.only()).result, one.size) == (result, size), app


async def test_an_observer_that_raises_changes_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(one: dv.Outcome) -> None:
        raise ValueError("boom")

    outcomes: list[dv.Outcome] = []
    for observers in ([fail], [fail, outcomes.append]):
        async with live(dv.Accounts(application(root), observers=observers), http=DownloadProtocol) as port:
            assert (await ask(port, "/mount/files/a.txt")).complete
    assert len(outcomes) == 1
    assert caplog.text.count("an observer of outcomes has raised") == 2


async def test_the_shutdown_waits_for_listeners_before_the_application_ends() -> None:
    order: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        order.append("shutdown")

    async def listen(one: dv.Outcome) -> None:
        await anyio.sleep(0.05)
        order.append("outcome")

    def note(one: dv.Outcome) -> None:
        order.append("of the answer")

    async def endpoint(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.VirtualFile(b"a", name="a"), on_outcome=note)

    def check() -> None:
        app = Starlette(routes=[Route("/", endpoint)], lifespan=lifespan)
        with TestClient(dv.Accounts(app, [listen])) as client:
            for _ in range(3):
                client.get("/")

    await asyncio.to_thread(check)
    assert order[-1] == "shutdown"
    assert sorted(order[:-1]) == ["of the answer"] * 3 + ["outcome"] * 3


async def test_the_numbers_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(module, "monotonic", lambda: now)
        count = module._Count("%d lost, because %s", print)
        for seconds in (0, 1, 59, 61, 62, 122):
            now = 100.0 + seconds
            count.add()
        count.log()
    assert [record.getMessage().split()[0] for record in caplog.records] == ["1", "3", "2"]


@pytest.mark.parametrize("is_read", [True, False])
async def test_an_answer_that_waits_in_the_transport_ends_when_it_has_left(
    is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application has returned, but the client does not read. The shutdown ends such an answer."""
    size = 32 << 20
    has_returned = asyncio.Event()

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await PlainTextResponse(b"1" * size)(scope, receive, send)
        has_returned.set()

    monkeypatch.setattr(accounts, "DRAIN_SECONDS", 0.05)
    outcomes: list[dv.Outcome] = []
    app = dv.Accounts(endpoint, observers=[outcomes.append])
    async with live(app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await has_returned.wait()
        assert (outcomes, app.in_progress) == ([], 1)
        if is_read:
            await reader.readexactly(size)
            await until(outcomes)
        else:

            async def receive() -> Message:
                return {"type": "lifespan.shutdown"}

            async def send(message: Message) -> None:
                pass

            await app({"type": "lifespan"}, receive, send)
        writer.transport.abort()
    assert app.in_progress == 0
    (outcome,) = outcomes
    assert (outcome.result, outcome.reason) == (("completed", None) if is_read else ("aborted", "server-stopped"))


async def test_the_end_of_a_chunked_body_is_not_a_part_of_it() -> None:
    """The reset of the client overtakes its acknowledgement of the last chunk, which has no data."""
    taken = asyncio.get_running_loop().create_future()
    client = socket.socket()

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1" * 1000, "more_body": True})
        received = b""
        while not received.endswith(b"1\r\n"):  # the loopback device has delivered it: nothing waits here
            received += (piece := client.recv(4096))
            assert piece
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        await send({"type": "http.response.body"})
        assert client.recv(4096) == b"0\r\n\r\n"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        taken.set_result(scope["extensions"][CONNECTION].taken(1000, 0, 0))

    async with live(endpoint, http=DownloadProtocol) as port:
        with client:
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with anyio.fail_after(30):
                assert await taken == 1000


@pytest.mark.parametrize("is_async", [True, False])
async def test_outcomes_of_a_loop_that_has_ended_are_delivered_with_the_next_one(is_async: bool) -> None:
    got: list[str] = []

    async def listen(one: dv.Outcome) -> None:
        got.append(one.request_id)

    listeners = Listeners([listen if is_async else lambda one: got.append(one.request_id)])

    def put(number: int, *, drains: bool) -> None:
        async def run() -> None:
            listeners.put(outcome(number))
            if drains:
                await listeners.drain(20)

        with asyncio.Runner() as runner:
            runner.run(run())

    await asyncio.to_thread(put, 1, drains=False)
    await asyncio.to_thread(put, 2, drains=True)
    assert got == ["1", "2"]


@pytest.mark.parametrize("options", [{}, {"trusted_proxies": ["127.0.0.1"], "sends_request_id": True}])
async def test_a_small_file_still_leaves_in_one_write(root: Path, options: dict[str, Any]) -> None:
    outcomes: list[dv.Outcome] = []
    app = dv.Accounts(dv.Download(dv.PathSource(root)), observers=[outcomes.append], **options)
    sends: list[int] = []

    def count(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and arg.__name__ == "send" and isinstance(arg.__self__, socket.socket):
            sends.append(1)

    def download() -> None:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"0123456789"):
                received += client.recv(1 << 16)

    async with live(app, http=DownloadProtocol) as port:
        await asyncio.to_thread(download)  # keeps the head
        outcomes.clear()
        sys.setprofile(count)
        try:
            await asyncio.to_thread(download)
        finally:
            sys.setprofile(None)
    assert len(outcomes) == 1
    assert len(sends) == 1


class Around:
    """Middleware of another kind: it has its own `send`, so the server cannot tell what it sends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            await send(message)

        await self.app(scope, receive, pass_on)


@pytest.mark.parametrize("target", ["a.txt", "large.bin", "none", "", "a.txt?view", "?archive=zip"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("headers", [{}, {"X-Request-Id": "of the application"}])
async def test_what_the_server_counts_is_what_the_middleware_counts(
    root: Path, target: str, method: str, headers: dict[str, str]
) -> None:
    by_server: list[dv.Outcome] = []
    by_itself: list[dv.Outcome] = []
    served = dv.Download(dv.PathSource(root), listing=True, archive=True, headers=headers)

    def ask_thrice(port: int) -> None:
        with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=20)) as client:
            for _ in range(3):  # from the second answer on, a head is prepared
                client.request(method, f"/{target}")
                answer = client.getresponse()
                body = answer.read()
                assert len(answer.headers.get_all("x-request-id", [])) == 1
                sent.append((answer.headers["x-request-id"], len(body)))

    rows: list[list[tuple[Any, ...]]] = []
    for outcomes, around in ((by_server, None), (by_itself, Around)):
        sent: list[tuple[str, int]] = []
        app: ASGIApp = dv.Accounts(served, observers=[outcomes.append], sends_request_id=True)
        async with live(app if around is None else around(app), http=DownloadProtocol) as port:
            await asyncio.to_thread(ask_thrice, port)
        assert [(outcome.request_id, outcome.sent) for outcome in outcomes] == sent
        names = ["status", "kind", "spans", "sent", "result", "reason", "name", "etag", "size", "source"]
        rows.append([tuple(getattr(outcome, name) for name in names) for outcome in outcomes])
    assert rows[0] == rows[1]


async def test_a_prepared_answer_passes_no_wrapper(root: Path) -> None:
    outcomes: list[dv.Outcome] = []
    app = dv.Accounts(dv.Download(dv.PathSource(root)), observers=[outcomes.append], sends_request_id=True)
    called: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_qualname.startswith("Account."):
            called.append(frame.f_code.co_name)

    async with live(app, http=DownloadProtocol) as port:
        await ask_twice(port)  # keeps the head
        called.clear()
        sys.setprofile(note)
        try:
            await ask_twice(port)
        finally:
            sys.setprofile(None)
    assert [outcome.sent for outcome in outcomes] == [10] * 4
    assert called.count("end") == 2
    assert called.count("send") == 0


async def ask_twice(port: int) -> None:
    """Send two requests over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(b"GET /a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.lower().count(b"x-request-id: ") == 1
        assert await reader.readexactly(10) == b"0123456789"
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("target", ["a.txt", "large.bin", "none"])
async def test_an_answer_leaves_no_garbage(root: Path, target: str) -> None:
    app = dv.Accounts(dv.Download(dv.PathSource(root)), observers=[lambda _: None], sends_request_id=True)

    def ask_often(port: int, times: int) -> None:
        with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=20)) as client:
            for _ in range(times):
                client.request("GET", f"/{target}")
                client.getresponse().read()

    async with live(app, http=DownloadProtocol) as port:
        await asyncio.to_thread(ask_often, port, 2)
        gc.collect()
        gc.disable()
        try:
            await asyncio.to_thread(ask_often, port, 50)
            accounts_left = [one for one in gc.get_objects() if isinstance(one, accounts.Account)]
        finally:
            gc.enable()
    assert len(accounts_left) < 10
