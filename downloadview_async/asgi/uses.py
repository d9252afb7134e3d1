"""Counts the answer to a request by a link that allows a number of downloads."""

from types import TracebackType
from typing import Self

import anyio
from starlette.types import Message, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT
from downloadview_async.accounts.outcome import Outcome
from downloadview_async.asgi.accounts import Account
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.plan import Plan
from downloadview_async.policy.limits.limits import TRANSFERS
from downloadview_async.policy.uses import TOGETHER, Use


class Counted:
    """Counts what is sent of one answer, and notes it once the answer has ended. Answer with its `scope` and `send`.

    The next request of a client may come before the answer has ended: servers begin with it as soon as they have the
    last bytes. It has to wait for the note, or it would belong to a download that is complete.
    """

    def __init__(self, use: Use, scope: Scope, send: Send) -> None:
        self._use = use
        self._account = Account.within(scope, send, self._end)
        self.scope: Scope = {**scope, ACCOUNT: self._account}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.note(exc)

    async def send(self, message: Message) -> None:
        """Send a message. After the last one, further requests of the session wait for the note."""
        await self._account.send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._use.end()

    def _end(self, outcome: Outcome) -> None:
        self._use.end()

    async def note(self, exc: BaseException | None = None) -> None:
        """Note what was sent, also when the client has left. The store's timeout limits how long this takes.

        exc: the error that has ended the answer.
        """
        self._account.leave(exc)
        if exc is None and TOGETHER in self.scope:
            self.scope[TRANSFERS].end()  # in the round trip of the note
        spans, taken, is_complete = self._account.progress()
        await note_sent(self._use, spans, taken, is_complete=is_complete)


async def note_sent(use: Use, spans: tuple[ByteRange | None, ...], sent: int, *, is_complete: bool) -> None:
    """Note what was sent of an answer that has ended, also if this task is cancelled.

    spans: the parts of the file that it was to have. sent: bytes of its body.
    """
    try:
        with anyio.CancelScope(shield=True):
            for span in _spans_sent(spans, sent, is_complete=is_complete):
                await use.note(span, is_whole=spans == (None,))
    finally:
        use.close()


async def claim(use: Use, metadata: FileMetadata, plan: Plan | None = None) -> None:
    """Claim a download for a GET that gets bytes of the file. plan: None if another server sends the file.

    Raises `LinkUsedUp`, or `SourceUnavailable` if the store of links does not answer.
    """
    if plan is None:
        await use.claim(metadata, wants_all=True)
    elif plan.body:
        await use.claim(metadata, wants_all=plan.status != 206 or plan.body == (ByteRange(0, metadata.size or 0),))


def _spans_sent(spans: tuple[ByteRange | None, ...], sent: int, *, is_complete: bool) -> list[ByteRange]:
    """Return the parts of the file that the server took of an answer."""
    match spans:
        case (ByteRange() as span,):
            return [ByteRange(span.start, span.start + min(sent, len(span)))]
        case (None,):
            return [ByteRange(0, sent)] if is_complete else []
    # Framing is between several parts, so of an incomplete answer nobody knows which bytes were sent.
    return [span for span in spans if span is not None] if is_complete else []
