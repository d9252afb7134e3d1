"""The HTTP table, over a real socket, for every kind of source, once for every way of sending."""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import pytest

from downloadview_async.http.content_types import content_type_for
from tests.asgi.table_app import KINDS
from tests.asgi.ways import WAYS
from tests.live import ask, ask_raw
from tests.s3 import BUCKET, S3
from tests.servers import Server

CONTENT = b"0123456789"
MODIFIED = 1_700_000_000
LAST_MODIFIED = "Tue, 14 Nov 2023 22:13:20 GMT"
EARLIER = "Tue, 14 Nov 2023 22:13:19 GMT"
LATER = "Tue, 14 Nov 2023 22:13:21 GMT"
DATED = [kind for kind in KINDS if kind not in ("memory", "bytes", "fileobject", "s3", "cached-generated")]
TAGGED = [kind for kind in KINDS if kind != "fileobject"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, content in {"ten.txt": CONTENT, "empty.txt": b"", "page.html": b"<p>", "a.tar.gz": b"gz"}.items():
        (root / name).write_bytes(content)
        os.utime(root / name, ns=(0, MODIFIED * 1_000_000_000 + 500_000_005))
    return root


@pytest.fixture(scope="module")
def bucket(root: Path, s3: S3) -> str:
    """What `TABLE_S3` is for a bucket with the files."""
    for path in root.iterdir():
        s3.put(f"table/{path.name}", path.read_bytes(), content_type=content_type_for(path.name))
    return json.dumps({"url": f"s3://{BUCKET}/table", **s3.options})


# test_ways.py has a quick look at all ways
QUICK = ["zero-copy, asyncio"]


@pytest.fixture(
    scope="module", params=[pytest.param(way, marks=[] if way in QUICK else pytest.mark.slow) for way in WAYS]
)
def server(
    request: pytest.FixtureRequest, root: Path, bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Serve the table's files by one of the ways of sending, that of long files, for these short ones too."""
    env = {"TABLE_ROOT": str(root), "TABLE_PORT": "{port}", "TABLE_SMALL": "0", "TABLE_S3": bucket}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with WAYS[request.param].serving("tests.asgi.table_app:make_app", log=log, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def port(server: Server) -> int:
    """Return the port of a server whose cache has the file: while generated content arrives, its size is not known."""
    assert isinstance(server.address, int)
    with socket.create_connection(("127.0.0.1", server.address)) as client:
        client.sendall(
            b"GET /cached-generated/ten.txt HTTP/1.1\r\nHost: x\r\nRange: bytes=0-\r\nConnection: close\r\n\r\n"
        )
        with client.makefile("rb") as answer:
            assert answer.read().endswith(CONTENT)
    return server.address


pytestmark = [pytest.mark.asyncio(loop_scope="module")]
each_kind = pytest.mark.parametrize("kind", KINDS)

WHOLE = (200, None, CONTENT)
UNSATISFIABLE = (416, "bytes */10", b"")
RANGES: list[tuple[str, tuple[int, str | None, bytes]]] = [
    *[
        (f"bytes={spec}", WHOLE)
        for spec in ["5-2", "a-b", "", "1", "-", "-1-2", "+1-2", "1_0-", "0x1-", "٣-٥", "1.0-2", "--6", "0-1,5-2", ","]
    ],
    ("items=0-1", WHOLE),
    ("bytes 0-1", WHOLE),
    ("0-1", WHOLE),
    ("BYTES=0-1", (206, "bytes 0-1/10", b"01")),
    ("bytes=0-0", (206, "bytes 0-0/10", b"0")),
    ("bytes=9-9", (206, "bytes 9-9/10", b"9")),
    ("bytes=0-", (206, "bytes 0-9/10", CONTENT)),
    ("bytes=2-99", (206, "bytes 2-9/10", b"23456789")),
    ("bytes=-3", (206, "bytes 7-9/10", b"789")),
    ("bytes=-100", (206, "bytes 0-9/10", CONTENT)),
    ("bytes=0-1,50-60", (206, "bytes 0-1/10", b"01")),
    ("bytes=0-5,2-7", (206, "bytes 0-7/10", b"01234567")),
    ("bytes=0-4,5-9", (206, "bytes 0-9/10", CONTENT)),
    *[(f"bytes={spec}", UNSATISFIABLE) for spec in ["-0", "10-", "10-20", "50-60,70-80", "9" * 5000 + "-"]],
    ("bytes=0-" + "9" * 5000, (206, "bytes 0-9/10", CONTENT)),
    ("bytes=" + ",".join(["0-0"] * 101), WHOLE),
    ("bytes=0-,0-,0-", WHOLE),
]


@each_kind
@pytest.mark.parametrize("value, expected", RANGES, ids=[value[:24] for value, _ in RANGES])
async def test_range(port: int, kind: str, value: str, expected: tuple[int, str | None, bytes]) -> None:
    answer = await ask(port, f"/{kind}/ten.txt", headers={"Range": value})
    assert (answer.status, answer.headers.get("content-range"), answer.body) == expected
    assert answer.complete
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"


@each_kind
@pytest.mark.parametrize("order", ["0-1,3-4", "8-9,0-0", "5-6,-1,0-1"])
async def test_several_parts_are_a_multipart_of_exact_length(port: int, kind: str, order: str) -> None:
    answer = await ask(port, f"/{kind}/ten.txt", headers={"Range": f"bytes={order}"})
    assert answer.status == 206
    assert answer.complete
    assert "content-range" not in answer.headers
    wanted = [range(10)[_slice(spec)] for spec in order.split(",")]
    message = BytesParser(policy=HTTP).parsebytes(
        f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode() + answer.body
    )
    parts = [(str(part["Content-Range"]), part.get_payload(decode=True)) for part in message.iter_parts()]
    assert parts == [(f"bytes {w[0]}-{w[-1]}/10", CONTENT[w[0] : w[-1] + 1]) for w in wanted]
    assert b"\n" not in answer.body.replace(b"\r\n", b"")


def _slice(spec: str) -> slice:
    first, last = spec.split("-")
    return slice(int(first), int(last) + 1) if first else slice(-int(last), None)


@each_kind
async def test_head_gives_the_headers_of_get_and_no_body(port: int, kind: str) -> None:
    got = await ask(port, f"/{kind}/ten.txt")
    head = await ask(port, f"/{kind}/ten.txt", method="HEAD", headers={"Range": "bytes=0-1"})
    assert (got.status, got.body) == (200, CONTENT)
    assert (head.status, head.body) == (200, b"")
    of_this_answer = {"date", "age", "cache-status"}  # a cache keeps the file a moment after the first answer
    both = [
        {name: answer.headers[name] for name in answer.headers if name not in of_this_answer} for answer in (head, got)
    ]
    assert both[0] == both[1]
    assert {*got.headers} - {"age"} <= {*head.headers}
    assert head.headers["content-length"] == "10"


@each_kind
@pytest.mark.parametrize("value", ["bytes=0-0", "bytes=-1", "bytes=-0", "bytes=5-"])
async def test_any_range_of_an_empty_file_is_the_whole_of_it(port: int, kind: str, value: str) -> None:
    answer = await ask(port, f"/{kind}/empty.txt", headers={"Range": value})
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "0", b"")


@each_kind
async def test_two_range_fields_are_ignored(port: int, kind: str) -> None:
    answer = await ask_raw(
        port,
        b"GET /%b/ten.txt HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\nRange: bytes=2-3\r\nConnection: close\r\n\r\n"
        % kind.encode(),
    )
    assert (answer.status, answer.body) == (200, CONTENT)


@pytest.mark.parametrize("kind", TAGGED)
async def test_entity_tag_conditions(port: int, kind: str) -> None:
    tag = (await ask(port, f"/{kind}/ten.txt")).headers["etag"]
    table: list[tuple[dict[str, str], int]] = [
        ({"If-None-Match": tag}, 304),
        ({"If-None-Match": f"W/{tag}"}, 304),
        ({"If-None-Match": f'"a,b", {tag}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": '"other"', "If-Modified-Since": LATER}, 200),
        ({"If-None-Match": tag, "Range": "bytes=0-1"}, 304),
        ({"If-Match": tag}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": f"W/{tag}"}, 412),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": '"other"', "If-None-Match": tag}, 412),
        ({"If-Match": tag, "If-None-Match": tag}, 304),
        ({"If-Match": tag, "If-Unmodified-Since": EARLIER}, 200),
        ({"If-Match": '"other"', "Range": "bytes=0-1"}, 412),
        ({"If-Range": tag, "Range": "bytes=0-1"}, 206),
        ({"If-Range": f"W/{tag}", "Range": "bytes=0-1"}, 200),
        ({"If-Range": '"other"', "Range": "bytes=0-1"}, 200),
        ({"If-Range": "nonsense", "Range": "bytes=0-1"}, 200),
        ({"If-Range": '"other"', "Range": "bytes=50-"}, 200),
    ]
    for method in ("GET", "HEAD"):
        for headers, status in table:
            answer = await ask(port, f"/{kind}/ten.txt", method=method, headers=headers)
            expected = 200 if (method, status) == ("HEAD", 206) else status
            assert answer.status == expected, (method, headers)
            assert answer.complete
            assert answer.headers.get("etag") == tag or status == 412, (method, headers)
            if answer.status in (304, 412):
                assert answer.body == b""
                assert not {"content-type", "content-disposition", "content-range"} & answer.headers.keys()


@pytest.mark.parametrize("kind", DATED)
async def test_date_conditions(port: int, kind: str) -> None:
    table: list[tuple[dict[str, str], int]] = [
        ({"If-Modified-Since": LAST_MODIFIED}, 304),
        ({"If-Modified-Since": LATER}, 304),
        ({"If-Modified-Since": EARLIER}, 200),
        ({"If-Modified-Since": "Tuesday, 14-Nov-23 22:13:20 GMT"}, 304),
        ({"If-Modified-Since": "Tue Nov 14 22:13:20 2023"}, 304),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-Unmodified-Since": LAST_MODIFIED}, 200),
        ({"If-Unmodified-Since": EARLIER}, 412),
        ({"If-Unmodified-Since": "yesterday"}, 200),
        ({"If-Range": LAST_MODIFIED, "Range": "bytes=0-1"}, 206),
        ({"If-Range": EARLIER, "Range": "bytes=0-1"}, 200),
        ({"If-Range": LATER, "Range": "bytes=0-1"}, 200),
    ]
    for headers, status in table:
        answer = await ask(port, f"/{kind}/ten.txt", headers=headers)
        assert answer.status == status, headers
        if status in (200, 206, 304):
            assert answer.headers["last-modified"] == LAST_MODIFIED


@each_kind
async def test_a_missing_file_ignores_conditions_and_says_one_thing(port: int, kind: str) -> None:
    plain = await ask(port, f"/{kind}/none.txt")
    conditional = await ask(
        port, f"/{kind}/none.txt", headers={"If-Match": '"x"', "If-None-Match": "*", "Range": "bytes=0-1"}
    )
    for answer in (plain, conditional):
        assert (answer.status, answer.body) == (404, b"Not Found")
        assert answer.headers["cache-control"] == "private, no-store"
        assert "none" not in str(answer.headers)


@each_kind
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_405(port: int, kind: str, method: str) -> None:
    answer = await ask(port, f"/{kind}/ten.txt", method=method, headers={"Content-Length": "0"})
    assert answer.status == 405
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


@each_kind
async def test_options_is_204_with_allow(port: int, kind: str) -> None:
    answer = await ask(port, f"/{kind}/ten.txt", method="OPTIONS")
    assert (answer.status, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS")


@each_kind
async def test_types_and_dispositions(port: int, kind: str) -> None:
    text = await ask(port, f"/{kind}/ten.txt")
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.headers["content-disposition"] == 'attachment; filename="ten.txt"'
    archive = await ask(port, f"/{kind}/a.tar.gz")
    assert archive.headers["content-type"] == "application/gzip"
    assert "content-encoding" not in archive.headers
    shown = await ask(port, f"/inline-{kind}/page.html")
    assert shown.headers["content-disposition"] == 'inline; filename="page.html"'
    assert shown.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert "content-security-policy" not in (await ask(port, f"/{kind}/page.html")).headers


async def test_requests_that_arrive_together_are_answered_in_order(port: int) -> None:
    request = b"GET /path/ten.txt HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-%d\r\n%s\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(request % (n, n, b"Connection: close\r\n" if n == 9 else b"") for n in range(10)))
    received = await reader.read(-1)
    writer.close()
    bodies = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 206")[1:]]
    assert bodies == [b"%d" % n for n in range(10)]
