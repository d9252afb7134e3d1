"""Signed links: which URLs a signed storage gives out, and which of them a view lets in."""

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.core.exceptions import PermissionDenied
from django.core.files.storage import FileSystemStorage, InMemoryStorage
from django.core.signing import BadSignature, Signer, TimestampSigner, dumps
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path

from downloadview_async.contrib.django.storage import (
    SALT,
    SignedFileSystemStorage,
    SignedURLMixin,
    _signature_is_valid,
    signature_required,
)
from downloadview_async.contrib.django.views import StorageDownloadView

NAMES = [
    "plain.txt",
    "a b.txt",
    "a%20b.txt",
    "50%.txt",
    "50%25.txt",
    "q?.txt",
    "h#.txt",
    "plus+.txt",
    "a&b=c.txt",
    "semi;colon:.txt",
    "é.txt",
    "π.txt",
    "quo'te\".txt",
    "x/y.txt",
]


def request_for(url: str) -> HttpRequest:
    parts = urlsplit(url)
    return RequestFactory().get(f"{parts.path}?{parts.query}")


def is_valid(url: str) -> bool:
    try:
        _signature_is_valid(request_for(url))
    except PermissionDenied:
        return False
    return True


class WithQuery(FileSystemStorage):
    def url(self, name: str | None) -> str:
        return f"{super().url(name)}?v=1"


class SignedWithQuery(SignedURLMixin, WithQuery):
    pass


class SignedInMemory(SignedURLMixin, InMemoryStorage):
    pass


@pytest.mark.parametrize("base", ["/media/", "/my media/", "https://files.example.org/media/", "/é/"])
@pytest.mark.parametrize("storage", [SignedFileSystemStorage, SignedWithQuery, SignedInMemory])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_is_for_the_very_name(name: str, storage: Any, base: str) -> None:
    url = storage(base_url=base).url(name)
    assert is_valid(url)
    assert url.isascii() or not base.isascii()
    assert len(parse_qs(urlsplit(url).query)["X-Signature"]) == 1
    query = urlsplit(url).query
    for other in NAMES:
        if other != name:
            unsigned = FileSystemStorage(base_url=base).url(other)
            assert not is_valid(f"{unsigned}?{query}"), other


def test_a_link_with_a_query_keeps_it() -> None:
    url = SignedWithQuery(base_url="/media/").url("a.txt")
    assert url.startswith("/media/a.txt?v=1&X-Signature=%2Fmedia%2Fa.txt%3A")


def test_a_fragment_stays_at_the_end() -> None:
    class Page:
        def url(self, name: str) -> str:
            return f"/pages/{name}#top"

    class SignedPage(SignedURLMixin, Page):
        pass

    url = SignedPage().url("a")
    assert url.startswith("/pages/a?X-Signature=")
    assert url.endswith("#top")
    assert is_valid(url.removesuffix("#top"))


def test_the_storage_gets_its_own_arguments() -> None:
    class Bucket:
        def url(self, name: str, parameters: dict[str, str] | None = None) -> str:
            return f"/b/{name}?p={(parameters or {}).get('p')}"

    class SignedBucket(SignedURLMixin, Bucket):
        pass

    assert SignedBucket().url("a", parameters={"p": "1"}).startswith("/b/a?p=1&X-Signature=")


@pytest.mark.parametrize("signed_path", ["/media/a.txt", "/media/x/y-1_2.txt"])
def test_links_of_django_downloadview_are_valid_while_a_setting_says_so(signed_path: str) -> None:
    # the signature of the path as it stands in the URL, not encoded once more
    link = f"{signed_path}?X-Signature={TimestampSigner().sign(signed_path)}"
    assert not is_valid(link)
    for value, valid in ((True, True), (False, False), (None, False), ("no", False)):
        with override_settings(DOWNLOADVIEW_UNSALTED_LINKS=value):
            assert is_valid(link) is valid
            assert is_valid(SignedFileSystemStorage(base_url="/media/").url("a.txt"))


@pytest.mark.parametrize("value", [True, False])
def test_another_token_of_the_project_is_no_link(value: bool) -> None:
    tokens = [
        TimestampSigner(salt="another").sign("/media/a.txt"),
        Signer(salt=SALT).sign("/media/a.txt"),
        dumps("/media/a.txt", salt=SALT),
        *([] if value else [TimestampSigner().sign("/media/a.txt"), TimestampSigner(salt="").sign("/media/a.txt")]),
    ]
    with override_settings(DOWNLOADVIEW_UNSALTED_LINKS=value):
        for token in tokens:
            assert not is_valid(f"/media/a.txt?X-Signature={quote(token)}")


def test_a_link_is_no_other_token_of_the_project() -> None:
    token = parse_qs(urlsplit(SignedFileSystemStorage(base_url="/media/").url("a.txt")).query)["X-Signature"][0]
    assert TimestampSigner(salt=SALT).unsign(token) == "/media/a.txt"
    with pytest.raises(BadSignature):
        TimestampSigner().unsign(token)


@pytest.mark.parametrize("age, valid", [(59, True), (61, False)])
def test_old_links_expire_as_well(age: int, valid: bool) -> None:
    with mock.patch("django.core.signing.time.time", return_value=1_700_000_000):
        link = f"/media/a.txt?X-Signature={TimestampSigner().sign('/media/a.txt')}"
    with (
        mock.patch("django.core.signing.time.time", return_value=1_700_000_000 + age),
        override_settings(DOWNLOADVIEW_URL_EXPIRATION=60, DOWNLOADVIEW_UNSALTED_LINKS=True),
    ):
        assert is_valid(link) is valid


@pytest.mark.parametrize(
    "query",
    [
        "",
        "X-Signature=",
        "X-Signature=no",
        "X-Signature=/media/a.txt",
        "X-Signature=/media/a.txt:1:2",
        f"X-Signature={quote(Signer(salt=SALT).sign('/media/a.txt'))}",
        "x-signature={right}",
        "X-Signature={right}x",
        "X-Signature={other}",
        "X-Signature={bytes}",
        "X-Signature={right}&X-Signature=no",
    ],
)
def test_everything_else_is_denied(query: str) -> None:
    signer = TimestampSigner(salt=SALT)
    query = query.format(
        right=quote(signer.sign("/media/a.txt")),
        other=quote(signer.sign("/media/b.txt")),
        bytes=quote(signer.sign("/media/%FF.txt")),
    )
    with pytest.raises(PermissionDenied):
        _signature_is_valid(request_for(f"/media/a.txt?{query}"))


def test_bytes_that_are_no_text_are_nobodys_name() -> None:
    assert not is_valid(f"/media/%EF%BF%BD?X-Signature={quote(TimestampSigner(salt=SALT).sign('/media/%FF'))}")


def test_another_key_is_denied_until_it_is_a_fallback() -> None:
    storage = SignedFileSystemStorage(base_url="/media/")
    with override_settings(SECRET_KEY="the old one"):
        url = storage.url("a b.txt")
    assert not is_valid(url)
    with override_settings(SECRET_KEY_FALLBACKS=["the old one"]):
        assert is_valid(url)


@pytest.mark.parametrize(
    "expiration, age, valid",
    [
        (None, 10**8, True),
        (60, 59, True),
        (60, 61, False),
        (timedelta(minutes=1), 59, True),
        (timedelta(minutes=1), 61, False),
    ],
)
def test_links_expire(expiration: Any, age: int, valid: bool) -> None:
    with mock.patch("django.core.signing.time.time", return_value=1_700_000_000):
        url = SignedFileSystemStorage(base_url="/media/").url("a b.txt")
    with (
        mock.patch("django.core.signing.time.time", return_value=1_700_000_000 + age),
        override_settings(DOWNLOADVIEW_URL_EXPIRATION=expiration),
    ):
        assert is_valid(url) is valid


def test_a_decorated_view_stays_what_it_is() -> None:
    async def asynchronous(request: HttpRequest) -> HttpResponse:
        return HttpResponse("a")

    def synchronous(request: HttpRequest) -> HttpResponse:
        """Say something."""
        return HttpResponse("s")

    url = SignedFileSystemStorage(base_url="/media/").url("a.txt")
    first, second = signature_required(asynchronous), signature_required(synchronous)
    assert iscoroutinefunction(first)
    assert not iscoroutinefunction(second)
    assert second.__doc__ == "Say something."
    assert async_to_sync(first)(request_for(url)).content == b"a"
    assert second(request_for(url)).content == b"s"
    with pytest.raises(PermissionDenied):
        second(request_for("/media/a.txt"))


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["a.txt", "a b.txt", "a%20b.txt", "x/50%.txt"])
def test_a_link_downloads_its_file_and_no_other(tmp_path: Path, name: str, mode: str) -> None:
    storage = SignedFileSystemStorage(location=tmp_path, base_url="/media/")
    (tmp_path / "x").mkdir()
    (tmp_path / name).write_bytes(name.encode())

    class Urls:
        urlpatterns = [path("media/<path:path>", signature_required(StorageDownloadView.as_view(storage=storage)))]

    async def fetch(url: str) -> tuple[int, bytes]:
        response: Any = await AsyncClient().get(url)
        if not response.streaming:
            return response.status_code, b""
        return response.status_code, b"".join([chunk async for chunk in response])

    def ask(url: str) -> tuple[int, bytes]:
        if mode == "async":
            return async_to_sync(fetch)(url)
        response: Any = Client().get(url)
        return response.status_code, b"".join(response) if response.streaming else b""

    with override_settings(ROOT_URLCONF=Urls()):
        url = storage.url(name)
        assert ask(url) == (200, name.encode())
        assert ask(urlsplit(url).path)[0] == 403
        assert ask(url.replace("/media/", "/media/x/", 1))[0] == 403
