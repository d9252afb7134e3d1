"""Downloads in a FastAPI application with users: the application checks permissions, and nginx may send the files.

    EXAMPLE_FILES=/srv/files EXAMPLE_TOKEN=secret uvicorn --factory examples.fastapi_app:create_app

Behind nginx with `location /_files/ { internal; alias /srv/files/; }`, set EXAMPLE_OFFLOAD=nginx: the application still
checks permissions, and nginx sends the files.
"""

import os
import secrets
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from downloadview_async import (
    Download,
    DownloadResponse,
    FileError,
    OffloadMiddleware,
    PathSource,
    Rule,
    XAccelRedirect,
    download_error,
)
from downloadview_async.contrib.fastapi import download_route

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def member(request: Request, credentials: Credentials) -> None:
    """Raise 403 unless the request has the member's token. Replace this by the permission check of your application."""
    given = "" if credentials is None else credentials.credentials
    if not secrets.compare_digest(given.encode(), request.app.state.token.encode()):
        raise HTTPException(403)


def create_app() -> FastAPI:
    """Return the application, configured by the EXAMPLE_* variables."""
    app = FastAPI()
    app.state.token = os.environ["EXAMPLE_TOKEN"]
    files = PathSource(os.environ["EXAMPLE_FILES"])

    @app.get("/")
    async def homepage() -> dict[str, str]:
        return {"message": "an application like any other"}

    @download_route(app, "/members/{path:path}", dependencies=[Depends(member)])
    async def member_file(path: str) -> DownloadResponse:
        return DownloadResponse(await files.resolve(path), headers={"Cache-Control": "private"})

    # public, so without a permission check: `Download` is an ASGI application, which can be mounted
    app.mount("/public", Download(PathSource(os.path.join(os.environ["EXAMPLE_FILES"], "public"))))
    # answer errors in plain text, and log the reason of each; without this line, the answers are JSON
    app.add_exception_handler(FileError, download_error)
    if os.environ.get("EXAMPLE_OFFLOAD") == "nginx":
        app.add_middleware(OffloadMiddleware, backend=XAccelRedirect([Rule(files.root.path, "/_files/")]))
    return app
