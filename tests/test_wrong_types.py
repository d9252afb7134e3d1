"""Arguments of the wrong type, as newcomers give them: a `TypeError` at once, which says what to write."""

import datetime
import io
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import downloadview_async

dv: Any = downloadview_async  # for arguments that no type checker would let pass
SECRET = "a secret of more than thirty-two bytes"


class _Everything:
    """What the calls in the table need."""

    def __init__(self, root: Path) -> None:
        self.path = root / "files"
        self.path.mkdir()
        (self.path / "a.txt").write_text("a")
        self.source = dv.PathSource(self.path)
        self.file = dv.LocalFile(self.path / "a.txt")
        self.storage = dv.DirectoryStorage(self.path)
        self.signer = dv.URLSigner({"a": SECRET})
        self.backend = dv.XAccelRedirect([dv.Rule("/srv/files", "/_files/")])
        self.rules: Any = [("/srv/files", "/_files/")]
        self.coroutine: Any = self.source.resolve("a.txt")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Do nothing."""


def refuses(request: Any, name: Any) -> bool:
    return False


def one(key: Any) -> Any:
    return None


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda x: dv.DownloadResponse("files/a.txt"),
        r"such as await source\.resolve\('a\.txt'\) or LocalFile\('a\.txt'\)",
    ),
    (lambda x: dv.DownloadResponse(x.path / "a.txt"), r"LocalFile\('a\.txt'\), not PosixPath"),
    (lambda x: dv.DownloadResponse(x.coroutine), r"not a coroutine: await source\.resolve\(\.\.\.\) first"),
    (lambda x: dv.DownloadResponse(b"content"), "takes a file"),
    (lambda x: dv.DownloadResponse(io.BytesIO(b"content")), "takes a file"),
    (lambda x: dv.DownloadResponse(None), "takes a file"),
    (lambda x: dv.DownloadResponse(x.source), "takes a file"),
    (lambda x: dv.DownloadResponse(dv.LocalFile), r"not the class LocalFile: write LocalFile\(\.\.\.\)"),
    (lambda x: dv.DownloadResponse(x.file, attachment="inline"), "attachment takes True .* or False"),
    (lambda x: dv.DownloadResponse(x.file, filename=Path("a")), "filename takes a str"),
    (lambda x: dv.DownloadResponse(x.file, headers=[("A", "b")]), "headers takes a dictionary"),
    (lambda x: dv.DownloadResponse(x.file, status_code="200"), "status_code takes a number"),
    (lambda x: dv.DownloadResponse(x.file, background=print), r"BackgroundTask\(function\)"),
    (lambda x: dv.DownloadResponse(x.file, redirect=True), r"PresignedRedirect\(storage\)"),
    (lambda x: dv.DownloadResponse(x.file, offload="nginx"), "OffloadMiddleware names the proxy"),
    (lambda x: dv.DownloadResponse(x.file, on_outcome="note"), "function of an Outcome"),
    *[
        (lambda x, cls=cls, given=given: cls(given(x)), text)
        for cls in (dv.Download, dv.Listing, dv.ArchiveSource, dv.Digests)
        for given, text in [
            (lambda x: "files", rf"{cls.__name__} takes a source, such as PathSource\('files'\), not 'files'"),
            (lambda x: x.path, "takes a source"),
            (lambda x: x.file, "takes a source"),
            (lambda x: x.storage, r"such as StorageSource\(storage\)"),
            (lambda x: dv.PathSource, r"not the class PathSource: write PathSource\(\.\.\.\)"),
            (lambda x: x.coroutine, "not a coroutine: write `await`"),
        ]
    ],
    (lambda x: dv.Download(x.source, access=refuses), "not async: write `async def refuses`"),
    (lambda x: dv.Download(x.source, access=dv.SignedLinks), "give an async function"),
    (lambda x: dv.Download(x.source, access="user:ada"), "give an async function"),
    (lambda x: dv.Download(x.source, limits="20MB/s"), r"give Limits\(\.\.\.\)"),
    (lambda x: dv.Download(x.source, hide=".*"), "give a list of patterns"),
    (lambda x: dv.Download(x.source, hide=True), "give a list of patterns"),
    (lambda x: dv.Download(x.source, hide=[5]), "give patterns as text"),
    (lambda x: dv.Download(x.source, listing="yes"), r"give True, False or Pages\(\.\.\.\)"),
    (lambda x: dv.Download(x.source, archive="zip"), r"give True, False or ArchiveOptions\(\.\.\.\)"),
    (lambda x: dv.Download(x.source, digests=True), r"give Digests\(source\)"),
    (lambda x: dv.Download(x.source, key=5), "name of a path parameter"),
    (lambda x: dv.Download(x.source, cache_control=3600), "such as 'private, max-age=3600'"),
    (lambda x: dv.Download(x.source, headers="X"), "headers takes a dictionary"),
    (lambda x: dv.Download(x.source, attachment="inline"), "attachment takes True .* or False"),
    (lambda x: dv.Download(x.source, redirect=dv.PresignedRedirect), r"write PresignedRedirect\(\.\.\.\)"),
    (lambda x: dv.Download(x.source, offload="nginx"), "OffloadMiddleware names the proxy"),
    (lambda x: dv.Download(x.source, source_name=5), "source_name takes a str"),
    (lambda x: dv.XAccelRedirect(x.rules), r"\[Rule\('/srv/files', '/_files/'\)\], not \[\('/srv"),
    (lambda x: dv.XAccelRedirect(x.rules[0]), "takes a list of rules"),
    (lambda x: dv.XAccelRedirect(dv.Rule("/a", "/b/")), "takes a list of rules"),
    (lambda x: dv.XSendfile(dict(x.rules), encoding="raw"), "takes a list of rules"),
    (lambda x: dv.Rule(x.source, "/_files/"), "the source of a Rule is text"),
    (lambda x: dv.Rule("/srv/files", None), "the target of a Rule is text"),
    (lambda x: dv.OffloadMiddleware(app, dv.XAccelRedirect), r"write XAccelRedirect\(\.\.\.\)"),
    (lambda x: dv.OffloadMiddleware(app, "nginx"), "takes a backend"),
    (lambda x: dv.OffloadMiddleware(app, x.rules), "takes a backend"),
    (lambda x: dv.OffloadMiddleware(x.backend, app), "takes an ASGI application, and then a backend"),
    (lambda x: dv.OffloadMiddleware(app, x.backend, pathsend="yes"), "True or False"),
    (lambda x: dv.OffloadMiddleware(app, x.backend, proxy=5), "name of the proxy"),
    (lambda x: dv.Accounts(None), "takes an ASGI application"),
    (lambda x: dv.Accounts(app, listeners=print), "give a list of functions"),
    (lambda x: dv.Accounts(app, observers=[app]), "is async: give it as a listener"),
    (lambda x: dv.LimitsMiddleware(app, "20MB/s"), r"give Limits\(\.\.\.\)"),
    (lambda x: dv.PathSource(5), "path of a directory"),
    (lambda x: dv.DirectoryStorage(None), "path of a directory"),
    (lambda x: dv.LocalFile(x.file), "path of a file"),
    (lambda x: dv.StorageSource("files"), r"such as DirectoryStorage\('files'\)"),
    (lambda x: dv.StorageSource(dv.DirectoryStorage), r"write DirectoryStorage\(\.\.\.\)"),
    (lambda x: dv.SyncStorage(x.path), "is not a storage"),
    (lambda x: dv.SyncStorage(x.storage), r"write StorageSource\(storage\), without SyncStorage"),
    (lambda x: dv.MemoryStorage(["a.txt"]), "takes a dictionary"),
    (lambda x: dv.MemoryStorage({"a.txt": "text"}), r"text\.encode\(\)"),
    (lambda x: dv.ObjectSource(one), "not async: write `async def one`"),
    (lambda x: dv.ObjectSource("x"), "asynchronous function of one argument"),
    (lambda x: dv.RemoteSource(x.path), "takes a URL"),
    (lambda x: dv.RemoteFile(None), "takes a URL"),
    (lambda x: dv.Upstream("https://example.org/"), "name of a host"),
    (lambda x: dv.VirtualSource(b"content"), "function of one argument"),
    (lambda x: dv.VirtualFile(x.path, name="a"), "must be bytes, text"),
    (lambda x: dv.VirtualFile(x.coroutine, name="a"), "not a coroutine"),
    (lambda x: dv.VirtualFile(b"", name=None), "name takes the name of the file"),
    (lambda x: dv.VirtualFile(b"", name="a", etag="v1"), r"ETag\('v1'\)"),
    (lambda x: dv.VirtualFile(b"", name="a", last_modified=datetime.datetime.now()), "seconds since the epoch"),
    (lambda x: dv.CachedSource(x.source, "cache"), r"such as Cache\('cache'\)"),
    (lambda x: dv.Archive("a.txt"), r"\[\('a\.txt', LocalFile\('a\.txt'\)\)\]"),
    (lambda x: dv.Archive([x.file]), "a path and a file"),
    (lambda x: dv.Archive(["a.txt"]), "a path and a file"),
    (lambda x: dv.Archive([("a.txt", "files/a.txt")]), r"a path and a file, such as \('a\.txt', LocalFile"),
    (lambda x: dv.Archive([("a.txt", x.coroutine)]), "and `await` a coroutine first"),
    (lambda x: dv.URLSigner(SECRET), "keys is not a mapping"),
    (lambda x: dv.URLSigner({"a": 5}), "a key is a text with a secret"),
    (lambda x: dv.URLSigner({"a": SECRET}, max_age=60), "give a timedelta"),
    (lambda x: dv.URLSigner({"a": SECRET}, store="memory"), "give a GrantStore"),
    (lambda x: dv.SignedLinks({"a": SECRET}), r"SignedLinks\(URLSigner\(\{'2026a': secret\}\)\), not a dict"),
    (lambda x: dv.signed_link(SECRET), r"signed_link\(URLSigner\(\{'2026a': secret\}\)\), not a str"),
    (lambda x: dv.Grant(expires=datetime.datetime.now()), "seconds since the epoch"),
    (lambda x: dv.PresignedRedirect("s3://bucket"), r"ObjectStorage\('s3://bucket'\)"),
    (lambda x: dv.ObjectStorage(5), "takes a URL"),
    (lambda x: dv.ProxyLog("log", "store.db"), "a CompletionStore"),
    (lambda x: dv.Pages(title=5), "title takes text"),
    (lambda x: dv.Pages(downloads="all"), "takes an async function"),
    (lambda x: dv.proxy_config("nginx", x.rules), "takes a list of rules"),
    (lambda x: dv.proxy_config("nginx", [dv.Rule("/a", "/_a/")], links=["/files/"]), "a list of LinkLocation"),
    (lambda x: dv.ObjectFile("files/a.txt"), "ObjectFile takes a file"),
    (lambda x: dv.ObjectFile(x.coroutine), "not a coroutine"),
    (lambda x: dv.StorageFile("files", "a.txt"), "StorageFile takes a storage"),
    (lambda x: dv.StorageFile(x.storage, 5), "the key of a StorageFile is text"),
    (lambda x: dv.storage_from_url(x.path), "storage_from_url takes a URL"),
    (lambda x: dv.grant_store_from_url(x.path), "grant_store_from_url takes a URL"),
    (lambda x: dv.add_content_types([(".a", "text/a")]), "takes a dictionary"),
    (lambda x: dv.add_content_types({".a": 5}), "the content type of '.a' is text"),
    (lambda x: dv.Digests(x.source, "digests.db"), r"DigestStore\('digests\.db'\)"),
    (lambda x: dv.secure_link_secrets(SECRET), "takes the keys of URLSigner"),
    (lambda x: dv.KeepPeer(None), "takes an ASGI application"),
    (lambda x: dv.LimitsMiddleware(app, None), "takes limits"),
    (lambda x: dv.LimitsMiddleware(None, dv.Limits(concurrent=1)), "takes an ASGI application"),
]


@pytest.mark.parametrize("call, says", WRONG, ids=[says for _, says in WRONG])
def test_a_wrong_type_is_told_at_once(call: Callable[[Any], Any], says: str, tmp_path: Path) -> None:
    everything = _Everything(tmp_path)
    try:
        with pytest.raises(TypeError, match=says) as raised:
            call(everything)
    finally:
        everything.coroutine.close()
    assert isinstance(raised.value, dv.ConfigurationError)
    assert SECRET not in str(raised.value)


def returning_awaitable(request: Any, name: Any) -> Awaitable[bool]:
    return _allow(request, name)


async def _allow(request: Any, name: Any) -> bool:
    return True


class _Asked:
    async def __call__(self, request: Any, name: Any) -> bool:
        return True

    async def method(self, request: Any, name: Any) -> bool:
        return True


@pytest.mark.parametrize(
    "access", [_allow, returning_awaitable, lambda request, name: _allow(request, name), _Asked(), _Asked().method]
)
def test_what_returns_an_awaitable_is_taken_for_access(access: Any, tmp_path: Path) -> None:
    dv.Download(dv.PathSource(tmp_path), access=access)


def test_a_path_may_be_bytes_or_any_object_with_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (entry,) = os.scandir(tmp_path)
    paths: list[Any] = [os.fsencode(entry), entry, Path(entry), entry.path]
    assert {dv.LocalFile(path).location for path in paths[1:]} == {entry.path}
    assert {dv.Rule(path, "/_files/").source for path in paths} == {entry.path}
