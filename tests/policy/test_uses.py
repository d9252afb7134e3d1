"""Links with uses, and links that are revoked: what the signer makes of them, with a store that works or fails."""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

import downloadview_async as dv
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.policy.uses import USE, Use, client_network
from tests.redis_server import RedisServer

KEYS = {"2026b": bytes(range(32)), "2026a": bytes(range(1, 33))}
FILE = FileMetadata(size=10, etag=dv.ETag("1"))


def signer(store: dv.GrantStore | None = None, **options: Any) -> dv.URLSigner:
    return dv.URLSigner(KEYS, store=store or dv.MemoryGrantStore(), **options)


def scope_of(link: str, method: str = "GET", client: str | None = "203.0.113.5") -> dict[str, Any]:
    path, _, query = link.partition("?")
    address = None if client is None else (client, 1)
    return {"type": "http", "method": method, "path": path, "query_string": query.encode(), "client": address}


async def use_of(signer: dv.URLSigner, link: str, client: str | None = "203.0.113.5") -> Use:
    scope = scope_of(link, client=client)
    await signer.verify(scope)
    use: Use = scope[USE]
    return use


async def is_claimed(signer: dv.URLSigner, link: str, client: str | None = "203.0.113.5") -> bool:
    try:
        await (await use_of(signer, link, client)).claim(FILE, wants_all=True)
    except dv.LinkUsedUp:
        return False
    return True


class Failing(dv.MemoryGrantStore):
    """A store whose server is gone, or hangs."""

    def __init__(self, *, hangs: bool = False) -> None:
        super().__init__()
        self.hangs = hangs

    async def claim(self, *arguments: Any, **options: Any) -> bool:
        return await self._fail()

    async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
        return await self._fail()

    async def revoke(self, identifier: str, until: float | None) -> None:
        await self._fail()

    async def _fail(self) -> bool:
        if self.hangs:
            await asyncio.Event().wait()
        raise ConnectionError("the server\nis gone")


@pytest.mark.asyncio
async def test_the_uses_are_in_the_link() -> None:
    one = signer()
    link = one.sign("/a", uses=3)
    assert "&u=3&s=" in link
    grant = await one.verify(scope_of(link))
    assert grant.uses == 3
    for other in (link.replace("u=3", "u=4"), link.replace("&u=3", ""), link.replace("&u=3", "&u=3&u=3")):
        with pytest.raises(dv.LinkInvalid):
            await one.verify(scope_of(other))
    assert (await one.verify(scope_of(one.sign("/a")))).uses is None


@pytest.mark.asyncio
async def test_a_link_without_uses_and_a_head_claim_nothing() -> None:
    one = signer()
    for scope in (scope_of(one.sign("/a")), scope_of(one.sign("/a", uses=1), "HEAD")):
        await one.verify(scope)
        assert USE not in scope


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"uses": 0}, "from 1 to"),
        ({"uses": -1}, "from 1 to"),
        ({"uses": 1_000_001}, "from 1 to"),
        ({"uses": 1, "shareable": True}, "caches do not count"),
    ],
)
def test_uses_that_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        signer().sign("/a", **options)


@pytest.mark.parametrize(
    "options",
    [{"store": "links.db"}, {"store": dv.MemoryGrantStore}, {"when_store_fails": "ignore"}, {"store_timeout": 0}],
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(dv.ConfigurationError):
        signer(**options)


@pytest.mark.asyncio
async def test_without_a_store_nothing_is_counted_so_nothing_is_allowed() -> None:
    without = dv.URLSigner(KEYS)
    with pytest.raises(dv.ConfigurationError, match="give URLSigner a store"):
        without.sign("/a", uses=1)
    with pytest.raises(dv.ConfigurationError, match="give URLSigner a store"):
        await without.revoke("2026a")
    with pytest.raises(dv.LinkInvalid, match="there is no store"):
        await without.verify(scope_of(signer().sign("/a", uses=1)))


@pytest.mark.asyncio
async def test_each_client_is_a_use() -> None:
    one = signer()
    link = one.sign("/a", uses=2)
    clients = ["203.0.113.5", "203.0.113.5", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "203.0.113.6"]
    assert [await is_claimed(one, link, client) for client in clients] == [True, True, True, True, False, False]


@pytest.mark.asyncio
async def test_the_application_may_say_who_the_client_is() -> None:
    one = signer(client_of=lambda scope: str(scope["client"][0][-1]))
    link = one.sign("/a", uses=1)
    assert await is_claimed(one, link, "203.0.113.5")
    assert await is_claimed(one, link, "198.51.100.5")
    assert not await is_claimed(one, link, "203.0.113.6")


@pytest.mark.parametrize(
    "address, expected",
    [
        ("203.0.113.5", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_who_a_client_is(address: str, expected: str) -> None:
    assert client_network({"client": (address, 1)}) == expected


@pytest.mark.parametrize("client", [None, ("", 0)])
def test_clients_without_an_address_are_not_the_same_one(client: Any) -> None:
    assert len({client_network({"client": client}) for _ in range(10)}) == 10


@pytest.mark.asyncio
async def test_a_session_ends_after_its_time() -> None:
    one = signer(session_seconds=1e-6)
    link = one.sign("/a", uses=2)
    assert [await is_claimed(one, link) for _ in range(3)] == [True, True, False]


@pytest.mark.asyncio
async def test_a_revoked_link_and_a_revoked_key() -> None:
    store = dv.MemoryGrantStore()
    one, other = signer(store), dv.URLSigner(dict(reversed(KEYS.items())), store=store)
    first, second = one.sign("/a"), one.sign("/a", uses=1)
    by_other = other.sign("/a")
    grant = await one.verify(scope_of(first))
    assert grant.link_id is not None
    until = await other.revoke(grant.link_id)
    assert until is not None
    assert timedelta(days=7).total_seconds() < until - time.time() < timedelta(days=8).total_seconds()
    for method in ("GET", "HEAD"):
        with pytest.raises(dv.LinkInvalid, match="revoked"):
            await one.verify(scope_of(first, method))
    await one.verify(scope_of(second))
    # what may be a key of another process, whose links may live longer
    assert [await one.revoke(identifier) for identifier in ("2025z", "20261129-41cf", "ada_key_2026a")] == [None] * 3
    secure = await one.verify(scope_of(one.sign("/a", format="secure_link")), format="secure_link")
    assert secure.link_id is not None
    assert await one.revoke(secure.link_id) is not None
    assert await one.revoke("2026b") is None
    with pytest.raises(dv.LinkInvalid, match="revoked"):
        await one.verify(scope_of(second))
    await one.verify(scope_of(by_other))
    with pytest.raises(ValueError, match="not the id of a link"):
        await one.revoke("a b")


@pytest.mark.asyncio
async def test_links_that_never_expire_are_revoked_for_ever() -> None:
    assert await signer(max_age=None).revoke("abc") is None


def test_no_id_of_a_link_looks_like_an_option() -> None:
    one = signer()
    assert not [link for link in (one.sign("/a") for _ in range(1000)) if "&i=-" in link]


@pytest.mark.asyncio
@pytest.mark.parametrize("hangs", [False, True])
async def test_a_store_that_fails_refuses(hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    one = signer(Failing(hangs=hangs), store_timeout=0.05)
    with caplog.at_level(logging.WARNING, "downloadview_async"):
        for _ in range(3):
            with pytest.raises(dv.SourceUnavailable) as error:
                await one.verify(scope_of(one.sign("/a")))
    assert error.value.status == 503
    assert len(caplog.messages) == 1, "once a minute"
    assert "requests that need it get 503" in caplog.text
    assert ("no answer in 0.05 seconds" if hangs else r"the server\nis gone") in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("hangs", [False, True])
async def test_a_store_that_fails_may_allow(hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    one = signer(Failing(hangs=hangs), store_timeout=0.05, when_store_fails="allow")
    link = one.sign("/a", uses=1)
    with caplog.at_level(logging.WARNING, "downloadview_async"):
        assert await is_claimed(one, link, "203.0.113.5")
        assert await is_claimed(one, link, "203.0.113.6")
    assert len(caplog.messages) == 1
    assert "requests are allowed without it" in caplog.text
    with pytest.raises(dv.SourceUnavailable):
        await one.revoke("abc")


@pytest.mark.asyncio
@pytest.mark.parametrize("when_store_fails", ["refuse", "allow"])
async def test_redis_stops_and_is_back(redis: RedisServer, when_store_fails: Any) -> None:
    store = dv.RedisGrantStore(redis.url)
    one = signer(store, when_store_fails=when_store_fails, store_timeout=2)
    link = one.sign("/a", uses=1)
    assert await is_claimed(one, link)
    redis.stop()
    try:
        if when_store_fails == "allow":
            assert await is_claimed(one, link, "203.0.113.6")
        else:
            with pytest.raises(dv.SourceUnavailable):
                await one.verify(scope_of(link))
    finally:
        redis.start()
    assert await is_claimed(one, link, "203.0.113.7"), "this server keeps nothing on its disk"
    assert not await is_claimed(one, link, "203.0.113.8")
    await store.aclose()


class FailingForAWhile(dv.MemoryGrantStore):
    """A store whose server is gone for some notes."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def note(self, *arguments: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the server is gone")
        await super().note(*arguments)


@pytest.mark.asyncio
@pytest.mark.parametrize("when_store_fails", ["refuse", "allow"])
async def test_what_was_sent_while_the_store_was_gone_is_noted_later(when_store_fails: Any) -> None:
    one = signer(FailingForAWhile(3), when_store_fails=when_store_fails)
    link = one.sign("/a", uses=1)
    use = await use_of(one, link)
    await use.claim(FILE, wants_all=True)
    await use.note(ByteRange(0, 4))
    await use.note(ByteRange(4, 10))
    assert await is_claimed(one, link), "the session goes on"
    with anyio.fail_after(30):
        while await is_claimed(one, link):  # the same client, whose download is complete
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_what_is_noted_after_the_end_of_the_application_leaves_no_connection(tmp_path: Path) -> None:
    """A reload closes the store of the old settings, which may have failed to note the end of a download."""
    before = threading.enumerate()
    store = dv.SQLiteGrantStore(tmp_path / "links.db")
    one = signer(store, store_timeout=0.2)
    use = await use_of(one, one.sign("/a", uses=1))
    await use.claim(FILE, wants_all=True)
    with closing(sqlite3.connect(tmp_path / "links.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        await use.note(ByteRange(0, 10), is_whole=True)
        await one.aclose()
        other.execute("ROLLBACK")
        async with asyncio.timeout(30):
            while "0-10" not in str(other.execute("SELECT * FROM sessions").fetchall()):
                await asyncio.sleep(0.05)
            while [thread for thread in threading.enumerate() if thread not in before]:
                await asyncio.sleep(0.05)
