"""Replicas with copies of one tree: validators, digests and archives agree, and a resume may move between them."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import downloadview_async as dv
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from tests.live import Answer, ask, served
from tests.service.loading import refusal

TIME = 1_700_000_000
SIZE = 300_000
CONTENT = random.Random(20).randbytes(SIZE)
FILES = {"a.bin": CONTENT, "sub/b.txt": b"b" * 5000, "sub/empty": b""}
KINDS = {
    "seconds": 'etag = "seconds"\n',
    "digest": 'etag = "digest"\ndigests = "known"\nsidecars = true\n',
}
HEADERS = ("etag", "last-modified", "repr-digest", "content-length", "accept-ranges")


def copies(directory: Path, count: int, *, times: Sequence[int]) -> list[Path]:
    """Make copies of one tree, of which each has other inodes, and its own time in nanoseconds, as some tools copy."""
    trees = []
    for number in range(count):
        tree = directory / f"replica{number}" / "files"
        for name in random.Random(number).sample(list(FILES), len(FILES)):
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(FILES[name])
            sidecar = file.with_name(f"{file.name}.sha256")
            sidecar.write_text(f"{hashlib.sha256(FILES[name]).hexdigest()}  {file.name}\n")
            for one in (file, sidecar):
                os.utime(one, ns=(times[number],) * 2)
        trees.append(tree)
    return trees


@contextlib.asynccontextmanager
async def replicas(trees: Sequence[Path], text: str, more: str = "") -> AsyncIterator[list[int]]:
    """Serve each tree by a service, and give their ports."""
    async with contextlib.AsyncExitStack() as stack:
        ports = []
        for tree in trees:
            path = tree.parent / "downloadview.toml"
            path.write_text(
                f'{more}[sources.files]\ntype = "path"\nroot = "files"\n{text}'
                '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\narchive = true\n'
            )
            app: Any = build(load_settings(path, environ={}))
            ports.append(await stack.enter_async_context(served(app)))
        yield ports


async def both(ports: Sequence[int], path: str, headers: dict[str, str] | None = None) -> list[Answer]:
    return [await ask(port, path, headers=headers) for port in ports]


def chosen(answer: Answer) -> dict[str, str]:
    return {name: answer.headers[name] for name in HEADERS if name in answer.headers}


NANOSECONDS = [TIME * 10**9 + part for part in (0, 123_456_789, 999_999_999)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "times"),
    [("seconds", NANOSECONDS), ("digest", [0, 10**9, TIME * 10**9]), ("digest", NANOSECONDS)],
    ids=["seconds", "digests of normalised times", "digests"],
)
async def test_copies_have_the_same_validators(tmp_path: Path, kind: str, times: list[int]) -> None:
    async with replicas(copies(tmp_path, 3, times=times), KINDS[kind]) as ports:
        for name in FILES:
            answers = await both(ports, f"/files/{name}")
            assert len({answer.body for answer in answers}) == 1
            headers = [chosen(answer) for answer in answers]
            assert headers[0] == headers[1] == headers[2]
            assert headers[0]["etag"].startswith('"')
            again = await both(ports, f"/files/{name}", {"If-None-Match": headers[0]["etag"]})
            assert [answer.status for answer in again] == [304] * 3


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_a_resume_moves_between_replicas(tmp_path: Path, kind: str) -> None:
    trees = copies(tmp_path, 3, times=NANOSECONDS)
    async with replicas(trees, KINDS[kind]) as ports:
        etag = (await ask(ports[0], "/files/a.bin", method="HEAD")).headers["etag"]

        async def download(stops: Sequence[int], first: int) -> bytes:
            body, edges = b"", [0, *stops, SIZE]
            for number, (start, stop) in enumerate(itertools.pairwise(edges)):
                headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": etag}
                part = await ask(ports[(first + number) % 3], "/files/a.bin", headers=headers)
                assert (part.status, part.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{SIZE}")
                body += part.body
            return body

        for number in range(20):
            stops = sorted(random.Random(number).sample(range(1, SIZE), 3))
            assert await download(stops, number) == CONTENT
        parts = await both(ports, "/files/a.bin", {"Range": "bytes=0-9,100-199,-5", "If-Range": etag})
        boundaries = [part.headers["content-type"].partition("boundary=")[2].encode() for part in parts]
        bodies = [part.body.replace(mark, b"-") for part, mark in zip(parts, boundaries, strict=True)]
        assert [part.status for part in parts] == [206] * 3
        assert bodies[0] == bodies[1] == bodies[2]


@pytest.mark.asyncio
async def test_archives_have_the_same_bytes_and_a_resume_moves(tmp_path: Path) -> None:
    async with replicas(copies(tmp_path, 2, times=NANOSECONDS), KINDS["seconds"]) as ports:
        one, two = await both(ports, "/files/?archive=zip")
        assert (one.status, one.body) == (200, two.body)
        assert chosen(one) == chosen(two)
        size, etag = len(one.body), one.headers["etag"]
        for number in range(10):
            at = random.Random(number).randrange(1, size)
            headers = {"Range": f"bytes={at}-", "If-Range": etag}
            rest = await ask(ports[number % 2], "/files/?archive=zip", headers=headers)
            assert (rest.status, one.body[:at] + rest.body) == (206, two.body)


@pytest.mark.asyncio
async def test_by_default_nanoseconds_tell_copies_apart_and_a_resume_begins_again(tmp_path: Path) -> None:
    async with replicas(copies(tmp_path, 2, times=NANOSECONDS), "") as ports:
        one, two = await both(ports, "/files/a.bin")
        assert one.headers["etag"] != two.headers["etag"]
        again = await ask(ports[1], "/files/a.bin", headers={"Range": "bytes=5-", "If-Range": one.headers["etag"]})
        assert (again.status, again.body) == (200, CONTENT)


@pytest.mark.asyncio
async def test_a_tag_of_seconds_waits_until_the_second_is_over(tmp_path: Path) -> None:
    (tree,) = copies(tmp_path, 1, times=[TIME * 10**9])
    (tree / "a.bin").write_bytes(b"new")
    source = dv.PathSource(tree, etag="seconds")
    async with (await source.resolve("a.bin")).open() as opened:
        assert (opened.metadata.etag, opened.metadata.last_modified) == (None, None)
    os.utime(tree / "a.bin", ns=(TIME * 10**9 + 5,) * 2)
    async with (await source.resolve("a.bin")).open() as opened:
        assert str(opened.metadata.etag) == f'"{TIME * 10**9:x}-3"'


@pytest.mark.asyncio
async def test_a_file_whose_digest_is_not_known_has_no_tag_until_it_is(tmp_path: Path) -> None:
    (tree,) = copies(tmp_path, 1, times=[0])
    (tree / "a.bin.sha256").unlink()
    text = 'etag = "digest"\ndigests = "background"\n'
    async with replicas([tree], text, '[digests]\nstore = "digests.db"\n') as (port,):
        first = await ask(port, "/files/a.bin")
        assert not {"etag", "last-modified"} & set(first.headers)
        async with asyncio.timeout(20):
            while "etag" not in (answer := await ask(port, "/files/a.bin")).headers:
                await asyncio.sleep(0.01)
        assert answer.headers["etag"] == f'"sha256-{hashlib.sha256(CONTENT).hexdigest()}"'
        (tree / "a.bin").write_bytes(CONTENT[::-1])
        os.utime(tree / "a.bin", (0, 0))  # as a tool that sets all times to zero
        changed = await ask(port, "/files/a.bin", headers={"Range": "bytes=5-", "If-Range": answer.headers["etag"]})
        assert (changed.status, changed.body) == (200, CONTENT[::-1])


@pytest.mark.parametrize(("text", "problem"), [('etag = "size"\n', "etag"), ('etag = "digest"\n', "digests are off")])
def test_wrong_settings(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "files").mkdir()
    route = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'
    message = refusal(tmp_path, f'[sources.files]\ntype = "path"\nroot = "files"\n{text}{route}')
    assert "sources.files.etag" in message
    assert problem in message
