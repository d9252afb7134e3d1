"""Archives of folders: unpacked by the usual programs, and fetched over cuts and restarts of the service."""

import os
import random
import subprocess
import sys
import threading
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.clients.relay import Relay, cutting
from tests.clients.running import digest, run
from tests.servers import Server, free_port, serving

pytestmark = pytest.mark.slow

MIB = 1 << 20
TIME = 1_700_000_001  # odd, because DOS has steps of two seconds
CUTS = 50
SETTINGS = """
[sources.files]
type = "path"
root = "files"
names = "any"
[[routes]]
path = "/files/{path:path}"
source = "files"
archive = true
"""
URL = "/files/top/?archive=zip"


class Site:
    """A service, which can be restarted at the same port."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._running = ExitStack()
        self.server: Server
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "downloadview_async.cli", "serve"]
        command += ["--config", str(self.directory / "downloadview.toml"), "--port", str(self.port)]
        self.server = self._running.enter_context(
            serving(command, self.port, log=self.directory / "log", cwd=self.directory)
        )

    def stop(self) -> None:
        self._running.close()

    def restart(self) -> None:
        self.stop()
        self.start()


def make_tree(top: Path) -> None:
    files = {
        "a.txt": b"a",
        "empty": b"",
        "d/e/f/deep.bin": os.urandom(70_000),
        "größe/文件 😀.txt": b"unicode",
        "größe/e\u0301 decomposed": b"nfd",
        "with space & 'quotes' \"double\" #?%41;$(x).txt": b"shell",
        "12:30.txt": b"colon",
        "-rf": b"option",
        f"{'n' * 250}.txt": b"long",
        "PK.txt": b"PK\x07\x08PK\x03\x04PK\x05\x06" * 99,
        "large.bin": os.urandom(6 * MIB),
        "zeros.bin": bytes(3 * MIB),
    }
    files |= {f"many/{number}.bin": os.urandom(20_000 + number) for number in range(300)}
    for name, content in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (top / "empty folder/inner").mkdir(parents=True)
    for path in top.rglob("*"):
        os.utime(path, (TIME, TIME))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("archives")
    make_tree(directory / "files/top")
    (directory / "downloadview.toml").write_text(SETTINGS)
    site = Site(directory)
    yield site
    site.stop()


@pytest.fixture(scope="module")
def archive(site: Site) -> Path:
    """The whole archive, fetched without a cut."""
    run(["curl", "-sSf", "-o", "whole.zip", f"http://127.0.0.1:{site.port}{URL}"], site.directory)
    return site.directory / "whole.zip"


def tree_of(top: Path) -> dict[str, str]:
    """What is below a directory. Names are composed: bsdtar composes those that it unpacks."""
    return {
        unicodedata.normalize("NFC", str(path.relative_to(top))): "folder" if path.is_dir() else digest(path)
        for path in sorted(top.rglob("*"))
    }


UNPACKERS = {
    "unzip": ["unzip", "-q", "{}"],
    "bsdtar": ["bsdtar", "-xf", "{}"],
    "7z": ["7z", "x", "-y", "{}"],
    "zipfile": [sys.executable, "-m", "zipfile", "-e", "{}", "."],
}


@pytest.mark.parametrize("name", UNPACKERS)
def test_programs_unpack_it(name: str, site: Site, archive: Path, tmp_path: Path) -> None:
    run([part.format(archive) for part in UNPACKERS[name]], tmp_path)
    assert tree_of(tmp_path) == {"top": "folder"} | {
        f"top/{path}": kind for path, kind in tree_of(site.directory / "files/top").items()
    }
    if name != "zipfile":  # it sets neither
        assert {int(path.stat().st_mtime) for path in tmp_path.glob("top/**/*") if path.is_file()} == {TIME}
        assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("top/**/*") if path.is_file()} == {0o644}


@pytest.mark.parametrize("command", [["unzip", "-tq"], ["7z", "t"], ["zipinfo", "-v"], ["bsdtar", "-tvf"]])
def test_programs_find_no_fault(command: list[str], archive: Path, tmp_path: Path) -> None:
    output = run([*command, archive], tmp_path)
    assert "warning" not in output.lower()
    assert "error" not in output.replace("No errors", "").lower()


def test_bsdtar_unpacks_it_from_a_pipe(site: Site, archive: Path, tmp_path: Path) -> None:
    run(["bsdtar", "--version"], tmp_path)  # the test is skipped without it
    with archive.open("rb") as file:
        subprocess.run(["bsdtar", "-xf", "-"], cwd=tmp_path, stdin=file, check=True, timeout=60)
    assert tree_of(tmp_path / "top") == tree_of(site.directory / "files/top")


CLIENTS = {
    "curl": ["curl", "-sSf", "-C", "-", "-o", "file"],
    "wget": ["wget", "-nv", "-c", "-t1", "-O", "file"],
}


@pytest.mark.parametrize("name", CLIENTS)
def test_fifty_cuts_and_five_restarts(name: str, site: Site, archive: Path, tmp_path: Path) -> None:
    size = archive.stat().st_size
    with cutting(site.port, 0) as relay:
        command = [*CLIENTS[name], f"http://127.0.0.1:{relay.address}{URL}"]
        for number in range(CUTS):
            if number % 10 == 9:
                site.restart()
            relay.length = random.randint(size // 100, size // 55)
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
            assert done.returncode != 0
        assert relay.cuts == CUTS
        assert 0 < (tmp_path / "file").stat().st_size < size
        relay.length = 2 * size
        run(command, tmp_path)
    assert digest(tmp_path / "file") == digest(archive)


def test_aria2_with_sixteen_connections_fifty_cuts_and_a_restart(site: Site, archive: Path, tmp_path: Path) -> None:
    size = archive.stat().st_size
    site.restart()  # no CRC-32 is known
    with cutting(site.port, size // 60) as relay:
        restarting = threading.Thread(target=_restart_after, args=(site, relay, CUTS // 2))
        restarting.start()
        command = ["aria2c", "-q", "-x16", "-s16", "-k1M", "-m0", "--retry-wait=1", "-o", "file"]
        run([*command, f"http://127.0.0.1:{relay.address}{URL}"], tmp_path)
        restarting.join()
        assert relay.cuts >= CUTS
    assert digest(tmp_path / "file") == digest(archive)


def _restart_after(site: Site, relay: Relay, cuts: int) -> None:
    pause = threading.Event()
    for _ in range(2000):
        if relay.cuts >= cuts:
            site.restart()
            return
        pause.wait(0.02)


def test_ranges_of_the_directory_are_those_of_the_whole(site: Site, archive: Path, tmp_path: Path) -> None:
    site.restart()
    with zipfile.ZipFile(archive) as opened:
        start = opened.start_dir
    run(["curl", "-sSf", "-r", f"{start}-", "-o", "end", f"http://127.0.0.1:{site.port}{URL}"], tmp_path)
    assert (tmp_path / "end").read_bytes() == archive.read_bytes()[start:]
