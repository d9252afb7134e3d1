"""A service with a source of each kind, the requests for all of it, and what became of them."""

import contextlib
import io
import json
import os
import random
import re
import socket
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.live import Answer, make_old, parse
from tests.servers import Server, free_port, serving

PATIENCE = 20.0  # seconds; only what hangs takes as long
CONTENT = {
    name: random.Random(name).randbytes(size)
    for name, size in {
        "small.txt": 10,
        "medium.bin": 100_000,
        "big.bin": (1 << 20) + 7,
        "folder/a.txt": 5000,
        "folder/b.bin": 300_000,
        "folder/inner/c.txt": 77,
    }.items()
}
BIG = CONTENT["big.bin"]

_SOURCES = """
[sources.path]
type = "path"
root = "files"
[sources.storage]
type = "storage"
url = "file:files"
[sources.remote]
type = "remote"
url = "http://127.0.0.1:{upstream}/"
allow_hosts = ["127.0.0.1"]
read_timeout = 2
[sources.cached]
type = "remote"
url = "http://127.0.0.1:{upstream}/"
allow_hosts = ["127.0.0.1"]
read_timeout = 2
[sources.cached.cache]
path = "{state}/cache"
[accounts]
database = "sqlite+aiosqlite:///{state}/accounts.db"
[log]
format = "json"
path = "{state}/log.json"
"""
_ROUTE = '[[routes]]\npath = "/{0}/{{path:path}}"\nsource = "{0}"\n'


class _Files(BaseHTTPRequestHandler):
    """An upstream: whatever name ends with that of a file has its content. Of `half-NAME`, it sends only one half."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rpartition("-")[2].lstrip("/")
        content, status = CONTENT[name], 200
        headers = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            start, stop = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.send_response(status)
        for field, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(field, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path.startswith("/half-"):
                self.wfile.write(content[: len(content) // 2])
                threading.Event().wait()
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Upstream(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Be silent about connections that the service has reset."""


@contextlib.contextmanager
def upstream() -> Iterator[int]:
    """Serve the content by HTTP, and give the port."""
    with _Upstream(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def write_files(root: Path) -> None:
    """Write the content below a directory."""
    for name, content in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    make_old(root)


@dataclass(frozen=True)
class Site:
    """A running service. state: its cache, its databases and its log, as it sees them itself."""

    server: Server
    state: Path

    @property
    def pid(self) -> int:
        return self.server.process.pid

    @property
    def port(self) -> int:
        return int(self.server.address)

    @property
    def seen_state(self) -> Path:
        """The directory `state` as others can see it, whatever is mounted there."""
        return Path(f"/proc/{self.pid}/root{self.state}")

    @cached_property
    def _number(self) -> Iterator[int]:
        return iter(range(1_000_000))

    def get(self, path: str, *fields: str) -> Answer | None:
        """Return the answer; None if the connection was closed without one."""
        return get(self.port, path, *fields)

    def round(self) -> dict[str, str]:
        """Make all requests, one after another, and return what became of each: see `verdict`."""
        number = next(self._number)
        return {
            name: verdict(self.get(path, *fields), wanted)
            for name, (path, wanted, fields) in {**_REQUESTS, "new": (f"/cached/{number}-big.bin", BIG, ())}.items()
        }

    def descriptors(self) -> Counter[str]:
        """Return what the service has open. Sockets and the like are told apart by their kind alone."""
        found: Counter[str] = Counter()
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[os.readlink(entry).partition(":[")[0]] += 1
        return found

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def outcomes(self, rounds: int) -> list[dict[str, object]]:
        """Return the lines of the log of answers, when it has those of so many rounds."""
        log = self.seen_state / "log.json"
        eventually(lambda: log.read_text().count("\n") >= rounds * len(RIGHT), lambda: self.server.log)
        return [json.loads(line) for line in log.read_text().splitlines()]


_JSON = ("Accept: application/json",)
_REQUESTS: Mapping[str, tuple[str, object, tuple[str, ...]]] = {
    "small": ("/path/small.txt", CONTENT["small.txt"], ()),
    "medium": ("/path/medium.bin", CONTENT["medium.bin"], ()),
    "big": ("/path/big.bin", BIG, ()),
    "range": ("/path/big.bin", BIG[100_000:900_001], ("Range: bytes=100000-900000",)),
    "ranges": ("/path/big.bin", BIG[100_000:900_001], ("Range: bytes=0-9,100000-900000",)),
    "storage": ("/storage/big.bin", BIG, ()),
    "listing": ("/path/folder/", ["inner", "a.txt", "b.bin"], _JSON),
    "listing of a storage": ("/storage/folder/", ["inner", "a.txt", "b.bin"], _JSON),
    "archive": ("/path/folder/?archive=zip", {}, ()),
    "archive of a storage": ("/storage/folder/?archive=zip", {}, ()),
    "remote": ("/remote/big.bin", BIG, ()),
    "cached": ("/cached/medium.bin", CONTENT["medium.bin"], ()),
}
RIGHT = dict.fromkeys([*_REQUESTS, "new"], "right")


def get(port: int, path: str, *fields: str) -> Answer | None:
    """Return the answer to a request; None if the connection was closed without one."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *fields, "", ""]).encode())
        with contextlib.suppress(ConnectionError):
            while block := client.recv(1 << 16):
                received += block
    return parse(bytes(received)) if received else None


def verdict(answer: Answer | None, wanted: object) -> str:
    """Return "right", "aborted" for the beginning of the right bytes, a status, or what is wrong with an answer.

    wanted: the bytes; a list of the names in a listing; or a dict for the archive of the folder.
    """
    if answer is None:
        return "closed"
    if answer.status >= 300:
        return str(answer.status)
    if not answer.complete:
        is_prefix = answer.status == 206 or not isinstance(wanted, bytes) or wanted.startswith(answer.body)
        return "aborted" if is_prefix else "aborted after wrong bytes"
    match wanted:
        case bytes():
            is_right = wanted == answer.body if answer.status == 200 else wanted in answer.body
        case list():
            is_right = [entry["name"] for entry in json.loads(answer.body)["entries"]] == wanted
        case _:
            with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
                members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
            is_right = members == {name: content for name, content in CONTENT.items() if name.startswith("folder/")}
    return "right" if is_right else f"wrong: {answer.status} with {len(answer.body)} bytes"


@contextlib.contextmanager
def site(
    directory: Path,
    upstream_port: int,
    *,
    settings: str = "",
    prefix: Sequence[str] = (),
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    files: Path | None = None,
) -> Iterator[Site]:
    """Run the service. prefix: what its command begins with. files: those to serve, if they are not to be written."""
    (state := directory / "state").mkdir()
    if files is None:
        write_files(directory / "files")
    else:
        (directory / "files").symlink_to(files)
    config = directory / "downloadview.toml"
    routes = "".join(map(_ROUTE.format, ["path", "storage"])).replace(
        "source =", "list = true\narchive = true\nsource ="
    )
    routes += "".join(map(_ROUTE.format, ["remote", "cached"]))
    config.write_text(_SOURCES.format(upstream=upstream_port, state=state) + settings + routes)
    port = free_port()
    command = [*prefix, sys.executable, "-m", "downloadview_async.cli", "serve", "--config", str(config)]
    command += ["--port", str(port), "--timeout-graceful-shutdown", "2", *options]
    with serving(command, port, log=directory / "output", env=env, pass_fds=pass_fds) as server:
        yield Site(server, state)


def eventually(is_so: Callable[[], object], why: Callable[[], object]) -> None:
    """Return when something is so. Fails with `why` if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


if __name__ == "__main__":
    _Upstream(("127.0.0.1", int(sys.argv[1])), _Files).serve_forever()
