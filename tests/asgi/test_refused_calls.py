"""Fast system calls that are refused: by a sandbox, a file system, an old kernel. The bytes stay the same."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from downloadview_async.sources.local.refused_calls import Refusals
from tests.asgi.ways import WAYS
from tests.live import ask, make_old
from tests.refusing import CALLS, IS_POSSIBLE
from tests.servers import Server

SIZES = {"empty": 0, "small": 10_000, "big": (1 << 20) + 7}
KINDS = ["path", "deny", "follow", "storage", "trusted", "foreign"]
ZERO_COPY = "zero-copy, asyncio"
ERRORS = ["EPERM", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EACCES", "EXDEV", "ENOTTY", "EIO", "EBADF", "EAGAIN", "ENOMEM"]

needs_seccomp = pytest.mark.skipif(not IS_POSSIBLE, reason="the filters are for Linux on x86_64 and aarch64")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for name, size in SIZES.items():
        (directory / name).write_bytes(os.urandom(size))
    make_old(directory)  # what was written a moment ago is copied
    return directory


@contextmanager
def refusing(root: Path, way: str, when: str, calls: str, log: Path) -> Iterator[Server]:
    env = {"REFUSING_ROOT": str(root), "REFUSING_WHEN": when, "REFUSING_CALLS": calls}
    with WAYS[way].serving("tests.asgi.refusing_app:make_app", log=log, env=env) as server:
        yield server


async def all_is_sent(server: Server, root: Path) -> None:
    port = int(server.address)
    for kind in KINDS:
        for name, size in SIZES.items():
            content = (root / name).read_bytes()
            for _ in range(3):  # the third one may come from a file that is kept open
                whole = await ask(port, f"/{kind}/{name}")
                assert (whole.status, whole.complete, whole.body == content) == (200, True, True), (kind, name)
            head = await ask(port, f"/{kind}/{name}", method="HEAD")
            assert (head.headers["content-length"], head.body) == (str(size), b"")
        content = (root / "big").read_bytes()
        part = await ask(port, f"/{kind}/big", headers={"Range": "bytes=70000-900000"})
        assert (part.status, part.complete, part.body == content[70_000:900_001]) == (206, True, True), kind
        parts = await ask(port, f"/{kind}/big", headers={"Range": "bytes=0-9,100000-900000"})
        assert (parts.status, parts.complete) == (206, True), kind
        assert content[100_000:900_001] in parts.body
        assert (await ask(port, f"/{kind}/none")).status in (404, 500)  # 500: FileResponse's own
    assert (await ask(port, "/path/../small")).status == 404


@pytest.mark.slow
@needs_seccomp
@pytest.mark.asyncio
@pytest.mark.parametrize("name", ERRORS)
async def test_all_calls_are_refused_with_any_error(root: Path, tmp_path: Path, name: str) -> None:
    calls = " ".join(f"{call}={name}" for call in CALLS if (call, name) not in OPENING_SAYS)
    with refusing(root, ZERO_COPY, "later", calls, tmp_path / "log") as server:
        await all_is_sent(server, root)
        if name not in ("EIO", "EBADF", "EAGAIN", "ENOMEM"):  # of one file or one moment: these are not remembered
            assert server.log.count("sendfile is refused with") == 1
        if name not in (
            "EIO",
            "EBADF",
            "EAGAIN",
            "ENOMEM",
            "EINVAL",
            "EOPNOTSUPP",
            "ENOSYS",
        ):  # the C library says EOPNOTSUPP
            assert server.log.count("preadv2 with RWF_NOWAIT is refused with") == 1


# The same error says of a name that it may not be opened: once a root is made, it is believed.
OPENING_SAYS = {("openat2", "EXDEV")}


@needs_seccomp
@pytest.mark.asyncio
@pytest.mark.parametrize(
    "refused",
    [*(f"{call}=EPERM" for call in CALLS), "openat2=EAGAIN", "openat2=EIO", "openat2=ENOMEM", "sendfile=EAGAIN"],
)
async def test_one_call_is_refused(root: Path, tmp_path: Path, refused: str) -> None:
    with refusing(root, ZERO_COPY, "later", refused, tmp_path / "log") as server:
        await all_is_sent(server, root)


@pytest.mark.slow
@needs_seccomp
@pytest.mark.asyncio
@pytest.mark.parametrize("way", [way for way in WAYS if "oldest" not in way])
async def test_all_calls_are_refused_from_the_start(root: Path, tmp_path: Path, way: str) -> None:
    calls = " ".join(f"{call}=ENOENT" if call == "openat2" else f"{call}=ENOSYS" for call in CALLS)
    if "granian" in way:
        calls = calls.replace("sendfile=ENOSYS", "")  # its own
    with refusing(root, way, "first", calls, tmp_path / "log") as server:
        await all_is_sent(server, root)


def test_what_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "downloadview_async")
    refusals = Refusals("call")
    for number in (5, 116, 12):  # EIO, ESTALE, ENOMEM
        refusals.note(1, OSError(number, "of this file"))
    assert (refusals.devices, caplog.messages) == (set(), [])
    for _ in range(2):
        refusals.note(1, OSError(1, "refused"))
    assert refusals.devices == {1}
    assert caplog.messages == ["call is refused with EPERM for files of device 1: they are read without it"]
