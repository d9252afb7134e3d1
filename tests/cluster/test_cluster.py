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
from tests.cluster.nodes import Node
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
    assert report.findings.completed > 20
    assert report.findings.checks["nothing refused"] > 50
    assert report.findings.checks["a line of the front"] > 50
    assert report.findings.checks["same status and bytes"] > 20
    assert report.refused == []
    assert [text for _, text in report.marks] == ["SIGKILL replica3", "replica3 is back"]
    assert "SIGKILL replica3" in picture(report)


def made(number: int, kind: str, *ends: End, address: str = "127.0.0.1") -> Download:
    """Return a download whose requests have ended so, one a second."""
    result = "complete" if ends[-1] == "complete" else "denied" if ends[-1] == "denied" else "refused"
    download = Download(number, kind, f"/{kind}/b.bin", "b.bin", address, result=result)  # type: ignore[arg-type]
    for second, end in enumerate(ends):
        received = 1000 if end == "complete" else 0
        status, name = 200 if received else 410, f"{number}.{second + 1}"
        download.attempts.append(Attempt(second, 0, name, second + 1, second + 0.5, status, received, end))
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


def test_each_request_and_each_download_is_counted_as_a_check() -> None:
    world, findings = world_with(made(1, "files", "cut", "complete"), made(2, "files", "complete")), Findings()
    invariants._check_downloads(findings, world.load.driver.downloads, Excuses(KILL, world))
    assert (findings.checks["nothing refused"], findings.checks["each download ends"]) == (3, 2)


@pytest.mark.parametrize(
    "problems, may_be",
    [
        ([], False),
        (["nothing refused"], True),
        (["nothing refused", "each download ends"], True),
        (["bytes"], False),
        (["nothing refused", "once only: one client"], False),
        (["quota: not more"], False),
    ],
)
def test_only_what_a_reset_explains_may_be_tried_again(problems: list[str], may_be: bool) -> None:
    findings = Findings()
    for problem in problems:
        findings.check(problem, False, "nothing refused: by a text within the problem")
    assert findings.may_be_of_resets == may_be


@pytest.mark.parametrize(
    "killed, excused", [(9.9, False), (10.0, True), (11.0, True), (12.0, True), (12.1, False), (22.0, False)]
)
def test_a_kill_excuses_only_what_was_begun_before_it_and_not_long_ended(killed: float, excused: bool) -> None:
    site = Site(Path(), size=0, slack=10)
    site.nodes["replica1"] = Node("replica1", (), 1, Path(), killed=[killed])
    excuses = Excuses(KILL, World(site, Load(site, Driver(1), Random(1), [])))
    line = {"servers": "127.0.0.1:2, 127.0.0.1:1"}
    assert excuses.unwritten(line, Attempt(10.0, 0, "1.1", 11.0)) == excused
    assert not excuses.unwritten({"servers": "127.0.0.1:2"}, Attempt(10.0, 0, "1.1", 11.0))


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


class Written:
    """The lines of one replica, and those of the front."""

    def __init__(self, lines: list[tuple[str, int]], front: dict[str, dict[str, Any]]) -> None:
        self._lines, self._front = lines, front

    def front(self) -> list[dict[str, Any]]:
        return [*self._front.values()]

    def replicas(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "x": [{"request_id": "1", "status": 200, "result": result, "bytes": size} for result, size in self._lines]
        }


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
    world = world_with(made(1, "stream", "complete"))
    front = {"1.1": {"id": "1", "attempt": "1.1", "servers": "127.0.0.1:1"}}
    assert checked(invariants._check_outcomes, world, Written(lines, front), Excuses(KILL, world), front) == problems


def test_a_line_is_compared_with_the_attempt_that_it_is_about() -> None:
    world = world_with(made(1, "stream", "no answer", "complete"))
    world.load.driver.downloads[0].attempts[0].head = 0
    front = {"1.2": {"id": "1", "attempt": "1.2", "servers": "127.0.0.1:1"}}
    for size, problems in ((1000, []), (999, ["same status and bytes"])):
        written = Written([("completed", size)], front)
        assert checked(invariants._check_outcomes, world, written, Excuses(KILL, world), front) == problems


def test_an_answer_without_a_line_of_the_front_is_found() -> None:
    world = world_with(made(1, "stream", "complete"))
    assert checked(invariants._check_outcomes, world, Written([], {}), Excuses(KILL, world), {}) == [
        "a line of the front"
    ]


@pytest.mark.asyncio
async def test_logs_that_stay_incomplete_are_found() -> None:
    world = world_with(made(1, "stream", "complete"))
    world.site.slack = 0
    front = {"1.1": {"id": "1", "attempt": "1.1", "servers": "127.0.0.1:1"}}
    for lines, of_front, are_complete in (
        ([("completed", 1000)], front, True),
        ([], front, False),
        ([("completed", 1000)], {}, False),
    ):
        written, excuses = Written(lines, of_front), Excuses(KILL, world)
        assert await invariants._until_logs_are_complete(world, written, excuses) == are_complete  # type: ignore[arg-type]


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
