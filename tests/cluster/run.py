"""Runs scenarios, one after another, on one cluster."""

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from random import Random

from downloadview_async import CompletionStore
from tests.cluster.costs import Cost, measure, table
from tests.cluster.driver import Download, Driver
from tests.cluster.invariants import Findings, Line, Logs, check, completed, front_by_attempt, was_retried
from tests.cluster.load import Load
from tests.cluster.scenarios import Scenario, World
from tests.cluster.site import Site

COLD_FILES = 14


@dataclass
class Report:
    """What a scenario has shown. Times are seconds from its begin."""

    scenario: Scenario
    findings: Findings
    ok: list[float] = field(default_factory=list)
    retried: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    recovered: float | None = None
    """Seconds from the first mark to the last answer that the fault has delayed or cut, or None if there was none."""
    resumed: float = 0.0
    """The most seconds from a kill of a replica to the first byte of the same download from another one."""
    completed: float = 0.0
    """The most seconds from that kill to the last byte of a download that it has cut."""
    cut: int = 0
    downloads: int = 0
    last: int = 0
    """The highest number of an agent."""
    kinds: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)


def _aborted_by_the_kernel() -> int:
    """Return how many connections of this machine the kernel has reset because it had no memory for TCP."""
    names, values = [
        line.split() for line in Path("/proc/net/netstat").read_text().splitlines() if line.startswith("TcpExt:")
    ]
    return int(dict(zip(names, values, strict=True))["TCPAbortOnMemory"])


async def run_scenario(
    site: Site,
    scenario: Scenario,
    store: CompletionStore,
    *,
    seed: int,
    first: int,
    say: Callable[[str], None] = print,
    tries: int = 5,
) -> Report:
    """Run a scenario, and repeat it up to four times if connections that the kernel has reset explain all its problems.

    The kernel resets connections if other programs of this machine have left it no memory for TCP. first: no agent has
    had a higher number. tries: how often the scenario runs at most.
    """
    for _ in range(tries):
        aborted = _aborted_by_the_kernel()
        report = await _run_scenario(site, scenario, store, seed=seed, first=first)
        first += report.downloads
        report.last = first
        if not report.findings.may_be_of_resets or aborted == _aborted_by_the_kernel():
            break
        say(f"{scenario.name}: once more, because the kernel has reset connections: it had no memory for TCP")
    return report


async def _run_scenario(site: Site, scenario: Scenario, store: CompletionStore, *, seed: int, first: int) -> Report:
    """Run a scenario on a cluster that is well, and check what has to hold. first: no agent has had a higher number."""
    cold = [f"cold-{first}-{number}.bin" for number in range(COLD_FILES)]
    for name in cold:
        await asyncio.to_thread(site.put, name)
    for node in site.nodes.values():
        node.killed.clear()
    load = Load(
        site, Driver(site.port, first, site.slack), Random(f"{seed} {scenario.name}"), cold, sign=site.signer().sign
    )
    world, logs, before = World(site, load), Logs(site), await completed(store)
    began = time.time()
    running = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(2.0)
        await scenario.act(world)
        await asyncio.sleep(scenario.settles)
    finally:
        load.stop.set()
        ended = time.time()
        load.driver.hurries = True
        await running
    await asyncio.sleep(1.0)  # the end of a download is known to all replicas
    await load.try_again()
    findings = await check(scenario, world, logs, before, store)
    return _report(scenario, world, findings, front_by_attempt(logs.front()), began, ended)


def _report(
    scenario: Scenario, world: World, findings: Findings, lines: dict[str, Line], began: float, ended: float
) -> Report:
    report = Report(scenario, findings, seconds=ended - began)
    report.marks = [(at - began, text) for at, text in world.marks]
    findings.facts += world.facts
    for holds, problem in world.checks:
        findings.check("the scenario", holds, problem)
    event = world.marks[0][0] if world.marks else ended
    replicas = {node.name: node for node in world.site.replicas}
    kills = [at for node in replicas.values() for at in node.killed]
    affected: list[float] = []
    for one in world.load.driver.downloads:
        report.downloads += 1
        report.kinds[f"{one.kind.partition(' ')[0]} {one.result}"] += 1
        report.versions.update(attempt.version for attempt in one.attempts if attempt.version)
        at = one.attempts[-1].ended - began
        for attempt in one.attempts:
            if attempt.end in ("no answer", "5xx"):
                report.refused.append(attempt.ended - began)
                affected.append(attempt.ended)
        by_proxy = [each for each in one.attempts if each.id in lines and was_retried(lines[each.id])]
        retried = one.cut is not None or bool(by_proxy)
        if one.result in ("complete", "denied"):
            (report.retried if retried else report.ok).append(at)
        if one.cut is not None:
            affected.append(one.attempts[-1].ended)
        affected += [attempt.head for attempt in by_proxy]
        _note_kill(report, one, kills)
    affected = [at for at in affected if at > event]
    if affected:
        report.recovered = max(affected) - event
    return report


def _note_kill(report: Report, one: Download, kills: Sequence[float]) -> None:
    for attempt, following in zip(one.attempts, one.attempts[1:], strict=False):
        for killed in kills:
            if attempt.end == "cut" and attempt.begun <= killed <= attempt.ended <= killed + 5:
                report.cut += 1
                report.resumed = max(report.resumed, following.head - killed)
                report.completed = max(report.completed, one.attempts[-1].ended - killed)


async def run(
    scenarios: Sequence[Scenario], *, seed: int, size: int = 3, slack: int = 1, say: Callable[[str], None] = print
) -> list[Report]:
    """Run scenarios, those with the same front on the same cluster. The directory stays if something does not hold."""
    reports = []
    first = 0
    for front, some in groupby(scenarios, key=lambda one: one.front):
        directory = Path(tempfile.mkdtemp(prefix="cluster-"))
        began, holds = time.monotonic(), True
        async with Site(directory, front, size, slack=slack) as site:
            say(f"{size} replicas behind {front} have started in {time.monotonic() - began:.0f} s")
            store = CompletionStore(site.database)
            try:
                for scenario in some:
                    report = await run_scenario(site, scenario, store, seed=seed, first=first, say=say)
                    first = report.last
                    reports.append(report)
                    holds = holds and not report.findings.problems
                    say(line_of(report))
                    for problem in report.findings.problems[:5]:
                        say(f"  {problem[:1500]}")
            finally:
                await store.aclose()
        if holds:
            shutil.rmtree(directory)
        else:
            say(f"the state is in {directory}")
    return reports


async def run_costs(*, size: int, seconds: float, say: Callable[[str], None] = print) -> list[Cost]:
    """Measure what requests cost, on a cluster to which nothing is done."""
    directory = Path(tempfile.mkdtemp(prefix="cluster-"))
    async with Site(directory, "nginx", size) as site:
        costs = await measure(site, seconds)
    say(f"{size} replicas, each kind for {seconds:g} s\n\n{table(costs)}")
    shutil.rmtree(directory)
    return costs


def line_of(report: Report) -> str:
    """Return one line about a scenario."""
    recovered = "" if report.recovered is None else f", recovered after {report.recovered:.1f} s"
    cut = (
        f", {report.cut} cut by the kill, resumed within {report.resumed:.2f} s, "
        f"complete within {report.completed:.2f} s"
        if report.cut
        else ""
    )
    problems = len(report.findings.problems)
    return (
        f"{report.scenario.name}: {report.downloads} downloads in {report.seconds:.0f} s: {len(report.ok)} ok, "
        f"{len(report.retried)} retried, {len(report.refused)} refused{recovered}{cut}; "
        f"{sum(report.findings.checks.values())} checks, {problems} broken"
    )
