"""Opening beneath a root: what names, links and races cannot do. Every test runs with openat2 and without."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from downloadview_async import AccessDenied, ConfigurationError, FileError, FileMissing, SourceUnavailable
from downloadview_async.sources.local.root import Root, Symlinks, has_openat2, open_trusted
from downloadview_async.sources.names import checked_segments

OUTSIDE = b"outside"
INSIDE = b"inside"
REFUSED = b"refused"

SWAP_TRIES = int(os.environ.get("SWAP_TRIES", "20000"))
"""SWAP_TRIES=1000000 takes some minutes."""

SWAPPER = """
import os, sys
real, link, swap = sys.argv[1:]
while True:
    for which in (real, link):
        os.rename(which, swap)
        os.rename(swap, which)
"""


@pytest.fixture(params=["openat2", "openat"])
def use_openat2(request: pytest.FixtureRequest) -> bool:
    if request.param == "openat2" and not has_openat2():
        pytest.skip("openat2: this kernel or sandbox has none")
    return bool(request.param == "openat2")


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "a.txt").write_bytes(INSIDE)
    (root / "sub" / "b.txt").write_bytes(INSIDE)
    (tmp_path / "root-private").mkdir()
    (tmp_path / "root-private" / "secret.txt").write_bytes(OUTSIDE)
    (tmp_path / "secret.txt").write_bytes(OUTSIDE)
    links = {
        "to-file": "sub/b.txt",
        "to-directory": "sub",
        "sub/deep/up": "../b.txt",
        "sub/deep/up-twice": "../../a.txt",
        "out": "../secret.txt",
        "out-and-in": "../root/a.txt",
        "absolute": str(root / "a.txt"),
        "absolute-out": str(tmp_path / "secret.txt"),
        "through-proc": f"/proc/self/cwd/{os.path.relpath(root / 'a.txt')}",
        "loop": "loop",
        "loop-1": "loop-2",
        "loop-2": "loop-1",
        "dangling": "nothing",
        "to-root": ".",
        "directory-out": "..",
        "to-link": "to-file",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(root)  # a socket's path has at most 107 bytes
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        yield root


def read(root: Root, name: str) -> bytes:
    descriptor, found, _ = root.open(name)
    with os.fdopen(descriptor, "rb") as file:
        assert not os.get_inheritable(descriptor)
        content = file.read()
    assert found.st_size == len(content)
    return content


REFUSED_NAMES = [
    *["", "/", "//etc/passwd", "/etc/passwd", ".", "..", "../secret.txt", "sub/../a.txt", "./a.txt", "sub//b.txt"],
    *[
        "a.txt/",
        "a.txt/x",
        "sub/",
        "sub",
        "../root/a.txt",
        "../root-private/secret.txt",
        "a.txt\0",
        "\0",
        "a\nb",
        "a\x7f",
    ],
    *[
        "\ud800.txt",
        "x" * 300,
        "x/" * 2500 + "x",
        "sub\\b.txt",
        "..\\secret.txt",
        "C:\\a.txt",
        "c:a.txt",
        "\\\\host\\share",
    ],
    *[
        "a.txt::$DATA",
        "CON",
        "nul.txt",
        "sub/COM1",
        "lpt9.tar.gz",
        "con .txt",
        "fifo",
        "socket",
        "a.txt;x=1",
        "nothing",
    ],
]


@pytest.mark.parametrize("symlinks", ["deny", "inside", "follow"])
@pytest.mark.parametrize("name", REFUSED_NAMES, ids=lambda name: ascii(name)[:30])
def test_a_name_that_is_no_file_of_the_root_is_missing(
    base: Path, use_openat2: bool, symlinks: Symlinks, name: str
) -> None:
    root = Root(base, symlinks=symlinks, use_openat2=use_openat2)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileMissing):
        root.open(name)
    with suppress(FileMissing):
        assert root.open_nowait(name) is None  # a worker is asked, as above
    assert len(os.listdir("/proc/self/fd")) <= descriptors


LINKS = {
    "to-file": INSIDE,
    "to-directory/b.txt": INSIDE,
    "sub/deep/up": INSIDE,
    "sub/deep/up-twice": INSIDE,
    "to-link": INSIDE,
    "to-root/a.txt": INSIDE,
    "to-root/to-root/to-directory/b.txt": INSIDE,
    "absolute": None,
    "out-and-in": None,
    "through-proc": None,
    "out": None,
    "absolute-out": None,
    "directory-out/secret.txt": None,
    "directory-out/root/a.txt": None,
    "loop": None,
    "loop-1": None,
    "dangling": None,
    "to-directory": None,
    "to-root": None,
}


@pytest.mark.parametrize("name, content", LINKS.items())
def test_links_that_stay_inside_are_followed_and_no_others(
    base: Path, use_openat2: bool, name: str, content: bytes | None
) -> None:
    root = Root(base, symlinks="inside", use_openat2=use_openat2)
    if content is None:
        with pytest.raises((FileMissing, AccessDenied)):
            root.open(name)
    else:
        assert read(root, name) == content


@pytest.mark.parametrize(
    "symlinks, name, problem",
    [
        (
            "inside",
            "out",
            'is, or is below, a symbolic link that is absolute or leads out of the root: symlinks = "follow"',
        ),
        ("inside", "absolute", "a symbolic link that is absolute or leads out of the root"),
        ("deny", "to-file", 'is, or is below, a symbolic link: symlinks = "inside" or "follow" would allow it'),
        ("deny", "to-directory/b.txt", "a symbolic link: symlinks"),
        ("inside", "loop", "Too many levels of symbolic links"),
    ],
)
def test_the_log_tells_that_a_link_was_refused(
    base: Path, use_openat2: bool, symlinks: Symlinks, name: str, problem: str
) -> None:
    root = Root(base, symlinks=symlinks, use_openat2=use_openat2)
    with pytest.raises(AccessDenied) as refused:
        root.open(name)
    assert problem in str(refused.value)
    assert "cross-device" not in str(refused.value)


@pytest.mark.parametrize("name", LINKS)
def test_no_link_is_followed_where_links_are_denied(base: Path, use_openat2: bool, name: str) -> None:
    root = Root(base, symlinks="deny", use_openat2=use_openat2)
    assert read(root, "sub/b.txt") == INSIDE
    with pytest.raises((FileMissing, AccessDenied)):
        root.open(name)


def test_every_link_is_followed_where_the_owner_wants_it(base: Path, use_openat2: bool) -> None:
    root = Root(base, symlinks="follow", use_openat2=use_openat2)
    assert read(root, "out") == OUTSIDE
    assert read(root, "absolute") == INSIDE


@pytest.mark.parametrize(
    "name",
    ["a b.txt", "50%.txt", "a%20b.txt", "q?.txt", "é.txt", "π.txt", ",.txt", "end ", "end.", ".hidden", "...", "~"],
)
def test_unusual_names_are_files_like_others(base: Path, use_openat2: bool, name: str) -> None:
    (base / name).write_bytes(name.encode())
    assert read(Root(base, use_openat2=use_openat2), name) == name.encode()


def test_regex_characters_in_the_root_mean_nothing(tmp_path: Path, use_openat2: bool) -> None:
    strange = tmp_path / "r[o].*(x)+?"
    strange.mkdir()
    (strange / "a.txt").write_bytes(INSIDE)
    root = Root(strange, use_openat2=use_openat2)
    assert read(root, "a.txt") == INSIDE
    assert root.locate("a.txt") == f"{strange}/a.txt"


def test_an_unreadable_file_is_denied(base: Path, use_openat2: bool) -> None:
    if os.geteuid() == 0:
        # root may read everything; a directory without the search bit is no better. Ask as somebody else.
        _as_nobody(base, use_openat2)
        return
    (base / "a.txt").chmod(0)
    with pytest.raises(AccessDenied):
        Root(base, use_openat2=use_openat2).open("a.txt")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")
def test_a_folder_that_cannot_be_searched_is_denied(base: Path, use_openat2: bool) -> None:
    """Its names can be read, but none of its files."""
    root = Root(base, use_openat2=use_openat2)
    (base / "closed").mkdir()
    (base / "closed" / "a.txt").write_bytes(INSIDE)
    (base / "closed").chmod(0o444)
    _is_denied_to_nobody(lambda: root.open_folder("closed"))


def _as_nobody(base: Path, use_openat2: bool) -> None:
    root = Root(base, use_openat2=use_openat2)
    (base / "a.txt").chmod(0)
    _is_denied_to_nobody(lambda: root.open("a.txt"))


def _is_denied_to_nobody(opening: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            opening()
        except AccessDenied:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_directory_swapped_for_a_link_never_lets_an_outside_byte_through(base: Path, use_openat2: bool) -> None:
    """A process swaps `swap` between a directory and a link to the outside, as fast as it can."""
    outside = base.parent / "root-private"
    (outside / "a.txt").write_bytes(OUTSIDE)
    real, link, swap = base / "real", base / "link", base / "swap"
    real.mkdir()
    (real / "a.txt").write_bytes(INSIDE)
    link.symlink_to(outside)
    swapper = subprocess.Popen([sys.executable, "-c", SWAPPER, real, link, swap])
    root = Root(base, use_openat2=use_openat2)
    seen = {INSIDE: 0, OUTSIDE: 0, REFUSED: 0}
    deadline = time.monotonic() + 30  # for a machine that lets only one of the two run for long
    try:
        while sum(seen.values()) < SWAP_TRIES or (0 in (seen[INSIDE], seen[REFUSED]) and time.monotonic() < deadline):
            try:
                seen[read(root, "swap/a.txt")] += 1
            except FileError:
                seen[REFUSED] += 1
    finally:
        swapper.kill()
        swapper.wait()
    print(seen)
    assert seen[OUTSIDE] == 0
    assert seen[INSIDE] > 0
    assert seen[REFUSED] > 0


@pytest.mark.parametrize("path", ["nothing", "a.txt"])
def test_a_root_that_is_no_directory_is_refused_at_once(base: Path, path: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        Root(base / path)


def test_an_empty_root_is_refused_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset variable must not publish the current directory."""
    monkeypatch.chdir(base)
    with pytest.raises(ConfigurationError, match="the root is empty"):
        Root("")
    assert Root(".").path == str(base)


def test_an_unknown_policy_is_refused_at_once(base: Path) -> None:
    with pytest.raises(ConfigurationError, match="deny, inside, follow"):
        Root(base, symlinks="yes")  # type: ignore[arg-type]


def test_a_closed_root_opens_nothing(base: Path, use_openat2: bool) -> None:
    root = Root(base, use_openat2=use_openat2)
    root.close()
    root.close()
    with pytest.raises(SourceUnavailable):
        root.open("a.txt")


def test_a_cached_file_is_opened_without_a_worker(base: Path) -> None:
    if not has_openat2():
        pytest.skip("openat2: this kernel or sandbox has none")
    root = Root(base)
    read(root, "a.txt")
    opened = root.open_nowait("a.txt")
    assert opened is not None
    os.close(opened[0])


def test_a_trusted_path_is_a_regular_file_or_nothing(base: Path) -> None:
    descriptor, *_ = open_trusted(str(base / "out"))
    os.close(descriptor)
    for name in ("fifo", "sub", "nothing", "out\0"):
        with pytest.raises(FileMissing):
            open_trusted(str(base / name))


def test_segments_of_a_good_name() -> None:
    assert checked_segments("a/b c/π.txt") == ["a", "b c", "π.txt"]
