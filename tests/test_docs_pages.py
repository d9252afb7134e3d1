"""The pages of the documentation for everybody: axe-core finds nothing wrong, and they fit small windows."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import anyio
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from tests.browser import CHROMIUM, Chromium, running_chromium
from tests.live import live
from tests.pages import DOCS

pytestmark = pytest.mark.slow
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium")
AXE = files("axe_core_python").joinpath("axe.min.js").read_text()
# Parts that look alike take most of the time: of each kind on a page, the first few are checked.
THIN = """(() => {
const counts = new Map();
for (const part of document.querySelectorAll("article span[class], article code")) {
    const kind = [part.localName, part.className, part.parentElement.className].join();
    counts.set(kind, (counts.get(kind) || 0) + 1);
    if (!part.childElementCount && counts.get(kind) > 3) part.replaceWith(part.textContent);
}
[...document.querySelectorAll("article dl.py")].slice(20).forEach((entry) => entry.remove());
document.querySelectorAll("article tbody").forEach((body) => [...body.rows].slice(5).forEach((row) => row.remove()));
document.querySelectorAll("article ul").forEach((list) => [...list.children].slice(8).forEach((item) => item.remove()));
})()"""
CHECK = """axe.run(%s, {resultTypes: ["violations"]}).then(({violations}) => violations.map((violation) =>
    violation.id + ": " + violation.nodes.map((node) => node.html.slice(0, 200)).join(" | ")))"""
WITHOUT_MENUS = "{exclude: [['.sidebar-drawer'], ['.toc-drawer']]}"  # they are those of the front page
WIDTH = "document.documentElement.scrollWidth"
LINES_OF_TITLE = """(() => {
const range = document.createRange();
range.selectNodeContents(document.querySelector("h1").firstChild);
return range.getClientRects().length;
})()"""
BLOCKS = "document.querySelectorAll('div.highlight').length"
BUTTONS = "document.querySelectorAll('div.highlight button.copybtn').length"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation, in which each warning is an error."""
    directory = tmp_path_factory.mktemp("docs")
    options = ["-W", "-q", "-b", "html", "-d", str(directory / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(directory / "html")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return directory / "html"


@pytest.mark.timeout(600)
def test_the_documentation_builds_without_a_warning(html: Path) -> None:
    assert (html / "api.html").exists()


def problems_of(browser: Chromium, page: str) -> list[str]:
    """Return what is wrong with the page that is shown: in a small dark window, and in a large light one."""
    problems = []
    if browser.evaluate(BLOCKS) != browser.evaluate(BUTTONS):
        problems.append(f"{page}: blocks without a button that copies them")
    windows = ((320, True), (1600, False))
    for width, is_dark in windows:
        browser.look(width, is_dark=is_dark)
        if (wide := browser.evaluate(WIDTH)) > width:
            problems.append(f"{page}: {wide} pixels in a window of {width}")
        if page == "index.html" and browser.evaluate(LINES_OF_TITLE) != 1:
            problems.append(f"{page}, {width}: the title breaks")
    browser.evaluate(THIN)
    browser.evaluate(AXE)
    for width, is_dark in windows:
        browser.look(width, is_dark=is_dark)
        what = "document" if page == "index.html" else WITHOUT_MENUS
        problems += [f"{page}, {width}: {text}" for text in browser.evaluate(CHECK % what)]
    return problems


@needs_chromium
@pytest.mark.asyncio
@pytest.mark.timeout(900)  # axe-core takes a second or two a page, and much longer on a busy machine
async def test_axe_core_finds_nothing(html: Path, tmp_path: Path) -> None:
    def look_at_all(port: int) -> list[str]:
        problems = []
        with running_chromium(tmp_path / "browser") as browser:
            for page in sorted(str(path.relative_to(html)) for path in html.rglob("*.html")):
                if not page.startswith("_static"):
                    browser.visit(f"http://127.0.0.1:{port}/{page}")
                    problems += problems_of(browser, page)
        return problems

    async with live(Starlette(routes=[Mount("/", StaticFiles(directory=html))])) as port:
        assert await anyio.to_thread.run_sync(look_at_all, port) == []
