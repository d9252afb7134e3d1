"""What is wanted of the product and of the library: rows of the benchmark, and what they have to reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.measures import FIGURES

Rounds = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Figure, server, and what each round measured in base units; None where a round failed."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of a server, as a multiple of another one of the same round; without `base`, in the figure's unit."""

    title: str
    value: tuple[str, str]
    """A figure and a server."""
    base: tuple[str, str] | None
    more_is_better: bool

    def rounds(self, measured: Rounds) -> list[float]:
        """Return the row in each round that has both numbers: neighbours in time are compared."""
        values = measured.get(self.value[0], {}).get(self.value[1], [])
        if self.base is None:
            unit = FIGURES[self.value[0]].unit
            return [value / unit for value in values if value is not None]
        bases = measured.get(self.base[0], {}).get(self.base[1], [])
        return [value / base for value, base in zip(values, bases, strict=False) if value is not None and base]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The figures and servers that this needs."""
        return [pair for pair in (self.value, self.base) if pair is not None]

    @property
    def in_cpu(self) -> "Row | None":
        """The same in CPU seconds of a request, if this is about requests per second: other work disturbs it less."""
        figure = _IN_CPU.get(self.value[0])
        if figure is None or self.base is None or self.value[0] != self.base[0] or not self.more_is_better:
            return None
        return Row(self.title, (figure, self.value[1]), (figure, self.base[1]), more_is_better=False)


@dataclass(frozen=True, slots=True)
class Added:
    """What features leave of the requests per second of a server if they cost what they do in the least program."""

    server: str
    without: str
    """The least program without the features."""
    features: str
    """The least program with them."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The figures and servers that this needs."""
        return [("cpu_10k", server) for server in (self.server, self.without, self.features)]

    def rounds(self, measured: Rounds) -> list[float]:
        """Return the ratio of each round that has all three numbers."""
        columns = [measured.get(figure, {}).get(server, []) for figure, server in self.pairs]
        ratios = []
        for base, without, features in zip(*columns, strict=False):
            if base is not None and without is not None and features is not None:
                ratios.append(base / (base + features - without))
        return ratios


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row has to reach, and what it should, if that is more.

    floor: the same row of the least program that does it in Python. If that misses the reach, nothing in Python has it.
    """

    row: Row
    reach: float
    goal: float | None = None
    floor: Row | Added | None = None

    def met(self, value: float) -> str:
        """Return which of the two a value meets, at the two digits that are shown."""
        value = round(value, 2)

        def reaches(limit: float | None) -> bool:
            return limit is not None and (value >= limit if self.row.more_is_better else value <= limit)

        return "goal" if reaches(self.goal) else "reach" if reaches(self.reach) else "**no**"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The figures and servers that this needs."""
        return self.row.pairs + (self.floor.pairs if self.floor is not None else [])

    def share(self, value: float) -> float:
        """Return how much of the reach a value has; 1 and more reaches it."""
        if self.row.more_is_better:
            return value / self.reach
        return self.reach / value if value > 0 else 1.0

    def show(self, limit: float | None) -> str:
        """Return a limit as it is shown."""
        if limit is None:
            return ""
        sign = "≥" if self.row.more_is_better else "≤"
        return f"{sign} {limit:,g}{'x' if self.row.base else ''}"


def _at_most(
    title: str,
    value: tuple[str, str],
    base: tuple[str, str] | None,
    reach: float,
    goal: float | None = None,
    floor: str | Added | None = None,
) -> Goal:
    row = Row(title, value, base, more_is_better=False)
    least = replace(row, value=(value[0], floor)) if isinstance(floor, str) else floor
    return Goal(row, reach, goal, least)


def _at_least(
    title: str,
    value: tuple[str, str],
    base: tuple[str, str] | None,
    reach: float,
    goal: float | None = None,
    floor: str | Added | None = None,
) -> Goal:
    row = Row(title, value, base, more_is_better=True)
    least = replace(row, value=(value[0], floor)) if isinstance(floor, str) else floor
    return Goal(row, reach, goal, least)


_SENDFILE = "floor-sendfile"
_IN_CPU = {"rps_10k": "cpu_10k", "rps_1m": "cpu_1m"}


def _ratio(figure: str, server: str, base: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (figure, server), (figure, base)


PRODUCT = [
    _at_least("10 KiB requests/s, against a Response from memory", *_ratio("rps_10k", "serve", "memory"), 0.95, 1.3),
    _at_least("10 KiB requests/s, against nginx", *_ratio("rps_10k", "serve", "nginx"), 0.4, 0.6, "floor-answers"),
    _at_most(
        "CPU of an offloaded answer, against a bare Response",
        *_ratio("cpu_10k", "serve-offload", "bare-header-stock"),
        1.1,
        0.9,
    ),
    _at_most("CPU per GiB, 1 client, against nginx", *_ratio("cpu_per_gib", "serve", "nginx"), 1.0, 0.7, _SENDFILE),
    _at_most("CPU per GiB, 4 clients, against nginx", *_ratio("cpu_per_gib_4", "serve", "nginx"), 1.0, 0.7, _SENDFILE),
    _at_most(
        "CPU per GiB, 64 clients, against nginx", *_ratio("cpu_per_gib_64", "serve", "nginx"), 1.0, 0.7, _SENDFILE
    ),
    _at_least("1 MiB requests/s, against nginx", *_ratio("rps_1m", "serve", "nginx"), 1.0, 1.3, _SENDFILE),
    _at_most("RSS of each of 2,000 stalled clients, KiB", ("rss_per_client", "serve"), None, 12, 9.7),
    _at_most(
        "remote 1 GiB, CPU against a bare httpx2 loop", *_ratio("cpu_per_gib", "serve-remote", "bare-remote"), 0.6, 0.3
    ),
    _at_most(
        "remote 1 GiB, CPU against nginx proxy_pass", *_ratio("cpu_per_gib", "serve-remote", "nginx-proxy"), 1.3, 0.7
    ),
    _at_least(
        "remote 10 KiB, requests/s against a bare httpx2 loop", *_ratio("rps_10k", "serve-remote", "bare-remote"), 2, 6
    ),
    _at_least(
        "remote 10 KiB, requests/s against nginx proxy_pass",
        *_ratio("rps_10k", "serve-remote", "nginx-proxy"),
        0.1,
        0.25,
    ),
    _at_least(
        "Django 10 KiB requests/s, against Starlette",
        *_ratio("rps_10k", "ours-django", "ours"),
        0.5,
        floor="bare-django",
    ),
    _at_least(
        "JSON log, metrics, limits, counts, against none",
        *_ratio("rps_10k", "serve-counted", "serve-quiet"),
        0.85,
        floor=Added("serve-quiet", "floor-answers", "floor-counted"),
    ),
    _at_least(
        "every feature on, against all off",
        *_ratio("rps_10k", "serve-all", "serve-quiet"),
        0.85,
        0.95,
        Added("serve-quiet", "floor-answers", "floor-all"),
    ),
    _at_most("p99 beside 50 downloads, against nginx", *_ratio("p99", "serve", "nginx"), 1.5, 1, _SENDFILE),
    _at_most("p99 beside 500 downloads, against nginx", *_ratio("p99_many", "serve", "nginx"), 1.5, 1, _SENDFILE),
    _at_most("idle memory, MiB", ("idle", "serve"), None, 40, floor="memory"),
    _at_most("start-up, s", ("start", "serve"), None, 0.3, floor="memory"),
    _at_least("signed link, redirect to a store, requests/s", ("rps_10k", "serve-redirect"), None, 15000),
    _at_most(
        "CPU of the same with 2 workers, against 1",
        ("cpu_workers", "serve-redirect-2"),
        ("cpu_10k", "serve-redirect"),
        1.1,
    ),
    _at_most("Redis operations of a download with link and limits", ("redis_ops", "shared-both"), None, 4),
]
"""Goals for `downloadview serve` with its default settings."""

LIBRARY = [
    _at_most(
        "CPU per GiB, 1 GiB file, zero-copy, against nginx sendfile",
        ("cpu_per_gib", "ours"),
        ("cpu_per_gib", "nginx"),
        1.25,
        1.05,
    ),
    _at_least("1 MiB requests/s, against nginx", ("rps_1m", "ours"), ("rps_1m", "nginx"), 0.75, 0.95),
    _at_least(
        "10 KiB requests/s, against Starlette's Response from memory",
        ("rps_10k", "ours"),
        ("rps_10k", "memory"),
        0.75,
        1.1,
    ),
    _at_least(
        "10 KiB requests/s, against Starlette's FileResponse on stock uvicorn",
        ("rps_10k", "ours"),
        ("rps_10k", "starlette"),
        5,
        8,
    ),
    _at_least(
        "10 KiB requests/s of a signed link, against the same route public",
        ("rps_10k", "serve-signed"),
        ("rps_10k", "serve"),
        0.9,
        0.95,
    ),
    _at_least(
        "10 KiB requests/s behind a function that allows every request, against the same route public",
        ("rps_10k", "serve-hooked"),
        ("rps_10k", "serve"),
        0.85,
        0.95,
    ),
    _at_most(
        "CPU per GiB on stock uvicorn, against Starlette's FileResponse",
        ("cpu_per_gib", "ours-chunks"),
        ("cpu_per_gib", "starlette"),
        0.3,
        0.2,
    ),
    _at_least(
        "a Range of 1 MiB out of the large file, against a whole 1 MiB file",
        ("range_1m", "ours"),
        ("whole_1m", "ours"),
        0.9,
        1,
    ),
    _at_most("RSS per stalled client, KiB", ("rss_per_client", "ours"), None, 16, 12),
    _at_most("open descriptors per stalled client", ("descriptors_per_client", "ours"), None, 3, 2),
    *(
        _at_most(
            f"cost of an offloaded answer, against a Starlette Response with the same header, both on {where}",
            ("rps_10k", f"bare-header{suffix}"),
            ("rps_10k", f"ours-header{suffix}"),
            1.25,
            1.05,
        )
        for where, suffix in (("DownloadProtocol", ""), ("stock uvicorn", "-stock"))
    ),
    _at_most(
        "cost of a request with 1,000 offload rules, against 1 rule",
        ("rps_10k", "rules-1"),
        ("rps_10k", "rules-1000"),
        1.2,
        1,
    ),
    _at_most("p99 of a 10 KiB request beside the downloads, against nginx", ("p99", "ours"), ("p99", "nginx"), 3, 1.5),
    _at_least(
        "10 KiB requests/s from the cache, against a local file", ("rps_10k", "cached"), ("rps_10k", "ours"), 0.95, 1
    ),
    _at_least(
        "1 MiB requests/s from the cache, against a local file", ("rps_1m", "cached"), ("rps_1m", "ours"), 0.95, 1
    ),
    _at_most(
        "CPU per GiB of an object that is not cached, against obstore in a bare loop",
        ("cpu_per_gib", "store"),
        ("cpu_per_gib", "bare-store"),
        1.3,
        1.1,
    ),
    _at_most(
        "CPU per GiB in Django, zero-copy, against the same in Starlette",
        ("cpu_per_gib", "ours-django"),
        ("cpu_per_gib", "ours"),
        1.1,
        1,
    ),
    _at_least(
        "10 KiB requests/s in Django, against django-downloadview on ASGI",
        ("rps_10k", "ours-django"),
        ("rps_10k", "django-downloadview"),
        5,
        8,
    ),
]
"""What the library has to reach in a bare application, and other servers with it."""

GOALS = [*PRODUCT, *LIBRARY]
