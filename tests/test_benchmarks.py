"""The benchmark: its arithmetic, its page and its pictures as tables; and one short run of it."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.caches import section as caches_section
from benchmarks.calls import CASES, PARTS, part_of
from benchmarks.calls import count as count_calls
from benchmarks.calls import table as calls_table
from benchmarks.costs import PAGE, SHOWN, write_costs
from benchmarks.costs import page as costs_page
from benchmarks.counting import Count
from benchmarks.goals import GOALS, PRODUCT, Added, Goal, Row
from benchmarks.load import LoadError, parse_wrk, wrk_program
from benchmarks.measures import FIGURES, FULL, MEASURE_OF, MEASURES, QUICK
from benchmarks.pictures import Bar, bar_chart
from benchmarks.plan_check import Compared, compare
from benchmarks.plan_check import main as plan_check
from benchmarks.plan_check import table as plan_table
from benchmarks.report import (
    EXAMPLE,
    LOADS,
    Machine,
    comparison,
    core_table,
    example_table,
    figures_table,
    goals_table,
    growth_table,
    limits,
    median,
    page,
    spread,
    worse_than_before,
)
from benchmarks.servers import SERVERS
from downloadview_async.service.plan.costs import load_costs
from tests.servers import PROJECT

RATE = Row("rate", ("rps_10k", "ours"), ("rps_10k", "nginx"), more_is_better=True)
CPU = Row("cpu", ("cpu_per_gib", "ours"), ("cpu_per_gib", "nginx"), more_is_better=False)
MEMORY = Row("memory", ("rss_per_client", "ours"), None, more_is_better=False)
WRK = """Running 1s test @ http://127.0.0.1:1/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   260.00us  100.00us   3.00ms   90.00%
  Latency Distribution
     50%  250.00us
     75%  300.00us
     90%  350.00us
     99%    1.50ms
  61000 requests in 1.00s, 600.00MB read
{}Requests/sec:  61258.92
Transfer/sec:    600.00MB
"""


@pytest.mark.parametrize(
    ("row", "figures", "expected"),
    [
        (RATE, {"rps_10k": {"ours": [50, 90], "nginx": [100, 100]}}, [0.5, 0.9]),
        (RATE, {"rps_10k": {"ours": [50, None, 80], "nginx": [100, 100, 100]}}, [0.5, 0.8]),
        (RATE, {"rps_10k": {"ours": [50, 60], "nginx": [None, 100]}}, [0.6]),
        (RATE, {"rps_10k": {"ours": [50]}}, []),
        (RATE, {}, []),
        (MEMORY, {"rss_per_client": {"ours": [2048, 4096]}}, [2, 4]),
    ],
)
def test_a_row_is_a_ratio_of_each_round(row: Row, figures: Any, expected: list[float]) -> None:
    assert row.rounds(figures) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rounds", "expected"), [([1.0, 3.0, 2.0], 2.0), ([1.0, 2.0], 1.5), ([None, 4.0], 4.0), ([None], None)]
)
def test_the_median_of_what_was_measured(rounds: list[float | None], expected: float | None) -> None:
    assert median({"p99": {"ours": rounds}}, "p99", "ours") == expected


@pytest.mark.parametrize(("figure", "server"), [("p99", "nginx"), ("p50", "ours")])
def test_what_was_not_measured_has_no_median(figure: str, server: str) -> None:
    assert median({"p99": {"ours": [1.0]}}, figure, server) is None


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [([1, 1, 1], 0), ([1, 2, 3, 4, 5], 2), ([10, 10, 10, 10, 99], 0), ([1, 3], 1)],
    ids=["alike", "even", "one gone wrong", "two"],
)
def test_the_spread_is_the_middle_half(rounds: list[float], expected: float) -> None:
    assert spread(rounds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("row", "value", "expected"),
    [
        (CPU, 1.05, "goal"),
        (CPU, 1.054, "goal"),
        (CPU, 1.06, "reach"),
        (CPU, 1.25, "reach"),
        (CPU, 1.26, "**no**"),
        (RATE, 1.25, "goal"),
        (RATE, 1.10, "reach"),
        (RATE, 1.04, "**no**"),
    ],
)
def test_a_goal_is_met_or_not(row: Row, value: float, expected: str) -> None:
    best, worst = (1.25, 1.05) if row.more_is_better else (1.05, 1.25)
    assert Goal(row, worst, best).met(value) == expected


def figures(*, ours: list[float], nginx: list[float], figure: str = "cpu_per_gib") -> Any:
    return {figure: {"ours": ours, "nginx": nginx}}


@pytest.mark.parametrize(
    ("before", "now", "worse"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0], [1.02, 1.02, 1.02], False),
        ([1.0, 1.0, 1.0], [1.04, 1.04, 1.04], True),
        ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], False),
        ([0.9, 1.0, 1.1], [1.0, 1.1, 1.2], False),
        ([0.9, 1.0, 1.1], [1.2, 1.3, 1.4], True),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 9.0], False),
        ([1.0, 1.0], [9.0, 9.0], False),
    ],
    ids=["same", "within 3 %", "beyond", "better", "explained", "not explained", "one gone wrong", "too few rounds"],
)
@pytest.mark.parametrize("figure", ["cpu_per_gib", "rps_1m"])
def test_worse_is_what_the_rounds_do_not_explain(
    figure: str, before: list[float], now: list[float], worse: bool
) -> None:
    def found(ratios: list[float], speed: float) -> Any:
        more = FIGURES[figure].more_is_better
        # the machine's own speed is in both, and is none of the comparison's business
        return figures(
            figure=figure,
            ours=[speed / ratio if more else speed * ratio for ratio in ratios],
            nginx=[speed for _ in ratios],
        )

    rows = worse_than_before(found(now, 3.0), found(before, 1.0))
    assert [row.row.value for row in rows] == ([(figure, "ours")] if worse else [])


def results(found: Any, **changes: Any) -> dict[str, Any]:
    machine = {
        "date": "2026-01-02",
        "cpu": "A processor",
        "cores": 2,
        "memory": 8 << 30,
        "kernel": "Linux 6",
        "python": "CPython 3",
        "packages": {"starlette": "1.2.3"},
    }
    return {
        "machine": machine,
        "rounds": 3,
        "scale": asdict(FULL),
        "figures": found,
        "failures": [],
        "busy": 0.04,
    } | changes


GOOD, BAD = figures(ours=[1.0] * 3, nginx=[1.0] * 3), figures(ours=[2.0] * 3, nginx=[1.0] * 3)


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (results(GOOD), None, "no earlier run"),
        (results(GOOD), results(BAD, scale=asdict(QUICK)), "other sizes"),
        (results(GOOD, rounds=1), results(BAD), "3 rounds"),
        (results(GOOD), results(BAD), "No row is worse than in the run of 2026-01-02"),
        (
            results(BAD),
            results(GOOD),
            "| CPU per GiB, 1 GiB file, zero-copy, against nginx sendfile | 1.00 | 2.00 | 0.03 |",
        ),
        (
            results(BAD, scale=asdict(QUICK) | {"large_bytes": FULL.large_bytes}),
            results(GOOD),
            "| CPU per GiB, 1 GiB file, zero-copy, against nginx sendfile | 1.00 | 2.00 | 0.03 |",
        ),
    ],
)
def test_the_comparison_says_what_was_compared(now: Any, before: Any, expected: str) -> None:
    assert expected in comparison(now, before)


def test_every_goal_is_about_something_that_is_measured() -> None:
    for goal in GOALS:
        rows = [goal.row, goal.row.in_cpu, goal.floor]
        for figure, server in [pair for row in rows if row is not None for pair in row.pairs]:
            assert MEASURE_OF.get(figure, figure) in SERVERS[server].measures, (figure, server)


def test_every_measure_and_every_figure_belong_together() -> None:
    assert set(MEASURE_OF) <= set(FIGURES)
    assert {MEASURE_OF.get(figure, figure) for figure in FIGURES} == set(MEASURES)
    assert {measure for server in SERVERS.values() for measure in server.measures} == set(MEASURES)
    assert {name for figure in FIGURES.values() for name in figure.depends} <= set(asdict(FULL))


def test_the_goals_as_a_table() -> None:
    table = goals_table(figures(ours=[1.0, 1.1, 1.2], nginx=[1.0, 1.0, 1.0])).splitlines()
    assert len(table) == 2 + len(GOALS)
    measured = [line for line in table[2:] if not line.endswith("| not measured |")]
    title = "CPU per GiB, 1 GiB file, zero-copy, against nginx sendfile"
    assert measured == [f"| {title} | 1.10x (± 0.05) |  |  | ≤ 1.25x | ≤ 1.05x | reach |"]


def test_a_missed_goal_is_bold_and_has_the_ratio_of_cpu_times() -> None:
    found = {"rps_10k": {"serve": [100.0], "nginx": [1000.0]}, "cpu_10k": {"serve": [30e-6], "nginx": [10e-6]}}
    assert goals_table(found, PRODUCT).splitlines()[3] == (
        "| **10 KiB requests/s, against nginx** | **0.10x** | 3.00x |  | ≥ 0.4x | ≥ 0.6x | **no** |"
    )


@pytest.mark.parametrize(
    ("floor", "shown"),
    [
        ([0.5, 0.3, 0.2], "| 0.30x | ≥ 0.4x | ≥ 0.6x | **no**, nor by the floor |"),
        ([0.5, 0.3, 0.45], "| 0.45x | ≥ 0.4x | ≥ 0.6x | **no** |"),
    ],
)
def test_a_floor_that_misses_a_goal_is_told(floor: list[float], shown: str) -> None:
    found = {"rps_10k": {"serve": [0.1] * 3, "nginx": [1.0] * 3, "floor-answers": floor}}
    assert goals_table(found, PRODUCT).splitlines()[3].endswith(shown)


@pytest.mark.parametrize(
    ("without", "features", "expected"),
    [([5e-6], [15e-6], [2 / 3]), ([5e-6, 5e-6], [None, 5e-6], [1.0]), ([None], [5e-6], [])],
)
def test_what_features_leave_of_the_requests(without: list[Any], features: list[Any], expected: list[float]) -> None:
    found = {"cpu_10k": {"serve-quiet": [20e-6, 20e-6], "floor-answers": without, "floor-all": features}}
    assert Added("serve-quiet", "floor-answers", "floor-all").rounds(found) == pytest.approx(expected)


@pytest.mark.parametrize(("more", "value", "share"), [(True, 2.0, 0.5), (False, 2.0, 2.0), (False, 8.0, 0.5)])
def test_the_share_of_a_reach(more: bool, value: float, share: float) -> None:
    row = Row("row", ("rps_10k", "ours"), None, more_is_better=more)
    assert Goal(row, 4.0).share(value) == pytest.approx(share)


def test_figures_are_shown_in_their_units() -> None:
    found = {"p99": {"ours": [0.00125]}, "p50": {"ours": [0.0005], "nginx": [0.0001]}}
    assert figures_table(found, ["p50", "p99"], ["nginx", "ours", "aiohttp"]).splitlines()[2:] == [
        "| nginx, sendfile | 0.10 |  |",
        "| downloadview_async, zero-copy | 0.50 | 1.25 |",
    ]
    assert figures_table(found, ["rps_1m"], ["nginx"]) == ""


def test_growth_is_the_cost_of_a_request() -> None:
    found = {"rps_10k": {"rules-1": [1000, 1000], "rules-100": [1000, 1000], "rules-1000": [500, 500]}}
    assert growth_table(found).splitlines()[2:] == ["| offload rules of one application | 1.00x | 1.00x | 2.00x |"]


SMALL, MIDDLE, SLOW = LOADS
MEASURED = {
    "rps_10k": {"ours": [5000.0, 6000.0, 9000.0]},
    "rps_1m": {"ours": [1000.0]},
    "cpu_per_gib": {"ours": [0.25]},
    "rss_per_client": {"ours": [16 * 1024.0]},
    "descriptors_per_client": {"ours": [2.0]},
}
TWO_CORES = Machine(cores=2, network=100 * 2**20, memory=2**30, descriptors=1000)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (SMALL, {"cores": 12000, "network": 10240}),
        (MIDDLE, {"cores": 2000, "network": 100}),
        (SLOW, {"cores": 131072, "network": 1600, "memory": 65536, "descriptors": 1000}),
    ],
)
def test_what_each_resource_allows(load: Any, expected: dict[str, float]) -> None:
    assert limits(MEASURED, "ours", load, TWO_CORES) == pytest.approx(expected)


def test_what_was_not_measured_allows_nothing_and_limits_nothing() -> None:
    assert limits(MEASURED, "nginx", SMALL, TWO_CORES) == {}
    less = MEASURED | {"rss_per_client": {"ours": [-4096.0]}, "descriptors_per_client": {}}
    assert set(limits(less, "ours", SLOW, TWO_CORES)) == {"cores", "network"}
    assert core_table({"p99": {"ours": [1.0]}}) == example_table({}) == ""


def test_what_one_core_and_one_gib_hold() -> None:
    assert core_table(MEASURED).splitlines()[2:] == [
        "| downloadview_async, zero-copy | 6,000 | 1,000 | 4.00 | 65,536 | 32,768 |"
    ]


def test_the_first_resource_that_runs_out() -> None:
    lines = example_table(MEASURED, TWO_CORES).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == [
        "10,240 requests/s: network |",
        "100 requests/s: network |",
        "1,000 clients: descriptors |",
    ]
    assert limits(MEASURED, "ours", SMALL, EXAMPLE)["cores"] == 24000
    assert example_table(MEASURED).splitlines()[2].endswith("| 24,000 requests/s: cores |")


def test_the_page_has_the_machine_the_pictures_and_what_failed() -> None:
    text = page(results(GOOD, failures=["beside of nginx, round 1"]), "As before.", {"cpu_per_gib": "cpu.svg"})
    for part in [
        "A processor, 2 cores",
        "8 GiB",
        "4% of the processors",
        "starlette 1.2.3",
        "](cpu.svg)",
        "beside of nginx",
        "As before.",
    ]:
        assert part in text
    assert "10 KiB on one connection" not in text  # nothing was measured of it


def bars_of(svg: str) -> tuple[list[float], list[str]]:
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    widths = [float(bar.get("width", "0")) for bar in root.findall(f"{name}rect")[1:]]
    return widths, [text.text or "" for text in root.findall(f"{name}text")]


@pytest.mark.parametrize(
    ("values", "relative", "cut"),
    [
        ([4, 2, 1], [1, 0.5, 0.25], 0),
        ([100, 2, 1], [1, 0.8, 0.4], 1),
        ([100, 90, 1], [1, 0.9, 0.01], 0),
        ([3, 0], [1, 0], 0),
        ([0], [0], 0),
    ],
    ids=["in proportion", "one far above is cut", "two far above are not", "nothing", "nothing at all"],
)
def test_bars_are_in_proportion(values: list[float], relative: list[float], cut: int) -> None:
    svg = bar_chart("title", [Bar(f"server {value}", value, f"{value} ms") for value in values])
    widths, texts = bars_of(svg)
    full = max(widths) or 1
    assert [width / full for width in widths] == pytest.approx(relative, abs=0.002)
    assert [f"{value} ms" in texts for value in values] == [True] * len(values)
    assert svg.count("<path") == cut


def test_a_chart_escapes_its_texts() -> None:
    assert bars_of(bar_chart("<&>", [Bar('<"a">', 1, "1 & 2", highlighted=True)]))[1] == ["<&>", '<"a">', "1 & 2"]


def test_the_report_of_wrk_is_read() -> None:
    found = parse_wrk(WRK.format("  Socket errors: connect 0, read 0, write 0, timeout 0\n"))
    assert (found.rate, found.p50, found.p99) == pytest.approx((61258.92, 0.00025, 0.0015))


@pytest.mark.parametrize(
    "output",
    [
        WRK.format("  Non-2xx or 3xx responses: 17\n"),
        WRK.format("  Socket errors: connect 0, read 3, write 0, timeout 0\n"),
        WRK.format("").replace("61258.92", "0.00"),
        "unable to connect",
    ],
)
def test_a_load_with_failures_is_none(output: str) -> None:
    with pytest.raises(LoadError):
        parse_wrk(output)


def test_what_a_cache_saves_counts_hits_and_misses() -> None:
    count = Count(cache="a.cache", calls=10, hits=8, direct=5e-6, hit=1e-6, miss=6e-6)
    assert count.saving(requests=10) == pytest.approx(3e-6)
    assert count.saving(requests=20) == pytest.approx(1.5e-6)
    costly = Count(cache="a.useless", calls=10, hits=0, direct=1e-6, hit=1e-7, miss=3e-6)
    table = caches_section("A server", visits=3, requests=10, programs={"wget", "curl"}, counts=[costly, count, count])
    assert table.splitlines()[2:3] + table.splitlines()[6:] == [
        "10 requests of 3 visits, and of curl, wget.",
        "| `a.cache` | 20 | 16 | 80.0% | 5.00 | 1.00 | 6.00 | 6.00 |",
        "| `a.useless` | 10 | 0 | 0.0% | 1.00 | 0.10 | 3.00 | -2.00 |",
    ]


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("downloadview_async/asgi/uvicorn/protocol.py", "the connection and its head"),
        (".venv/lib/python3.11/site-packages/uvicorn/server.py", "the connection and its head"),
        ("downloadview_async/asgi/kept_answers.py", "the answer that is kept"),
        ("downloadview_async/asgi/accounts.py", "outcome, log and metrics"),
        ("downloadview_async/asgi/response.py", "the application"),
        ("lib/python3.11/site-packages/starlette/routing.py", "the application"),
        ("lib/python3.11/site-packages/downloadview_async/sources/base.py", "the file"),
        ("downloadview_async/downloadview_async/policy/grants.py", "access and limits"),
        ("lib/python3.11/contextlib.py", "Python and its libraries"),
        ("<string>", "Python and its libraries"),
    ],
)
def test_each_function_is_of_one_part_of_a_request(file: str, part: str) -> None:
    assert part_of(f"/somewhere/{file}" if file[0] != "<" else file) == part


def test_the_calls_of_a_request_are_counted(tmp_path: Path) -> None:
    (tmp_path / "10k.bin").write_bytes(bytes(10 << 10))
    os.utime(tmp_path / "10k.bin", (1.7e9, 1.7e9))
    calls = count_calls(CASES[0], tmp_path, tmp_path / "scratch", 20)
    assert calls["system calls among them"] == 2  # stat and preadv
    assert set(calls) <= {*PARTS, "C functions", "system calls among them"}
    assert min(calls[part] for part in ("the answer that is kept", "the file", "outcome, log and metrics")) >= 3
    assert sum(calls.values()) < 150
    line = calls_table([("10 KiB", calls)]).splitlines()[-1].split(" | ")
    assert (line[0], line[-1]) == ("| 10 KiB", "2.0 |")
    assert int(line[1]) == round(sum(calls.values()) - 2)


def test_a_plan_is_compared_with_what_replicas_have_used() -> None:
    costs = load_costs()
    row = {
        "kind": "quota of downloads, 20 kB, streamed",
        "replicas": 2,
        "requests": 1000,
        "bytes": 20_000_000,
        "seconds": 2.0,
        "replica_cpu": 1.0,
        "front_cpu": 9.0,
        "redis_cpu": 1000 * costs.of("shared-limits", "redis_ops") * costs.of("shared-limits", "redis_cpu"),
    }
    cpu, redis = compare([row, row | {"kind": "of another kind"}], costs)
    assert (cpu.number, cpu.measured) == ("CPU ms", 1.0)
    assert redis.off == pytest.approx(0)
    (other,) = compare([row | {"kind": "files, 1 MB, by nginx"}], costs)
    assert other.measured == 10.0
    far = Compared("a kind", 3, "CPU ms", 1.5, 1.0)
    assert plan_table([redis, far]).splitlines()[2:] == [
        f"| {redis.kind} | 2 | Redis CPU ms | {redis.planned:.3g} | {redis.measured:.3g} | +0% |",
        "| a kind | 3 | CPU ms | 1.5 | 1 | **+50%** |",
    ]


@pytest.mark.parametrize(
    ("factors", "status"), [([1, 1, 1.9], 0), ([1, 1, 2.1], 1), ([1, 1, 1 / 1.9], 0), ([1, 1, 1 / 2.1], 1), ([1.5], 1)]
)
def test_a_plan_is_close_if_the_median_row_and_the_worst_are(
    factors: list[float], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = load_costs().of("serve-proxied", "cpu_shared") + load_costs().of("serve-accounts", "cpu_shared")
    cpu -= load_costs().of("serve", "cpu_shared")
    row = {"kind": "files, 0 kB, streamed", "replicas": 1, "requests": 1000, "bytes": 0, "seconds": 2.0}
    rows = [row | {"replica_cpu": cpu * 1000 * factor, "front_cpu": 0.0} for factor in factors]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert plan_check([str(tmp_path / "rows.json")]) == status
    worst = max(max(factor, 1 / factor) for factor in factors)
    assert f"the worst row is {worst:.1f} times too much or too little" in capsys.readouterr().out


def test_clients_of_the_cluster_connect_anew_to_nginx_which_keeps_its_connections() -> None:
    costs = load_costs()
    row = {"replicas": 1, "requests": 1000, "bytes": 0, "seconds": 2.0, "replica_cpu": 1.0, "front_cpu": 1.0}
    kinds = ["files, 0 kB, by nginx", "files, 0 kB, streamed"]
    by_nginx, streamed = compare([row | {"kind": kind} for kind in kinds], costs)
    counted = costs.of("serve-accounts", "cpu_shared") - costs.of("serve", "cpu_shared")
    assert by_nginx.planned == pytest.approx((costs.of("serve-nginx", "cpu_connect") + counted) * 1e3)
    assert streamed.planned == pytest.approx((costs.of("serve-proxied", "cpu_shared") + counted) * 1e3)


@pytest.mark.parametrize("lacks", [True, False])
def test_costs_are_written_only_if_they_are_complete(lacks: bool, tmp_path: Path) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for row, figure in sorted(SHOWN)[lacks:]:
        found.setdefault(figure, {})[row] = [0.123456, 0.2, 0.1]
    lacking = write_costs(results(found), tmp_path / "costs.json")
    assert len(lacking) == lacks
    assert (tmp_path / "costs.json").exists() != lacks
    if not lacks:
        costs = load_costs(tmp_path / "costs.json")
        assert costs.of("serve", "idle") == 0.1235
        assert costs.run["machine"] == "A processor, 2 cores, 8 GiB"
        some = results({"idle": {"serve": [0.5]}})
        assert write_costs(some, tmp_path / "costs.json", renews_some=True) == []
        renewed = load_costs(tmp_path / "costs.json")
        assert (renewed.of("serve", "idle"), renewed.of("serve", "cpu_10k")) == (0.5, 0.1235)


def test_the_page_of_the_costs_is_that_of_the_costs() -> None:
    costs = load_costs()
    assert PAGE.read_text() == costs_page(costs)  # nobody has edited the one or the other
    assert {(row, figure) for row, values in costs.figures.items() for figure in values} == SHOWN


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [["--only", "speed"], ["--servers", "nginx,apache"], ["--rounds", "0"]])
def test_unknown_names_are_refused(arguments: list[str]) -> None:
    refused = run(*arguments)
    assert refused.returncode == 2
    assert arguments[0] in refused.stderr


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    if wrk_program() is None:
        pytest.skip("wrk is not installed; apt-get install wrk")
    selection = ["--servers", "nginx,ours,starlette", "--only", "rps_10k,large,stalled"]
    done = run("--quick", *selection, "--output", tmp_path, "--scratch", tmp_path, "--before", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["failures"] == []
    figures = written["figures"]
    expected = {
        "rps_10k",
        "cpu_10k",
        "cpu_per_gib",
        "peak_growth",
        "first_byte",
        "rss_per_client",
        "descriptors_per_client",
    }
    assert set(figures) == expected
    for figure in expected:
        assert set(figures[figure]) == {"nginx", "ours", "starlette"}
        assert all(len(rounds) == 1 for rounds in figures[figure].values())
    for figure in expected - {"peak_growth"}:
        assert all(rounds[0] > 0 for rounds in figures[figure].values())
    assert figures["descriptors_per_client"]["nginx"] == [2.0]
    text = (tmp_path / "results.md").read_text()
    assert text in done.stdout
    assert "## What one machine holds" in text
    for picture in ["rps-10k.svg", "cpu-per-gib.svg", "rss-per-client.svg"]:
        assert picture in text
        assert "nginx, sendfile" in bars_of((tmp_path / picture).read_text())[1]
