"""The lines that the service logs at its start: each route, where its files are, and the server that sends them."""

from collections.abc import Iterator

from downloadview_async import proxy_kinds
from downloadview_async.service.settings import RouteSettings, Settings
from downloadview_async.service.source_settings import edge_of, overlap, places_of, source_of_files


def served(settings: Settings) -> Iterator[str]:
    """Yield a line for each route, and one about the proxy that sends files, if there is one."""
    proxy = None if settings.offload.backend is None else proxy_kinds()[settings.offload.backend].title
    senders = [_sender(route, settings, proxy) for route in settings.routes]
    for route, sender in zip(settings.routes, senders, strict=True):
        place = next(iter(places_of(source_of_files(route.source, settings.sources)[1])), None)
        where = f"the source {route.source}" if place is None else place
        yield f"{settings.server.root_path}{route.path}: files of {where}, sent by {sender}"
    if proxy is not None and proxy in senders:
        yield f"{proxy} sends files: open its address, and not this one, where such an answer has no body"


def _sender(route: RouteSettings, settings: Settings, proxy: str | None) -> str:
    source = source_of_files(route.source, settings.sources)[1]
    if route.send == "redirect":
        edge = edge_of(source)
        return f"{'the store' if edge is None else edge.url}, to which clients are redirected"
    has_rule = any(overlap(place, rule.source) for place in places_of(source) for rule in settings.offload.rules)
    return "this service" if proxy is None or not has_rule or route.send == "stream" else proxy
