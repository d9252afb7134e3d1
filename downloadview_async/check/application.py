"""The check of any ASGI application, with a proxy in front of it, in four steps.

The steps are: the local file alone, the application alone, the proxy alone, and the application behind the proxy. The
application is called in this process, and its answers are the expected ones: nothing has to be known of its routes,
its middleware and its rules.
"""

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from inspect import iscoroutinefunction
from itertools import takewhile
from urllib.parse import quote, unquote, urlsplit

import anyio
from starlette.types import ASGIApp

from downloadview_async import ConfigurationError, FileError, FileMetadata, LocalFile, TransferAborted, proxy_kinds
from downloadview_async.check.http import MOST, Answer, NoAnswerError, Peer, Server, check_seconds, server_url
from downloadview_async.check.in_process import Application, started
from downloadview_async.check.proxy_alone import internal_locations, name_of_proxy
from downloadview_async.check.samples import Content, content_of
from downloadview_async.check.site import (
    KEPT_HEADERS,
    File,
    Line,
    PlacedRule,
    Site,
    Wanted,
    failed,
    passed,
    shown,
    shown_url,
    skipped,
    unsigned,
)
from downloadview_async.check.transfers import lines_of_proxy

_REASON = "sent without the proxy, "
_UNOFFERED = "there is no OffloadMiddleware around it"
_LOCAL = "http://localhost"
_OF_THE_SENDER = frozenset(
    [
        "accept-ranges",
        "connection",
        "content-length",
        "content-range",
        "date",
        "etag",
        "keep-alive",
        "last-modified",
        "server",
        "set-cookie",
        "transfer-encoding",
    ]
)
"""The headers that the sender of a file makes, and cookies, which are compared by their names."""


async def check_application(
    app: ASGIApp,
    files: Sequence[str],
    *,
    url: str | None = None,
    direct: str | None = None,
    timeout: float = 10.0,
    headers: Mapping[str, str] | None = None,
    root_path: str | None = None,
    unoffered: str = _UNOFFERED,
) -> AsyncGenerator[Line, None]:
    """Make the checks, and yield each result as soon as it is known.

    app: is started, called in this process, and stopped. files: each is PATH=FILE, the path of a URL and the local file
    that the application sends for it, such as /invoices/1=invoices/a.pdf; only PATH, if the application sends it
    itself. url: the URL at which clients reach the proxy; without it, no proxy is checked. direct: the URL of the
    running application itself. timeout: seconds for the start, and for each request. headers: of every request.
    root_path: the path below which clients reach the application, if `app` has no attribute of this name. unoffered:
    why the application sends a file itself for which no proxy was offered.

    Raises `ConfigurationError` for anything that is not an ASGI application, for one that does not start, for wrong
    URLs, and if there is no file to request.
    """
    check_asgi(app)
    check_seconds(timeout)
    samples = [sample_of(file) for file in files]
    if not samples:
        raise ConfigurationError("there is no file to request: give one, such as --file /invoices/1=invoices/a.pdf")
    sent = headers or {}
    base = _LOCAL if (clients := url or direct) is None else _base_of(clients)
    async with AsyncExitStack() as stack:
        running = proxy = None
        if direct is not None:
            # the proxy passes the Host of its clients on, and the application may accept no other
            host = {} if url is None else {"Host": _base_of(url).rpartition("/")[2]}
            running = await stack.enter_async_context(Peer.at(direct, timeout, {**host, **sent}))
        if url is not None:
            proxy = await stack.enter_async_context(Peer.at(url, timeout, sent))
        state = await stack.enter_async_context(started(app, timeout))
        in_process = Application(app, base, timeout, sent, state)
        where = "http://HOST:PORT" if direct is None else shown_url(direct)
        root = root_path if root_path is not None else str(getattr(app, "root_path", "") or "")
        site = ApplicationSite(in_process, running, proxy, timeout, where, root=root.rstrip("/"), unoffered=unoffered)
        async with aclosing(_Run(site, in_process).lines(samples)) as lines:
            async for line in lines:
                yield line


def check_asgi(app: object) -> None:
    """Raise `ConfigurationError` for anything that is not an ASGI application."""
    if isinstance(app, type) or not callable(app):
        raise ConfigurationError(f"{app!r} is not an ASGI application: give module:app, the name of one")
    if not iscoroutinefunction(app) and not iscoroutinefunction(type(app).__call__):
        raise ConfigurationError(
            f"{app!r} is not an ASGI application, whose call is a coroutine. For one of WSGI, or a function that makes "
            "the application, give the ASGI application itself: in Django, `application` of the project's asgi.py"
        )


def _base_of(url: str) -> str:
    parts = server_url(url)
    return f"{parts.scheme}://{parts.netloc}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A file to request. target: its path, encoded. path: the local file with its bytes; None: it is not known."""

    target: str
    path: str | None


def sample_of(file: str) -> Sample:
    """Return the file that an argument PATH=FILE, or PATH, names. A `=` in PATH is written %3D.

    Raises `ConfigurationError`.
    """
    path, equals, local = file.partition("=")
    if not path.startswith("/") or (equals and not local):
        raise ConfigurationError(f"{file!r} is not PATH=FILE: give one such as /invoices/1=invoices/a.pdf")
    return Sample(quote(path, safe="/%:@!$&'()*+,;=~"), os.path.abspath(os.path.expanduser(local)) if local else None)


@dataclass(frozen=True, slots=True)
class _Rule:
    source: str
    target: str | None


@dataclass(slots=True)
class ApplicationSite(Site):
    """The installation. Its rules follow from the headers that the application makes.

    unoffered: why the application sends a file itself for which no proxy was offered.
    """

    unoffered: str = field(default=_UNOFFERED, kw_only=True)
    headers_made: set[str] = field(default_factory=set)
    """The names of the offload headers that the application has made."""

    @property
    def backend(self) -> str | None:
        """The kind of proxy that obeys the headers: the one that answers, if several kinds obey them."""
        names = [name for name, kind in proxy_kinds().items() if kind.header.lower() in self.headers_made]
        return next((name for name in names if name in self.seen), next(iter(names), None))

    def rules_for(self, file: File) -> list[PlacedRule]:
        """Return the rule by which the application has made the header for a file."""
        orders = file.expected.orders
        if (kind := self.kind) is None or (order := orders.get(kind.header.lower())) is None:
            return []
        if "x-offload-target" in orders:
            return [_Rule("the store", order)]
        location = file.location or ""
        if kind.targets == "directory":
            return [_Rule(os.path.dirname(location), os.path.dirname(unquote(order)))]
        place, local = unquote(order).split("/"), location.split("/")
        # of the target, at least the first segment is the proxy's own
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(place[:1:-1], local[:0:-1], strict=False))))
        return [_Rule("/".join(local[:-same]), "/".join([*place[:-same], ""]))] if same else []

    def to_use(self, kind: str) -> str:
        """Return the remedy for an application that makes headers for another kind of proxy."""
        return f"make the headers for {proxy_kinds()[kind].title}, by its backend"

    def alone(self, file: File) -> Server:
        """Return the application without the proxy: the running one, if its address is known."""
        return self.direct if self.direct is not None and file.direct is not None else self.in_process

    def redirect_advice(self, file: File) -> str:
        """Return the remedy for a redirect that does not lead to the file."""
        return (
            "give PresignedRedirect the URL at which clients reach the store as public_endpoint; a proxy in front of "
            "the store must not change the host, the path or the query, because they are signed"
        )

    def to_know(self, prefix: str) -> str:
        """Return how the proxy and the application agree about a prefix."""
        return (
            f'let the proxy remove {prefix}, as `proxy_config(..., prefix="{prefix}")` prints it, and start the server '
            f"with its option for the root path, such as --root-path {prefix} of uvicorn. For gunicorn and WSGI, let "
            f"the proxy leave it there, and set the environment variable SCRIPT_NAME={prefix}"
        )


class _Run:
    def __init__(self, site: ApplicationSite, in_process: Application) -> None:
        self.site = site
        self.in_process = in_process

    async def lines(self, samples: Sequence[Sample]) -> AsyncGenerator[Line, None]:
        files: list[File] = []
        for number, sample in enumerate(samples):
            below = sample.target[: sample.target.rindex("/") + 1]
            wanted = Wanted(label=unquote(sample.target), target=sample.target, below=below, thorough=number == 0)
            known = None
            if sample.path is not None:
                line, known = await self._source(wanted, sample.path)
                yield line
                if known is None:
                    continue
            line, file = await self._application(wanted, sample.path, known)
            yield line
            if file is None:
                continue
            self.site.headers_made.update(file.expected.orders)
            files.append(file)
            if self.site.direct is not None:
                yield await self._running(file, self.site.direct)
        if files or self.site.proxy is None:
            async for line in lines_of_proxy(self.site, files, self._proxy_alone):
                yield line

    async def _source(self, wanted: Wanted, path: str) -> tuple[Line, tuple[FileMetadata, Content] | None]:
        request = f"read {path}"
        try:
            metadata, content = await content_of(LocalFile(path))
        except (FileError, TransferAborted, OSError) as exc:
            remedy = "give the local file that the application sends, by --file PATH=FILE"
            return failed("source", wanted, request, str(exc), remedy), None
        # Until the second of its last change is over, a file has no Last-Modified, which the checks compare.
        await anyio.sleep(min(max((metadata.last_modified or 0) + 1 - time.time(), 0), 2))
        return passed("source", wanted, request, f"{content.size} bytes"), (metadata, content)

    async def _application(
        self, wanted: Wanted, path: str | None, known: tuple[FileMetadata, Content] | None
    ) -> tuple[Line, File | None]:
        request = f"GET {wanted.target} in this process"
        try:
            answer = await self.in_process.ask(wanted.target)
            reasons, was_offered = list(self.in_process.refusals), self.in_process.was_offered
            head = await self.in_process.ask(wanted.target, method="HEAD")
        except NoAnswerError as exc:
            remedy = "let the application answer this request"
            return failed("application", wanted, request, str(exc), remedy), None
        outcome = f"{answer.status}{shown(answer.orders)}"
        if 300 <= answer.status < 400:
            outcome = f"{answer.status} to {shown_url(answer.get('location') or '')}"
        place = answer.place
        redirects = answer.status == 307 and place.netloc not in ("", urlsplit(self.in_process.base).netloc)
        if answer.status != 200 and not redirects:
            return failed("application", wanted, request, outcome, self._why_refused(wanted, answer, reasons)), None
        if known is None and (answer.orders or redirects):
            remedy = f"give the file that is sent, too: --file {unquote(wanted.target)}=FILE"
            return failed("application", wanted, request, f"{outcome}, so its bytes are not known", remedy), None
        if known is None:
            known = _described(answer)
        metadata, content = known
        answers_head = head.status == 200
        head_is_separate = answers_head and bool(head.orders) != bool(answer.orders)
        expected = head if answers_head and not head_is_separate else answer
        if not answer.orders and not redirects:
            if not content.begins(answer.body):
                remedy = "give the local file that the application sends, by --file PATH=FILE"
                return failed("application", wanted, request, f"{outcome}, other bytes than the file", remedy), None
            is_ranged = answer.get("accept-ranges") == "bytes"
            metadata = replace(metadata, accept_ranges=is_ranged)
            outcome = f"{outcome}, streamed: {self._why_streamed(reasons, was_offered)}"
        file = File(
            wanted,
            path,
            metadata,
            content,
            expected,
            redirects=redirects,
            answers_head=answers_head,
            head_is_separate=head_is_separate,
            others=_others(expected) if expected.orders else (),
        )
        return passed("application", wanted, request, outcome), file

    def _why_refused(self, wanted: Wanted, answer: Answer, reasons: Sequence[str]) -> str:
        reason = f" (the log says: {reasons[-1]})" if reasons else ""
        place = answer.place
        if 300 <= answer.status < 400 and place.path.rstrip("/") == wanted.target.rstrip("/"):
            return "give the URL and the path that this redirect leads to"
        if answer.status in (401, 403) or 300 <= answer.status < 400:
            return f"give the headers of a user who may have this file with --header{reason}"
        root = self.site.root
        if answer.status == 404 and root and wanted.target.startswith(f"{root}/"):
            return f"root_path mismatch: the path of --file is the one below {root}, which belongs to the URL"
        if answer.status == 404:
            return f"give a path that the application has a route for, and a file for this user{reason}"
        if answer.status == 400:
            return f"let the application accept the host {urlsplit(self.in_process.base).netloc}{reason}"
        return f"see what the application says of this request{reason}"

    def _why_streamed(self, reasons: Sequence[str], was_offered: bool) -> str:
        if not was_offered:
            return self.site.unoffered
        for reason in reasons:
            if _REASON in reason:
                return reason.partition(_REASON)[2]
        return f"{_UNOFFERED}, or none with pathsend=True for a response of another library"

    async def _running(self, file: File, direct: Peer) -> Line:
        # A GET counts as a transfer for an hour, and its answer has a rate that depends on the other transfers.
        is_asked_by_head = file.offloaded and file.answers_head and not file.head_is_separate
        method = "HEAD" if is_asked_by_head else "GET"
        request = f"{method} {file.target}"
        try:
            answer = await direct.ask(file.target, method=method)
        except NoAnswerError as exc:
            remedy = f"start the application at {self.site.service}, or give its address with --direct"
            return failed("application", file.wanted, request, str(exc), remedy)
        outcome = f"{answer.status}{shown(answer.orders)}"
        wanted_status = 307 if file.redirects else 200
        differ = [name for name in file.wanted.kept_headers if answer.differs(file.expected, name)]
        if answer.status != wanted_status:
            difference = f"it answers {wanted_status}"
        elif unsigned(answer.orders) != unsigned(file.expected.orders):
            difference = f"it gives{shown(file.expected.orders, '')}" if file.offloaded else "it streams this file"
        elif differ:
            outcome = f"{outcome}, {differ[0]}: {answer.get(differ[0])}"
            difference = f"it gives {differ[0]}: {file.expected.get(differ[0])}"
        else:
            file.direct = answer
            return passed("application", file.wanted, request, outcome)
        remedy = f"the running application is not the one in this process: {difference}. Restart it"
        return failed("application", file.wanted, request, outcome, remedy)

    async def _proxy_alone(self, proxy: Peer, files: Sequence[File]) -> AsyncIterator[Line]:
        await name_of_proxy(self.site, proxy)
        checked: set[str | None] = set()
        for file in files:
            rule = self.site.rule_of(file)
            if file.offloaded and rule is not None and rule.target not in checked:
                checked.add(rule.target)
                async for line in internal_locations(self.site, proxy, rule, file):
                    yield line
        if not checked:
            wanted = replace(files[0].wanted, label="")
            yield skipped("proxy", wanted, "internal locations", "the application lets no proxy send these files")


def _others(answer: Answer) -> tuple[str, ...]:
    """Return the headers that are not compared by their values, and that no sender of a file makes."""
    compared = {name.lower() for name in KEPT_HEADERS}
    names = dict.fromkeys(name for name, _ in answer.headers)
    return tuple(name.title() for name in names if name not in compared | _OF_THE_SENDER and name not in answer.orders)


def _described(answer: Answer) -> tuple[FileMetadata, Content]:
    """Return what an answer with a whole file tells of it."""
    length = answer.get("content-length")
    size = int(length) if length is not None and length.isdecimal() else None
    if size is None and len(answer.body) < MOST:
        return FileMetadata(), Content(len(answer.body), ((0, answer.body),))
    return FileMetadata(size=size), Content(size, ((0, answer.body),))
