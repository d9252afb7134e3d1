"""Real proxies in front of a real uvicorn with a Django project: hostile names, ranges, conditions, refusals."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from django.core.asgi import get_asgi_application as get_plain_application
from django.core.exceptions import PermissionDenied
from django.core.files.storage import FileSystemStorage
from django.http import HttpRequest
from django.test import override_settings
from django.urls import path

from downloadview_async.contrib.django.asgi import get_asgi_application
from downloadview_async.contrib.django.decorators import signature_required
from downloadview_async.contrib.django.storage import SignedFileSystemStorage
from downloadview_async.contrib.django.views import StorageDownloadView
from tests.live import ask, live
from tests.proxies.conftest import HOSTILE_NAMES, content_of, make_checkout
from tests.proxies.servers import KINDS, proxy, readable_directory

SMART = "downloadview_async.contrib.django.middleware.SmartDownloadMiddleware"
NAMES = [*HOSTILE_NAMES, "%2e%2e", "semi;colon.txt", "quo'te\".txt", "back\\slash.txt"]
OFFLOADING = {"x-accel-redirect", "x-sendfile"}
STREAMED = {"back\\slash.txt"}  # for which Django gives the URL of another file
STREAMED_FOR_APACHE = {"a trailing space.txt "}  # which a header value cannot name

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Project:
    kind: str
    port: int
    """The proxy's."""
    service: int
    """Django's own."""
    signed: SignedFileSystemStorage


class Urls:
    def __init__(self, storage: FileSystemStorage, signed: SignedFileSystemStorage, private: FileSystemStorage) -> None:
        asynchronous = StorageDownloadView.as_view(storage=storage)

        async def refused(request: HttpRequest, path: str) -> Any:
            await asynchronous(request, path=path)
            raise PermissionDenied

        class Synchronous(StorageDownloadView):
            def get_basename(self) -> str:
                return "by-a-thread.txt"

        self.urlpatterns = [
            path("files/<path:path>", asynchronous),
            path("threaded/<path:path>", Synchronous.as_view(storage=storage)),
            path("private/<path:path>", StorageDownloadView.as_view(storage=private)),
            path("refused/<path:path>", refused),
            path("signed/<path:path>", signature_required(StorageDownloadView.as_view(storage=signed))),
        ]


PROJECTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nginx": ("nginx", get_asgi_application),
    "nginx-djangos-own-handler": ("nginx", get_plain_application),
    "apache": ("apache", get_asgi_application),
    "lighttpd": ("lighttpd", get_asgi_application),
}
# the other proxies come from the operating system, and few people have them
PARAMS = [pytest.param(name, marks=[] if name.startswith("nginx") else pytest.mark.slow) for name in PROJECTS]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PARAMS)
async def project(request: pytest.FixtureRequest) -> AsyncIterator[Project]:
    """The same project behind each proxy."""
    kind, make_application = PROJECTS[request.param]
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        files = checkout / "app" / "files"
        for name in NAMES:
            (files / name).write_bytes(content_of(name))
        storage = FileSystemStorage(location=files, base_url="/media/")
        signed = SignedFileSystemStorage(location=files, base_url="/signed/")
        private = FileSystemStorage(location=checkout / "app" / "files-private", base_url="/media-private/")
        target = {"destination_url": "/_files/"} if kind == "nginx" else {"destination_dir": files}
        rules = [{"source_url": url, **target} for url in ("/media/", "/signed/")]
        settings = {"BACKEND": kind, "RULES": rules}
        async with AsyncExitStack() as stack:
            stack.enter_context(
                override_settings(
                    ROOT_URLCONF=Urls(storage, signed, private), MIDDLEWARE=[SMART], DOWNLOADVIEW=settings
                )
            )
            service = await stack.enter_async_context(live(make_application()))
            port = stack.enter_context(proxy(KINDS[kind], checkout, service))
            yield Project(kind, port, service, signed)


def is_offloaded(project: Project, name: str) -> bool:
    return name not in STREAMED | (STREAMED_FOR_APACHE if project.kind == "apache" else set())


@pytest.mark.parametrize("view", ["files", "threaded"])
@pytest.mark.parametrize("name", NAMES)
async def test_every_name_is_its_own_file(project: Project, name: str, view: str) -> None:
    url = f"/{view}/{quote(name)}"
    whole = await ask(project.port, url)
    assert (whole.status, whole.body, whole.complete) == (200, content_of(name), True)
    assert not OFFLOADING & {*whole.headers}
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["content-disposition"].startswith("attachment; filename=")
    told = await ask(project.service, url)
    assert (told.status, bool(OFFLOADING & {*told.headers})) == (200, is_offloaded(project, name))
    assert told.body == (b"" if is_offloaded(project, name) else content_of(name))


@pytest.mark.parametrize("name", ["plain.txt", "50%25.txt", "π.txt", "a directory/50%25 of it/é?.txt"])
async def test_the_proxy_answers_ranges_and_conditions(project: Project, name: str) -> None:
    url, content = f"/files/{quote(name)}", content_of(name)
    part = await ask(project.port, url, headers={"Range": "bytes=3-9"})
    assert (part.status, part.body) == (206, content[3:10])
    assert part.headers["content-range"] == f"bytes 3-9/{len(content)}"
    beyond = await ask(project.port, url, headers={"Range": f"bytes={len(content)}-"})
    assert beyond.status == 416
    etag = (await ask(project.port, url)).headers["etag"]
    same = await ask(project.port, url, headers={"If-None-Match": etag})
    assert (same.status, same.body) == (304, b"")
    other = await ask(project.port, url, headers={"If-None-Match": '"another"'})
    assert (other.status, other.body) == (200, content)
    head = await ask(project.port, url, method="HEAD")
    assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize("name", ["secret.txt", "plain.txt"])
async def test_what_no_rule_covers_is_streamed(project: Project, name: str) -> None:
    answer = await ask(project.port, f"/private/{name}", headers={"Range": "bytes=0-1"})
    assert (answer.status, len(answer.body)) == (206, 2)
    assert not OFFLOADING & {*(await ask(project.service, f"/private/{name}")).headers}


@pytest.mark.parametrize(
    "path, status",
    [
        ("/refused/plain.txt", 403),
        ("/signed/plain.txt", 403),
        ("/signed/plain.txt?X-Signature=no", 403),
        ("/files/missing.txt", 404),
        ("/files/%2e%2e/files-private/secret.txt", 404),
        ("/files/..%2ffiles-private%2fsecret.txt", 404),
        ("/files/a%20directory", 404),
        ("/media/plain.txt", 404),
        ("/_files/plain.txt", 404),
    ],
)
async def test_a_refusal_is_a_refusal(project: Project, path: str, status: int) -> None:
    for port in (project.port, project.service):
        answer = await ask(port, path)
        assert answer.status == status
        assert not OFFLOADING & {*answer.headers}
        assert b"of another directory" not in answer.body
        assert content_of("plain.txt") not in answer.body


@pytest.mark.parametrize("name", ["plain.txt", "50%25.txt", "a b.txt", "q?.txt", "plus+.txt", "π.txt"])
async def test_a_signed_link_is_for_its_file(project: Project, name: str) -> None:
    answer = await ask(project.port, project.signed.url(name))
    assert (answer.status, answer.body) == (200, content_of(name))
    assert OFFLOADING & {*(await ask(project.service, project.signed.url(name))).headers}
