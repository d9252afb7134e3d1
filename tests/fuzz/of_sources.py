"""Names, files beneath a root, the files of a cache on the disk, sidecars, and the listings of other servers."""

import asyncio
import json
import logging
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from hashlib import blake2b, sha256
from pathlib import Path

from downloadview_async import (
    AccessDenied,
    Cache,
    CachedSource,
    Download,
    FileMissing,
    MemoryStorage,
    SourceUnavailable,
    StorageSource,
    UpstreamError,
)
from downloadview_async.sources.bucket_listing import page_of
from downloadview_async.sources.cache.directory import CacheDirectory
from downloadview_async.sources.digests.sidecar import checksum_line, parse_sidecar
from downloadview_async.sources.local.root import Root, Symlinks
from downloadview_async.sources.names import Names, canonical_folder, canonical_name, entries_check, entry_check
from downloadview_async.sources.remote.listing import entry_of
from downloadview_async.sources.remote.urls import PORTS, UpstreamURL, parse_url
from downloadview_async.testing import call
from tests.fuzz import inputs as st
from tests.fuzz.inputs import edited, edited_bytes, edited_text
from tests.fuzz.targets import target, target_within

PATHS = edited_text(
    "a.txt",
    "sub/b.txt",
    "../secret.txt",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/../b",
    "..",
    "%2e%2e/x",
    "aux.txt",
    "a:b",
    "C:\\x",
    "a\\..\\b",
    "sub/",
    "...",
    ". ",
    "com1",
    "x" * 260,
    "out/secret.txt",
    "loop/x",
    "to-root/to-root/a.txt",
    words=["sub", "to-root", "out", "absolute", "/./", "/../"],
)
NAMES: tuple[Names, ...] = ("portable", "any", "exact")


@target(PATHS)
def names(text: str) -> None:
    accepted: dict[Names, str] = {}
    for names in NAMES:
        try:
            accepted[names] = name = canonical_name(text, names)
        except FileMissing:
            continue
        assert canonical_name(name, names) == name
        inside = posixpath.normpath(posixpath.join("/root", name.lstrip("/")))
        assert inside.startswith("/root/") or names == "exact"
        assert ".." not in name.split("/")
        assert not re.search("[\x00-\x1f\x7f]", name)
        assert len(name.encode()) <= 4095
    assert "portable" not in accepted or accepted.get("any") == accepted["portable"]
    assert "any" not in accepted or "exact" in accepted
    if "/" not in text and text not in ("", "."):  # listings have the names that can be asked for
        for names in ("portable", "any"):
            assert entry_check("", names)(text) == (accepted.get(names) == text)
            if entries_check("", names)([text, "a"]):
                assert accepted[names] == text
    try:
        folder = canonical_folder(text)
    except FileMissing:
        return
    assert canonical_folder(folder) == folder


OUTSIDE, INSIDE = b"outside", b"inside"


@contextmanager
def tree() -> Iterator[Path]:
    """Give a directory with a root, in which links lead out and round, beside files that nobody may have."""
    with tempfile.TemporaryDirectory(prefix="downloadview-fuzz-") as name:
        base = Path(name).resolve()
        root = base / "root"
        (root / "sub").mkdir(parents=True)
        (root / "a.txt").write_bytes(INSIDE)
        (root / "sub" / "b.txt").write_bytes(INSIDE)
        (root / "é π.txt").write_bytes(INSIDE)
        (base / "secret.txt").write_bytes(OUTSIDE)
        for link, place in {
            "out": "..",
            "absolute": str(base),
            "to-root": ".",
            "loop": "loop",
            "sub/up": "../a.txt",
            "sub/out.txt": "../../secret.txt",
        }.items():
            (root / link).symlink_to(place)
        yield base


@target_within(PATHS, tree)
def files_beneath_a_root(text: str, base: Path) -> None:
    links: tuple[Symlinks, ...] = ("deny", "inside")
    answers = [
        content_of(base / "root", text, symlinks, use_openat2=use_openat2)
        for symlinks in links
        for use_openat2 in (True, False)
    ]
    assert answers[0] == answers[1], "openat2 and openat differ"
    assert answers[2] == answers[3], "openat2 and openat differ"
    assert set(answers) <= {None, INSIDE}
    assert answers[0] is None or answers[2] is not None


def content_of(path: Path, text: str, symlinks: Symlinks, *, use_openat2: bool) -> bytes | None:
    root = Root(path, symlinks=symlinks, use_openat2=use_openat2)
    try:
        name = canonical_name(text)
        opened = root.open(name)
    except (FileMissing, AccessDenied, SourceUnavailable):
        return None
    finally:
        root.close()
    try:
        return os.read(opened.descriptor, 100)
    finally:
        os.close(opened.descriptor)


# --- a cache on the disk


@dataclass(frozen=True, slots=True)
class CacheOnDisk:
    """A directory with a filled cache, and the origin of its files."""

    filled: Path
    used: Path
    origin: MemoryStorage
    loop: asyncio.AbstractEventLoop


FILES = {"a.txt": b"first " * 700, "b.txt": b"second", "empty.txt": b""}


async def served(place: CacheOnDisk, directory: Path) -> dict[str, tuple[int, bytes]]:
    cache = Cache(directory, max_bytes=1 << 20)
    app = Download(CachedSource(StorageSource(place.origin), cache, name="files"))
    try:
        answers = {}
        for name in FILES:
            answer = await call(app, f"/{name}")
            answers[name] = answer.status, answer.body
        return answers
    finally:
        await cache.aclose()


@contextmanager
def cache_on_disk() -> Iterator[CacheOnDisk]:
    """Give a cache that has been filled, with room for a copy of it."""
    with tempfile.TemporaryDirectory(prefix="downloadview-fuzz-") as name, asyncio.Runner() as runner:
        base = Path(name).resolve()
        logging.getLogger("downloadview_async").setLevel(logging.CRITICAL)
        place = CacheOnDisk(base / "filled", base / "used", MemoryStorage(FILES), runner.get_loop())
        (base / "b.txt").write_bytes(FILES["b.txt"])
        for _ in range(2):
            answers = place.loop.run_until_complete(served(place, place.filled))
            assert answers == {file: (200, content) for file, content in FILES.items()}
        assert len(list(place.filled.glob("*.meta"))) == len(FILES)
        yield place


@target_within(
    st.lists(
        st.tuples(
            st.integers(0, 20),  # which file
            st.sampled_from(["bytes", "body", "cut", "longer", "gone", "folder", "fifo", "link", "swap", "deep"]),
            st.integers(0, 5000),
            edited_bytes(b"", b"null", b"-1", b'"', b"{}", b"[" * 5000),
        ),
        min_size=1,
        max_size=3,
    ),
    cache_on_disk,
    regressions=[[(1, "deep", 0, b"")], [(20, "folder", 0, b"")]],
)
def files_of_a_cache(changes: list[tuple[int, str, int, bytes]], place: CacheOnDisk) -> None:
    shutil.rmtree(place.used, ignore_errors=True)
    shutil.copytree(place.filled, place.used)
    damaged = set()
    for number, how, position, piece in changes:
        files = sorted(place.used.iterdir())
        file = files[number % len(files)]
        if not file.is_file() or file.is_symlink():
            continue
        content = file.read_bytes()
        position %= len(content) + 1
        other = files[position % len(files)]
        match how:
            case "bytes":
                changed = content[:position] + piece + content[position + len(piece) :]
            case "body" if file.suffix == ".meta":  # with a checksum that is right
                body = content.partition(b"\n")[2]
                body = body[: position % len(body)] + piece + body[position % len(body) + 1 :]
                changed = blake2b(body, digest_size=20).hexdigest().encode() + b"\n" + body
            case "deep" if file.suffix == ".meta":
                changed = b"\n" + b"[" * 100_000
            case "cut":
                changed = content[:position]
            case "longer":
                changed = content + piece
            case "swap":
                changed = other.read_bytes() if other.is_file() else content
            case "gone":
                file.unlink()
                continue
            case "folder" | "fifo" | "link":
                file.unlink()
                if how == "folder":
                    file.mkdir()
                elif how == "fifo":
                    os.mkfifo(file)
                else:
                    file.symlink_to(place.filled.parent / "b.txt")
                continue
            case _:
                continue
        file.write_bytes(changed)
        # Nothing can tell that the bytes of a file were changed on the disk, if its length stayed.
        if re.fullmatch("[0-9a-f]{40}-[0-9a-f]{40}", file.name) and len(changed) == len(content):
            damaged.add(len(content))
    answers = place.loop.run_until_complete(asyncio.wait_for(served(place, place.used), 60))
    for name, content in FILES.items():
        status, body = answers[name]
        assert status == 200, (name, status, body)
        assert body == content or len(content) in damaged, name
    directory = CacheDirectory(place.used, max_bytes=1 << 20, max_unused=60)
    try:
        directory.sweep()
    except OSError:  # as it promises where something that is not a file has the name of one
        assert any(how in ("folder", "fifo", "link") for _, how, *_ in changes)
    assert 0 <= directory.bytes <= 1 << 20


# --- what others have written

LINE = sha256(b"").hexdigest()


@target(
    edited_text(f"{LINE}  a.txt\n", f"{LINE} *dir/a.txt\n", LINE, f"\\{LINE}  a\\nb\n", f"{LINE}  x\n{LINE}  a.txt\n")
)
def sidecars(text: str) -> None:
    for name in ("a.txt", "a\nb"):
        digests = parse_sidecar(text, name)
        assert len(digests) <= 1
        if digests:
            assert digests[0][1].hex() in text.lower()
            assert parse_sidecar(checksum_line(digests[0][1], name), name) == digests


ENTRY = b'{"name":"a.txt","kind":"file","size":10,"modified":"2026-01-01T00:00:00Z","type":"text/plain","url":"a.txt"}'


@target(
    edited_bytes(
        ENTRY,
        ENTRY.replace(b"file", b"folder"),
        words=[
            b"null",
            b"true",
            b"1e999",
            b"{" * 3000,
            b'"a"',
            b"-1",
            b"9" * 5000,
            b"+23:59",
            b"0001-01-01",
            b"9999-12-31",
        ],
    )
)
def entries_of_another_server(line: bytes) -> None:
    try:
        entry = entry_of(line)
    except UpstreamError as exc:
        assert str(exc).isprintable()
        return
    fields = json.loads(line)
    assert entry.name == fields["name"]
    assert entry.size is None or (type(entry.size) is int and entry.size >= 0)
    assert entry.modified is None or entry.modified.tzinfo is UTC
    assert not (entry.is_folder and entry.size is not None)


BUCKET = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>true</IsTruncated>'
    b"<NextContinuationToken>t</NextContinuationToken><EncodingType>url</EncodingType>"
    b"<Contents><Key>p/a%20b</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag>"
    b"<Size>10</Size></Contents><CommonPrefixes><Prefix>p/c/</Prefix></CommonPrefixes></ListBucketResult>"
)
ENTITIES = b'<!DOCTYPE a [<!ENTITY x "' + b"y" * 100 + b'"><!ENTITY z "&x;&x;&x;&x;&x;&x;">]>'


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@target_within(
    edited_bytes(
        BUCKET, words=[ENTITIES, b"<a>" * 3000, b"&z;", b"<!--", b"<![CDATA[", b"\xff\xfe", b"<Size/>", b"%ff"]
    ),
    _loop,
)
def pages_of_a_bucket(content: bytes, loop: asyncio.AbstractEventLoop) -> None:
    try:
        page = loop.run_until_complete(page_of(content, "p/"))
    except UpstreamError:
        return
    for listed in page.objects:
        assert listed.size is None or 0 <= listed.size < 10**18
        assert listed.modified is None or listed.modified.tzinfo is not None
    assert page.following is None or isinstance(page.following, str)


URLS = edited(
    "http://upstream.example/a%20b?c=d",
    "https://user:password@upstream.example:8443/a/../b/./c",
    "http://[2001:db8::1]:80/",
    "http://[fe80::1%25eth0]/x",
    "//other.example/a",
    "/a/b?c#d",
    "b/../../c",
    "?q",
    "http://127.0.0.1/",
    "http://m\xfcnchen.example/\xe9",
    "http://0x7f.1/",
    words=["@", "[", "]", "%25", "%", "http://", "//", "/../", "/./", ":80", ":99999", "\xad", "xn--"],
)


def is_sound(url: UpstreamURL) -> bool:
    """Return whether a URL can stand in the head of a request, and is itself when it is read again."""
    assert url.target.startswith("/")
    assert re.fullmatch("[!-~]+", url.target), url
    assert re.fullmatch("[!-~]*", url.authority), url
    again = parse_url(f"{url.scheme}://{url.authority}{url.target}")
    return (again.origin, again.authority, again.target) == (url.origin, url.authority, url.target)


@target(
    st.tuples(URLS, URLS),
    regressions=[("http://[fe80::1%a b]/", "/"), ("http://upstream.example/", "http://[fe80::1%\xe9]/")],
)
def urls_of_upstreams(value: tuple[str, str]) -> None:
    text, location = value
    try:
        url = parse_url(text)
        if url.scheme in PORTS:
            assert is_sound(url), url
            following = url.joined(location)
            assert following.scheme not in PORTS or is_sound(following), following
    except UpstreamError:  # the log shortens what it says
        return
