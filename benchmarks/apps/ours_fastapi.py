"""This library in FastAPI, as the documentation writes it: an endpoint that asks who the user is."""

import os
from typing import Annotated

from fastapi import Depends, FastAPI, Header

from downloadview_async import AccessDenied, DownloadResponse, PathSource
from downloadview_async.contrib.fastapi import download_route

_files = PathSource(os.environ["BENCH_FILES"])
app = FastAPI()


async def _current_user(authorization: Annotated[str, Header()] = "") -> str:
    return authorization.removeprefix("Bearer ") or "ada"


@download_route(app, "/files/{name}")
async def _file(name: str, user: Annotated[str, Depends(_current_user)]) -> DownloadResponse:
    if user != "ada":
        raise AccessDenied(f"{name} is not one of {user}")
    return DownloadResponse(await _files.resolve(name))
