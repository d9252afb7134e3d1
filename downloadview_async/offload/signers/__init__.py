"""The registry of stores and CDNs: a `SignerKind` for each module of this package, and those of installed packages."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.signers.base import Signer, SignerKind

GROUP = "downloadview_async.signers"
"""The group of entry points by which a package adds a `SignerKind` to the service and its workers."""


@cache
def signer_kinds() -> Mapping[str, SignerKind]:
    """Return the kinds of stores and CDNs by name: those of this package, then those of installed packages.

    A module of this package has its kind under the name `KIND`. A package adds a kind by an entry point of the group
    `downloadview_async.signers` that names it.

    Raises `ConfigurationError` for an entry point that cannot be loaded or names another object, for two kinds with the
    same name, and for different options with the same name.
    """
    from importlib.metadata import entry_points  # importing it takes time, and most applications do not need it

    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    kinds = {kind.name: kind for module in modules if (kind := getattr(module, "KIND", None)) is not None}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        where = f"the entry point {point.name} = {point.value} of {GROUP}"
        try:
            kind = point.load()
        except Exception as exc:  # importing the module may raise anything
            raise ConfigurationError(
                f"{where} cannot be loaded ({type(exc).__name__}: {exc}): correct or uninstall its package"
            ) from exc
        if not isinstance(kind, SignerKind):
            raise ConfigurationError(f"{where} is not a SignerKind: let the entry point name one")
        if kinds.setdefault(kind.name, kind) is not kind:
            raise ConfigurationError(f"{where} is a second signer with the name {kind.name!r}: rename it")
    first: dict[str, tuple[SignerKind, Any]] = {}
    for kind in kinds.values():
        for name, option in kind.options.items():
            other, known = first.setdefault(name, (kind, option))
            if known != option:
                raise ConfigurationError(
                    f"{kind.title} and {other.title} have different options with the name {name!r}: rename one"
                )
    return MappingProxyType(kinds)


def signer_of(kind: str, url: str, **options: Any) -> Signer:
    """Return a signer for the files below the URL of a store or CDN: `signer_of("bunny", "https://...", secret=...)`.

    kind: a name in `signer_kinds()`. url: names of files are appended to it. options: those of the kind, see
    docs/howto/edge.md.

    Raises `ConfigurationError`.
    """
    kinds = signer_kinds()
    if kind not in kinds:
        raise ConfigurationError(f"{kind!r} is not a kind of store or CDN: use one of {', '.join(kinds)}")
    return kinds[kind].make(url, **options)
