"""A rate holds when the proxy sends the file, where the proxy has a header for it."""

import asyncio
import time

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
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
