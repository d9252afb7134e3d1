"""`ProxiedDownloadResponse`: a Django response that has a proxy send its file, and what a proxy is offered for."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from django.http import HttpResponse

from downloadview_async.contrib.django.disposition import content_disposition
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.offload.places import RateHeader


class OrderedWith200:
    """A response that has its offload headers only while its status is 200.

    An outer middleware may change the status of a finished response, and a proxy obeys these headers with any status.
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
        self._withhold_orders()

    def _may_have_orders(self) -> bool:
        return self._status_code == 200

    def _withhold_orders(self) -> None:
        orders = dict(self._withheld)
        orders |= {header: value for header, value in self.headers.items() if header.lower() in OFFLOAD_HEADERS}
        may_have = self._may_have_orders()
        self._withheld = {} if may_have else orders
        for header, value in orders.items():
            if may_have:
                self.headers[header] = value
            else:
                self.headers.pop(header, None)

    def __setitem__(self, header: str, value: Any) -> None:
        self.headers[header] = value
        if header.lower() in OFFLOAD_HEADERS:
            self._withhold_orders()

    def __delitem__(self, header: str) -> None:
        self._withheld = {name: value for name, value in self._withheld.items() if name.lower() != header.lower()}
        self.headers.pop(header, None)

    def setdefault(self, header: str, value: Any) -> None:
        """Set a header, unless the response has it already or withholds it until the status is 200."""
        if header.lower() not in {name.lower() for name in (*self.headers, *self._withheld)}:
            self[header] = value


class ProxiedDownloadResponse(OrderedWith200, HttpResponse):
    """A response without a body that has a proxy send the file: the base class for each proxy's response.

    A `DownloadResponse` that a proxy sends becomes one of these. It has its offload headers only while its status is
    200 and it has no content. A middleware may set other content, and a proxy would send the file instead.
    """

    rate_header: ClassVar[RateHeader | None] = None
    """The header by which the proxy limits how fast it sends the file. None: it cannot."""

    _is_passing = False
    """Whether the headers are valid for this request only."""

    @property
    def content(self) -> bytes:
        """The content: none, unless a middleware has set it."""
        return super().content

    @content.setter
    def content(self, value: Any) -> None:
        HttpResponse.content.fset(self, value)  # type: ignore[attr-defined]
        self._withhold_orders()

    def write(self, content: Any) -> None:
        """Add to the content."""
        super().write(content)
        self._withhold_orders()

    def _may_have_orders(self) -> bool:
        return super()._may_have_orders() and not any(vars(self).get("_container", ()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what Django's cache pickles: None, which counts as a miss, if other requests need other headers."""
        return (_not_cached, ()) if self._is_passing else super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        """Return what Django's cache pickles: neither the file nor what closes it."""
        state = cast("dict[str, Any]", super().__getstate__())
        state.pop("file", None)
        return state | {"_resource_closers": []}

    def _present(self, orders: Mapping[str, str], basename: str, attachment: bool) -> None:
        """Set the headers that the proxy obeys, and the name under which the client saves the file."""
        self.basename = basename
        if attachment:
            self["Content-Disposition"] = content_disposition(basename)
        for header, value in orders.items():
            self[header] = value


def _not_cached() -> None:
    """Return what Django's cache gets instead of a response that is valid for one request only."""


@dataclass(frozen=True, slots=True)
class ProxyOffer:
    """A proxy that may send the file of a response.

    headers: returns the headers that the proxy obeys, for the Content-Type of the response; None if the proxy cannot
    reach the file, now that it is open. kind: the class of the response that has the proxy send the file.
    is_remote: whether the proxy fetches files that are not local from another server. needs_metadata: whether the proxy
    sends only files that we can open, too.
    """

    headers: Callable[[str], Awaitable[Mapping[str, str] | None]]
    kind: "type[ProxiedDownloadResponse]" = ProxiedDownloadResponse
    is_remote: bool = False
    needs_metadata: bool = False
