"""The hot path, counted: `python -m benchmarks.calls` writes docs/performance/calls.md.

It counts the calls that `downloadview serve` makes for a request, by the profiler of Python, and by part. An argument
such as `50` has it answer so many requests each: a quick test that writes nothing. With more arguments,
`python -m benchmarks.calls FILE MODULE [ARGUMENT...]`, it runs a server: the first SIGUSR1 begins the count, and the
second one writes it to FILE.
"""

import cProfile
import json
import os
import platform
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import proc, product
from benchmarks.load import LoadError, ask, connect, read_body
from benchmarks.product import PRODUCTS, SERVE, Product
from benchmarks.running import Command, Place, Running, Server, running

_PAGE = Path(__file__).parent.parent / "docs" / "performance" / "calls.md"
_REQUESTS = 1000
_WARM = 50  # requests after which an answer is kept, a file is open, and a head is known
_PATIENCE = 60.0  # seconds until a server has begun or ended its count
_SIZES = {"10k.bin": 10 << 10, "1m.bin": 1 << 20}
_PACKAGE = "downloadview_async/"

PARTS: Mapping[str, tuple[str, ...]] = {
    "the connection and its head": ("downloadview_async/asgi/uvicorn/", "uvicorn/"),
    "the answer that is kept": ("downloadview_async/asgi/kept_answers.py", "downloadview_async/service/reload.py"),
    "the file": ("downloadview_async/sources/", "downloadview_async/http/"),
    "access and limits": ("downloadview_async/policy/",),
    "outcome, log and metrics": ("downloadview_async/accounts/", "downloadview_async/asgi/accounts.py"),
    "the application": ("downloadview_async/", "starlette/"),
    "Python and its libraries": ("",),
}
"""The parts of a request, with the files in which their functions are. The first one that fits counts."""

_BUILTIN = "C functions"
_SYSTEM_CALLS = "system calls among them"
_SYSTEM = "<built-in method posix."

_INTRODUCTION = """\
# Calls of a request

`python -m benchmarks.calls` writes this page; do not edit it. [Performance](../performance.md) explains the parts.
{date}, {processor}, Python {python}.

Each row is `downloadview serve` with the settings of a row of [the results](results.md). {requests:,} requests came one
after the other on one connection, when the answer had been given before. The columns are the calls of Python functions
that the event loop made for one request, and all calls of functions that are written in C. uvloop receives and sends
by calls that the profiler does not see; the thread that writes the log is not counted."""


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the page: what is asked for, of `downloadview serve` with which settings."""

    title: str
    product: Product = SERVE
    file: str = "10k.bin"
    headers: Sequence[str] = ()
    is_signed: bool = False
    answer: str = "body"


CASES = [
    Case("10 KiB"),
    *(Case(f"10 KiB, {PRODUCTS[key][0]}", PRODUCTS[key][1]) for key in ("serve-quiet", "serve-json", "serve-counted")),
    Case("10 KiB, by a signed link", PRODUCTS["serve-signed"][1], is_signed=True),
    Case("10 KiB, all of these on", PRODUCTS["serve-all"][1], is_signed=True),
    Case("X-Accel-Redirect", product.OFFLOAD, answer="offload"),
    Case("signed link, redirect to a store", product.REDIRECT, is_signed=True, answer="redirect"),
    Case("1 KiB of 10 KiB, by Range", headers=("Range: bytes=1000-2023",)),
    Case("1 MiB", file="1m.bin"),
]


def main(requests: int | None = None) -> None:
    """Count each case, print the page, and write it unless this was a quick test."""
    with tempfile.TemporaryDirectory(prefix="downloadview-calls-") as directory:
        files = Path(directory, "files")
        files.mkdir()
        for name, size in _SIZES.items():
            (files / name).write_bytes(os.urandom(size))
            os.utime(files / name, (time.time() - 3600,) * 2)  # a file that was modified just now is copied
        rows = [(case.title, count(case, files, Path(directory, "scratch"), requests or _REQUESTS)) for case in CASES]
    page = f"""{
        _INTRODUCTION.format(
            date=datetime.now(UTC).date(),
            processor=proc.processor(),
            python=platform.python_version(),
            requests=requests or _REQUESTS,
        )
    }\n\n{table(rows)}\n"""
    print(page)
    if requests is None:
        _PAGE.write_text(page)


def count(case: Case, files: Path, scratch: Path, requests: int) -> dict[str, float]:
    """Return how many functions of each part a request of this case calls. Raises `LoadError`, as `running` does."""
    server = Server(
        key="calls",
        title=case.title,
        commands=_counted(case.product),
        measures=(),
        links="signed" if case.is_signed else "none",
    )
    cores = sorted(os.sched_getaffinity(0))
    with running(server, files=files, scratch=scratch, core=cores[-1], other_core=cores[0]) as process:
        _ask(process, case, _WARM)
        begun, ended = scratch / "begun", scratch / "calls.json"
        _signal(process, begun)
        _ask(process, case, requests)
        _signal(process, ended)
        counted: dict[str, int] = json.loads(ended.read_text())
    for file in (begun, ended):
        file.unlink()
    return {part: calls / requests for part, calls in counted.items()}


def _counted(settings: Product) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        command = product.serve(settings, place)
        program, _, module, *arguments = command.arguments  # python -m downloadview_async.cli ...
        file = str(place.scratch / "calls.json")
        return [replace(command, arguments=[program, "-m", "benchmarks.calls", file, module, *arguments])]

    return commands


def _ask(process: Running, case: Case, requests: int) -> None:
    with connect(process.port) as connection:
        for _ in range(requests):
            head = ask(connection, process.path(case.file), *case.headers)
            expected = {"redirect": 307, "offload": 200, "body": 206 if case.headers else 200}[case.answer]
            if head.status != expected or (case.answer == "offload") != ("x-accel-redirect" in head.headers):
                raise LoadError(f"{case.title}: an answer with the status {head.status}")
            read_body(connection, head)


def _signal(process: Running, file: Path) -> None:
    os.kill(process.leaders[0], signal.SIGUSR1)
    deadline = time.monotonic() + _PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            raise LoadError(f"{file.name} is missing: the server has not counted")
        time.sleep(0.01)


def part_of(file: str) -> str:
    """Return the part of a request in which the functions of a file of Python are."""
    place = file.rpartition("site-packages/")[2]
    place = place[place.rfind(_PACKAGE) :] if _PACKAGE in place else place
    return next(part for part, starts in PARTS.items() if place.startswith(starts))


def table(rows: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    """Return the table of the page: a line for each case, with its calls of each part, and all of them."""
    parts = [*PARTS, _BUILTIN, _SYSTEM_CALLS]
    lines = [f"| request | all calls | {' | '.join(parts)} |", f"| --- |{' ---: |' * (len(parts) + 1)}"]
    for title, calls in rows:
        shown = [f"{calls.get(part, 0):.1f}" for part in parts]
        total = sum(calls.get(part, 0) for part in [*PARTS, _BUILTIN])
        lines.append(f"| {title} | {total:.0f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def profile(file: Path, module: str, arguments: list[str]) -> None:
    """Run a module as `python -m` does. Count its calls from the first SIGUSR1 to the second, and write them."""
    profiler = cProfile.Profile()
    is_counting = False

    def begin_or_end(number: int, frame: object) -> None:
        nonlocal is_counting
        if is_counting:
            profiler.disable()
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(_calls_of(profiler)))
            unfinished.rename(file)
        else:
            file.with_name("begun").touch()
            is_counting = True
            profiler.enable()

    signal.signal(signal.SIGUSR1, begin_or_end)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _calls_of(profiler: cProfile.Profile) -> Counter[str]:
    calls: Counter[str] = Counter()
    for entry in profiler.getstats():
        if isinstance(entry.code, str):
            calls[_BUILTIN] += entry.callcount
            if entry.code.startswith(_SYSTEM):
                calls[_SYSTEM_CALLS] += entry.callcount
        else:
            calls[part_of(entry.code.co_filename)] += entry.callcount
    return calls


if __name__ == "__main__":
    if len(sys.argv) > 2:
        profile(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    else:
        main(*map(int, sys.argv[1:]))
