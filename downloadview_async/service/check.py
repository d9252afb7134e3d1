"""`downloadview check`: asks a live installation what the settings promise of it, in four steps.

The source alone, the application alone, the proxy alone, and both together. What the application has to say is asked
of the same settings in this very process. At most a few pieces of each file are read, however large it is.
"""

import os
import re
import secrets
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import anyio
import httpx2
from starlette.applications import Starlette
from starlette.routing import Match, Route

from downloadview_async import (
    AccessDenied,
    AsyncFile,
    ByteRange,
    ConfigurationError,
    Download,
    FileError,
    FileMetadata,
    FileMissing,
    TransferAborted,
    __version__,
)
from downloadview_async.service.advice import advice
from downloadview_async.service.build import build
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

_PIECE = 64 << 10  # bytes
_MOST = 3 * _PIECE
"""What is read of one answer, and of one source: all of a smaller file, of a larger one its begin, middle and end."""

_PART = 1024  # bytes of a range that is asked for
_MOST_ENTRIES = 1000  # of a directory that is searched for a file to ask for
_ORDER = re.compile("x-(?:accel-.+|sendfile.*|lighttpd-send-file|litespeed-location|reproxy-url)")
_PARAMETER = re.compile("{[^}]*}")
_PLAIN = re.compile("/?[A-Za-z0-9_][A-Za-z0-9_./~-]*")
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

    remedy: what mends it, where it has failed; the reason, where it was skipped.
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
    timeout: float = 10.0,
) -> AsyncGenerator[Line, None]:
    """Yield the checks as they are made.

    url: where clients reach the service, by way of the proxy; without it there is no proxy to check. direct: where the
    service itself listens; default: where the settings say so. files: paths of URLs to ask for, such as
    /files/a%20b.txt; default: the examples of each route, and of a local directory the first files found there.
    timeout: seconds that the source, and each request, may take.

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
        here = await stack.enter_async_context(_Peer.of_app(app, timeout))
        alone = await stack.enter_async_context(_Peer.direct(settings, direct, timeout))
        proxy = None if url is None else await stack.enter_async_context(_Peer.at(url, timeout))
        run = _Run(settings, app, here, alone, proxy, timeout, _service_of(settings, direct))
        async with aclosing(run.lines(files)) as lines:
            async for line in lines:
                yield line


# --- what is asked, and by whom


class _NoAnswerError(Exception):
    """There is no answer, or no whole one."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer: its headers with names in lower case, and as much of its body as was wanted."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def get(self, name: str) -> str | None:
        """Return a header; one that comes more than once is a list."""
        values = [value for known, value in self.headers if known == name.lower()]
        return ", ".join(values) if values else None

    @property
    def orders(self) -> dict[str, str]:
        """The headers for a proxy."""
        return {name: value for name, value in self.headers if _ORDER.fullmatch(name)}


@dataclass(frozen=True, slots=True)
class _Peer:
    """Who is asked. Paths are sent as they are spelled."""

    client: httpx2.AsyncClient
    base: str
    prefix: str
    timeout: float
    spelled: bool = True

    @classmethod
    @asynccontextmanager
    async def of_app(cls, app: Starlette, timeout: float) -> AsyncIterator["_Peer"]:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
            yield cls(client, "http://localhost", "", timeout, spelled=False)

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str, timeout: float, *, uds: str | None = None) -> AsyncIterator["_Peer"]:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment:
            raise ConfigurationError(f"{url!r} is no URL of a server: give one such as http://127.0.0.1:8080")
        transport = httpx2.AsyncHTTPTransport(uds=uds, trust_env=False)
        # no environment: its proxies are not those that are checked
        async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=timeout) as client:
            yield cls(client, f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/"), timeout)

    @classmethod
    @asynccontextmanager
    async def direct(cls, settings: Settings, url: str | None, timeout: float) -> AsyncIterator["_Peer | None"]:
        server = settings.server
        scheme = "https" if server.ssl_certfile else "http"
        if url is not None:
            async with cls.at(url, timeout) as peer:
                yield peer
        elif server.uds is not None:
            async with cls.at(f"{scheme}://localhost", timeout, uds=server.uds) as peer:
                yield peer
        elif server.fd is not None or server.port == 0:
            yield None
        else:
            async with cls.at(_service_of(settings, None), timeout) as peer:
                yield peer

    async def ask(
        self, target: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, root: bool = False
    ) -> _Answer:
        """Send a request and read up to `_MOST` bytes. root: the target is below the host, not below the URL's path.

        Raises `_NoAnswerError`.
        """
        path = target if root else self.prefix + target
        request = self.client.build_request(
            method,
            self.base if self.spelled else self.base + path,
            headers={
                "Accept-Encoding": "identity",
                "User-Agent": f"downloadview-check/{__version__}",
                **(headers or {}),
            },
            extensions={"target": path.encode("ascii")} if self.spelled else None,
        )
        body = bytearray()
        try:
            with anyio.fail_after(self.timeout):
                response = await self.client.send(request, stream=True, follow_redirects=False)
                try:
                    async with aclosing(response.aiter_raw(_PIECE)) as blocks:
                        async for block in blocks:
                            body += block
                            if len(body) >= _MOST:
                                break
                finally:
                    await response.aclose()
        except TimeoutError:
            raise _NoAnswerError(f"no answer within {self.timeout:g} s") from None
        except (httpx2.HTTPError, OSError) as exc:
            raise _NoAnswerError(f"no answer: {type(exc).__name__}: {exc}") from exc
        said = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw)
        return _Answer(response.status_code, said, bytes(body[:_MOST]))


def _service_of(settings: Settings, direct: str | None) -> str:
    """Return the URL of the service itself, for a request or for people."""
    server = settings.server
    if direct is not None:
        return direct.rstrip("/")
    if server.uds is not None:
        return f"unix:{server.uds}"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(server.host, server.host)  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if server.ssl_certfile else 'http'}://{host}:{server.port}"


# --- what a file is


@dataclass(frozen=True, slots=True)
class _Content:
    """Pieces of a file, each with its offset. size: bytes, None where it is not known."""

    size: int | None
    pieces: tuple[tuple[int, bytes], ...]

    def part(self, start: int, stop: int) -> bytes | None:
        """Return the bytes from `start` up to `stop`, or None where they have not been read."""
        for offset, piece in self.pieces:
            if offset <= start and stop <= offset + len(piece):
                return piece[start - offset : stop - offset]
        return None

    def begins(self, body: bytes) -> bool:
        """Return whether an answer with the whole file may begin with these bytes, and ends where the file does."""
        known = self.pieces[0][1]
        length = min(len(known), len(body))
        whole = self.size is None or len(body) == min(self.size, _MOST)
        return whole and known[:length] == body[:length] and (self.size == 0 or length > 0)


async def _content_of(file: AsyncFile) -> tuple[FileMetadata, _Content]:
    async with file.open() as opened:
        size = opened.metadata.size
        if size is None:
            read = await _read(opened.stream(None))
            return opened.metadata, _Content(len(read) if len(read) < _MOST else None, ((0, read[:_MOST]),))
        if size <= _MOST:
            spans = [ByteRange(0, size)]
        else:
            spans = [ByteRange(start, start + _PIECE) for start in (0, size // 2, size - _PIECE)]
        pieces = [(span.start, await _read(opened.stream(span)) if len(span) else b"") for span in spans]
        for span, (_, read) in zip(spans, pieces, strict=True):
            if len(read) != len(span):
                raise TransferAborted(f"bytes {span.start} to {span.stop} cannot be read: {len(read)} came")
        return opened.metadata, _Content(size, tuple(pieces))


async def _read(blocks: AsyncIterator[bytes]) -> bytes:
    read = bytearray()
    try:
        async for block in blocks:
            read += block
            if len(read) >= _MOST:
                break
    finally:
        close = getattr(blocks, "aclose", None)
        if close is not None:
            await close()
    return bytes(read)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file to ask for. thorough: in every way; else once, as what is special about it is its name."""

    route: RouteSettings
    target: str
    thorough: bool


@dataclass(slots=True)
class _File:
    """A file that the source has given, and what these settings say of it."""

    route: RouteSettings
    target: str
    thorough: bool
    file: AsyncFile
    metadata: FileMetadata
    content: _Content
    said: _Answer
    rule: RuleSettings | None
    alone: _Answer | None = field(default=None)

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
    here: _Peer
    alone: _Peer | None
    proxy: _Peer | None
    timeout: float
    service: str
    seen: set[str] = field(default_factory=set)
    """What answers by way of the proxy have said of who sends them."""
    obeyed: set[str] = field(default_factory=set)
    """The sources of rules by which the proxy has sent a file."""

    async def lines(self, files: Sequence[str]) -> AsyncGenerator[Line, None]:
        wanted, unknown = await anyio.to_thread.run_sync(self._wanted, files)
        if not wanted:
            raise ConfigurationError(
                "there is no file to ask for: give each route an `example` in the settings, or a path with --file"
            )
        found: list[_File] = []
        for line in unknown:
            yield line
        for one in wanted:
            line, file = await self._source(one)
            yield line
            if file is not None:
                found.append(file)
        for file in found:
            yield await self._application(file)
        if self.proxy is None:
            return
        try:
            async for line in self._proxy_alone(found):
                yield line
        except _NoAnswerError as exc:
            yield Line(
                result="FAIL",
                step="proxy",
                route="",
                asked=f"GET {self.proxy.base}",
                came=str(exc),
                remedy="start the proxy, or give the URL at which clients reach it",
            )
            return
        for file in found:
            async for line in self._together(file):
                yield line

    # --- which files

    def _wanted(self, files: Sequence[str]) -> tuple[list[_Wanted], list[Line]]:
        wanted: list[_Wanted] = []
        given: dict[int, list[str]] = {}
        for path in files:
            target = quote(path, safe="/%:@!$&'()*+,;=~")
            if not target.startswith("/") or (index := self._route_of(unquote(target))) is None:
                raise ConfigurationError(f"{path!r} is the path of no route: give one such as /files/a.txt")
            given.setdefault(index, []).append(target)
        unknown: list[Line] = []
        for index, route in enumerate(self.settings.routes):
            before, after = (quote(part) for part in _PARAMETER.split(route.path))
            names = route.examples or list(self._found(route))
            targets = given.get(index) or [before + quote(name) + after for name in names]
            if files and index not in given:
                continue
            if not targets:
                remedy = "give the route an `example` in the settings, or a path with --file"
                unknown.append(
                    Line(
                        result="skip",
                        step="source",
                        route=route.path,
                        asked="a file",
                        came="not checked: no file is known",
                        remedy=remedy,
                    )
                )
            for number, target in enumerate(targets):
                wanted.append(_Wanted(route, target, thorough=number == 0))
        return wanted, unknown

    def _found(self, route: RouteSettings) -> Iterator[str]:
        """Yield the name of the first file of a local directory, and of the first whose name needs an encoding."""
        directory = directory_of(self.settings.sources[route.source])
        if directory is None:
            return
        deep = ":path}" in route.path
        plain = hostile = None
        for name in islice(_names_in(Path(directory), deep), _MOST_ENTRIES):
            if _PLAIN.fullmatch(name):
                plain = plain or name
            elif hostile is None or ("%" in name and "%" not in hostile):
                hostile = name
        yield from filter(None, (plain, hostile))

    def _route_of(self, path: str) -> int | None:
        """Return which of the settings' routes answers a path."""
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
        for route in self.app.router.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is Match.FULL:
                paths = [known.path for known in self.settings.routes]
                return paths.index(route.path) if route.path in paths else None
        return None

    # --- 1: the source

    async def _source(self, wanted: _Wanted) -> tuple[Line, _File | None]:
        asked = f"read {wanted.target}"
        problem, remedy = "", ""
        try:
            with anyio.fail_after(self.timeout):
                file, metadata, content = await self._read(wanted)
            said = await self.here.ask(wanted.target, method="HEAD")
            if said.status == 200:
                size = "of unknown size" if content.size is None else f"{content.size} bytes"
                line = self._line("pass", "source", wanted, asked, size)
                rule = self._rule_of(file.location)
                return line, _File(wanted.route, wanted.target, wanted.thorough, file, metadata, content, said, rule)
            problem = f"these settings answer {said.status}"
        except FileMissing as exc:
            problem, remedy = f"missing: {exc}", "give a file that is there: `example` of the route, or --file"
        except AccessDenied as exc:
            problem, remedy = (
                f"not allowed: {exc}",
                "let this user read the file, or run the check as the service's user",
            )
        except (FileError, TransferAborted) as exc:
            problem, remedy = f"{type(exc).__name__}: {exc}", f"see that {self._place(wanted.route)} can be reached"
        except TimeoutError:
            problem, remedy = (
                f"not read within {self.timeout:g} s",
                f"see that {self._place(wanted.route)} can be reached",
            )
        except _NoAnswerError as exc:
            problem = str(exc)
        except Exception as exc:  # what a function of the settings' own raises
            problem, remedy = f"{type(exc).__name__}: {exc}", f"correct {self._place(wanted.route)}"
        return self._line("FAIL", "source", wanted, asked, problem, remedy), None

    async def _read(self, wanted: _Wanted) -> tuple[AsyncFile, FileMetadata, _Content]:
        path = unquote(wanted.target)
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
        for route in self.app.router.routes:
            if isinstance(route, Route):
                match, child = route.matches(scope)
                if match is Match.FULL:
                    if route.path != wanted.route.path:
                        raise FileMissing(f"the route {route.path} comes first, and answers this path")
                    assert isinstance(route.endpoint, Download)
                    (key,) = child["path_params"].values()
                    file = await route.endpoint.source.resolve(str(key))
                    return (file, *await _content_of(file))
        raise FileMissing("no route answers this path")

    def _place(self, route: RouteSettings) -> str:
        return f"[sources.{source_of_files(route.source, self.settings.sources)[0]}]"

    def _rule_of(self, location: str | None) -> RuleSettings | None:
        rules = [
            rule
            for rule in self.settings.offload.rules
            if location is not None and location.startswith(f"{rule.source.rstrip('/')}/")
        ]
        return max(rules, key=lambda rule: len(rule.source), default=None)

    # --- 2: the application alone

    async def _application(self, file: _File) -> Line:
        asked = f"GET {file.target}"
        if self.alone is None:
            remedy = "give the address of the service with --direct"
            return self._line("skip", "application", file, asked, "not checked: no address is known", remedy)
        try:
            answer = await self.alone.ask(file.target)
        except _NoAnswerError as exc:
            remedy = f"start the service at {self.service}, or give its address with --direct"
            return self._line("FAIL", "application", file, asked, str(exc), remedy)
        file.alone = answer
        came = f"{answer.status}{_shown(answer.orders)}"
        same = "start the service again, with these settings: "
        if answer.status == 307 and file.route.send == "redirect":
            return self._line(
                "pass", "application", file, asked, f"307 to {urlsplit(answer.get('location') or '').netloc}"
            )
        if answer.status != 200:
            remedy = f"{same}it does not find the file, or its user may not read it"
            return self._line("FAIL", "application", file, asked, came, remedy)
        for name in _SAID:
            if answer.get(name) != file.said.get(name):
                came = f"{answer.status}, {name}: {answer.get(name)}"
                return self._line(
                    "FAIL", "application", file, asked, came, f"{same}they say {name}: {file.said.get(name)}"
                )
        if file.offloaded and answer.orders:
            if answer.orders != file.said.orders:
                remedy = f"{same}they say{_shown(file.said.orders, '')}"
            elif answer.get("content-length") != "0" or answer.body:
                came, remedy = f"{came}, and {len(answer.body)} bytes", "see what changes the answers of the service"
            else:
                return self._line("pass", "application", file, asked, f"{came}, and no bytes")
            return self._line("FAIL", "application", file, asked, came, remedy)
        if answer.orders:
            remedy = f"{same}they have the service stream this file"
            return self._line("FAIL", "application", file, asked, came, remedy)
        came = f"{came}, streamed"
        if file.offloaded and cache_of(source_of_files(file.route.source, self.settings.sources)[1]) is None:
            backend = self.settings.offload.backend
            remedy = f'{same}they have [offload] backend = "{backend}" (DOWNLOADVIEW_OFFLOAD__BACKEND={backend})'
            return self._line("FAIL", "application", file, asked, came, remedy)
        if not file.content.begins(answer.body):
            if not file.repeatable:
                return self._line("pass", "application", file, asked, f"{came}, made anew for each request")
            return self._line("FAIL", "application", file, asked, f"{came}, other bytes", f"{same}its files differ")
        for name in ("accept-ranges", "etag"):
            if not file.offloaded and file.said.get(name) and not answer.get(name):
                return self._line("FAIL", "application", file, asked, f"{came}, no {name}", f"{same}they send {name}")
        result, reason, remedy = self._why_streamed(file)
        return self._line(result, "application", file, asked, f"{came}{reason}", remedy)

    def _why_streamed(self, file: _File) -> tuple[Result, str, str]:
        """Return whether a file may be streamed by the service, and why it is."""
        location = file.file.location
        if self.settings.offload.backend is None or file.offloaded:
            return "pass", "", ""
        if file.route.send == "stream":
            return "pass", ': send = "stream"', ""
        if file.said.get("content-encoding"):
            return "pass", ": its content is encoded", ""
        if location is None:
            reason, remedy = ": it has no place that a proxy could find", "give its source a [sources.NAME.cache]"
        elif file.rule is not None:
            reason, remedy = f": {location!r} cannot be said in a header of this kind", "give the file another name"
        else:
            for rule in self.settings.offload.rules:
                real = os.path.realpath(rule.source)
                if rule.source.startswith("/") and os.path.realpath(location).startswith(f"{real}/"):
                    reason = f": the rule for {rule.source} leads to it by way of a link"
                    return "FAIL", reason, f'[[offload.rules]] source = "{os.path.dirname(location)}"'
            reason, remedy = f": no rule covers {location}", f'[[offload.rules]] source = "{os.path.dirname(location)}"'
        return ("FAIL", reason, remedy) if file.route.send == "proxy" else ("pass", reason, "")

    # --- 3: the proxy alone

    async def _proxy_alone(self, found: Sequence[_File]) -> AsyncIterator[Line]:
        assert self.proxy is not None
        # what the proxy refuses by itself tells best who it is
        for target in ("/../", "/%00"):
            self._see(await self.proxy.ask(target, root=True))
        if self.settings.offload.backend is None:
            yield Line(
                result="skip",
                step="proxy",
                route="",
                asked="internal locations",
                came="there is no offload.backend, and so nothing that only the proxy may reach",
            )
            return
        for rule in self.settings.offload.rules:
            file = next((file for file in found if file.rule is rule and file.offloaded), None)
            for target in self._inner_targets(rule, file):
                answer = await self.proxy.ask(target, root=True)
                own = await self.here.ask(target, method="HEAD")
                if own.status == 200:
                    continue  # the service's own page, whatever the proxy has there
                came = str(answer.status)
                where = rule.target or rule.source
                line = Line(result="pass", step="proxy", route=where, asked=f"GET {target}", came=f"{came}, refused")
                if answer.status in (200, 206):
                    yield self._failed(line, f"{came}: it is open to everybody", self._advice("open", rule))
                elif answer.status >= 500:
                    yield self._failed(line, came, self._advice("unreached", rule))
                else:
                    yield line

    def _inner_targets(self, rule: RuleSettings, file: _File | None) -> list[str]:
        """Return paths by which a client could come to the files of a rule without the service."""
        rest = "" if file is None else quote((file.file.location or "")[len(rule.source.rstrip("/")) + 1 :])
        name = quote(rule.source.rstrip("/").rpartition("/")[2])
        if self.settings.offload.backend in ("apache", "lighttpd"):
            return [f"{quote(rule.source.rstrip('/'))}/{rest}", f"/{name}/{rest}", f"/{rest}"] if rest else []
        target = rule.target or ""
        encoded = f"/%{ord(target[1]):02X}{target[2:]}"
        return [
            target + rest,
            f"{encoded}{rest}",
            f"/{target}{rest}",
            f"{target.upper()}{rest}",
            f"{target.rstrip('/')}../{name}/{rest}",
        ]

    def _see(self, answer: _Answer) -> None:
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
                yield self._line("FAIL", "together", file, asked, came, remedy)
                if file.thorough:
                    reason = "the file itself has not come"
                    yield self._line("skip", "together", file, "ranges, conditions, names", "not checked", reason)
                return
            yield self._line("pass", "together", file, asked, came)
            if whole.status == 307:
                return
            async for line in self._headers(file, whole):
                yield line
            if file.thorough:
                for step in (self._head, self._ranges, self._conditions, self._encodings, self._names, self._orders):
                    async for line in step(file, whole):
                        yield line
        except _NoAnswerError as exc:
            yield self._line("FAIL", "together", file, asked, str(exc), self._advice("unreached", file.rule))

    def _whole(self, file: _File, answer: _Answer) -> tuple[str, str]:
        """Return what came in place of a file, and what mends it: nothing where it is the file."""
        self._see(answer)
        came = f"{answer.status}{_shown(answer.orders)}"
        backend = self.settings.offload.backend
        if answer.status == 307 and file.route.send == "redirect":
            place, own = answer.get("location"), None if file.alone is None else file.alone.get("location")
            if place and (own is None or urlsplit(place)[:3] == urlsplit(own)[:3]):
                return f"307 to {urlsplit(place).netloc}", ""
            return f"307 to {place}", self._advice("streamed header", file.rule, header="Location")
        if 300 <= answer.status < 400:
            return f"{came} to {answer.get('location')}", "give the URL that it leads to"
        if answer.status in (502, 503, 504):
            return came, self._advice("unreached", file.rule)
        if answer.orders:
            header = next(iter(answer.orders))
            wrong = sorted(self.seen - {backend or ""})
            if wrong and (backend is None or backend not in self.seen):
                return f"{came}, {len(answer.body)} bytes", (
                    f'this is {wrong[0]}, which does not obey that: [offload] backend = "{wrong[0]}" for the service'
                )
            if header not in file.said.orders and header.startswith("x-accel") is False:
                remedy = f"start the service again with these settings: the proxy obeys{_shown(file.said.orders, '')}"
                return f"{came}, {len(answer.body)} bytes", remedy
            return f"{came}, {len(answer.body)} bytes", self._advice("not obeyed", file.rule)
        if answer.status in (403, 404):
            return came, self._why_not_found(file)
        if answer.status != 200:
            return came, f"see the log of the proxy: the service itself, at {self.service}, answers 200"
        if not file.content.begins(answer.body):
            if not answer.body:
                return f"{came}, no bytes", self._advice("not obeyed", file.rule)
            if answer.get("content-encoding") != file.said.get("content-encoding"):
                return f"{came}, Content-Encoding: {answer.get('content-encoding')}", self._advice("encoded", file.rule)
            if file.repeatable:
                return f"{came}, other bytes", self._advice("other bytes", file.rule)
            return f"{came}, made anew for each request", ""
        size = file.content.size
        if size is not None and file.metadata.size is not None and answer.get("content-length") != str(size):
            return f"{came}, Content-Length: {answer.get('content-length')} of {size}", self._lost("encoded", file)
        if file.rule is not None:
            self.obeyed.add(file.rule.source)
        if file.offloaded and (file.alone is None or file.alone.orders):
            # from outside it cannot be seen who sends; but the service, which has been asked, sends no byte of it
            return f"{came}, the right bytes, which the service alone does not send", ""
        return f"{came}, the right bytes", ""

    def _why_not_found(self, file: _File) -> str:
        if not file.offloaded:
            return self._advice("not passed on", file.rule)
        location = file.file.location or ""
        if not location.startswith("/"):
            return self._advice("not fetched", file.rule)
        if (found := _closed_to_others(location)) is not None:
            path, mode = found
            return advice("unreadable", None, path=path, mode=mode)
        obeyed = file.rule is not None and file.rule.source in self.obeyed
        by_name = obeyed and not _PLAIN.fullmatch(location)
        return self._advice("other bytes" if by_name else "not found", file.rule)

    async def _headers(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
        said = file.said if file.alone is None else file.alone
        asked = f"GET {file.target}: headers"
        failed = False
        for name in _SAID:
            if name == "Content-Type" and self.settings.offload.backend == "h2o" and file.offloaded:
                continue  # H2O goes by the name of the file
            wanted, came = said.get(name), whole.get(name)
            if wanted != came:
                failed = True
                problem = "header" if file.offloaded else "streamed header"
                remedy = self._advice(problem, file.rule, header=name, variable=name.lower().replace("-", "_"))
                yield self._line("FAIL", "together", file, asked, f"{name}: {came}, for {wanted}", remedy)
        if whole.get("set-cookie") != said.get("set-cookie"):
            failed = True
            yield self._line("FAIL", "together", file, asked, "Set-Cookie is new", self._advice("cookie", file.rule))
        names = [name for name, _ in whole.headers]
        for name in ("content-length", "etag", "last-modified", "accept-ranges", "date", "server"):
            if names.count(name) > 1:
                failed = True
                remedy = self._advice("streamed header", file.rule, header=name)
                yield self._line("FAIL", "together", file, asked, f"{name} comes {names.count(name)} times", remedy)
        validators = [name for name in ("ETag", "Last-Modified") if whole.get(name)]
        lost = [name for name in ("ETag", "Last-Modified") if said.get(name) and not whole.get(name)]
        if lost and (not file.offloaded or not validators):
            failed = True
            remedy = self._lost("conditions", file)
            yield self._line("FAIL", "together", file, asked, f"no {' and no '.join(lost)}", remedy)
        if not failed:
            yield self._line("pass", "together", file, asked, "as the service says them")

    async def _head(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, method="HEAD")
        asked = f"HEAD {file.target}"
        differ = [name for name in _OF_BOTH if answer.get(name) != whole.get(name)]
        if file.metadata.size is None:
            differ = [name for name in differ if name not in ("content-length", "accept-ranges")]
        if answer.status != 200 or answer.orders or answer.body:
            came, remedy = f"{answer.status}{_shown(answer.orders)}", self._lost("ranges", file)
            yield self._line("FAIL", "together", file, asked, came, remedy)
        elif differ:
            came = f"200, {differ[0]}: {answer.get(differ[0])}, for {whole.get(differ[0])}"
            remedy = self._lost("header", file, header=differ[0], variable=differ[0].replace("-", "_"))
            yield self._line("FAIL", "together", file, asked, came, remedy)
        else:
            yield self._line("pass", "together", file, asked, "200, the headers of GET and no body")

    async def _ranges(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
        size = file.content.size
        if not file.ranged or not size or not file.repeatable:
            reason = "the file is empty" if size == 0 else "the file has no ranges: it is made as it is sent"
            yield self._line("skip", "together", file, f"GET {file.target} Range", "not checked", reason)
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
            came = f"{answer.status}, Content-Range: {answer.get('content-range')}, {len(answer.body)} bytes"
            yield self._judged(right, file, {"Range": value}, came, "ranges")
        answer = await self._ask(file, Range=f"bytes={size}-")
        yield self._judged(answer.status == 416, file, {"Range": f"bytes={size}-"}, str(answer.status), "ranges")
        etag, modified = whole.get("etag"), whole.get("last-modified")
        version = modified if etag is None or etag.startswith("W/") else etag
        if version is None:
            yield self._line("skip", "together", file, f"GET {file.target} If-Range", "not checked", "no validator")
            return
        last = f"bytes={size - 1}-"
        answer = await self._ask(file, **{"Range": last, "If-Range": version})
        right = answer.status == 206 and answer.body == file.content.part(size - 1, size)
        yield self._judged(right, file, {"Range": last, "If-Range": version}, str(answer.status), "ranges")
        answer = await self._ask(file, **{"Range": last, "If-Range": _STALE})
        right = answer.status == 200 and file.content.begins(answer.body)
        yield self._judged(right, file, {"Range": last, "If-Range": _STALE}, str(answer.status), "ranges")

    async def _conditions(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
        for name, header in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified")):
            if (value := whole.get(header)) is None:
                continue  # one that is lost has been found to be
            answer = await self._ask(file, **{name: value})
            right = answer.status == 304 and not answer.body and not answer.orders
            yield self._judged(right, file, {name: value}, str(answer.status), "conditions")
        answer = await self._ask(file, **{"If-None-Match": _STALE})
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        yield self._judged(right, file, {"If-None-Match": _STALE}, str(answer.status), "conditions")

    async def _encodings(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
        coding = {"Accept-Encoding": "gzip, br, zstd"}
        answer = await self._ask(file, **coding)
        own = await self.here.ask(file.target, method="HEAD", headers=coding)
        got, wanted = answer.get("content-encoding"), own.get("content-encoding")
        came = f"{answer.status}, Content-Encoding: {got}"
        right = answer.status == 200 and got == wanted
        if right and file.ranged and answer.get("accept-ranges") != whole.get("accept-ranges"):
            right, came = False, f"{came}, Accept-Ranges: {answer.get('accept-ranges')}"
        yield self._judged(right, file, coding, came, "encoded")

    async def _names(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
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
        for target in targets:
            try:
                answer = await self.proxy.ask(target)
            except _NoAnswerError as exc:
                if "RemoteProtocolError" not in str(exc):
                    raise
                came, right = "the connection was closed", True
            else:
                self._see(answer)
                came, right = (
                    f"{answer.status}{_shown(answer.orders)}",
                    400 <= answer.status < 500 and not answer.orders,
                )
            remedy = "" if right else self._advice("decoded", file.rule)
            yield self._line("pass" if right else "FAIL", "together", file, f"GET {target}", came, remedy)

    async def _orders(self, file: _File, whole: _Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, **_ORDERS_OF_A_CLIENT)
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        right = right and all(answer.get(name) == whole.get(name) for name in _OF_BOTH)
        names = {", ".join(_ORDERS_OF_A_CLIENT): "of a client"}
        yield self._judged(right, file, names, f"{answer.status}, {'the same' if right else 'another'} answer", "order")

    # --- how it is said

    async def _ask(self, file: _File, *, method: str = "GET", **headers: str) -> _Answer:
        assert self.proxy is not None
        return await self.proxy.ask(file.target, method=method, headers=headers)

    def _judged(self, right: bool, file: _File, headers: Mapping[str, str], came: str, problem: str) -> Line:
        asked = f"GET {file.target}{_shown(headers, '')}"
        if right:
            return self._line("pass", "together", file, asked, came)
        return self._line("FAIL", "together", file, asked, came, self._lost(problem, file))

    def _lost(self, problem: str, file: _File, **facts: str) -> str:
        """Return what mends something that is another's to do for a file that is streamed."""
        streamed = not file.offloaded and problem in ("ranges", "conditions", "header")
        return self._advice(f"streamed {problem}" if streamed else problem, file.rule, **facts)

    def _advice(self, problem: str, rule: RuleSettings | None, **facts: str) -> str:
        backend: str | None = self.settings.offload.backend
        if backend is None and len(self.seen) == 1:
            (backend,) = self.seen
        if rule is not None:
            facts |= {"directory": rule.source.rstrip("/"), "target": rule.target or rule.source}
        return advice(problem, backend, service=self.service, **facts)

    def _line(self, result: Result, step: Step, of: _Wanted | _File, asked: str, came: str, remedy: str = "") -> Line:
        return Line(result=result, step=step, route=of.route.path, asked=asked, came=came, remedy=remedy)

    def _failed(self, line: Line, came: str, remedy: str) -> Line:
        return Line(result="FAIL", step=line.step, route=line.route, asked=line.asked, came=came, remedy=remedy)


def _shown(headers: Mapping[str, str], comma: str = ",") -> str:
    return "".join(f"{comma} {name}: {value}" for name, value in headers.items())


def _names_in(directory: Path, deep: bool) -> Iterator[str]:
    """Yield the names of regular files with something in them, in order; of those below too, if `deep`."""
    try:
        with os.scandir(directory) as entries:
            found = sorted(islice(entries, _MOST_ENTRIES), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        if entry.is_file(follow_symlinks=False) and entry.stat().st_size:
            yield entry.name
    for entry in found if deep else ():
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in _names_in(Path(entry.path), deep))


def _closed_to_others(path: str) -> tuple[str, str] | None:
    """Return the first part of a local path that not every user may pass or read, with what chmod would need to do."""
    parts = [*reversed(Path(path).parents), Path(path)]
    for part in parts:
        try:
            mode = part.stat().st_mode
        except OSError:
            return None
        if stat.S_ISDIR(mode) and not mode & stat.S_IXOTH:
            return str(part), "o+x"
        if stat.S_ISREG(mode) and not mode & stat.S_IROTH:
            return str(part), "o+r"
    return None
