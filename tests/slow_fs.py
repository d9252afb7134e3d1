"""A slow disk for tests: a FUSE file system whose operations take their time, or hang until they are released.

It lives in the test's own process, as a thread that answers the kernel on `/dev/fuse`, so a test can say at any moment
what is slow and see what is waited for. Only the server under test sees the mount, in a mount namespace of its own:
it goes with the server's last process, whatever ends that.
"""

import contextlib
import ctypes
import errno
import heapq
import os
import random
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DELAY = 0.2
"""Seconds that a slow operation takes."""

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_NOSUID_NODEV, _MS_REC_PRIVATE = 2 | 4, 0x4000 | 1 << 18
_PR_SET_PDEATHSIG = 1
_PATIENCE = 30.0  # seconds; only what hangs takes as long

# <linux/fuse.h>
_HEADER_IN, _HEADER_OUT = struct.Struct("<IIQQIII4x"), struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHH32x")
_READ_IN = struct.Struct("<QQI")
_FORGET, _BATCH_FORGET, _INTERRUPT, _INIT, _DESTROY = 2, 42, 36, 26, 38
_OPERATIONS = {1: "lookup", 3: "getattr", 14: "open", 15: "read", 17: "statfs", 18: "release", 25: "flush"}
_ROOT = 1
_ASYNC_READ, _PARALLEL_LOOKUPS, _MAX_PAGES = 1 << 0, 1 << 18, 1 << 22
_DIRECT_IO = 1 << 0


@cache
def content_of(name: str, size: int) -> bytes:
    """Return the content of the file `name`, the same in every process."""
    return random.Random(name).randbytes(size)


@dataclass(frozen=True, slots=True)
class _Request:
    unique: int
    operation: str
    reply: bytes
    error: int


class SlowDisk:
    """The files in `sizes`, by name, and what it costs to get at them.

    direct: reads pass the page cache by (FOPEN_DIRECT_IO). names_seconds: how long the kernel may remember a name;
    attributes it has to ask for each time. delays: seconds that an operation takes ("lookup", "getattr", "open",
    "read", "flush", "release"); others are answered at once. Requests do not wait for each other.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        direct: bool = False,
        names_seconds: int = 0,
        delays: Mapping[str, float] | None = None,
    ) -> None:
        self.asked: Counter[str] = Counter()
        """How often each operation has been asked for."""
        self._files = {number: (name, size) for number, (name, size) in enumerate(sizes.items(), _ROOT + 1)}
        self._nodes = {name: number for number, (name, _) in self._files.items()}
        self._direct = direct
        self._names_seconds = names_seconds
        self._delays = dict(delays or {})
        self._hangs: frozenset[str] = frozenset()
        self._errors: dict[str, list[int]] = {}
        self._most = 1 << 20
        self._due: list[tuple[float, int, _Request]] = []
        self._held: dict[int, _Request] = {}
        self._changed = threading.Condition()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._answers: dict[str, Callable[[int, bytes], bytes]] = {
            "lookup": self._lookup,
            "getattr": lambda node, _: struct.pack("<QII", 0, 0, 0) + self._attributes(node),
            "open": lambda *_: struct.pack("<QII", 0, _DIRECT_IO if self._direct else 0, 0),
            "read": self._read,
            "statfs": lambda *_: struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0),
            "release": lambda *_: b"",
            "flush": lambda *_: b"",
        }

    def hang(self, *operations: str) -> None:
        """Let these operations hang from now on, until `release`."""
        with self._changed:
            self._hangs = frozenset(operations)

    def fail(self, operation: str, error: int, *, after: int = 0) -> None:
        """Let an operation fail with an error number from now on, after it has succeeded `after` times; 0 ends that."""
        with self._changed:
            self._errors.pop(operation, None)
            if error:
                self._errors[operation] = [after, error]

    def read_at_most(self, count: int) -> None:
        """Answer reads with so many bytes at most: short reads, if the disk is `direct`."""
        self._most = count

    def step(self) -> None:
        """Answer what hangs now; what is asked for next hangs again."""
        with self._changed:
            for request in self._held.values():
                heapq.heappush(self._due, (0.0, request.unique, request))
            self._held.clear()
        os.eventfd_write(self._wake, 1)

    def release(self) -> None:
        """Answer what hangs, and let nothing hang from now on."""
        with self._changed:
            self._hangs = frozenset()
        self.step()

    def wait_until_held(self, operation: str, count: int = 1, patience: float = _PATIENCE) -> None:
        """Return when at least `count` requests for `operation` hang. Blocks its thread, for `patience` seconds."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.held(operation) >= count, patience), (
                f"{self.held(operation)} of {count} hang; asked: {self.asked}"
            )

    def held(self, operation: str) -> int:
        """Return how many requests for `operation` hang."""
        return sum(request.operation == operation for request in self._held.values())

    def serve(self, device: int) -> None:
        """Answer the kernel until the file system is unmounted. `device` is an open `/dev/fuse`."""
        poll = select.poll()
        poll.register(device, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            with self._changed:
                wait = self._due[0][0] - time.monotonic() if self._due else None
            for ready, _ in poll.poll(None if wait is None else max(0.0, wait * 1000)):
                if ready == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                try:
                    message = os.read(device, (1 << 20) + 4096)
                except OSError as exc:
                    if exc.errno == errno.ENODEV:
                        return
                    if exc.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # taken back meanwhile
                        continue
                    raise
                self._take(device, message)
            with self._changed:
                while self._due and self._due[0][0] <= time.monotonic():
                    self._answer(device, heapq.heappop(self._due)[2])

    def _take(self, device: int, message: bytes) -> None:
        _, opcode, unique, node, *_ = _HEADER_IN.unpack_from(message)
        body = message[_HEADER_IN.size :]
        if opcode in (_FORGET, _BATCH_FORGET):
            return
        if opcode == _INTERRUPT:
            self._interrupt(device, *struct.unpack_from("<Q", body))
            return
        operation, reply, error = _OPERATIONS.get(opcode, str(opcode)), b"", 0
        if opcode == _INIT:
            readahead = struct.unpack_from("<III", body)[2]
            reply = _INIT_OUT.pack(
                7, 31, readahead, _ASYNC_READ | _PARALLEL_LOOKUPS | _MAX_PAGES, 512, 384, 1 << 20, 1, 256, 0
            )
        elif opcode != _DESTROY:
            try:
                reply = self._answers[operation](node, body)
            except KeyError:
                error = errno.ENOENT if operation in self._answers else errno.ENOSYS
        with self._changed:
            if (failing := self._errors.get(operation)) is not None:
                if failing[0]:
                    failing[0] -= 1
                else:
                    error = failing[1]
            request = _Request(unique, operation, reply, error)
            self.asked[operation] += 1
            if operation in self._hangs:
                self._held[unique] = request
            elif delay := self._delays.get(operation):
                heapq.heappush(self._due, (time.monotonic() + delay, unique, request))
            else:
                self._answer(device, request)
            self._changed.notify_all()

    def _interrupt(self, device: int, unique: int) -> None:
        """Give a call that hangs up: its process is being killed."""
        with self._changed:
            if (request := self._held.pop(unique, None)) is not None:
                self._answer(device, _Request(unique, request.operation, b"", errno.EINTR))

    def _answer(self, device: int, request: _Request) -> None:
        reply = b"" if request.error else request.reply
        with contextlib.suppress(OSError):  # ENOENT: nobody waits for it any more; ENODEV: unmounted
            os.write(device, _HEADER_OUT.pack(_HEADER_OUT.size + len(reply), -request.error, request.unique) + reply)

    def _lookup(self, node: int, body: bytes) -> bytes:
        found = self._nodes[os.fsdecode(body.rstrip(b"\0"))]
        return struct.pack("<QQQQII", found, 0, self._names_seconds, 0, 0, 0) + self._attributes(found)

    def _attributes(self, node: int) -> bytes:
        mode, size = stat.S_IFDIR | 0o755, 0
        if node != _ROOT:
            mode, size = stat.S_IFREG | 0o644, self._files[node][1]
        seconds = 1_700_000_000
        return _ATTRIBUTES.pack(node, size, 0, *[seconds] * 3, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, length = _READ_IN.unpack_from(body)
        return content_of(*self._files[node])[offset : offset + min(length, self._most)]


@dataclass(frozen=True, slots=True)
class Mount:
    """How a server gets to see a slow disk: what its command begins with, and which descriptor goes to it."""

    prefix: Sequence[str]
    pass_fds: Sequence[int]


@contextlib.contextmanager
def mounted(disk: SlowDisk, path: Path) -> Iterator[Mount]:
    """Serve `disk`, at `path`, to one process that is started with what this gives.

    When the context ends, what still hangs is released; the process should have ended before, and the mount with it.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(_PATIENCE)

    def serve() -> None:
        _, (device, *_), _, _ = socket.recv_fds(ours, 1, 1)
        try:
            disk.serve(device)
        finally:
            os.close(device)  # a mount that is still there answers ENOTCONN from now on

    thread = threading.Thread(target=serve, name="slow disk", daemon=True)
    thread.start()
    try:
        command = [sys.executable, "-m", "tests.slow_fs", str(theirs.fileno()), str(path)]
        yield Mount(command, [theirs.fileno()])
    finally:
        theirs.close()
        disk.release()
        thread.join(_PATIENCE)
        ours.close()
        assert not thread.is_alive(), "the slow disk is still mounted"


def why_not() -> str | None:
    """Return why no slow disk can be mounted here, or None if it can."""
    if sys.platform != "linux" or not os.path.exists("/dev/fuse"):
        return "a slow disk: there is no /dev/fuse"
    path = Path(__file__).parent
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            command = [sys.executable, "-m", "tests.slow_fs", str(theirs.fileno()), str(path), "true"]
            trial = subprocess.run(
                command, cwd=path.parent, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False
            )
    return None if trial.returncode == 0 else f"a slow disk: {trial.stderr.strip().rpartition(chr(10))[2]}"


def _mount_and_run(channel: int, path: str, command: list[str]) -> None:
    """Mount in a namespace of our own, hand the device to the test, and become `command`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")  # a test that is killed leaves no server behind
    user, group = os.getuid(), os.getgid()
    if user == 0:
        check(libc.unshare(_CLONE_NEWNS), "unshare")
    else:
        check(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER), "unshare")
        for name, value in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(value)
    check(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None), "mount --make-rprivate")
    # the kernel wants a device that was opened in the namespace of the mount
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    check(libc.mount(b"slow", os.fsencode(path), b"fuse", ctypes.c_ulong(_MS_NOSUID_NODEV), options), "mount")
    with socket.socket(fileno=channel) as test:
        socket.send_fds(test, [b"\0"], [device])
    os.execvp(command[0], command)


if __name__ == "__main__":
    _mount_and_run(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
