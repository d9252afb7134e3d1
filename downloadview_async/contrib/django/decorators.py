"""`signature_required`: refuses the requests to a view that have no link. Its old path has `DownloadDecorator`, too."""

from collections.abc import Awaitable
from functools import wraps
from inspect import isawaitable
from typing import Any, cast

from asgiref.sync import iscoroutinefunction
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from downloadview_async.contrib.django.dual import DualView, has_running_loop, like
from downloadview_async.contrib.django.file_errors import answer_to
from downloadview_async.contrib.django.links import averify, link_of, verify
from downloadview_async.contrib.django.middleware import DownloadDecorator, View
from downloadview_async.contrib.django.responses import is_due
from downloadview_async.errors import FileError

__all__ = ["DownloadDecorator", "signature_required"]


def signature_required(function: View) -> View:
    """Return a view that answers only links of `sign_url` and of signed storages, and GET and HEAD alone.

    A `DownloadResponse` presents the file as the link says, and counts the download of a link with `uses`. For a link
    that is invalid or revoked, the view raises `PermissionDenied`. A link that has expired or is used up gets 410, and
    503 if the store of `settings.DOWNLOADVIEW_LINKS` does not answer.

    `settings.DOWNLOADVIEW_URL_EXPIRATION`, seconds or a timedelta, is how long a link is valid at most, and by default.
    Without it, links are valid for ever.

    Links that an earlier version has made are valid, too. With `settings.DOWNLOADVIEW_UNSALTED_LINKS = True`, so are
    those that django-downloadview has made. They have no salt, so any other value that the project signs by a plain
    `TimestampSigner` is valid as well.
    """

    @wraps(function)
    def decorated(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if iscoroutinefunction(function) or (isinstance(function, DualView) and has_running_loop()):
            return on_loop(request, *args, **kwargs)
        try:
            verify(request)
        except FileError as exc:
            return answer_to(exc, request)
        return _kept(function(request, *args, **kwargs), request)

    async def on_loop(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            await averify(request)
        except FileError as exc:
            return answer_to(exc, request)
        return await _akept(function(request, *args, **kwargs), request)

    return cast("View", like(function, decorated))


def _signature_is_valid(request: HttpRequest) -> None:
    """Check the link of a request. Raises `PermissionDenied` if it is missing, invalid or has expired."""
    try:
        verify(request)
    except FileError as exc:
        raise PermissionDenied from exc


def _kept(response: Any, request: HttpRequest) -> Any:
    """Return the response of a view, finished: Django's own handler would send all of an unfinished one."""
    if isawaitable(response):
        return _akept(response, request)
    if is_due(response, request) and not has_running_loop():
        response = response.finish(request)
    return _uncached(response, request)


async def _akept(pending: Awaitable[Any], request: HttpRequest) -> Any:
    response = await pending
    if is_due(response, request):
        response = await response.afinish(request)
    return _uncached(response, request)


def _uncached(response: Any, request: HttpRequest) -> Any:
    """Return a response that no shared cache keeps, unless the link or the view allows that."""
    link = link_of(request)
    if link is not None and isinstance(response, HttpResponseBase) and response.status_code < 400:
        response.setdefault("Cache-Control", link.cache_control(None))
    return response
