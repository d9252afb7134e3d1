"""The keys by which responses, middleware and the server find each other in an ASGI scope and in its messages."""

from collections.abc import Mapping
from typing import Any

PATHSEND = "http.response.pathsend"
"""The ASGI extension by which a server sends a file itself, and the type of its message."""

ZERO_COPY = "http.response.zerocopysend"
"""The ASGI extension by which a server sends spans of an open file, and the type of its message."""

PREPARED = "downloadview_async.prepared"
"""The key of a `PreparedHead` in the start of a response, for a server that wants it.

The next message has the whole body, or is a path send of it.
"""

CONNECTION = "downloadview_async.connection"
"""The extension by which a server that knows what its client has taken gives its connection: see `asgi.accounts`."""

WATCHED = "downloadview_async.watched"
"""Marks in the extensions of a scope that the server itself drops a client that takes too little."""

FOREIGN = "downloadview_async.foreign"
"""Marks a path-send offer in the scope that `OffloadMiddleware` made for responses that are not ours."""

PACE = "downloadview_async.pace"
"""The key of a `Paced` in the extensions of a scope: the connection, whose rate holds until the next request."""

SETTLED = "downloadview_async.settled"
"""Marks a path-send message whose file no proxy may send: that has been decided already."""

SEND_LATER = "downloadview_async.send_later"
"""The key of a `SendLater` in the extensions of a scope, and in a path send that may be left to it."""

REQUEST_ID = b"x-request-id"
"""The header field with the id of a request, which `Accounts` takes from trusted proxies, and sends."""

RAISES = "downloadview_async.raises"
"""Marks in a scope that the caller answers a `FileError` in its own way: it is raised before the response begins."""

_LITESTAR = "litestar_app"  # in the scope of each of its requests


def raises_errors(scope: Mapping[str, Any]) -> bool:
    """Return whether a `FileError` is raised, because what is around answers it: Litestar, or our code for Quart."""
    return RAISES in scope or (_LITESTAR in scope and "starlette.exception_handlers" not in scope)
