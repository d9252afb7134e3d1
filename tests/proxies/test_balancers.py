"""Three replicas, each with its own cache, behind the printed configurations of nginx, HAProxy and Envoy."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.offload.balancers import haproxy as haproxy_module
from downloadview_async.service.app import build
from downloadview_async.service.proxy_config import balancer_config_for, config_for
from downloadview_async.service.settings import Settings
from tests.live import ask, listening, live
from tests.proxies.conftest import PRIVATE_PAGES
from tests.proxies.servers import KINDS, _system_program, readable_directory, running
from tests.servers import free_port
from tests.service.loading import load
from tests.service.pods import TOOLS
from tests.sources.test_cached import Origin

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]
LOCAL = '[sources.files]\ntype = "path"\nroot = "."\n[[routes]]\npath = "/local/{path:path}"\nsource = "files"\n'
BEHIND_NGINX = f'{LOCAL}[offload]\nbackend = "nginx"\n'
BALANCERS = ["nginx", "haproxy", "envoy"]
HAPROXY_REMEDY = "HAProxy: haproxy is not installed; apt-get install haproxy"
ENVOY_REMEDY = "Envoy: its program is not installed; make deploy-tools"
NAMES = [f"{number}.bin" for number in range(12)]


def command_of(balancer: str, config: Path) -> list[str]:
    if balancer == "nginx":
        return KINDS["nginx"].command(config.parent, config)
    if balancer == "haproxy":
        return [_system_program("haproxy", HAPROXY_REMEDY), "-f", str(config)]
    program = TOOLS / "envoy" / "_bin" / "envoy"
    if not program.exists():
        pytest.skip(ENVOY_REMEDY)
    return [str(program), "-c", str(config), "--concurrency", "1", "--disable-hot-restart"]


@asynccontextmanager
async def balanced(
    balancer: str,
    services: list[int],
    settings: Settings,
    *,
    bound: int | None = None,
    edit: Callable[[str], str] = str,
) -> AsyncIterator[int]:
    """Run a balancer with the printed configuration, and give its port."""
    port = free_port()
    addresses, listen = [f"127.0.0.1:{service}" for service in services], f"127.0.0.1:{port}"
    if balancer == "nginx":
        text = config_for(settings, "nginx", listen=listen, service=addresses, relative_to=None)
    else:
        text = balancer_config_for(settings, balancer, listen=listen, services=addresses, bound=bound)
    with readable_directory() as directory:
        config = directory / f"{balancer}.yaml"  # Envoy goes by the suffix
        config.write_text(edit(text.replace("/tmp/downloadview-nginx", f"{directory}/nginx")))
        server = running(command_of(balancer, config), port, directory=directory, log=directory / "log")
        await asyncio.to_thread(server.__enter__)  # Envoy listens once the replicas have answered its probes
        try:
            yield port
        finally:
            await asyncio.to_thread(server.__exit__, None, None, None)


@asynccontextmanager
async def answering(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Do what `listening` does, and close all connections at the end: those of replicas and of probes stay open."""
    writers: list[asyncio.StreamWriter] = []

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await serve(reader, writer)

    async with listening(counted) as port:
        yield port
        for writer in writers:
            writer.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)


@dataclass
class Fleet:
    """Replicas in front of one origin. caches: those of the replicas. settings: of the first replica."""

    origin: Origin
    ports: list[int]
    caches: list[Path]
    settings: Settings

    @property
    def fills(self) -> Counter[str]:
        """How often the origin was asked for each file."""
        return Counter(head.split()[1] for head in self.origin.requests)


@asynccontextmanager
async def fleet(directory: Path, balancer: str) -> AsyncIterator[Fleet]:
    origin = Origin()
    origin.content = origin.content[:200_000]
    async with AsyncExitStack() as stack:
        origin_port = await stack.enter_async_context(answering(origin.serve))
        ports, caches, settings = [], [], None
        for number in range(3):
            place = directory / f"replica{number}"
            place.mkdir()
            text = (
                f'[sources.mirror]\ntype = "remote"\nurl = "http://127.0.0.1:{origin_port}/"\n'
                'allow_hosts = ["127.0.0.1"]\n[sources.mirror.cache]\npath = "cache"\n'
                '[[routes]]\npath = "/files/{path:path}"\nsource = "mirror"\n'
            )
            loaded = load(place, text)
            ports.append(await stack.enter_async_context(live(build(loaded), lifespan="on")))
            caches.append(place / "cache")
            settings = settings or load(place, text + ('[offload]\nbackend = "nginx"\n' * (balancer == "nginx")))
        assert settings is not None
        yield Fleet(origin, ports, caches, settings)
        origin.gate.set()


async def download(port: int, name: str, content: bytes) -> None:
    """Download a file in the ways of clients: at once by several, by links with other queries, and in parts."""
    headers: list[dict[str, str]] = [{}, {}, {"Range": "bytes=0-99"}, {"Range": "bytes=100000-"}]
    asked = [ask(port, f"/files/{name}?k={index}&s=x", headers=fields) for index, fields in enumerate(headers)]
    whole, other, first, rest = await asyncio.gather(*asked)
    assert whole.body == other.body == content
    assert (first.status, first.body, rest.body) == (206, content[:100], content[100_000:])


@pytest.mark.parametrize("balancer", BALANCERS)
async def test_a_cold_file_is_fetched_once_for_all_replicas(tmp_path: Path, balancer: str) -> None:
    async with fleet(tmp_path, balancer) as site, balanced(balancer, site.ports, site.settings, bound=0) as port:
        for name in NAMES * 2:
            await download(port, name, site.origin.content)
        assert site.fills == {f"/{name}": 1 for name in NAMES}
        assert sum(any(cache.glob("*-*")) for cache in site.caches) >= 2


@pytest.mark.parametrize("balancer", ["haproxy", "envoy"])
async def test_so_it_is_with_the_default_bound_where_the_load_is_low(tmp_path: Path, balancer: str) -> None:
    async with fleet(tmp_path, balancer) as site, balanced(balancer, site.ports, site.settings) as port:
        for name in NAMES[:6]:
            if balancer == "haproxy":
                await download(port, name, site.origin.content)
            else:  # which knows no number of requests that a replica takes in any case
                for index in range(3):
                    assert (await ask(port, f"/files/{name}?k={index}")).body == site.origin.content
        assert site.fills == {f"/{name}": 1 for name in NAMES[:6]}


async def test_without_hashing_each_replica_fetches_it_at_most_once(tmp_path: Path) -> None:
    def edit(text: str) -> str:
        return text.replace("balance uri path-only", "balance roundrobin").replace("hash-type", "#")

    async with fleet(tmp_path, "haproxy") as site:
        async with balanced("haproxy", site.ports, site.settings, bound=0, edit=edit) as port:
            for name in NAMES * 2:
                await download(port, name, site.origin.content)
        assert all(1 < count <= 3 for count in site.fills.values())


@pytest.mark.parametrize("balancer", ["haproxy", "envoy"])
async def test_a_file_that_all_want_is_sent_by_several_replicas(
    tmp_path: Path, balancer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy_module, "SHARE", 1)
    async with fleet(tmp_path, balancer) as site:
        site.origin.held_from = 10
        async with balanced(balancer, site.ports, site.settings, bound=101) as port:
            clients = []
            for _ in range(24):  # one after the other: what has only been accepted is not in progress yet
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                clients.append((reader, writer))
                writer.write(b"GET /files/a.bin HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
                await reader.readuntil(b"\r\n\r\n")
            site.origin.gate.set()
            for reader, writer in clients:
                assert await reader.read() == site.origin.content
                writer.close()
        assert site.fills == {"/a.bin": 3}


@pytest.mark.parametrize("balancer", BALANCERS)
async def test_only_what_may_be_repeated_is_sent_to_another_replica(tmp_path: Path, balancer: str) -> None:
    """One replica does not listen, and another one ends each connection without an answer, but to probes."""
    methods: list[str] = []

    async def ending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b" /-/" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            methods.append(head.split()[0].decode())
        writer.close()

    async with fleet(tmp_path, balancer) as site, answering(ending) as bad:
        services = [free_port(), bad, site.ports[0]]
        async with balanced(balancer, services, site.settings) as port:
            for name in NAMES:
                assert (await ask(port, f"/files/{name}")).body == site.origin.content
                assert (await ask(port, f"/files/{name}", method="HEAD")).status == 200
                if "GET" in methods:
                    methods.clear()
                    break
            else:
                pytest.fail("no file belongs to the replica that fails")
            for name in NAMES:
                before = len(methods)
                answer = await ask(port, f"/files/{name}", method="POST")
                assert len(methods) - before in (0, 1)
                if len(methods) > before:  # it was not repeated
                    assert answer.status in (502, 503)
                    break
                assert answer.status == 405


@pytest.mark.parametrize("balancer", BALANCERS)
async def test_every_file_is_had_while_one_of_two_replicas_fails(tmp_path: Path, balancer: str) -> None:
    """The hash of each file names a first replica and, if that one fails, others: maybe the same one a few times."""
    asked = 0

    async def ending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        head = await reader.readuntil(b"\r\n\r\n")
        if b" /-/" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            asked += 1
        writer.close()

    async with fleet(tmp_path, balancer) as site, answering(ending) as bad:
        async with balanced(balancer, [bad, site.ports[0]], site.settings) as port:
            statuses = Counter([(await ask(port, f"/files/{name}", method="HEAD")).status for name in range(300)])
        assert statuses == {200: 300}
        assert asked  # HAProxy and nginx leave the replica alone after a while


@pytest.mark.parametrize("root_path", ["", "/dl.x"])
@pytest.mark.parametrize("balancer", ["haproxy", "envoy"])
async def test_what_no_client_may_do(tmp_path: Path, balancer: str, root_path: str) -> None:
    received: list[dict[bytes, bytes]] = []
    paths: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/-/readyz"):
            received.append(dict(scope["headers"]))
            paths.append(scope["raw_path"])
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"secret"})

    text = f'[server]\nroot_path = "{root_path}"\n[users]\nheader = "X-Remote-User"\n'
    settings = load(tmp_path, text)
    spoofed = ["X-Accel-Mapping", "X-Accel-Redirect", "X-Sendfile", "X-Sendfile-Type", "X-Remote-User", "Forwarded"]
    headers = dict.fromkeys([*spoofed, "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"], "evil")
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(live(app, lifespan="off")) for _ in range(2)]
        async with balanced(balancer, services, settings) as port:
            path = "/files/a%20b%2f%C3%A9.txt?k=1"
            assert (await ask(port, root_path + path, headers=headers)).status == 200
            got = received[-1]
            assert paths[-1] == path.partition("?")[0].encode()
            assert not {name.lower().encode() for name in spoofed} & got.keys()
            assert got[b"x-forwarded-for"] == b"127.0.0.1"
            assert got[b"x-forwarded-proto"] == b"http"
            assert got[b"x-forwarded-host"] == got[b"host"]
            assert (await ask(port, f"{root_path}/-/livez")).body == b"secret"
            assert paths[-1] == b"/-/livez"
            hidden = [page for page in ["/-/purge", *PRIVATE_PAGES] if re.match("/(-|%2[dD])(/|%2[fF])", page)]
            answers = await asyncio.gather(*[ask(port, root_path + page) for page in hidden])
            assert {answer.status for answer in answers} <= {400, 404}
            if root_path:
                assert (await ask(port, path)).status == 404


@pytest.mark.parametrize(
    "options, message",
    [
        ({"balancer": "nginx"}, "there is no balancer 'nginx': use one of haproxy, envoy"),
        ({"services": []}, "the services are none"),
        ({"services": ["a:1", "a:1"]}, "the services are a:1, a:1: give each address once"),
        ({"services": ["a:1", "b"]}, "service: 'b' is not an address"),
        ({"bound": 100}, "the bound is 100 %: give more than 100"),
        ({"listen": "8080"}, "listen: '8080' is not an address"),
        ({"balancer": "envoy", "services": ["unix:/run/a.sock", "a:1"]}, "Envoy resolves either no address or all"),
    ],
)
async def test_refusals(options: dict[str, Any], message: str) -> None:
    given = {"balancer": "haproxy", "services": ["127.0.0.1:8000"]} | options
    with pytest.raises(dv.ConfigurationError, match=re.escape(message)):
        dv.balancer_config(given.pop("balancer"), given.pop("services"), **given)


async def test_other_proxies_take_one_service() -> None:
    with pytest.raises(dv.ConfigurationError, match="Caddy cannot choose a replica by the path alone"):
        dv.proxy_config("caddy", [], service=["127.0.0.1:8000", "127.0.0.1:8001"])


@pytest.mark.parametrize("balancer, setting", [("nginx", "proxy_read_timeout"), ("haproxy", "timeout server")])
async def test_a_replica_that_hangs_is_left_for_another_one(tmp_path: Path, balancer: str, setting: str) -> None:
    hung: list[bytes] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/-/" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            hung.append(head)
            await reader.read()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"right"})

    def edit(text: str) -> str:  # 11 seconds: nginx may not have a limit for all tries that is shorter than this
        assert f"{setting} 300s" in text
        return text.replace(f"{setting} 300s", f"{setting} {11 if balancer == 'nginx' else 1}s")

    settings = load(tmp_path, BEHIND_NGINX if balancer == "nginx" else "")
    async with AsyncExitStack() as stack:
        hanging = await stack.enter_async_context(answering(hang))
        services = [hanging, await stack.enter_async_context(live(app, lifespan="off"))]
        port = await stack.enter_async_context(balanced(balancer, services, settings, edit=edit))
        answers = await asyncio.gather(*[ask(port, f"/files/{name}") for name in NAMES])
        assert {(answer.status, answer.body) for answer in answers} == {(200, b"right")}
    assert hung


async def test_haproxy_probes_the_proxies_in_front_of_the_replicas(tmp_path: Path) -> None:
    probes: list[bytes] = []
    probed = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/-/livez":
            probes.append(dict(scope["headers"])[b"host"])
            if len(probes) > 4:
                probed.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"right"})

    def edit(text: str) -> str:
        assert "/-/livez" in text
        return text.replace("default-server ", "default-server inter 100ms ")

    settings = load(tmp_path, BEHIND_NGINX)
    async with AsyncExitStack() as stack:
        proxies = []
        for _ in range(2):
            service = await stack.enter_async_context(live(app, lifespan="off", http=DownloadProtocol))
            proxies.append(await stack.enter_async_context(balanced("nginx", [service], settings)))
        port = await stack.enter_async_context(balanced("haproxy", proxies, settings, edit=edit))
        await asyncio.wait_for(probed.wait(), 30)
        assert {(await ask(port, f"/files/{name}")).body for name in NAMES} == {b"right"}
