"""Who may have which file: your application decides, and the fastest thing at hand sends it."""

from downloadview_async.accounts.completion_store import CompletionStore
from downloadview_async.accounts.completions import Completions
from downloadview_async.accounts.facts import note_facts, request_id_of
from downloadview_async.accounts.followed_log import ProxyLog
from downloadview_async.accounts.log import AccessLog
from downloadview_async.accounts.metrics import Metrics
from downloadview_async.accounts.outcome import Outcome
from downloadview_async.asgi.accounts import Accounts
from downloadview_async.asgi.archives import ArchiveOptions
from downloadview_async.asgi.endpoint import Download, Listing
from downloadview_async.asgi.errors import download_error
from downloadview_async.asgi.limited import LimitsMiddleware
from downloadview_async.asgi.listing.page import ListingPage, Pages
from downloadview_async.asgi.listing.view import ViewPage
from downloadview_async.asgi.middleware import OffloadMiddleware
from downloadview_async.asgi.response import DownloadResponse
from downloadview_async.asgi.traces import Traces
from downloadview_async.errors import (
    AccessDenied,
    ArchiveTooLarge,
    AuthenticationRequired,
    ConfigurationError,
    DownloadError,
    FileError,
    FileMissing,
    LimitExceeded,
    LinkExpired,
    LinkInvalid,
    LinkUsedUp,
    PreconditionFailed,
    SourceUnavailable,
    TooManyArchives,
    TransferAborted,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    WrongType,
)
from downloadview_async.http.content_types import add_content_types
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.request import DownloadRequest
from downloadview_async.offload.backends import XAccelRedirect, XLiteSpeedLocation, XReproxyURL, XSendfile
from downloadview_async.offload.balancers import balancer_config, balancers
from downloadview_async.offload.base import OffloadBackend, ProxyKind, ProxyOption, Redirect
from downloadview_async.offload.config import proxy_config
from downloadview_async.offload.edge import EdgeRedirect
from downloadview_async.offload.presigned import PresignedRedirect
from downloadview_async.offload.proxies import proxy_kinds
from downloadview_async.offload.render import LinkLocation, ProxySite
from downloadview_async.offload.rules import Rule
from downloadview_async.offload.signers import signer_kinds, signer_of
from downloadview_async.offload.signers.base import Edge, Signed, Signer, SignerKind, SignerOption
from downloadview_async.policy.access import Access, SignedLinks, signed_link
from downloadview_async.policy.formats import link_formats
from downloadview_async.policy.formats.base import LinkFormat
from downloadview_async.policy.formats.secure_link import secure_link_secrets
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.hiding import Hidden
from downloadview_async.policy.limits.limits import Limits
from downloadview_async.policy.limits.source import SourceLimit
from downloadview_async.policy.proxy_users import KeepPeer, ProxyUsers
from downloadview_async.policy.signing import URLSigner
from downloadview_async.policy.stores.base import DownloadSession, GrantStore
from downloadview_async.policy.stores.from_url import grant_store_from_url
from downloadview_async.policy.stores.memory import MemoryGrantStore
from downloadview_async.policy.stores.redis import RedisGrantStore
from downloadview_async.policy.stores.sqlite import SQLiteGrantStore
from downloadview_async.policy.users import Users
from downloadview_async.sources.archive import Archive, ArchiveEntry, ArchiveLimits, ArchiveSource
from downloadview_async.sources.base import AsyncFile, OpenFile, Source, Storage, SupportsListing
from downloadview_async.sources.cache.index import Cache, CacheCounters
from downloadview_async.sources.cache.source import CachedSource
from downloadview_async.sources.checksums import MemoryChecksums, SQLiteChecksums
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.digests.store import DigestStore
from downloadview_async.sources.directory_storage import DirectoryStorage
from downloadview_async.sources.listing import DescribedEntry, Entry
from downloadview_async.sources.local.path import LocalFile, PathSource
from downloadview_async.sources.memory_storage import MemoryStorage
from downloadview_async.sources.object import ObjectFile, ObjectSource
from downloadview_async.sources.object_store import ObjectStorage
from downloadview_async.sources.remote.client import Upstream
from downloadview_async.sources.remote.source import RemoteFile, RemoteSource
from downloadview_async.sources.shared_facts import SharedChecksums, SharedDigests, SharedFacts
from downloadview_async.sources.storage import StorageFile, StorageSource, storage_from_url
from downloadview_async.sources.sync_storage import SyncStorage
from downloadview_async.sources.virtual import VirtualFile, VirtualSource

__version__ = "0.2.0"

__all__ = [
    "Access",
    "AccessDenied",
    "AccessLog",
    "Accounts",
    "Archive",
    "ArchiveEntry",
    "ArchiveLimits",
    "ArchiveOptions",
    "ArchiveSource",
    "ArchiveTooLarge",
    "AsyncFile",
    "AuthenticationRequired",
    "ByteRange",
    "Cache",
    "CacheCounters",
    "CachedSource",
    "CompletionStore",
    "Completions",
    "ConfigurationError",
    "DescribedEntry",
    "DigestStore",
    "Digests",
    "DirectoryStorage",
    "Download",
    "DownloadError",
    "DownloadRequest",
    "DownloadResponse",
    "DownloadSession",
    "ETag",
    "Edge",
    "EdgeRedirect",
    "Entry",
    "FileError",
    "FileMetadata",
    "FileMissing",
    "Grant",
    "GrantStore",
    "Hidden",
    "KeepPeer",
    "LimitExceeded",
    "Limits",
    "LimitsMiddleware",
    "LinkExpired",
    "LinkFormat",
    "LinkInvalid",
    "LinkLocation",
    "LinkUsedUp",
    "Listing",
    "ListingPage",
    "LocalFile",
    "MemoryChecksums",
    "MemoryGrantStore",
    "MemoryStorage",
    "Metrics",
    "ObjectFile",
    "ObjectSource",
    "ObjectStorage",
    "OffloadBackend",
    "OffloadMiddleware",
    "OpenFile",
    "Outcome",
    "Pages",
    "PathSource",
    "PreconditionFailed",
    "PresignedRedirect",
    "ProxyKind",
    "ProxyLog",
    "ProxyOption",
    "ProxySite",
    "ProxyUsers",
    "Redirect",
    "RedisGrantStore",
    "RemoteFile",
    "RemoteSource",
    "Rule",
    "SQLiteChecksums",
    "SQLiteGrantStore",
    "SharedChecksums",
    "SharedDigests",
    "SharedFacts",
    "Signed",
    "SignedLinks",
    "Signer",
    "SignerKind",
    "SignerOption",
    "Source",
    "SourceLimit",
    "SourceUnavailable",
    "Storage",
    "StorageFile",
    "StorageSource",
    "SupportsListing",
    "SyncStorage",
    "TooManyArchives",
    "Traces",
    "TransferAborted",
    "URLSigner",
    "Upstream",
    "UpstreamBusy",
    "UpstreamError",
    "UpstreamRefused",
    "UpstreamTimeout",
    "Users",
    "ViewPage",
    "VirtualFile",
    "VirtualSource",
    "WrongType",
    "XAccelRedirect",
    "XLiteSpeedLocation",
    "XReproxyURL",
    "XSendfile",
    "__version__",
    "add_content_types",
    "balancer_config",
    "balancers",
    "download_error",
    "grant_store_from_url",
    "link_formats",
    "note_facts",
    "proxy_config",
    "proxy_kinds",
    "request_id_of",
    "secure_link_secrets",
    "signed_link",
    "signer_kinds",
    "signer_of",
    "storage_from_url",
]
