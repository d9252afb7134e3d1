"""Threads are bounded for each source, and a call that hangs holds up nobody else."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from downloadview_async import SourceUnavailable
from downloadview_async.sources.workers import Longest, Slots, Workers

pytestmark = pytest.mark.asyncio


class Disk:
    """A disk that hangs until it is repaired."""

    def __init__(self) -> None:
        self.repaired = threading.Event()
        self.waiting = threading.Semaphore(0)
        self.discarded: list[str] = []

    def open(self, name: str) -> str:
        self.waiting.release()
        assert self.repaired.wait(30)
        return name

    async def hung(self, calls: int) -> None:
        for _ in range(calls):
            await asyncio.to_thread(self.waiting.acquire)


@asynccontextmanager
async def hanging(workers: Workers, disk: Disk, calls: int) -> AsyncIterator[list["asyncio.Task[str]"]]:
    tasks = [
        asyncio.create_task(workers.run_or_abandon(disk.open, str(n), discard=disk.discarded.append))
        for n in range(calls)
    ]
    await disk.hung(calls)
    try:
        yield tasks
    finally:
        disk.repaired.set()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_hung_source_turns_further_calls_away_and_another_is_unaffected() -> None:
    hung, other, disk = Workers(4, patience=0.05), Workers(4, patience=0.05), Disk()
    async with hanging(hung, disk, 4) as tasks:
        with pytest.raises(SourceUnavailable, match="4 slots"):
            await hung.run_or_abandon(disk.open, "x")
        with pytest.raises(SourceUnavailable):
            await hung.run(len, "x")
        assert await other.run(len, "four") == 4
        assert await asyncio.to_thread(len, "any other thread of the process") == 31
        disk.repaired.set()
        assert await asyncio.gather(*tasks) == ["0", "1", "2", "3"]
    assert await hung.run(len, "x") == 1
    assert disk.discarded == []


async def test_a_cancelled_caller_leaves_at_once_and_its_worker_stays_taken_until_the_call_ends() -> None:
    workers, disk = Workers(1, patience=0.05), Disk()
    async with hanging(workers, disk, 1) as tasks:
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(tasks[0], 5)
        with pytest.raises(SourceUnavailable):
            await workers.run(len, "x")
        disk.repaired.set()
        while not disk.discarded:
            await asyncio.sleep(0)
    assert disk.discarded == ["0"]
    for _ in range(100):
        try:
            assert await workers.run(len, "x") == 1
            return
        except SourceUnavailable:
            continue
    raise AssertionError("the worker was never given back")


async def test_a_result_is_never_lost_however_cancellation_and_completion_meet() -> None:
    """Each call either gives its result or discards it, and all workers come back."""
    workers = Workers(8, patience=30)
    made: list[int] = []
    given: list[int] = []
    discarded: list[int] = []

    has_made = threading.Event()

    def make(number: int) -> int:
        made.append(number)
        has_made.set()
        return number

    async def one(number: int) -> None:
        given.append(await workers.run_or_abandon(make, number, discard=discarded.append))

    for turn in range(300):
        task = asyncio.create_task(one(turn))
        for _ in range(turn % 7):
            await asyncio.sleep(0)
        if turn % 3 == 1:
            has_made.wait(0.0002)  # let the worker finish while the loop is not looking
        elif turn % 3 == 2:
            while not has_made.is_set() or (turn % 5 and not task.done()):
                await asyncio.sleep(0)
        has_made.clear()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    while sorted(given + discarded) != sorted(made):
        await asyncio.sleep(0.001)
    for _ in range(8):
        assert await workers.run(len, "") == 0
    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(workers.run, len, "")
    assert given
    assert discarded


async def test_errors_come_through_and_free_the_worker() -> None:
    workers = Workers(1, patience=0.05)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await workers.run_or_abandon(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            await workers.run(divmod, 1, 0)


async def test_after_a_call_that_hung_others_of_its_kind_wait_less_until_one_ends() -> None:
    workers, disk = Workers(stuck=0.3), Disk()
    opening, reading = Longest("open", 1.0), Longest("read", 1.0)

    async def seconds(longest: Longest) -> float:
        began = time.monotonic()
        with pytest.raises(SourceUnavailable, match="the disk has not answered for"):
            await workers.run_or_abandon(disk.open, "x", discard=disk.discarded.append, longest=longest)
        return time.monotonic() - began

    assert await seconds(opening) >= 1.0
    assert [0.3 <= await seconds(opening) < 1.0 for _ in range(3)] == [True] * 3
    assert await workers.run_or_abandon(len, "four", longest=reading) == 4
    assert await seconds(reading) >= 1.0  # one that works, of another kind, changes nothing
    assert await seconds(opening) < 1.0
    assert workers.slots.in_use == 6
    disk.repaired.set()
    while workers.slots.in_use:
        await asyncio.sleep(0.001)
    assert disk.discarded == ["x"] * 6
    disk.repaired.clear()
    assert await seconds(opening) >= 1.0
    disk.repaired.set()


async def test_a_call_that_hangs_while_others_of_its_kind_end_does_not_make_them_wait_less() -> None:
    workers, disk, opening = Workers(stuck=0.05), Disk(), Longest("open", 1.0)

    hung = asyncio.create_task(workers.run_or_abandon(disk.open, "x", longest=opening))
    await disk.hung(1)
    assert await workers.run_or_abandon(len, "four", longest=opening) == 4
    with pytest.raises(SourceUnavailable):
        await hung
    late = asyncio.create_task(workers.run_or_abandon(disk.open, "y", longest=opening))
    await disk.hung(1)
    await asyncio.sleep(0.2)
    disk.repaired.set()
    assert await late == "y"


async def test_slots() -> None:
    slots = Slots(1, patience=0.01)
    with await slots.take():
        with pytest.raises(SourceUnavailable):
            await slots.take()
        waiting = asyncio.create_task(slots.take(patience=30))
        await asyncio.sleep(0)
    with await waiting:
        pass
