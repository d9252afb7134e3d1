"""The code blocks of the pages, as a reader would run them.

A Python block is a file that a reader saves and runs. A block that uses names which it does not define continues the
blocks above it, from the one that defines them: a reader pastes it below them, into the same file. A block whose first
line names a file (`# project/urls.py`) is part of a project, which a test of its own makes.
"""

import ast
import builtins
import dis
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from tests.servers import PROJECT, Server, free_port, serving

DOCS = PROJECT / "docs"
PAGES = [path for path in sorted([*PROJECT.glob("*.md"), *DOCS.rglob("*.md")]) if "_build" not in path.parts]
BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<kind>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
_APPS = ("app", "application")
_GIVEN = {*dir(builtins), "__file__", "__name__"}


def blocks(page: Path, *kinds: str) -> list[tuple[int, str]]:
    """Return the code blocks of a page of some kinds, each with the line it begins on."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("text")), match["text"])
        for match in BLOCK.finditer(text)
        if match["kind"] in kinds
    ]


def file_of(text: str) -> str | None:
    """Return the file that a block is part of, by its first line: "# project/urls.py". None: it is run by itself."""
    match = re.match(r"# ([\w/]+\.(?:py|toml))\n", text)
    return None if match is None else match[1]


@dataclass(frozen=True)
class Script:
    """A file that a reader makes of a page: one block, or several that belong together.

    line: the line of the page on which its last block begins. text: its lines are on the lines of the page, so that
    tracebacks name these. app: the name of the ASGI application that it defines, if it does.
    """

    page: Path
    line: int
    text: str
    app: str | None

    def save(self, directory: Path) -> Path:
        """Save it as a module of a directory."""
        file = directory / f"line_{self.line + 1}.py"
        file.write_text(self.text)
        return file

    def run(self, directory: Path) -> None:
        """Run it as a file in a new process. Raises `AssertionError` with its output if it fails."""
        command = [sys.executable, str(self.save(directory))]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{self.page}: {done.stdout}{done.stderr}"

    @contextmanager
    def serving(self, directory: Path) -> Iterator[Server]:
        """Serve its application by uvicorn with our protocol, in a new process."""
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", f"{self.save(directory).stem}:{self.app}", "--port", str(port)]
        command += ["--http", "downloadview_async.asgi.server:DownloadProtocol", "--no-access-log"]
        with serving(command, port, log=directory / "log", cwd=directory) as server:
            yield server


def scripts(page: Path) -> list[Script]:
    """Return the files that a reader makes of a page, each with all that belongs to it."""
    files = _files_of(page)
    # a file that a later block continues is the beginning of that one
    return [file for index, (start, file) in enumerate(files) if all(later > start for later, _ in files[index + 1 :])]


def applications(page: Path) -> list[Script]:
    """Return the files that a reader serves: up to each block that defines an application."""
    return [file for _, file in _files_of(page) if file.app is not None]


def _files_of(page: Path) -> list[tuple[int, Script]]:
    """Return the file that ends with each block, and the number of the block it begins with."""
    parts = [(line, text) for line, text in blocks(page, "python") if file_of(text) is None]
    names = [_names_of(text) for _, text in parts]
    files = []
    for end, (defines, missing) in enumerate(names):
        start = end
        while missing and start:
            start -= 1
            defined, used = names[start]
            missing = (missing | used) - defined
        app = next((name for name in _APPS if name in defines), None)
        files.append((start, Script(page, parts[end][0], _joined(parts[start : end + 1]), app)))
    return files


def _joined(parts: list[tuple[int, str]]) -> str:
    text = ""
    for line, block in parts:
        text += "\n" * (line - text.count("\n")) + block
    return text


def _names_of(text: str) -> tuple[set[str], set[str]]:
    """Return the names that a module defines, and those that it uses without defining them."""
    code = compile(text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    defined = {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_NAME"}
    return defined, set(_globals_used(code)) - defined - _GIVEN


def _globals_used(code: CodeType) -> Iterator[str]:
    steps = list(dis.get_instructions(code))
    local = {step.argval for step in steps if step.opname == "STORE_NAME"}  # of a class
    for step in steps:
        if step.opname == "LOAD_GLOBAL" or (step.opname == "LOAD_NAME" and step.argval not in local):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_used(constant)
