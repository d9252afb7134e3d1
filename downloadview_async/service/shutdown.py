"""The start and the end of a process: graceful shutdown, even while a hung disk holds a thread, garbage collection.

SIGHUP does not end the process: a closing terminal sends it, and other servers reload their settings on it.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PATIENCE = 0.5  # seconds after the application's shutdown, which waits for downloads
HANGUP = "SIGHUP is ignored, and no download is cut: restart the service to read the settings again"


def ignore_hangup() -> None:
    """Ignore SIGHUP in this process and in the processes that it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class EndsInTime:
    """Ends the process half a second after the application's shutdown, even if a thread is still blocked.

    Without this, the interpreter would wait for blocked threads, because a blocking call cannot be cancelled. Use it
    only around the outermost application of a process that does nothing else.

    When the application has started, all objects that exist are taken out of garbage collection. To look through them
    takes 20 ms, in which no request is answered, and a listing of a large folder would cause that each time.

    While the application runs, each SIGHUP is ignored with a log line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and start the timer at the last message of the lifespan."""

        async def send_and_start(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                gc.collect()
                gc.freeze()
            elif message["type"] == "lifespan.shutdown.complete":
                last = threading.Timer(_PATIENCE, _end)
                last.daemon = True
                last.start()
            await send(message)

        if scope["type"] == "lifespan":
            _log_hangups()
        await self.app(scope, receive, send_and_start if scope["type"] == "lifespan" else send)


def _log_hangups() -> None:
    with contextlib.suppress(RuntimeError, ValueError):  # only the main thread can handle signals
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGHUP, logging.getLogger("downloadview_async").warning, HANGUP
        )


def _end() -> None:
    logging.getLogger("downloadview_async").warning("The process ends although some calls still block")
    logging.shutdown()
    os._exit(0)
