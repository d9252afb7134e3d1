"""The stores of uses and revocations: one suite for all of them, and what several processes count together."""

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import downloadview_async as dv
from downloadview_async.policy.stores.base import MOST_SPANS, is_whole, with_span
from tests.servers import PROJECT

KINDS = ["memory", "sqlite", "redis"]
SHARED = ["sqlite", "redis"]
NOW = 1_900_000_000.0
SIZE = 100


def url_of(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "redis":
        return str(request.getfixturevalue("redis").url)
    directory: Path = request.getfixturevalue("tmp_path")
    return "memory:" if kind == "memory" else f"sqlite:{directory / 'links.db'}"


@pytest_asyncio.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[dv.GrantStore]:
    store = dv.grant_store_from_url(url_of(request.param, request))
    try:
        yield store
    finally:
        await store.aclose()


def session(client: str = "ada", version: str = '"1"', link: str | None = None) -> dv.DownloadSession:
    return dv.DownloadSession(link_id=link or uuid.uuid4().hex, client=client, version=version)


class Link:
    """A link with a number of uses, in a store."""

    def __init__(self, store: dv.GrantStore, uses: int) -> None:
        self.store = store
        self.uses = uses
        self.id = uuid.uuid4().hex

    def of(self, client: str, version: str = '"1"') -> dv.DownloadSession:
        return session(client, version, self.id)

    async def claim(
        self,
        client: str,
        *,
        version: str = '"1"',
        whole: bool = True,
        now: float = NOW,
        until: float | None = NOW + 1e6,
    ) -> bool:
        return await self.store.claim(
            self.of(client, version), uses=self.uses, wants_all=whole, now=now, ends=now + 86_400, until=until
        )

    async def sends(self, client: str, start: int, stop: int) -> None:
        await self.store.note(self.of(client), dv.ByteRange(start, stop), SIZE)


@pytest.mark.asyncio
async def test_a_session_is_one_use_until_it_is_complete(store: dv.GrantStore) -> None:
    link = Link(store, 1)
    assert [await link.claim("ada", whole=whole) for whole in (True, False, True)] == [True] * 3
    assert not await link.claim("bob")
    await link.sends("ada", 0, 60)
    assert await link.claim("ada")
    await link.sends("ada", 50, 100)
    assert not await link.claim("ada")
    assert await link.claim("ada", whole=False), "what the kernel took may not have arrived"
    assert not await link.claim("bob", whole=False)


@pytest.mark.asyncio
async def test_each_client_and_each_version_is_a_use(store: dv.GrantStore) -> None:
    link = Link(store, 3)
    assert await link.claim("ada")
    assert await link.claim("bob")
    assert await link.claim("ada", version='"2"')
    assert not await link.claim("eve")
    assert await link.claim("ada")
    assert await link.claim("bob")


@pytest.mark.asyncio
async def test_a_complete_download_is_followed_by_another_use(store: dv.GrantStore) -> None:
    link = Link(store, 2)
    for _ in range(2):
        assert await link.claim("ada")
        await link.sends("ada", 0, SIZE)
    assert not await link.claim("ada")


@pytest.mark.asyncio
async def test_a_session_ends_by_its_time(store: dv.GrantStore) -> None:
    link = Link(store, 2)
    assert await link.claim("ada")
    assert await link.claim("ada", now=NOW + 86_399)
    assert await link.claim("ada", now=NOW + 86_400)
    assert not await link.claim("bob", now=NOW + 86_400)
    assert not await link.claim("ada", now=NOW + 2 * 86_400)
    assert not await link.claim("ada", whole=False, now=NOW + 2 * 86_400)


@pytest.mark.asyncio
async def test_a_link_without_an_end_is_counted_for_ever(store: dv.GrantStore) -> None:
    link = Link(store, 1)
    assert await link.claim("ada", until=None)
    assert not await link.claim("bob", now=NOW + 1e9, until=None)


@pytest.mark.asyncio
async def test_parallel_clients_of_a_once_only_link(store: dv.GrantStore) -> None:
    link = Link(store, 1)
    assert sum(await asyncio.gather(*(link.claim(str(number)) for number in range(100)))) == 1


@pytest.mark.asyncio
async def test_parallel_requests_of_one_client_are_one_use(store: dv.GrantStore) -> None:
    link = Link(store, 2)
    assert all(await asyncio.gather(*(link.claim("ada", whole=number == 0) for number in range(16))))
    await asyncio.gather(*(link.sends("ada", place, place + 10) for place in range(0, SIZE, 10)))
    assert await link.claim("ada"), "the second use"
    assert not await link.claim("bob")


@pytest.mark.asyncio
async def test_nothing_is_noted_of_a_session_that_nobody_has_opened(store: dv.GrantStore) -> None:
    link = Link(store, 1)
    await link.sends("ada", 0, SIZE)
    assert await link.claim("ada")


@pytest.mark.asyncio
async def test_what_is_revoked(store: dv.GrantStore) -> None:
    one, other, key = (uuid.uuid4().hex for _ in range(3))
    now = time.time()
    assert not await store.is_revoked([one, key], now)
    await store.revoke(one, now + 1e6)
    assert await store.is_revoked([one, key], now)
    assert not await store.is_revoked([other, key], now)
    await store.revoke(key, None)
    assert await store.is_revoked([other, key], now)
    await store.revoke(one, now + 2e6)
    assert await store.is_revoked([one], now)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_entries_expire(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = dv.grant_store_from_url(url_of(kind, request))
    link, other, began = Link(store, 1), Link(store, 1), time.time()
    try:
        assert await link.claim("ada", now=began, until=began + 10)
        await store.revoke("gone", began + 10)
        assert not await store.is_revoked(["gone"], began + 10)
        assert await other.claim("ada", now=began + 70)
        assert await link.claim("bob", now=began + 71), "the entry of a link that has expired is still there"
    finally:
        await store.aclose()


@pytest.mark.asyncio
async def test_entries_in_redis_expire(request: pytest.FixtureRequest) -> None:
    url = url_of("redis", request)  # or the test is skipped
    from redis.asyncio import Redis

    store = dv.RedisGrantStore(url, prefix="expiring")
    link, until = Link(store, 1), time.time() + 1000
    async with Redis.from_url(url) as client:
        assert await link.claim("ada", until=until)
        await store.revoke("one", until)
        names = [name async for name in client.scan_iter("expiring:*")]
        assert sorted(names) == [f"expiring:1:link:{link.id}".encode(), b"expiring:1:revoked:one"]
        assert all([990 < await client.ttl(name) <= 1001 for name in names])
        await store.revoke("one", None)
        assert await client.ttl("expiring:1:revoked:one") == -1
    await store.aclose()


# --- several processes

CLAIMS = """
import asyncio, json, sys
import downloadview_async as dv

async def main(url, links, clients):
    store = dv.grant_store_from_url(url)
    async def claim(link, client):
        session = dv.DownloadSession(link_id=link, client=client, version="1")
        return await store.claim(session, uses=1, wants_all=True, now=1.9e9, ends=1.9e9 + 86400, until=2e9)
    await store.check()
    print("ready", flush=True)
    sys.stdin.readline()
    given = {link: sum(await asyncio.gather(*(claim(link, client) for client in clients))) for link in links}
    await store.aclose()
    print(json.dumps(given))

url, links, clients = json.loads(sys.argv[1])
asyncio.run(main(url, links, clients))
"""


def claims_of_processes(url: str, links: list[str]) -> dict[str, int]:
    """Claim each link by 1,000 clients over 3 processes, and return how many succeeded."""
    clients = [f"client {number}" for number in range(1000)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(3):
            arguments = json.dumps([url, links, clients[number::3]])
            process = subprocess.Popen(
                [sys.executable, "-c", CLAIMS, arguments],
                cwd=PROJECT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
            processes.append(stack.enter_context(process))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        results = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            output, _ = process.communicate(timeout=100)
            results.append(json.loads(output))
    return {link: sum(result[link] for result in results) for link in links}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.slow
def test_a_thousand_parallel_claims_over_three_processes(kind: str, request: pytest.FixtureRequest) -> None:
    links = [uuid.uuid4().hex for _ in range(100)]
    assert claims_of_processes(url_of(kind, request), links) == dict.fromkeys(links, 1)


@pytest.mark.asyncio
async def test_a_cancelled_claim_leaves_no_lock(tmp_path: Path) -> None:
    store, other = (dv.SQLiteGrantStore(tmp_path / "links.db") for _ in range(2))
    await store.check()
    link = Link(store, 100)
    for turns in range(20):
        task = asyncio.create_task(link.claim(str(turns)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    link.store = other
    assert await asyncio.wait_for(link.claim("ada"), 4), "a lock would be waited for during 5 seconds"
    for one in (store, other):
        await one.aclose()


@pytest.mark.asyncio
async def test_a_file_that_is_replaced_is_used_and_one_that_is_removed_fails(tmp_path: Path) -> None:
    path = tmp_path / "links.db"
    store, other = dv.SQLiteGrantStore(path), dv.SQLiteGrantStore(path)
    try:
        await store.revoke("one", None)
        for file in tmp_path.iterdir():
            file.unlink()
        with pytest.raises(sqlite3.OperationalError, match="has been removed"):
            await store.is_revoked(["one"], NOW)
        await other.revoke("two", None)  # as the command does
        assert await asyncio.gather(*(store.is_revoked(["two"], NOW) for _ in range(5))) == [True] * 5
        assert await store.claim(session(), uses=1, wants_all=True, now=NOW, ends=NOW + 9, until=None)
    finally:
        await store.aclose()
        await other.aclose()


@pytest.mark.asyncio
async def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "links.db")) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(dv.ConfigurationError, match="newer version"):
        await dv.SQLiteGrantStore(tmp_path / "links.db").check()


# --- values


@pytest.mark.parametrize(
    "sent, start, stop, expected",
    [
        ("", 0, 10, "0-10"),
        ("0-10", 10, 20, "0-20"),
        ("0-10", 20, 30, "0-10 20-30"),
        ("0-10 20-30", 10, 20, "0-30"),
        ("20-30", 0, 10, "0-10 20-30"),
        ("0-10 20-30", 5, 25, "0-30"),
        ("0-30", 5, 25, "0-30"),
        ("5-25", 0, 30, "0-30"),
        ("0-10", 5, 5, "0-10"),
    ],
)
def test_parts_are_joined(sent: str, start: int, stop: int, expected: str) -> None:
    assert with_span(sent, dv.ByteRange(start, stop)) == expected


def test_the_parts_of_a_session_are_bounded() -> None:
    sent = ""
    for place in range(MOST_SPANS + 10):
        sent = with_span(sent, dv.ByteRange(2 * place, 2 * place + 1))
    assert len(sent.split()) == MOST_SPANS
    assert is_whole(with_span(sent, dv.ByteRange(0, 3000)), 3000)


@pytest.mark.parametrize(
    "sent, size, expected", [("", 0, True), ("", 1, False), ("0-9", 10, False), ("0-10", 10, True)]
)
def test_what_is_whole(sent: str, size: int, expected: bool) -> None:
    assert is_whole(sent, size) is expected


@pytest.mark.parametrize(
    "url", ["", "memory", "memory:x", "sqlite:", "sqlite:///", "sqlite:///links.db", "redis", "mysql://u:secret@h/1"]
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(dv.ConfigurationError) as error:
        dv.grant_store_from_url(url)
    assert "secret" not in str(error.value)


def test_a_url_of_redis_that_is_refused() -> None:
    pytest.importorskip("redis")
    with pytest.raises(dv.ConfigurationError, match="give such as redis:"):
        dv.RedisGrantStore("http://127.0.0.1")
    with pytest.raises(dv.ConfigurationError, match="percent-encoded") as caught:
        dv.RedisGrantStore("redis://:pass/word@127.0.0.1:6379/0")
    assert "pass" not in str(caught.value).replace("password", "")


def test_importing_the_library_imports_no_client_of_a_store() -> None:
    code = "import sys, downloadview_async; print({'redis', 'aiosqlite'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "set()\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "redis", missing)
    monkeypatch.setitem(sys.modules, "aiosqlite", missing)
    with pytest.raises(dv.ConfigurationError, match="extra `redis`"):
        dv.RedisGrantStore("redis://127.0.0.1/0")
    with pytest.raises(dv.ConfigurationError, match="aiosqlite"):
        dv.SQLiteGrantStore("links.db")


def test_a_process_that_never_closes_its_store_ends(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from downloadview_async import SQLiteGrantStore
store = SQLiteGrantStore(sys.argv[1])
asyncio.run(store.check())
"""
    command = [sys.executable, "-c", program, str(tmp_path / "links.db")]
    subprocess.run(command, check=True, timeout=60, cwd=PROJECT)
