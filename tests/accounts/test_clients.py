"""Real clients: each file that they have whole counts once, however they fetch it."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.accounts.site import COMMAND, Site, site_of
from tests.browser import BROWSERS, running
from tests.clients.relay import cutting
from tests.clients.running import digest, run
from tests.proxies.servers import readable_directory

pytestmark = pytest.mark.slow

CONTENT = os.urandom((24 << 20) + 12_345)
ARIA2 = ["aria2c", "--console-log-level=warn", "--summary-interval=0", "-x16", "-s16", "-k1M", "-o", "file"]


@pytest.fixture(scope="module", params=[None, "nginx"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The service alone, and behind nginx."""
    with readable_directory() as directory, site_of(directory, request.param) as running:
        yield running


def wait_for_downloads(site: Site, expected: dict[str, int]) -> None:
    """Return when so many downloads of the files are counted. No more follow before a later download is counted."""
    last = site.counts().get("last", (0, 0))[0]
    site.put("last", b"0123456789")
    site.get("last")
    deadline = time.monotonic() + 30
    while True:
        counts = site.counts()
        seen = {name: counts.get(name, (0, 0))[0] for name in expected}
        if seen == expected and counts.get("last", (0, 0))[0] > last:
            return
        assert time.monotonic() < deadline, f"{seen}, not {expected}"
        time.sleep(0.1)


def test_curl_with_ten_cuts(site: Site, tmp_path: Path) -> None:
    url = site.put("curl", CONTENT)
    with cutting(site.port, len(CONTENT) // 10) as relay:
        through = url.replace(f":{site.port}/", f":{relay.address}/")
        command = ["curl", "-sSf", "-C", "-", "-o", "file", through]
        run(command, tmp_path, tries=40, until=lambda: (tmp_path / "file").stat().st_size == len(CONTENT))
        assert relay.cuts >= 10
    assert digest(tmp_path / "file") == digest(CONTENT)
    wait_for_downloads(site, {"curl": 1})


def test_aria2_in_sixteen_pieces(site: Site, tmp_path: Path) -> None:
    url = site.put("aria2", CONTENT)
    run([*ARIA2, url], tmp_path)
    assert digest(tmp_path / "file") == digest(CONTENT)
    wait_for_downloads(site, {"aria2": 1})


def test_two_programs_at_one_address(site: Site, tmp_path: Path) -> None:
    """Both fetch the file in 16 pieces at the same time, and look the same."""
    url = site.put("two", CONTENT)
    if shutil.which("aria2c") is None:
        pytest.skip("aria2c is not installed: apt-get install aria2")
    directories = [tmp_path / "1", tmp_path / "2"]
    processes = []
    for directory in directories:
        directory.mkdir()
        command = [*ARIA2, "--max-download-limit=8M", url]
        processes.append(subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL))
    for directory, process in zip(directories, processes, strict=True):
        assert process.wait(60) == 0
        assert digest(directory / "file") == digest(CONTENT)
    wait_for_downloads(site, {"two": 2})


def test_wget_that_was_interrupted(site: Site, tmp_path: Path) -> None:
    url = site.put("wget", CONTENT)
    file = tmp_path / "file"
    begun = ["wget", "-q", "--limit-rate=4m", "-O", "file", url]
    with subprocess.Popen(begun, cwd=tmp_path) as process:
        deadline = time.monotonic() + 30
        while not file.exists() or file.stat().st_size < len(CONTENT) // 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
    assert file.stat().st_size < len(CONTENT)
    site.put("other", b"x")
    wait_for_downloads(site, {"wget": 0})
    run(["wget", "-q", "-c", "-O", "file", url], tmp_path)
    assert digest(file) == digest(CONTENT)
    wait_for_downloads(site, {"wget": 1})


def test_a_player_that_seeks(site: Site) -> None:
    """It reads the end, the beginning and some of the middle, and later all the rest."""
    for name in ("video", "preview"):
        site.put(name, CONTENT)
    size, part = len(CONTENT), 100_000
    for name in ("preview", "video"):
        site.get(name, "Range: bytes=0-\r\n", take=part)
        site.get(name, f"Range: bytes={size - part}-\r\n")
        site.get(name, f"Range: bytes={size // 2}-\r\n", take=part)
    wait_for_downloads(site, {"video": 0, "preview": 0})
    for start in range(0, size, size // 7):
        site.get("video", f"Range: bytes={start}-{start + size // 7}\r\n")
    wait_for_downloads(site, {"video": 1, "preview": 0})


@pytest.mark.parametrize("name", BROWSERS)
def test_a_browser_that_saves_a_file(name: str, site: Site, tmp_path: Path) -> None:
    file = tmp_path / "downloads" / f"{name}.bin"
    file.parent.mkdir()
    url = site.put(file.name, CONTENT)
    with running(name, tmp_path) as browser:
        browser.download(url, file.parent)
        deadline = time.monotonic() + 60
        while not file.exists() or file.stat().st_size < len(CONTENT):
            assert time.monotonic() < deadline, [*file.parent.iterdir()]
            time.sleep(0.05)
    assert digest(file) == digest(CONTENT)
    wait_for_downloads(site, {file.name: 1})


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process at the end."""
    try:
        yield
    finally:
        process.kill()


def test_nginx_whose_log_is_rotated_while_it_is_followed() -> None:
    """The service does not read the log: `downloadview account --follow` does, and is killed again and again."""
    with readable_directory() as directory, site_of(directory, "nginx", reads_log=False) as site:
        for name in ("file", "part"):
            site.put(name, CONTENT[:100_000])
        command = [*COMMAND, "account", "--config", str(directory / "downloadview.toml"), str(site.log)]
        told = 0
        for number in range(4):
            with subprocess.Popen([*command, "--follow"]) as follower, killed_at_the_end(follower):
                for _ in range(5):
                    site.get("file")
                    site.get("part", "Range: bytes=0-50000\r\n")
                site.log.rename(site.log.with_name(f"downloads.log.{number}"))
                for _ in range(5):
                    site.get("file")  # into the renamed file
                site.reopen_log()
                told += 10
                if number % 2 == 0:
                    site.wait_for({"file": (told, told)})
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("counted: ")
        site.wait_for({"file": (told, told), "part": (0, 20)})
        for log in (site.log, *(site.log.with_name(f"downloads.log.{number}") for number in range(4))):
            again = subprocess.run([*command[:-1], str(log)], capture_output=True, text=True, check=True)
            assert again.stdout == "counted: 0\n"
        assert site.counts() == {"file": (told, told), "part": (0, 20)}


def test_of_two_followers_one_reads_and_the_other_takes_over() -> None:
    """The service has two workers, and there is another follower. Each in turn is killed."""
    with readable_directory() as directory, site_of(directory, "nginx", workers=2) as site:
        site.put("file", CONTENT[:100_000])
        command = [*COMMAND, "account", "--config", str(directory / "downloadview.toml"), "--follow"]
        told = 0
        with contextlib.ExitStack() as stack:
            followers = []
            for _ in range(2):
                followers.append(stack.enter_context(subprocess.Popen(command, env=site.environ)))
                stack.enter_context(killed_at_the_end(followers[-1]))
            for follower in (None, *followers):
                if follower is not None:
                    follower.kill()
                for _ in range(5):
                    site.get("file")
                told += 5
                site.wait_for({"file": (told, told)})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_loses_nothing(number: signal.Signals) -> None:
    with readable_directory() as directory, site_of(directory) as site:
        site.put("file", CONTENT)
        part = len(CONTENT) // 2
        site.get("file", f"Range: bytes=0-{part - 1}\r\n")
        site.get("file", f"Range: bytes={part}-\r\n")
        site.services[0].stop(number)
        assert site.counts() == {"file": (1, 2)}


def test_three_replicas_and_one_database() -> None:
    """A manager takes 16 pieces from three processes, some of which are killed on the way."""
    with readable_directory() as directory, site_of(directory, services=3) as site:
        for name in ("file", "lacking"):
            site.put(name, CONTENT)
        part = len(CONTENT) // 16 + 1
        for number in range(16):
            server = site.services[number % len(site.services)]
            assert isinstance(server.address, int)
            span = f"Range: bytes={number * part}-{(number + 1) * part - 1}\r\n"
            site.get("file", span, port=server.address)
            if number != 7:
                site.get("lacking", span, port=server.address)
            if number in (5, 10):
                site.wait_for({"file": (0, number + 1)})
                server.process.kill()
                server.process.wait()
                site.services.remove(server)
                site.port = int(site.services[0].address)
        site.wait_for({"file": (1, 16), "lacking": (0, 15)})
