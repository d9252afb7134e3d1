"""The page that lists the documents, and the download, which asks for the permission."""

from typing import Any

from django.contrib.auth.mixins import LoginRequiredMixin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.views.generic import ListView

from downloadview_async.contrib.django import ObjectDownloadView
from examples.django.documents.models import Document, is_staff


class DocumentList(LoginRequiredMixin, ListView):  # type: ignore[type-arg]
    """The user's own documents; all of them for the staff."""

    model = Document
    context_object_name = "documents"

    def get_queryset(self) -> QuerySet[Document]:
        """Return the documents that the user may have."""
        documents = Document.objects.select_related("owner")
        return documents if is_staff(self.request.user) else documents.filter(owner=self.request.user.pk)


class DocumentDownload(LoginRequiredMixin, ObjectDownloadView):
    """The file of a document, under the name that the document has."""

    model = Document
    basename_field = "name"

    def get_object(self, queryset: Any = None) -> Document:
        """Return the document if the user may have it."""
        document: Document = super().get_object(queryset)
        if not document.may_be_read_by(self.request.user):
            raise PermissionDenied
        return document
