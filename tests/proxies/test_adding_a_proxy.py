"""The page on adding a proxy, word for word: its package is installed, and the service and its commands know Toy."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx2
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

import downloadview_async as dv
from tests.live import ask, live, make_old
from tests.pages import DOCS, blocks, file_of
from tests.proxies import grid
from tests.proxies.servers import readable_directory
from tests.servers import PROJECT, free_port, serving
from tests.test_docs import commands

pytestmark = pytest.mark.slow  # pip builds a package, and each command starts anew with it
PAGE = DOCS / "howto" / "adding-a-proxy.md"
FILES = {name: text for _, text in blocks(PAGE, "python", "toml") if (name := file_of(text)) is not None}
INSTALL, *COMMANDS = commands(PAGE)
NAME = "50%25 of π.txt"
CONTENT = bytes(range(256)) * 40


@dataclass(frozen=True)
class Place:
    """Where the package of the page is installed, and a directory with its settings and a file."""

    library: Path
    site: Path

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a process that has the package."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
        return inherited | {"PYTHONPATH": os.pathsep.join(map(str, (self.library, PROJECT)))}

    def run(self, *command: str, status: int = 0) -> str:
        """Run Python beside the settings, and return what it prints; of a refusal, what it says on standard error."""
        run = subprocess.run(
            [sys.executable, *command], cwd=self.site, env=self.environ, capture_output=True, text=True, timeout=60
        )
        assert run.returncode == status, run.stderr + run.stdout
        return run.stderr if status else run.stdout

    def downloadview(self, *arguments: str, status: int = 0) -> str:
        """Run the command `downloadview`."""
        return self.run("-m", "downloadview_async.cli", *arguments, status=status)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """The page's files, each where the page has it, and its package installed."""
    assert {*FILES} == {"toy_proxy.py", "pyproject.toml", "downloadview.toml", "app.py"}
    assert INSTALL == ["pip", "install", "."]
    with readable_directory() as directory:
        package, library, site = (directory / name for name in ("package", "library", "site"))
        for path in (package, library, site):
            path.mkdir()
        for name, text in FILES.items():
            (package if name in ("toy_proxy.py", "pyproject.toml") else site).joinpath(name).write_text(text)
        (site / "files").mkdir()
        (site / "files" / NAME).write_bytes(CONTENT)
        make_old(site / "files")
        # what it depends on is there, and is not asked for on a network
        offline = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(library)]
        subprocess.run([sys.executable, "-m", *INSTALL, *offline], cwd=package, check=True, capture_output=True)
        yield Place(library, site)


class Toy:
    """A proxy that obeys X-Toy-File, by the configuration that the page's template has made."""

    def __init__(self, configuration: str, *, obeys: bool = True) -> None:
        words: dict[str, str] = dict(line.split(" ", 1) for line in configuration.splitlines())
        self._service = words["pass"].removeprefix("/ to ")
        self._header = words["obey"]
        self._target, self._directory = words["internal"].split(" is ")
        self._refused = re.compile(words["refuse"])
        self._obeys = obeys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._refused.match(scope["path"]):
            await PlainTextResponse("Not Found", 404)(scope, receive, send)
            return
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        request = httpx2.Request(
            scope["method"],
            f"http://{self._service}",
            headers=scope["headers"],
            extensions={"target": target},
        )
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.send(request, stream=True)
            body = b"".join([block async for block in answer.aiter_raw()])
        order = answer.headers.get(self._header)
        if order is not None and self._obeys:
            assert order.startswith(self._target)
            path = self._directory + unquote(order.removeprefix(self._target), errors="surrogateescape")
            await dv.DownloadResponse(dv.LocalFile(path))(scope, receive, send)
            return
        headers = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() != b"connection"]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def printed(place: Place, service: int, listen: str = "127.0.0.1:8080") -> str:
    """Return the configuration for a service on a port."""
    config, _, _ = COMMANDS
    assert config == ["downloadview", "config", "toy", "--config", "downloadview.toml"]
    return place.downloadview(*config[1:], "--service", f"127.0.0.1:{service}", "--listen", listen)


@pytest.fixture(scope="module")
def service(place: Place) -> Iterator[int]:
    """The service with the page's settings, in two worker processes."""
    _, serve, _ = COMMANDS
    assert serve == ["downloadview", "serve", "--config", "downloadview.toml"]
    port = free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", *serve[1:], "--port", str(port), "--workers", "2"]
    with serving(command, port, log=place.site / "log", env=place.environ, cwd=place.site):
        yield port


async def checked(place: Place, service: int, toy: Toy) -> dict[str, Any]:
    """Run `downloadview check` as on the page, for another port, and return what it prints."""
    *_, check = COMMANDS
    assert check == ["downloadview", "check", "http://127.0.0.1:8080", "--config", "downloadview.toml"]
    async with live(toy, server_header=False, date_header=False) as port:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "downloadview_async.cli", "check", f"http://127.0.0.1:{port}", *check[3:]],
            *["--direct", f"http://127.0.0.1:{service}", "--json"],
            cwd=place.site,
            env=place.environ,
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    lines: dict[str, Any] = json.loads(output)
    assert process.returncode == (1 if lines["FAIL"] else 0)
    return lines


def test_the_configuration_is_that_of_the_template(place: Place) -> None:
    assert printed(place, 8000) == (
        "listen 127.0.0.1:8080\n"
        "pass / to 127.0.0.1:8000\n"
        "obey X-Toy-File\n"
        f"internal /_files/ is {place.site}/files/\n"
        "refuse ^/-/(?!(?:livez)$)\n"
    )


@pytest.mark.asyncio
async def test_the_service_gives_orders_to_toy(place: Place, service: int) -> None:
    path = f"/files/{quote(NAME)}"
    for _ in range(4):  # each by whichever worker takes it
        direct = await ask(service, path)
        assert (direct.status, direct.body) == (200, b"")
        assert direct.headers["x-toy-file"] == f"/_files/{quote(NAME)}"
    async with live(Toy(printed(place, service))) as port:
        answer = await ask(port, path)
        part = await ask(port, path, headers={"Range": "bytes=5-9"})
        refused = await ask(port, "/-/readyz")
    assert (answer.status, answer.body, "x-toy-file" in answer.headers) == (200, CONTENT, False)
    assert (part.status, part.body) == (206, CONTENT[5:10])
    assert refused.status == 404


@pytest.mark.asyncio
async def test_the_check_knows_it(place: Place, service: int) -> None:
    configuration = printed(place, service)
    right = await checked(place, service, Toy(configuration))
    assert [line for line in right["checks"] if line["result"] == "FAIL"] == []
    steps = [line["step"] for line in right["checks"] if line["result"] == "pass"]
    assert {*steps} == {"source", "application", "proxy", "together"}
    wrong = await checked(place, service, Toy(configuration, obeys=False))
    (failed,) = [line for line in wrong["checks"] if line["result"] == "FAIL"]
    assert (failed["step"], failed["remedy"]) == (
        "together",
        "give the URL of the proxy: at this one, uvicorn answers without one, or behind a proxy that obeys no "
        "x-toy-file; else `obey X-Toy-File`",
    )
    empty = await checked(place, service, Toy(configuration.replace("/files/\n", "/elsewhere/\n")))
    remedies = [line["remedy"] for line in empty["checks"] if line["result"] == "FAIL"]
    assert remedies == [f"`internal /_files/ is {place.site}/files/`, a directory that Toy may read"]


def test_the_settings_name_it_where_they_name_the_others(place: Place) -> None:
    (place.site / "wrong.toml").write_text(FILES["downloadview.toml"].replace('"toy"', '"tony"'))
    refusal = place.downloadview("config", "toy", "--config", "wrong.toml", status=2)
    assert "give nginx, apache, lighttpd, caddy, h2o, litespeed or toy" in refusal
    (place.site / "option.toml").write_text(FILES["downloadview.toml"].replace('"toy"', '"toy"\nbuffering = true'))
    refusal = place.downloadview("config", "toy", "--config", "option.toml", status=2)
    assert "offload.buffering: toy has no such option: remove it" in refusal
    assert [line.strip(",\t") for line in place.downloadview("config", status=2).splitlines()][-1] == "toy"


def test_without_its_package_it_is_refused(place: Place, tmp_path: Path) -> None:
    alone = Place(tmp_path, place.site)
    assert "'toy' is not one of 'nginx'" in alone.downloadview("config", "toy", status=2)
    refusal = alone.downloadview("config", "nginx", "--config", "downloadview.toml", status=2)
    assert "offload.backend: invalid enum value 'toy': give nginx, apache" in refusal


def test_a_package_that_is_broken_is_named(place: Place, tmp_path: Path) -> None:
    (tmp_path / "toy_proxy.py").write_text("import no_such_module\n")
    metadata = next(place.library.glob("*.dist-info"))
    (tmp_path / metadata.name).mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (tmp_path / metadata.name / name).write_bytes((metadata / name).read_bytes())
    refusal = Place(tmp_path, place.site).downloadview("config", "toy", status=2)
    assert refusal.startswith(
        "downloadview: the entry point toy = toy_proxy:TOY of downloadview_async.proxies cannot be"
    )
    assert refusal.count("\n") == 1


def test_an_application_has_a_backend_for_it(place: Place) -> None:
    ask_it = f"""
import asyncio
from app import app
from downloadview_async.testing import call
print(dict(asyncio.run(call(app, {"/" + NAME!r})).headers)["x-toy-file"])
"""
    assert place.run("-c", ask_it) == f"/_files/{quote(NAME)}\n"


def test_the_grid_has_a_column_for_it(place: Place) -> None:
    show = "import json; from tests.proxies import grid; print(json.dumps([grid.table(), [c.id for c in grid.CELLS]]))"
    table, cells = json.loads(place.run("-c", show))
    assert "| H2O | Toy | presigned URL |" in table
    assert {*cells} - {cell.id for cell in grid.CELLS} == {
        *(f"{row}-toy-proxy" for row in grid.LOCAL),
        *(f"{row}-toy-cache" for row in grid.FAR),
    }
