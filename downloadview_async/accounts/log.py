"""`AccessLog`: one line for each answer, as text, as JSON, or in the combined format of Apache and nginx.

All lines are printable ASCII. They have no query, because it may hold the token of a link, and no header of the request
except the user agent and, in the combined format, the page that the request came from, without its query.
"""

import json
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, Literal
from urllib.parse import quote

from downloadview_async.accounts.outcome import Outcome
from downloadview_async.errors import ConfigurationError
from downloadview_async.http.log_text import LIMIT, cut

LogFormat = Literal["text", "json", "combined"]

_ATOMIC = select.PIPE_BUF  # bytes that a pipe takes at once, so that lines of several processes do not mix
_WRITABLE_SECONDS = 5.0  # that a pipe without a reader may take to be writable

# Without a reader, a FIFO that is opened to be written to would block the thread for ever.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK

_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~-]*", re.ASCII)
_PLAIN_WORD = re.compile(r"[!#-\[\]-~]+", re.ASCII)  # printable, without spaces, quotes and backslashes
_NOT_PAGE = re.compile("(?<=//)[^/?#]*@|[?#].*", re.DOTALL)  # the password, the query and the fragment of a URL


class AccessLog:
    """Writes a line for each outcome: `Accounts(app, listeners=[AccessLog("access.log", format="json")])`.

    path: a file, to which lines are appended; None for the standard error. Several processes may write to the same
    file. If the file is renamed or removed, as `logrotate` does, the next lines go to a new file of that name.
    format: "text" for people, "json" for programs, "combined" as Apache and nginx write it, with the seconds, the
    result, the kind, the link and the id of the request at the end.

    Raises `ConfigurationError` for another format, and if the file cannot be opened.
    """

    _path: str | None = None
    _descriptor = -1
    _is_pipe = False

    def __init__(self, path: str | os.PathLike[str] | None = None, *, format: LogFormat = "text") -> None:  # noqa: A002
        if format not in _FORMATS:
            raise ConfigurationError(f"format is {format!r}: give {', '.join(_FORMATS)}")
        self.prepare: Callable[[Outcome], str] = _FORMATS[format]
        """Returns the line of an outcome."""
        self._path = None if path is None else os.path.abspath(path)
        self._is_torn = False
        try:
            self._open()
        except OSError as exc:
            raise ConfigurationError(
                f"the log {self._path!r} cannot be written ({exc.strerror}): give a file in a directory where this "
                "user may write"
            ) from exc

    def __del__(self) -> None:
        """Close the file."""
        self.close()

    def __call__(self, outcome: Outcome) -> None:
        """Write the line of an outcome. Raises `OSError` if it cannot be written; it is lost then."""
        self.write([self.prepare(outcome)])

    def write(self, lines: list[str]) -> None:
        """Write lines that `prepare` has made. Raises `OSError` if they cannot be written; they are lost then."""
        self._open()
        if self._is_torn:
            lines = ["", *lines]  # ends the line of which only the beginning was written
        for part in _parts(lines) if self._is_pipe else ["\n".join([*lines, ""])]:
            self._write(part.encode("ascii"))

    def close(self) -> None:
        """Close the file. Another outcome opens it again."""
        if self._path is not None and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        """Open the file, if it is not open, or if there is another file of that name now."""
        if self._path is None:
            if self._descriptor < 0:
                self._descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
                self._is_pipe = _is_pipe(self._descriptor)
            return
        try:
            if self._descriptor >= 0 and self._is_current(self._path):
                return
            opened = os.open(self._path, _FLAGS, 0o640)
        except OSError:
            if self._descriptor < 0:
                raise
            return  # in the file that is open, the lines are not lost
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._is_torn, self._is_pipe = opened, False, _is_pipe(opened)

    def _is_current(self, path: str) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:  # the terminal or pipe is shared with a process that does not block
                    if not select.select([], [self._descriptor], [], _WRITABLE_SECONDS)[1]:
                        raise
        finally:
            self._is_torn = bool(left) and (len(left) < len(data) or self._is_torn)


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _parts(lines: list[str]) -> list[str]:
    """Return whole lines in parts that a pipe takes at once, as far as a line fits into one."""
    parts: list[str] = []
    for line in lines:
        if parts and len(parts[-1]) + len(line) + 1 <= _ATOMIC:
            parts[-1] += f"{line}\n"
        else:
            parts.append(f"{line}\n")
    return parts


def _text(outcome: Outcome) -> str:
    answer = _text_of_answer if len(outcome.path) <= LIMIT else _text_of_answer.__wrapped__  # keep no long texts
    before, behind = answer(
        outcome.method,
        outcome.path,
        outcome.http_version,
        outcome.status,
        outcome.result if outcome.reason is None else f"{outcome.result} ({outcome.reason})",
        outcome.kind,
        outcome.sent,
        outcome.user,
    )
    by_link = "" if outcome.link_id is None else f", link {_word(outcome.link_id)}"
    return (
        f"{_date(outcome.time)} {_client_of(outcome)} {before}{outcome.seconds:.3f}{behind}{by_link}, request "
        f"{outcome.request_id}"
    )


@lru_cache(1024)  # for answers with the same file, which are many whenever each microsecond counts
def _text_of_answer(
    method: str,
    path: str,
    http_version: str,
    status: int,
    result: str,
    kind: str,
    sent: int,
    user: str | None,
) -> tuple[str, str]:
    """Return what a line has before and behind the seconds, without what each request has: client, link and id."""
    by_user = "" if user is None else f", user {_word(user)}"
    request = _request(method, path, http_version)
    return f'"{request}" {status} {result} {_word(kind)} {sent} bytes in ', f" s{by_user}"


def _json(outcome: Outcome, *, is_cut: bool = False) -> str:
    agent = None
    for field, value in outcome.headers:
        if field == b"user-agent":
            agent = value.decode("latin-1")
            break
    client, link, first = outcome.client, outcome.link_id, outcome.first_byte
    members = _json_of_answer if len(outcome.path) <= LIMIT else _json_of_answer.__wrapped__  # keep no long texts
    of_user, before, between, behind = members(
        outcome.user,
        outcome.method,
        outcome.status,
        outcome.result,
        outcome.reason,
        outcome.kind,
        outcome.path,
        outcome.sent,
        outcome.name,
        outcome.etag,
        outcome.size,
        outcome.route,
        outcome.source,
    )
    line = (
        f'{{"time":"{_date(outcome.time)}","request_id":"{outcome.request_id}"'
        f',"client":{"null" if client is None else _quote(client)}{of_user}{"null" if link is None else _quote(link)}'
        f'{before}{outcome.seconds:.6f},"first_byte":'
        f"{'null' if first is None else f'{first:.6f}'}{between}{'null' if agent is None else _quote(agent)}{behind}"
    )
    return line if len(line) <= _ATOMIC or is_cut else _json(_cut(outcome), is_cut=True)


@lru_cache(1024)  # for answers with the same file, which are many whenever each microsecond counts
def _json_of_answer(
    user: str | None,
    method: str,
    status: int,
    result: str,
    reason: str | None,
    kind: str,
    path: str,
    sent: int,
    name: str | None,
    etag: str | None,
    size: int | None,
    route: str | None,
    source: str | None,
) -> tuple[str, str, str, str]:
    """Return the members of a line that come before the link, the seconds, the user agent, and at the end."""
    answer = _members(method=method, status=status, result=result, reason=reason, kind=kind, path=path)
    return (
        f'{_members(user=user)},"link_id":',
        f'{answer},"bytes":{sent},"seconds":',
        f'{_members(name=name, etag=etag, size=size)},"user_agent":',
        f"{_members(route=route, source=source)}}}",
    )


def _members(**values: str | int | None) -> str:
    """Return further members of a JSON object."""
    return f",{json.dumps(values, separators=(',', ':'))[1:-1]}"


def _cut(outcome: Outcome) -> Outcome:
    """Return an outcome whose texts are cut to about `LIMIT` characters."""
    names = ("method", "path", "name", "client", "user", "link_id", "etag")
    texts: dict[str, Any] = {name: cut(text) for name in names if (text := getattr(outcome, name))}
    return replace(outcome, headers=[(name, value[:LIMIT]) for name, value in outcome.headers], **texts)


def _combined(outcome: Outcome) -> str:
    referrer = _header(outcome, b"referer")
    agent = _header(outcome, b"user-agent")
    return (
        f"{_client_of(outcome)} - {_word(outcome.user)} [{_combined_date(outcome.time)}] "
        f'"{_request(outcome.method, outcome.path, outcome.http_version)}" {outcome.status} {outcome.sent} '
        f'"{"-" if referrer is None else _quoted(_NOT_PAGE.sub("", referrer))}" '
        f'"{"-" if agent is None else _quoted(agent)}" '
        f"{outcome.seconds:.3f} {outcome.reason or outcome.result} {_word(outcome.kind)} {_word(outcome.link_id)} "
        f"{outcome.request_id}"
    )


_FORMATS = {"text": _text, "json": _json, "combined": _combined}


def _request(method: str, path: str, http_version: str) -> str:
    """Return the first line of a request as the client has sent it, without its query."""
    if not _PLAIN_PATH.fullmatch(path):
        path = quote(path, safe="/!$&()*+,;=:@~", errors="surrogatepass")
    return f"{_quoted(method)} {path if len(path) <= LIMIT else cut(path)} HTTP/{http_version}"


def _quoted(text: str) -> str:
    """Return a text as it is written between quotation marks."""
    if len(text) <= LIMIT and _PLAIN_WORD.fullmatch(text):
        return text
    # nginx writes quotation marks in this way, too: a cut cannot separate one from a backslash before it
    return cut(text.encode("unicode_escape").decode().replace('"', "\\x22"))


def _word(text: str | None) -> str:
    """Return a text without spaces and quotation marks; "-" if there is none."""
    if not text:
        return "-"
    return text if len(text) <= LIMIT and _PLAIN_WORD.fullmatch(text) else _quoted(text).replace(" ", "\\x20")


def _header(outcome: Outcome, name: bytes) -> str | None:
    for field, value in outcome.headers:
        if field == name:
            return value.decode("latin-1")
    return None


_short_word = lru_cache(1024)(_word)  # for clients: with one address come many requests
_SHORT = 64  # characters: more than any address has


def _client_of(outcome: Outcome) -> str:
    client = outcome.client
    return _word(client) if client is not None and len(client) > _SHORT else _short_word(client)


class _Second:
    """Formats times. The text of a second is made once."""

    def __init__(self, form: Callable[[time.struct_time], str]) -> None:
        self._form = form
        self._last = -1, ""

    def __call__(self, seconds: float) -> str:
        second, text = self._last
        if second != (whole := int(seconds)):
            text = self._form(time.gmtime(whole))
            self._last = whole, text
        return text


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")  # in any locale
_iso = _Second(lambda now: time.strftime("%Y-%m-%dT%H:%M:%S", now))
_combined_date = _Second(lambda now: time.strftime(f"%d/{_MONTHS[now.tm_mon - 1]}/%Y:%H:%M:%S +0000", now))


_last_date = -1, ""  # the milliseconds since 1970, and their text


def _date(seconds: float) -> str:
    global _last_date
    millis, text = _last_date
    if millis != (whole := int(seconds * 1000)):
        text = f"{_iso(seconds)}.{whole % 1000:03d}Z"
        _last_date = whole, text
    return text
