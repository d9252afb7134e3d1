"""Runs a server whose caches are counted: `python -m benchmarks.counting FILE MODULE [ARGUMENT...]`.

At SIGUSR1 the server writes to FILE, as JSON, how often each cache of the package was called, how often it had the
value, and how long a call takes: without the cache, and with it. The measured calls are some of those that it got.
"""

# ruff: noqa: SLF001 - what a cache has open, and where, it tells nobody

import asyncio
import functools
import gc
import inspect
import json
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

_PACKAGE = "downloadview_async."
_SAMPLES = 200
_SECONDS = 0.01  # how long one measurement lasts; the best of `_REPEATS` counts
_REPEATS = 10

_lru_cache: Any = functools.lru_cache
_choice = random.Random(0)


@dataclass(frozen=True, slots=True)
class Count:
    """What one cache did. The times are the seconds of one call: without the cache, and with it."""

    cache: str
    calls: int
    hits: int
    direct: float
    hit: float
    miss: float

    def saving(self, requests: int) -> float:
        """Return the seconds that the cache saved, divided by the number of requests."""
        misses = self.calls - self.hits
        return (self.calls * self.direct - self.hits * self.hit - misses * self.miss) / requests


class _Samples:
    """A few of many calls, each with the same chance."""

    def __init__(self) -> None:
        self.calls = 0
        self.chosen: list[Any] = []

    def add(self, call: Any) -> None:
        self.calls += 1
        if len(self.chosen) < _SAMPLES:
            self.chosen.append(call)
        elif (place := _choice.randrange(self.calls)) < _SAMPLES:
            self.chosen[place] = call


class _Recorded:
    """A `functools.lru_cache` that takes samples of its calls."""

    def __init__(self, function: Callable[..., Any], cached: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.cached = cached
        self.cache_clear = cached.cache_clear
        self.samples = _Samples()

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.samples.add((args, named))
        return self.cached(*args, **named)

    def count(self, info: Any) -> Count:
        calls = self.samples.chosen
        distinct = [*{(args, *named.items()): (args, named) for args, named in calls}.values()]
        cold = _lru_cache(maxsize=info.maxsize)(self.function)

        def call_all(function: Callable[..., Any], calls: list[Any]) -> None:
            for args, named in calls:
                function(*args, **named)

        def miss() -> None:
            cold.cache_clear()
            call_all(cold, distinct)

        direct, hit, missed = _seconds(
            lambda: call_all(self.function, calls), lambda: call_all(self.cached, calls), miss
        )
        return Count(
            cache=f"{self.function.__module__.removeprefix(_PACKAGE)}.{self.function.__name__}",
            calls=info.hits + info.misses,
            hits=info.hits,
            direct=direct / len(calls),
            hit=hit / len(calls),
            miss=missed / len(distinct),
        )


def _seconds(*functions: Callable[[], None]) -> list[float]:
    """Return the seconds of this thread that a call of each function takes: the least of several means, in turns."""
    best = [float("inf")] * len(functions)
    for _ in range(_REPEATS):
        for number, function in enumerate(functions):
            turns, start = 0, time.thread_time()
            while not turns or time.thread_time() - start < _SECONDS:
                function()
                turns += 1
            best[number] = min(best[number], (time.thread_time() - start) / turns)
    return best


def _record_lru_caches() -> None:
    """Have the modules of the package, which are imported later, make caches that take samples of their calls."""

    def lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
        def decorate(function: Any) -> Any:
            cached = _lru_cache(maxsize, typed)(function)
            if function.__module__.startswith(_PACKAGE) and inspect.signature(function).parameters:
                return _Recorded(function, cached)
            return cached  # not of the package, or a value that is made once

        if callable(maxsize):
            function, maxsize = maxsize, 128
            return decorate(function)
        return decorate

    vars(functools)["lru_cache"] = lru_cache


def _count_lru_caches() -> list[Count]:
    recorded = [cache for cache in gc.get_objects() if isinstance(cache, _Recorded) and cache.samples.calls]
    infos = [cache.cached.cache_info() for cache in recorded]
    for name, module in sys.modules.items():  # what is measured shall not take samples
        if name.startswith(_PACKAGE):
            vars(module).update(
                {key: value.cached for key, value in vars(module).items() if isinstance(value, _Recorded)}
            )
    return [cache.count(info) for cache, info in zip(recorded, infos, strict=True)]


def _record_open_files() -> Callable[[], list[Count]]:
    """Count what `OpenFileCache` does. Return what gives the count, in the thread of the event loop."""
    from downloadview_async.errors import FileError
    from downloadview_async.sources.local.open_file import OpenLocalFile
    from downloadview_async.sources.local.open_file_cache import MAX_FILES, OpenFileCache
    from downloadview_async.sources.local.root import Root
    from downloadview_async.sources.workers import Workers

    samples = _Samples()
    openings = 0
    misses = {"first": 0, "second": 0}
    open_beneath, open_cached = Root.open_nowait, OpenFileCache.open

    def open_beneath_counted(root: Root, name: str) -> Any:
        nonlocal openings
        openings += 1
        return open_beneath(root, name)

    def open_cached_counted(cache: OpenFileCache, name: str) -> Any:
        before = openings
        samples.add((cache, name))
        kept = cache._kept.get(asyncio.get_running_loop())
        which = "second" if kept is not None and name in kept.opened_once else "first"
        try:
            return open_cached(cache, name)
        finally:
            misses[which] += openings != before

    def patch(beneath: Any, cached: Any) -> None:
        Root.open_nowait = beneath  # type: ignore[method-assign]
        OpenFileCache.open = cached  # type: ignore[method-assign]

    def counts() -> list[Count]:
        patch(open_beneath, open_cached)
        if not samples.calls:
            return []
        root, workers, loop = samples.chosen[0][0]._root, Workers(1), asyncio.get_running_loop()

        def open_uncached(name: str) -> OpenLocalFile | None:
            opened = root.open_nowait(name)
            return None if opened is None else OpenLocalFile(*opened, workers=workers)

        def can_be_opened(name: str) -> bool:
            try:
                file = open_uncached(name)
            except FileError:
                return False
            if file is not None:
                file.close()
            return file is not None

        names = [*filter(can_be_opened, dict.fromkeys(name for _, name in samples.chosen))][:MAX_FILES]

        def open_all(opener: Callable[[str], OpenLocalFile | None]) -> None:
            for name in names:
                file = opener(name)
                assert file is not None
                file.close()

        def cold(times: int) -> None:
            cache = OpenFileCache(root, workers)
            for _ in range(times):
                open_all(cache.open)
            cache._kept.drop(loop)

        warm = OpenFileCache(root, workers)
        open_all(warm.open)
        measured = _seconds(
            lambda: open_all(open_uncached), lambda: open_all(warm.open), lambda: cold(1), lambda: cold(2)
        )
        direct, hit, once, twice = (seconds / len(names) for seconds in measured)
        missed = misses["first"] + misses["second"]
        return [
            Count(
                cache="sources.local.open_file_cache.OpenFileCache",
                calls=samples.calls,
                hits=samples.calls - missed,
                direct=direct,
                hit=hit,
                miss=(misses["first"] * once + misses["second"] * (twice - once)) / max(missed, 1),
            )
        ]

    patch(open_beneath_counted, open_cached_counted)
    return counts


def _record_kept_answers() -> Callable[[], list[Count]]:
    """Count what `KeptAnswers` does, and return what gives the count.

    The times are those of this thread while the clients came: "without" and a miss are the application's answer to a
    request whose answer was then kept, without what the server does for it; a hit is all that the server does instead.
    """
    from downloadview_async.asgi.kept_answers import KeptAnswers
    from downloadview_async.asgi.server import DownloadProtocol
    from downloadview_async.service.reload import Generation

    calls = kept = heads = 0
    hits: list[float] = []
    answered: list[float] = []
    known: list[float] = []
    parsed: list[float] = []
    keep, give, answer = KeptAnswers._keep, DownloadProtocol._has_given_again, Generation.app
    give_known, receive = DownloadProtocol._has_answered_known, DownloadProtocol.data_received

    def keep_counted(answers: KeptAnswers, *args: Any) -> None:
        nonlocal kept
        kept += 1
        keep(answers, *args)

    def give_counted(connection: DownloadProtocol, *args: Any) -> bool:
        nonlocal calls
        calls += 1
        start = time.thread_time()
        is_hit = give(connection, *args)
        if is_hit:
            hits.append(time.thread_time() - start)
        return is_hit

    def give_known_counted(connection: DownloadProtocol, data: bytes) -> bool | None:
        nonlocal heads
        heads += 1
        start = time.thread_time()
        is_hit = give_known(connection, data)
        if is_hit:
            known.append(time.thread_time() - start)
        return is_hit

    def receive_counted(connection: DownloadProtocol, data: bytes) -> None:
        before, start = (len(hits), len(known)), time.thread_time()
        receive(connection, data)
        if (len(hits), len(known)) == (before[0] + 1, before[1]):
            parsed.append(time.thread_time() - start)

    async def answer_counted(generation: Generation, *args: Any) -> None:
        before, start = kept, time.thread_time()
        await answer(generation, *args)
        if kept == before + 1:  # nothing else ran meanwhile: such an answer waits for nothing
            answered.append(time.thread_time() - start)

    KeptAnswers._keep = keep_counted  # type: ignore[method-assign, assignment]
    DownloadProtocol._has_given_again = give_counted  # type: ignore[method-assign, assignment]
    DownloadProtocol._has_answered_known = give_known_counted  # type: ignore[method-assign, assignment]
    DownloadProtocol.data_received = receive_counted  # type: ignore[method-assign, assignment]
    Generation.app = answer_counted  # type: ignore[method-assign, assignment]

    def counts() -> list[Count]:
        if not (hits and answered):
            return []
        name, direct, hit = "asgi.kept_answers.KeptAnswers", median(answered), median(hits)
        counts = [Count(cache=name, calls=calls, hits=len(hits), direct=direct, hit=hit, miss=direct)]
        if known and parsed:  # a hit is all that the server does, "without" is that of a head that is parsed
            name, direct, hit = f"{name}.known_fields", median(parsed), median(known)
            counts.append(Count(cache=name, calls=heads, hits=len(known), direct=direct, hit=hit, miss=direct))
        return counts

    return counts


def main(file: Path, module: str, arguments: list[str]) -> None:
    """Run a module as `python -m` does, with counted caches."""
    _record_lru_caches()
    count_open_files = _record_open_files()
    count_kept_answers = _record_kept_answers()

    def write(number: int, frame: object) -> None:
        from uvicorn.server import ServerState

        gc.unfreeze()  # the service freezes what exists at its start, and that is not found then
        requests = sum(state.total_requests for state in gc.get_objects() if isinstance(state, ServerState))
        counts = [asdict(count) for count in (*count_kept_answers(), *_count_lru_caches(), *count_open_files())]
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"requests": requests, "counts": counts}))
        unfinished.rename(file)

    signal.signal(signal.SIGUSR1, write)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
