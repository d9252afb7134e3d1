"""The registry of stores and CDNs: a `SignerKind` for each module of this package, and those of installed packages."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.installed import with_installed
from downloadview_async.offload.signers.base import Signer, SignerKind

GROUP = "downloadview_async.signers"
"""The group of entry points by which a package adds a `SignerKind` to the service and its workers."""


@cache
def signer_kinds() -> Mapping[str, SignerKind]:
    """Return the kinds of stores and CDNs by name: those of this package, then those of installed packages.

    A module of this package has its kind under the name `KIND`. A package adds a kind by an entry point of the group
    `downloadview_async.signers` that names it.

    Raises `ConfigurationError`, see `with_installed`.
    """
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    ours = [module.KIND for module in modules if hasattr(module, "KIND")]
    return with_installed(ours, SignerKind, GROUP, "signer")


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
