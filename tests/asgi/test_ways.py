"""Each server sends in the way that it can: what the HTTP table is about to be asked by."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.asgi.ways import BODY, PATH, WAYS, Way
from tests.live import ask
from tests.servers import Server

SIZE = 1_000_003
CONTENT = bytes(range(256)) * (SIZE // 256) + b"the"
pytestmark = pytest.mark.asyncio


async def last(server: Server) -> dict[str, Any]:
    assert isinstance(server.address, int)
    found: dict[str, Any] = json.loads((await ask(server.address, "/last")).body)
    return found


QUICK = "zero-copy, asyncio", "chunks, hypercorn"


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way, id=name, marks=[] if name in ("zero-copy, asyncio", "chunks, hypercorn") else pytest.mark.slow
        )
        for name, way in WAYS.items()
    ],
)
async def test_whole_files_parts_and_small_files(way: Way, tmp_path: Path) -> None:
    root = tmp_path / "files"
    root.mkdir()
    (root / "large.bin").write_bytes(CONTENT)
    (root / "small.txt").write_bytes(b"small")
    env = {"TABLE_ROOT": str(root), "TABLE_PORT": "{port}"}
    by_descriptor = "DownloadProtocol" in " ".join(way.options)
    with way.serving("tests.asgi.table_app:make_app", log=tmp_path / "log", env=env) as server:
        port = server.address
        assert isinstance(port, int)

        whole = await ask(port, "/path/large.bin")
        assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)
        left = await last(server)
        ours = {"descriptor": True, "downloadview_async.prepared": True}
        assert left["offered"] == (ours if by_descriptor else {} if way.messages == PATH else None)
        assert set(left["messages"][1:]) == {way.messages}

        part = await ask(port, "/path/large.bin", headers={"Range": "bytes=1-900000"})
        assert (part.status, part.complete, part.body == CONTENT[1:900001]) == (206, True, True)
        left = await last(server)
        assert set(left["messages"][1:]) == {PATH if by_descriptor else BODY}  # plain path send has no offset

        small = await ask(port, "/path/small.txt")
        assert (small.complete, small.body) == (True, b"small")
        assert (await last(server))["messages"] == ["http.response.start", BODY]

        memory = await ask(port, "/memory/large.bin")
        assert (memory.complete, memory.body == CONTENT) == (True, True)
        assert set((await last(server))["messages"][1:]) == {BODY}
    assert "Traceback" not in server.log
