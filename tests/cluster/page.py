"""docs/cluster.md, and a picture of each scenario: what became of the downloads, ten times a second."""

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from html import escape
from math import ceil
from pathlib import Path

from benchmarks.proc import processor
from tests.cluster.run import Report
from tests.servers import PROJECT

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 860, 210, 44, 64, 30
_STYLE = """<style>
.ground { fill: #f7f8fa } .text { fill: #1f2933 } .axis { stroke: #9aa5b1 } .mark { stroke: #52606d }
.ok { fill: #1d8a7a } .retried { fill: #e8a317 } .refused { fill: #c8323c }
@media (prefers-color-scheme: dark) {
.ground { fill: #1a1c1e } .text { fill: #e4e7eb } .axis { stroke: #616e7c } .mark { stroke: #9aa5b1 }
.ok { fill: #2bb39f } .retried { fill: #f2bd4b } .refused { fill: #ef6670 }
}
</style>"""
_STEP = 0.1

_INTRODUCTION = """\
# A cluster

`make cluster` runs three replicas of the service and all that they need on one machine, puts load on them, and does
something to them: it kills a replica, stops Redis, or sets a clock wrong. Then it checks everything that must hold.
`make cluster CLUSTER_ARGS="--only kill-9"` runs one scenario, `--page docs/cluster.md` writes this page, and
`--costs 5 --replicas 2` measures what each kind of request costs. One scenario is part of `make test-all`.

## The servers

All of them are the real programs, each on a port of this machine:

- **The front** is nginx with the configuration that `downloadview config nginx` prints, or HAProxy. In nginx, the
  upstream has three servers in place of one, `proxy_read_timeout` is 2 seconds and `proxy_connect_timeout` 1 second.
  It retries as it does by default, and sends local files by X-Accel-Redirect. HAProxy has a configuration of the
  tests: it asks `/-/livez`, and repeats a request that got no answer within 2 seconds.
- **Three replicas** of `downloadview serve` share a directory of files, the keys of links, Redis and PostgreSQL. Redis
  has the uses of links and the quotas (`appendonly yes`), and PostgreSQL has the completed downloads.
- **SeaweedFS** is the object store: a master, two volume servers with two copies of each object, a filer, and a gateway
  for S3.
- **Two caches** are also `downloadview serve`, with a cached source. The replicas reach them through an nginx with
  `hash $uri consistent`, so that each file has its place in one cache.

## The load

15 clients get small files in four ways, ranges, listings, archives, and large files slowly. Some leave, and resume. Two
clients use a link for one download at the same moment, and three requests of one client come at once for a quota of
two downloads. Six clients ask for a cold file at once. A client whose answer is cut resumes at once by `Range` and
`If-Range`. At the end of a scenario, each link and each quota is tried again.

## What is checked

- **Bytes:** each block is compared with the content of the file, also after a resume at another replica. The ETag does
  not change.
- **Refused:** no request is without an answer or gets a 5xx, unless the scenario takes away what it needs: links and
  quotas need Redis.
- **Once only:** of the addresses that use a link for one download, one gets the file. It gets the file once.
- **Quotas:** each client gets exactly two downloads. While Redis is gone, a client may get fewer.
- **Fills:** a cold file is fetched from the store once, whichever replicas were asked for it; twice if its cache was
  lost.
- **Outcomes:** each request has one line in the log of one replica. For requests that were not retried and that the
  replica sent itself, status and bytes are compared, too.
- **Completed downloads:** `downloadview report` has as many as the clients have.

A process that is killed has not yet written what it did in the last second. A replica that hangs may answer a request
after the proxy has left it for another one: then two replicas have a line. The checks allow for these two, for fewer
downloads of a quota while Redis is gone, and for connections that the kernel resets. The text below each picture says
how often the first two occurred.

## What to set

- `proxy_read_timeout` of nginx, which `downloadview config nginx` prints as 300 seconds: with several replicas, set it
  to the longest time that an answer may pause. Only then does nginx leave a replica that hangs, and ask another one.
  nginx does not ask `/-/readyz`; it learns from a request that a replica does not answer.
- If some routes do not need Redis, have the balancer ask `/-/livez`. While Redis is gone, `/-/readyz` of all replicas
  gives 503, and a balancer that asks it has no replica left for any route. A replica that ends refuses connections
  after `drain_seconds`, so the balancer has to repeat requests that found no connection, as both do here.
- Redis needs `appendonly yes` and `maxmemory-policy noeviction`, so that no use of a link is forgotten. With
  `when_store_fails = "refuse"`, no quota is exceeded while Redis is gone: requests that need it get 503 instead.
- Replace a key in three steps: add the new key as the last line of the file of each replica and reload all of
  them, then make it the first line, and remove the old one when its links have expired.
- Each cached file is in one cache, by the hash of its URL. If a cache is lost, its files are fetched once more. When it
  is back, nginx sends requests to it again after `fail_timeout`.

## How to read the pictures

Each bar is a tenth of a second. A download is *retried* if the proxy or the client made its request
again, and it is complete. A *refused* request has got a 5xx or no answer at all. The time to recover begins with the
first event, and ends with the last answer that was retried or refused.
"""

_LIMITS = """\

## Limits that runs have shown

- The times after a kill begin with the signal, so they contain what the client still takes from the buffers before it
  notices. On a machine that was busy with something else, the last byte came up to ten seconds after the kill.
- A replica that hung may answer after nginx has left it: two replicas then have a line about one request.
- When other programs of the machine leave the kernel no memory for TCP, connections are reset. A scenario in which only
  requests without an answer or downloads without an end are broken is then repeated.
"""


def picture(report: Report) -> str:
    """Return the timeline of a scenario as an SVG document."""
    slots = max(1, ceil(report.seconds / _STEP))
    counts = {
        name: Counter(int(at / _STEP) for at in times if at < report.seconds)
        for name, times in (("ok", report.ok), ("retried", report.retried), ("refused", report.refused))
    }
    most = max(sum(count[slot] for count in counts.values()) for slot in range(slots)) or 1
    width, height = (_WIDTH - _LEFT - 16) / slots, _HEIGHT - _TOP - _BOTTOM
    base = _HEIGHT - _BOTTOM
    title = f"{report.scenario.name}: {report.scenario.title}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        _STYLE,
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" class="ground"/>',
        f'<text x="16" y="22" class="text" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for number, name in enumerate(counts):
        left = _WIDTH - 230 + number * 75
        parts.append(f'<rect x="{left}" y="13" width="10" height="10" class="{name}"/>')
        parts.append(f'<text x="{left + 14}" y="22" class="text">{name}</text>')
    filled: Counter[int] = Counter()
    for name, count in counts.items():
        path = []
        for slot, many in sorted(count.items()):
            tall, below = height * many / most, height * filled[slot] / most
            path.append(f"M{_LEFT + slot * width:.1f} {base - below:.1f}v{-tall:.1f}h{width * 0.9:.1f}v{tall:.1f}z")
            filled[slot] += many
        if path:
            parts.append(f'<path class="{name}" d="{"".join(path)}"/>')
    parts += _axes(report.seconds, most, base)
    parts += _marks(report, base)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(seconds: float, most: int, base: int) -> list[str]:
    scale = (_WIDTH - _LEFT - 16) / seconds
    parts = [f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{base}H{_WIDTH - 16}"/>']
    parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + 8}" class="text" text-anchor="end">{most}</text>')
    step = 2 if seconds < 30 else 10
    parts += [
        f'<text x="{_LEFT + at * scale:.1f}" y="{base + 16}" class="text" text-anchor="middle">{at} s</text>'
        for at in range(0, int(seconds) + 1, step)
    ]
    return parts


def _marks(report: Report, base: int) -> list[str]:
    scale, parts = (_WIDTH - _LEFT - 16) / report.seconds, []
    for number, (at, text) in enumerate(report.marks):
        x, y = _LEFT + at * scale, 40 + number % 2 * 13
        anchor = "end" if x > _WIDTH - 150 else "start"
        parts.append(f'<path class="mark" fill="none" stroke-dasharray="3 2" d="M{x:.1f} {y}V{base}"/>')
        parts.append(
            f'<text x="{x + (4 if anchor == "start" else -4):.1f}" y="{y + 4}" class="text" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )
    return parts


def write(reports: Sequence[Report], page: Path, *, seed: int, seconds: float) -> None:
    """Write the page, and the pictures into a directory beside it that has its name."""
    pictures = page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    lines = [_INTRODUCTION, "## A run", "", _run(reports, seed, seconds), ""]
    lines += ["| scenario | downloads | ok | retried | refused | recovered after | checks | broken |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in reports:
        recovered = "" if one.recovered is None else f"{one.recovered:.1f} s"
        row = [f"{one.scenario.name}: {one.scenario.title}", one.downloads, len(one.ok), len(one.retried)]
        row += [len(one.refused), recovered, sum(one.findings.checks.values()), len(one.findings.problems)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "| invariant | checks |", "|---|---|"]
    checks: Counter[str] = Counter()
    for one in reports:
        checks += one.findings.checks
    lines += [f"| {what} | {count:,} |" for what, count in sorted(checks.items())]
    for one in reports:
        lines += ["", *_section(one, pictures)]
    page.write_text("\n".join(lines) + "\n" + _LIMITS)


def _run(reports: Sequence[Report], seed: int, seconds: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False
    ).stdout.strip()
    cut = sum(one.cut for one in reports)
    broken = sum(len(one.findings.problems) for one in reports)
    text = (
        f"This is the run of {time.strftime('%Y-%m-%d', time.gmtime())} with the seed {seed}, at the commit {commit}, "
        f"in {seconds:.0f} seconds on {os.cpu_count()} cores ({processor()}), Python {platform.python_version()}. "
    )
    text += "No invariant was broken. " if not broken else f"{broken} checks failed: they are below. "
    if cut:
        text += (
            f"The kills of replicas cut {_downloads(cut)}. Each had its next byte from another replica within "
            f"{max(one.resumed for one in reports):.2f} seconds after the kill, and its last byte within "
            f"{max(one.completed for one in reports):.2f} seconds."
        )
    return _wrapped(text)


def _section(report: Report, pictures: Path) -> list[str]:
    (pictures / f"{report.scenario.name}.svg").write_text(picture(report))
    title = f"{report.scenario.name}: {report.scenario.title}"
    lines = [f"### {title[0].upper()}{title[1:]}", "", f"![{title}]({pictures.name}/{report.scenario.name}.svg)", ""]
    if report.cut:
        lines.append(
            f"- The kill cut {_downloads(report.cut)}. The next byte came from another replica within "
            f"{report.resumed:.2f} s, and the last one within {report.completed:.2f} s."
        )
    if len(report.versions) > 1:
        lines.append(
            f"- Answers by version: {', '.join(f'{name}: {count}' for name, count in report.versions.items())}."
        )
    lines += [f"- {fact[0].upper()}{fact[1:]}." for fact in report.findings.facts]
    lines += [f"- **Broken:** `{problem[:300]}`" for problem in report.findings.problems[:5]]
    return [_wrapped(line) for line in lines]


def _downloads(number: int) -> str:
    return f"{number} download{'' if number == 1 else 's'}"


def _wrapped(text: str, width: int = 118) -> str:
    """Return a paragraph or an item of a list in lines of at most so many characters; pictures and titles stay."""
    if text.startswith(("![", "#")):
        return text
    lines, indent = [""], "  " if text.startswith("- ") else ""
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > width and lines[-1].strip():
            lines.append(indent + word)
        else:
            lines[-1] += f" {word}" if lines[-1].strip() else word
    return "\n".join(lines)
