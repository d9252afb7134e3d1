"""Content types: the same on every machine, and which of them a browser might run."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http import content_types
from downloadview_async.http.content_types import (
    add_content_types,
    content_type_for,
    is_active,
    is_rendered,
    valid_content_type,
    with_charset,
)
from tests.http.asking import LARGE

OCTETS = "application/octet-stream"


@pytest.mark.parametrize(
    "name, content_type",
    [
        # HTTP.md
        ("a.webp", "image/webp"),
        ("a.avif", "image/avif"),
        ("a.docx", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
        ("a.mkv", "video/matroska"),
        ("a.zst", "application/zstd"),
        ("a.7z", "application/x-7z-compressed"),
        ("a.wasm", "application/wasm"),
        ("x.tar.gz", "application/gzip"),
        # text has a charset, nothing else has
        ("a.txt", "text/plain; charset=utf-8"),
        ("a.html", "text/html; charset=utf-8"),
        ("a.htm", "text/html; charset=utf-8"),
        ("a.css", "text/css; charset=utf-8"),
        ("a.csv", "text/csv; charset=utf-8"),
        ("a.js", "text/javascript; charset=utf-8"),
        ("a.mjs", "text/javascript; charset=utf-8"),
        ("a.md", "text/markdown; charset=utf-8"),
        ("a.log", "text/plain; charset=utf-8"),
        ("a.xhtml", "application/xhtml+xml"),
        ("a.json", "application/json"),
        ("a.xml", "application/xml"),
        ("a.svg", "image/svg+xml"),
        ("a.pdf", "application/pdf"),
        ("a.png", "image/png"),
        ("a.jpg", "image/jpeg"),
        ("a.JPEG", "image/jpeg"),
        ("a.gif", "image/gif"),
        ("a.ico", "image/vnd.microsoft.icon"),
        ("a.mp3", "audio/mpeg"),
        ("a.mp4", "video/mp4"),
        ("a.webm", "video/webm"),
        ("a.woff2", "font/woff2"),
        ("a.zip", "application/zip"),
        ("a.tar", "application/x-tar"),
        # what nginx knows
        ("a.ts", "video/mp2t"),
        ("a.rpm", "application/x-redhat-package-manager"),
        ("a.rss", "application/rss+xml"),
        ("a.mid", "audio/midi"),
        ("a.exe", "application/vnd.microsoft.portable-executable"),
        ("a.atom", "application/atom+xml"),
        ("a.kmz", "application/vnd.google-earth.kmz"),
        ("a.crt", "application/x-x509-ca-cert"),
        ("a.flv", "video/x-flv"),
        ("a.wmv", "video/x-ms-wmv"),
        # what players and phones need
        ("a.m4b", "audio/mp4"),
        ("a.mpd", "application/dash+xml"),
        ("a.m3u8", "application/vnd.apple.mpegurl"),
        ("a.m4s", "video/iso.segment"),
        ("a.mka", "audio/matroska"),
        ("a.3gp", "video/3gpp"),
        ("a.usdz", "model/vnd.usdz+zip"),
        ("a.glb", "model/gltf-binary"),
        ("a.gltf", "model/gltf+json"),
        ("a.pkpass", "application/vnd.apple.pkpass"),
        ("a.mobileconfig", "application/x-apple-aspen-config"),
        ("a.geojson", "application/geo+json"),
        ("a.ass", "text/x-ssa; charset=utf-8"),
        ("a.srt", "application/x-subrip"),
        ("a.vtt", "text/vtt; charset=utf-8"),
        ("a.vcf", "text/vcard; charset=utf-8"),
        # a compressed file is what it is compressed with
        ("a.tgz", "application/gzip"),
        ("a.svgz", "application/gzip"),
        ("a.txt.gz", "application/gzip"),
        ("a.html.bz2", "application/x-bzip2"),
        ("a.tar.xz", "application/x-xz"),
        ("a.js.br", OCTETS),
        ("a.tar.Z", "application/x-compress"),
        ("x.TAR.GZ", "application/gzip"),
        # not known
        ("a", OCTETS),
        ("", OCTETS),
        (".", OCTETS),
        ("a.", OCTETS),
        (".html", OCTETS),
        ("a.nothing-like-it", OCTETS),
        ("a.html ", OCTETS),
        ("a.html\x00", OCTETS),
        ("html", OCTETS),
        ("a.png/b", OCTETS),
        ("π.txt", "text/plain; charset=utf-8"),
    ],
)
def test_content_types_by_name(name: str, content_type: str) -> None:
    assert content_type_for(name) == content_type


def test_the_files_of_the_machine_change_nothing(tmp_path: Path) -> None:
    mime_types = tmp_path / "mime.types"
    mime_types.write_text("text/x-wrong pdf txt nothing-like-it\n")
    code = (
        "import mimetypes, sys\n"
        "mimetypes.knownfiles[:] = [sys.argv[1]]\n"
        "from downloadview_async.http.content_types import content_type_for\n"
        "assert mimetypes.guess_type('a.txt')[0] == 'text/x-wrong'\n"
        "print(*map(content_type_for, ('a.pdf', 'a.txt', 'a.nothing-like-it')), sep=',')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(mime_types)], check=True, capture_output=True, encoding="utf-8"
    )
    assert result.stdout.strip() == f"application/pdf,text/plain; charset=utf-8,{OCTETS}"


@pytest.mark.parametrize(
    "content_type, charset, result",
    [
        ("text/plain", None, "text/plain; charset=utf-8"),
        ("text/plain", "latin-1", "text/plain; charset=latin-1"),
        ("text/plain; charset=koi8-r", None, "text/plain; charset=koi8-r"),
        ("text/plain;CHARSET=koi8-r", "utf-8", "text/plain;CHARSET=koi8-r"),
        ("TEXT/PLAIN", None, "TEXT/PLAIN; charset=utf-8"),
        ("image/png", None, "image/png"),
        ("application/json", "utf-16", "application/json; charset=utf-16"),
        ("text/plain", "x\r\nSet-Cookie: a=b", "text/plain; charset=utf-8"),
        ("image/png", "x y", "image/png"),
        ("text/plain", "π", "text/plain; charset=utf-8"),
        ("text/plain", "", "text/plain; charset=utf-8"),
    ],
)
def test_charsets(content_type: str, charset: str | None, result: str) -> None:
    assert with_charset(content_type, charset) == result


@pytest.mark.parametrize(
    "text",
    [
        "text/html", "TEXT/HTML", "text/html;charset=utf-8", 'text/html; charset="utf-8"',
        "text/html \t; \tcharset=utf-8",
        "application/vnd.api+json", "multipart/byteranges; boundary=abc", "image/svg+xml", "a/b", "text/html;",
        "text/html; ;charset=utf-8;", 'text/plain; title="a, b; c=d"', "text/plain; a=b; c=d", "*/*",
    ],
)  # fmt: skip
def test_media_types(text: str) -> None:
    assert valid_content_type(text) == text


@pytest.mark.parametrize(
    "text",
    [
        None, "", "text", "text/", "/html", "text/html/x", "text /html", "text/ html", " text/html", "text/html ",
        "text/html\r\nX: y", "text/html\n", "text/html; charset", "text/html; charset=", "text/html; charset=utf 8",
        "text/html, text/plain", 'text/html; a="b', 'text/html; a="\r\n"', "text/html; a=π", 'text/html; a="π"',
        'text/html; a="\x00"', "text/html; a=b, c", "téxt/html", "text/html; charset = utf-8", "text/" + "x" * 300,
        'text/html; a="b"c', "text/html;charset=utf-8 x",
    ],
)  # fmt: skip
def test_what_is_no_media_type_is_none(text: str | None) -> None:
    assert valid_content_type(text) is None


@pytest.mark.parametrize(
    "content_type",
    [
        "text/html", "text/html; charset=utf-8", "TEXT/HTML", " text/html", "image/svg+xml", "Image/SVG+XML; a=b",
        "application/xhtml+xml", "application/xml", "text/xml", "application/pdf", "text/javascript; charset=utf-8",
        "application/javascript", "text/css", "text/markdown", "application/x-shockwave-flash", "message/rfc822",
        "multipart/related", "", "x", "image/", "image/x+xml", "video/x+xml", "image/png,text/html",
        "image/png, text/html", "text/plain, text/html", "image/png text/html",
    ],
)  # fmt: skip
def test_what_a_browser_could_run_is_active(content_type: str) -> None:
    assert is_active(content_type)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "text/plain; charset=utf-8", "Text/Plain", "text/csv", "application/json", OCTETS, "image/png",
     "IMAGE/PNG", "audio/mpeg", "video/mp4", "font/woff2", "image/png; a=b"],
)  # fmt: skip
def test_what_a_browser_only_shows_is_not(content_type: str) -> None:
    assert not is_active(content_type)
    assert not is_rendered(content_type)


@pytest.mark.parametrize(
    "content_type, rendered",
    [
        *[
            (name, False)
            for name in ("application/zip", "Application/X-Tar", "application/vnd.debian.binary-package; a=b")
        ],
        *[(name, True) for name in ("text/html", "application/xhtml+xml", "application/xml; a=b", "application/pdf")],
        *[(name, True) for name in ("image/svg+xml", "application/javascript", "application/x-shockwave-flash")],
        *[
            (name, True)
            for name in ("application/unknown", "application/atom+XML", "multipart/mixed", "model/x", "", "zip")
        ],
    ],
)
def test_what_a_browser_saves_without_being_told_is_active_and_yet_not_rendered(
    content_type: str, rendered: bool
) -> None:
    assert is_active(content_type)
    assert is_rendered(content_type) is rendered


@given(st.text())
def test_every_name_has_a_valid_type(name: str) -> None:
    for text in (name, f"{name}.html", f"a.{name}"):
        assert valid_content_type(content_type_for(text))


@given(st.text() | st.text('ab/;= "\t,\\+é').map("a/{}".format), st.none() | st.text())
def test_no_type_raises_and_a_valid_one_can_be_sent(text: str, charset: str | None) -> None:
    is_active(text)
    if (valid := valid_content_type(text)) is not None:
        assert valid == text
        assert text.isascii()
        assert text.replace("\t", " ").isprintable()
        assert "charset=" in text.lower() or valid_content_type(with_charset(text, charset)) or len(text) > 200


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["/", ";", " ", "; ", "a", ";a=b", '"', ' ;a="', ".", "a.", "; ; "], ids=repr)
@pytest.mark.parametrize("begin", ["", "a/b", 'a/b;a="'], ids=repr)
def test_a_huge_text_is_decided(begin: str, text: str) -> None:
    huge = begin + text * (LARGE // len(text)) + "\n"
    assert valid_content_type(huge) is None
    assert valid_content_type(huge[:254] + "\n") is None
    assert content_type_for(huge)
    is_active(f"image/{huge}")


@pytest.fixture
def unchanged_types() -> Iterator[None]:
    before = dict(content_types._added)
    yield
    content_types._added.clear()
    add_content_types(before)


@pytest.mark.usefixtures("unchanged_types")
def test_an_application_adds_types_which_win_over_the_table() -> None:
    assert (content_type_for("a.gcode"), content_type_for("a.ts")) == (OCTETS, "video/mp2t")
    add_content_types({".gcode": "text/x-gcode", ".TS": "text/plain", ".7z": "application/x-own; level=9"})
    assert content_type_for("b/A.GCODE") == "text/x-gcode; charset=utf-8"
    assert content_type_for("a.ts") == "text/plain; charset=utf-8"
    assert content_type_for("a.7z") == "application/x-own; level=9"
    assert content_type_for("a.mp4") == "video/mp4"
    add_content_types({".gcode": None, ".ts": None, ".mp4": None, "never added": None})
    assert (content_type_for("a.gcode"), content_type_for("a.ts")) == (OCTETS, "video/mp2t")
    assert (content_type_for("a.7z"), content_type_for("a.mp4")) == ("application/x-own; level=9", "video/mp4")


@pytest.mark.usefixtures("unchanged_types")
@pytest.mark.parametrize(
    "suffix, content_type, problem",
    [
        ("gcode", "text/x-gcode", "write one dot first"),
        (".", "text/x-gcode", "write one dot first"),
        (".tar.gz", "application/gzip", "write one dot first"),
        (".a/b", "text/plain", "write one dot first"),
        (".a\n", "text/plain", "write one dot first"),
        (".gcode", "gcode", "not a media type"),
        (".gcode", "text/plain\r\nX-Own: 1", "not a media type"),
        (".gcode", "", "not a media type"),
    ],
)
def test_a_type_that_cannot_be_added_is_refused_with_what_to_write(
    suffix: str, content_type: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        add_content_types({".fine": "text/plain", suffix: content_type})
    assert content_type_for("a.fine") == OCTETS, "nothing of a table with a mistake is taken"


def test_the_table_of_types_by_their_suffixes() -> None:
    table = content_types.content_types()
    assert (table[".txt"], table[".png"]) == ("text/plain; charset=utf-8", "image/png")
    assert all(content_types.content_type_for(f"a{suffix}") == kind for suffix, kind in table.items())


@pytest.mark.parametrize(
    "types", [[(".gcode", "text/x-gcode")], ".gcode", {5: "text/plain"}, {".gcode": b"text/plain"}]
)
def test_types_of_another_type_are_refused(types: Any) -> None:
    with pytest.raises(TypeError, match="such as"):
        add_content_types(types)
