"""This library in Django: a path view, and our handler."""

import os

from django.conf import settings

FILES = os.environ["BENCH_FILES"]

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], MEDIA_ROOT=FILES, MEDIA_URL="/media/")

from django.urls import path  # noqa: E402 - which needs the settings

from downloadview_async.contrib.django import PathDownloadView, get_asgi_application  # noqa: E402

urlpatterns = [path("files/<path:path>", PathDownloadView.as_view(root=FILES))]
app = get_asgi_application()
