"""What is known of one complete file of a cache (`Entry`), and how it is written into the file K.meta as JSON."""

import json
import re
import time
from dataclasses import dataclass
from hashlib import blake2b

from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.metadata import ETag, FileMetadata

BLOCK = 4096
"""Bytes that what a file takes on the disk is rounded up to; a K.meta is counted as one such block."""

_VERSION = 1
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One complete file of a cache. `metadata` has its size.

    data: its name in the directory. name: what the client should call it. validated: when it was last known to be
    current, in seconds since the epoch. max_age: for how many seconds from then, where that is not the cache's to say.
    age: how many seconds old it was then, as the origin's answer had come through other caches.
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
        """Return for how many seconds it may be sent without asking; `max_age` where the file has none of its own."""
        age = time.time() - self.validated
        if age < 0:  # it was validated by another clock: who knows when
            return 0.0
        return max(0.0, (max_age if self.max_age is None else self.max_age) - age)


def key_hash(source: str, key: str) -> str:
    """Return the K of a source's name and a key, 40 hexadecimal digits: different for any two different pairs."""
    return _hash(source, key)


def data_name(key: str, metadata: FileMetadata) -> str:
    """Return K-V for the K and the description of a complete file."""
    return f"{key}-{_hash(str(metadata.etag), str(metadata.last_modified), str(metadata.size))}"


def is_describable(source: str, key: str, entry: Entry) -> bool:
    """Return whether what is known of a file fits into the one block that a K.meta is counted as."""
    return len(dump_entry(source, key, entry)) <= BLOCK


def _hash(*parts: str) -> str:
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    # with their lengths: "a" and "bc" are not "ab" and "c"
    return blake2b(b"".join(b"%d:%b" % (len(part), part) for part in encoded), digest_size=20).hexdigest()


def dump_entry(source: str, key: str, entry: Entry) -> bytes:
    """Return the content of a K.meta: a checksum, and what is known of the file as JSON."""
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
        }
    ).encode()
    return blake2b(body, digest_size=20).hexdigest().encode() + b"\n" + body


def load_entry(content: bytes, source: str, key: str) -> Entry | None:
    """Return what a K.meta says, or None for one that is damaged, of another version, or of another file."""
    checksum, _, body = content.partition(b"\n")
    if checksum != blake2b(body, digest_size=20).hexdigest().encode():
        return None
    try:
        said = json.loads(body)
        if (said["version"], said["source"], said["key"]) != (_VERSION, source, key):
            return None
        entry = Entry(
            data=said["data"],
            name=said["name"],
            validated=float(said["validated"]),
            max_age=None if said["max_age"] is None else float(said["max_age"]),
            age=float(said.get("age", 0.0)),
            metadata=FileMetadata(
                size=said["size"],
                etag=None if said["etag"] is None else ETag.parse(said["etag"]),
                last_modified=said["last_modified"],
                content_type=said["content_type"],
                headers=tuple((name, value) for name, value in said["headers"]),
            ),
        )
        return entry if _is_sound(entry, key_hash(source, key)) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_sound(entry: Entry, key: str) -> bool:
    """Return whether an entry's values are such as this module writes: what it names is never more than a K-V."""
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
