"""Limits hold when the proxy sends the file: a rate, where the proxy has a header for it, and transfers at once."""

import asyncio
import socket
import struct
import time
from collections.abc import Callable

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from tests.accounts.site import Site, site_of
from tests.live import ask, live
from tests.proxies.conftest import make_checkout
from tests.proxies.servers import KINDS, proxy, readable_directory

SIZE = 4_000_000
LIMITING = [name for name, kind in dv.proxy_kinds().items() if kind.rate_header is not None]


def test_these_can_limit_a_rate() -> None:
    assert LIMITING == ["nginx", "lighttpd", "h2o"]
    for name in LIMITING:
        kind = dv.proxy_kinds()[name]
        assert kind.rate_header is not None
        assert kind.rate_header.name.lower() in kind.headers


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITING)
async def test_the_proxy_keeps_the_rate(name: str) -> None:
    kind = KINDS[name]
    header = dv.proxy_kinds()[name].rate_header
    assert header is not None
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        files = checkout / "app" / "files"
        (files / "large.bin").write_bytes(bytes(SIZE))
        (files / "large.bin").chmod(0o644)
        download = dv.Download(dv.PathSource(files), limits=dv.Limits(rate="1MB/s", requests="100/minute"))
        app = Starlette(routes=[Route("/path/{path:path}", download)])
        async with live(dv.OffloadMiddleware(app, kind.backend(files))) as service:
            order = (await ask(service, "/path/large.bin", method="HEAD")).headers
            order |= (await ask(service, "/path/large.bin")).headers
            assert int(order[header.name.lower()]) * header.unit in range(990_000, 1_000_001)
            with proxy(kind, checkout, service) as port:
                began = time.monotonic()
                answer = await asyncio.wait_for(ask(port, "/path/large.bin"), 60)
                seconds = time.monotonic() - began
    assert (answer.status, len(answer.body)) == (200, SIZE)
    assert not {one.lower() for one in dv.proxy_kinds()[name].headers} & {*answer.headers}
    print(f"{name}: {SIZE / seconds:.0f} bytes a second")
    assert 1 < seconds < 30  # without a limit, a few milliseconds


_HOOK = """
import asyncio
from pathlib import Path

async def allow(request, name):
    Path(__file__).with_name("asked").touch()
    while "x-waits" in request.headers and not Path(__file__).with_name("go").exists():
        await asyncio.sleep(0.01)
    return True
"""


def leave_before_the_answer(site: Site) -> None:
    """Reset the connection while the service decides; then the service hands the file over."""
    with socket.create_connection(("127.0.0.1", site.port)) as client:
        client.sendall(b"GET /files/a.bin HTTP/1.1\r\nHost: x\r\nX-Waits: 1\r\n\r\n")
        _wait_until((site.directory / "asked").exists)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    (site.directory / "go").touch()


LONG_AGO = "Thu, 01 Jan 1970 00:00:01 GMT"
ENDS: dict[str, Callable[[Site], object]] = {
    "the whole file": lambda site: site.get("a.bin"),
    "a range": lambda site: site.get("a.bin", "Range: bytes=5-9\r\n"),
    "an empty file": lambda site: site.get("empty.bin"),
    "a range that selects nothing": lambda site: site.get("a.bin", "Range: bytes=1000-\r\n"),
    "a range that does not parse": lambda site: site.get("a.bin", "Range: bytes=x\r\n"),
    "a range of an empty file": lambda site: site.get("empty.bin", "Range: bytes=0-\r\n"),
    "a range with a number that is too large": lambda site: site.get("a.bin", f"Range: bytes=0-{'9' * 20}\r\n"),
    "another version": lambda site: site.get("a.bin", 'If-Match: "x"\r\n'),
    "a version that is too new": lambda site: site.get("a.bin", f"If-Unmodified-Since: {LONG_AGO}\r\n"),
    "the version of the client": lambda site: site.get("a.bin", "If-None-Match: *\r\n"),
    "a client that left before the answer": leave_before_the_answer,
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "h2o"])  # H2O: it ends when it is handed over
def test_each_transfer_of_a_proxy_ends(kind: str, end: str) -> None:
    with readable_directory() as directory:
        (directory / "hook.py").write_text(_HOOK)
        route = 'access = ["hook:hook:allow"]\nlimits = { concurrent = 1 }'
        with site_of(directory, kind, route=route) as site:
            site.put("a.bin", bytes(100))
            site.put("empty.bin", b"")
            ENDS[end](site)
            _wait_until(lambda: site.get("a.bin").startswith(b"HTTP/1.1 200 "))


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
