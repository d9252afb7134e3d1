"""Redirects to a real nginx that checks them by secure_link, with the configuration of the documentation."""

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from downloadview_async import signer_of
from tests.live import Answer, ask
from tests.pages import DOCS, blocks
from tests.proxies.servers import KINDS, readable_directory
from tests.servers import free_port, serving, wait_for_text

SECRETS = {"2026a": "a secret/of+32=characters, or more"[:33].replace(" ", "-").replace(",", "."), "2026b": "s" * 32}
NAMES = [
    *("a.txt", "a b.txt", "é ü.txt", "100%.txt", "a+b.txt", "a%20b.txt", "a&b=c;d.txt", "a'b.txt", "日本.pdf"),
    *("sub/a.txt", "a#b?.txt", "x.svg", "x.html", "x.png", "noending", "a$uri.txt"),
]
AROUND = """
daemon off;
error_log stderr;
pid RUN/nginx.pid;
events {}
http {
    access_log off;
    client_body_temp_path RUN/body;
    proxy_temp_path RUN/proxy;
    fastcgi_temp_path RUN/fastcgi;
    uwsgi_temp_path RUN/uwsgi;
    scgi_temp_path RUN/scgi;
LINES
}
"""
SETTINGS = """
[sources.files]
type = "path"
root = "files"
names = "any"
[sources.files.edge]
kind = "nginx"
url = "http://127.0.0.1:{edge}/files/"
key_id = "2026b"
expires = "1h"
[[routes]]
path = "/saved/{{path:path}}"
source = "files"
send = "redirect"
[[routes]]
path = "/shown/{{path:path}}"
source = "files"
send = "redirect"
disposition = "inline"
"""


@dataclass(frozen=True)
class Site:
    edge: int
    service: int
    log: Path

    def get(self, port: int, target: str, method: str = "GET", **headers: str) -> Answer:
        return asyncio.run(ask(port, target, method=method, headers=headers))

    def redirected(self, target: str) -> str:
        """Return the request target at the edge."""
        answer = self.get(self.service, target)
        assert answer.status == 307, answer
        parts = urlsplit(answer.headers["location"])
        assert parts.netloc == f"127.0.0.1:{self.edge}"
        return f"{parts.path}?{parts.query}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with readable_directory() as directory:
        for name in NAMES:
            file = directory / "files" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{name}: 0123456789".encode())
        (directory / "files" / "private").write_bytes(b"outside")
        ((_, lines),) = blocks(DOCS / "howto" / "edge.md", "nginx")
        edge, service = free_port(), free_port()
        for old, new in (
            ("listen 8080;", f"listen 127.0.0.1:{edge};"),
            ("/srv/files/", f"{directory}/files/"),
            ("the-secret-of-2026a", SECRETS["2026a"]),
            ("the-secret-of-2026b", SECRETS["2026b"]),
        ):
            assert old in lines, f"the page has no {old!r}"
            lines = lines.replace(old, new)
        config = directory / "edge.conf"
        config.write_text(AROUND.replace("LINES", lines).replace("RUN", str(directory)))
        settings = directory / "downloadview.toml"
        settings.write_text(SETTINGS.format(edge=edge))
        command = [
            sys.executable,
            "-m",
            "downloadview_async.cli",
            "serve",
            "--config",
            str(settings),
            "--port",
            str(service),
        ]
        secret = {"DOWNLOADVIEW_SOURCES__FILES__EDGE__SECRET": SECRETS["2026b"]}
        with (
            serving(KINDS["nginx"].command(directory, config), edge, log=directory / "edge.log", cwd=directory),
            serving(command, service, log=directory / "service.log", env=secret, cwd=directory),
        ):
            yield Site(edge, service, directory / "service.log")


@pytest.mark.parametrize("name", NAMES)
def test_nginx_sends_what_was_signed(site: Site, name: str) -> None:
    target = site.redirected(f"/saved/{quote(name)}")
    answer = site.get(site.edge, target)
    assert (answer.status, answer.body) == (200, f"{name}: 0123456789".encode())
    base = name.rpartition("/")[2]
    disposition = answer.headers["content-disposition"]
    assert re.fullmatch(r"attachment; filename\*=UTF-8''\S+", disposition)
    if "?" not in base:  # a name that no client could save is another one
        assert disposition.endswith(f"''{quote(base, safe='')}")
    ours = site.get(site.service, f"/saved/{quote(name)}", "HEAD")
    assert answer.headers["content-type"].replace(" ", "") == ours.headers["content-type"].replace(" ", "")
    assert answer.headers["x-content-type-options"] == "nosniff"
    part = site.get(site.edge, target, Range="bytes=0-1")
    assert (part.status, part.body) == (206, name.encode()[:2])


def test_files_that_are_shown_are_signed_for_that(site: Site) -> None:
    target = site.redirected("/shown/x.png")
    assert site.get(site.edge, target).headers["content-disposition"] == "inline; filename*=UTF-8''x.png"
    assert site.get(site.service, "/shown/x.html").status == 200  # with our Content-Security-Policy


def test_nginx_refuses_what_was_changed(site: Site) -> None:
    target = site.redirected("/saved/a.txt")
    changes = {
        "another file": target.replace("a.txt?", "private?"),
        "a file beside it": target.replace("/a.txt?", "/x.html?"),
        "shown": target.replace("disposition=attachment", "disposition=inline"),
        "another name": target.replace("filename=a.txt", "filename=a.exe"),
        "another type": target.replace("type=text/plain", "type=text/html"),
        "another type first": target.replace("?", "?type=text/html&", 1),
        "later": re.sub(r"expires=(\d+)", lambda found: f"expires={int(found[1]) + 1}", target),
        "another key": target.replace("key=2026b", "key=2026a"),
        "an unknown key": target.replace("key=2026b", "key=none"),
        "no key": target.replace("&key=2026b", ""),
        "no signature": re.sub("md5=[^&]+&", "", target),
        "nothing": "/files/a.txt",
    }
    assert site.get(site.edge, target).status == 200
    for what, changed in changes.items():
        assert changed != target, what
        assert site.get(site.edge, changed).status == 403, what
    # a second value after the signed one is not read
    more = site.get(site.edge, f"{target}&type=text/html&disposition=inline")
    assert more.headers["content-type"].startswith("text/plain")
    assert more.headers["content-disposition"].startswith("attachment")


def test_both_keys_are_accepted_while_they_are_rotated_and_none_after_its_time(site: Site) -> None:
    headers = {"content-type": "text/plain", "content-disposition": 'attachment; filename="a.txt"'}
    for key_id, secret in SECRETS.items():
        signer = signer_of("nginx", f"http://127.0.0.1:{site.edge}/files/", secret=secret, key_id=key_id)
        for now, status in ((time.time(), 200), (time.time() - 61, 410)):
            made = signer.sign("a.txt", headers, now=now, seconds=60)
            assert made is not None
            parts = urlsplit(made.url)
            assert site.get(site.edge, f"{parts.path}?{parts.query}").status == status


def test_the_service_logs_no_secret_and_no_signature(site: Site) -> None:
    target = site.redirected("/saved/x.png")
    signature = re.search("md5=([^&]+)", target)
    assert signature is not None
    wait_for_text(site.log, "/saved/x.png")  # a thread writes it
    log = site.log.read_text()
    assert signature[1] not in log
    assert SECRETS["2026b"] not in log
    assert "cannot carry" not in log  # this edge carries all
