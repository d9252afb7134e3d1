"""The model of a document: a file with a name and an owner."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser, User
from django.db import models
from django.urls import reverse


class Document(models.Model):
    """A file that its owner and the staff may download."""

    owner: models.ForeignKey[User, User] = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="documents"
    )
    owner_id: int
    name: models.CharField[str, str] = models.CharField(
        max_length=200, help_text="The name of the file when it is downloaded."
    )
    file = models.FileField(upload_to="%Y/%m/")
    added: models.DateTimeField[datetime, datetime] = models.DateTimeField(auto_now_add=True)

    class Meta:
        """Newest documents first."""

        ordering = ["-added", "-pk"]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        """Return the URL of the download."""
        return reverse("download", args=[self.pk])

    def may_be_read_by(self, user: AbstractBaseUser | AnonymousUser) -> bool:
        """Return whether a user may download the file."""
        return self.owner_id == user.pk or is_staff(user)


def is_staff(user: AbstractBaseUser | AnonymousUser) -> bool:
    """Return whether a user may download all documents."""
    return bool(getattr(user, "is_staff", False))
