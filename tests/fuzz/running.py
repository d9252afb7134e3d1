"""Runs targets with hypothesis: the same inputs in every run, and new ones from a seed until some seconds are over."""

import itertools
import pprint
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import live, of_accounts, of_asgi, of_http, of_policy, of_service, of_sources
from tests.fuzz.targets import Target

MODULES = (of_http, of_policy, of_accounts, of_sources, of_asgi, of_service, live)
"""The modules whose targets are in `TARGETS`."""

LENGTH = 400
"""Bytes of an input. Most targets read fewer."""

_MOST_SHOWN = 5000  # characters of a report
_BATCH = 50  # inputs of one seed


@dataclass(slots=True)
class Run:
    """One run of a target. shared: what its `within` gives.

    executions: how many inputs were checked. failed: the bytes of the input that was refused, or None.
    """

    target: Target
    shared: Any
    executions: int = 0
    failed: bytes | None = None

    def check(self, data: bytes) -> None:
        """Check the input that some bytes stand for."""
        self.executions += 1
        try:
            self.target.check(self.target.input.of(data), self.shared)
        except Exception:
            self.failed = data
            raise

    def regressions(self) -> None:
        """Check the inputs that once failed."""
        for value in self.target.regressions:
            self.executions += 1
            self.target.check(value, self.shared)

    def repeatably(self, examples: int) -> None:
        """Check inputs that are the same in every run."""
        self._test(derandomize=True, max_examples=examples)()

    def until(self, end: float, first_seed: int) -> None:
        """Check new inputs until `end`, in seconds of `time.monotonic`."""
        for number in itertools.count(first_seed):
            if time.monotonic() >= end:
                return
            seed(number)(self._test(derandomize=False, max_examples=_BATCH))()

    def _test(self, **options: Any) -> Any:
        """Return the test of hypothesis. It does not look for a smaller example: `smallest` takes less time."""

        def fuzz(data: bytes) -> None:
            self.check(data)

        fuzz.__name__ = fuzz.__qualname__ = self.target.name
        kept: dict[str, Any] = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
        inputs = st.binary(min_size=LENGTH, max_size=LENGTH)
        return settings(**kept, phases=[Phase.generate], **options)(given(inputs)(fuzz))

    def smallest(self, data: bytes) -> bytes:
        """Return bytes that fail with the same kind of error as `data`, of which more are zero, and the last is not."""
        kind = self._error_of(data)
        assert kind is not None, "it fails only sometimes"
        for _ in range(2):
            size = len(data)
            while size:
                for start in range(0, len(data), size):
                    shorter = data[:start] + bytes(len(data[start : start + size])) + data[start + size :]
                    for other in (data[:start], data[:start] + data[start + size :], shorter):
                        if len(other) <= len(data) and other != data and self._error_of(other) == kind:
                            data = other
                            break
                size //= 2
        return data.rstrip(b"\0")

    def _error_of(self, data: bytes) -> type[BaseException] | None:
        try:
            self.target.check(self.target.input.of(data), self.shared)
        except Exception as exc:
            return type(exc)
        return None

    def report(self, data: bytes) -> str:
        """Return what makes the failure of an input a regression test."""
        shown = pprint.pformat(self.target.input.of(data), width=110)
        if len(shown) > _MOST_SHOWN:
            shown = f"{shown[:_MOST_SHOWN]} ... and {len(shown) - _MOST_SHOWN} characters"
        return (
            f"{self.target.name} fails. Put this into its `regressions` in {self.target.module}, then mend the fault:\n"
            f"    {shown}\n"
        )


@contextmanager
def running(target: Target) -> Iterator[Run]:
    """Give a run of a target. If an input is refused, the smallest such input is printed."""
    with target.within() as shared:
        run = Run(target, shared)
        try:
            yield run
        except Exception:
            if run.failed is not None:
                print(run.report(run.smallest(run.failed)))
            raise
