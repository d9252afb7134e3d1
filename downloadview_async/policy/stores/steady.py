"""`SteadyClock`: a clock that leaps forward for a moment must not end what ends by it, such as a revocation."""

import time

_LEAP = 120.0  # seconds by which the clock may be ahead: such corrections do no harm
_BELIEVED = 86_400.0  # seconds after which a leap was right


class SteadyClock:
    """Follows the clock of the system, but a leap forward only after a day, in which somebody may set it right."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._leapt_at: float | None = None

    def at_most(self, now: float) -> float:
        """Return `now`, which is the time of the system in seconds since 1970 UTC; after a leap, that without it."""
        steady = time.monotonic()
        if now - steady - self._offset <= _LEAP:
            self._offset, self._leapt_at = now - steady, None
        elif self._leapt_at is None:
            self._leapt_at = steady
        elif steady - self._leapt_at >= _BELIEVED:
            self._offset, self._leapt_at = now - steady, None
        return steady + self._offset
