"""Where clients fetch from, and how they are run."""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

TRANSPORTS = ["direct", "remote", "cached", "TLS", "nginx"]
PLAIN = ["direct", "remote", "cached", "nginx"]
"""Those without TLS."""
PACKAGES = {
    "7z": "p7zip-full",
    "apt-get": "apt",
    "aria2c": "aria2",
    "bsdtar": "libarchive-tools",
    "dpkg-deb": "dpkg",
    "ffprobe": "ffmpeg",
    "gdal_translate": "gdal-bin",
    "gdalinfo": "gdal-bin",
    "qemu-img": "qemu-utils",
    "sha256sum": "coreutils",
    "unzck": "zchunk",
    "zck": "zchunk",
    "zckdl": "zchunk",
    "zsyncmake": "zsync",
}
"""Debian's packages of programs that have other names."""
_PATIENCE = 60.0  # seconds; only a client that hangs takes as long
_LOGGED = 10.0  # seconds; nginx writes its line when an answer has ended


@dataclass(frozen=True, slots=True)
class Transport:
    """A way from files to clients. `url` is that of the directory `files`; `log` is the access log of what sends."""

    scheme: str
    port: int
    route: str
    files: Path
    log: Path
    authority: Path | None = None
    """The certificate of the authority to trust, if it is one of TLS."""

    @property
    def url(self) -> str:
        """The URL of the directory, without a last slash."""
        return f"{self.scheme}://127.0.0.1:{self.port}/{self.route}"

    def at(self, port: int) -> "Transport":
        """Return the same by way of a relay."""
        return replace(self, port=port)

    def below(self, name: str) -> "Transport":
        """Return the same for a new directory below."""
        files = self.files / name
        files.mkdir()
        files.chmod(0o755)  # nginx's workers are not root
        return replace(self, route=f"{self.route}/{name}", files=files)

    def trusting(self, *options: str) -> list[str]:
        """Return options that name the authority, with {} for its file: none without TLS."""
        return [] if self.authority is None else [option.format(self.authority) for option in options]

    def put(self, name: str, content: bytes) -> str:
        """Make a file, and return its URL."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000,) * 2)  # while its second is not over, a file has no Last-Modified
        return f"{self.url}/{name}"

    def wait_for_answers(self, name: str, status: int, times: int = 1) -> None:
        """Return when so many GET requests for a file of the directory had an answer with this status."""
        answer = re.compile(rf'"GET {re.escape(f"/{self.route}/{name}")}(?: HTTP/1\.[01])?" {status} ')
        deadline = time.monotonic() + _LOGGED
        while len(answer.findall(log := self.log.read_text(errors="replace"))) < times:
            assert time.monotonic() < deadline, f"not {times} times {answer.pattern} in:\n{log[-4000:]}"
            time.sleep(0.02)


def run(
    command: Sequence[str | Path],
    directory: Path,
    *,
    env: Mapping[str, str] | None = None,
    tries: int = 1,
    until: Callable[[], bool] = lambda: True,
) -> str:
    """Run a client in a directory until it succeeds, `tries` times at most, and return its standard output.

    It has succeeded if it ends with 0 and `until` is true. Of this process's variables it has PATH alone: others may
    name proxies and authorities.

    The test is skipped where the client is not installed.
    """
    program = str(command[0])
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed: apt-get install {PACKAGES.get(program, program)}")
    output = ""
    for _ in range(tries):
        done = subprocess.run(
            command,
            cwd=directory,
            env={"PATH": os.environ["PATH"], "HOME": str(directory), "LC_ALL": "C.UTF-8", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
        )
        if done.returncode == 0 and until():
            return done.stdout.decode(errors="replace")
        output += (done.stdout + done.stderr).decode(errors="replace")[-4000:]
    raise AssertionError(f"{command} ended with {done.returncode}:\n{output}")


def digest(content: bytes | Path) -> str:
    """Return the SHA-256 of bytes or of a file."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
