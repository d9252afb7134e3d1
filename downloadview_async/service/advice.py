"""What mends a proxy that `downloadview check` finds misconfigured: lines of its own configuration, by its kind.

Sources: https://nginx.org/en/docs/http/ngx_http_core_module.html, .../ngx_http_proxy_module.html,
https://tn123.org/mod_xsendfile/, https://redmine.lighttpd.net/projects/lighttpd/wiki/mod_proxy,
https://caddyserver.com/docs/caddyfile/directives/reverse_proxy, https://h2o.examp1e.net/configure/reproxy_directives.html.
"""

from collections.abc import Mapping

_ADVICE: Mapping[str, Mapping[str, str]] = {
    # an order that reaches the client, or none of the two: nobody has sent the file
    "not obeyed": {
        "nginx": "remove `proxy_ignore_headers X-Accel-Redirect;` and `proxy_pass_header X-Accel-Redirect;` from the "
        "location with `proxy_pass`",
        "apache": "`LoadModule xsendfile_module modules/mod_xsendfile.so`, `XSendFile On` and "
        '`XSendFilePath "<directory>"`',
        "lighttpd": '`"x-sendfile" => "enable"` and `"x-sendfile-docroot" => ("<directory>/")` in proxy.server',
        "caddy": "in reverse_proxy, `@offloaded header X-Accel-Redirect *` and `handle_response @offloaded { rewrite * "
        "{rp.header.X-Accel-Redirect} ... handle_path <target>* { root <directory> ... file_server } }`",
        "h2o": "`reproxy: ON` in the host",
        "": "see what takes the bytes from the answers of <service>",
        "litespeed": "LiteSpeed obeys X-LiteSpeed-Location of a proxied application only if it is enabled there",
    },
    # the file, and the order beside it
    "leaked": {
        "nginx": "`proxy_hide_header <header>;` in the location with `proxy_pass`",
        "apache": "`Header unset <header>`",
        "lighttpd": '`setenv.set-response-header = ("<header>" => "")`',
        "caddy": "`copy_response_headers { exclude Connection Content-Length Date Server <header> }`",
        "h2o": "`header.unset: <header>`",
        "": "let the proxy drop <header>",
    },
    # 403 or 404 of the proxy for a file that is there
    "not found": {
        "nginx": "`location <target> { internal; alias <directory>/; }`: alias and not root, the directory as nginx "
        "sees it, both slashes, and readable for its user",
        "apache": '`XSendFilePath "<directory>"`: the directory as Apache sees it, readable for its user',
        "lighttpd": '`"x-sendfile-docroot" => ("<directory>/")`: the directory as lighttpd sees it, readable for its '
        "user",
        "caddy": "`handle_path <target>* { root <directory> ... file_server }` in handle_response: the directory as "
        "Caddy sees it, readable for its user",
        "h2o": "`<target>:` with `file.dir: <directory>`: the directory as H2O sees it, readable for its user",
        "": "let the proxy find <directory>, and its user read what is in it",
        "litespeed": "a static context for the URI <target> at the location <directory>/, internal redirects only",
    },
    "not fetched": {
        "": "what is said of <target> by `downloadview config`, and that the proxy reaches the server of <directory>",
    },
    "unreadable": {"": "`chmod <mode> <path>`, or let the proxy's user read it in another way"},
    "unreadable in the cache": {
        "": "`chgrp -R GROUP <directory>` for a group of the proxy's user, and `chmod 2750 <directory>`; or the umask "
        "022 for the service, and `chmod -R o+rX <directory>`: not every user may read <path>",
    },
    "other bytes": {
        "nginx": "`alias <directory>/;` in location <target>, and no `rewrite` of what X-Accel-Redirect says",
        "apache": '`encoding = "raw"` in [offload] for mod_xsendfile 0.12, `encoding = "percent"` for 1.0',
        "lighttpd": '`encoding = "percent"` in [offload], which is the default for lighttpd',
        "caddy": "`root <directory>` in handle_path <target>*, and `rewrite * {rp.header.X-Accel-Redirect}` alone",
        "h2o": "`file.dir: <directory>` below `<target>:`",
        "": "see that the proxy asks the service at <service>, and keeps no answers of its own",
    },
    "open": {
        "nginx": "`internal;` in `location <target>`, with a slash at both ends of it and at the end of alias",
        "apache": "no DocumentRoot, Alias or ProxyPass exception that leads to <directory>",
        "lighttpd": '`proxy.server = ("" => ...)`, so that nothing is sent from server.document-root',
        "caddy": "move `handle_path <target>*` into `handle_response @offloaded { ... }`",
        "h2o": 'in `<target>:`, begin with a mruby.handler that answers 404 unless env["DOWNLOADVIEW_TARGET"] is set',
        "litespeed": "make the context <target> one for internal redirects only",
        "": "see that nothing but the service answers there",
    },
    "unreached": {
        "nginx": "`proxy_pass <service>;`",
        "apache": "`ProxyPass / <service>/ nocanon`",
        "lighttpd": 'host and port of `proxy.server = ("" => (("host" => ..., "port" => ...)))`: <service>',
        "caddy": "`reverse_proxy <service> { ... }`",
        "h2o": "`proxy.reverse.url: <service>/`",
        "": "see that the service runs, and that the proxy asks it at <service>",
    },
    # a long name, percent-encoded, in a request
    "request line": {
        "nginx": "`large_client_header_buffers 4 16k;` in the server",
        "apache": "`LimitRequestLine 16384` in the server, before any <VirtualHost>",
        "lighttpd": "`server.max-request-field-size = 32768`",
        "": "let the proxy take a request line of 16 KiB",
    },
    # and in the header that tells the proxy where the file is
    "fields": {
        "nginx": "`proxy_buffer_size 32k;` and `proxy_buffers 8 32k;` in the location with `proxy_pass`",
        "apache": "`responsefieldsize=16384` in ProxyPass",
        "": "let the proxy take header fields of 16 KiB from the service",
    },
    "not passed on": {
        "nginx": "`proxy_pass <service>;` in `location /`, for all paths of the service",
        "apache": "`ProxyPass / <service>/ nocanon`, for all paths of the service",
        "lighttpd": '`proxy.server = ("" => ...)`, for all paths of the service',
        "caddy": "`reverse_proxy <service>`, for all paths of the service",
        "h2o": "`proxy.reverse.url: <service>/` below `/:`",
        "": "pass all paths of the service on to <service>",
    },
    "decoded": {
        "nginx": "`proxy_pass <service>;` without a slash or path after the port, and no `rewrite`: the path goes on "
        "as the client spelled it",
        "apache": "`AllowEncodedSlashes NoDecode` and `ProxyPass / <service>/ nocanon`",
        "lighttpd": '`server.http-parseopts = ("url-path-2f-decode" => "disable")`',
        "caddy": "no `uri` or `rewrite` before reverse_proxy",
        "": "pass the path on as the client spelled it",
    },
    "header": {
        "nginx": "`add_header <header> $upstream_http_<variable> always;` in location <target>, and no "
        "other add_header, expires or proxy_hide_header for it",
        "apache": "no `Header set`, `Header unset` or ExpiresActive for <header>",
        "lighttpd": "no setenv.set-response-header or mimetype.assign for <header>",
        "caddy": "`copy_response_headers { exclude Connection Content-Length Date Server X-Accel-Redirect }` in "
        "handle_response, and no `header` directive for <header>",
        "h2o": "keep <header> among what the mruby.handler of `<target>:` passes on, and no header.set for it",
        "": "let the proxy pass <header> on as the service says it, once",
    },
    "streamed header": {
        "nginx": "no add_header, expires or proxy_hide_header for <header> in the location with proxy_pass",
        "apache": "no `Header set`, `Header unset` or ExpiresActive for <header>",
        "lighttpd": "no setenv.set-response-header for <header>",
        "caddy": "no `header` or `header_down` directive for <header>",
        "h2o": "no header.set or header.unset for <header>",
        "": "let the proxy pass <header> on as the service says it, once",
    },
    "ranges": {
        "nginx": "no `max_ranges 0;` in location <target>; `gzip off;` there",
        "apache": "no `RequestHeader unset Range` but for HEAD, and no `MaxRanges none`",
        "lighttpd": "`server.range-requests` has to be enabled, and Range not in setenv.set-request-header",
        "caddy": "no `request_header -Range` but for HEAD, and no `encode`",
        "h2o": "no proxy.header.unset of Range, and no `compress: ON`",
        "": "let the proxy pass Range and If-Range on, and compress nothing",
    },
    "streamed ranges": {
        "nginx": "no `proxy_set_header Range` or `proxy_set_header If-Range`, no proxy_cache, and `gzip off;`",
        "apache": "no `RequestHeader unset` of Range or If-Range",
        "lighttpd": "no Range or If-Range in setenv.set-request-header, and no deflate.mimetypes",
        "caddy": "no `request_header -Range` or `header_up -Range`, and no `encode`",
        "h2o": "no proxy.header.unset of Range or If-Range, and `compress: OFF`",
        "": "let the proxy pass Range and If-Range on, and compress nothing",
    },
    "conditions": {
        "nginx": "`if_modified_since before;`, no `etag off;` and no `add_header` of ETag or Last-Modified in location "
        "<target>",
        "apache": "no `RequestHeader unset If-None-Match`, `Header unset ETag` or `FileETag None`",
        "lighttpd": 'no If-None-Match or If-Modified-Since in setenv.set-request-header; `etag.use-mtime = "enable"`',
        "caddy": "`copy_response_headers` in handle_response, and no `request_header` or `header` for validators",
        "h2o": "`file.etag: OFF`, and the mruby.handler of `<target>:` as in deploy/h2o/h2o.conf",
        "": "let the proxy pass If-None-Match, If-Modified-Since, ETag and Last-Modified on",
    },
    "streamed conditions": {
        "nginx": "no `proxy_set_header If-None-Match` or `proxy_set_header If-Modified-Since`, and no proxy_cache",
        "": "let the proxy pass If-None-Match, If-Modified-Since, ETag and Last-Modified on",
    },
    # likewise of what the proxy fetches by a URL
    "fetched ranges": {
        "nginx": "`proxy_set_header Range ...;`, and If-Match and If-Unmodified-Since for If-Range, in `location = "
        "<target>` as `downloadview config nginx` prints them",
        "caddy": "`header_up {range} {header.Range}` and `header_up {if_range} {header.If-Range}` for <target>, as "
        "`downloadview config caddy` prints them",
        "": "let the proxy pass Range and If-Range on to the server of <directory>",
    },
    "fetched conditions": {
        "nginx": "`proxy_set_header If-None-Match $http_if_none_match;` and `proxy_set_header If-Modified-Since "
        "$http_if_modified_since;` in `location = <target>`, and ETag and Last-Modified not hidden",
        "caddy": "`header_up {if_none_match} {header.If-None-Match}` and likewise If-Modified-Since for <target>; ETag "
        "and Last-Modified in `copy_response_headers`",
        "": "let the proxy pass conditions on to the server of <directory>, and ETag and Last-Modified to the client",
    },
    "header of a store": {
        "nginx": "`proxy_hide_header <header>;` in `location = <target>`",
        "caddy": "`header_down -<header>` in the reverse_proxy of <target>",
        "": "let the proxy drop <header>",
    },
    # 404 of HEAD, and 502 of a resume, for a file that GET has brought
    "socket": {
        "": "`owner: nobody` beside `permission: 600` of H2O's own socket, where root starts it",
    },
    "redirect": {
        "": "[sources.<name>.presign] public_endpoint: the URL of the store as clients reach it; a proxy before the "
        "store has to pass the host, the path and the query on as they come, for they are signed",
    },
    "encoded": {
        "nginx": "`gzip off;` (and no brotli or zstd) where files are sent",
        "apache": "`SetEnv no-gzip 1`, and no DEFLATE or BROTLI filter for files",
        "lighttpd": "no deflate.mimetypes for files",
        "caddy": "no `encode` for files",
        "h2o": "`compress: OFF`",
        "": "let the proxy compress nothing that is a file",
    },
    "order": {
        "nginx": '`proxy_set_header X-Accel-Redirect "";`, likewise X-Accel-Mapping, X-Sendfile and X-Sendfile-Type',
        "apache": "`RequestHeader unset X-Sendfile early`, likewise X-Accel-Redirect, X-Accel-Mapping, X-Sendfile-Type",
        "lighttpd": '`setenv.set-request-header = ("X-Sendfile" => "", ...)`',
        "caddy": "`request_header -X-Accel-Redirect`, likewise X-Accel-Mapping, X-Sendfile and X-Sendfile-Type",
        "h2o": "`proxy.header.unset: X-Sendfile`, likewise X-Accel-Redirect, X-Accel-Mapping and X-Sendfile-Type",
        "": "let the proxy drop X-Accel-* and X-Sendfile* of clients",
    },
    "cookie": {"": "see who sets the cookie: the service sets none"},
}


def advice(problem: str, backend: str | None, **facts: str) -> str:
    """Return what mends a problem behind a proxy of this kind; each `<name>` in it is what `facts` says of the name."""
    lines = _ADVICE[problem]
    text = lines.get(backend or "") or lines[""]
    for name, value in facts.items():
        text = text.replace(f"<{name}>", value)
    return text
