"""The backends under their old import path. The code is in `offload/proxies/`, one module for each proxy."""

from downloadview_async.offload.proxies.apache import XSendfile
from downloadview_async.offload.proxies.h2o import XReproxyURL
from downloadview_async.offload.proxies.litespeed import XLiteSpeedLocation
from downloadview_async.offload.proxies.nginx import XAccelRedirect

__all__ = ["XAccelRedirect", "XLiteSpeedLocation", "XReproxyURL", "XSendfile"]
