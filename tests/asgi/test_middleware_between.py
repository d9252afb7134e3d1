"""Middleware of others between a download and its server: one that drops messages, and one that raises."""

import asyncio
import io
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import brotli
import pytest
from brotli_asgi import BrotliMiddleware
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi import loan
from downloadview_async.asgi.extensions import PATHSEND
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.testing import call
from tests.asgi.middlewares import Dropping, Keeping
from tests.descriptors import open_paths
from tests.live import Answer, Watched, ask, ask_raw, live

LOOPS = ["asyncio", "uvloop"]
CONTENT = os.urandom(1 << 20) + b"the end"
pytestmark = pytest.mark.asyncio


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "big.bin").write_bytes(CONTENT)
    (tmp_path / "small.bin").write_bytes(CONTENT[:1000])
    return tmp_path


class Delaying:
    """Passes on a path send when the application has long gone on."""

    def __init__(self, app: ASGIApp, path_send: float = 0.05) -> None:
        self.app = app
        self.path_send = path_send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        async def pass_on() -> None:
            while (message := await messages.get()) is not None:
                # what is waited for between two messages is its own business
                await asyncio.sleep(self.path_send if message["type"] == PATHSEND else 0.05)
                await send(message)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pass_on())
            await self.app(scope, receive, messages.put)
            await messages.put(None)


async def _passed_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


async def _refused(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await call_next(request)
    return Response("Forbidden", 403)


def application(root: Path, *stack: Any, source: dv.Source | None = None) -> ASGIApp:
    """Return a download inside these middlewares; the first one is the outermost."""
    download = dv.Download(source or dv.PathSource(root))
    return Starlette(routes=[Route("/{path:path}", download)], middleware=list(stack))


BASE = Middleware(BaseHTTPMiddleware, dispatch=_passed_on)
STACKS: dict[str, list[Any]] = {
    "dropping": [Middleware(Dropping)],
    "brotli": [Middleware(BrotliMiddleware, minimum_size=400)],
    "brotli in gzip": [Middleware(GZipMiddleware), Middleware(BrotliMiddleware)],
    "gzip in brotli": [Middleware(BrotliMiddleware), Middleware(GZipMiddleware)],
    "dropping in base": [BASE, BASE, Middleware(Dropping)],
    "brotli in base": [BASE, Middleware(BrotliMiddleware)],
    "delaying": [Middleware(Delaying)],
    "keeping": [Middleware(Keeping)],
    "keeping what is delayed": [Middleware(Keeping), Middleware(Delaying)],
    "delaying for longer than the download waits": [Middleware(Delaying, path_send=0.4)],
    "delaying what is kept": [Middleware(Delaying, path_send=0.4), Middleware(Keeping)],
    "base": [BASE, BASE, BASE],
}


def decoded(answer: Answer) -> bytes:
    assert answer.complete
    return brotli.decompress(answer.body) if answer.headers.get("content-encoding") == "br" else answer.body


@pytest.mark.parametrize("kind", ["path", "trusted"])
@pytest.mark.parametrize("name", list(STACKS))
async def test_a_path_send_that_is_dropped_is_sent_in_chunks(
    root: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "_PATIENCE" in vars(loan)
    monkeypatch.setattr(loan, "_PATIENCE", 0.2)
    app = application(root, *STACKS[name], source=_Trusted(root) if kind == "trusted" else None)
    headers = {"Accept-Encoding": "br"}
    async with live(app, http=DownloadProtocol) as port:
        async with asyncio.timeout(60):
            whole = await ask(port, "/big.bin", headers=headers)
            assert (whole.status, decoded(whole) == CONTENT) == (200, True)
            part = await ask(port, "/big.bin", headers={**headers, "Range": "bytes=7-900000"})
            assert (part.status, decoded(part) == CONTENT[7:900_001]) == (206, True)
            head = await ask(port, "/big.bin", headers=headers, method="HEAD")
            assert (head.status, head.body) == (200, b"")
            small = await ask(port, "/small.bin", headers=headers)
            assert decoded(small) == CONTENT[:1000]
    assert str(root / "big.bin") not in open_paths() or kind == "path"  # which keeps it for a second


@pytest.mark.parametrize("name", list(STACKS))
async def test_an_archive_is_the_same_whatever_is_between(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loan, "_PATIENCE", 0.2)
    archives = dv.Download(dv.PathSource(root), archive=True)
    app = Starlette(routes=[Route("/{path:path}", archives)], middleware=STACKS[name])
    headers = {"Accept-Encoding": "br"}
    async with live(app, http=DownloadProtocol) as port:
        async with asyncio.timeout(60):
            first = decoded(await ask(port, "/?archive=zip", headers=headers))  # it computes the CRC-32s
            with zipfile.ZipFile(io.BytesIO(first)) as archive:
                assert {name: archive.read(name) for name in archive.namelist()} == {
                    "big.bin": CONTENT,
                    "small.bin": CONTENT[:1000],
                }
            again = await ask(port, "/?archive=zip", headers=headers)
            assert (again.status, decoded(again) == first) == (200, True)
            part = await ask(port, "/?archive=zip", headers={**headers, "Range": "bytes=7-900000"})
            assert (part.status, decoded(part) == first[7:900_001]) == (206, True)
    assert not [path for path in open_paths() if path.startswith(f"{root}/")]


class _Trusted:
    def __init__(self, root: Path) -> None:
        self.root = root

    async def resolve(self, name: str) -> dv.AsyncFile:
        return dv.LocalFile(self.root / name)


async def test_a_response_that_is_replaced_after_its_path_send(root: Path) -> None:
    app = application(root, Middleware(BaseHTTPMiddleware, dispatch=_refused))
    async with live(app, http=DownloadProtocol) as port:
        answer = await asyncio.wait_for(ask(port, "/big.bin"), 60)
    assert (answer.status, answer.body) == (403, b"Forbidden")


async def test_a_client_that_leaves_while_a_dropped_file_is_sent(root: Path) -> None:
    (root / "huge.bin").touch()
    os.truncate(root / "huge.bin", 1 << 32)
    watched = Watched(application(root, Middleware(Dropping)))
    async with live(watched, http=DownloadProtocol) as port:
        await watched.ends_when_the_client_leaves(port, "/huge.bin")


async def test_a_middleware_that_repeats_the_body_for_ever(root: Path) -> None:
    download = dv.Download(dv.PathSource(root))

    async def repeating(scope: Scope, receive: Receive, send: Send) -> None:
        count = 0

        async def repeat() -> Message:
            nonlocal count
            count += 1
            assert count < 100  # without a wait, nothing else would run any more
            return {"type": "http.request", "body": b""}

        if scope["type"] == "http":
            await download(scope, repeat, send)

    async with live(repeating, http="h11") as port:
        answer = await asyncio.wait_for(ask(port, "/big.bin"), 60)
    assert (answer.status, answer.complete, answer.body == CONTENT) == (200, True, True)


# --- exceptions of middleware


class TooLarge(Exception):
    pass


class Limiting:
    """Limits the body of a request, and answers for it: what Starlette's RequestBodyLimitMiddleware does."""

    def __init__(self, app: ASGIApp, status: int | None = 413) -> None:
        self.app = app
        self.status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def limited() -> Message:
            message = await receive()
            if message["type"] == "http.request" and len(message.get("body", b"")) > 3:
                raise TooLarge
            return message

        try:
            await self.app(scope, limited, send)
        except TooLarge:
            if self.status is None:
                raise
            await Response("Content Too Large", self.status)(scope, receive, send)


async def _slow(name: str) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()  # for ever: what ends it is the body that is too large
    yield b""


REQUEST = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\nabcde"


@pytest.mark.parametrize("http", ["h11", "httptools", DownloadProtocol], ids=["h11", "httptools", "ours"])
@pytest.mark.parametrize("inside", [[], [BASE], [Middleware(GZipMiddleware)]], ids=["", "base", "gzip"])
async def test_what_a_middleware_raises_out_of_receive_reaches_it(root: Path, http: Any, inside: list[Any]) -> None:
    stack = [Middleware(Limiting), *inside]
    async with live(application(root, *stack, source=dv.VirtualSource(_slow)), http=http) as port:
        answer = await asyncio.wait_for(ask_raw(port, REQUEST), 60)
    assert (answer.status, answer.body) == (413, b"Content Too Large")


async def test_starlettes_own_limit_of_a_body() -> None:
    middleware = pytest.importorskip("starlette.middleware.body_limit", reason="this Starlette has no limit")
    app = Starlette(
        routes=[Route("/{path:path}", dv.Download(dv.VirtualSource(_slow)))],
        middleware=[Middleware(middleware.RequestBodyLimitMiddleware, max_body_size=3)],
    )
    async with live(app) as port:
        answer = await asyncio.wait_for(ask_raw(port, REQUEST), 60)
    assert answer.status == 413


async def test_an_exception_handler_gets_it() -> None:
    app = FastAPI(middleware=[])

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, exc: TooLarge) -> JSONResponse:
        return JSONResponse({"what": "too large"}, 413)

    app.mount("/", Limiting(dv.Download(dv.VirtualSource(_slow)), status=None))
    async with live(app) as port:
        answer = await asyncio.wait_for(ask_raw(port, REQUEST), 60)
    assert (answer.status, answer.body) == (413, b'{"what":"too large"}')


@pytest.mark.parametrize("at", ["http.response.start", "http.response.body", "http.response.pathsend"])
@pytest.mark.parametrize("name", ["big.bin", "small.bin", "made"])
async def test_what_a_middleware_raises_out_of_send_reaches_it(root: Path, at: str, name: str) -> None:
    source = dv.VirtualSource(lambda name: CONTENT) if name == "made" else dv.PathSource(root)
    caught: list[BaseException] = []

    async def raising(scope: Scope, receive: Receive, send: Send) -> None:
        async def refusing(message: Message) -> None:
            if message["type"] == at:
                raise TooLarge
            await send(message)

        try:
            await dv.Download(source)(scope, receive, refusing)
        except Exception as exc:
            caught.append(exc)
            raise

    for extensions in ({}, {"http.response.pathsend": {"descriptor": True}}):
        caught.clear()
        answer = await call(raising, f"/{name}", extensions=extensions, raise_errors=False)
        assert [type(exc) for exc in caught] == ([TooLarge] if at in _types(answer, at, name, extensions) else [])


def _types(answer: Any, at: str, name: str, extensions: dict[str, Any]) -> set[str]:
    by_path = name == "big.bin" and bool(extensions)
    return {"http.response.start", "http.response.pathsend" if by_path else "http.response.body"}


async def test_an_answer_in_place_of_a_download_ends_it(root: Path) -> None:
    """Middleware that makes `http.disconnect` ends the reading of the source as a client that leaves does."""
    blocks, ended = 0, asyncio.Event()

    async def make(name: str) -> dv.VirtualFile:
        async def content() -> AsyncIterator[bytes]:
            nonlocal blocks
            try:
                for _ in range(16_384):
                    blocks += 1
                    yield bytes(1 << 16)
            finally:
                ended.set()

        return dv.VirtualFile(content(), name=name)

    app = application(root, Middleware(BaseHTTPMiddleware, dispatch=_refused), source=dv.VirtualSource(make))
    async with live(app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /made.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"Forbidden")).startswith(b"HTTP/1.1 403 ")
        await asyncio.wait_for(ended.wait(), 30)  # while the client stays
        writer.close()
    assert blocks < 100
