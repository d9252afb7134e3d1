"""The URLs of the project."""

from typing import Any

from django.conf import settings
from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.contrib.staticfiles import finders
from django.http import Http404, HttpRequest
from django.urls import path

from downloadview_async.contrib.django import StorageDownloadView, sendfile, signature_required
from examples.django.documents.views import DocumentDownload, DocumentList


def static_file(request: HttpRequest, path: str) -> Any:
    """Return a static file of an installed application, such as the stylesheet of the admin."""
    file = finders.find(path)
    if not isinstance(file, str):
        raise Http404
    return sendfile(request, file)


urlpatterns = [
    path("", DocumentList.as_view(), name="documents"),
    path("documents/<int:pk>/", DocumentDownload.as_view(), name="download"),
    # The URLs of the storage lead here. They are signed, so a person with such a link does not need an account.
    path("shared/<path:path>", signature_required(StorageDownloadView.as_view()), name="shared"),
    path("login/", LoginView.as_view(redirect_authenticated_user=True), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
]
if settings.DEBUG:
    urlpatterns.append(path("static/<path:path>", static_file))
