"""The URLs of the served project: the files of SERVED_ROOT, as every kind of download."""

import io
import os
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from django.core.exceptions import PermissionDenied
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, InMemoryStorage, Storage
from django.http import Http404, HttpRequest, JsonResponse
from django.urls import path
from django.utils.timezone import get_default_timezone

from downloadview_async.contrib.django import (
    BytesIteratorIO,
    DownloadResponse,
    HTTPDownloadView,
    ObjectDownloadView,
    PathDownloadView,
    StorageDownloadView,
    StorageFile,
    VirtualDownloadView,
    VirtualFile,
    signature_required,
)
from downloadview_async.contrib.django.nginx import x_accel_redirect
from tests.contrib.django.documents.models import Document
from tests.contrib.django.served_app import KINDS

ROOT = Path(os.environ["SERVED_ROOT"])
PORT = os.environ["SERVED_PORT"]
IN_MEMORY = 1 << 20  # bytes that a file has at most that is kept in memory


class AgedInMemoryStorage(InMemoryStorage):
    """As old as the files on the disk are."""

    def get_modified_time(self, name: str) -> datetime:
        """Return the time of the file on the disk."""
        return datetime.fromtimestamp((ROOT / name).stat().st_mtime, get_default_timezone())


class Custom(Storage):
    """What storages of object stores look like: nothing but a file object with `seek` and `read`."""

    def _open(self, name: str, mode: str = "rb") -> Any:
        return _Reader((ROOT / name).open("rb"))

    def get_modified_time(self, name: str) -> datetime:
        """Return the time of the file on the disk."""
        return datetime.fromtimestamp((ROOT / name).stat().st_mtime, get_default_timezone())


class _Reader:
    """Reads, and is nothing that this library knows."""

    def __init__(self, file: Any) -> None:
        self.seek, self.read, self.close = file.seek, file.read, file.close


class Blocking(PathDownloadView):
    """A view as written for django-downloadview: all of it is called in a thread."""

    def get_path(self) -> Any:
        """Return the path beneath the root."""
        return super().get_path()


class ByAsyncObject(ObjectDownloadView):
    """A view whose object comes by an asynchronous query."""

    async def aget_object(self) -> Any:
        """Return the document."""
        try:
            return await Document.objects.aget(name=self.kwargs["path"])
        except Document.DoesNotExist as exc:
            raise Http404 from exc


class Remote(HTTPDownloadView):
    """The same files, fetched from this very server."""

    allow_hosts = ["127.0.0.1"]

    def get_url(self) -> str:
        """Return the URL of the file."""
        return f"http://127.0.0.1:{PORT}/path/{self.kwargs['path']}"


class Made(VirtualDownloadView):
    """A file object in memory."""

    def get_file(self) -> Any:
        """Return the content."""
        name = self.kwargs["path"]
        return VirtualFile(io.BytesIO(_found(name).read_bytes()), name=name)


class Generated(VirtualDownloadView):
    """Content that is made while it is sent."""

    def get_file(self) -> Any:
        """Return the content."""
        name = self.kwargs["path"]
        return VirtualFile(BytesIteratorIO(_blocks(_found(name))), name=name)


def _found(name: str) -> Path:
    if not (ROOT / name).is_file():
        raise Http404
    return ROOT / name


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            yield block


def _filled(storage: InMemoryStorage) -> InMemoryStorage:
    for file in ROOT.iterdir():
        if file.stat().st_size <= IN_MEMORY:
            storage.save(file.name, ContentFile(file.read_bytes()))
    return storage


def _views(**options: Any) -> dict[str, Any]:
    plain = PathDownloadView.as_view(root=ROOT, **options)

    async def function(request: HttpRequest, path: str) -> Any:
        return await plain(request, path=path)

    def blocking_function(request: HttpRequest, path: str) -> Any:
        return plain(request, path=path)

    by_name = {"model": Document, "slug_field": "name", "slug_url_kwarg": "path"}
    views = {
        "path": plain,
        "blocking": Blocking.as_view(root=ROOT, **options),
        "function": function,
        "blocking-function": blocking_function,
        "object": ObjectDownloadView.as_view(**by_name, **options),
        "async-object": ByAsyncObject.as_view(**options),
        "storage": StorageDownloadView.as_view(storage=FileSystemStorage(location=ROOT), **options),
        "memory": StorageDownloadView.as_view(storage=_MEMORY, **options),
        "custom": StorageDownloadView.as_view(storage=Custom(), **options),
        "remote": Remote.as_view(**options),
        "fileobject": Made.as_view(**options),
        "generated": Generated.as_view(**options),
    }
    assert list(views) == KINDS
    return views


async def _refused(request: HttpRequest, path: str) -> Any:
    await _ALL["path"](request, path=path)
    raise PermissionDenied


async def _threads(request: HttpRequest) -> JsonResponse:
    return JsonResponse([thread.name for thread in threading.enumerate()], safe=False)


def _unfinished(request: HttpRequest, path: str) -> DownloadResponse:
    return DownloadResponse(StorageFile(FileSystemStorage(location=ROOT), path))


async def _async_unfinished(request: HttpRequest, path: str) -> DownloadResponse:
    return _unfinished(request, path)


def _signed() -> dict[str, Any]:
    plain = _ALL["path"]
    return {
        **_ALL,
        "unfinished": _unfinished,
        "async-unfinished": _async_unfinished,
        "nginx": x_accel_redirect(plain, **_BY_NGINX),
        "nginx-unfinished": x_accel_redirect(_unfinished, **_BY_NGINX),
        "nginx-async-unfinished": x_accel_redirect(_async_unfinished, **_BY_NGINX),
    }


_BY_NGINX: dict[str, Any] = {"source_dir": ROOT, "destination_url": "/internal/"}
_MEMORY = _filled(AgedInMemoryStorage())
_ALL = _views()
urlpatterns = [
    *(path(f"{kind}/<path:path>", view) for kind, view in _ALL.items()),
    *(path(f"inline-{kind}/<path:path>", view) for kind, view in _views(attachment=False).items()),
    *(path(f"signed-{kind}/<path:path>", signature_required(view)) for kind, view in _signed().items()),
    path(
        "nginx-signed/<path:path>",
        x_accel_redirect(signature_required(_ALL["path"]), source_dir=ROOT, destination_url="/internal/"),
    ),
    path("refused/<path:path>", _refused),
    path("threads", _threads),
]
