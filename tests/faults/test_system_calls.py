"""Each system call by which files are opened, described, read and sent fails in a running service, then works again."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloadview_async.sources.local.open_file_cache import KEEP_SECONDS
from tests.faults.site import CONTENT, RIGHT, Site, eventually, site, upstream, verdict
from tests.faults.tracing import injected, why_not

LOCAL_FILES = ["small", "medium", "big", "range", "ranges", "storage"]
FOLDERS = ["listing", "listing of a storage", "archive", "archive of a storage"]
UNAVAILABLE = dict.fromkeys([*LOCAL_FILES, *FOLDERS, "cached"], "503")

# What strace injects, and the answers that are not right then: where a faster call fails, the service reads.
FAULTS: dict[str, dict[str, str]] = {
    "openat2:error=EIO": {},
    "openat2:error=ENOMEM": {},
    "openat2:error=EMFILE": UNAVAILABLE,
    "newfstatat:error=EIO": UNAVAILABLE,  # `fstat`, too: since 2.33, the C library makes this call for it
    "getdents64:error=EIO": dict.fromkeys(FOLDERS, "503"),
    "sendfile:error=EIO": {},
    "sendfile:error=EAGAIN": {},
    "sendfile:error=ENOMEM": {},
    "sendfile:error=EINTR:when=1+2": {},
    "sendfile:error=EINVAL": {},  # from now on, no file of this disk is sent by this call
    "preadv2:error=EINTR:when=1+2": {},
    "preadv2:error=EIO": {},
    "preadv2:error=EPERM": {},  # nor is this call made
    "pread64:error=EIO": {
        **dict.fromkeys(["small", "archive", "archive of a storage"], "503"),
        **dict.fromkeys(["medium", "big", "range", "ranges", "storage", "cached"], "aborted"),
    },
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with upstream() as port, site(tmp_path_factory.mktemp("site"), port) as running:
        assert running.round() == RIGHT, running.server.log
        yield running


def test_whatever_call_fails_the_answers_are_right_or_say_so_and_nothing_is_left(running: Site) -> None:
    time.sleep(KEEP_SECONDS)  # in which files are kept open
    before, threads = running.descriptors(), running.threads()
    for number, (fault, wrong) in enumerate(FAULTS.items(), 1):
        with injected(running.pid, fault) as calls:
            answers = running.round()
            assert "INJECTED" in calls.read_text(), fault
        for name, answer in answers.items():  # a file may still be open from the round before
            assert answer in ("right", wrong.get(name, "right")), (fault, name, running.server.log)
        assert {*wrong.values()} <= {*answers.values()}, (fault, answers)
        assert running.round() == RIGHT, (fault, running.server.log)
        assert len(running.outcomes(1 + 2 * number)) == (1 + 2 * number) * len(RIGHT), running.server.log
    eventually(lambda: running.descriptors() == before, lambda: (before, running.descriptors()))
    assert running.threads() <= threads + 3  # of the shared pool, which ends its idle threads later
    assert "Traceback" not in running.server.log
    assert running.server.log.count("sendfile is refused") == running.server.log.count("preadv2 with") == 1


@pytest.mark.parametrize("name, urls", [("folder", ["folder/", "folder/?archive=zip"]), ("small.txt", ["small.txt"])])
def test_an_error_at_the_close_of_what_was_only_read_is_no_harm(tmp_path: Path, name: str, urls: list[str]) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with upstream() as port, site(tmp_path, port) as running:
        for url in urls:
            with injected(running.pid, "close:error=EIO", path=str(tmp_path / "files" / name)) as calls:
                answer = running.get(f"/path/{url}")
                eventually(lambda: "INJECTED" in calls.read_text(), calls.read_text)
            assert answer is not None
            assert (answer.status, answer.complete) == (200, True), (url, running.server.log)
        assert running.round() == RIGHT
        assert "Traceback" not in running.server.log


@pytest.mark.parametrize("kind", ["path", "storage"])
def test_a_file_that_cannot_be_described_is_listed_and_never_left_out_of_an_archive(running: Site, kind: str) -> None:
    url = f"/{kind}/folder/"
    with injected(running.pid, "newfstatat:error=EIO", path="b.bin") as calls:
        listed, archive = running.get(url, "Accept: application/json"), running.get(f"{url}?archive=zip")
        assert "INJECTED" in calls.read_text()
    assert listed is not None
    assert archive is not None
    entries = {entry["name"]: entry.get("size") for entry in json.loads(listed.body)["entries"]}
    assert entries == {"a.txt": len(CONTENT["folder/a.txt"]), "b.bin": None, "inner": None}
    assert verdict(archive, {}) in ("right", "503")  # right: it was opened, although it could not be described
    assert running.round() == RIGHT
