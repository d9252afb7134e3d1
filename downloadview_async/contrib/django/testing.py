"""Assertions for the tests of a Django project: did a view answer correctly, and would the proxy send the right file?

    response = self.client.get("/reports/7/")           # or: await self.async_client.get(...)
    assert_download_response(self, response, basename="report.pdf", mime_type="application/pdf", content=b"...")

The assertions check what the client or the proxy gets: the status, the headers and the bytes. Call them without
`await`, also in an `async def` test. Their failures tell the expected and the actual value.
"""

import asyncio
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import AsyncIterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import TestCase
from urllib.parse import quote, unquote

from asgiref.sync import async_to_sync
from django.http.response import HttpResponseBase
from django.test.utils import TestContextDecorator, override_settings
from django.utils.encoding import force_bytes, force_str

from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.http.fields import OFFLOAD_HEADERS, TOKEN_CHAR

_View = TypeVar("_View")

_TOKEN = f"{TOKEN_CHAR}+"
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({_TOKEN})[ \t]*=[ \t]*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")[ \t]*')


def setup_view(view: _View, request: Any, *args: Any, **kwargs: Any) -> _View:
    """Set the request of a view, as `as_view()` does, so that a test can call its methods. Return the view.

    args and kwargs: the arguments that the URLconf would pass.
    """
    target: Any = view
    target.request = request
    target.args = args
    target.kwargs = kwargs
    return view


class temporary_media_root(override_settings):  # noqa: N801 -- the name that users of django-downloadview know
    """Set MEDIA_ROOT to an empty temporary directory, and remove the directory at the end.

    Use it as a context manager, whose value is the path of the directory, or as a decorator of a function, a coroutine
    function or a `unittest.TestCase`. Each test of a decorated class gets a new directory. It takes further settings
    like `override_settings`.
    """

    def enable(self) -> str:
        """Make the directory, override the settings, and return the path of the directory."""
        self._directory = tempfile.mkdtemp(prefix="media-")
        self.options["MEDIA_ROOT"] = self._directory
        super().enable()
        return self._directory

    def disable(self) -> None:
        """Restore the settings and remove the directory."""
        try:
            super().disable()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def decorate_class(self, cls: type) -> type:
        """Give each test of the class a new directory."""
        # override_settings would copy the options now, but there is no directory yet
        decorated: type = TestContextDecorator.decorate_class(self, cls)
        return decorated


class _Validator:
    """Calls `assert_<name>(test_case, response, value)` for each assertion. Subclasses may add assertions."""

    def __call__(self, test_case: TestCase, response: HttpResponseBase, **assertions: Any) -> None:
        """Check the response itself, then each assertion. Raises `TypeError` for an unknown assertion."""
        checks = {name: getattr(self, f"assert_{name}", None) for name in assertions}
        if unknown := sorted(name for name, check in checks.items() if check is None):
            raise TypeError(f"{type(self).__name__} has no assertion {', '.join(map(repr, unknown))}")
        self._check_response(test_case, response, assertions)
        for name, check in checks.items():
            if check is not None:
                check(test_case, response, assertions[name])

    def _check_response(self, test_case: TestCase, response: HttpResponseBase, assertions: dict[str, Any]) -> None:
        raise NotImplementedError

    def assert_basename(self, test_case: TestCase, response: HttpResponseBase, value: str | bytes) -> None:
        """Check the name under which a client saves the file: filename*, or filename if that is missing."""
        expected = force_str(value)
        _, actual = _disposition(test_case, response)
        if actual is None or unicodedata.normalize("NFC", actual) != unicodedata.normalize("NFC", expected):
            _fail(test_case, "basename in Content-Disposition", expected, actual, response.get("Content-Disposition"))

    def assert_content_type(self, test_case: TestCase, response: HttpResponseBase, value: str) -> None:
        """Check the whole Content-Type, with its charset."""
        _check_header(test_case, response, "Content-Type", value)

    def assert_mime_type(self, test_case: TestCase, response: HttpResponseBase, value: str) -> None:
        """Check the type without its parameters. "image/" matches any image."""
        whole = response.get("Content-Type")
        actual = None if whole is None else whole.partition(";")[0].strip().lower()
        expected = value.partition(";")[0].strip().lower()
        if actual is None or not (actual.startswith(expected) if expected.endswith("/") else actual == expected):
            _fail(test_case, "MIME type", value, actual, whole)

    def assert_attachment(self, test_case: TestCase, response: HttpResponseBase, value: bool) -> None:
        """Check whether a client saves the file. False: Content-Disposition is inline or missing."""
        kind, _ = _disposition(test_case, response)
        if (kind == "attachment") != bool(value):
            expected = "attachment" if value else "inline"
            _fail(test_case, "Content-Disposition", expected, response.get("Content-Disposition"))


class DownloadResponseValidator(_Validator):
    """Implements `assert_download_response`. A subclass may add assertions as methods `assert_<name>`."""

    def _check_response(self, test_case: TestCase, response: HttpResponseBase, assertions: dict[str, Any]) -> None:
        if "status" not in assertions and response.status_code not in (200, 206):
            _fail(test_case, "status", "200 or 206", response.status_code, _described(response))
        self.assert_download_response(test_case, response)

    def assert_download_response(self, test_case: TestCase, response: HttpResponseBase) -> None:
        """Check that Django itself sends the file, and that a response with 200 or 206 is a file: it has a name."""
        for header in sorted(OFFLOAD_HEADERS):
            if header in response:
                _fail(test_case, header, None, response[header], "the response, which Django has to send itself")
        if response.status_code not in (200, 206):
            return
        if _disposition(test_case, response)[1] is None and not isinstance(response, DownloadResponse):
            _fail(test_case, "response", "a file with its name in Content-Disposition", _described(response))

    def assert_status(self, test_case: TestCase, response: HttpResponseBase, value: int) -> None:
        """Check the status code."""
        if response.status_code != value:
            _fail(test_case, "status", value, response.status_code, _described(response))

    def assert_size(self, test_case: TestCase, response: HttpResponseBase, value: int | None) -> None:
        """Check the size of the whole file in bytes, from the headers. None: the headers do not have it."""
        content_range: str | None = response.get("Content-Range")
        actual = response.get("Content-Length") if content_range is None else content_range.rpartition("/")[2]
        if actual != (None if value is None else str(value)):
            name = "Content-Length" if content_range is None else "size in Content-Range"
            _fail(test_case, name, value, actual, content_range)

    def assert_ranges(self, test_case: TestCase, response: HttpResponseBase, value: bool) -> None:
        """Check whether Accept-Ranges allows a client to request parts of the file."""
        actual = response.get("Accept-Ranges")
        if (actual == "bytes") != bool(value):
            _fail(test_case, "Accept-Ranges", "bytes" if value else None, actual)

    def assert_content(self, test_case: TestCase, response: HttpResponseBase, value: str | bytes) -> None:
        """Check the bytes of the body, and their number in Content-Length. The body can be read only once."""
        expected, actual = force_bytes(value), _content(response)
        if actual != expected:
            _fail_content(test_case, expected, actual)
        promised = response.get("Content-Length")
        if promised not in (None, str(len(actual))) and response.status_code != 304 and _method(response) != "HEAD":
            test_case.fail(f"Content-Length: it promises {promised!r} bytes, the body has {len(actual)}")


def assert_download_response(test_case: TestCase, response: HttpResponseBase, **assertions: Any) -> None:
    """Check a response of `Client` or `AsyncClient` that sends a file itself.

    basename: the name under which a client saves the file. content: the bytes of the body, or text in UTF-8. Checking
    it consumes the body. mime_type: Content-Type without parameters. content_type: with parameters. attachment: True
    if the client saves the file, False if it shows the file. status: by default, 200 and 206 are accepted. size: that
    of the whole file in bytes, None if no header may have it. ranges: whether clients may request parts.
    """
    DownloadResponseValidator()(test_case, response, **assertions)


class XAccelRedirectValidator(_Validator):
    """Implements `assert_x_accel_redirect`. A subclass may add assertions as methods `assert_<name>`."""

    def _check_response(self, test_case: TestCase, response: HttpResponseBase, assertions: dict[str, Any]) -> None:
        self.assert_x_accel_redirect_response(test_case, response)

    def assert_x_accel_redirect_response(self, test_case: TestCase, response: HttpResponseBase) -> None:
        """Check for the status 200, no body, and no offload headers but those of nginx."""
        _check_offload(test_case, response, "X-Accel-Redirect")

    def assert_redirect_url(self, test_case: TestCase, response: HttpResponseBase, value: str) -> None:
        """Check the internal URI in the header, which is percent-encoded."""
        _check_header(test_case, response, "X-Accel-Redirect", value)

    def assert_charset(self, test_case: TestCase, response: HttpResponseBase, value: str | None) -> None:
        """Check X-Accel-Charset. None: it is not set."""
        _check_header(test_case, response, "X-Accel-Charset", value)

    def assert_with_buffering(self, test_case: TestCase, response: HttpResponseBase, value: bool | None) -> None:
        """Check X-Accel-Buffering. None: it is not set."""
        _check_header(test_case, response, "X-Accel-Buffering", None if value is None else "yes" if value else "no")

    def assert_expires(self, test_case: TestCase, response: HttpResponseBase, value: int | str | None) -> None:
        """Check X-Accel-Expires in seconds. False: it is "off". None: it is not set."""
        _check_header(test_case, response, "X-Accel-Expires", _or_off(value))

    def assert_limit_rate(self, test_case: TestCase, response: HttpResponseBase, value: int | str | None) -> None:
        """Check X-Accel-Limit-Rate in bytes per second. False: no limit, which is 0. None: it is not set."""
        _check_header(test_case, response, "X-Accel-Limit-Rate", None if value is None else str(value or 0))


def assert_x_accel_redirect(test_case: TestCase, response: HttpResponseBase, **assertions: Any) -> None:
    """Check a response that makes nginx send the file.

    redirect_url: the internal URI in the header, percent-encoded. charset, with_buffering, expires (seconds),
    limit_rate (bytes per second): the options in the X-Accel-* headers. None: the header is not set. False: it is "off"
    or "no". basename, content_type, mime_type, attachment: as in `assert_download_response`.

    The status has to be 200, the body empty, and no header may be about ranges: nginx evaluates Range itself.
    """
    XAccelRedirectValidator()(test_case, response, **assertions)


class XSendfileValidator(_Validator):
    """Implements `assert_x_sendfile`. A subclass may add assertions as methods `assert_<name>`.

    percent_encoded: whether the proxy decodes the header. lighttpd does, Apache's mod_xsendfile does not.
    """

    percent_encoded = False

    def _check_response(self, test_case: TestCase, response: HttpResponseBase, assertions: dict[str, Any]) -> None:
        self.assert_x_sendfile_response(test_case, response)

    def assert_x_sendfile_response(self, test_case: TestCase, response: HttpResponseBase) -> None:
        """Check for the status 200, no body, and no offload header but X-Sendfile."""
        _check_offload(test_case, response, "X-Sendfile")

    def assert_file_path(self, test_case: TestCase, response: HttpResponseBase, value: str | os.PathLike[str]) -> None:
        """Check the path of the file that the proxy sends. `value` is not encoded."""
        path = os.fsencode(value)
        expected = quote(path).encode() if self.percent_encoded else path
        # a header is bytes, which Django has as latin-1
        if (actual := response["X-Sendfile"].encode("latin-1", "replace")) != expected:
            _fail(test_case, "X-Sendfile", expected, actual)


class PercentEncodedXSendfileValidator(XSendfileValidator):
    """Implements `assert_x_sendfile` of lighttpd."""

    percent_encoded = True


def assert_x_sendfile(test_case: TestCase, response: HttpResponseBase, **assertions: Any) -> None:
    """Check a response that makes Apache send the file.

    file_path: the path of the file as Apache sees it, the value of X-Sendfile. basename, content_type, mime_type,
    attachment: as in `assert_download_response`. The status has to be 200, and the body empty.
    """
    XSendfileValidator()(test_case, response, **assertions)


def assert_percent_encoded_x_sendfile(test_case: TestCase, response: HttpResponseBase, **assertions: Any) -> None:
    """Check a response that makes lighttpd send the file.

    file_path: the path of the file as lighttpd sees it. X-Sendfile has it percent-encoded. All else is as for Apache.
    """
    PercentEncodedXSendfileValidator()(test_case, response, **assertions)


def _fail(test_case: TestCase, what: str, expected: object, actual: object, whole: object = None) -> None:
    shown = "it is absent" if actual is None else f"found {actual!r}"
    wanted = "it to be absent" if expected is None else repr(expected)
    test_case.fail(f"{what}: expected {wanted}, {shown}" + ("" if whole is None else f" in {whole!r}"))


def _fail_content(test_case: TestCase, expected: bytes, actual: bytes) -> None:
    common = min(len(expected), len(actual))
    at = next((i for i in range(common) if expected[i] != actual[i]), common)
    test_case.fail(
        f"content: expected {len(expected)} bytes, found {len(actual)}; from byte {at} on "
        f"expected {expected[at : at + 20]!r}, found {actual[at : at + 20]!r}"
    )


def _described(response: HttpResponseBase) -> str:
    return f"{response.status_code} {type(response).__name__}, {response.get('Content-Type', 'without a Content-Type')}"


def _check_header(test_case: TestCase, response: HttpResponseBase, name: str, expected: str | None) -> None:
    if (actual := response.get(name)) != expected:
        _fail(test_case, name, expected, actual)


def _or_off(value: int | str | None) -> str | None:
    return None if value is None else str(value) if value else "off"


def _check_offload(test_case: TestCase, response: HttpResponseBase, name: str) -> None:
    if response.status_code != 200:
        _fail(test_case, "status", 200, response.status_code, _described(response))
    if not response.get(name):
        test_case.fail(f"{name}: expected a value, it is absent in {_described(response)!r}: no proxy sends the file")
    allowed = (
        {key for key in OFFLOAD_HEADERS if key.startswith("x-accel-")} if name == "X-Accel-Redirect" else {"x-sendfile"}
    )
    for other in sorted((OFFLOAD_HEADERS | {"accept-ranges", "content-range"}) - allowed):
        if other in response:
            _fail(test_case, other, None, response[other])
    if (length := response.get("Content-Length")) not in (None, "0"):
        _fail(test_case, "Content-Length", "0", length)
    if content := _content(response):
        _fail_content(test_case, b"", content)


def _disposition(test_case: TestCase, response: HttpResponseBase) -> tuple[str | None, str | None]:
    """Return the type, and the name under which a client saves the file [RFC 6266 4.3]."""
    value = response.get("Content-Disposition")
    if value is None:
        return None, None
    kind, separator, rest = value.partition(";")
    rest = (separator + rest).rstrip("; \t")
    parameters: dict[str, str] = {}
    while rest:
        match = _PARAMETER.match(rest)
        if match is None or match[1].lower() in parameters:
            test_case.fail(f"Content-Disposition: expected a type and parameters by RFC 6266, found {value!r}")
        parameters[match[1].lower()] = match[2] if match[3] is None else re.sub(r"\\(.)", r"\1", match[3])
        rest = rest[match.end() :]
    kind, extended = kind.strip().lower(), parameters.get("filename*")
    if extended is None:
        return kind, parameters.get("filename") or None
    charset, _, encoded = extended.partition("'")
    _, language_end, encoded = encoded.partition("'")
    name = unquote(encoded, errors="replace")
    if charset.lower() != "utf-8" or not language_end or "\N{REPLACEMENT CHARACTER}" in name:
        test_case.fail(f"Content-Disposition: expected filename* in UTF-8 by RFC 8187, found {value!r}")
    return kind, name


def _method(response: HttpResponseBase) -> str | None:
    """Return the method of the request, which the test clients store in a response; None without a test client."""
    request: Any = getattr(response, "wsgi_request", None) or getattr(response, "asgi_request", None)
    return getattr(request, "method", None)


def _content(response: HttpResponseBase) -> bytes:
    """Return the body of a synchronous or asynchronous response, with or without a running event loop."""
    if not response.streaming:
        return bytes(getattr(response, "content", b""))
    content: Any = getattr(response, "streaming_content", ())
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return async_to_sync(_joined)(content) if getattr(response, "is_async", False) else _joined_at_once(content)
    # An event loop runs in this thread, as in an `async def` test: read the body in another thread.
    with ThreadPoolExecutor(1, thread_name_prefix="content") as executor:
        if getattr(response, "is_async", False):
            return executor.submit(asyncio.run, _joined(content)).result()
        return executor.submit(_joined_at_once, content).result()


async def _joined(content: AsyncIterable[bytes]) -> bytes:
    return b"".join([force_bytes(part) async for part in content])


def _joined_at_once(content: Any) -> bytes:
    return b"".join([force_bytes(part) for part in content])
