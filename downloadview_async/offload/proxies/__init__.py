"""The registry of proxies: one `ProxyKind` for each module of this package, and those that installed packages add."""

from collections.abc import Mapping
from functools import cache

from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.installed import with_installed
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

    Raises `ConfigurationError`, see `with_installed`.
    """
    return with_installed(_OURS, ProxyKind, GROUP, "proxy")
