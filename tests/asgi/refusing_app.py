"""An application to which the kernel refuses system calls.

REFUSING_ROOT: the directory of its files. REFUSING_CALLS: `call=errno ...`. REFUSING_WHEN: "first", as a sandbox does,
or "later", when all sources have been made.
"""

import errno
import logging
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route
from starlette.types import ASGIApp

import downloadview_async as dv
from tests.refusing import refuse


def _refuse() -> None:
    for said in os.environ["REFUSING_CALLS"].split():
        call, _, name = said.partition("=")
        refuse(call, getattr(errno, name))


def make_app() -> ASGIApp:
    """Return what the environment describes, for a server process."""
    logging.basicConfig(level=logging.INFO)
    if os.environ["REFUSING_WHEN"] == "first":
        _refuse()
    root = os.environ["REFUSING_ROOT"]
    kinds: dict[str, dv.Source] = {
        "path": dv.PathSource(root),
        "deny": dv.PathSource(root, symlinks="deny"),
        "follow": dv.PathSource(root, symlinks="follow"),
        "storage": dv.StorageSource(dv.DirectoryStorage(root)),
    }

    async def trusted(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.LocalFile(os.path.join(root, request.path_params["name"])))

    async def foreign(request: Request) -> FileResponse:
        return FileResponse(os.path.join(root, request.path_params["name"]))

    app = Starlette(
        routes=[
            *(Route(f"/{kind}/{{path:path}}", dv.Download(source)) for kind, source in kinds.items()),
            Route("/trusted/{name}", trusted),
            Route("/foreign/{name}", foreign),
        ]
    )
    if os.environ["REFUSING_WHEN"] == "later":
        _refuse()
    return app
