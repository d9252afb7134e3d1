"""`CacheDirectory`: the directory of a cache, which several processes share. Plain blocking calls, for worker threads.

Its files are those of `CacheFiles`, and two besides:

    usage       bytes in use, and when they were last counted; locked while a name is added or removed
    purges      what was purged: see `PurgeLog`

All locks are the kernel's, so they end with the process that holds them.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.cache.entry import BLOCK, Entry, dump_entry, key_hash, key_in, load_entry
from downloadview_async.sources.cache.eviction import retire, sweep
from downloadview_async.sources.cache.files import MAKE, META, CacheFiles, Part, closing, cost
from downloadview_async.sources.cache.purges import Position, Purge, PurgeLog
from downloadview_async.sources.local.root import Root

SWEEP_SECONDS = 60.0
"""Seconds between two sweeps of a directory, by any of the processes that use it."""

_LOCK_PATIENCE = 10.0
_PURGED_AT_ONCE = 256  # files that are removed while the lock is held


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
        self._files = CacheFiles(self.root.descriptor)
        self._check_locks()
        self.purges = PurgeLog(self.root.descriptor)
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
            descriptor = os.open(name, MAKE, 0o600, dir_fd=self.root.descriptor)
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
            self._files.unlink(name)
            os.close(descriptor)

    def find(self, source: str, key: str, *, lease: bool = False) -> Entry | None:
        """Return the complete file of a key, and note its use; with `lease`, note that a proxy is about to open it."""
        name = f"{key_hash(source, key)}.meta"
        try:
            descriptor = self._files.open_meta(name)
        except FileNotFoundError:
            return None
        with closing(descriptor):
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
        self._files.set_times(f"{key}.meta", times=(now, now))

    def begin(self, key: str, size: int | None) -> Part | None:
        """Make a part for K, which will `grow`; None if there is no room for it.

        The least recently used files are evicted for it, but none that is in use.
        """
        if size is not None and cost(size) + BLOCK > self.max_bytes:
            return None
        with self._locked() as usage:
            if not self._has_room(usage, BLOCK):
                return None
            part = self._files.new_part(key, 0o644)
            part.size = size
            try:
                self._add(usage, BLOCK)
            except BaseException:
                self._files.drop(part.name, part.descriptor)
                raise
        return part

    def grow(self, part: Part, size: int) -> bool:
        """Reserve `size` bytes for a part, and return whether there is room for them."""
        with self._locked() as usage:
            more = cost(size) - cost(part.reserved)
            if not self._has_room(usage, more):
                return False
            os.ftruncate(part.descriptor, size)
            part.reserved = size
            self._add(usage, more)
        return True

    def commit(self, part: Part, source: str, key: str, entry: Entry, *, began: Position | None = None) -> bool:
        """Give a complete part its name, and make it the current version of its key, and return whether that was done.

        It is not done if the file was purged after `began`, the end of the log of purges when the source was asked.

        Its bytes are on the disk before it has the name (`fdatasync`), so that no crash leaves a damaged file. The
        descriptor stays open, and protects the file as long as it is.
        """
        size = entry.metadata.size
        assert size is not None
        os.ftruncate(part.descriptor, size)
        os.fdatasync(part.descriptor)
        with self._locked() as usage:
            if self.is_purged(source, key, since=began):
                return False
            before = self._files.current(part.key)
            leased = self._files.leased(part.key)
            os.utime(part.descriptor, (time.time(), self._modified(entry.metadata, before)))
            replaced = self._files.size(entry.data)
            fcntl.flock(part.descriptor, fcntl.LOCK_SH)
            self._files.rename(part.name, entry.data)
            try:
                self._files.write_meta(part.key, dump_entry(source, key, entry), leased)
            except BaseException:
                self._files.unlink(entry.data)
                raise
            self._add(usage, cost(size) - cost(part.reserved))
            if replaced is not None:
                self._add(usage, -cost(replaced))
            if before is not None:
                self._add(usage, -BLOCK)
                if before != entry.data:
                    self._add(usage, -retire(self._files, before, leased))
            part.name, part.reserved, part.is_kept = entry.data, size, True
        return True

    def discard(self, part: Part) -> None:
        """Remove a part. Its descriptor stays open."""
        self._files.unlink(part.name)
        with self._locked() as usage:
            self._add(usage, -cost(part.reserved) - BLOCK)

    def renew(self, source: str, key: str, entry: Entry, *, began: Position | None = None) -> bool:
        """Write the new description of a version that has been revalidated; return whether it is still current.

        It is not if the file was purged after `began`: see `commit`.
        """
        hashed = key_hash(source, key)
        with self._locked():
            if self.is_purged(source, key, since=began) or self._files.current(hashed) != entry.data:
                return False
            self._files.write_meta(hashed, dump_entry(source, key, entry), self._files.leased(hashed))
        return True

    def forget(self, source: str, key: str, data: str | None = None) -> None:
        """Remove the file of a key, unless it is another version than `data`. Open files can be read to their end."""
        hashed = key_hash(source, key)
        with self._locked() as usage:
            current, leased = self._files.current(hashed), self._files.leased(hashed)
            if data is not None and current not in (None, data):
                return
            self._remove(usage, hashed, current, leased)

    def purge(self, purge: Purge) -> int:
        """Remove files, and return how many there were. Open files can be read to their end.

        What was fetched for them before is not kept, by whatever process.
        """
        with self._locked():
            self.purges.add(purge)  # what is fetched now must not be kept after the removal
        count = self._remove_all(purge)
        with self._locked():
            self.purges.add(purge)  # a process may have read of it, and then found a file that was not removed yet
        return count

    def is_purged(self, source: str, key: str, *, since: Position | None) -> bool:
        """Return whether a file was purged after a position in the log of purges; with None, it was not."""
        purges = () if since is None else self.purges.since(since)
        return purges is None or any(purge.covers(source, key) for purge in purges)

    def _remove_all(self, purge: Purge) -> int:
        """Remove the files that a purge covers, and return how many there were."""
        if purge.is_prefix:
            with self._files.listed() as entries:
                names = [item.name for item in entries if META.fullmatch(item.name)]
            keys = [name.removesuffix(".meta") for name in names if self._is_covered(name, purge)]
        else:
            keys = [key_hash(purge.source, purge.name)]
        count = 0
        for index in range(0, len(keys), _PURGED_AT_ONCE):
            with self._locked() as usage:
                for hashed in keys[index : index + _PURGED_AT_ONCE]:
                    count += self._remove(usage, hashed, self._files.current(hashed), self._files.leased(hashed))
        return count

    def _is_covered(self, name: str, purge: Purge) -> bool:
        """Return whether a purge covers the file that a K.meta describes."""
        try:
            with closing(self._files.open_meta(name)) as descriptor:
                described = key_in(os.read(descriptor, 1 << 20))
        except OSError:  # it was removed meanwhile
            return False
        return described is not None and purge.covers(*described)

    def sweep(self) -> None:
        """Count the files, and remove unused ones, replaced versions and those that dead processes have left."""
        with self._locked() as usage:
            self._sweep(usage)

    # The following methods are called with the lock held, except for `_locked` itself.

    def _remove(self, usage: _Usage, hashed: str, current: str | None, leased: float) -> bool:
        """Remove the file of K, and return whether there was one."""
        is_removed = self._files.unlink(f"{hashed}.meta")
        if is_removed:
            self._add(usage, -BLOCK)
        if current is not None:
            self._add(usage, -retire(self._files, current, leased))
        return is_removed

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
                self._files.unlink("usage")
                descriptor = self._open_usage()
            with closing(descriptor):
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

    @property
    def evictions(self) -> int:
        """How many files this process has evicted."""
        return self._files.evictions

    def _sweep(self, usage: _Usage, *, evict_to: int | None = None) -> None:
        now = time.time()
        usage.used = sweep(self._files, used=self._used(), max_unused=self._max_unused, evict_to=evict_to, now=now)
        usage.swept = now
        usage.write()
        self._swept = time.monotonic()

    def _modified(self, metadata: FileMetadata, before: str | None) -> float:
        """Return the mtime for a new version. Proxies make validators of its seconds and of the size.

        It is Last-Modified only if the version has no entity tag. Versions with different tags may have the same
        Last-Modified, so they get the current time, or a second after the time of the version before.
        """
        if metadata.etag is None and metadata.last_modified is not None:
            return metadata.last_modified
        with suppress(OSError):
            if before is not None:
                return max(time.time(), self._files.stat(before).st_mtime + 1)
        return time.time()
