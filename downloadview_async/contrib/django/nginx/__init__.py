"""nginx: X-Accel-Redirect, for all views by the settings, or for a single view by a decorator."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import import_module
from math import ceil
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.utils.encoding import iri_to_uri
from django.utils.timezone import is_naive, make_aware, now

from downloadview_async.contrib.django.middleware import DownloadDecorator, ProxiedDownloadMiddleware, View
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.contrib.django.testing import assert_x_accel_redirect
from downloadview_async.offload.proxies.nginx import NGINX_RATE

__all__ = [
    "SingleXAccelRedirectMiddleware",
    "XAccelRedirectMiddleware",
    "XAccelRedirectResponse",
    "assert_x_accel_redirect",
    "x_accel_redirect",
]

_CHARSET = re.compile(r'charset="?([A-Za-z0-9_.:-]+)', re.IGNORECASE)

Expires = datetime | float | None
"""When nginx's cache drops the answer: a time, or a number of seconds from now. 0 or False: "off", no such limit."""


class XAccelRedirectResponse(ProxiedDownloadResponse):
    """Has nginx send the file at `redirect_url`, the percent-encoded URI of an internal location.

    basename: the name under which the client saves the file. Default: the last segment of the URI. attachment: whether
    the client saves the file. expires: see `Expires`; a time without a zone is in the project's time zone.
    with_buffering: whether nginx buffers. limit_rate: bytes per second, 0 or False for no limit. None leaves these
    three to nginx's configuration. headers: further headers.

    Raises `ValueError` for an option that nginx would refuse.
    """

    rate_header = NGINX_RATE

    def __init__(
        self,
        redirect_url: str,
        content_type: str,
        basename: str | None = None,
        expires: Expires = None,
        with_buffering: bool | None = None,
        limit_rate: int | None = None,
        attachment: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        further = {name: value for name, value in (headers or {}).items() if name.lower() != "content-type"}
        super().__init__(content_type=content_type, headers=further)
        orders = _orders(redirect_url, content_type, expires, with_buffering, limit_rate)
        self._present(orders, basename or redirect_url.partition("?")[0].rpartition("/")[2], attachment)


def _orders(
    redirect_url: str, content_type: str, expires: Expires, with_buffering: bool | None, limit_rate: int | None
) -> dict[str, str]:
    """Return the headers that nginx obeys. Raises `ValueError` for an option that it would refuse."""
    orders = {"X-Accel-Redirect": iri_to_uri(redirect_url)}
    if charset := _CHARSET.search(content_type):
        orders["X-Accel-Charset"] = charset[1]
    if with_buffering is not None:
        orders["X-Accel-Buffering"] = "yes" if with_buffering else "no"
    if expires is not None:
        orders["X-Accel-Expires"] = _expires(expires)
    if limit_rate is not None:
        orders["X-Accel-Limit-Rate"] = _limit_rate(limit_rate)
    return orders


def _expires(expires: datetime | float) -> str:
    if isinstance(expires, datetime):
        aware = make_aware(expires) if is_naive(expires) else expires
        present = now()
        present = make_aware(present) if is_naive(present) else present
        return str(max(0, ceil((aware - present).total_seconds())))
    if not expires:
        return "off"
    if isinstance(expires, bool) or not isinstance(expires, int | float) or expires < 0:
        raise ValueError(f"expires has to be a datetime, a number of seconds or False, not {expires!r}")
    return str(ceil(expires))


def _limit_rate(limit_rate: int) -> str:
    if not limit_rate:
        return "0"  # nginx does not know "off"
    if isinstance(limit_rate, bool) or not isinstance(limit_rate, int) or limit_rate < 0:
        raise ValueError(f"limit_rate has to be a number of bytes per second or False, not {limit_rate!r}")
    return str(limit_rate)


class XAccelRedirectMiddleware(ProxiedDownloadMiddleware):
    """Has nginx send the files that its rule covers.

    source_dir, source_url: these files, see `ProxiedDownloadMiddleware`. destination_url: the URI of their internal
    location. expires, with_buffering, limit_rate: see `XAccelRedirectResponse`. media_root and media_url are deprecated
    names of source_dir and destination_url.

    Raises `ImproperlyConfigured`.
    """

    response_class = XAccelRedirectResponse

    def __init__(
        self,
        get_response: Callable[[HttpRequest], Any] | None = None,
        source_dir: str | os.PathLike[str] | None = None,
        source_url: str | None = None,
        destination_url: str | None = None,
        expires: Expires = None,
        with_buffering: bool | None = None,
        limit_rate: int | None = None,
        media_root: str | os.PathLike[str] | None = None,
        media_url: str | None = None,
    ) -> None:
        for old, value, new in (("media_url", media_url, "destination_url"), ("media_root", media_root, "source_dir")):
            if value is not None:
                warnings.warn(
                    f"{type(self).__name__}: {old} is deprecated, use {new}", DeprecationWarning, stacklevel=2
                )
        super().__init__(
            get_response,
            media_root if source_dir is None else source_dir,
            source_url,
            media_url if destination_url is None else destination_url,
        )
        try:
            _expires(expires or 0)
            _limit_rate(limit_rate or 0)
        except ValueError as exc:
            raise ImproperlyConfigured(str(exc)) from exc
        self.expires = expires
        self.with_buffering = with_buffering
        self.limit_rate = limit_rate

    def orders(self, response: Any, redirect_url: str, content_type: str) -> Mapping[str, str]:
        """Return X-Accel-Redirect and the options."""
        expires = getattr(response, "expires", None) if self.expires is None else self.expires
        return _orders(redirect_url, content_type, expires, self.with_buffering, self.limit_rate)


class SingleXAccelRedirectMiddleware(XAccelRedirectMiddleware):
    """Has nginx send files by the deprecated settings NGINX_DOWNLOAD_MIDDLEWARE_*: use `SmartDownloadMiddleware`."""

    def __init__(self, get_response: Callable[[HttpRequest], Any] | None = None) -> None:
        # Not at the top: importing it warns of settings, and binds the name `settings` in this package.
        configured = import_module("downloadview_async.contrib.django.nginx.settings").options()
        if configured["destination_url"] is None:
            raise ImproperlyConfigured(
                f"{type(self).__name__} needs settings.NGINX_DOWNLOAD_MIDDLEWARE_DESTINATION_URL; better, use "
                "SmartDownloadMiddleware with settings.DOWNLOADVIEW"
            )
        super().__init__(get_response, **configured)


def x_accel_redirect(view_func: View, *args: Any, **kwargs: Any) -> View:
    """Return a view whose files nginx sends. The other arguments are those of `XAccelRedirectMiddleware`."""
    return DownloadDecorator(XAccelRedirectMiddleware)(view_func, *args, **kwargs)
