"""Each cell of the grid on real servers: what the client gets, and who has sent it."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx2
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.fields import OFFLOAD_HEADERS, OFFLOAD_TARGET
from tests.live import Answer, ask, live
from tests.proxies import grid
from tests.proxies.servers import KINDS, proxy, readable_directory
from tests.s3 import BUCKET, S3

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "50%25 of π.html"
TITLE = "Ein Bericht über π.html"
CONTENT = bytes(range(256)) * 1200 + b"the end"  # more than goes in one message
SIZE = len(CONTENT)
CACHE_CONTROL = "private, max-age=60"
OLD = [*grid.LOCAL, "remote"]
"""Rows whose files were last changed long ago. What has changed this very second need not be current."""

proven: set[str] = set()
"""Cells whose test has passed."""
unavailable: set[str] = set()
"""Columns whose proxy is not installed here."""


@dataclass
class Answered:
    """One answer as the application gave it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body_bytes: int = 0
    messages: set[str] = field(default_factory=set)


class Watch:
    """Keeps what the application has answered, to the proxy or to a client."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.answers: list[Answered] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = Answered()
        self.answers.append(answered)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                answered.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            else:
                answered.messages.add(message["type"])
                answered.body_bytes += len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, watched)


@dataclass
class Origin:
    """Counts what is asked of where the files come from: bytes sent to a server, or calls of a function."""

    asked: int = 0

    @asynccontextmanager
    async def before(self, port: int) -> AsyncIterator[int]:
        """Give a port that leads to another one, and count what goes there."""

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, count: bool) -> None:
            try:
                while block := await reader.read(1 << 16):
                    self.asked += len(block) if count else 0
                    writer.write(block)
                    await writer.drain()
            except ConnectionError:
                pass
            finally:
                writer.close()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from_there, to_there = await asyncio.open_connection("127.0.0.1", port)
            there = forward(reader, to_there, count=True)
            await asyncio.gather(there, forward(from_there, writer, count=False))

        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            yield server.sockets[0].getsockname()[1]


@dataclass
class Site:
    """An application and what is in front of it. `port` is the one that clients ask."""

    column: str
    port: int
    watch: Watch
    origins: Mapping[str, Origin]
    cache: dv.Cache | None = None

    async def settled(self) -> None:
        """Return when all that arrives in the cache is complete."""
        assert self.cache is not None
        for fetch in list(self.cache._running):
            await asyncio.wait([fetch.task])


@dataclass(frozen=True)
class Row:
    file: str
    title: str = TITLE


async def _row(key: str) -> Row:
    return Row(key)


@dataclass
class Far:
    """A source for each row of files that are not on a disk here, and the counter of what it asks."""

    sources: dict[str, dv.Source]
    origins: dict[str, Origin]
    lake: dv.ObjectStorage
    url: str
    """That of the other server's files, for a proxy that fetches by itself."""


@asynccontextmanager
async def _far(s3: S3) -> AsyncIterator[Far]:
    s3.put(f"grid/{NAME}", CONTENT, content_type="text/html; charset=utf-8")
    lake_origin, upstream_origin, function = Origin(), Origin(), Origin()

    def make(name: str) -> dv.VirtualFile:
        def pieces() -> Iterator[bytes]:
            function.asked += 1
            yield from (CONTENT[start : start + 50_000] for start in range(0, SIZE, 50_000))

        return dv.VirtualFile(pieces, name=name, max_age=3600)

    async with AsyncExitStack() as stack:
        lake_port = urlsplit(s3.url).port
        assert lake_port is not None
        lake_port = await stack.enter_async_context(lake_origin.before(lake_port))
        lake = s3.storage("grid", endpoint=f"http://127.0.0.1:{lake_port}")
        stack.push_async_callback(lake.aclose)
        files = stack.enter_context(readable_directory())
        _make_file(files)
        upstream = await stack.enter_async_context(
            live(Starlette(routes=[Route("/pub/{path:path}", dv.Download(dv.PathSource(files)))]))
        )
        upstream = await stack.enter_async_context(upstream_origin.before(upstream))
        url = f"http://127.0.0.1:{upstream}/pub/"
        remote = dv.RemoteSource(url, allow_hosts=["127.0.0.1"])
        stack.push_async_callback(remote.aclose)
        objects = dv.StorageSource(lake)
        sources: dict[str, dv.Source] = {
            "lake": objects,
            "lake-object": objects,
            "remote": remote,
            "virtual": dv.VirtualSource(make),
        }
        origins = {"lake": lake_origin, "lake-object": lake_origin, "remote": upstream_origin, "virtual": function}
        yield Far(sources, origins, lake, url)


def _watched(
    sources: Mapping[str, dv.Source], backend: dv.OffloadBackend | None = None, redirect: dv.Redirect | None = None
) -> Watch:
    """Return an application with two routes for each source, one of them for files that are shown inline."""

    def endpoint(row: str, source: dv.Source, *, attachment: bool) -> dv.Download:
        if row in ("object", "lake-object"):
            source = dv.ObjectSource(_row, source=source, file_field="file", basename_field="title")
        return dv.Download(source, attachment=attachment, cache_control=CACHE_CONTROL, redirect=redirect)

    routes = [Route(f"/{row}/{{path:path}}", endpoint(row, source, attachment=True)) for row, source in sources.items()]
    routes += [
        Route(f"/inline/{row}/{{path:path}}", endpoint(row, source, attachment=False))
        for row, source in sources.items()
    ]
    app: ASGIApp = Starlette(routes=routes)
    return Watch(app if backend is None else dv.OffloadMiddleware(app, backend))


def _make_file(directory: Path) -> None:
    (directory / NAME).write_bytes(CONTENT)
    os.utime(directory / NAME, (1_700_000_000, 1_700_000_000))


def _local_sources(files: Path) -> dict[str, dv.Source]:
    _make_file(files)
    source = dv.PathSource(files)
    return {"path": source, "storage": dv.StorageSource(dv.DirectoryStorage(files)), "object": source}


@asynccontextmanager
async def _behind_a_proxy_that_has_the_files(column: str, s3: S3) -> AsyncIterator[Site]:
    with readable_directory() as checkout:
        files = checkout / "app" / "files"
        files.mkdir(parents=True)
        watch = _watched(_local_sources(files), KINDS[column].backend(files))
        async with live(watch) as service:
            with proxy(KINDS[column], checkout, service) as port:
                yield Site(column, port, watch, {})


@asynccontextmanager
async def _behind_a_proxy_that_has_the_cache(column: str, s3: S3) -> AsyncIterator[Site]:
    """The configuration is that for any directory; here it is the cache's."""
    async with AsyncExitStack() as stack:
        checkout = stack.enter_context(readable_directory())
        cache = dv.Cache(checkout / "app" / "files")
        stack.push_async_callback(cache.aclose)
        far = await stack.enter_async_context(_far(s3))
        sources = {row: dv.CachedSource(source, cache, name=row) for row, source in far.sources.items()}
        watch = _watched(sources, KINDS[column].backend(Path(cache.path)))
        service = await stack.enter_async_context(live(watch))
        port = stack.enter_context(proxy(KINDS[column], checkout, service))
        yield Site(column, port, watch, far.origins, cache)


@asynccontextmanager
async def _behind_a_proxy_that_fetches(column: str, s3: S3) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        checkout = stack.enter_context(readable_directory())
        (checkout / "app" / "files").mkdir(parents=True)
        far = await stack.enter_async_context(_far(s3))
        rules = [dv.Rule(f"s3://{BUCKET}/grid", "/_lake/"), dv.Rule(far.url, "/_mirror/")]
        watch = _watched(far.sources, dv.XAccelRedirect(rules, storages=[far.lake]))
        service = await stack.enter_async_context(live(watch))
        text = partial(_text, column, rules, [far.lake])
        port = stack.enter_context(proxy(KINDS[column], checkout, service, text=text))
        yield Site(column, port, watch, far.origins)


def _text(kind: Any, rules: list[dv.Rule], storages: list[dv.ObjectStorage], service: str, listen: str) -> str:
    return dv.proxy_config(kind, rules, storages=storages, service=service, listen=listen)


@asynccontextmanager
async def _redirecting(column: str, s3: S3) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        far = await stack.enter_async_context(_far(s3))
        lake = s3.storage("grid")
        stack.push_async_callback(lake.aclose)
        sources = {row: dv.StorageSource(lake) for row in grid.LAKE}
        watch = _watched(sources, redirect=dv.PresignedRedirect(lake))
        yield Site(column, await stack.enter_async_context(live(watch)), watch, far.origins)


@asynccontextmanager
async def _alone(column: str, s3: S3) -> AsyncIterator[Site]:
    """Under the server that the service has."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(readable_directory())
        files = directory / "files"
        files.mkdir()
        cache = dv.Cache(directory / "cache")
        stack.push_async_callback(cache.aclose)
        far = await stack.enter_async_context(_far(s3))
        cached: dict[str, dv.Source] = {"cached": dv.CachedSource(far.sources["virtual"], cache, name="virtual")}
        watch = _watched(_local_sources(files) | far.sources | cached)
        port = await stack.enter_async_context(live(watch, http=DownloadProtocol))
        yield Site(column, port, watch, far.origins, cache)


SITES: dict[str, Callable[[str, S3], contextlib.AbstractAsyncContextManager[Site]]] = {
    grid.PROXY: _behind_a_proxy_that_has_the_files,
    grid.CACHE: _behind_a_proxy_that_has_the_cache,
    grid.FETCH: _behind_a_proxy_that_fetches,
    grid.REDIRECT: _redirecting,
    grid.ZERO_COPY: _alone,
    grid.RANGES: _alone,
    grid.ONCE: _alone,
}


class Sites:
    """Starts the site of a cell, and keeps it running for the next cell if that has the same one."""

    def __init__(self, s3: S3) -> None:
        self._s3 = s3
        self._stack = AsyncExitStack()
        self._running: tuple[tuple[str, str], Site] | None = None

    async def of(self, cell: grid.Cell) -> Site:
        """Return the running site of a cell."""
        place = _place(cell)
        if self._running is None or self._running[0] != place:
            await self.aclose()
            try:
                self._running = place, await self._stack.enter_async_context(SITES[place[1]](cell.column, self._s3))
            except pytest.skip.Exception:
                unavailable.add(cell.column)
                raise
        return self._running[1]

    async def aclose(self) -> None:
        self._running = None
        await self._stack.aclose()


def _place(cell: grid.Cell) -> tuple[str, str]:
    return cell.column, grid.ZERO_COPY if cell.column == "none" else cell.way


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sites(s3: S3) -> AsyncIterator[Sites]:
    sites = Sites(s3)
    yield sites
    await sites.aclose()


# --- what a client gets, whoever sends it


def _header(answer: Answer, name: str) -> str:
    return answer.headers.get(name, "")


def _assert_headers(site: Site, row: str, answer: Answer, *, inline: bool = False, by_name: bool = False) -> None:
    """by_name: for H2O, which makes the type of its own files by their name on the disk, and knows no HTML."""
    assert not OFFLOAD_HEADERS & {*answer.headers}
    expected_type = "application/octet-stream" if by_name else "text/html; charset=utf-8"
    assert _header(answer, "content-type") == expected_type
    title = TITLE if row in ("object", "lake-object") else NAME
    disposition = _header(answer, "content-disposition")
    assert disposition.startswith("inline;" if inline else "attachment;")
    assert unquote(disposition.rpartition("filename*=UTF-8''")[2]) == title
    assert _header(answer, "x-content-type-options") == "nosniff"
    assert _header(answer, "cache-control") == CACHE_CONTROL
    assert _header(answer, "content-security-policy") == ("sandbox; default-src 'none'" if inline else "")


async def _assert_right(site: Site, row: str, *, by_name: bool = False) -> None:
    """Ask for the file in every way, and look at what comes."""
    path = f"/{row}/{quote(NAME)}"
    whole = await ask(site.port, path)
    assert (whole.status, whole.body == CONTENT, whole.complete) == (200, True, True)
    assert _header(whole, "accept-ranges") == "bytes"
    _assert_headers(site, row, whole, by_name=by_name)

    head = await ask(site.port, path, method="HEAD")
    assert (head.status, head.body, _header(head, "content-length")) == (200, b"", str(SIZE))
    _assert_headers(site, row, head, by_name=by_name)

    part = await ask(site.port, path, headers={"Range": "bytes=1000-250000"})
    assert (part.status, part.body == CONTENT[1000:250001], part.complete) == (206, True, True)
    assert _header(part, "content-range") == f"bytes 1000-250000/{SIZE}"
    _assert_headers(site, row, part, by_name=by_name)
    last = await ask(site.port, path, headers={"Range": "bytes=-7", "If-Range": _header(whole, "etag")})
    assert (last.status, last.body) == (206, b"the end")

    conditions = {"If-None-Match": _header(whole, "etag")}
    if row in OLD:
        conditions["If-Modified-Since"] = _header(whole, "last-modified")
        # nginx, Caddy and H2O say when a file has come into a cache: by that they tell versions apart
        if site.cache is None:
            assert conditions["If-Modified-Since"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    for name, value in conditions.items():
        current = await ask(site.port, path, headers={name: value})
        assert (current.status, current.body) == (304, b""), name
        assert not OFFLOAD_HEADERS & {*current.headers}

    shown = await ask(site.port, f"/inline{path}")
    assert (shown.status, shown.body == CONTENT) == (200, True)
    _assert_headers(site, row, shown, inline=True, by_name=by_name)


# --- who has sent it


def _orders(answers: list[Answered]) -> list[str]:
    """Return what the application has told a proxy to send, and make sure that it has sent nothing itself."""
    assert [answered.body_bytes for answered in answers] == [0] * len(answers)
    assert {answered.status for answered in answers} == {200}
    orders = [{*answered.headers} & OFFLOAD_HEADERS - {OFFLOAD_TARGET} for answered in answers]
    assert {len(order) for order in orders} == {1}
    return [answered.headers[name] for answered, order in zip(answers, orders, strict=True) for name in order]


async def _sent_by_the_proxy(site: Site, row: str) -> None:
    before = len(site.watch.answers)
    await _assert_right(site, row, by_name=site.column == "h2o")
    assert len({*_orders(site.watch.answers[before:])}) == 1  # the same file each time


async def _fetched_by_the_proxy(site: Site, row: str) -> None:
    before, asked = len(site.watch.answers), site.origins[row].asked
    await _assert_right(site, row)
    answers = site.watch.answers[before:]
    heads = [answered for answered in answers if OFFLOAD_TARGET not in answered.headers]
    assert [answered.body_bytes for answered in heads] == [0]  # HEAD is the application's own
    answers.remove(heads[0])
    assert len({*_orders(answers)}) == 1
    assert site.origins[row].asked > asked


async def _sent_from_the_cache(site: Site, row: str) -> None:
    assert site.cache is not None
    path, before = f"/{row}/{quote(NAME)}", len(site.watch.answers)
    first = await ask(site.port, path)  # streamed, as it arrives
    assert (first.status, first.body == CONTENT, first.complete) == (200, True, True)
    _assert_headers(site, row, first)
    assert [answered.body_bytes for answered in site.watch.answers[before:]] == [SIZE]
    await site.settled()

    before, asked = len(site.watch.answers), site.origins[row].asked
    await _assert_right(site, row, by_name=site.column == "h2o")
    names = {order.rpartition("/")[2] for order in _orders(site.watch.answers[before:])}
    assert [(Path(site.cache.path) / name).read_bytes() == CONTENT for name in names] == [True]
    assert site.origins[row].asked == asked > 0


async def _sent_by_the_store(site: Site, row: str) -> None:
    path, before = f"/{row}/{quote(NAME)}", len(site.watch.answers)
    answer = await ask(site.port, path)
    assert (answer.status, answer.body) == (307, b"")
    assert _header(answer, "cache-control") == "private, max-age=300"
    assert [answered.body_bytes for answered in site.watch.answers[before:]] == [0]
    url = _header(answer, "location")
    async with httpx2.AsyncClient() as client:
        whole = await client.get(url)
        assert (whole.status_code, whole.content == CONTENT) == (200, True)
        title = TITLE if row == "lake-object" else NAME
        assert whole.headers["content-type"] == "text/html; charset=utf-8"
        assert unquote(whole.headers["content-disposition"]).endswith(f"filename*=UTF-8''{title}")
        assert whole.headers["content-disposition"].startswith("attachment;")
        assert whole.headers["cache-control"] == CACHE_CONTROL
        part = await client.get(url, headers={"Range": "bytes=1000-1999"})
        assert (part.status_code, part.content) == (206, CONTENT[1000:2000])
        current = await client.get(url, headers={"If-None-Match": whole.headers["etag"]})
        assert current.status_code == 304

    head = await ask(site.port, path, method="HEAD")  # ours
    assert (head.status, _header(head, "etag")) == (200, whole.headers["etag"])
    _assert_headers(site, row, head)
    shown = await ask(site.port, f"/inline{path}")  # what a browser might run is ours to send, with its sandbox
    assert (shown.status, shown.body == CONTENT) == (200, True)
    _assert_headers(site, row, shown, inline=True)


async def _sent_by_the_kernel(site: Site, row: str) -> None:
    before = len(site.watch.answers)
    await _assert_right(site, row)
    answers = [answered for answered in site.watch.answers[before:] if answered.status != 304]
    sent = ["http.response.pathsend" in answered.messages for answered in answers]
    assert sent == [True, False, True, False, True]  # not for HEAD, and not for seven bytes
    assert [answered.body_bytes for answered in answers] == [0, 0, 0, 7, 0]


async def _streamed_in_ranges(site: Site, row: str) -> None:
    before = len(site.watch.answers)
    await _assert_right(site, row)
    lengths = [answered.body_bytes for answered in site.watch.answers[before:]]
    assert lengths[:4] == [SIZE, 0, 249_001, 7]


async def _streamed_and_in_ranges_once_cached(site: Site, row: str) -> None:
    answer = await ask(site.port, f"/{row}/{quote(NAME)}", headers={"Range": "bytes=0-3"})
    assert (answer.status, answer.body == CONTENT, answer.complete) == (200, True, True)
    _assert_headers(site, row, answer)
    first = await ask(site.port, f"/cached/{quote(NAME)}", headers={"Range": "bytes=0-3"})
    assert (first.status, first.body) == (206, CONTENT[:4])
    await site.settled()
    made = site.origins[row].asked
    await _sent_by_the_kernel(site, "cached")
    assert site.origins[row].asked == made


PROOFS: dict[str, Callable[[Site, str], Awaitable[None]]] = {
    grid.PROXY: _sent_by_the_proxy,
    grid.FETCH: _fetched_by_the_proxy,
    grid.CACHE: _sent_from_the_cache,
    grid.REDIRECT: _sent_by_the_store,
    grid.ZERO_COPY: _sent_by_the_kernel,
    grid.RANGES: _streamed_in_ranges,
    grid.ONCE: _streamed_and_in_ranges_once_cached,
}


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.id) for cell in sorted(grid.CELLS, key=_place)])
async def test_a_cell(sites: Sites, cell: grid.Cell) -> None:
    await PROOFS[cell.way](await sites.of(cell), cell.row)
    proven.add(cell.id)


async def test_every_claim_was_proven_in_this_run(request: pytest.FixtureRequest) -> None:
    config = request.config
    is_part = any("::" in argument or argument.endswith(".py") for argument in config.args)
    if is_part or config.option.keyword or config.getoption("lf", False):
        return  # a part of the tests was asked for
    collected = [item.name for item in request.session.items if item.path.name == "test_grid.py"]
    claimed = {cell.id for cell in grid.CELLS if cell.column not in unavailable}
    assert {f"test_a_cell[{cell.id}]" for cell in grid.CELLS} <= {*collected}
    assert claimed - proven == set()
