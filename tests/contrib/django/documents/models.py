"""A model with a file in the default storage."""

from typing import Any

from django.db import models


class Document(models.Model):
    """A file by a name of its own."""

    name: Any = models.CharField(max_length=255, unique=True)
    file = models.FileField(max_length=255, blank=True)

    def __str__(self) -> str:
        return str(self.name)
