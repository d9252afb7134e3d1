"""Signed links: storages that sign their URLs, and `signature_required`, which refuses URLs without a signature."""

from functools import wraps
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.core.files.storage import FileSystemStorage
from django.core.signing import BadSignature, SignatureExpired, TimestampSigner
from django.http import HttpRequest

from downloadview_async.contrib.django.dual import like
from downloadview_async.contrib.django.middleware import View

PARAMETER = "X-Signature"
"""The query parameter with the signature."""

SALT = "downloadview_async.contrib.django.links"
"""The salt of links: no other token that the project signs by the same key is accepted as a link."""


class SignedURLMixin:
    """Signs the URLs of any storage, for a view with `signature_required` at the same path.

    `settings.SECRET_KEY` signs the path of the URL and the time, with a salt that only links have.
    """

    def url(self, name: str | None, *args: Any, **kwargs: Any) -> str:
        """Return the URL of the storage, with a signature in its query."""
        url = str(super().url(name, *args, **kwargs))  # type: ignore[misc]
        signature = quote(TimestampSigner(salt=SALT).sign(urlsplit(url).path), safe="")
        url, hash_, fragment = url.partition("#")
        return f"{url}{'&' if '?' in url else '?'}{PARAMETER}={signature}{hash_}{fragment}"


class SignedFileSystemStorage(SignedURLMixin, FileSystemStorage):
    """Files on the local disk, with signed URLs."""


def signature_required(function: View) -> View:
    """Return a view that answers only the URLs that a signed storage has made. It raises `PermissionDenied` for others.

    `settings.DOWNLOADVIEW_URL_EXPIRATION`, seconds or a timedelta, is how long a URL is valid. Default: for ever.
    With `settings.DOWNLOADVIEW_UNSALTED_LINKS = True`, links that django-downloadview has made are valid too. They have
    no salt, so any other value that the project signs by a plain `TimestampSigner` is valid as well.
    """

    @wraps(function)
    def decorated(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        _signature_is_valid(request)
        return function(request, *args, **kwargs)

    return cast("View", like(function, decorated))


def _signature_is_valid(request: HttpRequest) -> None:
    """Check the signature of a request's path in its query. Raises `PermissionDenied` if it is missing or invalid."""
    try:
        # the signed path is percent-encoded as in the URL, request.path is decoded
        path = unquote(_unsigned(request.GET.get(PARAMETER) or ""), errors="strict")
    except SignatureExpired as exc:
        raise PermissionDenied("the signature has expired") from exc
    except (BadSignature, ValueError) as exc:
        raise PermissionDenied("there is no valid signature") from exc
    if path != request.path:
        raise PermissionDenied("the signature is of another path")


def _unsigned(signed: str) -> str:
    expiration = getattr(settings, "DOWNLOADVIEW_URL_EXPIRATION", None)
    try:
        return TimestampSigner(salt=SALT).unsign(signed, max_age=expiration)
    except SignatureExpired:
        raise
    except BadSignature:
        if getattr(settings, "DOWNLOADVIEW_UNSALTED_LINKS", False) is not True:
            raise
    return TimestampSigner().unsign(signed, max_age=expiration)
