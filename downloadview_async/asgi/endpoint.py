"""`Download` and `Listing`: a source as an ASGI application, for a Starlette `Route` or `Mount`."""

import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import unquote

from starlette.convertors import PathConvertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts, note_facts
from downloadview_async.asgi.archives import ArchiveOptions, Archives
from downloadview_async.asgi.archives import key_of as archive_key_of
from downloadview_async.asgi.checksum import checksum_response, send_checksums, wanted_checksum
from downloadview_async.asgi.departures import answer_until_departure, is_followed
from downloadview_async.asgi.disconnect import close_after_body, until_the_client_leaves
from downloadview_async.asgi.errors import refuse_websocket, send_error
from downloadview_async.asgi.extensions import CONNECTION
from downloadview_async.asgi.kept_answers import KEPT_ANSWERS, KeptAnswers
from downloadview_async.asgi.limiting import Limiting, admit, limits_of, together_for
from downloadview_async.asgi.listing.entries import FolderEntries
from downloadview_async.asgi.listing.folder import FolderEndpoint, folder_place
from downloadview_async.asgi.listing.page import Pages
from downloadview_async.asgi.listing.view import PDF_POLICY, view_of
from downloadview_async.asgi.request_key import key_of, tail_of
from downloadview_async.asgi.response import DownloadResponse, check_ways, checked_headers
from downloadview_async.errors import ConfigurationError, FileError, FileMissing, WrongType, wrong_type
from downloadview_async.http.content_types import content_type_for
from downloadview_async.offload.base import Redirect, is_quick
from downloadview_async.policy.access import Access, SignedLinks, access_of, allow
from downloadview_async.policy.grants import GRANT, Grant
from downloadview_async.policy.hiding import Hidden
from downloadview_async.policy.limits.at_once import are_immediate
from downloadview_async.policy.limits.limits import TRANSFERS, Transfers
from downloadview_async.policy.together import Together
from downloadview_async.policy.uses import TOGETHER
from downloadview_async.sources.archive import AllowedEntries
from downloadview_async.sources.base import AsyncFile, HasCanonicalNames, Source, SupportsListing, check_source
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.local.path import PathSource
from downloadview_async.sources.names import without_empty_segments

_UNLIMITED: AbstractContextManager[None] = nullcontext()
_SPELLINGS = re.compile(r"(?:^|/)\.?/")  # what has segments that are dropped from a name
_ALLOW = {"Allow": "GET, HEAD, OPTIONS", "X-Content-Type-Options": "nosniff"}


class _Endpoint:
    """The common part of `Download` and `Listing`: the methods, and the decision about a request, made once."""

    _always_lists = False

    def __init__(
        self,
        source: Source,
        *,
        pages: Pages | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | Callable[[Request], Any] | None = None,
        access: Access | Sequence[Access] | None = None,
        limits: Limiting | Sequence[Limiting] | None = None,
        hide: Sequence[str] = (),
        source_name: str | None = None,
    ) -> None:
        check_source(source, type(self).__name__)
        self.source = source
        self._canonical = source.canonical if isinstance(source, HasCanonicalNames) else None
        if not (source_name is None or isinstance(source_name, str)):
            raise wrong_type("source_name takes a str", source_name)
        if not (key is None or isinstance(key, str) or callable(key)):
            raise wrong_type("key takes the name of a path parameter, or a function of the request", key)
        if headers is not None and not hasattr(headers, "items"):
            raise wrong_type("headers takes a dictionary, such as {'X-Robots-Tag': 'noindex'}", headers)
        self.source_name = type(source).__name__ if source_name is None else source_name
        self.headers = dict(headers or {})
        checked_headers(tuple(self.headers.items()))
        self.access = access_of(access)
        self.limits = limits_of(limits)
        self._hidden = Hidden(hide) if hide else None
        self._key = key
        if pages is None and self._always_lists:
            pages = Pages()
        self._folders = None if pages is None else self._folders_of(source, pages)
        self._checked_route: Any = None
        self._has_links_alone = len(self.access) == 1 and type(self.access[0]) is SignedLinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. A WebSocket, which a `Mount` passes on too, is refused."""
        if scope["type"] != "http":
            await refuse_websocket(scope, send)
            return
        if not (((extensions := scope.get("extensions")) and CONNECTION in extensions) or is_followed(send)):
            await answer_until_departure(partial(_Endpoint.__call__, self), scope, receive, send)
            return
        if self._folders is not None and (route := scope.get("route")) is not self._checked_route:
            self._check_route(route)
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers=_ALLOW | close_after_body(scope))(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            response = Response("Method Not Allowed", 405, _ALLOW | close_after_body(scope), "text/plain")
            await response(scope, receive, send)
            return
        around: Transfers | None = scope.get(TRANSFERS)  # of a `LimitsMiddleware`
        if around is not None:
            around.is_ours = True
        with (nullcontext(around) if around is not None else Transfers()) if self.limits else _UNLIMITED as transfers:
            if transfers is not None and around is None:
                transfers.may_last = True
            together: Together | None = None
            try:
                key = key_of(self._key, scope, type(self).__name__)
                facts: Facts | None = scope.get(ACCOUNT)
                if facts is not None:
                    facts.find(self.source_name, self._plain(key), scope)
                if self._hidden is not None:
                    self._hidden.check(key)
                together = None if transfers is None else self._together(key, scope)
                if together is not None:
                    scope[TOGETHER] = together
                if self.access:
                    is_folder = self._is_for_folder(key, scope)
                    grant, below = await self._allow(Request(scope, receive), key, is_folder=is_folder)
                    scope[GRANT] = grant
                else:
                    grant, below = None, ()
                if facts is not None and grant is not None:
                    facts.allow(grant.user, grant.link_id)
                if transfers is not None and together is not None:
                    scope[TRANSFERS] = transfers
                    await transfers.begin_later(together.limits, scope, receive)
                elif (
                    transfers is not None
                    and (admission := admit(self.limits, transfers, key, scope, receive, send)) is not None
                    and not await admission
                ):
                    return
                answer = await self._answer_to(key, grant, below, scope)
            except FileError as exc:
                await send_error(exc if together is None else await together.error_for(exc, scope), scope, send)
                return
            if together is None:
                await answer(scope, receive, send)
                return
            try:
                await answer(scope, receive, together.asking_before(scope, send))
            except FileError as exc:
                if exc is not together.refusal:
                    raise
                await send_error(exc, scope, send)

    def _together(self, key: Any, scope: Scope) -> Together | None:
        """Return what asks the link and the limits of a request later and together, where that can be: see `Together`.

        Opening a local file asks nobody else, so it may come first. The decision of a link alone needs nothing more
        from its store than what is asked then.
        """
        return None

    def _plain(self, key: Any) -> Any:
        """Return the one name that all spellings of a key stand for, so that they are counted as one file."""
        if self._canonical is None or not isinstance(key, str) or _SPELLINGS.search(key) is None:
            return key
        return _name_of(self._canonical, key, is_folder=False)

    async def _allow(
        self, request: Request, key: Any, *, is_folder: bool = False, access: tuple[Access, ...] | None = None
    ) -> tuple[Grant, tuple[Access, ...]]:
        """Return the grant for a file or a folder, and the access that decides about each name below: see `allow`.

        access: the one to ask; None: all. Raises `FileError`.

        Access decides about the one name that all spellings of a key stand for. A source may look up a name without the
        slash at its beginning and without its empty segments, so both have to be allowed. is_folder: also if the key
        does not end in a slash.
        """
        name = _name_of(self._canonical, key, is_folder=is_folder) if isinstance(key, str) else key
        access = self.access if access is None else access
        grant, below = await allow(access, request, name)
        if isinstance(name, str) and _SPELLINGS.search(name) is not None:
            plain = without_empty_segments(name).lstrip("/")
            if plain != name:
                _, below_plain = await allow(access, request, plain)
                below = below or below_plain
        return grant, below

    def _is_for_folder(self, key: Any, scope: Scope) -> bool:
        """Return whether access decides about a folder, even if the key lacks its last slash. Raises `FileMissing`."""
        raise NotImplementedError

    async def _answer_to(self, key: Any, grant: Grant | None, below: tuple[Access, ...], scope: Scope) -> ASGIApp:
        """Return what answers a request that is allowed. below: the access that decides about each name below a folder.

        Raises `FileError`.
        """
        raise NotImplementedError

    def _folders_of(self, source: Source, pages: Pages) -> FolderEndpoint:
        if not isinstance(source, SupportsListing):
            raise ConfigurationError(f"{source!r} cannot list its folders: use another source, or no listing")
        headers = {name.lower(): value for name, value in self.headers.items()}
        return FolderEndpoint(
            entries=FolderEntries(source, self._hidden),
            pages=pages,
            headers=headers,
            has_access=bool(self.access),
        )

    def _folder_of(self, key: Any, grant: Grant | None, below: tuple[Access, ...], scope: Scope) -> ASGIApp | None:
        """Return what answers with the listing of a folder, or None if the key is not that of a folder."""
        if self._folders is None or not isinstance(key, str) or (key and not key.endswith("/")):
            return None
        sent = scope["path"] if scope.get("raw_path") is None else unquote(scope["raw_path"].partition(b"?")[0])
        if not sent.endswith("/"):
            return partial(self._redirect_to_folder, scope)
        note_facts(scope, kind="listing")
        folders = self._folders
        if below:
            may_enter = partial(self._may_have, below, scope)
            folders = replace(folders, entries=replace(folders.entries, may_enter=may_enter))
        return partial(folders.answer, key, tail_of(key, scope, is_from_path=not callable(self._key)), grant)

    async def _may_have(self, access: tuple[Access, ...], scope: Scope, name: str) -> bool:
        """Return whether the request may have a file or a folder, too. Raises the errors of a failure to decide."""
        try:
            await self._allow(Request(scope), name, access=access)
        except FileError as exc:
            if exc.status >= 500:
                raise
            return False
        return True

    async def _missing(self, key: Any, exc: FileMissing, scope: Scope, send: Send) -> None:
        """Redirect to the folder whose URL lacks only the slash at its end, or send the error.

        Access decides about the folder before the source is asked for it, so a refusal does not tell whether it exists.
        """
        try:
            if self._folders is None or not isinstance(key, str):
                raise exc
            if self.access and not self._is_for_folder(key, scope):
                await self._allow(Request(scope), key, is_folder=True)
            if not await self._folders.entries.has(key):
                raise exc
        except FileError as error:
            await send_error(error, scope, send)
            return
        await self._folders.redirect(folder_place(scope), scope, send)

    def _check_route(self, route: Any) -> None:
        """Raise `ConfigurationError` for a route in which folders have no URL: see `Download`."""
        if isinstance(route, Route) and route.endpoint is self:
            kinds = route.param_convertors.values()
            if kinds and not any(isinstance(kind, PathConvertor) for kind in kinds):
                raise ConfigurationError(
                    f"the parameter of {route.path!r} matches no slashes, so folders have no URL: write it as "
                    "{path:path}"
                )
        self._checked_route = route

    async def _redirect_to_folder(self, scope: Scope, _: Scope, receive: Receive, send: Send) -> None:
        assert self._folders is not None
        await self._folders.redirect(folder_place(scope), scope, send)


class Download(_Endpoint):
    """Answers GET and HEAD with the file that `source` resolves, OPTIONS with 204, and every other method with 405.

    key: what `source.resolve` gets. None: the route's only path parameter, or below a `Mount` the rest of the path.
    A string: the name of a path parameter, for a route with several. A function: it gets the request, and returns the
    value. A request whose key cannot be determined fails with `ConfigurationError`.
    attachment, headers, redirect: as in `DownloadResponse`. offload: likewise, but by default the answer to a file of a
    directory does not wait for the application, because the file stays where it is.
    cache_control: the Cache-Control header.
    access: who may have a file: an async function that gets the request and the key, `SignedLinks`, or a list of them,
    of which one suffices. It is asked before any file is opened. None: everyone. See `Access` and `Grant`.
    limits: how much each client may have, and how much the source: `Limits`, `SourceLimit`, or a list of them, all of
    which hold. They are asked after `access`.
    hide: patterns as in `fnmatch` for names of files and directories that do not exist for clients, such as `.*` or
    `*.key`. One that matches a segment of the name hides it; upper and lower case are the same.
    listing: True, or `Pages` with a title and more, to answer a URL that ends in a slash as `Listing` does, and to
    redirect to it from the name of a folder. A file then has a view page, at its URL with `?view`. The parameter of
    the route has to match slashes, as `{path:path}` does; each request to another route raises `ConfigurationError`.
    archive: True, or `ArchiveOptions`, to answer `?archive=zip` with a ZIP archive of the folder, or of those of its
    entries that `name=` chooses. Access decides about the folder, and then about each file and folder below it, one
    after another, unless it has `covers_below`. Refused and hidden entries are left out.
    digests: the digests of the source's files, for Repr-Digest, and for `?checksum=sha256`, whose answer is the line of
    `sha256sum` about the file, or with `listing` about each file of a folder whose digest is known.
    source_name: the name of the source in the `Outcome` of each answer. Default: the name of its class.

    Raises `ConfigurationError` for an invalid pattern, and for a listing or an archive of a source that cannot list;
    `WrongType`, which is also a `TypeError`, for an argument of another type, such as a path in place of the source;
    `ValueError` for a header that is refused.
    """

    def __init__(
        self,
        source: Source,
        *,
        attachment: bool = True,
        cache_control: str | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | Callable[[Request], Any] | None = None,
        redirect: Redirect | None = None,
        offload: bool | None = None,
        access: Access | Sequence[Access] | None = None,
        limits: Limiting | Sequence[Limiting] | None = None,
        hide: Sequence[str] = (),
        listing: bool | Pages = False,
        archive: bool | ArchiveOptions = False,
        digests: Digests | None = None,
        source_name: str | None = None,
    ) -> None:
        all_headers: Any = headers
        if cache_control is not None:
            if not isinstance(cache_control, str):
                raise wrong_type("cache_control takes text, such as 'private, max-age=3600'", cache_control)
            all_headers = {**(headers or {}), "Cache-Control": cache_control}
        if not isinstance(attachment, bool):
            raise wrong_type("attachment takes True (save the file) or False (show it)", attachment)
        if not isinstance(archive, (bool, ArchiveOptions)):
            raise WrongType(f"archive is {archive!r}: give True, False or ArchiveOptions(...)")
        if digests is not None and not isinstance(digests, Digests):
            raise WrongType(f"digests is {digests!r}: give Digests(source)")
        check_ways(redirect, offload)
        pages = _pages_of(listing) if listing else None
        super().__init__(
            source,
            pages=pages,
            headers=all_headers,
            key=key,
            access=access,
            limits=limits,
            hide=hide,
            source_name=source_name,
        )
        self.digests = digests
        if self._folders is not None:
            self._folders = replace(self._folders, has_archives=bool(archive), digests=digests)
        self.attachment = attachment
        self.redirect = redirect
        self.offload = offload
        only = self.access[0] if self._has_links_alone else None
        self._links = only if isinstance(only, SignedLinks) and only.is_immediate else None
        # Without rules, the path and the file decide each answer to a GET that has no query, or, if links give access,
        # only a link as its query: see `KeptAnswers`.
        has_rules = (
            (self.access and self._links is None)
            or not are_immediate(self.limits)
            or not (redirect is None or is_quick(redirect))
            or digests is not None
            or callable(key)
        )
        self._is_simple = type(source) is PathSource and not has_rules
        options = ArchiveOptions() if archive is True else archive
        self._archives = Archives(source, options, hide) if options else None

    def _kept_answers_for(self, scope: Scope) -> KeptAnswers | None:
        """Return where the answer to a request may be kept: see `KeptAnswers`."""
        kept: KeptAnswers | None = (scope.get("extensions") or {}).get(KEPT_ANSWERS)
        if kept is None or scope["method"] != "GET" or TOGETHER in scope:
            return None
        if self._links is None:
            if scope["query_string"] or GRANT in scope:
                return None
        elif not self._links.is_plain(scope[GRANT], scope["query_string"]):
            return None
        if TRANSFERS in scope and not self.limits:  # those of a middleware
            return None
        route = scope.get("route")
        return kept if isinstance(route, Route) and route.app is self else None  # no middleware is in between

    def _is_for_folder(self, key: Any, scope: Scope) -> bool:
        return self._archives is not None and archive_key_of(key, scope) is not None

    def _together(self, key: Any, scope: Scope) -> Together | None:
        is_local = type(self.source) is PathSource and self.redirect is None
        if not is_local or CONNECTION not in (scope.get("extensions") or {}) or self._is_for_folder(key, scope):
            return None
        return together_for(self.limits, key, scope) if not self.access or self._has_links_alone else None

    async def _answer_to(self, key: Any, grant: Grant | None, below: tuple[Access, ...], scope: Scope) -> ASGIApp:
        if self._archives is not None and (name := archive_key_of(key, scope)) is not None:
            note_facts(scope, kind="archive")
            answer: ASGIApp = (
                partial(self._send_allowed, self._archives, name, key, grant, below)
                if below
                else self._response(await self._archives.resolve(name), key, grant, scope, is_archive=True)
            )
            return self._archives.counted(name, answer)
        wanted = None if self.digests is None or not isinstance(key, str) else wanted_checksum(scope["query_string"])
        folder = self._folder_of(key, grant, below, scope)
        if wanted is not None:
            note_facts(scope, kind="checksum")
        if folder is not None:
            return folder if wanted is None else partial(self._send_checksums, wanted, key, below)
        missing = None if self._folders is None else partial(self._missing, key)
        view = None if self._folders is None else view_of(scope["query_string"])
        try:
            file = await self.source.resolve(key)
            if view == "page" and isinstance(key, str):
                note_facts(scope, kind="view")
                return partial(self._view, file, key, grant)
            if wanted is not None and self.digests is not None:
                return await checksum_response(wanted, self.digests, key, file, scope)
            response = self._response(file, key, grant, scope, is_pdf=view == "pdf")
            if self._is_simple:
                response.kept_answers, response.links = self._kept_answers_for(scope), self._links
        except FileMissing as exc:
            if missing is None:
                raise
            error = exc
            return lambda scope, receive, send: missing(error, scope, send)
        response.missing = missing
        return response

    async def _send_allowed(
        self,
        archives: Archives,
        name: str,
        key: str,
        grant: Grant | None,
        below: tuple[Access, ...],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send the archive of what access allows the request to have. Access is asked only while the client waits."""
        allowed: AllowedEntries | None = None

        async def ask(_: Send) -> None:
            nonlocal allowed
            allowed = await archives.allowed(name, partial(self._may_have, below, scope))

        try:
            await until_the_client_leaves(ask, receive, send)
            if allowed is None:
                return
            response = self._response(await archives.resolve(allowed.name), key, grant, scope, is_archive=True)
        except FileError as exc:
            await send_error(exc, scope, send)
            return
        await response(scope, receive, send)

    async def _allowed_files(
        self, names: AsyncGenerator[str, None], folder: str, below: tuple[Access, ...], scope: Scope
    ) -> AsyncGenerator[str, None]:
        """Yield those of the names of files in a folder that the request may have."""
        async with aclosing(names):
            async for name in names:
                if await self._may_have(below, scope, folder + name):
                    yield name

    async def _send_checksums(
        self, wanted: str, folder: str, below: tuple[Access, ...], scope: Scope, receive: Receive, send: Send
    ) -> None:
        assert self.digests is not None
        assert self._folders is not None
        digests, files = self.digests, self._folders.entries.files(folder)
        if below:
            files = self._allowed_files(files, folder, below, scope)

        async def answer(send: Send) -> None:
            try:
                await send_checksums(wanted, digests, folder, files, scope, send)
            except FileError as exc:
                await send_error(exc, scope, send)

        await until_the_client_leaves(answer, receive, send)

    async def _view(
        self, file: AsyncFile, key: str, grant: Grant | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        assert self._folders is not None
        folders = self._folders
        is_listed = await self._may_list(key, grant, Request(scope, receive))

        async def answer(send: Send) -> None:
            try:
                tail = tail_of(key, scope, is_from_path=not callable(self._key))
                page, headers = await folders.view(file, key, tail, grant, scope, is_listed=is_listed)
            except FileMissing as exc:
                await self._missing(key, exc, scope, send)
            except FileError as exc:
                await send_error(exc, scope, send)
            else:
                await folders.send_page(page, headers, scope, send)

        await until_the_client_leaves(answer, receive, send)

    async def _may_list(self, key: str, grant: Grant | None, request: Request) -> bool:
        """Return whether the request may have the listing of the folder that a file is in."""
        if grant is not None and grant.link_id is not None:
            return grant.folder is not None  # a link to the file is not one to its folder
        folder, slash, _ = key.rpartition("/")
        try:
            if self.access:
                await self._allow(request, folder + slash)
        except FileError:
            return False
        return True

    def _response(
        self,
        file: AsyncFile,
        key: Any,
        grant: Grant | None,
        scope: Scope,
        *,
        is_pdf: bool = False,
        is_archive: bool = False,
    ) -> DownloadResponse:
        attachment, content_type, headers = self.attachment or is_archive, None, self.headers
        type_of_link = None if grant is None else grant.content_type
        if is_pdf and (type_of_link or content_type_for(file.name)) == "application/pdf":
            # inside the view page: the type is set, so that nothing else is ever shown without its sandbox
            attachment, content_type = False, "application/pdf"
            headers = {**headers, "Content-Security-Policy": PDF_POLICY}
        if grant is not None and grant.attachment is not None and (is_archive or content_type is not None):
            scope[GRANT] = replace(grant, attachment=None)
        response = DownloadResponse(
            file,
            attachment=attachment,
            content_type=content_type,
            headers=headers,
            redirect=None if is_archive else self.redirect,
            offload=self.offload,
        )
        response.ends_request = True
        if self.digests is not None and isinstance(key, str) and not is_archive:
            response.digests, response.digest_name = self.digests, key
        return response


class Listing(_Endpoint):
    """Answers GET and HEAD of a folder's URL, which ends in a slash, with the files and folders in it.

        Route("/files/{path:path}", Listing(PathSource("files"), hide=[".*"]))

    source: one that lists, such as `PathSource`; see `SupportsListing`. The answer is HTML, or with
    `Accept: application/json` or `?format=json` JSON, or with `application/x-ndjson` or `?format=ndjson` a line of JSON
    for each entry, in any order. The name of a folder without the slash is redirected, and everything else gives 404:
    `Download(source, listing=True)` sends the files, too.

    pages: how the pages look. key, headers, access, limits, hide, source_name: as in `Download`; the key of a folder
    ends in a slash, or is empty. A hidden entry is not listed. Access decides about a folder as about a file, once,
    before it is read; it is not asked about each entry. A signed link lists one folder alone, and only if it does not
    count its uses. If it was made with `below=True`, it lists the folders below, too.

    Raises `ConfigurationError` for a source that cannot list, and for an invalid access or pattern; `ValueError` for a
    header that is refused.
    """

    _always_lists = True

    def _is_for_folder(self, key: Any, scope: Scope) -> bool:
        return True

    async def _answer_to(self, key: Any, grant: Grant | None, below: tuple[Access, ...], scope: Scope) -> ASGIApp:
        folder = self._folder_of(key, grant, below, scope)
        error = FileMissing(f"not a folder: {key!r}")
        return folder or (lambda scope, receive, send: self._missing(key, error, scope, send))


def _pages_of(listing: object) -> Pages:
    if listing is True:
        return Pages()
    if not isinstance(listing, Pages):
        raise WrongType(f"listing is {listing!r}: give True, False or Pages(...)")
    return listing


def _name_of(canonical: Callable[[str], str] | None, key: str, *, is_folder: bool) -> str:
    """Return the one name in a source for a key; that of a folder, which is not empty, ends in a slash.

    A key that no file can have is returned as it is.
    """
    if is_folder and key and not key.endswith("/"):
        key += "/"
    if canonical is None or not key:
        return key
    try:
        # a folder has the canonical name of a file in it, without that file
        return canonical(f"{key}x")[:-1] if key.endswith("/") else canonical(key)
    except FileMissing:
        return key
