"""`ProxyUsers`: the name of a user whom a trusted proxy has checked, in a header of the request."""

import re
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.errors import AccessDenied, ConfigurationError, wrong_type
from downloadview_async.policy.access import Access, UserAccess
from downloadview_async.policy.addresses import ANYONE, PEER, TrustedAddresses

_HEADER = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
_NOT_A_NAME = re.compile(r"[\x00-\x1f\x7f,]")


class KeepPeer:
    """An ASGI application that keeps the address of the peer for `ProxyUsers`, and passes everything on to `app`.

    Put it around everything that replaces `scope["client"]` by an address in `X-Forwarded-For`, and start uvicorn with
    `--no-proxy-headers`, because uvicorn replaces it before any application is called:

        app = KeepPeer(ProxyHeadersMiddleware(app, trusted_hosts="10.0.0.7"))
    """

    def __init__(self, app: ASGIApp) -> None:
        if not callable(app):
            raise wrong_type("KeepPeer takes an ASGI application", app)
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with the address of the peer. One of another `KeepPeer` around this stays."""
        self.keep(scope)
        await self.app(scope, receive, send)

    @staticmethod
    def keep(scope: Scope) -> None:
        """Keep the address in the scope of a request, without an application."""
        if scope["type"] == "http" and PEER not in scope:
            client = scope.get("client")
            scope[PEER] = client[0] if client else None


class ProxyUsers:
    """The users whom a proxy has checked. `allow` returns what `Download` takes as `access`.

        users = ProxyUsers("X-Remote-User", trusted=["10.0.0.7"])
        app = KeepPeer(Starlette(routes=[Route("/files/{path:path}", Download(source, access=users.allow("ada")))]))

    header: the header with the name. It is believed only in requests that come directly from an address in `trusted`,
    which has addresses and networks; `*` trusts everyone who can reach the application. The proxy has to replace a
    header that its client sends. A request with the header twice, or with `_` for `-` in its name, has no user, nor has
    one whose name is empty, is not UTF-8, or has a comma, by which proxies join repeated headers.

    Raises `ConfigurationError` for an invalid header or address.
    """

    def __init__(self, header: str, *, trusted: Iterable[str]) -> None:
        if not _HEADER.fullmatch(header):
            raise ConfigurationError(f"header is {header!r}: give the name of a header, such as X-Remote-User")
        self._header = header.lower().encode()
        self._trusted = TrustedAddresses(trusted)
        if not self._trusted:
            raise ConfigurationError("trusted is empty: give the addresses of the proxies")

    def allow(self, *names: str) -> Access:
        """Return the access of the users with these names; `*` stands for all users."""
        if not names:
            raise ConfigurationError("users.allow needs a name, or '*' for all users")

        async def user_of(request: Request) -> str:
            return self.user_of(request)

        return UserAccess(names, user_of)

    def user_of(self, request: Request) -> str:
        """Return the name of the user who sends a request.

        Raises `AccessDenied` without a name that is believed, and `ConfigurationError` if no `KeepPeer` is around the
        application.
        """
        if PEER not in request.scope:
            raise ConfigurationError(
                "ProxyUsers cannot know where a request is from: put KeepPeer around the application, or start the "
                "service with `downloadview serve`"
            )
        peer = request.scope[PEER]
        if not self._trusted.has(peer):
            raise AccessDenied(f"{peer!r} is not the address of a trusted proxy")
        headers = [(name, value) for name, value in request.scope["headers"] if _dashed(name) == self._header]
        if len(headers) != 1 or headers[0][0].lower() != self._header:
            raise AccessDenied(f"the proxy has sent {len(headers)} names of a user")
        try:
            user: str = headers[0][1].decode().strip()
        except UnicodeDecodeError:
            raise AccessDenied("the name of the user is not UTF-8") from None
        if not user or user == ANYONE or _NOT_A_NAME.search(user):
            raise AccessDenied(f"{user!r} is not the name of a user")
        return user


def _dashed(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")
