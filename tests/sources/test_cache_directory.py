"""The directory of a cache: names and metadata that cannot be mixed up, room, leftovers, two processes."""

import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async import ConfigurationError, ETag, FileMetadata
from downloadview_async.sources.cache import directory as cache_directory
from downloadview_async.sources.cache import eviction
from downloadview_async.sources.cache.directory import CacheDirectory
from downloadview_async.sources.cache.entry import Entry, data_name, dump_entry, key_hash, load_entry
from downloadview_async.sources.cache.files import Part, protect

KIB = 1024
any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates and controls, too
etags = st.none() | st.builds(ETag, st.from_regex(r"[\x21\x23-\x7e\x80-\xff]{0,20}", fullmatch=True), st.booleans())
described = st.builds(
    FileMetadata,
    size=st.integers(0, 2**63),
    etag=etags,
    last_modified=st.none() | st.integers(0, 2**40),
    content_type=st.sampled_from([None, "text/plain", "text/html; charset=utf-8"]),
    headers=st.lists(
        st.tuples(st.sampled_from(["vary", "content-encoding"]), st.from_regex(r"[ -~\x80-\xff]*", fullmatch=True))
    ).map(tuple),
)


def entry_of(source: str, key: str, metadata: FileMetadata, **more: Any) -> Entry:
    return Entry(data=data_name(key_hash(source, key), metadata), name="n", metadata=metadata, validated=1.5, **more)


@given(any_text, any_text, any_text, any_text)
def test_two_files_never_share_a_name(source: str, key: str, other_source: str, other_key: str) -> None:
    same = (source, key) == (other_source, other_key)
    assert (key_hash(source, key) == key_hash(other_source, other_key)) is same
    assert same or key_hash(source + key, "") != key_hash(source, key) or not key


@given(any_text, any_text, described)
def test_nothing_of_a_name_is_in_a_path(source: str, key: str, metadata: FileMetadata) -> None:
    assert re.fullmatch("[0-9a-f]{40}-[0-9a-f]{40}", data_name(key_hash(source, key), metadata))


@given(any_text, any_text, described, any_text, st.none() | st.floats(0, 1e9))
def test_an_entry_is_read_as_it_was_written(
    source: str, key: str, metadata: FileMetadata, name: str, max_age: float | None
) -> None:
    entry = replace(entry_of(source, key, metadata, max_age=max_age), name=name)
    content = dump_entry(source, key, entry)
    assert load_entry(content, source, key) == entry
    assert load_entry(content, source, f"{key}x") is None
    assert load_entry(content, f"{source}x", key) is None


@given(st.data())
def test_a_damaged_entry_is_none(data: st.DataObject) -> None:
    content = bytearray(dump_entry("s", "k", entry_of("s", "k", FileMetadata(size=3))))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    assert load_entry(bytes(content), "s", "k") is None
    assert load_entry(bytes(content[:position]), "s", "k") is None


@pytest.mark.parametrize(
    "change",
    [
        {"data": "../../etc/passwd"},
        {"data": "/etc/passwd"},
        {"data": data_name(key_hash("s", "other"), FileMetadata(size=3))},
        {"data": None},
        {"size": -1},
        {"size": 4},
        {"size": "3"},
        {"name": None},
        {"headers": [["set-cookie\r\nx", "a"]]},
        {"headers": [["vary", "a\r\nX-Accel-Redirect: /x"]]},
        {"headers": "x"},
        {"content_type": "text/plain\r\nX: y"},
        {"version": 2},
        {"key": "other"},
        {"validated": None},
    ],
)
def test_an_entry_with_a_true_checksum_and_other_contents_is_none(change: dict[str, Any]) -> None:
    content = dump_entry("s", "k", entry_of("s", "k", FileMetadata(size=3)))
    body = json.dumps(json.loads(content.partition(b"\n")[2]) | change).encode()
    checksum = blake2b(body, digest_size=20).hexdigest().encode()
    assert load_entry(checksum + b"\n" + body, "s", "k") is None


@pytest.mark.parametrize(
    "ago, own, fresh",
    [
        *[(0.0, None, True), (99.0, None, True), (101.0, None, False), (9.0, 10.0, True), (11.0, 10.0, False)],
        *[(500.0, 1000.0, True), (0.0, 0.0, False), (-60.0, None, False)],
    ],
)
def test_for_how_long_an_entry_is_fresh(ago: float, own: float | None, fresh: bool) -> None:
    entry = replace(entry_of("s", "k", FileMetadata(size=3), max_age=own), validated=time.time() - ago)
    assert (entry.fresh_for(100.0) > 0) is fresh


Make = Callable[..., CacheDirectory]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**options: Any) -> CacheDirectory:
        return CacheDirectory(tmp_path / "cache", **{"max_bytes": 100 * KIB, "max_unused": 3600.0, **options})

    return make


def put(
    directory: CacheDirectory, key: str, content: bytes, *, etag: str | None = "v1", keep_open: bool = False
) -> Entry | None:
    part = directory.begin(key_hash("s", key), len(content))
    if part is None:
        return None
    if not directory.grow(part, len(content)):
        directory.discard(part)
        os.close(part.descriptor)
        return None
    os.write(part.descriptor, content)
    tag = None if etag is None else ETag(etag)
    metadata = FileMetadata(size=len(content), etag=tag, last_modified=1_700_000_000)
    entry = replace(entry_of("s", key, metadata), validated=time.time())
    directory.commit(part, "s", key, entry)
    if not keep_open:
        os.close(part.descriptor)
    return entry


def names(directory: CacheDirectory) -> list[str]:
    return sorted(name for name in os.listdir(directory.root.path) if name != "usage")


def on_disk(directory: CacheDirectory) -> int:
    sizes = [os.stat(os.path.join(directory.root.path, name)).st_size for name in names(directory)]
    return sum(-(-size // 4096) * 4096 for size in sizes)


def test_what_was_put_is_found_and_counted(make: Make) -> None:
    directory = make()
    entry = put(directory, "k", b"x" * 5000)
    assert entry is not None
    assert directory.find("s", "k") == entry
    assert directory.find("s", "other") is None
    assert directory.find("other", "k") is None
    assert directory.bytes == on_disk(directory) == 8192 + 4096
    descriptor, found, _ = directory.root.open(entry.data)
    os.close(descriptor)
    assert found.st_size == 5000
    again = make()  # as after a restart
    again.sweep()
    assert again.bytes == on_disk(again)
    assert again.find("s", "k") == entry


def test_a_new_version_takes_the_place_of_the_old_one(make: Make) -> None:
    directory = make()
    put(directory, "k", b"old")
    new = put(directory, "k", b"newer", etag="v2")
    assert new is not None
    assert directory.find("s", "k") == new
    assert names(directory) == sorted([new.data, f"{key_hash('s', 'k')}.meta"])
    assert directory.bytes == on_disk(directory)


def test_the_times_of_two_versions_differ_by_a_second_at_least(make: Make) -> None:
    """Proxies make validators of the second and the size, which an origin may have in common for two versions."""
    directory = make()
    times = []
    for etag in ("v1", "v2", "v3"):
        entry = put(directory, "k", b"12345", etag=etag)
        assert entry is not None
        times.append(int(os.stat(os.path.join(directory.root.path, entry.data)).st_mtime))
    assert len(set(times)) == 3
    entry = put(directory, "other", b"12345", etag=None)
    assert entry is not None
    assert os.stat(os.path.join(directory.root.path, entry.data)).st_mtime == 1_700_000_000


def test_nobody_else_may_hold_its_locks(make: Make) -> None:
    """Whoever may open a file may lock it. What a proxy has to read is the exception."""
    directory = make()
    entry = put(directory, "k", b"x")
    assert entry is not None
    paths = {name: Path(directory.root.path, name) for name in ("usage", *names(directory))}
    modes = {name: path.stat().st_mode & 0o777 for name, path in paths.items()}
    assert modes.pop(entry.data) == 0o644 & ~umask()
    assert set(modes.values()) == {0o600}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")
def test_a_count_that_another_user_has_left_is_made_anew() -> None:
    """Such as root, by looking after the cache of the service's user."""
    code = """
import os, sys
from tests.sources.test_cache_directory import CacheDirectory, put
os.seteuid(65534)
assert put(CacheDirectory(sys.argv[1], max_bytes=100 * 1024, max_unused=3600.0), "other", b"y") is not None
"""
    with tempfile.TemporaryDirectory() as path:
        put(CacheDirectory(path, max_bytes=100 * KIB, max_unused=3600.0), "k", b"x")
        os.chown(path, 65534, 65534)
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")
@pytest.mark.parametrize("mode, owner", [(0o777, 0), (0o1777, 0), (0o755, 65534)])
def test_a_directory_that_others_may_fill_is_refused(tmp_path: Path, mode: int, owner: int) -> None:
    tmp_path.chmod(mode)
    os.chown(tmp_path, owner, owner)
    with pytest.raises(ConfigurationError, match="others may put files into"):
        CacheDirectory(tmp_path, max_bytes=1, max_unused=1)


def test_a_version_that_a_proxy_may_be_opening_is_kept_for_a_while(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make()
    old = put(directory, "k", b"old")
    assert old is not None
    directory.lease(key_hash("s", "k"))
    put(directory, "k", b"newer", etag="v2")
    directory.sweep()
    assert old.data in names(directory)
    monkeypatch.setattr(eviction, "LEASE_SECONDS", 0.0)
    directory.sweep()
    assert old.data not in names(directory)
    assert directory.bytes == on_disk(directory)


def test_the_least_recently_used_makes_room(make: Make) -> None:
    directory = make(max_bytes=60 * KIB)
    for number, key in enumerate("abc"):
        put(directory, key, bytes(12 * KIB))
        os.utime(os.path.join(directory.root.path, f"{key_hash('s', key)}.meta"), (0, time.time() - 100 + number))
    assert directory.find("s", "a") is not None  # is a use of it
    assert put(directory, "d", bytes(12 * KIB)) is not None
    assert [directory.find("s", key) is not None for key in "abcd"] == [True, False, True, True]
    assert directory.evictions == 1
    assert directory.bytes == on_disk(directory) <= 60 * KIB


def test_a_file_in_use_is_not_evicted(make: Make) -> None:
    directory = make(max_bytes=32 * KIB)
    entry = put(directory, "a", bytes(16 * KIB))
    assert entry is not None
    descriptor = directory.root.open(entry.data).descriptor
    protect(descriptor)
    assert put(directory, "b", bytes(16 * KIB)) is None
    assert directory.find("s", "a") == entry
    os.close(descriptor)
    assert put(directory, "b", bytes(16 * KIB)) is not None
    assert directory.find("s", "a") is None


def test_a_file_is_in_use_from_the_moment_that_it_arrives(make: Make) -> None:
    directory = make(max_bytes=32 * KIB)
    assert put(directory, "a", bytes(16 * KIB), keep_open=True) is not None
    assert put(directory, "b", bytes(16 * KIB)) is None


def test_a_leased_file_is_not_evicted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(max_bytes=32 * KIB)
    put(directory, "a", bytes(16 * KIB))
    assert directory.find("s", "a", lease=True) is not None
    assert put(directory, "b", bytes(16 * KIB)) is None
    monkeypatch.setattr(eviction, "LEASE_SECONDS", 0.0)
    assert put(directory, "b", bytes(16 * KIB)) is not None


def test_a_file_that_is_leased_while_others_are_counted_is_not_evicted(make: Make) -> None:
    """A large directory takes a while to go through, and a proxy may be told of a file of it meanwhile."""
    told: list[str] = []

    def used() -> dict[str, float]:  # is asked for when everything has been looked at
        for key in told:
            directory.lease(key)
        return {}

    directory = make(max_bytes=32 * KIB, used=used)
    put(directory, "a", bytes(16 * KIB))
    told.append(key_hash("s", "a"))
    before = names(directory)
    assert put(directory, "b", bytes(16 * KIB)) is None
    assert names(directory) == before
    assert directory.find("s", "a") is not None


def test_what_was_evicted_meanwhile_is_not_found_for_a_proxy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make()
    put(directory, "a", b"a")
    name = os.path.join(directory.root.path, f"{key_hash('s', 'a')}.meta")
    read = os.read

    def read_and_lose(descriptor: int, count: int) -> bytes:  # as when another process is quicker
        content = read(descriptor, count)
        os.unlink(name)
        return content

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", read_and_lose)
        assert directory.find("s", "a", lease=True) is None


def test_what_is_unused_for_long_is_removed(make: Make) -> None:
    directory = make()
    put(directory, "a", b"a")
    put(directory, "b", b"b")
    os.utime(os.path.join(directory.root.path, f"{key_hash('s', 'a')}.meta"), (0, time.time() - 3601))
    directory.sweep()
    assert directory.find("s", "a") is None
    assert directory.find("s", "b") is not None
    used = time.time()
    directory = make(used=lambda: {key_hash("s", "b"): used})  # known better by the process
    os.utime(os.path.join(directory.root.path, f"{key_hash('s', 'b')}.meta"), (0, time.time() - 3601))
    directory.sweep()
    assert directory.find("s", "b") is not None


def test_parts_reserve_their_room_and_grow(make: Make) -> None:
    directory = make(max_bytes=64 * KIB)
    put(directory, "kept", bytes(10 * KIB))
    first = directory.begin(key_hash("s", "a"), 52 * KIB)
    assert isinstance(first, Part)
    assert directory.find("s", "kept") is not None  # nothing goes for what may never come
    assert directory.grow(first, 52 * KIB)
    assert directory.find("s", "kept") is None
    assert directory.bytes == on_disk(directory) + 4096
    second = directory.begin(key_hash("s", "b"), None)
    assert isinstance(second, Part)
    assert not directory.grow(second, 40 * KIB)
    directory.discard(first)
    assert directory.grow(second, 40 * KIB)
    directory.discard(second)
    for part in (first, second):
        os.close(part.descriptor)
    assert directory.bytes == on_disk(directory) == 0


def test_one_larger_than_the_cache_evicts_nothing(make: Make) -> None:
    directory = make(max_bytes=64 * KIB)
    put(directory, "a", b"a")
    assert put(directory, "b", bytes(64 * KIB)) is None
    assert directory.find("s", "a") is not None


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(make: Make, tmp_path: Path) -> None:
    directory = make()
    alive = directory.begin(key_hash("s", "a"), 1)
    assert alive is not None
    path = tmp_path / "cache"
    (path / f"{key_hash('s', 'b')}.{'0' * 16}.part").write_bytes(b"x" * 9000)  # nobody locks it
    orphan = path / data_name(key_hash("s", "c"), FileMetadata(size=1))
    orphan.write_bytes(b"x")
    (path / f"{key_hash('s', 'd')}.meta").write_bytes(b"without its data")
    (path / "mine.txt").write_bytes(b"somebody put it here")
    directory.sweep()
    # a proxy may have been told of the orphan
    assert set(names(directory)) == {alive.name, orphan.name, "mine.txt"}
    assert directory.bytes == 4096 + 4096
    os.close(alive.descriptor)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"-5 7\n", b"99999999999999999999999 1\n", b"5 7"])
def test_a_damaged_count_is_made_anew(make: Make, content: bytes) -> None:
    put(make(), "a", bytes(9000))
    usage = Path(make().root.path, "usage")
    usage.write_bytes(content)
    directory = make()
    put(directory, "b", b"b")
    assert directory.bytes == on_disk(directory)


@pytest.mark.parametrize(
    "damage", [lambda old: old.replace(b'"size": 1', b'"size": 2'), lambda _: b"\n" + b"[" * 100_000]
)
def test_a_damaged_entry_is_dropped(make: Make, damage: Callable[[bytes], bytes]) -> None:
    directory = make()
    put(directory, "a", b"a")
    meta = Path(directory.root.path, f"{key_hash('s', 'a')}.meta")
    meta.write_bytes(damage(meta.read_bytes()))
    assert directory.find("s", "a") is None
    assert not meta.exists()


def test_renewing_is_for_the_current_version(make: Make) -> None:
    directory = make()
    old = put(directory, "a", b"a")
    assert old is not None
    old = replace(old, validated=5.0)
    directory.renew("s", "a", old)
    assert directory.find("s", "a") == old
    new = put(directory, "a", b"b", etag="v2")
    directory.renew("s", "a", old)
    assert directory.find("s", "a") == new


def test_forgetting(make: Make) -> None:
    directory = make()
    put(directory, "a", b"a")
    directory.forget("s", "a")
    assert directory.find("s", "a") is None
    assert names(directory) == []
    assert directory.bytes == 0
    directory.forget("s", "a")


def test_a_process_that_holds_the_lock_and_stops_does_not_stop_others_for_ever(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make()
    put(directory, "a", b"a")
    monkeypatch.setattr(cache_directory, "_LOCK_PATIENCE", 0.05)
    with open(Path(directory.root.path, "usage"), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError):
            directory.begin(key_hash("s", "b"), 1)
        assert directory.find("s", "a") is not None


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        CacheDirectory(tmp_path / "file" / "cache", max_bytes=1, max_unused=1)


@pytest.mark.slow
def test_several_processes_keep_one_count(make: Make) -> None:
    code = """
import os, sys
from tests.sources.test_cache_directory import CacheDirectory, put
directory = CacheDirectory(sys.argv[1], max_bytes=200 * 1024, max_unused=3600.0)
for number in range(100):
    put(directory, f"{int(sys.argv[2]) * number % 37}", os.urandom(number * 100), etag=f"{sys.argv[2]}-{number}")
"""
    directory = make(max_bytes=200 * KIB)
    commands = [[sys.executable, "-c", code, directory.root.path, str(number)] for number in (1, 2, 3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for process in processes:
        assert process.communicate()[1] == b""
    used = int(Path(directory.root.path, "usage").read_bytes().split()[0])
    assert used == on_disk(directory) <= 200 * KIB
    for number in range(37):
        entry = directory.find("s", str(number))
        if entry is not None:
            assert os.stat(os.path.join(directory.root.path, entry.data)).st_size == entry.metadata.size


def test_a_part_that_cannot_be_counted_is_removed_and_closed(tmp_path: Path) -> None:
    code = """
import os, resource, signal, sys
from downloadview_async.sources.cache.directory import CacheDirectory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = CacheDirectory(sys.argv[1], max_bytes=1 << 30, max_unused=3600)
directory.sweep()
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # the disk takes no more bytes
for _ in range(3):
    try:
        directory.begin("0" * 40, 100)
    except OSError:
        continue
    raise AssertionError("there was room")
assert len(os.listdir("/proc/self/fd")) == before
assert os.listdir(sys.argv[1]) == ["usage"]
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], check=True)
