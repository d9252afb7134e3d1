"""The settings of the project. Environment variables set what differs between deployments.

DJANGO_DEBUG: 1, the default, or 0. DJANGO_SECRET_KEY: required if DJANGO_DEBUG is 0. EXAMPLE_DATA: the directory of the
database and the files. EXAMPLE_OFFLOAD: nginx, to let nginx send the files, as in `examples/django/nginx.conf`.
"""

import os
from pathlib import Path

from django.core.management.utils import get_random_secret_key

PACKAGE = "examples.django"
DATA = Path(os.environ.get("EXAMPLE_DATA") or Path(__file__).parents[1] / "data").absolute()

DEBUG = os.environ.get("DJANGO_DEBUG", "1") == "1"
# A random key changes at each start, which ends all sessions and invalidates shared links.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or (get_random_secret_key() if DEBUG else "")
ALLOWED_HOSTS = os.environ.get("DJANGO_ALLOWED_HOSTS", "").split()

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "downloadview_async.contrib.django",  # its system checks
    f"{PACKAGE}.documents",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = f"{PACKAGE}.project.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.debug",
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATA / "db.sqlite3"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
INTERNAL_IPS = ["127.0.0.1"]  # these addresses see the hint on the login page
STATIC_URL = "/static/"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "documents"
LOGOUT_REDIRECT_URL = "login"

# The directory of the files. Only the views serve it, not a web server; the shared links lead to a view too.
MEDIA_ROOT = DATA / "files"
STORAGES = {
    "default": {
        "BACKEND": "downloadview_async.contrib.django.SignedFileSystemStorage",
        "OPTIONS": {"base_url": "/shared/"},
    },
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
DOWNLOADVIEW_URL_EXPIRATION = 3600  # seconds

if os.environ.get("EXAMPLE_OFFLOAD") == "nginx":
    # The last in the list, so that it handles the responses of the views first.
    MIDDLEWARE.append("downloadview_async.contrib.django.SmartDownloadMiddleware")
    DOWNLOADVIEW = {"BACKEND": "nginx", "RULES": [{"source_dir": MEDIA_ROOT, "destination_url": "/_files/"}]}
