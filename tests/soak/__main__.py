"""`make soak`: see `tests.soak`."""

import argparse
import asyncio
import secrets
import sys
import time

from tests.soak.faults import FAULTS
from tests.soak.ledger import Broken
from tests.soak.run import SHAPES, run, tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description="Random clients and faults, and invariants.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="only these faults")
    parser.add_argument("--shape", type=int, action="append", choices=range(len(SHAPES)), help="only these shapes")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if not given.fault or fault.name in given.fault]
    shapes = [shape for number, shape in enumerate(SHAPES) if not given.shape or number in given.shape]
    print(f"seed {given.seed}, {given.minutes:g} minutes", flush=True)
    began = time.monotonic()
    try:
        report = asyncio.run(
            run(
                seed=given.seed,
                minutes=given.minutes,
                shapes=shapes,
                faults=faults,
                say=lambda text: print(text, flush=True),
            )
        )
    except Broken as exc:
        print(f"after {time.monotonic() - began:.0f} s with the seed {given.seed}: {exc}", flush=True)
        sys.exit(1)
    print(f"{report.rounds} rounds in {time.monotonic() - began:.0f} s, 0 broken invariants\n\n{tables(report)}")


if __name__ == "__main__":
    main()
