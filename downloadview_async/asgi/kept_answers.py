"""`KeptAnswers`: answers to plain requests for files, which a server gives again without calling the application.

If the target of a GET and the file decide an answer alone, `Download` has it kept here, and the next GET of that target
gets it from `DownloadProtocol` at once: there is no task, no scope for the application, no routing and no decision. If
the kernel sends the file, there is a task, and the answer takes the place of the application. In any case, the file is
described by its name each time, and its bytes are read. If it has changed, cannot be read without waiting, or is
missing, the application answers as if nothing had been kept. Each answer has its `Outcome`, too.

A request may get a kept answer only if it has none of the fields in `DECIDING`. An answer may be kept only if access,
counts of links, a query, digests, and middleware of an application have no part in it. Limits may have one if they are
counted in memory and by addresses, have no rate, and let nobody wait: they count each small answer that is given again.
If one of them is reached, the application answers. `downloadview serve` knows all middleware around its routes, so it
gives its server a `KeptAnswers`, which the server offers in the scope of each request. Other applications are offered
none.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts
from downloadview_async.accounts.outcome import Header, Outcome
from downloadview_async.asgi.accounts import Account, Accounts, hold_accounts, route_of
from downloadview_async.asgi.delivery import Chunks, Descriptor, Inline, Offloaded, bytes_of, deliver
from downloadview_async.asgi.extensions import CONNECTION, PREPARED, REQUEST_ID, SEND_LATER
from downloadview_async.asgi.prepared_head import PreparedHead
from downloadview_async.asgi.send_later import SendLater
from downloadview_async.errors import FileError
from downloadview_async.http import content_types
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.plan import Plan, is_shown_for_good
from downloadview_async.http.request import FIELDS, GET
from downloadview_async.policy.limits.at_once import are_immediate, count_at_once, have_room
from downloadview_async.policy.limits.limits import TRANSFERS, Limits, Transfers, version_name
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of, open_nowait

KEPT_ANSWERS = "downloadview_async.kept_answers"
"""The key of a `KeptAnswers` in the extensions of a scope."""

DECIDING = (FIELDS - {b"accept-encoding"}) | {b"expect"}
"""The fields of a request, in lower case, by which its answer may differ from one that is kept."""

_DECIDING_OR_BODY = DECIDING | {b"content-length", b"transfer-encoding"}

MAX_ANSWERS = 1024
"""How many answers are kept. The one that was kept first makes room for another one."""

MAX_TARGET = 1024
"""Bytes of the longest target whose answer is kept: a client can spell one path in many long ways."""

MAX_HEADS = 256
"""How many heads of requests are known. The one that was known first makes room for another one."""

MAX_HEAD = 1024
"""Bytes of the longest head that is known."""


@dataclass(slots=True)
class KeptAnswer:
    """An answer as it can be given again, apart from the bytes of its file.

    path, route, source, name, proxy: facts for its outcome. limits: those that count it. delivery: without the bytes of
    the body; the plan of an answer that the kernel sends from the file. outcome: that of a request that has got it
    whole at once, without what its client has sent; None before there is one.
    """

    file: AsyncFile
    metadata: FileMetadata
    head: PreparedHead
    delivery: Inline | Offloaded | Plan
    path: str
    route: str | None
    source: str | None
    name: str | None
    proxy: str | None
    type_changes: int
    limits: Sequence[Limits]
    outcome: Outcome | None = None

    def body(self) -> bytes | None:
        """Return the body, or None if the answer has to be made anew."""
        if (local := self.open()) is None:
            return None
        try:
            delivery = self.delivery
            if type(delivery) is not Inline or delivery.span is None:
                return b""
            return bytes_of(local, delivery.span, is_fresh=True)
        except FileError:
            return None
        finally:
            local.close()

    def open(self) -> OpenLocalFile | None:
        """Return the open file, which the caller closes, or None if the answer has to be made anew."""
        metadata = self.metadata
        if self.type_changes != content_types.changes or not is_shown_for_good(metadata.last_modified, time.time()):
            return None  # the clock may have been set back
        try:
            opened = open_nowait(self.file, GET)
        except FileError:
            return None
        if opened is None or (local := local_of(opened)) is None:
            return None
        if opened.metadata is metadata or opened.metadata == metadata:
            return local
        local.close()
        return None

    def may_be_had(self, scope: Scope) -> bool:
        """Return whether the limits have room for a request, apart from quotas. scope: see `KeptAnswers.identify`."""
        return not self.limits or have_room(self.limits, _address_in(scope))

    def is_counted(self, scope: Scope) -> bool:
        """Count a request in the limits, which have room. Return False, and count nothing, if a quota is used up."""
        if not self.limits:
            return True
        assert self.metadata.size is not None
        version = version_name(self.path, self.metadata)
        return count_at_once(self.limits, _address_in(scope), version, self.metadata.size)

    def note(self, account: Account) -> None:
        """Note the facts of the answer for its outcome."""
        account.route, account.source, account.proxy = self.route, self.source, self.proxy
        account.describe(self.name, self.metadata.etag, self.metadata.size)

    async def send(self, local: OpenLocalFile, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the open file, and close it: the answer leaves from its descriptor."""
        plan, head = self.delivery, self.head
        assert isinstance(plan, Plan)
        span = plan.body[0]
        assert isinstance(span, ByteRange)
        later: SendLater | None = scope["extensions"].get(SEND_LATER)
        account: Account | None = scope.get(ACCOUNT)
        if account is not None:
            self.note(account)
        start = {"type": "http.response.start", "status": 200, "headers": [*head.headers], PREPARED: head}
        try:
            await deliver(
                Descriptor(local, span, Chunks(plan, local), later), start, send, receive=receive, facts=account
            )
        except BaseException:
            if later is not None:
                later.drop()
            raise
        finally:
            local.close()
        if later is not None and later.is_used:
            later.accounts = hold_accounts(account, None)


class KeptAnswers:
    """The answers that an application lets its server give again, by the targets of their requests.

    locate: changes the scope of a request as the middleware around the application does, which believes proxies.
    """

    def __init__(self, locate: Callable[[Scope], None] = lambda scope: None) -> None:
        self.accounts: Accounts | None = None
        """Counts the answers, if the application has one."""
        self._locate = locate
        self._answers: dict[bytes, KeptAnswer] = {}
        self._large: dict[bytes, KeptAnswer] = {}  # those that the kernel sends from a file
        self._heads: dict[bytes, tuple[bytes, list[Header]]] = {}

    def keep(
        self,
        scope: Scope,
        file: AsyncFile,
        metadata: FileMetadata,
        head: PreparedHead,
        delivery: Inline | Offloaded | Descriptor,
        facts: Facts | None,
    ) -> None:
        """Keep the answer to the request with this scope, a plain GET, unless something else has a part in it."""
        target, kept = scope["raw_path"], delivery.otherwise.plan if isinstance(delivery, Descriptor) else delivery
        answers = self._large if isinstance(kept, Plan) else self._answers
        if scope["root_path"] or REQUEST_ID in head.lines or metadata.headers or metadata.digests:
            return
        transfers: Transfers | None = scope.get(TRANSFERS)
        limits = [] if transfers is None else transfers.limits
        if len(target) > MAX_TARGET or not are_immediate(limits) or (limits and not isinstance(kept, Inline)):
            return
        answers.pop(target, None)
        while len(answers) >= MAX_ANSWERS:
            del answers[next(iter(answers))]
        answers[target] = KeptAnswer(
            file=file,
            metadata=metadata,
            head=head,
            delivery=replace(kept, body=b"") if isinstance(kept, Inline) else kept,
            path=scope["path"],
            route=route_of(scope) if facts is None or facts.route is None else facts.route,
            source=None if facts is None else facts.source,
            name=None if facts is None else facts.name,
            proxy=None if facts is None else facts.proxy,
            type_changes=content_types.changes,
            limits=limits,
        )

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, target: bytes) -> KeptAnswer | None:
        """Return the answer that is kept for a target in origin-form, if there is one."""
        return self._answers.get(target)

    def keep_head(self, head: bytes, target: bytes, headers: list[Header]) -> None:
        """Know from now on that the head of a request, which is the whole of it, asks for what is kept for a target."""
        heads = self._heads
        if len(head) <= MAX_HEAD:
            while len(heads) >= MAX_HEADS:
                del heads[next(iter(heads))]
            heads[head] = target, headers

    def known_head(self, head: bytes) -> tuple[bytes, list[Header]] | None:
        """Return the target and the header fields of a head that is known. Nobody may change them."""
        return self._heads.get(head)

    def body_of(self, target: bytes, answer: KeptAnswer) -> bytes | None:
        """Return the body of a kept answer, or forget the answer and return None: the application has to answer."""
        body = answer.body()
        if body is None:
            self._answers.pop(target, None)
        return body

    def answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None] | None:
        """Return a coroutine that sends the file that is kept for a request, or None: the application has to answer.

        scope: of the request, as the application would get it.
        """
        target: bytes = scope.get("raw_path", b"")
        if (
            (answer := self._large.get(target)) is None
            or scope["method"] != "GET"
            or scope["query_string"]
            or KEPT_ANSWERS not in scope.get("extensions", ())
            or not _DECIDING_OR_BODY.isdisjoint(dict(scope["headers"]))
        ):
            return None
        if (local := answer.open()) is None:
            del self._large[target]
            return None
        give = partial(answer.send, local)
        return give(scope, receive, send) if self.accounts is None else self.accounts(scope, receive, send, give)

    @property
    def sends_request_id(self) -> bool:
        """Whether each answer has the id of its request."""
        return self.accounts is not None and self.accounts.sends_request_id

    def identify(self, scope: dict[str, Any]) -> str | None:
        """Return the id of a request that gets a kept answer; None if there are no accounts.

        scope: of the request, as it is before the application would get it. Its client becomes the one that limits and
        outcomes count: that of a trusted proxy.
        """
        self._locate(scope)
        return None if self.accounts is None else self.accounts.identify(scope)

    def count(self, answer: KeptAnswer, scope: dict[str, Any], request_id: str, began: float, body: bytes) -> None:
        """Count a kept answer that the server has just sent.

        request_id: what `identify` has returned for its scope. began: the time before it was sent, of `monotonic`.
        """
        accounts = self.accounts
        assert accounts is not None
        if (last := answer.outcome) is not None and scope["extensions"][CONNECTION].is_flushed:
            client, seconds = scope["client"], monotonic() - began
            accounts.report(
                last.again(
                    request_id,
                    client=client[0] if client else None,
                    headers=scope["headers"],
                    first_byte=seconds,
                    seconds=seconds,
                )
            )
            return
        scope["method"], scope["path"] = "GET", answer.path
        account = accounts.begin(scope, _send_nothing, request_id=request_id)
        answer.note(account)
        delivery = answer.delivery
        account.deliver(Inline(body, delivery.span) if isinstance(delivery, Inline) else delivery, 200)
        account.begin(200, answer.head.headers)
        outcome = account.take_whole(len(body))
        if outcome is not None:  # without what only this client has sent
            answer.outcome = outcome.again("", client=None, headers=(), first_byte=0, seconds=0)
        account.leave()  # ends it if the client has left


def _address_in(scope: Scope) -> str | None:
    client = scope.get("client")
    return client[0] if client else None


async def _send_nothing(message: Message) -> None:
    """Send nothing: the server has sent the answer itself."""
