"""What a package answers where django-downloadview and ours differ, as JSON: `differences.py PACKAGE DIRECTORY`."""

import datetime
import importlib
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import django
from django.conf import settings
from django.core.files.base import File
from django.core.files.storage import FileSystemStorage
from django.http import HttpRequest
from django.test import Client
from django.urls import path

PACKAGE, DIRECTORY = sys.argv[1], Path(sys.argv[2])
MEDIA = DIRECTORY / "media"


def main() -> dict[str, Any]:
    """Return the answers by their names: the status and the headers."""
    logging.disable()
    for name in ("media/a b%.txt", "media/é.png", "media/p.html", "media/t.tar.gz", "media-private/s.txt"):
        (DIRECTORY / name).parent.mkdir(exist_ok=True)
        (DIRECTORY / name).write_bytes(b"0123456789")
        os.utime(DIRECTORY / name, (1_700_000_000,) * 2)  # while its second is not over, it has no Last-Modified
    settings.configure(
        SECRET_KEY="k",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="urls",
        MEDIA_ROOT=str(MEDIA),
        USE_TZ=True,
        LOGGING_CONFIG=None,
        DOWNLOADVIEW_UNSALTED_LINKS="UNSALTED_LINKS" in os.environ,
    )
    django.setup()
    package = importlib.import_module(PACKAGE)
    nginx, apache = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("nginx", "apache"))
    storage_module, decorators = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("storage", "decorators"))
    view = package.PathDownloadView.as_view
    storage = FileSystemStorage(MEDIA, base_url="/media/")
    signed = storage_module.SignedFileSystemStorage(MEDIA, base_url="/signed/")

    class Teapot(package.PathDownloadView):  # type: ignore[name-defined, misc]
        path = str(MEDIA / "p.html")

        def render_to_response(self, *args: Any, **kwargs: Any) -> Any:
            response = super().render_to_response(*args, status=418, **kwargs)
            response["X-Accel-Redirect"] = "/of-the-view"
            return response

    def function(request: HttpRequest) -> Any:
        return package.DownloadResponse(File((MEDIA / "p.html").open("rb")))

    by_dir = {"source_dir": str(MEDIA), "destination_url": "/_media/"}
    by_url = {"source_url": "/media/", "destination_url": "/_media/"}
    urls: Any = types.ModuleType("urls")
    sys.modules["urls"] = urls
    urls.urlpatterns = [
        path("from-the-url/<path:path>", view()),
        path("text/", view(path=str(MEDIA / "a b%.txt"))),
        path("image/", view(path=str(MEDIA / "é.png"))),
        path("archive/", view(path=str(MEDIA / "t.tar.gz"))),
        path("inline/", view(path=str(MEDIA / "p.html"), attachment=False)),
        path("stored/<path:path>", package.StorageDownloadView.as_view(storage=storage)),
        path("function/", function),
        path("teapot/", Teapot.as_view()),
        path("nginx/text/", nginx.x_accel_redirect(view(path=str(MEDIA / "a b%.txt")), **by_dir, limit_rate=False)),
        path(
            "nginx/image/",
            nginx.x_accel_redirect(package.StorageDownloadView.as_view(storage=storage, path="é.png"), **by_url),
        ),
        path("nginx/private/", nginx.x_accel_redirect(view(path=str(DIRECTORY / "media-private" / "s.txt")), **by_dir)),
        path(
            "nginx/missing/",
            nginx.x_accel_redirect(package.StorageDownloadView.as_view(storage=storage, path="none"), **by_url),
        ),
        path("nginx/teapot/", nginx.x_accel_redirect(Teapot.as_view(), **by_dir)),
        path(
            "apache/", apache.x_sendfile(view(path=str(MEDIA / "é.png")), source_dir=str(MEDIA), destination_dir="/srv")
        ),
        path("signed/<path:path>", decorators.signature_required(package.StorageDownloadView.as_view(storage=signed))),
    ]
    client = Client(raise_request_exception=False)
    future = "Thu, 01 Jan 2099 00:00:00 GMT"
    asked: dict[str, tuple[str, dict[str, str]]] = {
        "a path from the URL": (f"/from-the-url/{MEDIA}/p.html", {}),
        "text": ("/text/", {}),
        "image": ("/image/", {}),
        "archive": ("/archive/", {}),
        "inline": ("/inline/", {}),
        "range": ("/text/", {"Range": "bytes=0-3"}),
        "condition": ("/text/", {"If-Modified-Since": future}),
        "missing": ("/stored/none", {}),
        "outside": ("/stored/../media-private/s.txt", {}),
        "function": ("/function/", {}),
        "teapot": ("/teapot/", {}),
        **{f"nginx {name}": (f"/nginx/{name}/", {}) for name in ("text", "image", "private", "missing", "teapot")},
        "nginx range": ("/nginx/text/", {"Range": "bytes=0-3"}),
        "apache": ("/apache/", {}),
        "signed": (signed.url("a b%.txt"), {}),
        "signed, plain name": (signed.url("p.html"), {}),
        **{f"link {number}": (link, {}) for number, link in enumerate(sys.argv[3:])},
    }
    answers: dict[str, Any] = {"plain link": signed.url("p.html")}
    for name, (url, headers) in asked.items():
        response = client.get(url, headers=headers)
        answers[name] = {"status": response.status_code, **{key.lower(): value for key, value in response.items()}}
    for name, expires in (("time", datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)), ("seconds", 60)):
        try:
            answers[f"expires {name}"] = nginx.XAccelRedirectResponse("/x", "image/png", expires=expires)[
                "X-Accel-Expires"
            ]
        except TypeError as exc:
            answers[f"expires {name}"] = type(exc).__name__
    answers["charset"] = nginx.XAccelRedirectResponse("/x", "image/png").get("X-Accel-Charset")
    return answers


if __name__ == "__main__":
    os.environ.pop("DJANGO_SETTINGS_MODULE", None)
    print(json.dumps(main()))
