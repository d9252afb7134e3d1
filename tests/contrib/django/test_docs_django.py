"""The pages on Django are true: their code is a project that works, their commands run, their tables are complete."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from downloadview_async.contrib import django as package
from downloadview_async.contrib.django import apache, lighttpd, nginx
from tests.pages import DOCS, blocks, file_of
from tests.servers import PROJECT

GUIDE, MIGRATION = DOCS / "howto" / "django.md", DOCS / "migration.md"


def run(directory: Path, *arguments: str, settings: str = "project.settings") -> str:
    """Run Python in a directory, with warnings as errors, and return what it says."""
    own = {"PYTHONPATH": f"{directory}{os.pathsep}{PROJECT}", "PYTHONWARNINGS": "error"}
    env = {**os.environ, **own, "DJANGO_SETTINGS_MODULE": settings}
    done = subprocess.run([sys.executable, *arguments], cwd=directory, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_project(directory: Path, page: Path) -> None:
    """Make a new project of Django's, and add each block of a page to the file that its first line names."""
    run(directory, "-m", "django", "startproject", "project", ".", settings="")
    run(directory, "manage.py", "startapp", "documents")
    for _, text in blocks(page, "python"):
        if (name := file_of(text)) is not None:
            file = directory / name
            file.parent.mkdir(exist_ok=True)
            with file.open("a") as output:
                output.write(f"\n{text}")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("guide")
    make_project(directory, GUIDE)
    (directory / "media").mkdir()
    (directory / "manuals").mkdir()
    (directory / "manuals" / "terms.txt").write_text("none")
    run(directory, "manage.py", "makemigrations", "documents")
    return directory


@pytest.mark.slow
def test_the_tests_of_the_guide_pass(guide: Path) -> None:
    assert "Ran 3 tests" in run(guide, "manage.py", "test")


@pytest.mark.parametrize("settings", ["project.settings", "project.production"])
def test_the_project_of_the_guide_has_no_mistakes(guide: Path, settings: str) -> None:
    assert "no issues" in run(guide, "manage.py", "check", settings=settings)


def test_the_views_of_the_guide_answer(guide: Path) -> None:
    (guide / "documents" / "tests.py").rename(guide / "documents" / "tests_of_the_page.py")
    (guide / "documents" / "tests.py").write_text(
        """
import io
import zipfile
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.test import AsyncClient, Client, TestCase
from documents.models import Document
from downloadview_async.contrib.django import assert_download_response, temporary_media_root

@temporary_media_root()
class Tests(TestCase):
    def setUp(self):
        self.ada = User.objects.create_user("ada")
        self.document = Document(owner=self.ada, name="a.txt")
        self.document.file.save("1.txt", ContentFile(b"0123456789"))

    def check(self, get):
        for path in ("documents", "own", "mine"):
            response = get(f"/{path}/{self.document.pk}/")
            assert_download_response(self, response, basename="a.txt", content=b"0123456789")
        assert_download_response(self, get("/terms/"), basename="terms.txt", content=b"none", attachment=True)
        assert_download_response(self, get("/manuals/terms.txt"), content=b"none", attachment=False)
        assert_download_response(self, get("/numbers/"), basename="numbers.txt", content=b"0\\n1\\n2\\n")
        self.assertEqual(get("/manuals/../manage.py").status_code, 404)
        assert_download_response(self, get("/leaflets/terms.txt"), content=b"none")
        self.assertEqual(get("/leaflets/missing.txt").status_code, 404)
        self.assertEqual(get("/shared/1.txt").status_code, 403)
        assert_download_response(self, get(self.document.file.url), content=b"0123456789")

    def test_client(self):
        self.client.force_login(self.ada)
        self.check(self.client.get)
        for path in ("documents", "mine"):
            self.assertEqual(Client().get(f"/{path}/{self.document.pk}/").status_code, 302)
        self.assertEqual(Client().get(f"/own/{self.document.pk}/").status_code, 403)

    def test_the_archive(self):
        self.client.force_login(self.ada)
        whole = self.client.get("/mine.zip")
        assert_download_response(self, whole, basename="documents.zip", mime_type="application/zip", ranges=True)
        content = b"".join(whole)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            self.assertEqual(archive.read(f"{self.document.pk}/a.txt"), b"0123456789")
        headers = {"Range": "bytes=20-", "If-Range": whole["ETag"]}
        rest = self.client.get("/mine.zip", headers=headers)
        assert_download_response(self, rest, status=206, content=content[20:], size=len(content))
        self.client.force_login(User.objects.create_user("grace"))
        self.assertEqual(self.client.get("/mine.zip").status_code, 404)

    def test_the_bucket(self):
        self.assertIn("login", Client().get(f"/bucket/{self.document.pk}/")["Location"])
        self.client.force_login(self.ada)
        response = self.client.get(f"/bucket/{self.document.pk}/")
        self.assertEqual(response.status_code, 307)
        url, _, query = response["Location"].partition("?")
        self.assertEqual(url, "http://127.0.0.1:8333/invoices/1.txt")
        self.assertIn("X-Amz-Signature=", query)
        self.assertIn("a.txt", query)

    def test_a_shared_link(self):
        self.client.force_login(self.ada)
        link = self.client.get(f"/documents/{self.document.pk}/share/").content.decode()
        response = Client().get(link, headers={"Range": "bytes=0-8"})
        assert_download_response(self, response, status=206, basename="a.txt", content=b"012345678")
        self.assertEqual(response["Cache-Control"], "private, no-store")
        rest = Client().get(link, headers={"Range": "bytes=9-"})
        assert_download_response(self, rest, status=206, content=b"9")
        self.assertEqual(Client().get(link).status_code, 410)
        self.assertEqual(Client().get(link.partition("?")[0]).status_code, 403)

    async def test_async_client(self):
        await self.async_client.aforce_login(self.ada)
        own = [f"/{path}/{self.document.pk}/" for path in ("documents", "own", "mine")]
        paths = ["/terms/", "/manuals/terms.txt", "/numbers/", "/manuals/../manage.py", "/shared/1.txt"]
        paths += ["/leaflets/terms.txt", "/leaflets/missing.txt"]
        links = {"shared": self.document.file.url}
        responses = {path: await self.async_client.get(path) for path in [*own, *paths, links["shared"]]}
        self.check(lambda path: responses[links["shared"] if "X-Signature" in path else path])
"""
    )
    assert "Ran 5 tests" in run(guide, "manage.py", "test", "documents.tests")


def test_the_applications_of_the_guide_answer(guide: Path) -> None:
    (guide / "media" / "1.txt").write_text("0123456789")
    run(
        guide,
        "-c",
        """
import asyncio
import project.asgi, project.offloaded
from django.core.management import call_command
from django.contrib.auth.models import User
from documents.models import Document
from downloadview_async.testing import assert_download_response, assert_x_accel_redirect, call
call_command("migrate", verbosity=0)
document = Document.objects.create(owner=User.objects.create_user("ada"), name="a.txt", file="1.txt")
path, _, query = document.file.url.partition("?")
async def main():
    answer = await call(project.asgi.application, path, query=query, headers={"Range": "bytes=2-4"})
    assert_download_response(answer, status=206, content="234")
    assert_x_accel_redirect(await call(project.offloaded.application, path, query=query), redirect_url="/_files/1.txt")
asyncio.run(main())
""",
    )


def test_the_guide_has_every_check() -> None:
    source = (PROJECT / "downloadview_async" / "contrib" / "django" / "checks.py").read_text()
    known = set(re.findall(r'"(downloadview_async\.[A-Z]\d+)"', source))
    assert known == set(re.findall(r"^\| `(downloadview_async\.[A-Z]\d+)`", GUIDE.read_text(), re.MULTILINE))


def test_the_api_page_has_every_name_of_the_package() -> None:
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"auto(?:class|data|function|exception):: (\w+)", page[page.index("## Django\n") :]))
    names = {name for module in (package, nginx, apache, lighttpd) for name in module.__all__}
    aliases = {"StringIteratorIO", "_signature_is_valid"}
    assert names - aliases <= documented


def answers_of(name: str, directory: Path, *links: str) -> dict[str, Any]:
    command: list[str | Path] = [
        sys.executable,
        "-W",
        "ignore",
        PROJECT / "tests" / "contrib" / "django" / "differences.py",
        name,
        directory,
    ]
    done = subprocess.run([*command, *links], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # django-downloadview prints, too
    return answers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("django_downloadview", reason="only the packages of `make bench` have it", exc_type=ImportError)
    return answers_of("django_downloadview", tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers_of(package.__name__, tmp_path_factory.mktemp("ours"))


ABSENT = None
DIFFERENCES = [
    # asked, header, django-downloadview's, ours
    ("a path from the URL", "status", 200, 500),
    ("missing", "status", 500, 404),
    ("outside", "status", 400, 404),
    ("range", "status", 200, 206),
    ("range", "content-range", ABSENT, "bytes 0-3/10"),
    ("condition", "status", 200, 304),
    ("text", "accept-ranges", ABSENT, "bytes"),
    ("text", "content-type", "text/plain; charset=utf-8", "text/plain; charset=utf-8"),
    ("image", "content-type", "image/png; charset=utf-8", "image/png"),
    ("archive", "content-type", "application/x-tar; charset=utf-8", "application/gzip"),
    ("inline", "content-disposition", ABSENT, 'inline; filename="p.html"'),
    ("inline", "content-security-policy", ABSENT, "sandbox; default-src 'none'"),
    ("inline", "x-content-type-options", ABSENT, "nosniff"),
    ("function", "content-length", "10", ABSENT),
    ("teapot", "status", 418, 418),
    ("teapot", "x-accel-redirect", "/of-the-view", ABSENT),
    ("nginx text", "x-accel-redirect", "/_media/a b%.txt", "/_media/a%20b%25.txt"),
    ("nginx text", "x-accel-limit-rate", "off", "0"),
    ("nginx text", "content-length", "10", ABSENT),
    ("nginx range", "status", 200, 200),
    ("nginx image", "x-accel-redirect", "/_media/%C3%A9.png", "/_media/%C3%A9.png"),
    (
        "nginx image",
        "content-disposition",
        "attachment; filename=\"%C3%A9.png\"; filename*=UTF-8''%25C3%25A9.png",
        "attachment; filename=\"e.png\"; filename*=UTF-8''%C3%A9.png",
    ),
    ("nginx private", "x-accel-redirect", "/_media/../media-private/s.txt", ABSENT),
    ("nginx missing", "status", 500, 404),
    ("nginx missing", "x-accel-redirect", ABSENT, ABSENT),
    ("nginx teapot", "status", 200, 418),
    ("nginx teapot", "x-accel-redirect", "/_media/p.html", ABSENT),
    ("apache", "x-sendfile", "/srv/é.png", "/srv/é.png".encode().decode("latin-1")),
    ("signed", "status", 403, 200),
    ("signed, plain name", "status", 200, 200),
]


@pytest.mark.parametrize(("asked", "header", "old", "new"), DIFFERENCES)
def test_what_differs_is_as_the_page_says(
    asked: str, header: str, old: object, new: object, ours: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    assert ours[asked].get(header) == new
    assert request.getfixturevalue("theirs")[asked].get(header) == old


def test_options_of_nginx_that_did_not_work_do(ours: dict[str, Any], request: pytest.FixtureRequest) -> None:
    assert (ours["expires time"], ours["expires seconds"], ours["charset"]) == ("3600", "60", None)
    theirs = request.getfixturevalue("theirs")
    assert (theirs["expires time"], theirs["expires seconds"], theirs["charset"]) == ("TypeError", "TypeError", "None")


@pytest.mark.slow
def test_links_of_the_other_package_verify_while_a_setting_says_so(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = answers_of("django_downloadview", tmp_path_factory.mktemp("theirs"), ours["plain link"])
    here = answers_of(package.__name__, tmp_path_factory.mktemp("ours"), theirs["plain link"])
    assert (there["link 0"]["status"], here["link 0"]["status"]) == (403, 403)
    monkeypatch.setenv("UNSALTED_LINKS", "1")
    here = answers_of(package.__name__, tmp_path_factory.mktemp("ours"), theirs["plain link"])
    assert here["link 0"]["status"] == 200


OLD = """
import django_downloadview
from django_downloadview import ObjectDownloadView, StringIteratorIO
from django_downloadview.decorators import signature_required
from django_downloadview.exceptions import FileNotFound
from django_downloadview.io import TextIteratorIO
from django_downloadview.lighttpd import x_sendfile
from django_downloadview.middlewares import RealDownloadMiddleware
from django_downloadview.nginx.response import XAccelRedirectResponse
from django_downloadview.apache.middlewares import XSendfileMiddleware
from django_downloadview.response import DownloadResponse
from django_downloadview.shortcuts import sendfile
from django_downloadview.storage import SignedFileSystemStorage
from django_downloadview.test import setup_view
from django_downloadview.views.path import PathDownloadView

DOWNLOADVIEW_BACKEND = "django_downloadview.nginx.XAccelRedirectMiddleware"
view = django_downloadview.VirtualDownloadView
"""


def lines_of(program: str) -> list[str]:
    """Return the commands of a program on the page, each on one line."""
    texts = [text.replace("\\\n", "") for _, text in blocks(MIGRATION, "sh")]
    return [line for text in texts for line in text.splitlines() if line.startswith(program)]


def test_one_line_changes_the_imports_and_another_changes_them_back(tmp_path: Path) -> None:
    there, back = (line for line in lines_of("git grep"))
    (tmp_path / "old.py").write_text(OLD)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["git", "add", "old.py"], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", there], cwd=tmp_path, check=True)
    new = (tmp_path / "old.py").read_text()
    assert "django_downloadview" not in new
    assert "from downloadview_async.contrib.django.nginx import XAccelRedirectResponse" in new
    settings = "from django.conf import settings; settings.configure(); import django; django.setup()"
    run(tmp_path, "-c", f"{settings}; import old; assert old.view and old.sendfile", settings="")
    subprocess.run(["bash", "-c", back], cwd=tmp_path, check=True)
    assert "downloadview_async" not in (tmp_path / "old.py").read_text()


def test_the_migration_page_has_every_name_of_django_downloadview() -> None:
    theirs: Any = pytest.importorskip("django_downloadview.api", exc_type=ImportError)
    page = MIGRATION.read_text()
    names = [name for name in vars(theirs) if not name.startswith("_")]
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in page] == []
    assert [name for name in names if not hasattr(package, name)] == []


@pytest.mark.slow
def test_the_project_of_the_migration_page_works(tmp_path: Path) -> None:
    make_project(tmp_path, MIGRATION)
    assert "Ran 1 test" in run(tmp_path, "manage.py", "test")
    run(tmp_path, "-c", "import project.asgi; assert type(project.asgi.application).__name__ == 'DownloadASGIHandler'")
    assert "no issues" in run(tmp_path, "manage.py", "check")
