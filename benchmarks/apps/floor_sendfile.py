"""The least that a file can cost in Python if the kernel sends it: `epoll` and `sendfile`, and hardly any HTTP.

    python -m benchmarks.apps.floor_sendfile PORT

A request comes as a whole, and its file is open already. A file of 64 KiB or less is sent from memory. What a server
takes beyond this is its own; what it takes below is the kernel's.
"""

import os
import select
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

_FILES = Path(os.environ["BENCH_FILES"])
_WINDOW = 2 << 20  # bytes that one client gets before the others have their turn, as in nginx
_SMALL = 64 << 10


@dataclass(slots=True)
class _Client:
    connection: socket.socket
    file: int = -1
    position: int = 0
    end: int = 0


_heads: dict[bytes, tuple[bytes, int, int]] = {}  # by the requests, with the descriptor and the size of the file


def _head_for(request: bytes) -> tuple[bytes, int, int]:
    name = request.split(b" ", 2)[1].decode().rpartition("/")[2]
    file = os.open(_FILES / name, os.O_RDONLY)
    size = os.fstat(file).st_size
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    if size <= _SMALL:
        head, size = head + os.pread(file, size, 0), 0
    _heads[request] = head, file, size
    return _heads[request]


def _answer(client: _Client) -> bool:
    """Take the next request, if there is one. Return False if the client has left."""
    try:
        request = client.connection.recv(65536)
    except BlockingIOError:
        return True
    if not request:
        return False
    head, client.file, client.end = _heads.get(request) or _head_for(request)
    client.position = 0
    client.connection.send(head, socket.MSG_MORE if client.end else 0)
    return True


def _send(client: _Client) -> bool:
    """Send up to one window. Return whether the client can take more, or has got all."""
    left = min(_WINDOW, client.end - client.position)
    while left:
        try:
            taken = os.sendfile(client.connection.fileno(), client.file, client.position, left)
        except BlockingIOError:
            return False
        client.position += taken
        left -= taken
    return True


def main() -> None:
    """Serve until the end."""
    clients: dict[int, _Client] = {}
    ready: dict[int, _Client] = {}  # those that can go on at once
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024) as listener, select.epoll() as epoll:
        listener.setblocking(False)
        epoll.register(listener, select.EPOLLIN)
        while True:
            for number, _ in epoll.poll(0 if ready else -1):
                if number != listener.fileno():
                    ready[number] = clients[number]
                    continue
                connection, _ = listener.accept()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[connection.fileno()] = _Client(connection)
                epoll.register(connection, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
            for number, client in [*ready.items()]:
                try:
                    is_open = client.position < client.end or _answer(client)
                    can_go_on = is_open and _send(client) and client.position < client.end
                except OSError:  # it has left, which is its right
                    is_open = can_go_on = False
                if not can_go_on:
                    del ready[number]
                if not is_open:
                    clients.pop(number).connection.close()


main()
