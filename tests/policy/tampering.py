"""Queries of links that somebody has changed."""

from collections.abc import Iterator, Sequence


def tampered(pairs: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yield lists of parameters in which one is dropped, doubled, emptied, moved or written otherwise."""
    for index, pair in enumerate(pairs):
        before, others = pairs[:index], [*pairs[:index], *pairs[index + 1 :]]
        name = pair.partition(b"=")[0]
        yield others
        yield [*pairs, pair]
        yield [pair, *pairs]
        yield [*before, pair, *pairs[index:]]
        yield [*before, name + b"=", *pairs[index:]]
        upper, encoded = name.upper() + pair[len(name) :], b"%%%02x" % pair[0] + pair[1:]
        for changed in (name + b"=", name, upper, encoded, pair + b"&", pair + b"&x=1"):
            yield [*before, changed, *pairs[index + 1 :]]
        for place in range(len(pairs)):
            if place != index:
                yield [*others[:place], pair, *others[place:]]
