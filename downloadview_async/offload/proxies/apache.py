"""Apache with mod_xsendfile: X-Sendfile with an absolute path. See https://tn123.org/mod_xsendfile/."""

import re
from collections.abc import Iterable
from typing import Literal

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.base import ProxyKind, ProxyOption
from downloadview_async.offload.places import LocalFiles, RateHeader, percent_encoded, raw
from downloadview_async.offload.render import (
    OF_ERRORS,
    ProxySite,
    directories,
    escaped,
    filled,
    literal,
    log_line,
    quoted,
    template,
)
from downloadview_async.offload.rules import Rule

LIGHTTPD_RATE = RateHeader("X-LIGHTTPD-KBytes-per-second", 1024)
ENCODING = ProxyOption(
    Literal["raw", "percent"], takes="raw or percent", default="raw", lacking="no choice of encodings"
)
"""How X-Sendfile is read: raw by mod_xsendfile before 1.0, percent-decoded by mod_xsendfile 1.0 and lighttpd."""


class XSendfile(LocalFiles):
    """The backend for Apache with mod_xsendfile and for lighttpd: X-Sendfile with an absolute path.

    rules: their targets are directories as the proxy sees them.
    encoding: "raw" for mod_xsendfile before 1.0, which takes the bytes of the path as they are. "percent" for
    mod_xsendfile 1.0 and lighttpd, which percent-decode the path.
    limits_rate: whether the proxy is lighttpd, which takes the rate of `Limits` for each answer. Apache does not.

    Raises `ConfigurationError` for a target that is not an absolute directory, and for an unknown encoding.
    """

    def __init__(
        self, rules: Iterable[Rule], *, encoding: Literal["raw", "percent"], limits_rate: bool = False
    ) -> None:
        if encoding not in ("raw", "percent"):
            raise ConfigurationError(f"encoding has to be 'raw' (Apache) or 'percent' (lighttpd), not {encoding!r}")
        super().__init__(
            rules,
            title="X-Sendfile",
            header="x-sendfile",
            targets="directory",
            encode=raw if encoding == "raw" else percent_encoded,
            rate_header=LIGHTTPD_RATE if limits_rate else None,
        )


_OUTSIDE = """
<LocationMatch "^(?!<<prefix>>/)">
    Require all denied
</LocationMatch>"""

_PRIVATE = """
# Pages of the application that are not for clients.
<LocationMatch "<<refused>>">
    RedirectMatch 404 ".*"
</LocationMatch>"""
_OF_ERRORS = """\
# Apache's own 404 and 416 have nothing of the service's answer. A note keeps what a script of another site needs to
# read their status.
<<lines>>"""
_ALWAYS = """\
Header note <<header>> downloadview-<<header>>
Header always set <<header>> "expr=%{note:downloadview-<<header>>}" "expr=-n note('downloadview-<<header>>')"
"""
_LOG = """\
<IfModule !logio_module>
    LoadModule logio_module ${modules}/mod_logio.so
</IfModule>
# By this the service counts what Apache has sent. To rotate it, rename it, and restart Apache gracefully.
LogFormat <<line>> downloads
CustomLog <<path>> downloads
"""
_LINE = log_line(
    method="%m",
    request_id="%{X-Request-Id}o",
    status="%>s",
    sent="%O",  # with the head of the answer, but %B has the whole file even if the client has left
    connection="%X",
    content_range="%{Content-Range}o",
    requested="%{Range}i",
)


def _configuration(site: ProxySite) -> str:
    wanted = {header.lower() for header in site.headers}
    always = "".join(filled(_ALWAYS, header=header) for header in OF_ERRORS if header.lower() in wanted)
    return template(
        "httpd.conf",
        listen=f"{site.host}:{site.port}",
        stall=str(site.stall),
        max_body=str(site.max_body),
        prefix=site.prefix,
        log=filled(_LOG, path=site.log, line=quoted(_LINE)) if site.log else "",
        service=f"unix:{site.socket}|http://localhost" if site.socket else f"http://{site.authority}",
        idle=str(site.idle),
        outside=filled(_OUTSIDE, prefix=re.escape(site.prefix)) if site.prefix else "",
        private=filled(_PRIVATE, refused=_with_encoded_slashes(site)) if site.private else "",
        headers=filled(_OF_ERRORS, lines=always) if always else "",
        rules="\n".join(f"XSendFilePath {_word(site, path)}" for path in directories(site)),
    )


def _with_encoded_slashes(site: ProxySite) -> str:
    """Return `refused` for Apache, which leaves %2F in the path as it is, where the application reads a slash."""
    before, after = f"^{literal(site.prefix)}/", site.refused.partition(literal(site.private))[2]
    return before + literal(site.private[1:]).replace("/", "(?:/|%2[Ff])") + after


def _word(site: ProxySite, directory: str) -> str:
    relative, path = site.seen(directory)
    if "${" in path:
        raise ConfigurationError(f"{path!r}: a path in Apache's configuration cannot have ${{: use another name")
    return f'"${{PWD}}/{escaped(path)}"' if relative else quoted(path)


APACHE = ProxyKind(
    name="apache",
    title="Apache",
    header="X-Sendfile",
    targets="directory",
    encode=raw,
    backend=XSendfile,
    options={"encoding": ENCODING},
    configuration=_configuration,
    remedies={
        "not obeyed": "`LoadModule xsendfile_module modules/mod_xsendfile.so`, `XSendFile On` and `XSendFilePath "
        '"<directory>"`',
        "leaked": "`Header unset <header>`",
        "not found": '`XSendFilePath "<directory>"`: the directory as Apache sees it, readable for its user',
        "other bytes": '`encoding = "raw"` in [offload] for mod_xsendfile 0.12, `encoding = "percent"` for 1.0',
        "open": "no DocumentRoot, Alias or ProxyPass exception that leads to <directory>",
        "unreached": "`ProxyPass / <service>/ nocanon`",
        "request line": "`LimitRequestLine 16384` in the server, before any <VirtualHost>",
        "fields": "`responsefieldsize=16384` in ProxyPass",
        "not passed on": "`ProxyPass / <service>/ nocanon`, for all paths of the service",
        "decoded": "`AllowEncodedSlashes NoDecode` and `ProxyPass / <service>/ nocanon`",
        "header": "no `Header set`, `Header unset` or ExpiresActive for <header>",
        "streamed header": "no `Header set`, `Header unset` or ExpiresActive for <header>",
        "ranges": "no `RequestHeader unset Range` but for HEAD, and no `MaxRanges none`",
        "streamed ranges": "no `RequestHeader unset` of Range or If-Range",
        "conditions": "no `RequestHeader unset If-None-Match`, `Header unset ETag` or `FileETag None`",
        "encoded": "`SetEnv no-gzip 1`, and no DEFLATE or BROTLI filter for files",
        "order": "`RequestHeader unset X-Sendfile early`, likewise X-Accel-Redirect, X-Accel-Mapping, X-Sendfile-Type",
    },
)
