"""`Refusals`: remembers where a fast system call does not work, so that a slower one replaces it.

A sandbox (seccomp), a file system (FUSE, GPFS) or a kernel may refuse such a call with any error. Then the slower call
does the work, at once and from then on. An error of the file itself, such as EIO, is raised by the slower call as well.
"""

import errno
import logging

logger = logging.getLogger("downloadview_async")

# These errors are about one file, one connection or this moment, and not about the call.
_PASSING = frozenset(
    {
        errno.EBADF,
        errno.EBADMSG,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EISDIR,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENODATA,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.ESTALE,
        errno.ETIMEDOUT,
        getattr(errno, "EREMOTEIO", errno.EIO),
        getattr(errno, "EUCLEAN", errno.EIO),
    }
)


def is_passing(exc: OSError) -> bool:
    """Return whether an error of a call is about one file or this moment, so that the call may work the next time."""
    return exc.errno in _PASSING


class Refusals:
    """Remembers for the life of the process which devices (`st_dev`) refuse a call.

    devices: a file of one of these is served without the call.
    """

    def __init__(self, call: str) -> None:
        self._call = call
        self.devices: set[int] = set()

    def note(self, device: int, exc: OSError) -> None:
        """Remember a call that has failed, unless it may work with the next file."""
        if is_passing(exc) or device in self.devices:
            return
        self.devices.add(device)
        name = errno.errorcode.get(exc.errno or 0, str(exc.errno))
        logger.info("%s is refused with %s for files of device %d: they are read without it", self._call, name, device)
