"""SIGHUP, `downloadview reload` and `--watch`: what changes, what stays, and what the caller is told."""

import base64
import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import bcrypt
import pytest
from click.testing import CliRunner, Result

from downloadview_async import ConfigurationError
from downloadview_async.cli import main
from downloadview_async.service import systemd
from downloadview_async.service.config_loader import CONFIG, load_settings
from downloadview_async.service.listening import Listeners
from downloadview_async.service.pid_file import reload_by_pid_file
from downloadview_async.service.reload import needing_a_restart
from downloadview_async.service.systemd import Notifier, inherited_sockets
from tests.servers import Server, free_port, serving, wait_for_text
from tests.service.test_cli import COMMAND, refused
from tests.service.test_drain import WORKERS, begin, get, read, worker_pids

SETTINGS = """
[server]
pid_file = "pid"
timeout_keep_alive = 60
workers = 1
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{path:path}"
source = "files"
"""
LARGE = 64 * 1024 * 1024
IN_USE = "The settings have been read again, and are in use"


def fill(directory: Path) -> None:
    for name in ("files", "other"):
        (directory / name).mkdir()
        (directory / name / "a.txt").write_text(name)
    with (directory / "files/large.bin").open("wb") as file:
        file.truncate(LARGE)
    (directory / "exits.py").write_text("import sys; sys.exit(3)\n")
    (directory / "links.keys").write_text(f"one {'s' * 40}\n")
    (directory / "downloadview.toml").write_text(SETTINGS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


@contextlib.contextmanager
def service(directory: Path, *arguments: str) -> Iterator[Server]:
    port = free_port()
    with serving([*COMMAND, "--port", str(port), *arguments], port, log=directory / "log", cwd=directory) as server:
        server.wait_for_log("Listening on ")
        yield server
    assert "Traceback" not in server.log


def change(directory: Path, old: str, new: str) -> None:
    file = directory / "downloadview.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def reload(directory: Path) -> None:
    reload_by_pid_file(str(directory / "pid"), seconds=60)


@dataclass
class Site:
    """A service that tests share: each begins with its own settings."""

    directory: Path
    server: Server
    workers: str
    used: str | None

    def use(self, settings: str = SETTINGS) -> None:
        """Write settings, and reload unless these are in use."""
        self.write(settings)
        if settings != self.used:
            self.reload()
            self.used = settings

    def write(self, settings: str) -> None:
        settings = settings.replace("workers = 1", f"workers = {self.workers}")
        (self.directory / "downloadview.toml").write_text(settings)

    def change(self, old: str, new: str) -> None:
        change(self.directory, old, new)

    def reload(self) -> None:
        reload(self.directory)
        self.used = None

    def run(self, *arguments: str, **env: str) -> Result:
        """Call the command in the directory of the settings."""
        clean = dict.fromkeys(name for name in (*os.environ, CONFIG) if name.startswith("DOWNLOADVIEW_"))
        with contextlib.chdir(self.directory):
            return CliRunner(env={**clean, **env}).invoke(main, arguments)


Sites = Callable[[str], Site]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    with contextlib.ExitStack() as stack:

        @cache
        def site(workers: str) -> Site:
            directory = tmp_path_factory.mktemp("site")
            fill(directory)
            change(directory, "workers = 1", f"workers = {workers}")
            return Site(directory, stack.enter_context(service(directory)), workers, SETTINGS)

        yield site


@pytest.fixture
def site(sites: Sites) -> Site:
    """A service of one process."""
    return sites("1")


@pytest.mark.parametrize("workers", WORKERS)
def test_a_reload_changes_what_is_served_and_cuts_nothing(sites: Sites, workers: str) -> None:
    site = sites(workers)
    server = site.server
    site.use()
    kept = http.client.HTTPConnection("127.0.0.1", int(server.address), timeout=30)
    kept.request("GET", "/files/a.txt")
    assert kept.getresponse().read() == b"files"
    client = begin(server, headers="Connection: close\r\n")
    site.use(SETTINGS.replace('root = "files"', 'root = "other"'))
    for _ in range(20):  # whichever worker has it
        assert get(server, "/files/a.txt") == (200, b"other", None)
    if site.workers == "1":  # one process knows the new settings at once
        kept.request("GET", "/files/a.txt")
        last = kept.getresponse()
        assert last.read() == b"other"
        assert last.headers["Connection"] == "close"
    else:  # no worker answers by settings that are no longer in use, such as with a key that has been removed
        assert kept.sock.recv(1) == b""
    kept.close()
    site.change("/files/{path", "/new/{path")
    site.reload()
    assert get(server, "/files/a.txt")[0] == 404
    assert get(server, "/new/a.txt")[:2] == (200, b"other")
    assert get(server, "/-/readyz")[0] == 200
    received, is_reset = read(client)
    assert received > LARGE
    assert not is_reset


_NO_ROOT = ('root = "files"', 'root = "gone"', "sources.files.root: the root")
_NO_STORE = ("[server]", '[links]\nkeys = "links.keys"\nstore = "sqlite:gone/links.db"\n[server]', "links.store: ")
_WRONG = [
    ("[sources.files]", "[sources.files", "not valid TOML"),
    ("root =", "rood =", "sources.files.rood: unknown key"),
    _NO_ROOT,
    ("[server]", '[links]\nkeys = "gone"\n[server]', "links.keys: "),
    ('source = "files"', 'source = "files"\naccess = ["hook:gone:gone"]', r"routes\[0\].access\[0\]"),
    _NO_STORE,
    ("[server]", '[server]\nssl_certfile = "gone.pem"', "server.ssl_certfile"),
    ('source = "files"', 'source = "files"\naccess = ["hook:exits:allow"]', "SystemExit: 3"),
]


def content_type(server: Server) -> str | None:
    with urllib.request.urlopen(f"{server.url}/files/a.txt", timeout=30) as answer:
        return cast("str | None", answer.headers["Content-Type"])


def test_an_answer_that_was_kept_is_not_given_after_a_reload(site: Site) -> None:
    site.use()
    os.utime(site.directory / "files/a.txt", (1_700_000_000,) * 2)
    connection = http.client.HTTPConnection("127.0.0.1", int(site.server.address), timeout=30)
    try:
        for _ in range(3):
            connection.request("GET", "/files/a.txt")
            answer = connection.getresponse()
            assert (answer.read(), answer.headers["x-more"]) == (b"files", None)
        site.change('source = "files"', 'source = "files"\nheaders = { X-More = "new" }')
        site.reload()
        for _ in range(3):
            connection.request("GET", "/files/a.txt")
            answer = connection.getresponse()
            assert (answer.read(), answer.headers["x-more"]) == (b"files", "new")
    finally:
        connection.close()


def test_content_types_are_those_of_the_settings_alone(site: Site) -> None:
    for kind in ("text/x-first", "text/x-second"):
        site.use(f'{SETTINGS}[content_types]\n".txt" = "{kind}"\n')
        assert content_type(site.server) == f"{kind}; charset=utf-8"
    site.use()
    assert content_type(site.server) == "text/plain; charset=utf-8"


@pytest.mark.parametrize("workers", WORKERS)
def test_wrong_settings_change_nothing_and_say_why(sites: Sites, workers: str) -> None:
    site = sites(workers)
    site.use()
    for old, new, problem in _WRONG:
        site.change(old, new)
        site.change("[server]", '[content_types]\n".txt" = "text/x-refused"\n[server]')
        with pytest.raises(ConfigurationError, match=problem) as raised:
            site.reload()
        assert content_type(site.server) == "text/plain; charset=utf-8"
        assert f"The settings cannot be used, so the old ones stay: {raised.value}\n" in site.server.log
        assert get(site.server, "/files/a.txt") == (200, b"files", None)
        site.write(SETTINGS)
    site.use(SETTINGS.replace('root = "files"', 'root = "other"'))
    assert get(site.server, "/files/a.txt") == (200, b"other", None)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_disk_that_hangs_while_settings_are_read_holds_up_nothing(directory: Path, workers: str) -> None:
    change(directory, "workers = 1", f"workers = {workers}")
    with service(directory) as server:
        settings = directory / "downloadview.toml"
        content = settings.read_text()
        settings.unlink()
        os.mkfifo(settings)  # to open it takes until somebody writes to it
        os.kill(server.process.pid, signal.SIGHUP)
        with settings.open("w") as file:
            time.sleep(1)
            assert get(server, "/files/a.txt")[0] == 200
            file.write(content)
        server.wait_for_log(IN_USE)
        os.kill(server.process.pid, signal.SIGHUP)
        time.sleep(1)  # longer than the service needs to begin
        assert get(server, "/files/a.txt")[0] == 200
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("workers", WORKERS)
def test_the_service_goes_on_when_its_current_directory_is_removed(directory: Path, workers: str) -> None:
    """So it also does after anything else that nobody expects while the settings are read."""
    change(directory, "workers = 1", f"workers = {workers}")
    current, port = directory / "current", free_port()
    current.mkdir()
    for name in ("files", "downloadview.toml"):
        (directory / name).rename(current / name)
    command = [*COMMAND, "--config", "downloadview.toml", "--port", str(port)]
    with serving(command, port, log=directory / "log", cwd=current) as server:
        server.wait_for_log("Listening on ")
        shutil.rmtree(current)
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for_log("so the old ones stay: downloadview.toml: the current directory cannot be found")
        assert get(server, "/-/livez")[0] == 200
        assert server.stop() == 0
    assert "Traceback" not in server.log


def certificate(directory: Path, name: str) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-keyout", "key.pem", "-out", "certificate.pem"),
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
def test_a_certificate_that_hangs_or_is_replaced_while_it_is_read_holds_up_nothing(
    directory: Path, workers: str
) -> None:
    certificate(directory, "one")
    keys = ("--ssl-certfile", "certificate.pem", "--ssl-keyfile", "key.pem")
    with service(directory, "--workers", workers, *keys) as server:
        file = directory / "certificate.pem"
        before, content = presented(server), file.read_bytes()
        file.unlink()
        os.mkfifo(file)  # to open it takes until somebody writes to it
        os.kill(server.process.pid, signal.SIGHUP)
        time.sleep(1)
        assert presented(server) == before
        if workers == "1":
            for written in (b"", content, b"", content, b"", b"half of it"):  # each time it is opened
                if server.log.count("cannot be used"):
                    break
                with file.open("wb") as writer:
                    writer.write(written)
                time.sleep(0.2)
            server.wait_for_log("server.ssl_certfile: the certificate and its key cannot be loaded")
            assert presented(server) == before
        assert server.stop() == 0


def test_certificates_are_loaded_again(directory: Path) -> None:
    certificate(directory, "first.example")
    change(directory, "[server]", '[server]\nssl_certfile = "certificate.pem"\nssl_keyfile = "key.pem"')
    with service(directory) as server:
        first = presented(server)
        (directory / "key.pem").write_text("not a key")
        with pytest.raises(ConfigurationError, match=r"server\.ssl_certfile"):
            reload(directory)
        assert presented(server) == first
        certificate(directory, "second.example")
        reload(directory)
        assert b"second.example" in presented(server)
        # the key is replaced while the settings are read
        (directory / "breaks.py").write_text("open('key.pem', 'w').close()\nasync def allow(*_):\n    return True\n")
        change(directory, 'source = "files"', 'source = "files"\naccess = ["hook:breaks:allow"]')
        with pytest.raises(ConfigurationError, match=r"server\.ssl_certfile"):
            reload(directory)
        assert b"second.example" in presented(server)
        certificate(directory, "third.example")
        reload(directory)
        assert b"third.example" in presented(server)


@pytest.mark.slow
def test_a_certificate_that_a_new_worker_cannot_load_is_one_line(directory: Path) -> None:
    """It is replaced while workers start: the parent has found the old one right."""
    certificate(directory, "first.example")
    tls = '[server]\nssl_certfile = "certificate.pem"\nssl_keyfile = "key.pem"'
    change(directory, "[server]", tls)
    change(directory, "workers = 1", "workers = 2")
    with service(directory) as server:
        (directory / "breaks.py").write_text("open('key.pem', 'w').close()\nasync def allow(*_):\n    return True\n")
        change(directory, 'source = "files"', 'source = "files"\naccess = ["hook:breaks:allow"]')
        with pytest.raises(ConfigurationError, match=r"server\.ssl_certfile: the certificate and its key cannot be"):
            reload(directory)
        assert b"first.example" in presented(server)
        failures = server.log.count("the certificate and its key cannot be loaded")
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        server.wait_for_log("server.ssl_certfile: the certificate and its key cannot be loaded", times=failures + 2)
        assert b"first.example" in presented(server)
        certificate(directory, "second.example")
        server.wait_for_log("Application startup complete", times=3)
        (directory / "breaks.py").write_text("async def allow(*_):\n    return True\n")
        reload(directory)
        assert b"second.example" in presented(server)
        assert server.stop() == 0


def test_keys_and_users_are_read_again(site: Site) -> None:
    def set_password(password: bytes) -> None:
        (site.directory / "users").write_bytes(b"ada:" + bcrypt.hashpw(password, bcrypt.gensalt(4)) + b"\n")

    def status(path: str, password: str | None = None) -> int:
        basic = base64.b64encode(f"ada:{password}".encode()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", int(site.server.address), timeout=30)
        connection.request("GET", path, headers={} if password is None else {"Authorization": f"Basic {basic}"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    def link() -> str:
        return site.run("sign", "/links/a.txt").stdout.strip()

    (site.directory / "keys").write_text(f"one {'s' * 40}\n")
    set_password(b"first")
    site.use(
        f'{SETTINGS}[[routes]]\npath = "/links/{{path:path}}"\nsource = "files"\naccess = ["signed"]\n'
        '[[routes]]\npath = "/users/{path:path}"\nsource = "files"\naccess = ["user:ada"]\n'
        '[links]\nkeys = "keys"\n[users]\nfile = "users"\n'
    )
    old = link()
    assert (status(old), status("/users/a.txt", "first")) == (200, 200)
    (site.directory / "keys").write_text(f"two {'t' * 40}\n")
    set_password(b"second")
    site.reload()
    assert (status(old), status(link())) == (403, 200)
    assert (status("/users/a.txt", "first"), status("/users/a.txt", "second")) == (401, 200)


@pytest.mark.slow
def test_the_number_of_workers_changes(sites: Sites) -> None:
    site = sites("2")
    site.use()
    started = site.server.log.count("Application startup complete")
    site.change("workers = 2", "workers = 3")
    site.reload()
    assert site.server.log.count("Application startup complete") == started + 3
    site.server.wait_for_log("Finished server process", times=started)


@pytest.mark.parametrize("workers", WORKERS)
def test_what_a_reload_cannot_change_is_logged(sites: Sites, workers: str) -> None:
    site = sites(workers)
    other = "3" if workers == "1" else "1"  # which stands for 2
    site.use(SETTINGS.replace("workers = 1", f"workers = {other}\nhost = 'localhost'\nbacklog = 100"))
    names = "server.host, server.workers, server.backlog" if workers == "1" else "server.host"
    for times in (1, 2):
        assert site.server.log.count(f"These settings change at the next restart only: {names}\n") == times
        site.reload()  # still


def test_which_settings_one_process_cannot_change(directory: Path) -> None:
    old = load_settings(directory / "downloadview.toml", environ={}).server
    for key, value in {"fd": "3", "uds": '"s"', "loop": '"asyncio"', "reuse_port": "true", "port": "1"}.items():
        change(directory, "[server]", f"[server]\n{key} = {value}")
        new = load_settings(directory / "downloadview.toml", environ={}).server
        assert needing_a_restart(old, new) == [f"server.{key}"]
        (directory / "downloadview.toml").write_text(SETTINGS)
    change(directory, "[server]", "[server]\nroot_path = '/x'\nlog_level = 'error'\nstall_timeout = 5")
    assert needing_a_restart(old, load_settings(directory / "downloadview.toml", environ={}).server) == []


def test_the_command_waits_for_the_service_and_says_what_is_wrong(site: Site) -> None:
    site.use()
    site.change('root = "files"', 'root = "other"')
    done = site.run("reload")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "reloaded\n", "")
    assert get(site.server, "/files/a.txt")[:2] == (200, b"other")
    site.change('root = "other"', 'root = "gone"')
    wrong = site.run("reload", "--pid-file", "pid")
    assert (wrong.exit_code, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "sources.files.root" in wrong.stderr


def test_a_reload_by_number_checks_the_settings_first(site: Site) -> None:
    site.use()
    number, refusals, reloads = str(site.server.process.pid), *map(site.server.log.count, ("cannot be used", IN_USE))
    site.change('pid_file = "pid"\n', "")
    site.change('root = "files"', 'root = "gone"')
    wrong = site.run("reload", number)
    assert (wrong.exit_code, "sources.files.root" in wrong.stderr) == (2, True)
    assert site.server.log.count("cannot be used") == refusals
    site.change('root = "gone"', 'root = "other"')
    done = site.run("reload", MAINPID=number)  # as systemd sets it
    assert (done.exit_code, done.stdout) == (0, f"told the process {number} to reload\n")
    site.server.wait_for_log(IN_USE, times=reloads + 1)
    assert get(site.server, "/files/a.txt")[:2] == (200, b"other")


def test_a_reload_of_nothing_is_an_error(directory: Path) -> None:
    assert "pid: no running service (No such file or directory)" in refused(cwd=directory, command="reload")
    (directory / "pid").write_text("one\n")
    assert "pid: no running service (not a number)" in refused(cwd=directory, command="reload")
    (directory / "pid").write_text("1\n")
    assert "pid: the process has ended: start the service" in refused(cwd=directory, command="reload")
    change(directory, 'pid_file = "pid"\n', "")
    assert "no process: give PID, or set server.pid_file" in refused(cwd=directory, command="reload")
    assert "process 4194304 cannot be told to reload" in refused("4194304", cwd=directory, command="reload")
    (directory / "downloadview.toml").unlink()
    assert "nothing to reload: give --pid-file" in refused(cwd=directory, command="reload")


def test_a_process_that_sighup_would_end_is_not_told_to_reload(directory: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        problem = refused(str(other.pid), cwd=directory, command="reload")
        assert f"the process {other.pid} does not handle SIGHUP" in problem
        other.communicate(b"\n")
    assert other.returncode == 0


def test_a_signal_that_comes_before_the_service_is_ready_is_obeyed(directory: Path) -> None:
    port = free_port()
    with subprocess.Popen([*COMMAND, "--port", str(port)], cwd=directory, stderr=subprocess.PIPE, text=True) as process:
        while not (directory / "pid").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        log = []
        for line in process.stderr:
            log.append(line)
            if IN_USE in line:
                process.terminate()
    assert process.returncode == 0, log


def test_a_reload_of_a_process_that_ends_does_not_wait_for_its_time(directory: Path) -> None:
    script = (
        "import signal, sys, time; from downloadview_async.service.pid_file import PidFile\n"
        "signal.signal(signal.SIGHUP, lambda *_: sys.exit())\n"
        "with PidFile('pid'): print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=directory, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigurationError, match=f"the process {process.pid} has ended before it has answered"):
            reload(directory)


@pytest.mark.slow
def test_a_reload_without_descriptors_for_new_workers_changes_nothing(sites: Sites) -> None:
    site = sites("2")
    site.use()
    process = site.server.process.pid
    limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
    used = {int(one) for one in os.listdir(f"/proc/{process}/fd")}
    third_free = [number for number in range(len(used) + 3) if number not in used][2]
    resource.prlimit(process, resource.RLIMIT_NOFILE, (third_free + 1, limits[1]))
    with pytest.raises(ConfigurationError, match="a worker process cannot be started"):
        site.reload()
    resource.prlimit(process, resource.RLIMIT_NOFILE, limits)
    assert get(site.server, "/files/a.txt")[0] == 200
    site.reload()


def descriptors(server: Server) -> list[str]:
    directory = Path(f"/proc/{server.process.pid}/fd")
    open_files = []
    for one in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            open_files.append(os.readlink(one))
    return sorted(open_files)


def test_reloads_leave_nothing_open(site: Site) -> None:
    settings = f'{SETTINGS}[log]\npath = "access.log"\n'
    site.use(settings)
    before = descriptors(site.server)
    for number in range(5):
        site.use(settings)
        get(site.server, "/files/a.txt")
        site.change(*((_NO_ROOT, _NO_STORE)[number % 2][:2]))
        with pytest.raises(ConfigurationError):
            site.reload()
    site.use(settings)
    deadline = time.monotonic() + 30
    while len(descriptors(site.server)) > len(before):  # files stay open for a second
        assert time.monotonic() < deadline, (before, descriptors(site.server))
        time.sleep(0.01)
    wait_for_text(site.directory / "access.log", "/files/a.txt", times=5)


def test_a_reload_leaves_nothing_open_for_connections_that_close_later(site: Site) -> None:
    """An idle connection holds the application that has answered its last request."""
    site.use(f'{SETTINGS}[log]\npath = "access.log"\n')
    log = str(site.directory / "access.log")
    assert log in descriptors(site.server)
    with socket.create_connection(("127.0.0.1", int(site.server.address))) as idle:
        idle.sendall(b"GET /files/a.txt HTTP/1.1\r\nHost: test\r\n\r\n")
        assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        site.use()
    deadline = time.monotonic() + 30
    while log in descriptors(site.server):
        assert time.monotonic() < deadline, descriptors(site.server)
        time.sleep(0.01)


def test_an_answer_that_a_slow_client_still_takes_is_complete_after_a_reload(site: Site) -> None:
    """The application has passed all of it on, but the transport has not: only its end tells what became of it."""
    size = 250_000
    (site.directory / "made.py").write_text(f"def make(name):\n    return b'x' * {size}\n")
    made = '[sources.made]\ntype = "virtual"\nfactory = "made:make"\n'
    made += '[[routes]]\npath = "/made/{name}"\nsource = "made"\n'
    site.use(f'{SETTINGS}{made}[log]\npath = "made.log"\nformat = "json"\n')
    with socket.socket() as slow, slow.makefile("rb") as answer:
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # the kernels keep little of the answer then
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(site.server.address)))
        slow.sendall(b"GET /made/a.bin HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        site.use()
        time.sleep(1)  # more than the settings that are replaced give to answers that are ending
        assert len(answer.read().partition(b"\r\n\r\n")[2]) == size
    wait_for_text(site.directory / "made.log", "/made/a.bin")
    line = json.loads((site.directory / "made.log").read_text())
    assert (line["result"], line["bytes"]) == ("completed", size)


@pytest.mark.slow
def test_hangups_during_a_reload_are_one_more_reload(sites: Sites) -> None:
    """Those to all processes, as a terminal sends them, too: a worker that starts must not end by them."""
    site = sites("2")
    site.use()
    reloads, problems = map(site.server.log.count, (IN_USE, "cannot be used"))
    os.kill(site.server.process.pid, signal.SIGHUP)
    while site.server.log.count(IN_USE) == reloads:
        os.killpg(site.server.process.pid, signal.SIGHUP)
        time.sleep(0.01)
    site.reload()
    assert site.server.log.count(IN_USE) <= reloads + 4
    assert site.server.log.count("cannot be used") == problems
    assert get(site.server, "/files/a.txt")[0] == 200


@pytest.mark.slow
def test_watch_reloads_for_settings_and_code(directory: Path) -> None:
    def write(rules: str) -> None:
        (directory / "rules.py").write_text(rules)

    write("async def allow(request, name):\n    return True\n")
    change(directory, 'source = "files"', 'source = "files"\naccess = ["hook:rules:allow"]')
    with service(directory, "--watch") as server:
        assert get(server, "/files/a.txt")[:2] == (200, b"files")
        write("async def allow(request, name):\n    return False\n")
        server.wait_for_log(IN_USE)
        assert get(server, "/files/a.txt")[0] == 404
        write("async def allow(:\n")
        server.wait_for_log("The settings cannot be used, so the old ones stay: ")
        assert get(server, "/files/a.txt")[0] == 404
        write("async def allow(request, name):\n    return name == 'a.txt'\n")
        server.wait_for_log(IN_USE, times=2)
        assert get(server, "/files/a.txt")[:2] == (200, b"files")
        change(directory, 'root = "files"', 'root = "other"')
        server.wait_for_log(IN_USE, times=3)
        assert get(server, "/files/a.txt")[:2] == (200, b"other")


def test_a_socket_of_systemd(directory: Path) -> None:
    """LISTEN_FDS: the socket exists before the service, and goes on after it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.argv[2], sys.argv[2:])"
        )
        command = [sys.executable, "-c", script, str(listener.fileno()), *COMMAND]
        with serving(command, port, log=directory / "log", cwd=directory, pass_fds=[listener.fileno()]) as server:
            assert get(server, "/files/a.txt") == (200, b"files", None)
            server.wait_for_log(f"Listening on http://127.0.0.1:{port} ")
            assert server.stop() == 0
        with socket.create_connection(("127.0.0.1", port), timeout=30):
            listener.accept()[0].close()


@pytest.mark.parametrize("count", ["1000000", "999999999999999999", "0", "-1", "\u0663", "9" * 5000, "x", ""])
def test_a_wrong_number_of_sockets_is_an_error_or_none(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_FIRST_SOCKET", 1_000_000)  # a descriptor that no process has
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    if re.fullmatch("[1-9][0-9]{,17}", count):
        with pytest.raises(
            ConfigurationError, match=f"LISTEN_FDS is {count}, and the descriptor 1000000 is not a socket"
        ):
            inherited_sockets()
    else:
        assert inherited_sockets() == []


@pytest.mark.parametrize("interval", ["0", "-1", "\u0663", "9" * 5000, "x", ""])
def test_without_a_valid_interval_there_is_no_watchdog(
    interval: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", interval)
        notifier = Notifier()
        notifier.ready()
        assert manager.recv(1000).startswith(b"READY=1\n")
        notifier.alive()
        with pytest.raises(BlockingIOError):
            manager.recv(1000)


@pytest.mark.parametrize(
    "count, problem",
    [("1", "server.fd: an inherited socket cannot listen"), ("2", "LISTEN_FDS is 2, and the descriptor 4 is not a")],
)
def test_descriptors_of_which_one_cannot_listen(directory: Path, count: str, problem: str) -> None:
    script = (
        "import os, socket, sys; os.closerange(3, 9); one = socket.socket(type=socket.SOCK_DGRAM); "
        "one.set_inheritable(True); "
        f"os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='{count}'); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, *COMMAND]
    failed = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert problem in failed.stderr


def test_a_connection_is_not_a_socket_to_listen_on(directory: Path) -> None:
    settings = load_settings(directory / "downloadview.toml", environ={})
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(one) for one in socket.socketpair()]
        with pytest.raises(ConfigurationError, match=r"server\.fd: an inherited socket cannot listen"):
            Listeners(settings, both)


def test_the_sockets_of_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}.items():
        monkeypatch.setenv(name, value)
    assert inherited_sockets() == []
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


def test_a_unix_socket_is_taken_over_when_that_is_asked_for(directory: Path) -> None:
    path = str(directory / "socket")
    command = [*COMMAND, "--uds", path]

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
