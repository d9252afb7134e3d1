import base64
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from downloadview_async import __version__
from downloadview_async.cli import main, serve
from downloadview_async.service.access import trusted_proxies
from downloadview_async.service.config_loader import CONFIG, load_settings
from downloadview_async.service.schema import description_of
from downloadview_async.service.serve_paths import urls_of, variables_of
from downloadview_async.service.settings import ServerSettings
from tests.servers import PROJECT, Server, demo, free_port, serving

COMMAND = [sys.executable, "-m", "downloadview_async.cli", "serve"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
PATH_OPTIONS = ("paths", "config", "hidden", "title", "users", "share", "qr", "watch")
WORKERS = ["1", pytest.param("2", marks=pytest.mark.slow)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(b"0123456789")
    (tmp_path / "downloadview.toml").write_text(
        '[sources.files]\ntype = "path"\nroot = "files"\n[[routes]]\npath = "/f/{path:path}"\nsource = "files"\n'
    )
    return tmp_path


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
        return body


def get_over(connection: socket.socket, path: str) -> bytes:
    with connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def refused(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, command: str = "serve") -> str:
    """Call the command here, which must end with 2 and print nothing; return what it writes to standard error."""
    known = {
        CONFIG,
        *(f"DOWNLOADVIEW_{name}" for name in ("SOURCES", "ROUTES", "PAGES", "LINKS", "USERS")),
    }  # the command sets them
    known |= {name for name in os.environ if name.startswith("DOWNLOADVIEW_")}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.chdir(cwd):
            port = {"DOWNLOADVIEW_SERVER__PORT": str(free_port())}  # the service may run on the one that is the default
            run = CliRunner(env=dict.fromkeys(known) | port | dict(env or {})).invoke(main, [command, *arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert run.exit_code == 2, run.output
    assert isinstance(run.exception, SystemExit)
    assert run.stdout == ""
    return run.stderr


def refused_by_a_process(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run the command, which must end with 2 and without a traceback; return what it says on standard error."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
    run = subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environ | {"DOWNLOADVIEW_SERVER__PORT": str(free_port())} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_serve_a_directory(directory: Path, number: int) -> None:
    port = free_port()
    command = [*COMMAND, str(directory / "files"), "--port", str(port)]
    with serving(command, port, log=directory / "log") as server:
        assert get(f"{server.url}/files/a.txt") == b"0123456789"
        page = get(f"{server.url}/")
        assert b"<title>files</title>" in page
        assert b">a.txt</a>" in page
        server.wait_for_log(f"{server.url}/files/\n")
        assert get(f"{server.url}/-/readyz") == b"ready\n"
        assert server.stop(number) == 0
        assert "Traceback" not in server.log
        assert "Finished server process" in server.log


def test_serve_some_files_and_directories(directory: Path) -> None:
    (directory / "more").mkdir()
    (directory / "more" / "b c.txt").write_text("inside")
    port = free_port()
    command = [*COMMAND, "files", "more/b c.txt", "--port", str(port), "--title", "Ours & yours"]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        page = get(f"{server.url}/")
        assert b"<title>Ours &amp; yours</title>" in page
        assert b">b c.txt</a>" in page
        assert get(f"{server.url}/files/b%20c.txt") == b"inside"
        assert b">a.txt</a>" in get(f"{server.url}/files/files/")
        assert get(f"{server.url}/files/files/a.txt") == b"0123456789"
        for missing in ("downloadview.toml", "more/b%20c.txt", "files", "b%20c.txt/x", "files/none", "nothing/"):
            with contextlib.suppress(urllib.error.HTTPError):
                assert get(f"{server.url}/files/{missing}").startswith(b"<!doctype html>"), missing
                assert missing == "files"  # which redirects to the folder
        server.wait_for_log(f"{server.url}/files/\n")


def test_serve_files_with_any_name(directory: Path) -> None:
    (directory / "target.txt").write_text("0123456789")
    (directory / "named").mkdir()
    (directory / "named" / "con").write_text("0123456789")
    (directory / "named" / "12:30.log").symlink_to("../target.txt")
    port = free_port()
    command = [*COMMAND, "named/12:30.log", "named/con", "--port", str(port)]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        for path in ("12%3A30.log", "con", ".//con"):
            assert get(f"{server.url}/files/{path}") == b"0123456789"
    command = [*COMMAND, "named", "--port", str(port)]
    (directory / "named" / "12:30.txt").write_text("0123456789")
    with serving(command, port, log=directory / "log2", cwd=directory) as server:
        assert b"12:30.txt" in get(f"{server.url}/files/")
        assert get(f"{server.url}/files/12%3A30.txt") == b"0123456789"


def test_a_current_directory_that_was_removed(directory: Path) -> None:
    (directory / "gone").mkdir()
    script = "import os; from downloadview_async.cli import main; os.rmdir('../gone'); main()"
    command = [sys.executable, "-c", script, "serve", str(directory / "files")]
    run = subprocess.run(command, cwd=directory / "gone", capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "the current directory has been removed" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("share", [[], ["--share", "2h"]])
def test_the_url_of_a_server_below_a_root_path_works(directory: Path, share: list[str]) -> None:
    port = free_port()
    command = [*COMMAND, "files/a.txt", "--port", str(port), "--root-path", "/below", *share]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        url = re.search(rf"^{re.escape(server.url)}/files/\S+$", server.log, re.MULTILINE)
        assert url is not None
        assert get(url[0]) == b"0123456789"


def test_serve_signed_links_alone(directory: Path) -> None:
    port = free_port()
    command = [*COMMAND, "files/a.txt", "--port", str(port), "--share", "2h", "--qr"]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        link = re.search(rf"^{re.escape(server.url)}/files/a\.txt\?\S+$", server.log, re.MULTILINE)
        assert link is not None
        assert get(link[0]) == b"0123456789"
        for path in ("/files/a.txt", "/files/", f"/files/?{link[0].partition('?')[2]}"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get(server.url + path)


def test_serve_a_signed_link_to_a_directory(directory: Path) -> None:
    (directory / "files" / "sub").mkdir()
    (directory / "files" / "sub" / "b.txt").write_text("b")
    (directory / "files" / ".env").write_text("secret")
    port = free_port()
    command = [*COMMAND, "files", "--port", str(port), "--share", "2h", "--qr"]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        match = re.search(rf"^{re.escape(server.url)}/files/(\?\S+)$", server.log, re.MULTILINE)
        assert match is not None
        link = match[1]
        page = get(f"{server.url}/files/{link}").decode()
        assert f'<a href="a.txt{link}">' in page
        assert ".env" not in page
        assert get(f"{server.url}/files/a.txt{link}") == b"0123456789"
        assert get(f"{server.url}/files/sub/b.txt{link}&view").startswith(b"<!doctype html>")
        with zipfile.ZipFile(io.BytesIO(get(f"{server.url}/files/{link}&archive=zip"))) as archive:
            assert archive.read("sub/b.txt") == b"b"
            assert ".env" not in archive.namelist()
        for path, status in (("/files/", 403), ("/files/a.txt", 403), (f"/files/.env{link}", 404), (f"/{link}", 403)):
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                get(server.url + path)
        server.wait_for_log("/files/sub/b.txt HTTP")
        logged = server.log.replace(match[0], "")
        assert link.rpartition("&s=")[2] not in logged


def test_serve_to_users_alone(directory: Path) -> None:
    port = free_port()
    command = [*COMMAND, "files", "--port", str(port), "--user", "ada:correct horse"]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{server.url}/files/")
        credentials = base64.b64encode(b"ada:correct horse").decode()
        request = urllib.request.Request(f"{server.url}/files/", headers={"Authorization": f"Basic {credentials}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert b">a.txt</a>" in answer.read()
        assert "correct horse" not in server.log


@pytest.mark.parametrize(
    "host, paths, share, expected",
    [
        ("127.0.0.1", ["files"], False, ["http://127.0.0.1:8000/files/"]),
        ("::1", ["files"], False, ["http://[::1]:8000/files/"]),
        ("127.0.0.1", ["files/a.txt"], False, ["http://127.0.0.1:8000/files/a.txt"]),
        ("127.0.0.1", ["files/a.txt", "files"], False, ["http://127.0.0.1:8000/files/"]),
        ("0.0.0.0", ["files"], False, ["http://127.0.0.1:8000/files/", r"http://[0-9.]+:8000/files/"]),
        ("127.0.0.1", ["files/a.txt"], True, [r"http://127.0.0.1:8000/files/a.txt\?k=share&i=.+&e=[0-9]+&s=.+"]),
        ("127.0.0.1", ["files"], True, [r"http://127.0.0.1:8000/files/\?k=share&i=.+&e=[0-9]+&b=7&s=.+"]),
        (
            "127.0.0.1",
            ["files/a.txt", "files"],
            True,
            [
                r"http://127.0.0.1:8000/files/a.txt\?k=.+&e=[0-9]+&s=.+",
                r"http://127.0.0.1:8000/files/files/\?k=.+&b=13&s=.+",
            ],
        ),
    ],
)
def test_the_urls_that_work(
    directory: Path, monkeypatch: pytest.MonkeyPatch, host: str, paths: list[str], share: bool, expected: list[str]
) -> None:
    monkeypatch.chdir(directory)
    variables = variables_of(paths, hidden=False, title=None, users=[], share="1h" if share else None)
    urls = urls_of(load_settings(None, environ=variables, options={"host": host}), paths, share=share)
    assert len(urls) in {len(expected), 1 if host == "0.0.0.0" else len(expected)}  # a machine without a network
    for url, pattern in zip(urls, expected, strict=False):
        assert url == pattern or re.fullmatch(pattern, url)


def test_mistakes_with_paths_are_refused(directory: Path) -> None:
    (directory / "more").mkdir()
    (directory / "more" / "a.txt").touch()
    (directory / ".env").touch()
    twice = refused("files/a.txt", "more/a.txt", cwd=directory)
    assert twice == "downloadview: two of the paths have the name 'a.txt': rename one, or leave it out\n"
    assert "--title is 'a\\nb': give a text" in refused("files", "--title", "a\nb", cwd=directory)
    assert "'.env' begins with a dot: add --hidden" in refused(".env", cwd=directory)
    for share in ("soon", "2", "0h"):  # a number alone may have been meant as hours
        assert f"--share is {share!r}: give a time" in refused("files/a.txt", "--share", share, cwd=directory)
    assert "--user takes NAME:PASSWORD" in refused("files", "--user", "ada:", cwd=directory)
    assert "--user takes NAME:PASSWORD" in refused("files", "--user", "", cwd=directory)
    for name in ("#ada", "ada ", "a\nda"):
        assert f"--user has the name {name!r}" in refused("files", "--user", f"{name}:x", cwd=directory)
    assert "--user has the name 'ada' twice" in refused("files", "--user", "ada:x", "--user", "ada:y", cwd=directory)
    not_text = os.fsdecode(b"a\xff.txt")
    (directory / not_text).touch()
    assert r"no URL can have the name 'a\udcff.txt': rename it" in refused(not_text, cwd=directory)
    for option in (["--title", "x"], ["--user", "ada:x"], ["--share", "2h"], ["--qr"], ["--hidden"]):
        assert f"{option[0]} needs PATH" in refused(*option, cwd=directory)


@pytest.mark.parametrize(
    "arguments, env, cwd",
    [
        (["--config", "downloadview.toml"], {}, "."),
        (["--config", "../downloadview.toml"], {}, "files"),
        ([], {}, "."),  # the file of the current directory
        ([], {"DOWNLOADVIEW_CONFIG": "../downloadview.toml"}, "files"),
    ],
)
def test_serve_finds_its_settings(directory: Path, arguments: list[str], env: dict[str, str], cwd: str) -> None:
    port = free_port()
    command = [*COMMAND, *arguments, "--port", str(port)]
    with serving(command, port, log=directory / "log", env=env, cwd=directory / cwd) as server:
        assert get(f"{server.url}/f/a.txt") == b"0123456789"


@pytest.mark.parametrize("workers", WORKERS)
def test_the_access_log_has_no_queries(directory: Path, workers: str) -> None:
    """There may be the token of a signed link in one."""
    port = free_port()
    command = [*COMMAND, ".", "--port", str(port), "--workers", workers]
    with serving(command, port, log=directory / "log", cwd=directory / "files") as server:
        assert get(f"{server.url}/files/a.txt?token=secret") == b"0123456789"
        server.wait_for_log('"GET /files/a.txt HTTP/1.1" 200')
        assert "secret" not in server.log


def test_options_win_over_variables_and_those_over_the_file(directory: Path) -> None:
    first, second = free_port(), free_port()
    env = {"DOWNLOADVIEW_SERVER__PORT": str(first), "DOWNLOADVIEW_SERVER__ACCESS_LOG": "false"}
    with (directory / "downloadview.toml").open("a") as file:
        file.write(f'[server]\nport = 1\nuds = "{directory}/socket"\n')
    command = [*COMMAND, "--config", str(directory / "downloadview.toml"), "--port", str(second)]
    with serving(command, second, log=directory / "log", env=env) as server:
        get(f"{server.url}/-/livez")
        assert "/-/livez" not in server.log
        assert not (directory / "socket").exists()  # the port that was asked for, not the file's socket


@pytest.mark.parametrize("workers", WORKERS)
def test_unix_socket(directory: Path, workers: str) -> None:
    path = str(directory / "socket")
    command = [*COMMAND, str(directory / "files"), "--uds", path, "--workers", workers]
    with serving(command, path, log=directory / "log") as server:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        assert get_over(connection, "/files/a.txt").endswith(b"\r\n\r\n0123456789")
        assert server.stop() == 0
    assert not os.path.exists(path)


def test_an_open_socket_by_its_number(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        command = [*COMMAND, str(directory / "files"), "--fd", str(listener.fileno())]
        with serving(command, port, log=directory / "log", pass_fds=[listener.fileno()]) as server:
            server.wait_for_log("Application startup complete")
            assert get(f"{server.url}/files/a.txt") == b"0123456789"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("by_path", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_workers(directory: Path, number: int, by_path: bool) -> None:
    port = free_port()
    what = [str(directory / "files")] if by_path else ["--config", str(directory / "downloadview.toml")]
    command = [*COMMAND, *what, "--port", str(port), "--workers", "2"]
    with serving(command, port, log=directory / "log") as server:
        for _ in range(10):
            assert get(f"{server.url}{'/files' if by_path else '/f'}/a.txt") == b"0123456789"
        server.wait_for_log("Started server process", times=2)
        assert server.stop(number) == 0
        assert "Traceback" not in server.log


def stop_while_downloading(server: Server, number: int) -> int:
    """Begin a download, stop the server while the client does not read, and return the exit status."""
    with socket.create_connection(("127.0.0.1", int(server.address))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /reports/large.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(16) == b"HTTP/1.1 200 OK\r"
        return server.stop(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_during_a_download_waits_its_time_and_leaves_no_traceback(tmp_path: Path, number: int) -> None:
    with demo(tmp_path / "log", arguments=["--timeout-graceful-shutdown", "1"]) as server:
        assert stop_while_downloading(server, number) == 0
        assert "Traceback" not in server.log
        assert server.log.count("Transfer aborted: ") == 1


@pytest.mark.slow
def test_a_second_interrupt_ends_the_download_at_once_and_in_one_line(tmp_path: Path) -> None:
    with (
        demo(tmp_path / "log") as server,
        socket.create_connection(("127.0.0.1", int(server.address))) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /reports/large.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(16) == b"HTTP/1.1 200 OK\r"
        server.process.send_signal(signal.SIGINT)
        server.wait_for_log("Waiting for connections to close")
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.log
        assert server.log.count("Transfer aborted: the server stops") == 1
        assert server.log.count("ERROR") == 1
        assert "The server ends at once" in server.log


@pytest.mark.slow
def test_a_download_that_ends_in_time_is_not_cut(tmp_path: Path) -> None:
    with demo(tmp_path / "log") as server:
        with urllib.request.urlopen(f"{server.url}/reports/large.txt") as answer:
            answer.read(1)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("Waiting for connections to close")
            assert len(answer.read()) == 100_000_000 - 1
        assert server.process.wait(30) == 0  # by the one signal: a second could meet an interpreter without handlers


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_a_hangup_cuts_no_download_and_ends_nothing(tmp_path: Path, workers: str) -> None:
    with demo(tmp_path / "log", arguments=["--workers", workers, "--timeout-graceful-shutdown", "1"]) as server:
        server.wait_for_log("Application startup complete", times=int(workers))
        with urllib.request.urlopen(f"{server.url}/reports/large.txt") as answer:
            answer.read(1)
            os.killpg(server.process.pid, signal.SIGHUP)  # as a terminal does
            server.wait_for_log("The settings have been read again, and are in use")
            assert get(f"{server.url}/-/livez") == b"alive\n"
            assert len(answer.read()) == 100_000_000 - 1
        assert server.log.count("Started server process") == (1 if workers == "1" else 4)
        assert server.stop() == 0
        assert "Traceback" not in server.log


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("by", ["port", "uds"])
def test_a_connection_that_no_worker_would_answer_is_refused(tmp_path: Path, workers: str, by: str) -> None:
    """While the last downloads are sent, after the signal to end."""
    address: Any = str(tmp_path / "socket") if by == "uds" else free_port()
    arguments = ["--uds", str(address)] if by == "uds" else ["--port", str(address)]
    subprocess.run([sys.executable, "-m", "app.demo"], cwd=PROJECT, check=True)
    command = [*COMMAND, "--config", "app/downloadview.toml", "--workers", workers, *arguments]

    def connect(client: socket.socket) -> socket.socket:
        client.settimeout(30)
        client.connect(address if by == "uds" else ("127.0.0.1", address))
        return client

    family = socket.AF_UNIX if by == "uds" else socket.AF_INET

    with serving(command, address, log=tmp_path / "log") as server:
        server.wait_for_log("Application startup complete", times=int(workers))
        with connect(socket.socket(family)) as client:
            client.sendall(b"GET /reports/large.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            received = len(client.recv(1024))
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("Waiting for connections to close")
            server.wait_for_log("Shutting down", times=int(workers))
            while True:  # until the last of them has closed its socket, a request may still be answered
                with socket.socket(family) as another, contextlib.suppress(ConnectionError, FileNotFoundError):
                    connect(another)
                    assert server.process.poll() is None
                    continue
                break
            assert server.process.poll() is None
            while chunk := client.recv(1 << 20):
                received += len(chunk)
        assert received > 100_000_000
        assert server.process.wait(30) == 0


def test_a_transfer_that_fails_in_the_middle_is_one_log_line(directory: Path) -> None:
    large = directory / "files" / "large.bin"
    large.write_bytes(bytes(64 * 1024 * 1024))
    port = free_port()
    with serving([*COMMAND, str(directory / "files"), "--port", str(port)], port, log=directory / "log") as server:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            received = len(client.recv(1024))
            os.truncate(large, 1024)
            while chunk := client.recv(1 << 20):
                received += len(chunk)
        server.wait_for_log("Transfer aborted: ")
        assert received < 64 * 1024 * 1024
        assert "Traceback" not in server.log
        assert server.log.count("Transfer aborted: ") == 1


def test_a_refused_start_is_one_line_and_status_2(directory: Path) -> None:
    (directory / "bad.toml").write_text("[server]\nprot = 1\n")
    assert refused_by_a_process("--config", "bad.toml", cwd=directory) == (
        "downloadview: bad.toml: server.prot: unknown key: did you mean 'port'?\n"
    )
    assert "nothing to serve: give files or directories, or settings with --config" in refused(cwd=directory / "files")
    assert "the command line: server.port: expected int <= 65535" in refused("--port", "65536", cwd=directory)
    assert "the command line: server.log_level" in refused("--log-level", "loud", cwd=directory)
    assert "server.uds: the directory of" in refused("--uds", "gone/socket", cwd=directory)
    assert "Path 'gone' does not exist" in refused("gone", cwd=directory)
    assert "is a file: for settings use --config bad.toml" in refused("bad.toml", cwd=directory)
    assert "'abc' is not a valid integer" in refused("--port", "abc", cwd=directory)
    assert "exclude each other" in refused("files", "--config", "downloadview.toml", cwd=directory)
    wrong = {"DOWNLOADVIEW_SOURCES__FILES__ROOT": "gone"}
    assert "DOWNLOADVIEW_SOURCES__FILES__ROOT: sources.files.root: the root" in refused(cwd=directory, env=wrong)
    assert "sources.files.root: the root" in refused("--workers", "2", cwd=directory, env=wrong)


def write_documents(directory: Path, database: str, table: str = "documents") -> None:
    with sqlite3.connect(directory / "documents.db") as connection:
        connection.execute("CREATE TABLE documents (key TEXT, path TEXT)")
    connection.close()
    with (directory / "downloadview.toml").open("a") as file:
        file.write(
            f'[sources.documents]\ntype = "object"\ndatabase = "{database}"\ntable = "{table}"\n'
            'key = "key"\nfile = "path"\nsource = "files"\n'
        )


@pytest.mark.parametrize("workers", WORKERS)
def test_a_table_that_is_not_there_is_refused_before_any_worker_starts(directory: Path, workers: str) -> None:
    write_documents(directory, "sqlite+aiosqlite:///documents.db", "dokuments")
    said = refused_by_a_process("--port", "0", "--workers", workers, cwd=directory)
    assert said == (
        "downloadview: downloadview.toml: sources.documents: the database has no table 'dokuments': create it, or "
        "correct `table`\n"
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_a_database_that_does_not_answer_yet_is_worth_another_try(directory: Path, workers: str) -> None:
    write_documents(directory, "sqlite+aiosqlite:///documents.db")
    (directory / "documents.db-wal").mkdir()  # SQLite can open the file, but not use it
    command = [*COMMAND, "--port", "0", "--workers", workers]
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stderr.count("\n")) == (3, 1), run.stderr
    assert "sources.documents: the database cannot be read" in run.stderr


def test_a_certificate_that_cannot_be_used_is_refused(directory: Path) -> None:
    (directory / "no.pem").write_text("no certificate")
    cases = [
        (["--ssl-certfile", "gone.pem"], "server.ssl_certfile: 'gone.pem' cannot be read (No such file or directory)"),
        (["--ssl-keyfile", "no.pem"], "server.ssl_keyfile: a key without a certificate: give ssl_certfile too"),
        (["--ssl-certfile", "no.pem"], "server.ssl_certfile: the certificate and its key cannot be loaded"),
        (["--ssl-certfile", "no.pem", "--ssl-keyfile", "gone"], "server.ssl_keyfile: 'gone' cannot be read"),
    ]
    with socket.create_server(("127.0.0.1", 0)) as taken:  # this would be worth another try
        port = str(taken.getsockname()[1])
        for arguments, message in cases:
            for workers in ("1", "2"):
                said = refused(*arguments, "--workers", workers, "--port", port, cwd=directory)
                assert said.startswith(f"downloadview: the command line: {message}")
                assert said.count("\n") == 1


@pytest.mark.parametrize("address", ["1.2.3.4.5/99", "10.0.0.1/8", "1.2.3", "::1::", "127.0.0.1, 10.0.0.0/33"])
def test_trusted_addresses_that_uvicorn_would_ignore_are_refused(directory: Path, address: str) -> None:
    said = refused("--forwarded-allow-ips", address, "--port", "0", cwd=directory)
    problem = f"server.forwarded_allow_ips: {address.split(', ')[-1]!r} is not an address, and not a network"
    assert said.startswith(f"downloadview: the command line: {problem}")


@pytest.mark.parametrize("address", ["*", "", "localhost", "127.0.0.1, ::1,10.0.0.0/8", "fe80::/10"])
def test_trusted_addresses(address: str) -> None:
    settings = load_settings(None, environ={"DOWNLOADVIEW_SERVER__FORWARDED_ALLOW_IPS": address})
    assert ",".join(trusted_proxies(settings)) == address.replace(" ", "")


def make_certificate(directory: Path, *protection: str) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *files, *protection], cwd=directory, check=True, capture_output=True)


openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: apt install openssl")


@openssl
def test_a_key_with_a_password_is_refused_without_it(directory: Path) -> None:
    make_certificate(directory, "-passout", "pass:secret")
    said = refused("--ssl-certfile", "cert.pem", "--ssl-keyfile", "key.pem", cwd=directory)
    assert "server.ssl_certfile: the certificate and its key cannot be loaded" in said
    assert "ssl_keyfile_password" in said


@openssl
@pytest.mark.parametrize("workers", WORKERS)
def test_https_with_a_certificate_beside_the_settings(directory: Path, workers: str) -> None:
    make_certificate(directory, "-nodes")
    with (directory / "downloadview.toml").open("a") as file:
        file.write('[server]\nssl_certfile = "cert.pem"\nssl_keyfile = "key.pem"\n')
    port = free_port()
    command = [*COMMAND, "--config", "../downloadview.toml", "--port", str(port), "--workers", workers]
    trusting = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    with serving(command, port, log=directory / "log", cwd=directory / "files") as server:
        server.wait_for_log("Application startup complete")
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/f/a.txt", context=trusting, timeout=10) as answer:
            assert answer.read() == b"0123456789"


@pytest.mark.parametrize("workers", WORKERS)
def test_a_descriptor_that_is_no_socket_is_refused(directory: Path, workers: str) -> None:
    said = refused_by_a_process("--fd", "77", "--workers", workers, cwd=directory)
    assert said == (
        "downloadview: the command line: server.fd: 77 is not an open socket (Bad file descriptor): give the "
        "descriptor of one that this process inherits\n"
    )
    assert "server.fd: 0 is not an open socket" in refused_by_a_process(
        "--fd", "0", "--workers", workers, cwd=directory
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_a_port_that_is_taken_is_one_line_and_worth_another_try(directory: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*COMMAND, "files", "--port", str(port), "--workers", workers]
        run = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr == (
        f"downloadview: the command line: server.port: cannot listen on 127.0.0.1:{port} (address already in "
        "use): give another, or stop the process that uses it\n"
    )


@pytest.mark.parametrize(
    "host, status, message",
    [
        ("192.0.2.1", 3, "server.host: cannot listen on 192.0.2.1:0 (cannot assign requested address)"),
        ("nothing.invalid", 3, "server.host: 'nothing.invalid' has no address"),
        ("a" * 300, 2, "has no address (encoding with 'idna' codec failed"),
        ("a..b", 2, "server.host: 'a..b' has no address"),
        ("http://127.0.0.1", 3, "give the address alone, such as 127.0.0.1, and the port as server.port"),
        ("127.0.0.1:8000", 3, "give the address alone, such as 127.0.0.1, and the port as server.port"),
    ],
)
def test_an_address_that_is_not_of_this_machine_is_one_line(
    directory: Path, host: str, status: int, message: str
) -> None:
    command = [*COMMAND, "files", "--host", host, "--port", "0"]
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (status, "", 1), run.stderr
    assert message in run.stderr


@pytest.mark.parametrize(
    "path, message",
    [
        ("gone/socket", "the directory of 'gone/socket' is missing"),
        ("files", "'files' exists and is not a socket"),
        ("a" * 200, "is longer than 107 bytes"),
        ("/proc/socket", "the socket '/proc/socket' cannot be created ("),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_unix_socket_that_cannot_be_made_is_one_line(directory: Path, path: str, message: str, workers: str) -> None:
    said = refused("--uds", path, "--workers", workers, cwd=directory)
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_a_unix_socket_that_was_left_behind_is_replaced(directory: Path, workers: str) -> None:
    path = str(directory / "socket")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    command = [*COMMAND, str(directory / "files"), "--uds", path, "--workers", workers]
    with serving(command, path, log=directory / "log"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        assert get_over(connection, "/files/a.txt").endswith(b"\r\n\r\n0123456789")


def test_a_service_without_routes_says_so(directory: Path) -> None:
    (directory / "downloadview.toml").write_text("")
    port = free_port()
    with serving([*COMMAND, "--port", str(port)], port, log=directory / "log", cwd=directory) as server:
        server.wait_for_log("No route is configured, so every download gives 404: add [[routes]] tables")
        assert get(f"{server.url}/-/livez") == b"alive\n"


def test_uvicorn_app_main_refuses_in_one_line(directory: Path) -> None:
    (directory / "bad.toml").write_text("[server]\nprot = 1\n")
    run = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app.main:app"],
        cwd=PROJECT,
        env={**os.environ, "DOWNLOADVIEW_CONFIG": str(directory / "bad.toml")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 3
    assert run.stderr == f"downloadview: {directory / 'bad.toml'}: server.prot: unknown key: did you mean 'port'?\n"


def test_uvicorn_app_main_serves_the_settings_of_the_environment(directory: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port)]
    env = {"DOWNLOADVIEW_CONFIG": str(directory / "downloadview.toml")}
    with serving(command, port, log=directory / "log", env=env) as server:
        assert get(f"{server.url}/f/a.txt") == b"0123456789"


def test_every_server_setting_is_an_option() -> None:
    assert set(ServerSettings.__struct_fields__) == {
        parameter.name for parameter in serve.params if parameter.name not in PATH_OPTIONS
    }


def test_help_and_version() -> None:
    runner = CliRunner()
    assert runner.invoke(main, ["--version"]).output == f"downloadview, version {__version__}\n"
    shown = runner.invoke(main, ["serve", "--help"]).output
    assert "/files/" in shown
    assert "--timeout-graceful-shutdown" in shown
    commands = runner.invoke(main, ["--help"]).output.partition("Commands:")[2]
    assert "serve" in commands
    assert "..." not in commands  # the sentences are whole


@pytest.mark.parametrize(
    "line",
    [
        "--host TEXT The address to listen on, such as 127.0.0.1 or 0.0.0.0. [default: 127.0.0.1]",
        "--port INTEGER A TCP port, 0 to 65535; 0 chooses a free one. [default: 8000]",
        "--fd INTEGER The number of an open socket, instead of a port.",
        "--proxy-headers / --no-proxy-headers Trust X-Forwarded-* from --forwarded-allow-ips. [default: proxy-headers]",
        "--use-colors / --no-use-colors Use colours in the log; by default, on a terminal only.",
        "--stall-timeout FLOAT Seconds that a client may receive less than --minimum-rate, at most a year; needs "
        "--http auto. [default: 60.0]",
    ],
)
def test_an_option_has_the_type_the_default_and_the_description_of_its_setting(line: str) -> None:
    shown = CliRunner().invoke(main, ["serve", "--help"], terminal_width=300).output
    assert line in " ".join(shown.split())


def test_the_help_has_the_description_of_every_setting() -> None:
    shown = CliRunner().invoke(main, ["serve", "--help"], terminal_width=300).output
    for setting in msgspec.structs.fields(ServerSettings):
        takes = str(description_of(setting.type)).removeprefix("true to ")
        *_, longest = sorted(re.split("[a-z]+_[a-z_]+|[a-z]+ = ", takes), key=len)  # other settings are options there
        assert longest[1:] in shown


def test_the_command_needs_neither_the_server_nor_a_database_until_it_serves() -> None:
    code = (
        "import sys, downloadview_async.cli\n"
        "print(sorted({'uvicorn', 'sqlalchemy', 'jinja2', 'httpx2', 'httpcore2'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_service_without_objects_does_not_import_sqlalchemy(directory: Path) -> None:
    code = (
        "import sys\n"
        "from downloadview_async.service.app import build\n"
        "from downloadview_async.service.config_loader import load_settings\n"
        f"build(load_settings({str(directory / 'downloadview.toml')!r}, environ={{}}))\n"
        "print(sorted({'uvicorn', 'sqlalchemy', 'httpx2'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
