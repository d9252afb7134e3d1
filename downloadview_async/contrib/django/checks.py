"""System checks: mistakes in the settings and the URLconf that `manage.py check` reports."""

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from django.apps import AppConfig, apps
from django.conf import settings
from django.core.checks import CheckMessage, Error
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import InvalidStorageError, storages
from django.db.models import FileField
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils.module_loading import import_string

from downloadview_async.contrib.django.adapters import opens_as_stored, told_of
from downloadview_async.contrib.django.limits import LimitsMiddleware, limits_of_settings
from downloadview_async.contrib.django.links import link_signer
from downloadview_async.contrib.django.middleware import (
    DownloadDispatcher,
    DownloadDispatcherMiddleware,
    ProxiedDownloadMiddleware,
    SmartDownloadMiddleware,
    WrongBackend,
    backend_of,
    configured,
    make_middleware,
    resolved,
    rules_of,
    shared_options,
)
from downloadview_async.contrib.django.views import PathDownloadView, StorageDownloadView

_SETTINGS = ("DOWNLOADVIEW", "DOWNLOADVIEW_BACKEND", "DOWNLOADVIEW_RULES")
_BACKEND_HINT = 'For example: DOWNLOADVIEW = {"BACKEND": "nginx", "RULES": [...]}.'
_RULES_HINT = (
    'A rule for nginx is {"source_url": "/media/", "destination_url": "/_media/"}; for Apache and lighttpd, '
    '{"source_dir": "/srv/media", "destination_dir": "/srv/media"}.'
)

_LIMITS_HINT = 'For example: DOWNLOADVIEW_LIMITS = {"RATE": "20MB/s", "REQUESTS": "600/minute"}.'
_AUTHENTICATION = "django.contrib.auth.middleware.AuthenticationMiddleware"
_STORE_HINT = 'For example: DOWNLOADVIEW_LINKS = {"STORE": f"sqlite:{BASE_DIR / \'links.db\'}"}.'


def check_downloads(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Return the mistakes in the settings and the URLconf.

    E001: an unknown backend. E002: a rule that does not fit its backend. W003: a rule that matches no file. W004: a
    middleware for WSGI alone. E005: a `PathDownloadView` that would give out any file of the machine. W006: a
    `PathDownloadView` that makes a path from the URL itself. W007: a storage whose files no rule offloads. E008: the
    settings of signed links. W009: a store of links that processes do not share. E010: the settings of limits. W011:
    limits for users that come before the middleware which looks users up.
    """
    classes = list(_middlewares())
    return [
        *_check_rules(classes),
        *_check_middlewares(classes),
        *_check_paths(),
        *_check_links(),
        *_check_limits(classes),
    ]


def _middlewares() -> Iterator[tuple[str, Any]]:
    for path in settings.MIDDLEWARE:
        try:
            yield path, import_string(path)
        except ImportError:
            continue  # Django reports this itself


def _uses(classes: list[tuple[str, Any]], kind: type) -> bool:
    return any(isinstance(item, type) and issubclass(item, kind) for _, item in classes)


def _check_rules(classes: list[tuple[str, Any]]) -> Iterator[CheckMessage]:
    is_used = _uses(classes, SmartDownloadMiddleware)
    if is_used or any(hasattr(settings, name) for name in _SETTINGS):
        try:
            backend = backend_of(*configured("BACKEND"))
        except ImproperlyConfigured as exc:
            yield _wrong_backend(exc)
        else:
            yield from _check_rules_of(backend)
    elif _uses(classes, DownloadDispatcherMiddleware):
        try:
            DownloadDispatcher()
        except WrongBackend as exc:
            yield _wrong_backend(exc)
        except ImproperlyConfigured as exc:
            yield _wrong_rule(exc)


def _check_rules_of(backend: Any) -> Iterator[CheckMessage]:
    try:
        rules = rules_of(*configured("RULES"))
    except ImproperlyConfigured as exc:
        yield _wrong_rule(exc)
        return
    shared = shared_options()
    for rule, where in rules:
        try:
            factory, options = resolved(rule, where, backend, shared)
            middleware = make_middleware(factory, options, where)
        except WrongBackend as exc:
            yield _wrong_backend(exc)
        except ImproperlyConfigured as exc:
            yield _wrong_rule(exc)
        else:
            if isinstance(middleware, ProxiedDownloadMiddleware):
                yield from _check_sources(middleware, where)
                yield from _check_storages(middleware, where)


def _check_sources(middleware: ProxiedDownloadMiddleware, where: str) -> Iterator[CheckMessage]:
    directory, url = middleware.source_dir, middleware.source_url
    if not directory and not url:
        yield CheckWarning(
            f"{where} matches no file: it has neither source_dir nor source_url",
            hint=_RULES_HINT,
            id="downloadview_async.W003",
        )
    if directory and os.path.isabs(directory) and not os.path.isdir(directory):
        yield CheckWarning(
            f"{where} matches no file: there is no directory {os.fspath(directory)!r}",
            hint="Make the directory, or set source_dir to the directory that has the files, such as MEDIA_ROOT.",
            id="downloadview_async.W003",
        )
    if url and not urlsplit(url).netloc:
        urls = sorted(set(_base_urls()))
        if not any(_is_below(base, url) or _is_below(url, base) for base in urls):
            yield CheckWarning(
                f"{where} matches no file: no storage gives URLs below {url!r}",
                hint=f"Set source_url to the base_url of a storage: {', '.join(map(repr, urls)) or 'there is none'}.",
                id="downloadview_async.W003",
            )


def _check_storages(middleware: ProxiedDownloadMiddleware, where: str) -> Iterator[CheckMessage]:
    for storage in _storages():
        is_covered = _covers(middleware.source_url, _told(storage, "base_url")) or _covers(
            middleware.source_dir, _told(storage, "location")
        )
        if is_covered and told_of(storage) is None and not opens_as_stored(storage):
            name = storage.__class__.__name__
            yield CheckWarning(
                f"{where} offloads no file of a {name}: {name} overrides how files are opened, so the stored bytes may "
                "differ from those that it sends",
                hint=f"Set is_sent_as_stored in {name}: True if every file is sent byte for byte as it is stored, "
                "False if not, for example because files are encrypted or compressed.",
                id="downloadview_async.W007",
            )


def _covers(source: Any, place: Any) -> bool:
    return bool(source and place) and _is_below(str(place), os.fspath(source))


def _told(storage: Any, attribute: str) -> Any:
    try:
        return getattr(storage, attribute, None)
    except Exception:
        return None  # a broken storage is not this check's concern


def _is_below(url: str, base: str) -> bool:
    return f"{url.rstrip('/')}/".startswith(f"{base.rstrip('/')}/")


def _base_urls() -> Iterator[str]:
    """Yield the base URLs of the storages in the settings, of the models and of the views."""
    for storage in _storages():
        if base := _told(storage, "base_url"):
            yield str(base)


def _storages() -> Iterator[Any]:
    for alias in settings.STORAGES:
        try:
            yield storages[alias]
        except (InvalidStorageError, ImproperlyConfigured):
            continue
    for model in apps.get_models():
        for field in model._meta.get_fields():  # noqa: SLF001 - Django's documented name
            if isinstance(field, FileField):
                yield field.storage
    for _, view, initkwargs, _ in _views():
        yield initkwargs.get("storage", getattr(view, "storage", None))


def _check_middlewares(classes: list[tuple[str, Any]]) -> Iterator[CheckMessage]:
    for path, middleware in classes:
        if not getattr(middleware, "async_capable", False):
            yield CheckWarning(
                f"settings.MIDDLEWARE: {path} is for WSGI alone: under ASGI, it makes every request wait for a thread, "
                "and asynchronous views and downloads run in that thread",
                hint="Make it async-capable: with django.utils.deprecation.MiddlewareMixin for a class, or "
                "django.utils.decorators.sync_and_async_middleware for a function.",
                id="downloadview_async.W004",
            )


def _check_paths() -> Iterator[CheckMessage]:
    for route, view, initkwargs, arguments in _views():
        if not issubclass(view, PathDownloadView) or issubclass(view, StorageDownloadView):
            continue
        named = initkwargs.get("path_url_kwarg", view.path_url_kwarg)
        root = initkwargs.get("root", view.root)
        is_ours = view.get_path is PathDownloadView.get_path
        if root is None and named in arguments and is_ours:
            yield Error(
                f"{view.__name__} at {route!r} takes its path from the URL and has no root: a client could request "
                "every file of this machine",
                hint=f"Write {view.__name__}.as_view(root=...) with the directory that has the files.",
                id="downloadview_async.E005",
            )
        elif (
            root is None
            and not is_ours
            and not initkwargs.get("allow_unsafe_arguments", view.allow_unsafe_arguments)
            and _makes_a_path(view.get_path, named in arguments or any(arguments.values()))
        ):
            yield CheckWarning(
                f"{view.__name__} at {route!r} makes a path from the URL in get_path, and has no root: only get_path "
                "keeps the path in its directory",
                hint=f"In {view.__name__}, write root = ... with the directory, and remove get_path.",
                id="downloadview_async.W006",
            )


def _check_links() -> Iterator[CheckMessage]:
    try:
        link_signer()
    except ImproperlyConfigured as exc:
        yield _wrong_links(str(exc))
        return
    scheme, _, place = str(getattr(settings, "DOWNLOADVIEW_LINKS", {}).get("STORE")).partition(":")
    if scheme == "sqlite" and not os.path.isdir(os.path.dirname(os.path.abspath(place))):
        yield _wrong_links(f"settings.DOWNLOADVIEW_LINKS: the directory of {place!r} does not exist")
    elif (scheme == "sqlite" and not os.path.isabs(place)) or (scheme == "memory" and not settings.DEBUG):
        yield CheckWarning(
            f"settings.DOWNLOADVIEW_LINKS: processes may not share {scheme}:{place}, and then each counts separately",
            hint=_STORE_HINT,
            id="downloadview_async.W009",
        )


def _check_limits(classes: list[tuple[str, Any]]) -> Iterator[CheckMessage]:
    if not _uses(classes, LimitsMiddleware) and not hasattr(settings, "DOWNLOADVIEW_LIMITS"):
        return
    try:
        limits_of_settings()
    except ImproperlyConfigured as exc:
        yield Error(str(exc), hint=_LIMITS_HINT, id="downloadview_async.E010")
        return
    paths = [path for path, _ in classes]
    limited = next((index for index, one in enumerate(classes) if _uses([one], LimitsMiddleware)), len(classes))
    if settings.DOWNLOADVIEW_LIMITS.get("CLIENT") == "user" and _AUTHENTICATION in paths[limited:]:
        yield CheckWarning(
            "settings.MIDDLEWARE: LimitsMiddleware comes before AuthenticationMiddleware, so it knows no user, and "
            "counts each address as a client",
            hint="Put LimitsMiddleware after AuthenticationMiddleware.",
            id="downloadview_async.W011",
        )


def _makes_a_path(get_path: Any, is_in_url: bool) -> bool:
    """Return whether a `get_path` uses the query, or arguments of the URL that may lead out of a directory.

    It may do so itself or by `super()`. is_in_url: whether there are such arguments. True for code that is unknown.
    """
    code = getattr(inspect.unwrap(get_path), "__code__", None)
    names = {"GET", *(("kwargs", "args", "get_path", "request", "path_url_kwarg") if is_in_url else ())}
    return is_in_url if code is None else not names.isdisjoint(code.co_names)


def _arguments(pattern: Any) -> dict[str, bool]:
    """Return the parameters of a pattern, and of each whether it may be `..`. Those without a name are `""`."""
    expression = pattern.regex
    if expression.groups and not expression.groupindex:
        return {"": True}
    arguments = {}
    for name in expression.groupindex:
        converter = getattr(pattern, "converters", {}).get(name)
        group = re.search(rf"\(\?P<{name}>((?:[^()\\]|\\.)*)\)", expression.pattern)
        inner = getattr(converter, "regex", group and group[1])
        arguments[name] = inner is None or re.fullmatch(inner, "..") is not None
    return arguments


def _views() -> Iterator[tuple[str, type[Any], dict[str, Any], dict[str, bool]]]:
    """Yield the class-based views of the URLconf: route, class, arguments of `as_view`, parameters of the route."""
    if not getattr(settings, "ROOT_URLCONF", None):
        return
    try:
        patterns = get_resolver().url_patterns
    except Exception:
        return
    yield from _views_of(patterns, "", {})


def _views_of(
    patterns: Sequence[URLPattern | URLResolver], prefix: str, outer: dict[str, bool]
) -> Iterator[tuple[str, type[Any], dict[str, Any], dict[str, bool]]]:
    for pattern in patterns:
        route = f"{prefix}{pattern.pattern}"
        arguments = outer | _arguments(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from _views_of(pattern.url_patterns, route, arguments)
        elif isinstance(view := getattr(pattern.callback, "view_class", None), type):
            yield route, view, getattr(pattern.callback, "view_initkwargs", {}), arguments


def _wrong_backend(exc: Exception) -> Error:
    return Error(str(exc), hint=_BACKEND_HINT, id="downloadview_async.E001")


def _wrong_links(message: str) -> Error:
    return Error(message, hint=_STORE_HINT, id="downloadview_async.E008")


def _wrong_rule(exc: Exception) -> Error:
    return Error(str(exc), hint=_RULES_HINT, id="downloadview_async.E002")
