"""`manage.py demo`: creates three users and their files, if they do not exist yet."""

from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.core.management.base import BaseCommand, CommandError

from examples.django.documents.demo_content import FILES, PASSWORD
from examples.django.documents.models import Document


class Command(BaseCommand):
    """Creates the content of the demo. It needs DEBUG, because the password is public."""

    help = f"Creates the users ada, grace and admin, with the password {PASSWORD!r}, and their files."

    def handle(self, *args: Any, **options: Any) -> None:
        """Create what is missing. Raises `CommandError` without DEBUG."""
        if not settings.DEBUG:
            raise CommandError(
                "the demo's users have a public password: set DJANGO_DEBUG=1, or create users of your choice"
            )
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
