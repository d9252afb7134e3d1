"""The directory of a cache: what is in it, under which names, and what has to go. Plain calls, for worker threads.

K is a hash of a source's name and a key in it, V one of the version's validators and size; nothing else is a name:

    K-V         the bytes of a complete file, and nothing else: what a proxy sends
    K.meta      what is known of the current version of K, with the source and the key that it is of
    K.R.part    a file that arrives, or a K.meta that is written; its writer holds a lock on it (`flock`)
    usage       bytes in use, and when they were last counted; locked by whoever adds or removes a name

All locks are the kernel's, so they end with the process that holds them. A file that somebody here reads is locked
(shared), and is not evicted. The times of K.meta say when the file was last used (mtime), and when a proxy was last
told to send it (atime): a file is not removed while a proxy may still be about to open it.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.cache.entry import BLOCK, Entry, dump_entry, key_hash, load_entry
from downloadview_async.sources.local.root import Root

LEASE_SECONDS = 30.0
"""How long a proxy that has been told to send a file has to open it."""

SWEEP_SECONDS = 60.0
"""How often a directory is gone through, by whichever process uses it."""

_LOCK_PATIENCE = 10.0
_HASH = "[0-9a-f]{40}"
_DATA = re.compile(f"({_HASH})-{_HASH}")
_META = re.compile(rf"({_HASH})\.meta")
_PART = re.compile(rf"{_HASH}\.[0-9a-f]{{16}}\.part")
_MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(slots=True)
class Part:
    """A file that arrives: an open descriptor holds its lock. size: None where it is not known. reserved: its room."""

    key: str
    name: str
    descriptor: int
    size: int | None = None
    reserved: int = 0


@dataclass(slots=True)
class _Usage:
    """What the open, locked file `usage` says. None: it says nothing."""

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
class _Found:
    """What a directory has under one K."""

    used: float = 0.0
    leased: float = 0.0
    has_meta: bool = False
    data: list[tuple[str, int, float]] = field(default_factory=list)
    """Names, sizes and times of the last change (ctime)."""


class CacheDirectory:
    """A directory of cached files, which any number of processes use at once.

    max_bytes: what all of its files together may take, those that arrive included. max_unused: seconds after which a
    file that nobody uses is removed. used: when each K was last used, where this process knows that better than the
    disk.

    Every method may block on the disk, and raises `OSError` where that fails. Raises `ConfigurationError` where there
    is no such directory and none can be made.
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
                f"the cache directory {os.fspath(path)!r} cannot be made ({exc.strerror}): give one that this user "
                "may write to"
            ) from exc
        self.root = Root(path, symlinks="deny", settles=False)  # what is kept has validators of its own
        found = os.fstat(self.root.descriptor)
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
            raise ConfigurationError(
                f"others may put files into the cache directory {os.fspath(path)!r}, which are sent then: give one "
                "that belongs to this user, and that not everybody may write to"
            )
        self._check_locks()
        self.max_bytes = max_bytes
        self.bytes = 0
        """Bytes in use, as of this process's last look at them."""
        self._max_unused = max_unused
        self._used = used
        self._turn = threading.Lock()
        self._swept = -SWEEP_SECONDS

    @property
    def is_sweep_due(self) -> bool:
        """Whether this process has not looked after the directory for a while."""
        return time.monotonic() - self._swept >= SWEEP_SECONDS

    def _check_locks(self) -> None:
        """Raise `ConfigurationError` where the file system, or what confines this process, refuses locks."""
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
                f"{exc.strerror}): give one on a local disk"
            ) from exc
        finally:
            self._unlink(name)
            os.close(descriptor)

    def find(self, source: str, key: str, *, lease: bool = False) -> Entry | None:
        """Return the complete file of a key, which counts as a use of it; with `lease`, a proxy is about to open it."""
        name = f"{key_hash(source, key)}.meta"
        try:
            descriptor = self._open_meta(name)
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor)
            content = os.read(descriptor, 1 << 20)
            try:
                if lease:
                    self.lease(key_hash(source, key))  # by its name: a file that was evicted meanwhile has none
                else:
                    os.utime(descriptor, (found.st_atime, time.time()))
            except FileNotFoundError:
                return None
            except OSError:
                pass  # read only, perhaps; what is there can be sent all the same
        finally:
            os.close(descriptor)
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
        """Make a file for K to arrive in, which will `grow`; None where there is no room for it.

        Others are evicted for it: the least recently used, but none that is in use.
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
        """Let a part grow to `size`, and return whether there is room for that."""
        with self._locked() as usage:
            more = _cost(size) - _cost(part.reserved)
            if not self._has_room(usage, more):
                return False
            os.ftruncate(part.descriptor, size)
            part.reserved = size
            self._add(usage, more)
        return True

    def commit(self, part: Part, source: str, key: str, entry: Entry) -> None:
        """Give a part, which is complete, its name, and make it the current version of its key.

        What it has is on the disk before it has the name (`fdatasync`), so that no crash leaves a damaged file there.
        The descriptor stays open, and goes on protecting the file while it is.
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
            part.name, part.reserved = entry.data, size

    def discard(self, part: Part) -> None:
        """Remove a part. Its descriptor stays open."""
        self._unlink(part.name)
        with self._locked() as usage:
            self._add(usage, -_cost(part.reserved) - BLOCK)

    def renew(self, source: str, key: str, entry: Entry) -> None:
        """Keep what is known now of the current version of a key: that it is current, and what was said of it."""
        hashed = key_hash(source, key)
        with self._locked():
            if self._current(hashed) == entry.data:
                self._write_meta(hashed, dump_entry(source, key, entry), self._leased(hashed))

    def forget(self, source: str, key: str, data: str | None = None) -> None:
        """Remove what is kept of a key, unless that is another version than `data`; those who read it go on."""
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
        """Count what is there, and remove what dead processes, replaced versions and disuse have left."""
        with self._locked() as usage:
            self._sweep(usage)

    # What follows is called with the lock held.

    @contextmanager
    def _locked(self) -> Iterator[_Usage]:
        """Hold the directory's lock: what is added to it or removed from it, is by one process at a time."""
        deadline = time.monotonic() + _LOCK_PATIENCE
        if not self._turn.acquire(timeout=_LOCK_PATIENCE):
            raise OSError(errno.EBUSY, "the cache is busy", self.root.path)
        try:
            try:
                descriptor = self._open_usage()
            except PermissionError:  # of another user, who once looked after it: it is a count, and made anew
                self._unlink("usage")
                descriptor = self._open_usage()
            try:
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > deadline:  # a process that was stopped in the midst of it
                            raise
                        time.sleep(0.005)
                usage = _Usage(descriptor)
                yield usage
                if usage.used is not None:
                    self.bytes = usage.used
            finally:
                os.close(descriptor)
        finally:
            self._turn.release()

    def _open_usage(self) -> int:
        # whoever may open it may lock it, and so stop the cache
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
            # some more than needed, so that not every file goes through the directory
            self._sweep(usage, evict_to=self.max_bytes - need - self.max_bytes // 16)
        return usage.used + need <= self.max_bytes

    def _sweep(self, usage: _Usage, *, evict_to: int | None = None) -> None:
        now = time.time()
        total, keys = self._remove_leftovers(now)
        if evict_to is not None or self._max_unused:
            known = self._used()
            for key, found in keys.items():
                found.used = max(found.used, known.get(key, 0.0))
            for key, found in sorted(keys.items(), key=lambda item: item[1].used):
                is_old = not 0 <= now - found.used < self._max_unused and found.used <= now
                if not is_old and (evict_to is None or total <= evict_to):
                    break
                if 0 <= now - found.leased < LEASE_SECONDS:
                    continue
                total -= self._evict(key, found)
        usage.used, usage.swept = total, now
        usage.write()
        self._swept = time.monotonic()

    def _remove_leftovers(self, now: float) -> tuple[int, dict[str, _Found]]:
        """Return the bytes that all files take, and what there is of each K, without what belongs to nobody."""
        total = 0
        keys: dict[str, _Found] = {}
        with self._listed() as entries:
            for item in entries:
                if _PART.fullmatch(item.name):
                    if not self._remove_unused(item.name):
                        total += _cost(item.stat(follow_symlinks=False).st_size) + BLOCK
                elif match := _META.fullmatch(item.name):
                    said = item.stat(follow_symlinks=False)
                    found = keys.setdefault(match[1], _Found())
                    found.has_meta, found.used, found.leased = True, said.st_mtime, said.st_atime
                    total += BLOCK
                elif match := _DATA.fullmatch(item.name):
                    said = item.stat(follow_symlinks=False)
                    keys.setdefault(match[1], _Found()).data.append((item.name, said.st_size, said.st_ctime))
                    total += _cost(said.st_size)
        for key, found in list(keys.items()):
            current = self._current(key) if found.has_meta and len(found.data) > 1 else None
            for name, size, changed in list(found.data):
                is_orphan = not found.has_meta or (current is not None and name != current)
                # a proxy may have been told of one that has been replaced since
                if is_orphan and not 0 <= now - changed < LEASE_SECONDS and self._remove_unused(name):
                    found.data.remove((name, size, changed))
                    total -= _cost(size)
            if found.has_meta and not found.data:
                self._unlink(f"{key}.meta")
                total -= BLOCK
            if not found.has_meta or not found.data:
                del keys[key]
        return total, keys

    def _evict(self, key: str, found: _Found) -> int:
        """Remove all there is of a K, unless it is in use, and return the bytes that are free then."""
        descriptors = [self._lock_unused(name) for name, _, _ in found.data]
        meta, hidden = f"{key}.meta", f"{key}.{secrets.token_hex(8)}.part"
        try:
            if None in descriptors:
                return 0
            # Without its name nobody can lease it any more, and who has, since it was looked at, is seen now.
            try:
                self._rename(meta, hidden)
            except FileNotFoundError:
                return 0
            if 0 <= time.time() - os.stat(hidden, dir_fd=self.root.descriptor).st_atime < LEASE_SECONDS:
                self._rename(hidden, meta)
                return 0
            self._unlink(hidden)
            for name, _, _ in found.data:
                self._unlink(name)
            return BLOCK + sum(_cost(size) for _, size, _ in found.data)
        finally:
            for descriptor in descriptors:
                if descriptor is not None:
                    os.close(descriptor)

    def _retire(self, name: str, leased: float) -> int:
        """Remove a version that is not current any more, now or in a later sweep; return the bytes that are free."""
        size = self._size(name)
        if size is None:
            return 0
        if not 0 <= time.time() - leased < LEASE_SECONDS and self._remove_unused(name):
            return _cost(size)
        with suppress(OSError):  # sets the time of the last change, from which it is kept for a while
            found = os.stat(name, dir_fd=self.root.descriptor, follow_symlinks=False)
            times = (found.st_atime_ns, found.st_mtime_ns)
            os.utime(name, ns=times, dir_fd=self.root.descriptor, follow_symlinks=False)
        return 0

    def _modified(self, metadata: FileMetadata, before: str | None) -> float:
        """Return the time for the file of a new version, of which proxies make validators, with seconds and the size.

        It is Last-Modified only where that is all that tells versions apart. Where a tag does, two of them may have it
        in common: then it is the time now, or a second after that of the version before.
        """
        if metadata.etag is None and metadata.last_modified is not None:
            return metadata.last_modified
        with suppress(OSError):
            if before is not None:
                found = os.stat(before, dir_fd=self.root.descriptor, follow_symlinks=False)
                return max(time.time(), found.st_mtime + 1)
        return time.time()

    def _new_part(self, key: str, mode: int) -> Part:
        name = f"{key}.{secrets.token_hex(8)}.part"
        descriptor = os.open(name, _MAKE, mode, dir_fd=self.root.descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Part(key, name, descriptor)

    def _write_meta(self, key: str, content: bytes, leased: float) -> None:
        part = self._new_part(key, 0o600)
        try:
            os.write(part.descriptor, content)
            os.utime(part.descriptor, (leased, time.time()))
            self._rename(part.name, f"{key}.meta")
        except BaseException:
            self._unlink(part.name)
            raise
        finally:
            os.close(part.descriptor)

    def _current(self, key: str) -> str | None:
        """Return the K-V that a K.meta names, whoever's it is."""
        try:
            descriptor = self._open_meta(f"{key}.meta")
        except OSError:
            return None
        try:
            said: Any = json.loads(os.read(descriptor, 1 << 20).partition(b"\n")[2])
            name = said["data"]
            return name if (match := _DATA.fullmatch(name)) and match[1] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        finally:
            os.close(descriptor)

    def _open_meta(self, name: str) -> int:
        # reading must not look like a proxy's use of the file
        try:
            return os.open(name, _READ | getattr(os, "O_NOATIME", 0), dir_fd=self.root.descriptor)
        except PermissionError:  # another user's
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
        """Return a descriptor that holds the lock of a file that nobody uses, else None."""
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
        self._unlink(name)
        os.close(descriptor)
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
        try:
            with os.scandir(descriptor) as entries:
                yield _existing(entries)
        finally:
            os.close(descriptor)


def _existing(entries: Iterator["os.DirEntry[str]"]) -> Iterator["os.DirEntry[str]"]:
    for entry in entries:
        with suppress(FileNotFoundError):  # a part whose writer has just removed it
            if entry.is_file(follow_symlinks=False):
                entry.stat(follow_symlinks=False)  # which it remembers
                yield entry


def protect(descriptor: int) -> None:
    """Mark an open file as being in use, until it is closed."""
    with suppress(OSError):  # it is being removed; what is open can be read to its end
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _cost(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
