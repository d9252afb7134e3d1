"""Inline files in real browsers: they look right, and nothing in them runs."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import downloadview_async as dv
from tests.browser import BROWSERS, Browser, Picture, RefusedError, running
from tests.live import ask, live

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

BLUE_GIF = base64.b64encode(b"GIF89a\1\0\1\0\x80\0\0\0\0\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;").decode()
RED, GREEN, BLUE, CYAN = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255)
SVG = f"""<svg xmlns="http://www.w3.org/2000/svg" width="300" height="300">
<style>.styled {{ fill: #00ff00 }}</style>
<rect class="styled" width="100" height="300"/>
<rect style="fill: #ff0000" x="100" width="100" height="300"/>
<image href="data:image/gif;base64,{BLUE_GIF}" x="200" width="100" height="300" preserveAspectRatio="none"/>
<image href="/seen/image" width="1" height="1"/>
<rect id="scripted" onload="this.setAttribute('fill', '#ffff00')" y="250" width="300" height="50" fill="#00ffff"/>
<script>document.getElementById("scripted").setAttribute("fill", "#ff00ff"); fetch("/seen/script")</script>
</svg>"""
XHTML = """<?xml version="1.0"?><?xml-stylesheet href="/seen/style.css"?>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>A page</title></head>
<body bgcolor="#00ff00" onload="document.body.bgColor = '#ff0000'"><img src="/seen/image" alt=""/>
<script>document.body.bgColor = "#ff0000"; fetch("/seen/script")</script></body></html>"""
PAGES = {
    "page.html": XHTML.partition("?>\n")[2],
    "page.xhtml": XHTML,
    "page.xml": XHTML,
    "drawing.svg": XHTML.replace("<head>", '<svg xmlns="http://www.w3.org/2000/svg"/><head>'),
}
# What a script of the site could do. In a PDF it is JavaScript too, but that of the browser's viewer.
PDF_SCRIPT = 'try { fetch("/seen/fetch") } catch (e) {} new Image().src = "/seen/image"; document.cookie = "seen=1"'


def pdf(script: str) -> bytes:
    """Return a PDF with one green page, and a script that runs when it is opened."""
    green = b"0 1 0 rg 0 0 612 792 re f"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /OpenAction << /S /JavaScript /JS <%s> >> >>" % script.encode().hex().encode(),
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(green), green),
    ]
    text, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(text))
        text += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size, start = len(objects) + 1, len(text)
    text += b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\n" % (size, table, size)
    return text + b"startxref\n%d\n%%%%EOF\n" % start


@dataclass
class Site:
    port: int
    seen: list[str] = field(default_factory=list)
    """The requests of what must not run, and of what must not be loaded."""

    async def shows(self, browser: Browser, path: str, is_right: Callable[[Picture], bool]) -> Picture:
        """Open a path, and return the first picture that is right, or the last one."""
        self.seen.clear()
        return await asyncio.to_thread(_shown, browser, f"http://127.0.0.1:{self.port}{path}", is_right)


def _shown(browser: Browser, url: str, is_right: Callable[[Picture], bool]) -> Picture:
    browser.open("about:blank")
    browser.open(url)
    deadline = time.monotonic() + 30
    while True:
        try:
            picture = browser.picture()
        except RefusedError:
            assert time.monotonic() < deadline, "the browser shows nothing"
            continue
        if is_right(picture) or time.monotonic() > deadline:
            return picture


@pytest.fixture(scope="module", params=BROWSERS)
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    directory = tmp_path_factory.mktemp("files")
    for name, text in {"a.svg": SVG, **PAGES}.items():
        (directory / name).write_text(text)
    (directory / "a.pdf").write_bytes(pdf(PDF_SCRIPT))
    source, running_site = dv.PathSource(directory), Site(0)

    async def seen(request: Request) -> Response:
        running_site.seen.append(request.url.path)
        return Response()

    async def frame(request: Request) -> Response:
        return HTMLResponse(f'<iframe src="/{request.path_params["name"]}" width="450" height="450"></iframe>')

    trusted = {"Content-Security-Policy": "default-src * 'unsafe-inline'"}
    routes = [
        Route("/seen/{name}", seen),
        Route("/frame/{name}", frame),
        Route("/trusted/{name}", dv.Download(source, attachment=False, headers=trusted)),
        Route("/{name}", dv.Download(source, attachment=False)),
    ]
    async with live(Starlette(routes=routes)) as running_site.port:
        yield running_site


async def test_an_svg_has_its_colours_and_runs_no_script(site: Site, browser: Browser) -> None:
    answer = await ask(site.port, "/a.svg")
    assert answer.headers["content-security-policy"] == (
        "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
    )
    picture = await site.shows(browser, "/a.svg", lambda shown: shown.colour(250, 100) == BLUE)
    assert picture.colour(50, 100) == GREEN  # by the style sheet in it
    assert picture.colour(150, 100) == RED  # by a style attribute
    assert picture.colour(250, 100) == BLUE  # by a picture in it
    assert picture.colour(150, 275) == CYAN  # as no script has changed it
    assert site.seen == []


@pytest.mark.parametrize("name", PAGES)
async def test_a_page_runs_no_script_and_loads_nothing(site: Site, browser: Browser, name: str) -> None:
    picture = await site.shows(browser, f"/{name}", lambda shown: shown.colour(200, 200) != (255, 255, 255))
    assert picture.colour(200, 200) == GREEN
    assert site.seen == []


@pytest.mark.parametrize("name", PAGES)
async def test_without_the_policy_it_would(site: Site, browser: Browser, name: str) -> None:
    picture = await site.shows(
        browser, f"/trusted/{name}", lambda shown: shown.colour(200, 200) == RED and "/seen/script" in site.seen
    )
    assert picture.colour(200, 200) == RED
    assert {"/seen/image", "/seen/script"} <= {*site.seen}


@pytest.mark.parametrize("path", ["/a.pdf", "/frame/a.pdf"])
async def test_a_pdf_is_shown_and_its_script_is_not_the_sites(site: Site, browser: Browser, path: str) -> None:
    answer = await ask(site.port, "/a.pdf")
    assert answer.headers["content-type"] == "application/pdf"
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    picture = await site.shows(browser, path, lambda shown: shown.share(GREEN) > 0.1)
    assert picture.share(GREEN) > 0.1
    assert site.seen == []
