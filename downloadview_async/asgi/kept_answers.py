"""`KeptAnswers`: answers to plain requests for files, which a server gives again without calling the application.

If the target of a GET and the file decide an answer alone, `Download` has it kept here, and the next GET of that target
gets it from `DownloadProtocol` at once: there is no task, no scope for the application, no routing and no decision. But
the file is described by its name each time, and its bytes are read. If it has changed, cannot be read without waiting,
or is missing, the application answers as if nothing had been kept. Each answer has its `Outcome`, too.

A request may get a kept answer only if it has none of the fields in `DECIDING`. An answer may be kept only if access,
limits, counts, a query, digests, and middleware of an application have no part in it. `downloadview serve` knows all
middleware around its routes, so it gives its server a `KeptAnswers`, which the server offers in the scope of each
request. Other applications are offered none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Message, Scope

from downloadview_async.accounts.facts import Facts
from downloadview_async.asgi.accounts import Account, Accounts, route_of
from downloadview_async.asgi.delivery import Inline, Offloaded, bytes_of
from downloadview_async.asgi.extensions import REQUEST_ID
from downloadview_async.asgi.prepared_head import PreparedHead
from downloadview_async.errors import FileError
from downloadview_async.http import content_types
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.plan import is_shown_for_good
from downloadview_async.http.request import FIELDS, GET
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local.open_file import local_of, open_nowait

KEPT_ANSWERS = "downloadview_async.kept_answers"
"""The key of a `KeptAnswers` in the extensions of a scope."""

DECIDING = (FIELDS - {b"accept-encoding"}) | {b"expect"}
"""The fields of a request, in lower case, by which its answer may differ from one that is kept."""

MAX_ANSWERS = 1024
"""How many answers are kept. The one that was kept first makes room for another one."""

MAX_TARGET = 1024
"""Bytes of the longest target whose answer is kept: a client can spell one path in many long ways."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer as it can be given again, apart from the bytes of its file.

    path, route, source, name, proxy: facts for its outcome. delivery: without the bytes of the body.
    """

    file: AsyncFile
    metadata: FileMetadata
    head: PreparedHead
    delivery: Inline | Offloaded
    path: str
    route: str | None
    source: str | None
    name: str | None
    proxy: str | None
    type_changes: int

    def body(self) -> bytes | None:
        """Return the body, or None if the answer has to be made anew."""
        metadata = self.metadata
        if self.type_changes != content_types.changes or not is_shown_for_good(metadata.last_modified, time.time()):
            return None  # the clock may have been set back
        try:
            opened = open_nowait(self.file, GET)
            if opened is None or (local := local_of(opened)) is None:
                return None
            try:
                if opened.metadata is not metadata and opened.metadata != metadata:
                    return None
                delivery = self.delivery
                if type(delivery) is not Inline or delivery.span is None:
                    return b""
                return bytes_of(local, delivery.span, is_fresh=True)
            finally:
                local.close()
        except FileError:
            return None


class KeptAnswers:
    """The answers that an application lets its server give again, by the targets of their requests.

    locate: changes the scope of a request as the middleware around the application does, which believes proxies.
    """

    def __init__(self, locate: Callable[[Scope], None] = lambda scope: None) -> None:
        self.accounts: Accounts | None = None
        """Counts the answers, if the application has one."""
        self._locate = locate
        self._answers: dict[bytes, KeptAnswer] = {}

    def keep(
        self,
        scope: Scope,
        file: AsyncFile,
        metadata: FileMetadata,
        head: PreparedHead,
        delivery: Inline | Offloaded,
        facts: Facts | None,
    ) -> None:
        """Keep the answer to the request with this scope, a plain GET, unless something else has a part in it."""
        answers, target = self._answers, scope["raw_path"]
        if scope["root_path"] or REQUEST_ID in head.lines or metadata.headers or metadata.digests:
            return
        if len(target) > MAX_TARGET:
            return
        while len(answers) >= MAX_ANSWERS:
            del answers[next(iter(answers))]
        answers[target] = KeptAnswer(
            file=file,
            metadata=metadata,
            head=head,
            delivery=replace(delivery, body=b"") if isinstance(delivery, Inline) else delivery,
            path=scope["path"],
            route=route_of(scope) if facts is None or facts.route is None else facts.route,
            source=None if facts is None else facts.source,
            name=None if facts is None else facts.name,
            proxy=None if facts is None else facts.proxy,
            type_changes=content_types.changes,
        )

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, target: bytes) -> KeptAnswer | None:
        """Return the answer that is kept for a target in origin-form, if there is one."""
        return self._answers.get(target)

    def body_of(self, target: bytes, answer: KeptAnswer) -> bytes | None:
        """Return the body of a kept answer, or forget the answer and return None: the application has to answer."""
        body = answer.body()
        if body is None:
            self._answers.pop(target, None)
        return body

    def begin(self, answer: KeptAnswer, scope: dict[str, Any], body: bytes) -> Account | None:
        """Return the account of a request that gets a kept answer, whose head leaves now; None if nothing counts it.

        scope: of the request, as it is before the application would get it.
        """
        if (accounts := self.accounts) is None:
            return None
        self._locate(scope)
        scope["method"], scope["path"] = "GET", answer.path
        account = accounts.begin(scope, _send_nothing)
        account.route, account.source, account.name, account.proxy = (
            answer.route,
            answer.source,
            answer.name,
            answer.proxy,
        )
        delivery = answer.delivery
        account.describe(answer.name, answer.metadata.etag, answer.metadata.size)
        account.deliver(Inline(body, delivery.span) if type(delivery) is Inline else delivery, 200)
        account.begin(200, answer.head.headers)
        return account


async def _send_nothing(message: Message) -> None:
    """Send nothing: the server has sent the answer itself."""
