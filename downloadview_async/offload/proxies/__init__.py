"""The registry of proxies: one `ProxyKind` for each module of this package, and those that installed packages add."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.proxies.apache import APACHE
from downloadview_async.offload.proxies.caddy import CADDY
from downloadview_async.offload.proxies.h2o import H2O
from downloadview_async.offload.proxies.lighttpd import LIGHTTPD
from downloadview_async.offload.proxies.litespeed import LITESPEED
from downloadview_async.offload.proxies.nginx import NGINX

GROUP = "downloadview_async.proxies"
"""The group of entry points by which a package adds a `ProxyKind` to the service, its commands and its workers."""

_OURS = (NGINX, APACHE, LIGHTTPD, CADDY, H2O, LITESPEED)


@cache
def proxy_kinds() -> Mapping[str, ProxyKind]:
    """Return the kinds of proxies by name: those of this package, then those of installed packages.

    A package adds a `ProxyKind` by an entry point of the group `downloadview_async.proxies` that names it.

    Raises `ConfigurationError` for an entry point that cannot be loaded or names another object, for two kinds with the
    same name, and for different options with the same name.
    """
    from importlib.metadata import entry_points  # importing it takes time, and most applications do not need it

    kinds = {kind.name: kind for kind in _OURS}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        origin = f"the entry point {point.name} = {point.value} of {GROUP}"
        try:
            kind = point.load()
        except Exception as exc:  # importing the module may raise anything
            raise ConfigurationError(
                f"{origin} cannot be loaded ({type(exc).__name__}: {exc}): correct or uninstall its package"
            ) from exc
        if not isinstance(kind, ProxyKind):
            raise ConfigurationError(f"{origin} is not a ProxyKind: let the entry point name one")
        if kinds.setdefault(kind.name, kind) is not kind:
            raise ConfigurationError(f"{origin} is a second proxy with the name {kind.name!r}: rename it")
        for name, option in kind.options.items():
            for other in kinds.values():
                if name in other.options and replace(other.options[name], default=option.default) != option:
                    raise ConfigurationError(
                        f"{origin} and {other.title} have different options with the name {name!r}: rename one"
                    )
    return MappingProxyType(kinds)
