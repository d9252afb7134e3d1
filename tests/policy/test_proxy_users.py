"""Users whose names a trusted proxy has checked: who is believed, and which headers."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

import downloadview_async as dv
from tests.live import Answer, ask, live, parse, uvicorn_for

CONTENT = b"0123456789"
PROXY = "127.0.0.1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(CONTENT)
    return tmp_path


def inner(root: Path, *names: str, trusted: tuple[str, ...] = (PROXY,)) -> ASGIApp:
    access = dv.ProxyUsers("X-Remote-User", trusted=trusted).allow(*(names or ("*",)))
    download = dv.Download(dv.PathSource(root), access=access)
    return Starlette(routes=[Route("/files/{path:path}", download), Mount("/mounted", download)])


def application(root: Path, *names: str, trusted: tuple[str, ...] = (PROXY,)) -> ASGIApp:
    return dv.KeepPeer(inner(root, *names, trusted=trusted))


async def ask_with(port: int, *fields: bytes, address: str = PROXY) -> Answer:
    """Send a request with header fields as they are, from an address of the loopback."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        lines = [b"GET /files/a.txt HTTP/1.1", b"Host: test", b"Connection: close", *fields]
        writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        return parse(await reader.read())
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.asyncio
@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(
    "fields, status",
    [
        ([b"X-Remote-User: ada"], 200),
        ([b"x-remote-user:  ada "], 200),
        ([b"X-REMOTE-USER: ad\xc3\xa4"], 200),
        ([], 404),
        ([b"X-Remote-User: "], 404),
        ([b"X-Remote-User: *"], 404),
        ([b"X-Remote-User: \xff"], 404),
        ([b"X-Remote-User: ada, bob"], 404),
        ([b"X-Remote-User: ada", b"X-Remote-User: ada"], 404),
        ([b"X-Remote-User: ada", b"x-remote-user: bob"], 404),
        ([b"X-Remote-User: ada", b"X_Remote_User: bob"], 404),
        ([b"X_Remote-User: bob", b"X-Remote-User: ada"], 404),
        ([b"X_Remote_User: ada"], 404),
        ([b"X-Remote_User: ada"], 404),
        ([b"Remote-User: ada"], 404),
    ],
)
async def test_which_headers_are_believed(root: Path, http: Any, fields: list[bytes], status: int) -> None:
    async with live(application(root), http=http) as port:
        answer = await ask_with(port, *fields)
        assert (answer.status, "www-authenticate" in answer.headers) == (status, False)


@pytest.mark.asyncio
async def test_only_a_trusted_proxy_is_believed(root: Path) -> None:
    for trusted, address, status in [
        ((PROXY,), "127.0.0.1", 200),
        ((PROXY,), "127.0.0.2", 404),
        (("127.0.0.2", "10.0.0.0/8"), "127.0.0.1", 404),
        (("10.0.0.0/8", "127.0.0.0/30"), "127.0.0.3", 200),
        (("::1",), "127.0.0.1", 404),
        (("*",), "127.0.0.2", 200),
    ]:
        async with live(application(root, trusted=trusted)) as port:
            answer = await ask_with(port, b"X-Remote-User: ada", address=address)
            assert answer.status == status, (trusted, address)


@pytest.mark.asyncio
async def test_a_forwarded_address_does_not_make_a_client_the_proxy_nor_the_proxy_a_client(root: Path) -> None:
    everyone = dv.KeepPeer(ProxyHeadersMiddleware(inner(root), "*"))  # type: ignore[arg-type]
    async with live(everyone, proxy_headers=False) as port:
        for forwarded in (b"127.0.0.1", b"203.0.113.9", b"127.0.0.1, 127.0.0.1"):
            fields = (b"X-Remote-User: ada", b"X-Forwarded-For: " + forwarded)
            assert (await ask_with(port, *fields, address="127.0.0.2")).status == 404
            assert (await ask_with(port, *fields)).status == 200


@pytest.mark.asyncio
async def test_which_users_are_allowed(root: Path) -> None:
    async with live(application(root, "ada", "bob")) as port:
        for user, status in [("ada", 200), ("bob", 200), ("eve", 404), ("Ada", 404)]:
            for path in ("/files/a.txt", "/mounted/a.txt"):
                assert (await ask(port, path, headers={"X-Remote-User": user})).status == status
        answer = await ask(port, "/files/a.txt", headers={"X-Remote-User": "ada"})
        assert (answer.body, answer.headers["cache-control"]) == (CONTENT, "private")


@pytest.mark.asyncio
async def test_without_the_address_of_the_peer_nobody_is_believed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with live(inner(root)) as port:
        assert (await ask(port, "/files/a.txt", headers={"X-Remote-User": "ada"})).status == 503
    assert "put KeepPeer around the application" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("trusted, status", [((PROXY,), 404), (("*",), 200)])
async def test_a_unix_socket_has_no_address(root: Path, tmp_path: Path, trusted: tuple[str, ...], status: int) -> None:
    path = str(tmp_path / "socket")
    async with uvicorn_for(application(root, trusted=trusted), uds=path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /files/a.txt HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Remote-User: ada\r\n\r\n")
        assert parse(await reader.read()).status == status
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    "header, trusted",
    [
        ("X_Remote_User", [PROXY]),
        ("", [PROXY]),
        ("X-Remote-User:", [PROXY]),
        ("X-Remote-User-", [PROXY]),
        ("X-Remote-User", PROXY),
        ("X-Remote-User", []),
        ("X-Remote-User", ["proxy.example.org"]),
        ("X-Remote-User", ["10.0.0.1/8"]),
        ("X-Remote-User", [""]),
    ],
)
def test_what_is_refused(header: str, trusted: Any) -> None:
    with pytest.raises(dv.ConfigurationError):
        dv.ProxyUsers(header, trusted=trusted)


def test_a_name_is_needed() -> None:
    with pytest.raises(dv.ConfigurationError, match="needs a name"):
        dv.ProxyUsers("X-Remote-User", trusted=["*"]).allow()
