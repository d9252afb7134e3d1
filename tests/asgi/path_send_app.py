"""An application whose files change, or whose messages wait, just as a path send leaves for the server.

PATH_SEND_ROOT: the directory of the files. PATH_SEND_KEEP: how long a path is good, in seconds.
"""

import asyncio
import functools
import os
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi import delivery
from downloadview_async.asgi.descriptor_paths import LastingPaths
from downloadview_async.asgi.extensions import PATHSEND
from tests.descriptors import open_paths

SIZE = (8 << 20) + 7


def meddle(action: str, file: Path) -> None:
    """Change the file that is on its way."""
    if action == "replace":
        other = file.with_suffix(".new")
        other.write_bytes(b"\0" * SIZE)
        other.replace(file)
    elif action == "delete":
        file.unlink()
    elif action == "grow":
        with file.open("ab") as stream:
            stream.write(b"\0" * SIZE)
    elif action == "shrink":
        os.truncate(file, SIZE // 2)


class Meddling:
    """Does what the query string says before it passes a path send on."""

    def __init__(self, app: ASGIApp, root: Path) -> None:
        self.app = app
        self.root = root
        self.path_sends = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def meddling(message: Message) -> None:
            if message["type"] == PATHSEND:
                self.path_sends += 1
                action = scope["query_string"].decode()
                if action == "wait":
                    await asyncio.sleep(3 * float(os.environ["PATH_SEND_KEEP"]))
                meddle(action, self.root / scope["path"].rpartition("/")[2])
            await send(message)

        await self.app(scope, receive, meddling)


async def passed_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


def make_app() -> ASGIApp:
    """Return the application that the environment describes."""
    root = Path(os.environ["PATH_SEND_ROOT"])
    quick: Any = functools.partial(LastingPaths, keep_seconds=float(os.environ["PATH_SEND_KEEP"]), max_kept=4)
    vars(delivery)["LastingPaths"] = quick  # for threads to come, and for this one
    delivery._of_thread.lasting_paths = quick()

    async def state(request: Request) -> JSONResponse:
        held = sum(path.startswith(f"{root}/") for path in open_paths())
        return JSONResponse({"path_sends": app.path_sends, "held": held})

    download = Route("/{path:path}", dv.Download(dv.PathSource(root)))
    base = Middleware(BaseHTTPMiddleware, dispatch=passed_on)
    routes = [
        Route("/state", state),
        Mount("/plain", routes=[download]),
        Mount("/gzip", routes=[download], middleware=[Middleware(GZipMiddleware)]),
        Mount("/basehttp", routes=[download], middleware=[base, base]),
        Mount("/all", routes=[download], middleware=[base, Middleware(GZipMiddleware)]),
    ]
    app = Meddling(Starlette(routes=routes), root)
    return app
