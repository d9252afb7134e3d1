"""HAProxy in front of several replicas: consistent hashing of the path, with bounded loads.

See https://docs.haproxy.org/2.6/configuration.html#4.2-balance.
"""

from downloadview_async.offload.render import ProxySite, filled, literal, socket_of, template

SHARE = 32
"""Requests in progress for each replica, below which the bound does not hold."""

_PREFIX = """\
    http-request return status 404 content-type text/plain string "Not Found" unless { path_beg <<prefix>>/ }
    http-request replace-path ^<<pattern>>(/.*) \\1
"""
_PRIVATE = """\
    # Pages of the application that are not for clients, however they are spelled.
    acl is_private path,url_dec -m beg <<private>>
    acl is_public path -m str <<public>>
    http-request return status 404 content-type text/plain string "Not Found" if is_private !is_public
"""
_BOUNDED = """\
    # A replica takes <<share>> requests in any case, and those beyond that only up to <<bound>> % of the average.
    use_backend replicas_bounded if { be_conn(replicas) ge <<limit>> }
"""
_BOUNDED_BACKEND = """
backend replicas_bounded
    balance uri path-only
    hash-type consistent sdbm avalanche
    hash-balance-factor <<bound>>
    default-server pool-purge-delay <<idle>>s weight 100
<<servers>>
"""


def haproxy_config(site: ProxySite) -> str:
    """Return a whole configuration."""
    places = [f"unix@{path}" if (path := socket_of(service)) else service for service in site.services]

    def servers(options: str) -> str:
        lines = [f"    server replica{index} {place} id {index}" for index, place in enumerate(places, 1)]
        return "\n".join(f"{line} {filled(options, name=line.split()[1])}" for line in lines)

    bounded = filled(
        _BOUNDED_BACKEND, bound=str(site.bound), idle=str(site.idle), servers=servers("track replicas/<<name>>")
    )
    limit = str(SHARE * len(places))
    public = [f"{site.prefix}{site.private}{name}" for name in site.public]
    return template(
        "haproxy.cfg",
        stall=str(site.stall),
        bind=f"{site.host}:{site.port}",
        private=filled(_PRIVATE, private=f"{site.prefix}{site.private}", public=" ".join(public or ["-"]))
        if site.private
        else "",
        prefix=filled(_PREFIX, prefix=site.prefix, pattern=literal(site.prefix)) if site.prefix else "",
        bounded=filled(_BOUNDED, share=str(SHARE), bound=str(site.bound), limit=limit) if site.bound else "",
        probe=site.probe,
        idle=str(site.idle),
        servers=servers("check inter 2s fall 2 rise 1"),
        bounded_backend=bounded if site.bound else "",
    )
