"""`Completions`: counts completed downloads from the outcomes of answers."""

import asyncio
import atexit
import logging
import os
import threading
from math import inf
from time import monotonic
from types import TracebackType
from typing import Self
from uuid import uuid4

import anyio

from downloadview_async.accounts.completion import Whole, delivered, has_file, whole
from downloadview_async.accounts.completion_store import Batch, CompletionStore
from downloadview_async.accounts.outcome import Outcome
from downloadview_async.errors import ConfigurationError

logger = logging.getLogger("downloadview_async")

_DELAY = 0.5  # seconds; what arrives in them is written in one transaction
_RETRY_SECONDS = 1.0
_LOG_SECONDS = 60.0
_CLOSE_SECONDS = 10.0


_Counts = dict[Whole, tuple[int, int]]
"""How many answers have delivered a whole file, and their bytes."""


class Completions:
    """Counts completed downloads, as an observer or a listener of `Accounts`.

        completions = Completions(CompletionStore("sqlite+aiosqlite:///accounts.db"))
        app = Accounts(app, observers=[completions])

    A download is a version of a file, every byte of which was delivered to one client, in one answer or in many. Enter
    this in the lifespan of the application: `async with completions`.

    It keeps what answers have delivered for half a second, and a thread writes that. So a process that is killed loses
    less than a second, and a slow database delays no answer. `close` writes what is left; it is also called at the end
    of the context, and when the process exits.

    store: a `CompletionStore`, or the URL for one.
    max_waiting: how many answers wait while the database fails; whole files with the same facts are one. Further ones
    are not counted, and a line in the log tells how many.

    Raises `ConfigurationError` for a URL that cannot be used.
    """

    def __init__(self, store: CompletionStore | str, *, max_waiting: int = 100_000) -> None:
        if max_waiting < 1:
            raise ConfigurationError(f"max_waiting is {max_waiting!r}: give 1 or more")
        self.store = CompletionStore(store) if isinstance(store, str) else store
        self._max_waiting = max_waiting
        self._outcomes: list[Outcome] = []
        self._whole: _Counts = {}
        self._unwritten: tuple[list[Outcome], _Counts] = [], {}
        """The answers of a transaction that has not succeeded. They may be written all the same: see `Batch`."""
        self._waiting = 0
        """How many answers wait; whole files with the same facts are one."""
        self._number = 0
        self._writer = ""
        self._adding = threading.Lock()
        self._lost = 0
        self._logged_at = -inf
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_loop = False
        """Whether the thread has an event loop, which needs descriptors."""
        self._process = 0
        self._has_some = threading.Event()
        self._is_closing = threading.Event()

    def __call__(self, outcome: Outcome) -> None:
        """Count what an answer has delivered, soon."""
        if not has_file(outcome):
            return
        key = whole(outcome)
        with self._adding:
            if key is not None and (counted := self._whole.get(key)) is not None:
                self._whole[key] = counted[0] + 1, counted[1] + outcome.sent
            elif key is not None and key in self._unwritten[1]:
                self._whole[key] = 1, outcome.sent
            elif self._waiting >= self._max_waiting:
                self._lost += 1
                return
            else:
                self._waiting += 1
                if key is None:
                    self._outcomes.append(outcome)
                else:
                    self._whole[key] = 1, outcome.sent
        if not self._has_some.is_set():
            self._wake()

    async def __aenter__(self) -> Self:
        await self.store.check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)
            await self.store.aclose()

    def close(self) -> None:
        """Write what is left, and end the thread. A later outcome starts it again."""
        with self._lock:
            thread = self._thread if self._process == os.getpid() else None
            if thread is None:
                return
            self._is_closing.set()
            self._has_some.set()
        thread.join(_CLOSE_SECONDS)

    def _wake(self) -> None:
        with self._lock:
            self._has_some.set()
            if self._thread is not None and self._process == os.getpid():
                return
            self._is_closing.clear()
            if self._process == 0:
                atexit.register(self.close)
            if self._process != os.getpid():
                self._process = os.getpid()  # a process that was forked has no threads of its parent
                self._writer = uuid4().hex
            self._thread = threading.Thread(target=self._run, name="downloadview completions", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be started now: the next answer tries it again
                self._thread = None
                self._has_some.clear()

    def _run(self) -> None:
        runner, delay = asyncio.Runner(), _DELAY
        while True:
            self._has_some.wait()
            self._is_closing.wait(delay)
            self._has_some.clear()
            is_last = self._is_closing.is_set()  # `close` sets this first: what it has set last may just be cleared
            is_written = self._write_by(runner)
            delay = _DELAY if is_written else _RETRY_SECONDS
            with self._lock:
                has_some = self._waiting
                if is_last and not (is_written and has_some):
                    self._thread = None
                    break
                if has_some:
                    self._has_some.set()
        if self._has_loop:
            runner.run(self.store.aclose())
        runner.close()
        self._has_loop = False
        if has_some:
            pending = [(self._outcomes, self._whole), self._unwritten]
            count = sum(len(one) + sum(answers for answers, _ in counts.values()) for one, counts in pending)
            logger.warning("%d answers were not counted before the end", count)

    def _write_by(self, runner: asyncio.Runner) -> bool:
        """Write what waits, or what could not be written before, and return whether that succeeded."""
        try:
            if not self._has_loop:
                _check_descriptors()
                runner.get_loop()
                self._has_loop = True
        except OSError as exc:
            self._log("Downloads cannot be counted now: %s", str(exc))
            return False
        return runner.run(self._write())

    async def _write(self) -> bool:
        """Write what waits, or what could not be written before, and return whether that succeeded."""
        if not any(self._unwritten):
            with self._adding:
                self._unwritten = self._outcomes, self._whole
                self._outcomes, self._whole = [], {}
            self._number += 1
        outcomes, counts = self._unwritten
        batch = Batch(self._writer, self._number)
        for outcome in outcomes:
            if (part := delivered(outcome)) is not None:
                batch.add(part)
        for key, (answers, sent) in counts.items():
            batch.add_whole(key, answers, sent)
        try:
            if outcomes or counts:
                await self.store.write(batch)
        except Exception as exc:  # whatever the driver raises: the thread has to go on
            self._log("Downloads cannot be counted now: %s", f"{type(exc).__name__}: {getattr(exc, 'orig', exc)}")
            return False
        with self._adding:
            self._unwritten = [], {}
            self._waiting = len(self._outcomes) + len(self._whole)
        if self._lost:
            lost, self._lost = self._lost, 0
            logger.warning("%d answers were not counted, because the database failed", lost)
        return True

    def _log(self, text: str, reason: str) -> None:
        if monotonic() - self._logged_at >= _LOG_SECONDS:
            self._logged_at = monotonic()
            logger.warning(text, reason)


def _check_descriptors() -> None:
    """Raise `OSError` if there are no descriptors for an event loop: asyncio would print an error, too."""
    held: list[int] = []
    try:
        for _ in range(2):
            held += os.pipe()
    finally:
        for number in held:
            os.close(number)
