"""`LimitStore`: the protocol of what processes count together about their clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from downloadview_async.policy.limits.amounts import Quota, Window
from downloadview_async.policy.limits.coverage import Parts


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of a store about a request.

    refused: the limit that refuses it, or None. wait: seconds after which the same request could be allowed.
    """

    refused: Literal["requests", "concurrent"] | None = None
    wait: float = 0.0


ALLOWED = Verdict()


Costs = Sequence[tuple[Quota, int]]
"""Quotas, and how much each is to grow."""

SESSION_SECONDS = 86_400
"""Seconds after its last request that it is known which bytes of a version of a file a client has got."""

RESERVED_SECONDS = 600
"""Seconds that a download which is not complete counts after its last transfer has ended."""


class NotCounted(Exception):
    """The store has failed, and what it was to count is allowed. Nothing of that may be given back."""


class LimitStore(Protocol):
    """Counts for one process or several. Any error that it raises means that it has failed.

    client: the key of a client, with the name of the limits. Every method is atomic: no other process sees half of it.
    """

    async def admit(self, client: str, *, window: Window | None, most: int | None, lease: str | None) -> Verdict:
        """Count a request, and hold a lease for its transfer if the client holds fewer than `most`. None: any number.

        lease: the name of the new lease, None for a request without a transfer. A request that `window` refuses is not
        counted; one that `most` refuses is. A lease ends by `release`, or soon after its process has died.
        """
        ...

    async def spend(self, client: str, costs: Costs, *, parts: Parts | None, now: float) -> Quota | None:
        """Add the costs to their quotas and return None, or add nothing and return a quota that is used up.

        A quota of bytes is used up when its amount has been reached, so the last transfer may exceed it. A quota of
        downloads is never exceeded; its cost follows from the parts, not from `costs`.

        parts: what the request is to get of a file. The client has as many downloads of a version as it has all bytes
        of it, with those that are being sent; the first one counts as soon as it has any byte. The cost is by how much
        the request makes that number larger. A download that is not complete counts until `RESERVED_SECONDS` after the
        end of its last transfer, and again when it is continued.
        now: in seconds since 1970 UTC; it tells the period.
        """
        ...

    def release(self, client: str, lease: str | None, refunds: Costs, *, spent_at: float, unsent: Parts | None) -> None:
        """End a lease, and give back what of its costs was not sent. Return at once: the store may do it soon after.

        unsent: what of the parts of `spend` was not sent; None if it had none. What this makes of the downloads goes to
        the quotas of downloads in `refunds`, whose own amount does not count.
        """
        ...

    def transfers(self, client: str) -> int:
        """Return how many leases the client holds in all processes, as far as this process knows."""
        ...

    async def check(self) -> None:
        """Return if the store answers."""
        ...

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        ...


def period_of(quota: Quota, now: float) -> int:
    """Return the number of the period that `now` is in."""
    return int(now // quota.seconds)


def seconds_left(quota: Quota, now: float) -> float:
    """Return the seconds until the next period begins."""
    return (period_of(quota, now) + 1) * quota.seconds - now


def window_wait(window: Window, elapsed: float, current: float, previous: float) -> float:
    """Return the seconds until one more request is allowed, 0 if it is allowed now.

    The requests of the last `window.seconds` are estimated: those of the current window, and of the previous one the
    part of it that is not over yet.

    elapsed: seconds since the current window began. current, previous: the requests in the two.
    """
    length, free = window.seconds, window.amount - 1
    if current <= free:
        if previous * (1 - elapsed / length) + current <= free:
            return 0.0
        return max(0.0, (1 - (free - current) / previous) * length - elapsed)
    return max(0.0, length - elapsed + (1 - free / current) * length)
