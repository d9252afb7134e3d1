"""`DualView`: one view for callers with an event loop and for callers without one."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import update_wrapper
from typing import Any

from asgiref.sync import SyncToAsync, iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.db import connections


def has_running_loop() -> bool:
    """Return whether an event loop runs in this thread: then the caller can await, and must not block."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def close_idle_connections() -> None:
    """Close the database connections of the request's thread, if it has one: sending a file may take hours."""
    if _thread_of_request() is not None:
        await sync_to_async(close_own_connections)()


def close_own_connections() -> None:
    """Close the database connections of this thread, if it is the thread of a request.

    Under ASGI, such a thread ends with its request. CONN_MAX_AGE would keep its connections open, although no other
    thread can use them.
    """
    if _thread_of_request() is not None:
        for connection in connections.all(initialized_only=True):
            if not connection.in_atomic_block:
                connection.close()


def _thread_of_request() -> Executor | None:
    """Return the executor of the thread that belongs to this request under ASGI, or None if it has no thread."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    return None if context is None else SyncToAsync.context_to_thread_executor.get(context)


def _marked() -> None:
    """Get the marks that `markcoroutinefunction` sets on a function."""


_MARKS = dict(vars(markcoroutinefunction(_marked)))


class DualView:
    """A view that returns a coroutine where an event loop runs, and a response elsewhere.

    It is marked as a coroutine function exactly where it returns a coroutine: Django awaits it under ASGI and calls it
    under WSGI, and so does a view that calls another view. With ATOMIC_REQUESTS, which Django supports only for
    synchronous views, it is not marked, and Django calls it in a thread.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function  # after update_wrapper, which may have copied the one of another DualView

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the view."""
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _MARKS and has_running_loop() and not _requests_are_atomic():
            return _MARKS[name]
        raise AttributeError(name)


def like(view: Callable[..., Any], decorated: Callable[..., Any]) -> Callable[..., Any]:
    """Return `decorated` as the same kind of view as `view`: dual, a coroutine function, or a plain function."""
    if isinstance(view, DualView):
        return DualView(decorated)
    return markcoroutinefunction(decorated) if iscoroutinefunction(view) else decorated


def _requests_are_atomic() -> bool:
    return any(database["ATOMIC_REQUESTS"] for database in connections.settings.values())
