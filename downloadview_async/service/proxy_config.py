"""The configuration of the proxy that the settings are for, as `downloadview config` prints it."""

import os
from typing import Any

from downloadview_async import ObjectStorage, proxy_config, proxy_kinds
from downloadview_async.service.health import PRIVATE, PUBLIC
from downloadview_async.service.settings import Settings, StorageSettings, rules_of


def config_for(
    settings: Settings, proxy: Any, *, listen: str, service: str | None, relative_to: str | os.PathLike[str] | None
) -> str:
    """Return the configuration of a proxy that sends the files of the settings' rules.

    listen, service, relative_to: as in `proxy_config`; service: by default where the settings let the service listen.

    Raises `ConfigurationError`, which names the key.
    """
    _check_proxy(proxy, settings)
    server, rules = settings.server, rules_of(settings)
    options: dict[str, Any] = {"storages": _storages(settings), "private": PRIVATE, "public": PUBLIC}
    for key, option in (  # one more at a time, so that a mistake is blamed on its own key
        ("offload.rules", {}),
        ("server.root_path", {"prefix": server.root_path}),
        ("server.timeout_keep_alive", {"idle_seconds": server.timeout_keep_alive}),
        ("server.stall_timeout", {"stall_seconds": server.stall_timeout}),
        ("server.host" if server.uds is None else "server.uds", {} if service else {"service": _address(settings)}),
    ):
        options |= option
        with settings.blaming(key):
            proxy_config(proxy, rules, **options)
    if service:
        options["service"] = service
    if relative_to:
        options["relative_to"] = os.path.abspath(relative_to)
    return proxy_config(proxy, rules, listen=listen, **options)


def _storages(settings: Settings) -> list[ObjectStorage]:
    found = []
    for name, source in settings.sources.items():
        if isinstance(source, StorageSettings) and source.url.startswith("s3://"):
            options: dict[str, Any] = {**source.options}
            with settings.blaming(f"sources.{name}"):
                found.append(ObjectStorage(source.url, **options))
    return found


def _check_proxy(proxy: str, settings: Settings) -> None:
    """Raise `ConfigurationError` for settings with which this proxy would send nothing, or hide a route."""
    offload = settings.offload
    variable = "DOWNLOADVIEW_OFFLOAD__BACKEND"
    if offload.backend is None:
        raise settings.error(
            "offload.backend",
            f"without it, the service sends everything itself: set it to {proxy!r}, here or by {variable}={proxy}, for "
            "the service too",
        )
    if offload.backend != proxy:
        raise settings.error(
            "offload.backend",
            f"this is {offload.backend!r}, which {proxy} does not understand: set it to {proxy!r}, here or by "
            f"{variable}={proxy}, for the service too",
        )
    if proxy_kinds()[proxy].hides_targets:
        for index, route in enumerate(settings.routes):
            for rule in offload.rules:
                if rule.target and f"{settings.server.root_path}{route.path}".startswith(rule.target):
                    raise settings.error(
                        f"routes[{index}].path",
                        f"{route.path!r} is below {rule.target!r}, the target of a rule, where no client gets: choose "
                        "another target, such as /_files/",
                    )


def _address(settings: Settings) -> str:
    """Return where a proxy on this machine finds the service. Raises `ConfigurationError` where nobody knows."""
    server = settings.server
    if server.ssl_certfile:
        raise settings.error(
            "server.ssl_certfile", "the proxy speaks plain HTTP to the service: remove it, and give the proxy TLS"
        )
    if server.fd is not None:
        raise settings.error("server.fd", "a proxy needs an address: give it with --service")
    if server.uds is not None:
        return f"unix:{os.path.abspath(server.uds)}"
    if server.port == 0:
        raise settings.error("server.port", "a proxy needs a port that stays the same: give one, or --service")
    return server.address
