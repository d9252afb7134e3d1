"""Signed links: which URLs a signed storage gives out, and which of them a view lets in."""

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.core.files.storage import FileSystemStorage, InMemoryStorage
from django.core.signing import BadSignature, Signer, TimestampSigner, dumps
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path

from downloadview_async import ConfigurationError, MemoryGrantStore, URLSigner
from downloadview_async.contrib.django import arevoke_link, revoke_link, sign_url
from downloadview_async.contrib.django.decorators import _signature_is_valid, signature_required
from downloadview_async.contrib.django.links import averify
from downloadview_async.contrib.django.storage import SALT, SignedFileSystemStorage, SignedURLMixin
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


def request_for(url: str, method: str = "GET", **environ: Any) -> HttpRequest:
    parts = urlsplit(url)
    return RequestFactory().generic(method, f"{parts.path}?{parts.query}", **environ)


def old_link(url: str) -> str:
    """Return the link that earlier versions have made for the URL of a storage."""
    signature = quote(TimestampSigner(salt=SALT).sign(urlsplit(url).path), safe="")
    return f"{url}{'&' if '?' in url else '?'}X-Signature={signature}"


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
    assert url.startswith("/media/a.txt?v=1&X-Signature=")
    assert is_valid(url)
    for other in ("v=2&", "", "v=1&v=1&"):
        assert not is_valid(url.replace("v=1&", other))


@pytest.mark.parametrize("storage", [SignedFileSystemStorage, SignedWithQuery])
def test_no_byte_of_a_link_may_change(storage: Any) -> None:
    signed = storage(base_url="/media/").signed_url("a b.txt", expires_in=timedelta(hours=1), filename="Q3 & Q4.pdf")
    path, _, query = signed.partition("?")
    accepted = [
        changed
        for position in range(len(query))
        for byte in "&=%+;:#aA0-_ "
        if (changed := query[:position] + byte + query[position + 1 :]) != query and is_valid(f"{path}?{changed}")
    ]
    pairs = query.split("&")
    for index, pair in enumerate(pairs):
        others = [*pairs[:index], *pairs[index + 1 :]]
        changes = [others, [*pairs, pair], [pair, *pairs], [*pairs[:index], pair, *pairs[index:]]]
        changes += [[*others[:place], pair, *others[place:]] for place in range(len(pairs)) if place != index]
        changes += [[*pairs[:index], changed, *pairs[index + 1 :]] for changed in (pair + "&", f"x=1&{pair}")]
        accepted += [changed for each in changes if is_valid(f"{path}?{(changed := '&'.join(each))}")]
    assert accepted == []
    assert is_valid(signed)


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


OF_THE_LAST_VERSION = (
    "/media/x/a%20b.txt?X-Signature=%2Fmedia%2Fx%2Fa%2520b.txt%3A1r31eq%3AjlC-DTpFhLFUQqqEZaKjkN47UDh9AfuzscncLcANq5E"
)
OF_DJANGO_DOWNLOADVIEW = "/media/x/a.txt?X-Signature=/media/x/a.txt:1r31eq:ki9-f-mwJw-OdKHOd8tCWCfWiYnSWWGPddgBspD5Ofw"


@pytest.mark.parametrize("url", [OF_THE_LAST_VERSION, OF_DJANGO_DOWNLOADVIEW])
@override_settings(SECRET_KEY="for tests only", DOWNLOADVIEW_UNSALTED_LINKS=True)
def test_links_that_were_made_before_are_valid(url: str) -> None:
    assert is_valid(url)
    for changed in (url.replace("/media/x/", "/media/y/", 1), url[:-1], f"{url}A", url.replace("1r31eq", "1s31eq")):
        assert not is_valid(changed)
    with override_settings(DOWNLOADVIEW_URL_EXPIRATION=60):
        assert not is_valid(url)
    with override_settings(SECRET_KEY="new"):
        assert not is_valid(url)
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["for tests only"]):
        assert is_valid(url)
    with override_settings(DOWNLOADVIEW_LINKS={"KEYS": {"2026a": "x" * 32}}):
        assert is_valid(url)


def test_a_link_shows_neither_the_key_nor_another_token_of_the_project() -> None:
    query = parse_qs(urlsplit(SignedFileSystemStorage(base_url="/media/").url("a.txt")).query)
    for value in (value for values in query.values() for value in values):
        with pytest.raises(BadSignature):
            TimestampSigner().unsign(value)
        assert value not in settings.SECRET_KEY


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
    storage = SignedFileSystemStorage(base_url="/media/")
    with (
        mock.patch("time.time", return_value=1_700_000_000) as clock,
        override_settings(DOWNLOADVIEW_URL_EXPIRATION=expiration),
    ):
        urls = [storage.url("a b.txt"), old_link(FileSystemStorage(base_url="/media/").url("a b.txt"))]
        clock.return_value += age
        assert [is_valid(url) for url in urls] == [valid, valid]
        if not valid:
            responses: list[Any] = [signature_required(never)(request_for(url)) for url in urls]
            assert [(response.status_code, response.content) for response in responses] == [(410, b"")] * 2
            assert {response["Cache-Control"] for response in responses} == {"private, no-store"}


def never(request: HttpRequest) -> HttpResponse:
    raise AssertionError("the view is called")


def test_a_longer_life_than_the_setting_allows_is_refused() -> None:
    with override_settings(DOWNLOADVIEW_URL_EXPIRATION=3600):
        assert is_valid(sign_url("/media/a.txt", expires_in=timedelta(seconds=3600)))
        with pytest.raises(ValueError, match="more than max_age"):
            sign_url("/media/a.txt", expires_in=timedelta(seconds=3601))


@pytest.mark.parametrize("address, valid", [("203.0.113.9", True), ("::ffff:203.0.113.9", True), ("192.0.2.1", False)])
def test_a_link_for_a_network(address: str, valid: bool) -> None:
    url = sign_url("/media/a.txt", client="203.0.113.0/24")
    response = HttpResponse()
    view: Any = signature_required(lambda request: response)
    request = request_for(url, REMOTE_ADDR=address)
    if valid:
        assert view(request) is response
        assert response["Cache-Control"] == "private, no-store"
    else:
        with pytest.raises(PermissionDenied):
            view(request)


def test_a_link_to_all_that_is_below_a_folder() -> None:
    link = sign_url("/files/2026/", below=True)
    path, _, query = link.partition("?")
    assert query.startswith("X-Signature=")
    for name in ("", "a.txt", "sub/b.txt"):
        for more in (query, f"sort=size&{query}", f"{query}&q=a"):
            assert is_valid(f"{path}{name}?{more}")
    for other in (
        "/files/a.txt",
        "/files/2026",
        "/files/2026-secret/a.txt",
        "/files/2026/../a.txt",
        "/files/2026//a.txt",
    ):
        assert not is_valid(f"{other}?{query}")
    assert not is_valid(f"{path}?{query}&x=1")
    assert not is_valid(f"{path}a.txt?{sign_url('/files/2026/').partition('?')[2]}")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_a_link_is_for_get_and_head(method: str) -> None:
    with pytest.raises(PermissionDenied):
        signature_required(never)(request_for(sign_url("/media/a.txt"), method))


@override_settings(DOWNLOADVIEW_LINKS={"KEYS": {"b": "b" * 32, "a": b"a" * 32}})
def test_keys_in_the_settings() -> None:
    other = URLSigner({"a": b"a" * 32})
    assert "&k=b&" in sign_url("/media/a.txt")
    assert is_valid(sign_url("/media/a.txt"))
    assert is_valid(other.sign("/media/a.txt", filename="b.txt"))
    assert not is_valid(URLSigner({"a": b"c" * 32}).sign("/media/a.txt"))


def test_a_revoked_link_and_a_revoked_key() -> None:
    keys = {"b": "b" * 32, "a": "a" * 32}
    with override_settings(DOWNLOADVIEW_LINKS={"KEYS": keys, "STORE": "memory:"}):
        first, second, third = (sign_url("/media/a.txt") for _ in range(3))
        revoke_link(first)
        assert [is_valid(url) for url in (first, second, third)] == [False, True, True]
        async_to_sync(arevoke_link)(str(async_to_sync(averify)(request_for(second)).link_id))
        assert [is_valid(url) for url in (second, third)] == [False, True]
        revoke_link("b")
        assert not is_valid(third)
        assert is_valid(URLSigner({"a": "a" * 32}).sign("/media/a.txt"))
    with pytest.raises(ConfigurationError, match="store"):
        revoke_link(sign_url("/media/a.txt"))


class FailingStore(MemoryGrantStore):
    async def is_revoked(self, identifiers: Any, now: float) -> bool:
        raise OSError("it is gone")


@pytest.mark.parametrize("behaviour, status", [("refuse", 503), ("allow", 200)])
def test_a_store_that_fails(behaviour: str, status: int) -> None:
    with override_settings(DOWNLOADVIEW_LINKS={"STORE": FailingStore(), "WHEN_STORE_FAILS": behaviour}):
        view: Any = signature_required(lambda request: HttpResponse("a"))
        response = view(request_for(sign_url("/media/a.txt")))
        assert response.status_code == status
        assert response.has_header("Retry-After") is (status == 503)


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
