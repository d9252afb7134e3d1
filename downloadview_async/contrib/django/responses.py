"""`DownloadResponse`: a file as a response of Django's, for ASGI and for WSGI."""

import asyncio
import os
import re
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from asgiref.sync import SyncToAsync, async_to_sync, iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core import signals
from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotModified, StreamingHttpResponse
from django.http.response import HttpResponseBase

from downloadview_async.asgi.response import age_of, failed, note_refusal
from downloadview_async.asgi.transfer import SMALL, body_of
from downloadview_async.contrib.django.background import iterate_in_background, run_in_background
from downloadview_async.contrib.django.calling import close_idle_connections, close_own_connections, has_running_loop
from downloadview_async.contrib.django.files import (
    FileNotFound,
    async_file_of,
    is_left_by_closing,
    is_sent_as_stored,
    name_of,
)
from downloadview_async.errors import FileError, FileMissing
from downloadview_async.http.content_types import content_type_for, with_charset
from downloadview_async.http.dates import parse_http_date
from downloadview_async.http.disposition import MAX_BYTES, client_filename, is_device_name
from downloadview_async.http.disposition import content_disposition as disposition_of
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.plan import FRAMING, Headers, Plan, Presentation, make_offload_plan, make_plan
from downloadview_async.http.request import FIELDS, GET, HEAD, DownloadRequest
from downloadview_async.offload.base import EXTENSION, OffloadBackend, signed
from downloadview_async.offload.decision import Refusal, is_remote_order, refusal, refusal_once_open
from downloadview_async.sources.base import AsyncFile, OpenFile
from downloadview_async.sources.local.open_file import local_of, open_nowait
from downloadview_async.sources.virtual import VirtualFile

_TEXTLESS = re.compile("(?:application|audio|font|image|model|multipart|video)/", re.IGNORECASE)
_RECEIVERS = "_downloadview_receivers"  # in a request: those of request_finished before the view was called
_DEFERRED = "_downloadview_deferred"  # in a request: how many further out have said `defer`


class _OrderedWith200:
    """A response that has its offload headers with the status 200 alone.

    A middleware further out may change the status of a response that is finished already, and a proxy obeys these
    headers whatever the status.
    """

    headers: Any
    _status_code = 200
    _withheld: Mapping[str, str] = {}

    @property
    def status_code(self) -> int:
        """The status."""
        return self._status_code

    @status_code.setter
    def status_code(self, status: int) -> None:
        self._status_code = status
        orders = dict(self._withheld)
        orders |= {header: value for header, value in self.headers.items() if header.lower() in OFFLOAD_HEADERS}
        self._withheld = {} if status == 200 else orders
        for header, value in orders.items():
            if status == 200:
                self.headers[header] = value
            else:
                self.headers.pop(header, None)

    def __setitem__(self, header: str, value: Any) -> None:
        self.headers[header] = value
        if header.lower() in OFFLOAD_HEADERS:
            self.status_code = self._status_code

    def __delitem__(self, header: str) -> None:
        self._withheld = {name: value for name, value in self._withheld.items() if name.lower() != header.lower()}
        self.headers.pop(header, None)

    def setdefault(self, header: str, value: Any) -> None:
        """Set a header unless it is there already, or waits for the status 200."""
        if header.lower() not in {name.lower() for name in (*self.headers, *self._withheld)}:
            self[header] = value


class ProxiedDownloadResponse(_OrderedWith200, HttpResponse):
    """An answer without a body that has a proxy send the file. The proxies' own responses derive from it.

    Its offload headers are there as long as its status is 200.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resource_closers.append(close_own_connections)  # type: ignore[attr-defined]


class DownloadResponse(_OrderedWith200, StreamingHttpResponse):
    """A file as a response.

    file_instance: a FieldFile, a StorageFile, any of Django's files, a file object, an iterable, or an `AsyncFile`.
    attachment: to be saved (the default), or to be shown inline. basename: what the client should call it; default:
    the file's own name. content_type: the whole Content-Type; file_mimetype: without the charset; default: what the
    file itself says, or by its name. offload: whether a proxy may send the file, if one is offered. One that is deleted
    when the response is closed is not left to a proxy, which opens it later; nor is one whose storage changes the bytes
    on the way, see `is_sent_as_stored`.

    The file is opened, and Range and If-* are evaluated, when the response is finished, see `finish`. The views, the
    middlewares and the ASGI handler of this package do that. A response that nobody finishes is a 200 with the whole
    file and without its length.
    """

    opened: OpenFile | None = None  # also where a constructor has raised
    ignores_modified_since = False
    """Whether somebody has evaluated If-Modified-Since already."""

    file_not_found_response: Callable[[], HttpResponseBase] | None = None
    """What answers where the file turns out to be missing, if that is no plain 404. It may raise `Http404`."""

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
            raise ValueError(f"a response with the status {status} has no body to send a file in")
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
        self._resources = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._default_headers: dict[str, str] | None = None
        given = {header.lower() for header in headers or ()}
        made = {header: value for header, value in self.default_headers.items() if header.lower() not in given}
        if content_type is not None:
            made["Content-Type"] = content_type
        super().__init__((), status=status, headers={**made, **(headers or {})})
        self.is_replaced = False
        self._resource_closers.append(close_own_connections)  # type: ignore[attr-defined]
        if callable(close := getattr(file_instance, "close", None)):
            self._resource_closers.append(close)  # type: ignore[attr-defined]

    @property
    def default_headers(self) -> dict[str, str]:
        """The headers that follow from the file's name, and from what the application says of it."""
        if self._default_headers is None:
            self._default_headers = {
                "Content-Type": self.get_content_type(),
                "Content-Disposition": content_disposition(self.get_basename(), self.attachment),
                "X-Content-Type-Options": "nosniff",
            }
        return self._default_headers

    def get_basename(self) -> str:
        """Return what the client should call the file."""
        return self.basename or os.path.basename(name_of(self.file))

    def may_be_offloaded(self, request: HttpRequest) -> bool:
        """Return whether a proxy may send the file, as far as that is known before the file is open."""
        return self.refusal_before_open(request) is None

    def refusal_before_open(self, request: HttpRequest) -> Refusal | None:
        """Return why no proxy may send the file, or None: one may, as far as that is known before the file is open."""
        return refusal(
            status=self.status_code,
            method=str(request.method),
            is_permitted=self._is_left_as_stored(request),
            is_coded=self._is_coded,
        )

    def refusal_once_open(
        self, request: HttpRequest, file: AsyncFile, opened: OpenFile, *, is_remote: bool
    ) -> Refusal | None:
        """Return why no proxy may send the file that is open, or None: one may.

        is_remote: whether the proxy fetches the file from another server.
        """
        metadata, _, _ = self._described(file, opened)
        wanted = self._wanted_by(request)
        return self._refusal_once_open(opened, metadata, wanted, str(request.method), is_remote=is_remote)

    def _refusal_once_open(
        self, opened: OpenFile, metadata: FileMetadata, wanted: DownloadRequest, method: str, *, is_remote: bool
    ) -> Refusal | None:
        return refusal_once_open(opened, metadata, wanted, method=method, is_remote=is_remote, is_coded=self._is_coded)

    @property
    def _is_coded(self) -> bool:
        """Whether the application has set a Content-Encoding."""
        return super().has_header("Content-Encoding")

    def _is_left_as_stored(self, request: HttpRequest) -> bool:
        """Return whether the file is sent as it is stored, and is still there when the request has ended."""
        own = (close_own_connections, getattr(self.file, "close", None))
        closers: list[Any] = self._resource_closers  # type: ignore[attr-defined]
        return (
            self.offload
            and is_sent_as_stored(self.file)
            and is_left_by_closing(self.file)
            and is_left_by_closing(self)
            and all(closer in own or isinstance(getattr(closer, "__self__", None), HttpRequest) for closer in closers)
            and not has_new_receivers(request)
        )

    def get_content_type(self) -> str:
        """Return the Content-Type: what the file says of itself, else its MIME type with the charset of a text."""
        own = getattr(self.file, "content_type", None) if self.file_mimetype is None else None
        if isinstance(own, str) and own:
            return own
        mime_type = self.get_mime_type()
        if _TEXTLESS.match(mime_type):
            return with_charset(mime_type, getattr(self.file, "charset", None))
        return with_charset(mime_type, self.get_charset())

    def get_mime_type(self) -> str:
        """Return the MIME type of the file: what the application says, else by its name."""
        own = self.file_mimetype or getattr(self.file, "mime_type", None)
        return own if isinstance(own, str) and own else content_type_for(self.get_basename()).partition(";")[0]

    def get_encoding(self) -> str | None:
        """Return the encoding that the application says the file has, else None. No header is made of it."""
        return self.file_encoding or getattr(self.file, "encoding", None)

    def get_charset(self) -> str:
        """Return the charset of a text."""
        own = getattr(self.file, "charset", None)
        return own if isinstance(own, str) and own else settings.DEFAULT_CHARSET

    def finish(self, request: HttpRequest) -> HttpResponseBase:
        """Do what `afinish` does, for code that blocks."""
        if isinstance(request, ASGIRequest):
            return async_to_sync(self.afinish)(request)
        return run_in_background(self.afinish(request))

    async def afinish(self, request: HttpRequest) -> HttpResponseBase:
        """Open the file, decide what of it the request gets, and return the response that says so: this, or a 304.

        A missing file raises `Http404`; one that cannot be had now is a response with 502, 503 or 504.
        """
        if self.is_finished or self.is_replaced:
            return self
        self.request = request
        try:
            plan = await self._open_and_plan(request)
        except (FileError, FileNotFound) as exc:
            return await self._failed(exc, request)
        self._take_over(plan)
        if plan.status != 304:
            return self
        not_modified = HttpResponseNotModified()
        for header, value in self.items():
            not_modified[header] = value
        not_modified.cookies = self.cookies
        not_modified._resource_closers += self._resource_closers  # type: ignore[attr-defined]  # noqa: SLF001
        take_marks(not_modified, self)
        await self.release()
        return not_modified

    async def _open_and_plan(self, request: HttpRequest) -> Plan:
        file = async_file_of(self.file, self.get_basename())
        scope: Mapping[str, Any] = getattr(request, "scope", None) or {}
        self._wanted = self._wanted_by(request)
        backend: OffloadBackend | None = (scope.get("extensions") or {}).get(EXTENSION)
        if backend is None:
            opened = await self._open(file, self._wanted)
        else:
            opened, plan = await self._open_for_proxy(file, backend, request)
            if plan is not None:
                return plan
        metadata, presentation, own = self._described(file, opened)
        return make_plan(self._wanted, metadata, presentation, status=self.status_code, headers=own)

    def _wanted_by(self, request: HttpRequest) -> DownloadRequest:
        """Return what a request asks for. Conditions and ranges apply to GET and HEAD alone."""
        if request.method not in ("GET", "HEAD"):
            return GET
        wanted = _download_request(request, getattr(request, "scope", None) or {})
        return replace(wanted, if_modified_since=None) if self.ignores_modified_since else wanted

    async def open_early(self, request: HttpRequest, file: AsyncFile) -> None:
        """Open the file for `afinish`, as the request wants it. Raises `FileError`."""
        await self._open(file, self._wanted_by(request))

    def take_content_type(self, metadata: FileMetadata) -> None:
        """Take the Content-Type that the open file tells, unless the application has chosen another one."""
        is_made = self["Content-Type"] == self.default_headers["Content-Type"]
        if metadata.content_type is not None and self.file_mimetype is None and is_made:
            self["Content-Type"] = metadata.content_type

    async def _open_for_proxy(
        self, file: AsyncFile, backend: OffloadBackend, request: HttpRequest
    ) -> tuple[OpenFile, Plan | None]:
        """Open the file, and return it with the answer that has the proxy send it, or with None: none may."""
        method = str(request.method)
        may_be = refused = self.refusal_before_open(request)
        if may_be is None:
            order = backend.headers_for(file)
            refused = refusal(method=method, has_rule=bool(order), is_remote=is_remote_order(order))
        if refused is None:
            opened = await self._open(file, HEAD)
            refused, plan = await self._offload_plan(file, backend, opened, method)
            if plan is not None:
                return opened, plan
            await self.release()
            opened = await self._open(file, self._wanted)
        else:
            opened = await self._open(file, self._wanted)
            # one that is kept in a cache may be known to be there only when it is open
            if may_be is None:
                refused, plan = await self._offload_plan(file, backend, opened, method)
                if plan is not None:
                    return opened, plan
        if refused is not None:
            note_refusal(refused, method, request.path)
        return opened, None

    async def _offload_plan(
        self, file: AsyncFile, backend: OffloadBackend, opened: OpenFile, method: str
    ) -> tuple[Refusal | None, Plan | None]:
        """Return the answer that has the proxy send an open file, or why the proxy may not."""
        if not (order := backend.headers_for(file)):
            return Refusal.RULE, None
        metadata, presentation, own = self._described(file, opened)
        refused = self._refusal_once_open(opened, metadata, self._wanted, method, is_remote=is_remote_order(order))
        if refused is not None:
            return refused, None
        order = await signed(backend, file, order)
        return None, make_offload_plan(metadata, presentation, order, headers=own)

    async def _open(self, file: AsyncFile, wanted: DownloadRequest) -> OpenFile:
        """Open the file until `release`, unless it is open already."""
        if self.opened is not None:
            return self.opened
        self._loop = asyncio.get_running_loop()
        if (opened := open_nowait(file, wanted)) is not None and (local := local_of(opened)) is not None:
            self._resources.callback(local.close)
        else:
            opened = await self._resources.enter_async_context(file.open(wanted))
        self.opened = opened
        return opened

    def _described(self, file: AsyncFile, opened: OpenFile) -> tuple[FileMetadata, Presentation, Headers]:
        """Return what is known of an open file, how it is shown, and the application's own headers."""
        metadata, own = opened.metadata, self._own_headers()
        if (etag := ETag.parse(own.pop("etag", ""))) is not None:
            metadata = replace(metadata, etag=etag)
        if (date := parse_http_date(own.pop("last-modified", ""))) is not None:
            metadata = replace(metadata, last_modified=date)
        for header in FRAMING | OFFLOAD_HEADERS:
            own.pop(header, None)
        # What is known by the name alone gives way to what the file itself says.
        says = None if isinstance(file, VirtualFile) or self.file_mimetype is not None else metadata.content_type
        presentation = Presentation(
            filename=self.get_basename() or file.name,
            attachment=self.attachment,
            content_type=says or self["Content-Type"],
        )
        own.setdefault("content-disposition", self["Content-Disposition"])
        if (age := age_of(opened)) is not None:
            own.setdefault("age", age)
        return metadata, presentation, own

    def _own_headers(self) -> Headers:
        """Return the headers that are not as they were made here: the application's own."""
        made = self.default_headers
        return {header.lower(): value for header, value in self.items() if made.get(header) != value}

    def _take_over(self, plan: Plan) -> None:
        for header in [header for header in self.headers if header.lower() not in plan.headers]:
            del self[header]
        for header, value in plan.headers.items():
            if self.headers.get(header) != value:
                self.headers[spelled(header)] = value
        self.status_code = plan.status
        self.plan = plan
        self.is_finished = True

    async def _failed(self, exc: Exception, request: HttpRequest) -> HttpResponseBase:
        await self.release()
        error = exc if isinstance(exc, FileError) else FileMissing(str(exc))
        headers = failed(error, str(request.method), request.path)
        if error.status == 404:
            if (answer := self.file_not_found_response) is not None:
                return await (answer if iscoroutinefunction(answer) else sync_to_async(answer))()
            raise Http404 from None
        response = HttpResponse(status=error.status, headers={**headers, "Content-Length": "0"})
        del response["Content-Type"]
        return response

    @property
    def is_long(self) -> bool:
        """Whether the body may take long to send: all that does not go out in one message."""
        length = None if self.plan is None else self.plan.length
        return length is None or length > SMALL

    async def release(self) -> None:
        """Close the file. Only in the event loop that has finished the response."""
        await self._resources.aclose()
        self.opened = None

    def has_header(self, header: str) -> bool:
        """Return whether there is such a header. A part of a file counts as encoded: no middleware may encode it."""
        return super().has_header(header) or (self.status_code == 206 and header.lower() == "content-encoding")

    __contains__ = has_header

    def close(self) -> None:
        """Close the file, from any thread: Django closes responses in one of its own."""
        self._close_file()
        super().close()

    def __del__(self) -> None:
        self._close_file()  # some middleware has put another response in the place of this one

    def _close_file(self) -> None:
        if self.opened is None:
            return
        loop, resources, local = self._loop, self._resources.pop_all(), local_of(self.opened)
        self.opened = None
        if loop is not None and loop.is_running():
            loop.call_soon_threadsafe(lambda: loop.create_task(resources.aclose()))
        elif local is not None:
            local.close()

    # What a response streams

    @property
    def is_async(self) -> bool:
        """Whether the content is to be iterated asynchronously: it can be both ways, as long as it is ours."""
        if self.is_replaced:
            return self._replacement_is_async
        if self.request is not None:
            return isinstance(self.request, ASGIRequest)
        # asgiref says so in the threads of a request, too, in which Django runs middlewares for WSGI
        return has_running_loop() or SyncToAsync.thread_sensitive_context.get(None) is not None

    @is_async.setter
    def is_async(self, value: bool) -> None:
        self._replacement_is_async = value

    @property
    def streaming_content(self) -> Any:
        """The content: what is left of it can be iterated once, in both ways."""
        return super().streaming_content if self.is_replaced else _Content(self)

    @streaming_content.setter
    def streaming_content(self, value: Any) -> None:
        self.is_replaced = True
        self._set_streaming_content(value)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[bytes]:
        return super().__iter__() if self.is_replaced else iter(_Content(self))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await close_idle_connections()
        chunks: Any = super().__aiter__() if self.is_replaced else self.chunks()
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body in bounded chunks, exactly what has been promised. Raises `TransferAborted`."""
        if self.plan is None or self._loop is not asyncio.get_running_loop():
            # Not finished, or in a loop that does not run now, as in a test with AsyncClient that reads afterwards.
            async with async_file_of(self.file, self.get_basename()).open(self._wanted) as opened:
                plan = self.plan or make_plan(GET, opened.metadata, Presentation(filename=self.get_basename()))
                async with aclosing(body_of(plan, opened)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            return
        try:
            if self.opened is not None:
                async with aclosing(body_of(self.plan, self.opened)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            await self.release()


class _Content:
    """The content of a response, for whoever iterates over it, in whatever way."""

    def __init__(self, response: DownloadResponse) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return iterate_in_background(self._response.chunks())

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.chunks()


@lru_cache(maxsize=1024)
def content_disposition(filename: str, attachment: bool = True) -> str:
    """Return the value of Content-Disposition.

    As everywhere in this library, but for the name in ASCII, for clients that know no other: that is as in
    django-downloadview, with `_` for blanks and with quotes and backslashes escaped.
    """
    ours = disposition_of(filename, attachment=attachment)
    name = shown = client_filename(filename)
    if '"' in filename:  # there, a backslash in such a name is a part of it
        shown = filename.rstrip("/").rpartition("/")[2]
        shown = "".join(character for character in shown if unicodedata.category(character) not in ("Cc", "Cf", "Cs"))
    ascii_name = unicodedata.normalize("NFKD", shown).encode("ascii", "ignore").decode("ascii").strip()
    fallback = re.sub(r"\s", "_", ascii_name).replace("/", "_").replace("\\", "\\\\").replace('"', '\\"')
    stem = ascii_name.rpartition(".")[0] or ascii_name
    is_whole = name.isascii() or (re.search("[0-9A-Za-z]", stem) and not ascii_name.startswith("."))
    is_safe = is_whole and fallback.strip(". ") and len(fallback) <= MAX_BYTES and not is_device_name(fallback)
    if not is_safe or f'filename="{fallback}"' in ours:
        return ours
    exact = quote(name, safe="!#$&+-.^_`|~")
    return f"{'attachment' if attachment else 'inline'}; filename=\"{fallback}\"; filename*=UTF-8''{exact}"


def take_marks(response: HttpResponseBase, original: "DownloadResponse") -> None:
    """Give a response what decorators have said of the one that it replaces, such as `xframe_options_exempt`."""
    marks = {
        name: value for name, value in vars(original).items() if name.endswith("_exempt") or name.startswith("_csp_")
    }
    vars(response).update(marks)


def note_receivers(request: HttpRequest) -> None:
    """Remember which receivers `request_finished` has before the view is called."""
    vars(request).setdefault(_RECEIVERS, signals.request_finished.receivers[:])


def has_new_receivers(request: HttpRequest) -> bool:
    """Return whether somebody has connected to `request_finished` during the request: perhaps to delete its file."""
    before = getattr(request, _RECEIVERS, None)
    return before is not None and any(receiver not in before for receiver in signals.request_finished.receivers)


def defer(request: HttpRequest) -> None:
    """Say that whoever calls this finishes the response to the request, and nobody further in."""
    note_receivers(request)
    vars(request)[_DEFERRED] = getattr(request, _DEFERRED, 0) + 1


def undefer(request: HttpRequest) -> bool:
    """Take one `defer` back. Return whether it was the last: the response is then to be finished now."""
    left: int = getattr(request, _DEFERRED, 0) - 1
    vars(request)[_DEFERRED] = left
    return left <= 0


def is_deferred(request: HttpRequest) -> bool:
    """Return whether somebody further out finishes the response."""
    return bool(getattr(request, _DEFERRED, 0) > 0)


_META = [(f"HTTP_{field.decode().upper().replace('-', '_')}", field) for field in sorted(FIELDS)]


def _download_request(request: HttpRequest, scope: Mapping[str, Any]) -> DownloadRequest:
    headers = scope.get("headers")
    if headers is None:
        found = ((field, request.META.get(name)) for name, field in _META)
        headers = [(field, str(value).encode("latin-1", "replace")) for field, value in found if value is not None]
    return DownloadRequest.from_headers(str(request.method), headers)


@lru_cache(maxsize=256)
def spelled(header: str) -> str:
    """Return the name of a header as it is usually spelled: "etag" is ETag."""
    return "ETag" if header == "etag" else "-".join(part.capitalize() for part in header.split("-"))
