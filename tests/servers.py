"""Real server processes for tests: started on a free port, awaited, stopped, and read."""

import contextlib
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).parent.parent
_numbers = itertools.count(secrets.randbelow(680))
_PATIENCE = 30.0  # seconds; only a server that hangs takes as long


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on now, and that no other test will take.

    It is below those that the kernel gives to sockets bound to port 0, and each worker of xdist has every 32nd. Some
    servers share a port that another one has (SO_REUSEPORT), and each of them would get some of the requests.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 32
    while True:
        port = 10_016 + next(_numbers) % 680 * 32 + worker
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Server:
    """A running server. `address` is a port of `host`, or the path of a Unix socket."""

    process: subprocess.Popen[bytes]
    address: int | str
    log_file: Path
    stop_signal: int = field(default=signal.SIGTERM)
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """The server's URL without a last slash."""
        return f"http://{self.host}:{self.address}"

    @property
    def log(self) -> str:
        """What the server has written to its standard output and error so far."""
        return self.log_file.read_text(errors="replace")

    def wait_for_log(self, text: str, *, times: int = 1) -> None:
        """Return when the log contains `text` so many times."""
        wait_for_text(self.log_file, text, times=times)

    def wait_until_it_answers(self) -> None:
        """Return when the address takes connections. Fails with the log if the process ends first."""
        deadline = time.monotonic() + _PATIENCE
        while not _answers(self.address, self.host):
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"no answer on {self.address}:\n{self.log}"
            time.sleep(0.02)

    def stop(self, number: int | None = None) -> int:
        """Send the signal, wait for the end and return the exit status (negative: the signal that ended it)."""
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal if number is None else number)
        try:
            return self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"it does not stop:\n{self.log}") from None


def wait_for_text(log: Path, text: str, *, times: int = 1) -> None:
    """Return when a log contains `text` so many times."""
    deadline = time.monotonic() + _PATIENCE
    while (found := log.read_text(errors="replace")).count(text) < times:
        assert time.monotonic() < deadline, f"{text!r} never came:\n{found}"
        time.sleep(0.02)


def _answers(address: int | str, host: str) -> bool:
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with socket.socket(family) as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, address) if isinstance(address, int) else address) == 0


@contextmanager
def serving(
    command: Sequence[str | os.PathLike[str]],
    address: int | str,
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = PROJECT,
    pass_fds: Sequence[int] = (),
    stop_signal: int = signal.SIGTERM,
    host: str = "127.0.0.1",
) -> Iterator[Server]:
    """Start `command` in a process group of its own, wait until `address` answers, and stop it at the end.

    env: variables on top of this process's own, without its DOWNLOADVIEW_* ones. log: the file for its output.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**inherited, "PYTHONUNBUFFERED": "1", **(env or {})},
            pass_fds=pass_fds,
            start_new_session=True,
        )
    server = Server(process, address, log, stop_signal, host)
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.stop()


@contextmanager
def demo(log: Path, *, env: Mapping[str, str] | None = None, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """Serve the demo of `app/` on a free port, its mirror being itself; `env` and `arguments` go to the service."""
    port = free_port()
    subprocess.run([sys.executable, "-m", "app.demo"], cwd=PROJECT, check=True)
    settings = {
        "DOWNLOADVIEW_SERVER__PORT": str(port),
        "DOWNLOADVIEW_SOURCES__MIRROR__URL": f"http://127.0.0.1:{port}/files/",
        **(env or {}),
    }
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "app/downloadview.toml", *arguments]
    with serving(command, port, env=settings, log=log) as server:
        yield server
