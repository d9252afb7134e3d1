"""lighttpd: X-Sendfile, for all views by the settings, or for a single view by a decorator."""

from typing import Any

from downloadview_async.contrib.django.middleware import DownloadDecorator, View
from downloadview_async.contrib.django.testing import assert_percent_encoded_x_sendfile as assert_x_sendfile
from downloadview_async.contrib.django.xsendfile import BaseXSendfileMiddleware, BaseXSendfileResponse
from downloadview_async.offload.proxies.apache import LIGHTTPD_RATE

__all__ = ["XSendfileMiddleware", "XSendfileResponse", "assert_x_sendfile", "x_sendfile"]


class XSendfileResponse(BaseXSendfileResponse):
    """Has lighttpd send the file at an absolute path, see `BaseXSendfileResponse`."""

    encoding = "percent"
    rate_header = LIGHTTPD_RATE


class XSendfileMiddleware(BaseXSendfileMiddleware):
    """Has lighttpd send the files that its rule covers, see `BaseXSendfileMiddleware`."""

    response_class = XSendfileResponse


def x_sendfile(view_func: View, *args: Any, **kwargs: Any) -> View:
    """Return a view whose files lighttpd sends. The other arguments are those of `XSendfileMiddleware`."""
    return DownloadDecorator(XSendfileMiddleware)(view_func, *args, **kwargs)
