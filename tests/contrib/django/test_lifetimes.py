"""What begins and ends with a download: threads, loops, the interpreter, directories, clients; nothing outlives it."""

import asyncio
import gc
import gzip
import io
import logging
import shutil
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.core import signals
from django.core.asgi import get_asgi_application as get_plain_application
from django.core.exceptions import PermissionDenied
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, InMemoryStorage
from django.core.management import call_command
from django.db import connections
from django.http import Http404, HttpRequest
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.contrib.django import (
    DownloadResponse,
    PathDownloadView,
    PathFile,
    StorageDownloadView,
    get_asgi_application,
)
from tests.descriptors import open_paths
from tests.live import ask, live

TEXT = b"All work and no play. " * 20_000
GZIP = "django.middleware.gzip.GZipMiddleware"
PATIENCE = 20.0  # seconds; only what hangs takes as long


class Urls:
    """A URLconf of the test's own."""

    def __init__(self, **views: Any) -> None:
        self.urlpatterns = [path(name, view) for name, view in views.items()]
        self.urlpatterns += [path(f"{name}/<path:path>", view) for name, view in views.items()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "large.bin").write_bytes(bytes(4 << 20))
    return tmp_path


# --- the end of a process, and of what nobody has read, under WSGI

_PROJECT = """
import asyncio, gc, sys
import django
from django.conf import settings

settings.configure(SECRET_KEY="for tests only", ALLOWED_HOSTS=["*"], ROOT_URLCONF="__main__", USE_TZ=True)
django.setup()

from django.core.files.base import ContentFile
from django.core.files.storage import InMemoryStorage
from django.test import Client
from django.urls import path
from downloadview_async.contrib.django import DownloadResponse, PathDownloadView, PathFile, StorageFile
from downloadview_async.contrib.django import StorageDownloadView
from downloadview_async.contrib.django.event_loop import background_loop

storage = InMemoryStorage()
storage.save("large.bin", ContentFile(bytes(4 << 20)))
urlpatterns = [
    path("disk", PathDownloadView.as_view(path=sys.argv[1])),
    path("storage", StorageDownloadView.as_view(storage=storage, path="large.bin")),
]

def half_read(kind):
    if kind == "finished":
        response = Client().get("/disk")
    elif kind == "stored":
        response = Client().get("/storage")
    else:
        response = DownloadResponse(PathFile(sys.argv[1]))
    chunks = iter(response)
    assert 0 < len(next(chunks)) < 4 << 20
    return response, chunks
"""
_COLLECTED = """
class Circle:
    pass

async def collect():
    gc.collect()

gc.disable()
for kind in KINDS:
    circle = Circle()
    circle.half_read, circle.circle = half_read(kind), circle
    del circle
    asyncio.run_coroutine_threadsafe(collect(), background_loop()).result(10)
    print(kind)
"""
_LEFT = """
left = [half_read(kind) for kind in KINDS]
print(*KINDS, sep="\\n")
"""


@pytest.mark.parametrize("end", [_COLLECTED, _LEFT], ids=["collected", "left"])
def test_a_response_that_is_half_read_keeps_nobody(root: Path, end: str) -> None:
    """Neither who collects garbage in the thread of the loop itself, nor the end of the interpreter."""
    kinds = ["finished", "unfinished", "stored"]
    done = subprocess.run(
        [sys.executable, "-c", f"KINDS = {kinds}\n{_PROJECT}{end}", str(root / "large.bin")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, kinds, "")


class Reading(io.BytesIO):
    """Remembers the threads that it is read in."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.threads: list[threading.Thread] = []

    def read(self, size: int | None = -1, /) -> bytes:
        """Read."""
        self.threads.append(threading.current_thread())
        return super().read(size)


class ReadingStorage(InMemoryStorage):
    """A storage whose files remember the threads that they are read in."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Reading] = []

    def _open(self, name: str, mode: str = "rb") -> Any:
        with super()._open(name, mode) as stored:  # type: ignore[misc]
            self.opened.append(Reading(stored.read()))
        return File(self.opened[-1], name=name)


def test_a_download_under_wsgi_does_not_start_a_thread_for_each_chunk() -> None:
    content = bytes(16 << 20)
    storage = ReadingStorage()
    storage.save("large.bin", ContentFile(content))
    with override_settings(ROOT_URLCONF=Urls(storage=StorageDownloadView.as_view(storage=storage))):
        response: Any = Client().get("/storage/large.bin")
        assert b"".join(response) == content
    opened = storage.opened[-1]  # one that was saved this very moment is opened once more, a moment later
    assert len(opened.threads) >= 64
    assert len(set(opened.threads)) <= 8


# --- directories that are replaced


def _fetch(url: str, mode: str) -> bytes | int:
    """Return the body of a 200, else the status."""

    async def fetch() -> bytes | int:
        response: Any = await AsyncClient().get(url)
        if response.status_code != 200:
            return int(response.status_code)
        return b"".join([chunk async for chunk in response])

    if mode == "async":
        return async_to_sync(fetch)()
    response: Any = Client().get(url)
    return b"".join(response) if response.status_code == 200 else int(response.status_code)


def _release(directory: Path, content: bytes, name: str) -> None:
    (directory / "files").mkdir(parents=True)
    (directory / "files" / "a.txt").write_bytes(content)
    (directory / "files" / name).write_bytes(content)


def _switch(current: Path) -> None:
    """Have the link lead to the next release, at once, as deployments do."""
    _release(current.parent / "2", b"second", "new.txt")
    (current.parent / "next").symlink_to("2")
    (current.parent / "next").rename(current)


def _make_again(current: Path) -> None:
    """Delete the directory, and make it again."""
    shutil.rmtree(current.resolve())
    _release(current.resolve(), b"second", "new.txt")


def _move_away(current: Path) -> None:
    """Move the directory away, and make another one."""
    moved = current.resolve()
    moved.rename(moved.with_name("old"))
    _release(moved, b"second", "new.txt")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("replace", [_switch, _make_again, _move_away])
def test_a_root_that_has_been_replaced_is_seen_at_once(
    tmp_path: Path, mode: str, replace: Callable[[Path], None]
) -> None:
    current = tmp_path / "current"
    _release(tmp_path / "1", b"first", "old.txt")
    current.symlink_to("1")
    files = current / "files"
    urls = Urls(
        path=PathDownloadView.as_view(root=files),
        storage=StorageDownloadView.as_view(storage=FileSystemStorage(location=files)),
    )
    with override_settings(ROOT_URLCONF=urls):
        for kind in ("path", "storage"):
            assert [_fetch(f"/{kind}/{name}", mode) for name in ("a.txt", "old.txt", "new.txt")] == [
                b"first",
                b"first",
                404,
            ]
        replace(current)
        for kind in ("path", "storage"):
            assert [_fetch(f"/{kind}/{name}", mode) for name in ("a.txt", "old.txt", "new.txt")] == [
                b"second",
                404,
                b"second",
            ]
        shutil.rmtree(files)
        for kind in ("path", "storage"):
            assert _fetch(f"/{kind}/a.txt", mode) == 404


# --- the ASGI handler: timeouts, mistakes, clients that leave


@contextmanager
def _connected(signal: Any, receiver: Callable[..., Any]) -> Iterator[None]:
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


def _scope(path: str) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "server": ("test", 80)}


class Receiving:
    """One request without a body; then the client stays, until it is told to leave."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self._pending = [{"type": "http.request", "body": b"", "more_body": False}]

    async def __call__(self) -> dict[str, Any]:
        """Return the next message."""
        if self._pending:
            return self._pending.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}


@pytest.mark.asyncio
async def test_a_timeout_around_the_application_is_a_timeout() -> None:
    async with asyncio.timeout(PATIENCE):
        waiting = asyncio.timeout(None)
        sent: list[Any] = []
        finished: list[Any] = []

        async def slow(request: HttpRequest) -> Any:
            waiting.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        with (
            override_settings(ROOT_URLCONF=Urls(slow=slow)),
            _connected(signals.request_finished, lambda **kwargs: finished.append(kwargs)),
        ):
            application: Any = get_asgi_application()
            with pytest.raises(TimeoutError):
                async with waiting:
                    await application(_scope("/slow"), Receiving(), send)
        assert (sent, len(finished)) == ([], 1)


@pytest.mark.asyncio
async def test_a_client_that_leaves_ends_its_request_without_an_exception() -> None:
    receive = Receiving()
    sent: list[Any] = []
    happened: list[str] = []

    async def slow(request: HttpRequest) -> Any:
        receive.left.set()
        try:
            await asyncio.Event().wait()
        finally:
            happened.append("view ended")

    async def send(message: Any) -> None:
        sent.append(message)

    with (
        override_settings(ROOT_URLCONF=Urls(slow=slow)),
        _connected(signals.request_finished, lambda **kwargs: happened.append("finished")),
    ):
        application: Any = get_asgi_application()
        async with asyncio.timeout(PATIENCE):
            await application(_scope("/slow"), receive, send)
    assert (sent, happened) == ([], ["view ended", "finished"])


class Refusing(DownloadResponse):
    """Answers for a missing file by an exception."""

    error: type[Exception] = PermissionDenied

    def file_not_found_response(self) -> Any:
        """Raise."""
        raise self.error


class Gone(Refusing):
    """Says that there is nothing."""

    error = Http404


class Wrong(Refusing):
    """Has a mistake."""

    error = ZeroDivisionError


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "make, status, errors",
    [
        (lambda root: DownloadResponse(5), 500, 1),
        (lambda root: Wrong(PathFile(root / "missing")), 500, 1),
        (lambda root: Refusing(PathFile(root / "missing")), 403, 0),
        (lambda root: Gone(PathFile(root / "missing")), 404, 0),
        (lambda root: DownloadResponse(PathFile(root / "missing")), 404, 0),
        (lambda root: DownloadResponse(PathFile(root / "text.txt")), 200, 0),
    ],
    ids=["no file", "mistake", "denied", "not found", "missing", "fine"],
)
async def test_a_response_that_cannot_be_finished_is_django_s_own_error(
    root: Path, make: Any, status: int, errors: int
) -> None:
    async def view(request: HttpRequest) -> Any:
        return make(root)

    seen: list[Any] = []
    with (
        override_settings(ROOT_URLCONF=Urls(view=view), DEBUG=False),
        _connected(signals.got_request_exception, lambda **kwargs: seen.append(kwargs["request"].path)),
    ):
        async with live(get_asgi_application()) as port:
            answer = await ask(port, "/view")
    assert (answer.status, answer.complete, seen) == (status, True, ["/view"] * errors)


@pytest.mark.asyncio
async def test_an_unfinished_response_is_compressed_without_being_read_synchronously(root: Path) -> None:
    async def coroutine(request: HttpRequest) -> Any:
        return DownloadResponse(PathFile(root / "text.txt"))

    def function(request: HttpRequest) -> Any:
        return DownloadResponse(PathFile(root / "text.txt"))

    with override_settings(ROOT_URLCONF=Urls(coroutine=coroutine, function=function), MIDDLEWARE=[GZIP]):
        async with live(get_asgi_application()) as port:
            for name in ("coroutine", "function"):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    answer = await ask(port, f"/{name}", headers={"Accept-Encoding": "gzip"})
                assert [str(warning.message) for warning in caught] == []
                assert (answer.status, answer.complete) == (200, True)
                assert answer.headers["content-encoding"] == "gzip"
                assert gzip.decompress(answer.body) == TEXT


async def _ask_and_leave(port: int, url: str, begun: asyncio.Event) -> None:
    """Ask, and reset the connection when the request has begun."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {url} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    await begun.wait()
    # without this, a client that closes looks like one that has only finished sending, until something is sent to it
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["hears of it late", "cancelled", "in a thread"])
@pytest.mark.parametrize("name", ["large.bin", "text.txt", "missing"])
async def test_a_client_that_leaves_before_the_answer_is_no_error(
    root: Path, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    begun, left, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    left_for_threads = threading.Event()

    class Blocking(PathDownloadView):
        def get_path(self) -> Any:
            loop.call_soon_threadsafe(begun.set)
            assert left_for_threads.wait(PATIENCE)
            return super().get_path()

    application: Any = get_asgi_application()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        first: list[Any] = [await receive()]

        async def hearing() -> Any:
            if first:
                return first.pop()
            message = await receive()
            left.set()
            left_for_threads.set()
            if kind == "hears of it late":  # the server knows, but the handler does not yet
                await done.wait()
            return message

        async def sending(message: Any) -> None:
            if kind == "hears of it late" and message["type"] == "http.response.start":
                begun.set()
                await left.wait()
            elif kind == "cancelled":
                begun.set()
                await left.wait()
                await asyncio.Event().wait()
            await send(message)

        try:
            await application(scope, hearing, sending)
        finally:
            done.set()

    view = Blocking if kind == "in a thread" else PathDownloadView
    caplog.set_level(logging.WARNING)
    with override_settings(ROOT_URLCONF=Urls(file=view.as_view(root=root))):
        async with asyncio.timeout(PATIENCE), live(watched, http=DownloadProtocol) as port:
            await _ask_and_leave(port, f"/file/{name}", begun)
            await done.wait()
    assert [record.getMessage() for record in caplog.records if record.name != "django.request"] == []
    assert [record for record in caplog.records if record.exc_info] == []
    assert _held(root) == []


def _held(root: Path) -> list[str]:
    return [path for path in open_paths() if path.startswith(f"{root}/")]


# --- responses that were never made

_make: Any = DownloadResponse


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: _make(), TypeError),
        (lambda: _make(ContentFile(b"", name="a"), nonsense=True), TypeError),
        (lambda: DownloadResponse(ContentFile(b"", name="a"), status=304), ValueError),
        (lambda: DownloadResponse(ContentFile(b"", name="a"), content_type="a\r\nb"), ValueError),
    ],
    ids=["no arguments", "unknown argument", "status", "header"],
)
def test_a_response_that_was_never_made_says_so_once(
    make: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(error) as caught:
        make()
    del caught
    assert unraisable == []


# --- connections to databases


@pytest.mark.asyncio
@pytest.mark.parametrize("handler", [get_asgi_application, get_plain_application], ids=["ours", "Django's own"])
@pytest.mark.parametrize("offloaded", [True, False])
async def test_a_request_leaves_no_connection_to_a_database(root: Path, handler: Any, offloaded: bool) -> None:
    """With CONN_MAX_AGE, that is for the next request of a thread: under ASGI, there is none."""

    class Asks(PathDownloadView):
        def get_path(self) -> Path:
            ContentType.objects.count()
            return root / str(self.kwargs["path"])

    def failing(request: HttpRequest, path: str = "") -> Any:
        ContentType.objects.count()
        return Asks.as_view()(request, path="missing")

    await sync_to_async(call_command)("migrate", verbosity=0)
    rules = {"BACKEND": "nginx", "RULES": [{"source_dir": str(root), "destination_url": "/_files/"}]}
    middleware = ["downloadview_async.contrib.django.SmartDownloadMiddleware"] if offloaded else []
    database = connections.settings["default"]
    gc.disable()  # which would close what has been left
    try:
        connections.settings["default"] = {**database, "CONN_MAX_AGE": 600}
        urls = Urls(asks=Asks.as_view(), failing=failing)
        with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=middleware, DOWNLOADVIEW=rules):
            async with live(handler()) as port:
                before = _connections(str(database["NAME"]))
                for name in ("text.txt", "large.bin") * 3:
                    answer = await ask(port, f"/asks/{name}")
                    assert (answer.status, "x-accel-redirect" in answer.headers) == (200, offloaded)
                if handler is get_asgi_application:  # Django's own leaves them where a response is not ours
                    assert (await ask(port, "/failing/x")).status == 404
        async with asyncio.timeout(20):  # the thread of the last request closes its own, which nobody waits for
            while _connections(str(database["NAME"])) != before:
                await asyncio.sleep(0.01)
    finally:
        connections.settings["default"] = database
        gc.enable()


def _connections(database: str) -> int:
    return open_paths().count(database)
