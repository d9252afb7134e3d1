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
    """Answer with a static file of an installed application, such as the admin's stylesheet."""
    found = finders.find(path)
    if not isinstance(found, str):
        raise Http404
    return sendfile(request, found)


urlpatterns = [
    path("", DocumentList.as_view(), name="documents"),
    path("documents/<int:pk>/", DocumentDownload.as_view(), name="download"),
    # Where the storage's URLs lead: whoever has been given one needs no account.
    path("shared/<path:path>", signature_required(StorageDownloadView.as_view()), name="shared"),
    path("login/", LoginView.as_view(redirect_authenticated_user=True), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
]
if settings.DEBUG:
    urlpatterns.append(path("static/<path:path>", static_file))
