"""Downloads that a real S3 server has sent after our redirect, counted by the lines that S3 would log."""

from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.testing import call
from tests.accounts.test_proxy_log import s3_line
from tests.s3 import S3

pytestmark = pytest.mark.asyncio

CONTENT = b"0123456789" * 100
NAMES = ("whole", "twice", "cut", "part", "parts", "denied", "not-logged")


def logged(url: str, answer: str) -> str:
    """Return the line about a request for a URL."""
    parts = urlsplit(url)
    return s3_line(f"{parts.path}?{parts.query}", answer, key=parts.path.strip("/")) + "\n"


async def test_what_s3_has_sent_counts(s3: S3, tmp_path: Path) -> None:
    for name in NAMES:
        s3.put(f"counted/{name}", CONTENT)
    storage = s3.storage("counted/")
    redirect = dv.PresignedRedirect(storage, logs_request_id=True)
    endpoint = dv.Download(dv.StorageSource(storage), redirect=redirect, source_name="lake")
    store = dv.CompletionStore(f"sqlite+aiosqlite:///{tmp_path / 'accounts.db'}")
    completions = dv.Completions(store)
    app = dv.Accounts(Starlette(routes=[Route("/{path:path}", endpoint)]), observers=[completions])
    logs = tmp_path / "logs"
    logs.mkdir()

    async def fetch(name: str, answer: str = "200 - 1000 1000", **headers: str) -> str:
        redirected = await call(app, f"/{name}")
        assert (redirected.status, redirected.headers["cache-control"]) == (307, "private, no-store")
        url = redirected.headers["location"]
        received = httpx2.get(url, headers=headers)  # the store accepts the signature with the further parameter
        assert received.status_code == (206 if headers else 200)
        assert received.content == (CONTENT[:10] if headers else CONTENT)
        return logged(url, answer)

    async with completions:
        lines = [await fetch("whole"), await fetch("twice"), await fetch("twice")]
        (logs / "A").write_text("".join(lines))
        part = await fetch("part", "206 - 10 1000", Range="bytes=0-9")
        (logs / "B").write_text(
            await fetch("cut", "200 - 600 1000") + part + await fetch("denied", "403 AccessDenied 1 -")
        )
        parts = await fetch("parts", "206 - 400 1000")
        (logs / "C").write_text(parts + parts.replace("206 - 400", "206 - 600") + "something else\n")
        await fetch("not-logged")
        completions.close()
        log = dv.ProxyLog(logs, store)
        assert await log.add() == 7
        assert await log.add() == 0
        (logs / "again").write_text("".join(lines))
        assert await log.add() == 0
        rows = {row["file"].partition("/")[2]: row for row in await store.report("file")}
    counted = {name: (row["downloads"], row["answers"], row["bytes"]) for name, row in rows.items()}
    assert counted == {
        "whole": (1, 1, 1000),
        "twice": (2, 2, 2000),
        "cut": (0, 1, 600),
        "part": (0, 1, 10),
        "parts": (0, 1, 600),
    }
    await storage.aclose()


async def test_a_file_that_a_browser_might_run_is_not_redirected_for_the_log_either(s3: S3) -> None:
    s3.put("counted/page.html", CONTENT, content_type="text/html")
    storage = s3.storage("counted/")
    redirect = dv.PresignedRedirect(storage, logs_request_id=True)
    endpoint = dv.Download(dv.StorageSource(storage), redirect=redirect, attachment=False)
    answer = await call(dv.Accounts(endpoint, observers=[lambda _: None]), "/page.html")
    assert (answer.status, answer.body) == (200, CONTENT)
    assert answer.headers["content-security-policy"].startswith("sandbox;")
    await storage.aclose()


async def test_a_redirect_has_no_id_unless_it_is_wanted(s3: S3) -> None:
    s3.put("counted/a", CONTENT)
    storage = s3.storage("counted/")
    endpoint = dv.Download(dv.StorageSource(storage), redirect=dv.PresignedRedirect(storage))
    for app in (endpoint, dv.Accounts(endpoint)):
        answer = await call(app, "/a")
        assert "x-request-id" not in answer.headers["location"]
        assert answer.headers["cache-control"] == "private, max-age=300"
    wanted = dv.Download(dv.StorageSource(storage), redirect=dv.PresignedRedirect(storage, logs_request_id=True))
    assert "x-request-id" not in (await call(wanted, "/a")).headers["location"]  # nobody has given the request an id
    await storage.aclose()
