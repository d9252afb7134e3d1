"""`downloadview check`: what is shipped passes on the real proxies, and each misconfiguration is found on one."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from downloadview_async.service.build import build
from downloadview_async.service.check import Line, check
from downloadview_async.service.load import load_settings
from downloadview_async.service.settings import Settings
from tests.live import live
from tests.proxies.conftest import content_of, make_checkout
from tests.proxies.servers import KINDS, proxy, readable_directory

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = """
[sources.files]
type = "path"
root = "app/files"
[sources.copies]
type = "storage"
url = "file:app/files"
[sources.made]
type = "virtual"
factory = "made_for_check:make"
[[routes]]
path = "/files/{path:path}"
source = "files"
cache_control = "private"
[[routes]]
path = "/pages/{path:path}"
source = "copies"
disposition = "inline"
example = ["page.html", "50%25.txt", "a%20b.txt"]
[[routes]]
path = "/large/{path:path}"
source = "files"
example = "large.bin"
[[routes]]
path = "/made/{name}"
source = "made"
example = "report.txt"
"""
MADE = "def make(name):\n    return b'made ' * 1000 if name == 'report.txt' else None\n"
RULES: dict[str | None, str] = {
    None: "",
    **{kind: '[[offload.rules]]\nsource = "app/files"\n' for kind in ("apache", "lighttpd")},
    **{kind: '[[offload.rules]]\nsource = "app/files"\ntarget = "/_files/"\n' for kind in ("nginx", "caddy", "h2o")},
}


def settings_of(directory: Path, backend: str | None, more: str = "") -> Settings:
    file = directory / f"{backend}.toml"
    line = "" if backend is None else f'[offload]\nbackend = "{backend}"\n{more}'
    file.write_text(f"{SETTINGS}{line}{RULES[backend]}")
    return load_settings(file, environ={})


@dataclass(frozen=True)
class Site:
    checkout: Path
    kind: str
    settings: Settings
    service: int

    async def check(
        self,
        edit: Callable[[str], str] = str,
        *,
        kind: str | None = None,
        service: int | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> list[Line]:
        service = service or self.service
        with proxy(KINDS[kind or self.kind], self.checkout, service, edit=edit) as port:
            lines = check(
                settings or self.settings,
                url=f"http://127.0.0.1:{port}",
                direct=f"http://127.0.0.1:{service}",
                **options,
            )
            return [line async for line in lines]


@asynccontextmanager
async def site(kind: str) -> AsyncIterator[Site]:
    with readable_directory() as directory:
        checkout = make_checkout(directory, "checkout")
        (checkout / "app" / "files" / "large.bin").write_bytes(content_of("large") * 500)
        (checkout / "made_for_check.py").write_text(MADE)
        settings = settings_of(checkout, kind)
        async with live(build(settings)) as service:
            yield Site(checkout, kind, settings, service)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(KINDS))
async def each(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site(request.param) as running:
        yield running


def failures(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.result == "FAIL"]


async def test_what_is_shipped_passes(each: Site) -> None:
    lines = await each.check()
    assert failures(lines) == []
    assert {line.step for line in lines} == {"source", "application", "proxy", "together"}
    assert [line for line in lines if line.result == "skip"] == []
