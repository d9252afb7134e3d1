"""A link to a folder as a person uses it: each page and each file below it can be reached, and nothing else can."""

import io
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import downloadview_async as dv
from tests.live import Answer, ask, live

pytestmark = pytest.mark.asyncio
SIGNER = dv.URLSigner({"2026a": bytes(range(32))})
PDF = b"%PDF-1.4\n"
NAMES = [
    "a.txt",
    "b&c=d?e#f.txt",
    "100%2F.txt",
    "<i>'\"`.txt",
    "שלום.txt",
    "😀 .txt",
    "k=2026a.txt",
    "; rm.txt",
    "+.txt",
]


class Page(HTMLParser):
    """Every URL in a page that a browser may ask for: links, images, frames, what the script uses, and the form."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.fields: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("href", "src", "data-copy", "data-archive"):
            if (url := values.get(name)) and not url.startswith("data:"):
                self.urls.append(url)
        if tag == "input" and values.get("type") in ("hidden", "search", "checkbox"):
            self.fields.append((values["name"] or "", values.get("value") or "txt"))

    @property
    def search(self) -> str | None:
        """The URL of the search form, as a browser encodes it."""
        return f"?{urlencode(self.fields)}" if self.fields else None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shared = tmp_path / "2026"
    for folder in ("2026/sub/deeper", "2026/empty", "2026/.git", "2026/many", "2026/a b & <c>", "2026-secret"):
        (tmp_path / folder).mkdir(parents=True)
    for name in NAMES:
        (shared / name).write_bytes(b"content of " + name.encode())
    for name in ("pic.png", "song.mp3", "page.html", ".env", ".git/config", "sub/b.txt", "sub/deeper/c.txt"):
        (shared / name).write_bytes(b"0123456789")
    (shared / "d.pdf").write_bytes(PDF)
    (shared / "a b & <c>" / "x.txt").write_bytes(b"x")
    for number in range(501):
        (shared / "many" / f"{number}.txt").write_bytes(b"")
    for name in ("top.txt", "2026-secret/s.txt", "2026.txt"):
        (tmp_path / name).write_bytes(b"secret")
    return tmp_path


def application(root: Path, access: Any = None, **options: Any) -> ASGIApp:
    source = dv.PathSource(root)
    options = {
        "listing": True,
        "archive": dv.ArchiveOptions(per_client=None),
        "hide": [".*"],
        "digests": dv.Digests(source, background=False),
        "access": access or dv.SignedLinks(SIGNER),
        **options,
    }
    download = dv.Download(source, **options)
    return Starlette(routes=[Route("/files/{path:path}", download), Mount("/m", download)])


def with_parameters(link: str, parameters: str) -> str:
    return f"{link}&{parameters}"


def is_page(answer: Answer) -> bool:
    return answer.headers["content-type"].startswith("text/html") and "content-disposition" not in answer.headers


async def crawled(port: int, folder: str, *links: str) -> dict[str, Answer]:
    """Click on everything, beginning with some links, as a browser does; return the answers by their URLs."""
    left, answers = [*links], dict[str, Answer]()
    while left:
        url = left.pop()
        if url in answers:
            continue
        assert unquote(urlsplit(url).path).startswith(folder), url
        answer = answers[url] = await ask(port, url)
        if is_page(answer):
            page = Page(answer.body.decode())
            urls = [*page.urls, *([page.search] if page.search and "q=" not in url else [])]
            left += [urljoin(url, found) for found in urls if "order=" not in found or "order=" not in url]
    return answers


@pytest.mark.parametrize("prefix", ["/files/", "/m/"])
async def test_everything_in_the_folder_can_be_clicked_and_nothing_leads_out_of_it(root: Path, prefix: str) -> None:
    folder = f"{prefix}2026/"
    async with live(application(root)) as port:
        link = SIGNER.sign(folder, below=True, client="127.0.0.0/8")
        views = [link.replace("?", f"{quote(name)}?view&") for name in ("a.txt", "sub/deeper/c.txt")]  # by the script
        answers = await crawled(port, folder, link, *views)
    wrong = {url: answer.status for url, answer in answers.items() if answer.status != 200}
    assert wrong == {}
    assert {answer.headers["cache-control"] for answer in answers.values()} == {"private, no-store"}
    for url, answer in answers.items():
        if is_page(answer):
            assert answer.headers["referrer-policy"] == "no-referrer", url
        for hidden in (b"secret", b".git", b".env"):
            assert hidden not in answer.body, url
    paths = {unquote(urlsplit(url).path).removeprefix(folder) for url in answers}
    folders = {"", "sub/", "sub/deeper/", "empty/", "many/", "a b & <c>/"}
    files = {*NAMES, "pic.png", "song.mp3", "page.html", "d.pdf", "sub/b.txt", "sub/deeper/c.txt", "a b & <c>/x.txt"}
    files |= {f"many/{number}.txt" for number in range(501)}  # of two pages
    assert paths == folders | files
    queries = {name for url in answers for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)}
    assert queries == {*"kiecbs", "sort", "order", "q", "deep", "after", "before", "archive", "view"}
    archives = [answer.body for url, answer in answers.items() if "archive=zip" in url]
    names = {name for body in archives for name in zipfile.ZipFile(io.BytesIO(body)).namelist()}
    assert {"2026/sub/deeper/c.txt", "deeper/c.txt", "2026/a b & <c>/x.txt"} <= names
    assert not [name for name in names if "secret" in name or ".git" in name or ".env" in name]


async def test_the_pages_begin_at_the_folder(root: Path) -> None:
    async with live(application(root)) as port:
        for folder, path, crumbs in [
            ("/files/2026/", "", []),  # nothing is above it
            ("/files/2026/", "sub/deeper/", ["2026", "sub", "deeper"]),
            ("/files/2026/sub/", "deeper/", ["sub", "deeper"]),
            ("/files/2026/sub/", "b.txt", ["sub", "b.txt"]),
            ("/files/", "2026/sub/b.txt", ["Files", "2026", "sub", "b.txt"]),
            ("/", "files/2026/", ["Files", "2026"]),  # the link is for more than this endpoint has
        ]:
            link = SIGNER.sign(folder, below=True).replace("?", f"{path}?")
            page = (await ask(port, with_parameters(link, "view") if path.endswith("txt") else link)).body.decode()
            trail = page.partition("<nav aria-label=Folders>")[2].partition("</nav>")[0]
            assert [part.partition("</bdi>")[0] for part in trail.split("<bdi>")[1:]] == crumbs


async def test_what_a_person_adds_to_a_link(root: Path) -> None:
    """Parameters before the link's, after them, and among them."""
    async with live(application(root)) as port:
        link = SIGNER.sign("/files/2026/", below=True)
        path, _, query = link.partition("?")
        document = json.loads((await ask(port, with_parameters(link, "format=json&sort=size&order=desc"))).body)
        assert [entry["name"] for entry in document["entries"] if entry["kind"] == "file"][-1] == "d.pdf"
        for entry in document["entries"]:
            assert (await ask(port, urljoin(path, entry["url"]))).status == 200
        many = SIGNER.sign("/files/2026/", below=True).replace("?", "many/?")
        document = json.loads((await ask(port, with_parameters(many, "format=json"))).body)
        assert len(json.loads((await ask(port, urljoin(many, document["next"]))).body)["entries"]) == 1
        lines = (await ask(port, f"{path}?format=ndjson&{query}")).body.splitlines()
        for line in lines:
            assert (await ask(port, urljoin(path, json.loads(line)["url"]))).status == 200
        chosen = await ask(port, f"{path}?archive=zip&name=a.txt&name=sub&{query}")
        names = zipfile.ZipFile(io.BytesIO(chosen.body)).namelist()
        assert names == ["a.txt", "sub/", "sub/b.txt", "sub/deeper/", "sub/deeper/c.txt"]
        part = await ask(port, f"{path}?archive=zip&{query}", headers={"Range": "bytes=0-3"})
        assert (part.status, part.body[:2]) == (206, b"PK")
        assert (await ask(port, f"{path}?checksum=sha256&{query}")).status == 200
        assert (await ask(port, f"{path}a.txt?checksum=sha256&{query}")).status == 404  # it is not known
        assert (await ask(port, f"{path}sub?{query}")).headers["location"] == f"./sub/?{query}"
        assert (await ask(port, f"{path}sub?{query}")).headers["cache-control"] == "private, no-store"
        head = await ask(port, f"{path}a.txt?{query}", method="HEAD")
        assert (head.status, head.body) == (200, b"")
        for wrong in ("x=1", "share", "k=2026a", "b=7", "s=x", "fbclid=x"):
            for each in (f"{path}?{wrong}&{query}", f"{path}?{query}&{wrong}", f"{path}a.txt?{query}&{wrong}"):
                assert (await ask(port, each)).status == 403


ATTACKS = [
    "/files/",
    "/files/2026",
    "/files/top.txt",
    "/files/2026.txt",
    "/files/2026-secret/",
    "/files/2026-secret/s.txt",
    "/files/2026/../top.txt",
    "/files/2026/..",
    "/files/2026/../",
    "/files/2026/%2e%2e/top.txt",
    "/files/2026/%2E%2E/",
    "/files/2026/.%2e/top.txt",
    "/files/2026/..%2ftop.txt",
    "/files/2026/..%2Ftop.txt",
    "/files/2026/..%5ctop.txt",
    "/files/2026/..\\top.txt",
    "/files/2026%2f..%2ftop.txt",
    "/files/2026%2Fa.txt",
    "/files%2f2026/a.txt",
    "/files/2026/sub%2fb.txt",
    "/files/2026/sub/../../top.txt",
    "/files/2026/sub/../a.txt",
    "/files/2026/./a.txt",
    "/files/2026//a.txt",
    "/files/2026//",
    "/files//2026/a.txt",
    "//files/2026/a.txt",
    "/files/2026/%00",
    "/files/2026/a.txt%00",
    "/files/2026%00/a.txt",
    "/FILES/2026/a.txt",
    "/Files/2026/",
    "/files/2026./a.txt",
    "/files/2026%20/a.txt",
    "/files/2026;/a.txt",
    "/files/./2026/a.txt",
    "/files/x/../2026/../top.txt",
    "/m/2026/a.txt",
    "/m/top.txt",
    "/",
]
MISSING = [
    "/files/2026/.env",
    "/files/2026/.git/",
    "/files/2026/.git/config",
    "/files/2026/sub/../.env",
    "/files/2026/%252e%252e/top.txt",
    "/files/2026/..;/top.txt",
    "/files/2026/...",
    "/files/2026/A.TXT",
    "/files/2026/a.txt.",
    "/files/2026/a.txt/",
    "/files/2026/a.txt%0d%0a",
    "/files/2026/%ff",
]


class Counted(dv.PathSource):
    """A source that counts what it is asked for."""

    asked_for: list[str]

    async def resolve(self, name: str) -> Any:
        self.asked_for.append(name)
        return await super().resolve(name)

    def list(self, folder: str = "", /) -> Any:
        self.asked_for.append(folder)
        return super().list(folder)


@pytest.mark.parametrize("attacks, statuses", [(ATTACKS, {403, 404}), (MISSING, {403, 404})])
async def test_paths_that_lead_elsewhere(root: Path, attacks: list[str], statuses: set[int]) -> None:
    source = Counted(root)
    source.asked_for = []
    options: dict[str, Any] = {"listing": True, "archive": True, "digests": dv.Digests(source, background=False)}
    endpoint = dv.Download(source, access=dv.SignedLinks(SIGNER), hide=[".*"], **options)
    app = Starlette(routes=[Route("/files/{path:path}", endpoint), Mount("/m", endpoint)])
    async with live(app) as port:
        for query in ("", "view", "archive=zip", "archive=zip&name=top.txt", "checksum=sha256", "format=ndjson"):
            link = SIGNER.sign("/files/2026/", below=True).partition("?")[2]
            for path in attacks:
                for method in ("GET", "HEAD"):
                    answer = await ask(port, f"{path}?{query}{'&' if query else ''}{link}", method=method)
                    assert answer.status in statuses, (path, query, answer)
                    assert b"secret" not in answer.body
    if attacks is ATTACKS:
        assert source.asked_for == []


@pytest.mark.parametrize(
    "name", ["../top.txt", "..", ".", "/", "%2e%2e/top.txt", "../2026-secret", ".env", "sub/b.txt", ""]
)
async def test_a_selection_has_entries_of_the_folder_alone(root: Path, name: str) -> None:
    async with live(application(root)) as port:
        link = SIGNER.sign("/files/2026/", below=True)
        answer = await ask(port, with_parameters(link, f"archive=zip&name={quote(name, safe='')}"))
    assert answer.status == 404


async def test_a_link_to_one_url_grants_no_more_than_before(root: Path) -> None:
    async with live(application(root)) as port:
        link = SIGNER.sign("/files/2026/")
        answer = await ask(port, link)
        assert answer.status == 200
        assert "<form" not in answer.body.decode()
        for path in ("/files/2026/a.txt", "/files/2026/sub/", "/files/"):
            assert (await ask(port, link.replace("/files/2026/", path))).status == 403
        for more in ("sort=size", "view", "archive=zip", "format=json", "b=12"):
            assert (await ask(port, with_parameters(link, more))).status == 403
            assert (await ask(port, link.replace("?", f"?{more}&"))).status == 403


async def test_a_link_to_a_view_page_tells_nothing_about_the_other_files(root: Path) -> None:
    async with live(application(root)) as port:
        page = (await ask(port, SIGNER.sign("/files/2026/a.txt", query="view"))).body.decode()
        assert "content of a.txt" in page
        assert "rel=next" not in page
        below = (
            await ask(port, with_parameters(SIGNER.sign("/files/2026/", below=True).replace("?", "a.txt?"), "view"))
        ).body
    assert b"rel=next" in below


async def test_expired_revoked_and_for_another_client(root: Path) -> None:
    store = dv.MemoryGrantStore()
    signer = dv.URLSigner({"2026a": bytes(range(32))}, store=store)
    paths = ["", "a.txt", "sub/", "sub/b.txt"]
    async with live(application(root, dv.SignedLinks(signer))) as port:

        async def statuses(link: str, query: str = "") -> set[int]:
            return {(await ask(port, link.replace("?", f"{path}?{query}"))).status for path in paths}

        link = signer.sign("/files/2026/", below=True)
        assert await statuses(link) == {200}
        await signer.revoke(dict(parse_qsl(urlsplit(link).query))["i"])
        assert await statuses(link) == {403}
        assert await statuses(link, "archive=zip&") == {403}
        assert await statuses(signer.sign("/files/2026/", below=True)) == {200}
        assert await statuses(signer.sign("/files/2026/", below=True, client="192.0.2.1")) == {403}
        short = signer.sign("/files/2026/", below=True, expires_in=timedelta(seconds=1))
        while (found := await statuses(short)) != {410}:
            assert found <= {200, 410}
        await signer.revoke("2026a")
        assert await statuses(signer.sign("/files/2026/", below=True)) == {403}


async def test_offloads_and_inline_answers_are_decided_in_the_same_way(root: Path) -> None:
    backend = dv.XAccelRedirect([dv.Rule(f"{root}/", "/_files/")])
    app = dv.OffloadMiddleware(application(root, offload=True), backend)
    async with live(app) as port:
        link = SIGNER.sign("/files/2026/", below=True, attachment=False)
        file = await ask(port, link.replace("?", "a.txt?"))
        assert file.headers["x-accel-redirect"] == "/_files/2026/a.txt"
        assert file.headers["content-disposition"].startswith("inline")
        assert file.headers["cache-control"] == "private, no-store"
        assert (await ask(port, link.replace("2026/?", "top.txt?"))).headers.get("x-accel-redirect") is None
        archive = await ask(port, with_parameters(link, "archive=zip"))
        assert archive.headers["content-disposition"].startswith("attachment")


async def test_a_user_of_the_same_route_is_not_limited_by_a_link(root: Path) -> None:
    async def is_ada(request: Request, name: str) -> bool:
        return request.headers.get("x-user") == "ada"

    async with live(application(root, [is_ada, dv.SignedLinks(SIGNER)])) as port:
        link = SIGNER.sign("/files/2026/", below=True)
        page = (await ask(port, link, headers={"X-User": "ada"})).body.decode()
        assert "k=2026a&" not in page
        assert '<a href="../">' in page
        assert (await ask(port, "/files/", headers={"X-User": "ada"})).status == 200
        assert "?k=2026a&" in (await ask(port, link)).body.decode()


@contextmanager
def everything_that_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG):
        yield texts
    texts += [record.getMessage() + str(record.exc_text or "") for record in caplog.records]


async def test_no_log_line_has_a_part_of_a_link(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with everything_that_is_logged(caplog) as texts:
        async with live(application(root)) as port:
            link = SIGNER.sign("/files/2026/", below=True)
            signature = link.rpartition("&s=")[2]
            for path in ("", "a.txt", "none.txt", "..%2ftop.txt", "sub%2fb.txt"):
                await ask(port, link.replace("?", f"{path}?"))
                await ask(port, link.replace("?", f"{path}?") + "x")
    assert texts
    assert not [text for text in texts if signature in text]
    grant = SIGNER.check(b"/files/2026/", urlsplit(link).query.encode(), None, 0)
    assert signature not in repr(grant)
