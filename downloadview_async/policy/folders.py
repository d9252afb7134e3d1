"""Links to a folder and all that is below it: which paths are below, and what the pages add to the query of a link.

The link has the folder in its signature, and each URL of its pages has the parameters of the link. Further
parameters choose what a page shows. They are not signed, because they grant nothing: they only choose among what the
path is granted anyway. Every other parameter is taken for one of the link, so it makes the signature wrong.
"""

import re

from downloadview_async.errors import LinkInvalid

PAGE_PARAMETERS = frozenset(
    (b"after", b"archive", b"before", b"checksum", b"deep", b"format", b"name", b"order", b"q", b"sort", b"view")
)
"""The parameters that choose what is shown of a folder or a file, as clients write them: without percent-encoding."""

MAX_FOLDER = 9999
"""Bytes of the path of a folder in a link."""

_OF_FOLDER = re.compile(rb"&b=([1-9][0-9]{0,3})&s=[^&]*\Z")
_BAD_SEGMENT = re.compile(rb"\0|(?:\A|[/\\])\.{1,2}(?:[/\\]|\Z)|\A/|//")


def carried(query: bytes) -> bytes:
    """Return the parameters of the link to a folder, without those that the pages have added."""
    return b"&".join([pair for pair in query.split(b"&") if pair.partition(b"=")[0] not in PAGE_PARAMETERS])


def link_to_folder(path: bytes, query: bytes) -> tuple[bytes, bytes] | None:
    """Return the folder and the parameters of a link to a folder by which a request has come; None for another link.

    path: with its percent-encoding decoded. Neither it nor the query has been verified: the signature of the parameters
    has to be that of this folder.

    Raises `LinkInvalid` if the path has no folder of this length, or is below it in a way that may lead out of it: with
    an empty segment, `.` or `..`.
    """
    match = _OF_FOLDER.search(link := carried(query))
    if match is None:
        return None
    length = int(match[1])
    folder, below = path[:length], path[length:]
    if not folder.endswith(b"/") or _BAD_SEGMENT.search(below):
        raise LinkInvalid("the path is not below the folder of the link")
    return folder, link
