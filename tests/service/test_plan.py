"""`downloadview plan`: the arithmetic as tables, the command from outside, and the costs that come with the package."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from downloadview_async import ConfigurationError
from downloadview_async.cli import main
from downloadview_async.service.plan.amounts import count_of, rate_of, size_of
from downloadview_async.service.plan.costs import MEASURED, Costs, load_costs, written
from downloadview_async.service.plan.model import NEEDED, WAYS, Load, Machine, plan
from downloadview_async.service.plan.page import text_of

GIB = 1 << 30
ROUND = {
    "cpu_connect": 200e-6,
    "cpu_per_gib_paced": 0.5,
    "cpu_per_gib_fill": 4.0,
    "rss_per_client": 10_000.0,
    "descriptors_per_client": 2.0,
    "idle": 50e6,
    "cpu_shared": 100e-6,
    "redis_ops": 4.0,
    "redis_cpu": 20e-6,
    "redis_memory": 500.0,
}
FIGURES = {row: {figure: ROUND[figure] for other, figure in NEEDED if other == row} for row, _ in NEEDED}
for _row, _factor in {
    "serve-tls": 3,
    "nginx-tls": 2,
    "shared-both": 3,
    "shared-links": 2,
    "serve-accounts": 1.5,
}.items():
    FIGURES[_row] = {figure: value * _factor for figure, value in FIGURES[_row].items()}
FIGURES["shared-both"] |= {"redis_ops": 7.0, "redis_cpu": 20e-6}
COSTS = Costs(run={"date": "2026-01-02"}, figures=FIGURES)
MACHINE = Machine(cores=4, memory=16e9, network=1.25e9, descriptors=65_536, use=0.5)


def load(**changes: Any) -> Load:
    usual: dict[str, Any] = {
        "send": "zero-copy",
        "clients": 1000.0,
        "requests": 100.0,
        "size": float(GIB),
        "kept": True,
    }
    return Load(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 100 * 100e-6 + 100 * 0.5),
        ({"kept": False}, 100 * 200e-6 + 100 * 0.5),
        ({"tls": True}, 100 * 300e-6 + 100 * 1.5),
        ({"send": "nginx", "tls": True}, 100 * 400e-6 + 100 * 1.0),
        ({"send": "nginx", "tls": True, "kept": False}, 100 * 400e-6 + 100 * 1.0),
        ({"send": "cache", "hit_ratio": 0.9}, 100 * 100e-6 + 90 * 0.5 + 10 * 4.0),
        ({"send": "redirect"}, 100 * 100e-6),
        ({"send": "redirect", "links": True}, 100 * 100e-6 + 100 * 100e-6),
        ({"links": True, "limits": True}, 100 * 100e-6 + 100 * 0.5 + 100 * 200e-6),
        ({"completions": True}, 100 * 100e-6 + 100 * 0.5 + 100 * 50e-6),
    ],
)
def test_the_cpu_of_a_load(changes: dict[str, Any], seconds: float) -> None:
    made = plan(load(**changes), MACHINE, COSTS)
    (need,) = [need for need in made.needs if need.resource == "CPU"]
    assert need.amount == pytest.approx(seconds)
    assert need.has == 2.0


@pytest.mark.parametrize(
    ("changes", "resource", "machines"),
    [
        ({"size": 1e6}, "network", 100 * 1e6 / (1.25e9 * 0.5)),
        ({"size": 10.0, "requests": 5e5, "clients": 1.0}, "CPU", 5e5 * 100e-6 / 2),
        ({"size": 1e6, "requests": 1.0, "clients": 2e6}, "memory", 2e6 * 10_000 / (8e9 - 4 * 50e6)),
    ],
)
def test_what_runs_out_first(changes: dict[str, Any], resource: str, machines: float) -> None:
    made = plan(load(**changes), replace(MACHINE, descriptors=10**7), COSTS, spare=2)
    assert made.needs[0].resource == resource
    assert made.needs[0].machines == pytest.approx(machines, rel=1e-3)
    assert made.machines == made.for_load + 2


def test_descriptors_run_out_first_where_few_are_allowed() -> None:
    made = plan(
        load(size=1e5, requests=10.0), Machine(cores=1, memory=16e9, network=1e9, descriptors=100, use=1), COSTS
    )
    assert made.needs[0].resource == "descriptors"
    assert made.needs[0].machines == pytest.approx(1000 * 2 / 100)


@pytest.mark.parametrize(("send", "seconds", "kept_saves"), [("zero-copy", 5, 100 * 5 * 10_000), ("nginx", 30, 0)])
def test_connections_that_wait_for_another_request_are_held_too(send: str, seconds: int, kept_saves: float) -> None:
    memory = {
        kept: next(
            need for need in plan(load(kept=kept, send=send), MACHINE, COSTS).needs if need.resource == "memory"
        ).amount
        for kept in (True, False)
    }
    assert memory[False] - memory[True] == pytest.approx(kept_saves)
    assert memory[False] == pytest.approx((1000 + 100 * seconds) * 10_000)


@pytest.mark.parametrize(
    ("changes", "operations", "requests", "sent"),
    [
        ({}, 0, 0, 0),
        ({"limits": True}, 400, 0, 0),
        ({"links": True, "limits": True}, 700, 0, 0),
        ({"send": "cache", "hit_ratio": 0.9}, 0, 10, 10 * GIB),
        ({"send": "remote"}, 0, 100, 100 * GIB),
        ({"send": "redirect"}, 0, 100, 100 * GIB),
    ],
)
def test_what_all_machines_share(changes: dict[str, Any], operations: float, requests: float, sent: float) -> None:
    shared = plan(load(**changes), MACHINE, COSTS).shared
    assert sum(term.amount * term.cost for term in shared.redis_operations) == pytest.approx(operations)
    assert (shared.store_requests, shared.store_bytes) == pytest.approx((requests, sent))


def test_advice_names_the_load_up_to_which_one_redis_is_enough() -> None:
    made = plan(load(requests=20_000.0, size=1.0, limits=True), MACHINE, COSTS)
    assert made.shared.redis_share == pytest.approx(20_000 * 4 * 20e-6)
    assert made.advice[0].startswith("One Redis is enough up to 6,250 requests/s")


def test_upstream_requests_of_a_worker_are_told() -> None:
    made = plan(load(send="remote", clients=8000.0, size=1e5), MACHINE, COSTS)
    assert "Each worker has 2,000 upstream requests at once" in made.advice[0]


def test_workers_that_do_not_fit_into_the_memory_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="give more --memory, a larger --use or fewer --cores"):
        plan(load(), Machine(cores=64, memory=1e9, network=1e9, descriptors=100, use=1), COSTS)
    with pytest.raises(ConfigurationError, match="a larger --use"):
        plan(load(), Machine(cores=4, memory=16e9, network=1e9, descriptors=100, use=0.01), COSTS)


def test_the_text_has_the_formula_and_where_it_was_measured() -> None:
    text = text_of(plan(load(size=1e6), MACHINE, COSTS, spare=1), COSTS)
    assert "Machines: 2: 1 for the load, 1 to spare" in text
    assert "First bottleneck: network (0.2 machines), then CPU" in text
    assert "100 requests/s x 100 µs (serve-proxied cpu_shared)" in text
    assert "Measured: date 2026-01-02" in text


@pytest.mark.parametrize(
    ("function", "text", "value"),
    [
        (count_of, "100k", 1e5),
        (count_of, "2.5M", 2.5e6),
        (partial(count_of, per_second=True), "2000/s", 2000),
        (partial(count_of, per_second=True), "2000", 2000),
        (rate_of, "2MB/s", 2e6),
        (rate_of, "10Gbit/s", 1.25e9),
        (rate_of, "64KiB/s", 65536),
        (size_of, "100MB", 1e8),
    ],
)
def test_amounts(function: Any, text: str, value: float) -> None:
    assert function("--option", text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        *((count_of, text) for text in ["", "0", "-5", "many", "1e5", "5x", "١٢", "100k/s"]),
        *((rate_of, text) for text in ["2MB", "0MB/s", "2 apples/s", "MB/s", "inf/s"]),
        *((size_of, text) for text in ["", "0", "10 apples", "-1"]),
    ],
)
def test_other_amounts_are_refused_with_what_to_write(function: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--option is .*: give a .* above 0, such as"):
        function("--option", text)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


@pytest.mark.parametrize("send", WAYS)
@pytest.mark.parametrize(
    "options", [[], ["--tls", "--links", "--limits", "--completions"]], ids=["plain", "everything"]
)
def test_each_way_has_a_plan_by_the_costs_of_the_package(send: str, options: tuple[str, ...]) -> None:
    done = run("--clients", "100k", "--send", send, *options, "--format", "json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.output)
    assert values["machines"] == values["machines_for_load"] + 1
    assert values["clients"] == 100_000
    assert values["resources"][values["first_bottleneck"]]["machines"] > values["machines_for_load"] - 1
    assert bool(options) == bool(values["redis"]["operations_per_second"])


def test_clients_and_requests_are_two_ways_to_say_the_same() -> None:
    clients = run("--clients", "100k", "--rate", "2MB/s", "--file-size", "100MB", "--hit-ratio", "0.9")
    assert clients.exit_code == 0, clients.output
    assert clients.output == run("--requests", "2000", "--hit-ratio", "0.9").output
    assert "90% of the bytes from the cache" in clients.output
    assert "Store: 200 requests/s" in clients.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --clients, the downloads at once, and --requests, those of a second"),
        (["--clients", "1", "--requests", "1"], "give one of --clients"),
        (["--clients", "many"], "--clients is 'many': give a number above 0"),
        (["--clients", "1", "--rate", "fast"], "--rate is 'fast': give a rate above 0"),
        (["--clients", "1", "--file-size", "0"], "--file-size is '0': give a size above 0"),
        (["--clients", "1", "--memory", "1MB"], "4 workers need"),
        (["--clients", "1", "--network", "10"], "--network is '10': give a rate above 0"),
        (["--clients", "1", "--send", "nginx", "--hit-ratio", "0.9"], "--hit-ratio is for --send cache"),
        (["--clients", "1", "--hit-ratio", "2"], "2.0 is not in the range 0<=x<=1"),
        (["--clients", "1", "--hit-ratio", "nan"], "Invalid value for '--hit-ratio': nan is not a finite number"),
        (["--clients", "1", "--hit-ratio", "inf"], "inf is not in the range 0<=x<=1"),
        (["--clients", "1", "--use", "nan"], "Invalid value for '--use': nan is not a finite number"),
        (["--clients", "1", "--use", "-nan"], "-nan is not a finite number"),
        (["--clients", "1", "--use", "inf"], "inf is not in the range 0<x<=1"),
        (["--clients", "1", "--use", "0.01"], "give more --memory, a larger --use or fewer --cores"),
        (["--clients", "100k/s"], "--clients is '100k/s': give a number above 0"),
        (["--clients", "1", "--costs", "none.json"], "'none.json' cannot be read: No such file or directory"),
    ],
)
def test_bad_input_gives_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output.splitlines()[-1]
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["check", "reload"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_timeout_has_to_be_finite(command: str, number: str) -> None:
    done = CliRunner().invoke(main, [command, "--timeout", number])
    assert done.exit_code == 2
    assert f"Invalid value for '--timeout': {number} is not a finite number" in done.output.splitlines()[-1]


def test_nginx_has_new_connections_of_clients_whatever_it_keeps() -> None:
    text = run("--requests", "2000/s", "--send", "nginx", "--tls", "--kept").output
    assert text == run("--requests", "2000", "--send", "nginx", "--tls").output
    assert "Each download has a new connection" in text


def test_other_costs_have_to_be_complete(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_bytes(written(COSTS.run, {"serve": {"cpu_connect": 1e-4}}))
    assert "the costs have no cpu_per_gib_paced of serve" in run("--clients", "1", "--costs", str(file)).output
    file.write_text("{}")
    assert "does not have costs that `make costs` has written" in run("--clients", "1", "--costs", str(file)).output


def test_the_costs_of_the_package_are_complete_and_name_no_path() -> None:
    costs = load_costs()
    assert [pair for pair in NEEDED if pair[1] not in costs.figures.get(pair[0], {})] == []
    assert MEASURED.read_bytes() == written(costs.run, costs.figures)
    assert "/" not in "".join(costs.run.values())
