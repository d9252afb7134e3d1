"""Links that a real nginx verifies from the printed configuration, while the service does not run."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pytest

from downloadview_async import Grant, URLSigner
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.settings import OffloadSettings
from tests.live import Answer, ask, live, make_old
from tests.proxies.servers import KINDS, proxy, readable_directory
from tests.servers import free_port

COMMAND = [sys.executable, "-m", "downloadview_async.cli"]
SECRETS = {"2026b": "s" * 32, "A.b": "t" * 32}
SETTINGS = """
[server]
root_path = "/dl"
port = {service}
[links]
keys = "links.keys"
[sources.files]
type = "path"
root = "my files"
[[routes]]
path = "/saved/{{path:path}}"
source = "files"
access = ["secure_link"]
hide = [".*", "*.KEY", "saved"]
headers = {{ X-Robots-Tag = 'no"index' }}
[[routes]]
path = "/shown/{{path:path}}"
source = "files"
access = ["secure_link"]
disposition = "inline"
[offload]
backend = "nginx"
"""
NAMES = [
    *("a.txt", "a b.txt", "é ü.txt", "100%.txt", "a+b.txt", "a%20b.txt", "a&b=c;d.txt", "a'b.txt", "日本.pdf"),
    *("sub/a.txt", "a#b?.txt", "x.svg", "x.html", "x.png", "noending"),
]


@dataclass(frozen=True)
class Site:
    directory: Path
    port: int

    def get(self, link: str, method: str = "GET", **headers: str) -> Answer:
        return asyncio.run(ask(self.port, link, method=method, headers=headers))

    def sign(self, name: str, route: str = "saved", *, key: str = "2026b", ago: int = 0) -> str:
        signer = URLSigner({key: SECRETS[key]})
        link = signer.sign(f"/dl/{route}/{name}", format="secure_link")
        if not ago:
            return link
        path = f"/dl/{route}/{name}"
        query = signer._formats["secure_link"].query(path, Grant(expires=int(time.time()) - ago), None)
        return f"{quote(path)}?{query}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with readable_directory() as directory:
        files = directory / "my files"
        for name in [*NAMES, ".env", "sub/.git/config", "server.key", "sub/saved"]:
            file = files / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{name}: 0123456789".encode())
        (files / "outside.txt").symlink_to("/etc/hostname")
        make_old(files)  # a file that may still change within its second has no Last-Modified
        (directory / "links.keys").write_text("".join(f"{name} {secret}\n" for name, secret in SECRETS.items()))
        config = directory / "downloadview.toml"
        config.write_text(SETTINGS.format(service=free_port()))  # nothing listens there
        port = free_port()
        text = printed(directory, "--listen", f"127.0.0.1:{port}")
        secrets = printed(directory, "--link-secrets")
        assert all(secret not in text and secret not in secrets for secret in SECRETS.values())
        (directory / "downloadview-links.conf").write_text(secrets)
        include = f"include {directory}/downloadview-links.conf;"
        text = text.replace("include downloadview-links.conf;", include)
        assert include in text
        with proxy(KINDS["nginx"], directory, 0, port=port, text=lambda *_: text):
            yield Site(directory, port)


def printed(directory: Path, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
    command = [*COMMAND, "config", "nginx", "--config", str(directory / "downloadview.toml"), *arguments]
    run = subprocess.run(command, cwd=directory, env=environ, capture_output=True, timeout=30, check=True)
    return run.stdout.decode()


@pytest.mark.parametrize("name", NAMES)
def test_a_link_to_any_name(site: Site, name: str) -> None:
    answer = site.get(site.sign(name))
    assert (answer.status, answer.body) == (200, f"{name}: 0123456789".encode())
    assert answer.headers["content-disposition"].endswith(f"''{quote(name.rpartition('/')[2])}")


def test_a_range_and_other_methods(site: Site) -> None:
    link = site.sign("a.txt")
    answer = site.get(link, Range="bytes=0-4")
    assert (answer.status, answer.body, answer.headers["content-range"]) == (206, b"a.txt", "bytes 0-4/17")
    assert site.get(link, Range="bytes=99-").status == 416
    assert (site.get(link, "HEAD").status, site.get(link, "HEAD").headers["content-length"]) == (200, "17")
    assert site.get(link, **{"If-None-Match": site.get(link).headers["etag"]}).status == 304
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert site.get(link, method).status == 405


def test_every_byte_counts(site: Site) -> None:
    link = site.sign("é ü.txt").encode()

    async def accepted() -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        good = []
        for position in range(1, len(link)):
            for value in {link[position] ^ 0x20, link[position] ^ 1, *b"A0-/%?&=.;+"} - {link[position]}:
                changed = link[:position] + bytes([value]) + link[position + 1 :]
                if not changed.isascii() or b" " in changed:
                    continue
                writer.write(b"HEAD %b HTTP/1.1\r\nHost: test\r\n\r\n" % changed)
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 200 " in head or b" 206 " in head:
                    good.append(changed)
                if b"Connection: close" in head:
                    writer.close()
                    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.close()
        return good

    assert asyncio.run(accepted()) == []


def test_other_spellings_of_a_link(site: Site) -> None:
    link = site.sign("sub/a.txt")
    path, query = link.split("?")
    md5, expires, key = query.split("&")
    for other in [
        path,
        f"{path}?",
        f"{path}?{md5}&{key}",
        f"{path}?{expires}&{md5}&{key}",
        f"{path}?{md5}&{expires}",
        f"{path}?{query}&x=1",
        f"{path}?x=1&{query}",
        f"{path}?{query}&{md5}",
        f"{path}?{query}&client=1",
        f"{path}?{md5}==&{expires}&{key}",
        f"{path}?{md5.replace('md5', 'MD5')}&{expires}&{key}",
        f"{path}?{md5}&{expires}&key=other",
        f"{path}?{md5}&{expires}&key=A.b",
        link.replace("/sub/a", "/sub//a"),
        link.replace("/sub/a", "/sub/./a"),
        link.replace("/sub/a", "/sub/x/../a"),
        link.replace("/sub/a", "/sub/%61"),
        link.replace("/saved/", "/shown/"),
    ]:
        answer = site.get(other)
        assert (answer.status, answer.body) == (403, b"Forbidden"), other
        assert answer.headers["cache-control"] == "private, no-store"


def test_a_key_that_is_not_known_has_no_secret(site: Site) -> None:
    signer = URLSigner({"x": "x" * 32})
    format_ = signer._formats["secure_link"]
    format_._secrets["x"] = ""  # type: ignore[attr-defined]
    assert site.get(signer.sign("/dl/saved/a.txt", format="secure_link")).status == 403
    assert site.get(URLSigner({"a.b": SECRETS["A.b"]}).sign("/dl/saved/a.txt", format="secure_link")).status == 403


def test_each_key_verifies(site: Site) -> None:
    assert site.get(site.sign("a.txt", key="A.b")).status == 200


def test_a_link_that_has_expired(site: Site) -> None:
    answer = site.get(site.sign("a.txt", ago=10))
    assert (answer.status, answer.body) == (410, b"Gone")
    assert answer.headers["cache-control"] == "private, no-store"


def test_a_link_for_one_client(site: Site) -> None:
    signer = URLSigner(SECRETS)
    link = signer.sign("/dl/saved/a.txt", client="127.0.0.1", format="secure_link")
    assert site.get(link).status == 200
    assert site.get(link.removesuffix("&client=1")).status == 403
    assert site.get(signer.sign("/dl/saved/a.txt", client="192.0.2.1", format="secure_link")).status == 403


@pytest.mark.parametrize(
    "name", [".env", "sub/.git/config", "server.key", "sub/saved", "no.txt", "sub", "sub/", "", "outside.txt"]
)
def test_what_is_not_there(site: Site, name: str) -> None:
    answer = site.get(site.sign(name))
    assert (answer.status, answer.body) == (404, b"Not Found")


@pytest.mark.parametrize("route", ["saved", "shown"])
def test_the_service_verifies_the_same_links_and_sends_the_same_headers(site: Site, route: str) -> None:
    async def both() -> None:
        settings = load_settings(site.directory / "downloadview.toml", environ={})
        async with live(build(replace(settings, offload=OffloadSettings())), root_path="/dl") as port:
            for name in NAMES:
                link = site.sign(name, route)
                ours, other = await ask(port, link.removeprefix("/dl")), await ask(site.port, link)
                assert (ours.status, ours.body) == (other.status, other.body) == (200, other.body)
                same = ("cache-control", "x-content-type-options", "content-security-policy", "x-robots-tag")
                for header in (*same, "content-type", "content-length", "last-modified", "accept-ranges"):
                    assert ours.headers.get(header) == other.headers.get(header), (name, header)
                kind = ours.headers["content-disposition"].partition(";")[0]
                assert other.headers["content-disposition"].startswith(f"{kind};")
            assert (await ask(port, f"/{route}/a.txt")).status == 403
            assert (await ask(port, site.sign("a.txt", route, ago=10).removeprefix("/dl"))).status == 410

    asyncio.run(both())
