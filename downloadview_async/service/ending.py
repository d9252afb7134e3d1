"""The end of the process: in time, even while plain code of a generator or a hung disk holds a thread."""

import logging
import os
import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PATIENCE = 0.5  # seconds after the shutdown of the application, which comes after the time that downloads have to end


class EndsInTime:
    """Ends the process half a second after the application's shutdown, should anything still run then.

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

        await self.app(scope, receive, send_and_start if scope["type"] == "lifespan" else send)


def _end() -> None:
    logging.getLogger("downloadview_async").warning("The process ends although some calls still block")
    logging.shutdown()
    os._exit(0)
