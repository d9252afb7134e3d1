"""`proxy_config`: writes the configuration of a proxy for some rules."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from downloadview_async.errors import ConfigurationError, wrong_type
from downloadview_async.http.fields import OF_THE_CONNECTION, OF_THE_FILE, OFFLOAD_HEADERS, TOKEN_CHAR
from downloadview_async.offload.places import by_http
from downloadview_async.offload.proxies import proxy_kinds
from downloadview_async.offload.render import PORTS, LinkLocation, ProxySite, RemoteRule, host_and_port, socket_of
from downloadview_async.offload.rules import Rule, checked_rules
from downloadview_async.sources.object_store import ObjectStorage

_PREFIX = re.compile("(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)*")
_PRIVATE = re.compile("(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)+/")
_LOG = re.compile("/[A-Za-z0-9_./@-]*[A-Za-z0-9_@-]")
_HEADER = re.compile("[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
_UNSET = "X-Accel-Mapping"  # each template has a line that removes this header of a request
_PUBLIC = re.compile("[A-Za-z0-9_.~-]+")
_RESPONSE_HEADER = re.compile(f"{TOKEN_CHAR}{{1,64}}")
_NOT_ADDED = OF_THE_FILE | OF_THE_CONNECTION | {"date", "server"}


def proxy_config(
    proxy: str,
    rules: Iterable[Rule],
    *,
    storages: Iterable[ObjectStorage] = (),
    service: str | Sequence[str] = "127.0.0.1:8000",
    listen: str = "127.0.0.1:8080",
    prefix: str = "",
    relative_to: str | None = None,
    idle_seconds: float = 5,
    stall_seconds: float = 60,
    max_body_bytes: int = 16_384,
    private: str = "",
    public: Iterable[str] = (),
    unset: Iterable[str] = (),
    headers: Iterable[str] = (),
    links: Iterable[LinkLocation] = (),
    log: str = "",
) -> str:
    """Return a whole configuration: the proxy sends the files of the rules, and passes all else to the service.

    proxy: the name of one of `proxy_kinds` that has a configuration.
    rules, storages: those of the backend for this proxy.
    service: the address of the application: HOST:PORT, or unix:/PATH of a socket. Of several replicas, a list of their
    addresses: requests for one path go to one of them. Only nginx can do that; see also `balancer_config`.
    listen: the HOST:PORT on which the proxy listens. The configuration has no TLS: "TLS:" marks where to add it.
    prefix: the path below which the application is served, such as /downloads. The proxy removes it, and refuses
    requests for other paths.
    relative_to: an absolute directory, in which the proxy is started. Directories below it are written as relative
    paths. None: all paths are absolute.
    idle_seconds: how long the application keeps an idle connection, at least 2. The proxy keeps it one second less.
    stall_seconds: after so many seconds, a client that takes nothing is dropped. Caddy and H2O cannot do that.
    max_body_bytes: the longest body of a request.
    private: a path such as /-/, below which the application has pages that are not for clients: the proxy refuses them.
    public: names below `private` that the proxy passes on nevertheless, such as livez.
    unset: names of headers, such as X-Remote-User, that the proxy removes from the requests of clients.
    headers: names of further response headers that the application sets, such as X-Robots-Tag. A proxy that would lose
    them gets a line for each, which adds the application's value again.

    links: the paths below which nginx verifies links of the format `secure_link` and sends the files without the
    application. The configuration includes a file with the secrets: see `secure_link_secrets`.
    log: the absolute path of a file into which the proxy writes a line about each answer, for `ProxyLog`. The
    application has to send X-Request-Id with its answers: write this name in `headers`, too.

    Raises `ConfigurationError` for rules that the backend refuses, for two rules of which one's target is equal to or
    below the other's, for a header that describes the file or frames the answer, and for values that the proxy's
    configuration language cannot express.
    """
    kind = proxy_kinds().get(proxy)
    if kind is None or kind.configuration is None:
        known = ", ".join(name for name, other in proxy_kinds().items() if other.configuration is not None)
        raise ConfigurationError(f"there is no configuration for {proxy!r}: use one of {known}")
    services = (service,) if isinstance(service, str) else tuple(service)
    if len(services) != 1 and not kind.balances:
        raise ConfigurationError(
            f"{kind.title} cannot choose a replica by the path alone: give one service, and put a balancer in front of "
            "several, such as haproxy, envoy or nginx"
        )
    rules, storages = tuple(checked_rules(rules)), tuple(storages)
    kind.make_backend(rules, storages=storages)  # raises for rules that the backend would not take
    site = replace(
        checked_site(
            services,
            listen=listen,
            prefix=prefix,
            idle_seconds=idle_seconds,
            stall_seconds=stall_seconds,
            max_body_bytes=max_body_bytes,
            private=private,
            public=public,
        ),
        rules=tuple(rule for rule in rules if rule.source.startswith("/")),
        remotes=_remotes((rule for rule in rules if not rule.source.startswith("/")), storages),
        relative_to=None if relative_to is None else os.path.normpath(relative_to),
        headers=_checked_names(headers),
        links=tuple(links),
        log=log,
    )
    if log and not _LOG.fullmatch(log):
        raise ConfigurationError(
            f"{log!r} cannot be written into the configuration: give an absolute path of letters, digits and _.@/-, "
            "such as /var/log/nginx/downloads.log"
        )
    if site.links and not kind.verifies_links:
        raise ConfigurationError(f"{kind.title} cannot verify links: remove links, and let the application verify them")
    for link in site.links:
        if not isinstance(link, LinkLocation):
            raise wrong_type("links takes a list of LinkLocation(prefix='/files/', directory='/srv/files')", link)
        if not re.fullmatch("(/[^/]+)+/", link.prefix) or not link.directory.startswith("/"):
            raise ConfigurationError(
                f"links have the prefix {link.prefix!r} and the directory {link.directory!r}: give a path such as "
                "/files/, with a slash at both ends, and an absolute directory"
            )
    for rule in rules:
        if private and rule.target.startswith(f"{prefix}{private}") and kind.hides_targets:
            raise ConfigurationError(
                f"the target {rule.target!r} is below {prefix}{private}, where the proxy refuses requests: choose "
                "another target, such as /_files/"
            )
    return without_headers(kind.configuration(site), kind.title, unset)


def checked_site(
    services: Sequence[str],
    *,
    listen: str,
    prefix: str,
    idle_seconds: float,
    stall_seconds: float,
    private: str,
    public: Iterable[str],
    max_body_bytes: int = 16_384,
    bound: int = 0,
    probe: str = "/",
) -> ProxySite:
    """Return a site without rules. Raises `ConfigurationError` for values that no configuration can have."""
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"{prefix!r} is not a prefix: write a path such as /downloads, of letters, digits, _, ~, . and -"
        )
    if idle_seconds < 2:
        raise ConfigurationError(
            f"the application keeps an idle connection for {idle_seconds!r} seconds, which is too short for a proxy: "
            "let it keep them for 2 seconds or more"
        )
    if stall_seconds <= 0 or max_body_bytes <= 0:
        raise ConfigurationError("stall_seconds and max_body_bytes have to be more than 0")
    host, port = host_and_port(listen, "listen")
    public = tuple(public)
    if private and not (_PRIVATE.fullmatch(private) and all(map(_PUBLIC.fullmatch, public))):
        raise ConfigurationError(
            f"private is {private!r} and public is {public!r}: write a path such as /-/, and names such as livez"
        )
    if not services or len(set(services)) != len(services):
        raise ConfigurationError(f"the services are {', '.join(services) or 'none'}: give each address once")
    if len(services) > 1:
        for service in services:
            if socket_of(service) is None:
                host_and_port(service, "service")
    return ProxySite(
        rules=(),
        remotes=(),
        service=services[0],
        further=tuple(services[1:]),
        host=host,
        port=port,
        prefix=prefix,
        relative_to=None,
        idle=math.floor(idle_seconds) - 1,
        stall=math.ceil(stall_seconds),
        max_body=max_body_bytes,
        private=private,
        public=public,
        headers=(),
        bound=bound,
        probe=probe,
    )


def without_headers(text: str, title: str, unset: Iterable[str]) -> str:
    """Return a configuration that removes further headers of requests, in the way in which it removes `_UNSET`."""
    for name in unset:
        if not _HEADER.fullmatch(name):
            raise ConfigurationError(f"{name!r} is not the name of a header: write one such as X-Remote-User")
        text, count = re.subn(rf"^(.*)\b{_UNSET}\b(.*\n)", rf"\g<1>{name}\g<2>\g<0>", text, count=0, flags=re.MULTILINE)
        if not count:
            raise ConfigurationError(f"{title}'s configuration cannot remove the header {name}")
    return text


def _checked_names(headers: Iterable[str]) -> list[str]:
    """Return names of headers, each once. Raises `ConfigurationError` for a name that no configuration may add."""
    if isinstance(headers, str):
        raise ConfigurationError(f"headers is {headers!r}: write a list of names, such as ['X-Robots-Tag']")
    names: dict[str, str] = {}
    for name in headers:
        if not _RESPONSE_HEADER.fullmatch(name):
            raise ConfigurationError(f"{name!r} is not the name of a header: write one such as X-Robots-Tag")
        lower = name.lower()
        if lower in _NOT_ADDED or lower in OFFLOAD_HEADERS:
            raise ConfigurationError(
                f"{name} describes the file or the message, and the proxy sends its own: remove it from headers"
            )
        names.setdefault(lower, name)
    return list(names.values())


def _remotes(rules: Iterable[Rule], storages: Iterable[ObjectStorage]) -> list[RemoteRule]:
    remotes = []
    for number, rule in enumerate(rules):
        scheme, rest = by_http(rule, storages)[0].source.split("://")
        authority = rest.partition("/")[0]
        address = authority if re.search(":[0-9]+$", authority) else f"{authority}:{PORTS[scheme]}"
        host, port = host_and_port(address, f"the server of {rule.source!r}")
        remotes.append(RemoteRule(f"remote{number + 1 if number else ''}", rule.target, scheme, host, port))
    return remotes
