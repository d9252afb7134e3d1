"""`Metrics`: what is counted, what the text is, and the sums over processes."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette
from starlette.routing import Route

from downloadview_async import (
    Accounts,
    ConfigurationError,
    Download,
    MemoryGrantStore,
    Metrics,
    PathSource,
    SignedLinks,
    URLSigner,
)
from downloadview_async.accounts.metrics import MAX_SERIES
from downloadview_async.accounts.samples import METRICS, Histogram
from downloadview_async.accounts.shared_samples import SharedSamples
from downloadview_async.sources.workers import Slots, Workers, slots_of
from downloadview_async.testing import call
from tests.accounts.test_log import outcome

Found = dict[tuple[str, ...], float]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def text_of(metrics: Metrics, accept: str = "") -> str:
    text, _ = await metrics.render(accept)
    return text.decode()


def read(text: str, name: str, *labels: str) -> Found:
    """Return the samples of a metric, by the values of some labels."""
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == f"downloadview_{name}"
    }


@pytest.mark.asyncio
async def test_outcomes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    metrics = Metrics()
    routes = [Route("/files/{path:path}", Download(PathSource(tmp_path), source_name="files"))]
    app = Accounts(Starlette(routes=routes), observers=[metrics.observe])
    metrics.add_accounts(app)
    await call(app, "/files/a.txt")
    await call(app, "/files/a.txt", headers={"Range": "bytes=0-2"})
    for name in ("none", "other", "a b"):
        await call(app, f"/files/{name}")
    await call(app, "/nowhere/secret")
    text = await text_of(metrics)
    assert read(text, "requests_total", "route", "source", "kind", "status", "result") == {
        ("/files/{path:path}", "files", "inline", "2xx", "completed"): 2,
        ("/files/{path:path}", "files", "error", "4xx", "refused"): 3,
        ("", "", "other", "4xx", "refused"): 1,
    }
    assert read(text, "sent_bytes_total", "kind")[("inline",)] == 13
    assert read(text, "refused_total", "route", "code") == {("/files/{path:path}", "404"): 3, ("", "404"): 1}
    assert read(text, "request_seconds_count", "route") == {("/files/{path:path}",): 5, ("",): 1}
    assert read(text, "requests_in_progress") == {(): 0}
    assert "secret" not in text
    assert "a.txt" not in text


@pytest.mark.asyncio
async def test_aborts_are_counted_by_their_reason_and_seconds_in_buckets() -> None:
    metrics = Metrics()
    metrics.observe(outcome(result="aborted", reason="stalled", seconds=0.3, first_byte=None))
    metrics.observe(outcome(result="aborted", reason="stalled", seconds=2000, first_byte=0.05))
    text = await text_of(metrics)
    assert read(text, "aborted_total", "source", "reason") == {("files", "stalled"): 2}
    buckets = read(text, "request_seconds_bucket", "le")
    assert (buckets[("0.1",)], buckets[("0.5",)], buckets[("1800.0",)], buckets[("+Inf",)]) == (0, 1, 1, 2)
    assert read(text, "request_seconds_sum") == {(): 2000.3}
    assert read(text, "first_byte_seconds_count") == {(): 1}


@pytest.mark.asyncio
async def test_labels_are_bounded() -> None:
    """Such as if an application notes the path as the route."""
    metrics = Metrics()
    for number in range(MAX_SERIES + 50):
        metrics.observe(outcome(route=f"/{number}", result="refused", status=404))
    text = await text_of(metrics)
    requests = read(text, "requests_total", "route")
    assert len(requests) == MAX_SERIES + 1
    assert requests[("other",)] == 50
    assert read(text, "refused_total", "route")[("other",)] == 50


def test_numbers_that_nobody_requests_take_no_memory() -> None:
    metrics = Metrics()
    for _ in range(1050):
        metrics.observe(outcome())
    (row,) = metrics._rows.values()
    assert len(row.times) == len(row.times_of_first) == 50
    assert row.requests == 1000


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "accept, media_type, parse",
    [
        ("", "text/plain", parse_text),
        ("text/html", "text/plain", parse_text),
        (f"{OPENMETRICS},text/plain;q=0.5", "application/openmetrics-text", parse_openmetrics),
    ],
)
async def test_both_formats_are_valid(accept: str, media_type: str, parse: Any) -> None:
    metrics = Metrics()
    metrics.observe(outcome(route='/{a}"\n\\é'))
    text, given = await metrics.render(accept)
    assert given.startswith(media_type)
    families = {family.name: family for family in parse(text.decode())}
    assert {name.removeprefix("downloadview_") for name in families} == set(METRICS)
    assert text.endswith(b"# EOF\n") == (parse is parse_openmetrics)
    assert families["downloadview_requests"].samples[0].labels["route"] == '/{a}"\n\\é'


@pytest.mark.asyncio
async def test_a_source_tells_how_many_wait_and_are_refused(tmp_path: Path) -> None:
    source, metrics = PathSource(tmp_path, threads=1), Metrics()
    metrics.add_source("files", source)
    metrics.add_source("none", object())
    slots = source.slots
    with await slots.take():
        with pytest.raises(Exception, match="slots"):
            await slots.take(patience=0.01)
        async with anyio.create_task_group() as group:
            group.start_soon(slots.take)
            while not slots.waiting:
                await anyio.sleep(0)
            text = await text_of(metrics)
            group.cancel_scope.cancel()
    for name, value in {"in_use": 1, "waiting": 1, "waits_total": 2, "refusals_total": 1}.items():
        assert read(text, f"source_{name}", "source") == {("files",): value}, name
    assert read(text, "source_wait_seconds_total", "source")[("files",)] >= 0.01


def test_the_slots_of_a_source_are_found_behind_others() -> None:
    class Storage:
        slots = Slots(1, are_connections=True)

    class OfStorage:
        storage = Storage()

    class Cached:
        source = OfStorage()

    assert slots_of(Cached()) is Storage.slots
    assert slots_of(object()) is None


@pytest.mark.asyncio
async def test_links_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    signer, metrics = URLSigner({"k": "s" * 32}), Metrics()
    metrics.add_links(signer)
    app = Starlette(routes=[Route("/{path:path}", Download(PathSource(tmp_path), access=SignedLinks(signer)))])
    link = signer.sign("/a.txt").partition("?")[2]
    for query in (link, link, f"{link}x", ""):
        await call(app, "/a.txt", query=query)
    assert read(await text_of(metrics), "links_total", "event") == {("verified",): 2, ("refused",): 1}


@pytest.mark.asyncio
async def test_the_store_of_links_is_counted(tmp_path: Path) -> None:
    class Failing(MemoryGrantStore):
        async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
            raise OSError("no answer")

    (tmp_path / "a.txt").write_bytes(b"a")
    for store, expected in (
        (MemoryGrantStore(), {"verified": 3, "refused": 0, "used": 1, "used-up": 2, "store-failed": 0}),
        (Failing(), {"verified": 0, "refused": 3, "used": 0, "used-up": 0, "store-failed": 3}),
    ):
        signer, metrics = URLSigner({"k": "s" * 32}, store=store), Metrics()
        metrics.add_links(signer)
        app = Starlette(routes=[Route("/{path:path}", Download(PathSource(tmp_path), access=SignedLinks(signer)))])
        link = signer.sign("/a.txt", uses=1).partition("?")[2]
        for client in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
            await call(app, "/a.txt", query=link, scope={"client": (client, 1)})
        counts = read(await text_of(metrics), "links_total", "event")
        assert counts == {(event,): count for event, count in expected.items()}


COUNTING = """
import asyncio, sys
from downloadview_async import Metrics
from tests.accounts.test_log import outcome
async def main():
    metrics = Metrics(sys.argv[1])
    async with metrics.running():
        for _ in range(int(sys.argv[2])):
            metrics.observe(outcome(seconds=0.3))
        await metrics.render()
        print("counted", flush=True)
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
"""


def counting(directory: Path, count: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", COUNTING, str(directory), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"counted\n"
    return process


@pytest.mark.asyncio
async def test_processes_add_up_their_numbers_and_those_of_killed_ones_stay(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.observe(outcome(seconds=0.3))

    async def total() -> tuple[float, float, float]:
        text = await text_of(metrics)
        (requests,) = read(text, "requests_total").values()
        return requests, read(text, "request_seconds_bucket", "le")[("0.5",)], read(text, "processes")[()]

    assert await total() == (1, 1, 1)
    killed, ended = counting(tmp_path, 10), counting(tmp_path, 100)
    assert await total() == (111, 111, 3)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert await total() == (111, 111, 2)
    ended.communicate(b"")
    assert ended.returncode == 0
    for _ in range(2):
        assert await total() == (111, 111, 1)
    assert len([*tmp_path.glob("*.live")]) == len([*tmp_path.glob("*-*.json")]) == 1
    again = counting(tmp_path, 1000)
    assert await total() == (1111, 1111, 2)
    again.communicate(b"")
    assert not [*tmp_path.glob(".*")]


def test_a_process_that_is_killed_while_it_adds_up_counts_nothing_twice(tmp_path: Path) -> None:
    first, second = SharedSamples(tmp_path), SharedSamples(tmp_path)
    first.write({"requests": {("", "", "other", "2xx", "completed"): 5}})
    first.close()
    left = {file.name: file.read_bytes() for file in tmp_path.glob("*-*")}
    assert second.total()["requests"] == {("", "", "other", "2xx", "completed"): 5}
    assert not [*tmp_path.glob("*-*")]
    for name, content in left.items():  # as if it had been killed before it removed them
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        assert second.total()["requests"] == {("", "", "other", "2xx", "completed"): 5}
    assert not [*tmp_path.glob("*-*")]


def test_a_process_that_is_killed_while_it_writes_leaves_no_file(tmp_path: Path) -> None:
    first, second = SharedSamples(tmp_path), SharedSamples(tmp_path)
    first.write({})
    (samples,) = tmp_path.glob("*-*.json")
    (tmp_path / f".{samples.name}-0a1b2c3d").write_text("{")
    (tmp_path / ".ended.json-0a1b2c3d").write_text("{")
    first.close()
    second.total()
    assert {file.name for file in tmp_path.iterdir()} == {"ended.json", "lock"}


def test_a_process_that_joins_is_not_taken_for_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody adds up the files between the making of a `.live` file and its lock."""
    lock = fcntl.flock
    tried: list[str] = []

    def flock(descriptor: int, how: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".live"):
            with (tmp_path / "lock").open("w") as file, pytest.raises(BlockingIOError):
                lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            tried.append("lock")
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    SharedSamples(tmp_path).write({})
    assert tried == ["lock"]


@pytest.mark.parametrize("name", ["1-aa.json", "ended.json"])
@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"\0" * 9, b'{"samples": {}', b"null", b"[]", b"{}", b"[" * 100_000, b'{"merged": 1, "samples": 1}'],
        b'{"merged": [[]], "samples": {"processes": 1}}',
        b'{"merged": [], "samples": {"processes": [1, ["a"], [[]]], "requests": {}}}',
    ],
)
def test_a_file_that_a_machine_has_lost_at_its_end_counts_as_empty(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "1-aa.live").touch()
    (tmp_path / name).write_bytes(content)
    shared = SharedSamples(tmp_path)
    for _ in range(2):
        shared.write({"processes": {(): 1}})
        assert {name: rows for name, rows in shared.total().items() if rows} == {"processes": {(): 1}}
    shared.close()


def test_samples_of_another_version_are_left_out(tmp_path: Path) -> None:
    rows = {"requests": [["too", "few", 1]], "unknown": [[1]], "processes": [[1]]}
    (tmp_path / "ended.json").write_text(json.dumps({"merged": [], "samples": rows}))
    assert SharedSamples(tmp_path).total() == {"requests": {}, "processes": {(): 1}}


@pytest.mark.asyncio
async def test_the_event_loop_is_measured() -> None:
    metrics = Metrics()
    async with metrics.running():
        while read(await text_of(metrics), "event_loop_lag_seconds_count")[()] < 2:
            await anyio.sleep(0.01)
        time.sleep(0.3)  # the loop hangs
        while (buckets := read(await text_of(metrics), "event_loop_lag_seconds_bucket", "le"))[("+Inf",)] < 3:
            await anyio.sleep(0.01)
    assert buckets[("+Inf",)] > buckets[("0.01",)]


def test_a_directory_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path}/none' of the metrics is missing")):
        Metrics(tmp_path / "none")


@pytest.mark.asyncio
async def test_workers_tell_the_same_slots() -> None:
    workers = Workers(3)
    await workers.run(lambda: None)
    assert (workers.slots.in_use, workers.slots.waits) == (0, 0)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([], [0, 0, 0]),
        ([0.5], [1, 0, 0]),
        ([1.0], [1, 0, 0]),
        ([1.5, 2.0], [0, 2, 0]),
        ([7.0, 1.0, 2.0, 0.0, 9.0], [2, 1, 2]),
    ],
)
def test_values_that_are_counted_together_go_to_the_buckets_of_each(values: list[float], counts: list[int]) -> None:
    together, one_by_one = Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    for _ in range(2):  # the second time, there are values already
        together.add_all(values)
        for value in values:
            one_by_one.add(value)
    assert together.values == one_by_one.values == [*(2 * count for count in counts), 2 * sum(values)]
