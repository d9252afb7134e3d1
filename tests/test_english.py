"""How we write: phrases that stand between a reader and the meaning are in no page, docstring, comment or message."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import PROJECT

PHRASES = [
    r"(?<!there )(?<!There )\b(?:is|are|was|were|be) no (?!longer\b|more\b|less\b|fewer\b|earlier\b|later\b)",
    r"\b(?:for|by|of|to|from|with|than|lets?|as) (?:who|whoever)\b",
    r"(?:^|[.:;(] )(?:Who|Whoever|who) (?!may have|has sent|is on)[a-z]+s?\b(?![^.]*\?)",
    r"\bof (?:its|their|our|his|your|a) own\b",
    r"\b(?:is|are|as|was|be) an? [1-5][0-9]{2}\b(?! ?(?:MiB|KiB|bytes|ms|s\b|MB|GB))",
    r"\bof no use\b",
    r"\bwithout a word\b",
    r"\bwhat mends\b",
    r"\bwhat is not\b",
    r"\bthat is none\b",
    r"\bas ever\b",
    r"(?:^|\| )What (?![^.]*\?)",  # a noun without an antecedent; a question ends in its mark
    r"\bthat (?:is|are) not ones?\b(?! of\b)",
    r"\bnothing but\b",
    r"\bby (?:itself|themselves)\b",
    r"\bin the way of\b",
    r"\bof use to\b",
]
NAMES = {"found", "said", "came", "asked", "own"}

PAGES = sorted(
    [
        *PROJECT.glob("*.md"),
        *(PROJECT / "docs").rglob("*.md"),
        *(PROJECT / "app").glob("*.toml"),
        *(PROJECT / "examples").rglob("*.md"),
    ]
)
MODULES = sorted(path for room in ("downloadview_async", "app", "examples") for path in (PROJECT / room).rglob("*.py"))


def offences(text: str) -> list[str]:
    """Return the phrases of a text, each with what is around it."""
    plain = re.sub(r"`[^`]*`", "`x`", re.sub(r"\s+", " ", text))
    return [
        f"{match[0].strip()!r}: ...{plain[max(match.start() - 40, 0) : match.end() + 40]}..."
        for phrase in PHRASES
        for match in re.finditer(phrase, plain)
    ]


def paragraphs_of(page: str) -> Iterator[str]:
    """Yield what a page says, without its code blocks."""
    yield from re.split(r"\n\s*\n|\n(?=[-|#])", re.sub(r"```.*?```", "", page, flags=re.DOTALL))


def texts_of(source: str) -> Iterator[str]:
    """Yield the comments and the strings of a module: docstrings and messages among them."""
    comment: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            yield " ".join(comment)
            comment = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.split(r"\n\s*\n", node.value)


def values_named(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines on which a value gets one of the names that say nothing of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg in NAMES:
            yield node.lineno, node.arg


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(PROJECT))) for path in PAGES])
def test_pages_have_none_of_the_phrases(path: Path) -> None:
    assert [offence for text in paragraphs_of(path.read_text()) for offence in offences(text)] == []


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(PROJECT))) for path in MODULES])
def test_modules_have_none_of_the_phrases(path: Path) -> None:
    source = path.read_text()
    assert [offence for text in texts_of(source) for offence in offences(text)] == []
    assert [*values_named(source)] == []


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").rglob("*.py")), ids=lambda path: str(path.name))
def test_values_of_the_benchmarks_have_names(path: Path) -> None:
    assert [*values_named(path.read_text())] == []


@pytest.mark.parametrize(
    "text, count",
    [
        ("'x' is no URL of a server", 1),
        ("there is no such file", 0),
        ("it is no longer needed", 0),
        ("Who comes too late finds no file.", 1),
        ("Who may have which file", 0),
        ("this is for who has Django", 1),
        ("a thread of its own", 1),
        ("that is a 404", 1),
        ("that gives a 404", 0),
        ("a URL that is none", 1),
        ("What the proxy sends.", 1),
        ("What does the proxy send?", 0),
        ("It tells what the proxy sends.", 0),
        ("an address that is not one", 1),
        ("an address that is not one of ours", 0),
        ("a directory with nothing but downloads", 1),
        ("each worker counts by itself", 1),
    ],
)
def test_the_phrases_are_seen(text: str, count: int) -> None:
    assert len(offences(text)) == count
