"""`deferred`: within it, views leave their downloads unfinished, so that a proxy can still be offered for them."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.core import signals
from django.http import HttpRequest

_RECEIVERS = "_downloadview_receivers"  # in a request: the receivers of request_finished before the view was called
_DEFERRED = "_downloadview_deferred"  # in a request: how many contexts of `deferred` are open


def note_receivers(request: HttpRequest) -> None:
    """Store the receivers that `request_finished` has before the view is called."""
    vars(request).setdefault(_RECEIVERS, signals.request_finished.receivers[:])


def has_new_receivers(request: HttpRequest) -> bool:
    """Return whether `request_finished` has got a receiver during the request, which may delete the file."""
    before = getattr(request, _RECEIVERS, None)
    return before is not None and any(receiver not in before for receiver in signals.request_finished.receivers)


@contextmanager
def deferred(request: HttpRequest) -> Iterator[None]:
    """Within the context, views leave the response to this request unfinished."""
    note_receivers(request)
    vars(request)[_DEFERRED] = getattr(request, _DEFERRED, 0) + 1
    try:
        yield
    finally:
        vars(request)[_DEFERRED] -= 1


def is_deferred(request: HttpRequest) -> bool:
    """Return whether the responses to a request are left unfinished now."""
    return bool(getattr(request, _DEFERRED, 0))
