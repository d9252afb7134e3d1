"""The ids of links, which tell when a link was made."""

import base64
import re
import secrets
import time

LINK_ID = re.compile(r"[A-Za-z0-9_-]{16}|[A-Za-z0-9_-]{12}")
"""The id of a link. One of 12 characters, and one of hexadecimal digits alone, as that of a link which nginx verifies,
does not tell when the link was made."""

_OF_NGINX = re.compile(r"[0-9a-f]{16}")
_PER_SECOND = 256
_TIME_BYTES, _RANDOM_BYTES = 5, 7


def new_link_id() -> str:
    """Return a random id, with the time. It does not begin with a hyphen, so it is not taken for an option."""
    moment = int(time.time() * _PER_SECOND).to_bytes(_TIME_BYTES, "big")
    while _OF_NGINX.fullmatch(
        link_id := base64.urlsafe_b64encode(moment + secrets.token_bytes(_RANDOM_BYTES)).decode()
    ):
        pass
    return link_id


def made_at(link_id: str) -> float | None:
    """Return when a link was made, in seconds since 1970 UTC, rounded down to 1/256 s; None if its id does not tell."""
    if len(link_id) != 16 or _OF_NGINX.fullmatch(link_id) or not LINK_ID.fullmatch(link_id):
        return None
    return int.from_bytes(base64.urlsafe_b64decode(link_id)[:_TIME_BYTES], "big") / _PER_SECOND
