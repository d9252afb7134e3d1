"""The service's `[metrics]`: the page `/-/metrics`, over worker processes too, and behind printed configurations."""

import os
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from starlette.testclient import TestClient

from downloadview_async.service.app import build
from downloadview_async.service.metrics import SharedDirectory
from downloadview_async.service.pid_file import reload_by_pid_file
from downloadview_async.service.proxy_config import config_for
from tests.accounts.test_metrics import OPENMETRICS, read
from tests.servers import free_port, serving
from tests.service.loading import FILES, load, refusal
from tests.service.test_access_log import get
from tests.service.test_drain import worker_pids

SETTINGS = (
    FILES
    + """
[sources.remote]
type = "remote"
url = "http://127.0.0.1:9/"
[sources.remote.cache]
path = "cache"
[[routes]]
path = "/remote/{path:path}"
source = "remote"
[offload]
backend = "nginx"
[[offload.rules]]
source = "files"
target = "/_files/"
"""
)
METRICS = f"{SETTINGS}[metrics]\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.txt").write_bytes(b"0123456789")
    return tmp_path


def test_the_page_is_there_if_the_settings_have_the_table(directory: Path) -> None:
    with TestClient(build(load(directory, SETTINGS))) as client:
        assert client.get("/-/metrics").status_code == 404
    with TestClient(build(load(directory, METRICS))) as client:
        client.get("/files/a.txt", headers={"Accept-Encoding": "identity"})
        client.get("/remote/a.txt")
        answer = client.get("/-/metrics", headers={"Accept": "text/plain"})
        modern = client.get("/-/metrics", headers={"Accept": OPENMETRICS})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert (answer.headers["cache-control"], answer.headers["vary"]) == ("no-store", "Accept")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert list(parse_openmetrics(modern.text))  # type: ignore[no-untyped-call]
    requests = read(answer.text, "requests_total", "route", "source", "kind", "status")
    assert requests[("/files/{path:path}", "files", "offloaded:nginx", "2xx")] == 1
    assert requests[("/remote/{path:path}", "remote", "error", "5xx")] == 1
    assert read(answer.text, "requests_in_progress") == {(): 1}  # the page itself
    assert read(answer.text, "cache_misses_total", "source") == {("remote",): 1}
    assert set(read(answer.text, "source_in_use", "source")) == {("files",), ("remote",)}
    assert read(answer.text, "upstream_connections", "source") == {("remote",): 0}
    assert read(answer.text, "open_descriptors")[()] > 3


def test_limits_and_links_of_the_settings_are_on_the_page(directory: Path) -> None:
    text = FILES.replace('root = "files"', 'root = "files"\nmax_requests = 9')
    text += f"""limits = {{ requests = "1/minute" }}
[[routes]]
path = "/signed/{{path:path}}"
source = "files"
access = ["signed"]
[[routes]]
path = "/open/{{path:path}}"
source = "files"
[limits]
requests = "2/minute"
[links]
keys = "2026a {"s" * 32}"
[metrics]
"""
    paths = ["/files/a.txt", "/files/a.txt", "/open/a.txt", "/signed/a.txt?k=2026a&e=1&s=another"]
    with TestClient(build(load(directory, text))) as client:
        assert [client.get(path).status_code for path in paths] == [200, 429, 429, 403]
        page = client.get("/-/metrics").text
    limit = "at most {} per minute".format
    assert read(page, "limits_hit_total", "limits", "limit") == {
        ("/files/{path:path}", limit("1 request")): 1,
        ("all", limit("2 requests")): 1,
    }
    assert read(page, "links_total", "event")[("refused",)] == 1
    assert set(read(page, "source_in_use", "source")) == {("files",), ("files.max_requests",)}


def test_numbers_that_cannot_be_added_up_give_503_and_one_line(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "numbers").mkdir()
    with TestClient(build(load(directory, f'{METRICS}directory = "numbers"\n'))) as client:
        assert client.get("/-/metrics").status_code == 200
        shutil.rmtree(directory / "numbers")
        answer = client.get("/-/metrics")
        assert (answer.status_code, answer.text) == (503, "Service Unavailable")
        (line,) = (record for record in caplog.records if record.levelname != "INFO")
        assert "the numbers of the processes cannot be added up" in line.getMessage()
        assert line.exc_info is None
        (directory / "numbers").mkdir()
        assert read(client.get("/-/metrics").text, "processes") == {(): 1}


@pytest.mark.parametrize("proxy", ["nginx", "caddy", "apache", "lighttpd", "h2o"])
def test_printed_configurations_hide_the_page_unless_it_is_public(directory: Path, proxy: str) -> None:
    text = METRICS.replace('"nginx"', f'"{proxy}"')
    if proxy != "nginx" and proxy != "h2o":
        text = text.replace('target = "/_files/"\n', "")
    closed, opened = (load(directory, text + public) for public in ("", "public = true\n"))
    assert "metrics" not in config_for(closed, proxy, listen="127.0.0.1:8080", service=None, relative_to=None)
    assert "metrics" in config_for(opened, proxy, listen="127.0.0.1:8080", service=None, relative_to=None)


@pytest.mark.parametrize(
    "table, problem",
    [
        ("[metrics]\npublik = true", "metrics.publik: unknown key: did you mean 'public'?"),
        ('[metrics]\ndirectory = "none"', "metrics: the directory '"),
    ],
)
def test_wrong_settings_are_refused(directory: Path, table: str, problem: str) -> None:
    assert problem in refusal(directory, SETTINGS + table)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_workers_add_up_their_numbers_also_when_one_is_killed(directory: Path) -> None:
    text = METRICS.partition("[offload]")[0]
    load(directory, f'{text}[server]\npid_file = "pid"\n')
    port = free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "downloadview.toml"]
    command += ["--port", str(port), "--workers", "2"]

    def numbers() -> tuple[float, float]:
        connection = get_text(port)
        of_files = read(connection, "requests_total", "route").get(("/files/{path:path}",), 0)
        return of_files, read(connection, "processes")[()]

    with serving(command, port, log=directory / "log", cwd=directory) as server:
        server.wait_for_log("Listening on ")  # when the parent knows that both are ready
        load(directory, f'{text}[server]\npid_file = "pid"\n[metrics]\n')  # the metrics begin by a reload
        reload_by_pid_file(str(directory / "pid"), seconds=60)
        place = shared_of(server.process.pid)
        assert len(place) == 1
        for _ in range(40):
            get(port, "/files/a.txt")
        wait_until(lambda: numbers() == (40, 2))
        wait_until(lambda: len(worker_pids(server)) == 2)  # the old ones have ended
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        server.wait_for_log("Application startup complete", times=5)
        wait_until(lambda: numbers() == (40, 2))
        get(port, "/files/a.txt")
        wait_until(lambda: numbers() == (41, 2))
        assert server.stop() == 0
    assert not any(path.exists() for path in place)


def get_text(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def shared_of(pid: int) -> set[Path]:
    """Return the directories of metrics that a process keeps open."""
    files = [Path(os.path.realpath(link)) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {file.parent for file in files if file.parent.name.startswith("downloadview-metrics-")}


def test_directories_that_killed_processes_have_left_are_removed(directory: Path) -> None:
    settings = load(directory, METRICS)
    with SharedDirectory() as shared:
        shared.added_to(settings)
        (place,) = shared_of(os.getpid())
        left = place.with_name(f"downloadview-metrics-{os.getpid()}-left")
        left.mkdir()
        (left / "owner").touch()
        with SharedDirectory() as another:
            another.added_to(settings)
            assert not left.exists()
            assert place.exists()  # its process runs
    assert not place.exists()
