#!/usr/bin/env python3
"""Django's commands for this project: run `python -m examples.django.manage migrate` in the root of the checkout."""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django.project.settings")
    execute_from_command_line(sys.argv)
