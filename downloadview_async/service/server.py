"""The server of the service: uvicorn's, which drains before it shuts down.

A shutdown has these steps. uvicorn's own begins with the third.

1. `/-/readyz` gives 503 at once, so that a balancer sends no more requests. Answers say `Connection: close`.
2. For `drain_seconds`, new connections are still accepted: the balancer has not noticed yet.
3. The sockets are closed, after the connections that wait in them have been accepted.
4. Running downloads have `timeout_graceful_shutdown` seconds. Then their connections are reset, because the end of a
   connection must not look like the end of a file.
5. The lifespan of the application ends.

Ctrl-C at a terminal leaves out step 2 and the seconds of step 4: the service ends within a second. A second signal
skips what is left of steps 2 to 5, and the lifespan is cancelled. A server that another one replaces *retires*: it
skips step 2, its idle connections end by their own time, and downloads have all the time that they need.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import struct
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import FrameType
from typing import Any, Protocol, cast

import msgspec
import uvicorn
from starlette.types import Receive, Scope, Send

from downloadview_async.asgi.server import DownloadProtocol, KeptAnswers
from downloadview_async.service.listening import begin_no_more, steer_away, steer_no_more, waiting_connections
from downloadview_async.service.logs import log_config
from downloadview_async.service.memory import SpareMemory
from downloadview_async.service.settings import Settings, Unavailable
from downloadview_async.service.shutdown import end_in
from downloadview_async.service.terminal import is_in_foreground

_NAP = 0.05  # seconds; uvicorn's own is 0.1
_STEER = 0.1  # seconds in which handshakes end that began before new connections were kept away
_STEER_LAST = 0.3  # the same for the last process at a socket: the others do not notice the shutdown earlier
_HANDSHAKE = 0.5  # seconds that a handshake of TLS may take in the moment of the shutdown
_SETTLE = 2.0  # seconds after the drain in which connections that have just been made may send their first request
_ENDING = 0.5  # seconds that aborted answers have to end
_LAST = 3.0  # seconds after the second signal in which the process ends, even if a call still blocks
_OURS = ("host", "port", "uds", "fd", "workers", "drain_seconds", "http2", "pid_file", "reuse_port")
"""The settings of `[server]` that are not options of the `uvicorn.Config`."""
_OF_NEW_CONNECTIONS = (
    *("encoded_headers", "http", "http_protocol_class", "limit_concurrency", "root_path"),
    *("timeout_graceful_shutdown", "timeout_keep_alive"),
)
"""The options that connections read from the `uvicorn.Config` when they begin, and the server at its end."""
_RESET = struct.pack("ii", 1, 0)
_OUT_OF_RESOURCES = "socket.accept() out of system resource"  # what asyncio says when it can accept no connection
_SELDOM = 10.0  # seconds between two lines of the log that say so

_logger = logging.getLogger("uvicorn.error")


class _End(Enum):
    """How a server ends."""

    NOT = "not"
    RETIRE = "retire"
    DRAIN = "drain"
    NOW = "now"


class Application(Protocol):
    """The application that a server runs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or run the lifespan."""

    def kept_answers(self) -> KeptAnswers | None:
        """Return the answers that the server may give again now, or None: see `DownloadProtocol`."""


def config_for(app: Application | None, settings: Settings) -> uvicorn.Config:
    """Return the configuration of uvicorn for an application. This also configures the log."""
    server = settings.server
    options: dict[str, Any] = msgspec.structs.asdict(server)
    for name in _OURS:
        del options[name]
    watch = {"stall_seconds": options.pop("stall_timeout"), "minimum_rate": options.pop("minimum_rate")}
    if server.http2:
        options["http"] = _http2_protocols(settings, **watch)
    elif server.http == "auto":
        is_plain = server.limit_concurrency is None and not server.root_path
        is_plain = is_plain and server.log_level not in ("debug", "trace")  # the application logs each request then
        kept_answers = app.kept_answers if app is not None and is_plain else None
        options["http"] = partial(DownloadProtocol, kept_answers=kept_answers, **watch)
    # the application writes the log of answers, and knows the proxies
    options |= {"access_log": False, "proxy_headers": False, "workers": 1}  # not those of WEB_CONCURRENCY
    served: Any = app  # uvicorn's types of ASGI are others
    return uvicorn.Config(served, lifespan="on", ws="none", log_config=log_config(server.log_level), **options)


def _http2_protocols(settings: Settings, **watch: Any) -> Callable[..., asyncio.Protocol]:
    """Return the protocols for HTTP/2 and HTTP/1.1. Raises `ConfigurationError` without the packages for it."""
    if settings.server.http != "auto":
        problem = f'true needs http = "auto", not {settings.server.http!r}'
        raise settings.error("server.http2", problem, because="server.http")
    try:
        from downloadview_async.asgi.http2 import protocols
    except ImportError as exc:
        raise settings.error("server.http2", "true needs zttp, and uvicorn 0.54 or newer: install both") from exc
    return protocols(**watch)


def _name_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)


def _is_listening(sock: socket.socket) -> bool:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    except OSError:  # it has been closed
        return False


class _Reports:
    """Reports what fails in an event loop, as the loop does.

    asyncio tries to accept as many connections as may wait, each second, and reports each failure with its traceback.
    That would fill the log, and take much of the time. Here it is one line now and then.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report a failure."""
        if context.get("message") != _OUT_OF_RESOURCES:
            loop.default_exception_handler(context)
        elif loop.time() >= self._next:
            self._next = loop.time() + _SELDOM
            _logger.error("Connections cannot be accepted, and wait: %s", context.get("exception"))


class DownloadServer(uvicorn.Server):
    """uvicorn's server with the shutdown that this module describes.

    when_draining: called at once when a shutdown begins, possibly in a signal handler. when_ready: called when
    connections are accepted. when_alive: called several times a second. shares_port: as `reuse_port` in the settings.
    shares_sockets: whether other processes accept connections from the same sockets, and may go on. If the port is
    shared, `closes_last` tells whether this is the last process of the service that closes the sockets.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_seconds: float,
        shares_port: bool = False,
        shares_sockets: bool = False,
        when_draining: Callable[[], None],
        when_ready: Callable[[], None] = lambda: None,
        when_alive: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self.drain_seconds = drain_seconds
        self.shares_port = shares_port
        self.shares_sockets = shares_sockets
        self.closes_last = True
        self._when_draining = when_draining
        self._when_ready = when_ready
        self._when_alive = when_alive
        self._taking: set[asyncio.Task[None]] = set()
        self._end = _End.NOT
        self._hurries = False
        self._memory = SpareMemory()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown; at a second signal, end at once."""
        if self._end is _End.DRAIN:
            self.stop_now()
            return
        if sig == signal.SIGINT and is_in_foreground():
            self.hurry()
        self.drain()

    def hurry(self) -> None:
        """Give running downloads no time when the shutdown begins."""
        self.drain_seconds, self.config.timeout_graceful_shutdown = 0.0, 0
        self._hurries = True

    def drain(self) -> None:
        """Begin the shutdown. If it has begun, do nothing; if the server has retired, its time is limited now."""
        if self._end in (_End.NOT, _End.RETIRE):
            self._end, self.should_exit = _End.DRAIN, True
            self._when_draining()

    def retire(self) -> None:
        """Leave new connections to another server, and end when the last one of this server has ended."""
        if self._end is _End.NOT:
            self._end, self.should_exit = _End.RETIRE, True

    def stop_now(self) -> None:
        """End without waiting for anything."""
        if self._end in (_End.NOT, _End.RETIRE):
            self._when_draining()
        if self._end is not _End.NOW:
            end_in(_LAST)
        self._end, self.should_exit, self.force_exit = _End.NOW, True, True

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings for new connections, and make the next answer of each open one its last.

        The certificate is loaded again. Raises an error, and changes nothing, if that is not possible. Call
        `check_certificate` before.
        """
        new = config_for(cast("Application", self.config.app), settings)
        new.load()
        if self.config.ssl is not None and (context := new.ssl) is not None:
            # A context into which a wrong key is loaded has none at all then, so the whole context is replaced.
            self.config.ssl.sni_callback = lambda connection, name, first: setattr(connection, "context", context)
        for name in _OF_NEW_CONNECTIONS:
            setattr(self.config, name, getattr(new, name))
        self.drain_seconds = settings.server.drain_seconds
        for connection in self.server_state.connections:
            if isinstance(connection, DownloadProtocol):
                connection.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and accept connections. Raises `Unavailable` if a socket cannot listen."""
        names = [_name_of(one) for one in sockets or []]
        problem: OSError | None = None
        asyncio.get_running_loop().set_exception_handler(_Reports())
        try:
            await super().startup(sockets=sockets)
        except OSError as exc:
            problem = exc
        if not all(map(_is_listening, sockets or [])):  # uvloop closes the socket then, without an error
            await self.lifespan.shutdown()
            raise Unavailable(
                f"cannot listen on {', '.join(names)}: another process has just begun to listen there: stop it, or "
                "give another port"
            ) from problem
        if problem is not None:
            raise problem
        if self.started:
            self._when_ready()

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second."""
        self._when_alive()
        self._memory.look(len(self.server_state.connections))
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down, as the module says."""
        if self._end is _End.NOT:  # `limit_max_requests`
            self.drain()
        _logger.info("Shutting down")
        DownloadProtocol.drain_server(self.server_state)
        if isinstance(self.config.http, str):  # uvicorn's own protocols close a connection after an answer with this
            self.config.encoded_headers = [*self.config.encoded_headers, (b"connection", b"close")]
        await self._go_on_accepting()
        await self._stop_accepting(sockets or [])
        await self._wait_for_connections()
        await self._abort_connections()
        ending = asyncio.ensure_future(self.lifespan.shutdown())
        while not (ending.done() or self.force_exit):
            await asyncio.wait([ending], timeout=_NAP)

    async def _go_on_accepting(self) -> None:
        loop = asyncio.get_running_loop()
        end, counter = loop.time() + self.drain_seconds, 0
        while self._end is _End.DRAIN and (left := end - loop.time()) > 0:
            await self.on_tick(counter)
            counter += 1
            await asyncio.sleep(min(0.1, left))

    async def _stop_accepting(self, sockets: list[socket.socket]) -> None:
        """Close the sockets in a moment in which no connection waits in them."""
        loop = asyncio.get_running_loop()
        if self._end is not _End.NOW and (self.shares_port or not self.shares_sockets):
            if self.shares_port:
                steer_away(sockets)
            if not self.shares_sockets:
                begin_no_more(sockets)
            await asyncio.sleep(_STEER_LAST if self.shares_port and self.closes_last else _STEER)
        for one in sockets:
            loop.remove_reader(one)  # asyncio accepts no more; uvloop ignores this
        for _ in range(2):  # asyncio makes the transports of accepted connections in tasks, which need the server
            await asyncio.sleep(0)
        waiting = [connection for one in sockets for connection in waiting_connections(one)]
        if self.shares_port and self.closes_last:
            steer_no_more(sockets)
        for server in self.servers:
            server.close()
        for one in sockets:
            one.close()
        for connection in waiting:
            task = loop.create_task(self._take(connection))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    async def _take(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has left, or does not speak TLS
            await asyncio.get_running_loop().connect_accepted_socket(
                self._new_protocol, connection, ssl=self.config.ssl
            )

    def _new_protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def _wait_for_connections(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(_HANDSHAKE if self.config.ssl else _NAP)  # accepted connections become known
        deadline = None
        idle_until = loop.time() + (_SETTLE if self.drain_seconds or self._end is _End.RETIRE else 0)
        are_idle_ended = False
        if self.server_state.connections and not self.force_exit and not self._hurries:
            _logger.info("Waiting for connections to close. (CTRL+C to force quit)")
        while (self.server_state.connections or self.server_state.tasks or self._taking) and not self.force_exit:
            if self._end is _End.DRAIN:
                if deadline is None:
                    limit = self.config.timeout_graceful_shutdown
                    deadline = loop.time() + (float("inf") if limit is None else limit)
                    idle_until = min(idle_until, loop.time() + (_SETTLE if self.drain_seconds else 0))
                if loop.time() >= deadline:
                    return
            if not are_idle_ended and loop.time() >= idle_until:
                are_idle_ended = True
                self._end_idle_connections()
            self._when_alive()
            await asyncio.sleep(_NAP)

    def _end_idle_connections(self) -> None:
        """End what is idle now, and each other connection after its answer.

        Without that, a proxy could use an idle connection to a server that has retired minutes ago, and would get an
        answer by settings, keys and users that are no longer in use.
        """
        for connection in list(self.server_state.connections):
            connection.shutdown()

    async def _abort_connections(self) -> None:
        """Reset the connections that are left, and end their applications."""
        tasks = list(self.server_state.tasks)
        if tasks and self._hurries:
            _logger.info("Ctrl-C: %d running downloads are cut", len(tasks))
        elif tasks and not self.force_exit:
            _logger.error("Cancel %d running task(s), timeout graceful shutdown exceeded", len(tasks))
        for connection in self.server_state.connections:
            sock = connection.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # whoever closes this connection resets it
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_ENDING)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
