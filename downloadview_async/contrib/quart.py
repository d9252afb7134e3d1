"""`DownloadResponse` for views of Quart, and `init_downloads`, which makes an application send it."""

from collections.abc import AsyncIterator
from typing import Any

from hypercorn.typing import ASGISendCallable
from quart import Quart, Request, Response, current_app, request
from quart.asgi import ASGIHTTPConnection
from quart.typing import ResponseTypes
from starlette.types import Scope, Send
from werkzeug.exceptions import HTTPException, default_exceptions

from downloadview_async.asgi.disconnect import listened_to_elsewhere
from downloadview_async.asgi.errors import failed
from downloadview_async.asgi.extensions import RAISES
from downloadview_async.asgi.response import DownloadResponse as _DownloadResponse
from downloadview_async.asgi.response import checked_headers
from downloadview_async.errors import ConfigurationError, FileError, WrongType
from downloadview_async.sources.base import AsyncFile

_OF_THE_VIEW = ("Content-Type", "Content-Length")  # Quart sets them for a body that is never sent


def init_downloads(app: Quart) -> None:
    """Let the views of an application return a `DownloadResponse`, and raise `FileError`.

    A `FileError` gets the application's own answer to its status: that of `abort(404)` for a missing file.

    Raises `WrongType` for something else than a Quart application.
    """
    if not hasattr(app, "asgi_http_class") or isinstance(app, type):
        raise WrongType(f"init_downloads takes a Quart application, such as Quart(__name__), not {app!r}")
    app.asgi_http_class = _Connection
    app.register_error_handler(FileError, _answer_to)


class DownloadResponse(Response):
    """Sends a file, as `downloadview_async.DownloadResponse` does, for a view of Quart. It takes the same arguments.

    Cookies and headers that the application adds to it are sent, too. The file is opened after the view and
    `after_request` have returned: until then, the status is that of the argument `status_code`.

    Raises what `downloadview_async.DownloadResponse` raises.
    """

    def __init__(self, file: AsyncFile, **options: Any) -> None:
        self._inner = _DownloadResponse(file, **options)
        super().__init__(_not_initialized(), status=self._inner.status_code)
        for name in _OF_THE_VIEW:
            self.headers.pop(name, None)
        self.timeout = None  # a download takes as long as the client needs

    async def send_file(self, scope: Scope, send: Send) -> None:
        """Send the file to the client. Raises `FileError` before the first byte."""
        for name, value in self.headers.items():
            if name.lower() == "set-cookie":
                self._inner.raw_headers.append((b"set-cookie", value.encode("latin-1")))
            else:
                self._inner.raw_headers += checked_headers(((name, value),))
        # Quart cancels the request when the client leaves
        await self._inner({**scope, RAISES: True}, listened_to_elsewhere, send)


class _Connection(ASGIHTTPConnection):
    """One request. A `DownloadResponse` sends its file instead of a body."""

    async def handle_request(self, request: Request, send: ASGISendCallable) -> None:
        self._request = request
        await super().handle_request(request, send)

    async def _send_response(self, send: ASGISendCallable, response: ResponseTypes) -> None:
        if isinstance(response, DownloadResponse):
            try:
                await response.send_file(self.scope, send)  # type: ignore[arg-type]
            except FileError as exc:
                async with self.app.request_context(self._request):
                    answer = await self.app.handle_user_exception(exc)
                    response = await self.app.finalize_request(answer)
            else:
                return
        await super()._send_response(send, response)


async def _answer_to(error: FileError) -> ResponseTypes:
    kind = default_exceptions.get(error.status_code, HTTPException)  # werkzeug has no class for some statuses
    exception = kind() if error.detail == error.status.phrase else kind(error.detail)
    exception.code = error.status_code
    response = await current_app.make_response(await current_app.handle_http_exception(exception))
    response.headers.update(failed(error, request.method, request.path))
    return response


async def _not_initialized() -> AsyncIterator[bytes]:
    yield _body()


def _body() -> bytes:
    raise ConfigurationError("call init_downloads(app) for the Quart application, so that it can send files")
