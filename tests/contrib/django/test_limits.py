"""Limits in Django: under our handler, under Django's own, under WSGI, and by the middleware of ASGI around Django."""

import asyncio
import contextlib
import gc
import http.client
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.asgi import get_asgi_application as django_asgi
from django.core.exceptions import ImproperlyConfigured
from django.http import FileResponse, HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, override_settings
from django.urls import path

import downloadview_async as dv
from downloadview_async.contrib.django import PathDownloadView, get_asgi_application
from downloadview_async.contrib.django.counting import each_limited, limited
from downloadview_async.contrib.django.limits import LimitsMiddleware, limits_of_settings
from downloadview_async.contrib.django.nginx import x_accel_redirect
from downloadview_async.policy.limits.limits import Transfers
from tests.contrib.django.test_accounts import SERVERS
from tests.descriptors import open_paths
from tests.live import make_old
from tests.redis_server import redis_server

SMALL = b"small" * 100
SIZE = 16 << 20
MIDDLEWARE = ["downloadview_async.contrib.django.LimitsMiddleware"]
WAYS = ["ours", "theirs", "async"]


def urls(root: Path) -> Any:
    def theirs(request: HttpRequest, name: str) -> FileResponse:
        return FileResponse((root / name).open("rb"))

    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(b"page", status=404 if request.GET else 200)

    async def asynchronous(request: HttpRequest, name: str) -> Any:
        return await PathDownloadView.as_view(path=root / name)(request)

    view = PathDownloadView.as_view(root=root)

    class Patterns:
        urlpatterns = [
            path("page", page),
            path("theirs/<name>", theirs),
            path("ours/<path:path>", view),
            path("async/<name>", asynchronous),
            path("nginx/<path:path>", x_accel_redirect(view, source_dir=root, destination_url="/_files/")),
        ]

    return Patterns


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "small.bin").write_bytes(SMALL)
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(SIZE)
    make_old(tmp_path)
    return tmp_path


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def served(server: str, root: Path, **limits: Any) -> Iterator[int]:
    given = {name.upper(): value for name, value in limits.items()}
    with (
        override_settings(ROOT_URLCONF=urls(root), MIDDLEWARE=MIDDLEWARE, DEBUG=False, DOWNLOADVIEW_LIMITS=given),
        SERVERS[server]() as port,
    ):
        yield port


def ask(port: int, target: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, target, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


@contextlib.contextmanager
def held(port: int, target: str) -> Iterator[None]:
    """Begin to read an answer, and leave."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in client.recv(100)
        received = 0
        while received < 400_000:
            piece = client.recv(65536)
            assert piece
            received += len(piece)
        yield


def until_it_is(port: int, status: int, target: str, end: bytes = b"") -> None:
    """Ask until the answer is such: a server may have ended the transfer before only in a moment."""
    deadline = time.monotonic() + 20
    while (answer := ask(port, target))[0] != status or not answer[2].endswith(end):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("way", WAYS)
def test_transfers_at_once(root: Path, server: str, way: str) -> None:
    with served(server, root, concurrent=1) as port:
        with held(port, f"/{way}/large.bin"):
            status, headers, body = ask(port, f"/{way}/small.bin")
            assert (status, body) == (429, b"Too Many Requests: at most 1 transfer at once")
            assert headers["retry-after"] == "1"
            assert headers["cache-control"] == "private, no-store"
            assert ask(port, f"/{way}/small.bin", "HEAD")[0] == 200
            assert ask(port, "/page?missing")[0] == 404
        until_it_is(port, 200, f"/{way}/small.bin")
        assert ask(port, f"/{way}/small.bin")[2] == SMALL


def test_requests(root: Path, server: str) -> None:
    with served(server, root, requests="2/minute") as port:
        assert [ask(port, target)[0] for target in ("/page?missing", "/ours/small.bin", "/page")] == [404, 200, 429]


@pytest.mark.parametrize("way", WAYS)
def test_quotas(root: Path, server: str, way: str) -> None:
    with served(server, root, quota=["16.8MB/day", "4 downloads/day"]) as port:
        with held(port, f"/{way}/large.bin"):
            pass
        until_it_is(port, 200, f"/{way}/small.bin")  # what was not sent is given back
        assert ask(port, f"/{way}/small.bin")[0] == 200
        assert ask(port, f"/{way}/small.bin")[0] == 200
        status, _, body = ask(port, f"/{way}/small.bin")
        assert (status, body) == (429, b"Too Many Requests: at most 4 downloads per day")


def test_pieces_are_one_download(root: Path, server: str) -> None:
    with served(server, root, quota="2 downloads/day") as port:
        for start in range(0, SIZE, 4 << 20):
            assert ask(port, "/ours/large.bin", Range=f"bytes={start}-{start + (4 << 20) - 1}")[0] == 206
        assert [ask(port, f"/{way}/small.bin")[0] for way in ("ours", "theirs")] == [200, 429]
        assert ask(port, "/ours/large.bin", Range="bytes=0-9")[0] == 206


def test_a_proxy_keeps_the_rate(root: Path, server: str) -> None:
    with served(server, root, rate="5MB/s", quota="33MB/day") as port:
        for _ in range(2):
            status, headers, _ = ask(port, "/nginx/large.bin")
            assert (status, headers["x-accel-redirect"]) == (200, "/_files/large.bin")
            assert headers["x-accel-limit-rate"] == "5000000"
        status, headers, _ = ask(port, "/nginx/large.bin")
        assert (status, "x-accel-redirect" in headers) == (429, False)


@pytest.mark.slow
def test_the_rate_of_downloads(root: Path, server: str) -> None:
    with served(server, root, rate="8MB/s") as port:
        began = time.monotonic()
        assert len(ask(port, "/ours/large.bin")[2]) == SIZE
        assert SIZE / 8_000_000 * 0.95 < time.monotonic() - began < 12


def test_a_function_for_the_client(root: Path, server: str) -> None:
    def plan(request: HttpRequest) -> str | None:
        return request.headers.get("x-plan")

    with served(server, root, client=plan, requests="1/minute") as port:
        plans = [{"X_Plan": "a"}, {"X_Plan": "b"}, {"X_Plan": "a"}, {}, {}]
        assert [ask(port, "/page", **plan)[0] for plan in plans] == [200, 200, 429, 200, 429]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("server", ["our handler", "Django's handler"])
@pytest.mark.parametrize("way", WAYS)
def test_the_middleware_of_asgi_around_django(root: Path, server: str, way: str, monkeypatch: Any) -> None:
    from tests.contrib.django import test_accounts

    limits = dv.Limits(concurrent=1, quota="3 downloads/day", rate="100MB/s")
    by_asgi = test_accounts.by_asgi

    def by_limited_asgi(application: Callable[[], Any], http: Any) -> contextlib.AbstractContextManager[int]:
        return by_asgi(lambda: dv.LimitsMiddleware(application(), limits), http)

    monkeypatch.setattr(test_accounts, "by_asgi", by_limited_asgi)
    with override_settings(ROOT_URLCONF=urls(root), MIDDLEWARE=[], DEBUG=False), SERVERS[server]() as port:
        with held(port, f"/{way}/large.bin"):
            assert ask(port, f"/{way}/small.bin")[0] == 429
        until_it_is(port, 200, f"/{way}/small.bin")
        until_it_is(port, 200, f"/{way}/small.bin")
        until_it_is(port, 429, f"/{way}/small.bin", b"at most 3 downloads per day")


MISTAKES = [
    (None, "has to be a dictionary"),
    ({"RATES": "1MB/s"}, "some of these keys"),
    ({"RATE": "1mb/s"}, "is not a rate"),
    ({"CLIENT": "link"}, "known only in the view"),
    ({"CLIENT": "nowhere.function"}, "nowhere"),
]


@pytest.mark.parametrize("limits, problem", MISTAKES)
def test_settings_that_are_refused(limits: Any, problem: str) -> None:
    with override_settings(DOWNLOADVIEW_LIMITS=limits), pytest.raises(ImproperlyConfigured, match=problem):
        limits_of_settings()


@pytest.mark.asyncio
async def test_a_request_that_is_cancelled_while_its_bytes_are_counted_leaves_no_lease(tmp_path: Path) -> None:
    class Cancelling(HttpResponse):
        """Its fields are read between the lease and the quota."""

        def items(self) -> Any:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return super().items()

    kinds = [Cancelling, HttpResponse]

    async def view(request: HttpRequest) -> HttpResponse:
        return kinds[0](SMALL)

    with redis_server(tmp_path) as redis:
        options = {"CONCURRENT": 1, "QUOTA": "1GB/day", "STORE": redis.url, "WHEN_STORE_FAILS": "refuse"}
        with override_settings(DOWNLOADVIEW_LIMITS=options):
            middleware = LimitsMiddleware(view)
        request = AsyncRequestFactory().get("/")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(middleware(request))
        del kinds[0]
        deadline = time.monotonic() + 20
        while (response := await middleware(AsyncRequestFactory().get("/"))).status_code == 429:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert response.status_code == 200
        await middleware.limits.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("application", [django_asgi, get_asgi_application])
@pytest.mark.parametrize("target", ["/ours/large.bin", "/theirs/large.bin", "/page"])
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators:Warning")
async def test_a_place_is_free_after_send_has_raised(application: Callable[[], Any], target: str, root: Path) -> None:
    """ASGI 2.4 has it raise OSError when the client has left. Django's own handler does not close the response then."""
    app: Any = None

    async def status_of(*, is_there: bool) -> int:
        messages, statuses = iter([{"type": "http.request"}]), []

        async def receive() -> Any:
            if (message := next(messages, None)) is None:
                await asyncio.Event().wait()
            return message

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            elif not is_there:
                raise OSError("the client has left")

        scope = {"type": "http", "method": "GET", "path": target, "query_string": b"", "headers": []}
        with contextlib.suppress(OSError):
            await app({**scope, "client": ("127.0.0.1", 1)}, receive, send)
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()  # Django's own handler leaves the files of bodies open, too
        await asyncio.sleep(0)  # the place is given back in the event loop
        return int(statuses[0])

    with override_settings(ROOT_URLCONF=urls(root), MIDDLEWARE=MIDDLEWARE, DOWNLOADVIEW_LIMITS={"CONCURRENT": 1}):
        app = application()
        assert [await status_of(is_there=there) for there in (False, False, False, True)] == [200] * 4
    assert open_paths().count(str(root / "large.bin")) <= 1  # which is kept for the next request


@pytest.mark.asyncio
@pytest.mark.parametrize("is_async", [False, True])
async def test_the_next_transfer_may_begin_when_the_last_bytes_leave(is_async: bool) -> None:
    limits, scope = dv.Limits(concurrent=1), {"client": ("127.0.0.1", 1), "headers": [], "method": "GET"}
    transfers = Transfers()
    assert transfers.begin_nowait([limits], scope, is_transfer=True)

    async def parts() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"cd"

    def is_free() -> bool:
        other = Transfers()
        try:
            return other.begin_nowait([limits], scope, is_transfer=True)
        except dv.LimitExceeded:
            return False
        finally:
            other.end()

    if is_async:
        body = limited(parts(), transfers, 4)
        assert (await anext(body), is_free()) == (b"ab", False)
        assert (await anext(body), is_free()) == (b"cd", True)
        await body.aclose()
    else:
        chunks = each_limited([b"ab", b"cd"], transfers, 4, transfers.let_go)
        assert (next(chunks), is_free()) == (b"ab", False)
        assert (next(chunks), is_free()) == (b"cd", True)
        assert next(chunks, None) is None
