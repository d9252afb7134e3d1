"""LiteSpeed: X-LiteSpeed-Location with an internal URI. It has not been tested with LiteSpeed itself."""

from collections.abc import Iterable

from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.places import LocalFiles, plain
from downloadview_async.offload.rules import Rule


class XLiteSpeedLocation(LocalFiles):
    """The backend for LiteSpeed: X-LiteSpeed-Location with an internal URI. Only the header has been tested.

    We do not know how LiteSpeed reads a percent sign. So it sends only files whose path has ASCII letters, digits,
    `_.-~` and slashes alone. Other files are streamed.

    rules: their sources are directories. Their targets are URIs that begin and end with a slash.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        super().__init__(rules, title="LiteSpeed", header="x-litespeed-location", targets="uri", encode=plain)


LITESPEED = ProxyKind(
    name="litespeed",
    title="LiteSpeed",
    header="X-LiteSpeed-Location",
    targets="uri",
    encode=plain,
    backend=XLiteSpeedLocation,
    remedies={
        "not obeyed": "LiteSpeed obeys X-LiteSpeed-Location of a proxied application only if it is enabled there",
        "not found": "a static context for the URI <target> at the location <directory>/, internal redirects only",
        "open": "make the context <target> one for internal redirects only",
    },
)
