"""Has Django's own tests of FileResponse and of its ASGI handler test ours, in a project like that of `runtests.py`."""

from typing import Any

import django
import django.core.asgi
import django.core.handlers.asgi
import pytest
from django.conf import settings
from django.http.response import HttpResponseBase

settings.configure(
    DATABASES={name: {"ENGINE": "django.db.backends.sqlite3"} for name in ("default", "other")},
    INSTALLED_APPS=[
        "django.contrib.contenttypes",
        "django.contrib.auth",
        "django.contrib.sessions",
        "django.contrib.staticfiles",
        "downloadview_async.contrib.django",
    ],
    MIDDLEWARE=[
        "downloadview_async.contrib.django.DownloadDispatcherMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    ROOT_URLCONF="urls",
    SECRET_KEY="of a suite",
    STATIC_URL="static/",
    USE_TZ=False,
)
django.setup()

from django.test import RequestFactory  # noqa: E402
from django.test.utils import setup_test_environment  # noqa: E402

from downloadview_async.contrib.django import DownloadResponse  # noqa: E402
from downloadview_async.contrib.django.asgi import DownloadASGIHandler, get_asgi_application  # noqa: E402

setup_test_environment()
django.core.asgi.get_asgi_application = get_asgi_application
django.core.handlers.asgi.ASGIHandler = DownloadASGIHandler  # type: ignore[misc]


def file_response(file: Any, as_attachment: bool = False, filename: str = "", **options: Any) -> HttpResponseBase:
    """Return what our handler sends where the project's code has made a FileResponse of ours."""
    response = DownloadResponse(file, attachment=as_attachment, basename=filename, **options)
    return response.finish(RequestFactory().get("/"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put our response in the place of Django's, in the tests of FileResponse itself."""
    for module in {item.getparent(pytest.Module).obj for item in items}:  # type: ignore[union-attr]
        if module.__name__ == "responses.test_fileresponse":
            module.FileResponse = file_response
