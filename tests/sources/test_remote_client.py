"""Clients and connections of remote sources: a user's own client, limits, and cancellation under contention."""

import asyncio
from typing import Any

import httpx
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from downloadview_async import (
    Download,
    RemoteFile,
    RemoteSource,
    SourceUnavailable,
    Upstream,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.testing import call
from tests.live import live

pytestmark = pytest.mark.asyncio


async def _file(request: Any) -> Response:
    return PlainTextResponse("0123456789", headers={"X-Seen": request.headers.get("authorization", "")})


async def _away(request: Any) -> Response:
    return RedirectResponse("http://elsewhere.test/x")


UPSTREAM = Starlette(routes=[Route("/pub/ten.txt", _file), Route("/pub/away", _away)])


@pytest.mark.parametrize("library", [httpx2, httpx], ids=["httpx2", "httpx"])
async def test_a_client_of_ones_own(library: Any) -> None:
    async with library.AsyncClient(transport=library.ASGITransport(app=UPSTREAM)) as client:
        source = RemoteSource("http://upstream.test/pub/", client=client)
        answer = await call(Download(source), "/ten.txt", headers={"Range": "bytes=2-3"})
        assert (answer.status, answer.body) == (206, b"23")
        assert (await call(Download(source), "/none")).status == 404
        assert (await call(Download(source), "/away")).status == 502
        await source.aclose()
        assert not client.is_closed


@pytest.mark.parametrize("library", [httpx2, httpx], ids=["httpx2", "httpx"])
async def test_errors_of_a_client_of_ones_own(library: Any) -> None:
    raised: list[Exception] = []

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise raised[-1]

    async with library.AsyncClient(transport=library.ASGITransport(app=fail)) as client:
        file = RemoteFile("http://upstream.test/x", upstream=Upstream("upstream.test", client=client))
        for error, ours in (
            (library.ReadTimeout("x"), UpstreamTimeout),
            (library.PoolTimeout("x"), SourceUnavailable),
            (library.ConnectError("x"), UpstreamError),
            (library.InvalidURL("x"), UpstreamError),
            (KeyError("not the upstream's fault"), KeyError),
        ):
            raised.append(error)
            with pytest.raises(ours):
                async with file.open():
                    pass


async def test_more_requests_than_connections_wait_and_then_are_turned_away() -> None:
    go_on = asyncio.Event()
    arrived = asyncio.Semaphore(0)

    async def slow(request: Any) -> Response:
        arrived.release()
        await go_on.wait()
        return PlainTextResponse("late")

    async with live(Starlette(routes=[Route("/{name}", slow)])) as port:
        source = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], max_connections=2)
        app = Download(source)
        waiting = [asyncio.create_task(call(app, "/x")) for _ in range(2)]
        for _ in waiting:
            await arrived.acquire()
        refused = await call(app, "/x")
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        go_on.set()
        assert [(await task).body for task in waiting] == [b"late"] * 2
        assert (await call(app, "/x")).body == b"late"
        await source.aclose()


@pytest.mark.slow
async def test_thousands_of_cancelled_requests_leave_the_source_working() -> None:
    async def some(request: Any) -> Response:
        return PlainTextResponse("x" * 100_000)

    async with live(Starlette(routes=[Route("/{name}", some)])) as port:
        source = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], max_connections=4)
        app = Download(source)

        async def cancelled(number: int) -> None:
            task = asyncio.create_task(call(app, "/x"))
            for _ in range(number % 40):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for turn in range(100):
            await asyncio.gather(*[cancelled(turn + n) for n in range(20)])
        answers = await asyncio.gather(*[call(app, "/x") for _ in range(4)])
        assert [len(answer.body) for answer in answers] == [100_000] * 4
        await source.aclose()
