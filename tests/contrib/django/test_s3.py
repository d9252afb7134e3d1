"""Files of django-storages in a real S3 server: streamed in bounded memory, with ranges, of one version."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from downloadview_async.contrib.django.s3 import S3Reader
from tests import test_bounds as bounds
from tests.live import ask
from tests.servers import Server, free_port, serving

pytestmark = pytest.mark.slow  # the store takes ten seconds to start

MIB = 1 << 20
BUCKET = "downloads"
TEN = b"0123456789"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("s3")
    credentials = [{"accessKey": "AKIDEXAMPLE", "secretKey": "of the tests"}]
    identities = [{"name": "all", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}]
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    ports: set[int] = set()
    while len(ports) < 8:
        ports.add(free_port())
    port, *others = ports
    names = ["s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc"]
    command = [str(Path(sys.executable).with_name("weed")), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-dir={directory}", f"-s3.config={directory}/s3.json", f"-s3.port={port}"]
    command += [f"-{name}={number}" for name, number in zip(names, others, strict=True)]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={directory}/s3.sock"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=512", "-volume.max=20"]
    with serving(command, port, log=directory / "log", stop_signal=signal.SIGKILL) as server:
        resource = boto3.resource(
            "s3",
            endpoint_url=server.url,
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="of the tests",
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}),
        )
        deadline = time.monotonic() + 60
        while not _is_ready(resource):
            assert time.monotonic() < deadline, server.log
            time.sleep(0.1)
        yield resource.Bucket(BUCKET)
        resource.meta.client.close()


def _is_ready(resource: Any) -> bool:
    """Make the bucket, and return whether an object can be stored in it: volumes come later than the port."""
    with contextlib.suppress(BotoCoreError, ClientError):  # it is there, or not yet
        resource.create_bucket(Bucket=BUCKET)
    try:
        resource.Object(BUCKET, "ten.txt").put(Body=TEN)
    except (BotoCoreError, ClientError):
        return False
    return True


@pytest.fixture(scope="module")
def server(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.contrib.django.s3_app:app", "--port", str(port)]
    env = {"S3_URL": bucket.meta.client.meta.endpoint_url}
    with serving(command, port, log=tmp_path_factory.mktemp("server") / "log", env=env) as server:
        yield server


@pytest.mark.asyncio
async def test_whole_and_in_part(server: Server) -> None:
    port = int(server.address)
    whole = await ask(port, "/ten.txt")
    assert (whole.status, whole.body, whole.headers["content-length"]) == (200, TEN, "10")
    part = await ask(port, "/ten.txt", headers={"Range": "bytes=2-4"})
    assert (part.status, part.body, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    last = await ask(port, "/ten.txt", headers={"Range": "bytes=-3"})
    assert (last.status, last.body) == (206, b"789")
    head = await ask(port, "/ten.txt", method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "10")
    while "last-modified" not in whole.headers:  # it is told when its second is over
        whole = await ask(port, "/ten.txt")
    current = await ask(port, "/ten.txt", headers={"If-Modified-Since": whole.headers["last-modified"]})
    assert current.status == 304
    missing = await ask(port, "/nothing.txt")
    assert missing.status == 404


@pytest.mark.asyncio
async def test_an_empty_object(server: Server, bucket: Any) -> None:
    bucket.Object("empty.txt").put(Body=b"")
    answer = await ask(int(server.address), "/empty.txt")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


@pytest.mark.asyncio
async def test_a_large_object_is_never_in_memory(server: Server, bucket: Any, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb+") as file:
        file.truncate(256 * MIB)
        bucket.upload_fileobj(file, "large.bin")
    assert (await ask(int(server.address), "/ten.txt")).body == TEN
    idle = bounds.reset_peak(server)
    assert await bounds.download(server, "/large.bin") == 256 * MIB
    assert bounds.resident_peak(server) - idle < 48 * MIB


def test_an_object_that_is_replaced_is_not_read_on(bucket: Any) -> None:
    stored = bucket.Object("changing.bin")
    stored.put(Body=b"one" * MIB)
    stored.load()
    reader = S3Reader(stored, {})
    assert reader.read(3) == b"one"
    bucket.Object("changing.bin").put(Body=b"two" * MIB)
    reader.seek(MIB)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        reader.read(3)
    reader.close()
