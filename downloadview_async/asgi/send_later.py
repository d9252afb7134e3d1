"""`SendLater`: has the server send the file of an answer when the application has returned.

A client may take an hour for a file. As long as the application waits in `send`, the coroutines of all its middleware
wait, too, with the requests and responses that they know: a third of the memory that a stalled client takes.
"""

from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from types import TracebackType
from typing import Any, Protocol, Self

from starlette.types import Message, Scope

from downloadview_async.asgi.extensions import SEND_LATER
from downloadview_async.asgi.loan import LentFile


class Waiting(Protocol):
    """An account whose answer has not ended, although the application has returned."""

    request_id: str
    is_held: bool

    def leave(self, exc: BaseException | None = None) -> None:
        """End: the file has been sent, or sending it has raised `exc`."""


class Answering(Protocol):
    """The answer, as the server knows it."""

    def send_now(self, message: Message) -> Awaitable[None]:
        """Send a path send that has been kept."""


class SendLater:
    """A context manager around the outermost application of a server, for each request.

        with SendLater(scope) as later:
            await app(scope, receive, send)
            if later.is_used:
                await later.send()

    A `DownloadResponse` inside it leaves the sending of its file to it if the server is our `DownloadProtocol`, the
    file was opened without waiting, and nothing else is to happen when the client has it: no background task, no count
    of a link for a number of downloads, and no limits in the Redis of the links. Other limits of a `Download` hold
    until the file has been sent.

    Middleware inside gets control when the answer has begun, and not when it has ended. So none of it may limit how
    many answers there are at once, measure how long they take, or wait for the client to leave. `Accounts` may: it
    makes the outcome when the file has been sent, and counts the request as being in progress until then.

    is_used: whether an answer has left its file. accounts: those of that answer, the innermost first. contexts: what
    else ends with it, before the accounts, in this order.
    """

    __slots__ = ("_answer", "_is_over", "_message", "accounts", "contexts", "is_used")

    def __init__(self, scope: Scope) -> None:
        if (extensions := scope.get("extensions")) is not None:
            extensions[SEND_LATER] = self
        self._is_over = self.is_used = False
        self._message: Message | None = None
        self._answer: Answering | None = None
        self.accounts: Sequence[Waiting] = ()
        self.contexts: tuple[AbstractContextManager[Any], ...] = ()

    def take(self, message: Message, answer: Answering) -> bool:
        """Keep a path send, and return True; or return False: it has to be sent now. Servers call this."""
        lent: LentFile = message["descriptor"]
        if self._is_over or self.is_used or not lent.keep():
            return False
        self._message, self._answer, self.is_used = message, answer, True
        return True

    def send(self) -> Awaitable[None]:  # not `async`: as few coroutines as possible are to wait for the client
        """Send the file. Raises what sending a file raises."""
        assert self._message is not None
        assert self._answer is not None
        message, self._message = self._message, None
        return self._answer.send_now(message)

    def drop(self) -> None:
        """Give the file back, which is not sent: the answer has failed after it was left here."""
        message, self._message = self._message, None
        self.is_used, self._answer = False, None
        if message is not None:
            message["descriptor"].give_back(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file back if it has not been sent, and end everything that has waited for that."""
        self._is_over, self._answer = True, None
        message, self._message = self._message, None
        accounts, self.accounts = self.accounts, ()
        contexts, self.contexts = self.contexts, ()
        if message is not None:
            message["descriptor"].give_back(0)
        elif accounts and isinstance(exc, Exception):
            with suppress(TypeError):  # as `Accounts` does
                exc.add_note(f"request {accounts[-1].request_id}")
        with ExitStack() as stack:  # whatever fails, all of them end; the last one that is pushed ends first
            for account in reversed(accounts):
                stack.callback(_leave, account, exc)
            for context in reversed(contexts):
                stack.callback(context.__exit__, kind, exc, trace)


def _leave(account: Waiting, exc: BaseException | None) -> None:
    account.is_held = False
    account.leave(exc)
