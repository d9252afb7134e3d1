"""The client of a request: its address, user, link or header of a trusted proxy, or what a function returns."""

from collections.abc import Awaitable, Callable, Iterable

from starlette.requests import Request

from downloadview_async.errors import AccessDenied, ConfigurationError
from downloadview_async.policy.addresses import network_of
from downloadview_async.policy.grants import GRANT, Grant
from downloadview_async.policy.proxy_users import ProxyUsers

ClientOf = Callable[[Request], "str | Awaitable[str | None] | None"]
"""A function that returns the name of a client; None: its address counts."""

_HEADER = "header:"


def address_client(request: Request) -> str:
    """Return the client's IPv4 address or /64 of IPv6. All requests without an address are one client."""
    client = request.scope.get("client")
    return f"address {network_of(client[0] if client else None)}"


def client_function(client: str | ClientOf, trusted: Iterable[str]) -> ClientOf:
    """Return the function for `client`, as `Limits` takes it. Raises `ConfigurationError`."""
    if callable(client):
        return client
    if client == "address":
        return address_client
    if client == "user":
        return _user
    if client == "link":
        return _link
    if isinstance(client, str) and client.startswith(_HEADER):
        header = ProxyUsers(client.removeprefix(_HEADER).strip(), trusted=trusted)

        def value_of_header(request: Request) -> str | None:
            try:
                return f"{client} {header.user_of(request)}"
            except AccessDenied:
                return None

        return value_of_header
    raise ConfigurationError(f'client is {client!r}: give "address", "user", "link", "header:NAME" or a function')


def _user(request: Request) -> str | None:
    grant: Grant | None = request.scope.get(GRANT)
    return None if grant is None or grant.user is None else f"user {grant.user}"


def _link(request: Request) -> str | None:
    grant: Grant | None = request.scope.get(GRANT)
    return None if grant is None or grant.link_id is None else f"link {grant.link_id}"
