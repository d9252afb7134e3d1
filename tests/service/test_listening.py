"""The listening sockets of processes that share a port."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloadview_async.service.listening import begin_no_more, steer_away, steer_no_more, waiting_connections


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def listener(stack: contextlib.ExitStack, port: int = 0) -> socket.socket:
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(200)
    sock.setblocking(False)
    return sock


def shares(listeners: list[socket.socket]) -> list[bool]:
    """Return of each socket whether it gets some of a hundred connections."""
    address = listeners[0].getsockname()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(address, timeout=30))
        accepted = [[stack.enter_context(connection) for connection in waiting_connections(one)] for one in listeners]
        return [bool(connections) for connections in accepted]


def test_new_connections_go_to_the_others_while_a_process_leaves_and_to_all_of_them_afterwards(
    stack: contextlib.ExitStack,
) -> None:
    oldest = listener(stack)
    port = oldest.getsockname()[1]
    others = [listener(stack, port) for _ in range(2)]
    assert shares([oldest, *others]) == [True, True, True]
    steer_away([oldest])
    assert shares([oldest, *others])[0] is False
    steer_no_more([oldest])
    oldest.close()
    assert shares(others) == [True, True]
    assert shares([*others, listener(stack, port)]) == [True, True, True]


def test_a_process_that_is_alone_keeps_its_connections(stack: contextlib.ExitStack) -> None:
    alone = listener(stack)
    steer_away([alone])
    assert shares([alone]) == [True]


def test_a_socket_that_begins_no_more_can_be_closed_without_a_reset(stack: contextlib.ExitStack) -> None:
    sock = listener(stack)
    before = stack.enter_context(socket.create_connection(sock.getsockname(), timeout=30))
    begin_no_more([sock])
    with pytest.raises(TimeoutError):
        socket.create_connection(sock.getsockname(), timeout=0.2)
    (accepted,) = waiting_connections(sock)
    with accepted:
        accepted.sendall(b"x")
        assert before.recv(1) == b"x"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_port_that_is_taken_during_the_start_ends_all_workers(tmp_path: Path, loop: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gate, socket.socket() as other:
        (tmp_path / "slow.py").write_text(
            "import contextlib, multiprocessing, socket\n"
            "if multiprocessing.parent_process() is not None:\n"
            "    with contextlib.suppress(OSError):\n"
            f"        socket.create_connection({gate.getsockname()}).recv(1)\n"
            "def make(name): ...\n"
        )
        (tmp_path / "downloadview.toml").write_text(
            '[sources.v]\ntype = "virtual"\nfactory = "slow:make"\n[[routes]]\npath = "/{path:path}"\nsource = "v"\n'
        )
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "downloadview_async", "serve", "--port", str(port), "--loop", loop]
        with subprocess.Popen([*command, "--workers", "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            waiting, _ = gate.accept()  # a worker: the parent has bound the port
            other.listen()
            gate.close()
            waiting.close()
            _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"downloadview: cannot listen on 127.0.0.1:{port}: another process has just begun to listen there" in said
    assert "Traceback" not in said
    assert "Listening on" not in said
