"""`uvicorn app.main:app`: the service for DOWNLOADVIEW_CONFIG, by default `downloadview.toml` in this directory."""

import os
import sys
from pathlib import Path

from starlette.applications import Starlette

from app import demo
from downloadview_async import ConfigurationError
from downloadview_async.service.app import app_from_environment
from downloadview_async.service.config_loader import CONFIG
from downloadview_async.service.logs import one_line

_STARTUP_FAILURE = 3  # the exit status of uvicorn: it does not restart a worker that ends with it


def _application() -> Starlette:
    try:
        if not os.environ.get(CONFIG):
            demo.make()
        return app_from_environment(Path(__file__).with_name("downloadview.toml"))
    except ConfigurationError as exc:
        print(f"downloadview: {one_line(str(exc))}", file=sys.stderr)
        sys.exit(_STARTUP_FAILURE)


app = _application()
