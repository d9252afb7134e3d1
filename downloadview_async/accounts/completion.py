"""Completed downloads: every byte of a version of a file was delivered to one client.

The bytes may come in one answer or in many, in any order, from several processes and over several days. For each client
and file version, a *session* holds which bytes were delivered once, twice and so on, as layers of spans: the first
layer has the bytes that were delivered at least once, the second those that were delivered at least twice. A layer that
has the whole file is a completed download. So the number of downloads does not depend on the order of the answers, and
two clients that look the same, as behind one address, count as two downloads even if their parts are mixed.

The client of a connection that was reset may have more bytes than it has acknowledged. They are the *loose end* of its
answer. A client that resumes within them tells by its Range up to where it has them.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import itemgetter

from downloadview_async.accounts.outcome import Outcome
from downloadview_async.http.log_text import cut
from downloadview_async.policy.addresses import network_of
from downloadview_async.sources.names import without_empty_segments

Span = tuple[int, int]
"""Where a part of a file begins, and the position after its last byte."""

Layer = tuple[Span, ...]
"""Spans in order, which neither overlap nor touch."""

MAX_LAYERS = 32
"""How often the same byte counts. A client that asks for the same part again and again makes no more layers."""

MAX_SPANS = 1000
"""Spans of a layer. If there are more, the shortest are forgotten: a client may ask for single bytes."""

MAX_LOOSE = 16
"""Loose ends of a session. If there are more, the oldest are forgotten."""

_NOT_FILES = frozenset({"checksum", "error", "listing", "share", "view"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """The part of a file that one answer has delivered, and to whom.

    session: the same for all answers that may be parts of one download. time: seconds since 1970 UTC. request_id,
    source, file, route, user, link, client: as in `Outcome`, without characters that a database refuses; empty if
    unknown. file: without a source, the path of the request. size: of the file, None if it is unknown. spans: what was
    delivered. loose: the bytes behind that which the client may have, if the connection was reset. is_whole: whether
    the spans are all of the file. sent: bytes of the body. by: the header field by which a proxy sends the file; it is
    empty unless the answer was delegated.
    """

    session: str
    time: float
    request_id: str
    source: str
    file: str
    route: str
    user: str
    link: str
    client: str
    size: int | None
    spans: tuple[Span, ...] = ()
    loose: Span | None = None
    is_whole: bool = False
    sent: int = 0
    by: str = ""

    def sent_as(self, spans: tuple[Span, ...], sent: int) -> "Delivered":
        """Return what a proxy has delivered of a delegated answer: parts of the file, and bytes of the body."""
        return replace(self, spans=spans, sent=sent, is_whole=self.size == 0 or spans == ((0, self.size),), by="")


@dataclass(frozen=True, slots=True)
class Session:
    """The parts of one file version that one client has.

    counted: how many of the layers are counted as downloads. loose: the loose ends, the newest last.
    """

    layers: tuple[Layer, ...] = ()
    counted: int = 0
    loose: tuple[Span, ...] = ()

    def after(
        self, spans: tuple[Span, ...], size: int, min_share: float = 1.0, *, loose: Span | None = None
    ) -> "tuple[int, Session]":
        """Return how many downloads a further answer completes, and the session after it.

        spans, loose: as in `Delivered`. size: of the file, in bytes. min_share: the share of it that makes a download,
        more than 0 and at most 1.
        """
        layers, ends = self.layers, [*self.loose]
        if loose is not None and not spans:
            spans = ((loose[0], loose[0]),)  # nothing was acknowledged, but this is where the client has resumed
        for start, stop in spans:
            met = [end for end in ends if end[0] < start <= end[1]]
            if met:
                confirmed = min(met, key=itemgetter(1))  # clients that look the same may resume within the others
                ends.remove(confirmed)
                start = confirmed[0]
            layers = _with_span(layers, (start, stop))
        if loose is not None:
            # Another process may have written the resumed part first. The next piece of a download manager begins where
            # this one ends, so that tells nothing.
            resumed = [start for start, _ in layers[0] if loose[0] < start < loose[1]] if layers else []
            if resumed:
                layers = _with_span(layers, (loose[0], resumed[0]))
            else:
                ends.append(loose)
        complete = sum(_length(layer) >= min_share * size for layer in layers)
        rest = tuple(layer for layer in layers if layer != ((0, size),))
        return complete - self.counted, Session(rest, complete - (len(layers) - len(rest)), tuple(ends[-MAX_LOOSE:]))


Whole = tuple[int, str | None, str, str | None, str | None, str | None, str | None]
"""By what a whole file counts: the day since 1970 UTC, source, file, route, user, link and client."""


def has_file(outcome: Outcome) -> bool:
    """Return whether an answer may have bytes of a file: those to HEAD, 304, 416 and pages have none.

    A redirect to the file may have them, since the log of the other server may tell.
    An answer that is not ours has them if it has a strong ETag, as Starlette's `FileResponse` has.
    """
    if outcome.method != "GET" or outcome.kind in _NOT_FILES:
        return False
    if outcome.status not in (200, 206):
        return outcome.kind == "redirected" and outcome.result == "delegated"
    return outcome.kind != "other" or (outcome.etag is not None and not outcome.etag.startswith("W/"))


def whole(outcome: Outcome) -> Whole | None:
    """Return the key by which an answer with a whole file is counted; None for another answer. See `has_file`."""
    if outcome.result != "completed":
        return None
    spans, size = outcome.spans, outcome.size
    if len(spans) == 1:
        (span,) = spans
        if span is not None and (span.start or span.stop != size):
            return None
    elif spans or size != 0:
        return None
    source, file = outcome.source, _file_of(outcome)
    day = int(outcome.time // 86_400)
    return day, source, file, outcome.route, outcome.user, outcome.link_id, outcome.client


def delivered(outcome: Outcome) -> Delivered | None:
    """Return the part of a file that an answer has delivered, or a proxy will deliver; None without one."""
    if not has_file(outcome):
        return None
    is_delegated, is_whole = outcome.result == "delegated", whole(outcome) is not None
    size = outcome.size
    spans = () if is_delegated else _spans_sent(outcome)
    loose = _loose_end(outcome)
    if not (is_delegated or is_whole or ((spans or loose) and size)):
        return None
    file = _file_of(outcome)
    source, link, user, client = outcome.source or "", outcome.link_id or "", outcome.user or "", outcome.client or ""
    identity: tuple[str, ...]
    if user:
        identity = ("user", user)
    elif link:
        identity = ("link", link, network_of(client))
    else:
        identity = ("client", network_of(client), outcome.header("user-agent") or "")
    version = (source, file, outcome.etag or "", str(size))
    return Delivered(
        session=digest_of(*identity, *version),
        time=outcome.time,
        request_id=outcome.request_id,
        source=stored(source),
        file=stored(file),
        route=stored(outcome.route or ""),
        user=stored(user),
        link=stored(link),
        client=stored(client),
        size=size,
        spans=spans,
        loose=loose,
        is_whole=is_whole,
        sent=outcome.sent,
        by=(outcome.delegated_to or "") if is_delegated else "",
    )


def digest_of(*texts: str) -> str:
    """Return 32 hexadecimal digits that stand for some texts."""
    joined = "\0".join(f"{len(text)} {text}" for text in texts)
    return blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def stored(text: str) -> str:
    """Return a text as a database keeps it: with escapes for what it refuses, and not longer than its columns."""
    return cut(text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00"))


def _file_of(outcome: Outcome) -> str:
    """Return the name of a file in its source; without a source, the path, in the one spelling that servers read."""
    if outcome.source is None or outcome.name is None:
        return without_empty_segments(outcome.path)
    return outcome.name


def _spans_sent(outcome: Outcome) -> tuple[Span, ...]:
    """Return the parts of a file that an answer has delivered."""
    spans = outcome.spans
    if len(spans) == 1:
        (span,) = spans
        if span is None:
            return ()
        stop = min(span.start + outcome.sent, span.stop)
        return ((span.start, stop),) if stop > span.start else ()
    # Framing is between several parts, so of an incomplete answer nobody knows which bytes were sent.
    is_complete = outcome.result == "completed"
    return tuple((span.start, span.stop) for span in spans if span is not None) if is_complete else ()


def _loose_end(outcome: Outcome) -> Span | None:
    """Return the bytes of a file that the client of a reset answer may have besides those that it has acknowledged."""
    if not outcome.unacknowledged or len(outcome.spans) != 1 or (span := outcome.spans[0]) is None:
        return None
    start = span.start + outcome.sent
    stop = min(start + outcome.unacknowledged, span.stop)
    return (start, stop) if start < stop else None


def _with_span(layers: tuple[Layer, ...], span: Span) -> tuple[Layer, ...]:
    deeper = []
    left = [span] if span[0] < span[1] else []
    for layer in layers:
        further: list[Span] = []
        for one in left:
            layer, overlaps = _union(layer, one)
            further += overlaps
        left = further
        deeper.append(layer)
    if left and len(deeper) < MAX_LAYERS:
        deeper.append(tuple(left))
    return tuple(deeper)


def _union(layer: Layer, span: Span) -> tuple[Layer, list[Span]]:
    """Return a layer with a further span, and those parts of the span that the layer had before."""
    start, stop = span
    first = bisect_left(layer, start, key=lambda one: one[1])  # the first one that does not end before the span
    last = bisect_left(layer, stop + 1, key=lambda one: one[0])  # the first one that begins behind the span
    met = layer[first:last]
    if not met:
        made = (*layer[:first], span, *layer[first:])
        return (made if len(made) <= MAX_SPANS else _without_shortest(made)), []
    overlaps = [(max(start, one[0]), min(stop, one[1])) for one in met]
    joined = (min(start, met[0][0]), max(stop, met[-1][1]))
    return (*layer[:first], joined, *layer[last:]), [one for one in overlaps if one[0] < one[1]]


def _without_shortest(layer: Layer) -> Layer:
    shortest = min(range(len(layer)), key=lambda index: layer[index][1] - layer[index][0])
    return layer[:shortest] + layer[shortest + 1 :]


def _length(layer: Layer) -> int:
    return sum(stop - start for start, stop in layer)
