"""Apache: X-Sendfile, for all views by the settings, or for a single view by a decorator."""

from typing import Any

from downloadview_async.contrib.django.middleware import DownloadDecorator, View
from downloadview_async.contrib.django.testing import assert_x_sendfile
from downloadview_async.contrib.django.xsendfile import BaseXSendfileMiddleware, BaseXSendfileResponse

__all__ = ["XSendfileMiddleware", "XSendfileResponse", "assert_x_sendfile", "x_sendfile"]


class XSendfileResponse(BaseXSendfileResponse):
    """Has Apache send the file at an absolute path, see `BaseXSendfileResponse`."""

    encoding = "raw"


class XSendfileMiddleware(BaseXSendfileMiddleware):
    """Has Apache send the files that its rule covers, see `BaseXSendfileMiddleware`."""

    response_class = XSendfileResponse


def x_sendfile(view_func: View, *args: Any, **kwargs: Any) -> View:
    """Return a view whose files Apache sends. The other arguments are those of `XSendfileMiddleware`."""
    return DownloadDecorator(XSendfileMiddleware)(view_func, *args, **kwargs)
