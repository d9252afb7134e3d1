"""Django is set up for the tests of this directory when pytest collects them."""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.contrib.django.project")
django.setup()
