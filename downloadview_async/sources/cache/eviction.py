"""Eviction: which files of a cache are removed to make room, and what dead processes have left.

No file is removed while a process reads it, or while a proxy that was told to send it may still be about to open it.
"""

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from downloadview_async.sources.cache.entry import BLOCK
from downloadview_async.sources.cache.files import DATA, META, PART, CacheFiles, cost

LEASE_SECONDS = 30.0
"""Seconds that a proxy has to open a file after it was told to send it."""


@dataclass(slots=True)
class _Kept:
    """The files of one K in a directory."""

    used: float = 0.0
    leased: float = 0.0
    has_meta: bool = False
    data: list[tuple[str, int, float]] = field(default_factory=list)
    """Name, size and time of the last change (ctime) of each K-V."""


def sweep(files: CacheFiles, *, used: Mapping[str, float], max_unused: float, evict_to: int | None, now: float) -> int:
    """Remove unused files, replaced versions and leftovers. Return the bytes that all others take.

    used: when each K was last used, if that is known to be later than on the disk. max_unused: seconds after which an
    unused file is removed. evict_to: removes the least recently used files until all take so many bytes.
    """
    total, keys = _remove_leftovers(files, now)
    if evict_to is not None or max_unused:
        for key, kept in keys.items():
            kept.used = max(kept.used, used.get(key, 0.0))
        for key, kept in sorted(keys.items(), key=lambda item: item[1].used):
            is_old = not 0 <= now - kept.used < max_unused and kept.used <= now
            if not is_old and (evict_to is None or total <= evict_to):
                break
            if 0 <= now - kept.leased < LEASE_SECONDS:
                continue
            total -= _evict(files, key, kept)
    return total


def _remove_leftovers(files: CacheFiles, now: float) -> tuple[int, dict[str, _Kept]]:
    """Remove leftovers. Return the bytes that all other files take, and the files of each K."""
    total = 0
    keys: dict[str, _Kept] = {}
    with files.listed() as entries:
        for item in entries:
            if PART.fullmatch(item.name):
                if not files.remove_unused(item.name):
                    total += cost(item.stat(follow_symlinks=False).st_size) + BLOCK
            elif match := META.fullmatch(item.name):
                status = item.stat(follow_symlinks=False)
                kept = keys.setdefault(match[1], _Kept())
                kept.has_meta, kept.used, kept.leased = True, status.st_mtime, status.st_atime
                total += BLOCK
            elif match := DATA.fullmatch(item.name):
                status = item.stat(follow_symlinks=False)
                keys.setdefault(match[1], _Kept()).data.append((item.name, status.st_size, status.st_ctime))
                total += cost(status.st_size)
    for key, kept in list(keys.items()):
        current = files.current(key) if kept.has_meta and len(kept.data) > 1 else None
        for name, size, changed in list(kept.data):
            is_orphan = not kept.has_meta or (current is not None and name != current)
            # a proxy may have been told to send a version that has been replaced since
            if is_orphan and not 0 <= now - changed < LEASE_SECONDS and files.remove_unused(name):
                kept.data.remove((name, size, changed))
                total -= cost(size)
        if kept.has_meta and not kept.data:
            files.unlink(f"{key}.meta")
            total -= BLOCK
        if not kept.has_meta or not kept.data:
            del keys[key]
    return total, keys


def _evict(files: CacheFiles, key: str, kept: _Kept) -> int:
    """Remove all files of a K, unless one is in use, and return the bytes that this frees."""
    meta, hidden = f"{key}.meta", f"{key}.{secrets.token_hex(8)}.part"
    with ExitStack() as locks:
        for name, _, _ in kept.data:
            if (descriptor := files.lock_unused(name)) is None:
                return 0
            locks.callback(os.close, descriptor)
        # Without its name K.meta cannot be leased any more. A lease since the sweep began shows in its time.
        try:
            files.rename(meta, hidden)
        except FileNotFoundError:
            return 0
        if 0 <= time.time() - files.stat(hidden).st_atime < LEASE_SECONDS:
            files.rename(hidden, meta)
            return 0
        files.unlink(hidden)
        for name, _, _ in kept.data:
            files.unlink(name)
    files.evictions += 1
    return BLOCK + sum(cost(size) for _, size, _ in kept.data)


def retire(files: CacheFiles, name: str, leased: float) -> int:
    """Remove a replaced version, now or in a later sweep; return the bytes that this frees now."""
    size = files.size(name)
    if size is None:
        return 0
    if not 0 <= time.time() - leased < LEASE_SECONDS and files.remove_unused(name):
        return cost(size)
    with suppress(OSError):  # sets ctime, after which the file is kept for `LEASE_SECONDS`
        status = files.stat(name)
        files.set_times(name, ns=(status.st_atime_ns, status.st_mtime_ns))
    return 0
