"""The formats of links: one class for each module of this package."""

from collections.abc import Mapping
from types import MappingProxyType

from downloadview_async.policy.formats.base import LinkFormat
from downloadview_async.policy.formats.complete import CompleteLinks
from downloadview_async.policy.formats.secure_link import SecureLinks

LINK_FORMATS: Mapping[str, type[LinkFormat]] = MappingProxyType({"complete": CompleteLinks, "secure_link": SecureLinks})
"""The formats by the names that `URLSigner.sign` takes."""
