"""Django on ASGI: its own FileResponse below /files/, a view of django-downloadview below /downloadview/."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import FileResponse
from django.urls import path

_FILES = Path(os.environ["BENCH_FILES"])

settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of no use", USE_TZ=True)
app = get_asgi_application()


def _file(request: Any, name: str) -> FileResponse:
    return FileResponse((_FILES / name).open("rb"), as_attachment=True)


urlpatterns = [path("files/<path:name>", _file)]

if importlib.util.find_spec("django_downloadview") is not None:
    from django.core.files.storage import FileSystemStorage
    from django_downloadview import StorageDownloadView

    urlpatterns += [path("downloadview/<path:path>", StorageDownloadView.as_view(storage=FileSystemStorage(_FILES)))]
