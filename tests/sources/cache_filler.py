"""A process that fills a cache: DIRECTORY, the port of the upstream, a seed, and how many files (for ever)."""

import asyncio
import random
import sys

import downloadview_async as dv


async def main(directory: str, port: str, seed: str, count: str = "1000000") -> None:
    """Read files through a cache, three at a time, and say of each whether its bytes were right."""
    from tests.sources.test_cached import content_of

    cache = dv.Cache(directory, max_bytes=4_000_000)
    upstream = dv.RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"])
    source = dv.CachedSource(upstream, cache, name="x")
    chosen = random.Random(int(seed))

    async def read() -> None:
        name = str(chosen.randrange(40))
        file = await source.resolve(name)
        async with file.open() as opened:
            size = opened.metadata.size
            assert size is not None
            body = b"".join([chunk async for chunk in opened.stream(dv.ByteRange(0, size))])
        print("right" if body == content_of(name) else "wrong", name, flush=True)

    for _ in range(int(count) // 3):
        await asyncio.gather(read(), read(), read())
    await asyncio.gather(*[fetch.task for fetch in list(cache._running)])
    await source.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
