"""The digests of files in the service: the settings that are refused, and the answers."""

import base64
import contextlib
import errno
import hashlib
import os
import sqlite3
from pathlib import Path

import bcrypt
import pytest
from click.testing import CliRunner, Result
from starlette.applications import Starlette

import downloadview_async as dv
from downloadview_async import ConfigurationError, Download
from downloadview_async.cli import main
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.digests import LocalFile, fill_store
from downloadview_async.service.proxy_config import config_for
from tests.live import ask, live, make_old

CONTENT = b"content"
FIELD = f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"
ROUTE = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'
SOURCE = '[sources.files]\ntype = "path"\nroot = "files"\n'
STORE = '[digests]\nstore = "digests.db"\n'


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(CONTENT)
    make_old(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOWNLOADVIEW_CONFIG", raising=False)
    return tmp_path


def app_of(text: str) -> Starlette:
    Path("downloadview.toml").write_text(text)
    return build(load_settings("downloadview.toml", environ={}))


@pytest.mark.parametrize(
    "text, problem",
    [
        (SOURCE + 'digests = "known"\n', r"sources.files.digests: there is no store: add a \[digests\] table"),
        (SOURCE + 'digests = "background"\nsidecars = true\n', "sources.files.digests: there is no store"),
        (SOURCE + 'digests = "yes"\n', "sources.files.digests: .*off, known or background"),
        (SOURCE + "sidecars = true\n", "sources.files.sidecars: digests are off"),
        (STORE + SOURCE + "sidecars = 1\n", "sources.files.sidecars: .*true"),
        ("[digests]\n" + SOURCE, "digests.store"),
        ('[digests]\nstore = ""\n' + SOURCE, "digests.store"),
        (STORE.replace("digests.db", "none/digests.db") + SOURCE, "digests.store: the directory .*none' is missing"),
        ('[sources.v]\ntype = "virtual"\nfactory = "a:b"\ndigests = "known"\n', "sources.v.digests: unknown key"),
    ],
)
def test_settings_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        app_of(text + (ROUTE if "sources.files" in text else ""))


@pytest.mark.asyncio
async def test_a_digest_is_computed_once_and_survives_a_restart(directory: Path) -> None:
    text = STORE + SOURCE + 'digests = "background"\n' + ROUTE
    for expected in ([None, FIELD], [FIELD, FIELD]):
        app = app_of(text)
        endpoints = [getattr(route, "endpoint", None) for route in app.routes]
        (download,) = [endpoint for endpoint in endpoints if isinstance(endpoint, Download)]
        async with app.router.lifespan_context(app), live(app) as port:
            digests = [(await ask(port, "/files/a.txt")).headers.get("repr-digest")]
            assert download.digests is not None
            assert await download.digests.computed("a.txt", 10)
            digests.append((await ask(port, "/files/a.txt")).headers.get("repr-digest"))
        assert digests == expected


@pytest.mark.asyncio
async def test_a_sidecar_needs_no_store(directory: Path) -> None:
    (directory / "files" / "a.txt.sha256").write_text(f"{hashlib.sha256(CONTENT).hexdigest()}  a.txt\n")
    app = app_of(SOURCE + 'digests = "known"\nsidecars = true\n' + ROUTE)
    async with app.router.lifespan_context(app), live(app) as port:
        assert (await ask(port, "/files/a.txt")).headers["repr-digest"] == FIELD


def test_the_configuration_of_nginx_keeps_the_header(directory: Path) -> None:
    offload = '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'
    for mode, is_kept in (("known", True), ("off", False)):
        Path("downloadview.toml").write_text(STORE + SOURCE + f'digests = "{mode}"\n' + ROUTE + offload)
        settings = load_settings("downloadview.toml", environ={})
        text = config_for(settings, "nginx", listen="127.0.0.1:8080", service=None, relative_to=None)
        assert ("add_header Repr-Digest $upstream_http_repr_digest always;" in text) == is_kept


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["digest", *arguments])


def test_the_command_fills_the_store(directory: Path) -> None:
    (directory / "files" / "below").mkdir()
    (directory / "files" / "below" / "b.txt").write_bytes(b"below")
    (directory / "files" / "zero.txt").write_bytes(b"")
    make_old(directory)
    (directory / "files" / "old.txt").write_bytes(b"x")
    os.utime(directory / "files" / "old.txt", (0, 0))  # without a strong tag
    os.symlink("/etc/passwd", directory / "files" / "outside")
    Path("downloadview.toml").write_text(STORE + SOURCE + 'digests = "known"\n' + ROUTE)
    one = command("files/below")
    assert (one.exit_code, one.stdout) == (0, "digests: 1 of 1 files\n")
    everything = command()
    assert (everything.exit_code, everything.stdout) == (0, "digests: 3 of 5 files\n")
    assert "no digest: old.txt" in everything.stderr
    assert "no digest: outside" in everything.stderr
    without = command("files/old.txt")
    assert (without.exit_code, without.stdout) == (1, "digests: 0 of 1 files\n")
    with contextlib.closing(sqlite3.connect("digests.db")) as store:
        rows = store.execute("SELECT source, name, value FROM digests ORDER BY name").fetchall()
    assert rows == [
        ("files", name, hashlib.sha256((directory / "files" / name).read_bytes()).digest())
        for name in ("a.txt", "below/b.txt", "zero.txt")
    ]


def test_the_command_knows_the_source_of_a_route_whose_users_make_links() -> None:
    Path("users").write_text(f"ada:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    links = f'[links]\nkeys = "2026a {"s" * 32}"\n[users]\nfile = "users"\n'
    route = ROUTE + 'list = true\naccess = ["signed", "user:ada"]\n'
    Path("downloadview.toml").write_text(STORE + links + SOURCE + 'digests = "known"\n' + route)
    result = command()
    assert (result.exit_code, result.stdout) == (0, "digests: 1 of 1 files\n"), result.stderr


@pytest.mark.asyncio
async def test_a_disk_that_fails_in_one_file_does_not_end_the_command(directory: Path) -> None:
    class Damaged:
        """A source with one file that cannot be read."""

        def __init__(self) -> None:
            self._source = dv.PathSource(directory / "files")

        async def resolve(self, name: str, /) -> dv.AsyncFile:
            if name == "damaged":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return await self._source.resolve(name)

    digests = dv.Digests(Damaged())
    size = (directory / "files" / "a.txt").stat().st_size
    files = [LocalFile(digests, "damaged", 5), LocalFile(digests, "a.txt", size)]
    done: list[int] = []
    assert await fill_store(files, done.append) == ["damaged"]
    assert sum(done) == 5 + size


@pytest.mark.parametrize(
    "text, arguments, status, problem",
    [
        (STORE + SOURCE + 'digests = "known"\n' + ROUTE, ["."], 2, "has '.'"),
        (STORE + SOURCE + ROUTE, [], 2, "no local directory with digests"),
        (STORE + SOURCE + 'digests = "known"\n', [], 2, "no local directory with digests"),
        (STORE + SOURCE + 'digests = "known"\n' + ROUTE, ["missing"], 2, "does not exist"),
        ('[digests]\nstore = "no/where.db"\n' + SOURCE + 'digests = "known"\n' + ROUTE, [], 2, "/no' is missing"),
    ],
)
def test_the_command_says_what_is_wrong(
    directory: Path, text: str, arguments: list[str], status: int, problem: str
) -> None:
    Path("downloadview.toml").write_text(text)
    result = command(*arguments)
    assert result.exit_code == status
    assert problem in result.stderr
