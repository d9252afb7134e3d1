"""The Django project of these tests: its settings, an empty URLconf that tests replace, and a directory of its own."""

import atexit
import os
import shutil
import tempfile
from typing import Any

from django.urls import URLPattern, URLResolver

BASE_DIR = tempfile.mkdtemp(prefix="downloadview-django-")
atexit.register(shutil.rmtree, BASE_DIR, ignore_errors=True)

SECRET_KEY = "for tests only"
ROOT_URLCONF = "tests.contrib.django.project"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.path.join(BASE_DIR, "db.sqlite3")}}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "downloadview_async.contrib.django",
    "tests.contrib.django.documents",
]
MIDDLEWARE: list[str] = []
MEDIA_ROOT = os.path.join(BASE_DIR, "media")
MEDIA_URL = "/media/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TEMPLATES: list[dict[str, Any]] = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]

os.makedirs(MEDIA_ROOT, exist_ok=True)

urlpatterns: list[URLPattern | URLResolver] = []
