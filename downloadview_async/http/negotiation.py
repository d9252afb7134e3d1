"""Accept-Encoding, RFC 9110 section 12.5.3: which stored encoding of a file a client takes."""

import re

_ITEM = re.compile(
    r"[ \t]*+([!#$%&'*+.^_`|~0-9A-Za-z-]++)(?:[ \t]*+;[ \t]*+[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?[ \t]*+"
)


def preferred_encodings(accept_encoding: str | None, available: tuple[str, ...]) -> list[str]:
    """Return which of `available` the client takes, best first; equal weights keep the order of `available`.

    Only what weighs at least as much as the unencoded file is returned. Elements that do not parse are left out.
    """
    if not accept_encoding:
        return []
    weights: dict[str, float] = {}
    for element in accept_encoding.split(","):
        if match := _ITEM.fullmatch(element):
            weights[match[1].lower().removeprefix("x-")] = float(match[2] or "1")
    # "*" "matches any available content coding not explicitly listed", no coding at all ("identity") included, which
    # is what the others have to beat [12.5.3].
    others = weights.get("*", 0.0)
    identity = weights.get("identity", others)
    accepted = [(weights.get(name, others), name) for name in available]
    accepted = [item for item in accepted if item[0] > 0 and item[0] >= identity]
    return [name for _, name in sorted(accepted, key=lambda item: -item[0])]


# Values of Content-Encoding that no client can decode: how a body was sent to its store
# (aws-chunked), that there is none, a Content-Transfer-Encoding of mail, or a charset.
_NO_CODINGS = frozenset(
    {"", "aws-chunked", "identity", "none", "null", "raw", "plain", "text", "binary", "7bit", "8bit"}
    | {"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin-1", "latin1", "windows-1252"}
)


def hides_coding(value: str | None) -> bool:
    """Return whether a Content-Encoding is not the one that `content_coding` makes of it."""
    return value is not None and [token.strip(" \t").lower() for token in value.split(",")] != (
        content_coding(value) or ""
    ).split(", ")


def content_coding(value: str) -> str | None:
    """Return a Content-Encoding as a client can use it, in lower case, or None where nothing is left of it."""
    tokens = [token.strip(" \t").lower() for token in value.split(",")]
    return ", ".join(token for token in tokens if token not in _NO_CODINGS) or None
