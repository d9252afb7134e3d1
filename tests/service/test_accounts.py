"""The service's `[accounts]`: listeners of the settings, ids of requests, and a running service that is stopped."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from downloadview_async import ConfigurationError
from downloadview_async.service.app import build
from tests.servers import free_port, serving
from tests.service.loading import FILES, load
from tests.service.test_drain import worker_pids

SETTINGS = f"""{FILES}list = true
[server]
http = "auto"
[accounts]
listeners = ["hook:outcomes:note"]
"""
OUTCOMES = """
import json

async def note(outcome):
    with open("outcomes.jsonl", "a") as file:
        names = "request_id", "client", "route", "source", "name", "status", "kind", "result", "reason", "sent"
        print(json.dumps({name: getattr(outcome, name) for name in names}), file=file)
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.txt").write_bytes(b"0123456789")
    with (tmp_path / "files/huge.bin").open("wb") as file:
        file.truncate(64 << 20)
    (tmp_path / "outcomes.py").write_text(OUTCOMES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("outcomes", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def lines_of(directory: Path) -> list[dict[str, Any]]:
    file = directory / "outcomes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_each_answer_is_told(directory: Path) -> None:
    with TestClient(build(load(directory, SETTINGS)), raise_server_exceptions=False) as client:
        answer = client.get("/files/a.txt")
        assert len(answer.headers["x-request-id"]) == 32
        client.get("/files/")
        client.get("/files/none")
        client.get("/-/livez")
    first, listing, missing, page = lines_of(directory)
    assert first == {
        "request_id": answer.headers["x-request-id"],
        "client": "testclient",
        "route": "/files/{path:path}",
        "source": "files",
        "name": "a.txt",
        "status": 200,
        "kind": "inline",
        "result": "completed",
        "reason": None,
        "sent": 10,
    }
    assert (listing["kind"], missing["result"], page["route"]) == ("listing", "refused", "/-/livez")


def test_without_a_listener_nothing_is_added(directory: Path) -> None:
    with TestClient(build(load(directory, SETTINGS.partition("[accounts]")[0]))) as client:
        assert "x-request-id" not in client.get("/files/a.txt").headers


def test_with_traces_each_request_has_a_span(directory: Path) -> None:
    """The global provider belongs to the process, so another process makes the spans."""
    load(directory, SETTINGS.partition("[accounts]")[0] + "[accounts]\ntraces = true\n")
    script = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from starlette.testclient import TestClient
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
trace.set_tracer_provider(TracerProvider())
exporter = ConsoleSpanExporter(formatter=lambda span: f"{span.name} {span.attributes['http.response.body.size']}\\n")
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
with TestClient(build(load_settings("downloadview.toml", environ={}))) as client:
    client.get("/files/a.txt")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.stdout == "GET /files/{path:path} 10\n", done.stderr


@pytest.mark.parametrize(
    "listeners, problem",
    [
        (
            '["outcomes:note"]',
            'accounts.listeners[0]: the text has the wrong form: give a list of "hook:module:function"',
        ),
        ('["hook:outcomes:none"]', "accounts.listeners[0]: 'outcomes:none' cannot be imported"),
        ('"hook:outcomes:note"', "accounts.listeners: expected array, got str: give a list of"),
    ],
)
def test_wrong_listeners_are_refused(directory: Path, listeners: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        build(load(directory, SETTINGS.replace('["hook:outcomes:note"]', listeners)))
    assert problem in str(refused.value)


def ask(port: int, target: str, *fields: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(20)
    client.sendall("\r\n".join([f"GET {target} HTTP/1.1", "Host: x", *fields, "", ""]).encode())
    return client


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_running_service_tells_all_before_it_ends(directory: Path, workers: int) -> None:
    load(directory, SETTINGS)
    port = free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "downloadview.toml"]
    env = {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "DOWNLOADVIEW_SERVER__TIMEOUT_GRACEFUL_SHUTDOWN": "1",
        "DOWNLOADVIEW_SERVER__WORKERS": str(workers),
        "DOWNLOADVIEW_SERVER__PORT": str(port),
    }
    with serving(command, port, log=directory / "log", env=env, cwd=directory) as server:
        proxied = ("X-Request-Id: from-the-proxy", "X-Forwarded-For: 192.0.2.7", "Connection: close")
        with ask(port, "/files/a.txt", *proxied) as client:
            assert b"x-request-id: from-the-proxy" in client.recv(1 << 16)
        with ask(port, "/files/huge.bin") as slow:
            assert slow.recv(1)
            time.sleep(0.2)
            server.stop()
    of_proxy = [line for line in lines_of(directory) if line["request_id"] == "from-the-proxy"]
    assert [(line["client"], line["sent"], line["kind"]) for line in of_proxy] == [("192.0.2.7", 10, "inline")]
    of_slow = [line for line in lines_of(directory) if line["name"] == "huge.bin"]
    assert [(line["result"], line["reason"]) for line in of_slow] == [("aborted", "server-stopped")]
    assert "Traceback" not in server.log


def serve(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "downloadview.toml", *arguments]


@pytest.mark.slow
def test_the_service_runs_without_the_database_server_in_which_it_counts(directory: Path) -> None:
    """A worker that is replaced meanwhile does not end it, either."""
    pytest.importorskip("asyncpg", reason="PostgreSQL: asyncpg is not installed")
    port, of_database = free_port(), free_port()
    load(directory, SETTINGS + f'database = "postgresql+asyncpg://127.0.0.1:{of_database}/none"\n')
    with serving(serve("--port", str(port), "--workers", "2"), port, log=directory / "log", cwd=directory) as server:
        server.wait_for_log("Listening on ")  # when the parent knows that both are ready
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        server.wait_for_log("Application startup complete", times=3)
        with ask(port, "/files/a.txt", "Connection: close") as client:
            assert client.makefile("rb").read().endswith(b"0123456789")
        assert server.stop() == 0
        warning = "accounts.database: the database cannot be used (ConnectionRefusedError: "
        assert server.log.count(warning) == 3
        assert "1 answers were not counted before the end" in server.log
    report = [*serve()[:3], "report", "--config", "downloadview.toml"]
    refused = subprocess.run(report, cwd=directory, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert warning in refused.stderr


@pytest.mark.slow
def test_the_service_starts_while_the_database_is_locked_and_counts_later(directory: Path) -> None:
    load(directory, SETTINGS + 'database = "sqlite+aiosqlite:///accounts.db"\n')
    port = free_port()
    with contextlib.closing(sqlite3.connect(directory / "accounts.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with serving(serve("--port", str(port)), port, log=directory / "log", cwd=directory) as server:
            with ask(port, "/files/a.txt", "Connection: close") as client:
                assert client.makefile("rb").read().endswith(b"0123456789")
            other.execute("COMMIT")
            assert server.stop() == 0
            assert "the database cannot be used (OperationalError: database is locked)" in server.log
        other.execute("PRAGMA wal_checkpoint")
        assert other.execute("SELECT file, downloads FROM downloadview_totals").fetchall() == [("a.txt", 1)]
