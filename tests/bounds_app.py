"""An application with a GiB behind every kind of source, for a server process of its own."""

import os
from collections.abc import Iterator

from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv

ROOT = os.environ["BOUNDS_ROOT"]
PORT = int(os.environ["BOUNDS_PORT"])
SIZE = os.path.getsize(f"{ROOT}/big.bin")
BLOCK = bytes(1 << 20)


class Blocking:
    """A synchronous storage, as fsspec's are."""

    def open(self, name: str, mode: str) -> object:
        return open(f"{ROOT}/{name}", "rb", buffering=0)


class Row:
    """An object with a file."""

    file = "big.bin"


async def get(key: str) -> Row:
    """Find the one object."""
    return Row()


def generated() -> Iterator[bytes]:
    """Yield as many bytes as the file has."""
    for _ in range(SIZE // len(BLOCK)):
        yield BLOCK


def make(name: str) -> dv.VirtualFile:
    """Return the generated file."""
    return dv.VirtualFile(generated, name=name)


files = dv.PathSource(ROOT)
cache = dv.Cache(f"{ROOT}-cache-{PORT}")
SOURCES: dict[str, dv.Source] = {
    "path": files,
    "storage": dv.StorageSource(dv.storage_from_url(f"file://{ROOT}")),
    "sync": dv.StorageSource(dv.SyncStorage(Blocking())),
    "object": dv.ObjectSource(get, source=files),
    "remote": dv.RemoteSource(f"http://127.0.0.1:{PORT}/path/", allow_hosts=["127.0.0.1"]),
    "virtual": dv.VirtualSource(make),
    # this application is a store, too: its bucket is called "path"
    "store": dv.StorageSource(dv.ObjectStorage("s3://path/", endpoint=f"http://127.0.0.1:{PORT}", skip_signature=True)),
    "cached": dv.CachedSource(dv.RemoteSource(f"http://127.0.0.1:{PORT}/path/", allow_hosts=["127.0.0.1"]), cache),
}
app = Starlette(routes=[Route(f"/{kind}/{{name}}", dv.Download(source)) for kind, source in SOURCES.items()])
