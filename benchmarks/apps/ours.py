"""This library: one route, one directory, and a proxy with BENCH_RULES rules where that is set."""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from benchmarks.apps.bare import INTERNAL
from downloadview_async import Download, OffloadMiddleware, PathSource, Rule, XAccelRedirect

FILES = os.environ["BENCH_FILES"]


def _offload(rules: int) -> Middleware:
    others = [Rule(f"/srv/tenants/{number}", f"/_tenants/{number}/") for number in range(rules - 1)]
    return Middleware(OffloadMiddleware, backend=XAccelRedirect([*others, Rule(FILES, INTERNAL)]))


app = Starlette(
    routes=[Route("/files/{path:path}", Download(PathSource(FILES)))],
    middleware=[_offload(int(os.environ["BENCH_RULES"]))] if "BENCH_RULES" in os.environ else [],
)
