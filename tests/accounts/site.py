"""The service, which counts downloads, alone or behind a proxy whose log it follows, and clients of all kinds."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import downloadview_async as dv
from tests.proxies.servers import KINDS, proxy
from tests.servers import Server, free_port, serving

COMMAND = [sys.executable, "-m", "downloadview_async.cli"]
SIZE = 12 << 20
"""More than all buffers between a server and a client have, if the client wants a small one."""

_RECEIVE_BUFFER = 1 << 16
_PATIENCE = 30.0
SETTINGS = """
[server]
port = {port}
[accounts]
database = "{database}"
{further}
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
{route}
{backend}
"""


@dataclass
class Site:
    """Where the files are, and where clients find them. `services` are the service's processes."""

    directory: Path
    database: str
    port: int
    services: list[Server]
    configuration: str = ""
    """That of the proxy."""

    @property
    def log(self) -> Path:
        """The log of the proxy."""
        return self.directory / "logs" / "downloads.log"

    @property
    def environ(self) -> dict[str, str]:
        """The variables for a command that has to know the log."""
        return {**os.environ, "DOWNLOADVIEW_ACCOUNTS__PROXY_LOG": str(self.log)}

    def reopen_log(self) -> None:
        """Have nginx begin a new log."""
        match = re.search(r"^pid (.*);$", self.configuration, re.MULTILINE)
        assert match is not None
        os.kill(int(Path(match[1]).read_text()), signal.SIGUSR1)

    def put(self, name: str, content: bytes) -> str:
        """Make a file of long ago, and return its URL."""
        file = self.directory / "files" / name
        file.write_bytes(content)
        os.utime(file, (1_700_000_000,) * 2)
        return f"http://127.0.0.1:{self.port}/files/{name}"

    def get(
        self, name: str, headers: str = "", *, take: int | None = None, method: str = "GET", port: int = 0
    ) -> bytes:
        """Send a request, and return the answer with its head. take: reset the connection after bytes of the body."""
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            client.settimeout(_PATIENCE)
            client.connect(("127.0.0.1", port or self.port))
            client.sendall(f"{method} /files/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())
            received = bytearray()
            with contextlib.suppress(ConnectionError):
                while block := client.recv(1 << 16):
                    received += block
                    if take is not None and len(received) - received.find(b"\r\n\r\n") - 4 >= take:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
        return bytes(received)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return the downloads and the answers of each file."""

        async def rows() -> list[dict[str, Any]]:
            store = dv.CompletionStore(self.database)
            try:
                return await store.report("file")
            finally:
                await store.aclose()

        return {row["file"].removeprefix("files/"): (row["downloads"], row["answers"]) for row in asyncio.run(rows())}

    def wait_for(self, expected: dict[str, tuple[int, int]]) -> None:
        """Return when these are the downloads and the answers of these files. There are never more."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            counts = self.counts()
            seen = {name: counts.get(name, (0, 0)) for name in expected}
            if seen == expected:
                return
            for name, (downloads, answers) in seen.items():
                assert downloads <= expected[name][0], (name, downloads)
                assert answers <= expected[name][1], (name, answers)
            assert time.monotonic() < deadline, f"{seen}, not {expected}"
            time.sleep(0.1)


@contextmanager
def site_of(
    directory: Path,
    kind: str | None = None,
    *,
    services: int = 1,
    workers: int = 1,
    reads_log: bool = True,
    route: str = "",
) -> Iterator[Site]:
    """Run the service in an empty directory, behind a proxy of this kind.

    reads_log: whether it has proxy_log. route: further settings of its route.
    """
    for name in ("files", "logs"):
        (directory / name).mkdir()
    (directory / "logs").chmod(0o777)  # the proxies' workers are not root
    place = f"sqlite+aiosqlite:///{directory / 'accounts.db'}"
    port, outside = free_port(), free_port()
    rule = further = ""
    if kind is not None:
        further = 'proxy_log = "logs/downloads.log"' if reads_log else ""
        target = 'target = "/_files/"' if dv.proxy_kinds()[kind].targets == "uri" else ""
        rule = f'[offload]\nbackend = "{kind}"\n[[offload.rules]]\nsource = "files"\n{target}'
    settings = directory / "downloadview.toml"
    settings.write_text(SETTINGS.format(port=port, database=place, further=further, route=route, backend=rule))
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                serving(
                    [*COMMAND, "serve", "--config", str(settings), "--port", str(one), "--workers", str(workers)],
                    one,
                    log=directory / f"service{number}.log",
                )
            )
            for number, one in enumerate([port, *(free_port() for _ in range(services - 1))])
        ]
        site = Site(directory, place, port, running)
        if kind is not None:
            command = [*COMMAND, "config", kind, "--config", str(settings), "--listen", f"127.0.0.1:{outside}"]
            text = subprocess.run(command, capture_output=True, check=True, text=True, env=site.environ).stdout

            def note(text: str) -> str:
                site.configuration = text
                return text

            stack.enter_context(
                proxy(KINDS[kind], directory, port, port=outside, text=lambda service, listen: text, edit=note)
            )
            site.port = outside
        yield site
