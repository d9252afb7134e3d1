"""A `FileError` that a view raises is answered by its status, and a missing file as one that the client may not see."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.asgi import get_asgi_application as get_plain_application
from django.http import Http404, HttpResponse
from django.test import override_settings
from django.urls import path

from downloadview_async import (
    AccessDenied,
    DownloadRequest,
    FileError,
    FileMetadata,
    FileMissing,
    LinkExpired,
    LinkInvalid,
    PathSource,
    SourceUnavailable,
    TransferAborted,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.contrib.django import (
    BaseDownloadView,
    DownloadResponse,
    ObjectDownloadView,
    PathDownloadView,
    download_finished,
    get_asgi_application,
)
from downloadview_async.http.request import GET
from tests.contrib.django.test_arguments import served_by_wsgi
from tests.live import Answer, ask, live

OURS = "downloadview_async.contrib.django."
MIDDLEWARES: dict[str, dict[str, Any]] = {
    "errors": {"MIDDLEWARE": [f"{OURS}DownloadMiddleware"]},
    "smart": {
        "MIDDLEWARE": [f"{OURS}SmartDownloadMiddleware"],
        "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{"source_dir": "/nowhere", "destination_url": "/_files/"}]},
    },
    "dispatcher": {"MIDDLEWARE": [f"{OURS}middlewares.DownloadDispatcherMiddleware"]},
}
ERRORS: dict[str, tuple[type[FileError], int]] = {
    "missing": (FileMissing, 404),
    "denied": (AccessDenied, 404),
    "unavailable": (SourceUnavailable, 503),
    "upstream": (UpstreamError, 502),
    "timeout": (UpstreamTimeout, 504),
    "expired": (LinkExpired, 410),
    "invalid": (LinkInvalid, 403),
}
NOTHING = b"nothing here, says the project"


class Refusing:
    """A source whose files cannot be had."""

    async def resolve(self, name: str) -> Any:
        raise ERRORS[name][0](f"the reason why {name}, for the log alone")


async def on_loop(request: Any, name: str) -> Any:
    return DownloadResponse(await Refusing().resolve(name))


def in_thread(request: Any, name: str) -> Any:
    return DownloadResponse(async_to_sync(Refusing().resolve)(name))


class OfClass(BaseDownloadView):
    async def aget_file(self) -> Any:
        return await Refusing().resolve(self.kwargs["name"])


class OfBlockingClass(BaseDownloadView):
    def get_file(self) -> Any:
        return async_to_sync(Refusing().resolve)(self.kwargs["name"])


class OfObject(ObjectDownloadView):
    async def aget_object(self) -> Any:
        return await Refusing().resolve(self.kwargs["name"])


class OfBlockingObject(ObjectDownloadView):
    def get_object(self, queryset: Any = None) -> Any:
        return async_to_sync(Refusing().resolve)(self.kwargs["name"])


VIEWS: dict[str, Any] = {
    "on loop": on_loop,
    "in thread": in_thread,
    "class": OfClass.as_view(),
    "blocking class": OfBlockingClass.as_view(),
    "object": OfObject.as_view(),
    "blocking object": OfBlockingObject.as_view(),
}
# Django's own handlers need a middleware for functions
ROWS = [
    (view, how, middleware)
    for view in VIEWS
    for how in ("ours", "stock", "wsgi")
    for middleware in (*MIDDLEWARES, "none")
    if how == "ours" or middleware != "none" or view not in ("on loop", "in thread")
]


def no_page(request: Any) -> Any:
    raise Http404("a page that does not exist")


class Urls:
    handler404: Any = staticmethod(lambda request, exception: HttpResponse(NOTHING, status=404))
    # Django's own handler gives a template `403.html` this message
    handler403: Any = staticmethod(lambda request, exception: HttpResponse(f"no: {exception}", status=403))

    def __init__(self, *patterns: Any) -> None:
        self.urlpatterns = [*patterns, path("page", no_page)]


async def answers(how: str, urls: Any, paths: list[str], **changes: Any) -> list[Answer]:
    with override_settings(ROOT_URLCONF=urls, **changes):
        if how == "wsgi":
            with served_by_wsgi() as port:
                return [await asyncio.wait_for(ask(port, each), 20) for each in paths]
        application: Any = get_asgi_application() if how == "ours" else get_plain_application()
        async with live(application) as port:
            return [await ask(port, each) for each in paths]


def _headers(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name != "date"}


@pytest.mark.asyncio
@pytest.mark.parametrize(("view", "how", "middleware"), ROWS)
async def test_an_error_about_a_file_is_answered_by_its_status(
    view: str, how: str, middleware: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "downloadview_async")
    urls = Urls(path("<str:name>/file", VIEWS[view]))
    targets = [f"/{name}/file" for name in ERRORS]
    page, *found = await answers(how, urls, ["/page", *targets], **MIDDLEWARES.get(middleware, {}))
    for (name, (_, status)), answer in zip(ERRORS.items(), found, strict=True):
        assert answer.status == status, name
        assert b"reason" not in answer.body
        logged = [record for record in caplog.records if f"the reason why {name}" in record.getMessage()]
        assert [record.levelname for record in logged] == (
            [] if status == 403 else ["INFO" if status < 500 else "WARNING"]
        )
        if status not in (403, 404):
            assert answer.headers["cache-control"] == "private, no-store"
    missing, denied = found[0], found[1]
    assert (page.status, page.body) == (404, NOTHING)
    assert (missing.body, _headers(missing)) == (denied.body, _headers(denied)) == (page.body, _headers(page))


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["ours", "stock", "wsgi"])
@pytest.mark.parametrize("middleware", MIDDLEWARES)
async def test_a_missing_file_of_a_source_and_one_of_a_view_give_the_same_404(
    tmp_path: Path, how: str, middleware: str
) -> None:
    source = PathSource(tmp_path)

    async def of_source(request: Any, path: str) -> Any:
        return DownloadResponse(await source.resolve(path))

    urls = Urls(
        path("source/<path:path>", of_source), path("view/<path:path>", PathDownloadView.as_view(root=tmp_path))
    )
    targets = ["/page", "/source/missing.txt", "/view/missing.txt", "/source/../x", "/view/..%2fx", "/no/such/view"]
    found = await answers(how, urls, targets, **MIDDLEWARES[middleware])
    assert {(answer.status, answer.body, *sorted(_headers(answer).items())) for answer in found} == {
        (404, NOTHING, *sorted(_headers(found[0]).items()))
    }


@pytest.mark.asyncio
async def test_a_view_makes_the_answer_to_a_missing_file_of_a_source() -> None:
    class Own(OfClass):
        def file_not_found_response(self) -> Any:
            return HttpResponse(b"own", status=404)

    found = await answers("ours", Urls(path("<str:name>/file", Own.as_view())), ["/missing/file", "/denied/file"])
    assert {(answer.status, answer.body) for answer in found} == {(404, b"own")}


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["ours", "stock", "wsgi"])
async def test_other_errors_of_views_are_those_of_the_project(how: str) -> None:
    def broken(request: Any) -> Any:
        raise LookupError("a fault of the project")

    class Own(Urls):
        handler500: Any = staticmethod(lambda request: HttpResponse(b"our fault", status=500))

    (answer,) = await answers(how, Own(path("broken", broken)), ["/broken"], **MIDDLEWARES["errors"])
    assert (answer.status, answer.body) == (500, b"our fault")


# --- a file that changes between its description and its first byte


@dataclass
class Changing:
    """A file that is another version each time it is opened. The first `changes` versions change before they leave."""

    size: int
    changes: int = 1
    then: type[FileError] | None = None
    name: str = "a.bin"
    location: str | None = None
    opened: int = field(default=0)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator["Version"]:
        self.opened += 1
        if self.opened > 1 and self.then is not None:
            raise self.then("gone")
        yield Version(self)


class Version:
    def __init__(self, file: Changing) -> None:
        self.file, self.number = file, file.opened
        self.metadata = FileMetadata(size=file.size + file.opened)

    async def stream(self, span: Any) -> AsyncIterator[bytes]:
        if self.number <= self.file.changes:
            raise TransferAborted("it has changed", reason="file-changed")
        yield (b"%d" % self.number) * len(span)


@pytest.fixture
def outcomes() -> Iterator[list[Any]]:
    found: list[Any] = []

    def note(sender: Any, outcome: Any, **_: Any) -> None:
        found.append(outcome)

    download_finished.connect(note, weak=False)
    yield found
    download_finished.disconnect(note)


CHANGES: list[tuple[str, Changing, dict[str, str], int, bytes | None]] = [
    ("small", Changing(10), {}, 200, b"2" * 12),
    ("large", Changing(300_000), {}, 200, b"2" * 300_002),
    ("part", Changing(100), {"Range": "bytes=10-"}, 206, b"2" * 92),
    ("again", Changing(10, changes=2), {}, 503, b""),
    ("missing now", Changing(10, then=FileMissing), {}, 404, NOTHING),
    ("unavailable now", Changing(10, then=UpstreamError), {}, 502, b""),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("file", "headers", "status", "body"), [row[1:] for row in CHANGES], ids=[c[0] for c in CHANGES]
)
@pytest.mark.parametrize("limited", [False, True])
async def test_a_file_that_changes_before_its_first_byte_is_sent_as_it_is_now(
    file: Changing,
    headers: dict[str, str],
    status: int,
    body: bytes,
    limited: bool,
    outcomes: list[Any],
) -> None:
    file.opened = 0

    async def view(request: Any) -> Any:
        response = DownloadResponse(file, headers={"X-Of-View": "1"})
        response.set_cookie("a", "b")
        return response

    def adds_a_header(get_response: Any) -> Any:
        async def added(request: Any) -> Any:
            response = await get_response(request)
            response["X-Of-Middleware"] = "1"
            return response

        return added

    changes: dict[str, Any] = {"MIDDLEWARE": []}
    if limited:
        changes = {"MIDDLEWARE": [f"{OURS}LimitsMiddleware"], "DOWNLOADVIEW_LIMITS": {"QUOTA": ["1GB/day"]}}
    with override_settings(ROOT_URLCONF=Urls(path("f", view)), **changes):
        async with live(get_asgi_application()) as port:
            answer = await ask(port, "/f", headers=headers)
    assert (answer.status, answer.complete) == (status, True)
    assert answer.body == body
    if status < 300:
        assert answer.headers["x-of-view"] == "1"
        assert answer.headers["set-cookie"].startswith("a=b")
        assert int(answer.headers["content-length"]) == len(answer.body)
        if status == 206:
            assert answer.headers["content-range"] == "bytes 10-101/102"
    while not outcomes:
        await asyncio.sleep(0)
    (outcome,) = outcomes
    assert (outcome.status, outcome.sent) == (status, len(body))
