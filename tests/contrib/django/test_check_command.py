"""`manage.py downloadview_check`: a project behind a real nginx passes, and each mistake is named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import downloadview_async as dv
from tests.live import make_old
from tests.proxies.servers import KINDS, proxy, readable_directory, running
from tests.servers import PROJECT, free_port

pytestmark = pytest.mark.slow

MANAGE = """
import os
import sys
from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_settings")
execute_from_command_line(sys.argv)
"""
SETTINGS = """
import os

ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "site_urls"
SECRET_KEY = "x"
USE_TZ = True
INSTALLED_APPS = ["downloadview_async.contrib.django"]
MIDDLEWARE = ["downloadview_async.contrib.django.SmartDownloadMiddleware"]
DOWNLOADVIEW = {
    "BACKEND": "nginx",
    "RULES": [{"source_dir": os.path.abspath("invoices"), "destination_url": "/_files/"}],
}
"""
URLS = """
import os
from django.core.exceptions import PermissionDenied
from django.urls import path
from downloadview_async.contrib.django import PathDownloadView


class Invoice(PathDownloadView):
    root = os.path.abspath("invoices")

    def get_path(self):
        if self.request.headers.get("cookie") != "sessionid=ada":
            raise PermissionDenied
        return {1: "a.pdf", 2: "50% off é.pdf"}[self.kwargs["number"]]


urlpatterns = [
    path("invoices/<int:number>", Invoice.as_view()),
    path("elsewhere/<path:path>", PathDownloadView.as_view(root="elsewhere")),
]
"""
ASGI = """
import os
from downloadview_async.contrib.django import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_settings")
application = get_asgi_application()
"""
WSGI = ASGI.replace("downloadview_async.contrib.django", "django.core.wsgi").replace("asgi", "wsgi")
ADA = ("--header", "Cookie: sessionid=ada")
FILES = ("--file", "/invoices/1=invoices/a.pdf", "--file", "/invoices/2=invoices/50% off é.pdf")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "site_settings",
        "PYTHONPATH": str(PROJECT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@dataclass(frozen=True)
class Project:
    directory: Path
    port: int

    @contextmanager
    def behind_nginx(self, edit: Callable[[str], str] = str, prefix: str = "") -> Iterator[str]:
        rules = [dv.Rule(f"{self.directory}/invoices", "/_files/")]

        def text(service: str, listen: str) -> str:
            return dv.proxy_config("nginx", rules, service=service, listen=listen, prefix=prefix)

        with proxy(KINDS["nginx"], self.directory, self.port, text=text, edit=edit) as front:
            yield f"http://127.0.0.1:{front}"

    def manage(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "manage.py", "downloadview_check", *arguments],
            cwd=self.directory,
            env={**environment(), **more},
            capture_output=True,
            text=True,
        )

    def check(self, *arguments: str, **more: str) -> tuple[int, dict[str, Any]]:
        done = self.manage(*arguments, "--json", **more)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    with readable_directory() as directory:
        for name, text in (("manage", MANAGE), ("site_settings", SETTINGS), ("site_urls", URLS), ("site_asgi", ASGI)):
            (directory / f"{name}.py").write_text(text)
        for name in ("invoices", "elsewhere"):
            (directory / name).mkdir()
        (directory / "invoices" / "a.pdf").write_bytes(b"%PDF-1.7 " * 30_000)
        (directory / "invoices" / "50% off é.pdf").write_bytes(b"%PDF-1.7")
        (directory / "elsewhere" / "a.txt").write_bytes(b"0123456789")
        make_old(directory)
        port = free_port()
        server = [sys.executable, "-m", "uvicorn", "site_asgi:application", "--port", str(port)]
        with running(server, port, directory=directory, log=directory / "log", environ=environment()):
            yield Project(directory, port)


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in report["checks"] if check["result"] == "FAIL"]


def test_a_project_passes_behind_nginx(project: Project) -> None:
    (project.directory / "debug_settings.py").write_text("from site_settings import *\nDEBUG = True\n")
    with project.behind_nginx() as url:
        status, report = project.check(url, *ADA, *FILES, "--direct", f"http://127.0.0.1:{project.port}")
        assert [check for check in report["checks"] if check["result"] != "pass"] == []
        assert status == 0
        made = [check["came"] for check in report["checks"] if check["step"] == "application"]
        assert "x-accel-redirect: /_files/a.pdf" in made[0]
        assert "x-accel-redirect: /_files/50%25%20off%20%C3%A9.pdf" in made[2]
        text = project.manage(url, *ADA, *FILES, DJANGO_SETTINGS_MODULE="debug_settings")
        assert (text.returncode, text.stderr) == (0, "")
        assert text.stdout.splitlines()[-1].endswith("0 FAIL, 0 skip")


def test_a_user_who_may_not_have_the_file(project: Project) -> None:
    with project.behind_nginx() as url:
        status, report = project.check(url, *FILES)
    assert status == 1
    assert failures(report)[0]["came"] == "403"
    assert "--header" in failures(report)[0]["remedy"]


def test_the_location_of_nginx_is_not_internal(project: Project) -> None:
    with project.behind_nginx(lambda text: text.replace("            internal;\n", "")) as url:
        status, report = project.check(url, *ADA, *FILES)
    assert status == 1
    assert "`internal;` in `location /_files/`" in failures(report)[0]["remedy"]


@pytest.mark.parametrize(
    ("middleware", "reason"),
    [
        ("MIDDLEWARE = []", "there is no SmartDownloadMiddleware in MIDDLEWARE"),
        ("", "no rule in the settings covers it"),
    ],
)
def test_a_file_that_no_rule_covers_is_streamed_and_the_line_says_why(
    project: Project, middleware: str, reason: str
) -> None:
    (project.directory / "other_settings.py").write_text(f"from site_settings import *\n{middleware}\n")
    with project.behind_nginx() as url:
        file = "/elsewhere/a.txt=elsewhere/a.txt"
        status, report = project.check(url, "--file", file, DJANGO_SETTINGS_MODULE="other_settings")
    assert status == 0, failures(report)
    (line,) = [check for check in report["checks"] if check["step"] == "application"]
    assert line["came"] == f"200, streamed: {reason}"


def test_a_prefix_that_the_proxy_leaves_is_named(project: Project) -> None:
    """The proxy passes /shop on, and the project has no route below it."""
    with project.behind_nginx() as url:
        status, report = project.check(f"{url}/shop", *ADA, *FILES)
    assert status == 1
    remedies = [check["remedy"] for check in failures(report)]
    assert any(remedy.startswith("root_path mismatch: ") for remedy in remedies), remedies


def test_a_script_name_that_the_project_has_and_the_url_lacks_is_named(project: Project) -> None:
    (project.directory / "below_settings.py").write_text("from site_settings import *\nFORCE_SCRIPT_NAME = '/shop'\n")
    port = free_port()
    server = [sys.executable, "-m", "uvicorn", "site_asgi:application", "--port", str(port)]
    own = {**environment(), "DJANGO_SETTINGS_MODULE": "below_settings"}
    below = Project(project.directory, port)
    with (
        running(server, port, directory=project.directory, log=project.directory / "log-below", environ=own),
        below.behind_nginx() as url,
    ):
        status, report = below.check(f"{url}/shop", *ADA, *FILES, DJANGO_SETTINGS_MODULE="below_settings")
        assert (status, failures(report)) == (0, [])
        below_file = "/shop/invoices/1=invoices/a.pdf"
        status, report = below.check(f"{url}/shop", *ADA, "--file", below_file, DJANGO_SETTINGS_MODULE="below_settings")
    assert status == 1
    assert failures(report)[0]["remedy"].startswith("root_path mismatch: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no file to request: give one, such as --file /invoices/1=invoices/a.pdf"),
        (("--file", "invoices/1"), "'invoices/1' is not PATH=FILE"),
        (("--file", "/invoices/1", "--timeout", "-1"), "--timeout is -1: give seconds"),
        (("--file", "/invoices/1", "--header", "Cookie"), "--header is NAME: VALUE"),
        (("--file", "/invoices/1", "--app", "no_such.app"), "no_such.app cannot be imported (ModuleNotFoundError"),
        (("--file", "/invoices/1", "--app", "site_urls.urlpatterns"), "is not an ASGI application"),
    ],
)
def test_what_cannot_be_checked_ends_with_status_2(project: Project, arguments: tuple[str, ...], message: str) -> None:
    done = project.manage("http://127.0.0.1:1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_host_that_the_project_does_not_allow_is_named(project: Project) -> None:
    (project.directory / "common_settings.py").write_text(
        "from site_settings import *\nMIDDLEWARE = ['django.middleware.common.CommonMiddleware', *MIDDLEWARE]\n"
    )
    status, report = project.check("http://localhost:1", *ADA, *FILES, DJANGO_SETTINGS_MODULE="common_settings")
    assert status == 1
    assert failures(report)[0]["remedy"] == "let the application accept the host localhost:1"


def test_another_application_may_be_given(project: Project) -> None:
    (project.directory / "outer.py").write_text(
        "from site_asgi import application\n"
        "from downloadview_async import OffloadMiddleware, Rule, XAccelRedirect\n"
        "app = OffloadMiddleware(application, XAccelRedirect([Rule('/nowhere', '/_nowhere/')]))\n"
    )
    with project.behind_nginx() as url:
        status, report = project.check(url, *ADA, *FILES, "--app", "outer:app")
    assert (status, failures(report)) == (0, [])


def test_the_help_has_an_example(project: Project) -> None:
    done = project.manage("--help")
    assert done.returncode == 0
    assert 'python manage.py downloadview_check https://example.org \\\n      --header "Cookie:' in done.stdout
