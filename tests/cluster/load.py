"""What clients do at the same time, until they are told to end."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random

from tests.cluster.contents import SHARED, STORED
from tests.cluster.driver import Download, Driver
from tests.cluster.site import QUOTA, Site

MB = 1_000_000


@dataclass
class Link:
    """A link for one download, and those who have tried it at the same time."""

    path: str
    tries: list[Download]


@dataclass
class Quota:
    """A client with a quota of `QUOTA` downloads a day, and what it has tried."""

    address: str
    tries: list[Download]


@dataclass
class Load:
    """The clients. cold: names of files in the store that nobody has asked for yet."""

    site: Site
    driver: Driver
    random: Random
    cold: list[str]
    links: list[Link] = field(default_factory=list)
    quotas: list[Quota] = field(default_factory=list)
    used_cold: list[str] = field(default_factory=list)
    sign: Callable[..., str] = lambda *args, **options: ""
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Let all clients do what they do, until `stop` is set and each has ended what it has begun."""
        kinds: list[tuple[Callable[[], Awaitable[object]], float, int]] = [
            (self.small, 0.15, 3),
            (self.part, 0.2, 1),
            (self.listing, 0.4, 1),
            (self.archive, 0.8, 1),
            (self.paced, 0.1, 4),
            (self.comes_back, 0.3, 2),
            (self.once, 0.4, 1),
            (self.quota, 0.6, 1),
            (self.fills, 0.5, 1),
        ]
        async with asyncio.TaskGroup() as group:
            for act, pause, clients in kinds:
                for _ in range(clients):
                    group.create_task(self._again_and_again(act, pause))

    async def _again_and_again(self, act: Callable[[], Awaitable[object]], pause: float) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), pause * self.random.uniform(0.5, 1.5))
                return
            await act()

    async def small(self) -> None:
        """Get a small file, in each of the ways in which files are sent."""
        kind = self.random.choice(["files", "stream", "store", "signed"])
        if kind == "store":
            name, path = "small.bin", "/store/small.bin"
        else:
            name = self.random.choice(["a.bin", "dir/c.bin"])
            path = self.sign(f"/signed/{name}") if kind == "signed" else f"/{kind}/{name}"
        await self.driver.fetch(self.driver.download(kind, path, name))

    async def part(self) -> None:
        """Get a range."""
        route, name, size = self.random.choice(
            [
                ("files", "b.bin", SHARED["b.bin"]),
                ("stream", "b.bin", SHARED["b.bin"]),
                ("store", "object.bin", STORED["object.bin"]),
            ]
        )
        first = self.random.randrange(size - 1)
        last = min(size - 1, first + self.random.randrange(200_000))
        await self.driver.fetch(
            self.driver.download(f"range {route}", f"/{route}/{name}", name, first=first, last=last)
        )

    async def listing(self) -> None:
        """Get the listing of a folder."""
        await self.driver.fetch(self.driver.download("listing", "/files/dir/", None))

    async def archive(self) -> None:
        """Get an archive of a folder."""
        await self.driver.fetch(self.driver.download("archive", "/files/dir/?archive=zip", None))

    async def paced(self) -> None:
        """Get a large file as fast as a network lets it through."""
        route, name = self.random.choice(
            [("stream", "large.bin"), ("stream", "large.bin"), ("store", "object.bin"), ("files", "large.bin")]
        )
        pace = self.random.uniform(4, 6) * MB
        await self.driver.fetch(self.driver.download(f"large {route}", f"/{route}/{name}", name, pace=pace))

    async def comes_back(self) -> None:
        """Begin a file, leave, and resume: perhaps at another replica."""
        route, name, size = self.random.choice(
            [
                ("stream", "b.bin", SHARED["b.bin"]),
                ("store", "object.bin", STORED["object.bin"] // 8),
                ("files", "b.bin", SHARED["b.bin"]),
            ]
        )
        leaves = self.random.randrange(1, size)
        await self.driver.fetch(self.driver.download(f"resume {route}", f"/{route}/{name}", name, leaves=leaves))

    async def once(self) -> None:
        """Use a link for one download from two addresses at the same time."""
        name = self.random.choice(["b.bin", "large.bin"])
        path = self.sign(f"/once/{name}", uses=1)
        pace = 4.0 * MB if name == "large.bin" else 0.0
        tries = [self.driver.download("once", path, name, address=self.driver.address(), pace=pace) for _ in range(2)]
        self.links.append(Link(path, tries))
        await asyncio.gather(*(self.driver.fetch(one) for one in tries))

    async def quota(self) -> None:
        """Get more at the same time than the quota of the client allows."""
        address = self.driver.address()
        tries = [self.driver.download("quota", "/quota/b.bin", "b.bin", address=address) for _ in range(QUOTA + 1)]
        self.quotas.append(Quota(address, tries))
        await asyncio.gather(*(self.driver.fetch(one) for one in tries))

    async def fills(self) -> None:
        """Get a cold file by six clients at once."""
        if not self.cold:
            return
        name = self.cold.pop(0)
        self.used_cold.append(name)
        tries = [self.driver.download("cold", f"/cold/{name}", name) for _ in range(6)]
        await asyncio.gather(*(self.driver.fetch(one) for one in tries))

    async def try_again(self) -> None:
        """When all is well again: use each link again from both addresses, and each quota up to its end."""
        for link in self.links:
            for one in list(link.tries):
                again = self.driver.download("once again", link.path, one.name, address=one.address)
                link.tries.append(await self.driver.fetch(again))
        for quota in self.quotas:
            for _ in range(QUOTA + 1):
                again = self.driver.download("quota again", "/quota/b.bin", "b.bin", address=quota.address)
                quota.tries.append(await self.driver.fetch(again))
                if again.result != "complete":
                    break
