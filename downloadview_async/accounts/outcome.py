"""`Outcome`: what became of one answer with a file, reported once, when the answer has ended."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from downloadview_async.http.metadata import ByteRange

OBSERVER = "downloadview_async.outcome"
"""The key of an `Observer` among the extensions of an ASGI scope. Answers to a request without one report nothing."""

CLIENT_LEFT = "the client left"
"""Why an answer is incomplete whose client has disconnected, or whose task has been cancelled."""

How = Literal["offloaded", "redirected", "inline", "descriptor", "path", "chunks", "empty"]
"""How an answer left: by a proxy, by another server, in one message, by the kernel, by a path, in chunks, bodiless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One ended answer.

    status: of the answer; 0 if none was begun. how: see `How`. spans: the parts of the file that were to be sent; None
    for a file of unknown size. sent: bytes of the body that the server took; with `path`, which the server does not
    confirm, all of them. seconds: from the decision how to send the answer to its end. delegated_to: the header field
    by which a proxy or the client gets the file elsewhere, in lower case. aborted: why the answer is incomplete, or
    None if it is complete.
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


class Once:
    """An observer of one answer: it passes on the first outcome alone.

    is_held: whether the answer is held back, so that its outcome comes later.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._is_reported = False
        self.is_held = False

    def __call__(self, outcome: Outcome) -> None:
        """Pass on an outcome if it is the first."""
        if not self._is_reported:
            self._is_reported = True
            self._observer(outcome)


@contextmanager
def one_outcome(observer: Observer) -> Iterator[Once]:
    """Give an observer for one answer. If the context ends without an outcome, the answer is reported as aborted."""
    once, aborted = Once(observer), CLIENT_LEFT
    try:
        yield once
    except Exception as exc:
        aborted = str(exc) or type(exc).__name__
        raise
    finally:
        if not once.is_held:
            once(Outcome(status=0, how="empty", aborted=aborted))


def observer_of(scope: Mapping[str, Any]) -> Observer | None:
    """Return the observer in the scope of a request, or None if there is none."""
    extensions: Mapping[str, Any] = scope.get("extensions") or {}
    return extensions.get(OBSERVER)
