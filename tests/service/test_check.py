"""`downloadview check` without a proxy: what is asked for, sources that fail, what is said, and how it ends."""

import asyncio
import base64
import gzip
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import bcrypt
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import ConfigurationError, MemoryStorage, StorageSource, proxy_kinds
from downloadview_async.check.advice import PROBLEMS, SOCKET, advice
from downloadview_async.check.http import MOST, PIECE, Answer, NoAnswerError, Peer
from downloadview_async.check.samples import Content, content_of
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.service.access import sign_path
from downloadview_async.service.app import build
from downloadview_async.service.check.run import Line, check
from downloadview_async.service.settings import Settings
from tests.certificates import make_certificate
from tests.live import listening, live
from tests.s3 import BUCKET, DENIED_ID, KEY_ID, S3, SECRET
from tests.servers import PROJECT, free_port, serving
from tests.service.loading import FILES, load
from tests.service.test_cli import refused

NGINX = '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'
Headers = dict[str, str]
Spoil = Callable[[Scope, int, Headers, bytes], tuple[int, Headers, bytes]]
BACKENDS = list(proxy_kinds())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(b"0123456789")
    os.utime(tmp_path / "files" / "a.txt", (1_700_000_000,) * 2)
    return tmp_path


@pytest.fixture(scope="module")
def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}"


async def checked(settings: Settings, **options: object) -> list[Line]:
    return [line async for line in check(settings, **options)]  # type: ignore[arg-type]


def failures(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.result == "FAIL"]


# --- the parts


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_there_is_advice_for_every_proxy_and_nothing_left_open_in_it(problem: str, backend: str | None) -> None:
    facts = ("directory", "target", "service", "header", "variable", "value", "path", "mode", "name")
    said = advice(problem, backend, **{name: name.upper() for name in facts})
    assert said
    assert not re.search("<[a-z]+>", said)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_remedy_is_for_a_problem_that_there_is(backend: str) -> None:
    assert set(proxy_kinds()[backend].remedies) <= {*PROBLEMS, SOCKET}


def test_an_order_is_what_no_client_should_see() -> None:
    headers = tuple((name, "x") for name in sorted(OFFLOAD_HEADERS))
    assert set(Answer(200, headers, b"").orders) == OFFLOAD_HEADERS
    assert Answer(200, (("x-accelerated", ""), ("content-type", ""), ("x-powered-by", "")), b"").orders == {}


@pytest.mark.parametrize(
    "size, pieces, body, expected",
    [
        (0, [(0, b"")], b"", True),
        (0, [(0, b"")], b"x", False),
        (3, [(0, b"abc")], b"abc", True),
        (3, [(0, b"abc")], b"ab", False),
        (3, [(0, b"abc")], b"", False),
        (3, [(0, b"abc")], b"abcd", False),
        (3, [(0, b"abc")], b"abd", False),
        (MOST + 1, [(0, bytes(PIECE))], bytes(MOST), True),
        (MOST + 1, [(0, bytes(PIECE))], bytes(PIECE), False),
        (None, [(0, b"abc")], b"abc", True),
        (None, [(0, b"abc")], b"abcdef", True),
        (None, [(0, b"abc")], b"", False),
    ],
)
def test_an_answer_with_the_file(
    size: int | None, pieces: list[tuple[int, bytes]], body: bytes, expected: bool
) -> None:
    assert Content(size, tuple(pieces)).begins(body) == expected


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1, PIECE, MOST - 1, MOST, MOST + 1, 10 * MOST])
async def test_of_a_large_file_three_pieces_are_kept(size: int) -> None:
    content = os.urandom(size)
    source = StorageSource(MemoryStorage({"x": content}))
    _, kept = await content_of(await source.resolve("x"))
    assert kept.size == size
    assert sum(len(piece) for _, piece in kept.pieces) == min(size, MOST)
    places = {(0, min(size, 1)), (max(size - 1000, 0), size), (size // 2, min(size // 2 + 1000, size))}
    assert {kept.part(*place) for place in places} == {content[slice(*place)] for place in places}
    assert kept.part(0, size) == (content if size <= MOST else None)


# --- what is asked for


@pytest.mark.asyncio
async def test_the_files_of_a_directory_are_one_plain_and_one_hostile(directory: Path, nobody: str) -> None:
    files = directory / "files"
    (files / "sub").mkdir()
    for name in ("é.txt", "sub/50%.txt", ".hidden", "a:b", "b\\c", "new\nline", os.fsdecode(b"latin-\xe9")):
        (files / name).write_bytes(b"x")
    (files / "0-empty.txt").touch()
    (files / "0-link.txt").symlink_to("a.txt")
    lines = await checked(load(directory, FILES), direct=nobody)
    assert [line.request for line in lines if line.step == "source"] == [
        "read /files/a.txt",
        "read /files/sub/50%25.txt",
    ]
    lines = await checked(load(directory, FILES.replace("{path:path}", "{name}")), direct=nobody)
    assert [line.request for line in lines if line.step == "source"] == ["read /files/a.txt", "read /files/%C3%A9.txt"]


@pytest.mark.asyncio
async def test_paths_that_are_given_come_in_place_of_those_of_the_settings(directory: Path, nobody: str) -> None:
    (directory / "files" / "b c.txt").write_bytes(b"x")
    route = '[[routes]]\npath = "/again/{path:path}"\nsource = "files"\nexample = ["a.txt"]\n'
    settings = load(directory, FILES + route)
    for only in (False, True):
        lines = await checked(settings, direct=nobody, files=["/files/b c.txt", "/files/b%20c.txt"], only=only)
        asked = [line.request for line in lines if line.step == "source" and line.result == "pass"]
        assert asked == ["read /files/b%20c.txt", "read /files/b%20c.txt", *([] if only else ["read /again/a.txt"])]
        assert [line for line in lines if line.step == "source" and line.result == "skip"] == []


MADE = """
from downloadview_async import VirtualFile

def make(name):
    def endless():
        while True:
            yield bytes(50_000)
    if name == "broken":
        raise KeyError("of mine")
    if name == "sized":
        return VirtualFile(endless, name=name, size=10**12)
    return VirtualFile(endless, name=name) if name == "endless" else None
"""
VIRTUAL = """
[sources.made]
type = "virtual"
factory = "FACTORY:make"
[[routes]]
path = "/made/{name}"
source = "made"
"""
REMOTE = """
[sources.mirror]
type = "remote"
url = "NOBODY/pub/"
allow_hosts = ["127.0.0.1"]
[[routes]]
path = "/mirror/{path:path}"
source = "mirror"
example = "a.txt"
"""
DATABASE = """
[sources.documents]
type = "object"
database = "sqlite+aiosqlite:///locked.db?timeout=0.1"
table = "documents"
key = "key"
file = "path"
source = "files"
[[routes]]
path = "/documents/{key}"
source = "documents"
example = "a"
"""


@pytest.mark.asyncio
async def test_a_route_without_a_known_file_is_said_not_to_be_checked(directory: Path, nobody: str) -> None:
    (directory / "made_here.py").write_text(MADE)
    virtual = VIRTUAL.replace("FACTORY", "made_here")
    lines = await checked(load(directory, FILES + virtual), direct=nobody)
    (line,) = [line for line in lines if line.route == "/made/{name}"]
    assert (line.result, line.step) == ("skip", "source")
    assert "example" in line.remedy
    with pytest.raises(ConfigurationError, match="no file to request"):
        await checked(load(directory, virtual), direct=nobody)
    (directory / "hooks_here.py").write_text("async def may(request, name):\n    return False\n")
    refusing = FILES + 'access = ["hook:hooks_here:may"]\n'
    with pytest.raises(ConfigurationError, match="or the headers of a user with --header"):
        await checked(load(directory, refusing), direct=nobody)


@pytest.mark.asyncio
async def test_a_route_with_a_hook_is_checked_with_the_headers_of_a_user(directory: Path) -> None:
    (directory / "for_ada.py").write_text(
        'async def may(request, name):\n    return request.headers.get("x-user") == "ada"\n'
    )
    settings = load(directory, FILES + 'access = ["hook:for_ada:may"]\nexample = "a.txt"\n')
    async with live(build(settings)) as port:
        direct = f"http://127.0.0.1:{port}"
        lines = await checked(settings, direct=direct, headers={"X-User": "ada"})
        assert [(line.step, line.result) for line in lines] == [
            ("source", "pass"),
            ("application", "pass"),
            ("proxy", "skip"),
        ]
        line, *_ = await checked(settings, direct=direct, headers={"X-User": "bob"})
        assert line.result == "FAIL"
        assert "the answer is 404" in line.outcome
        assert "--header" in line.remedy


@pytest.mark.asyncio
async def test_a_route_that_takes_links_is_checked_with_a_link(directory: Path) -> None:
    links = f'[links]\nkeys = "k1 {"s" * 32}"\n'
    settings = load(directory, FILES + 'access = ["signed"]\nexample = "a.txt"\n' + links)
    link = sign_path(settings, "/files/a.txt")
    async with live(build(settings)) as port:
        url = f"http://127.0.0.1:{port}"
        lines = await checked(settings, url=url, direct=url, files=[link])
        assert failures(lines) == []
        assert ("together", "pass") in [(line.step, line.result) for line in lines]
        assert not any("k1" in line.as_text() for line in lines), "a row has the query of the link"
        (line, *_) = await checked(settings, url=url, direct=url, files=[link[:-1]], only=True)
        assert (line.result, line.outcome) == ("FAIL", "with these settings the answer is 403")
        with pytest.raises(ConfigurationError, match="no file to request"):
            await checked(settings, url=url, direct=url)


@pytest.mark.asyncio
async def test_a_route_whose_users_make_links_is_checked_for_a_user_and_with_a_link(directory: Path) -> None:
    password = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (directory / "users").write_text(f"ada:{password}\n")
    tables = f'[links]\nkeys = "one {"s" * 40}"\n[users]\nfile = "users"\n'
    settings = load(directory, FILES + 'access = ["signed", "user:*"]\nlist = true\nexample = "a.txt"\n' + tables)
    (target,) = [sign_path(settings, "/files/a.txt")]
    async with live(build(settings)) as port:
        direct = f"http://127.0.0.1:{port}"
        user = {"Authorization": f"Basic {base64.b64encode(b'ada:secret').decode()}"}
        for options in ({"headers": user}, {"files": [target], "only": True}):
            lines = await checked(settings, direct=direct, **options)
            assert not failures(lines), failures(lines)
            assert ("application", "pass") in [(line.step, line.result) for line in lines]


@pytest.mark.asyncio
async def test_sources_that_fail_do_not_hide_the_others(directory: Path, nobody: str) -> None:
    (directory / "made_there.py").write_text(MADE)
    virtual = VIRTUAL.replace("FACTORY", "made_there") + 'example = ["broken", "none", "endless"]\n'
    (directory / "files" / "gone.txt").symlink_to("nowhere")
    text = FILES + 'example = ["gone.txt", "a.txt"]\n' + virtual + REMOTE.replace("NOBODY", nobody)
    lines = [line for line in await checked(load(directory, text), direct=nobody) if line.step == "source"]
    assert [(line.request.removeprefix("read "), line.result) for line in lines] == [
        ("/files/gone.txt", "FAIL"),
        ("/files/a.txt", "pass"),
        ("/made/broken", "FAIL"),
        ("/made/none", "FAIL"),
        ("/made/endless", "pass"),
        ("/mirror/a.txt", "FAIL"),
    ]
    assert all(line.remedy for line in failures(lines))
    assert "of mine" in lines[2].outcome
    assert "[sources.mirror]" in lines[5].remedy


@pytest.mark.asyncio
async def test_a_database_that_does_not_answer(directory: Path, nobody: str) -> None:
    with closing(sqlite3.connect(directory / "locked.db")) as connection:
        connection.executescript("CREATE TABLE documents (key TEXT, path TEXT); BEGIN EXCLUSIVE;")
        lines = await checked(load(directory, FILES + DATABASE), direct=nobody)
    assert [(line.result, line.step) for line in lines] == [("FAIL", "source")]
    assert "locked" in lines[0].outcome


@pytest.mark.asyncio
async def test_an_earlier_route_that_answers(directory: Path, nobody: str) -> None:
    text = FILES + '[[routes]]\npath = "/{path:path}"\nsource = "files"\nexample = "files/a.txt"\n'
    (line,) = failures([line for line in await checked(load(directory, text), direct=nobody) if line.step == "source"])
    assert "/files/{path:path} answers this path" in line.outcome


# --- the live service


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["endless", "sized"])
async def test_an_endless_file_is_streamed_as_far_as_it_is_read(directory: Path, name: str) -> None:
    (directory / f"made_{name}.py").write_text(MADE)
    settings = load(directory, VIRTUAL.replace("FACTORY", f"made_{name}") + f'example = "{name}"\n')
    async with live(build(settings)) as port:
        url = f"http://127.0.0.1:{port}"
        lines = await checked(settings, url=url, direct=url)
    assert failures(lines) == []
    assert {"the file is generated on the fly, so it does not support ranges" in line.outcome for line in lines} == {
        True,
        False,
    }


@pytest.mark.asyncio
async def test_why_a_file_is_not_offloaded(directory: Path) -> None:
    (directory / "made_why.py").write_text(MADE)
    (directory / "other").mkdir()
    (directory / "other" / "b.txt").write_bytes(b"b")
    text = (
        FILES
        + 'send = "stream"\n'
        + VIRTUAL.replace("FACTORY", "made_why")
        + 'example = "endless"\n[sources.other]\ntype = "path"\nroot = "other"\n'
        + '[[routes]]\npath = "/other/{path:path}"\nsource = "other"\n'
        + NGINX
    )
    settings = load(directory, text)
    async with live(build(settings)) as port:
        lines = await checked(settings, direct=f"http://127.0.0.1:{port}")
    assert failures(lines) == []
    reasons = [line.outcome for line in lines if line.step == "application"]
    assert reasons == [
        '200, streamed: send = "stream"',
        "200, streamed: it has no location that a proxy could read",
        f"200, streamed: no rule covers {directory}/other/b.txt",
    ]


@pytest.mark.asyncio
async def test_limits_neither_fail_the_check_nor_count_it_as_a_transfer_without_an_end(directory: Path) -> None:
    limits = '[limits]\nrate = "5MB/s"\nconcurrent = 2\n'
    accounts = '[accounts]\ndatabase = "sqlite+aiosqlite:///accounts.db"\nproxy_log = "proxy.log"\n'
    (directory / "proxy.log").touch()
    settings = load(directory, FILES + NGINX + limits + accounts)
    app = build(settings)
    async with app.router.lifespan_context(app), live(app) as port:
        for _ in range(3):
            assert not failures(await checked(settings, direct=f"http://127.0.0.1:{port}"))
        async with httpx2.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}/files/a.txt")
        assert (answer.status_code, answer.headers["x-accel-limit-rate"]) == (200, "5000000")


@pytest.mark.asyncio
async def test_a_service_with_other_settings(directory: Path) -> None:
    (directory / "other").mkdir()
    (directory / "other" / "a.txt").write_bytes(b"9876543210")
    settings = load(directory, FILES)
    for served, remedy in (
        (FILES.replace('root = "files"', 'root = "other"'), "its files differ"),
        (FILES + 'cache_control = "public"\n', "Cache-Control: None"),
        (FILES.replace("/files/", "/elsewhere/"), "does not find"),
        (FILES + NGINX, "stream this file"),
    ):
        async with live(build(load(directory, served))) as port:
            (line,) = failures(await checked(settings, direct=f"http://127.0.0.1:{port}"))
        assert line.step == "application"
        assert remedy in line.remedy


@pytest.mark.asyncio
async def test_what_a_cache_holds_is_offloaded_when_it_is_there(directory: Path) -> None:
    (directory / "made_cached.py").write_text("def make(name):\n    return b'made'\n")
    cache = '[sources.made.cache]\npath = "cache"\n[[routes]]'
    text = VIRTUAL.replace("FACTORY", "made_cached").replace("[[routes]]", cache) + 'example = "a.txt"\n'
    text += '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "cache"\ntarget = "/_cache/"\n'
    settings = load(directory, text)
    app = build(settings)
    async with app.router.lifespan_context(app), live(app) as port:
        for _ in range(2):
            assert failures(await checked(settings, direct=f"http://127.0.0.1:{port}")) == []


@pytest.mark.asyncio
async def test_a_cache_that_keeps_nothing(directory: Path) -> None:
    """What is not one for a cache is no failure, nor what takes its time."""
    (directory / "made_kept.py").write_text(
        "def make(name):\n    return b'made' if name == 'a.txt' else iter([b'made'])\n"
    )
    cache = '[sources.made.cache]\npath = "cache"\n[[routes]]'
    text = VIRTUAL.replace("FACTORY", "made_kept").replace("[[routes]]", cache) + 'example = ["a.txt", "b.txt"]\n'
    text += '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "cache"\ntarget = "/_cache/"\n'
    settings = load(directory, text)
    app = build(settings)
    shutil.rmtree(directory / "cache")  # the service cannot write to it any more
    async with app.router.lifespan_context(app), live(app) as port:
        lines = await checked(settings, direct=f"http://127.0.0.1:{port}")
    (line,) = failures(lines)
    assert (line.step, line.request, line.outcome) == ("application", "GET /made/a.txt", "200, streamed again")
    assert line.remedy.startswith("the cache keeps nothing: see the service's log")
    assert str(directory / "cache") in line.remedy


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_function_that_makes_a_file_of_any_name(directory: Path, nobody: str) -> None:
    (directory / "made_any.py").write_text(
        "import itertools\n"
        "numbers = itertools.count()\n"
        "def make(name):\n"
        "    return f'hello {name}'\n"
        "def anew(name):\n"
        "    return iter([f'{next(numbers)} {name}'])\n"
        "def strict(name):\n"
        "    return {'a.txt': b'made'}[name]\n"
    )
    for function, expected in (("make", []), ("anew", []), ("strict", ["the service itself answers 500: see its log"])):
        text = VIRTUAL.replace("FACTORY:make", f"made_any:{function}").replace("{name}", "{name:path}")
        settings = load(directory, text + 'example = "a.txt"\n')
        async with live(build(settings)) as port:
            url = f"http://127.0.0.1:{port}"
            lines = await checked(settings, url=url, direct=url)
            apart = await checked(settings, url=url, direct=nobody)  # what is asked in this process says the same
        assert sorted({line.remedy for line in failures(lines)}) == expected
        apart = [line for line in failures(apart) if line.step == "together"]
        assert sorted({line.remedy for line in apart}) == expected
        named = [line for line in lines if line.request.startswith(("GET /made/.", "GET /made/%", "GET /made//"))]
        results = {"make": {"pass"}, "anew": {"skip"}, "strict": {"FAIL"}}[function]
        assert {line.result for line in named} == results


LAKE = """
[sources.lake]
type = "storage"
url = "s3://{bucket}/check"
[sources.lake.options]
endpoint = "{url}"
access_key_id = "{key}"
secret_access_key = "{secret}"
{more}
[[routes]]
path = "/lake/{{path:path}}"
source = "lake"
example = "a.txt"
"""


def lake(s3: S3, more: str = "", *, bucket: str = BUCKET, key: str = KEY_ID, secret: str = SECRET) -> str:
    return LAKE.format(bucket=bucket, url=s3.url, key=key, secret=secret, more=more)


@pytest.mark.asyncio
async def test_redirects_of_the_service_and_of_the_proxy(s3: S3, directory: Path) -> None:
    s3.put("check/a.txt", b"0123456789", content_type="text/plain")
    settings = load(directory, lake(s3, "[sources.lake.presign]") + 'send = "redirect"\n')
    host = s3.url.removeprefix("http://")

    async def elsewhere(request: Request) -> Response:
        return RedirectResponse(f"https://files.example.org{request.url.path}?token=secret", 301)

    async with live(build(settings)) as port, live(Starlette(routes=[Route("/{x:path}", elsewhere)])) as other:
        direct = f"http://127.0.0.1:{port}"
        lines = await checked(settings, url=direct, direct=direct)
        assert [(line.result, line.outcome) for line in lines if line.step == "together"] == [
            ("pass", f"307 to {host}"),
            ("pass", '206, 1 bytes, Content-Disposition: attachment; filename="a.txt"'),
        ]
        assert failures(lines) == []
        (line,) = failures(await checked(settings, url=f"http://127.0.0.1:{other}", direct=direct))
    assert line.outcome == "301 to https://files.example.org/lake/a.txt"
    assert line.remedy == "give the URL that this redirect leads to"


@pytest.mark.slow
@pytest.mark.asyncio
async def test_where_a_signed_url_leads_to(s3: S3, directory: Path, nobody: str) -> None:
    s3.put("check/a.txt", b"0123456789", content_type="text/plain")
    heard: list[Headers] = []
    said: list[Response] = []

    async def store(request: Request) -> Response:
        heard.append(dict(request.headers))
        return said[0]

    part = {"Content-Range": "bytes 0-0/10"}
    attachment = part | {"Content-Disposition": 'attachment; filename="a.txt"'}
    async with live(Starlette(routes=[Route("/{x:path}", store)])) as before:
        here = f"http://127.0.0.1:{before}"
        for endpoint, answer, result, came in (
            (here, Response(b"0", 206, attachment), "pass", "206"),
            (here, Response(b"0", 206, part), "FAIL", "Content-Disposition: None"),
            (here, Response(b"1", 206, attachment), "FAIL", "206"),
            (here, Response(b"<Error/>", 403), "FAIL", "403"),
            (here, Response(status_code=307, headers={"Location": nobody}), "FAIL", "307"),
            (nobody, Response(), "FAIL", "no answer"),
            ("http://no-such-host.invalid", Response(), "skip", "no-such-host.invalid has no address here"),
        ):
            said[:] = [answer]
            presign = f'[sources.lake.presign]\npublic_endpoint = "{endpoint}"'
            settings = load(directory, lake(s3, presign) + 'send = "redirect"\n')
            async with live(build(settings)) as port:
                lines = await checked(settings, url=f"http://127.0.0.1:{port}", direct=f"http://127.0.0.1:{port}")
            followed = lines[-1]
            assert (followed.result, followed.step) == (result, "together")
            assert came in followed.outcome
            assert ("[sources.lake.presign] public_endpoint" in followed.remedy) == (result == "FAIL")
            assert not any("x-amz" in str(line).lower() for line in lines)
    assert [set(headers) for headers in heard] == [{"host", "range"}] * 5


@pytest.mark.asyncio
async def test_a_store_that_denies_and_one_without_the_object(s3: S3, directory: Path, nobody: str) -> None:
    s3.put("check/a.txt", b"0123456789")
    for text, remedy in (
        (
            lake(s3, secret="another"),
            "the keys in [sources.lake.options], and what they allow",
        ),
        (lake(s3, key=DENIED_ID), "the keys in [sources.lake.options]"),
        (lake(s3, bucket="no-such-bucket"), "'no-such-bucket'"),
        (lake(s3).replace("a.txt", "none.txt"), f"or correct the bucket '{BUCKET}' in the url of [sources.lake]"),
    ):
        (line,) = failures(await checked(load(directory, text), direct=nobody))
        assert line.step == "source"
        assert remedy in line.remedy
        assert SECRET not in str(line)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "url", ["", "files", "ftp://x", "http://", "http://x:y", "http://x/?a", "http://x/#a", "http://é"]
)
async def test_urls_that_are_none(directory: Path, nobody: str, url: str) -> None:
    with pytest.raises(ConfigurationError, match="not a server URL"):
        await checked(load(directory, FILES), url=url, direct=nobody)
    with pytest.raises(ConfigurationError, match="not a server URL"):
        await checked(load(directory, FILES), direct=url)


@pytest.mark.asyncio
async def test_nothing_of_the_environment_is_in_the_way(
    directory: Path, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, nobody)
    settings = load(directory, FILES)
    async with live(build(settings)) as port:
        lines = await checked(settings, url=f"http://127.0.0.1:{port}", direct=f"http://127.0.0.1:{port}")
    assert failures(lines) == []


@pytest.mark.asyncio
async def test_a_file_of_this_very_second(directory: Path) -> None:
    settings = load(directory, FILES)
    async with live(build(settings)) as port:
        os.utime(directory / "files" / "a.txt", (time.time() + 0.2,) * 2)
        lines = await checked(settings, url=f"http://127.0.0.1:{port}", direct=f"http://127.0.0.1:{port}")
    assert failures(lines) == []


@pytest.mark.asyncio
async def test_a_password_is_not_repeated(directory: Path, nobody: str) -> None:
    url = nobody.replace("//", "//ada:secret@")
    lines = await checked(load(directory, FILES), url=url, direct=url)
    assert len(failures(lines)) == 2
    assert not any("secret" in str(line) for line in lines)


@pytest.mark.asyncio
async def test_a_server_that_takes_its_time() -> None:
    async def silent(request: Request) -> Response:
        await request.receive()
        await request.receive()  # until the client has left
        return Response()

    async with live(Starlette(routes=[Route("/", silent)])) as port, Peer.at(f"http://127.0.0.1:{port}", 0.2) as peer:
        with pytest.raises(NoAnswerError, match=r"within 0\.2 s"):
            await peer.ask("/")


@pytest.mark.asyncio
async def test_a_path_is_sent_as_it_is_spelled() -> None:
    async def echo(request: Request) -> Response:
        return Response(request.scope["raw_path"])

    app = Starlette(routes=[Route("/{x:path}", echo)])
    async with live(app) as port, Peer.at(f"http://127.0.0.1:{port}/below", 10) as peer:
        for target in ("/a/../b", "//a", "/%2e%2E/%00", "/a;b=c"):
            assert (await peer.ask(target)).body == b"/below" + target.encode()
            assert (await peer.ask(target, root=True)).body == target.encode()


# --- the command


def run(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
    ran = subprocess.run(
        [sys.executable, "-m", "downloadview_async.cli", "check", *arguments],
        cwd=cwd,
        env=environ | {"PYTHONPATH": str(PROJECT)} | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ran.stderr
    return ran


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A service on a Unix socket, by its settings' directory and that socket."""
    directory = tmp_path_factory.mktemp("served")
    (directory / "files").mkdir()
    (directory / "files" / "a b.txt").write_bytes(b"0123456789")
    (directory / "downloadview.toml").write_text(f'[server]\nuds = "socket"\n{FILES}')
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "downloadview.toml"]
    with serving(command, str(directory / "socket"), log=directory / "log", cwd=directory):
        yield directory, str(directory / "socket")


def test_the_command_finds_the_service_by_its_settings(served: tuple[Path, str]) -> None:
    ran = run(cwd=served[0])
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.splitlines() == [
        "pass  source  /files/{path:path}  read /files/a%20b.txt: 10 bytes",
        "pass  application  /files/{path:path}  GET /files/a%20b.txt: 200, streamed",
        "skip  proxy    the proxy: not checked: give the URL at which clients reach the proxy",
        "2 pass, 0 FAIL, 1 skip",
    ]


def test_the_command_fails_where_something_does(served: tuple[Path, str]) -> None:
    env = {
        "DOWNLOADVIEW_OFFLOAD": json.dumps({"backend": "nginx", "rules": [{"source": "files", "target": "/_files/"}]})
    }
    ran = run("--json", "--config", "downloadview.toml", "--timeout", "5", cwd=served[0], env=env)
    assert ran.returncode == 1
    said = json.loads(ran.stdout)
    assert (said["pass"], said["FAIL"], said["skip"]) == (1, 1, 1)
    assert [set(line) for line in said["checks"]] == [{"result", "step", "route", "asked", "came", "remedy"}] * 3
    assert "DOWNLOADVIEW_OFFLOAD__BACKEND=nginx" in said["checks"][1]["remedy"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "nothing.toml"], "cannot be read"),
        (["--file", "/nothing/a.txt"], "no route serves"),
        (["--file", "/-/livez"], "no route serves"),
        (["--only"], "no file to request"),
        (["nowhere"], "not a server URL"),
        (["--direct", "nowhere"], "not a server URL"),
        (["--timeout", "0"], "timeout"),
        (["--header", "X-User"], "--header is NAME: VALUE"),
    ],
)
def test_the_command_cannot_check(served: tuple[Path, str], arguments: list[str], message: str) -> None:
    assert message in refused(*arguments, cwd=served[0], command="check")


@pytest.mark.asyncio
async def test_a_certificate_is_checked_against_those_of_the_system(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_certificate(directory, "IP:127.0.0.1")
    settings = load(directory, FILES)
    async with live(build(settings), **paths) as port:
        url = f"https://127.0.0.1:{port}"
        (line,) = failures(await checked(settings, direct=url))
        assert "CERTIFICATE_VERIFY_FAILED" in line.outcome
        monkeypatch.setenv("SSL_CERT_FILE", paths["ssl_certfile"])
        assert failures(await checked(settings, url=url, direct=url)) == []
        text = FILES + f"[server]\nport = {port}\n" + "".join(f'{name} = "{path}"\n' for name, path in paths.items())
        assert failures(await checked(load(directory, text))) == []


# --- something in between that spoils the answers of the service


def _compressing(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    body = gzip.compress(body)
    return status, headers | {"content-encoding": "gzip", "content-length": str(len(body))}, body


def _refusing_head(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return (405, {}, b"") if scope["method"] == "HEAD" else (status, headers, body)


def _forgetting_at_head(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, headers | ({"etag": '"other"'} if scope["method"] == "HEAD" else {}), body


def _knowing_nothing(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return 404, {}, b""


def _losing_the_length(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, {name: value for name, value in headers.items() if name != "content-length"}, body


def _sending_something_else(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, headers, body.replace(b"0", b"1")


def _sending_nothing(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, headers | {"content-length": "0"}, b""


def _hiding_ranges(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    coded = b"gzip" in dict(scope["headers"]).get(b"accept-encoding", b"")
    return status, headers | ({"accept-ranges": "none"} if coded else {}), body


def _answering_everything(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return (200, {}, b"<html>") if status == 404 else (status, headers, body)


def _failing_at_what_is_missing(scope: Scope, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return (500, {}, b"") if status == 404 else (status, headers, body)


class Between:
    """Lets the application answer, and says what `spoil` makes of it."""

    def __init__(self, app: ASGIApp, spoil: Spoil) -> None:
        self._app = app
        self._spoil = spoil

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive, keep)
        start, *parts = messages
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        body = b"".join(part.get("body", b"") for part in parts)
        status, headers, body = self._spoil(scope, start["status"], headers, body)
        await Response(body, status)({**scope, "method": "GET"}, receive, _with(headers, send))


def _with(headers: Headers, send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send(message)

    return sent


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "spoil, asked, came, remedy",
    [
        (_compressing, "GET /files/a.txt", "Content-Encoding: gzip", "compress nothing"),
        (_refusing_head, "HEAD /files/a.txt", "405", "Range"),
        (_forgetting_at_head, "HEAD /files/a.txt", 'etag: "other"', "pass on etag"),
        (_knowing_nothing, "GET /files/a.txt", "404", "forward all paths"),
        (_losing_the_length, "GET /files/a.txt", "Content-Length: None of 10", "compress nothing"),
        (_sending_something_else, "GET /files/a.txt", "other bytes", "does not cache answers"),
        (_sending_nothing, "GET /files/a.txt", "no bytes", "removes the bytes"),
        (_hiding_ranges, "GET /files/a.txt Accept-Encoding: ", "Accept-Ranges: none", "compress nothing"),
        (_answering_everything, "GET /files/no-such-file", "200", "forward all paths"),
        (_failing_at_what_is_missing, "GET /files/no-such-file", "500", "the service runs"),
    ],
)
async def test_answers_that_are_spoiled_are_found(
    directory: Path, spoil: Spoil, asked: str, came: str, remedy: str
) -> None:
    settings = load(directory, FILES)
    app = build(settings)
    async with live(app) as service, live(Between(app, spoil)) as port:
        lines = await checked(settings, url=f"http://127.0.0.1:{port}", direct=f"http://127.0.0.1:{service}")
    failed = failures(lines)[0]
    assert failed.step == "together"
    assert failed.request.startswith(asked)
    assert came in failed.outcome
    assert remedy in failed.remedy


@pytest.mark.asyncio
async def test_headers_that_a_proxy_adds_are_its_own_business(directory: Path) -> None:
    added = {"content-security-policy": "default-src 'self'", "strict-transport-security": "max-age=1", "via": "1.1 x"}
    settings = load(directory, FILES)
    app = build(settings)
    spoil: Spoil = lambda scope, status, headers, body: (status, headers | added, body)  # noqa: E731
    async with live(app) as service, live(Between(app, spoil)) as port:
        lines = await checked(settings, url=f"http://127.0.0.1:{port}", direct=f"http://127.0.0.1:{service}")
    assert failures(lines) == []


@pytest.mark.asyncio
async def test_a_proxy_that_closes_the_connection_refuses(directory: Path) -> None:
    settings = load(directory, FILES + NGINX)

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with listening(closing) as proxy, live(build(settings)) as service:
        lines = await checked(settings, url=f"http://127.0.0.1:{proxy}", direct=f"http://127.0.0.1:{service}")
    assert {line.result for line in lines if line.step == "proxy" and line.route} == {"pass"}
    assert [line.result for line in lines if line.step == "proxy" and not line.route] == ["skip"]
    assert [line.request for line in failures(lines)] == ["GET /files/a.txt"]
    assert "closed" in failures(lines)[0].outcome


@pytest.mark.asyncio
async def test_the_address_of_the_service_is_not_known(directory: Path) -> None:
    for server in ("[server]\nport = 0\n", "[server]\nfd = 3\n"):
        lines = await checked(load(directory, server + FILES))
        assert [(line.step, line.result) for line in lines] == [
            ("source", "pass"),
            ("application", "skip"),
            ("proxy", "skip"),
        ]
        assert "--direct" in lines[1].outcome


@pytest.mark.asyncio
async def test_a_name_that_no_header_can_say_is_streamed(directory: Path) -> None:
    (directory / "files" / "a ").write_bytes(b"x")
    rule = '[offload]\nbackend = "apache"\n[[offload.rules]]\nsource = "files"\n'
    for send, results in (("", {"pass"}), ('send = "proxy"\n', {"pass", "FAIL"})):
        settings = load(directory, f"{FILES}{send}{rule}")
        async with live(build(settings)) as service:
            lines = await checked(settings, direct=f"http://127.0.0.1:{service}")
        named = [line for line in lines if line.request == "GET /files/a%20"]
        assert "the proxy's header cannot carry" in named[0].outcome
        assert {line.result for line in lines if line.step == "application"} == results
