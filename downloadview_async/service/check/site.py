"""The state of `downloadview check`: the installation that it checks, the files that it requests, and the results."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.routing import Match, Route

from downloadview_async import AsyncFile, Download, FileMetadata, FileMissing, ProxyKind, proxy_kinds
from downloadview_async.service.check.advice import advice
from downloadview_async.service.check.http import Answer, Peer
from downloadview_async.service.check.samples import Content
from downloadview_async.service.settings import RouteSettings, RuleSettings, Settings
from downloadview_async.service.source_settings import SourceSettings, source_of_files

Step = Literal["source", "application", "proxy", "together"]
Result = Literal["pass", "FAIL", "skip"]

PARAMETER = re.compile("{[^}]*}")
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
"""The headers of the service that must reach the client unchanged, whoever sends the file. See `File.kept_headers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The result of one check, for people to read. route: the path of a route, or the target of a rule.

    request: what the check requested. outcome: what came back, or why the check was skipped. remedy: how to fix a
    failure.
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to request. thorough: make all checks with it, not only those that depend on its name."""

    route: RouteSettings
    target: str
    thorough: bool


@dataclass(slots=True)
class File:
    """A file that its source has returned, and the answers that the service should give and gives for it."""

    wanted: Wanted
    file: AsyncFile
    metadata: FileMetadata
    content: Content
    expected: Answer
    """The answer to HEAD of the application in this process, which has the same settings."""
    direct: Answer | None = None
    """The answer of the running service, if it is the expected one."""

    @property
    def route(self) -> RouteSettings:
        """The route that serves it."""
        return self.wanted.route

    @property
    def target(self) -> str:
        """The path to request."""
        return self.wanted.target

    @property
    def offloaded(self) -> bool:
        """Whether the proxy should send it."""
        return bool(self.expected.orders)

    @property
    def kept_headers(self) -> tuple[str, ...]:
        """The headers of the service that must reach the client: those of the route too."""
        return tuple({name.lower(): name for name in (*self.route.headers, *KEPT_HEADERS)}.values())

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
    """The installation that is checked.

    in_process: the application in this process. direct: the running service, without the proxy. service: the URL of the
    running service, for messages.
    """

    settings: Settings
    app: Starlette
    in_process: Peer
    direct: Peer | None
    proxy: Peer | None
    timeout: float
    service: str
    seen: set[str] = field(default_factory=set)
    """The kinds of proxy that the Server and Via headers of answers have named."""
    narrow: set[str] = field(default_factory=set)
    """The lengths that the proxy limits too tightly: "request line", "fields"."""

    @property
    def kind(self) -> ProxyKind | None:
        """The kind of proxy in the settings, or None."""
        return proxy_kinds().get(self.settings.offload.backend or "")

    def see(self, answer: Answer) -> None:
        """Note the kind of proxy that the Server and Via headers of an answer name."""
        servers = f"{answer.get('server')} {answer.get('via')}".lower()
        self.seen.update(name for name in proxy_kinds() if name in servers)

    def route_of(self, target: str) -> tuple[Route | None, str]:
        """Return the route that matches a path, and the name that it passes to its source."""
        scope = {"type": "http", "method": "GET", "path": unquote(target), "root_path": "", "headers": []}
        for route in self.app.router.routes:
            if isinstance(route, Route):
                match, child_scope = route.matches(scope)
                if match is Match.FULL:
                    return route, "".join(str(value) for value in child_scope["path_params"].values())
        return None, ""

    async def resolve(self, wanted: Wanted) -> AsyncFile:
        """Return a file from its source. Raises `FileMissing`, and whatever else the source raises."""
        route, key = self.route_of(wanted.target)
        if route is None or route.path != wanted.route.path:
            raise FileMissing(f"{'no route' if route is None else route.path} answers this path")
        assert isinstance(route.endpoint, Download)
        return await route.endpoint.source.resolve(key)

    def source_of(self, route: RouteSettings) -> tuple[str, SourceSettings]:
        """Return the name and the settings of the source that holds the files of a route."""
        return source_of_files(route.source, self.settings.sources)

    def rule_of(self, file: File) -> RuleSettings | None:
        """Return the rule that covers a file, even if a header cannot carry the file's name; None if no rule does."""
        return self.rule_for([file.file.location or "", *map(unquote, file.expected.orders.values())])

    def rule_for(self, places: Iterable[str]) -> RuleSettings | None:
        """Return the most specific rule whose source or target contains one of these places, or None."""
        rules = [
            rule
            for place in places
            for rule in self.settings.offload.rules
            for prefix in (rule.source, rule.target or rule.source)
            if place.startswith(f"{prefix.rstrip('/')}/")
        ]
        return max(rules, key=lambda rule: len(rule.source), default=None)

    def is_fetched(self, file: File) -> bool:
        """Return whether the proxy fetches a file from another server."""
        rule = self.rule_of(file)
        return file.offloaded and rule is not None and not rule.source.startswith("/")

    def advice(self, problem: str, rule: RuleSettings | None, **facts: str) -> str:
        """Return the remedy for a problem with the files of a rule: see `advice.advice`."""
        backend: str | None = self.settings.offload.backend
        if backend is None and len(self.seen) == 1:
            (backend,) = self.seen
        if rule is not None:
            facts |= {"directory": rule.source.rstrip("/"), "target": rule.target or rule.source}
        if (header := facts.get("header")) is not None:
            facts["variable"] = header.lower().replace("-", "_")
        return advice(problem, backend, service=self.service, **facts)


def passed(step: Step, wanted: Wanted, request: str, outcome: str) -> Line:
    """Return a pass row."""
    return Line(result="pass", step=step, route=wanted.route.path, request=request, outcome=outcome)


def failed(step: Step, wanted: Wanted, request: str, outcome: str, remedy: str) -> Line:
    """Return a FAIL row."""
    return Line(result="FAIL", step=step, route=wanted.route.path, request=request, outcome=outcome, remedy=remedy)


def skipped(step: Step, wanted: Wanted, request: str, reason: str) -> Line:
    """Return a skip row: the check could not be made."""
    return Line(result="skip", step=step, route=wanted.route.path, request=request, outcome=f"not checked: {reason}")


def unsigned(orders: Mapping[str, str]) -> dict[str, str]:
    """Return offload headers without the signature of a store's URL, which changes every second."""
    return {name: value.partition("?")[0] if name == "x-offload-target" else value for name, value in orders.items()}


def shown(headers: Mapping[str, str], comma: str = ",") -> str:
    """Return headers as text for a row, without signatures."""
    return "".join(f"{comma} {name}: {value}" for name, value in unsigned(headers).items())


def shown_url(url: str) -> str:
    """Return a URL without its password, and without its query, which may hold a signature."""
    return re.sub("//[^/]*@", "//", url.partition("?")[0].rstrip("/"))
