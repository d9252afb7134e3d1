"""Object stores as they are: ranges and HEADs that are refused or ignored, load, codings, and many parts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from downloadview_async import (
    Download,
    ObjectStorage,
    OffloadMiddleware,
    PresignedRedirect,
    StorageSource,
    XAccelRedirect,
)
from downloadview_async import Rule as OffloadRule
from downloadview_async.http.dates import format_http_date
from downloadview_async.testing import Recording, call

pytestmark = pytest.mark.asyncio
LARGE = bytes(n % 251 for n in range(251)) * 40_000  # 10 MB
FOUR = "bytes=9000000-9000001,5-6,6000000-6000001,3000000-3000001"


class Refusing:
    """A store of one object that refuses, or ignores, what it is told to."""

    def __init__(self) -> None:
        self.content = LARGE
        self.fields = ['ETag: "one"', "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT"]
        self.status: dict[str, int] = {}
        """By "HEAD", "range", "suffix", "any"."""
        self.ignores_ranges = False
        self.requests: list[str] = []
        self.sent = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                method = head.partition(" ")[0]
                asked = dict(line.split(": ", 1) for line in head.lower().split("\r\n")[1:-2])
                what = "suffix" if "=-" in asked.get("range", "") else "range" if "range" in asked else ""
                self.requests.append(f"{method} {what}".strip())
                status, body, fields = 200, self.content, list(self.fields)
                found = [self.status[key] for key in ("any", method, what) if key in self.status]
                if found:
                    status, body = found[0], b"<Error><Code>No</Code></Error>"
                elif what and not self.ignores_ranges:
                    first, last = asked["range"].removeprefix("bytes=").split("-")
                    start = int(first) if first else max(len(body) - int(last), 0)
                    stop = min(int(last) + 1, len(body)) if first and last else len(body)
                    status, size, body = 206, len(body), body[start:stop]
                    fields.append(f"Content-Range: bytes {start}-{stop - 1}/{size}")
                lines = [f"HTTP/1.1 {status} X", *fields, f"Content-Length: {len(body)}", "", ""]
                writer.write("\r\n".join(lines).encode())
                for position in range(0, 0 if method == "HEAD" else len(body), 65536):
                    writer.write(body[position : position + 65536])
                    await writer.drain()
                    self.sent += 65536
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()  # the client may have left in the midst of a body

    def storage(self, **options: Any) -> ObjectStorage:
        keys: dict[str, Any] = {"access_key_id": "a", "secret_access_key": "b", "retry_config": {"max_retries": 0}}
        return ObjectStorage("s3://box", endpoint=f"http://127.0.0.1:{self.port}", **keys, **options)

    async def get(self, method: str = "GET", **headers: str) -> Recording:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return await call(Download(StorageSource(self.storage())), "/a.bin", method=method, headers=fields)


@asynccontextmanager
async def serving() -> AsyncIterator[Refusing]:
    store = Refusing()
    async with await asyncio.start_server(store.serve, "127.0.0.1", 0) as server:
        store.port = server.sockets[0].getsockname()[1]
        yield store


PARTS = [("bytes=2-4", LARGE[2:5]), ("bytes=-3", LARGE[-3:]), ("bytes=9999990-", LARGE[9_999_990:])]


@pytest.mark.parametrize("value, body", PARTS)
async def test_a_range_that_a_store_ignores_is_cut_here(value: str, body: bytes) -> None:
    async with serving() as store:
        store.ignores_ranges = True
        answer = await store.get(Range=value)
        assert (answer.status, answer.body) == (206, body)
        assert store.requests[1:] == ["GET"]


@pytest.mark.parametrize("code", [400, 401, 403, 405, 406, 412, 415, 500, 501])
@pytest.mark.parametrize("value, body", PARTS[:2])
async def test_a_range_that_a_store_refuses_is_cut_here(code: int, value: str, body: bytes) -> None:
    async with serving() as store:
        store.status = {"range": code, "suffix": code}
        answer = await store.get(Range=value)
        assert (answer.status, answer.body, store.requests[-1]) == (206, body, "GET")


async def test_a_suffix_that_a_store_refuses() -> None:
    async with serving() as store:
        store.status = {"suffix": 416}
        answer = await store.get(Range="bytes=-3")
        assert (answer.status, answer.body) == (206, LARGE[-3:])
        assert store.requests == ["GET suffix", "HEAD", "GET range"]


@pytest.mark.parametrize("code", [400, 401, 403, 405, 501])
async def test_a_head_that_a_store_refuses(code: int) -> None:
    async with serving() as store:
        store.status = {"HEAD": code}
        answer = await store.get("HEAD")
        assert (answer.status, answer.headers["content-length"]) == (200, str(len(LARGE)))
        assert answer.headers["etag"] == '"one"'
        assert store.requests == ["HEAD", "GET"]
        assert store.sent < len(LARGE)
        assert (await store.get(If_None_Match='"one"')).status == 304
        assert (await store.get(If_None_Match='"two"')).body == LARGE


@pytest.mark.parametrize("code", [403, 404])
async def test_what_is_refused_in_any_form_is_not_there(code: int) -> None:
    async with serving() as store:
        store.status = {"any": code}
        assert (await store.get("HEAD")).status == 404
        assert (await store.get(Range="bytes=2-4")).status == 404


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=2-4"}, {"If-None-Match": '"x"'}])
async def test_a_store_that_throttles_is_passed_on(code: int, headers: dict[str, str]) -> None:
    async with serving() as store:
        store.status = {"any": code}
        answer = await call(Download(StorageSource(store.storage())), "/a.bin", headers=headers)
        assert (answer.status, answer.headers["retry-after"], len(store.requests)) == (code, "5", 1)


@pytest.mark.parametrize("ignores", [True, False])
@pytest.mark.parametrize(
    "value, status, requests",
    [
        ("bytes=" + ",".join(f"{n * 300_000}-{n * 300_000}" for n in range(30)), 200, 2),
        ("bytes=" + ",".join(f"{n * 300_000}-{n * 300_000}" for n in reversed(range(30))), 200, 2),
        ("bytes=" + ",".join(f"{n * 1000}-{n * 1000}" for n in range(100)), 206, 2),
        (FOUR, 206, 5),
    ],
    ids=["far", "backwards", "near", "four"],
)
async def test_many_parts_cost_few_requests(ignores: bool, value: str, status: int, requests: int) -> None:
    async with serving() as store:
        store.ignores_ranges = ignores
        answer = await store.get(Range=value)
        assert (answer.status, answer.complete) == (status, True)
        assert len(store.requests) <= requests + ignores
        assert store.sent <= 4 * len(LARGE)
        if status == 200:
            assert answer.body == LARGE
        else:
            for spec in value.removeprefix("bytes=").split(","):
                first, last = map(int, spec.split("-"))
                assert f"bytes {first}-{last}/{len(LARGE)}\r\n\r\n".encode() + LARGE[first : last + 1] in answer.body


@pytest.mark.parametrize("fields", [[], ['ETag: W/"x"']])
@pytest.mark.parametrize("modified", [2_000_000_000, 315_532_800, 499_162_500, 1])
async def test_parts_of_what_nothing_tells_apart_are_one_read(fields: list[str], modified: int) -> None:
    async with serving() as store:
        store.fields = [*fields, "Last-Modified: " + format_http_date(modified)]
        answer = await store.get(Range=FOUR)
        assert (answer.status, answer.body) == (200, LARGE)
        assert "last-modified" not in answer.headers
        assert (await store.get(Range="bytes=5-6,100-101")).status == 206


CODINGS = [
    ("aws-chunked", None),
    ("aws-chunked,gzip", "gzip"),
    ("AWS-CHUNKED", None),
    ("identity", None),
    ("utf-8", None),
    ("gzip", "gzip"),
]


@pytest.mark.parametrize("told, expected", CODINGS)
async def test_only_codings_that_a_client_can_decode_are_passed_on(told: str, expected: str | None) -> None:
    async with serving() as store:
        store.fields.append(f"Content-Encoding: {told}")
        for method in ("GET", "HEAD"):
            assert (await store.get(method)).headers.get("content-encoding") == expected


@pytest.mark.parametrize("told, signed", [("aws-chunked", "identity"), ("aws-chunked,gzip", "gzip"), ("gzip", "gzip")])
async def test_a_signed_url_tells_the_store_which_coding_to_name(told: str, signed: str) -> None:
    async with serving() as store:
        store.fields.append(f"Content-Encoding: {told}")
        storage = store.storage()
        endpoint = Download(StorageSource(storage), redirect=PresignedRedirect(storage))
        location = (await call(endpoint, "/a.bin")).headers["location"]
        assert f"response-content-encoding={signed}&" in location
        store.fields.pop()
        assert "content-encoding" not in (await call(endpoint, "/a.bin")).headers["location"]


@pytest.mark.parametrize("told, is_offloaded", [("aws-chunked", False), ("identity", False), (None, True)])
async def test_a_proxy_does_not_fetch_what_the_store_names_wrongly(told: str | None, is_offloaded: bool) -> None:
    async with serving() as store:
        store.fields += [] if told is None else [f"Content-Encoding: {told}"]
        storage = store.storage()
        url = storage.url_of("")
        assert url is not None
        backend = XAccelRedirect([OffloadRule(f"{url}/", "/_store/")])
        answer = await call(OffloadMiddleware(Download(StorageSource(storage)), backend=backend), "/a.bin")
        assert ("x-accel-redirect" in answer.headers) == is_offloaded
        assert "content-encoding" not in answer.headers
        assert answer.body == (b"" if is_offloaded else LARGE)
