"""Downloads in a Starlette application with users: the application checks permissions, and nginx may send the files.

    EXAMPLE_FILES=/srv/files EXAMPLE_TOKEN=secret uvicorn --factory examples.starlette_app:create_app

Behind nginx with `location /_files/ { internal; alias /srv/files/; }`, set EXAMPLE_OFFLOAD=nginx: the application still
checks permissions, and nginx sends the files.
"""

import os
import secrets

from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser, requires
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

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


class BearerToken(AuthenticationBackend):
    """Authenticates the member by a token. Replace it by the authentication of your application."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """Return the member if the request has the token, else None."""
        if secrets.compare_digest(conn.headers.get("authorization", "").encode(), self._expected):
            return AuthCredentials(["member"]), SimpleUser("member")
        return None


async def homepage(request: Request) -> PlainTextResponse:
    return PlainTextResponse("an application like any other")


@requires("member", status_code=403)
async def member_file(request: Request) -> DownloadResponse:
    file = await request.app.state.files.resolve(request.path_params["path"])
    return DownloadResponse(file, headers={"Cache-Control": "private"})


def create_app() -> Starlette:
    """Return the application, configured by the EXAMPLE_* variables."""
    files = PathSource(os.environ["EXAMPLE_FILES"])
    middleware = [Middleware(AuthenticationMiddleware, backend=BearerToken(os.environ["EXAMPLE_TOKEN"]))]
    if os.environ.get("EXAMPLE_OFFLOAD") == "nginx":
        middleware.append(Middleware(OffloadMiddleware, backend=XAccelRedirect([Rule(files.root.path, "/_files/")])))
    app = Starlette(
        routes=[
            Route("/", homepage),
            Route("/members/{path:path}", member_file),
            # public, so without a permission check: `Download` is an endpoint
            Route("/public/{path:path}", Download(PathSource(os.path.join(os.environ["EXAMPLE_FILES"], "public")))),
        ],
        middleware=middleware,
        # log the reason of each error, also of those that `resolve` raises in `member_file`
        exception_handlers={FileError: download_error},
    )
    app.state.files = files
    return app
