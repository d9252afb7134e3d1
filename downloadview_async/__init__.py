"""Who may have which file: your application decides, and the fastest thing at hand sends it."""

from downloadview_async.asgi.endpoint import Download
from downloadview_async.asgi.errors import download_error
from downloadview_async.asgi.middleware import OffloadMiddleware
from downloadview_async.asgi.response import DownloadResponse
from downloadview_async.errors import (
    AccessDenied,
    AuthenticationRequired,
    ConfigurationError,
    DownloadError,
    FileError,
    FileMissing,
    LinkExpired,
    LinkInvalid,
    LinkUsedUp,
    PreconditionFailed,
    SourceUnavailable,
    TransferAborted,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.http.content_types import add_content_types
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.request import DownloadRequest
from downloadview_async.offload.backends import XAccelRedirect, XLiteSpeedLocation, XReproxyURL, XSendfile
from downloadview_async.offload.base import OffloadBackend, ProxyKind, ProxyOption, Redirect
from downloadview_async.offload.config import proxy_config
from downloadview_async.offload.presigned import PresignedRedirect
from downloadview_async.offload.proxies import proxy_kinds
from downloadview_async.offload.render import ProxySite
from downloadview_async.offload.rules import Rule
from downloadview_async.policy.access import Access, SignedLinks, signed_link
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.proxy_users import KeepPeer, ProxyUsers
from downloadview_async.policy.signing import URLSigner
from downloadview_async.policy.stores.base import DownloadSession, GrantStore
from downloadview_async.policy.stores.from_url import grant_store_from_url
from downloadview_async.policy.stores.memory import MemoryGrantStore
from downloadview_async.policy.stores.redis import RedisGrantStore
from downloadview_async.policy.stores.sqlite import SQLiteGrantStore
from downloadview_async.policy.users import Users
from downloadview_async.sources.base import AsyncFile, OpenFile, Source, Storage
from downloadview_async.sources.cache.index import Cache, CacheCounters
from downloadview_async.sources.cache.source import CachedSource
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.digests.store import DigestStore
from downloadview_async.sources.directory_storage import DirectoryStorage
from downloadview_async.sources.local.path import LocalFile, PathSource
from downloadview_async.sources.memory_storage import MemoryStorage
from downloadview_async.sources.object import ObjectFile, ObjectSource
from downloadview_async.sources.object_store import ObjectStorage
from downloadview_async.sources.remote.client import Upstream
from downloadview_async.sources.remote.source import RemoteFile, RemoteSource
from downloadview_async.sources.storage import StorageFile, StorageSource, storage_from_url
from downloadview_async.sources.sync_storage import SyncStorage
from downloadview_async.sources.virtual import VirtualFile, VirtualSource

__version__ = "0.1.0"

__all__ = [
    "Access",
    "AccessDenied",
    "AsyncFile",
    "AuthenticationRequired",
    "ByteRange",
    "Cache",
    "CacheCounters",
    "CachedSource",
    "ConfigurationError",
    "DigestStore",
    "Digests",
    "DirectoryStorage",
    "Download",
    "DownloadError",
    "DownloadRequest",
    "DownloadResponse",
    "DownloadSession",
    "ETag",
    "FileError",
    "FileMetadata",
    "FileMissing",
    "Grant",
    "GrantStore",
    "KeepPeer",
    "LinkExpired",
    "LinkInvalid",
    "LinkUsedUp",
    "LocalFile",
    "MemoryGrantStore",
    "MemoryStorage",
    "ObjectFile",
    "ObjectSource",
    "ObjectStorage",
    "OffloadBackend",
    "OffloadMiddleware",
    "OpenFile",
    "PathSource",
    "PreconditionFailed",
    "PresignedRedirect",
    "ProxyKind",
    "ProxyOption",
    "ProxySite",
    "ProxyUsers",
    "Redirect",
    "RedisGrantStore",
    "RemoteFile",
    "RemoteSource",
    "Rule",
    "SQLiteGrantStore",
    "SignedLinks",
    "Source",
    "SourceUnavailable",
    "Storage",
    "StorageFile",
    "StorageSource",
    "SyncStorage",
    "TransferAborted",
    "URLSigner",
    "Upstream",
    "UpstreamBusy",
    "UpstreamError",
    "UpstreamTimeout",
    "Users",
    "VirtualFile",
    "VirtualSource",
    "XAccelRedirect",
    "XLiteSpeedLocation",
    "XReproxyURL",
    "XSendfile",
    "__version__",
    "add_content_types",
    "download_error",
    "grant_store_from_url",
    "proxy_config",
    "proxy_kinds",
    "signed_link",
    "storage_from_url",
]
