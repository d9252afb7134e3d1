"""Remedies that `downloadview check` prints for a misconfigured proxy: those of its `ProxyKind`, or general ones."""

from collections.abc import Mapping

from downloadview_async import proxy_kinds

PROBLEMS: Mapping[str, str] = {
    # the offload header reaches the client, or the answer has no body: nothing has sent the file
    "not obeyed": "find what removes the bytes from the answers of <service>",
    # the client gets the file and also the offload header
    "leaked": "configure the proxy to remove <header> from answers",
    # the proxy answers 403 or 404 for a file that exists
    "not found": "make <directory> visible to the proxy, and readable for the proxy's user",
    "not fetched": "compare the configuration of <target> with `downloadview config`, and check that the proxy "
    "reaches the server of <directory>",
    "unreadable": "run `chmod <mode> <path>`, or give the proxy's user read access in another way",
    "unreadable in the cache": "not every user may read <path>: run `chgrp -R GROUP <directory>` with a group of the "
    "proxy's user, and `chmod 2750 <directory>`; or start the service with the umask 022, and run "
    "`chmod -R o+rX <directory>`",
    "other bytes": "check that the proxy forwards to the service at <service>, and does not cache answers",
    "open": "check that only the service answers there",
    "unreached": "check that the service runs, and that the proxy forwards to it at <service>",
    # the request line holds a long, percent-encoded name
    "request line": "allow request lines of 16 KiB in the proxy",
    # the offload header holds a long name
    "fields": "allow header fields of 16 KiB from the service in the proxy",
    "not passed on": "forward all paths of the service to <service>",
    "decoded": "forward the path exactly as the client sent it",
    "header": "configure the proxy to pass on <header> unchanged, and to send it once",
    "streamed header": "configure the proxy to pass on <header> unchanged, and to send it once",
    "header of the site": "configure the proxy to send <header> with files, too",
    "ranges": "configure the proxy to pass on Range and If-Range, and to compress nothing",
    "streamed ranges": "configure the proxy to pass on Range and If-Range, and to compress nothing",
    "conditions": "configure the proxy to pass on If-None-Match, If-Modified-Since, ETag and Last-Modified",
    "streamed conditions": "configure the proxy to pass on If-None-Match, If-Modified-Since, ETag and Last-Modified",
    # the same for files that the proxy fetches by URL
    "fetched ranges": "configure the proxy to pass on Range and If-Range to the server of <directory>",
    "fetched conditions": "configure the proxy to pass on conditional headers to the server of <directory>, and "
    "ETag and Last-Modified to the client",
    "fetched header": "configure the proxy to pass on <header> of the service unchanged, and to send it once, and to "
    "drop <header> of the server of <directory>",
    "header of a store": "configure the proxy to remove <header> from answers",
    "redirect": "set [sources.<name>.presign] public_endpoint to the URL at which clients reach the store; a proxy in "
    "front of the store must not change the host, the path or the query, because they are signed",
    "edge": "compare [sources.<name>.edge] with the configuration of the edge: url, the key, expires and origin; a "
    "proxy in front of it must not change the host, the path or the query, because they are signed",
    "encoded": "configure the proxy to compress nothing that is a file",
    "preflight": "configure the proxy to pass OPTIONS on to <service>, and its answer to the client unchanged",
    "order": "configure the proxy to remove X-Accel-* and X-Sendfile* from requests",
    "cookie": "find out what sets the cookie: the service does not",
}
"""The general remedy for each problem, for proxies of unknown kind and those whose `ProxyKind.remedies` lacks it."""

SOCKET = "socket"
"""A problem with no general remedy: GET gives the file, but HEAD gives 404, or a resumed download gives 502."""


def remedies_of(backend: str | None) -> Mapping[str, str]:
    """Return the remedies of a kind of proxy by problem: an empty mapping for an unknown kind."""
    kind = proxy_kinds().get(backend or "")
    return {} if kind is None else kind.remedies


def advice(problem: str, backend: str | None, **facts: str) -> str:
    """Return the remedy for a problem behind a kind of proxy, with each `<name>` replaced by its value in `facts`."""
    text = remedies_of(backend).get(problem) or PROBLEMS[problem]
    for name, value in facts.items():
        text = text.replace(f"<{name}>", value)
    return text
