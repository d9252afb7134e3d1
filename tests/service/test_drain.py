"""The end of the service: it drains, gives running downloads their time, resets what is left, and tells systemd."""

import contextlib
import http.client
import os
import pty
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server, free_port, serving
from tests.service.test_cli import COMMAND

WORKERS = ["1", pytest.param("2", marks=pytest.mark.slow)]
LARGE = 64 * 1024 * 1024
MEDIUM = 2 * 1024 * 1024  # more than the kernel holds, and little enough for a hundred at once
SETTINGS = """
[server]
drain_seconds = {drain}
timeout_graceful_shutdown = {limit}
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
"""


def fill(directory: Path) -> Path:
    (directory / "files").mkdir(parents=True)
    (directory / "files/a.txt").write_bytes(b"0123456789")
    for name, size in (("medium.bin", MEDIUM), ("large.bin", LARGE)):
        with (directory / "files" / name).open("wb") as file:
            file.truncate(size)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return fill(tmp_path)


@contextlib.contextmanager
def service(
    directory: Path,
    *arguments: str,
    drain: float = 0,
    limit: int = 30,
    workers: str = "1",
    env: dict[str, str] | None = None,
    more: str = "",
) -> Iterator[Server]:
    (directory / "downloadview.toml").write_text(SETTINGS.format(drain=drain, limit=limit) + more)
    port = free_port()
    command = [*COMMAND, "--port", str(port), "--workers", workers, *arguments]
    with serving(command, port, log=directory / "log", cwd=directory, env=env) as server:
        server.wait_for_log("Listening on ")  # with several workers: when the parent knows that all are ready
        yield server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.address)), timeout=60)


def begin(server: Server, name: str = "large.bin", *, headers: str = "") -> socket.socket:
    """Begin a download of which the kernel can hold only a small part."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect(("127.0.0.1", int(server.address)))
    client.sendall(f"GET /files/{name} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
    assert client.recv(16) == b"HTTP/1.1 200 OK\r"
    return client


def read(client: socket.socket) -> tuple[int, bool]:
    """Read to the end of a connection, and return the number of bytes, and whether it was reset."""
    received = 0
    with client:
        try:
            while chunk := client.recv(1 << 20):
                received += len(chunk)
        except ConnectionResetError:
            return received, True
    return received, False


def get(server: Server, path: str) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.address), timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers["Connection"]


@pytest.mark.parametrize(
    "protocol, workers",
    [("auto", "1"), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("h11", "1"), ("httptools", "2")))],
)
def test_a_service_that_drains_says_so_and_answers_on(directory: Path, workers: str, protocol: str) -> None:
    with service(directory, "--http", protocol, drain=60, workers=workers) as server:
        kept = http.client.HTTPConnection("127.0.0.1", int(server.address), timeout=30)
        kept.request("GET", "/files/a.txt")
        first = kept.getresponse()
        assert (first.read(), first.headers["Connection"]) == (b"0123456789", None)
        assert get(server, "/-/readyz")[:2] == (200, b"ready\n")
        server.process.terminate()
        server.wait_for_log("Shutting down", times=int(workers))
        for _ in range(4):
            assert get(server, "/-/readyz")[:2] == (503, b"draining\n")
            assert get(server, "/-/livez")[0] == 200
        if protocol == "auto":  # others say so from the next second on
            assert get(server, "/files/a.txt") == (200, b"0123456789", "close")
            kept.request("GET", "/files/a.txt")
            last = kept.getresponse()
            assert (last.read(), last.headers["Connection"]) == (b"0123456789", "close")
        else:
            deadline = time.monotonic() + 30
            while get(server, "/files/a.txt") != (200, b"0123456789", "close"):
                assert time.monotonic() < deadline
        kept.close()
        assert server.stop() == 0  # a second signal
        assert "Traceback" not in server.log


@pytest.mark.parametrize("workers", WORKERS)
def test_then_it_refuses_and_waits_for_the_downloads(directory: Path, workers: str) -> None:
    with service(directory, drain=0.5, workers=workers) as server:
        client = begin(server)
        server.process.terminate()
        with pytest.raises(ConnectionError):
            [get(server, "/files/a.txt") for _ in range(100_000)]
        assert server.process.poll() is None
        received, is_reset = read(client)
        assert received > LARGE
        assert not is_reset
        assert server.process.wait(30) == 0


def test_a_slow_client_that_connected_in_the_drain_is_answered(directory: Path) -> None:
    with service(directory, drain=0.5) as server:
        server.process.terminate()
        server.wait_for_log("Shutting down")
        with connect(server) as client:
            server.wait_for_log("Waiting for connections to close")
            time.sleep(1)  # the client is slow
            client.sendall(b"GET /files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(16) == b"HTTP/1.1 200 OK\r"
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    "protocol, workers",
    [("auto", "1"), *(pytest.param(one, "2", marks=pytest.mark.slow) for one in ("auto", "httptools"))],
)
def test_what_takes_longer_than_its_time_is_reset(directory: Path, workers: str, protocol: str) -> None:
    with service(directory, "--http", protocol, limit=1, workers=workers) as server:
        client = begin(server)
        assert server.stop() == 0
        received, is_reset = read(client)
        assert received < LARGE
        assert is_reset
        assert server.log.count("Transfer aborted: the server stops") == 1
        assert "aborted (server-stopped)" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, "1"), pytest.param(signal.SIGINT, "2", marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_it_at_once(directory: Path, workers: str, number: int) -> None:
    with service(directory, drain=3600, limit=3600, workers=workers) as server:
        client = begin(server)
        server.process.send_signal(number)
        server.wait_for_log("Shutting down", times=int(workers))
        assert server.stop(number) == 0
        assert read(client)[1]
        assert "Traceback" not in server.log


def test_a_second_signal_ends_a_process_of_which_a_thread_is_blocked(directory: Path) -> None:
    (directory / "rules.py").write_text(
        "import pathlib, time\ndef make(name):\n    pathlib.Path('blocked').touch()\n    time.sleep(3600)\n"
    )
    source = '[sources.made]\ntype = "virtual"\nfactory = "rules:make"\n'
    route = '[[routes]]\npath = "/made/{path:path}"\nsource = "made"\n'
    with service(directory, limit=3600, more=source + route) as server, connect(server) as client:
        client.sendall(b"GET /made/a HTTP/1.1\r\nHost: x\r\n\r\n")
        while not (directory / "blocked").exists():
            time.sleep(0.02)
        server.process.terminate()
        server.wait_for_log("Shutting down")
        assert server.stop() == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_the_service_ends_when_its_terminal_is_closed(directory: Path, workers: str) -> None:
    """SIGHUP would be a reload otherwise."""
    (directory / "downloadview.toml").write_text(SETTINGS.format(drain=0, limit=30))
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.chdir(directory)
        os.execv(COMMAND[0], [*COMMAND, "--port", str(free_port()), "--workers", workers])
    log = b""
    while b"Listening on " not in log:
        log += os.read(terminal, 4096)
    os.kill(process, signal.SIGHUP)
    while b"are in use" not in log:
        log += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.slow
def test_signals_to_all_processes_are_one_signal(directory: Path) -> None:
    """A terminal sends SIGINT, and systemd SIGTERM, to the parent and to the workers."""
    with service(directory, workers="2", drain=0.5) as server:
        client = begin(server)
        os.killpg(server.process.pid, signal.SIGINT)
        os.killpg(server.process.pid, signal.SIGHUP)
        received, is_reset = read(client)
        assert received > LARGE
        assert not is_reset
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_a_stop_does_not_wait_for_workers_that_are_starting(directory: Path) -> None:
    (directory / "slow.py").write_text("import pathlib, time\npathlib.Path('starts').touch()\ntime.sleep(3600)\n")
    with service(directory, workers="2") as server:
        settings = directory / "downloadview.toml"
        settings.write_text(settings.read_text() + 'access = ["hook:slow:allow"]\n')
        server.process.send_signal(signal.SIGHUP)
        while not (directory / "starts").exists():
            time.sleep(0.02)
        assert server.stop() == 0
        assert "is killed" not in server.log


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(directory: Path) -> None:
    with service(directory, workers="2") as server:
        client = begin(server)
        server.process.kill()
        server.process.wait()
        server.wait_for_log("Shutting down", times=2)
        assert read(client)[0] > LARGE
        server.wait_for_log("Finished server process", times=2)
        with pytest.raises(ConnectionRefusedError):
            connect(server)


@pytest.mark.slow
def test_a_worker_that_ends_is_replaced(directory: Path) -> None:
    with service(directory, workers="2") as server:
        (directory / "downloadview.toml").write_text("settings that nobody has reloaded")
        for starts, kill in ((3, signal.SIGKILL), (4, signal.SIGTERM), (6, signal.SIGKILL)):
            ended = worker_pids(server)[: starts // 3]  # the last time, there is none left
            server.process.send_signal(signal.SIGSTOP)  # it is to see all of them end at once
            for worker in ended:
                os.kill(worker, kill)
                while not has_ended(worker):
                    time.sleep(0.01)
            server.process.send_signal(signal.SIGCONT)
            server.wait_for_log("Application startup complete", times=starts)
            assert not {*ended} & {*worker_pids(server)}
            assert get(server, "/files/a.txt")[0] == 200
        assert server.stop() == 0


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced_unless_it_was_stopped_with_its_parent(tmp_path: Path) -> None:
    """Ctrl+Z or a paused container stops all. The parent goes on first, and must not judge by its clock."""
    one, two = fill(tmp_path / "one"), fill(tmp_path / "two")
    with service(one, workers="2") as hanging, service(two, workers="2") as paused:
        client = begin(paused)
        processes = [*worker_pids(paused), paused.process.pid]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        os.kill(worker_pids(hanging)[0], signal.SIGSTOP)
        began = time.monotonic()
        hanging.wait_for_log("does not answer, and is killed")
        hanging.wait_for_log("Application startup complete", times=3)
        time.sleep(max(0.0, began + 11 - time.monotonic()))  # no event: the time is what counts
        os.kill(processes.pop(), signal.SIGCONT)
        time.sleep(2)
        for process in processes:
            os.kill(process, signal.SIGCONT)
        received, is_reset = read(client)
        assert received > LARGE
        assert not is_reset
        assert "is killed" not in paused.log
        assert paused.stop() == hanging.stop() == 0


@pytest.mark.slow
def test_a_worker_whose_event_loop_is_blocked_for_ever_is_replaced(directory: Path) -> None:
    """A hook has no `await` and does not return, or a file system that nobody expected to hang does."""
    (directory / "blocks.py").write_text("import time\nasync def allow(*_):\n    while True:\n        time.sleep(1)\n")
    more = '[[routes]]\npath = "/blocks/{path:path}"\nsource = "files"\naccess = ["hook:blocks:allow"]\n'
    with service(directory, workers="2", more=more) as server, connect(server) as client:
        client.sendall(b"GET /blocks/a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for_log("does not answer, and is killed")
        server.wait_for_log("Application startup complete", times=3)
        assert get(server, "/files/a.txt")[0] == 200
        assert server.stop() == 0


@pytest.mark.slow
def test_a_worker_that_dies_while_no_other_is_ready_does_not_decide_how_the_service_ends(directory: Path) -> None:
    (directory / "slowly.py").write_text("import time\ntime.sleep(2)\nasync def allow(*_):\n    return True\n")
    more = '[[routes]]\npath = "/slowly/{path:path}"\nsource = "files"\naccess = ["hook:slowly:allow"]\n'
    with service(directory, workers="2", more=more) as server:
        first = set(worker_pids(server))
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while len(others := set(worker_pids(server)) - first) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(others.pop(), signal.SIGKILL)
        server.wait_for_log("Application startup complete", times=4)
        assert get(server, "/files/a.txt")[0] == 200
        assert server.stop() == 0


@pytest.mark.slow
def test_a_worker_that_leaves_by_itself_is_replaced_while_it_sends_on(directory: Path) -> None:
    with service(directory, "--limit-max-requests", "3", workers="2", limit=60) as server:
        downloads = [begin(server) for _ in range(2)]
        for _ in range(12):
            with contextlib.suppress(ConnectionError):
                get(server, "/files/a.txt")
        server.wait_for_log("Application startup complete", times=3)
        for client in downloads:
            assert read(client)[0] > LARGE


def worker_pids(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(one) for one in children if b"spawn_main" in command_of(one)]


def command_of(process: str) -> bytes:
    """Return the command line of a process, or nothing if it has ended meanwhile."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def has_ended(process: int) -> bool:
    """Return whether a process has ended, and only its parent has not noticed."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def ask_until_refused(server: Server, lost: list[str], answered: list[None]) -> None:
    while True:
        try:
            client = connect(server)
        except ConnectionRefusedError:
            return
        except OSError as exc:  # reset while the connection was made
            lost.append(repr(exc))
            return
        with client:
            try:
                client.sendall(b"GET /files/a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
                if not client.recv(16).startswith(b"HTTP/1.1 200"):
                    lost.append("closed")
                answered.append(None)
            except OSError as exc:
                lost.append(repr(exc))


@pytest.mark.slow
@pytest.mark.parametrize("loop, workers", [("asyncio", "1"), ("uvloop", "1"), ("uvloop", "2")])
def test_each_connection_is_answered_or_refused(directory: Path, loop: str, workers: str) -> None:
    """In the moment in which the socket is closed, too: 2 shutdowns under as many connections as there can be."""
    for _ in range(2):
        with service(directory, "--loop", loop, workers=workers) as server:
            lost: list[str] = []
            answered: list[None] = []
            clients = [threading.Thread(target=ask_until_refused, args=(server, lost, answered)) for _ in range(8)]
            for client in clients:
                client.start()
            while len(answered) < 100:
                time.sleep(0.005)
            assert server.stop() == 0
            for client in clients:
                client.join()
            assert not lost


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_hundred_downloads_and_a_hundred_stalled_clients(directory: Path, workers: str) -> None:
    """All that read are served in full, and the service ends within its limit and two seconds."""
    limit = 10
    with service(directory, workers=workers, limit=limit) as server:
        stalled = [begin(server) for _ in range(100)]
        reading = [begin(server, "medium.bin") for _ in range(100)]
        for client in reading:  # now they are quick: a few kilobytes at a time would take longer than the limit
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        left = dict.fromkeys(reading, 0)
        server.process.terminate()
        began = time.monotonic()
        complete = 0
        while left and time.monotonic() - began < limit - 1:
            for client in select.select(list(left), [], [], 1)[0]:
                chunk = client.recv(1 << 20)
                left[client] += len(chunk)
                if left[client] > MEDIUM or not chunk:
                    complete += left.pop(client) > MEDIUM
        assert complete == 100
        assert server.process.wait(limit + 10) == 0
        assert limit - 1 < time.monotonic() - began < limit + 2
        for client in [*stalled, *reading]:
            client.close()


@pytest.mark.parametrize("is_abstract, workers", [(True, "1"), pytest.param(False, "2", marks=pytest.mark.slow)])
def test_systemd_is_told(directory: Path, workers: str, is_abstract: bool) -> None:
    name = f"downloadview-test-{os.getpid()}-{workers}"
    address = f"\0{name}" if is_abstract else str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(address)
        told.settimeout(60)
        environ = {"NOTIFY_SOCKET": f"@{name}" if is_abstract else address, "WATCHDOG_USEC": "200000"}
        with service(directory, workers=workers, env=environ) as server:
            assert told.recv(1000).split(b"\n")[:2] == [b"READY=1", b"MAINPID=%d" % server.process.pid]
            assert told.recv(1000) == told.recv(1000) == b"WATCHDOG=1"
            assert server.stop() == 0
        told.settimeout(1)
        messages = []
        with contextlib.suppress(TimeoutError):
            while True:
                messages.append(told.recv(1000))
        assert [one for one in messages if one != b"WATCHDOG=1"] == [b"STOPPING=1\nSTATUS=Waiting for downloads to end"]


def test_nothing_listens_for_what_systemd_is_told(directory: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(directory / "gone"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    with service(directory, env=environ) as server:
        assert get(server, "/files/a.txt")[0] == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log
