"""Links with uses on real servers of Django: what they grant, which requests count, and what is one download."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from django.test import override_settings

from downloadview_async.contrib.django import arevoke_link, sign_url
from tests.contrib.django.served_app import KINDS
from tests.contrib.django.test_served import _ZERO_COPY, Way
from tests.live import Answer, ask, make_old
from tests.servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIZE = 300_000
CONTENT = bytes(range(256)) * (SIZE // 256) + b"x" * (SIZE % 256)
LARGE = 16 << 20  # more than sockets buffer
WAYS = {
    "zero-copy": Way("ours", ("--http", _ZERO_COPY)),
    "uvicorn": Way("ours"),
    "stock": Way("stock"),
    "wsgi": Way("wsgi"),
}
SLOW = pytest.mark.slow
UNFINISHED = ["unfinished", "async-unfinished"]
BY_NGINX = ["signed-nginx", "signed-nginx-unfinished", "signed-nginx-async-unfinished", "nginx-signed"]
each_kind = pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind != "memory"), *UNFINISHED])
each_ranged_kind = pytest.mark.parametrize(
    "kind", [*(kind for kind in KINDS if kind not in ("memory", "generated")), *UNFINISHED]
)


@pytest.fixture(
    scope="module", params=[pytest.param(way, marks=[] if way != "uvicorn" else pytest.mark.slow) for way in WAYS]
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root, directory = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("server")
    (root / "a.bin").write_bytes(CONTENT)
    (root / "small.txt").write_bytes(b"0123456789")
    with (root / "large.bin").open("wb") as file:
        file.truncate(LARGE)
    make_old(root)
    links = {"STORE": f"sqlite:{directory / 'links.db'}"}
    way = WAYS[request.param]
    way = Way(way.app, way.options, {"SERVED_LINKS": links["STORE"]})
    with way.serving(root, directory) as server, override_settings(DOWNLOADVIEW_LINKS=links):
        yield server


@pytest.fixture(scope="module")
def port(served: Server) -> int:
    return int(served.address)


async def get(port: int, link: str, client: str = "ada", method: str = "GET", **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return await ask(port, link, headers={"X-Client": client, **fields}, method=method)


@each_kind
async def test_the_link_says_how_the_file_is_shown(port: int, kind: str) -> None:
    link = sign_url(f"/signed-{kind}/a.bin", filename="Q3 é.pdf", attachment=False, content_type="application/pdf")
    for method in ("GET", "HEAD"):
        answer = await get(port, link, method=method)
        assert (answer.status, answer.body) == (200, CONTENT if method == "GET" else b"")
        assert answer.headers["content-type"] == "application/pdf"
        assert answer.headers["content-disposition"].startswith("inline; ")
        assert "filename*=UTF-8''Q3%20%C3%A9.pdf" in answer.headers["content-disposition"]
        assert answer.headers["cache-control"] == "private, no-store"
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    plain = await get(port, sign_url(f"/signed-{kind}/a.bin"))
    assert plain.headers["content-disposition"] == 'attachment; filename="a.bin"'
    assert (plain.headers["content-type"], plain.body) == ("application/octet-stream", CONTENT)
    for changed in (link[:-1], link.replace("a.bin", "small.txt", 1), f"/signed-{kind}/a.bin"):
        assert (await get(port, changed)).status == 403


@each_kind
@pytest.mark.parametrize("name", ["a.bin", "small.txt"])
async def test_a_once_only_link(port: int, kind: str, name: str) -> None:
    link = sign_url(f"/signed-{kind}/{name}", uses=1)
    answer = await get(port, link)
    assert (answer.status, answer.body) == (200, CONTENT if name == "a.bin" else b"0123456789")
    for client in ("ada", "bob"):
        again = await get(port, link, client)
        assert (again.status, again.body, again.headers["cache-control"]) == (410, b"", "private, no-store")
    assert (await get(port, link, method="HEAD")).status == 200


@each_ranged_kind
async def test_parts_are_one_download_and_some_answers_do_not_count(port: int, kind: str) -> None:
    link = sign_url(f"/signed-{kind}/a.bin", uses=1)
    head = await get(port, link, "h", method="HEAD")
    conditions = [(416, {"Range": f"bytes={SIZE}-"}), (412, {"If_Match": '"other"'})]
    if "etag" in head.headers:
        conditions.append((304, {"If_None_Match": head.headers["etag"]}))
    for status, headers in conditions:
        assert (await get(port, link, str(status), **headers)).status == status
    for start in range(0, SIZE, 100_000):
        part = await get(port, link, Range=f"bytes={start}-{start + 99_999}")
        assert (part.status, part.body) == (206, CONTENT[start : start + 100_000])
    assert (await get(port, link)).status == 410
    assert (await get(port, link, Range="bytes=5-9")).status == 206
    assert (await get(port, link, "bob", Range="bytes=5-9")).status == 410
    missing = sign_url(f"/signed-{kind}/none.bin", uses=1)
    for _ in range(2):
        assert (await get(port, missing)).status == 404


@pytest.mark.parametrize("kind", ["path", "function", "blocking-function", "async-unfinished"])
async def test_parallel_clients_and_parallel_connections(port: int, kind: str) -> None:
    link = sign_url(f"/signed-{kind}/a.bin", uses=1)
    answers = await asyncio.gather(*(get(port, link, str(number)) for number in range(20)))
    assert sorted(answer.status for answer in answers) == [200] + [410] * 19
    link, step = sign_url(f"/signed-{kind}/a.bin", uses=1), SIZE // 16 + 1
    spans = [f"bytes={start}-{min(start + step, SIZE) - 1}" for start in range(0, SIZE, step)]
    answers = await asyncio.gather(*(get(port, link, Range=span) for span in spans))
    assert [answer.status for answer in answers] == [206] * 16
    assert b"".join(answer.body for answer in answers) == CONTENT
    assert (await get(port, link)).status == 410


async def begin_and_leave(port: int, link: str, *, read: int) -> None:
    """Ask for a file as the client ada, read some bytes, and close the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {link} HTTP/1.1\r\nHost: x\r\nX-Client: ada\r\n\r\n".encode())
    await reader.readexactly(read)
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.parametrize("kind", ["path", "blocking-function", "async-unfinished", "fileobject"])
async def test_a_download_that_is_cut_is_resumed(port: int, kind: str) -> None:
    link = sign_url(f"/signed-{kind}/large.bin", uses=1)
    for read in (1000, 20_000):
        await begin_and_leave(port, link, read=read)
    assert (await get(port, link, "bob")).status == 410
    assert len((await get(port, link, Range=f"bytes={LARGE - 1000}-")).body) == 1000
    assert len((await get(port, link)).body) == LARGE
    assert (await get(port, link)).status == 410


@pytest.mark.parametrize("url", BY_NGINX)
async def test_what_a_proxy_sends_counts_too(port: int, url: str) -> None:
    link = sign_url(f"/{url}/a.bin", uses=1, filename="b.pdf", attachment=False)
    head = await get(port, link, "h", method="HEAD")
    assert (head.status, head.headers["x-accel-redirect"]) == (200, "/internal/a.bin")
    for part in ({}, {"Range": "bytes=5-"}):
        answer = await get(port, link, **part)
        assert (answer.status, answer.body, answer.headers["x-accel-redirect"]) == (200, b"", "/internal/a.bin")
        assert answer.headers["content-disposition"] == 'inline; filename="b.pdf"'
        assert answer.headers["cache-control"] == "private, no-store"
    other = await get(port, link, "bob")
    assert (other.status, "x-accel-redirect" in other.headers) == (410, False)


async def test_a_revoked_link(port: int) -> None:
    link = sign_url("/signed-path/a.bin")
    assert (await get(port, link)).status == 200
    await arevoke_link(link)
    assert (await get(port, link)).status == 403
