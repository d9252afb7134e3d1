"""The grid: which file can be sent by whom, as the tests of `test_grid.py` prove it and the documentation shows it.

`python -m tests.proxies.grid` writes it into docs/proxies.md and README.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from downloadview_async import proxy_kinds

PROJECT = Path(__file__).resolve().parents[2]
PAGES = ["docs/proxies.md", "README.md"]
BEGIN = "<!-- the grid: made by python -m tests.proxies.grid -->"
END = "<!-- the end of the grid -->"

ROWS = {
    "path": "path: a directory",
    "storage": "storage: a local directory",
    "object": "object: rows, files in a local directory",
    "lake": "storage: an object store (S3)",
    "lake-object": "object: rows, files in an object store",
    "remote": "remote: another HTTP server",
    "virtual": "virtual: generated",
}
KINDS = {name: kind for name, kind in proxy_kinds().items() if kind.configuration is not None}
"""The proxies that can be started, and so are in the grid."""

COLUMNS = {
    **{name: kind.title for name, kind in KINDS.items()},
    "redirect": "presigned URL",
    "none": "no proxy",
}
LOCAL = ["path", "storage", "object"]
LAKE = ["lake", "lake-object"]
FAR = [*LAKE, "remote", "virtual"]

PROXY, FETCH, CACHE, REDIRECT = "proxy", "fetch", "cache", "redirect"
ZERO_COPY, RANGES, ONCE = "zero-copy", "ranges", "once-cached"
WAYS = {
    PROXY: "yes",
    FETCH: "yes",
    CACHE: "via cache",
    REDIRECT: "yes",
    ZERO_COPY: "zero-copy, ranges",
    RANGES: "streamed, ranges",
    ONCE: "streamed; zero-copy and ranges once cached",
}
"""How a file is sent, and the mark for it."""


@dataclass(frozen=True)
class Cell:
    """A claim: files of this row are sent in this way where this column is in front."""

    row: str
    column: str
    way: str

    @property
    def id(self) -> str:
        """The name of its test: `test_a_cell[...]`."""
        return f"{self.row}-{self.column}-{self.way}"


def _cells() -> Iterator[Cell]:
    for row in LOCAL:
        yield from (Cell(row, proxy, PROXY) for proxy in KINDS)
        yield Cell(row, "none", ZERO_COPY)
    for row in [*LAKE, "remote"]:
        yield from (Cell(row, proxy, FETCH) for proxy, kind in KINDS.items() if kind.fetches_urls)
    for row in FAR:
        yield from (Cell(row, proxy, CACHE) for proxy in KINDS)
    yield from (Cell(row, "redirect", REDIRECT) for row in LAKE)
    yield from (Cell(row, "none", RANGES) for row in [*LAKE, "remote"])
    yield Cell("virtual", "none", ONCE)


CELLS = list(_cells())


def marks(row: str, column: str) -> str:
    """Return what the grid says in one place: the ways that are proven, or a dash."""
    found = [WAYS[cell.way] for cell in CELLS if (cell.row, cell.column) == (row, column)]
    return ", or ".join(found) or "-"


def table() -> str:
    """Return the grid in Markdown."""
    lines = [["file \\ sent by", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    lines += [[title, *(marks(row, column) for column in COLUMNS)] for row, title in ROWS.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tests() -> str:
    """Return which test proves which cell, in Markdown."""
    lines = [
        "| file | sent by | how | proven by `tests/proxies/test_grid.py`, `test_a_cell[...]` |\n",
        "|---|---|---|---|\n",
    ]
    lines += [
        f"| {ROWS[cell.row]} | {COLUMNS[cell.column]} | {WAYS[cell.way]} | `{cell.id}` |\n"
        for row in ROWS
        for cell in CELLS
        if cell.row == row
    ]
    return "".join(lines)


def written(text: str, *parts: str) -> str:
    """Return a page with these parts between its marks, in their order. Raises `ValueError` for one without them."""
    for number, part in enumerate(parts):
        before, begin, rest = text.partition(BEGIN) if not number else text.rpartition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"a page lacks {BEGIN} or {END}")
        text = f"{before}{BEGIN}\n\n{part}\n{END}{after}"
    return text


def page(name: str) -> str:
    """Return a page of `PAGES` as it has to be."""
    text = (PROJECT / name).read_text()
    return written(text, table(), tests()) if name.startswith("docs/") else written(text, table())


if __name__ == "__main__":
    for name in PAGES:
        (PROJECT / name).write_text(page(name))
