"""The seam to reverse proxies: `OffloadBackend`, `ProxyKind`, and the ASGI extension that offers a backend."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.fields import OFFLOAD_TARGET, reserve_offload_headers
from downloadview_async.offload.places import Encode, LocalFiles
from downloadview_async.offload.render import ProxySite
from downloadview_async.offload.rules import Rule
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.object_store import ObjectStorage

EXTENSION = "downloadview_async.offload"
"""The key in `scope["extensions"]` under which `OffloadMiddleware` offers its backend to a response."""

_NAME = re.compile("[a-z][a-z0-9_]*")
_KEYS = ("backend", "rules")  # of [offload], beside which the options are
# An application could not set any other header from then on.
_EXTENSION_HEADER = re.compile("[Xx]-[A-Za-z0-9-]+")


class Redirect(Protocol):
    """Knows where else a client can fetch some files."""

    async def headers_for(self, file: AsyncFile, described: Mapping[str, str]) -> Mapping[str, str] | None:
        """Return the headers of a 307, Location and Cache-Control among them, in lower case; None: send it yourself.

        described: the headers that the file would have here, which it has to have there too. None as well where it
        cannot have one of those that protect the client.

        Raises `FileError`.
        """
        ...


class OffloadBackend(Protocol):
    """Knows one kind of proxy, and which files that proxy can reach."""

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return the headers that make the proxy send the file, names in lower case; None: stream it yourself.

        With `OFFLOAD_TARGET` among them, the proxy fetches the file from another server: that is for a GET alone, and
        not before `signed` has seen them.
        """
        ...


async def signed(backend: OffloadBackend, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return the headers of a backend as the proxy needs them: signed, if the backend can (`signed`) and has to.

    Raises `FileError`.
    """
    if OFFLOAD_TARGET not in headers or (sign := getattr(backend, "signed", None)) is None:
        return headers
    found: Mapping[str, str] = await sign(file, headers)
    return found


@dataclass(frozen=True, slots=True)
class ProxyOption:
    """An option of a proxy's backend, which is a key of `[offload]` in the service's settings, too.

    type: `bool`, `int`, `str`, a `Literal` of texts, or a union of them. takes: what it takes, in words.
    default: what the backend is given where the option is not set; None, what the backend has by itself.
    at_least: the least number that is taken. lacking: what a proxy without this option has, for messages.
    """

    type: Any
    takes: str = field(kw_only=True)
    default: Any = field(default=None, kw_only=True)
    at_least: int | None = field(default=None, kw_only=True)
    lacking: str = field(default="no such option", kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyKind:
    """All that is known of one kind of proxy; the settings, the commands and the documentation ask for nothing else.

    name: what the settings and commands call it: lower-case letters, digits and `_`.
    title: its name in texts.
    header: the response header that it obeys, as it is usually spelled.
    further_orders, controls: other headers that it obeys; orders name a file, controls say how it is sent. As soon as
    the value is made, backends alone may set an order, and no `DownloadResponse` takes any of these headers.
    targets: what a rule's target is: "uri", an internal URI that begins and ends with a slash; or "directory", where a
    rule without a target has the same directory for both.
    encode: writes a path into the header, or returns None for a path that the proxy would read as another one. The
    header has a URI with `target` before what `encode` returns, or an absolute path.
    backend: makes the `OffloadBackend`, from the rules, with each of `options` by its name, and with `storages` if the
    kind fetches URLs. None: one that sends local files by `header`.
    options: what else the backend takes.
    fetches_urls: whether a rule's source may be a URL, whose files the proxy fetches: see `OFFLOAD_TARGET`.
    folds_case: whether two targets that differ in case alone are one for the proxy.
    hides_targets: whether the proxy itself answers what clients ask for below a target, so that no route may be there.
    replaced_headers: what the service says of a file and the proxy replaces.
    configuration: returns a whole configuration for a site, see `proxy_config`. None: there is none.
    remedies: what mends a problem that `downloadview check` finds, by the names in `service/advice.py`. `<directory>`,
    `<target>`, `<service>`, `<header>` and other words in angle brackets are replaced.

    Raises `ConfigurationError` for a name, a header or an option that the settings could not have.
    """

    name: str
    title: str
    header: str
    targets: Literal["uri", "directory"]
    encode: Encode
    further_orders: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    backend: Callable[..., OffloadBackend] | None = None
    options: Mapping[str, ProxyOption] = field(default_factory=dict)
    fetches_urls: bool = False
    folds_case: bool = False
    hides_targets: bool = False
    replaced_headers: tuple[str, ...] = ()
    configuration: Callable[[ProxySite], str] | None = None
    remedies: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.options):
            if not _NAME.fullmatch(name) or name in _KEYS:
                raise ConfigurationError(f"a proxy or its option cannot be called {name!r}: use a-z, 0-9 and _")
        if self.options and self.backend is None:
            raise ConfigurationError(f"{self.title} has options, and no backend that takes them: give it one")
        for name in (self.header, *self.further_orders, *self.controls):
            if not _EXTENSION_HEADER.fullmatch(name):
                raise ConfigurationError(f"{self.title} cannot obey the header {name!r}: it begins with X-")
        orders = {name.lower() for name in (self.header, *self.further_orders)}
        reserve_offload_headers(orders=orders, controls={name.lower() for name in self.controls})

    @property
    def headers(self) -> frozenset[str]:
        """All headers that it obeys, in lower case."""
        return frozenset(name.lower() for name in (self.header, *self.further_orders, *self.controls))

    def make_backend(
        self, rules: Iterable[Rule], *, storages: Iterable[ObjectStorage] = (), **options: Any
    ) -> OffloadBackend:
        """Return a backend for some rules; an option that is not given, or None, has its default.

        Raises `ConfigurationError`.
        """
        if self.backend is None:
            return LocalFiles(rules, title=self.title, header=self.header, targets=self.targets, encode=self.encode)
        given = {name: option.default for name, option in self.options.items()}
        given |= {name: value for name, value in options.items() if value is not None}
        if self.fetches_urls:
            given["storages"] = storages
        return self.backend(rules, **given)
