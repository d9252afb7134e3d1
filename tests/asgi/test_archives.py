"""`?archive=zip`: archives of folders and selections, for the clients that may have them."""

import asyncio
import contextlib
import io
import os
import socket
import struct
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvloop
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn import sendfile as sendfile_module
from downloadview_async.asgi.uvicorn.turns import turn
from downloadview_async.policy.access import CoversBelow
from downloadview_async.sources import archive as archive_module
from tests.descriptors import open_paths
from tests.live import Answer, Watched, ask, ask_in_a_row, ask_raw, live, parse
from tests.observed import Observed

pytestmark = pytest.mark.asyncio
SIGNER = dv.URLSigner({"2026a": bytes(range(32))})
FILES = {
    "reports/2026/june.pdf": b"june" * 99,
    "reports/a.txt": b"a",
    "reports/.env": b"secret",
    "reports/.git/config": b"secret",
    "b.txt": b"bb",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000,) * 2)
    (tmp_path / "reports/empty").mkdir()
    return tmp_path


def application(root: Path, archive: bool | dv.ArchiveOptions = True, **options: Any) -> ASGIApp:
    download = dv.Download(dv.PathSource(root), archive=archive, hide=[".*"], **options)
    return Starlette(routes=[Route("/files/{path:path}", download), Mount("/mounted", download)])


def names_of(answer: Answer) -> list[str]:
    assert answer.status == 200, answer
    assert answer.complete
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.testzip() is None
        return archive.namelist()


REPORTS = ["reports/", "reports/2026/", "reports/2026/june.pdf", "reports/a.txt", "reports/empty/"]


@pytest.mark.parametrize("prefix", ["/files/", "/mounted/"])
@pytest.mark.parametrize("listing", [False, True])
async def test_a_folder_a_selection_and_the_top(root: Path, prefix: str, listing: bool) -> None:
    async with live(application(root, listing=listing)) as port:
        for path, names, name in (
            ("reports?archive=zip", REPORTS, "reports.zip"),
            ("reports/?archive=zip", REPORTS, "reports.zip"),
            ("reports//2026/?archive=zip&x=1", ["2026/", "2026/june.pdf"], "2026.zip"),
            ("?archive=zip", ["b.txt", *REPORTS], "archive.zip"),
            (
                "reports/?archive=zip&name=a.txt&name=2026/&name=a.txt",
                ["2026/", "2026/june.pdf", "a.txt"],
                "reports.zip",
            ),
            ("?archive=zip&name=b%2Etxt", ["b.txt"], "archive.zip"),
        ):
            answer = await ask(port, f"{prefix}{path}")
            assert names_of(answer) == names
            assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
            assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "nothing/?archive=zip",
        "b.txt?archive=zip",
        "reports/.git/?archive=zip",
        ".git?archive=zip",
        "reports/?archive=zip&name=.env",
        "reports/?archive=zip&name=..",
        "reports/?archive=zip&name=../b.txt",
        "reports/?archive=zip&name=2026/june.pdf",
        "reports/?archive=zip&name=",
        "reports/?archive=zip&name=a.txt%00",
        "reports/?archive=zip&name=%ff",
        "%2e%2e/?archive=zip",
        "reports%00/?archive=zip",
        "reports?archive=tar",
    ],
)
async def test_everything_else_is_the_same_404(root: Path, path: str) -> None:
    async with live(application(root)) as port:
        missing = await ask(port, "/files/missing.txt")
        answer = await ask(port, f"/files/{path}")
    assert (answer.status, answer.body) == (404, missing.body)


@pytest.mark.parametrize("listing", [False, True])
@pytest.mark.parametrize("path", ["reports/?archive=tar", "?archive", "none/?archive=tar"])
async def test_another_archive_of_a_folder_tells_which_one_there_is(root: Path, path: str, listing: bool) -> None:
    async with live(application(root, listing=listing)) as port:
        answer = await ask(port, f"/files/{path}")
        file = await ask(port, "/files/b.txt?archive=tar")
    assert (answer.status, answer.body) == (404, b"Not Found: the archive of a folder is at archive=zip")
    assert file.body == b"bb"


async def test_without_the_option_there_is_none(root: Path) -> None:
    async with live(application(root, archive=False)) as port:
        assert (await ask(port, "/files/reports/?archive=zip")).status == 404
        assert (await ask(port, "/files/b.txt?archive=zip")).body == b"bb"


async def test_head_tells_the_length_and_the_tag_and_ranges_have_the_same_bytes(root: Path) -> None:
    url = "/files/reports/?archive=zip"
    async with live(application(root)) as port:
        head = await ask(port, url, method="HEAD")
        whole = await ask(port, url)
    assert head.headers["etag"] == whole.headers["etag"]
    assert not whole.headers["etag"].startswith("W/")
    assert int(head.headers["content-length"]) == len(whole.body)
    async with live(application(root)) as port:  # as after a restart
        tag, size = whole.headers["etag"], len(whole.body)
        part = await ask(port, url, headers={"Range": f"bytes=100-{size - 90}", "If-Range": tag})
        assert (part.status, part.body) == (206, whole.body[100 : size - 89])
        assert part.headers["content-range"] == f"bytes 100-{size - 90}/{size}"
        end = await ask(port, url, headers={"Range": "bytes=-50"})
        assert (end.status, end.body) == (206, whole.body[-50:])
        other = await ask(port, url, headers={"Range": "bytes=100-", "If-Range": '"other"'})
        assert (other.status, other.body) == (200, whole.body)
        several = await ask(port, url, headers={"Range": "bytes=0-9, 100-109,-20"})
        assert several.status == 206
        assert all(part in several.body for part in (whole.body[:10], whole.body[100:110], whole.body[-20:]))
        assert (await ask(port, url, headers={"If-None-Match": tag})).status == 304
        assert (await ask(port, url, headers={"Range": f"bytes={size}-"})).status == 416
        (root / "reports/a.txt").write_bytes(b"z")
        changed = await ask(port, url, headers={"Range": "bytes=100-", "If-Range": tag})
        assert (changed.status, changed.headers["etag"] == tag) == (200, False)


async def test_the_limit_is_told_before_anything_is_read(root: Path) -> None:
    options = dv.ArchiveOptions(limits=dv.ArchiveLimits(files=3))
    async with live(application(root, options)) as port:
        answer = await ask(port, "/files/reports/?archive=zip")
        assert answer.status == 413
        assert answer.body.endswith(b": it would have more than 3 files and folders, the limit")
        assert names_of(await ask(port, "/files/reports/2026/?archive=zip"))


async def test_the_limit_is_told_by_a_cache_too(root: Path, tmp_path: Path) -> None:
    cache = dv.Cache(tmp_path / "cache")
    options = dv.ArchiveOptions(limits=dv.ArchiveLimits(files=3), cache=cache, name="files")
    async with live(application(root, options)) as port:
        answer = await ask(port, "/files/reports/?archive=zip")
    assert answer.status == 413
    assert answer.body.endswith(b": it would have more than 3 files and folders, the limit")
    await cache.aclose()


async def test_access_decides_about_the_folder_and_about_each_name_below(root: Path) -> None:
    seen: list[str] = []

    async def allow(request: Request, name: str) -> bool:
        seen.append(name)
        return name.startswith("reports")

    async with live(application(root, access=allow)) as port:
        answer = await ask(port, "/files/reports/?archive=zip")
        assert names_of(answer) == REPORTS
        assert answer.headers["cache-control"] == "private"
        assert (await ask(port, "/files/?archive=zip")).status == 404
    assert seen == ["reports/", "reports/2026/", "reports/a.txt", "reports/empty/", "reports/2026/june.pdf", ""]


class Refusing:
    """Refuses some names, of which each request says more in a header, and notes all names that it is asked about."""

    def __init__(self, *refused: str, covers_below: bool = False) -> None:
        self.refused = refused
        self.asked: list[str] = []
        self.covers_below = covers_below

    async def __call__(self, request: Request, name: str) -> bool:
        self.asked.append(name)
        if name.endswith("/a.txt"):
            raise dv.AccessDenied("refused by an error")
        return name not in (*self.refused, request.headers.get("x-refused"))


NOT_REFUSED = ["reports/", "reports/empty/"]


@pytest.mark.parametrize("query", ["archive=zip", "archive=zip&name=empty", "archive=zip&name=2026&name=empty"])
async def test_an_archive_leaves_out_what_access_refuses(root: Path, query: str) -> None:
    access = Refusing("reports/2026/")
    async with live(application(root, access=access)) as port:
        for path in ("reports/", "/reports//", "./reports"):
            answer = await ask(port, f"/files/{path}?{query}")
            if "name=2026" in query:
                assert (answer.status, answer.body) == (404, b"Not Found")
            else:
                assert names_of(answer) == (["empty/"] if "name=" in query else NOT_REFUSED)
        head = await ask(port, f"/files/reports/?{query}", method="HEAD")
        assert (head.status, head.headers.get("etag")) == (answer.status, answer.headers.get("etag"))
    assert "reports/2026/june.pdf" not in access.asked


async def test_requests_that_may_have_different_files_share_no_archive(root: Path, tmp_path: Path) -> None:
    cache = dv.Cache(tmp_path / "cache", max_age=3600)
    for options in (True, dv.ArchiveOptions(cache=cache, name="files", per_client=None)):
        tags: dict[str, str] = {}
        async with live(application(root, options, access=Refusing())) as port:

            async def check(refused: str, names: list[str], port: int = port, tags: dict[str, str] = tags) -> None:
                answer = await ask(port, "/files/reports/?archive=zip", headers={"X-Refused": refused})
                assert names_of(answer) == names
                assert tags.setdefault(refused, answer.headers["etag"]) == answer.headers["etag"]

            for _ in range(3):
                async with anyio.create_task_group() as group:
                    for _ in range(2):
                        group.start_soon(check, "", [name for name in REPORTS if name != "reports/a.txt"])
                        group.start_soon(check, "reports/2026/", NOT_REFUSED)
                        group.start_soon(check, "reports/empty/", REPORTS[:3])
                while fetches := list(cache._running):
                    await asyncio.wait([fetch.task for fetch in fetches])
        assert len(set(tags.values())) == 3
    assert cache.counts["revalidated"]
    await cache.aclose()


async def test_an_access_that_covers_what_is_below_is_asked_once(root: Path) -> None:
    async def nobody(request: Request, name: str) -> bool:
        asked.append(name)
        return False

    asked: list[str] = []
    covering = Refusing("b.txt", covers_below=True)
    async with live(application(root, access=[nobody, covering])) as port:
        assert names_of(await ask(port, "/files/?archive=zip")) == ["b.txt", *REPORTS]
    assert asked == covering.asked == [""]
    # one that has refused the folder is not asked about what is below it
    covering, others = Refusing("", covers_below=True), Refusing("b.txt")
    async with live(application(root, access=[covering, others])) as port:
        assert names_of(await ask(port, "/files/?archive=zip")) == [name for name in REPORTS if name != "reports/a.txt"]
    assert covering.asked == [""]
    assert others.asked[0] == ""
    assert "reports/2026/june.pdf" in others.asked


@pytest.mark.parametrize("refused", [[], ["", "b.txt"]])
async def test_an_access_that_covers_what_is_below_may_allow_what_one_before_it_refuses(
    root: Path, refused: list[str]
) -> None:
    first, covering = Refusing("b.txt", "reports/empty/"), Refusing(*refused, covers_below=True)
    async with live(application(root, access=[first, covering])) as port:
        names = names_of(await ask(port, "/files/?archive=zip"))
        assert (await ask(port, "/files/b.txt")).status == (404 if refused else 200)
    refuses = ("b.txt", "reports/a.txt", "reports/empty/") if refused else ()
    assert names == [name for name in ["b.txt", *REPORTS] if name not in refuses]
    assert covering.asked == ["", "b.txt"]


async def test_users_and_links_are_not_asked_about_each_name() -> None:
    users = dv.ProxyUsers("X-User", trusted=["*"])
    for access in (users.allow("ada"), dv.SignedLinks(SIGNER)):
        assert isinstance(access, CoversBelow)
        assert access.covers_below is True


async def test_an_archive_ends_if_access_cannot_decide(root: Path) -> None:
    async def access(request: Request, name: str) -> bool:
        if name == "reports/2026/june.pdf":
            raise RuntimeError("the database does not answer")
        return True

    async with live(application(root, access=access)) as port:
        assert (await ask(port, "/files/reports/?archive=zip")).status == 503
        assert names_of(await ask(port, "/files/reports/empty/?archive=zip")) == ["empty/"]


async def test_the_limit_of_files_holds_before_access_is_asked(root: Path) -> None:
    access = Refusing("reports/2026/", "reports/empty/")
    for limit, status in ((4, 200), (3, 413)):
        options = dv.ArchiveOptions(limits=dv.ArchiveLimits(files=limit))
        access.asked.clear()
        async with live(application(root, options, access=access)) as port:
            assert (await ask(port, "/files/reports/?archive=zip")).status == status
        assert len(access.asked) == (4 if status == 200 else 1)


async def test_access_is_not_asked_after_the_client_has_left(root: Path) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def access(request: Request, name: str) -> bool:
        if name == "reports/2026/":
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return True

    async with live(application(root, access=access)) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /files/reports/?archive=zip HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(begun.wait(), 10)
        writer.close()
        await asyncio.wait_for(cancelled.wait(), 10)


async def test_a_link_to_a_folder_does_not_become_a_link_to_its_archive(root: Path) -> None:
    async with live(application(root, access=dv.SignedLinks(SIGNER), listing=True)) as port:
        link = SIGNER.sign("/files/reports/")
        assert (await ask(port, link)).status == 200
        for query in ("&archive=zip", "&archive=zip&s=x"):
            assert (await ask(port, link + query)).status == 403
        assert (await ask(port, link.replace("?", "?archive=zip&"))).status == 403


class Slow:
    """A source with files in `a/` and `b/` that wait for a test."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.go_on = anyio.Event()

    async def list(self, folder: str = "", /) -> AsyncIterator[dv.Entry]:
        yield dv.Entry("file", size=200_000)

    async def resolve(self, name: str, /) -> dv.AsyncFile:
        async def content() -> AsyncIterator[bytes]:
            yield b"x" * 100_000
            self.started.set()
            await self.go_on.wait()
            yield b"x" * 100_000

        return dv.VirtualFile(content, name=name, size=200_000, etag=dv.ETag(name.replace("/", "-")))


@pytest.mark.parametrize("per_client", [1, 2, None])
async def test_a_client_gets_one_archive_at_a_time_over_any_number_of_connections(per_client: int | None) -> None:
    source = Slow()
    download = dv.Download(source, archive=dv.ArchiveOptions(per_client=per_client))
    answers: list[Answer] = []
    async with live(Starlette(routes=[Route("/{path:path}", download)])) as port, anyio.create_task_group() as group:

        async def fetch(first: int) -> None:
            headers = {"Range": f"bytes={first}-"} if first else {}
            answers.append(await ask(port, "/a/?archive=zip", headers=headers))

        for number in range(16):
            group.start_soon(fetch, 1000 * number)
        await source.started.wait()
        assert (await ask(port, "/b/?archive=zip", method="HEAD")).status == 200
        if per_client == 1:
            other = await ask(port, "/b/?archive=zip")
            assert (other.status, other.headers["retry-after"], other.body) == (429, "10", b"Too Many Requests")
        source.go_on.set()
        if per_client != 1:
            assert (await ask(port, "/b/?archive=zip")).status == 200
    assert sorted(answer.status for answer in answers) == [200] + [206] * 15
    whole = max((answer.body for answer in answers), key=len)
    assert all(whole.endswith(answer.body) for answer in answers)
    async with live(Starlette(routes=[Route("/{path:path}", download)])) as port:
        assert (await ask(port, "/b/?archive=zip")).status == 200


@pytest.mark.parametrize("server", [DownloadProtocol, "h11"])
@pytest.mark.parametrize("size", [10, 300_000])
async def test_a_connection_gets_archives_one_after_another(root: Path, server: Any, size: int) -> None:
    (root / "reports/a.txt").write_bytes(bytes(size))
    async with live(application(root), http=server) as port:
        paths = [f"/files/{folder}?archive=zip" for folder in ("", "reports/", "reports/2026/", "reports/")]
        assert await ask_in_a_row(port, paths) == [200] * 4


async def test_the_outcome_is_that_of_a_file(root: Path) -> None:
    app = Observed(application(root))
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/files/reports/?archive=zip")
    outcome = app.only()
    assert (outcome.status, outcome.sent, outcome.reason) == (200, len(answer.body), None)


async def test_a_file_that_changes_ends_the_connection(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "SHARED_SECONDS", 60.0)
    (root / "reports/large").write_bytes(b"x" * 5_000_000)

    class Changing:
        """A source whose last file changes when the one before it is opened."""

        def __init__(self) -> None:
            self.source = dv.PathSource(root)
            self.list = self.source.list

        async def resolve(self, name: str, /) -> dv.AsyncFile:
            if name.endswith("large"):
                (root / "reports/z").write_bytes(b"other")
            return await self.source.resolve(name)

    (root / "reports/z").write_bytes(b"z")
    app = Starlette(routes=[Route("/{path:path}", dv.Download(Changing(), archive=True))])
    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/reports/?archive=zip")
    assert answer.status == 200
    assert not answer.complete


@pytest.mark.parametrize("option", ["checksums", "cache"])
async def test_what_is_shared_needs_a_name(root: Path, option: str) -> None:
    shared: Any = dv.MemoryChecksums() if option == "checksums" else dv.Cache(root / "cache")
    with pytest.raises(dv.ConfigurationError, match="name="):
        dv.Download(dv.PathSource(root), archive=dv.ArchiveOptions(**{option: shared}))


async def test_a_source_that_does_not_list_has_no_archives() -> None:
    with pytest.raises(dv.ConfigurationError, match="lists its folders"):
        dv.Download(dv.VirtualSource(lambda name: b"x"), archive=True)


async def test_an_archive_is_cached_until_the_folder_changes(root: Path, tmp_path: Path) -> None:
    cache = dv.Cache(tmp_path / "cache", max_age=3600)
    options = dv.ArchiveOptions(cache=cache, name="files")
    url = "/files/reports/?archive=zip"
    async with live(application(root, options)) as port:
        whole = await ask(port, url)
        assert names_of(whole) == REPORTS
        while fetches := list(cache._running):
            await asyncio.wait([fetch.task for fetch in fetches])
        again = await ask(port, url)
        assert again.body == whole.body
        assert again.headers["etag"] == whole.headers["etag"]
        assert (cache.counts["misses"], cache.counts["revalidated"]) == (1, 1)
        part = await ask(port, url, headers={"Range": "bytes=50-99"})
        assert (part.status, part.body) == (206, whole.body[50:100])
        end = await ask(port, url, headers={"Range": "bytes=-50"})
        assert (end.status, end.body) == (206, whole.body[-50:])
        assert cache.counts["passed"] == 0  # the kept archive is confirmed, and has every range
        (root / "reports/new").write_bytes(b"new")
        changed = await ask(port, url)
        assert names_of(changed) == [*REPORTS, "reports/new"]
    await cache.aclose()


async def test_sixteen_connections_of_one_client_get_one_file(root: Path) -> None:
    (root / "reports/large").write_bytes(os.urandom(3_000_000))
    url = "/files/reports/?archive=zip"
    async with live(application(root), http=DownloadProtocol) as port:
        size = int((await ask(port, url, method="HEAD")).headers["content-length"])
        step = size // 16 + 1
        parts: dict[int, bytes] = {}

        async def fetch(number: int) -> None:
            answer = await ask(port, url, headers={"Range": f"bytes={number * step}-{(number + 1) * step - 1}"})
            assert answer.status == 206
            parts[number] = answer.body

        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(fetch, number)
        whole = await ask(port, url)
    assert b"".join(parts[number] for number in range(16)) == whole.body


# --- by the kernel, where the server takes descriptors

LARGE = {"d/a.bin": 300_000, "d/b.txt": 10, "d/c.bin": 70_000, "d/e.bin": 5_000_000, "d/f.txt": 40_000}
ALL = "/files/d/?archive=zip"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    for name, size in LARGE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(size))
        os.utime(path, (1_700_000_000,) * 2)
    return tmp_path


class Sendfile:
    """Counts the bytes that `sendfile` sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        self._sendfile = os.sendfile
        monkeypatch.setattr(os, "sendfile", self._counted)

    def _counted(self, out: int, file: int, offset: int, count: int) -> int:
        sent = self._sendfile(out, file, offset, count)
        self.sent += sent
        return sent

    def since(self) -> int:
        sent, self.sent = self.sent, 0
        return sent


def application_of(root: Path, kind: str) -> Observed:
    """An application whose archives are of a folder that is opened by its names, of another one, or of given files."""
    if kind == "folder":
        return Observed(application(root))
    if kind == "storage":
        download: Any = dv.Download(dv.StorageSource(dv.DirectoryStorage(root)), archive=True)
        return Observed(Starlette(routes=[Route("/files/{path:path}", download)]))
    archive = dv.Archive([(name, dv.LocalFile(root / name)) for name in LARGE], name="d.zip")
    return Observed(dv.DownloadResponse(archive))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["folder", "storage", "given"])
async def test_the_kernel_sends_the_files_whose_crcs_are_known(
    large: Path, kind: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, sendfile = application_of(large, kind), Sendfile(monkeypatch)
    async with live(app, http=DownloadProtocol, loop=loop) as port:
        whole = await ask(port, ALL)
        assert (app.only().result, sendfile.since()) == ("completed", 0)  # it computes them
        with zipfile.ZipFile(io.BytesIO(whole.body)) as archive:
            assert archive.testzip() is None
            assert {name: archive.getinfo(name).file_size for name in LARGE} == LARGE
        size = len(whole.body)
        for start, stop in ((0, size), (1000, size), (31, size - 1), (400_000, 4_000_000), (300_000, 5_400_000)):
            headers = {"Range": f"bytes={start}-{stop - 1}"} if (start, stop) != (0, size) else {}
            answer = await ask(port, ALL, headers=headers)
            assert answer.body == whole.body[start:stop]
            outcome = app.only()
            assert (outcome.sent, outcome.result) == (stop - start, "completed")
            assert outcome.kind == ("zero-copy" if kind == "given" else "archive")
            assert sum(span.stop - span.start for span in outcome.spans if span) == stop - start
            assert sendfile.since() > 0.8 * (stop - start)  # the rest, when the socket was full, by the transport
        several = await ask(port, ALL, headers={"Range": "bytes=0-99999, 400000-499999"})
        assert (several.status, several.complete, app.only().result, sendfile.since()) == (206, True, "completed", 0)
        small = await ask(port, ALL, headers={"Range": "bytes=400000-409999"})
        assert small.body == whole.body[400_000:410_000]
        assert (app.only().result, sendfile.since()) == ("completed", 0)
        head = await ask(port, ALL, method="HEAD")
        assert (head.headers["content-length"], app.only().sent) == (str(size), 0)
    async with live(app, loop=loop) as port:  # a server that takes no descriptors
        assert (await ask(port, ALL)).body == whole.body
        assert (app.only().result, sendfile.since()) == ("completed", 0)


async def test_a_part_of_a_file_needs_no_crc(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, sendfile = Observed(application(large)), Sendfile(monkeypatch)
    async with live(app, http=DownloadProtocol) as port:
        part = await ask(port, ALL, headers={"Range": "bytes=400000-4999999"})
        assert (app.only().result, part.complete) == ("completed", True)
        assert sendfile.since() > 4_000_000
        whole = await ask(port, ALL)
    assert part.body == whole.body[400_000:5_000_000]


async def test_a_length_that_is_dropped_on_the_way(large: Path) -> None:
    app = application(large)

    async def without_length(scope: Any, receive: Any, send: Any) -> None:
        async def dropping(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [header for header in message["headers"] if header[0] != b"content-length"]
                message = {**message, "headers": kept}
            await send(message)

        await app(scope, receive, dropping)

    async with live(without_length, http=DownloadProtocol) as port:
        answers = [await ask(port, ALL) for _ in range(2)]
        old = await ask_raw(port, f"GET {ALL} HTTP/1.0\r\nHost: test\r\n\r\n".encode())
    assert all(answer.complete and "content-length" not in answer.headers for answer in answers)
    assert answers[0].body == answers[1].body == old.body


class Paused:
    """A client that reads the beginning of an archive whose CRC-32s are known, and then waits."""

    def __init__(self, port: int, size: int = 50_000) -> None:
        self._port = port
        self._size = size

    async def __aenter__(self) -> "Paused":
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # so that little is on its way
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
        self._writer.write(f"GET {ALL} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        self._received = bytearray(await self._reader.readexactly(self._size))
        return self

    async def rest(self) -> Answer:
        """Read what is left, up to the end of the connection."""
        with contextlib.suppress(ConnectionError):
            while block := await self._reader.read(1 << 16):
                self._received += block
        return parse(bytes(self._received))

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def opened(root: Path) -> list[str]:
    return [os.path.basename(path.removesuffix(" (deleted)")) for path in open_paths() if path.startswith(f"{root}/")]


HUGE = 12_000_000  # more than the buffers of both sockets take


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"changed")


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


CHANGES: dict[str, Callable[[Path], None]] = {
    "grows": _grow,
    "shrinks": _shrink,
    "rewritten": _rewrite,
    "replaced": _replace,
    "deleted": Path.unlink,
    "a folder": _make_a_folder,
    "a link": _make_a_link,
}


@pytest.mark.parametrize("name", ["d/huge.bin", "d/z.bin"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_changes_before_or_while_the_kernel_sends_it(large: Path, change: str, name: str) -> None:
    os.truncate(large / "d/a.bin", HUGE)  # while it is sent, the others are not yet open
    (large / "d/huge.bin").write_bytes(b"h" * HUGE)
    (large / "d/z.bin").write_bytes(b"z" * 200_000)
    is_under_way = name == "d/huge.bin"
    if is_under_way:
        (large / "d/a.bin").unlink()
    app = Observed(application(large))
    async with live(app, http=DownloadProtocol) as port:
        whole = await ask(port, ALL)
        assert whole.complete
        app.outcomes.clear()
        skipped = whole.body.index(b"h" * 99) + 99 if is_under_way else 50_000
        async with Paused(port, skipped) as client:
            assert opened(large) == (["huge.bin"] if is_under_way else ["a.bin"])
            CHANGES[change](large / name)
            answer = await client.rest()
    is_harmless = is_under_way and change in ("replaced", "deleted", "a folder", "a link")  # the open file is the same
    assert answer.complete == is_harmless
    assert whole.body.startswith(answer.body) or change in ("rewritten", "shrinks")
    assert app.only().result == ("completed" if is_harmless else "aborted")
    assert not opened(large)


async def test_a_slow_client_keeps_few_files_open_and_none_after_it_has_left(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for number in range(300):
        (tmp_path / f"d/{number:03}").write_bytes(os.urandom(100_000))
    app = application(tmp_path)
    async with live(app, http=DownloadProtocol) as port:
        assert (await ask(port, ALL)).complete
        assert not opened(tmp_path)
        async with Paused(port):
            assert 1 <= len(opened(tmp_path)) <= 4
    for inner in (app, BaseHTTPMiddleware(app, dispatch=_passed_on)):  # in its own task, and in that of a middleware
        watched = Watched(inner)
        async with live(watched, http=DownloadProtocol) as port:
            await watched.ends_when_the_client_leaves(port, ALL)
            assert not opened(tmp_path)


async def _passed_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


async def test_a_client_that_leaves_ends_the_wait_for_a_crc_in_the_task_of_a_middleware(large: Path) -> None:
    waiting, left = anyio.Event(), anyio.Event()

    class Waiting(dv.MemoryChecksums):
        """Knows the CRC-32s of the first files, and is asked for the others until the client has left."""

        async def get(self, keys: Sequence[bytes], /) -> Mapping[bytes, int]:
            if len(keys) == 1:
                waiting.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    left.set()
            return await super().get(keys)

    archives = dv.ArchiveOptions(checksums=Waiting(), name="files")
    app = BaseHTTPMiddleware(application(large, archives), dispatch=_passed_on)
    async with live(app, http=DownloadProtocol) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        # the descriptor after a file, of which only the end is asked for, needs its CRC-32
        writer.write(f"GET {ALL} HTTP/1.1\r\nHost: test\r\nRange: bytes=100000-\r\n\r\n".encode())
        await asyncio.wait_for(waiting.wait(), 20)
        assert not left.is_set()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset: it reads no more
        writer.close()
        await asyncio.wait_for(left.wait(), 20)
    assert not opened(large)


async def test_other_work_gets_its_turn_while_crcs_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    for number in range(200):
        (tmp_path / f"d/{number:03}").write_bytes(os.urandom(100_000))
    turns = 0

    def counted(loop: asyncio.AbstractEventLoop) -> Any:
        nonlocal turns
        turns += 1
        return turn(loop)

    monkeypatch.setattr(sendfile_module, "turn", counted)

    def fetch(port: int) -> int:  # in a thread: a client that is always ready for more
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"GET {ALL} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
            received = 0
            while block := client.recv(1 << 20):
                received += len(block)
        return received

    async with live(application(tmp_path), http=DownloadProtocol) as port:
        received = await asyncio.to_thread(fetch, port)
    assert received > 20_000_000
    assert turns >= received // (512 << 10)


@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_has_changed_before_the_first_byte_is_looked_at_again(
    large: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(archive_module, "SHARED_SECONDS", 60.0)
    app = application(large)
    async with live(app, http=DownloadProtocol) as port:
        assert (await ask(port, ALL)).complete
        async with Paused(port):  # others share its layout
            CHANGES[change](large / "d/a.bin")
            answer = await ask(port, ALL)
            assert (answer.status, answer.complete) == (200, True)
            with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
                names = archive.namelist()
                assert archive.testzip() is None
                if (large / "d/a.bin").is_file() and not (large / "d/a.bin").is_symlink():
                    assert archive.read("d/a.bin") == (large / "d/a.bin").read_bytes()
                else:
                    assert "d/a.bin" not in names


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
async def test_a_client_that_reads_slowly_gets_the_right_bytes_of_small_files(
    tmp_path: Path, run: Callable[[Any], list[bytes]]
) -> None:
    """The memory is used again, but not before the transport has sent it: that of uvloop makes no copy."""
    (tmp_path / "d").mkdir()
    for number in range(400):
        (tmp_path / f"d/{number:03}").write_bytes(os.urandom(60_000))

    async def fetched() -> list[bytes]:
        bodies = []
        async with live(application(tmp_path), http=DownloadProtocol) as port:
            for _ in range(2):  # computing the CRC-32s, and knowing them
                async with Paused(port) as client:
                    bodies.append((await client.rest()).body)
        return bodies

    bodies = await asyncio.to_thread(run, fetched())
    with zipfile.ZipFile(io.BytesIO(bodies[0])) as archive:
        assert archive.testzip() is None
        for number in range(400):
            assert archive.read(f"d/{number:03}") == (tmp_path / f"d/{number:03}").read_bytes()
    assert bodies[0] == bodies[1]
