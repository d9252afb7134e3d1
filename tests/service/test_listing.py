"""Listings, the page at `/` and the pages of errors, as the settings make them."""

import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from downloadview_async import ConfigurationError, Entry, PathSource
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.pages import ServicePages
from downloadview_async.service.pages.index import IndexPage
from downloadview_async.testing import Recording, call
from tests.service.loading import load

pytestmark = pytest.mark.asyncio
SOURCE = '[sources.files]\ntype = "path"\nroot = "files"\n'
ROUTE = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\nhide = [".*"]\n'
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files" / "sub").mkdir(parents=True)
    (tmp_path / "files" / "a.txt").write_text("a")
    (tmp_path / "files" / ".env").write_text("secret")
    return tmp_path


def service(directory: Path, text: str) -> ASGIApp:
    (directory / "downloadview.toml").write_text(text)
    return build(load_settings(directory / "downloadview.toml", environ={}))


async def get(app: ASGIApp, path: str, **options: Any) -> Recording:
    return await call(app, path, headers=BROWSER, **options)


async def test_a_route_lists(directory: Path) -> None:
    app = service(directory, SOURCE + ROUTE + 'list = true\nname = "Our <files>"\n')
    page = await get(app, "/files/")
    assert page.status == 200
    assert b"<title>Our &lt;files&gt;</title>" in page.body
    assert b">a.txt</a>" in page.body
    assert b".env" not in page.body.partition(b"<main>")[2]
    for path in ("/files", "/files/sub"):
        answer = await get(app, path, query="q=1")
        assert (answer.status, answer.headers["location"]) == (308, f"./{path.rpartition('/')[2]}/?q=1")
    start = await get(app, "/", scope={"root_path": "/dl", "path": "/dl/"})
    assert (start.status, start.headers["location"]) == (307, "./files/")


async def test_a_route_does_not_list_by_itself(directory: Path) -> None:
    app = service(directory, SOURCE + ROUTE)
    for path in ("/files/", "/files", "/files/sub", "/files/sub/"):
        assert (await get(app, path)).status == 404
    assert (await get(app, "/")).status == 200


async def test_a_route_for_all_paths_lists_at_the_top(directory: Path) -> None:
    app = service(directory, SOURCE + '[[routes]]\npath = "/{path:path}"\nsource = "files"\nlist = true\n')
    assert b">a.txt</a>" in (await get(app, "/")).body
    assert (await get(app, "/-/livez")).status == 200


async def test_the_top_of_a_route_with_access_is_not_revealed(directory: Path) -> None:
    keys = f'[links]\nkeys = "2026a {"s" * 32}"\n'
    app = service(directory, keys + SOURCE + ROUTE + 'list = true\naccess = ["signed"]\n')
    assert (await get(app, "/files")).status == 404
    assert (await get(app, "/files/")).status == 403


async def test_the_first_page_has_the_names_of_several_routes(directory: Path) -> None:
    second = '[[routes]]\npath = "/more/{path:path}"\nsource = "files"\nname = "More"\n'
    pages = '[pages]\ntitle = "All & sundry"\nfooter = "<ask>"\n'
    page = (await get(service(directory, pages + SOURCE + ROUTE + "list = true\n" + second), "/")).body.decode()
    assert '<h2><a href="./files/">files</a></h2>' in page
    assert "<h2>More</h2>" in page
    assert "<title>All &amp; sundry</title>" in page
    assert "&lt;ask&gt;" in page


async def test_the_first_page_counts_what_everyone_may_list(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = 'access = ["hook:tests.service.test_listing:nobody"]\n'
    routes = [
        ROUTE.replace("/files/", f"/{number}/") + f'name = "{number}"\nlist = {flag}\n{more}'
        for number, (flag, more) in enumerate([("true", ""), ("false", ""), ("true", hook)])
    ]
    app = service(directory, SOURCE + "".join(routes))
    assert (await get(app, "/")).body.count(b"<span>a directory: 1 file, 1 folder</span>") == 1
    monkeypatch.setattr("downloadview_async.service.pages.index.MOST_COUNTED", 1)
    assert b"a directory: more than 1 files and folders" in (await get(app, "/")).body
    (directory / "files" / "a.txt").unlink()
    (directory / "files" / "sub").rmdir()
    assert b"<span>a directory: empty</span>" in (await get(app, "/")).body


async def test_the_first_page_does_not_wait_for_a_source_that_hangs(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(PathSource):
        async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
            await anyio.sleep_forever()
            yield Entry("")

    file = directory / "downloadview.toml"
    second = ROUTE.replace("/files/", "/more/").replace('"files"', '"more"')
    file.write_text(SOURCE + SOURCE.replace("sources.files", "sources.more") + ROUTE + "list = true\n" + second)
    settings = load_settings(file, environ={})
    monkeypatch.setattr("downloadview_async.service.pages.index.COUNT_SECONDS", 0.01)
    page = IndexPage(
        settings,
        ServicePages(settings),
        {"files": Hanging(directory / "files"), "more": PathSource(directory / "files")},
    )
    with anyio.fail_after(10):
        answer = await call(Starlette(routes=[Route("/", page.answer)]), "/")
    assert (answer.status, answer.body.count(b"<span>a directory</span>")) == (200, 2)


async def nobody(request: Any, name: str) -> bool:
    return False


async def test_browsers_get_errors_as_pages_and_others_as_text(directory: Path) -> None:
    app = service(directory, SOURCE + ROUTE + "list = true\n")
    paths = ("/files/none", "/files/none/", "/files/.env", "/files/.git/", "/none", "/files/%00", "/files/a.txt/")
    pages = [await get(app, path) for path in paths]
    assert {(page.status, page.body, tuple(sorted(page.headers.items()))) for page in pages} == {
        (404, pages[0].body, tuple(sorted(pages[0].headers.items())))
    }
    assert b"<title>Not Found</title>" in pages[0].body
    assert pages[0].headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in pages[0].headers["content-security-policy"]
    head = await get(app, "/files/none", method="HEAD")
    assert (head.body, head.headers["content-length"]) == (b"", str(len(pages[0].body)))
    assert (await call(app, "/files/none")).body == b"Not Found"
    refused = await get(app, "/files/", method="POST")
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert b"<h1>Method Not Allowed</h1>" in refused.body


async def test_a_file_that_looks_like_an_error_is_not_replaced(directory: Path) -> None:
    (directory / "files" / "a.txt").write_text("Not Found")
    answer = await get(service(directory, SOURCE + ROUTE), "/files/a.txt")
    assert (answer.status, answer.body) == (200, b"Not Found")


async def test_the_files_of_a_directory_replace_those_of_the_pages(directory: Path) -> None:
    (directory / "t").mkdir()
    (directory / "t" / "page.css").write_text("body{color:red}")
    (directory / "t" / "listing.html").write_text(
        "<style>{{ style }}</style>{{ title }}{% for path, entry in page.entries %}<p>{{ path }}{% endfor %}"
    )
    (directory / "t" / "view.html").write_text("{{ page.name }}: {{ page.text }} {{ actions }}")
    (directory / "t" / "error.html").write_text("{{ status }} {{ phrase }} {{ explanation }}")
    (directory / "t" / "index.html").write_text(
        "{% for route in routes %}{{ route.name }}{% endfor %}{{ quote('?') }}{{ script }}"
    )
    (directory / "files" / "<b>").touch()
    settings = '[pages]\ntemplates = "t"\n' + SOURCE + ROUTE + "list = true\n"
    app = service(directory, settings + ROUTE.replace("/files/", "/more/"))
    page = await get(app, "/files/")
    assert page.body == b"<style>body{color:red}</style>Downloads<p>sub<p>&lt;b&gt;<p>a.txt"
    view = await get(app, "/files/a.txt", query="view")
    assert view.body.startswith(b'a.txt: a <a href="./a.txt" download>Download</a>')
    assert (await get(app, "/files/none")).body == b"404 Not Found Nothing is here."
    assert (await get(app, "/")).body == b"filesfiles%3F"


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("listing.html", b"{{ page.nothing.here }}", "UndefinedError: .* has no attribute 'nothing'"),
        ("listing.html", b'{% include "none.html" %}', "TemplateNotFound: 'none.html' not found"),
        ("view.html", b"{{ page.entries[0] }}", "UndefinedError: "),
        ("error.html", b"{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("index.html", b"{{ routes[0].name() }}", "TypeError: 'str' object is not callable"),
    ],
)
async def test_a_template_that_fails_is_refused_at_the_start(
    directory: Path, name: str, text: bytes, problem: str
) -> None:
    (directory / "t").mkdir()
    (directory / "t" / name).write_bytes(text)
    with pytest.raises(
        ConfigurationError, match=rf"pages\.templates: {re.escape(name)} cannot be rendered \({problem}"
    ):
        service(directory, '[pages]\ntemplates = "t"\n' + SOURCE + ROUTE)


@pytest.mark.parametrize("name", ["listing.html", "page.css"])
async def test_a_template_that_is_not_utf_8_is_named(directory: Path, name: str) -> None:
    (directory / "t").mkdir()
    (directory / "t" / name).write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=rf"pages\.templates: {re.escape(name)} is not UTF-8"):
        service(directory, '[pages]\ntemplates = "t"\n' + SOURCE + ROUTE)


async def test_the_logo_is_inside_each_page(directory: Path) -> None:
    (directory / "logo.svg").write_text("<svg/>")
    app = service(directory, '[pages]\nlogo = "logo.svg"\n' + SOURCE + ROUTE + "list = true\n")
    for path in ("/files/", "/files/none"):
        assert b'<img src="data:image/svg+xml;base64,PHN2Zy8+" alt="">' in (await get(app, path)).body


async def test_an_icon(directory: Path) -> None:
    icon = await call(service(directory, SOURCE + ROUTE), "/favicon.ico")
    assert (icon.status, icon.headers["content-type"]) == (200, "image/svg+xml")


@pytest.mark.parametrize(
    "text, problem",
    [
        (SOURCE + '[[routes]]\npath = "/f/{name}"\nsource = "files"\nlist = true\n', r"routes\[0\].list: folders need"),
        (SOURCE + '[[routes]]\npath = "/f/{p:path}/x"\nsource = "files"\nlist = true\n', r"routes\[0\].list"),
        (
            '[sources.v]\ntype = "virtual"\nfactory = "os:fspath"\n'
            '[[routes]]\npath = "/f/{p:path}"\nsource = "v"\nlist = true\n',
            r"routes\[0\].list: the source 'v' cannot list its folders",
        ),
        ('[pages]\nlogo = "none.png"\n', "pages.logo"),
        ('[pages]\nlogo = "files/a.txt"\n', "pages.logo: .* is not an image"),
        ('[pages]\ntemplates = "none"\n', "pages.templates: .* is not a directory"),
        ('[pages]\ntemplates = "bad"\n', "pages.templates: listing.html is not a template"),
        ("[pages]\ncolour = 1\n", "pages.colour: unknown key"),
    ],
)
async def test_mistakes_are_refused(directory: Path, text: str, problem: str) -> None:
    (directory / "bad").mkdir()
    (directory / "bad" / "listing.html").write_text("{% for %}")
    with pytest.raises(ConfigurationError, match=problem):
        service(directory, text)


@pytest.mark.parametrize("url", ["file:media", "file://{}/media"])
async def test_a_storage_below_a_directory_whose_name_is_not_utf_8(tmp_path: Path, url: str) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/di\xffr"))
    (directory / "media").mkdir(parents=True)
    (directory / "media/a.txt").write_bytes(b"a")
    url = url.format(quote(os.fsencode(directory)))
    text = f"""
        [sources.media]
        type = "storage"
        url = "{url}"
        [[routes]]
        path = "/media/{{path:path}}"
        source = "media"
        list = true
    """
    app = build(load(directory, text))
    entries = json.loads((await call(app, "/media/", query="format=json")).body)["entries"]
    assert [entry["name"] for entry in entries] == ["a.txt"]
    assert (await call(app, "/media/a.txt")).body == b"a"
