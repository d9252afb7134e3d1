"""`PatientHandler`: writes the messages of the log, and keeps them where nobody reads them, so that nothing waits."""

import logging
import os
import select
import stat
import threading
from collections import deque
from contextlib import suppress
from time import monotonic, sleep
from typing import TextIO

_MOST_KEPT = 1 << 20  # bytes of lines that wait until somebody reads the log
_LAST_SECONDS = 0.3  # in which they may still be written when the process ends
_PAUSE = 0.05  # seconds before a line is tried again whose next byte a terminal had no room for

# A terminal may have room for less than a line, and another process may fill a pipe that had room: a write would wait.
# The flag belongs to what is opened, which other processes share. So the terminal or pipe is opened again.
_NOWAIT = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class PatientHandler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream, and keeps them for later where it would have to wait: nobody may be reading the pipe.

    The event loop logs. If it waited there, the service would answer nothing, and would not obey a signal to end.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._mutex = threading.Lock()  # for what follows; the lock of the handler is held while `flush` waits
        self._kept: deque[bytes] = deque()
        self._size = 0  # bytes that are kept
        self._lost = 0  # lines that were not kept
        self._is_writing = False  # whether a thread writes what was kept

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record, or keep it."""
        try:
            descriptor = self.stream.fileno()
        except (OSError, ValueError, AttributeError):  # such as one that a test has put in its place
            super().emit(record)
            return
        try:
            line = (self.format(record) + self.terminator).encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        with suppress(OSError), self._mutex:  # an error: nobody will ever read it, or the disk is full
            if not self._is_writing:
                line = line[_written_at_once(descriptor, line) :]
            if line:
                self._keep(line)

    def _keep(self, line: bytes) -> None:
        if self._size + len(line) > _MOST_KEPT:
            self._lost += 1
            return
        self._kept.append(line)
        self._size += len(line)
        if not self._is_writing:
            self._is_writing = True
            try:
                threading.Thread(target=self._write_kept, daemon=True).start()
            except RuntimeError:  # there are too many threads
                self._is_writing = False

    def _write_kept(self) -> None:
        while (line := self._next_kept()) is not None:
            with suppress(OSError):
                descriptor = self.stream.fileno()
                while line:
                    _poll(descriptor, None)
                    written = _written_at_once(descriptor, line)
                    line = line[written:]
                    if not written:
                        sleep(_PAUSE)

    def _next_kept(self) -> bytes | None:
        with self._mutex:
            if self._kept:
                line = self._kept.popleft()
                self._size -= len(line)
                return line
            if self._lost:
                lost, self._lost = self._lost, 0
                return b"%d lines of the log were lost, because nobody has read it\n" % lost
            self._is_writing = False
            return None

    def flush(self) -> None:
        """Wait until the lines are written, at most for a moment."""
        deadline = monotonic() + _LAST_SECONDS
        while self._is_writing and monotonic() < deadline:
            sleep(0.01)


def _written_at_once(descriptor: int, line: bytes) -> int:
    """Return how many bytes of a line could be written without waiting."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.write(descriptor, line)
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return _written_while_ready(descriptor, line)
    try:
        nowait = os.open(f"/proc/self/fd/{descriptor}", _NOWAIT)
    except OSError:  # such as of another user, or outside Linux
        return _written_while_ready(descriptor, line)
    try:
        return _written_while_ready(nowait, line)
    finally:
        os.close(nowait)


def _written_while_ready(descriptor: int, line: bytes) -> int:
    written = 0
    while written < len(line):
        part = line[written : written + select.PIPE_BUF]  # a pipe with room takes so many at once
        try:
            if not _poll(descriptor, 0):
                break
            written += os.write(descriptor, part)
        except BlockingIOError:
            break
    return written


def _poll(descriptor: int, milliseconds: int | None) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(milliseconds))
