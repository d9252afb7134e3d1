"""Counts the answer to a request by a link that allows a number of downloads."""

import anyio
from starlette.types import Message, Send

from downloadview_async.accounts.outcome import Observer, Outcome
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.plan import Plan
from downloadview_async.policy.uses import Use


class Counted:
    """Passes on the outcome of one answer, and notes what was sent once the answer has ended.

    The next request of a client may come before the outcome: servers begin with it as soon as they have the last bytes.
    It has to wait for the note, or it would belong to a download that is complete.
    """

    def __init__(self, use: Use, observer: Observer | None, send: Send) -> None:
        self._use = use
        self._observer = observer
        self._send = send
        self._outcome: Outcome | None = None

    async def send(self, message: Message) -> None:
        """Send a message. After the last one, further requests of the session wait for the note."""
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._use.end()

    def observe(self, outcome: Outcome) -> None:
        """Keep the outcome, and pass it on."""
        self._outcome = outcome
        self._use.end()
        if self._observer is not None:
            self._observer(outcome)

    async def note(self) -> None:
        """Note what was sent, also when the client has left. The store's timeout limits how long this takes."""
        try:
            if self._outcome is not None:  # else the answer is held: a proxy sends it
                with anyio.CancelScope(shield=True):
                    for span in _spans_sent(self._outcome):
                        await self._use.note(span, is_whole=self._outcome.spans == (None,))
        finally:
            self._use.close()


async def claim(use: Use, metadata: FileMetadata, plan: Plan | None = None) -> None:
    """Claim a download for a GET that gets bytes of the file. plan: None if another server sends the file.

    Raises `LinkUsedUp`, or `SourceUnavailable` if the store of links does not answer.
    """
    if plan is None:
        await use.claim(metadata, wants_all=True)
    elif plan.body:
        await use.claim(metadata, wants_all=plan.status != 206 or plan.body == (ByteRange(0, metadata.size or 0),))


def _spans_sent(outcome: Outcome) -> list[ByteRange]:
    """Return the parts of the file that the server took of an answer."""
    match outcome.spans:
        case (ByteRange() as span,):
            return [ByteRange(span.start, span.start + min(outcome.sent, len(span)))]
        case (None,):
            return [ByteRange(0, outcome.sent)] if outcome.is_complete else []
    # Framing is between several parts, so of an incomplete answer nobody knows which bytes were sent.
    return [span for span in outcome.spans if span is not None] if outcome.is_complete else []
