"""What is done to the cluster while clients use it. Each function undoes what it has done before it returns."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.cluster.load import Load
from tests.cluster.nodes import Node
from tests.cluster.site import Front, Site


@dataclass
class World:
    """A scenario that runs: the cluster, its load, and when something was done to it."""

    site: Site
    load: Load
    marks: list[tuple[float, str]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    checks: list[tuple[bool, str]] = field(default_factory=list)
    """What the scenario itself has checked: whether it holds, and the problem if it does not."""

    def mark(self, text: str) -> None:
        """Note that something is done now."""
        self.marks.append((time.time(), text))

    async def seconds(self, seconds: float) -> None:
        """Let the load go on for so long."""
        await asyncio.sleep(seconds)


Act = Callable[[World], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """A scenario. may_refuse: kinds of requests that may get a 503 from the first mark until `settles` seconds after
    the last one, because what they need is not there.
    """

    name: str
    title: str
    act: Act
    front: Front = "nginx"
    may_refuse: frozenset[str] = frozenset()
    settles: float = 3.0


SCENARIOS: list[Scenario] = []


def scenario(
    name: str, title: str, *, front: Front = "nginx", may_refuse: tuple[str, ...] = ()
) -> Callable[[Act], Act]:
    """Add a function to the scenarios."""

    def add(act: Act) -> Act:
        SCENARIOS.append(Scenario(name, title, act, front, frozenset(may_refuse)))
        return act

    return add


async def kill(world: World, node: Node, gone: float) -> None:
    """Kill a process, and start it again later."""
    world.mark(f"SIGKILL {node.name}")
    await node.end(signal.SIGKILL)
    await world.seconds(gone)
    await node.start()
    world.mark(f"{node.name} is back")


@scenario("steady", "nothing happens")
async def steady(world: World) -> None:
    await world.seconds(6)


@scenario("kill-9", "a replica is killed")
async def kill_9(world: World) -> None:
    driver = world.load.driver
    large = [driver.download("large stream", "/stream/large.bin", "large.bin", pace=4e6) for _ in range(6)]
    running = [asyncio.create_task(driver.fetch(one)) for one in large]
    await world.seconds(0.7)  # some of them are at that replica
    await kill(world, world.site.replicas[-1], 3)
    await asyncio.gather(*running)


@scenario("sigterm", "a replica is told to end")
async def sigterm(world: World) -> None:
    node = world.site.replicas[0]
    world.mark(f"SIGTERM {node.name}")
    status = await node.end()
    world.facts.append(f"{node.name} ended with the status {status}")
    await node.start()
    world.mark(f"{node.name} is back")


@scenario("sigstop", "a replica hangs")
async def sigstop(world: World) -> None:
    node = world.site.replicas[-1]
    world.mark(f"SIGSTOP {node.name}")
    node.send(signal.SIGSTOP)
    try:
        await world.seconds(3 + 2 * world.site.slack)  # longer than `proxy_read_timeout`
    finally:
        node.send(signal.SIGCONT)
    world.mark("SIGCONT")


_NEED_REDIS = ("signed", "once", "quota")


@scenario("redis", "Redis is gone, and comes back", may_refuse=_NEED_REDIS)
async def redis_gone(world: World) -> None:
    await kill(world, world.site["redis"], 3)


@scenario("store-node", "a node of the store is gone, and comes back")
async def store_node(world: World) -> None:
    await kill(world, world.site["volume1"], 4)


@scenario("slow-node", "a replica gets a fifth of the time that it needs")
async def slow_node(world: World) -> None:
    node = world.site.replicas[0]
    world.mark(f"{node.name} is slow")
    ends = time.monotonic() + 6
    while time.monotonic() < ends:
        node.send(signal.SIGSTOP)
        try:
            await world.seconds(0.2)
        finally:
            node.send(signal.SIGCONT)
        await world.seconds(0.05)
    world.mark("it is not slow any more")


@scenario("rolling", "all replicas change to another version, one after another")
async def rolling(world: World) -> None:
    new = world.site.version = "b" if world.site.version == "a" else "a"
    for node in world.site.replicas:
        world.mark(f"{node.name} changes")
        await node.end()
        world.site.change_build(node, new)
        await node.start()
    world.mark("all have changed")


@scenario("key", "the key of links is replaced")
async def key_rotated(world: World) -> None:
    site, load = world.site, world.load
    old = site.signer()
    world.mark("a new key")
    site.add_key()
    load.sign = old.sign  # until every replica knows the new one
    await site.reload()
    load.sign = site.signer().sign
    world.mark("it signs")
    await world.seconds(2)
    links = [old.sign("/signed/a.bin") for _ in range(6)]
    statuses = [await _status(world, link) for link in links]
    world.checks.append((statuses == [200] * 6, f"links by the old key give {statuses} before it is dropped"))
    site.drop_keys()
    await site.reload()
    world.mark("the old key is dropped")
    statuses = [await _status(world, link) for link in links]
    world.checks.append((statuses == [403] * 6, f"links by the old key give {statuses} after it was dropped"))


async def _status(world: World, path: str) -> int:
    driver = world.load.driver
    got = await driver.fetch(driver.download("key", path, "a.bin"))
    return got.attempts[-1].status


@scenario("cache-node", "a cache is lost with all that it has")
async def cache_node(world: World) -> None:
    await kill(world, world.site.caches[0], 4)
    # after 3 s (`fail_timeout`), nginx tries a failed node with one request; until it answers, others go elsewhere
    await world.seconds(3.5)
    for name in world.load.used_cold:
        await world.load.driver.fetch(world.load.driver.download("cold again", f"/cold/{name}", name))


@scenario("clock", "the clocks of two replicas are five minutes off")
async def clock(world: World) -> None:
    early, late = world.site.replicas[0], world.site.replicas[-1]
    for node, seconds in ((early, -300), (late, 300)):
        world.site.set_clock(node, seconds)
        world.mark(f"{node.name}: {seconds:+d} s")
        await node.end()
        await node.start()
    await world.seconds(6)
    for node in (early, late):
        world.site.set_clock(node, 0)
        await node.end()
        await node.start()
    world.mark("right again")


@scenario("haproxy-kill-9", "a replica is killed behind HAProxy", front="haproxy")
async def haproxy_kill_9(world: World) -> None:
    await kill_9(world)


@scenario("haproxy-sigterm", "a replica is told to end behind HAProxy", front="haproxy")
async def haproxy_sigterm(world: World) -> None:
    await sigterm(world)


@scenario("haproxy-redis", "Redis is gone behind HAProxy", front="haproxy", may_refuse=_NEED_REDIS)
async def haproxy_redis(world: World) -> None:
    await redis_gone(world)


@scenario("haproxy-sigstop", "a replica hangs behind HAProxy", front="haproxy")
async def haproxy_sigstop(world: World) -> None:
    await sigstop(world)
