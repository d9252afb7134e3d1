"""Envoy in front of several replicas: Maglev hashing of the path, with bounded loads.

See https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/load_balancers#maglev.
"""

import ipaddress
import re

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.render import ProxySite, filled, host_and_port, socket_of, template

_PUBLIC = """\
              - match: {path: "<<path>>"}
                route: {cluster: replicas<<rewrite>>}
"""
_PRIVATE = """\
              # Pages of the application that are not for clients, however they are spelled.
              - match: {safe_regex: {regex: '<<refused>>'}}
                direct_response: {status: 404, body: {inline_string: "Not Found"}}
"""
_UNSENT = "connect-failure,refused-stream"
_READS = ', headers: [{name: ":method", string_match: {safe_regex: {regex: "GET|HEAD"}}}]'
_BOUND = """\
            # Each replica takes only up to <<bound>> % of the average of all requests in progress.
            consistent_hashing_lb_config: {hash_balance_factor: <<bound>>}
"""


def envoy_config(site: ProxySite) -> str:
    """Return a whole configuration. Raises `ConfigurationError` for a mixture of sockets and names of hosts."""
    sockets = [socket_of(service) for service in site.services]
    is_static = all(path or _is_ip(service) for path, service in zip(sockets, site.services, strict=True))
    if any(sockets) and not is_static:
        raise ConfigurationError("Envoy resolves either no address or all of them: give sockets and IP addresses only")
    places = [
        filled('pipe: {path: "<<path>>"}', path=path) if path else _socket_address(service)
        for path, service in zip(sockets, site.services, strict=True)
    ]
    rewrite = f', prefix_rewrite: "{site.private}' if site.prefix else ""
    public = "".join(
        filled(_PUBLIC, path=f"{site.prefix}{site.private}{name}", rewrite=f'{rewrite}{name}"' if site.prefix else "")
        for name in site.public
    )
    refused = f"{re.escape(site.prefix)}/{_spelled(site.private.strip('/'))}(/|%2[fF]).*"
    return template(
        "envoy.yaml",
        host=site.host.strip("[]"),
        port=str(site.port),
        stall=str(site.stall),
        private=public + filled(_PRIVATE, refused=refused) if site.private else "",
        routes="".join(
            template(
                "envoy-route.yaml",
                about=about,
                prefix=site.prefix,
                methods=methods,
                rewrite='\n                  prefix_rewrite: "/"' if site.prefix else "",
                errors=errors,
            )
            for about, methods, errors in (
                ("A GET or HEAD is repeated if a replica ends without an answer.", _READS, f"{_UNSENT},reset"),
                ("Another request goes to another replica only if the first one cannot be reached.", "", _UNSENT),
            )
        ),
        bound=filled(_BOUND, bound=str(site.bound)) if site.bound else "",
        idle=str(site.idle),
        probe=site.probe,
        type="STATIC" if is_static else "STRICT_DNS",
        endpoints="\n".join(f"        - endpoint: {{address: {{{place}}}}}" for place in places),
    )


def _spelled(text: str) -> str:
    """Return a regular expression for a path in all its percent-encoded spellings."""
    return "".join(
        f"(/|%2[fF]|{re.escape(one)})" if one == "/" else f"({re.escape(one)}|%{_any_case(f'{ord(one):02x}')})"
        for one in text
    )


def _any_case(digits: str) -> str:
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in digits)


def _is_ip(service: str) -> bool:
    try:
        ipaddress.ip_address(service.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return True


def _socket_address(service: str) -> str:
    host, port = host_and_port(service, "service")
    return f'socket_address: {{address: "{host.strip("[]")}", port_value: {port}}}'
