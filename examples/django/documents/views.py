"""The list of documents, and the download, which checks the permission."""

from typing import Any

from django.contrib.auth.mixins import LoginRequiredMixin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.views.generic import ListView

from downloadview_async.contrib.django import ObjectDownloadView
from examples.django.documents.models import Document, is_staff


class DocumentList(LoginRequiredMixin, ListView):  # type: ignore[type-arg]
    """The documents of the user, or all documents for the staff."""

    model = Document
    context_object_name = "documents"

    def get_queryset(self) -> QuerySet[Document]:
        """Return the documents that the user may download."""
        documents = Document.objects.select_related("owner")
        return documents if is_staff(self.request.user) else documents.filter(owner=self.request.user.pk)


class DocumentDownload(LoginRequiredMixin, ObjectDownloadView):
    """The file of a document, sent with the document's name."""

    model = Document
    basename_field = "name"

    def get_object(self, queryset: Any = None) -> Document:
        """Return the document. Raises `PermissionDenied` if the user may not download it."""
        document: Document = super().get_object(queryset)
        if not document.may_be_read_by(self.request.user):
            raise PermissionDenied
        return document
