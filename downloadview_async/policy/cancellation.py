"""Tells whether a function of the application has failed, or the request that waits for it was cancelled."""

import asyncio


def is_cancelled(exc: BaseException) -> bool:
    """Return whether an error is the cancellation of the current task, not that of a task which a function awaits."""
    task = asyncio.current_task() if isinstance(exc, asyncio.CancelledError) else None
    return task is not None and task.cancelling() > 0
