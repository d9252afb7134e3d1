"""The public import path of `DownloadProtocol` and its constants. The code is in `asgi/uvicorn/`."""

from downloadview_async.asgi.deadline import STALL_SECONDS
from downloadview_async.asgi.kept_answers import KeptAnswers
from downloadview_async.asgi.send_later import SendLater
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
    "KeptAnswers",
    "SendLater",
    "uvicorn_warning",
]
