"""A Django project whose files are in a bucket, by django-storages; S3_URL: where the store is."""

import os

from django.conf import settings

BUCKET = "downloads"
OPTIONS = {
    "bucket_name": BUCKET,
    "endpoint_url": os.environ["S3_URL"],
    "access_key": "AKIDEXAMPLE",
    "secret_key": "of the tests",
    "region_name": "us-east-1",
}

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    STORAGES={"default": {"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": OPTIONS}},
    USE_TZ=True,
)

from django.urls import path  # noqa: E402 - which needs the settings

from downloadview_async.contrib.django import StorageDownloadView, get_asgi_application  # noqa: E402

urlpatterns = [path("<path:path>", StorageDownloadView.as_view())]
app = get_asgi_application()
