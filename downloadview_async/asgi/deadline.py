"""A deadline for `send`, under servers that do not watch over their clients themselves."""

import anyio
from starlette.types import Message, Scope, Send

from downloadview_async.asgi.extensions import CONNECTION, WATCHED
from downloadview_async.errors import TransferAborted

STALL_SECONDS = 60.0
"""How long a client may take too little before its connection is reset, or its answer is aborted."""

_STEP = 1 << 16  # bytes


def in_time(scope: Scope, send: Send) -> Send:
    """Return a `send` that raises `TransferAborted` if the server does not take a part of a body in time.

    Each 64 KiB of a message, and what is left of them, have `STALL_SECONDS`. The server may not see anything of what a
    client takes until a third of the kernel's buffer is free again, so this does not measure a rate. A server
    that watches its clients has a limit for them, and its own `send` is returned.
    """
    if (extensions := scope.get("extensions")) and (CONNECTION in extensions or WATCHED in extensions):
        return send

    async def send_in_time(message: Message) -> None:
        if message["type"] != "http.response.body":  # a server may send a whole file before it returns
            await send(message)
            return
        limit = STALL_SECONDS * max(1, -(-len(message.get("body", b"")) // _STEP))
        with anyio.move_on_after(limit) as scope:
            await send(message)
        if scope.cancelled_caught:
            raise TransferAborted(f"the server has not taken a part of the body in {limit:g} seconds", reason="stalled")

    return send_in_time
