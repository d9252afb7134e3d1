"""The helpers for the tests of a Django project: what they accept, what they refuse, and what they say then."""

import asyncio
import os
import threading
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.http import FileResponse, HttpRequest, HttpResponse, HttpResponseNotModified, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path
from django.views.generic import View

from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.contrib.django.testing import (
    DownloadResponseValidator,
    XSendfileValidator,
    assert_download_response,
    assert_percent_encoded_x_sendfile,
    assert_x_accel_redirect,
    assert_x_sendfile,
    setup_view,
    temporary_media_root,
)

CASE = unittest.TestCase()
HELLO = b"Hello world!\n"


def download(content: Any = HELLO, disposition: str | None = 'attachment; filename="hello.txt"', **headers: str) -> Any:
    """A file as Django would send it; header names have an underscore for each hyphen."""
    response: HttpResponseBase
    if isinstance(content, bytes):
        response = HttpResponse(content, content_type="text/plain; charset=utf-8")
    else:
        response = StreamingHttpResponse(content, content_type="text/plain; charset=utf-8")
    if disposition is not None:
        response["Content-Disposition"] = disposition
    for name, value in headers.items():
        response[name.replace("_", "-")] = value
    return response


def with_status(status: int, response: Any) -> Any:
    response.status_code = status
    return response


def offloaded(status: int = 200, content: bytes = b"", /, **headers: str) -> Any:
    return with_status(status, download(content, **headers))


def from_file(content: bytes = HELLO, name: str = "hello.txt", **options: Any) -> FileResponse:
    return FileResponse(ContentFile(content, name=name), filename=name, **options)


def pieces() -> Iterator[bytes]:
    yield b"Hello "
    yield b"world!\n"


async def async_pieces() -> AsyncIterator[bytes]:
    yield b"Hello "
    await asyncio.sleep(0)  # needs a loop that runs
    yield b"world!\n"


async def no_async_pieces() -> AsyncIterator[bytes]:
    for piece in list[bytes]():
        yield piece


def encoded(name: str, fallback: str = "x") -> str:
    return f"attachment; filename=\"{fallback}\"; filename*=UTF-8''{name}"


PASSING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a body at once": (download, {"content": HELLO}),
    "a text as content": (lambda: download("é".encode()), {"content": "é"}),
    "an iterator": (lambda: download(pieces()), {"content": HELLO}),
    "an async iterator": (lambda: download(async_pieces()), {"content": HELLO}),
    "an empty iterator": (lambda: download([]), {"content": b""}),
    "an empty async iterator": (lambda: download(no_async_pieces()), {"content": ""}),
    "FileResponse": (lambda: from_file(as_attachment=True), {"content": HELLO, "size": 13, "attachment": True}),
    "FileResponse inline": (from_file, {"attachment": False, "basename": "hello.txt", "mime_type": "text/plain"}),
    "DownloadResponse": (
        lambda: DownloadResponse(ContentFile(HELLO, name="hello.txt")),
        {"content": HELLO, "basename": "hello.txt", "attachment": True, "mime_type": "text/plain"},
    ),
    "DownloadResponse without a disposition": (lambda: bare_download_response(), {"attachment": False}),
    "a part": (
        lambda: with_status(206, download(b"ello", Content_Range="bytes 1-4/13", Accept_Ranges="bytes")),
        {"content": b"ello", "size": 13, "ranges": True, "status": 206},
    ),
    "a part, whatever the status": (lambda: with_status(206, download(b"ello")), {"content": b"ello"}),
    "not modified": (HttpResponseNotModified, {"status": 304, "content": b""}),
    "not modified, with the length that a 200 would have": (
        lambda: with_status(304, download(b"", None, Content_Length="13")),
        {"status": 304, "content": b"", "size": 13},
    ),
    "no such range": (
        lambda: with_status(416, download(b"", None, Content_Range="bytes */13")),
        {"status": 416, "size": 13, "content": b""},
    ),
    "size unknown": (lambda: download(pieces()), {"size": None, "ranges": False}),
    "no ranges": (lambda: download(Accept_Ranges="none"), {"ranges": False}),
    "Content-Length": (lambda: download(Content_Length="13"), {"size": 13, "content": HELLO}),
    "mime type alone": (download, {"mime_type": "text/plain"}),
    "mime type in another case": (lambda: download(Content_Type="Text/Plain"), {"mime_type": "text/plain"}),
    "kind of mime type": (download, {"mime_type": "text/"}),
    "mime type with its charset": (download, {"mime_type": "text/plain; charset=utf-8"}),
    "content type": (download, {"content_type": "text/plain; charset=utf-8"}),
    "a bare attachment": (
        lambda: bare_download_response(Content_Disposition="attachment"),
        {"attachment": True},
    ),
    "the type in another case": (lambda: download(disposition='ATTACHMENT; FileName="a"'), {"attachment": True}),
    "a token as name": (lambda: download(disposition="attachment; filename=a.txt"), {"basename": "a.txt"}),
    "a name with a space": (lambda: download(disposition='inline; filename="a b.txt"'), {"basename": "a b.txt"}),
    "a semicolon in a name": (lambda: download(disposition='inline; filename="a;b=c"'), {"basename": "a;b=c"}),
    "the legacy form": (lambda: download(disposition=encoded("espac%C3%A9%20.txt")), {"basename": "espacé .txt"}),
    "the form of Django": (
        lambda: download(disposition="attachment; filename*=utf-8''%CF%80.txt"),
        {"basename": "π.txt"},
    ),
    "filename* first": (
        lambda: download(disposition="attachment; filename*=UTF-8''%CF%80.txt; filename=\"p.txt\""),
        {"basename": "π.txt"},
    ),
    "a name as bytes": (lambda: download(disposition=encoded("%CF%80")), {"basename": "π".encode()}),
    "escaped": (lambda: download(disposition=r'inline; filename="\"a\\b"'), {"basename": '"a\\b'}),
    "an accent, written otherwise": (lambda: download(disposition=encoded("%C3%A9")), {"basename": "e\u0301"}),
}

FAILING: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a page": (
        lambda: HttpResponse("<p>"),
        {},
        "expected 'a file with its name in Content-Disposition', found '200 Htt",
    ),
    "a name is missing": (lambda: download(disposition="attachment"), {}, "a file with its name"),
    "a name is empty": (lambda: download(disposition='attachment; filename=""'), {}, "a file with its name"),
    "not found": (lambda: with_status(404, download()), {}, "status: expected '200 or 206', found 404"),
    "not modified": (HttpResponseNotModified, {}, "status: expected '200 or 206', found 304"),
    "another status": (download, {"status": 206}, "status: expected 206, found 200 in '200 HttpResponse, text/plain"),
    "a proxy sends it": (
        lambda: download(b"", X_Accel_Redirect="/x"),
        {},
        "x-accel-redirect: expected it to be absent, found '/x' in 'the response, which Django has to send itself",
    ),
    "other bytes": (
        download,
        {"content": "Hello WORLD!\n"},
        "content: expected 13 bytes, found 13; from byte 6 on expected b'WORLD!\\n', found b'world!\\n'",
    ),
    "fewer bytes": (lambda: download(async_pieces()), {"content": b"Hello"}, "expected 5 bytes, found 13; from byte 5"),
    "more bytes": (lambda: download([]), {"content": b"Hello"}, "expected 5 bytes, found 0; from byte 0 on expected"),
    "not so many bytes": (
        lambda: download(Content_Length="14"),
        {"content": HELLO},
        "Content-Length: it promises '14' bytes, the body has 13",
    ),
    "another size": (lambda: download(Content_Length="14"), {"size": 13}, "Content-Length: expected 13, found '14'"),
    "no size": (download, {"size": 13}, "Content-Length: expected 13, it is absent"),
    "a size": (lambda: download(Content_Length="13"), {"size": None}, "expected it to be absent, found '13'"),
    "the size of a part": (
        lambda: with_status(206, download(b"ello", Content_Range="bytes 1-4/13", Content_Length="4")),
        {"size": 4},
        "size in Content-Range: expected 4, found '13' in 'bytes 1-4/13'",
    ),
    "no ranges": (download, {"ranges": True}, "Accept-Ranges: expected 'bytes', it is absent"),
    "ranges": (lambda: download(Accept_Ranges="bytes"), {"ranges": False}, "Accept-Ranges: expected it to be absent"),
    "another name": (
        download,
        {"basename": "hallo.txt"},
        "basename in Content-Disposition: expected 'hallo.txt', found 'hello.txt' in 'attachment; filename",
    ),
    "half a name": (download, {"basename": "hello"}, "expected 'hello', found 'hello.txt'"),
    "the fallback only": (
        lambda: download(disposition=encoded("%CF%80.txt", "pi.txt")),
        {"basename": "pi.txt"},
        "expected 'pi.txt', found 'π.txt'",
    ),
    "no name": (bare_download := lambda: bare_download_response(), {"basename": "a"}, "expected 'a', it is absent"),
    "a name twice": (
        lambda: download(disposition='inline; filename="a"; filename="b"'),
        {"basename": "b"},
        "by RFC 6266, found 'inline",
    ),
    "a quote in a name": (lambda: download(disposition='inline; filename="a"b"'), {"basename": "a"}, "by RFC 6266"),
    "not UTF-8": (lambda: download(disposition=encoded("%E9.txt")), {"basename": "é.txt"}, "UTF-8 by RFC 8187"),
    "inline": (
        lambda: download(disposition='inline; filename="attachment;"'),
        {"attachment": True},
        "Content-Disposition: expected 'attachment', found 'inline; filename",
    ),
    "attachment": (download, {"attachment": False}, "Content-Disposition: expected 'inline', found 'attachment;"),
    "no attachment": (bare_download, {"attachment": True}, "Content-Disposition: expected 'attachment', it is absent"),
    "another mime type": (
        lambda: download(Content_Type="text/plain-ish"),
        {"mime_type": "text/plain"},
        "MIME type: expected 'text/plain', found 'text/plain-ish'",
    ),
    "another charset": (
        download,
        {"content_type": "text/plain"},
        "Content-Type: expected 'text/plain', found 'text/plain; charset=utf-8'",
    ),
}

ACCEL = {"X_Accel_Redirect": "/internal/a%20b.txt"}
SENDFILE = {"X_Sendfile": "/srv/a b.txt"}

PASSING_OFFLOADS: dict[str, tuple[Callable[..., None], Any, dict[str, Any]]] = {
    "nginx": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, Content_Length="0"),
        {
            "redirect_url": "/internal/a%20b.txt",
            "content_type": "text/plain; charset=utf-8",
            "mime_type": "text/plain",
            "basename": "hello.txt",
            "attachment": True,
            "charset": None,
            "with_buffering": None,
            "expires": None,
            "limit_rate": None,
        },
    ),
    "nginx, on": (
        assert_x_accel_redirect,
        offloaded(
            **ACCEL,
            X_Accel_Charset="utf-8",
            X_Accel_Buffering="yes",
            X_Accel_Expires="60",
            X_Accel_Limit_Rate="4096",
        ),
        {"charset": "utf-8", "with_buffering": True, "expires": 60, "limit_rate": 4096},
    ),
    "nginx, off": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, X_Accel_Buffering="no", X_Accel_Expires="off", X_Accel_Limit_Rate="0"),
        {"with_buffering": False, "expires": False, "limit_rate": False},
    ),
    "Apache": (assert_x_sendfile, offloaded(**SENDFILE), {"file_path": "/srv/a b.txt", "basename": "hello.txt"}),
    "Apache, UTF-8": (
        assert_x_sendfile,
        offloaded(X_Sendfile="/srv/é".encode().decode("latin-1")),
        {"file_path": "/srv/é", "attachment": True},
    ),
    "a path as such": (assert_x_sendfile, offloaded(**SENDFILE), {"file_path": Path("/srv/a b.txt")}),
    "lighttpd": (
        assert_percent_encoded_x_sendfile,
        offloaded(X_Sendfile="/srv/a%20%C3%A9%2525.txt"),
        {"file_path": "/srv/a é%25.txt"},
    ),
}

FAILING_OFFLOADS: dict[str, tuple[Callable[..., None], Any, dict[str, Any], str]] = {
    "streamed": (
        assert_x_accel_redirect,
        download(),
        {},
        "X-Accel-Redirect: expected a value, it is absent in",
    ),
    "no value": (assert_x_accel_redirect, offloaded(X_Accel_Redirect=""), {}, "it is absent"),
    "refused": (assert_x_accel_redirect, offloaded(403, **ACCEL), {}, "status: expected 200, found 403"),
    "a body": (assert_x_accel_redirect, offloaded(200, HELLO, **ACCEL), {}, "content: expected 0 bytes, found 13"),
    "a length": (assert_x_accel_redirect, offloaded(**ACCEL, Content_Length="13"), {}, "Content-Length: expected '0'"),
    "ranges": (assert_x_accel_redirect, offloaded(**ACCEL, Accept_Ranges="bytes"), {}, "accept-ranges: expected it to"),
    "two proxies": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, **SENDFILE),
        {},
        "x-sendfile: expected it to be absent",
    ),
    "another proxy": (assert_x_sendfile, offloaded(**ACCEL), {}, "X-Sendfile: expected a value, it is absent"),
    "another URL": (
        assert_x_accel_redirect,
        offloaded(**ACCEL),
        {"redirect_url": "/internal/a b.txt"},
        "X-Accel-Redirect: expected '/internal/a b.txt', found '/internal/a%20b.txt'",
    ),
    "another charset": (
        assert_x_accel_redirect,
        offloaded(**ACCEL),
        {"charset": "utf-8"},
        "X-Accel-Charset: expected 'utf-8', it is absent",
    ),
    "buffering": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, X_Accel_Buffering="yes"),
        {"with_buffering": False},
        "X-Accel-Buffering: expected 'no', found 'yes'",
    ),
    "buffering is said": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, X_Accel_Buffering="yes"),
        {"with_buffering": None},
        "X-Accel-Buffering: expected it to be absent, found 'yes'",
    ),
    "expires": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, X_Accel_Expires="60"),
        {"expires": 61},
        "X-Accel-Expires: expected '61', found '60'",
    ),
    "limit rate": (
        assert_x_accel_redirect,
        offloaded(**ACCEL, X_Accel_Limit_Rate="60"),
        {"limit_rate": False},
        "X-Accel-Limit-Rate: expected '0', found '60'",
    ),
    "another name": (assert_x_sendfile, offloaded(**SENDFILE), {"basename": "b"}, "expected 'b', found 'hello.txt'"),
    "another path": (
        assert_x_sendfile,
        offloaded(**SENDFILE),
        {"file_path": "/srv/a%20b.txt"},
        "X-Sendfile: expected b'/srv/a%20b.txt', found b'/srv/a b.txt'",
    ),
    "Latin-1, which Apache would take for another file": (
        assert_x_sendfile,
        offloaded(X_Sendfile="/srv/é"),
        {"file_path": "/srv/é"},
        "expected b'/srv/\\xc3\\xa9', found b'/srv/\\xe9'",
    ),
    "lighttpd, which would decode the name": (
        assert_percent_encoded_x_sendfile,
        offloaded(X_Sendfile="/srv/50%25.txt"),
        {"file_path": "/srv/50%25.txt"},
        "expected b'/srv/50%2525.txt', found b'/srv/50%25.txt'",
    ),
}


def bare_download_response(**headers: str) -> DownloadResponse:
    response = DownloadResponse(ContentFile(HELLO, name="hello.txt"))
    del response["Content-Disposition"]
    for name, value in headers.items():
        response[name.replace("_", "-")] = value
    return response


@pytest.mark.parametrize(("make", "assertions"), PASSING.values(), ids=PASSING)
def test_a_download_that_is_as_expected(make: Callable[[], Any], assertions: dict[str, Any]) -> None:
    assert_download_response(CASE, make(), **assertions)


@pytest.mark.asyncio
@pytest.mark.parametrize(("make", "assertions"), PASSING.values(), ids=PASSING)
async def test_so_it_is_where_an_event_loop_runs(make: Callable[[], Any], assertions: dict[str, Any]) -> None:
    assert_download_response(CASE, make(), **assertions)


@pytest.mark.parametrize(("make", "assertions", "message"), FAILING.values(), ids=FAILING)
def test_a_download_that_is_not_as_expected(make: Callable[[], Any], assertions: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_download_response(CASE, make(), **assertions)
    assert message in str(caught.value)


@pytest.mark.asyncio
async def test_the_failure_is_the_same_where_an_event_loop_runs() -> None:
    with pytest.raises(AssertionError, match="content: expected 2 bytes, found 13"):
        assert_download_response(CASE, download(async_pieces()), content="no")


@pytest.mark.parametrize(("check", "response", "assertions"), PASSING_OFFLOADS.values(), ids=PASSING_OFFLOADS)
def test_an_offload_that_is_as_expected(check: Callable[..., None], response: Any, assertions: dict[str, Any]) -> None:
    check(CASE, response, **assertions)


@pytest.mark.parametrize(
    ("check", "response", "assertions", "message"), FAILING_OFFLOADS.values(), ids=FAILING_OFFLOADS
)
def test_an_offload_that_is_not_as_expected(
    check: Callable[..., None], response: Any, assertions: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError) as caught:
        check(CASE, response, **assertions)
    assert message in str(caught.value)


@pytest.mark.parametrize("check", [assert_download_response, assert_x_accel_redirect, assert_x_sendfile])
def test_an_assertion_that_there_is_not(check: Callable[..., None]) -> None:
    with pytest.raises(TypeError, match=r"has no assertion 'base_name', 'sise'"):
        check(CASE, download(), sise=3, base_name="a")


def test_a_subclass_adds_an_assertion_of_its_own() -> None:
    class Validator(DownloadResponseValidator):
        def assert_language(self, test_case: unittest.TestCase, response: HttpResponseBase, value: str) -> None:
            assert response["Content-Language"] == value, f"not in {value}"

    Validator()(CASE, download(Content_Language="pl"), language="pl", content=HELLO)
    with pytest.raises(AssertionError, match="not in de"):
        Validator()(CASE, download(Content_Language="pl"), language="de")


def test_a_failure_is_the_one_of_the_test_case() -> None:
    class Broken(Exception):
        pass

    class Case(unittest.TestCase):
        failureException = Broken

    with pytest.raises(Broken):
        XSendfileValidator()(Case(), download())


# A project's views, by both clients


def view_of(make: Callable[[], Any]) -> Callable[[HttpRequest], Any]:
    return lambda request: make()


def async_view_of(make: Callable[[], Any]) -> Callable[[HttpRequest], Any]:
    async def view(request: HttpRequest) -> Any:
        return make()

    return view


VIEWS: dict[str, Callable[[], Any]] = {
    "pieces": lambda: download(pieces(), Content_Length="13"),
    "async-pieces": lambda: download(async_pieces(), Content_Length="13"),
    "at-once": lambda: download(Content_Length="13"),
    "file": lambda: from_file(as_attachment=True),
    "ours": lambda: DownloadResponse(ContentFile(HELLO, name="hello.txt")),
}
urlpatterns = [path(f"sync/{name}", view_of(make)) for name, make in VIEWS.items()]
urlpatterns += [path(f"async/{name}", async_view_of(make)) for name, make in VIEWS.items()]
urlpatterns.append(path("accel", view_of(lambda: offloaded(**ACCEL))))
PATHS = [f"/{kind}/{name}" for kind in ("sync", "async") for name in VIEWS]


@pytest.mark.parametrize("url", PATHS)
@override_settings(ROOT_URLCONF=__name__)
def test_a_response_of_the_client(url: str) -> None:
    answer = Client().get(url)
    assert_download_response(CASE, answer, content=HELLO, basename="hello.txt", attachment=True)


@pytest.mark.asyncio
@pytest.mark.parametrize("url", PATHS)
@override_settings(ROOT_URLCONF=__name__)
async def test_a_response_of_the_async_client(url: str) -> None:
    answer = await AsyncClient().get(url)
    assert_download_response(CASE, answer, content=HELLO, basename="hello.txt", attachment=True)


@pytest.mark.parametrize("url", [url for url in PATHS if not url.endswith("ours")])
@override_settings(ROOT_URLCONF=__name__)
def test_a_head_has_the_length_and_no_body(url: str) -> None:
    assert_download_response(CASE, Client().head(url), content=b"", size=13)


@pytest.mark.asyncio
@override_settings(ROOT_URLCONF=__name__)
async def test_an_offload_to_both_clients() -> None:
    for answer in (await AsyncClient().get("/accel"), await asyncio.to_thread(Client().get, "/accel")):
        assert_x_accel_redirect(CASE, answer, redirect_url="/internal/a%20b.txt", basename="hello.txt")


@pytest.mark.asyncio
async def test_what_blocks_does_not_run_in_the_thread_of_the_loop() -> None:
    threads = []

    def blocking() -> Iterator[bytes]:
        threads.append(threading.get_ident())
        yield HELLO

    assert_download_response(CASE, download(blocking()), content=HELLO)
    assert threads
    assert threads[0] != threading.get_ident()


# The view and the media root


def test_setup_view() -> None:
    class Page(View):
        label = "a"

        def name(self) -> str:
            return f"{self.label}-{self.args[0]}-{self.kwargs['slug']}-{self.request.path}"

    page = Page(label="b")
    assert setup_view(page, RequestFactory().get("/there"), 7, slug="x") is page
    assert page.name() == "b-7-x-/there"


def save_hello() -> Path:
    assert os.listdir(settings.MEDIA_ROOT) == []
    default_storage.save("hello.txt", ContentFile(HELLO))
    saved = Path(settings.MEDIA_ROOT, "hello.txt")
    assert saved.read_bytes() == HELLO
    return saved


def test_a_temporary_media_root_as_a_context_manager() -> None:
    before = settings.MEDIA_ROOT
    with temporary_media_root(MEDIA_URL="/elsewhere/") as directory:
        assert str(directory) == settings.MEDIA_ROOT != before
        assert default_storage.url("hello.txt") == "/elsewhere/hello.txt"
        saved = save_hello()
    assert before == settings.MEDIA_ROOT
    assert not saved.parent.exists()


def test_a_temporary_media_root_as_a_decorator_is_a_new_one_each_time() -> None:
    decorated = temporary_media_root()(save_hello)
    first, second = decorated(), decorated()
    assert first.parent != second.parent
    assert not first.parent.exists()
    assert not second.parent.exists()


@pytest.mark.asyncio
async def test_a_temporary_media_root_of_a_coroutine_function() -> None:
    @temporary_media_root()
    async def save() -> Path:
        await asyncio.sleep(0)
        return save_hello()

    before = settings.MEDIA_ROOT
    saved = await save()
    assert not saved.parent.exists()
    assert before == settings.MEDIA_ROOT


def test_a_temporary_media_root_of_a_class_is_another_one_for_each_test() -> None:
    roots = []

    @temporary_media_root()
    class Case(unittest.TestCase):
        def test_one(self) -> None:
            roots.append(save_hello().parent)

        test_two = test_one

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert (result.testsRun, result.errors, result.failures) == (2, [], [])
    assert len(set(roots)) == 2
    assert not any(root.exists() for root in roots)


def test_a_test_that_fails_and_changes_the_setting_loses_no_other_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), temporary_media_root() as directory, override_settings(MEDIA_ROOT=tmp_path):
        raise ZeroDivisionError
    assert tmp_path.exists()
    assert not os.path.exists(str(directory))
