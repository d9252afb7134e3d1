"""Redirects to stores and CDNs by `EdgeRedirect`: which files, with which headers, and for how long."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from downloadview_async import (
    ConfigurationError,
    Download,
    DownloadResponse,
    EdgeRedirect,
    Grant,
    MemoryStorage,
    ObjectSource,
    ObjectStorage,
    PathSource,
    RemoteSource,
    Signed,
    SourceUnavailable,
    StorageFile,
    StorageSource,
    signer_of,
)
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.testing import call
from tests.live import ask, live
from tests.s3 import BUCKET, S3, serving_store

pytestmark = pytest.mark.asyncio

SECRET = "0123456789abcdef0123456789abcdef"
URL = "https://edge.example.org/files/"


class Recording:
    """A signer that records what it is asked, and signs with a word."""

    def __init__(self, *carries: str, is_served_alike: bool = False, cookies: tuple[str, ...] = ()) -> None:
        self.carries = frozenset(carries)
        self.is_served_alike = is_served_alike
        self.max_seconds = 3600
        self.cookies = cookies
        self.asked: list[tuple[str, dict[str, str], int]] = []

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        self.asked.append((path, dict(headers), seconds))
        return Signed(f"{URL}{path}?signed", seconds - 100, self.cookies)


class Closing(Recording):
    """A signer whose keys have expired."""

    async def renew(self) -> None:
        raise SourceUnavailable("the key has expired")


ALL = ("content-disposition", "content-type", "cache-control", "content-encoding", "content-language")
PRESENTED = ("content-disposition", "content-type")
EVERY = ("x.html", "sub/π%.pdf", "x.png", "a b.txt", "x.zip")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a b.txt", "sub/π%.pdf", "x.html", "x.png", "x.zip"):
        file = tmp_path / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return tmp_path / "files"


def site(files: Path, signer: Any, **options: Any) -> Download:
    return Download(PathSource(files), redirect=EdgeRedirect(files, signer), **options)


async def test_a_redirect_carries_what_the_signer_can(files: Path) -> None:
    signer = Recording(*PRESENTED)
    answer = await call(site(files, signer, cache_control="public, max-age=5"), "/sub/π%.pdf")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (307, b"", "0")
    assert answer.headers["location"] == f"{URL}sub/%CF%80%25.pdf?signed"
    assert answer.headers["cache-control"] == "private, max-age=250"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not {"etag", "last-modified", *PRESENTED} & {*answer.headers}
    disposition = "attachment; filename=\"download.pdf\"; filename*=UTF-8''%CF%80%25.pdf"
    assert signer.asked == [
        ("sub/%CF%80%25.pdf", {"content-disposition": disposition, "content-type": "application/pdf"}, 600)
    ]


async def test_the_redirect_is_kept_for_less_than_the_signature_is_valid(files: Path) -> None:
    signer = signer_of("bunny", URL, secret=SECRET)
    for expires in (1, 2, 60, 600):
        answer = await call(
            Download(PathSource(files), redirect=EdgeRedirect(files, signer, expires=expires)), "/x.png"
        )
        kept = int(answer.headers["cache-control"].removeprefix("private, max-age="))
        assert kept <= expires / 2
    private = await call(site(files, signer, cache_control="private, no-store"), "/x.png")
    assert private.headers["cache-control"] == "private, no-store"


async def test_head_other_methods_and_missing_files_are_answered_here(files: Path) -> None:
    signer = Recording(*PRESENTED)
    endpoint = site(files, signer)
    head = await call(endpoint, "/a b.txt", method="HEAD")
    assert (head.status, head.headers["content-length"], "location" in head.headers) == (200, "7", False)
    assert (await call(endpoint, "/nothing.txt")).status == 404
    assert (await call(endpoint, "/../files/a b.txt")).status == 404
    assert (await call(endpoint, "/a b.txt", method="POST")).status == 405
    file = await PathSource(files).resolve("a b.txt")
    redirect = EdgeRedirect(files, signer)
    assert (await call(DownloadResponse(file, redirect=redirect, status_code=201))).status == 201
    assert signer.asked == []


@pytest.mark.parametrize(
    "carries, is_served_alike, shown, saved",
    [
        (ALL, False, ["x.png", "a b.txt"], ["x.html", "sub/π%.pdf", "x.png", "a b.txt", "x.zip"]),
        (PRESENTED, False, ["x.png", "a b.txt"], ["x.html", "sub/π%.pdf", "x.png", "a b.txt", "x.zip"]),
        (("content-type",), False, ["x.png", "a b.txt"], ["x.png", "a b.txt", "x.zip"]),
        ((), False, ["x.png", "a b.txt"], ["x.png", "a b.txt", "x.zip"]),
        ((), True, [*EVERY], [*EVERY]),
    ],
)
async def test_what_a_browser_might_run_is_sent_by_us_unless_the_edge_protects_it(
    files: Path, carries: tuple[str, ...], is_served_alike: bool, shown: list[str], saved: list[str]
) -> None:
    signer = Recording(*carries, is_served_alike=is_served_alike)
    for attachment, redirected in ((False, shown), (True, saved)):
        endpoint = site(files, signer, attachment=attachment)
        for name in EVERY:
            status = (await call(endpoint, f"/{name}")).status
            assert (status == 307) is (name in redirected), (name, attachment)


async def test_what_a_redirect_cannot_carry_is_told_at_the_start(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        EdgeRedirect(files, signer_of("bunny", URL, secret=SECRET))
        (record,) = caplog.records
        assert "bunny.net at https://edge.example.org/files/" in record.getMessage()
        assert "cannot carry Content-Disposition and Content-Type" in record.getMessage()
        assert SECRET not in record.getMessage()
        caplog.clear()
        for origin in ("s3", "service"):
            EdgeRedirect(files, signer_of("bunny", URL, secret=SECRET, origin=origin))
        EdgeRedirect(files, signer_of("nginx", URL, secret=SECRET))
        EdgeRedirect(files, signer_of("gcs", URL, key_id="GOOG1EXAMPLE", secret=SECRET))
        assert caplog.records == []
        EdgeRedirect(
            files, signer_of("nginx", URL, secret=SECRET, expression="$secure_link_expires$uri$arg_type$secret")
        )
        assert "cannot carry Content-Disposition:" in caplog.text


async def test_nothing_of_a_signature_is_logged(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    signer = signer_of("bunny", URL, secret=SECRET, origin="s3")
    with caplog.at_level(logging.DEBUG):
        answer = await call(site(files, signer), "/x.png")
    token = parse_qs(urlsplit(answer.headers["location"]).query)["token"][0]
    assert token not in caplog.text
    assert SECRET not in caplog.text


async def test_files_of_other_places_are_sent_by_us(files: Path, tmp_path: Path) -> None:
    (tmp_path / "files-private").mkdir()
    (tmp_path / "files-private" / "a.txt").write_bytes(b"private")
    (tmp_path / "other.txt").write_bytes(b"other")
    redirect = EdgeRedirect(files, Recording(*PRESENTED))
    elsewhere: list[Any] = [
        StorageFile(MemoryStorage({"a.txt": b"here"}), "a.txt"),
        await PathSource(tmp_path / "files-private").resolve("a.txt"),
        await PathSource(tmp_path).resolve("other.txt"),
    ]
    for file in elsewhere:
        assert (await call(DownloadResponse(file, redirect=redirect))).status == 200
    for place in (str(files), f"{files}/", f"{files}/../files", files):
        answer = await call(Download(PathSource(files), redirect=EdgeRedirect(place, Recording())), "/x.png")
        assert answer.status == 307


async def test_a_part_of_a_source_can_be_at_the_edge(files: Path) -> None:
    endpoint = Download(PathSource(files), redirect=EdgeRedirect(files / "sub", Recording(*PRESENTED)))
    assert (await call(endpoint, "/sub/π%.pdf")).headers["location"] == f"{URL}%CF%80%25.pdf?signed"
    assert (await call(endpoint, "/x.png")).status == 200


async def test_names_that_a_client_or_a_server_on_the_way_would_change_are_sent_by_us() -> None:
    storage = ObjectStorage("s3://bucket", access_key_id="a", secret_access_key="b")
    signer = Recording(*PRESENTED)
    redirect = EdgeRedirect(storage, signer)
    signed = {"./a": False, "a/./b": False, "a//b": False, "/a": False, "%2e/a": True, "...": True, "a?b#c": True}
    for name, is_signed in signed.items():
        file = await StorageSource(storage, names="exact").resolve(name)
        assert (await redirect.headers_for(file, {}) is not None) is is_signed, name
    assert [path for path, _, _ in signer.asked] == ["%252e/a", "...", "a%3Fb%23c"]


@pytest.mark.parametrize(
    "url, options",
    [
        ("gs://bucket/top", {"skip_signature": True}),
        ("az://box/top", {"account_name": "a", "account_key": "QUJD"}),
        ("s3://bucket/top", {"access_key_id": "a", "secret_access_key": "b"}),
    ],
)
async def test_the_objects_of_each_store_can_be_at_an_edge(url: str, options: dict[str, Any]) -> None:
    class Row:
        file = "sub/a b.bin"
        title = "Report.pdf"

    async def get(key: str) -> Row:
        return Row()

    storage = ObjectStorage(url, **options)
    other = ObjectStorage(url.replace("top", "other"), **options)
    source = ObjectSource(get, source=StorageSource(storage), basename_field="title")
    for file in (await StorageSource(storage).resolve("sub/a b.bin"), await source.resolve("1")):
        headers = await EdgeRedirect(storage, Recording()).headers_for(file, {"content-type": "image/png"})
        assert headers is not None
        assert headers["location"] == f"{URL}sub/a%20b.bin?signed"
        assert await EdgeRedirect(other, Recording()).headers_for(file, {"content-type": "image/png"}) is None


async def test_files_of_another_server_can_be_at_an_edge() -> None:
    source = RemoteSource("https://files.example.org/pub")
    redirect = EdgeRedirect("https://files.example.org/pub", Recording())
    headers = await redirect.headers_for(await source.resolve("a b/π.txt"), {"content-type": "text/plain"})
    assert headers is not None
    assert headers["location"] == f"{URL}a%20b/%CF%80.txt?signed"


async def test_a_coding_that_no_client_can_use_is_not_redirected_to_unless_it_is_replaced(files: Path) -> None:
    file = await PathSource(files).resolve("x.zip")
    described = {"content-encoding": "identity", "content-type": "application/zip"}
    assert await EdgeRedirect(files, Recording(*PRESENTED)).headers_for(file, described) is None
    signer = Recording(*ALL)
    assert await EdgeRedirect(files, signer).headers_for(file, described) is not None
    assert signer.asked[0][1]["content-encoding"] == "identity"


async def test_cookies_of_the_signer_and_of_the_application_are_separate_lines(files: Path) -> None:
    signer = Recording(*PRESENTED, cookies=("One=1; Path=/files", "Two=2; Path=/files"))
    redirect = EdgeRedirect(files, signer)
    lines: list[tuple[bytes, bytes]] = []

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        response = DownloadResponse(await PathSource(files).resolve("x.png"), redirect=redirect)
        response.set_cookie("seen", "1")

        async def seeing(message: Any) -> None:
            lines.extend(message.get("headers", ()))
            await send(message)

        await response(scope, receive, seeing)

    assert (await call(endpoint)).status == 307
    assert [value for name, value in lines if name == b"set-cookie"] == [
        b"One=1; Path=/files",
        b"Two=2; Path=/files",
        b"seen=1; Path=/; SameSite=lax",
    ]
    assert len([name for name, _ in lines if name == b"location"]) == 1


async def test_a_link_presents_the_file_at_the_edge(files: Path) -> None:
    async def allow(request: Any, key: str) -> Grant:
        return Grant(filename="Invoice.pdf", expires=None)

    signer = Recording(*PRESENTED)
    answer = await call(site(files, signer, access=allow), "/x.zip")
    assert answer.status == 307
    assert signer.asked[0][1]["content-disposition"] == 'attachment; filename="Invoice.pdf"'


async def test_an_expired_key_gives_a_503(files: Path) -> None:
    answer = await call(site(files, Closing(*PRESENTED)), "/x.png")
    assert (answer.status, "location" in answer.headers) == (503, False)


@pytest.mark.parametrize(
    "place, signer, expires, said",
    [
        ("files", Recording(), 600, "'files' is not a place of files"),
        ("ftp://files", Recording(), 600, "is not a place of files"),
        ("/files", "bunny", 600, "takes a signer, such as signer_of"),
        ("/files", Recording(), 0, "can be valid for 1 to 3600 seconds"),
        ("/files", Recording(), 3601, "can be valid for 1 to 3600 seconds"),
    ],
)
async def test_what_cannot_redirect_is_refused_at_the_start(place: str, signer: Any, expires: float, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        EdgeRedirect(place, signer, expires=expires)


async def test_one_request_asks_the_store_once() -> None:
    async with serving_store() as store:
        endpoint = Download(StorageSource(store.storage), redirect=EdgeRedirect(store.storage, Recording(*PRESENTED)))
        answer = await call(endpoint, "/a.txt")
        assert (answer.status, store.methods) == (307, ["HEAD"])


async def test_objects_of_a_real_store_are_found(s3: S3) -> None:
    s3.put("edge/a b.txt", b"a")
    storage = s3.storage("edge")
    endpoint = Download(StorageSource(storage), redirect=EdgeRedirect(storage, Recording(*PRESENTED)))
    assert (await call(endpoint, "/a b.txt")).headers["location"] == f"{URL}a%20b.txt?signed"
    assert (await call(endpoint, "/nothing.txt")).status == 404
    assert storage.url == f"s3://{BUCKET}/edge"


async def test_without_a_check_the_source_is_not_asked() -> None:
    async with serving_store() as store:
        redirect = EdgeRedirect(store.storage, Recording(*PRESENTED), checks=False)
        endpoint = Download(StorageSource(store.storage), redirect=redirect)
        answer = await call(endpoint, "/a b.pdf")
        assert (answer.status, answer.headers["location"]) == (307, f"{URL}a%20b.pdf?signed")
        assert (await call(endpoint, "/../a.pdf")).status == 404  # by its name alone
        assert store.methods == []


async def test_a_redirect_under_our_server_is_the_same_and_needs_no_task(files: Path) -> None:
    """With and without a check, for files that can and cannot be opened at once."""
    (files / "gone.txt").symlink_to("nothing")
    sites = {checks: EdgeRedirect(files, Recording(*PRESENTED), checks=checks) for checks in (True, False)}
    for checks, redirect in sites.items():
        async with live(Download(PathSource(files), redirect=redirect), http=DownloadProtocol) as port:
            for name, status in (("x.zip", 307), ("x.html", 307), ("gone.txt", 404 if checks else 307)):
                answer = await ask(port, f"/{name}")
                assert (answer.status, answer.complete) == (status, True), (name, checks)
                if status == 307:
                    assert answer.headers["location"] == f"{URL}{name}?signed"
                    assert answer.headers["cache-control"] == "private, max-age=250"
            assert (await ask(port, "/x.zip", method="HEAD")).status == 200
            assert (await ask(port, "/nothing.zip", headers={"Range": "bytes=0-1"})).status == (404 if checks else 307)
        signer = Closing(*PRESENTED)
        renewing = EdgeRedirect(files, signer, checks=checks)
        async with live(Download(PathSource(files), redirect=renewing), http=DownloadProtocol) as port:
            assert (await ask(port, "/x.zip")).status == 503
