"""The dashboard and the alert rules ask for metrics and labels that the service gives.

Where `promtool` is installed, Prometheus' own parser reads all of them, and the page `/-/metrics`.
"""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from downloadview_async import Cache, Download, Limits, Metrics, PathSource, URLSigner
from downloadview_async.sources.workers import Slots
from downloadview_async.testing import call
from tests.accounts.test_log import outcome

DIRECTORY = Path(__file__).parents[2] / "deploy/grafana"
DASHBOARD = json.loads((DIRECTORY / "dashboard.json").read_text())
RULES = yaml.safe_load((DIRECTORY / "alerts.yml").read_text())
_OF_PROMETHEUS = {"job", "instance"}
_SELECTOR = re.compile(r"(downloadview_\w+)(?:{([^}]*)})?")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")


def grouped_by(expression: str) -> list[set[str]]:
    """Return the labels of each `by` in an expression."""
    return [{label.strip() for label in labels.split(",")} for labels in _GROUPED.findall(expression)]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the name and the expression of each panel and each rule."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the text of metrics in which each metric has a sample."""
    directory = tmp_path_factory.mktemp("metrics")
    metrics = Metrics()

    class Remote:
        slots = Slots(1, are_connections=True)

    metrics.add_source("files", PathSource(directory))
    metrics.add_source("remote", Remote())
    metrics.add_cache("remote", Cache(directory / "cache"))
    limits = Limits(requests="1/minute")
    metrics.add_limits("all", limits)
    signer = URLSigner({"k": "s" * 32})
    metrics.add_links(signer)
    for result in ({}, {"result": "refused", "status": 404}, {"result": "aborted", "reason": "stalled"}):
        metrics.observe(outcome(**result))

    async def render() -> bytes:
        app = Download(PathSource(directory), limits=limits)
        assert [(await call(app, "/none")).status for _ in range(2)] == [404, 429]
        with pytest.raises(Exception, match="link"):
            await signer.verify({"method": "GET", "path": "/a", "query_string": b"sig=x"})
        return (await metrics.render())[0]

    return asyncio.run(render()).decode()


@pytest.fixture(scope="module")
def known(page: str) -> dict[str, set[str]]:
    """Return the labels of each series."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        assert family.samples, f"{family.name} has no sample here, so nothing is known of its labels"
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize("name, expression", [*expressions()])
def test_metrics_and_labels_exist(known: dict[str, set[str]], name: str, expression: str) -> None:
    selected = list(_SELECTOR.finditer(expression))
    assert selected
    of_all = set.intersection(*(known[match[1]] for match in selected)) | _OF_PROMETHEUS
    for match in selected:
        matchers = dict(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', match[2] or ""))
        assert matchers.keys() <= known[match[1]] | _OF_PROMETHEUS
    assert all(labels <= of_all for labels in grouped_by(expression))


def test_each_metric_is_on_the_dashboard(known: dict[str, set[str]]) -> None:
    shown = {match[1] for _, expression in expressions() for match in _SELECTOR.finditer(expression)}
    left_out = {name for name in known if not name.endswith(("_created", "_sum", "_count"))} - shown
    assert not left_out


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel.get("targets", ()):
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert any(label in labels for labels in grouped_by(target["expr"])), panel["title"]
    places = [panel["gridPos"] for panel in panels]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_annotations_name_labels_of_their_rule() -> None:
    for group in RULES["groups"]:
        for rule in group["rules"]:
            first, *_ = grouped_by(rule["expr"])
            assert {*re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))} <= first, rule["alert"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_reads_the_rules_the_queries_and_the_page(page: str, tmp_path: Path) -> None:
    def check(*arguments: str | Path, **options: Any) -> None:
        done = subprocess.run(["promtool", "check", *arguments], capture_output=True, text=True, timeout=60, **options)
        assert done.returncode == 0, done.stdout + done.stderr

    check("rules", DIRECTORY / "alerts.yml")
    queries = [text.replace("$__rate_interval", "5m").replace("$job", ".+") for _, text in expressions()]
    rules = [{"record": f"query_{number}", "expr": text} for number, text in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    check("rules", tmp_path / "queries.yml")
    check("metrics", input=page)
