"""`Root`: opens files beneath a directory. No name, symbolic link or race leads out of it.

Linux's openat2 does the whole walk in the kernel. Where it is missing, `openat` opens one segment after the other, and
reads each link itself instead of following it. At the end, `fstat` makes sure that it is a regular file.
"""

import ctypes
import errno
import os
import stat
import sys
import time
import weakref
from functools import cache
from typing import Literal, NamedTuple

from downloadview_async.errors import (
    AccessDenied,
    ConfigurationError,
    FileError,
    FileMissing,
    SourceUnavailable,
    wrong_type,
)
from downloadview_async.http.metadata import unsettled_seconds
from downloadview_async.sources.local.refused_calls import is_passing
from downloadview_async.sources.names import Names, check_canonical, check_names_option, checked_segments

Symlinks = Literal["deny", "inside", "follow"]
"""deny: refuse every link. inside: follow links that stay beneath the root. follow: follow every link."""

# O_NONBLOCK: opening a FIFO must not wait for its writer.
_FILE_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_DIRECTORY_FLAGS = _FOLDER_FLAGS | getattr(os, "O_PATH", 0)
# O_PATH does not open the file itself, so looking at a device or a FIFO has no effect on it.
_STATUS_FLAGS = os.O_PATH | os.O_CLOEXEC if hasattr(os, "O_PATH") else _FILE_FLAGS
_MAX_LINKS = 40  # as in the kernel
_MAX_RACES = 8

# <linux/openat2.h>; the number is the same on every architecture
_SYS_OPENAT2 = 437
_AT_FDCWD = -100
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_CACHED = 0x20
_RESOLVE = {
    "deny": _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS,
    "inside": _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS,
    "follow": _RESOLVE_NO_MAGICLINKS,
}

# Types from statfs(2): these file systems open, describe and close a file whose name is cached without waiting. Others
# (FUSE, NFS, CIFS, 9p, ...) may ask a server or a process for each of these steps, and wait for the answer.
_QUICK_TYPES = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # btrfs
        0xF2F52010,  # F2FS
        0x2FC12FC1,  # ZFS
        0xCA451A4E,  # bcachefs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlayfs
        0xE0F5E1E2,  # EROFS
        0x73717368,  # SquashFS
    }
)

_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EISDIR})
# These errors of openat2 are about the name. Any other, such as EPERM or EIO, may refuse the call itself: if it is
# about the file, the calls that replace openat2 raise it again.
_ANSWERS = _MISSING | {errno.ELOOP, errno.EXDEV, errno.EMFILE, errno.ENFILE}
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.EXDEV})


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_libc = ctypes.CDLL(None, use_errno=True)
_HOW_SIZE = ctypes.sizeof(_OpenHow)
_syscall = None
if sys.platform == "linux":
    _syscall = _libc.syscall
    _syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    _syscall.restype = ctypes.c_int


@cache  # with `argtypes`, this makes a call take a third of the time
def _how(resolve: int, flags: int) -> tuple[_OpenHow, int]:
    """Return the argument of openat2, which the kernel only reads, and its address."""
    how = _OpenHow(flags=flags, mode=0, resolve=resolve)
    return how, ctypes.addressof(how)


def _openat2(directory: int, name: str, resolve: int, flags: int = _FILE_FLAGS) -> int:
    if "\0" in name:  # C would end the name there
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if _syscall is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), name)
    descriptor: int = _syscall(_SYS_OPENAT2, directory, os.fsencode(name), _how(resolve, flags)[1], _HOW_SIZE)
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return descriptor


def has_openat2() -> bool:
    """Return whether this system has openat2 (Linux 5.6) and lets us call it (some sandboxes do not)."""
    if sys.platform != "linux":
        return False  # elsewhere, the number belongs to another call
    try:
        os.close(_openat2(_AT_FDCWD, ".", 0))
    except (OSError, AttributeError):
        return False
    return True


Validators = Literal["nanoseconds", "seconds", "inode"]
"""How the entity tags of local files are made: see `PathSource`."""


class Opened(NamedTuple):
    """An open descriptor, its `fstat`, and whether its file system is quick, so that closing it waits for nothing."""

    descriptor: int
    status: os.stat_result
    quick: bool


class Root:
    """A directory, held open, and the policies for symbolic links and for names beneath it.

    `descriptor` is that of the directory. It is opened once, so a directory that is renamed is still served. `path` is
    absolute but not resolved, as a proxy's configuration would name it. settles: whether to wait, before a file that
    has just changed is described, until a further change would show in its times. validators: as in `PathSource`.

    Raises `ConfigurationError` if `path` is not a readable directory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        symlinks: Symlinks = "inside",
        names: Names = "portable",
        settles: bool = True,
        use_openat2: bool | None = None,
        validators: Validators = "nanoseconds",
    ) -> None:
        check_names_option(names)
        self.validators: Validators = validators
        if symlinks not in _RESOLVE:
            raise ConfigurationError(f"symlinks must be one of {', '.join(_RESOLVE)}, not {symlinks!r}")
        if not isinstance(path, str | bytes | os.PathLike):
            raise wrong_type("the root is the path of a directory, such as 'files'", path)
        if not os.fspath(path):
            raise ConfigurationError("the root is empty: name a directory, '.' for the current one")
        self.path = os.path.abspath(os.fsdecode(path))
        self._prefix = f"{self.path.rstrip('/')}/"
        self.symlinks: Symlinks = symlinks
        self.names: Names = "any" if names == "exact" else names  # the kernel drops empty segments
        self.settles = settles
        self.use_openat2 = has_openat2() if use_openat2 is None else use_openat2
        try:
            self.descriptor = os.open(self.path, _DIRECTORY_FLAGS)
        except OSError as exc:
            raise ConfigurationError(
                f"the root {self.path!r} cannot be opened ({exc.strerror}): create the directory, make it readable "
                "for this user, or correct the setting"
            ) from exc
        self.is_quick = _is_quick(self.descriptor)
        self._resolve_cached = _RESOLVE[symlinks] | _RESOLVE_CACHED | _RESOLVE_NO_XDEV
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)

    def close(self) -> None:
        """Close the directory. Open files stay open."""
        self._finalizer()

    def locate(self, name: str) -> str:
        """Return the absolute path of `name`, as a proxy on the same machine would open it."""
        return self._prefix + name

    def open_listed(self, name: str) -> tuple[int, os.stat_result] | None:
        """Do what `open_nowait` does, in less time, for a name from a listing; return None instead of any error."""
        if not self.use_openat2 or not self.is_quick:
            return None
        now = time.time_ns()
        try:
            descriptor = _openat2(self.descriptor, name, self._resolve_cached)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and not (self.settles and unsettled_seconds(status.st_mtime_ns, now)):
                return descriptor, status
        except OSError:  # whatever opens the file in another way will get this error, too
            pass
        close_unwritten(descriptor)
        return None

    def open_nowait(self, name: str) -> Opened | None:
        """Open a file if that waits for no disk; else return None. Otherwise like `open`."""
        check_canonical(name, self.names)
        # RESOLVE_CACHED covers only the walk: the file system itself opens, describes and closes the file.
        if not self.use_openat2 or not self.is_quick:
            return None
        try:
            descriptor = _openat2(self.descriptor, name, self._resolve_cached)
        except OSError as exc:
            # not cached, on another file system, outside the root, or the call is refused: `open` will find out
            if exc.errno == errno.EXDEV or exc.errno not in _ANSWERS:
                return None
            raise self._error(exc) from exc
        opened = _only_regular(descriptor, quick=True, settled=False)
        if self.settles and unsettled_seconds(opened.status.st_mtime_ns, time.time_ns()):
            close_unwritten(descriptor)
            return None
        return opened

    def open(self, name: str) -> Opened:
        """Open the regular file `name` beneath the root. May block on a disk.

        Returns the descriptor, which the caller closes, and its status. Raises `FileMissing`, `AccessDenied` or
        `SourceUnavailable`.
        """
        return _only_regular(self._open(name, _FILE_FLAGS), settled=self.settles)

    def open_folder(self, name: str) -> int:
        """Open the directory `name` beneath the root, or the root for an empty name. May block on a disk.

        Returns the descriptor, which the caller closes. Raises `FileMissing`, `AccessDenied` or `SourceUnavailable`.
        """
        try:
            if name:
                descriptor = self._open(name, _FOLDER_FLAGS)
            else:
                descriptor = os.open(".", _FOLDER_FLAGS, dir_fd=self.descriptor)
            try:
                os.stat(".", dir_fd=descriptor)  # fails if its names can be read, but nothing in it can be opened
            except OSError:
                close_unwritten(descriptor)
                raise
        except OSError as exc:
            raise file_error(exc) from exc
        return descriptor

    def status(self, name: str) -> os.stat_result:
        """Return the status of what the links at `name` lead to, as far as the policy follows them. May block.

        Raises `FileMissing`, `AccessDenied` or `SourceUnavailable`.
        """
        descriptor = self._open(name, _STATUS_FLAGS)
        try:
            return os.fstat(descriptor)
        except OSError as exc:
            raise file_error(exc) from exc
        finally:
            close_unwritten(descriptor)

    def _open(self, name: str, flags: int) -> int:
        segments = checked_segments(name, self.names)
        try:
            descriptor = self._open_in_kernel(name, flags) if self.use_openat2 else None
            return self._open_portably(name, segments, flags) if descriptor is None else descriptor
        except OSError as exc:
            raise self._error(exc) from exc

    def _error(self, exc: OSError) -> FileError:
        """Return our error for one of opening a name. It says if a link was refused: the kernel's text does not."""
        if self.symlinks == "inside" and exc.errno == errno.EXDEV:
            problem = 'a symbolic link that is absolute or leads out of the root: symlinks = "follow" would allow it'
        elif self.symlinks == "deny" and exc.errno == errno.ELOOP:
            problem = 'a symbolic link: symlinks = "inside" or "follow" would allow it'
        else:
            return file_error(exc)
        return AccessDenied(f"{exc.filename!r} is, or is below, {problem}")

    def _open_in_kernel(self, name: str, flags: int) -> int | None:
        """Return a descriptor, or None if the kernel refuses the call, so that other calls have to do its work."""
        for _ in range(_MAX_RACES):
            try:
                return _openat2(self.descriptor, name, _RESOLVE[self.symlinks], flags)
            except OSError as exc:
                if exc.errno in _ANSWERS:
                    raise
                # "a [...] component [...] raced with a rename [...] the caller may retry" [openat2(2), EAGAIN]
                if exc.errno != errno.EAGAIN:
                    self.use_openat2 = is_passing(exc) or has_openat2()
                    break
        return None

    def _open_portably(self, name: str, segments: list[str], flags: int) -> int:
        if self.symlinks == "follow":
            return os.open(name, flags, dir_fd=self.descriptor)
        return self._open_by_segments(segments, flags)

    def _open_by_segments(self, segments: list[str], flags: int) -> int:
        """Walk down with `openat` and O_NOFOLLOW. The target of a link is walked like a name beneath the root."""
        pending = segments[::-1]
        trail = [os.dup(self.descriptor)]  # the open directories from the root down to the current one
        links = 0
        try:
            while True:
                segment = pending.pop()
                if segment == "..":  # only a link can have brought it
                    if len(trail) == 1:
                        raise OSError(errno.EXDEV, "a link leads out of the root", segment)
                    close_unwritten(trail.pop())
                elif (target := _read_link(segment, trail[-1])) is not None:
                    links += 1
                    if self.symlinks == "deny" or links > _MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), segment)
                    if target.startswith("/"):
                        raise OSError(errno.EXDEV, "an absolute link leads out of the root", segment)
                    pending += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                elif pending:
                    trail.append(os.open(segment, _DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=trail[-1]))
                else:
                    return os.open(segment, flags | os.O_NOFOLLOW, dir_fd=trail[-1])
                if not pending:  # a link to `.`, or to a path that ends with `..`
                    return os.open(".", flags, dir_fd=trail[-1])
        finally:
            for descriptor in trail:
                close_unwritten(descriptor)


def close_unwritten(descriptor: int) -> None:
    """Close a descriptor by which nothing was written. It is closed in any case, whatever error this gives."""
    try:
        os.close(descriptor)
    except OSError:
        return


def open_trusted(path: str) -> Opened:
    """Open the regular file at a path that the application itself has chosen, following links. May block on a disk.

    Returns and raises what `Root.open` does.
    """
    try:
        descriptor = os.open(path, _FILE_FLAGS)
    except OSError as exc:
        raise file_error(exc) from exc
    except ValueError as exc:
        raise FileMissing(f"not a valid path of a file: {path!r}") from exc
    return _only_regular(descriptor)


def _read_link(name: str, directory: int) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # not a link
            return None
        raise


def settled_stat(descriptor: int) -> os.stat_result:
    """Return the `fstat` of an open file at a time from which on any change shows in its times.

    If the file has changed in the last 30 ms, this sleeps until they are over.
    """
    status = os.fstat(descriptor)
    if seconds := unsettled_seconds(status.st_mtime_ns, time.time_ns()):
        time.sleep(seconds)
        status = os.fstat(descriptor)
    return status


def _only_regular(descriptor: int, *, quick: bool | None = None, settled: bool = True) -> Opened:
    try:
        status = settled_stat(descriptor) if settled else os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileMissing("not a regular file")
    except OSError as exc:
        close_unwritten(descriptor)
        raise file_error(exc) from exc
    except BaseException:
        close_unwritten(descriptor)
        raise
    return Opened(descriptor, status, _is_quick(descriptor) if quick is None else quick)


def _is_quick(descriptor: int) -> bool:
    """Return whether the file system of a descriptor never asks a server or a process. May block if it does."""
    if sys.platform != "linux":
        return False
    buffer = ctypes.create_string_buffer(512)  # struct statfs begins with its type, a long
    if _libc.fstatfs(ctypes.c_int(descriptor), buffer):
        return False
    return ctypes.c_ulong.from_buffer(buffer).value in _QUICK_TYPES


def file_error(exc: OSError) -> FileError:
    """Return our error for an error of the operating system about a file."""
    if exc.errno in _MISSING:
        return FileMissing(str(exc))
    if exc.errno in _DENIED:
        return AccessDenied(str(exc))
    return SourceUnavailable(str(exc))
