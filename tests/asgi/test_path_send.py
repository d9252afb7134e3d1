"""Plain path send: a server that says nothing of when it opens the file sends the one that was described, or none."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloadview_async.asgi.descriptor_paths import LastingPaths
from tests.asgi.path_send_app import SIZE
from tests.asgi.ways import WAYS
from tests.live import ask
from tests.servers import Server

KEEP = 0.5
pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    temporary = tmp_path_factory.mktemp("temporary")
    env = {"PATH_SEND_ROOT": str(root), "PATH_SEND_KEEP": str(KEEP), "TMPDIR": str(temporary)}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with WAYS["path send, granian"].serving("tests.asgi.path_send_app:make_app", log=log, env=env) as server:
        yield server
    assert "Traceback" not in server.log
    assert list(temporary.iterdir()) == []


@pytest.fixture
def port(server: Server) -> int:
    assert isinstance(server.address, int)
    return server.address


@pytest.fixture
def big(root: Path, request: pytest.FixtureRequest) -> Path:
    path = root / "big.bin"
    path.write_bytes(os.urandom(SIZE))
    return path


async def state_of(port: int) -> dict[str, int]:
    answer = await ask(port, "/state")
    found: dict[str, int] = json.loads(answer.body)
    return found


async def holds_nothing(port: int) -> None:
    deadline = time.monotonic() + 20
    while (state := await state_of(port))["held"]:
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("wrapped", ["plain", "gzip", "basehttp", "all"])
async def test_a_whole_file_goes_by_path_and_a_part_in_chunks(port: int, big: Path, wrapped: str) -> None:
    content = big.read_bytes()
    before = (await state_of(port))["path_sends"]
    whole = await ask(port, f"/{wrapped}/big.bin")
    assert (whole.status, whole.complete, whole.body == content) == (200, True, True)
    assert (await state_of(port))["path_sends"] == before + 1
    part = await ask(port, f"/{wrapped}/big.bin", headers={"Range": "bytes=1000-7000000"})
    assert (part.status, part.complete, part.body == content[1000:7000001]) == (206, True, True)
    head = await ask(port, f"/{wrapped}/big.bin", method="HEAD")
    assert (head.headers["content-length"], head.body) == (str(SIZE), b"")
    assert (await state_of(port))["path_sends"] == before + 1


@pytest.mark.parametrize("change", ["replace", "delete", "grow", "wait"])
async def test_the_file_that_was_described_is_sent_whatever_happens_to_its_name(
    port: int, big: Path, change: str
) -> None:
    content = big.read_bytes()
    answer = await ask(port, f"/plain/big.bin?{change}")
    assert (answer.status, answer.headers["content-length"]) == (200, str(SIZE))
    assert (answer.complete, answer.body == content) == (True, True)


async def test_a_file_that_shrinks_aborts_the_connection(port: int, big: Path) -> None:
    content = big.read_bytes()
    answer = await ask(port, "/plain/big.bin?shrink")
    assert not answer.complete
    assert content.startswith(answer.body)


async def test_clients_that_leave_and_files_that_go_leave_nothing_open(port: int, root: Path) -> None:
    await holds_nothing(port)
    content = os.urandom(SIZE)
    for number in range(6):  # more than may be kept at a time: the rest goes in chunks
        path = root / f"{number}.bin"
        path.write_bytes(content)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /plain/%d.bin HTTP/1.1\r\nHost: x\r\n\r\n" % number)
            client.recv(1)
            path.unlink()
    await holds_nothing(port)


async def test_many_at_once_get_their_own(port: int, root: Path) -> None:
    contents = {number: os.urandom(200_000 + number) for number in range(6)}
    for number, content in contents.items():
        (root / f"own{number}.bin").write_bytes(content)
    numbers = [number % 6 for number in range(60)]
    answers = await asyncio.gather(*(ask(port, f"/plain/own{number}.bin") for number in numbers))
    assert all(answer.body == contents[number] for number, answer in zip(numbers, answers, strict=True))


async def test_whoever_comes_too_late_finds_no_file_but_never_another(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "other").write_text("other")
    paths = LastingPaths(keep_seconds=0.01)
    descriptor = os.open(tmp_path / "mine", os.O_RDONLY)
    with paths.path_of(descriptor) as path:
        assert path is not None
        os.close(descriptor)
        (tmp_path / "other").replace(tmp_path / "mine")
        await asyncio.sleep(0.05)
        assert Path(path).read_text() == "mine"
    number = int(os.readlink(path).rpartition("/")[2])
    deadline = time.monotonic() + 20
    while _is_open(number):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    other = os.open(tmp_path / "mine", os.O_RDONLY)
    os.dup2(other, number)  # the number is another file's by now
    with pytest.raises(FileNotFoundError):
        Path(path).read_text()
    with paths.path_of(other) as second:
        assert second is not None
        assert second != path
    os.close(number)
    os.close(other)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


async def test_one_file_has_one_path_and_only_so_many_files_have_one(tmp_path: Path) -> None:
    paths = LastingPaths(keep_seconds=0.01, max_kept=1)
    (tmp_path / "one").touch()
    (tmp_path / "two").touch()
    with (tmp_path / "one").open() as one, (tmp_path / "two").open() as two:
        with paths.path_of(one.fileno()) as path, paths.path_of(one.fileno()) as again:
            assert path == again is not None
            with paths.path_of(two.fileno()) as none:
                assert none is None
        deadline = time.monotonic() + 20
        while True:
            with paths.path_of(two.fileno()) as path:
                if path is not None:
                    break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def test_a_directory_that_was_tidied_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    paths = LastingPaths(keep_seconds=60)
    file = tmp_path / "file"
    for round_number, expected in enumerate([True, False, True]):
        file = tmp_path / f"file{round_number}"
        file.touch()
        with file.open() as stream, paths.path_of(stream.fileno()) as path:
            assert (path is not None) == expected
        if round_number == 0:
            for directory in tmp_path.glob("downloadview-*"):
                for link in directory.iterdir():
                    link.unlink()
                directory.rmdir()


@pytest.mark.parametrize("broken", ["no place", "a closed descriptor"])
async def test_where_there_can_be_no_path_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as stream:
        descriptor = stream.fileno()
        if broken == "no place":
            monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
        else:
            descriptor = 1 << 20
        with LastingPaths().path_of(descriptor) as path:
            assert path is None
