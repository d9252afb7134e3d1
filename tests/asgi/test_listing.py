"""Listings of folders: what is on a page, in which order and form, and what must not be listed."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi.listing import entries as folders
from downloadview_async.asgi.listing.order import Window, natural_keys
from downloadview_async.asgi.listing.page import shown_size
from downloadview_async.asgi.listing.query import ListingQuery
from downloadview_async.testing import call
from tests.live import ask, live

pytestmark = pytest.mark.asyncio
SIGNER = dv.URLSigner({"2026a": bytes(range(32))})
TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Links(HTMLParser):
    """The links of a page, each with its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self._is_in_link = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        href = dict(attrs).get("href")
        if tag == "a" and href is not None:
            self.links.append((href, ""))
            self._is_in_link = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._is_in_link = False

    def handle_data(self, data: str) -> None:
        if self._is_in_link:
            href, text = self.links[-1]
            self.links[-1] = (href, text + data)


class Many:
    """A source whose folders have the entries that are given."""

    def __init__(self, **entries: list[dv.Entry]) -> None:
        self.entries = {name.replace("__", "/"): given for name, given in entries.items()}
        self.listed: list[str] = []

    async def resolve(self, name: str) -> dv.AsyncFile:
        raise dv.FileMissing("nothing is here")

    async def list(self, folder: str = "", /) -> AsyncIterator[dv.Entry]:
        self.listed.append(folder)
        if (folder or "top") not in self.entries:
            raise dv.FileMissing("no such folder")
        for entry in self.entries[folder or "top"]:
            yield entry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "file10.txt", "file2.txt", ".env", ".git/config", "sub/b.txt", "sub/deeper/file3.txt"):
        (tmp_path / name).write_bytes(b"0123456789")
    return tmp_path


def app(source: dv.Source, **options: Any) -> ASGIApp:
    download = dv.Download(source, **{"listing": True, **options})
    return Starlette(routes=[Route("/files/{path:path}", download), Mount("/m", download)])


def resolved(path: str, reference: str) -> str:
    """Return the path of a relative reference as RFC 3986 says: `urljoin` drops empty segments, browsers do not."""
    segments = [segment for segment in path.split("/")[:-1] if segment not in (".", "%2e")]
    for segment in reference.split("/"):
        if segment == "..":
            segments.pop()
        elif segment != ".":
            segments.append(segment)
    return "/".join(segments)


def names_of(page: bytes) -> list[str]:
    rows = page.decode().partition("<tbody>")[2].partition("</table>")[0]
    return [text for _, text in Links(rows).links]


async def json_of(endpoint: ASGIApp, path: str, query: str = "") -> Any:
    answer = await call(endpoint, path, query=query, headers={"Accept": "application/json"})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.body)


async def test_a_page_has_the_entries_and_links_that_lead_to_them(root: Path) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    answer = await call(endpoint, "/files/")
    page = answer.body.decode()
    assert names_of(answer.body) == ["empty/", "sub/", "a.txt", "file2.txt", "file10.txt"]
    assert "2 folders, 3 files, 30 B" in page
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["vary"] == "Accept"
    for href, _ in Links(page.partition("<tbody>")[2]).links:
        assert (await call(endpoint, urlsplit(urljoin("http://x/files/", href)).path)).status == 200


@pytest.mark.parametrize(
    "path, location",
    [
        ("/files/sub", "./sub/"),
        ("/m/sub/deeper", "./deeper/"),
        ("/files//evil.example", None),
        ("/files//sub", "./sub/"),
        ("/files//sub/", "../../sub/"),
        ("/files/sub//deeper/", "../../../sub/deeper/"),
        ("/files/sub%2Fdeeper/", "../sub/deeper/"),
        ("/files/sub%2Fdeeper", "./sub%2Fdeeper/"),
        ("/files/sub%2F", "sub/"),
        ("/files/sub/./", "../sub/"),
        ("/files/./sub/deeper/", "../../sub/deeper/"),
        ("/files/sub/%2e//deeper/", "../../../sub/deeper/"),
        ("/files/sub/.", "././"),
        ("/files/..%2F", None),
        ("/files/sub%2F..%2F", None),
        (f"/files/{'/' * 4096}", None),
    ],
)
async def test_each_folder_has_one_url(root: Path, path: str, location: str | None) -> None:
    async with live(app(dv.PathSource(root)), root_path="/prefix") as port:
        answer = await ask(port, f"{path}?format=json")
        if location is None:
            assert answer.status == 404
            return
        assert (answer.status, answer.headers["location"]) == (308, f"{location}?format=json")
        target = answer.headers["location"]
        for _ in range(3):
            path = resolved(path, target.partition("?")[0])
            answer = await ask(port, f"{path}?format=json")
            if answer.status == 200:
                break
            target = answer.headers["location"]
    assert answer.status == 200
    assert path.endswith(("/sub/", "/sub/deeper/"))


@pytest.mark.parametrize(
    "query, expected", [("q=a%0D", "q=a%0D"), ("q=\r\nX: y\x7f", "q=%0D%0AX:%20y%7F"), ("q=\xe9^`", "q=%E9^`")]
)
async def test_a_query_cannot_make_another_field(root: Path, query: str, expected: str) -> None:
    answer = await call(app(dv.PathSource(root)), "/files/sub", scope={"query_string": query.encode("latin-1")})
    assert (answer.status, answer.headers["location"]) == (308, f"./sub/?{expected}")


async def test_a_name_cannot_make_a_redirect_to_another_host(tmp_path: Path) -> None:
    for name in ("evil.example", "a:b", "http:"):
        (tmp_path / name).mkdir()
    endpoint = dv.Download(dv.PathSource(tmp_path, names="any"), listing=True)
    for path, expected in {
        "//evil.example": "./evil.example/",
        "/a:b": "./a%3Ab/",
        "/http:": "./http%3A/",
        "//http:///": "../../../../http%3A/",
    }.items():
        answer = await call(endpoint, path)
        assert (answer.status, answer.headers["location"]) == (308, expected)


async def test_without_a_listing_a_folder_is_missing(root: Path) -> None:
    for path in ("/files/", "/files/sub", "/files/sub/"):
        assert (await call(app(dv.PathSource(root), listing=False), path)).status == 404


async def test_what_is_missing_and_what_is_hidden_give_the_same_answer(root: Path) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    paths = ("/files/nothing", "/files/nothing/", "/files/.git", "/files/.git/", "/files/.env", "/files/a.txt/")
    answers = [await call(endpoint, path) for path in paths]
    assert {(answer.status, answer.body, tuple(sorted(answer.headers.items()))) for answer in answers} == {
        (404, b"Not Found", tuple(sorted(answers[0].headers.items())))
    }


async def test_hidden_entries_are_in_no_form_of_the_listing(root: Path) -> None:
    for name in ("..\\..\\shadow", "x\\.env", "file2\\x"):
        (root / name).write_bytes(b"")
    endpoint = app(dv.PathSource(root, names="any"), hide=[".*", "FILE2*"])
    for query in ("", "format=json", "format=ndjson", "q=o&deep=1", "q=file&deep=1&format=json", "q=git&deep=1"):
        body = (await call(endpoint, "/files/", query=query)).body
        listed = body.partition(b"<main>")[2] or body
        assert not re.search(rb"\.env|\.git|config|file2|shadow", listed), query
    assert (await call(endpoint, "/files/..%5C..%5Cshadow")).status == 404


async def test_access_decides_once_before_anything_is_read() -> None:
    source, asked_for = Many(top=[dv.Entry("a.txt")], secret=[dv.Entry("b.txt")]), []

    async def access(request: Request, name: str) -> bool:
        asked_for.append(name)
        return not name.startswith("secret")

    endpoint = app(source, access=access)
    answer = await call(endpoint, "/files/")
    assert answer.status == 200
    assert answer.headers["cache-control"] == "private, no-cache"
    refused = [await call(endpoint, path) for path in ("/files/secret/", "/files/secret", "/files/secret//")]
    assert {answer.status for answer in refused} == {404}
    assert asked_for == ["", "secret/", "secret", "secret//"]
    assert source.listed == [""]


async def test_access_decides_about_a_folder_before_the_source_is_asked_for_it() -> None:
    source, decided = Many(top=[], secret=[dv.Entry("b.txt")], open=[]), []

    async def access(request: Request, name: str) -> bool:
        decided.append(name)
        if name in ("secret/", "nothing/"):
            raise dv.AuthenticationRequired("a password is needed", challenge='Basic realm="x"')
        return True

    endpoint = app(source, access=access)
    answers = [await call(endpoint, path) for path in ("/files/secret", "/files/nothing")]
    assert {(answer.status, answer.body) for answer in answers} == {(401, b"Unauthorized")}
    assert decided == ["secret", "secret/", "nothing", "nothing/"]
    assert source.listed == []
    assert (await call(endpoint, "/files/open")).status == 308
    assert source.listed == ["open"]


async def test_a_listing_asks_access_once_about_a_folder_however_its_name_is_written() -> None:
    source, decided = Many(top=[], secret=[], open=[]), []

    async def access(request: Request, name: str) -> bool:
        decided.append(name)
        return not name.startswith("secret")

    listing = Starlette(routes=[Route("/l/{path:path}", dv.Listing(source, access=access))])
    statuses = [(await call(listing, f"/l/{path}")).status for path in ("", "open", "secret", "a.txt")]
    assert statuses == [200, 308, 404, 404]
    assert decided == ["", "open/", "secret/", "a.txt/"]
    assert source.listed == ["", "open", "a.txt"]


async def test_a_link_lists_one_folder_and_nothing_else(root: Path) -> None:
    endpoint = app(dv.PathSource(root), access=dv.SignedLinks(SIGNER))
    link = urlsplit(SIGNER.sign("/files/sub/"))
    answer = await call(endpoint, link.path, query=link.query)
    assert names_of(answer.body) == ["deeper/", "b.txt"]
    assert answer.headers["cache-control"] == "private, no-store"
    assert "<form" not in answer.body.decode()
    assert [href for href, _ in Links(answer.body.decode()).links if "?" in href] == []
    for path in ("/files/", "/files/sub/deeper/", "/files/sub", "/files/sub/b.txt", "/files/sub//"):
        assert (await call(endpoint, path, query=link.query)).status == 403
    for extra in ("&format=json", "&q=b&deep=1", "&sort=size"):
        assert (await call(endpoint, link.path, query=link.query + extra)).status == 403


async def test_a_link_that_counts_its_uses_lists_nothing(root: Path) -> None:
    signer = dv.URLSigner({"2026a": bytes(range(32))}, store=dv.MemoryGrantStore())
    link = urlsplit(signer.sign("/files/sub/", uses=1))
    answer = await call(app(dv.PathSource(root), access=dv.SignedLinks(signer)), link.path, query=link.query)
    assert answer.status == 403


async def test_methods(root: Path) -> None:
    endpoint = app(dv.PathSource(root))
    page, head = await call(endpoint, "/files/"), await call(endpoint, "/files/", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert dict(head.headers) == dict(page.headers)
    lines = await call(endpoint, "/files/", method="HEAD", query="format=ndjson")
    assert (lines.status, lines.body) == (200, b"")
    assert (await call(endpoint, "/files/", method="OPTIONS")).status == 204
    refused = await call(endpoint, "/files/", method="POST")
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


async def test_a_page_that_has_not_changed_is_not_sent_again(root: Path) -> None:
    endpoint = app(dv.PathSource(root))
    tag = (await call(endpoint, "/files/")).headers["etag"]
    again = await call(endpoint, "/files/", headers={"If-None-Match": tag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    (root / "new.txt").touch()
    assert (await call(endpoint, "/files/", headers={"If-None-Match": tag})).status == 200
    assert (await call(endpoint, "/files/", headers={"If-Match": '"x"'})).status == 412


async def test_json() -> None:
    entries = [
        dv.Entry('q"<\\é.txt', size=5, modified=TIME, content_type="text/x-odd"),
        dv.Entry("folder", is_folder=True),
        dv.Entry("unknown.png"),
    ]
    document = await json_of(app(Many(top=entries)), "/files/")
    assert document == {
        "path": "",
        "entries": [
            {"name": "folder", "kind": "folder", "size": None, "modified": None, "type": None, "url": "folder/"},
            {
                "name": 'q"<\\é.txt',
                "kind": "file",
                "size": 5,
                "modified": "2026-01-02T03:04:05Z",
                "type": "text/x-odd",
                "url": "q%22%3C%5C%C3%A9.txt",
            },
            {"name": "unknown.png", "kind": "file", "size": None, "modified": None, "type": "image/png"}
            | {"url": "unknown.png"},
        ],
        "next": None,
    }
    lines = (await call(app(Many(top=entries)), "/files/", headers={"Accept": "application/x-ndjson"})).body
    by_name = {line["name"]: line for line in map(json.loads, lines.splitlines())}
    assert list(by_name.values()) == [by_name[entry.name] for entry in entries]
    assert sorted(by_name) == sorted(entry["name"] for entry in document["entries"])


async def test_an_empty_folder_says_so(root: Path) -> None:
    endpoint = app(dv.PathSource(root))
    assert b"This folder is empty." in (await call(endpoint, "/files/empty/")).body
    assert (await json_of(endpoint, "/files/empty/"))["entries"] == []
    assert (await call(endpoint, "/files/empty/", query="format=ndjson")).body == b""
    assert b"Nothing matches." in (await call(endpoint, "/files/", query="q=zzz")).body


@pytest.mark.parametrize("sort", ["name", "size", "modified", "type"])
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_have_every_entry_once_in_order(sort: str, order: str) -> None:
    entries = [
        dv.Entry(f"f{number}.{'txt' if number % 3 else 'png'}", size=number % 7, modified=TIME + timedelta(number % 5))
        for number in range(1200)
    ]
    entries += [dv.Entry(f"d{number}", is_folder=True) for number in range(3)]
    endpoint = app(Many(top=entries))
    query: str | None = f"sort={sort}&order={order}"
    pages = []
    while query is not None:
        document = await json_of(endpoint, "/files/", query)
        pages.append(document["entries"])
        query = document["next"] and document["next"].removeprefix("?")
    assert [len(page) for page in pages] == [500, 500, 203]
    seen = [entry for page in pages for entry in page]
    assert len({entry["name"] for entry in seen}) == 1203
    assert {entry["kind"] for entry in seen[:3]} == {"folder"}
    if sort in ("size", "modified", "type"):
        values = [entry[sort] for entry in seen[3:]]
        assert values == sorted(values, reverse=order == "desc")
    else:
        numbers = [int(re.sub(r"\D", "", entry["name"])) for entry in seen[3:]]
        assert numbers == sorted(numbers, reverse=order == "desc")
    # back again, by the links of the page for people
    links = dict(await _neighbours(endpoint, f"sort={sort}&order={order}"))
    assert set(links) == {"next"}
    links = dict(await _neighbours(endpoint, links["next"].removeprefix("?")))
    assert set(links) == {"prev", "next"}
    back = await call(endpoint, "/files/", query=links["prev"].removeprefix("?"))
    assert [name.rstrip("/") for name in names_of(back.body)] == [entry["name"] for entry in pages[0]]
    assert b"1 to 500 are shown" in back.body


async def test_a_type_may_have_any_character() -> None:
    types = ["text/,", "text/a,b", "text/a%2Cb", "text/\u00e9"]
    entries = [dv.Entry(f"f{number}", content_type=types[number // 600]) for number in range(2400)]
    endpoint = app(Many(top=entries))
    seen, query = [], "sort=type"
    while query:
        document = await json_of(endpoint, "/files/", query)
        seen += [entry["name"] for entry in document["entries"]]
        assert len(seen) <= len(entries)
        query = (document["next"] or "").removeprefix("?")
    assert sorted(seen) == sorted(entry.name for entry in entries)


async def _neighbours(endpoint: ASGIApp, query: str) -> list[tuple[str, str]]:
    page = (await call(endpoint, "/files/", query=query)).body.decode()
    return [(rel, unescape(href)) for rel, href in re.findall(r'<a rel=(\w+) href="([^"]*)"', page)]


@pytest.mark.parametrize("place", ["", "x", "f", "f,", "d,1,", "e,x,a", "f,,a\nb", "f,-,", "f,2026-01-01,a", "f,,%00"])
@pytest.mark.parametrize("sort", ["name", "size", "modified", "type"])
async def test_a_place_that_is_not_one_is_ignored(place: str, sort: str) -> None:
    window = Window(ListingQuery(sort=sort, after=place), 500)  # type: ignore[arg-type]
    window.add(["z.txt"], [dv.Entry("z.txt", size=10**9, modified=TIME)])
    assert [path for path, _ in window.entries] == ["z.txt"]


@pytest.mark.parametrize("size", ["1_0", " 10", "+10", "-2", "\u0661\u0660", "9" * 41, "9" * 5000])
async def test_a_size_in_a_place_is_ascii_digits(size: str) -> None:
    window = Window(ListingQuery(sort="size", after=f"f,{size},a"), 500)
    window.add(["z.txt"], [dv.Entry("z.txt", size=0)])
    assert [path for path, _ in window.entries] == ["z.txt"]


async def test_the_heads_of_the_table_change_the_order(root: Path) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    page = (await call(endpoint, "/files/", query="sort=size&order=asc&q=file")).body.decode()
    assert page.count("aria-sort") == page.count("[aria-sort") + 1
    assert re.search(r'<th scope=col aria-sort=ascending><a href="\?q=file&amp;sort=size&amp;order=desc">Size', page)
    assert re.search(r'<th scope=col><a href="\?q=file">Name', page)


async def test_a_search_below_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    body = (await call(endpoint, "/files/", query="q=FILE&deep=1")).body
    assert names_of(body) == ["file2.txt", "file10.txt", "sub/deeper/file3.txt"]
    assert names_of((await call(endpoint, "/files/", query="q=FILE")).body) == ["file2.txt", "file10.txt"]
    assert names_of((await call(endpoint, "/files/", query="deep=1")).body)[:2] == ["empty/", "sub/"]
    monkeypatch.setattr(folders, "MAX_DEEP_FOLDERS", 2)
    body = (await call(endpoint, "/files/", query="q=FILE&deep=1")).body
    assert b"the search has ended early" in body
    endless = Many(top=[dv.Entry("loop", is_folder=True)])
    for depth in range(1, 10):
        endless.entries["/".join(["loop"] * depth)] = [dv.Entry("loop", is_folder=True)]
    await call(app(endless), "/files/", query="q=x&deep=1")
    assert len(endless.listed) == 2


@pytest.mark.parametrize("query", ["q=file&deep=1", "q=file&d%65ep=1&format=json", "q=file&deep=%31&format=ndjson"])
async def test_a_search_below_leaves_out_folders_that_are_refused(root: Path, query: str) -> None:
    (root / "sub" / "private").mkdir()
    (root / "sub" / "private" / "secret-file").touch()
    asked: list[str] = []

    async def access(request: Request, name: str) -> bool:
        asked.append(name)
        return not name.startswith("sub/private/")

    endpoint = app(dv.PathSource(root), hide=[".*"], access=access)
    body = (await call(endpoint, "/files/", query=query)).body
    assert b"file3.txt" in body
    assert b"secret-file" not in body
    assert asked == ["", "empty/", "sub/", "sub/deeper/", "sub/private/"]


async def test_a_search_below_ends_if_access_cannot_decide(root: Path) -> None:
    async def access(request: Request, name: str) -> bool:
        if name == "sub/":
            raise RuntimeError("the database does not answer")
        return True

    endpoint = app(dv.PathSource(root), hide=[".*"], access=access)
    assert (await call(endpoint, "/files/", query="q=file&deep=1")).status == 503


async def test_a_search_below_looks_into_each_folder_once(tmp_path: Path) -> None:
    (tmp_path / "debian" / "pool").mkdir(parents=True)
    (tmp_path / "debian" / "pool" / "file.deb").touch()
    (tmp_path / "debian" / "debian").symlink_to(".")
    (tmp_path / "debian" / "pool" / "back").symlink_to("../..")
    (tmp_path / "debian" / "stable").symlink_to("pool")
    cached = dv.CachedSource(dv.PathSource(tmp_path), dv.Cache(tmp_path / ".cache"), name="files")
    for source in (dv.PathSource(tmp_path), dv.StorageSource(dv.DirectoryStorage(tmp_path)), cached):
        for path, expected in {
            "/files/": ["debian/pool/file.deb"],
            "/files/debian/": ["pool/file.deb"],
            "/files/debian/debian/": ["pool/file.deb"],
        }.items():
            document = await json_of(app(source, hide=[".*"]), path, "q=file&deep=1")
            assert [entry["name"] for entry in document["entries"]] == expected


async def test_a_listing_alone_sends_no_files(root: Path) -> None:
    endpoint = dv.Listing(dv.PathSource(root), pages=dv.Pages(title="<Ours>", footer="a & b"))
    listing = Starlette(routes=[Mount("/l", endpoint)])
    page = (await call(listing, "/l/sub/")).body.decode()
    assert "<title>sub - &lt;Ours&gt;</title>" in page
    assert "a &amp; b" in page
    assert (await call(listing, "/l/sub")).headers["location"] == "./sub/"
    assert (await call(listing, "/l/a.txt")).status == 404


async def test_what_cannot_be_listed_is_refused() -> None:
    with pytest.raises(dv.ConfigurationError, match="cannot list"):
        dv.Listing(dv.VirtualSource(lambda name: b""))
    with pytest.raises(dv.ConfigurationError, match="True, False or Pages"):
        dv.Download(Many(), listing="yes")  # type: ignore[arg-type]
    with pytest.raises(dv.ConfigurationError, match="style"):
        dv.Pages(style="</style>")
    with pytest.raises(dv.ConfigurationError, match="script"):
        dv.Pages(script="</script>")


async def test_a_route_whose_parameter_matches_no_slash_is_refused(root: Path) -> None:
    endpoint = Starlette(routes=[Route("/files/{name}", dv.Download(dv.PathSource(root), listing=True))])
    for path in ("/files/sub", "/files/a.txt", "/files/none"):  # whatever is asked for first
        with pytest.raises(dv.ConfigurationError, match="matches no slashes"):
            await call(endpoint, path)
    two = dv.Download(dv.PathSource(root), listing=True)
    endpoint = Starlette(routes=[Route("/all/{path:path}", two), Route("/files/{name}", two)])
    for _ in range(2):
        assert (await call(endpoint, "/all/a.txt")).status == 200
        with pytest.raises(dv.ConfigurationError, match="matches no slashes"):
            await call(endpoint, "/files/a.txt")


async def test_a_key_that_a_function_makes(root: Path) -> None:
    download = dv.Download(dv.PathSource(root), key=lambda request: f"sub/{request.path_params['p']}", listing=True)
    endpoint = Starlette(routes=[Route("/my/{p:path}", download)])
    page = (await call(endpoint, "/my/deeper/")).body.decode()
    assert [link for link in Links(page).links if link[1] in ("Files", "deeper")] == [("../", "Files")]
    assert (await json_of(endpoint, "/my/deeper/"))["path"] == "deeper"


async def test_headers_of_the_application_are_sent_but_not_those_of_files(root: Path) -> None:
    headers = {"X-Robots-Tag": "noindex", "Vary": "Cookie", "Content-Security-Policy": "sandbox"}
    answer = await call(app(dv.PathSource(root), headers=headers, cache_control="max-age=60"), "/files/")
    assert answer.headers["x-robots-tag"] == "noindex"
    assert answer.headers["vary"] == "Accept, Cookie"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")


async def test_a_failure_in_the_middle_of_lines_aborts_them() -> None:
    class Failing(Many):
        async def list(self, folder: str = "", /) -> AsyncIterator[dv.Entry]:
            for number in range(folders.BATCH + 1):
                yield dv.Entry(str(number))
            raise dv.SourceUnavailable("the disk has gone")

    with pytest.raises(dv.TransferAborted):
        await call(app(Failing()), "/files/", query="format=ndjson")
    assert (await call(app(Failing()), "/files/")).status == 503


async def test_lines_of_many_entries_take_the_memory_of_a_few() -> None:
    class Million(Many):
        most = 0
        left = 0

        async def list(self, folder: str = "", /) -> AsyncIterator[dv.Entry]:
            for number in range(200_000):
                yield dv.Entry(f"file{number}.txt", size=number, modified=TIME)

    largest = count = 0

    async def send(message: Any) -> None:
        nonlocal largest, count
        body = message.get("body", b"")
        largest, count = max(largest, len(body)), count + body.count(b"\n")

    async def receive() -> Any:
        await never.wait()

    never = asyncio.Event()
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"format=ndjson", "headers": []}
    await dv.Listing(Million())(scope, receive, send)
    assert count == 200_000
    assert largest < 128 * 1024


async def test_names_that_no_url_can_have_are_left_out() -> None:
    names = ["a.txt", "", ".", "..", "x/y", "b\nc", "\udc80", "\0", "ok"]
    endpoint = app(Many(top=[dv.Entry(name) for name in names]))
    assert names_of((await call(endpoint, "/files/")).body) == ["a.txt", "ok"]
    assert [entry["name"] for entry in (await json_of(endpoint, "/files/"))["entries"]] == ["a.txt", "ok"]


HOSTILE = [
    '"', "'", "<script>alert(1)<script>", "&amp;", "100%", "%2e%2e", "%00", "?q=1", "#top", ";x=1", "a\\b", "..%5c",
    "\u202egpj.exe", "שלום.txt", "مرحبا بالعالم", "😀👩‍👩‍👧.png", "-rf", "--", "a b", " lead", "trail ", "~", "{{7*7}}",
    "${x}", "javascript:alert(1)", "http:", "a:b", "C:", "CON", "x" * 255, "é" * 127, "e\u0301", "\u00e9", "ﬁ", "...",
    "a&b=c", "a=b", "+", "a+b", "@", "[x]", "|", "^", "`", "<!--", "-->", "]]>", "<title>", "<img src=x onerror=x>",
    "\u2028", "\u200f", "\u00a0", "0", "null", "index.html", "*", "a,b", "(", "İ", "ß", "\ufeffbom",
]  # fmt: skip


async def test_every_hostile_name_leads_to_its_file(tmp_path: Path) -> None:
    names = [*HOSTILE, *(f"{name[:100]}{number}" for number in range(4) for name in HOSTILE)][:300]
    names = [name for name in dict.fromkeys(names) if len(name.encode()) <= 255]
    assert len(names) >= 280
    for number, name in enumerate(names):
        (tmp_path / name).write_text(str(number))
    (tmp_path / "<b>dir'\"").mkdir()
    (tmp_path / "<b>dir'\"" / "in").write_text("inside")
    source = dv.PathSource(tmp_path, names="any")
    async with live(app(source)) as port:
        page = (await ask(port, "/files/")).body.decode()
        parsed = Links(page)
        assert {"script", "img", "b"} & set(parsed.tags) <= {"script"}
        assert parsed.tags.count("script") == 1
        links = Links(page.partition("<tbody>")[2].partition("</table>")[0]).links
        expected = {name: str(number) for number, name in enumerate(names)}
        assert len(links) == len(names) + 1
        for href, text in links:
            if text.endswith("/"):
                inside = await ask(port, f"/files/{href}in")
                assert inside.body == b"inside"
                continue
            target = urlsplit(urljoin(f"http://127.0.0.1:{port}/files/", href))
            assert (target.netloc, target.query, target.fragment) == (f"127.0.0.1:{port}", "", "")
            answer = await ask(port, target.path)
            # what turns the direction of a text is not shown
            name = {"\ufffdgpj.exe": "\u202egpj.exe"}.get(text[:8], text[:8]) + text[8:]
            assert (answer.status, answer.body.decode()) == (200, expected.pop(name))
        assert not expected
        lines = (await ask(port, "/files/?format=ndjson")).body.decode().splitlines()
        assert {json.loads(line)["name"] for line in lines} == {*names, "<b>dir'\""}


async def test_view_pages_can_be_reached_without_a_script(root: Path) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    page = (await call(endpoint, "/files/", query="sort=size&q=t")).body.decode()
    switch = {text: href for href, text in Links(page).links}["View files"]
    assert switch == "?q=t&sort=size&view"
    page = (await call(endpoint, "/files/", query="view")).body.decode()
    rows = page.partition("<tbody>")[2]
    assert [href for href, _ in Links(rows).links][1:3] == ["sub/?view", "a.txt?view"]
    assert "<h1><bdi>a.txt" in (await call(endpoint, "/files/a.txt", query="view")).body.decode()
    links = {text: href for href, text in Links(page.partition("<tbody>")[0]).links}
    assert (links["Download files"], links["Size"]) == ("./", "?sort=size&view")
    assert '<input type=hidden name=view value="">' in page
    below = (await call(endpoint, "/files/sub/", query="view")).body.decode()
    assert Links(below).links[0] == ("../?view", "Files")
    assert [text for _, text in Links((await call(endpoint, "/files/empty/")).body.decode()).links] == ["Files"]


async def test_the_archive_of_a_folder_has_more_than_a_filter_shows(root: Path) -> None:
    endpoint = app(dv.PathSource(root), archive=True)
    for query, text in (("", "Download as zip"), ("q=a", "Download the whole folder as zip")):
        links = Links((await call(endpoint, "/files/", query=query)).body.decode()).links
        assert ("?archive=zip", text) in links


@pytest.mark.parametrize("query", ["", "view"])
async def test_500_entries_fit_into_60_kib(query: str) -> None:
    entries = [dv.Entry(f"file{number}.txt", size=number * 999, modified=TIME) for number in range(500)]
    assert len((await call(app(Many(top=entries)), "/files/", query=query)).body) <= 60 * 1024


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_large_folder_has_the_same_pages_without_its_total_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    for number in range(7):
        (tmp_path / f"file{number}.txt").write_bytes(b"0" * number)
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").write_bytes(b"")
    endpoint = app(dv.PathSource(tmp_path), hide=[".*"])
    monkeypatch.setattr(folders, "PAGE_SIZE", 3)
    pages = []
    for most in (5000, 0):
        monkeypatch.setattr(folders, "MAX_DESCRIBED", most)
        link: str | None = f"?order={order}&format=json"
        documents = []
        while link is not None:
            documents.append(json.loads((await call(endpoint, "/files/", query=link.removeprefix("?"))).body))
            link = documents[-1].pop("next")
            link = link and f"{link}&format=json"
        pages.append([document["entries"] for document in documents])
        page = (await call(endpoint, "/files/")).body
        assert b"1 folder, 7 files" in page
        assert (b"21 bytes" in page or b"21 B" in page) == (most == 5000)
    assert pages[0] == pages[1]
    assert [len(page) for page in pages[0]] == [3, 3, 2]


@pytest.mark.parametrize("query", ["", "sort=size", "sort=type", "q=9", "q=9&deep=1", "format=ndjson"])
@pytest.mark.parametrize("is_local", [True, False])
async def test_other_requests_get_their_turn_between_the_batches_of_a_large_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str, is_local: bool
) -> None:
    names = [f"file{number}.txt" for number in range(8 * folders.BATCH)]
    if is_local:
        for name in names:
            (tmp_path / name).touch()
    source = dv.PathSource(tmp_path) if is_local else Many(top=[dv.Entry(name) for name in names])
    turn = 0
    steps: list[tuple[int, int]] = []
    shown = folders.FolderEntries._shown

    def recorded(endpoint: folders.FolderEntries, entries: Sequence[dv.Entry]) -> list[dv.Entry]:
        steps.append((turn, len(entries)))
        return shown(endpoint, entries)

    async def take_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(folders.FolderEntries, "_shown", recorded)
    others = asyncio.create_task(take_turns())
    assert (await call(app(source), "/files/", query=query)).status == 200
    others.cancel()
    assert sum(count for _, count in steps) == len(names)
    assert max(count for _, count in steps) <= folders.BATCH
    assert len({turn for turn, _ in steps}) == len(steps)


@pytest.mark.parametrize("query", ["", "format=json"])
async def test_other_requests_get_their_turn_between_the_rows_of_a_page(query: str) -> None:
    turn = 0
    turns = []

    class Watched(datetime):
        """A time that notes when it is written into the page."""

        def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
            turns.append(turn)
            return super().isoformat(sep, timespec)

    async def take_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    entries = [dv.Entry(f"file{number}", modified=Watched(2026, 1, 1, tzinfo=UTC)) for number in range(500)]
    await call(app(Many(top=entries)), "/files/", query=query)
    others.cancel()
    assert len(turns) == 500
    assert max(map(turns.count, turns)) <= 50


@pytest.mark.parametrize("query", ["q=FILE", "q=file&sort=type", "q=file&deep=1", "q=file&deep=1&order=desc"])
async def test_a_search_in_a_large_folder_describes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            (tmp_path / folder / f"file{number}.txt").write_bytes(b"0" * number)
    (tmp_path / "file9.txt").write_bytes(b"0" * 9)
    (tmp_path / "z\\file.txt").write_bytes(b"")
    endpoint = app(dv.PathSource(tmp_path, names="any"), hide=["*2.txt", "Z*"])
    whole = await json_of(endpoint, "/files/", query)
    assert len(whole["entries"]) == (7 if "deep" in query else 1)
    assert all(entry["size"] == int(entry["name"][-5]) for entry in whole["entries"])
    for most in (0, 1, 3):
        monkeypatch.setattr(folders, "MAX_DESCRIBED", most)
        assert await json_of(endpoint, "/files/", query) == whole


async def test_a_page_whose_entries_have_all_vanished_leads_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreadable(dv.PathSource):
        async def describe(self, folder: str, names: Sequence[str], /) -> list[dv.Entry]:
            return [entry for entry in await super().describe(folder, names) if entry.name >= "file4"]

    for number in range(9):
        (tmp_path / f"file{number}.txt").touch()
    monkeypatch.setattr(folders, "PAGE_SIZE", 3)
    monkeypatch.setattr(folders, "MAX_DESCRIBED", 0)
    endpoint = app(Unreadable(tmp_path))
    page = (await call(endpoint, "/files/")).body
    assert b"There is nothing on this page." in page
    assert b" are shown" not in page
    names, link = [], "?format=json"
    for _ in range(3):
        document = json.loads((await call(endpoint, "/files/", query=link.removeprefix("?"))).body)
        names.append([entry["name"] for entry in document["entries"]])
        link = document["next"]
    assert names == [[], ["file4.txt", "file5.txt"], ["file6.txt", "file7.txt", "file8.txt"]]
    assert link is None


async def test_natural_order() -> None:
    names = ["b", "File10", "file2", "a", "file", "file02", "2", "10", "1"]
    ordered = [name for _, name in sorted(zip(natural_keys(names), names, strict=True))]
    assert ordered == ["1", "2", "10", "a", "b", "file", "file02", "file2", "File10"]
    assert natural_keys([]) == []


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10240, "10 KiB"), (2**20, "1.0 MiB"), (2**60, "1024 PiB")],
)
async def test_sizes(size: int, text: str) -> None:
    assert shown_size(size) == text
