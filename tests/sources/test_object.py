"""Objects and their attributes, under the names that django-downloadview gave them."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import (
    AccessDenied,
    ConfigurationError,
    Download,
    FileMissing,
    MemoryStorage,
    ObjectSource,
    PathSource,
    StorageSource,
    VirtualFile,
)
from downloadview_async.testing import assert_download_response, call

pytestmark = pytest.mark.asyncio


@dataclass
class Document:
    file: Any = "a.bin"
    title: str | None = None
    mime_type: str | None = None
    size: int | None = None
    modified: Any = None
    encoding: str | None = None
    charset: str | None = None


FIELDS = {
    "basename_field": "title",
    "mime_type_field": "mime_type",
    "size_field": "size",
    "modification_time_field": "modified",
    "encoding_field": "encoding",
    "charset_field": "charset",
}


def app_for(document: Document | None, **options: Any) -> Download:
    async def get(key: str) -> Document | None:
        assert key == "k"
        return document

    source = StorageSource(MemoryStorage({"a.bin": b"0123456789"}))
    return Download(ObjectSource(get, **{"source": source, **FIELDS, **options}))


async def test_an_object_that_says_nothing_more_is_its_file() -> None:
    answer = await call(app_for(Document()), "/k")
    assert_download_response(answer, content=b"0123456789", filename="a.bin", content_type="application/octet-stream")


async def test_what_an_object_says_of_its_file_wins() -> None:
    document = Document(
        title="Bericht für π.txt",
        mime_type="text/x-report",
        modified=datetime(2023, 11, 14, 22, 13, 20, 999, tzinfo=UTC),
        encoding="gzip",
        charset="latin-1",
        size=99,
    )
    answer = await call(app_for(document), "/k", headers={"Range": "bytes=1-2"})
    assert_download_response(
        answer, status=206, content=b"12", filename="Bericht für π.txt", content_type="text/x-report; charset=latin-1"
    )
    assert answer.headers["last-modified"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-range"] == "bytes 1-2/10"  # a file that knows its size is believed


@pytest.mark.parametrize(
    "modified",
    [
        1_700_000_000,
        1_700_000_000.9,
        datetime(2023, 11, 14, 22, 13, 20),
        datetime(2023, 11, 15, 0, 13, 20, tzinfo=timezone(timedelta(hours=2))),
    ],
)
async def test_times(modified: Any) -> None:
    answer = await call(app_for(Document(modified=modified)), "/k")
    assert answer.headers["last-modified"] == "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.mark.parametrize(
    "document", [None, Document(file=None), Document(file=""), Document(file="none"), Document(file="../x")]
)
async def test_no_object_and_no_file_are_one_404(document: Document | None) -> None:
    answer = await call(app_for(document), "/k")
    assert (answer.status, answer.body) == (404, b"Not Found")


async def test_a_type_that_would_break_the_header_is_not_taken() -> None:
    answer = await call(
        app_for(Document(mime_type="text/html\r\nX-Evil: 1", encoding="gzip\r\nX-Evil: 1", title="x.png")), "/k"
    )
    assert answer.headers["content-type"] == "image/png"
    assert not {"x-evil", "content-encoding"} & set(answer.headers)


async def test_a_generated_file_gets_its_size_from_the_object() -> None:
    def content() -> Any:
        yield b"01234"

    document = Document(file=VirtualFile(content, name="x.txt"), size=5)
    answer = await call(app_for(document), "/k", headers={"Range": "bytes=0-1"})
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "5", b"01234")


@pytest.mark.parametrize(
    "odd",
    [
        {"title": 7},
        {"size": "10"},
        {"size": -1},
        {"modified": "yesterday"},
        {"mime_type": 5},
        {"encoding": 1},
        {"charset": 2},
    ],
)
async def test_odd_values_of_a_row_leave_the_file_as_it_is(odd: dict[str, Any]) -> None:
    answer = await call(app_for(Document(**odd)), "/k")
    assert_download_response(answer, content=b"0123456789", filename="7" if "title" in odd else "a.bin")


async def test_paths_of_rows_are_opened_beneath_their_source(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    for name in ("../secret", str(tmp_path / "secret")):
        assert (await call(app_for(Document(file=name), source=PathSource(tmp_path / "root")), "/k")).status == 404


async def test_the_whole_request_may_be_the_key() -> None:
    async def get(request: Any) -> Document:
        return Document(title=request.headers["x-title"])

    source = ObjectSource(get, source=StorageSource(MemoryStorage({"a.bin": b"x"})), basename_field="title")
    app = Download(source, key=lambda request: request)
    assert_download_response(await call(app, "/", headers={"X-Title": "t.txt"}), filename="t.txt")


async def test_a_name_without_a_source_is_said_so() -> None:
    with pytest.raises(ConfigurationError, match="source="):
        await call(app_for(Document(), source=None), "/k")


async def test_missing_is_raised_for_ones_own_endpoint() -> None:
    async def get(key: str) -> None:
        return None

    with pytest.raises(FileMissing):
        await ObjectSource(get).resolve("k")


@pytest.mark.parametrize("raises", [False, True])
async def test_a_key_with_empty_segments_is_tried_without_them_where_there_is_no_object(raises: bool) -> None:
    asked = []

    async def get(key: str) -> Document | None:
        asked.append(key)
        if key in ("a/b", "/c"):
            return Document(file=VirtualFile(key.encode(), name="x"))
        if raises:
            raise FileMissing(f"no {key}")
        return None

    source = ObjectSource(get)
    for key in ("/a/b", "a//b", "a/b", "/c"):
        assert (await source.resolve(key)).name == "x"
    assert asked == ["/a/b", "a/b", "a//b", "a/b", "a/b", "/c"]
    for key in ("/d", "d"):
        with pytest.raises(FileMissing, match="no d" if raises else f"no object '{key}'"):
            await source.resolve(key)


async def test_what_else_get_raises_is_not_tried_again() -> None:
    asked = []

    async def get(key: str) -> Document:
        asked.append(key)
        raise AccessDenied("not for you")

    with pytest.raises(AccessDenied):
        await ObjectSource(get).resolve("/a")
    assert asked == ["/a"]
