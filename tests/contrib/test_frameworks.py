"""Endpoints of several frameworks that find and send a file: no handler is registered, and all refusals look alike."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import HTTPException as FastAPIHTTPException
from litestar import Litestar, asgi, get
from litestar.params import FromPath
from quart import Quart, Response, abort, session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.contrib import quart as for_quart
from downloadview_async.contrib.fastapi import DOWNLOAD_RESPONSES, download_route
from downloadview_async.testing import call
from tests.live import Answer, Watched, ask, live

pytestmark = pytest.mark.asyncio

CONTENT = b"0123456789"
PROTOCOLS = {"httptools": "httptools", "ours": DownloadProtocol}


class Documents:
    """A source that refuses some names before there is a file, as those of applications do."""

    def __init__(self, root: Path) -> None:
        self._files = dv.PathSource(root)

    async def resolve(self, name: str) -> dv.AsyncFile:
        if name == "denied":
            raise dv.AccessDenied("not for this client")
        if name == "broken":
            raise dv.UpstreamError("the server of the files gave 500 for /secret")
        if name == "limited":
            raise dv.LimitExceeded("3 files per day", wait=60)
        return await self._files.resolve(name)


def starlette(source: dv.Source) -> ASGIApp:
    async def one(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(request.path_params["name"]))

    return Starlette(routes=[Route("/one/{name}", one), Route("/all/{name}", dv.Download(source))])


def fastapi(source: dv.Source) -> ASGIApp:
    app = FastAPI()

    @download_route(app, "/one/{name}")
    async def one(name: str) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name))

    app.mount("/all", dv.Download(source))
    return app


def litestar(source: dv.Source) -> ASGIApp:
    @get("/one/{name:str}")
    async def one(name: FromPath[str]) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name))

    files: Any = dv.Download(source)
    every = asgi("/all", is_mount=True, copy_scope=True)(files)
    app: Any = Litestar([one, every], openapi_config=None, logging_config=None)
    return app  # type: ignore[no-any-return]


def quart(source: dv.Source) -> Any:
    app = Quart(__name__)
    for_quart.init_downloads(app)

    @app.get("/one/<name>")
    @app.get("/all/<name>")
    async def one(name: str) -> for_quart.DownloadResponse:
        return for_quart.DownloadResponse(await source.resolve(name))

    return app


FRAMEWORKS: dict[str, Callable[[dv.Source], Any]] = {
    "starlette": starlette,
    "fastapi": fastapi,
    "litestar": litestar,
    "quart": quart,
}
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture
def source(tmp_path: Path) -> Documents:
    root = tmp_path / "files"
    root.mkdir()
    (root / "a.txt").write_bytes(CONTENT)
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "outside").symlink_to(tmp_path / "secret")
    return Documents(root)


def shown(answer: Answer) -> tuple[int, bytes, dict[str, str]]:
    return answer.status, answer.body, {name: value for name, value in answer.headers.items() if name != "date"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@frameworks
async def test_every_file_that_a_client_may_not_have_gives_the_same_answer(
    framework: str, protocol: str, source: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing, invalid, forbidden by the application, outside of the root: by an endpoint and by `Download`."""
    caplog.set_level(logging.INFO, "downloadview_async")
    async with live(FRAMEWORKS[framework](source), http=PROTOCOLS[protocol]) as port:
        answers = [
            await ask(port, f"/{way}/{name}")
            for way in ("one", "all")
            for name in ("missing", "a%00b", "denied", "outside")
        ]
        elsewhere = await ask(port, "/no-such-route")
    assert {answer.status for answer in answers} == {404}
    assert [shown(answer) for answer in answers] == [shown(answers[0])] * len(answers)
    assert answers[0].body == elsewhere.body, "the application has one 404"
    assert answers[0].headers["content-type"] == elsewhere.headers["content-type"]
    assert answers[0].headers["cache-control"] == "private, no-store"
    assert not [record for record in caplog.records if record.exc_info]


@frameworks
async def test_other_refusals_have_their_status_and_headers(framework: str, source: Documents) -> None:
    async with live(FRAMEWORKS[framework](source)) as port:
        for way in ("one", "all"):
            limited = await ask(port, f"/{way}/limited")
            assert (limited.status, limited.headers["retry-after"]) == (429, "60")
            assert b"3 files per day" in limited.body
            broken = await ask(port, f"/{way}/broken")
            assert broken.status == 502
            assert b"secret" not in broken.body


@frameworks
async def test_files_are_sent_with_ranges_and_for_head(framework: str, source: Documents) -> None:
    async with live(FRAMEWORKS[framework](source)) as port:
        for way in ("one", "all"):
            whole = await ask(port, f"/{way}/a.txt")
            assert (whole.status, whole.body) == (200, CONTENT)
            part = await ask(port, f"/{way}/a.txt", headers={"Range": "bytes=2-4"})
            assert (part.status, part.body) == (206, CONTENT[2:5])
            head = await ask(port, f"/{way}/a.txt", method="HEAD")
            if (framework, way) != ("litestar", "one"):  # there, an endpoint answers HEAD only if it says so
                assert (head.status, head.headers["content-length"]) == (200, "10")
            same = await ask(port, f"/{way}/a.txt", headers={"If-None-Match": whole.headers["etag"]})
            assert same.status == 304


@frameworks
async def test_a_proxy_sends_the_files(framework: str, source: Documents, tmp_path: Path) -> None:
    backend = dv.XAccelRedirect([dv.Rule(str(tmp_path / "files"), "/_files/")])
    app = dv.OffloadMiddleware(FRAMEWORKS[framework](source), backend)
    for path in ("/one/a.txt", "/all/a.txt"):
        answer = await call(app, path)
        assert (answer.status, answer.body, answer.headers["x-accel-redirect"]) == (200, b"", "/_files/a.txt")
    assert "x-accel-redirect" not in (await call(app, "/one/missing")).headers


@frameworks
async def test_a_download_ends_when_its_client_leaves(framework: str, tmp_path: Path) -> None:
    root = tmp_path / "files"
    root.mkdir()
    with (root / "large").open("wb") as file:
        file.truncate(1 << 28)
    app = Watched(FRAMEWORKS[framework](dv.PathSource(root)))
    async with live(app) as port:
        await app.ends_when_the_client_leaves(port, "/one/large")


@pytest.mark.parametrize("kind", ["class", "status", "sync", "FileError"])
async def test_starlette_answers_by_the_handlers_of_the_application(kind: str, source: Documents) -> None:
    """The application's own page for errors is that of its downloads, too, with the headers of the error."""

    async def page(request: Request, exc: Exception) -> PlainTextResponse:
        assert isinstance(exc, HTTPException)
        return PlainTextResponse(f"page: {exc.detail}", exc.status_code, headers=exc.headers)

    def sync_page(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        return JSONResponse({"error": exc.detail}, exc.status_code, headers=exc.headers)

    handlers: dict[str, dict[Any, Any]] = {
        "class": {HTTPException: page},
        "status": {404: page},
        "sync": {404: sync_page},
        "FileError": {dv.FileError: page},
    }
    body = b'{"error":"Not Found"}' if kind == "sync" else b"page: Not Found"
    inner: Any = starlette(source)
    app = Starlette(routes=inner.routes, exception_handlers=handlers[kind])
    async with live(app) as port:
        for path in ("/one/missing", "/one/denied", "/all/missing", "/all/denied"):
            answer = await ask(port, path)
            assert (answer.status, answer.body) == (404, body), path
            assert answer.headers["cache-control"] == "private, no-store"


async def test_a_body_that_nobody_reads_closes_the_connection_after_an_error_of_fastapi(source: Documents) -> None:
    answer = await call(fastapi(source), "/all/missing", headers={"Content-Length": "99999999"})
    assert (answer.status, answer.headers["connection"]) == (404, "close")


async def test_download_error_answers_fastapi_in_plain_text_and_logs(
    source: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "downloadview_async")
    app: Any = fastapi(source)
    app.add_exception_handler(dv.FileError, dv.download_error)
    for path in ("/one/denied", "/all/denied", "/one/missing"):
        answer = await call(app, path)
        assert (answer.status, answer.body) == (404, b"Not Found")
    assert "not for this client" in caplog.text


@frameworks
async def test_the_outcome_of_an_error_of_the_application(framework: str, source: Documents) -> None:
    outcomes: list[dv.Outcome] = []
    app = dv.Accounts(FRAMEWORKS[framework](source), observers=[outcomes.append])
    paths = ["/one/missing", "/all/missing"]
    for path in paths:
        await call(app, path)
    assert [(outcome.status, outcome.kind, outcome.result) for outcome in outcomes] == [(404, "error", "refused")] * 2


@frameworks
async def test_the_outcome_of_one_answer(framework: str, tmp_path: Path) -> None:
    """A file that is found missing when it is opened, inside of the framework's own answer to that."""
    told: asyncio.Queue[dv.Outcome] = asyncio.Queue()

    class Told:
        async def resolve(self, name: str) -> dv.AsyncFile:
            return dv.LocalFile(tmp_path / "missing.txt")

    async def note(outcome: dv.Outcome) -> None:
        told.put_nowait(outcome)

    app: Any
    if framework == "quart":
        app = quart(Told())

        @app.get("/told")  # type: ignore[untyped-decorator]
        async def four() -> for_quart.DownloadResponse:
            return for_quart.DownloadResponse(await Told().resolve(""), on_outcome=note)

    elif framework == "litestar":

        @get("/told")
        async def two() -> dv.DownloadResponse:
            return dv.DownloadResponse(await Told().resolve(""), on_outcome=note)

        app = Litestar([two], openapi_config=None, logging_config=None)
    else:

        async def three(request: Request) -> dv.DownloadResponse:
            return dv.DownloadResponse(await Told().resolve(""), on_outcome=note)

        app = {"fastapi": FastAPI, "starlette": Starlette}[framework](routes=[Route("/told", three)])
    assert (await call(app, "/told")).status == 404
    outcome = await asyncio.wait_for(told.get(), 10)
    assert (outcome.status, outcome.kind, outcome.result, outcome.reason) == (404, "error", "refused", None)


# --- FastAPI ---


async def test_openapi_says_that_the_answer_is_a_file(source: Documents) -> None:
    app: Any = fastapi(source)
    (operation,) = app.openapi()["paths"]["/one/{name}"].values()
    for status in ("200", "206"):
        content = operation["responses"][status]["content"]
        assert content == {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    assert {"200", "206", "304", "404", "416"} <= operation["responses"].keys()
    assert "application/json" not in str([operation["responses"][status] for status in ("304", "404", "416")])


async def test_a_router_of_fastapi_with_a_prefix_and_options(source: Documents) -> None:
    def refuse() -> None:
        raise FastAPIHTTPException(401)

    router = APIRouter(prefix="/invoices", tags=["invoices"])

    @download_route(router, "/{name}", responses={200: {"description": "The invoice"}}, summary="An invoice")
    async def one(name: str) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name))

    @download_route(router, "/secret/{name}", dependencies=[Depends(refuse)])
    async def secret(name: str) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name))

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    paths = app.openapi()["paths"]
    assert list(paths["/v1/invoices/{name}"]) == ["get"]
    operation = paths["/v1/invoices/{name}"]["get"]
    assert (operation["summary"], operation["tags"]) == ("An invoice", ["invoices"])
    assert operation["responses"]["200"]["description"] == "The invoice"
    assert DOWNLOAD_RESPONSES[200]["description"] == "The file"
    async with live(app) as port:
        for method in ("GET", "HEAD"):
            assert (await ask(port, "/v1/invoices/a.txt", method=method)).status == 200
            assert (await ask(port, "/v1/invoices/secret/a.txt", method=method)).status == 401
        assert (await ask(port, "/v1/invoices/a.txt", method="POST")).status == 405


async def test_responses_may_be_none_as_they_are_by_default() -> None:
    app = FastAPI()

    @download_route(app, "/one", responses=None)
    async def one() -> None: ...

    assert {"200", "206", "404"} <= {*app.openapi()["paths"]["/one"]["get"]["responses"]}


@pytest.mark.parametrize("given", ["app", None, FastAPI, Starlette()])
async def test_download_route_says_what_it_takes(given: Any) -> None:
    with pytest.raises(TypeError, match="download_route takes a FastAPI application or an APIRouter"):
        download_route(given, "/")


@pytest.mark.parametrize("scope", ["function", "request"])
async def test_a_session_of_a_dependency_is_released_before_the_download_with_the_scope_function(
    scope: Any, source: Documents
) -> None:
    """What docs/howto/fastapi.md says of sessions: by default, FastAPI closes them after the download."""
    events: list[str] = []

    def session_of_request() -> Iterator[str]:
        try:
            yield "session"
        finally:
            events.append("session closed")

    app = FastAPI()

    @app.get("/{name}")
    async def one(name: str, session: Annotated[str, Depends(session_of_request, scope=scope)]) -> dv.DownloadResponse:
        file = await source.resolve(name)
        return dv.DownloadResponse(file, background=BackgroundTask(events.append, "file sent"))

    async with live(app) as port:
        assert (await ask(port, "/a.txt")).body == CONTENT
    expected = ["session closed", "file sent"]
    assert events == (expected if scope == "function" else expected[::-1])


# --- Quart ---


async def test_quart_sends_the_cookies_and_headers_of_the_application(source: Documents) -> None:
    app: Any = quart(source)
    app.secret_key = "secret"

    @app.before_request  # type: ignore[untyped-decorator]
    async def log_in() -> None:
        session["user"] = "ada"

    @app.after_request  # type: ignore[untyped-decorator]
    async def mark(response: Response) -> Response:
        response.headers["X-Robots-Tag"] = "noindex"
        return response

    answer = await call(app, "/one/a.txt")
    assert answer.body == CONTENT
    assert answer.headers["x-robots-tag"] == "noindex"
    assert answer.headers["set-cookie"].startswith("session=")
    assert answer.headers.getlist("content-type") == ["text/plain; charset=utf-8"]


async def test_quart_answers_by_the_handlers_of_the_application(source: Documents) -> None:
    app: Any = quart(source)

    @app.errorhandler(404)  # type: ignore[untyped-decorator]
    async def page(error: Exception) -> tuple[str, int]:
        return "my page", 404

    @app.get("/aborts")  # type: ignore[untyped-decorator]
    async def aborts() -> None:
        abort(404)

    bodies = {(await call(app, path)).body for path in ("/one/missing", "/one/denied", "/aborts", "/none")}
    assert bodies == {b"my page"}


@pytest.mark.parametrize("status", [402, 508])
async def test_quart_answers_with_a_status_for_which_it_has_no_exception(status: int) -> None:
    class OwnError(dv.FileError):
        pass

    class Owing:
        async def resolve(self, name: str) -> dv.AsyncFile:
            raise OwnError("the account of Ada owes 7 euros")

    OwnError.status = HTTPStatus(status)
    answer = await call(quart(Owing()), "/one/a.txt")
    assert answer.status == status
    assert b"Ada" not in answer.body


async def test_quart_without_init_downloads_is_told_so(source: Documents) -> None:
    app = Quart(__name__)

    @app.get("/")
    async def one() -> Response:
        return for_quart.DownloadResponse(await source.resolve("a.txt"))

    with pytest.raises(dv.ConfigurationError, match="call init_downloads"):
        await call(app, "/")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Quart application"):
        for_quart.init_downloads("app")  # type: ignore[arg-type]
