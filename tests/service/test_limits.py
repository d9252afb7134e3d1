"""Limits in the service: the settings, their mistakes, and what several processes count together in Redis."""

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import downloadview_async as dv
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from tests.asgi.test_limited import line_of
from tests.live import Answer, ask, live, make_old
from tests.redis_server import RedisServer, redis_server
from tests.servers import Server, free_port, serving

COMMAND = [sys.executable, "-m", "downloadview_async.cli", "serve"]
BEGIN = '[sources.files]\ntype = "path"\nroot = "files"\n'
ROUTE = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'
SETTINGS = f"""
[limits]
client = "address"
concurrent = 8
rate = "20MB/s"
requests = "600/minute"
quota = ["50GB/day", "1000 downloads/day"]
total_rate = "1GB/s"
store = "memory"
when_store_fails = "allow"
mode = "queue"
queue_timeout = 5
{BEGIN}threads = 8
max_requests = 100
queue_timeout = 1.5
{ROUTE}limits = {{ rate = "5MB/s", requests = "2/minute" }}
[[routes]]
path = "/free/{{path:path}}"
source = "files"
"""
SIZE = 100_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_bytes(bytes(SIZE))
    (tmp_path / "files" / "big.bin").write_bytes(bytes(16 << 20))
    (tmp_path / "hooks.py").write_text("def plan(request):\n    return request.headers.get('x-plan')\n")
    make_old(tmp_path / "files")
    return tmp_path


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def app_of(directory: Path, text: str) -> Any:
    (directory / "downloadview.toml").write_text(text)
    return build(load_settings(directory / "downloadview.toml", environ={}))


@pytest.mark.asyncio
async def test_a_route_has_its_own_limits_beside_the_common_ones(directory: Path) -> None:
    app = app_of(directory, SETTINGS)
    routes: list[Any] = [route for route in app.routes if "{" in route.path]
    limits = {route.path: route.endpoint.limits for route in routes}
    common, own, source = limits["/files/{path:path}"]
    assert limits["/free/{path:path}"] == (common, source)
    assert (common.rate, own.rate) == (20_000_000, 5_000_000)
    async with live(app) as port:
        paths = ["/files/a.bin", "/files/a.bin", "/files/a.bin", "/free/a.bin"]
        assert [(await ask(port, path)).status for path in paths] == [200, 200, 429, 200]


@pytest.mark.asyncio
@pytest.mark.parametrize("client", ["hook:hooks:plan", "user", "link"])
async def test_clients(directory: Path, client: str) -> None:
    app = app_of(directory, f'[limits]\nclient = "{client}"\nrequests = "1/minute"\n{BEGIN}{ROUTE}')
    async with live(app) as port:
        headers = [{"X-Plan": "a"}, {"X-Plan": "b"}, {"X-Plan": "a"}, {}, {}]
        statuses = [(await ask(port, "/files/a.bin", headers=one)).status for one in headers]
    assert statuses == ([200, 200, 429, 200, 429] if client.startswith("hook") else [200, 429, 429, 429, 429])


def limits_with(line: str) -> str:
    return f"[limits]\n{line}\n{BEGIN}{ROUTE}"


MISTAKES = [
    (limits_with('rate = "20mb/s"'), "limits.rate: '20mb/s' is not a rate: give bytes per second, such as 20MB/s"),
    (limits_with('rate = "20KB/s"'), "limits.rate: '20KB/s' is not a rate: did you mean kB?"),
    (limits_with('requests = "600"'), "limits.requests: '600' is not a number of requests: give such as 600/minute"),
    (limits_with('quota = ["50GB/dya"]'), "limits.quota: '50GB/dya' has an unknown period: did you mean day?"),
    (limits_with('quota = ["1GB/day", "2GB/day"]'), "limits.quota: quota has two amounts of the same unit and period"),
    (limits_with('quota = "50GB/day"'), "limits.quota: expected array, got str: give a list of amounts"),
    (limits_with("concurrent = 0"), "limits.concurrent: expected int >= 1: give transfers of a client at once"),
    (limits_with("concurent = 1"), "limits.concurent: unknown key: did you mean 'concurrent'?"),
    (limits_with('mode = "queue"'), "limits.mode: requests wait for `concurrent`: set it, or remove mode"),
    (limits_with('client = "header:"'), "limits.client: the text has the wrong form: give what counts as one client"),
    (limits_with('store = "sqlite:x.db"'), "limits.store: the text has the wrong form: give where clients are counted"),
    (limits_with('total_rate = "1"'), "limits.total_rate: '1' is not a rate"),
    (f'{BEGIN}{ROUTE}limits = {{ rate = "1MB" }}\n', "routes[0].limits.rate: '1MB' is not a rate"),
    (f'{BEGIN}{ROUTE}limits = {{ store = "memory" }}\n', "routes[0].limits.store: unknown key"),
    (f"{BEGIN}max_requests = 0\n{ROUTE}", "sources.files.max_requests: expected int >= 1: give requests that may use"),
]


@pytest.mark.parametrize("text, problem", MISTAKES)
def test_mistakes(directory: Path, text: str, problem: str) -> None:
    with pytest.raises(dv.ConfigurationError) as raised:
        app_of(directory, text)
    assert problem in str(raised.value)


def test_a_hook_that_is_missing(directory: Path) -> None:
    with pytest.raises(dv.ConfigurationError, match=r"limits\.client: 'hooks:none' cannot be imported"):
        app_of(directory, limits_with('client = "hook:hooks:none"'))


@pytest.mark.asyncio
@pytest.mark.parametrize("backend, warns", [("caddy", True), ("nginx", False)])
async def test_a_proxy_that_cannot_limit_the_rate_is_named_at_the_start(
    directory: Path, backend: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of(directory, limits_with('rate = "1MB/s"') + f'[offload]\nbackend = "{backend}"\n')
    with caplog.at_level(logging.WARNING):
        async with app.router.lifespan_context(app):
            pass
    assert ("Caddy cannot limit the rate" in caplog.text) == warns


@pytest.mark.asyncio
async def test_a_directory_of_logs_of_s3_does_not_tell_the_end_of_what_a_proxy_sends(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "s3").mkdir()
    accounts = '[accounts]\ndatabase = "sqlite+aiosqlite:///accounts.db"\nproxy_log = "s3"\n'
    app = app_of(directory, limits_with("concurrent = 1") + f'[offload]\nbackend = "nginx"\n{accounts}')
    with caplog.at_level(logging.WARNING):
        async with app.router.lifespan_context(app), live(app) as port:
            answers = [await ask(port, "/files/big.bin") for _ in range(2)]
    assert [(one.status, "x-accel-redirect" in one.headers) for one in answers] == [(200, True)] * 2
    assert "ends when it is handed over" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("has_log", [True, False])
async def test_a_transfer_of_a_proxy_ends_with_its_line_if_the_service_knows_the_log(
    directory: Path, has_log: bool, caplog: pytest.LogCaptureFixture
) -> None:
    log = directory / "downloads.log"
    log.touch()
    text = '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'
    text += '[accounts]\ndatabase = "sqlite+aiosqlite:///accounts.db"\n' + 'proxy_log = "downloads.log"\n' * has_log
    with caplog.at_level(logging.WARNING):
        app = app_of(directory, limits_with("concurrent = 1") + text)
        async with app.router.lifespan_context(app), live(app) as port:
            first = await ask(port, "/files/big.bin")
            assert first.headers["x-accel-redirect"] == "/_files/big.bin"
            assert (await ask(port, "/files/big.bin")).status == (429 if has_log else 200)
            log.write_text(line_of(first.headers["x-request-id"], 1000))
            with anyio.fail_after(20):
                while (await ask(port, "/files/big.bin")).status != 200:
                    await asyncio.sleep(0.05)
    warning = "one that nginx sends ends when it is handed over; with accounts.proxy_log"
    assert (warning in caplog.text) != has_log


@pytest.mark.asyncio
async def test_a_store_that_does_not_answer(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = limits_with('requests = "1/minute"\nstore = "redis://:secret@127.0.0.1:1/0"')
    app = app_of(directory, text)
    with caplog.at_level(logging.WARNING):
        async with app.router.lifespan_context(app), live(app) as port:
            assert [(await ask(port, "/files/a.bin")).status for _ in range(3)] == [200] * 3
    assert "limits.store: the store cannot be used" in caplog.text
    assert "nothing is limited until it works again" in caplog.text
    assert "secret" not in caplog.text
    app = app_of(directory, text.replace("store =", 'when_store_fails = "refuse"\nstore ='))
    with pytest.raises(dv.ConfigurationError, match=r"limits\.store: the store cannot be used"):
        async with app.router.lifespan_context(app):
            pass


@pytest.mark.slow
def test_each_warning_of_the_start_is_one_line(directory: Path) -> None:
    text = limits_with('rate = "1MB/s"\nstore = "redis://127.0.0.1:1/0"') + '[offload]\nbackend = "caddy"\n'
    (directory / "downloadview.toml").write_text(text)
    port = free_port()
    command = [*COMMAND, "--config", str(directory / "downloadview.toml"), "--port", str(port)]
    with serving(command, port, log=directory / "log") as server:
        server.wait_for_log("startup complete")
        assert server.log.count("limits.store: the store cannot be used") == 1
        assert server.log.count("Caddy cannot limit the rate") == 1


@contextlib.contextmanager
def processes(directory: Path, redis: RedisServer, limits: str, *, number: int = 3) -> Iterator[list[Server]]:
    """Run processes of the service, each by itself, which count together."""
    text = f'[server]\naccess_log = false\n[limits]\nstore = "{redis.url}"\n{limits}\n{BEGIN}{ROUTE}'
    (directory / "downloadview.toml").write_text(text)
    with contextlib.ExitStack() as stack:
        servers = []
        for one in range(number):
            port = free_port()
            command = [*COMMAND, "--config", str(directory / "downloadview.toml"), "--port", str(port)]
            servers.append(stack.enter_context(serving(command, port, log=directory / f"log{one}")))
        yield servers


async def answered(port: int, path: str, headers: dict[str, str] | None = None) -> Answer:
    """Ask until the answer is not 503, which says that Redis was late: other tests may use all of the machine."""
    with anyio.fail_after(60):
        while (answer := await ask(port, path, headers=headers)).status == 503:
            await asyncio.sleep(0.1)
    return answer


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("quota, most", [("1.05MB/day", 11), ("7 downloads/day", 7)])
async def test_three_processes_keep_a_quota_for_200_clients_at_once(
    directory: Path, redis: RedisServer, quota: str, most: int
) -> None:
    await forget_all(redis)
    with processes(directory, redis, f'when_store_fails = "refuse"\nquota = ["{quota}"]') as servers:
        ports = [int(server.address) for server in servers]
        answers = await asyncio.gather(*[answered(ports[number % 3], "/files/a.bin") for number in range(200)])
        assert Counter(answer.status for answer in answers) == {200: most, 429: 200 - most}
        refused = await answered(ports[0], "/files/a.bin")
        assert refused.body == f"Too Many Requests: at most {quota.replace('/', ' per ')}".encode()


@pytest.mark.slow
@pytest.mark.asyncio
async def test_three_processes_keep_a_quota_of_downloads_in_pieces(directory: Path, redis: RedisServer) -> None:
    await forget_all(redis)
    with processes(directory, redis, 'when_store_fails = "refuse"\nquota = ["3 downloads/day"]') as servers:
        ports = [int(server.address) for server in servers]

        async def piece(number: int) -> int:
            headers = {"Range": f"bytes={number * SIZE // 16}-{(number + 1) * SIZE // 16 - 1}"}
            return (await answered(ports[number % 3], "/files/a.bin", headers)).status

        for _ in range(3):
            assert Counter(await asyncio.gather(*map(piece, range(16)))) == {206: 16}
        statuses = Counter(await asyncio.gather(*map(piece, range(16))))
        assert statuses == {206: 15, 429: 1}  # without a last piece, it is not a download


@contextlib.asynccontextmanager
async def begun(port: int) -> AsyncIterator[tuple[int, asyncio.StreamWriter]]:
    """Begin a download that the client does not take, and give its status, as `answered` does."""
    status = 503
    with anyio.fail_after(60):
        while status == 503:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 14)
            writer.write(b"GET /files/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            if (status := int((await reader.readuntil(b"\r\n")).split()[1])) == 503:
                writer.close()
                await asyncio.sleep(0.1)
    try:
        yield status, writer
    finally:
        writer.transport.abort()


@pytest.mark.slow
@pytest.mark.asyncio
async def test_three_processes_keep_the_number_of_transfers(directory: Path, redis: RedisServer) -> None:
    await forget_all(redis)
    with processes(directory, redis, 'when_store_fails = "refuse"\nconcurrent = 5') as servers:
        ports = [int(server.address) for server in servers]
        async with contextlib.AsyncExitStack() as stack:
            entered = await asyncio.gather(
                *[stack.enter_async_context(begun(ports[number % 3])) for number in range(200)]
            )
            assert Counter(status for status, _ in entered) == {200: 5, 429: 195}
        with anyio.fail_after(20):  # all have left
            while (await ask(ports[0], "/files/a.bin")).status != 200:
                await asyncio.sleep(0.02)
        async with begun(ports[1]) as (status, _):
            assert status == 200
            assert servers[1].stop(9) == -9
        assert (await answered(ports[2], "/files/a.bin")).status == 200  # 4 others are free


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_redis_that_ends_and_comes_back(directory: Path, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    with processes(directory, server, 'requests = "3/minute"', number=1) as (service,):
        port = int(service.address)
        assert [(await ask(port, "/files/a.bin")).status for _ in range(4)] == [200, 200, 200, 429]
        server.stop()
        began = time.monotonic()
        assert [(await ask(port, "/files/a.bin")).status for _ in range(40)] == [200] * 40
        assert time.monotonic() - began < 5
        service.wait_for_log("the store of limits has failed")
        server.start()
        with anyio.fail_after(20):
            while (await ask(port, "/files/a.bin")).status != 429:
                await asyncio.sleep(0.05)
    server.stop()


async def forget_all(redis: RedisServer) -> None:
    from redis import asyncio as library

    client = library.Redis.from_url(redis.url)
    await client.flushall()
    await client.aclose()


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_header_of_a_trusted_proxy(directory: Path) -> None:
    text = f'[limits]\nclient = "header:X-Tenant"\nrequests = "1/minute"\n{BEGIN}{ROUTE}'
    (directory / "downloadview.toml").write_text(text)
    port = free_port()
    command = [*COMMAND, "--config", str(directory / "downloadview.toml"), "--port", str(port)]
    with serving(command, port, log=directory / "log"):
        for tenant, status in (("a", 200), ("a", 429), ("b", 200)):
            assert (await ask(port, "/files/a.bin", headers={"X-Tenant": tenant})).status == status
