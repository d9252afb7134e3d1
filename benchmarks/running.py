"""One server of the comparison: how it is described, started, and killed at the end."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from benchmarks.load import HOST, LoadError, pinned
from downloadview_async import MemoryGrantStore, URLSigner

_PATIENCE = 30.0  # seconds for a server to listen
_PROJECT = Path(__file__).parent.parent

MEGABYTES = tuple(f"1m-{number}.bin" for number in range(32))
"""Files of 1 MiB, each in other pages of the page cache."""

FILE_SIZES = {"10k.bin": 10 << 10, "1m.bin": 1 << 20, "64m.bin": 64 << 20} | dict.fromkeys(MEGABYTES, 1 << 20)

SECRET = bytes(32).hex()
SIGNER = URLSigner({"benchmark": SECRET}, max_age=None)
"""The links of the servers that take only links."""
_ONCE = URLSigner({"benchmark": SECRET}, max_age=None, store=MemoryGrantStore())


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server runs: the directory with the files, a directory for what it writes, and its ports."""

    files: Path
    scratch: Path
    port: int
    behind: int
    """The port of the application behind a proxy, or of the server from which files are fetched."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start, with variables on top of this process's environment, and the port where it listens."""

    arguments: Sequence[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    measured: bool = True
    """Whether its cost is that of the server: false for the origin of the files, and for Redis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One line of the comparison."""

    key: str
    title: str
    commands: Callable[[Place], list[Command]]
    measures: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Modules without which it cannot be started."""
    programs: tuple[str, ...] = ()
    """Programs without which it cannot be started."""
    prefix: str = "/files/"
    large: str = "large.bin"
    """The file for what is measured with a large one."""
    answer: Literal["body", "offload", "redirect"] = "body"
    """Whether it sends bodies, or answers for a proxy or a store that does."""
    ours: bool = False
    links: Literal["none", "signed", "once"] = "none"
    """Whether it takes only URLs that `SIGNER` has signed, or only links that allow one download each."""
    tls: bool = False
    shares: bool = False
    """Whether it has a Redis."""
    many: bool = False
    """Whether it has all stalled clients, and not a quarter of them."""
    primed: bool = False
    """Whether the large file is downloaded once before, which fills a cache or computes checksums."""
    everywhere: bool = False
    """Whether it may use all cores, for its workers."""

    @property
    def bodies(self) -> bool:
        """Whether it sends bodies."""
        return self.answer == "body"

    @property
    def missing(self) -> list[str]:
        """The modules and programs that it needs and that are not installed."""
        modules = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return modules + [program for program in self.programs if which(program) is None]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that takes connections at `port`; `leaders` are the processes whose cost is that of the server."""

    server: Server
    port: int
    leaders: list[int]
    others: list[tuple[int, int]]
    """The process and the port of each server behind it, whose cost is not its own."""
    start_seconds: float
    """The time from the start of its first process until each port took a connection."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context of a client that trusts any certificate, or None without TLS."""
        if not self.server.tls:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{'https' if self.server.tls else 'http'}://{HOST}:{self.port}{self.path(name)}"

    def path(self, name: str) -> str:
        """Return the path of a file's URL, with the query of a link."""
        path = self.server.prefix + name
        match self.server.links:
            case "none":
                return path
            case "signed":
                return SIGNER.sign(path)
            case "once":
                return _ONCE.sign(path, uses=1)


def which(program: str) -> str | None:
    """Return the path of a program of the system, also of one that only root has on its path."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


@contextlib.contextmanager
def running(server: Server, *, files: Path, scratch: Path, core: int, other_core: int) -> Iterator[Running]:
    """Start a server on one core, and kill it at the end. What is not measured runs on the other core.

    Raises `LoadError` with its output if it does not listen.
    """
    scratch.mkdir(exist_ok=True)
    place = Place(files, scratch, *_free_ports(2))
    commands = server.commands(place)
    log = scratch / "log"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        start = time.monotonic()
        with log.open("wb") as output:
            for command in commands:
                cores = {core, other_core} if server.everywhere else {core if command.measured else other_core}
                with pinned(*cores):
                    processes.append(_start(command, files, output))
        deadline = start + _PATIENCE
        while not all(_listens(command.port) for command in commands):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                last = log.read_text(errors="replace").strip().splitlines()[-2:]
                raise LoadError(f"it does not start: {' / '.join(last)}")
            time.sleep(0.005)
        started = time.monotonic() - start
        both = [*zip(processes, commands, strict=True)]
        leaders = [process.pid for process, command in both if command.measured]
        others = [(process.pid, command.port) for process, command in both if not command.measured]
        yield Running(server, place.port, leaders, others, started)
    finally:
        # killed: a polite end waits for clients, and nothing here is worth keeping
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(command: Command, files: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    # an installed package has its byte code
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(
        command.arguments,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=_PROJECT,
        env={**inherited, "BENCH_FILES": str(files), **command.environment},
        start_new_session=True,
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [int(stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1]) for _ in range(count)]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
