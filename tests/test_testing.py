"""The helpers for users' tests: what the client sees, and what the assertions accept, refuse and say."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import (
    Download,
    DownloadResponse,
    LocalFile,
    MemoryStorage,
    OffloadMiddleware,
    Rule,
    StorageSource,
    VirtualFile,
    XAccelRedirect,
    XSendfile,
)
from downloadview_async.testing import (
    Recording,
    assert_download_response,
    assert_x_accel_redirect,
    assert_x_sendfile,
    call,
)

pytestmark = pytest.mark.asyncio

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"40")]}


def chunk(size: int, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": b"x" * size, "more_body": more}


def sends(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


FOUR_CHUNKS = sends(START, chunk(10), chunk(10), chunk(10), chunk(10, more=False))


async def test_a_call_records_every_message() -> None:
    answer = await call(FOUR_CHUNKS)
    assert [m["type"] for m in answer.messages] == ["http.response.start"] + ["http.response.body"] * 4
    assert (answer.status, answer.body, answer.complete, answer.dropped) == (200, b"x" * 40, True, 0)
    assert answer.headers["Content-Length"] == answer.headers["content-length"] == "40"


async def test_a_header_that_comes_twice_is_kept_twice() -> None:
    response = Response("x")
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    answer = await call(response)
    assert [value.partition(";")[0] for value in answer.headers.getlist("Set-Cookie")] == ["a=1", "b=2"]


async def test_a_request_reaches_the_application_as_a_server_would_pass_it() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope, received=[await receive()])
        await Response("ok")(scope, receive, send)
        seen["received"].append(await receive())

    await call(
        app,
        "/a b/π",
        method="POST",
        query="x=1",
        headers=[("Range", "bytes=0-1"), ("range", "bytes=2-3")],
        body=b"content",
        extensions={"tls": {}},
        scope={"path_params": {"name": "π"}},
    )
    assert seen["method"] == "POST"
    assert seen["path"] == "/a b/π"
    assert seen["raw_path"] == b"/a%20b/%CF%80"
    assert seen["query_string"] == b"x=1"
    assert seen["headers"] == [(b"range", b"bytes=0-1"), (b"range", b"bytes=2-3")]
    assert seen["extensions"] == {"tls": {}}
    assert seen["path_params"] == {"name": "π"}
    assert seen["received"] == [
        {"type": "http.request", "body": b"content", "more_body": False},
        {"type": "http.disconnect"},
    ]


@pytest.mark.parametrize(
    "leave, body, dropped",
    [
        ({"leave_after_bytes": 0}, None, 5),
        ({"leave_after_bytes": 1}, 10, 3),
        ({"leave_after_bytes": 10}, 10, 3),
        ({"leave_after_bytes": 11}, 20, 2),
        ({"leave_after_bytes": 41}, 40, 0),
        ({"leave_after_messages": 0}, None, 5),
        ({"leave_after_messages": 1}, 0, 4),
        ({"leave_after_messages": 3}, 20, 2),
    ],
)
async def test_what_is_sent_to_a_client_that_has_left_is_dropped(
    leave: dict[str, int], body: int | None, dropped: int
) -> None:
    answer = await call(FOUR_CHUNKS, raise_errors=True, **leave)  # type: ignore[arg-type]
    assert answer.dropped == dropped
    assert answer.started == (body is not None)
    assert len(answer.body) == (body or 0)
    assert answer.complete == (dropped == 0)


async def test_an_application_hears_that_the_client_leaves() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        await send(START)
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                heard.append((await receive())["type"])
                tasks.cancel_scope.cancel()

            tasks.start_soon(listen)
            while True:
                await send(chunk(10))
                await anyio.lowlevel.checkpoint()

    answer = await call(app, leave_after_bytes=30)
    assert heard == ["http.disconnect"]
    assert answer.body == b"x" * 30
    assert not answer.complete


async def test_a_client_that_stalls_holds_send_until_the_application_gives_up() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        with anyio.move_on_after(0.01) as patience:
            await send(chunk(10))
            await send(chunk(10))
        assert patience.cancelled_caught

    answer = await call(app, stall_after_bytes=20)
    assert (answer.body, answer.complete, answer.cancelled) == (b"x" * 20, False, False)


async def test_a_cancelled_call_ends_inside_send() -> None:
    closed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await FOUR_CHUNKS(scope, receive, send)
        finally:
            closed.append(True)

    answer = await call(app, cancel_after_bytes=20)
    assert (answer.body, answer.cancelled, closed) == (b"x" * 20, True, [True])


async def test_a_download_that_is_cancelled_inside_send_closes_its_file() -> None:
    closed = anyio.Event()

    async def content() -> Any:
        try:
            while True:
                yield b"x" * 1000
        finally:
            closed.set()

    answer = await call(DownloadResponse(VirtualFile(content, name="x.bin")), cancel_after_bytes=5000)
    assert answer.cancelled
    assert closed.is_set()


async def test_a_download_ends_when_its_client_has_left() -> None:
    chunks = 0

    async def content() -> Any:
        nonlocal chunks
        for _ in range(1000):
            chunks += 1
            yield b"x" * 1000

    answer = await call(DownloadResponse(VirtualFile(content, name="x.bin")), leave_after_bytes=5000)
    assert (len(answer.body), answer.complete) == (5000, False)
    assert chunks < 20


@pytest.mark.parametrize(
    "messages, error",
    [
        ([chunk(1)], "before http.response.start"),
        ([START, START], "a second http.response.start"),
        ([START, chunk(1, more=False), chunk(1)], "after the end of the response"),
        ([{"type": "websocket.send"}], "not a message of a response"),
    ],
)
async def test_messages_that_asgi_does_not_allow_raise(messages: list[Message], error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        await call(sends(*messages))


async def test_an_error_of_the_application_is_raised_or_recorded() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise LookupError("broken")

    with pytest.raises(LookupError):
        await call(app)
    answer = await call(app, raise_errors=False)
    assert isinstance(answer.error, LookupError)
    assert not answer.complete
    with pytest.raises(AssertionError, match=r"the application raised LookupError\('broken'\)"):
        assert_download_response(answer)


async def test_a_response_that_has_not_begun_has_no_status() -> None:
    answer = await call(sends())
    with pytest.raises(AssertionError, match="has not begun a response"):
        _ = answer.status


CONTENT = "é".encode() * 20


def application(backend: Any = None) -> ASGIApp:
    async def endpoint(request: Any) -> DownloadResponse:
        inline = request.query_params.get("inline") is not None
        return DownloadResponse(VirtualFile(CONTENT, name="π ü.txt"), attachment=not inline)

    source = StorageSource(MemoryStorage({"plain.bin": b"0123456789"}))
    app: ASGIApp = Starlette(routes=[Route("/", endpoint), Route("/files/{path:path}", Download(source))])
    return app if backend is None else OffloadMiddleware(app, backend)


async def through_call(app: ASGIApp, url: str) -> Any:
    path, _, query = url.partition("?")
    return await call(app, path, query=query)


async def through_httpx(app: ASGIApp, url: str) -> Any:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        return await client.get(url)


async def through_test_client(app: ASGIApp, url: str) -> Any:
    return await anyio.to_thread.run_sync(TestClient(app).get, url)


CLIENTS = pytest.mark.parametrize("get", [through_call, through_httpx, through_test_client])


@CLIENTS
async def test_assert_download_response_accepts_what_is_there(get: Callable[..., Any]) -> None:
    answer = await get(application(), "/")
    assert_download_response(answer)
    assert_download_response(
        answer, content=CONTENT, filename="π ü.txt", attachment=True, content_type="text/plain; charset=utf-8"
    )
    assert_download_response(answer, content=CONTENT.decode(), content_type="text/plain")
    assert_download_response(await get(application(), "/?inline"), attachment=False)
    assert_download_response(await get(application(), "/files/none"), status=404, content="Not Found")


@CLIENTS
@pytest.mark.parametrize(
    "expected, message",
    [
        ({"status": 206}, "status: expected 206, found 200"),
        ({"filename": "other.txt"}, "filename in content-disposition: expected 'other.txt', found 'π ü.txt'"),
        ({"attachment": False}, "content-disposition: expected 'inline', found 'attachment'"),
        ({"content_type": "text/html"}, "content-type: expected 'text/html', found 'text/plain'"),
        (
            {"content_type": "text/plain; charset=ascii"},
            "content-type: expected 'text/plain; charset=ascii', found 'text/plain; charset=utf-8'",
        ),
        (
            {"content": "é" * 19},
            r"content: expected 38 bytes, found 40; from byte 38 on expected b'', found b'\xc3\xa9'",
        ),
        ({"content": b"e"}, "content: expected 1 bytes, found 40; from byte 0 on expected b'e', found b'\\xc3"),
    ],
)
async def test_assert_download_response_says_what_it_misses(
    get: Callable[..., Any], expected: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_download_response(await get(application(), "/"), **expected)
    assert message in str(caught.value)


def recorded(*headers: tuple[bytes, bytes], body: bytes = b"", status: int = 200, method: str = "GET") -> Recording:
    start = {"type": "http.response.start", "status": status, "headers": list(headers)}
    return Recording(method, [start, {"type": "http.response.body", "body": body}])


@pytest.mark.parametrize(
    "disposition, filename",
    [
        (b"attachment; filename=a.txt", "a.txt"),
        (b'attachment; filename="a b;c.txt"', "a b;c.txt"),
        (rb'attachment; filename="a\"b.txt"', 'a"b.txt'),
        (b"Attachment; FileName*=utf-8'de'%c3%a4.txt; filename=\"a.txt\"", "ä.txt"),
        (b"attachment; filename=\"a.txt\"; filename*=UTF-8''%CF%80%25.txt", "π%.txt"),
    ],
)
async def test_file_names_are_read_as_a_client_reads_them(disposition: bytes, filename: str) -> None:
    assert_download_response(recorded((b"content-disposition", disposition)), filename=filename, attachment=True)


@pytest.mark.parametrize(
    "answer, message",
    [
        (recorded(), "content-disposition: expected 'attachment', it is absent"),
        (recorded((b"content-disposition", b"attachment"), (b"content-disposition", b"inline")), "found 2 times"),
        (recorded((b"content-disposition", b'attachment; filename="a')), "by RFC 6266, found"),
        (recorded((b"content-disposition", b"attachment; filename=a; filename=b")), "by RFC 6266, found"),
        (recorded((b"content-disposition", b"attachment; filename*=a.txt")), "by RFC 8187, found"),
        (recorded((b"content-disposition", b"attachment; filename*=latin-1''a")), "by RFC 8187, found"),
        (recorded((b"content-disposition", b"attachment; filename*=utf-8''%ff")), "filename* in UTF-8"),
        (recorded((b"content-length", b"3"), body=b"1234"), "it promises '3' bytes, the body has 4"),
        (recorded((b"x-accel-redirect", b"/_files/a")), "x-accel-redirect: expected to be absent, found b'/_files/a'"),
        (Recording("GET", [START, chunk(10)]), "it broke off after 10 bytes"),
    ],
)
async def test_a_malformed_response_is_no_download(answer: Recording, message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_download_response(answer, attachment=True)
    assert message in str(caught.value)


async def test_a_head_has_the_length_of_what_it_does_not_send() -> None:
    assert_download_response(recorded((b"content-length", b"3"), method="HEAD"), content=b"")


def offloading(tmp_path: Path, backend: Any, *, name: str = "a b%π.txt") -> ASGIApp:
    (tmp_path / name).write_bytes(b"content")

    async def endpoint(request: Any) -> DownloadResponse:
        return DownloadResponse(LocalFile(tmp_path / name), filename="name.txt")

    return OffloadMiddleware(Starlette(routes=[Route("/", endpoint)]), backend)


@CLIENTS
async def test_assert_x_accel_redirect(get: Callable[..., Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"buffering": False, "charset": "utf-8", "expires": 60, "limit_rate": 1000}
    answer = await get(offloading(tmp_path, XAccelRedirect([Rule(str(tmp_path), "/_f/")], **options)), "/")
    assert_x_accel_redirect(
        answer,
        redirect_url="/_f/a%20b%25%CF%80.txt",
        content_type="text/plain",
        filename="name.txt",
        attachment=True,
        **options,
    )
    refused: list[tuple[dict[str, Any], str]] = [
        ({"redirect_url": "/_f/a b"}, "x-accel-redirect: expected b'/_f/a b', found b'/_f/a%20b%25%CF%80.txt'"),
        ({"buffering": True}, "x-accel-buffering: expected 'yes', found 'no'"),
        ({"charset": "ascii"}, "x-accel-charset: expected 'ascii', found 'utf-8'"),
        ({"expires": "off"}, "x-accel-expires: expected 'off', found '60'"),
        ({"limit_rate": 0}, "x-accel-limit-rate: expected '0', found '1000'"),
        ({"attachment": False}, "content-disposition: expected 'inline', found 'attachment'"),
    ]
    for expected, message in refused:
        with pytest.raises(AssertionError) as caught:
            assert_x_accel_redirect(answer, **({"redirect_url": "/_f/a%20b%25%CF%80.txt"} | expected))
        assert message in str(caught.value)
    with pytest.raises(AssertionError, match="x-accel-buffering: expected to be absent"):
        assert_download_response(answer)


@CLIENTS
async def test_assert_x_sendfile(get: Callable[..., Any], tmp_path: Path) -> None:
    # Starlette's TestClient cannot carry the raw bytes of a name that is not ASCII
    path = tmp_path / ("a b%.txt" if get is through_test_client else "a b%π.txt")
    for encoding, other in (("raw", "percent"), ("percent", "raw")):
        backend: Any = XSendfile([Rule(str(tmp_path), str(tmp_path))], encoding=encoding)  # type: ignore[arg-type]
        answer = await get(offloading(tmp_path, backend, name=path.name), "/")
        assert_x_sendfile(answer, file_path=path, encoding=encoding, filename="name.txt", attachment=True)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="x-sendfile: expected"):
            assert_x_sendfile(answer, file_path=path, encoding=other)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match=r"x-accel-redirect: expected .*, it is absent: the file"):
            assert_x_accel_redirect(answer, redirect_url="/x")


@pytest.mark.parametrize(
    "answer, message",
    [
        (recorded(status=403), "status: expected 200, found 403"),
        (recorded((b"x-sendfile", b"/a"), body=b"x"), "content: expected 0 bytes, found 1"),
        (recorded((b"x-sendfile", b"/a"), (b"content-length", b"7")), "content-length: expected '0', found '7'"),
        (recorded((b"x-sendfile", b"/a"), (b"accept-ranges", b"bytes")), "accept-ranges: expected to be absent"),
        (recorded((b"x-sendfile", b"/a"), (b"content-range", b"bytes 0-1/2")), "content-range: expected to be absent"),
        (recorded((b"x-sendfile", b"/a"), (b"x-sendfile", b"/a")), "expected once, found 2 times"),
        (recorded((b"x-sendfile", b"/a"), (b"x-accel-redirect", b"/a")), "x-accel-redirect: expected to be absent"),
    ],
)
async def test_an_offloaded_answer_has_no_body_and_no_ranges(answer: Recording, message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_x_sendfile(answer, file_path="/a")
    assert message in str(caught.value)


async def test_the_plugin_gives_the_call(download_call: Callable[..., Any]) -> None:
    assert download_call is call


async def test_the_plugin_is_registered(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.has_plugin("downloadview_async")


@pytest.mark.parametrize(
    "module, absent",
    [
        ("downloadview_async.testing", ["pytest", "httpx", "httpx2", "uvicorn"]),
        ("downloadview_async.pytest_plugin", ["downloadview_async.testing", "httpx", "httpx2", "uvicorn"]),
    ],
)
async def test_importing_the_helpers_imports_nothing_heavy(module: str, absent: list[str]) -> None:
    code = f"import {module}, sys; print(*[name for name in {absent!r} if name in sys.modules])"
    done = await anyio.run_process([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert done.stdout.strip() == b""
