"""`Rule`: the files below a directory or a URL are below a target for the proxy. `RuleTable` looks rules up."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from downloadview_async.errors import ConfigurationError, wrong_type
from downloadview_async.offload.unmatched import Unmatched

# A proxy would resolve these to another file, trim or refuse them: control characters, empty segments, dot segments.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f]|(?:^|/)\.{0,2}(?:/|$)")

LONGEST = 3_900
"""The longest local path in bytes, its directory counted twice, that a proxy is made to send.

PATH_MAX is 4,096. Apache prepends the directory to the path before it compares, and a proxy may know the directory by a
longer name than we do. Files with longer paths are streamed: the application opens paths relative to the root.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """Files below `source`, an absolute directory or an http or https URL, are below `target` for the proxy.

    The target depends on the proxy. For nginx, Caddy and H2O it is an internal URI that begins and ends with a slash;
    for Apache and lighttpd, an absolute directory. For a URL, it is the internal URI at which the proxy fetches files.
    """

    source: str
    target: str

    def __post_init__(self) -> None:
        for name in ("source", "target"):  # users often pass a Path
            value = getattr(self, name)
            if not isinstance(value, str | bytes | os.PathLike):
                raise wrong_type(f"the {name} of a Rule is text, as in Rule('/srv/files', '/_files/')", value)
            object.__setattr__(self, name, os.fsdecode(value))


def checked_rules(rules: Iterable[Rule]) -> list[Rule]:
    """Return the rules as a list. Raises `ConfigurationError` for anything that is not an iterable of rules."""
    listed: list[object] = list(rules) if isinstance(rules, Iterable) else [None]
    if not all(isinstance(rule, Rule) for rule in listed):
        raise wrong_type("an offload backend takes a list of rules, such as [Rule('/srv/files', '/_files/')]", rules)
    return [rule for rule in listed if isinstance(rule, Rule)]


class RuleTable:
    """Looks rules up by whole path segments. The longest source wins. The time does not depend on the number of rules.

    Raises `ConfigurationError` for two rules with the same source, and for a source that is neither an absolute path
    nor a URL.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._targets: dict[str, str] = {}
        for rule in rules:
            source = _normalized(rule.source)
            if source in self._targets:
                raise ConfigurationError(f"two offload rules have the source {rule.source!r}: remove one")
            self._targets[source] = rule.target
        if not self._targets:
            raise ConfigurationError("an offload backend needs at least one rule: add one, or remove the backend")
        self._unmatched = Unmatched(self._targets)

    def __iter__(self) -> Iterator[str]:
        """Yield the sources, without their last slashes."""
        return iter(self._targets)

    def match(self, location: str) -> tuple[str, str] | None:
        """Return the target of the rule that covers `location`, and the rest of the location below the source.

        Return None if no rule covers it; if the rest has an empty segment, `.`, `..` or a control character, so that
        the spelling does not tell where it leads; and for a local path longer than `LONGEST`.
        """
        prefix = location
        while slash := prefix.rfind("/") + 1:
            prefix = prefix[: slash - 1]
            if (target := self._targets.get(prefix)) is not None:
                rest = location[slash:]
                self._unmatched.end()
                too_long = location.startswith("/") and _bytes_with(prefix, target, rest) > LONGEST
                return None if too_long or _AMBIGUOUS.search(rest) else (target, rest)
        self._unmatched.note(location)
        return None


def _bytes_with(source: str, target: str, rest: str) -> int:
    return 2 * max(len(os.fsencode(source)), len(os.fsencode(target))) + len(os.fsencode(rest))


def _normalized(source: str) -> str:
    """Return a source without its trailing slash, so that it is compared by whole segments."""
    if os.path.isabs(source):
        return f"/{os.path.normpath(source).strip('/')}".rstrip("/")
    parts = urlsplit(source)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(
            f"the source of an offload rule is an absolute directory, or an http or https URL, not {source!r}"
        )
    return source.rstrip("/")
