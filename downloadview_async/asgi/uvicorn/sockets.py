"""Asks the kernel about the socket of a connection: its number, the bytes in its queues, a hang-up, a reset."""

import asyncio
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from contextlib import suppress
from typing import Protocol

_SO_MAX_PACING_RATE = 47  # of Linux; the module socket has no name for it
_UNPACED = 2 ** (8 * struct.calcsize("N")) - 1
_ACKNOWLEDGED = 120  # where `tcpi_bytes_acked` is in Linux' `tcp_info`
_SEGMENT_SIZE = 16  # where `tcpi_snd_mss` is
_SEGMENTS = 156  # where `tcpi_data_segs_out` is
_STATE = 0  # where `tcpi_state` is
_CLOSED = 7  # `TCP_CLOSE`
_UNPACED_SEGMENTS = 10  # with data, at the beginning of a connection, which Linux does not pace


class Connection(Protocol):
    """A connection, as the functions of this module need it.

    is_lost: whether the connection has ended. The number of its socket may then belong to another connection: uvloop
    returns it even after it has closed the socket.
    """

    transport: asyncio.Transport
    is_lost: bool


def has_socket(connection: Connection) -> bool:
    """Return whether the transport is one over a socket."""
    return connection.transport.get_extra_info("socket") is not None


def is_on_unix_socket(connection: Connection) -> bool:
    """Return whether the connection came over a Unix socket."""
    return isinstance(connection.transport.get_extra_info("sockname"), str | bytes)  # TCP has a tuple here


def socket_number(connection: Connection) -> int:
    """Return the file descriptor of the socket.

    Raises `OSError` if the transport has no socket, and `ConnectionResetError` if the socket is closed.
    """
    sock = connection.transport.get_extra_info("socket")
    if sock is None:
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    number: int = sock.fileno()
    if connection.is_lost or number < 0:
        raise ConnectionResetError
    return number


def untaken_bytes(connection: Connection) -> int:
    """Return how many bytes the client has not taken yet: those in the transport, and those in the kernel.

    0 if the transport has no socket, since such a transport does not tell what it holds. A kernel that refuses to tell
    counts as one that holds nothing.
    """
    try:
        number = socket_number(connection)
    except OSError:
        return 0
    return queued(number) + connection.transport.get_write_buffer_size()


def has_taken_all(connection: Connection) -> bool:
    """Return whether the client will take no more: it has taken everything, or the connection has failed."""
    try:
        return untaken_bytes(connection) == 0 or _of_tcp_info(socket_number(connection), _STATE, "B") == _CLOSED
    except OSError:
        return True


def queued(number: int) -> int:
    """Return how many bytes the kernel holds for the client; 0 if it does not tell."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0" * 4))[0])
    except OSError:
        return 0


def acknowledged_bytes(connection: Connection) -> int:
    """Return how many bytes the client's machine has acknowledged on this connection; 0 if the kernel does not tell."""
    try:
        return acknowledged(socket_number(connection))
    except OSError:
        return 0


def acknowledged(number: int) -> int:
    """Do what `acknowledged_bytes` does, for a descriptor. Raises `OSError` if there is no such descriptor."""
    return _of_tcp_info(number, _ACKNOWLEDGED, "Q") or 0


def unpaced_segments(connection: Connection) -> int:
    """Return how many of the next segments the kernel sends at once, whatever the pace; 0 if it does not tell."""
    try:
        sent = _of_tcp_info(socket_number(connection), _SEGMENTS, "I")
    except OSError:
        return 0
    return 0 if sent is None else max(0, _UNPACED_SEGMENTS - sent)


def paced_packet_bytes(connection: Connection) -> int:
    """Return how many bytes the kernel sends at once at a slow pace: two segments; 0 if it does not tell."""
    try:
        return 2 * (_of_tcp_info(socket_number(connection), _SEGMENT_SIZE, "I") or 0)
    except OSError:
        return 0


def _of_tcp_info(number: int, offset: int, kind: str) -> int | None:
    """Return a number that the kernel tells about the TCP connection of a descriptor, or None if it does not.

    Raises `OSError` if there is no such descriptor.
    """
    end = offset + struct.calcsize(kind)
    sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, number)  # in half the time of `socket.socket`
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, end)
    except OSError:  # a Unix socket
        return None
    finally:
        sock.detach()  # the number belongs to another object
    return int(struct.unpack_from(kind, told, offset)[0]) if len(told) >= end else None


def has_unread_bytes(connection: Connection) -> bool:
    """Return whether the kernel has bytes from the client that the transport has not read yet."""
    try:
        return any(fcntl.ioctl(socket_number(connection), termios.FIONREAD, b"\0" * 4))
    except OSError:
        return False


def has_hung_up(connection: Connection) -> bool:
    """Return whether the client has reset the connection, or both sides have closed it. Raises `OSError`."""
    poll = select.poll()
    poll.register(socket_number(connection), 0)  # a hang-up and an error are reported without being asked for
    return bool(poll.poll(0))


def set_pace(connection: Connection, rate: int | None) -> None:
    """Limit how fast the kernel sends, in bytes per second. None: no limit. A kernel that refuses that sends on."""
    if not connection.is_lost:
        with suppress(OSError):
            sock: socket.socket = connection.transport.get_extra_info("socket")
            sock.setsockopt(
                socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("N", _UNPACED if rate is None else rate)
            )


def limit_queue(connection: Connection, seconds: float) -> None:
    """Have the kernel drop what it holds for a client that takes nothing for so long, also after the socket is closed.

    Without that, Linux keeps these bytes for as long as the machine of the client answers.
    """
    try:
        sock: socket.socket = connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(seconds * 1000)))
    except (OSError, AttributeError):  # a Unix socket, and systems without this option
        pass


def reset(connection: Connection) -> None:
    """Reset the connection: the client learns that the answer is broken, and the kernel drops what it still holds."""
    with suppress(OSError), socket.socket(fileno=os.dup(socket_number(connection))) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.transport.abort()
