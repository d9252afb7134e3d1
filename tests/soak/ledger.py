"""What clients have got, and what the log of the service says about it."""

import json
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["complete", "cut", "left", "nothing", "refused"]
"""complete: the whole answer. cut: it ended too early. left: the client has left. nothing: the connection ended before
an answer. refused: there was no connection."""

AGENT = "soak/"
"""How the User-Agent of each request begins that must have exactly one outcome. The rest is its number."""


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass(slots=True)
class Record:
    """A request, as its client has seen it."""

    number: int
    kind: str
    method: str
    path: str
    begun: float
    ended: float = 0.0
    status: int = 0
    request_id: str | None = None
    received: int = 0
    result: Result = "nothing"

    @property
    def agent(self) -> str:
        """The User-Agent of the request."""
        return f"{AGENT}{self.number}"


@dataclass(slots=True)
class Spell:
    """A fault, from its begin to its end. affects: the parts of the site that may fail meanwhile."""

    kind: str
    affects: frozenset[str]
    begun: float
    ended: float = float("inf")


@dataclass
class Ledger:
    """The records of all requests, the faults, and what is broken.

    settles: seconds after the end of a fault in which its effects are still excused. is_tls: whether the service has
    TLS. proxy_patience: after how many seconds a proxy in front of it drops a client that takes nothing; None: there is
    no proxy.
    """

    settles: float = 15.0
    is_tls: bool = False
    proxy_patience: float | None = None
    events: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    problems: list[str] = field(default_factory=list)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    maxima: dict[str, float] = field(default_factory=dict)
    lines: int = 0
    bytes: int = 0
    _spells: list[Spell] = field(default_factory=list)
    _open: dict[str, Record] = field(default_factory=dict)
    _number: int = 0
    _read: dict[tuple[Path, int], int] = field(default_factory=dict)  # another site may use an inode again

    def say(self, text: str) -> None:
        """Keep an event for the report."""
        self.events.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {text}")

    def broken(self, text: str) -> None:
        """Report an invariant that does not hold. The run ends soon."""
        self.problems.append(text)
        self.say(f"BROKEN {text}")

    def check(self, what: str, holds: bool, problem: object) -> bool:
        """Count a check, and report it unless it holds."""
        self.checks[what] += 1
        if not holds:
            self.broken(f"{what}: {problem}")
        return holds

    def most(self, what: str, value: float) -> None:
        """Keep the maximum of a value."""
        self.maxima[what] = max(value, self.maxima.get(what, value))

    def begin(self, kind: str, method: str, path: str) -> Record:
        """Return a new record of a request."""
        self._number += 1
        record = Record(self._number, kind, method, path, time.monotonic())
        self._open[record.agent] = record
        return record

    def end(self, record: Record, result: Result) -> None:
        """Note how a request has ended."""
        record.ended, record.result = time.monotonic(), result
        self.seen[record.kind, result if not record.status else f"{record.status} {result}"] += 1
        self.bytes += record.received
        self.say(
            f"{record.kind} {record.method} {record.path} {record.status} {result} {record.received} bytes "
            f"in {record.ended - record.begun:.2f} s as {record.agent}"
        )

    def begin_fault(self, kind: str, affects: frozenset[str]) -> Spell:
        """Note that a fault begins."""
        spell = Spell(kind, affects, time.monotonic())
        self._spells.append(spell)
        self.faults[kind] += 1
        self.say(f"FAULT {kind}")
        return spell

    def end_fault(self, spell: Spell) -> None:
        """Note that a fault has ended."""
        spell.ended = time.monotonic()
        self.say(f"fault {spell.kind} has ended")

    def excuses(self, part: str, since: float, until: float | None = None) -> bool:
        """Return whether a part of the site may have failed between."""
        until = time.monotonic() if until is None else until
        return any(
            part in spell.affects and spell.begun <= until and spell.ended + self.settles >= since
            for spell in self._spells
        )

    def has_begun(self, kind: str, since: float) -> bool:
        """Return whether a fault of a kind has begun since then."""
        return any(spell.kind == kind and spell.begun >= since for spell in self._spells)

    def compare(self, directory: Path) -> list[Record]:
        """Compare all requests that have ended with the lines of the log. Return those whose line is still missing.

        A request is forgotten when it is compared. Call this when no request is under way.
        """
        outcomes: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(directory.glob("access.log*")):
            with path.open("rb") as file:
                log = directory, path.stat().st_ino
                file.seek(self._read.get(log, 0))
                for line in file:
                    self._read[log] = self._read.get(log, 0) + len(line)
                    self.lines += 1
                    try:
                        outcome = json.loads(line)
                    except ValueError:
                        self.broken(f"one outcome: a line of the log is torn: {line[:200]!r}")
                        continue
                    agent = outcome["user_agent"] or ""
                    if agent.startswith(AGENT):
                        outcomes.setdefault(agent, []).append(outcome)
        for agent, lines in outcomes.items():
            record = self._open.pop(agent, None)
            is_one = record is not None and len(lines) == 1
            if self.check("one outcome", is_one, f"{len(lines)} lines: {lines}") and record is not None:
                self._compare(record, lines[0])
        return list(self._open.values())

    def _compare(self, record: Record, line: dict[str, Any]) -> None:
        def check(what: str, holds: bool, text: str) -> None:
            self.check(what, holds, f"{text}: the client has {record}, the log {line}")

        check("same method", line["method"] == record.method, "another method")
        if record.request_id is None:
            return
        check("same id", line["request_id"] == record.request_id, "another request id")
        if line["result"] == "delegated":
            return
        check("same status", line["status"] == record.status, "another status")
        if record.result == "complete" and self.is_tls and line["reason"] == "client-left":
            self.seen["TLS, has all and closes at once", "client-left in the log"] += 1  # see docs/soak.md
        elif record.result == "complete":
            check("complete in the log", line["result"] != "aborted", "an answer that the client has is aborted")
            check("same bytes", line["bytes"] == record.received, "other bytes")
        if record.result == "cut":
            seconds, patience = record.ended - record.begun, self.proxy_patience
            if patience is not None and seconds >= patience:  # it has the whole answer by then
                self.seen["cut after the time-out of nginx", f"{line['result']} in the log"] += 1
            else:
                check("cut in the log", line["result"] == "aborted", "a cut answer is complete")

    def forget(self, missing: list[Record], *, lost: bool) -> None:
        """Forget requests without a line, and report those that must have one. lost: a process was killed."""
        for record in missing:
            del self._open[record.agent]
            # the log has the lines of the last 50 ms not yet: at most some seconds on a busy machine
            is_lost = lost and self.excuses("process", record.begun, record.ended + 5)
            must = record.request_id is not None and not is_lost
            self.check("one outcome", not must, f"no line of {record}")
