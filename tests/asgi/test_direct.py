"""An application with an offload that is opened without its proxy: one line in the log, none behind real proxies."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import downloadview_async as dv
from downloadview_async.asgi.direct import seems_direct
from downloadview_async.testing import call
from tests.live import live
from tests.proxies.servers import EACH_KIND, KINDS, proxy, readable_directory

CONTENT = b"content"


@pytest.mark.parametrize(
    "changed, headers, expected",
    [
        ({}, {"Host": "127.0.0.1:8000"}, True),
        ({}, {"Host": "localhost:8000"}, True),
        ({"server": ("::1", 8000)}, {"Host": "[::1]:8000"}, True),
        ({"server": ("127.0.0.1", 80)}, {"Host": "files.example.org"}, True),
        ({"server": ("127.0.0.1", 443), "scheme": "https"}, {"Host": "[::1]"}, True),
        ({"http_version": "2"}, {"Host": "127.0.0.1:8000"}, True),
        ({}, {"Host": "files.example.org"}, False),
        ({}, {"Host": "127.0.0.1:8080"}, False),
        ({}, {}, False),
        ({"server": None}, {"Host": "127.0.0.1:8000"}, False),
        ({"server": ("/run/app.sock", None)}, {"Host": "127.0.0.1:8000"}, False),
        ({"http_version": "1.0"}, {"Host": "127.0.0.1:8000"}, False),
        ({}, {"Host": "127.0.0.1:8000", "Connection": "close"}, False),
        *[
            ({}, {"Host": "127.0.0.1:8000", mark: "x"}, False)
            for mark in ("Via", "Forwarded", "X-Forwarded-For", "X-Real-IP")
        ],
    ],
)
def test_what_a_request_shows(changed: dict[str, Any], headers: dict[str, str], expected: bool) -> None:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 8000),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        **changed,
    }
    assert seems_direct(scope) is expected


def application(root: Path, **options: Any) -> dv.OffloadMiddleware:
    backend = dv.XAccelRedirect([dv.Rule(str(root), "/_files/")])
    return dv.OffloadMiddleware(
        Starlette(routes=[Mount("/files", dv.Download(dv.PathSource(root)))]), backend, **options
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.asyncio
@pytest.mark.parametrize("options, name", [({}, "nginx"), ({"proxy": "caddy"}, "caddy")])
async def test_a_client_that_opens_the_application_is_told_of_once(
    options: dict[str, Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(CONTENT)
    async with live(application(tmp_path, **options)) as port, httpx2.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/files/missing.txt")).status_code == 404
        assert warnings(caplog) == []
        for _ in range(3):
            answer = await client.get(f"http://127.0.0.1:{port}/files/a.txt")
            assert (answer.status_code, answer.content) == (200, b"")
    (message,) = warnings(caplog)
    assert message.startswith(f"GET '/files/a.txt': the answer has no body, because files are sent by {name}")
    assert f"open the address of {name}" in message


@pytest.mark.asyncio
async def test_tests_of_applications_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(CONTENT)
    assert (await call(application(tmp_path), "/files/a.txt")).headers["x-accel-redirect"] == "/_files/a.txt"
    assert warnings(caplog) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", EACH_KIND)
async def test_behind_a_proxy_nothing_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with readable_directory() as root:
        (root / "a.txt").write_bytes(CONTENT)
        proxy_kind = dv.proxy_kinds()[kind]
        rules = [dv.Rule(str(root), "/_files/" if proxy_kind.targets == "uri" else str(root))]
        app = Starlette(routes=[Mount("/files", dv.Download(dv.PathSource(root)))])

        def configuration(service: str, listen: str) -> str:
            return dv.proxy_config(kind, rules, service=service, listen=listen)

        offloading = dv.OffloadMiddleware(app, proxy_kind.make_backend(rules))
        async with live(offloading) as service, httpx2.AsyncClient() as client:
            context = proxy(KINDS[kind], root, service, text=configuration)
            port = await asyncio.to_thread(context.__enter__)
            try:
                answer = await client.get(f"http://127.0.0.1:{port}/files/a.txt")
            finally:
                await asyncio.to_thread(context.__exit__, None, None, None)
        assert answer.content == CONTENT
    assert warnings(caplog) == []
