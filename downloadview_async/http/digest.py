"""Repr-Digest and Want-Repr-Digest, RFC 9530: digests of the whole file, and which of them a client prefers."""

import binascii
import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from downloadview_async.errors import ConfigurationError

Digests = tuple[tuple[str, bytes], ...]
"""Digests of a whole file: pairs of an algorithm and its value, in the order of `ALGORITHMS`. The first is sent."""

ALGORITHMS: Mapping[str, int] = {"sha-256": 32, "sha-512": 64}
"""The algorithms whose status is "Active" [7.2], with the length of their values in bytes."""


def check_algorithms(algorithms: Sequence[str], option: str) -> None:
    """Raise `ConfigurationError` if the value of an option is not a list of algorithms."""
    if isinstance(algorithms, str) or not set(algorithms) <= ALGORITHMS.keys():
        raise ConfigurationError(f"{option} takes some of {', '.join(ALGORITHMS)}, not {algorithms!r}")


def new_hashes(algorithms: Sequence[str]) -> dict[str, Any]:
    """Return a new object of hashlib for each algorithm, in the order of `ALGORITHMS`."""
    return {name: hashlib.new(name.replace("-", "")) for name in ALGORITHMS if name in algorithms}


def digests_of(hashes: Mapping[str, Any]) -> Digests:
    """Return the digests of what the objects of hashlib have got."""
    return tuple((name, value.digest()) for name, value in hashes.items())


# Structured fields, RFC 9651. A field that does not parse as a whole is ignored.
_KEY = r"[a-z*][a-z0-9_.*-]*+"
_BARE_ITEM = (
    r"(?:-?[0-9]{1,12}\.[0-9]{1,3}(?![0-9])"  # a decimal
    r"|@?-?[0-9]{1,15}(?![0-9.])"  # an integer or a date
    r'|%?"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*+"'  # a string
    r"|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*+"  # a token
    r"|:[A-Za-z0-9+/=]*+:"  # a byte sequence
    r"|\?[01])"  # a boolean
)
_PARAMETERS = rf"(?:;\x20*+{_KEY}(?:={_BARE_ITEM})?+)*+"
_ITEM = _BARE_ITEM + _PARAMETERS
_INNER_LIST = rf"\(\x20*+(?:{_ITEM}(?:\x20++|(?=\))))*+\){_PARAMETERS}"
_MEMBER = re.compile(rf"({_KEY})(?:=(?:({_BARE_ITEM}){_PARAMETERS}|{_INNER_LIST})|{_PARAMETERS})")
_COMMA = re.compile(r"[ \t]*+,[ \t]*+")


def repr_digest(digests: Digests) -> str:
    """Return the value of Repr-Digest [3] with these digests."""
    return ", ".join(f"{algorithm}=:{b64encode(value).decode()}:" for algorithm, value in digests)


def parse_repr_digest(text: str) -> Digests:
    """Return the digests in the value of a Repr-Digest, in the order of `ALGORITHMS`.

    A digest of another algorithm, or with a value of a wrong type or length, is ignored.
    """
    members = _dictionary(text)
    values = {algorithm: _bytes_of(members.get(algorithm)) for algorithm in ALGORITHMS}
    return tuple(
        (name, value) for name, value in values.items() if value is not None and len(value) == ALGORITHMS[name]
    )


def preferred_digest(digests: Digests, want: str | None) -> Digests:
    """Return the digest to send to a client, or nothing if there is none that it accepts.

    want: the value of Want-Repr-Digest [4], or None. The weights are integers from 1 to 10; 0 means "not acceptable".
    A member with another value counts as not sent. If the client prefers none of `digests`, it gets the first that is
    acceptable: a server may send another algorithm than those in the field [C.2].
    """
    if want is None:
        return digests[:1]
    weights = _weights(want)
    acceptable = [digest for digest in digests if weights.get(digest[0]) != 0]
    return tuple(sorted(acceptable, key=lambda digest: -weights.get(digest[0], 0))[:1])


def _weights(want: str) -> dict[str, int]:
    """Return the weight of each algorithm in a Want-Repr-Digest."""
    weights = {
        name: int(value)
        for name, value in _dictionary(want).items()
        if value is not None and re.fullmatch("-?[0-9]+", value)
    }
    return {name: weight for name, weight in weights.items() if 0 <= weight <= 10}


def _bytes_of(value: str | None) -> bytes | None:
    """Return the bytes of a byte sequence, or None if the value of a member is not one."""
    if value is None or not value.startswith(":"):
        return None
    try:
        return binascii.a2b_base64(value[1:-1].encode(), strict_mode=True)
    except binascii.Error:
        return None


def _dictionary(text: str) -> dict[str, str | None]:
    """Return the members of a dictionary with the text of their values, without parameters.

    The value of a member that is True or an inner list is None. A dictionary that does not parse is empty.
    """
    text = text.strip(" ")
    members: dict[str, str | None] = {}
    position = 0
    while match := _MEMBER.match(text, position):
        members[match[1]] = match[2]
        if match.end() == len(text):
            return members
        if (comma := _COMMA.match(text, match.end())) is None:
            break
        position = comma.end()
    return {}
