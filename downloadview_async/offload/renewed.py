"""`Renewed`: a key that a function of the application gives, and gives again before the key expires."""

import inspect
import math
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from downloadview_async.errors import SourceUnavailable
from downloadview_async.sources.workers import Slots, Workers

T = TypeVar("T")


class Renewed(Generic[T]):
    """A key of a provider, which is called once for all tasks that wait for a new key.

    provider: a function or coroutine function. name: of the provider, for messages. read: returns the key in what the
    provider has returned, and when it expires, in seconds since the epoch, UTC. ahead: how many seconds before that a
    new key is got, but not before half of the time is over.
    """

    def __init__(
        self, provider: Callable[[], Any], *, name: str, read: Callable[[Any], tuple[T, float]], ahead: float
    ) -> None:
        self._provider = provider
        self._name = name
        self._read = read
        self._ahead = ahead
        self._workers = Workers(1)
        self._turn = Slots(1)
        self._renew_at = math.inf
        self._current: tuple[T, float] | None = None

    async def get(self) -> tuple[T, float]:
        """Return the key and when it expires. Raises `SourceUnavailable` if the provider gives no valid key."""
        try:
            if self._current is None or time.time() >= self._renew_at:
                await self._renew()
        except SourceUnavailable:
            if self._current is None or time.time() >= self._current[1]:
                raise
        assert self._current is not None
        return self._current

    async def _renew(self) -> None:
        before = self._current
        with await self._turn.take():
            if self._current is not before:
                return
            try:
                given = await self._workers.run_or_abandon(self._provider)
                given = await given if inspect.isawaitable(given) else given
                key, good_until = self._read(given)
            except SourceUnavailable:
                raise
            except Exception as exc:  # a provider may raise anything
                raise SourceUnavailable(f"the {self._name} failed: {type(exc).__name__}: {exc}") from exc
            self._current = key, good_until
            self._renew_at = good_until - min(self._ahead, (good_until - time.time()) / 2)
