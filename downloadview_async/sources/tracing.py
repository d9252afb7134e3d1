"""`span`: tells a tracer, if there is one, of work that is done elsewhere, such as a request to another server."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

Value = str | int | float | bool
Note = Callable[[str, Value], object]
"""Sets an attribute of the span that is running."""

Tracer = Callable[[str, Mapping[str, Value]], AbstractContextManager[Note]]
"""Begins a span with a name and attributes. The context ends it."""

_tracers: list[Tracer] = []
_nothing: AbstractContextManager[Note] = nullcontext(lambda name, value: None)


def follow(tracer: Tracer) -> None:
    """Have a tracer told of all spans of this process, instead of an earlier one."""
    _tracers[:] = [tracer]


def span(name: str, **attributes: Value) -> AbstractContextManager[Note]:
    """Return a context for something that is done elsewhere. Without a tracer, it does nothing.

    attributes: their names have underscores where those of OpenTelemetry have dots first: `server__address`.
    """
    if not _tracers:
        return _nothing
    return _tracers[0](name, {key.replace("__", "."): value for key, value in attributes.items()})
