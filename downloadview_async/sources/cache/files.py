"""`CacheFiles`: the files in the directory of a cache, by their names and locks. Plain blocking calls.

K is a hash of a source's name and a key in it, V a hash of the version's validators and size, R is random:

    K-V         the bytes of a complete file, and nothing else: a proxy can send it
    K.meta      the description of the current version of K, with its source and key
    K.R.part    a file that arrives, or a K.meta that is being written; its writer holds a lock on it (`flock`)

A file that a process reads has a shared lock. The times of K.meta tell when the file was last used (mtime), and when a
proxy was last told to send it (atime).
"""

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from downloadview_async.sources.cache.entry import BLOCK

_HASH = "[0-9a-f]{40}"
DATA = re.compile(f"({_HASH})-{_HASH}")
META = re.compile(rf"({_HASH})\.meta")
PART = re.compile(rf"{_HASH}\.[0-9a-f]{{16}}\.part")
MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(slots=True)
class Part:
    """A file that arrives: its descriptor holds its lock. size: None if not known. reserved: bytes of room for it.

    status: of the empty file. is_kept: whether it is complete, and has the name of a complete file.
    """

    key: str
    name: str
    descriptor: int
    status: os.stat_result
    size: int | None = None
    reserved: int = 0
    is_kept: bool = False


class CacheFiles:
    """The files of a cache. descriptor: its directory, which its user keeps open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.evictions = 0

    def new_part(self, key: str, mode: int) -> Part:
        """Make a part for K, and lock it. Raises `OSError`."""
        name = f"{key}.{secrets.token_hex(8)}.part"
        descriptor = os.open(name, MAKE, mode, dir_fd=self._descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Part(key, name, descriptor, os.fstat(descriptor))
        except BaseException:
            self.drop(name, descriptor)
            raise

    def drop(self, name: str, descriptor: int) -> None:
        """Remove a part that nobody has got, and close it: no sweep removes a part while its lock is held."""
        self.unlink(name)
        os.close(descriptor)

    def write_meta(self, key: str, content: bytes, leased: float) -> None:
        """Write the K.meta of K. leased: when a proxy was last told to send the file. Raises `OSError`."""
        part = self.new_part(key, 0o600)
        with closing(part.descriptor):
            try:
                os.write(part.descriptor, content)
                os.utime(part.descriptor, (leased, time.time()))
                self.rename(part.name, f"{key}.meta")
            except BaseException:
                self.unlink(part.name)
                raise

    def current(self, key: str) -> str | None:
        """Return the K-V that a K.meta names, whatever its source and key are."""
        try:
            with closing(self.open_meta(f"{key}.meta")) as descriptor:
                loaded: Any = json.loads(os.read(descriptor, 1 << 20).partition(b"\n")[2])
            name = loaded["data"]
            return name if (match := DATA.fullmatch(name)) and match[1] == key else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def open_meta(self, name: str) -> int:
        """Return a descriptor of a K.meta. Raises `OSError`."""
        # reading must not change atime, which is the time of the last lease
        try:
            return os.open(name, _READ | getattr(os, "O_NOATIME", 0), dir_fd=self._descriptor)
        except PermissionError:  # it belongs to another user
            return os.open(name, _READ, dir_fd=self._descriptor)

    def stat(self, name: str) -> os.stat_result:
        """Return the status of a file. Raises `OSError`."""
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def set_times(self, name: str, **times: Any) -> None:
        """Set the times of a file, as `os.utime` does. Raises `OSError`."""
        os.utime(name, dir_fd=self._descriptor, follow_symlinks=False, **times)

    def leased(self, key: str) -> float:
        """Return when a proxy was last told to send the file of K, in seconds since the epoch, or 0."""
        try:
            return self.stat(f"{key}.meta").st_atime
        except OSError:
            return 0.0

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None if there is no such file."""
        try:
            return self.stat(name).st_size
        except OSError:
            return None

    def lock_unused(self, name: str) -> int | None:
        """Return a descriptor that holds the lock of an unused file; None if the file is in use."""
        try:
            descriptor = os.open(name, _READ, dir_fd=self._descriptor)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def remove_unused(self, name: str) -> bool:
        """Remove a file unless it is in use, and return whether it was removed."""
        descriptor = self.lock_unused(name)
        if descriptor is None:
            return False
        with closing(descriptor):
            self.unlink(name)
        return True

    def rename(self, name: str, new: str) -> None:
        """Rename a file, over another one if there is one. Raises `OSError`."""
        os.rename(name, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def unlink(self, name: str) -> bool:
        """Remove a file, and return whether it was removed."""
        try:
            os.unlink(name, dir_fd=self._descriptor)
        except OSError:
            return False
        return True

    @contextmanager
    def listed(self) -> Iterator[Iterator["os.DirEntry[str]"]]:
        """Give the regular files of the directory, with their status. Raises `OSError`."""
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._descriptor)
        with closing(descriptor), os.scandir(descriptor) as entries:
            yield _existing(entries)


def _existing(entries: Iterator["os.DirEntry[str]"]) -> Iterator["os.DirEntry[str]"]:
    for entry in entries:
        with suppress(FileNotFoundError):  # a part whose writer has just removed it
            if entry.is_file(follow_symlinks=False):
                entry.stat(follow_symlinks=False)  # the entry keeps the result
                yield entry


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor when the context ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def protect(descriptor: int) -> None:
    """Mark an open file as in use until it is closed."""
    with suppress(OSError):  # it is being removed; an open file can be read to its end
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def cost(size: int) -> int:
    """Return the bytes that a file of `size` bytes takes on the disk."""
    return -(-size // BLOCK) * BLOCK
