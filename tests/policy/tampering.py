"""Queries of links that somebody has changed."""

from collections.abc import Iterator, Sequence


def tampered(pairs: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yield lists of parameters in which one is dropped, doubled, emptied, moved or written in upper case."""
    for index, pair in enumerate(pairs):
        before, others = pairs[:index], [*pairs[:index], *pairs[index + 1 :]]
        name = pair.partition(b"=")[0]
        yield others
        yield [*pairs, pair]
        yield [pair, *pairs]
        yield [*before, pair, *pairs[index:]]
        yield [*before, name + b"=", *pairs[index:]]
        for changed in (name + b"=", name, name.upper() + pair[len(name) :], pair + b"&", pair + b"&x=1"):
            yield [*before, changed, *pairs[index + 1 :]]
        for place in range(len(pairs)):
            if place != index:
                yield [*others[:place], pair, *others[place:]]
