"""What is done to the site while clients use it. Each function does one thing, and undoes it before it returns."""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from downloadview_async import ConfigurationError
from downloadview_async.service.pid_file import reload_by_pid_file
from tests.servers import PROJECT
from tests.soak.clients import World
from tests.soak.contents import Tree
from tests.soak.site import PATIENCE, open_names

Act = Callable[[World], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault. affects: the parts of the site that may fail meanwhile, and with " 5xx" those that may say so.

    changes_processes: not together with another fault that does.
    """

    name: str
    act: Act
    affects: frozenset[str]
    changes_processes: bool
    is_possible: Callable[[World], bool]


FAULTS: list[Fault] = []


def fault(
    *affects: str, processes: bool = False, when: Callable[[World], bool] = lambda world: True
) -> Callable[[Act], Act]:
    """Add a function to the faults."""

    def add(act: Act) -> Act:
        name = act.__name__.replace("_", " ")
        FAULTS.append(Fault(name, act, frozenset(affects), processes, when))
        return act

    return add


async def some_time(world: World, least: float = 0.3, most: float = 3.0) -> None:
    """Wait, as long as there is load."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(world.tests_stop.wait(), world.random.uniform(least, most))


@fault("mirror", "mirror 5xx")
async def upstream_stopped(world: World) -> None:
    process = world.site.upstream
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        await some_time(world, most=5)
    finally:
        process.send_signal(signal.SIGCONT)


@fault("mirror", "mirror 5xx")
async def upstream_killed(world: World) -> None:
    world.site.kill_upstream()
    await some_time(world)
    await world.site.start_upstream()


@fault()
async def redis_stopped(world: World) -> None:
    process = world.site.redis._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        await some_time(world, most=5)
    finally:
        process.send_signal(signal.SIGCONT)


@fault()
async def redis_killed(world: World) -> None:
    world.site.redis.stop()
    await some_time(world)
    await asyncio.to_thread(world.site.redis.start)


@fault()
async def files_replaced(world: World) -> None:
    for _ in range(world.random.randint(1, 20)):
        world.site.files.replace(world.random.choice(world.site.files.names))
        await some_time(world, 0, 0.1)


@fault()
async def file_cut_in_place(world: World) -> None:
    name = world.random.choice(("large.bin", "dir/d.bin", "dir/c.bin"))
    world.site.files.replace(name)
    await some_time(world, most=1)
    world.site.files.resize(name, world.random.randrange(100, 60_000))
    await some_time(world, most=1)
    world.site.files.replace(name)


@fault()
async def file_grown_in_place(world: World) -> None:
    name = world.random.choice(world.site.files.names)
    world.site.files.replace(name)
    for _ in range(world.random.randint(1, 4)):
        size = world.site.files.versions[name][-1].size
        world.site.files.resize(name, size + world.random.randrange(1, 100_000))
        await some_time(world, 0, 0.5)
    world.site.files.replace(name)


async def _deleted_for_a_while(world: World, tree: Tree) -> None:
    name = world.random.choice(tree.names)
    tree.delete(name)
    await some_time(world, most=1)
    tree.replace(name)


@fault()
async def file_deleted(world: World) -> None:
    await _deleted_for_a_while(world, world.site.files)


@fault()
async def upstream_files_replaced(world: World) -> None:
    for _ in range(world.random.randint(1, 10)):
        world.site.origin.replace(world.random.choice(world.site.origin.names))
        await some_time(world, 0, 0.2)


@fault()
async def upstream_file_deleted(world: World) -> None:
    await _deleted_for_a_while(world, world.site.origin)


@fault(when=lambda world: os.geteuid() == 0 or not world.site.shape.behind_nginx)  # see `Site`
async def directory_swapped_for_a_link(world: World) -> None:
    swap = world.site.directory / "files/swap"
    real, outside = world.site.directory / "files/.real", world.site.directory / "files/.out"
    ends = time.monotonic() + world.random.uniform(0.5, 3)
    if not real.exists() and not swap.exists():
        real.mkdir()
        (real / "secret.bin").write_bytes(b"inside\n" * 1000)
    with contextlib.suppress(FileExistsError):
        outside.symlink_to("../outside")
    while time.monotonic() < ends and not world.tests_stop.is_set():
        for _ in range(50):
            real.rename(swap)
            swap.rename(real)
            outside.rename(swap)
            swap.rename(outside)
        await asyncio.sleep(0)


@fault(when=lambda world: world.site.has_small_disk)
async def cache_disk_full(world: World) -> None:
    ballast = world.site.directory / "disk/ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while not world.tests_stop.is_set():
            file.write(b"\0" * 65_536)
    try:
        await some_time(world, most=4)
    finally:
        ballast.unlink(missing_ok=True)


@fault("cache accounting")
async def cached_files_deleted(world: World) -> None:
    for path in (world.site.directory / "disk/cache").iterdir():
        if path.name != "usage" and world.random.random() < 0.5:
            path.unlink(missing_ok=True)


@fault("cache accounting")
async def cache_entries_damaged(world: World) -> None:
    for path in (world.site.directory / "disk/cache").glob("*.meta"):
        if world.random.random() < 0.5:
            with contextlib.suppress(FileNotFoundError):
                path.write_bytes(world.random.randbytes(world.random.randrange(200)))


@fault("cache accounting", "mirror", "cleared")
async def cached_files_cut(world: World) -> None:
    for path in (world.site.directory / "disk/cache").glob("*-*"):
        if world.random.random() < 0.5:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, world.random.randrange(path.stat().st_size + 1) // 2)


@fault("cache accounting")
async def usage_of_the_cache_damaged(world: World) -> None:
    with contextlib.suppress(FileNotFoundError):
        (world.site.directory / "disk/cache/usage").write_bytes(world.random.choice((b"", b"0 0\n", b"\xff" * 64)))


@fault()
async def log_rotated(world: World) -> None:
    log = world.site.directory / "access.log"
    if log.exists():
        log.rename(world.site.directory / f"access.log.{time.time_ns()}")


async def _reload(world: World) -> None:
    command = [sys.executable, "-m", "downloadview_async.cli", "reload", "--config", "downloadview.toml"]
    if world.random.random() < 0.3:
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=world.site.directory,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            timeout=PATIENCE,
        )
        if done.returncode:
            raise ConfigurationError(done.stderr.decode())
    else:
        await asyncio.to_thread(reload_by_pid_file, str(world.site.directory / "pid"), seconds=PATIENCE)


@fault("reload", processes=True)
async def settings_read_again(world: World) -> None:
    world.site.generation = str(int(world.site.generation) + 1)
    world.site.write_settings()
    await _reload(world)


@fault("reload", processes=True)
async def wrong_settings_read(world: World) -> None:
    wrong = ("x = ", '[server]\nport = "a"\n', '[[routes]]\npath = "/x/{path:path}"\nsource = "none"\n', "[nothing]\n")
    world.site.write_settings(more=f"\n{world.random.choice(wrong)}")
    try:
        await _reload(world)
    except ConfigurationError as exc:
        world.ledger.check("wrong settings are refused with a reason", len(str(exc)) > 10, exc)
    else:
        world.ledger.broken("wrong settings are refused: they were not")
    finally:
        world.site.write_settings()


@fault("reload", processes=True)
async def hangups(world: World) -> None:
    pid = int((world.site.directory / "pid").read_text())
    for _ in range(world.random.randint(1, 5)):
        os.kill(pid, signal.SIGHUP)
        await some_time(world, 0, 0.3)
    await _reload(world)


@fault("keys", processes=True)
async def keys_rotated(world: World) -> None:
    old = world.site.keys
    world.site.add_key()
    new, world.site.keys = world.site.keys, old  # the old one signs until the new one is known
    await _reload(world)
    world.site.keys = new


@fault("restart", processes=True)
async def rolling_restart(world: World) -> None:
    old = world.site.service
    await world.site.start_service()
    world.site.end_service(old)
    async with asyncio.timeout(2 * PATIENCE):
        while old.poll() is None:
            await asyncio.sleep(0.05)
    world.ledger.check("a service that is told to end exits with 0", old.returncode == 0, old.returncode)


@fault("process", processes=True, when=lambda world: world.site.shape.workers > 1)
async def worker_killed(world: World) -> None:
    before = world.site.serving()
    killed = world.random.choice(before)
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        # one that has retired is not replaced
        while killed in (now := world.site.serving()) or len(now) < world.site.shape.workers:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _few_descriptors(pids: list[int], more: int) -> AsyncIterator[None]:
    """Leave few descriptors to processes that have started: a process that is started inherits its limit."""
    before = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # a worker that retired has just ended
            limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = [int(number) for number in os.listdir(f"/proc/{pid}/fd")]
            if any("eventpoll" in name for name in open_names(pid)):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(used) + more, limit[1]))
                before[pid] = limit
    try:
        yield
    finally:
        for pid, limit in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


@fault("descriptors", processes=True)
async def descriptors_exhausted(world: World) -> None:
    writers = []
    async with _few_descriptors(world.site.serving(), world.random.randrange(1, 12)):
        for _ in range(60):
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    writers.append((await asyncio.open_connection("127.0.0.1", world.site.service_port))[1])
        await some_time(world)
    for writer in writers:
        writer.transport.abort()


@fault("store", "store 5xx")
async def store_fails(world: World) -> None:
    world.site.store.status = world.random.choice((500, 503))
    try:
        await some_time(world)
    finally:
        world.site.store.status = 0


@fault("store", "store 5xx")
async def store_silent(world: World) -> None:
    store = world.site.store
    store.silent = True
    try:
        await some_time(world)
    finally:
        store.silent = False
        for writer in [*store.writers]:
            writer.transport.abort()


@fault("store", "store 5xx")
async def store_cuts(world: World) -> None:
    store = world.site.store
    store.cut_after, store.cuts = world.random.randrange(1, 900_000), world.random.randint(1, 30)
    try:
        await some_time(world)
    finally:
        store.cut_after = None


@fault()
async def object_replaced(world: World) -> None:
    world.site.put_object()


async def inflict(world: World, what: Fault) -> None:
    """Do a fault and undo it."""
    spell = world.ledger.begin_fault(what.name, what.affects)
    try:
        await what.act(world)
    except (OSError, ConfigurationError, AssertionError) as exc:
        world.ledger.broken(f"the fault {what.name}: {exc!r}")
    finally:
        world.ledger.end_fault(spell)
