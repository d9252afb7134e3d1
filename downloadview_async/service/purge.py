"""`/-/purge` and `downloadview purge`: removing files from the caches of sources."""

import hashlib
import hmac
import http.client
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlencode, urlsplit

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from downloadview_async import CachedSource, ConfigurationError, FileError, FileMissing, Source
from downloadview_async.service.access import keys_in
from downloadview_async.service.health import PRIVATE
from downloadview_async.service.logs import one_line
from downloadview_async.service.settings import Settings, Unavailable
from downloadview_async.service.source_settings import cache_of
from downloadview_async.service.sources import sources_of

PAGE = "purge"
"""The name of the page below `/-/`. Printed proxy configurations hide it from clients, unless `purge.public`."""

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_PATIENCE = 30.0
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)

logger = logging.getLogger("downloadview_async")


def purge_page(settings: Settings, sources: Mapping[str, Source]) -> "PurgePage | None":
    """Return the page, or None without a `[purge]` table. Raises `ConfigurationError` for wrong keys."""
    if settings.purge is None:
        return None
    return PurgePage(keys_in(settings, "purge.keys", settings.purge.keys).values(), sources)


class PurgePage:
    """Answers `POST /-/purge?source=NAME&name=FILE&prefix=BEGINNING`; `name` and `prefix` may be repeated.

    secrets: a request has to carry one of them, as a Bearer token [RFC 6750 2.1].
    """

    def __init__(self, secrets: Iterable[str], sources: Mapping[str, Source]) -> None:
        self._secrets = [_hash(secret) for secret in secrets]
        self._sources = sources

    async def answer(self, request: Request) -> Response:
        """Answer 200 with the number of files, as JSON.

        Without a valid secret, answer 401; for wrong parameters 400, and for a source without a cache 404.
        """
        token = _BEARER.fullmatch(request.headers.get("authorization", ""))
        if not self._is_valid("" if token is None else token[1]):
            challenge = 'Bearer realm="purge"' + ("" if token is None else ', error="invalid_token"')
            return PlainTextResponse("Unauthorized\n", 401, _HEADERS | {"WWW-Authenticate": challenge})
        given = request.query_params
        names, prefixes, chosen = given.getlist("name"), given.getlist("prefix"), given.getlist("source")
        if len(chosen) != 1 or not (names or prefixes) or given.keys() - {"source", "name", "prefix"}:
            return _problem("give one source, and name or prefix; an empty prefix stands for all files", 400)
        if not isinstance(source := self._sources.get(chosen[0]), CachedSource):
            return _problem("there is no source of this name with a cache", 404)
        try:
            count = await purged(source, names, prefixes)
        except FileMissing:
            return _problem("no file can have this name", 400)
        logger.info("purged %d files of %s", count, one_line(chosen[0]))
        return JSONResponse({"purged": count}, headers=_HEADERS)

    def _is_valid(self, token: str) -> bool:
        given = _hash(token)
        return any(hmac.compare_digest(given, secret) for secret in self._secrets)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _problem(text: str, status: int) -> Response:
    return PlainTextResponse(f"{text}\n", status, _HEADERS)


async def purged(source: CachedSource, names: Iterable[str], prefixes: Iterable[str]) -> int:
    """Remove files by their names, and those whose names begin with a prefix; return how many there were.

    Raises `FileMissing` for a name that no file can have, `SourceUnavailable` if the disk fails.
    """
    count = 0
    for name in names:
        count += await source.purge(name)
    for prefix in prefixes:
        count += await source.purge(prefix, is_prefix=True)
    return count


def purge_here(settings: Settings, source: str, names: Sequence[str], prefixes: Sequence[str]) -> int:
    """Remove files from the cache of a source in the settings, on this machine; return how many there were.

    Raises `ConfigurationError` for a source without a cache, a name that no file can have, and a disk that fails.
    """
    check_source_name(settings, source)
    cached = sources_of(settings)[source]
    assert isinstance(cached, CachedSource)
    try:
        return anyio.run(purged, cached, names, prefixes)
    except FileMissing as exc:
        raise ConfigurationError(f"no file can have one of these names: {exc}") from exc
    except FileError as exc:
        raise Unavailable(str(exc)) from exc


def check_source_name(settings: Settings, name: str) -> None:
    """Raise `ConfigurationError` if no source of this name has a cache."""
    cached = [other for other, source in settings.sources.items() if cache_of(source) is not None]
    if name not in cached:
        known = f"give one of {', '.join(cached)}" if cached else "no source has a [sources.NAME.cache] table"
        raise ConfigurationError(f"there is no source {name!r} with a cache: {known}")


def purge_at(settings: Settings, url: str, source: str, names: Sequence[str], prefixes: Sequence[str]) -> int:
    """Have a running service remove files, by its `/-/purge`; return how many there were.

    url: the scheme and address of the service, such as `http://10.0.0.5:8000`. The secret is the first in the settings.

    Raises `ConfigurationError` for a wrong URL or wrong settings, and `Unavailable` if the service does not answer 200.
    """
    check_source_name(settings, source)
    if settings.purge is None:
        raise settings.error("purge", "missing: the service needs a [purge] table with keys, to know who may purge")
    secret = next(iter(keys_in(settings, "purge.keys", settings.purge.keys).values()))
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if not host or parts.scheme not in kinds or parts.query or parts.fragment or parts.username is not None:
        raise ConfigurationError(f"{url!r} is not the URL of a service: write one such as http://10.0.0.5:8000")
    query = urlencode([("source", source), *(("name", one) for one in names), *(("prefix", one) for one in prefixes)])
    connection = kinds[parts.scheme](host, port, timeout=_PATIENCE)
    try:
        path = f"{parts.path.rstrip('/')}{PRIVATE}{PAGE}?{query}"
        connection.request("POST", path, headers={"Authorization": f"Bearer {secret}", "Content-Length": "0"})
        response = connection.getresponse()
        content = response.read(65_536).decode(errors="replace")
        if response.status != 200:
            raise Unavailable(f"{url} answered {response.status}: {content.strip() or response.reason}")
        return int(json.loads(content)["purged"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
        if isinstance(exc, ConfigurationError):
            raise
        raise Unavailable(f"{url} cannot be asked to purge: {type(exc).__name__}: {exc}") from exc
    finally:
        connection.close()
