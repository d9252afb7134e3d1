"""`make cluster`: see `tests.cluster`."""

import argparse
import asyncio
import json
import secrets
import sys
import time
from pathlib import Path

from tests.cluster.costs import as_rows
from tests.cluster.page import write
from tests.cluster.run import run, run_costs
from tests.cluster.scenarios import SCENARIOS


def main() -> None:
    parser = argparse.ArgumentParser(prog="make cluster", description="Replicas that fail, and what clients notice.")
    parser.add_argument("--only", action="append", choices=[one.name for one in SCENARIOS], help="only these scenarios")
    parser.add_argument("--replicas", type=int, default=3, help="how many replicas there are")
    parser.add_argument("--costs", type=float, metavar="SECONDS", help="measure what requests cost, each kind so long")
    parser.add_argument("--json", type=Path, help="a file for the costs")
    parser.add_argument("--page", type=Path, help="a file for the page about the run, such as docs/cluster.md")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    given = parser.parse_args()
    if given.costs:
        costs = asyncio.run(run_costs(size=given.replicas, seconds=given.costs))
        if given.json:
            given.json.write_text(json.dumps(as_rows(costs), indent=1) + "\n")
        return
    scenarios = [one for one in SCENARIOS if not given.only or one.name in given.only]
    print(f"seed {given.seed}", flush=True)
    began = time.monotonic()
    reports = asyncio.run(
        run(scenarios, seed=given.seed, size=given.replicas, say=lambda text: print(text, flush=True))
    )
    if given.page:
        write(reports, given.page, seed=given.seed, seconds=time.monotonic() - began)
    sys.exit(any(report.findings.problems for report in reports))


if __name__ == "__main__":
    main()
