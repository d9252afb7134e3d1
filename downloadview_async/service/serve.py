"""Runs the service: in this process, or in workers."""

import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn

from downloadview_async.service.descriptors import check_descriptors, use_all_descriptors
from downloadview_async.service.listening import Listeners
from downloadview_async.service.logs import one_line
from downloadview_async.service.pid_file import PidFile
from downloadview_async.service.reload import Generation, Generations
from downloadview_async.service.served import served
from downloadview_async.service.server import DownloadServer, config_for
from downloadview_async.service.settings import Settings
from downloadview_async.service.systemd import Notifier
from downloadview_async.service.terminal import Terminal
from downloadview_async.service.workers import STARTUP_FAILURE, Workers

_COSTS_OF_HTTP2 = (
    "HTTP/2 is experimental in uvicorn: files are sent in chunks, not by sendfile, and up to 256 KiB of an answer are "
    "in memory while its client does not read. HTTP/1.1 is served as without it"
)
_logger = logging.getLogger("uvicorn.error")


def serve(
    settings: Settings,
    load: Callable[[], Settings],
    *,
    inherited: list[socket.socket],
    watches: bool = False,
    announce: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit status.

    SIGHUP reads the settings again, or, if the terminal of the process was closed, is like SIGTERM.

    load: reads the settings again. inherited: listening sockets.
    watches: serve in workers, and reload when a file of the application changes. announce: called after all checks,
    before the sockets are opened.

    Raises `ConfigurationError`.
    """
    use_all_descriptors()
    check_descriptors()
    terminal = Terminal()
    signals: list[int] = []  # those that come too early
    signal.signal(signal.SIGHUP, lambda number, _: signals.append(number))
    application = Generations(Generation(settings), load)  # with several workers too: errors show before any starts
    config = config_for(application, settings)
    if settings.server.http2:
        _logger.warning(_COSTS_OF_HTTP2)
    notifier = Notifier()
    with contextlib.ExitStack() as stack:
        announce()
        listeners = stack.enter_context(Listeners(settings, inherited))
        with settings.blaming("server.pid_file"):
            pid_file = stack.enter_context(PidFile(settings.server.pid_file))
        for line in served(settings):
            _logger.info("%s", one_line(line))
        if settings.server.workers == 1 and not watches:
            return _serve_here(application, config, settings, listeners, notifier, pid_file, terminal, signals)
        del application, config
        gc.collect()  # the parent holds no root of the application, and no log
        status = Workers(
            settings,
            listeners,
            load=load,
            notifier=notifier,
            pid_file=pid_file,
            terminal=terminal,
            signals=signals,
            watches=watches,
        ).run()
        gc.freeze()  # for the end of the interpreter, which would look through all objects once more
        return status


def _serve_here(
    application: Generations,
    config: uvicorn.Config,
    settings: Settings,
    listeners: Listeners,
    notifier: Notifier,
    pid_file: PidFile,
    terminal: Terminal,
    signals: list[int],
) -> int:
    def hang_up(number: int, frame: object) -> None:
        if terminal.was_closed:
            server.drain()
        else:
            application.want_reload()

    def drain() -> None:
        application.drain()
        notifier.stopping()

    def ready() -> None:
        listeners.publish()
        notifier.ready()

    def reloaded(began: int, problem: str | None) -> None:
        notifier.reloaded(problem)
        pid_file.answer(began, problem)

    server = DownloadServer(
        config,
        drain_seconds=settings.server.drain_seconds,
        shares_port=settings.server.reuse_port,
        shares_sockets=listeners.are_inherited,
        when_draining=drain,
        when_ready=ready,
        when_alive=notifier.alive,
    )
    signal.signal(signal.SIGHUP, hang_up)
    for number in signals:
        hang_up(number, None)
    application.serve_by(server, when_reloading=notifier.reloading, when_reloaded=reloaded)
    server.run(listeners.sockets)
    return 0 if server.started else STARTUP_FAILURE
