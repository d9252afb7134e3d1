"""Answers that leave at once: some limits in memory count one of them together, or none of them counts it.

Such an answer holds a lease for no time, so it has to be known only whether there is one. Nothing waits, and nothing is
made for each request that the limits do not need.
"""

from collections.abc import Sequence
from typing import TypeGuard

from downloadview_async.policy.limits.limits import Limits, Transfer
from downloadview_async.policy.limits.source import SourceLimit


def are_immediate(limits: Sequence[Limits | SourceLimit]) -> TypeGuard[Sequence[Limits]]:
    """Return whether `count_at_once` takes these limits."""
    return all(isinstance(one, Limits) and one.is_immediate for one in limits)


def count_at_once(limits: Sequence[Limits], address: str | None, version: str, size: int) -> bool:
    """Count a request whose answer is a whole file of `size` bytes, and leaves at once.

    address: of the client. version: see `Limits.spend`. Return False, and count nothing, if one of them may refuse it.
    """
    taken: list[Transfer] = []
    for one in limits:
        transfer = one.take_at_once(address, version, size)
        if transfer is None:
            for other in taken:
                other.limits.end(other, 0, is_complete=False)
            return False
        taken.append(transfer)
    for one, transfer in zip(limits, taken, strict=True):
        one.count_at_once(transfer)
    return True
