"""Django on ASGI: its FileResponse in /files/, bytes in memory in /memory/, django-downloadview in /downloadview/."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import FileResponse, HttpResponse
from django.urls import path

_FILES = Path(os.environ["BENCH_FILES"])

settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of no use", USE_TZ=True)
app = get_asgi_application()


def _file(request: Any, name: str) -> FileResponse:
    return FileResponse((_FILES / name).open("rb"), as_attachment=True)


async def _memory(request: Any, name: str) -> HttpResponse:
    body = _in_memory[name]
    return HttpResponse(body, content_type="application/octet-stream", headers={"Content-Length": str(len(body))})


_in_memory = {"10k.bin": (_FILES / "10k.bin").read_bytes()}
urlpatterns = [path("files/<path:name>", _file), path("memory/<path:name>", _memory)]

if importlib.util.find_spec("django_downloadview") is not None:
    from django.core.files.storage import FileSystemStorage
    from django_downloadview import StorageDownloadView

    urlpatterns += [path("downloadview/<path:path>", StorageDownloadView.as_view(storage=FileSystemStorage(_FILES)))]
