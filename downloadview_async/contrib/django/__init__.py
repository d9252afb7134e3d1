"""Django on ASGI and WSGI: views, files, responses and middlewares, with the names of django-downloadview.

The middlewares and decorators for a single proxy are in `nginx`, `apache` and `lighttpd`.
"""

from downloadview_async.contrib.django import legacy as _legacy  # noqa: F401 - its import paths
from downloadview_async.contrib.django.accounts import AccountsMiddleware, download_finished
from downloadview_async.contrib.django.adapters import async_file_of
from downloadview_async.contrib.django.asgi import get_asgi_application
from downloadview_async.contrib.django.decorators import _signature_is_valid, signature_required
from downloadview_async.contrib.django.disposition import content_disposition
from downloadview_async.contrib.django.files import (
    FileNotFound,
    HTTPFile,
    PathFile,
    StorageFile,
    VirtualFile,
)
from downloadview_async.contrib.django.io import BytesIteratorIO, TextIteratorIO
from downloadview_async.contrib.django.limits import LimitsMiddleware
from downloadview_async.contrib.django.links import arevoke_link, link_signer, revoke_link, sign_url
from downloadview_async.contrib.django.middleware import (
    BaseDownloadMiddleware,
    DownloadDispatcherMiddleware,
    DownloadMiddleware,
    SmartDownloadMiddleware,
)
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.contrib.django.storage import SignedFileSystemStorage, SignedURLMixin
from downloadview_async.contrib.django.testing import assert_download_response, setup_view, temporary_media_root
from downloadview_async.contrib.django.views import (
    BaseDownloadView,
    DownloadMixin,
    HTTPDownloadView,
    ObjectDownloadView,
    PathDownloadView,
    StorageDownloadView,
    VirtualDownloadView,
    sendfile,
)

StringIteratorIO = TextIteratorIO

__all__ = [
    "AccountsMiddleware",
    "BaseDownloadMiddleware",
    "BaseDownloadView",
    "BytesIteratorIO",
    "DownloadDispatcherMiddleware",
    "DownloadMiddleware",
    "DownloadMixin",
    "DownloadResponse",
    "FileNotFound",
    "HTTPDownloadView",
    "HTTPFile",
    "LimitsMiddleware",
    "ObjectDownloadView",
    "PathDownloadView",
    "PathFile",
    "ProxiedDownloadResponse",
    "SignedFileSystemStorage",
    "SignedURLMixin",
    "SmartDownloadMiddleware",
    "StorageDownloadView",
    "StorageFile",
    "StringIteratorIO",
    "TextIteratorIO",
    "VirtualDownloadView",
    "VirtualFile",
    "_signature_is_valid",
    "arevoke_link",
    "assert_download_response",
    "async_file_of",
    "content_disposition",
    "download_finished",
    "get_asgi_application",
    "link_signer",
    "revoke_link",
    "sendfile",
    "setup_view",
    "sign_url",
    "signature_required",
    "temporary_media_root",
]
