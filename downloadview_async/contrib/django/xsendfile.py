"""X-Sendfile for Apache and lighttpd, which differ only in how they read a path."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal
from urllib.parse import quote, unquote_to_bytes

from django.http import HttpRequest

from downloadview_async.contrib.django.middleware import NoRedirectionMatch, ProxiedDownloadMiddleware
from downloadview_async.contrib.django.offload import Found
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.offload.backends import XSendfile
from downloadview_async.offload.base import OffloadBackend
from downloadview_async.offload.rules import Rule

Encoding = Literal["raw", "percent"]
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class BaseXSendfileResponse(ProxiedDownloadResponse):
    """Has a proxy send the file at `file_path`, an absolute path as the proxy sees it.

    basename: the name under which the client saves the file. Default: the last segment of the path. attachment: whether
    the client saves the file. headers: further headers.

    Raises `ValueError` for a path that the header cannot name: one with a control character, and for Apache one that
    ends with a space.
    """

    encoding: ClassVar[Encoding]

    def __init__(
        self,
        file_path: str | os.PathLike[str],
        content_type: str,
        basename: str | None = None,
        attachment: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        further = {name: value for name, value in (headers or {}).items() if name.lower() != "content-type"}
        super().__init__(content_type=content_type, headers=further)
        path = os.fspath(file_path)
        self._present(self.orders_for(path), basename or os.path.basename(path), attachment)

    @classmethod
    def orders_for(cls, path: str) -> dict[str, str]:
        """Return the header that the proxy obeys. Raises `ValueError` for a path that it cannot name."""
        if _CONTROL.search(path) or (cls.encoding == "raw" and path.endswith(" ")):
            raise ValueError(f"X-Sendfile cannot name the path {path!r}")
        encoded = os.fsencode(path)
        # a header value is bytes, which Django has as latin-1 text
        return {"X-Sendfile": quote(encoded) if cls.encoding == "percent" else encoded.decode("latin-1")}


class BaseXSendfileMiddleware(ProxiedDownloadMiddleware):
    """Has a proxy send the files that its rule covers.

    source_dir, source_url: these files, see `ProxiedDownloadMiddleware`. destination_dir: their directory, as the proxy
    sees it.

    Raises `ImproperlyConfigured`.
    """

    destination_option = "destination_dir"
    fetches_urls = False
    response_class: ClassVar[type[BaseXSendfileResponse]]

    def __init__(
        self,
        get_response: Callable[[HttpRequest], Any] | None = None,
        source_dir: str | os.PathLike[str] | None = None,
        source_url: str | None = None,
        destination_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(get_response, source_dir, source_url, destination_dir)

    def make_backend(self, rules: list[Rule]) -> OffloadBackend:
        """Return the backend that matches rules and encodes paths for this proxy."""
        return XSendfile(rules, encoding=self.response_class.encoding)

    def value_of(self, match: Found) -> str:
        """Return the path of a file that a rule covers. Raises `NoRedirectionMatch` for one whose URL has a query."""
        if match.query:
            raise NoRedirectionMatch(f"the URL of the file has a query: {match.query!r}")
        raw = match.value.encode("latin-1") if self.response_class.encoding == "raw" else unquote_to_bytes(match.value)
        return os.fsdecode(raw)

    def orders(self, response: Any, redirect_url: str, content_type: str) -> Mapping[str, str]:
        """Return X-Sendfile."""
        return self.response_class.orders_for(redirect_url)
