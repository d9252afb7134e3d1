"""The names of files in an archive: safe to unpack, and different from each other."""

import re
from collections.abc import Iterable

_UNSAFE = re.compile("[\x00-\x1f\x7f\\\\\ud800-\udfff]")
_DRIVE = re.compile("^([^/]):")  # not only a letter: Windows takes any character for a drive
_LONGEST = 255  # bytes of a name in the usual file systems


def safe_name(path: str) -> str:
    """Return a path that stays in the directory in which an archive is unpacked, on every system.

    An underscore replaces each backslash, control character and lone surrogate, each segment that is empty, `.` or
    `..`, and the colon of a drive at the beginning. A slash at the end, as folders have it, stays.
    """
    is_ordinary = "/." not in path and "//" not in path and path[:1] not in "./" and path[1:2] != ":"
    if is_ordinary and _UNSAFE.search(path) is None:
        return path  # nearly every name
    segments = _UNSAFE.sub("_", path.removesuffix("/")).split("/")
    safe = "/".join("_" if segment in ("", ".", "..") else segment for segment in segments)
    return _DRIVE.sub(r"\1_", safe) + "/" * path.endswith("/")


def distinct_names(paths: Iterable[str]) -> list[str]:
    """Return each path, with a number for a file whose path another file or a folder has: `a.txt`, `a (2).txt`.

    A path that ends with a slash is a folder, and stays as it is. Paths that differ in upper and lower case differ.
    """
    paths = list(paths)
    inner = {path.rpartition("/")[0] for path in paths} - {""}
    folders = {parent for folder in inner for parent in _parents(f"{folder}/")}
    # A file keeps its path if it is the first with it, whatever numbers other files get.
    firsts = {path: index for index, path in reversed([*enumerate(paths)]) if path not in folders}
    taken = folders | firsts.keys()
    numbers: dict[str, int] = {}  # the next number of a path: many names may become the same safe one
    names = []
    for index, path in enumerate(paths):
        if path.endswith("/") or firsts.get(path) == index:
            names.append(path)
        else:
            number = numbers.get(path, 2)
            while (name := _numbered(path, number)) in taken:
                number += 1
            numbers[path] = number + 1
            names.append(name)
            taken.add(name)
    return names


def _parents(path: str) -> Iterable[str]:
    """Yield the folders that a path needs, without a last slash; a folder needs itself."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _numbered(path: str, number: int) -> str:
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not stem:
        stem, dot, extension = name, "", ""
    end = f" ({number}){dot}{extension}"
    if len(name.encode()) <= _LONGEST:  # it can be unpacked, so the other name has to be no longer
        while len(f"{stem}{end}".encode()) > _LONGEST and len(stem) > 1:
            stem = stem[:-1]
    return f"{folder}{slash}{stem}{end}"
