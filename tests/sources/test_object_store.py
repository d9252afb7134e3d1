"""Object stores against one that does what a test tells it to, a real S3 server, and one of Google's protocol."""

import asyncio
import gzip
import hashlib
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import obstore
import pytest

from downloadview_async import (
    AccessDenied,
    ByteRange,
    ConfigurationError,
    Download,
    DownloadRequest,
    FileError,
    FileMissing,
    ObjectStorage,
    SourceUnavailable,
    StorageSource,
    TransferAborted,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from downloadview_async.sources import object_store
from downloadview_async.testing import call
from tests.gcs import GCS
from tests.live import ask, live
from tests.s3 import BUCKET, DENIED_ID, S3, Store, serving_store

pytestmark = pytest.mark.asyncio
MIB = 1 << 20


def app(store: Store, **options: Any) -> Download:
    return Download(StorageSource(store.storage_with(**options)))


async def until_it_aborts(chunks: AsyncIterator[bytes]) -> bytes:
    """Return what comes before the end, which has to be an abort."""
    received = b""
    try:
        async for chunk in chunks:
            received += chunk
    except TransferAborted:
        return received
    raise AssertionError("it ended as if it were whole")


REQUESTS: list[tuple[str, dict[str, str], int, bytes, list[str]]] = [
    ("GET", {}, 200, b"0123456789", ["GET"]),
    ("HEAD", {}, 200, b"", ["HEAD"]),
    ("HEAD", {"Range": "bytes=0-1"}, 200, b"", ["HEAD"]),
    ("GET", {"Range": "bytes=2-4"}, 206, b"234", ["GET"]),
    ("GET", {"Range": "bytes=2-"}, 206, b"23456789", ["GET"]),
    ("GET", {"Range": "bytes=2-99"}, 206, b"23456789", ["GET"]),
    ("GET", {"Range": "bytes=-3"}, 206, b"789", ["GET"]),
    ("GET", {"Range": "bytes=-100"}, 206, b"0123456789", ["GET"]),
    ("GET", {"Range": f"bytes=0-{'9' * 400}"}, 206, b"0123456789", ["GET"]),
    ("GET", {"Range": "bytes=junk"}, 200, b"0123456789", ["GET"]),
    ("GET", {"Range": "bytes=2-4", "If-Range": '"one"'}, 206, b"234", ["GET"]),
    ("GET", {"Range": "bytes=2-4", "If-Range": '"two"'}, 200, b"0123456789", ["GET", "GET"]),
    ("GET", {"Range": "bytes=-0"}, 416, b"", ["HEAD"]),
    ("GET", {"Range": "bytes=10-"}, 416, b"", ["GET", "HEAD"]),
    ("GET", {"Range": f"bytes={'9' * 30}-"}, 416, b"", ["GET", "HEAD"]),
    ("GET", {"If-None-Match": '"one"'}, 304, b"", ["HEAD"]),
    ("GET", {"If-Modified-Since": "Wed, 21 Oct 2015 07:28:00 GMT"}, 304, b"", ["HEAD"]),
    ("GET", {"If-Match": '"two"'}, 412, b"", ["HEAD"]),
    ("GET", {"If-None-Match": '"two"'}, 200, b"0123456789", ["HEAD", "GET"]),
]


@pytest.mark.parametrize("method, headers, status, body, upstream", REQUESTS)
async def test_what_a_request_costs(
    method: str, headers: dict[str, str], status: int, body: bytes, upstream: list[str]
) -> None:
    async with serving_store() as store:
        answer = await call(app(store), "/a.txt", method=method, headers=headers)
        assert (answer.status, answer.body, store.methods) == (status, body, upstream)
        if status in (200, 206, 304):
            assert answer.headers["etag"] == '"one"'
            assert answer.headers["last-modified"] == "Wed, 21 Oct 2015 07:28:00 GMT"
        if status == 416:
            assert answer.headers["content-range"] == "bytes */10"


@pytest.mark.parametrize("kind", ["gs", "az"])
async def test_other_kinds_of_stores_are_asked_in_the_same_way(kind: str) -> None:
    async with serving_store() as store:
        url = f"http://127.0.0.1:{store.port}"
        kinds: dict[str, dict[str, Any]] = {
            "gs": {"base_url": url, "skip_signature": True},
            "az": {"endpoint": url, "account_name": "account", "account_key": "QUJD"},
        }
        endpoint = Download(StorageSource(ObjectStorage(f"{kind}://box/a prefix", **kinds[kind])))
        last = ["HEAD", "GET"] if kind == "az" else ["GET"]  # Azure has no "the last bytes"
        table: list[tuple[dict[str, str], int, bytes, list[str]]] = [
            ({}, 200, b"0123456789", ["GET"]),
            ({"Range": "bytes=2-4"}, 206, b"234", ["GET"]),
            ({"Range": "bytes=-3"}, 206, b"789", last),
            ({"Range": "bytes=10-"}, 416, b"", ["GET", "HEAD"]),
        ]
        for headers, status, body, upstream in table:
            store.requests.clear()
            answer = await call(endpoint, "/a b/π.txt", headers=headers)
            assert (answer.status, answer.body, store.methods) == (status, body, upstream)
            path = unquote(store.requests[0][0].split()[1])
            assert path == "/box/a prefix/a b/π.txt"


async def test_several_ranges_are_of_one_version() -> None:
    async with serving_store() as store:
        answer = await call(app(store), "/a.txt", headers={"Range": "bytes=0-1,8-9"})
        assert answer.status == 206
        assert re.findall(rb"\r\n\r\n(\d\d)\r\n", answer.body) == [b"01", b"89"]
        assert store.methods == ["HEAD", "GET"]  # one read, as the parts are near each other
        assert [asked.get("if-match") for _, asked in store.requests] == [None, '"one"']


async def test_an_empty_object_has_no_ranges() -> None:
    async with serving_store(content=b"") as store:
        answer = await call(app(store), "/a.txt", headers={"Range": "bytes=0-0"})
        assert (answer.status, answer.headers["content-length"]) == (200, "0")


async def test_what_the_store_says_is_passed_on_and_its_orders_are_not() -> None:
    said = {
        "Cache-Control": "max-age=60",
        "Content-Encoding": "gzip",
        "Content-Language": "de",
        "Set-Cookie": "a=b",
        "X-Accel-Redirect": "/secret",
        "X-Sendfile": "/etc/passwd",
        "x-amz-meta-owner": "ada",
    }
    async with serving_store(content_type="text/x-odd", headers=said) as store:
        answer = await call(app(store), "/a.txt")
        passed = {name: answer.headers[name] for name in ("cache-control", "content-encoding", "content-language")}
        assert passed == {"cache-control": "max-age=60", "content-encoding": "gzip", "content-language": "de"}
        assert answer.headers["content-type"] == "text/x-odd"
        assert answer.body == b"0123456789"
        assert not {"set-cookie", "x-accel-redirect", "x-sendfile", "x-amz-meta-owner"} & set(answer.headers)


@pytest.mark.parametrize(
    "said, content_type", [("binary/octet-stream", "text/plain; charset=utf-8"), ("a b", "text/plain; charset=utf-8")]
)
async def test_a_type_that_says_nothing_is_made_of_the_name(said: str, content_type: str) -> None:
    async with serving_store(content_type=said) as store:
        assert (await call(app(store), "/a.txt")).headers["content-type"] == content_type


ERRORS: list[tuple[int, type[FileError], int]] = [
    (404, FileMissing, 404),
    (401, AccessDenied, 404),
    (403, AccessDenied, 404),
    (429, SourceUnavailable, 429),
    (503, SourceUnavailable, 503),
    (500, UpstreamError, 502),
    (400, UpstreamRefused, 502),
]


@pytest.mark.parametrize("status, error, ours", ERRORS)
async def test_errors_of_a_store(
    status: int, error: type[FileError], ours: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_store(status=status) as store:
        with pytest.raises(error) as raised:
            async with store.storage.open("a.txt"):
                pass
        assert isinstance(raised.value, UpstreamRefused) is (status == 400)
        with caplog.at_level(logging.INFO, "downloadview_async"):
            answer = await call(app(store), "/a.txt")
        assert answer.status == ours
        assert answer.headers.get("retry-after") == ("5" if ours in (429, 503) else None)
        assert str(status) in caplog.text  # why it is what it is
        assert b"127.0.0.1" not in answer.body


async def test_a_store_that_does_not_answer_and_one_that_is_not_there() -> None:
    async with serving_store(silent=True) as store:
        with pytest.raises(UpstreamTimeout):
            async with store.storage_with(answer_timeout=0.1).open("a.txt"):
                pass
        port = store.port
    with pytest.raises(UpstreamError):
        async with ObjectStorage(
            f"s3://{BUCKET}", endpoint=f"http://127.0.0.1:{port}", access_key_id="a", secret_access_key="b"
        ).open("a.txt"):
            pass


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "a/./b", "a\0b", "a\nb", "x" * 5000, "\ud800"])
async def test_what_no_key_may_be_is_never_asked_for(name: str) -> None:
    async with serving_store() as store:
        with pytest.raises(FileMissing):
            async with store.storage.open(name):
                pass
        assert store.requests == []


LARGE = os.urandom(3 * MIB)


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=1000-2900000"}])
async def test_a_stream_that_breaks_is_taken_up_where_it_broke(headers: dict[str, str]) -> None:
    async with serving_store(content=LARGE, cut_after=MIB, cuts=2) as store:
        answer = await call(app(store), "/a.bin", headers=headers)
        assert answer.body == (LARGE[1000:2_900_001] if headers else LARGE)
        assert len(store.requests) == 3


async def test_a_stream_that_breaks_again_and_again_goes_on_as_long_as_it_brings_something() -> None:
    async with serving_store(content=LARGE, cut_after=300_000, cuts=9) as store:
        assert (await call(app(store), "/a.bin")).body == LARGE
        assert store.cuts == 0


async def test_a_stream_that_brings_nothing_more_aborts() -> None:
    async with serving_store(content=LARGE, cut_after=MIB, cuts=1) as store:
        storage = store.storage_with(retry_config={"max_retries": 0})
        async with storage.open("a.bin") as opened:
            chunks = opened.stream(None)
            received = await anext(chunks)
            store.cut_after, store.cuts = 0, 100
            received += await until_it_aborts(chunks)
        assert LARGE.startswith(received)
        assert len(received) >= MIB - 256 * 1024


@pytest.mark.parametrize("honours", [True, False])
@pytest.mark.parametrize("etag", ['"two"', None])
async def test_a_replaced_object_is_never_mixed_with_the_old_one(honours: bool, etag: str | None) -> None:
    async with serving_store(content=LARGE, cut_after=MIB, honours_if_match=honours) as store:
        async with store.storage.open("a.bin") as opened:
            chunks = opened.stream(None)
            received = await anext(chunks)
            store.content, store.etag = LARGE[::-1], etag
            received += await until_it_aborts(chunks)
        assert LARGE.startswith(received)


async def test_a_stream_that_breaks_is_not_taken_up_where_nothing_tells_versions_apart() -> None:
    always = {"Last-Modified": "Tue, 01 Jan 1980 00:00:00 GMT"}
    async with serving_store(content=LARGE, etag=None, headers=always, cut_after=MIB) as store:
        async with store.storage.open("a.bin") as opened:
            chunks = opened.stream(None)
            received = await anext(chunks)
            store.content = LARGE[::-1]
            received += await until_it_aborts(chunks)
        assert LARGE.startswith(received)


async def test_an_object_that_is_replaced_between_two_spans_aborts() -> None:
    head = DownloadRequest(method="HEAD")
    async with serving_store(content=LARGE) as store, store.storage.open("a.bin", head) as opened:
        assert b"".join([chunk async for chunk in opened.stream(ByteRange(5, 10))]) == LARGE[5:10]
        store.etag = '"two"'
        with pytest.raises(TransferAborted):
            await anext(opened.stream(ByteRange(20, 30)))


async def test_weak_and_missing_tags() -> None:
    for etag in ('W/"one"', None):
        async with serving_store(content=LARGE, etag=etag, cut_after=MIB) as store:
            answer = await call(app(store), "/a.bin")
            assert answer.body == LARGE
            assert answer.headers.get("etag") == etag


@pytest.mark.parametrize("how", ["cancel", "leave"])
async def test_a_client_that_leaves_ends_the_request_to_the_store(how: str) -> None:
    async with serving_store(content=LARGE, hold_after=2 * MIB) as store:
        endpoint = app(store, max_connections=1)
        if how == "cancel":
            await call(endpoint, "/a.bin", cancel_after_bytes=MIB)
        else:
            await call(endpoint, "/a.bin", leave_after_bytes=MIB)
        await asyncio.wait_for(store.left.wait(), 20)
        store.hold_after = None
        assert (await call(endpoint, "/a.bin")).body == LARGE  # the only slot is free again


async def test_a_client_that_does_not_read_stops_the_store() -> None:
    """What is read ahead of a slow client is a few pieces, not the object."""
    content = bytes(64 * MIB)
    async with serving_store(content=content) as store, store.storage.open("a.bin") as opened:
        chunks = opened.stream(None)
        await anext(chunks)
        last = -1
        while store.sent != last:  # until the store is stuck in its own send
            last = store.sent
            await asyncio.sleep(0.3)
        assert store.sent < 24 * MIB  # the sockets' buffers and a little more


async def test_who_finds_no_free_connection_is_turned_away() -> None:
    async with serving_store() as store:
        storage = store.storage_with(max_connections=1)
        async with storage.open("a.txt"):
            with pytest.raises(SourceUnavailable):
                async with storage.open("a.txt"):
                    pass


async def test_a_storage_can_be_closed_and_used_again() -> None:
    async with serving_store() as store:
        storage = store.storage
        for _ in range(2):
            async with storage.open("a.txt") as opened:
                assert opened.metadata.size == 10
            await storage.aclose()


@pytest.mark.parametrize(
    "url, options, said",
    [
        ("s3://", {}, "not the URL of an object store"),
        ("s3:///key", {}, "not the URL of an object store"),
        ("ftp://bucket", {}, "not the URL of an object store"),
        ("http://bucket/x", {}, "not the URL of an object store"),
        ("memory://x", {}, "not the URL of an object store"),
        ("file:relative", {}, "not the URL of an object store"),
        ("s3://bucket?versionId=1", {}, "not the URL of an object store"),
        ("s3://bucket", {"nonsense": "1"}, "nonsense"),
        ("s3://bucket", {"timeout": "soon"}, "soon"),
        ("s3://bucket", {"allow_http": "maybe"}, "maybe"),
        ("az://container", {}, "ccount"),
        ("memory://", {"region": "x"}, "region"),
        ("file:///nothing/is/here", {}, "here"),
    ],
)
async def test_wrong_urls_and_options_are_refused(url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ObjectStorage(url, **options)


async def test_gcs_and_azure_can_be_named() -> None:
    assert await ObjectStorage("gs://bucket/p", skip_signature=True).locate("x") is None
    assert await ObjectStorage("az://box/p", account_name="a", account_key="QUJD").locate("x") is None


@pytest.mark.parametrize(
    "options, url",
    [
        ({}, "https://s3.us-east-1.amazonaws.com/bucket/a%20prefix/b%25.txt"),
        ({"region": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/bucket/a%20prefix/b%25.txt"),
        (
            {"virtual_hosted_style_request": True, "aws_region": "eu-west-1"},
            "https://bucket.s3.eu-west-1.amazonaws.com/a%20prefix/b%25.txt",
        ),
        ({"endpoint": "http://10.0.0.1:8333/"}, "http://10.0.0.1:8333/bucket/a%20prefix/b%25.txt"),
        (
            {"endpoint": "http://bucket.lake.test", "virtual_hosted_style_request": "true"},
            "http://bucket.lake.test/a%20prefix/b%25.txt",
        ),
    ],
)
async def test_where_an_object_of_s3_is(options: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    storage = ObjectStorage("s3://bucket/a prefix", **options)
    assert (await StorageSource(storage).resolve("b%.txt")).location == url


async def test_options_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://lake.test")
    assert await ObjectStorage("s3://bucket").locate("x") == "http://lake.test/bucket/x"
    assert ObjectStorage("s3://bucket").config["region"] == "eu-west-1"
    assert ObjectStorage("s3://bucket", region="us-west-2").config["region"] == "us-west-2"


async def test_without_obstore_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from downloadview_async import ObjectStorage\n"
        "try: ObjectStorage('gs://bucket')\n"
        "except ValueError as exc: print(exc)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "`gcs`" in said


async def test_a_process_that_is_forked_has_a_store_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"here")
    code = f"""
import asyncio, os
from downloadview_async import ObjectStorage
storage = ObjectStorage("file://{tmp_path}")
async def read():
    async with storage.open("a.txt") as opened:
        print(b"".join([chunk async for chunk in opened.stream(None)]).decode(), flush=True)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
asyncio.run(read())
os._exit(0)  # the threads of obstore now and then abort a Python that is ending
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "here\nhere\n"


async def test_a_store_works_again_after_its_first_use_had_no_descriptors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"here")
    code = f"""
import asyncio, os, resource
import anyio
from downloadview_async import ObjectStorage, SourceUnavailable
storage = ObjectStorage("file://{tmp_path}")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
async def read():
    await anyio.sleep(0)  # imports what it needs
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
    for use in (lambda: storage.open("a.txt").__aenter__(), lambda: anext(storage.list())):
        try:
            await use()
        except SourceUnavailable as exc:
            print(exc, flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with storage.open("a.txt") as opened:
        print(b"".join([chunk async for chunk in opened.stream(None)]).decode(), flush=True)
asyncio.run(read())
os._exit(0)  # the threads of obstore now and then abort a Python that is ending
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "obstore cannot start: Too many open files\n" * 2 + "here\n"


# ---- a real S3 server


async def test_denied_by_the_real_server(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    s3.put("denied/a.txt", b"x")
    storage = s3.storage("denied", access_key_id=DENIED_ID)
    with caplog.at_level(logging.INFO, "downloadview_async"):
        answer = await call(Download(StorageSource(storage)), "/a.txt")
    assert (answer.status, answer.body) == (404, b"Not Found")
    assert "AccessDenied" in caplog.text


async def test_metadata_of_the_real_server(s3: S3) -> None:
    s3.put("meta/a.bin", b"0123456789", content_type="image/webp", cache_control="max-age=60", content_encoding="gzip")
    answer = await call(Download(StorageSource(s3.storage("meta"))), "/a.bin", method="HEAD")
    assert answer.headers["etag"] == '"781e5e245d69b566979b86e28d23f2c7"'  # MD5, as S3 has it
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["cache-control"] == "max-age=60"
    assert answer.headers["content-encoding"] == "gzip"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "bucket, options, code",
    [
        (BUCKET, {"secret_access_key": "another"}, "SignatureDoesNotMatch"),
        (BUCKET, {"access_key_id": "AKIDNOBODY"}, "InvalidAccessKeyId"),
        ("no-such-bucket", {}, "NoSuchBucket"),
    ],
)
async def test_what_is_wrong_with_all_objects_is_not_a_missing_one(
    s3: S3, bucket: str, options: dict[str, str], code: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = ObjectStorage(f"s3://{bucket}", **(s3.options | options))
    answer = await call(Download(StorageSource(storage)), "/a.txt")
    assert (answer.status, answer.body) == (502, b"Bad Gateway")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert code in record.getMessage()


@pytest.mark.slow
async def test_a_large_object_takes_little_memory(s3: S3) -> None:
    """256 MiB from the real server, by a process that streams nothing else: it peaks far below the object's size."""
    piece = os.urandom(MIB)
    s3.put("large/a.bin", piece * 256)
    code = f"""
import asyncio, hashlib, resource
from downloadview_async import Download, ObjectStorage, StorageSource
from tests.live import live
app = Download(StorageSource(ObjectStorage({f"s3://{BUCKET}/large"!r}, **{s3.options!r})))
async def main():
    async with live(app) as port:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /a.bin HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        digest, length = hashlib.sha256(), 0
        while chunk := await reader.read(1 << 16):
            digest.update(chunk)
            length += len(chunk)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(length, digest.hexdigest(), (after - before) // 1024)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    length, digest, grown = done.stdout.split()
    assert (int(length), digest) == (256 * MIB, hashlib.sha256(piece * 256).hexdigest())
    assert int(grown) < 48, f"it grew by {grown} MiB"


async def test_the_real_server_over_a_real_socket(s3: S3) -> None:
    s3.put("socket/a.txt", b"0123456789", content_type="text/plain")
    await sends_digits(s3.storage("socket"), "/a.txt")


async def sends_digits(storage: ObjectStorage, path: str) -> None:
    """Ask for the whole object, for its end and for one that is missing."""
    async with live(Download(StorageSource(storage))) as port:
        whole = await ask(port, path)
        assert (whole.status, whole.body, whole.complete) == (200, b"0123456789", True)
        part = await ask(port, path, headers={"Range": "bytes=-3", "If-Range": whole.headers["etag"]})
        assert (part.status, part.body, part.headers["content-range"]) == (206, b"789", "bytes 7-9/10")
        assert (await ask(port, "/none.txt")).status == 404


# ---- a server of Google Cloud Storage's protocol


async def test_metadata_of_google_cloud_storage(gcs: GCS) -> None:
    said = {"contentType": "image/webp", "cacheControl": "max-age=60", "contentLanguage": "de"}
    gcs.put("meta/a.bin", b"0123456789", **said, contentDisposition="inline")
    endpoint = Download(StorageSource(gcs.storage("meta")))
    head = await call(endpoint, "/a.bin", method="HEAD")
    while "last-modified" not in head.headers:  # it is told when its second is over
        head = await call(endpoint, "/a.bin", method="HEAD")
    names = ("content-type", "cache-control", "content-language", "content-length", "etag", "last-modified")
    described = {name: head.headers.get(name) for name in names}
    assert list(described.values())[:5] == ["image/webp", "max-age=60", "de", "10", '"eB5eJF1ptWaXm4bijSPyxw=="']
    assert head.headers["content-disposition"] == 'attachment; filename="a.bin"'
    whole = await call(endpoint, "/a.bin")
    assert {name: whole.headers.get(name) for name in names} == described


async def test_google_unpacks_an_object_unless_it_is_asked_not_to(gcs: GCS) -> None:
    """What Google unpacks while it sends is never asked for by a range: a part of it is cut out here."""
    content = b"0123456789ab" * 100
    packed = gzip.compress(content)
    gcs.put("packed/a.txt", packed, contentType="text/plain", contentEncoding="gzip")
    unpacking = Download(StorageSource(gcs.storage("packed")))
    for headers, status, body in (({}, 200, content), ({"Range": "bytes=10-19"}, 206, content[10:20])):
        answer = await call(unpacking, "/a.txt", headers=headers)
        assert (answer.status, answer.body, answer.headers.get("content-encoding")) == (status, body, None)

    as_it_is = Download(StorageSource(gcs.storage("packed", default_headers={"Accept-Encoding": "gzip"})))
    for headers, status, body in (({}, 200, packed), ({"Range": "bytes=10-19"}, 206, packed[10:20])):
        answer = await call(as_it_is, "/a.txt", headers=headers)
        assert (answer.status, answer.body, answer.headers["content-encoding"]) == (status, body, "gzip")


async def test_google_cloud_storage_over_a_real_socket(gcs: GCS) -> None:
    gcs.put("socket/a b/π%.txt", b"0123456789", contentType="text/plain")
    await sends_digits(gcs.storage("socket"), "/a%20b/%CF%80%25.txt")
    nowhere = ObjectStorage("gs://no-bucket", **gcs.options)
    assert (await call(Download(StorageSource(nowhere)), "/a.txt")).status == 404


KEYS = ["a//b", "/a", "//a", "a///b", "x:y//aux.notes", "/50% //é", "a:b", "aux.notes", "a\\b", "x//y//z"]


@pytest.mark.parametrize("prefix", ["", "pre:fix/"])
async def test_any_key_of_s3_is_asked_for_as_it_is(prefix: str) -> None:
    async with serving_store() as store:
        endpoint = f"http://127.0.0.1:{store.port}"
        options: dict[str, Any] = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
        storage = ObjectStorage(f"s3://bucket/{prefix}", endpoint=endpoint, **options)
        source = StorageSource(storage, names="exact")
        for key in KEYS:
            download = Download(source, key=lambda request, key=key: key)  # type: ignore[misc]
            for headers, status in (({}, 200), ({"Range": "bytes=2-4"}, 206)):
                assert (await call(download, "/", headers=headers)).status == status, key
                assert unquote(store.requests[-1][0].split(" ")[1]) == f"/bucket/{prefix}{key}"
        before = len(store.requests)
        for key in ("a/", "a//", "/", "../a", "a/../b", "a/./b", "a\nb", "a/."):
            assert (await call(Download(source, key=lambda request, key=key: key), "/")).status == 404, key  # type: ignore[misc]
        assert len(store.requests) == before
        await storage.aclose()


async def test_stores_for_keys_with_empty_segments_are_made_in_threads_and_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_store, "_MAX_BELOW", 2)
    made: list[tuple[str, bool]] = []
    make = ObjectStorage._make

    def recorded(self: ObjectStorage, url: str, arguments: dict[str, Any]) -> Any:
        made.append((str(arguments.get("endpoint", "")), threading.current_thread() is threading.main_thread()))
        return make(self, url, arguments)

    monkeypatch.setattr(ObjectStorage, "_make", recorded)
    async with serving_store() as store:
        options: dict[str, Any] = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
        storage = ObjectStorage("s3://bucket", endpoint=f"http://127.0.0.1:{store.port}", **options)
        made.clear()
        for key in ("a//1", "b//1", "a//2", "c//1", "a//3", "b//2"):
            async with storage.open(key):
                pass
        await storage.aclose()
    assert [endpoint.rpartition("/bucket/")[2] for endpoint, _ in made] == ["a/", "b/", "c/", "b/"]
    assert not any(on_loop for _, on_loop in made)


async def test_only_s3_has_keys_with_empty_segments() -> None:
    storage = ObjectStorage("memory:///")
    obstore.put(storage.store, "a/b", b"x")
    source = StorageSource(storage, names="exact")
    for key in ("/a/b", "a//b"):  # obstore itself would take the first for "a/b"
        with pytest.raises(FileMissing):
            async with (await source.resolve(key)).open():
                pass
