"""What a client gets through the real nginx, Apache, lighttpd, Caddy and H2O, started from the files in `deploy/`."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.http.fields import OFFLOAD_HEADERS
from tests.live import Answer, ask, ask_raw, live, parse, resumes_only_what_was_begun
from tests.proxies.conftest import (
    DRESS,
    HOSTILE_NAMES,
    LOCAL,
    PRIVATE,
    STREAMED,
    Site,
    content_of,
    make_checkout,
    serve,
)
from tests.proxies.servers import KINDS, proxy, readable_directory

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERY = [*LOCAL, *STREAMED]
NAME = "plain.txt"
CONTENT = content_of(NAME)
SIZE = len(CONTENT)


def assert_no_order(answer: Answer) -> None:
    assert not OFFLOAD_HEADERS & {*answer.headers}


# --- whole files


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_a_client_gets_the_bytes_of_the_very_file(site: Site, route: str, name: str) -> None:
    path = f"/{route}/{quote(name)}"
    answer = await ask(site.port, path)
    assert (answer.status, answer.body, answer.complete) == (200, content_of(name), True)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, max-age=60"
    assert answer.headers["content-disposition"].startswith("attachment")
    direct = await ask(site.service, path)
    for header in ("content-disposition", "vary"):
        assert answer.headers.get(header) == direct.headers.get(header)
    if site.kind.name == "h2o" and route in LOCAL:  # H2O goes by the name of the file on the disk
        by_name = "text/plain; charset=utf-8" if name.endswith(".txt") else "application/octet-stream"
        assert answer.headers["content-type"] == by_name
    else:
        assert answer.headers["content-type"] == direct.headers["content-type"]
    assert_no_order(answer)

    head = await ask(site.port, path, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(content_of(name))))
    for header in ("etag", "last-modified", "content-type", "content-disposition", "x-content-type-options"):
        assert head.headers.get(header) == answer.headers.get(header)
    assert_no_order(head)


SPELLED = {
    "/./plain.txt": NAME,
    "/.//plain.txt": NAME,
    "//plain.txt": NAME,
    "/%2E/plain.txt": NAME,
    "/a%20directory//50%2525%20of%20it/%C3%A9%3F.txt": "a directory/50%25 of it/é?.txt",
    "/a%20directory/./50%2525%20of%20it/.//%C3%A9%3F.txt": "a directory/50%25 of it/é?.txt",
}


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize("path", SPELLED)
async def test_a_path_with_dots_and_empty_segments_is_that_of_the_same_file(site: Site, route: str, path: str) -> None:
    """apt asks for /./Packages, and others put a slash too many between a directory and a name."""
    direct = await ask(site.service, f"/{route}{path}")
    assert direct.status == 200
    answer = await ask(site.port, f"/{route}{path}")
    assert (answer.status, answer.body) == (200, content_of(SPELLED[path]))
    assert answer.headers["content-disposition"] == direct.headers["content-disposition"]
    part = await ask(site.port, f"/{route}{path}", headers={"Range": "bytes=2-5"})
    assert (part.status, part.body) == (206, content_of(SPELLED[path])[2:6])


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("route", EVERY)
async def test_the_service_sends_no_byte_of_what_the_proxy_sends(site: Site, route: str, name: str) -> None:
    answer = await ask(site.service, f"/{route}/{quote(name)}")
    offloaded = route in LOCAL and not (site.kind.name == "apache" and name.endswith(" "))
    assert bool(OFFLOAD_HEADERS & {*answer.headers}) == offloaded
    assert answer.body == (b"" if offloaded else content_of(name))


@pytest.mark.parametrize("route", EVERY)
async def test_inline_files_keep_their_sandbox(site: Site, route: str) -> None:
    for headers in ({}, {"Range": "bytes=0-3"}):
        answer = await ask(site.port, f"/inline/{route}/page.html", headers=headers)
        assert answer.status == (206 if headers else 200)
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("inline")


@pytest.mark.parametrize(
    "method, headers, status", [("GET", {}, 200), ("HEAD", {}, 200), ("GET", {"Range": "bytes=0-3"}, 206)]
)
async def test_the_headers_of_the_application_reach_the_client(
    site: Site, method: str, headers: dict[str, str], status: int
) -> None:
    """Those that nginx drops among them."""
    answer = await ask(site.port, f"/dressed/{NAME}", method=method, headers=headers)
    assert answer.status == status
    got = {name: answer.headers.get(name.lower(), "").replace(", ", ",") for name in DRESS}
    assert got == {name: value.replace(", ", ",") for name, value in DRESS.items()}


async def test_encoded_content_is_not_mistaken_for_plain(site: Site) -> None:
    answer = await ask(site.port, f"/encoded/{NAME}")
    assert (answer.status, answer.body) == (200, CONTENT)
    assert answer.headers["content-encoding"] == "x-none"


@pytest.mark.parametrize("route", EVERY)
async def test_what_is_missing_is_the_404_of_the_service(site: Site, route: str) -> None:
    missing = await ask(site.port, f"/{route}/no-such-file.txt")
    assert (missing.status, missing.body) == (404, b"Not Found")
    assert missing.headers["x-content-type-options"] == "nosniff"
    assert missing.headers["cache-control"] == "private, no-store"
    for path in ("..%2Ffiles-private%2Fsecret.txt", "a%0Ab", "%252e%252e/files-private/secret.txt", "."):
        answer = await ask(site.port, f"/{route}/{path}")
        assert answer.status in (400, 404)
        assert PRIVATE not in answer.body


# --- ranges


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize(
    "value, start, stop",
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=100-", 100, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=10-{SIZE * 2}", 10, SIZE),
        (f"bytes=3-4,{SIZE * 2}-", 3, 5),
    ],
)
async def test_a_part(site: Site, route: str, value: str, start: int, stop: int) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}", headers={"Range": value})
    assert (answer.status, answer.body) == (206, CONTENT[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, max-age=60"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert_no_order(answer)


@pytest.mark.parametrize("route", EVERY)
async def test_two_parts(site: Site, route: str) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}", headers={"Range": "bytes=0-3,800-809"})
    assert (answer.status, answer.complete) == (206, True)
    assert "content-range" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    message = BytesParser(policy=HTTP).parsebytes(
        f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode() + answer.body
    )
    assert message.get_content_type() == "multipart/byteranges"
    parts = [(str(part["content-range"]), part.get_payload(decode=True)) for part in message.iter_parts()]
    assert parts == [(f"bytes 0-3/{SIZE}", CONTENT[:4]), (f"bytes 800-809/{SIZE}", CONTENT[800:810])]


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize("value", [f"bytes={SIZE}-", f"bytes={SIZE * 2}-{SIZE * 3}"])
async def test_a_part_that_is_not_there(site: Site, route: str, value: str) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}", headers={"Range": value})
    assert answer.status == 416
    assert CONTENT[:9] not in answer.body
    if route in STREAMED or site.kind.name not in ("apache", "lighttpd"):  # who drop it from their own 416
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert_no_order(answer)


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize("value", ["bytes=a-b", "items=0-1", "", "bytes"])
async def test_a_range_that_is_none_is_ignored(site: Site, route: str, value: str) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}", headers={"Range": value})
    if answer.status == 416:
        # from nginx for its own files, from lighttpd for any; from H2O for its own files, whatever it does not know
        assert site.kind.name == "h2o" or value == "bytes=a-b"
        assert (site.kind.name in ("nginx", "h2o") and route in LOCAL) or site.kind.name == "lighttpd"
        return
    assert (answer.status, answer.body) == (200, CONTENT)


@pytest.mark.parametrize("route", EVERY)
async def test_head_is_for_the_whole_file(site: Site, route: str) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}", method="HEAD", headers={"Range": "bytes=0-3"})
    assert answer.body == b""
    if site.kind.name == "nginx" and route in LOCAL:  # nginx's own files answer HEAD as GET, ranges too
        assert (answer.status, answer.headers["content-range"]) == (206, f"bytes 0-3/{SIZE}")
    else:
        assert (answer.status, answer.headers["content-length"]) == (200, str(SIZE))


# --- conditions: whoever sends the bytes makes the validators, and answers by the same ones


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_validator_that_was_given_is_current(site: Site, route: str, method: str) -> None:
    path = f"/{route}/{NAME}"
    first = await ask(site.port, path, method=method)
    etag = first.headers["etag"]
    conditions = [{"If-None-Match": etag}, {"If-None-Match": f'"x", W/{etag}'}, {"If-None-Match": "*"}]
    if "last-modified" in first.headers:
        conditions += [
            {"If-Modified-Since": first.headers["last-modified"]},
            {"If-None-Match": etag, "If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"},
        ]
    for condition in conditions:
        answer = await ask(site.port, path, method=method, headers=condition)
        if site.kind.name == "nginx" and route in LOCAL and len(condition) == 2:
            assert (answer.status, answer.headers["etag"]) == (200, etag)  # for its own files nginx wants both to hold
            continue
        assert (answer.status, answer.body) == (304, b""), condition
        assert answer.headers["etag"] == etag
        assert answer.headers["cache-control"] == "private, max-age=60"
        left_out = route in LOCAL and (
            site.kind.name == "caddy" or (site.kind.name == "h2o" and [*condition] == ["If-Modified-Since"])
        )
        assert answer.headers.get("last-modified") == (None if left_out else first.headers.get("last-modified"))
        assert_no_order(answer)


@pytest.mark.parametrize("route", EVERY)
async def test_a_validator_of_another_version_is_not_current(site: Site, route: str) -> None:
    for condition in (
        {"If-None-Match": '"another"'},
        {"If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"},
        {"If-None-Match": '"another"', "If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"},
    ):
        answer = await ask(site.port, f"/{route}/{NAME}", headers=condition)
        assert (answer.status, answer.body) == (200, CONTENT), condition


@pytest.mark.parametrize("route", EVERY)
async def test_a_resume_is_of_the_version_that_was_begun(site: Site, route: str) -> None:
    await resumes_only_what_was_begun(site.port, f"/{route}/{NAME}", CONTENT)


@pytest.mark.parametrize("route", EVERY)
async def test_a_precondition_that_fails(site: Site, route: str) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}", headers={"If-Match": '"another"'})
    if site.kind.name == "lighttpd" and route in LOCAL:  # lighttpd does not know If-Match
        assert (answer.status, answer.body) == (200, CONTENT)
        return
    assert answer.status == 412
    assert CONTENT[:9] not in answer.body


async def test_a_file_that_is_replaced_has_another_validator(site: Site) -> None:
    file = site.files / "replaced.txt"
    file.write_bytes(b"before")
    os.utime(file, (1_700_000_000, 1_700_000_000))
    before = await ask(site.port, "/path/replaced.txt")
    file.write_bytes(b"after!")
    after = await ask(site.port, "/path/replaced.txt", headers={"If-None-Match": before.headers["etag"]})
    assert (before.body, after.status, after.body) == (b"before", 200, b"after!")
    resumed = await ask(
        site.port, "/path/replaced.txt", headers={"If-Range": before.headers["etag"], "Range": "bytes=3-"}
    )
    assert (resumed.status, resumed.body) == (200, b"after!")


# --- nobody but the application decides


@pytest.mark.parametrize("route", ["refused", "inline/refused"])
async def test_a_403_carries_no_file(site: Site, route: str) -> None:
    answer = await ask(site.port, f"/{route}/{NAME}")
    assert (answer.status, answer.body) == (403, b"Forbidden")
    assert_no_order(answer)


@pytest.mark.parametrize(
    "path",
    ["/_files/plain.txt", "/_files/", "/_files/..%2fplain.txt", "/plain.txt", "/app/files/plain.txt"],
)
async def test_there_is_no_way_around_the_service(site: Site, path: str) -> None:
    answer = await ask(site.port, path)
    assert (answer.status, answer.body) == (404, b"Not Found")


@pytest.mark.parametrize("kind", ["nginx", "caddy", "h2o"])
async def test_a_rule_that_the_proxy_does_not_know_is_no_empty_file(kind: str) -> None:
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        rules = [dv.Rule(str(checkout / "app" / "files"), "/_other/")]
        backend = dv.XReproxyURL(rules) if kind == "h2o" else dv.XAccelRedirect(rules)
        async with serve(KINDS[kind], checkout, backend) as site:
            answer = await ask(site.port, f"/path/{NAME}")
    assert (answer.status, answer.body) == (404, b"Not Found")


ORDERS = {
    "X-Sendfile-Type": "X-Accel-Redirect",
    "X-Accel-Mapping": "/=/_files/",
    "X-Accel-Redirect": "/_files/page.html",
    "X-Sendfile": "/etc/passwd",
}


@pytest.mark.parametrize("route", EVERY)
async def test_a_client_gives_no_orders(site: Site, route: str) -> None:
    plain = await ask(site.port, f"/{route}/{NAME}")
    answer = await ask(site.port, f"/{route}/{NAME}", headers=ORDERS)
    assert (answer.status, answer.body) == (200, CONTENT)
    assert {**answer.headers, "date": ""} == {**plain.headers, "date": ""}


async def test_the_service_hears_no_orders_and_who_the_client_is(site: Site) -> None:
    forged = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Proto": "ftp",
        "X-Forwarded-Host": "evil",
        "Forwarded": "for=1",
    }
    answer = await ask(site.port, "/echo/a%2Fb%25+;x?q=%2f", headers={**ORDERS, **forged})
    heard = answer.body.decode().lower()
    assert answer.status == 200
    for name in ORDERS:
        assert name.lower() + "'" not in heard
    assert "(b'x-forwarded-for', b'127.0.0.1')" in heard
    assert "(b'x-forwarded-proto', b'http')" in heard
    assert "(b'host', b'test')" in heard
    for value in ("192.0.2.1", "ftp", "evil", "for=1"):
        assert value not in heard
    assert "/echo/a%2fb%25+;x" in heard  # as the client spelled it


async def test_a_body_that_is_too_large_is_refused(site: Site) -> None:
    head = "{} HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\nConnection: close\r\n\r\n"
    answer = await ask_raw(site.port, head.format("POST /length/").encode() + bytes(100_000))
    assert answer.status in (400, 413)
    answer = await ask_raw(site.port, head.format(f"GET /path/{NAME}").encode() + bytes(100_000))
    if site.kind.name == "caddy" and answer.status == 200:  # it passes the head on before the body has come
        assert answer.body == CONTENT  # and the service, which reads no body, was the first to answer
    else:
        assert answer.status in (400, 413)


async def test_a_body_may_be_as_long_as_the_configuration_says(site: Site) -> None:
    head = f"POST /length/ HTTP/1.1\r\nHost: test\r\nContent-Length: {16_384}\r\nConnection: close\r\n\r\n"
    answer = await ask_raw(site.port, head.encode() + bytes(16_384))
    assert (answer.status, answer.body) == (200, b"16384")


async def test_a_chunked_body_that_is_too_large_is_refused(site: Site) -> None:
    fields = "Host: test\r\nTransfer-Encoding: chunked\r\nConnection: close"
    request = f"POST /length/ HTTP/1.1\r\n{fields}\r\n\r\n{100_000:x}\r\n".encode()
    answer = await ask_raw(site.port, request + bytes(100_000) + b"\r\n0\r\n\r\n")
    assert answer.status in (400, 411, 413)


# --- links and permissions


async def test_a_link_that_stays_inside_is_sent(site: Site) -> None:
    link = site.files / "inside.txt"
    link.unlink(missing_ok=True)
    link.symlink_to(NAME)
    answer = await ask(site.port, "/path/inside.txt")
    assert (answer.status, answer.body) == (200, CONTENT)


async def test_a_link_that_leads_outside_is_missing(site: Site) -> None:
    link = site.files / "outside.txt"
    link.unlink(missing_ok=True)
    link.symlink_to(site.checkout / "app" / "files-private" / "secret.txt")
    answer = await ask(site.port, "/path/outside.txt")
    assert (answer.status, answer.body) == (404, b"Not Found")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a link to another user")
async def test_nginx_follows_no_link_that_another_user_has_planted() -> None:
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        secret = checkout / "app" / "files-private" / "secret.txt"
        for name, owner in (("own.txt", 0), ("planted.txt", 65534)):
            link = checkout / "app" / "files" / name
            link.symlink_to(secret)
            os.chown(link, owner, owner, follow_symlinks=False)
        async with serve(KINDS["nginx"], checkout) as site:
            own = await ask(site.port, "/follow/own.txt")
            planted = await ask(site.port, "/follow/planted.txt")
    assert (own.status, own.body) == (200, PRIVATE)
    assert (planted.status, planted.body) == (404, b"Not Found")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the service may read what the proxy may not")
async def test_what_the_proxy_may_not_read_is_missing(site: Site) -> None:
    file = site.files / "unreadable.txt"
    file.write_bytes(PRIVATE)
    file.chmod(0o600)
    answer = await ask(site.port, "/path/unreadable.txt")
    if site.kind.name == "caddy":  # which stays who it is: root, here
        assert (answer.status, answer.body) == (200, PRIVATE)
        return
    assert answer.status == (403 if site.kind.name in ("lighttpd", "h2o") else 404)
    assert PRIVATE not in answer.body
    assert answer.headers["content-type"].count("charset") < 2
    assert_no_order(answer)


@pytest.mark.parametrize("kind", ["apache", "lighttpd"])
async def test_x_sendfile_is_obeyed_for_the_directory_of_the_files_alone(kind: str) -> None:
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        outside = str(checkout / "app" / "files-private")
        backend = dv.XSendfile([dv.Rule(outside, outside)], encoding="raw" if kind == "apache" else "percent")
        async with serve(KINDS[kind], checkout, backend) as site:
            assert "x-sendfile" in (await ask(site.service, "/outside/secret.txt")).headers
            answer = await ask(site.port, "/outside/secret.txt")
    assert answer.status in (403, 404)
    assert PRIVATE not in answer.body
    assert_no_order(answer)


# --- streams


async def test_a_stream_reaches_the_client_while_it_is_made(site: Site) -> None:
    received = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"x" * (1 << 20)
        await asyncio.wait_for(received.wait(), 30)
        yield b"y"

    app = Starlette(
        routes=[Route("/{name}", dv.Download(dv.VirtualSource(lambda name: dv.VirtualFile(slowly, name=name))))]
    )
    async with live(app) as service:
        with proxy(site.kind, site.checkout, service) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /slow.bin HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            seen = 0
            while seen < 1 << 19:
                block = await asyncio.wait_for(reader.read(1 << 16), 30)
                assert block, "the answer ended early"
                seen += block.count(b"x")
            received.set()
            rest = await asyncio.wait_for(reader.read(), 30)
            writer.close()
    assert seen + rest.count(b"x") >= 1 << 20
    assert rest.count(b"y") == 1


async def test_what_the_service_cannot_finish_does_not_look_finished(site: Site) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise OSError("the disk is gone")

    def make(name: str) -> dv.VirtualFile:
        return dv.VirtualFile(broken, name=name, size=200_000 if name == "sized.bin" else None)

    app = Starlette(routes=[Route("/{name}", dv.Download(dv.VirtualSource(make)))])
    async with live(app) as service:
        with proxy(site.kind, site.checkout, service) as port:
            sized = await ask(port, "/sized.bin")
            unsized = await ask(port, "/unsized.bin")
    assert not sized.complete
    if (
        site.kind.name != "lighttpd"
    ):  # which may end it in either way, by how the last bytes arrive; its page warns of that
        assert unsized.complete == (site.kind.name == "h2o")  # whose page does, too


# --- the encodings are not interchangeable


class _Raw:
    """An internal URI as it must not be: a path that is not encoded."""

    def __init__(self, files: Path, header: str) -> None:
        self._files = files
        self._header = header

    def headers_for(self, file: dv.AsyncFile) -> Mapping[str, str] | None:
        return {self._header: f"/_files/{os.path.relpath(file.location or '', self._files)}"}


@pytest.mark.parametrize(
    "kind, asked, sent",
    [
        ("nginx", "a%20b.txt", "a b.txt"),
        ("apache", "a b.txt", "a%20b.txt"),
        ("lighttpd", "a%20b.txt", "a b.txt"),
        ("caddy", "a%20b.txt", "a b.txt"),
        ("h2o", "a%20b.txt", "a b.txt"),
    ],
)
async def test_the_wrong_encoding_sends_another_file(kind: str, asked: str, sent: str) -> None:
    with readable_directory() as directory:
        checkout = make_checkout(directory, "checkout")
        files = checkout / "app" / "files"
        rules = [dv.Rule(str(files), str(files))]
        wrong: dict[str, dv.OffloadBackend] = {
            "nginx": _Raw(files, "x-accel-redirect"),
            "caddy": _Raw(files, "x-accel-redirect"),
            "h2o": _Raw(files, "x-reproxy-url"),
            "apache": dv.XSendfile(rules, encoding="percent"),
            "lighttpd": dv.XSendfile(rules, encoding="raw"),
        }
        async with serve(KINDS[kind], checkout, wrong[kind]) as site:
            answer = await ask(site.port, f"/path/{quote(asked)}")
    assert (answer.status, answer.body) == (200, content_of(sent))


# --- H2O alone


async def test_h2o_asks_twice_for_what_it_sends_and_once_for_the_rest() -> None:
    """For its own files it needs the headers, too: those beside X-Reproxy-URL are lost on it."""
    asked: list[str] = []

    class Counting:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            asked.append(f"{scope['method']} {scope['path']}?{scope['query_string'].decode()}")
            await self.app(scope, receive, send)

    with readable_directory() as directory:
        checkout = make_checkout(directory)
        files = checkout / "app" / "files"
        routes = [
            Route("/path/{path:path}", dv.Download(dv.PathSource(files))),
            Route("/virtual/{path:path}", dv.Download(dv.VirtualSource(content_of))),
        ]
        app = Counting(dv.OffloadMiddleware(Starlette(routes=routes), KINDS["h2o"].backend(files)))
        async with live(app) as service:
            with proxy(KINDS["h2o"], checkout, service) as port:
                for route, requests in (("path", 2), ("virtual", 1)):
                    asked.clear()
                    answer = await ask(port, f"/{route}/{NAME}?a=%2F")
                    assert (answer.status, answer.body) == (200, CONTENT)
                    assert asked == [f"GET /{route}/{NAME}?a=%2F"] * requests


async def test_h2o_sends_the_whole_of_another_version_with_nothing_but_what_is_safe() -> None:
    """It does not know If-Range, and takes If-Modified-Since for a condition beside If-None-Match."""
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        async with serve(KINDS["h2o"], checkout) as site:
            first = await ask(site.port, f"/path/{NAME}")
            for condition in (
                {"Range": "bytes=4-", "If-Range": '"another"'},
                {"If-None-Match": '"another"', "If-Modified-Since": first.headers["last-modified"]},
                {"If-None-Match": '"another"', "If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"},
            ):
                answer = await ask(site.port, f"/path/{NAME}", headers=condition)
                assert (answer.status, answer.body) == (200, CONTENT)
                assert answer.headers["content-disposition"] == "attachment"
                assert answer.headers["cache-control"] == "private, no-store"
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert "etag" not in answer.headers
                assert_no_order(answer)
            old = {"If-None-Match": '"another"', "If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}
            answer = await ask(site.port, f"/path/{NAME}", headers=old)
            assert (answer.status, answer.headers["etag"]) == (200, first.headers["etag"])
            assert (await ask(site.port, f"/_whole/{NAME}")).status == 404


async def test_h2o_reads_a_stream_ahead_and_a_client_that_waits_gets_it_all() -> None:
    pieces = [bytes([number]) * (1 << 20) for number in range(48)]
    size = len(pieces) << 20
    given = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            if piece is pieces[-1]:
                given.set()
            yield piece

    source = dv.VirtualSource(lambda name: dv.VirtualFile(stream, name=name, size=size))
    app = Starlette(routes=[Route("/virtual/{path:path}", dv.Download(source))])
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        async with live(app) as service:
            with proxy(KINDS["h2o"], checkout, service) as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"GET /virtual/{NAME} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
                await asyncio.wait_for(given.wait(), 30)
                answer = parse(await reader.read())
                writer.close()
    assert (answer.status, answer.headers["content-length"]) == (200, str(size))
    assert answer.body == b"".join(pieces)


# --- nginx alone


async def test_the_options_of_nginx_reach_nginx_and_nobody_else() -> None:
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        files = checkout / "app" / "files"
        (files / "large.bin").write_bytes(bytes(1 << 20))
        backend = dv.XAccelRedirect(
            [dv.Rule(str(files), "/_files/")], buffering=False, charset="utf-8", expires=60, limit_rate=4096
        )
        async with serve(KINDS["nginx"], checkout, backend) as site:
            assert OFFLOAD_HEADERS - {*(await ask(site.service, f"/path/{NAME}")).headers} == {
                "x-sendfile",
                "x-sendfile2",
                "x-lighttpd-kbytes-per-second",
                "x-lighttpd-send-file",
                "x-litespeed-location",
                "x-offload-target",
                "x-reproxy-url",
                "x-traffic",
            }
            answer = await ask(site.port, f"/path/{NAME}")
            assert (answer.status, answer.body) == (200, CONTENT)
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert_no_order(answer)

            # 1 MiB at 4 KiB/s takes four minutes. However slow this machine is, it cannot be there within a second.
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(b"GET /path/large.bin HTTP/1.1\r\nHost: test\r\n\r\n")
            assert b"content-length: 1048576" in (await reader.readuntil(b"\r\n\r\n")).lower()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(1 << 19), 1)
            writer.close()
