"""Django under WSGI on gevent's greenlets: downloads leave nothing behind that other requests would see."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest

from tests.servers import Server, free_port, serving

CONTENT = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root, directory = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("server")
    (root / "a.bin").write_bytes(CONTENT)
    port = free_port()
    app = "tests.contrib.django.served_app:wsgi()"
    command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "1", "-b", f"127.0.0.1:{port}", app]
    env = {"SERVED_ROOT": str(root), "SERVED_PORT": str(port), "SERVED_DATABASE": str(directory / "db")}
    with serving(command, port, log=directory / "log", env=env) as server:
        yield server


def _ask(server: Server, kind: str) -> tuple[int, bool]:
    with urlopen(f"{server.url}/{kind}/a.bin", timeout=60) as response:
        return response.status, response.read() == CONTENT


KINDS = ["path", "object", "storage", "memory", "custom", "fileobject", "generated", "object"]


def test_every_request_after_a_download_is_answered(server: Server) -> None:
    for _ in range(2):
        assert [(kind, *_ask(server, kind)) for kind in KINDS] == [(kind, 200, True) for kind in KINDS]
    assert "SynchronousOnlyOperation" not in server.log
    assert "Traceback" not in server.log


def test_requests_at_once_are_answered(server: Server) -> None:
    with ThreadPoolExecutor(8) as clients:
        # but not those of InMemoryStorage, which opens one object, with one position, for everybody
        answers = list(clients.map(lambda kind: _ask(server, kind), [kind for kind in KINDS if kind != "memory"] * 6))
    assert answers == [(200, True)] * len(answers)
    assert "Traceback" not in server.log


def test_the_event_loop_of_an_asynchronous_view_ends_no_other_download(server: Server) -> None:
    kinds = ["generated", "function", "generated", "async-object"] * 12
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda kind: _ask(server, kind), kinds))
    assert answers == [(200, True)] * len(answers)
    assert "Traceback" not in server.log


BESIDE_A_LOOP = """
from gevent import monkey

monkey.patch_all()

import asyncio
import gevent
from downloadview_async.contrib.django.dual import has_running_loop
from downloadview_async.contrib.django.event_loop import run_in_background

waiting = []


async def view():
    waiting.append((asyncio.get_running_loop(), asyncio.Event()))
    await waiting[0][1].wait()
    return asyncio.get_running_loop() is waiting[0][0]


async def download():
    return "sent"


other = gevent.spawn(asyncio.run, view())
while not waiting:
    gevent.sleep(0)
assert not has_running_loop()
assert gevent.spawn(run_in_background, download()).get(timeout=30) == "sent"
waiting[0][0].call_soon_threadsafe(waiting[0][1].set)
assert other.get(timeout=30)
"""


def test_the_first_download_may_come_while_an_asynchronous_view_waits() -> None:
    subprocess.run([sys.executable, "-c", BESIDE_A_LOOP], check=True, timeout=120)
