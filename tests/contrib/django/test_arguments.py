"""Arguments of the URL that would lead out of the directory to which a view joins them, asked of real servers."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from django.core.asgi import get_asgi_application as get_plain_application
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, InMemoryStorage
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.test import override_settings
from django.urls import include, path, re_path, register_converter
from django.urls.converters import PathConverter

from downloadview_async.contrib.django import (
    BaseDownloadView,
    HTTPDownloadView,
    ObjectDownloadView,
    PathDownloadView,
    StorageDownloadView,
    VirtualDownloadView,
    VirtualFile,
    get_asgi_application,
    sendfile,
)
from downloadview_async.contrib.django.files import PathFile
from downloadview_async.contrib.django.nginx import x_accel_redirect
from tests.contrib.django.documents.models import Document
from tests.live import Answer, ask, live

SECRET = b"secret"
FORBIDDEN = [
    "..%2fsecret.txt",
    "../secret.txt",
    "%2e%2e/secret.txt",
    "x/..%2f..%2fsecret.txt",
    "..%5csecret.txt",
    "%2e%2e%2fsecret.txt",
    "%5cetc%5cpasswd",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "a.txt%00",
    "a.txt%00.png",
    "..",
    "%2e%2e",
]
NOT_NAMES = ["x//a.txt", "x%2f%2fa.txt", "a.txt/", "a.txt%2f"]


class Joined(PathDownloadView):
    """The pattern of django-downloadview's demo."""

    directory = ""

    def get_path(self) -> str:
        return os.path.join(self.directory, super().get_path())


class JoinedByItself(Joined):
    def get_path(self) -> str:
        return f"{self.directory}/{self.kwargs['path']}"


class JoinedFile(Joined):
    get_path = PathDownloadView.get_path

    def get_file(self) -> Any:
        return PathFile(os.path.join(self.directory, self.get_path()))


class JoinedName(StorageDownloadView):
    def get_path(self) -> str:
        return os.path.join("files", super().get_path())


class JoinedInGetFile(BaseDownloadView):
    directory = ""

    def get_file(self) -> Any:
        return PathFile(os.path.join(self.directory, self.kwargs["path"]))


class JoinedOnTheLoop(BaseDownloadView):
    directory = ""

    async def aget_file(self) -> Any:
        return PathFile(os.path.join(self.directory, self.kwargs["path"]))


class Read(VirtualDownloadView):
    directory = ""

    def get_file(self) -> Any:
        return VirtualFile(ContentFile(Path(self.directory, self.kwargs["path"]).read_bytes()), name="a.txt")


class JoinedURL(HTTPDownloadView):
    directory = ""
    origin = ""

    def get_url(self) -> str:
        return f"{self.origin}/files/{self.kwargs['path']}"


class Looked(ObjectDownloadView):
    directory = ""

    def get_object(self, queryset: Any = None) -> Any:
        return Document(name="a.txt", file=f"files/{self.kwargs['path']}")


VIEWS: dict[str, Callable[[Path], Any]] = {
    "path": lambda root: Joined.as_view(directory=root / "files"),
    "path, without super": lambda root: JoinedByItself.as_view(directory=root / "files"),
    "path, in get_file": lambda root: JoinedFile.as_view(directory=root / "files"),
    "decorated path": lambda root: x_accel_redirect(
        Joined.as_view(directory=root / "files"), source_dir=str(root), destination_url="/_files/"
    ),
    "storage": lambda root: JoinedName.as_view(storage=FileSystemStorage(root)),
    "storage with a root": lambda root: JoinedName.as_view(storage=FileSystemStorage(root), root=root),
    "storage in memory": lambda root: JoinedName.as_view(storage=_in_memory()),
    "get_file": lambda root: JoinedInGetFile.as_view(directory=root / "files"),
    "aget_file": lambda root: JoinedOnTheLoop.as_view(directory=root / "files"),
    "virtual": lambda root: Read.as_view(directory=root / "files"),
    "object": lambda root: Looked.as_view(),
    "sendfile": lambda root: lambda request, path: sendfile(request, os.path.join(root / "files", path)),
}
OF_NAMES = [
    "path",
    "path, without super",
    "path, in get_file",
    "decorated path",
    "storage",
    "storage with a root",
    "storage in memory",
]


def _in_memory() -> InMemoryStorage:
    storage = InMemoryStorage()
    storage.save("secret.txt", ContentFile(SECRET))
    storage.save("files/a.txt", ContentFile(b"0123456789"))
    storage.save("files/x/a.txt", ContentFile(b"0123456789"))
    return storage


class Urls:
    """A URLconf with one 404 for all, which may stand in several ways around the argument."""

    handler404: Any = staticmethod(lambda request, exception: HttpResponse("nothing here", status=404))

    def __init__(self, view: Any) -> None:
        self.urlpatterns = [
            path("f/<path:path>", view),
            path("included/<path:path>/", include([path("file", view)])),
            re_path(r"^r/(?P<path>.*)$", view),
        ]


class _Silent(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served_by_wsgi() -> Iterator[int]:
    with make_server("127.0.0.1", 0, get_wsgi_application(), handler_class=_Silent) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("root")
    (root / "files" / "x").mkdir(parents=True)
    (root / "files" / "a.txt").write_bytes(b"0123456789")
    (root / "files" / "x" / "a.txt").write_bytes(b"0123456789")
    (root / "files" / "a..b").write_bytes(b"0123456789")
    (root / "secret.txt").write_bytes(SECRET)
    with override_settings(MEDIA_ROOT=str(root)):
        yield root


async def answers(how: str, urls: Any, paths: list[str]) -> list[Answer]:
    with override_settings(ROOT_URLCONF=urls):
        if how == "wsgi":
            with served_by_wsgi() as port:
                return [await ask(port, each) for each in paths]
        application: Any = get_asgi_application() if how == "ours" else get_plain_application()
        async with live(application) as port:
            return [await ask(port, each) for each in paths]


@pytest.mark.parametrize("how", ["ours", "stock", "wsgi"])
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.asyncio
async def test_no_argument_leads_out_of_a_directory(root: Path, kind: str, how: str) -> None:
    urls = Urls(VIEWS[kind](root))
    forbidden = [*FORBIDDEN, f"{root}/secret.txt", *(NOT_NAMES if kind in OF_NAMES else [])]
    refused = [
        "/f/missing.txt",
        *(f"/f/{name}" for name in forbidden),
        *(f"/r/{name}" for name in forbidden),
        *(f"/included/{name}/file" for name in forbidden if name not in NOT_NAMES),
    ]
    if kind == "virtual":
        refused.pop(0)  # the project's own code raises an error
    good, *others = await answers(how, urls, ["/f/x/a.txt", *refused])
    assert (good.status, good.headers.get("x-accel-redirect"), good.body) in (
        (200, None, b"0123456789"),
        (200, "/_files/files/x/a.txt", b""),
    )
    for name, answer in zip(refused, others, strict=True):
        assert (answer.status, answer.body) == (404, b"nothing here"), name


class _AsPath(PathConverter):
    """Gives the view a `Path`, as converters of projects may."""

    def to_python(self, value: str) -> Any:
        return PurePosixPath(value)


register_converter(_AsPath, "aspath")


class JoinedPath(PathDownloadView):
    directory = ""

    def get_path(self) -> Any:
        return self.directory / self.kwargs["name"]


@pytest.mark.parametrize("how", ["ours", "stock", "wsgi"])
@pytest.mark.parametrize("view", [JoinedPath, JoinedInGetFile, JoinedOnTheLoop])
@pytest.mark.asyncio
async def test_no_path_of_a_converter_leads_out_of_a_directory(root: Path, view: Any, how: str) -> None:
    name = "name" if view is JoinedPath else "path"

    class URLs:
        handler404 = Urls.handler404
        urlpatterns: ClassVar = [path(f"f/<aspath:{name}>", view.as_view(directory=root / "files"))]

    refused = [f"/f/{each}" for each in (*FORBIDDEN, f"{root}/secret.txt")]
    good, *others = await answers(how, URLs, ["/f/x/a.txt", *refused])
    assert (good.status, good.body) == (200, b"0123456789")
    for target, answer in zip(refused, others, strict=True):
        assert (answer.status, answer.body) == (404, b"nothing here"), target


@pytest.mark.asyncio
async def test_names_with_dots_and_percent_signs_are_names(root: Path) -> None:
    (root / "files" / "50%25.txt").write_bytes(b"0123456789")
    (root / "files" / "...").write_bytes(b"0123456789")
    (root / "files" / "%2e%2e%2fx").write_bytes(b"0123456789")
    urls = Urls(Joined.as_view(directory=root / "files"))
    for answer in await answers(
        "ours", urls, ["/f/a..b", "/f/50%2525.txt", "/f/...", "/f/./a.txt", "/f/%252e%252e%252fx"]
    ):
        assert (answer.status, answer.body) == (200, b"0123456789")


@pytest.mark.asyncio
async def test_no_argument_leads_to_another_url_of_the_upstream(root: Path) -> None:
    targets = []

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        targets.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"x"})

    async with live(upstream) as port:
        urls = Urls(JoinedURL.as_view(origin=f"http://127.0.0.1:{port}", allow_hosts=["127.0.0.1"]))
        good, *others = await answers("ours", urls, ["/f/x/a.txt", *(f"/f/{name}" for name in FORBIDDEN)])
    assert (good.status, good.body) == (200, b"x")
    assert {answer.status for answer in others} == {404}
    assert targets == ["/files/x/a.txt"]


@pytest.mark.parametrize("kind", ["path", "storage", "get_file"])
@pytest.mark.asyncio
async def test_a_view_may_check_its_arguments_itself(root: Path, kind: str) -> None:
    class Relative(Joined):
        allow_unsafe_arguments = True

    class RelativeName(JoinedName):
        allow_unsafe_arguments = True

    views = {
        "path": Relative.as_view(directory=root / "files"),
        "storage": RelativeName.as_view(storage=FileSystemStorage(root)),
        "get_file": JoinedInGetFile.as_view(directory=root / "files", allow_unsafe_arguments=True),
    }
    for answer in await answers("ours", Urls(views[kind]), ["/f/x/../a.txt", "/f/x//a.txt", "/f/../secret.txt"]):
        assert answer.status == 200


@pytest.mark.asyncio
async def test_what_the_urlconf_says_is_not_checked(root: Path) -> None:
    class Fixed(Urls):
        def __init__(self, view: Any) -> None:
            self.urlpatterns = [
                path("fixed", view, {"path": "x/../a.txt"}),
                path("both/<path:path>/", include([path("f", view)]), {"path": "a.txt"}),
                path("outer/", include([path("<path:path>", view)]), {"path": "../secret.txt"}),
            ]

    urls = Fixed(Joined.as_view(directory=root / "files"))
    fixed, both, outer, same = await answers(
        "ours", urls, ["/fixed", "/both/../secret.txt/f", "/outer/%2e%2e/%2e%2e/secret.txt", "/outer/a.txt"]
    )
    assert (fixed.status, both.status, both.body) == (200, 200, b"0123456789")
    assert (outer.status, same.status) == (404, 200)


@pytest.mark.parametrize("how", ["ours", "stock", "wsgi"])
@pytest.mark.asyncio
async def test_the_view_makes_the_answer(root: Path, how: str) -> None:
    class Own(Joined):
        def file_not_found_response(self) -> HttpResponseBase:
            return HttpResponse("gone", status=410)

    urls = Urls(Own.as_view(directory=root / "files"))
    missing, outside = await answers(how, urls, ["/f/missing.txt", "/f/..%2fsecret.txt"])
    assert (missing.status, missing.body) == (outside.status, outside.body) == (410, b"gone")


@pytest.mark.parametrize("module", ["views.path", "views", "api", "shortcuts"])
def test_the_old_import_paths_lead_to_the_same_classes(module: str) -> None:
    from importlib import import_module

    found = import_module(f"downloadview_async.contrib.django.{module}")
    assert getattr(found, "PathDownloadView", PathDownloadView) is PathDownloadView
    assert getattr(found, "sendfile", sendfile) is sendfile


def test_a_request_without_a_resolver_is_checked_too() -> None:
    from django.test import RequestFactory

    from downloadview_async.contrib.django import FileNotFound, setup_view

    request: HttpRequest = RequestFactory().get("/f")
    for name in ("../secret.txt", "/etc/passwd", "a//b"):
        with pytest.raises(FileNotFound):
            setup_view(Joined(), request, path=name).get_path()
    assert setup_view(Joined(directory="/srv"), request, path="a.txt").get_path() == "/srv/a.txt"
