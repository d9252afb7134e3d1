"""The application of the HTTP table: the same few files from every kind of source. Any ASGI server may serve it.

TABLE_ROOT: the directory of the files, beside which the cache is made. TABLE_PORT: where this is served, for the remote
source. TABLE_S3: a JSON object with the URL of a bucket that has the files too, and the options of the store; without
it, there is no such source. TABLE_SMALL: how long a file is that goes in one message, so that short files can show what
long ones do.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi import delivery
from downloadview_async.sources.local.path import FileBeneath
from downloadview_async.sources.local.root import Root
from downloadview_async.sources.workers import Workers

KINDS = ["path", "portable", "trusted", "directory", "memory", "sync", "object", "remote", "bytes", "fileobject", "s3"]
KINDS += ["cached-remote", "cached-generated"]


class _Blocking:
    """What fsspec and other synchronous storages look like."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, mode: str) -> Any:
        return (self.root / name).open(mode)

    def modified(self, name: str) -> float:
        return (self.root / name).stat().st_mtime


class _Portable:
    def __init__(self, root: Path) -> None:
        self._root = Root(root, use_openat2=False)
        self._workers = Workers()

    async def resolve(self, name: str) -> dv.AsyncFile:
        return FileBeneath(self._root, name, workers=self._workers)


class _Trusted:
    def __init__(self, root: Path) -> None:
        self._root = root

    async def resolve(self, name: str) -> dv.AsyncFile:
        return dv.LocalFile(self._root / name)


class Watch:
    """Remembers, by the names of the messages that it is sent as, how the last response before left."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.last: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] == "/last":
            await JSONResponse(self.last)(scope, receive, send)
            return
        extensions = scope.get("extensions") or {}
        last: dict[str, Any] = {"offered": extensions.get("http.response.pathsend"), "messages": []}
        self.last = last

        async def watched(message: Message) -> None:
            last["messages"].append(message["type"])
            await send(message)

        await self.app(scope, receive, watched)


def sources(root: Path, port: int) -> dict[str, dv.Source]:
    """Return a source of every kind for the files of `root`."""
    contents = {path.name: path.read_bytes() for path in root.iterdir()}

    async def find(key: str) -> Any:
        return type("Row", (), {"file": key}) if key in contents else None

    async def as_bytes(name: str) -> Any:
        return contents.get(name)

    def as_file_object(name: str) -> Any:
        return io.BytesIO(contents[name]) if name in contents else None

    def as_generator(name: str) -> Any:
        if name not in contents:
            return None
        return dv.VirtualFile(lambda: iter(contents[name].decode()), name=name, max_age=3600)

    files = dv.PathSource(root)
    cache = dv.Cache(f"{root}-cache-{os.getpid()}")
    url = f"http://127.0.0.1:{port}/path/"
    found: dict[str, dv.Source] = {
        "path": files,
        "portable": _Portable(root),
        "trusted": _Trusted(root),
        "directory": dv.StorageSource(dv.DirectoryStorage(root)),
        "memory": dv.StorageSource(dv.MemoryStorage(contents)),
        "sync": dv.StorageSource(dv.SyncStorage(_Blocking(root))),
        "object": dv.ObjectSource(find, source=files),
        "remote": dv.RemoteSource(url, allow_hosts=["127.0.0.1"]),
        "bytes": dv.VirtualSource(as_bytes),
        "fileobject": dv.VirtualSource(as_file_object),
        "cached-remote": dv.CachedSource(dv.RemoteSource(url, allow_hosts=["127.0.0.1"]), cache),
        "cached-generated": dv.CachedSource(dv.VirtualSource(as_generator), cache, name="generated"),
    }
    if "TABLE_S3" in os.environ:
        options = json.loads(os.environ["TABLE_S3"])
        found["s3"] = dv.StorageSource(dv.ObjectStorage(options.pop("url"), **options))
    assert set(KINDS) - set(found) <= {"s3"}
    return found


def make_app() -> ASGIApp:
    """Return the application that the environment describes."""
    if "TABLE_SMALL" in os.environ:
        assert "SMALL" in vars(delivery)
        vars(delivery)["SMALL"] = int(os.environ["TABLE_SMALL"])
    routes = []
    for kind, source in sources(Path(os.environ["TABLE_ROOT"]), int(os.environ["TABLE_PORT"])).items():
        routes.append(Route(f"/{kind}/{{path:path}}", dv.Download(source)))
        routes.append(Route(f"/inline-{kind}/{{path:path}}", dv.Download(source, attachment=False)))
    return Watch(Starlette(routes=routes))
