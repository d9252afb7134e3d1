"""What is checked of the processes and of the disk: in each second, and in quiet moments."""

import asyncio
import contextlib
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.clients import World
from tests.soak.exchange import Connection, Ended, Hangs
from tests.soak.ledger import Ledger, Record
from tests.soak.site import CACHE_LIMIT, UPSTREAM_SIZES, open_names

BLOCK = 4096
MOST_MEMORY = 600 << 20
MOST_THREADS = 150
MOST_POOLED = 100
MOST_CONNECTIONS = 60
MOST_REUSED = 12
KEPT_BY_NGINX = 16 * (os.cpu_count() or 1)  # idle connections to the service: `keepalive` of each of its processes
MOST_GROWTH = 24 << 20
"""Bytes by which the memory of a process may grow from the third quarter of its life to the last."""

_LARGEST = max(UPSTREAM_SIZES.values())


def memory(pid: int) -> int:
    """Return the resident bytes of a process. Raises `ProcessLookupError` if it has ended."""
    match = re.search(r"VmRSS:\s+([0-9]+)", Path(f"/proc/{pid}/status").read_text())
    if match is None:
        raise ProcessLookupError(pid)
    return int(match[1]) << 10


def threads(pid: int) -> int:
    """Return the number of threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))


POOLED = "pooled connection"


def descriptors(pid: int, own_port: int) -> Counter[str]:
    """Return what a process has open: connections of clients and those to others, and the names of all else.

    own_port: at which clients reach the process. Its pools keep connections to others open for a while.
    """
    names = open_names(pid)  # before the table, which has no connection that comes later
    sockets = {}
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        sockets[fields[9]] = (int(fields[1].rpartition(":")[2], 16), int(fields[2].rpartition(":")[2], 16))
    found: Counter[str] = Counter()
    for name in names:
        if (inode := name.removeprefix("socket:[").rstrip("]")) in sockets:
            local, remote = sockets[inode]
            name = "listener" if not remote else "client" if local == own_port else POOLED
        found[re.sub("(?<=metrics-)[^/]+|[0-9a-f]{8,}|[0-9]+", "#", name)] += 1
    return found


def cost(size: int) -> int:
    """Return the bytes that a file of the cache takes on the disk."""
    return -(-size // BLOCK) * BLOCK


def cache_on_disk(directory: Path) -> tuple[int, int]:
    """Return the bytes that all files of a cache take, and how many are arriving."""
    total = parts = 0
    for entry in os.scandir(directory):
        try:
            size = entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
        if entry.name.endswith(".part"):
            parts += 1
            total += cost(size) + BLOCK
        elif entry.name.endswith(".meta"):
            total += BLOCK
        elif entry.name != "usage":
            total += cost(size)
    return total, parts


def check_growth(ledger: Ledger, pid: int, samples: list[int]) -> None:
    """Check that the memory of a process has no trend: the medians of two quarters of its quiet moments."""
    if len(samples) < 16:
        return
    quarter = len(samples) // 4
    before, after = statistics.median(samples[-2 * quarter : -quarter]), statistics.median(samples[-quarter:])
    ledger.most("growth of memory in MiB", (after - before) / (1 << 20))
    ledger.check(
        "memory does not grow", after - before <= MOST_GROWTH, f"process {pid}: {before} to {after} bytes: {samples}"
    )


Found = Mapping[str, Counter[str]]
"""Descriptors, tasks and threads by their kinds: the most that any process has of each."""


def beyond_base(found: Found, base: Found) -> str:
    """Return what is there that was not there in the first quiet moment, or nothing."""
    beyond = {what: now - base[what] for what, now in found.items()}
    # SQLite keeps a closed file open for its next connection, while another connection has a lock on it
    reused = sum(beyond["descriptors"].pop(name, 0) for name in [*beyond["descriptors"]] if ".db" in name)
    beyond["descriptors"].pop(POOLED, 0)
    beyond["descriptors"] -= Counter({"/": 1})  # which libuv gives up to refuse a connection when there are no others
    pooled = found["descriptors"][POOLED]
    if not any(beyond.values()) and pooled <= MOST_CONNECTIONS and reused < MOST_REUSED:
        return ""
    return f"{beyond}, {pooled} pooled, {reused} of SQLite"


@dataclass
class Watch:
    """Checks of the processes and the disk."""

    world: World
    base: Found = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    _read: int = 0

    async def get(self, path: str) -> tuple[int, bytes]:
        """Ask the service itself."""
        connection = Connection(self.world.site, self.world.ledger, direct=True)
        record, body = Record(0, "watch", "GET", path, 0.0), bytearray()
        try:
            await connection.open()
            connection.send(record, {"Connection": "close"})
            await connection.head(record)
            await connection.body(record, body)
        finally:
            connection.close()
        return record.status, bytes(body)

    async def each_second(self) -> None:
        """Check what holds at any time, once a second, until the load ends."""
        while not self.world.tests_stop.is_set():
            await self.check_now()
            try:
                await asyncio.wait_for(self.world.tests_stop.wait(), 1)
            except TimeoutError:
                continue

    async def check_now(self) -> None:
        """Check what holds at any time."""
        site, ledger = self.world.site, self.world.ledger
        for pid in site.serving():
            try:
                size, many, fds = memory(pid), threads(pid), len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                continue  # it ends just now
            ledger.most("memory in MiB", size >> 20)
            ledger.most("threads", many)
            ledger.most("descriptors", fds)
            ledger.check("memory is bounded", size <= MOST_MEMORY, size)
            ledger.check("threads are bounded", many <= MOST_THREADS, many)
            ledger.check("descriptors are bounded", fds <= 800, fds)
        service = site.service.poll()
        ledger.check("the service lives", service is None, f"exit status {service}")
        total, parts = cache_on_disk(site.directory / "disk/cache")
        ledger.most("cache in MiB", total / (1 << 20))
        ledger.most("files arriving in the cache", parts)
        ledger.check("the cache keeps its limit", total <= CACHE_LIMIT + cost(_LARGEST), f"{total} bytes")
        self.check_errors()
        await self._check_health()

    def check_errors(self) -> None:
        """Check that the error log has no traceback."""
        lines = self.world.site.errors()
        new, self._read = lines[self._read :], len(lines)
        for line in new:
            if not line.startswith("INFO"):
                text = re.sub("[0-9a-f]{12,}|[0-9]+", "N", line)
                self.errors[text[:110]] += 1
        holds = not any("Traceback (most recent call last)" in line for line in new)
        self.world.ledger.check("no traceback", holds, "\n".join(new[-60:]))

    async def _check_health(self) -> None:
        """Check the pages for probes. On a busy machine, a check of the service may take too long: it may try again."""
        ledger = self.world.ledger
        for path in ("/-/livez", "/-/readyz", "/-/metrics"):
            for attempt in range(20):
                problem = await self._problem_with(path)
                if not problem:
                    break
                ledger.most(f"failures of {path} in a row", attempt + 1)
                await asyncio.sleep(0.5)
            ledger.check(f"{path} is right", not problem, problem)

    async def _problem_with(self, path: str) -> str:
        ledger, since = self.world.ledger, asyncio.get_running_loop().time()
        try:
            status, body = await self.get(path)
        except (OSError, Ended, Hangs) as exc:
            return "" if ledger.excuses("descriptors", since) or ledger.excuses("process", since) else repr(exc)
        if status == 200 or ledger.excuses("descriptors", since):
            return ""
        excused = {name for name, part in (("store", "store"), ("draining", "restart")) if ledger.excuses(part, since)}
        is_ready_page = path == "/-/readyz" and status == 503
        return "" if is_ready_page and {*body.decode().split()} <= excused else f"{status} {body[:300]!r}"

    async def quiet(self, *, lost: bool) -> None:
        """Check what holds when no client is there. lost: a process was killed, with the last lines of its log."""
        site, ledger = self.world.site, self.world.ledger
        missing = ledger.compare(site.directory)
        for _ in range(100):  # the log is written by a thread
            if not [record for record in missing if record.request_id is not None]:
                break
            await asyncio.sleep(0.1)
            missing = ledger.compare(site.directory)
        ledger.forget(missing, lost=lost)
        self.check_errors()
        await self._until("temporary files are gone", self._temporary)
        await self._until("cache accounting", self._accounting)
        await self._until("back to base", self.beyond_base, patience=60)
        for pid in site.serving():
            with contextlib.suppress(OSError):  # a worker that a reload has replaced ends just now
                self.samples.setdefault(pid, []).append(memory(pid))
                check_growth(ledger, pid, self.samples[pid])

    async def _until(self, what: str, look: Any, patience: float = 30.0) -> None:
        """Check that something is so, or becomes so soon. look: returns what is wrong, or nothing."""
        ends = asyncio.get_running_loop().time() + patience
        while problem := await look():
            if asyncio.get_running_loop().time() > ends:
                break
            await asyncio.sleep(0.25)
        self.world.ledger.check(what, not problem, problem)

    async def _temporary(self) -> str:
        at = self.world.site.directory
        left = [path.name for path in (at / "disk/cache").glob("*.part")]
        left += [path.name for path in at.glob("pid.*") if path.name != "pid.reload"]
        left += [str(path) for path in (at / "tmp").iterdir() if "downloadview" not in path.name]
        return " ".join(left)

    async def _accounting(self) -> str:
        cache, ledger = self.world.site.directory / "disk/cache", self.world.ledger
        total, _ = cache_on_disk(cache)
        usage = cache / "usage"
        match = re.fullmatch(rb"([0-9]+) ([0-9]+)\n", usage.read_bytes()) if usage.exists() else None
        if match is None or ledger.excuses("cache accounting", asyncio.get_running_loop().time() - 75):
            return ""  # it is counted again within a minute
        return "" if int(match[1]) == total else f"usage says {int(match[1])} bytes, and there are {total}"

    async def inside(self) -> dict[int, dict[str, Any]]:
        """Return what each process says of itself."""
        pids, found = set(self.world.site.serving()), {}
        for _ in range(200):
            status, body = await self.get("/inside/state")
            if status == 200:
                state = json.loads(body)
                found[state["pid"]] = state
            if pids <= set(found):
                break
        return found

    async def found(self) -> Found:
        """Return what the processes have."""
        found = {"descriptors": Counter[str](), "tasks": Counter[str](), "threads": Counter[str]()}
        for pid, state in (await self.inside()).items():
            # the log has a thread while there are outcomes to write, also those of these questions
            writing = state["threads"].pop("downloadview outcomes", 0)
            self.world.ledger.check("one thread writes the log", writing <= 1, state)
            pooled = state["threads"].pop("pooled", 0)
            self.world.ledger.most("threads of pools in a quiet moment", pooled)
            self.world.ledger.check("pools are bounded", pooled <= MOST_POOLED, state)
            found["descriptors"] |= descriptors(pid, self.world.site.service_port)
            found["tasks"] |= Counter(state["tasks"])
            found["threads"] |= Counter(state["threads"])
        self.world.ledger.most("pooled connections in a quiet moment", found["descriptors"][POOLED])
        return found

    async def beyond_base(self) -> str:
        """Return what the processes have beyond base, and set base in the first quiet moment."""
        try:
            found = await self.found()
        except (OSError, Ended, Hangs) as exc:
            return repr(exc)
        if self.world.site.shape.behind_nginx:
            found["descriptors"] -= Counter({"client": KEPT_BY_NGINX})
        self.base = self.base or found
        problem = beyond_base(found, self.base)
        return problem and f"{problem}: {[open_names(pid) for pid in self.world.site.serving()]}"
