"""What a sandbox takes from a service: `/proc`, a directory for temporary files, disks to write to, system calls."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.confined import confined, tmpfs, why_not
from tests.faults.site import RIGHT, Site, site, upstream

NO_PROC = tmpfs("/proc")
"""Hides `/proc`."""
REFUSED = (
    "import os, sys; from errno import *; from tests.refusing import refuse; {}; os.execvp(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture(scope="module")
def upstream_port() -> Iterator[int]:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with upstream() as port:
        yield port


def all_is_right(running: Site) -> None:
    for _ in range(2):
        assert running.round() == RIGHT, running.server.log
    assert "Traceback" not in running.server.log


def test_without_proc_a_directory_for_temporary_files_and_fast_system_calls(tmp_path: Path, upstream_port: int) -> None:
    calls = {"sendfile": "EINVAL", "preadv2": "EPERM", "openat2": "ENOSYS"}
    refusing = REFUSED.format("; ".join(f"refuse({call!r}, {error})" for call, error in calls.items()))
    prefix = [*confined(NO_PROC), sys.executable, "-c", refusing]
    with site(tmp_path, upstream_port, prefix=prefix, env={"TMPDIR": "/nonexistent"}) as running:
        all_is_right(running)
        assert running.server.log.count("sendfile is refused with EINVAL") == 1
        assert running.server.log.count("preadv2 with RWF_NOWAIT is refused with EPERM") == 1


def test_a_cache_that_cannot_be_written_to_costs_no_download(tmp_path: Path, upstream_port: int) -> None:
    cache = tmp_path / "state/cache"
    prefix = confined(f"mkdir '{cache}'", f"mount -t tmpfs -o ro,mode=755 none '{cache}'")
    with site(tmp_path, upstream_port, prefix=prefix) as running:
        all_is_right(running)
        assert "cannot be used, files are sent without being kept: [Errno 30]" in running.server.log


@pytest.mark.parametrize(
    "what, says",
    [
        ("accounts.db", "accounts.database: the database cannot be used"),
        ("log.json", "the log "),
        ("cache", "the cache directory "),
    ],
)
def test_a_service_that_cannot_work_on_a_read_only_system_says_why(
    tmp_path: Path, upstream_port: int, what: str, says: str
) -> None:
    """The other two are on a disk that can be written to."""
    state, writable = tmp_path / "state", tmp_path / "writable"
    others = {"accounts.db", "log.json", "cache"} - {what}
    settings = [f"sed -i 's,{state}/{name},{writable}/{name},' '{tmp_path}/downloadview.toml'" for name in others]
    writable.mkdir()
    prefix = confined(*settings, f"mount -t tmpfs -o ro none '{state}'")
    with pytest.raises(AssertionError, match="it ended with 2") as failed, site(tmp_path, upstream_port, prefix=prefix):
        pytest.fail("it has started")
    assert says in str(failed.value)
    assert "Traceback" not in str(failed.value)
