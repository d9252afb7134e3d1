"""`/-/purge` and `downloadview purge`: who may purge what, in all workers, and through printed configurations."""

import asyncio
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from downloadview_async import ConfigurationError
from downloadview_async.cli import main
from downloadview_async.service.app import build
from downloadview_async.service.proxy_config import config_for
from tests.live import ask
from tests.servers import Server, free_port, serving
from tests.service.loading import load
from tests.service.test_cache import FACTORY, RULE, TEXT

SECRET, OTHER = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
BEARER = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    factory = f"factory_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{factory}.py").write_text(FACTORY)
    (tmp_path / "purge.keys").write_text(f"# who may purge\none {SECRET}\ntwo {OTHER}\n")
    return TEXT.replace("FACTORY", factory) + '[purge]\nkeys = "purge.keys"\n'


@pytest.fixture
def client(tmp_path: Path, text: str) -> Iterator[TestClient]:
    with TestClient(build(load(tmp_path, text))) as client:
        yield client


def fill(client: TestClient, *names: str) -> list[str]:
    """Request files whole, so that they are in the cache, and return their contents: each begins with its number."""
    return [client.get(f"/reports/{name}", headers={"Range": "bytes=0-"}).text for name in names]


def test_names_and_prefixes(client: TestClient) -> None:
    assert fill(client, "a", "b/1", "b/2", "c", "a") == ["1 a", "2 b/1", "3 b/2", "4 c", "1 a"]
    for query, count in (("name=a", 1), ("name=a", 0), ("name=x&prefix=b/", 2), ("prefix=", 1)):
        answer = client.post(f"/-/purge?source=reports&{query}", headers=BEARER)
        assert (answer.status_code, answer.json(), answer.headers["cache-control"]) == (
            200,
            {"purged": count},
            "no-store",
        )
    assert fill(client, "a", "b/1") == ["5 a", "6 b/1"]


@pytest.mark.parametrize(
    "authorization", ["", f"Bearer {SECRET[:-1]}", "Bearer ", f"Basic {SECRET}", "Bearer é"], ids=range(5)
)
def test_nobody_purges_without_a_secret(client: TestClient, authorization: str) -> None:
    fill(client, "a")
    headers = {"Authorization": authorization.encode("latin-1")} if authorization else {}
    for query in ("source=reports&name=a", "source=unknown&name=a", ""):
        answer = client.post(f"/-/purge?{query}", headers=headers)  # type: ignore[arg-type]
        assert (answer.status_code, answer.text) == (401, "Unauthorized\n")
        assert answer.headers["www-authenticate"].startswith('Bearer realm="purge"')
    assert fill(client, "a") == ["1 a"]


def test_a_second_secret_is_valid_while_the_first_is_replaced(client: TestClient) -> None:
    answer = client.post("/-/purge?source=reports&name=a", headers={"Authorization": f"bearer {OTHER}"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "query, status",
    [
        ("", 400),
        ("source=reports", 400),
        ("name=a", 400),
        ("source=reports&name=a&all=1", 400),
        ("source=reports&source=reports&name=a", 400),
        ("source=unknown&name=a", 404),
    ],
)
def test_wrong_parameters(client: TestClient, query: str, status: int) -> None:
    answer = client.post(f"/-/purge?{query}", headers=BEARER)
    assert answer.status_code == status
    assert answer.text.count("\n") == 1


def test_other_methods_and_other_settings(client: TestClient, tmp_path: Path, text: str) -> None:
    answer = client.get("/-/purge?source=reports&name=a", headers=BEARER)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    with TestClient(build(load(tmp_path, text.partition("[purge]")[0]))) as without:
        assert without.post("/-/purge?source=reports&name=a", headers=BEARER).status_code == 404


@pytest.mark.parametrize(
    "change, message",
    [
        (("purge.keys", "missing.keys"), r"purge\.keys: .*missing\.keys' cannot be read"),
        (("purge.keys", "id short"), r"purge\.keys: it is neither a file that can be read"),
        (('[sources.reports.cache]\npath = "cache"\n', ""), r"purge: no source has a cache"),
        (("keys =", "key ="), r"purge\.key: unknown key: did you mean 'keys'"),
        (('path = "cache"\n', 'path = "cache"\nstale_if_error = "soon"\n'), "cache.stale_if_error: 'soon' is not a"),
    ],
)
def test_wrong_settings(tmp_path: Path, text: str, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(load(tmp_path, text.replace(*change)))


@pytest.mark.parametrize("is_public", [True, False])
def test_printed_configurations_hide_it_unless_it_is_public(tmp_path: Path, text: str, is_public: bool) -> None:
    settings = load(tmp_path, text + ("public = true\n" if is_public else "") + RULE)
    printed = config_for(settings, "nginx", listen="127.0.0.1:8080", service=None, relative_to=None)
    assert ('location ~ "^/-/(?!(?:livez|purge)$)"' in printed) is is_public
    assert "add_header Cache-Status $upstream_http_cache_status always;" in printed


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["purge", *arguments, "--config", str(tmp_path / "downloadview.toml")])
    return result.exit_code, result.output


@pytest.fixture
def server(tmp_path: Path, text: str) -> Iterator[Server]:
    port = free_port()
    (factory,) = tmp_path.glob("factory_*.py")
    factory.write_text(FACTORY.replace("{len(made)}", "{__import__('time').time_ns()}"))  # each one is another
    (tmp_path / "downloadview.toml").write_text(f"{text}[server]\nport = {port}\nworkers = 2\n")
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "downloadview.toml"]
    with serving(command, port, log=tmp_path / "log", cwd=tmp_path) as server:
        yield server


@pytest.mark.asyncio
async def test_the_command_purges_running_workers(tmp_path: Path, server: Server) -> None:
    port = int(server.address)

    async def contents() -> set[bytes]:
        answers = [await ask(port, "/reports/a", headers={"Range": "bytes=0-"}) for _ in range(20)]
        return {answer.body for answer in answers}

    seen = await contents()
    for _ in range(3):
        assert await asyncio.to_thread(run, tmp_path, "reports", "a") == (0, "purged 1\n")
        now = await contents()  # of both workers
        assert now.isdisjoint(seen)
        seen |= now
    assert await asyncio.to_thread(run, tmp_path, "reports", "--all", "--at", server.url) == (
        0,
        f"{server.url}: purged 1\n",
    )
    assert await asyncio.to_thread(run, tmp_path, "reports", "--prefix", "") == (0, "purged 0\n")
    unused = f"http://127.0.0.1:{free_port()}"
    status, output = await asyncio.to_thread(run, tmp_path, "reports", "a", "--at", unused, "--at", server.url)
    assert status == 1
    assert f"{unused} cannot be asked to purge: ConnectionRefusedError" in output
    assert f"{server.url}: purged 0\n" in output
    (tmp_path / "purge.keys").write_text(f"three {secrets.token_urlsafe(32)}\n")
    status, output = await asyncio.to_thread(run, tmp_path, "reports", "a", "--at", server.url)
    assert (status, output) == (1, f"downloadview: {server.url} answered 401: Unauthorized\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["reports"], "nothing to purge: give NAME, --prefix or --all"),
        (["reports", "a", "--all"], "--all excludes NAME and --prefix"),
        (["unknown", "a"], "there is no source 'unknown' with a cache: give one of reports"),
        (["reports", "a", "--at", "10.0.0.1:8000"], "'10.0.0.1:8000' is not the URL of a service"),
        (["reports", "a", "--at", "http://[::1"], "'http://[::1' is not the URL of a service"),
    ],
)
def test_wrong_arguments(tmp_path: Path, text: str, arguments: list[str], message: str) -> None:
    (tmp_path / "downloadview.toml").write_text(text)
    status, output = run(tmp_path, *arguments)
    assert status == 2
    assert message in output
    assert "Traceback" not in output
