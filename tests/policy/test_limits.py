"""Limits: how amounts are written, what the stores count, and who waits for whom."""

import asyncio
import contextlib
import functools
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

import downloadview_async as dv
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.policy.grants import GRANT
from downloadview_async.policy.limits import memory
from downloadview_async.policy.limits import redis as redis_module
from downloadview_async.policy.limits.amounts import Quota, Window, quota_of, rate_of, window_of
from downloadview_async.policy.limits.coverage import MAX_EDGES, Parts
from downloadview_async.policy.limits.guarded import GuardedLimitStore
from downloadview_async.policy.limits.limits import Transfers
from downloadview_async.policy.limits.memory import MemoryLimitStore
from downloadview_async.policy.limits.pace import Pace, SharedRate
from downloadview_async.policy.limits.redis import LEASE_SECONDS, RedisLimitStore
from downloadview_async.policy.limits.store import RESERVED_SECONDS, LimitStore, window_wait
from tests.redis_server import RedisServer
from tests.servers import PROJECT

NOW = 1_900_000_000.0
MINUTE = Window(3, 60, "at most 3 requests per minute")
BYTES = Quota(100, "bytes", 86_400, "at most 100B per day")
DOWNLOADS = Quota(2, "downloads", 86_400, "at most 2 downloads per day")


@pytest.mark.parametrize(
    "text, rate",
    [("20MB/s", 20_000_000), ("20 MB/s", 20_000_000), ("500kB/s", 500_000), ("1.5GB/second", 1_500_000_000),
     ("1000B/s", 1000), ("0.0015MB/s", 1500)],
)  # fmt: skip
def test_rates(text: str, rate: int) -> None:
    assert rate_of(text) == rate


@pytest.mark.parametrize(
    "text, advice",
    [("20mb/s", "160 Mbit/s"), ("20MiB/s", "did you mean MB?"), ("20Mbit/s", "160 Mbit/s"), ("20Mb/s", "160"),
     ("20MB", "give bytes per second"), ("20MB/m", "give bytes per second"), ("", "give"), ("MB/s", "give"),
     ("-1MB/s", "give"), ("1e3MB/s", "is not a rate"), ("999B/s", "1kB/s or more"), ("0MB/s", "1kB/s or more"),
     ("1000.5B/s", "whole bytes"), ("٣MB/s", "give"), ("999999999999TB/s", "out of range"), ("20MB/s\n", "give")],
)  # fmt: skip
def test_rates_that_are_refused(text: str, advice: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=advice):
        rate_of(text)


def test_requests() -> None:
    assert window_of("600/minute") == Window(600, 60, "at most 600 requests per minute")
    assert window_of("1 request/second") == Window(1, 1, "at most 1 request per second")


@pytest.mark.parametrize(
    "text, advice",
    [("600", "such as 600/minute"), ("0/minute", "allows no request"), ("600/min", "did you mean minute?"),
     ("600/hours", "did you mean hour?"), ("600/fortnight", "use one of second, minute, hour, day"),
     ("1.5/second", "such as"), ("600 per minute", "such as")],
)  # fmt: skip
def test_requests_that_are_refused(text: str, advice: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=advice):
        window_of(text)


def test_quotas() -> None:
    assert quota_of("50GB/day") == Quota(50 * 10**9, "bytes", 86_400, "at most 50GB per day")
    assert quota_of("1000 downloads/day") == Quota(1000, "downloads", 86_400, "at most 1000 downloads per day")
    assert quota_of("1 download/hour") == Quota(1, "downloads", 3600, "at most 1 download per hour")


@pytest.mark.parametrize(
    "text, advice",
    [("50GB", "such as 50GB/day"), ("50gb/day", "did you mean GB?"), ("10 download s/day", "such as"),
     ("10 downloades/day", "did you mean downloads?"), ("1.5 downloads/day", "out of range"),
     ("0GB/day", "1 or more"), ("50GB/month", "use one of"), ("1000/day", "use one of B, kB, MB, GB, TB, downloads")],
)  # fmt: skip
def test_quotas_that_are_refused(text: str, advice: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=advice):
        quota_of(text)


@given(st.text(max_size=30) | st.from_regex(r"[0-9. ]{0,9}[A-Za-z ]{0,9}/?[a-z]{0,7}", fullmatch=True))
def test_no_text_raises_another_error(text: str) -> None:
    for parse in (rate_of, window_of, quota_of):
        with contextlib.suppress(dv.ConfigurationError):
            parse(text)


@given(st.integers(1, 1000), st.floats(0, 60, exclude_max=True), st.integers(0, 1000), st.integers(0, 1000))
def test_the_wait_is_long_enough_and_not_longer(amount: int, elapsed: float, current: int, previous: int) -> None:
    window = Window(amount, 60, "")
    wait = window_wait(window, elapsed, current, previous)
    assert 0 <= wait <= 120

    def used(at: float) -> float:
        if at < 60:
            return previous * (1 - at / 60) + current
        return current * (1 - (at - 60) / 60)

    assert used(elapsed + wait) <= amount - 1 + 1e-6
    if wait > 0.01:
        assert used(elapsed + wait - 0.01) > amount - 1 - 1e-6


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"concurrent": 0}, "concurrent is 0"),
    ({"concurrent": True}, "concurrent is True"),
    ({"concurrent": "8"}, "concurrent is '8'"),
    ({"mode": "wait", "concurrent": 1}, "mode is 'wait'"),
    ({"mode": "queue"}, "give concurrent"),
    ({"mode": "queue", "concurrent": 1, "queue_seconds": 0}, "queue_seconds"),
    ({"mode": "queue", "concurrent": 1, "queue_seconds": "1"}, "queue_seconds is '1'"),
    ({"quota": 5}, "quota is 5: give such as"),
    ({"when_store_fails": "maybe"}, "when_store_fails"),
    ({"client": "adress"}, "client is 'adress'"),
    ({"client": "header:X Y"}, "the name of a header"),
    ({"store": "sqlite:limits.db"}, 'give "memory"'),
    ({"store": "http://:secret@host/"}, 'give "memory"'),
    ({"quota": ["1GB/day", "2GB/day"]}, "same unit and period"),
]


@pytest.mark.parametrize("options, problem", OPTIONS)
def test_options_that_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=problem) as raised:
        dv.Limits(**options)
    assert "secret" not in str(raised.value)


def test_a_download_takes_only_limits() -> None:
    with pytest.raises(dv.ConfigurationError, match="give Limits"):
        dv.Download(dv.PathSource("."), limits="10MB/s")  # type: ignore[arg-type]


@pytest_asyncio.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[LimitStore]:
    store: LimitStore
    if request.param == "memory":
        store = MemoryLimitStore()
    else:
        store = RedisLimitStore(request.getfixturevalue("redis").url, timeout=5.0)
    try:
        yield store
    finally:
        await store.aclose()


def a_client() -> str:
    return uuid.uuid4().hex


async def spend(
    store: LimitStore, client: str, *costs: tuple[Quota, int], session: str = "v1", now: float = NOW
) -> Quota | None:
    return await store.spend(client, costs, parts=Parts(session, ((0, 100),), 100), now=now)


@pytest.mark.asyncio
async def test_requests_of_a_window(store: LimitStore) -> None:
    client, other = a_client(), a_client()
    verdicts = [await store.admit(client, window=MINUTE, most=None, lease=None) for _ in range(5)]
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "requests", "requests"]
    assert 59 < verdicts[-1].wait <= 81
    assert (await store.admit(other, window=MINUTE, most=None, lease=None)).refused is None


@pytest.mark.asyncio
async def test_leases(store: LimitStore) -> None:
    client = a_client()
    assert (await store.admit(client, window=None, most=2, lease="a")).refused is None
    assert (await store.admit(client, window=None, most=2, lease="b")).refused is None
    refused = await store.admit(client, window=None, most=2, lease="c")
    assert (refused.refused, refused.wait, store.transfers(client)) == ("concurrent", 1.0, 2)
    store.release(client, "a", (), spent_at=0.0, unsent=None)
    store.release(client, "a", (), spent_at=0.0, unsent=None)  # once more changes nothing
    assert (await store.admit(client, window=None, most=2, lease="c")).refused is None
    assert (await store.admit(client, window=None, most=2, lease="d")).refused == "concurrent"
    assert (await store.admit(client, window=None, most=None, lease="e")).refused is None


@pytest.mark.asyncio
async def test_a_quota_is_exceeded_by_one_transfer_at_most(store: LimitStore) -> None:
    client = a_client()
    assert await spend(store, client, (BYTES, 99)) is None
    assert await spend(store, client, (BYTES, 60)) is None
    assert await spend(store, client, (BYTES, 1)) is BYTES
    store.release(client, None, [(BYTES, 60)], spent_at=NOW, unsent=None)  # none of it was sent
    assert await spend(store, client, (BYTES, 1)) is None
    assert await spend(store, client, (BYTES, 0)) is BYTES
    tomorrow = NOW + 86_400
    assert await spend(store, client, (BYTES, 100), now=tomorrow) is None
    store.release(client, None, [(BYTES, 50)], spent_at=NOW, unsent=None)  # that was yesterday
    assert await spend(store, client, (BYTES, 1), now=tomorrow) is BYTES


@pytest.mark.asyncio
async def test_a_refused_quota_leaves_the_others_as_they_are(store: LimitStore) -> None:
    client = a_client()
    assert await spend(store, client, (BYTES, 100)) is None
    assert await spend(store, client, (DOWNLOADS, 1), (BYTES, 1), session="v2") is BYTES
    assert await spend(store, client, (DOWNLOADS, 1), session="v2") is None
    assert await spend(store, client, (DOWNLOADS, 1), session="v3") is None
    assert await spend(store, client, (DOWNLOADS, 1), session="v4") is DOWNLOADS


SIZE = 100
WHOLE = ((0, SIZE),)
Step = tuple[str, Any, Any]
"""What happens: a client begins to get parts of a file (is that allowed?), or has got so many bytes of a begun one."""

DOWNLOAD_STEPS: dict[str, list[Step]] = {
    "a download manager, whose parts come in any order": [
        *[("v1", ((start, start + 10),), True) for start in (0, 50, 20, 30, 10, 40, 90, 80, 70, 60)],
        *[("end", number, 10) for number in (3, 1, 2, 0, 4, 9, 8, 7, 6, 5)],
        ("v2", WHOLE, True),
        ("v3", ((0, 1),), False),
        ("v1", ((0, 1),), True),  # it has that
        ("v1", ((1, SIZE),), False),  # with this, it would have all of it again
        ("v1", ((1, 99),), True),
    ],
    "a download that breaks off and is resumed, with some bytes twice": [
        ("v1", WHOLE, True),
        ("end", 0, 60),
        ("v1", ((50, SIZE),), True),
        ("v2", WHOLE, True),
        ("v3", WHOLE, False),
        ("end", 1, 50),
        ("v1", WHOLE, False),
    ],
    "several whole downloads at once": [
        ("v1", WHOLE, True),
        ("v1", WHOLE, True),
        ("v1", WHOLE, False),
        ("end", 0, 0),
        ("v1", WHOLE, True),
        ("v1", WHOLE, False),
    ],
    "nothing was sent": [
        ("v1", WHOLE, True),
        ("v2", WHOLE, True),
        ("v3", WHOLE, False),
        ("end", 1, 0),
        ("v3", WHOLE, True),
        ("end", 0, 1),
        ("v4", WHOLE, False),  # the rest of the first one may follow
    ],
    "several parts in one answer": [
        ("v1", ((0, 40), (60, SIZE)), True),
        ("end", 0, 50),
        ("v1", ((40, 60), (70, SIZE)), True),
        ("end", 1, 50),
        ("v1", WHOLE, True),
        ("v1", WHOLE, False),
    ],
}


@pytest.mark.asyncio
@pytest.mark.parametrize("steps", DOWNLOAD_STEPS.values(), ids=DOWNLOAD_STEPS)
async def test_downloads_that_count(store: LimitStore, steps: list[Step]) -> None:
    client, now, begun = a_client(), time.time(), list[Parts]()
    for number, (what, which, expected) in enumerate(steps):
        if what == "end":
            unsent = begun[which].after(expected)
            store.release(client, None, [(DOWNLOADS, 0)], spent_at=now, unsent=unsent)
            continue
        parts = Parts(what, which, SIZE)
        used_up = await store.spend(client, [(DOWNLOADS, 0)], parts=parts, now=now)
        assert (used_up is None) == expected, number
        if expected:
            begun.append(parts)


@pytest.mark.asyncio
async def test_a_download_that_nobody_continues_is_given_back(store: LimitStore) -> None:
    client, now, costs = a_client(), time.time(), [(DOWNLOADS, 0)]
    begun = [Parts(f"v{number}", WHOLE, SIZE) for number in range(4)]
    for parts in begun[:2]:
        assert await store.spend(client, costs, parts=parts, now=now) is None
    store.release(client, None, costs, spent_at=now, unsent=begun[0].after(50))
    later = now + RESERVED_SECONDS + 60
    assert await store.spend(client, costs, parts=begun[2], now=now) is DOWNLOADS
    if later // 86_400 != now // 86_400:
        pytest.skip("a new day begins within the next minutes")
    assert await store.spend(client, costs, parts=begun[2], now=later) is None
    assert await store.spend(client, costs, parts=begun[3], now=later) is DOWNLOADS  # the others are running
    assert await store.spend(client, costs, parts=Parts("v0", ((50, SIZE),), SIZE), now=later) is DOWNLOADS
    store.release(client, None, costs, spent_at=later, unsent=begun[2].after(0))
    assert await store.spend(client, costs, parts=Parts("v0", ((50, SIZE),), SIZE), now=later) is None
    store.release(client, None, costs, spent_at=later, unsent=Parts("v0", (), SIZE))
    assert await store.spend(client, costs, parts=begun[0], now=later) is DOWNLOADS  # it has been downloaded


@pytest.mark.asyncio
async def test_no_order_of_requests_gives_more_downloads_than_the_quota(store: LimitStore) -> None:
    """Whatever a client asks for, breaks off and asks for again: it has no more whole files than its quota."""
    chosen = random.Random(17)
    for _ in range(30):
        client, now, quota = a_client(), time.time(), Quota(chosen.randint(1, 4), "downloads", 86_400, "")
        got = {f"v{number}": [0] * SIZE for number in range(3)}
        running: list[Parts] = []
        for _ in range(60):
            if running and chosen.random() < 0.4:
                parts = running.pop(chosen.randrange(len(running)))
                unsent = parts.after(chosen.choice([0, 30, SIZE, SIZE]))
                store.release(client, None, [(quota, 0)], spent_at=now, unsent=unsent)
                for start, stop in unsent.spans:
                    for at in range(start, stop):
                        got[parts.session][at] -= 1
                continue
            edges = sorted(chosen.sample(range(SIZE + 1), chosen.choice([2, 2, 4])))
            spans = WHOLE if chosen.random() < 0.3 else tuple(zip(edges[::2], edges[1::2], strict=True))
            parts = Parts(chosen.choice([*got]), spans, SIZE)
            if await store.spend(client, [(quota, 0)], parts=parts, now=now) is None:
                running.append(parts)
                for start, stop in parts.spans:
                    for at in range(start, stop):
                        got[parts.session][at] += 1
            assert sum(map(min, got.values())) <= quota.amount


@pytest.mark.asyncio
async def test_very_many_parts_count_as_the_whole_file(store: LimitStore) -> None:
    client, now, size = a_client(), time.time(), 10_000
    costs = [(DOWNLOADS, 0)]
    for start in range(0, 2 * MAX_EDGES, 4):
        assert await store.spend(client, costs, parts=Parts("v1", ((start, start + 2),), size), now=now) is None
    assert await store.spend(client, costs, parts=Parts("v1", ((9000, 9001),), size), now=now) is None
    assert await store.spend(client, costs, parts=Parts("v1", ((9000, 9001),), size), now=now) is None
    assert await store.spend(client, costs, parts=Parts("v1", ((9000, 9001),), size), now=now) is DOWNLOADS


@pytest.mark.asyncio
async def test_leases_of_a_dead_process_end(redis: RedisServer) -> None:
    code = (
        "import asyncio, os, sys\n"
        "from downloadview_async.policy.limits import redis\n"
        "redis.LEASE_SECONDS = 0.3\n"
        "async def main():\n"
        "    store = redis.RedisLimitStore(sys.argv[1], timeout=5.0)\n"
        "    await store.admit(sys.argv[2], window=None, most=1, lease='dead')\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    client = a_client()
    subprocess.run([sys.executable, "-c", code, redis.url, client], cwd=PROJECT, check=False)
    store = RedisLimitStore(redis.url, timeout=5.0)
    with anyio.fail_after(20):
        while (await store.admit(client, window=None, most=1, lease="new")).refused is not None:
            await asyncio.sleep(0.02)
    await store.aclose()


@pytest.mark.asyncio
async def test_leases_are_renewed(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downloadview_async.policy.limits.redis.LEASE_SECONDS", 0.4)
    redis_module._terms.cache_clear()
    monkeypatch.setattr("downloadview_async.policy.limits.redis._RENEW_SECONDS", 0.1)
    one, other, client = RedisLimitStore(redis.url, timeout=5.0), RedisLimitStore(redis.url, timeout=5.0), a_client()
    followed: list[str] = []

    class Noting:
        def follow(self, client: str) -> None:
            followed.append(client)

    noting = Noting()
    one.followers.add(noting)
    assert (await one.admit(client, window=None, most=2, lease="a")).refused is None
    assert (await other.admit(client, window=None, most=2, lease="b")).refused is None
    with anyio.fail_after(20):
        while not followed:
            await asyncio.sleep(0.05)
    assert (one.transfers(client), other.transfers(client)) == (2, 2)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:  # longer than a lease
        assert (await other.admit(client, window=None, most=2, lease="c")).refused == "concurrent"
        await asyncio.sleep(0.05)
    await one.aclose()
    await other.aclose()
    redis_module._terms.cache_clear()
    assert LEASE_SECONDS == 30


@pytest.mark.asyncio
async def test_redis_may_forget_its_scripts(redis: RedisServer) -> None:
    from redis import asyncio as library

    store, client = RedisLimitStore(redis.url, timeout=5.0), a_client()
    assert (await store.admit(client, window=MINUTE, most=None, lease=None)).refused is None
    server = library.Redis.from_url(redis.url)
    await server.script_flush()
    await server.aclose()
    verdicts = await asyncio.gather(*[store.admit(client, window=MINUTE, most=None, lease=None) for _ in range(20)])
    assert [verdict.refused for verdict in verdicts].count(None) == 2
    await store.aclose()


@pytest.mark.asyncio
async def test_keys_expire_and_do_not_show_the_client(redis: RedisServer) -> None:
    from redis import asyncio as library

    store, client = RedisLimitStore(redis.url, prefix=f"test-{a_client()}", timeout=5.0), "address 203.0.113.7"
    await store.admit(client, window=MINUTE, most=2, lease="a")
    await spend(store, client, (BYTES, 1), (DOWNLOADS, 1), now=time.time())
    store.release(client, None, [(BYTES, 0), (DOWNLOADS, 0)], spent_at=NOW, unsent=Parts("v1", ((1, 100),), 100))
    await store.check()
    server = library.Redis.from_url(redis.url, decode_responses=True)
    keys = [key async for key in server.scan_iter(f"{store._prefix}*")]
    assert len(keys) == 6
    for key in keys:
        assert "203" not in key.removeprefix(store._prefix)[:6]
        assert 0 < await server.ttl(key) <= 2 * 86_400
    await server.aclose()
    await store.aclose()


@pytest.mark.asyncio
async def test_memory_bounds_the_downloads_of_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_ALL_SESSIONS", 20)
    store = MemoryLimitStore()
    plenty = [(Quota(10**9, "downloads", 86_400, ""), 1)]
    for client in range(10):
        for _ in range(2):
            for session in range(5):
                await store.spend(f"{client}", plenty, parts=Parts(f"{session}", WHOLE, SIZE), now=NOW)
    kept = sum(len(known.sessions) for known in store._clients.values())
    assert 15 <= kept <= 20
    assert store._sessions == kept


@pytest.mark.asyncio
async def test_memory_forgets_clients_but_not_their_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_CLIENTS", 3)
    store = MemoryLimitStore()
    await store.admit("busy", window=MINUTE, most=1, lease="a")
    for number in range(10):
        await store.admit(str(number), window=MINUTE, most=1, lease=None)
    assert (store.transfers("busy"), len(store._clients)) == (1, 3)
    assert (await store.admit("busy", window=MINUTE, most=1, lease="b")).refused == "concurrent"


@contextlib.contextmanager
def a_hung_server() -> Any:
    """Accept connections, and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@pytest.mark.asyncio
@pytest.mark.parametrize("verdict", ["allow", "refuse"])
async def test_a_hung_server_is_asked_once(verdict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downloadview_async.policy.limits.guarded.PAUSE", 3600.0)
    with a_hung_server() as url:
        guarded = GuardedLimitStore(RedisLimitStore(url), when_it_fails=verdict)
        asked = 0
        ask = guarded._store.admit

        async def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal asked
            asked += 1
            return await ask(*arguments, **options)

        monkeypatch.setattr(guarded._store, "admit", counting)
        for _ in range(50):
            refused = contextlib.nullcontext() if verdict == "allow" else pytest.raises(dv.SourceUnavailable)
            with refused:
                answer = await guarded.admit("a", window=MINUTE, most=1, lease="x")
                assert answer.refused is None
            guarded.release("a", "x", (), spent_at=0.0, unsent=None)
        assert asked == 1
        await guarded.aclose()


@pytest.mark.asyncio
async def test_the_time_of_a_busy_process_is_not_that_of_the_store(caplog: pytest.LogCaptureFixture) -> None:
    async def until_it_fails(busy: float) -> float:
        with a_hung_server() as url:
            guarded = GuardedLimitStore(RedisLimitStore(url), when_it_fails="allow")
            asking = asyncio.create_task(guarded.admit("a", window=MINUTE, most=1, lease="x"))
            began = time.monotonic()
            while not asking.done():
                time.sleep(busy)
                await asyncio.sleep(0 if busy else 0.01)
            assert guarded.uncounted == 1
            await guarded.aclose()
            return time.monotonic() - began

    assert await until_it_fails(0.03) > 0.5
    assert min([await until_it_fails(0.0) for _ in range(5)]) < 0.3  # another process may be what it waits for
    assert caplog.text.count("the store of limits has failed") == 6  # of six stores, each once


@pytest.mark.asyncio
async def test_what_a_failed_store_has_not_counted_is_not_given_back(redis: RedisServer) -> None:
    limits = dv.Limits(quota="1kB/day", store=redis.url, name=a_client())
    metadata, guarded = FileMetadata(size=600), limits._store
    assert isinstance(guarded, GuardedLimitStore)
    await limits.check()

    async def take(sent: int | None, *, fails: bool = False) -> None:
        with await begun(limits) as transfers:
            guarded._has_failed, guarded._check_at = fails, float("inf")
            await charge(transfers, "/a", metadata, 600)
            guarded._has_failed = False
            transfers.sent(sent)

    await take(None)
    for _ in range(3):
        await take(0, fails=True)
    await take(None)
    with pytest.raises(dv.LimitExceeded):
        await take(None)
    await limits.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("rounds", range(4))
async def test_a_client_that_leaves_before_the_verdict_gets_nothing_back(redis: RedisServer, rounds: int) -> None:
    store, client = RedisLimitStore(redis.url, timeout=5.0), a_client()
    spend_all = functools.partial(store.spend, client, [(BYTES, 100)], parts=None, now=NOW)
    assert await spend_all() is None

    async def leave() -> None:
        limits = dv.Limits(quota="100B/day")
        limits._store = store
        with Transfers() as transfers:
            request = request_from()
            await transfers.begin([limits], request.scope, request.receive, is_transfer=True)
            transfers._all[0].client, limits._memory = client, None
            await charge(transfers, "/a", FileMetadata(size=100), 100)

    task = asyncio.create_task(leave())
    for _ in range(rounds + 1):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await store.check()
    assert await spend_all() == BYTES
    other = a_client()
    charging = asyncio.create_task(store.spend(other, [(BYTES, 100)], parts=None, now=NOW))
    for _ in range(rounds + 1):
        await asyncio.sleep(0)
    charging.cancel()
    await asyncio.wait([charging])
    await store.check()  # the charge
    await store.check()  # and what is given back
    assert await store.spend(other, [(BYTES, 100)], parts=None, now=NOW) is None
    await store.aclose()


@pytest.mark.asyncio
async def test_the_clock_of_the_server_is_set_back(redis: RedisServer) -> None:
    from redis import asyncio as library

    server, store, client = library.Redis.from_url(redis.url), RedisLimitStore(redis.url, timeout=5.0), a_client()
    for _ in range(3):
        assert (await store.admit(client, window=MINUTE, most=1, lease=None)).refused is None
    name, later = store._name(client), (time.time() + 86_400) * 1000
    await server.hset(f"{name}requests", "began", str(int(later)))
    await server.zadd(f"{name}leases", {"dead": later})
    verdict = await store.admit(client, window=MINUTE, most=1, lease=None)
    assert verdict.refused == "requests"
    assert verdict.wait <= 120
    assert (await store.admit(client, window=None, most=1, lease="new")).refused is None
    await server.aclose()
    await store.aclose()


@pytest.mark.asyncio
async def test_the_store_is_used_again_when_it_is_back(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downloadview_async.policy.limits.guarded.PAUSE", 0.05)
    server = RedisServer(tmp_path)
    server.start()
    guarded = GuardedLimitStore(RedisLimitStore(server.url, timeout=1.0), when_it_fails="allow")
    once = Window(1, 60, "")
    assert (await guarded.admit("a", window=once, most=None, lease=None)).refused is None
    assert (await guarded.admit("a", window=once, most=None, lease=None)).refused == "requests"
    server.stop()
    assert (await guarded.admit("a", window=once, most=None, lease=None)).refused is None
    server.start()
    try:
        with anyio.fail_after(20):
            while (await guarded.admit("a", window=once, most=None, lease=None)).refused is None:
                await asyncio.sleep(0.02)
    finally:
        await guarded.aclose()
        server.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("verdict", ["allow", "refuse"])
async def test_no_request_has_to_come_before_a_store_that_is_back_is_used_again(
    verdict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("downloadview_async.policy.limits.guarded.PAUSE", 0.05)
    server = RedisServer(tmp_path)
    guarded = GuardedLimitStore(RedisLimitStore(server.url, timeout=1.0), when_it_fails=verdict)
    with contextlib.nullcontext() if verdict == "allow" else pytest.raises(dv.SourceUnavailable):
        await guarded.admit("a", window=Window(1, 60, ""), most=None, lease=None)
    server.start()
    try:
        with anyio.fail_after(20):
            while "the store of limits works again" not in caplog.text:
                await asyncio.sleep(0.02)
        assert (await guarded.admit("a", window=Window(1, 60, ""), most=None, lease=None)).refused is None
        assert (await guarded.admit("a", window=Window(1, 60, ""), most=None, lease=None)).refused == "requests"
    finally:
        await guarded.aclose()
        server.stop()


def request_from(client: str | None = "192.0.2.1", headers: dict[str, str] | None = None, **scope: Any) -> Request:
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    peer = None if client is None else (client, 1)
    return Request({"type": "http", "method": "GET", "path": "/", "client": peer, "headers": raw, **scope})


def _granted(grant: dv.Grant) -> dict[str, Any]:
    return {GRANT: grant}


async def by_a_hook(request: Request) -> str | None:
    return request.headers.get("x-plan")


@pytest.mark.asyncio
async def test_who_counts_as_one_client() -> None:
    async def same(limits: dv.Limits, one: Request, other: Request) -> bool:
        return await limits.client_of(one) == await limits.client_of(other)

    address = dv.Limits()
    assert await same(address, request_from("2001:db8::1"), request_from("2001:db8::ffff:1"))
    assert not await same(address, request_from("2001:db8::1"), request_from("2001:db8:0:1::1"))
    assert not await same(address, request_from("192.0.2.1"), request_from("192.0.2.2"))
    assert await same(address, request_from(None), request_from(None))
    ada, bob = (_granted(dv.Grant(user=name)) for name in ("ada", "bob"))
    user = dv.Limits(client="user")
    assert await same(user, request_from("192.0.2.1", **ada), request_from("192.0.2.2", **ada))
    assert not await same(user, request_from(**ada), request_from(**bob))
    assert await same(user, request_from(), request_from())
    link = dv.Limits(client="link")
    assert not await same(link, request_from(**_granted(dv.Grant(link_id="a"))), request_from())
    hook = dv.Limits(client=by_a_hook)
    assert await same(hook, request_from("192.0.2.1", {"X-Plan": "a"}), request_from("192.0.2.2", {"X-Plan": "a"}))
    assert not await same(hook, request_from("192.0.2.1"), request_from("192.0.2.2"))
    plain = dv.Limits(client=lambda request: "all")
    assert await same(plain, request_from("192.0.2.1"), request_from("192.0.2.2"))


@pytest.mark.asyncio
async def test_a_header_counts_if_a_trusted_proxy_sends_it() -> None:
    limits = dv.Limits(client="header:X-Tenant", trusted=["10.0.0.0/8"])

    def behind(peer: str) -> dict[str, Any]:
        return {"downloadview_async.peer": peer}

    tenant = request_from("192.0.2.1", {"X-Tenant": "a"}, **behind("10.0.0.1"))
    again = request_from("192.0.2.9", {"X-Tenant": "a"}, **behind("10.0.0.2"))
    forged = request_from("192.0.2.9", {"X-Tenant": "a"}, **behind("192.0.2.9"))
    assert await limits.client_of(tenant) == await limits.client_of(again)
    assert await limits.client_of(forged) == await limits.client_of(request_from("192.0.2.9", **behind("192.0.2.9")))
    assert "X-Tenant a" not in await limits.client_of(forged)


@pytest.mark.asyncio
async def test_names_of_clients_that_are_long_or_not_utf_8(redis: RedisServer) -> None:
    limits = dv.Limits(client=lambda request: request.headers["x-name"] * 10_000, name="limits")
    keys = [await limits.client_of(request_from(headers={"X-Name": name})) for name in ("a", "b", "a")]
    assert keys[0] == keys[2] != keys[1]
    assert max(map(len, keys)) < 100
    store = RedisLimitStore(redis.url, timeout=5.0)
    assert (await store.admit("\udcff", window=MINUTE, most=1, lease=None)).refused is None
    await store.aclose()


def raises(request: Request) -> str:
    raise RuntimeError


def gives_a_number(request: Request) -> Any:
    return 7


async def waits_for_a_cancelled_task(request: Request) -> str:
    raise asyncio.CancelledError


@pytest.mark.asyncio
@pytest.mark.parametrize("hook", [raises, gives_a_number, waits_for_a_cancelled_task])
async def test_a_function_that_fails_refuses_the_request(hook: Callable[[Request], Any]) -> None:
    with pytest.raises(dv.SourceUnavailable):
        await dv.Limits(client=hook).client_of(request_from())


async def charge(transfers: Transfers, path: str, metadata: FileMetadata, size: int) -> None:
    if (spending := transfers.spend(path, metadata, size, [ByteRange(0, size)])) is not None:
        await spending


async def begun(limits: dv.Limits) -> Transfers:
    transfers = Transfers()
    request = request_from()
    await transfers.begin([limits], request.scope, request.receive, is_transfer=True)
    return transfers


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_those_who_wait_get_their_turn_in_order(kind: str, request: pytest.FixtureRequest) -> None:
    url = "memory" if kind == "memory" else request.getfixturevalue("redis").url
    limits = dv.Limits(concurrent=1, mode="queue", store=url, name=a_client(), when_store_fails="refuse")
    await limits.check()
    first = await begun(limits)
    ended: list[int] = []

    async def one(number: int) -> None:
        transfers = await begun(limits)
        with transfers:
            assert transfers.waits
            await transfers.hold()
            ended.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            task = tasks.create_task(one(number))
            while not limits._queues or len(next(iter(limits._queues.values()))) <= number:
                await asyncio.sleep(0)
                assert not task.done()
        with first:
            pass
    assert ended == [0, 1, 2, 3, 4]
    assert not limits._queues
    with await begun(limits) as last:
        assert not last.waits
    await limits.aclose()


@pytest.mark.asyncio
async def test_a_wait_is_bounded_by_time_and_by_number() -> None:
    limits = dv.Limits(concurrent=1, mode="queue", queue_seconds=0.2)
    with await begun(limits):
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(held(limits)) for _ in range(40)]
        refused = [str(task.result()) for task in waiting]
    assert refused == ["the limit is at most 1 transfer at once"] * 40
    assert not limits._queues
    with await begun(limits) as transfers:
        assert not transfers.waits


async def held(limits: dv.Limits) -> Exception | None:
    with await begun(limits) as transfers:
        try:
            await transfers.hold()
        except dv.LimitExceeded as exc:
            return exc
    return None


@pytest.mark.asyncio
async def test_one_who_is_cancelled_while_waiting_leaves_nothing_behind() -> None:
    limits = dv.Limits(concurrent=1, mode="queue")
    with await begun(limits):
        tasks = [asyncio.create_task(held(limits)) for _ in range(3)]
        while not limits._queues or len(next(iter(limits._queues.values()))) < 3:
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait(tasks[:2])
    assert await tasks[2] is None
    assert not limits._queues


@pytest.mark.asyncio
async def test_quotas_of_an_answer_and_what_was_not_sent() -> None:
    limits = dv.Limits(quota="1kB/day")
    metadata = FileMetadata(size=600)

    async def take(sent: int | None) -> None:
        with await begun(limits) as transfers:
            await charge(transfers, "/a", metadata, 600)
            transfers.sent(sent)

    await take(0)
    await take(10)
    await take(600)
    await take(None)
    with pytest.raises(dv.LimitExceeded, match="1kB per day") as raised:
        await take(1)
    assert 0 < int(raised.value.retry_after or 0) <= 86_400


async def join(limits: dv.Limits, client: str, stack: contextlib.ExitStack) -> Pace:
    """Begin a transfer of a client with a rate, as the server does."""
    transfers = stack.enter_context(Transfers())
    request = request_from(client)
    await transfers.begin([limits], request.scope, request.receive, is_transfer=True)
    await asyncio.sleep(0)  # the file is opened meanwhile
    return stack.enter_context(Pace(transfers.rates, None))


@pytest.mark.asyncio
async def test_all_transfers_of_a_client_share_one_rate_beside_those_of_others() -> None:
    limits = dv.Limits(rate="8MB/s")
    with contextlib.ExitStack() as stack:
        await join(limits, "192.0.2.1", stack)
        paces = [await join(limits, "192.0.2.2", stack) for _ in range(4)]
        await asyncio.gather(*[join(limits, f"192.0.2.{number}", stack) for number in range(3, 9)])
        paces += await asyncio.gather(*[join(limits, "192.0.2.2", stack) for _ in range(4)])
        assert [pace.rate for pace in paces] == [1_000_000] * 8


@pytest.mark.asyncio
async def test_rates_that_nothing_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downloadview_async.policy.limits.limits.MAX_CLIENTS", 50)
    limits = dv.Limits(rate="1kB/s")

    async def ask(number: int, size: int) -> None:
        with Transfers() as transfers:
            request = request_from(f"192.0.2.{number}")
            await transfers.begin([limits], request.scope, request.receive, is_transfer=True)
            transfers.rates[0].take(size)

    with contextlib.ExitStack() as stack:
        await join(limits, "192.0.2.0", stack)  # the one that is used least must not keep the others
        for number in range(1, 200):
            await ask(number, 0)
        assert len(limits._rates) <= 3
        for number in range(1, 200):
            await ask(number, 100_000)  # ahead of its rate: remembered
        assert 40 <= len(limits._rates) <= 51


class Connection:
    """A connection of a client that takes what it is sent, or at most `most` bytes per second."""

    def __init__(self, most: float = float("inf")) -> None:
        self.most = most
        self.rates: list[int] = []
        self.taken = 0.0

    def pace(self, rate: int) -> None:
        self.rates.append(rate)

    def acknowledged(self) -> int:
        return int(self.taken)

    def go_on(self, seconds: float) -> None:
        self.taken += seconds * min(self.rates[-1], self.most)


def test_transfers_share_a_rate_as_they_come_and_go() -> None:
    shared = SharedRate(8_000_000)
    connections = [Connection() for _ in range(4)]
    paces = [Pace((shared,), connection) for connection in connections]
    with paces[0]:
        assert connections[0].rates == [8_000_000]
        with paces[1], paces[2], paces[3]:
            assert [one.rates[-1] for one in connections] == [2_000_000] * 4
        assert connections[0].rates[-1] == 8_000_000
    assert shared.is_idle


def test_a_transfer_has_the_least_of_its_rates() -> None:
    total, client = SharedRate(9_000_000), SharedRate(5_000_000)
    one, other = Pace((client, total), None), Pace((total,), None)
    with one, other:
        assert (one.rate, other.rate) == (4_500_000, 4_500_000)
    with one:
        assert one.rate == 5_000_000


def test_many_transfers_follow_when_their_number_has_changed_enough() -> None:
    shared, connection = SharedRate(10**9), Connection()
    with contextlib.ExitStack() as stack:
        paces = [stack.enter_context(Pace((shared,), connection)) for _ in range(1000)]
        assert sum(one.rate for one in paces) <= 1.06 * 10**9
    assert len(connection.rates) < 60_000  # 20 or so for each, not 1000


def test_transfers_of_other_processes_share_a_rate_too() -> None:
    shared = SharedRate(9_000_000, lambda: 3)
    with Pace((shared,), None) as one:
        assert one.rate == 3_000_000


def test_transfers_share_a_rate_with_those_that_a_proxy_sends() -> None:
    shared = SharedRate(9_000_000)
    with Pace((shared,), None) as one:
        assert (one.rate, shared.part_of_next) == (9_000_000, 4_500_000)
        shared.begin_by_proxy()
        assert (one.rate, shared.part_of_next) == (4_500_000, 3_000_000)
        shared.end_by_proxy()
        assert one.rate == 9_000_000
    shared.begin_by_proxy()
    assert not shared.is_idle
    shared.end_by_proxy()
    assert shared.is_idle


@pytest.mark.asyncio
async def test_what_slow_clients_leave_is_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    shared = SharedRate(9_000_000)
    slow, stalled, fast = Connection(500_000), Connection(0), Connection()
    connections = [slow, stalled, fast]

    def go_on() -> list[int]:
        clock[0] += 0.5
        for one in connections:
            one.go_on(0.5)
        shared._look()
        rates = [one.rates[-1] for one in connections]
        assert sum(rates) <= 9_000_000
        return rates

    with Pace((shared,), slow), Pace((shared,), stalled):
        with Pace((shared,), fast):
            assert [one.rates[-1] for one in connections] == [3_000_000] * 3
            assert go_on() == [625_000, 300_000, 8_075_000]
            assert go_on()[2] > 7_000_000  # the slow one may have become faster, and gets the room for it
            stalled.most = float("inf")
            for _ in range(4):
                rates = go_on()
            assert rates[1] > 4_000_000
            assert rates[2] > 4_000_000
        connections.remove(fast)
        slow.most = float("inf")
        go_on()
        assert go_on() == [4_500_000, 4_500_000]
    assert shared.is_idle


@pytest.mark.asyncio
async def test_large_packets_do_not_make_a_client_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    class InPackets(Connection):
        """A client of the loopback device, which gets packets of 128 KiB."""

        def acknowledged(self) -> int:
            return super().acknowledged() // 131_072 * 131_072

    shared, connections = SharedRate(1_000_000), [InPackets() for _ in range(10)]
    with contextlib.ExitStack() as stack:
        for one in connections:
            stack.enter_context(Pace((shared,), one))
        for _ in range(40):
            clock[0] += 0.5
            for one in connections:
                one.go_on(0.5)
            shared._look()
            assert sum(one.rates[-1] for one in connections) >= 500_000


def test_small_answers_may_be_ahead_of_the_rate_by_a_second() -> None:
    shared = SharedRate(1_000_000)
    assert [shared.take(10_000) for _ in range(100)] == [0.0] * 100
    assert 0.3 < shared.take(500_000) <= 0.5
    assert not shared.is_idle


@pytest.mark.asyncio
async def test_small_answers_have_a_part_of_the_rate_beside_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    shared, connection = SharedRate(1_000_000), Connection()
    with Pace((shared,), connection):
        shared.take(10_000)  # now and then: no part
        assert connection.rates == [1_000_000]
        sent, wait = 0, 0.0
        while clock[0] < 1010.0:
            wait = shared.take(50_000)
            clock[0] += wait
            sent += 50_000
        assert connection.rates[-1] == 500_000
        assert sent <= 5_600_000  # half of the rate, and what may be ahead of it
        clock[0] += 5
        connection.go_on(15)
        shared._look()
        assert connection.rates[-1] == 1_000_000
