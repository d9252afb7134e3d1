"""`downloadview check`: compares a running installation with its settings, in four steps.

The steps are: the source alone, the service alone, the proxy alone, and the service behind the proxy. An application
with the same settings, in this process, gives the expected answers. Of a large file only a few pieces are read.
"""

import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from urllib.parse import quote, urlsplit

import anyio

from downloadview_async import AccessDenied, ConfigurationError, FileMissing, UpstreamError, VirtualFile
from downloadview_async.check.http import MOST, Answer, ClosedError, NoAnswerError, Peer, check_seconds
from downloadview_async.check.proxy_alone import internal_locations, name_of_proxy
from downloadview_async.check.samples import content_of, names_in
from downloadview_async.check.site import (
    PLAIN,
    Line,
    Result,
    Step,
    failed,
    passed,
    rule_among,
    shown,
    shown_url,
    skipped,
    unsigned,
)
from downloadview_async.check.transfers import lines_of_proxy
from downloadview_async.service.app import build
from downloadview_async.service.check.site import PARAMETER, File, Site, Wanted, download_of, wanted_of
from downloadview_async.service.health import LIVEZ, PADDING
from downloadview_async.service.settings import DatabaseUnavailable, RouteSettings, Settings
from downloadview_async.service.source_settings import (
    SourceSettings,
    StorageSettings,
    VirtualSettings,
    cache_of,
    directory_of,
)
from downloadview_async.service.values import bytes_of, seconds_of

__all__ = ["Line", "check"]

_LONGEST_NAME = 4_095
"""The longest name that a source accepts, in bytes."""

_LONGEST_TARGET = 3 * _LONGEST_NAME + 256
"""Bytes of the longest request target: the longest name with every byte percent-encoded, and the route's path."""

_OTHER_FIELDS = 2_048
"""Bytes that the other header fields of an answer may need beside the offload header."""

_ACTIVE = (".htm", ".html", ".pdf", ".svg", ".xhtml", ".xml")
"""How the names of files end that a browser could run."""

_TRIES, _PAUSE = 10, 0.1
"""How often a file is requested again until the cache has it, and the seconds between the requests."""


async def check(
    settings: Settings,
    *,
    url: str | None = None,
    direct: str | None = None,
    files: Sequence[str] = (),
    only: bool = False,
    timeout: float = 10.0,
    headers: Mapping[str, str] | None = None,
) -> AsyncGenerator[Line, None]:
    """Make the checks, and yield each result as soon as it is known.

    url: the URL at which clients reach the proxy; without it, no proxy is checked. direct: the URL at which the service
    itself listens; by default the address in the settings. files: paths to request, such as /files/a%20b.txt. only:
    request no others; by default a route without a path in `files` is checked with its examples, or with files from
    its local directory. timeout: seconds for opening a source's file, and for each request. headers: of every request;
    with them, routes for users with passwords and those with a hook are checked too.

    Raises `ConfigurationError` for wrong settings and URLs, and if there is no file to request.
    """
    check_seconds(timeout)
    app = build(settings)
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(app.router.lifespan_context(app))
        except DatabaseUnavailable as exc:
            remedy = "start the database, or correct its URL"
            yield Line(result="FAIL", step="source", route="", request="the database", outcome=str(exc), remedy=remedy)
            return
        sent = headers or {}
        in_process = await stack.enter_async_context(Peer.in_process(app, timeout, sent))
        running = proxy = None
        uds = settings.server.uds if direct is None else None
        if (service := _service_of(settings, direct)) is not None:
            running = await stack.enter_async_context(Peer.at(service, timeout, sent, uds=uds))
        if url is not None:
            proxy = await stack.enter_async_context(Peer.at(url, timeout, sent))
        where = f"http://unix:{uds}" if uds else shown_url(service or "http://HOST:PORT")
        site = Site(in_process, running, proxy, timeout, where, settings, app, root=settings.server.root_path)
        async with aclosing(_Run(site).lines(files, only)) as lines:
            async for line in lines:
                yield line


def _service_of(settings: Settings, direct: str | None) -> str | None:
    """Return the URL of the service itself, or None if neither `direct` nor the settings give it."""
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
            remedy = "give each route an `example` in the settings, or give paths with --file"
            if any(route.access is not None for route in self.site.settings.routes):
                remedy += ", of a route without `access`, or the headers of a user with --header"
            raise ConfigurationError(f"there is no file to request: {remedy}")
        for line in unknown:
            yield line
        files_to_check: list[File] = []
        for one in wanted:
            line, file = await self._source(one)
            yield line
            if file is not None:
                files_to_check.append(file)
        for file in files_to_check:
            yield await self._application(file)
        async for line in lines_of_proxy(self.site, files_to_check, self._proxy_alone):
            yield line

    # --- which files

    def _wanted(self, files: Sequence[str], only: bool) -> tuple[list[Wanted], list[Line]]:
        """Return the files to request, and a skip row for each route without a known file, unless `only` is set."""
        given: dict[str, list[tuple[str, str]]] = {}
        for link in files:
            path, _, query = link.partition("?")
            target = quote(path, safe="/%:@!$&'()*+,;=~")
            endpoint, _ = self.site.route_of(target)
            if endpoint is None or download_of(endpoint) is None:
                raise ConfigurationError(f"no route serves {path!r}: give a path such as /files/a.txt")
            given.setdefault(endpoint.path, []).append((target, quote(query, safe="/%:@!$&'()*+,;=~?")))
        wanted: list[Wanted] = []
        unknown: list[Line] = []
        for route in self.site.settings.routes:
            before, after = (quote(part) for part in PARAMETER.split(route.path))
            has_link = any(query for _, query in given.get(route.path, []))
            if route.access is not None and not only and not has_link and not self._may_ask(route.access):
                outcome = "not checked: the route has an `access`"
                remedy = "download a file of this route yourself, as a user who may have it, or give a link with --file"
                if not self.site.in_process.headers:
                    remedy += ", or give the headers of such a user with --header"
                unknown.append(
                    Line(
                        result="skip", step="source", route=route.path, request="a file", outcome=outcome, remedy=remedy
                    )
                )
                continue
            names = [] if only else route.examples or self._found(route)
            targets = given.get(route.path) or [(before + quote(name) + after, "") for name in names]
            wanted += [
                wanted_of(route, target, query, thorough=number == 0) for number, (target, query) in enumerate(targets)
            ]
            if not targets and not only:
                outcome = "not checked: no file is known"
                remedy = "give the route an `example` in the settings, or give a path with --file"
                line = Line(
                    result="skip", step="source", route=route.path, request="a file", outcome=outcome, remedy=remedy
                )
                unknown.append(line)
        return wanted, unknown

    def _may_ask(self, access: Sequence[str]) -> bool:
        """Return whether the headers of the command may let it have the files of a route."""
        users = self.site.settings.users
        has_passwords = users is not None and users.file is not None
        return bool(self.site.in_process.headers) and any(
            one.startswith("hook:") or (has_passwords and one.startswith("user:")) for one in access
        )

    def _found(self, route: RouteSettings) -> list[str]:
        """Return a plain name in a route's local directory, and one name that needs percent-encoding.

        The plain name is the first one. For an inline route, it is the first name of a file that a browser could run.
        """
        directory = directory_of(self.site.settings.sources[route.source])
        convertor = PARAMETER.findall(route.path)[0].strip("{}").partition(":")[2]
        if directory is None or convertor not in ("", "str", "path"):
            return []
        names = names_in(Path(directory), convertor == "path")
        plain = [name for name in names if PLAIN.fullmatch(name)]
        if route.disposition == "inline":  # only such a file shows whether its Content-Security-Policy is lost
            plain.sort(key=lambda name: not name.lower().endswith(_ACTIVE))
        # a percent sign shows best which encoding the proxy uses
        others = sorted((name for name in names if not PLAIN.fullmatch(name)), key=lambda name: "%" not in name)
        return [*plain[:1], *others[:1]]

    # --- 1: the source

    async def _source(self, wanted: Wanted) -> tuple[Line, File | None]:
        request = f"read {wanted.target}"
        name, source = self.site.source_of(wanted.route)
        bucket = _bucket_of(source)
        remedy = f"check that what [sources.{name}] names can be reached"
        try:
            with anyio.fail_after(self.site.timeout):
                file = await self.site.resolve(wanted)
                metadata, content = await content_of(file)
                # Until the second of its last change is over, a file has no Last-Modified, which the checks compare.
                fresh_for = (metadata.last_modified or 0) + 1 - time.time()
                await anyio.sleep(min(max(fresh_for, 0), 2))
                if cache_of(source) is not None:
                    file = await self.site.resolve(wanted)  # by now it is in the cache, so it has a location
            expected = await self.site.in_process.ask(wanted.requested, method="HEAD")
            if (file.location or "").startswith("http"):
                # Only an answer to GET tells the proxy to fetch a file. Without a proxy, this reads one byte.
                answer = await self.site.in_process.ask(wanted.requested, headers={"Range": "bytes=0-0"})
                expected = answer if answer.orders else expected
            if expected.status == 200:
                outcome = "of unknown size" if content.size is None else f"{content.size} bytes"
                return passed("source", wanted, request, outcome), File(
                    wanted,
                    file.location,
                    metadata,
                    content,
                    expected,
                    redirects=wanted.route.send == "redirect",
                    is_generated=isinstance(file, VirtualFile),
                )
            outcome = f"with these settings the answer is {expected.status}"
            if wanted.route.access is not None:
                remedy = "give the headers of a user who may have this file with --header"
        except FileMissing as exc:
            outcome, remedy = f"missing: {exc}", "give a file that exists, by the route's `example` or by --file"
            if bucket:
                remedy = f"{remedy}; or correct the bucket {bucket!r} in the url of [sources.{name}]"
        except AccessDenied as exc:
            outcome, remedy = (
                f"not allowed: {exc}",
                "let this user read the file, or run this command as the service's user",
            )
            if bucket:
                remedy = f"check the keys in [sources.{name}.options], and what they allow for the bucket {bucket!r}"
        except UpstreamError as exc:
            outcome = str(exc)
            if bucket:
                keys = f"the keys in [sources.{name}.options], and what they allow"
                remedy = f"check that the store can be reached, that it has the bucket {bucket!r}, and {keys}"
        except (TimeoutError, NoAnswerError):
            outcome = f"not read within {self.site.timeout:g} s"
        except Exception as exc:  # a source may raise anything: a virtual one calls the user's function
            outcome = f"{type(exc).__name__}: {exc}"
        return failed("source", wanted, request, outcome, remedy), None

    # --- 2: the service alone

    async def _application(self, file: File) -> Line:
        method = self._method_for(file)
        request = f"{method} {file.target}"
        if self.site.direct is None:
            return skipped("application", file.wanted, request, "give the address of the service with --direct")
        try:
            answer = await self.site.direct.ask(file.requested, method=method)
            directory = self._cache_for(file) if answer.status == 200 and not answer.orders else None
            if directory is not None:
                answer = await self._ask_again(self.site.direct, file)
        except NoAnswerError as exc:
            remedy = f"start the service at {self.site.service}, or give its address with --direct"
            return failed("application", file.wanted, request, str(exc), remedy)
        outcome, remedy = self._misfit(file, answer)
        if remedy:
            remedy = f"the service does not run with these settings: {remedy}"
            return failed("application", file.wanted, request, outcome, remedy)
        file.direct = answer
        if directory is not None and not answer.orders:
            backend = self.site.settings.offload.backend
            remedy = (
                f"the cache keeps nothing: see the service's log, and check that its user may write to {directory}; or "
                f'the service does not run with these settings, which have [offload] backend = "{backend}"'
            )
            return failed("application", file.wanted, request, f"{outcome} again", remedy)
        if answer.status == 307 or answer.orders:
            return passed("application", file.wanted, request, outcome)
        reason, remedy = self._why_streamed(file)
        if remedy:
            return failed("application", file.wanted, request, f"{outcome}{reason}", remedy)
        return passed("application", file.wanted, request, f"{outcome}{reason}")

    def _method_for(self, file: File) -> str:
        """Return the method by which to ask the service itself for a file.

        With limits, a GET counts as a transfer until the proxy has logged its end, which it never does here. Its answer
        has a rate that depends on the other transfers. A HEAD has and does nothing of this.
        """
        is_limited = self.site.settings.limits is not None or file.route.limits is not None
        is_fetched = (file.location or "").startswith("http")  # such a file is offloaded for a GET alone
        return "HEAD" if is_limited and file.offloaded and not is_fetched else "GET"

    def _cache_for(self, file: File) -> str | None:
        """Return the directory of the cache that must hold a file before the proxy can send it, or None."""
        _, source = self.site.source_of(file.route)
        cache = cache_of(source)
        if cache is None or self.site.settings.offload.backend is None or file.route.send not in (None, "proxy"):
            return None
        if file.is_generated or file.expected.get("content-encoding") or not seconds_of(cache.max_age):
            return None  # the file is not cached, or not offloaded
        headers = dict(file.metadata.headers)
        if re.search('no-store|no-cache|private|max-?age="?0', headers.get("cache-control", "").lower()):
            return None
        if "expires" in headers or "*" in headers.get("vary", ""):
            return None
        if file.metadata.size is None and not isinstance(source, VirtualSettings):
            return None  # whether it is complete cannot be known
        # a larger file is not read to its end here, so the cache may need longer to fill
        size = file.content.size
        if size is None or size > min(MOST, bytes_of(cache.max_bytes) or 0):
            return None
        rules = self.site.settings.offload.rules
        return None if rule_among(rules, [f"{cache.path}/"]) is None else cache.path

    async def _ask_again(self, service: Peer, file: File) -> Answer:
        """Request a file until the service has cached it, at most `_TRIES` times; return the last answer."""
        answer = await service.ask(file.requested)
        for _ in range(_TRIES):
            if answer.orders:
                break
            await anyio.sleep(_PAUSE)
            answer = await service.ask(file.requested)
        return answer

    def _misfit(self, file: File, answer: Answer) -> tuple[str, str]:
        """Return the answer of the running service as text, and how the settings differ from it ("" if they do not)."""
        outcome = f"{answer.status}{shown(answer.orders)}"
        if answer.status == 307 and file.redirects:
            return f"307 to {answer.place.netloc}", ""
        if answer.status != 200:
            return outcome, "it does not find the file, or its user may not read it"
        for name in file.wanted.kept_headers:
            if answer.differs(file.expected, name):
                return f"{outcome}, {name}: {answer.get(name)}", f"they give {name}: {file.expected.get(name)}"
        _, source = self.site.source_of(file.route)
        if cache_of(source) is not None and bool(answer.orders) != file.offloaded:
            file.expected = answer  # a file is streamed until it is in the cache, then offloaded
        if unsigned(answer.orders) != unsigned(file.expected.orders):
            backend = self.site.settings.offload.backend
            if not answer.orders:
                remedy = f'they have [offload] backend = "{backend}" (DOWNLOADVIEW_OFFLOAD__BACKEND={backend})'
                return f"{outcome}, streamed", remedy
            return outcome, f"they give{shown(file.expected.orders, '')}" if file.offloaded else "they stream this file"
        if answer.orders:
            is_empty = answer.get("content-length") == "0" and not answer.body
            return f"{outcome}, and {len(answer.body)} bytes", "" if is_empty else "they send this header without bytes"
        outcome = f"{outcome}, streamed"
        if not file.content.begins(answer.body):
            return f"{outcome}, other bytes", "its files differ" if file.repeatable else ""
        lost = [name for name in ("Accept-Ranges", "ETag") if file.expected.get(name) and not answer.get(name)]
        return outcome, f"they send {lost[0]}" if lost else ""

    def _why_streamed(self, file: File) -> tuple[str, str]:
        """Return why the service itself sends a file, and the remedy: "" if the route does not ask for the proxy."""
        location = file.location
        if self.site.settings.offload.backend is None:
            return "", ""
        if file.route.send == "stream":
            return ': send = "stream"', ""
        if file.expected.get("content-encoding"):
            return ": its content is encoded", ""
        if location is None:
            reason, remedy = (
                ": it has no location that a proxy could read",
                "give its source a [sources.NAME.cache] table",
            )
        elif self.site.rule_of(file) is not None:
            reason, remedy = f": the proxy's header cannot carry {location!r}", "rename the file"
        else:
            _, source = self.site.source_of(file.route)
            reason = f": no rule covers {location}"
            remedy = f'[[offload.rules]] source = "{directory_of(source) or os.path.dirname(location)}"'
            for rule in self.site.settings.offload.rules:
                if os.path.realpath(location).startswith(f"{os.path.realpath(rule.source)}/"):
                    return f"{reason}: only a symbolic link below {rule.source}, which has a rule, leads there", remedy
        return reason, remedy if file.route.send == "proxy" else ""

    # --- 3: the proxy alone

    async def _proxy_alone(self, proxy: Peer, files: Sequence[File]) -> AsyncIterator[Line]:
        await name_of_proxy(self.site, proxy)
        async for line in self._lengths(proxy):
            yield line
        rules = self.site.settings.offload.rules if self.site.settings.offload.backend else []
        if not rules:
            outcome = "offload.backend is not set, so there are no internal locations"
            yield Line(result="skip", step="proxy", route="", request="internal locations", outcome=outcome)
        for rule in rules:
            file = next((file for file in files if file.offloaded and self.site.rule_of(file) == rule), None)
            async for line in internal_locations(self.site, proxy, rule, file):
                yield line

    async def _lengths(self, proxy: Peer) -> AsyncIterator[Line]:
        """Check that the proxy passes on the longest request line, and the longest header of an answer."""
        step: Step = "proxy"
        try:
            is_passed_on = (await proxy.ask(LIVEZ)).status == 200
        except ClosedError:
            is_passed_on = False
        if not is_passed_on:
            outcome = f"not checked: the proxy does not pass {LIVEZ} on"
            yield Line(result="skip", step=step, route="", request="the longest names", outcome=outcome)
            return
        target = f"{LIVEZ}?{'a' * (_LONGEST_TARGET - len(LIVEZ) - 1)}"
        probes = [(target, f"a request target of {_LONGEST_TARGET} bytes", "request line")]
        size = 0
        if (kind := self.site.kind) is not None:
            longest = kind.encode("\udcff" * _LONGEST_NAME)  # bytes that are not UTF-8
            size = (3 * _LONGEST_NAME if longest is None else len(longest)) + _OTHER_FIELDS
            probes.append((f"{LIVEZ}?header={size}", f"an answer with header fields of {size} bytes", "fields"))
        for target, request, problem in probes:
            result: Result = "pass"
            outcome = remedy = ""
            try:
                answer = await proxy.ask(target)
                outcome = str(answer.status)
                right = answer.status == 200 and (problem != "fields" or len(answer.get(PADDING) or "") == size)
            except NoAnswerError as exc:
                outcome, right = str(exc), False
            if not right:
                result, remedy = "FAIL", self.site.advice(problem, None)
                self.site.narrow.add(problem)
            yield Line(result=result, step=step, route="", request=request, outcome=outcome, remedy=remedy)


def _bucket_of(source: SourceSettings) -> str:
    """Return the bucket of an object store, or "" for other sources."""
    parts = urlsplit(source.url) if isinstance(source, StorageSettings) else None
    return parts.netloc if parts is not None and parts.scheme in ("s3", "gs", "az") else ""
