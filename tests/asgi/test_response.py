"""`DownloadResponse` and `OffloadMiddleware` in real applications: what an offload goes on, and what it never does."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message

import downloadview_async as dv
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.testing import assert_download_response, assert_x_accel_redirect, assert_x_sendfile, call
from tests.live import ask_raw, live, make_old

pytestmark = pytest.mark.asyncio
CONTENT = b"<p>" * 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "page.html").write_bytes(CONTENT)
    (tmp_path / "sub" / "a b%.txt").write_bytes(b"text")
    make_old(tmp_path)
    return tmp_path


@pytest.fixture
def source(root: Path) -> dv.PathSource:
    return dv.PathSource(root)


def nginx(root: Path, **options: Any) -> dv.XAccelRedirect:
    return dv.XAccelRedirect([dv.Rule(str(root), "/_files/")], **options)


async def passed_on(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    return response


def plain(app: ASGIApp, backend: dv.OffloadBackend) -> ASGIApp:
    return dv.OffloadMiddleware(app, backend)


def middlewares(*others: Middleware) -> Any:
    def wrapped(app: ASGIApp, backend: dv.OffloadBackend) -> ASGIApp:
        return Starlette(
            routes=[Mount("/", app)], middleware=[Middleware(dv.OffloadMiddleware, backend=backend), *others]
        )

    return wrapped


def outside(*others: Middleware) -> Any:
    def wrapped(app: ASGIApp, backend: dv.OffloadBackend) -> ASGIApp:
        return Starlette(
            routes=[Mount("/", app)], middleware=[*others, Middleware(dv.OffloadMiddleware, backend=backend)]
        )

    return wrapped


def mounted_in_fastapi(app: ASGIApp, backend: dv.OffloadBackend) -> ASGIApp:
    api = FastAPI()
    api.mount("/", dv.OffloadMiddleware(app, backend))
    return api


GZIP = Middleware(GZipMiddleware, minimum_size=1)
BASE = Middleware(BaseHTTPMiddleware, dispatch=passed_on)
CORS = Middleware(CORSMiddleware, allow_origins=["*"])
WRAPPINGS = {
    "plain": plain,
    "gzip": middlewares(GZIP),
    "basehttp": middlewares(BASE, BASE),
    "cors": middlewares(CORS),
    "all": middlewares(GZIP, BASE, CORS),
    "outside": outside(CORS, BASE, GZIP),
    "fastapi": mounted_in_fastapi,
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "headers", [{}, {"Range": "bytes=0-1"}, {"If-None-Match": "*"}, {"If-Match": '"x"'}, {"Range": "bytes=99999-"}]
)
async def test_an_offload_is_always_a_200_without_a_body(
    root: Path, source: dv.PathSource, wrap: Any, method: str, headers: dict[str, str]
) -> None:
    app = wrap(Mount("/d", app=dv.Download(source, attachment=False, cache_control="private")), nginx(root))
    answer = await call(app, "/d/page.html", method=method, headers={"Accept-Encoding": "gzip", **headers})
    assert answer.status == 200
    assert_x_accel_redirect(
        answer,
        redirect_url="/_files/page.html",
        filename="page.html",
        attachment=False,
        content_type="text/html; charset=utf-8",
    )
    assert answer.body == b""
    assert answer.headers["content-length"] == "0"
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert not {"accept-ranges", "content-range", "content-encoding", "transfer-encoding"} & set(answer.headers)


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
async def test_a_file_outside_every_rule_is_streamed(source: dv.PathSource, wrap: Any) -> None:
    app = wrap(Mount("/d", app=dv.Download(source)), nginx(Path("/elsewhere")))
    answer = await call(app, "/d/page.html")
    assert_download_response(answer, content=CONTENT, filename="page.html")
    assert not OFFLOAD_HEADERS & set(answer.headers)


async def test_the_options_of_nginx(root: Path, source: dv.PathSource) -> None:
    backend = nginx(root, buffering=False, charset="utf-8", expires=60, limit_rate=1024)
    answer = await call(dv.OffloadMiddleware(dv.Download(source), backend), "/sub/a b%.txt")
    assert_x_accel_redirect(
        answer,
        redirect_url="/_files/sub/a%20b%25.txt",
        filename="a b%.txt",
        buffering=False,
        charset="utf-8",
        expires=60,
        limit_rate=1024,
    )


async def test_x_sendfile(root: Path, source: dv.PathSource) -> None:
    backend = dv.XSendfile([dv.Rule(str(root), "/srv/files")], encoding="raw")
    answer = await call(dv.OffloadMiddleware(dv.Download(source), backend), "/sub/a b%.txt")
    assert_x_sendfile(answer, file_path="/srv/files/sub/a b%.txt")
    assert answer.headers["etag"] != '"0"'


async def test_the_innermost_middleware_wins(root: Path, source: dv.PathSource) -> None:
    inner = dv.OffloadMiddleware(dv.Download(source), dv.XAccelRedirect([dv.Rule(str(root), "/_inner/")]))
    answer = await call(dv.OffloadMiddleware(inner, nginx(root)), "/page.html")
    assert_x_accel_redirect(answer, redirect_url="/_inner/page.html")


@pytest.mark.parametrize("header", ["X-Sendfile-Type", "X-Accel-Mapping", "X-Sendfile", "X-Accel-Redirect"])
async def test_nothing_in_a_request_chooses_an_offload(source: dv.PathSource, header: str) -> None:
    answer = await call(
        dv.Download(source), "/page.html", headers={header: "X-Accel-Redirect", "X-Accel-Mapping": "/=/"}
    )
    assert_download_response(answer, content=CONTENT)
    assert not OFFLOAD_HEADERS & set(answer.headers)


async def test_what_replaces_our_response_carries_no_offload(root: Path, source: dv.PathSource) -> None:
    async def refuse(request: Request, call_next: Any) -> Response:
        await call_next(request)
        return PlainTextResponse("no", 403)

    async def crash(request: Request, call_next: Any) -> Response:
        await call_next(request)
        raise RuntimeError("crash")

    for dispatch, status in ((refuse, 403), (crash, 500)):
        app = middlewares(Middleware(BaseHTTPMiddleware, dispatch=dispatch))(
            Mount("/d", app=dv.Download(source)), nginx(root)
        )
        answer = await call(app, "/d/page.html", raise_errors=False)
        assert answer.status == status
        assert not OFFLOAD_HEADERS & set(answer.headers)


async def test_an_endpoint_decides_who_may_have_which_file(root: Path, source: dv.PathSource) -> None:
    async def endpoint(request: Request) -> Response:
        if request.headers.get("authorization") != "yes":
            raise HTTPException(403)
        response = dv.DownloadResponse(await source.resolve(request.path_params["path"]), filename="Päge.html")
        response.set_cookie("seen", "1")
        response.headers["X-Own"] = "1"
        return response

    app = dv.OffloadMiddleware(
        Starlette(
            routes=[Route("/{path:path}", endpoint)],
            exception_handlers={dv.FileError: dv.download_error},
        ),
        nginx(root),
    )
    refused = await call(app, "/page.html")
    assert refused.status == 403
    assert not OFFLOAD_HEADERS & set(refused.headers)
    granted = await call(app, "/page.html", headers={"Authorization": "yes"})
    assert_x_accel_redirect(granted, redirect_url="/_files/page.html", filename="Päge.html")
    assert granted.headers["x-own"] == "1"
    assert granted.headers["set-cookie"].startswith("seen=1")
    for name in ("../secret", "none", "sub"):
        missing = await call(app, f"/{name}", headers={"Authorization": "yes"})
        assert (missing.status, missing.body) == (404, b"Not Found")


async def test_a_link_out_of_the_root_is_not_offloaded_either(root: Path, source: dv.PathSource) -> None:
    (root / "out").symlink_to("/etc/passwd")
    answer = await call(dv.OffloadMiddleware(dv.Download(source), nginx(root)), "/out")
    assert answer.status == 404
    assert not OFFLOAD_HEADERS & set(answer.headers)


async def test_another_status_is_sent_whole_by_us(root: Path, source: dv.PathSource) -> None:
    response = dv.DownloadResponse(await source.resolve("page.html"), status_code=404)
    answer = await call(dv.OffloadMiddleware(response, nginx(root)), "/", headers={"Range": "bytes=0-1"})
    assert (answer.status, answer.body) == (404, CONTENT)
    assert not OFFLOAD_HEADERS & set(answer.headers)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_range_that_is_asked_for_again_is_answered_as_it_would_be_anew(
    root: Path, source: dv.PathSource, method: str
) -> None:
    """With a precondition that holds, which changes nothing of the answer, everything is planned anew."""
    texts = ["bytes=0-1", "bytes=-3", "bytes=7-", "bytes=0-", "bytes=99999-", "bytes=1-0", "x"]
    options: list[dict[str, Any]] = [{}, {"filename": "other"}, {"attachment": False}, {"headers": {"X-Own": "1"}}]
    for content in (CONTENT, b"changed", b""):
        (root / "page.html").write_bytes(content)
        make_old(root)  # else Last-Modified may begin to be told between the two
        for shown, text in itertools.product(options * 2, texts):
            app = dv.DownloadResponse(await source.resolve("page.html"), **shown)
            again = await call(app, "/page.html", method=method, headers={"Range": text})
            anew = await call(app, "/page.html", method=method, headers={"Range": text, "If-Match": "*"})
            assert (again.status, again.headers, again.body) == (anew.status, anew.headers, anew.body)


async def test_a_post_may_be_answered_with_a_file(root: Path, source: dv.PathSource) -> None:
    response = dv.DownloadResponse(await source.resolve("page.html"))
    answer = await call(
        dv.OffloadMiddleware(response, nginx(root)),
        "/",
        method="POST",
        headers={"Range": "bytes=0-1", "If-None-Match": "*"},
    )
    assert (answer.status, answer.body) == (200, CONTENT)


@pytest.mark.parametrize(
    "name", ["X-Accel-Redirect", "x-sendfile", "Content-Length", "Content-Range", "ETag", "Transfer-Encoding"]
)
async def test_headers_that_only_the_library_may_make_are_refused(source: dv.PathSource, name: str) -> None:
    with pytest.raises(ValueError, match=name.lower()):
        dv.DownloadResponse(await source.resolve("page.html"), headers={name: "x"})


@pytest.mark.parametrize(
    "options",
    [
        {"content_type": "text/html\r\nX: 1"},
        {"content_type": "text/π"},
        {"headers": {"X-Own": "a\r\nb"}},
        {"headers": {"X-\nOwn": "a"}},
        {"status_code": 204},
        {"status_code": 304},
        {"status_code": 103},
    ],
)
async def test_what_would_break_the_answer_is_refused(source: dv.PathSource, options: Any) -> None:
    with pytest.raises(ValueError, match=r"content type|control|no body"):
        dv.DownloadResponse(await source.resolve("page.html"), **options)


async def test_vary_of_the_application_joins_ours(root: Path) -> None:
    app = dv.Download(dv.PathSource(root, precompressed=["gzip"]), headers={"Vary": "Cookie"})
    assert (await call(app, "/page.html")).headers["vary"] == "Accept-Encoding, Cookie"


async def test_headers_that_are_set_later_cannot_break_the_framing(source: dv.PathSource) -> None:
    response = dv.DownloadResponse(await source.resolve("page.html"))
    response.headers["Content-Length"] = "1"
    response.headers["X-Accel-Redirect"] = "/secret"
    answer = await call(response)
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert "x-accel-redirect" not in answer.headers


async def test_a_304_keeps_the_headers_of_the_application_and_none_of_the_content(source: dv.PathSource) -> None:
    answer = await call(
        dv.Download(source, headers={"Cache-Control": "no-cache", "X-Own": "1"}),
        "/page.html",
        headers={"If-None-Match": "*"},
    )
    assert answer.status == 304
    assert (answer.headers["cache-control"], answer.headers["x-own"]) == ("no-cache", "1")
    assert "content-disposition" not in answer.headers


async def test_a_background_task_runs_after_the_download(source: dv.PathSource) -> None:
    done: list[int] = []
    response = dv.DownloadResponse(await source.resolve("page.html"), background=BackgroundTask(done.append, 1))
    assert (await call(response)).body == CONTENT
    assert done == [1]


async def test_the_key_of_a_route() -> None:
    asked: list[Any] = []

    async def make(key: Any) -> bytes:
        asked.append(key)
        return b"x"

    source = dv.VirtualSource(make)
    app = Starlette(
        routes=[
            Route("/one/{id:int}", dv.Download(source)),
            Route("/two/{tenant}/{name}", dv.Download(source, key="name")),
            Route("/request/{name}", dv.Download(source, key=lambda request: request.url.path)),
            Route("/bad/{tenant}/{name}", dv.Download(source)),
            Route("/typo/{name}", dv.Download(source, key="nmae")),
            Mount("/mount", dv.Download(source)),
            Mount("/of/{tenant}", dv.Download(source)),
            Mount("/user/{user}", routes=[Route("/files/{path:path}", dv.Download(source))]),
        ]
    )
    for path in ("/one/7", "/two/t/n", "/request/r", "/mount/a/b", "/of/bob/a/b", "/user/bob/files/c/d"):
        assert (await call(app, path)).status == 200
    assert asked == ["7", "n", "/request/r", "a/b", "a/b", "c/d"]
    for path in ("/bad/t/n", "/typo/n"):
        with pytest.raises(dv.ConfigurationError, match="key="):
            await call(app, path)


async def test_details_of_a_failure_are_in_the_log_alone_and_escaped(
    source: dv.PathSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "downloadview_async")
    answer = await call(dv.Download(source), "/evil\nINFO: forged")
    assert (answer.status, answer.body) == (404, b"Not Found")
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].getMessage()
    assert "forged" in caplog.records[0].getMessage()


async def test_download_error_answers_our_errors_only() -> None:
    with pytest.raises(dv.DownloadError):
        await dv.download_error(Request({"type": "http", "method": "GET", "path": "/", "headers": []}), KeyError("x"))


async def test_other_scopes_pass_the_middleware_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope = {"type": "lifespan"}
    await dv.OffloadMiddleware(app, nginx(Path("/x")))(scope, None, None)  # type: ignore[arg-type]
    assert seen == [scope]
    assert seen[0] is scope


async def test_what_a_middleware_raises_out_of_receive_comes_out_as_it_is(root: Path) -> None:
    """Starlette's limit of a body raises out of `receive`, and answers that itself."""
    download = dv.Download(dv.StorageSource(dv.SyncStorage(Slow(root))))
    app = Starlette(routes=[Route("/{name}", download, max_body_size=10)])
    async with live(app) as port:
        request = b"GET /page.html HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await ask_raw(port, request + b"14\r\n" + b"x" * 20 + b"\r\n0\r\n\r\n")
    assert answer.status == 413


class Slow:
    """A blocking storage that is asked in a worker thread, while the body of the request arrives."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, mode: str) -> Any:
        time.sleep(0.2)
        return (self.root / name).open(mode)


@pytest.mark.parametrize("kind", ["endpoint", "response"])
async def test_a_websocket_below_a_mount_is_refused(root: Path, source: dv.PathSource, kind: str) -> None:
    """A server answers the handshake with 403 then."""
    done: list[str] = []
    response = dv.DownloadResponse(await source.resolve("page.html"), background=BackgroundTask(done.append, "done"))
    mounted: ASGIApp = dv.Download(source) if kind == "endpoint" else response
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    app = dv.OffloadMiddleware(Starlette(routes=[Mount("/files", mounted)]), nginx(root))
    scope = {"type": "websocket", "path": "/files/page.html", "root_path": "", "headers": [], "subprotocols": []}
    await app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]
    assert done == (["done"] if kind == "response" else [])


@pytest.mark.parametrize("kind", ["endpoint", "response"])
async def test_a_scope_of_another_type_is_an_error(source: dv.PathSource, kind: str) -> None:
    """Servers take it as a sign that an application has no lifespan."""
    app: ASGIApp = dv.Download(source) if kind == "endpoint" else dv.DownloadResponse(await source.resolve("page.html"))

    async def unused(*args: Any) -> Any:
        raise AssertionError("nothing is received, and nothing is sent")

    for kind_of_scope in ("lifespan", "mqtt"):
        with pytest.raises(AssertionError, match="a download is an answer to an HTTP request"):
            await app({"type": kind_of_scope}, unused, unused)


async def _nothing(key: object) -> None:
    return None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"archive": "zip"}, "archive is 'zip': give True, False or ArchiveOptions"),
        ({"digests": True}, "digests is True: give Digests"),
        ({"hide": [5]}, "hide has 5: give patterns as text"),
    ],
)
async def test_options_of_a_wrong_type_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=message):
        dv.Download(dv.PathSource(root), **options)


@pytest.mark.parametrize("threads", [0, "4"])
async def test_a_number_of_threads_that_is_none_is_refused(root: Path, threads: Any) -> None:
    with pytest.raises(dv.ConfigurationError, match="give a number of calls, 1 or more"):
        dv.PathSource(root, threads=threads)


async def test_what_is_not_a_file_a_source_or_a_backend_is_refused_when_the_object_is_made(root: Path) -> None:
    source = dv.PathSource(root)
    takes_source = r"Download takes a source, such as PathSource\('files'\), not "
    values: list[Any] = ["files", None, Path("files"), dv.PathSource, source.file("page.html")]
    for value in values:
        with pytest.raises(dv.ConfigurationError, match=takes_source):
            dv.Download(value)
        if value is not None:
            with pytest.raises(dv.ConfigurationError, match="ObjectSource takes a source, such as PathSource"):
                dv.ObjectSource(_nothing, source=value)
        with pytest.raises(dv.ConfigurationError, match="CachedSource takes a source, such as PathSource"):
            dv.CachedSource(value, dv.Cache(root / "cache"))
    values = ["cache", None, dv.Cache]
    for value in values:
        with pytest.raises(dv.ConfigurationError, match="CachedSource takes a cache, such as Cache"):
            dv.CachedSource(source, value)
    values = ["file:///srv", None, Path("files"), dv.MemoryStorage, source]
    for value in values:
        with pytest.raises(dv.ConfigurationError, match="StorageSource takes a storage, such as DirectoryStorage"):
            dv.StorageSource(value)
    values = ["reports:make", None, source, lambda: b"", lambda name, version: b""]
    for value in values:
        with pytest.raises(dv.ConfigurationError, match="VirtualSource takes a function of one argument, the name"):
            dv.VirtualSource(value)
        with pytest.raises(dv.ConfigurationError, match="ObjectSource takes an asynchronous function of one argument"):
            dv.ObjectSource(value)
    values = ["files/a.txt", None, Path("files/a.txt"), b"text", source]
    for value in values:
        for filename in (None, "a.txt"):
            with pytest.raises(dv.ConfigurationError, match="DownloadResponse takes a file, such as await source"):
                dv.DownloadResponse(value, filename=filename)
    values = [Path("a.txt"), b"a.txt", 5]
    for value in values:
        with pytest.raises(dv.ConfigurationError, match="filename takes a str"):
            dv.DownloadResponse(source.file("page.html"), filename=value)
    headers: list[Any] = [{"x": 5}, {5: "x"}, {"x": b"x"}, {"x": "\u20ac"}, {"x": "a\r\nb"}, {"Content-Length": "5"}]
    for header in headers:
        with pytest.raises(ValueError, match="headers"):
            dv.DownloadResponse(source.file("page.html"), headers=header)
        with pytest.raises(ValueError, match="headers"):
            dv.Download(source, headers=header)
    with pytest.raises(ValueError, match="Latin-1: 'Cache-Control'"):
        dv.Download(source, cache_control="\u20ac")
    pending: Any = source.resolve("page.html")
    with pytest.raises(dv.ConfigurationError, match=r"await source.resolve\(...\) first"):
        dv.DownloadResponse(pending)
    pending.close()
    app = dv.Download(source)
    backends: list[Any] = ["nginx", None, [dv.Rule("/srv", "/_srv/")], dv.XAccelRedirect]
    for backend in backends:
        with pytest.raises(dv.ConfigurationError, match="OffloadMiddleware takes a backend, such as XAccelRedirect"):
            dv.OffloadMiddleware(app, backend)
