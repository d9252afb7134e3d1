"""Remote files over TLS: the certificate is checked against the name, whatever address was connected to."""

import asyncio
import ssl
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from downloadview_async import RemoteSource, UpstreamError
from downloadview_async.sources.remote import ssrf
from tests.live import listening

pytestmark = pytest.mark.asyncio
BODY = bytes(range(256)) * 4096


@pytest_asyncio.fixture
async def port(certificate: dict[str, str]) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate.values())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
            await writer.drain()

    async with listening(serve, ssl=context) as port:
        yield port


async def fetch(url: str, *, times: int = 1) -> list[bytes]:
    source = RemoteSource(url, allow_hosts=["localhost", "127.0.0.1"])
    bodies = []
    try:
        for _ in range(times):
            async with (await source.resolve("x")).open() as opened:
                bodies.append(b"".join([chunk async for chunk in opened.stream(None)]))
    finally:
        await source.aclose()
    return bodies


async def test_a_trusted_certificate_of_the_right_name(
    port: int, certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = ssl.create_default_context(cafile=certificate["ssl_certfile"])
    monkeypatch.setattr(ssrf, "ssl_context", lambda: trusting)
    assert await fetch(f"https://localhost:{port}/", times=3) == [BODY] * 3
    with pytest.raises(UpstreamError, match="certificate"):
        await fetch(f"https://127.0.0.1:{port}/")


async def test_a_certificate_that_nobody_trusts(port: int) -> None:
    with pytest.raises(UpstreamError, match="certificate"):
        await fetch(f"https://localhost:{port}/")


async def test_a_plain_server_where_tls_was_expected() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async with listening(serve) as port:
        with pytest.raises(UpstreamError):
            await fetch(f"https://localhost:{port}/")


async def test_the_certificates_of_the_machine_are_read_once() -> None:
    assert ssrf.ssl_context() is ssrf.ssl_context()


@pytest.mark.parametrize("extra", [b"EXTRA", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"])
async def test_more_than_an_answer_is_never_the_next_one(
    certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch, extra: bytes
) -> None:
    """It may have been decrypted already, or be in a record of TLS that has been received, but not looked at."""
    trusting = ssl.create_default_context(cafile=certificate["ssl_certfile"])
    monkeypatch.setattr(ssrf, "ssl_context", lambda: trusting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate.values())
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue")
            writer.write(extra)  # another record
            await writer.drain()

    async with listening(serve, ssl=context) as port:
        assert await fetch(f"https://localhost:{port}/", times=3) == [b"true"] * 3
    assert connections == 3
