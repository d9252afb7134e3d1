"""The application's name for Django."""

from django.apps import AppConfig


class DocumentsConfig(AppConfig):
    """Documents that belong to somebody."""

    name = "examples.django.documents"
    default_auto_field = "django.db.models.BigAutoField"
