"""`/-/livez`: this process answers. `/-/readyz`: it can reach what it serves from. `/-/cache`: what its caches do."""

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
"""The path below which the service has its own pages. The printed configurations of proxies refuse them."""

PUBLIC = ("livez",)
"""The pages below it that clients may ask for: they tell nothing and cost nothing."""

LIVEZ = f"{PRIVATE}livez"
PADDING = "X-Padding"
"""A header of any length up to `MAX_PADDING`, for `downloadview check`: `/-/livez?header=LENGTH`."""

MAX_PADDING = 16_384
"""Bytes."""

_KEPT = 1.0  # seconds that a result counts: whoever asks meanwhile gets it, and starts nothing
_PATIENCE = 2.0  # seconds that a check may take: a hung disk is one that cannot be reached
_PROBE = "readyz"
"""The name of an object that nobody needs to have: a store that says so is reached."""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Health:
    """Answers both, with `checks` by what they are of: one that raises is of something that is not reached."""

    def __init__(self, checks: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self._checks = checks
        self._running: dict[str, asyncio.Task[bool]] = {}
        self._round: asyncio.Task[list[str]] | None = None
        self._good_until = 0.0

    async def livez(self, request: Request) -> Response:
        """Answer 200: the event loop runs. `?header=LENGTH` adds a header of that length, at most `MAX_PADDING`."""
        length = request.query_params.get("header", "")
        if not re.fullmatch("[0-9]{1,5}", length, re.ASCII):
            return PlainTextResponse("alive\n", headers=_HEADERS)
        return PlainTextResponse("alive\n", headers=_HEADERS | {PADDING: "a" * min(int(length), MAX_PADDING)})

    async def readyz(self, request: Request) -> Response:
        """Answer 200, or 503 with the names of what cannot be reached, and nothing more of it.

        One round of checks runs at a time, whatever the number of requests. All of them share its result, and so do
        those of the following second.
        """
        loop = asyncio.get_running_loop()
        if self._round is None or (self._round.done() and (self._round.cancelled() or loop.time() >= self._good_until)):
            self._round = loop.create_task(self._failing())
        failing = await asyncio.shield(self._round)  # a client that leaves ends the round for nobody
        if failing:
            return PlainTextResponse("".join(f"{name}\n" for name in sorted(failing)), 503, _HEADERS)
        return PlainTextResponse("ready\n", headers=_HEADERS)

    async def _failing(self) -> list[str]:
        """Return the names of the checks that fail, or take more than `_PATIENCE` seconds.

        A check that does not even end when it is cancelled fails until it has ended; it is not started again before.
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
    except Exception:  # whatever it is: the answer is the same
        return False
    return True


class CachePage:
    """Answers with the counters of each source's cache in this process, as JSON."""

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
    """Return a check that the directory can be listed, and written to if that is what it is for."""
    # one thread for each directory: a disk that hangs keeps that one, however often it is asked
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
    """Return a check that an object store answers, knows the bucket and takes the keys, by a GET of one object.

    It may deny that one: who may not list a bucket is not told what is missing there. storage: one of the check's own,
    so that downloads that take all of the other's connections do not look like a store that is gone.
    """

    async def check() -> None:
        with contextlib.suppress(FileMissing, AccessDenied):
            async with storage.open(_PROBE, DownloadRequest(range="bytes=0-0")):  # a HEAD does not tell what is wrong
                pass

    return check
