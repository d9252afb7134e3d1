"""Where a proxy finds the files that rules cover, and how their paths are encoded in the header that it obeys."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.fields import OFFLOAD_TARGET
from downloadview_async.offload.presigned import StoreSigner
from downloadview_async.offload.rules import Rule, RuleTable, checked_rules
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.object_options import SCHEMES
from downloadview_async.sources.object_store import ObjectStorage

SIGNED_SECONDS = 300
"""Seconds that a signed URL for a proxy is valid. The proxy uses it at once; the rest allows for clocks that differ."""

KEPT = 1024
"""How many headers a backend caches by location. They depend on the rules alone."""

Encode = Callable[[str], str | None]
"""Encodes a path for a proxy, or returns None for one that the proxy would read as another path."""

_INTERNAL_URI = re.compile(r"/(?:[A-Za-z0-9_~.-]+/)*")
_REQUEST_TARGET = re.compile(r"/[A-Za-z0-9_.~!$&'()*+,;=:@/?%-]*")  # by RFC 3986: nothing is left to encode


def percent_encoded(path: str) -> str:
    """Return a path for a proxy that percent-decodes it."""
    return quote(os.fsencode(path))


def raw(path: str) -> str | None:
    """Return the bytes of a path for a proxy that takes them as they are; None for a path that ends with a space."""
    encoded = os.fsencode(path)
    if encoded.endswith(b" "):
        return None  # the end of a header value is trimmed, and the proxy would send the file without the space
    return encoded.decode("latin-1")  # a header value is bytes, which ASGI code carries as latin-1 text


def plain(path: str) -> str | None:
    """Return a path of ASCII letters, digits, `_.-~` and slashes, which all proxies read alike; None for others."""
    encoded = percent_encoded(path)
    return None if "%" in encoded else encoded


@dataclass(frozen=True, slots=True)
class RateHeader:
    """The header by which a proxy limits how fast it sends one answer. unit: bytes per second of the number 1."""

    name: str
    unit: int = 1

    def added_to(self, headers: Mapping[str, str], rate: int) -> Mapping[str, str]:
        """Return headers with a rate in bytes per second, unless they have a lower one already."""
        name, value = self.name.lower(), max(1, rate // self.unit)
        before = int(headers.get(name, "0"))
        return headers if 0 < before <= value else {**headers, name: str(value)}


class LocalFiles:
    """The backend of a proxy that sends local files and obeys one header.

    rules: their sources are directories. Their targets are internal URIs that begin and end with a slash, or
    directories as the proxy sees them: see `targets`.
    title, hint: the name of the proxy in messages, and the end of the message about a source that is not a directory.
    header, targets, encode, rate_header: as in `ProxyKind`.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        title: str,
        header: str,
        targets: Literal["uri", "directory"],
        encode: Encode,
        hint: str = "",
        rate_header: RateHeader | None = None,
    ) -> None:
        rules = checked_rules(rules)
        self._rate_header = rate_header
        for rule in rules:
            if targets == "directory":
                _check_directories(rule, title)
            elif not rule.source.startswith("/"):
                raise ConfigurationError(
                    f"{title} sends local files: {rule.source!r} is not an absolute directory{hint and f'. {hint}'}"
                )
        if targets == "uri":
            check_internal_uris(rules)
        else:
            rules = [Rule(rule.source, f"{rule.target.rstrip('/')}/") for rule in rules]
        self._table = RuleTable(rules)
        self._header = header.lower()
        self._by_uri = targets == "uri"
        self._encode = encode
        self._kept = lru_cache(KEPT)(self._headers)

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return the header, or None for a file that no rule covers, or that the header cannot name."""
        location = file.location
        return None if location is None else self._kept(location)

    def rated(self, headers: Mapping[str, str], rate: int) -> Mapping[str, str]:
        """Return the headers with a rate in bytes per second, if the proxy can limit it."""
        return headers if self._rate_header is None else self._rate_header.added_to(headers, rate)

    def _headers(self, location: str) -> Mapping[str, str] | None:
        if (match := self._table.match(location)) is None:
            return None
        target, rest = match
        encoded = self._encode(rest if self._by_uri else target + rest)
        if encoded is None:
            return None
        return MappingProxyType({self._header: target + encoded if self._by_uri else encoded})


class Places:
    """Where a proxy finds the files of its rules: local files below an internal URI, others at a URL that it fetches.

    Raises `ConfigurationError` for a target that is not an internal URI, and for a store that is not in `storages`.
    """

    def __init__(self, rules: Iterable[Rule], storages: Iterable[ObjectStorage] = ()) -> None:
        rules, storages = checked_rules(rules), list(storages)
        check_internal_uris(rules)
        self._table = RuleTable(by_url for rule in rules for by_url in by_http(rule, storages))
        self._signers = [
            StoreSigner(storage, expires=SIGNED_SECONDS)
            for storage in storages
            if storage.config.get("skip_signature", "").lower() != "true" and self._covers(storage)
        ]

    def _covers(self, storage: ObjectStorage) -> bool:
        url = storage.url_of("")
        return url is not None and any(_is_within(url, source) or _is_within(source, url) for source in self._table)

    def order(self, header: str, location: str) -> dict[str, str] | None:
        """Return the header that names a file, with `OFFLOAD_TARGET` for a URL. None if no rule covers the location."""
        if (match := self._table.match(location)) is None:
            return None
        target, rest = match
        if location.startswith("/"):
            return {header: target + percent_encoded(rest)}
        request_target = _request_target(location)
        return None if request_target is None else {header: target, OFFLOAD_TARGET: request_target}

    async def signed(self, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with a signed `OFFLOAD_TARGET` if a store has the file. Raises `SourceUnavailable`."""
        for signer in self._signers:
            if (signature := await signer.sign(file.location)) is not None:
                target = _request_target(signature[0])
                assert target is not None  # it was valid without the signature
                return {**headers, OFFLOAD_TARGET: target}
        return headers


def check_internal_uris(rules: Iterable[Rule]) -> None:
    """Raise `ConfigurationError` for a target that is not an internal URI, or that is equal to or below another one.

    With two such targets, the proxy would look for the files of one rule in the directory of the other.
    """
    targets = []
    for rule in rules:
        if not _INTERNAL_URI.fullmatch(rule.target) or rule.target == "/" or "/." in rule.target:
            raise ConfigurationError(
                f"the target {rule.target!r} is not an internal location: write it with a slash at both ends, such as "
                "/_files/, as in nginx's `location /_files/ { internal; alias /srv/files/; }`"
            )
        targets.append(rule.target)
    for target, other in itertools.pairwise(sorted(targets)):
        if other.startswith(target):
            raise ConfigurationError(
                f"the target {other!r} is equal to or below {target!r}: choose separate targets, such as /_a/ and /_b/"
            )


def by_http(rule: Rule, storages: Iterable[ObjectStorage]) -> list[Rule]:
    """Return the rule, or for one with the URL of a store, rules with the http or https URLs of the store's objects.

    Raises `ConfigurationError` for a store that is not in `storages`, and for one with several endpoints.
    """
    if urlsplit(rule.source).scheme not in SCHEMES:
        return [rule]
    source = rule.source.rstrip("/")
    urls = []
    for storage in storages:
        whole = storage.url.rstrip("/")
        rest = source[len(whole) + 1 :] if _is_within(source, whole) else ""
        if (rest or _is_within(whole, source)) and (url := storage.url_of(unquote(rest))) is not None:
            urls.append(url)
    if not urls:
        raise ConfigurationError(
            f"no storage is at {rule.source!r}: pass the ObjectStorage with this s3:// URL in storages= (for Google "
            "Cloud Storage, use its S3 endpoint)"
        )
    if len({urlsplit(url)[:2] for url in urls}) > 1:
        raise ConfigurationError(
            f"{rule.source!r} is at more than one endpoint, {', '.join(urls)}: write one rule for each of these URLs"
        )
    return [Rule(url, rule.target) for url in dict.fromkeys(urls)]


def _check_directories(rule: Rule, title: str) -> None:
    absolute = rule.source.startswith("/") and rule.target.startswith("/")
    if not absolute or {".", ".."} & {*rule.target.split("/")} or not _is_text(rule.target):
        raise ConfigurationError(
            f"{title} sends local files: a rule from {rule.source!r} to {rule.target!r} needs an absolute "
            "directory on both sides"
        )


def _is_within(inner: str, outer: str) -> bool:
    return f"{inner}/".startswith(f"{outer}/")


def _request_target(url: str) -> str | None:
    """Return the path and query of a URL, or None if a proxy might request another path than this one."""
    host = url.find("/") + 2
    target = url[url.find("/", host) :]
    if not _REQUEST_TARGET.fullmatch(target):
        return None
    encoded = target.partition("?")[0]
    path = unquote_to_bytes(encoded)
    if path.count(b"/") != encoded.count("/") or {b".", b".."} & {*path.split(b"/")} or min(path) < 0x20:
        return None
    return target


def _is_text(value: str) -> bool:
    return all(" " <= character != "\x7f" for character in value)
