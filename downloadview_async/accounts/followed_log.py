"""`ProxyLog`: counts what a proxy has sent of delegated answers, by the log of the proxy."""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from math import inf
from typing import TypeVar, TypeVarTuple

import anyio

from downloadview_async.accounts.completion_store import CompletionStore, Place
from downloadview_async.accounts.proxy_log import LogLine
from downloadview_async.accounts.rotated_log import LogDirectory, RotatedLog, open_log
from downloadview_async.errors import wrong_type
from downloadview_async.sources.workers import Workers

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger("downloadview_async")

_PATIENCE = 2.0  # seconds; the processes of the application write about a delegated answer some time after it
_OLD_SECONDS = 3600.0  # the answers of a log that was written so long ago are in the database, or never will be
_LOG_SECONDS = 60.0


class ProxyLog:
    """Adds the lines of a proxy's log to a store: what the proxy has sent of answers that were delegated to it.

        await ProxyLog("/var/log/nginx/downloads.log", store).add()

    path: of a log, or of a directory of logs, as S3 writes them: many files, which are read once each.

    Each answer is counted once, however often its line is read, by however many processes. The store also keeps up to
    where the log was read, so that the next time only what follows is read, in renamed files too. Lines of answers that
    were not delegated are left out.
    """

    def __init__(self, path: str | os.PathLike[str], store: CompletionStore) -> None:
        if not isinstance(store, CompletionStore):
            raise wrong_type("ProxyLog takes the path of a log, and a CompletionStore", store)
        self.path = os.path.abspath(path)
        self.store = store
        self._workers = Workers(1)  # a walk through a directory of logs would hold up the event loop

    async def add(self) -> int:
        """Add all lines up to now, and return how many answers were counted.

        Raises `OSError` if the log cannot be read, and what the database raises.
        """
        log = await self._open()
        try:
            written_at = await self._in_thread(log.look)
            if written_at is None:
                return 0
            age = time.time() - written_at
            await anyio.sleep(min(_PATIENCE, max(0.0, _PATIENCE - age)))
            return await self._add(log, keeps_unknown=age < _OLD_SECONDS)
        finally:
            log.close()

    async def follow(self) -> None:
        """Add the lines as they are written, until this is cancelled.

        Of the processes of one machine that follow the same log, one reads it. A log that is missing or cannot be read,
        and a database that fails, are tried again; a line in the log tells that, at most once a minute.
        """
        logged_at = -inf
        while True:
            try:
                log = await self._open()
                try:
                    await self._follow(log)
                finally:
                    log.close()
            except Exception as exc:  # whatever the driver raises
                if time.monotonic() - logged_at >= _LOG_SECONDS:
                    logged_at = time.monotonic()
                    reason = f"{type(exc).__name__}: {getattr(exc, 'orig', exc)}"
                    logger.warning("The log of the proxy cannot be counted now: %s", reason)
            await anyio.sleep(1)

    async def _open(self) -> RotatedLog | LogDirectory:
        return await self._in_thread(open_log, self.path, await self.store.places(self.path))

    async def _in_thread(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await self._workers.run(function, *args, patience=inf)

    async def _follow(self, log: RotatedLog | LogDirectory) -> None:
        """Follow the log. Return if another process follows it."""
        locked = due = None
        while True:
            await self._in_thread(log.open)
            if log.current is not None and log.current != locked:
                if not _lock(log.current):
                    return
                locked = log.current
            if due is None and await self._in_thread(log.look) is not None:
                due = time.monotonic() + _PATIENCE
            if due is not None and time.monotonic() >= due:
                due = None
                await self._add(log)
            else:
                await anyio.sleep(log.poll if due is None else min(log.poll, _PATIENCE))

    async def _add(self, log: RotatedLog | LogDirectory, *, keeps_unknown: bool = True) -> int:
        count = 0
        with closing(_parts_of(log)) as parts:
            while (part := await self._in_thread(next, parts, None)) is not None:
                count += len(await self.store.close_delegated(*part, keeps_unknown=keeps_unknown))
        return count


def _parts_of(log: RotatedLog | LogDirectory) -> Generator[tuple[list[LogLine], Place]]:
    with closing(log.read()) as read:
        for lines, place in read:
            yield [line for line in map(LogLine.parse, lines) if line is not None], place


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
