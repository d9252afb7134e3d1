"""`DownloadResponse`: a file as a Django response, for ASGI and WSGI."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar

from asgiref.sync import SyncToAsync, async_to_sync, iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core.exceptions import SuspiciousOperation
from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotModified, StreamingHttpResponse
from django.http.response import HttpResponseBase

from downloadview_async.asgi.accounts import Account
from downloadview_async.asgi.answer import age_of
from downloadview_async.asgi.delivery import SMALL
from downloadview_async.asgi.errors import note_refusal
from downloadview_async.asgi.limiting import spend
from downloadview_async.asgi.transfer import body_of
from downloadview_async.asgi.uses import claim
from downloadview_async.contrib.django.adapters import async_file_of, is_left_by_closing, is_sent_as_stored, name_of
from downloadview_async.contrib.django.counting import (
    counted,
    each_counted,
    each_counted_async,
    limited,
    limited_scope,
)
from downloadview_async.contrib.django.deferral import has_new_receivers, is_deferred
from downloadview_async.contrib.django.disposition import content_disposition
from downloadview_async.contrib.django.dual import close_idle_connections, close_own_connections, has_running_loop
from downloadview_async.contrib.django.event_loop import for_request, iterate_in_background, run_in_background
from downloadview_async.contrib.django.file_errors import error_response, note_missing
from downloadview_async.contrib.django.files import FileNotFound
from downloadview_async.contrib.django.links import Link, link_of
from downloadview_async.contrib.django.offload import is_local
from downloadview_async.contrib.django.proxied import OrderedWith200, ProxyOffer
from downloadview_async.errors import FileError, FileMissing
from downloadview_async.http.content_types import content_type_for, with_charset
from downloadview_async.http.dates import parse_http_date
from downloadview_async.http.fields import FRAMING, OFFLOAD_HEADERS
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.plan import Headers, Plan, Presentation, make_offload_plan, make_plan
from downloadview_async.http.request import FIELDS, GET, HEAD, DownloadRequest
from downloadview_async.offload.base import EXTENSION, OffloadBackend, rated, signed
from downloadview_async.offload.decision import Refusal, is_remote_order, refusal, refusal_once_open
from downloadview_async.policy.limits.limits import TRANSFERS
from downloadview_async.policy.uses import Use
from downloadview_async.sources.base import AsyncFile, OpenFile, cache_status_of
from downloadview_async.sources.cache.source import CachedFile
from downloadview_async.sources.local.open_file import local_of, open_nowait
from downloadview_async.sources.virtual import VirtualFile

_TEXTLESS = re.compile("(?:application|audio|font|image|model|multipart|video)/", re.IGNORECASE)
T = TypeVar("T")


class DownloadResponse(OrderedWith200, StreamingHttpResponse):
    """A file as a response.

    file_instance: a FieldFile, a StorageFile, any Django file, a file object, an iterable, or an `AsyncFile`. With a
    basename, also a string that is the content.
    attachment: True (the default) has the client save the file, False has it show the file inline.
    basename: the name under which the client saves the file. Default: the file's name.
    content_type: the whole Content-Type. file_mimetype: the type without the charset. Default: what the file says, else
    the type for its name.
    offload: whether a proxy may send the file, if one is offered. A proxy opens the file later, so it never sends one
    that is deleted when the response is closed. Nor does it send a file that its storage decrypts or decompresses, see
    `is_sent_as_stored`.

    The file is opened, and Range and If-* are evaluated, when the response is finished, see `finish`. The views, the
    middlewares and the ASGI handler of this package finish it. An unfinished response has the status 200, the whole
    file and no Content-Length. If `signature_required` has let the request in, what its link says about the name, the
    disposition and the type of the file wins, and the download of a link with `uses` is counted.

    Raises `TypeError` for a path, and `ValueError` for a status without a body.
    """

    opened: OpenFile | None = None  # a class attribute, for `__del__` after a constructor that raised
    ignores_modified_since = False
    """Whether If-Modified-Since has been evaluated already."""

    counter: Account | None = None
    """Counts what a server takes that iterates over the response: set by `AccountsMiddleware`."""

    file_not_found_response: Callable[[], HttpResponseBase] | None = None
    """Makes the response if the file is missing. None: a plain 404. It may raise `Http404`."""

    def __init__(
        self,
        file_instance: Any,
        attachment: bool = True,
        basename: str | None = None,
        status: int = 200,
        content_type: str | None = None,
        file_mimetype: str | None = None,
        file_encoding: str | None = None,
        headers: Mapping[str, str] | None = None,
        offload: bool = True,
    ) -> None:
        if status < 200 or status in (204, 205, 304):
            raise ValueError(f"a response with the status {status} has no body, so it cannot send a file")
        _check_file(file_instance, basename)
        self.file = file_instance
        self.attachment = attachment
        self.basename = basename
        self.file_mimetype = file_mimetype
        self.file_encoding = file_encoding
        self.offload = offload
        self.is_finished = False
        self.is_replaced = False
        self.request: HttpRequest | None = None
        self.plan: Plan | None = None
        self._wanted = GET
        self._link: Link | None = None
        self._limited: dict[str, Any] | None = None
        self._resources = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        given = {header.lower() for header in headers or ()}
        made = {header: value for header, value in self.default_headers.items() if header.lower() not in given}
        if content_type is not None:
            made["Content-Type"] = content_type
        super().__init__((), status=status, headers={**made, **(headers or {})})
        self.is_replaced = False
        self._resource_closers.append(close_own_connections)  # type: ignore[attr-defined]
        if callable(close := getattr(file_instance, "close", None)):
            self._resource_closers.append(close)  # type: ignore[attr-defined]

    @cached_property
    def default_headers(self) -> dict[str, str]:
        """The headers that follow from the file and from the arguments of the application."""
        return {
            "Content-Type": self.get_content_type(),
            "Content-Disposition": content_disposition(self.get_basename(), self.attachment),
            "X-Content-Type-Options": "nosniff",
        }

    def get_basename(self) -> str:
        """Return the name under which the client saves the file."""
        return self.basename or os.path.basename(name_of(self.file))

    def refusal(self, request: HttpRequest) -> Refusal | None:
        """Return why no proxy may send the file, or None if one may, as far as is known before the file is open."""
        return refusal(
            status=self.status_code,
            method=str(request.method),
            is_permitted=self._is_left_as_stored(request),
            is_coded=self._is_coded,
        )

    @property
    def _is_coded(self) -> bool:
        """Whether the application has set a Content-Encoding."""
        return super().has_header("Content-Encoding")

    def _is_left_as_stored(self, request: HttpRequest) -> bool:
        """Return whether the file is sent as it is stored, and is still there when the request has ended."""
        harmless = (close_own_connections, getattr(self.file, "close", None))
        closers: list[Any] = self._resource_closers  # type: ignore[attr-defined]
        return (
            self.offload
            and is_sent_as_stored(self.file)
            and is_left_by_closing(self.file)
            and is_left_by_closing(self)
            and all(
                closer in harmless or isinstance(getattr(closer, "__self__", None), HttpRequest) for closer in closers
            )
            and not has_new_receivers(request)
        )

    def get_content_type(self) -> str:
        """Return the Content-Type: the file's `content_type`, else its MIME type, with the charset if it is text."""
        content_type = getattr(self.file, "content_type", None) if self.file_mimetype is None else None
        if isinstance(content_type, str) and content_type:
            return content_type
        mime_type = self.get_mime_type()
        if _TEXTLESS.match(mime_type):
            return with_charset(mime_type, getattr(self.file, "charset", None))
        return with_charset(mime_type, self.get_charset())

    def get_mime_type(self) -> str:
        """Return the MIME type: that of the application or of the file, else the type for the name."""
        mime_type = self.file_mimetype or getattr(self.file, "mime_type", None)
        if isinstance(mime_type, str) and mime_type:
            return mime_type
        return content_type_for(self.get_basename()).partition(";")[0]

    def get_encoding(self) -> str | None:
        """Return the encoding that the application or the file gives, or None. No header is made from it."""
        return self.file_encoding or getattr(self.file, "encoding", None)

    def get_charset(self) -> str:
        """Return the charset of a text file."""
        charset = getattr(self.file, "charset", None)
        return charset if isinstance(charset, str) and charset else settings.DEFAULT_CHARSET

    def finish(self, request: HttpRequest) -> HttpResponseBase:
        """Do what `afinish` does, for synchronous code."""
        return _in_loop_of(request, self.afinish)

    async def afinish(self, request: HttpRequest) -> HttpResponseBase:
        """Open the file, evaluate the conditions and ranges of the request, and return the response to send.

        That is this response, or a 502, 503 or 504 for a file that cannot be opened now. If a proxy sends the file,
        this response becomes a `ProxiedDownloadResponse`; for a 304, an `HttpResponseNotModified`, unless the project
        has overridden `close`. Raises `Http404` for a missing file, unless `file_not_found_response` makes another
        response.
        """
        if self.is_finished or self.is_replaced:
            return self
        self.request = request
        self._follow_link(request)
        self._unfinished = self.status_code, {header.lower(): value for header, value in self.items()}
        try:
            await self._finish(request)
        except (FileError, FileNotFound) as exc:
            return await self.afail(exc, request)
        return self

    async def afinish_again(self, request: HttpRequest) -> None:
        """Finish the response for the version of the file that is there now. Nothing has been sent of the other one.

        What has been set since in the response stays. Raises `FileError`.
        """
        assert self.plan is not None, "the response has to be finished"
        await self.release()
        self.status_code, headers = self._unfinished
        for header, value in self.plan.headers.items():
            if self.get(header) == value:
                del self[header]
                if header in headers:
                    self.headers[spelled(header)] = headers[header]
        self.is_finished, self.plan = False, None
        await self._finish(request)

    async def _finish(self, request: HttpRequest) -> None:
        file = async_file_of(self.file, self.get_basename())
        self._wanted = self._wanted_by(request)
        if await self._is_offloaded_by_scope(request, file):
            return
        opened = await self._open(file, self._wanted)
        metadata, presentation, headers = self._described(file, opened)
        plan = make_plan(self._wanted, metadata, presentation, status=self.status_code, headers=headers)
        await self._spend(request, metadata, plan)
        if self._use is not None:
            await for_request(request, claim(self._use, metadata, plan))
        self._take_over(plan)
        if plan.status == 304 and is_left_by_closing(self):
            await self._become(HttpResponseNotModified)

    def accept(self, request: HttpRequest, offer: ProxyOffer) -> bool:
        """Do what `aaccept` does, for synchronous code."""
        accept = partial(self.aaccept, offer=offer)
        # a file that is opened and closed in this call needs no certain loop
        return run_in_background(accept(request)) if self.opened is None else _in_loop_of(request, accept)

    async def aaccept(self, request: HttpRequest, offer: ProxyOffer) -> bool:
        """Become the response that has a proxy send the file, and return True; or return False if no proxy may.

        The response is then still unfinished, and the next offer may be accepted.
        """
        was_open = self.opened is not None
        self._follow_link(request)
        try:
            refused = await self._offload(request, async_file_of(self.file, self.get_basename()), offer)
        except (FileError, FileNotFound, SuspiciousOperation):
            if not was_open:
                await self.release()
            return False  # finishing the response will meet the error again
        if refused is not None:
            note_refusal(refused, str(request.method), request.path)
            return False
        del self["Content-Length"]  # a server or middleware adds it, as to each response of Django without a body
        return True

    async def alocate(self, request: HttpRequest) -> None:
        """Open a cached file, whose location is known only while it is open.

        It stays open until the response is finished, so that the origin is asked only once.
        """
        if isinstance(self.file, CachedFile):
            with suppress(FileError):  # finishing the response will meet the error again
                await self._open(self.file, self._wanted_by(request))

    def locate(self, request: HttpRequest) -> None:
        """Do what `alocate` does, for synchronous code."""
        if isinstance(self.file, CachedFile):
            _in_loop_of(request, self.alocate)

    async def _is_offloaded_by_scope(self, request: HttpRequest, file: AsyncFile) -> bool:
        """Accept the offer that `OffloadMiddleware` has made in the scope. Return whether there is one that holds."""
        scope: Mapping[str, Any] = getattr(request, "scope", None) or {}
        backend: OffloadBackend | None = (scope.get("extensions") or {}).get(EXTENSION)
        if backend is None:
            return False
        if (refused := self.refusal(request)) is None:
            if not (order := backend.headers_for(file)):
                await self._open(file, self._wanted)  # a cached file may get its location only when it is opened
                order = backend.headers_for(file)

            async def headers(content_type: str) -> Mapping[str, str] | None:
                order = backend.headers_for(file)  # again, as the file is open now
                return await signed(backend, file, rated(backend, order, self._rate(request))) if order else None

            offer = ProxyOffer(headers, is_remote=is_remote_order(order), needs_metadata=True)
            refused = await self._offload(request, file, offer) if order else Refusal.RULE
        if refused is not None:
            note_refusal(refused, str(request.method), request.path)
        return refused is None

    async def _offload(self, request: HttpRequest, file: AsyncFile, offer: ProxyOffer) -> Refusal | None:
        """Become the response that has the proxy of an offer send the file, or return why no proxy may.

        All that is known of the response before the file is open has been checked.
        """
        method = str(request.method)
        is_remote, was_open = offer.is_remote and not is_local(file), self.opened is not None
        if (refused := refusal(method=method, is_remote=is_remote)) is not None:
            return refused
        if not was_open and file.location is not None:  # a storage without paths is not asked
            try:
                await self._open(file, HEAD)
            except FileError as exc:
                if offer.needs_metadata or isinstance(exc, FileMissing) or is_local(file):
                    raise
        metadata, presentation, headers = self._described(file, self.opened)
        if self.opened is not None:
            wanted, is_coded = self._wanted_by(request), self._is_coded
            refused = refusal_once_open(
                self.opened, metadata, wanted, method=method, is_remote=is_remote, is_coded=is_coded
            )
        if refused is None:
            plan = make_offload_plan(metadata, presentation, {}, headers=headers)
            if (order := await offer.headers(plan.headers["content-type"])) is not None:
                await self._spend(request, metadata)
                if self._use is not None:
                    await for_request(request, claim(self._use, metadata))
                order = {header.lower(): value for header, value in order.items()}
                if (rate := self._rate(request)) is not None and (header := offer.kind.rate_header) is not None:
                    order = header.added_to(order, rate)
                headers = {**plan.headers, **order}
                self._take_over(replace(plan, headers=headers))
                await self._become(offer.kind)
                # A signature expires, a cached file is evicted, and a HEAD or an If-Range may be refused.
                vars(self)["_is_passing"] = is_remote or isinstance(file, CachedFile)
                return None
            refused = Refusal.RULE
        if not was_open:
            await self.release()
        return refused

    async def _spend(self, request: HttpRequest, metadata: FileMetadata, plan: Plan | None = None) -> None:
        """Keep to the limits of the client. Raises `LimitExceeded` and `SourceUnavailable`."""
        self._limited = limited_scope(request)
        if self._limited is not None:
            await for_request(request, _spend(self._limited, metadata, plan))

    def _rate(self, request: HttpRequest) -> int | None:
        """Return the rate of the client, in bytes per second, for a proxy that sends the file."""
        scope = limited_scope(request)
        return None if scope is None else scope[TRANSFERS].rate

    @property
    def _use(self) -> Use | None:
        """The use of the link that this download counts as; None without a link that counts its uses."""
        return None if self._link is None else self._link.use

    def _follow_link(self, request: HttpRequest) -> None:
        """Present the file as the link says by which the request has come, if it has come by one."""
        link = link_of(request)
        if self._link is not None or link is None:
            return
        self._link, before = link, self.default_headers
        grant = link.grant
        if grant.filename is not None:
            self.basename = grant.filename
        if grant.attachment is not None:
            self.attachment = grant.attachment
        del self.default_headers
        is_named = grant.filename is not None or grant.attachment is not None
        for header, value in self.default_headers.items():
            if self.get(header) == before[header] or (is_named and header == "Content-Disposition"):
                self.headers[header] = value
        if grant.content_type is not None:
            self.headers["Content-Type"] = grant.content_type
        self.headers["Cache-Control"] = link.cache_control(self.get("Cache-Control"))

    def _wanted_by(self, request: HttpRequest) -> DownloadRequest:
        """Return the request as the plan needs it. Conditions and ranges apply only to GET and HEAD."""
        if request.method not in ("GET", "HEAD"):
            return GET
        wanted = _download_request(request, getattr(request, "scope", None) or {})
        return replace(wanted, if_modified_since=None) if self.ignores_modified_since else wanted

    async def _open(self, file: AsyncFile, wanted: DownloadRequest) -> OpenFile:
        """Return the open file, which stays open until `release`."""
        if self.opened is not None:
            return self.opened
        self._loop = asyncio.get_running_loop()
        if (opened := open_nowait(file, wanted)) is not None and (local := local_of(opened)) is not None:
            self._resources.callback(local.close)
        else:
            opened = await self._resources.enter_async_context(file.open(wanted))
        self.opened = opened
        return opened

    def _described(self, file: AsyncFile, opened: OpenFile | None) -> tuple[FileMetadata, Presentation, Headers]:
        """Return the metadata of a file, as far as it is open, its presentation, and the headers of the application."""
        metadata, made = FileMetadata() if opened is None else opened.metadata, self.default_headers
        given_headers = {header.lower(): value for header, value in self.items() if made.get(header) != value}
        if (etag := ETag.parse(given_headers.pop("etag", ""))) is not None:
            metadata = replace(metadata, etag=etag)
        if (date := parse_http_date(given_headers.pop("last-modified", ""))) is not None:
            metadata = replace(metadata, last_modified=date)
        for header in FRAMING | OFFLOAD_HEADERS:
            given_headers.pop(header, None)
        # The type that the file gives wins over the type for its name.
        says = None if isinstance(file, VirtualFile) or self.file_mimetype is not None else metadata.content_type
        granted = None if self._link is None else self._link.grant.content_type
        presentation = Presentation(
            filename=self.get_basename() or file.name,
            attachment=self.attachment,
            content_type=granted or says or self["Content-Type"],
        )
        given_headers.setdefault("content-disposition", self["Content-Disposition"])
        if opened is not None and (age := age_of(opened)) is not None:
            given_headers.setdefault("age", age)
        if opened is not None and (status := cache_status_of(file)) is not None:
            given_headers.setdefault("cache-status", status)
        return metadata, presentation, given_headers

    def _take_over(self, plan: Plan) -> None:
        for header in [header for header in self.headers if header.lower() not in plan.headers]:
            del self[header]
        for header, value in plan.headers.items():
            if self.headers.get(header) != value:
                self.headers[spelled(header)] = value
        self.status_code = plan.status
        self.plan = plan
        self.is_finished = True

    async def _become(self, kind: type[HttpResponse]) -> None:
        """Close the file, and become a response of another class, without a body.

        It stays the same object, so it keeps its headers and cookies, and all that decorators have set on it.
        """
        await self.release()
        self.basename = self.get_basename()
        for name in (
            "request",
            "file_not_found_response",
            "_limited",
            "_link",
            "_loop",
            "_resources",
            "_unfinished",
        ):  # Django's cache pickles the rest
            vars(self).pop(name, None)
        response: Any = self
        response.__class__ = kind
        response.content = b""

    async def afail(self, exc: Exception, request: HttpRequest) -> HttpResponseBase:
        """Close the file, and return the answer to a request whose file cannot be sent. Raises `Http404`."""
        await self.release()
        if isinstance(exc, FileError) and exc.status != 404:
            return error_response(exc, request)
        note_missing(exc, request)
        if (answer := self.file_not_found_response) is not None:
            return await (answer if iscoroutinefunction(answer) else sync_to_async(answer))()
        raise Http404 from None

    @property
    def is_long(self) -> bool:
        """Whether the body may take long to send: whether it needs more than one message."""
        length = None if self.plan is None else self.plan.length
        return length is None or length > SMALL

    async def release(self) -> None:
        """Close the file. Call this only in the event loop that has finished the response."""
        await self._resources.aclose()
        self.opened = None

    def has_header(self, header: str) -> bool:
        """Return whether the response has a header. It claims Content-Encoding where no middleware may encode it."""
        claims = self.status_code in (206, 304) and header.lower() == "content-encoding"
        return claims or super().has_header(header)

    __contains__ = has_header

    def close(self) -> None:
        """Close the file, from any thread: Django closes responses in another thread."""
        self._close_file()
        super().close()

    def __del__(self) -> None:
        self._close_file()  # a middleware may have replaced this response

    def _close_file(self) -> None:
        if self.opened is None:
            return
        loop, resources, local = self._loop, self._resources.pop_all(), local_of(self.opened)
        self.opened = None
        if loop is not None and loop.is_running():
            loop.call_soon_threadsafe(lambda: loop.create_task(resources.aclose()))
        elif local is not None:
            local.close()

    # The content

    @property
    def is_async(self) -> bool:
        """Whether to iterate over the content asynchronously. Our content can be iterated in both ways."""
        if self.is_replaced:
            return self._replacement_is_async
        if self.request is not None:
            return isinstance(self.request, ASGIRequest)
        # the context is also set in the threads of an ASGI request, in which Django runs middlewares for WSGI
        return has_running_loop() or SyncToAsync.thread_sensitive_context.get(None) is not None

    @is_async.setter
    def is_async(self, value: bool) -> None:
        self._replacement_is_async = value

    @property
    def streaming_content(self) -> Any:
        """The rest of the content. It can be iterated once, synchronously or asynchronously."""
        return super().streaming_content if self.is_replaced else _Content(self)

    @streaming_content.setter
    def streaming_content(self, value: Any) -> None:
        self.is_replaced = True
        self._set_streaming_content(value)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[bytes]:
        chunks: Iterator[bytes] = super().__iter__() if self.is_replaced else iter(_Content(self))
        return chunks if self.counter is None else each_counted(chunks, self.counter)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await close_idle_connections()
        chunks: Any = super().__aiter__() if self.is_replaced else self.chunks()
        if self.counter is not None:
            chunks = each_counted_async(chunks, self.counter)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body in chunks: exactly the promised bytes. Raises `TransferAborted`."""
        opened, plan = self.opened, self.plan
        async with AsyncExitStack() as stack:
            if plan is None or self._loop is not asyncio.get_running_loop():
                # Unfinished, or finished in another loop, as in a test that reads after AsyncClient has ended its loop.
                file = async_file_of(self.file, self.get_basename())
                opened = await stack.enter_async_context(file.open(self._wanted))
                plan = plan or make_plan(GET, opened.metadata, Presentation(filename=self.get_basename()))
            else:
                stack.push_async_callback(self.release)
            if opened is not None:
                body = await stack.enter_async_context(aclosing(body_of(plan, opened)))
                if self._use is not None:
                    body = await stack.enter_async_context(aclosing(counted(body, plan, self._use)))
                if self._limited is not None and plan.body:
                    transfers = self._limited[TRANSFERS]
                    body = await stack.enter_async_context(aclosing(limited(body, transfers, plan.length)))
                async for chunk in body:
                    yield chunk


async def _spend(scope: dict[str, Any], metadata: FileMetadata, plan: Plan | None) -> None:
    if (spending := spend(scope, metadata, plan)) is not None:
        await spending


def _check_file(file: Any, basename: str | None) -> None:
    """Raise `TypeError` for a path: the text of it would be sent. Text with a basename is content."""
    if (isinstance(file, str) and not basename) or hasattr(file, "__fspath__"):
        raise TypeError(
            f"DownloadResponse takes a file, not the path {str(file)!r}: use PathDownloadView, or "
            "DownloadResponse(open(path, 'rb')). To send text, name it with basename=..."
        )
    if hasattr(file, "__await__"):
        raise TypeError("DownloadResponse takes a file, not a coroutine: await source.resolve(...) first")


class _Content:
    """The content of a response, for synchronous and asynchronous iteration."""

    def __init__(self, response: DownloadResponse) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return iterate_in_background(self._response.chunks())

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.chunks()


def _in_loop_of(request: HttpRequest, method: Callable[[HttpRequest], Coroutine[Any, Any, T]]) -> T:
    """Call a coroutine function with a request, and wait for its result, in the loop that will send the response."""
    if isinstance(request, ASGIRequest):
        return async_to_sync(method)(request)
    return run_in_background(method(request))


def may_be_offloaded(response: Any, request: HttpRequest) -> bool:
    """Return whether a response may accept an offer, as far as this is known before its file is open."""
    is_unfinished = isinstance(response, DownloadResponse) and not response.is_finished and not response.is_replaced
    return is_unfinished and response.refusal(request) is None


def is_due(response: Any, request: HttpRequest) -> bool:
    """Return whether to finish a response now: whether it is an unfinished download, outside `deferred`."""
    return isinstance(response, DownloadResponse) and not response.is_finished and not is_deferred(request)


_META = [(f"HTTP_{field.decode().upper().replace('-', '_')}", field) for field in sorted(FIELDS)]


def _download_request(request: HttpRequest, scope: Mapping[str, Any]) -> DownloadRequest:
    headers = scope.get("headers")
    if headers is None:
        fields = ((field, request.META.get(name)) for name, field in _META)
        headers = [(field, str(value).encode("latin-1", "replace")) for field, value in fields if value is not None]
    return DownloadRequest.from_headers(str(request.method), headers)


@lru_cache(maxsize=256)
def spelled(header: str) -> str:
    """Return the usual spelling of a header name: "etag" gives "ETag"."""
    return "ETag" if header == "etag" else "-".join(part.capitalize() for part in header.split("-"))
