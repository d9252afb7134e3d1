"""The admin pages for documents, with links to the downloads."""

from django.contrib import admin
from django.utils.html import format_html
from django.utils.safestring import SafeString

from examples.django.documents.models import Document


@admin.register(Document)
class DocumentAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """The list links to each download. In the form, the link after "Currently:" is the signed URL of the storage."""

    list_display = ["name", "owner", "added", "download"]
    list_filter = ["owner"]
    search_fields = ["name"]
    date_hierarchy = "added"

    @admin.display(description="file")
    def download(self, document: Document) -> SafeString:
        """Return a link to the download."""
        return format_html('<a href="{}">Download</a>', document.get_absolute_url())
