"""A once-only link, taken by download managers over connections that are cut, from a service with two workers."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.browser import BROWSERS, Browser, running
from tests.clients.relay import cutting
from tests.clients.running import digest, run
from tests.redis_server import RedisServer, redis_server
from tests.servers import Server, free_port, serving

pytestmark = pytest.mark.slow

MIB = 1 << 20
SETTINGS = """
[server]
workers = 2
[links]
keys = "2026a ssssssssssssssssssssssssssssssss"
store = "{store}"
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
access = ["signed"]
"""
_COMMAND = [sys.executable, "-m", "downloadview_async.cli"]


@dataclass(frozen=True, slots=True)
class Site:
    """A running service, and its settings."""

    server: Server
    settings: Path
    content: bytes

    def downloadview(self, *arguments: str) -> str:
        """Return what a command prints."""
        command = [*_COMMAND, *arguments, "--config", str(self.settings)]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    def link(self, uses: int) -> str:
        return self.downloadview("sign", "/files/big.bin", "--uses", str(uses))

    def status(self, link: str, client: str, *options: str) -> int:
        """Return the status that curl gets. client: its address on the loopback."""
        command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--interface", client, *options]
        done = subprocess.run([*command, f"{self.server.url}{link}"], capture_output=True, timeout=60)
        return int(done.stdout)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp(request.param)
    store = "sqlite:links.db" if request.param == "sqlite" else request.getfixturevalue("redis").url
    (directory / "files").mkdir()
    content = os.urandom(24 * MIB + 12_345)
    (directory / "files" / "big.bin").write_bytes(content)
    os.utime(directory / "files" / "big.bin", (1_700_000_000,) * 2)
    settings = directory / "downloadview.toml"
    settings.write_text(SETTINGS.format(store=store))
    port = free_port()
    command = [*_COMMAND, "serve", "--config", str(settings), "--port", str(port)]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        yield Site(server, settings, content)


def is_spent(site: Site, link: str, uses: int) -> bool:
    """Return whether exactly one of `uses` uses is spent, by spending the others."""
    statuses = [site.status(link, f"127.0.0.{number}") for number in range(2, uses + 2)]
    return statuses == [200] * (uses - 1) + [410]


def test_curl_over_ten_cuts(site: Site, tmp_path: Path) -> None:
    link = site.link(2)
    with cutting(int(site.server.address), 9 * MIB // 4) as relay:
        url = f"http://127.0.0.1:{relay.address}{link}"
        run(["curl", "-sSf", "-C", "-", "-o", "file", url], tmp_path, tries=20)
        assert relay.cuts >= 10
    assert digest(tmp_path / "file") == digest(site.content)
    assert is_spent(site, link, 2)


def test_aria2_with_sixteen_connections_and_cuts(site: Site, tmp_path: Path) -> None:
    link = site.link(2)
    with cutting(int(site.server.address), MIB) as relay:
        command = ["aria2c", "-q", "-x16", "-s16", "-k1M", "-m0", "--retry-wait=0", "-o", "file"]
        run([*command, f"http://127.0.0.1:{relay.address}{link}"], tmp_path)
        assert relay.cuts >= 5
    assert digest(tmp_path / "file") == digest(site.content)
    assert is_spent(site, link, 2)


def test_a_whole_download_ends_its_session(site: Site, tmp_path: Path) -> None:
    link = site.link(1)
    run(["curl", "-sSf", "-o", "file", f"{site.server.url}{link}"], tmp_path)
    assert digest(tmp_path / "file") == digest(site.content)
    assert [site.status(link, f"127.0.0.{number}") for number in (1, 2)] == [410, 410]


def test_a_client_that_pauses(site: Site, tmp_path: Path) -> None:
    """It reads a part and leaves, as browsers do when a download is paused, and later asks for the rest."""
    link = site.link(1)
    for part in ("0-999999", "1000000-9999999"):
        assert site.status(link, "127.0.0.1", "-r", part) == 206
        assert site.status(link, "127.0.0.2", "-r", "10000000-") == 410
    run(["curl", "-sSf", "-r", "10000000-", "-o", "rest", f"{site.server.url}{link}"], tmp_path)
    assert digest(tmp_path / "rest") == digest(site.content[10_000_000:])
    assert site.status(link, "127.0.0.1") == 410


@pytest.mark.parametrize("name", BROWSERS)
def test_a_browser_that_pauses(site: Site, tmp_path: Path, name: str) -> None:
    link = site.link(1)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    with cutting(int(site.server.address), 9 * MIB, holds=True) as relay, running(name, tmp_path) as browser:
        browser.download(f"http://127.0.0.1:{relay.address}{link}", downloads)
        assert relay.held.wait(60)
        press(browser, "pause", until=lambda: browser.button() == "resume")
        assert site.status(link, "127.0.0.2") == 410
        relay.release.set()
        press(browser, "resume", until=lambda: sizes(downloads) == {"big.bin": len(site.content)})
        assert relay.cuts >= 2
    assert digest(downloads / "big.bin") == digest(site.content)
    assert [site.status(link, f"127.0.0.{number}") for number in (1, 2)] == [410, 410]


def press(browser: Browser, text: str, *, until: Callable[[], bool]) -> None:
    """Press the button of a download whenever it has this text, until something is so."""
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline, browser.button()
        if browser.button() == text:
            browser.press()


def sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the files in a directory in which a browser renames some."""
    while True:
        with suppress(FileNotFoundError):
            return {file.name: file.stat().st_size for file in directory.iterdir()}


def test_a_revoked_link(site: Site) -> None:
    link = site.link(5)
    assert site.status(link, "127.0.0.1") == 200
    identifier = dict(line.split(": ") for line in site.downloadview("verify", link).splitlines())["link"]
    site.downloadview("revoke", identifier)
    assert {site.status(link, f"127.0.0.{number}") for number in range(1, 9)} == {403}


@pytest.mark.parametrize("keeps", [True, False])
def test_redis_stops_in_the_middle(tmp_path: Path, keeps: bool) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "big.bin").write_bytes(b"content")
    settings, port = tmp_path / "downloadview.toml", free_port()
    command = [*_COMMAND, "serve", "--config", str(settings), "--port", str(port)]
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(tmp_path, keeps=keeps))
        settings.write_text(SETTINGS.format(store=redis.url))
        server = stack.enter_context(serving(command, port, log=tmp_path / "log", cwd=tmp_path))
        site = Site(server, settings, b"content")
        link = site.link(1)
        assert site.status(link, "127.0.0.1", "-r", "0-2") == 206
        redis.stop()
        try:
            for _ in range(5):
                assert site.status(link, "127.0.0.1") == 503
        finally:
            redis.start()
        # without what Redis had, nobody knows whether the link was used
        assert site.status(link, "127.0.0.1") == (200 if keeps else 503)
        assert site.status(site.link(1), "127.0.0.1") == 200
        assert server.log.count("so requests that need it get 503") in (1, 2), "once for each worker"
