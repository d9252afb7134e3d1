"""Makes the routes that the settings name, each with its `Download`, its archives, its sharing and its CORS headers."""

from collections.abc import Iterator, Mapping
from functools import partial
from urllib.parse import quote, unquote

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from downloadview_async import (
    ArchiveLimits,
    ArchiveOptions,
    Cache,
    Completions,
    ConfigurationError,
    Digests,
    Download,
    EdgeRedirect,
    MemoryChecksums,
    ObjectStorage,
    PresignedRedirect,
    ProxyUsers,
    Redirect,
    SharedChecksums,
    SharedFacts,
    Source,
    SQLiteChecksums,
    StorageSource,
    SupportsListing,
    URLSigner,
    Users,
    WrongType,
    signer_kinds,
)
from downloadview_async.service.access import USER, access_of, users_of
from downloadview_async.service.functions import function_of
from downloadview_async.service.limits import ServiceLimits
from downloadview_async.service.pages import ServicePages
from downloadview_async.service.pages.index import folder_of
from downloadview_async.service.settings import RouteSettings, Settings
from downloadview_async.service.sharing import Sharing, users_in
from downloadview_async.service.source_settings import (
    EdgeSettings,
    RemoteSettings,
    StorageSettings,
    directory_of,
    edge_of,
    options_of_edge,
    source_of_files,
)
from downloadview_async.service.sources import place_of
from downloadview_async.service.values import is_server, seconds_of, usable_store

_CORS_REQUEST_HEADERS = ["If-Modified-Since", "If-None-Match", "If-Range", "Range", "Want-Repr-Digest"]
_CORS_EXPOSED = [
    "Accept-Ranges",
    "Content-Range",
    "Content-Length",
    "Content-Disposition",
    "ETag",
    "Last-Modified",
    "Repr-Digest",
]


def routes_of(
    settings: Settings,
    sources: Mapping[str, Source],
    signer: URLSigner | None,
    caches: Mapping[str, Cache],
    digests: Mapping[str, Digests],
    limits: ServiceLimits,
    completions: Completions | None,
) -> Iterator[Route]:
    """Yield the routes in their order, each after the redirect to its top folder if it has one.

    Raises `ConfigurationError` for a route that cannot be made.
    """
    redirects = {name: _redirect(settings, name, source) for name, source in sources.items()}
    users = users_of(settings)
    for index, route in enumerate(settings.routes):
        where, _ = source_of_files(route.source, settings.sources)
        sharers = users_in(route.access or ()) if "signed" in (route.access or ()) else []
        counts = completions.store if route.downloads and completions is not None else None
        shown = None if counts is None else partial(counts.downloads_of, route.source)
        pages = ServicePages(settings, route.name, shares=bool(sharers), downloads=shown) if route.list else None
        for option, needs_folders in (("list", route.list), ("archive", route.archive)):
            if needs_folders and not isinstance(sources[route.source], SupportsListing):
                problem = f"the source {route.source!r} cannot list its folders: remove this, or name another source"
                raise settings.error(f"routes[{index}].{option}", problem)
        access = access_of(settings, index, route, signer, users)
        try:
            endpoint: ASGIApp = Download(
                sources[route.source],
                attachment=route.disposition == "attachment",
                cache_control=route.cache_control,
                redirect=redirects[where] if route.send == "redirect" else None,
                offload=route.send != "stream",
                access=access,
                headers=route.headers,
                limits=limits.of(index, route.source),
                hide=route.hide,
                listing=pages or False,
                digests=digests.get(route.source),
                archive=_archive(settings, route.source, sources[route.source], caches) if route.archive else False,
                source_name=route.source,
            )
        except WrongType as exc:  # the settings have been checked, but not whether a hook is async
            raise settings.error(f"routes[{index}].access", str(exc)) from exc
        if pages is not None and sharers:
            endpoint = _sharing(settings, endpoint, pages, sharers, signer, users)
        if (folder := folder_of(route)) is not None and len(folder) > 1 and route.access is None:
            yield Route(unquote(folder[:-1]), _redirect_to_folder)
        try:
            yield Route(route.path, endpoint, middleware=_cors(route, isinstance(users, Users)))
        except (AssertionError, ValueError) as exc:
            raise settings.error(f"routes[{index}].path", f"{exc}: write the parameter as {{path:path}}") from exc


def _checksums(settings: Settings, store: str | None) -> MemoryChecksums | SQLiteChecksums | SharedChecksums:
    if store is None:
        return MemoryChecksums()
    if is_server(store):
        return SharedChecksums(SharedFacts(store, prefix=settings.shared.prefix))
    return SQLiteChecksums(usable_store(store))


def _archive(settings: Settings, name: str, source: Source, caches: Mapping[str, Cache]) -> ArchiveOptions:
    """Return the options for the archives of a source. They are kept in the cache of the source, if it has one."""
    archives = settings.archives
    assert not isinstance(archives.max_bytes, str)  # the settings have been checked
    with settings.blaming("archives.checksums"):
        checksums = _checksums(settings, archives.checksums)
    return ArchiveOptions(
        limits=ArchiveLimits(files=archives.max_files, size=archives.max_bytes, depth=archives.max_depth),
        checksums=checksums,
        cache=caches.get(name),
        name=f"{name} {place_of(settings, name, source)}",
        per_client=archives.per_client or None,
    )


def _sharing(
    settings: Settings,
    download: ASGIApp,
    pages: ServicePages,
    sharers: list[str],
    signer: URLSigner | None,
    users: Users | ProxyUsers | None,
) -> ASGIApp:
    """Return the endpoint of a route, wrapped so that its users can make links."""
    assert signer is not None
    assert users is not None
    assert settings.links is not None  # the settings have been checked
    max_age = seconds_of(settings.links.max_age)
    assert max_age is not None
    return Sharing(
        download,
        access=users.allow(*sharers),
        signer=signer,
        pages=pages,
        max_age=max_age,
        counts=settings.links.store is not None,
    )


async def _redirect_to_folder(request: Request) -> Response:
    """Redirect from the URL of the top folder without its slash: /files to /files/."""
    query = f"?{request.url.query}" if request.url.query else ""
    location = f"./{quote(request.url.path.rpartition('/')[2], safe='%')}/{query}"
    return Response(status_code=308, headers={"Location": location, "Cache-Control": "no-cache"})


def _cors(route: RouteSettings, has_passwords: bool) -> list[Middleware]:
    """Return the middleware that lets scripts of other web sites read the answers of a route.

    has_passwords: whether the users of the settings have passwords. A script may then send one to a route with users:
    a browser sends `Authorization` of a script only if the answer to the preflight names it.

    It is around `Download`: a preflight has neither cookies nor links, so it is answered before access is decided, and
    the answer to a refused request has the headers too.
    """
    if (cors := route.cors) is None:
        return []
    max_age = seconds_of(cors.max_age)
    assert max_age is not None  # the settings have been checked
    takes_users = any(one.startswith(USER) for one in route.access or ())
    may_log_in = has_passwords and takes_users and cors.credentials
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=["GET", "HEAD"],
            allow_headers=[*_CORS_REQUEST_HEADERS, *(["Authorization"] if may_log_in else [])],
            allow_credentials=cors.credentials,
            expose_headers=_CORS_EXPOSED,
            max_age=int(max_age),
        )
    ]


def _redirect(settings: Settings, name: str, source: Source) -> Redirect | None:
    """Return what redirects clients from the files of a source, or None. Raises `ConfigurationError`."""
    wanted = settings.sources[name]
    if (edge := edge_of(wanted)) is not None:
        return _edge(settings, name, source, edge)
    if not isinstance(wanted, StorageSettings) or wanted.presign is None:
        return None
    assert isinstance(source, StorageSource)
    assert isinstance(source.storage, ObjectStorage)
    expires = seconds_of(wanted.presign.expires)
    assert expires is not None  # the settings have been checked
    with settings.blaming(f"sources.{name}.presign"):
        return PresignedRedirect(
            source.storage,
            expires=expires,
            public_endpoint=wanted.presign.public_endpoint,
            logs_request_id=settings.accounts.database is not None,
        )


def _edge(settings: Settings, name: str, source: Source, edge: EdgeSettings) -> EdgeRedirect:
    key, kind = f"sources.{name}.edge", signer_kinds()[edge.kind]
    options = options_of_edge(edge)
    for option in options:
        if kind.options[option].is_function:
            options[option] = function_of(settings, f"{key}.{option}", options[option])
    assert isinstance(edge.expires, float)  # the settings have been checked
    wanted = settings.sources[name]
    place: str | ObjectStorage | None = wanted.url if isinstance(wanted, RemoteSettings) else directory_of(wanted)
    if isinstance(source, StorageSource) and isinstance(source.storage, ObjectStorage):
        place = source.storage
    assert place is not None
    try:
        return EdgeRedirect(place, kind.make(edge.url, **options), expires=edge.expires, checks=edge.checks)
    except ConfigurationError as exc:
        option, _, problem = str(exc).partition(": ")
        if option in ("url", *kind.options):
            raise settings.error(f"{key}.{option}", problem) from None
        raise settings.error(key, str(exc)) from None
