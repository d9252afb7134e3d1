"""A short soak, and that its checks can fail. `make soak` runs an hour."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.soak.clients import Answer, Target, World, check_file
from tests.soak.contents import OUTSIDE, Tree, content, is_cleared
from tests.soak.exchange import Connection
from tests.soak.invariants import MOST_GROWTH, POOLED, Watch, beyond_base, check_growth
from tests.soak.ledger import Ledger, Record
from tests.soak.run import Report, soak
from tests.soak.site import Shape, Site


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.asyncio
async def test_a_short_soak(tmp_path: Path) -> None:
    report = Report(Ledger())
    await soak(report, Shape(1), seed=18, seconds=8, directory=tmp_path, clients=12, load_seconds=8)
    assert report.ledger.problems == []
    assert sum(report.ledger.seen.values()) > 100
    assert report.ledger.faults
    assert report.ledger.checks["bytes of one version"] > 50


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.asyncio
async def test_a_connection_that_stays_is_found(tmp_path: Path) -> None:
    async with Site(tmp_path, Shape(1)) as site:
        world = World(site, Ledger(), Random(1))
        watch = Watch(world)
        async with asyncio.timeout(60):
            while not watch.base or watch.base["descriptors"]["client"]:  # that of the question, which may end later
                watch.base = {}
                assert await watch.beyond_base() == ""
            connection = Connection(site, world.ledger)
            await connection.open()
            try:
                while "'client': 1" not in await watch.beyond_base():
                    pass
            finally:
                connection.close()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "files", {"a.bin": 1000})


def test_only_the_bytes_of_a_version_that_lived_then_match(tree: Tree) -> None:
    first = content("a.bin", 1, 1000)
    now = tree.versions["a.bin"][0].born + 0.001
    assert (tree.root / "a.bin").read_bytes() == first
    assert tree.match("a.bin", first, 0, 1000, since=now, until=now) is not None
    assert tree.match("a.bin", first[:10], 0, 1000, since=now, until=now) is not None
    assert tree.match("a.bin", first, 0, 999, since=now, until=now) is None
    assert tree.match("a.bin", first[1:], 0, 1000, since=now, until=now) is None
    assert tree.match("a.bin", first[:-1] + b"!", 0, 1000, since=now, until=now) is None
    tree.replace("a.bin")
    second = content("a.bin", 2, 1000)
    later = tree.versions["a.bin"][0].died + 0.001
    assert tree.match("a.bin", second, 0, 1000, since=later, until=later) is not None
    assert tree.match("a.bin", first, 0, 1000, since=later, until=later) is None
    assert tree.match("a.bin", first[:500] + second[500:], 0, 1000, since=now, until=later) is None
    few = [tree.matches("a.bin", first[:number], 0, 1000, since=0, until=later) for number in (42, 43)]
    assert [[version.number for version in versions] for versions in few] == [[2, 1], [1]]


def test_only_zeros_at_the_end_are_cleared_bytes() -> None:
    whole = content("a.bin", 1, 20_000)
    assert is_cleared(whole[:5000] + bytes(3000), whole)
    assert not is_cleared(whole[:5000] + bytes(10) + whole[5010:], whole)
    assert not is_cleared(content("a.bin", 2, 20_000), whole)
    assert not is_cleared(bytes(20_001), whole)


LINE: dict[str, Any] = {
    "user_agent": "soak/1",
    "method": "GET",
    "request_id": "x",
    "status": 200,
    "result": "completed",
    "bytes": 1000,
}


@pytest.mark.parametrize(
    "lines, problem",
    [
        ([LINE], None),
        ([{**LINE, "result": "delegated", "bytes": 0}], None),
        ([LINE, LINE], "one outcome"),
        ([], "one outcome"),
        ([{**LINE, "user_agent": "soak/2"}, LINE], "one outcome"),
        ([{**LINE, "bytes": 999}], "same bytes"),
        ([{**LINE, "result": "aborted"}], "complete in the log"),
        ([{**LINE, "status": 206}], "same status"),
        ([{**LINE, "request_id": "y"}], "same id"),
    ],
)
def test_the_log_is_compared_with_what_clients_have(
    tmp_path: Path, lines: list[dict[str, Any]], problem: str | None
) -> None:
    ledger = Ledger()
    record = ledger.begin("whole", "GET", "/files/a.bin")
    record.status, record.request_id, record.received = 200, "x", 1000
    ledger.end(record, "complete")
    (tmp_path / "access.log").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    ledger.forget(ledger.compare(tmp_path), lost=False)
    assert [text.partition(":")[0] for text in ledger.problems] == ([] if problem is None else [problem])


def test_a_fault_excuses_what_it_affects_alone() -> None:
    ledger = Ledger(settles=0)
    spell = ledger.begin_fault("upstream killed", frozenset({"mirror"}))
    assert ledger.excuses("mirror", spell.begun)
    assert not ledger.excuses("files", spell.begun)
    ledger.end_fault(spell)
    assert not ledger.excuses("mirror", spell.ended + 1)
    assert not ledger.excuses("mirror", spell.begun - 2, spell.begun - 1)


def test_memory_that_grows_is_found() -> None:
    ledger = Ledger()
    check_growth(ledger, 1, [100 << 20] * 40)
    assert ledger.problems == []
    check_growth(ledger, 1, [number * MOST_GROWTH // 5 for number in range(40)])
    assert len(ledger.problems) == 1


@pytest.mark.parametrize(
    "more, is_found",
    [
        ({}, False),
        ({"descriptors": Counter({"/x/links.db": 2, POOLED: 5})}, False),
        ({"descriptors": Counter({"/x/files": 1})}, True),
        ({"descriptors": Counter({"/x/links.db": 40})}, True),
        ({"descriptors": Counter({POOLED: 500})}, True),
        ({"tasks": Counter({"fetch": 1})}, True),
        ({"threads": Counter({"Thread": 1})}, True),
    ],
)
def test_what_is_left_is_found(more: dict[str, Counter[str]], is_found: bool) -> None:
    base = {what: Counter({"one": 1}) for what in ("descriptors", "tasks", "threads")}
    found = {what: counts + more.get(what, Counter()) for what, counts in base.items()}
    assert bool(beyond_base(found, base)) == is_found


@pytest.mark.asyncio
async def test_wrong_bytes_are_found(tree: Tree, tmp_path: Path) -> None:
    site = Site(tmp_path, Shape(1))
    site.files = tree
    for body, is_right in ((content("a.bin", 1, 1000), True), (OUTSIDE * 30, False), (b"\0" * 1000, False)):
        world = World(site, Ledger(), Random(1))
        record = Record(1, "whole", "GET", "/files/a.bin", begun=tree.versions["a.bin"][0].born)
        record.status, record.result, record.ended = 200, "complete", record.begun + 1
        answer = Answer(record, body[:1000], {"content-length": "1000"})
        check_file(world, answer, Target("/files/a.bin", "a.bin", "files"))
        assert bool(world.ledger.problems) != is_right
