"""Everything but uvicorn's protocol and the cache works on trio, before and after asyncio in one process."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
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
def test_archives_in_one_loop_after_another(tmp_path: Path, order: tuple[str, ...]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "big.bin").write_bytes(CONTENT)
    checksums = dv.SQLiteChecksums(tmp_path / "checksums.db")
    options = dv.ArchiveOptions(checksums=checksums, name="files")
    bodies = []

    async def fetch(app: ASGIApp, **headers: str) -> None:
        answer = await call(app, "/a/", query="archive=zip", headers=headers)
        bodies.append(answer.body[-100:])

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(5):  # they wait for one listing, and for one reading
                group.start_soon(partial(fetch, app, Range="bytes=-100"))
        await fetch(app)

    app = dv.Download(dv.PathSource(tmp_path), archive=options)
    for backend in order:
        anyio.run(main, backend=backend)
    assert len(bodies) == 18
    assert len({*bodies}) == 1


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
        taken: list[ExitStack] = []

        async def take() -> None:
            taken.append(await slots.take(patience=30))

        with await slots.take():
            async with anyio.create_task_group() as tasks:
                with await slots.take():
                    with pytest.raises(dv.SourceUnavailable):
                        await slots.take()
                    tasks.start_soon(take)
                    await anyio.wait_all_tasks_blocked()
        taken[0].close()
        assert await workers.run(len, "four") == 4
        assert await workers.run_or_abandon(len, "four") == 4
        with await slots.take(), await slots.take():
            with anyio.move_on_after(0.01) as cancelled:
                await slots.take(patience=30)
            assert cancelled.cancelled_caught
        with await slots.take(), await slots.take():
            pass

    for backend in order:
        anyio.run(main, backend=backend)
