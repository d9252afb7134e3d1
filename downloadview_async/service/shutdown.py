"""The start and the end of a process: the end in time, even while a hung disk holds a thread, garbage collection."""

import gc
import logging
import os
import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.service.memory import give_back

_PATIENCE = 0.5  # seconds after the application's shutdown, which waits for downloads


class EndsInTime:
    """Ends the process half a second after the application's shutdown, even if a thread is still blocked.

    Without this, the interpreter would wait for blocked threads, because a blocking call cannot be cancelled. Use it
    only around the outermost application of a process that does nothing else.

    When the application has started, all objects that exist are taken out of garbage collection. To look through them
    takes 20 ms, in which no request is answered, and a listing of a large folder would cause that each time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and start the timer at the last message of the lifespan."""

        async def send_and_start(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                give_back()
                gc.freeze()
            elif message["type"] == "lifespan.shutdown.complete":
                end_in(_PATIENCE)
            await send(message)

        await self.app(scope, receive, send_and_start if scope["type"] == "lifespan" else send)


def end_in(seconds: float) -> None:
    """End the process after so many seconds, whatever it does then."""
    last = threading.Timer(seconds, _end)
    last.daemon = True
    last.start()


def _end() -> None:
    logging.getLogger("downloadview_async").warning("The process ends although some calls still block")
    logging.shutdown()
    os._exit(0)
