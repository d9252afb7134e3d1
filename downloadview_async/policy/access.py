"""Who may have a file: `allow` asks the functions and objects that an application gives as `access=`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request

from downloadview_async.errors import (
    AccessDenied,
    AuthenticationRequired,
    ConfigurationError,
    FileError,
    SourceUnavailable,
    WrongType,
)
from downloadview_async.policy.addresses import ANYONE
from downloadview_async.policy.cancellation import is_cancelled
from downloadview_async.policy.folders import carried
from downloadview_async.policy.formats import link_formats
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.signing import URLSigner
from downloadview_async.sources.base import check_async

logger = logging.getLogger("downloadview_async")

_PLAIN = Grant()


class Access(Protocol):
    """An async function, or an object, that decides whether a request may have a file."""

    async def __call__(self, request: Request, name: Any, /) -> bool | Grant | None:
        """Return True or a `Grant` to allow it, False or None to refuse it.

        name: the one name in the source of `Download` that all spellings in URLs stand for: `secret/x` for `//secret/x`
        too. That of a folder ends in a slash. A source that does not tell which names are the same gets what the URL
        has. May raise a `FileError`, whose status the client gets. After any other error, the client gets a 503.
        """


@runtime_checkable
class CoversBelow(Protocol):
    """Optional for an access: whether its decision about a folder is also that about all that is below the folder.

    It then does not depend on the name, and is not asked again about each file of an archive. The access of users and
    of links has `covers_below = True`. One without this attribute is asked about each name.
    """

    covers_below: bool


class SignedLinks:
    """Allows the requests whose URL is a valid link of `signer`: `Download(source, access=SignedLinks(signer))`.

    format: as in `URLSigner.sign`. Raises `ConfigurationError` for an invalid signer or format.
    """

    covers_below = True  # a link is to one URL, or to a folder with all that is below it

    def __init__(self, signer: URLSigner, *, format: str = "complete") -> None:  # noqa: A002
        if not isinstance(signer, URLSigner):
            raise not_a_signer("SignedLinks", signer)
        if format not in link_formats():
            raise ConfigurationError(f"format is {format!r}: give one of {', '.join(link_formats())}")
        self._signer = signer
        self._format = format

    async def __call__(self, request: Request, name: Any) -> Grant:
        """Return what the link of the request grants. Raises what `URLSigner.verify` raises."""
        return await self._signer.verify(request.scope, format=self._format)

    @property
    def is_immediate(self) -> bool:
        """Whether `grant_at_once` may be asked."""
        return type(self) is SignedLinks and self._signer.is_immediate

    def is_plain(self, grant: Grant, query: bytes) -> bool:
        """Return whether the link that has brought a request changes nothing in the answer: see `grant_at_once`."""
        return self._signer.is_plain(grant, query, format=self._format)

    def grant_at_once(self, path: bytes, query: bytes, address: str | None) -> Grant | None:
        """Return what `URLSigner.grant_at_once` returns. path: as the client has sent it."""
        return self._signer.grant_at_once(path, query, address, format=self._format)

    def note_verified(self) -> None:
        """See `URLSigner.note_verified`."""
        self._signer.note_verified()


class UserAccess:
    """Allows the requests of some users: `Users.allow` and `ProxyUsers.allow` return it.

    names: of the users; `*` stands for all. user_of: returns the name of the user who sends a request, or raises.
    """

    covers_below = True

    def __init__(self, names: Iterable[str], user_of: Callable[[Request], Awaitable[str]]) -> None:
        self._names = frozenset(names)
        self._user_of = user_of

    async def __call__(self, request: Request, name: Any) -> Grant:
        """Return the grant of the user. Raises `AccessDenied` for another one, and what `user_of` raises."""
        user = await self._user_of(request)
        if ANYONE not in self._names and user not in self._names:
            raise AccessDenied(f"the user {user!r} is not allowed")
        return Grant(user=user)


def signed_link(
    signer: URLSigner,
    *,
    format: str = "complete",  # noqa: A002
) -> Callable[[Request], Awaitable[Grant]]:
    """Return a dependency for FastAPI: `grant: Annotated[Grant, Depends(signed_link(signer))]`.

    It raises what `URLSigner.verify` raises, which FastAPI answers with its status. The uses of a link are counted by
    the `DownloadResponse` that the endpoint returns. format: as in `URLSigner.sign`.
    """
    if not isinstance(signer, URLSigner):
        raise not_a_signer("signed_link", signer)

    async def verify(request: Request) -> Grant:
        return await signer.verify(request.scope, format=format)

    return verify


def access_of(access: Access | Sequence[Access] | None) -> tuple[Access, ...]:
    """Return what an application gives as `access=`, as a tuple. Raises `ConfigurationError` for anything else."""
    if access is None:
        return ()
    each = tuple(access) if isinstance(access, list | tuple) else (access,)
    if not each or not all(callable(one) and not isinstance(one, type) for one in each):
        raise WrongType(
            f"access is {access!r}: give an async function (request, name), SignedLinks(signer), or a list of them"
        )
    for one in each:
        check_async(one, "access")
    return each


def not_a_signer(taker: str, value: object) -> WrongType:
    """Return the error for a value in place of a signer. The value may be a secret, so the message does not show it."""
    return WrongType(
        f"{taker} takes a URLSigner, as in {taker}(URLSigner({{'2026a': secret}})), not a {_kind_of(value)}"
    )


def _kind_of(value: object) -> str:
    return f"class, {value.__name__}" if isinstance(value, type) else type(value).__name__


async def allow(access: tuple[Access, ...], request: Request, name: Any) -> tuple[Grant, tuple[Access, ...]]:
    """Return the grant of the first in `access` that allows the request, and who decides about what is below a folder.

    These have to be asked about each name below; none if the first one covers them all.

    Raises the error of the only one, and with several the error that `_refusal` chooses. Raises `SourceUnavailable` if
    one of them fails, so that the file is not sent by mistake.
    """
    refusals: list[FileError] = []
    for number, one in enumerate(access):
        try:
            verdict: object = await one(request, name)
        except FileError as exc:
            refusals.append(exc)
            continue
        except (Exception, asyncio.CancelledError) as exc:
            if is_cancelled(exc):
                raise
            logger.exception("the decision about access has failed")
            raise SourceUnavailable("the decision about access has failed") from exc
        if isinstance(verdict, Grant):
            return verdict, _asked_below(access, number, name)
        if verdict is True:
            return _PLAIN, _asked_below(access, number, name)
        if verdict is not False and verdict is not None:
            # Such as a coroutine that was not awaited, which `if` would take for True.
            raise SourceUnavailable(f"access gave {verdict!r} instead of True, False or a Grant: is an await missing?")
    if len(access) == 1 and refusals:
        raise refusals[0]
    raise _refusal(refusals, may_be_link=bool(carried(request.scope["query_string"])))


def _asked_below(access: tuple[Access, ...], granting: int, folder: Any) -> tuple[Access, ...]:
    """Return those who decide about each name below a folder that the one with the number `granting` has allowed.

    Of those that cover what is below, the ones before it have refused the folder, and the others were not asked yet.
    """
    if _covers_below(access[granting]):
        return ()
    if len(access) == 1:
        return access
    return tuple(
        _AboutFolder(one, folder) if _covers_below(one) else one
        for number, one in enumerate(access)
        if number > granting or not _covers_below(one)
    )


def _covers_below(access: Access) -> bool:
    return getattr(access, "covers_below", False) is True  # see `CoversBelow`, by which `isinstance` takes far longer


class _AboutFolder:
    """Decides about all that is below a folder as an access does about the folder, which is asked about it once."""

    def __init__(self, access: Access, folder: Any) -> None:
        self._access = access
        self._folder = folder
        self._verdict: bool | Grant | None = None
        self._is_asked = False

    async def __call__(self, request: Request, name: Any) -> bool | Grant | None:
        if not self._is_asked:
            try:
                self._verdict = await self._access(request, self._folder)
            except FileError as exc:
                if exc.status >= 500:
                    raise
            self._is_asked = True
        return self._verdict


def _refusal(refusals: list[FileError], *, may_be_link: bool) -> FileError:
    """Return the error that the client gets after several refusals.

    A failure to decide (503) is first, because the client may succeed later. Then comes the refusal of a link, if the
    URL has a query with more than what chooses a page; then a challenge, because a user may log in; else the answer is
    that to a missing file.
    """
    failed = (error for error in refusals if error.status >= 500)
    challenges = [error for error in refusals if isinstance(error, AuthenticationRequired)]
    about_links = (error for error in refusals if may_be_link and error.status != 404 and error not in challenges)
    return next(chain(failed, about_links, challenges), AccessDenied("access was refused"))
