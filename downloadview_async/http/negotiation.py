"""Accept-Encoding and Accept, RFC 9110 section 12.5: which encoding and which media type a client prefers."""

import re

from downloadview_async.http.fields import TOKEN_CHAR

_ITEM = re.compile(rf"[ \t]*+({TOKEN_CHAR}++)" r"(?:[ \t]*+;[ \t]*+[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?[ \t]*+")
_QUALITY = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


def preferred_encodings(accept_encoding: str | None, available: tuple[str, ...]) -> list[str]:
    """Return which of `available` the client accepts, best first; equal weights keep the order of `available`.

    Only encodings with at least the weight of the unencoded file are returned. Elements that do not parse are ignored.
    """
    if not accept_encoding:
        return []
    weights: dict[str, float] = {}
    for element in accept_encoding.split(","):
        if match := _ITEM.fullmatch(element):
            weights[match[1].lower().removeprefix("x-")] = float(match[2] or "1")
    # "*" "matches any available content coding not explicitly listed" [12.5.3]. This includes "identity", the unencoded
    # file, whose weight the others have to reach.
    others = weights.get("*", 0.0)
    identity = weights.get("identity", others)
    accepted = [(weights.get(name, others), name) for name in available]
    accepted = [item for item in accepted if item[0] > 0 and item[0] >= identity]
    return [name for _, name in sorted(accepted, key=lambda item: -item[0])]


def preferred_type(accept: str | None, available: tuple[str, ...]) -> str:
    """Return which of the media types `available` the client prefers; equal weights keep the order of `available`.

    It is the first for a client that accepts none of them, or has no preference. Parameters other than `q` and elements
    that do not parse are ignored.
    """
    weights: dict[str, float] = {}
    for element in (accept or "").split(","):
        name, *parameters = element.split(";")
        quality = next((value for value in parameters if value.strip().lower().startswith("q=")), "q=1").strip()[2:]
        if _QUALITY.fullmatch(quality):
            weights.setdefault(name.strip().lower(), float(quality))

    def weight(media_type: str) -> float:
        ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
        return next((weights[name] for name in ranges if name in weights), 0.0)

    return max(available, key=weight)


# Values of Content-Encoding that no client can decode: the way a body was sent to its store (aws-chunked), words for
# "not encoded", a Content-Transfer-Encoding of mail, or a charset.
_NO_CODINGS = frozenset(
    {"", "aws-chunked", "identity", "none", "null", "raw", "plain", "text", "binary", "7bit", "8bit"}
    | {"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin-1", "latin1", "windows-1252"}
)


def hides_coding(value: str | None) -> bool:
    """Return whether `content_coding` leaves something out of a Content-Encoding."""
    return value is not None and [token.strip(" \t").lower() for token in value.split(",")] != (
        content_coding(value) or ""
    ).split(", ")


def content_coding(value: str) -> str | None:
    """Return the codings of a Content-Encoding that a client can decode, in lower case, or None if there are none."""
    tokens = [token.strip(" \t").lower() for token in value.split(",")]
    return ", ".join(token for token in tokens if token not in _NO_CODINGS) or None
