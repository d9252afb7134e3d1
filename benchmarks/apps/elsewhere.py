"""This library with files that are elsewhere: a copy of a remote file in a cache, and an object that is not cached.

What another server has is at BENCH_ORIGIN: the same files, below /files/ and, as if that were a bucket, below /bucket/.
"""

import os
from tempfile import mkdtemp
from typing import Any

import httpx2
from obstore.store import S3Store
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from downloadview_async import Cache, CachedSource, Download, ObjectStorage, RemoteSource, StorageSource

ORIGIN = os.environ["BENCH_ORIGIN"]

_remote = RemoteSource(f"{ORIGIN}/files/", allow_hosts=["127.0.0.1"])
_bucket: Any = {"endpoint": ORIGIN, "access_key_id": "id", "secret_access_key": "secret"}
_stored = StorageSource(ObjectStorage("s3://bucket/", **_bucket))


def cached() -> Starlette:
    """Return the application that sends files from a cache: what it has not got yet, it fetches."""
    cache = Cache(mkdtemp(dir=os.environ["BENCH_SCRATCH"]), max_bytes=2 << 30)
    return Starlette(routes=[Route("/files/{path:path}", Download(CachedSource(_remote, cache)))])


stored = Starlette(routes=[Route("/files/{path:path}", Download(_stored))])

_store = S3Store("bucket", client_options={"allow_http": True, "timeout": "1h"}, **_bucket)


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Send an object in a bare loop, without a thought for who asks: the least that reading and sending it can cost."""
    answer = await _store.get_async(scope["path"].removeprefix("/files/"))
    length = str(answer.meta["size"]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    async for chunk in answer.stream(256 * 1024):
        await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


_client = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=100, max_keepalive_connections=100))


async def bare_remote(scope: Scope, receive: Receive, send: Send) -> None:
    """Send a remote file in a bare loop, as above."""
    async with _client.stream("GET", ORIGIN + scope["path"]) as answer:
        length = answer.headers["content-length"].encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        async for chunk in answer.aiter_raw():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
