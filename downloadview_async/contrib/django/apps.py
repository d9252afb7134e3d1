"""The Django application. With it in INSTALLED_APPS, `manage.py check` checks the downloads too."""

from django.apps import AppConfig
from django.core.checks import register


class DownloadViewConfig(AppConfig):
    """Registers the system checks. It has no models."""

    name = "downloadview_async.contrib.django"
    label = "downloadview_async"
    verbose_name = "downloads"

    def ready(self) -> None:
        """Register the checks, under the tag "downloadview"."""
        from downloadview_async.contrib.django import checks

        register(checks.check_downloads, "downloadview")
