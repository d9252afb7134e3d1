"""An upstream and a store that stop (SIGSTOP), die and come back: others are served meanwhile, and all again then."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.faults.site import BIG, PATIENCE, RIGHT, Site, eventually, site, upstream
from tests.redis_server import RedisServer, redis_server
from tests.servers import PROJECT, free_port, serving

HALF = len(BIG) // 2
SETTINGS = """
[links]
keys = "20260101-test {key}"
store = "{redis}"
[limits]
requests = "100000/minute"
concurrent = 1000
store = "{redis}"
[[routes]]
path = "/signed/{{path:path}}"
source = "path"
access = ["signed"]
"""


@contextmanager
def upstream_process(port: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "tests.faults.site", str(port)]
    with serving(command, port, log=log, stop_signal=signal.SIGKILL) as server:
        yield server.process


def signed(directory: Path) -> str:
    command = [sys.executable, "-m", "downloadview_async.cli", "sign", "--config", str(directory / "downloadview.toml")]
    made = subprocess.run(
        [*command, "/signed/small.txt", "--uses", "1000"], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    return made.stdout.strip()


def statuses(running: Site, *paths: str) -> list[int | None]:
    answers = [running.get(path) for path in paths]
    return [None if answer is None else answer.status for answer in answers]


def test_peers_that_stop_die_and_come_back(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        redis: RedisServer = stack.enter_context(redis_server(tmp_path))
        process = stack.enter_context(upstream_process(port, tmp_path / "upstream"))
        settings = SETTINGS.format(redis=redis.url, key="k" * 43)
        running = stack.enter_context(site(tmp_path, port, settings=settings))
        link = signed(tmp_path)
        assert statuses(running, link) == [200]
        assert running.round() == RIGHT, running.server.log
        eventually(lambda: any("accounts.db" in path for path in running.descriptors()), lambda: running.server.log)
        before = running.descriptors()

        # the store of links and limits hangs: links cannot be checked, all else is not limited
        redis.signal(signal.SIGSTOP)
        assert statuses(running, link) == [503]
        assert running.round() == RIGHT, running.server.log
        redis.signal(signal.SIGCONT)
        eventually(lambda: statuses(running, link) == [200], lambda: running.server.log)

        # the upstream hangs, before and within an answer
        with half_sent(running) as client:
            process.send_signal(signal.SIGSTOP)
            assert running.round() == RIGHT | dict.fromkeys(["remote", "new"], "504"), running.server.log
            assert is_cut(client)
        process.send_signal(signal.SIGCONT)
        assert running.round() == RIGHT, running.server.log

        # it dies, before and within an answer
        with half_sent(running) as client:
            process.kill()
            process.wait()
            assert is_cut(client)
        assert running.round() == RIGHT | dict.fromkeys(["remote", "new"], "502"), running.server.log
        stack.enter_context(upstream_process(port, tmp_path / "upstream again"))
        assert running.round() == RIGHT, running.server.log
        assert "Traceback" not in running.server.log
        eventually(lambda: running.descriptors()["socket"] <= before["socket"] + 1, lambda: running.descriptors())


@contextmanager
def half_sent(running: Site) -> Iterator[socket.socket]:
    """Begin a download of which the upstream sends one half only, and read that."""
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as client:
        client.sendall(b"GET /remote/half-big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = bytearray()
        while len(received) < HALF:
            received += client.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 200 ")
        yield client


def is_cut(client: socket.socket) -> bool:
    """Return whether an answer of which one half has been read ends before its end."""
    left = HALF
    with suppress(ConnectionResetError):
        while block := client.recv(1 << 16):
            left -= len(block)
    return left > 0


def test_a_database_of_names_that_hangs_is_given_up_and_used_again(postgres: str, tmp_path: Path) -> None:
    address = postgres.replace("+asyncpg", "")
    data = asyncio.run(prepared(address))
    settings = f"""
[sources.rows]
type = "object"
database = "{postgres}"
table = "files_of_faults"
key = "key"
file = "file"
source = "path"
[[routes]]
path = "/rows/{{path:path}}"
source = "rows"
"""
    with upstream() as port, site(tmp_path, port, settings=settings) as running:
        assert statuses(running, "/rows/one") == [200]
        processes = processes_of(data)
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            answers: list[int | None] = []
            clients = [
                threading.Thread(target=lambda: answers.extend(statuses(running, "/rows/one"))) for _ in range(30)
            ]
            for client in clients:
                client.start()
            assert running.round() == RIGHT
            for client in clients:
                client.join()
            assert answers == [503] * 30, running.server.log
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)
        eventually(lambda: statuses(running, "/rows/one") == [200], lambda: running.server.log)
        assert "Traceback" not in running.server.log


async def prepared(address: str) -> Path:
    """Make a table with one row, and return the directory of the server."""
    import asyncpg  # type: ignore[import-untyped]

    connection = await asyncpg.connect(address)
    try:
        await connection.execute("CREATE TABLE files_of_faults (key text PRIMARY KEY, file text)")
        await connection.execute("INSERT INTO files_of_faults VALUES ('one', 'small.txt')")
        return Path(await connection.fetchval("SHOW data_directory"))
    finally:
        await connection.close()


def processes_of(data: Path) -> list[int]:
    """Return the process of a database server, and its children."""
    parent = int((data / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *map(int, children)]
