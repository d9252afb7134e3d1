"""One value for each kind of proxy: which header it obeys, and how it reads a path in it.

The encodings are not interchangeable: nginx, Caddy, H2O and lighttpd percent-decode the value, mod_xsendfile 0.12 does
not, and the wrong choice makes the proxy send another file.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal
from urllib.parse import quote, unquote_to_bytes

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.rules import Rule, RuleTable
from downloadview_async.sources.base import AsyncFile

_INTERNAL_URI = re.compile(r"/(?:[A-Za-z0-9_~.-]+/)*")
_KEPT = 1024  # answers to the last locations that were asked for; they follow from the rules alone
_CHARSET = re.compile("[A-Za-z0-9_.:-]+")


class XAccelRedirect:
    """nginx, and Caddy: X-Accel-Redirect with an internal URI, percent-encoded.

    rules: their targets are URIs that begin and end with a slash: those of `internal` locations for nginx, those of
    `handle_path` below `handle_response` for Caddy.
    buffering, charset, expires ("off", or a number of seconds), limit_rate (bytes per second): nginx's own handling
    of this answer, see https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_ignore_headers. None leaves it
    to nginx's configuration. Caddy has none of them.

    Raises `ConfigurationError` for a target or an option that nginx would not take.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        buffering: bool | None = None,
        charset: str | None = None,
        expires: int | Literal["off"] | None = None,
        limit_rate: int | None = None,
    ) -> None:
        self._rules = _internal_rules(rules)
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

    def _headers(self, location: str) -> Mapping[str, str] | None:
        uri = _internal_uri(self._rules, location)
        return None if uri is None else MappingProxyType({"x-accel-redirect": uri, **self._options})


class XReproxyURL:
    """H2O: X-Reproxy-URL with an internal URI, percent-encoded.

    rules: their sources are directories, and their targets URIs that begin and end with a slash: those of paths in
    H2O's configuration. H2O keeps none of our headers by itself: see `deploy/h2o/h2o.conf`.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = _internal_rules(_local(rules, "H2O"))
        self._kept = lru_cache(_KEPT)(self._headers)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-Reproxy-URL, or None for a file that no rule covers."""
        location = file.location
        return None if location is None else self._kept(location)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        uri = _internal_uri(self._rules, location)
        return None if uri is None else MappingProxyType({"x-reproxy-url": uri})


class XLiteSpeedLocation:
    """LiteSpeed: X-LiteSpeed-Location with an internal URI. The header is tested, LiteSpeed itself is not.

    How LiteSpeed reads a percent sign is not known here, so a name is sent by it only if that makes no difference: one
    of ASCII letters, digits and `_.-~`. Other files are streamed.

    rules: their sources are directories, and their targets URIs that begin and end with a slash.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = _internal_rules(_local(rules, "LiteSpeed"))
        self._kept = lru_cache(_KEPT)(self._headers)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return X-LiteSpeed-Location, or None for a file that no rule covers, or whose name is not plain."""
        location = file.location
        return None if location is None else self._kept(location)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        uri = _internal_uri(self._rules, location)
        return None if uri is None or "%" in uri else MappingProxyType({"x-litespeed-location": uri})


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


def _internal_rules(rules: Iterable[Rule]) -> RuleTable:
    """Return the table of rules whose targets are internal URIs. Raises `ConfigurationError` for one that is none."""
    rules = list(rules)
    for rule in rules:
        if not _INTERNAL_URI.fullmatch(rule.target) or rule.target == "/" or "/." in rule.target:
            raise ConfigurationError(
                f"the target {rule.target!r} is no internal location: write it with a slash at both ends, such as "
                "/_files/, as in nginx's `location /_files/ { internal; alias /srv/files/; }`"
            )
    return RuleTable(rules)


def _local(rules: Iterable[Rule], proxy: str) -> list[Rule]:
    rules = list(rules)
    for rule in rules:
        if not rule.source.startswith("/"):
            raise ConfigurationError(f"{proxy} sends local files: {rule.source!r} is no absolute directory")
    return rules


def _internal_uri(rules: RuleTable, location: str) -> str | None:
    """Return the percent-encoded URI of a file or URL for the proxy, or None if there is none."""
    if (found := rules.match(location)) is None:
        return None
    target, rest = found
    path = os.fsencode(rest) if location.startswith("/") else _decoded(rest)
    return None if path is None else target + quote(path)


def _decoded(rest: str) -> bytes | None:
    """Return the bytes that the path of a URL encodes, or None where nginx would not ask for that very path again."""
    if "?" in rest or "#" in rest:
        return None
    path = unquote_to_bytes(rest)
    if path.count(b"/") != rest.count("/") or {b".", b".."} & {*path.split(b"/")} or min(path) < 0x20:
        return None
    return path


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: str) -> bool:
    return all(" " <= character != "\x7f" for character in value)
