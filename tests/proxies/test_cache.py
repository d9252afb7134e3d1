"""A cache behind real proxies, while its files arrive and while it has too little room for them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.http.fields import OFFLOAD_HEADERS
from tests.live import ask, live
from tests.proxies.servers import KINDS, proxy, readable_directory

pytestmark = pytest.mark.asyncio
BLOCK = 1 << 20  # more than a proxy keeps to itself


@asynccontextmanager
async def serving(
    kind: str, make: Callable[[str], dv.VirtualFile], **limits: int
) -> AsyncIterator[tuple[int, int, dv.Cache]]:
    """Give the proxy's port, the application's and the cache."""
    async with AsyncExitStack() as stack:
        checkout = stack.enter_context(readable_directory())
        cache = dv.Cache(checkout / "app" / "files", **limits)
        source = dv.CachedSource(dv.VirtualSource(make), cache, name="made here")
        stack.push_async_callback(source.aclose)
        app = Starlette(routes=[Route("/{path:path}", dv.Download(source))])
        backend = KINDS[kind].backend(Path(cache.path))
        service = await stack.enter_async_context(live(dv.OffloadMiddleware(app, backend)))
        yield stack.enter_context(proxy(KINDS[kind], checkout, service)), service, cache


@pytest.mark.parametrize("kind", list(KINDS))
async def test_who_comes_while_a_file_arrives_is_fed_by_us_and_who_comes_later_by_the_proxy(kind: str) -> None:
    go_on = asyncio.Event()
    made: list[str] = []

    async def slowly() -> AsyncIterator[bytes]:
        made.append("once")
        yield b"x" * BLOCK
        await asyncio.wait_for(go_on.wait(), 30)
        yield b"y" * BLOCK

    async def begun(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow.bin HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        seen = 0
        while seen < BLOCK // 2:
            block = await asyncio.wait_for(reader.read(1 << 16), 30)
            assert block, "the answer ended early"
            seen += block.count(b"x")
        return reader, writer, seen

    async with serving(kind, lambda name: dv.VirtualFile(slowly, name=name, max_age=60)) as (port, service, cache):
        clients = [await begun(port), await begun(port)]
        go_on.set()
        for reader, writer, seen in clients:
            rest = await asyncio.wait_for(reader.read(), 30)
            assert seen + rest.count(b"x") >= BLOCK
            assert rest.count(b"y") == BLOCK
            writer.close()
        for fetch in list(cache._running):
            await asyncio.wait([fetch.task])
        direct = await ask(service, "/slow.bin")
        assert direct.body == b""
        assert OFFLOAD_HEADERS & {*direct.headers}
        answer = await ask(port, "/slow.bin", headers={"Range": f"bytes={BLOCK - 1}-{BLOCK}"})
        assert (answer.status, answer.body) == (206, b"xy")
        assert answer.headers["age"].isdigit()
        assert made == ["once"]


@pytest.mark.parametrize("kind", ["nginx", "apache"])
async def test_a_cache_that_is_too_small_makes_no_file_a_missing_one(kind: str) -> None:
    def content(name: str) -> bytes:
        return name.encode() * 30_000

    def make(name: str) -> dv.VirtualFile:
        return dv.VirtualFile(lambda: iter([content(name)]), name=name, size=len(content(name)), max_age=60)

    async with serving(kind, make, max_bytes=600_000) as (port, service, cache):

        async def client(number: int) -> int:
            offloaded = 0
            for turn in range(15):
                name = f"file-{(number * 7 + turn * turn) % 9}"
                answer = await ask(port, f"/{name}")
                assert (answer.status, answer.complete, answer.body == content(name)) == (200, True, True)
                offloaded += bool(OFFLOAD_HEADERS & {*(await ask(service, f"/{name}")).headers})
            return offloaded

        assert sum(await asyncio.gather(*[client(number) for number in range(6)])) > 0
        assert cache.counters.misses > 9  # there was no room for all
        assert cache.counters.bytes <= 600_000


@pytest.mark.parametrize("kind", KINDS)
async def test_two_versions_are_told_apart_by_what_the_proxy_says_of_them(kind: str) -> None:
    """They have a size and a Last-Modified in common, as those of reproducible builds have."""
    version = 1

    def make(name: str) -> dv.VirtualFile:
        tag = dv.ETag(f"v{version}")
        return dv.VirtualFile(f"{version}23456", name=name, etag=tag, last_modified=1_700_000_000, max_age=0)

    async with serving(kind, make) as (port, _, cache):
        validators: list[str] = []
        for version in (1, 2):
            for _ in range(2):
                answer = await ask(port, "/a.txt", headers={"Range": "bytes=0-"})
                for fetch in list(cache._running):
                    await asyncio.wait([fetch.task])
            answer = await ask(port, "/a.txt")
            assert answer.body == f"{version}23456".encode()
            validators.append(answer.headers["etag"])
        assert len(set(validators)) == 2
        resumed = await ask(port, "/a.txt", headers={"Range": "bytes=1-", "If-Range": validators[0]})
        assert (resumed.status, resumed.body) == (200, b"223456")
        assert (await ask(port, "/a.txt", headers={"If-None-Match": validators[0]})).status == 200
