"""A relay before Redis that counts what passes: the commands, and how often a client waits for an answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tests.live import listening


@dataclass
class Relay:
    """What has passed. round_trips: how often a connection has sent something while it waited for nothing."""

    port: int = 0
    commands: list[str] = field(default_factory=list)
    round_trips: int = 0

    @property
    def url(self) -> str:
        """The URL of the relay, for clients of Redis."""
        return f"redis://127.0.0.1:{self.port}/0"

    def reset(self) -> None:
        """Count from now on."""
        self.commands, self.round_trips = [], 0


@contextlib.asynccontextmanager
async def relaying(redis_port: int) -> AsyncIterator[Relay]:
    """Pass everything on to the server at a port, and give what counts it."""
    relay = Relay()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection("127.0.0.1", redis_port)
        waiting = 0

        async def pass_back() -> None:
            nonlocal waiting
            while chunk := await answers.read(1 << 20):
                waiting = 0  # all of a pipeline: these answers are small, and the server sends them together
                writer.write(chunk)
            writer.close()

        task = asyncio.create_task(pass_back())
        try:
            while line := await reader.readline():
                parts = [line]
                words = []
                for _ in range(int(line[1:])):
                    length = await reader.readline()
                    word = await reader.readexactly(int(length[1:]) + 2)
                    parts += [length, word]
                    words.append(word[:-2].decode(errors="replace"))
                relay.commands.append(words[0].upper())
                relay.round_trips += waiting == 0
                waiting += 1
                server.write(b"".join(parts))
        finally:
            task.cancel()
            server.close()

    async with listening(serve) as port:
        relay.port = port
        yield relay
