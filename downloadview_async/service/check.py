"""`downloadview check`: asks a live installation what the settings promise of it, in four steps.

The source alone, the application alone, the proxy alone, and both together. What the application has to say is asked
of the same settings in this very process. At most a few pieces of each file are read, however large it is.
"""

import os
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import anyio
from starlette.applications import Starlette
from starlette.routing import Match, Route

from downloadview_async import (
    AccessDenied,
    AsyncFile,
    ConfigurationError,
    Download,
    FileMetadata,
    FileMissing,
)
from downloadview_async.service.advice import advice
from downloadview_async.service.asking import Answer, ClosedError, NoAnswerError, Peer
from downloadview_async.service.build import build
from downloadview_async.service.samples import Content, closed_to_others, content_of, names_in
from downloadview_async.service.settings import (
    DatabaseUnavailable,
    RouteSettings,
    RuleSettings,
    Settings,
    cache_of,
    directory_of,
    source_of_files,
)

Step = Literal["source", "application", "proxy", "together"]
Result = Literal["pass", "FAIL", "skip"]

_PART = 1024  # bytes of a range that is asked for
_PARAMETER = re.compile("{[^}]*}")
_PLAIN = re.compile("/?[A-Za-z0-9_][A-Za-z0-9_./~-]*")
_ONCE = ("accept-ranges", "content-length", "date", "etag", "last-modified", "server")
_STALE = '"downloadview-check"'
_KINDS = ("nginx", "apache", "lighttpd", "caddy", "h2o", "litespeed")

# What the application says of a file and every sender has to keep.
_SAID = (
    "Content-Type",
    "Content-Disposition",
    "Cache-Control",
    "X-Content-Type-Options",
    "Content-Security-Policy",
    "Content-Encoding",
    "Content-Language",
)
_OF_BOTH = ("etag", "last-modified", "content-length", "accept-ranges", *(name.lower() for name in _SAID))
_ORDERS_OF_A_CLIENT = {
    "X-Accel-Mapping": "/=/",
    "X-Accel-Redirect": "/etc/passwd",
    "X-Reproxy-URL": "/etc/passwd",
    "X-Sendfile": "/etc/passwd",
    "X-Sendfile-Type": "X-Accel-Redirect",
}


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


async def check(
    settings: Settings,
    *,
    url: str | None = None,
    direct: str | None = None,
    files: Sequence[str] = (),
    only: bool = False,
    timeout: float = 10.0,
) -> AsyncGenerator[Line, None]:
    """Yield the checks as they are made.

    url: where clients reach the service, by way of the proxy; without it there is no proxy to check. direct: where the
    service itself listens; default: where the settings say so. files: paths of URLs to ask for, such as
    /files/a%20b.txt. only: no others; else each route that has none of them is asked for its examples, or for what is
    found in its local directory. timeout: seconds that the source, and each request, may take.

    Raises `ConfigurationError` for wrong settings and URLs, and where there is no file to ask for.
    """
    app = build(settings)
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(app.router.lifespan_context(app))
        except DatabaseUnavailable as exc:
            remedy = "start the database, or correct its URL"
            yield Line(result="FAIL", step="source", route="", asked="the database", came=str(exc), remedy=remedy)
            return
        here = await stack.enter_async_context(Peer.here(app, timeout))
        alone = proxy = None
        uds = settings.server.uds if direct is None else None
        if (service := _service_of(settings, direct)) is not None:
            alone = await stack.enter_async_context(Peer.at(service, timeout, uds=uds))
        if url is not None:
            proxy = await stack.enter_async_context(Peer.at(url, timeout))
        shown = f"http://unix:{uds}" if uds else _shown_url(service or "http://HOST:PORT")
        run = _Run(settings, app, here, alone, proxy, timeout, shown)
        async with aclosing(run.lines(files, only)) as lines:
            async for line in lines:
                yield line


def _service_of(settings: Settings, direct: str | None) -> str | None:
    """Return the URL at which the service itself is asked, or None where the settings do not tell."""
    server = settings.server
    if direct is not None:
        return direct
    scheme = "https" if server.ssl_certfile else "http"
    if server.uds is not None:
        return f"{scheme}://localhost"
    if server.fd is not None or server.port == 0:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(server.host, server.host)  # noqa: S104
    return f"{scheme}://[{host}]:{server.port}" if ":" in host else f"{scheme}://{host}:{server.port}"


def _shown_url(url: str) -> str:
    """Return a URL without a password."""
    return re.sub("//.*@", "//", url.rstrip("/"))


# --- what is asked for


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file to ask for. thorough: in every way; else once, as what is special about it is its name."""

    route: RouteSettings
    target: str
    thorough: bool


@dataclass(slots=True)
class _File:
    """A file that the source has given, and what the settings say of it."""

    wanted: _Wanted
    file: AsyncFile
    metadata: FileMetadata
    content: Content
    said: Answer
    """The answer to HEAD of the application in this process."""
    alone: Answer | None = None
    """The answer of the live one, if it is a good one."""

    @property
    def route(self) -> RouteSettings:
        return self.wanted.route

    @property
    def target(self) -> str:
        return self.wanted.target

    @property
    def offloaded(self) -> bool:
        return bool(self.said.orders)

    @property
    def repeatable(self) -> bool:
        """Whether the next request gets the same bytes for sure."""
        return self.offloaded or bool(self.said.get("etag") or self.said.get("last-modified"))

    @property
    def ranged(self) -> bool:
        return self.content.size is not None and self.metadata.size is not None and self.metadata.accept_ranges


# --- the four steps


@dataclass(slots=True)
class _Run:
    settings: Settings
    app: Starlette
    here: Peer
    alone: Peer | None
    proxy: Peer | None
    timeout: float
    service: str
    seen: set[str] = field(default_factory=set)
    """What answers by way of the proxy have said of who sends them."""
    obeyed: set[str] = field(default_factory=set)
    """The sources of rules by which the proxy has sent a file."""

    async def lines(self, files: Sequence[str], only: bool) -> AsyncGenerator[Line, None]:
        wanted, unknown = await anyio.to_thread.run_sync(self._wanted, files, only)
        if not wanted:
            raise ConfigurationError(
                "there is no file to ask for: give each route an `example` in the settings, or a path with --file"
            )
        for line in unknown:
            yield line
        found: list[_File] = []
        for one in wanted:
            line, file = await self._source(one)
            yield line
            if file is not None:
                found.append(file)
        for file in found:
            yield await self._application(file)
        if self.proxy is None:
            came = "not checked: give the URL at which clients reach it"
            yield Line(result="skip", step="proxy", route="", asked="the proxy", came=came)
            return
        try:
            async for line in self._proxy_alone(found):
                yield line
        except NoAnswerError as exc:
            asked = f"GET {_shown_url(self.proxy.base)}"
            remedy = "start the proxy, or give the URL at which clients reach it"
            yield Line(result="FAIL", step="proxy", route="", asked=asked, came=str(exc), remedy=remedy)
            return
        for file in found:
            async for line in self._together(file):
                yield line

    # --- which files

    def _wanted(self, files: Sequence[str], only: bool) -> tuple[list[_Wanted], list[Line]]:
        """Return the files to ask for, and a line for each route that has none."""
        given: dict[str, list[str]] = {}
        for path in files:
            target = quote(path, safe="/%:@!$&'()*+,;=~")
            endpoint, _ = self._route_of(target)
            if endpoint is None or not isinstance(endpoint.endpoint, Download):
                raise ConfigurationError(f"{path!r} is the path of no route: give one such as /files/a.txt")
            given.setdefault(endpoint.path, []).append(target)
        wanted: list[_Wanted] = []
        unknown: list[Line] = []
        for route in self.settings.routes:
            before, after = (quote(part) for part in _PARAMETER.split(route.path))
            names = [] if only else route.examples or self._found(route)
            targets = given.get(route.path) or [before + quote(name) + after for name in names]
            wanted += [_Wanted(route, target, thorough=number == 0) for number, target in enumerate(targets)]
            if not targets:
                came = "not checked: only the paths of --file are" if only else "not checked: no file is known"
                remedy = "give the route an `example` in the settings, or a path with --file"
                line = Line(result="skip", step="source", route=route.path, asked="a file", came=came, remedy=remedy)
                unknown.append(line)
        return wanted, unknown

    def _found(self, route: RouteSettings) -> list[str]:
        """Return the name of the first file of a local directory, and of one whose name needs an encoding."""
        directory = directory_of(self.settings.sources[route.source])
        convertor = _PARAMETER.findall(route.path)[0].strip("{}").partition(":")[2]
        if directory is None or convertor not in ("", "str", "path"):
            return []
        names = names_in(Path(directory), convertor == "path")
        plain = [name for name in names if _PLAIN.fullmatch(name)]
        # a percent sign tells encodings apart best
        others = sorted((name for name in names if not _PLAIN.fullmatch(name)), key=lambda name: "%" not in name)
        return [*plain[:1], *others[:1]]

    def _route_of(self, target: str) -> tuple[Route | None, str]:
        """Return the route that answers a path, and the key that it asks its source for."""
        scope = {"type": "http", "method": "GET", "path": unquote(target), "root_path": "", "headers": []}
        for route in self.app.router.routes:
            if isinstance(route, Route):
                match, found = route.matches(scope)
                if match is Match.FULL:
                    return route, "".join(str(value) for value in found["path_params"].values())
        return None, ""

    # --- 1: the source

    async def _source(self, wanted: _Wanted) -> tuple[Line, _File | None]:
        asked = f"read {wanted.target}"
        name, _ = source_of_files(wanted.route.source, self.settings.sources)
        remedy = f"see that what [sources.{name}] names can be reached"
        try:
            with anyio.fail_after(self.timeout):
                file, metadata, content = await self._read(wanted)
            said = await self.here.ask(wanted.target, method="HEAD")
            if (file.location or "").startswith("http"):
                # A proxy fetches it for a GET alone. Without one, this is one byte.
                order = await self.here.ask(wanted.target, headers={"Range": "bytes=0-0"})
                said = order if order.orders else said
            if said.status == 200:
                came = "of unknown size" if content.size is None else f"{content.size} bytes"
                return _passed("source", wanted, asked, came), _File(wanted, file, metadata, content, said)
            came = f"the settings answer {said.status}"
        except FileMissing as exc:
            came, remedy = f"missing: {exc}", "give a file that is there: `example` of the route, or --file"
        except AccessDenied as exc:
            came, remedy = f"not allowed: {exc}", "let this user read the file, or run this as the service's user"
        except (TimeoutError, NoAnswerError):
            came = f"not read within {self.timeout:g} s"
        except Exception as exc:  # whatever a source raises, and a function of the user's
            came = f"{type(exc).__name__}: {exc}"
        return _failed("source", wanted, asked, came, remedy), None

    async def _read(self, wanted: _Wanted) -> tuple[AsyncFile, FileMetadata, Content]:
        route, key = self._route_of(wanted.target)
        if route is None or route.path != wanted.route.path:
            raise FileMissing(f"{'no route' if route is None else route.path} answers this path")
        assert isinstance(route.endpoint, Download)
        file = await route.endpoint.source.resolve(key)
        return (file, *await content_of(file))

    def _rule_of(self, file: _File) -> RuleSettings | None:
        """Return the rule by which a file is offloaded, or could be but for its name."""
        places = [file.file.location or "", *map(unquote, file.said.orders.values())]
        rules = [
            rule
            for rule in self.settings.offload.rules
            for prefix in (rule.source, rule.target or rule.source)
            if any(place.startswith(f"{prefix.rstrip('/')}/") for place in places)
        ]
        return max(rules, key=lambda rule: len(rule.source), default=None)

    # --- 2: the application alone

    async def _application(self, file: _File) -> Line:
        asked = f"GET {file.target}"
        if self.alone is None:
            return _skipped("application", file.wanted, asked, "give the address of the service with --direct")
        try:
            answer = await self.alone.ask(file.target)
        except NoAnswerError as exc:
            remedy = f"start the service at {self.service}, or give its address with --direct"
            return _failed("application", file.wanted, asked, str(exc), remedy)
        came, remedy = self._misfit(file, answer)
        if remedy:
            remedy = f"the service does not run with these settings: {remedy}"
            return _failed("application", file.wanted, asked, came, remedy)
        file.alone = answer
        if answer.status == 307 or answer.orders:
            return _passed("application", file.wanted, asked, came)
        reason, remedy = self._why_streamed(file)
        if remedy:
            return _failed("application", file.wanted, asked, f"{came}{reason}", remedy)
        return _passed("application", file.wanted, asked, f"{came}{reason}")

    def _misfit(self, file: _File, answer: Answer) -> tuple[str, str]:
        """Return what the live application answers, and what the settings have it do instead, or nothing."""
        came = f"{answer.status}{_shown(answer.orders)}"
        if answer.status == 307 and file.route.send == "redirect":
            return f"307 to {urlsplit(answer.get('location') or '').netloc}", ""
        if answer.status != 200:
            return came, "it does not find the file, or its user may not read it"
        for name in _SAID:
            if answer.get(name) != file.said.get(name):
                return f"{came}, {name}: {answer.get(name)}", f"they say {name}: {file.said.get(name)}"
        _, source = source_of_files(file.route.source, self.settings.sources)
        if cache_of(source) is not None and bool(answer.orders) != file.offloaded:
            file.said = answer  # what is in the cache is offloaded, and the rest is streamed until it is there
        if _unsigned(answer.orders) != _unsigned(file.said.orders):
            backend = self.settings.offload.backend
            if not answer.orders:
                remedy = f'they have [offload] backend = "{backend}" (DOWNLOADVIEW_OFFLOAD__BACKEND={backend})'
                return f"{came}, streamed", remedy
            return came, f"they say{_shown(file.said.orders, '')}" if file.offloaded else "they stream this file"
        if answer.orders:
            alone = answer.get("content-length") == "0" and not answer.body
            return f"{came}, and {len(answer.body)} bytes", "" if alone else "they send no bytes with it"
        came = f"{came}, streamed"
        if not file.content.begins(answer.body):
            return f"{came}, other bytes", "its files differ" if file.repeatable else ""
        lost = [name for name in ("Accept-Ranges", "ETag") if file.said.get(name) and not answer.get(name)]
        return came, f"they send {lost[0]}" if lost else ""

    def _why_streamed(self, file: _File) -> tuple[str, str]:
        """Return why the service itself sends a file, and what mends it where that is not what is wanted."""
        location = file.file.location
        if self.settings.offload.backend is None:
            return "", ""
        if file.route.send == "stream":
            return ': send = "stream"', ""
        if file.said.get("content-encoding"):
            return ": its content is encoded", ""
        if location is None:
            reason, remedy = ": it is nowhere where a proxy could find it", "give its source a [sources.NAME.cache]"
        elif self._rule_of(file) is not None:
            reason, remedy = f": no header of this kind can name {location!r}", "give the file another name"
        else:
            _, source = source_of_files(file.route.source, self.settings.sources)
            reason = f": no rule covers {location}"
            remedy = f'[[offload.rules]] source = "{directory_of(source) or os.path.dirname(location)}"'
            for rule in self.settings.offload.rules:
                if os.path.realpath(location).startswith(f"{os.path.realpath(rule.source)}/"):
                    return f"{reason}: that for {rule.source} leads there by way of a link", remedy
        return reason, remedy if file.route.send == "proxy" else ""

    # --- 3: the proxy alone

    async def _proxy_alone(self, found: Sequence[_File]) -> AsyncIterator[Line]:
        assert self.proxy is not None
        # what the proxy refuses by itself tells best who it is
        for target in ("/../", "/%00"):
            with suppress(ClosedError):
                self._see(await self.proxy.ask(target, root=True))
        rules = self.settings.offload.rules if self.settings.offload.backend else []
        if not rules:
            came = "there is no offload.backend, and so nothing that only the proxy may reach"
            yield Line(result="skip", step="proxy", route="", asked="internal locations", came=came)
        for rule in rules:
            file = next((file for file in found if file.offloaded and self._rule_of(file) == rule), None)
            for target in self._inner_targets(rule, file):
                if (await self.here.ask(target, method="HEAD")).status == 200:
                    continue  # a page of the service itself
                result: Result = "pass"
                came, remedy = "refused", ""
                try:
                    answer = await self.proxy.ask(target, root=True)
                except ClosedError:
                    pass
                else:
                    came = f"{answer.status}, refused"
                    if answer.status in (200, 206):
                        result, came = "FAIL", f"{answer.status}: it is open to everybody"
                        remedy = self._advice("open", rule)
                    elif answer.status >= 500:
                        result, came, remedy = "FAIL", str(answer.status), self._advice("unreached", rule)
                where = rule.target or rule.source
                yield Line(result=result, step="proxy", route=where, asked=f"GET {target}", came=came, remedy=remedy)

    def _inner_targets(self, rule: RuleSettings, file: _File | None) -> list[str]:
        """Return paths by which a client could come to the files of a rule without the service."""
        source, location = rule.source.rstrip("/"), "" if file is None else file.file.location or ""
        rest = quote(location.removeprefix(f"{source}/")) if location.startswith(f"{source}/") else ""
        name = quote(source.rpartition("/")[2])
        if self.settings.offload.backend in ("apache", "lighttpd"):
            return [f"{quote(source)}/{rest}", f"/{name}/{rest}", f"/{rest}"] if rest else []
        target = rule.target or ""
        return [
            target + rest,
            f"/%{ord(target[1]):02X}{target[2:]}{rest}",
            f"/{target}{rest}",
            f"{target.upper()}{rest}",
            f"{target.rstrip('/')}../{name}/{rest}",
        ]

    def _see(self, answer: Answer) -> None:
        said = f"{answer.get('server')} {answer.get('via')}".lower()
        self.seen.update(kind for kind in _KINDS if kind in said)

    # --- 4: both together

    async def _together(self, file: _File) -> AsyncIterator[Line]:
        assert self.proxy is not None
        asked = f"GET {file.target}"
        try:
            whole = await self.proxy.ask(file.target)
            came, remedy = self._whole(file, whole)
            if remedy:
                yield _failed("together", file.wanted, asked, came, remedy)
                if file.wanted.thorough:
                    yield _skipped("together", file.wanted, f"{asked}: the rest", "the file has not come")
                return
            yield _passed("together", file.wanted, asked, came)
            if whole.status == 307:
                return
            for line in self._headers(file, whole):
                yield line
            if file.wanted.thorough:
                for step in (self._head, self._ranges, self._conditions, self._encodings, self._names, self._orders):
                    async for line in step(file, whole):
                        yield line
        except NoAnswerError as exc:
            remedy = f"{self._advice('unreached', self._rule_of(file))}; a slow answer needs a longer --timeout"
            yield _failed("together", file.wanted, asked, str(exc), remedy)

    def _whole(self, file: _File, answer: Answer) -> tuple[str, str]:
        """Return what came in place of a file, and what mends it: nothing where it is the file."""
        self._see(answer)
        came = f"{answer.status}{_shown(answer.orders)}"
        backend, rule = self.settings.offload.backend, self._rule_of(file)
        if answer.status == 307 and file.route.send == "redirect":
            place, own = answer.get("location"), None if file.alone is None else file.alone.get("location")
            if place and (own is None or urlsplit(place)[:3] == urlsplit(own)[:3]):
                return f"307 to {urlsplit(place).netloc}", ""
            return f"307 to {(place or '').partition('?')[0]}", self._advice("streamed header", rule, header="Location")
        if 300 <= answer.status < 400:
            return f"{came} to {(answer.get('location') or '').partition('?')[0]}", "give the URL that it leads to"
        if answer.status in (502, 503, 504):
            elsewhere = file.offloaded and rule is not None and not rule.source.startswith("/")
            return came, self._advice("not fetched" if elsewhere else "unreached", rule)
        if answer.orders:
            header = next(iter(answer.orders))
            came = f"{came}, {len(answer.body)} bytes"
            if answer.body:
                return came, self._advice("leaked", rule, header=header)
            if self.seen and backend not in self.seen:
                (kind, *_) = sorted(self.seen)
                return came, f'[offload] backend = "{kind}": this is {kind}, which does not obey {header}'
            if header not in file.said.orders:
                return came, f"the service does not run with these settings: they say{_shown(file.said.orders, '')}"
            return came, self._advice("not obeyed", rule)
        if answer.status in (403, 404):
            return came, self._why_not_found(file)
        if answer.status != 200:
            return came, f"see the log of the proxy: the service itself, at {self.service}, answers 200"
        if not file.content.begins(answer.body):
            if not answer.body:
                return f"{came}, no bytes", self._advice("not obeyed", rule)
            if answer.get("content-encoding") != file.said.get("content-encoding"):
                return f"{came}, Content-Encoding: {answer.get('content-encoding')}", self._advice("encoded", rule)
            if file.repeatable:
                return f"{came}, other bytes", self._advice("other bytes", rule)
            return f"{came}, made anew for each request", ""
        size = file.content.size
        if size is not None and file.metadata.size is not None and answer.get("content-length") != str(size):
            return f"{came}, Content-Length: {answer.get('content-length')} of {size}", self._lost("encoded", file)
        if rule is not None:
            self.obeyed.add(rule.source)
        if file.offloaded and file.alone is not None:
            # from outside it cannot be seen who sends; but the service, which has been asked, sends no byte of it
            return f"{came}, the right bytes, which the service alone does not send", ""
        return f"{came}, the right bytes", ""

    def _why_not_found(self, file: _File) -> str:
        rule = self._rule_of(file)
        if not file.offloaded:
            return self._advice("not passed on", rule)
        location = file.file.location or ""
        if not location.startswith("/"):
            return self._advice("not fetched", rule)
        if (found := closed_to_others(location)) is not None:
            path, mode = found
            closed = self._advice("unreadable", rule, path=path, mode=mode)
            return f"{closed}; else {self._advice('not found', rule)}"
        by_name = rule is not None and rule.source in self.obeyed and not _PLAIN.fullmatch(location)
        return self._advice("other bytes" if by_name else "not found", rule)

    def _headers(self, file: _File, whole: Answer) -> Iterator[Line]:
        """Compare what the application says of the file with what the client hears."""
        said = file.alone or file.said
        # of a streamed file they are the service's own; if that one is not at hand, it is enough that there are some
        validators = [
            name
            for name in ("ETag", "Last-Modified")
            if not file.offloaded and (file.alone is not None or not whole.get(name))
        ]
        changed = [name for name in (*_SAID, *validators) if whole.get(name) != said.get(name)]
        if file.offloaded and self.settings.offload.backend == "h2o":
            changed = [name for name in changed if name != "Content-Type"]  # H2O goes by the name of the file
        if (said.get("content-security-policy") or "") in (whole.get("content-security-policy") or ""):
            changed = [name for name in changed if name != "Content-Security-Policy"]  # a stricter one is no loss
        # what came, which advice, and for which header
        problems = [(f"{name}: {whole.get(name)}, for {said.get(name)}", "header", name) for name in changed]
        if whole.get("set-cookie") != said.get("set-cookie"):
            problems.append((f"Set-Cookie: {whole.get('set-cookie')}", "cookie", "Set-Cookie"))
        names = [name for name, _ in whole.headers]
        twice = [name for name in _ONCE if names.count(name) > 1]
        problems += [(f"{name} comes {names.count(name)} times", "header", name) for name in twice]
        if file.offloaded and not whole.get("etag") and not whole.get("last-modified"):
            problems.append(("no ETag and no Last-Modified", "conditions", "ETag"))
        asked = f"GET {file.target}: headers"
        for came, problem, name in problems:
            yield _failed("together", file.wanted, asked, came, self._lost(problem, file, header=name))
        if not problems:
            yield _passed("together", file.wanted, asked, "as the service says them")

    async def _head(self, file: _File, whole: Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, method="HEAD")
        asked = f"HEAD {file.target}"
        differ = [name for name in _OF_BOTH if answer.get(name) != whole.get(name)]
        if file.metadata.size is None:
            differ = [name for name in differ if name not in ("content-length", "accept-ranges")]
        if answer.status != 200 or answer.orders or answer.body:
            came, remedy = f"{answer.status}{_shown(answer.orders)}", self._lost("ranges", file)
            yield _failed("together", file.wanted, asked, came, remedy)
        elif differ:
            came = f"200, {differ[0]}: {answer.get(differ[0])}, for {whole.get(differ[0])}"
            remedy = self._lost("header", file, header=differ[0])
            yield _failed("together", file.wanted, asked, came, remedy)
        else:
            yield _passed("together", file.wanted, asked, "200, the headers of GET and no body")

    async def _ranges(self, file: _File, whole: Answer) -> AsyncIterator[Line]:
        size = file.content.size
        if not file.ranged or not size or not file.repeatable:
            reason = "the file is empty" if size == 0 else "the file has no ranges: it is made as it is sent"
            yield _skipped("together", file.wanted, f"GET {file.target} Range", reason)
            return
        middle, length = size // 2, min(_PART, size - size // 2)
        tail = min(_PART, size)
        parts = [
            ("bytes=0-0", 0, 1),
            (f"bytes={middle}-{middle + length - 1}", middle, middle + length),
            (f"bytes=-{tail}", size - tail, size),
        ]
        for value, start, stop in parts:
            answer = await self._ask(file, Range=value)
            place = f"bytes {start}-{stop - 1}/{size}"
            right = answer.status == 206 and answer.get("content-range") == place and not answer.orders
            right = right and answer.body == file.content.part(start, stop)
            came = f", Content-Range: {answer.get('content-range')}, {len(answer.body)} bytes"
            yield await self._judged(right, file, {"Range": value}, answer, "ranges", came)
        answer = await self._ask(file, Range=f"bytes={size}-")
        yield await self._judged(answer.status == 416, file, {"Range": f"bytes={size}-"}, answer, "ranges")
        etag, modified = whole.get("etag"), whole.get("last-modified")
        version = modified if etag is None or etag.startswith("W/") else etag
        if version is None:
            yield _skipped("together", file.wanted, f"GET {file.target} If-Range", "it has no validator")
            return
        last = f"bytes={size - 1}-"
        answer = await self._ask(file, **{"Range": last, "If-Range": version})
        right = answer.status == 206 and answer.body == file.content.part(size - 1, size)
        yield await self._judged(right, file, {"Range": last, "If-Range": version}, answer, "ranges")
        answer = await self._ask(file, **{"Range": last, "If-Range": _STALE})
        right = answer.status == 200 and file.content.begins(answer.body)
        yield await self._judged(right, file, {"Range": last, "If-Range": _STALE}, answer, "ranges")

    async def _conditions(self, file: _File, whole: Answer) -> AsyncIterator[Line]:
        for name, header in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified")):
            if (value := whole.get(header)) is None:
                continue  # one that is lost has been found to be
            answer = await self._ask(file, **{name: value})
            right = answer.status == 304 and not answer.body and not answer.orders
            yield await self._judged(right, file, {name: value}, answer, "conditions")
        answer = await self._ask(file, **{"If-None-Match": _STALE})
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        yield await self._judged(right, file, {"If-None-Match": _STALE}, answer, "conditions")

    async def _encodings(self, file: _File, whole: Answer) -> AsyncIterator[Line]:
        coding = {"Accept-Encoding": "gzip, br, zstd"}
        answer = await self._ask(file, **coding)
        own = await self.here.ask(file.target, method="HEAD", headers=coding)
        got, wanted = answer.get("content-encoding"), own.get("content-encoding")
        came = f", Content-Encoding: {got}"
        right = answer.status == 200 and got == wanted
        if right and file.ranged and answer.get("accept-ranges") != whole.get("accept-ranges"):
            right, came = False, f"{came}, Accept-Ranges: {answer.get('accept-ranges')}"
        yield await self._judged(right, file, coding, answer, "encoded", came)

    async def _names(self, file: _File, whole: Answer) -> AsyncIterator[Line]:
        """Ask for what is none of the source's business, in the spellings that proxies are known to undo."""
        assert self.proxy is not None
        before = quote(_PARAMETER.split(file.route.path)[0])
        name = file.target[len(before) :]
        outside = "etc/passwd"
        targets = [
            f"{before}no-such-file-{secrets.token_hex(4)}",
            f"{before}{'../' * 9}{outside}",
            f"{before}{'%2e%2e/' * 9}{outside}",
            f"{before}{'..%2f' * 9}{outside.replace('/', '%2f')}",
            f"{before}{'..%5c' * 9}{outside.replace('/', '%5c')}",
            f"{before}{name}%00",
            f"{before}/{outside}",
            f"{before}x%2F..%2F{name}",
        ]
        for number, target in enumerate(targets):
            try:
                answer = await self.proxy.ask(target)
            except ClosedError:
                yield _passed("together", file.wanted, f"GET {target}", "refused")
                continue
            came = f"{answer.status}{_shown(answer.orders)}"
            if 400 <= answer.status < 500 and not answer.orders:
                yield _passed("together", file.wanted, f"GET {target}", came)
            else:
                problem = "unreached" if answer.status >= 500 else "decoded" if number else "not passed on"
                remedy = self._advice(problem, self._rule_of(file))
                yield _failed("together", file.wanted, f"GET {target}", came, remedy)

    async def _orders(self, file: _File, whole: Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, **_ORDERS_OF_A_CLIENT)
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        right = right and all(answer.get(name) == whole.get(name) for name in _OF_BOTH)
        came = ", the same answer" if right else ", another answer"
        yield await self._judged(right, file, _ORDERS_OF_A_CLIENT, answer, "order", came)

    # --- how it is said

    async def _ask(self, file: _File, *, method: str = "GET", **headers: str) -> Answer:
        assert self.proxy is not None
        return await self.proxy.ask(file.target, method=method, headers=headers)

    async def _judged(
        self, right: bool, file: _File, headers: Mapping[str, str], answer: Answer, problem: str, came: str = ""
    ) -> Line:
        asked, came = f"GET {file.target}{_shown(headers, '')}", f"{answer.status}{came}"
        if right:
            return _passed("together", file.wanted, asked, came)
        streamed = not file.offloaded and problem in ("ranges", "conditions")
        if streamed and file.alone is not None and self.alone is not None:
            alone = await self.alone.ask(file.target, headers=headers)
            if alone.status == answer.status and alone.body == answer.body:
                return _skipped("together", file.wanted, asked, f"the service alone answers {came}, too")
        return _failed("together", file.wanted, asked, came, self._lost(problem, file))

    def _lost(self, problem: str, file: _File, **facts: str) -> str:
        """Return what mends something that is another's to do for a file that is streamed."""
        streamed = not file.offloaded and problem in ("ranges", "conditions", "header")
        return self._advice(f"streamed {problem}" if streamed else problem, self._rule_of(file), **facts)

    def _advice(self, problem: str, rule: RuleSettings | None, **facts: str) -> str:
        backend: str | None = self.settings.offload.backend
        if backend is None and len(self.seen) == 1:
            (backend,) = self.seen
        if rule is not None:
            facts |= {"directory": rule.source.rstrip("/"), "target": rule.target or rule.source}
        if (header := facts.get("header")) is not None:
            facts["variable"] = header.lower().replace("-", "_")
        return advice(problem, backend, service=self.service, **facts)


def _passed(step: Step, wanted: _Wanted, asked: str, came: str) -> Line:
    return Line(result="pass", step=step, route=wanted.route.path, asked=asked, came=came)


def _failed(step: Step, wanted: _Wanted, asked: str, came: str, remedy: str) -> Line:
    return Line(result="FAIL", step=step, route=wanted.route.path, asked=asked, came=came, remedy=remedy)


def _skipped(step: Step, wanted: _Wanted, asked: str, reason: str) -> Line:
    return Line(result="skip", step=step, route=wanted.route.path, asked=asked, came=f"not checked: {reason}")


def _unsigned(orders: Mapping[str, str]) -> dict[str, str]:
    """Return orders without the signature of what a proxy asks a store for: that is another one each second."""
    return {name: value.partition("?")[0] if name == "x-offload-target" else value for name, value in orders.items()}


def _shown(headers: Mapping[str, str], comma: str = ",") -> str:
    return "".join(f"{comma} {name}: {value}" for name, value in _unsigned(headers).items())
