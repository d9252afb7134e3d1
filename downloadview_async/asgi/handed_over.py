"""Keeps what a transfer holds after it was handed over to a proxy, until the proxy's log tells that it has ended."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
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

_MOST_EARLY = 10_000  # lines that were read before their answer was handed over
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
    if awaits_line(scope, order):
        transfers: Transfers = scope[TRANSFERS]
        transfers.hand_over(partial(_keep, transfers.proxy_log or "", request_id_of(scope) or ""))


def awaits_line(scope: Scope, order: Iterable[str]) -> bool:
    """Return whether a transfer that is handed over with these headers ends with its line in the proxy's log."""
    transfers: Transfers | None = scope.get(TRANSFERS)
    is_known = transfers is not None and transfers.proxy_log is not None
    return is_known and request_id_of(scope) is not None and _ASKS_TWICE not in order


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
        self._transfers: dict[str, list[tuple[float, Transfers]]] = {}
        """By their ids. A proxy that passes on what its clients send gives several requests the same one."""
        self._count = 0
        self._early: dict[str, LogLine] = {}
        """A proxy writes about a client that has left at once, while the application may still decide."""
        self._task: asyncio.Task[None] | None = None

    def add(self, request_id: str, transfers: Transfers) -> None:
        self._transfers.setdefault(request_id, []).append((time.monotonic(), transfers))
        self._count += 1
        if (line := self._early.pop(request_id, None)) is not None:
            self._end(request_id, line)
        elif self._count > MOST_KEPT:
            self._end(next(iter(self._transfers)))
        if self._task is None and self._transfers:
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
                for request_id in [one for one, begun in self._transfers.items() if begun[0][0] < oldest]:
                    self._end(request_id)
                await asyncio.sleep(delay)
        finally:
            self._task = None
            self._early.clear()
            if log is not None:
                log.close()

    def _end(self, request_id: str, line: LogLine | None = None) -> None:
        """End the transfer with this id, the one that began first if there are several."""
        begun = self._transfers.get(request_id)
        if begun is None:
            assert line is not None
            self._early[request_id] = line
            if len(self._early) > _MOST_EARLY:
                del self._early[next(iter(self._early))]
            return
        _, transfers = begun.pop(0)
        self._count -= 1
        if not begun:
            del self._transfers[request_id]
        if line is not None:
            transfers.sent(line.sent if line.status in (200, 206) else 0)
        transfers.end()


def _lines_of(log: RotatedLog) -> list[LogLine]:
    """Return what the new lines of a log say. Raises `OSError`. Blocks."""
    log.look()
    return [line for lines, _ in log.read() for line in map(LogLine.parse, lines) if line is not None]
