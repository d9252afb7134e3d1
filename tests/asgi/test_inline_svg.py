"""An inline SVG in a real browser: its own styles, pictures and colours, and none of its scripts."""

import asyncio
import base64
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from tests.browser import CHROMIUM, browse, pixels
from tests.live import ask, live

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]

BLUE_GIF = base64.b64encode(b"GIF89a\1\0\1\0\x80\0\0\0\0\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;").decode()
SVG = f"""<svg xmlns="http://www.w3.org/2000/svg" width="300" height="300">
<style>.styled {{ fill: #00ff00 }}</style>
<rect class="styled" width="100" height="300"/>
<rect style="fill: #ff0000" x="100" width="100" height="300"/>
<image href="data:image/gif;base64,{BLUE_GIF}" x="200" width="100" height="300" preserveAspectRatio="none"/>
<image href="/seen-image" width="1" height="1"/>
<rect id="scripted" onload="this.setAttribute('fill', '#ffff00')" y="250" width="300" height="50" fill="#00ffff"/>
<script>document.getElementById("scripted").setAttribute("fill", "#ff00ff"); fetch("/seen-script")</script>
</svg>"""


@pytest.mark.slow
async def test_an_inline_svg_has_its_colours_and_runs_no_script(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text(SVG)
    app = Starlette(routes=[Route("/{name}", dv.Download(dv.PathSource(tmp_path), attachment=False))])
    picture = tmp_path / "picture.png"
    async with live(app) as port:
        answer = await ask(port, "/a.svg")
        assert answer.headers["content-security-policy"] == (
            "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
        )
        flags = (f"--screenshot={picture}", "--hide-scrollbars", "--enable-logging=stderr")
        said = await asyncio.to_thread(browse, f"http://127.0.0.1:{port}/a.svg", tmp_path / "profile", *flags)
    width, _, colours = pixels(picture)

    def colour(x: int, y: int) -> tuple[int, int, int]:
        start = 3 * (y * width + x)
        return colours[start], colours[start + 1], colours[start + 2]

    assert colour(50, 100) == (0, 255, 0)  # by the style sheet in it
    assert colour(150, 100) == (255, 0, 0)  # by a style attribute
    assert colour(250, 100) == (0, 0, 255)  # by a picture in it
    assert colour(150, 275) == (0, 255, 255)  # as no script has changed it
    assert re.search("Content Security Policy|Blocked script execution", said)  # what would have run, or been loaded
