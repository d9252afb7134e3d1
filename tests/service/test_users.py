"""Routes for users, in the service: its settings, and what a running service answers."""

import asyncio
import base64
import contextlib
import sys
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from downloadview_async import ConfigurationError
from downloadview_async.policy import login_throttle
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.proxy_config import config_for
from tests.live import Answer, ask, live, parse
from tests.servers import free_port, serving
from tests.service.loading import refusal

COMMAND = [sys.executable, "-m", "downloadview_async.cli", "serve"]
SETTINGS = """
[users]
file = "users.htpasswd"
realm = "reports"
[links]
keys = "links.keys"
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/ada/{path:path}"
source = "files"
access = ["user:ada"]
example = "a.txt"
[[routes]]
path = "/some/{path:path}"
source = "files"
access = ["user:ada", "signed", "user:bob smith"]
[[routes]]
path = "/all/{path:path}"
source = "files"
access = ["user:*"]
hide = [".*"]
[[routes]]
path = "/public/{path:path}"
source = "files"
cors = { origins = ["https://app.example.org"], credentials = true }
[[routes]]
path = "/script/{path:path}"
source = "files"
access = ["user:*"]
cors = { origins = ["https://app.example.org"], credentials = true }
[[routes]]
path = "/reader/{path:path}"
source = "files"
access = ["user:*"]
cors = { origins = ["https://app.example.org"] }
"""
HEADER = SETTINGS.replace('file = "users.htpasswd"\nrealm = "reports"', 'header = "X-Remote-User"')


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    for name in ("a.txt", ".env"):
        (tmp_path / "files" / name).write_bytes(b"content")
    (tmp_path / "downloadview.toml").write_text(SETTINGS)
    (tmp_path / "links.keys").write_text(f"2026b {'s' * 32}\n")
    lines = [f"{name}:{bcrypt.hashpw(name.encode(), bcrypt.gensalt(4)).decode()}\n" for name in ("ada", "bob smith")]
    (tmp_path / "users.htpasswd").write_text("".join(lines))
    return tmp_path


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


async def ask_from(address: str, port: int, path: str, headers: dict[str, str]) -> Answer:
    """Send a request from an address of the loopback, and read the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        lines = [f"GET {path} HTTP/1.1", "Host: test", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        return parse(await reader.read())
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.asyncio
async def test_the_service_asks_for_a_password(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "FIRST_DELAY", 0.0)
    ada, bob = basic("ada", "ada"), basic("bob smith", "bob smith")
    async with live(build(load_settings(directory / "downloadview.toml", environ={}))) as port:
        for path, headers, status in [
            ("/ada/a.txt", ada, 200),
            ("/ada/a.txt", bob, 404),
            ("/ada/a.txt", {}, 401),
            ("/ada/a.txt", basic("ada", "bob"), 401),
            ("/ada/missing", {}, 401),
            ("/ada/missing", ada, 404),
            ("/some/a.txt", ada, 200),
            ("/some/a.txt", bob, 200),
            ("/some/a.txt", {}, 401),
            ("/some/a.txt?k=2026b", {}, 403),
            ("/all/a.txt", bob, 200),
            ("/all/a.txt", {"X-Remote-User": "ada"}, 401),
            ("/all/.env", {}, 404),
            ("/public/a.txt", {}, 200),
            ("/public/a.txt", basic("ada", "bob"), 200),
        ]:
            for method in ("GET", "HEAD"):
                answer = await ask(port, path, headers=headers, method=method)
                assert answer.status == status, (path, headers)
                challenge = 'Basic realm="reports", charset="UTF-8"' if status == 401 else None
                assert answer.headers.get("www-authenticate") == challenge
        page = (await ask(port, "/")).body.decode()
    assert 'href="./ada/a.txt"' not in page


@pytest.mark.asyncio
async def test_a_name_in_a_header_is_not_believed_under_another_server(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "downloadview.toml").write_text(HEADER)
    async with live(build(load_settings(directory / "downloadview.toml", environ={}))) as port:
        assert (await ask(port, "/all/a.txt", headers={"X-Remote-User": "ada"})).status == 503
        assert (await ask(port, "/public/a.txt", headers={"X-Remote-User": "ada"})).status == 200
    assert "start the service with `downloadview serve`" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("proxy", ["127.0.0.1", "127.0.0.2"])
async def test_a_name_in_a_header_is_believed_from_the_proxy_alone(directory: Path, workers: str, proxy: str) -> None:
    (directory / "downloadview.toml").write_text(HEADER)
    port = free_port()
    command = [*COMMAND, "--config", "downloadview.toml", "--port", str(port), "--workers", workers]
    command += [] if proxy == "127.0.0.1" else ["--forwarded-allow-ips", proxy]
    client = {"127.0.0.1": "127.0.0.2", "127.0.0.2": "127.0.0.1"}[proxy]
    with serving(command, port, log=directory / "log", cwd=directory) as server:
        for address, status in ((proxy, 200), (client, 404)):
            for forwarded in ({}, {"X-Forwarded-For": "203.0.113.9"}, {"X-Forwarded-For": proxy}):
                headers = {"X-Remote-User": "ada", **forwarded}
                assert (await ask_from(address, port, "/ada/a.txt", headers)).status == status, headers
        assert (await ask_from(proxy, port, "/ada/a.txt", {"X-Remote-User": "eve"})).status == 404
        assert (await ask_from(proxy, port, "/ada/a.txt", {"X_Remote_User": "ada"})).status == 404
        assert (await ask_from(client, port, "/public/a.txt", {"X-Remote-User": "ada"})).status == 200
        server.wait_for_log(" 203.0.113.9 ", times=1)  # the log still has the address of the client


@pytest.mark.asyncio
async def test_a_password_over_a_socket(directory: Path) -> None:
    port = free_port()
    with serving([*COMMAND, "--port", str(port)], port, log=directory / "log", cwd=directory) as server:
        assert (await ask(port, "/ada/a.txt", headers=basic("ada", "ada"))).body == b"content"
        assert (await ask(port, "/ada/a.txt", headers=basic("ada", "wrong"))).status == 401
        assert basic("ada", "wrong")["Authorization"] not in server.log


def test_the_printed_configuration_removes_the_header_of_a_client(directory: Path) -> None:
    environ = {"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"}
    options: dict[str, Any] = {"listen": "127.0.0.1:8080", "service": None, "relative_to": None}
    for text, times in ((HEADER, 1), (SETTINGS, 0)):
        (directory / "downloadview.toml").write_text(text)
        settings = load_settings(directory / "downloadview.toml", environ=environ)
        assert config_for(settings, "nginx", **options).count('proxy_set_header X-Remote-User "";') == times


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ('[users]\nfile = "users.htpasswd"\nrealm = "reports"\n', "", "routes[0].access: there are no users: add a "),
        ('file = "users.htpasswd"\n', "", "users: give either a file or a header"),
        ('realm = "reports"', 'header = "X-Remote-User"', "users: give either a file or a header"),
        ('realm = "reports"', 'realm = "a\\"b"', "users.realm"),
        ('realm = "reports"', 'realms = "a"', "users.realms: unknown key: did you mean 'realm'?"),
        ('"users.htpasswd"', '"no.htpasswd"', "users.file: '{directory}/no.htpasswd' cannot be read"),
        ('"users.htpasswd"', '"links.keys"', "users.file: '{directory}/links.keys': line 1 is not `name:hash`"),
        ("user:ada", "user:eve", "routes[0].access: there is no user 'eve' in the file of the users"),
        ("user:ada", "user:", "routes[0].access"),
        ("user:ada", "user:a:b", "routes[0].access"),
    ],
)
def test_settings_that_are_refused(directory: Path, old: str, new: str, problem: str) -> None:
    assert old in SETTINGS
    error = refusal(directory, SETTINGS.replace(old, new))
    assert problem.format(directory=directory) in error
    assert "ssss" not in error


@pytest.mark.parametrize(
    "header, trusted, problem",
    [
        ("X_Remote_User", "127.0.0.1", "users.header"),
        ("X-Remote-User", "proxy.example.org", "server.forwarded_allow_ips: 'proxy.example.org' is not a trusted"),
        ("X-Remote-User", "", "server.forwarded_allow_ips: trusted is empty"),
    ],
)
def test_headers_that_are_refused(directory: Path, header: str, trusted: str, problem: str) -> None:
    text = HEADER.replace("X-Remote-User", header) + f'[server]\nforwarded_allow_ips = "{trusted}"\n'
    (directory / "downloadview.toml").write_text(text)
    with pytest.raises(ConfigurationError) as error:
        build(load_settings(directory / "downloadview.toml", environ={}))
    assert problem in str(error.value)


def test_users_in_a_variable(directory: Path) -> None:
    environ = {"DOWNLOADVIEW_USERS__FILE": "other.htpasswd"}
    (directory / "users.htpasswd").rename(directory / "other.htpasswd")
    build(load_settings(directory / "downloadview.toml", environ=environ))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "settings, path, is_allowed",
    [
        pytest.param(SETTINGS, "/script/a.txt", True, id="passwords and credentials"),
        pytest.param(SETTINGS, "/reader/a.txt", False, id="no credentials"),
        pytest.param(SETTINGS, "/public/a.txt", False, id="no users"),
        pytest.param(HEADER, "/script/a.txt", False, id="users whom a proxy has checked"),
    ],
)
async def test_a_script_of_another_site_may_send_a_password(
    directory: Path, settings: str, path: str, is_allowed: bool
) -> None:
    (directory / "downloadview.toml").write_text(settings)
    preflight = {
        "Origin": "https://app.example.org",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization,range",
    }
    async with live(build(load_settings(directory / "downloadview.toml", environ={}))) as port:
        answer = await ask(port, path, method="OPTIONS", headers=preflight)
    allowed = [name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")]
    assert (answer.status, "authorization" in allowed) == ((200, True) if is_allowed else (400, False))
