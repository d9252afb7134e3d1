"""Which name was asked for: every framework's way to a `Download`, below every prefix, gives that file or an error."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from downloadview_async import ConfigurationError, Download, PathSource
from downloadview_async.asgi.request_key import path_below
from tests.asgi.named_app import APPS, make
from tests.servers import Server, free_port, serving

FILES = [
    "bc.txt",
    "abc.txt",
    "a/bc.txt",
    "files/abc.txt",
    "files/files/abc.txt",
    "a/files/abc.txt",
    "sub dir/é.txt",
    "100%25.txt",
    "nested.txt/nested.txt",
]

UNDECODED = ["\ufffd.txt", "\ufffd\ufffd.txt", "sub dir/\ufffd\ufffd\ufffd", "\ufffd"]
"""What `%ff.txt` and the like are, where bytes that are not UTF-8 are replaced."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("named")
    for name in FILES + UNDECODED:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


@pytest.mark.asyncio
@pytest.mark.parametrize("prefix", ["", "/a", "/files", "/a/files"])
@pytest.mark.parametrize("app_name", APPS)
async def test_the_file_or_an_error_but_never_another_file(app_name: str, prefix: str, root: Path) -> None:
    app = make(app_name, root)
    found = []

    async def below_the_prefix(scope: Any, receive: Any, send: Any) -> None:
        # as uvicorn and granian have it: in front of the path
        raw = prefix.encode() + scope["raw_path"]
        await app({**scope, "root_path": prefix, "path": prefix + scope["path"], "raw_path": raw}, receive, send)

    transport = httpx.ASGITransport(app=below_the_prefix, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for name in FILES:
            answer = await client.get("/files/" + name.replace("%", "%25"))
            assert answer.status_code in (200, 404, 500), name
            if answer.status_code == 200:
                assert answer.text == name
                found.append(name)
    if app_name == "litestar: route":
        assert not found, "Litestar answers 500 by itself: its ASGI handlers take no parameters"
    elif prefix == "" or app_name.startswith(("starlette", "fastapi")):  # others may not know the prefix
        assert found == FILES


@pytest.mark.parametrize(
    "scope, below",
    [
        ({"path": "/abc.txt", "root_path": "/a"}, "/abc.txt"),
        ({"path": "/a/bc.txt", "root_path": "/a"}, "/bc.txt"),
        ({"path": "/a/bc.txt", "root_path": "/a/"}, "/bc.txt"),
        ({"path": "/a", "root_path": "/a"}, ""),
        ({"path": "/ab", "root_path": "/a"}, "/ab"),
        ({"path": "/a/bc.txt"}, "/a/bc.txt"),
        ({"path": "/a/bc.txt", "root_path": None}, "/a/bc.txt"),
        ({"path": "/a/bc.txt", "root_path": "/a", "raw_path": None}, "/bc.txt"),
        ({"path": "/a/bc.txt", "root_path": "/a", "raw_path": b"/a/bc.txt"}, "/bc.txt"),
        # a server that does not put its prefix in front of the path, below a mount of Starlette's
        ({"path": "/files/bc.txt", "root_path": "/a/files", "app_root_path": "/a"}, "/bc.txt"),
        ({"path": "/a/files/bc.txt", "root_path": "/a/files", "app_root_path": "/a"}, "/bc.txt"),
        # a framework has taken the prefix off the path, below which there is a directory of the same name
        ({"path": "/a/bc.txt", "root_path": "/a", "raw_path": b"/a/a/bc.txt"}, "/a/bc.txt"),
        ({"path": "/a/b c.txt", "root_path": "/a", "raw_path": b"/a/a/b%20c.txt"}, "/a/b c.txt"),
        ({"path": "/a/é.txt", "root_path": "/a", "raw_path": b"/a/%C3%A9.txt"}, "/é.txt"),
    ],
)
def test_the_path_below_a_prefix(scope: Mapping[str, Any], below: str) -> None:
    assert path_below(scope) == below


@pytest.mark.asyncio
async def test_a_parameter_that_may_be_a_mounts_is_an_error() -> None:
    scope = {"type": "http", "method": "GET", "path": "/x/dir/x", "root_path": "/x", "headers": []}
    scope["app_root_path"] = ""
    download = Download(Nothing())
    for parameters in ({"tenant": "x"}, {"tenant": 7}):
        with pytest.raises(ConfigurationError, match="pass key="):
            await download({**scope, "path_params": parameters}, _nothing, _nothing)
    with pytest.raises(ConfigurationError, match="needs key=, one of the route's parameters: one, two"):
        await download({**scope, "path": "/x/a/b", "path_params": {"one": "a", "two": "b"}}, _nothing, _nothing)
    with pytest.raises(ConfigurationError, match="key='other', which is not a path parameter: use one of one"):
        await Download(Nothing(), key="other")({**scope, "path_params": {"one": "a"}}, _nothing, _nothing)


@pytest.mark.asyncio
@pytest.mark.parametrize("root_path", ["", "/srv"])
async def test_a_name_like_a_prefix_or_of_another_spelling_is_found(root_path: str, tmp_path: Path) -> None:
    for name in ("srv", "7", "f/srv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = PathSource(tmp_path)
    inner, app = FastAPI(), FastAPI()
    for one in (inner, app):
        one.router.routes.append(Route("/files/{path:path}", Download(source)))
        one.router.routes.append(Route("/number/{number:int}", Download(source)))
    router = APIRouter()
    router.routes.append(Route("/routed/{path:path}", Download(source)))
    app.include_router(router)
    app.mount("/srv", inner)
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, name in {
            "/files/srv": "srv",
            "/files/f/srv": "f/srv",
            "/number/007": "7",
            "/routed/srv": "srv",
            "/srv/files/srv": "srv",
            "/srv/files/f/srv": "f/srv",
            "/srv/number/007": "7",
        }.items():
            answer = await client.get(root_path + path)
            assert (answer.status_code, answer.text) == (200, name), root_path + path


class Nothing:
    """A source that must not be asked."""

    async def resolve(self, name: Any, /) -> Any:
        raise AssertionError(f"asked for {name!r}")


async def _nothing(*args: Any) -> Any:
    raise AssertionError("nothing is received, and nothing is sent")


SERVERS = {
    "uvicorn": ["-m", "uvicorn", "--factory", "--no-access-log", "--root-path", "/a", "--port"],
    "uvicorn, our protocol": [
        "-m", "uvicorn", "--factory", "--no-access-log", "--root-path", "/a",
        "--http", "downloadview_async.asgi.server:DownloadProtocol", "--port",
    ],
    "granian": ["-m", "granian", "--interface", "asgi", "--factory", "--url-path-prefix", "/a", "--port"],
    "hypercorn": ["-m", "hypercorn", "--root-path", "/a", "--bind"],
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((server, app), marks=[] if app == "starlette: route" else pytest.mark.slow)
        for server in SERVERS
        for app in ("starlette: route", "starlette: mount", "fastapi: add_route", "fastapi: mount")
    ],
    ids=lambda param: " ".join(param),
)
def server(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind, app = request.param
    port = free_port()
    path = "tests.asgi.named_app:make_from_environment"
    arguments = [f"127.0.0.1:{port}", f"{path}()"] if kind == "hypercorn" else [str(port), path]
    command = [sys.executable, *SERVERS[kind], *arguments]
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(command, port, log=log, env={"NAMED_APP": app, "NAMED_ROOT": str(root)}) as started:
        yield started


def test_a_prefix_of_a_real_server(server: Server) -> None:
    answers = []
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for name in FILES:
            for prefix in ("", "/a"):
                answer = client.get(f"{prefix}/files/{name.replace('%', '%25')}")
                if answer.status_code == 200:
                    assert answer.text == name
                    answers.append(name)
    assert answers, "one of the two is how this server is asked"


def test_bytes_that_are_not_utf_8_are_not_the_replacement_character(server: Server) -> None:
    """Servers decode both `%ff` and `%ef%bf%bd`, which is U+FFFD itself, to that character."""
    answers = []
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for prefix in (b"", b"/a"):
            for target in (b"%ff.txt", b"%FF.txt", b"%ef%bf%bd%ff.txt", b"sub%20dir/%ed%a0%80", b"%c3"):
                answer = client.get(httpx.URL("/", raw_path=prefix + b"/files/" + target))
                assert answer.status_code == 404, (prefix, target)
            for name in UNDECODED:
                answer = client.get(httpx.URL("/", raw_path=prefix + b"/files/" + quote(name).encode() + b"?%ff"))
                answers += [answer.text] * (answer.status_code == 200)
    assert answers in (UNDECODED, UNDECODED * 2)


@pytest.mark.asyncio
@pytest.mark.parametrize("app_name", APPS)
async def test_a_name_with_the_replacement_character_is_only_asked_for_by_itself(app_name: str, root: Path) -> None:
    transport = httpx.ASGITransport(app=make(app_name, root), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for name in UNDECODED:
            answer = await client.get(f"/files/{quote(name)}?x=%ff")
            assert (answer.status_code, answer.text) == (200, name) or app_name == "litestar: route"
        for target in ("%ff.txt", "%EF%BF%BD%ff.txt", "sub%20dir/%ed%a0%80", "%c3"):
            answer = await client.get(f"/files/{target}")
            assert answer.status_code == (500 if app_name == "litestar: route" else 404), target


@pytest.mark.asyncio
async def test_a_path_that_is_not_utf_8_is_missing_whatever_the_key(root: Path) -> None:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/\ufffd.txt", "root_path": "", "headers": []}
    for key in (None, "path", lambda request: request.path_params["path"]):
        download = Download(PathSource(root), key=key)
        for raw, status in (
            {b"/%ff.txt": 404, b"/%ef%bf%bd.txt": 200, b"/\xef\xbf\xbd.txt?%ff": 200, None: 200}
        ).items():
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            asked = {**scope, "raw_path": raw, "path_params": {"path": "\ufffd.txt"}}
            await download(asked, _nothing, send)
            assert sent[0]["status"] == status, (key, raw)


@pytest.mark.parametrize("prefix", ["", "/a"])
def test_a_websocket_is_refused_by_a_real_server(server: Server, prefix: str) -> None:
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get(f"{prefix}/files/abc.txt", headers=handshake).status_code == 403
