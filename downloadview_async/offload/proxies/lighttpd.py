"""lighttpd: X-Sendfile with an absolute path, which it percent-decodes.

See https://redmine.lighttpd.net/projects/lighttpd/wiki/X-LIGHTTPD-send-file.
"""

import math
import re
from dataclasses import replace
from functools import partial

from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.places import percent_encoded
from downloadview_async.offload.proxies.apache import ENCODING, LIGHTTPD_RATE, XSendfile
from downloadview_async.offload.render import ProxySite, directories, filled, log_line, quoted, template

_OUTSIDE = """\
$HTTP["url"] !~ "^<<prefix_pattern>>/" {
    url.access-deny = ("")
}
proxy.header = ("map-urlpath" => ("<<prefix>>/" => "/"))
"""
_PRIVATE = """\
# Pages of the application that are not for clients.
$HTTP["url"] =~ "<<refused>>" {
    url.access-deny = ("")
}
"""

_LOG = """\
# By this the service counts what lighttpd has sent. To rotate it, rename it, and send lighttpd the signal HUP.
accesslog.filename = "<<path>>"
accesslog.format = <<line>>

"""
_LINE = log_line(
    method="%m",
    request_id="%{X-Request-Id}o",
    status="%s",
    sent='"%B"',  # a dash for no bytes
    content_range="%{Content-Range}o",
    requested="%{Range}i",
)


def _configuration(site: ProxySite) -> str:
    paths = [_word(site, path) for path in directories(site)]
    if site.socket:
        service = f'    "host" => "{site.socket}",\n'
    else:
        host, port = site.address
        service = f'    "host" => "{host.strip("[]")}",\n    "port" => {port},\n'
    outside = filled(_OUTSIDE, prefix=site.prefix, prefix_pattern=re.escape(site.prefix))
    return template(
        "lighttpd.conf",
        modules='"mod_access", ' if site.prefix or site.private else "",
        private=filled(_PRIVATE, refused=site.refused) if site.private else "",
        modules_last=', "mod_accesslog"' if site.log else "",
        log=filled(_LOG, path=site.log, line=quoted(_LINE)) if site.log else "",
        host=site.host,
        port=str(site.port),
        root=paths[0],
        outside=outside if site.prefix else "",
        max_body=str(math.ceil(site.max_body / 1024)),
        stall=str(site.stall),
        service=service,
        rules=", ".join(paths),
    )


def _word(site: ProxySite, directory: str) -> str:
    relative, path = site.seen(directory)
    escaped = path.replace('"', '\\"')  # lighttpd takes a backslash as it is
    return f'env.PWD + "/{escaped}"' if relative else f'"{escaped}"'


LIGHTTPD = ProxyKind(
    name="lighttpd",
    title="lighttpd",
    header="X-Sendfile",
    further_orders=("x-sendfile2", "x-lighttpd-send-file"),
    targets="directory",
    encode=percent_encoded,
    controls=("x-lighttpd-kbytes-per-second",),
    rate_header=LIGHTTPD_RATE,
    backend=partial(XSendfile, limits_rate=True),
    options={"encoding": replace(ENCODING, default="percent")},
    has_bare_errors=True,
    configuration=_configuration,
    remedies={
        "not obeyed": '`"x-sendfile" => "enable"` and `"x-sendfile-docroot" => ("<directory>/")` in proxy.server',
        "leaked": '`setenv.set-response-header = ("<header>" => "")`',
        "not found": '`"x-sendfile-docroot" => ("<directory>/")`: the directory as lighttpd sees it, readable for its '
        "user",
        "other bytes": '`encoding = "percent"` in [offload], which is the default for lighttpd',
        "open": '`proxy.server = ("" => ...)`, so that nothing is sent from server.document-root',
        "unreached": 'host and port of `proxy.server = ("" => (("host" => ..., "port" => ...)))`: <service>',
        "request line": "`server.max-request-field-size = 32768`",
        "not passed on": '`proxy.server = ("" => ...)`, for all paths of the service',
        "decoded": '`server.http-parseopts = ("url-path-2f-decode" => "disable")`',
        "header": "no setenv.set-response-header or mimetype.assign for <header>",
        "streamed header": "no setenv.set-response-header for <header>",
        "ranges": "`server.range-requests` has to be enabled, and Range not in setenv.set-request-header",
        "streamed ranges": "no Range or If-Range in setenv.set-request-header, and no deflate.mimetypes",
        "conditions": 'no If-None-Match or If-Modified-Since in setenv.set-request-header; `etag.use-mtime = "enable"`',
        "encoded": "no deflate.mimetypes for files",
        "order": '`setenv.set-request-header = ("X-Sendfile" => "", ...)`',
    },
)
