"""`uvicorn app.main:app`: the service for DOWNLOADVIEW_CONFIG, or else for `downloadview.toml` beside this file."""

import os
import sys
from pathlib import Path

from starlette.applications import Starlette

from app import demo
from downloadview_async import ConfigurationError
from downloadview_async.service.build import build
from downloadview_async.service.load import CONFIG, load_settings

_STARTUP_FAILURE = 3  # uvicorn's own status: it does not start a worker again that ended with this


def _application() -> Starlette:
    config = os.environ.get(CONFIG)
    try:
        if config is None:
            demo.make()
        return build(load_settings(config or Path(__file__).with_name("downloadview.toml"), environ=os.environ))
    except ConfigurationError as exc:
        print(f"downloadview: {exc}", file=sys.stderr)
        sys.exit(_STARTUP_FAILURE)


app = _application()
