"""`OffloadMiddleware(pathsend=True)`: files of applications that know nothing of this library, on real servers."""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import pytest
import pytest_asyncio
from fastapi import BackgroundTasks, Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.holding import PATIENCE
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.testing import call
from tests.asgi.foreign_app import APPS, Spy, starlette_app
from tests.asgi.ways import WAYS
from tests.descriptors import open_paths
from tests.live import Answer, Watched, ask, live, make_old
from tests.proxies.servers import KINDS, proxy, readable_directory

pytestmark = pytest.mark.asyncio

PROTOCOLS = {"stock": "h11", "httptools": "httptools", "ours": DownloadProtocol}
CONTENT = os.urandom(300_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    (files / "sub").mkdir(parents=True)
    for name in ("file.txt", "a b%20?.txt", "sub/file.txt"):
        (files / name).write_bytes(CONTENT)
    (files / "empty.txt").touch()
    (files / "small.txt").write_bytes(b"small")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "file.txt").write_bytes(b"private")
    (files / "link.txt").symlink_to(tmp_path / "private" / "file.txt")
    for name in ("file.txt", "a b%20?.txt", "sub/file.txt", "empty.txt", "small.txt"):
        os.utime(files / name, (1_700_000_000, 1_700_000_000))  # a second that is over: it has a Last-Modified
    return files


@pytest.fixture(params=list(PROTOCOLS))
def protocol(request: pytest.FixtureRequest) -> object:
    return PROTOCOLS[request.param]


def offloading(app: ASGIApp, root: Path, target: str = "/_files/") -> ASGIApp:
    return dv.OffloadMiddleware(app, dv.XAccelRedirect([dv.Rule(str(root), target)]), pathsend=True)


@asynccontextmanager
async def serving(app: ASGIApp, protocol: object) -> AsyncIterator[int]:
    async with live(app, http=protocol) as port:
        yield port


def assert_streamed(answer: Answer, content: bytes = CONTENT) -> None:
    assert not OFFLOAD_HEADERS & {*answer.headers}
    assert (answer.status, answer.complete, answer.body == content) == (200, True, True)


# --- what is offloaded

WHERE = ["file", "static", "gzip", "basehttp", "all", "nested/a/b/c"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["file.txt", "a b%20?.txt", "sub/file.txt", "small.txt", "empty.txt"])
async def test_files_of_starlette_are_offloaded(root: Path, protocol: object, where: str, name: str) -> None:
    async with serving(starlette_app(root), protocol) as port:
        plain = await ask(port, f"/{where}/{quote(name)}")
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        answer = await ask(port, f"/{where}/{quote(name)}", headers={"Accept-Encoding": "gzip"})
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers.pop("x-accel-redirect") == f"/_files/{quote(name)}"
    assert answer.headers.pop("content-length") == "0"
    assert {**answer.headers, "date": ""} == {
        name: "" if name == "date" else value
        for name, value in plain.headers.items()
        if name not in ("content-length", "accept-ranges")
        and (name, value.lower()) != ("vary", "accept-encoding")  # of Starlette's gzip, which leaves path sends alone
    }


@pytest.mark.parametrize(
    "framework, path",
    [("fastapi", "/file/file.txt"), ("fastapi", "/static/file.txt"), ("litestar", "/static/file.txt")],
)
async def test_files_of_frameworks_are_offloaded(root: Path, protocol: object, framework: str, path: str) -> None:
    async with serving(offloading(APPS[framework](root), root), protocol) as port:
        answer = await ask(port, path)
        head = await ask(port, path, method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["x-accel-redirect"] == "/_files/file.txt"
    assert answer.headers["etag"]
    assert "x-accel-redirect" not in head.headers  # the framework answers that without a path send


async def test_a_file_of_litestar_itself_is_no_path_send(root: Path, protocol: object) -> None:
    async with serving(offloading(APPS["litestar"](root), root), protocol) as port:
        answer = await ask(port, "/own/file.txt")
    assert_streamed(answer)
    assert "mine.txt" in answer.headers["content-disposition"]


# --- what is not


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
async def test_ranges_that_the_application_has_evaluated(root: Path, protocol: object, framework: str) -> None:
    async with serving(offloading(APPS[framework](root), root), protocol) as port:
        part = await ask(port, "/file/file.txt", headers={"Range": "bytes=10-99"})
        parts = await ask(port, "/file/file.txt", headers={"Range": "bytes=0-9,20-29"})
        beyond = await ask(port, "/file/file.txt", headers={"Range": "bytes=999999-"})
        whole = await ask(port, "/file/file.txt", headers={"Range": "bytes=10-99", "If-Range": '"another"'})
        head = await ask(port, "/file/file.txt", method="HEAD")
    assert (part.status, part.body) == (206, CONTENT[10:100])
    assert part.headers["content-range"] == f"bytes 10-99/{len(CONTENT)}"
    assert (parts.status, parts.complete) == (206, True)
    assert beyond.status == 416
    assert whole.headers["x-accel-redirect"] == "/_files/file.txt"
    assert (head.status, head.headers.get("content-length")) in ((200, str(len(CONTENT))), (405, "31"))
    for answer in (part, parts, beyond, head):
        assert not OFFLOAD_HEADERS & {*answer.headers}


async def test_a_condition_that_the_application_has_evaluated(root: Path, protocol: object) -> None:
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        etag = (await ask(port, "/static/file.txt")).headers["etag"]
        answer = await ask(port, "/static/file.txt", headers={"If-None-Match": etag})
        missing = await ask(port, "/static/none.txt")
    assert (answer.status, answer.body) == (304, b"")
    assert missing.status == 404
    assert not OFFLOAD_HEADERS & {*answer.headers, *missing.headers}


@pytest.mark.parametrize("where", WHERE)
async def test_a_file_without_a_rule_is_sent_by_us_or_by_the_server(
    root: Path, tmp_path: Path, protocol: object, where: str
) -> None:
    spy = Spy(offloading(starlette_app(root), tmp_path / "elsewhere"))
    async with serving(spy, protocol) as port:
        answer = await ask(port, f"/{where}/file.txt")
        empty = await ask(port, f"/{where}/empty.txt")
    assert_streamed(answer)
    assert_streamed(empty, b"")
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert len(spy.path_sends) == (2 if protocol is DownloadProtocol else 0)


@pytest.mark.parametrize(
    "path, body, status", [("/teapot/file.txt", CONTENT, 418), ("/encoded/file.txt", CONTENT, 200)]
)
async def test_only_a_plain_200_is_offloaded(root: Path, protocol: object, path: str, body: bytes, status: int) -> None:
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        answer = await ask(port, path)
    assert (answer.status, answer.body == body) == (status, True)
    assert not OFFLOAD_HEADERS & {*answer.headers}


LENGTH = {"content-length": str(len(CONTENT))}


@pytest.mark.parametrize(
    "method, said, offloaded",
    [
        ("GET", LENGTH, True),
        ("HEAD", LENGTH, True),
        ("POST", LENGTH, False),
        ("GET", {**LENGTH, "status": "201"}, False),
        ("GET", {**LENGTH, "status": "206", "content-range": "bytes 0-299999/300000"}, False),
        ("GET", {**LENGTH, "content-range": "bytes 0-299999/300000"}, False),
        ("GET", {**LENGTH, "Content-Encoding": "x-none"}, False),
        ("GET", {**LENGTH, "path": "{root}/sub/../file.txt"}, False),
        ("GET", {**LENGTH, "path": "{root}/sub/../sub/file.txt"}, False),
        ("GET", {**LENGTH, "path": "{root}/./file.txt"}, False),
        ("GET", {**LENGTH, "path": "{root}//file.txt"}, False),
        ("GET", {**LENGTH, "path": "{relative}/file.txt"}, False),
        ("HEAD", {**LENGTH, "path": "{relative}/file.txt"}, False),
        ("GET", {}, False),  # without a length
        ("HEAD", {}, False),
    ],
)
async def test_what_a_path_send_has_to_be_to_be_offloaded(
    root: Path, protocol: object, method: str, said: dict[str, str], offloaded: bool
) -> None:
    relative = os.path.relpath(root)
    query = urlencode({name: value.format(root=root, relative=relative) for name, value in said.items()})
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        answer = await ask(port, f"/raw/?{query}", method=method)
    assert answer.status == int(said.get("status", 200))
    assert bool(OFFLOAD_HEADERS & {*answer.headers}) == offloaded
    assert (answer.complete, answer.body == (b"" if offloaded or method == "HEAD" else CONTENT)) == (True, True)


async def test_a_link_is_matched_by_its_own_path(root: Path, tmp_path: Path, protocol: object) -> None:
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        assert (await ask(port, "/file/link.txt")).headers["x-accel-redirect"] == "/_files/link.txt"
    async with serving(offloading(starlette_app(root), tmp_path / "private"), protocol) as port:
        assert_streamed(await ask(port, "/file/link.txt"), b"private")


# --- exactly the promised bytes


@pytest.mark.parametrize("where", ["file", "basehttp", "all"])
async def test_a_file_that_changes_is_cut_or_aborted(root: Path, tmp_path: Path, protocol: object, where: str) -> None:
    file = root / "file.txt"

    class Meddling:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app
            self.content = b""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def meddling(message: Message) -> None:
                if message["type"] == "http.response.pathsend":
                    file.write_bytes(self.content)
                await send(message)

            await self.app(scope, receive, meddling)

    meddling = Meddling(starlette_app(root))
    async with serving(offloading(meddling, tmp_path / "elsewhere"), protocol) as port:
        meddling.content = CONTENT * 2
        grown = await ask(port, f"/{where}/file.txt")
        file.write_bytes(CONTENT)
        meddling.content = CONTENT[:70_000]
        shrunk = await ask(port, f"/{where}/file.txt")
    assert_streamed(grown)
    assert (shrunk.status, shrunk.complete) == (200, False)
    assert CONTENT.startswith(shrunk.body)


async def test_a_file_that_is_gone_is_a_404_while_it_can_be(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query = urlencode({"path": str(root / "none.txt"), **LENGTH})
    with caplog.at_level(logging.INFO, "downloadview_async"):
        async with serving(offloading(starlette_app(root), tmp_path / "elsewhere"), "h11") as port:
            answer = await ask(port, f"/raw/?{query}")
            unframed = await ask(port, f"/raw/?{urlencode({'path': str(root / 'none.txt')})}")
    assert (answer.status, answer.body) == (404, b"Not Found")
    assert not unframed.complete
    assert "none.txt" in caplog.text


async def test_a_client_who_leaves_ends_the_stream(root: Path, tmp_path: Path) -> None:
    (root / "huge.bin").touch()
    os.truncate(root / "huge.bin", 1 << 32)
    watched = Watched(offloading(FileResponse(root / "huge.bin"), tmp_path / "elsewhere"))
    async with serving(watched, "httptools") as port:
        await watched.ends_when_the_client_leaves(port, "/")
    assert not [path for path in open_paths() if path.endswith("huge.bin")]


def descriptors(root: Path) -> list[str]:
    return [path for path in open_paths() if path == str(root / "file.txt")]


# --- orders


async def test_an_order_of_the_application_is_dropped(
    root: Path, protocol: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        answer = await ask(port, "/ordering")
        raw = await ask(port, f"/raw/?{urlencode({**LENGTH, 'X-Sendfile': '/etc/passwd', 'path': '/dev/null'})}")
    assert (answer.status, answer.body) == (200, b"mine")
    assert OFFLOAD_HEADERS & {*answer.headers} == {"x-accel-buffering"}  # which names no file
    assert not OFFLOAD_HEADERS & {*raw.headers}
    warnings = [record.message for record in caplog.records if "is dropped" in record.message]
    assert len(warnings) == 2
    assert "the application's x-accel-redirect, x-sendfile is dropped" in warnings[0]


async def test_without_path_send_no_message_is_touched(root: Path, protocol: object) -> None:
    backend = dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])
    async with serving(dv.OffloadMiddleware(starlette_app(root), backend), protocol) as port:
        assert (await ask(port, "/ordering")).headers["x-accel-redirect"] == "/_files/other.txt"
        assert_streamed(await ask(port, "/file/file.txt"))


@pytest.mark.parametrize("where", ["refused", "restated", "ours-restated"])
async def test_a_403_that_takes_the_place_of_a_file_carries_no_order(root: Path, protocol: object, where: str) -> None:
    async with serving(offloading(starlette_app(root), root), protocol) as port:
        answer = await ask(port, f"/{where}/file.txt")
    assert answer.status == 403
    assert not OFFLOAD_HEADERS & {*answer.headers}


async def test_a_stream_begins_at_once(root: Path) -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"x"})

    async with serving(offloading(app, root), "h11") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        go_on.set()
        assert b"x" in await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
        writer.close()


async def test_other_messages_pass(root: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        if scope["path"] == "/body":
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b"b"})

    async with serving(offloading(app, root), "h11") as port:
        assert (await ask(port, "/body")).body == b"ab"
        assert not (await ask(port, "/nothing")).complete


# --- ours, and others further out


@pytest.mark.parametrize("inner_takes_path_sends", [True, False])
async def test_the_innermost_middleware_decides(root: Path, protocol: object, inner_takes_path_sends: bool) -> None:
    sub = dv.XAccelRedirect([dv.Rule(str(root / "sub"), "/_inner/")])
    inner = dv.OffloadMiddleware(starlette_app(root), sub, pathsend=inner_takes_path_sends)
    async with serving(offloading(inner, root, "/_outer/"), protocol) as port:
        ours = await ask(port, "/ours/sub/file.txt")
        assert ours.headers["x-accel-redirect"] == "/_inner/file.txt"
        assert_streamed(await ask(port, "/ours/file.txt"))
        foreign = await ask(port, "/file/sub/file.txt")
        elsewhere = await ask(port, "/file/file.txt")
    if inner_takes_path_sends:
        assert foreign.headers["x-accel-redirect"] == "/_inner/file.txt"
        assert_streamed(elsewhere)
    else:
        assert foreign.headers["x-accel-redirect"] == "/_outer/sub/file.txt"
        assert elsewhere.headers["x-accel-redirect"] == "/_outer/file.txt"


@pytest.mark.parametrize("reached", [True, False])
async def test_our_own_responses_are_as_before(root: Path, tmp_path: Path, protocol: object, reached: bool) -> None:
    app = starlette_app(root)
    backend = dv.XAccelRedirect([dv.Rule(str(root if reached else tmp_path / "elsewhere"), "/_files/")])
    answers: list[list[Answer]] = []
    for middleware in (dv.OffloadMiddleware(app, backend), dv.OffloadMiddleware(app, backend, pathsend=True)):
        async with serving(middleware, protocol) as port:
            answers.append(
                [
                    await ask(port, "/ours/file.txt"),
                    await ask(port, "/ours/small.txt"),
                    await ask(port, "/ours/file.txt", method="HEAD"),
                    await ask(port, "/ours/file.txt", headers={"Range": "bytes=7-"}),
                    await ask(port, "/ours/none.txt"),
                ]
            )
    for before, after in zip(*answers, strict=True):
        assert {**before.headers, "date": ""} == {**after.headers, "date": ""}
        assert (before.status, before.body == after.body, after.complete) == (after.status, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["path send, granian", "chunks, hypercorn"])
@pytest.mark.parametrize("reached", [True, False])
async def test_other_servers(root: Path, tmp_path: Path, server: str, reached: bool) -> None:
    env = {"FOREIGN_ROOT": str(root), "FOREIGN_RULE": str(root if reached else tmp_path / "elsewhere")}
    with WAYS[server].serving("tests.asgi.foreign_app:make_app", log=tmp_path / "log", env=env) as running:
        assert isinstance(running.address, int)
        for where in ("file", "static", "all"):
            answer = await ask(running.address, f"/{where}/file.txt")
            if reached:
                assert (answer.status, answer.body) == (200, b"")
                assert answer.headers["x-accel-redirect"] == "/_files/file.txt"
            else:
                assert_streamed(answer)
        assert_streamed(await ask(running.address, "/encoded/file.txt"))


# --- behind the real proxy


@pytest_asyncio.fixture(params=["starlette", "fastapi", "litestar"])
async def behind_nginx(request: pytest.FixtureRequest) -> AsyncIterator[int]:
    with readable_directory() as checkout:
        files = checkout / "app" / "files"
        files.mkdir(parents=True)
        (files / "file.txt").write_bytes(CONTENT)
        os.utime(files / "file.txt", (1_700_000_000, 1_700_000_000))
        async with live(offloading(APPS[request.param](files), files)) as service:
            with proxy(KINDS["nginx"], checkout, service) as port:
                yield port


async def test_nginx_sends_the_files_of_an_application_that_exists(behind_nginx: int) -> None:
    path = "/static/file.txt"
    answer = await ask(behind_nginx, path)
    assert_streamed(answer)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["last-modified"] == formatdate(1_700_000_000, usegmt=True)
    etag = answer.headers["etag"]
    part = await ask(behind_nginx, path, headers={"Range": "bytes=10-99"})
    assert (part.status, part.body) == (206, CONTENT[10:100])
    # nginx's own tag: the application finds that it is none of its own, sends the whole, and nginx knows it
    resumed = await ask(behind_nginx, path, headers={"Range": "bytes=100-", "If-Range": etag})
    assert (resumed.status, resumed.body == CONTENT[100:]) == (206, True)
    current = await ask(behind_nginx, path, headers={"If-None-Match": etag})
    assert (current.status, current.body) == (304, b"")
    head = await ask(behind_nginx, path, method="HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(len(CONTENT)))
    for got in (answer, part, resumed, current, head):
        assert not OFFLOAD_HEADERS & {*got.headers}
    assert (await ask(behind_nginx, "/_files/file.txt")).status == 404


# --- files that go away after the answer


def deleting(files: Path, kind: str) -> ASGIApp:
    """An application whose answers delete their files: by a background task, at once or after a while."""

    async def endpoint(request: Request) -> Response:
        path = files / request.path_params["name"]
        path.write_bytes(CONTENT)
        event = asyncio.Event()

        async def delete() -> None:
            path.unlink()

        async def delete_later() -> None:
            asyncio.get_running_loop().call_later(2 * PATIENCE, event.set)
            await event.wait()
            path.unlink(missing_ok=True)

        if kind == "ours":
            return dv.DownloadResponse(dv.LocalFile(path), background=BackgroundTask(delete))
        return FileResponse(path, background=BackgroundTask(delete_later if kind == "slow" else delete))

    return Starlette(routes=[Route("/{name}", endpoint)])


def with_a_dependency(files: Path, kind: str) -> ASGIApp:
    """An application of FastAPI's whose dependency, or background task, deletes the file."""
    app = FastAPI()

    def temporary() -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(dir=files))
        directory.chmod(0o755)
        (directory / "a.bin").write_bytes(CONTENT)
        yield directory / "a.bin"
        shutil.rmtree(directory, ignore_errors=True)

    @app.api_route("/{name}", methods=["GET", "HEAD"])
    def endpoint(name: str, background_tasks: BackgroundTasks, path: Annotated[Path, Depends(temporary)]) -> Response:
        if kind.startswith("task"):
            background_tasks.add_task(path.unlink)
        if kind.endswith("foreign"):
            return FileResponse(path)
        return dv.DownloadResponse(dv.LocalFile(path))

    return app


@pytest.mark.parametrize("pathsend", [True, False])
@pytest.mark.parametrize("kind", ["yield ours", "yield foreign", "task ours", "task foreign"])
async def test_a_file_that_fastapi_deletes_after_its_answer_arrives(kind: str, pathsend: bool, tmp_path: Path) -> None:
    app = with_a_dependency(tmp_path, kind)
    backend = dv.XAccelRedirect([dv.Rule(str(tmp_path), "/_files/")])
    async with live(dv.OffloadMiddleware(Adding(app), backend, pathsend=pathsend)) as port:
        answer = await ask(port, "/a", headers={"Range": "bytes=10-99"} if "ours" in kind else {})
        assert answer.headers["x-added"] == "yes"
        if "ours" in kind:
            assert (answer.status, answer.body) == (206, CONTENT[10:100])
        else:
            assert_streamed(answer)
        head = await ask(port, "/a", method="HEAD")
        assert (head.status, head.headers["content-length"], head.body) == (200, str(len(CONTENT)), b"")
        assert not OFFLOAD_HEADERS & {*head.headers, *answer.headers}


class Adding:
    """A middleware that adds a header field, and sends each body in two messages, as Starlette's BaseHTTPMiddleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-added", b"yes")]}
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, receive, adding)


async def test_what_is_lent_is_closed(root: Path) -> None:
    """However an application ends, and whatever becomes of its answer."""
    ours = ours_of(root)

    async def raises_after(scope: Scope, receive: Receive, send: Send) -> None:
        await ours(scope, receive, send)
        raise RuntimeError("after the answer")

    async def raises_between(scope: Scope, receive: Receive, send: Send) -> None:
        async def only_start(message: Message) -> None:
            if message["type"] == "http.response.body":
                raise RuntimeError("in the midst of the answer")
            await send(message)

        await ours(scope, receive, only_start)

    for app in (ours, raises_after, raises_between, hanging(root), Restating(ours, 403), Adding(ours)):
        with contextlib.suppress(RuntimeError, TimeoutError):
            await asyncio.wait_for(call(dv.OffloadMiddleware(app, BACKENDS["nginx"](root)), "/file.txt"), 0.05)
        assert descriptors(root) == []


def ours_of(root: Path) -> ASGIApp:
    async def response(scope: Scope, receive: Receive, send: Send) -> None:
        await dv.DownloadResponse(dv.LocalFile(root / "file.txt"))(scope, receive, send)

    return response


def hanging(root: Path) -> ASGIApp:
    async def hangs(scope: Scope, receive: Receive, send: Send) -> None:
        await ours_of(root)(scope, receive, send)
        await asyncio.Event().wait()

    return hangs


async def test_a_cancelled_application_sends_nothing_later(root: Path) -> None:
    """Not from a descriptor that is another file's by then."""
    sent: list[Message] = []

    async def slow() -> None:
        await asyncio.sleep(10)

    for response in (FileResponse(root / "file.txt", background=BackgroundTask(slow)), hanging(root)):
        app = dv.OffloadMiddleware(response, BACKENDS["nginx"](root), pathsend=True)

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        scope = {"type": "http", "method": "GET", "path": "/file.txt", "headers": [], "query_string": b""}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(app(scope, receive, send), PATIENCE / 2)
        assert descriptors(root) == []
        loop = asyncio.get_running_loop()
        later = loop.create_future()
        loop.call_later(2 * PATIENCE, later.set_result, None)
        await later
        assert sent == []


def unlink(path: Path) -> None:
    path.unlink()


def move(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))


def replace_it(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"new")
    path.with_suffix(".new").rename(path)


def drop_one_of_two_links(path: Path) -> None:
    path.with_suffix(".link").hardlink_to(path)
    path.unlink()


def move_its_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


@pytest.mark.parametrize("take_away", [unlink, move, replace_it, drop_one_of_two_links, move_its_directory])
@pytest.mark.parametrize("kind", ["ours", "foreign", "ours, nested", "foreign, nested"])
async def test_a_file_that_has_left_its_place_when_the_application_returns_is_sent_by_us(
    tmp_path: Path, take_away: Callable[[Path], None], kind: str
) -> None:
    directory = tmp_path / "files" / "sub"
    directory.mkdir(parents=True)
    path = directory / "a.bin"
    path.write_bytes(CONTENT)
    make_old(directory)
    response: ASGIApp = dv.DownloadResponse(dv.LocalFile(path)) if "ours" in kind else FileResponse(path)

    async def taking_away(scope: Scope, receive: Receive, send: Send) -> None:
        inside = offloading(response, tmp_path / "files") if "nested" in kind else response
        await inside(scope, receive, send)
        take_away(path)

    async with live(offloading(taking_away, tmp_path / "files")) as port:
        assert_streamed(await ask(port, "/"))


class Replacing:
    """Pure ASGI middleware that replaces, removes and adds fields, in the spelling that many clients expect."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def replacing(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name.title(), value) for name, value in message["headers"] if name.lower() not in REPLACED]
                changed = [(b"Cache-Control", b"private, no-store"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2")]
                message = {**message, "headers": [*kept, *changed]}
            await send(message)

        await self.app(scope, receive, replacing)


REPLACED = {b"cache-control", b"etag"}


class InPlace(BaseHTTPMiddleware):
    """Starlette's own kind of middleware, which changes the very list of fields."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["Cache-Control"] = "private, no-store"
        del response.headers["etag"]
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response


@pytest.mark.parametrize("middleware", [Replacing, InPlace])
@pytest.mark.parametrize("nested", [False, True])
async def test_what_middleware_makes_of_the_fields_stays_where_we_send_the_file_after_all(
    root: Path, middleware: Any, nested: bool
) -> None:
    path = root / "a.bin"
    path.write_bytes(CONTENT)
    make_old(root)
    response = dv.DownloadResponse(dv.LocalFile(path), headers={"Cache-Control": "public, max-age=600"})
    inside = offloading(response, root) if nested else response
    changed: ASGIApp = middleware(inside)

    async def deleting_it(scope: Scope, receive: Receive, send: Send) -> None:
        await changed(scope, receive, send)
        path.unlink()

    async with live(offloading(deleting_it, root)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    fields = [line.partition(b": ")[::2] for line in head.split(b"\r\n")[1:]]
    values: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        values.setdefault(name.lower(), []).append(value)
    assert body == CONTENT
    assert values[b"cache-control"] == [b"private, no-store"]
    assert [value.partition(b";")[0] for value in values[b"set-cookie"]] == [b"a=1", b"b=2"]
    assert b"etag" not in values
    assert values[b"content-length"] == [str(len(CONTENT)).encode()]
    assert b"x-accel-redirect" not in values


@pytest.mark.parametrize("kind", ["ours", "foreign"])
async def test_an_application_that_answers_twice_leaves_nothing_open(root: Path, kind: str) -> None:
    file = root / "file.txt"
    response: ASGIApp = dv.DownloadResponse(dv.LocalFile(file)) if kind == "ours" else FileResponse(file)

    async def twice(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            await response(scope, receive, send)

    async with live(offloading(twice, root)) as port:
        for _ in range(3):
            assert "x-accel-redirect" in (await ask(port, "/")).headers
    assert descriptors(root) == []


@pytest.mark.parametrize("offload", [None, True], ids=["a Download", "an answer that promises it"])
async def test_an_answer_whose_file_stays_waits_for_nothing(root: Path, offload: bool | None) -> None:
    sent: list[Message] = []
    answered = asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            answered.set()

    async def never() -> Message:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def hangs(scope: Scope, receive: Receive, send: Send) -> None:
        if offload is None:
            await dv.Download(dv.PathSource(root))(scope, receive, send)
        else:
            await dv.DownloadResponse(dv.LocalFile(root / "file.txt"), offload=offload)(scope, receive, send)
        await never()

    scope = {"type": "http", "method": "GET", "path": "/file.txt", "headers": [], "query_string": b""}
    serving = asyncio.create_task(dv.OffloadMiddleware(hangs, BACKENDS["nginx"](root))(scope, never, send))
    await answered.wait()
    assert b"x-accel-redirect" in dict(sent[0]["headers"])
    serving.cancel()
    await asyncio.wait([serving])


async def test_answers_that_wait_side_by_side_are_each_sent_in_time(root: Path) -> None:
    """One timer is for all of them: it has to be set again for those that came later."""
    loop = asyncio.get_running_loop()
    for _ in range(2):  # again, when nothing has waited for a while
        answered = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send, answered: asyncio.Event = answered) -> None:
            await ours_of(root)(scope, receive, send)
            await answered.wait()

        async with live(offloading(slow, root)) as port:

            async def one(delay: float, port: int = port) -> tuple[float, bytes]:
                later = loop.create_future()
                loop.call_later(delay, later.set_result, None)
                await later
                began = loop.time()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /file.txt HTTP/1.1\r\nHost: x\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(len(CONTENT))
                writer.close()
                assert b"x-accel-redirect" not in head.lower()
                return loop.time() - began, body

            answers = await asyncio.gather(*(one(PATIENCE * number / 2) for number in range(5)))
            answered.set()
        assert all(body == CONTENT for _, body in answers)
        assert all(seconds >= PATIENCE for seconds, _ in answers)


@pytest.mark.parametrize("kind", ["ours", "foreign", "slow"])
async def test_a_file_that_is_deleted_after_its_answer_arrives(kind: str) -> None:
    with readable_directory() as checkout:
        files = checkout / "app" / "files"
        files.mkdir(parents=True)
        app = deleting(files, kind)
        async with live(offloading(app, files)) as service:
            with proxy(KINDS["nginx"], checkout, service) as port:
                for number in range(40 if kind != "slow" else 5):
                    assert_streamed(await ask(port, f"/{number}.bin"))


async def test_a_background_task_keeps_a_proxy_out_unless_the_application_knows_better(root: Path) -> None:
    async def nothing() -> None: ...

    for offload, offloaded in ((None, False), (True, True), (False, False)):
        file = dv.LocalFile(root / "file.txt")
        app = offloading(dv.DownloadResponse(file, background=BackgroundTask(nothing), offload=offload), root)
        async with live(app) as port:
            answer = await ask(port, "/")
        assert ("x-accel-redirect" in answer.headers) is offloaded


async def test_an_offloaded_answer_leaves_though_the_background_task_fails(root: Path) -> None:
    async def fails() -> None:
        raise RuntimeError("after the answer")

    async def endpoint(request: Request) -> Response:
        return FileResponse(root / "file.txt", background=BackgroundTask(fails))

    async with live(offloading(Starlette(routes=[Route("/", endpoint)]), root)) as port:
        answer = await ask(port, "/")
    assert (answer.status, answer.headers["x-accel-redirect"]) == (200, "/_files/file.txt")


class Restating:
    """A middleware that changes the status of every answer, and leaves its headers as they are."""

    def __init__(self, app: ASGIApp, status: int) -> None:
        self.app = app
        self.status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def restated(message: Message) -> None:
            await send({**message, "status": self.status} if "status" in message else message)

        await self.app(scope, receive, restated)


BACKENDS: dict[str, Callable[[Path], dv.OffloadBackend]] = {
    "nginx": lambda root: dv.XAccelRedirect([dv.Rule(str(root), "/_files/")]),
    "apache": lambda root: dv.XSendfile([dv.Rule(str(root), str(root))], encoding="raw"),
    "h2o": lambda root: dv.XReproxyURL([dv.Rule(str(root), "/_files/")]),
}


@pytest.mark.parametrize("pathsend", [True, False])
@pytest.mark.parametrize("status", [200, 206, 304, 401, 403, 404, 500])
@pytest.mark.parametrize("kind", BACKENDS)
async def test_an_order_goes_with_any_status_but_the_one_it_was_made_for(
    root: Path, kind: str, status: int, pathsend: bool
) -> None:
    response = dv.Download(dv.PathSource(root))
    app = dv.OffloadMiddleware(Restating(response, status), BACKENDS[kind](root), pathsend=pathsend)
    for method in ("GET", "HEAD"):
        answer = await call(app, "/file.txt", method=method)
        assert bool(OFFLOAD_HEADERS & {*answer.headers}) is (status == 200)
        assert answer.status == status
    nested = dv.OffloadMiddleware(app, BACKENDS[kind](Path("/elsewhere")), pathsend=pathsend)
    assert bool(OFFLOAD_HEADERS & {*(await call(nested, "/file.txt")).headers}) is (status == 200)


@pytest.mark.parametrize("mtime", [0, 1, 315_532_800])
async def test_no_proxy_makes_a_validator_of_a_time_that_says_nothing(root: Path, mtime: int) -> None:
    os.utime(root / "file.txt", (mtime, mtime))
    for app in (dv.Download(dv.PathSource(root)), FileResponse(root / "file.txt")):
        for method in ("GET", "HEAD"):
            for _ in range(2):
                answer = await call(offloading(app, root), "/file.txt", method=method)
                assert not OFFLOAD_HEADERS & {*answer.headers}
                assert (answer.status, answer.body) == (200, CONTENT if method == "GET" else b"")


class OfNoKind:
    """A backend that is written by hand: no `ProxyKind` knows its header."""

    def headers_for(self, file: dv.AsyncFile) -> dict[str, str] | None:
        return {"x-file-location": f"/internal/{file.name}"}


async def test_a_backend_whose_header_no_proxy_kind_knows(root: Path) -> None:
    path = next(path for path in sorted(root.iterdir()) if path.is_file())
    app = dv.OffloadMiddleware(FileResponse(path), OfNoKind(), pathsend=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        answer = await call(app, "/")
        assert (answer.status, answer.headers["x-file-location"]) == (200, f"/internal/{path.name}")
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_held_file_that_cannot_be_sent_any_more_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"

    def vanish() -> None:
        os.truncate(file, 0)
        file.unlink()

    for make in (
        lambda: FileResponse(file, background=BackgroundTask(vanish)),
        lambda: Deleting(dv.DownloadResponse(dv.LocalFile(file)), vanish),
    ):
        file.write_bytes(bytes(100_000))
        os.utime(file, (1_700_000_000,) * 2)
        app = dv.OffloadMiddleware(make(), BACKENDS["nginx"](tmp_path), pathsend=True)
        answer = await call(app, "/")
        assert answer.status == 503


class Deleting:
    """An application that does something to its file once it has answered."""

    def __init__(self, app: Any, then: Callable[[], None]) -> None:
        self._app, self._then = app, then

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)
        self._then()


async def test_a_held_answer_that_we_send_describes_the_file_as_its_object_does(tmp_path: Path) -> None:
    @dataclass
    class Row:
        file: str = "a.bin"
        mime: str = "application/x-special"

    async def get(key: str) -> Row:
        return Row()

    (tmp_path / "a.bin").write_bytes(b"content")
    os.utime(tmp_path / "a.bin", (1_700_000_000,) * 2)
    source = dv.ObjectSource(get, source=dv.PathSource(tmp_path), file_field="file", mime_type_field="mime")

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        await dv.DownloadResponse(await source.resolve("key"))(scope, receive, send)

    app = dv.OffloadMiddleware(
        Deleting(endpoint, (tmp_path / "a.bin").unlink), dv.XAccelRedirect([dv.Rule(str(tmp_path), "/_f/")])
    )
    answer = await call(app, "/key")
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"content", "application/x-special")
