"""One value for each kind of proxy: which header it obeys, and how it reads a path in it.

The encodings are not interchangeable: nginx, Caddy, H2O and lighttpd percent-decode the value, mod_xsendfile 0.12 does
not, and the wrong choice makes the proxy send another file.
"""

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.fields import OFFLOAD_TARGET
from downloadview_async.offload.presigned import StoreSigner
from downloadview_async.offload.rules import Rule, RuleTable
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.object_store import SCHEMES, ObjectStorage

SIGNED_SECONDS = 300
"""How long the URL that a proxy gets is good for. It is asked for at once; the rest is for clocks that differ."""

_INTERNAL_URI = re.compile(r"/(?:[A-Za-z0-9_~.-]+/)*")
_REQUEST_TARGET = re.compile(r"/[A-Za-z0-9_.~!$&'()*+,;=:@/?%-]*")  # as RFC 3986 has it: nothing is left to encode
_KEPT = 1024  # answers to the last locations that were asked for; they follow from the rules alone
_CHARSET = re.compile("[A-Za-z0-9_.:-]+")


class XAccelRedirect:
    """nginx, and Caddy: X-Accel-Redirect with an internal URI, percent-encoded.

    A file of another server has the URI of its rule's target alone, and X-Offload-Target with what the proxy asks that
    server for. It is for a GET alone: HEAD is answered here.

    rules: their targets are URIs that begin and end with a slash: those of `internal` locations for nginx, those of
    `handle_path` below `handle_response` for Caddy. A source may be an object store's: `s3://BUCKET/PREFIX`.
    storages: the object stores that sources of rules are of; S3 alone. What the proxy asks for is signed by their keys,
    but for one with `skip_signature`.
    buffering, charset, expires ("off", or a number of seconds), limit_rate (bytes per second): nginx's own handling
    of this answer, see https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_ignore_headers. None leaves it
    to nginx's configuration. Caddy has none of them.

    Raises `ConfigurationError` for a target or an option that nginx would not take, and for a store without a key.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        storages: Iterable[ObjectStorage] = (),
        buffering: bool | None = None,
        charset: str | None = None,
        expires: int | Literal["off"] | None = None,
        limit_rate: int | None = None,
    ) -> None:
        self._places = _Places(rules, storages)
        self._options: dict[str, str] = {}
        self._kept = lru_cache(_KEPT)(self._headers)
        if buffering is not None:
            self._options["x-accel-buffering"] = "yes" if buffering else "no"
        if charset is not None:
            if not _CHARSET.fullmatch(charset):
                raise ConfigurationError(f"no charset: {charset!r}")
            self._options["x-accel-charset"] = charset
        if expires is not None:
            if expires != "off" and not _is_natural(expires):
                raise ConfigurationError(f"expires is a number of seconds or 'off', not {expires!r}")
            self._options["x-accel-expires"] = str(expires)
        if limit_rate is not None:
            if not _is_natural(limit_rate):
                raise ConfigurationError(
                    f"limit_rate is a number of bytes per second, 0 for no limit, not {limit_rate!r}"
                )
            self._options["x-accel-limit-rate"] = str(limit_rate)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-Accel-Redirect and the options, or None for a file that no rule covers."""
        location = file.location
        return None if location is None else self._kept(location)

    async def signed(self, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with what the proxy asks a store for, signed. Raises `SourceUnavailable`."""
        return await self._places.signed(file, headers)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        order = self._places.order("x-accel-redirect", location)
        return None if order is None else MappingProxyType(order | self._options)


class XReproxyURL:
    """H2O: X-Reproxy-URL with an internal URI, percent-encoded.

    rules: their sources are directories, such as that of a `Cache`, and their targets URIs that begin and end with a
    slash: those of paths in H2O's configuration. H2O keeps none of our headers by itself: see `deploy/h2o/h2o.conf`.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        rules = list(rules)
        for rule in rules:
            if not rule.source.startswith("/"):
                raise ConfigurationError(
                    f"H2O sends local files: {rule.source!r} is no absolute directory. What it fetches from another "
                    "server it breaks off for a client that is slower than that server: keep those files in a cache, "
                    "and give the rule the directory of the cache"
                )
        self._places = _Places(rules)
        self._kept = lru_cache(_KEPT)(self._headers)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-Reproxy-URL, or None for a file that no rule covers."""
        location = file.location
        return None if location is None else self._kept(location)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        order = self._places.order("x-reproxy-url", location)
        return None if order is None else MappingProxyType(order)


class XLiteSpeedLocation:
    """LiteSpeed: X-LiteSpeed-Location with an internal URI. The header is tested, LiteSpeed itself is not.

    How LiteSpeed reads a percent sign is not known here, so a name is sent by it only if that makes no difference: one
    of ASCII letters, digits and `_.-~`. Other files are streamed.

    rules: their sources are directories, and their targets URIs that begin and end with a slash.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        rules = list(rules)
        for rule in rules:
            if not rule.source.startswith("/"):
                raise ConfigurationError(f"LiteSpeed sends local files: {rule.source!r} is no absolute directory")
        self._places = _Places(rules)
        self._kept = lru_cache(_KEPT)(self._headers)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-LiteSpeed-Location, or None for a file that no rule covers, or whose name is not plain."""
        location = file.location
        return None if location is None else self._kept(location)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        order = self._places.order("x-litespeed-location", location)
        return None if order is None or "%" in order["x-litespeed-location"] else MappingProxyType(order)


class XSendfile:
    """Apache with mod_xsendfile, and lighttpd: X-Sendfile with an absolute path.

    rules: their targets are directories as the proxy sees them.
    encoding: "raw" for Apache's mod_xsendfile before 1.0, which takes the bytes of the path as they are; "percent"
    for lighttpd and for mod_xsendfile 1.0, which decode them.

    Raises `ConfigurationError` for a target that is no absolute directory, and for an unknown encoding.
    """

    def __init__(self, rules: Iterable[Rule], *, encoding: Literal["raw", "percent"]) -> None:
        rules = list(rules)
        for rule in rules:
            absolute = rule.source.startswith("/") and rule.target.startswith("/")
            if not absolute or {".", ".."} & {*rule.target.split("/")} or not _is_text(rule.target):
                raise ConfigurationError(
                    f"X-Sendfile sends local files: a rule from {rule.source!r} to {rule.target!r} needs an absolute "
                    "directory on both sides"
                )
        rules = [Rule(rule.source, f"{rule.target.rstrip('/')}/") for rule in rules]
        if encoding not in ("raw", "percent"):
            raise ConfigurationError(f"encoding is 'raw' (Apache) or 'percent' (lighttpd), not {encoding!r}")
        self._rules = RuleTable(rules)
        self._encoding = encoding
        self._kept = lru_cache(_KEPT)(self._headers)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-Sendfile, or None for a file that no rule covers, or that a raw value cannot name."""
        location = file.location
        return None if location is None else self._kept(location)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        if (found := self._rules.match(location)) is None:
            return None
        path = os.fsencode("".join(found))
        if self._encoding == "percent":
            return MappingProxyType({"x-sendfile": quote(path)})
        if path.endswith(b" "):
            return None  # the end of a header value is trimmed, and the proxy would send the file without the space
        # a header value is bytes, which ASGI code carries as latin-1 text
        return MappingProxyType({"x-sendfile": path.decode("latin-1")})


class _Places:
    """Where a proxy finds what rules cover: local files below an internal URI, others by what it asks a server for.

    Raises `ConfigurationError` for a target that is no internal URI, and for a store that is none of `storages`.
    """

    def __init__(self, rules: Iterable[Rule], storages: Iterable[ObjectStorage] = ()) -> None:
        rules, storages = list(rules), list(storages)
        for rule in rules:
            if not _INTERNAL_URI.fullmatch(rule.target) or rule.target == "/" or "/." in rule.target:
                raise ConfigurationError(
                    f"the target {rule.target!r} is no internal location: write it with a slash at both ends, such as "
                    "/_files/, as in nginx's `location /_files/ { internal; alias /srv/files/; }`"
                )
        _check_targets(rules)
        self._table = RuleTable(plain for rule in rules for plain in by_http(rule, storages))
        self._signers = [
            StoreSigner(storage, expires=SIGNED_SECONDS)
            for storage in storages
            if storage.config.get("skip_signature", "").lower() != "true" and self._covers(storage)
        ]

    def _covers(self, storage: ObjectStorage) -> bool:
        url = storage.url_of("")
        return url is not None and any(_is_within(url, source) or _is_within(source, url) for source in self._table)

    def order(self, header: str, location: str) -> dict[str, str] | None:
        """Return the header, and what else the proxy needs to know of a file or URL; None if no rule covers it."""
        if (found := self._table.match(location)) is None:
            return None
        target, rest = found
        if location.startswith("/"):
            return {header: target + quote(os.fsencode(rest))}
        asked = _request_target(location)
        return None if asked is None else {header: target, OFFLOAD_TARGET: asked}

    async def signed(self, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        for signer in self._signers:
            if (found := await signer.sign(file.location)) is not None:
                target = _request_target(found[0])
                assert target is not None  # for it was one without the signature
                return {**headers, OFFLOAD_TARGET: target}
        return headers


def by_http(rule: Rule, storages: Iterable[ObjectStorage]) -> list[Rule]:
    """Return rules for the same by the plain URLs that the store's objects have; else the rule itself.

    Raises `ConfigurationError` for a store that is none of `storages`, and for one with several endpoints.
    """
    if urlsplit(rule.source).scheme not in SCHEMES:
        return [rule]
    source = rule.source.rstrip("/")
    urls = []
    for storage in storages:
        own = storage.url.rstrip("/")
        rest = source[len(own) + 1 :] if _is_within(source, own) else ""
        if (rest or _is_within(own, source)) and (url := storage.url_of(unquote(rest))) is not None:
            urls.append(url)
    if not urls:
        raise ConfigurationError(
            f"no storage is at {rule.source!r}: pass the ObjectStorage of S3 that has this URL among storages= "
            "(Google's is one too, by its endpoint for S3)"
        )
    if len({urlsplit(url)[:2] for url in urls}) > 1:
        raise ConfigurationError(
            f"{rule.source!r} is at more than one endpoint: {', '.join(urls)}: write a rule for each, with its URL"
        )
    return [Rule(url, rule.target) for url in dict.fromkeys(urls)]


def _check_targets(rules: Iterable[Rule]) -> None:
    """Refuse a target below another one: the proxy would look for files of one rule in the directory of the other."""
    targets = sorted(rule.target for rule in rules)
    for target, other in itertools.pairwise(targets):
        if other.startswith(target):
            raise ConfigurationError(
                f"the target {other!r} is {target!r} or below it: choose two side by side, such as /_a/ and /_b/"
            )


def _is_within(inner: str, outer: str) -> bool:
    return f"{inner}/".startswith(f"{outer}/")


def _request_target(url: str) -> str | None:
    """Return the path and the query of a URL, or None where a proxy might not ask for that very path."""
    host = url.find("/") + 2
    target = url[url.find("/", host) :]
    if not _REQUEST_TARGET.fullmatch(target):
        return None
    encoded = target.partition("?")[0]
    path = unquote_to_bytes(encoded)
    if path.count(b"/") != encoded.count("/") or {b".", b".."} & {*path.split(b"/")} or min(path) < 0x20:
        return None
    return target


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: str) -> bool:
    return all(" " <= character != "\x7f" for character in value)
