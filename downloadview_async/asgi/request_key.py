"""Which file or folder of a source a request names: its *key*, made from the path of the URL and its route."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from starlette.requests import Request
from starlette.routing import Host, Mount, Route
from starlette.types import Scope

from downloadview_async.errors import ConfigurationError, FileMissing


def key_of(key: str | Callable[[Request], Any] | None, scope: Scope, endpoint: str) -> Any:
    """Return what a source has to resolve for a request.

    key: as in `Download`. endpoint: the name of the endpoint's class, for errors.

    Raises `FileMissing` for a path that is not UTF-8, and `ConfigurationError` if the key cannot be determined.
    """
    _check_is_decoded(scope)
    if callable(key):
        return key(Request(scope))
    parameters = scope.get("path_params") or {}
    if key is not None:
        if key not in parameters:
            names = f"use one of {', '.join(parameters)}" if parameters else "the route has none"
            raise ConfigurationError(f"{endpoint} has key={key!r}, which is not a path parameter: {names}")
        return str(parameters[key])
    if not parameters:
        return path_below(scope).removeprefix("/")
    names_of_route = _parameters_of_route(scope, parameters)
    if len(names_of_route) > 1:
        raise ConfigurationError(f"{endpoint} needs key=, one of the route's parameters: {', '.join(names_of_route)}")
    return str(parameters[names_of_route[0]]) if names_of_route else path_below(scope).removeprefix("/")


def tail_of(key: str, scope: Mapping[str, Any], *, is_from_path: bool) -> str:
    """Return the end of the URL's path that stands for the file or folder with a key.

    is_from_path: False if a function has made the key, which then need not be a part of the path.
    """
    parameters = [str(value) for value in reversed((scope.get("path_params") or {}).values())]
    below = path_below(scope).removeprefix("/")
    candidates = [key, *parameters, below] if is_from_path else [*parameters, below, key]
    return next((tail for tail in candidates if scope["path"].endswith(f"/{tail}")), "")


def _check_is_decoded(scope: Mapping[str, Any]) -> None:
    """Raise `FileMissing` for a path that is not UTF-8.

    Servers replace what they cannot decode by U+FFFD, which the name of another file may have.
    """
    if "\ufffd" not in scope["path"] or (raw := scope.get("raw_path")) is None:
        return
    try:
        unquote_to_bytes(raw.partition(b"?")[0]).decode()
    except UnicodeDecodeError:
        raise FileMissing(f"not valid UTF-8: {raw!r}") from None


def path_below(scope: Mapping[str, Any]) -> str:
    """Return the path of a request below the application's `root_path`: empty, or with a slash at its beginning.

    `root_path` is removed by whole segments. ASGI puts it before `path`. If a server or a framework has removed it
    already, which `raw_path` shows, nothing more is removed. Hypercorn and granian never put their `root_path` there:
    below a mount of Starlette, the path then begins with only the mount's part of `root_path`.
    """
    path: str = scope["path"]
    root: str = (scope.get("root_path") or "").rstrip("/")
    if not root and not path.endswith("/"):
        return path
    raw = scope.get("raw_path")
    sent = None if raw is None else unquote(raw.partition(b"?")[0].decode("latin-1"))
    if sent is not None and path.endswith("/") and not sent.endswith("/"):
        path = path[:-1]  # Litestar adds a slash below a mount
    if root and not f"{path}/".startswith(f"{root}/"):
        root = root.removeprefix((scope.get("app_root_path") or "").rstrip("/"))
    if not root or not f"{path}/".startswith(f"{root}/"):
        return path
    if sent is not None and sent != path and sent.endswith(path):
        return path
    return path[len(root) :]


def _parameters_of_route(scope: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters of the route itself, without those of the mounts around it.

    Raises `ConfigurationError` if the request does not tell them.
    """
    route, endpoint = scope.get("route"), scope.get("endpoint")
    # An application around ours may have left its own route in the scope: a route counts only if it has called us.
    if isinstance(route, Route) and route.endpoint is endpoint:
        return list(route.param_convertors)
    if isinstance(route, Mount | Host) and route.app is endpoint:
        return []
    # FastAPI does not put the route into the scope.
    candidates = list(_routes_to(endpoint, getattr(scope.get("router"), "routes", None) or ()))
    if len({tuple(names) for names in candidates}) == 1:
        return candidates[0]
    if "app_root_path" not in scope:
        return list(parameters)  # there is no mount
    # A mount adds the segments that it has matched to `root_path`, after those of the server.
    mounted = f"{(scope.get('root_path') or '').removeprefix(scope['app_root_path'] or '')}/"
    below = f"{path_below(scope)}/"
    names_of_route = []
    for name, value in parameters.items():
        segments = f"/{str(value).strip('/')}/"
        if (segments in mounted) == (segments in below):
            raise ConfigurationError(
                f"Download cannot tell whether {name!r} is a parameter of its route or of a mount around it: pass "
                "key=, the name of the parameter or a function that gets the request"
            )
        if segments in below:
            names_of_route.append(name)
    return names_of_route


def _routes_to(endpoint: Any, routes: Iterable[Any]) -> Iterator[list[str]]:
    """Yield the parameters of each route that leads to an endpoint."""
    for route in routes:
        if isinstance(route, Route) and route.endpoint is endpoint:
            yield list(route.param_convertors)
        elif isinstance(route, Mount | Host) and route.app is endpoint:
            yield []
        else:
            yield from _routes_to(endpoint, getattr(route, "routes", None) or ())
