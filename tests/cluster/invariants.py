"""What has to hold at the end of a scenario."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downloadview_async import CompletionStore
from tests.cluster.driver import Attempt, Download
from tests.cluster.scenarios import Scenario, World
from tests.cluster.site import QUOTA, Site

_UNWRITTEN = 1.0
"""Seconds of what a process that is killed may not have written yet: see docs/howto/downloads.md."""

Line = dict[str, Any]


@dataclass
class Findings:
    """How often each invariant was checked, and what does not hold."""

    checks: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def check(self, what: str, holds: bool, problem: object) -> None:
        """Count a check, and keep the problem if it does not hold."""
        self.checks[what] += 1
        if not holds:
            self.problems.append(f"{what}: {problem}")


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


def front_by_agent(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Return the lines of the proxy in front about each download, in the order of its requests."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["agent"], []).append(line)
    return found


def servers_of(line: Line) -> list[str]:
    """Return the addresses of the replicas that a request was made at."""
    found = [one.strip() for part in line["servers"].split(" : ") for one in part.split(",")]
    return [one for one in found if one not in ("", "-", "service")]


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
        self._unwritten = _UNWRITTEN * world.site.slack
        self._killed = {node.address: node.killed for node in (*world.site.replicas, *world.site.caches) if node.killed}

    def refused(self, kind: str, attempt: Attempt) -> bool:
        """Return whether a request may have been refused."""
        begun, ended = self._spell
        return kind in self._scenario.may_refuse and attempt.ended >= begun and attempt.begun <= ended

    def unwritten(self, line: Line, began: float, ended: float) -> bool:
        """Return whether a replica that had to do with a request was killed before it had written about it."""
        return any(
            began - self._unwritten <= killed <= ended + self._unwritten
            for server in servers_of(line)
            for killed in self._killed.get(server, ())
        )


async def check(
    scenario: Scenario, world: World, logs: Logs, before: dict[str, int], completions: CompletionStore
) -> Findings:
    """Check everything that has to hold now that all clients have ended."""
    findings, load = Findings(), world.load
    excuses = Excuses(scenario, world)
    await _until_logs_are_complete(world, logs, excuses)
    by_agent = front_by_agent(logs.front())
    _check_downloads(findings, load.driver.downloads, excuses)
    _check_links(findings, world, excuses, by_agent)
    _check_quotas(findings, world, scenario)
    _check_fills(findings, world, logs, scenario)
    uncertain = _check_outcomes(findings, world, logs, excuses, by_agent)
    await _check_completions(findings, world, before, completions, uncertain)
    for problem in world.site.tracebacks():
        findings.check("no traceback", False, problem)
    findings.checks["no traceback"] += len(world.site.replicas) + len(world.site.caches)
    return findings


async def _until_logs_are_complete(world: World, logs: Logs, excuses: Excuses) -> None:
    """Return when the proxy has a line about each request that has got an answer, and a replica has one of its id."""
    downloads = world.load.driver.downloads
    for _ in range(100 * world.site.slack):
        by_agent = front_by_agent(logs.front())
        written = {line["request_id"] for lines in logs.replicas().values() for line in lines}
        if all(
            len(by_agent.get(one.agent, ())) >= sum(bool(each.head) for each in one.attempts) for one in downloads
        ) and all(
            line["id"] in written or excuses.unwritten(line, attempt.begun, attempt.ended)
            for one in downloads
            for attempt, line in zip(one.attempts, by_agent.get(one.agent, ()), strict=False)
            if attempt.end in ("complete", "denied")
        ):
            return
        await asyncio.sleep(0.1)


def _check_downloads(findings: Findings, downloads: Iterable[Download], excuses: Excuses) -> None:
    for one in downloads:
        findings.check("bytes", one.result != "wrong", one)
        for attempt in one.attempts:
            if attempt.end in ("no answer", "5xx"):
                findings.check("nothing refused", excuses.refused(one.kind, attempt), one)
        may_be_denied = one.kind in ("once", "once again", "quota", "quota again", "key")
        findings.check("nothing denied", one.result != "denied" or may_be_denied, one)
        if one.result == "refused" and not any(excuses.refused(one.kind, attempt) for attempt in one.attempts):
            findings.check("each download ends", False, one)


def _check_links(findings: Findings, world: World, excuses: Excuses, by_agent: dict[str, list[Line]]) -> None:
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
            excuses.unwritten(line, one.attempts[0].begun, one.attempts[-1].ended)
            for one in wholes
            for line in by_agent.get(one.agent, ())
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
    findings: Findings, world: World, logs: Logs, excuses: Excuses, by_agent: dict[str, list[Line]]
) -> Uncertain:
    """Compare what each request has got with the lines of the replicas."""
    by_id: dict[str, list[Line]] = {}
    for lines in logs.replicas().values():
        for line in lines:
            by_id.setdefault(line["request_id"], []).append(line)
    uncertain = Uncertain()
    for download in world.load.driver.downloads:
        for attempt, line in zip(download.attempts, by_agent.get(download.agent, []), strict=False):
            outcomes = by_id.get(line["id"], [])
            ended = [one for one in outcomes if one["result"] != "aborted"]
            text = f"{outcomes} for {download}: {line}"
            unwritten = excuses.unwritten(line, attempt.begun, attempt.ended)
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
        found = {file: count - before.get(file, 0) for file, count in (await completed(store)).items()}
        if all(found.get(file, 0) >= len(some) for file, some in wholes.items()):
            break
        await asyncio.sleep(0.25)
    for file, some in wholes.items():
        has, lost = found.get(file, 0), sum(one.number in uncertain.lost for one in some)
        left = sum(one.number in uncertain.left for one in some)
        findings.check(
            "completions",
            len(some) - lost <= has <= len(some) + left,
            f"{has} of {file}, and clients have {len(some)}; {lost} may be lost, {left} were given twice. "
            f"In several requests: {[str(one) for one in some if len(one.attempts) > 1]}",
        )
    findings.checks["completed downloads"] += sum(map(len, wholes.values()))


def completed_as(download: Download) -> str:
    """Return how the report names the file of a download."""
    route = download.path.split("/", 2)[1]
    source = {"store": "store", "cold": "cold"}.get(route, "files")
    return f"{source}/{download.name}"


async def completed(store: CompletionStore) -> dict[str, int]:
    """Return the number of downloads of each file, as it is in the database now."""
    return {str(row["file"]): int(row["downloads"]) for row in await store.report("file", top=10_000)}
