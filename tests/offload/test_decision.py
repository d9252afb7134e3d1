"""May a proxy send this file? The rule as a table, and one answer from Starlette, foreign responses and Django."""

import asyncio
import gzip
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from asgiref.sync import async_to_sync
from django.http import HttpRequest
from django.test import Client, override_settings
from django.urls import path as url_path
from django.views.decorators.csrf import csrf_exempt
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
import tests.contrib.django.conftest
from downloadview_async.asgi.extensions import PATHSEND
from downloadview_async.contrib.django import DownloadResponse, get_asgi_application
from downloadview_async.http.fields import OFFLOAD_ORDERS
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.offload.decision import Refusal, is_plain, refusal, refusal_once_open, selects_something
from downloadview_async.testing import Recording, call
from tests.live import ask, listening, live, make_old
from tests.sources.test_cached import BIG, Origin, remote

assert tests.contrib.django.conftest  # sets Django up
SMART = "downloadview_async.contrib.django.SmartDownloadMiddleware"
CONTENT = b"0123456789" * 100
ELSEWHERE = "https://files.example.org"


# --- the rule as a table


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({}, None),
        ({"method": "HEAD"}, None),
        ({"status": 403}, Refusal.STATUS),
        ({"status": 206}, Refusal.STATUS),
        ({"method": "POST"}, Refusal.METHOD),
        ({"method": "DELETE"}, Refusal.METHOD),
        ({"is_permitted": False}, Refusal.APPLICATION),
        ({"is_part": True}, Refusal.PART),
        ({"is_ordered": True}, Refusal.ORDERED),
        ({"has_rule": False}, Refusal.RULE),
        ({"is_remote": True}, None),
        ({"is_remote": True, "method": "HEAD"}, Refusal.HEAD),
        ({"is_coded": True}, Refusal.CODED),
        ({"hides_coding": True}, Refusal.CODING_HIDDEN),
        ({"matches_if_range": False}, None),  # the proxy evaluates it for a local file
        ({"is_remote": True, "matches_if_range": False}, Refusal.IF_RANGE),
        ({"is_logged": False}, Refusal.RANGE),
        ({"is_telling": False}, Refusal.TIME),
        ({"has_returned": False}, Refusal.UNFINISHED),
        ({"is_there": False}, Refusal.GONE),
        ({"status": 403, "method": "POST", "has_rule": False}, Refusal.STATUS),
        ({"is_coded": True, "has_rule": False}, Refusal.RULE),
    ],
)
def test_the_rule(facts: dict[str, Any], expected: Refusal | None) -> None:
    assert refusal(**facts) is expected


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [
        (None, 10, True),
        ("bytes=0-4", 10, True),
        ("bytes=-5,0-0", 10, True),
        ("bytes=0-4", None, True),
        ("bytes=10-", 10, False),
        ("bytes=0-", 0, False),
        ("bytes=x", None, False),
        ("lines=0-1", 10, False),
        (f"bytes=0-{'9' * 18}", 10, True),
        (f"bytes=0-{'9' * 19}", 10, False),
    ],
)
def test_whether_each_proxy_answers_a_range_by_a_part(value: str | None, size: int | None, expected: bool) -> None:
    assert selects_something(DownloadRequest(range=value), size) is expected
    assert selects_something(DownloadRequest(method="HEAD", range=value), size)


def test_each_refusal_has_a_reason_for_the_log_and_a_row_in_the_table() -> None:
    import downloadview_async.offload.decision as module

    rows = [line.partition(" ")[0] for line in (module.__doc__ or "").splitlines()]
    assert [row for row in rows if row in Refusal.__members__] == list(Refusal.__members__)
    assert len({refused.value for refused in Refusal}) == len(Refusal)


VERSION = FileMetadata(size=10, etag=ETag("a"), last_modified=1_700_000_000)
CODED = replace(VERSION, headers=(("vary", "Accept-Encoding"), ("content-encoding", "gzip")))


@pytest.mark.parametrize(
    "opened, metadata, request_, facts, expected",
    [
        ({}, VERSION, {}, {}, None),
        ({}, CODED, {}, {}, Refusal.CODED),
        ({}, VERSION, {}, {"is_coded": True}, Refusal.CODED),
        ({"hides_coding": True}, VERSION, {}, {}, Refusal.CODING_HIDDEN),
        ({"hides_coding": False}, VERSION, {}, {}, None),
        ({"local": SimpleNamespace(is_telling=False)}, VERSION, {}, {}, Refusal.TIME),
        ({"local": SimpleNamespace(is_telling=True)}, VERSION, {}, {}, None),
        ({}, VERSION, {"if_range": '"b"'}, {}, None),
        ({}, VERSION, {"if_range": '"a"'}, {"is_remote": True}, None),
        ({}, VERSION, {"if_range": '"b"'}, {"is_remote": True}, Refusal.IF_RANGE),
        ({}, VERSION, {"if_range": 'W/"a"'}, {"is_remote": True}, Refusal.IF_RANGE),
        ({}, VERSION, {"if_range": "Tue, 14 Nov 2023 22:13:20 GMT"}, {"is_remote": True}, None),
        ({}, VERSION, {"if_range": ""}, {"is_remote": True}, Refusal.IF_RANGE),
        ({}, VERSION, {}, {"is_remote": True, "method": "HEAD"}, Refusal.HEAD),
    ],
)
def test_what_an_open_file_tells(
    opened: dict[str, Any],
    metadata: FileMetadata,
    request_: dict[str, str],
    facts: dict[str, Any],
    expected: Refusal | None,
) -> None:
    facts = {"method": "GET", **facts}
    file: Any = SimpleNamespace(**opened)
    assert refusal_once_open(file, metadata, DownloadRequest(**request_), **facts) is expected


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/srv/a.txt", True),
        ("/srv/..a/b..txt", True),
        ("srv/a.txt", False),
        ("https://files.example.org/a.txt", False),
        ("/srv/../etc/passwd", False),
        ("/srv/..", False),
    ],
)
def test_a_path_whose_spelling_tells_where_it_is(path: str, expected: bool) -> None:
    assert is_plain(path) is expected


# --- real responses


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(CONTENT)
    (tmp_path / "coded.txt").write_bytes(gzip.compress(CONTENT))
    make_old(tmp_path)
    return tmp_path


class Described:
    """A file that tells more than its bytes do, once it is open.

    url: where another server has it; then `path` is read, and has no place for a proxy.
    """

    def __init__(
        self, path: Path, *, headers: dict[str, str] | None = None, hides_coding: bool = False, url: str | None = None
    ) -> None:
        self.name = path.name
        self.location: str | None = url or str(path)
        self.url = url
        self._file = dv.LocalFile(str(path))
        self._headers = tuple((headers or {}).items())
        self._hides_coding = hides_coding

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[Any]:
        async with self._file.open(request) as opened:
            metadata = replace(opened.metadata, headers=self._headers)
            shared: dict[str, Any] = {"metadata": metadata, "stream": opened.stream, "hides_coding": self._hides_coding}
            if self.url is None:
                opened.metadata = metadata
                shared["local"] = opened
            yield SimpleNamespace(**shared)


@dataclass(frozen=True)
class Case:
    """A request and a response. `elsewhere`: the file is another server's, and the rule has its URL."""

    is_offloaded: bool
    method: str = "GET"
    asked: dict[str, str] = field(default_factory=dict)
    status: int = 200
    sent: dict[str, str] = field(default_factory=dict)
    described: dict[str, str] = field(default_factory=dict)
    hides_coding: bool = False
    is_deleted: bool = False
    is_forbidden: bool = False
    mtime: int | None = None
    elsewhere: bool = False

    def file(self, root: Path) -> Any:
        path = root / ("coded.txt" if "content-encoding" in {*self.described, *self.sent} else "a.txt")
        if self.mtime is not None:
            os.utime(path, (self.mtime, self.mtime))
        url = f"{ELSEWHERE}/{path.name}" if self.elsewhere else None
        return Described(path, headers=self.described, hides_coding=self.hides_coding, url=url)

    @property
    def is_of_the_file(self) -> bool:
        """Whether a path and the fields of a response do not tell all of it, which is what a path send has."""
        return bool(self.described or self.hides_coding or self.elsewhere or self.is_forbidden)


DATE = "Tue, 14 Nov 2023 22:13:20 GMT"
GZIPPED = {"content-encoding": "gzip", "vary": "Accept-Encoding", "content-language": "de"}
CASES = {
    "GET": Case(True),
    "HEAD": Case(True, method="HEAD"),
    "POST": Case(False, method="POST"),
    "Range": Case(True, asked={"Range": "bytes=0-1"}),
    "If-None-Match": Case(True, asked={"If-None-Match": "*"}),
    "If-Range with another version": Case(True, asked={"Range": "bytes=0-1", "If-Range": '"another"'}),
    "status 403": Case(False, status=403),
    "status 404": Case(False, status=404),
    "encoded by the application": Case(False, sent={"content-encoding": "gzip"}),
    "encoded, as the open file tells": Case(False, described=GZIPPED),
    "encoded, HEAD": Case(False, method="HEAD", described=GZIPPED),
    "described, and not encoded": Case(True, described={"vary": "Accept-Encoding", "content-language": "de"}),
    "a coding that is hidden": Case(False, hides_coding=True),
    "deleted afterwards": Case(False, is_deleted=True),
    "forbidden": Case(False, is_forbidden=True),
    "a time that says nothing": Case(False, mtime=0),
    "a time that says nothing, HEAD": Case(False, mtime=0, method="HEAD"),
    "a time of npm": Case(False, mtime=499_162_500),
    "elsewhere": Case(True, elsewhere=True),
    "elsewhere, Range": Case(True, elsewhere=True, asked={"Range": "bytes=0-1"}),
    "elsewhere, HEAD": Case(False, elsewhere=True, method="HEAD"),
    "elsewhere, POST": Case(False, elsewhere=True, method="POST"),
    "elsewhere, status 403": Case(False, elsewhere=True, status=403),
    "elsewhere, If-Range with this version": Case(True, elsewhere=True, asked={"Range": "bytes=0-1", "If-Range": DATE}),
    "elsewhere, If-Range with another version": Case(
        False, elsewhere=True, asked={"Range": "bytes=0-1", "If-Range": '"another"'}
    ),
    "elsewhere, encoded": Case(False, elsewhere=True, described=GZIPPED),
    "elsewhere, a coding that is hidden": Case(False, elsewhere=True, hides_coding=True),
}


def backend_for(case: Case, root: Path) -> dv.OffloadBackend:
    return dv.XAccelRedirect([dv.Rule(ELSEWHERE if case.elsewhere else str(root), "/_files/")])


def starlette(case: Case, root: Path) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        background = BackgroundTask((root / "a.txt").unlink) if case.is_deleted else None
        return dv.DownloadResponse(
            case.file(root),
            status_code=case.status,
            headers=case.sent,
            background=background,
            offload=False if case.is_forbidden else None,
        )

    app = Starlette(routes=[Route("/file", endpoint, methods=["GET", "POST"])])
    return dv.OffloadMiddleware(app, backend_for(case, root))


def foreign(case: Case, root: Path) -> ASGIApp:
    """An application that sends the whole file by a path send, whatever the method."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = Path(case.file(root).location)
        headers = [(name.encode(), value.encode()) for name, value in case.sent.items()]
        headers.append((b"content-length", str(path.stat().st_size).encode()))
        await send({"type": "http.response.start", "status": case.status, "headers": headers})
        await send({"type": PATHSEND, "path": str(path)})
        if case.is_deleted:
            path.unlink()

    return dv.OffloadMiddleware(app, backend_for(case, root), pathsend=True)


def django_view(case: Case, root: Path) -> Callable[[HttpRequest], Any]:
    @csrf_exempt
    def view(request: HttpRequest) -> DownloadResponse:
        file = case.file(root)
        response = DownloadResponse(
            file, status=case.status, headers=case.sent, file_mimetype="text/plain", offload=not case.is_forbidden
        )
        if case.is_deleted:
            response._resource_closers.append((root / "a.txt").unlink)  # type: ignore[attr-defined]
        return response

    return view


def django(case: Case, root: Path) -> ASGIApp:
    return dv.OffloadMiddleware(get_asgi_application(), backend_for(case, root))


def django_by_settings(case: Case, root: Path) -> ASGIApp:
    return get_asgi_application()


class Urls:
    """A URLconf with one view."""

    def __init__(self, view: Callable[[HttpRequest], Any]) -> None:
        self.urlpatterns = [url_path("file", view)]


def settings_for(case: Case, root: Path, by_settings: bool) -> dict[str, Any]:
    urls = Urls(django_view(case, root))
    if not by_settings:
        return {"ROOT_URLCONF": urls, "MIDDLEWARE": []}
    source = {"source_url": f"{ELSEWHERE}/"} if case.elsewhere else {"source_dir": str(root)}
    rule = {**source, "destination_url": "/_files/"}
    return {"ROOT_URLCONF": urls, "MIDDLEWARE": [SMART], "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [rule]}}


FRAMEWORKS: dict[str, Callable[[Case, Path], ASGIApp]] = {
    "Starlette": starlette,
    "foreign": foreign,
    "Django": django,
    "Django, by its settings": django_by_settings,
}


ANSWERS = [
    (name, framework)
    for name, case in CASES.items()
    for framework in FRAMEWORKS
    if framework != "foreign" or not case.is_of_the_file
]


@pytest.mark.asyncio
@pytest.mark.parametrize("name, framework", ANSWERS)
async def test_all_frameworks_give_the_same_answer(root: Path, framework: str, name: str) -> None:
    case = CASES[name]
    with override_settings(**settings_for(case, root, by_settings=framework == "Django, by its settings")):
        app = FRAMEWORKS[framework](case, root)
        answer = await call(app, "/file", method=case.method, headers=case.asked)
    assert answer.status == case.status
    assert_as_expected(answer, case)


def assert_as_expected(answer: Recording, case: Case) -> None:
    headers = {name.decode().lower(): value.decode() for name, value in answer.headers.raw}
    assert bool(OFFLOAD_ORDERS & {*headers}) is case.is_offloaded
    for name, value in {**case.described, **case.sent}.items():
        assert headers[name] == value
    if case.is_offloaded or case.method == "HEAD":
        assert answer.body == b""
    else:
        body = answer.body
        is_coded = "content-encoding" in headers
        assert (gzip.decompress(body) if is_coded else body) == CONTENT


# --- files that a cache has


class Kept:
    """A remote file in a cache, for both frameworks."""

    def __init__(self, source: dv.CachedSource) -> None:
        self.source = source

    async def starlette(self, request: Request) -> Response:
        return dv.DownloadResponse(await self.source.resolve("a.bin"))

    async def django(self, request: HttpRequest) -> DownloadResponse:
        return DownloadResponse(await self.source.resolve("a.bin"))


@pytest_asyncio.fixture
async def origin() -> AsyncIterator[Origin]:
    origin = Origin()
    async with listening(origin.serve) as origin.port:
        yield origin


PROXIES: dict[str, Callable[[str], tuple[dv.OffloadBackend, dict[str, str]]]] = {
    "nginx": lambda at: (dv.XAccelRedirect([dv.Rule(at, "/_cache/")]), {"destination_url": "/_cache/"}),
    "apache": lambda at: (dv.XSendfile([dv.Rule(at, "/c")], encoding="raw"), {"destination_dir": "/c"}),
    "lighttpd": lambda at: (dv.XSendfile([dv.Rule(at, "/c")], encoding="percent"), {"destination_dir": "/c"}),
}


@asynccontextmanager
async def serving(cached: dv.CachedSource, framework: str, proxy: str = "nginx") -> AsyncIterator[int]:
    """Serve the one file of a cached source, with a proxy offered, and give the port."""
    kept, at = Kept(cached), cached.cache.path
    backend, target = PROXIES[proxy](at)
    settings: dict[str, Any] = {"ROOT_URLCONF": Urls(kept.django)}
    if framework == "Django, by its settings":
        rule = {"source_dir": at, **target}
        settings |= {"MIDDLEWARE": [SMART], "DOWNLOADVIEW": {"BACKEND": proxy, "RULES": [rule]}}
    app: Any = Starlette(routes=[Route("/file", kept.starlette)])
    async with aclosing(cached):
        with override_settings(**settings):
            if framework != "Starlette":
                app = get_asgi_application()
            if framework != "Django, by its settings":
                app = dv.OffloadMiddleware(app, backend)
            async with live(app) as port:
                yield port


async def complete(cached: dv.CachedSource) -> None:
    for fetch in list(cached.cache._running):
        await asyncio.wait([fetch.task])


cached_in_all = pytest.mark.parametrize("framework", ["Starlette", "Django", "Django, by its settings"])


@pytest.mark.asyncio
@pytest.mark.parametrize("max_age", [0, 60], ids=["revalidated", "fresh"])
@cached_in_all
async def test_a_cached_file_is_offloaded_as_soon_as_it_is_complete(
    origin: Origin, tmp_path: Path, framework: str, max_age: int
) -> None:
    cached = dv.CachedSource(remote(origin), dv.Cache(tmp_path / "cache", max_age=max_age))
    async with serving(cached, framework) as port:
        first = await ask(port, "/file")
        assert (first.status, first.complete, first.body) == (200, True, BIG)
        await complete(cached)
        for turn in (2, 3, 4):
            answer = await ask(port, "/file", headers={"Range": "bytes=0-1"})
            assert (answer.status, answer.body) == (200, b"")
            name = answer.headers["x-accel-redirect"].removeprefix("/_cache/")
            assert (tmp_path / "cache" / name).read_bytes() == BIG
            assert answer.headers["content-type"] == "text/x-log"
            assert answer.headers["age"].isdigit()
            assert len(origin.requests) == (1 if max_age else turn)
        head = await ask(port, "/file", method="HEAD")
        assert (head.status, "x-accel-redirect" in head.headers) == (200, max_age > 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("coding", ["gzip", None])
@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("max_age", [0, 60], ids=["revalidated", "fresh"])
@cached_in_all
async def test_what_a_cached_file_is_described_by_arrives(
    origin: Origin, tmp_path: Path, framework: str, max_age: int, proxy: str, coding: str | None
) -> None:
    """Only the upstream knows that the file is encoded: it tells when the file is open."""
    origin.content = gzip.compress(CONTENT)
    origin.headers += ["Vary: Accept-Encoding", "Content-Language: de"]
    origin.headers += [f"Content-Encoding: {coding}"] if coding else []
    cached = dv.CachedSource(remote(origin), dv.Cache(tmp_path / "cache", max_age=max_age))
    async with serving(cached, framework, proxy) as port:
        for turn in range(3):
            answer = await ask(port, "/file")
            is_offloaded = bool(OFFLOAD_ORDERS & {*answer.headers})
            assert (answer.status, answer.complete) == (200, True)
            assert is_offloaded is (turn > 0 and coding is None)
            assert answer.body == (b"" if is_offloaded else origin.content)
            fields = [answer.headers.get(name) for name in ("content-encoding", "vary", "content-language")]
            assert fields == [coding, "Accept-Encoding", "de"]
            await complete(cached)
        assert len(origin.requests) == (1 if max_age else 3)


@pytest.mark.asyncio
async def test_a_cached_file_is_offloaded_under_wsgi(origin: Origin, tmp_path: Path) -> None:
    cached = dv.CachedSource(remote(origin), dv.Cache(tmp_path / "cache", max_age=0))

    def view(request: HttpRequest) -> DownloadResponse:
        return DownloadResponse(async_to_sync(cached.resolve)("a.bin"))

    def get() -> tuple[int, str | None, bytes]:
        response: Any = Client().get("/file")
        body = response.getvalue()
        response.close()
        return response.status_code, response.get("X-Accel-Redirect"), body

    rules = [{"source_dir": cached.cache.path, "destination_url": "/_cache/"}]
    settings = {"MIDDLEWARE": [SMART], "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": rules}}
    async with aclosing(cached):
        with override_settings(ROOT_URLCONF=Urls(view), **settings):
            assert await asyncio.to_thread(get) == (200, None, BIG)
            while cached.cache._running:
                await asyncio.to_thread(get)
            for _ in range(2):
                status, order, body = await asyncio.to_thread(get)
                assert (status, body) == (200, b"")
                assert order is not None
                assert (tmp_path / "cache" / order.removeprefix("/_cache/")).read_bytes() == BIG
