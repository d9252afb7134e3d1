"""Downloads in a FastAPI application that has users already: who may have which file, and nginx to send it.

    EXAMPLE_FILES=/srv/files EXAMPLE_TOKEN=secret uvicorn --factory examples.fastapi_app:create_app

Behind nginx, with `location /_files/ { internal; alias /srv/files/; }`, add EXAMPLE_OFFLOAD=nginx: the application
still decides, and nginx reads the file.
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

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def member(request: Request, credentials: Credentials) -> None:
    """Stand for whatever the application knows its users by: 403 for everybody else."""
    given = "" if credentials is None else credentials.credentials
    if not secrets.compare_digest(given.encode(), request.app.state.token.encode()):
        raise HTTPException(403)


def create_app() -> FastAPI:
    """Return the application that the environment describes."""
    app = FastAPI()
    app.state.token = os.environ["EXAMPLE_TOKEN"]
    files = PathSource(os.environ["EXAMPLE_FILES"])

    @app.get("/")
    async def homepage() -> dict[str, str]:
        return {"message": "an application like any other"}

    @app.api_route("/members/{path:path}", methods=["GET", "HEAD"], dependencies=[Depends(member)])
    async def member_file(path: str) -> DownloadResponse:
        return DownloadResponse(await files.resolve(path), headers={"Cache-Control": "private"})

    # without a check of its own: a source is an ASGI application, and can be mounted
    app.mount("/public", Download(PathSource(os.path.join(os.environ["EXAMPLE_FILES"], "public"))))
    # what `resolve` raises in `member_file` gets the answer that `Download` gives
    app.add_exception_handler(FileError, download_error)
    if os.environ.get("EXAMPLE_OFFLOAD") == "nginx":
        app.add_middleware(OffloadMiddleware, backend=XAccelRedirect([Rule(files.root.path, "/_files/")]))
    return app
