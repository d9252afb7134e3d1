"""Downloads that can all go on send one window after the other, and the loop looks at its sockets between two."""

import asyncio
import itertools
import socket
from collections.abc import Callable

import pytest
import uvloop

from downloadview_async.asgi.uvicorn.turns import turn

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS)
def test_sockets_are_looked_at_between_two_turns(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    happened: list[str] = []

    async def download(name: str, windows: int) -> None:
        for _ in range(windows):
            await turn(asyncio.get_running_loop())
            happened.append(name)

    async def main() -> None:
        readable, other = socket.socketpair()
        with readable, other:
            other.send(b"never read, so there is something at each look")
            asyncio.get_running_loop().add_reader(readable, happened.append, "look")
            await asyncio.gather(*(download(name, 3) for name in "abcd"))
            asyncio.get_running_loop().remove_reader(readable)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    assert [name for name in happened if name != "look"] == list("abcd" * 3)
    for before, after in itertools.pairwise(happened):
        assert "look" in (before, after), happened


@pytest.mark.asyncio
async def test_who_is_cancelled_takes_no_turn_from_the_others() -> None:
    loop = asyncio.get_running_loop()
    turns = [turn(loop) for _ in range(4)]
    turns[0].cancel()
    turns[2].cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(turns[1], turns[3])
        await turn(loop)  # and the queue is not stuck
