"""Names of sources whose names need not be files': rows, and what functions make."""

from pathlib import Path
from typing import Any

import pytest

import downloadview_async as dv
from downloadview_async import Download
from downloadview_async.sources.names import Names, canonical_name, entries_check, entry_check, without_empty_segments
from downloadview_async.testing import call

CONTENT = b"0123456789"


@pytest.mark.parametrize(
    "name, plain",
    [
        ("a/b", "a/b"),
        ("./a//b", "a/b"),
        ("a/./b", "a/b"),
        ("/a//b", "/a/b"),
        ("//a", "/a"),
        ("a/", "a/"),
        ("a//", "a/"),
        ("a/.", "a/"),
        ("a/../b//c", "a/../b//c"),
        ("..", ".."),
        ("", ""),
        (".", ""),
        ("/", "/"),
    ],
)
def test_single_dots_and_empty_segments_of_any_text_are_dropped(name: str, plain: str) -> None:
    assert without_empty_segments(name) == plain


@pytest.mark.parametrize("names", ["portable", "any", "exact"])
@pytest.mark.parametrize("name", ["", "..", "../a", "a/..", "a/../b", "a\0", "a\n", "\x7f", "\ud800", "x" * 4096])
def test_what_is_refused_whatever_the_choice(name: str, names: Any) -> None:
    with pytest.raises(dv.FileMissing):
        canonical_name(name, names)


@pytest.mark.asyncio
async def test_no_file_is_kept_under_two_names(tmp_path: Path) -> None:
    made: list[str] = []

    def content(name: str) -> Any:
        made.append(name)
        yield CONTENT

    def make(name: str) -> Any:
        return dv.VirtualFile(lambda: content(name), name=name, max_age=60)

    source = dv.CachedSource(dv.VirtualSource(make), dv.Cache(tmp_path / "cache"), name="made")
    for name in ("a/b", "./a/b", "a//b", "a/./b"):
        assert (await call(Download(source, key=lambda request, name=name: name), "/")).body == CONTENT  # type: ignore[misc]
    assert made == ["a/b"]
    await source.aclose()


@pytest.mark.asyncio
async def test_a_function_is_asked_without_the_slash_it_knows_nothing_of() -> None:
    source = dv.VirtualSource(lambda name: CONTENT if name == "a.txt" else None)
    for name, status in (("a.txt", 200), ("/a.txt", 200), ("//./a.txt", 200), ("a.txt/", 404), ("../a.txt", 404)):
        assert (await call(Download(source, key=lambda request, name=name: name), "/")).status == status, name  # type: ignore[misc]


@pytest.mark.asyncio
async def test_a_row_whose_key_has_empty_segments_is_found_by_its_key() -> None:
    rows = {"a//b=": CONTENT, "a/b=": b"another"}

    async def get(key: str) -> Any:
        return type("Row", (), {"file": dv.VirtualFile(rows[key], name="x")}) if key in rows else None

    source = dv.ObjectSource(get)
    for key, body in (("a//b=", CONTENT), ("a/./b=", b"another"), ("/a/b=", b"another")):
        assert (await call(Download(source, key=lambda request, key=key: key), "/")).body == body  # type: ignore[misc]


@pytest.mark.parametrize("names", ["portable", "any", "exact"])
def test_an_entry_has_a_name_that_is_accepted(names: Names) -> None:
    is_valid, are_valid = entry_check("", names), entries_check("", names)
    parts = ["", ".", "..", "a", "a.b", "c:", "b\\", "\n", "\x7f", "\x85", "\u2028", "\udc80", "😀", "é", "NUL", "com1"]
    parts += ["con", "cOn.txt", "lpt²", "aux ", "conin$", "com", "x.con", "console", " ", "x/y"]
    for name in (first + second for first in parts for second in parts):
        try:
            expected = canonical_name(name, names) == name and "/" not in name and name != "."
        except dv.FileMissing:
            expected = False
        assert is_valid(name) is expected, name
        for all_of_them in ([name], ["a", name], [name, "b"]):
            assert are_valid(all_of_them) is expected, name


def test_an_entry_has_a_path_of_limited_length() -> None:
    assert entry_check("a" * 4000)("é" * 47)
    assert not entry_check("a" * 4000)("é" * 47 + "n")
    assert not entry_check("a" * 4094)("n")
    assert entries_check("a" * 3074)(["é" * 255])
    assert not entries_check("")(["n" * 256])
    assert not entries_check("a" * 3075)(["n"])
