"""The keys of links, the users, and the access of routes, as the settings give them."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from starlette.routing import Match, Route
from starlette.types import ASGIApp

from downloadview_async import Access, ConfigurationError, KeepPeer, ProxyUsers, SignedLinks, URLSigner, Users
from downloadview_async.service.config_loader import KEY_LINE
from downloadview_async.service.functions import function_of
from downloadview_async.service.logs import one_line
from downloadview_async.service.settings import RouteSettings, Settings, seconds_of

SIGNED = "signed"
_HOOK = "hook:"
_USER = "user:"


def signer_of(settings: Settings) -> URLSigner | None:
    """Return the signer of links with the keys in the settings; None without a `[links]` table.

    Raises `ConfigurationError` if the file of the keys cannot be read, or has a line that is not a key.
    """
    links = settings.links
    if links is None:
        return None
    max_age = seconds_of(links.max_age)
    assert max_age is not None  # the settings have been checked
    with settings.blaming("links.keys"):
        return URLSigner(_keys(settings, links.keys), max_age=timedelta(seconds=max_age))


def users_of(settings: Settings) -> Users | ProxyUsers | None:
    """Return the users in the settings; None without a `[users]` table.

    Raises `ConfigurationError` for a wrong file of users, and for trusted addresses that are host names.
    """
    users = settings.users
    if users is None:
        return None
    if users.file is not None:
        with settings.blaming("users.file"):
            return Users(users.file, realm=users.realm)
    assert users.header is not None  # the settings have been checked
    with settings.blaming("server.forwarded_allow_ips"):
        return ProxyUsers(users.header, trusted=trusted_proxies(settings))


def trusted_proxies(settings: Settings) -> list[str]:
    """Return the addresses that uvicorn trusts, from the settings, its own variable or its default."""
    import uvicorn  # here, because the commands that sign links do not need it

    trusted = uvicorn.Config("", log_config=None, forwarded_allow_ips=settings.server.forwarded_allow_ips)
    addresses: str | Sequence[str] = trusted.forwarded_allow_ips
    each = addresses.split(",") if isinstance(addresses, str) else addresses
    return [address.strip() for address in each if address.strip()]


def keeping_peers(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Return what uvicorn has to run, without `proxy_headers`, if a proxy sends the names of users; else `app` itself.

    uvicorn's `proxy_headers` would replace the address of the peer before any application sees it.
    """
    if settings.users is None or settings.users.header is None:
        return app
    if settings.server.proxy_headers:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        middleware: Any = ProxyHeadersMiddleware  # uvicorn's types of ASGI are others
        app = middleware(app, trusted_hosts=trusted_proxies(settings))
    return KeepPeer(app)


def access_of(
    settings: Settings, index: int, route: RouteSettings, signer: URLSigner | None, users: Users | ProxyUsers | None
) -> list[Access] | None:
    """Return what `Download` takes as `access` for a route.

    Raises `ConfigurationError` for a hook or a user that is missing.
    """
    if route.access is None:
        return None
    return list(_access_of(settings, f"routes[{index}].access", route.access, signer, users))


def _access_of(
    settings: Settings, key: str, access: list[str], signer: URLSigner | None, users: Users | ProxyUsers | None
) -> Iterator[Access]:
    names = []
    for number, one in enumerate(access):
        if one == SIGNED:
            assert signer is not None  # the settings have been checked
            yield SignedLinks(signer)
        elif one.startswith(_USER):
            names.append(one.removeprefix(_USER))
        else:
            yield function_of(settings, f"{key}[{number}]", one.removeprefix(_HOOK))
    if names:  # together, so that a password is checked once
        assert users is not None  # the settings have been checked
        with settings.blaming(key):
            yield users.allow(*names)


def _keys(settings: Settings, keys: str) -> dict[str, str]:
    """Return the keys in a text, or in the file that it names, in their order."""
    if KEY_LINE.search(keys) is None:
        try:
            with open(keys, encoding="utf-8") as file:
                keys = file.read()
        except OSError as exc:
            raise settings.error(
                "links.keys",
                f"{keys!r} cannot be read ({exc.strerror}): create it with `downloadview keys >> {keys}`",
            ) from exc
    secrets: dict[str, str] = {}
    for number, line in enumerate(keys.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = KEY_LINE.fullmatch(line)
        if match is None:  # the line may have a secret, so it is not shown
            raise settings.error(
                "links.keys", f"line {number} is not `id secret`, with a secret of 32 characters or more: correct it"
            )
        if match[1] in secrets:
            raise settings.error("links.keys", f"line {number} has the id {match[1]!r} again: give it another id")
        secrets[match[1]] = match[2]
    return secrets


def sign_path(settings: Settings, path: str, **options: Any) -> str:
    """Return a link to a path, which begins with the service's `root_path`. options: those of `URLSigner.sign`.

    path: without the `root_path`, as in `routes`.

    Raises `ConfigurationError` if no route that takes links serves the path, and `ValueError` for a wrong option.
    """
    signer = signer_of(settings)
    scope = {"type": "http", "method": "GET", "path": path}
    for route in settings.routes:
        if Route(route.path, _nothing).matches(scope)[0] is not Match.NONE:
            if signer is None or SIGNED not in (route.access or ()):
                raise ConfigurationError(
                    f'the route {route.path} takes no links: add "signed" to its access, and a [links] table'
                )
            return signer.sign(settings.server.root_path + path, **options)  # as uvicorn puts it into the scope
    raise ConfigurationError(f"no route serves {path!r}: give a path such as /files/a.txt, not percent-encoded")


def _nothing(request: object) -> None:
    """Stand for the endpoint of a route whose path alone is compared."""


def grant_of(settings: Settings, url: str, client: str | None) -> dict[str, str]:
    """Return what a link grants, as texts by their names. client: the address of the client.

    Raises `LinkInvalid` and `LinkExpired`, and `ConfigurationError` without keys.
    """
    signer = signer_of(settings)
    if signer is None:
        raise ConfigurationError("links need keys: add a [links] table with keys")
    parts = urlsplit(url)
    grant = signer.check(unquote_to_bytes(parts.path), parts.query.encode(), client, time.time())
    expires = None if grant.expires is None else f"{datetime.fromtimestamp(grant.expires, UTC):%Y-%m-%dT%H:%M:%SZ}"
    disposition = {True: "attachment", False: "inline", None: None}[grant.attachment]
    values = {
        "path": unquote(parts.path),
        "link": grant.link_id,
        "key": grant.key_id,
        "expires": expires or "never",
        "filename": grant.filename,
        "disposition": disposition,
        "content type": grant.content_type,
        "shareable": "yes" if grant.is_shareable else None,
    }
    return {name: one_line(value) for name, value in values.items() if value is not None}
