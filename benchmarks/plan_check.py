"""Compare what `downloadview plan` computes with what the replicas of `make cluster` have used.

    python -m benchmarks.plan_check FILE...

Each file is one that `python -m tests.cluster --costs SECONDS --json FILE` has written. `make plan-check` measures and
compares with 1, 2 and 3 replicas.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from downloadview_async.service.plan.costs import MEASURED, Costs, load_costs
from downloadview_async.service.plan.model import Load, Machine, plan

CLOSE = 0.2
"""How far the median row may be from what was measured, as a share of that."""
WORST = 2.0
"""How many times too much or too little any row may be."""

_MACHINE = Machine(cores=1, memory=1e12, network=1e12, descriptors=1_000_000, use=1.0)
_FILES = Load(send="zero-copy", clients=0.0, requests=0.0, size=0.0, kept=True, completions=True)
_LOADS = {
    # clients close their connections to nginx, which keeps those to the service
    r"files, .* by nginx": replace(_FILES, send="nginx"),
    r"files, .* streamed": _FILES,
    r"link for one download, .* streamed": replace(_FILES, links=True),
    r"quota of downloads, .* streamed": replace(_FILES, limits=True),
}
"""The kinds of requests that the model knows. The others of the cluster go through object stores and cache nodes."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A number of the plan beside the measured one, for one kind of request and one number of replicas."""

    kind: str
    replicas: int
    number: str
    planned: float
    measured: float

    @property
    def off(self) -> float:
        """How far the plan is from the measured number, as a share of that."""
        return self.planned / self.measured - 1

    @property
    def times(self) -> float:
        """How many times too much or too little the plan has, at least 1."""
        return max(self.planned / self.measured, self.measured / self.planned if self.planned else math.inf)


def compare(rows: Sequence[Mapping[str, Any]], costs: Costs) -> Iterator[Compared]:
    """Yield the CPU of the service and of Redis that the plan has for each row of the cluster."""
    for row in rows:
        known = next((load for kind, load in _LOADS.items() if re.fullmatch(kind, row["kind"])), None)
        if known is None or not row["requests"]:
            continue
        load = replace(known, requests=row["requests"] / row["seconds"], size=row["bytes"] / row["requests"])
        made = plan(load, _MACHINE, costs)
        (cpu,) = [need.amount for need in made.needs if need.resource == "CPU"]
        used = row["replica_cpu"] + (row["front_cpu"] if load.send == "nginx" else 0.0)
        each = row["seconds"] / row["requests"]
        yield Compared(row["kind"], row["replicas"], "CPU ms", cpu * each * 1e3, used / row["requests"] * 1e3)
        if load.links or load.limits:
            redis = made.shared.redis_share * each * 1e3
            yield Compared(
                row["kind"], row["replicas"], "Redis CPU ms", redis, row["redis_cpu"] / row["requests"] * 1e3
            )


def table(compared: Sequence[Compared]) -> str:
    """Return the comparison as a Markdown table, with rows that are too far off in bold."""
    lines = [
        "| requests | replicas | of a request | planned | measured | off |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for one in compared:
        off = f"{one.off:+.0%}"
        lines.append(
            f"| {one.kind} | {one.replicas} | {one.number} | {one.planned:.3g} | {one.measured:.3g} "
            f"| {off if abs(one.off) <= CLOSE else f'**{off}**'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison.

    Returns 0 if the median row is close and no row is off by more than `WORST` times, else 1; 2 if nothing can be
    compared.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_check", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="what the cluster has measured")
    parser.add_argument("--costs", type=Path, default=MEASURED, help="the costs of the plan; by default the package's")
    options = parser.parse_args(arguments)
    costs = load_costs(options.costs)
    compared = [one for file in options.files for one in compare(json.loads(file.read_text()), costs)]
    if not compared:
        print("none of the rows are of a kind that the plan knows", file=sys.stderr)
        return 2
    print(table(compared))
    middle = statistics.median(abs(one.off) for one in compared)
    close = sum(abs(one.off) <= CLOSE for one in compared)
    worst = max(one.times for one in compared)
    print(
        f"\n{close} of {len(compared)} within {CLOSE:.0%}; the median is {middle:.0%} off, "
        f"and the worst row is {worst:.1f} times too much or too little"
    )
    return 0 if middle <= CLOSE and worst <= WORST else 1


if __name__ == "__main__":
    sys.exit(main())
