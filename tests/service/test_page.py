"""The page at `/` in a real browser."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, browse, pixels
from tests.servers import Server, demo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with demo(tmp_path_factory.mktemp("page") / "log") as running:
        yield running


def luminance(red: int, green: int, blue: int) -> float:
    def linear(value: int) -> float:
        share = value / 255
        return share / 12.92 if share <= 0.04045 else float(((share + 0.055) / 1.055) ** 2.4)

    return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)


def contrast(one: float, other: float) -> float:
    """Return the contrast of two luminances as WCAG 2 counts it."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_the_page_breaks_no_policy_of_its_own(server: Server, tmp_path: Path) -> None:
    shown = browse(f"{server.url}/", tmp_path / "profile", "--dump-dom", "--enable-logging=stderr")
    assert "Content Security Policy" not in shown  # which a violation would be reported with
    for path in ("/files/hello.txt", "/media/picture.png", "/documents/greeting", "/mirror/archive.tar.gz"):
        assert f'<a href=".{path}">' in shown


def test_nothing_on_the_page_is_made_by_javascript(server: Server, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{server.url}/", timeout=10) as answer:
        policy, source = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    shown = browse(f"{server.url}/", tmp_path / "profile", "--dump-dom")
    assert re.findall("<a .*?</a>", shown) == re.findall("<a .*?</a>", source)


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_legible_in_a_light_and_a_dark_browser(server: Server, tmp_path: Path, dark: bool) -> None:
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    browse(f"{server.url}/", tmp_path / "profile", f"--screenshot={picture}", "--hide-scrollbars", *scheme)
    width, height, colours = pixels(picture)
    assert (width, height) == (900, 1100)
    found = {(colours[i], colours[i + 1], colours[i + 2]) for i in range(0, len(colours), 3)}
    page = colours[0], colours[1], colours[2]
    assert (luminance(*page) < 0.1) == dark  # the background is the one that was asked for
    assert max(contrast(luminance(*page), luminance(*colour)) for colour in found) > 10


def test_every_colour_of_text_has_enough_contrast_in_both_schemes(server: Server, tmp_path: Path) -> None:
    page = browse(f"{server.url}/", tmp_path / "profile", "--dump-dom")
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", rule)) for rule in re.findall(r":root \{([^}]*)\}", page)]
    assert len(schemes) == 2
    for colours in schemes:
        numbers = {name: luminance(*bytes.fromhex(value[1:])) for name, value in colours.items()}
        for text in ("ink", "dim", "link"):
            for background in ("page", "card"):
                assert contrast(numbers[text], numbers[background]) >= 4.5, (text, background)  # WCAG 2 AA
