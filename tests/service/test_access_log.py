"""The service's `[log]`: a line for each answer, whatever the server, without losing the prepared head."""

import asyncio
import http.client
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.service.app import build
from downloadview_async.service.settings import LogSettings
from tests.live import live, make_old
from tests.servers import free_port, serving
from tests.service.loading import FILES, load, refusal

SETTINGS = f"""{FILES}[log]
format = "json"
path = "logs/access.log"
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.bin").write_bytes(bytes(10_240))
    (tmp_path / "downloadview.toml").write_text(SETTINGS)
    return tmp_path


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_lines(file: Path, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 30
    while len(lines := lines_of(file)) < count:
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)
    return lines


def get(port: int, target: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", target, headers={"Connection": "close", "Authorization": "Basic c2VjcmV0OnNlY3JldA=="})
    answer = connection.getresponse()
    answer.read()
    return answer


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_running_service_writes_a_line_for_each_answer_and_lets_the_file_be_rotated(
    directory: Path, workers: str
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--port", str(port), "--workers", workers]
    file = directory / "logs/access.log"
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        get(port, "/files/a.bin?token=secret")
        missing = get(port, "/files/missing?token=secret")
        lines = wait_for_lines(file, 2)  # of two workers, which do not wait for each other
        first, refused = sorted(lines, key=lambda line: str(line["path"]))
        assert (first["path"], first["bytes"], first["result"]) == ("/files/a.bin", 10_240, "completed")
        assert (refused["status"], refused["result"]) == (404, "refused")
        assert missing.headers["x-request-id"] == refused["request_id"]
        server.wait_for_log(f"(request {refused['request_id']})")
        file.rename(file.with_suffix(".1"))
        server.process.send_signal(signal.SIGHUP)  # as a rule of logrotate may do; nothing is needed
        server.wait_for_log("The settings have been read again")
        get(port, "/files/a.bin")
        assert len(wait_for_lines(file, 1)) == 1
        assert len(lines_of(file.with_suffix(".1"))) == 2
        assert server.stop() == 0
        written = server.log + file.read_text() + file.with_suffix(".1").read_text()
    assert "secret" not in written
    assert "c2Vjc" not in written
    assert '"GET /files' not in server.log  # uvicorn writes no lines


class _Recording(asyncio.Transport):
    """A transport that notes how long each write is."""

    def __init__(self, transport: Any, writes: list[int]) -> None:
        self._transport = transport
        self.writes = writes

    def write(self, data: Any) -> None:
        self.writes.append(len(data))
        self._transport.write(data)

    def __getattribute__(self, name: str) -> Any:
        if name in ("_transport", "write", "writes"):
            return object.__getattribute__(self, name)
        return getattr(self._transport, name)


@pytest.mark.asyncio
async def test_the_prepared_head_leaves_with_its_body_while_the_log_is_written(directory: Path) -> None:
    writes: list[int] = []

    class Protocol(DownloadProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Recording(transport, writes))

    make_old(directory)
    app = build(load(directory, SETTINGS))
    async with live(app, http=Protocol) as port:

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            for _ in range(3):
                connection.request("GET", "/files/a.bin")
                assert len(connection.getresponse().read()) == 10_240
            connection.close()

        await asyncio.to_thread(ask)
        assert len(writes) >= 3
        assert writes[-1] > 10_240  # with the head
        assert await asyncio.to_thread(wait_for_lines, directory / "logs/access.log", 3)


@pytest.mark.parametrize(
    "table, environ, expected",
    [
        ("", {}, LogSettings()),
        ("", {"DOWNLOADVIEW_SERVER__ACCESS_LOG": "false"}, None),
        ("", {"DOWNLOADVIEW_SERVER__LOG_LEVEL": "warning"}, None),
        ('[log]\nformat = "combined"', {}, LogSettings(format="combined")),
        ('[log]\nformat = "combined"', {"DOWNLOADVIEW_SERVER__LOG_LEVEL": "error"}, LogSettings(format="combined")),
        ('[log]\nformat = "combined"', {"DOWNLOADVIEW_SERVER__ACCESS_LOG": "false"}, None),
    ],
)
def test_when_downloadview_serve_writes_a_log(
    directory: Path, table: str, environ: dict[str, str], expected: LogSettings | None
) -> None:
    assert load(directory, SETTINGS.partition("[log]")[0] + table, **environ).of_own_server().log == expected


def test_under_another_server_only_a_table_makes_a_log(directory: Path) -> None:
    with TestClient(build(load(directory, SETTINGS))) as client:
        client.get("/files/a.bin")
    assert len(lines_of(directory / "logs/access.log")) == 1
    app = build(load(directory, SETTINGS.partition("[log]")[0]))
    with TestClient(app) as client:
        assert "x-request-id" not in client.get("/files/a.bin").headers


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ('"json"', '"jsn"', "log.format: invalid enum value 'jsn': give text for people, json for programs, or"),
        ('path = "logs', 'file = "logs', "log.file: unknown key: use one of format, path"),
        ("logs/access.log", "none/access.log", "log.path: the log '"),
        ("logs/access.log", "files", "cannot be written (Is a directory)"),
    ],
)
def test_wrong_settings_are_refused(directory: Path, old: str, new: str, problem: str) -> None:
    assert old in SETTINGS
    assert problem in refusal(directory, SETTINGS.replace(old, new))
