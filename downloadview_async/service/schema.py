"""Reads the types of the settings: the keys of a table, the values that a key takes, the error about another value."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import msgspec
from msgspec import Meta, Struct

from downloadview_async.service.origin import Origin


def parts_of(kind: Any) -> Iterator[Any]:
    """Yield the type of a setting and, recursively, its arguments."""
    yield kind
    for part in get_args(kind):
        yield from parts_of(part)


def description_of(kind: Any) -> str | None:
    """Return which values a setting of this type takes, or None if the type does not say it."""
    return next((part.description for part in parts_of(kind) if isinstance(part, Meta) and part.description), None)


def fields_of(kind: Any) -> dict[str, Any]:
    """Return the names and types of the fields of the Struct in a type, its tag among them, or an empty dict."""
    struct = next((part for part in parts_of(kind) if isinstance(part, type) and issubclass(part, Struct)), None)
    if struct is None:
        return {}
    tag = struct.__struct_config__.tag_field
    return {field.name: field.type for field in msgspec.structs.fields(struct)} | ({tag: str} if tag else {})


def converted(origin: Origin, key: str, value: Any, kind: Any, *, because: str = "") -> Any:
    """Return the value of a key as its type. because: as in `Origin.error`. Raises `ConfigurationError`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise origin.error(*_explained(key, str(exc), kind), because=because) from None
    except UnicodeEncodeError as exc:
        raise origin.error(key, f"{exc.object!r} is not UTF-8: correct it") from None
    except RecursionError:
        raise origin.error(key, "tables or lists are nested too deeply: write them flat") from None


def _explained(key: str, message: str, kind: Any) -> tuple[str, str]:
    """Return the full key and the problem for an error message of msgspec."""
    problem, _, place = message.partition(" - at `$")
    place = place.rstrip("`")
    if missing := re.fullmatch("Object missing required field `(.*)`", problem):
        problem, place = "missing", f"{place}.{missing[1]}"
    for name in re.findall(r"\w*[a-z_]\w*", place):
        kind = fields_of(kind).get(name)
    if unknown := re.fullmatch("Object contains unknown field `(.*)`", problem):
        return f"{key}{place}.{unknown[1]}", f"unknown key: {instead_of(unknown[1], fields_of(kind))}"
    problem = re.sub("Expected `str` matching regex .*", "the text has the wrong form", problem)
    problem = (problem[:1].lower() + problem[1:]).replace("`", "")
    takes = description_of(kind)
    return key + place, f"{problem}: give {takes}" if takes else f"{problem}: correct it"


def instead_of(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name, which tells what to write instead."""
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, 1):
        return f"did you mean {close[0]!r}?"
    return f"use one of {', '.join(known)}" if known else "none is defined yet, so add one"
