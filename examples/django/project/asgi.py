"""The project as an ASGI application: `uvicorn examples.django.project.asgi:application`."""

import os

from downloadview_async.contrib.django import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django.project.settings")

application = get_asgi_application()
