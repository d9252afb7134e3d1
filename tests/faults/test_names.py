"""A name server that does not answer holds up the source whose host it should know, and nothing else."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.confined import confined, why_not
from tests.faults.site import BIG, Site, get, site, upstream

SERVER = "127.0.0.77"  # another one of the loopback, of which nothing else uses port 53
SETTINGS = """
[sources.hung]
type = "remote"
url = "http://hung.test/"
connect_timeout = 3
[sources.known]
type = "remote"
url = "http://known.test:{port}/"
allow_hosts = ["known.test"]
connect_timeout = 3
[[routes]]
path = "/hung/{{path:path}}"
source = "hung"
[[routes]]
path = "/known/{{path:path}}"
source = "known"
"""


@pytest.fixture
def asked() -> Iterator[socket.socket]:
    """A name server that takes questions, and answers none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind((SERVER, 53))
        except PermissionError:
            pytest.skip("a name server: this user may not use port 53")
        yield server


@pytest.fixture
def running(asked: socket.socket, tmp_path: Path) -> Iterator[Site]:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    (tmp_path / "resolv.conf").write_text(f"nameserver {SERVER}\noptions timeout:30 attempts:1\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost known.test\n")
    mounts = [f"mount --bind '{tmp_path}/{name}' /etc/{name}" for name in ("resolv.conf", "hosts")]
    with (
        upstream() as port,
        site(tmp_path, port, settings=SETTINGS.format(port=port), prefix=confined(*mounts)) as running,
    ):
        yield running


def test_a_name_server_that_hangs_takes_only_its_source(running: Site, asked: socket.socket) -> None:
    """Thirty requests wait for it: more than a loop has threads for lookups."""
    statuses: list[int | None] = []

    def ask() -> None:
        answer = get(running.port, "/hung/file")
        statuses.append(None if answer is None else answer.status)

    began = time.monotonic()
    clients = [threading.Thread(target=ask) for _ in range(30)]
    for client in clients:
        client.start()
    asked.settimeout(20)
    asked.recv(512)
    for path in ("/known/big.bin", "/remote/big.bin", "/path/big.bin"):
        answer = running.get(path)
        assert answer is not None, running.server.log
        assert (answer.status, answer.body == BIG) == (200, True), (path, running.server.log)
    assert not statuses, "the answers came from elsewhere"
    for client in clients:
        client.join()
    assert statuses == [504] * 30
    assert time.monotonic() - began < 3 + 10  # each has its own deadline, however many there are
    assert running.threads() < 30
    assert "Traceback" not in running.server.log
