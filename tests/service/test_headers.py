"""Headers and CORS of routes: the settings that are refused, and the answers of the service."""

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from starlette.applications import Starlette

from downloadview_async import ConfigurationError, Download, PathSource, URLSigner, proxy_kinds
from downloadview_async.cli import main
from downloadview_async.http.fields import FRAMING, OF_THE_CONNECTION, OF_THE_FILE, OFFLOAD_HEADERS
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from tests.live import Answer, ask, live

APP = "https://app.example.org"
HEAD = """
[sources.files]
type = "path"
root = "files"
precompressed = ["gzip"]
"""
ROUTE = HEAD + '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(b"content")
    (tmp_path / "files" / "packed.txt").write_bytes(b"content" * 100)
    (tmp_path / "files" / "packed.txt.gz").write_bytes(b"packed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOWNLOADVIEW_CONFIG", raising=False)
    return tmp_path


def app_of(text: str) -> Starlette:
    Path("downloadview.toml").write_text(text)
    return build(load_settings("downloadview.toml", environ={}))


# --- what is refused


@pytest.mark.parametrize(
    "line, key, remedy",
    [
        ("headers = { X-A = 1 }", "headers", "give a table of further response headers"),
        ('headers = { "X A" = "1" }', "headers", "is not the name of a header"),
        ('headers = { "é" = "1" }', "headers", "is not the name of a header"),
        ('headers = { X-A = "" }', "headers.X-A", "printable characters of ASCII"),
        ('headers = { X-A = "é" }', "headers.X-A", "printable characters of ASCII"),
        ('headers = { X-A = "a\\nb" }', "headers.X-A", "a control character"),
        ('headers = { X-A = "1", x-a = "2" }', "headers.x-a", "the same as X-A"),
        ('headers = { Cache-Control = "private" }', "headers.Cache-Control", "write it as cache_control"),
        ('headers = { content-type = "text/plain" }', "headers.content-type", "in [content_types]"),
        ('headers = { Content-Disposition = "inline" }', "headers.Content-Disposition", "write disposition"),
        ('headers = { Access-Control-Allow-Origin = "*" }', "headers.Access-Control-Allow-Origin", "write cors"),
        ('headers = { Repr-Digest = "sha-256=::" }', "headers.Repr-Digest", "describes one file"),
        ('headers = { X-Accel-Redirect = "/a" }', "headers.X-Accel-Redirect", "an order for a proxy"),
        ("cors = { origins = [] }", "cors.origins", "a list of origins"),
        ("cors = {}", "cors.origins", "missing: give a list of origins"),
        (f'cors = {{ origins = ["*", "{APP}"] }}', "cors.origins[0]", "remove the others"),
        ('cors = { origins = ["*"], credentials = true }', "cors.origins[0]", "list the origins"),
        (f'cors = {{ origins = ["{APP}/"] }}', "cors.origins[0]", "is not an origin"),
        ('cors = { origins = ["app.example.org"] }', "cors.origins[0]", "is not an origin"),
        ('cors = { origins = ["https://App.example.org"] }', "cors.origins[0]", "in lower case"),
        ('cors = { origins = ["https://*.example.org"] }', "cors.origins[0]", "is not an origin"),
        ('cors = { origins = ["https://exämple.org"] }', "cors.origins[0]", "is not an origin"),
        ('cors = { origins = ["null"] }', "cors.origins[0]", "is not an origin"),
        ('cors = { origins = ["https://a.org:65536"] }', "cors.origins[0]", "is not an origin"),
        (
            'cors = { origins = ["https://a.org:443"] }',
            "cors.origins[0]",
            "leave out the port 443: write https://a.org",
        ),
        (f'cors = {{ origins = ["{APP}"], max_age = "soon" }}', "cors.max_age", "'soon' is not a time"),
        (f'cors = {{ origins = ["{APP}"], max-age = 1 }}', "cors.max-age", "did you mean 'max_age'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_and_a_remedy(
    directory: Path, line: str, key: str, remedy: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        app_of(f"{ROUTE}{line}\n")
    assert str(refused.value).startswith(f"downloadview.toml: routes[0].{key}")
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_route_may_not_set_what_the_library_refuses(directory: Path) -> None:
    orders = {name for kind in proxy_kinds().values() for name in kind.headers}
    assert orders <= OFFLOAD_HEADERS
    for name in FRAMING | OF_THE_FILE | OF_THE_CONNECTION | OFFLOAD_HEADERS:
        with pytest.raises(ConfigurationError, match=rf"routes\[0\]\.headers\.{name}: "):
            app_of(f'{ROUTE}headers = {{ {name} = "1" }}\n')


@pytest.mark.parametrize("name", ["Content-Length", "ETag", "last-modified", "Transfer-Encoding", "X-Accel-Redirect"])
def test_a_download_with_a_header_of_the_file_is_not_made(directory: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"remove {name.lower()} from headers"):
        Download(PathSource("files"), headers={name: "1"})


def test_a_download_with_a_header_that_no_message_can_have_is_not_made(directory: Path) -> None:
    for headers in ({"X-A": "1\n2"}, {"X A": "1"}, {"X-A:": "1"}, {"": "1"}):
        with pytest.raises(ValueError, match=r"control characters|is not the name of a header"):
            Download(PathSource("files"), headers=headers)


# --- what the service answers

SETTINGS = (
    HEAD
    + """
[links]
keys = "2026a ssssssssssssssssssssssssssssssss"
[[routes]]
path = "/marked/{path:path}"
source = "files"
headers = { X-Robots-Tag = "noindex", Content-Language = "de" }
[[routes]]
path = "/app/{path:path}"
source = "files"
cors = { origins = ["https://app.example.org", "http://localhost:3000"], credentials = true, max_age = "1h" }
[[routes]]
path = "/all/{path:path}"
source = "files"
cors = { origins = ["*"] }
[[routes]]
path = "/signed/{path:path}"
source = "files"
access = ["signed"]
cors = { origins = ["https://app.example.org"] }
"""
)


@contextlib.asynccontextmanager
async def service() -> AsyncIterator[int]:
    async with live(app_of(SETTINGS)) as port:
        yield port


def listed(answer: Answer, name: str) -> set[str]:
    return {one.strip().lower() for one in answer.headers.get(name, "").split(",")} - {""}


EXPOSED = "Accept-Ranges, Content-Range, Content-Length, Content-Disposition, ETag, Last-Modified, Repr-Digest"


@pytest.mark.asyncio
async def test_the_headers_of_a_route(directory: Path) -> None:
    async with service() as port:
        for fields, status in [({}, 200), ({"Range": "bytes=0-1"}, 206), ({"Range": "bytes=9-"}, 416)]:
            answer = await ask(port, "/marked/a.txt", headers=fields)
            assert (answer.status, answer.headers["x-robots-tag"]) == (status, "noindex")
        assert (await ask(port, "/marked/a.txt")).headers["content-language"] == "de"
        assert "x-robots-tag" not in (await ask(port, "/app/a.txt")).headers


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/app/a.txt", "/app/missing.txt", "/signed/a.txt"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_preflight_is_answered_before_access_is_decided(directory: Path, path: str, method: str) -> None:
    wanted = {
        "Origin": APP,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "if-modified-since,if-none-match,if-range,range",
    }
    async with service() as port:
        answer = await ask(port, path, method="OPTIONS", headers=wanted)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == APP
        assert listed(answer, "access-control-allow-methods") == {"get", "head"}
        assert {"if-modified-since", "if-none-match", "if-range", "range"} <= listed(
            answer, "access-control-allow-headers"
        )
        assert answer.headers["access-control-max-age"] == ("3600" if path.startswith("/app/") else "600")
        assert ("access-control-allow-credentials" in answer.headers) == path.startswith("/app/")
        assert "origin" in listed(answer, "vary")
        for refused in (
            {"Origin": "https://evil.example.org"},
            {"Access-Control-Request-Method": "DELETE"},
            {"Access-Control-Request-Headers": "x-other"},
        ):
            assert (await ask(port, path, method="OPTIONS", headers=wanted | refused)).status == 400


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "path, fields, status",
    [
        ("/app/a.txt", {}, 200),
        ("/app/a.txt", {"Range": "bytes=0-1"}, 206),
        ("/app/a.txt", {"If-None-Match": "*"}, 304),
        ("/app/a.txt", {"If-Match": '"x"'}, 412),
        ("/app/a.txt", {"Range": "bytes=9-"}, 416),
        ("/app/missing.txt", {}, 404),
        ("/signed/a.txt", {}, 403),
        ("/signed/a.txt?expired", {}, 410),
    ],
)
async def test_a_script_of_an_allowed_origin_can_read_every_answer(
    directory: Path, path: str, fields: dict[str, str], status: int
) -> None:
    async with service() as port:
        if path.endswith("?expired"):
            path = URLSigner({"2026a": "s" * 32}).sign("/signed/a.txt", expires_in=timedelta(seconds=1))
            while (await ask(port, path)).status == 200:
                pass
        answer = await ask(port, path, headers={"Origin": APP, **fields})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, APP)
        assert answer.headers["access-control-expose-headers"] == EXPOSED
        assert "origin" in listed(answer, "vary")
        for other in ({}, {"Origin": "https://evil.example.org"}, {"Origin": f"{APP}.evil.org"}, {"Origin": "null"}):
            answer = await ask(port, path, headers={**other, **fields})
            assert answer.status == status
            assert "access-control-allow-origin" not in answer.headers
            assert "origin" in listed(answer, "vary")  # else a cache would give this answer to the application


@pytest.mark.asyncio
async def test_vary_has_the_coding_and_the_origin(directory: Path) -> None:
    async with service() as port:
        for coding in ("identity", "gzip"):
            answer = await ask(port, "/app/packed.txt", headers={"Origin": APP, "Accept-Encoding": coding})
            assert answer.status == 200
            assert listed(answer, "vary") == {"accept-encoding", "origin"}


@pytest.mark.asyncio
async def test_all_origins(directory: Path) -> None:
    async with service() as port:
        answer = await ask(port, "/all/a.txt", headers={"Origin": "https://any.example.org", "Cookie": "a=1"})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.asyncio
async def test_a_route_without_cors_has_none(directory: Path) -> None:
    async with service() as port:
        answer = await ask(port, "/marked/a.txt", headers={"Origin": APP})
        assert {name for name in answer.headers if name.startswith("access-control-")} == set()
        assert "vary" in answer.headers  # of precompressed files alone
        assert "origin" not in listed(answer, "vary")


def test_the_printed_configuration_has_the_headers_of_all_routes(directory: Path) -> None:
    text = f'{SETTINGS}[[routes]]\npath = "/more/{{path:path}}"\nsource = "files"\nheaders = {{ X-More = "1" }}\n'
    Path("downloadview.toml").write_text(f'{text}[offload]\nbackend = "nginx"\n')
    arguments = ["config", "nginx", "--config", "downloadview.toml"]
    printed = CliRunner().invoke(main, arguments, catch_exceptions=False).stdout
    for name in ("X-Robots-Tag", "X-More"):
        variable = name.lower().replace("-", "_")
        assert printed.count(f"add_header {name} $upstream_http_{variable} always;") == 1
    assert printed.count("add_header Content-Language ") == 1
    Path("downloadview.toml").write_text(f'{text.replace("X-More", "X_More")}[offload]\nbackend = "nginx"\n')
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "routes[4].headers: 'X_More': nginx has no variable for this header" in result.stderr
