"""The last step of a check: compares the answers that clients get through the proxy with the application's."""

import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from downloadview_async import proxy_kinds
from downloadview_async.check.advice import SOCKET, remedies_of
from downloadview_async.check.http import Answer, ClosedError, NoAnswerError, Peer, UnknownHostError, follow
from downloadview_async.check.proxies import APPLICATION_SERVERS, named_by, named_by_errors
from downloadview_async.check.samples import closed_to_others
from downloadview_async.check.site import (
    KEPT_HEADERS,
    PLAIN,
    File,
    Line,
    PlacedRule,
    Site,
    failed,
    passed,
    shown,
    shown_url,
    skipped,
)

_PART = 1024  # bytes of a requested range
_DISPOSITIONS = ("response-content-disposition=", "rscd=")  # what stores call it in a signed URL
_ONCE = ("accept-ranges", "content-length", "date", "etag", "last-modified", "server")
_STALE = '"downloadview-check"'
_OF_BOTH = ("etag", "last-modified", "content-length", "accept-ranges", *(name.lower() for name in KEPT_HEADERS))
_ORDERS_OF_A_CLIENT = dict(
    sorted(
        {kind.header: "/etc/passwd" for kind in proxy_kinds().values() if kind.configuration is not None}.items()
        | {"X-Accel-Mapping": "/=/", "X-Sendfile-Type": "X-Accel-Redirect"}.items()
    )
)
_OF_A_STORE = re.compile("x-amz-(?!cf-)|x-goog-|x-ms-|seaweed-")  # x-amz-cf- is CloudFront, which is a proxy
_OF_A_PREFLIGHT = ("Access-Control-Allow-Origin", "Access-Control-Allow-Methods", "Access-Control-Allow-Headers")
_OF_A_SITE = "Strict-Transport-Security"
"""A header that belongs to every answer of a site. Proxies add it, and may lose it where they send files."""
_UNREACHED = (502, 503, 504)

AnyFile = TypeVar("AnyFile", bound=File)


async def lines_of_proxy(
    site: Site, files: Sequence[AnyFile], alone: Callable[[Peer, Sequence[AnyFile]], AsyncIterator[Line]]
) -> AsyncIterator[Line]:
    """Make the checks of the site's proxy: first those of `alone`, which compare no file, and then those of each file.

    Yields each result as soon as it is known: one that says so if the site has no proxy.
    """
    if site.proxy is None:
        outcome = "not checked: give the URL at which clients reach the proxy"
        yield Line(result="skip", step="proxy", route="", request="the proxy", outcome=outcome)
        return
    try:
        async for line in alone(site.proxy, files):
            yield line
    except NoAnswerError as exc:
        request = f"GET {shown_url(site.proxy.base)}"
        remedy = "start the proxy, or give the URL at which clients reach the proxy"
        yield Line(result="FAIL", step="proxy", route="", request=request, outcome=str(exc), remedy=remedy)
        return
    transfers = TransferChecks(site, site.proxy)
    for file in files:
        async for line in transfers.lines(file):
            yield line


class TransferChecks:
    """Requests files through a proxy: whole, in ranges, with conditions, encodings and hostile names."""

    def __init__(self, site: Site, proxy: Peer) -> None:
        self.site = site
        self.proxy = proxy
        self.obeyed: set[str] = set()
        """The sources of those rules by which the proxy has sent a file."""

    async def lines(self, file: File) -> AsyncIterator[Line]:
        """Make the checks of a file, and yield each result as soon as it is known."""
        request = f"GET {file.target}"
        try:
            whole = await self.proxy.ask(file.requested)
            outcome, remedy = await self._whole(file, whole)
            if remedy:
                yield failed("together", file.wanted, request, outcome, remedy)
                if file.wanted.thorough:
                    yield skipped("together", file.wanted, f"{request}: the rest", "the file could not be downloaded")
                return
            yield passed("together", file.wanted, request, outcome)
            if whole.status == 307:
                yield await self._followed(file, whole)
                return
            for line in self._headers(file, whole):
                yield line
            if file.wanted.thorough:
                steps = (
                    self._head,
                    self._ranges,
                    self._conditions,
                    self._encodings,
                    self._names,
                    self._orders,
                    self._cors,
                )
                for step in steps:
                    async for line in step(file, whole):
                        yield line
        except NoAnswerError as exc:
            remedy = f"{self.site.advice('unreached', self.site.rule_of(file))}; a slow answer needs a longer --timeout"
            yield failed("together", file.wanted, request, str(exc), remedy)

    async def _followed(self, file: File, redirect: Answer) -> Line:
        """Request one byte from the store, as a redirected client would. Only the host of the URL may be shown."""
        url = redirect.get("location") or ""
        cookies = [value.partition(";")[0] for name, value in redirect.headers if name == "set-cookie"]
        headers = {"Range": "bytes=0-0"} | ({"Cookie": "; ".join(cookies)} if cookies else {})
        place = redirect.place.netloc
        request = f"GET {place} Range: bytes=0-0, the redirect of {file.target}"
        try:
            answer = await follow(url, self.site.timeout, headers)
        except UnknownHostError as exc:
            return skipped("together", file.wanted, request, str(exc))
        except NoAnswerError as exc:
            return failed("together", file.wanted, request, str(exc), self.site.redirect_advice(file))
        outcome = f"{answer.status}, {len(answer.body)} bytes"
        if answer.status == 416 and file.content.size == 0:
            return passed("together", file.wanted, request, outcome)
        if answer.status != 206 or answer.body != file.content.part(0, 1):
            return failed("together", file.wanted, request, outcome, self.site.redirect_advice(file))
        actual, wanted = answer.get("content-disposition"), file.expected.get("content-disposition")
        outcome = f"{outcome}, Content-Disposition: {actual}"
        # not every CDN takes one, and an application that makes the redirect itself may say none
        if wanted not in (None, actual) and any(name in url.lower() for name in _DISPOSITIONS):
            return failed(
                "together", file.wanted, request, f"{outcome} instead of {wanted}", self.site.redirect_advice(file)
            )
        return passed("together", file.wanted, request, outcome)

    async def _whole(self, file: File, answer: Answer) -> tuple[str, str]:
        """Return the answer to a plain GET as text, and the remedy: "" if the answer is right."""
        self.site.see(answer)
        outcome = f"{answer.status}{shown(answer.orders)}"
        backend, rule = self.site.backend, self.site.rule_of(file)
        if answer.status == 307 and file.redirects:
            place, wanted = answer.place, None if file.direct is None else file.direct.place
            if place.netloc and (wanted is None or not wanted.netloc or place[:3] == wanted[:3]):
                return f"307 to {place.netloc}", ""
            return f"307 to {shown_url(answer.get('location') or '')}", self.site.advice(
                "streamed header", rule, header="Location"
            )
        if 300 <= answer.status < 400:
            return f"{outcome} to {shown_url(answer.get('location') or '')}", "give the URL that this redirect leads to"
        if answer.status in (414, 431):
            return outcome, self.site.advice("request line", rule)
        if answer.status == 502 and "fields" in self.site.narrow:
            return outcome, self.site.advice("fields", rule)
        if answer.status in _UNREACHED:
            return outcome, self.site.advice("not fetched" if self.site.is_fetched(file) else "unreached", rule)
        if answer.orders:
            header = next(iter(answer.orders))
            outcome = f"{outcome}, {len(answer.body)} bytes"
            if answer.body:
                return outcome, self.site.advice("leaked", rule, header=header)
            if self.site.seen and backend not in self.site.seen:
                (kind, *_) = sorted(self.site.seen)
                return outcome, f"{self.site.to_use(kind)}: the proxy is {kind}, which does not obey {header}"
            if header not in file.expected.orders:
                return (
                    outcome,
                    f"the service does not run with these settings: they give{shown(file.expected.orders, '')}",
                )
            if not self.site.seen:
                return outcome, await self._who_passes_on(answer, header, rule)
            return outcome, self.site.advice("not obeyed", rule)
        if answer.status in (403, 404):
            misrouted = await self.site.misrouted(file, answer)
            return outcome, misrouted or await self._why_not_found(file)
        if answer.status != 200:
            if file.direct is None:
                return outcome, "see the logs of the proxy and of the service"
            return outcome, f"see the log of the proxy: the service itself, at {self.site.service}, answers 200"
        if not file.content.begins(answer.body):
            if not answer.body:
                return f"{outcome}, no bytes", self.site.advice("not obeyed", rule)
            if answer.get("content-encoding") != file.expected.get("content-encoding"):
                return f"{outcome}, Content-Encoding: {answer.get('content-encoding')}", self.site.advice(
                    "encoded", rule
                )
            if file.repeatable:
                return f"{outcome}, other bytes", self.site.advice("other bytes", rule)
            return f"{outcome}, other bytes for each request", ""
        size = file.content.size
        if size is not None and file.metadata.size is not None and answer.get("content-length") != str(size):
            return f"{outcome}, Content-Length: {answer.get('content-length')} of {size}", self._lost("encoded", file)
        if rule is not None:
            self.obeyed.add(rule.source)
        if file.offloaded and file.direct is not None:
            # an answer does not show whether the proxy sent the file, but the service alone sends none of its bytes
            return f"{outcome}, the right bytes, which the service alone does not send", ""
        return f"{outcome}, the right bytes", ""

    async def _who_passes_on(self, answer: Answer, header: str, rule: PlacedRule | None) -> str:
        """Return the remedy for an offload header that a server has passed on which does not say that it obeys it."""
        names = self.site.passing or await named_by_errors(self.proxy)
        titles = [kind.title for kind in proxy_kinds().values() if kind.header.lower() == header]
        if names:
            (name, *_) = sorted(names)
            return (
                f"{name} cannot send files for an application, and no proxy behind it has: put {' or '.join(titles)} "
                "between it and the service, or let the service send the files itself, without a backend"
            )
        remedy = self.site.advice("not obeyed", rule)
        if servers := named_by(answer, APPLICATION_SERVERS):
            return (
                f"give the URL of the proxy: at this one, {servers[0]} answers without one, or behind a proxy that "
                f"obeys no {header}; else {remedy}"
            )
        return remedy

    async def _why_not_found(self, file: File) -> str:
        rule = self.site.rule_of(file)
        if not file.offloaded:
            return self.site.advice("not passed on", rule)
        if self.site.is_fetched(file):
            return self.site.advice("not fetched", rule)
        cache = self.site.cache_of(file)
        if cache is not None:
            await self.site.relocate(file)
        location = file.location or ""
        if (closed_part := closed_to_others(location)) is not None:
            path, mode = closed_part
            is_in_cache = cache is not None and f"{path}/".startswith(f"{cache}/")
            problem = "unreadable in the cache" if is_in_cache else "unreadable"
            closed = self.site.advice(problem, rule, path=path, mode=mode)
            return f"{closed}; else {self.site.advice('not found', rule)}"
        by_name = rule is not None and rule.source in self.obeyed and not PLAIN.fullmatch(location)
        return self.site.advice("other bytes" if by_name else "not found", rule)

    def _headers(self, file: File, whole: Answer) -> Iterator[Line]:
        """Compare the headers of the service with those that the client gets."""
        expected = file.direct or file.expected
        # those of a streamed file are the service's; without an answer of the service, any validators will do
        validators = [
            name
            for name in ("ETag", "Last-Modified")
            if not file.offloaded and (file.direct is not None or not whole.get(name))
        ]
        changed = [name for name in (*file.wanted.kept_headers, *validators) if whole.differs(expected, name)]
        if file.offloaded and self.site.kind is not None:
            changed = [name for name in changed if name not in self.site.kind.replaced_headers]
        if (expected.get("content-security-policy") or "") in (whole.get("content-security-policy") or ""):
            changed = [name for name in changed if name != "Content-Security-Policy"]  # the proxy may make it stricter
        changed += [name for name in file.others if whole.get(name) is None]
        # the outcome, the problem as in `advice.PROBLEMS`, and the header
        problems = [(f"{name}: {whole.get(name)} instead of {expected.get(name)}", "header", name) for name in changed]
        if whole.cookies != expected.cookies:
            problems.append((f"Set-Cookie: {whole.get('set-cookie')}", "cookie", "Set-Cookie"))
        names = [name for name, _ in whole.headers]
        twice = [name for name in _ONCE if names.count(name) > 1]
        problems += [(f"{name} is sent {names.count(name)} times", "header", name) for name in twice]
        if file.offloaded and not whole.get("etag") and not whole.get("last-modified"):
            problems.append(("no ETag and no Last-Modified", "conditions", "ETag"))
        if self.site.is_fetched(file):
            stores = dict.fromkeys(name for name in names if _OF_A_STORE.match(name))
            problems += [(f"{name}, a header of the store", "header of a store", name) for name in stores]
        request = f"GET {file.target}: headers"
        for outcome, problem, name in problems:
            yield failed("together", file.wanted, request, outcome, self._lost(problem, file, header=name))
        if not problems:
            yield passed("together", file.wanted, request, "the same as the service's")

    async def _head(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        request = f"HEAD {file.target}"
        if not file.answers_head:
            remedy = "let the route answer HEAD: download managers ask by it for the size of a file"
            yield skipped("together", file.wanted, request, "the application does not answer HEAD", remedy)
            return
        answer = await self._ask(file, method="HEAD")
        differ = [name for name in _OF_BOTH if answer.get(name) != whole.get(name)]
        if file.metadata.size is None:
            differ = [name for name in differ if name not in ("content-length", "accept-ranges")]
        if answer.status != 200 or answer.orders or answer.body:
            outcome, remedy = f"{answer.status}{shown(answer.orders)}", self._why("ranges", file, answer)
            yield failed("together", file.wanted, request, outcome, remedy)
        elif differ and file.head_is_separate:
            reason = f"the application answers HEAD itself, with {differ[0]}: {answer.get(differ[0])}"
            yield skipped("together", file.wanted, request, reason)
        elif differ:
            outcome = f"200, {differ[0]}: {answer.get(differ[0])} instead of {whole.get(differ[0])}"
            remedy = self._lost("header", file, header=differ[0])
            yield failed("together", file.wanted, request, outcome, remedy)
        else:
            yield passed("together", file.wanted, request, "200, the headers of GET without a body")

    async def _ranges(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        size = file.content.size
        if not file.ranged or not size or not file.repeatable:
            reason = (
                "the file is empty" if size == 0 else "the file is generated on the fly, so it does not support ranges"
            )
            yield skipped("together", file.wanted, f"GET {file.target} Range", reason)
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
            outcome = f", Content-Range: {answer.get('content-range')}, {len(answer.body)} bytes"
            yield await self._judged(right, file, {"Range": value}, answer, "ranges", outcome)
        answer = await self._ask(file, Range=f"bytes={size}-")
        yield await self._judged(answer.status == 416, file, {"Range": f"bytes={size}-"}, answer, "ranges")
        etag, modified = whole.get("etag"), whole.get("last-modified")
        version = modified if etag is None or etag.startswith("W/") else etag
        if version is None:
            yield skipped("together", file.wanted, f"GET {file.target} If-Range", "the file has no validator")
            return
        last = f"bytes={size - 1}-"
        answer = await self._ask(file, **{"Range": last, "If-Range": version})
        right = answer.status == 206 and answer.body == file.content.part(size - 1, size)
        yield await self._judged(right, file, {"Range": last, "If-Range": version}, answer, "ranges")
        answer = await self._ask(file, **{"Range": last, "If-Range": _STALE})
        right = answer.status == 200 and file.content.begins(answer.body)
        yield await self._judged(right, file, {"Range": last, "If-Range": _STALE}, answer, "ranges")

    async def _conditions(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        for name, header in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified")):
            if (value := whole.get(header)) is None:
                continue  # another check reports a missing validator
            answer = await self._ask(file, **{name: value})
            right = answer.status == 304 and not answer.body and not answer.orders
            yield await self._judged(right, file, {name: value}, answer, "conditions")
        answer = await self._ask(file, **{"If-None-Match": _STALE})
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        yield await self._judged(right, file, {"If-None-Match": _STALE}, answer, "conditions")

    async def _encodings(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        coding = {"Accept-Encoding": "gzip, br, zstd"}
        answer = await self._ask(file, **coding)
        expected = await self.site.in_process.ask(
            file.requested, method="HEAD" if file.answers_head else "GET", headers=coding
        )
        actual, wanted = answer.get("content-encoding"), expected.get("content-encoding")
        outcome = f", Content-Encoding: {actual}"
        right = answer.status == 200 and actual == wanted
        if right and file.ranged and answer.get("accept-ranges") != whole.get("accept-ranges"):
            right, outcome = False, f"{outcome}, Accept-Ranges: {answer.get('accept-ranges')}"
        yield await self._judged(right, file, coding, answer, "encoded", outcome)

    async def _names(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        """Request names outside the source, in spellings that some proxies decode or normalise."""
        before = file.wanted.below
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
            request = f"GET {target}"
            try:
                answer = await self.proxy.ask(target)
            except ClosedError:
                yield passed("together", file.wanted, request, "refused")
                continue
            yield await self._name(file, target, answer, "decoded" if number else "not passed on")
            is_lost = not number and file.offloaded and whole.get(_OF_A_SITE) is None
            if is_lost and (value := answer.get(_OF_A_SITE)) is not None:
                request, outcome = f"GET {file.target}: headers", f"{_OF_A_SITE}: None, but {value} with a 404"
                remedy = self._lost("header of the site", file, header=_OF_A_SITE, value=value)
                yield failed("together", file.wanted, request, outcome, remedy)

    async def _name(self, file: File, target: str, answer: Answer, problem: str) -> Line:
        request = f"GET {target}"
        outcome = f"{answer.status}{shown(answer.orders)}"
        if 400 <= answer.status < 500 and not answer.orders:
            return passed("together", file.wanted, request, outcome)
        expected = await self._expected(target)
        if expected is not None and expected.status == answer.status and not answer.orders:
            if expected.status >= 500:
                remedy = f"the service itself answers {expected.status}: see its log"
                return failed("together", file.wanted, request, outcome, remedy)
            if not self.site.is_of_files(target):  # a function may make a file of any name
                if expected.body == answer.body:
                    return passed("together", file.wanted, request, f"{outcome}, as the service alone answers")
                merged = await self._expected(target.replace("//", "/"))  # lighttpd merges slashes
                if merged is not None and (merged.status, merged.body) == (answer.status, answer.body):
                    return passed("together", file.wanted, request, f"{outcome}, as the service answers for one slash")
                if not expected.get("etag") or expected.orders:
                    reason = f"the service alone answers {expected.status} too, with other bytes"
                    return skipped("together", file.wanted, request, reason)
        problem = "unreached" if answer.status >= 500 else problem
        return failed("together", file.wanted, request, outcome, self.site.advice(problem, self.site.rule_of(file)))

    async def _expected(self, target: str) -> Answer | None:
        """Return the answer of the running service, or else that of the application in this process."""
        for peer in (self.site.direct, self.site.in_process):
            if peer is not None:
                with suppress(NoAnswerError):
                    return await peer.ask(target)
        return None

    async def _orders(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, **_ORDERS_OF_A_CLIENT)
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        right = right and all(answer.get(name) == whole.get(name) for name in _OF_BOTH)
        outcome = ", the same answer" if right else ", another answer"
        yield await self._judged(right, file, _ORDERS_OF_A_CLIENT, answer, "order", outcome)

    async def _cors(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        """Check what a browser needs before it lets a script of another web site read the file, or an error."""
        if file.wanted.origin is None:
            return
        origin = {"Origin": file.wanted.origin}
        expected = await self.site.in_process.ask(file.requested, headers=origin, method="HEAD")
        beyond = {**origin, "Range": f"bytes={file.content.size}-"}
        for headers in (origin, beyond) if file.ranged and file.content.size else (origin,):
            answer = await self._ask(file, **headers)
            lost = [name for name in file.wanted.cors_headers if answer.differs(expected, name)]
            request = f"GET {file.target}{shown(headers, '')}"
            kind = self.site.kind
            if lost and answer.status == 416 and file.offloaded and kind is not None and kind.has_bare_errors:
                yield skipped("together", file.wanted, request, f"{kind.title} sends its own 416 without CORS headers")
                continue
            for name in lost:
                outcome = f"{answer.status}, {name}: {answer.get(name)} instead of {expected.get(name)}"
                yield failed("together", file.wanted, request, outcome, self._lost("header", file, header=name))
            if not lost:
                yield passed("together", file.wanted, request, f"{answer.status}, a script can read it")
        preflight = {**origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "range"}
        expected = await self.site.in_process.ask(file.requested, headers=preflight, method="OPTIONS")
        answer = await self._ask(file, method="OPTIONS", **preflight)
        right = answer.status == expected.status
        right = right and not any(answer.differs(expected, name) for name in _OF_A_PREFLIGHT)
        request, outcome = f"OPTIONS {file.target}{shown(preflight, '')}", f"{answer.status}"
        if right:
            yield passed("together", file.wanted, request, outcome)
        else:
            yield failed("together", file.wanted, request, outcome, self.site.advice("preflight", None))

    # --- requests and rows

    async def _ask(self, file: File, *, method: str = "GET", **headers: str) -> Answer:
        return await self.proxy.ask(file.requested, method=method, headers=headers)

    async def _judged(
        self, right: bool, file: File, headers: Mapping[str, str], answer: Answer, problem: str, outcome: str = ""
    ) -> Line:
        request, outcome = f"GET {file.target}{shown(headers, '')}", f"{answer.status}{outcome}"
        if right:
            return passed("together", file.wanted, request, outcome)
        streamed = not file.offloaded and problem in ("ranges", "conditions")
        if streamed and (alone := self.site.alone(file)) is not None:
            direct = await alone.ask(file.requested, headers=headers)
            if direct.status == answer.status and direct.body == answer.body:
                return skipped("together", file.wanted, request, f"the service alone answers {outcome} too")
        return failed("together", file.wanted, request, outcome, self._why(problem, file, answer))

    def _why(self, problem: str, file: File, answer: Answer) -> str:
        """Return the remedy for a wrong answer about a file that a plain GET downloads correctly."""
        if SOCKET in remedies_of(self.site.backend) and file.offloaded and answer.status in (404, 502):
            return self.site.advice(SOCKET, None)
        if answer.status not in _UNREACHED:
            return self._lost(problem, file)
        if self.site.is_fetched(file):
            return self.site.advice("not fetched", self.site.rule_of(file))
        return "see the log of the proxy: it answers 200 to a plain GET"

    def _lost(self, problem: str, file: File, **facts: str) -> str:
        """Return the remedy for a fault of the server that sends the file: the proxy, the service or a store."""
        if not file.offloaded and problem in ("ranges", "conditions", "header"):
            problem = f"streamed {problem}"
        elif self.site.is_fetched(file) and problem in ("ranges", "conditions", "header"):
            problem = f"fetched {problem}"
        return self.site.advice(problem, self.site.rule_of(file), **facts)
