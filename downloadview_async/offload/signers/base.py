"""The interface to stores and CDNs that check signed URLs: `Signer`, `SignerKind`, and what many of them share."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args, runtime_checkable
from urllib.parse import quote, urlsplit

from downloadview_async.errors import ConfigurationError

LONGEST = 10 * 365 * 86_400
"""The longest time in seconds that a URL can be valid where the provider has no limit."""

KEPT = 1024
"""How many signatures of a slow algorithm a signer keeps, for files that are asked for again and again."""

S3_HEADERS = frozenset({"cache-control", "content-disposition", "content-encoding", "content-language", "content-type"})
"""The headers of S3's answer that a parameter replaces whose name is `response-` and the header's."""

_NAME = re.compile("[a-z][a-z0-9_]*")
_PATH = re.compile("(?:/[A-Za-z0-9_.~!$&'()*+,;=:@%-]+)*/?")


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed URL. `repr` shows none of it.

    seconds: how long it is valid. cookies: values of Set-Cookie without which the URL does not work.
    """

    url: str = field(repr=False)
    seconds: int
    cookies: tuple[str, ...] = field(default=(), repr=False)


@runtime_checkable
class Signer(Protocol):
    """Signs the URLs of the files that one store or CDN has. It has nothing in its `repr` that signs.

    max_seconds: the longest time that a URL can be valid.
    carries: the headers, in lower case, that a URL makes the edge send.
    is_served_alike: whether the edge sends all headers that this application would send, because it gets the files from
    it or from a server like it.
    """

    max_seconds: int
    carries: frozenset[str]
    is_served_alike: bool

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """Return the signed URL of a file, or None for a file whose URL the edge would take for another one.

        path: what follows the URL of the edge, percent-encoded, without a slash at its beginning. headers: those that
        the edge should send, all of which are in `carries`. now: seconds since the epoch, UTC. seconds: how long the
        URL should be valid; it may be valid for up to an eighth less.
        """
        ...


@runtime_checkable
class RenewingSigner(Signer, Protocol):
    """A `Signer` whose key expires."""

    async def renew(self) -> None:
        """Get a new key if it is time for one. Raises `SourceUnavailable` without a valid key."""
        ...


@dataclass(frozen=True, slots=True)
class SignerOption:
    """An option of a signer. In the service's settings it is a key of `[sources.NAME.edge]`.

    type: `bool`, `str` or a `Literal` of strings.
    takes: the allowed values in words, for messages.
    default: None if the option has to be given or may be missing, see `is_required`.
    is_secret: whether the value must not be shown. is_path: whether it is the path of a file. is_function: whether it
    is a function, which the settings name as `module:function`.
    """

    type: Any
    takes: str = field(kw_only=True)
    default: Any = field(default=None, kw_only=True)
    is_required: bool = field(default=False, kw_only=True)
    is_secret: bool = field(default=False, kw_only=True)
    is_path: bool = field(default=False, kw_only=True)
    is_function: bool = field(default=False, kw_only=True)


SECRET = SignerOption(str, takes="the secret key, as the provider shows it", is_secret=True)
KEY_ID = SignerOption(str, takes="the id by which the provider knows the key")
PARAMETER = SignerOption(str, takes="the name of the parameter with the token")
ORIGIN = SignerOption(
    Literal["other", "s3", "service"],
    takes="s3 (it passes response-* on to S3), service (it gets the files from this service) or other",
    default="other",
)
"""From where a CDN gets the files, which tells whose headers clients get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignerKind:
    """One kind of store or CDN. The settings, the checks and the documentation are made from it.

    name: the name in settings: lower-case letters, digits and `_`. title: the name in texts.
    signer: makes the signer. It gets an `Edge` and the options by name.
    options: the options of the signer.

    Raises `ConfigurationError` for an invalid name.
    """

    name: str
    title: str
    signer: Callable[..., Signer]
    options: Mapping[str, SignerOption]

    def __post_init__(self) -> None:
        for name in (self.name, *self.options):
            if not _NAME.fullmatch(name) or name in ("kind", "url", "expires", "checks"):
                raise ConfigurationError(f"{name!r} is not a valid name for a signer or an option: use a-z, 0-9 and _")

    def make(self, url: str, **options: Any) -> Signer:
        """Return the signer of the files below a URL. An option that is missing or None gets its default.

        Raises `ConfigurationError`, which begins with the name of the option if it is about one.
        """
        for name, value in options.items():
            if name not in self.options:
                close = get_close_matches(name, self.options, 1) or [", ".join(sorted(self.options))]
                raise ConfigurationError(f"{name}: {self.title} has no such option: use {close[0]}")
            if value is not None:
                self._check(name, value)
        given = {name: option.default for name, option in self.options.items()}
        given |= {name: value for name, value in options.items() if value is not None}
        given |= {
            name: os.fspath(given[name]) for name, option in self.options.items() if option.is_path and given[name]
        }
        for name, option in self.options.items():
            if option.is_required and given[name] is None:
                raise ConfigurationError(f"{name}: missing: give {option.takes}")
        return self.signer(Edge(url), **given)

    def _check(self, name: str, value: Any) -> None:
        option = self.options[name]
        if option.is_function:
            fits = callable(value)
        elif allowed := get_args(option.type):
            fits = value in allowed
        else:
            fits = isinstance(value, (option.type, os.PathLike) if option.is_path else option.type) and value != ""
        if not fits:
            shown = "the value" if option.is_secret else repr(value)
            raise ConfigurationError(f"{name}: {shown} does not fit: give {option.takes}")


class Edge:
    """The URL below which an edge has the files: `https://cdn.example.org/files/`.

    Raises `ConfigurationError` for another text.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            good = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
        except ValueError:
            good = False
        if not good or "@" in parts.netloc or parts.query or parts.fragment or not _PATH.fullmatch(parts.path):
            shown = "the value" if "@" in str(url) else repr(url)  # it may have a password
            raise ConfigurationError(
                f"url: {shown} is not the URL of an edge: write one such as https://cdn.example.org/files/"
            )
        self.scheme = parts.scheme
        self.host = parts.hostname or ""
        self.site = f"{parts.scheme}://{parts.netloc}"
        self.prefix = f"{parts.path.rstrip('/')}/"
        self.url = f"{self.site}{self.prefix}"

    def __repr__(self) -> str:
        return f"Edge({self.url!r})"


def s3_query(headers: Mapping[str, str]) -> str:
    """Return the parameters by which S3 sends other headers, for a query, sorted by their names."""
    return "&".join(f"response-{name}={encoded(value)}" for name, value in sorted(headers.items()))


@lru_cache(KEPT)
def encoded(value: str) -> str:
    """Return a value for a query, percent-encoded."""
    return quote(value, safe="")


def joined(url: str, *queries: str) -> str:
    """Return a URL with the given parts of a query, of which some may be empty."""
    query = "&".join(filter(None, queries))
    return f"{url}?{query}" if query else url


def parameter_name(name: str) -> str:
    """Return the name of a parameter. Raises `ConfigurationError` for one that a query cannot have as it is."""
    if not re.fullmatch("[A-Za-z0-9_.~-]+", name):
        raise ConfigurationError(f"parameter: {name!r} is not a name for a parameter: use letters, digits and _")
    return name


def moment_of(now: float, seconds: int) -> int:
    """Return a time up to an eighth of `seconds` before now. It stays the same for so long, and so does a signature."""
    step = max(seconds // 8, 1)
    return int(now) // step * step
