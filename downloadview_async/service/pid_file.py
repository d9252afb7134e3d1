"""`pid_file`: the file by which `downloadview reload` finds the service, and the one in which it gets its answer."""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import time
from types import TracebackType
from typing import IO, Self

from downloadview_async import ConfigurationError

_ANSWER = ".reload"
"""The end of the name of the file with the answer."""


class PidFile:
    """The number of this process, in a file that is locked as long as the process lives.

    path: None for no file. A file of another process is replaced, as at a rolling restart.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Write the file. Raises `OSError`."""
        if self._path is not None:
            new = f"{self._path}.{secrets.token_hex(4)}"
            self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.write(self._descriptor, b"%d\n" % os.getpid())
            os.rename(new, self._path)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        """Remove the file, unless it is another process's now."""
        if self._path is None or self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                os.unlink(self._path)
                os.unlink(self._path + _ANSWER)
        os.close(self._descriptor)

    def answer(self, began: int, problem: str | None) -> None:
        """Tell `downloadview reload` how it ended: problem is None, or why the old settings stay.

        began: when the settings were read, in nanoseconds.
        """
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            new = f"{self._path}{_ANSWER}.{secrets.token_hex(4)}"
            with open(new, "x", encoding="utf-8") as file:
                json.dump({"began": began, "problem": problem}, file)
            os.replace(new, self._path + _ANSWER)


def reload_by_pid_file(path: str, *, seconds: float) -> None:
    """Have the process of a file read its settings again, and return when it uses them.

    Raises `ConfigurationError` if there is no such process, if it does not answer in time, and with its words if it
    keeps the old settings.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, encoding="ascii"))
            number = int(file.readline())
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "not a number"
            problem = f"{path}: no running service ({reason}): give the pid_file of its settings"
            raise ConfigurationError(problem) from exc
        if _has_ended(file):
            raise ConfigurationError(f"{path}: the process has ended: start the service")
        began, deadline = time.time_ns(), time.monotonic() + seconds
        hang_up(number)
        while True:
            has_ended = _has_ended(file)  # before the look at the answer, which may be its last words
            with contextlib.suppress(FileNotFoundError), open(path + _ANSWER, encoding="utf-8") as answers:
                answer = json.load(answers)
                if answer["began"] >= began:
                    if answer["problem"] is not None:
                        raise ConfigurationError(answer["problem"])
                    return
            if has_ended:
                raise ConfigurationError(f"the process {number} has ended before it has answered: read its log")
            if time.monotonic() >= deadline:
                raise ConfigurationError(f"the process {number} has not answered in {seconds:g} seconds: read its log")
            time.sleep(0.02)


def _has_ended(file: IO[str]) -> bool:
    """Return whether the process that has written a file, and locked it, has ended."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hang_up(number: int) -> None:
    """Send SIGHUP to a process. Raises `ConfigurationError` if that is not possible, or would end the process."""
    if not _handles_hangups(number):
        problem = "does not handle SIGHUP, so it is not the main process of the service: give the number of that one"
        raise ConfigurationError(f"the process {number} {problem}")
    try:
        os.kill(number, signal.SIGHUP)
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a process"
        raise ConfigurationError(f"the process {number} cannot be told to reload ({reason})") from exc


def _handles_hangups(number: int) -> bool:
    """Return whether a process has a handler for SIGHUP; True where the system does not tell."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{number}/status", encoding="utf-8") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name == "SigCgt":  # bit 0 is signal 1
                return bool(int(value, 16) >> (signal.SIGHUP - 1) & 1)
    return True
