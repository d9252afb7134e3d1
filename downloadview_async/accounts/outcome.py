"""`Outcome`: what became of one answer with a file, reported once, when the answer has ended."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from downloadview_async.http.metadata import ByteRange

OBSERVER = "downloadview_async.outcome"
"""The key of an `Observer` among the extensions of an ASGI scope. Answers to a request without one report nothing."""

How = Literal["offloaded", "redirected", "inline", "descriptor", "path", "chunks", "empty"]
"""How an answer left: by a proxy, by another server, in one message, by the kernel, by a path, in chunks, bodiless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One ended answer.

    status: of the answer. how: see `How`. spans: the parts of the file that were to be sent; None for a file of unknown
    size. sent: bytes of the body that the server took; with `path`, which the server does not confirm, all of them.
    seconds: from the decision how to send the answer to its end. delegated_to: the header field by which a proxy or the
    client gets the file elsewhere, in lower case. aborted: why the answer is incomplete, or None if it is complete.
    """

    status: int
    how: How
    spans: tuple[ByteRange | None, ...] = ()
    sent: int = 0
    seconds: float = 0.0
    delegated_to: str | None = None
    aborted: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer was sent. For an offloaded answer: whether the proxy has its headers."""
        return self.aborted is None


Observer = Callable[[Outcome], None]
"""Called with each `Outcome`, in the event loop: it must neither block nor raise."""


def observer_of(scope: Mapping[str, Any]) -> Observer | None:
    """Return the observer in the scope of a request, or None if there is none."""
    extensions: Mapping[str, Any] = scope.get("extensions") or {}
    return extensions.get(OBSERVER)
