"""File objects of every kind in a `DownloadResponse`, and the names that clients are told."""

import io
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, InMemoryStorage, Storage
from django.http import HttpRequest
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path, re_path

from downloadview_async.contrib.django import (
    BytesIteratorIO,
    DownloadResponse,
    HTTPFile,
    PathDownloadView,
    PathFile,
    SmartDownloadMiddleware,
    StorageFile,
    VirtualDownloadView,
    VirtualFile,
    content_disposition,
)
from tests.sources.test_fileobject import CONTENT, KINDS, TEXT, TEXTS

both = pytest.mark.parametrize("mode", ["sync", "async"])


class Urls:
    """A URLconf with one view."""

    def __init__(self, view: Any) -> None:
        self.urlpatterns = [path("f/<path:path>", view), path("f", view)]


async def _fetch(url: str, headers: Mapping[str, str]) -> tuple[Any, bytes]:
    response: Any = await AsyncClient().get(url, **headers)  # type: ignore[arg-type]
    return response, b"".join([chunk async for chunk in response]) if response.streaming else response.content


def fetch(view: Any, mode: str, url: str = "/f", headers: Mapping[str, str] | None = None) -> tuple[Any, bytes]:
    headers = headers or {}
    with override_settings(ROOT_URLCONF=Urls(view)):
        if mode == "async":
            return async_to_sync(_fetch)(url, headers)
        response: Any = Client().get(url, **headers)  # type: ignore[arg-type]
        return response, b"".join(response) if response.streaming else response.content


class Opens(Storage):
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def _open(self, name: str, mode: str = "rb") -> Any:
        return self.make()


def view_of(make: Callable[[], Any], entry: str) -> Any:
    class Made(VirtualDownloadView):
        basename = "x.bin"

        def get_file(self) -> Any:
            return VirtualFile(make())

    ways: dict[str, Callable[[HttpRequest], Any]] = {
        "as it is": lambda request: DownloadResponse(make(), basename="x.bin").finish(request),
        "File": lambda request: DownloadResponse(File(make(), name="x.bin")).finish(request),
        "storage": lambda request: DownloadResponse(StorageFile(Opens(make), "x.bin")).finish(request),
    }
    return ways.get(entry) or Made.as_view()


@pytest.mark.parametrize("entry", ["as it is", "File", "storage", "VirtualFile"])
@pytest.mark.parametrize("kind", [*KINDS, *TEXTS])
def test_all_of_a_file_object_is_sent(kind: str, entry: str) -> None:
    make, expected = (TEXTS[kind], TEXT.encode()) if kind in TEXTS else (KINDS[kind][0], CONTENT)
    response, body = fetch(view_of(make, entry), "sync")
    assert (response.status_code, body == expected) == (200, True)
    assert response.get("Content-Length") in (None, str(len(expected)))


def unnamed(make: Callable[[], Any]) -> Any:
    file = make()
    file.write(b"0123456789")
    file.flush()
    return file


UNNAMED: dict[str, Callable[[], Any]] = {
    "TemporaryFile": lambda: unnamed(tempfile.TemporaryFile),
    "SpooledTemporaryFile": lambda: unnamed(tempfile.SpooledTemporaryFile),
    "fdopen": lambda: unnamed(lambda: os.fdopen(os.memfd_create("x"), "w+b")),
    "File": lambda: File(unnamed(tempfile.TemporaryFile)),
    "BytesIO": lambda: io.BytesIO(b"0123456789"),
}


@both
@pytest.mark.parametrize("basename", [None, "a.bin"])
@pytest.mark.parametrize("kind", UNNAMED)
def test_a_file_object_needs_no_name(kind: str, basename: str | None, mode: str) -> None:
    async def view(request: HttpRequest) -> Any:
        return await DownloadResponse(UNNAMED[kind](), basename=basename).afinish(request)

    def blocking(request: HttpRequest) -> Any:
        return DownloadResponse(UNNAMED[kind](), basename=basename).finish(request)

    response, body = fetch(view if mode == "async" else blocking, mode)
    assert (response.status_code, body) == (200, b"0123456789")
    assert response["Content-Disposition"] == f'attachment; filename="{basename or "download"}"'


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_device_is_not_empty_because_it_has_no_size(buffering: int) -> None:
    with open("/dev/zero", "rb", buffering) as device:
        response: Any = DownloadResponse(device, basename="zero").finish(RequestFactory().get("/"))
        assert response.status_code == 200
        assert {"Content-Length", "ETag", "Last-Modified", "Accept-Ranges"}.isdisjoint(response.headers)
        content = iter(response)
        assert not any(next(content))
        content.close()
        response.close()


def test_a_name_of_bytes_is_a_name(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"0123456789")
    response = DownloadResponse(open(os.fsencode(file), "rb"))  # noqa: SIM115
    assert response.get_basename() == "a.txt"
    response.close()


DISPOSITIONS = [
    ("/srv/secret/ada/report.pdf", 'attachment; filename="report.pdf"'),
    ("C:\\srv\\ada\\report.pdf", 'attachment; filename="report.pdf"'),
    ("a/b c.txt", "attachment; filename=\"b_c.txt\"; filename*=UTF-8''b%20c.txt"),
    (
        "祝您平安.odt",
        "attachment; filename=\"download.odt\"; filename*=UTF-8''%E7%A5%9D%E6%82%A8%E5%B9%B3%E5%AE%89.odt",
    ),
    ("祝您.tar.gz", "attachment; filename=\"download.tar.gz\"; filename*=UTF-8''%E7%A5%9D%E6%82%A8.tar.gz"),
    ("祝 2.odt", "attachment; filename=\"2.odt\"; filename*=UTF-8''%E7%A5%9D%202.odt"),
    ("espacé .txt", "attachment; filename=\"espace_.txt\"; filename*=UTF-8''espac%C3%A9%20.txt"),
    (".htaccess", 'attachment; filename=".htaccess"'),
    ("", 'attachment; filename="download"'),
]


@pytest.mark.parametrize("name, expected", DISPOSITIONS)
def test_a_client_is_told_a_name_and_no_path(name: str, expected: str) -> None:
    assert content_disposition(name) == expected
    assert DownloadResponse(io.BytesIO(), basename=name or None)["Content-Disposition"] == expected


# --- a path from the URL that a get_path joins to a directory


def joined(directory: Path, how: str) -> Any:
    class Joined(PathDownloadView):
        path_url_kwarg = "unused" if how in ("another argument", "positions") else "path"

        def get_path(self) -> str:
            if how == "positions":
                return os.path.join(directory, self.args[0])
            return os.path.join(directory, super().get_path() if how == "super" else self.kwargs["path"])

    return Joined.as_view()


class ByPosition(Urls):
    """A URLconf whose argument has no name."""

    def __init__(self, view: Any) -> None:
        self.urlpatterns = [re_path("^f/(.+)$", view)]


@both
@pytest.mark.parametrize("how", ["super", "kwargs", "another argument", "positions"])
def test_a_path_that_is_joined_to_a_directory_stays_in_it(
    tmp_path: Path, how: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "positions":
        monkeypatch.setattr(f"{__name__}.Urls", ByPosition)
    (tmp_path / "files" / "x").mkdir(parents=True)
    (tmp_path / "files" / "x" / "a.txt").write_bytes(b"0123456789")
    (tmp_path / "files" / "a..b").write_bytes(b"0123456789")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    view = joined(tmp_path / "files", how)
    for name in ("x/a.txt", "a..b"):
        assert fetch(view, mode, f"/f/{name}")[1] == b"0123456789"
    for name in (
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "x/..%2f..%2fsecret.txt",
        f"%2f{tmp_path}/secret.txt".replace("%2f/", "%2f"),
        f"/{tmp_path}/secret.txt",
        "..%5csecret.txt",
        "x%2f..",
        "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    ):
        response, body = fetch(view, mode, f"/f/{name}")
        assert (response.status_code, b"secret" in body) == (404, False), name


PLAIN = b"0123456789" * 100


class Inflated(File):  # type: ignore[type-arg]
    """A file wrapper of a project that inflates what it reads; it inherits `size`, which counts the stored bytes."""

    def __init__(self, stored: bytes) -> None:
        super().__init__(io.BytesIO(stored), "x.bin")
        self.left = zlib.decompress(stored)

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        end = len(self.left) if size < 0 else size
        block, self.left = self.left[:end], self.left[end:]
        return block


class Fetched:
    """What `requests.get` returns."""

    def __init__(self, url: str, **kwargs: Any) -> None:
        self.stored = zlib.compress(PLAIN)
        self.status_code, self.headers = 200, {"Content-Length": str(len(self.stored)), "Content-Type": "text/plain"}

    def iter_content(self, **kwargs: Any) -> Iterator[bytes]:
        yield self.stored

    def close(self) -> None:
        pass


class InflatedHTTPFile(HTTPFile):
    @property
    def file(self) -> Any:  # type: ignore[override]
        return BytesIteratorIO(iter([zlib.decompress(b"".join(self.request.iter_content()))]))


class MeasuredHTTPFile(InflatedHTTPFile):
    @property
    def file(self) -> Any:  # type: ignore[override]
        return super().file

    @property
    def size(self) -> int:
        return len(PLAIN)


@both
@pytest.mark.parametrize(
    "kind, content, length",
    [
        (HTTPFile, zlib.compress(PLAIN), len(zlib.compress(PLAIN))),
        (InflatedHTTPFile, PLAIN, None),
        (MeasuredHTTPFile, PLAIN, len(PLAIN)),
    ],
)
def test_a_content_length_counts_the_bytes_that_a_fetched_file_gives(
    kind: type[HTTPFile], content: bytes, length: int | None, mode: str
) -> None:
    def view(request: HttpRequest) -> Any:
        return DownloadResponse(kind(Fetched, "https://files.example.org/x", name="x.txt")).finish(request)

    response, body = fetch(view, mode)
    assert (response.status_code, body == content) == (200, True)
    assert response.get("Content-Length") == (None if length is None else str(length))


@both
@pytest.mark.parametrize("size, length", [(None, None), (len(PLAIN), str(len(PLAIN)))])
def test_a_size_that_a_view_has_looked_at_is_not_promised(size: int | None, length: str | None, mode: str) -> None:
    def view(request: HttpRequest) -> Any:
        file = VirtualFile(Inflated(zlib.compress(PLAIN)), name="x.bin", size=size)
        assert file.size  # a view may log it
        return DownloadResponse(file).finish(request)

    response, body = fetch(view, mode)
    assert (response.status_code, body == PLAIN, response.get("Content-Length")) == (200, True, length)


@both
@pytest.mark.parametrize("entry", ["as it is", "storage"])
def test_a_wrapper_that_inflates_is_sent_whole(entry: str, mode: str) -> None:
    class Deflated(InMemoryStorage):
        def _open(self, name: str, mode: str = "rb") -> Any:
            return Inflated(super()._open(name, mode).read())  # type: ignore[misc]

    storage = Deflated()
    storage.save("x.bin", ContentFile(zlib.compress(PLAIN)))

    def view(request: HttpRequest) -> Any:
        file = StorageFile(storage, "x.bin") if entry == "storage" else Inflated(zlib.compress(PLAIN))
        return DownloadResponse(file).finish(request)

    response, body = fetch(view, mode)
    assert (response.status_code, body == PLAIN, response.get("Content-Length")) == (200, True, None)


@both
@pytest.mark.parametrize("replacements, has_validators", [(1, True), (2, False)])
def test_validators_are_those_of_the_version_that_a_storage_has_opened(
    replacements: int, has_validators: bool, mode: str
) -> None:
    class Replaced(Opens):
        version = 0

        def _open(self, name: str, mode: str = "rb") -> Any:
            content = b"version %d" % self.version
            self.version = min(self.version + 1, replacements)
            return ContentFile(content)

        def get_modified_time(self, name: str) -> datetime:
            return datetime(2023, 11, 14, 22, self.version, 20, 5, tzinfo=UTC)

    storage = Replaced(lambda: None)

    def view(request: HttpRequest) -> Any:
        return DownloadResponse(StorageFile(storage, "x.bin")).finish(request)

    response, body = fetch(view, mode)
    assert (response.status_code, body) == (200, b"version 1")
    expected = "Tue, 14 Nov 2023 22:01:20 GMT" if has_validators else None
    assert (response.get("Last-Modified"), response.has_header("ETag")) == (expected, has_validators)


# --- a class of the project's that reads otherwise than what it wraps or is derived from


STORED = bytes(range(256)) * 1000
SECRET = bytes(byte ^ 1 for byte in STORED)


def decrypted(stored: Any) -> Any:
    return bytes(byte ^ 1 for byte in stored)


class DecryptingFile(File):  # type: ignore[type-arg]
    file: Any

    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))


class DecryptingVirtualFile(VirtualFile):
    file: Any

    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))


class DecryptingPathFile(PathFile):
    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))


class OpenedDecrypting(PathFile):
    def _opened(self) -> Any:
        return DecryptingFile(super()._opened())


class DecryptingStorageFile(StorageFile):
    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))


class DecryptingContent(ContentFile):  # type: ignore[type-arg]
    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))


class DecryptingBytes(io.BytesIO):
    def read(self, *args: Any) -> bytes:
        return bytes(decrypted(super().read(*args)))


class DecryptingReader(io.BufferedReader):
    def read(self, *args: Any) -> bytes:
        return bytes(decrypted(super().read(*args)))


class DecryptingRaw(io.FileIO):
    """As Python reads from it: by `read` alone, and by `readinto` and `readall` through a buffer."""

    def read(self, *args: Any) -> bytes:
        return bytes(decrypted(super().read(*args)))

    def readall(self) -> bytes:
        return bytes(decrypted(super().readall()))

    def readinto(self, buffer: Any, /) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class Decrypting:
    """A wrapper that is not Django's."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.name = file.name

    @property
    def closed(self) -> bool:
        return bool(self.file.closed)

    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))

    def seek(self, *args: Any) -> int:
        return int(self.file.seek(*args))

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class WithoutClosed:
    def __init__(self, file: Any) -> None:
        self.file, self.name = file, file.name

    def read(self, *args: Any) -> Any:
        return decrypted(self.file.read(*args))

    def close(self) -> None:
        self.file.close()


def as_any(file: Any) -> Any:
    return file


def by_attribute(path: str) -> Any:
    file = open(path, "rb")  # noqa: SIM115
    reads = file.read
    file.read = lambda *args: decrypted(reads(*args))  # type: ignore[method-assign]
    return file


def temporary(path: str) -> Any:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    file.write(STORED)
    file.flush()
    reads = file.read
    file.read = lambda *args: decrypted(reads(*args))  # type: ignore[method-assign]
    return file


OWN_READS: dict[str, Callable[[str], Any]] = {
    "File": lambda path: DecryptingFile(open(path, "rb")),  # noqa: SIM115
    "File of a File": lambda path: File(DecryptingFile(open(path, "rb"))),  # noqa: SIM115
    "VirtualFile": lambda path: DecryptingVirtualFile(open(path, "rb"), name=path),  # noqa: SIM115
    "VirtualFile with a URL": lambda path: DecryptingVirtualFile(io.BytesIO(STORED), "x.bin", "/media/x.bin"),
    "VirtualFile of a File": lambda path: VirtualFile(DecryptingFile(open(path, "rb")), name=path),  # noqa: SIM115
    "PathFile": DecryptingPathFile,
    "PathFile that opens": OpenedDecrypting,
    "StorageFile": lambda path: DecryptingStorageFile(
        FileSystemStorage(os.path.dirname(path), base_url="/media/"), os.path.basename(path)
    ),
    "ContentFile": lambda path: DecryptingContent(STORED, name=path),
    "BytesIO": lambda path: DecryptingBytes(STORED),
    "BufferedReader": lambda path: DecryptingReader(io.FileIO(path)),
    "FileIO": DecryptingRaw,
    "buffered FileIO": lambda path: io.BufferedReader(DecryptingRaw(path)),
    "wrapper": lambda path: Decrypting(open(path, "rb")),  # noqa: SIM115
    "File of a wrapper": lambda path: File(as_any(Decrypting(open(path, "rb")))),  # noqa: SIM115
    "wrapper without closed": lambda path: WithoutClosed(open(path, "rb")),  # noqa: SIM115
    "attribute": by_attribute,
    "attribute of a temporary file": temporary,
}


@both
@pytest.mark.parametrize("order", [None, "bytes=100-199"])
@pytest.mark.parametrize("kind", OWN_READS)
def test_what_a_class_reads_is_sent_and_not_what_is_stored(
    kind: str, order: str | None, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(STORED)

    class Own(VirtualDownloadView):
        def get_file(self) -> Any:
            return OWN_READS[kind](str(path))

    headers = {} if order is None else {"HTTP_RANGE": order}
    rules = [
        {"source_dir": str(tmp_path), "destination_url": "/_files/"},
        {"source_url": "/media/", "destination_url": "/_media/"},
    ]
    offloading = {"BACKEND": "nginx", "RULES": rules}
    middleware = f"{SmartDownloadMiddleware.__module__}.SmartDownloadMiddleware"
    with override_settings(DOWNLOADVIEW=offloading, MIDDLEWARE=[middleware]):
        response, body = fetch(Own.as_view(), mode, headers=headers)
    assert "X-Accel-Redirect" not in response
    if response.status_code == 206:
        assert body == SECRET[100:200]
    else:
        assert (response.status_code, body == SECRET) == (200, True)


class Padded(DecryptingFile):
    """More bytes than are stored, of which an inherited `seek` knows nothing."""

    def read(self, *args: Any) -> Any:
        return b"".join(bytes((byte, byte)) for byte in self.file.read(*args))


@both
def test_an_inherited_seek_does_not_count_what_a_class_reads(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(STORED)

    def view(request: HttpRequest) -> Any:
        return DownloadResponse(Padded(open(path, "rb"))).finish(request)

    response, body = fetch(view, mode)
    assert (response.status_code, len(body), response.get("Content-Length")) == (200, 2 * len(STORED), None)


def test_a_path_that_a_class_reads_in_its_own_way_may_be_missing(tmp_path: Path) -> None:
    for kind in (DecryptingPathFile, OpenedDecrypting):
        response, _ = fetch(lambda request, kind=kind: DownloadResponse(kind(tmp_path / "x")).finish(request), "sync")
        assert response.status_code == 404


@both
@pytest.mark.parametrize("has_root", [False, True])
def test_a_path_that_the_project_has_set_later_is_the_one_that_is_sent(
    tmp_path: Path, has_root: bool, mode: str
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)

    def view(request: HttpRequest) -> Any:
        file = PathFile("a.txt", root=tmp_path) if has_root else PathFile(tmp_path / "a.txt")
        file.path = str(tmp_path / "b.txt")
        return DownloadResponse(file).finish(request)

    assert fetch(view, mode)[1] == b"b.txt"


def test_a_closed_file_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(STORED)

    def closed(kind: Callable[[Any], Any]) -> Any:
        file = kind(open(path, "rb"))  # noqa: SIM115
        file.close()
        return file

    for kind in (lambda file: file, File, DecryptingFile):
        response, _ = fetch(lambda request, kind=kind: DownloadResponse(closed(kind)).finish(request), "sync")
        assert response.status_code == 404


def test_a_class_that_changes_nothing_of_how_it_is_read_is_sent_by_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(STORED)

    class Counted(File):  # type: ignore[type-arg]
        downloads = 0

    class Marked(io.BufferedReader):
        mark = "x"

    def used() -> Any:
        file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        file.write(STORED)
        assert file.seek(0) == 0
        return file

    for make in (lambda: Counted(open(path, "rb")), lambda: Marked(io.FileIO(path)), used):  # noqa: SIM115
        response, body = fetch(lambda request, make=make: DownloadResponse(make()).finish(request), "sync")
        assert (response.status_code, body == STORED, "ETag" in response) == (200, True, True)


@both
def test_a_path_is_not_a_file(mode: str) -> None:
    paths: list[Any] = ["manuals/terms.txt", Path("manuals/terms.txt")]
    for path_ in paths:
        with pytest.raises(TypeError, match=r"not the path 'manuals/terms.txt': use PathDownloadView, or Download"):
            DownloadResponse(path_)
    with pytest.raises(TypeError, match="not the path"):
        DownloadResponse(paths[1], basename="terms.txt")

    def view(request: HttpRequest) -> Any:
        # As in django-downloadview, text with a name is content.
        return DownloadResponse("Terms: be kind", basename="terms.txt").finish(request)

    assert fetch(view, mode)[1] == b"Terms: be kind"


def test_a_coroutine_is_not_a_file() -> None:
    async def resolve() -> None: ...

    pending = resolve()
    with pytest.raises(TypeError, match=r"await source\.resolve"):
        DownloadResponse(pending)
    pending.close()


def test_allowed_hosts_that_are_one_text_are_refused() -> None:
    """Each letter would be a host, and each request would get a 502."""
    with pytest.raises(ImproperlyConfigured, match="allow_hosts takes a list of hosts"):
        HTTPFile(url="http://files.test/a.txt", allow_hosts="files.test")
