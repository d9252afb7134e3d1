"""One process of the cluster."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 90.0
"""Seconds for what takes a moment. Only what hangs takes as long, also on a busy machine."""

Preparation = Callable[[], None]


@dataclass
class Node:
    """A process that listens on a port of this machine. `command` may be changed before it is started again."""

    name: str
    command: Sequence[str]
    port: int
    directory: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready: str | None = None
    """The path that gives 200 when the process is ready. Without it, the port has to take connections."""
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None
    killed: list[float] = field(default_factory=list)
    """When the process was killed with SIGKILL, by the wall clock."""
    started: list[float] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The address at which others find the process."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What the process has written to its standard output and error."""
        return (self.directory / f"{self.name}.log").read_text(errors="replace")

    async def start(self) -> None:
        """Start the process, and return when it is ready."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env={**inherited, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user,
            )
        self.started.append(time.time())
        deadline = time.monotonic() + PATIENCE
        while not await self.is_ready():
            assert self.process.poll() is None, f"{self.name} has ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log[-5000:]}"
            await asyncio.sleep(0.05)

    async def is_ready(self) -> bool:
        """Return whether the process answers."""
        try:
            async with asyncio.timeout(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    if self.ready is None:
                        return True
                    request = f"GET {self.ready} HTTP/1.1\r\nHost: {self.address}\r\nConnection: close\r\n\r\n"
                    writer.write(request.encode())
                    return b" 200 " in await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    def send(self, number: int) -> None:
        """Send a signal."""
        if number == signal.SIGKILL:
            self.killed.append(time.time())
        assert self.process is not None
        self.process.send_signal(number)

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.send(number)
        return await asyncio.to_thread(self.process.wait, PATIENCE)

    def stop(self) -> None:
        """End the process at once, whatever it does. It may have ended already, or never have been started."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def pin(self, cores: Collection[int]) -> None:
        """Have all threads of the process and its children, and those that they start, run on these cores alone."""
        for pid in self._pids():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(int(thread.name), cores)

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the process and its children, which still run, have taken."""
        total = 0
        for pid in self._pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def _pids(self) -> list[int]:
        pids = [self.pid]
        with contextlib.suppress(OSError):
            pids += map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
        return pids
