"""A relay of TCP connections that cuts each of them after some bytes of what the server sends."""

import contextlib
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator

_BLOCK = 65536


class Relay(socketserver.ThreadingTCPServer):
    """Passes bytes on both ways, and cuts by a plain end, or by that and a reset in turn."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    cuts = 0

    def __init__(self, port: int, length: int, *, resets: bool, holds: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.held = threading.Event()
        """Set when a connection has passed its bytes on, and is about to be cut."""
        self.release = threading.Event()
        """Connections are not cut before this is set."""
        if not holds:
            self.release.set()
        self.port = port
        self.length = length
        self.resets = resets

    @property
    def address(self) -> int:
        """The relay's own port."""
        return int(self.server_address[1])


class _Passing(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        relay = self.server
        assert isinstance(relay, Relay)
        with socket.create_connection(("127.0.0.1", relay.port)) as origin:
            asking = threading.Thread(target=_pass, args=(self.request, origin), daemon=True)
            asking.start()
            left = relay.length
            with contextlib.suppress(OSError):
                while left and (block := origin.recv(min(left, _BLOCK))):
                    self.request.sendall(block)
                    left -= len(block)
            if not left:
                relay.held.set()
                relay.release.wait()
                relay.cuts += 1
                if relay.resets and relay.cuts % 2:
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RD)  # so that the other thread ends


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(_BLOCK):
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def cutting(port: int, length: int, *, resets: bool = True, holds: bool = False) -> Iterator[Relay]:
    """Relay to a port of 127.0.0.1, and cut each connection after `length` bytes of what comes from there.

    holds: cut none until `Relay.release` is set.
    """
    with Relay(port, length, resets=resets, holds=holds) as relay:
        thread = threading.Thread(target=relay.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield relay
        finally:
            relay.release.set()
            relay.shutdown()
            thread.join()
