"""A service that starts, or replaces a worker, with few file descriptors."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.servers import PROJECT, free_port, serving
from tests.service.test_drain import worker_pids

COMMAND = [sys.executable, "-m", "downloadview_async.cli", "serve"]
REFUSAL = "downloadview: cannot start with the file descriptors that are left (too many open files; "


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("limit", [9, 14, 24])
def test_too_few_at_the_start_are_one_line_and_worth_another_try(tmp_path: Path, limit: int, workers: str) -> None:
    command = [*COMMAND, str(tmp_path), "--port", str(free_port()), "--workers", workers]
    limited = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command]
    run = subprocess.run(limited, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr == (
        f"{REFUSAL}this process may have {limit}): raise its limit, such as by `ulimit -n 65536` or LimitNOFILE= of "
        "systemd\n"
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_limit_of_each_process_is_all_that_it_may_have(tmp_path: Path, workers: str) -> None:
    port, hard = free_port(), min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 5000)
    command = ["sh", "-c", f'ulimit -Sn 100; ulimit -Hn {hard}; exec "$@"', "sh", *COMMAND, str(tmp_path)]
    with serving([*command, "--port", str(port), "--workers", workers], port, log=tmp_path / "log") as server:
        server.wait_for_log("Application startup complete", times=int(workers))
        processes = [server.process.pid, *worker_pids(server)]
        assert len(processes) == (1 if workers == "1" else 3)
        assert {resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in processes} == {(hard, hard)}


def test_a_worker_that_cannot_start_is_one_line_and_is_replaced_later(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    port = free_port()
    command = [*COMMAND, str(tmp_path), "--port", str(port), "--workers", "2"]
    with serving(command, port, log=tmp_path / "log") as server:
        server.wait_for_log("Listening on ")  # when the parent knows that both are ready
        parent = server.process.pid
        limits = resource.prlimit(parent, resource.RLIMIT_NOFILE)
        enough_for_parent = max(map(int, os.listdir(f"/proc/{parent}/fd"))) + 10
        resource.prlimit(parent, resource.RLIMIT_NOFILE, (enough_for_parent, limits[1]))
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        server.wait_for_log(REFUSAL, times=2)
        resource.prlimit(parent, resource.RLIMIT_NOFILE, limits)
        server.wait_for_log("Application startup complete", times=3)
        assert server.stop() == 0
        assert "Traceback" not in server.log
        assert "never awaited" not in server.log


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_that_cannot_be_accepted_do_not_fill_the_log(tmp_path: Path, loop: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    port = free_port()
    command = [*COMMAND, str(tmp_path), "--port", str(port), "--loop", loop]
    with serving(command, port, log=tmp_path / "log") as server, contextlib.ExitStack() as stack:
        pid = server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 10, limits[1]))
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        time.sleep(2.5)  # asyncio tries again each second
        assert "Traceback" not in server.log
        if loop == "asyncio":
            assert server.log.count("Connections cannot be accepted, and wait: [Errno 24]") == 1
        assert len(server.log) < 3000
        stack.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        with urllib.request.urlopen(f"{server.url}/files/a.txt", timeout=30) as answer:
            assert answer.read() == b"a"
