"""An ASGI application in this process: it is started, asked, and stopped when enough of an answer has come."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import anyio
from starlette.types import ASGIApp, Message, Scope

from downloadview_async import AsyncFile, ConfigurationError
from downloadview_async.check.http import MOST, Answer, NoAnswerError
from downloadview_async.offload.base import EXTENSION

_logger = logging.getLogger("downloadview_async")


class _EnoughError(OSError):
    """The client has left: it has as much of the answer as it wants."""


@dataclass(slots=True)
class _Offer:
    """Offers no proxy, and notes whether a response asks: only one without an `OffloadMiddleware` around it does."""

    was_taken: bool = False

    def headers_for(self, file: AsyncFile) -> None:
        self.was_taken = True


@dataclass(slots=True)
class Application:
    """An application that is asked in this process, as a `Peer` is asked over the network.

    base: the URL at which clients reach it. headers: of every request. state: of its lifespan.
    """

    app: ASGIApp
    base: str
    timeout: float
    headers: Mapping[str, str]
    state: dict[str, Any] = field(default_factory=dict)
    was_offered: bool = True
    """Whether the last download response was inside of an `OffloadMiddleware`, or there was none."""
    refusals: list[str] = field(default_factory=list)
    """Why the last answer was not left to a proxy, as the log says it."""

    async def ask(self, target: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request and return the answer, with up to `MOST` bytes of its body.

        Raises `NoAnswerError` if the application raises an exception, or does not answer in time.
        """
        offer = _Offer()
        answering = _Answering()
        scope = self._scope(target, method, {"Accept-Encoding": "identity", **self.headers, **(headers or {})})
        scope["extensions"] = {EXTENSION: offer}
        try:
            with _reasons(self.refusals), anyio.fail_after(self.timeout):
                await self.app(scope, answering.receive, answering.send)
        except TimeoutError:
            raise NoAnswerError(f"no complete answer within {self.timeout:g} s") from None
        except (Exception, SystemExit) as exc:  # the application may raise anything
            if not answering.has_enough:
                raise NoAnswerError(f"the application raised {type(exc).__name__}: {exc}") from exc
            if answering.status >= 500:  # frameworks answer, and raise the exception again for the log of the server
                self.refusals.append(f"{type(exc).__name__}: {exc}")
        self.was_offered = not offer.was_taken
        return answering.answer()

    def _scope(self, target: str, method: str, headers: Mapping[str, str]) -> Scope:
        parts = urlsplit(self.base)
        path, _, query = target.partition("?")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        fields = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "downloadview-check", **headers}
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": parts.scheme,
            "path": unquote(path),
            "raw_path": path.encode("ascii"),
            "query_string": query.encode("ascii"),
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()],
            "client": ("127.0.0.1", 1),
            "server": (parts.hostname or "localhost", port),
            "state": dict(self.state),
        }


class _Answering:
    """The receiving end of one answer."""

    def __init__(self) -> None:
        self.has_enough = False
        self._start: Message | None = None
        self._body = bytearray()
        self._was_read = False
        self._left = anyio.Event()

    async def receive(self) -> Message:
        if not self._was_read:
            self._was_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.has_enough:
            raise _EnoughError
        if message["type"] == "http.response.start":
            if not isinstance(message["status"], int):
                raise TypeError(f"the status is {message['status']!r}, and not a number")
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if len(self._body) >= MOST or not message.get("more_body", False):
                self.has_enough = True
                self._left.set()
                if message.get("more_body", False):
                    raise _EnoughError

    @property
    def status(self) -> int:
        return 0 if self._start is None else int(self._start["status"])

    def answer(self) -> Answer:
        if self._start is None or not self.has_enough:
            raise NoAnswerError("the application ended before its answer did")
        headers = tuple(
            (bytes(name).decode("latin-1").lower(), bytes(value).decode("latin-1"))
            for name, value in self._start.get("headers", ())
        )
        return Answer(self._start["status"], headers, bytes(self._body[:MOST]))


@contextmanager
def _reasons(reasons: list[str]) -> Iterator[None]:
    """Collect what the library logs about a request: why no proxy sends a file, and why it cannot be sent."""
    reasons.clear()

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reasons.append(record.getMessage())

    handler, level, propagates = Collecting(logging.DEBUG), _logger.level, _logger.propagate
    _logger.addHandler(handler)
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False  # other handlers would print what is said at levels that they do not want
    try:
        yield
    finally:
        _logger.propagate = propagates
        _logger.setLevel(level)
        _logger.removeHandler(handler)


@asynccontextmanager
async def started(app: ASGIApp, timeout: float) -> AsyncIterator[dict[str, Any]]:
    """Start an application, and stop it in the end. Yields the state of its lifespan.

    An application that does not know of a lifespan, such as Django, needs none.

    Raises `ConfigurationError` if it does not start.
    """
    state: dict[str, Any] = {}
    lifespan = _Lifespan(app, {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state})
    running = asyncio.create_task(lifespan.run())
    try:
        with anyio.move_on_after(timeout):
            await lifespan.is_ready.wait()
        if not lifespan.is_ready.is_set():
            raise ConfigurationError(f"the application has not started within {timeout:g} s")
        if lifespan.failure is not None:
            raise ConfigurationError(f"the application does not start: {lifespan.failure}")
        yield state
    finally:
        lifespan.is_over.set()
        await asyncio.wait([running], timeout=timeout)
        running.cancel()


class _Lifespan:
    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self._app = app
        self._scope = scope
        self._has_begun = False
        self.is_ready = anyio.Event()
        self.is_over = anyio.Event()
        self.failure: str | None = None

    async def run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except (Exception, SystemExit) as exc:  # an application without a lifespan may raise anything
            if not self._has_begun or self.is_ready.is_set():
                return
            self.failure = self.failure or f"{type(exc).__name__}: {exc}"
        finally:
            self.is_ready.set()

    async def _receive(self) -> Message:
        if not self._has_begun:
            self._has_begun = True
            return {"type": "lifespan.startup"}
        await self.is_over.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            lines = message.get("message", "").strip().splitlines()
            self.failure = lines[-1] if lines else "it says no reason"
        if message["type"].startswith("lifespan.startup"):
            self.is_ready.set()
