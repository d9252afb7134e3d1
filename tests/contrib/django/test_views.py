"""The views: the hooks of both worlds and where they run, permissions, functions, transactions, and other methods."""

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.contrib.auth.mixins import LoginRequiredMixin, PermissionRequiredMixin, UserPassesTestMixin
from django.contrib.auth.models import AnonymousUser
from django.core.asgi import get_asgi_application as get_plain_application
from django.core.exceptions import PermissionDenied
from django.core.management import call_command
from django.db import connection, connections
from django.http import HttpRequest
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from downloadview_async.contrib.django import (
    BaseDownloadView,
    ObjectDownloadView,
    PathDownloadView,
    StorageDownloadView,
    VirtualDownloadView,
    VirtualFile,
    get_asgi_application,
    sendfile,
)
from tests.contrib.django.documents.models import Document
from tests.live import Answer, ask, live

CONTENT = b"0123456789"
LARGE = bytes(range(256)) * 1024
OFFLOADING = {"x-accel-redirect", "x-sendfile"}
DOWNLOADVIEW = {
    "BACKEND": "nginx",
    "RULES": [{"source_dir": "/", "destination_url": "/internal/"}],
}
SMART = "downloadview_async.contrib.django.SmartDownloadMiddleware"


def on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# --- four ways of asking: the two clients, and real servers with both handlers

T = TypeVar("T")
Ask = Callable[[Any, str, str, dict[str, str]], Answer]


async def _read(response: Any) -> Answer:
    if not response.streaming:
        body = response.content
    elif response.is_async:
        body = b"".join([chunk async for chunk in response])
    else:
        body = b"".join(response)
    headers = {name.lower(): value for name, value in response.items()}
    return Answer(response.status_code, headers, body, True)


def by_client(urls: Any, url: str, method: str, headers: dict[str, str]) -> Answer:
    with override_settings(ROOT_URLCONF=urls):
        response: Any = Client().generic(method, url, headers=headers)
        body = b"".join(response) if response.streaming else response.content
        return Answer(response.status_code, {name.lower(): value for name, value in response.items()}, body, True)


def by_async_client(urls: Any, url: str, method: str, headers: dict[str, str]) -> Answer:
    async def answer() -> Answer:
        return await _read(await AsyncClient().generic(method, url, headers=headers))

    with override_settings(ROOT_URLCONF=urls):
        return async_to_sync(answer)()


class Servers:
    """Servers in a thread of their own, one for each handler and its middlewares: the settings are shared."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.ports: dict[Any, int] = {}
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def port_of(self, make: Callable[[], Any]) -> int:
        key = make, *settings.MIDDLEWARE
        if key not in self.ports:
            self.ports[key] = self.run(self.stack.enter_async_context(live(make())))
        return self.ports[key]

    def close(self) -> None:
        self.run(self.stack.aclose())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def _by_server(make: Callable[[], Any]) -> Ask:
    def by_server(urls: Any, url: str, method: str, headers: dict[str, str]) -> Answer:
        with override_settings(ROOT_URLCONF=urls):
            servers = SERVERS[0]
            return servers.run(ask(servers.port_of(make), url, method=method, headers=headers))

    return by_server


SERVERS: list[Servers] = []
ASKING: dict[str, Ask] = {
    "client": by_client,
    "async client": by_async_client,
    "ours": _by_server(get_asgi_application),
    "stock": _by_server(get_plain_application),
}
by_all = pytest.mark.parametrize("asking", ASKING.values(), ids=ASKING)


class Urls:
    def __init__(self, *views: Any) -> None:
        self.urlpatterns = [path(f"{number}/<path:path>", view) for number, view in enumerate(views)]


def get(asking: Ask, view: Any, name: str = "a.txt", method: str = "GET", **headers: str) -> Answer:
    fields = {field.replace("_", "-"): value for field, value in headers.items()}
    return asking(Urls(view), f"/0/{name}", method, fields)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    (root / "a.txt").write_bytes(CONTENT)
    (root / "large.bin").write_bytes(LARGE)
    return root


@pytest.fixture(scope="module", autouse=True)
def documents(root: Path) -> Iterator[None]:
    call_command("migrate", run_syncdb=True, verbosity=0)
    Document.objects.all().delete()
    Document.objects.create(name="a.txt", file="a.txt")
    Document.objects.create(name="empty", file="")
    connections.close_all()
    SERVERS.append(Servers())
    with override_settings(MEDIA_ROOT=str(root)):
        yield
    SERVERS.pop().close()


# --- hooks


class Hooked:
    """Remembers where its hooks were called."""

    calls: list[tuple[str, bool]] = []

    def called(self, name: str) -> None:
        self.calls.append((name, on_loop()))


def _views(root: Path) -> dict[str, Any]:
    class GetFile(Hooked, BaseDownloadView):
        def get_file(self) -> Any:
            self.called("get_file")
            return VirtualFile(io.BytesIO((root / self.kwargs["path"]).read_bytes()), name=self.kwargs["path"])

    class GetPath(Hooked, PathDownloadView):
        def get_path(self) -> Any:
            self.called("get_path")
            return root / self.kwargs["path"]

    class GetBasename(Hooked, StorageDownloadView):
        def get_basename(self) -> Any:
            self.called("get_basename")
            return "hooked.txt"

    class GetObject(Hooked, ObjectDownloadView):
        def get_object(self, queryset: Any = None) -> Any:
            self.called("get_object")
            return Document.objects.get(name=self.kwargs["path"])

    class Dispatch(Hooked, PathDownloadView):
        def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            self.called("dispatch")
            Document.objects.count()  # as a permission would
            return super().dispatch(request, *args, **kwargs)

    class AsyncFile(Hooked, BaseDownloadView):
        async def aget_file(self) -> Any:
            self.called("aget_file")
            return VirtualFile(io.BytesIO(CONTENT), name="a.txt")

    class AsyncObject(Hooked, ObjectDownloadView):
        async def aget_object(self) -> Any:
            self.called("aget_object")
            return await Document.objects.aget(name=self.kwargs["path"])

    found: dict[str, Any] = {
        "get_file": GetFile,
        "get_path": GetPath,
        "get_basename": GetBasename,
        "get_object": GetObject,
        "dispatch": Dispatch,
        "aget_file": AsyncFile,
        "aget_object": AsyncObject,
    }
    Dispatch.root = root
    return found


HOOKS = ["get_file", "get_path", "get_basename", "get_object", "dispatch", "aget_file", "aget_object"]


@by_all
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_run_where_they_may(root: Path, hook: str, asking: Ask) -> None:
    view = _views(root)[hook]
    Hooked.calls.clear()
    answer = get(asking, view.as_view())
    assert (answer.status, answer.body) == (200, CONTENT)
    assert {name for name, _ in Hooked.calls} == {hook}
    assert {loop for _, loop in Hooked.calls} == {hook.startswith("a")}
    assert ("hooked.txt" in answer.headers["content-disposition"]) == (hook == "get_basename")


@by_all
@pytest.mark.parametrize("hook", ["get_path", "get_basename", "dispatch"])
def test_what_a_hook_does_not_find_is_404(root: Path, hook: str, asking: Ask) -> None:
    assert get(asking, _views(root)[hook].as_view(), "none.txt").status == 404


@by_all
def test_an_object_with_an_empty_field_is_404(asking: Ask) -> None:
    view = ObjectDownloadView.as_view(model=Document, slug_field="name", slug_url_kwarg="path")
    assert get(asking, view, "empty").status == 404
    assert get(asking, view, "none").status == 404
    assert get(asking, view, "a.txt").body == CONTENT


# --- permissions


class _User(AnonymousUser):
    def __init__(self, allowed: bool) -> None:
        super().__init__()
        self.allowed = allowed

    @property
    def is_authenticated(self) -> bool:  # type: ignore[override]
        return self.allowed

    def has_perms(self, perm_list: Any, obj: Any = None) -> bool:
        assert not on_loop()
        Document.objects.count()
        return self.allowed


def users(get_response: Any) -> Any:
    """Take the user from the request's header."""

    def middleware(request: Any) -> Any:
        request.user = _User(request.headers.get("user") == "good")

        async def auser() -> Any:
            return request.user

        request.auser = auser
        return get_response(request)

    return middleware


def _guarded(root: Path) -> dict[str, Any]:
    plain = PathDownloadView.as_view(root=root)

    class Login(LoginRequiredMixin, PathDownloadView):
        raise_exception = True

    class Permission(PermissionRequiredMixin, PathDownloadView):
        permission_required = "documents.view_document"
        raise_exception = True

    class Passes(UserPassesTestMixin, PathDownloadView):
        raise_exception = True

        def test_func(self) -> bool:
            assert not on_loop()
            return bool(self.request.user.is_authenticated)

    class Rest(PathDownloadView):
        """As in Django REST framework: checked by `dispatch`, refused by an exception."""

        def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            self.check_permissions(request)
            return super().dispatch(request, *args, **kwargs)

        def check_permissions(self, request: Any) -> None:
            if not request.user.is_authenticated:
                raise PermissionDenied

    async def function(request: HttpRequest, path: str) -> Any:
        response = await plain(request, path=path)
        if not request.user.is_authenticated:
            raise PermissionDenied
        return response

    def blocking(request: HttpRequest, path: str) -> Any:
        response = plain(request, path=path)
        if not request.user.is_authenticated:
            raise PermissionDenied
        return response

    return {
        "LoginRequiredMixin": Login.as_view(root=root),
        "PermissionRequiredMixin": Permission.as_view(root=root),
        "UserPassesTestMixin": Passes.as_view(root=root),
        "dispatch": Rest.as_view(root=root),
        "function": function,
        "blocking function": blocking,
        "login_required": login_required(plain),
        "login_required, blocking": login_required(Login.as_view(root=root)),
    }


GUARDS = [
    "LoginRequiredMixin",
    "PermissionRequiredMixin",
    "UserPassesTestMixin",
    "dispatch",
    "function",
    "blocking function",
    "login_required",
    "login_required, blocking",
]


@by_all
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("offloading", [False, True], ids=["streamed", "offloaded"])
def test_who_may_not_have_a_file_gets_neither_it_nor_a_header(
    root: Path, guard: str, asking: Ask, offloading: bool
) -> None:
    view = _guarded(root)[guard]
    middleware = [f"{__name__}.users", *([SMART] if offloading else [])]
    with override_settings(MIDDLEWARE=middleware, DOWNLOADVIEW=DOWNLOADVIEW):
        refused = get(asking, view)
        allowed = get(asking, view, user="good")
    assert refused.status == (302 if guard.startswith("login_required") else 403)
    assert CONTENT not in refused.body
    assert not OFFLOADING & refused.headers.keys()
    assert allowed.status == 200
    if offloading:
        assert allowed.headers["x-accel-redirect"] == f"/internal{root}/a.txt"
        assert allowed.body == b""
    else:
        assert allowed.body == CONTENT
        assert not OFFLOADING & allowed.headers.keys()


# --- functions, transactions, methods


@by_all
def test_sendfile_in_functions(root: Path, asking: Ask) -> None:
    async def function(request: HttpRequest, path: str) -> Any:
        return await sendfile(request, root / path, attachment=True, attachment_filename="b.txt")

    def blocking(request: HttpRequest, path: str) -> Any:
        return sendfile(request, str(root / path), attachment=True, attachment_filename="b.txt")

    for view in (function, blocking):
        answer = get(asking, view, range="bytes=2-4")
        assert (answer.status, answer.body) == (206, b"234")
        assert answer.headers["content-disposition"] == 'attachment; filename="b.txt"'
        assert get(asking, view, "none.txt").status == 404


@by_all
@pytest.mark.parametrize("hook", ["get_path", "get_object", "dispatch", "aget_object"])
def test_atomic_requests(root: Path, hook: str, asking: Ask) -> None:
    atomic: list[bool] = []
    base: Any = _views(root)[hook]

    class View(base):  # type: ignore[misc]
        def get_mimetype(self) -> Any:
            atomic.append(connection.in_atomic_block)
            return super().get_mimetype()

    databases = connections.settings
    databases["default"]["ATOMIC_REQUESTS"] = True
    connections.close_all()
    try:
        answer = get(asking, View.as_view())
        plain = get(asking, PathDownloadView.as_view(root=root), "large.bin")
    finally:
        databases["default"]["ATOMIC_REQUESTS"] = False
    assert (answer.status, answer.body) == (200, CONTENT)
    assert (plain.status, plain.body == LARGE) == (200, True)
    assert atomic == [True]


@by_all
@pytest.mark.parametrize("hook", ["get_path", "get_object", "aget_file"])
def test_methods(root: Path, hook: str, asking: Ask) -> None:
    view = _views(root)[hook].as_view()
    got = get(asking, view)
    head = get(asking, view, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    own = {name: value for name, value in head.headers.items() if name not in ("date", "connection")}
    assert own == {name: value for name, value in got.headers.items() if name not in ("date", "connection")}
    options = get(asking, view, method="OPTIONS")
    assert (options.status, options.headers["allow"], options.body) == (200, "GET, HEAD, OPTIONS", b"")
    for method in ("POST", "DELETE"):
        refused = get(asking, view, method=method, content_length="0")
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


@by_all
def test_a_virtual_file_in_memory(asking: Ask) -> None:
    class View(VirtualDownloadView):
        def get_file(self) -> Any:
            return VirtualFile(io.StringIO("Hällo\n"), name="hello.txt")

    answer = get(asking, View.as_view())
    assert (answer.status, answer.body) == (200, "Hällo\n".encode())
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["content-length"] == "7"
    part = get(asking, View.as_view(), range="bytes=1-2")
    assert (part.status, part.body) == (206, "ä".encode())
