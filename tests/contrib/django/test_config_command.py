"""`manage.py downloadview_config`: a project passes its own check behind a proxy with the printed configuration."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contrib.django.test_check_command import ADA, ASGI, FILES, MANAGE, SETTINGS, URLS, environment
from tests.live import make_old
from tests.proxies.servers import KINDS, proxy, readable_directory, running
from tests.servers import free_port

OTHER = """
from site_settings import *

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    *MIDDLEWARE,
]
"""
APACHE = """
DOWNLOADVIEW = {
    "BACKEND": "apache",
    "RULES": [{"source_dir": os.path.abspath("invoices"), "destination_dir": os.path.abspath("invoices")}],
}
"""


def manage(directory: Path, *arguments: str, settings: str = "site_settings") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=directory,
        env={**environment(), "DJANGO_SETTINGS_MODULE": settings},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def directory() -> Iterator[Path]:
    with readable_directory() as directory:
        texts = {"manage": MANAGE, "site_settings": SETTINGS, "site_urls": URLS, "site_asgi": ASGI}
        texts |= {"nginx_settings": OTHER, "apache_settings": f"import os\n{OTHER}{APACHE}"}
        for name, text in texts.items():
            (directory / f"{name}.py").write_text(text)
        (directory / "invoices").mkdir()
        (directory / "invoices" / "a.pdf").write_bytes(b"%PDF-1.7 " * 30_000)
        (directory / "invoices" / "50% off é.pdf").write_bytes(b"%PDF-1.7")
        make_old(directory)
        yield directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nginx", "caddy", "apache"])
def test_a_project_passes_behind_the_proxy(directory: Path, kind: str) -> None:
    settings, port = f"{'apache' if kind == 'apache' else 'nginx'}_settings", free_port()

    def text(service: str, listen: str) -> str:
        command = ["downloadview_config", kind, "--listen", listen, "--service", service]
        done = manage(directory, *command, settings=settings)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    environ = {**environment(), "DJANGO_SETTINGS_MODULE": settings}
    server = [sys.executable, "-m", "uvicorn", "site_asgi:application", "--port", str(port)]
    with (
        running(server, port, directory=directory, log=directory / "log", environ=environ),
        proxy(KINDS[kind], directory, port, text=text) as front,
    ):
        done = manage(directory, "downloadview_check", f"http://127.0.0.1:{front}", *ADA, *FILES, settings=settings)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].endswith("0 FAIL, 0 skip")


@pytest.mark.parametrize(
    ("rules", "proxy", "reason"),
    [
        ("[{'source_url': '/media/', 'destination_url': '/_files/'}]", "nginx", "give it an absolute source_dir"),
        ("[{'source_dir': 'invoices', 'destination_url': '/_files/'}]", "nginx", "give it an absolute source_dir"),
        ("[]", "nginx", "there is no rule in settings.DOWNLOADVIEW"),
        ("[{'source_dir': '/srv', 'destination_url': '/_files/'}]", "apache", "needs the backend 'apache'"),
    ],
)
def test_rules_that_the_proxy_cannot_have_are_named(directory: Path, rules: str, proxy: str, reason: str) -> None:
    text = f"from site_settings import *\nDOWNLOADVIEW = {{'BACKEND': 'nginx', 'RULES': {rules}}}\n"
    (directory / "wrong_settings.py").write_text(text)
    done = manage(directory, "downloadview_config", proxy, settings="wrong_settings")
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_rule_for_the_urls_of_the_media_has_their_directory(directory: Path) -> None:
    text = "from site_settings import *\nMEDIA_ROOT, MEDIA_URL = '/srv/media', '/media/'\n"
    text += "DOWNLOADVIEW['RULES'] = [{'source_url': '/media/a%20b/', 'destination_url': '/_files/'}]\n"
    (directory / "media_settings.py").write_text(text)
    done = manage(directory, "downloadview_config", "nginx", "--max-body", "64000000", settings="media_settings")
    assert '"/srv/media/a b/"' in done.stdout
    assert "client_max_body_size 62500k;" in done.stdout
