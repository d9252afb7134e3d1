"""What the zero-copy protocol knows of uvicorn beyond its documentation: each name, and what it relies on it to mean.

A uvicorn that changes one of them fails here by its name. A new one in `asgi/uvicorn/` needs a test here, too, and a
line in `asgi/uvicorn/internals.py`.
"""

import ast
import asyncio
import functools
import inspect
import logging
import re
import socket
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from downloadview_async.asgi.uvicorn import internals, sendfile
from downloadview_async.asgi.uvicorn.cycle import DownloadCycle
from downloadview_async.asgi.uvicorn.protocol import DownloadProtocol
from tests.live import ask, ask_raw, live, parse

LOOPS = ["asyncio", "uvloop"]
MODULES = sorted(Path(internals.__file__).parent.glob("*.py"))
TESTED: set[str] = set()
T = TypeVar("T")

Talk = Callable[[Any, Receive, Send], Awaitable[None]]


def relies_on(*names: str) -> Callable[[T], T]:
    """Say which inner parts a test is about."""
    TESTED.update(names)
    return lambda test: test


def base() -> HttpToolsProtocol:
    """Return a protocol of uvicorn's as it is before it has a connection."""
    config = uvicorn.Config(lambda: None, log_config=None)
    with asyncio.Runner() as runner:
        protocol = HttpToolsProtocol(config, uvicorn.server.ServerState(), {}, runner.get_loop())
    protocol.on_message_begin()  # it makes some of the names
    return protocol


class Probe(HttpToolsProtocol):
    """uvicorn's own protocol, which writes down what is called of it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.called: list[str] = []
        self.app = functools.partial(self.talk, self.app)

    async def talk(self, app: Any, scope: Scope, receive: Receive, send: Send) -> None:
        scope["probe"] = self
        await app(scope, receive, send)

    def on_message_begin(self) -> None:
        self.called.append("on_message_begin")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.called.append("on_headers_complete")
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self.called.append("on_response_complete")
        super().on_response_complete()


def base_cycle() -> Any:
    """Return a cycle of uvicorn's as it is before its request is answered."""
    wanted = inspect.signature(RequestResponseCycle).parameters
    return RequestResponseCycle(**dict.fromkeys(wanted))  # type: ignore[arg-type]


BASES = {"DownloadProtocol": base, "DownloadCycle": base_cycle}


def chain_of(node: ast.Attribute) -> tuple[ast.expr, list[str]]:
    """Return what a chain of attributes begins with, and their names."""
    names = [node.attr]
    owner = node.value
    while isinstance(owner, ast.Attribute):
        names.insert(0, owner.attr)
        owner = owner.value
    return owner, names


def is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def names_in(source: str) -> set[str]:
    """Return the inner parts of uvicorn that a module uses, as `cycle.scope`, `flow.drain`, `on_message_begin`.

    In the class DownloadCycle, `self` is a cycle. Everywhere, `cycle` is a cycle, and `connection` is a protocol.
    """
    protocol, cycle = base(), base_cycle()
    found = set()
    for statement in ast.parse(source).body:
        inside = statement.name if isinstance(statement, ast.ClassDef) else ""
        own = ["cycle"] if inside == "DownloadCycle" else []
        for node in ast.walk(statement):
            parts: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uvicorn."):
                found |= {alias.name for alias in node.names} - {"HttpToolsProtocol"}
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and inside in BASES:
                parts = [*own, node.name]
            elif isinstance(node, ast.Attribute):
                owner, names = chain_of(node)
                if is_super(owner) or (isinstance(owner, ast.Name) and owner.id in ("self", "connection")):
                    parts = [*own, *names]
                elif isinstance(owner, ast.Name) and owner.id in ("cycle", "flow"):
                    parts = [owner.id, *names]
            if len(parts) > 1 and parts[0] == "cycle":
                if hasattr(cycle, parts[1]):
                    found |= {".".join(parts[:2]), ".".join(parts[1:] if len(parts) > 2 else parts)}
            elif parts and (parts[0] == "flow" or hasattr(protocol, parts[0])):
                found.add(".".join(parts))
    of_asyncio = {name for name in found if name.startswith(("transport.", "loop.", "logger.", "message_event."))}
    return {name for name in found - of_asyncio if name not in dir(asyncio.Protocol) and name not in dir(object)}


def used() -> set[str]:
    return set[str]().union(*(names_in(path.read_text(encoding="utf-8")) for path in MODULES))


def test_every_inner_part_that_is_used_has_a_test() -> None:
    assert used() - TESTED == set()


def test_every_inner_part_that_is_used_is_listed_in_one_module() -> None:
    assert internals.__doc__ is not None
    rows = [line.split(" | ") for line in internals.__doc__.splitlines() if " | " in line]
    assert {name for names, meaning in rows if meaning != "meaning" for name in names.split()} == used()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in MODULES])
def test_one_module_imports_from_uvicorn(path: Path) -> None:
    modules = [
        module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if module.partition(".")[0] == "uvicorn"
    ]
    assert bool(modules) == (path.stem == "internals")


def test_the_names_of_a_module_are_found() -> None:
    source = """
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
async def f(cycle, message):
    cycle.more_body or cycle.flow.drain() or cycle.nothing_of_uvicorns
class DownloadCycle:
    def send(self):
        self.response_started = self._held and self.flow.write_paused and self.transport.write(b"")
class DownloadProtocol:
    async def shutdown(self):
        super().on_url() or self._lost or self.server_state.tasks or self.pipeline or f(connection.root_path)
"""
    assert names_in(source) == {
        "STATUS_LINE",
        "cycle.flow",
        "cycle.more_body",
        "cycle.response_started",
        "cycle.send",
        "cycle.transport",
        "flow.drain",
        "flow.write_paused",
        "on_url",
        "pipeline",
        "root_path",
        "server_state",
        "server_state.tasks",
        "shutdown",
    }


@pytest.mark.parametrize("ours", [DownloadProtocol, DownloadCycle])
def test_no_name_of_ours_is_one_of_uvicorns_by_accident(ours: type) -> None:
    (tree,) = ast.parse(inspect.getsource(ours)).body
    assert isinstance(tree, ast.ClassDef)
    stores = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    fields = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    theirs = BASES[ours.__name__]()
    prefix = "cycle." if ours is DownloadCycle else ""
    meant = {name.removeprefix(prefix) for name in TESTED if name.startswith(prefix)} | set(dir(asyncio.Protocol))
    assert {name for name in stores | methods | fields if hasattr(theirs, name)} - meant == set()


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "uvicorn.error")
    return caplog


async def asked(talk: Talk, *requests: bytes, **options: Any) -> bytes:
    """Serve one client by `talk`, which gets the cycle, receive and send, and return all that the client got."""
    failures: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await talk(scope["probe"].cycle, receive, send)
        except AssertionError as exc:
            failures.append(exc)
            raise

    async with live(app, http=Probe, **options) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in requests:
            writer.write(request)
        received = await reader.read(-1)
        writer.close()
    if failures:
        raise failures[0]
    return received


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]}
END = {"type": "http.response.body", "body": b""}


@relies_on("cycle", "cycle.scope", "cycle.transport", "loop", "on_response.__self__", "scope", "transport", "logger")
@pytest.mark.asyncio
async def test_each_connection_has_its_app_and_each_request_its_cycle() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        protocol = scope["probe"]
        cycle: Any = send.__self__  # type: ignore[attr-defined]
        assert cycle is protocol.cycle
        assert cycle.on_response.__self__ is protocol
        assert cycle.scope is scope
        assert protocol.scope is scope
        assert protocol.loop is asyncio.get_running_loop()
        assert cycle.transport is protocol.transport
        assert protocol.transport.get_extra_info("socket") is not None
        assert protocol.logger.name == "uvicorn.error"
        assert "extensions" not in scope
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Probe) as port:
        assert (await ask(port, "/")).status == 204


@relies_on("cycle.expected_content_length", "cycle.chunked_encoding", "cycle.response_started")
@pytest.mark.asyncio
async def test_a_cycle_counts_down_what_it_sends_and_believes_what_is_taken_off(
    errors: pytest.LogCaptureFixture,
) -> None:
    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        assert not cycle.response_started
        assert not cycle.chunked_encoding
        await send(START)
        assert cycle.response_started
        assert not cycle.chunked_encoding
        assert cycle.expected_content_length == 10
        await send({"type": "http.response.body", "body": b"0123", "more_body": True})
        assert cycle.expected_content_length == 6
        cycle.transport.write(b"456789")
        cycle.expected_content_length -= 6
        await send(END)

    answer = parse(await asked(talk, REQUEST))
    assert (answer.body, answer.complete) == (b"0123456789", True)
    assert errors.records == []


@relies_on("cycle.expected_content_length")
@pytest.mark.asyncio
async def test_a_cycle_refuses_to_end_before_all_is_taken_off(errors: pytest.LogCaptureFixture) -> None:
    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        await send(START)
        cycle.transport.write(b"012345678")
        cycle.expected_content_length -= 9
        await send(END)

    assert not parse(await asked(talk, REQUEST)).complete
    assert "shorter than Content-Length" in errors.text


@relies_on("cycle.chunked_encoding")
@pytest.mark.asyncio
async def test_a_response_without_a_length_is_chunked() -> None:
    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        assert cycle.chunked_encoding
        await send({"type": "http.response.body", "body": b"body"})

    answer = parse(await asked(talk, REQUEST))
    assert (answer.headers["transfer-encoding"], answer.body, answer.complete) == ("chunked", b"body", True)


@relies_on(
    "STATUS_LINE",
    "cycle.response_started",
    "cycle.chunked_encoding",
    "cycle.expected_content_length",
    "cycle.default_headers",
)
@pytest.mark.asyncio
async def test_a_head_that_another_has_written_is_the_head(errors: pytest.LogCaptureFixture) -> None:
    assert STATUS_LINE[206] == b"HTTP/1.1 206 Partial Content\r\n"
    assert all(STATUS_LINE[status].startswith(b"HTTP/1.1 %d " % status) for status in range(200, 600))

    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        lines = [b"%s: %s\r\n" % header for header in cycle.default_headers]
        cycle.transport.write(STATUS_LINE[200] + b"".join(lines) + b"content-length: 4\r\nconnection: close\r\n\r\n")
        cycle.response_started = True
        cycle.chunked_encoding = False
        cycle.expected_content_length = 4
        await send({"type": "http.response.body", "body": b"body"})
        cycle.transport.close()

    answer = parse(await asked(talk, REQUEST))
    assert (answer.status, answer.body, answer.complete) == (200, b"body", True)
    assert answer.headers["server"] == "uvicorn"
    assert "date" in answer.headers
    assert errors.records == []


@relies_on("RequestResponseCycle", "cycle", "cycle.__class__", "on_headers_complete", "cycle.send")
@pytest.mark.asyncio
async def test_a_cycle_may_get_another_class_when_it_is_assigned() -> None:
    sent: list[str] = []
    assigned: list[Any] = []

    class Other(RequestResponseCycle):
        def send(self, message: Any) -> Any:
            sent.append(message["type"])
            return super().send(message)

    class Othering(Probe):
        @property
        def cycle(self) -> Any:
            return self.assigned

        @cycle.setter
        def cycle(self, cycle: Any) -> None:
            self.assigned = cycle
            if cycle is not None:
                cycle.__class__ = Other
                assigned.append(cycle)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert send.__self__.scope is scope  # type: ignore[attr-defined]
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Othering) as port:
        answer = await ask_raw(port, REQUEST.replace(b"Connection: close\r\n", b"") * 2 + REQUEST)
    assert answer.body.count(b"HTTP/1.1 204") == 2
    assert sent == ["http.response.start", "http.response.body"] * 3
    assert len(assigned) == 3


@pytest.mark.asyncio
async def test_a_task_that_begins_at_once_already_has_a_cycle_of_ours() -> None:
    classes: list[type] = []

    def factory(loop: Any, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
        if coroutine.__name__ == "run_asgi":  # an eager task, as Python 3.12 has them, would run it here
            classes.append(type(inspect.getcoroutinelocals(coroutine)["self"]))
        return asyncio.Task(coroutine, loop=loop, **options)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    asyncio.get_running_loop().set_task_factory(factory)
    async with live(app, http=DownloadProtocol) as port:
        assert (await ask(port, "/")).status == 204
    assert classes == [DownloadCycle]


@relies_on("cycle.response_complete", "cycle.message_event", "cycle.on_response")
@pytest.mark.asyncio
async def test_an_answer_that_another_has_written_can_be_ended(errors: pytest.LogCaptureFixture) -> None:
    async def talk(_: Any, receive: Receive, send: Send) -> None:
        cycle: Any = send.__self__  # type: ignore[attr-defined]  # the protocol's own is the last that was read
        assert (await receive())["type"] == "http.request"
        leaves = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        assert not cycle.response_complete
        cycle.transport.write(STATUS_LINE[200] + b"content-length: 4\r\n\r\nbody")
        cycle.response_started = True
        cycle.chunked_encoding = False
        cycle.expected_content_length = 0
        cycle.response_complete = True
        cycle.message_event.set()
        cycle.on_response()
        assert (await leaves)["type"] == "http.disconnect"
        if (b"connection", b"close") in cycle.scope["headers"]:
            cycle.transport.close()

    received = await asked(talk, REQUEST.replace(b"Connection: close\r\n", b"") * 2 + REQUEST)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert errors.records == []


@relies_on("pipeline")
@pytest.mark.asyncio
async def test_requests_that_wait_are_put_and_taken_in_two_ways() -> None:
    class Waiting:
        def __init__(self) -> None:
            self.items: list[Any] = []

        def __bool__(self) -> bool:
            return bool(self.items)

        def appendleft(self, item: Any) -> None:
            self.items.insert(0, item)

        def pop(self) -> Any:
            return self.items.pop()

    most: list[int] = []

    class Queueing(Probe):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            assert not self.pipeline
            self.pipeline: Any = Waiting()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        most.append(len(scope["probe"].pipeline.items))
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x-path", scope["path"].encode())]})
        await send(END)

    requests = [REQUEST.replace(b"/ ", b"/%d " % n).replace(b"close", b"keep-alive") for n in range(4)]
    async with live(app, http=Queueing) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(requests) + REQUEST)
        received = await reader.read(-1)
        writer.close()
    assert re.findall(rb"x-path: /(\d?)", received) == [b"0", b"1", b"2", b"3", b""]
    assert most == [4, 3, 2, 1, 0]


@relies_on("on_response_complete", "server_state", "server_state.total_requests", "flow.resume_reading")
@pytest.mark.asyncio
async def test_the_end_of_a_response_counts_it_and_reads_on() -> None:
    seen: list[tuple[int, bool]] = []

    class Ending(Probe):
        def on_response_complete(self) -> None:
            if self.pipeline:
                self.flow.pause_reading()  # as it was before the one that waits
                super().on_response_complete()
            else:  # as uvicorn would, but for its timer
                self.server_state.total_requests += 1
                self.flow.resume_reading()
            seen.append((self.server_state.total_requests, self.flow.read_paused))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    request = REQUEST.replace(b"close", b"keep-alive")
    async with live(app, http=Ending, timeout_keep_alive=0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request * 2)
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")  # no timer of uvicorn's has closed it
        writer.close()
    assert seen == [(1, False), (2, False), (3, False)]


@relies_on("_unset_keepalive_if_required")
@pytest.mark.asyncio
async def test_only_one_method_stops_the_keep_alive_timer() -> None:
    timers: list[Any] = []

    class Keeping(Probe):
        def _unset_keepalive_if_required(self) -> None:
            pass

        def timeout_keep_alive_handler(self) -> None:
            self.called.append("rings")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        probe = scope["probe"]
        timers.append(probe.timeout_keep_alive_task)
        if len(timers) == 2:
            assert not timers[1].cancelled()
            while "rings" not in probe.called:
                await asyncio.sleep(0.001)
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Keeping, timeout_keep_alive=0.05) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(REQUEST.replace(b"close", b"keep-alive"))
            assert b" 204 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()
    assert timers[0] is None


@relies_on("cycle.default_headers")
@pytest.mark.asyncio
async def test_the_lines_of_the_server_are_a_new_list_each_second() -> None:
    config = uvicorn.Config(lambda: None, log_config=None)
    config.load()
    running = uvicorn.Server(config)
    await running.on_tick(0)
    first = running.server_state.default_headers
    names = [name for name, _ in first]
    kept = list(first)
    await running.on_tick(10)
    assert running.server_state.default_headers is not first
    assert first == kept
    assert names == [b"date", b"server"]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        probe = scope["probe"]
        assert probe.cycle.default_headers is probe.server_state.default_headers
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Probe) as port:
        assert (await ask(port, "/")).status == 204


@relies_on("handle_websocket_upgrade", "scope")
@pytest.mark.asyncio
async def test_a_websocket_is_left_to_another_protocol_by_one_method() -> None:
    events: list[str] = []
    ended = asyncio.Event()

    class WebSockets(asyncio.Protocol):
        def __init__(self, **options: Any) -> None:
            self.transport: Any = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            events.append("made")

        def data_received(self, data: bytes) -> None:
            events.append(data[:9].decode())
            self.transport.write(b"over")
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            events.append("lost")
            ended.set()

    class Upgrading(Probe):
        def handle_websocket_upgrade(self) -> None:
            events.append("upgrade")
            super().handle_websocket_upgrade()
            assert self.transport.get_protocol() is not self
            assert self.called == ["on_message_begin", "on_headers_complete"]
            assert self.scope["method"] == "GET"

        def connection_lost(self, exc: Exception | None) -> None:
            events.append("lost by HTTP")

    request = REQUEST.replace(b"close", b"Upgrade\r\nUpgrade: websocket")
    async with live(Probe, http=Upgrading, ws=WebSockets) as port:  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        assert await asyncio.wait_for(reader.read(-1), 30) == b"over"
        writer.close()
        await asyncio.wait_for(ended.wait(), 30)
    assert events == ["upgrade", "made", "GET / HTT", "lost"]


@relies_on("scope")
@pytest.mark.asyncio
async def test_the_scope_is_that_of_the_head_that_is_being_read() -> None:
    seen: list[Any] = []
    first, line, rest = REQUEST.replace(b"close", b"keep-alive"), REQUEST[:9], REQUEST[9:]

    class Reading(Probe):
        def data_received(self, data: bytes) -> None:
            assert (self.scope is None) == (data == first)
            super().data_received(data)
            seen.append(self.scope is self.cycle.scope)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Reading) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for data in (first, b"\r\n", line, rest):
            writer.write(data)
            if data is first:
                await reader.readuntil(b"\r\n\r\n")
            while not seen or (data is not rest and len(seen) < (first, b"\r\n", line, rest).index(data) + 1):
                await asyncio.sleep(0)
        await reader.read(-1)
        writer.close()
    assert seen == [True, True, False, True]


@relies_on("cycle.more_body")
@pytest.mark.asyncio
async def test_a_cycle_knows_whether_more_of_the_request_is_to_come() -> None:
    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        assert cycle.more_body
        await receive()
        cycle.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while (await receive())["more_body"]:
            pass
        assert not cycle.more_body
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await talk(scope["probe"].cycle, receive, send)

    async with live(app, http=Probe) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n1")
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"2")
        assert b" 204 " in await reader.read(-1)
        writer.close()


@relies_on("on_message_begin", "on_headers_complete", "on_response_complete")
@pytest.mark.asyncio
async def test_the_callbacks_come_once_for_each_request_and_in_order() -> None:
    probes: set[Probe] = set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        probes.add(scope["probe"])
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Probe) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for connection in (b"keep-alive", b"close"):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: %b\r\n\r\n" % connection)
            assert b" 204 " in await reader.readuntil(b"\r\n\r\n")
        assert await reader.read(-1) == b""
        writer.close()
    (probe,) = probes
    assert probe.called == ["on_message_begin", "on_headers_complete", "on_response_complete"] * 2


@relies_on("on_response_complete")
@pytest.mark.asyncio
async def test_the_end_of_a_response_starts_the_next_request() -> None:
    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    received = await asked(talk, REQUEST.replace(b"Connection: close\r\n", b"") * 2 + REQUEST)
    assert received.count(b"HTTP/1.1 204") == 3


@relies_on(
    "timeout_keep_alive", "timeout_keep_alive_handler", "timeout_keep_alive_task", "timeout_keep_alive_task.cancel"
)
@pytest.mark.asyncio
async def test_an_idle_connection_is_asked_after_and_a_request_ends_that() -> None:
    asked_after = asyncio.Event()
    again: list[asyncio.TimerHandle] = []

    class Patient(Probe):
        def timeout_keep_alive_handler(self) -> None:
            if again:
                super().timeout_keep_alive_handler()
                return
            assert self.timeout_keep_alive == 0.05
            again.append(self.loop.call_later(60, self.timeout_keep_alive_handler))
            self.timeout_keep_alive_task = again[0]
            asked_after.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with live(app, http=Patient, timeout_keep_alive=0.05) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.wait_for(asked_after.wait(), 30)
        assert not again[0].cancelled()
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        assert again[0].cancelled()
        assert await asyncio.wait_for(reader.read(-1), 30) == b""  # idle again: uvicorn's own handler closes
        writer.close()


@relies_on("flow", "flow.write_paused", "cycle.flow")
@pytest.mark.asyncio
async def test_the_flow_waits_for_a_client_that_does_not_read() -> None:
    waits = asyncio.Event()
    seen: list[Any] = []
    size = 1 << 24

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cycle = scope["probe"].cycle
        assert cycle.flow is scope["probe"].flow
        assert not cycle.flow.write_paused
        await send({**START, "headers": [(b"content-length", b"%d" % size)]})
        cycle.transport.write(b"0" * size)
        cycle.expected_content_length -= size
        assert cycle.flow.write_paused
        drained = asyncio.ensure_future(cycle.flow.drain())
        await asyncio.sleep(0)
        seen.append(drained.done())
        waits.set()
        await drained
        seen.append(cycle.flow.write_paused)
        await send(END)

    async with live(app, http=Probe) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(REQUEST)
        await asyncio.wait_for(waits.wait(), 30)
        assert len(await reader.read(-1)) > size
        writer.close()
    assert seen == [False, False]


@relies_on("send_400_response")
@pytest.mark.asyncio
async def test_a_refusal_is_a_400_and_the_end() -> None:
    class Refusing(HttpToolsProtocol):
        def data_received(self, data: bytes) -> None:
            self.send_400_response("No.")

    async with live(Probe, http=Refusing) as port:  # type: ignore[arg-type]
        answer = await ask_raw(port, REQUEST.replace(b"close", b"keep-alive"))
    assert (answer.status, answer.body, answer.complete) == (400, b"No.", True)


@relies_on("cycle.disconnected")
@pytest.mark.asyncio
async def test_what_is_sent_to_a_client_that_has_left_is_dropped(errors: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Event()
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cycle = scope["probe"].cycle
        seen.append(cycle.disconnected)
        await send(START)
        while (await receive())["type"] != "http.disconnect":
            pass
        seen.append(cycle.disconnected)
        await send({"type": "http.response.body", "body": b"0123456789 and more than was promised"})
        ended.set()

    async with live(app, http=Probe) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 30)
    assert seen == [False, True]
    assert errors.records == []


@relies_on("cycle.keep_alive")
@pytest.mark.parametrize(
    "line, version, kept",
    [(b"", b"1.1", True), (b"Connection: close\r\n", b"1.1", False), (b"", b"1.0", False)],
    ids=["1.1", "close", "1.0"],
)
@pytest.mark.asyncio
async def test_a_cycle_or_its_scope_knows_whether_the_connection_stays(line: bytes, version: bytes, kept: bool) -> None:
    seen: list[bool] = []

    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        # Before 0.53, a request to close is only in the headers.
        seen.append(cycle.keep_alive and (b"connection", b"close") not in cycle.scope["headers"])
        await send({"type": "http.response.start", "status": 204, "headers": [(b"connection", b"close")]})
        await send(END)

    received = await asked(talk, b"GET / HTTP/%b\r\nHost: x\r\n%b\r\n" % (version, line))
    assert seen == [kept]
    assert received.lower().count(b"connection: close") == 1


@relies_on("cycle.access_log")
@pytest.mark.asyncio
async def test_a_cycle_knows_whether_it_writes_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "uvicorn.access")
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["probe"].cycle.access_log)
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    logger = logging.getLogger("uvicorn.access")
    async with live(app, http=Probe) as port:  # which wants no access log, and takes the handlers away
        await ask(port, "/")
        logger.addHandler(caplog.handler)
        await ask(port, "/")
        logger.removeHandler(caplog.handler)
    assert seen == [False, True]
    assert len([record for record in caplog.records if record.name == "uvicorn.access"]) == 1


@relies_on("cycle.waiting_for_100_continue")
@pytest.mark.asyncio
async def test_a_cycle_that_does_not_wait_to_continue_does_not_say_so() -> None:
    async def talk(cycle: Any, receive: Receive, send: Send) -> None:
        assert cycle.waiting_for_100_continue
        cycle.waiting_for_100_continue = False
        await receive()
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    request = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\nConnection: close\r\n\r\n1"
    received = await asked(talk, request)
    assert b" 100 " not in received
    assert b" 204 " in received


@relies_on("FlowControl", "flow", "flow.pause_reading", "flow.resume_reading", "flow.is_full")
@pytest.mark.asyncio
async def test_another_flow_control_can_take_the_place_of_the_first() -> None:
    calls: list[str] = []

    class Full(FlowControl):
        is_full = True  # which is a name of ours

        def resume_reading(self) -> None:
            calls.append("resume")
            if not self.is_full:
                super().resume_reading()

    class Flowing(Probe):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            assert not hasattr(self.flow, "is_full")
            self.flow = Full(transport)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        probe = scope["probe"]
        assert probe.cycle.flow is probe.flow
        probe.flow.pause_reading()
        await receive()
        assert calls == ["resume"]
        assert not probe.transport.is_reading()
        probe.flow.is_full = False
        probe.flow.resume_reading()
        assert probe.transport.is_reading()
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Flowing) as port:
        assert (await ask(port, "/")).status == 204


@relies_on(
    "headers",
    "headers.append",
    "on_body",
    "on_message_complete",
    "parser",
    "parser.get_http_version",
    "parser.get_method",
    "parser.set_dangerous_leniencies",
    "parser.should_keep_alive",
    "parser.should_upgrade",
    "url",
)
@pytest.mark.asyncio
async def test_the_parser_tells_what_it_has_read_and_fields_are_appended_to_a_list() -> None:
    read: list[Any] = []

    class Reading(Probe):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.parser.set_dangerous_leniencies(lenient_version=True)

        def on_headers_complete(self) -> None:
            assert self.url == b"/"
            self.url = b"/elsewhere"
            super().on_headers_complete()
            assert self.scope["path"] == "/elsewhere"
            assert self.scope["headers"] is self.headers
            parser = self.parser
            read.append((parser.get_method(), parser.get_http_version()))
            read.append((parser.should_upgrade(), parser.should_keep_alive()))
            self.headers = []  # what comes now is appended to this one

        def on_body(self, body: bytes) -> None:
            read.append(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            read.append(self.headers)
            assert self.cycle.more_body
            super().on_message_complete()
            assert not self.cycle.more_body

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["headers"] == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
        assert (await receive())["body"] == b"abcd"
        await send({"type": "http.response.start", "status": 204, "headers": [(b"connection", b"close")]})
        await send(END)

    request = b"POST / HTTP/1.3\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with live(app, http=Reading) as port:
        answer = await ask_raw(port, request + b"2\r\nab\r\n2\r\ncd\r\n0\r\nX-Trailer: 1\r\n\r\n", method="HEAD")
    assert answer.status == 204
    assert read == [(b"POST", "1.3"), (False, True), b"ab", b"cd", [(b"x-trailer", b"1")]]


@relies_on("ServerState", "server_state.default_headers", "shutdown")
@pytest.mark.asyncio
async def test_each_connection_is_told_of_the_end() -> None:
    told: list[Any] = []

    class Ending(Probe):
        def shutdown(self) -> None:
            assert isinstance(self.server_state, uvicorn.server.ServerState)
            assert self.server_state.default_headers is self.cycle.default_headers
            weakref.ref(self.server_state)
            told.append(self.cycle.response_complete)
            super().shutdown()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send(END)

    async with live(app, http=Ending) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST.replace(b"close", b"keep-alive"))
        assert b" 204 " in await reader.readuntil(b"\r\n\r\n")
    assert await reader.read() == b""
    writer.close()
    assert told == [True]


def test_a_connection_that_is_lost_while_a_file_is_read_takes_no_bytes() -> None:
    """The transport of uvloop raises an error then, which would be logged as one of the application."""
    uvloop = pytest.importorskip("uvloop")

    async def run() -> int:
        ended = asyncio.Event()

        class Connection(asyncio.Protocol):
            transport: Any

            def connection_lost(self, exc: Exception | None) -> None:
                ended.set()

        here, there = socket.socketpair()
        loop = asyncio.get_running_loop()
        connection: Any
        with there:
            transport, connection = await loop.create_connection(Connection, sock=here)
            connection.transport = transport
            transport.abort()
            await ended.wait()
            await asyncio.sleep(0)
            return sendfile._write(connection, None, b"content", 0)

    assert uvloop.run(run()) == 0
