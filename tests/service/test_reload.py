"""SIGHUP, `downloadview reload` and `--watch`: what changes, what stays, and what the caller is told."""

import contextlib
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.reload import needing_a_restart
from tests.servers import Server, free_port, serving
from tests.service.test_cli import COMMAND, refused
from tests.service.test_drain import WORKERS, begin, get, read

SETTINGS = """
[server]
pid_file = "pid"
timeout_keep_alive = 60
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{path:path}"
source = "files"
"""
RELOAD = [sys.executable, "-m", "downloadview_async.cli", "reload"]
LARGE = 64 * 1024 * 1024


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("files", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    with (tmp_path / "files/large.bin").open("wb") as file:
        file.truncate(LARGE)
    (tmp_path / "downloadview.toml").write_text(SETTINGS)
    return tmp_path


@contextlib.contextmanager
def service(directory: Path, *arguments: str, workers: str = "1") -> Iterator[Server]:
    port = free_port()
    command = [*COMMAND, "--port", str(port), "--workers", workers, *arguments]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        server.wait_for_log("Listening on ")
        yield server
        assert "Traceback" not in server.log


def change(directory: Path, old: str, new: str) -> None:
    file = directory / "downloadview.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def reload(directory: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
    return subprocess.run(
        [*RELOAD, *arguments], cwd=directory, env={**environ, **env}, capture_output=True, text=True, timeout=100
    )


def reloads(directory: Path) -> None:
    done = reload(directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reloaded\n", "")


@pytest.mark.parametrize("workers", WORKERS)
def test_a_reload_changes_what_is_served_and_cuts_nothing(directory: Path, workers: str) -> None:
    with service(directory, workers=workers) as server:
        kept = http.client.HTTPConnection("127.0.0.1", int(server.address), timeout=30)
        kept.request("GET", "/files/a.txt")
        assert kept.getresponse().read() == b"files"
        client = begin(server, headers="Connection: close\r\n")
        change(directory, 'root = "files"', 'root = "other"')
        reloads(directory)
        assert get(server, "/files/a.txt") == (200, b"other", None)
        kept.request("GET", "/files/a.txt")
        last = kept.getresponse()
        # one process knows the new settings at once; a worker that retires answers with those that it has
        assert last.read() == (b"other" if workers == "1" else b"files")
        assert last.headers["Connection"] == "close"
        kept.close()
        change(directory, "/files/{path", "/new/{path")
        reloads(directory)
        assert get(server, "/files/a.txt")[0] == 404
        assert get(server, "/new/a.txt")[:2] == (200, b"other")
        assert get(server, "/-/readyz")[0] == 200
        received, is_reset = read(client)
        assert received > LARGE
        assert not is_reset
        assert server.stop() == 0
        assert not (directory / "pid").exists()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("[sources.files]", "[sources.files", "not valid TOML"),
        ("root =", "rood =", "sources.files.rood: unknown key"),
        ('root = "files"', 'root = "gone"', "sources.files.root: the root"),
        ("[server]", '[links]\nkeys = "gone"\n[server]', "links.keys: "),
        ('source = "files"', 'source = "files"\naccess = ["hook:gone:gone"]', "routes[0].access[0]"),
        ("[server]", '[links]\nkeys = "links.keys"\nstore = "sqlite:gone/links.db"\n[server]', "links.store: "),
        ("[server]", '[server]\nssl_certfile = "gone.pem"', "server.ssl_certfile"),
    ],
)
def test_wrong_settings_change_nothing_and_say_why(
    directory: Path, workers: str, old: str, new: str, problem: str
) -> None:
    (directory / "links.keys").write_text(f"one {'s' * 40}\n")
    with service(directory, workers=workers) as server:
        change(directory, old, new)
        done = reload(directory, "--pid-file", "pid")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert problem in done.stderr
        assert "The settings cannot be used, so the old ones stay: " in server.log
        assert problem in server.log
        assert get(server, "/files/a.txt") == (200, b"files", None)
        (directory / "downloadview.toml").write_text(SETTINGS.replace('"files"\n[[', '"other"\n[['))
        reloads(directory)
        assert get(server, "/files/a.txt")[:2] == (200, b"other")


def certificate(directory: Path, name: str) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-keyout", "key.pem", "-out", "certificate.pem"),
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )


def presented(server: Server) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", int(server.address)), timeout=30) as plain,
        context.wrap_socket(plain) as client,
    ):
        shown = client.getpeercert(binary_form=True)
        assert shown is not None
        return shown


@pytest.mark.parametrize("workers", WORKERS)
def test_certificates_are_loaded_again(directory: Path, workers: str) -> None:
    certificate(directory, "first.example")
    change(directory, "[server]", '[server]\nssl_certfile = "certificate.pem"\nssl_keyfile = "key.pem"')
    with service(directory, workers=workers) as server:
        first = presented(server)
        (directory / "key.pem").write_text("not a key")
        done = reload(directory)
        assert (done.returncode, "server.ssl_certfile" in done.stderr) == (2, True)
        assert presented(server) == first
        certificate(directory, "second.example")
        reloads(directory)
        assert b"second.example" in presented(server)


@pytest.mark.parametrize("workers", WORKERS)
def test_keys_and_users_are_read_again(directory: Path, workers: str) -> None:
    def set_password(password: bytes) -> None:
        (directory / "users").write_bytes(b"ada:" + bcrypt.hashpw(password, bcrypt.gensalt(4)) + b"\n")

    def status(path: str, password: str | None = None) -> int:
        authorization = {} if password is None else {"Authorization": "Basic " + _basic(f"ada:{password}")}
        connection = http.client.HTTPConnection("127.0.0.1", int(server.address), timeout=30)
        connection.request("GET", path, headers=authorization)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    def link() -> str:
        command = [sys.executable, "-m", "downloadview_async.cli", "sign", "/links/a.txt"]
        return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()

    more = (
        '[links]\nkeys = "keys"\n[users]\nfile = "users"\n'
        '[[routes]]\npath = "/links/{path:path}"\nsource = "files"\naccess = ["signed"]\n'
        '[[routes]]\npath = "/users/{path:path}"\nsource = "files"\naccess = ["user:ada"]\n'
    )
    (directory / "downloadview.toml").write_text(SETTINGS + more)
    (directory / "keys").write_text(f"one {'s' * 40}\n")
    set_password(b"first")
    with service(directory, workers=workers) as server:
        old = link()
        assert (status(old), status("/users/a.txt", "first")) == (200, 200)
        (directory / "keys").write_text(f"two {'t' * 40}\n")
        set_password(b"second")
        reloads(directory)
        assert (status(old), status(link())) == (403, 200)
        assert (status("/users/a.txt", "first"), status("/users/a.txt", "second")) == (401, 200)


def _basic(text: str) -> str:
    import base64

    return base64.b64encode(text.encode()).decode()


@pytest.mark.slow
def test_the_number_of_workers_changes(directory: Path) -> None:
    change(directory, "[server]", "[server]\nworkers = 2")
    port = free_port()
    with serving([*COMMAND, "--port", str(port)], port, log=directory / "log", cwd=directory) as server:
        server.wait_for_log("Listening on ")
        change(directory, "workers = 2", "workers = 3")
        reloads(directory)
        server.wait_for_log("Finished server process", times=2)
        assert server.log.count("Application startup complete") == 5
        assert server.stop() == 0


def test_what_a_reload_cannot_change_is_said(directory: Path) -> None:
    with service(directory) as server:
        change(directory, "[server]", "[server]\nbacklog = 100\nworkers = 3")
        change(directory, "workers = 3", "host = 'localhost'")
        reloads(directory)
        server.wait_for_log("These settings change at the next restart only: server.host, server.backlog")


def test_which_settings_one_process_cannot_change(directory: Path) -> None:
    old = load_settings(directory / "downloadview.toml", environ={}).server
    for key, value in {"fd": "3", "uds": '"s"', "loop": '"asyncio"', "reuse_port": "true", "port": "1"}.items():
        change(directory, "[server]", f"[server]\n{key} = {value}")
        new = load_settings(directory / "downloadview.toml", environ={}).server
        assert needing_a_restart(old, new) == [f"server.{key}"]
        (directory / "downloadview.toml").write_text(SETTINGS)
    change(directory, "[server]", "[server]\nroot_path = '/x'\nlog_level = 'error'\nstall_timeout = 5")
    assert needing_a_restart(old, load_settings(directory / "downloadview.toml", environ={}).server) == []


@pytest.mark.parametrize("workers", WORKERS)
def test_a_reload_by_number_checks_the_settings_first(directory: Path, workers: str) -> None:
    change(directory, 'pid_file = "pid"\n', "")
    with service(directory, workers=workers) as server:
        number = str(server.process.pid)
        change(directory, 'root = "files"', 'root = "gone"')
        wrong = reload(directory, number)
        assert (wrong.returncode, "sources.files.root" in wrong.stderr) == (2, True)
        assert "cannot be used" not in server.log
        change(directory, 'root = "gone"', 'root = "other"')
        done = reload(directory, MAINPID=number)  # as systemd sets it
        assert (done.returncode, done.stdout) == (0, f"told the process {number} to reload\n")
        server.wait_for_log("The settings have been read again")
        assert get(server, "/files/a.txt")[:2] == (200, b"other")


def test_a_reload_of_nothing_is_an_error(directory: Path) -> None:
    assert "pid: no running service (No such file or directory)" in refused(cwd=directory, command="reload")
    (directory / "pid").write_text("1\n")
    assert "pid: the process has ended: start the service" in refused(cwd=directory, command="reload")
    change(directory, 'pid_file = "pid"\n', "")
    assert "no process: give PID, or set server.pid_file" in refused(cwd=directory, command="reload")
    assert "process 4194304 cannot be told to reload" in refused("4194304", cwd=directory, command="reload")
    (directory / "downloadview.toml").unlink()
    assert "nothing to reload: give --pid-file" in refused(cwd=directory, command="reload")


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


@pytest.mark.slow
def test_reloads_leave_nothing_open(directory: Path) -> None:
    (directory / "downloadview.toml").write_text(SETTINGS + '[log]\npath = "access.log"\n')
    with service(directory) as server:
        reloads(directory)
        server.process.send_signal(0)
        before = descriptors(server)
        for _ in range(5):
            reloads(directory)
            get(server, "/files/a.txt")
            change(directory, 'root = "files"', 'root = "gone"')
            assert reload(directory, "--pid-file", "pid").returncode == 2
            change(directory, 'root = "gone"', 'root = "files"')
        deadline = time.monotonic() + 30
        while descriptors(server) > before:
            assert time.monotonic() < deadline, os.listdir(f"/proc/{server.process.pid}/fd")
        assert (directory / "access.log").read_text().count("/files/a.txt") == 5


@pytest.mark.slow
def test_hangups_during_a_reload_are_one_more_reload(directory: Path) -> None:
    with service(directory, workers="2") as server:
        for _ in range(20):
            server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("The settings have been read again")
        reloads(directory)
        assert server.log.count("The settings have been read again") < 6
        assert get(server, "/files/a.txt")[0] == 200


@pytest.mark.slow
def test_watch_reloads_for_settings_and_code(directory: Path) -> None:
    (directory / "rules.py").write_text("async def allow(request, name):\n    return None\n")
    change(directory, 'source = "files"', 'source = "files"\naccess = ["hook:rules:allow"]')
    with service(directory, "--watch") as server:
        assert get(server, "/files/a.txt")[:2] == (200, b"files")
        (directory / "rules.py").write_text(
            "from downloadview_async import AccessDenied\n\n"
            "async def allow(request, name):\n    raise AccessDenied('nobody')\n"
        )
        server.wait_for_log("The settings have been read again", times=1)
        assert get(server, "/files/a.txt")[0] in (403, 404)
        (directory / "rules.py").write_text("async def allow(:\n")
        server.wait_for_log("The settings cannot be used, so the old ones stay: ")
        assert get(server, "/files/a.txt")[0] in (403, 404)
        (directory / "rules.py").write_text("async def allow(request, name):\n    return None\n")
        server.wait_for_log("The settings have been read again", times=2)
        change(directory, 'root = "files"', 'root = "other"')
        server.wait_for_log("The settings have been read again", times=3)
        assert get(server, "/files/a.txt")[:2] == (200, b"other")
        assert re.findall("INFO: +Application startup complete", server.log)


def test_a_socket_of_systemd(directory: Path) -> None:
    """LISTEN_FDS: the socket exists before the service, which must not close it for the next one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.argv[2], sys.argv[2:])"
        )
        command = [sys.executable, "-c", script, str(listener.fileno()), *COMMAND]
        for _ in range(2):
            with serving(command, port, log=directory / "log", cwd=directory, pass_fds=[listener.fileno()]) as server:
                assert get(server, "/files/a.txt") == (200, b"files", None)
                server.wait_for_log(f"Listening on http://127.0.0.1:{port} ")
                assert server.stop() == 0


def test_the_sockets_of_another_process_are_not_ours(directory: Path) -> None:
    port = free_port()
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    command = [*COMMAND, "--port", str(port)]
    with serving(command, port, log=directory / "log", cwd=directory, env=environ) as server:
        assert get(server, "/files/a.txt")[0] == 200


@pytest.mark.parametrize("workers", WORKERS)
def test_a_unix_socket_is_taken_over_when_that_is_asked_for(directory: Path, workers: str) -> None:
    path = str(directory / "socket")
    command = [*COMMAND, "--uds", path, "--workers", workers]

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(path)
            client.sendall(b"GET /files/a.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: client.recv(65536), b""))

    with serving(command, path, log=directory / "log", cwd=directory) as first:
        first.wait_for_log("Listening on ")
        change(directory, 'root = "files"', 'root = "other"')
        by_mistake = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)
        assert by_mistake.returncode == 3
        assert by_mistake.stderr.count("\n") == 1
        assert "another process listens on" in by_mistake.stderr
        assert ask().endswith(b"files")
        with serving([*command, "--reuse-port"], path, log=directory / "log2", cwd=directory) as second:
            second.wait_for_log("Listening on ")
            assert ask().endswith(b"other")
            assert first.stop() == 0
            assert ask().endswith(b"other")  # the first process has not removed the socket of the second
        assert not os.path.exists(path)
