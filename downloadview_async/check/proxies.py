"""Servers that pass requests on but cannot send files for an application: recognised by their answers."""

import re
from collections.abc import Iterable, Mapping

from downloadview_async.check.http import Answer, ClosedError, NoAnswerError, Peer

PASSING_ON: Mapping[str, tuple[tuple[str, str], ...]] = {
    # its name: headers of its answers, and what their values contain
    "Cloudflare": (("cf-ray", ""), ("server", "cloudflare")),
    "Amazon CloudFront": (("x-amz-cf-id", ""), ("via", r"\(cloudfront\)")),
    "an AWS load balancer": (("server", "awselb"),),
    "Google's load balancer": (("via", r"\b1\.1 google\b"),),
    "Azure Front Door": (("x-azure-ref", ""),),
    "Fastly": (("x-served-by", "^cache-"),),
    "Akamai": (("server", "akamai"), ("x-akamai-request-id", "")),
    "Envoy": (("server", "envoy"), ("x-envoy-upstream-service-time", "")),
    "Varnish": (("x-varnish", ""), ("via", "varnish")),
    "Squid": (("via", r"\bsquid\b"),),
    "Traefik": (("server", "traefik"), ("via", "traefik")),
    "HAProxy": (("server", "haproxy"), ("via", "haproxy")),
    "IIS": (("server", "microsoft-iis"),),
    "the router of Heroku": (("via", "heroku|vegur"),),
    "the proxy of Fly.io": (("fly-request-id", ""),),
    "Vercel": (("x-vercel-id", ""),),
}
"""How servers name themselves that obey no offload header. A CDN may have a proxy behind it that does."""

APPLICATION_SERVERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    name: (("server", rf"^{name}\b"),)
    for name in ("uvicorn", "gunicorn", "hypercorn", "granian", "daphne", "nonecorn", "anycorn", "wsgiserver")
}

_LONG = 20_000  # bytes of a header that HAProxy refuses with its own page: its buffer has 16 KiB
_UNKNOWN = "downloadview-check.invalid"


def named_by(answer: Answer, servers: Mapping[str, Iterable[tuple[str, str]]]) -> list[str]:
    """Return the names of the servers that the headers of an answer name."""
    return [
        name
        for name, signs in servers.items()
        if any((value := answer.get(header)) is not None and re.search(sign, value.lower()) for header, sign in signs)
    ]


async def named_by_errors(peer: Peer) -> list[str]:
    """Return the name of a proxy that adds no header to answers, by its error pages.

    HAProxy refuses a long header with its own page. Traefik answers a Host that it does not know as each server does
    that is written in Go.
    """
    page = await _page(peer, {"X-Downloadview-Check": "a" * _LONG})
    if page is not None and page.status == 400 and b"Your browser sent an invalid request." in page.body:
        return ["HAProxy"]
    page = await _page(peer, {"Host": _UNKNOWN})
    if page is not None and page.status == 404 and page.body == b"404 page not found\n":
        return ["Traefik"]
    return []


async def _page(peer: Peer, headers: Mapping[str, str]) -> Answer | None:
    try:
        return await peer.ask("/", headers=headers, root=True)
    except (ClosedError, NoAnswerError):
        return None
