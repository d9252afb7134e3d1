"""Applications of every framework at hand that give `Download` its files in every way they have of routing to it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Host, Mount, Route, Router

from downloadview_async import Download, PathSource

App = Callable[..., Any]


def make(name: str, root: Path) -> App:
    """Return the application called `name`, which serves the files of a directory at `/files/`."""
    return APPS[name](Download(PathSource(root)))


def make_from_environment() -> App:
    """Return the application that the environment names, for a server in another process."""
    return make(os.environ["NAMED_APP"], Path(os.environ["NAMED_ROOT"]))


def fastapi(arrange: Callable[[Any, Any, Download], None]) -> Callable[[Download], App]:
    def made(download: Download) -> App:
        from fastapi import APIRouter, FastAPI

        app, router = FastAPI(), APIRouter()
        arrange(app, router, download)
        return app

    return made


def fastapi_router(prefix: str, path: str) -> Callable[[Download], App]:
    def arrange(app: Any, router: Any, download: Download) -> None:
        router.add_route(path, download)
        app.include_router(router, prefix=prefix)

    return fastapi(arrange)


def fastapi_mount_in_a_router(app: Any, router: Any, download: Download) -> None:
    router.mount("/files", download)
    app.include_router(router)


def fastapi_sub_application(app: Any, router: Any, download: Download) -> None:
    from fastapi import FastAPI

    inner: Any = FastAPI()
    inner.add_route("/{path:path}", download)
    app.mount("/files", inner)


def starlette_around_fastapi(download: Download) -> App:
    return Starlette(routes=[Mount("/", APPS["fastapi: add_route"](download))])


def litestar(mounted: bool) -> Callable[[Download], App]:
    def made(download: Download) -> App:
        from litestar import Litestar, asgi

        @asgi("/files" if mounted else "/files/{name:path}", is_mount=mounted, copy_scope=True)
        async def files(scope: Any, receive: Any, send: Any) -> None:
            await download(scope, receive, send)

        return Litestar([files], openapi_config=None, logging_config=None)

    return made


def quart(download: Download) -> App:
    from hypercorn.middleware import DispatcherMiddleware
    from quart import Quart

    mounts: Any = {"/files": download, "/": Quart(__name__)}
    return DispatcherMiddleware(mounts)


def blacksheep(download: Download) -> App:
    from blacksheep import Application

    app = Application()
    app.mount("/files", download)
    return app


class Untouched:
    """A middleware that copies the scope, as some do."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        await self.app(dict(scope), receive, send)


APPS: dict[str, Callable[[Download], App]] = {
    "starlette: route": lambda d: Starlette(routes=[Route("/files/{path:path}", d)]),
    "starlette: route behind middleware": lambda d: Starlette(
        routes=[Route("/files/{path:path}", d, middleware=[Middleware(Untouched)])]
    ),
    "starlette: mount": lambda d: Starlette(routes=[Mount("/files", d)]),
    "starlette: mount with a parameter": lambda d: Starlette(routes=[Mount("/{tenant}", d)]),
    "starlette: route in a mount": lambda d: Starlette(routes=[Mount("/files", routes=[Route("/{path:path}", d)])]),
    "starlette: mount in a mount": lambda d: Starlette(routes=[Mount("/", routes=[Mount("/files", d)])]),
    "starlette: route in a mount with a parameter": lambda d: Starlette(
        routes=[Mount("/{tenant}", routes=[Route("/{path:path}", d)])]
    ),
    "starlette: router": lambda d: Router([Route("/files/{path:path}", d)]),
    "starlette: host": lambda d: Starlette(routes=[Host("{host}", Router([Mount("/files", d)]))]),
    "starlette around fastapi": starlette_around_fastapi,
    "fastapi: add_route": fastapi(lambda app, router, d: app.add_route("/files/{path:path}", d)),
    "fastapi: routes": fastapi(lambda app, router, d: app.router.routes.append(Route("/files/{path:path}", d))),
    "fastapi: router": fastapi_router("", "/files/{path:path}"),
    "fastapi: router with a prefix": fastapi_router("/files", "/{path:path}"),
    "fastapi: mount": fastapi(lambda app, router, d: app.mount("/files", d)),
    "fastapi: mount with a parameter": fastapi(lambda app, router, d: app.mount("/{tenant}", d)),
    "fastapi: mount in a router": fastapi(fastapi_mount_in_a_router),
    "fastapi: sub-application": fastapi(fastapi_sub_application),
    "litestar: mount": litestar(mounted=True),
    "litestar: route": litestar(mounted=False),
    "quart behind hypercorn's dispatcher": quart,
    "blacksheep: mount": blacksheep,
}
