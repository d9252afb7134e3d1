"""Names in archives: none leaves the directory in which it is unpacked, and no two are equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.archive_names import distinct_names, safe_name


@pytest.mark.parametrize(
    "path, name",
    [
        ("a/b.txt", "a/b.txt"),
        ("a/b/", "a/b/"),
        ("/etc/passwd", "_/etc/passwd"),
        ("../../x", "_/_/x"),
        ("a/../b/./c", "a/_/b/_/c"),
        ("a//b", "a/_/b"),
        ("..", "_"),
        ("../", "_/"),
        ("", "_"),
        ("...", "..."),
        ("..\\..\\x", ".._.._x"),
        ("\\\\host\\share", "__host_share"),
        ("C:\\x", "C__x"),
        ("c:x/d:y", "c_x/d:y"),
        ("a/C:", "a/C:"),
        ("12:30.txt", "12:30.txt"),
        *[("1:x", "1_x"), (".:/x", "._/x"), ("é:x", "é_x")],  # Windows takes any character for a drive
        ("a\nb\x00c\x7f", "a_b_c_"),
        ("\udcff.txt", "_.txt"),
        ("\u202eexe.txt é 文 😀", "\u202eexe.txt é 文 😀"),
    ],
)
def test_names_stay_in_the_directory(path: str, name: str) -> None:
    assert safe_name(path) == name


@given(st.text(alphabet="./\\C:a\n\udc80é"))
def test_every_name_is_relative_and_stays_as_it_is(path: str) -> None:
    name = safe_name(path)
    assert not name.startswith("/")
    assert "\\" not in name
    assert {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/"))
    assert name.endswith("/") == path.endswith("/")
    assert safe_name(name) == name
    name.encode()


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a", "b"], ["a", "b"]),
        (["a.txt", "a.txt", "a.txt"], ["a.txt", "a (2).txt", "a (3).txt"]),
        (["a.txt", "a.txt", "a (2).txt"], ["a.txt", "a (3).txt", "a (2).txt"]),
        (["d/a.txt", "a.txt", "d/a.txt"], ["d/a.txt", "a.txt", "d/a (2).txt"]),
        ([".env", ".env"], [".env", ".env (2)"]),
        (["d.x/a", "d.x/a"], ["d.x/a", "d.x/a (2)"]),
        # an object store may have both `a` and `a/b`
        (["a", "a/b"], ["a (2)", "a/b"]),
        (["a/b/c", "a/b", "a"], ["a/b/c", "a/b (2)", "a (2)"]),
        (["d/", "d"], ["d/", "d (2)"]),
        (["d/", "d/"], ["d/", "d/"]),
        (["README", "readme"], ["README", "readme"]),
        # a name of 255 bytes does not become longer than file systems allow
        (["d/" + "é" * 125 + ".tar"] * 2, ["d/" + "é" * 125 + ".tar", "d/" + "é" * 123 + " (2).tar"]),
        (["a" * 255] * 2, ["a" * 255, "a" * 251 + " (2)"]),
        (["a" * 256] * 2, ["a" * 256, "a" * 256 + " (2)"]),
        ([], []),
    ],
)
def test_equal_names_get_numbers(paths: list[str], names: list[str]) -> None:
    assert distinct_names(paths) == names


@given(st.lists(st.lists(st.sampled_from(["a", "b", "a (2)", "a.b"]), min_size=1, max_size=3).map("/".join)))
def test_no_two_files_have_the_same_name_or_that_of_a_folder(paths: list[str]) -> None:
    names = distinct_names(paths)
    assert len({*names}) == len(names) == len(paths)
    folders = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    assert folders.isdisjoint(names)


def test_the_work_for_equal_names_grows_with_their_number() -> None:
    class Path(str):
        """A path that counts how often it is split into a stem and an extension."""

        splits = 0

        def rpartition(self, separator: str, /) -> tuple[str, str, str]:
            Path.splits += separator == "/"
            return super().rpartition(separator)

    names = distinct_names([Path("a.txt")] * 1000)
    assert len({*names}) == 1000
    assert names[-1] == "a (1000).txt"
    assert Path.splits < 2000
