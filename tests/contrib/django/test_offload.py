"""Which downloads a proxy is told to send, by decorators and by the settings: the same for Client and AsyncClient."""

import io
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.core.cache import cache, caches
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, InMemoryStorage, Storage
from django.http import Http404, HttpRequest, HttpResponse
from django.test import AsyncClient, AsyncRequestFactory, Client, RequestFactory, override_settings
from django.urls import path
from django.utils.functional import SimpleLazyObject
from django.utils.timezone import localtime, now
from django.views.decorators.cache import cache_page

from downloadview_async.contrib.django import apache, lighttpd, nginx
from downloadview_async.contrib.django.files import HTTPFile, PathFile, StorageFile, VirtualFile
from downloadview_async.contrib.django.middleware import (
    BaseDownloadMiddleware,
    DownloadDecorator,
    DownloadDispatcher,
    DownloadDispatcherMiddleware,
    NoRedirectionMatch,
    ProxiedDownloadMiddleware,
    RealDownloadMiddleware,
    SmartDownloadMiddleware,
)
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.contrib.django.storage import SignedFileSystemStorage, SignedURLMixin
from downloadview_async.contrib.django.views import PathDownloadView, StorageDownloadView, VirtualDownloadView
from tests.descriptors import open_paths

SMART = "downloadview_async.contrib.django.middleware.SmartDownloadMiddleware"
DISPATCHER = "downloadview_async.contrib.django.middleware.DownloadDispatcherMiddleware"
CONTENT = b"0123456789"
OFFLOADING = ("X-Accel-Redirect", "X-Sendfile")


class Urls:
    """A URLconf of the test's own."""

    def __init__(self, **views: Any) -> None:
        self.urlpatterns = [path(f"{name}/<path:path>", view) for name, view in views.items()]


class PlainURLs(FileSystemStorage):
    """Gives URLs that are not encoded, as some storages of projects do."""

    def url(self, name: str | None) -> str:
        return f"{self.base_url}{name}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in ("media", "media-private"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.txt").write_bytes(CONTENT)
    (tmp_path / "media" / "x").mkdir()
    (tmp_path / "media" / "x" / "é b%20c.txt").write_bytes(CONTENT)
    for file in tmp_path.rglob("*.txt"):
        os.utime(file, (1_700_000_000, 1_700_000_000))  # a second that is over: there is a Last-Modified
    return tmp_path


@pytest.fixture
def storage(root: Path) -> FileSystemStorage:
    return FileSystemStorage(location=root / "media", base_url="/media/")


async def _async_get(target: Callable[..., Any], *args: Any, **headers: str) -> Any:
    response = target(AsyncRequestFactory().get("/", headers=headers), *args)
    return await _read(await response if hasattr(response, "__await__") else response)


async def _async_fetch(url: str, headers: dict[str, str]) -> Any:
    return await _read(await AsyncClient().get(url, headers=headers))


async def _read(response: Any) -> Any:
    """Read the body in the loop that has made the response."""
    if not response.streaming:
        response.sent = response.content
    elif response.is_async:
        response.sent = b"".join([chunk async for chunk in response])
    return response


def get(target: Callable[..., Any], *args: Any, mode: str = "sync", **headers: str) -> Any:
    """Call a view as Django's handler for WSGI or ASGI does."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if mode == "async":
        return async_to_sync(_async_get)(target, *args, **headers)
    return target(RequestFactory().get("/", headers=headers), *args)


def fetch(url: str, mode: str, **headers: str) -> Any:
    """Ask the project."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if mode == "async":
        return async_to_sync(_async_fetch)(url, headers)
    return Client().get(url, headers=headers)


def body(response: Any) -> bytes:
    if hasattr(response, "sent"):
        return bytes(response.sent)
    return b"".join(response) if response.streaming else bytes(response.content)


both = pytest.mark.parametrize("mode", ["sync", "async"])


# --- what is written into the header

NAMES = [
    ("plain.txt", "plain.txt", "plain.txt"),
    ("a b.txt", "a%20b.txt", "a b.txt"),
    ("50%.txt", "50%25.txt", "50%.txt"),
    ("50%25.txt", "50%2525.txt", "50%25.txt"),
    ("a%20b.txt", "a%2520b.txt", "a%20b.txt"),
    ("q?.txt", "q%3F.txt", "q?.txt"),
    ("h#.txt", "h%23.txt", "h#.txt"),
    ("plus+.txt", "plus%2B.txt", "plus+.txt"),
    ("semi;colon.txt", "semi%3Bcolon.txt", "semi;colon.txt"),
    ("quo'te\".txt", "quo%27te%22.txt", "quo'te\".txt"),
    ("%2e%2e", "%252e%252e", "%2e%2e"),
    ("é.txt", "%C3%A9.txt", "Ã©.txt"),
    ("x/y.txt", "x/y.txt", "x/y.txt"),
]


@both
@pytest.mark.parametrize("source", ["source_url", "source_dir"])
@pytest.mark.parametrize("name, percent, raw", NAMES)
def test_each_proxy_reads_the_very_name(
    storage: FileSystemStorage, name: str, percent: str, raw: str, source: str, mode: str
) -> None:
    (Path(storage.location) / name).parent.mkdir(exist_ok=True)
    (Path(storage.location) / name).write_bytes(CONTENT)
    rule: Any = {source: "/media/" if source == "source_url" else storage.location}
    view = StorageDownloadView.as_view(storage=storage, path=name)
    answers: list[Any] = [
        nginx.x_accel_redirect(view, destination_url="/_media/", **rule),
        lighttpd.x_sendfile(view, destination_dir="/srv/", **rule),
        apache.x_sendfile(view, destination_dir="/srv/", **rule),
    ]
    by_nginx, by_lighttpd, by_apache = (get(answer, mode=mode) for answer in answers)
    assert by_nginx["X-Accel-Redirect"] == f"/_media/{percent}"
    assert by_lighttpd["X-Sendfile"] == f"/srv/{percent}"
    assert by_apache["X-Sendfile"] == f"/srv/{raw}"
    for response in (by_nginx, by_lighttpd, by_apache):
        assert response.status_code == 200
        assert body(response) == b""


def test_apache_cannot_be_told_a_space_at_the_end(storage: FileSystemStorage) -> None:
    (Path(storage.location) / "a ").write_bytes(CONTENT)
    view = StorageDownloadView.as_view(storage=storage, path="a ")
    assert "X-Sendfile" not in get(apache.x_sendfile(view, source_url="/media/", destination_dir="/srv"))
    assert get(lighttpd.x_sendfile(view, source_url="/media/", destination_dir="/srv"))["X-Sendfile"] == "/srv/a%20"


# --- which files a rule covers


def located(middleware: ProxiedDownloadMiddleware, file: Any) -> str | None:
    try:
        return middleware.get_redirect_url(DownloadResponse(file))
    except NoRedirectionMatch:
        return None


class Named:
    """A file by its name and URL, as a storage gives them."""

    def __init__(self, url: str, name: str = "a.txt") -> None:
        self.url = url
        self.name = name
        self.storage = InMemoryStorage()


@pytest.mark.parametrize(
    "source_url, file, found",
    [
        ("/media/", Named("/media/a.txt"), "/_m/a.txt"),
        ("/media", Named("/media/a.txt"), "/_m/a.txt"),
        ("/media/", Named("/media/a%20b.txt"), "/_m/a%20b.txt"),
        ("/my media/", Named("/my%20media/a.txt"), "/_m/a.txt"),
        ("/my%20media/", Named("/my%20media/a.txt"), "/_m/a.txt"),
        ("/media/", Named("/media-private/a.txt"), None),
        ("/media", Named("/media-private/a.txt"), None),
        ("/media/", Named("/media/"), None),
        ("/media/", Named("/media/../a.txt"), None),
        ("/media/", Named("/media/%2e%2e/a.txt"), None),
        ("/media/", Named("/media//a.txt"), None),
        ("/media/", Named("/media/x%2Fa.txt"), None),
        ("/media/", Named("/media/a.txt%0d%0aX: y"), None),
        ("/media/", Named("/media/a.txt?X-Signature=abc%3A1"), "/_m/a.txt"),
        ("/media/", Named("/media/a.txt?v=1&X-Signature=abc"), "/_m/a.txt"),
        ("/media/", Named("/media/h#.txt", "h#.txt"), None),  # not encoded: this would be the file "h"
        ("/media/", Named("/media/q?.txt", "q?.txt"), None),
        ("/media/", Named("/media/50%25.txt", "50%25.txt"), None),
        ("/media/", Named("/media/a/b.txt", "a\\b.txt"), None),  # as Django gives it
        ("/media/", Named("/media/50%2525.txt", "50%25.txt"), "/_m/50%2525.txt"),
        ("/media/", Named(""), None),
        ("/media/", Named("https://cdn.example.org/media/a.txt"), None),
        ("https://cdn.example.org/media/", Named("https://cdn.example.org/media/a%20b.txt"), "/_m/a%20b.txt"),
        ("https://CDN.example.org/media", Named("https://cdn.example.org/media/a.txt"), "/_m/a.txt"),
        ("https://cdn.example.org/media/", Named("https://cdn.example.org.evil.org/media/a.txt"), None),
        ("https://cdn.example.org/media/", Named("http://cdn.example.org/media/a.txt"), None),
        ("https://cdn.example.org/media/", Named("/media/a.txt"), None),
        ("https://s3.example.org/b/", Named("https://s3.example.org/b/a.txt?e=1&s=%2B"), "/_m/a.txt?e=1&s=%2B"),
        ("https://s3.example.org/b/", Named("https://s3.example.org/b/a.txt?e=1&X-Signature=a"), "/_m/a.txt?e=1"),
        ("https://s3.example.org/b/", Named("https://s3.example.org/b/a.txt?e=1\r\nX: y"), None),
        ("https://files.example.org/", HTTPFile(url="https://files.example.org/a.txt?id=7"), "/_m/a.txt?id=7"),
        ("/media/", VirtualFile(io.BytesIO(), name="a.txt", url="/media/a.txt"), "/_m/a.txt"),
        ("/media/", VirtualFile(io.BytesIO(), name="/media/a.txt"), None),
    ],
)
def test_a_rule_by_url(source_url: str, file: Any, found: str | None) -> None:
    rule = nginx.XAccelRedirectMiddleware(source_url=source_url, destination_url="/_m")
    assert located(rule, file) == found


def test_a_directory_is_not_told_by_a_query() -> None:
    rule = lighttpd.XSendfileMiddleware(source_url="https://h/b/", destination_dir="/srv")
    assert located(rule, Named("https://h/b/a.txt?X-Signature=a")) == "/srv/a.txt"
    assert located(rule, Named("https://h/b/a.txt?v=1")) is None


@pytest.mark.parametrize(
    "source, make, found",
    [
        ("media", lambda root: PathFile(root / "media/a.txt"), "/_m/a.txt"),
        ("media", lambda root: PathFile("a.txt", root=root / "media"), "/_m/a.txt"),
        ("media", lambda root: PathFile(root / "media/x/é b%20c.txt"), "/_m/x/%C3%A9%20b%2520c.txt"),
        ("media", lambda root: PathFile(root / "media-private/a.txt"), None),
        ("media", lambda root: StorageFile(FileSystemStorage(root / "media"), "a.txt"), "/_m/a.txt"),
        ("media", lambda root: StorageFile(FileSystemStorage(root / "media-private"), "a.txt"), None),
        ("media", lambda root: StorageFile(FileSystemStorage(root / "media"), "../media-private/a.txt"), None),
        ("media", lambda root: StorageFile(InMemoryStorage(), "a.txt"), None),
        ("media", lambda root: VirtualFile(io.BytesIO(CONTENT), name=str(root / "media/a.txt")), None),
        ("media", lambda root: File(io.BytesIO(CONTENT), name=str(root / "media/a.txt")), None),
        ("", lambda root: PathFile(root / "media/a.txt"), "/_m/media/a.txt"),
    ],
)
def test_a_rule_by_path(root: Path, source: str, make: Callable[[Path], Any], found: str | None) -> None:
    for source_dir in (root / source, str(root / source), f"{root / source}/"):
        rule = nginx.XAccelRedirectMiddleware(source_dir=source_dir, destination_url="/_m")
        assert located(rule, make(root)) == found


def test_a_file_that_the_project_has_opened(root: Path) -> None:
    rule = nginx.XAccelRedirectMiddleware(source_dir=root / "media", destination_url="/_m")
    with (root / "media/a.txt").open("rb") as opened:
        assert located(rule, File(opened)) == "/_m/a.txt"


def test_a_relative_directory_is_of_the_names_in_a_storage() -> None:
    rule = nginx.XAccelRedirectMiddleware(source_dir="reports", destination_url="/_m")
    assert located(rule, StorageFile(InMemoryStorage(), "reports/a.txt")) == "/_m/a.txt"
    assert located(rule, StorageFile(InMemoryStorage(), "reports-private/a.txt")) is None
    assert located(rule, PathFile("/reports/a.txt")) is None


def test_the_url_goes_before_the_path(root: Path, storage: FileSystemStorage) -> None:
    rule = nginx.XAccelRedirectMiddleware(source_url="/media/x/", source_dir=root, destination_url="/_m")
    assert located(rule, StorageFile(storage, "x/a.txt")) == "/_m/a.txt"
    assert located(rule, StorageFile(storage, "a.txt")) == "/_m/media/a.txt"


@both
def test_a_storage_that_gives_unencoded_urls_is_not_misread(root: Path, mode: str) -> None:
    (root / "media" / "50%25.txt").write_bytes(CONTENT)
    (root / "media" / "50%.txt").write_bytes(b"another file")
    storage = PlainURLs(location=root / "media", base_url="/media/")
    view = nginx.x_accel_redirect(
        StorageDownloadView.as_view(storage=storage, path="50%25.txt"), source_url="/media/", destination_url="/_m/"
    )
    response = get(view, mode=mode)
    assert "X-Accel-Redirect" not in response
    assert body(response) == CONTENT


class ByTenant(FileSystemStorage):
    """Adds a directory to the path, but not to the URL."""

    def path(self, name: str) -> str:
        return super().path(f"x/{name}")


class SignedByTenant(SignedURLMixin, ByTenant):
    """Signs the URLs without the directory."""


class ByTenantInURLs(ByTenant):
    """Adds the directory to the URL, too."""

    def url(self, name: str | None) -> str:
        return super().url(f"x/{name}")


class ByTenantAsStored(ByTenant):
    """Says that the file at its URL is the one that it opens."""

    is_sent_as_stored = True


@pytest.mark.parametrize("is_lazy", [False, True])
@pytest.mark.parametrize(
    "kind, found",
    [(ByTenant, None), (SignedByTenant, None), (ByTenantInURLs, "/_m/x/a.txt"), (ByTenantAsStored, "/_m/a.txt")],
)
def test_a_url_that_leads_to_another_file_than_the_path_is_not_used(
    root: Path, kind: type[FileSystemStorage], found: str | None, is_lazy: bool
) -> None:
    (root / "media" / "x" / "a.txt").write_bytes(b"the file of this tenant")
    storage: Any = kind(location=root / "media", base_url="/media/")
    if is_lazy:
        storage = SimpleLazyObject(lambda: kind(location=root / "media", base_url="/media/"))
    rule = nginx.XAccelRedirectMiddleware(source_url="/media/", destination_url="/_m/")
    assert located(rule, StorageFile(storage, "a.txt")) == found


@both
def test_a_signed_storage_is_matched_without_its_signature(root: Path, mode: str) -> None:
    storage = SignedFileSystemStorage(location=root / "media", base_url="/media/")
    view = StorageDownloadView.as_view(storage=storage, path="x/é b%20c.txt")
    response = get(nginx.x_accel_redirect(view, source_url="/media/", destination_url="/_m/"), mode=mode)
    assert response["X-Accel-Redirect"] == "/_m/x/%C3%A9%20b%2520c.txt"


@pytest.mark.parametrize("is_known", [True, False])
def test_the_url_of_an_unknown_storage_is_asked_for_in_a_thread(root: Path, is_known: bool) -> None:
    threads: list[threading.Thread] = []

    class Remote(FileSystemStorage):
        def url(self, name: str | None) -> str:
            threads.append(threading.current_thread())
            return super().url(name)

    class Signed(SignedURLMixin, Remote):
        pass

    kind = SignedFileSystemStorage if is_known else Signed
    view = StorageDownloadView.as_view(storage=kind(location=root / "media", base_url="/media/"), path="a.txt")

    async def asked() -> tuple[Any, threading.Thread]:
        decorated: Any = nginx.x_accel_redirect(view, source_url="/media/", destination_url="/_m/")
        return await decorated(AsyncRequestFactory().get("/")), threading.current_thread()

    response, loop_thread = async_to_sync(asked)()
    assert response["X-Accel-Redirect"] == "/_m/a.txt"
    assert bool(threads) is not is_known
    assert loop_thread not in threads


# --- what the answer is like


@both
@pytest.mark.parametrize(
    "headers",
    [
        {"range": "bytes=0-1"},
        {"range": "bytes=50-"},
        {"if_none_match": "*"},
        {"if_match": '"another"'},
    ],
)
def test_who_sends_the_bytes_evaluates_ranges_and_conditions(
    storage: FileSystemStorage, headers: dict[str, str], mode: str
) -> None:
    view = StorageDownloadView.as_view(storage=storage, path="a.txt")
    response = get(nginx.x_accel_redirect(view, source_url="/media/", destination_url="/_m/"), mode=mode, **headers)
    assert (response.status_code, response["X-Accel-Redirect"]) == (200, "/_m/a.txt")
    assert not {"Content-Range", "Accept-Ranges", "Transfer-Encoding"} & {*response.headers}
    assert response.get("Content-Length", "0") == "0"
    assert response["ETag"].startswith('"')
    assert response["Last-Modified"]


@both
def test_the_response_so_far_is_kept(storage: FileSystemStorage, mode: str) -> None:
    inner = StorageDownloadView.as_view(storage=storage, path="a.txt", basename="é.html", attachment=False)

    def dressed(request: HttpRequest) -> Any:
        response: Any = inner(request)
        response["X-Test"] = "header"
        response["Cache-Control"] = "private"
        response["X-Accel-Redirect"] = "/_elsewhere/secret"
        response["x-sendfile"] = "/etc/passwd"
        response["Content-Length"] = "3"
        response.set_cookie("seen", "1")
        return response

    view = nginx.x_accel_redirect(dressed, source_url="/media/", destination_url="/_m/")
    response = get(view, mode=mode) if mode == "sync" else _from_thread(view)
    assert response["X-Accel-Redirect"] == "/_m/a.txt"
    assert "X-Sendfile" not in response
    assert "Content-Length" not in response
    assert (response["X-Test"], response["Cache-Control"]) == ("header", "private")
    assert response.cookies["seen"].value == "1"
    assert response["Content-Type"] == "text/html; charset=utf-8"
    assert response["X-Accel-Charset"] == "utf-8"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in response["Content-Security-Policy"]  # inline, and a browser could run it


@both
def test_a_response_that_a_proxy_sends_is_the_one_of_the_view(storage: FileSystemStorage, mode: str) -> None:
    made: list[Any] = []

    def marked(request: HttpRequest) -> Any:
        made.append(DownloadResponse(StorageFile(storage, "a.txt")))
        made[0].mark = "of a decorator"
        return made[0]

    view = nginx.x_accel_redirect(marked, source_url="/media/", destination_url="/_m/")
    response = get(view, mode=mode) if mode == "sync" else _from_thread(view)
    assert response is made[0]
    assert type(response) is nginx.XAccelRedirectResponse
    assert (made[0].mark, made[0].basename) == ("of a decorator", "a.txt")
    assert (response.streaming, response.content) == (False, b"")


def test_a_response_that_a_proxy_sends_can_be_cached_by_django(storage: FileSystemStorage) -> None:
    beneath = nginx.x_accel_redirect(
        PathDownloadView.as_view(root=storage.location), source_dir=storage.location, destination_url="/_m/"
    )
    view = nginx.x_accel_redirect(
        StorageDownloadView.as_view(storage=storage), source_url="/media/", destination_url="/_m/"
    )
    urls = Urls(cached=cache_page(60)(view), beneath=cache_page(60)(beneath))
    with override_settings(ROOT_URLCONF=urls):
        for _ in range(2):
            assert Client().get("/beneath/a.txt")["X-Accel-Redirect"] == "/_m/a.txt"
        first = Client().get("/cached/a.txt")
        Path(storage.path("a.txt")).unlink()
        for response in (first, Client().get("/cached/a.txt")):
            assert (response.status_code, response["X-Accel-Redirect"]) == (200, "/_m/a.txt")
        assert Client().get("/cached/missing.txt").status_code == 404
    cache.clear()
    del caches["default"]  # while a cache is in use, each request has a thread that closes it


class SignedByStore(Storage):
    """A storage on another server, whose URLs are signed for a short time, as those of S3."""

    is_sent_as_stored = True
    signed = 0

    def _open(self, name: str, mode: str) -> Any:
        return ContentFile(CONTENT, name)

    def size(self, name: str) -> int:
        return len(CONTENT)

    def url(self, name: str | None) -> str:
        self.signed += 1
        return f"https://store.test/{name}?signature={self.signed}"


def test_an_order_that_is_valid_for_one_request_is_not_cached_by_django() -> None:
    view = nginx.x_accel_redirect(
        StorageDownloadView.as_view(storage=SignedByStore()), source_url="https://store.test/", destination_url="/_s/"
    )
    with override_settings(ROOT_URLCONF=Urls(cached=cache_page(60)(view))):
        for number in (1, 2):
            assert Client().get("/cached/a.txt")["X-Accel-Redirect"] == f"/_s/a.txt?signature={number}"
        head = Client().head("/cached/a.txt")
        assert (head.status_code, "X-Accel-Redirect" in head, head["Content-Length"]) == (200, False, "10")
    cache.clear()
    del caches["default"]  # while a cache is in use, each request has a thread that closes it


def _from_thread(view: Callable[..., Any]) -> Any:
    """Call a synchronous view as the handler for ASGI does: in a thread, with its own kind of request."""
    answers: list[Any] = []
    request = AsyncRequestFactory().get("/")
    thread = threading.Thread(target=lambda: answers.append(view(request)))
    thread.start()
    thread.join()
    return answers[0]


@both
def test_a_header_that_a_proxy_obeys_is_nobodys_but_ours(storage: FileSystemStorage, mode: str) -> None:
    class Own(StorageDownloadView):
        def render_to_response(self, *args: Any, **kwargs: Any) -> Any:
            response = super().render_to_response(*args, **kwargs)
            for name in OFFLOADING:
                response[name] = "/etc/passwd"
            return response

    view = nginx.x_accel_redirect(
        Own.as_view(storage=storage, path="a.txt"), source_url="/elsewhere/", destination_url="/_m/"
    )
    response = get(view, mode=mode)
    assert not {*OFFLOADING} & {*response.headers}
    assert body(response) == CONTENT


@both
@pytest.mark.parametrize("name", ["missing.txt", "x", "../media-private/a.txt", "a.txt/b"])
def test_a_missing_file_is_a_404_here(storage: FileSystemStorage, name: str, mode: str) -> None:
    view = nginx.x_accel_redirect(
        StorageDownloadView.as_view(storage=storage, path=name), source_url="/media/", destination_url="/_m/"
    )
    with pytest.raises(Http404):
        get(view, mode=mode)


@both
def test_a_refusal_has_no_header(storage: FileSystemStorage, mode: str) -> None:
    inner = StorageDownloadView.as_view(storage=storage, path="a.txt")

    def refusing(request: HttpRequest, path: str) -> Any:
        inner(request)
        return HttpResponse("Forbidden", status=403)

    def raising(request: HttpRequest, path: str) -> Any:
        inner(request)
        raise PermissionDenied

    with override_settings(
        ROOT_URLCONF=Urls(
            refusing=nginx.x_accel_redirect(refusing, source_url="/media/", destination_url="/_m/"), raising=raising
        ),
        MIDDLEWARE=[SMART],
        DOWNLOADVIEW={"BACKEND": "nginx", "RULES": [{"source_url": "/media/", "destination_url": "/_m/"}]},
    ):
        for url in ("/refusing/x", "/raising/x"):
            response = fetch(url, mode)
            assert response.status_code == 403
            assert not {*OFFLOADING} & {*response.headers}


@both
@pytest.mark.parametrize("status", [201, 404])
def test_only_a_200_is_offloaded(storage: FileSystemStorage, status: int, mode: str) -> None:
    class Other(StorageDownloadView):
        def download_response(self, *args: Any, **kwargs: Any) -> Any:
            return super().download_response(*args, status=status, **kwargs)

    view = nginx.x_accel_redirect(
        Other.as_view(storage=storage, path="a.txt"), source_url="/media/", destination_url="/_m/"
    )
    response = get(view, mode=mode)
    assert (response.status_code, response.get("X-Accel-Redirect")) == (status, None)


@both
def test_what_is_generated_is_streamed(mode: str) -> None:
    class Generated(VirtualDownloadView):
        def get_file(self) -> Any:
            return VirtualFile(io.BytesIO(CONTENT), name="a.txt")

    view = nginx.x_accel_redirect(Generated.as_view(), source_url="/media/", source_dir="/", destination_url="/_m/")
    response = get(view, mode=mode, range="bytes=2-3")
    assert (response.status_code, body(response)) == (206, b"23")


def test_a_file_in_memory_is_for_a_proxy_that_has_its_url() -> None:
    storage = InMemoryStorage(base_url="/media/")
    storage.save("a.txt", ContentFile(CONTENT))
    view = nginx.x_accel_redirect(
        StorageDownloadView.as_view(storage=storage, path="a.txt"), source_url="/media/", destination_url="/_m/"
    )
    assert get(view)["X-Accel-Redirect"] == "/_m/a.txt"


# --- decorators


@both
def test_nested_decorators(storage: FileSystemStorage, mode: str) -> None:
    view = StorageDownloadView.as_view(storage=storage, path="a.txt")
    inner = nginx.x_accel_redirect(view, source_url="/other/", destination_url="/_inner/")
    outer = lighttpd.x_sendfile(inner, source_url="/media/", destination_dir="/srv")
    assert get(outer, mode=mode)["X-Sendfile"] == "/srv/a.txt"
    innermost = nginx.x_accel_redirect(view, source_url="/media/", destination_url="/_inner/")
    response = get(lighttpd.x_sendfile(innermost, source_url="/media/", destination_dir="/srv"), mode=mode)
    assert (response["X-Accel-Redirect"], response.get("X-Sendfile")) == ("/_inner/a.txt", None)
    none = lighttpd.x_sendfile(inner, source_url="/nothing/", destination_dir="/srv")
    response = get(none, mode=mode, range="bytes=1-2")
    assert (response.status_code, body(response)) == (206, b"12")


def test_a_decorated_view_stays_what_it_is() -> None:
    async def asynchronous(request: HttpRequest) -> HttpResponse:
        """Say something."""
        return HttpResponse("a")

    def synchronous(request: HttpRequest) -> HttpResponse:
        return HttpResponse("s")

    decorate = DownloadDecorator(nginx.XAccelRedirectMiddleware)
    options = {"source_url": "/media/", "destination_url": "/_m/"}
    first, second = decorate(asynchronous, **options), decorate(synchronous, **options)
    assert iscoroutinefunction(first)
    assert not iscoroutinefunction(second)
    assert (first.__name__, first.__doc__) == ("asynchronous", "Say something.")
    assert get(first, mode="async").content == b"a"
    assert get(second).content == b"s"


def test_a_view_that_fails_leaves_the_request_as_it_was(storage: FileSystemStorage) -> None:
    def failing(request: HttpRequest) -> HttpResponse:
        raise ValueError("no")

    request = RequestFactory().get("/", headers={"range": "bytes=0-1"})
    with pytest.raises(ValueError, match="no"):
        nginx.x_accel_redirect(failing, source_url="/media/", destination_url="/_m/")(request)
    response: Any = StorageDownloadView.as_view(storage=storage, path="a.txt")(request)
    assert (response.status_code, body(response)) == (206, b"01")


# --- settings

NGINX: Any = {"source_url": "/media/", "destination_url": "/_m/"}
APACHE = {"source_url": "/media/", "destination_dir": "/srv/"}
ELSEWHERE = {"source_url": "/elsewhere/", "destination_url": "/_e/"}
LEGACY_NGINX = "django_downloadview.nginx.XAccelRedirectMiddleware"
LEGACY_APACHE = "django_downloadview.apache.XSendfileMiddleware"
LEGACY_LIGHTTPD = "django_downloadview.lighttpd.XSendfileMiddleware"
OURS = "downloadview_async.contrib.django"
X_ACCEL = {"X-Accel-Redirect": "/_m/a.txt"}
X_SENDFILE = {"X-Sendfile": "/srv/a.txt"}

SETTINGS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"DOWNLOADVIEW_BACKEND": LEGACY_NGINX, "DOWNLOADVIEW_RULES": [NGINX]}, X_ACCEL),
    ({"DOWNLOADVIEW_BACKEND": LEGACY_APACHE, "DOWNLOADVIEW_RULES": [APACHE]}, X_SENDFILE),
    ({"DOWNLOADVIEW_BACKEND": LEGACY_LIGHTTPD, "DOWNLOADVIEW_RULES": [APACHE]}, X_SENDFILE),
    (
        {
            "DOWNLOADVIEW_BACKEND": "django_downloadview.nginx.middlewares.XAccelRedirectMiddleware",
            "DOWNLOADVIEW_RULES": (NGINX,),
        },
        X_ACCEL,
    ),
    ({"DOWNLOADVIEW_BACKEND": f"{OURS}.nginx.XAccelRedirectMiddleware", "DOWNLOADVIEW_RULES": [NGINX]}, X_ACCEL),
    (
        {
            "DOWNLOADVIEW_BACKEND": LEGACY_NGINX,
            "DOWNLOADVIEW_RULES": [ELSEWHERE, {**APACHE, "backend": LEGACY_APACHE}, NGINX],
        },
        X_SENDFILE,
    ),
    ({"DOWNLOADVIEW_BACKEND": LEGACY_NGINX, "DOWNLOADVIEW_RULES": [[None, None, "/media/", "/_m/"]]}, X_ACCEL),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX]}}, X_ACCEL),
    ({"DOWNLOADVIEW": {"BACKEND": "apache", "RULES": [APACHE]}}, X_SENDFILE),
    ({"DOWNLOADVIEW": {"BACKEND": "lighttpd", "RULES": [APACHE]}}, X_SENDFILE),
    ({"DOWNLOADVIEW": {"BACKEND": LEGACY_LIGHTTPD, "RULES": [APACHE]}}, X_SENDFILE),
    ({"DOWNLOADVIEW": {"BACKEND": nginx.XAccelRedirectMiddleware, "RULES": [NGINX]}}, X_ACCEL),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [ELSEWHERE, NGINX]}}, X_ACCEL),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX, {**NGINX, "destination_url": "/_second/"}]}}, X_ACCEL),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**APACHE, "backend": "lighttpd"}]}}, X_SENDFILE),
    (
        {"DOWNLOADVIEW": {"BACKEND": "nginx", "LIMIT_RATE": 1024, "EXPIRES": 60, "RULES": [{**NGINX, "expires": 5}]}},
        {**X_ACCEL, "X-Accel-Limit-Rate": "1024", "X-Accel-Expires": "5"},
    ),
    (
        {
            "DOWNLOADVIEW": {
                "BACKEND": "nginx",
                "with_buffering": False,
                "RULES": [{**APACHE, "backend": "apache"}, NGINX],
            }
        },
        X_SENDFILE,
    ),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx"}, "DOWNLOADVIEW_RULES": [NGINX]}, X_ACCEL),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": []}}, {}),
]


@both
@pytest.mark.parametrize("settings, expected", SETTINGS)
def test_the_settings(
    storage: FileSystemStorage, settings: dict[str, Any], expected: dict[str, str], mode: str
) -> None:
    urls = Urls(files=StorageDownloadView.as_view(storage=storage))
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[SMART], **settings):
        response = fetch("/files/a.txt", mode, range="bytes=0-1")
        answered = {name: value for name, value in response.items() if name.startswith(("X-Accel-R", "X-Sendfile"))}
        answered |= {name: response[name] for name in expected if name in response}
        assert answered == expected
        assert response.status_code == (200 if expected else 206)
        assert body(response) == (b"" if expected else CONTENT[:2])
        assert fetch("/files/missing.txt", mode).status_code == 404


@both
def test_a_list_of_middlewares(storage: FileSystemStorage, mode: str) -> None:
    middlewares = [
        ("elsewhere", LEGACY_NGINX, ELSEWHERE),
        ("media", f"{OURS}.apache.XSendfileMiddleware", APACHE),
    ]
    urls = Urls(files=StorageDownloadView.as_view(storage=storage))
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[DISPATCHER], DOWNLOADVIEW_MIDDLEWARES=middlewares):
        assert fetch("/files/a.txt", mode)["X-Sendfile"] == "/srv/a.txt"
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[DISPATCHER]):
        assert body(fetch("/files/a.txt", mode)) == CONTENT


@both
def test_the_settings_are_for_what_decorators_leave(storage: FileSystemStorage, mode: str) -> None:
    view = StorageDownloadView.as_view(storage=storage)
    urls = Urls(
        covered=nginx.x_accel_redirect(view, source_url="/media/", destination_url="/_decorator/"),
        left=nginx.x_accel_redirect(view, source_url="/other/", destination_url="/_decorator/"),
    )
    settings = {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX]}}
    middleware = [SMART, "django.middleware.common.CommonMiddleware", "django.middleware.http.ConditionalGetMiddleware"]
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=middleware, **settings):
        assert fetch("/covered/a.txt", mode)["X-Accel-Redirect"] == "/_decorator/a.txt"
        assert fetch("/left/a.txt", mode)["X-Accel-Redirect"] == "/_m/a.txt"


@both
def test_what_is_compressed_on_its_way_is_left_alone(root: Path, mode: str) -> None:
    (root / "media" / "long.txt").write_bytes(CONTENT * 100)
    storage = FileSystemStorage(location=root / "media", base_url="/media/")
    settings = {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX]}}
    urls = Urls(files=StorageDownloadView.as_view(storage=storage))
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[SMART, "django.middleware.gzip.GZipMiddleware"], **settings):
        response = fetch("/files/long.txt", mode, accept_encoding="gzip")
        assert response["Content-Encoding"] == "gzip"
        assert "X-Accel-Redirect" not in response
        assert body(response)[:2] == b"\x1f\x8b"


@both
def test_backend_and_rules_may_be_given_by_hand(storage: FileSystemStorage, mode: str) -> None:
    def smart(**options: Any) -> SmartDownloadMiddleware:
        return SmartDownloadMiddleware(None, nginx.XAccelRedirectMiddleware, [ELSEWHERE, options])

    view = DownloadDecorator(smart)(StorageDownloadView.as_view(storage=storage, path="a.txt"), **NGINX)
    assert get(view, mode=mode)["X-Accel-Redirect"] == "/_m/a.txt"


@both
def test_a_dispatcher_of_a_project_decides_by_itself(storage: FileSystemStorage, mode: str) -> None:
    class Own(DownloadDispatcher):
        def dispatch(self, request: HttpRequest, response: Any) -> Any:
            response["X-Own"] = "yes"
            return super().dispatch(request, response) if "range" not in request.headers else response

    def dispatching() -> DownloadDispatcherMiddleware:
        middleware = DownloadDispatcherMiddleware(None, [])
        middleware.dispatcher = Own([("media", nginx.XAccelRedirectMiddleware(**NGINX))])
        return middleware

    view = DownloadDecorator(dispatching)(StorageDownloadView.as_view(storage=storage, path="a.txt"))
    response = get(view, mode=mode)
    assert (response["X-Own"], response["X-Accel-Redirect"]) == ("yes", "/_m/a.txt")
    response = get(view, mode=mode, range="bytes=0-0")
    assert (response["X-Own"], response.status_code, body(response)) == ("yes", 206, b"0")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, r"needs settings.DOWNLOADVIEW\['BACKEND'\], or settings.DOWNLOADVIEW_BACKEND"),
    ({"DOWNLOADVIEW_BACKEND": "nginx"}, r"needs settings.DOWNLOADVIEW\['RULES'\], or settings.DOWNLOADVIEW_RULES"),
    ({"DOWNLOADVIEW": ["nginx"]}, "has to be a dictionary"),
    ({"DOWNLOADVIEW": {"BACKEND": "ngnix", "RULES": []}}, r"\['BACKEND'\] is 'ngnix', which is not known"),
    ({"DOWNLOADVIEW": {"BACKEND": "os.nothing", "RULES": []}}, "cannot be imported"),
    ({"DOWNLOADVIEW": {"BACKEND": "os.curdir", "RULES": []}}, "which is not a middleware"),
    ({"DOWNLOADVIEW": {"BACKEND": 7, "RULES": []}}, "which is not a middleware"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": NGINX}}, "has to be a list of rules"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": "/media/"}}, "has to be a list of rules"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX, "/media/"]}}, r"\['RULES'\]\[1\] has to be a dictionary"),
    (
        {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [APACHE]}},
        r"\[0\]: unknown key 'destination_dir': did you mean 'destination_url'\?",
    ),
    (
        {"DOWNLOADVIEW": {"BACKEND": "apache", "RULES": [NGINX]}},
        r"\[0\]: unknown key 'destination_url': did you mean 'destination_dir'\?",
    ),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{"source_url": "/m/"}]}}, r"\[0\]: .*needs destination_url"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "destination_url": "/a b/"}]}}, "internal location"),
    ({"DOWNLOADVIEW": {"BACKEND": "apache", "RULES": [{**APACHE, "destination_dir": "srv"}]}}, "absolute directory"),
    (
        {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "media/"}]}},
        "source_url has to be an absolute",
    ),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "expires": -1}]}}, "expires has to be"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "limit_rate": "1k"}]}}, "limit_rate has to be"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "backend": "x.y"}]}}, r"\[0\]\['backend'\] is"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [["/media/", "/_m/"]]}}, "get_response"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX], "BUFFERS": 1}}, "buffers"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_settings_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with override_settings(**settings), pytest.raises(ImproperlyConfigured, match=message):
        SmartDownloadMiddleware(lambda request: HttpResponse())


@pytest.mark.parametrize(
    "value, message",
    [
        (["nginx"], "has to be a tuple"),
        ([("a", "no.such.thing", {})], "cannot be imported"),
        ([("a", LEGACY_NGINX, {"x": 1})], "unknown key 'x': use source_dir"),
    ],
)
def test_a_list_of_middlewares_that_is_wrong(value: Any, message: str) -> None:
    with override_settings(DOWNLOADVIEW_MIDDLEWARES=value), pytest.raises(ImproperlyConfigured, match=message):
        DownloadDispatcher()


# --- classes that projects derive


@both
def test_a_projects_own_middleware_is_called_off_the_event_loop(storage: FileSystemStorage, mode: str) -> None:
    threads: list[threading.Thread] = []

    class Own(nginx.XAccelRedirectMiddleware):
        def process_download_response(self, request: HttpRequest, response: Any) -> Any:
            threads.append(threading.current_thread())
            answer = super().process_download_response(request, response)
            answer["X-Own"] = "yes"
            return answer

    view = StorageDownloadView.as_view(storage=storage, path="a.txt")

    async def asynchronous() -> tuple[Any, threading.Thread]:
        return await DownloadDecorator(Own)(view, **NGINX)(AsyncRequestFactory().get("/")), threading.current_thread()

    if mode == "async":
        response, loop_thread = async_to_sync(asynchronous)()
        assert threads != [loop_thread]
    else:
        response = get(DownloadDecorator(Own)(view, **NGINX))
    assert (response["X-Accel-Redirect"], response["X-Own"]) == ("/_m/a.txt", "yes")
    assert len(threads) == 1


@both
def test_a_middleware_that_knows_only_process_response(storage: FileSystemStorage, mode: str) -> None:
    class Foreign:
        def process_response(self, request: HttpRequest, response: Any) -> Any:
            response["X-Foreign"] = "yes"
            return response

    view = DownloadDecorator(Foreign)(StorageDownloadView.as_view(storage=storage, path="a.txt"))
    response = get(view, mode=mode, range="bytes=4-5")
    assert (response["X-Foreign"], response.status_code, body(response)) == ("yes", 206, b"45")


@both
def test_a_middleware_may_process_asynchronously(storage: FileSystemStorage, mode: str) -> None:
    class Own(BaseDownloadMiddleware):
        def process_download_response(self, request: HttpRequest, response: Any) -> Any:
            response["X-Own"] = "sync"
            return response

        async def aprocess_download_response(self, request: HttpRequest, response: Any) -> Any:
            response["X-Own"] = "async"
            return response

    response = get(DownloadDecorator(Own)(StorageDownloadView.as_view(storage=storage, path="a.txt")), mode=mode)
    assert response["X-Own"] == mode


def test_the_base_class_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="has to override process_download_response"):
        BaseDownloadMiddleware().process_response(RequestFactory().get("/"), DownloadResponse(VirtualFile(name="a")))
    response = HttpResponse()
    assert BaseDownloadMiddleware().process_response(RequestFactory().get("/"), response) is response


@pytest.mark.parametrize(
    "file, expected",
    [
        (VirtualFile(io.BytesIO(), name="a.txt"), True),
        (VirtualFile(io.BytesIO(), url="/a.txt"), True),
        (VirtualFile(io.BytesIO()), False),
    ],
)
def test_a_real_file_has_a_name_or_a_url(file: Any, expected: bool) -> None:
    assert RealDownloadMiddleware().is_download_response(DownloadResponse(file)) is expected
    assert not RealDownloadMiddleware().is_download_response(HttpResponse())


@both
def test_process_response_can_be_called_by_hand(storage: FileSystemStorage, mode: str) -> None:
    middleware = nginx.XAccelRedirectMiddleware(**NGINX)
    response = DownloadResponse(StorageFile(storage, "a.txt"))

    async def asynchronous() -> Any:
        return await middleware.aprocess_response(AsyncRequestFactory().get("/"), response)

    if mode == "async":
        answer = async_to_sync(asynchronous)()
    else:
        answer = middleware.process_response(RequestFactory().get("/"), response)
    assert isinstance(answer, ProxiedDownloadResponse)
    assert answer["X-Accel-Redirect"] == "/_m/a.txt"
    finished = DownloadResponse(StorageFile(storage, "a.txt"))
    finished.finish(RequestFactory().get("/", headers={"range": "bytes=0-1"}))
    assert middleware.process_response(RequestFactory().get("/"), finished) is finished
    assert body(finished) == b"01"


@pytest.mark.asyncio
async def test_process_response_can_be_called_where_an_event_loop_runs(storage: FileSystemStorage) -> None:
    response = DownloadResponse(StorageFile(storage, "a.txt"))
    answer = nginx.XAccelRedirectMiddleware(**NGINX).process_response(AsyncRequestFactory().get("/"), response)
    assert answer["X-Accel-Redirect"] == "/_m/a.txt"


@both
def test_nothing_stays_open(storage: FileSystemStorage, mode: str) -> None:
    view = nginx.x_accel_redirect(StorageDownloadView.as_view(storage=storage, path="a.txt"), **NGINX)
    get(view, mode=mode).close()
    assert storage.path("a.txt") not in open_paths()


# --- the responses by themselves


@pytest.fixture
def berlin() -> Iterator[None]:
    with override_settings(TIME_ZONE="Europe/Berlin"):
        yield


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {}),
        ({"with_buffering": True}, {"X-Accel-Buffering": "yes"}),
        ({"with_buffering": False}, {"X-Accel-Buffering": "no"}),
        ({"limit_rate": 1024}, {"X-Accel-Limit-Rate": "1024"}),
        ({"limit_rate": 0}, {"X-Accel-Limit-Rate": "0"}),
        ({"limit_rate": False}, {"X-Accel-Limit-Rate": "0"}),
        ({"expires": False}, {"X-Accel-Expires": "off"}),
        ({"expires": 3600}, {"X-Accel-Expires": "3600"}),
        ({"expires": 86400.5}, {"X-Accel-Expires": "86401"}),
        ({"expires": datetime(2000, 1, 1, tzinfo=UTC)}, {"X-Accel-Expires": "0"}),
        ({"content_type": "image/png"}, {"X-Accel-Charset": None}),
        ({"content_type": 'text/plain; charset="latin-1"; x=y'}, {"X-Accel-Charset": "latin-1"}),
        (
            {"headers": {"X-Own": "1", "Content-Type": "a/b"}},
            {"X-Own": "1", "Content-Type": "text/plain"},
        ),
        ({"basename": "é.txt"}, {"Content-Disposition": "attachment; filename=\"e.txt\"; filename*=UTF-8''%C3%A9.txt"}),
        ({}, {"Content-Disposition": 'attachment; filename="a.txt"'}),
        ({"attachment": False}, {"Content-Disposition": None}),
        ({"redirect_url": "/_m/é b.txt"}, {"X-Accel-Redirect": "/_m/%C3%A9%20b.txt"}),
        ({"redirect_url": "/_m/a%20b.txt?c=d"}, {"X-Accel-Redirect": "/_m/a%20b.txt?c=d"}),
    ],
)
def test_what_nginx_is_told(options: dict[str, Any], expected: dict[str, str | None]) -> None:
    options = {"redirect_url": "/_m/a.txt", "content_type": "text/plain", **options}
    response = nginx.XAccelRedirectResponse(**options)
    told = {"X-Accel-Buffering": None, "X-Accel-Expires": None, "X-Accel-Limit-Rate": None, **expected}
    assert {name: response.get(name) for name in told} == told


@pytest.mark.parametrize("is_naive", [True, False])
def test_expires_is_as_long_as_it_is(berlin: None, is_naive: bool) -> None:
    when = now() + timedelta(days=2)  # more than a day, which is more than `timedelta.seconds` has
    when = localtime(when).replace(tzinfo=None) if is_naive else when
    response = nginx.XAccelRedirectResponse("/_m/a.txt", "text/plain", expires=when)
    assert 2 * 86400 - 60 < int(response["X-Accel-Expires"]) <= 2 * 86400


@pytest.mark.parametrize(
    "options, message",
    [
        ({"expires": -1}, "expires"),
        ({"expires": True}, "expires"),
        ({"expires": "1h"}, "expires"),
        ({"limit_rate": -1}, "limit_rate"),
        ({"limit_rate": True}, "limit_rate"),
        ({"limit_rate": "1k"}, "limit_rate"),
    ],
)
def test_what_nginx_would_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nginx.XAccelRedirectResponse("/_m/a.txt", "text/plain", **options)


@pytest.mark.parametrize("own, response_has, expected", [(None, 60, "60"), (30, 60, "30"), (False, 60, "off")])
def test_a_response_may_say_when_it_expires(
    storage: FileSystemStorage, own: Any, response_has: Any, expected: str
) -> None:
    response: Any = DownloadResponse(StorageFile(storage, "a.txt"))
    response.expires = response_has
    rule = nginx.XAccelRedirectMiddleware(source_url="/media/", destination_url="/_m/", expires=own)
    answer = rule.process_response(RequestFactory().get("/"), response)
    assert answer["X-Accel-Expires"] == expected


@pytest.mark.parametrize(
    "proxy, value",
    [(apache, "/srv/Ï\x80 50%.txt"), (lighttpd, "/srv/%CF%80%2050%25.txt")],
)
def test_what_x_sendfile_says(proxy: Any, value: str) -> None:
    response = proxy.XSendfileResponse("/srv/π 50%.txt", "text/plain", headers={"X-Own": "1"})
    assert (response["X-Sendfile"], response["X-Own"]) == (value, "1")
    assert response["Content-Disposition"].endswith("filename*=UTF-8''%CF%80%2050%25.txt")
    assert "Content-Disposition" not in proxy.XSendfileResponse("/srv/a.txt", "text/plain", attachment=False)
    with pytest.raises(ValueError, match="cannot name"):
        proxy.XSendfileResponse("/srv/a\nX: y", "text/plain")


# --- nginx's deprecated names


def test_old_names_of_options_warn() -> None:
    with pytest.warns(DeprecationWarning, match="media_url.*destination_url"):
        rule = nginx.XAccelRedirectMiddleware(source_url="/media/", media_url="/_m/")
    assert located(rule, Named("/media/a.txt")) == "/_m/a.txt"
    with pytest.warns(DeprecationWarning, match="media_root.*source_dir"):
        rule = nginx.XAccelRedirectMiddleware(media_root="/srv", destination_url="/_m/")
    assert rule.source_dir == "/srv"


def test_the_old_settings(storage: FileSystemStorage) -> None:
    single = f"{OURS}.nginx.SingleXAccelRedirectMiddleware"
    urls = Urls(files=StorageDownloadView.as_view(storage=storage))
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[single]):
        with pytest.raises(ImproperlyConfigured, match="DESTINATION_URL"):
            Client().get("/files/a.txt")
        with (
            override_settings(NGINX_DOWNLOAD_MIDDLEWARE_DESTINATION_URL="/_m/", NGINX_DOWNLOAD_MIDDLEWARE_LIMIT_RATE=9),
            pytest.warns(DeprecationWarning, match="NGINX_DOWNLOAD_MIDDLEWARE_.* is deprecated"),
        ):
            response = Client().get("/files/a.txt")
        assert (response["X-Accel-Redirect"], response["X-Accel-Limit-Rate"]) == ("/_m/a.txt", "9")


@pytest.mark.parametrize("package", ["django_downloadview", OURS])
def test_a_middleware_for_one_rule_is_none_for_all_views(package: str) -> None:
    with (
        override_settings(MIDDLEWARE=[f"{package}.nginx.XAccelRedirectMiddleware"]),
        pytest.raises(ImproperlyConfigured, match="SmartDownloadMiddleware"),
    ):
        nginx.SingleXAccelRedirectMiddleware()


# --- paths


@both
def test_a_view_of_paths(root: Path, mode: str) -> None:
    (root / "media" / "x" / "b%20c.txt").write_bytes(CONTENT)
    view = PathDownloadView.as_view(root=root / "media")
    answer = nginx.x_accel_redirect(view, source_dir=root / "media", destination_url="/_m/")
    urls = Urls(files=answer)
    with override_settings(ROOT_URLCONF=urls):
        assert fetch("/files/x/b%2520c.txt", mode)["X-Accel-Redirect"] == "/_m/x/b%2520c.txt"
        for hidden in ("../media-private/a.txt", "%2e%2e/media-private/a.txt", "missing.txt"):
            assert fetch(f"/files/{hidden}", mode).status_code == 404
