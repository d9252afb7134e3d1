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


def have_room(limits: Sequence[Limits], address: str | None) -> bool:
    """Return whether a client at an address may send one more request now, apart from quotas. Nothing is counted."""
    return all(one.has_room(address) for one in limits)


def count_at_once(limits: Sequence[Limits], address: str | None, version: str, size: int) -> bool:
    """Count a request whose answer is a whole file of `size` bytes, and leaves at once.

    Call it where `have_room` has just returned True. address: of the client. version: see `Limits.spend`. Return False,
    and count nothing, if a quota is used up.
    """
    charged: list[Transfer] = []
    for one in limits:
        transfer = one.charge_at_once(address, version, size)
        if transfer is None:
            for other in charged:
                other.limits.end(other, 0, is_complete=False)
            return False
        charged.append(transfer)
    for one, transfer in zip(limits, charged, strict=True):
        one.settle(transfer)
    return True
