"""`Dispatch`: gives a request to its route, and answers the errors that the route raises.

It does what Starlette's own application, error middlewares and router do together, but in one coroutine instead of
eight: each takes memory for as long as a client stalls, and time in each request. For the same reason, the middlewares
of the service are plain functions wherever they only pass a request on.
"""

from collections.abc import Awaitable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send


class Dispatch:
    """The innermost ASGI application of the service.

    router: has the routes and the lifespan. handlers: async functions that answer an exception, by its class or, for an
    `HTTPException`, by its status. Another exception gives 500, and is raised again for the log of the server.
    """

    def __init__(self, router: Router, handlers: Mapping[Any, ExceptionHandler]) -> None:
        self._router = router
        self._handlers: dict[Any, Any] = {HTTPException: _plain, **handlers}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return a coroutine that answers a request, or runs the lifespan."""
        return (self._answer if scope["type"] == "http" else self._router)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = _Sending(send)
        try:
            await self._route(scope)(scope, receive, sending)
        except Exception as exc:
            if sending.has_begun:
                raise
            if (handler := self._handler_of(exc)) is None:
                await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)
                raise
            response: Response = await handler(Request(scope, receive, send), exc)
            await response(scope, receive, send)
            exc.__traceback__ = None  # it may be raised again, and would grow

    def _route(self, scope: Scope) -> ASGIApp:
        """Return the application of the route, as Starlette's router finds it, or that router for a 404 or 405."""
        for route in self._router.routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL and isinstance(route, Route):
                scope["router"], scope["route"] = self._router, route
                scope.update(child_scope)
                return route.app
        return self._router

    def _handler_of(self, exc: Exception) -> Any:
        """Return the function that answers an exception; None if there is none."""
        if isinstance(exc, HTTPException) and (handler := self._handlers.get(exc.status_code)) is not None:
            return handler
        return next((self._handlers[kind] for kind in type(exc).__mro__ if kind in self._handlers), None)


class _Sending:
    """Passes the messages of an answer on, and knows whether it has begun."""

    __slots__ = ("_send", "has_begun")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.has_begun = True
        return self._send(message)


async def _plain(request: Request, exc: Exception) -> Response:
    """Return the answer that Starlette gives for an `HTTPException`."""
    assert isinstance(exc, HTTPException)
    if exc.status_code in (204, 304):
        return Response(status_code=exc.status_code, headers=exc.headers)
    return PlainTextResponse(exc.detail, exc.status_code, exc.headers)
