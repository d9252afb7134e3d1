"""Reads the settings from a TOML file, DOWNLOADVIEW_* environment variables and the command line.

Variables override the file, and the command line overrides both. Every mistake raises a `ConfigurationError` of one
line, which says where the mistake is, in which key, what is wrong and what to do.
"""

import codecs
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from downloadview_async import ConfigurationError
from downloadview_async.service.origin import COMMAND_LINE, NO_FILE, Origin
from downloadview_async.service.schema import fields_of
from downloadview_async.service.settings import TABLES, Settings
from downloadview_async.service.settings_checks import checked_settings
from downloadview_async.service.source_settings import SOURCE_TYPES

PREFIX = "DOWNLOADVIEW_"
CONFIG = "DOWNLOADVIEW_CONFIG"
"""The environment variable with the path of the settings file."""

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""The environment variable with the directory of the secrets: systemd sets it, see systemd.exec(5)."""
DEFAULT = Path("downloadview.toml")
"""The settings file if the variable is not set."""

_OF_UVICORN = "FORWARDED_ALLOW_IPS"
"""The variable that uvicorn reads if `server.forwarded_allow_ips` is not set."""
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def load_settings(
    file: str | os.PathLike[str] | None,
    *,
    environ: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings of a TOML file, overridden by DOWNLOADVIEW_* variables in `environ` and by `options`.

    file: None to use only variables and options. environ: in the name of a variable, `__` separates the parts of a key,
    as in DOWNLOADVIEW_SERVER__PORT; its value is text, or JSON for a whole table or list. A file with the name of a
    variable in the directory `CREDENTIALS` takes the place of a variable that is not set. options: keys of `[server]`
    from the command line.

    Relative paths begin at the directory of the file, or without a file at the current directory; those in `options`
    always begin at the current directory. No file or directory in the settings is opened.

    Raises `ConfigurationError`.
    """
    label = NO_FILE if file is None else os.fspath(file)
    try:
        directory = Path.cwd() if file is None else Path(file).absolute().parent
    except OSError as exc:
        raise ConfigurationError(
            f"{label}: the current directory cannot be found ({exc.strerror}), in which relative paths begin: start "
            f"in a directory that exists"
        ) from exc
    data = {} if file is None else _read(label)
    origins = _apply_variables(data, {**_credentials(environ), **environ})
    if options and isinstance(server := data.setdefault("server", {}), dict):  # another type is refused below
        server |= options
        origins |= dict.fromkeys((f"server.{name}" for name in options), COMMAND_LINE)
    settings = checked_settings(Origin(label, directory, origins), data)
    if settings.server.forwarded_allow_ips is None and _OF_UVICORN in environ:
        origins["server.forwarded_allow_ips"] = _OF_UVICORN
    return settings


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            content = opened.read()
    except OSError as exc:
        raise ConfigurationError(
            f"{file or repr(file)}: the settings file cannot be read ({exc.strerror}): give the path of a readable "
            f"TOML file with --config or {CONFIG}"
        ) from exc
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            problem = f"the file begins with a byte order mark of {encoding}: save it as UTF-8 without one"
            raise ConfigurationError(f"{file}: not valid TOML: {problem}")
    try:
        return tomllib.loads(content.decode())
    except RecursionError as exc:
        raise ConfigurationError(f"{file}: tables or lists are nested too deeply: write them flat") from exc
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        problem = f"line {line} is not UTF-8: save the file as UTF-8"
        raise ConfigurationError(f"{file}: not valid TOML: {problem}") from exc
    except ValueError as exc:  # invalid TOML, or an integer with thousands of digits
        raise ConfigurationError(f"{file}: not valid TOML: {exc}: {_instead_of(str(exc), content)}") from exc


def _instead_of(problem: str, content: bytes) -> str:
    """Return the end of an error about a file that is not TOML, which tells what to write instead."""
    if b"\0" in content:
        return "it has NUL characters, as UTF-16 has: save the file as UTF-8"
    if re.search(r"hex value|Unescaped '\\'", problem):
        return r"a backslash in double quotes begins an escape: write \\, or write the text in single quotes"
    at = re.search("at line ([0-9]+), column ([0-9]+)", problem)
    lines = content.decode().split("\n")
    rest = lines[int(at[1]) - 1][int(at[2]) - 1 :] if at else ""
    if rest[:1] in ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019"):
        return 'write straight quotes: "'
    if content.lstrip().startswith(b"{"):
        return "it looks like JSON: write [server], and below it such as port = 8000"
    if problem.startswith("Expected '='") and rest.startswith(":"):
        return "write = between a key and its value, not :"
    if problem.startswith("Invalid value") and re.match(r"[^\W\d]|[/~.$]", rest):
        return 'write a text in quotes, such as "files"'
    return "correct the file"


def _credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets that are in files with the names of variables. The last line end of each is left out."""
    directory = environ.get(CREDENTIALS)
    if not directory:
        return {}
    try:
        names = [name for name in os.listdir(directory) if name.startswith(PREFIX) and name != CONFIG]
        return {name: Path(directory, name).read_text(encoding="utf-8").removesuffix("\n") for name in names}
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "a file is not UTF-8"
        raise ConfigurationError(
            f"{CREDENTIALS}: the secrets in {directory} cannot be read ({reason}): let this user read them, as text"
        ) from exc


def _apply_variables(data: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Write the variables into `data`, and return the variable that set each key."""
    origins: dict[str, str] = {}
    tables = {**TABLES, "routes": None}  # a list is set as a whole
    if isinstance(sources := data.get("sources"), dict):
        tables |= {f"sources__{name}": _kind_of_source(source) for name, source in sources.items()}
    known = [variable for key, kind in tables.items() for variable in _variables_of(key, kind)]
    names = [name for name in environ if name.startswith(PREFIX) and name != CONFIG]
    for name in sorted(names, key=lambda name: (name.count("__"), name)):  # whole tables first, then their keys
        *parents, last = name.removeprefix(PREFIX).split("__")
        table: Any = data
        keys: list[str] = []
        meant = [other for other in known if re.sub("_+", "_", other) == re.sub("_+", "_", name)]
        if (
            not parents
            and last.lower() not in TABLES
            and (inner := [other for other in known if other.endswith(f"__{last}")])
        ):
            raise ConfigurationError(f"{name}: {last.lower()}: unknown key: did you mean {' or '.join(inner)}?")
        if meant and name not in meant and not environ[name].lstrip().startswith("{"):  # not a whole new source
            raise ConfigurationError(f"{name}: unknown key: did you mean {meant[0]}?")
        for part in parents:
            keys.append(_spelled(part, table))
            if keys[-1] not in table and len(keys) == (2 if keys[0] in TABLES else 1):
                origins[".".join(keys)] = name  # the file has no such table: the variable makes it
            table = table.setdefault(keys[-1], {})
            if not isinstance(table, dict):
                whole = PREFIX + "__".join(keys).upper()
                raise ConfigurationError(f"{name}: {'.'.join(keys)} is not a table: set all of it, as JSON, in {whole}")
        keys.append(_spelled(last, table))
        table[keys[-1]] = _value(name, environ[name], _kind_of(keys, data))
        origins[".".join(keys)] = name
    return origins


def _variables_of(key: str, kind: Any) -> Iterator[str]:
    """Yield the names of the variables for a key of this type and, if it is a table, for the keys in it."""
    yield PREFIX + key.upper().replace("-", "_")
    for name, inner in fields_of(kind).items():
        yield from _variables_of(f"{key}__{name}", inner)


def _kind_of_source(source: Any) -> type[Struct] | None:
    return SOURCE_TYPES.get(str(source.get("type"))) if isinstance(source, dict) else None


def _spelled(part: str, table: Mapping[str, Any]) -> str:
    """Return the key of a table that matches a part of a variable's name: MY_FILES matches `my-files`."""
    for key in table:
        if key.upper().replace("-", "_") == part.upper():
            return key
    return part.lower()


def _value(name: str, text: str, kind: Any) -> Any:
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except RecursionError as exc:
            raise ConfigurationError(f"{name}: objects or lists are nested too deeply: write them flat") from exc
        except ValueError as exc:
            raise ConfigurationError(f"{name}: not valid JSON: {exc}: correct it") from exc
    try:
        return msgspec.convert(text, kind, strict=False)
    except (msgspec.ValidationError, UnicodeEncodeError):
        return text  # refused later, like any other wrong value


def _kind_of(keys: Sequence[str], data: Mapping[str, Any]) -> Any:
    """Return the type of a setting, by which the text of its variable is parsed; str if the setting is unknown."""
    kind = TABLES.get(keys[0])
    names = list(keys[1:])
    if keys[0] == "sources" and names:
        kind = _kind_of_source(data["sources"].get(names.pop(0)))
    for name in names:
        kind = fields_of(kind).get(name)
    return str if kind is None else kind
