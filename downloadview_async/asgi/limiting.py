"""Keeps the answers of `Download` within its limits: what they count, what they wait for, and how fast they leave."""

from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.accounts.facts import Facts
from downloadview_async.asgi.accounts import Account, Connection
from downloadview_async.asgi.delivery import (
    Chunks,
    Delivery,
    Descriptor,
    Inline,
    Offloaded,
    Path,
    Pieces,
    ZeroCopy,
    deliver,
)
from downloadview_async.asgi.disconnect import calling_at_the_end, until_the_client_leaves
from downloadview_async.asgi.extensions import CONNECTION, PACE
from downloadview_async.asgi.uses import claim
from downloadview_async.errors import WrongType
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.plan import Plan
from downloadview_async.http.ranges import select_ranges
from downloadview_async.http.request import DownloadRequest
from downloadview_async.offload.base import EXTENSION
from downloadview_async.policy.limits.limits import TRANSFERS, Limits, Transfers, WhenHalfClosed
from downloadview_async.policy.limits.pace import Pace, Paced, SharedRate
from downloadview_async.policy.limits.source import SourceLimit
from downloadview_async.policy.together import Together
from downloadview_async.policy.uses import TOGETHER

_CONDITIONS = frozenset({b"if-none-match", b"if-modified-since", b"if-match", b"if-unmodified-since"})

_LARGE = Descriptor | Pieces | ZeroCopy | Path | Chunks

Limiting = Limits | SourceLimit
"""One of the limits that an application gives as `limits=`."""


def limits_of(limits: Limiting | Sequence[Limiting] | None) -> tuple[Limiting, ...]:
    """Return what an application gives as `limits=`, as a tuple. Raises `WrongType` for anything else."""
    each = tuple(limits) if isinstance(limits, list | tuple) else () if limits is None else (limits,)
    if not all(isinstance(one, Limits | SourceLimit) for one in each):
        raise WrongType(f"limits is {limits!r}: give Limits(...), SourceLimit(...), or a list of them")
    return each


def admit(
    limits: Sequence[Limiting], transfers: Transfers, key: Any, scope: Scope, receive: Receive, send: Send
) -> Awaitable[bool] | None:
    """Count a request in all limits, and hold a lease for its transfer.

    Return None if that is done, or what has to be awaited; it gives False if the client left meanwhile. A coroutine for
    each request would cost more than all that limits in memory count.

    A request that may be answered without a transfer, such as one with conditions or one for a folder, gets its lease
    when the file is open. Raises `LimitExceeded` and `SourceUnavailable`.
    """
    is_transfer = False
    if scope["method"] == "GET":
        is_transfer = _is_for_a_file(key, scope)
        scope[TRANSFERS] = transfers
    if transfers.begin_nowait(limits, scope, is_transfer=is_transfer):
        return None
    return _admit(limits, transfers, scope, receive, send, is_transfer=is_transfer)


async def _admit(
    limits: Sequence[Limiting],
    transfers: Transfers,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    is_transfer: bool,
) -> bool:
    await transfers.begin(limits, scope, receive, is_transfer=is_transfer)
    if not transfers.waits:
        return True
    has_left = True

    async def wait(_: Send) -> None:
        nonlocal has_left
        await transfers.hold(half_close_of(scope))
        has_left = False

    await until_the_client_leaves(wait, receive, send)
    return not has_left


def half_close_of(scope: Mapping[str, Any]) -> WhenHalfClosed | None:
    """Return what calls a function when the client closes its side, if the server can tell.

    A client that has left does that, and nothing tells it from one that only has nothing more to send. So it is
    answered at once: a client that waits for its answer gets it.
    """
    connection: Connection | None = (scope.get("extensions") or {}).get(CONNECTION)
    return None if connection is None else connection.when_half_closed


def _is_for_a_file(key: Any, scope: Scope) -> bool:
    if isinstance(key, str) and (not key or key.endswith("/")):
        return False
    query: bytes = scope["query_string"]
    if query and (b"view" in query or b"checksum" in query):
        return False
    for name, _ in scope["headers"]:  # noqa: SIM110 - `any` would cost each request a generator
        if name in _CONDITIONS:
            return False
    return True


def together_for(limits: Sequence[Limiting], key: Any, scope: Scope) -> Together | None:
    """Return what asks a link and the limits together once the file is open, or None: each is asked in its turn.

    limits: all those of the request, which have to count in one Redis. This is only for a request whose answer is a
    local file, and if no part of a rate has to be known before the file is open.
    """
    if scope["method"] != "GET" or TRANSFERS in scope or not _is_for_a_file(key, scope):
        return None
    if EXTENSION in scope["extensions"] and any(one.rate is not None for one in limits):
        return None  # the proxy is told a part of the rate
    each = [one for one in limits if isinstance(one, Limits)]
    stores = [one.redis for one in each]
    store = stores[0] if stores else None
    if store is None or len(each) < len(limits) or any(one is not store for one in stores):
        return None
    return Together(store, each)


def spend(scope: Scope, metadata: FileMetadata, plan: Plan | None = None) -> Awaitable[None] | None:
    """Hold the lease of an answer that has bytes of the file, and add it to the quotas.

    plan: None if another server sends the file. Return None if that is done, or what has to be awaited. Raises
    `LimitExceeded` and `SourceUnavailable`.
    """
    transfers: Transfers = scope[TRANSFERS]
    transfers.is_ours = True
    if plan is not None and not plan.body:
        return None
    if not transfers.is_held:
        return _hold_and_spend(transfers, scope, metadata, plan)
    if not transfers.counts_bytes:
        return None
    size, spans = _bytes_of(scope, metadata, plan)
    spending = transfers.spend(scope["path"], metadata, size, spans)
    if plan is None:
        transfers.sent(None)
    return spending


async def ask_together(scope: Scope, metadata: FileMetadata, plan: Plan | None = None) -> None:
    """Do what `spend` and `claim` do, and what was put off until now, in one round trip: see `Together`."""
    together: Together = scope[TOGETHER]
    transfers: Transfers = scope[TRANSFERS]
    transfers.is_ours = True
    if plan is not None and not plan.body:
        await together.ask(scope)
        return
    size, spans = _bytes_of(scope, metadata, plan)
    await together.ask(scope, metadata, size, spans, lambda use: claim(use, metadata, plan))
    if plan is None:
        transfers.sent(None)


def _bytes_of(scope: Scope, metadata: FileMetadata, plan: Plan | None) -> tuple[int | None, Sequence[ByteRange | None]]:
    """Return the size of an answer, None if it is not known, and the parts of the file that it has."""
    if plan is not None:
        return plan.length, [one for one in plan.body if not isinstance(one, bytes)]
    spans = _spans_of_another_server(scope, metadata)
    return None if metadata.size is None else sum(len(span) for span in spans if span is not None), spans


def _spans_of_another_server(scope: Scope, metadata: FileMetadata) -> Sequence[ByteRange | None]:
    """Return the parts of a file that another server sends at most: it evaluates the request by its own validators."""
    if metadata.size is None:
        return (None,)
    request, whole = DownloadRequest.from_headers("GET", scope["headers"]), (ByteRange(0, metadata.size),)
    if request.ranges is None or len(request.ranges) > 1 or request.if_range is not None:
        return whole
    parts = select_ranges(request.ranges, metadata.size)
    return whole if isinstance(parts, str) else parts


async def _hold_and_spend(transfers: Transfers, scope: Scope, metadata: FileMetadata, plan: Plan | None) -> None:
    await transfers.hold(half_close_of(scope))
    if (spending := spend(scope, metadata, plan)) is not None:
        await spending


def path_send_for(scope: Scope, path_send: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the server's path send, or None where its rate could not be limited."""
    transfers: Transfers | None = scope.get(TRANSFERS)
    is_free = transfers is None or not transfers.rates
    return path_send if is_free or PACE in (scope.get("extensions") or {}) else None


def deliver_limited(
    delivery: Delivery,
    start: Message | None,
    send: Send,
    *,
    scope: Scope,
    receive: Receive | None = None,
    facts: Facts | None = None,
) -> Awaitable[None]:
    """Send an answer as `deliver` does, at the rate of its client, and note what was sent."""
    transfers: Transfers = scope[TRANSFERS]
    if not isinstance(delivery, Offloaded):
        transfers.keeper = None  # no proxy sends it after all
    ends_at_once = TOGETHER in scope and transfers.counts_bytes
    if transfers.keeper is None and (receive is None or isinstance(delivery, Chunks)) and not ends_at_once:
        send = calling_at_the_end(send, transfers.let_go)  # otherwise, the application returns at once
    if isinstance(delivery, Inline):
        seconds = 0.0
        for shared in transfers.rates:
            seconds = max(seconds, shared.take(len(delivery.body)))
        if seconds or (receive is None and transfers.counts_bytes):
            return _deliver_small(transfers, delivery, start, send, receive, facts, seconds)
        if transfers.counts_bytes and delivery.span is not None:
            transfers.sent(len(delivery.body), is_complete=True, is_at_once=True)
    elif isinstance(delivery, _LARGE) and (transfers.rates or transfers.counts_bytes):
        return _deliver_large(transfers, delivery, start, send, scope, receive, facts)
    return deliver(delivery, start, send, receive=receive, facts=facts)


async def _deliver_small(
    transfers: Transfers,
    delivery: Inline,
    start: Message | None,
    send: Send,
    receive: Receive | None,
    facts: Facts | None,
    seconds: float,
) -> None:
    async def wait_and_deliver(send: Send) -> None:
        if seconds:
            await anyio.sleep(seconds)
        await deliver(delivery, start, send, facts=facts)
        if delivery.span is not None:
            transfers.sent(len(delivery.body), is_complete=True)

    if receive is None:
        await wait_and_deliver(send)
    else:
        await until_the_client_leaves(wait_and_deliver, receive, send)


async def _deliver_large(
    transfers: Transfers,
    delivery: Delivery,
    start: Message | None,
    send: Send,
    scope: Scope,
    receive: Receive | None,
    facts: Facts | None,
) -> None:
    with ExitStack() as stack:
        if transfers.counts_bytes:
            account = stack.enter_context(counted(transfers, scope, send))
            send = account.send
            if TOGETHER in scope:  # the lease ends, and the quotas get back what was not sent, in one step

                def end() -> None:
                    _, sent, is_complete = account.progress()
                    transfers.sent(sent, is_complete=is_complete)
                    transfers.end()

                send = calling_at_the_end(send, end)
        if transfers.rates:
            send = stack.enter_context(paced(transfers.rates, scope, send))
        await deliver(delivery, start, send, receive=receive, facts=facts)
        if isinstance(delivery, Descriptor) and delivery.later is not None and delivery.later.is_used:
            delivery.later.contexts += (stack.pop_all(),)


@contextmanager
def counted(transfers: Transfers, scope: Scope, send: Send) -> Iterator[Account]:
    """Give an account that counts what is sent of an answer by its `send`, and note that at the end."""
    account = Account.within(scope, send)
    try:
        with account:
            yield account
    finally:
        _, sent, is_complete = account.progress()
        transfers.sent(sent, is_complete=is_complete)


@contextmanager
def paced(rates: tuple[SharedRate, ...], scope: Mapping[str, Any], send: Send) -> Iterator[Send]:
    """Give a function that sends an answer at a part of some rates."""
    connection: Paced | None = (scope.get("extensions") or {}).get(PACE)
    with Pace(rates, connection) as pace:
        yield send if connection is not None else _Pausing(pace, send).send


class _Pausing:
    """Sends the messages of an answer at a rate, where the server cannot do that."""

    def __init__(self, pace: Pace, send: Send) -> None:
        self._pace = pace
        self._send = send

    async def send(self, message: Message) -> None:
        """Send a message, a body in pieces."""
        body: bytes = message.get("body", b"")
        while len(body) > (piece := self._pace.piece):
            await self._send({**message, "body": body[:piece], "more_body": True})
            await self._pace.wait(piece)
            body = body[piece:]
        await self._send({**message, "body": body} if "body" in message else message)
        if message.get("more_body"):
            await self._pace.wait(len(body))
