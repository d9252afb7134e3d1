"""The demo as it stands, with each proxy in front of it: what the notes in `deploy/` promise."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from downloadview_async.http.fields import OFFLOAD_HEADERS
from tests.live import Answer, ask
from tests.proxies.conftest import HOSTILE_NAMES, PRIVATE_PAGES, content_of
from tests.proxies.servers import EACH_KIND, KINDS, proxy, readable_directory, running
from tests.servers import free_port

APP = Path(__file__).resolve().parents[2] / "app"


@dataclass(frozen=True)
class Demo:
    files: Path
    port: int
    service: int
    kind: str
    environ: dict[str, str]


@pytest.fixture(scope="module", params=EACH_KIND)
def demo(request: pytest.FixtureRequest) -> Iterator[Demo]:
    """The demo behind a proxy, from a copy of the checkout's `app` that the proxy's workers can read."""
    kind: str = request.param
    with readable_directory() as directory:
        shutil.copytree(APP, directory / "app", ignore=shutil.ignore_patterns("__pycache__", "*.db*", "large.bin"))
        for name in HOSTILE_NAMES:
            (directory / "app" / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / "app" / "files" / name).write_bytes(content_of(name))
        service, port = free_port(), free_port()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
        environ["DOWNLOADVIEW_SOURCES__MIRROR__URL"] = f"http://127.0.0.1:{port}/files/"
        if kind in ("nginx", "caddy", "h2o"):
            environ["DOWNLOADVIEW_OFFLOAD__BACKEND"] = kind
        else:
            environ["DOWNLOADVIEW_OFFLOAD"] = json.dumps({"backend": kind, "rules": [{"source": "files"}]})
        command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(service)]
        with (
            running(command, service, directory=directory, log=directory / "log", environ=environ),
            proxy(KINDS[kind], directory, service, port=port),
        ):
            yield Demo(directory / "app" / "files", port, service, kind, environ)


def get(port: int, path: str, **headers: str) -> Answer:
    """Send one request and read the whole answer."""
    return asyncio.run(ask(port, path, headers={name.replace("_", "-"): value for name, value in headers.items()}))


OFFLOADED = [
    ("/files/hello.txt", "hello.txt"),
    ("/files/empty.txt", "empty.txt"),
    ("/files/large.bin", "large.bin"),
    ("/files/naïve café.txt", "naïve café.txt"),
    ("/media/picture.png", "picture.png"),
    ("/media/archive.tar.gz", "archive.tar.gz"),
    ("/documents/report", "report.pdf"),
    ("/documents/menu", "naïve café.txt"),
]


@pytest.mark.parametrize("path, file", OFFLOADED)
def test_the_proxy_sends_what_it_can_reach(demo: Demo, path: str, file: str) -> None:
    direct = get(demo.service, quote(path))
    assert (direct.status, direct.body) == (200, b"")
    assert OFFLOAD_HEADERS & {*direct.headers}
    answer = get(demo.port, quote(path))
    assert (answer.status, answer.body) == (200, (demo.files / file).read_bytes())
    assert answer.headers["content-disposition"] == direct.headers["content-disposition"]
    if demo.kind != "h2o":  # which goes by the name of the file, and by a table of its own
        assert answer.headers["content-type"] == direct.headers["content-type"]
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not OFFLOAD_HEADERS & {*answer.headers}


@pytest.mark.parametrize("file", ["large.bin", "archive.tar.gz", "naïve café.txt"])
def test_what_the_proxy_cannot_reach_is_streamed_through_it(demo: Demo, file: str) -> None:
    answer = get(demo.port, f"/mirror/{quote(file)}")
    assert (answer.status, answer.body) == (200, (demo.files / file).read_bytes())
    assert not OFFLOAD_HEADERS & {*answer.headers}


@pytest.mark.parametrize("route", ["files", "media", "mirror"])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_any_name_comes_through(demo: Demo, route: str, name: str) -> None:
    answer = get(demo.port, f"/{route}/{quote(name)}")
    assert (answer.status, answer.body) == (200, content_of(name))


def test_a_report_is_made_behind_the_proxy(demo: Demo) -> None:
    answer = get(demo.port, "/reports/summary.txt")
    assert (answer.status, answer.body) == (200, get(demo.service, "/reports/summary.txt").body)
    assert b"hello.txt" in answer.body


@pytest.mark.parametrize("path", ["/files/large.bin", "/media/large.bin", "/mirror/large.bin"])
def test_an_interrupted_download_is_resumed(demo: Demo, path: str) -> None:
    content = (demo.files / "large.bin").read_bytes()
    etag = get(demo.port, path, Range="bytes=0-0").headers["etag"]
    answer = get(demo.port, path, Range=f"bytes={len(content) - 1000}-", If_Range=etag)
    assert (answer.status, answer.body) == (206, content[-1000:])


@pytest.mark.parametrize(
    "path",
    ["/files/nothing.txt", "/files/../demo.db", "/documents/draft", "/_files/hello.txt", "/demo.db"],
)
def test_the_rest_is_one_404(demo: Demo, path: str) -> None:
    answer = get(demo.port, path)
    assert (answer.status, answer.body) == (404, b"Not Found")


def test_the_front_page_and_the_health_of_the_service(demo: Demo) -> None:
    assert b"/files/hello.txt" in get(demo.port, "/").body
    assert get(demo.port, "/-/livez").body == get(demo.port, "/-/livez?a=1").body == b"alive\n"
    assert get(demo.service, "/-/readyz").body == b"ready\n"


@pytest.mark.parametrize("path", PRIVATE_PAGES)
def test_the_service_own_pages_are_closed(demo: Demo, path: str) -> None:
    answer = get(demo.port, path)
    assert answer.status in (400, 403 if demo.kind == "lighttpd" else 404)
    assert b"ready" not in answer.body


@pytest.mark.slow
def test_the_demo_passes_its_check(demo: Demo) -> None:
    arguments = [f"http://127.0.0.1:{demo.port}", "--direct", f"http://127.0.0.1:{demo.service}", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "downloadview_async.cli", "check", "--config", "app/downloadview.toml", *arguments],
        cwd=demo.files.parent.parent,
        env=demo.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = json.loads(ran.stdout)
    assert [line for line in said["checks"] if line["result"] == "FAIL"] == [], ran.stdout
    assert {line["route"] for line in said["checks"] if line["step"] == "together"} == {
        "/files/{path:path}",
        "/media/{path:path}",
        "/documents/{key}",
        "/mirror/{path:path}",
        "/reports/{name}",
    }
    assert ran.returncode == 0
    assert ran.stderr == ""
