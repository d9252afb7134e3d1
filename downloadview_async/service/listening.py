"""The sockets on which the service listens: opening them, sharing them with another process, and leaving them.

A connection that the kernel has accepted waits in the queue of its socket, and is reset if the last process closes
that socket. So whoever leaves takes the waiting connections first.
"""

import contextlib
import logging
import os
import secrets
import socket
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from downloadview_async.service.settings import ServerSettings, Settings, Unavailable

# of Linux; the module socket has no names for them
_SO_ATTACH_FILTER = 26
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

# operations of the kernel's packet filter
_LOAD_BYTE, _AND, _SKIP_UNLESS_EQUAL, _RETURN = 0x30, 0x54, 0x15, 0x06

_FLAGS = 13  # where the flags are in the header of TCP
_SYN, _ACK = 0x02, 0x10

_logger = logging.getLogger("uvicorn.error")


class Listeners:
    """The sockets of a service: those that are inherited, or those of `fd`, `uds` or `host` and `port`.

    They are bound, and listen when a server starts on them: connections must not wait for an application that may fail
    to start. A Unix socket takes the place of another one at its path, in one step, when `publish` is called.

    Raises `ConfigurationError`.
    """

    def __init__(self, settings: Settings, inherited: list[socket.socket]) -> None:
        self._server = settings.server
        self._new_path: str | None = None
        self._place: os.stat_result | None = None
        self.sockets = inherited or list(self._opened(settings))
        self.are_inherited = bool(inherited) or self._server.fd is not None
        if self.are_inherited and not all(map(_can_listen, self.sockets)):
            problem = "an inherited socket cannot listen: in a unit of systemd, write ListenStream= and Accept=no"
            raise settings.error("server.fd", problem)
        for one in self.sockets:
            one.setblocking(False)

    def _opened(self, settings: Settings) -> Iterator[socket.socket]:
        if self._server.fd is not None:
            yield socket.socket(fileno=self._server.fd)
        elif self._server.uds is not None:
            self._new_path = os.path.join(os.path.dirname(self._server.uds), f".{secrets.token_hex(4)}")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with settings.blaming("server.uds"):
                sock.bind(self._new_path)
            yield sock
        else:
            yield from _tcp_sockets(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        """Remove the Unix socket, unless another process has put its own one there."""
        path = self._server.uds
        with contextlib.suppress(OSError):
            if self._new_path is not None:
                os.unlink(self._new_path)
            elif path is not None and self._place is not None and os.path.samestat(self._place, os.stat(path)):
                os.unlink(path)

    def publish(self) -> None:
        """Let clients find the sockets, which listen."""
        if self._new_path is not None and self._server.uds is not None:
            path = self._server.uds
            os.chmod(self._new_path, os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666)
            self._place = os.stat(self._new_path)
            os.rename(self._new_path, path)
            self._new_path = None
        for one in self.sockets:
            where = self._server.uds or _place_of(one, bool(self._server.ssl_certfile))
            _logger.info("Listening on %s (Press CTRL+C to quit)", where)


def _can_listen(sock: socket.socket) -> bool:
    """Return whether this is a stream socket without a connection."""
    if sock.type != socket.SOCK_STREAM:
        return False
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def _tcp_sockets(settings: Settings) -> Iterator[socket.socket]:
    """Yield a socket for each address of the host, all with the same port."""
    server = settings.server
    port, problem, is_any = server.port, None, False
    addresses = socket.getaddrinfo(server.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, (host, _, *rest) in dict.fromkeys(addresses):
        try:
            sock = socket.socket(family, kind, protocol)
            try:
                _bind(sock, (host, port, *rest), server)
            except OSError:
                sock.close()
                raise
        except OSError as exc:  # a name may also have an address of a family that this machine does not support
            problem = exc
            continue
        port, is_any = sock.getsockname()[1], True
        yield sock
    if not is_any:
        assert problem is not None
        reason = os.strerror(problem.errno or 0).lower()
        text = (
            f"cannot listen on {server.host}:{server.port} ({reason}): give another, or stop the process that uses it"
        )
        raise Unavailable(str(settings.error("server.port", text))) from problem


def _bind(sock: socket.socket, address: tuple[object, ...], server: ServerSettings) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if server.reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(address)


def _place_of(sock: socket.socket, is_https: bool) -> str:
    if sock.family == socket.AF_UNIX:
        return f"the Unix socket {sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"{'https' if is_https else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def steer_away(sockets: Iterable[socket.socket]) -> None:
    """Have new connections go to the next process that shares the port (SO_REUSEPORT), if there is one.

    The kernel asks a program for the number of a socket among those that share the port, in the order in which they
    were opened. The process that leaves has the oldest, 0. If there is no socket 1, the kernel ignores the answer.
    """
    for one in sockets:
        if one.family != socket.AF_UNIX:
            _attach(one, _SO_ATTACH_REUSEPORT_CBPF, [(_RETURN, 0, 0, 1)])


def steer_no_more(sockets: Iterable[socket.socket]) -> None:
    """Have the kernel share new connections among all processes again, of which there may be more than two.

    The program of `steer_away` is that of the port, and stays when its process has ended.
    """
    for one in sockets:
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)


def begin_no_more(sockets: Iterable[socket.socket]) -> None:
    """Have the kernel begin no more connections on sockets, of which no other process accepts any.

    Those that have begun can still be accepted. So nobody connects between the last accept and the close, and is reset.
    TCP answers nothing: when a client tries again, after a second, the socket is closed, and refuses it.
    """
    for one in sockets:
        if one.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD)
            continue
        drop_first_packets = [
            (_LOAD_BYTE, 0, 0, _FLAGS),
            (_AND, 0, 0, _SYN | _ACK),
            (_SKIP_UNLESS_EQUAL, 0, 1, _SYN),
            (_RETURN, 0, 0, 0),
            (_RETURN, 0, 0, 0xFFFF_FFFF),
        ]
        _attach(one, _SO_ATTACH_FILTER, drop_first_packets)


def _attach(sock: socket.socket, option: int, program: list[tuple[int, int, int, int]]) -> None:
    """Give the kernel a program for the packets of a socket: operation, two jumps and a number in each line."""
    if sys.platform != "linux":
        return
    lines = array("B", b"".join(struct.pack("HBBI", *line) for line in program))
    with contextlib.suppress(OSError):  # a sandbox refuses it, or the socket does not share its port
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", len(program), lines.buffer_info()[0]))


def waiting_connections(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that the kernel has accepted on a socket."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # there is none, or no more descriptors
            return
        yield connection
