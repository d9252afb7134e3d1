"""What the service says in the log: one line where a server would print a traceback that tells an operator nothing."""

import asyncio
import codecs
import copy
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import ConfigurationError, TransferAborted

_SERVER_LOGGER = "uvicorn.error"
codecs.lookup("unicode_escape")  # now: when it is first needed, there may be no descriptor left to load it by


def _without_traceback(record: logging.LogRecord) -> bool:
    """Make one line of a transfer that was aborted on purpose: by `TransferAborted`, or at the end of the server."""
    exc = record.exc_info[1] if record.exc_info else None
    if isinstance(exc, TransferAborted | asyncio.CancelledError):
        reason = str(exc) if isinstance(exc, TransferAborted) else "the server stops"
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args = "Transfer aborted: %s", (reason.encode("unicode_escape").decode(),)
        record.exc_info = record.exc_text = None
    return True


def log_aborts_in_one_line() -> None:
    """Have uvicorn log an aborted transfer as one line, to the end of the process: the last ones end after us."""
    logging.getLogger(_SERVER_LOGGER).addFilter(_without_traceback)


class OneLineFailures:
    """Has a start-up that fails for a `ConfigurationError`, and an end that is forced, report one line each."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, but for the message of a failed start-up or shutdown."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        failed: list[Message] = []

        async def keep_failure(message: Message) -> None:
            if message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
                failed.append(message)  # sent below, when it is known why
            else:
                await send(message)

        try:
            await self.app(scope, receive, keep_failure)
        except BaseException as exc:
            for message in failed:
                if isinstance(exc, ConfigurationError):
                    message["message"] = str(exc)
                elif isinstance(exc, asyncio.CancelledError):
                    message["message"] = "The server ends at once, as it was told to twice"
                await send(message)  # anything else is a bug, and told in full
            raise


class PathAlone(logging.Filter):
    """Takes the query from uvicorn's access log: it may hold the token of a signed link."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, and let it pass."""
        match record.args:
            case (client, method, str(target), *rest):
                record.args = (client, method, target.partition("?")[0], *rest)
        return True


def log_config(level: str) -> dict[str, Any]:
    """Return uvicorn's own logging configuration, with the library's log in it, and without queries."""
    from uvicorn.config import LOGGING_CONFIG

    config: dict[str, Any] = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"path_alone": {"()": PathAlone}}
    config["handlers"]["access"]["filters"] = ["path_alone"]
    config["loggers"]["downloadview_async"] = {
        "handlers": ["default"],
        "level": "DEBUG" if level == "trace" else level.upper(),
        "propagate": False,
    }
    return config
