"""The list of fuzz targets: each has an input, and a check of what our code makes of it.

A check fails by any exception. So a parser may raise only the error that it documents, and that a check catches.
`regressions` are inputs that once failed; they are tried first, in every run.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.fuzz.inputs import Input

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One thing to fuzz. within: gives what all checks of a run share, such as a directory."""

    name: str
    module: str
    input: Input[Any]
    check: Callable[[Any, Any], None]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    regressions: Sequence[Any] = ()


TARGETS: dict[str, Target] = {}


def target(one: Input[T], *, regressions: Sequence[T] = ()) -> Callable[[Callable[[T], None]], None]:
    """Register a check of a value as a target."""

    def register(check: Callable[[T], None]) -> None:
        def alone(value: T, _: object) -> None:
            check(value)

        _add(check, input=one, check=alone, regressions=regressions)

    return register


def target_within(
    one: Input[T], within: Callable[[], AbstractContextManager[R]], *, regressions: Sequence[T] = ()
) -> Callable[[Callable[[T, R], None]], None]:
    """Register a check that gets what `within` gives, too."""

    def register(check: Callable[[T, R], None]) -> None:
        _add(check, input=one, check=check, within=within, regressions=regressions)

    return register


def _add(function: Any, **options: Any) -> None:
    name = function.__name__
    assert name not in TARGETS, f"two targets are called {name}"
    TARGETS[name] = Target(name=name, module=function.__module__, **options)


def is_printable_ascii(text: str) -> bool:
    """Return whether a text can stand on one line of a log or in one field of a head."""
    return text.isascii() and text.isprintable()
