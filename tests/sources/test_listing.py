"""Listings of folders: the same tree in every source and storage that can list."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import Cache, CachedSource, MemoryStorage, PathSource, StorageSource
from downloadview_async.errors import AccessDenied, FileMissing
from downloadview_async.sources.base import SupportsListing
from downloadview_async.sources.directory_storage import DirectoryStorage
from downloadview_async.sources.listing import Entry

pytestmark = pytest.mark.asyncio
LONG = "é" * 125 + "n.txt"  # 255 bytes
TREE = {
    "one.txt": b"1",
    "empty": b"",
    ".hidden": b"hidden",
    "Case": b"upper",
    "case": b"lower",
    "שלום עולם.txt": b"right to left",
    "日本語 🎉.bin": b"wide",
    LONG: b"long",
    "a b%2Fc?#&;'\"<i>.txt": b"hostile",
    "reports/2026/q1.pdf": b"first",
    "reports/2026/q2.pdf": b"second",
    "reports/readme.md": b"read",
    "a/b/c/d/e/f.txt": b"deep",
}
FOLDERS = {
    "": {*(name for name in TREE if "/" not in name), "reports/", "a/"},
    "reports": {"readme.md", "2026/"},
    "reports/2026": {"q1.pdf", "q2.pdf"},
    "a/b/c/d/e": {"f.txt"},
}
MISSING = (
    "nothing",
    "report",
    "one.txt",
    "reports/readme.md",
    "a/..",
    "..",
    "../a",
    "a/../a",
    "a\0b",
    "a/\udcff",
    "\n",
)


def directory_with_tree(path: Path) -> Path:
    for name, content in TREE.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


async def entries_of(source: Any, folder: str = "") -> dict[str, Entry]:
    """Return the entries of a folder by their names; those of folders end with a slash."""
    assert isinstance(source, SupportsListing)
    entries = [entry async for entry in source.list(folder)]
    named = {f"{entry.name}/" if entry.is_folder else entry.name: entry for entry in entries}
    assert len(named) == len(entries)
    return named


def _of_path(path: Path) -> Any:
    return PathSource(directory_with_tree(path))


def _of_directory_storage(path: Path) -> Any:
    return StorageSource(DirectoryStorage(directory_with_tree(path)))


def _of_memory(path: Path) -> Any:
    return StorageSource(MemoryStorage(TREE))


def _of_cache(path: Path) -> Any:
    return CachedSource(StorageSource(MemoryStorage(TREE)), Cache(path / "cache"), name="memory")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": _of_path,
    "directory": _of_directory_storage,
    "memory": _of_memory,
    "cached": _of_cache,
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return SOURCES[request.param](tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
async def test_a_folder_is_listed(source: Any, folder: str) -> None:
    for spelling in (folder, f"{folder}/", f"/{folder}", f"./{folder}"):
        entries = await entries_of(source, spelling)
        assert set(entries) == FOLDERS[folder]
    for name, entry in entries.items():
        if not entry.is_folder:
            assert entry.size == len(TREE[f"{folder}/{name}".removeprefix("/")])
            assert entry.modified is not None
            assert entry.modified.tzinfo is not None
        else:
            assert entry.size is None


@pytest.mark.parametrize("folder", MISSING)
async def test_a_folder_that_does_not_exist_is_missing(source: Any, folder: str) -> None:
    with pytest.raises(FileMissing):
        await entries_of(source, folder)


async def test_every_file_that_is_listed_can_be_opened(source: Any) -> None:
    async def walk(folder: str) -> None:
        for name, entry in (await entries_of(source, folder)).items():
            if entry.is_folder:
                await walk(folder + name)
            else:
                async with (await source.resolve(folder + name)).open() as opened:
                    assert opened.metadata.size == entry.size
                names.append(folder + name)

    names: list[str] = []
    await walk("")
    assert sorted(names) == sorted(TREE)


@pytest.mark.parametrize("use_openat2", [True, False])
@pytest.mark.parametrize(
    ("symlinks", "expected"),
    [
        ("deny", {"folder/", "one.txt"}),
        ("inside", {"folder/", "one.txt", "to-file", "to-folder/", "up", "here/"}),
        ("follow", {"folder/", "one.txt", "to-file", "to-folder/", "up", "here/", "outside", "absolute"}),
    ],
)
async def test_links_are_listed_as_they_are_opened(
    tmp_path: Path, symlinks: Any, expected: set[str], use_openat2: bool
) -> None:
    (tmp_path / "outside.txt").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "one.txt").write_bytes(b"12345")
    for name, target in {
        "to-file": "one.txt",
        "to-folder": "folder",
        "up": "folder/../one.txt",
        "here": ".",
        "outside": "../outside.txt",
        "absolute": str(tmp_path / "outside.txt"),
        "dangling": "nothing",
        "loop": "loop",
        "magic": "/proc/self/root",
    }.items():
        (root / name).symlink_to(target)
    source = PathSource(root, symlinks=symlinks)
    source.root.use_openat2 = use_openat2
    entries = await entries_of(source)
    entries.pop("magic/", None)  # openat replaces openat2 only where the kernel is old, and it follows this link
    assert set(entries) == expected
    if symlinks != "deny":
        assert entries["to-file"].size == entries["up"].size == 5
        for folder in ("to-folder", "here"):
            await entries_of(source, folder)
    if symlinks == "inside":
        for folder in ("outside", "magic", "here/magic"):
            with pytest.raises((FileMissing, AccessDenied)):
                await entries_of(source, f"{folder}/x")


async def test_what_cannot_be_downloaded_is_left_out(tmp_path: Path) -> None:
    for name in ("good", "aux.txt", "back\\slash", "co:lon", "new\nline", "del\x7f"):
        (tmp_path / name).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.bin")).write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    assert set(await entries_of(PathSource(tmp_path, symlinks="follow"))) == {"good", "folder/"}
    any_names = {"good", "folder/", "aux.txt", "back\\slash", "co:lon"}
    assert set(await entries_of(PathSource(tmp_path, names="any"))) == any_names
