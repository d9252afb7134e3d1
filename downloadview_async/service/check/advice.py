"""The advice of `downloadview check` about a misconfigured proxy: that of its `ProxyKind`, or one for any proxy."""

from collections.abc import Mapping

from downloadview_async import proxy_kinds

PROBLEMS: Mapping[str, str] = {
    # an order that reaches the client, or none of the two: nobody has sent the file
    "not obeyed": "see what takes the bytes from the answers of <service>",
    # the file, and the order beside it
    "leaked": "let the proxy drop <header>",
    # 403 or 404 of the proxy for a file that is there
    "not found": "let the proxy find <directory>, and its user read what is in it",
    "not fetched": "what is said of <target> by `downloadview config`, and that the proxy reaches the server of "
    "<directory>",
    "unreadable": "`chmod <mode> <path>`, or let the proxy's user read it in another way",
    "unreadable in the cache": "`chgrp -R GROUP <directory>` for a group of the proxy's user, and `chmod 2750 "
    "<directory>`; or the umask 022 for the service, and `chmod -R o+rX <directory>`: not every user may read <path>",
    "other bytes": "see that the proxy asks the service at <service>, and keeps no answers of its own",
    "open": "see that nothing but the service answers there",
    "unreached": "see that the service runs, and that the proxy asks it at <service>",
    # a long name, percent-encoded, in a request
    "request line": "let the proxy take a request line of 16 KiB",
    # and in the header that tells the proxy where the file is
    "fields": "let the proxy take header fields of 16 KiB from the service",
    "not passed on": "pass all paths of the service on to <service>",
    "decoded": "pass the path on as the client spelled it",
    "header": "let the proxy pass <header> on as the service says it, once",
    "streamed header": "let the proxy pass <header> on as the service says it, once",
    "ranges": "let the proxy pass Range and If-Range on, and compress nothing",
    "streamed ranges": "let the proxy pass Range and If-Range on, and compress nothing",
    "conditions": "let the proxy pass If-None-Match, If-Modified-Since, ETag and Last-Modified on",
    "streamed conditions": "let the proxy pass If-None-Match, If-Modified-Since, ETag and Last-Modified on",
    # likewise of what the proxy fetches by a URL
    "fetched ranges": "let the proxy pass Range and If-Range on to the server of <directory>",
    "fetched conditions": "let the proxy pass conditions on to the server of <directory>, and ETag and Last-Modified "
    "to the client",
    "header of a store": "let the proxy drop <header>",
    "redirect": "[sources.<name>.presign] public_endpoint: the URL of the store as clients reach it; a proxy before "
    "the store has to pass the host, the path and the query on as they come, for they are signed",
    "encoded": "let the proxy compress nothing that is a file",
    "order": "let the proxy drop X-Accel-* and X-Sendfile* of clients",
    "cookie": "see who sets the cookie: the service sets none",
}
"""The advice for each problem, for a proxy whose `ProxyKind.remedies` has none, or whose kind is not known."""

SOCKET = "socket"
"""A problem of proxies that have a remedy for it alone: HEAD gives 404, or a resume 502, where GET gives the file."""


def remedies_of(backend: str | None) -> Mapping[str, str]:
    """Return the remedies of a kind of proxy by problem, an empty mapping for a kind that is not known."""
    kind = proxy_kinds().get(backend or "")
    return {} if kind is None else kind.remedies


def advice(problem: str, backend: str | None, **facts: str) -> str:
    """Return what mends a problem behind a proxy of this kind; each `<name>` in it is what `facts` says of the name."""
    text = remedies_of(backend).get(problem) or PROBLEMS[problem]
    for name, value in facts.items():
        text = text.replace(f"<{name}>", value)
    return text
