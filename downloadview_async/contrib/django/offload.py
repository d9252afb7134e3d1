"""Decides which Django files a proxy can reach, by the rules of one middleware."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation
from django.core.files.storage import FileSystemStorage

from downloadview_async.contrib.django.adapters import OURS, async_file_of, is_sent_as_stored, told_of, unwrapped
from downloadview_async.contrib.django.files import FileNotFound
from downloadview_async.errors import ConfigurationError, FileError
from downloadview_async.offload.base import OffloadBackend
from downloadview_async.offload.rules import Rule
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.file_objects import home_of

MakeBackend = Callable[[list[Rule]], OffloadBackend]

_SIGNATURE = re.compile(r"(?:^|&)X-Signature=[^&]*")
_QUERY = re.compile(r"[!$-;=?-Z_a-z~]*")  # visible ASCII that a URI need not escape
_UNSAFE_IN_URLS = frozenset("%?#\\")  # a backslash becomes a slash in the URLs of Django


@dataclass(frozen=True, slots=True)
class Found:
    """Where the proxy finds a file. value: the header's value for the path. query: that of the URL, if it is needed."""

    value: str
    query: str = ""


class Rules:
    """The rules of one middleware: a file matches by its URL if there is a `source_url`, else by its path.

    Raises `ImproperlyConfigured` for a source that cannot be matched, and for a destination that the proxy cannot have.
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
            raise ImproperlyConfigured(
                f"a rule needs {option}: the place at which the proxy finds the files below the source"
            )
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
                        "source_url has to be an absolute path or URL without a query, such as '/media/', not "
                        f"{source_url!r}"
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
        """Whether files match by their URL."""
        return self._by_url is not None

    def find(self, file: Any, name: str) -> Found | None:
        """Return where the proxy finds a Django file, or None if no rule covers it."""
        if not getattr(file, "_committed", True):
            return None  # new content of a field, which is not in the storage yet
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
                key = getattr(file, "name", None)
                is_stored = hasattr(file, "storage") and isinstance(key, str) and key and not os.path.isabs(key)
                location = _rooted(str(key)) if is_stored else None
            else:
                location = _path_of(file, name)
            if location is not None and (value := _value(self._by_path, location)) is not None:
                return Found(value)
        return None


@dataclass(frozen=True, slots=True)
class _Located:
    """A file for a backend, which uses only its location."""

    location: str


def _value(backend: OffloadBackend, location: str) -> str | None:
    headers = backend.headers_for(cast("AsyncFile", _Located(location)))
    return None if headers is None else next(iter(headers.values()))


def _rooted(directory: str) -> str:
    return f"/{directory.lstrip('/')}"


def url_of(file: Any) -> str | None:
    """Return the URL of a Django file, or None if it has none."""
    if _borrows_its_url(unwrapped(getattr(file, "storage", None))):
        return None
    try:
        url = file.url
    except (AttributeError, ValueError, NotImplementedError, SuspiciousOperation):
        return None
    return str(url) if url else None


def _borrows_its_url(storage: Any) -> bool:
    """Return whether the URLs of a storage lead to other files than its paths, because it overrides only the latter.

    One that has Django's `url` and the project's `path` does. So does one that uses MEDIA_URL, although its directory
    is not MEDIA_ROOT.
    """
    if not isinstance(storage, FileSystemStorage):
        return False
    if home_of(storage, "url").startswith(OURS) and not home_of(storage, "path").startswith(OURS):
        return not told_of(storage)
    return (
        getattr(storage, "_base_url", "") is None  # `base_url` is MEDIA_URL then
        and storage.location != os.path.abspath(settings.MEDIA_ROOT)
    )


def _location_of(parts: SplitResult) -> str | None:
    """Return the decoded path of a URL in the form of a local path. It begins with the server's name if there is one.

    None for a URL with a fragment or an encoded slash: its decoded path would be ambiguous.
    """
    if parts.fragment or parts.path.count("/") != unquote_to_bytes(parts.path).count(b"/"):
        return None
    path = os.fsdecode(unquote_to_bytes(parts.path))
    return f"/{parts.scheme}:{parts.netloc.lower()}{path}" if parts.netloc else path


def _means(location: str, file: Any) -> bool:
    """Return whether a decoded URL names the file. The storage of a project may return URLs that are not encoded."""
    name = getattr(file, "name", None)
    if not isinstance(name, str) or not _UNSAFE_IN_URLS & {*name} or not hasattr(file, "storage"):
        return True
    return location.endswith(f"/{os.path.basename(name)}")


def _path_of(file: Any, name: str) -> str | None:
    try:
        async_file = async_file_of(file, name)
    except (FileError, FileNotFound, SuspiciousOperation, NotImplementedError):
        return None  # opening it will raise the error again
    return async_file.location if is_local(async_file) else None


def is_local(file: AsyncFile) -> bool:
    """Return whether the location of a file is a local path."""
    return file.location is not None and file.location.startswith("/")


def may_block(file: Any) -> bool:
    """Return whether the URL of a Django file comes from the project's code, which may block."""
    storage = getattr(file, "storage", None)
    if storage is None:
        return False
    # __class__: for a lazy storage, that of the storage behind it
    homes = [base.__module__ for base in storage.__class__.__mro__ if "url" in vars(base)]
    return not all(home.startswith(("django.core.files.", "downloadview_async.")) for home in homes)
