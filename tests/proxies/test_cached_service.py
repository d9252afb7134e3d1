"""The service with a cache, from its settings file to the client, behind proxies that send what the cache has."""

import asyncio
import grp
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from downloadview_async.http.fields import OFFLOAD_HEADERS
from tests.live import Answer, ask
from tests.proxies.servers import KINDS, proxy, readable_directory, running
from tests.s3 import KEY_ID, S3, SECRET
from tests.servers import free_port

CONTENT = os.urandom(300_001)
SETTINGS = """
[sources.lake]
type = "storage"
url = "s3://downloads/cached"
[sources.lake.options]
endpoint = "{url}"
access_key_id = "{key}"
secret_access_key = "{secret}"
[sources.lake.cache]
path = "cache"
max_bytes = "10GiB"
max_age = "1d"
[[routes]]
path = "/lake/{{path:path}}"
source = "lake"
cache_control = "private"
archive = true
[offload]
backend = "{backend}"
[[offload.rules]]
source = "cache"
{target}
"""
CONFIGURED = {
    "nginx": (("location /_files/", "location /_cache/"), ("alias app/files/", "alias cache/")),
    "apache": (("/app/files", "/cache"),),
}


def _as_configured(kind: str, text: str) -> str:
    """Return the proxy's configuration with the cache's directory in place of the demo's."""
    for old, new in CONFIGURED[kind]:
        assert old in text
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Running:
    kind: str
    directory: Path
    port: int
    service: int

    def get(self, path: str, *, direct: bool = False, **headers: str) -> Answer:
        """Send one request to the proxy, or to the service itself."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return asyncio.run(ask(self.service if direct else self.port, path, headers=named))

    def fill(self, path: str = "/lake/a.txt") -> Answer:
        """Ask for the file for the first time, and return the answer when the file is kept."""
        first = self.get(path)
        deadline = time.monotonic() + 30
        while not list((self.directory / "cache").glob("*.meta")):
            assert time.monotonic() < deadline, "nothing is kept"
            time.sleep(0.01)
        return first

    @property
    def counters(self) -> dict[str, int]:
        """What the service says of its cache."""
        counted: dict[str, dict[str, int]] = json.loads(self.get("/-/cache", direct=True).body)
        return counted["lake"]


@contextmanager
def serving(kind: str, s3: S3, umask: str, group: int | None = None) -> Iterator[Running]:
    """Run the service with this umask, and a proxy; group: the one that the cache's directory is of."""
    with ExitStack() as stack:
        directory = stack.enter_context(readable_directory())
        target = 'target = "/_cache/"' if kind == "nginx" else ""
        (directory / "downloads.toml").write_text(
            SETTINGS.format(url=s3.url, key=KEY_ID, secret=SECRET, backend=kind, target=target)
        )
        if group is not None:
            (directory / "cache").mkdir()
            os.chown(directory / "cache", -1, group)
            (directory / "cache").chmod(0o2750)
        service = free_port()
        serve = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "downloads.toml"]
        command = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *serve, "--port", str(service)]
        stack.enter_context(running(command, service, directory=directory, log=directory / "log"))
        port = stack.enter_context(proxy(KINDS[kind], directory, service, edit=lambda text: _as_configured(kind, text)))
        yield Running(kind, directory, port, service)


@pytest.mark.parametrize("kind", list(CONFIGURED))
def test_a_store_behind_a_cache_behind_a_proxy(kind: str, s3: S3) -> None:
    s3.put("cached/a.txt", CONTENT, content_type="text/x-log")
    with serving(kind, s3, "022") as site:
        assert (site.get("/-/readyz", direct=True).status, site.get("/lake/none.txt").status) == (200, 404)
        first = site.fill()
        assert (first.status, first.body == CONTENT, first.complete) == (200, True, True)
        s3.delete("cached/a.txt")  # whoever sends it from now on has it from the cache

        direct = site.get("/lake/a.txt", direct=True)
        assert (direct.status, direct.body) == (200, b"")
        (order,) = OFFLOAD_HEADERS & {*direct.headers}
        kept = site.directory / "cache" / direct.headers[order].rpartition("/")[2]
        assert kept.read_bytes() == CONTENT

        before = site.counters
        whole = site.get("/lake/a.txt")
        assert (whole.status, whole.body == CONTENT, whole.complete) == (200, True, True)
        part = site.get("/lake/a.txt", Range="bytes=-1000", If_Range=whole.headers["etag"])
        assert (part.status, part.body) == (206, CONTENT[-1000:])
        current = site.get("/lake/a.txt", If_None_Match=whole.headers["etag"])
        assert (current.status, current.body) == (304, b"")
        for answer in (first, whole, part):
            assert answer.headers["content-type"] == "text/x-log"
            assert answer.headers["content-disposition"] == 'attachment; filename="a.txt"'
            assert answer.headers["cache-control"] == "private"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert not OFFLOAD_HEADERS & {*answer.headers}
        assert site.counters == {**before, "hits": before["hits"] + 3}

        for path in (f"/_cache/{kept.name}", f"/cache/{kept.name}", f"/{kept.name}", f"/lake/{kept.name}"):
            assert site.get(path).status == 404


@pytest.mark.parametrize("kind", list(CONFIGURED))
def test_an_archive_behind_a_cache_behind_a_proxy(kind: str, s3: S3) -> None:
    folder = f"archive-{kind}"
    s3.put(f"cached/{folder}/a.txt", CONTENT)
    s3.put(f"cached/{folder}/b/c.txt", b"c")
    url = f"/lake/{folder}/?archive=zip"
    with serving(kind, s3, "022") as site:
        first = site.fill(url)
        assert (first.status, first.complete) == (200, True)
        with zipfile.ZipFile(io.BytesIO(first.body)) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == [f"{folder}/", f"{folder}/a.txt", f"{folder}/b/", f"{folder}/b/c.txt"]
        deadline = time.monotonic() + 30
        while (direct := site.get(url, direct=True)).body:  # the files in it are kept before the archive itself
            assert time.monotonic() < deadline, "the archive is not kept"
        assert direct.status == 200
        assert len(OFFLOAD_HEADERS & {*direct.headers}) == 1
        whole = site.get(url)
        assert (whole.status, whole.body == first.body, whole.complete) == (200, True, True)
        for answer in (first, whole):
            assert answer.headers["content-type"] == "application/zip"
            assert answer.headers["content-disposition"] == f'attachment; filename="{folder}.zip"'
        part = site.get(url, Range="bytes=-1000", If_Range=whole.headers["etag"])
        assert (part.status, part.body == first.body[-1000:]) == (206, True)
        s3.put(f"cached/{folder}/b/c.txt", b"changed")
        changed = site.get(url, If_None_Match=whole.headers["etag"])
        assert changed.status == 200
        with zipfile.ZipFile(io.BytesIO(changed.body)) as archive:
            assert archive.read(f"{folder}/b/c.txt") == b"changed"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a directory to the group of the proxy")
@pytest.mark.parametrize("kind, group", [("nginx", "users"), ("apache", "www-data")])
def test_the_proxy_has_to_be_able_to_read_what_is_kept(kind: str, group: str, s3: S3) -> None:
    """A page says how: by the umask, or by a directory of the proxy's group."""
    s3.put("cached/a.txt", CONTENT)
    for umask, directory_of, readable in (("077", None, False), ("027", None, False), ("027", group, True)):
        with serving(kind, s3, umask, None if directory_of is None else grp.getgrnam(directory_of).gr_gid) as site:
            assert site.fill().body == CONTENT
            answer = site.get("/lake/a.txt")
            assert (answer.status, answer.body == CONTENT) == ((200, True) if readable else (404, False))
