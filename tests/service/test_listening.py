"""The listening sockets of processes that share a port."""

import contextlib
import socket
from collections.abc import Iterator

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
