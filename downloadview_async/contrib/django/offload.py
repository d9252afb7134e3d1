"""Which file a reverse proxy can reach, by the settings of one middleware: matching and encoding are the core's."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation
from django.core.files.storage import FileSystemStorage
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from downloadview_async.asgi.response import age_of, note_refusal
from downloadview_async.contrib.django.background import run_in_background
from downloadview_async.contrib.django.files import FileNotFound, async_file_of, is_sent_as_stored
from downloadview_async.contrib.django.responses import DownloadResponse, spelled, take_marks
from downloadview_async.errors import ConfigurationError, FileError, FileMissing
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.plan import FRAMING, Presentation, describe
from downloadview_async.http.request import HEAD
from downloadview_async.offload.base import OffloadBackend
from downloadview_async.offload.decision import Refusal, refusal
from downloadview_async.offload.rules import Rule
from downloadview_async.sources.base import AsyncFile, OpenFile
from downloadview_async.sources.cache.source import CachedFile
from downloadview_async.sources.local.open_file import local_of, open_nowait

MakeBackend = Callable[[list[Rule]], OffloadBackend]

_MADE_HERE = ("etag", "last-modified", "content-security-policy")
_SIGNATURE = re.compile(r"(?:^|&)X-Signature=[^&]*")
_QUERY = re.compile(r"[!$-;=?-Z_a-z~]*")  # visible ASCII that needs no escape in a URI
_UNSAFE_IN_URLS = frozenset("%?#\\")  # a backslash becomes a slash in the URLs of Django


@dataclass(frozen=True, slots=True)
class Found:
    """Where the proxy finds a file: the header's value for its path, and the query of its URL if that is needed."""

    value: str
    query: str = ""


class Rules:
    """The rules of one middleware: by the URL of a file if there is a `source_url`, else by its path.

    Raises `ImproperlyConfigured` for what cannot be matched, or is no destination for the kind of proxy.
    """

    def __init__(
        self,
        make_backend: MakeBackend,
        *,
        source_dir: str | os.PathLike[str] | None,
        source_url: str | None,
        destination: str | os.PathLike[str] | None,
        option: str,
    ) -> None:
        if not destination:
            raise ImproperlyConfigured(f"a rule needs {option}: where the proxy finds what is below the source")
        target = f"{os.fspath(destination).rstrip('/')}/"
        self._by_url = self._by_path = None
        self.is_of_server = False
        """Whether the source is the URL of another server."""
        self._path_is_relative = False
        try:
            if source_url:
                location = _location_of(urlsplit(str(source_url)))
                if location is None or not location.startswith("/"):
                    raise ImproperlyConfigured(
                        f"source_url is an absolute path or URL without a query, such as '/media/', not {source_url!r}"
                    )
                self._by_url = make_backend([Rule(location, target)])
                self.is_of_server = bool(urlsplit(str(source_url)).netloc)
            if source_dir:
                directory = os.fspath(source_dir)
                self._path_is_relative = not os.path.isabs(directory)
                self._by_path = make_backend([Rule(_rooted(directory), target)])
        except ConfigurationError as exc:
            raise ImproperlyConfigured(f"{option}={os.fspath(destination)!r}: {exc}") from exc

    @property
    def want_urls(self) -> bool:
        """Whether the URL of a file is asked for."""
        return self._by_url is not None

    def find(self, file: Any, name: str) -> Found | None:
        """Return where the proxy finds a file of Django's, or None: no rule covers it."""
        if not getattr(file, "_committed", True):
            return None  # a field's new content, which its storage does not have yet
        if not is_sent_as_stored(file):
            return None
        if self._by_url is not None and (url := url_of(file)):
            parts = urlsplit(url)
            location = _location_of(parts)
            if location is not None and _means(location, file):
                query = _SIGNATURE.sub("", parts.query).strip("&") if parts.netloc else ""
                if _QUERY.fullmatch(query) and (value := _value(self._by_url, location)) is not None:
                    return Found(value, query)
        if self._by_path is not None:
            if self._path_is_relative:
                own = getattr(file, "name", None)
                is_stored = hasattr(file, "storage") and isinstance(own, str) and own and not os.path.isabs(own)
                location = _rooted(str(own)) if is_stored else None
            else:
                location = _path_of(file, name)
            if location is not None and (value := _value(self._by_path, location)) is not None:
                return Found(value)
        return None


@dataclass(frozen=True, slots=True)
class _Located:
    """All that a backend asks of a file: its place."""

    location: str


def _value(backend: OffloadBackend, location: str) -> str | None:
    headers = backend.headers_for(cast("AsyncFile", _Located(location)))
    return None if headers is None else next(iter(headers.values()))


def _rooted(directory: str) -> str:
    return f"/{directory.lstrip('/')}"


def url_of(file: Any) -> str | None:
    """Return the URL of a file of Django's, or None: it has none."""
    if _borrows_its_url(getattr(file, "storage", None)):
        return None
    try:
        url = file.url
    except (AttributeError, ValueError, NotImplementedError, SuspiciousOperation):
        return None
    return str(url) if url else None


def _borrows_its_url(storage: Any) -> bool:
    """Return whether a storage is of another directory than MEDIA_ROOT, and has its URLs from MEDIA_URL alone."""
    return (
        isinstance(storage, FileSystemStorage)
        and getattr(storage, "_base_url", "") is None  # `base_url` is MEDIA_URL then
        and storage.location != os.path.abspath(settings.MEDIA_ROOT)
    )


def _location_of(parts: SplitResult) -> str | None:
    """Return the path that a URL encodes, below its server's name if it has one, in the form of a local path.

    None for a URL that has a fragment, encodes a slash, or does not encode text: its path is not what it says.
    """
    if parts.fragment or parts.path.count("/") != unquote_to_bytes(parts.path).count(b"/"):
        return None
    path = os.fsdecode(unquote_to_bytes(parts.path))
    return f"/{parts.scheme}:{parts.netloc.lower()}{path}" if parts.netloc else path


def _means(location: str, file: Any) -> bool:
    """Return whether a decoded URL names the file: a storage of the project's may give URLs that are not encoded."""
    name = getattr(file, "name", None)
    if not isinstance(name, str) or not _UNSAFE_IN_URLS & {*name} or not hasattr(file, "storage"):
        return True
    return location.endswith(f"/{os.path.basename(name)}")


def _path_of(file: Any, name: str) -> str | None:
    try:
        found = async_file_of(file, name)
    except (FileError, FileNotFound, SuspiciousOperation, NotImplementedError):
        return None  # whoever opens it says why
    return found.location if is_local(found) else None


def is_offloadable(request: HttpRequest, response: HttpResponseBase) -> bool:
    """Return whether a proxy may send the file of a response: one that is ours, and unfinished."""
    return (
        isinstance(response, DownloadResponse)
        and not response.is_finished
        and not response.is_replaced
        and response.may_be_offloaded(request)
    )


async def alocate(request: HttpRequest, response: DownloadResponse) -> bool:
    """Open a file that may have its place only then, as one in a cache, and return whether a proxy may find it now.

    It stays open for whoever finishes the response: another server is asked once.
    """
    if not isinstance(response.file, CachedFile) or response.opened is not None:
        return False
    try:
        await response.open_early(request, response.file)
    except FileError:
        return False  # whoever finishes the response says why
    return response.file.location is not None


def locate_now(request: HttpRequest, response: DownloadResponse) -> bool:
    """Do what `alocate` does, for code that blocks: in the event loop that finishes the response."""
    if not isinstance(response.file, CachedFile):
        return False
    if isinstance(request, ASGIRequest):
        return async_to_sync(alocate)(request, response)
    return run_in_background(alocate(request, response))


async def adescribe(request: HttpRequest, response: DownloadResponse, *, is_remote: bool) -> FileMetadata | None:
    """Return what is known of the file that a proxy is to send; None if it may not: whoever finishes the response does.

    is_remote: whether the rule has the proxy fetch files from another server.
    A local file and one of another server are opened for that, as `OffloadMiddleware` does. Of other files, such as
    those of a storage without paths, no more is known than that a rule covers them.
    """
    try:
        file = async_file_of(response.file, response.get_basename())
        is_remote = is_remote and not is_local(file)
        refused = refusal(method=str(request.method), is_remote=is_remote)
        metadata = FileMetadata()
        if refused is None and file.location is not None:
            refused, metadata = await _opened_for_proxy(file, request, response, is_remote)
    except (FileError, FileNotFound, SuspiciousOperation):
        return None  # whoever finishes the response says so
    if refused is None:
        if response.opened is not None:  # by `alocate`
            await response.release()
        return metadata
    note_refusal(refused, str(request.method), request.path)
    return None


async def _opened_for_proxy(
    file: AsyncFile, request: HttpRequest, response: DownloadResponse, is_remote: bool
) -> tuple[Refusal | None, FileMetadata]:
    """Open a file, and return why no proxy may send it (None: one may), and what is known of it."""

    def asked(opened: OpenFile) -> tuple[Refusal | None, FileMetadata]:
        metadata = opened.metadata
        if (age := age_of(opened)) is not None:
            metadata = replace(metadata, headers=(*metadata.headers, ("age", age)))
        return response.refusal_once_open(request, file, opened, is_remote=is_remote), metadata

    if (opened := open_nowait(file, HEAD)) is not None and (local := local_of(opened)) is not None:
        try:
            return asked(opened)
        finally:
            local.close()
    try:
        async with file.open(HEAD) as opened:
            return asked(opened)
    except FileError as exc:
        if isinstance(exc, FileMissing) or is_local(file):
            raise
        return None, FileMetadata()  # the proxy may reach what we cannot


def is_local(file: AsyncFile) -> bool:
    """Return whether a file is at a path."""
    return file.location is not None and file.location.startswith("/")


def describe_now(request: HttpRequest, response: DownloadResponse, *, is_remote: bool) -> FileMetadata | None:
    """Do what `adescribe` does, for code that blocks."""
    return run_in_background(adescribe(request, response, is_remote=is_remote))


def may_block(response: DownloadResponse) -> bool:
    """Return whether asking for the URL of the file runs code of which nothing is known."""
    storage = getattr(response.file, "storage", None)
    if storage is None:
        return False
    # __class__: of a lazy storage, that of what it stands for
    homes = [base.__module__ for base in storage.__class__.__mro__ if "url" in vars(base)]
    return not all(home.startswith(("django.core.files.", "downloadview_async.")) for home in homes)


def dress(offloaded: HttpResponseBase, response: DownloadResponse, metadata: FileMetadata) -> None:
    """Give an offloaded answer what the response has, headers, cookies, what is to be closed, and what the file has."""
    for name, value in response.items():
        if name.lower() not in OFFLOAD_HEADERS | FRAMING:
            offloaded[name] = value
    presentation = Presentation(filename=response.get_basename(), attachment=response.attachment)
    described = describe(metadata, presentation, {name.lower(): value for name, value in offloaded.items()})
    for name in (*_MADE_HERE, *(name for name, _ in metadata.headers)):
        if name in described:
            offloaded[spelled(name)] = described[name]
    take_marks(offloaded, response)
    offloaded.cookies = response.cookies
    offloaded._resource_closers = response._resource_closers  # type: ignore[attr-defined]  # noqa: SLF001
