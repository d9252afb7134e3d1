"""Applications that exist already: nothing in them knows of this library.

FOREIGN_ROOT: the directory of their files. FOREIGN_RULE: the directory that the proxy reaches, if there is one.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fastapi.responses import FileResponse as FastAPIFileResponse
from litestar import Litestar, asgi, get
from litestar.params import FromPath
from litestar.response import File
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv


async def _passed_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


async def _refused(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await call_next(request)
    return PlainTextResponse("Forbidden", 403)


async def _restated(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    response.status_code = 403
    return response


class Raw:
    """An application that speaks path send by itself, and says what its query string has: `key=value&...`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        path = said.get("path", str(self.root / "file.txt"))
        headers = [(name.encode(), value.encode()) for name, value in said.items() if name not in ("path", "status")]
        await send({"type": "http.response.start", "status": int(said.get("status", 200)), "headers": headers})
        await send({"type": "http.response.pathsend", "path": path})


def starlette_app(root: Path) -> ASGIApp:
    """Return an application of Starlette's own responses."""

    async def file(request: Request) -> Response:
        return FileResponse(root / request.path_params["path"], filename="mine.txt")

    async def teapot(request: Request) -> Response:
        return FileResponse(root / request.path_params["path"], status_code=418)

    async def encoded(request: Request) -> Response:
        return FileResponse(root / request.path_params["path"], headers={"Content-Encoding": "x-none"})

    async def ordering(request: Request) -> Response:
        orders = {"X-Accel-Redirect": "/_files/other.txt", "X-Sendfile": "/etc/passwd", "X-Accel-Buffering": "no"}
        return PlainTextResponse("mine", headers=orders)

    async def streamed(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"a"
            yield b"b"

        return StreamingResponse(parts(), headers={"X-Accel-Buffering": "no"})

    base = Middleware(BaseHTTPMiddleware, dispatch=_passed_on)
    files = Route("/{path:path}", file)
    return Starlette(
        routes=[
            Mount("/file", routes=[files]),
            Mount("/static", StaticFiles(directory=root, follow_symlink=True)),
            Mount("/gzip", routes=[files], middleware=[Middleware(GZipMiddleware)]),
            Mount("/basehttp", routes=[files], middleware=[base, base]),
            Mount("/all", routes=[files], middleware=[base, Middleware(GZipMiddleware)]),
            Mount("/refused", routes=[files], middleware=[Middleware(BaseHTTPMiddleware, dispatch=_refused)]),
            Mount("/restated", routes=[files], middleware=[Middleware(BaseHTTPMiddleware, dispatch=_restated)]),
            Mount("/nested/a/b", routes=[Mount("/c", routes=[files])]),
            Route("/teapot/{path:path}", teapot),
            Route("/encoded/{path:path}", encoded),
            Route("/ordering", ordering),
            Route("/streamed", streamed),
            Mount("/raw", Raw(root)),
            Route("/ours/{path:path}", dv.Download(dv.PathSource(root))),
            Mount(
                "/ours-restated",
                routes=[Route("/{path:path}", dv.Download(dv.PathSource(root)))],
                middleware=[Middleware(BaseHTTPMiddleware, dispatch=_restated)],
            ),
        ]
    )


def fastapi_app(root: Path) -> ASGIApp:
    """Return an application of FastAPI."""
    app = FastAPI()

    @app.get("/file/{path:path}", response_class=FastAPIFileResponse)
    async def file(path: str) -> FastAPIFileResponse:
        return FastAPIFileResponse(root / path, filename="mine.txt")

    app.mount("/static", StaticFiles(directory=root))
    return app


def litestar_app(root: Path) -> ASGIApp:
    """Return an application of Litestar: its own files, which are no path sends, and Starlette's."""

    @get("/own/{name:str}", sync_to_thread=False)
    def own(name: FromPath[str]) -> File:
        return File(root / name, filename="mine.txt")

    static = StaticFiles(directory=root)

    @asgi("/static", is_mount=True, copy_scope=True)
    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await static(scope, receive, send)

    app: Any = Litestar(route_handlers=[own, mounted], openapi_config=None, logging_config=None)
    return app  # type: ignore[no-any-return]


APPS = {"starlette": starlette_app, "fastapi": fastapi_app, "litestar": litestar_app}


class Spy:
    """Counts the path sends that reach the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.path_sends: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.pathsend":
                self.path_sends.append(message)
            await send(message)

        await self.app(scope, receive, watched)


def make_app() -> ASGIApp:
    """Return what the environment describes, for a server process."""
    root = Path(os.environ["FOREIGN_ROOT"])
    rule = dv.Rule(os.environ["FOREIGN_RULE"], "/_files/")
    return dv.OffloadMiddleware(starlette_app(root), dv.XAccelRedirect([rule]), pathsend=True)
