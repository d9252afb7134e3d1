"""The interface to reverse proxies: `OffloadBackend`, `ProxyKind`, and the ASGI extension that offers a backend."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.fields import OFFLOAD_TARGET, reserve_offload_headers
from downloadview_async.offload.places import Encode, LocalFiles, RateHeader
from downloadview_async.offload.render import ProxySite
from downloadview_async.offload.rules import Rule
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.object_store import ObjectStorage

EXTENSION = "downloadview_async.offload"
"""The key in `scope["extensions"]` under which `OffloadMiddleware` offers its backend to a response."""

_NAME = re.compile("[a-z][a-z0-9_]*")
_KEYS = ("backend", "rules")  # the other keys of [offload] are options
# No application can set a header once a proxy obeys it, so a kind must not take other headers.
_EXTENSION_HEADER = re.compile("[Xx]-[A-Za-z0-9-]+")


RedirectHeaders = Mapping[str, str | tuple[str, ...]]
"""The headers of a redirect, in lower case. Only the value of Set-Cookie may be a tuple: a line for each."""


class Redirect(Protocol):
    """Redirects clients to another place of a file."""

    async def headers_for(self, file: AsyncFile, described: Mapping[str, str]) -> RedirectHeaders | None:
        """Return the headers of a 307 in lower case, with Location and Cache-Control. None: send the file yourself.

        described: the headers that our own answer would have. The other place has to send them too. Return None if it
        cannot send one that protects the client, such as Content-Security-Policy.

        Raises `FileError`.
        """
        ...


class QuickRedirect(Redirect, Protocol):
    """A `Redirect` that may need neither time nor the file, such as `EdgeRedirect`.

    is_quick: whether `headers_for` never waits. is_checked: whether the file is opened first, so that a missing one
    gives a 404 here. Without that, its description is that of its name.
    """

    is_quick: bool
    is_checked: bool


def is_quick(redirect: Redirect | None) -> bool:
    """Return whether a redirect never waits: see `QuickRedirect`."""
    return getattr(redirect, "is_quick", False)


def is_checked(redirect: Redirect | None) -> bool:
    """Return whether a file is opened before a client is redirected to another place of it: see `QuickRedirect`."""
    return getattr(redirect, "is_checked", True)


def headers_at_once(redirect: Redirect, file: AsyncFile, described: Mapping[str, str]) -> RedirectHeaders | None:
    """Return what the `headers_for` of a `QuickRedirect` returns, which never waits. None as well if it does."""
    making = redirect.headers_for(file, described)
    try:
        making.send(None)
    except StopIteration as returned:
        headers: RedirectHeaders | None = returned.value
        return headers
    making.close()
    return None


@runtime_checkable
class CountedRedirect(Protocol):
    """A `Redirect` to a server whose log tells what it has sent, such as `PresignedRedirect`."""

    async def counted_headers_for(
        self, file: AsyncFile, described: Mapping[str, str], request_id: str
    ) -> RedirectHeaders | None:
        """Do what `headers_for` does, with a Location that carries the id of the request into the log.

        Clients must not cache the redirect: the id stands for one download.
        """
        ...


class OffloadBackend(Protocol):
    """Knows the header that one kind of proxy obeys, and the files that this proxy can reach."""

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return the headers that make the proxy send the file, names in lower case. None: send the file yourself.

        If `OFFLOAD_TARGET` is one of them, the proxy fetches the file from another server. Such headers answer only a
        GET, and only after `signed` has completed them.
        """
        ...


async def signed(backend: OffloadBackend, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return the headers of a backend, with a signed URL if the proxy fetches the file from a store that needs one.

    A backend signs if it has a method `signed`. Raises `FileError`.
    """
    if OFFLOAD_TARGET not in headers or (sign := getattr(backend, "signed", None)) is None:
        return headers
    with_signature: Mapping[str, str] = await sign(file, headers)
    return with_signature


def rated(backend: OffloadBackend, headers: Mapping[str, str], rate: int | None) -> Mapping[str, str]:
    """Return the headers of a backend with a rate for the answer, in bytes per second; None: without one.

    A backend whose proxy can limit the rate has a method `rated`.
    """
    if rate is None or (limit := getattr(backend, "rated", None)) is None:
        return headers
    with_rate: Mapping[str, str] = limit(headers, rate)
    return with_rate


@dataclass(frozen=True, slots=True)
class ProxyOption:
    """An option of a proxy's backend. In the service's settings it is a key of `[offload]`.

    type: `bool`, `int`, `str`, a `Literal` of strings, or a union of these.
    takes: the allowed values in words, for messages.
    default: the value for the backend if the option is not set. None: the backend has its own default.
    at_least: the smallest allowed number.
    lacking: the end of the message "apache has ..." about a proxy without this option.
    """

    type: Any
    takes: str = field(kw_only=True)
    default: Any = field(default=None, kw_only=True)
    at_least: int | None = field(default=None, kw_only=True)
    lacking: str = field(default="no such option", kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyKind:
    """One kind of proxy. The settings, the commands, the checks and the documentation are made from it.

    name: the name in settings and commands: lower-case letters, digits and `_`.
    title: the name in texts.
    header: the response header that the proxy obeys, in its usual spelling.
    further_orders, controls: other headers that it obeys. Orders name a file, controls say how to send it. Once the
    `ProxyKind` exists, only backends may set an order, and `DownloadResponse` refuses all of these headers.
    rate_header: the header, also among `controls`, by which it limits how fast it sends an answer. None: it cannot.
    targets: what the target of a rule is. "uri": an internal URI that begins and ends with a slash. "directory": a
    directory as the proxy sees it, by default the source itself.
    encode: writes a path into the header. It returns None for a path that the proxy would read as another one: that
    file is streamed. For "uri" it gets the path below the source, and its result follows the target. For "directory" it
    gets an absolute path.
    backend: makes the `OffloadBackend`. It gets the rules, the `options` by name, and `storages` if the proxy fetches
    URLs. None: a backend that sends local files by `header`.
    options: the options of the backend.
    fetches_urls: whether the proxy can fetch files from other servers, so that the source of a rule may be a URL.
    folds_case: whether two targets that differ only in case are the same for the proxy.
    hides_targets: whether the proxy answers requests below a target itself, so that no route may be there.
    balances: whether its configuration can choose one of several replicas of the service by the path of a request.
    verifies_links: whether its configuration can verify links of the format `secure_link` and send their files.
    replaced_headers: headers of the service that the proxy replaces when it sends a file.
    has_bare_errors: whether the errors that the proxy makes itself cannot carry headers of the service.
    configuration: returns a whole configuration for a site, see `proxy_config`. None: there is no template.
    remedies: the advice of `downloadview check` for each problem, named as in `check/advice.py`. Words in angle
    brackets, such as `<directory>`, `<target>`, `<service>` and `<header>`, are replaced.

    Raises `ConfigurationError` for an invalid name, option or header.
    """

    name: str
    title: str
    header: str
    targets: Literal["uri", "directory"]
    encode: Encode
    further_orders: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    rate_header: RateHeader | None = None
    backend: Callable[..., OffloadBackend] | None = None
    options: Mapping[str, ProxyOption] = field(default_factory=dict)
    fetches_urls: bool = False
    folds_case: bool = False
    hides_targets: bool = False
    balances: bool = False
    verifies_links: bool = False
    replaced_headers: tuple[str, ...] = ()
    has_bare_errors: bool = False
    configuration: Callable[[ProxySite], str] | None = None
    remedies: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.options):
            if not _NAME.fullmatch(name) or name in _KEYS:
                raise ConfigurationError(f"{name!r} is not a valid name for a proxy or an option: use a-z, 0-9 and _")
        if self.options and self.backend is None:
            raise ConfigurationError(f"{self.title} has options, but no backend that takes them: pass backend=")
        for name in (self.header, *self.further_orders, *self.controls):
            if not _EXTENSION_HEADER.fullmatch(name):
                raise ConfigurationError(f"{self.title} cannot obey the header {name!r}: use one that begins with X-")
        orders = {name.lower() for name in (self.header, *self.further_orders)}
        reserve_offload_headers(orders=orders, controls={name.lower() for name in self.controls})

    @property
    def headers(self) -> frozenset[str]:
        """All headers that the proxy obeys, in lower case."""
        return frozenset(name.lower() for name in (self.header, *self.further_orders, *self.controls))

    def make_backend(
        self, rules: Iterable[Rule], *, storages: Iterable[ObjectStorage] = (), **options: Any
    ) -> OffloadBackend:
        """Return a backend for some rules. An option that is missing or None gets its default.

        Raises `ConfigurationError`.
        """
        if self.backend is None:
            return LocalFiles(
                rules,
                title=self.title,
                header=self.header,
                targets=self.targets,
                encode=self.encode,
                rate_header=self.rate_header,
            )
        given = {name: option.default for name, option in self.options.items()}
        given |= {name: value for name, value in options.items() if value is not None}
        if self.fetches_urls:
            given["storages"] = storages
        return self.backend(rules, **given)
