"""What a connection has in place of uvicorn's flow control, of an event, and of a parser that nothing needs."""

import asyncio
from pathlib import Path

import anyio
import pytest

from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn.flow import Flow, Signal
from tests.asgi.test_server import MIB, app_for
from tests.live import live

pytestmark = pytest.mark.asyncio


async def test_a_signal_wakes_all_that_wait_and_none_that_waits_later() -> None:
    signal = Signal()
    waits = [asyncio.ensure_future(signal.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[1].cancel()
    await asyncio.wait([waits[1]])
    signal.set()
    signal.clear()
    assert all(await asyncio.wait_for(asyncio.gather(waits[0], waits[2]), 30))
    assert not signal.is_set()
    late = asyncio.ensure_future(signal.wait())
    await asyncio.sleep(0)
    assert not late.done()
    signal.set()
    assert await late
    assert await signal.wait()
    assert signal.is_set()


async def test_a_signal_whose_waiter_is_cancelled_when_it_is_set() -> None:
    signal = Signal()
    wait = asyncio.ensure_future(signal.wait())
    await asyncio.sleep(0)
    wait.cancel()
    signal.set()
    with pytest.raises(asyncio.CancelledError):
        await wait


class Reading(asyncio.Transport):
    """A transport that is read from or not."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = True

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


async def test_the_flow_pauses_reading_and_writing() -> None:
    transport = Reading()
    flow = Flow(transport)
    await flow.drain()
    paused = [flow.write_paused]
    flow.pause_writing()
    drains = [asyncio.ensure_future(flow.drain()) for _ in range(2)]
    await asyncio.sleep(0)
    paused.append(flow.write_paused)
    assert not any(drain.done() for drain in drains)
    flow.resume_writing()
    await asyncio.wait_for(asyncio.gather(*drains), 30)
    assert [*paused, flow.write_paused] == [False, True, False]
    flow.pause_reading()
    flow.is_full = True
    flow.resume_reading()
    assert (flow.read_paused, transport.is_read) == (True, False)
    flow.is_full = False
    flow.resume_reading()
    assert (flow.read_paused, transport.is_read) == (False, True)


@pytest.mark.parametrize("is_pipelined", [False, True])
async def test_a_client_that_stalls_has_no_parser_until_its_next_request(tmp_path: Path, is_pipelined: bool) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    connections: list[DownloadProtocol] = []

    class Kept(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)

    async with live(app_for(tmp_path), http=Kept) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        (connection,) = connections
        with anyio.fail_after(30):
            while connection.parser is not None:
                await asyncio.sleep(0.01)
        # a version that is checked after the parser has let it pass
        following = b"GET /ours/big.bin HTTP/1.4\r\nHost: x\r\nRange: bytes=-9\r\n\r\n"
        if is_pipelined:
            writer.write(following)
        await reader.readexactly(16 * MIB)
        if not is_pipelined:
            writer.write(following)
        assert b" 206 " in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(9) == bytes(9)
        writer.close()
