"""The formats of links: one class for each module of this package."""

from collections.abc import Mapping
from types import MappingProxyType

from downloadview_async.policy.formats.base import LinkFormat
from downloadview_async.policy.formats.complete import CompleteLinks
from downloadview_async.policy.formats.secure_link import SecureLinks

_FORMATS: dict[str, type[LinkFormat]] = {"complete": CompleteLinks, "secure_link": SecureLinks}


def link_formats() -> Mapping[str, type[LinkFormat]]:
    """Return the formats of links by the names that `URLSigner.sign` takes; the first is the default."""
    return MappingProxyType(_FORMATS)
