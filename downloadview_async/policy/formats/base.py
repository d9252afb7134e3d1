"""`LinkFormat`: how the query of a link is written and read."""

from collections.abc import Mapping
from typing import Protocol

from downloadview_async.policy.grants import Grant


class LinkFormat(Protocol):
    """Writes and reads the links of some keys: the first key signs, and all of them verify."""

    def __init__(self, keys: Mapping[str, bytes], /) -> None: ...

    def query(self, path: str, grant: Grant, client: str | None, others: str = "") -> str:
        """Return the query of a link to a path, which is not percent-encoded.

        grant: what the link grants, with a new id of the link. client: the network of the client, such as
        `203.0.113.0/24`, or None for all clients. others: the query that the URL has besides, percent-encoded.

        Raises `ValueError` for an option that the format does not have.
        """

    def check(self, path: bytes, query: bytes, client: str | None, now: float) -> Grant:
        """Return what a link grants.

        path: as the client has sent it, with its percent-encoding decoded. client: the address of the client, if it is
        known. now: seconds since 1970 UTC.

        Raises `LinkInvalid`, or `LinkExpired` if the link was valid until a time before `now`.
        """

    def is_alone(self, query: bytes) -> bool:
        """Return whether a query that `check` has accepted has the link alone, and nothing that chooses an answer."""
