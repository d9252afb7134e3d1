"""Fuzzes every target for a while: `make fuzz`, or `python -m tests.fuzz --minutes 5 ranges dates`.

Each target runs in a process for its share of the time. With atheris, what an input reaches in our code decides which
inputs are tried next; without it, and for the live servers, hypothesis makes them at random. The inputs that reached
something new are kept below `.fuzz/corpus`. An input that fails is written to `.fuzz/findings`, and printed as a
regression test.
"""

import argparse
import importlib
import os
import random
import sys
import time
import traceback
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

HERE = Path(".fuzz")
_SEEDS = 30  # random inputs with which atheris begins


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the targets one after another.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="the names of targets; default: all")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all targets together (default: 60)")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        atheris = None
    with nullcontext() if atheris is None else atheris.instrument_imports(include=["downloadview_async"]):
        importlib.import_module("tests.fuzz.running")  # with all modules that have targets
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    names = options.targets or list(targets)
    seconds = options.minutes * 60 / len(names)
    print(f"{len(names)} targets, {seconds:.0f} seconds for each, --seed {seed}", flush=True)
    failed = []
    for name in names:
        # A process for each: libFuzzer ends its own, and a target may crash it. The imports take the longest.
        if (child := os.fork()) == 0:
            status = 1
            try:
                status = _fuzz(targets[name], seconds, seed, atheris)
            finally:
                sys.stdout.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return bool(failed)


def _fuzz(target: Any, seconds: float, seed: int, atheris: Any) -> int:
    running: Any = importlib.import_module("tests.fuzz.running")
    with ExitStack() as stack:
        run = running.Run(target, stack.enter_context(target.within()))
        began = time.monotonic()
        try:
            run.regressions()
            if atheris is None or target.module.endswith(".live"):
                run.until(began + seconds, seed)
            else:
                _guided(atheris, run, began + seconds, seed, stack)
        except Exception:
            _tell(run, began)
            if run.failed is None:
                traceback.print_exc()  # a regression fails, or what the target needs is missing
            else:
                _keep(run, run.smallest(run.failed))
            return 1
        _tell(run, began)
    return 0


def _tell(run: Any, began: float) -> None:
    seconds = time.monotonic() - began
    print(f"{run.target.name:32} {run.executions:9} inputs in {seconds:4.0f} s", flush=True)


def _guided(atheris: Any, run: Any, end: float, seed: int, stack: ExitStack) -> None:
    """Let atheris choose the inputs. libFuzzer ends the process, so this ends it first."""
    length = importlib.import_module("tests.fuzz.running").LENGTH
    corpus = HERE / "corpus" / run.target.name
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        numbers = random.Random(seed)
        for number in range(_SEEDS):
            (corpus / f"seed-{number}").write_bytes(numbers.randbytes(length))
    began = time.monotonic()

    def one(data: bytes) -> None:
        status = 0
        try:
            run.check(data)
        except Exception:
            _keep(run, run.smallest(data))
            status = 1
        if status or time.monotonic() >= end:
            _tell(run, began)
            stack.close()
            sys.stdout.flush()
            os._exit(status)

    flags = [f"-seed={seed % (1 << 31)}", f"-max_len={length}", "-timeout=120", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={HERE}/", str(corpus)], one)
    atheris.Fuzz()


def _keep(run: Any, data: bytes) -> None:
    findings = HERE / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    file = findings / f"{run.target.name}-{time.time_ns():x}"
    file.write_bytes(data)
    print(f"{run.report(data)}    The bytes of the input are in {file}.", flush=True)
    try:
        run.check(data)
    except Exception as exc:
        print(f"    {type(exc).__name__}: {exc}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
