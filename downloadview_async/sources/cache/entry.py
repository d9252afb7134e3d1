"""The description of one complete file of a cache (`Entry`), and how it is written to the file K.meta as JSON."""

import json
import math
import re
import time
from dataclasses import dataclass
from hashlib import blake2b

from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.digest import parse_repr_digest, repr_digest
from downloadview_async.http.fields import NAME_CHAR
from downloadview_async.http.metadata import ETag, FileMetadata

BLOCK = 4096
"""The size of a file on the disk is rounded up to a multiple of this many bytes. A K.meta counts as one block."""

_VERSION = 1
_HEADER = re.compile(rf"{NAME_CHAR}+\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One complete file of a cache. `metadata` has its size.

    data: its name in the directory. name: the file name for the client. validated: when it was last known to be
    current, in seconds since the epoch. max_age: the freshness lifetime from then on in seconds, or None for that of
    the cache. age: how many seconds old it was then, because the origin's answer had passed through other caches.
    """

    data: str
    name: str
    metadata: FileMetadata
    validated: float
    max_age: float | None = None
    age: float = 0.0

    @property
    def made_at(self) -> float:
        """When the origin made or confirmed it, in seconds since the epoch."""
        return self.validated - self.age

    def fresh_for(self, max_age: float) -> float:
        """Return for how many seconds it is still fresh. `max_age`: the lifetime of a file that has none itself."""
        age = time.time() - self.validated
        if age < 0:  # it was validated by another clock, at an unknown time
            return 0.0
        return max(0.0, (max_age if self.max_age is None else self.max_age) - age)

    def overdue(self, max_age: float) -> float:
        """Return for how many seconds it has not been fresh; infinity if that is not known."""
        age = time.time() - self.validated
        return math.inf if age < 0 else max(0.0, age - (max_age if self.max_age is None else self.max_age))


def key_hash(source: str, key: str) -> str:
    """Return the K of a source's name and a key: 40 hexadecimal digits, different for different pairs."""
    return _hash(source, key)


def data_name(key: str, metadata: FileMetadata) -> str:
    """Return K-V for the K and the metadata of a complete file."""
    return f"{key}-{_hash(str(metadata.etag), str(metadata.last_modified), str(metadata.size))}"


def is_describable(source: str, key: str, entry: Entry) -> bool:
    """Return whether the K.meta of a file fits into the one block that it counts as."""
    return len(dump_entry(source, key, entry)) <= BLOCK


def _hash(*parts: str) -> str:
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    # with their lengths: "a" and "bc" are not "ab" and "c"
    return blake2b(b"".join(b"%d:%b" % (len(part), part) for part in encoded), digest_size=20).hexdigest()


def dump_entry(source: str, key: str, entry: Entry) -> bytes:
    """Return the content of a K.meta: a checksum, and the entry as JSON."""
    metadata = entry.metadata
    body = json.dumps(
        {
            "version": _VERSION,
            "source": source,
            "key": key,
            "data": entry.data,
            "name": entry.name,
            "validated": entry.validated,
            "max_age": entry.max_age,
            "age": entry.age,
            "size": metadata.size,
            "etag": None if metadata.etag is None else str(metadata.etag),
            "last_modified": metadata.last_modified,
            "content_type": metadata.content_type,
            "headers": metadata.headers,
            "digests": repr_digest(metadata.digests),
        }
    ).encode()
    return blake2b(body, digest_size=20).hexdigest().encode() + b"\n" + body


def key_in(content: bytes) -> tuple[str, str] | None:
    """Return the source and the key in a K.meta, or None if it is damaged."""
    checksum, _, body = content.partition(b"\n")
    if checksum != blake2b(body, digest_size=20).hexdigest().encode():
        return None
    try:
        loaded = json.loads(body)
        return str(loaded["source"]), str(loaded["key"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def load_entry(content: bytes, source: str, key: str) -> Entry | None:
    """Return the entry in a K.meta, or None if it is damaged, of another format version, or of another file."""
    checksum, _, body = content.partition(b"\n")
    if checksum != blake2b(body, digest_size=20).hexdigest().encode():
        return None
    try:
        loaded = json.loads(body)
        if (loaded["version"], loaded["source"], loaded["key"]) != (_VERSION, source, key):
            return None
        entry = Entry(
            data=loaded["data"],
            name=loaded["name"],
            validated=float(loaded["validated"]),
            max_age=None if loaded["max_age"] is None else float(loaded["max_age"]),
            age=float(loaded.get("age", 0.0)),
            metadata=FileMetadata(
                size=loaded["size"],
                etag=None if loaded["etag"] is None else ETag.parse(loaded["etag"]),
                last_modified=loaded["last_modified"],
                content_type=loaded["content_type"],
                headers=tuple((name, value) for name, value in loaded["headers"]),
                digests=parse_repr_digest(loaded.get("digests", "")),
            ),
        )
        return entry if _is_sound(entry, key_hash(source, key)) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_sound(entry: Entry, key: str) -> bool:
    """Return whether an entry has only values that this module writes. The file it names can only be a K-V."""
    metadata = entry.metadata
    return (
        isinstance(entry.name, str)
        and isinstance(metadata.size, int)
        and metadata.size >= 0
        and isinstance(metadata.last_modified, int | None)
        and (metadata.content_type is None or valid_content_type(metadata.content_type) is not None)
        and all(_HEADER.match(name) and not _CONTROL.search(value) for name, value in metadata.headers)
        and entry.data == data_name(key, metadata)
    )
