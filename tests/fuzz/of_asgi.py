"""The parameters of queries, the pages of listings, heads of requests, and whole applications without a server."""

import asyncio
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp

from downloadview_async import Download, FileMissing, MemoryStorage, PathSource, StorageSource
from downloadview_async.asgi.archives import key_of
from downloadview_async.asgi.checksum import wanted_checksum
from downloadview_async.asgi.disconnect import close_after_body
from downloadview_async.asgi.listing.order import Window
from downloadview_async.asgi.listing.query import FORMATS, MAX_TEXT, SORTS, ListingQuery, fields_of
from downloadview_async.asgi.listing.view import kind_of, view_of
from downloadview_async.asgi.uvicorn.heads import Refused, is_host, read_head
from downloadview_async.sources.listing import Entry
from downloadview_async.testing import call
from tests.fuzz import inputs as st
from tests.fuzz.inputs import edited, edited_bytes
from tests.fuzz.of_http import FIELDS
from tests.fuzz.targets import target, target_within

QUERIES = edited_bytes(
    b"",
    b"format=json",
    b"q=a&deep=1&sort=size&order=desc",
    b"after=f,,a.txt",
    b"before=d,2026-01-01T00:00:00%2B00:00,b",
    b"view=1",
    b"view=pdf",
    b"archive=zip&name=a.txt&name=b",
    b"checksum=sha256",
    b"sort=modified&after=f,0001-01-01,x",
    b"after=f,10,a&sort=size",
    b"format=ndjson",
    b"archive=zip",
    words=[b"%ff", b"%ed%a0%80", b"%0a", b"&a" * 200, b"sort=type", b"after=", b"9999-12-31T23:59:59-23:59", b"%2C"],
)


@target(st.tuples(QUERIES, st.just(None) | edited("text/html", "application/json;q=0.5")))
def queries(value: tuple[bytes, str | None]) -> None:
    query_string, accept = value
    query = ListingQuery.of(query_string, accept)
    assert query.format in FORMATS.values()
    assert query.sort in SORTS
    assert len(query.text) <= MAX_TEXT
    url = query.url()
    assert re.fullmatch(r"\./|\?[!-~]*", url)
    assert not re.search(r"[\"<>\\^`{|}#]", url)
    again = ListingQuery.of(urlsplit(url).query.encode(), None)
    assert (again.text, again.sort, again.is_descending, again.is_deep) == (
        query.text,
        query.sort,
        query.is_descending,
        query.is_deep,
    )
    assert view_of(query_string) in (None, "page", "pdf")
    checksum = wanted_checksum(query_string)
    assert checksum is None or checksum in parse_qs(query_string.decode("latin-1"), keep_blank_values=True)["checksum"]
    assert len(fields_of(query_string)) <= 100
    try:
        key = key_of("folder", {"type": "http", "query_string": query_string})
    except FileMissing:
        return
    assert key is None or key.startswith("folder")


ENTRIES = [
    Entry("a.txt", size=1, modified=datetime(2026, 1, 1, tzinfo=UTC)),
    Entry("b", is_folder=True),
    Entry("a2", size=None),
    Entry("a10", size=10**30, modified=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=1)),
    Entry("ß,é&", size=0, content_type="a/b;c,d"),
    Entry("İ", is_folder=True, modified=datetime(1, 1, 1, tzinfo=UTC)),
]


@target(st.tuples(QUERIES, st.integers(1, 7)))
def pages_of_listings(value: tuple[bytes, int]) -> None:
    query_string, limit = value
    query = ListingQuery.of(query_string, None)
    window = Window(query, limit)
    for entry in ENTRIES:
        window.add([entry.name], [entry])
    assert len(window.entries) <= limit
    assert window.preceding + len(window.entries) + window.following == len(ENTRIES)
    # all pages from the first on have every entry once
    places: str | None = None
    seen: list[str] = []
    for _ in range(len(ENTRIES)):
        page = Window(ListingQuery(sort=query.sort, is_descending=query.is_descending, after=places), limit)
        page.add([entry.name for entry in ENTRIES], ENTRIES)
        seen += [path for path, _ in page.entries]
        if not page.following:
            break
        places = page.places()[1]
    assert sorted(seen) == sorted(entry.name for entry in ENTRIES)


@target(edited("text/html", "image/svg+xml", "application/pdf", "video/mp4", "audio/x+xml"))
def kinds_of_views(content_type: str) -> None:
    assert kind_of(content_type) in ("image", "pdf", "video", "audio", "text", "other")


HOSTS = edited_bytes(
    b"example.org", b"127.0.0.1:8000", b"[::1]:80", b"[v1.a:b]", b"", b"%41", b"a:b", b"user@h", b"[unix:/s]"
)


@target(HOSTS)
def hosts(host: bytes) -> None:
    if not is_host(host):
        return
    assert re.fullmatch(rb"[!-~]*", host)
    assert not set(b'@/?#\\ "<>') & set(host)
    url = urlsplit(f"http://{host.decode()}/")
    if host.startswith(b"[") and not host.lower().startswith(b"[v"):
        IPv6Address(url.hostname)
    assert url.path == "/"


@target(
    st.tuples(
        edited_bytes(b"/a", b"http://h/a?b", b"*", b"https://u@h:8/x", b"a", b"http:///x", b"HTTP://h", b"/http://x"),
        st.lists(
            st.tuples(
                st.sampled_from([b"host", b"transfer-encoding", b"content-length", b"upgrade", b"x"]),
                HOSTS | edited_bytes(b"chunked", b"gzip, chunked", b"websocket"),
            ),
            max_size=4,
        ),
        st.sampled_from(["1.1", "1.0", "2.0", "1.9", "0.9"]),
        st.booleans(),
        st.booleans(),
    )
)
def heads_of_requests(value: tuple[bytes, list[tuple[bytes, bytes]], str, bool, bool]) -> None:
    target_, headers, version, is_on_unix_socket, is_upgrade = value
    lengths = [text for name, text in headers if name == b"content-length"]
    if any(not re.fullmatch(b"[0-9]{1,18}", text) for text in lengths) or len(lengths) > 1:
        return  # the parser refuses these before
    try:
        sent = list(headers)
        path, length = read_head(sent, target_, version, is_on_unix_socket=is_on_unix_socket, is_upgrade=is_upgrade)
    except Refused as exc:
        assert exc.status in (400, 501, 505)
        return
    found = [text for name, text in sent if name == b"host"]
    assert len(found) == 1 or (version == "1.0" and not found)
    assert all(is_host(host) for host in found)
    assert length is None or length >= 0
    assert b"://" not in target_ or path.startswith(b"/")
    codings = [text.lower() for name, text in headers if name == b"transfer-encoding"]
    assert (length is None) == bool(codings)
    assert not (codings and lengths)


@target(
    st.lists(
        st.tuples(
            st.sampled_from([b"content-length", b"transfer-encoding", b"expect"]), edited_bytes(b"10", b"chunked")
        )
    )
)
def bodies_that_are_not_read(headers: list[tuple[bytes, bytes]]) -> None:
    assert isinstance(
        close_after_body({"type": "http", "headers": headers, "method": "GET", "http_version": "1.1"}), dict
    )


# --- whole applications

FILES = {"a.txt": b"0123456789", "sub/b.svg": b"<svg/>", "é π.bin": bytes(256), "sub/c d.html": b"<html>", "empty": b""}


@dataclass(frozen=True, slots=True)
class Applications:
    """Applications with the same files, and the loop that runs them."""

    apps: dict[str, ASGIApp]
    loop: asyncio.AbstractEventLoop


@contextmanager
def applications() -> Iterator[Applications]:
    """Give applications with everything that a download can have."""
    with tempfile.TemporaryDirectory(prefix="downloadview-fuzz-") as name, asyncio.Runner() as runner:
        root = Path(name).resolve() / "root"
        for file, content in FILES.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(content)
            os.utime(root / file, (1_703_505_600,) * 2)
        (root.parent / "secret").write_bytes(b"outside")
        (root / "out").symlink_to("..")
        options = {"listing": True, "archive": True, "attachment": False, "hide": ["*.bin"]}
        apps: dict[str, ASGIApp] = {
            "path": Download(PathSource(root), **options),  # type: ignore[arg-type]
            "memory": Download(StorageSource(MemoryStorage(FILES)), **options),  # type: ignore[arg-type]
        }
        yield Applications(apps, runner.get_loop())


@target_within(
    st.tuples(
        st.sampled_from(["path", "memory"]),
        st.sampled_from(["GET", "GET", "HEAD", "POST", "OPTIONS", "FOO"]),
        st.edited_text(
            "/a.txt", "/sub/", "/", "/sub/c d.html", "/é π.bin", "/sub", "/out/secret", "/../secret", "/empty"
        ),
        QUERIES,
        FIELDS,
    ),
    applications,
    regressions=[("path", "GET", "/sub", b"\r", {})],
)
def whole_applications(value: tuple[str, str, str, bytes, dict[bytes, str]], place: Applications) -> None:
    name, method, path, query, fields = value
    if any(0xD800 <= ord(character) < 0xE000 for character in path):
        path = path.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # as a server does
    headers = [(field.decode(), text) for field, text in fields.items()]
    answer = place.loop.run_until_complete(
        call(place.apps[name], path, method=method, query=query.decode("latin-1"), headers=headers)
        if query.isascii()
        else call(place.apps[name], path, method=method, headers=headers, scope={"query_string": query})
    )
    assert answer.complete
    assert answer.status in (200, 202, 204, 206, 303, 304, 307, 308, 400, 404, 405, 412, 416), answer.status
    for field, text in answer.messages[0]["headers"]:
        assert re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", field)
        assert re.fullmatch(rb"[\t\x20-\x7e\x80-\xff]*", text), (field, text)
    assert b"outside" not in answer.body
    length = answer.headers.get("content-length")
    if method == "HEAD" or answer.status in (204, 304):
        assert answer.body == b""
    elif length is not None:
        assert len(answer.body) == int(length)
    if method not in ("GET", "HEAD", "OPTIONS"):
        assert answer.status in (404, 405)
    if answer.status == 206 and "content-range" in answer.headers:
        part = re.fullmatch("bytes ([0-9]+)-([0-9]+)/([0-9]+)", answer.headers["content-range"])
        assert part is not None
        whole = [content for content in FILES.values() if len(content) == int(part[3])]
        if whole:
            assert answer.body in [content[int(part[1]) : int(part[2]) + 1] for content in whole]
