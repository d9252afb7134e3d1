"""The view page of a file: what it shows, what it does not tell, and that nothing in the file runs."""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi.listing.view import MAX_TEXT_BYTES, kind_of, view_page_of
from downloadview_async.http.request import GET
from downloadview_async.testing import call
from tests.browser import CHROMIUM, browse
from tests.live import live
from tests.servers import PROJECT

pytestmark = pytest.mark.asyncio
SIGNER = dv.URLSigner({"2026a": bytes(range(32))})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in (
        "a.png",
        "b.mp4",
        "c.mp3",
        "d.pdf",
        "e10.txt",
        "e9.html",
        "f.bin",
        "g.svg",
        ".hidden.txt",
        "sub/one.txt",
    ):
        (tmp_path / name).write_bytes(b"<script>alert(1)</script> & more")
    return tmp_path


def app(source: dv.Source, **options: Any) -> ASGIApp:
    return Starlette(routes=[Route("/files/{path:path}", dv.Download(source, **{"listing": True, **options}))])


async def page_of(endpoint: ASGIApp, path: str) -> str:
    answer = await call(endpoint, path, query="view")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.body.decode()


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a.png", '<img src="./a.png" alt="a.png">'),
        ("g.svg", '<img src="./g.svg" alt="g.svg">'),
        ("b.mp4", '<video src="./b.mp4" controls preload=metadata></video>'),
        ("c.mp3", '<audio src="./c.mp3" controls preload=metadata></audio>'),
        ("d.pdf", '<iframe src="./d.pdf?view=pdf" title="d.pdf"></iframe>'),
        ("e9.html", "<pre tabindex=0>\n&lt;script&gt;alert(1)&lt;/script&gt; &amp; more</pre>"),
        ("f.bin", "There is no preview"),
    ],
)
async def test_each_kind_of_file(root: Path, name: str, shown: str) -> None:
    page = await page_of(app(dv.PathSource(root)), f"/files/{name}")
    assert shown in page
    assert "<script>alert" not in page
    assert f'<a href="./{name}" download>Download</a>' in page
    assert "32 B (32 bytes)" in page
    assert "<time datetime=" in page


async def test_the_files_before_and_after(root: Path) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    page = await page_of(endpoint, "/files/e9.html")
    assert '<a rel=prev href="./d.pdf?view">' in page
    assert '<a rel=next href="./e10.txt?view">' in page  # in natural order
    assert "rel=prev" not in await page_of(endpoint, "/files/a.png")
    alone = await page_of(endpoint, "/files/sub/one.txt")
    assert "aria-label=Files" not in alone  # screen readers would name an empty group of links
    assert "rel=next" not in alone
    assert '<a href="../"><bdi>Files</bdi></a>' in alone
    assert '<a href="./"><bdi>sub</bdi></a>' in alone


async def test_files_that_cannot_be_read_are_not_before_or_after(root: Path) -> None:
    class Unreadable(dv.PathSource):
        async def describe(self, folder: str, names: Sequence[str], /) -> list[dv.Entry]:
            unreadable = ("d.pdf", "e10.txt")
            return [entry for entry in await super().describe(folder, names) if entry.name not in unreadable]

    page = await page_of(app(Unreadable(root), hide=[".*"]), "/files/e9.html")
    assert '<a rel=prev href="./c.mp3?view">' in page
    assert '<a rel=next href="./f.bin?view">' in page


async def test_the_folder_of_a_file_that_may_not_be_listed_is_not_told(root: Path) -> None:
    async def access(request: Request, name: str) -> bool:
        return name == "e9.html"

    page = await page_of(app(dv.PathSource(root), access=access), "/files/e9.html")
    assert "rel=prev" not in page
    assert "rel=next" not in page


async def test_what_is_missing_hidden_or_a_folder(root: Path) -> None:
    endpoint = app(dv.PathSource(root), hide=[".*"])
    answers = [await call(endpoint, f"/files/{name}", query="view") for name in ("none.txt", ".hidden.txt")]
    assert {(answer.status, answer.body) for answer in answers} == {(404, b"Not Found")}
    folder = await call(endpoint, "/files/sub", query="view")
    assert (folder.status, folder.headers["location"]) == (308, "./sub/?view")
    assert (await call(app(dv.PathSource(root), listing=False), "/files/a.png", query="view")).body.startswith(
        b"<script>"
    )


async def test_a_link_shows_its_file_and_no_page(root: Path) -> None:
    endpoint = app(dv.PathSource(root), access=dv.SignedLinks(SIGNER))
    link = urlsplit(SIGNER.sign("/files/a.png"))
    assert (await call(endpoint, link.path, query=f"{link.query}&view")).status == 403


async def test_only_a_pdf_is_shown_without_a_sandbox(root: Path) -> None:
    endpoint = app(dv.PathSource(root))
    pdf = await call(endpoint, "/files/d.pdf", query="view=pdf")
    assert pdf.headers["content-disposition"].startswith("inline")
    assert pdf.headers["content-type"] == "application/pdf"
    assert pdf.headers["x-content-type-options"] == "nosniff"
    assert pdf.headers["content-security-policy"].startswith("default-src 'none'")
    for name in ("e9.html", "g.svg", "f.bin"):
        answer = await call(endpoint, f"/files/{name}", query="view=pdf")
        assert answer.headers["content-disposition"].startswith("attachment")
    inline = await call(app(dv.PathSource(root), attachment=False), "/files/e9.html", query="view=pdf")
    assert inline.headers["content-security-policy"] == "sandbox; default-src 'none'"


async def test_a_long_text_is_cut(root: Path) -> None:
    (root / "long.txt").write_bytes(b"x" * (MAX_TEXT_BYTES - 1) + "é".encode() + b"y" * 10)
    page = await page_of(app(dv.PathSource(root)), "/files/long.txt")
    assert "Only the first MiB is shown." in page
    assert page.count("x") >= MAX_TEXT_BYTES - 1
    assert "yy" not in page


async def test_a_text_that_is_cut_is_closed_before_its_file() -> None:
    closed = []

    class Endless:
        """A text without an end."""

        name, location = "endless.txt", None
        metadata = dv.FileMetadata(size=None, accept_ranges=False)

        @asynccontextmanager
        async def open(self, request: dv.DownloadRequest = GET) -> AsyncIterator[dv.OpenFile]:
            try:
                yield self
            finally:
                closed.append("file")

        async def stream(self, span: dv.ByteRange | None) -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"a" * 65_536
            finally:
                closed.append("stream")

    page = await view_page_of(Endless(), "endless.txt", None)
    assert page.is_cut
    assert closed == ["stream", "file"]


@pytest.mark.parametrize(
    "content, content_type, text",
    [
        ("grün".encode("latin-1"), "text/plain; charset=iso-8859-1", "grün"),
        ("grün".encode(), "text/plain", "grün"),
        ("grün".encode("utf-16"), "text/plain", "grün"),
        (b"\xef\xbb\xbfa", "text/plain", "a"),
        (b"a\xff", "text/plain", "a\ufffd"),
        (b"abc", "text/plain; charset=base64", "abc"),
        (b"abc", "text/plain; charset=nothing", "abc"),
        (b"a" * (1 << 18) + b"-d", "text/plain; charset=punycode", "a" * (1 << 18) + "-d"),
        (rb"\x41", "text/plain; charset=Unicode_Escape", r"\x41"),
        (b"", "text/plain", ""),
        (b'{"a": 1}', "application/json", '{"a": 1}'),
    ],
)
async def test_texts(content: bytes, content_type: str, text: str) -> None:
    async def access(request: Request, name: str) -> dv.Grant:
        return dv.Grant(content_type=content_type)

    source = dv.StorageSource(dv.MemoryStorage({"a": content}))
    page = await page_of(app(source, access=access), "/files/a")
    assert f"<pre tabindex=0>\n{text}</pre>" in page


@pytest.mark.parametrize(
    "content_type, kind",
    [
        ("image/png", "image"), ("image/x-odd", "other"), ("IMAGE/PNG", "image"), ("text/html", "text"),
        ("application/ld+json", "text"), ("application/zip", "other"), ("video/mp4", "video"), ("audio/mpeg", "audio"),
        ("application/pdf", "pdf"), ("", "other"),
    ],
)  # fmt: skip
async def test_kinds(content_type: str, kind: str) -> None:
    assert kind_of(content_type) == kind


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium")
@pytest.mark.parametrize("name", ["picture.png", "report.pdf", "hello.txt"])
async def test_in_a_browser(tmp_path: Path, name: str) -> None:
    import anyio

    async with live(app(dv.PathSource(PROJECT / "app" / "files"))) as port:
        url = f"http://127.0.0.1:{port}/files/{name}?view"
        seen = await anyio.to_thread.run_sync(browse, url, tmp_path / "p", "--dump-dom", "--enable-logging=stderr")
    assert "Content Security Policy" not in seen
    assert re.search(r'<button data-copy="[^"]+">Copy link', seen)  # which the script has shown
