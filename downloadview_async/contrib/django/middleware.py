"""The middlewares and the decorator that have a reverse proxy send the file of a response, for views of any kind.

Each of them has the view leave its `DownloadResponse` unfinished, see `deferred`, and then makes it a `ProxyOffer`, as
`OffloadMiddleware` does in the scope. The innermost middleware is first. The response opens its file, asks
`offload/decision.py`, and accepts or not. One that accepts becomes an ordinary 200 without a body. It stays the same
object, so nothing is copied, and nothing rewrites a finished response. If it accepts no offer, the outermost middleware
finishes it.
"""

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cached_property, wraps
from inspect import Parameter, isawaitable, signature
from typing import Any, ClassVar, TypeVar, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.utils.module_loading import import_string

from downloadview_async.contrib.django import offload
from downloadview_async.contrib.django.deferral import deferred
from downloadview_async.contrib.django.dual import like
from downloadview_async.contrib.django.file_errors import answer_to
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse, ProxyOffer
from downloadview_async.contrib.django.responses import DownloadResponse, is_due, may_be_offloaded
from downloadview_async.errors import FileError
from downloadview_async.offload.backends import XAccelRedirect
from downloadview_async.offload.base import OffloadBackend
from downloadview_async.offload.rules import Rule

AUTO_CONFIGURE: Any = object()
"""The value of an argument that is read from the settings."""

BACKENDS = {
    "nginx": "downloadview_async.contrib.django.nginx.XAccelRedirectMiddleware",
    "apache": "downloadview_async.contrib.django.apache.XSendfileMiddleware",
    "lighttpd": "downloadview_async.contrib.django.lighttpd.XSendfileMiddleware",
}
"""The names of the proxies in the settings, and their middlewares."""

_BACKEND_ADVICE = f"write {', '.join(map(repr, BACKENDS))} or the path of a class"
_OURS = "downloadview_async."
_THEIRS = "django_downloadview."
View = TypeVar("View", bound=Callable[..., Any])


def is_download_response(response: Any) -> bool:
    """Return whether `response` is a `DownloadResponse`, which one that a proxy sends no longer is."""
    return isinstance(response, DownloadResponse)


class WrongBackend(ImproperlyConfigured):
    """A setting does not name a backend."""


class BaseDownloadMiddleware:
    """Processes the download responses of the views: subclasses override `process_download_response`.

    It works under WSGI and ASGI. Inside it, the views leave their responses unfinished, and the outermost middleware
    finishes them. It answers a `FileError` that a view raises by its status. Under ASGI, a method that a subclass
    overrides without `async` is called in a thread.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any] | None = None) -> None:
        if get_response is not None and not callable(get_response):
            raise ImproperlyConfigured(
                f"the first positional argument of a middleware is get_response, not {get_response!r}: write the "
                "options of a rule by name, as in {'source_url': ..., 'destination_url': ...}"
            )
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        """Answer the request; under ASGI, return a coroutine that does."""
        assert self.get_response is not None, "a middleware needs get_response to answer requests"
        return _call(self, self.get_response, request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Return the answer to a `FileError`. Raises `Http404` for a file that the client cannot have."""
        return answer_to(exception, request) if isinstance(exception, FileError) else None

    def is_download_response(self, response: Any) -> bool:
        """Return whether to process the response: whether it is a `DownloadResponse`."""
        return is_download_response(response)

    def process_response(self, request: HttpRequest, response: Any) -> Any:
        """Return the response to send: for a download, that of `process_download_response`, else `response`."""
        return self.process_download_response(request, response) if self.is_download_response(response) else response

    def process_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Return the response to send instead of a download response."""
        raise NotImplementedError(f"{type(self).__name__} has to override process_download_response")

    async def aprocess_response(self, request: HttpRequest, response: Any) -> Any:
        """Do what `process_response` does, in an event loop."""
        if not _is_ours(self, "process_response"):
            return await _off_the_loop(self.process_response, request, response)
        return (
            await self.aprocess_download_response(request, response)
            if self.is_download_response(response)
            else response
        )

    async def aprocess_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Do what `process_download_response` does, in an event loop."""
        return await _off_the_loop(self.process_download_response, request, response)


class DownloadMiddleware(BaseDownloadMiddleware):
    """Finishes the downloads of functions, and answers a `FileError` that a view raises, where no proxy sends files.

    `SmartDownloadMiddleware` and `get_asgi_application` do the same.
    """

    def process_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Return the response, which is finished afterwards."""
        return response

    async def aprocess_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Return the response, which is finished afterwards."""
        return response


class RealDownloadMiddleware(BaseDownloadMiddleware):
    """Processes the responses whose file has a name or a URL, since a proxy can find only these."""

    def is_download_response(self, response: Any) -> bool:
        """Return whether the response is a `DownloadResponse` whose file has a name or a URL."""
        return super().is_download_response(response) and bool(
            getattr(response.file, "name", None) or offload.url_of(response.file)
        )


class DownloadDispatcher:
    """Passes a response through several middlewares, in order.

    middlewares: pairs of any key and a middleware. Default: those of `settings.DOWNLOADVIEW_MIDDLEWARES`, a list of
    (key, import string, options).
    """

    def __init__(self, middlewares: Any = AUTO_CONFIGURE) -> None:
        self.middlewares: Any = middlewares
        if middlewares is AUTO_CONFIGURE:
            self.middlewares = []
            self.auto_configure_middlewares()

    def auto_configure_middlewares(self) -> None:
        """Add the middlewares of the settings. Raises `ImproperlyConfigured`."""
        configured = getattr(settings, "DOWNLOADVIEW_MIDDLEWARES", [])
        for index, item in enumerate(configured):
            where = f"settings.DOWNLOADVIEW_MIDDLEWARES[{index}]"
            if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 3:
                raise ImproperlyConfigured(
                    f"{where} has to be a tuple of a key, an import string and options, not {item!r}"
                )
            key, name, options = item
            self.middlewares.append((key, make_middleware(backend_of(name, where), options, where)))

    def dispatch(self, request: HttpRequest, response: Any) -> Any:
        """Return the response that the middlewares make of a response."""
        for _, middleware in self.middlewares:
            response = middleware.process_response(request, response)
        return response

    async def adispatch(self, request: HttpRequest, response: Any) -> Any:
        """Do what `dispatch` does, in an event loop."""
        if not _is_ours(self, "dispatch"):
            return await _off_the_loop(self.dispatch, request, response)
        for _, middleware in self.middlewares:
            response = await _aprocess(middleware, request, response)
        return response


class DownloadDispatcherMiddleware(BaseDownloadMiddleware):
    """Passes download responses through several middlewares, by default those of the settings."""

    def __init__(
        self, get_response: Callable[[HttpRequest], Any] | None = None, middlewares: Any = AUTO_CONFIGURE
    ) -> None:
        super().__init__(get_response)
        self.dispatcher = DownloadDispatcher(middlewares)

    def process_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Return the response that the middlewares make of a response."""
        return self.dispatcher.dispatch(request, response)

    async def aprocess_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Do what `process_download_response` does, in an event loop."""
        if not _is_ours(self, "process_download_response"):
            return await super().aprocess_download_response(request, response)
        return await self.dispatcher.adispatch(request, response)


class SmartDownloadMiddleware(DownloadDispatcherMiddleware):
    """One middleware for all rules of the settings. The first rule that matches a file wins.

    The settings are `DOWNLOADVIEW = {"BACKEND": ..., "RULES": [...], ...}`, where further keys are options of the
    backend for all rules, or django-downloadview's `DOWNLOADVIEW_BACKEND` and `DOWNLOADVIEW_RULES`. A backend is
    "nginx", "apache", "lighttpd" or the import string of a middleware. A rule is a dictionary of options, whose key
    "backend" may name another backend, or a list of positional arguments.

    Raises `ImproperlyConfigured`. The message names the setting and the mistake.
    """

    def __init__(
        self,
        get_response: Callable[[HttpRequest], Any] | None = None,
        backend_factory: Any = AUTO_CONFIGURE,
        backend_options: Any = AUTO_CONFIGURE,
    ) -> None:
        super().__init__(get_response, middlewares=[])
        self.backend_factory = backend_factory
        if backend_factory is AUTO_CONFIGURE:
            self.auto_configure_backend_factory()
        self.backend_options = backend_options
        if backend_options is AUTO_CONFIGURE:
            self.auto_configure_backend_options()
        else:
            self._add(backend_options, "backend_options")

    def auto_configure_backend_factory(self) -> None:
        """Set `backend_factory` from the settings."""
        self.backend_factory = backend_of(*configured("BACKEND"))

    def auto_configure_backend_options(self) -> None:
        """Add a middleware for each rule of the settings."""
        self._add(*configured("RULES"), shared=shared_options())

    def _add(self, rules: Any, where: str, shared: Mapping[str, Any] | None = None) -> None:
        for key, (rule, place) in enumerate(rules_of(rules, where)):
            factory, options = resolved(rule, place, self.backend_factory, shared or {})
            self.dispatcher.middlewares.append((key, make_middleware(factory, options, place)))


def configured(name: str) -> tuple[Any, str]:
    """Return the value of a setting and its full name: that of DOWNLOADVIEW[name], else of DOWNLOADVIEW_name.

    Raises `ImproperlyConfigured` if neither is set.
    """
    new = getattr(settings, "DOWNLOADVIEW", None)
    if new is not None and not isinstance(new, Mapping):
        raise ImproperlyConfigured(f"settings.DOWNLOADVIEW has to be a dictionary, not {new!r}")
    for key in (name, name.lower()):
        if new is not None and key in new:
            return new[key], f"settings.DOWNLOADVIEW[{key!r}]"
    legacy = f"DOWNLOADVIEW_{name}"
    if hasattr(settings, legacy):
        return getattr(settings, legacy), f"settings.{legacy}"
    raise ImproperlyConfigured(f"SmartDownloadMiddleware needs settings.DOWNLOADVIEW[{name!r}], or settings.{legacy}")


def shared_options() -> dict[str, Any]:
    """Return the options in settings.DOWNLOADVIEW for all rules of its backend."""
    new = getattr(settings, "DOWNLOADVIEW", None) or {}
    return {key.lower(): value for key, value in new.items() if key.lower() not in ("backend", "rules")}


def backend_of(value: Any, where: str) -> Callable[..., Any]:
    """Return the backend of a setting, whose value is a name in `BACKENDS`, an import string, or a callable.

    The import strings of django-downloadview name our classes. Raises `WrongBackend`.
    """
    backend = value
    if isinstance(value, str):
        path = BACKENDS.get(value, value)
        if path.startswith(_THEIRS):
            # the class may be imported from any module of the package
            package, _, name = path.removeprefix(_THEIRS).rpartition(".")
            path = ".".join(filter(None, [f"{_OURS}contrib.django", package.partition(".")[0], name]))
        try:
            backend = import_string(path)
        except ImportError as exc:
            reason = f"cannot be imported ({exc})" if "." in value else "is not known"
            raise WrongBackend(f"{where} is {value!r}, which {reason}: {_BACKEND_ADVICE}") from exc
    if not callable(backend):
        raise WrongBackend(f"{where} is {value!r}, which is not a middleware: {_BACKEND_ADVICE}")
    return cast("Callable[..., Any]", backend)


def rules_of(value: Any, where: str) -> list[tuple[Any, str]]:
    """Return each rule of a setting with its name, such as `RULES[0]`. Raises `ImproperlyConfigured`."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ImproperlyConfigured(f"{where} has to be a list of rules, not {value!r}")
    return [(rule, f"{where}[{index}]") for index, rule in enumerate(value)]


def resolved(
    rule: Any, where: str, backend: Callable[..., Any], shared: Mapping[str, Any]
) -> tuple[Callable[..., Any], Any]:
    """Return the backend and the options of a rule. Raises `ImproperlyConfigured`."""
    if isinstance(rule, Mapping):
        options = dict(rule)
        other = options.pop("backend", None)
        if other is None:
            return backend, {**shared, **options}
        return backend_of(other, f"{where}['backend']"), options
    if isinstance(rule, str) or not isinstance(rule, Sequence):
        raise ImproperlyConfigured(f"{where} has to be a dictionary of options, not {rule!r}")
    return backend, list(rule)


def make_middleware(factory: Callable[..., Any], options: Any, where: str) -> Any:
    """Return the middleware that `factory` makes from named or positional options. Raises `ImproperlyConfigured`."""
    try:
        return factory(**options) if isinstance(options, Mapping) else factory(*options)
    except ImproperlyConfigured as exc:
        raise ImproperlyConfigured(f"{where}: {exc}") from exc
    except TypeError as exc:
        if isinstance(options, Mapping) and (unknown := _unknown_key(factory, options)) is not None:
            raise ImproperlyConfigured(f"{where}: {unknown}") from exc
        name = getattr(factory, "__name__", repr(factory))
        raise ImproperlyConfigured(f"{where} does not fit {name}: {exc}") from exc


def _unknown_key(factory: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    """Return a message about the first option that `factory` does not take, or None if it takes them all."""
    try:
        parameters = signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return None
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    keys = [parameter.name for parameter in parameters if parameter.name != "get_response"]
    unknown = next((key for key in options if key not in keys), None)
    if unknown is None:
        return None
    similar = get_close_matches(str(unknown), keys, n=1)
    return f"unknown key {unknown!r}: {f'did you mean {similar[0]!r}?' if similar else 'use ' + ', '.join(keys)}"


class NoRedirectionMatch(Exception):
    """No rule covers the file of a response: no proxy can send it."""


class ProxiedDownloadMiddleware(RealDownloadMiddleware):
    """Has a proxy send the files that it can reach, by the headers that `orders` of a subclass returns.

    source_url: the rule covers files whose URL is equal to or below this one. source_dir: it covers local files below
    this directory. destination_url: where the proxy finds the files below the source. Paths match by whole segments.
    """

    response_class: ClassVar[type[ProxiedDownloadResponse]] = ProxiedDownloadResponse
    """The class that the response of a file becomes when the proxy sends the file."""

    destination_option: ClassVar[str] = "destination_url"
    fetches_urls: ClassVar[bool] = True
    """Whether the destination may be on another server. False: it is a directory."""

    def __init__(
        self,
        get_response: Callable[[HttpRequest], Any] | None = None,
        source_dir: str | os.PathLike[str] | None = None,
        source_url: str | None = None,
        destination_url: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(get_response)
        self.source_dir = source_dir
        self.source_url = source_url
        self.destination_url = destination_url
        if source_dir or source_url or destination_url:
            self.rules  # noqa: B018 - report mistakes now, not with the first download

    def make_backend(self, rules: list[Rule]) -> OffloadBackend:
        """Return the backend that matches rules and encodes paths: here that of nginx, with internal URIs."""
        return XAccelRedirect(rules)

    @cached_property
    def rules(self) -> offload.Rules:
        """The rules that the options make. Raises `ImproperlyConfigured`."""
        return offload.Rules(
            self.make_backend,
            source_dir=self.source_dir,
            source_url=self.source_url,
            destination=self.destination_url,
            option=self.destination_option,
        )

    def get_redirect_url(self, response: Any) -> str:
        """Return where the proxy finds the file: its URI, percent-encoded, or its path. Raises `NoRedirectionMatch`."""
        match = self.rules.find(response.file, response.get_basename())
        if match is None:
            raise NoRedirectionMatch(
                f"no rule covers the file {getattr(response.file, 'name', None)!r}: source_url is {self.source_url!r}, "
                f"source_dir is {self.source_dir!r}"
            )
        return self.value_of(match)

    def value_of(self, match: offload.Found) -> str:
        """Return the redirect URL of a file that a rule covers. Raises `NoRedirectionMatch`."""
        return f"{match.value}?{match.query}" if match.query else match.value

    def orders(self, response: Any, redirect_url: str, content_type: str) -> Mapping[str, str]:
        """Return the headers that have the proxy send the file at `redirect_url`, with this Content-Type."""
        raise NotImplementedError(f"{type(self).__name__} has to override orders")

    def process_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Return the response. It has become the one that has the proxy send the file, if the proxy may."""
        if may_be_offloaded(response, request):
            response.locate(request)
            with suppress(NoRedirectionMatch):
                response.accept(request, self._offer(response, self.get_redirect_url(response)))
        return response

    async def aprocess_download_response(self, request: HttpRequest, response: Any) -> Any:
        """Do what `process_download_response` does, in an event loop."""
        if not _is_ours(self, "process_download_response", "get_redirect_url"):
            return await super().aprocess_download_response(request, response)
        if may_be_offloaded(response, request):
            await response.alocate(request)
            may_block = self.rules.want_urls and offload.may_block(response.file)
            with suppress(NoRedirectionMatch):
                find = self.get_redirect_url
                redirect_url = await sync_to_async(find)(response) if may_block else find(response)
                await response.aaccept(request, self._offer(response, redirect_url))
        return response

    def _offer(self, response: DownloadResponse, redirect_url: str) -> ProxyOffer:
        async def headers(content_type: str) -> Mapping[str, str]:
            return self.orders(response, redirect_url, content_type)

        return ProxyOffer(headers, self.response_class, is_remote=self.fetches_urls and self.rules.is_of_server)


class DownloadDecorator:
    """Applies a middleware to a single view: `DownloadDecorator(factory)(view, *args, **kwargs)`.

    The arguments after the view are those of the factory. A synchronous view stays synchronous, and an asynchronous
    one asynchronous.
    """

    def __init__(self, middleware_factory: Callable[..., Any]) -> None:
        self.middleware_factory = middleware_factory

    def __call__(self, view_func: View, *middleware_args: Any, **middleware_kwargs: Any) -> View:
        """Return `view_func` with its responses passed through the middleware."""
        middleware = self.middleware_factory(*middleware_args, **middleware_kwargs)

        @wraps(view_func)
        def decorated(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            return _call(middleware, view_func, request, *args, **kwargs)

        return cast("View", like(view_func, decorated))


def _call(middleware: Any, inner: Callable[..., Any], request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
    """Call a view or the next middleware, and process its response. Return a coroutine if the view returns one."""
    with deferred(request):
        response = inner(request, *args, **kwargs)
        if not isawaitable(response):
            response = middleware.process_response(request, response)
    if isawaitable(response):
        return _acall(middleware, response, request)
    return response.finish(request) if is_due(response, request) else response


async def _acall(middleware: Any, pending: Awaitable[Any], request: HttpRequest) -> Any:
    with deferred(request):
        response = await _aprocess(middleware, request, await pending)
    return await response.afinish(request) if is_due(response, request) else response


async def _aprocess(middleware: Any, request: HttpRequest, response: Any) -> Any:
    """Have a middleware process a response. A middleware without `aprocess_response` runs in a thread."""
    process = getattr(middleware, "aprocess_response", None)
    if process is None:
        return await _off_the_loop(middleware.process_response, request, response)
    return await process(request, response)


async def _off_the_loop(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the project: in Django's thread for blocking code, unless it is a coroutine function."""
    return await (function if iscoroutinefunction(function) else sync_to_async(function))(*args)


def _is_ours(instance: object, *methods: str) -> bool:
    """Return whether the project overrides none of the methods."""
    return all(getattr(type(instance), method).__module__.startswith(_OURS) for method in methods)
