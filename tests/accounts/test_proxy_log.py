"""The lines of proxies, as a table, and logs that are renamed, truncated and read again."""

import os
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import downloadview_async as dv
from downloadview_async.accounts.completion import Delivered, Span, delivered
from downloadview_async.accounts.completion_store import Place
from downloadview_async.accounts.proxy_log import LogLine
from downloadview_async.accounts.rotated_log import RotatedLog, open_log
from tests.accounts.test_completion import outcome


def line(**changes: Any) -> str:
    values = {
        "request_id": '"a1"',
        "method": '"GET"',
        "status": "200",
        "bytes": "100",
        "content_range": '""',
        "range": '""',
    }
    values |= {name: value for name, value in changes.items() if value is not None}
    return (
        "{" + ",".join(f'"{name}":{value}' for name, value in values.items() if changes.get(name, "") is not None) + "}"
    )


SPANS: dict[str, tuple[dict[str, str], tuple[Span, ...]]] = {
    "whole": ({}, ((0, 100),)),
    "cut": ({"bytes": "60"}, ((0, 60),)),
    "a part": (
        {"status": "206", "bytes": "10", "content_range": '"bytes 10-19/100"', "range": '"bytes=10-19"'},
        ((10, 20),),
    ),
    "a part that was cut": ({"status": "206", "bytes": "3", "content_range": '"bytes 10-19/100"'}, ((10, 13),)),
    "parts": ({"status": "206", "bytes": "300", "range": '"bytes=0-9,50-59"'}, ((0, 10), (50, 60))),
    "parts of which bytes are missing": ({"status": "206", "bytes": "19", "range": '"bytes=0-9,50-59"'}, ()),
    "of another size": ({"status": "206", "bytes": "10", "content_range": '"bytes 10-19/101"'}, ()),
    "nothing": ({"bytes": "0"}, ()),
    "more than there is": ({"bytes": "1000"}, ((0, 100),)),
    "with the head, and the client left": ({"bytes": "140", "connection": '"X"'}, ((0, 99),)),
    "with the head": ({"bytes": "540", "connection": '"-"'}, ((0, 100),)),
    "a Range with quotes": ({"range": r'"bytes=\"0\\-\x7f\xc3\xa9"'}, ((0, 100),)),
    "a Range that no database takes": (
        {"status": "206", "bytes": "99", "range": r'"bytes=0-9,\u0000\ud8005-"'},
        (),
    ),
    "a dash for no value": ({"content_range": '"-"', "range": '"-"'}, ((0, 100),)),
    "a dash for no bytes": ({"bytes": '"-"'}, ()),
    "the id that the proxy has given": ({"request_id": '""', "status": "499", "uuid": '"a1"'}, ()),
    "the id of the answer comes first": ({"uuid": '"b2"'}, ((0, 100),)),
    "null for no value": ({"content_range": "null", "range": "null"}, ((0, 100),)),
}
NOT_LINES = [
    *("", "{", "{}", "[]", "127.0.0.1 - - GET", "{" * 5000, '"a"', '{"request_id":"a1"}'),
    *(line(status='"x"'), line(bytes="-1"), line(bytes="1e3"), line(bytes="true"), line(request_id='""')),
    *(line(request_id="5"), line(method='"HEAD"'), line(method=None), line(range=r'"\q"'), line(bytes="1" * 30)),
    *(line(request_id=r'"\u0000"'), line(request_id=r'"\ud800"'), line(request_id='"a b"')),
    *(line(request_id=f'"{"a" * 129}"'), line(range=f'"{"a" * 70_000}"')),
]


@pytest.mark.parametrize(("changes", "spans"), SPANS.values(), ids=SPANS)
def test_what_a_line_says(changes: dict[str, str], spans: tuple[Span, ...]) -> None:
    parsed = LogLine.parse(line(**changes) + "\n")
    assert parsed is not None
    assert (parsed.request_id, parsed.spans(100)) == ("a1", spans)


def test_lighttpd_has_a_dash_for_no_bytes(tmp_path: Path) -> None:
    text = dv.proxy_config("lighttpd", [dv.Rule(str(tmp_path), "/files/")], log="/srv/downloads.log")
    match = re.search(r'^accesslog\.format = "(.*)"$', text, re.MULTILINE)
    assert match is not None
    values = {"%{X-Request-Id}o": "a1", "%m": "GET", "%s": "200", "%B": "-"}
    written = re.sub("%({.*?})?.", lambda name: values.get(name[0], "-"), match[1].replace('\\"', '"'))
    parsed = LogLine.parse(written)
    assert parsed is not None
    assert (parsed.request_id, parsed.sent) == ("a1", 0)


@pytest.mark.parametrize("text", NOT_LINES, ids=range(len(NOT_LINES)))
def test_other_lines_are_left_out(text: str) -> None:
    assert LogLine.parse(text) is None


def s3_line(
    uri: str = "/lake/a.bin?X-Amz-Expires=600&x-request-id=a1&X-Amz-Signature=00",
    answer: str = "200 - 100 100",
    *,
    operation: str = "REST.GET.OBJECT",
    key: str = "lake/a.bin",
) -> str:
    """Return a line of the server access log of S3, in the order of its documentation."""
    request = f"{'c' * 64} downloads [29/Nov/2026:10:00:38 +0000] 192.0.2.3 - 3E57427F3EXAMPLE {operation} {key}"
    further = (
        f'"-" "curl/8.5 \\"x\\" {{" - {"s" * 76}= SigV4 ECDHE-RSA-AES128-GCM-SHA256 QueryString s3.example.org TLSV1.2'
    )
    return f'{request} "GET {uri} HTTP/1.1" {answer} 41 28 {further} - -'


S3_SPANS: dict[str, tuple[str, int, tuple[Span, ...]]] = {
    "whole": ("200 - 100 100", 100, ((0, 100),)),
    "cut": ("200 - 60 100", 60, ((0, 60),)),
    "a part, of which nobody knows the place": ("206 - 10 100", 10, ()),
    "a part that is the whole": ("206 - 100 100", 100, ((0, 100),)),
    "another version": ("200 - 90 90", 90, ()),
    "a part as long as the file, of another version": ("206 - 100 200", 100, ()),
    "nothing": ("200 - - 100", 0, ()),
    "not modified": ("304 - - 100", 0, ()),
    "refused": ("403 AccessDenied 243 -", 243, ()),
}


@pytest.mark.parametrize(("answer", "sent", "spans"), S3_SPANS.values(), ids=S3_SPANS)
def test_what_a_line_of_s3_says(answer: str, sent: int, spans: tuple[Span, ...]) -> None:
    parsed = LogLine.parse(s3_line(answer=answer) + "\n")
    assert parsed is not None
    assert (parsed.request_id, parsed.status, parsed.sent) == ("a1", int(answer[:3]), sent)
    assert parsed.spans(100) == spans


def test_the_id_in_a_line_of_s3_is_decoded() -> None:
    parsed = LogLine.parse(s3_line("/a?x-request-id=a%2F%2B1", key="a%2520b"))
    assert parsed is not None
    assert parsed.request_id == "a/+1"


@pytest.mark.parametrize(
    "text",
    [
        s3_line("/lake/a.bin"),
        s3_line("/lake/a.bin?x-request-id="),
        s3_line("/lake/a.bin?x-request-id=a&x-request-id=b"),
        s3_line(f"/lake/a.bin?x-request-id={'a' * 129}"),
        s3_line(operation="REST.HEAD.OBJECT"),
        s3_line(operation="REST.PUT.OBJECT"),
        s3_line(answer="200 - 1e3 100"),
        s3_line(answer=f"200 - {'1' * 30} 100"),
        s3_line().partition("HTTP/1.1")[0],
    ],
    ids=range(9),
)
def test_other_lines_of_s3_are_left_out(text: str) -> None:
    assert LogLine.parse(text) is None


def delegated(size: int | None = 100) -> Delivered:
    part = delivered(outcome(size=size, spans=(), sent=0, result="delegated", delegated_to="x-accel-redirect"))
    assert part is not None
    return part


def test_what_closes_a_delegated_answer() -> None:
    whole = LogLine(request_id="1", status=200, sent=100)
    assert whole.closing(delegated()) == replace(delegated(), spans=((0, 100),), sent=100, is_whole=True, by="")
    empty = replace(whole, sent=0).closing(delegated(0))
    assert empty is not None
    assert empty.is_whole
    for refused in (
        replace(whole, sent=0),
        replace(whole, status=304),
        replace(whole, status=416),
        replace(whole, status=404),
    ):
        assert refused.closing(delegated()) is None


class Reading:
    """Reads a log, or a directory of logs, and remembers the places as a store does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[tuple[int, int], Place] = {}
        self.again()

    def again(self) -> None:
        """Forget all but the places, as another process would."""
        self.log = open_log(str(self.path), sorted(self.places.values(), key=lambda place: place.time))

    def lines(self) -> list[str]:
        """Return the new lines."""
        found: list[str] = []
        if self.log.look() is not None:
            for lines, place in self.log.read():
                found += lines
                self.places[place.device, place.inode] = place
        return found


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "downloads.log"
    path.write_text("1\n2\n")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_log_is_read_once(log: Path) -> None:
    reading = Reading(log)
    assert reading.lines() == ["1", "2"]
    append(log, "3\nhal")
    assert reading.lines() == ["3"]
    append(log, "f\n")
    assert reading.lines() == ["half"]
    reading.again()
    assert reading.lines() == []
    append(log, "5\n")
    assert reading.lines() == ["5"]


@pytest.mark.parametrize(("count", "lines"), [(0, []), (1, [""]), (2, ["3"]), (3, ["", "3"]), (99, ["1", "2", "3"])])
def test_the_end_of_a_log_is_read_and_what_follows(log: Path, count: int, lines: list[str]) -> None:
    append(log, "3\n")
    log.with_name("downloads.log.1").write_text("of the last minute\n")
    os.utime(log.with_name("downloads.log.1"), (time.time() - 30,) * 2)
    reading = RotatedLog.from_end(str(log), count)

    def read() -> list[str]:
        reading.look()
        return [line for lines, _ in reading.read() for line in lines]

    assert read() == lines
    append(log, "4\n")
    log.rename(log.with_name("downloads.log.2"))
    log.write_text("5\n")
    assert sorted(read()) == ["4", "5"]
    reading.close()


@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("name", ["downloads.log.1", "downloads-2026-11-29T00-00-00.000.log"])
def test_a_renamed_log_is_read_to_its_end(log: Path, name: str, is_running: bool) -> None:
    reading = Reading(log)
    assert reading.lines() == ["1", "2"]
    append(log, "3\n")
    renamed = log.rename(log.with_name(name))
    append(renamed, "4\n")
    log.write_text("5\n")
    if not is_running:
        reading.again()
    assert sorted(reading.lines()) == ["3", "4", "5"]
    append(renamed, "6\n")  # of a worker that has not opened the new one
    append(log, "7\n")
    assert sorted(reading.lines()) == ["6", "7"]
    reading.again()
    assert reading.lines() == []


@pytest.mark.parametrize("is_running", [True, False])
def test_a_log_that_was_renamed_twice_meanwhile(log: Path, is_running: bool) -> None:
    reading = Reading(log)
    log.with_name("downloads.log.0").write_text("of long ago\n")
    os.utime(log.with_name("downloads.log.0"), (1_700_000_000,) * 2)
    log.with_name("downloads.log.3.gz").write_text("packed\n")
    assert reading.lines() == ["1", "2"]
    append(log, "3\n")
    log.rename(log.with_name("downloads.log.2"))
    log.write_text("4\n")
    log.rename(log.with_name("downloads.log.1"))
    log.write_text("5\n")
    if not is_running:
        reading.again()
    assert sorted(reading.lines()) == ["3", "4", "5"]
    assert reading.lines() == []


@pytest.mark.parametrize("is_running", [True, False])
def test_a_log_that_was_copied_and_truncated(log: Path, is_running: bool) -> None:
    """What was written to it between the last look and the copy is read in the copy, and nothing is read twice."""
    reading, expected = Reading(log), ["1", "2"]
    for number in range(3):
        assert sorted(reading.lines()) == expected
        append(log, f"{number} before\n")
        for old in range(number, 0, -1):
            log.with_name(f"downloads.log.{old}").rename(log.with_name(f"downloads.log.{old + 1}"))
        shutil.copyfile(log, log.with_name("downloads.log.1"))
        os.truncate(log, 0)
        append(log, f"{number} after\n")
        if not is_running:
            reading.again()
        expected = [f"{number} after", f"{number} before"]
    assert sorted(reading.lines()) == expected
    reading.again()
    assert reading.lines() == []


def test_a_log_that_was_copied_and_truncated_before_anything_of_it_was_read(log: Path) -> None:
    reading = Reading(log)
    for number in (1, 2):
        reading.log.open()
        append(log, f"of copy {number}\n")
        shutil.copyfile(log, log.with_name(f"downloads.log.{number}"))
        os.truncate(log, 0)
        reading.log.open()
        append(log, "3\n")
    assert sorted(reading.lines()) == ["1", "2", "3", "3", "of copy 1", "of copy 2"]


@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("text", ["a\n", "a\nb\n", "a\nbcd\nefg\n"])
def test_a_truncated_log_is_read_from_its_beginning(log: Path, text: str, is_running: bool) -> None:
    reading = Reading(log)
    assert reading.lines() == ["1", "2"]
    with log.open("w") as file:  # the same inode
        file.write(text)
    if not is_running:
        reading.again()
    assert reading.lines() == text.split()


def test_lines_that_could_not_be_counted_are_read_again(log: Path) -> None:
    reading = Reading(log)
    reading.log.look()
    for lines, _ in reading.log.read():
        assert lines == ["1", "2"]
        break
    assert reading.lines() == ["1", "2"]


def test_a_line_without_an_end_does_not_stop_the_reading(log: Path) -> None:
    append(log, "x" * 1_000_000 + "\n3\n")
    assert Reading(log).lines()[-1] == "3"


def test_a_log_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Reading(tmp_path / "none.log").lines()


def test_each_log_of_a_directory_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "2026" / "11").mkdir(parents=True)
    first, second = tmp_path / "2026-11-28-10-00-00-A", tmp_path / "2026" / "11" / "B"
    first.write_text("1\n2\n")
    second.write_text("3\n")
    for name, age in (("old", 8 * 86_400), (".hidden", 0), ("packed.gz", 0), ("empty", 0)):
        (tmp_path / name).write_text("" if name == "empty" else "no\n")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    for age, path in enumerate((second, first)):
        os.utime(path, (time.time() - 60 - age,) * 2)
    reading = Reading(tmp_path)
    assert reading.lines() == ["1", "2", "3"]
    assert reading.lines() == []
    (tmp_path / "C").write_text("4\nhal")
    assert reading.lines() == ["4"]
    reading.log.close()
    reading.again()
    append(tmp_path / "C", "f\n")
    assert reading.lines() == ["half"]
    (tmp_path / "C").write_text("other\n")  # the same inode, but another log
    assert reading.lines() == ["other"]
    reading.log.close()
    reading.again()
    assert reading.lines() == []
    reading.log.close()


def test_a_log_of_a_directory_that_is_removed_meanwhile_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "A").write_text("1\n")
    (tmp_path / "B").write_text("2\n")
    log = open_log(str(tmp_path), [])
    assert log.look() is not None
    (tmp_path / "A").unlink()
    assert [lines for lines, _ in log.read()] == [["2"]]
    log.close()


@pytest.mark.parametrize("kind", ["directory", "renamed logs"])
def test_a_log_that_is_removed_while_its_directory_is_read_is_left_out(tmp_path: Path, log: Path, kind: str) -> None:
    has_ended = threading.Event()

    def come_and_go() -> None:
        while not has_ended.is_set():
            for number in range(50):
                (tmp_path / f"{log.name}.{number}").touch()
            for number in range(50):
                (tmp_path / f"{log.name}.{number}").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            reading = open_log(str(tmp_path if kind == "directory" else log), [])
            reading.look()
            reading.close()
    finally:
        has_ended.set()
        thread.join()


def test_many_logs_of_a_directory_cost_no_more_each(tmp_path: Path) -> None:
    reading, reads = Reading(tmp_path), 0

    def count(frame: object, event: str, function: Any) -> None:
        nonlocal reads
        reads += event == "c_call" and function is os.pread

    for begin in (0, 100):
        for number in range(begin, begin + 100):
            (tmp_path / f"{number:03}").write_text(f"{number}\n")
        reads = 0
        sys.setprofile(count)
        try:
            lines = reading.lines()
        finally:
            sys.setprofile(None)
        assert lines == [f"{number}" for number in range(begin, begin + 100)]
        assert 100 <= reads < 1000
    reading.log.close()
