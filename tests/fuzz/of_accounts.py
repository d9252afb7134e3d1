"""Lines of logs: those of proxies and S3, which are read, and ours, which programs read. Completed downloads."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from downloadview_async.accounts import log
from downloadview_async.accounts.completion import MAX_LAYERS, Delivered, Session, has_file, whole
from downloadview_async.accounts.completion_store import _session_of
from downloadview_async.accounts.outcome import Outcome
from downloadview_async.accounts.proxy_log import LogLine
from downloadview_async.accounts.shared_samples import SharedSamples
from downloadview_async.http.metadata import ByteRange
from tests.fuzz import inputs as st
from tests.fuzz.inputs import edited, edited_text
from tests.fuzz.targets import is_printable_ascii, target, target_within

SIZE = 10
DELEGATED = Delivered(
    session="s",
    time=0.0,
    request_id="id",
    source="",
    file="f",
    route="",
    user="",
    link="",
    client="",
    size=SIZE,
    by="x-accel-redirect",
)

# A line of each proxy, as the printed configurations have it, and lines of S3.
LINES = (
    '{"request_id":"id","method":"GET","status":"206","bytes":"4","content_range":"bytes 2-5/10","range":"bytes=2-5"}',
    '2026/01/01 12:00:00 {"request_id":"id","method":"GET","status":200,"bytes":10,"content_range":"-","range":"-"}',
    '{"request_id":"","uuid":"id","method":"GET","status":"206","bytes":"300","content_range":"",'
    '"range":"bytes=0-1,4-5","connection":"X"}',
    '{"request_id":"a\\x22b","method":"GET","status":"304","bytes":"-","content_range":"","range":""}',
    '{"request_id":"id","method":"HEAD","status":"200","bytes":"0"}',
)
S3 = (
    "owner bucket [06/Feb/2019:00:00:38 +0000] 192.0.2.3 - 3E57427F3 REST.GET.OBJECT a.txt "
    '"GET /a.txt?x-request-id=id&X-Amz-Expires=60 HTTP/1.1" 200 - 10 10 70 10 "-" "curl" - host SigV4 - QueryString h',
    "owner bucket [06/Feb/2019:00:00:38 +0000] 192.0.2.3 - 3E57427F3 REST.GET.OBJECT a.txt "
    '"GET /a.txt?x-request-id=id HTTP/1.1" 206 - 4 10 70 10 "-" "curl" - host SigV4 - QueryString h',
    "owner bucket [06/Feb/2019:00:00:38 +0000] - - 3E57427F3 WEBSITE.GET.OBJECT a "
    '"GET /?x-request-id=id HTTP/1.1" 304 - - 10 70 - "-" "-" -',
)


@target(
    edited_text(
        *LINES, words=['"connection":"X"', "bytes 0-9/10", '"status":1e3', "null", "{", "[" * 3000, '{"a":' * 3000]
    )
    | edited_text(*S3, words=[" - ", '"GET ', "x-request-id=", "%00", "[", "]"])
)
def lines_of_proxies_and_s3(line: str) -> None:
    parsed = LogLine.parse(line)
    if parsed is None:
        return
    assert re.fullmatch("[!-~]{1,128}", parsed.request_id)
    assert parsed.sent >= 0
    assert re.fullmatch("[ -~]*", parsed.requested)
    for size in (None, 0, SIZE):
        spans = parsed.spans(size)
        assert all(0 <= start < stop <= (size or 0) for start, stop in spans)
        assert sum(stop - start for start, stop in spans) <= parsed.sent, "it counts more bytes than were sent"
    closing = parsed.closing(DELEGATED)
    if closing is not None:
        assert parsed.has_file
        if closing.is_whole:
            assert parsed.sent >= SIZE
            assert not parsed.is_cut


@target(st.tuples(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12), st.integers(0, SIZE)))
def sessions(value: tuple[list[tuple[int, int]], int]) -> None:
    pairs, loose_end = value
    session, counted, got = Session(), 0, [0] * SIZE
    for first, second in pairs:
        start, stop = min(first, second), max(first, second)
        if start == stop:
            continue
        loose = (stop, max(stop, loose_end)) if loose_end > stop else None
        more, session = session.after(((start, stop),), SIZE, loose=loose)
        counted += more
        for position in range(start, stop):
            got[position] += 1
        row = SimpleNamespace(
            layers=json.dumps(session.layers), counted=session.counted, loose=json.dumps(session.loose)
        )
        assert _session_of(row) == session, "a session changes when it is stored"
        assert len(session.layers) <= MAX_LAYERS
    if loose_end == 0:  # without loose ends, the downloads are as many as the byte that was delivered least
        assert counted == min(got)


OUTCOMES = st.builds(
    Outcome,
    request_id=st.just("f" * 32),
    time=st.sampled_from([0.0, 1_700_000_000.123]),
    method=edited("GET", "HEAD", 'G"T'),
    path=edited_text("/files/a.txt", "/a b", "/\n", '/"', "/%41"),
    http_version=st.sampled_from(["1.1", "1.0"]),
    client=st.just(None) | edited_text("203.0.113.9"),
    route=st.just(None) | st.just("/files/{path:path}"),
    name=st.just(None) | edited_text("a.txt"),
    user=st.just(None) | edited_text("ada"),
    link_id=st.just(None) | edited("aaaaaaaaaaaa"),
    etag=st.just(None) | edited('"v1"'),
    size=st.just(None) | st.integers(0, 2**63),
    status=st.sampled_from([200, 206, 304, 404, 0]),
    kind=st.sampled_from(["chunks", "offloaded:nginx", "listing"]),
    spans=st.sampled_from([(), (ByteRange(0, 10),), (None,), (ByteRange(0, 1), ByteRange(2, 3))]),
    sent=st.integers(0, 2**63),
    first_byte=st.just(None) | st.just(0.25),
    result=st.sampled_from(["completed", "aborted", "delegated"]),
    reason=st.sampled_from([None, "client"]),
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"user-agent", b"referer", b"cookie"]),
            edited("Mozilla/5.0", "https://u:secret@h/p?token=secret#secret", 'a"b\\c').map(
                lambda text: text.encode("latin-1")
            ),
        ),
        max_size=3,
    ),
)

COMBINED = re.compile(
    r'\S+ - \S+ \[[^]]+\] "(?:[^"\\]|\\.)* [^ "]* HTTP/1\.[01]" \d+ \d+ '
    r'"(?:[^"\\]|\\.)*" "(?:[^"\\]|\\.)*" \S+ \S+ \S+ \S+ f{32}'
)


def joined(text: str) -> str:
    """Return a text in which two surrogates are one character, as JSON cannot tell these apart."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@target(
    OUTCOMES,
    regressions=[
        Outcome(request_id="f" * 32, time=0.0, method="G" * 65_536, path="/", http_version="1.1"),
        Outcome(request_id="f" * 32, time=0.0, method="G" + '"a' * 30_000, path="/", http_version="1.1"),
    ],
)
def lines_of_our_logs(outcome: Outcome) -> None:
    lines: dict[str, str] = {name: form(outcome) for name, form in log._FORMATS.items()}
    for line in lines.values():
        assert is_printable_ascii(line)
        assert len(line) < 16_384
    fields: Any = json.loads(lines["json"])
    assert fields["status"] == outcome.status
    assert fields["bytes"] == outcome.sent
    if len(lines["json"]) < 1000:
        assert fields["path"] == joined(outcome.path)
        assert fields["client"] == (None if outcome.client is None else joined(outcome.client))
    assert COMBINED.fullmatch(lines["combined"]), lines["combined"]
    whole(outcome)
    has_file(outcome)


@contextmanager
def _samples_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="downloadview-fuzz-") as name:
        yield Path(name)


SAMPLES = (
    '{"merged": [], "samples": {"link_failures": [["secure_link", 5]]}}',
    '{"merged": ["12"], "samples": {"limits_uncounted": [[1]], "unknown": [[2]]}}',
)


@target_within(
    edited(*SAMPLES, words=["null", "[]", "{}", "[" * 3000]),
    _samples_directory,
    regressions=["{}", '{"merged": [], "samples": {"link_failures": 1}}', "[" * 100_000],
)
def samples_of_processes(content: str, directory: Path) -> None:
    for name in ("ended.json", "12.json"):
        (directory / name).write_text(content)
        (directory / "12.live").touch()
        total = SharedSamples(directory).total()
        assert isinstance(total, dict)
        for left in directory.iterdir():
            left.unlink()
