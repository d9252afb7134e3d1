"""Caddy: X-Accel-Redirect, which its configuration has to handle.

See https://caddyserver.com/docs/caddyfile/directives/reverse_proxy#intercepting-responses.
"""

import itertools
import re
from functools import partial

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.places import percent_encoded
from downloadview_async.offload.proxies.nginx import XAccelRedirect
from downloadview_async.offload.render import ProxySite, filled, quoted, template

_PLAIN = re.compile("[A-Za-z0-9_./-]+")

_OUTSIDE = """\
\t@outside not path <<prefix>>/*
\troute {
\t\terror @outside 404
\t\turi strip_prefix <<prefix>>
\t}

"""
_PRIVATE = """\
\t# Pages of the application that are not for clients.
\t@private {
\t\tpath <<prefix>><<private>>*
<<public>>\t}
\troute {
\t\terror @private 404
\t}

"""
_LOG = """\
\t# By this the service counts what Caddy has sent. Caddy rotates it. `mode` needs Caddy 2.9.
\tlog_append request_id {http.response.header.X-Request-Id}
\tlog_append method {http.request.method}
\tlog_append content_range {http.response.header.Content-Range}
\tlog_append range {http.request.header.Range}
\tlog downloads {
\t\toutput file <<path>> {
\t\t\tmode 644
\t\t\troll_uncompressed
\t\t}
\t\tformat filter {
\t\t\twrap json
\t\t\trequest delete
\t\t\tresp_headers delete
\t\t\tsize rename bytes
\t\t}
\t}
"""
_PUBLIC = "\t\tnot path <<paths>>\n"


def _configuration(site: ProxySite) -> str:
    folded = sorted(rule.target.lower() for rule in site.rules)
    for target, other in itertools.pairwise(folded):
        if other.startswith(target):
            raise ConfigurationError(
                f"the target {other!r} is equal to or below {target!r}, since Caddy ignores case: choose another name"
            )
    blocks = [
        template("Caddyfile-files", target=rule.target, directory=_word(site.seen(rule.source)[1] or "./"))
        for rule in site.rules
    ]
    remotes = [
        template(
            "Caddyfile-remote",
            name=remote.name,
            target=remote.target,
            origin=f"{remote.scheme}://{remote.authority}",
            host=remote.authority,
        )
        for remote in site.remotes
    ]
    public = " ".join(f"{site.prefix}{site.private}{name}" for name in site.public)
    return template(
        "Caddyfile",
        host=site.host.strip("[]"),
        port=str(site.port),
        max_body=str(site.max_body),
        log=filled(_LOG, path=site.log) if site.log else "",
        private=filled(
            _PRIVATE,
            prefix=site.prefix,
            private=site.private,
            public=filled(_PUBLIC, paths=public) if public else "",
        )
        if site.private
        else "",
        outside=filled(_OUTSIDE, prefix=site.prefix) if site.prefix else "",
        service=f"unix/{site.socket}" if site.socket else site.authority,
        idle=f"{site.idle}s",
        remotes="".join(remotes),
        rules="".join(blocks).rstrip("\n"),
    )


def _word(path: str) -> str:
    if _PLAIN.fullmatch(path):
        return path
    if "{" in path or "}" in path:
        raise ConfigurationError(f"{path!r}: a path in Caddy's configuration cannot have braces: use another name")
    if "`" not in path:
        return f"`{path}`"  # no character is special between backticks
    if "\\" in path:
        raise ConfigurationError(
            f"{path!r}: a path in Caddy's configuration cannot have both a backslash and a backtick: use another name"
        )
    return quoted(path)


CADDY = ProxyKind(
    name="caddy",
    title="Caddy",
    header="X-Accel-Redirect",
    targets="uri",
    encode=percent_encoded,
    backend=partial(XAccelRedirect, limits_rate=False),
    fetches_urls=True,
    folds_case=True,
    configuration=_configuration,
    remedies={
        "not obeyed": "in reverse_proxy, `@offloaded header X-Accel-Redirect *` and `handle_response @offloaded { "
        "rewrite * {rp.header.X-Accel-Redirect} ... handle_path <target>* { root <directory> ... file_server } }`",
        "leaked": "`copy_response_headers { exclude Connection Content-Length Date Server <header> }`",
        "not found": "`handle_path <target>* { root <directory> ... file_server }` in handle_response: the directory "
        "as Caddy sees it, readable for its user",
        "other bytes": "`root <directory>` in handle_path <target>*, and `rewrite * {rp.header.X-Accel-Redirect}` "
        "alone",
        "open": "move `handle_path <target>*` into `handle_response @offloaded { ... }`",
        "unreached": "`reverse_proxy <service> { ... }`",
        "not passed on": "`reverse_proxy <service>`, for all paths of the service",
        "decoded": "no `uri` or `rewrite` before reverse_proxy",
        "header": "`copy_response_headers { exclude Connection Content-Length Date Server X-Accel-Redirect }` in "
        "handle_response, and no `header` directive for <header>",
        "streamed header": "no `header` or `header_down` directive for <header>",
        "ranges": "no `request_header -Range` but for HEAD, and no `encode`",
        "streamed ranges": "no `request_header -Range` or `header_up -Range`, and no `encode`",
        "conditions": "`copy_response_headers` in handle_response, and no `request_header` or `header` for validators",
        "fetched ranges": "`header_up {range} {header.Range}` and `header_up {if_range} {header.If-Range}` for "
        "<target>, as `downloadview config caddy` prints them",
        "fetched conditions": "`header_up {if_none_match} {header.If-None-Match}` and likewise If-Modified-Since for "
        "<target>; ETag and Last-Modified in `copy_response_headers`",
        "header of a store": "`header_down -<header>` in the reverse_proxy of <target>",
        "encoded": "no `encode` for files",
        "order": "`request_header -X-Accel-Redirect`, likewise X-Accel-Mapping, X-Sendfile and X-Sendfile-Type",
    },
)
