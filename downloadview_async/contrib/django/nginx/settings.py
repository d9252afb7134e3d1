"""The deprecated settings NGINX_DOWNLOAD_MIDDLEWARE_*. Each one that is set warns; the others have defaults."""

import warnings
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

_PREFIX = "NGINX_DOWNLOAD_MIDDLEWARE_"
_RENAMED = (
    "django_downloadview.nginx.XAccelRedirectMiddleware",
    "downloadview_async.contrib.django.nginx.XAccelRedirectMiddleware",
)


def options() -> dict[str, Any]:
    """Return the deprecated settings as the options of `XAccelRedirectMiddleware`.

    Warns of each setting that is set. Raises `ImproperlyConfigured` if settings.MIDDLEWARE has a middleware that needs
    the options of a rule.
    """
    for name in _RENAMED:
        if name in settings.MIDDLEWARE:
            raise ImproperlyConfigured(
                f"settings.MIDDLEWARE: {name} needs the options of a rule. Write "
                "'downloadview_async.contrib.django.SmartDownloadMiddleware' there, and set settings.DOWNLOADVIEW"
            )
    return {
        "source_dir": _setting("SOURCE_DIR", _setting("MEDIA_ROOT", settings.MEDIA_ROOT)),
        "source_url": _setting("SOURCE_URL", settings.MEDIA_URL),
        "destination_url": _setting("DESTINATION_URL", _setting("MEDIA_URL", None)),
        "expires": _setting("EXPIRES", None),
        "with_buffering": _setting("WITH_BUFFERING", None),
        "limit_rate": _setting("LIMIT_RATE", None),
    }


def _setting(name: str, default: Any) -> Any:
    if not hasattr(settings, _PREFIX + name):
        return default
    warnings.warn(
        f"settings.{_PREFIX}{name} is deprecated: use SmartDownloadMiddleware with settings.DOWNLOADVIEW",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(settings, _PREFIX + name)


options()  # importing this module warns, as it does in django-downloadview
