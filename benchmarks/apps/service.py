"""The service with BENCH_ROUTES routes, each to a source of its own, built as its settings build it."""

import os
from pathlib import Path

from downloadview_async.service.app import build
from downloadview_async.service.origin import Origin
from downloadview_async.service.settings import OffloadSettings, RouteSettings, ServerSettings, Settings
from downloadview_async.service.source_settings import PathSettings

_ROUTES = int(os.environ["BENCH_ROUTES"])
_FILES = os.environ["BENCH_FILES"]
# the one that is asked for comes last
_NAMES = [*(f"tenants/{number}" for number in range(_ROUTES - 1)), "files"]

app = build(
    Settings(
        origin=Origin("the benchmark's settings", Path(_FILES), {}),
        server=ServerSettings(),
        sources={name: PathSettings(root=_FILES) for name in _NAMES},
        routes=[RouteSettings(path=f"/{name}/{{path:path}}", source=name) for name in _NAMES],
        offload=OffloadSettings(),
    )
)
