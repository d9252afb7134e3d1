"""The watch over clients that are waited for: one timer for all of them. On asyncio alone: uvloop shows no timers."""

import asyncio
from pathlib import Path
from typing import Any

from downloadview_async.asgi.server import DownloadProtocol
from tests.asgi.test_server import MIB, app_for
from tests.live import ask, live


def test_one_timer_watches_a_client_however_often_it_pauses(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    pauses: list[None] = []

    class Counting(DownloadProtocol):
        def pause_writing(self) -> None:
            pauses.append(None)
            super().pause_writing()

    async def main() -> int:
        loop: Any = asyncio.get_running_loop()
        async with live(app_for(tmp_path), http=Counting) as port:
            before = len(loop._scheduled)
            while len(pauses) < 50:
                assert (await ask(port, "/ours/big.bin")).complete
            return len([timer for timer in loop._scheduled if not timer.cancelled()]) - before

    assert asyncio.run(main()) < 10
