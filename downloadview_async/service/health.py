"""Pages for probes: `/-/livez` (the process runs), `/-/readyz` (its sources are reachable), `/-/cache` (counters)."""

import asyncio
import contextlib
import dataclasses
import os
import re
from collections.abc import Awaitable, Callable, Mapping

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from downloadview_async import AccessDenied, Cache, DownloadRequest, FileMissing, ObjectStorage

PRIVATE = "/-/"
"""The path of the service's pages. Printed proxy configurations hide them from clients, except for `PUBLIC`."""

PUBLIC = ("livez",)
"""The pages below `PRIVATE` that clients may request: they reveal nothing and cost nothing."""

LIVEZ = f"{PRIVATE}livez"
PADDING = "X-Padding"
"""The header that `/-/livez?header=LENGTH` adds for `downloadview check`, of up to `MAX_PADDING` bytes."""

MAX_PADDING = 16_384
"""The most bytes of the padding header."""

_KEPT = 1.0  # seconds that a result is reused
_PATIENCE = 2.0  # seconds that a check may take: a hung disk counts as unreachable
_PROBE = "readyz"
"""The name of an object that need not exist: a store that answers "missing" is reachable."""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Health:
    """Answers `/-/livez` and `/-/readyz`.

    checks: by the name of what they check; a check that raises has failed. is_draining: whether the service is told to
    end, and a balancer should send no more requests.
    """

    is_draining = False

    def __init__(self, checks: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self._checks = checks
        self._running: dict[str, asyncio.Task[bool]] = {}
        self._round: asyncio.Task[list[str]] | None = None
        self._good_until = 0.0

    async def livez(self, request: Request) -> Response:
        """Answer 200: the event loop runs. `?header=LENGTH` adds a header of that many bytes, up to `MAX_PADDING`."""
        length = request.query_params.get("header", "")
        if not re.fullmatch("[0-9]{1,5}", length, re.ASCII):
            return PlainTextResponse("alive\n", headers=_HEADERS)
        return PlainTextResponse("alive\n", headers=_HEADERS | {PADDING: "a" * min(int(length), MAX_PADDING)})

    async def readyz(self, request: Request) -> Response:
        """Answer 200, or 503 with only the names of the checks that fail, or 503 because the service is told to end.

        Concurrent requests share one round of checks, and requests within a second after its end share its result.
        """
        if self.is_draining:
            return PlainTextResponse("draining\n", 503, _HEADERS)
        loop = asyncio.get_running_loop()
        if self._round is None or (self._round.done() and (self._round.cancelled() or loop.time() >= self._good_until)):
            self._round = loop.create_task(self._failing())
        failing = await asyncio.shield(self._round)  # a client that leaves must not cancel the round for others
        if failing:
            return PlainTextResponse("".join(f"{name}\n" for name in sorted(failing)), 503, _HEADERS)
        return PlainTextResponse("ready\n", headers=_HEADERS)

    async def _failing(self) -> list[str]:
        """Return the names of the checks that fail, or take more than `_PATIENCE` seconds.

        A check that does not end even when it is cancelled fails, and is not started again, until it ends.
        """
        loop = asyncio.get_running_loop()
        self._running = {name: task for name, task in self._running.items() if not task.done()}
        for name, check in self._checks.items():
            if name not in self._running:
                self._running[name] = loop.create_task(_passes(check))
        late = (await asyncio.wait(self._running.values(), timeout=_PATIENCE))[1] if self._running else set()
        for task in late:
            task.cancel()
        self._good_until = loop.time() + _KEPT
        return [name for name, task in self._running.items() if task in late or task.cancelled() or not task.result()]


async def _passes(check: Callable[[], Awaitable[None]]) -> bool:
    try:
        await check()
    except Exception:  # a check may raise anything
        return False
    return True


class CachePage:
    """Answers `/-/cache`: the counters of each source's cache in this process, as JSON."""

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        self._caches = caches

    async def answer(self, request: Request) -> Response:
        """Answer 200; sources that share a cache have the same numbers."""
        counters = {
            name: {**dataclasses.asdict(now := cache.counters), "stale": now.revalidated}  # the old name stays
            for name, cache in self._caches.items()
        }
        return JSONResponse(counters, headers=_HEADERS)


def check_directory(path: str, *, written: bool = False) -> Callable[[], Awaitable[None]]:
    """Return a check that a directory can be listed, and with `written` that files can be created in it."""
    # a hung disk blocks at most one thread for each directory, however often it is checked
    limiter = anyio.CapacityLimiter(1)

    def listed() -> None:
        with os.scandir(path) as entries:
            next(entries, None)
        if written and not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(path)

    async def check() -> None:
        await anyio.to_thread.run_sync(listed, limiter=limiter, abandon_on_cancel=True)

    return check


def check_store(storage: ObjectStorage) -> Callable[[], Awaitable[None]]:
    """Return a check that an object store answers and accepts the bucket and the keys, by a GET of one object.

    The store may deny access to that object: without permission to list a bucket, S3 answers 403 for a missing object.
    storage: one that only this check uses, so that the check does not wait when downloads use all connections.
    """

    async def check() -> None:
        with contextlib.suppress(FileMissing, AccessDenied):
            async with storage.open(
                _PROBE, DownloadRequest(range="bytes=0-0")
            ):  # the answer to a HEAD has no error code
                pass

    return check
