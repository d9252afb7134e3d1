"""The keys of links, the users, and the access of routes, as the settings give them."""

import logging
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any
from urllib.parse import unquote, urlsplit

import anyio
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from downloadview_async import (
    Access,
    ConfigurationError,
    FileMissing,
    GrantStore,
    Hidden,
    KeepPeer,
    ProxyUsers,
    RedisGrantStore,
    SignedLinks,
    URLSigner,
    Users,
    grant_store_from_url,
    link_formats,
    secure_link_secrets,
)
from downloadview_async.service.functions import function_of
from downloadview_async.service.health import PRIVATE
from downloadview_async.service.logs import one_line
from downloadview_async.service.settings import RouteSettings, Settings, Unavailable
from downloadview_async.service.values import KEY_LINE, seconds_of

logger = logging.getLogger("downloadview_async")

SIGNED = {"signed": "complete", "secure_link": "secure_link"}
"""The formats of links by the words for them in the access of a route."""

USER = "user:"
_OF_PROXIES = {b"x-forwarded-for", b"x-forwarded-proto"}  # what uvicorn's middleware reads
_PATIENCE = 5.0  # seconds


def store_of(settings: Settings) -> GrantStore | None:
    """Return the store of uses and revocations; None if the settings have none.

    Raises `ConfigurationError` if the package that it needs is missing.
    """
    if settings.links is None or settings.links.store is None:
        return None
    with settings.blaming("links.store"):
        return grant_store_from_url(settings.links.store, prefix=settings.shared.prefix, guards_loss=True)


@asynccontextmanager
async def opened_store(
    settings: Settings, store: GrantStore | None, signer: URLSigner | None = None
) -> AsyncIterator[None]:
    """Ask the store once, and close it at the end. signer: the one that uses the store, if requests are answered.

    Raises `ConfigurationError` if it can never be used, and its subclass `Unavailable` if it does not answer, unless
    requests are allowed then.
    """
    if store is None:
        yield
        return
    assert settings.links is not None
    try:
        try:
            with anyio.fail_after(_PATIENCE):
                await store.check()
        except ConfigurationError as exc:
            raise settings.error("links.store", str(exc)) from exc
        except Exception as exc:  # whatever the library of the store raises
            reason = str(exc) or f"no answer in {_PATIENCE:g} seconds"
            error = settings.error(
                "links.store", f"the store cannot be used ({reason}): start it, or correct the setting"
            )
            if isinstance(exc, sqlite3.Error):
                raise error from exc
            if settings.links.when_store_fails == "refuse":
                raise Unavailable(str(error)) from exc
            logger.warning("%s", one_line(str(error)))
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await (signer or store).aclose()


def begin_store(settings: Settings) -> None:
    """Have the store of links begin before a link is made: it refuses links that were made before it has begun.

    A store that does not answer is logged.
    """
    store = store_of(settings)
    if not isinstance(store, RedisGrantStore):
        return
    try:
        store.begin()
    except Exception as exc:  # whatever the library of the store raises
        problem = f"the store does not answer ({one_line(str(exc))}): if it is new, the link will be refused"
        logger.warning("%s", settings.error("links.store", problem))


def signer_of(settings: Settings, store: GrantStore | None) -> URLSigner | None:
    """Return the signer of links with the keys in the settings; None without a `[links]` table.

    Raises `ConfigurationError` if the file of the keys cannot be read, or has a line that is not a key.
    """
    links = settings.links
    if links is None:
        return None
    max_age, session_age = seconds_of(links.max_age), seconds_of(links.session_age)
    assert max_age is not None
    assert session_age is not None  # the settings have been checked
    keys = keys_in(settings, "links.keys", links.keys)
    with settings.blaming("links.keys"):
        return URLSigner(
            keys,
            max_age=timedelta(seconds=max_age),
            store=store,
            when_store_fails=links.when_store_fails,
            session_seconds=session_age,
        )


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
    """Return the addresses that uvicorn trusts, from the settings, its own variable or its default.

    Raises `ConfigurationError` for what is meant as an address or a network, and is not one: uvicorn would ignore it.
    """
    import uvicorn  # here, because the commands that sign links do not need it

    allowed = settings.server.forwarded_allow_ips
    trusted = uvicorn.Config(
        "", log_config=None, forwarded_allow_ips=allowed, workers=1
    )  # not those of WEB_CONCURRENCY
    addresses: str | Sequence[str] = trusted.forwarded_allow_ips
    each = addresses.split(",") if isinstance(addresses, str) else addresses
    trusted_ones = [address.strip() for address in each if address.strip()]
    for address in trusted_ones:
        if re.fullmatch("[0-9.]+|.*[:/].*", address):
            try:
                ip_network(address)
            except ValueError as exc:
                problem = f"{address!r} is not an address, and not a network such as 10.0.0.0/8"
                raise ConfigurationError(f"{problem}: {exc}") from exc
    return trusted_ones


def locating(settings: Settings) -> Callable[[Scope], None]:
    """Return a function that does what uvicorn's `proxy_headers` does to the scope of a request, by the settings.

    If a proxy sends users, clients or ids of requests, or if something listens to outcomes, the address of the peer is
    kept too: uvicorn itself would replace it before any application sees it.
    """
    middleware: Any = None  # uvicorn's types of ASGI are others
    if settings.server.proxy_headers:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        with settings.blaming("server.forwarded_allow_ips"):
            inner: Any = _do_nothing
            middleware = ProxyHeadersMiddleware(inner, trusted_hosts=trusted_proxies(settings))
    limits = [settings.limits, *(route.limits for route in settings.routes)]
    has_header = settings.users is not None and settings.users.header is not None
    has_clients = any(one is not None and one.client.startswith("header:") for one in limits)
    keeps_peer = settings.listens or has_header or has_clients

    def locate(scope: Scope) -> None:
        if keeps_peer:
            KeepPeer.keep(scope)
        if middleware is not None and not _OF_PROXIES.isdisjoint(dict(scope["headers"])):
            with suppress(StopIteration):  # it waits for its application alone, which returns at once
                middleware(scope, None, None).send(None)

    return locate


async def _do_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Be the application of a middleware that changes the scope alone."""


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
        if one in SIGNED:
            assert signer is not None  # the settings have been checked
            yield SignedLinks(signer, format=SIGNED[one])
        elif one.startswith(USER):
            names.append(one.removeprefix(USER))
        else:
            yield function_of(settings, f"{key}[{number}]", one)
    if names:  # together, so that a password is checked once
        assert users is not None  # the settings have been checked
        with settings.blaming(key):
            yield users.allow(*names)


def keys_in(settings: Settings, key: str, keys: str) -> dict[str, str]:
    """Return the keys in a text, or in the file that it names, in their order.

    key: where the settings have it, such as `links.keys`. Raises `ConfigurationError`.
    """
    path = None
    if KEY_LINE.search(keys) is None:
        path = keys
        try:
            with open(keys, encoding="utf-8") as file:
                keys = file.read()
        except UnicodeDecodeError as exc:
            raise settings.error(key, f"{keys!r} is not UTF-8: write the file in UTF-8") from exc
        except OSError as exc:
            if re.search(r"\s", keys):  # it may be a wrong secret, so it is not shown
                raise settings.error(
                    key,
                    f"it is neither a file that can be read ({exc.strerror}) nor a line `id secret`, with a secret of "
                    "32 characters or more: correct it",
                ) from None
            raise settings.error(
                key,
                f"{keys!r} cannot be read ({exc.strerror}): create it with `downloadview keys >> {keys}`",
            ) from exc
    secrets: dict[str, str] = {}
    for number, line in enumerate(keys.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = KEY_LINE.fullmatch(line)
        if match is None:  # the line may have a secret, so it is not shown
            raise settings.error(
                key, f"line {number} is not `id secret`, with a secret of 32 characters or more: correct it"
            )
        if match[1] in secrets:
            raise settings.error(key, f"line {number} has the id {match[1]!r} again: give it another id")
        secrets[match[1]] = match[2]
    if not secrets:
        raise settings.error(key, f"{path!r} has no key: add one with `downloadview keys >> {path}`")
    return secrets


def link_secrets(settings: Settings) -> str:
    """Return the file with the secrets by which nginx verifies links. Raises `ConfigurationError` without keys."""
    if settings.links is None:
        raise ConfigurationError("links need keys: add a [links] table with keys")
    signer_of(settings, None)  # refuses wrong keys
    return secure_link_secrets(keys_in(settings, "links.keys", settings.links.keys))


def sign_path(settings: Settings, path: str, **options: Any) -> str:
    """Return a link to a path, which begins with the service's `root_path`. options: those of `URLSigner.sign`.

    path: without the `root_path`, as in `routes`. format: by default one that the route takes.

    Raises `ConfigurationError` if no route that takes links serves the path, and `ValueError` for a wrong option.
    """
    signer = signer_of(settings, store_of(settings))
    if options.get("uses") is not None and signer is not None and settings.links and settings.links.store is None:
        raise settings.error("links.store", "uses are counted in a store: set it, such as sqlite:links.db")
    scope = {"type": "http", "method": "GET", "path": path}
    is_page = path == "/" or path.startswith(PRIVATE)
    for route in () if is_page else settings.routes:
        match, matched = Route(route.path, _nothing).matches(scope)
        if match is not Match.NONE:
            formats = {SIGNED[one]: one for one in route.access or () if one in SIGNED}
            if signer is None or not formats:
                raise ConfigurationError(
                    f'the route {route.path} takes no links: add "signed" to its access, and a [links] table'
                )
            if options.get("format") is None:
                options["format"] = next(name for name in link_formats() if name in formats)
            if options["format"] not in formats:
                raise ConfigurationError(
                    f"the route {route.path} takes no links of this format: give --format {' or '.join(formats)}"
                )
            try:
                Hidden(route.hide).check(*matched["path_params"].values())
            except FileMissing as exc:
                raise ConfigurationError(f"the route {route.path} hides {path!r}: correct the path, or `hide`") from exc
            return signer.sign(settings.server.root_path + path, **options)  # as uvicorn puts it into the scope
    raise ConfigurationError(f"no route serves {path!r}: give a path such as /files/a.txt, not percent-encoded")


def _nothing(request: object) -> None:
    """Stand for the endpoint of a route whose path alone is compared."""


async def grant_of(settings: Settings, url: str, client: str | None, base: str = "") -> dict[str, str]:
    """Return what a link grants, as texts by their names. client: the address of the client. base: that of `sign`.

    Raises `LinkInvalid`, for a link that is revoked too, and `LinkExpired`; `ConfigurationError` without keys.
    """
    store = store_of(settings)
    signer = signer_of(settings, store)
    if signer is None:
        raise ConfigurationError("links need keys: add a [links] table with keys")
    parts = urlsplit(url)
    sent = parts.path.removeprefix(urlsplit(base).path.rstrip("/"))
    scope = {
        "method": "GET",
        "path": unquote(sent),
        "raw_path": sent.encode(),
        "query_string": parts.query.encode(),
        "client": (client, 0),
    }
    async with opened_store(settings, store):
        grant = await signer.verify(scope, format="secure_link" if parts.query.startswith("md5=") else "complete")
    disposition = {True: "attachment", False: "inline", None: None}[grant.attachment]
    values = {
        "path": unquote(sent),
        "folder": grant.folder,
        "link": grant.link_id,
        "key": grant.key_id,
        "expires": _date(grant.expires) or "never",
        "filename": grant.filename,
        "disposition": disposition,
        "content type": grant.content_type,
        "shareable": "yes" if grant.is_shareable else None,
        "uses": None if grant.uses is None else str(grant.uses),
    }
    return {name: one_line(value) for name, value in values.items() if value is not None}


async def revoke(settings: Settings, identifier: str) -> tuple[str | None, bool]:
    """Revoke a link or a key by its id, and return until when the store keeps this; None: for ever.

    The second value is whether the id is that of a key in the settings, or has the form of that of a link.

    Raises `ConfigurationError` without a store, `Unavailable` or `SourceUnavailable` if it does not answer, and
    `ValueError` for what cannot be an id.
    """
    store = store_of(settings)
    signer = signer_of(settings, store)
    if settings.links is None or signer is None or store is None:
        raise settings.error("links.store", "links are revoked in a store: set it, such as sqlite:links.db")
    async with opened_store(settings, store):
        until = _date(await signer.revoke(identifier))
    return until, until is not None or identifier in keys_in(settings, "links.keys", settings.links.keys)


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
