"""`SourceLimit`: how many requests may use a source at once."""

import math
from collections.abc import Sequence
from contextlib import ExitStack

from starlette.types import Receive, Scope

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.limits.limits import Transfer, WhenHalfClosed
from downloadview_async.policy.limits.pace import SharedRate
from downloadview_async.sources.workers import Slots


class SourceLimit:
    """How many requests may use a source at once: `Download(source, limits=SourceLimit(200))`.

    It counts requests from before the file is opened until the answer has ended, of all clients together, in this
    process. Further requests wait in a queue for `queue_seconds` at most, and get 503 with Retry-After after that. So a
    disk or a server that hangs takes so many requests, and no more. One object may limit several applications together.

    Raises `ConfigurationError` for an invalid number.
    """

    counts_bytes = False
    is_paced = False
    queues = False
    rate: int | None = None
    proxy_log: str | None = None

    def __init__(self, requests: int, *, queue_seconds: float = 2.0) -> None:
        if not isinstance(requests, int) or isinstance(requests, bool) or requests < 1:
            raise ConfigurationError(f"SourceLimit takes a number of requests, 1 or more, not {requests!r}")
        if not 0 < queue_seconds < math.inf:
            raise ConfigurationError(f"queue_seconds is {queue_seconds!r}: give more than 0")
        self.slots = Slots(requests, patience=queue_seconds)

    async def begin(self, scope: Scope, receive: Receive, *, is_transfer: bool) -> Transfer:
        """Take a slot, also for a request without a transfer: it opens the file. Raises `SourceUnavailable`."""
        return _Slot(self, await self.slots.take())

    async def hold(self, transfer: Transfer) -> None:
        """Take the slot again. Raises `SourceUnavailable`."""
        assert isinstance(transfer, _Slot)
        transfer.slot = await self.slots.take()
        transfer.is_held = True

    async def wait(self, transfer: Transfer, when_half_closed: WhenHalfClosed | None = None) -> None:
        """Take the slot again: its queue is that of the source."""
        await self.hold(transfer)

    def let_go(self, transfer: Transfer) -> None:
        """Free the slot of a request that waits for something else first."""
        assert isinstance(transfer, _Slot)
        transfer.is_held = False
        transfer.slot.close()

    def begin_nowait(self, scope: Scope, *, is_transfer: bool) -> Transfer | None:
        """Return None: `begin` may have to wait."""

    def spend(
        self, transfer: Transfer, version: str, size: int | None, spans: Sequence[ByteRange | None], file: int | None
    ) -> None:
        """Return: there is no quota."""

    def rates_of(self, transfer: Transfer) -> tuple[SharedRate, ...]:
        """Return nothing: there is no rate."""
        return ()

    def end(self, transfer: Transfer, sent: int | None, *, is_complete: bool) -> None:
        """Free the slot."""
        assert isinstance(transfer, _Slot)
        transfer.slot.close()


class _Slot(Transfer):
    __slots__ = ("slot",)

    def __init__(self, limit: SourceLimit, slot: ExitStack) -> None:
        super().__init__(limit, "")
        self.is_held = True
        self.slot = slot
