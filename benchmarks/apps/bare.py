"""Starlette by itself: its FileResponse, its Response from memory, and its Response with an offload header."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

INTERNAL = "/_files/"
"""nginx's internal location of the files."""

FILES = Path(os.environ["BENCH_FILES"])
_IN_MEMORY = {name: (FILES / name).read_bytes() for name in ("10k.bin", "1m.bin")}
_ROUTES = int(os.environ.get("BENCH_ROUTES", "1"))


async def _file(request: Request) -> Response:
    return FileResponse(FILES / request.path_params["path"])


async def _memory(request: Request) -> Response:
    return Response(_IN_MEMORY[request.path_params["path"]], media_type="application/octet-stream")


async def _offloaded(request: Request) -> Response:
    return Response(headers={"X-Accel-Redirect": INTERNAL + request.path_params["path"]})


def _app(endpoint: Callable[[Request], Awaitable[Response]]) -> Starlette:
    # the one that is asked for comes last
    others = [Route(f"/tenants/{number}/{{path:path}}", endpoint) for number in range(_ROUTES - 1)]
    return Starlette(routes=[*others, Route("/files/{path:path}", endpoint)])


file = _app(_file)
memory = _app(_memory)
offloaded = _app(_offloaded)
