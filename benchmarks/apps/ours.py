"""This library: one route, one directory, and a proxy with BENCH_RULES rules where that is set.

The same route is public, for signed links, or behind a function that allows every request.
"""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import Route

from benchmarks.apps.bare import INTERNAL
from benchmarks.running import SIGNER
from downloadview_async import Download, OffloadMiddleware, PathSource, Rule, SignedLinks, XAccelRedirect

FILES = os.environ["BENCH_FILES"]


def _offload(rules: int) -> Middleware:
    others = [Rule(f"/srv/tenants/{number}", f"/_tenants/{number}/") for number in range(rules - 1)]
    return Middleware(OffloadMiddleware, backend=XAccelRedirect([*others, Rule(FILES, INTERNAL)]))


app = Starlette(
    routes=[Route("/files/{path:path}", Download(PathSource(FILES)))],
    middleware=[_offload(int(os.environ["BENCH_RULES"]))] if "BENCH_RULES" in os.environ else [],
)


async def _allowed(request: Request, name: str) -> bool:
    return True


signed = Starlette(routes=[Route("/files/{path:path}", Download(PathSource(FILES), access=SignedLinks(SIGNER)))])
hooked = Starlette(routes=[Route("/files/{path:path}", Download(PathSource(FILES), access=_allowed))])
