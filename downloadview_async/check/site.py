"""The state of a check: the installation that is checked, the files that are requested, and the results."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import unquote

from downloadview_async import FileMetadata, ProxyKind, proxy_kinds
from downloadview_async.check.advice import advice
from downloadview_async.check.http import Answer, NoAnswerError, Peer, Server
from downloadview_async.check.proxies import PASSING_ON, named_by
from downloadview_async.check.samples import Content
from downloadview_async.http.log_text import cut

Step = Literal["source", "application", "proxy", "together"]
Result = Literal["pass", "FAIL", "skip"]

PLAIN = re.compile("/?[A-Za-z0-9_][A-Za-z0-9_./~-]*")
"""Names that every proxy encodes in the same way."""

KEPT_HEADERS = (
    "Content-Type",
    "Content-Disposition",
    "Cache-Control",
    "X-Content-Type-Options",
    "Content-Security-Policy",
    "Content-Encoding",
    "Content-Language",
)
"""The headers of the application that must reach the client unchanged, whoever sends the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The result of one check, for people to read.

    route: the path of a route or of a file, or the target of a rule. request: what the check requested. outcome: what
    came back, or why the check was skipped. remedy: how to fix a failure.
    """

    result: Result
    step: Step
    route: str
    request: str
    outcome: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the line as it is in the output of `--json`."""
        return {
            "result": self.result,
            "step": self.step,
            "route": self.route,
            "asked": self.request,
            "came": self.outcome,
            "remedy": self.remedy,
        }

    def as_text(self) -> str:
        """Return the line as it is printed: on one line of text, or with its remedy on a second one."""
        lines = [f"{self.result}  {self.step}  {self.route}  {self.request}: {self.outcome}"]
        if self.remedy:
            lines.append(f"      {self.remedy}")
        return "\n".join(cut("".join(map(_printable, line))) for line in lines)


def counts_of(lines: Sequence[Line]) -> dict[str, int]:
    """Return the number of each result."""
    return {result: sum(line.result == result for line in lines) for result in ("pass", "FAIL", "skip")}


def report_of(lines: Sequence[Line]) -> dict[str, Any]:
    """Return all results as the object of `--json`."""
    return {**counts_of(lines), "checks": [line.as_json() for line in lines]}


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file to request.

    label: the route of the file in the results. target: its path. query: that of a signed link, which no row shows.
    below: the path of the folder from which the application takes it, encoded. thorough: make all checks with it, not
    only those that depend on its name. headers: names of further headers that must reach the client. origin: the
    Origin of a web site whose scripts may read the file. cors_headers: names of the headers that such a script needs.
    """

    label: str
    target: str
    below: str
    thorough: bool
    query: str = ""
    headers: tuple[str, ...] = ()
    origin: str | None = None
    cors_headers: tuple[str, ...] = ()

    @property
    def requested(self) -> str:
        """The path and the query to request."""
        return f"{self.target}?{self.query}" if self.query else self.target

    @property
    def kept_headers(self) -> tuple[str, ...]:
        """The headers of the application that must reach the client."""
        return tuple({name.lower(): name for name in (*self.headers, *KEPT_HEADERS)}.values())


class PlacedRule(Protocol):
    """A rule of a proxy. target: None if the proxy has the files at the place of the source."""

    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str | None: ...  # noqa: D102


def rule_among(rules: Iterable[PlacedRule], places: Sequence[str]) -> PlacedRule | None:
    """Return the most specific rule whose source or target contains one of these places, or None."""
    covering = [
        rule
        for rule in rules
        for place in places
        for prefix in (rule.source, rule.target or rule.source)
        if place.startswith(f"{prefix.rstrip('/')}/")
    ]
    return max(covering, key=lambda rule: len(rule.source), default=None)


@dataclass(slots=True)
class File:
    """A file that can be read here, and the answers that the application should give and gives for it.

    location: where its bytes are, as `AsyncFile.location`. redirects: whether clients are redirected to it.
    answers_head: whether the application answers HEAD. head_is_separate: whether it does so without the proxy that
    sends the file for a GET, as Starlette's `FileResponse` does.
    """

    wanted: Wanted
    location: str | None
    metadata: FileMetadata
    content: Content
    expected: Answer
    """The answer of the application in this process: to HEAD, or to GET if it does not answer HEAD."""
    redirects: bool = False
    answers_head: bool = True
    head_is_separate: bool = False
    direct: Answer | None = None
    """The answer of the running application, if it is the expected one."""
    others: tuple[str, ...] = ()
    """The names of the other headers of the application, which must reach the client, with whatever values."""

    @property
    def target(self) -> str:
        """The path to request, without a query."""
        return self.wanted.target

    @property
    def requested(self) -> str:
        """The path and the query to request."""
        return self.wanted.requested

    @property
    def offloaded(self) -> bool:
        """Whether the proxy should send it."""
        return bool(self.expected.orders)

    @property
    def repeatable(self) -> bool:
        """Whether every request is certain to get the same bytes."""
        return self.offloaded or bool(self.expected.get("etag") or self.expected.get("last-modified"))

    @property
    def ranged(self) -> bool:
        """Whether it supports range requests."""
        return self.content.size is not None and self.metadata.size is not None and self.metadata.accept_ranges


@dataclass(slots=True)
class Site:
    """The installation that is checked. The settings of the service, or an application, say what is expected of it.

    in_process: the application in this process. direct: the running application, without the proxy. service: the URL
    of the running application, for messages.
    """

    in_process: Server
    direct: Peer | None
    proxy: Peer | None
    timeout: float
    service: str
    root: str = field(default="", kw_only=True)
    """The `root_path` of the application: the path below which clients reach it."""
    seen: set[str] = field(default_factory=set, kw_only=True)
    """The kinds of proxy that the Server and Via headers of answers have named."""
    passing: set[str] = field(default_factory=set, kw_only=True)
    """The names of servers that the headers of answers have named, and that cannot send files for an application."""
    narrow: set[str] = field(default_factory=set, kw_only=True)
    """The lengths that the proxy limits too tightly: "request line", "fields"."""

    @property
    def backend(self) -> str | None:
        """The name of the kind of proxy for which the application makes offload headers, or None."""
        raise NotImplementedError

    def rules_for(self, file: File) -> Iterable[PlacedRule]:
        """Return the rules of the proxy that may cover a file."""
        raise NotImplementedError

    def to_use(self, kind: str) -> str:
        """Return the remedy for an application that makes headers for another kind of proxy than this one."""
        raise NotImplementedError

    def is_of_files(self, target: str) -> bool:
        """Return whether a path belongs to a source of existing files, which does not generate any."""
        return False

    def alone(self, file: File) -> Server | None:
        """Return the application without the proxy, if its answer for a file is the expected one."""
        return self.direct if file.direct is not None else None

    def cache_of(self, file: File) -> str | None:
        """Return the directory of the cache that may hold a file."""
        return None

    async def relocate(self, file: File) -> None:
        """Set the location of a file again: by now a cache may have it."""

    async def misrouted(self, file: File, answer: Answer) -> str:
        """Return the remedy if the running application has got another path than the file's, or ""."""
        assert self.proxy is not None
        prefix, target = self.proxy.path, file.requested
        try:
            for other in dict.fromkeys(("", self.root)):
                if other != prefix and (await self.proxy.ask(f"{other}{target}", root=True)).status == 200:
                    url = shown_url(f"{self.proxy.base}{other}")
                    return f"root_path mismatch: clients reach {file.target} at {url}{file.target}: give the URL {url}"
            if not prefix:
                return ""
            # the running application was not asked for the file if it says what this one says of another path
            unchanged = await self.in_process.ask(f"{prefix}{target}")
        except NoAnswerError:
            return ""
        if unchanged.status != answer.status or unchanged.body != answer.body:
            return ""
        path = f"{prefix}{file.target}"
        return f"root_path mismatch: the application has got {path}, and has no such route: {self.to_know(prefix)}"

    def to_know(self, prefix: str) -> str:
        """Return how the proxy and the application agree about a prefix of the paths."""
        raise NotImplementedError

    def redirect_advice(self, file: File) -> str:
        """Return the remedy for a redirect that does not lead to the file."""
        raise NotImplementedError

    @property
    def kind(self) -> ProxyKind | None:
        """The kind of proxy for which the application makes offload headers, or None."""
        return proxy_kinds().get(self.backend or "")

    def see(self, answer: Answer) -> None:
        """Note the kind of proxy that the headers of an answer name."""
        servers = f"{answer.get('server')} {answer.get('via')}".lower()
        self.seen.update(name for name in proxy_kinds() if name in servers)
        self.passing.update(named_by(answer, PASSING_ON))

    def rule_of(self, file: File) -> PlacedRule | None:
        """Return the rule that covers a file, even if a header cannot carry the file's name; None if no rule does."""
        places = [file.location or "", *map(unquote, file.expected.orders.values())]
        return rule_among(self.rules_for(file), places)

    def is_fetched(self, file: File) -> bool:
        """Return whether the proxy fetches a file from another server."""
        rule = self.rule_of(file)
        return file.offloaded and rule is not None and not rule.source.startswith("/")

    def advice(self, problem: str, rule: PlacedRule | None, **facts: str) -> str:
        """Return the remedy for a problem with the files of a rule: see `advice.advice`."""
        backend = self.backend
        if backend is None and len(self.seen) == 1:
            (backend,) = self.seen
        if rule is not None:
            facts |= {"directory": rule.source.rstrip("/"), "target": rule.target or rule.source}
        if (header := facts.get("header")) is not None:
            facts["variable"] = header.lower().replace("-", "_")
        return advice(problem, backend, service=self.service, **facts)


def passed(step: Step, wanted: Wanted, request: str, outcome: str) -> Line:
    """Return a pass row."""
    return Line(result="pass", step=step, route=wanted.label, request=request, outcome=outcome)


def failed(step: Step, wanted: Wanted, request: str, outcome: str, remedy: str) -> Line:
    """Return a FAIL row."""
    return Line(result="FAIL", step=step, route=wanted.label, request=request, outcome=outcome, remedy=remedy)


def skipped(step: Step, wanted: Wanted, request: str, reason: str, remedy: str = "") -> Line:
    """Return a skip row: the check could not be made."""
    outcome = f"not checked: {reason}"
    return Line(result="skip", step=step, route=wanted.label, request=request, outcome=outcome, remedy=remedy)


def unsigned(orders: Mapping[str, str]) -> dict[str, str]:
    """Return offload headers without the signature of a store's URL, which changes every second."""
    return {name: value.partition("?")[0] if name == "x-offload-target" else value for name, value in orders.items()}


def shown(headers: Mapping[str, str], comma: str = ",") -> str:
    """Return headers as text for a row, without signatures."""
    return "".join(f"{comma} {name}: {value}" for name, value in unsigned(headers).items())


def shown_url(url: str) -> str:
    """Return a URL without its password, and without its query, which may hold a signature."""
    return re.sub("//[^/]*@", "//", url.partition("?")[0].rstrip("/"))
