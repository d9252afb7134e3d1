"""Rounds of load and faults, and what is checked between them."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.soak.clients import World, visits
from tests.soak.faults import FAULTS, Fault, inflict
from tests.soak.invariants import Watch
from tests.soak.ledger import Broken, Ledger
from tests.soak.site import STALL_SECONDS, Shape, Site

SHAPES = (Shape(1), Shape(2, behind_nginx=True), Shape(1, tls=True), Shape(2))
LOAD_SECONDS = 15.0


@dataclass
class Report:
    """What a run has done, for its end."""

    ledger: Ledger
    rounds: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    impossible: set[str] = field(default_factory=set)


async def _faults(world: World, *, exclusive: asyncio.Lock, active: set[Fault], faults: list[Fault]) -> None:
    """Do one fault after another, until the load ends."""
    while not world.tests_stop.is_set() and not world.ledger.problems:
        what = world.random.choice(faults)
        if what.is_possible(world) and what not in active:
            active.add(what)
            async with exclusive if what.changes_processes else contextlib.nullcontext():
                await inflict(world, what)
            active.discard(what)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.tests_stop.wait(), world.random.uniform(0.2, 2.5))


async def one_round(world: World, watch: Watch, *, clients: int, seconds: float, faults: list[Fault]) -> None:
    """Let clients and faults do what they like, then wait until all have ended, and check the quiet moment."""
    world.tests_stop.clear()
    exclusive, active = asyncio.Lock(), set[Fault]()
    killed = world.ledger.faults["worker killed"]
    async with asyncio.TaskGroup() as group:
        group.create_task(watch.each_second())
        for _ in range(clients):
            group.create_task(visits(world))
        for _ in range(2 if faults else 0):
            group.create_task(_faults(world, exclusive=exclusive, active=active, faults=faults))
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not world.ledger.problems:
            await asyncio.sleep(0.1)
        world.tests_stop.set()
    await watch.quiet(lost=world.ledger.faults["worker killed"] > killed)


async def soak(
    report: Report,
    shape: Shape,
    *,
    seed: int,
    seconds: float,
    directory: Path,
    faults: list[Fault] = FAULTS,
    clients: int = 24,
    load_seconds: float = LOAD_SECONDS,
    say: Callable[[str], None] = print,
) -> None:
    """Soak a service of one shape. Raises `Broken` for the first invariant that does not hold."""
    random, ledger = Random(f"{seed} {shape}"), report.ledger
    ledger.is_tls = shape.tls
    ledger.proxy_patience = STALL_SECONDS if shape.behind_nginx else None
    ends = time.monotonic() + seconds
    async with Site(directory, shape) as site:
        world = World(site, ledger, random)
        watch = Watch(world)
        report.impossible |= {what.name for what in FAULTS if not what.is_possible(world)}
        await one_round(world, watch, clients=clients, seconds=min(5.0, seconds / 4), faults=[])
        watch.base = {}  # what is made when it is first used is there now
        await one_round(world, watch, clients=clients, seconds=min(3.0, seconds / 4), faults=[])
        while not ledger.problems:
            await one_round(world, watch, clients=clients, seconds=load_seconds, faults=faults)
            report.rounds += 1
            done = f"{sum(ledger.seen.values())} requests, {sum(ledger.faults.values())} faults"
            say(f"{shape}: round {report.rounds}: {done}")
            if time.monotonic() >= ends:
                break
        for text, count in watch.errors.items():
            report.errors[text] = report.errors.get(text, 0) + count
        if ledger.problems:
            (directory / "events").write_text("\n".join([*ledger.events, *ledger.problems, *site.errors()]))
            raise Broken(ledger.problems[0])


async def run(
    *,
    seed: int,
    minutes: float,
    shapes: Sequence[Shape] = SHAPES,
    faults: list[Fault] = FAULTS,
    say: Callable[[str], None] = print,
) -> Report:
    """Soak each shape for the same time. If an invariant does not hold, the directory stays, and `Broken` is raised."""
    report = Report(Ledger())
    for shape in shapes:
        directory = Path(tempfile.mkdtemp(prefix="downloadview-soak-"))
        try:
            await soak(
                report,
                shape,
                seed=seed,
                seconds=minutes * 60 / len(shapes),
                directory=directory,
                faults=faults,
                say=say,
            )
        except BaseException:
            say(f"the state is in {directory}")
            say("\n".join(list(report.ledger.events)[-40:]))
            raise
        shutil.rmtree(directory)
    return report


def tables(report: Report) -> str:
    """Return what a run has done, as tables of Markdown."""
    ledger = report.ledger
    kinds: dict[str, list[str]] = {}
    for (kind, result), count in sorted(ledger.seen.items()):
        kinds.setdefault(kind, []).append(f"{count} {result}")
    lines = [
        "| requests | results |",
        "|---|---|",
        *(f"| {kind} | {', '.join(all_)} |" for kind, all_ in kinds.items()),
    ]
    lines += [
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in sorted(ledger.faults.items())),
    ]
    lines += [
        "",
        "| invariant | checks |",
        "|---|---|",
        *(f"| {what} | {count} |" for what, count in sorted(ledger.checks.items())),
    ]
    lines += [
        "",
        "| maximum | |",
        "|---|---|",
        *(f"| {what} | {value:.4g} |" for what, value in sorted(ledger.maxima.items())),
    ]
    lines += ["", "| message in the error log | times |", "|---|---|"]
    lines += [f"| {text.replace('|', ' ')} | {count} |" for text, count in sorted(report.errors.items())]
    return "\n".join(lines)
