"""The files of the service itself that a route would send: keys, databases and logs below a directory it serves."""

import os
from collections.abc import Iterator, Mapping

from downloadview_async import Hidden
from downloadview_async.service.origin import NO_FILE
from downloadview_async.service.settings import Settings
from downloadview_async.service.source_settings import directory_of, is_within, source_of_files
from downloadview_async.service.values import KEY_LINE, is_server


def served_files(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each file of the service itself that clients could download, and that no route hides."""
    for key, path in _own_files(settings).items():
        for route in settings.routes:
            name, source = source_of_files(route.source, settings.sources)
            directory = directory_of(source)
            if route.source != name or directory is None:
                continue
            inner, outer = os.path.realpath(path), os.path.realpath(directory)
            if is_within(inner, outer) and not Hidden(route.hide).hides(os.path.relpath(inner, outer)):
                pattern = f"{os.path.basename(inner)}*"
                yield (
                    f"{key}: {path!r} is in a directory that the route {route.path!r} serves, so clients can download "
                    f'it: move it, or hide it from the route with hide = ["{pattern}"]'
                )


def _own_files(settings: Settings) -> Mapping[str, str]:
    """Return the paths of the files that only the service should read, by the keys that name them."""
    server, links, users = settings.server, settings.links, settings.users
    file = settings.origin.file
    files = {
        "the settings": None if file == NO_FILE else os.path.abspath(file),
        "server.pid_file": server.pid_file,
        "server.ssl_keyfile": server.ssl_keyfile,
        "digests.store": None if settings.digests is None else settings.digests.store,
        "archives.checksums": settings.archives.checksums,
        "log.path": None if settings.log is None else settings.log.path,
        "accounts.proxy_log": settings.accounts.proxy_log,
        "users.file": None if users is None else users.file,
    }
    if links is not None and not KEY_LINE.search(links.keys):
        files["links.keys"] = links.keys
    if links is not None and (links.store or "").startswith("sqlite:"):
        files["links.store"] = str(links.store).removeprefix("sqlite:")
    for key, url in _databases(settings):
        scheme, _, path = url.partition(":///")
        if scheme.startswith("sqlite") and path and not path.startswith(":"):
            files[key] = os.path.join(settings.origin.directory, path.partition("?")[0])
    return {key: path for key, path in files.items() if path and not is_server(path)}


def _databases(settings: Settings) -> Iterator[tuple[str, str]]:
    if settings.accounts.database is not None:
        yield "accounts.database", settings.accounts.database
    for name, source in settings.sources.items():
        if (url := getattr(source, "database", None)) is not None:
            yield f"sources.{name}.database", url
