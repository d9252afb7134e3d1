"""A real Redis or Valkey server. Where none is installed, its tests are skipped."""

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_port


def program() -> str:
    """Return the installed server, or skip the test."""
    if importlib.util.find_spec("redis") is None:
        pytest.skip("RedisGrantStore: the package redis is not installed: pip install redis")
    if (path := shutil.which("redis-server") or shutil.which("valkey-server")) is None:
        pytest.skip("RedisGrantStore: redis-server is not installed: apt-get install redis-server")
    return path


class RedisServer:
    """A server that can be stopped, and started again. keeps: whether it has what it had then."""

    def __init__(self, directory: Path, *, keeps: bool = False) -> None:
        self._program = program()
        self._directory = directory
        self._keeps = keeps
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and return when it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory)]
        options += ["--appendonly", "yes"] if self._keeps else []
        self._process = subprocess.Popen([self._program, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(5) == b"+PONG":
                    return
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send the server a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """Stop the server."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def redis_server(directory: Path, *, keeps: bool = False) -> Iterator[RedisServer]:
    """Give a server that runs until the context ends."""
    server = RedisServer(directory, keeps=keeps)
    server.start()
    try:
        yield server
    finally:
        server.stop()
