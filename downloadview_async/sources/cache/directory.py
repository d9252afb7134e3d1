"""The directory of a cache: its file names, its locks and the eviction. Plain blocking calls, for worker threads.

K is a hash of a source's name and a key in it, V a hash of the version's validators and size, R is random:

    K-V         the bytes of a complete file, and nothing else: a proxy can send it
    K.meta      the description of the current version of K, with its source and key
    K.R.part    a file that arrives, or a K.meta that is being written; its writer holds a lock on it (`flock`)
    usage       bytes in use, and when they were last counted; locked while a name is added or removed

All locks are the kernel's, so they end with the process that holds them. A file that a process reads has a shared lock
and is not evicted. The times of K.meta tell when the file was last used (mtime), and when a proxy was last told to send
it (atime): a file is not removed while a proxy may still be about to open it.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.cache.entry import BLOCK, Entry, dump_entry, key_hash, load_entry
from downloadview_async.sources.local.root import Root

LEASE_SECONDS = 30.0
"""Seconds that a proxy has to open a file after it was told to send it."""

SWEEP_SECONDS = 60.0
"""Seconds between two sweeps of a directory, by any of the processes that use it."""

_LOCK_PATIENCE = 10.0
_HASH = "[0-9a-f]{40}"
_DATA = re.compile(f"({_HASH})-{_HASH}")
_META = re.compile(rf"({_HASH})\.meta")
_PART = re.compile(rf"{_HASH}\.[0-9a-f]{{16}}\.part")
_MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
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


@dataclass(slots=True)
class _Usage:
    """The content of the open, locked file `usage`. used: None if the file has no valid content."""

    descriptor: int
    used: int | None = None
    swept: float = 0.0

    def __post_init__(self) -> None:
        match = re.fullmatch(rb"([0-9]{1,18}) ([0-9]{1,12})\n", os.pread(self.descriptor, 64, 0))
        if match:
            self.used, self.swept = int(match[1]), float(match[2])

    def write(self) -> None:
        assert self.used is not None
        content = b"%d %d\n" % (max(self.used, 0), self.swept)
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))


@dataclass(slots=True)
class _Files:
    """The files of one K in a directory."""

    used: float = 0.0
    leased: float = 0.0
    has_meta: bool = False
    data: list[tuple[str, int, float]] = field(default_factory=list)
    """Name, size and time of the last change (ctime) of each K-V."""


class CacheDirectory:
    """A directory of cached files, which any number of processes use at once.

    max_bytes: the most bytes that all files together may take, including those that arrive. max_unused: seconds after
    which an unused file is removed. used: returns when each K was last used, if this process knows a later time than
    the disk.

    Every method may block on the disk, and raises `OSError` if it fails. Raises `ConfigurationError` if the directory
    does not exist and cannot be made, if others may write to it, or if it has no locks.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int,
        max_unused: float,
        used: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as exc:
            raise ConfigurationError(
                f"the cache directory {os.fspath(path)!r} cannot be made ({exc.strerror}): choose one that this user "
                "may write to"
            ) from exc
        self.root = Root(path, symlinks="deny", settles=False)  # kept files have their validators in K.meta
        status = os.fstat(self.root.descriptor)
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
            raise ConfigurationError(
                f"others may put files into the cache directory {os.fspath(path)!r}, and clients would get them: "
                "choose one that belongs to this user and that others may not write to"
            )
        self._check_locks()
        self.max_bytes = max_bytes
        self.bytes = 0
        """Bytes in use, when this process last looked."""
        self._max_unused = max_unused
        self._used = used
        self._turn = threading.Lock()
        self._swept = -SWEEP_SECONDS

    @property
    def is_sweep_due(self) -> bool:
        """Whether the last sweep by this process is `SWEEP_SECONDS` ago."""
        return time.monotonic() - self._swept >= SWEEP_SECONDS

    def _check_locks(self) -> None:
        """Raise `ConfigurationError` if the file system or a sandbox refuses locks."""
        name = f"{'0' * 40}.{secrets.token_hex(8)}.part"
        try:
            descriptor = os.open(name, _MAKE, 0o600, dir_fd=self.root.descriptor)
        except OSError:
            return  # nothing can be written, so nothing needs a lock: files are sent without being kept
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process, such as a backup, has locked it: locks work
        except OSError as exc:
            raise ConfigurationError(
                f"the cache directory {self.root.path!r} is on a file system that refuses locks (flock: "
                f"{exc.strerror}): choose one on a local disk"
            ) from exc
        finally:
            self._unlink(name)
            os.close(descriptor)

    def find(self, source: str, key: str, *, lease: bool = False) -> Entry | None:
        """Return the complete file of a key, and note its use; with `lease`, note that a proxy is about to open it."""
        name = f"{key_hash(source, key)}.meta"
        try:
            descriptor = self._open_meta(name)
        except FileNotFoundError:
            return None
        with _closing(descriptor):
            status = os.fstat(descriptor)
            content = os.read(descriptor, 1 << 20)
            try:
                if lease:
                    self.lease(key_hash(source, key))  # by its name, which a file that was evicted meanwhile has lost
                else:
                    os.utime(descriptor, (status.st_atime, time.time()))
            except FileNotFoundError:
                return None
            except OSError:
                pass  # perhaps read-only: the file can be sent without noting its use
        entry = load_entry(content, source, key)
        if entry is None:
            with suppress(OSError):
                self.forget(source, key)
        return entry

    def lease(self, key: str) -> None:
        """Note that a proxy is about to open the file of K."""
        now = time.time()
        os.utime(f"{key}.meta", (now, now), dir_fd=self.root.descriptor, follow_symlinks=False)

    def begin(self, key: str, size: int | None) -> Part | None:
        """Make a part for K, which will `grow`; None if there is no room for it.

        The least recently used files are evicted for it, but none that is in use.
        """
        if size is not None and _cost(size) + BLOCK > self.max_bytes:
            return None
        with self._locked() as usage:
            if not self._has_room(usage, BLOCK):
                return None
            part = self._new_part(key, 0o644)
            part.size = size
            self._add(usage, BLOCK)
        return part

    def grow(self, part: Part, size: int) -> bool:
        """Reserve `size` bytes for a part, and return whether there is room for them."""
        with self._locked() as usage:
            more = _cost(size) - _cost(part.reserved)
            if not self._has_room(usage, more):
                return False
            os.ftruncate(part.descriptor, size)
            part.reserved = size
            self._add(usage, more)
        return True

    def commit(self, part: Part, source: str, key: str, entry: Entry) -> None:
        """Give a complete part its name, and make it the current version of its key.

        Its bytes are on the disk before it has the name (`fdatasync`), so that no crash leaves a damaged file. The
        descriptor stays open, and protects the file as long as it is.
        """
        size = entry.metadata.size
        assert size is not None
        os.ftruncate(part.descriptor, size)
        os.fdatasync(part.descriptor)
        with self._locked() as usage:
            before = self._current(part.key)
            leased = self._leased(part.key)
            os.utime(part.descriptor, (time.time(), self._modified(entry.metadata, before)))
            replaced = self._size(entry.data)
            fcntl.flock(part.descriptor, fcntl.LOCK_SH)
            self._rename(part.name, entry.data)
            try:
                self._write_meta(part.key, dump_entry(source, key, entry), leased)
            except BaseException:
                self._unlink(entry.data)
                raise
            self._add(usage, _cost(size) - _cost(part.reserved))
            if replaced is not None:
                self._add(usage, -_cost(replaced))
            if before is not None:
                self._add(usage, -BLOCK)
                if before != entry.data:
                    self._add(usage, -self._retire(before, leased))
            part.name, part.reserved, part.is_kept = entry.data, size, True

    def discard(self, part: Part) -> None:
        """Remove a part. Its descriptor stays open."""
        self._unlink(part.name)
        with self._locked() as usage:
            self._add(usage, -_cost(part.reserved) - BLOCK)

    def renew(self, source: str, key: str, entry: Entry) -> None:
        """Write the new description of the current version of a key, which has been revalidated."""
        hashed = key_hash(source, key)
        with self._locked():
            if self._current(hashed) == entry.data:
                self._write_meta(hashed, dump_entry(source, key, entry), self._leased(hashed))

    def forget(self, source: str, key: str, data: str | None = None) -> None:
        """Remove the file of a key, unless it is another version than `data`. Open files can be read to their end."""
        hashed = key_hash(source, key)
        with self._locked() as usage:
            current, leased = self._current(hashed), self._leased(hashed)
            if data is not None and current not in (None, data):
                return
            if self._unlink(f"{hashed}.meta"):
                self._add(usage, -BLOCK)
            if current is not None:
                self._add(usage, -self._retire(current, leased))

    def sweep(self) -> None:
        """Count the files, and remove unused ones, replaced versions and those that dead processes have left."""
        with self._locked() as usage:
            self._sweep(usage)

    # The following methods are called with the lock held.

    @contextmanager
    def _locked(self) -> Iterator[_Usage]:
        """Hold the lock of the directory: one process at a time adds or removes files."""
        deadline = time.monotonic() + _LOCK_PATIENCE
        if not self._turn.acquire(timeout=_LOCK_PATIENCE):
            raise OSError(errno.EBUSY, "the cache is busy", self.root.path)
        try:
            try:
                descriptor = self._open_usage()
            except PermissionError:  # another user made it; it has only a count, which is made anew
                self._unlink("usage")
                descriptor = self._open_usage()
            with _closing(descriptor):
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > deadline:  # a process was stopped while it held the lock
                            raise
                        time.sleep(0.005)
                usage = _Usage(descriptor)
                yield usage
                if usage.used is not None:
                    self.bytes = usage.used
        finally:
            self._turn.release()

    def _open_usage(self) -> int:
        # mode 0600, because a user that can open it can lock it and so stop the cache
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open("usage", flags, 0o600, dir_fd=self.root.descriptor)

    def _add(self, usage: _Usage, count: int) -> None:
        if usage.used is not None and count:
            usage.used += count
            usage.write()

    def _has_room(self, usage: _Usage, need: int) -> bool:
        if usage.used is None or time.time() - usage.swept >= SWEEP_SECONDS:
            self._sweep(usage)
        assert usage.used is not None
        if usage.used + need > self.max_bytes:
            # evict more than needed, so that not every new file causes a sweep
            self._sweep(usage, evict_to=self.max_bytes - need - self.max_bytes // 16)
        return usage.used + need <= self.max_bytes

    def _sweep(self, usage: _Usage, *, evict_to: int | None = None) -> None:
        now = time.time()
        total, keys = self._remove_leftovers(now)
        if evict_to is not None or self._max_unused:
            known = self._used()
            for key, files in keys.items():
                files.used = max(files.used, known.get(key, 0.0))
            for key, files in sorted(keys.items(), key=lambda item: item[1].used):
                is_old = not 0 <= now - files.used < self._max_unused and files.used <= now
                if not is_old and (evict_to is None or total <= evict_to):
                    break
                if 0 <= now - files.leased < LEASE_SECONDS:
                    continue
                total -= self._evict(key, files)
        usage.used, usage.swept = total, now
        usage.write()
        self._swept = time.monotonic()

    def _remove_leftovers(self, now: float) -> tuple[int, dict[str, _Files]]:
        """Remove leftovers. Return the bytes that all other files take, and the files of each K."""
        total = 0
        keys: dict[str, _Files] = {}
        with self._listed() as entries:
            for item in entries:
                if _PART.fullmatch(item.name):
                    if not self._remove_unused(item.name):
                        total += _cost(item.stat(follow_symlinks=False).st_size) + BLOCK
                elif match := _META.fullmatch(item.name):
                    status = item.stat(follow_symlinks=False)
                    files = keys.setdefault(match[1], _Files())
                    files.has_meta, files.used, files.leased = True, status.st_mtime, status.st_atime
                    total += BLOCK
                elif match := _DATA.fullmatch(item.name):
                    status = item.stat(follow_symlinks=False)
                    keys.setdefault(match[1], _Files()).data.append((item.name, status.st_size, status.st_ctime))
                    total += _cost(status.st_size)
        for key, files in list(keys.items()):
            current = self._current(key) if files.has_meta and len(files.data) > 1 else None
            for name, size, changed in list(files.data):
                is_orphan = not files.has_meta or (current is not None and name != current)
                # a proxy may have been told to send a version that has been replaced since
                if is_orphan and not 0 <= now - changed < LEASE_SECONDS and self._remove_unused(name):
                    files.data.remove((name, size, changed))
                    total -= _cost(size)
            if files.has_meta and not files.data:
                self._unlink(f"{key}.meta")
                total -= BLOCK
            if not files.has_meta or not files.data:
                del keys[key]
        return total, keys

    def _evict(self, key: str, files: _Files) -> int:
        """Remove all files of a K, unless one is in use, and return the bytes that this frees."""
        meta, hidden = f"{key}.meta", f"{key}.{secrets.token_hex(8)}.part"
        with ExitStack() as locks:
            for name, _, _ in files.data:
                if (descriptor := self._lock_unused(name)) is None:
                    return 0
                locks.callback(os.close, descriptor)
            # Without its name K.meta cannot be leased any more. A lease since the sweep began shows in its time.
            try:
                self._rename(meta, hidden)
            except FileNotFoundError:
                return 0
            if 0 <= time.time() - os.stat(hidden, dir_fd=self.root.descriptor).st_atime < LEASE_SECONDS:
                self._rename(hidden, meta)
                return 0
            self._unlink(hidden)
            for name, _, _ in files.data:
                self._unlink(name)
        return BLOCK + sum(_cost(size) for _, size, _ in files.data)

    def _retire(self, name: str, leased: float) -> int:
        """Remove a replaced version, now or in a later sweep; return the bytes that this frees now."""
        size = self._size(name)
        if size is None:
            return 0
        if not 0 <= time.time() - leased < LEASE_SECONDS and self._remove_unused(name):
            return _cost(size)
        with suppress(OSError):  # sets ctime, after which the file is kept for `LEASE_SECONDS`
            status = os.stat(name, dir_fd=self.root.descriptor, follow_symlinks=False)
            times = (status.st_atime_ns, status.st_mtime_ns)
            os.utime(name, ns=times, dir_fd=self.root.descriptor, follow_symlinks=False)
        return 0

    def _modified(self, metadata: FileMetadata, before: str | None) -> float:
        """Return the mtime for a new version. Proxies make validators of its seconds and of the size.

        It is Last-Modified only if the version has no entity tag. Versions with different tags may have the same
        Last-Modified, so they get the current time, or a second after the time of the version before.
        """
        if metadata.etag is None and metadata.last_modified is not None:
            return metadata.last_modified
        with suppress(OSError):
            if before is not None:
                status = os.stat(before, dir_fd=self.root.descriptor, follow_symlinks=False)
                return max(time.time(), status.st_mtime + 1)
        return time.time()

    def _new_part(self, key: str, mode: int) -> Part:
        name = f"{key}.{secrets.token_hex(8)}.part"
        descriptor = os.open(name, _MAKE, mode, dir_fd=self.root.descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Part(key, name, descriptor, os.fstat(descriptor))

    def _write_meta(self, key: str, content: bytes, leased: float) -> None:
        part = self._new_part(key, 0o600)
        with _closing(part.descriptor):
            try:
                os.write(part.descriptor, content)
                os.utime(part.descriptor, (leased, time.time()))
                self._rename(part.name, f"{key}.meta")
            except BaseException:
                self._unlink(part.name)
                raise

    def _current(self, key: str) -> str | None:
        """Return the K-V that a K.meta names, whatever its source and key are."""
        try:
            with _closing(self._open_meta(f"{key}.meta")) as descriptor:
                loaded: Any = json.loads(os.read(descriptor, 1 << 20).partition(b"\n")[2])
            name = loaded["data"]
            return name if (match := _DATA.fullmatch(name)) and match[1] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _open_meta(self, name: str) -> int:
        # reading must not change atime, which is the time of the last lease
        try:
            return os.open(name, _READ | getattr(os, "O_NOATIME", 0), dir_fd=self.root.descriptor)
        except PermissionError:  # it belongs to another user
            return os.open(name, _READ, dir_fd=self.root.descriptor)

    def _leased(self, key: str) -> float:
        try:
            return os.stat(f"{key}.meta", dir_fd=self.root.descriptor, follow_symlinks=False).st_atime
        except OSError:
            return 0.0

    def _size(self, name: str) -> int | None:
        try:
            return os.stat(name, dir_fd=self.root.descriptor, follow_symlinks=False).st_size
        except OSError:
            return None

    def _lock_unused(self, name: str) -> int | None:
        """Return a descriptor that holds the lock of an unused file; None if the file is in use."""
        try:
            descriptor = os.open(name, _READ, dir_fd=self.root.descriptor)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def _remove_unused(self, name: str) -> bool:
        descriptor = self._lock_unused(name)
        if descriptor is None:
            return False
        with _closing(descriptor):
            self._unlink(name)
        return True

    def _rename(self, name: str, new: str) -> None:
        os.rename(name, new, src_dir_fd=self.root.descriptor, dst_dir_fd=self.root.descriptor)

    def _unlink(self, name: str) -> bool:
        try:
            os.unlink(name, dir_fd=self.root.descriptor)
        except OSError:
            return False
        return True

    @contextmanager
    def _listed(self) -> Iterator[Iterator["os.DirEntry[str]"]]:
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.root.descriptor)
        with _closing(descriptor), os.scandir(descriptor) as entries:
            yield _existing(entries)


def _existing(entries: Iterator["os.DirEntry[str]"]) -> Iterator["os.DirEntry[str]"]:
    for entry in entries:
        with suppress(FileNotFoundError):  # a part whose writer has just removed it
            if entry.is_file(follow_symlinks=False):
                entry.stat(follow_symlinks=False)  # the entry keeps the result
                yield entry


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def protect(descriptor: int) -> None:
    """Mark an open file as in use until it is closed."""
    with suppress(OSError):  # it is being removed; an open file can be read to its end
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _cost(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
