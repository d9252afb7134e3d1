"""`OpenObject`: one version of an object of a store, described and read by as few requests as possible."""

import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio

from downloadview_async.errors import AccessDenied, FileError, TransferAborted, UpstreamError, UpstreamTimeout
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.dates import http_seconds
from downloadview_async.http.metadata import (
    MAX_READS,
    ByteRange,
    ETag,
    FileMetadata,
    is_meaningful,
    is_telling,
    stat_validators,
    unsettled_seconds,
)
from downloadview_async.http.negotiation import content_coding, hides_coding
from downloadview_async.http.ranges import NEAR, RangeSpec, read_from
from downloadview_async.http.request import DownloadRequest
from downloadview_async.http.upstream import REFUSALS
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.object_errors import STATUS, file_error, first_line, is_of_store

_EPOCH = datetime.fromtimestamp(0, UTC)

_PASSED_HEADERS = ("Content-Encoding", "Content-Language", "Cache-Control")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_UNKNOWN_TYPE = "binary/octet-stream"  # the type that S3 gives an object that was stored without one

_CLOCKS = 60  # seconds that the clock of a store may differ from ours: obstore does not pass on its Date

_NON_PARTIAL = "non-partial response"  # obstore's error for a 200 to a range request


class OpenObject:
    """One version of an object: its metadata from the store, and a stream that may have begun."""

    def __init__(self, store: Any, name: str, *, answer_timeout: float, of_disk: bool = False) -> None:
        self.metadata = FileMetadata()
        self._of_disk = of_disk
        self._store = store
        self._name = name
        self._answer_timeout = answer_timeout
        self.hides_coding = False
        """See `Recoded`."""
        self._version: tuple[str | None, Any, int] | None = None
        self._wanted: list[RangeSpec] | None = None
        self._has_ranges = True
        self._stream: Any = None
        self._span = ByteRange(0, 0)  # the rest of the stream, beginning with `_rest`
        self._rest = b""

    async def begin(self, request: DownloadRequest) -> None:
        """Pass the client's request on to the store. Raises `FileError`."""
        self._wanted = request.ranges
        options, answer = await self._ask(_options_for(request))
        if self._of_disk and (seconds := unsettled_seconds(_nanoseconds(answer.meta), time.time_ns())):
            await anyio.sleep(seconds)  # then a further change shows in the time
            options, answer = await self._ask(options)
        meta, attributes = answer.meta, answer.attributes
        self._version = _version(meta)
        etag, modified = self._validators(meta)
        # Without a strong tag, another version may have the same second.
        latest = math.inf if etag is not None and not etag.weak else time.time() - _CLOCKS
        if modified is not None and not (is_meaningful(modified) and modified <= latest):
            modified = None
        coding = attributes.get("Content-Encoding")
        self.hides_coding = hides_coding(coding)
        passed = {name.lower(): attributes.get(name, "\0") for name in _PASSED_HEADERS}
        passed["content-encoding"] = content_coding(coding or "") or "\0"
        content_type = valid_content_type(attributes.get("Content-Type"))
        self.metadata = FileMetadata(
            size=meta["size"],
            etag=etag,
            last_modified=modified,
            content_type=None if content_type == _UNKNOWN_TYPE else content_type,
            headers=tuple((name, value) for name, value in passed.items() if _FIELD_VALUE.fullmatch(value)),
        )
        # Without a strong validator, two reads cannot be shown to be of one version.
        self.metadata = replace(self.metadata, max_reads=MAX_READS if self.metadata.is_pinned else 1)
        if "head" not in options:
            self._take(answer)

    def _validators(self, meta: Mapping[str, Any]) -> tuple[ETag | None, int | None]:
        if self._of_disk:  # obstore's tag contains the inode, and is made of any time, meaningful or not
            changed = _nanoseconds(meta)
            if not is_telling(changed, time.time_ns(), is_coarse=not changed % 1_000_000_000):
                return None, None
            return stat_validators(meta["size"], changed)
        return ETag.parse(meta["e_tag"] or ""), http_seconds(meta["last_modified"].timestamp())

    def _take(self, answer: Any) -> None:
        self._span = ByteRange(*answer.range)
        self._stream = answer.stream(CHUNK_SIZE)

    async def _ask(self, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the options that the store has accepted, and its answer. Options that it refuses are left out."""
        while True:
            try:
                return options, await self._get(options)
            except _Refused as exc:
                self._has_ranges = self._has_ranges and not ("range" in options and "head" not in exc.instead)
                kept = {name: value for name, value in options.items() if name == "if_match"}
                options = kept | exc.instead

    async def _get(self, options: Any) -> Any:
        import obstore

        try:
            with anyio.fail_after(self._answer_timeout):
                return await obstore.get_async(self._store, self._name, options=options)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{self._name!r}: no answer within {self._answer_timeout} s") from exc
        except BaseException as exc:
            if not is_of_store(exc):
                raise
            if (instead := _instead_of(options, exc)) is not None:
                raise _Refused(instead) from exc
            error = file_error(exc, self._name)
            if "head" in options and isinstance(error, AccessDenied):
                await self._raise_if_misconfigured()
            raise error from exc

    async def _raise_if_misconfigured(self) -> None:
        """Raise `UpstreamError` if the store refuses the credentials: only the body of an answer to a GET says that."""
        import obstore

        with anyio.move_on_after(self._answer_timeout):
            try:
                await obstore.get_async(self._store, self._name, options={"range": (0, 1)})
            except Exception as exc:
                if isinstance(error := file_error(exc, self._name), UpstreamError):
                    raise error from exc

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span: from the open answer if they come next in it, else from a new one.

        A broken stream is resumed where it broke, as long as each new stream has at least one byte and a strong
        validator proves that the version is the same. Raises `TransferAborted`.
        """
        assert self.metadata.size is not None
        left = ByteRange(0, self.metadata.size) if span is None else span
        reopened_for_nothing = has_begun = False
        while left.start < left.stop:
            if not self._leads_to(left):
                await self._reopen(left)
            try:
                chunk = self._rest or await anext(self._stream, b"")
                if not chunk:
                    raise UpstreamError(f"{self._name!r} ended {len(self._span)} bytes early")
            except BaseException as exc:
                if not is_of_store(exc):
                    raise
                self.close()
                if reopened_for_nothing or (has_begun and not self.metadata.is_pinned):
                    raise TransferAborted(
                        f"{self._name!r} broke off at byte {left.start}: {first_line(exc)}", reason="upstream-failed"
                    ) from exc
                reopened_for_nothing = True
                continue
            before, wanted = self._span.start, chunk[max(left.start - self._span.start, 0) :]
            wanted, self._rest = wanted[: len(left)], wanted[len(left) :]
            after = min(before + len(chunk) - len(self._rest), self._span.stop)
            self._span = ByteRange(after, self._span.stop)
            if wanted:
                reopened_for_nothing, has_begun = False, True
                left = ByteRange(left.start + len(wanted), left.stop)
                yield wanted

    def _leads_to(self, span: ByteRange) -> bool:
        """Return whether the open stream reaches the span without much in between."""
        gap = span.start - self._span.start
        max_gap = NEAR if self._has_ranges else math.inf
        return self._stream is not None and 0 <= gap <= max_gap and span.stop <= self._span.stop

    async def _reopen(self, span: ByteRange) -> None:
        """Open a stream of the same version that has this span. Raises `TransferAborted`."""
        self.close()
        span = read_from(span, self._wanted, self.metadata.size)
        options: dict[str, Any] = {"range": (span.start, span.stop)} if self._has_ranges else {}
        assert self._version is not None
        tag = ETag.parse(self._version[0] or "")
        if tag is not None and not tag.weak:  # "If-Match" compares strongly
            options["if_match"] = str(tag)
        try:
            options, answer = await self._ask(options)
        except FileError as exc:
            raise TransferAborted(
                f"{self._name!r} cannot be read on from byte {span.start}: {exc}", reason="upstream-failed"
            ) from exc
        is_whole = "range" not in options and "head" not in options
        expected = (0, self.metadata.size) if is_whole else (span.start, span.stop)
        if _version(answer.meta) != self._version or tuple(answer.range) != expected or "head" in options:
            raise TransferAborted(f"{self._name!r} changed while it was sent", reason="file-changed")
        self._take(answer)

    def close(self) -> None:
        """Close the open answer, and its connection if the body was not read to its end."""
        self._stream, self._rest = None, b""


class _Refused(Exception):
    """The store refuses a HEAD or a range, which it could have ignored. instead: the options for the next try."""

    def __init__(self, instead: dict[str, Any]) -> None:
        super().__init__(instead)
        self.instead = instead


def _options_for(request: DownloadRequest) -> dict[str, Any]:
    """Return the options for the request to the store: a body is requested only if it will be read."""
    if request.method != "GET":
        return {"head": True}
    if request.unconditional:
        return {}
    specs = request.ranges
    conditions = (request.if_match, request.if_unmodified_since, request.if_none_match, request.if_modified_since)
    if any(condition is not None for condition in conditions) or (specs is not None and len(specs) > 1):
        return {"head": True}  # the answer decides which bytes to read, if any
    return {} if specs is None else _range_option(specs[0])


def _range_option(spec: RangeSpec) -> dict[str, Any]:
    first, last = spec
    if first is None:
        return {"range": {"suffix": last}} if last else {"head": True}
    return {"range": {"offset": first} if last is None else (first, last + 1)}


def _nanoseconds(meta: Mapping[str, Any]) -> int:
    """Return when an object was changed, in nanoseconds since the epoch; obstore tells microseconds."""
    return int((meta["last_modified"] - _EPOCH) // timedelta(microseconds=1)) * 1000


def _version(meta: Mapping[str, Any]) -> tuple[str | None, Any, int]:
    return meta["e_tag"], meta["last_modified"], meta["size"]


def _instead_of(options: Mapping[str, Any], exc: BaseException) -> dict[str, Any] | None:
    """Return the options for the next try if the store refuses a HEAD or a range. None: the error is its answer."""
    status = STATUS.search(str(exc))
    if "range" in options:
        if _NON_PARTIAL in str(exc):
            return {}
        if type(exc).__name__ == "NotSupportedError":
            return {"head": True}  # Azure has no suffix ranges
        if type(exc).__name__ == "GenericError" and (status is None or status[1] == "416"):
            return {"head": True} if "range" in str(exc).lower() else None
    elif "head" not in options:
        return None
    refusals = REFUSALS | {406} | (set() if "if_match" in options else {412})
    return {} if status is not None and int(status[1]) in refusals else None
