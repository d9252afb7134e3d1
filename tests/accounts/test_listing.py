"""Listings and view pages that show how often files were downloaded."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.asgi.listing import folder
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.testing import call
from tests.accounts.test_commands import SETTINGS


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    (root / "sub").mkdir(parents=True)
    for name in ("a.txt", "é b.txt", "sub/a.txt"):
        (root / name).write_text("content")
    return root


class Counts:
    """Counts of files, which remembers what it was asked for."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = counts
        self.queries: list[list[str]] = []

    async def __call__(self, names: Sequence[str]) -> Mapping[str, int]:
        self.queries.append([*names])
        return {name: self.counts[name] for name in names if name in self.counts}


def app_of(root: Path, downloads: object) -> Starlette:
    pages = dv.Pages(downloads=downloads)  # type: ignore[arg-type]
    return Starlette(routes=[Route("/f/{path:path}", dv.Download(dv.PathSource(root), listing=pages))])


async def page_of(app: Starlette, path: str, query: str = "") -> str:
    answer = await call(app, path, query=query)
    assert answer.status == 200
    return answer.body.decode()


@pytest.mark.asyncio
async def test_pages_show_the_downloads_by_one_query(files: Path) -> None:
    counts = Counts({"a.txt": 12345, "sub/a.txt": 7})
    app = app_of(files, counts)
    top = await page_of(app, "/f/")
    assert "<th scope=col class=num>Downloads" in top
    assert top.count("<td class=num>") == 2
    assert "<td class=num>12,345" in top
    assert "<td class=num>0" in top
    assert counts.queries == [["a.txt", "é b.txt"]]
    assert "<td class=num>7" in await page_of(app, "/f/sub/")
    assert counts.queries[1:] == [["sub/a.txt"]]
    assert "<td class=num>7" in await page_of(app, "/f/", "q=a.txt&deep=1")
    assert "7 downloads" in await page_of(app, "/f/sub/a.txt", "view")
    assert "0 downloads" in await page_of(app, "/f/é b.txt", "view")
    before = len(counts.queries)
    assert "ownloads" not in await page_of(app, "/f/", "format=json")
    assert len(counts.queries) == before


@pytest.mark.asyncio
async def test_without_counts_a_page_has_no_column(files: Path) -> None:
    assert "Downloads" not in await page_of(app_of(files, None), "/f/")


@pytest.mark.asyncio
async def test_counts_that_fail_or_hang_do_not_break_a_page(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(names: Sequence[str]) -> Mapping[str, int]:
        raise ValueError("this database is broken")

    async def hang(names: Sequence[str]) -> Mapping[str, int]:
        await asyncio.sleep(3600)
        return {}

    monkeypatch.setattr(folder, "DOWNLOADS_SECONDS", 0.05)
    for downloads in (fail, hang):
        page = await page_of(app_of(files, downloads), "/f/")
        assert "a.txt" in page
        assert "Downloads" not in page
        assert (
            "download"
            not in (await page_of(app_of(files, downloads), "/f/a.txt", "view"))
            .partition("<p class=actions>")[0]
            .partition("<main>")[2]
        )
    assert caplog.text.count("The downloads of a page cannot be read") == 4


@pytest.mark.asyncio
async def test_the_service_shows_what_it_has_counted(files: Path, tmp_path: Path) -> None:
    settings = tmp_path / "downloadview.toml"
    settings.write_text(SETTINGS + "list = true\ndownloads = true\n")
    app = build(load_settings(settings, environ={}))
    async with app.router.lifespan_context(app):
        for path in ("/files/sub/a.txt", "/files/a.txt", "/files/a.txt", "/files/é b.txt"):
            answer = await call(app, path)
            assert answer.status == 200
        deadline = time.monotonic() + 20
        while "<td class=num>2" not in (top := await page_of(app, "/files/")):
            assert time.monotonic() < deadline, top
            await asyncio.sleep(0.05)
        assert "<td class=num>1" in top
        assert "<td class=num>1" in await page_of(app, "/files/sub/")


MISTAKES = {
    "no listing": ("downloads = true\n", "routes[0].downloads: listings show them: set list"),
    "no database": ("list = true\ndownloads = true\n", "routes[0].downloads: no downloads are counted"),
}


@pytest.mark.parametrize(("more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_route_cannot_show(tmp_path: Path, more: str, message: str) -> None:
    settings = tmp_path / "downloadview.toml"
    text = SETTINGS + more
    settings.write_text(text if "no downloads" not in message else text.replace("database", "#database"))
    with pytest.raises(dv.ConfigurationError) as raised:
        load_settings(settings, environ={})
    assert message in str(raised.value)
