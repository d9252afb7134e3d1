"""`download_finished`: one outcome for each answer of Django, under our handler, under Django's own, and under WSGI."""

import asyncio
import contextlib
import gc
import queue
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
import uvicorn
from django.core.asgi import get_asgi_application as django_asgi
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import RequestFactory, override_settings
from django.urls import path

from downloadview_async import ByteRange, Outcome
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.contrib.django import (
    AccountsMiddleware,
    PathDownloadView,
    download_finished,
    get_asgi_application,
)
from tests.live import make_old

TEXT = b"0123456789" * 100
SIZE = 16 << 20
MIDDLEWARE = ["downloadview_async.contrib.django.AccountsMiddleware"]
DOWNLOAD = "async/<path:path>"


class Quiet(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def by_wsgi() -> Iterator[int]:
    server = make_server("127.0.0.1", 0, get_wsgi_application(), server_class=WSGIServer, handler_class=Quiet)
    server.RequestHandlerClass = Quiet
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def by_asgi(application: Callable[[], Any], http: Any) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(application(), http=http, log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            with warnings.catch_warnings(action="ignore", category=ResourceWarning):
                gc.collect()  # Django's own handler leaves the files of bodies open when a client leaves


SERVERS: dict[str, Callable[[], contextlib.AbstractContextManager[int]]] = {
    "wsgi": by_wsgi,
    "Django's handler": lambda: by_asgi(django_asgi, "httptools"),
    "our handler": lambda: by_asgi(get_asgi_application, DownloadProtocol),
    "our handler, chunks": lambda: by_asgi(get_asgi_application, "httptools"),
}


def urls(root: Path) -> Any:
    def plain(request: HttpRequest) -> HttpResponse:
        return HttpResponse(b"plain")

    def file(request: HttpRequest, name: str) -> FileResponse:
        return FileResponse((root / name).open("rb"))

    def broken(request: HttpRequest) -> StreamingHttpResponse:
        def body() -> Iterator[bytes]:
            yield b"a" * 10
            raise ValueError("broken")

        return StreamingHttpResponse(body())

    def failing(request: HttpRequest) -> HttpResponse:
        raise ValueError("failing")

    class Patterns:
        urlpatterns = [
            path("plain", plain),
            path("theirs/<name>", file),
            path("broken", broken),
            path("failing", failing),
            path("ours/<path:path>", PathDownloadView.as_view(root=root)),
        ]

    return Patterns


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(TEXT)
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(SIZE)
    make_old(tmp_path)
    return tmp_path


@pytest.fixture(params=SERVERS)
def served(request: pytest.FixtureRequest, root: Path) -> Iterator[tuple[int, "queue.Queue[Outcome]"]]:
    outcomes: queue.Queue[Outcome] = queue.Queue()

    def receive(sender: Any, outcome: Outcome, **_: Any) -> None:
        outcomes.put(outcome)

    with override_settings(ROOT_URLCONF=urls(root), MIDDLEWARE=MIDDLEWARE, DEBUG=False):
        download_finished.connect(receive)
        try:
            with SERVERS[request.param]() as port:
                yield port, outcomes
        finally:
            download_finished.disconnect(receive)
    assert outcomes.empty()


def ask(port: int, target: str, *, method: str = "GET", headers: str = "", reads: int | None = None) -> bytes:
    """Return the body of the answer. reads: reset the connection after so many bytes."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        client.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())
        received = b""
        while reads is None or len(received) < reads:
            if not (piece := client.recv(1 << 16)):
                break
            received += piece
        if reads is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return received.partition(b"\r\n\r\n")[2]


CASES: dict[str, tuple[str, dict[str, Any], tuple[int, str, int | None]]] = {
    "ours": ("/ours/a.txt", {}, (200, "completed", len(TEXT))),
    "ours, a part": ("/ours/a.txt", {"headers": "Range: bytes=5-9\r\n"}, (206, "completed", 5)),
    "ours, HEAD": ("/ours/a.txt", {"method": "HEAD"}, (200, "completed", 0)),
    "ours, large": ("/ours/large.bin", {}, (200, "completed", SIZE)),
    "ours, 416": ("/ours/a.txt", {"headers": "Range: bytes=5000-\r\n"}, (416, "refused", 0)),
    "ours, 304": (
        "/ours/a.txt",
        {"headers": "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT\r\n"},
        (304, "not-modified", 0),
    ),
    "ours, 404": ("/ours/none", {}, (404, "refused", None)),
    "theirs": ("/theirs/a.txt", {}, (200, "completed", len(TEXT))),
    "plain": ("/plain", {}, (200, "completed", 5)),
    "failing": ("/failing", {}, (500, "refused", None)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators:Warning")
def test_each_answer_has_one_outcome(served: tuple[int, "queue.Queue[Outcome]"], case: str) -> None:
    port, outcomes = served
    target, options, (status, result, sent) = CASES[case]
    body = ask(port, target, **options)
    outcome = outcomes.get(timeout=20)
    assert (outcome.status, outcome.result, outcome.reason) == (status, result, None)
    assert 0 < outcome.sent <= len(body) if sent is None else outcome.sent == sent  # a chunked body has framing, too
    assert (outcome.client, outcome.path) == ("127.0.0.1", target)
    if case == "ours, a part":
        assert outcome.spans == (ByteRange(5, 10),)
    if status in (200, 206) and target.startswith("/ours"):
        assert (outcome.name, outcome.route) == (target[6:], "ours/<path:path>")
        assert outcome.size == (SIZE if "large" in target else len(TEXT))


@pytest.mark.parametrize("target", ["/ours/large.bin", "/theirs/large.bin"])
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators:Warning")
def test_a_client_that_leaves(
    served: tuple[int, "queue.Queue[Outcome]"], target: str, request: pytest.FixtureRequest
) -> None:
    port, outcomes = served
    ask(port, target, reads=100_000)
    outcome = outcomes.get(timeout=20)
    assert (outcome.status, outcome.result, outcome.reason) == (200, "aborted", "client-left")
    assert 90_000 < outcome.sent < SIZE


@pytest.mark.asyncio
@pytest.mark.parametrize("application", [django_asgi, get_asgi_application])
@pytest.mark.parametrize("target", ["/ours/large.bin", "/theirs/large.bin", "/plain"])
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators:Warning")
async def test_a_server_that_raises_since_the_client_has_left(
    application: Callable[[], Any], target: str, root: Path
) -> None:
    """ASGI 2.4 has `send` raise OSError then."""
    outcomes: queue.Queue[Outcome] = queue.Queue()
    messages = iter([{"type": "http.request"}])

    async def receive() -> Any:
        if (message := next(messages, None)) is None:
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        if message["type"] != "http.response.start":
            raise OSError("the client has left")

    def note(sender: Any, outcome: Outcome, **_: Any) -> None:
        outcomes.put(outcome)

    scope = {"type": "http", "method": "GET", "path": target, "query_string": b"", "headers": []}
    with override_settings(ROOT_URLCONF=urls(root), MIDDLEWARE=MIDDLEWARE, DEBUG=False):
        download_finished.connect(note)
        try:
            with contextlib.suppress(OSError):
                await application()(scope, receive, send)
            with warnings.catch_warnings(action="ignore", category=ResourceWarning):
                gc.collect()  # Django's own handler leaves the files of bodies open then, and does not close a response
            outcome = await asyncio.to_thread(outcomes.get, timeout=20)
        finally:
            download_finished.disconnect(note)
    assert outcomes.empty()
    assert (outcome.path, outcome.status) == (target, 200)
    assert (outcome.result, outcome.reason, outcome.sent) == ("aborted", "client-left", 0)


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators:Warning")
def test_a_body_that_breaks_off(served: tuple[int, "queue.Queue[Outcome]"]) -> None:
    port, outcomes = served
    ask(port, "/broken")
    outcome = outcomes.get(timeout=20)
    assert (outcome.status, outcome.result) == (200, "aborted")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_request_that_ends_by_an_exit_has_an_outcome(is_async: bool) -> None:
    """Django answers each `Exception` itself, but not others, such as a timeout of gevent."""

    class Timeout(BaseException):
        pass

    def answer(request: object) -> None:
        raise Timeout

    async def answer_async(request: object) -> None:
        raise Timeout

    outcomes: queue.Queue[Outcome] = queue.Queue()

    def receive(outcome: Outcome, **_: object) -> None:
        outcomes.put(outcome)

    async def run() -> Outcome:
        middleware = AccountsMiddleware(answer_async if is_async else answer)
        try:
            await middleware(RequestFactory().get("/"))
        except Timeout:
            return await asyncio.to_thread(outcomes.get, timeout=20)
        raise AssertionError

    download_finished.connect(receive)
    try:
        outcome = asyncio.run(run())
    finally:
        download_finished.disconnect(receive)
    assert (outcome.result, outcome.path) == ("aborted", "/")
