"""The terminal from which the service was started: what SIGHUP and SIGINT mean.

SIGHUP means that the terminal was closed, or that a reload is wanted. SIGINT means Ctrl-C, after which nobody wants to
wait, or that another program ends the service.
"""

import os
import signal


class Terminal:
    """The terminal of this process, if it was started in the foreground of one.

    Make it before SIGHUP gets a handler: `nohup` ignores SIGHUP, so that the process does not depend on its terminal.
    """

    def __init__(self) -> None:
        self._matters = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and is_in_foreground()

    @property
    def was_closed(self) -> bool:
        """Whether the process was started in the foreground of a terminal that has been closed."""
        return self._matters and _foreground() is None


def is_in_foreground() -> bool:
    """Return whether this process is in the foreground of a terminal, so that SIGINT means Ctrl-C."""
    return _foreground() == os.getpgrp()


def _foreground() -> int | None:
    """Return the process group in the foreground of the terminal of this process, or None if it has no terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.tcgetpgrp(terminal)
    except OSError:
        return None
    finally:
        os.close(terminal)
