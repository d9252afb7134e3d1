"""`LimitsMiddleware`: the limits of applications that know nothing of this library, on real servers."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.extensions import PATHSEND
from downloadview_async.asgi.server import DownloadProtocol
from tests.asgi.test_limits import (
    BIG,
    SCOPE,
    SERVERS,
    SMALL,
    body_of,
    held,
    transfers_of,
    until_it_has,
    until_it_is,
)
from tests.descriptors import open_paths
from tests.live import Answer, ask, live, make_old

WAYS = ["file", "static", "stream", "ours", "download", "downloads"]
EVERYWHERE = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "small.bin").write_bytes(SMALL)
    (tmp_path / "big.bin").write_bytes(BIG)
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(120_000_000)
    make_old(tmp_path)
    return tmp_path


def application(files: Path) -> Starlette:
    async def file(request: Request) -> Response:
        return FileResponse(files / request.path_params["name"])

    async def stream(request: Request) -> Response:
        size = (files / request.path_params["name"]).stat().st_size

        async def blocks() -> AsyncIterator[bytes]:
            for start in range(0, size, 1 << 16):
                with open(files / request.path_params["name"], "rb") as opened:
                    opened.seek(start)
                    block = opened.read(1 << 16)
                yield block

        return StreamingResponse(blocks(), headers={"Content-Length": str(size)})

    async def ours(request: Request) -> Response:
        return dv.DownloadResponse(dv.LocalFile(files / request.path_params["name"]))

    async def page(request: Request) -> Response:
        return PlainTextResponse("", 204 if request.query_params else 200)

    source = dv.PathSource(files)
    return Starlette(
        routes=[
            Route("/file/{name}", file),
            Route("/stream/{name}", stream),
            Route("/ours/{name}", ours),
            Route("/download/{name}", dv.Download(source)),
            Route("/downloads/{name}", dv.Download(source, limits=dv.Limits(concurrent=50, quota="5GB/day"))),
            Route("/listing/{name:path}", dv.Download(source, listing=True)),
            Route("/page", page),
            Mount("/static", StaticFiles(directory=files)),
        ]
    )


def limited(files: Path, *limits: dv.Limits | dv.SourceLimit) -> dv.LimitsMiddleware:
    return dv.LimitsMiddleware(application(files), limits=list(limits))


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
@EVERYWHERE
async def test_transfers_at_once(files: Path, server: Any, way: str) -> None:
    limits = dv.Limits(concurrent=2)
    async with live(limited(files, limits), http=server) as port:
        async with held(port, f"/{way}/big.bin") as one, held(port, f"/{way}/big.bin"):
            refused = await ask(port, f"/{way}/small.bin")
            assert (refused.status, refused.body) == (429, b"Too Many Requests: at most 2 transfers at once")
            assert refused.headers["retry-after"] == "1"
            assert "etag" not in refused.headers
            for path in ("/page", "/page?empty=1", "/missing", "/listing/"):
                assert (await ask(port, path)).status in (200, 204, 404)
            if way != "stream":
                assert (await ask(port, f"/{way}/small.bin", method="HEAD")).status in (200, 405)
                assert (await ask(port, f"/{way}/big.bin", headers={"Range": "bytes=99999999-"})).status == 416
            assert (await one.rest()).body == BIG
            assert (await until_it_is(port, 200, f"/{way}/small.bin")).body == SMALL
        await until_it_has(limits, transfers=0)


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
@EVERYWHERE
async def test_quotas(files: Path, server: Any, way: str) -> None:
    limits = dv.Limits(quota=["12.6MB/day", "4 downloads/day"], requests="50/minute")
    async with live(limited(files, limits), http=server) as port:
        async with held(port, f"/{way}/large.bin") as begun:
            await begun.reader.readuntil(b"\r\n\r\n")
            await begun.reader.readexactly(1 << 16)  # a download of which nothing was taken does not count
            assert (await ask(port, f"/{way}/small.bin")).body.endswith(b"at most 12.6MB per day")
        await until_it_is(port, 200, f"/{way}/small.bin")  # what was not sent is given back
        statuses = [(await ask(port, f"/{way}/small.bin")).status for _ in range(4)]
        assert statuses == [200, 200, 429, 429]  # the large one may be continued
        assert (await ask(port, f"/{way}/small.bin")).body.endswith(b"at most 4 downloads per day")


@pytest.mark.asyncio
@pytest.mark.parametrize("way", WAYS)
async def test_a_quota_counts_what_the_outcome_counts(files: Path, way: str) -> None:
    """Of an answer that the client resets, too: what waited for the client and was dropped counts in neither."""
    limits = dv.Limits(quota="5GB/day", concurrent=1)
    outcomes: list[dv.Outcome] = []
    async with live(dv.Accounts(limited(files, limits), observers=[outcomes.append]), http=DownloadProtocol) as port:
        async with held(port, f"/{way}/large.bin") as client:
            await client.reader.readexactly(1 << 20)
            client.writer.transport.abort()
        with anyio.fail_after(20):
            while not outcomes or transfers_of(limits):
                await asyncio.sleep(0.01)
    store: Any = limits._store
    (known,) = store._clients.values()
    ((_, spent),) = known.spent.values()
    assert spent == outcomes[0].sent < 120_000_000


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["file", "static"])
async def test_pieces_of_a_file_are_one_download(files: Path, way: str) -> None:
    async with live(limited(files, dv.Limits(quota="2 downloads/day")), http=DownloadProtocol) as port:
        for start in range(0, len(BIG), 1 << 20):
            part = await ask(port, f"/{way}/big.bin", headers={"Range": f"bytes={start}-{start + (1 << 20) - 1}"})
            assert part.status == 206
        assert (await ask(port, f"/{way}/small.bin")).status == 200
        assert (await ask(port, f"/{way}/big.bin")).status == 429
        two = {"Range": "bytes=0-9,30-39"}
        assert (await ask(port, f"/{way}/big.bin", headers=two)).status == 206


@pytest.mark.asyncio
async def test_requests_are_refused_before_the_application_and_other_answers_are_left(files: Path) -> None:
    called: list[str] = []

    async def noting(request: Request, call_next: Any) -> Any:
        called.append(request.url.path)
        return await call_next(request)

    app = application(files)
    app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=noting))
    async with live(dv.LimitsMiddleware(app, limits=dv.Limits(requests="2/minute", concurrent=1))) as port:
        answers = [await ask(port, "/file/small.bin") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].body == b"Too Many Requests: at most 2 requests per minute"
    assert called == ["/file/small.bin"] * 2


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
async def test_the_application_of_a_refused_answer_sees_a_client_that_has_left(files: Path, server: Any) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen() -> None:
            assert await receive() == {"type": "http.disconnect"}
            seen.append("a disconnect")

        if scope["path"] != "/refused":
            await application(files)(scope, receive, send)
            return
        assert (await receive())["type"] == "http.request"
        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)  # it waits for a message now
        headers = [(b"content-length", b"2")]
        for message in ({"type": "http.response.start", "status": 200, "headers": headers}, {"body": b"ok"}):
            try:
                await send({"type": "http.response.body", **message})
            except OSError:
                seen.append("an error")
        await listening

    limits, outcomes = dv.Limits(concurrent=1), list[dv.Outcome]()
    limited = dv.Accounts(dv.LimitsMiddleware(app, limits), observers=[outcomes.append])
    async with live(limited, http=server) as port, held(port, "/file/big.bin"):
        assert (await ask(port, "/refused")).status == 429
        refused = await ask(port, "/file/small.bin")
        assert (refused.status, refused.body) == (429, b"Too Many Requests: at most 1 transfer at once")
    assert seen == ["a disconnect", "an error", "an error"]
    assert [(one.status, one.result) for one in outcomes[:2]] == [(429, "refused")] * 2
    assert outcomes[1].route == "/file/{name}"


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("way", ["file", "stream", "ours"])
async def test_a_queue(files: Path, server: Any, way: str) -> None:
    limits = dv.Limits(concurrent=1, mode="queue")
    async with live(limited(files, limits, dv.SourceLimit(9)), http=server) as port:
        async with held(port, f"/{way}/big.bin") as first:
            waiting = [asyncio.create_task(ask(port, f"/{way}/small.bin")) for _ in range(3)]
            gone = asyncio.create_task(ask(port, f"/{way}/small.bin"))
            await until_it_has(limits, waiting=4)
            gone.cancel()
            await until_it_has(limits, waiting=3)
            assert (await first.rest()).body == BIG
        assert [(await one).body for one in waiting] == [SMALL] * 3


@pytest.mark.asyncio
@pytest.mark.parametrize("ends", ["half-closes", "closes", "resets"])
@pytest.mark.parametrize("way", ["file", "ours", "download", "Download(limits=...)"])
async def test_a_client_that_leaves_the_queue_frees_its_place(files: Path, way: str, ends: str) -> None:
    limits = dv.Limits(concurrent=1, mode="queue", queue_seconds=60)
    app: ASGIApp = limited(files, limits)
    if way not in WAYS:
        way, app = "x", Starlette(routes=[Route("/x/{name}", dv.Download(dv.PathSource(files), limits=limits))])
    async with live(app, http=DownloadProtocol) as port, held(port, f"/{way}/big.bin") as first:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /{way}/small.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until_it_has(limits, waiting=1)
        with anyio.fail_after(20):
            if ends == "half-closes":
                writer.write_eof()
                answer = await reader.read()
                assert answer.startswith(b"HTTP/1.1 429 ")
                assert answer.endswith(b"at most 1 transfer at once")
            elif ends == "closes":
                writer.close()
            else:
                writer.transport.abort()
        await until_it_has(limits, waiting=0)
        writer.close()
        # one that has half-closed before waits for nothing, but gets what is there
        assert (await first.rest()).body == BIG
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await until_it_has(limits, transfers=0)
        with anyio.fail_after(20):
            writer.write(f"GET /{way}/small.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            writer.write_eof()
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.asyncio
async def test_a_proxy_keeps_the_rate_and_its_transfers_count(files: Path) -> None:
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app = dv.OffloadMiddleware(application(files), backend, pathsend=True)
    limits = dv.Limits(rate="5MB/s", quota=["10MB/day", "3 downloads/day"])
    async with live(dv.LimitsMiddleware(app, limits)) as port:
        for way in ("file", "static"):
            answer = await ask(port, f"/{way}/big.bin")
            assert answer.headers["x-accel-redirect"] == "/_files/big.bin"
            assert answer.headers["x-accel-limit-rate"] == "5000000"
        refused = await ask(port, "/file/big.bin")  # 12.6 MB are more than 10
        assert (refused.status, "x-accel-redirect" in refused.headers) == (429, False)


@pytest.mark.asyncio
@pytest.mark.parametrize("around", ["limits", "offload"])
@pytest.mark.parametrize("server", SERVERS)
async def test_header_fields_that_can_be_read_once_arrive(server: Any, around: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = iter([(b"content-length", b"%d" % len(SMALL)), (b"x-made", b"here")])
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": SMALL})

    nginx = dv.XAccelRedirect([dv.Rule("/srv", "/_files/")])
    wrapped: ASGIApp = (
        dv.LimitsMiddleware(app, limits=dv.Limits(quota="1MB/day"))
        if around == "limits"
        else dv.OffloadMiddleware(app, nginx, pathsend=True)
    )
    async with live(wrapped, http=server) as port:
        answer = await ask(port, "/")
    assert (answer.headers.get("x-made"), answer.body) == ("here", SMALL)


@pytest.mark.asyncio
@pytest.mark.parametrize("offload", [None, True])
async def test_header_fields_of_an_offloaded_answer_that_middleware_makes_readable_once(
    files: Path, offload: bool | None
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_once(message: Message) -> None:
            if "headers" in message:
                message = {**message, "headers": iter(message["headers"])}
            await send(message)

        response = dv.DownloadResponse(dv.LocalFile(files / "small.bin"), offload=offload)
        await response(scope, receive, send_once)

    nginx = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    async with live(dv.OffloadMiddleware(app, nginx)) as port:
        answer = await ask(port, "/")
    assert answer.headers.get("x-accel-redirect") == "/_files/small.bin"


@pytest.mark.asyncio
async def test_a_file_for_a_proxy_is_closed_if_the_request_is_cancelled_in_the_queue(files: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await anyio.sleep_forever()
        await FileResponse(files / "small.bin")(scope, receive, send)

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        pass

    def task(path: str) -> "asyncio.Task[None]":
        scope = {**SCOPE, "path": path, "extensions": {}}
        return asyncio.create_task(limited(scope, receive, send))  # type: ignore[arg-type]

    limits = dv.Limits(concurrent=1, mode="queue")
    nginx = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    limited = dv.LimitsMiddleware(dv.OffloadMiddleware(app, nginx, pathsend=True), limits=limits)
    first = task("/stream")
    with anyio.fail_after(20):
        while not transfers_of(limits):
            await asyncio.sleep(0.01)
        second = task("/file")
        while not limits._queues:
            await asyncio.sleep(0.01)
    assert str(files / "small.bin") in open_paths()
    for one in (second, first):
        one.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert str(files / "small.bin") not in open_paths()
    assert transfers_of(limits) == 0


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
@EVERYWHERE
async def test_the_rate_holds(files: Path, server: Any, way: str) -> None:
    size, rate = 12_000_000, 4_000_000
    limits = dv.Limits(rate="4MB/s")
    async with live(limited(files, limits), http=server) as port:
        seconds = await body_of(port, f"/{way}/large.bin", size=size)
    print(f"{way}: {size / seconds / rate:.2f} of the rate")
    assert size / rate * 0.95 < seconds < size / rate * 4  # a machine that is busy may take longer


@pytest.mark.slow
@pytest.mark.asyncio
async def test_small_answers_keep_the_rate_too(files: Path) -> None:
    (files / "part.bin").write_bytes(bytes(50_000))
    async with live(limited(files, dv.Limits(rate="1MB/s")), http=DownloadProtocol) as port:
        began = time.monotonic()
        for _ in range(60):
            assert (await ask(port, "/file/part.bin")).status == 200
        assert time.monotonic() - began > 1.5  # 3 MB, of which the first one may leave at once


def line_of(request_id: str, sent: int, status: int = 200) -> str:
    return json.dumps({"method": "GET", "request_id": request_id, "status": status, "bytes": sent}) + "\n"


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["download", "file"])
async def test_a_transfer_of_a_proxy_ends_with_its_line_in_the_log(files: Path, tmp_path: Path, way: str) -> None:
    log = tmp_path / "downloads.log"
    log.write_text("something else\n")
    limits = dv.Limits(concurrent=2, quota=["20MB/day", "2 downloads/day"], proxy_log=str(log))
    source = dv.SourceLimit(1)
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app: ASGIApp
    if way == "download":
        app = Starlette(routes=[Route("/download/{name}", dv.Download(dv.PathSource(files), limits=[limits, source]))])
        app = dv.OffloadMiddleware(app, backend)
    else:
        app = dv.LimitsMiddleware(dv.OffloadMiddleware(application(files), backend, pathsend=True), [limits, source])
    async with live(dv.Accounts(app, sends_request_id=True)) as port:

        async def begin() -> Answer:
            answer = await ask(port, f"/{way}/big.bin")
            assert answer.headers["x-accel-redirect"] == "/_files/big.bin"
            return answer

        begun = [await begin(), await begin()]
        refused = await ask(port, f"/{way}/big.bin")
        assert (refused.status, transfers_of(limits)) == (429, 2)
        with log.open("a") as file:
            file.write(line_of("another", 1))
            file.write(line_of(begun[0].headers["x-request-id"], 1000))  # the client has left
        await until_it_has(limits, transfers=1)
        third = await begin()  # its bytes, and those of the first one, fit into the quotas
        log.rename(tmp_path / "downloads.log.1")
        with (tmp_path / "downloads.log.1").open("a") as file:
            file.write(line_of(begun[1].headers["x-request-id"], len(BIG)))
        log.write_text(line_of(third.headers["x-request-id"], len(BIG), 404))  # those of an error page
        await until_it_has(limits, transfers=0)
        await begin()
        assert (await ask(port, f"/{way}/big.bin")).body.endswith(b"at most 2 downloads per day")


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["download", "file"])
async def test_transfers_of_a_proxy_share_the_rate_as_they_come_and_go(files: Path, tmp_path: Path, way: str) -> None:
    log = tmp_path / "downloads.log"
    log.touch()
    limits = dv.Limits(rate="6MB/s", concurrent=9, proxy_log=str(log))
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app: ASGIApp
    if way == "download":
        app = Starlette(routes=[Route("/download/{name}", dv.Download(dv.PathSource(files), limits=limits))])
        app = dv.OffloadMiddleware(app, backend)
    else:
        app = dv.LimitsMiddleware(dv.OffloadMiddleware(application(files), backend, pathsend=True), limits)
    async with live(dv.Accounts(app, sends_request_id=True)) as port:
        begun = [(await ask(port, f"/{way}/big.bin")).headers for _ in range(4)]
        rates = [int(one["x-accel-limit-rate"]) for one in begun]
        assert rates == [6_000_000, 3_000_000, 2_000_000, 1_500_000]
        with log.open("a") as file:
            file.writelines(line_of(one["x-request-id"], len(BIG)) for one in begun)
        await until_it_has(limits, transfers=0)
        assert (await ask(port, f"/{way}/big.bin")).headers["x-accel-limit-rate"] == "6000000"


@pytest.mark.asyncio
async def test_the_log_of_a_proxy_may_be_truncated_within_a_line(files: Path, tmp_path: Path) -> None:
    log = tmp_path / "downloads.log"
    log.write_text("something else\n" * 100)
    limits = dv.Limits(concurrent=2, proxy_log=str(log))
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=limits), backend)
    async with live(dv.Accounts(app, sends_request_id=True)) as port:
        first, second = [await ask(port, "/big.bin") for _ in range(2)]
        with log.open("a") as file:
            file.write(line_of(first.headers["x-request-id"], 1000) + '{"half')
        await until_it_has(limits, transfers=1)
        os.truncate(log, 0)
        with log.open("a") as file:
            file.write(line_of(second.headers["x-request-id"], 1000))
        await until_it_has(limits, transfers=0)


@pytest.mark.asyncio
async def test_lines_that_come_early_and_ids_that_come_twice(files: Path, tmp_path: Path) -> None:
    log = tmp_path / "downloads.log"
    log.touch()
    limits = dv.Limits(concurrent=3, proxy_log=str(log))
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=limits), backend)
    async with live(dv.Accounts(app, sends_request_id=True, trusted_proxies=["127.0.0.1"])) as port:

        async def begin(request_id: str) -> None:
            assert (await ask(port, "/big.bin", headers={"X-Request-Id": request_id})).status == 200

        async def write(*ids: str, left: int) -> None:
            with log.open("a") as file:
                file.writelines(line_of(one, 0, 499) for one in ids)
            with anyio.fail_after(20):
                while transfers_of(limits) != left:
                    await asyncio.sleep(0.01)

        for name in ("held", "same", "same"):
            await begin(name)
        assert transfers_of(limits) == 3
        await write("early", "same", left=2)  # the client has left while the application decides
        await begin("early")
        assert transfers_of(limits) == 2
        await write("same", left=1)
        await write("held", left=0)


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["download", "sent"])
@pytest.mark.parametrize(
    ("value", "status", "is_offloaded"),
    [("bytes=0-9", 200, True), ("bytes=999999999-", 416, False), ("bytes=x", 200, False)],
)
async def test_a_range_of_which_the_log_may_not_tell_is_answered_here(
    files: Path, tmp_path: Path, way: str, value: str, status: int, is_offloaded: bool
) -> None:
    async def sent(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(BIG))]}
        await send(start)
        await send({"type": PATHSEND, "path": str(files / "big.bin")})

    (tmp_path / "log").touch()
    limits = dv.Limits(concurrent=1, proxy_log=str(tmp_path / "log"))
    backend = dv.XSendfile([dv.Rule(str(files), str(files))], encoding="raw")
    app: ASGIApp
    if way == "download":
        app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=limits), backend)
    else:
        app = dv.LimitsMiddleware(dv.OffloadMiddleware(sent, backend, pathsend=True), limits)
    async with live(dv.Accounts(app, sends_request_id=True)) as port:
        answer = await ask(port, "/big.bin", headers={"Range": value})
        assert "x-sendfile" in answer.headers or not is_offloaded
        assert "x-sendfile" not in answer.headers or is_offloaded
        assert answer.status == (status if way == "download" else 200)
        with anyio.fail_after(20):
            while transfers_of(limits) != int(is_offloaded):
                await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_transfer_whose_line_does_not_come_ends_in_time(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downloadview_async.asgi.handed_over.MOST_SECONDS", 0.5)
    (tmp_path / "log").touch()
    limits = dv.Limits(concurrent=1, proxy_log=str(tmp_path / "log"))
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=limits), backend)
    async with live(dv.Accounts(app, sends_request_id=True)) as port:
        assert (await ask(port, "/big.bin")).status == 200
        assert (await ask(port, "/big.bin")).status == 429
        with anyio.fail_after(20):
            while (await ask(port, "/big.bin")).status != 200:
                await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_a_log_that_cannot_be_read_for_a_while(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, renamed = tmp_path / "downloads.log", tmp_path / "downloads.log.1"
    log.touch()
    limits = dv.Limits(concurrent=2, proxy_log=str(log))
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=limits), backend)
    async with live(dv.Accounts(app, sends_request_id=True)) as port:
        begun = [(await ask(port, "/big.bin")).headers["x-request-id"] for _ in range(2)]
        log.rename(renamed)
        log.mkdir()
        with anyio.fail_after(20):
            while "cannot be read" not in caplog.text:
                await asyncio.sleep(0.01)
        log.rmdir()
        with renamed.open("a") as file:
            file.write(line_of(begun[0], 9))
        log.write_text(line_of(begun[1], 9))
        with anyio.fail_after(20):
            while transfers_of(limits):
                await asyncio.sleep(0.01)
