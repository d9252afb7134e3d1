"""LiteSpeed: X-LiteSpeed-Location, an internal URI. Nobody here has seen LiteSpeed obey it."""

from collections.abc import Iterable

from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.places import LocalFiles, plain
from downloadview_async.offload.rules import Rule


class XLiteSpeedLocation(LocalFiles):
    """LiteSpeed: X-LiteSpeed-Location with an internal URI. The header is tested, LiteSpeed itself is not.

    How LiteSpeed reads a percent sign is not known here, so a name is sent by it only if that makes no difference: one
    of ASCII letters, digits and `_.-~`. Other files are streamed.

    rules: their sources are directories, and their targets URIs that begin and end with a slash.

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
