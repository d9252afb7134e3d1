"""What is decided about a download, by whom, and that WSGI and ASGI decide the same: by Client and AsyncClient."""

import email.utils
import gzip
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import PermissionDenied
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, InMemoryStorage, default_storage
from django.core.management import call_command
from django.db import connections
from django.http import HttpRequest
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views.decorators.clickjacking import xframe_options_exempt
from django.views.generic.edit import DeletionMixin

from downloadview_async import AuthenticationRequired
from downloadview_async.contrib.django import (
    BaseDownloadView,
    DownloadResponse,
    HTTPDownloadView,
    ObjectDownloadView,
    PathDownloadView,
    StorageDownloadView,
    StorageFile,
    VirtualDownloadView,
    VirtualFile,
    content_disposition,
)
from downloadview_async.http.disposition import is_device_name
from tests.contrib.django.documents.models import Document

if TYPE_CHECKING:
    _DeletionMixin = DeletionMixin[Any]  # only the stubs have it generic
else:
    _DeletionMixin = DeletionMixin

CONTENT = b"0123456789"
TEXT = b"All work and no play. " * 2000
OLD, MODIFIED, LATER = 1_000_000_000, 1_700_000_000, 1_710_000_000  # of the application, of the file, after both
SMART = "downloadview_async.contrib.django.SmartDownloadMiddleware"
FRAMES = "django.middleware.clickjacking.XFrameOptionsMiddleware"
GZIP = "django.middleware.gzip.GZipMiddleware"
OFFLOAD = "x-accel-redirect"
VIEWS = [
    BaseDownloadView,
    HTTPDownloadView,
    ObjectDownloadView,
    PathDownloadView,
    StorageDownloadView,
    VirtualDownloadView,
]


class Urls:
    """A URLconf with one view."""

    def __init__(self, view: Any) -> None:
        self.urlpatterns = [path("file", view), path("file/<int:pk>", view)]


@dataclass(frozen=True)
class Answer:
    """A response of either client, read in the way it is meant to be."""

    status: int
    headers: dict[str, str]
    body: bytes
    cookies: dict[str, str]


async def _fetch(url: str, method: str, headers: dict[str, str]) -> tuple[Any, bytes]:
    response: Any = await AsyncClient().generic(method, url, headers=headers)
    if not response.streaming:
        return response, response.content
    assert response.is_async
    return response, b"".join([chunk async for chunk in response])


def fetch(view: Any, mode: str, *, url: str = "/file", method: str = "GET", **headers: str) -> Answer:
    """Ask a project that has this one view. An exception of the view's is raised here."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with override_settings(ROOT_URLCONF=Urls(view)):
        if mode == "async":
            response, body = async_to_sync(_fetch)(url, method, headers)
        else:
            response = Client().generic(method, url, headers=headers)
            body = b"".join(response) if response.streaming else response.content
    cookies = {name: cookie.value for name, cookie in response.cookies.items()}
    return Answer(response.status_code, {name.lower(): value for name, value in response.items()}, body, cookies)


both = pytest.mark.parametrize("mode", ["sync", "async"])


def date(seconds: int) -> str:
    """Return an HTTP date."""
    return email.utils.formatdate(seconds, usegmt=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in {"a.txt": CONTENT, "text.txt": TEXT, "private/report.txt": CONTENT}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (MODIFIED, MODIFIED))
    return tmp_path


# --- the proxy sends the file that has been checked, and no other one


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of another storage, with a file of the same name as one in `root`."""
    directory = tmp_path_factory.mktemp("elsewhere")
    (directory / "a.txt").write_bytes(b"elsewhere")
    return directory


def _offloading(**rule: str) -> Any:
    rules = [{**rule, "destination_url": "/internal/"}]
    return override_settings(MIDDLEWARE=[SMART], DOWNLOADVIEW={"BACKEND": "nginx", "RULES": rules})


def _answering(make: Callable[[], Any]) -> Callable[[HttpRequest], DownloadResponse]:
    """Return a view that answers with a file which is made anew for each request."""

    def view(request: HttpRequest) -> DownloadResponse:
        return DownloadResponse(make())

    return view


@both
@pytest.mark.parametrize("name", ["a.txt", "missing.txt"])
def test_a_file_that_only_claims_a_path_is_sent_with_its_own_bytes(root: Path, mode: str, name: str) -> None:
    with tempfile.TemporaryFile() as temporary, _offloading(source_dir=str(root)):
        temporary.write(b"redacted")
        temporary.flush()
        answer = fetch(_answering(lambda: File(temporary, name=str(root / name))), mode)
        assert (answer.status, answer.body, OFFLOAD in answer.headers) == (200, b"redacted", False)


class _Locked:
    """A file that cannot be opened without a password."""

    name, location = "a.txt", None

    def open(self, request: Any = None) -> Any:
        raise AuthenticationRequired("who is it", challenge='Basic realm="files"')


@both
def test_a_file_that_needs_a_password_is_answered_by_a_challenge(mode: str) -> None:
    with _offloading(source_dir="/srv"):
        answer = fetch(_answering(_Locked), mode)
    assert (answer.status, answer.headers["www-authenticate"], answer.body) == (401, 'Basic realm="files"', b"")


@both
def test_an_open_file_that_has_been_replaced_is_sent_with_its_own_bytes(root: Path, mode: str) -> None:
    with (
        (root / "a.txt").open("rb") as first,
        (root / "a.txt").open("rb") as second,
        _offloading(source_dir=str(root)),
    ):
        answer = fetch(_answering(lambda: File(first)), mode)
        assert (answer.headers[OFFLOAD], answer.body) == ("/internal/a.txt", b"")
        (root / "new").write_bytes(b"secret")
        (root / "new").rename(root / "a.txt")
        answer = fetch(_answering(lambda: File(second)), mode)
        assert (answer.status, answer.body, OFFLOAD in answer.headers) == (200, CONTENT, False)


@both
def test_a_relative_source_dir_is_about_names_in_storages(root: Path, mode: str) -> None:
    name = "private/report.txt"
    with _offloading(source_dir="private"):
        for make in (
            lambda: ContentFile(b"redacted", name=name),
            lambda: VirtualFile(io.BytesIO(b"redacted"), name=name),
            lambda: File(io.BytesIO(b"redacted"), name=name),
        ):
            answer = fetch(_answering(make), mode)
            assert (answer.status, answer.body, OFFLOAD in answer.headers) == (200, b"redacted", False)
        answer = fetch(_answering(lambda: StorageFile(FileSystemStorage(location=root), name)), mode)
        assert (answer.headers[OFFLOAD], answer.body) == ("/internal/report.txt", b"")


@both
def test_a_storage_of_another_directory_does_not_borrow_the_urls_of_media_root(
    root: Path, elsewhere: Path, mode: str
) -> None:
    with override_settings(MEDIA_ROOT=str(root), MEDIA_URL="/media/"), _offloading(source_url="/media/"):
        view = StorageDownloadView.as_view(storage=FileSystemStorage(location=elsewhere), path="a.txt")
        answer = fetch(view, mode)
        assert (answer.status, answer.body, OFFLOAD in answer.headers) == (200, b"elsewhere", False)
        for storage in (
            FileSystemStorage(location=elsewhere, base_url="/media/"),  # the project says so
            FileSystemStorage(location=f"{root}/"),
            FileSystemStorage(),
            default_storage,
        ):
            answer = fetch(StorageDownloadView.as_view(storage=storage, path="a.txt"), mode)
            assert (answer.headers[OFFLOAD], answer.body) == ("/internal/a.txt", b"")


@both
@pytest.mark.parametrize("rule", [{"source_url": "/media/"}, {"source_dir": "private"}], ids=["url", "relative"])
def test_a_field_s_new_content_is_sent_as_long_as_it_is_not_stored(root: Path, mode: str, rule: dict[str, str]) -> None:
    name = "private/report.txt"
    with override_settings(MEDIA_ROOT=str(root), MEDIA_URL="/media/"), _offloading(**rule):
        assigned = ContentFile(b"redacted", name=name)
        answer = fetch(_answering(lambda: Document(name="new", file=assigned).file), mode)
        assert (answer.status, answer.body, OFFLOAD in answer.headers) == (200, b"redacted", False)
        answer = fetch(_answering(lambda: Document(name="stored", file=name).file), mode)
        assert (answer.body, OFFLOAD in answer.headers) == (b"", True)


# --- hooks are the same under WSGI and ASGI


@pytest.mark.parametrize("name", ["aget", "adispatch", "arender_to_response"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_no_hook_that_only_asgi_would_call(root: Path, view: type[Any], name: str) -> None:
    assert not hasattr(view, name)

    async def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionDenied

    guarded: Any = type("Guarded", (PathDownloadView,), {name: refuse})
    answers = [fetch(guarded.as_view(path=root / "a.txt"), mode) for mode in ("sync", "async")]
    assert [(answer.status, answer.body) for answer in answers] == [(200, CONTENT)] * 2


@pytest.fixture
def documents() -> Iterator[None]:
    call_command("migrate", run_syncdb=True, verbosity=0)
    Document.objects.all().delete()
    connections.close_all()
    yield
    Document.objects.all().delete()
    connections.close_all()


@both
def test_a_view_answers_the_methods_that_it_names(root: Path, mode: str) -> None:
    view = PathDownloadView.as_view(path=root / "a.txt", http_method_names=["post", "options"])
    for method in ("GET", "HEAD"):
        answer = fetch(view, mode, method=method)
        assert (answer.status, answer.body) == (405, b"")
    assert fetch(view, mode, method="OPTIONS").status == 200
    assert fetch(PathDownloadView.as_view(path=root / "a.txt"), mode).body == CONTENT
    assert fetch(PathDownloadView.as_view(path=root / "a.txt"), mode, method="POST").status == 405


class ByCall:
    """What is called as a method without being a function."""

    def __call__(self) -> Any:
        """Return the path."""
        return Document.objects.get().name


class ByDescriptor:
    """What gives a value without being a property."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return Document.objects.get().name if instance is not None else self


@both
@pytest.mark.parametrize(
    "names",
    [
        {"path": cached_property(lambda self: Document.objects.get().name)},
        {"get_path": partialmethod(lambda self, field: getattr(Document.objects.get(), field), "name")},
        {"get_path": ByCall()},
        {"path": ByDescriptor()},
    ],
    ids=["cached_property", "partialmethod", "callable", "descriptor"],
)
def test_an_attribute_that_asks_the_database(root: Path, documents: None, mode: str, names: dict[str, Any]) -> None:
    Document.objects.create(name=str(root / "a.txt"))
    connections.close_all()
    view: Any = type("ByDatabase", (PathDownloadView,), names)
    for name, value in names.items():
        if isinstance(value, cached_property):
            value.__set_name__(view, name)
    assert fetch(view.as_view(), mode).body == CONTENT


class Deleting(_DeletionMixin, ObjectDownloadView):
    """Gives the file, or deletes it."""

    model = Document
    success_url = "/gone"


@both
def test_django_s_own_mixin_deletes(documents: None, mode: str) -> None:
    document = Document.objects.create(name="a.txt")
    connections.close_all()
    answer = fetch(Deleting.as_view(), mode, url=f"/file/{document.pk}", method="DELETE")
    assert (answer.status, answer.headers["location"]) == (302, "/gone")
    assert not Document.objects.exists()


class Awaiting(PathDownloadView):
    """Has a coroutine for GET that makes its response itself."""

    async def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Answer a GET or HEAD."""
        return DownloadResponse(await self.aget_file(), basename="awaited.txt")


@both
@pytest.mark.parametrize("middleware", [[], [SMART]])
def test_a_coroutine_for_get(root: Path, mode: str, middleware: list[str]) -> None:
    settings: dict[str, Any] = {"MIDDLEWARE": middleware, "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": []}}
    view = Awaiting.as_view(path=root / "a.txt")
    with override_settings(**settings):
        answer = fetch(view, mode)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, CONTENT, "10")
        assert answer.headers["content-disposition"] == 'attachment; filename="awaited.txt"'
        part = fetch(view, mode, range="bytes=2-4")
        assert (part.status, part.body) == (206, b"234")
        assert fetch(view, mode, if_none_match=answer.headers["etag"]).status == 304


# --- validators


class Stamped(PathDownloadView):
    """Says itself when the file was modified, or which it is."""

    stamp: dict[str, str] = {}

    def download_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the response with these headers."""
        response = super().download_response(*args, **kwargs)
        for header, value in self.stamp.items():
            response[header] = value
        return response


LAST_MODIFIED = [
    # the application's Last-Modified, If-Modified-Since, status
    (OLD, OLD, 304),
    (OLD, OLD + 1, 304),  # though the file is newer than that
    (OLD, OLD - 1, 200),
    (LATER, LATER, 304),
    (LATER, MODIFIED, 200),  # though the file is not newer than that
]


@both
@pytest.mark.parametrize("own, since, status", LAST_MODIFIED)
def test_last_modified_of_the_application_s_own(root: Path, mode: str, own: int, since: int, status: int) -> None:
    view = Stamped.as_view(path=root / "a.txt")
    stamped = Stamped.as_view(path=root / "a.txt", stamp={"Last-Modified": date(own)})
    assert fetch(view, mode).headers["last-modified"] == date(MODIFIED)
    assert fetch(stamped, mode).headers["last-modified"] == date(own)
    answer = fetch(stamped, mode, if_modified_since=date(since))
    assert (answer.status, answer.headers["last-modified"]) == (status, date(own))
    assert fetch(stamped, mode, if_unmodified_since=date(own)).status == 200
    assert fetch(stamped, mode, if_unmodified_since=date(own - 1)).status == 412


@both
def test_an_entity_tag_of_the_application_s_own(root: Path, mode: str) -> None:
    own = fetch(Stamped.as_view(path=root / "a.txt"), mode).headers["etag"]
    view = Stamped.as_view(path=root / "a.txt", stamp={"ETag": '"mine"'})
    assert fetch(view, mode).headers["etag"] == '"mine"'
    assert fetch(view, mode, if_none_match='"mine"').status == 304
    assert fetch(view, mode, if_none_match=own).status == 200
    assert fetch(view, mode, range="bytes=0-1", if_range='"mine"').status == 206
    assert fetch(view, mode, range="bytes=0-1", if_range=own).body == CONTENT


@both
@pytest.mark.parametrize("says, status", [(True, 200), (False, 304)])
def test_was_modified_since_of_the_application_s_own_has_the_last_word(
    root: Path, mode: str, says: bool, status: int
) -> None:
    class Saying(PathDownloadView):
        def was_modified_since(self, file_instance: Any, since: Any) -> Any:
            return says

    view = Saying.as_view(path=root / "a.txt")
    whole = fetch(view, mode)
    assert whole.status == 200
    for since in (OLD, MODIFIED, LATER):
        assert fetch(view, mode, if_modified_since=date(since)).status == status
    # a stronger condition, which nobody has asked about
    assert fetch(view, mode, if_modified_since=date(OLD), if_none_match=whole.headers["etag"]).status == 304
    assert fetch(view, mode, if_modified_since=date(LATER), if_none_match='"another"').status == 200
    part = fetch(view, mode, if_modified_since=date(MODIFIED), range="bytes=0-1")
    assert part.status == (206 if says else 304)


@both
@pytest.mark.parametrize("says, status", [(True, 200), (False, 304)])
def test_was_modified_since_of_the_file_has_the_last_word(mode: str, says: bool, status: int) -> None:
    class Saying(VirtualDownloadView):
        def get_file(self) -> Any:
            file = ContentFile(CONTENT, name="a.txt")
            file.was_modified_since = lambda since: says  # type: ignore[attr-defined]
            return file

    assert fetch(Saying.as_view(), mode).body == CONTENT
    assert fetch(Saying.as_view(), mode, if_modified_since=date(LATER)).status == status


@both
@pytest.mark.parametrize("since, status", [(MODIFIED - 1, 200), (MODIFIED, 304), (LATER, 304)])
def test_without_any_of_that_the_file_decides(root: Path, mode: str, since: int, status: int) -> None:
    for view in (
        PathDownloadView.as_view(path=root / "a.txt"),
        StorageDownloadView.as_view(storage=FileSystemStorage(location=root), path="a.txt"),
    ):
        assert fetch(view, mode, if_modified_since=date(since)).status == status


# --- what a response carries on


@method_decorator(xframe_options_exempt, name="dispatch")
class Framed(PathDownloadView):
    """May be shown in another site's frame, and sets a cookie."""

    attachment = False

    def download_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the response with a cookie."""
        response = super().download_response(*args, **kwargs)
        response.set_cookie("seen", "yes")
        return response


@both
def test_exemptions_and_cookies_are_those_of_every_answer(root: Path, mode: str) -> None:
    view = Framed.as_view(path=root / "a.txt")
    with override_settings(MIDDLEWARE=[FRAMES]):
        denied = fetch(PathDownloadView.as_view(path=root / "a.txt"), mode)
        assert denied.headers["x-frame-options"] == "DENY"  # without the decorator
        whole = fetch(view, mode)
        answers = [
            whole,
            fetch(view, mode, range="bytes=0-1"),
            fetch(view, mode, if_none_match=whole.headers["etag"]),
            fetch(view, mode, range="bytes=99-"),
        ]
    with _offloading(source_dir=str(root)), override_settings(MIDDLEWARE=[FRAMES, SMART]):
        offloaded = fetch(view, mode)
    assert offloaded.headers[OFFLOAD] == "/internal/a.txt"
    answers.append(offloaded)
    assert [answer.status for answer in answers] == [200, 206, 304, 416, 200]
    assert [answer.cookies for answer in answers] == [{"seen": "yes"}] * len(answers)
    assert [answer.headers.get("x-frame-options") for answer in answers] == [None] * len(answers)


@both
def test_a_part_is_never_compressed_and_the_whole_is(root: Path, mode: str) -> None:
    view = PathDownloadView.as_view(path=root / "text.txt")
    with override_settings(MIDDLEWARE=[GZIP]):
        part = fetch(view, mode, accept_encoding="gzip", range="bytes=5-4004")
        assert (part.status, part.body) == (206, TEXT[5:4005])
        assert (part.headers["content-length"], part.headers["content-range"]) == ("4000", f"bytes 5-4004/{len(TEXT)}")
        assert "content-encoding" not in part.headers
        assert not part.headers["etag"].startswith("W/")
        whole = fetch(view, mode, accept_encoding="gzip")
        assert (whole.status, whole.headers["content-encoding"]) == (200, "gzip")
        assert gzip.decompress(whole.body) == TEXT
        assert len(whole.body) < len(TEXT) // 10
        assert int(whole.headers.get("content-length", len(whole.body))) == len(whole.body)
        assert whole.headers["etag"] == f"W/{part.headers['etag']}"
        assert fetch(view, mode).headers["content-length"] == str(len(TEXT))


# --- storages and arguments


class Unhashable(InMemoryStorage):
    """Equals others, and so has no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)


@both
def test_a_storage_without_a_hash(mode: str) -> None:
    storage = Unhashable()
    storage.save("a.txt", ContentFile(CONTENT))
    with pytest.raises(TypeError, match="unhashable"):
        hash(storage)
    view = StorageDownloadView.as_view(storage=storage, path="a.txt")
    assert fetch(view, mode).body == CONTENT
    assert fetch(view, mode, range="bytes=3-4").body == b"34"


@pytest.mark.parametrize("status", [100, 103, 199, 204, 205, 304])
def test_a_status_without_a_body_is_none_of_a_download(status: int) -> None:
    with pytest.raises(ValueError, match=str(status)):
        DownloadResponse(ContentFile(CONTENT, name="a.txt"), status=status)
    for fine in (200, 203, 404, 500):
        assert DownloadResponse(ContentFile(CONTENT, name="a.txt"), status=fine).status_code == fine


_FALLBACK = re.compile(r'(?:attachment|inline); filename="((?:[^"\\]|\\.)*)"(?:; filename\*=UTF-8\'\'(\S+))?')
NAMES = [
    *("..", ".", "...", " .. ", "..\u00a0", "\u202e..", "．．", "\u2025", "é..", "", " ", "日本"),
    *("CON", "con.txt", "nul", "Aux.tar.gz", "COM1", "com¹", "ＣＯＮ", "lpt9.a", "con\u0301", "conin$", "ＮＵＬ.txt"),
    *("n" * 400, "n" * 400 + ".txt", "é" * 300 + ".pdf", '"' * 200, "\\" * 200, "ﷺ" * 60, "a b" * 100),
    *("a b.txt", "é.txt", 'say "hi".txt', "a\r\nX-Evil: 1.txt", "ﬁle.txt"),
]


@pytest.mark.parametrize("attachment", [True, False])
@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:20] for name in NAMES])
def test_the_name_in_ascii_is_safe_to_save_under(name: str, attachment: bool) -> None:
    value = content_disposition(name, attachment)
    assert value.isascii()
    assert value.isprintable()
    found = _FALLBACK.fullmatch(value)
    assert found is not None, value
    saved = [re.sub(r"\\(.)", r"\1", found[1])] + ([unquote(found[2])] if found[2] else [])
    for name in saved:
        assert name.strip(". "), value
        assert not is_device_name(name), value
        assert len(name.encode()) <= 255, value
