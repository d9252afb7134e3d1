"""The pages of the service for everybody: axe-core finds nothing wrong, they fit small windows, and keys suffice."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
import bcrypt
import pytest

from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from tests.browser import CHROMIUM, Chromium, running_chromium
from tests.live import live
from tests.servers import PROJECT

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]
AXE = files("axe_core_python").joinpath("axe.min.js").read_text()
CHECK = """axe.run().then(({violations}) => violations.map((violation) =>
    violation.id + ": " + violation.nodes.map((node) => node.html.slice(0, 200)).join(" | ")))"""
FACTS = "({wide: document.documentElement.scrollWidth, requests: performance.getEntriesByType('resource').length})"
SETTINGS = f"""
[links]
keys = "2026a {"s" * 32}"
store = "memory:"
[users]
file = "users"
[pages]
footer = "Older files: ask Ada."
[sources.files]
type = "path"
root = "files"
names = "any"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
list = true
archive = true
[[routes]]
path = "/shared/{{path:path}}"
source = "files"
list = true
access = ["signed", "user:ada"]
[[routes]]
path = "/plain/{{name}}"
source = "files"
example = "note.txt"
"""
TEXTS = {
    "note.txt": b"A note.\n" * 400,
    "x" * 255: b"long",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd.pdf": b"%PDF-1.4",
    "\u202egpj.exe": b"MZ",
    "\U0001f600 \U0001f469\u200d\U0001f467 a b.bin": b"0" * 12345,
    "<b>&amp;.html": b"<script>alert(1)</script>",
    "sound.mp3": b"ID3",
    "film.mp4": b"",
}
PATHS = [
    "/",
    "/files/",
    "/files/?sort=size&order=desc",
    "/files/many/",
    "/files/many/?after=f%2C%2Cfile499.txt",
    "/files/empty/",
    "/files/?q=note&deep=1",
    "/files/?q=nothing-matches",
    "/files/note.txt?view",
    "/files/picture.png?view",
    "/files/sound.mp3?view",
    "/files/film.mp4?view",
    f"/files/{'x' * 255}?view",
    "/files/%3Cb%3E%26amp;.html?view",
    "/files/%D7%A9%D7%9C%D7%95%D7%9D%20%D7%A2%D7%95%D7%9C%D7%9D.pdf?view",
    "/shared/note.txt?view",
    "/shared/note.txt?share",
    "/files/missing",
    "/shared/note.txt?e=1",
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    (root / "empty").mkdir(parents=True)
    (root / "many" / "deeper").mkdir(parents=True)
    for number in range(600):
        (root / "many" / f"file{number}.txt").touch()
    for name, content in TEXTS.items():
        (root / name).write_bytes(content)
    (root / "picture.png").write_bytes((PROJECT / "app" / "files" / "picture.png").read_bytes())
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (tmp_path / "users").write_text(f"ada:{hashed}\n")
    (tmp_path / "downloadview.toml").write_text(SETTINGS)
    return tmp_path


def problems_of(browser: Chromium, path: str) -> list[str]:
    """Return what is wrong with the page that is shown: in a small dark window, and in a large light one."""
    browser.evaluate(AXE)
    problems = []
    for width, is_dark in ((320, True), (1600, False)):
        browser.look(width, is_dark=is_dark)
        problems += [f"{path}, {width}: {text}" for text in browser.evaluate(CHECK)]
        facts = browser.evaluate(FACTS)
        if facts["requests"] and "?view" not in path:
            problems.append(f"{path}: {facts['requests']} further requests")
        if facts["wide"] > width:
            problems.append(f"{path}: {facts['wide']} pixels in a window of {width}")
    return problems


@pytest.mark.timeout(300)  # axe-core takes half a second a page, and much longer on a busy machine
async def test_axe_core_finds_nothing(directory: Path) -> None:
    def look_at_all(port: int) -> list[str]:
        problems = []
        with running_chromium(directory / "browser") as browser:
            for path in PATHS:
                user = "ada:secret@" if path.startswith("/shared") else ""
                browser.visit(f"http://{user}127.0.0.1:{port}{path}")
                problems += problems_of(browser, path)
                if path.endswith("?share"):
                    browser.follow("document.querySelector('form').submit()")
                    assert browser.evaluate("document.querySelector('svg') !== null")
                    problems += problems_of(browser, f"{path}, sent")
        return problems

    app = build(load_settings(directory / "downloadview.toml", environ={}))
    async with live(app) as port:
        assert await anyio.to_thread.run_sync(look_at_all, port) == []


STOPS = """(() => {
const can = [...document.querySelectorAll("a[href], button, input, select, pre")];
return can.filter((one) => one.type !== "hidden" && one.checkVisibility() && one.tabIndex >= 0).length;
})()"""
FOCUS = """(() => {
const one = document.activeElement, style = getComputedStyle(one);
const stops = [...document.querySelectorAll("*")];
return {place: stops.indexOf(one), ring: style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2};
})()"""
BOXES = "[...document.querySelectorAll('td input')]"


@pytest.mark.parametrize("path", ["/files/", "/files/note.txt?view", "/shared/note.txt?share", "/"])
async def test_the_tab_key_reaches_everything_and_shows_where_it_is(directory: Path, path: str) -> None:
    def press_tab(port: int) -> tuple[int, list[dict[str, Any]]]:
        with running_chromium(directory / "browser") as browser:
            browser.visit(f"http://ada:secret@127.0.0.1:{port}{path}")
            count = browser.evaluate(STOPS)
            places = []
            for _ in range(count):
                browser.key("Tab")
                places.append(browser.evaluate(FOCUS))
            return count, places

    async with live(build(load_settings(directory / "downloadview.toml", environ={}))) as port:
        count, places = await anyio.to_thread.run_sync(press_tab, port)
    assert count >= (30 if path == "/files/" else 3)
    order = [one["place"] for one in places]
    assert order == sorted(set(order))
    assert all(one["ring"] for one in places)


async def test_rows_are_selected_and_viewed_by_keys(directory: Path) -> None:
    def press_keys(port: int) -> list[Any]:
        with running_chromium(directory / "browser") as browser:
            browser.visit(f"http://127.0.0.1:{port}/files/")
            seen = []

            def chosen() -> Any:
                return browser.evaluate(f"{BOXES}.map((box) => Number(box.checked)).join('')")

            browser.evaluate(f"{BOXES}[2].focus()")
            browser.key(" ")
            seen.append(chosen())
            browser.key("ArrowDown", shift=True)
            browser.key("ArrowDown", shift=True)
            seen.append(chosen())
            browser.key("ArrowUp")
            browser.key("ArrowUp")
            browser.key("ArrowUp")
            seen.append(browser.evaluate(f"{BOXES}.indexOf(document.activeElement)"))
            browser.key("ArrowDown")
            browser.key("ArrowDown")
            browser.key("ArrowDown")
            browser.key("ArrowDown")
            browser.key("ArrowDown")
            browser.key("ArrowDown")
            browser.key(" ", shift=True)  # from the last row that was changed
            seen.append(chosen())
            seen.append(browser.evaluate("document.querySelector('.bar').checkVisibility()"))
            browser.evaluate("document.querySelector('[aria-label=\"View note.txt\"]').focus()")
            browser.follow("document.activeElement.click()")
            seen.append(browser.evaluate("location.pathname + location.search"))
            return seen

    async with live(build(load_settings(directory / "downloadview.toml", environ={}))) as port:
        seen = await anyio.to_thread.run_sync(press_keys, port)
    assert seen == ["00100000000", "00111000000", 1, "00111111000", True, "/files/note.txt?view"]
