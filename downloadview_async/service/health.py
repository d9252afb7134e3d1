"""`/-/livez`: this process answers. `/-/readyz`: it can reach what it serves from. `/-/cache`: what its caches do."""

import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable, Mapping

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from downloadview_async import AccessDenied, Cache, DownloadRequest, FileMissing, ObjectStorage

PRIVATE = "/-/"
"""Where the service has its own pages, which the printed configurations of proxies refuse."""

PUBLIC = ("livez",)
"""The pages of it that clients may ask for: they tell nothing and cost nothing."""

_PATIENCE = 2.0  # seconds that a check may take: a hung disk is one that cannot be reached
_PROBE = "readyz"
"""The name of an object that nobody needs to have: a store that says so is reached."""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Health:
    """Answers both, with `checks` by what they are of: one that raises is of something that is not reached."""

    def __init__(self, checks: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self._checks = checks

    async def livez(self, request: Request) -> Response:
        """Answer 200: the event loop runs."""
        return PlainTextResponse("alive\n", headers=_HEADERS)

    async def readyz(self, request: Request) -> Response:
        """Answer 200, or 503 with the names of what cannot be reached, and nothing more of it."""
        failed: list[str] = []

        async def run(name: str, check: Callable[[], Awaitable[None]]) -> None:
            try:
                with anyio.fail_after(_PATIENCE):
                    await check()
            except Exception:  # whatever it is: the answer is the same
                failed.append(name)

        async with anyio.create_task_group() as tasks:
            for name, check in self._checks.items():
                tasks.start_soon(run, name, check)
        if failed:
            return PlainTextResponse("".join(f"{name}\n" for name in sorted(failed)), 503, _HEADERS)
        return PlainTextResponse("ready\n", headers=_HEADERS)


class CachePage:
    """Answers with the counters of each source's cache in this process, as JSON."""

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        self._caches = caches

    async def answer(self, request: Request) -> Response:
        """Answer 200; sources that share a cache have the same numbers."""
        counters = {name: dataclasses.asdict(cache.counters) for name, cache in self._caches.items()}
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
