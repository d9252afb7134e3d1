"""Middlewares as others write them, which know nothing of path sends."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Dropping:
    """Drops the messages that it does not know."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def known(message: Message) -> None:
            if message["type"] in ("http.response.start", "http.response.body"):
                await send(message)

        await self.app(scope, receive, known)


class Keeping:
    """Keeps all messages until the application has returned."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept: list[Message] = []

        async def keep(message: Message) -> None:
            kept.append(message)

        await self.app(scope, receive, keep)
        for message in kept:
            await send(message)
