"""`?archive=zip`: archives of folders and selections, for the clients that may have them."""

import asyncio
import io
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.sources import archive as archive_module
from tests.live import Answer, ask, live
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
        "reports/?archive=tar",
        "reports/?archive",
    ],
)
async def test_everything_else_is_the_same_404(root: Path, path: str) -> None:
    async with live(application(root)) as port:
        missing = await ask(port, "/files/missing.txt")
        answer = await ask(port, f"/files/{path}")
    assert (answer.status, answer.body) == (404, missing.body)


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


async def test_access_decides_about_the_folder(root: Path) -> None:
    seen: list[str] = []

    async def allow(request: Request, name: str) -> bool:
        seen.append(name)
        return name.startswith("reports")

    async with live(application(root, access=allow)) as port:
        answer = await ask(port, "/files/reports/?archive=zip")
        assert names_of(answer) == REPORTS
        assert answer.headers["cache-control"] == "private"
        assert (await ask(port, "/files/?archive=zip")).status == 404
    assert seen == ["reports/", ""]


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
