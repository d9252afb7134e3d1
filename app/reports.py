"""Reports that are generated on request: the virtual source of the demo."""

import os
from collections.abc import Iterator
from pathlib import Path

from downloadview_async import VirtualFile

FILES = Path(__file__).with_name("files")
LARGE_SIZE = 100_000_000  # bytes
_LINE_SIZE = 50
_LINES_AT_ONCE = 2_000


async def make(name: str) -> VirtualFile | None:
    """Return the report called `name`, or None if there is no such report."""
    if name == "summary.txt":
        return VirtualFile(summary, name=name)
    if name == "large.txt":
        return VirtualFile(large, name=name, size=LARGE_SIZE)
    return None


def summary() -> str:
    """Return a table of the demo's files and their sizes."""
    sizes = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(FILES) if not entry.name.startswith("."))
    lines = [f"{size:>12,}  {name}" for name, size in sizes]
    total = sum(size for _, size in sizes)
    return "\n".join(["       bytes  file", *lines, f"{total:>12,}  in {len(sizes)} files", ""])


def large() -> Iterator[bytes]:
    """Yield `LARGE_SIZE` bytes of numbered lines. Only a few lines are in memory at any time."""
    for first in range(0, LARGE_SIZE // _LINE_SIZE, _LINES_AT_ONCE):
        lines = (
            f"line {number:>9} of {LARGE_SIZE // _LINE_SIZE:>9}" for number in range(first, first + _LINES_AT_ONCE)
        )
        yield "".join(f"{line:<{_LINE_SIZE - 1}}\n" for line in lines).encode()
