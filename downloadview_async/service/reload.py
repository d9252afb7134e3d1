"""Reading the settings again: the application that takes the place of another one while requests are answered.

Each `Generation` is the application for one reading of the settings, with its own lifespan. New requests go to the
newest one; an older one ends when its last request has.
"""

import asyncio
import functools
import gc
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence

import anyio.to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import ConfigurationError, add_content_types
from downloadview_async.asgi.server import KeptAnswers, SendLater
from downloadview_async.service.access import locating
from downloadview_async.service.app import build
from downloadview_async.service.logs import one_line
from downloadview_async.service.server import DownloadServer
from downloadview_async.service.server_checks import blaming_certificate, check_certificate
from downloadview_async.service.settings import ServerSettings, Settings
from downloadview_async.service.shutdown import EndsInTime

_OF_ALL_PROCESSES = ("host", "port", "uds", "fd", "reuse_port", "pid_file")
_OF_ONE_PROCESS = ("workers", "loop", "backlog", "limit_max_requests")

_logger = logging.getLogger("downloadview_async")


class Generation:
    """The application for one reading of the settings, from the start of its lifespan to its end.

    Raises `ConfigurationError`, as `build` does.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings = settings.of_own_server()
        self._service = build(settings)
        self._locate = locating(settings)
        if not settings.accounts.traces:  # which the application makes for each request
            self._service.kept_answers = KeptAnswers(self._locate)
        self.reference: weakref.ref[ASGIApp] = weakref.ref(self._service)
        self.requests = 0
        self.ended = asyncio.Event()  # when the last request has, after the generation has retired
        self.is_retired = False
        self._stop = asyncio.Event()
        self._started = asyncio.Event()
        self._lifespan: asyncio.Task[None] | None = None
        self._failure: str | None = None

    def app(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a request."""
        self._locate(scope)
        kept = self.kept_answers
        if kept is not None and (answer := kept.answer(scope, receive, send)) is not None:
            return answer
        return self._service.answer(scope, receive, send)

    @property
    def kept_answers(self) -> KeptAnswers | None:
        """The answers that the server may give again; None if each needs the application."""
        return self._service.kept_answers

    def drain(self) -> None:
        """Have `/-/readyz` give 503."""
        self._service.state.health.is_draining = True

    async def start(self) -> str | None:
        """Start the lifespan, and return None, or why it cannot start: a line, or a traceback."""
        self._lifespan = asyncio.create_task(self._live())
        await self._started.wait()
        return self._failure

    async def end(self) -> None:
        """End the lifespan."""
        self._stop.set()
        if self._lifespan is not None:
            await self._lifespan

    @property
    def in_progress(self) -> int:
        """How many answers have not ended."""
        return self._service.in_progress

    def retire(self) -> None:
        """End the generation when its last request has ended."""
        self.is_retired = True
        if not self.requests:
            self.ended.set()

    async def _live(self) -> None:
        is_first = True

        async def receive() -> Message:
            nonlocal is_first
            if is_first:
                is_first = False
                return {"type": "lifespan.startup"}
            await self._stop.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                self._failure = message.get("message", "")
            elif message["type"] == "lifespan.shutdown.failed":
                logging.getLogger("uvicorn.error").error("%s", message.get("message", ""))
            elif message["type"] == "lifespan.startup.complete":
                self._started.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
        try:
            await self._service(scope, receive, send)
        except Exception as exc:
            if not self._started.is_set() and self._failure is None:
                self._failure = str(exc)
        finally:
            self._started.set()


class Generations:
    """The application of a server: it gives each request to the newest generation.

    first: it starts with the lifespan of the server. load: reads the settings again, and may raise
    `ConfigurationError`.
    """

    def __init__(self, first: Generation, load: Callable[[], Settings] | None = None) -> None:
        self.failure: str | None = None  # why the first one could not start
        self._at_start = first.settings.server
        self._current = first
        self._load = load
        self._when_reloading: Callable[[], None] = lambda: None
        self._when_reloaded: Callable[[int, str | None], None] = lambda began, problem: None
        self._older: set[Generation] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_draining = False
        self._is_wanted = asyncio.Event()
        self._server: DownloadServer | None = None

    def serve_by(
        self,
        server: DownloadServer,
        *,
        when_reloading: Callable[[], None],
        when_reloaded: Callable[[int, str | None], None],
    ) -> None:
        """Have a reload change the server, too.

        when_reloaded: called with the time at which the settings were read, in nanoseconds, and why they are not used.
        """
        self._server, self._when_reloading, self._when_reloaded = server, when_reloading, when_reloaded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request to the newest generation."""
        if scope["type"] == "lifespan":
            await EndsInTime(self._live)(scope, receive, send)
            return
        generation = self._current
        generation.requests += 1
        try:
            with SendLater(scope) as later:
                await generation.app(scope, receive, send)
                if later.is_used:
                    del scope, receive, send
                    await later.send()
        finally:
            generation.requests -= 1
            if generation.is_retired and not generation.requests:
                generation.ended.set()

    def kept_answers(self) -> KeptAnswers | None:
        """Return the answers of the newest generation that the server may give again, or None."""
        return self._current.kept_answers

    def drain(self) -> None:
        """Have `/-/readyz` give 503 from now on."""
        self._is_draining = True
        for generation in (self._current, *self._older):
            generation.drain()

    def want_reload(self) -> None:
        """Read the settings again, soon."""
        self._is_wanted.set()

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.failure = await self._current.start()
        if self.failure is not None:
            await send({"type": "lifespan.startup.failed", "message": self.failure})
            return
        reloading = asyncio.create_task(self._reload_when_wanted())
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        except asyncio.CancelledError:  # the server ends at once, and each generation reports it
            await send({"type": "lifespan.shutdown.failed"})
            raise
        reloading.cancel()
        await asyncio.wait([reloading])
        for generation in (self._current, *self._older):
            await generation.end()
        await send({"type": "lifespan.shutdown.complete"})

    async def _reload_when_wanted(self) -> None:
        while True:
            await self._is_wanted.wait()
            self._is_wanted.clear()
            began = time.time_ns()
            self._when_reloading()
            problem = await self._reload()
            if problem is None:
                _logger.info("The settings have been read again, and are in use")
            else:
                _logger.error("The settings cannot be used, so the old ones stay: %s", problem)
                _forget_unused()
            self._when_reloaded(began, problem)

    async def _reload(self) -> str | None:
        """Let a new generation take the place of the current one, and return None, or why that is not possible."""
        assert self._load is not None
        assert self._server is not None
        old, settings = self._current, None
        try:
            settings = await anyio.to_thread.run_sync(self._load)
            await anyio.to_thread.run_sync(check_certificate, settings)  # the disk may hang
            generation = await anyio.to_thread.run_sync(Generation, settings)
            problem = await generation.start()
            if problem is None:
                try:
                    # again, because it may have been replaced by now
                    await anyio.to_thread.run_sync(check_certificate, settings)
                    with blaming_certificate(settings):  # or even since then
                        self._server.reconfigure(settings)
                except BaseException:
                    await generation.end()
                    raise
        except ConfigurationError as exc:
            problem = one_line(str(exc))
        except Exception as exc:  # a module of the user may raise anything
            _logger.exception("The settings cannot be read")
            problem = one_line(f"{type(exc).__name__}: {exc}")
        if problem is not None:
            if settings is not None:
                _change_content_types(settings, old.settings)
            return problem
        _change_content_types(old.settings, generation.settings)
        self._current = generation
        if self._is_draining:
            generation.drain()
        warn_of_restart(needing_a_restart(self._at_start, generation.settings.server))
        self._older.add(old)
        task = asyncio.create_task(self._end(old))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._has_ended, old.reference))
        return None

    async def _end(self, old: Generation) -> None:
        """End a generation after its last request, and after the last client has taken what it was sent."""
        old.retire()
        await old.ended.wait()
        while old.in_progress:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # an event would cost each request something
        if old in self._older:
            self._older.discard(old)
            await old.end()

    def _has_ended(self, service: weakref.ref[ASGIApp], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        _forget_when_unused(service)  # here, because the task has held the generation


def _forget_when_unused(service: weakref.ref[ASGIApp], seconds: float = 1.0) -> None:
    """Forget a service that has ended. An idle connection may still hold it, by the last request that it has had."""
    _forget_unused()
    if service() is not None:
        asyncio.get_running_loop().call_later(seconds, _forget_when_unused, service, min(2 * seconds, 60.0))


def _forget_unused() -> None:
    """Close what a generation that nothing uses any more has left open, such as its roots and its log."""
    gc.unfreeze()  # as `EndsInTime` has frozen it
    gc.collect()
    gc.freeze()


def _change_content_types(old: Settings, new: Settings) -> None:
    """Have the content types of `new` alone: they are those of the process, and `build` has added to them."""
    add_content_types({**dict.fromkeys(old.content_types), **new.content_types})


def warn_of_restart(names: Sequence[str]) -> None:
    """Log the names of settings that have changed, but do so at a restart only."""
    if names:
        _logger.warning("These settings change at the next restart only: %s", ", ".join(names))


def needing_a_restart(old: ServerSettings, new: ServerSettings, *, has_workers: bool = False) -> list[str]:
    """Return the names of the settings that have changed, and that a reload cannot change.

    has_workers: whether a reload starts new worker processes.
    """
    keys = _OF_ALL_PROCESSES if has_workers else _OF_ALL_PROCESSES + _OF_ONE_PROCESS
    names = [name for name in keys if getattr(old, name) != getattr(new, name)]
    if not has_workers and bool(old.ssl_certfile) != bool(new.ssl_certfile):
        names.append("ssl_certfile")
    return [f"server.{name}" for name in names]
