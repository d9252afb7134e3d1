"""An application with the roots that `SLOW_APP_ROOTS` names (JSON), for a server process that sees a slow disk."""

import json
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.service.shutdown import EndsInTime

ROOTS: dict[str, str] = json.loads(os.environ["SLOW_APP_ROOTS"])
THREADS = int(os.environ["SLOW_APP_THREADS"])


async def response(request: Request) -> FileResponse:
    """Answer with Starlette's own response."""
    return FileResponse(os.path.join(ROOTS[request.path_params["root"]], request.path_params["name"]))


routes = [Route(f"/{name}/{{name}}", dv.Download(dv.PathSource(root, threads=THREADS))) for name, root in ROOTS.items()]
app = EndsInTime(Starlette(routes=[*routes, Route("/response/{root}/{name}", response)]))
