"""Kinds of proxies, stores and CDNs: those of this library, and those that installed packages add by entry points."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from downloadview_async.errors import ConfigurationError


class _Kind(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


Kind = TypeVar("Kind", bound=_Kind)


def with_installed(ours: Iterable[Kind], expected: type[Kind], group: str, noun: str) -> Mapping[str, Kind]:
    """Return kinds by name: ours, then those that the entry points of a group name.

    expected: the class of the kinds. noun: what they are kinds of, for messages.

    Raises `ConfigurationError` for an entry point that cannot be loaded or names another object, for two kinds with the
    same name, and for options with the same name that differ in more than their defaults.
    """
    from importlib.metadata import entry_points  # importing it takes time, and most applications do not need it

    kinds = {kind.name: kind for kind in ours}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        where = f"the entry point {point.name} = {point.value} of {group}"
        try:
            kind = point.load()
        except Exception as exc:  # importing the module may raise anything
            raise ConfigurationError(
                f"{where} cannot be loaded ({type(exc).__name__}: {exc}): correct or uninstall its package"
            ) from exc
        if not isinstance(kind, expected):
            raise ConfigurationError(f"{where} is not a {expected.__name__}: let the entry point name one")
        if kinds.setdefault(kind.name, kind) is not kind:
            raise ConfigurationError(f"{where} is a second {noun} with the name {kind.name!r}: rename it")
    first: dict[str, tuple[Kind, Any]] = {}
    for kind in kinds.values():
        for name, option in kind.options.items():
            other, known = first.setdefault(name, (kind, option))
            if replace(known, default=option.default) != option:
                raise ConfigurationError(
                    f"{kind.title} and {other.title} have different options with the name {name!r}: rename one"
                )
    return MappingProxyType(kinds)
