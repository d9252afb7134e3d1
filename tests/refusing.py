"""System calls that the kernel refuses, by seccomp, to this process and to those that it starts."""

import ctypes
import os
import platform
import struct
import termios

_NUMBERS = {
    "x86_64": {"sendfile": 40, "preadv2": 327, "openat2": 437, "fstatfs": 138, "outq": 16, "flock": 73},
    "aarch64": {"sendfile": 71, "preadv2": 286, "openat2": 437, "fstatfs": 44, "outq": 29, "flock": 32},
}
_ARGUMENTS = {"outq": termios.TIOCOUTQ}  # of ioctl: one request alone
CALLS = sorted(_NUMBERS["x86_64"].keys() - {"flock"})
"""Those by which files are opened and sent."""
IS_POSSIBLE = platform.system() == "Linux" and platform.machine() in _NUMBERS

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06  # of <linux/bpf_common.h>
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def refuse(call: str, number: int) -> None:
    """Have a call fail with an error number from now on, for this thread and for all that it starts."""
    steps = [(_LOAD, 0, 0, 0), (_EQUALS, 0, 3 if call in _ARGUMENTS else 1, _NUMBERS[platform.machine()][call])]
    if call in _ARGUMENTS:
        steps += [(_LOAD, 0, 0, 24), (_EQUALS, 0, 1, _ARGUMENTS[call])]  # the low half of the second argument
    steps += [(_RETURN, 0, 0, _ERRNO | number), (_RETURN, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
