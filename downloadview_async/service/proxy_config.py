"""`downloadview config`: the configuration of a proxy that sends the files of the settings."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from downloadview_async import LinkLocation, ObjectStorage, balancer_config, proxy_config, proxy_kinds
from downloadview_async.service.health import LIVEZ, PRIVATE, PUBLIC
from downloadview_async.service.metrics import PAGE as METRICS
from downloadview_async.service.purge import PAGE as PURGE
from downloadview_async.service.settings import CORS_HEADERS, Settings, rules_of
from downloadview_async.service.source_settings import (
    PathSettings,
    StorageSettings,
    cache_of,
    digests_mode,
    directory_of,
    source_of_files,
)


def config_for(
    settings: Settings,
    proxy: Any,
    *,
    listen: str,
    service: str | Sequence[str] | None,
    relative_to: str | os.PathLike[str] | None,
) -> str:
    """Return the configuration of a proxy that sends the files of the settings' rules.

    listen, service, relative_to: as in `proxy_config`; the default of `service` is the address in the settings.

    Raises `ConfigurationError`, which names the key.
    """
    _check_proxy(proxy, settings)
    server, rules = settings.server, rules_of(settings)
    options: dict[str, Any] = {"storages": _storages(settings), "private": PRIVATE, "public": _public(settings)}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("offload.rules", {}),
        ("server.root_path", {"prefix": server.root_path}),
        ("server.timeout_keep_alive", {"idle_seconds": server.timeout_keep_alive}),
        ("server.stall_timeout", {"stall_seconds": server.stall_timeout}),
        *_headers(settings),
        ("accounts.proxy_log", {} if settings.accounts.proxy_log is None else {"log": settings.accounts.proxy_log}),
        *(_links(settings) if proxy_kinds()[proxy].verifies_links else ()),
        ("server.host" if server.uds is None else "server.uds", {} if service else {"service": _address(settings)}),
    ]
    for key, option in steps:  # one option more in each round, so that an error names the right key
        options |= option
        with settings.blaming(key):
            proxy_config(proxy, rules, **options)
    if settings.users is not None and settings.users.header is not None:
        options["unset"] = [settings.users.header]
    if service:
        options["service"] = service
    if relative_to:
        options["relative_to"] = os.path.abspath(relative_to)
    return proxy_config(proxy, rules, listen=listen, **options)


def balancer_config_for(
    settings: Settings, balancer: str, *, listen: str, services: Sequence[str], bound: int | None
) -> str:
    """Return the configuration of a balancer in front of several replicas of the service.

    listen, services, bound: as in `balancer_config`. With `offload.backend`, the services are the addresses of such
    proxies, each in front of its replica: they remove the `root_path` and hide the pages themselves.

    Raises `ConfigurationError`, which names the key.
    """
    server = settings.server
    is_direct = settings.offload.backend is None
    options: dict[str, Any] = {"private": PRIVATE, "public": _public(settings), "probe": f"{PRIVATE}readyz"}
    if is_direct:
        options["prefix"] = server.root_path
    else:
        options |= {"private": f"{server.root_path}{PRIVATE}", "probe": f"{server.root_path}{LIVEZ}"}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("server.root_path", {}),
        ("server.timeout_keep_alive", {"idle_seconds": server.timeout_keep_alive if is_direct else 30}),
        ("server.stall_timeout", {"stall_seconds": server.stall_timeout}),
    ]
    for key, option in steps:
        options |= option
        with settings.blaming(key):
            balancer_config(balancer, ["127.0.0.1:8000"], **options)
    if settings.users is not None and settings.users.header is not None:
        options["unset"] = [settings.users.header]
    if bound is not None:
        options["bound"] = bound
    return balancer_config(balancer, services or [_address(settings)], listen=listen, **options)


def _public(settings: Settings) -> list[str]:
    """Return the names of the service's pages that clients may request."""
    pages = {METRICS: settings.metrics, PURGE: settings.purge}
    return [*PUBLIC, *(name for name, page in pages.items() if page is not None and page.public)]


def _headers(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key of each route that sends further headers, and the names that are known with this route."""
    names: list[str] = []
    if settings.listens:
        names.append("X-Request-Id")
        yield "accounts", {"headers": [*names]}
    for index, route in enumerate(settings.routes):
        if route.cors is not None:
            names += CORS_HEADERS
            yield f"routes[{index}].cors", {"headers": [*names]}
        if digests_mode(source_of_files(route.source, settings.sources)[1]) != "off":
            names.append("Repr-Digest")
            yield f"routes[{index}].source", {"headers": [*names]}
        if cache_of(source_of_files(route.source, settings.sources)[1]) is not None:
            names.append("Cache-Status")
            yield f"routes[{index}].source", {"headers": [*names]}
        if route.headers:
            names += route.headers
            yield f"routes[{index}].headers", {"headers": [*names]}


def _links(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key of each route whose links the proxy can verify, and the locations that are known with this route.

    Raises `ConfigurationError` for a route with such links that the proxy cannot serve as the service does.
    """
    locations: list[LinkLocation] = []
    for index, route in enumerate(settings.routes):
        if "secure_link" not in (route.access or ()) or route.send == "stream":
            continue
        key, source = f"routes[{index}]", settings.sources[route.source]
        directory = directory_of(source)
        prefix = re.fullmatch("((?:/[^/{}]+)+/){[^{}]*:path}", route.path)
        stream = 'or set send = "stream", so that the service verifies the links and sends the files'
        if route.access != ["secure_link"]:
            raise settings.error(f"{key}.access", f"the proxy can ask only for secure_link: split the route, {stream}")
        if directory is None or cache_of(source) is not None:
            raise settings.error(f"{key}.source", f"the proxy sends only files of a directory: choose one, {stream}")
        if prefix is None:
            raise settings.error(
                f"{key}.path", f"the proxy serves only a path such as /x/{{path:path}}: write one, {stream}"
            )
        if route.cors is not None:
            raise settings.error(f"{key}.cors", f"the proxy cannot decide about origins: remove it, {stream}")
        for other in settings.routes[:index]:
            if other.path.startswith(prefix[1]) or (
                ":path}" in other.path and prefix[1].startswith(other.path.partition("{")[0])
            ):
                raise settings.error(
                    f"{key}.path", f"the proxy would serve paths of {other.path!r} too: choose another path, {stream}"
                )
        location = LinkLocation(
            prefix=settings.server.root_path + prefix[1],
            directory=directory,
            attachment=route.disposition == "attachment",
            headers=route.headers,
            hide=route.hide,
            follows_symlinks=isinstance(source, PathSettings) and source.symlinks == "follow",
        )
        locations.append(location)
        yield key, {"links": [*locations]}


def _storages(settings: Settings) -> list[ObjectStorage]:
    storages = []
    for name, source in settings.sources.items():
        if isinstance(source, StorageSettings) and source.url.startswith("s3://"):
            options: dict[str, Any] = {**source.options}
            with settings.blaming(f"sources.{name}"):
                storages.append(ObjectStorage(source.url, **options))
    return storages


def _check_proxy(proxy: str, settings: Settings) -> None:
    """Raise `ConfigurationError` for settings with which this proxy would send no file, or would hide a route."""
    offload = settings.offload
    variable = "DOWNLOADVIEW_OFFLOAD__BACKEND"
    if offload.backend is None:
        raise settings.error(
            "offload.backend",
            f"not set, so the service sends all files itself: set it to {proxy!r}, here or by {variable}={proxy}, for "
            "the service too",
        )
    if offload.backend != proxy:
        raise settings.error(
            "offload.backend",
            f"{proxy} does not understand the headers for {offload.backend!r}: set it to {proxy!r}, here or by "
            f"{variable}={proxy}, for the service too",
        )
    if proxy_kinds()[proxy].hides_targets:
        for index, route in enumerate(settings.routes):
            for rule in offload.rules:
                if rule.target and f"{settings.server.root_path}{route.path}".startswith(rule.target):
                    raise settings.error(
                        f"routes[{index}].path",
                        f"{route.path!r} is below {rule.target!r}, the target of a rule, which clients cannot reach: "
                        "choose another target, such as /_files/",
                    )


def _address(settings: Settings) -> str:
    """Return the address of the service for a proxy on this machine. Raises `ConfigurationError` if it is unknown."""
    server = settings.server
    if server.ssl_certfile:
        raise settings.error(
            "server.ssl_certfile",
            "the proxy speaks plain HTTP to the service: remove it, and configure TLS in the proxy",
        )
    if server.fd is not None:
        raise settings.error("server.fd", "a proxy needs an address: give it with --service")
    if server.uds is not None:
        return f"unix:{os.path.abspath(server.uds)}"
    if server.port == 0:
        raise settings.error("server.port", "the port must not change at each start: give a port, or --service")
    return server.address
