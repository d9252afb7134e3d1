"""What other middlewares do to a download: one that is replaced holds nothing, one that is compressed is right."""

import asyncio
import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.asgi import get_asgi_application as get_plain_application
from django.http import HttpRequest, HttpResponse, HttpResponseForbidden
from django.test import override_settings
from django.urls import path
from starlette.applications import Starlette
from starlette.routing import Route

from downloadview_async import Download, ObjectStorage, OffloadMiddleware, PathSource, Rule, XAccelRedirect
from downloadview_async.asgi import deadline
from downloadview_async.contrib.django import HTTPDownloadView, PathDownloadView, get_asgi_application
from downloadview_async.http.metadata import ByteRange
from tests.asgi.test_server import get, small_buffers
from tests.descriptors import open_paths
from tests.live import ask, live
from tests.observed import Observed

TEXT = b"All work and no play. " * 20_000
HANDLERS = {"ours": get_asgi_application, "stock": get_plain_application}
each_handler = pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
CONDITIONAL = "django.middleware.http.ConditionalGetMiddleware"
GZIP = "django.middleware.gzip.GZipMiddleware"
pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("files_are_kept_briefly")]


class Blocking(PathDownloadView):
    """A view that is called in a thread."""

    def get_path(self) -> Any:
        """Return the path beneath the root."""
        return super().get_path()


class Urls:
    """The files of a directory, by a view of each kind."""

    def __init__(self, root: Path) -> None:
        views = {"async": PathDownloadView, "blocking": Blocking}
        self.urlpatterns = [path(f"{name}/<path:path>", view.as_view(root=root)) for name, view in views.items()]


def refusing(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """Refuse after the view has answered."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        return HttpResponseForbidden(b"no") if "refuse" in request.headers else response

    return middleware


def arefusing(get_response: Any) -> Any:
    """Refuse after the view has answered, without a thread."""

    async def middleware(request: HttpRequest) -> Any:
        response = await get_response(request)
        return HttpResponseForbidden(b"no") if "refuse" in request.headers else response

    return middleware


arefusing.sync_capable, arefusing.async_capable = False, True  # type: ignore[attr-defined]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(TEXT)
    os.utime(tmp_path / "a.txt", ns=(0, 1_700_000_000_500_000_005))
    return tmp_path


def held(root: Path) -> int:
    return sum(path.startswith(f"{root}/") for path in open_paths())


async def nothing_is_held(root: Path) -> None:
    until = time.monotonic() + 20
    while held(root):
        assert time.monotonic() < until, held(root)
        await asyncio.sleep(0.01)


@each_handler
@pytest.mark.parametrize("kind, middleware", [("async", "refusing"), ("blocking", "arefusing")])
async def test_a_response_that_is_replaced_leaves_nothing_open(
    root: Path, handler: Any, kind: str, middleware: str
) -> None:
    with override_settings(ROOT_URLCONF=Urls(root), MIDDLEWARE=[f"{__name__}.{middleware}"]):
        async with live(handler()) as port:
            for _ in range(5):
                answer = await ask(port, f"/{kind}/a.txt", headers={"Refuse": "1"})
                assert (answer.status, answer.body) == (403, b"no")
                assert not {"etag", "content-disposition", "accept-ranges"} & answer.headers.keys()
            assert (await ask(port, f"/{kind}/a.txt")).body == TEXT
            await nothing_is_held(root)


async def test_a_client_that_stops_reading_holds_the_file_until_the_deadline(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "STALL_SECONDS", 0.2)
    (root / "big.bin").write_bytes(bytes(16 << 20))
    with override_settings(ROOT_URLCONF=Urls(root)):
        async with live(get_asgi_application(), http="h11") as port:
            with small_buffers(port) as client:
                client.send(get("/async/big.bin"))
                assert await asyncio.get_running_loop().sock_recv(client, 1)
                await nothing_is_held(root)


@each_handler
@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_conditional_get_middleware_around_a_download(root: Path, handler: Any, kind: str) -> None:
    with override_settings(ROOT_URLCONF=Urls(root), MIDDLEWARE=[CONDITIONAL]):
        async with live(handler()) as port:
            whole = await ask(port, f"/{kind}/a.txt")
            assert (whole.status, whole.complete, whole.body) == (200, True, TEXT)
            for conditions in (
                {"If-None-Match": whole.headers["etag"]},
                {"If-Modified-Since": whole.headers["last-modified"]},
            ):
                answer = await ask(port, f"/{kind}/a.txt", headers=conditions)
                assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", whole.headers["etag"])
            part = await ask(port, f"/{kind}/a.txt", headers={"Range": "bytes=3-8"})
            assert (part.status, part.body) == (206, TEXT[3:9])
            await nothing_is_held(root)


@each_handler
@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_gzip_middleware_around_a_download(root: Path, handler: Any, kind: str) -> None:
    with override_settings(ROOT_URLCONF=Urls(root), MIDDLEWARE=[GZIP]):
        async with live(handler()) as port:
            plain = await ask(port, f"/{kind}/a.txt")
            assert (plain.complete, plain.body) == (True, TEXT)
            squeezed = await ask(port, f"/{kind}/a.txt", headers={"Accept-Encoding": "gzip"})
            assert (squeezed.status, squeezed.complete) == (200, True)
            assert squeezed.headers["content-encoding"] == "gzip"
            assert gzip.decompress(squeezed.body) == TEXT
            assert len(squeezed.body) < len(TEXT) // 10
            assert "content-length" not in squeezed.headers
            assert squeezed.headers["etag"] == f"W/{plain.headers['etag']}"
            assert "accept-encoding" in squeezed.headers["vary"].lower()
            head = await ask(port, f"/{kind}/a.txt", method="HEAD", headers={"Accept-Encoding": "gzip"})
            assert (head.status, head.body) == (200, b"")
            part = await ask(port, f"/{kind}/a.txt", headers={"Accept-Encoding": "gzip", "Range": "bytes=0-299999"})
            assert (part.status, part.complete, part.body) == (206, True, TEXT[:300_000])
            assert "content-encoding" not in part.headers
            await nothing_is_held(root)


@each_handler
@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_gzip_middleware_leaves_an_answer_without_the_file_alone(root: Path, handler: Any, kind: str) -> None:
    backend = XAccelRedirect([Rule(str(root), "/_files/")])
    with override_settings(ROOT_URLCONF=Urls(root), MIDDLEWARE=[GZIP]):
        async with live(OffloadMiddleware(handler(), backend)) as port:
            answer = await ask(port, f"/{kind}/a.txt", headers={"Accept-Encoding": "gzip"})
            assert (answer.status, answer.body, answer.headers["x-accel-redirect"]) == (200, b"", "/_files/a.txt")
            assert "content-encoding" not in answer.headers
        async with live(handler()) as port:
            headers = {"Accept-Encoding": "gzip", "If-None-Match": answer.headers["etag"]}
            answer = await ask(port, f"/{kind}/a.txt", headers=headers)
            assert (answer.status, answer.body, "content-encoding" in answer.headers) == (304, b"", False)


@each_handler
async def test_a_proxy_asks_another_server_by_a_signed_get(handler: Callable[[], Any], root: Path) -> None:
    async with live(Starlette(routes=[Route("/box/{path:path}", Download(PathSource(root)))])) as port:
        url = f"http://127.0.0.1:{port}"
        storage = ObjectStorage("s3://box", endpoint=url, access_key_id="a", secret_access_key="b")
        backend = XAccelRedirect([Rule("s3://box", "/_lake/")], storages=[storage])
        view = HTTPDownloadView.as_view(url=f"{url}/box/a.txt", allow_hosts=["127.0.0.1"])
        with override_settings(ROOT_URLCONF=type("Urls", (), {"urlpatterns": [path("a", view)]})):
            async with live(OffloadMiddleware(handler(), backend)) as service:
                get = await ask(service, "/a", headers={"Range": "bytes=0-1"})
                assert (get.status, get.body, get.headers["x-accel-redirect"]) == (200, b"", "/_lake/")
                assert get.headers["x-offload-target"].startswith("/box/a.txt?X-Amz-Algorithm=")
                head = await ask(service, "/a", method="HEAD")
                assert (head.status, head.headers["content-length"]) == (200, str(len(TEXT)))
                for tag, offloaded in ((get.headers["etag"], True), ('"another"', False)):
                    answer = await ask(service, "/a", headers={"Range": "bytes=0-1", "If-Range": tag})
                    assert (answer.status, answer.body) == (200, b"" if offloaded else TEXT)
                    assert ("x-offload-target" in answer.headers) is offloaded


async def test_each_answer_ends_in_one_outcome(root: Path) -> None:
    size = len(TEXT)
    with override_settings(ROOT_URLCONF=Urls(root)):
        app = Observed(get_asgi_application())
        async with live(app) as port:
            whole = await ask(port, "/async/a.txt")
            outcome = app.only()
            assert (outcome.status, outcome.kind, outcome.sent, outcome.is_complete) == (200, "chunks", size, True)
            await ask(port, "/async/a.txt", headers={"Range": "bytes=2-5"})
            outcome = app.only()
            assert (outcome.status, outcome.kind, outcome.spans) == (206, "inline", (ByteRange(2, 6),))
            assert outcome.sent == 4
            await ask(port, "/async/a.txt", headers={"If-None-Match": whole.headers["etag"]})
            assert (outcome := app.only()).status == 304
            assert outcome.kind == "empty"
        backend = XAccelRedirect([Rule(str(root), "/_files/")])
        app = Observed(OffloadMiddleware(get_asgi_application(), backend))
        async with live(app) as port:
            assert "x-accel-redirect" in (await ask(port, "/async/a.txt")).headers
        outcome = app.only()
        assert (outcome.status, outcome.kind, outcome.delegated_to) == (200, "offloaded:nginx", "x-accel-redirect")
