"""The sockets that systemd has opened for the service, and messages to systemd about its state."""

import contextlib
import math
import os
import re
import socket
import time

from downloadview_async import ConfigurationError

_NUMBER = re.compile("[0-9]{1,18}")
_FIRST_SOCKET = 3  # the number of the first descriptor [sd_listen_fds(3)]


def inherited_sockets() -> list[socket.socket]:
    """Return the sockets that systemd has opened for this process (socket activation), and forget the variables.

    A process that this one starts must not take them for its sockets [sd_listen_fds(3)].

    Raises `ConfigurationError` if one of the descriptors is not a socket.
    """
    process, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or _NUMBER.fullmatch(count) is None:
        return []
    sockets: list[socket.socket] = []
    for number in range(_FIRST_SOCKET, _FIRST_SOCKET + int(count)):
        try:
            sockets.append(socket.socket(fileno=number))
        except OSError as exc:
            for one in sockets:
                one.detach()
            raise ConfigurationError(
                f"LISTEN_FDS is {count}, and the descriptor {number} is not a socket ({exc.strerror}): correct the "
                "socket unit"
            ) from exc
    for one in sockets:
        one.set_inheritable(False)
    return sockets


class Notifier:
    """Tells systemd what the service is doing, over NOTIFY_SOCKET [sd_notify(3)]; does nothing without that variable.

    The variables are removed from the environment, so that only this process speaks.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract socket
            self._address = f"\0{self._address[1:]}"
        process, interval = os.environ.pop("WATCHDOG_PID", str(os.getpid())), os.environ.pop("WATCHDOG_USEC", "")
        is_watched = self._address and process == str(os.getpid()) and _NUMBER.fullmatch(interval) is not None
        microseconds = int(interval) if is_watched else 0  # "0" is not an interval [sd_watchdog_enabled(3)]
        self._interval = microseconds / 2_000_000 if microseconds else None  # twice in each interval
        self._last = math.inf  # the watchdog waits for nothing before the service is ready

    def ready(self) -> None:
        """Tell that requests are answered, and by which process."""
        self._send(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=Serving downloads")
        self._last = 0.0

    def reloading(self) -> None:
        """Tell that the settings are being read again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=Reading the settings again")

    def reloaded(self, problem: str | None) -> None:
        """Tell that the new settings are in use, or why the old ones still are."""
        self._send("READY=1\nSTATUS=" + (f"The old settings stay: {problem}" if problem else "Serving downloads"))

    def stopping(self) -> None:
        """Tell that the service shuts down."""
        self._send("STOPPING=1\nSTATUS=Waiting for downloads to end")

    def alive(self) -> None:
        """Tell the watchdog of systemd, if there is one, that the process is alive. Call it often."""
        now = time.monotonic()
        if self._interval is not None and now - self._last >= self._interval:
            self._last = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),  # systemd may be restarting; it does not matter for downloads
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.settimeout(1)
            sock.sendto(message.encode(errors="replace"), self._address)
