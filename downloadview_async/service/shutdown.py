"""The end of the process: in time, even while plain code of a generator or a hung disk holds a thread.

And not by SIGHUP, which a terminal sends when it is closed, and which others take for "read your settings again".
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PATIENCE = 0.5  # seconds after the shutdown of the application, which comes after the time that downloads have to end
HANGUP = "SIGHUP is ignored, and no download is cut: restart the service to have the settings read again"


def ignore_hangup() -> None:
    """Ignore SIGHUP in this process, and in those that it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class EndsInTime:
    """Ends the process half a second after the application's shutdown, should anything still run then.

    Until then it says in the log that a SIGHUP is ignored.

    A call that blocks cannot be cancelled: the event loop would wait for it, and the interpreter for its thread. This
    is for the outermost application of a process that does nothing else.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and start the clock with the last message of the lifespan."""

        async def send_and_start(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                last = threading.Timer(_PATIENCE, _end)
                last.daemon = True
                last.start()
            await send(message)

        if scope["type"] == "lifespan":
            _log_hangups()
        await self.app(scope, receive, send_and_start if scope["type"] == "lifespan" else send)


def _log_hangups() -> None:
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread, which alone can have handlers
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGHUP, logging.getLogger("downloadview_async").warning, HANGUP
        )


def _end() -> None:
    logging.getLogger("downloadview_async").warning("The process ends although some calls still block")
    logging.shutdown()
    os._exit(0)
