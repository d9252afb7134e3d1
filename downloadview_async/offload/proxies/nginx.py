"""nginx: X-Accel-Redirect with an internal URI.

See https://nginx.org/en/docs/http/ngx_http_core_module.html#internal.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.content_types import content_types
from downloadview_async.http.plan import ACTIVE_POLICY, SVG_POLICY
from downloadview_async.offload.base import ProxyKind, ProxyOption
from downloadview_async.offload.places import KEPT, Places, RateHeader, percent_encoded
from downloadview_async.offload.render import (
    LinkLocation,
    ProxySite,
    filled,
    host_and_port,
    log_line,
    quoted,
    socket_of,
    template,
)
from downloadview_async.offload.rules import Rule
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.object_store import ObjectStorage

NGINX_RATE = RateHeader("X-Accel-Limit-Rate")
_CHARSET = re.compile("[A-Za-z0-9_.:-]+")


class XAccelRedirect:
    """The backend for nginx and Caddy: X-Accel-Redirect with an internal URI, percent-encoded.

    For a file of another server, X-Accel-Redirect has the target of the rule, and X-Offload-Target the path and query
    that the proxy requests from that server. A proxy sends such a file only for a GET: HEAD is answered here.

    rules: their targets are URIs that begin and end with a slash: those of `internal` locations for nginx, those of
    `handle_path` in `handle_response` for Caddy. A source may be in an object store: `s3://BUCKET/PREFIX`.
    storages: the object stores of such sources. Only S3 is possible. Their keys sign the requests of the proxy, unless
    a storage has `skip_signature`.
    buffering, charset, expires ("off", or a number of seconds), limit_rate (bytes per second): how nginx handles this
    answer, see https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_ignore_headers. None leaves it to
    nginx's configuration. Caddy has none of these.
    limits_rate: whether the proxy takes the rate of `Limits` for each answer, as nginx does, and Caddy does not.

    Raises `ConfigurationError` for a target or an option that nginx would refuse, and for a store without a key.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        storages: Iterable[ObjectStorage] = (),
        buffering: bool | None = None,
        charset: str | None = None,
        expires: int | Literal["off"] | None = None,
        limit_rate: int | None = None,
        limits_rate: bool = True,
    ) -> None:
        self._places = Places(rules, storages)
        self._limits_rate = limits_rate
        self._options: dict[str, str] = {}
        self._kept = lru_cache(KEPT)(self._headers)
        if buffering is not None:
            self._options["x-accel-buffering"] = "yes" if buffering else "no"
        if charset is not None:
            if not _CHARSET.fullmatch(charset):
                raise ConfigurationError(f"charset is {charset!r}, which is not a charset: write one such as utf-8")
            self._options["x-accel-charset"] = charset
        if expires is not None:
            if expires != "off" and not _is_natural(expires):
                raise ConfigurationError(f"expires has to be a number of seconds or 'off', not {expires!r}")
            self._options["x-accel-expires"] = str(expires)
        if limit_rate is not None:
            if not _is_natural(limit_rate):
                raise ConfigurationError(
                    f"limit_rate has to be a number of bytes per second, 0 for no limit, not {limit_rate!r}"
                )
            self._options["x-accel-limit-rate"] = str(limit_rate)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-Accel-Redirect and the options, or None for a file that no rule covers: send it yourself."""
        location = file.location
        return None if location is None else self._kept(location)

    def rated(self, headers: Mapping[str, str], rate: int) -> Mapping[str, str]:
        """Return the headers with a rate in bytes per second, if the proxy can limit it."""
        return NGINX_RATE.added_to(headers, rate) if self._limits_rate else headers

    async def signed(self, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with a signed X-Offload-Target if a store has the file. Raises `SourceUnavailable`."""
        return await self._places.signed(file, headers)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        order = self._places.order("x-accel-redirect", location)
        return None if order is None else MappingProxyType(order | self._options)


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_MAP = """\
    # The request target below the prefix, as the client spelled it.
    map $request_uri $below {
        "~^<<prefix>>(?<below_prefix>/.*)" $below_prefix;
    }
"""
_PASS = """\
            proxy_pass http://service;  # without a path: the request target goes on as the client spelled it"""
_PASS_BELOW = """\
            if ($below = "") {
                return 404;
            }
            proxy_pass http://service$below;"""


_HASH = """\
        # Requests for one path go to one replica, so that a file is fetched into the cache of one replica only. It is
        # the decoded path without the query: two signed links to one file meet there. nginx does not bound the load of
        # a replica: all clients of one file are served by one, however many they are. HAProxy and Envoy bound it.
        hash $uri consistent;
"""
_RETRIES = """\
            # If a replica cannot be reached, ends without an answer, or begins none within `proxy_read_timeout`,
            # another one is asked. nginx repeats only requests that may be repeated, such as GET and HEAD, and no
            # POST that it has sent.
            proxy_next_upstream error timeout;
            proxy_next_upstream_tries 3;

"""
_PRIVATE = """\
        # Pages of the application that are not for clients.
        location ~ "<<refused>>" {
            default_type text/plain;
            add_header X-Content-Type-Options nosniff always;
            return 404 "Not Found";
        }

"""
_TLS = """\
            proxy_ssl_server_name on;
            proxy_ssl_name <<host>>;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate /etc/ssl/certs/ca-certificates.crt;
"""
_LOG = """\
    # By this the service counts what nginx has sent. To rotate it, rename it, and send nginx the signal USR1.
    log_format downloads escape=json '<<line>>';
    access_log <<path>> downloads;
"""
_LINE = log_line(
    method="$request_method",
    request_id="$sent_http_x_request_id",
    status="$status",
    sent="$body_bytes_sent",
    content_range="$sent_http_content_range",
    requested="$http_range",
    uuid="$request_id",
)
_ADD = """\
            add_header <<header>> $<<value>> always;
"""
_SET = """\
            set $<<variable>> $<<value>>;
"""
_HIDE = """\
            proxy_hide_header <<header>>;
"""


_LINK_MAPS = """\
    # For links that nginx verifies: the address of the client, if the link is for one, the name in the path, and the
    # secret of the key. The secrets are not in this file. Write them into a file beside it that only nginx can read:
    #   (umask 077; downloadview config nginx --link-secrets > downloadview-links.conf)
    map $args $link_client {
        "~&client=1$" $remote_addr;
    }
    map $request_path $link_name {
        "~/(?<link_name_alone>[^/]*)$" $link_name_alone;
    }
    include downloadview-links.conf;

"""
_LINK_POLICY = """\
    # A file that is shown inline and could contain scripts: none of them runs.
    map $sent_http_content_type $link_policy {
        default "<<active>>";
        "~^image/svg[+]xml" "<<svg>>";
        "~^(audio|font|image|video)/(?!.*[+]xml)" "";
        "~^(text/plain|text/csv|application/json|application/octet-stream)(;|$)" "";
    }
"""
_LINK_ERRORS = """\
        location @link_invalid {
            default_type text/plain;
            add_header X-Content-Type-Options nosniff always;
            add_header Cache-Control "private, no-store" always;
            return 403 "Forbidden";
        }

        location @link_expired {
            default_type text/plain;
            add_header X-Content-Type-Options nosniff always;
            add_header Cache-Control "private, no-store" always;
            return 410 "Gone";
        }

"""
_LINK_HEADER = """\
            add_header <<name>> <<value>> always;
"""


_IN_TEMPLATES = frozenset(
    {
        "access-control-allow-credentials",
        "access-control-allow-origin",
        "access-control-expose-headers",
        "age",
        "cache-control",
        "content-language",
        "content-security-policy",
        "expires",
        "set-cookie",
        "vary",
        "x-content-type-options",
    }
)
"""Headers that nginx keeps beside X-Accel-Redirect, and those that the templates add in any case."""


def _configuration(site: ProxySite) -> str:
    headers = [header for header in site.headers if header.lower() not in _IN_TEMPLATES]
    blocks = [
        template(
            "nginx-files.conf",
            target=rule.target,
            directory=_word(site.seen(rule.source)[1] or "./"),
            headers="".join(filled(_ADD, header=header, value=_upstream(header)) for header in headers),
        )
        for rule in site.rules
    ]
    blocks += [
        template(
            "nginx-remote.conf",
            name=remote.name,
            target=remote.target,
            scheme=remote.scheme,
            host=remote.authority,
            tls=filled(_TLS, host=remote.host) if remote.scheme == "https" else "",
            set_headers="".join(
                filled(_SET, variable=f"{remote.name}_header{number}", value=_upstream(header))
                for number, header in enumerate(headers, 1)
            ),
            hide_headers="".join(filled(_HIDE, header=header) for header in headers),
            headers="".join(
                filled(_ADD, header=header, value=f"{remote.name}_header{number}")
                for number, header in enumerate(headers, 1)
            ),
        )
        for remote in site.remotes
    ]
    upstreams = [
        template("nginx-remote-upstream.conf", name=remote.name, address=f"{remote.host}:{remote.port}")
        for remote in site.remotes
    ]
    shows_inline = any(not location.attachment for location in site.links)
    policy = filled(_LINK_POLICY, active=ACTIVE_POLICY, svg=SVG_POLICY) if shows_inline else ""
    return template(
        "nginx.conf",
        link_maps=policy + _LINK_MAPS if site.links else "",
        links="".join(_links(site, location) for location in site.links),
        link_errors=_LINK_ERRORS if site.links else "",
        log=filled(_LOG, path=site.log, line=_LINE) if site.log else "",
        below=filled(_MAP, prefix=re.escape(site.prefix)) if site.prefix else "",
        max_body=f"{site.max_body // 1024}k" if site.max_body % 1024 == 0 else str(site.max_body),
        stall=f"{site.stall}s",
        hash=_HASH if site.further else "",
        servers="\n".join(f"        server {_place(service)};" for service in site.services),
        retries=_RETRIES if site.further else "",
        idle=f"{site.idle}s",
        listen=f"{site.host}:{site.port}",
        proxy_pass=_PASS_BELOW if site.prefix else _PASS,
        private=filled(_PRIVATE, refused=site.refused) if site.private else "",
        upstreams="".join(upstreams),
        rules="\n".join(blocks).rstrip("\n"),
    )


def _place(service: str) -> str:
    if (path := socket_of(service)) is not None:
        return f"unix:{path}"
    host, port = host_and_port(service, "service")
    return f"{host}:{port}"


def _links(site: ProxySite, location: LinkLocation) -> str:
    headers = "" if location.attachment else filled(_LINK_HEADER, name="Content-Security-Policy", value="$link_policy")
    for name, value in location.headers.items():
        if "$" in value:
            raise ConfigurationError(f"{name}: nginx cannot send the $ in {value!r}: remove it")
        headers += filled(_LINK_HEADER, name=name, value=quoted(value))
    suffixes: dict[str, list[str]] = {}
    for suffix, content_type in content_types().items():
        suffixes.setdefault(content_type, []).append(suffix.removeprefix("."))
    return template(
        "nginx-links.conf",
        prefix=_word(location.prefix),
        hidden="|".join(
            ["/$", *(f"(?s)^.{{{len(location.prefix.encode())}}}(.*/)?{_pattern(one)}(/|$)" for one in location.hide)]
        ),
        directory=_word(site.seen(location.directory)[1] or "./"),
        symlinks="" if location.follows_symlinks else "            disable_symlinks on from=$document_root;\n",
        types="".join(
            f"                {_word(content_type)} {' '.join(sorted(each))};\n"
            for content_type, each in sorted(suffixes.items())
        ),
        disposition="attachment" if location.attachment else "inline",
        headers=headers,
    )


def _pattern(pattern: str) -> str:
    """Return a regular expression for a pattern of `hide`. Raises `ConfigurationError` for one that it cannot have."""
    if not re.fullmatch(r"[\w.*? ~@+-]+", pattern):
        raise ConfigurationError(
            f"nginx cannot hide {pattern!r}: use letters, digits, spaces, *, ?, ., _, ~, @, + and -"
        )
    return re.sub("[^\\w -]", lambda match: {"*": "[^/]*", "?": "[^/]"}.get(match[0], f"[{match[0]}]"), pattern)


def _upstream(header: str) -> str:
    """Return the name of nginx's variable for a header of the service. Raises `ConfigurationError` if it has none."""
    if not re.fullmatch("[A-Za-z0-9-]+", header):
        raise ConfigurationError(f"{header!r}: nginx has no variable for this header: use letters, digits and hyphens")
    return f"upstream_http_{header.lower().replace('-', '_')}"


def _word(text: str) -> str:
    if "$" in text:
        raise ConfigurationError(f"{text!r}: a path in nginx's configuration cannot have a $: use another name")
    return text if re.fullmatch("[A-Za-z0-9_./:-]+", text) else quoted(text)


NGINX = ProxyKind(
    name="nginx",
    title="nginx",
    header="X-Accel-Redirect",
    controls=("x-accel-buffering", "x-accel-charset", "x-accel-expires", "x-accel-limit-rate"),
    rate_header=NGINX_RATE,
    targets="uri",
    encode=percent_encoded,
    backend=XAccelRedirect,
    options={
        "buffering": ProxyOption(bool, takes="true or false"),
        "charset": ProxyOption(str, takes="a charset, such as utf-8"),
        "expires": ProxyOption(int | Literal["off"], takes='a number of seconds, or "off"'),
        "limit_rate": ProxyOption(int, takes="bytes per second, 0 for no limit", at_least=0),
    },
    fetches_urls=True,
    hides_targets=True,
    balances=True,
    verifies_links=True,
    configuration=_configuration,
    remedies={
        "not obeyed": "remove `proxy_ignore_headers X-Accel-Redirect;` and `proxy_pass_header X-Accel-Redirect;` from "
        "the location with `proxy_pass`",
        "leaked": "`proxy_hide_header <header>;` in the location with `proxy_pass`",
        "not found": "`location <target> { internal; alias <directory>/; }`: alias and not root, the directory as "
        "nginx sees it, both slashes, and readable for its user",
        "other bytes": "`alias <directory>/;` in location <target>, and no `rewrite` of what X-Accel-Redirect says",
        "open": "`internal;` in `location <target>`, with a slash at both ends of it and at the end of alias",
        "unreached": "`proxy_pass <service>;`",
        "request line": "`large_client_header_buffers 4 16k;` in the server",
        "fields": "`proxy_buffer_size 32k;` and `proxy_buffers 8 32k;` in the location with `proxy_pass`",
        "not passed on": "`proxy_pass <service>;` in `location /`, for all paths of the service",
        "decoded": "`proxy_pass <service>;` without a slash or path after the port, and no `rewrite`: the path goes "
        "on as the client spelled it",
        "header": "`add_header <header> $upstream_http_<variable> always;` in location <target>, and no other "
        "add_header, expires or proxy_hide_header for it",
        "header of the site": 'repeat `add_header <header> "<value>" always;` of the server in location <target>: a '
        "location with an add_header inherits none",
        "fetched header": "`set $service_header $upstream_http_<variable>;`, `proxy_hide_header <header>;` and "
        "`add_header <header> $service_header always;` in `location = <target>`",
        "streamed header": "no add_header, expires or proxy_hide_header for <header> in the location with proxy_pass",
        "ranges": "no `max_ranges 0;` in location <target>; `gzip off;` there",
        "streamed ranges": "no `proxy_set_header Range` or `proxy_set_header If-Range`, no proxy_cache, and `gzip "
        "off;`",
        "conditions": "`if_modified_since before;`, no `etag off;` and no `add_header` of ETag or Last-Modified in "
        "location <target>",
        "streamed conditions": "no `proxy_set_header If-None-Match` or `proxy_set_header If-Modified-Since`, and no "
        "proxy_cache",
        "fetched ranges": "`proxy_set_header Range ...;`, and If-Match and If-Unmodified-Since for If-Range, in "
        "`location = <target>` as `downloadview config nginx` prints them",
        "fetched conditions": "`proxy_set_header If-None-Match $http_if_none_match;` and `proxy_set_header "
        "If-Modified-Since $http_if_modified_since;` in `location = <target>`, and ETag and Last-Modified not hidden",
        "header of a store": "`proxy_hide_header <header>;` in `location = <target>`",
        "encoded": "`gzip off;` (and no brotli or zstd) where files are sent",
        "order": '`proxy_set_header X-Accel-Redirect "";`, likewise X-Accel-Mapping, X-Sendfile and X-Sendfile-Type',
    },
)
