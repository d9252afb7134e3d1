"""`refusal`: may a proxy send this file? The one rule for our responses, for foreign ones and for Django's.

A proxy may send a file unless one of these conditions refuses it. They are checked in this order:

==================== ============================================================ ==================================
Refusal              It applies to                                                Why the proxy does not send it
==================== ============================================================ ==================================
STATUS               an answer with a status other than 200                       The proxy makes a 200, 206 or 304.
METHOD               a request that is neither GET nor HEAD                       Range and If-* do not apply to it.
APPLICATION          `offload=False`, a background task without `offload=True`,   The application deletes the file, or
                     a file that is deleted when it is closed, a storage that     changes its bytes on the way.
                     decrypts
PART                 a foreign answer with Content-Range                          The proxy would send the whole file.
ORDERED              a foreign answer that carries an offload header already      A backend further in has decided.
RULE                 a path or URL that no rule covers                            The proxy cannot reach it.
                     (`RuleTable` refuses `..` below a rule; see `is_plain`)
HEAD                 HEAD, of a file that the proxy fetches from another server   The URL is signed for GET.
CODED                an answer with Content-Encoding                              Apache drops that field, and the
                                                                                  client could not decode the body.
CODING_HIDDEN        a file whose server sends a coding that no client can use    The proxy would pass that coding on.
IF_RANGE             If-Range with another version, of a file that the proxy      Some stores ignore If-Range and send
                     fetches from another server                                  a part of the wrong version.
RANGE                a Range that selects nothing or does not parse, of a file    The line in the log about the proxy's
                     whose transfer ends with its line in the proxy's log         own 416 may not tell whose it is.
TIME                 a local file whose time says nothing of its bytes            A proxy makes strong validators of
                                                                                  any time.
UNFINISHED           an application that has not returned in time                 It may still delete the file.
GONE                 a file that has left its path                                The proxy would answer 404.
==================== ============================================================ ==================================

The first seven follow from the request, the response and the location of the file. The next five follow from the open
file, which may turn out to be encoded, and whose location a cache may know only then. So the rule is checked twice:
before the file is opened, since a file for a proxy is opened only for its metadata, and while it is open. Only the
second result counts. The last two are checked when the answer leaves.
"""

import os
import re
from collections.abc import Mapping
from enum import Enum

from downloadview_async.http.conditional import range_applies
from downloadview_async.http.fields import OFFLOAD_TARGET
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.ranges import select_ranges
from downloadview_async.http.request import DownloadRequest
from downloadview_async.sources.base import OpenFile
from downloadview_async.sources.local.open_file import local_of

_LONG_NUMBER = re.compile("[0-9]{19}")


class Refusal(Enum):
    """Why no proxy sends a file. The value is the reason in the log."""

    STATUS = "the status is not 200"
    METHOD = "the method is neither GET nor HEAD"
    APPLICATION = "the application does not allow it, or may delete or change the file"
    PART = "the answer is a part of the file"
    ORDERED = "the answer has an offload header already"
    RULE = "no rule covers the file"
    HEAD = "another server has the file, and the proxy would ask it by GET"
    CODED = "the answer has a Content-Encoding"
    CODING_HIDDEN = "the server that has the file would send a coding that no client can use"
    IF_RANGE = "another server has the file, and If-Range does not name this version"
    RANGE = "the Range selects nothing, and the log of the proxy may not tell of it"
    TIME = "the modification time of the file does not tell its versions apart"
    UNFINISHED = "the application has not returned, and may still delete the file"
    GONE = "the file is not at its path any more"


def refusal(
    *,
    status: int = 200,
    method: str = "GET",
    is_permitted: bool = True,
    is_part: bool = False,
    is_ordered: bool = False,
    has_rule: bool = True,
    is_remote: bool = False,
    is_coded: bool = False,
    hides_coding: bool = False,
    matches_if_range: bool = True,
    is_logged: bool = True,
    is_telling: bool = True,
    has_returned: bool = True,
    is_there: bool = True,
) -> Refusal | None:
    """Return why no proxy may send a file, or None if one may. An argument that is not known yet keeps its default.

    is_permitted: whether the application allows it. is_remote: whether the proxy fetches the file from another
    server. is_logged: whether the proxy's log tells of the answer, if a limit waits for that. is_telling: whether the
    modification time of a local file changes with its bytes.
    The table in the docstring of the module lists all conditions.
    """
    if status != 200:
        return Refusal.STATUS
    if method not in ("GET", "HEAD"):
        return Refusal.METHOD
    if not is_permitted:
        return Refusal.APPLICATION
    if is_part:
        return Refusal.PART
    if is_ordered:
        return Refusal.ORDERED
    if not has_rule:
        return Refusal.RULE
    if is_remote and method == "HEAD":
        return Refusal.HEAD
    if is_coded:
        return Refusal.CODED
    if hides_coding:
        return Refusal.CODING_HIDDEN
    if is_remote and not matches_if_range:
        return Refusal.IF_RANGE
    if not is_logged:
        return Refusal.RANGE
    if not is_telling:
        return Refusal.TIME
    if not has_returned:
        return Refusal.UNFINISHED
    return None if is_there else Refusal.GONE


def refusal_once_open(
    opened: OpenFile,
    metadata: FileMetadata,
    request: DownloadRequest,
    *,
    method: str,
    is_remote: bool = False,
    is_coded: bool = False,
    awaits_line: bool = False,
) -> Refusal | None:
    """Return the `refusal` of an open file, or None if a proxy may send it. All else has been checked before.

    metadata: the file's metadata in the answer. request: what the client requests. is_coded: whether the application
    has set a Content-Encoding itself. awaits_line: whether its transfer ends with its line in the proxy's log.
    """
    local = local_of(opened)
    return refusal(
        method=method,
        is_remote=is_remote,
        is_coded=is_coded or has_coding(metadata),
        hides_coding=getattr(opened, "hides_coding", False),
        matches_if_range=not is_remote or range_applies(request, metadata),
        is_logged=not awaits_line or selects_something(request, metadata.size),
        is_telling=local is None or local.is_telling,
    )


def selects_something(request: DownloadRequest, size: int | None) -> bool:
    """Return whether each proxy answers the Range of a request, if there is one, by a part of the file.

    Some answer 416 where the standard ignores a Range, and where a number has more than 18 digits.
    """
    if request.range is None or request.method != "GET":
        return True
    if (specs := request.ranges) is None or _LONG_NUMBER.search(request.range) is not None:
        return False
    return size is None or not isinstance(select_ranges(specs, size), str)


def is_remote_order(order: Mapping[str, str] | None) -> bool:
    """Return whether the headers of a backend have the proxy fetch the file from another server."""
    return order is not None and OFFLOAD_TARGET in order


def has_coding(metadata: FileMetadata) -> bool:
    """Return whether a file is stored with a Content-Encoding."""
    return bool(metadata.headers) and "content-encoding" in dict(metadata.headers)


def is_plain(path: str) -> bool:
    """Return whether a path is absolute and has no `..`: only then does its spelling show which rule covers it."""
    return os.path.isabs(path) and ".." not in path.split("/")
