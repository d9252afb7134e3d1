"""The recipes for shared caches in `deploy/`, on the real servers: Varnish, and nginx with slices."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from downloadview_async.service.app import build
from tests.live import Answer, ask, live, make_old
from tests.proxies.conftest import PRIVATE_PAGES
from tests.proxies.servers import DEPLOY, _system_program, readable_directory, running
from tests.servers import free_port
from tests.service.loading import load

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]
VARNISH_REMEDY = "Varnish: varnishd is not installed; apt-get install varnish"
NGINX_REMEDY = "nginx with slices: nginx is not installed; apt-get install nginx"
MIB = 1 << 20
OLD = os.urandom(3 * MIB + 5)
NEW = os.urandom(3 * MIB + 7)
SETTINGS = """
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{path:path}"
source = "files"
cache_control = "public, max-age=600"
[[routes]]
path = "/private/{path:path}"
source = "files"
cache_control = "private, max-age=600"
"""


class Site:
    """The service behind a shared cache. requests: what the service has got: the path and the Range."""

    def __init__(self, directory: Path) -> None:
        self.files = directory / "files"
        self.files.mkdir()
        self.write(OLD)
        self.requests: list[tuple[str, str]] = []
        self.is_failing = False
        self.port = 0
        self._app = build(load(directory, SETTINGS))

    def write(self, content: bytes) -> None:
        """Write the file, in the place of another version."""
        new = self.files.parent / "new"
        new.write_bytes(content)
        new.replace(self.files / "a.bin")
        if content is OLD:
            make_old(self.files)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Count and answer a request."""
        if scope["type"] == "http" and not scope["path"].startswith("/-/"):
            self.requests.append((scope["path"], dict(scope["headers"]).get(b"range", b"").decode()))
            if self.is_failing:
                await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)

    async def get(self, path: str = "/files/a.bin", *, method: str = "GET", **headers: str) -> Answer:
        """Ask the cache."""
        return await ask(
            self.port, path, method=method, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


@asynccontextmanager
async def cached_by(kind: str, directory: Path) -> AsyncIterator[Site]:
    site, site.port = Site(directory), free_port()
    async with live(site) as service:
        with readable_directory() as run:
            if kind == "varnish":
                program = _system_program("varnishd", VARNISH_REMEDY)
                text = (DEPLOY / "varnish" / "downloads.vcl").read_text().replace('"8000"', f'"{service}"')
                command = [program, "-F", "-a", f"127.0.0.1:{site.port}", "-n", f"{run}/varnish"]
                command += ["-f", f"{run}/cache.conf", "-s", "malloc,64m", "-p", "http_gzip_support=off"]
            else:
                program = _system_program("nginx", NGINX_REMEDY)
                text = (DEPLOY / "nginx" / "slice.conf").read_text()
                text = re.sub(r"\b8000\b", str(service), re.sub(r"\b8080\b", str(site.port), text))
                text = text.replace("/tmp/downloadview-slice", f"{run}/slice")
                command = [program, "-e", "stderr", "-p", str(run), "-c", f"{run}/cache.conf"]
            (run / "cache.conf").write_text(text)
            server = running(command, site.port, directory=run, log=run / "log")
            await asyncio.to_thread(server.__enter__)
            try:
                yield site
            finally:
                await asyncio.to_thread(server.__exit__, None, None, None)


KINDS = ["varnish", "nginx"]


@pytest.mark.parametrize("kind", KINDS)
async def test_ranges_and_resumes_come_from_the_cache(tmp_path: Path, kind: str) -> None:
    async with cached_by(kind, tmp_path) as site:
        whole = await site.get()
        assert (whole.status, whole.body) == (200, OLD)
        tag = whole.headers["etag"]
        assert re.fullmatch('"[^"]+"', tag)  # a strong one, of the service
        assert whole.headers["x-content-type-options"] == "nosniff"
        asked = len(site.requests)
        assert asked == (1 if kind == "varnish" else 4)
        for spec, start, stop in (
            ("0-0", 0, 1),
            (f"{MIB - 1}-{2 * MIB}", MIB - 1, 2 * MIB + 1),  # of three slices
            (f"{MIB}-", MIB, len(OLD)),
            ("-5", len(OLD) - 5, len(OLD)),
        ):
            for condition in ({}, {"If_Range": tag}):
                part = await site.get(Range=f"bytes={spec}", **condition)
                assert (part.status, part.body, part.headers["etag"]) == (206, OLD[start:stop], tag)
                assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(OLD)}"
        other = await site.get(Range="bytes=5-", If_Range='"another"')
        assert (other.status, other.body) == (200, OLD)
        assert (await site.get(If_None_Match=tag)).status == 304
        assert (await site.get(Range=f"bytes={len(OLD)}-")).status == 416
        head = await site.get(method="HEAD")
        assert (head.status, head.headers["content-length"], head.headers["etag"]) == (200, f"{len(OLD)}", tag)
        assert len(site.requests) == asked or kind == "nginx"  # which asks for a slice that does not exist


async def test_a_206_is_assembled_from_the_slices_that_it_needs(tmp_path: Path) -> None:
    async with cached_by("nginx", tmp_path) as site:
        part = await site.get(Range=f"bytes={MIB + 5}-{2 * MIB + 5}")
        assert (part.status, part.body) == (206, OLD[MIB + 5 : 2 * MIB + 6])
        assert re.fullmatch('"[^"]+"', part.headers["etag"])
        assert site.requests == [
            ("/files/a.bin", f"bytes={MIB}-{2 * MIB - 1}"),
            ("/files/a.bin", f"bytes={2 * MIB}-{3 * MIB - 1}"),
        ]
        parts = [site.get(Range=f"bytes={index}-{index + 9}") for index in range(0, MIB, MIB // 16)]
        assert {answer.status for answer in await asyncio.gather(*parts)} == {206}
        assert site.requests[2:] == [("/files/a.bin", f"bytes=0-{MIB - 1}")]  # once for all


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_that_changes_is_never_mixed_and_can_be_purged(tmp_path: Path, kind: str) -> None:
    async with cached_by(kind, tmp_path) as site:
        first = await site.get(Range="bytes=0-9")
        tag = first.headers["etag"]
        if kind == "varnish":
            assert (await site.get()).body == OLD  # it has the whole file now
        site.write(NEW)
        mixed = await site.get()
        if kind == "varnish":
            assert mixed.body == OLD
            purged = await site.get(method="PURGE")
            assert purged.status == 200
        else:  # the first slice is of the old version: the transfer is aborted where the new one begins
            assert not mixed.complete
            assert mixed.body == OLD[: len(mixed.body)]
            refreshed = await site.get(X_Refresh_Key="change-this-secret")
            assert (refreshed.status, refreshed.body) == (200, NEW)
        whole = await site.get()
        assert (whole.status, whole.body) == (200, NEW)
        assert whole.headers["etag"] != tag
        resumed = await site.get(Range="bytes=10-", If_Range=tag)
        assert (resumed.status, resumed.body) == (200, NEW)
        part = await site.get(Range="bytes=10-", If_Range=whole.headers["etag"])
        assert (part.status, part.body) == (206, NEW[10:])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_question_mark_in_a_name_is_no_query(tmp_path: Path, kind: str) -> None:
    async with cached_by(kind, tmp_path) as site:
        (site.files / "a").write_bytes(b"of a")
        (site.files / "a?b").write_bytes(b"of a?b")
        make_old(site.files)
        for _ in range(2):
            assert (await site.get("/files/a%3Fb")).body == b"of a?b"
            assert (await site.get("/files/a?b")).body == b"of a"
        assert len(site.requests) == 2


async def test_varnish_bans_all_below_a_path(tmp_path: Path) -> None:
    async with cached_by("varnish", tmp_path) as site:
        for name in ("b.txt", "bxtxt"):
            (site.files / name).write_bytes(b"content")
        for path in ("/files/a.bin", "/files/b.txt", "/files/bxtxt"):
            await site.get(path)
        assert (await site.get("/files/b.", method="BAN")).status == 200
        site.requests.clear()
        for path in ("/files/a.bin", "/files/b.txt", "/files/bxtxt"):
            await site.get(path)
        assert [path for path, _ in site.requests] == ["/files/b.txt"]


@pytest.mark.parametrize("kind", KINDS)
async def test_private_answers_and_pages_are_not_kept(tmp_path: Path, kind: str) -> None:
    async with cached_by(kind, tmp_path) as site:
        for _ in range(3):
            assert (await site.get("/private/a.bin")).body == OLD
        assert len(site.requests) == 3
        part = await site.get("/private/a.bin", Range="bytes=5-9")
        assert (part.status, part.body) == (206, OLD[5:10])
        for page in PRIVATE_PAGES:
            answer = await site.get(page)
            assert answer.status in (400, 404), page
        assert (await site.get("/-/livez")).status == 200
        missing = await site.get("/files/missing")
        assert missing.status == 404
        (site.files / "missing").write_bytes(b"now it is there")
        assert (await site.get("/files/missing")).body == b"now it is there"


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_kept_is_sent_while_the_service_fails(tmp_path: Path, kind: str) -> None:
    async with cached_by(kind, tmp_path) as site:
        assert (await site.get()).body == OLD
        site.is_failing = True
        assert (await site.get()).body == OLD
        assert (await site.get("/files/other")).status == 503
