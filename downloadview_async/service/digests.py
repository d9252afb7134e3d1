"""The digests of the files of routes, as the settings give them."""

from collections.abc import Mapping

from downloadview_async import Digests, DigestStore, Source
from downloadview_async.service.settings import Settings, digests_mode, source_of_files


def digests_of(settings: Settings, sources: Mapping[str, Source]) -> dict[str, Digests]:
    """Return the digests of each source of a route that has them. Raises `ConfigurationError`."""
    store = None
    if settings.digests is not None:
        with settings.blaming("digests.store"):
            store = DigestStore(settings.digests.store)
    digests: dict[str, Digests] = {}
    for route in settings.routes:
        _, files = source_of_files(route.source, settings.sources)
        if (mode := digests_mode(files)) != "off":
            digests[route.source] = digests.get(route.source) or Digests(
                sources[route.source],
                store,
                name=route.source,
                sidecars=getattr(files, "sidecars", False),
                background=mode == "background",
            )
    return digests
