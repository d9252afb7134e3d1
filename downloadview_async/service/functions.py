"""`function_of`: a function that the settings name, such as one that generates files or decides about access."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from downloadview_async.service.settings import Settings

HOOK = "hook:"
"""Begins the name of a function where a setting may have other values, too."""


def function_of(settings: Settings, key: str, name: str) -> Callable[..., Any]:
    """Return the function named `module:function`, and put the directory of the settings on the import path.

    name: with or without `HOOK` before it.

    Raises `ConfigurationError` for `key` if there is no such function.
    """
    directory = str(settings.origin.directory)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    name = name.removeprefix(HOOK)
    module, _, path = name.partition(":")
    try:
        imported: Any = importlib.import_module(module)
        for attribute in path.split("."):
            imported = getattr(imported, attribute)
    except (Exception, SystemExit) as exc:  # importing a module may raise anything
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise settings.error(
            key,
            f"{name!r} cannot be imported ({reason}): give module:function; the module must be in {directory} or "
            "installed",
        ) from exc
    if not callable(imported):
        raise settings.error(key, f"{name!r} is not a function: give module:function")
    function: Callable[..., Any] = imported
    return function
