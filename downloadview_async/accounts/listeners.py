"""`Listeners`: gives outcomes to listeners, which may be slow, hang or raise without any effect on answers."""

import asyncio
import contextvars
import logging
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from inspect import iscoroutinefunction
from math import inf
from time import monotonic
from typing import Any

import anyio

from downloadview_async.accounts.outcome import BatchListener, Listener, Outcome
from downloadview_async.errors import WrongType
from downloadview_async.http.log_text import escaped

logger = logging.getLogger("downloadview_async")

MAX_WAITING = 10_000
"""Outcomes that wait for one listener at most. Further ones are dropped and counted."""

LOG_SECONDS = 60.0
"""Seconds between two log lines about the same listener."""

MAX_AT_ONCE = 1000
"""Listeners of single answers that may be busy at once. The outcomes for further ones are dropped and counted."""

_BATCH_SECONDS = 0.05  # a thread is started for the outcomes of this time
_BATCH = 500  # outcomes that a `BatchListener` writes together
_TURN = 20  # outcomes after which other tasks get their turn


_awake: "set[_Waiting]" = set()  # those in this process whose outcomes are being delivered


class _Waiting:
    """The outcomes that wait for one listener. They are delivered in order, one after the other.

    An async listener runs in a task of the event loop in which the outcomes arise; a plain one in a thread. Both exist
    only while outcomes wait. key: of a listener of single answers, in `_of_answers`.
    """

    def __init__(self, listener: Listener, size: int, key: object = None) -> None:
        self._listener: Callable[[Outcome], Any] = listener
        self._is_async = iscoroutinefunction(listener) or iscoroutinefunction(getattr(listener, "__call__", None))  # noqa: B004
        self._batches = listener if isinstance(listener, BatchListener) and not self._is_async else None
        self._prepare = None if self._batches is None else self._batches.prepare
        self._size = size
        self._key = key
        self._outcomes: deque[Any] = deque()  # or what a `BatchListener` has prepared of them
        self._is_awake = False
        self._delivering = 0  # outcomes that the listener has at this moment
        self._hurried = threading.Event()
        self._lock = threading.RLock()  # the garbage collector may put an outcome while this thread has it
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that is to deliver, or to start a thread
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._dropped = _Count("%d outcomes were dropped, because %s is too slow", listener)
        self._failed = _Count("%d outcomes were lost, because %s has raised", listener)

    def put(self, outcome: Outcome) -> None:
        """Have an outcome delivered; drop it if too many wait."""
        outcomes = self._outcomes
        if len(outcomes) >= self._size:
            self._dropped.add()
            return
        if self._prepare is None:
            outcomes.append(outcome)
        else:
            try:
                outcomes.append(self._prepare(outcome))
            except Exception as exc:
                self._failed.add(exc)
                return
        if self._is_awake and ((loop := self._loop) is None or not loop.is_closed()):
            return
        if self.is_orphaned:
            self._loop, self._is_awake = None, False
        self._wake()

    @property
    def is_orphaned(self) -> bool:
        """Whether the event loop has ended before it could deliver."""
        loop = self._loop
        return loop is not None and loop.is_closed()

    def give_up(self) -> None:
        """Stop, because nothing delivers what waits. A listener of single answers gets no further outcome here."""
        self._sleep()
        if self._key is not None:
            self.end()

    @property
    def count(self) -> int:
        """How many outcomes have not been delivered."""
        return len(self._outcomes) + self._delivering

    def hurry(self) -> None:
        """Start the thread now, if it is to be started soon, or end its pause."""
        self._hurried.set()
        if self._timer is not None:
            self._timer.cancel()
            self._start_thread()

    def forget(self) -> None:
        """Begin anew in a process that was forked: the other one delivers what waits, and its threads are not here."""
        self._outcomes.clear()
        self._delivering, self._is_awake = 0, False
        self._hurried, self._lock = threading.Event(), threading.RLock()
        self._loop = self._timer = self._task = None

    def end(self) -> None:
        """Give up what has not been delivered, and log how much that is."""
        if self.count:
            logger.warning("%d outcomes were not delivered to %s before the end", self.count, _name_of(self._listener))
            self._outcomes.clear()
        if self._task is not None:
            self._task.cancel()
        self._dropped.log()
        self._failed.log()

    def _wake(self) -> None:
        with self._lock:
            if self._is_awake:
                return
            self._is_awake = True
        _awake.add(self)
        try:
            self._loop = loop = asyncio.get_running_loop()
        except RuntimeError:  # a server without asyncio
            self._start_thread()
            return
        if self._is_async:
            # in an empty context: that of the request would stay as long as the task
            context = contextvars.Context()
            self._task = task = loop.create_task(self._deliver_in_task(), context=context)
            task.add_done_callback(self._task_has_ended, context=context)
        else:
            self._timer = loop.call_later(_BATCH_SECONDS, self._start_thread)

    def _start_thread(self) -> None:
        self._timer = self._loop = None
        try:
            threading.Thread(target=self._deliver_in_thread, name="downloadview outcomes", daemon=True).start()
        except RuntimeError:  # no thread can be started now: the next outcome tries it again
            self.give_up()

    def _sleep(self) -> None:
        _awake.discard(self)  # before the last line: from there on, another thread may be woken, which adds it
        if self._key is not None and _of_answers.get(self._key) is self:
            del _of_answers[self._key]
        self._is_awake = False

    def _task_has_ended(self, task: "asyncio.Task[None]") -> None:
        """Have the next outcome start another task, if this one was cancelled, perhaps before its first step."""
        if self._task is task:
            self._delivering = 0
            self._task = self._loop = None
            self.give_up()

    def _goes_on(self) -> bool:
        """Return whether outcomes wait. If none do, the next one wakes this again."""
        if self._outcomes:
            return True
        self._sleep()
        if not self._outcomes:
            return False
        with self._lock:  # one has come between the two looks, and perhaps woken another thread
            was_awake, self._is_awake = self._is_awake, True
        _awake.add(self)
        return not was_awake

    def _deliver_in_thread(self) -> None:
        if self._batches is not None:
            self._write_in_thread(self._batches)
            return
        while self._goes_on():
            outcome = self._take()
            try:
                result = self._listener(outcome)
                if result is not None and isinstance(result, Awaitable):
                    asyncio.run(_waiting_for(result))
            except BaseException as exc:  # `sys.exit`, or something of the listener was cancelled: not this thread
                self._failed.add(exc)
            self._delivering = 0

    def _write_in_thread(self, listener: BatchListener) -> None:
        """Write until no outcome has come for a while.

        Without the pauses, each answer that ends during a write would be written alone, and the event loop would wait
        for the interpreter each time.
        """
        while self._goes_on():
            self._write_batch(listener)
            if len(self._outcomes) < _BATCH and self._hurried.wait(_BATCH_SECONDS):
                self._hurried.clear()

    def _write_batch(self, listener: BatchListener) -> None:
        outcomes = self._outcomes
        self._delivering = count = min(len(outcomes), _BATCH)
        try:
            listener.write([outcomes.popleft() for _ in range(count)])
        except OSError as exc:  # such as a disk that is full: its message says enough
            self._failed.add(f"{exc}", count)
        except BaseException as exc:
            self._failed.add(exc, count)
        self._delivering = 0

    async def _deliver_in_task(self) -> None:
        number, task = 0, asyncio.current_task()
        while self._goes_on():
            outcome = self._take()
            try:
                await self._listener(outcome)
            except (Exception, asyncio.CancelledError) as exc:
                if task is not None and task.cancelling():
                    raise
                self._failed.add(exc)  # or what the listener waits for was cancelled
            self._delivering = 0
            if (number := number + 1) % _TURN == 0:
                await asyncio.sleep(0)
        self._task = self._loop = None

    def _take(self) -> Outcome:
        self._delivering = 1
        outcome: Outcome = self._outcomes.popleft()
        return outcome


class Listeners:
    """Gives each outcome to some listeners. Each has a queue of at most `size` outcomes."""

    def __init__(self, listeners: Sequence[Listener], size: int = MAX_WAITING) -> None:
        if not isinstance(listeners, Iterable) or not all(callable(listener) for listener in listeners):
            raise WrongType(f"listeners is {listeners!r}: give a list of functions that take an Outcome")
        self._waiting = [_Waiting(listener, size) for listener in listeners]
        self.put: Callable[[Outcome], None] = (
            self._waiting[0].put if len(self._waiting) == 1 else partial(_put_into, self._waiting)
        )
        """Has an outcome delivered to each listener, without waiting."""

    async def drain(self, seconds: float) -> None:
        """Wait until all outcomes have been delivered, at most for some seconds.

        This waits for all other listeners of the process, too, such as those of single answers.
        """
        for waiting in list(_awake):
            waiting.hurry()
        deadline = monotonic() + seconds
        while any(waiting.count for waiting in list(_awake)) and monotonic() < deadline:  # noqa: ASYNC110
            await anyio.sleep(0.005)  # a thread may deliver them, so no event of this loop tells

    def end(self) -> None:
        """Give up what has not been delivered, with a line in the log for each listener."""
        for waiting in self._waiting:
            waiting.end()


def _put_into(queues: list[_Waiting], outcome: Outcome) -> None:
    for waiting in queues:
        waiting.put(outcome)


_of_answers: dict[object, _Waiting] = {}  # by their listeners, while they are awake


def tell(listener: Listener, outcome: Outcome) -> None:
    """Have the outcome of one answer delivered to the listener of that answer, without waiting.

    The answers with the same listener have one queue. At most `MAX_AT_ONCE` listeners are busy.
    """
    key: object = listener if isinstance(listener, Hashable) else id(listener)
    if (waiting := _of_answers.get(key)) is None:
        if len(_of_answers) >= MAX_AT_ONCE:
            for orphan in [waiting for waiting in [*_of_answers.values()] if waiting.is_orphaned]:
                orphan.give_up()
        if len(_of_answers) >= MAX_AT_ONCE:
            _too_many.add()
            return
        waiting = _of_answers[key] = _Waiting(listener, MAX_WAITING, key)
    waiting.put(outcome)


def _forget_others() -> None:
    for waiting in list(_awake):
        waiting.forget()
    _awake.clear()
    _of_answers.clear()


os.register_at_fork(after_in_child=_forget_others)


class _Count:
    """Counts events, and logs their number at most once in `LOG_SECONDS`."""

    def __init__(self, text: str, listener: object | str) -> None:
        self._text = text
        self._name = listener if isinstance(listener, str) else _name_of(listener)
        self._count = 0
        self._logged_at = -inf
        self._last: BaseException | str | None = None

    def add(self, reason: BaseException | str | None = None, count: int = 1) -> None:
        """Count some. The first ones are logged at once. An exception as the reason is logged with its traceback."""
        self._count += count
        self._last = reason
        if monotonic() - self._logged_at >= LOG_SECONDS:
            self.log()

    def log(self) -> None:
        """Log how many there were since the last line."""
        if self._count:
            self._logged_at = monotonic()
            count, self._count = self._count, 0
            reason, self._last = self._last, None
            if isinstance(reason, str):
                logger.warning(f"{self._text}: %s", count, self._name, escaped(reason))
            else:
                logger.warning(self._text, count, self._name, exc_info=reason)


_too_many = _Count("%d outcomes were dropped, because %s are busy", "too many listeners of single answers")


def _name_of(listener: object) -> str:
    name: str = getattr(listener, "__qualname__", None) or type(listener).__qualname__
    return f"the listener {name}"


async def _waiting_for(result: Awaitable[Any]) -> None:
    await result
