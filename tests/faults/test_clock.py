"""The clock leaps forward and back while the service runs: no duration depends on it, and nothing that ended begins."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs

import pytest

import downloadview_async as dv
from tests.faults.site import RIGHT, Site, eventually, site, upstream

SETTINGS = """
[links]
keys = "{key}"
store = "sqlite:links.db"
[[routes]]
path = "/limited/{{path:path}}"
source = "path"
limits = {{ requests = "5/second" }}
[[routes]]
path = "/signed/{{path:path}}"
source = "path"
access = ["signed"]
"""
LIBRARIES = sorted(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"))
DAY = 86_400
KEY_ID, SECRET = "test", "s" * 43


class Clock:
    """The clock of a process, set by the offset in a file. The monotonic clock goes on as it is."""

    def __init__(self, file: Path) -> None:
        if not LIBRARIES:
            pytest.skip("a clock that leaps: faketime is not installed: apt install faketime")
        self._file = file
        self.leap(0)
        self.env = {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def leap(self, seconds: int) -> None:
        """Set the clock this far from the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}")
        new.replace(self._file)


@contextmanager
def site_by(clock: Clock, directory: Path) -> Iterator[Site]:
    with (
        upstream() as port,
        site(directory, port, settings=SETTINGS.format(key=f"{KEY_ID} {SECRET}"), env=clock.env) as running,
    ):
        yield running


def status(running: Site, path: str) -> int | None:
    answer = running.get(path)
    return None if answer is None else answer.status


def test_a_clock_that_leaps(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    with site_by(clock, tmp_path) as running:
        store = dv.SQLiteGrantStore(tmp_path / "links.db")
        signer = dv.URLSigner({KEY_ID: SECRET}, max_age=None, store=store)

        def link(name: str, *, hours: int = 2, uses: int | None = None) -> str:
            return signer.sign(f"/signed/{name}", expires_in=timedelta(hours=hours), uses=uses)

        plain, once, revoked = link("small.txt"), link("medium.bin", uses=1), link("big.bin")
        asyncio.run(revoke(store, revoked))
        assert [status(running, path) for path in (plain, once, once, revoked)] == [200, 200, 410, 403]
        for seconds in (-DAY, 400 * DAY, 3600, -3600):
            clock.leap(seconds)
            assert running.round() == RIGHT, (seconds, running.server.log)
            assert status(running, plain) == (410 if seconds == 400 * DAY else 200), (seconds, running.server.log)
            # these look for what has ended by the clock
            assert status(running, "/-/readyz") == 200
            assert status(running, link("small.txt", hours=500 * 24, uses=5)) == 200
            # a limit of requests by the second ends in a second, wherever the clock goes
            while status(running, "/limited/small.txt") != 429:
                pass
            clock.leap(seconds - 1800)
            eventually(lambda: status(running, "/limited/small.txt") == 200, lambda: running.server.log)
        clock.leap(0)
        # while the clock was wrong, nothing was forgotten that had ended by it
        eventually(lambda: status(running, plain) == 200, lambda: running.server.log)
        assert [status(running, path) for path in (once, revoked)] == [410, 403], running.server.log
        assert "Traceback" not in running.server.log


async def revoke(store: dv.SQLiteGrantStore, link: str) -> None:
    """Revoke a link for the two hours in which it is valid."""
    identifier = parse_qs(link.partition("?")[2])["i"][0]
    await store.revoke(identifier, time.time() + 7200)
    await store.aclose()
