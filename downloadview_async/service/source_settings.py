"""The tables `[sources.NAME]`, a type for each kind of source."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import msgspec
from msgspec import Meta, Struct

from downloadview_async import SignerOption, signer_kinds
from downloadview_async.service.values import FUNCTION, Count, Seconds, Text

_MaxRequests = Annotated[Count, Meta(description="requests that may use the source at once in a worker")] | None
_QueueTimeout = Annotated[Seconds, Meta(description="seconds that further requests wait before they get 503")]
DigestMode = Annotated[Literal["off", "known", "background"], Meta(description="off, known or background")]


class PresignSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[sources.NAME.presign]`: presigned URLs, by which clients fetch files from an S3 store directly."""

    expires: Annotated[
        str,
        Meta(
            pattern=r"^[1-9][0-9]{0,6}[smhd]\Z",
            description="how long a URL is valid, at most 7 days, such as 30s, 10m, 1h or 7d",
        ),
    ] = "10m"
    public_endpoint: Annotated[
        str | None, Meta(description="the URL of the store for clients, if it is not the same as `endpoint`")
    ] = None


SIGNER_OPTIONS: dict[str, SignerOption] = {
    name: option for kind in signer_kinds().values() for name, option in kind.options.items()
}
"""The keys of `[sources.NAME.edge]` that some kind of signer accepts."""

if TYPE_CHECKING:
    _Kind = str
else:
    _Kind = Literal[tuple(signer_kinds())]


class _EdgeSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    kind: Annotated[_Kind, Meta(description=f"one of {', '.join(signer_kinds())}")]
    url: Annotated[Text, Meta(description="the URL below which the edge has the files of the source")]
    expires: Annotated[
        float | str, Meta(description="how long a URL can be used: seconds, or such as 30s, 10m, 1h or 7d")
    ] = "10m"
    checks: Annotated[bool, Meta(description="false to redirect without asking the source whether the file exists")] = (
        True
    )


_WithOptions: Any = msgspec.defstruct(
    "_WithOptions",
    [
        (name, Annotated[option.type, Meta(description=option.takes)] | None, None)
        for name, option in SIGNER_OPTIONS.items()
    ],
    bases=(_EdgeSettings,),
    kw_only=True,
)


class EdgeSettings(_WithOptions):  # type: ignore[misc]  # the options depend on the kinds of signers
    """`[sources.NAME.edge]`: a store or CDN that has the same files, and checks signed URLs."""

    def __repr__(self) -> str:
        return f"EdgeSettings(kind={self.kind!r}, url={self.url!r})"  # there are secrets in the options


class CacheSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[sources.NAME.cache]`: a directory that caches the files of a source."""

    path: Annotated[Text, Meta(description="a directory, absolute or relative to the settings file")]
    max_bytes: Annotated[
        int | str,
        Meta(description="the maximum size of all cached files: a number of bytes, or a size such as 500MB or 10GiB"),
    ] = "10GiB"
    max_age: Annotated[
        float | str,
        Meta(description="how long a cached file is sent without revalidation: seconds, or such as 90s, 10m, 2h, 1d"),
    ] = "1d"
    stale_while_revalidate: Annotated[
        float | str,
        Meta(
            description="how long after that it is sent at once while it is revalidated, if the source names no other "
            "time: seconds, or such as 30s, 10m"
        ),
    ] = 0
    stale_if_error: Annotated[
        float | str,
        Meta(
            description="how long after that it is sent if the source fails, if the source names no other time: "
            "seconds, or such as 10m, 1d"
        ),
    ] = 0


_CACHE = "a [sources.NAME.cache] table"
_Edge = Annotated[
    EdgeSettings | None, Meta(description='a [sources.NAME.edge] table, for routes with send = "redirect"')
]


class PathSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="path"):
    """`type = "path"`: a directory."""

    root: Annotated[Text, Meta(description="a directory, absolute or relative to the settings file")]
    symlinks: Annotated[Literal["deny", "inside", "follow"], Meta(description="deny, inside or follow")] = "inside"
    names: Annotated[Literal["portable", "any"], Meta(description="portable or any")] = "portable"
    threads: Annotated[Count, Meta(description="calls that may wait for the disk at once, 1 or more")] = 40
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    precompressed: Annotated[
        list[Literal["br", "zstd", "gzip"]], Meta(description='a list of "br", "zstd" and "gzip"')
    ] = []
    edge: _Edge = None
    digests: DigestMode = "off"
    sidecars: Annotated[bool, Meta(description="true to read digests from files NAME.sha256")] = False
    etag: Annotated[
        Literal["nanoseconds", "seconds", "digest"],
        Meta(
            description="what entity tags are made of: nanoseconds or seconds of the modification time, with the size; "
            "or digest, which needs digests"
        ),
    ] = "nanoseconds"


class StorageSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="storage"):
    """`type = "storage"`: a storage, named by its URL."""

    url: Annotated[
        str,
        Meta(
            min_length=1,
            description="file:///absolute/directory, file:directory relative to the settings file, memory://, "
            "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
        ),
    ]
    options: Annotated[
        dict[str, str | bool | int],
        Meta(description="a table of options for an object store, with the names that obstore uses"),
    ] = {}
    presign: Annotated[
        PresignSettings | None, Meta(description='a table, for routes with send = "redirect"; s3:// only')
    ] = None
    max_connections: Annotated[
        Count | None, Meta(description="concurrent requests to an object store, by default 100")
    ] = None
    names: Annotated[Literal["portable", "any", "exact"] | None, Meta(description="portable, any or exact")] = None
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    edge: _Edge = None
    digests: DigestMode = "off"
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class ObjectSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="object"):
    """`type = "object"`: rows of a database table, each with a file from another source."""

    database: Annotated[Text, Meta(description="an SQLAlchemy URL with an asynchronous driver")]
    table: Annotated[Text, Meta(description="a table or view, or schema.table")]
    key: Annotated[Text, Meta(description="the column that is compared with the key in the URL")]
    file: Annotated[Text, Meta(description="the column with the file's name in `source`")]
    source: Annotated[Text, Meta(description="the name of the source that holds the files")]
    filename: Annotated[str | None, Meta(description="the column with the file name for clients")] = None
    content_type: Annotated[str | None, Meta(description="the column with the media type")] = None
    list: Annotated[bool, Meta(description="true to list the rows, with the slashes in their keys between folders")] = (
        False
    )
    parent: Annotated[str | None, Meta(description="the column with the folder before the key in the URL")] = None
    size: Annotated[str | None, Meta(description="the column with the size in bytes, for listings")] = None
    modified: Annotated[str | None, Meta(description="the column with the time of the last change, for listings")] = (
        None
    )
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0


class RemoteSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="remote"):
    """`type = "remote"`: the files below a URL."""

    url: Annotated[Text, Meta(description="an http or https URL to which file names are appended")]
    allow_hosts: Annotated[
        list[
            Annotated[
                str, Meta(pattern=r"^(([\w.-]|[^\x00-\x7f\s])+|\[?[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*\]?)\Z")
            ]
        ],
        Meta(description="a list of hosts that may be reached at private addresses or through a redirect"),
    ] = []
    max_connections: Annotated[Count, Meta(description="concurrent upstream requests, 1 or more")] = 100
    connect_timeout: Annotated[Seconds, Meta(description="seconds, more than 0 and at most a year")] = 10.0
    read_timeout: Annotated[Seconds, Meta(description="seconds, more than 0 and at most a year")] = 30.0
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    names: Annotated[Literal["portable", "any", "exact"], Meta(description="portable, any or exact")] = "portable"
    list: Annotated[bool, Meta(description="true if the other server is such a service, and lists its folders")] = False
    edge: _Edge = None
    digests: DigestMode = "off"
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class VirtualSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="virtual"):
    """`type = "virtual"`: files that a function generates."""

    factory: Annotated[
        str,
        Meta(
            pattern=rf"^{FUNCTION}\Z",
            description='"module:function"; the directory of the settings file is on the import path',
        ),
    ]
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class ChosenSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="chosen"):
    """`type = "chosen"`: some files and directories, each under its name."""

    paths: Annotated[
        list[Text],
        Meta(min_length=1, description="a list of files and directories, absolute or relative to the settings file"),
    ]


SourceSettings = PathSettings | StorageSettings | ObjectSettings | RemoteSettings | VirtualSettings | ChosenSettings

SOURCE_TYPES: dict[str, type[Struct]] = {
    "path": PathSettings,
    "storage": StorageSettings,
    "object": ObjectSettings,
    "remote": RemoteSettings,
    "virtual": VirtualSettings,
    "chosen": ChosenSettings,
}
"""The tables by their `type`."""


def cache_of(source: SourceSettings) -> CacheSettings | None:
    """Return the cache of a source, or None."""
    return source.cache if isinstance(source, StorageSettings | RemoteSettings | VirtualSettings) else None


def edge_of(source: SourceSettings) -> EdgeSettings | None:
    """Return the store or CDN to which clients are redirected, or None."""
    return source.edge if isinstance(source, PathSettings | StorageSettings | RemoteSettings) else None


def options_of_edge(edge: EdgeSettings) -> dict[str, Any]:
    """Return those options of the signer that are set."""
    return {name: value for name in SIGNER_OPTIONS if (value := getattr(edge, name)) is not None}


def digests_mode(source: SourceSettings) -> Literal["off", "known", "background"]:
    """Return whether the digests of a source's files are sent and computed. Some kinds of source have none."""
    return source.digests if isinstance(source, PathSettings | StorageSettings | RemoteSettings) else "off"


def directory_of(source: SourceSettings) -> str | None:
    """Return the local directory that a source serves, or None if its files are not local."""
    if isinstance(source, PathSettings):
        return source.root
    if isinstance(source, StorageSettings) and (parts := urlsplit(source.url)).scheme == "file":
        return os.fsdecode(unquote_to_bytes(os.fsencode(parts.path))).rstrip("/") or "/"
    return None


def source_of_files(name: str, sources: Mapping[str, SourceSettings]) -> tuple[str, SourceSettings]:
    """Return the name and the settings of the source that holds the files; an object source refers to another."""
    source = sources[name]
    return (source.source, sources[source.source]) if isinstance(source, ObjectSettings) else (name, source)


def places_of(source: SourceSettings) -> list[str]:
    """Return the directory or the URLs that a rule may name for the files of a source."""
    if (cache := cache_of(source)) is not None:
        return [cache.path]
    if isinstance(source, RemoteSettings):
        return [source.url.rstrip("/")]
    if isinstance(source, StorageSettings) and (parts := urlsplit(source.url)).scheme == "s3":
        places = [source.url.rstrip("/")]
        endpoint = source.options.get("endpoint")
        if endpoint and not source.options.get("virtual_hosted_style_request"):
            places.append(f"{str(endpoint).rstrip('/')}/{parts.netloc}{quote(unquote(parts.path))}".rstrip("/"))
        return places
    directory = directory_of(source)
    return [] if directory is None else [directory]


def is_within(inner: str, outer: str) -> bool:
    """Return whether a directory or URL is the same as another or below it, comparing whole segments."""
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def overlap(place: str, other: str) -> bool:
    """Return whether one of two directories or URLs is the same as the other or below it."""
    return is_within(place, other) or is_within(other, place)
