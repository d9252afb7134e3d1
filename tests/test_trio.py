"""Everything but uvicorn's protocol and the cache works on trio, before and after asyncio in one process."""

import itertools
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.sources.workers import Slots, Workers
from downloadview_async.testing import call

CONTENT = b"x" * 300_000

APPS: dict[str, Callable[[Path], ASGIApp]] = {
    "a path": lambda root: dv.Download(dv.PathSource(root)),
    "a local file": lambda root: dv.DownloadResponse(dv.LocalFile(root / "big.bin")),
    "a directory storage": lambda root: dv.Download(dv.StorageSource(dv.DirectoryStorage(root))),
    "a storage in memory": lambda root: dv.Download(dv.StorageSource(dv.MemoryStorage({"big.bin": CONTENT}))),
    "a generator": lambda root: dv.Download(dv.VirtualSource(lambda name: dv.VirtualFile(_blocks, name=name))),
}


def _blocks() -> "itertools.repeat[bytes]":
    return itertools.repeat(CONTENT[:100_000], 3)


@pytest.mark.parametrize("order", [("asyncio", "trio", "asyncio"), ("trio", "asyncio", "trio")])
@pytest.mark.parametrize("kind", APPS)
def test_one_loop_after_another(tmp_path: Path, kind: str, order: tuple[str, ...]) -> None:
    (tmp_path / "big.bin").write_bytes(CONTENT)
    app = APPS[kind](tmp_path)

    async def main() -> None:
        answer = await call(app, "/big.bin")
        assert (answer.status, answer.body) == (200, CONTENT)
        assert (await call(app, "/big.bin", method="HEAD")).body == b""

    for backend in order:
        anyio.run(main, backend=backend)


@pytest.mark.parametrize("order", [("asyncio", "trio", "asyncio"), ("trio", "asyncio", "trio")])
def test_slots_are_counted_in_each_loop(order: tuple[str, ...]) -> None:
    slots, workers = Slots(2, patience=0.01), Workers(1)

    async def main() -> None:
        first, second = await slots.take(), await slots.take()
        with pytest.raises(dv.SourceUnavailable):
            await slots.take()
        taken: list[object] = []

        async def take() -> None:
            taken.append(await slots.take(patience=30))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            await anyio.wait_all_tasks_blocked()
            slots.free(first)
        slots.free(second)
        slots.free(taken[0])
        assert await workers.run(len, "four") == 4
        assert await workers.run_or_abandon(len, "four") == 4
        held = [await slots.take() for _ in range(2)]
        with anyio.move_on_after(0.01) as cancelled:
            await slots.take(patience=30)
        assert cancelled.cancelled_caught
        for slot in held:
            slots.free(slot)
        for slot in [await slots.take() for _ in range(2)]:
            slots.free(slot)

    for backend in order:
        anyio.run(main, backend=backend)
