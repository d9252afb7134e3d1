"""Makes the inputs of fuzz targets from bytes: from those of hypothesis, of atheris, or of a random number generator.

Each `Input` reads bytes and returns a value. Where the bytes have ended it reads zeros, and zero always stands for the
simplest choice: the first of several, the shortest, a seed without edits. So fewer and smaller bytes are a smaller
example, and any bytes are a valid one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

LARGE = 1 << 16
"""Characters: as long as a header field gets. What takes quadratic time on it is as slow as a hang."""


class Data:
    """Bytes that are read from the beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def below(self, bound: int) -> int:
        """Return a number that is less than `bound`."""
        length = max((bound - 1).bit_length() + 7, 8) // 8
        value = int.from_bytes(self.take(length).ljust(length, b"\0"))
        return value % bound

    def take(self, length: int) -> bytes:
        """Return the next bytes: so many, or fewer at the end."""
        start = self._place
        self._place += length
        return self._data[start : self._place]


@dataclass(frozen=True, slots=True)
class Input(Generic[T]):
    """A kind of values. `read` makes one from data."""

    read: Callable[[Data], T]

    def of(self, data: bytes) -> T:
        """Return the value that some bytes stand for."""
        return self.read(Data(data))

    def map(self, function: Callable[[T], U]) -> "Input[U]":
        """Return the values of a function."""
        return Input(lambda data: function(self.read(data)))

    def __or__(self, other: "Input[U]") -> "Input[T | U]":
        both: tuple[Input[Any], ...] = (self, other)
        return Input(lambda data: both[data.below(2)].read(data))


def just(value: T) -> Input[T]:
    """Return one value."""
    return Input(lambda data: value)


def sampled_from(values: Sequence[T]) -> Input[T]:
    """Return one of some values."""
    return Input(lambda data: values[data.below(len(values))])


def booleans() -> Input[bool]:
    """Return False or True."""
    return sampled_from((False, True))


def integers(least: int, most: int) -> Input[int]:
    """Return a number from `least` to `most`, often one near the ends or near zero."""

    def read(data: Data) -> int:
        match data.below(4):
            case 0 if least <= 0 <= most:
                return min(max(data.below(5) - 2, least), most)
            case 0 | 1:
                return min(least + data.below(3), most)
            case 2:
                return max(most - data.below(3), least)
        return least + data.below(most - least + 1)

    return Input(read)


def tuples(*inputs: Input[Any]) -> Input[Any]:
    """Return a tuple with a value of each input."""
    return Input(lambda data: tuple(one.read(data) for one in inputs))


def lists(one: Input[T], *, min_size: int = 0, max_size: int = 8) -> Input[list[T]]:
    """Return a list of values."""
    return Input(lambda data: [one.read(data) for _ in range(min_size + data.below(max_size - min_size + 1))])


def builds(function: Callable[..., T], **inputs: Input[Any]) -> Input[T]:
    """Return what a function makes of the values of inputs."""
    return Input(lambda data: function(**{name: one.read(data) for name, one in inputs.items()}))


def optional(inputs: Mapping[U, Input[T]]) -> Input[dict[U, T]]:
    """Return a dictionary with some of the keys, mostly few."""
    keys = list(inputs)

    def read(data: Data) -> dict[U, T]:
        chosen = {data.below(len(keys)) for _ in range(data.below(5))}
        return {key: inputs[key].read(data) for number, key in enumerate(keys) if number in chosen}

    return Input(read)


def binary(max_size: int) -> Input[bytes]:
    """Return bytes."""
    return Input(lambda data: data.take(data.below(max_size + 1)))


# Ranges of characters: printable ASCII first, as it is the simplest.
_LATIN = [(0x61, 26), (0x20, 95), (0x00, 32), (0x7F, 129)]
_ALL = [*_LATIN, (0x300, 0x80), (0x2000, 0x70), (0xD800, 0x800), (0xFE00, 0x100), (0x1F300, 0x400), (0x100, 0x10FF00)]


def _text(data: Data, ranges: Sequence[tuple[int, int]], length: int) -> str:
    characters = []
    for _ in range(length):
        first, count = ranges[data.below(len(ranges))]
        characters.append(chr(first + data.below(count)))
    return "".join(characters)


def latin(max_size: int = 30) -> Input[str]:
    """Return a text as a header field may have it."""
    return Input(lambda data: _text(data, _LATIN, data.below(max_size + 1)))


def text(max_size: int = 30) -> Input[str]:
    """Return a text with any characters: lone surrogates, controls and marks of direction, too."""
    return Input(lambda data: _text(data, _ALL, data.below(max_size + 1)))


HOSTILE = (
    "", " ", "\t", "\r", "\n", "\r\n", "\0", "\x7f", '"', "'", "\\", "/", "//", "..", ".", "%", "%2e%2e", "%00", "%2F",
    ",", ";", "=", "-", "+", ":", "*", "?", "#", "&", "(", ")", "[", "]", "{", "}", "<", ">", "0", "-0", "00", "1" * 20,
    "9" * 5000, "1e9", "0x1", "NaN", "inf", "1_0", "\x80", "\xa0", "\xff", "\xb2",
)  # fmt: skip
"""Pieces that parsers get wrong, in latin-1."""

BEYOND_LATIN = ("٣", "²", "é", "π", "\u202e", "\u2028", "\ud800", "\udc80", "\U0001f600", "\ufeff", "İ", "ſ", "\u212a")
"""Pieces for texts that are not header fields."""

_WORD, _CHARACTERS, _NOTHING = 0, 1, 2
_EDITS = [_WORD] * 40 + [_CHARACTERS] * 20 + [_NOTHING] * 10 + [3] * 10 + [101] * 3 + [LARGE]


def _edited(seeds: Sequence[str], words: Sequence[str], ranges: Sequence[tuple[int, int]]) -> Input[str]:
    def read(data: Data) -> str:
        text = seeds[data.below(len(seeds))]
        for _ in range(data.below(6)):
            start = data.below(len(text) + 1)
            stop = min(len(text), start + data.below(7))
            match _EDITS[data.below(len(_EDITS))]:
                case 0:
                    piece = words[data.below(len(words))]
                case 1:
                    piece = _text(data, ranges, data.below(4))
                case 2:
                    piece = ""
                case times:
                    piece = text[start:stop]
                    piece *= min(times, LARGE // max(len(piece), 1))
            text = (text[:start] + piece + text[stop:])[:LARGE]
        return text

    return Input(read)


def edited(*seeds: str, words: Sequence[str] = ()) -> Input[str]:
    """Return one of the seeds after some edits, as a header field may have it: in latin-1."""
    return _edited(seeds, (*HOSTILE, *words, *seeds), _LATIN)


def edited_text(*seeds: str, words: Sequence[str] = ()) -> Input[str]:
    """Return one of the seeds after some edits, with any characters."""
    return _edited(seeds, (*HOSTILE, *BEYOND_LATIN, *words, *seeds), _ALL)


def edited_bytes(*seeds: bytes, words: Sequence[bytes] = ()) -> Input[bytes]:
    """Return one of the seeds after some edits, as bytes."""
    texts = [seed.decode("latin-1") for seed in seeds]
    return edited(*texts, words=[word.decode("latin-1") for word in words]).map(lambda text: text.encode("latin-1"))
