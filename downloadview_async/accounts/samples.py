"""All metrics, and their samples as plain numbers: counted in a process, added up over processes, and as text."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric. how: a gauge is the sum over all processes, or the highest of them. buckets: of a histogram."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    how: Literal["sum", "max"] = "sum"
    buckets: tuple[float, ...] = ()


_ANSWER = ("route", "source", "kind", "status", "result")
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0)
LAGS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)

METRICS: Mapping[str, Metric] = {
    "requests": Metric(kind="counter", help="Answers that have ended.", labels=_ANSWER),
    "sent_bytes": Metric(kind="counter", help="Bytes of bodies that have left the process.", labels=_ANSWER),
    "aborted": Metric(
        kind="counter", help="Answers that are incomplete, by the reason.", labels=("route", "source", "reason")
    ),
    "refused": Metric(
        kind="counter", help="Answers with a status of 400 or more; limits give 429.", labels=("route", "code")
    ),
    "request_seconds": Metric(
        kind="histogram", help="Seconds from a request to the end of its answer.", labels=("route",), buckets=SECONDS
    ),
    "first_byte_seconds": Metric(
        kind="histogram", help="Seconds from a request to the head of its answer.", labels=("route",), buckets=SECONDS
    ),
    "requests_in_progress": Metric(kind="gauge", help="Requests whose answers have not ended."),
    "source_in_use": Metric(
        kind="gauge", help="Threads or upstream connections of a source that are in use.", labels=("source",)
    ),
    "source_waiting": Metric(
        kind="gauge", help="Requests that wait for a thread or a connection of a source.", labels=("source",)
    ),
    "source_waits": Metric(
        kind="counter", help="Requests that had to wait for a thread or a connection.", labels=("source",)
    ),
    "source_wait_seconds": Metric(kind="counter", help="Seconds that these have waited.", labels=("source",)),
    "source_refusals": Metric(
        kind="counter", help="Requests that got 503, because they had to wait too long.", labels=("source",)
    ),
    "upstream_connections": Metric(
        kind="gauge", help="Requests to other servers and object stores that are running.", labels=("source",)
    ),
    "cache_hits": Metric(kind="counter", help="Requests served without asking the source.", labels=("source",)),
    "cache_misses": Metric(kind="counter", help="Requests for a file that was not in the cache.", labels=("source",)),
    "cache_revalidated": Metric(
        kind="counter", help="Requests for which the source was asked whether a file is current.", labels=("source",)
    ),
    "cache_passed": Metric(kind="counter", help="Requests that the source answered itself.", labels=("source",)),
    "cache_evictions": Metric(kind="counter", help="Files removed to make room.", labels=("source",)),
    "cache_bytes": Metric(kind="gauge", help="Bytes of the files in the cache.", labels=("source",), how="max"),
    "cache_limit_bytes": Metric(kind="gauge", help="Bytes that the cache may take.", labels=("source",), how="max"),
    "links": Metric(
        kind="counter",
        help="Links: verified, refused, used (a request counted), used-up, store-failed.",
        labels=("event",),
    ),
    "limits_hit": Metric(
        kind="counter", help="Requests that a limit has refused, with 429.", labels=("limits", "limit")
    ),
    "limits_uncounted": Metric(
        kind="counter", help="Requests that were allowed although the store of limits did not answer."
    ),
    "open_descriptors": Metric(kind="gauge", help="Open file descriptors."),
    "descriptors_limit": Metric(kind="gauge", help="File descriptors that one process may open.", how="max"),
    "event_loop_lag_seconds": Metric(
        kind="histogram", help="Seconds by which a timer of the event loop was late.", buckets=LAGS
    ),
    "processes": Metric(kind="gauge", help="Processes that count."),
}
"""The metrics by their names, without `downloadview_` and, for counters, `_total`."""

Labels = tuple[str, ...]
Value = float | list[float]
"""A number. For a histogram: how many values are in each bucket, then how many are above all, then their sum."""

Samples = dict[str, dict[Labels, Value]]
"""The samples of each metric, by the values of its labels."""


class Histogram:
    """Counts values in buckets."""

    __slots__ = ("_bounds", "values")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.values: list[float] = [0.0] * (len(bounds) + 2)

    def add(self, value: float) -> None:
        """Count a value."""
        self.add_all((value,))

    def add_all(self, added: Iterable[float]) -> None:
        """Count many values, which takes hardly longer than one."""
        ordered, counted, values = sorted(added), 0, self.values
        for number, bound in enumerate(self._bounds):
            up_to = bisect_right(ordered, bound, counted)
            values[number] += up_to - counted
            counted = up_to
        values[len(self._bounds)] += len(ordered) - counted
        values[-1] += sum(ordered)


def added(each: Iterable[Samples], *, are_ended: bool = False) -> Samples:
    """Return samples that are added up. are_ended: leave out gauges, which end with their process."""
    total: Samples = {}
    for samples in each:
        for name, values in samples.items():
            metric = METRICS.get(name)
            if metric is None or (are_ended and metric.kind == "gauge"):
                continue
            into = total.setdefault(name, {})
            for labels, value in values.items():
                before = into.get(labels)
                into[labels] = value if before is None else _added(metric, before, value)
    return total


def _added(metric: Metric, first: Value, second: Value) -> Value:
    if isinstance(first, list) or isinstance(second, list):
        assert isinstance(first, list)
        assert isinstance(second, list)
        return [one + other for one, other in zip(first, second, strict=True)]
    return max(first, second) if metric.how == "max" else first + second


def encoded(samples: Samples) -> Any:
    """Return samples as JSON can have them."""
    return {name: [[*labels, value] for labels, value in values.items()] for name, values in samples.items()}


def decoded(data: Any) -> Samples:
    """Return what was `encoded`. Leave out what another version of the library has written differently."""
    return {
        name: {tuple(row[:-1]): row[-1] for row in rows if _is_row(row, METRICS[name])}
        for name, rows in (data.items() if isinstance(data, dict) else ())
        if name in METRICS and isinstance(rows, list)
    }


def _is_row(row: Any, metric: Metric) -> bool:
    """Return whether a row has a value for each label, and then a value of the metric."""
    if not isinstance(row, list) or len(row) != len(metric.labels) + 1:
        return False
    *labels, value = row
    length = len(metric.buckets) + 2 if metric.kind == "histogram" else None
    numbers = [value] if length is None else value
    return (
        isinstance(numbers, list)
        and len(numbers) == (length or 1)
        and all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(label, str) for label in labels)
    )


def families(samples: Samples) -> Iterator[Any]:
    """Yield the metric families of prometheus_client for samples."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    family: Any
    for name, metric in METRICS.items():
        full = f"downloadview_{name}"
        if metric.kind == "histogram":
            family = HistogramMetricFamily(full, metric.help, labels=metric.labels)
        else:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(full, metric.help, labels=metric.labels)
        for labels, value in sorted(samples.get(name, {}).items()):
            if isinstance(value, list):
                family.add_metric(labels, buckets=_cumulated(metric.buckets, value), sum_value=value[-1])
            else:
                family.add_metric(labels, value)
        yield family


def _cumulated(bounds: tuple[float, ...], values: list[float]) -> list[tuple[str, float]]:
    total, buckets = 0.0, []
    for bound, value in zip((*map(str, bounds), "+Inf"), values, strict=False):
        total += value
        buckets.append((bound, total))
    return buckets
