"""`Together`: asks Redis about a link and the limits of a request in one round trip, once the file is open.

Each of them could be asked on its own, as it is where the file is not local: the link, the limits, the link again to
count its uses, the quotas. If all are in one Redis, they are asked at once, and what was sent is noted at once. That
costs two round trips in all. Until then, nothing has been sent, and nobody but the local disk was asked for the file.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.types import Message, Scope, Send

from downloadview_async.errors import FileError, LinkInvalid
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.limits.limits import TRANSFERS, Limits, Transfers
from downloadview_async.policy.limits.redis import RedisLimitStore
from downloadview_async.policy.stores.guarded import GuardedStore
from downloadview_async.policy.stores.redis import RefusedByLimit, Ride
from downloadview_async.policy.uses import USE, Use

Spans = Sequence[ByteRange | None]


class Together:
    """Asks about one request. limits: all those of the request, which count in `store`."""

    def __init__(self, store: RedisLimitStore, limits: Sequence[Limits]) -> None:
        self._store = store
        self.limits = limits
        self._gate = store.new_gate()
        self._link: tuple[GuardedStore, Ride, Callable[[], None]] | None = None
        self.is_asked = False
        """Whether the request was counted, or refused."""
        self.refusal: BaseException | None = None
        """The error that has refused it in place of another answer."""

    def defers(self, links: GuardedStore, grant: Grant, note_refused: Callable[[], None]) -> bool:
        """Return whether this will find out whether a link is revoked: its store has to be the same Redis.

        note_refused: called if it is.
        """
        redis = links.redis
        if redis is None or redis.url != self._store.url:
            return False
        revocable = [name for name in (grant.link_id, grant.key_id) if name is not None]
        self._link = links, Ride(self._store.call, self._gate, revocable), note_refused
        return True

    async def ask(
        self,
        scope: Scope,
        metadata: FileMetadata = FileMetadata(),  # noqa: B008 - it is frozen
        size: int | None = None,
        spans: Spans | None = None,
        claim: Callable[[Use], Awaitable[None]] | None = None,
    ) -> None:
        """Count the request, once. size, spans: of an answer with bytes of the file, as `Transfers.spend` takes them.

        claim: claims the use of a link for such an answer. Raises what the limits and the link raise.
        """
        if self.is_asked:
            return
        self.is_asked = True
        transfers: Transfers = scope[TRANSFERS]
        questions = transfers.enter(self._gate, scope["path"], metadata, size, spans)
        use: Use | None = None if claim is None else scope.get(USE)
        if self._link is None:  # it was asked before, elsewhere
            await _all_of(questions)
            if use is not None and claim is not None:
                await claim(use)
            return
        links, ride, note_refused = self._link
        try:
            if use is None or claim is None:
                await _all_of([*questions, links.refuse_revoked(ride)])
                return
            use.ride = ride
            try:
                await _all_of([*questions, claim(use)])
            except RefusedByLimit:  # the answer of that limit was lost, so it does not hold
                use.ride = None
                if await links.is_revoked(ride.revocable):
                    raise LinkInvalid(f"the link {ride.revocable[0]}, or its key, is revoked") from None
                await claim(use)
        except LinkInvalid:
            note_refused()
            raise

    async def error_for(self, error: FileError, scope: Scope) -> FileError:
        """Return the error that answers a request: that of a limit or a link is before the one that has ended it."""
        if TRANSFERS in scope:  # else access has refused it, which no limit counts
            try:
                await self.ask(scope)
            except FileError as exc:
                return exc
        return error

    def asking_before(self, scope: Scope, send: Send) -> Send:
        """Return a `send` that asks before any answer, if nobody has asked yet: one without bytes of the file."""

        async def ask_and_send(message: Message) -> None:
            if not self.is_asked:
                try:
                    await self.ask(scope)
                except FileError as exc:
                    self.refusal = exc
                    raise
            await send(message)

        return ask_and_send


async def _all_of(questions: Sequence[Awaitable[Any]]) -> None:
    """Await some questions at once. If several raise, the first one in their order counts."""
    answers = await asyncio.gather(*questions, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
