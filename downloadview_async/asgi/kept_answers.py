"""`KeptAnswers`: answers to plain requests for files, which a server gives again without calling the application.

If the target of a GET and the file decide an answer alone, `Download` has it kept here, and the next GET of that target
gets it from `DownloadProtocol` at once: there is no task, no scope for the application, no routing and no decision. If
only links are needed for a file, and their signer has no store, the answer to one link is given to all valid links to
the file that change nothing in it; each is verified. A redirect is kept in the same way, and its place is signed each
time. If the kernel sends the file, there is a task, and the answer takes the place of the application. In any case, the
file is described by its name each time, and its bytes are read. If it has changed, cannot be read without waiting, or
is missing, the application answers as if nothing had been kept. Each answer has its `Outcome`, too.

A request may get a kept answer only if it has none of the fields in `DECIDING`. An answer may be kept only if other
access, counts of links, another query, digests, and middleware of an application have no part in it. Limits may have
one if they are counted in memory and by addresses, have no rate, and let nobody wait: they count each small answer that
is given again. If one of them is reached, the application answers. `downloadview serve` knows all middleware around its
routes, so it gives its server a `KeptAnswers`, which the server offers in the scope of each request. Other applications
are offered none.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any, ClassVar, NamedTuple

from starlette.types import Message, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts
from downloadview_async.accounts.outcome import Header, Outcome
from downloadview_async.asgi.accounts import Account, Accounts, Connection, hold_accounts, new_request_id, route_of
from downloadview_async.asgi.delivery import Chunks, Descriptor, Inline, Offloaded, Redirected, bytes_of, deliver
from downloadview_async.asgi.extensions import CONNECTION, PREPARED, REQUEST_ID, SEND_LATER
from downloadview_async.asgi.prepared_head import PreparedHead, is_value
from downloadview_async.asgi.send_later import SendLater
from downloadview_async.errors import FileError
from downloadview_async.http import content_types
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.plan import Plan, is_shown_for_good
from downloadview_async.http.request import FIELDS, GET
from downloadview_async.offload.base import Redirect, headers_at_once, is_checked
from downloadview_async.policy.access import SignedLinks
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.limits.at_once import are_immediate, count_at_once, have_room
from downloadview_async.policy.limits.limits import TRANSFERS, Limits, Transfers, version_name
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of, open_nowait

KEPT_ANSWERS = "downloadview_async.kept_answers"
"""The key of a `KeptAnswers` in the extensions of a scope."""

DECIDING = (FIELDS - {b"accept-encoding"}) | {b"expect"}
"""The fields of a request, in lower case, by which its answer may differ from one that is kept."""

_DECIDING_OR_BODY = DECIDING | {b"content-length", b"transfer-encoding"}

_OF_PROXIES = frozenset({b"x-forwarded-for", b"x-forwarded-proto", REQUEST_ID})
"""The fields of a request, in lower case, by which a trusted proxy tells the client and the id."""

_PUBLIC = Grant()

MAX_ANSWERS = 1024
"""How many small answers are kept, and how many files for the kernel. The first one makes room for another one."""

MAX_TARGET = 1024
"""Bytes of the longest target whose answer is kept: a client can spell one path in many long ways."""

MAX_KNOWN_FIELDS = 256
"""How many header sections of requests are known. The one that was known first makes room for another one."""

MAX_FIELDS = 1024
"""Bytes of the longest header section that is known."""


class KnownFields(NamedTuple):
    """The fields of a header section that is known, which nobody may change.

    are_of_client: whether none of them is one by which proxies tell of the client.
    """

    headers: list[Header]
    are_of_client: bool


@dataclass(slots=True, kw_only=True)
class KeptAnswer:
    """An answer as it can be given again, apart from the bytes of its file.

    target: the path of its URL, as clients send it. links: those that the request needs, whose verdict depends on that
    path. path, route, source, name, proxy: facts for its outcome. limits: those that count it. delivery: without the
    bytes of the body; the plan of an answer that the kernel sends from the file. outcome: that of a request that has
    got it whole at once, without what its client has sent; None before there is one.
    """

    status: ClassVar[int] = 200

    target: bytes
    links: SignedLinks | None
    file: AsyncFile
    metadata: FileMetadata
    head: PreparedHead
    delivery: Inline | Offloaded | Redirected | Plan
    path: str
    route: str | None
    source: str | None
    name: str | None
    proxy: str | None
    type_changes: int
    limits: Sequence[Limits]
    outcome: Outcome | None = None

    @property
    def needs_query(self) -> bool:
        """Whether the URL of a request needs a query: that of a link. Otherwise it has none."""
        return self.links is not None

    def grant_for(self, query: bytes, scope: Scope) -> Grant | None:
        """Return what a request may have, or None: the application decides. scope: see `KeptAnswers.identify`."""
        return _PUBLIC if self.links is None else self.links.grant_at_once(self.target, query, _address_in(scope))

    def response(self) -> tuple[bytes, bytes] | None:
        """Return the lines of the head, and the body, or None if the answer has to be made anew."""
        if (local := self.open()) is None:
            return None
        try:
            delivery = self.delivery
            if type(delivery) is not Inline or delivery.span is None:
                return self.head.lines, b""
            body = bytes_of(local, delivery.span, is_fresh=True)
        except FileError:
            return None
        finally:
            local.close()
        return None if body is None else (self.head.lines, body)

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

    def note_grant(self) -> None:
        """Count the link of a request that is about to get the answer."""
        if self.links is not None:
            self.links.note_verified()

    def note(self, account: Account, grant: Grant) -> None:
        """Note the facts of the answer to a request with a grant for its outcome."""
        account.allow(grant.user, grant.link_id)
        account.route, account.source, account.proxy = self.route, self.source, self.proxy
        account.describe(self.name, self.metadata.etag, self.metadata.size)

    async def send(self, local: OpenLocalFile, grant: Grant, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the open file, and close it: the answer leaves from its descriptor."""
        plan, head = self.delivery, self.head
        assert isinstance(plan, Plan)
        span = plan.body[0]
        assert isinstance(span, ByteRange)
        later: SendLater | None = scope["extensions"].get(SEND_LATER)
        account: Account | None = scope.get(ACCOUNT)
        if account is not None:
            self.note(account, grant)
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


@dataclass(slots=True, kw_only=True)
class KeptRedirect(KeptAnswer):
    """A redirect as it can be given again, to a place that is made each time.

    redirect: what makes the place, from what it gets: `described`. form: the lines of the head, with `%s` in place of
    the values of the fields `made`, in their order.
    """

    status: ClassVar[int] = 307

    redirect: Redirect
    described: Mapping[str, str]
    form: bytes
    made: tuple[str, ...]

    def response(self) -> tuple[bytes, bytes] | None:
        """Return the lines of the head, and no body, or None if the answer has to be made anew."""
        if is_checked(self.redirect):
            if (local := self.open()) is None:
                return None
            local.close()
        elif self.type_changes != content_types.changes:
            return None
        try:
            headers = headers_at_once(self.redirect, self.file, self.described) or {}
            values = tuple([value.encode("latin-1") for value in map(headers.get, self.made) if isinstance(value, str)])
        except Exception:  # a signer may raise anything: the application answers with the error
            return None
        is_alike = len(values) == len(headers) == len(self.made)
        return (self.form % values, b"") if is_alike and all(map(is_value, values)) else None


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
        self._fields: dict[bytes, KnownFields] = {}

    def keep(
        self,
        scope: Scope,
        file: AsyncFile,
        metadata: FileMetadata,
        head: PreparedHead,
        delivery: Inline | Offloaded | Descriptor,
        facts: Facts | None,
        links: SignedLinks | None,
    ) -> None:
        """Keep the answer to the request with this scope, a plain GET, unless something else has a part in it.

        links: those without which nobody gets it.
        """
        kept = delivery.otherwise.plan if isinstance(delivery, Descriptor) else delivery
        transfers: Transfers | None = scope.get(TRANSFERS)
        limits = [] if transfers is None else transfers.limits
        if metadata.digests or not are_immediate(limits) or (limits and not isinstance(kept, Inline)):
            return
        self._keep(
            KeptAnswer(
                delivery=replace(kept, body=b"") if isinstance(kept, Inline) else kept,
                limits=limits,
                file=file,
                metadata=metadata,
                head=head,
                links=links,
                **_facts_of(scope, facts),
            ),
            scope,
        )

    def keep_redirect(
        self,
        scope: Scope,
        file: AsyncFile,
        metadata: FileMetadata,
        headers: Sequence[Header],
        redirect: Redirect,
        described: Mapping[str, str],
        made: Mapping[str, str | tuple[str, ...]],
        facts: Facts | None,
        links: SignedLinks | None,
    ) -> None:
        """Keep the redirect that answers the request with this scope, a plain GET, unless something else decides it.

        headers: all of them. made: those of them that `redirect`, a `QuickRedirect`, has made for `described`.
        """
        if TRANSFERS in scope or not is_shown_for_good(metadata.last_modified, time.time()):
            return
        names = [name.encode("latin-1") for name in made]
        fields = [name for name, _ in headers]
        has_lists = not all(isinstance(value, str) for value in made.values())
        if has_lists or any(fields.count(name) != 1 for name in names) or (head := PreparedHead.of(headers)) is None:
            return
        self._keep(
            KeptRedirect(
                delivery=Redirected(),
                limits=(),
                redirect=redirect,
                described=described,
                form=b"".join(
                    [
                        _escaped(name) + b": " + (b"%s" if name in names else _escaped(value)) + b"\r\n"
                        for name, value in headers
                    ]
                ),
                made=tuple([name.decode("latin-1") for name in fields if name in names]),
                file=file,
                metadata=metadata,
                head=head,
                links=links,
                **_facts_of(scope, facts),
            ),
            scope,
        )

    def _keep(self, answer: KeptAnswer, scope: Scope) -> None:
        target = answer.target
        if scope["root_path"] or REQUEST_ID in answer.head.lines or answer.metadata.headers or len(target) > MAX_TARGET:
            return
        answers = self._answers_like(answer)
        answers.pop(target, None)
        while len(answers) >= MAX_ANSWERS:
            del answers[next(iter(answers))]
        answers[target] = answer

    def _answers_like(self, answer: KeptAnswer) -> dict[bytes, KeptAnswer]:
        return self._large if isinstance(answer.delivery, Plan) else self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, target: bytes) -> KeptAnswer | None:
        """Return the answer that is kept for a target in origin-form, if there is one."""
        path, mark, _ = target.partition(b"?")
        answer = self._answers.get(path)
        return answer if answer is not None and answer.needs_query == bool(mark) else None

    def keep_fields(self, section: bytes, headers: list[Header]) -> None:
        """Know from now on that a header section lets a plain GET in HTTP/1.1 have a kept answer.

        section: all that follows the first line of the head. headers: the fields in it.
        """
        known = self._fields
        if len(section) <= MAX_FIELDS:
            while len(known) >= MAX_KNOWN_FIELDS:
                del known[next(iter(known))]
            known[section] = KnownFields(headers, _OF_PROXIES.isdisjoint(dict(headers)))

    def known_fields(self, section: bytes) -> KnownFields | None:
        """Return the fields of a header section, if it is known."""
        return self._fields.get(section)

    def response_of(self, answer: KeptAnswer) -> tuple[bytes, bytes] | None:
        """Return the lines of the head and the body of a kept answer.

        None: the answer is forgotten, and the application has to answer.
        """
        response = answer.response()
        if response is None:
            self._answers_like(answer).pop(answer.target, None)
        return response

    def answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None] | None:
        """Return a coroutine that sends the file that is kept for a request, or None: the application has to answer.

        scope: of the request, as the application would get it.
        """
        target: bytes = scope.get("raw_path", b"")
        query: bytes = scope.get("query_string", b"")
        if (
            (answer := self._large.get(target)) is None
            or answer.needs_query != bool(query)
            or scope["method"] != "GET"
            or KEPT_ANSWERS not in scope.get("extensions", ())
            or not _DECIDING_OR_BODY.isdisjoint(dict(scope["headers"]))
            or (grant := answer.grant_for(query, scope)) is None
        ):
            return None
        if (local := answer.open()) is None:
            del self._large[target]
            return None
        answer.note_grant()
        give = partial(answer.send, local, grant)
        return give(scope, receive, send) if self.accounts is None else self.accounts(scope, receive, send, give)

    @property
    def sends_request_id(self) -> bool:
        """Whether each answer has the id of its request."""
        return self.accounts is not None and self.accounts.sends_request_id

    def identify(self, scope: dict[str, Any], known: KnownFields | None) -> str | None:
        """Return the id of a request that gets a kept answer; None if there are no accounts.

        scope: of the request, as it is before the application would get it. Its client becomes the one that limits and
        outcomes count: that of a trusted proxy. known: its fields, if they are.
        """
        if known is not None and known.are_of_client:
            return None if self.accounts is None else new_request_id()
        self._locate(scope)
        return None if self.accounts is None else self.accounts.identify(scope)

    def count(
        self,
        answer: KeptAnswer,
        grant: Grant,
        scope: dict[str, Any],
        connection: Connection,
        request_id: str,
        began: float,
        body: bytes,
    ) -> None:
        """Count a kept answer that the server has just sent over a connection.

        grant, request_id: what `grant_for` and `identify` have returned for the scope. began: the time before it was
        sent, of `monotonic`.
        """
        accounts = self.accounts
        assert accounts is not None
        if (last := answer.outcome) is not None and connection.is_flushed:
            client, seconds = scope["client"], monotonic() - began
            accounts.report(
                last.again(
                    request_id,
                    client=client[0] if client else None,
                    link_id=grant.link_id,
                    headers=scope["headers"],
                    first_byte=seconds,
                    seconds=seconds,
                )
            )
            return
        scope["method"], scope["path"], scope["extensions"] = "GET", answer.path, {CONNECTION: connection}
        account = accounts.begin(scope, _send_nothing, request_id=request_id)
        answer.note(account, grant)
        delivery = answer.delivery
        account.deliver(Inline(body, delivery.span) if isinstance(delivery, Inline) else delivery, answer.status)
        account.begin(answer.status, answer.head.headers)
        outcome = account.take_whole(len(body))
        if outcome is not None:  # without what only this client has sent
            answer.outcome = outcome.again("", client=None, link_id=None, headers=(), first_byte=0, seconds=0)
        account.leave()  # ends it if the client has left
        del scope["extensions"]  # else only the garbage collector would free the connection


def _facts_of(scope: Scope, facts: Facts | None) -> dict[str, Any]:
    return {
        "target": scope["raw_path"],
        "path": scope["path"],
        "route": route_of(scope) if facts is None or facts.route is None else facts.route,
        "source": None if facts is None else facts.source,
        "name": None if facts is None else facts.name,
        "proxy": None if facts is None else facts.proxy,
        "type_changes": content_types.changes,
    }


def _escaped(line: bytes) -> bytes:
    return line.replace(b"%", b"%%")


def _address_in(scope: Scope) -> str | None:
    client = scope.get("client")
    return client[0] if client else None


async def _send_nothing(message: Message) -> None:
    """Send nothing: the server has sent the answer itself."""
