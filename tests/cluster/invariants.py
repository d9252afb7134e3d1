"""What has to hold at the end of a scenario."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from downloadview_async import CompletionStore
from tests.cluster.driver import Attempt, Download
from tests.cluster.scenarios import Scenario, World
from tests.cluster.site import QUOTA, Site

_UNWRITTEN = 1.0
"""Seconds: a process that is killed may not have written what it did in the last ones. See docs/howto/downloads.md."""

_OF_RESETS = "nothing refused", "each download ends"
"""The invariants that are broken when the kernel resets connections."""

Line = dict[str, Any]


@dataclass
class Findings:
    """How often each invariant was checked, and what does not hold."""

    checks: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    completed: int = 0
    """How many downloads of whole files the report had to have."""

    def check(self, what: str, holds: bool, problem: object) -> None:
        """Count a check, and keep the problem if it does not hold."""
        self.checks[what] += 1
        if not holds:
            self.problems.append(f"{what}: {problem}")

    @property
    def may_be_of_resets(self) -> bool:
        """Whether there are problems, and connections that the kernel has reset could explain all of them."""
        return bool(self.problems) and all(problem.partition(": ")[0] in _OF_RESETS for problem in self.problems)


class Logs:
    """The lines that are written from now on, by the front, the tier, the store and each replica."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._from = {file: self._size(file) for file in self._files()}

    def _files(self) -> list[Path]:
        at = self._site.directory
        named = [at / f"{name}-access.log" for name in ("front", "tier", "store")]
        if self._site.front == "haproxy":
            named[0] = at / "front.log"
        return named + [node.directory / "access.log" for node in self._site.replicas]

    @staticmethod
    def _size(file: Path) -> int:
        return file.stat().st_size if file.exists() else 0

    def _lines(self, file: Path) -> list[Line]:
        if not file.exists():
            return []
        with file.open("rb") as log:
            log.seek(self._from.get(file, 0))
            return [json.loads(line) for line in log.read().splitlines() if line.startswith(b"{")]

    def front(self) -> list[Line]:
        """Return the lines of the proxy in front."""
        return self._lines(self._files()[0])

    def store(self) -> list[Line]:
        """Return the lines about requests to the store."""
        return self._lines(self._files()[2])

    def replicas(self) -> dict[str, list[Line]]:
        """Return the lines of each replica, by its address."""
        return {node.address: self._lines(node.directory / "access.log") for node in self._site.replicas}


def front_by_attempt(lines: Iterable[Line]) -> dict[str, Line]:
    """Return the line of the proxy in front about each request, by its `X-Attempt`."""
    return {line["attempt"]: line for line in lines}


def servers_of(line: Line) -> list[str]:
    """Return the addresses of the replicas that a request was made at."""
    servers = [one.strip() for part in line["servers"].split(" : ") for one in part.split(",")]
    return [one for one in servers if one not in ("", "-", "service")]


def tries_of(line: Line) -> int:
    """Return how often the proxy made a request, until a replica answered."""
    return max(len(servers_of(line)), 1 + int(str(line.get("retries", "0")).lstrip("+") or 0))


def was_retried(line: Line) -> bool:
    """Return whether the proxy made a request again at another replica."""
    return tries_of(line) > 1


class Excuses:
    """What a scenario explains."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self._scenario = scenario
        times = [at for at, _ in world.marks]
        self._spell = (min(times), max(times) + scenario.settles) if times else (0.0, 0.0)
        self._killed = {node.address: node.killed for node in world.site.replicas if node.killed}

    def refused(self, kind: str, attempt: Attempt) -> bool:
        """Return whether a request may have been refused."""
        begun, ended = self._spell
        return kind in self._scenario.may_refuse and attempt.ended >= begun and attempt.begun <= ended

    def unwritten(self, line: Line, attempt: Attempt) -> bool:
        """Return whether a replica that had to do with a request was killed before it had to have written about it.

        A request that begins after the kill gets nothing from that process.
        """
        return any(
            attempt.begun <= killed <= attempt.ended + _UNWRITTEN
            for server in servers_of(line)
            for killed in self._killed.get(server, ())
        )


async def check(
    scenario: Scenario, world: World, logs: Logs, before: dict[str, int], completions: CompletionStore
) -> Findings:
    """Check everything that has to hold now that all clients have ended."""
    findings, load = Findings(), world.load
    excuses = Excuses(scenario, world)
    are_complete = await _until_logs_are_complete(world, logs, excuses)
    findings.check("complete logs", are_complete, "not each answer has a line of the front and one of a replica")
    by_attempt = front_by_attempt(logs.front())
    _check_downloads(findings, load.driver.downloads, excuses)
    _check_links(findings, world, excuses, by_attempt)
    _check_quotas(findings, world, scenario)
    _check_fills(findings, world, logs, scenario)
    uncertain = _check_outcomes(findings, world, logs, excuses, by_attempt)
    await _check_completions(findings, world, before, completions, uncertain)
    for name, traceback in world.site.tracebacks():
        findings.check("no traceback", not traceback, f"{name}: {traceback}")
    return findings


async def _until_logs_are_complete(world: World, logs: Logs, excuses: Excuses) -> bool:
    """Wait until the proxy has a line about each request that has got an answer, and a replica has one of its id.

    Returns False if they have not written these lines in time.
    """
    answered = [attempt for one in world.load.driver.downloads for attempt in one.attempts if attempt.head]
    for _ in range(1 + 100 * world.site.slack):
        by_attempt = front_by_attempt(logs.front())
        written = {line["request_id"] for lines in logs.replicas().values() for line in lines}
        if all(
            (line := by_attempt.get(attempt.id)) is not None
            and (attempt.end not in ("complete", "denied") or line["id"] in written or excuses.unwritten(line, attempt))
            for attempt in answered
        ):
            return True
        await asyncio.sleep(0.1)
    return False


def _check_downloads(findings: Findings, downloads: Iterable[Download], excuses: Excuses) -> None:
    for one in downloads:
        findings.check("bytes", one.result != "wrong", one)
        for attempt in one.attempts:
            is_answered = attempt.end not in ("no answer", "5xx")
            findings.check("nothing refused", is_answered or excuses.refused(one.kind, attempt), one)
        may_be_denied = one.kind in ("once", "once again", "quota", "quota again", "key")
        findings.check("nothing denied", one.result != "denied" or may_be_denied, one)
        may_fail = any(excuses.refused(one.kind, attempt) for attempt in one.attempts)
        findings.check("each download ends", one.result != "refused" or may_fail, one)


def _check_links(findings: Findings, world: World, excuses: Excuses, by_attempt: dict[str, Line]) -> None:
    again = 0
    for link in world.load.links:
        winners = {one.address for one in link.tries if any(attempt.received for attempt in one.attempts)}
        findings.check("once only: one client", len(winners) <= 1, f"{len(winners)} have got it: {link.tries}")
        findings.check(
            "once only: somebody", bool(winners) or not _all_tried(link.tries, excuses), [*map(str, link.tries)]
        )
        wholes = [one for one in link.tries if one.result == "complete"]
        # the end of a download that a killed process had no time to write: the same client, and no other one, may go on
        # with its session
        unwritten = any(
            attempt.id in by_attempt and excuses.unwritten(by_attempt[attempt.id], attempt)
            for one in wholes
            for attempt in one.attempts
        )
        findings.check("once only: one whole file", len(wholes) <= 1 or unwritten, [*map(str, link.tries)])
        again += len(wholes) > 1 and unwritten
    if again:
        findings.facts.append(
            f"clients that could get their file again by a link, because its end was not written: {again}"
        )


def _all_tried(tries: list[Download], excuses: Excuses) -> bool:
    return not any(excuses.refused(one.kind.partition(" ")[0], attempt) for one in tries for attempt in one.attempts)


def _check_quotas(findings: Findings, world: World, scenario: Scenario) -> None:
    for quota in world.load.quotas:
        wholes = sum(one.result == "complete" for one in quota.tries)
        findings.check("quota: not more", wholes <= QUOTA, f"{wholes} downloads: {[*map(str, quota.tries)]}")
        # what is given back while Redis is gone is not given back
        if "quota" not in scenario.may_refuse:
            findings.check("quota: not less", wholes >= QUOTA, f"{wholes} downloads: {[*map(str, quota.tries)]}")


def _check_fills(findings: Findings, world: World, logs: Logs, scenario: Scenario) -> None:
    fetches = Counter(
        line["path"].rpartition("/")[2]
        for line in logs.store()
        if line["status"] in (200, 206) and line["method"] == "GET"
    )
    lost = any(node.killed for node in world.site.caches) and scenario.name == "cache-node"
    for name in world.load.used_cold:
        most = 2 if lost else 1
        findings.check("fills of a cold file", 1 <= fetches[name] <= most, f"{name} was fetched {fetches[name]} times")
    spread = Counter(fetches[name] for name in world.load.used_cold)
    findings.facts.append(
        "cold files by the times that they were fetched from the store: "
        + ", ".join(f"{times}: {count}" for times, count in sorted(spread.items()))
    )


@dataclass
class Uncertain:
    """Downloads that the report may not have, or have once more.

    lost: those of a process that was killed before it had written about them. left: those of which a replica that hung
    has sent a whole answer, after the proxy had left it and asked another one.
    """

    lost: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)


def _check_outcomes(
    findings: Findings, world: World, logs: Logs, excuses: Excuses, by_attempt: dict[str, Line]
) -> Uncertain:
    """Compare what each request has got with the lines of the replicas."""
    by_id: dict[str, list[Line]] = {}
    for outcome in chain.from_iterable(logs.replicas().values()):
        by_id.setdefault(outcome["request_id"], []).append(outcome)
    uncertain = Uncertain()
    for download in world.load.driver.downloads:
        for attempt in download.attempts:
            line = by_attempt.get(attempt.id)
            if attempt.head:
                findings.check("a line of the front", line is not None, f"{attempt} of {download}")
            if line is None:
                continue
            outcomes = by_id.get(line["id"], [])
            ended = [one for one in outcomes if one["result"] != "aborted"]
            text = f"{outcomes} for {download}: {line}"
            unwritten = excuses.unwritten(line, attempt)
            if unwritten:
                uncertain.lost.add(download.number)
            if len(ended) > 1:
                uncertain.left.add(download.number)
            if attempt.end in ("complete", "denied"):
                holds = 1 <= len(ended) <= tries_of(line) or (unwritten and not ended)
                findings.check("one outcome", holds, text)
            findings.check("one line", len(outcomes) <= tries_of(line), text)
            if attempt.end == "complete" and ended and not was_retried(line) and ended[0]["result"] == "completed":
                same = (ended[0]["status"], ended[0]["bytes"]) == (attempt.status, attempt.received)
                findings.check("same status and bytes", same, text)
    if uncertain.left:
        findings.facts.append(
            "answers that were given by a replica that hung, after the proxy had left it, and by another one, too: "
            f"{len(uncertain.left)}"
        )
    return uncertain


async def _check_completions(
    findings: Findings, world: World, before: dict[str, int], store: CompletionStore, uncertain: Uncertain
) -> None:
    wholes: dict[str, list[Download]] = {}
    for one in world.load.driver.downloads:
        if one.result == "complete" and one.is_whole and one.name is not None:
            wholes.setdefault(completed_as(one), []).append(one)
    for _ in range(1 + 40 * world.site.slack):
        counts = {file: count - before.get(file, 0) for file, count in (await completed(store)).items()}
        if all(counts.get(file, 0) >= len(some) for file, some in wholes.items()):
            break
        await asyncio.sleep(0.25)
    unwritten = 0
    for file, some in wholes.items():
        has, lost = counts.get(file, 0), sum(one.number in uncertain.lost for one in some)
        left = sum(one.number in uncertain.left for one in some)
        unwritten += max(0, len(some) - has)
        findings.check(
            "completions",
            len(some) - lost <= has <= len(some) + left,
            f"{has} of {file}, and clients have {len(some)}; {lost} may be lost, {left} were given twice. "
            f"In several requests: {[str(one) for one in some if len(one.attempts) > 1]}",
        )
    findings.completed = sum(map(len, wholes.values()))
    if unwritten:
        findings.facts.append(f"completed downloads that a killed process has not written: {unwritten}")


def completed_as(download: Download) -> str:
    """Return how the report names the file of a download."""
    route = download.path.split("/", 2)[1]
    source = {"store": "store", "cold": "cold"}.get(route, "files")
    return f"{source}/{download.name}"


async def completed(store: CompletionStore) -> dict[str, int]:
    """Return the number of downloads of each file, as it is in the database now."""
    return {str(row["file"]): int(row["downloads"]) for row in await store.report("file", top=10_000)}
