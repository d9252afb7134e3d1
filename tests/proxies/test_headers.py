"""What the application says of a download is what the client gets, behind each proxy."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from tests.live import live, make_old
from tests.proxies.servers import EACH_KIND, KINDS, proxy, readable_directory

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTENT = b"0123456789"
UNUSUAL = {
    "Content-Language": "de",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Link": "</a>; rel=preload, </b>; rel=next",
    "Permissions-Policy": "camera=()",
    "Referrer-Policy": "no-referrer",
    "Repr-Digest": "sha-256=:hNiYd/DUBB77a/kaFvAkjy/Vc+avBcGfr7bhvfJpRN8=:",
    "Server-Timing": "db;dur=1",
    "Timing-Allow-Origin": "https://app.example.org",
    "Vary": "Origin,Accept-Language",  # as Apache spells it
    "X-Custom": 'a; b="c" $host {path}',
    "X-Robots-Tag": "noindex",
}
CORS = {
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Allow-Origin": "https://app.example.org",
    "Access-Control-Expose-Headers": "ETag, Content-Range",
}
NOT_FOR_CLIENTS = {"X-Robots-Tag": "of the other server", "X-Custom": "of the other server"}
"""What another server says of its files."""

COOKIES = ["first=1; Path=/", "second=2"]
BARE = {("lighttpd", "/local/a.txt", 416), ("lighttpd", "/gone/a.txt", 404), ("h2o", "/gone/a.txt", 404)}
"""Errors of a proxy itself that have nothing of the service's answer. The pages of these proxies warn of that."""


class _Cookies:
    """An application whose answers set two cookies."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_cookies(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((b"set-cookie", cookie.encode()) for cookie in COOKIES)]
            await send(message)

        await self.app(scope, receive, send_with_cookies)


class _Gone:
    """A source whose files leave their path once they are open, as an application may delete them."""

    def __init__(self, files: Path) -> None:
        self._source = dv.PathSource(files)
        self._files = files

    async def resolve(self, name: str) -> dv.AsyncFile:
        file = await self._source.resolve(name)
        file.location = str(self._files / "never there.txt")
        return file


@dataclass(frozen=True)
class Site:
    kind: str
    port: int
    files: Path

    async def ask(self, path: str, method: str = "GET", **fields: str) -> tuple[int, dict[str, list[str]]]:
        """Return the status, and the values of each header: a field that is sent twice has two."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        status_line, *received = (await reader.read()).partition(b"\r\n\r\n")[0].decode().split("\r\n")
        writer.close()
        headers: dict[str, list[str]] = {}
        for line in received:
            name, _, value = line.partition(": ")
            headers.setdefault(name.lower(), []).append(value)
        return int(status_line.split(" ")[1]), headers


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=EACH_KIND)
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """Files of two directories and of another server, behind a proxy with the printed configuration."""
    kind = dv.proxy_kinds()[request.param]
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(readable_directory())
        rules = []
        for name in ("files", "more"):
            (directory / name).mkdir()
            (directory / name / "a.txt").write_bytes(CONTENT)
            source = str(directory / name)
            rules.append(dv.Rule(source, f"/_{name}/" if kind.targets == "uri" else source))
        make_old(directory)
        files = directory / "files"
        known = dv.Digests(dv.PathSource(files))
        await known.compute("a.txt")
        origin = Starlette(
            routes=[
                Route("/known/{path:path}", dv.Download(known.source, digests=known)),
                Route("/{path:path}", dv.Download(dv.PathSource(files), headers=NOT_FOR_CLIENTS)),
            ]
        )
        url = f"http://127.0.0.1:{await stack.enter_async_context(live(origin))}/"
        if kind.fetches_urls:
            rules.append(dv.Rule(url, "/_remote/"))
        remote = dv.RemoteSource(url, allow_hosts=["127.0.0.1"])
        stack.push_async_callback(remote.aclose)
        knowing = dv.RemoteSource(f"{url}known/", allow_hosts=["127.0.0.1"])
        stack.push_async_callback(knowing.aclose)
        said = UNUSUAL | CORS
        routes = {
            "local": dv.Download(dv.PathSource(files), headers=said),
            "more": dv.Download(dv.PathSource(directory / "more"), headers=said),
            "remote": dv.Download(remote, headers=said),
            "streamed": dv.Download(dv.PathSource(files), headers=said, offload=False),
            "gone": dv.Download(_Gone(files), headers=said, offload=True),
        }
        hashed: dict[str, dv.Download] = {}
        local = dv.PathSource(files)
        for name, origin_of, offload in (
            ("hashed", local, None),
            ("hashed-remote", remote, None),
            ("hashed-streamed", local, False),
        ):
            digests = dv.Digests(origin_of, algorithms=["sha-256", "sha-512"])
            await digests.compute("a.txt")
            hashed[name] = dv.Download(origin_of, digests=digests, offload=offload)
        app = Starlette(
            routes=[
                *(Route(f"/{name}/{{path:path}}", _Cookies(download)) for name, download in routes.items()),
                *(Route(f"/{name}/{{path:path}}", download) for name, download in hashed.items()),
                Route("/known/{path:path}", dv.Download(knowing)),
                Route("/silent/{path:path}", dv.Download(dv.PathSource(files))),
                Route("/silent-remote/{path:path}", dv.Download(remote)),
            ]
        )
        service = await stack.enter_async_context(live(dv.OffloadMiddleware(app, kind.make_backend(rules))))
        names = [*said, *(name.upper() for name in said), "Set-Cookie", "Cache-Control"]

        def text(service: str, listen: str) -> str:
            return dv.proxy_config(kind.name, rules, service=service, listen=listen, headers=names)

        port = stack.enter_context(proxy(KINDS[kind.name], directory, service, text=text))
        yield Site(kind.name, port, files)


@pytest.mark.parametrize("route", ["local", "more", "remote", "streamed"])
@pytest.mark.parametrize("wanted", ["200", "206", "304", "HEAD"])
async def test_each_header_reaches_the_client_once(site: Site, route: str, wanted: str) -> None:
    path = f"/{route}/a.txt"
    _, whole = await site.ask(path)
    fields = {
        "200": {},
        "206": {"Range": "bytes=0-3"},
        "304": {"If_None_Match": whole.get("etag", [""])[0]},
        "HEAD": {},
    }[wanted]
    status, headers = await site.ask(path, "HEAD" if wanted == "HEAD" else "GET", **fields)
    assert status == (200 if wanted == "HEAD" else int(wanted))
    expected = {name.lower(): [value] for name, value in (UNUSUAL | CORS).items()}
    if wanted == "304" and "content-language" not in headers:
        del expected["content-language"]  # it describes the content, so a 304 of the service leaves it out
    assert {name: headers.get(name) for name in expected} == expected
    assert headers["set-cookie"] == COOKIES


@pytest.mark.parametrize("route", ["hashed", "hashed-remote", "hashed-streamed"])
async def test_the_digest_of_the_whole_file_comes_with_each_part_of_it(site: Site, route: str) -> None:
    for fields, status in (({}, 200), ({"Range": "bytes=0-3"}, 206), ({"Range": "bytes=-1"}, 206)):
        for want, algorithm in ((None, "sha256"), ("sha-512=1", "sha512")):
            asked = fields if want is None else {**fields, "Want_Repr_Digest": want}
            for method in ("GET", "HEAD"):
                answered, headers = await site.ask(f"/{route}/a.txt", method, **asked)
                assert method == "HEAD" or answered == status
                value = base64.b64encode(hashlib.new(algorithm, CONTENT).digest()).decode()
                assert headers["repr-digest"] == [f"sha-{algorithm[3:]}=:{value}:"]


async def test_a_digest_of_another_server_comes_once(site: Site) -> None:
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"
    for method in ("GET", "HEAD"):
        for fields, status in (({}, 200), ({"Range": "bytes=0-3"}, 206)):
            answered, headers = await site.ask("/known/a.txt", method, **fields)
            assert method == "HEAD" or answered == status
            assert headers["repr-digest"] == [digest]


@pytest.mark.parametrize("route", ["silent", "silent-remote"])
async def test_a_header_that_the_application_does_not_set_is_absent(site: Site, route: str) -> None:
    status, headers = await site.ask(f"/{route}/a.txt")
    assert status == 200
    assert {name.lower() for name in UNUSUAL | CORS} & {*headers} == set()


@pytest.mark.parametrize(
    "path, fields, status",
    [
        ("/local/a.txt", {"Range": "bytes=10-"}, 416),
        ("/local/a.txt", {"If_Match": '"another"'}, 412),
        ("/gone/a.txt", {}, 404),
        ("/remote/a.txt", {"Range": "bytes=10-"}, 416),
        ("/streamed/a.txt", {"Range": "bytes=10-"}, 416),
    ],
)
async def test_a_script_of_another_site_can_read_an_error(
    site: Site, path: str, fields: dict[str, str], status: int
) -> None:
    actual, headers = await site.ask(path, **fields)
    if site.kind == "lighttpd" and status == 412:
        status = 200  # it does not know If-Match
    assert actual == status
    if (site.kind, path, status) in BARE:
        assert "access-control-allow-origin" not in headers
        return
    expected = {name.lower(): [value] for name, value in (CORS | {"Vary": UNUSUAL["Vary"]}).items()}
    assert {name: headers.get(name) for name in expected} == expected
