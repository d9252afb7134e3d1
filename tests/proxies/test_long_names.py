"""Names up to the longest that a source takes, percent-encoded to three times that, by way of each proxy."""

import os
from pathlib import Path
from urllib.parse import quote

import pytest

from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.sources.names import MAX_LENGTH
from tests.live import ask
from tests.proxies.conftest import Site

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTENT = b"0123456789"
LENGTHS = [
    1424,
    *[pytest.param(length, marks=pytest.mark.slow) for length in (1425, 2730, 3500, 3900, 4000, MAX_LENGTH - 10)],
    MAX_LENGTH,
]


def long_name(length: int, character: str) -> str:
    """Return a path of so many bytes, in segments of at most 254."""
    segments = []
    while length:
        size = min(254, length)
        size -= length - size == 1  # the slash alone would be left
        whole, rest = divmod(size, len(character.encode()))
        segments.append(character * whole + "a" * rest)
        length = max(0, length - size - 1)
    return "/".join(segments)


def write(directory: Path, name: str) -> None:
    """Write a file whose path may be too long for one system call."""
    *parents, last = name.split("/")
    at = os.open(directory, os.O_RDONLY)
    for parent in parents:
        if parent not in os.listdir(at):
            os.mkdir(parent, dir_fd=at)
        inner = os.open(parent, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    descriptor = os.open(last, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=at)
    os.write(descriptor, CONTENT)
    os.close(descriptor)
    os.close(at)


@pytest.mark.parametrize("character", ["a", "é", "🎈"])
@pytest.mark.parametrize("length", LENGTHS)
async def test_what_the_service_gives_directly_its_proxy_gives_too(site: Site, length: int, character: str) -> None:
    name = long_name(length, character)
    assert len(name.encode()) == length
    for directory in (site.files, site.checkout / "app" / "files-private"):
        write(directory, name)
    for route in ("path", "inline/storage", "outside"):
        path = f"/{route}/{quote(name)}"
        whole = await ask(site.port, path)
        assert (whole.status, whole.body, whole.complete) == (200, CONTENT, True), route
        direct = await ask(site.service, path)
        assert whole.headers["content-disposition"] == direct.headers["content-disposition"]
        part = await ask(site.port, path, headers={"Range": "bytes=4-6"})
        assert (part.status, part.body) == (206, b"456"), route
        head = await ask(site.port, path, method="HEAD")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "10"), route
        if route == "path" and length < 3500:  # what may be too long for the proxy to open, the service sends
            assert OFFLOAD_HEADERS & {*direct.headers}


async def test_one_byte_more_is_missing_directly_and_by_way_of_the_proxy(site: Site) -> None:
    name = quote(long_name(MAX_LENGTH + 1, "é"))
    for port in (site.port, site.service):
        assert (await ask(port, f"/path/{name}")).status == 404
