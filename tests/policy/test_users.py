"""Users with passwords: the file of `htpasswd -B`, HTTP Basic authentication, and what a guess costs."""

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio
import bcrypt
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.policy import htpasswd, login_throttle, users
from downloadview_async.policy.addresses import network_of
from downloadview_async.policy.login_throttle import LoginThrottle
from tests.live import Answer, ask, live, parse

CHALLENGE = 'Basic realm="downloads", charset="UTF-8"'
CONTENT = b"0123456789"
PASSWORDS = {"ada": "pässword", "bob": "b:b", "eve": ""}


def line_of(name: str, password: str, *, cost: int = 4, prefix: bytes = b"2b") -> str:
    hashed = bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(cost))
    return f"{name}:{hashed.replace(b'2b', prefix, 1).decode()}\n"


LINES = "".join(line_of(name, password) for name, password in PASSWORDS.items())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(CONTENT)
    path = tmp_path / "users.htpasswd"
    path.write_text(f"# the users\n\n{LINES}")
    return path


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The hashes that passwords are compared with."""
    hashes: list[bytes] = []
    check = bcrypt.checkpw

    def recorded(password: bytes, hashed: bytes) -> bool:
        hashes.append(hashed)
        return check(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", recorded)
    return hashes


@pytest.fixture
def without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "FIRST_DELAY", 0.0)


@pytest.fixture
def long_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "FIRST_DELAY", 1000.0)
    monkeypatch.setattr(login_throttle, "LONGEST_DELAY", 1000.0)


def application(file: Path, *names: str, source: dv.Source | None = None) -> Starlette:
    source = source or dv.PathSource(file.parent / "files")
    access = dv.Users(file).allow(*(names or ("*",)))
    return Starlette(
        routes=[
            Route("/files/{path:path}", dv.Download(source, access=access)),
            Route("/public/{path:path}", dv.Download(source)),
        ]
    )


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"}


async def ask_from(address: str, port: int, *credentials: str, path: str = "/files/a.txt") -> Answer:
    """Send a request from an address of the loopback, and read the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        lines = [f"GET {path} HTTP/1.1", "Host: test", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (basic(*credentials) if credentials else {}).items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        return parse(await reader.read())
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


# --- the file


@pytest.mark.parametrize("prefix", [b"2a", b"2b", b"2y"])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_names_in_a_file(tmp_path: Path, prefix: bytes, end: str) -> None:
    path = tmp_path / "users"
    path.write_bytes(f"#x\n \n{line_of('ada', 'x', prefix=prefix).strip()}{end}".encode())
    assert dv.Users(path).names == {"ada"}


HASH = bcrypt.hashpw(b"secret", b"$2b$04$abcdefghijklmnopqrstuu").decode()  # always the same: it is in names of tests


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "has no users"),
        ("# nobody\n", "has no users"),
        ("ada\n", "line 1 is not `name:hash`"),
        (f"{HASH}\n", "line 1 is not"),
        (f":{HASH}\n", "line 1 is not"),
        (f"bob:{HASH}\nada:secret\n", "line 2 is not"),
        (f"\n#\nada:{HASH[:-1]}\n", "line 3 is not"),
        (f"ada:{HASH}:secret\n", "line 1 is not"),
        ("ada:$apr1$secret$cf7ktrX9bDbc7oMBBnbiA1\n", "line 1 is not"),
        ("ada:{SHA}secretsecretsecretsecret\n", "line 1 is not"),
        (f"ada:{HASH.replace('2b', '2x')}\n", "line 1 is not"),
        (f"ada:{HASH.replace('$04$', '$31$')}\n", "line 1 has a hash whose cost"),
        (f"ada:{HASH.replace('$04$', '$03$')}\n", "line 1 has a hash whose cost"),
        (f"ada:{HASH}\nada:{HASH}\n", "line 2 has the name of an earlier line"),
        (f"\udcff:{HASH}\n", "line 1 has a name that is not UTF-8"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "users"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(dv.ConfigurationError, match="users") as error:
        dv.Users(path)
    assert problem in str(error.value)
    assert "$" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(dv.ConfigurationError, match="cannot be read"):
        dv.Users(tmp_path / "users")


def test_what_users_refuse(file: Path) -> None:
    with pytest.raises(dv.ConfigurationError, match="there is no user 'cay'"):
        dv.Users(file).allow("ada", "cay")
    with pytest.raises(dv.ConfigurationError, match="needs a name"):
        dv.Users(file).allow()
    with pytest.raises(dv.ConfigurationError, match="realm is"):
        dv.Users(file, realm='a"b')


def test_users_need_bcrypt(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    with pytest.raises(dv.ConfigurationError, match="install downloadview_async with its extra `auth`"):
        dv.Users(file)


@pytest.mark.asyncio
async def test_a_file_of_htpasswd(file: Path, without_delay: None) -> None:
    program = shutil.which("htpasswd")
    if program is None:
        pytest.skip("htpasswd is not installed (apache2-utils)")
    for option, name, password in [("-cbB", "ada", "pässword"), ("-bB", "bob", "x" * 100)]:
        subprocess.run([program, option, "-C", "4", str(file), name, password], check=True, capture_output=True)
    async with live(application(file)) as port:
        for name, password, status in [
            ("ada", "pässword", 200),
            ("ada", "password", 401),
            ("bob", "x" * 100, 200),
            ("bob", "x" * 72 + "y", 200),
            ("bob", "x" * 71, 401),
        ]:
            assert (await ask(port, "/files/a.txt", headers=basic(name, password))).status == status, name


@pytest.mark.asyncio
async def test_a_file_that_changes(
    file: Path, without_delay: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(htpasswd, "CHECK_SECONDS", 0.0)

    async def status(name: str, password: str) -> int:
        return (await ask(port, "/files/a.txt", headers=basic(name, password))).status

    async with live(application(file)) as port:
        assert await status("ada", PASSWORDS["ada"]) == 200
        file.write_text(line_of("ada", "other") + line_of("cay", "x"))
        assert await status("ada", PASSWORDS["ada"]) == 401
        assert await status("ada", "other") == 200
        assert await status("cay", "x") == 200
        with caplog.at_level(logging.ERROR, "downloadview_async"):
            file.write_text(f"{line_of('cay', 'y')}bob:secret\n")
            assert await status("cay", "x") == 200
            assert await status("cay", "y") == 401
            file.unlink()
            assert await status("ada", "other") == 200
        replaced = file.with_name("new")
        replaced.write_text(line_of("cay", "z"))
        os.replace(replaced, file)
        assert await status("ada", "other") == 401
        assert await status("cay", "z") == 200
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(messages) == 2
    assert "line 2 is not" in messages[0]
    assert "No such file" in messages[1]
    assert "secret" not in caplog.text


@pytest.mark.asyncio
async def test_a_change_that_the_time_of_the_file_does_not_show(
    file: Path, without_delay: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(htpasswd, "CHECK_SECONDS", 0.0)
    now = time.time_ns()
    file.write_text(line_of("ada", "first"))
    os.utime(file, ns=(now, now))
    async with live(application(file)) as port:
        assert (await ask(port, "/files/a.txt", headers=basic("ada", "first"))).status == 200
        file.write_text(line_of("ada", "other"))
        os.utime(file, ns=(now, now))
        assert (await ask(port, "/files/a.txt", headers=basic("ada", "first"))).status == 401
        assert (await ask(port, "/files/a.txt", headers=basic("ada", "other"))).status == 200


@pytest.mark.asyncio
async def test_a_password_that_is_replaced_while_it_is_checked_is_not_kept(
    file: Path, without_delay: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(htpasswd, "CHECK_SECONDS", 0.0)
    kept = dv.Users(file)
    check = bcrypt.checkpw

    def replaced(password: bytes, hashed: bytes) -> bool:
        file.write_text(line_of("ada", "other"))
        kept._file.refresh()  # as another request does at this moment
        return check(password, hashed)

    scope = {"type": "http", "client": None, "headers": [(b"authorization", b"Basic " + b64encode(b"ada:secret"))]}
    file.write_text(line_of("ada", "secret"))
    monkeypatch.setattr(bcrypt, "checkpw", replaced)
    assert await kept.authenticate(Request(scope)) == "ada"
    with pytest.raises(dv.AuthenticationRequired):
        await kept.authenticate(Request(scope))


# --- what clients get


@pytest.mark.asyncio
async def test_a_user_has_the_file(file: Path, without_delay: None) -> None:
    async with live(application(file, "ada", "bob")) as port:
        for method, body in (("GET", CONTENT), ("HEAD", b"")):
            answer = await ask(port, "/files/a.txt", headers=basic("ada", PASSWORDS["ada"]), method=method)
            assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, body, "private")
            assert "www-authenticate" not in answer.headers
        part = await ask(port, "/files/a.txt", headers={"Range": "bytes=0-1", **basic("bob", PASSWORDS["bob"])})
        assert (part.status, part.body) == (206, b"01")
        for target in ("/files/a.txt", "/files/missing", "/files/a.txt?x=1"):
            for headers in ({}, basic("ada", "wrong"), basic("nobody", "wrong"), basic("nobody", "")):
                answer = await ask(port, target, headers=headers)
                assert (answer.status, answer.body) == (401, b"Unauthorized")
                assert answer.headers["www-authenticate"] == CHALLENGE
                assert answer.headers["cache-control"] == "private, no-store"
        denied = await ask(port, "/files/a.txt", headers=basic("eve", PASSWORDS["eve"]))
        missing = await ask(port, "/files/missing", headers=basic("ada", PASSWORDS["ada"]))
    assert (denied.status, denied.body) == (missing.status, missing.body) == (404, b"Not Found")
    assert "www-authenticate" not in denied.headers


def encoded(text: bytes) -> str:
    return b64encode(text).decode()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "value, status",
    [
        (f"Basic {encoded(b'bob:b:b')}", 200),
        (f"bAsIc   {encoded(b'bob:b:b')} ", 200),
        (encoded(b"bob:b:b"), 401),
        (f"Bearer {encoded(b'bob:b:b')}", 401),
        (f"Basic {encoded(b'bob:b:b')}!", 401),
        (f"Basic {encoded(b'bob:b:b')[:-1]}", 401),
        (f"Basic {encoded(b'bob')}", 401),
        (f"Basic {encoded(b':b:b')}", 401),
        (f"Basic {encoded(bytes([255]) + b':b:b')}", 401),
        (f"Basic {encoded(b'bob:b:b' + bytes(1))}", 401),
        ("Basic", 401),
        ("Basic \u00ff", 401),
        (f"Basic {encoded(b'bob:b:b')}\r\nAuthorization: Basic {encoded(b'bob:b:b')}", 401),
    ],
)
async def test_the_header_of_a_request(file: Path, checked: list[bytes], value: str, status: int) -> None:
    async with live(application(file)) as port:
        assert (await ask(port, "/files/a.txt", headers={"Authorization": value})).status == status
    assert len(checked) == int(status == 200)  # what has not the form of a name and a password is not checked


@pytest.mark.asyncio
async def test_users_and_links(file: Path, without_delay: None) -> None:
    signer = dv.URLSigner({"2026a": bytes(32)})
    access = [dv.SignedLinks(signer), dv.Users(file).allow("ada")]
    download = dv.Download(dv.PathSource(file.parent / "files"), access=access)
    link = signer.sign("/files/a.txt")
    async with live(Starlette(routes=[Route("/files/{path:path}", download)])) as port:
        for target, headers, status in [
            (link, {}, 200),
            ("/files/a.txt", basic("ada", PASSWORDS["ada"]), 200),
            (f"{link}x", basic("ada", PASSWORDS["ada"]), 200),
            ("/files/a.txt", {}, 401),
            (f"{link}x", {}, 403),
            ("/files/a.txt", basic("bob", PASSWORDS["bob"]), 404),
        ]:
            answer = await ask(port, target, headers=headers)
            assert answer.status == status, target
            assert ("www-authenticate" in answer.headers) is (status == 401)


@pytest.mark.asyncio
async def test_a_user_is_a_dependency_of_fastapi(file: Path, without_delay: None) -> None:
    app = FastAPI(exception_handlers={dv.FileError: dv.download_error})
    kept = dv.Users(file)

    @app.get("/me")
    async def me(user: Annotated[str, Depends(kept.authenticate)]) -> str:
        return user

    async with live(app) as port:
        assert (await ask(port, "/me", headers=basic("bob", PASSWORDS["bob"]))).body == b'"bob"'
        answer = await ask(port, "/me", headers=basic("bob", "wrong"))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, CHALLENGE)


# --- what a check costs


@pytest.mark.asyncio
async def test_a_name_that_is_unknown_costs_as_much_as_one_that_is_known(
    file: Path, checked: list[bytes], without_delay: None
) -> None:
    file.write_text("".join(line_of(f"user{number}", "x", cost=5) for number in range(4)))
    async with live(application(file)) as port:
        for name in ("user1", "nobody", "nobody", "", "*", "user1\u0301"):
            await ask(port, "/files/a.txt", headers=basic(name, "x" * 40_000))
    assert [hashed[:7] for hashed in checked] == [b"$2b$05$"] * 5  # without a name, nothing is checked
    assert checked[1] == checked[2]


@pytest.mark.asyncio
async def test_the_password_of_another_user_is_none_for_a_name_that_is_unknown(file: Path, without_delay: None) -> None:
    file.write_text(line_of("ada", "x"))
    async with live(application(file)) as port:
        assert (await ask(port, "/files/a.txt", headers=basic("nobody", "x"))).status == 401


@pytest.mark.asyncio
async def test_a_good_password_is_checked_once_a_minute(
    file: Path, checked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with live(application(file)) as port:
        headers = basic("ada", PASSWORDS["ada"])
        answers = await asyncio.gather(*(ask(port, "/files/a.txt", headers=headers) for _ in range(16)))
        assert {answer.status for answer in answers} == {200}
        assert len(checked) == 1
        monkeypatch.setattr(users, "KEEP_SECONDS", 0.0)
        monkeypatch.setattr(users, "MAX_KEPT", 1)
        assert (await ask(port, "/files/a.txt", headers=basic("bob", PASSWORDS["bob"]))).status == 200
        assert len(checked) == 2
        assert (await ask(port, "/files/a.txt", headers=headers)).status == 200  # bob has taken the place of ada
        assert (await ask(port, "/files/a.txt", headers=headers)).status == 200
        assert len(checked) == 4


@pytest.mark.asyncio
async def test_what_is_kept_is_not_the_password(file: Path) -> None:
    kept = dv.Users(file)
    scope = {
        "type": "http",
        "client": None,
        "headers": [(name.lower().encode(), value.encode()) for name, value in basic("bob", "b:b").items()],
    }
    assert await kept.authenticate(Request(scope)) == "bob"
    keys = list(kept._kept)
    assert [len(key) for key in keys] == [32]
    assert await dv.Users(file).authenticate(Request(scope)) == "bob"
    assert b"b:b" not in keys[0]


@pytest.mark.asyncio
async def test_a_hundred_wrong_passwords_do_not_stop_other_downloads(
    file: Path, checked: list[bytes], long_delay: None
) -> None:
    app = application(file)
    async with live(app) as port:
        guesses = [asyncio.create_task(ask_from("127.0.0.1", port, "ada", f"guess {n}")) for n in range(100)]
        await until(lambda: sum(guess.done() for guess in guesses) >= 100 - login_throttle.MAX_WAITING)
        refused = [guess.result().status for guess in guesses if guess.done()]
        assert (refused.count(401), set(refused)) == (1, {401, 503})
        for path in ("/public/a.txt", "/files/a.txt"):
            assert (await ask_from("127.0.0.2", port, "ada", PASSWORDS["ada"], path=path)).body == CONTENT
        assert (await ask_from("127.0.0.1", port, "ada", PASSWORDS["ada"])).body == CONTENT  # it is kept
        assert (await ask_from("127.0.0.1", port, path="/public/a.txt")).body == CONTENT
        for guess in guesses:
            guess.cancel()
        await asyncio.gather(*guesses, return_exceptions=True)
    assert len(checked) == 2


@pytest.mark.asyncio
async def test_a_body_that_is_repeated_for_ever_is_not_read_for_ever(file: Path) -> None:
    """As by a middleware that has read the body, and gives it again each time."""
    messages = itertools.count()

    async def receive() -> dict[str, Any]:
        if next(messages) >= 1000:
            raise RuntimeError("endless")
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"authorization", basic("ada", PASSWORDS["ada"])["Authorization"].encode())]
    request = Request({"type": "http", "method": "GET", "headers": headers, "client": ("192.0.2.1", 1)}, receive)
    assert await dv.Users(file).authenticate(request) == "ada"
    assert next(messages) <= 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "http, resets", [("h11", False), ("httptools", False), (DownloadProtocol, True)]
)  # to DownloadProtocol, a client that closes may be one that has half-closed
async def test_a_client_that_leaves_ends_its_wait(file: Path, long_delay: None, http: Any, resets: bool) -> None:
    kept = dv.Users(file)
    download = dv.Download(dv.PathSource(file.parent / "files"), access=kept.allow("*"))
    async with live(Starlette(routes=[Route("/files/{path:path}", download)]), http=http) as port:
        assert (await ask(port, "/files/a.txt", headers=basic("ada", "wrong"))).status == 401
        clients = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(3)]
        for client in clients:
            fields = "".join(f"{name}: {value}\r\n" for name, value in basic("ada", PASSWORDS["ada"]).items())
            client.write(f"GET /files/a.txt HTTP/1.1\r\nHost: test\r\n{fields}\r\n".encode())
        await until(lambda: bool(kept._throttle._turns) and kept._throttle._turns["127.0.0.1"].requests == 3)
        for client in clients:
            if resets:
                on, seconds = 1, 0
                client.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, seconds)
                )
            client.close()
        await until(lambda: not kept._throttle._turns)


@pytest.mark.asyncio
async def test_two_passwords_are_checked_at_once_and_few_wait(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "MAX_QUEUE", 3)
    may_go, running, most, lock = threading.Event(), 0, 0, threading.Lock()
    check = bcrypt.checkpw

    def held(password: bytes, hashed: bytes) -> bool:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        may_go.wait(20)
        with lock:
            running -= 1
        return check(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", held)
    kept = dv.Users(file)
    download = dv.Download(dv.PathSource(file.parent / "files"), access=kept.allow("*"))
    async with live(Starlette(routes=[Route("/files/{path:path}", download)])) as port:
        clients = [
            asyncio.create_task(ask_from(f"127.0.0.{n}", port, name, PASSWORDS[name]))
            for n, name in enumerate(("ada", "bob", "eve", "ada", "bob"), 2)
        ]
        await until(lambda: kept._in_queue == 5 and running == 2)
        late = await ask_from("127.0.0.9", port, "ada", PASSWORDS["ada"])
        assert (late.status, late.headers["retry-after"]) == (503, "5")
        assert "127.0.0.9" not in kept._throttle._failures
        may_go.set()
        assert {answer.status for answer in await asyncio.gather(*clients)} == {200}
        assert (await ask_from("127.0.0.9", port, "ada", PASSWORDS["ada"])).status == 200  # it has not failed before
    assert most == 2


# --- addresses


@pytest.mark.parametrize(
    "client, network",
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        ("", ""),
        (None, ""),
    ],
)
def test_the_network_of_a_client(client: str | None, network: str) -> None:
    assert network_of(client) == network


@pytest.mark.asyncio
async def test_delays_grow_for_one_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now, delays = 1000.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        delays.append(seconds)
        now += seconds

    monkeypatch.setattr(anyio, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    tries = LoginThrottle()
    for _ in range(8):
        await tries.begin("a")
    assert delays == [0.5, 1, 2, 4, 8, 16, 16]
    await tries.begin("b")
    assert len(delays) == 7
    tries.succeeded("b")
    await tries.begin("b")
    assert len(delays) == 7
    now += 10
    await tries.begin("a")
    assert delays[7:] == [6]
    tries.succeeded("a")
    await tries.begin("a")
    assert delays[8:] == [16]  # a success takes nothing from earlier failures
    now += login_throttle.FORGET_AFTER
    await tries.begin("a")
    assert len(delays) == 9


@pytest.mark.asyncio
async def test_few_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "MAX_ADDRESSES", 10)
    tries = LoginThrottle()
    for number in range(100):
        await tries.begin(f"192.0.2.{number}")
    assert list(tries._failures) == [f"192.0.2.{number}" for number in range(90, 100)]


@pytest.mark.asyncio
async def test_a_turn_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "PATIENCE", 0.01)
    tries: Any = LoginThrottle()

    async def second() -> None:
        async with tries.turn("a"):
            raise AssertionError

    async with tries.turn("a"):
        with pytest.raises(dv.SourceUnavailable):
            await asyncio.create_task(second())
    assert tries._turns == {}
