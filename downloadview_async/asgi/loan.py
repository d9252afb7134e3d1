"""`Loan`: lends open files to the server, which sends them by their descriptors and gives them back."""

import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio
from starlette.types import Message

from downloadview_async.asgi.extensions import PATHSEND
from downloadview_async.errors import TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.base import Piece
from downloadview_async.sources.local.open_file import OpenLocalFile

_PATIENCE = 5.0
"""Seconds that a middleware may keep a path send before it counts as dropped."""


@dataclass(slots=True)
class Batches:
    """A body in pieces: see `InPieces`. first: the pieces that are there already. rest: yields the others."""

    first: Sequence[Piece]
    rest: AsyncGenerator[Sequence[Piece], None]


Lendable = OpenLocalFile | Batches


class LentFile:
    """An open file in a path send, or a body in pieces. The server takes it, and gives it back after sending it.

    Only the message refers to this object. So if a middleware drops the message, the loan ends too.
    """

    __slots__ = ("_lent", "loan")

    def __init__(self, lent: Lendable, loan: "Loan | None" = None) -> None:
        self._lent = lent
        self.loan = Loan(lent) if loan is None else loan

    @property
    def is_in_pieces(self) -> bool:
        """Whether it is a body in pieces."""
        return isinstance(self._lent, Batches)

    def take(self) -> Lendable:
        """Return the file or the pieces, which have to be given back.

        Raises `TransferAborted` if the response has already ended.
        """
        if self.loan.is_over and not self.loan.is_kept:
            raise TransferAborted("the response ended before its file was sent")
        self.loan.is_taken = True
        return self._lent

    def keep(self) -> bool:
        """Take an open local file for longer than the loan, which ends now. Return whether that is possible."""
        loan = self.loan
        if loan.is_over or loan.is_recalled or not isinstance(self._lent, OpenLocalFile):
            return False
        self._lent.shared()
        loan.is_taken = loan.is_kept = True
        loan.settle()
        return True

    def give_back(self, sent: int) -> None:
        """Let the file be closed. sent: the bytes that the kernel has taken."""
        self.loan.sent += sent
        self.loan.settle()
        if self.loan.is_kept and isinstance(self._lent, OpenLocalFile):
            self._lent.close()

    def __del__(self) -> None:
        self.loan.settle()


class Loan:
    """Lends an open file, or a body in pieces, to the server for a path send.

    The context ends when the server has given it back; the server is told to stop waiting for more pieces.

    is_taken: whether the server has taken the file. is_settled: whether it has given the file back, or will never take
    it, or has kept it. is_kept: whether it sends the file after the end of the context: see `SendLater`. is_over:
    whether the context has ended, so that the file cannot be taken any more. is_recalled: whether the path send has
    been kept for so long that the body is sent without it. sent: the bytes that the server says it has sent. has_files:
    whether the kernel has sent some of them from a file. scope: cancels the server's wait for more pieces.
    """

    __slots__ = (
        "_lent",
        "_settled",
        "has_files",
        "is_kept",
        "is_over",
        "is_recalled",
        "is_settled",
        "is_taken",
        "scope",
        "sent",
    )

    def __init__(self, lent: Lendable) -> None:
        self._lent = lent
        self._settled: anyio.Event | None = None
        self.has_files = False
        self.scope: anyio.CancelScope | None = None
        self.is_kept = False
        self.is_over = False
        self.is_recalled = False
        self.is_settled = False
        self.is_taken = False
        self.sent = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_over = True
        if self.is_taken and not self.is_settled:
            if self.scope is not None:
                self.scope.cancel()
            with anyio.CancelScope(shield=True):
                await self._wait()

    def settle(self) -> None:
        """End the wait for the server."""
        self.is_settled = True
        if self._settled is not None:
            self._settled.set()

    @property
    def is_dropped(self) -> bool:
        """Whether a middleware that does not know path sends has dropped or kept the message: the body is unsent."""
        return (self.is_settled or self.is_recalled) and not self.is_taken

    async def wait(self) -> None:
        """Wait until the server gives the file back, or the message is dropped.

        Middleware may take the message long before the server does. One that keeps all messages until the application
        returns would wait for us, and we for it. So if the server has not taken the file after `_PATIENCE` seconds, it
        is not going to: the message then sends nothing, in whatever order with others it arrives.
        """
        if not self.is_taken:
            with anyio.move_on_after(_PATIENCE):
                await self._wait()
            self.is_recalled = not self.is_taken and not self.is_settled
        if not self.is_recalled:
            await self._wait()

    async def _wait(self) -> None:
        if not self.is_settled:
            self._settled = self._settled or anyio.Event()
            await self._settled.wait()

    def message(self, span: ByteRange) -> Message:
        """Return the path-send message for a span of the file, which is that of the pieces. Call this once."""
        return {
            "type": PATHSEND,
            # pieces have no path: a server that opens this one sends too few bytes, and never wrong ones
            "path": f"/dev/fd/{self._lent.descriptor}" if isinstance(self._lent, OpenLocalFile) else os.devnull,
            "descriptor": LentFile(self._lent, self),
            "offset": span.start,
            "count": len(span),
        }
