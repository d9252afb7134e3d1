"""Digests from a file beside the file, as `sha256sum NAME > NAME.sha256` writes it."""

import os
import re
from pathlib import PurePosixPath

from downloadview_async.http.digest import Digests

SUFFIX = ".sha256"
"""The end of the name of a sidecar, after the name of its file."""

_MAX_BYTES = 64 * 1024
_LINE = re.compile(r"(\\?)([0-9A-Fa-f]{64})(?: [ *](.+))?")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


def checksum_line(digest: bytes, name: str) -> str:
    """Return the line of `sha256sum` or `sha512sum` for a file, with its line end."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest.hex()}  {escaped}\n"


def parse_sidecar(text: str, name: str) -> Digests:
    """Return the digest of the file called `name` in the text of a sidecar, or nothing.

    Each line has to be one of `sha256sum`, with the name or a path that ends in it. A digest alone is for the only
    file. A text with another line, or with two different digests for the file, has none.
    """
    digests = set()
    lines = text.strip("\n").split("\n")
    for line in lines:
        if (match := _LINE.fullmatch(line.rstrip("\r"))) is None or (match[3] is None and len(lines) > 1):
            return ()
        path = match[3] or name
        if match[1]:
            path = re.sub(r"\\[\\nr]", lambda escape: _ESCAPES[escape[0]], path)
        if PurePosixPath(path).name == name:
            digests.add(bytes.fromhex(match[2]))
    return (("sha-256", digests.pop()),) if len(digests) == 1 else ()


def read_sidecar(sidecar: int, file: int, name: str) -> Digests:
    """Return the digest in a sidecar that certainly is about the file as it is now, or nothing. Blocks.

    sidecar, file: open descriptors. The sidecar may be older neither by its modification time nor by the time of the
    inode's last change: a tool that replaces a file may set the first one to a time in the past, but not the other.
    """
    about, described = os.fstat(sidecar), os.fstat(file)
    is_older = about.st_mtime_ns < described.st_mtime_ns or about.st_ctime_ns < described.st_ctime_ns
    if is_older or about.st_size > _MAX_BYTES:
        return ()
    return parse_sidecar(os.pread(sidecar, _MAX_BYTES, 0).decode("utf-8", "surrogateescape"), name)
