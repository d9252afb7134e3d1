"""The log of the service: aborted transfers and failed start-ups are one line each, without a traceback.

Texts from clients, upstreams and exceptions cannot forge log lines: line ends and control characters are escaped, and
long texts are shortened.
"""

import asyncio
import codecs
import copy
import logging
import re
from collections.abc import Awaitable, Iterator
from traceback import TracebackException
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import ConfigurationError, TransferAborted
from downloadview_async.service.patient_handler import PatientHandler

_SERVER_LOGGER = "uvicorn.error"
_ACCESS_LOGGER = "uvicorn.access"
codecs.lookup("unicode_escape")  # loaded now: later the process may have run out of descriptors

LONGEST = 2_500
"""The most characters of a message, of a value in the access log, and of a line of a traceback."""

_END = 300
_MARK = 50  # room for the note of how much is left out, so that the result is never shortened again
_MOST_CAUSES = 20  # exceptions of one traceback
_MOST_LINES = 400  # of one traceback


def one_line(text: str) -> str:
    """Return a text with unprintable characters, such as line ends, escaped, and without the middle of a long text."""
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if len(text) <= LONGEST:
        return text
    left_out = len(text) - (LONGEST - _MARK)
    return f"{text[: LONGEST - _MARK - _END]}[... {left_out} characters ...]{text[-_END:]}"


class OneLine(logging.Filter):
    """Puts each message on one line, and each exception message of a traceback too."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, and return True."""
        if isinstance(record.args, tuple) and record.name == _ACCESS_LOGGER:  # its formatter uses them
            record.args = tuple(one_line(value) if isinstance(value, str) else value for value in record.args)
        elif "color_message" not in record.__dict__:  # uvicorn formats these messages again
            record.msg, record.args = one_line(_message(record)), None
        if record.exc_info and not record.exc_text and (exc := record.exc_info[1]) is not None:
            try:
                record.exc_text = "\n".join(_traceback(exc))
            except Exception as failure:  # an error in a filter would end the request
                record.exc_text = f"{type(exc).__name__}, whose traceback cannot be shown: {type(failure).__name__}"
        return True


_one_line = OneLine()


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage().rstrip("\n")
    except Exception as exc:  # str() of an argument may raise anything, which must not end the request
        return f"{record.msg!r} cannot be filled in: {type(exc).__name__}"


def _traceback(exc: BaseException) -> list[str]:
    """Return the lines of a traceback as Python prints it, with each exception's message on one line."""
    lines = [one_line(line) for line in _lines_of(TracebackException.from_exception(exc))]
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        lines = [*lines[:half], f"[... {len(lines) - _MOST_LINES} lines ...]", *lines[-half:]]
    return lines


def _lines_of(last: TracebackException) -> Iterator[str]:
    chain = [(last, "")]
    while len(chain) < _MOST_CAUSES:
        exc, _ = chain[-1]
        if exc.__cause__ is not None:
            chain.append((exc.__cause__, "The above exception was the direct cause of the following exception:"))
        elif exc.__context__ is not None and not exc.__suppress_context__:
            chain.append((exc.__context__, "During handling of the above exception, another exception occurred:"))
        else:
            break
    for exc, then in reversed(chain):
        yield "Traceback (most recent call last):"
        for frame in exc.stack.format():
            yield from re.split("\r?\n", frame.rstrip("\n"))
        notes, exc.__notes__ = exc.__notes__, None  # notes would be printed with their line ends
        for text in exc.format_exception_only():
            yield text.rstrip("\n")
        yield from map(str, notes if isinstance(notes, list) else ())
        for number, inner in enumerate((exc.exceptions or ())[:_MOST_CAUSES], 1):
            yield f"  | exception {number} of the group:"
            for line in _lines_of(inner):
                yield f"  | {line}"
        if then:
            yield from ("", then, "")


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log a transfer that was aborted by `TransferAborted`, or because the server stops, without a traceback."""
    exc = record.exc_info[1] if record.exc_info else None
    if isinstance(exc, asyncio.CancelledError) and "lifespan" in str(record.msg):
        return False  # not a transfer; `OneLineFailures` says that the server ends at once
    if isinstance(exc, TransferAborted | asyncio.CancelledError):
        reason = str(exc) if isinstance(exc, TransferAborted) else "the server stops"
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        reason = " ".join([reason, *(f"({note})" for note in getattr(exc, "__notes__", ()))])
        record.msg, record.args = "Transfer aborted: %s", (one_line(reason.encode("unicode_escape").decode()),)
        record.exc_info = record.exc_text = None
    return True


def log_in_single_lines() -> None:
    """Make uvicorn and the library log single lines, and aborted transfers without a traceback.

    The filters stay for the life of the process, because the last transfers end after the application. `log_config`
    does the same for all loggers; this is for a uvicorn that was started without it.
    """
    logging.getLogger(_SERVER_LOGGER).addFilter(_without_traceback)
    for name in (_SERVER_LOGGER, _ACCESS_LOGGER, "downloadview_async"):
        logging.getLogger(name).addFilter(_one_line)


def log_aborts_in_one_line() -> None:
    """Make uvicorn log aborted transfers as one line, until the process ends: some outlive the application."""
    logging.getLogger(_SERVER_LOGGER).addFilter(_without_traceback)


class OneLineFailures:
    """Reports a start-up that fails with a `ConfigurationError`, and a forced shutdown, as one line each."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass everything on, but shorten the message of a failed start-up or shutdown."""
        return (self._live if scope["type"] == "lifespan" else self.app)(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed: list[Message] = []

        async def keep_failure(message: Message) -> None:
            if message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
                failed.append(message)  # sent below, when the exception is known
            else:
                await send(message)

        try:
            await self.app(scope, receive, keep_failure)
        except BaseException as exc:
            for message in failed:
                if isinstance(exc, ConfigurationError):
                    message["message"] = one_line(str(exc))
                elif isinstance(exc, asyncio.CancelledError):
                    message["message"] = "The server ends at once, because it was told to stop twice"
                await send(message)  # any other exception is a bug: its message has the whole traceback
            raise


class PathAlone(logging.Filter):
    """Removes the query string from uvicorn's access log, because it may hold the token of a signed link."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, and return True."""
        match record.args:
            case (client, method, str(target), *rest):
                record.args = (client, method, target.partition("?")[0], *rest)
        return True


def log_config(level: str) -> dict[str, Any]:
    """Return uvicorn's logging configuration with the library's logger, single lines, and no query strings."""
    from uvicorn.config import LOGGING_CONFIG

    config: dict[str, Any] = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"path_alone": {"()": PathAlone}, "one_line": {"()": OneLine}}
    config["handlers"]["access"]["filters"] = ["path_alone", "one_line"]
    config["handlers"]["default"]["filters"] = ["one_line"]
    for handler in config["handlers"].values():
        del handler["class"]
        handler["()"] = PatientHandler
    config["loggers"]["downloadview_async"] = {
        "handlers": ["default"],
        "level": "DEBUG" if level == "trace" else level.upper(),
        "propagate": False,
    }
    config["root"] = {"handlers": ["default"], "level": "WARNING"}  # asyncio, and the modules of virtual sources
    return config
