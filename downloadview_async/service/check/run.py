"""`downloadview check`: asks a live installation what the settings promise of it, in four steps.

The source alone, the application alone, the proxy alone, and both together. What the application has to say is asked
of the same settings in this very process. At most a few pieces of each file are read, however large it is.
"""

import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import anyio

from downloadview_async import AccessDenied, ConfigurationError, Download, FileMissing, UpstreamError, VirtualFile
from downloadview_async.service.app import build
from downloadview_async.service.check.http import MOST, Answer, ClosedError, NoAnswerError, Peer
from downloadview_async.service.check.samples import content_of, names_in
from downloadview_async.service.check.site import (
    PARAMETER,
    PLAIN,
    SAID,
    File,
    Line,
    Result,
    Site,
    Step,
    Wanted,
    failed,
    passed,
    shown,
    shown_url,
    skipped,
    unsigned,
)
from downloadview_async.service.check.transfers import Together
from downloadview_async.service.health import LIVEZ, PADDING
from downloadview_async.service.settings import (
    DatabaseUnavailable,
    RouteSettings,
    RuleSettings,
    Settings,
    SourceSettings,
    StorageSettings,
    VirtualSettings,
    bytes_of,
    cache_of,
    directory_of,
    seconds_of,
)

__all__ = ["Line", "check"]

_LONGEST_NAME = 4_095
"""Bytes of the longest name that a source takes."""

_LONGEST_TARGET = 3 * _LONGEST_NAME + 256
"""Bytes of the longest name, each percent-encoded, with room for the path of its route."""

_OTHER_FIELDS = 2_048
"""Bytes that an answer has room for besides what tells the proxy where the file is."""

_TRIES, _PAUSE = 10, 0.1
"""How often, and after how many seconds, the service is asked again for a file that is to be in its cache."""


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
        where = f"http://unix:{uds}" if uds else shown_url(service or "http://HOST:PORT")
        site = Site(settings, app, here, alone, proxy, timeout, where)
        async with aclosing(_Run(site).lines(files, only)) as lines:
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
    return f"{scheme}://{server.address}"


# --- the four steps


class _Run:
    def __init__(self, site: Site) -> None:
        self.site = site

    async def lines(self, files: Sequence[str], only: bool) -> AsyncGenerator[Line, None]:
        wanted, unknown = await anyio.to_thread.run_sync(self._wanted, files, only)
        if not wanted:
            raise ConfigurationError(
                "there is no file to ask for: give each route an `example` in the settings, or a path with --file"
            )
        for line in unknown:
            yield line
        found: list[File] = []
        for one in wanted:
            line, file = await self._source(one)
            yield line
            if file is not None:
                found.append(file)
        for file in found:
            yield await self._application(file)
        if self.site.proxy is None:
            came = "not checked: give the URL at which clients reach it"
            yield Line(result="skip", step="proxy", route="", asked="the proxy", came=came)
            return
        try:
            async for line in self._proxy_alone(self.site.proxy, found):
                yield line
        except NoAnswerError as exc:
            asked = f"GET {shown_url(self.site.proxy.base)}"
            remedy = "start the proxy, or give the URL at which clients reach it"
            yield Line(result="FAIL", step="proxy", route="", asked=asked, came=str(exc), remedy=remedy)
            return
        together = Together(self.site, self.site.proxy)
        for file in found:
            async for line in together.lines(file):
                yield line

    # --- which files

    def _wanted(self, files: Sequence[str], only: bool) -> tuple[list[Wanted], list[Line]]:
        """Return the files to ask for, and a line for each route that has none and is not left out."""
        given: dict[str, list[str]] = {}
        for path in files:
            target = quote(path, safe="/%:@!$&'()*+,;=~")
            endpoint, _ = self.site.route_of(target)
            if endpoint is None or not isinstance(endpoint.endpoint, Download):
                raise ConfigurationError(f"{path!r} is the path of no route: give one such as /files/a.txt")
            given.setdefault(endpoint.path, []).append(target)
        wanted: list[Wanted] = []
        unknown: list[Line] = []
        for route in self.site.settings.routes:
            before, after = (quote(part) for part in PARAMETER.split(route.path))
            names = [] if only else route.examples or self._found(route)
            targets = given.get(route.path) or [before + quote(name) + after for name in names]
            wanted += [Wanted(route, target, thorough=number == 0) for number, target in enumerate(targets)]
            if not targets and not only:
                came = "not checked: no file is known"
                remedy = "give the route an `example` in the settings, or a path with --file"
                line = Line(result="skip", step="source", route=route.path, asked="a file", came=came, remedy=remedy)
                unknown.append(line)
        return wanted, unknown

    def _found(self, route: RouteSettings) -> list[str]:
        """Return the name of the first file of a local directory, and of one whose name needs an encoding."""
        directory = directory_of(self.site.settings.sources[route.source])
        convertor = PARAMETER.findall(route.path)[0].strip("{}").partition(":")[2]
        if directory is None or convertor not in ("", "str", "path"):
            return []
        names = names_in(Path(directory), convertor == "path")
        plain = [name for name in names if PLAIN.fullmatch(name)]
        # a percent sign tells encodings apart best
        others = sorted((name for name in names if not PLAIN.fullmatch(name)), key=lambda name: "%" not in name)
        return [*plain[:1], *others[:1]]

    # --- 1: the source

    async def _source(self, wanted: Wanted) -> tuple[Line, File | None]:
        asked = f"read {wanted.target}"
        name, source = self.site.source_of(wanted.route)
        bucket = _bucket_of(source)
        remedy = f"see that what [sources.{name}] names can be reached"
        try:
            with anyio.fail_after(self.site.timeout):
                file = await self.site.resolve(wanted)
                metadata, content = await content_of(file)
                # Until the second of its change is over, a file has no Last-Modified to compare.
                fresh_for = (metadata.last_modified or 0) + 1 - time.time()
                await anyio.sleep(min(max(fresh_for, 0), 1))
                if cache_of(source) is not None:
                    file = await self.site.resolve(wanted)  # by now it is there, and has a place
            said = await self.site.here.ask(wanted.target, method="HEAD")
            if (file.location or "").startswith("http"):
                # A proxy fetches it for a GET alone. Without one, this is one byte.
                order = await self.site.here.ask(wanted.target, headers={"Range": "bytes=0-0"})
                said = order if order.orders else said
            if said.status == 200:
                came = "of unknown size" if content.size is None else f"{content.size} bytes"
                return passed("source", wanted, asked, came), File(wanted, file, metadata, content, said)
            came = f"the settings answer {said.status}"
        except FileMissing as exc:
            came, remedy = f"missing: {exc}", "give a file that is there: `example` of the route, or --file"
            if bucket:
                remedy = f"{remedy}; or correct the bucket {bucket!r} in the url of [sources.{name}]"
        except AccessDenied as exc:
            came, remedy = f"not allowed: {exc}", "let this user read the file, or run this as the service's user"
            if bucket:
                remedy = f"the keys in [sources.{name}.options], and what they allow for the bucket {bucket!r}"
        except UpstreamError as exc:
            came = str(exc)
            if bucket:
                keys = f"the keys in [sources.{name}.options], and what they allow"
                remedy = f"see that the store can be reached, that it has the bucket {bucket!r}, and {keys}"
        except (TimeoutError, NoAnswerError):
            came = f"not read within {self.site.timeout:g} s"
        except Exception as exc:  # whatever a source raises, and a function of the user's
            came = f"{type(exc).__name__}: {exc}"
        return failed("source", wanted, asked, came, remedy), None

    # --- 2: the application alone

    async def _application(self, file: File) -> Line:
        asked = f"GET {file.target}"
        if self.site.alone is None:
            return skipped("application", file.wanted, asked, "give the address of the service with --direct")
        try:
            answer = await self.site.alone.ask(file.target)
            directory = self._cache_for(file) if answer.status == 200 and not answer.orders else None
            if directory is not None:
                answer = await self._asked_again(self.site.alone, file)
        except NoAnswerError as exc:
            remedy = f"start the service at {self.site.service}, or give its address with --direct"
            return failed("application", file.wanted, asked, str(exc), remedy)
        came, remedy = self._misfit(file, answer)
        if remedy:
            remedy = f"the service does not run with these settings: {remedy}"
            return failed("application", file.wanted, asked, came, remedy)
        file.alone = answer
        if directory is not None and not answer.orders:
            backend = self.site.settings.offload.backend
            remedy = (
                f"the cache keeps nothing: see the service's log, and that its user may write to {directory}; or the "
                f'service does not run with these settings, which have [offload] backend = "{backend}"'
            )
            return failed("application", file.wanted, asked, f"{came} again", remedy)
        if answer.status == 307 or answer.orders:
            return passed("application", file.wanted, asked, came)
        reason, remedy = self._why_streamed(file)
        if remedy:
            return failed("application", file.wanted, asked, f"{came}{reason}", remedy)
        return passed("application", file.wanted, asked, f"{came}{reason}")

    def _cache_for(self, file: File) -> str | None:
        """Return the directory of the cache that has to keep a file, for the proxy to send it, or None."""
        _, source = self.site.source_of(file.route)
        cache = cache_of(source)
        if cache is None or self.site.settings.offload.backend is None or file.route.send not in (None, "proxy"):
            return None
        if isinstance(file.file, VirtualFile) or file.said.get("content-encoding") or not seconds_of(cache.max_age):
            return None  # it is none for a cache, or for a proxy
        said = dict(file.metadata.headers)
        if re.search('no-store|no-cache|private|max-?age="?0', said.get("cache-control", "").lower()):
            return None
        if "expires" in said or "*" in said.get("vary", ""):
            return None
        if file.metadata.size is None and not isinstance(source, VirtualSettings):
            return None  # nobody knows whether it has come whole
        # of a larger one not all is asked for, and so it may take its time
        size = file.content.size
        if size is None or size > min(MOST, bytes_of(cache.max_bytes) or 0):
            return None
        return None if self.site.rule_for([f"{cache.path}/"]) is None else cache.path

    async def _asked_again(self, alone: Peer, file: File) -> Answer:
        """Return the answer of the service when it has kept a file, or the last one where it does not."""
        answer = await alone.ask(file.target)
        for _ in range(_TRIES):
            if answer.orders:
                break
            await anyio.sleep(_PAUSE)
            answer = await alone.ask(file.target)
        return answer

    def _misfit(self, file: File, answer: Answer) -> tuple[str, str]:
        """Return what the live application answers, and what the settings have it do instead, or nothing."""
        came = f"{answer.status}{shown(answer.orders)}"
        if answer.status == 307 and file.route.send == "redirect":
            return f"307 to {urlsplit(answer.get('location') or '').netloc}", ""
        if answer.status != 200:
            return came, "it does not find the file, or its user may not read it"
        for name in SAID:
            if answer.get(name) != file.said.get(name):
                return f"{came}, {name}: {answer.get(name)}", f"they say {name}: {file.said.get(name)}"
        _, source = self.site.source_of(file.route)
        if cache_of(source) is not None and bool(answer.orders) != file.offloaded:
            file.said = answer  # what is in the cache is offloaded, and the rest is streamed until it is there
        if unsigned(answer.orders) != unsigned(file.said.orders):
            backend = self.site.settings.offload.backend
            if not answer.orders:
                remedy = f'they have [offload] backend = "{backend}" (DOWNLOADVIEW_OFFLOAD__BACKEND={backend})'
                return f"{came}, streamed", remedy
            return came, f"they say{shown(file.said.orders, '')}" if file.offloaded else "they stream this file"
        if answer.orders:
            alone = answer.get("content-length") == "0" and not answer.body
            return f"{came}, and {len(answer.body)} bytes", "" if alone else "they send no bytes with it"
        came = f"{came}, streamed"
        if not file.content.begins(answer.body):
            return f"{came}, other bytes", "its files differ" if file.repeatable else ""
        lost = [name for name in ("Accept-Ranges", "ETag") if file.said.get(name) and not answer.get(name)]
        return came, f"they send {lost[0]}" if lost else ""

    def _why_streamed(self, file: File) -> tuple[str, str]:
        """Return why the service itself sends a file, and what mends it where that is not what is wanted."""
        location = file.file.location
        if self.site.settings.offload.backend is None:
            return "", ""
        if file.route.send == "stream":
            return ': send = "stream"', ""
        if file.said.get("content-encoding"):
            return ": its content is encoded", ""
        if location is None:
            reason, remedy = ": it is nowhere where a proxy could find it", "give its source a [sources.NAME.cache]"
        elif self.site.rule_of(file) is not None:
            reason, remedy = f": no header of this kind can name {location!r}", "give the file another name"
        else:
            _, source = self.site.source_of(file.route)
            reason = f": no rule covers {location}"
            remedy = f'[[offload.rules]] source = "{directory_of(source) or os.path.dirname(location)}"'
            for rule in self.site.settings.offload.rules:
                if os.path.realpath(location).startswith(f"{os.path.realpath(rule.source)}/"):
                    return f"{reason}: that for {rule.source} leads there by way of a link", remedy
        return reason, remedy if file.route.send == "proxy" else ""

    # --- 3: the proxy alone

    async def _proxy_alone(self, proxy: Peer, found: Sequence[File]) -> AsyncIterator[Line]:
        # what the proxy refuses by itself tells best who it is
        for target in ("/../", "/%00"):
            with suppress(ClosedError):
                self.site.see(await proxy.ask(target, root=True))
        async for line in self._lengths(proxy):
            yield line
        rules = self.site.settings.offload.rules if self.site.settings.offload.backend else []
        if not rules:
            came = "there is no offload.backend, and so nothing that only the proxy may reach"
            yield Line(result="skip", step="proxy", route="", asked="internal locations", came=came)
        for rule in rules:
            file = next((file for file in found if file.offloaded and self.site.rule_of(file) == rule), None)
            for target in self._inner_targets(rule, file):
                if (await self.site.here.ask(target, method="HEAD")).status == 200:
                    continue  # a page of the service itself
                result: Result = "pass"
                came, remedy = "refused", ""
                try:
                    answer = await proxy.ask(target, root=True)
                except ClosedError:
                    pass
                else:
                    came = f"{answer.status}, refused"
                    if answer.status in (200, 206):
                        result, came = "FAIL", f"{answer.status}: it is open to everybody"
                        remedy = self.site.advice("open", rule)
                    elif answer.status >= 500:
                        result, came, remedy = "FAIL", str(answer.status), self.site.advice("unreached", rule)
                where = rule.target or rule.source
                yield Line(result=result, step="proxy", route=where, asked=f"GET {target}", came=came, remedy=remedy)

    async def _lengths(self, proxy: Peer) -> AsyncIterator[Line]:
        """Find out whether the proxy passes on the longest request line, and the longest header of an answer."""
        step: Step = "proxy"
        try:
            is_passed_on = (await proxy.ask(LIVEZ)).status == 200
        except ClosedError:
            is_passed_on = False
        if not is_passed_on:
            came = f"not checked: the proxy does not pass {LIVEZ} on"
            yield Line(result="skip", step=step, route="", asked="the longest names", came=came)
            return
        target = f"{LIVEZ}?{'a' * (_LONGEST_TARGET - len(LIVEZ) - 1)}"
        probes = [(target, f"a request target of {_LONGEST_TARGET} bytes", "request line")]
        size = 0
        if (kind := self.site.kind) is not None:
            longest = kind.encode("\udcff" * _LONGEST_NAME)  # bytes that are not UTF-8
            size = (3 * _LONGEST_NAME if longest is None else len(longest)) + _OTHER_FIELDS
            probes.append((f"{LIVEZ}?header={size}", f"an answer with header fields of {size} bytes", "fields"))
        for target, asked, problem in probes:
            result: Result = "pass"
            came = remedy = ""
            try:
                answer = await proxy.ask(target)
                came = str(answer.status)
                right = answer.status == 200 and (problem != "fields" or len(answer.get(PADDING) or "") == size)
            except NoAnswerError as exc:
                came, right = str(exc), False
            if not right:
                result, remedy = "FAIL", self.site.advice(problem, None)
                self.site.narrow.add(problem)
            yield Line(result=result, step=step, route="", asked=asked, came=came, remedy=remedy)

    def _inner_targets(self, rule: RuleSettings, file: File | None) -> list[str]:
        """Return paths by which a client could come to the files of a rule without the service."""
        source, location = rule.source.rstrip("/"), "" if file is None else file.file.location or ""
        rest = quote(location.removeprefix(f"{source}/")) if location.startswith(f"{source}/") else ""
        name = quote(source.rpartition("/")[2])
        if self.site.kind is not None and self.site.kind.targets == "directory":
            return [f"{quote(source)}/{rest}", f"/{name}/{rest}", f"/{rest}"] if rest else []
        target = rule.target or ""
        return [
            target + rest,
            f"/%{ord(target[1]):02X}{target[2:]}{rest}",
            f"/{target}{rest}",
            f"{target.upper()}{rest}",
            f"{target.rstrip('/')}../{name}/{rest}",
        ]


def _bucket_of(source: SourceSettings) -> str:
    """Return the bucket of an object store, or nothing for other sources."""
    parts = urlsplit(source.url) if isinstance(source, StorageSettings) else None
    return parts.netloc if parts is not None and parts.scheme in ("s3", "gs", "az") else ""
