"""Checks the routes of the settings: their paths, their headers, their limits, and which web sites they allow."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from downloadview_async import ConfigurationError, Limits, proxy_kinds
from downloadview_async.service.origin import Origin
from downloadview_async.service.settings import CorsSettings, RouteLimitsSettings, RouteSettings
from downloadview_async.service.source_checks import check_known_source
from downloadview_async.service.source_settings import SourceSettings
from downloadview_async.service.values import seconds_of

_PARAMETER = re.compile(r"{([a-zA-Z_]\w*)(:[a-zA-Z_]\w*)?}")  # a path parameter, as Starlette parses it
_Shape = tuple[str, str, str]
_WITHOUT_SLASH = (":str", ":int", ":float", ":uuid")
_HEADER = re.compile("[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_HEADER_VALUE = re.compile("[!-~](?:[ -~]{0,4094}[!-~])?")
_NOT_OF_A_ROUTE = {
    **dict.fromkeys(
        (
            *("accept-ranges", "age", "connection", "content-digest", "content-encoding", "content-length"),
            *("content-location", "content-md5", "content-range", "date", "digest", "etag", "keep-alive"),
            *("last-modified", "location", "proxy-authenticate", "proxy-connection", "repr-digest", "server", "te"),
            *("trailer", "transfer-encoding", "upgrade", "x-offload-target"),
        ),
        "it describes one file or one message, and is made from it: remove it",
    ),
    **dict.fromkeys(
        (name.lower() for kind in proxy_kinds().values() for name in kind.headers),
        "it is an order for a proxy, which the service gives itself: remove it",
    ),
    "cache-control": "write it as cache_control of the route",
    "content-disposition": "write disposition of the route",
    "content-type": "write the type of a suffix in [content_types]",
}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def checked_routes(
    origin: Origin, routes: list[RouteSettings], sources: Mapping[str, SourceSettings]
) -> list[RouteSettings]:
    """Return the `[[routes]]` tables, each of which is checked. Raises `ConfigurationError`."""
    shapes: list[_Shape] = []
    for index, route in enumerate(routes):
        key = f"routes[{index}]"
        check_known_source(origin, f"{key}.source", route.source, sources)
        if not route.path.startswith("/") or len(_PARAMETER.findall(route.path)) != 1:
            raise origin.error(
                f"{key}.path",
                f"{route.path!r} is not a path with one parameter: begin it with a slash, and write the "
                "parameter as {path:path} (it matches slashes) or {name} (it does not)",
            )
        if route.list and not route.path.endswith(":path}"):
            raise origin.error(
                f"{key}.list",
                "folders need a path that ends with a parameter like {path:path}: change the path, or do not list",
            )
        if route.path.startswith("/-/"):
            raise origin.error(f"{key}.path", "/-/ is reserved for the pages of the service: choose another path")
        shape = _shape(route.path)
        for first, other in enumerate(shapes):
            if other == shape:
                raise origin.error(
                    f"{key}.path", f"{route.path!r} is the path of routes[{first}] too: remove one or change it"
                )
            if _shadows(other, shape):
                raise origin.error(
                    f"{key}.path",
                    f"{route.path!r} is never reached, because {routes[first].path!r} in routes[{first}] matches "
                    "the same paths: write this route before that one, or remove it",
                )
        shapes.append(shape)
        _check_headers(origin, f"{key}.headers", route.headers)
        if route.limits is not None:
            check_limits(origin, f"{key}.limits", route.limits)
    return [
        route
        if route.cors is None
        else msgspec.structs.replace(route, cors=_cors(origin, f"routes[{index}].cors", route.cors))
        for index, route in enumerate(routes)
    ]


def check_limits(origin: Origin, key: str, limits: RouteLimitsSettings) -> None:
    """Refuse an invalid amount, and a queue without a limit to wait for."""
    for name in ("rate", "requests", "quota", "total_rate"):
        amount: Any = {name: getattr(limits, name)}
        try:
            Limits(**amount)
        except ConfigurationError as exc:
            raise origin.error(f"{key}.{name}", str(exc)) from exc
    if limits.mode == "queue" and limits.concurrent is None:
        raise origin.error(f"{key}.mode", "requests wait for `concurrent`: set it, or remove mode")


def _check_headers(origin: Origin, key: str, headers: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        if not _HEADER.fullmatch(name):
            raise origin.error(key, f"{name!r} is not the name of a header: write one such as X-Robots-Tag")
        if first.setdefault(lower, name) != name:
            raise origin.error(f"{key}.{name}", f"the same as {first[lower]}: remove one of them")
        if lower.startswith("access-control-"):
            raise origin.error(f"{key}.{name}", "it depends on the request: write cors of the route")
        if lower in _NOT_OF_A_ROUTE:
            raise origin.error(f"{key}.{name}", _NOT_OF_A_ROUTE[lower])
        if not _HEADER_VALUE.fullmatch(value):
            raise origin.error(f"{key}.{name}", f"{value!r}: give 1 to 4,096 printable characters of ASCII")


def _cors(origin: Origin, key: str, cors: CorsSettings) -> CorsSettings:
    for index, site in enumerate(cors.origins):
        place = f"{key}.origins[{index}]"
        if site == "*":
            if len(cors.origins) > 1:
                raise origin.error(place, "* allows all origins: remove the others, or this one")
            if cors.credentials:
                raise origin.error(
                    place, "browsers refuse * together with credentials: list the origins, or remove credentials"
                )
            continue
        match = _ORIGIN.fullmatch(site)
        if match is None or int(match[2] or 1) > 65_535:
            raise origin.error(
                place,
                f"{site!r} is not an origin: write it as browsers do, in lower case and without a path, such as "
                "https://app.example.org or http://localhost:3000",
            )
        if match[2] and match[2] == _DEFAULT_PORTS.get(match[1]):
            raise origin.error(place, f"browsers leave out the port {match[2]}: write {site.rpartition(':')[0]}")
    age = seconds_of(cors.max_age)
    if age is None:
        raise origin.error(f"{key}.max_age", f"{cors.max_age!r} is not a time: give such as 600, 10m or 1h")
    return msgspec.structs.replace(cors, max_age=age)


def _shape(path: str) -> _Shape:
    """Return the part of a path before its parameter, the convertor, and the part after."""
    before, _, convertor, after = _PARAMETER.split(path)
    return before, convertor or ":str", after


def _shadows(first: _Shape, second: _Shape) -> bool:
    """Return whether the first path certainly matches all that the second matches, line breaks in names aside."""
    (before, convertor, after), (inner_before, inner_convertor, inner_after) = first, second
    if not inner_before.startswith(before) or not inner_after.endswith(after):
        return False
    rest = inner_before.removeprefix(before) + inner_after.removesuffix(after)
    return convertor == ":path" or (convertor == ":str" and inner_convertor in _WITHOUT_SLASH and "/" not in rest)
