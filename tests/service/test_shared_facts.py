"""What services keep together in Redis: what a download costs there, and what is left when it is lost."""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import downloadview_async as dv
from downloadview_async.policy.stores.base import DownloadSession
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from tests.accounts.test_completions import postgres as postgres
from tests.live import ask, make_old, served
from tests.redis_relay import Relay, relaying
from tests.redis_server import RedisServer, redis_server
from tests.service.loading import refusal

SECRET = "s" * 32
SIZE = 400_000
LIMITS = {
    "all": 'concurrent = 8\nrequests = "1000/minute"\nquota = ["50GB/day", "1000 downloads/day"]\n',
    "transfers": "concurrent = 8\n",
    "requests": 'requests = "1000/minute"\n',
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def app_of(directory: Path, url: str, limits: str) -> Any:
    (directory / "files").mkdir(exist_ok=True)
    (directory / "files" / "a.bin").write_bytes(bytes(SIZE))
    make_old(directory / "files")
    (directory / "links.keys").write_text(f"a {SECRET}\n")
    (directory / "downloadview.toml").write_text(
        f'[links]\nkeys = "links.keys"\nstore = "{url}"\n[limits]\nstore = "{url}"\n{limits}'
        '[accounts]\ndatabase = "sqlite+aiosqlite:///accounts.db"\n'
        '[sources.files]\ntype = "path"\nroot = "files"\n'
        '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\naccess = ["signed"]\n'
    )
    return build(load_settings(directory / "downloadview.toml", environ={}))


def link(uses: int | None = 1, path: str = "/files/a.bin") -> str:
    signer = dv.URLSigner({"a": SECRET}, store=dv.grant_store_from_url("memory:"))
    return signer.sign(path, expires_in=timedelta(hours=1), uses=uses)


async def quiet(relay: Relay) -> None:
    """Return when nothing has passed for a while: what follows an answer is sent soon after it."""
    before = -1
    while before != len(relay.commands):
        before = len(relay.commands)
        await asyncio.sleep(0.2)


@pytest.mark.asyncio
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("uses", [1, None])
async def test_a_download_costs_four_commands_in_two_round_trips(
    tmp_path: Path, redis: RedisServer, limits: str, uses: int | None
) -> None:
    async with relaying(redis.port) as relay:
        app = app_of(tmp_path, relay.url, LIMITS[limits])
        async with served(app) as port:
            await ask(port, link(uses))  # which opens the connections, and teaches the server its scripts
            await quiet(relay)
            relay.reset()
            answer = await ask(port, link(uses))
            assert (answer.status, len(answer.body)) == (200, SIZE)
            await quiet(relay)
            assert len(relay.commands) <= 4
            assert relay.round_trips <= 2


def id_of(url: str) -> str:
    return parse_qs(urlsplit(url).query)["i"][0]


async def status_of(port: int, path: str, client: str) -> int:
    """Return the status of a request from an address of the loopback."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(client, 0))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    while await reader.read(1 << 20):
        pass
    writer.close()
    return status


@pytest.mark.asyncio
@pytest.mark.parametrize("uses", [1, None])
async def test_a_revoked_link_is_refused_and_costs_no_quota(
    tmp_path: Path, redis: RedisServer, uses: int | None
) -> None:
    store = dv.RedisGrantStore(redis.url)
    app = app_of(tmp_path, redis.url, 'quota = ["1 downloads/day"]\nconcurrent = 1\n')
    client = f"127.0.2.{uses or 2}"
    async with served(app) as port:
        revoked = link(uses)
        await store.revoke(id_of(revoked), None)
        for _ in range(3):
            assert await status_of(port, revoked, client) == 403
        assert await status_of(port, link(uses), client) == 200
        assert await status_of(port, link(uses), client) == 429
    await store.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("knows_one_script", [False, True])
async def test_a_request_that_a_limit_refuses_uses_no_link_up(
    tmp_path: Path, redis: RedisServer, knows_one_script: bool
) -> None:
    app = app_of(tmp_path, redis.url, 'requests = "1/hour"\nquota = ["9GB/day"]\n')
    net = f"127.0.3{int(knows_one_script)}"
    async with served(app) as port:
        once = link()
        assert await status_of(port, link(), f"{net}.1") == 200
        if knows_one_script:  # as when the server was started again, and a link was used without limits since then
            await call(redis.url, "SCRIPT FLUSH")
            store = dv.RedisGrantStore(redis.url)
            session = DownloadSession(link_id="another", client=f"{net}.1", version="1")
            now = time.time()
            assert await store.claim(session, uses=1, wants_all=True, now=now, ends=now + 60, until=now + 60)
            await store.aclose()
        statuses = [await status_of(port, once, f"{net}.{number}") for number in (1, 2, 3)]
        assert statuses == [429, 200, 410]


@pytest.mark.asyncio
async def test_requests_for_missing_files_count(tmp_path: Path, redis: RedisServer) -> None:
    app = app_of(tmp_path, redis.url, 'requests = "2/hour"\n')
    missing = link(None, "/files/none.bin")
    async with served(app) as port:
        statuses = [await status_of(port, missing, "127.0.4.1") for _ in range(3)]
        assert statuses == [404, 404, 429]


@pytest.mark.asyncio
async def test_a_once_only_link_serves_one_of_many_clients_at_once(tmp_path: Path, redis: RedisServer) -> None:
    apps = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        apps.append(app_of(tmp_path / name, redis.url, LIMITS["all"]))
    async with (
        served(apps[0]) as port,
        served(apps[1]) as other,
    ):
        once = link()
        requests = [status_of((port, other)[number % 2], once, f"127.0.1.{number + 1}") for number in range(24)]
        statuses = await asyncio.gather(*requests)
    assert (statuses.count(200), statuses.count(410)) == (1, 23)


@pytest.mark.asyncio
async def test_a_link_that_is_used_up_costs_no_quota(tmp_path: Path, redis: RedisServer) -> None:
    app = app_of(tmp_path, redis.url, 'quota = ["1 downloads/day"]\n')
    async with served(app) as port:
        once, client = link(), "127.0.5.1"
        assert await status_of(port, once, "127.0.5.2") == 200
        statuses = [await status_of(port, url, client) for url in (once, once, link(), link())]
    assert statuses == [410, 410, 200, 429]


@pytest.mark.asyncio
async def test_while_redis_is_gone_links_are_refused_and_then_work_again(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        app = app_of(tmp_path, server.url, LIMITS["all"])
        async with served(app) as port:
            once = link()
            server.stop()
            assert (await ask(port, once)).status == 503
            assert (await ask(port, link(None))).status == 503
            server.start()  # with nothing in it
            async with asyncio.timeout(20):
                while (await ask(port, link())).status != 200:
                    await asyncio.sleep(0.1)
            assert (await ask(port, once)).status == 503


async def call(url: str, *command: Any) -> Any:
    """Send Redis a command, as an operator does."""
    from redis import asyncio as client

    async with client.Redis.from_url(url) as redis:
        return await redis.execute_command(*command)


@pytest.mark.asyncio
@pytest.mark.parametrize("limits", ["all", "none"])
async def test_a_store_that_is_flushed_lets_no_used_and_no_revoked_link_in(
    tmp_path: Path, limits: str, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(tmp_path) as server:
        app = app_of(tmp_path, server.url, LIMITS.get(limits, ""))
        store = dv.RedisGrantStore(server.url)
        async with served(app) as port:
            used, revoked = link(), link(None)
            assert await status_of(port, used, "127.0.6.1") == 200
            await store.revoke(id_of(revoked), None)
            assert await status_of(port, revoked, "127.0.6.1") == 403
            await call(server.url, "FLUSHALL")
            assert [await status_of(port, one, "127.0.6.2") for one in (used, revoked)] == [503, 503]
            assert [await status_of(port, link(uses), "127.0.6.2") for uses in (1, None)] == [200, 200]
            assert "has lost its data" in caplog.text
        async with served(app_of(tmp_path, server.url, "")) as port:
            assert await status_of(port, used, "127.0.6.3") == 503  # nor does one that was started after that
            await call(server.url, "SET", "downloadview:1:began", "0")
            assert await status_of(port, used, "127.0.6.3") == 200  # the operator has accepted the loss
        await store.aclose()


def settings_of(directory: Path, url: str, prefix: str) -> Any:
    (directory / "downloadview.toml").write_text(
        f'[shared]\nprefix = "{prefix}"\n[digests]\nstore = "{url}"\n[archives]\nchecksums = "{url}"\n'
        f'[links]\nkeys = "links.keys"\nstore = "{url}"\n[limits]\nstore = "{url}"\nrequests = "2/hour"\n'
        '[sources.files]\ntype = "path"\nroot = "files"\ndigests = "background"\n'
        '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\naccess = ["signed"]\narchive = true\n'
    )
    return build(load_settings(directory / "downloadview.toml", environ={}))


@pytest.mark.asyncio
async def test_services_with_different_prefixes_do_not_see_each_other(tmp_path: Path, redis: RedisServer) -> None:
    app_of(tmp_path, redis.url, "")
    once = None
    for prefix in ("one", "two"):
        app = settings_of(tmp_path, redis.url, prefix)
        async with served(app) as port:
            once = once or link()
            statuses = [await status_of(port, one, "127.0.7.1") for one in (once, link(), link())]
            # the other one has none of its uses, so it refuses the link that was made before it has begun
            assert statuses == ([200, 200, 429] if prefix == "one" else [503, 200, 429])


def facts_url(kind: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(kind) if kind == "postgres" else request.getfixturevalue(kind).url)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["redis", pytest.param("postgres", marks=pytest.mark.slow)])
async def test_digests_and_checksums_are_shared(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    url = facts_url(kind, request)
    version = dv.FileMetadata(size=5, etag=dv.ETag("1"))
    others = [replace(version, size=6), replace(version, etag=dv.ETag("2"))]
    stores = [dv.SharedFacts(url, prefix=prefix) for prefix in ("a", "a", "b")]
    one, two, three = (dv.SharedDigests(facts) for facts in stores)
    known = (("sha-256", b"d" * 32),)
    assert await one.get("files", "é\udcff", version) == ()
    await one.put("files", "é\udcff", version, known)
    assert await two.get("files", "é\udcff", version) == known
    assert [await two.get("files", "é\udcff", other) for other in others] == [(), ()]
    assert (await two.get("other", "é\udcff", version), await three.get("files", "é\udcff", version)) == ((), ())
    sums = {bytes([number % 256, number // 256]): number for number in range(1200)}
    await dv.SharedChecksums(stores[0]).put(sums)
    assert await dv.SharedChecksums(stores[1]).get([*sums, b"none"]) == sums
    assert await dv.SharedChecksums(stores[2]).get([*sums]) == {}
    for facts in stores:
        await facts.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("text", ["", "no JSON", "[]", "7", '["sha-256"]', '{"sha-256": "é"}', '{"sha-256": 7}'])
async def test_a_value_that_something_else_has_written_is_no_fact(redis: RedisServer, text: str) -> None:
    facts = dv.SharedFacts(redis.url, prefix="foreign")
    digests, sums = dv.SharedDigests(facts), dv.SharedChecksums(facts)
    version = dv.FileMetadata(size=5, etag=dv.ETag("1"))
    await digests.put("files", "a", version, (("sha-256", b"d" * 32),))
    await sums.put({b"1": 1, b"2": 2})
    for key in await call(redis.url, "KEYS", "foreign:*"):
        if not key.endswith(b"crc32:" + b"2".hex().encode()):
            await call(redis.url, "SET", key, text)
    assert await digests.get("files", "a", version) == ()
    assert await sums.get([b"1", b"2"]) == ({b"2": 2} if text != "7" else {b"1": 7, b"2": 2})
    await facts.aclose()


@pytest.mark.asyncio
@pytest.mark.slow
async def test_statements_of_postgresql_never_wait_for_each_other(postgres: str) -> None:
    import asyncpg  # type: ignore[import-untyped]

    facts = dv.SharedFacts(postgres, prefix="locks")
    for number in (9, 5, 1):  # so that the rows are not in the order of their keys
        await facts.put("crc32", {bytes([number]): "1"})
    keys = [bytes([number]) for number in (9, 5, 1)]
    first, last = ("locks:facts:1:crc32:01", "locks:facts:1:crc32:09")
    url = postgres.replace("+asyncpg", "")
    holder, other = await asyncpg.connect(url), await asyncpg.connect(url)
    lock = "SELECT key FROM downloadview_facts WHERE key = $1 FOR UPDATE NOWAIT"
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"

    async def is_waiting() -> None:
        async with asyncio.timeout(4):
            while not await other.fetchval(waiting):
                await asyncio.sleep(0.01)

    for call_ in (lambda: facts.get("crc32", keys), lambda: facts.put("crc32", dict.fromkeys(keys, "2"))):
        async with holder.transaction():
            await holder.fetch(lock, first)
            task = asyncio.create_task(call_())
            await is_waiting()
            async with other.transaction():
                assert len(await other.fetch(lock, last)) == 1  # nobody who waits for the first has the last
        await task
    await holder.execute("UPDATE downloadview_facts SET until = 0")
    async with holder.transaction():
        await holder.fetch(lock, first)
        await facts.put("crc32", {b"other": "3"})  # which removes what has expired, and waits for nobody
    rows = await other.fetch("SELECT key FROM downloadview_facts WHERE starts_with(key, 'locks')")
    assert [row[0] for row in rows if row[0] != first] == ["locks:facts:1:crc32:" + b"other".hex()]
    plan = await other.fetch(
        "SELECT indexdef FROM pg_indexes WHERE tablename = 'downloadview_facts' AND indexdef LIKE '%(until)'"
    )
    assert len(plan) == 1
    await holder.close()
    await other.close()
    await facts.aclose()


@pytest.mark.asyncio
async def test_keys_expire_and_name_their_version(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        app = app_of(tmp_path, server.url, LIMITS["all"])
        facts = dv.SharedFacts(server.url)
        await dv.SharedChecksums(facts).put({b"1": 1})
        await facts.aclose()
        async with served(app) as port:
            assert (await ask(port, link())).status == 200
        keys = {key: int(await call(server.url, "TTL", key)) for key in await call(server.url, "KEYS", "*")}
        assert all(re.match(rb"downloadview:((limits|facts):)?\d+:", key) for key in keys)
        assert {key for key, seconds in keys.items() if seconds < 0} == {b"downloadview:1:began"}


@pytest.mark.asyncio
async def test_a_store_that_fails_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = dv.SharedFacts("redis://127.0.0.1:1/0")
    sums = dv.SharedChecksums(facts)
    await sums.put({b"1": 1})
    assert await sums.get([b"1"]) == {}
    assert caplog.text.count("the store of CRC-32s has failed") == 1
    await facts.aclose()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[digests]\nstore = "redis:"\n', "digests.store"),
        ('[digests]\nstore = "mysql://h/n"\n', "digests.store: there is no such store"),
        ('[archives]\nchecksums = "postgresql://h/n"\n', "archives.checksums: there is no such store"),
        ('[shared]\nprefix = "a b"\n', "shared.prefix"),
        ('[shared]\nurl = "redis://h"\n', "shared.url"),
    ],
)
def test_wrong_settings(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "files").mkdir()
    source = '[sources.files]\ntype = "path"\nroot = "files"\ndigests = "known"\nsidecars = true\n'
    route = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\narchive = true\n'
    assert problem in refusal(tmp_path, text + source + route)


@pytest.mark.asyncio
async def test_redis_that_may_evict_keys_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with redis_server(tmp_path) as server:
        await call(server.url, "CONFIG", "SET", "maxmemory", "100mb")
        await call(server.url, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        async with served(app_of(tmp_path, server.url, "")):
            assert "set it to noeviction" in caplog.text
