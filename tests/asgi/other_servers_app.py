"""An application for servers of others, which tells how its answers ended, and how many bytes `sendfile` has sent.

SERVERS_ROOT: the directory of the files.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from tests.asgi.middlewares import Dropping, Keeping
from tests.descriptors import open_paths

_sent_by_kernel = 0
_sendfile = os.sendfile


def _counting(*arguments: Any) -> int:
    global _sent_by_kernel
    sent = _sendfile(*arguments)
    _sent_by_kernel += sent
    return sent


vars(os)["sendfile"] = _counting


async def _passed_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


class _Shrinking:
    """Cuts the file after the first message of its body, where nothing has been sent yet."""

    def __init__(self, app: ASGIApp, root: Path) -> None:
        self.app = app
        self.root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def shrinking(message: Message) -> None:
            await send(message)
            if message["type"] != "http.response.start":
                os.truncate(self.root / scope["path"].rpartition("/")[2], (4 << 20) + 7)

        await self.app(scope, receive, shrinking)


def make_app() -> ASGIApp:
    """Return the application that the environment describes."""
    root = Path(os.environ["SERVERS_ROOT"])
    outcomes: list[dict[str, Any]] = []

    def note(outcome: dv.Outcome) -> None:
        if outcome.path != "/state":
            fields = asdict(outcome)
            outcomes.append({name: fields[name] for name in ("path", "status", "kind", "result", "reason", "sent")})

    async def state(request: Request) -> JSONResponse:
        held = [path for path in open_paths() if path.startswith(f"{root}/")]
        return JSONResponse({"outcomes": outcomes, "kernel": _sent_by_kernel, "held": held})

    async def foreign(request: Request) -> FileResponse:
        return FileResponse(root / request.path_params["name"])

    download = Route("/{path:path}", dv.Download(dv.PathSource(root), archive=True))
    limited = Route("/{path:path}", dv.Download(dv.PathSource(root), limits=dv.Limits(rate="1GB/s")))
    backend = dv.XAccelRedirect([dv.Rule("/none", "/_none/")])
    routes = [
        Route("/state", state),
        Mount("/plain", routes=[download]),
        Mount("/limited", routes=[limited]),
        Mount("/gzip", routes=[download], middleware=[Middleware(GZipMiddleware)]),
        Mount("/basehttp", routes=[download], middleware=[Middleware(BaseHTTPMiddleware, dispatch=_passed_on)]),
        Mount("/dropping", routes=[download], middleware=[Middleware(Dropping)]),
        Mount("/keeping", routes=[download], middleware=[Middleware(Keeping)]),
        Mount("/shrinking", routes=[download], middleware=[Middleware(_Shrinking, root=root)]),
        Mount("/foreign", dv.OffloadMiddleware(Starlette(routes=[Route("/{name}", foreign)]), backend, pathsend=True)),
    ]
    return dv.Accounts(Starlette(routes=routes), observers=[note])
