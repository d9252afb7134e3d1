"""Listings in a real browser: they fit each window, and their script and style are all that runs."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from tests.browser import CHROMIUM, browse
from tests.live import ask, live
from tests.servers import PROJECT

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]

PROBE = """
addEventListener("load", () => setTimeout(() => {
const q = (s) => [...document.querySelectorAll(s)];
const field = document.querySelector("[name=q]");
const boxes = q("td input");
const facts = {wide: document.documentElement.scrollWidth, window: innerWidth,
rows: q("tbody tr").length, boxes: boxes.length, bar: document.querySelector(".bar").hidden,
times: q("time").every((t) => t.dateTime.endsWith("Z") && t.title && !t.textContent.includes("Z")),
background: getComputedStyle(document.body).backgroundColor,
requests: performance.getEntriesByType("resource").length};
boxes[0].click();
boxes[3].dispatchEvent(new MouseEvent("click", {bubbles: true, shiftKey: true}));
facts.selected = boxes.filter((b) => b.checked).length;
facts.shown = !document.querySelector(".bar").hidden;
field.value = "FILE1"; field.dispatchEvent(new Event("input"));
facts.left = q("tbody tr").filter((r) => !r.hidden).length;
console.log("facts " + JSON.stringify(facts));
}, 50));
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    (directory / "folder").mkdir(parents=True)
    names = [*(f"file{number}.txt" for number in range(20)), "x" * 250, "שלום עולם.pdf", "\u202egpj.exe", "a b 😀.png"]
    for name in names:
        (directory / name).write_bytes(b"0" * 12345)
    return directory


class Framed:
    """Shows an application in a frame of a width: a window of Chromium is at least 500 pixels wide.

    paths: of the requests to the application.
    """

    def __init__(self, app: ASGIApp, width: int, path: str = "") -> None:
        self.paths: list[str] = []
        self._app = app
        self._page = HTMLResponse(
            f'<link rel="icon" href="data:,"><iframe src="/listing/{path}" '
            f'style="width:{width}px;height:800px;border:0">'
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, value.replace(b"frame-ancestors 'none'", b"frame-ancestors 'self'"))
                    for name, value in message["headers"]
                ]
            await send(message)

        if scope["path"] == "/":
            await self._page(scope, receive, send)
        else:
            self.paths.append(scope["path"])
            await self._app(scope, receive, send_framed)


async def browsed(url: str, profile: Path, *flags: str) -> str:
    return await anyio.to_thread.run_sync(browse, url, profile, *flags)


def facts_of(output: str) -> dict[str, Any]:
    match = re.search(r'"facts (\{.*\})"', output)
    assert match is not None, output[-2000:]
    facts: dict[str, Any] = json.loads(match[1])
    return facts


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 800, 1600])
async def test_a_page_fits_the_window(root: Path, tmp_path: Path, width: int, is_dark: bool) -> None:
    pages = dv.Pages(script=dv.Pages().script + PROBE)
    download = dv.Download(dv.PathSource(root), listing=pages)
    app = Framed(Starlette(routes=[Mount("/listing", download)]), width)
    flags = [f"--blink-settings=preferredColorScheme={int(not is_dark)}", f"--window-size={width + 200},900"]
    flags += [f"--screenshot={tmp_path / 'page.png'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    async with live(app) as port:
        output = await browsed(f"http://127.0.0.1:{port}/", tmp_path / "profile", *flags)
    facts = facts_of(output)
    assert facts["window"] == width
    assert facts["wide"] <= width
    assert facts["rows"] == facts["boxes"] == 25
    assert facts["times"]
    assert (facts["selected"], facts["shown"], facts["left"]) == (4, True, 11)
    assert facts["background"] == ("rgb(22, 25, 29)" if is_dark else "rgb(253, 253, 252)")
    assert app.paths == ["/listing/"]


@pytest.mark.parametrize("name", ["wide.txt", "picture.png", "x" * 250])
async def test_a_view_page_fits_a_small_window(root: Path, tmp_path: Path, name: str) -> None:
    (root / "wide.txt").write_text("x" * 5000 + "\n" + "<b>bold</b> " * 500)
    (root / "picture.png").write_bytes((PROJECT / "app" / "files" / "picture.png").read_bytes())
    probe = "\naddEventListener('load', () => console.log('facts ' + JSON.stringify({wide: "
    probe += (
        "document.documentElement.scrollWidth, window: innerWidth, bold: document.querySelectorAll('b').length})));"
    )
    download = dv.Download(dv.PathSource(root), listing=dv.Pages(script=dv.Pages().script + probe))
    app = Framed(Starlette(routes=[Mount("/listing", download)]), 320, f"{name}?view")
    flags = [f"--screenshot={tmp_path / 'page.png'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    async with live(app) as port:
        output = await browsed(f"http://127.0.0.1:{port}/", tmp_path / "profile", *flags)
    seen = facts_of(output)
    assert (seen["window"], seen["bold"]) == (320, 0)
    assert seen["wide"] <= 320


async def test_names_of_spaces_alone_can_be_clicked(tmp_path: Path) -> None:
    names = [" ", "\u200b", "a b", "a  b"]
    for name in names:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).touch()
    probe = """
    addEventListener("load", () => {
    const links = [...document.querySelectorAll("td a")].filter((link) => link.closest("td").cellIndex === 0);
    const width = (link) => link.getBoundingClientRect().width;
    const clicked = (link) => { const {x, y, width, height} = link.getBoundingClientRect();
    return document.elementFromPoint(x + width / 2, y + height / 2) === link; };
    console.log("facts " + JSON.stringify(links.map((link) => [link.textContent, width(link), clicked(link)])));
    });
    """
    download = dv.Download(dv.PathSource(tmp_path / "files"), listing=dv.Pages(script=dv.Pages().script + probe))
    async with live(Starlette(routes=[Mount("/files", download)])) as port:
        flags = ["--enable-logging=stderr", "--virtual-time-budget=3000"]
        output = await browsed(f"http://127.0.0.1:{port}/files/", tmp_path / "profile", *flags)
    match = re.search(r'"facts (\[.*\])"', output)
    assert match is not None, output[-2000:]
    links = {name: (width, is_clicked) for name, width, is_clicked in json.loads(match[1])}
    assert links.keys() == {*names}
    assert all(width >= 3 and is_clicked for width, is_clicked in links.values()), links
    assert links["a  b"][0] > links["a b"][0]


async def test_the_entries_that_are_selected_are_in_the_archive(tmp_path: Path) -> None:
    names = ["a+b.txt", "a&name=c.txt", "100%.txt", "a b 😀.txt", "--x", "#1?.txt", "left.txt"]
    for name in names:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text(name)
    probe = """
    navigation.addEventListener("navigate", (event) => {
    event.preventDefault();  // headless Chromium may hang in a download
    console.log("facts " + JSON.stringify({url: event.destination.url}));
    });
    addEventListener("load", () => {
    for (const box of document.querySelectorAll("td input"))
        if (box.nextElementSibling.textContent !== "left.txt") box.click();
    document.querySelector("[data-archive]").click();
    });
    """
    pages = dv.Pages(script=dv.Pages().script + probe)
    download = dv.Download(dv.PathSource(tmp_path / "files"), listing=pages, archive=True)
    async with live(Starlette(routes=[Mount("/files", download)])) as port:
        page = await ask(port, "/files/")
        assert b'<a href="?archive=zip" download>Download as zip</a>' in page.body
        flags = ["--enable-logging=stderr", "--virtual-time-budget=3000"]
        output = await browsed(f"http://127.0.0.1:{port}/files/", tmp_path / "profile", *flags)
        archive = await ask(port, f"/files/?{urlsplit(facts_of(output)['url']).query}")
    with zipfile.ZipFile(io.BytesIO(archive.body)) as opened:
        assert sorted(opened.namelist()) == sorted(name for name in names if name != "left.txt")


async def test_a_whole_folder_that_is_selected_needs_no_names(tmp_path: Path) -> None:
    names = [f"{number:03}{'x' * 200}" for number in range(400)]
    for name in names:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).touch()
    probe = """
    navigation.addEventListener("navigate", (event) => {
    event.preventDefault();
    console.log("facts " + JSON.stringify({url: event.destination.url}));
    });
    addEventListener("load", () => {
    for (const box of document.querySelectorAll("td input")) box.checked = true;
    document.querySelector("[data-archive]").click();
    });
    """
    pages = dv.Pages(script=dv.Pages().script + probe)
    download = dv.Download(dv.PathSource(tmp_path / "files"), listing=pages, archive=True)
    async with live(Starlette(routes=[Mount("/files", download)])) as port:
        flags = ["--enable-logging=stderr", "--virtual-time-budget=3000"]
        for query, expected in (("", "?archive=zip"), ("?q=000", f"?archive=zip&name={names[0]}")):
            profile = tmp_path / f"profile{len(query)}"
            output = await browsed(f"http://127.0.0.1:{port}/files/{query}", profile, *flags)
            assert facts_of(output)["url"] == f"http://127.0.0.1:{port}/files/{expected}"


async def test_the_script_keeps_the_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "files" / "sub").mkdir(parents=True)
    names = ["a b.txt", "what?.txt", "k=2026a&b.txt"]
    for name in names:
        (tmp_path / "files" / name).write_text(name)
    probe = """
    navigation.addEventListener("navigate", (event) => {
    event.preventDefault();
    const q = (s) => [...document.querySelectorAll(s)];
    const views = q("td:nth-child(4) a").map((a) => a.href);
    console.log("facts " + JSON.stringify({archive: event.destination.url, views}));
    });
    addEventListener("load", () => {
    for (const box of document.querySelectorAll("td input")) box.click();
    document.querySelector("[data-archive]").click();
    });
    """
    signer = dv.URLSigner({"2026a": bytes(range(32))})
    pages = dv.Pages(script=dv.Pages().script + probe)
    source = dv.PathSource(tmp_path / "files")
    download = dv.Download(source, listing=pages, archive=True, access=dv.SignedLinks(signer))
    async with live(Starlette(routes=[Mount("/files", download)])) as port:
        link = signer.sign("/files/", below=True, base=f"http://127.0.0.1:{port}")
        flags = ["--enable-logging=stderr", "--virtual-time-budget=3000"]
        facts = facts_of(await browsed(link, tmp_path / "profile", *flags))
        archive = await ask(port, f"/files/?{urlsplit(facts['archive']).query}")
        views = [await ask(port, f"{urlsplit(url).path}?{urlsplit(url).query}") for url in facts["views"]]
    with zipfile.ZipFile(io.BytesIO(archive.body)) as opened:
        assert sorted(opened.namelist()) == sorted([*names, "sub/"])
    assert [view.status for view in views] == [200, 200, 200]
    assert all(b"<pre tabindex=0>" in view.body for view in views)


@pytest.mark.parametrize("query", ["q=a&deep=1", "format=json"])
async def test_what_offers_no_archive(root: Path, query: str) -> None:
    download = dv.Download(dv.PathSource(root), listing=True, archive=True)
    async with live(Starlette(routes=[Mount("/files", download)])) as port:
        assert b"archive=" not in (await ask(port, f"/files/?{query}")).body
