"""The digests of the files of routes, as the settings give them, and `downloadview digest`, which fills their store."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from downloadview_async import Digests, DigestStore, FileError, SharedDigests, SharedFacts, Source
from downloadview_async.service.settings import Settings
from downloadview_async.service.source_settings import PathSettings, digests_mode, directory_of, source_of_files
from downloadview_async.service.values import is_server, usable_store


def digests_of(settings: Settings, sources: Mapping[str, Source]) -> dict[str, Digests]:
    """Return the digests of each source of a route that has them. Raises `ConfigurationError`."""
    store: DigestStore | SharedDigests | None = None
    if settings.digests is not None:
        with settings.blaming("digests.store"):
            store = _store_of(settings, settings.digests.store)
    digests: dict[str, Digests] = {}
    for route in settings.routes:
        _, files = source_of_files(route.source, settings.sources)
        if (mode := digests_mode(files)) != "off":
            digests[route.source] = digests.get(route.source) or Digests(
                sources[route.source],
                store,
                name=route.source,
                sidecars=isinstance(files, PathSettings) and files.sidecars,
                background=mode == "background",
                etags=isinstance(files, PathSettings) and files.etag == "digest",
            )
    return digests


def _store_of(settings: Settings, store: str) -> DigestStore | SharedDigests:
    if is_server(store):
        return SharedDigests(SharedFacts(store, prefix=settings.shared.prefix))
    return DigestStore(usable_store(store))


class LocalFile(NamedTuple):
    """A file of a local directory: the digests of its source, its name there, and its size in bytes."""

    digests: Digests
    name: str
    size: int


def local_files(each: Mapping[str, Digests], settings: Settings, path: str | None) -> list[LocalFile]:
    """Return the files of all local directories with digests and a store, or those at and below a path.

    each: the digests of each source, from `digests_of`. Raises `ConfigurationError` if no such directory has the path.
    """
    files: list[LocalFile] = []
    is_known = False
    for name, digests in each.items():
        directory = directory_of(settings.sources[name])
        if directory is None or digests.store is None:
            continue
        top = os.path.realpath(directory)
        begin = top if path is None else os.path.realpath(path)
        if top == os.path.commonpath([top, begin]):
            is_known = True
            files += [
                LocalFile(digests, os.path.relpath(file, top), os.path.getsize(file))
                for file in _regular_files(begin)
                if os.path.exists(file)
            ]
    if not is_known:
        where = "" if path is None else f" has {path!r}"
        raise settings.error(
            "digests",
            f"no local directory with digests and a store{where}: set digests of its source and digests.store",
        )
    return files


def _regular_files(path: str) -> Iterator[str]:
    if os.path.isfile(path):
        yield path
    for directory, _, names in os.walk(path):
        yield from (file for name in sorted(names) if os.path.isfile(file := os.path.join(directory, name)))


async def fill_store(files: Sequence[LocalFile], progress: Callable[[int], object]) -> list[str]:
    """Compute the digests that the store does not have, and return the names of the files that have none.

    progress: gets numbers of bytes that are done. Raises `sqlite3.Error`.
    """
    without = []
    try:
        for file in files:
            done: list[int] = []
            try:
                described = await file.digests.compute(file.name, progress=_both(done.append, progress))
            except (FileError, OSError):  # a disk that fails in one file may have the others
                described = None
            if described is None:
                without.append(file.name)
            progress(max(file.size - sum(done), 0))
    finally:
        for store in {file.digests.store for file in files}:
            if store is not None:
                await store.aclose()
    return without


def _both(first: Callable[[int], object], second: Callable[[int], object]) -> Callable[[int], None]:
    def call(number: int) -> None:
        first(number)
        second(number)

    return call
