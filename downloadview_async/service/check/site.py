"""What `downloadview check` asks, and what is known of it: the settings, the servers, the files, and what is said."""

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
from downloadview_async.service.settings import (
    RouteSettings,
    RuleSettings,
    Settings,
    SourceSettings,
    source_of_files,
)

Step = Literal["source", "application", "proxy", "together"]
Result = Literal["pass", "FAIL", "skip"]

PARAMETER = re.compile("{[^}]*}")
PLAIN = re.compile("/?[A-Za-z0-9_][A-Za-z0-9_./~-]*")
"""Names that no two proxies spell differently."""

SAID = (
    "Content-Type",
    "Content-Disposition",
    "Cache-Control",
    "X-Content-Type-Options",
    "Content-Security-Policy",
    "Content-Encoding",
    "Content-Language",
)
"""What the application says of a file and every sender has to keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One check. route: the path of a route, or the target of a rule. asked, came: in words.

    remedy: what mends it, where it has failed.
    """

    result: Result
    step: Step
    route: str
    asked: str
    came: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to ask for. thorough: in every way; else once, as what is special about it is its name."""

    route: RouteSettings
    target: str
    thorough: bool


@dataclass(slots=True)
class File:
    """A file that the source has given, and what the settings say of it."""

    wanted: Wanted
    file: AsyncFile
    metadata: FileMetadata
    content: Content
    said: Answer
    """The answer to HEAD of the application in this process."""
    alone: Answer | None = None
    """The answer of the live one, if it is a good one."""

    @property
    def route(self) -> RouteSettings:
        """The route by which it was asked for."""
        return self.wanted.route

    @property
    def target(self) -> str:
        """The path that is asked for."""
        return self.wanted.target

    @property
    def offloaded(self) -> bool:
        """Whether the proxy is to send it."""
        return bool(self.said.orders)

    @property
    def repeatable(self) -> bool:
        """Whether the next request gets the same bytes for sure."""
        return self.offloaded or bool(self.said.get("etag") or self.said.get("last-modified"))

    @property
    def ranged(self) -> bool:
        """Whether parts of it can be asked for."""
        return self.content.size is not None and self.metadata.size is not None and self.metadata.accept_ranges


@dataclass(slots=True)
class Site:
    """An installation. here: the application in this process; alone: the live one; service: where that is, in words."""

    settings: Settings
    app: Starlette
    here: Peer
    alone: Peer | None
    proxy: Peer | None
    timeout: float
    service: str
    seen: set[str] = field(default_factory=set)
    """What answers by way of the proxy have said of who sends them."""
    narrow: set[str] = field(default_factory=set)
    """What the proxy has too little room for: "request line", "fields"."""

    @property
    def kind(self) -> ProxyKind | None:
        """The kind of proxy that the settings are for, or None."""
        return proxy_kinds().get(self.settings.offload.backend or "")

    def see(self, answer: Answer) -> None:
        """Note who says to have sent an answer."""
        said = f"{answer.get('server')} {answer.get('via')}".lower()
        self.seen.update(name for name in proxy_kinds() if name in said)

    def route_of(self, target: str) -> tuple[Route | None, str]:
        """Return the route that answers a path, and the key that it asks its source for."""
        scope = {"type": "http", "method": "GET", "path": unquote(target), "root_path": "", "headers": []}
        for route in self.app.router.routes:
            if isinstance(route, Route):
                match, found = route.matches(scope)
                if match is Match.FULL:
                    return route, "".join(str(value) for value in found["path_params"].values())
        return None, ""

    async def resolve(self, wanted: Wanted) -> AsyncFile:
        """Return a file as its source finds it now. Raises `FileMissing`, and whatever else the source raises."""
        route, key = self.route_of(wanted.target)
        if route is None or route.path != wanted.route.path:
            raise FileMissing(f"{'no route' if route is None else route.path} answers this path")
        assert isinstance(route.endpoint, Download)
        return await route.endpoint.source.resolve(key)

    def source_of(self, route: RouteSettings) -> tuple[str, SourceSettings]:
        """Return the source where the files of a route are, with its name."""
        return source_of_files(route.source, self.settings.sources)

    def rule_of(self, file: File) -> RuleSettings | None:
        """Return the rule by which a file is offloaded, or could be but for its name."""
        return self.rule_for([file.file.location or "", *map(unquote, file.said.orders.values())])

    def rule_for(self, places: Iterable[str]) -> RuleSettings | None:
        """Return the rule for one of these places, each for the service or for the proxy, or None."""
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
        """Return what mends a problem with the files of a rule: see `advice.advice`."""
        backend: str | None = self.settings.offload.backend
        if backend is None and len(self.seen) == 1:
            (backend,) = self.seen
        if rule is not None:
            facts |= {"directory": rule.source.rstrip("/"), "target": rule.target or rule.source}
        if (header := facts.get("header")) is not None:
            facts["variable"] = header.lower().replace("-", "_")
        return advice(problem, backend, service=self.service, **facts)


def passed(step: Step, wanted: Wanted, asked: str, came: str) -> Line:
    """Return the line of what is as it should be."""
    return Line(result="pass", step=step, route=wanted.route.path, asked=asked, came=came)


def failed(step: Step, wanted: Wanted, asked: str, came: str, remedy: str) -> Line:
    """Return the line of what is not."""
    return Line(result="FAIL", step=step, route=wanted.route.path, asked=asked, came=came, remedy=remedy)


def skipped(step: Step, wanted: Wanted, asked: str, reason: str) -> Line:
    """Return the line of what could not be found out."""
    return Line(result="skip", step=step, route=wanted.route.path, asked=asked, came=f"not checked: {reason}")


def unsigned(orders: Mapping[str, str]) -> dict[str, str]:
    """Return orders without the signature of what a proxy asks a store for: that is another one each second."""
    return {name: value.partition("?")[0] if name == "x-offload-target" else value for name, value in orders.items()}


def shown(headers: Mapping[str, str], comma: str = ",") -> str:
    """Return headers in words, without a signature."""
    return "".join(f"{comma} {name}: {value}" for name, value in unsigned(headers).items())


def shown_url(url: str) -> str:
    """Return a URL without a password, and without its query, which may be a signature."""
    return re.sub("//[^/]*@", "//", url.partition("?")[0].rstrip("/"))
