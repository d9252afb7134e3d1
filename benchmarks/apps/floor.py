"""The least that reading a file and sending it can cost in Python: `pread` and `send` in a loop, and hardly any HTTP.

What a server in chunks takes beyond this is its own; what it takes below is the kernel's.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path

_FILES = Path(os.environ["BENCH_FILES"])
_CHUNK = 256 * 1024


def _answer(client: socket.socket) -> None:
    while request := client.recv(65536):
        with (_FILES / request.split()[1].decode().rpartition("/")[2]).open("rb") as file:
            left = os.fstat(file.fileno()).st_size
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
            while left:
                chunk = file.raw.read(_CHUNK)
                client.sendall(chunk)
                left -= len(chunk)


with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        client, _ = listener.accept()
        with client, contextlib.suppress(ConnectionError):  # it has left, which is its right
            _answer(client)
