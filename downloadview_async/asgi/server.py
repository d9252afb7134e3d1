"""The public import path of `DownloadProtocol` and its constants. The code is in `asgi/uvicorn/`."""

import asyncio
from collections.abc import Callable
from typing import Any

from downloadview_async.asgi.deadline import STALL_SECONDS
from downloadview_async.asgi.uvicorn.cycle import DownloadCycle
from downloadview_async.asgi.uvicorn.internals import KNOWN_UVICORN, uvicorn_warning
from downloadview_async.asgi.uvicorn.protocol import (
    GRACE_SECONDS,
    LINGER_SECONDS,
    MAX_HEAD_BYTES,
    MAX_WAITING_BYTES,
    DownloadProtocol,
)
from downloadview_async.asgi.uvicorn.watchdog import MINIMUM_RATE

__all__ = [
    "GRACE_SECONDS",
    "KNOWN_UVICORN",
    "LINGER_SECONDS",
    "MAX_HEAD_BYTES",
    "MAX_WAITING_BYTES",
    "MINIMUM_RATE",
    "STALL_SECONDS",
    "DownloadCycle",
    "DownloadProtocol",
    "http2_protocols",
    "uvicorn_warning",
]


def http2_protocols(**watch: Any) -> Callable[..., asyncio.Protocol]:
    """Return what serves HTTP/2 by zttp, and HTTP/1.1 by `DownloadProtocol`: for `uvicorn.Config(http=...)`.

    watch: `stall_seconds` and `minimum_rate` of `DownloadProtocol`.

    Raises `ImportError` without zttp, or with a uvicorn older than 0.54.
    """
    from downloadview_async.asgi.uvicorn.http2 import protocols

    return protocols(**watch)
