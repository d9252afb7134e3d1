"""Limits of `Download` on real servers: what is refused and how, what is counted, how fast bytes leave."""

import asyncio
import contextlib
import functools
import select
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.extensions import PACE
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn.sockets import unpaced_segments
from tests.live import Answer, ask, ask_in_a_row, live, make_old, parse

SMALL = b"small" * 100
BIG = bytes(range(256)) * 4096 * 6  # 6 MiB, more than all buffers on the way


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "small.bin").write_bytes(SMALL)
    (tmp_path / "big.bin").write_bytes(BIG)
    (tmp_path / "folder").mkdir()
    make_old(tmp_path)
    return tmp_path


SCOPE: Any = {
    "type": "http",
    "method": "GET",
    "path": "/big.bin",
    "query_string": b"",
    "headers": [],
    "client": ("127.0.0.1", 1),
    "http_version": "1.1",
    "extensions": {},
}
SERVERS = [pytest.param(DownloadProtocol, id="ours"), pytest.param("h11", id="h11")]


class Held:
    """A client that has begun a download and takes no more of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def rest(self) -> Answer:
        received = bytearray()
        while block := await self.reader.read(1 << 20):
            received += block
        self.writer.close()
        return parse(b"HTTP/1.1 200 OK\r\n" + bytes(received))


@contextlib.asynccontextmanager
async def held(port: int, path: str = "/big.bin") -> AsyncIterator[Held]:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 16)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
    try:
        yield Held(reader, writer)
    finally:
        writer.close()


async def until_it_is(port: int, status: int, path: str = "/small.bin") -> Answer:
    """Ask until the answer has a status: a server may take a moment to see that a client has left."""
    with anyio.fail_after(20):
        while (answer := await ask(port, path)).status != status:
            await asyncio.sleep(0.01)
    return answer


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
async def test_transfers_at_once(files: Path, server: Any) -> None:
    async with live(dv.Download(dv.PathSource(files), limits=dv.Limits(concurrent=2)), http=server) as port:
        async with held(port) as one, held(port) as other:
            refused = await ask(port, "/small.bin")
            assert (refused.status, refused.body) == (429, b"Too Many Requests: at most 2 transfers at once")
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["cache-control"] == "private, no-store"
            assert (await ask(port, "/small.bin", method="HEAD")).status == 200
            current = {"If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"}
            assert (await ask(port, "/small.bin", headers=current)).status == 304
            changed = {"If-None-Match": '"another"'}
            assert (await ask(port, "/small.bin", headers=changed)).status == 429
            assert (await one.rest()).body == BIG
            assert (await until_it_is(port, 200)).body == SMALL
            other.writer.transport.abort()
        async with held(port):
            await until_it_is(port, 200)


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("quota", [[], "1GB/day"])
@pytest.mark.parametrize("make", [dv.PathSource, lambda files: dv.StorageSource(dv.DirectoryStorage(files))])
async def test_a_connection_gets_files_one_after_another(files: Path, server: Any, quota: Any, make: Any) -> None:
    limits = dv.Limits(concurrent=1, quota=quota)
    async with live(dv.Download(make(files), limits=limits, archive=True), http=server) as port:
        paths = ["/big.bin", "/small.bin", "/?archive=zip", "/small.bin", "/folder/?archive=zip", "/big.bin"]
        assert await ask_in_a_row(port, paths) == [200] * 6


def transfers_of(limits: dv.Limits) -> int:
    store: Any = limits._store
    return sum(map(store.transfers, store._clients))


async def until_it_has(limits: dv.Limits, *, transfers: int | None = None, waiting: int | None = None) -> None:
    """Wait until there are so many transfers, or so many requests in the queue of the only client."""
    with anyio.fail_after(20):
        while transfers not in (None, transfers_of(limits)):
            await asyncio.sleep(0.01)
        while waiting is not None and [*map(len, limits._queues.values())] != [waiting] * (waiting > 0):
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_request_that_is_cancelled_or_fails_leaves_no_lease(files: Path) -> None:
    limits = dv.Limits(concurrent=1)
    app = dv.Download(dv.PathSource(files), limits=limits)

    async def broken(message: Any) -> None:
        raise OSError("the client has left")

    async def receive() -> Any:
        await asyncio.Event().wait()

    await app({**SCOPE}, receive, broken)
    assert transfers_of(limits) == 0

    async def hung(message: Any) -> None:
        is_sending.set()
        await asyncio.Event().wait()

    is_sending = asyncio.Event()
    task = asyncio.create_task(app({**SCOPE}, receive, hung))
    await asyncio.wait_for(is_sending.wait(), 20)
    assert transfers_of(limits) == 1
    task.cancel()
    await asyncio.wait([task])
    assert transfers_of(limits) == 0


@pytest.mark.asyncio
async def test_a_lease_ends_when_the_answer_is_handed_over_and_a_quota_counts_the_file(files: Path) -> None:
    limits = dv.Limits(concurrent=1, rate="5MB/s", quota="10MB/day")
    backend = dv.XAccelRedirect([dv.Rule(str(files), "/_files/")])
    app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=limits), backend)
    async with live(app) as port:
        for _ in range(2):
            answer = await ask(port, "/big.bin")
            assert (answer.headers["x-accel-redirect"], answer.body) == ("/_files/big.bin", b"")
            assert answer.headers["x-accel-limit-rate"] == "5000000"
            assert transfers_of(limits) == 0
        refused = await ask(port, "/big.bin")  # 12.6 MB are more than 10
        assert (refused.status, "x-accel-redirect" in refused.headers) == (429, False)
        assert "x-accel-limit-rate" not in refused.headers


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "backend, rate",
    [
        (dv.XAccelRedirect([dv.Rule("/", "/_files/")], limit_rate=1000), "1000"),
        (dv.XAccelRedirect([dv.Rule("/", "/_files/")], limit_rate=9_000_000), "5000000"),
        (dv.XAccelRedirect([dv.Rule("/", "/_files/")], limit_rate=0), "5000000"),
        (dv.XAccelRedirect([dv.Rule("/", "/_files/")], limits_rate=False), None),
    ],
)
async def test_the_least_rate_holds_for_the_proxy(files: Path, backend: dv.OffloadBackend, rate: str | None) -> None:
    app = dv.OffloadMiddleware(dv.Download(dv.PathSource(files), limits=dv.Limits(rate="5MB/s")), backend)
    async with live(app) as port:
        assert (await ask(port, "/small.bin")).headers.get("x-accel-limit-rate") == rate


@pytest.mark.asyncio
async def test_what_is_refused_does_not_open_the_file(files: Path) -> None:
    opened: list[str] = []

    class Counting:
        async def resolve(self, name: str) -> dv.AsyncFile:
            opened.append(name)
            return dv.LocalFile(files / name)

    download = dv.Download(Counting(), limits=dv.Limits(requests="2/minute"))
    async with live(download) as port:
        statuses = [(await ask(port, "/small.bin", method=method)).status for method in ("HEAD", "GET", "GET")]
    assert statuses == [200, 200, 429]
    assert opened == ["small.bin"] * 2


@pytest.mark.asyncio
async def test_what_access_refuses_is_not_counted(files: Path) -> None:
    async def access(request: Any, name: str) -> bool:
        return name == "small.bin"

    download = dv.Download(dv.PathSource(files), access=access, limits=dv.Limits(requests="2/minute"))
    async with live(download) as port:
        paths = ["/big.bin", "/big.bin", "/small.bin", "/small.bin", "/small.bin", "/big.bin"]
        assert [(await ask(port, path)).status for path in paths] == [404, 404, 200, 200, 429, 404]


@pytest.mark.asyncio
async def test_each_limit_holds_and_one_that_refuses_gives_back_what_the_others_gave(files: Path) -> None:
    common, route = dv.Limits(concurrent=3), dv.Limits(concurrent=1)
    app = Starlette(
        routes=[
            Route("/a/{name}", dv.Download(dv.PathSource(files), limits=[common, route])),
            Route("/b/{name}", dv.Download(dv.PathSource(files), limits=common)),
        ]
    )
    async with live(app) as port, held(port, "/a/big.bin"):
        for _ in range(5):
            assert (await ask(port, "/a/small.bin")).body.endswith(b"at most 1 transfer at once")
        async with held(port, "/b/big.bin"):
            assert (await ask(port, "/b/small.bin")).status == 200
            async with held(port, "/b/big.bin"):
                assert (await ask(port, "/b/small.bin")).body.endswith(b"at most 3 transfers at once")


@pytest.mark.asyncio
async def test_a_queue(files: Path) -> None:
    limits = dv.Limits(concurrent=1, mode="queue")
    async with live(dv.Download(dv.PathSource(files), limits=limits)) as port:
        async with held(port) as first:
            waiting = [asyncio.create_task(ask(port, "/small.bin")) for _ in range(3)]
            gone = asyncio.create_task(ask(port, "/small.bin"))
            await until_it_has(limits, waiting=4)
            gone.cancel()  # its client leaves, and so its place is free
            await until_it_has(limits, waiting=3)
            assert (await first.rest()).body == BIG
        assert [(await one).body for one in waiting] == [SMALL] * 3
        assert not limits._queues


@pytest.mark.asyncio
async def test_a_request_that_waits_takes_nothing_of_the_other_limits(files: Path) -> None:
    common, queue, source = dv.Limits(concurrent=2), dv.Limits(concurrent=1, mode="queue"), dv.SourceLimit(2)
    app = Starlette(
        routes=[
            Route("/queue/{name}", dv.Download(dv.PathSource(files), limits=[common, queue, source])),
            Route("/free/{name}", dv.Download(dv.PathSource(files), limits=[common, source])),
        ]
    )
    async with live(app) as port:
        async with held(port, "/queue/big.bin") as first:
            waiting = [asyncio.create_task(ask(port, "/queue/small.bin")) for _ in range(4)]
            await until_it_has(queue, waiting=4)
            assert transfers_of(common) == 1
            assert (await ask(port, "/free/small.bin")).status == 200
            assert (await first.rest()).body == BIG
        assert [(await one).status for one in waiting] == [200] * 4
        await until_it_has(common, transfers=0)
        async with held(port, "/free/big.bin"):
            assert (await ask(port, "/free/small.bin")).status == 200  # both slots of the source were free


@pytest.mark.asyncio
@pytest.mark.parametrize("query, headers", [("", {"If-None-Match": '"another"'}), ("?x=view", {})])
async def test_a_request_whose_lease_comes_with_its_file_waits_like_the_others(
    files: Path, query: str, headers: dict[str, str]
) -> None:
    common, queue, source = dv.Limits(concurrent=3), dv.Limits(concurrent=1, mode="queue"), dv.SourceLimit(3)
    app = Starlette(
        routes=[
            Route("/queue/{name}", dv.Download(dv.PathSource(files), limits=[common, queue, source])),
            Route("/free/{name}", dv.Download(dv.PathSource(files), limits=[common, source])),
        ]
    )

    async with live(app, http="h11") as port, held(port, "/queue/big.bin") as first:
        waiting = []
        for number in range(3):
            waiting.append(asyncio.create_task(ask(port, f"/queue/small.bin{query}", headers=headers)))
            await until_it_has(queue, waiting=number + 1)
        assert transfers_of(common) == 1
        assert (await ask(port, "/free/small.bin")).status == 200
        waiting.pop().cancel()
        await until_it_has(queue, waiting=2)
        assert (await first.rest()).body == BIG
        assert [(await one).body for one in waiting] == [SMALL] * 2


@pytest.mark.asyncio
@pytest.mark.parametrize("quota", [(), "60kB/day"])
async def test_a_client_that_leaves_while_a_small_answer_waits_gives_back_what_it_has(files: Path, quota: Any) -> None:
    (files / "part.bin").write_bytes(bytes(60_000))
    make_old(files)
    limits = dv.Limits(rate="1kB/s", concurrent=9, quota=quota)
    # Our protocol cannot tell such a client from one that has half-closed: there, the wait ends after a minute.
    async with live(dv.Download(dv.PathSource(files), limits=limits), http="h11") as port:
        asking = asyncio.create_task(ask(port, "/part.bin"))
        await until_it_has(limits, transfers=1)
        store: Any = limits._store
        (known,) = store._clients.values()
        asking.cancel()
        await until_it_has(limits, transfers=0)
    assert [used for _, used in known.spent.values()] == ([0] if quota else [])


@pytest.mark.asyncio
async def test_folders_and_their_pages_are_requests_and_not_transfers(files: Path) -> None:
    limits = dv.Limits(concurrent=1, requests="6/minute")
    download = dv.Download(dv.PathSource(files), listing=True, archive=True, limits=limits)
    async with live(Starlette(routes=[Route("/{path:path}", download)])) as port, held(port):
        assert (await ask(port, "/folder/")).status == 200
        assert (await ask(port, "/small.bin?view")).status == 200
        assert (await ask(port, "/folder")).status == 429
        assert (await ask(port, "/?archive=zip")).status == 429
        assert (await ask(port, "/folder/")).status == 200
        assert (await ask(port, "/folder/")).body.startswith(b"Too Many Requests: at most 6 requests per minute")


QUOTA_STEPS = [
    ("GET", "/small.bin", {}, 200),
    ("HEAD", "/small.bin", {}, 200),
    ("GET", "/small.bin", {"Range": "bytes=0-99"}, 206),
    ("GET", "/small.bin", {"If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"}, 304),
    ("GET", "/small.bin", {"Range": "bytes=9999-"}, 416),
    ("GET", "/missing.bin", {}, 404),
    ("GET", "/small.bin", {}, 200),
    ("GET", "/small.bin", {}, 429),
    ("HEAD", "/small.bin", {}, 200),
    ("GET", "/small.bin", {"If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"}, 304),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
async def test_a_quota_of_bytes(files: Path, server: Any) -> None:
    async with live(dv.Download(dv.PathSource(files), limits=dv.Limits(quota="1kB/day")), http=server) as port:
        for method, path, headers, status in QUOTA_STEPS:  # 500, 100 and 500 bytes
            answer = await ask(port, path, method=method, headers=headers)
            assert answer.status == status, (method, path, headers)
            if status == 429:
                assert answer.body == b"Too Many Requests: at most 1kB per day"
                assert 0 < int(answer.headers["retry-after"]) <= 86_400


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
async def test_what_a_client_that_leaves_did_not_get_is_given_back(files: Path, server: Any) -> None:
    size = 64 << 20
    with open(files / "large.bin", "wb") as file:
        file.truncate(size)
    limits = dv.Limits(quota="67.11MB/day", concurrent=1)  # 1,136 bytes more than the file
    async with live(dv.Download(dv.PathSource(files), limits=limits), http=server) as port:
        for _ in range(3):  # each is charged with the whole file, and gets some of it
            async with held(port, "/large.bin"):
                pass
            await until_it_is(port, 200)
        assert (await ask(port, "/large.bin", headers={"Range": "bytes=0-66999999"})).status == 206
        assert (await ask(port, "/small.bin")).status == 429


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
async def test_a_quota_of_downloads(files: Path, server: Any) -> None:
    async with live(
        dv.Download(dv.PathSource(files), limits=dv.Limits(quota=["3 downloads/day"])), http=server
    ) as port:
        for start in range(0, len(BIG), 1 << 20):  # a download manager
            part = await ask(port, "/big.bin", headers={"Range": f"bytes={start}-{start + (1 << 20) - 1}"})
            assert part.status == 206
        assert (await ask(port, "/small.bin")).status == 200
        assert (await ask(port, "/small.bin")).status == 200  # once more, all of it: the third
        assert (await ask(port, "/small.bin")).status == 429
        assert (await ask(port, "/big.bin", headers={"Range": "bytes=0-9"})).status == 206  # it has that
        assert (await ask(port, "/big.bin")).status == 429


@pytest.mark.asyncio
async def test_an_answer_of_unknown_size_is_charged_when_it_has_been_sent(files: Path) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield SMALL
        yield SMALL

    source = dv.VirtualSource(lambda name: dv.VirtualFile(stream, name=name))
    async with live(dv.Download(source, limits=dv.Limits(quota="1kB/day"))) as port:
        assert (await ask(port, "/a")).body == SMALL * 2
        assert (await ask(port, "/a")).status == 429


class Changing:
    """A file that changes when it is read for the first time, and no more after that."""

    name = "changing.bin"
    location = None

    def __init__(self) -> None:
        self._has_changed = False

    @contextlib.asynccontextmanager
    async def open(self, request: dv.DownloadRequest | None = None) -> AsyncIterator["Changing"]:
        yield self

    @property
    def metadata(self) -> dv.FileMetadata:
        return dv.FileMetadata(size=len(SMALL), etag=dv.ETag(str(self._has_changed)))

    async def stream(self, span: dv.ByteRange | None) -> AsyncIterator[bytes]:
        if not self._has_changed:
            self._has_changed = True
            raise dv.TransferAborted("the file was written to", reason="file-changed")
        yield SMALL


@pytest.mark.asyncio
@pytest.mark.parametrize("quota", ["1kB/day", "2 downloads/day"])
async def test_a_file_that_changes_before_its_first_byte_is_charged_once(quota: str) -> None:
    class Source:
        async def resolve(self, name: str) -> Changing:
            return Changing()

    async with live(dv.Download(Source(), limits=dv.Limits(quota=quota))) as port:
        answers = [await ask(port, f"/{number}") for number in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.body for answer in answers[:2]] == [SMALL, SMALL]


class Noted:
    """An application that notes which rates its answers set."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.rates: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection, rates = scope["extensions"][PACE], self.rates

        class Noting:
            acknowledged = connection.acknowledged

            def pace(self, rate: int) -> None:
                rates.append(rate)
                connection.pace(rate)

        await self._app({**scope, "extensions": {**scope["extensions"], PACE: Noting()}}, receive, send)


def pacing_rate(connection: Any) -> int:
    """Return what the kernel says about the pace of a connection of the server."""
    with socket.socket(fileno=connection.transport.get_extra_info("socket").dup().detach()) as sock:
        (rate,) = struct.unpack("N", sock.getsockopt(socket.SOL_SOCKET, 47, struct.calcsize("N")))
    return int(rate)


@pytest.mark.asyncio
@pytest.mark.parametrize("loop", ["asyncio"])
async def test_the_kernel_paces_a_transfer_and_not_the_next_answer(files: Path, loop: str) -> None:
    made: list[Any] = []

    class Known(DownloadProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            made.append(self)

    limited = dv.Download(dv.PathSource(files), limits=dv.Limits(rate="50MB/s"))
    app = Starlette(
        routes=[
            Route("/limited/{name}", limited),
            Route("/free/{name}", dv.Download(dv.PathSource(files))),
        ]
    )
    async with live(app, http=Known) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)

        async def get(path: str) -> None:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))

        await get("/free/big.bin")
        assert pacing_rate(made[0]) == 2**64 - 1
        await get("/limited/big.bin")
        assert pacing_rate(made[0]) == 50_000_000
        await get("/free/small.bin")
        assert pacing_rate(made[0]) == 2**64 - 1
        writer.close()


@pytest.mark.asyncio
async def test_a_client_is_not_dropped_for_the_pace_at_which_we_send(files: Path) -> None:
    """Loopback packets have up to 128 KiB: at this pace, one leaves each 0.3 s, and 1 MB/s cannot be taken."""
    (files / "part.bin").write_bytes(bytes(1 << 20))
    make_old(files)
    limited = dv.Download(dv.PathSource(files), limits=dv.Limits(rate="400kB/s"))
    http = functools.partial(DownloadProtocol, stall_seconds=0.2, minimum_rate=1_000_000)
    async with live(limited, http=http) as port:
        assert (await ask(port, "/part.bin")).complete


@pytest.mark.asyncio
async def test_a_client_that_stalls_is_dropped_at_any_pace(files: Path) -> None:
    (files / "part.bin").write_bytes(bytes(8 << 20))
    make_old(files)
    limited = dv.Download(dv.PathSource(files), limits=dv.Limits(rate="900kB/s"))
    http = functools.partial(DownloadProtocol, stall_seconds=0.2, minimum_rate=1_000_000)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with live(limited, http=http) as port:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, b"GET /part.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            poll = select.poll()
            poll.register(client, 0)
            with anyio.fail_after(20):
                while not poll.poll(0):  # a reset
                    await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_a_pipelined_answer_does_not_keep_the_pace_of_the_one_before(files: Path) -> None:
    app = Starlette(
        routes=[
            Route("/limited/{name}", dv.Download(dv.PathSource(files), limits=dv.Limits(rate="4MB/s"))),
            Route("/free/{name}", dv.Download(dv.PathSource(files))),
        ]
    )
    with open(files / "large.bin", "wb") as file:
        file.truncate(80_000_000)
    async with live(app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        for path in ("/limited/big.bin", "/free/large.bin"):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        with anyio.fail_after(15):  # at the pace of the first one, 20 seconds more
            for size in (len(BIG), 80_000_000):
                head = await reader.readuntil(b"\r\n\r\n")
                assert b" 200 " in head
                await reader.readexactly(size)
        writer.close()


@pytest.mark.asyncio
async def test_transfers_of_a_client_share_its_rate(files: Path) -> None:
    noted = Noted(dv.Download(dv.PathSource(files), limits=dv.Limits(rate="300MB/s", total_rate="400MB/s")))
    async with live(noted, http=DownloadProtocol) as port:
        async with held(port), held(port) as other:
            assert noted.rates == [300_000_000, 150_000_000, 150_000_000]
            await other.rest()
        with anyio.fail_after(20):
            while len(noted.rates) < 4:
                await asyncio.sleep(0.01)
        assert noted.rates[3] == 300_000_000


@pytest.mark.asyncio
@pytest.mark.parametrize("server", SERVERS)
async def test_a_client_that_stalls_leaves_its_part_to_the_others(files: Path, server: Any) -> None:
    with open(files / "large.bin", "wb") as file:
        file.truncate(1 << 30)
    limits = dv.Limits(rate="40MB/s")
    async with (
        live(dv.Download(dv.PathSource(files), limits=limits), http=server) as port,
        held(port, "/large.bin"),
        held(port, "/large.bin") as other,
    ):
        (shared,) = limits._rates.values()
        assert [pace.rate for pace in shared.paces] == [20_000_000] * 2
        with anyio.fail_after(30):
            while max(pace.rate for pace in shared.paces) < 30_000_000:
                await other.reader.read(1 << 18)


@pytest.mark.asyncio
async def test_a_server_that_cannot_pace_gets_no_path_send(files: Path) -> None:
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    for rate, expected in ((None, "http.response.pathsend"), ("900MB/s", "http.response.body")):
        limits = None if rate is None else dv.Limits(rate=rate)
        extensions: dict[str, dict[str, Any]] = {"http.response.pathsend": {}}
        await dv.Download(dv.PathSource(files), limits=limits)({**SCOPE, "extensions": extensions}, receive, send)
        assert sent[1] == expected
        sent.clear()


async def body_of(port: int, path: str, *, size: int, **options: Any) -> float:
    """Read so many bytes of a file, and return the seconds that it took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22, **options)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    began = time.monotonic()
    await reader.readuntil(b"\r\n\r\n")
    left = size
    while left > 0:
        piece = await reader.read(1 << 18)
        assert piece
        left -= len(piece)
    writer.close()
    return time.monotonic() - began


WAYS = ["sendfile", "tls", "h11", "stream", "eight at once"]


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("way", WAYS)
async def test_the_rate_holds_however_the_bytes_leave(files: Path, way: str, certificate: dict[str, str]) -> None:
    size, rate = 12_000_000, 4_000_000
    with open(files / "large.bin", "wb") as file:
        file.truncate(10 * size)

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1_200_000)

    source: Any = dv.PathSource(files)
    if way == "stream":
        source = dv.VirtualSource(lambda name: dv.VirtualFile(stream, name=name, size=10 * size))
    options: dict[str, Any] = {"http": "h11" if way == "h11" else DownloadProtocol}
    connect: dict[str, Any] = {}
    if way == "tls":
        options |= certificate
        connect["ssl"] = ssl.create_default_context(cafile=options["ssl_certfile"])
        connect["server_hostname"] = "localhost"
    async with live(dv.Download(source, limits=dv.Limits(rate="4MB/s")), **options) as port:
        clients = 8 if way.startswith("eight") else 1
        get = functools.partial(body_of, port, "/large.bin", size=size // clients, **connect)
        seconds = max(await asyncio.gather(*[get() for _ in range(clients)]))
    print(f"{way}: {size / seconds / rate:.2f} of the rate")
    assert size / rate * 0.95 < seconds < size / rate * 4  # a machine that is busy may take longer


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["sendfile", "chunks", "foreign"])
async def test_the_first_bytes_keep_a_low_rate_too(files: Path, way: str) -> None:
    """The kernel paces no connection before its eleventh segment, and on this device one has up to 64 KiB."""
    with open(files / "part.bin", "wb") as file:
        file.truncate(300_000)
    limits, source = dv.Limits(rate="100kB/s"), dv.PathSource(files)
    app: ASGIApp = dv.Download(source, limits=limits)
    if way == "foreign":
        app = dv.LimitsMiddleware(Starlette(routes=[Mount("/", StaticFiles(directory=files))]), limits=limits)
    elif way == "chunks":

        async def stream() -> AsyncIterator[bytes]:
            yield bytes(300_000)

        app = dv.Download(dv.VirtualSource(lambda name: dv.VirtualFile(stream, name=name, size=300_000)), limits=limits)
    async with live(app, http=DownloadProtocol) as port:
        seconds = await body_of(port, "/part.bin", size=300_000)
    assert seconds > 1.8  # the last segments leave at once


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_head_of_a_paced_answer_takes_the_segments_that_the_kernel_does_not_pace(loop: str) -> None:
    left: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["extensions"][PACE]
        left.append(unpaced_segments(connection))
        connection.pace(100_000)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"500")]})
        left.append(unpaced_segments(connection))
        await send({"type": "http.response.body", "body": SMALL})

    async def answer() -> Answer:
        async with live(app, http=DownloadProtocol) as port:
            return await ask(port, "/")

    run: Any = pytest.importorskip(loop).run
    answered = run(answer())
    assert (answered.status, answered.body) == (200, SMALL)
    assert left == [10, 0]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_small_answers_keep_to_the_rate_too(files: Path) -> None:
    (files / "part.bin").write_bytes(bytes(50_000))
    async with live(dv.Download(dv.PathSource(files), limits=dv.Limits(rate="1MB/s")), http=DownloadProtocol) as port:
        began = time.monotonic()
        for _ in range(60):
            assert (await ask(port, "/part.bin")).status == 200
        seconds = time.monotonic() - began
    assert seconds > 1.5  # 3 MB, of which the first one may leave at once


@pytest.mark.asyncio
async def test_a_source_that_hangs_takes_no_more_than_its_slots(files: Path) -> None:
    release = asyncio.Event()

    async def hung() -> AsyncIterator[bytes]:
        yield SMALL
        await release.wait()
        yield SMALL

    slow = dv.VirtualSource(lambda name: dv.VirtualFile(hung, name=name, size=2 * len(SMALL)))
    limit = dv.SourceLimit(2, queue_seconds=0.2)
    app = Starlette(
        routes=[
            Route("/slow/{name}", dv.Download(slow, limits=limit)),
            Route("/same/{name}", dv.Download(slow, limits=limit)),
            Route("/other/{name}", dv.Download(dv.PathSource(files), limits=dv.SourceLimit(2))),
        ]
    )
    async with live(app) as port:
        async with held(port, "/slow/a"), held(port, "/same/a") as second:
            refused = await ask(port, "/slow/a")
            assert (refused.status, refused.headers["retry-after"]) == (503, "5")
            assert (await ask(port, "/slow/a", method="HEAD")).status == 503
            assert (await ask(port, "/other/small.bin")).status == 200
            waiting = asyncio.create_task(ask(port, "/slow/a"))
            release.set()
            assert (await second.rest()).body == SMALL * 2
            assert (await waiting).status == 200
        assert (await ask(port, "/slow/a")).status == 200


@pytest.mark.parametrize("number", [0, -1, True, "2", 1.5])
def test_a_number_of_slots_that_is_refused(number: Any) -> None:
    with pytest.raises(dv.ConfigurationError, match="1 or more"):
        dv.SourceLimit(number)
