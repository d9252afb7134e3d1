"""Downloads that not everyone may have: links and hooks decide before any file is opened, whatever is requested."""

import asyncio
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message

import downloadview_async as dv
from downloadview_async.testing import call
from tests.live import Answer, ask, live, make_old

pytestmark = pytest.mark.asyncio
SIGNER = dv.URLSigner({"2026a": bytes(range(32))})
CONTENT = b"0123456789" * 100
NOT_SENT = {"date", "server"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(CONTENT)
    return tmp_path


class Counted:
    """A source that counts what it is asked for."""

    def __init__(self, root: Path) -> None:
        self.names: list[str] = []
        self._source = dv.PathSource(root)

    async def resolve(self, name: str) -> dv.AsyncFile:
        self.names.append(name)
        return await self._source.resolve(name)


def application(source: dv.Source, access: Any, **options: Any) -> ASGIApp:
    download = dv.Download(source, access=access, **options)
    return Starlette(routes=[Route("/files/{path:path}", download), Mount("/mounted", download)])


async def never() -> Message:
    return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


def without(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in NOT_SENT}


@pytest.mark.parametrize("prefix", ["/files/", "/mounted/"])
async def test_a_link_grants_the_file_and_how_it_is_shown(root: Path, prefix: str) -> None:
    link = SIGNER.sign(
        f"{prefix}a.txt", filename="Bericht über Q3.pdf", attachment=False, content_type="application/pdf"
    )
    async with live(application(dv.PathSource(root), dv.SignedLinks(SIGNER), cache_control="max-age=60")) as port:
        whole = await ask(port, link)
        part = await ask(port, link, headers={"Range": "bytes=0-1"})
        head = await ask(port, link, method="HEAD")
        again = await ask(port, link, headers={"If-None-Match": whole.headers["etag"]})
    assert (whole.status, whole.body) == (200, CONTENT)
    assert (part.status, part.body) == (206, b"01")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "1000")
    assert again.status == 304
    for answer in (whole, part, head):
        assert answer.headers["content-type"] == "application/pdf"
        assert answer.headers["content-disposition"].startswith("inline; filename=")
        assert "Bericht%20%C3%BCber%20Q3.pdf" in answer.headers["content-disposition"]
    assert {answer.headers["cache-control"] for answer in (whole, part, head, again)} == {"private, no-store"}


async def test_a_link_that_may_be_shared_is_kept_until_it_expires(root: Path) -> None:
    link = SIGNER.sign("/files/a.txt", expires_in=timedelta(seconds=100), shareable=True)
    async with live(application(dv.PathSource(root), dv.SignedLinks(SIGNER))) as port:
        answer = await ask(port, link)
    public, _, age = answer.headers["cache-control"].partition(", max-age=")
    assert public == "public"
    assert 90 <= int(age) <= 100


async def test_what_is_not_a_link_is_refused_before_the_source_is_asked(root: Path) -> None:
    source = Counted(root)
    link = SIGNER.sign("/files/a.txt")
    soon_over = SIGNER.sign("/files/a.txt", expires_in=timedelta(seconds=1))
    async with live(application(source, dv.SignedLinks(SIGNER))) as port:
        for target in ("/files/a.txt", link.replace("a.txt", "b.txt"), link + "&x=1", link[:-1], "/files/no.txt"):
            for method in ("GET", "HEAD"):
                answer = await ask(port, target, method=method)
                assert (answer.status, answer.headers["cache-control"]) == (403, "private, no-store")
        deadline = time.monotonic() + 20
        while (answer := await ask(port, soon_over)).status == 200:
            assert time.monotonic() < deadline
        assert (answer.status, answer.body) == (410, b"Gone")
        names = [name for name in source.names if name != "a.txt"]
        assert (await ask(port, link, method="POST")).status == 405
        assert (await ask(port, link, method="OPTIONS")).status == 204
    assert names == []


async def test_a_refusal_is_the_404_of_a_missing_file(root: Path) -> None:
    async def may_read(request: Request, name: str) -> bool:
        return request.headers.get("x-user") == "ada"

    source = Counted(root)
    async with live(application(source, may_read)) as port:
        for method in ("GET", "HEAD"):
            refused = await ask(port, "/files/a.txt", method=method)
            missing = await ask(port, "/files/no.txt", headers={"X-User": "ada"}, method=method)
            assert (refused.status, refused.body, without(refused)) == (missing.status, missing.body, without(missing))
            assert refused.status == 404
        assert source.names == ["no.txt", "no.txt"]
        allowed = await ask(port, "/files/a.txt", headers={"X-User": "ada"})
    assert (allowed.status, allowed.body, allowed.headers["cache-control"]) == (200, CONTENT, "private")


@pytest.mark.parametrize(
    "verdict, status",
    [
        (True, 200),
        (False, 404),
        (None, 404),
        (dv.Grant(filename="other.txt"), 200),
        (dv.AccessDenied("not today"), 404),
        (dv.LinkExpired("over"), 410),
        (ValueError("a bug"), 503),
        (asyncio.CancelledError("the task that it waits for was cancelled"), 503),
        (1, 503),
        ("yes", 503),
        (object(), 503),
    ],
)
async def test_what_a_hook_says(root: Path, verdict: Any, status: int) -> None:
    async def hook(request: Request, name: str) -> Any:
        if isinstance(verdict, BaseException):
            raise verdict
        return verdict

    async with live(application(dv.PathSource(root), hook)) as port:
        answer = await ask(port, "/files/a.txt")
    assert answer.status == status
    if isinstance(verdict, dv.Grant):
        assert 'filename="other.txt"' in answer.headers["content-disposition"]
    if status == 503:
        assert (answer.body, answer.headers["retry-after"]) == (b"Service Unavailable", "5")


async def test_a_request_that_is_cancelled_in_its_hook_ends(root: Path) -> None:
    is_deciding = asyncio.Event()

    async def hook(request: Request, name: str) -> bool:
        is_deciding.set()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    request = asyncio.create_task(call(application(dv.PathSource(root), hook), "/files/a.txt"))
    await is_deciding.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


@pytest.mark.parametrize("wrong", [{"content_type": "text/html\r\nX: y"}, {"filename": 3}])
async def test_a_hook_whose_grant_cannot_be_sent_has_failed(root: Path, wrong: dict[str, Any]) -> None:
    async def hook(request: Request, name: str) -> dv.Grant:
        return dv.Grant(**wrong)

    async with live(application(dv.PathSource(root), hook)) as port:
        assert [(await ask(port, f"/files/{name}")).status for name in ("a.txt", "missing.txt")] == [503, 503]


async def test_a_missing_await_allows_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def decide() -> bool:
        return False

    async def hook(request: Request, name: str) -> Any:
        coroutine = decide()
        coroutine.close()  # what is never awaited warns
        return coroutine

    async with live(application(dv.PathSource(root), hook)) as port:
        with caplog.at_level(logging.WARNING, "downloadview_async"):
            assert (await ask(port, "/files/a.txt")).status == 503
    assert "is an await missing?" in caplog.text


async def test_one_of_several_suffices(root: Path) -> None:
    async def is_ada(request: Request, name: str) -> bool:
        return request.headers.get("x-user") == "ada"

    link = SIGNER.sign("/files/a.txt")
    async with live(application(dv.PathSource(root), [dv.SignedLinks(SIGNER), is_ada])) as port:
        assert (await ask(port, link)).status == 200
        assert (await ask(port, "/files/a.txt", headers={"X-User": "ada"})).status == 200
        assert (await ask(port, link + "x", headers={"X-User": "ada"})).status == 200
        assert (await ask(port, link + "x")).status == 403
        assert (await ask(port, "/files/a.txt")).status == 404


@pytest.mark.parametrize("kind", ["link", "link for a network", "hook"])
async def test_a_decision_is_a_few_calls(root: Path, kind: str) -> None:
    async def hook(request: Request, name: str) -> bool:
        return True

    async def calls(download: dv.Download, query: str) -> int:
        async def send(message: Message) -> None:
            pass

        for _ in range(3):  # the first requests open the file, and verify the link
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/files/a.txt",
                "raw_path": b"/files/a.txt",
                "query_string": query.encode(),
                "path_params": {"path": "a.txt"},
                "headers": [],
                "client": ("192.0.2.1", 1),
            }
            number = 0

            def count(frame: Any, event: str, argument: Any) -> None:
                nonlocal number
                number += event in ("call", "c_call")

            sys.setprofile(count)
            try:
                await download(scope, never, send)
            finally:
                sys.setprofile(None)
        return number

    access: Any = hook if kind == "hook" else dv.SignedLinks(SIGNER)
    link = SIGNER.sign("/files/a.txt", client="192.0.2.0/24" if kind == "link for a network" else None)
    make_old(root)
    source = dv.PathSource(root)
    query = link.partition("?")[2]
    public = await calls(dv.Download(source, cache_control="private"), query)
    assert await calls(dv.Download(source, access=access), query) - public <= 50


async def test_the_one_refusal_of_a_list(root: Path) -> None:
    challenge = 'Basic realm="files", charset="UTF-8"'

    def refuses(error: dv.FileError | None) -> Any:
        async def hook(request: Request, name: str) -> bool:
            if error is not None:
                raise error
            return False

        return hook

    log_in = refuses(dv.AuthenticationRequired("who is it", challenge=challenge))
    link, busy, nobody = refuses(dv.LinkInvalid("no link")), refuses(dv.SourceUnavailable("busy")), refuses(None)
    denied = refuses(dv.AccessDenied("not for bob"))
    for access, without_query, with_query in [
        ([log_in], 401, 401),
        ([log_in, nobody], 401, 401),
        ([link, log_in], 401, 403),
        ([log_in, link], 401, 403),
        ([link, nobody], 404, 403),
        ([link, denied], 404, 403),
        ([denied, log_in], 401, 401),
        ([link, busy], 503, 503),
        ([busy, log_in], 503, 503),
        ([log_in, refuses(dv.LinkExpired("over"))], 401, 410),
    ]:
        async with live(application(dv.PathSource(root), access)) as port:
            for target, status in (("/files/a.txt", without_query), ("/files/a.txt?k=1", with_query)):
                answer = await ask(port, target)
                assert (answer.status, answer.headers.get("www-authenticate")) == (
                    status,
                    challenge if status == 401 else None,
                )


@pytest.mark.parametrize(
    "query, status",
    [
        ("view", 401),
        ("archive=zip&name=a.txt&name=b.txt", 401),
        ("sort=size&order=desc&q=a&deep=1&after=f,1,a", 401),
        ("format=json&", 401),
        ("checksum=sha256", 401),
        ("view&k=1", 403),
        ("e=1&sort=size", 403),
        ("views", 403),
    ],
)
async def test_a_query_that_only_chooses_a_page_is_not_taken_for_a_link(root: Path, query: str, status: int) -> None:
    """A client that has not sent its password yet, such as wget or a browser with a bookmark, needs the challenge."""

    async def log_in(request: Request, name: str) -> bool:
        raise dv.AuthenticationRequired("who is it", challenge='Basic realm="files"')

    app = dv.Download(dv.PathSource(root), access=[dv.SignedLinks(SIGNER), log_in], listing=True, archive=True)
    for path in ("/", "/files/"):
        answer = await call(app, path, query=query)
        assert (answer.status, "www-authenticate" in answer.headers) == (status, status == 401)


async def test_only_what_is_allowed_is_offloaded(root: Path) -> None:
    source = dv.PathSource(root)
    app = dv.OffloadMiddleware(
        application(source, dv.SignedLinks(SIGNER), offload=True), dv.XAccelRedirect([dv.Rule(f"{root}/", "/_files/")])
    )
    async with live(app) as port:
        allowed = await ask(port, SIGNER.sign("/files/a.txt", filename="b.txt"))
        refused = await ask(port, "/files/a.txt")
    assert allowed.headers["x-accel-redirect"] == "/_files/a.txt"
    assert 'filename="b.txt"' in allowed.headers["content-disposition"]
    assert allowed.headers["cache-control"] == "private, no-store"
    assert (refused.status, "x-accel-redirect" in refused.headers) == (403, False)


async def test_a_dependency_of_fastapi(root: Path) -> None:
    app = FastAPI(exception_handlers={dv.FileError: dv.download_error})
    source = dv.PathSource(root)

    @app.get("/files/{name}")
    async def download(name: str, grant: Annotated[dv.Grant, Depends(dv.signed_link(SIGNER))]) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name), filename=grant.filename)

    async with live(app) as port:
        answer = await ask(port, SIGNER.sign("/files/a.txt", filename="b.txt"))
        assert (answer.status, answer.body) == (200, CONTENT)
        assert 'filename="b.txt"' in answer.headers["content-disposition"]
        assert (await ask(port, "/files/a.txt")).status == 403


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_answer_of_an_endpoint_is_as_its_link_says(root: Path, method: str) -> None:
    app = FastAPI(exception_handlers={dv.FileError: dv.download_error})
    source = dv.PathSource(root)

    @app.api_route("/files/{name}", methods=["GET", "HEAD"], dependencies=[Depends(dv.signed_link(SIGNER))])
    async def download(name: str) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name), filename="c.txt", headers={"Cache-Control": "public"})

    links = [
        SIGNER.sign("/files/a.txt"),
        SIGNER.sign("/files/a.txt", filename="b.txt", attachment=False, content_type="application/pdf", shareable=True),
    ]
    async with live(app) as port:
        plain, shared = [(await ask(port, link, method=method)).headers for link in links]
    assert plain["cache-control"] == "private, no-store"
    assert plain["content-disposition"] == 'attachment; filename="c.txt"'
    assert shared["cache-control"].startswith("public, max-age=")
    assert shared["content-disposition"] == 'inline; filename="b.txt"'
    assert shared["content-type"] == "application/pdf"


@pytest.mark.parametrize("kind", ["path", "cached", "virtual", "object"])
@pytest.mark.parametrize(
    "path",
    [
        "secret/x",
        "/secret/x",
        "./secret/x",
        "secret//x",
        "//secret/x",
        "/./secret/x",
        "secret/./x",
        "secret/x?checksum=sha256",
        "/secret/x?view",
        "/secret/x?checksum=sha256",
        "secret?archive=zip",
        "/secret?archive=zip",
        "secret/?archive=zip",
        "./secret//?archive=zip",
        "secret/.?archive=zip",
        "secret",
        "/secret",
        "secret/",
        "/secret/",
        "./secret//",
        "secret/./",
    ],
)
async def test_access_decides_about_each_spelling_of_a_name(tmp_path: Path, kind: str, path: str) -> None:
    root = tmp_path / "root"
    (root / "secret").mkdir(parents=True)
    (root / "secret/x").write_bytes(b"secret")
    (root / "x").write_bytes(b"x")
    files = dv.PathSource(root)

    async def make(name: str) -> dv.AsyncFile:
        if name.startswith("/"):
            raise dv.FileMissing(name)
        return await files.resolve(name)

    async def get(key: str) -> Any:
        return SimpleNamespace(file=key) if (root / key).is_file() and not key.startswith((".", "/")) else None

    async def allow(request: Request, name: str) -> bool:
        return not name.startswith("secret/")

    cache = dv.Cache(tmp_path / "cache")
    source: Any = {
        "path": files,
        "cached": dv.CachedSource(dv.StorageSource(dv.DirectoryStorage(root)), cache, name="x"),
        "virtual": dv.VirtualSource(make),
        "object": dv.ObjectSource(get, source=files),
    }[kind]
    options = {} if kind in ("virtual", "object") else {"listing": True, "archive": True}
    async with live(application(source, allow, digests=dv.Digests(source), **options)) as port:
        missing = await ask(port, "/files/missing")
        for prefix in ("/files/", "/mounted/"):
            answer = await ask(port, prefix + path)
            assert (answer.status, answer.body) == (404, missing.body)
        assert (await ask(port, "/files//x")).body == b"x"
    await cache.aclose()


@pytest.mark.parametrize("access", [[], ["signed"], "signed", 3])
async def test_an_access_that_is_refused(root: Path, access: Any) -> None:
    with pytest.raises(dv.ConfigurationError, match="give an async function"):
        dv.Download(dv.PathSource(root), access=access)


async def test_signed_links_take_a_signer() -> None:
    with pytest.raises(dv.ConfigurationError, match="takes a URLSigner"):
        dv.SignedLinks({"2026a": b"x"})  # type: ignore[arg-type]
