"""The last step of `downloadview check`: what clients get by way of the proxy, held against what the service says."""

import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from urllib.parse import quote, urlsplit

from downloadview_async import proxy_kinds
from downloadview_async.service.check.advice import SOCKET, remedies_of
from downloadview_async.service.check.http import Answer, ClosedError, NoAnswerError, Peer, UnknownHostError, follow
from downloadview_async.service.check.samples import closed_to_others
from downloadview_async.service.check.site import (
    PARAMETER,
    PLAIN,
    SAID,
    File,
    Line,
    Site,
    failed,
    passed,
    shown,
    shown_url,
    skipped,
)
from downloadview_async.service.settings import PathSettings, StorageSettings, cache_of

_PART = 1024  # bytes of a range that is asked for
_ONCE = ("accept-ranges", "content-length", "date", "etag", "last-modified", "server")
_STALE = '"downloadview-check"'
_OF_BOTH = ("etag", "last-modified", "content-length", "accept-ranges", *(name.lower() for name in SAID))
_ORDERS_OF_A_CLIENT = dict(
    sorted(
        {kind.header: "/etc/passwd" for kind in proxy_kinds().values() if kind.configuration is not None}.items()
        | {"X-Accel-Mapping": "/=/", "X-Sendfile-Type": "X-Accel-Redirect"}.items()
    )
)
_OF_A_STORE = re.compile("x-amz-(?!cf-)|x-goog-|x-ms-|seaweed-")  # x-amz-cf- is CloudFront, which is a proxy
_UNREACHED = (502, 503, 504)


class Together:
    """Asks a proxy for files in every way."""

    def __init__(self, site: Site, proxy: Peer) -> None:
        self.site = site
        self.proxy = proxy
        self.obeyed: set[str] = set()
        """The sources of rules by which the proxy has sent a file."""

    async def lines(self, file: File) -> AsyncIterator[Line]:
        """Yield the checks of a file as they are made."""
        asked = f"GET {file.target}"
        try:
            whole = await self.proxy.ask(file.target)
            came, remedy = await self._whole(file, whole)
            if remedy:
                yield failed("together", file.wanted, asked, came, remedy)
                if file.wanted.thorough:
                    yield skipped("together", file.wanted, f"{asked}: the rest", "the file has not come")
                return
            yield passed("together", file.wanted, asked, came)
            if whole.status == 307:
                yield await self._followed(file, whole.get("location") or "")
                return
            for line in self._headers(file, whole):
                yield line
            if file.wanted.thorough:
                for step in (self._head, self._ranges, self._conditions, self._encodings, self._names, self._orders):
                    async for line in step(file, whole):
                        yield line
        except NoAnswerError as exc:
            remedy = f"{self.site.advice('unreached', self.site.rule_of(file))}; a slow answer needs a longer --timeout"
            yield failed("together", file.wanted, asked, str(exc), remedy)

    async def _followed(self, file: File, url: str) -> Line:
        """Ask the store for a byte, as a client would that is sent there. Of the URL, all but the host is a secret."""
        place = urlsplit(url).netloc
        asked = f"GET {place} Range: bytes=0-0, where {file.target} leads to"
        try:
            answer = await follow(url, self.site.timeout, {"Range": "bytes=0-0"})
        except UnknownHostError as exc:
            return skipped("together", file.wanted, asked, str(exc))
        except NoAnswerError as exc:
            return failed("together", file.wanted, asked, str(exc), self._redirect_advice(file))
        came = f"{answer.status}, {len(answer.body)} bytes"
        if answer.status == 416 and file.content.size == 0:
            return passed("together", file.wanted, asked, came)
        if answer.status != 206 or answer.body != file.content.part(0, 1):
            return failed("together", file.wanted, asked, came, self._redirect_advice(file))
        got, wanted = answer.get("content-disposition"), file.said.get("content-disposition")
        came = f"{came}, Content-Disposition: {got}"
        if got != wanted:
            return failed("together", file.wanted, asked, f"{came}, for {wanted}", self._redirect_advice(file))
        return passed("together", file.wanted, asked, came)

    def _redirect_advice(self, file: File) -> str:
        name, _ = self.site.source_of(file.route)
        return self.site.advice("redirect", None, name=name)

    async def _whole(self, file: File, answer: Answer) -> tuple[str, str]:
        """Return what came in place of a file, and what mends it: nothing where it is the file."""
        self.site.see(answer)
        came = f"{answer.status}{shown(answer.orders)}"
        backend, rule = self.site.settings.offload.backend, self.site.rule_of(file)
        if answer.status == 307 and file.route.send == "redirect":
            place, own = answer.get("location"), None if file.alone is None else file.alone.get("location")
            if place and (own is None or urlsplit(place)[:3] == urlsplit(own)[:3]):
                return f"307 to {urlsplit(place).netloc}", ""
            return f"307 to {shown_url(place or '')}", self.site.advice("streamed header", rule, header="Location")
        if 300 <= answer.status < 400:
            return f"{came} to {shown_url(answer.get('location') or '')}", "give the URL that it leads to"
        if answer.status in (414, 431):
            return came, self.site.advice("request line", rule)
        if answer.status == 502 and "fields" in self.site.narrow:
            return came, self.site.advice("fields", rule)
        if answer.status in _UNREACHED:
            return came, self.site.advice("not fetched" if self.site.is_fetched(file) else "unreached", rule)
        if answer.orders:
            header = next(iter(answer.orders))
            came = f"{came}, {len(answer.body)} bytes"
            if answer.body:
                return came, self.site.advice("leaked", rule, header=header)
            if self.site.seen and backend not in self.site.seen:
                (kind, *_) = sorted(self.site.seen)
                return came, f'[offload] backend = "{kind}": this is {kind}, which does not obey {header}'
            if header not in file.said.orders:
                return came, f"the service does not run with these settings: they say{shown(file.said.orders, '')}"
            return came, self.site.advice("not obeyed", rule)
        if answer.status in (403, 404):
            return came, await self._why_not_found(file)
        if answer.status != 200:
            if file.alone is None:
                return came, "see the logs of the proxy and of the service"
            return came, f"see the log of the proxy: the service itself, at {self.site.service}, answers 200"
        if not file.content.begins(answer.body):
            if not answer.body:
                return f"{came}, no bytes", self.site.advice("not obeyed", rule)
            if answer.get("content-encoding") != file.said.get("content-encoding"):
                return f"{came}, Content-Encoding: {answer.get('content-encoding')}", self.site.advice("encoded", rule)
            if file.repeatable:
                return f"{came}, other bytes", self.site.advice("other bytes", rule)
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

    async def _why_not_found(self, file: File) -> str:
        rule = self.site.rule_of(file)
        if not file.offloaded:
            return self.site.advice("not passed on", rule)
        if self.site.is_fetched(file):
            return self.site.advice("not fetched", rule)
        _, source = self.site.source_of(file.route)
        cache = cache_of(source)
        if cache is not None:
            with suppress(Exception):  # whatever a source raises
                file.file = await self.site.resolve(file.wanted)  # it may have come into the cache since
        location = file.file.location or ""
        if (found := closed_to_others(location)) is not None:
            path, mode = found
            is_in_cache = cache is not None and f"{path}/".startswith(f"{cache.path}/")
            problem = "unreadable in the cache" if is_in_cache else "unreadable"
            closed = self.site.advice(problem, rule, path=path, mode=mode)
            return f"{closed}; else {self.site.advice('not found', rule)}"
        by_name = rule is not None and rule.source in self.obeyed and not PLAIN.fullmatch(location)
        return self.site.advice("other bytes" if by_name else "not found", rule)

    def _headers(self, file: File, whole: Answer) -> Iterator[Line]:
        """Compare what the application says of the file with what the client hears."""
        said = file.alone or file.said
        # of a streamed file they are the service's own; if that one is not at hand, it is enough that there are some
        validators = [
            name
            for name in ("ETag", "Last-Modified")
            if not file.offloaded and (file.alone is not None or not whole.get(name))
        ]
        changed = [name for name in (*SAID, *validators) if whole.get(name) != said.get(name)]
        if file.offloaded and self.site.kind is not None:
            changed = [name for name in changed if name not in self.site.kind.replaced_headers]
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
        if self.site.is_fetched(file):
            stores = dict.fromkeys(name for name in names if _OF_A_STORE.match(name))
            problems += [(f"{name}, which is the store's", "header of a store", name) for name in stores]
        asked = f"GET {file.target}: headers"
        for came, problem, name in problems:
            yield failed("together", file.wanted, asked, came, self._lost(problem, file, header=name))
        if not problems:
            yield passed("together", file.wanted, asked, "as the service says them")

    async def _head(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, method="HEAD")
        asked = f"HEAD {file.target}"
        differ = [name for name in _OF_BOTH if answer.get(name) != whole.get(name)]
        if file.metadata.size is None:
            differ = [name for name in differ if name not in ("content-length", "accept-ranges")]
        if answer.status != 200 or answer.orders or answer.body:
            came, remedy = f"{answer.status}{shown(answer.orders)}", self._why("ranges", file, answer)
            yield failed("together", file.wanted, asked, came, remedy)
        elif differ:
            came = f"200, {differ[0]}: {answer.get(differ[0])}, for {whole.get(differ[0])}"
            remedy = self._lost("header", file, header=differ[0])
            yield failed("together", file.wanted, asked, came, remedy)
        else:
            yield passed("together", file.wanted, asked, "200, the headers of GET and no body")

    async def _ranges(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        size = file.content.size
        if not file.ranged or not size or not file.repeatable:
            reason = "the file is empty" if size == 0 else "the file has no ranges: it is made as it is sent"
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
            came = f", Content-Range: {answer.get('content-range')}, {len(answer.body)} bytes"
            yield await self._judged(right, file, {"Range": value}, answer, "ranges", came)
        answer = await self._ask(file, Range=f"bytes={size}-")
        yield await self._judged(answer.status == 416, file, {"Range": f"bytes={size}-"}, answer, "ranges")
        etag, modified = whole.get("etag"), whole.get("last-modified")
        version = modified if etag is None or etag.startswith("W/") else etag
        if version is None:
            yield skipped("together", file.wanted, f"GET {file.target} If-Range", "it has no validator")
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
                continue  # one that is lost has been found to be
            answer = await self._ask(file, **{name: value})
            right = answer.status == 304 and not answer.body and not answer.orders
            yield await self._judged(right, file, {name: value}, answer, "conditions")
        answer = await self._ask(file, **{"If-None-Match": _STALE})
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        yield await self._judged(right, file, {"If-None-Match": _STALE}, answer, "conditions")

    async def _encodings(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        coding = {"Accept-Encoding": "gzip, br, zstd"}
        answer = await self._ask(file, **coding)
        own = await self.site.here.ask(file.target, method="HEAD", headers=coding)
        got, wanted = answer.get("content-encoding"), own.get("content-encoding")
        came = f", Content-Encoding: {got}"
        right = answer.status == 200 and got == wanted
        if right and file.ranged and answer.get("accept-ranges") != whole.get("accept-ranges"):
            right, came = False, f"{came}, Accept-Ranges: {answer.get('accept-ranges')}"
        yield await self._judged(right, file, coding, answer, "encoded", came)

    async def _names(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        """Ask for what is none of the source's business, in the spellings that proxies are known to undo."""
        before = quote(PARAMETER.split(file.route.path)[0])
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
            yield await self._name(file, target, "decoded" if number else "not passed on")

    async def _name(self, file: File, target: str, problem: str) -> Line:
        asked = f"GET {target}"
        try:
            answer = await self.proxy.ask(target)
        except ClosedError:
            return passed("together", file.wanted, asked, "refused")
        came = f"{answer.status}{shown(answer.orders)}"
        if 400 <= answer.status < 500 and not answer.orders:
            return passed("together", file.wanted, asked, came)
        own = await self._own(target)
        if own is not None and own.status == answer.status and not answer.orders:
            if own.status >= 500:
                remedy = f"the service itself answers {own.status}: see its log"
                return failed("together", file.wanted, asked, came, remedy)
            if not self._is_of_files(target):  # a function may make a file of any name
                if own.body == answer.body:
                    return passed("together", file.wanted, asked, f"{came}, as the service alone answers")
                merged = await self._own(target.replace("//", "/"))  # as lighttpd has it
                if merged is not None and (merged.status, merged.body) == (answer.status, answer.body):
                    return passed("together", file.wanted, asked, f"{came}, as the service answers it with one slash")
                if not own.get("etag") or own.orders:
                    reason = f"the service alone answers {own.status}, too, and other bytes"
                    return skipped("together", file.wanted, asked, reason)
        problem = "unreached" if answer.status >= 500 else problem
        return failed("together", file.wanted, asked, came, self.site.advice(problem, self.site.rule_of(file)))

    async def _own(self, target: str) -> Answer | None:
        """Return what the service itself answers: the live one, or where there is none that in this process."""
        for peer in (self.site.alone, self.site.here):
            if peer is not None:
                with suppress(NoAnswerError):
                    return await peer.ask(target)
        return None

    def _is_of_files(self, target: str) -> bool:
        """Return whether a path is that of a source which has the files that are there, and no others."""
        answering, _ = self.site.route_of(target)
        return any(
            isinstance(self.site.source_of(route)[1], PathSettings | StorageSettings)
            for route in self.site.settings.routes
            if answering is not None and route.path == answering.path
        )

    async def _orders(self, file: File, whole: Answer) -> AsyncIterator[Line]:
        answer = await self._ask(file, **_ORDERS_OF_A_CLIENT)
        right = answer.status == 200 and (file.content.begins(answer.body) or not file.repeatable)
        right = right and all(answer.get(name) == whole.get(name) for name in _OF_BOTH)
        came = ", the same answer" if right else ", another answer"
        yield await self._judged(right, file, _ORDERS_OF_A_CLIENT, answer, "order", came)

    # --- how it is said

    async def _ask(self, file: File, *, method: str = "GET", **headers: str) -> Answer:
        return await self.proxy.ask(file.target, method=method, headers=headers)

    async def _judged(
        self, right: bool, file: File, headers: Mapping[str, str], answer: Answer, problem: str, came: str = ""
    ) -> Line:
        asked, came = f"GET {file.target}{shown(headers, '')}", f"{answer.status}{came}"
        if right:
            return passed("together", file.wanted, asked, came)
        streamed = not file.offloaded and problem in ("ranges", "conditions")
        if streamed and file.alone is not None and self.site.alone is not None:
            alone = await self.site.alone.ask(file.target, headers=headers)
            if alone.status == answer.status and alone.body == answer.body:
                return skipped("together", file.wanted, asked, f"the service alone answers {came}, too")
        return failed("together", file.wanted, asked, came, self._why(problem, file, answer))

    def _why(self, problem: str, file: File, answer: Answer) -> str:
        """Return what mends an answer that is not the right one, for a file that has come to a plain GET."""
        if SOCKET in remedies_of(self.site.settings.offload.backend) and file.offloaded and answer.status in (404, 502):
            return self.site.advice(SOCKET, None)
        if answer.status not in _UNREACHED:
            return self._lost(problem, file)
        if self.site.is_fetched(file):
            return self.site.advice("not fetched", self.site.rule_of(file))
        return "see the log of the proxy: it answers 200 where less is asked of it"

    def _lost(self, problem: str, file: File, **facts: str) -> str:
        """Return what mends something that is for whoever sends the file to do."""
        if not file.offloaded and problem in ("ranges", "conditions", "header"):
            problem = f"streamed {problem}"
        elif self.site.is_fetched(file) and problem in ("ranges", "conditions"):
            problem = f"fetched {problem}"
        return self.site.advice(problem, self.site.rule_of(file), **facts)
