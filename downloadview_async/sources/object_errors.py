"""`file_error`: our errors for those of obstore."""

import re

from downloadview_async.errors import (
    AccessDenied,
    FileError,
    FileMissing,
    SourceUnavailable,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)

STATUS = re.compile(r"non-2xx status code: ([0-9]{3})")
"""The status in the text of an error of obstore."""

# Errors of S3 that are about all objects, not about one. They are in the body, which an answer to a HEAD does not have.
_MISCONFIGURED = re.compile(
    "<Code>(AuthorizationHeaderMalformed|ExpiredToken|InvalidAccessKeyId|InvalidToken|NoSuchBucket|RequestTimeTooSkewed"
    "|SignatureDoesNotMatch)</Code>"
)
# obstore has a class for this error of a GET, but not for that of a listing.
_LIST_REFUSED = re.compile("performing list request: .*non-2xx status code: 40[13]")
_THROTTLED = frozenset({"429", "503"})
_FAILED = frozenset({"500", "502", "504"})
_ERRNO = re.compile(r"\(os error ([0-9]+)\)\Z")
_NOT_A_FILE = frozenset({"2", "20", "21", "36", "40"})  # ENOENT, ENOTDIR, EISDIR, ENAMETOOLONG, ELOOP
_DENIED = frozenset({"1", "13"})  # EPERM, EACCES


def file_error(exc: BaseException, name: str) -> FileError:
    """Return our error for an error of obstore."""
    reason = f"{name!r}: {first_line(exc)}"
    kind = type(exc).__name__
    if match := _MISCONFIGURED.search(str(exc)):
        return UpstreamRefused(f"the store refuses the bucket or the credentials ({match[1]}): check them: {reason}")
    if isinstance(exc, FileNotFoundError) or kind == "InvalidPathError" or isinstance(exc, ValueError):
        return FileMissing(reason)
    if isinstance(exc, PermissionError) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return AccessDenied(f"the store denies {reason}")
    if kind == "PreconditionError":
        return UpstreamRefused(f"the object has been replaced by another version: {reason}", answered=412)
    if match := _ERRNO.search(reason):
        if match[1] in _NOT_A_FILE:
            return FileMissing(reason)
        return AccessDenied(reason) if match[1] in _DENIED else SourceUnavailable(reason)
    status = STATUS.search(reason)
    if _LIST_REFUSED.search(reason):
        return AccessDenied(f"the store denies {reason}")
    if status is not None and status[1] in _THROTTLED:
        return UpstreamBusy(f"the store is throttling: {reason}", status=int(status[1]))
    if status is None and "timed out" in str(exc):
        return UpstreamTimeout(reason)
    if status is not None and status[1] not in _FAILED:
        return UpstreamRefused(reason, answered=int(status[1]))
    return UpstreamError(reason)


def is_of_store(exc: BaseException) -> bool:
    """Return whether obstore has raised: an error, or a panic of its threads, which is only a `BaseException`."""
    return isinstance(exc, Exception) or type(exc).__name__ == "PanicException"


def first_line(exc: BaseException) -> str:
    """Return the message of an obstore error without the details of its code, of limited length."""
    return (str(exc).partition("\n\nDebug source:")[0] or type(exc).__name__)[:500]
