"""`Rule`: what lies below a directory or a URL here is below a target there, for the proxy."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from downloadview_async.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Rule:
    """Files below `source` (an absolute directory, or an http or https URL) are below `target` for the proxy.

    The target is what the proxy's kind wants: an internal URI that begins and ends with a slash for nginx, an
    absolute directory for Apache and lighttpd.
    """

    source: str
    target: str


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

    def match(self, location: str) -> tuple[str, str] | None:
        """Return the target of the rule for `location`, and what of it is below the source; None without a rule."""
        prefix = location
        while slash := prefix.rfind("/") + 1:
            prefix = prefix[: slash - 1]
            if (target := self._targets.get(prefix)) is not None:
                return target, location[slash:]
        return None


def _normalized(source: str) -> str:
    """Return a source without its last slash, so that it is a prefix of whole segments."""
    if "://" in source:
        return source.rstrip("/")
    if not os.path.isabs(source):
        raise ConfigurationError(f"the source of an offload rule is an absolute path or a URL, not {source!r}")
    return os.path.normpath(source).rstrip("/")
