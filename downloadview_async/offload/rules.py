"""`Rule`: what lies below a directory or a URL here is below a target there, for the proxy."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from downloadview_async.errors import ConfigurationError

# What a proxy would resolve to another file, trim, or refuse: a control character, an empty segment or one of dots.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f]|(?:^|/)\.{0,2}(?:/|$)")

LONGEST = 3_900
"""Bytes of a local path, with its directory counted twice, that a proxy is asked to send.

PATH_MAX is 4,096. Apache adds the directory to the path before it compares, and a proxy may know the directory by a
longer name than we do. The application itself opens paths relative to the root, and sends what is longer.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """Files below `source` (an absolute directory, or an http or https URL) are below `target` for the proxy.

    The target is what the proxy's kind wants: an internal URI that begins and ends with a slash for nginx, an
    absolute directory for Apache and lighttpd. For files below a URL it is where the proxy fetches them.
    """

    source: str
    target: str

    def __post_init__(self) -> None:
        for name in ("source", "target"):  # a Path is what many have at hand
            object.__setattr__(self, name, os.fsdecode(getattr(self, name)))


def checked_rules(rules: Iterable[Rule]) -> list[Rule]:
    """Return the rules as a list. Raises `ConfigurationError` for anything that is not an iterable of rules."""
    listed: list[object] = list(rules) if isinstance(rules, Iterable) else [None]
    if not all(isinstance(rule, Rule) for rule in listed):
        raise ConfigurationError(
            f"an offload backend takes a list of rules, such as [Rule('/srv/files', '/_files/')], not {rules!r}"
        )
    return [rule for rule in listed if isinstance(rule, Rule)]


class RuleTable:
    """Rules, looked up by whole path segments; the longest source wins, whatever the number of rules.

    Raises `ConfigurationError` for two rules with one source, and for a source that is neither an absolute path nor a
    URL.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._targets: dict[str, str] = {}
        for rule in rules:
            source = _normalized(rule.source)
            if source in self._targets:
                raise ConfigurationError(f"two offload rules have the source {rule.source!r}: remove one")
            self._targets[source] = rule.target
        if not self._targets:
            raise ConfigurationError("an offload backend without a rule offloads nothing: add one, or no backend")

    def __iter__(self) -> Iterator[str]:
        """Yield the sources, without their last slashes."""
        return iter(self._targets)

    def match(self, location: str) -> tuple[str, str] | None:
        """Return the target of the rule for `location`, and what of it is below the source.

        None without a rule, and for a location that is below its source by spelling alone: one with a segment that is
        empty, `.` or `..`, or with a control character. None as well for a local path that a proxy may find too long
        to open: see `LONGEST`.
        """
        prefix = location
        while slash := prefix.rfind("/") + 1:
            prefix = prefix[: slash - 1]
            if (target := self._targets.get(prefix)) is not None:
                rest = location[slash:]
                too_long = location.startswith("/") and _bytes_with(prefix, target, rest) > LONGEST
                return None if too_long or _AMBIGUOUS.search(rest) else (target, rest)
        return None


def _bytes_with(source: str, target: str, rest: str) -> int:
    return 2 * max(len(os.fsencode(source)), len(os.fsencode(target))) + len(os.fsencode(rest))


def _normalized(source: str) -> str:
    """Return a source without its last slash, so that it is a prefix of whole segments."""
    if os.path.isabs(source):
        return f"/{os.path.normpath(source).strip('/')}".rstrip("/")
    parts = urlsplit(source)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(
            f"the source of an offload rule is an absolute directory, or an http or https URL, not {source!r}"
        )
    return source.rstrip("/")
