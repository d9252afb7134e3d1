"""How often a file is opened for one answer: once, and without a thread where the kernel knows its directory."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

import downloadview_async as dv
from downloadview_async.sources.local import root as roots
from downloadview_async.sources.local.root import has_openat2
from tests.live import make_old

pytestmark = pytest.mark.asyncio

PARTS = [(b"range", b"bytes=0-99,200000-200099")]


@pytest.mark.skipif(not has_openat2(), reason="openat2: this kernel or sandbox has none")
@pytest.mark.parametrize(
    "name, headers, status",
    [
        ("small.bin", [], 200),
        ("large.bin", [], 200),
        ("large.bin", PARTS, 206),
        ("large.bin", [(b"if-none-match", b"*")], 304),
        ("nothing.bin", [], 404),
        ("nothing/nothing.bin", [], 404),
    ],
)
@pytest.mark.parametrize("extensions", [{}, {"http.response.pathsend": {}}])
async def test_an_answer_opens_its_file_once(
    tmp_path: Path,
    name: str,
    headers: list[Any],
    status: int,
    extensions: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "small.bin").write_bytes(b"0123456789")
    (tmp_path / "large.bin").write_bytes(os.urandom(300_000))
    make_old(tmp_path)
    opens: list[threading.Thread] = []
    openat2 = roots._openat2

    def counted(*arguments: Any) -> int:
        opens.append(threading.current_thread())
        return openat2(*arguments)

    monkeypatch.setattr(roots, "_openat2", counted)
    scope = {"type": "http", "method": "GET", "path": f"/{name}", "headers": headers, "extensions": extensions}

    async def stays() -> Message:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    fewest = 99
    for _ in range(50):  # a rename anywhere on the machine makes the kernel refuse now and then
        app = dv.Download(dv.PathSource(tmp_path))  # with no file open yet
        messages: list[Message] = []

        async def send(message: Message, messages: list[Message] = messages) -> None:
            messages.append(message)

        opens.clear()
        await app(scope, stays, send)
        assert messages[0]["status"] == status
        fewest = min(fewest, len(opens))
        if fewest == 1 and opens == [threading.main_thread()]:
            return
    raise AssertionError(f"opened {fewest} times at least, by {opens}")
