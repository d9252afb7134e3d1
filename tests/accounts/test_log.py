"""The lines of `AccessLog`, and the file that it writes."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import AccessLog, ConfigurationError, Outcome
from downloadview_async.accounts import log
from downloadview_async.accounts.listeners import Listeners
from downloadview_async.accounts.log import LogFormat
from downloadview_async.http.log_text import LIMIT

EVIL = 'evil\nline \x1b[31m\x7f\x9b \u202e\u2028\udc80 " \\ é'
MOST = 5 * (LIMIT + 100) * 6 + LIMIT  # five texts of a line, each character as \\uXXXX
FORMATS: list[LogFormat] = ["text", "json", "combined"]


def outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "request_id": "0123abcd",
        "time": 1795936205.25,
        "method": "GET",
        "path": "/files/a.txt",
        "http_version": "1.1",
        "client": "192.0.2.7",
        "route": "/files/{path:path}",
        "source": "files",
        "name": "a.txt",
        "status": 200,
        "kind": "zero-copy",
        "size": 10,
        "sent": 10,
        "first_byte": 0.001,
        "seconds": 0.0125,
        "result": "completed",
        "headers": [
            (b"host", b"example.org"),
            (b"authorization", b"Basic c2VjcmV0"),
            (b"cookie", b"session=secret"),
            (b"referer", b"https://ada:secret@example.org/page?token=secret#secret"),
            (b"user-agent", b"curl/8"),
        ],
    }
    return Outcome(**(values | changes))


def line_of(form: LogFormat, tmp_path: Path, **changes: Any) -> str:
    file = tmp_path / "log"
    log = AccessLog(file, format=form)
    log(outcome(**changes))
    log.close()
    text = file.read_text(encoding="ascii")
    assert text.endswith("\n")
    return text[:-1]


@pytest.mark.parametrize(
    "form, changes, expected",
    [
        (
            "text",
            {},
            '2026-11-29T07:10:05.250Z 192.0.2.7 "GET /files/a.txt HTTP/1.1" 200 completed zero-copy 10 bytes in '
            "0.013 s, request 0123abcd",
        ),
        (
            "text",
            {"result": "aborted", "reason": "client-left", "user": "ada b", "link_id": "L1", "client": None},
            '2026-11-29T07:10:05.250Z - "GET /files/a.txt HTTP/1.1" 200 aborted (client-left) zero-copy 10 bytes in '
            "0.013 s, user ada\\x20b, link L1, request 0123abcd",
        ),
        (
            "combined",
            {"user": "ada"},
            '192.0.2.7 - ada [29/Nov/2026:07:10:05 +0000] "GET /files/a.txt HTTP/1.1" 200 10 '
            '"https://example.org/page" "curl/8" 0.013 completed zero-copy - 0123abcd',
        ),
        (
            "combined",
            {"headers": [], "path": "/files/é ü?%.txt", "link_id": "L1", "result": "aborted", "reason": "stalled"},
            '192.0.2.7 - - [29/Nov/2026:07:10:05 +0000] "GET /files/%C3%A9%20%C3%BC%3F%25.txt HTTP/1.1" 200 10 '
            '"-" "-" 0.013 stalled zero-copy L1 0123abcd',
        ),
    ],
)
def test_lines_for_people(tmp_path: Path, form: LogFormat, changes: dict[str, Any], expected: str) -> None:
    assert line_of(form, tmp_path, **changes) == expected


def test_a_line_of_json(tmp_path: Path) -> None:
    assert json.loads(line_of("json", tmp_path, user="ada", etag='"x"', link_id="L1")) == {
        "time": "2026-11-29T07:10:05.250Z",
        "request_id": "0123abcd",
        "client": "192.0.2.7",
        "user": "ada",
        "link_id": "L1",
        "method": "GET",
        "path": "/files/a.txt",
        "status": 200,
        "result": "completed",
        "reason": None,
        "kind": "zero-copy",
        "bytes": 10,
        "seconds": 0.0125,
        "first_byte": 0.001,
        "route": "/files/{path:path}",
        "source": "files",
        "name": "a.txt",
        "etag": '"x"',
        "size": 10,
        "user_agent": "curl/8",
    }
    assert json.loads(line_of("json", tmp_path).splitlines()[-1])["user"] is None


@pytest.mark.parametrize("form", FORMATS)
def test_texts_from_outside_stay_on_the_line(tmp_path: Path, form: LogFormat) -> None:
    raw = EVIL.encode("utf-8", "surrogatepass")
    texts = dict.fromkeys(("path", "client", "route", "source", "name", "user", "link_id", "kind", "etag"), EVIL)
    headers = [(b"user-agent", raw), (b"referer", raw)]
    line = line_of(form, tmp_path, method='G"\n', headers=headers, **texts)
    assert line.isascii()
    assert line.isprintable()
    if form == "json":
        read = json.loads(line)
        assert all(read[name] == EVIL for name in texts)
    if form == "combined":
        assert re.fullmatch(r'\S+ - \S+ \[[^]]+\] (?:"(?:[^"\\]|\\.)*" ?\d* ?\d* ?){3}\S+ \S+ \S+ \S+ \S+', line)


@pytest.mark.parametrize("form", FORMATS)
def test_long_texts_are_cut(tmp_path: Path, form: LogFormat) -> None:
    texts = dict.fromkeys(("path", "client", "name", "user", "link_id"), "é" * 60_000) | {"method": "G" * 60_000}
    assert len(line_of(form, tmp_path, headers=[(b"user-agent", b"a" * 60_000)], **texts)) < MOST


@pytest.mark.parametrize("form", FORMATS)
def test_a_line_has_no_secret_of_the_request(tmp_path: Path, form: LogFormat) -> None:
    line = line_of(form, tmp_path, detail="https://upstream.example/?secret")
    assert "secret" not in line
    assert "c2VjcmV0" not in line


@pytest.mark.parametrize("rotate", [Path.unlink, lambda file: file.rename(file.with_suffix(".1"))])
def test_the_next_lines_go_to_a_new_file_after_a_rotation(tmp_path: Path, rotate: Any) -> None:
    file = tmp_path / "log"
    log = AccessLog(file)
    log(outcome(name="first"))
    rotate(file)
    log(outcome(path="/second"))
    assert file.read_text().count("\n") == 1
    assert "/second" in file.read_text()
    assert "/second" not in "".join(old.read_text() for old in tmp_path.glob("*.1"))
    descriptors = {os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")}
    assert str(file) in descriptors
    log.close()
    assert not any(path.startswith(str(tmp_path)) for path in map(os.path.realpath, _descriptors()))


def _descriptors() -> list[str]:
    return [f"/proc/self/fd/{one}" for one in os.listdir("/proc/self/fd")]


def test_a_fifo_without_a_reader_holds_nothing_up(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    path.unlink()
    os.mkfifo(path)
    log(outcome())  # goes to the file that is open, as nobody would read it in the new one
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log(outcome())
    assert os.read(reader, 4096).count(b"\n") == 1
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        log(outcome())
    with pytest.raises(ConfigurationError, match="cannot be written"):
        AccessLog(path)


@pytest.mark.parametrize("is_pipe", [False, True])  # a pipe takes only 4,096 bytes at once
def test_lines_of_several_writers_do_not_mix(tmp_path: Path, is_pipe: bool) -> None:
    file = tmp_path / "log"
    text: list[bytes] = []
    if is_pipe:
        os.mkfifo(file)
        reader = threading.Thread(target=lambda: text.append(file.read_bytes()))
        reader.start()
        kept_open = os.open(file, os.O_WRONLY)
    script = f"""
from tests.accounts.test_log import *
log = AccessLog({str(file)!r}, format="json")
for _ in range(20):
    log.write([log.prepare(outcome(name=sys.argv[1] * 300)) for _ in range(50)])
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, letter]) for letter in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    if is_pipe:
        os.close(kept_open)
        reader.join()
    lines = (text[0] if is_pipe else file.read_bytes()).splitlines()
    assert len(lines) == 4 * 20 * 50
    assert all(len(set(json.loads(line)["name"])) == 1 for line in lines)


def test_lines_after_a_full_disk_are_whole(tmp_path: Path) -> None:
    """The limit of the size of a file stands for the disk."""
    script = f"""
import os, resource, signal
from tests.accounts.test_log import outcome
from downloadview_async import AccessLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AccessLog({str(tmp_path / "log")!r}, format="json")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for _ in range(2):
    try:
        log.write([log.prepare(outcome()) for _ in range(10)])
    except OSError:
        pass
    else:
        raise SystemExit("nothing was raised")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log(outcome(name="last"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    *lines, torn, last = (tmp_path / "log").read_text().splitlines()
    assert lines
    assert all(json.loads(line) for line in lines)
    assert not torn.endswith("}")
    assert json.loads(last)["name"] == "last"


@pytest.mark.parametrize("field", ["path", "client"])
def test_no_long_text_of_a_client_is_kept(tmp_path: Path, field: str) -> None:
    text = weakref.ref(long := Text("/" + "a" * LIMIT))
    line_of("text", tmp_path, **{field: long})
    del long
    assert text() is None


class Text(str):
    """A text that can be referred to weakly."""


def test_without_a_path_lines_go_to_the_standard_error() -> None:
    script = "from tests.accounts.test_log import *; log = AccessLog(); log(outcome())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert "request 0123abcd\n" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "options, problem",
    [({"format": "xml"}, "format is 'xml': give text, json, combined"), ({"path": "/"}, "cannot be written")],
)
def test_wrong_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(problem)):
        AccessLog(**options)


class Batches:
    """Keeps the batches that it was given, and raises what is to be raised."""

    def __init__(self, *, prepares: Exception | None = None, writes: Exception | None = None) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self._prepares, self._writes = prepares, writes

    def __call__(self, outcome: Outcome) -> None:
        raise AssertionError("a listener that has batches is not called")

    def prepare(self, outcome: Outcome) -> str:
        assert threading.get_ident() == threading.main_thread().ident
        if self._prepares is not None:
            raise self._prepares
        return outcome.path

    def write(self, prepared: list[str]) -> None:
        self.batches.append(prepared)
        self.threads.add(threading.get_ident())
        if self._writes is not None:
            raise self._writes


@pytest.mark.asyncio
async def test_a_batch_listener_prepares_in_the_loop_and_writes_many_in_a_thread() -> None:
    listener = Batches()
    listeners = Listeners([listener])
    for number in range(1_200):
        listeners.put(outcome(path=f"/{number}"))
    assert not listener.batches
    await listeners.drain(30)
    assert [len(batch) for batch in listener.batches] == [500, 500, 200]
    assert [path for batch in listener.batches for path in batch] == [f"/{number}" for number in range(1_200)]
    assert threading.main_thread().ident not in listener.threads


@pytest.mark.parametrize(
    "broken, reason",
    [
        ({"writes": OSError(28, "No space left on device")}, "[Errno 28] No space left on device"),
        ({"writes": KeyError("key")}, "KeyError: 'key'"),
        ({"prepares": KeyError("key")}, "KeyError: 'key'"),
    ],
)
@pytest.mark.asyncio
async def test_outcomes_that_cannot_be_written_are_counted(
    broken: dict[str, Exception], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    listeners = Listeners([Batches(**broken)])
    for _ in range(7):
        listeners.put(outcome())
    await listeners.drain(30)
    listeners.end()
    lost = re.findall("([0-9]+) outcomes were lost", caplog.text)
    assert sum(map(int, lost)) == 7
    assert reason in caplog.text


FORKED = """
import asyncio, os, sys, threading
from downloadview_async import AccessLog, Outcome
from downloadview_async.accounts.listeners import Listeners

class Log(AccessLog):
    def write(self, lines):
        written.set()
        super().write(lines)

written = threading.Event()
listeners = Listeners([Log(sys.argv[1])])

def put(name):
    listeners.put(Outcome(request_id=name, time=0.0, method="GET", path="/", http_version="1.1"))

async def one(name):
    put(name)
    await listeners.drain(20)

async def first():
    put("first")
    await asyncio.to_thread(written.wait, 20)

asyncio.run(first())  # its thread waits for further outcomes
child = os.fork()
asyncio.run(one("child" if child == 0 else "parent"))
if child:
    os.waitpid(child, 0)
"""


def test_a_forked_process_writes_its_own_lines(tmp_path: Path) -> None:
    file = tmp_path / "log"
    subprocess.run([sys.executable, "-c", FORKED, str(file)], check=True, timeout=60)
    ids = [line.rpartition(" ")[2] for line in file.read_text().splitlines()]
    assert sorted(ids) == ["child", "first", "parent"]


def test_the_members_of_a_long_path_are_not_kept(tmp_path: Path) -> None:
    kept = log._json_of_answer.cache_info().currsize
    for number in range(3):
        assert json.loads(line_of("json", tmp_path, path=f"/{number}" * 1000).splitlines()[-1])["path"]
    assert log._json_of_answer.cache_info().currsize == kept


def test_a_log_that_nothing_uses_closes_its_file(tmp_path: Path) -> None:
    def number_of_open_files() -> int:
        return sum(os.path.realpath(one) == str(path.resolve()) for one in Path("/proc/self/fd").iterdir())

    path = tmp_path / "access.log"
    access_log = AccessLog(path)
    assert number_of_open_files() == 1
    del access_log
    gc.collect()
    assert number_of_open_files() == 0
