"""An application with every kind of answer, whose outcomes go to a file, a line of JSON each.

ACCOUNTS_ROOT: the directory of the files. ACCOUNTS_LOG: the file of the outcomes.
"""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import downloadview_async as dv

SIZES = {"small.bin": 17, "medium.bin": 60_000, "large.bin": 300_000, "huge.bin": 8 << 20}


class Lines:
    """A listener that writes the outcomes to a file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __call__(self, outcome: dv.Outcome) -> None:
        names = ("request_id", "method", "path", "status", "kind", "result", "reason", "sent", "name", "size")
        self._file.write(json.dumps({name: getattr(outcome, name) for name in names}) + "\n")
        self._file.flush()


async def generate() -> AsyncIterator[bytes]:
    """Yield 4 MiB."""
    for _ in range(64):
        yield b"g" * (1 << 16)


async def fail(request: Request) -> PlainTextResponse:
    raise ValueError("this endpoint fails")


def make_app() -> ASGIApp:
    """Return the application."""
    root = Path(os.environ["ACCOUNTS_ROOT"])
    source = dv.PathSource(root)
    memory = dv.MemoryStorage({"medium.bin": b"m" * SIZES["medium.bin"], "huge.bin": b"m" * SIZES["huge.bin"]})

    async def foreign(request: Request) -> FileResponse:
        return FileResponse(root / request.path_params["name"])

    async def generated(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.VirtualFile(generate, name="g.bin"))

    async def streamed(request: Request) -> StreamingResponse:
        return StreamingResponse(generate())

    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("plain text")

    backend = dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])
    download = dv.Download(source, listing=True, archive=dv.ArchiveOptions(per_client=None))
    app = Starlette(
        routes=[
            Mount("/proxied", dv.OffloadMiddleware(dv.Download(source), backend)),
            Route("/files/{path:path}", download),
            Route("/memory/{path:path}", dv.Download(dv.StorageSource(memory))),
            Route("/foreign/{name}", foreign),
            Mount("/sent", dv.OffloadMiddleware(Starlette(routes=[Route("/{name}", foreign)]), backend, pathsend=True)),
            Route("/generated", generated),
            Route("/streamed", streamed),
            Route("/plain", plain),
            Route("/fail", fail),
        ]
    )
    return dv.Accounts(app, [Lines(os.environ["ACCOUNTS_LOG"])], trusted_proxies=["*"])
