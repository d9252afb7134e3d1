"""`balancer_config`: the configuration of a balancer, by which requests for one file go to one replica of a service."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.balancers.envoy import envoy_config
from downloadview_async.offload.balancers.haproxy import haproxy_config
from downloadview_async.offload.config import checked_site, without_headers
from downloadview_async.offload.render import ProxySite

DEFAULT_BOUND = 150

_BALANCERS: Mapping[str, Callable[[ProxySite], str]] = {"haproxy": haproxy_config, "envoy": envoy_config}


def balancers() -> tuple[str, ...]:
    """Return the names of the balancers that `balancer_config` knows. They send no files themselves."""
    return tuple(_BALANCERS)


def balancer_config(
    balancer: str,
    services: Sequence[str],
    *,
    listen: str = "127.0.0.1:8080",
    prefix: str = "",
    idle_seconds: float = 5,
    stall_seconds: float = 60,
    private: str = "",
    public: Iterable[str] = (),
    unset: Iterable[str] = (),
    bound: int = DEFAULT_BOUND,
    probe: str = "/",
) -> str:
    """Return a whole configuration: requests for one path go to one of the services, by consistent hashing.

    balancer: one of `balancers()`. services: the addresses of the replicas, each HOST:PORT or unix:/PATH.
    bound: the most requests in progress that a replica takes, in percent of the average, more than 100. What is beyond
    goes to another replica. 0: no bound.
    probe: the path of a page that answers 200 while a replica can serve.
    listen, prefix, idle_seconds, stall_seconds, private, public, unset: as in `proxy_config`.

    Raises `ConfigurationError` for values that the balancer's configuration language cannot express.
    """
    write = _BALANCERS.get(balancer)
    if write is None:
        raise ConfigurationError(f"there is no balancer {balancer!r}: use one of {', '.join(_BALANCERS)}")
    if bound and not 100 < bound <= 100_000:
        raise ConfigurationError(f"the bound is {bound} %: give more than 100, such as 150, or 0 for no bound")
    site = checked_site(
        services,
        listen=listen,
        prefix=prefix,
        idle_seconds=idle_seconds,
        stall_seconds=stall_seconds,
        private=private,
        public=public,
        bound=bound,
        probe=probe,
    )
    return without_headers(write(site), balancer, unset)
