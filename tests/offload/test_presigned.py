"""Redirects to signed URLs: what they carry, what they are not used for, and that a real S3 server takes them."""

import asyncio
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response

from downloadview_async import (
    ConfigurationError,
    Download,
    DownloadResponse,
    MemoryStorage,
    ObjectSource,
    ObjectStorage,
    OffloadMiddleware,
    PresignedRedirect,
    Rule,
    SourceUnavailable,
    StorageFile,
    StorageSource,
    XAccelRedirect,
)
from downloadview_async.testing import call
from tests.s3 import BUCKET, KEY_ID, S3, SECRET, Store, serving_store

pytestmark = pytest.mark.asyncio


def query_of(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


def app(store: Store, **options: Any) -> Download:
    presign = {name: options.pop(name) for name in ("expires", "public_endpoint") if name in options}
    storage = store.storage
    return Download(StorageSource(storage), redirect=PresignedRedirect(storage, **presign), **options)


async def test_a_redirect_carries_all_there_is_to_say() -> None:
    async with serving_store() as store:
        answer = await call(
            app(store, expires=120, public_endpoint="https://files.example.org"),
            "/a b/π.txt",
            headers={"Range": "bytes=0-1"},
        )
        assert (answer.status, answer.body, answer.headers["content-length"]) == (307, b"", "0")
        assert answer.headers["cache-control"] == "private, max-age=60"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not {"etag", "last-modified", "content-type", "content-disposition", "accept-ranges"} & set(
            answer.headers
        )
        location = answer.headers["location"]
        assert location.startswith(f"https://files.example.org/{BUCKET}/a%20b/%CF%80.txt?")
        query = query_of(location)
        assert query["response-content-type"] == "text/plain"
        assert (
            query["response-content-disposition"]
            == "attachment; filename=\"download.txt\"; filename*=UTF-8''%CF%80.txt"
        )
        assert query["X-Amz-Expires"] == "120"
        assert SECRET not in location
        assert store.methods == ["HEAD"]


async def test_head_is_answered_here() -> None:
    async with serving_store() as store:
        answer = await call(app(store), "/a.txt", method="HEAD")
        assert (answer.status, answer.headers["content-length"], answer.headers["etag"]) == (200, "10", '"one"')
        assert "location" not in answer.headers
        assert store.methods == ["HEAD"]


@pytest.mark.parametrize("status, ours", [(404, 404), (403, 404), (503, 503)])
async def test_what_is_missing_is_not_redirected_to(status: int, ours: int) -> None:
    async with serving_store(status=status) as store:
        answer = await call(app(store), "/a.txt")
        assert answer.status == ours
        assert "location" not in answer.headers
    assert (await call(app(store), "/../a.txt")).status == 404


@pytest.mark.parametrize(
    "said, kept, there",
    [
        (None, "private, max-age=300", None),
        ("public, max-age=86400", "private, max-age=300", "public, max-age=86400"),
        ("private, No-Store", "private, no-store", "private, No-Store"),
    ],
)
async def test_a_redirect_is_kept_for_less_than_the_url_is_good_for(
    said: str | None, kept: str, there: str | None
) -> None:
    async with serving_store() as store:
        answer = await call(app(store, cache_control=said), "/a.txt")
        assert answer.headers["cache-control"] == kept
        assert query_of(answer.headers["location"]).get("response-cache-control") == there


async def test_what_a_browser_might_run_is_sent_by_us() -> None:
    """The store sends no Content-Security-Policy."""
    async with serving_store(content_type="text/html") as store:
        shown = await call(app(store, attachment=False), "/a.html")
        assert (shown.status, shown.body) == (200, b"0123456789")
        assert shown.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert (await call(app(store), "/a.html")).status == 307
    async with serving_store(content_type="image/png") as store:
        image = await call(app(store, attachment=False), "/a.png")
        assert query_of(image.headers["location"])["response-content-disposition"].startswith("inline;")


async def test_other_files_methods_and_statuses_are_sent_by_us() -> None:
    async with serving_store() as store:
        redirect = PresignedRedirect(store.storage)
        elsewhere = StorageFile(MemoryStorage({"a.txt": b"here"}), "a.txt")
        assert (await call(DownloadResponse(elsewhere, redirect=redirect))).body == b"here"
        file = await StorageSource(store.storage).resolve("a.txt")
        assert (await call(DownloadResponse(file, redirect=redirect))).status == 307
        assert (await call(DownloadResponse(file, redirect=redirect, status_code=201))).status == 201
        assert (await call(DownloadResponse(file, redirect=redirect), method="POST")).status == 200
        for other in ("/other-bucket/a.txt", f"/{BUCKET}-private/a.txt", f"/{BUCKET}"):
            file.location = f"http://127.0.0.1:{store.port}{other}"
            assert (await call(DownloadResponse(file, redirect=redirect))).status == 200


async def test_an_object_of_the_application_is_redirected_under_its_own_name() -> None:
    class Row:
        file = "a/1.bin"
        title = "Report.pdf"
        mime_type = "application/pdf"

    async def get(key: str) -> Row:
        return Row()

    async with serving_store() as store:
        source = ObjectSource(
            get, source=StorageSource(store.storage), basename_field="title", mime_type_field="mime_type"
        )
        answer = await call(Download(source, redirect=PresignedRedirect(store.storage)), "/1")
        query = query_of(answer.headers["location"])
        assert query["response-content-disposition"] == 'attachment; filename="Report.pdf"'
        assert query["response-content-type"] == "application/pdf"


async def test_a_redirect_wins_over_a_proxy_and_a_route_can_do_without_one() -> None:
    async with serving_store() as store:
        backend = XAccelRedirect([Rule(f"http://127.0.0.1:{store.port}/{BUCKET}", "/_lake/")])
        assert (await call(OffloadMiddleware(app(store), backend), "/a.txt")).status == 307
        plain = Download(StorageSource(store.storage))
        proxied = await call(OffloadMiddleware(plain, backend), "/a.txt")
        assert proxied.headers["x-offload-target"] == f"/{BUCKET}/a.txt"
        streamed = Download(StorageSource(store.storage), offload=False)
        answer = await call(OffloadMiddleware(streamed, backend), "/a.txt")
        assert (answer.body, "x-accel-redirect" in answer.headers) == (b"0123456789", False)


@dataclass
class Row:
    file: str = "a.txt"
    title: str = "Report.pdf"


@pytest.mark.parametrize("pathsend", [False, True])
async def test_a_proxy_asks_the_store_by_a_signed_get(pathsend: bool) -> None:
    async def row(key: str) -> Row:
        return Row()

    async with serving_store() as store:
        storage = store.storage
        backend = XAccelRedirect([Rule(f"s3://{BUCKET}", "/_lake/")], storages=[storage])
        source = ObjectSource(row, source=StorageSource(storage), basename_field="title")
        site = OffloadMiddleware(Download(source), backend, pathsend=pathsend)
        answer = await call(site, "/1", headers={"Range": "bytes=0-1"})
        assert (answer.status, answer.body, store.methods) == (200, b"", ["HEAD"])
        assert answer.headers["x-accel-redirect"] == "/_lake/"
        assert answer.headers["content-disposition"] == 'attachment; filename="Report.pdf"'
        target = answer.headers["x-offload-target"]
        assert query_of(target)["X-Amz-Expires"] == "300"
        assert target.startswith(f"/{BUCKET}/")
        # that is good for a GET alone, and HEAD costs the service no more than a description
        head = await call(site, "/1", method="HEAD")
        assert (head.status, head.headers["content-length"], store.methods) == (200, "10", ["HEAD", "HEAD"])
        assert not {"x-accel-redirect", "x-offload-target"} & {*head.headers}
        # not every store knows If-Range: one that is not current is answered here
        for tag, offloaded in (('"one"', True), ('"two"', False), ('W/"one"', False)):
            answer = await call(site, "/1", headers={"Range": "bytes=0-1", "If-Range": tag})
            assert ("x-offload-target" in answer.headers) is offloaded
            assert answer.body == (b"" if offloaded else b"0123456789")


@pytest.mark.parametrize("fails, status", [(False, 200), (True, 503)])
async def test_a_proxy_gets_the_keys_of_a_provider(fails: bool, status: int) -> None:
    asked: list[bool] = []

    async def provider() -> dict[str, Any]:
        asked.append(True)
        if fails and len(asked) > 1:  # the first to ask is obstore, for its own HEAD
            raise RuntimeError("no role")
        expires_at = datetime.now(UTC) + timedelta(hours=1)
        return {"access_key_id": "a", "secret_access_key": "b", "token": "t", "expires_at": expires_at}

    async with serving_store() as store:
        endpoint = f"http://127.0.0.1:{store.port}"
        storage = ObjectStorage(f"s3://{BUCKET}", endpoint=endpoint, credential_provider=provider)
        backend = XAccelRedirect([Rule(f"{endpoint}/{BUCKET}/", "/_lake/")], storages=[storage])
        answer = await call(OffloadMiddleware(Download(StorageSource(storage)), backend), "/a.txt")
        assert answer.status == status
        assert ("x-accel-redirect" in answer.headers) is not fails
        if not fails:
            assert query_of(answer.headers["x-offload-target"])["X-Amz-Security-Token"] == "t"


async def test_cookies_of_the_application_are_on_the_redirect() -> None:
    async with serving_store() as store:
        storage = store.storage

        async def endpoint(scope: Any, receive: Any, send: Any) -> None:
            file = await StorageSource(storage).resolve("a.txt")
            response: Response = DownloadResponse(file, redirect=PresignedRedirect(storage), headers={"X-Own": "1"})
            response.set_cookie("seen", "1")
            await response(Request(scope).scope, receive, send)

        answer = await call(endpoint)
        assert answer.status == 307
        assert answer.headers["x-own"] == "1"
        assert answer.headers["set-cookie"].startswith("seen=1")


async def test_virtual_hosts_and_session_tokens() -> None:
    storage = ObjectStorage(
        "s3://bucket/p",
        access_key_id="a",
        secret_access_key="b",
        session_token="session/token",
        region="eu-west-1",
        virtual_hosted_style_request=True,
    )
    file = await StorageSource(storage).resolve("a.txt")
    found = await PresignedRedirect(storage).url_for(file, {})
    assert found is not None
    assert found[0].startswith("https://bucket.s3.eu-west-1.amazonaws.com/p/a.txt?")
    assert query_of(found[0])["X-Amz-Security-Token"] == "session/token"
    public = await PresignedRedirect(storage, public_endpoint="https://bucket.example.org/").url_for(file, {})
    assert public is not None
    assert public[0].startswith("https://bucket.example.org/p/a.txt?")


async def test_a_url_that_clients_would_change_is_not_signed() -> None:
    """HTTP clients remove the segments `.` and `..`, and the signature would be another URL's."""
    storage = ObjectStorage("s3://bucket", access_key_id="a", secret_access_key="b")
    redirect = PresignedRedirect(storage)
    signed = {"./a": False, "a/./b": False, "a/.": False, "a//b": True, "%2e/a": True, "...": True}
    for name, is_signed in signed.items():
        file = await StorageSource(storage, names="exact").resolve(name)
        assert (await redirect.url_for(file, {}) is not None) is is_signed, name


async def test_keys_of_a_provider_are_kept_until_they_expire_and_urls_do_not_outlive_them() -> None:
    calls: list[str] = []
    life = timedelta(hours=1)

    async def provider() -> dict[str, Any]:
        calls.append("asked")
        return {
            "access_key_id": f"key{len(calls)}",
            "secret_access_key": "b",
            "token": "t",
            "expires_at": datetime.now(UTC) + life,
        }

    storage = ObjectStorage("s3://bucket", credential_provider=provider)
    redirect = PresignedRedirect(storage, expires=600)
    file = await StorageSource(storage).resolve("a.txt")
    for _ in range(3):
        found = await redirect.url_for(file, {})
        assert found is not None
        assert (query_of(found[0])["X-Amz-Credential"].split("/")[0], found[1]) == ("key1", 600)
    life = timedelta(seconds=30)
    short = PresignedRedirect(storage, expires=600)
    answer = await short.headers_for(file, {})
    assert answer is not None
    assert int(query_of(answer["location"])["X-Amz-Expires"]) <= 30
    assert int(re.findall(r"\d+", answer["cache-control"])[0]) <= 15
    life = timedelta(seconds=-1)
    with pytest.raises(SourceUnavailable):
        await PresignedRedirect(storage).url_for(file, {})


async def test_a_provider_is_asked_once_by_all_who_wait() -> None:
    calls = 0
    let_go = threading.Event()

    def provider() -> dict[str, Any]:
        nonlocal calls
        calls += 1
        let_go.wait(10)
        return {"access_key_id": "a", "secret_access_key": "b", "expires_at": datetime.now(UTC) + timedelta(seconds=60)}

    storage = ObjectStorage("s3://bucket", credential_provider=provider)
    redirect = PresignedRedirect(storage, expires=3600)
    file = await StorageSource(storage).resolve("a.txt")
    waiting = [asyncio.create_task(redirect.url_for(file, {})) for _ in range(30)]
    while not calls:
        await asyncio.sleep(0)
    let_go.set()
    assert None not in await asyncio.gather(*waiting)
    assert await redirect.url_for(file, {}) is not None  # half of its life is still to come
    assert calls == 1


async def test_a_key_that_is_still_good_outlives_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [{"access_key_id": "a", "secret_access_key": "b"}]

    def provider() -> Any:
        return answers.pop() | {"expires_at": datetime.now(UTC) + timedelta(seconds=100)}

    storage = ObjectStorage("s3://bucket", credential_provider=provider)
    redirect = PresignedRedirect(storage, expires=60)
    file = await StorageSource(storage).resolve("a.txt")
    now = time.time()
    assert await redirect.url_for(file, {}) is not None
    monkeypatch.setattr(time, "time", lambda: now + 70)
    found = await redirect.url_for(file, {})
    assert found is not None
    assert 28 <= found[1] <= 30
    monkeypatch.setattr(time, "time", lambda: now + 101)
    with pytest.raises(SourceUnavailable, match="provider failed"):
        await redirect.url_for(file, {})


async def test_a_provider_that_fails_is_a_503() -> None:
    def provider() -> dict[str, Any]:
        raise RuntimeError("no role")

    storage = ObjectStorage("s3://bucket", credential_provider=provider)
    file = await StorageSource(storage).resolve("a.txt")
    with pytest.raises(SourceUnavailable, match="no role"):
        await PresignedRedirect(storage).url_for(file, {})


@pytest.mark.parametrize(
    "storage, options, said",
    [
        (("memory:///", {}), {}, "use a storage at s3"),
        (("gs://bucket", {"skip_signature": True}), {}, "HMAC"),
        (("az://box", {"account_name": "a", "account_key": "QUJD"}), {}, "name and type"),
        (("s3://bucket", {"access_key_id": "a"}), {}, "(?i)secret_?access_?key"),
        (("s3://bucket", {}), {}, "access_key_id"),
        (("s3://bucket", {"access_key_id": "a", "secret_access_key": "b"}), {"expires": 0}, "604800"),
        (("s3://bucket", {"access_key_id": "a", "secret_access_key": "b"}), {"expires": 604801}, "604800"),
        *[
            (
                ("s3://bucket", {"access_key_id": "a", "secret_access_key": "b"}),
                {"public_endpoint": endpoint},
                "not an endpoint",
            )
            for endpoint in ("files.example.org", "ftp://x", "https://", "https://u:p@x", "https://x?y", "https://x:y")
        ],
    ],
)
async def test_what_cannot_be_signed_is_said_at_the_start(
    storage: tuple[str, dict[str, Any]], options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(ConfigurationError, match=said):
        PresignedRedirect(ObjectStorage(storage[0], **storage[1]), **options)


async def test_keys_of_the_environment_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "envkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    storage = ObjectStorage("s3://bucket")
    found = await PresignedRedirect(storage).url_for(await StorageSource(storage).resolve("x"), {})
    assert found is not None
    assert query_of(found[0])["X-Amz-Credential"].startswith("envkey/")


# ---- the real server takes them

NAMES = ["plain.txt", "a b.txt", "50%25.txt", "a%20b.txt", "q?.txt", "h#.txt", "plus+.txt", "π.txt", "*'(x)!&=;.txt"]


@pytest.mark.parametrize("name", NAMES)
async def test_the_real_server_sends_what_was_signed(s3: S3, name: str) -> None:
    s3.put(f"signed files/{name}", name.encode(), content_type="application/x-stored")
    storage = s3.storage("signed files")
    file = await StorageSource(storage).resolve(name)
    response = DownloadResponse(
        file,
        filename="Rechnung für π.pdf",
        content_type="application/pdf",
        headers={"Cache-Control": "private, no-store"},
        redirect=PresignedRedirect(storage),
    )
    redirected = await call(response)
    assert redirected.status == 307
    async with httpx2.AsyncClient() as client:
        answer = await client.get(redirected.headers["location"])
        part = await client.get(redirected.headers["location"], headers={"Range": "bytes=1-2"})
    assert (answer.status_code, answer.content) == (200, name.encode())
    assert answer.headers["content-type"] == "application/pdf"
    assert answer.headers["cache-control"] == "private, no-store"
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"Rechnung fur.pdf\"; filename*=UTF-8''Rechnung%20f%C3%BCr%20%CF%80.pdf"
    )
    assert (part.status_code, part.content) == (206, name.encode()[1:3])


async def test_the_real_server_refuses_what_was_changed_or_is_over(s3: S3) -> None:
    s3.put("signed/a.txt", b"a")
    s3.put("signed/b.txt", b"b")
    storage = s3.storage("signed")
    found = await PresignedRedirect(storage).url_for(
        await StorageSource(storage).resolve("a.txt"), {"content-type": "text/plain"}
    )
    assert found is not None
    url, _ = found
    async with httpx2.AsyncClient() as client:
        assert (await client.get(url)).status_code == 200
        for changed in (
            url.replace("a.txt", "b.txt"),
            url.replace("text%2Fplain", "text%2Fhtml"),
            url.replace("X-Amz-Expires=600", "X-Amz-Expires=601"),
            f"{url[:-1]}{'0' if url[-1] != '0' else '1'}",
            url.replace(KEY_ID, "SOMEBODYELSE"),
        ):
            assert changed != url
            assert (await client.get(changed)).status_code == 403
        assert (await client.put(url, content=b"x")).status_code in (403, 405)


async def test_the_real_server_by_another_name(s3: S3) -> None:
    """A public endpoint is what is signed, since it is what the client names in Host."""
    s3.put("signed/a.txt", b"a")
    storage = s3.storage("signed")
    port = int(s3.url.rpartition(":")[2])
    redirect = PresignedRedirect(storage, public_endpoint="http://files.example.org")
    found = await redirect.url_for(await StorageSource(storage).resolve("a.txt"), {})
    assert found is not None
    path = found[0].removeprefix("http://files.example.org")
    async with httpx2.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{port}{path}", headers={"Host": "files.example.org"})
        refused = await client.get(f"http://127.0.0.1:{port}{path}")
    assert (answer.status_code, answer.content, refused.status_code) == (200, b"a", 403)


async def test_an_expired_url_is_refused_by_the_real_server(s3: S3) -> None:
    from downloadview_async.http.sigv4 import Credentials, presigned_url

    s3.put("signed/a.txt", b"a")
    url = presigned_url(
        f"{s3.url}/{BUCKET}/signed/a.txt",
        Credentials(KEY_ID, SECRET),
        region="us-east-1",
        seconds=60,
        now=time.time() - 61,
    )
    async with httpx2.AsyncClient() as client:
        assert (await client.get(url)).status_code == 403
