"""`download_route`: an endpoint that sends files, in FastAPI: for GET and HEAD, and described as files in OpenAPI."""

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI

from downloadview_async.asgi.response import DownloadResponse
from downloadview_async.errors import WrongType

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])

_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

DOWNLOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": _BYTES},
    206: {"description": "The requested ranges of the file", "content": _BYTES},
    304: {"description": "The client has this version of the file already"},
    404: {"description": "There is no such file, or the client may not have it"},
    416: {"description": "The file has no byte of the requested ranges"},
}
"""The answers of a `DownloadResponse`, for `responses=` of an endpoint with `response_class=DownloadResponse`."""


def download_route(router: FastAPI | APIRouter, path: str, **options: Any) -> Callable[[_Endpoint], _Endpoint]:
    """Register an endpoint that returns a `DownloadResponse`, for GET and HEAD.

        @download_route(app, "/invoices/{number}")
        async def invoice(number: int) -> DownloadResponse: ...

    `@app.get` alone answers HEAD with 405, and OpenAPI says that the answer is JSON. Here OpenAPI has
    `DOWNLOAD_RESPONSES`, and no operation for HEAD.

    options: those of `@app.get`, such as `dependencies` and `tags`. `responses` are added to `DOWNLOAD_RESPONSES`.

    Raises `WrongType` if `router` is neither an application nor a router of FastAPI.
    """
    if not isinstance(router, FastAPI | APIRouter):
        raise WrongType(f"download_route takes a FastAPI application or an APIRouter, not {router!r}")
    responses = DOWNLOAD_RESPONSES | (options.pop("responses", None) or {})
    options = {"response_class": DownloadResponse, **options, "responses": responses}

    def register(endpoint: _Endpoint) -> _Endpoint:
        router.add_api_route(path, endpoint, methods=["GET"], **options)
        router.add_api_route(path, endpoint, methods=["HEAD"], **{**options, "include_in_schema": False})
        return endpoint

    return register
