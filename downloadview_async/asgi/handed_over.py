"""Keeps what a transfer holds after it was handed over to a proxy, until the proxy's log tells that it has ended."""

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from math import inf

from starlette.types import Scope

from downloadview_async.accounts.facts import request_id_of
from downloadview_async.accounts.proxy_log import LogLine
from downloadview_async.accounts.rotated_log import RotatedLog
from downloadview_async.policy.limits.limits import TRANSFERS, Transfers
from downloadview_async.sources.per_loop import PerLoop

MOST_SECONDS = 3600.0
"""Seconds after which a transfer counts as ended although the log has no line about it."""

MOST_KEPT = 100_000
"""How many transfers are kept. With more, those that began first count as ended."""

_POLL = 0.25  # seconds between two looks
_RETRY = 1.0  # seconds after which a log that could not be read is tried again
_LOG_SECONDS = 60.0
_BEFORE = 1 << 16  # bytes before the end of the log that are read first: a short transfer may have ended
_ASKS_TWICE = "x-reproxy-url"  # H2O: the line about one of its two requests does not come

logger = logging.getLogger("downloadview_async")

_logs: PerLoop[dict[str, "_Kept"]] = PerLoop()


def hand_over(scope: Scope, order: Mapping[str, str]) -> None:
    """Have what the transfer of a request holds end with the line in the proxy's log, if its limits know that log.

    order: the headers that the proxy obeys, in lower case. Without an `Accounts` around the application, the request
    has no id, by which its line is found.
    """
    transfers: Transfers = scope[TRANSFERS]
    if transfers.proxy_log is not None and (name := request_id_of(scope)) is not None and _ASKS_TWICE not in order:
        transfers.keeper = partial(_keep, transfers.proxy_log, name)


def _keep(path: str, request_id: str, transfers: Transfers) -> None:
    loop = asyncio.get_running_loop()
    logs = _logs.get(loop) or _logs.set(loop, {})
    if path not in logs:
        logs[path] = _Kept(path)
    logs[path].add(request_id, transfers)


class _Kept:
    """The transfers whose end one log will tell."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._transfers: dict[str, tuple[float, Transfers]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, request_id: str, transfers: Transfers) -> None:
        self._end(request_id)  # a proxy may send the same id twice
        self._transfers[request_id] = time.monotonic(), transfers
        if len(self._transfers) > MOST_KEPT:
            self._end(next(iter(self._transfers)))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """Read the log while there are transfers that it may tell of."""
        log: RotatedLog | None = None
        logged_at = -inf
        try:
            while self._transfers:
                delay, lines = _POLL, list[LogLine]()
                try:
                    if log is None:
                        log = await asyncio.to_thread(RotatedLog.from_end, self._path, _BEFORE)
                    lines = await asyncio.to_thread(_lines_of, log)
                except OSError as exc:
                    delay = _RETRY
                    if time.monotonic() - logged_at >= _LOG_SECONDS:
                        logged_at = time.monotonic()
                        logger.warning("the log of the proxy cannot be read: %s", exc)
                for line in lines:
                    self._end(line.request_id, line)
                oldest = time.monotonic() - MOST_SECONDS
                for request_id in [one for one, (began, _) in self._transfers.items() if began < oldest]:
                    self._end(request_id)
                await asyncio.sleep(delay)
        finally:
            self._task = None
            if log is not None:
                log.close()

    def _end(self, request_id: str, line: LogLine | None = None) -> None:
        _, transfers = self._transfers.pop(request_id, (0.0, None))
        if transfers is not None:
            if line is not None:
                transfers.sent(line.sent if line.status in (200, 206) else 0)
            transfers.end()


def _lines_of(log: RotatedLog) -> list[LogLine]:
    """Return what the new lines of a log say. Raises `OSError`. Blocks."""
    log.look()
    return [line for lines, _ in log.read() for line in map(LogLine.parse, lines) if line is not None]
