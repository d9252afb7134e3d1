"""The lines in which a proxy or S3 logs what it has sent of delegated answers: `LogLine`. Pure, without I/O.

The printed configurations have the same format for all proxies: a JSON object in each line, with the id of the request,
its method, the status, the bytes that were sent, the Content-Range of the answer, and the Range of the request. A line
has neither the path nor the query. A proxy whose bytes include the head of the answer also says "connection": "X" if
the client left. A proxy that gives requests their id says it as "uuid", too: the line about a client that left before
the service answered has no id of an answer.

S3 has another format: https://docs.aws.amazon.com/AmazonS3/latest/userguide/LogFormat.html. The id of our request
is a parameter of its Request-URI. The log does not tell which range was sent, only how many bytes of how many.
"""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from downloadview_async.accounts.completion import Delivered, Span
from downloadview_async.http.fields import REQUEST_ID_PARAMETER
from downloadview_async.http.ranges import parse_content_range, parse_range, select_ranges

LONGEST = 65_536
"""Bytes of a line. A longer one is not of a proxy that the library has configured."""

_ID = re.compile("[!-~]{1,128}")
_TEXT = re.compile("[ -~]{0,4096}")  # room for the Range of as many parts as a proxy answers
_HEX = re.compile(r"\\x([0-9A-Fa-f]{2})")  # how proxies escape a byte for which JSON has another way
_S3 = re.compile(
    r"\S+ \S+ \[[^\]]*\] \S+ \S+ \S+ (?:REST|WEBSITE)\.GET\.OBJECT \S+ "  # owner ... remote IP, requester, request, key
    r'"GET [^ "?]*\?(?P<query>[^ "]*) [^"]*" (?P<status>[0-9]{3}) \S+ (?P<sent>[0-9]+|-) (?P<size>[0-9]+|-) '
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """The part of one answer that a proxy has sent.

    request_id: that of the `Outcome`. sent: bytes. content_range: of the answer. requested: the Range of the request,
    which tells the parts of an answer with several. is_cut: whether the client left before the end. object_size: that
    of the object, if S3 has sent it.
    """

    request_id: str
    status: int
    sent: int
    content_range: str = ""
    requested: str = ""
    is_cut: bool = False
    object_size: int | None = None

    @classmethod
    def parse(cls, line: str) -> "LogLine | None":
        """Return what a line says of an answer to a GET, or None for another line."""
        if (match := _S3.match(line[:LONGEST])) is not None:
            return cls._of_s3(match)
        begin = line.find("{")
        if begin < 0 or len(line) > LONGEST:
            return None
        text = _HEX.sub(r"\\u00\1", line[begin:].strip())
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or fields.get("method") != "GET":
            return None
        request_id = fields.get("request_id") or fields.get("uuid")
        status, sent = _number(fields.get("status")), _number(fields.get("bytes"))
        if not isinstance(request_id, str) or _ID.fullmatch(request_id) is None or status is None or sent is None:
            return None
        return cls(
            request_id=request_id,
            status=status,
            sent=sent,
            content_range=_text(fields.get("content_range")),
            requested=_text(fields.get("range")),
            is_cut=fields.get("connection") == "X",
        )

    @classmethod
    def _of_s3(cls, match: re.Match[str]) -> "LogLine | None":
        (request_id, *others) = parse_qs(match["query"]).get(REQUEST_ID_PARAMETER, [""])
        sent, size = _number(match["sent"]), _number(match["size"])
        if others or _ID.fullmatch(request_id) is None or sent is None or size is None:
            return None
        return cls(request_id=request_id, status=int(match["status"]), sent=sent, object_size=size)

    @property
    def has_file(self) -> bool:
        """Whether the answer may have bytes of a file: a 304, a 416 and an error have none."""
        return self.status in (200, 206)

    def spans(self, size: int | None) -> tuple[Span, ...]:
        """Return the parts of the file that were sent. size: of the file, in bytes; None: only the proxy knows it."""
        if self.object_size is not None and self.object_size != size:
            return ()  # it is another version
        if self.status == 200 and size is not None:
            return self._begun((0, size))
        if self.object_size is not None and self.sent == size:
            return self._begun((0, self.sent))  # a range may be the whole
        if self.status != 206 or size is None:
            return ()
        if self.content_range not in ("", "-"):
            part, length = parse_content_range(self.content_range) or (None, None)
            return self._begun((part.start, part.stop)) if part is not None and length == size else ()
        specs = parse_range(self.requested)
        parts = "whole" if specs is None else select_ranges(specs, size)
        if isinstance(parts, str) or self.is_cut or sum(map(len, parts)) > self.sent:
            return ()  # of an incomplete answer with several parts, nobody knows which were sent
        return tuple((part.start, part.stop) for part in parts)

    def closing(self, delegated: Delivered) -> Delivered | None:
        """Return what the proxy has delivered of a delegated answer; None for a 304, a 416 or an error."""
        is_file = self.has_file and (self.sent > 0 or not delegated.size)
        return delegated.sent_as(self.spans(delegated.size), self.sent) if is_file else None

    def _begun(self, span: Span) -> tuple[Span, ...]:
        stop = min(span[1] - self.is_cut, span[0] + self.sent)
        return ((span[0], stop),) if stop > span[0] else ()


def _text(value: object) -> str:
    """Return a text; an empty one in place of a value that no proxy obeys, and that a database may refuse."""
    return value if isinstance(value, str) and _TEXT.fullmatch(value) is not None else ""


def _number(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    if value in ("", "-"):
        return 0  # no bytes
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18 else None
