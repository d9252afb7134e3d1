"""Which files of Django's a proxy may send, and which it may not: encoded, transformed, deleted, and refused ones."""

import gzip
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core import signals
from django.core.asgi import get_asgi_application as get_plain_application
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, InMemoryStorage, Storage
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.db.models.fields.files import FieldFile, FileField
from django.http import HttpRequest
from django.test import override_settings
from django.urls import path
from django.utils.functional import SimpleLazyObject

from downloadview_async import OffloadMiddleware, PathSource, Rule, XAccelRedirect, XSendfile
from downloadview_async.contrib.django import (
    DownloadResponse,
    PathFile,
    SignedURLMixin,
    StorageFile,
    get_asgi_application,
)
from downloadview_async.contrib.django.apache import XSendfileResponse
from downloadview_async.contrib.django.lighttpd import XSendfileResponse as LighttpdResponse
from downloadview_async.contrib.django.nginx import XAccelRedirectResponse
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.testing import call
from tests.contrib.django.documents.models import Document
from tests.live import Answer

SMART = "downloadview_async.contrib.django.SmartDownloadMiddleware"
CONTENT = b"0123456789" * 100
STORED = CONTENT[::-1]  # what is on the disk, where reading gives CONTENT
ORDERS = {"x-accel-redirect", "x-sendfile"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(CONTENT)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "secret.txt").write_bytes(STORED)
    return tmp_path


def by_settings(root: Path, backend: str = "nginx", **source: Any) -> dict[str, Any]:
    target = {"destination_url": "/_files/"} if backend == "nginx" else {"destination_dir": str(root)}
    return {
        "MIDDLEWARE": [SMART],
        "DOWNLOADVIEW": {"BACKEND": backend, "RULES": [{**(source or {"source_dir": str(root)}), **target}]},
    }


class Urls:
    """A URLconf with one view."""

    def __init__(self, view: Callable[[HttpRequest], Any]) -> None:
        self.urlpatterns = [path("file", view)]


def answer_of(recording: Any) -> Answer:
    headers = {name.decode().lower(): value.decode() for name, value in recording.headers.raw}
    return Answer(recording.status, headers, recording.body, recording.complete)


async def fetch(view: Callable[[HttpRequest], Any], root: Path, way: str, **headers: str) -> Answer:
    """Ask the project for what the view returns, with a proxy offered in one of the ways there are."""
    by_middleware: dict[str, Any] = {
        "nginx, by OffloadMiddleware": XAccelRedirect([Rule(root, "/_files/")]),  # type: ignore[arg-type]
        "Apache, by OffloadMiddleware": XSendfile([Rule(root, root)], encoding="raw"),  # type: ignore[arg-type]
    }
    changes: dict[str, Any] = {}
    if way not in by_middleware:
        backend, _, source = way.partition(", by ")
        rule = {"source_url": "/media/"} if source == "source_url" else {"source_dir": str(root)}
        changes = by_settings(root, backend.lower(), **rule)
    with override_settings(ROOT_URLCONF=Urls(view), **changes):
        app: Any = get_asgi_application()
        if way in by_middleware:
            app = OffloadMiddleware(app, by_middleware[way])
        return answer_of(await call(app, "/file", headers=headers))


BY_PATH = [
    "nginx, by OffloadMiddleware",
    "Apache, by OffloadMiddleware",
    "nginx, by source_dir",
    "Apache, by source_dir",
    "lighttpd, by source_dir",
]
BY_URL = ["nginx, by source_url", "Apache, by source_url", "lighttpd, by source_url"]
by_path = pytest.mark.parametrize("way", BY_PATH)
by_any = pytest.mark.parametrize("way", [*BY_PATH, *BY_URL])


def is_offloaded(answer: Answer) -> bool:
    assert answer.status == 200
    assert answer.complete
    orders = ORDERS & set(answer.headers)
    assert bool(orders) is (answer.body == b"")
    return bool(orders)


# --- files that are stored encoded


@pytest.mark.asyncio
@by_path
async def test_an_encoded_file_is_never_left_to_a_proxy(root: Path, way: str) -> None:
    source = PathSource(root, precompressed=["gzip"])

    def view(request: HttpRequest) -> DownloadResponse:
        return DownloadResponse(Encoded(source.file("a.txt.gz")))

    answer = await fetch(view, root, way)
    assert not is_offloaded(answer)
    assert (answer.headers["content-encoding"], gzip.decompress(answer.body)) == ("gzip", CONTENT)
    assert (answer.headers["vary"], answer.headers["content-language"]) == ("Accept-Encoding", "de")


class Encoded:
    """A file that is stored as it is sent, encoded: as a cache keeps an upstream's, for example."""

    def __init__(self, file: Any, *, encoding: str | None = "gzip") -> None:
        self.file, self.encoding = file, encoding
        self.name, self.location = file.name, file.location

    @asynccontextmanager
    async def open(self, request: Any = None) -> AsyncIterator[Any]:
        headers = {"vary": "Accept-Encoding", "content-language": "de"}
        if self.encoding is not None:
            headers["content-encoding"] = self.encoding
        async with self.file.open() as opened:
            opened.metadata = replace(opened.metadata, headers=tuple(headers.items()))
            yield opened


@pytest.mark.asyncio
@by_path
async def test_what_describes_a_file_goes_with_the_order(root: Path, way: str) -> None:
    def view(request: HttpRequest) -> DownloadResponse:
        response = DownloadResponse(Encoded(PathSource(root).file("a.txt"), encoding=None))
        response["Vary"] = "Cookie"
        return response

    answer = await fetch(view, root, way)
    assert is_offloaded(answer)
    assert answer.headers["content-language"] == "de"
    assert {name.strip() for name in answer.headers["vary"].split(",")} == {"Accept-Encoding", "Cookie"}


@pytest.mark.asyncio
@by_path
async def test_a_precompressed_sibling_is_named_by_vary_and_the_proxy_sends_the_file(root: Path, way: str) -> None:
    source = PathSource(root, precompressed=["gzip"])
    answer = await fetch(
        lambda request: DownloadResponse(source.file("a.txt")), root, way, **{"Accept-Encoding": "gzip"}
    )
    assert is_offloaded(answer)
    assert answer.headers["vary"] == "Accept-Encoding"
    assert "content-encoding" not in answer.headers
    assert (answer.headers.get("x-accel-redirect") or answer.headers["x-sendfile"]).endswith("/a.txt")


# --- storages that do not give what they store


def decrypted(stored: bytes) -> bytes:
    return stored[::-1]


class Decrypts(FileSystemStorage):
    """Overrides what such storages override."""

    def _open(self, name: str, mode: str = "rb") -> Any:
        with super()._open(name, mode) as stored:  # type: ignore[misc]
            return ContentFile(decrypted(stored.read()), name=name)


class DecryptsInOpen(FileSystemStorage):
    def open(self, name: str, mode: str = "rb") -> Any:
        with super().open(name, mode) as stored:
            return ContentFile(decrypted(stored.read()), name=name)


class DecryptsByAMixin:
    def _open(self, name: str, mode: str = "rb") -> Any:
        with super()._open(name, mode) as stored:  # type: ignore[misc]
            return ContentFile(decrypted(stored.read()), name=name)


class DecryptsMixedIn(DecryptsByAMixin, FileSystemStorage):
    pass


class DecryptsAndSigns(SignedURLMixin, Decrypts):
    pass


class DecryptsWithAnUrl(Decrypts):
    def url(self, name: str | None) -> str:
        return f"/media/{name}"


class DecryptsAsAStream(FileSystemStorage):
    """And does not know how long it is: the stored file is longer."""

    def _open(self, name: str, mode: str = "rb") -> Any:
        with super()._open(name, mode) as stored:  # type: ignore[misc]
            return _Stream(decrypted(stored.read())[:-7])


class _Stream:
    def __init__(self, content: bytes) -> None:
        self.left = content

    def read(self, size: int) -> bytes:
        chunk, self.left = self.left[:size], self.left[size:]
        return chunk


class OwnStorage(Storage):
    """Derived from nothing that is known."""

    def __init__(self, root: Path, base_url: str = "/media/") -> None:
        self.files = FileSystemStorage(root, base_url=base_url)

    def _open(self, name: str, mode: str = "rb") -> Any:
        return ContentFile(decrypted((Path(self.files.location) / name).read_bytes()), name=name)

    def path(self, name: str) -> str:
        return self.files.path(name)

    def url(self, name: str | None) -> str:
        return self.files.url(name)


class DecryptingFieldFile(FieldFile):
    """A model's file that decrypts, over a storage that does not."""

    def open(self, mode: str | None = "rb", *args: Any, **kwargs: Any) -> Any:
        self.file = ContentFile(b"".join(self.chunks()))
        return self

    def chunks(self, chunk_size: int | None = None) -> Any:
        with self.storage.open(str(self.name)) as stored:
            yield decrypted(stored.read())


class DecryptingRead(FieldFile):
    """One that only reads otherwise."""

    plain: Any = None

    def read(self, size: int = -1) -> bytes:
        if self.plain is None:
            with self.storage.open(str(self.name)) as stored:
                self.plain = io.BytesIO(decrypted(stored.read()))
        return self.plain.read(size)  # type: ignore[no-any-return]


STORAGES: list[Callable[..., Any]] = [
    Decrypts,
    DecryptsInOpen,
    DecryptsMixedIn,
    DecryptsAndSigns,
    DecryptsWithAnUrl,
    OwnStorage,
]


@pytest.mark.asyncio
@by_any
@pytest.mark.parametrize("storage", STORAGES)
async def test_a_storage_that_decrypts_is_not_left_to_a_proxy(root: Path, way: str, storage: Any) -> None:
    files = storage(root, base_url="/media/")
    answer = await fetch(lambda request: DownloadResponse(StorageFile(files, "secret.txt")), root, way)
    assert not is_offloaded(answer)
    assert (answer.body, answer.headers["content-length"]) == (CONTENT, str(len(CONTENT)))


@pytest.mark.asyncio
@by_any
async def test_the_size_of_what_is_stored_is_not_that_of_what_is_decrypted(root: Path, way: str) -> None:
    files = DecryptsAsAStream(root, base_url="/media/")
    answer = await fetch(lambda request: DownloadResponse(StorageFile(files, "secret.txt")), root, way)
    assert not is_offloaded(answer)
    assert (answer.body, "content-length" in answer.headers) == (CONTENT[:-7], False)


@pytest.mark.asyncio
@by_any
@pytest.mark.parametrize("attr_class", [DecryptingFieldFile, DecryptingRead])
async def test_a_field_file_that_decrypts_is_not_left_to_a_proxy(root: Path, way: str, attr_class: Any) -> None:
    field = FileField(storage=FileSystemStorage(root, base_url="/media/"))
    file = attr_class(Document(), field, "secret.txt")
    answer = await fetch(lambda request: DownloadResponse(file), root, way)
    assert not is_offloaded(answer)
    assert answer.body == CONTENT


class DecryptingFile(File):  # type: ignore[type-arg]
    """A wrapper that a project puts around the file that a storage has opened."""

    plain: Any = None

    def read(self, size: int = -1) -> bytes:
        if self.plain is None:
            stored: Any = self.file
            self.plain = io.BytesIO(decrypted(stored.read()))
        return self.plain.read(size)  # type: ignore[no-any-return]


def field_file(storage: Storage, name: str = "secret.txt") -> FieldFile:
    return FieldFile(Document(), FileField(storage=storage), name)


def given(file: Any, other: Any) -> Any:
    """Return a file after the project has set its `file`."""
    file.file = other
    return file


def disk(root: Path) -> FileSystemStorage:
    return FileSystemStorage(root, base_url="/media/")


REPLACED: dict[str, Callable[[Path], Any]] = {
    "a field's, content": lambda root: given(field_file(disk(root)), ContentFile(CONTENT)),
    "a field's, wrapper": lambda root: given(
        field_file(disk(root)), DecryptingFile(disk(root).open("secret.txt"), "secret.txt")
    ),
    "a field's, another file": lambda root: given(field_file(disk(root)), File((root / "a.txt").open("rb"))),
    "a field's, another file with its name": lambda root: given(
        field_file(disk(root)), File((root / "a.txt").open("rb"), name=str(root / "secret.txt"))
    ),
    "a field's, another storage's": lambda root: given(field_file(disk(root)), in_memory("secret.txt", CONTENT)),
    "a stored file's": lambda root: StorageFile(disk(root), "secret.txt", ContentFile(CONTENT)),
    "a path's": lambda root: given(PathFile(root / "secret.txt"), ContentFile(CONTENT)),
    "a path's, wrapper": lambda root: given(
        PathFile(root / "secret.txt"), DecryptingFile((root / "secret.txt").open("rb"))
    ),
}


def in_memory(name: str, content: bytes) -> Any:
    files = InMemoryStorage(base_url="/media/")
    files.save(name, ContentFile(content))
    return files.open(name)


@pytest.mark.asyncio
@by_any
@pytest.mark.parametrize("kind", REPLACED)
async def test_a_file_that_the_project_has_replaced_by_hand_is_sent_with_its_own_bytes(
    root: Path, way: str, kind: str
) -> None:
    answer = await fetch(lambda request: DownloadResponse(REPLACED[kind](root)), root, way)
    assert not is_offloaded(answer)
    assert answer.body == CONTENT


def opened(file: Any) -> Any:
    file.open()
    return file


def closed(file: Any) -> Any:
    file.file.close()
    return file


OPENED: dict[str, Callable[[Path], Any]] = {
    "a field's": lambda root: opened(field_file(disk(root), "a.txt")),
    "a field's, read": lambda root: given(field_file(disk(root), "a.txt"), disk(root).open("a.txt")),
    "a field's, closed": lambda root: closed(field_file(disk(root), "a.txt")),
    "a stored file's": lambda root: closed(StorageFile(disk(root), "a.txt")),
    "a path's": lambda root: closed(PathFile(root / "a.txt")),
}


@pytest.mark.asyncio
@by_path
@pytest.mark.parametrize("kind", OPENED)
async def test_a_file_that_its_storage_has_opened_is_offloaded(root: Path, way: str, kind: str) -> None:
    assert is_offloaded(await fetch(lambda request: DownloadResponse(OPENED[kind](root)), root, way))


@pytest.mark.asyncio
async def test_a_file_that_a_storage_without_paths_has_opened_is_offloaded_by_its_url(root: Path) -> None:
    files = InMemoryStorage(base_url="/media/")
    files.save("x/a.txt", ContentFile(CONTENT))
    for name, file in (("opened", opened(field_file(files, "x/a.txt"))), ("not opened", field_file(files, "x/a.txt"))):
        assert is_offloaded(await fetch(lambda request, file=file: DownloadResponse(file), root, BY_URL[0])), name  # type: ignore[misc]


class Vouched(Decrypts):
    """Opens in a way of its own, and yet what it stores."""

    is_sent_as_stored = True

    def _open(self, name: str, mode: str = "rb") -> Any:
        return FileSystemStorage._open(self, name, mode)  # type: ignore[attr-defined]


class NotVouched(FileSystemStorage):
    is_sent_as_stored = False


class PlainURLs(FileSystemStorage):
    def url(self, name: str | None) -> str:
        return f"{self.base_url}{name}"


class Signed(SignedURLMixin, FileSystemStorage):
    pass


@pytest.mark.asyncio
@by_any
@pytest.mark.parametrize(
    "storage, expected",
    [(FileSystemStorage, True), (PlainURLs, True), (Signed, True), (Vouched, True), (NotVouched, False)],
)
async def test_a_storage_that_gives_what_it_stores_is(root: Path, way: str, storage: Any, expected: bool) -> None:
    files = storage(root, base_url="/media/")
    answer = await fetch(lambda request: DownloadResponse(StorageFile(files, "a.txt")), root, way)
    assert is_offloaded(answer) is expected
    lazy: Any = SimpleLazyObject(lambda: files)
    answer = await fetch(lambda request: DownloadResponse(StorageFile(lazy, "a.txt")), root, way)
    assert is_offloaded(answer) is expected


def test_a_storage_in_memory_has_no_place(root: Path) -> None:
    files = InMemoryStorage(base_url="/media/")
    files.save("a.txt", ContentFile(CONTENT))

    async def check() -> None:
        answer = await fetch(lambda request: DownloadResponse(StorageFile(files, "a.txt")), root, BY_PATH[2])
        assert not is_offloaded(answer)

    async_to_sync(check)()


# --- files that are deleted afterwards


class DeletesItself(File):  # type: ignore[type-arg]
    def close(self) -> None:
        super().close()
        os.unlink(str(self.name))


class DeletesItsPath(PathFile):
    def close(self) -> None:
        super().close()
        os.unlink(self.path)


class DeletesItsStored(StorageFile):
    def close(self) -> None:
        super().close()
        self.delete()


class DeletesTheFile(DownloadResponse):
    def close(self) -> None:
        super().close()
        os.unlink(self.file.path)


def temporary(root: Path, **options: Any) -> Any:
    file: Any = tempfile.NamedTemporaryFile(dir=root, suffix=".txt", **options)  # noqa: SIM115
    file.write(CONTENT)
    file.flush()
    return file


def uploaded(root: Path) -> Any:
    with override_settings(FILE_UPLOAD_TEMP_DIR=str(root)):
        file = TemporaryUploadedFile("a.txt", "text/plain", len(CONTENT), None)
    file.write(CONTENT)
    file.flush()
    file.name = file.temporary_file_path()
    return file


def deleted_by_a_closer(root: Path) -> DownloadResponse:
    response = DownloadResponse(PathFile(root / "a.txt"))
    response._resource_closers.append((root / "a.txt").unlink)  # type: ignore[attr-defined]
    return response


def deleted_by_its_close(root: Path) -> DownloadResponse:
    response: Any = DownloadResponse(PathFile(root / "a.txt"))
    close = response.close

    def close_and_delete() -> None:
        close()
        (root / "a.txt").unlink()

    response.close = close_and_delete
    return response  # type: ignore[no-any-return]


def deleted_by_a_signal(root: Path) -> DownloadResponse:
    def delete(**kwargs: Any) -> None:
        signals.request_finished.disconnect(delete)
        (root / "a.txt").unlink()

    signals.request_finished.connect(delete, weak=False)
    return DownloadResponse(PathFile(root / "a.txt"))


def closed_by_name(root: Path) -> DownloadResponse:
    class Closes(PathFile):
        pass

    file: Any = Closes(root / "a.txt")
    file.close = (root / "a.txt").unlink
    return DownloadResponse(file)


DELETED: dict[str, Callable[[Path], DownloadResponse]] = {
    "NamedTemporaryFile": lambda root: DownloadResponse(temporary(root)),
    "File of a NamedTemporaryFile": lambda root: DownloadResponse(File(temporary(root))),
    "TemporaryUploadedFile": lambda root: DownloadResponse(uploaded(root)),
    "a file that deletes itself": lambda root: DownloadResponse(DeletesItself((root / "a.txt").open("rb"))),
    "a path that deletes itself": lambda root: DownloadResponse(DeletesItsPath(root / "a.txt")),
    "a stored file that deletes itself": lambda root: DownloadResponse(
        DeletesItsStored(FileSystemStorage(root, base_url="/media/"), "a.txt")
    ),
    "a file with another close": closed_by_name,
    "a response that deletes it": lambda root: DeletesTheFile(PathFile(root / "a.txt")),
    "a response with another close": deleted_by_its_close,
    "a closer of the response": deleted_by_a_closer,
    "a receiver of request_finished": deleted_by_a_signal,
    "the application says so": lambda root: DownloadResponse(PathFile(root / "a.txt"), offload=False),
}
KEPT: dict[str, Callable[[Path], DownloadResponse]] = {
    "a path": lambda root: DownloadResponse(PathFile(root / "a.txt")),
    "a file object": lambda root: DownloadResponse((root / "a.txt").open("rb")),
    "a file": lambda root: DownloadResponse(File((root / "a.txt").open("rb"))),
    "a stored file": lambda root: DownloadResponse(StorageFile(FileSystemStorage(root, base_url="/media/"), "a.txt")),
    "a stored file that is open": lambda root: DownloadResponse(FileSystemStorage(root).open("a.txt")),
}


@pytest.mark.asyncio
@by_path
@pytest.mark.parametrize("kind", DELETED)
async def test_a_file_that_is_deleted_afterwards_is_not_left_to_a_proxy(root: Path, way: str, kind: str) -> None:
    answer = await fetch(lambda request: DELETED[kind](root), root, way)
    assert not is_offloaded(answer)
    assert answer.body == CONTENT


@pytest.mark.asyncio
@by_path
@pytest.mark.parametrize("kind", KEPT)
async def test_a_file_that_stays_is(root: Path, way: str, kind: str) -> None:
    assert is_offloaded(await fetch(lambda request: KEPT[kind](root), root, way))


@pytest.mark.asyncio
@pytest.mark.parametrize("handler", [get_asgi_application, get_plain_application], ids=["ours", "Django's own"])
@pytest.mark.parametrize("kind", ["a response that deletes it", "a response with another close"])
async def test_a_response_that_deletes_its_file_does_so_after_a_304_too(root: Path, kind: str, handler: Any) -> None:
    def view(request: HttpRequest) -> DownloadResponse:
        return (DELETED[kind] if "if-none-match" in request.headers else KEPT["a path"])(root)

    middleware = ["django.middleware.gzip.GZipMiddleware", SMART]
    with override_settings(**{**by_settings(root), "ROOT_URLCONF": Urls(view), "MIDDLEWARE": middleware}):
        etag = answer_of(await call(handler(), "/file")).headers["etag"]
        headers = {"If-None-Match": etag, "Accept-Encoding": "gzip"}
        answer = answer_of(await call(handler(), "/file", headers=headers))
    assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
    assert "content-encoding" not in answer.headers
    assert not (root / "a.txt").exists()


@pytest.mark.asyncio
async def test_receivers_that_were_there_before_the_request_do_not_count(root: Path) -> None:
    def receiver(**kwargs: Any) -> None: ...

    signals.request_finished.connect(receiver)
    try:
        for way in BY_PATH:
            assert is_offloaded(await fetch(lambda request: KEPT["a path"](root), root, way))
    finally:
        signals.request_finished.disconnect(receiver)


# --- a status that is changed afterwards

CHANGED: list[int] = [403]


def changes_the_status(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
    """A middleware further out, which changes the status."""

    async def middleware(request: HttpRequest) -> Any:
        response = await get_response(request)
        for status in CHANGED:
            response.status_code = status
        return response

    return middleware


changes_the_status.async_capable = True  # type: ignore[attr-defined]
changes_the_status.sync_capable = False  # type: ignore[attr-defined]


@pytest.mark.asyncio
@by_any
@pytest.mark.parametrize("handler", ["ours", "Django's own"])
@pytest.mark.parametrize("statuses, expected", [([403], False), ([404], False), ([206], False), ([403, 200], True)])
async def test_an_order_goes_with_200_alone(
    root: Path,
    way: str,
    handler: str,
    statuses: list[int],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{__name__}.CHANGED", statuses)
    file = StorageFile(FileSystemStorage(root, base_url="/media/"), "a.txt")
    outermost = f"{__name__}.changes_the_status"
    backend, _, source = way.partition(", by ")
    rule = {"source_url": "/media/"} if source == "source_url" else {"source_dir": str(root)}
    changes = by_settings(root, backend.lower(), **rule)

    async def view(request: HttpRequest) -> Any:
        response = DownloadResponse(file)
        return await response.afinish(request) if source == "OffloadMiddleware" else response

    if source == "OffloadMiddleware":
        changes = {"MIDDLEWARE": []}
    changes["MIDDLEWARE"] = [outermost, *changes["MIDDLEWARE"]]
    with override_settings(ROOT_URLCONF=Urls(view), **changes):
        app: Any = get_asgi_application() if handler == "ours" else get_plain_application()
        if source == "OffloadMiddleware":
            app = OffloadMiddleware(app, XAccelRedirect([Rule(root, "/_files/")]))  # type: ignore[arg-type]
        answer = answer_of(await call(app, "/file"))
    assert answer.status == statuses[-1]
    assert bool(ORDERS & set(answer.headers)) is expected
    assert answer.body == b""


RESPONSES: list[Callable[..., ProxiedDownloadResponse]] = [
    lambda: XAccelRedirectResponse("/_files/a.txt", "text/plain", with_buffering=False, limit_rate=1, expires=5),
    lambda: XSendfileResponse("/srv/a.txt", "text/plain"),
    lambda: LighttpdResponse("/srv/a.txt", "text/plain"),
    lambda: ProxiedDownloadResponse(headers={"X-LiteSpeed-Location": "/a.txt", "X-Reproxy-URL": "/a.txt"}),
]


@pytest.mark.parametrize("make", RESPONSES)
def test_a_response_has_its_orders_as_long_as_its_status_is_200(make: Callable[..., ProxiedDownloadResponse]) -> None:
    response = make()
    before = dict(response.items())
    orders = {name for name in before if name.startswith(("X-Accel", "X-Sendfile", "X-LiteSpeed", "X-Reproxy"))}
    assert orders
    for status in (403, 500, 304, 206):
        response.status_code = status
        assert set(response.headers) == set(before) - orders
        assert b"X-" not in response.serialize_headers()
        response["X-Accel-Redirect"] = "/other"
        assert "X-Accel-Redirect" not in response
        assert response.reason_phrase != "OK"
    response.status_code = 200
    assert {name: response[name] for name in orders - {"X-Accel-Redirect"}} == {
        name: before[name] for name in orders - {"X-Accel-Redirect"}
    }


def test_what_is_deleted_does_not_come_back_and_a_default_waits_like_any_order() -> None:
    response = RESPONSES[1]()
    response.status_code = 403
    response.setdefault("X-Accel-Redirect", "/other")
    assert "X-Accel-Redirect" not in response
    del response["X-Sendfile"]
    response.status_code = 200
    assert "X-Sendfile" not in response
    assert response["X-Accel-Redirect"] == "/other"
    response.setdefault("X-Accel-Redirect", "/further")
    assert response["X-Accel-Redirect"] == "/other"


def test_a_response_that_is_made_with_another_status_has_none() -> None:
    response = ProxiedDownloadResponse(status=403, headers={"X-Accel-Redirect": "/_files/a.txt"})
    assert (response.status_code, "X-Accel-Redirect" in response) == (403, False)


@pytest.mark.parametrize("make", RESPONSES)
@pytest.mark.parametrize("change", ["content", "write", "writelines"])
def test_content_that_a_middleware_has_set_is_sent_and_not_the_file(
    make: Callable[..., ProxiedDownloadResponse], change: str
) -> None:
    response = make()
    before = dict(response.items())
    response.content = b""
    assert dict(response.items()) == before
    if change == "content":
        response.content = b"The quota is used up."
    else:
        getattr(response, change)(b"The quota is used up." if change == "write" else [b"The quota ", b"is used up."])
    assert response.content == b"The quota is used up."
    assert not {name.lower() for name in response.headers} & OFFLOAD_HEADERS
    response["X-Accel-Redirect"] = "/other"
    assert "X-Accel-Redirect" not in response
    del response["X-Accel-Redirect"]
    response.content = b""
    assert {name.lower() for name in before} - {name.lower() for name in response.headers} <= {"x-accel-redirect"}
