"""The limits of clients and of sources, as the settings give them."""

import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec

from downloadview_async import Limits, SourceLimit, proxy_kinds
from downloadview_async.service.access import trusted_proxies
from downloadview_async.service.functions import HOOK, function_of
from downloadview_async.service.logs import one_line
from downloadview_async.service.settings import RouteLimitsSettings, Settings, Unavailable

logger = logging.getLogger("downloadview_async")

_PATIENCE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """The limits of the service.

    common: those in `[limits]`. routes: those of routes, by their number. sources: those of sources, by their name.
    """

    common: Limits | None
    routes: Mapping[int, Limits]
    sources: Mapping[str, SourceLimit]

    def of(self, index: int, source: str) -> list[Limits | SourceLimit]:
        """Return the limits of a route: of its source last, so that who waits for it has been counted."""
        each = (self.common, self.routes.get(index), self.sources.get(source))
        return [limits for limits in each if limits is not None]


def service_limits(settings: Settings) -> ServiceLimits:
    """Return the limits in the settings. Raises `ConfigurationError`, as for a hook or a package that is missing."""
    common = None if settings.limits is None else _limits(settings, "limits", settings.limits, "all")
    routes = {
        index: _limits(settings, f"routes[{index}].limits", route.limits, f"route {route.path}")
        for index, route in enumerate(settings.routes)
        if route.limits is not None
    }
    sources = {
        name: SourceLimit(most, queue_seconds=getattr(source, "queue_timeout", 2.0))
        for name, source in settings.sources.items()
        if (most := getattr(source, "max_requests", None)) is not None
    }
    return ServiceLimits(common, routes, sources)


def _limits(settings: Settings, key: str, limits: RouteLimitsSettings, name: str) -> Limits:
    options: dict[str, Any] = msgspec.structs.asdict(limits)
    client = limits.client
    if client.startswith(HOOK):
        options["client"] = function_of(settings, f"{key}.client", client)
    elif client.startswith("header:"):
        with settings.blaming("server.forwarded_allow_ips"):
            options["trusted"] = trusted_proxies(settings)
    options["queue_seconds"] = options.pop("queue_timeout")
    options["proxy_log"] = _log_of(settings)
    if settings.limits is not None:
        options |= {"store": settings.limits.store, "when_store_fails": settings.limits.when_store_fails}
    with settings.blaming(key):
        return Limits(**options, name=name, prefix=settings.shared.prefix)


def _log_of(settings: Settings) -> str | None:
    """Return the log that tells the end of what a proxy sends; None without one: S3 delivers its logs hours later."""
    log = settings.accounts.proxy_log
    return None if log is None or os.path.isdir(log) else log


@asynccontextmanager
async def opened_limits(settings: Settings, limits: ServiceLimits, *, warns: bool = True) -> AsyncIterator[None]:
    """Ask the store of limits once, and close it at the end.

    warns: log a store that does not answer although requests are allowed then, and rates that a proxy does not keep.

    Raises `Unavailable` if the store does not answer, unless requests are allowed then.
    """
    every = [*limits.routes.values(), *([] if limits.common is None else [limits.common])]
    if warns and settings.offload.backend is not None:
        kind = proxy_kinds()[settings.offload.backend]
        has_log = _log_of(settings) is not None and settings.offload.backend != "h2o"
        if not has_log and any(one.concurrent is not None for one in every):
            logger.warning(
                "`concurrent` of limits counts the transfers of the service itself: one that %s sends ends when it is "
                "handed over%s",
                kind.title,
                "" if settings.offload.backend == "h2o" else "; with accounts.proxy_log, it ends with its line there",
            )
        if kind.rate_header is None and any(one.rate is not None for one in every):
            logger.warning(
                '%s cannot limit the rate of the files that it sends: set send = "stream" on routes whose rate has '
                "to hold",
                kind.title,
            )
    try:
        for one in every[:1]:
            try:
                with anyio.fail_after(_PATIENCE):
                    await one.check()
            except Exception as exc:  # whatever the library of the store raises
                assert settings.limits is not None
                reason = str(exc) or f"no answer in {_PATIENCE:g} seconds"
                error = settings.error(
                    "limits.store", f"the store cannot be used ({reason}): start it, or correct the setting"
                )
                if settings.limits.when_store_fails == "refuse":
                    raise Unavailable(str(error)) from exc
                if warns:
                    logger.warning("%s", one_line(str(error)))
        yield
    finally:
        with anyio.CancelScope(shield=True):
            for one in every:
                await one.aclose()
