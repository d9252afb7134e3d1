"""The configuration of the application."""

from django.apps import AppConfig


class DocumentsConfig(AppConfig):
    """The application `documents`."""

    name = "examples.django.documents"
    default_auto_field = "django.db.models.BigAutoField"
