"""`downloadview check --app`: applications of each framework pass behind a real proxy, and each mistake is named."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.httpsredirect import HTTPSRedirectMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.check.application import check_application, sample_of
from downloadview_async.check.http import Answer
from downloadview_async.check.proxies import APPLICATION_SERVERS, PASSING_ON, named_by
from downloadview_async.check.site import Line
from downloadview_async.service.app import build
from downloadview_async.service.check.run import check as check_service
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.logs import LONGEST
from downloadview_async.service.proxy_config import config_for
from tests.live import live, make_old
from tests.proxies.servers import KINDS, _system_program, proxy, readable_directory, running
from tests.s3 import S3
from tests.servers import PROJECT, free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

FASTAPI = """
from fastapi import FastAPI, Header, HTTPException
from downloadview_async import DownloadResponse, OffloadMiddleware, PathSource, Rule, XAccelRedirect

files = PathSource("invoices")
app = FastAPI()
app.add_middleware(OffloadMiddleware, backend=XAccelRedirect([Rule(files.root.path, "/_files/")]))


@app.api_route("/invoices/{number}", methods=["GET", "HEAD"])
async def invoice(number: int, x_user: str = Header("")):
    if x_user != "ada":
        raise HTTPException(403)
    return DownloadResponse(await files.resolve({1: "a.pdf", 2: "50% off é.pdf"}[number]), filename="invoice.pdf")
"""
STARLETTE = """
import contextlib
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse
from starlette.routing import Route
from downloadview_async import OffloadMiddleware, Rule, XAccelRedirect


@contextlib.asynccontextmanager
async def lifespan(app):
    yield {"names": {1: "a.pdf", 2: "50% off é.pdf"}}


async def invoice(request):
    if request.headers.get("x-user") != "ada":
        raise HTTPException(403)
    return FileResponse(f"{request.app.state.directory}/{request.state.names[request.path_params['number']]}")


def made(directory):
    backend = XAccelRedirect([Rule(directory, "/_files/")])
    middleware = [Middleware(OffloadMiddleware, backend=backend, pathsend=True)]
    app = Starlette(routes=[Route("/invoices/{number:int}", invoice)], middleware=middleware, lifespan=lifespan)
    app.state.directory = directory
    return app


import os
app = made(os.path.abspath("invoices"))
"""
LITESTAR = """
from litestar import Litestar, asgi
from litestar.types import Receive, Scope, Send
from downloadview_async import AccessDenied, DownloadResponse, OffloadMiddleware, PathSource, Rule, XAccelRedirect

files = PathSource("invoices")


@asgi("/invoices/1", copy_scope=True)
async def one(scope: Scope, receive: Receive, send: Send) -> None:
    await answer("a.pdf", scope, receive, send)


@asgi("/invoices/2", copy_scope=True)
async def two(scope: Scope, receive: Receive, send: Send) -> None:
    await answer("50% off é.pdf", scope, receive, send)


async def answer(name, scope, receive, send):
    if dict(scope["headers"]).get(b"x-user") != b"ada":
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body"})
        return
    await DownloadResponse(await files.resolve(name))(scope, receive, send)


app = OffloadMiddleware(Litestar([one, two]), backend=XAccelRedirect([Rule(files.root.path, "/_files/")]))
"""
DJANGO = """
import os
import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="x",
    USE_TZ=True,
    MIDDLEWARE=["downloadview_async.contrib.django.SmartDownloadMiddleware"],
    DOWNLOADVIEW={"BACKEND": "nginx", "RULES": [
        {"source_dir": os.path.abspath("invoices"), "destination_url": "/_files/"}
    ]},
)
django.setup()

from django.core.exceptions import PermissionDenied
from django.urls import path
from downloadview_async.contrib.django import PathDownloadView
from downloadview_async.contrib.django.asgi import get_asgi_application


class Invoice(PathDownloadView):
    def get_path(self):
        if self.request.headers.get("x-user") != "ada":
            raise PermissionDenied
        return os.path.abspath("invoices") + "/" + {1: "a.pdf", 2: "50% off é.pdf"}[self.kwargs["number"]]


urlpatterns = [path("invoices/<int:number>", Invoice.as_view())]
app = get_asgi_application()
"""
FRAMEWORKS = {"fastapi": FASTAPI, "starlette": STARLETTE, "litestar": LITESTAR, "django": DJANGO}


@pytest.fixture
def project() -> Any:
    with readable_directory() as directory:
        (directory / "invoices").mkdir()
        (directory / "invoices" / "a.pdf").write_bytes(b"%PDF-1.7 " * 30_000)
        (directory / "invoices" / "50% off é.pdf").write_bytes(b"%PDF-1.7")
        make_old(directory)
        yield directory


def nginx_for(directory: Path) -> Callable[[str, str], str]:
    rules = [dv.Rule(f"{directory}/invoices", "/_files/")]
    return lambda service, listen: dv.proxy_config("nginx", rules, service=service, listen=listen)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "downloadview_async.cli", "check", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_an_application_of_each_framework_passes_behind_nginx(framework: str, project: Path) -> None:
    (project / "main.py").write_text(FRAMEWORKS[framework])
    port = free_port()
    server = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    files = ["--file", "/invoices/1=invoices/a.pdf", "--file", "/invoices/2=invoices/50% off é.pdf"]
    with (
        running(server, port, directory=project, log=project / "log", environ=environment()),
        proxy(KINDS["nginx"], project, port, text=nginx_for(project)) as front,
    ):
        arguments = ["--app", "main:app", f"http://127.0.0.1:{front}", "--direct", f"http://127.0.0.1:{port}", *files]

        def checked(*more: str) -> tuple[int, dict[str, Any]]:
            done = subprocess.run(
                command(*arguments, *more, "--json"), cwd=project, env=environment(), capture_output=True, text=True
            )
            assert done.stdout, done.stderr
            return done.returncode, json.loads(done.stdout)

        status, report = checked("--header", "X-User: ada")
        others = [(check["result"], check["asked"]) for check in report["checks"] if check["result"] != "pass"]
        assert others == ([("skip", "HEAD /invoices/1")] if framework == "starlette" else [])
        assert status == 0
        orders = [check["came"] for check in report["checks"] if check["step"] == "application"]
        assert "x-accel-redirect: /_files/a.pdf" in orders[0]
        assert "x-accel-redirect: /_files/50%25%20off%20%C3%A9.pdf" in orders[2]

        status, report = checked()
        assert status == 1
        (first, *_) = [check for check in report["checks"] if check["result"] == "FAIL"]
        assert first["came"] == "403"
        assert "--header" in first["remedy"]


# --- mistakes


async def invoice(request: Request) -> Response:
    if request.headers.get("x-user") == "nobody":
        return PlainTextResponse("Forbidden", 403)
    source: dv.PathSource = request.app.state.files
    return dv.DownloadResponse(await source.resolve(request.path_params["name"]))


async def foreign(request: Request) -> Response:
    path = f"{request.app.state.files.root.path}/{request.path_params['name']}"
    return FileResponse(path) if os.path.isfile(path) else PlainTextResponse("Not Found", 404)


def application(directory: Path, *, rules: dict[str, str] | None = None, offloads: bool = True) -> FastAPI:
    app = FastAPI()
    app.state.files = dv.PathSource(directory / "invoices")
    app.router.routes += [Route("/invoices/{name}", invoice), Route("/foreign/{name}", foreign)]
    placed = {f"{directory}/invoices": "/_files/"} if rules is None else rules
    backend = dv.XAccelRedirect([dv.Rule(source, target) for source, target in placed.items()])
    if offloads:
        app.add_middleware(dv.OffloadMiddleware, backend=backend)
    app.add_exception_handler(dv.FileError, dv.download_error)
    return app


FILE = "/invoices/a.pdf=invoices/a.pdf"


@dataclass(frozen=True)
class Site:
    directory: Path

    async def check(
        self,
        app: ASGIApp,
        *files: str,
        edit: Callable[[str], str] = str,
        below: str = "",
        live_app: ASGIApp | None = None,
        **options: Any,
    ) -> list[Line]:
        given = [file.replace("=invoices/", f"={self.directory}/invoices/") for file in files or (FILE,)]
        text = nginx_for(self.directory)
        async with live(live_app or app) as port:
            with proxy(KINDS["nginx"], self.directory, port, text=text, edit=edit) as front:
                lines = check_application(app, given, url=f"http://127.0.0.1:{front}{below}", **options)
                return [line async for line in lines]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Site]:
    with readable_directory() as directory:
        (directory / "invoices").mkdir()
        (directory / "invoices" / "a.pdf").write_bytes(b"%PDF-1.7 " * 30_000)
        (directory / "invoices" / "b.pdf").write_bytes(b"%PDF-1.4 " * 30_000)
        make_old(directory)
        yield Site(directory)


def failures(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.result == "FAIL"]


async def test_an_application_without_a_running_server_is_checked_too(site: Site) -> None:
    lines = [
        line
        async for line in check_application(
            application(site.directory), [f"/invoices/a.pdf={site.directory}/invoices/a.pdf"]
        )
    ]
    assert [(line.result, line.step) for line in lines] == [
        ("pass", "source"),
        ("pass", "application"),
        ("skip", "proxy"),
    ]
    assert "x-accel-redirect: /_files/a.pdf" in lines[1].outcome


@dataclass(frozen=True)
class Wrong:
    name: str
    edits: tuple[tuple[str, str], ...]
    step: str
    advice: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("not internal", (("            internal;\n", ""),), "proxy", "`internal;` in `location /_files/`"),
        Wrong("root", (("            alias ", "            root "),), "together", "alias and not root"),
        Wrong("another location", (("location /_files/ {", "location /_f/ {"),), "together", "location /_files/ {"),
        Wrong(
            "ignored",
            (('proxy_set_header Forwarded "";', "proxy_ignore_headers X-Accel-Redirect;"),),
            "together",
            "proxy_ignore_headers",
        ),
        Wrong("compressed", (("gzip off;", "gzip on; gzip_types *; gzip_min_length 1;"),), "together", "gzip off"),
    ],
    ids=lambda wrong: wrong.name,
)
async def test_a_mistake_of_the_proxy_has_the_remedy_of_the_check_of_a_service(site: Site, wrong: Wrong) -> None:
    def edit(text: str) -> str:
        for old, new in wrong.edits:
            assert old in text
            text = text.replace(old, new)
        return text

    failed = failures(await site.check(application(site.directory), edit=edit))
    assert {line.step for line in failed} == {wrong.step}
    assert wrong.advice in failed[0].remedy


async def test_each_header_of_the_application_has_to_reach_the_client(site: Site) -> None:
    app = application(site.directory)

    @app.middleware("http")
    async def more(request: Request, call_next: Callable[[Request], Any]) -> Response:
        response: Response = await call_next(request)
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["X-Request-Id"] = os.urandom(4).hex()
        return response

    failed = failures(await site.check(app))
    assert [line.outcome.partition(" instead")[0] for line in failed] == ["X-Frame-Options: None", "X-Request-Id: None"]
    line = "`add_header X-Frame-Options $upstream_http_x_frame_options always;` in location /_files/"
    assert failed[0].remedy.startswith(line)

    def edit(text: str) -> str:
        restored = (
            "internal; add_header X-Frame-Options $upstream_http_x_frame_options always; "
            "add_header X-Request-Id $upstream_http_x_request_id always;"
        )
        return text.replace("internal;", restored)

    assert failures(await site.check(app, edit=edit)) == []


async def test_a_header_of_the_server_that_the_location_does_not_inherit(site: Site) -> None:
    """nginx drops the headers of the server from a location with an `add_header` of its own."""
    sent = 'add_header Strict-Transport-Security "max-age=60" always;'

    def in_the_server(text: str) -> str:
        return text.replace("        location / {", f"        {sent}\n        location / {{", 1)

    (failed,) = failures(await site.check(application(site.directory), edit=in_the_server))
    assert failed.outcome == "Strict-Transport-Security: None, but max-age=60 with a 404"
    assert failed.remedy.startswith(f"repeat `{sent}` of the server in location /_files/")

    def in_both(text: str) -> str:
        return in_the_server(text).replace("internal;", f"internal; {sent}")

    assert failures(await site.check(application(site.directory), edit=in_both)) == []


async def test_another_file_than_the_one_that_is_sent(site: Site) -> None:
    (line, *_) = failures(await site.check(application(site.directory), "/invoices/a.pdf=invoices/b.pdf"))
    assert (line.step, line.outcome) == ("together", "200, other bytes")
    app = application(site.directory, offloads=False)
    (line,) = failures(await site.check(app, "/invoices/a.pdf=invoices/b.pdf"))
    assert (line.step, line.outcome) == ("application", "200, other bytes than the file")


@pytest.mark.parametrize(
    "file, status, remedy",
    [
        ("/nowhere=invoices/a.pdf", "404", "has a route for"),
        ("/invoices/missing.pdf=invoices/a.pdf", "404", "the log says: GET '/invoices/missing.pdf': 404"),
    ],
)
async def test_what_the_application_refuses(site: Site, file: str, status: str, remedy: str) -> None:
    (line,) = failures(await site.check(application(site.directory), file))
    assert (line.step, line.outcome) == ("application", status)
    assert remedy in line.remedy


@pytest.mark.parametrize(
    "middleware, file, remedy",
    [
        ([Middleware(HTTPSRedirectMiddleware)], FILE, "the URL and the path that this redirect leads to"),
        ([], "/folder=invoices/a.pdf", "the URL and the path that this redirect leads to"),
        ([], "/login=invoices/a.pdf", "--header"),
    ],
    ids=["https", "slash", "login"],
)
async def test_a_redirect_of_the_application(site: Site, middleware: list[Middleware], file: str, remedy: str) -> None:
    async def login(request: Request) -> Response:
        return RedirectResponse("/signin", 302)

    routes = [Mount("/folder", routes=[Route("/", invoice)]), Route("/login", login)]
    app = Starlette(routes=routes, middleware=middleware)
    (line,) = failures(await site.check(app, file))
    assert line.step == "application"
    assert remedy in line.remedy


@pytest.mark.slow
async def test_a_redirect_to_a_store(site: Site, s3: S3) -> None:
    s3.put("check/a.pdf", (site.directory / "invoices" / "a.pdf").read_bytes(), content_type="application/pdf")
    storage = s3.storage("check")

    def redirecting(**options: str) -> Starlette:
        source = dv.StorageSource(storage)
        download = dv.Download(source, redirect=dv.PresignedRedirect(storage, **options))  # type: ignore[arg-type]
        return Starlette(routes=[Route("/invoices/{path:path}", download)])

    lines = await site.check(redirecting())
    assert failures(lines) == []
    assert "206, 1 bytes, Content-Disposition: attachment" in lines[-1].outcome
    assert "X-Amz-Signature" not in "".join(line.as_text() for line in lines)
    (line,) = failures(await site.check(redirecting(public_endpoint="http://127.0.0.1:1")))
    assert "public_endpoint" in line.remedy

    async def by_hand(request: Request) -> Response:
        file = await dv.StorageSource(storage).resolve("a.pdf")
        name = {"content-disposition": 'attachment; filename="invoice.pdf"'}
        signed = await dv.PresignedRedirect(storage).url_for(file, name)
        assert signed is not None
        return RedirectResponse(signed[0])

    lines = await site.check(Starlette(routes=[Route("/invoices/{path:path}", by_hand)]))
    assert failures(lines) == []
    assert 'Content-Disposition: attachment; filename="invoice.pdf"' in lines[-1].outcome
    await storage.aclose()


async def test_an_exception_of_the_application_is_named(site: Site) -> None:
    async def broken(request: Request) -> Response:
        raise ZeroDivisionError("one by nought")

    (line,) = failures(await site.check(Starlette(routes=[Route("/x", broken)]), "/x=invoices/a.pdf"))
    assert line.outcome == "500"
    assert "(the log says: ZeroDivisionError: one by nought)" in line.remedy


async def test_a_redirect_to_what_is_not_a_url(site: Site) -> None:
    async def lost(request: Request) -> Response:
        return Response(status_code=307, headers={"Location": "http://[::1/a.pdf"})

    (line,) = failures(await site.check(Starlette(routes=[Route("/x", lost)]), "/x=invoices/a.pdf"))
    assert line.outcome == "307 to http://[::1/a.pdf"


@pytest.mark.parametrize(
    ("status", "named"), [("200", "TypeError: the status is '200'"), (None, "SystemExit: 5")], ids=["text", "exit"]
)
async def test_an_application_that_breaks_the_protocol_is_named(site: Site, status: Any, named: str) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if status is None:
            sys.exit(5)
        await send({"type": "http.response.start", "status": status})

    (line,) = failures(await site.check(broken, "/x=invoices/a.pdf"))
    assert named in line.outcome


async def test_a_file_that_is_not_here(site: Site) -> None:
    (line,) = failures(await site.check(application(site.directory), "/invoices/a.pdf=/nowhere/a.pdf"))
    assert (line.step, line.request) == ("source", "read /nowhere/a.pdf")
    assert "PATH=FILE" in line.remedy


async def test_an_offloaded_file_needs_its_bytes(site: Site) -> None:
    (line,) = failures(await site.check(application(site.directory), "/invoices/a.pdf"))
    assert "--file /invoices/a.pdf=FILE" in line.remedy


@pytest.mark.parametrize(
    "files, options, reason",
    [
        ("/invoices/a.pdf", {"offloads": False}, "there is no OffloadMiddleware around it"),
        (FILE, {"rules": {"/srv/elsewhere": "/_files/"}}, "no rule covers the file"),
        ("/foreign/a.pdf=invoices/a.pdf", {}, "none with pathsend=True"),
    ],
    ids=["no middleware", "no rule", "a response of Starlette"],
)
async def test_why_the_application_sends_the_file_itself(
    site: Site, files: str, options: dict[str, Any], reason: str
) -> None:
    lines = await site.check(application(site.directory, **options), files)
    assert failures(lines) == []
    (said,) = [line.outcome for line in lines if line.step == "application"]
    assert said.startswith("200, streamed: ")
    assert reason in said


async def test_an_endpoint_that_does_not_answer_head_is_told_of(site: Site) -> None:
    app = application(site.directory)

    @app.get("/one/{name}")
    async def one(name: str, request: Request) -> Response:
        return await invoice(request)

    lines = await site.check(app, "/one/a.pdf=invoices/a.pdf")
    assert failures(lines) == []
    (skipped,) = [line for line in lines if line.result == "skip"]
    assert (skipped.request, skipped.outcome) == (
        "HEAD /one/a.pdf",
        "not checked: the application does not answer HEAD",
    )


async def test_a_running_application_that_is_another_one(site: Site) -> None:
    old = application(site.directory, offloads=False)
    async with live(old) as port:
        lines = await site.check(application(site.directory), live_app=old, direct=f"http://127.0.0.1:{port}")
    (first, *_) = failures(lines)
    assert (first.step, first.outcome) == ("application", "200")
    assert first.remedy.startswith("the running application is not the one in this process: it gives x-accel-redirect")


# --- root_path


def passing(prefix: str) -> Callable[[str], str]:
    """Let nginx pass only the paths below a prefix, unchanged."""

    def edit(text: str) -> str:
        assert "location / {" in text
        return text.replace("location / {", f"location {prefix}/ {{", 1)

    return edit


async def test_a_prefix_that_both_sides_know(site: Site) -> None:
    app = application(site.directory)
    files = [f"/invoices/a.pdf={site.directory}/invoices/a.pdf"]
    rules = [dv.Rule(f"{site.directory}/invoices", "/_files/")]

    def text(service: str, listen: str) -> str:
        return dv.proxy_config("nginx", rules, service=service, listen=listen, prefix="/api")

    async with live(app, root_path="/api") as port:
        with proxy(KINDS["nginx"], site.directory, port, text=text) as front:
            lines = [line async for line in check_application(app, files, url=f"http://127.0.0.1:{front}/api")]
            assert failures(lines) == []
            there = f"http://127.0.0.1:{front}"
            lines = [line async for line in check_application(app, files, url=there, root_path="/api")]
    (line,) = failures(lines)
    reached = f"clients reach /invoices/a.pdf at {there}/api/invoices/a.pdf"
    assert line.remedy == f"root_path mismatch: {reached}: give the URL {there}/api"


@pytest.mark.parametrize("root_path", ["", "/api"])
async def test_a_prefix_that_the_proxy_passes_on(site: Site, root_path: str) -> None:
    app = application(site.directory)
    (line,) = failures(await site.check(app, edit=passing("/api"), below="/api", root_path=root_path))
    assert line.outcome == "404"
    assert line.remedy.startswith("root_path mismatch: the application has got /api/invoices/a.pdf")
    assert "--root-path /api" in line.remedy


async def test_a_prefix_that_only_the_url_has(site: Site) -> None:
    (line,) = failures(await site.check(application(site.directory), below="/api"))
    assert line.remedy.startswith("root_path mismatch: clients reach /invoices/a.pdf at http://127.0.0.1:")
    assert not line.remedy.endswith("/api")


async def test_a_prefix_in_the_path_of_the_file(site: Site) -> None:
    app = application(site.directory)
    (line,) = failures(await site.check(app, f"/api{FILE}", root_path="/api"))
    assert line.step == "application"
    assert line.remedy == "root_path mismatch: the path of --file is the one below /api, which belongs to the URL"


async def test_a_mount_is_no_mismatch(site: Site) -> None:
    app = Starlette(routes=[Mount("/api", application(site.directory))])
    assert failures(await site.check(app, f"/api{FILE}", edit=passing("/api"))) == []


async def test_a_prefix_of_the_service_that_the_url_lacks(site: Site) -> None:
    file = site.directory / "downloads.toml"
    route = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'
    offload = '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'
    file.write_text(
        f'[server]\nroot_path = "/api"\n[sources.files]\ntype = "path"\nroot = "invoices"\n{route}{offload}'
    )
    settings = load_settings(file, environ={})

    def text(service: str, listen: str) -> str:
        return config_for(settings, "nginx", listen=listen, service=service, relative_to=None)

    async with live(build(settings), root_path="/api") as port:
        with proxy(KINDS["nginx"], site.directory, port, text=text) as front:
            url, direct = f"http://127.0.0.1:{front}", f"http://127.0.0.1:{port}"
            lines = [line async for line in check_service(settings, url=f"{url}/api", direct=direct)]
            assert failures(lines) == []
            lines = [line async for line in check_service(settings, url=url, direct=direct)]
    (line,) = [line for line in failures(lines) if line.step == "together"]
    assert line.remedy.startswith("root_path mismatch: clients reach /files/a.pdf at ")
    assert line.remedy.endswith(f"give the URL {url}/api")


# --- proxies that cannot send files


@pytest.mark.slow
async def test_haproxy_is_named(site: Site) -> None:
    haproxy = _system_program("haproxy", "HAProxy: haproxy is not installed; apt-get install haproxy")
    port, app = free_port(), application(site.directory)
    async with live(app) as service:
        config = site.directory / "haproxy.cfg"
        times = "".join(f"  timeout {kind} 10s\n" for kind in ("connect", "client", "server"))
        config.write_text(
            f"defaults\n  mode http\n{times}listen all\n  bind 127.0.0.1:{port}\n  server one 127.0.0.1:{service}\n"
        )
        with running([haproxy, "-f", str(config)], port, directory=site.directory, log=site.directory / "haproxy.log"):
            files = [f"/invoices/a.pdf={site.directory}/invoices/a.pdf"]
            lines = [line async for line in check_application(app, files, url=f"http://127.0.0.1:{port}")]
    (line,) = failures(lines)
    assert line.remedy.startswith("HAProxy cannot send files for an application")


async def test_the_url_of_the_application_itself(site: Site) -> None:
    app = application(site.directory)
    async with live(app) as service:
        files = [f"/invoices/a.pdf={site.directory}/invoices/a.pdf"]
        lines = [line async for line in check_application(app, files, url=f"http://127.0.0.1:{service}")]
    (line,) = failures(lines)
    assert line.remedy.startswith("give the URL of the proxy: at this one, uvicorn answers")


@pytest.mark.parametrize(
    "page, name",
    [
        ({"status": 404, "body": b"404 page not found\n"}, "Traefik"),
        ({"status": 200, "body": b"", "headers": [(b"server", b"envoy")]}, "Envoy"),
        ({"status": 200, "body": b"", "headers": [(b"cf-ray", b"8f-FRA"), (b"server", b"cloudflare")]}, "Cloudflare"),
    ],
    ids=["traefik", "envoy", "cloudflare"],
)
async def test_a_proxy_that_is_not_here_is_named_by_its_answers(site: Site, page: dict[str, Any], name: str) -> None:
    """A server that passes requests on to the application, and answers as that proxy does."""
    app = application(site.directory)

    async def passing_on(scope: Any, receive: Any, send: Any) -> None:
        host = dict(scope["headers"]).get(b"host", b"")
        if host.startswith(b"127.0.0.1"):

            async def send_named(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], *page.get("headers", [])]}
                await send(message)

            await app(scope, receive, send_named)
            return
        await send({"type": "http.response.start", "status": page["status"], "headers": []})
        await send({"type": "http.response.body", "body": page["body"]})

    async with live(passing_on, server_header=False) as port:
        files = [f"/invoices/a.pdf={site.directory}/invoices/a.pdf"]
        lines = [line async for line in check_application(app, files, url=f"http://127.0.0.1:{port}")]
    (line,) = failures(lines)
    assert line.remedy.startswith(f"{name} cannot send files for an application")


@pytest.mark.parametrize(
    "headers, names",
    [
        ({"Via": "1.1 varnish (Varnish/7.1)", "X-Varnish": "2"}, ["Varnish"]),
        ({"Via": "1.1 abc.cloudfront.net (CloudFront)", "X-Amz-Cf-Id": "x"}, ["Amazon CloudFront"]),
        ({"Server": "awselb/2.0"}, ["an AWS load balancer"]),
        ({"Via": "1.1 google"}, ["Google's load balancer"]),
        ({"Server": "istio-envoy"}, ["Envoy"]),
        ({"Server": "nginx/1.29"}, []),
        ({"Server": "uvicorn"}, []),
        ({}, []),
    ],
)
async def test_servers_by_their_headers(headers: dict[str, str], names: list[str]) -> None:
    answer = Answer(200, tuple((name.lower(), value) for name, value in headers.items()), b"")
    assert named_by(answer, PASSING_ON) == names


async def test_no_server_of_applications_is_a_proxy() -> None:
    for name in APPLICATION_SERVERS:
        assert named_by(Answer(200, (("server", f"{name}/1.0"),), b""), PASSING_ON) == []


# --- arguments

ASGI = "async def app(scope, receive, send): ..."


@pytest.mark.parametrize("file", ["invoices/1", "", "=a", "/a="])
async def test_a_wrong_file_is_refused(file: str) -> None:
    with pytest.raises(dv.ConfigurationError, match="PATH=FILE"):
        sample_of(file)


async def test_a_sample() -> None:
    assert sample_of("/a b/%3D=c=d").target == "/a%20b/%3D"
    assert sample_of("/a=c=d").path == os.path.abspath("c=d")
    assert sample_of("/a").path is None


async def test_a_long_line_is_cut() -> None:
    text = Line(result="FAIL", step="source", route="/\n", request="r" * 9_000, outcome="", remedy="a\x1b[2J").as_text()
    assert len(text) < 2 * LONGEST
    assert text.count("\n") == 1
    assert "\x1b" not in text


def refused(directory: Path, *arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=directory, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("", ["--app", "main:app", "--file", "/a=b"], 'Attribute "app" not found in module "main"'),
        ("import nowhere", ["--app", "main:app", "--file", "/a=b"], "No module named 'nowhere'"),
        ("1 / 0", ["--app", "main:app", "--file", "/a=b"], "ZeroDivisionError: division by zero"),
        ("", ["--app", "main", "--file", "/a=b"], "give MODULE:APP"),
        ("def app(environ, start_response): ...", ["--app", "main:app", "--file", "/a=b"], "whose call is a coroutine"),
        ("async def app(scope, receive, send): ...", ["--app", "main:app"], "there is no file to request"),
        (
            "async def app(scope, receive, send): ...",
            ["--app", "main:app", "x:y", "--file", "/a=b"],
            "not a server URL",
        ),
        (
            "async def app(scope, receive, send): ...",
            ["--app", "main:app", "http://[::1", "--file", "/a=b"],
            "not a server URL",
        ),
        (
            "async def app(scope, receive, send): ...",
            ["--app", "main:app", "--file", "/a=b", "--timeout", "nan"],
            "Invalid value for '--timeout': nan is not a finite number",
        ),
        ("", ["--app", "main:app", "--config", "x.toml"], "leave out --config"),
        (
            "import contextlib\nfrom starlette.applications import Starlette\n@contextlib.asynccontextmanager\n"
            "async def lifespan(app):\n    raise OSError('no database')\n    yield\napp = Starlette(lifespan=lifespan)",
            ["--app", "main:app", "--file", "/a=b"],
            "the application does not start: OSError: no database",
        ),
    ],
)
async def test_what_cannot_be_checked_is_one_line(
    tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "main.py").write_text(text)
    assert message in refused(tmp_path, *arguments)
