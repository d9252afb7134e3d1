"""An application with every kind of answer, whose outcomes go to a file, a line of JSON each.

ACCOUNTS_ROOT: the directory of the files. ACCOUNTS_LOG: the file of the outcomes. ACCOUNTS_GATE: a FIFO, at which
`/gate/` blocks the event loop until something is written to it. ACCOUNTS_PORT: where this is served, for the remote
files. ACCOUNTS_S3: the options of a bucket as JSON, if there is one. ACCOUNTS_LATER: if it is there, files are sent
when the application has returned.
"""

import json
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol, SendLater

SIZES = {"small.bin": 17, "medium.bin": 60_000, "large.bin": 300_000, "huge.bin": 8 << 20}
ONE = 8 << 20
"""Bytes that an answer has in one message."""

TINY = 60_000
"""Messages of one byte that an answer has."""

impatient = partial(DownloadProtocol, stall_seconds=1.0)
"""Our protocol, which resets stalled clients after a second."""


class Lines:
    """A listener that writes the outcomes to a file. They have the number that the client has given to the request."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __call__(self, outcome: dv.Outcome) -> None:
        if (number := outcome.header("x-number")) is not None:
            names = ("method", "path", "status", "kind", "result", "reason", "sent", "unacknowledged", "name", "size")
            fields = {name: getattr(outcome, name) for name in names}
            self._file.write(json.dumps({"number": number, "repr": repr(outcome), **fields}) + "\n")
            self._file.flush()


async def generate() -> AsyncIterator[bytes]:
    """Yield 4 MiB."""
    for _ in range(64):
        yield b"g" * (1 << 16)


async def generate_less() -> AsyncIterator[bytes]:
    """Yield some bytes, and fail."""
    for _ in range(5):
        yield b"g" * (1 << 16)
    raise ValueError("this generator fails")


async def fail(request: Request) -> PlainTextResponse:
    raise ValueError("this endpoint fails")


def make_app() -> ASGIApp:
    """Return the application."""
    root = Path(os.environ["ACCOUNTS_ROOT"])
    source = dv.PathSource(root)
    memory = dv.MemoryStorage({"medium.bin": b"m" * SIZES["medium.bin"], "huge.bin": b"m" * SIZES["huge.bin"]})
    remote = dv.RemoteSource(f"http://127.0.0.1:{os.environ.get('ACCOUNTS_PORT')}/up/", allow_hosts=["127.0.0.1"])

    async def get(key: str) -> SimpleNamespace:
        return SimpleNamespace(file=f"{key}.bin")

    async def foreign(request: Request) -> FileResponse:
        return FileResponse(root / request.path_params["name"])

    async def generated(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.VirtualFile(generate, name="g.bin"))

    async def broken(request: Request) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.VirtualFile(generate_less, name="g.bin", size=4 << 20))

    async def streamed(request: Request) -> StreamingResponse:
        return StreamingResponse(generate())

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["query_string"] == b"tiny":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % TINY)]})
            for left in reversed(range(TINY)):
                await send({"type": "http.response.body", "body": b"t", "more_body": left > 0})
            return
        before, _, behind = scope["query_string"].decode().partition(",")
        count = int(before) + int(behind) if behind else 64
        headers = [(b"content-length", b"%d" % (count << 16))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(int(before)):
            await send({"type": "http.response.body", "body": b"g" * (1 << 16), "more_body": True})
        Path(os.environ["ACCOUNTS_GATE"]).read_bytes()
        for left in reversed(range(int(behind or "0"))):
            await send({"type": "http.response.body", "body": b"g" * (1 << 16), "more_body": left > 0})
        if not behind:
            await send({"type": "http.response.body", "body": b"g" * 1000, "more_body": True})

    async def one(request: Request) -> PlainTextResponse:
        return PlainTextResponse("1" * ONE)

    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("plain text")

    backend = dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])
    download = dv.Download(source, listing=True, archive=dv.ArchiveOptions(per_client=None))
    routes: list[Route | Mount] = [
        Mount("/proxied", dv.OffloadMiddleware(dv.Download(source), backend)),
        Route("/files/{path:path}", download),
        Route("/memory/{path:path}", dv.Download(dv.StorageSource(memory))),
        Route("/object/{path:path}", dv.Download(dv.ObjectSource(get, source=source))),
        Route("/remote/{path:path}", dv.Download(remote)),
        Route("/foreign/{name}", foreign),
        Mount("/sent", dv.OffloadMiddleware(Starlette(routes=[Route("/{name}", foreign)]), backend, pathsend=True)),
        Route("/generated", generated),
        Route("/broken", broken),
        Route("/streamed", streamed),
        Route("/one", one),
        Route("/plain", plain),
        Route("/fail", fail),
        Mount("/gate", gate),
        Mount("/up", StaticFiles(directory=root)),
    ]
    if "ACCOUNTS_S3" in os.environ:
        options = json.loads(os.environ["ACCOUNTS_S3"])
        storage = dv.ObjectStorage(options.pop("url"), **options)
        routes.append(Route("/s3/{path:path}", dv.Download(dv.StorageSource(storage))))
        redirecting = dv.Download(dv.StorageSource(storage), redirect=dv.PresignedRedirect(storage))
        routes.append(Route("/redirected/{path:path}", redirecting))
    accounts = dv.Accounts(Starlette(routes=routes), [Lines(os.environ["ACCOUNTS_LOG"])])

    async def sending_later(scope: Scope, receive: Receive, send: Send) -> None:
        with SendLater(scope) as later:
            await accounts(scope, receive, send)
            if later.is_used:
                await later.send()

    return sending_later if "ACCOUNTS_LATER" in os.environ else accounts
