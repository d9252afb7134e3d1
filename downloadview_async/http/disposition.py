"""Content-Disposition, RFC 6266: every file name that is sent to a client passes through here."""

import re
import unicodedata
from functools import lru_cache
from urllib.parse import quote

MAX_BYTES = 255
"""The longest name, in bytes of UTF-8, that common file systems accept."""

_NORMALIZED = 2 * MAX_BYTES
"""Characters at either end of a name of which `MAX_BYTES` bytes are left, whatever is joined: at most four are one."""

DEVICE_NAME = r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(?:\.[^/]*)?"
"""A regular expression, to be used without case: names that Windows takes for devices, whatever their extension."""

_DEVICES = re.compile(DEVICE_NAME, re.IGNORECASE)
_FORBIDDEN_ON_WINDOWS = re.compile('[<>:"|?*]')
_ATTR_CHAR = "!#$&+-.^_`|~"  # besides letters and digits [RFC 8187 3.2.1]; urllib's quote keeps "_.-~" anyway
_JOINERS = "\u200c\u200d"  # invisible, but part of how words and emoji are written
# Invisible at either end of a name: all of Unicode's space separators (Zs), and the joiners.
_BLANKS = " \u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))) + _JOINERS


def is_device_name(name: str) -> bool:
    """Return whether Windows takes `name` for a device, whatever its extension: `CON`, `nul.txt`, `COM1`."""
    return _DEVICES.fullmatch(name) is not None


def client_filename(name: str) -> str:
    """Return a base name for the client that any system can save; it is never empty.

    Path parts, control characters, bidirectional and other invisible characters, lone surrogates, and blanks and dots
    at the end are removed. A Windows device gets an underscore in front. The name has at most `MAX_BYTES` bytes of
    UTF-8 and is cut before its extension.
    """
    name = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(
        character
        for character in name.encode("utf-8", "replace").decode("utf-8")
        if unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cn", "Co") or character in _JOINERS
    )
    if len(name) > 2 * _NORMALIZED:  # normalizing takes quadratic time if one character has very many accents
        name = name[:_NORMALIZED] + name[-_NORMALIZED:]
    return _fitted(unicodedata.normalize("NFC", name)) or "download"


def _fitted(name: str) -> str:
    """Return `name` without blanks around it, cut to `MAX_BYTES`, and changed if it is a device; it may be empty."""
    name = _cut(name.lstrip(_BLANKS).rstrip(_BLANKS + "."))
    return _cut(f"_{name}") if is_device_name(name) else name


def _cut(name: str) -> str:
    if len(name.encode()) <= MAX_BYTES:
        return name
    stem, dot, extension = name.rpartition(".")
    suffix = f"{dot}{extension}"
    if not stem or len(suffix.encode()) > MAX_BYTES // 4:
        stem, suffix = name, ""
    stem = stem.encode()[: MAX_BYTES - len(suffix.encode())].decode("utf-8", "ignore")
    return stem.rstrip(_BLANKS + ".") + suffix


def _ascii_fallback(name: str) -> str:
    """Return the nearest ASCII name: without accents, with the stem `download` if no letter or digit is left."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    # A quoted-string could escape the quote, but clients differ in how they read that [RFC 6266 appendix D], and they
    # differ on a percent sign as well. The exact name is in filename*.
    ascii_name = _FORBIDDEN_ON_WINDOWS.sub("_", ascii_name.replace("\\", "_").replace("/", "_").replace("%", "_"))
    stem, dot, extension = ascii_name.rpartition(".")
    if not dot:
        stem, extension = extension, ""
    if not name.isascii() and not re.search("[0-9A-Za-z]", stem):
        stem = "download"
    elif stem.startswith(".") and not name.startswith("."):
        stem = f"download{stem}"  # the name must not become that of a hidden file
    return _fitted(f"{stem.strip()}{dot}{extension}")


@lru_cache(maxsize=1024)
def content_disposition(filename: str, *, attachment: bool = True) -> str:
    """Return the value of Content-Disposition for a `filename` with any characters.

    It has an ASCII fallback for old clients, and the exact name by RFC 8187 if the two differ.
    """
    name = client_filename(filename)
    fallback = _ascii_fallback(name)
    value = f'{"attachment" if attachment else "inline"}; filename="{fallback}"'
    if fallback != name:
        value += f"; filename*=UTF-8''{quote(name, safe=_ATTR_CHAR)}"
    return value
