"""`manage.py demo`: makes three users and their files, where they are not there yet."""

from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.core.management.base import BaseCommand, CommandError

from examples.django.documents.demo_content import FILES, PASSWORD
from examples.django.documents.models import Document


class Command(BaseCommand):
    """Makes the content of the demo. For a project with DEBUG alone: everybody knows the password."""

    help = f"Makes the users ada, grace and admin, with the password {PASSWORD!r}, and files of theirs."

    def handle(self, *args: Any, **options: Any) -> None:
        """Make what is missing. Raises `CommandError` without DEBUG."""
        if not settings.DEBUG:
            raise CommandError("the demo's users have a password that everybody knows: not without DEBUG")
        users = User.objects
        if not users.filter(username="admin").exists():
            users.create_superuser("admin", password=PASSWORD)
        for username, files in FILES.items():
            user = users.filter(username=username).first() or users.create_user(username, password=PASSWORD)
            for name, content in files:
                if not Document.objects.filter(owner=user, name=name).exists():
                    document = Document(owner=user, name=name)
                    document.file.save(name, ContentFile(content))
        self.stdout.write(f"Log in as ada, grace or admin (who may see everything). The password is {PASSWORD}.")
