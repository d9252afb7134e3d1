"""One scenario of the cluster, and that its checks can fail. `make cluster` runs all scenarios."""

import dataclasses
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from downloadview_async import CompletionStore
from tests.cluster import invariants
from tests.cluster.driver import Attempt, Download, Driver, End
from tests.cluster.invariants import Excuses, Findings, Uncertain
from tests.cluster.load import Link, Load, Quota
from tests.cluster.page import picture
from tests.cluster.run import Report, run_scenario
from tests.cluster.scenarios import SCENARIOS, World
from tests.cluster.site import Site
from tests.proxies.servers import readable_directory

KILL = next(one for one in SCENARIOS if one.name == "kill-9")
REDIS = next(one for one in SCENARIOS if one.name == "redis")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.asyncio
async def test_a_killed_replica_is_noticed_by_nobody() -> None:
    if shutil.which("redis-server") is None or not [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]:
        pytest.skip("redis-server or PostgreSQL is not installed: apt-get install redis-server postgresql")
    with readable_directory() as directory:
        async with Site(directory, slack=10) as site:
            store = CompletionStore(site.database)
            try:
                report = await run_scenario(site, dataclasses.replace(KILL, settles=1.0), store, seed=20, first=0)
            finally:
                await store.aclose()
    assert report.findings.problems == []
    assert report.findings.checks["bytes"] > 50
    assert report.findings.checks["completed downloads"] > 20
    assert report.refused == []
    assert [text for _, text in report.marks] == ["SIGKILL replica3", "replica3 is back"]
    assert "SIGKILL replica3" in picture(report)


def made(number: int, kind: str, *ends: End, address: str = "127.0.0.1") -> Download:
    """Return a download whose requests have ended so, one a second."""
    result = "complete" if ends[-1] == "complete" else "denied" if ends[-1] == "denied" else "refused"
    download = Download(number, kind, f"/{kind}/b.bin", "b.bin", address, result=result)  # type: ignore[arg-type]
    for second, end in enumerate(ends):
        received = 1000 if end == "complete" else 0
        download.attempts.append(Attempt(second, 0, second + 1, second + 0.5, 200 if received else 410, received, end))
    return download


def world_with(*downloads: Download) -> World:
    driver = Driver(1)
    driver.downloads += downloads
    return World(Site(Path(), size=0), Load(Site(Path()), driver, Random(1), []))


def checked(check: Any, world: World, *arguments: Any) -> list[str]:
    """Return the invariants that a check has found broken."""
    findings = Findings()
    check(findings, *([world] if check is not invariants._check_downloads else []), *arguments)
    return [problem.partition(":")[0] for problem in findings.problems]


@pytest.mark.parametrize(
    "download, problems",
    [
        (made(1, "files", "complete"), []),
        (made(1, "files", "cut", "complete"), []),
        (made(1, "files", "5xx", "complete"), ["nothing refused"]),
        (made(1, "files", "no answer"), ["nothing refused", "each download ends"]),
        (made(1, "files", "denied"), ["nothing denied"]),
        (made(1, "once", "denied"), []),
    ],
)
def test_requests_that_are_refused_are_found(download: Download, problems: list[str]) -> None:
    world = world_with(download)
    assert checked(invariants._check_downloads, world, world.load.driver.downloads, Excuses(KILL, world)) == problems


def test_a_scenario_excuses_what_it_takes_away() -> None:
    world = world_with(made(1, "once", "5xx", "complete"), made(2, "files", "5xx", "complete"))
    world.marks = [(0.0, "gone"), (1.0, "back")]
    problems = checked(invariants._check_downloads, world, world.load.driver.downloads, Excuses(REDIS, world))
    assert problems == ["nothing refused"]


def test_a_link_that_is_used_twice_is_found() -> None:
    for ends, problems in (
        (("complete", "denied"), []),
        (("complete", "complete"), ["once only", "once only"]),
        (("denied", "denied"), ["once only"]),
    ):
        world = world_with()
        tries = [made(number, "once", end, address=f"127.0.0.{number}") for number, end in enumerate(ends)]  # type: ignore[arg-type]
        world.load.links.append(Link("/once/b.bin", tries))
        assert checked(invariants._check_links, world, Excuses(KILL, world), {}) == problems


def test_a_quota_that_is_not_exact_is_found() -> None:
    for count, problems in ((1, ["quota"]), (2, []), (3, ["quota"])):
        world = world_with()
        world.load.quotas.append(Quota("127.0.0.9", [made(number, "quota", "complete") for number in range(count)]))
        assert checked(invariants._check_quotas, world, KILL) == problems


@pytest.mark.parametrize(
    "lines, problems",
    [
        ([("completed", 1000)], []),
        ([("completed", 999)], ["same status and bytes"]),
        ([], ["one outcome"]),
        ([("aborted", 0)], ["one outcome"]),
        ([("completed", 1000), ("completed", 1000)], ["one outcome", "one line"]),
    ],
)
def test_outcomes_are_compared_with_what_clients_have(lines: list[tuple[str, int]], problems: list[str]) -> None:
    class Written:
        def replicas(self) -> dict[str, list[dict[str, Any]]]:
            return {
                "x": [{"request_id": "1", "status": 200, "result": result, "bytes": size} for result, size in lines]
            }

    world = world_with(made(1, "stream", "complete"))
    front = {"cluster/1": [{"id": "1", "agent": "cluster/1", "servers": "127.0.0.1:1"}]}
    assert checked(invariants._check_outcomes, world, Written(), Excuses(KILL, world), front) == problems


@pytest.mark.asyncio
async def test_completions_are_compared_with_what_clients_have() -> None:
    class Store:
        async def report(self, by: str, **options: object) -> list[dict[str, Any]]:
            return [{"file": "files/b.bin", "downloads": 2}]

    for clients, lost, left, holds in (
        (2, (), (), True),
        (3, (), (), False),
        (3, (1,), (), True),
        (1, (), (), False),
        (1, (), (1,), True),
    ):
        findings = Findings()
        world = world_with(*(made(number, "stream", "complete") for number in range(1, clients + 1)))
        world.site.slack = 0
        await invariants._check_completions(findings, world, {}, Store(), Uncertain({*lost}, {*left}))  # type: ignore[arg-type]
        assert (findings.problems == []) == holds


def test_the_picture_has_each_event_and_each_result() -> None:
    report = Report(KILL, Findings(), [0.05, 0.06, 1.0], [1.2], [1.3], [(1.1, "SIGKILL replica<3>")], 2.0)
    drawn = picture(report)
    assert "SIGKILL replica&lt;3&gt;" in drawn
    assert [drawn.count(f'<path class="{name}"') for name in ("ok", "retried", "refused")] == [1, 1, 1]
