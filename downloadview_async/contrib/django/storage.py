"""Storages that sign their URLs, for views with `signature_required`."""

from typing import Any

from django.core.files.storage import FileSystemStorage

from downloadview_async.contrib.django.decorators import signature_required
from downloadview_async.contrib.django.links import PARAMETER, SALT, sign_url

__all__ = ["PARAMETER", "SALT", "SignedFileSystemStorage", "SignedURLMixin", "signature_required"]


class SignedURLMixin:
    """Signs the URLs of any storage, for a view with `signature_required` at the same path."""

    def url(self, name: str | None, *args: Any, **kwargs: Any) -> str:
        """Return the URL of the storage, with a signature in its query."""
        return sign_url(str(super().url(name, *args, **kwargs)))  # type: ignore[misc]

    def signed_url(self, name: str | None, **options: Any) -> str:
        """Return a link that says more than that of `url`: options are those of `sign_url`."""
        return sign_url(str(super().url(name)), **options)  # type: ignore[misc]


class SignedFileSystemStorage(SignedURLMixin, FileSystemStorage):
    """Files on the local disk, with signed URLs."""
