"""For the tests of applications: call an ASGI application with a client that can leave, and check its answer.

    answer = await call(app, "/files/report.pdf", headers={"Range": "bytes=0-7"})
    assert_download_response(answer, status=206, filename="report.pdf", content=b"%PDF-1.7")

The assertions take a `Recording`, or a response of httpx2, httpx or Starlette's `TestClient`. An expected value of None
is not checked.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, unquote

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

from downloadview_async.http.fields import OFFLOAD_HEADERS, TOKEN_CHAR

_TOKEN = f"{TOKEN_CHAR}+"
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({_TOKEN})[ \t]*=[ \t]*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")[ \t]*')


@dataclass(slots=True)
class Recording:
    """Everything that an application did with one request.

    messages: the messages that it sent until the client left, in order. dropped: how many messages it sent after that.
    error: the exception that it raised. cancelled: whether `cancel_after_bytes` cancelled it.
    """

    method: str
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0
    error: Exception | None = None
    cancelled: bool = False

    @property
    def started(self) -> bool:
        """Whether the response has begun, so that there are a status and headers."""
        return any(message["type"] == "http.response.start" for message in self.messages)

    @property
    def complete(self) -> bool:
        """Whether the response has ended properly. False for an aborted one."""
        return any(_is_last(message) for message in self.messages)

    @property
    def status(self) -> int:
        """The status. Raises `AssertionError` if the response has not begun."""
        return int(self._start["status"])

    @property
    def headers(self) -> Headers:
        """The headers, whose names ignore case. Raises `AssertionError` if the response has not begun."""
        return Headers(raw=list(self._start.get("headers", ())))

    @property
    def body(self) -> bytes:
        """The bytes of the body that the client has got."""
        return b"".join(_bytes_of(message) for message in self.messages)

    @property
    def _start(self) -> Message:
        for message in self.messages:
            if message["type"] == "http.response.start":
                return message
        raise AssertionError(f"the application has not begun a response, it sent {self.messages!r}")


def _bytes_of(message: Message) -> bytes:
    return bytes(message.get("body", b"")) if message["type"] == "http.response.body" else b""


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.pathsend" or (
        message["type"] == "http.response.body" and not message.get("more_body", False)
    )


async def call(
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "GET",
    query: str = "",
    headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    body: bytes = b"",
    extensions: Mapping[str, Any] | None = None,
    scope: Mapping[str, Any] | None = None,
    leave_after_bytes: int | None = None,
    leave_after_messages: int | None = None,
    stall_after_bytes: int | None = None,
    cancel_after_bytes: int | None = None,
    raise_errors: bool = True,
) -> Recording:
    """Send one request to `app`, and return what it did.

    path: decoded, without the query. headers: names in any case. Pass pairs if a name occurs twice. extensions: the
    extensions that the server offers. scope: further entries of the scope, such as `path_params`.
    leave_after_bytes, leave_after_messages: the client leaves after so many bytes or messages, with 0 before the first.
    As with real servers, `receive` then returns `http.disconnect`, and `send` drops messages without raising.
    stall_after_bytes: the client stops reading after so many bytes, and `send` never returns. Either the application or
    the caller has to give up.
    cancel_after_bytes: the client stops reading after so many bytes, and the application is cancelled inside `send`.
    raise_errors: whether an exception of the application is raised. It is recorded in any case.

    Raises `RuntimeError` in the application for a message that ASGI does not allow at this point.
    """
    recording = Recording(method)
    client = _Client(
        recording,
        body,
        leave=(leave_after_bytes, leave_after_messages),
        stall_after_bytes=stall_after_bytes,
        cancel_after_bytes=cancel_after_bytes,
    )
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    complete_scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path, errors="surrogatepass").encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        "extensions": dict(extensions or {}),
        **(scope or {}),
    }
    with client.cancellation:
        try:
            await app(complete_scope, client.receive, client.send)
        except Exception as exc:
            recording.error = exc
            if raise_errors:
                raise
    recording.cancelled = client.cancellation.cancelled_caught
    return recording


class _Client:
    """The other side of a connection: `receive` and `send` of a server."""

    def __init__(
        self,
        recording: Recording,
        body: bytes,
        *,
        leave: tuple[int | None, int | None],
        stall_after_bytes: int | None,
        cancel_after_bytes: int | None,
    ) -> None:
        self.cancellation = anyio.CancelScope()
        self._recording = recording
        self._request: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._leave_after_bytes, self._leave_after_messages = leave
        self._stall_after_bytes = stall_after_bytes
        self._cancel_after_bytes = cancel_after_bytes
        self._received = 0
        self._gone = anyio.Event()
        self._leave_if_due()

    async def receive(self) -> Message:
        if not self._gone.is_set() and self._request is not None:
            request, self._request = self._request, None
            return request
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        # No checkpoint here: the `send` of a real server returns at once while its buffers have room.
        self._check_order(message)
        if self._gone.is_set():
            self._recording.dropped += 1
            return
        self._recording.messages.append(message)
        self._received += len(_bytes_of(message))
        self._leave_if_due()
        if _is_last(message):
            self._gone.set()  # "http.disconnect [...] sent [...] if receive is called after a response has been sent"
        elif message["type"] == "http.response.body":
            if _reached(self._received, self._cancel_after_bytes):
                self.cancellation.cancel()
                await anyio.sleep_forever()
            if _reached(self._received, self._stall_after_bytes):
                await anyio.sleep_forever()

    def _check_order(self, message: Message) -> None:
        kind = message["type"]
        if not kind.startswith("http.response."):
            raise RuntimeError(f"{kind!r} is not a message of a response")
        if self._recording.complete:
            raise RuntimeError(f"{kind!r} after the end of the response")
        # messages to a client that has left are not recorded, so their order cannot be checked
        if self._recording.dropped == 0 and not self._gone.is_set():
            if kind == "http.response.start" and self._recording.started:
                raise RuntimeError("a second http.response.start")
            if kind in ("http.response.body", "http.response.pathsend") and not self._recording.started:
                raise RuntimeError(f"{kind!r} before http.response.start")

    def _leave_if_due(self) -> None:
        if _reached(self._received, self._leave_after_bytes) or _reached(
            len(self._recording.messages), self._leave_after_messages
        ):
            self._gone.set()


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit


def assert_download_response(
    response: Any,
    *,
    content: bytes | str | None = None,
    filename: str | None = None,
    attachment: bool | None = None,
    content_type: str | None = None,
    status: int = 200,
) -> None:
    """Check a response that sends a file itself. `AssertionError` tells the expected and the actual value.

    content: the bytes of the body, or text in UTF-8. filename: the name under which a client saves the file: filename*
    if there is one, decoded by RFC 8187. attachment: False means inline. content_type: without parameters, it is
    compared without those of the response.

    The response must not have an offload header. A `Recording` has to be complete and as long as its Content-Length.
    """
    seen = _Seen(response)
    seen.check("status", status, seen.status)
    for name in sorted(OFFLOAD_HEADERS):
        seen.check_absent(name)
    if isinstance(response, Recording):
        _check_framing(response)
    _check_presentation(seen, content_type=content_type, filename=filename, attachment=attachment)
    if content is not None:
        _check_content(content.encode() if isinstance(content, str) else content, seen.content)


def assert_x_accel_redirect(
    response: Any,
    *,
    redirect_url: str,
    content_type: str | None = None,
    filename: str | None = None,
    attachment: bool | None = None,
    buffering: bool | None = None,
    charset: str | None = None,
    expires: int | Literal["off"] | None = None,
    limit_rate: int | None = None,
) -> None:
    """Check a response that makes nginx send the file.

    redirect_url: the internal URI in the header, percent-encoded. The other arguments are those of `XAccelRedirect` and
    `assert_download_response`. The body has to be empty, the status 200, and no header may be about ranges: nginx
    evaluates Range itself.
    """
    seen = _Seen(response)
    _check_offload(seen, "x-accel-redirect", redirect_url.encode())
    _check_presentation(seen, content_type=content_type, filename=filename, attachment=attachment)
    options = {
        "x-accel-buffering": None if buffering is None else "yes" if buffering else "no",
        "x-accel-charset": charset,
        "x-accel-expires": expires,
        "x-accel-limit-rate": limit_rate,
    }
    for name, expected in options.items():
        if expected is not None:
            seen.check(name, str(expected), seen.header(name))


def assert_x_sendfile(
    response: Any,
    *,
    file_path: str | os.PathLike[str],
    encoding: Literal["raw", "percent"] = "raw",
    content_type: str | None = None,
    filename: str | None = None,
    attachment: bool | None = None,
) -> None:
    """Check a response that makes Apache or lighttpd send the file.

    file_path: the path as the proxy sees it. encoding: that of the `XSendfile`. All else is as in
    `assert_x_accel_redirect`.
    """
    path = os.fspath(file_path)
    seen = _Seen(response)
    _check_offload(seen, "x-sendfile", quote(path).encode() if encoding == "percent" else os.fsencode(path))
    _check_presentation(seen, content_type=content_type, filename=filename, attachment=attachment)


class _Seen:
    """The raw values of a response of any kind that the assertions take."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.status: int = response.status if isinstance(response, Recording) else response.status_code
        self._headers = [(bytes(name).lower(), bytes(value)) for name, value in response.headers.raw]

    @property
    def content(self) -> bytes:
        return self._response.body if isinstance(self._response, Recording) else bytes(self._response.content)

    def raw(self, name: str) -> bytes | None:
        values = [value for key, value in self._headers if key == name.encode()]
        if len(values) > 1:
            raise AssertionError(f"{name}: expected once, found {len(values)} times: {values!r}")
        return values[0] if values else None

    def header(self, name: str) -> str | None:
        value = self.raw(name)
        return None if value is None else value.decode("latin-1")

    def check(self, what: str, expected: object, actual: object) -> None:
        if expected != actual:
            shown = "it is absent" if actual is None else f"found {actual!r}"
            raise AssertionError(f"{what}: expected {expected!r}, {shown}")

    def check_absent(self, name: str) -> None:
        if (value := self.raw(name)) is not None:
            raise AssertionError(f"{name}: expected to be absent, found {value!r}")


def _check_framing(recording: Recording) -> None:
    if recording.error is not None:
        raise AssertionError(f"expected a complete response, the application raised {recording.error!r}")
    if not recording.complete:
        raise AssertionError(f"expected a complete response, it broke off after {len(recording.body)} bytes")
    length = recording.headers.get("content-length")
    if length is not None and recording.method != "HEAD" and recording.status != 304:
        actual = len(recording.body)
        if length != str(actual):
            raise AssertionError(f"content-length: it promises {length!r} bytes, the body has {actual}")


def _check_content(expected: bytes, actual: bytes) -> None:
    if expected == actual:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), min(map(len, (expected, actual)))
    )
    raise AssertionError(
        f"content: expected {len(expected)} bytes, found {len(actual)}; from byte {at} on "
        f"expected {expected[at : at + 20]!r}, found {actual[at : at + 20]!r}"
    )


def _check_presentation(
    seen: _Seen, *, content_type: str | None, filename: str | None, attachment: bool | None
) -> None:
    if content_type is not None:
        actual = seen.header("content-type")
        if actual is not None and ";" not in content_type:
            actual = actual.partition(";")[0].rstrip()
        seen.check("content-type", content_type, actual)
    if filename is None and attachment is None:
        return
    kind, name = _disposition(seen.raw("content-disposition"))
    if attachment is not None:
        seen.check("content-disposition", "attachment" if attachment else "inline", kind)
    if filename is not None:
        seen.check("filename in content-disposition", filename, name)


def _disposition(value: bytes | None) -> tuple[str | None, str | None]:
    """Return the type, and the name under which a client saves the file [RFC 6266 4.3]."""
    if value is None:
        return None, None
    text = value.decode("latin-1")
    kind, separator, rest = text.partition(";")
    rest = separator + rest
    parameters: dict[str, str] = {}
    while rest:
        match = _PARAMETER.match(rest)
        if match is None or match[1].lower() in parameters:
            raise AssertionError(f"content-disposition: expected type and parameters by RFC 6266, found {text!r}")
        quoted = match[3]
        parameters[match[1].lower()] = match[2] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        rest = rest[match.end() :]
    extended = parameters.get("filename*")
    if extended is None:
        return kind.strip().lower(), parameters.get("filename")
    charset, _, encoded = extended.partition("'")
    _, language_end, encoded = encoded.partition("'")
    if charset.lower() != "utf-8" or not language_end:
        raise AssertionError(f"content-disposition: expected filename*=UTF-8''... by RFC 8187, found {text!r}")
    try:
        return kind.strip().lower(), unquote(encoded, errors="strict")
    except UnicodeDecodeError:
        raise AssertionError(f"content-disposition: expected filename* in UTF-8, found {text!r}") from None


def _check_offload(seen: _Seen, name: str, expected: bytes) -> None:
    seen.check("status", 200, seen.status)
    actual = seen.raw(name)
    if actual != expected:
        shown = "it is absent: the file was streamed" if actual is None else f"found {actual!r}"
        raise AssertionError(f"{name}: expected {expected!r}, {shown}")
    allowed = {key for key in OFFLOAD_HEADERS if key.startswith("x-accel-")} if name == "x-accel-redirect" else {name}
    for other in sorted((OFFLOAD_HEADERS | {"accept-ranges", "content-range"}) - allowed):
        seen.check_absent(other)
    if (length := seen.header("content-length")) is not None:
        seen.check("content-length", "0", length)
    _check_content(b"", seen.content)
