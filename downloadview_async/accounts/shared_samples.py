"""`SharedSamples`: the numbers of several processes, added up. Each process has a file in a directory.

    NUMBER.live   locked (flock) as long as the process runs
    NUMBER.json   its samples, replaced as a whole
    ended.json    the counters of processes that have ended, and the names of those that it contains
    lock          locked while files are added up

The counters of a process that was killed stay in the sum, as they were when it last wrote them. A counter that becomes
smaller would be taken for one that has begun again.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from downloadview_async.accounts.samples import Samples, added, decoded, encoded

_LIVE, _SAMPLES = ".live", ".json"
_ENDED = "ended.json"


class SharedSamples:
    """The samples of all processes that use a directory. Its methods block, and are called in one thread at a time."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._number = ""
        self._live = -1

    def write(self, samples: Samples) -> None:
        """Replace the samples of this process. Raises `OSError`."""
        if self._live >= 0 and os.fstat(self._live).st_nlink == 0:
            self.close()  # somebody has cleaned up the directory
        if self._number == "":
            self._join()
        self._replace(f"{self._number}{_SAMPLES}", {"samples": encoded(samples)})

    def total(self) -> Samples:
        """Return the samples of all processes, added up. Raises `OSError`."""
        with self._locked():
            merged, ended = self._ended()
            running: list[Samples] = []
            dead: list[tuple[str, Samples]] = []
            for live in sorted(self._directory.glob(f"*{_LIVE}")):
                samples = decoded(_content_of(live.with_suffix(_SAMPLES))["samples"])
                if live.stem == self._number or _is_locked(live):
                    running.append(samples)
                else:
                    dead.append((live.stem, {} if live.stem in merged else samples))
            for left in self._directory.glob(f".{_ENDED}-*"):  # of a process that was killed here
                left.unlink(missing_ok=True)
            if dead:
                ended = added([ended, *(samples for _, samples in dead)], are_ended=True)
                names = [name for name, _ in dead]
                self._replace(_ENDED, {"merged": names, "samples": encoded(ended)})
                self._remove(names)
        return added([ended, *running])

    def close(self) -> None:
        """Let others take this process for ended."""
        if self._live >= 0:
            os.close(self._live)
            self._live, self._number = -1, ""

    def _join(self) -> None:
        number = f"{os.getpid()}-{secrets.token_hex(4)}"
        with self._locked():  # else another process might find the file unlocked, and take this one for ended
            name = self._directory / f"{number}{_LIVE}"
            live = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(live, fcntl.LOCK_EX)
        self._live, self._number = live, number

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _ended(self) -> tuple[set[str], Samples]:
        data = _content_of(self._directory / _ENDED)
        return set(data["merged"]), decoded(data["samples"])

    def _replace(self, name: str, data: object) -> None:
        temporary = self._directory / f".{name}-{secrets.token_hex(4)}"
        try:
            temporary.write_text(json.dumps(data))
            temporary.rename(self._directory / name)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self._directory / f"{name}{_SAMPLES}").unlink(missing_ok=True)
            for left in self._directory.glob(f".{name}{_SAMPLES}-*"):  # it was killed while it wrote them
                left.unlink(missing_ok=True)
            (self._directory / f"{name}{_LIVE}").unlink(missing_ok=True)


def _content_of(file: Path) -> Any:
    """Return what a file has; nothing if it is not written yet, or if a machine that lost its power has lost that."""
    content: Any = None
    with suppress(FileNotFoundError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())
    content = content if isinstance(content, dict) else {}
    merged = content.get("merged")
    names = [name for name in merged if isinstance(name, str)] if isinstance(merged, list) else []
    return {"merged": names, "samples": content.get("samples")}


def _is_locked(live: Path) -> bool:
    """Return whether the process of a file runs."""
    descriptor = os.open(live, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
