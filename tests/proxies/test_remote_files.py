"""Files of other servers, fetched by nginx and Caddy: of a real S3 server, and of one that keeps what it hears."""

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.http.fields import OFFLOAD_HEADERS, OFFLOAD_TARGET
from downloadview_async.http.sigv4 import Credentials, presigned_url
from downloadview_async.sources.names import MAX_LENGTH
from tests.live import Answer, ask, ask_raw, live, resumes_only_what_was_begun
from tests.proxies.conftest import DRESS, HOSTILE_NAMES, content_of, make_checkout
from tests.proxies.servers import KINDS, Kind, proxy, readable_directory
from tests.proxies.test_long_names import long_name, write
from tests.s3 import BUCKET, KEY_ID, REGION, S3, SECRET
from tests.servers import free_port, wait_for_text

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "plain.txt"
CONTENT = content_of(NAME)
SIZE = len(CONTENT)
ROUTES = ["lake", "mirror"]
SECRETS = {"Cookie": "session=1", "Authorization": "Basic eA==", "X-Api-Key": "k", "Referer": "http://test/?token=1"}
NOISE = {
    "Set-Cookie": "upstream=1",
    "X-Frame-Options": "DENY",
    "Content-Language": "fr",
    "Vary": "Cookie",
    "Server": "the origin",
    "Alt-Svc": 'h2="evil:443"',
    "Strict-Transport-Security": "max-age=9",
    "X-Amz-Request-Id": "1",
    "X-Amz-Id-2": "2",
    "X-Amz-Storage-Class": "COLD",
    "X-Amz-Version-Id": "3",
    "Link": "</x>; rel=preload",
    "Access-Control-Allow-Origin": "*",
    "X-Accel-Redirect": "/_files/page.html",
    "X-Accel-Limit-Rate": "1",
    "X-Offload-Target": "/pub/page.html",
    "X-Reproxy-URL": "/_files/page.html",
    "X-Sendfile": "/etc/passwd",
}
"""What another server may say, and what is for nobody."""
PLAIN = {"accept-ranges", "connection", "content-length", "content-range", "date", "server", "via"}
"""What an answer may have beside what the service says of it."""
OF_THE_PROXY = {"host", "connection", "accept-encoding", "user-agent", "x-nothing"}
ELSEWHERE = free_port()


@dataclass
class Origin:
    """Another server: the files of a directory below /pub/, and below /pub/fails/STATUS/ those that only HEAD gets.

    It says more than it should, and keeps the requests: their lines, and their headers.
    """

    files: Path
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        target = scope["raw_path"].decode("latin-1") + ("?" if scope["query_string"] else "")
        self.requests.append((f"{scope['method']} {target}{scope['query_string'].decode()}", headers))

        async def noisily(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in NOISE.items()]
            await send(message)

        app: ASGIApp = Starlette(
            routes=[
                Route("/pub/fails/{status:int}/{path:path}", self._failing),
                Route("/pub/cut/{path:path}", self._cut),
                *(
                    Route(f"{prefix}/pub/{{path:path}}", dv.Download(dv.PathSource(self.files), cache_control="public"))
                    for prefix in ("", f"/{BUCKET}")
                ),
            ]
        )
        await app(scope, receive, noisily)

    async def _failing(self, request: Any) -> Response:
        status = request.path_params["status"]
        if request.method == "HEAD":
            return Response(headers={"Content-Length": "7"})
        headers = {"Location": f"http://127.0.0.1:{ELSEWHERE}/x", "WWW-Authenticate": "Basic"}
        return Response("<Error>the secret</Error>", status, headers, "application/xml")

    async def _cut(self, request: Any) -> Response:
        async def half() -> AsyncIterator[bytes]:
            if request.method == "GET":
                yield CONTENT[: SIZE // 2]
                raise OSError("the disk is gone")

        return StreamingResponse(half(), headers={"Content-Length": str(SIZE)})


class _Saying:
    """A backend that has the last word about what the proxy asks for."""

    def __init__(self, backend: dv.OffloadBackend, target: Callable[[str], str]) -> None:
        self._backend = backend
        self._target = target

    def headers_for(self, file: dv.AsyncFile) -> Mapping[str, str] | None:
        return self._backend.headers_for(file)

    async def signed(self, file: dv.AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        return {**headers, OFFLOAD_TARGET: self._target(file.location or "")}


@dataclass(frozen=True)
class Remote:
    """A site whose files are elsewhere: `port` is the proxy's, `service` is the application's own."""

    kind: Kind
    port: int
    service: int
    origin: Origin
    origin_port: int
    log: Path
    """What the proxy logs."""


async def _row(key: str) -> Any:
    @dataclass
    class Row:
        file: str = key
        title: str = "Ein Bericht.html"
        media_type: str = "text/html"

    return Row()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["nginx", "caddy"])
async def remote(request: pytest.FixtureRequest, s3: S3) -> AsyncIterator[Remote]:
    """The same behind each proxy that can fetch."""
    kind = KINDS[request.param]
    for name in [*HOSTILE_NAMES, "page.html"]:
        attributes = {"content_type": "text/html"} if name == "page.html" else {}
        said = {"cache_control": "public, max-age=9999", "content_disposition": "inline; filename=store.html"}
        s3.put(f"files/{name}", content_of(name), **said, **attributes)
    async with AsyncExitStack() as stack:
        checkout = make_checkout(stack.enter_context(readable_directory()))
        origin = Origin(checkout / "app" / "files")
        origin_port = await stack.enter_async_context(live(origin))
        lake, other = s3.storage("files"), s3.storage("pub", endpoint=f"http://127.0.0.1:{origin_port}")
        store, spied = dv.StorageSource(lake), dv.StorageSource(other)
        mirror = dv.RemoteSource(f"http://127.0.0.1:{origin_port}/pub/", allow_hosts=["127.0.0.1"])
        nowhere = f"http://127.0.0.1:{free_port()}/"
        stack.push_async_callback(mirror.aclose)
        rules = [
            dv.Rule(f"s3://{BUCKET}/files", "/_lake/"),
            dv.Rule(f"http://127.0.0.1:{origin_port}", "/_mirror/"),
            dv.Rule(nowhere, "/_down/"),
        ]
        backend = dv.XAccelRedirect(rules, storages=[lake, other])

        def download(source: dv.Source, **options: Any) -> dv.Download:
            return dv.Download(source, **({"cache_control": "private, max-age=60"} | options))

        def saying(target: Callable[[str], str], source: dv.Source) -> Mount:
            return Mount("/", dv.OffloadMiddleware(download(source), _Saying(backend, target)))

        def signed(url: str, age: float) -> str:
            key = Credentials(KEY_ID, SECRET)
            return presigned_url(url, key, region=REGION, seconds=60, now=time.time() - age)[len(s3.url) :]

        def replaced(url: str) -> str:
            s3.put("files/replaced.txt", b"another version")
            return signed(url, 0)

        documents = dv.ObjectSource(
            _row, source=store, file_field="file", basename_field="title", mime_type_field="media_type"
        )
        routes: list[Any] = [
            Route("/lake/{path:path}", download(store)),
            Route("/mirror/{path:path}", download(mirror)),
            Route("/spied/{path:path}", download(spied)),
            Route("/rows/{path:path}", download(documents, attachment=False)),
            Route("/inline/lake/{path:path}", download(store, attachment=False)),
            Route("/inline/mirror/{path:path}", download(mirror, attachment=False)),
            Route("/dressed/lake/{path:path}", download(store, headers=DRESS)),
            Route("/dressed/mirror/{path:path}", download(mirror, headers=DRESS)),
            Route("/down/{path:path}", download(_Elsewhere(nowhere))),
            Mount("/replaced", routes=[saying(replaced, store)]),
            Mount("/expired", routes=[saying(lambda url: signed(url, 600), store)]),
            Mount("/lost", routes=[saying(lambda url: "/a.txt?X-Amz-Signature=5ec4e7", _Elsewhere(nowhere))]),
            Mount("/broken", routes=[saying(lambda url: "/pub/cut/a.txt?X-Amz-Signature=5ec4e7", mirror)]),
            Mount("/unsigned", routes=[saying(lambda url: url[len(s3.url) :], store)]),
            *(
                Mount(f"/wild/{number}", routes=[saying(lambda url, value=value: value, mirror)])  # type: ignore[misc]
                for number, value in enumerate(WILD)
            ),
        ]
        service = await stack.enter_async_context(live(dv.OffloadMiddleware(Starlette(routes=routes), backend)))
        rules.append(dv.Rule(str(checkout / "app" / "files"), "/_files/"))
        make_text = partial(_text, kind.name, rules, [lake, other])
        log = stack.enter_context(readable_directory()) / "log"
        port = stack.enter_context(proxy(kind, checkout, service, text=make_text, log=log))
        while "last-modified" not in (await ask(service, "/lake/page.html")).headers:
            pass  # the last object has been stored in this second: only later, all answers tell the time
        yield Remote(kind, port, service, origin, origin_port, log)


def _text(kind: Any, rules: list[dv.Rule], storages: list[dv.ObjectStorage], service: str, listen: str) -> str:
    return dv.proxy_config(kind, rules, storages=storages, service=service, listen=listen)


class _Elsewhere:
    """A source whose files the service can describe, and a proxy has to look for somewhere else."""

    def __init__(self, url: str) -> None:
        self._source = dv.StorageSource(dv.MemoryStorage({NAME: CONTENT}))
        self._url = url

    async def resolve(self, name: str, /) -> dv.AsyncFile:
        file = await self._source.resolve(name)
        file.location = self._url + quote(name)
        return file


WILD = [
    f".evil.example.org:{ELSEWHERE}/plain.txt",
    f"@127.0.0.1:{ELSEWHERE}/plain.txt",
    f"http://127.0.0.1:{ELSEWHERE}/plain.txt",
    f":{ELSEWHERE}/plain.txt",
    "",
]


def assert_the_services(answer: Answer, direct: Answer) -> None:
    """That the headers are those of the service, and nobody else's but for those of the bytes."""
    assert "x-offload-target" in direct.headers
    assert direct.body == b""
    said = {name: value for name, value in direct.headers.items() if name not in OFFLOAD_HEADERS | PLAIN}
    assert {name: value for name, value in answer.headers.items() if name not in PLAIN} == said
    assert answer.headers.get("server") not in (NOISE["Server"], "SeaweedFS")


# --- whole files


@pytest.mark.parametrize("character", ["a", "é"])
@pytest.mark.parametrize(
    "length", [pytest.param(length, marks=pytest.mark.slow) for length in (1424, 1425, 2730, 4000)] + [MAX_LENGTH]
)
async def test_a_long_name_is_fetched_too(remote: Remote, length: int, character: str) -> None:
    name = long_name(length, character)
    write(remote.origin.files, name)
    for path in (f"/mirror/{quote(name)}", f"/inline/mirror/{quote(name)}"):
        assert OFFLOAD_TARGET in (await ask(remote.service, path)).headers
        answer = await ask(remote.port, path)
        assert (answer.status, answer.body) == (200, b"0123456789")
        part = await ask(remote.port, path, headers={"Range": "bytes=4-6"})
        assert (part.status, part.body) == (206, b"456")


@pytest.mark.parametrize("character", ["a", "é"])
async def test_the_longest_key_of_a_store_is_fetched_too(remote: Remote, s3: S3, character: str) -> None:
    name = long_name(1000, character)  # and the directory: S3 has 1,024 bytes for both
    s3.put(f"files/{name}", b"0123456789")
    answer = await ask(remote.port, f"/lake/{quote(name)}")
    assert (answer.status, answer.body) == (200, b"0123456789")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_a_client_gets_the_bytes_of_the_very_file(remote: Remote, route: str, name: str) -> None:
    path = f"/{route}/{quote(name)}"
    answer = await ask(remote.port, path, headers=SECRETS)
    assert (answer.status, answer.body, answer.complete) == (200, content_of(name), True)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, max-age=60"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert_the_services(answer, await ask(remote.service, path))


@pytest.mark.slow
async def test_the_other_server_is_asked_for_just_that_and_hears_nothing_of_the_client(remote: Remote) -> None:
    """nginx asks for what is signed to the letter. Caddy spells some characters in another way."""
    conditions = {"If-None-Match": '"x"', "If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT", "Range": "bytes=0-3"}
    for name in HOSTILE_NAMES:
        for route in ("mirror", "spied"):
            for sent in ({}, conditions):
                remote.origin.requests.clear()
                await ask(remote.port, f"/{route}/{quote(name)}", headers=SECRETS | {"User-Agent": "client"} | sent)
                line, heard = remote.origin.requests[-1]
                told = (await ask(remote.service, f"/{route}/{quote(name)}")).headers["x-offload-target"]
                method, asked = line.split(" ")
                assert method == "GET"
                path, _, query = asked.partition("?")
                own = f"/pub/{quote(name)}" if route == "mirror" else f"/{BUCKET}/pub/{quote(name)}"
                assert (unquote(path) if remote.kind.name == "caddy" else path) == (
                    unquote(own) if remote.kind.name == "caddy" else own
                )
                assert [part.partition("=")[0] for part in query.split("&")] == (
                    [part.partition("=")[0] for part in told.partition("?")[2].split("&")]
                )
                assert {header for header in heard if header.lower() not in OF_THE_PROXY} == {
                    header.lower() for header in sent
                }
                assert heard["host"] == f"127.0.0.1:{remote.origin_port}"
                assert heard["accept-encoding"] == "identity"
                assert {header: heard[header.lower()] for header in sent} == sent


@pytest.mark.parametrize("route", ROUTES)
async def test_head_is_the_services_own_answer(remote: Remote, route: str) -> None:
    get = await ask(remote.port, f"/{route}/{NAME}")
    for headers in ({}, {"Range": "bytes=0-3"}):
        head = await ask(remote.port, f"/{route}/{NAME}", method="HEAD", headers=headers)
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(SIZE))
        for header in ("etag", "last-modified", "content-type", "content-disposition", "x-content-type-options"):
            assert head.headers[header] == get.headers[header]


@pytest.mark.parametrize("route", ROUTES)
async def test_inline_files_keep_their_sandbox(remote: Remote, route: str) -> None:
    for headers in ({}, {"Range": "bytes=0-3"}):
        answer = await ask(remote.port, f"/inline/{route}/page.html", headers=headers)
        assert answer.status == (206 if headers else 200)
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["content-disposition"].startswith("inline")
        assert "store.html" not in answer.headers["content-disposition"]


async def test_a_row_whose_file_is_in_a_store(remote: Remote) -> None:
    answer = await ask(remote.port, f"/rows/{NAME}", headers={"Range": "bytes=2-5"})
    assert (answer.status, answer.body) == (206, CONTENT[2:6])
    assert answer.headers["content-disposition"] == 'inline; filename="Ein Bericht.html"'
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"


@pytest.mark.parametrize("route", ROUTES)
async def test_the_headers_of_the_application_reach_the_client(remote: Remote, route: str) -> None:
    for headers, status in (({}, 200), ({"Range": "bytes=0-3"}, 206)):
        answer = await ask(remote.port, f"/dressed/{route}/{NAME}", headers=headers)
        assert answer.status == status
        direct = await ask(remote.service, f"/dressed/{route}/{NAME}")
        for name in DRESS:
            assert answer.headers[name.lower()] == direct.headers[name.lower()]
        assert answer.headers["set-cookie"] == "seen=1"


# --- ranges and conditions: those of who has the bytes


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "value, start, stop",
    [("bytes=0-0", 0, 1), ("bytes=5-9", 5, 10), ("bytes=100-", 100, SIZE), ("bytes=-7", SIZE - 7, SIZE)],
)
async def test_a_part(remote: Remote, route: str, value: str, start: int, stop: int) -> None:
    path = f"/{route}/{NAME}"
    answer = await ask(remote.port, path, headers={"Range": value})
    assert (answer.status, answer.body, answer.complete) == (206, CONTENT[start:stop], True)
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert_the_services(answer, await ask(remote.service, path))


async def test_a_large_object(remote: Remote, s3: S3) -> None:
    content = random.Random(1).randbytes(20_000_003)
    s3.put("files/large.bin", content)
    whole = await ask(remote.port, "/lake/large.bin")
    assert (whole.status, whole.complete, whole.body == content) == (200, True, True)
    part = await ask(remote.port, "/lake/large.bin", headers={"Range": "bytes=7000001-19000000"})
    assert (part.status, part.complete, part.body == content[7_000_001:19_000_001]) == (206, True, True)


@pytest.mark.parametrize("route", ROUTES)
async def test_of_several_parts_the_whole_is_sent(remote: Remote, route: str) -> None:
    answer = await ask(remote.port, f"/{route}/{NAME}", headers={"Range": "bytes=0-3,8-9"})
    assert (answer.status, answer.body) == (200, CONTENT)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_part_that_is_not_there(remote: Remote, route: str) -> None:
    answer = await ask(remote.port, f"/{route}/{NAME}", headers={"Range": f"bytes={SIZE}-"})
    assert answer.status == 416
    assert answer.body in (b"Range Not Satisfiable", b"Requested Range Not Satisfiable")
    if route == "mirror":  # SeaweedFS tells no size
        assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_validator_that_was_given_is_current(remote: Remote, route: str) -> None:
    path = f"/{route}/{NAME}"
    first = await ask(remote.port, path)
    direct = await ask(remote.service, path)
    etag, modified = first.headers["etag"], first.headers["last-modified"]
    assert (etag, modified) == (direct.headers["etag"], direct.headers["last-modified"])
    for condition in ({"If-None-Match": etag}, {"If-Modified-Since": modified}):
        answer = await ask(remote.port, path, headers=condition)
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["cache-control"] == "private, max-age=60"
    for condition in ({"If-None-Match": '"another"'}, {"If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}):
        answer = await ask(remote.port, path, headers=condition)
        assert (answer.status, answer.body) == (200, CONTENT)
    failed = await ask(remote.port, path, headers={"If-Match": '"another"'})
    assert failed.status == 412
    assert b"<" not in failed.body


@pytest.mark.parametrize("route", ROUTES)
async def test_a_resume_is_of_the_version_that_was_begun(remote: Remote, route: str) -> None:
    await resumes_only_what_was_begun(remote.port, f"/{route}/{NAME}", CONTENT)


async def test_a_version_that_is_replaced_meanwhile_is_not_mixed_with_another(remote: Remote, s3: S3) -> None:
    """SeaweedFS does not know If-Range, but If-Match."""
    s3.put("files/replaced.txt", b"the first version")
    etag = (await ask(remote.port, "/lake/replaced.txt")).headers["etag"]
    resume = {"Range": "bytes=4-", "If-Range": etag}
    part = await ask(remote.port, "/lake/replaced.txt", headers=resume)
    assert (part.status, part.body) == (206, b"first version")
    answer = await ask(remote.port, "/replaced/replaced.txt", headers=resume)  # after the service has looked at it
    assert (answer.status, answer.body) == (412, b"Precondition Failed")


# --- errors


def assert_clean(answer: Answer, status: int) -> None:
    """That an error tells nothing of who made it."""
    assert (answer.status, answer.complete) == (status, True)
    assert answer.body in (b"Not Found", b"Bad Gateway")
    assert answer.headers["content-type"] in ("text/plain", "text/plain; charset=utf-8")
    assert not {"location", "etag", "x-amz-request-id", *OFFLOAD_HEADERS} & {*answer.headers}


@pytest.mark.parametrize(
    "said, status",
    [
        *((said, 404) for said in (401, 403, 404, 410)),
        *((said, 502) for said in (301, 302, 303, 307, 308, 400, 405, 429, 500, 502, 503, 504)),
    ],
)
async def test_an_error_of_the_other_server_is_a_clean_one(remote: Remote, said: int, status: int) -> None:
    assert_clean(await ask(remote.port, f"/mirror/fails/{said}/a.txt"), status)


async def test_a_store_that_does_not_take_the_signature(remote: Remote) -> None:
    for route in ("expired", "unsigned"):
        assert_clean(await ask(remote.port, f"/{route}/{NAME}"), 404)


async def test_a_server_that_cannot_be_reached(remote: Remote) -> None:
    assert_clean(await ask(remote.port, f"/down/{NAME}"), 502)


async def test_the_log_has_no_signature(remote: Remote) -> None:
    """Whoever may read the log would get the file."""
    assert_clean(await ask(remote.port, f"/lost/{NAME}"), 502)
    assert not (await ask(remote.port, f"/broken/{NAME}")).complete
    if remote.kind.name == "caddy":  # nginx says nothing of it
        wait_for_text(remote.log, "aborting with incomplete response")
    assert "5ec4e7" not in remote.log.read_text()


async def test_what_the_other_server_cannot_finish_does_not_look_finished(remote: Remote) -> None:
    answer = await ask(remote.port, "/mirror/cut/a.txt")
    assert (answer.status, answer.headers["content-length"], answer.complete) == (200, str(SIZE), False)


@pytest.mark.parametrize("route", ROUTES)
async def test_what_is_missing_is_the_404_of_the_service(remote: Remote, route: str) -> None:
    for name in ("no-such-file.txt", "..%2Fsecret.txt", "a%3Ab"):
        answer = await ask(remote.port, f"/{route}/{name}")
        assert (answer.status, answer.body) == (404, b"Not Found")
        assert answer.headers["cache-control"] == "private, no-store"


# --- nobody but the application decides


@pytest.mark.parametrize("number", range(len(WILD)))
async def test_no_header_chooses_the_server(remote: Remote, number: int) -> None:
    def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(number)
        writer.close()

    asked: list[int] = []
    async with await asyncio.start_server(heard, "127.0.0.1", ELSEWHERE):
        answer = await ask(remote.port, f"/wild/{number}/{NAME}")
    assert not asked
    assert answer.status in (404, 502)


@pytest.mark.parametrize("path", ["/_lake/", "/_mirror/", f"/_lake/files/{NAME}", f"/_mirror/pub/{NAME}", "/_mirror"])
async def test_there_is_no_way_around_the_service(remote: Remote, path: str) -> None:
    remote.origin.requests.clear()
    for headers in ({}, {"X-Offload-Target": f"/pub/{NAME}", "X-Accel-Redirect": "/_mirror/"}):
        answer = await ask(remote.port, path, headers=headers)
        assert (answer.status, answer.body) == (404, b"Not Found")
    assert remote.origin.requests == []


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_gives_no_orders(remote: Remote, route: str) -> None:
    orders = {"X-Offload-Target": "/pub/page.html", "X-Accel-Redirect": "/_mirror/", "X-Reproxy-URL": "/_mirror/"}
    plain = await ask(remote.port, f"/{route}/{NAME}")
    answer = await ask(remote.port, f"/{route}/{NAME}", headers=orders)
    assert (answer.status, answer.body) == (200, CONTENT)
    assert {**answer.headers, "date": ""} == {**plain.headers, "date": ""}


async def test_a_get_with_a_body_keeps_it_to_itself(remote: Remote) -> None:
    request = f"GET /mirror/{NAME} HTTP/1.1\r\nHost: test\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret"
    remote.origin.requests.clear()
    answer = await ask_raw(remote.port, request.encode())
    assert answer.status == (502 if remote.kind.name == "caddy" else 200)  # who has given it to the service already
    if remote.kind.name != "caddy":
        assert all("content-length" not in heard for _, heard in remote.origin.requests)


# --- TLS, as the configurations have it


def trusting(kind: str, text: str, certificate: str) -> str:
    """Return a configuration that takes a certificate for one of an authority."""
    old, new = {
        "nginx": ("/etc/ssl/certs/ca-certificates.crt", certificate),
        "caddy": ("response_header_timeout 60s", f"response_header_timeout 60s\ntls_trust_pool file {certificate}"),
    }[kind]
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
@pytest.mark.parametrize("trusted", [True, False])
async def test_the_certificate_of_the_other_server_is_checked(
    kind: str, trusted: bool, certificate: dict[str, str]
) -> None:
    with readable_directory() as directory:
        checkout = make_checkout(directory)
        readable = shutil.copy(certificate["ssl_certfile"], directory)
        origin = Origin(checkout / "app" / "files")
        async with live(origin, **certificate) as port:
            url = f"https://localhost:{port}/pub/"
            app = Starlette(routes=[Route("/{path:path}", dv.Download(_Elsewhere(url)))])

            def edit(text: str) -> str:
                return trusting(kind, text, str(readable)) if trusted else text

            rules = [dv.Rule(url, "/_remote/")]
            async with live(dv.OffloadMiddleware(app, dv.XAccelRedirect(rules))) as service:
                text = partial(_text, kind, rules, [])
                with proxy(KINDS[kind], checkout, service, text=text, edit=edit) as front:
                    answer = await ask(front, f"/{NAME}")
    assert (answer.status, answer.body) == ((200, CONTENT) if trusted else (502, b"Bad Gateway"))
    assert len(origin.requests) == trusted
