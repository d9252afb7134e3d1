"""Routes that not everyone may use, in the service: its settings, its commands, and what a running service answers."""

import asyncio
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from downloadview_async.cli import main
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from tests.live import ask, live
from tests.service.loading import refusal

SECRET = "s" * 32
SETTINGS = """
[links]
keys = "links.keys"
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/signed/{path:path}"
source = "files"
access = ["signed"]
cache_control = "max-age=60"
example = "a.txt"
[[routes]]
path = "/hooked/{path:path}"
source = "files"
access = ["hook:access_rules:may_read", "signed"]
hide = [".*", "*.KEY"]
[[routes]]
path = "/public/{path:path}"
source = "files"
hide = [".*"]
"""
SECURE = """
[[routes]]
path = "/secure/{path:path}"
source = "files"
access = ["secure_link"]
"""
HOOK = """
async def may_read(request, name):
    return request.headers.get("x-user") == "ada"
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.txt", "Q3 report.pdf", ".env", ".git/config", "sub/.hidden/a.txt", "server.key", "sub/b.txt"):
        file = tmp_path / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"content")
    (tmp_path / "downloadview.toml").write_text(SETTINGS)
    (tmp_path / "links.keys").write_text(f"# the keys\n\n2026b {SECRET}\n2026a {SECRET[::-1]}x\n")
    (tmp_path / "access_rules.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOWNLOADVIEW_CONFIG", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def printed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip("\n")


def refused(*arguments: str, status: int = 2) -> str:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


# --- what the service answers


@pytest.mark.asyncio
async def test_the_service_decides(directory: Path) -> None:
    link = printed("sign", "/signed/Q3 report.pdf", "--filename", "report.pdf", "--inline")
    async with live(build(load_settings("downloadview.toml", environ={}))) as port:
        answer = await ask(port, link)
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, b"content", "private, no-store")
        assert answer.headers["content-disposition"] == 'inline; filename="report.pdf"'
        for path, headers, status in [
            ("/signed/a.txt", {}, 403),
            (link.replace("Q3%20report.pdf", "a.txt"), {}, 403),
            (link + "&x=1", {}, 403),
            ("/hooked/a.txt", {"X-User": "ada"}, 200),
            ("/hooked/a.txt", {"X-User": "bob"}, 404),
            ("/hooked/sub/b.txt", {"X-User": "ada"}, 200),
            ("/hooked/.env", {"X-User": "ada"}, 404),
            ("/hooked/server.key", {"X-User": "ada"}, 404),
            ("/public/a.txt", {}, 200),
            ("/public/.env", {}, 404),
            ("/public/.git/config", {}, 404),
            ("/public/sub/.hidden/a.txt", {}, 404),
            ("/public/./a.txt", {}, 200),
            ("/public/./.env", {}, 404),
            ("/public/%2eenv", {}, 404),
            ("/public/server.key", {}, 200),
        ]:
            assert (await ask(port, path, headers=headers)).status == status, path
        page = (await ask(port, "/")).body.decode()
    assert "/public/" in page
    assert 'href="./signed/a.txt"' not in page


@pytest.mark.asyncio
async def test_a_link_below_a_root_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOADVIEW_SERVER__ROOT_PATH", "/downloads")
    link = printed("sign", "/signed/a.txt", "--base", "https://example.org")
    assert link.startswith("https://example.org/downloads/signed/a.txt?")
    shown = await asyncio.to_thread(printed, "verify", link)
    assert shown.startswith("path: /downloads/signed/a.txt\n")
    passed_on = link.removeprefix("https://example.org/downloads")
    async with live(build(load_settings("downloadview.toml", environ=os.environ)), root_path="/downloads") as port:
        assert (await ask(port, passed_on)).status == 200
        assert (await ask(port, passed_on.replace("a.txt", "b.txt"))).status == 403


@pytest.mark.asyncio
async def test_what_is_hidden_is_the_404_of_a_missing_file(directory: Path) -> None:
    async with live(build(load_settings("downloadview.toml", environ={}))) as port:
        hidden, missing = await ask(port, "/public/.env"), await ask(port, "/public/no")
    assert hidden.body == missing.body
    assert {**hidden.headers, "date": ""} == {**missing.headers, "date": ""}


@pytest.mark.asyncio
@pytest.mark.parametrize("options, status", [([], 404), (["--hidden"], 200)])
async def test_a_directory_is_served_without_its_hidden_files(
    directory: Path, options: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("downloadview_async.cli.run", lambda settings, announce, **_: given.update(settings=settings))
    assert run("serve", "files", *options).exit_code == 0
    async with live(build(given["settings"])) as port:
        assert (await ask(port, "/files/.env")).status == status
        assert (await ask(port, "/files/a.txt")).status == 200
        listing = (await ask(port, "/files/?format=json")).body
        assert (b'".env"' in listing) == (status == 200)


# --- the commands


def test_a_new_key_is_a_line_of_the_file(directory: Path) -> None:
    line = printed("keys")
    assert re.fullmatch(r"\d{8}-[0-9a-f]{4} [A-Za-z0-9_-]{43}", line)
    assert printed("keys") != line
    (directory / "links.keys").write_text(f"{line}\n2026a {SECRET}\n")
    assert f"?k={line.split()[0]}&" in printed("sign", "/signed/a.txt")


@pytest.mark.parametrize("variable", [f"2026b {SECRET}", f"2026b {SECRET}\n2026a {SECRET}", "links.keys"])
def test_the_keys_may_be_in_a_variable(directory: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOADVIEW_LINKS__KEYS", variable)
    assert "?k=2026b&" in printed("sign", "/signed/a.txt")


@pytest.mark.parametrize("keys", ["2026b too/short", "2026b a secret with spaces\n2026a and another one"])
def test_a_wrong_key_in_a_variable_is_not_shown(directory: Path, keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOADVIEW_LINKS__KEYS", keys)
    problem = refused("sign", "/signed/a.txt")
    assert "nor a line `id secret`" in problem
    assert not any(word in problem for word in ("short", "spaces", "another"))


def test_a_link_to_a_folder(directory: Path) -> None:
    link = printed("sign", "/signed/sub/", "--below", "--base", "https://example.org/dl")
    for name in ("", "a.txt", "deeper/"):
        url = link.replace("/sub/?", f"/sub/{name}?sort=size&")
        shown = dict(
            line.split(": ") for line in printed("verify", url, "--base", "https://example.org/dl").splitlines()
        )
        assert (shown["path"], shown["folder"]) == (f"/signed/sub/{name}", "/signed/sub/")
    for wrong in ("/signed/a.txt", "/signed/sub/..%2Fa.txt", "/signed/sub%2Fa.txt", "/signed/sub"):
        url = link.replace("/signed/sub/", wrong)
        assert "403 Forbidden" in refused("verify", url, "--base", "https://example.org/dl", status=1)
    assert "folder:" not in printed("verify", printed("sign", "/signed/sub/"))
    assert "is not that of a folder" in refused("sign", "/signed/a.txt", "--below")


def test_what_is_signed_is_what_verify_prints(directory: Path) -> None:
    until = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%dT%H:%M:%S}"
    link = printed(
        *("sign", "/signed/Q3 report.pdf", "--until", until, "--filename", "Bericht\u2028.pdf", "--attachment"),
        *("--content-type", "application/pdf", "--client", "203.0.113.0/24", "--shareable"),
    )
    shown = printed("verify", link, "--client", "203.0.113.5").splitlines()
    assert shown[0] == "path: /signed/Q3 report.pdf"
    assert {"key: 2026b", "disposition: attachment", "content type: application/pdf", "shareable: yes"} <= set(shown)
    assert {f"expires: {until}Z", r"filename: Bericht\u2028.pdf"} <= set(shown)
    assert "403 Forbidden" in refused("verify", link, "--client", "198.51.100.1", status=1)
    assert "403 Forbidden" in refused("verify", link, status=1)


def test_uses_and_revocation_by_the_commands(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOADVIEW_LINKS__STORE", "sqlite:links.db")
    link, other = (printed("sign", "/signed/a.txt", "--uses", "2") for _ in range(2))
    shown = dict(line.split(": ") for line in printed("verify", link).splitlines())
    assert shown["uses"] == "2"
    assert (directory / "links.db").exists()
    revoked = printed("revoke", shown["link"])
    assert re.fullmatch(rf"revoked: {shown['link']}\nkept until: \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ", revoked)
    assert "403 Forbidden" in refused("verify", link, status=1)
    assert "key: 2026b" in printed("verify", other)
    assert printed("revoke", "2026b") == "revoked: 2026b\nkept until: for ever"
    assert "403 Forbidden" in refused("verify", other, status=1)
    assert printed("revoke", "--", "-abc").startswith("revoked: -abc")
    for cut in (shown["link"][:-1], "2026"):
        assert f"'{cut}' is not the id of a key in the settings, and not that of a link" in run("revoke", cut).stderr
    assert [run("revoke", whole).stderr for whole in ("2026a", shown["link"])] == ["", ""]
    assert "is not the id of a link" in refused("revoke", "a b")
    refused_uses = run("sign", "/signed/a.txt", "--uses", "0")
    assert (refused_uses.exit_code, refused_uses.stdout) == (2, "")


@pytest.mark.parametrize(
    "store, problem, status",
    [
        (None, "links.store: links are revoked in a store", 2),
        ("sqlite:no/links.db", "links.store: the store cannot be used (unable to open database file", 2),
        ("sqlite:downloadview.toml", "links.store: the store cannot be used (file is not a database)", 2),
        ("redis://127.0.0.1:1/0", "links.store: the store cannot be used (", 3),
    ],
)
def test_stores_that_cannot_be_used(
    directory: Path, store: str | None, problem: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store is not None:
        monkeypatch.setenv("DOWNLOADVIEW_LINKS__STORE", store)
        if store.startswith("redis:"):
            pytest.importorskip("redis", reason="RedisGrantStore: the package redis is not installed")
        monkeypatch.setenv("DOWNLOADVIEW_SERVER__PORT", "0")
        assert problem in refused("serve", status=status)
    assert problem in refused("revoke", "abc", status=status)


@pytest.mark.asyncio
@pytest.mark.parametrize("when, status, ready", [("refuse", 503, 503), ("allow", 200, 200)])
async def test_a_store_that_is_gone_later(
    directory: Path, when: str, status: int, ready: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOWNLOADVIEW_LINKS__STORE", "sqlite:store/links.db")
    monkeypatch.setenv("DOWNLOADVIEW_LINKS__WHEN_STORE_FAILS", when)
    (directory / "store").mkdir()
    link = printed("sign", "/signed/a.txt", "--uses", "1")
    (directory / "store").rmdir()
    async with live(build(load_settings("downloadview.toml", environ=os.environ))) as port:
        for _ in range(2):
            assert (await ask(port, link)).status == status
        answer = await ask(port, "/-/readyz")
        assert (answer.status, answer.body) == (ready, b"ready\n" if ready == 200 else b"links.store\n")


@pytest.mark.asyncio
async def test_a_once_only_link_of_the_service(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOADVIEW_LINKS__STORE", "sqlite:links.db")
    link = await asyncio.to_thread(printed, "sign", "/signed/a.txt", "--uses", "1")
    shown = await asyncio.to_thread(printed, "verify", link)
    other = await asyncio.to_thread(printed, "sign", "/signed/a.txt")
    app = build(load_settings("downloadview.toml", environ=os.environ))
    async with app.router.lifespan_context(app), live(app) as port:
        assert [(await ask(port, link)).status for _ in range(3)] == [200, 410, 410]
        assert (await ask(port, link, method="HEAD")).status == 200
        identifier = dict(line.split(": ") for line in shown.splitlines())["link"]
        await asyncio.to_thread(printed, "revoke", identifier)
        assert (await ask(port, link, method="HEAD")).status == 403
        assert (await ask(port, other)).status == 200
        await asyncio.to_thread(printed, "revoke", "2026b")
        assert (await ask(port, other)).status == 403


def test_a_link_whose_base_has_a_prefix(directory: Path) -> None:
    link = printed("sign", "/signed/a.txt", "--base", "https://example.org/dl/")
    assert link.startswith("https://example.org/dl/signed/a.txt?")
    assert "403 Forbidden" in refused("verify", link, status=1)
    assert "path: /signed/a.txt" in printed("verify", link, "--base", "https://example.org/dl/").splitlines()
    assert "403 Forbidden" in refused("verify", link, "--base", "https://example.org/d", status=1)


def test_a_link_of_either_key_is_valid_and_that_of_another_is_not(directory: Path) -> None:
    link = printed("sign", "/signed/a.txt", "--base", "https://example.org")
    assert link.startswith("https://example.org/signed/a.txt?k=2026b&")
    assert "key: 2026b" in printed("verify", link)
    (directory / "links.keys").write_text(f"2026a {SECRET[::-1]}x\n")
    assert "403 Forbidden" in refused("verify", link, status=1)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["/no/a.txt"], "no route serves '/no/a.txt'"),
        (["signed/a.txt"], "no route serves 'signed/a.txt'"),
        (["/public/a.txt"], "the route /public/{path:path} takes no links"),
        (["/signed/../a.txt"], "has a segment '.' or '..'"),
        (["/hooked/.git/config"], "the route /hooked/{path:path} hides '/hooked/.git/config'"),
        (["/signed/a.txt", "--expires", "8d"], "would be valid for more than max_age, 7 days: give"),
        (["/signed/a.txt", "--expires", "soon"], "--expires is 'soon'"),
        (["/signed/a.txt", "--until", "2020-01-01"], "would have expired already: give"),
        (["/signed/a.txt", "--client", "example.org"], "give an address or a network"),
        (["/signed/a.txt", "--base", "example.org"], "give a scheme and a host"),
        (["/signed/a.txt", "--filename", ""], "filename is ''"),
        (["/signed/a.txt", "--uses", "1"], "links.store: uses are counted in a store"),
    ],
)
def test_links_that_are_not_made(directory: Path, arguments: list[str], problem: str) -> None:
    assert problem in refused("sign", *arguments)


@pytest.mark.parametrize("path", ["/", "/-/livez", "/-/readyz"])
def test_the_pages_of_the_service_take_no_links(directory: Path, path: str) -> None:
    with (directory / "downloadview.toml").open("a") as file:
        file.write('\n[[routes]]\npath = "/{path:path}"\nsource = "files"\naccess = ["signed"]\n')
    assert printed("sign", "/a.txt").startswith("/a.txt?")
    assert f"no route serves '{path}'" in refused("sign", path)


# --- settings that are refused


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ('[links]\nkeys = "links.keys"\n', "", "routes[0].access: links need keys: add a [links] table with keys"),
        ('keys = "links.keys"', 'keys = "no.keys"', "links.keys: '{directory}/no.keys' cannot be read"),
        ('keys = "links.keys"', 'keys = "files"', "links.keys: '{directory}/files' cannot be read"),
        ('keys = "links.keys"', 'keys = ""', "links.keys"),
        ('keys = "links.keys"', 'keys = "links.keys"\nmax_age = "soon"', "links.max_age: 'soon' is not a time"),
        ('keys = "links.keys"', 'keys = "links.keys"\nmax_age = 0', "links.max_age: 0.0 is not a time"),
        ('keys = "links.keys"', 'keys = "links.keys"\nkey = "x"', "links.key: unknown key: did you mean 'keys'?"),
        ('keys = "links.keys"', 'keys = "links.keys"\nstore = "links.db"', "links.store: the text has the wrong form"),
        ('keys = "links.keys"', 'keys = "links.keys"\nstore = "sqlite:"', "links.store: the text has the wrong form"),
        ('keys = "links.keys"', 'keys = "links.keys"\nstore = "sqlite:///links.db"', "links.store: the text has"),
        ('keys = "links.keys"', 'keys = "links.keys"\nwhen_store_fails = "no"', "links.when_store_fails"),
        ('keys = "links.keys"', 'keys = "links.keys"\nsession_age = 0', "links.session_age: 0.0 is not a time"),
        ("[links]", '[server]\nworkers = 2\n[links]\nstore = "memory:"', "links.store: memory: is for one worker"),
        ('access = ["signed"]', "access = []", "routes[0].access"),
        ('access = ["signed"]', 'access = "signed"', "routes[0].access"),
        ('access = ["signed"]', 'access = ["sined"]', "routes[0].access"),
        ('access = ["signed"]', 'access = ["hook:may_read"]', "routes[0].access"),
        ("access_rules:may_read", "access_rules:no", "routes[1].access[0]: 'access_rules:no' cannot be imported"),
        ("access_rules:may_read", "access_rules:__name__", "'access_rules:__name__' is not a function"),
        ("access_rules:may_read", "fnmatch:fnmatch", "routes[1].access: access is <function fnmatch at "),
        ('hide = [".*", "*.KEY"]', 'hide = ["a/b"]', "routes[1].hide"),
        ('hide = [".*", "*.KEY"]', 'hide = ".*"', "routes[1].hide"),
    ],
)
def test_settings_that_are_refused(directory: Path, old: str, new: str, problem: str) -> None:
    assert old in SETTINGS
    assert problem.format(directory=directory) in refusal(directory, SETTINGS.replace(old, new))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "has no key: add one with `downloadview keys >> "),
        ("# none\n\n", "has no key"),
        (f"2026b {SECRET}\n2026b {SECRET}\n", "line 2 has the id '2026b' again"),
        (f"2026b {SECRET}\n2026a short\n", "line 2 is not `id secret`"),
        (SECRET, "line 1 is not `id secret`"),
        (f"2026b {SECRET} comment\n", "line 1 is not `id secret`"),
        (f"# \xe9\n2026b {SECRET}\n", "is not UTF-8: write the file in UTF-8"),
    ],
)
def test_keys_that_are_refused(directory: Path, text: str, problem: str) -> None:
    (directory / "links.keys").write_bytes(text.encode("latin-1"))
    message = refused("sign", "/signed/a.txt")
    assert problem in message
    assert message.count("links.keys: ") == 1  # the key is named once
    assert SECRET not in message
    assert "short" not in message


# --- links that nginx verifies


@pytest.mark.asyncio
async def test_the_service_takes_the_links_that_nginx_verifies(directory: Path) -> None:
    (directory / "downloadview.toml").write_text(SETTINGS + SECURE)
    link = printed("sign", "/secure/Q3 report.pdf")
    assert link.startswith("/secure/Q3%20report.pdf?md5=")
    shown = await asyncio.to_thread(printed, "verify", link)
    assert {"path: /secure/Q3 report.pdf", "key: 2026b"} <= set(shown.splitlines())
    async with live(build(load_settings("downloadview.toml", environ={}))) as port:
        answer = await ask(port, link)
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, b"content", "private, no-store")
        assert (await ask(port, link.replace("Q3%20report.pdf", "a.txt"))).status == 403
        assert (await ask(port, link.replace("/secure/", "/signed/"))).status == 403


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["/secure/a.txt", "--format", "complete"], "takes no links of this format: give --format secure_link"),
        (["/signed/a.txt", "--format", "secure_link"], "takes no links of this format: give --format complete"),
        (["/public/a.txt", "--format", "secure_link"], "takes no links"),
        (["/secure/a.txt", "--format", "secure_link", "--filename", "b"], "cannot have filename: nginx"),
        (["/secure/a.txt", "--format", "secure_link", "--inline"], "cannot have attachment: nginx"),
        (["/secure/a.txt", "--format", "secure_link", "--client", "192.0.2.0/24"], "the client 192.0.2.0/24: nginx"),
        (["/secure/a.txt", "--format", "secure_link", "--uses", "1"], "links.store: uses are counted"),
    ],
)
def test_links_for_nginx_that_are_not_made(directory: Path, arguments: list[str], problem: str) -> None:
    (directory / "downloadview.toml").write_text(SETTINGS + SECURE)
    assert problem in refused("sign", *arguments)


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ('["secure_link"]', '["secure_link", "signed"]', "routes[3].access: the proxy can ask only for secure_link"),
        ("/secure/{path:path}", "/secure-{path:path}", "routes[3].path: the proxy serves only a path such as /x/"),
        ("/secure/{path:path}", "/secure/{name}", "routes[3].path: the proxy serves only a path such as /x/"),
        ("/secure/{path:path}", "/signed/{path:path}.txt", "routes[3].path: "),
        ('["secure_link"]', '["secure_link"]\ncors = { origins = ["*"] }', "routes[3].cors: the proxy cannot decide"),
        ('["secure_link"]', '["secure_link"]\nhide = ["[ab]"]', "routes[3]: nginx cannot hide '[ab]'"),
        ('["secure_link"]', '["secure_link"]\nheaders = { X-A = "$x" }', "routes[3]: X-A: nginx cannot send the $"),
    ],
)
def test_routes_that_nginx_cannot_serve(directory: Path, old: str, new: str, problem: str) -> None:
    assert old in SECURE
    text = f'{SETTINGS}{SECURE.replace(old, new)}[offload]\nbackend = "nginx"\n'
    (directory / "downloadview.toml").write_text(text)
    assert problem in refused("config", "nginx")


def test_the_secrets_are_printed_alone(directory: Path) -> None:
    (directory / "downloadview.toml").write_text(f'{SETTINGS}{SECURE}[offload]\nbackend = "nginx"\n')
    text = printed("config", "nginx")
    assert "include downloadview-links.conf;" in text
    assert "location ^~ /secure/ {" in text
    secrets = printed("config", "nginx", "--link-secrets").splitlines()
    assert secrets[0] == "map $arg_key $link_secret {"
    assert re.fullmatch(r'    "~\^2026b\$" "[A-Za-z0-9_-]{43}";', secrets[1])
    assert secrets[1] not in text
    assert SECRET not in "".join(secrets)
    (directory / "downloadview.toml").write_text(f'{SETTINGS}{SECURE}send = "stream"\n[offload]\nbackend = "nginx"\n')
    assert "/secure/" not in printed("config", "nginx")
    result = run("config", "caddy", "--link-secrets")
    assert "caddy does not verify links" in result.stderr
