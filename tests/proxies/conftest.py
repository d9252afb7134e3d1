"""A site with every kind of source, once behind each proxy."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import downloadview_async as dv
from tests.live import live, make_old
from tests.odd_names import ODD_NAMES
from tests.proxies.servers import EACH_KIND, KINDS, Kind, proxy, readable_directory

HOSTILE_NAMES = [
    *ODD_NAMES,
    "a trailing space.txt ",
    "&=;$'(~!*)[]{}|<>\"^`.txt",
    "voilà",  # ends in a byte that is a space in Latin-1
    "a directory/50%25 of it/é?.txt",
    "%2e%2e",
    "%2E%2E%2fx.txt",
    "{path}.txt",
    " first.txt",
    "...",
]
NAMES = [*HOSTILE_NAMES, "page.html"]
PRIVATE_PAGES = [
    "/-/readyz",
    "/-/readyz?a=1",
    "/-/readyz/",
    "/-/readyz#",
    "/-/cache",
    "/-/",
    "/-//readyz",
    "/-/./readyz",
    "/-/livez/../readyz",
    "/-/livez%2f..%2freadyz",
    "/-/livez/",
    "/-/livezz",
    "/-/%72eadyz",
    "/%2d/readyz",
    "/%2D%2Freadyz",
    "/-%2freadyz",
    "/-%2F%2Freadyz",
    "//-/readyz",
    "/./-/readyz",
    "/a/../-/readyz",
]
"""Spellings of the service's own pages, which no client gets by way of a proxy."""
DRESS = {
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Allow-Origin": "https://app.example.org",
    "Access-Control-Expose-Headers": "Content-Disposition",
    "Content-Language": "de",
    "Expires": "Thu, 01 Jan 2099 00:00:00 GMT",
    "Set-Cookie": "seen=1",
    "Vary": "Origin, Accept-Language",
}
"""Headers that an application and its middleware may give a download, and that are no business of its proxy."""
LOCAL = ["path", "storage", "object"]
STREAMED = ["remote", "virtual", "outside"]
PRIVATE = b"of another directory"


def content_of(name: str) -> bytes:
    """Bytes that no other name has."""
    return b"".join(b"%s:%04d\n" % (name.encode(), line) for line in range(100))


@dataclass(frozen=True)
class Site:
    """Where things are: `port` is the proxy's, `service` is the application's own."""

    kind: Kind
    checkout: Path
    port: int
    service: int

    @property
    def files(self) -> Path:
        return self.checkout / "app" / "files"


@dataclass(frozen=True)
class Row:
    file: str
    title: str
    media_type: str


async def _row(key: str) -> Row:
    return Row(key, "Ein Bericht.html", "text/html")


async def _echo(request: Request) -> Response:
    return PlainTextResponse(f"{request.headers.raw} {request.scope['raw_path']}")


async def _length(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


class _Refusing(BaseHTTPMiddleware):
    """Lets the download be made and answers something else then: the order that makes an authorisation bypass."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        if "/refused/" in request.url.path:
            return Response("Forbidden", 403)
        return response


def make_checkout(directory: Path, name: str = "the check-out") -> Path:
    """Make what the configurations expect below the checkout's directory, and a neighbour that is nobody's business."""
    directory = directory / name
    files = directory / "app" / "files"
    files.mkdir(parents=True)
    outside = directory / "app" / "files-private"
    outside.mkdir()
    for name in NAMES:
        for file in (files / name, outside / name):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content_of(name))
    (outside / "secret.txt").write_bytes(PRIVATE)
    make_old(directory)
    return directory


@asynccontextmanager
async def serve(kind: Kind, checkout: Path, backend: dv.OffloadBackend | None = None) -> AsyncIterator[Site]:
    """Serve every kind of source behind a proxy of this kind."""
    files, outside = checkout / "app" / "files", checkout / "app" / "files-private"
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(
            live(Starlette(routes=[Route("/pub/{path:path}", dv.Download(dv.PathSource(files)))]))
        )
        path = dv.PathSource(files)
        remote = dv.RemoteSource(f"http://127.0.0.1:{upstream}/pub/", allow_hosts=["127.0.0.1"])
        stack.push_async_callback(remote.aclose)
        documents = dv.ObjectSource(
            _row, source=path, file_field="file", basename_field="title", mime_type_field="media_type"
        )
        sources: dict[str, dv.Source] = {
            "path": path,
            "storage": dv.StorageSource(dv.DirectoryStorage(files)),
            "object": documents,
            "remote": remote,
            "virtual": dv.VirtualSource(
                lambda name: content_of(name) if name in HOSTILE_NAMES or name == "page.html" else None
            ),
            "outside": dv.PathSource(outside),
            "follow": dv.PathSource(files, symlinks="follow"),
            "refused": path,
        }
        routes = [
            Route(f"/{name}/{{path:path}}", dv.Download(source, cache_control="private, max-age=60"))
            for name, source in sources.items()
        ]
        routes += [
            Route(f"/inline/{name}/{{path:path}}", dv.Download(source, attachment=False))
            for name, source in sources.items()
        ]
        app = Starlette(
            routes=[
                *routes,
                Route("/dressed/{path:path}", dv.Download(path, headers=DRESS)),
                Route("/encoded/{path:path}", dv.Download(path, headers={"Content-Encoding": "x-none"})),
                Route("/echo/{path:path}", _echo),
                Route("/length/{path:path}", _length, methods=["POST"]),
            ],
            middleware=[Middleware(_Refusing)],
        )
        service = await stack.enter_async_context(live(dv.OffloadMiddleware(app, backend or kind.backend(files))))
        port = stack.enter_context(proxy(kind, checkout, service))
        yield Site(kind, checkout, port, service)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=EACH_KIND)
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """The same site behind each proxy."""
    with readable_directory() as directory:
        async with serve(KINDS[request.param], make_checkout(directory)) as running:
            yield running
