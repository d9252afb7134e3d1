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
    """An option of a proxy's backend. In the service's settings it is a key of `[offload]`.

    type: `bool`, `int`, `str`, a `Literal` of strings, or a union of them.
    takes: the values it takes, in words.
    default: the value for the backend if the option is not set; None leaves the value to the backend.
    at_least: the least number it takes.
    lacking: ends the message "apache has ..." about a proxy without this option.
    """

    type: Any
    takes: str = field(kw_only=True)
    default: Any = field(default=None, kw_only=True)
    at_least: int | None = field(default=None, kw_only=True)
    lacking: str = field(default="no such option", kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyKind:
    """One kind of proxy: the settings, the commands, the checks and the documentation read everything from it.

    name: its name in settings and commands: lower-case letters, digits and `_`.
    title: its name in texts.
    header: the response header it obeys, in its usual spelling.
    further_orders, controls: other headers it obeys. Orders name a file, controls say how to send it. As soon as the
    value exists, only backends may set an order, and no `DownloadResponse` accepts any of these headers.
    targets: the kind of a rule's target: "uri", an internal URI that begins and ends with a slash, or "directory", a
    directory as the proxy sees it, by default the source itself.
    encode: writes a path into the header, or returns None for a path that the proxy would read as another one: that
    file is streamed. For "uri" it gets the path below the source, and the target stands before its result; for
    "directory" it gets an absolute path.
    backend: makes the `OffloadBackend` from the rules, from `options` by name, and from `storages` if the proxy fetches
    URLs. None makes one that sends local files by `header`.
    options: the options of the backend.
    fetches_urls: the proxy can fetch files from other servers, so the source of a rule may be a URL.
    folds_case: the proxy takes two targets that differ only in case for the same one.
    hides_targets: the proxy itself answers requests below a target, so no route may be there.
    replaced_headers: headers of the service that the proxy replaces when it sends a file.
    configuration: returns a whole configuration for a site, see `proxy_config`. None: there is no template.
    remedies: the advice of `downloadview check` by problem, named as in `service/check/advice.py`. Words in angle
    brackets, such as `<directory>`, `<target>`, `<service>` and `<header>`, are replaced.

    Raises `ConfigurationError` for a name, an option or a header that the settings or a response could not have.
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
        """Return a backend for some rules. An option that is missing or None has its default.

        Raises `ConfigurationError`.
        """
        if self.backend is None:
            return LocalFiles(rules, title=self.title, header=self.header, targets=self.targets, encode=self.encode)
        given = {name: option.default for name, option in self.options.items()}
        given |= {name: value for name, value in options.items() if value is not None}
        if self.fetches_urls:
            given["storages"] = storages
        return self.backend(rules, **given)
