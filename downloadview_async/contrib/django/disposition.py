"""`content_disposition`: the names of files as django-downloadview gives them to clients."""

import re
import unicodedata
from functools import lru_cache
from urllib.parse import quote

from downloadview_async.http.disposition import MAX_BYTES, client_filename, is_device_name
from downloadview_async.http.disposition import content_disposition as disposition_of


@lru_cache(maxsize=1024)
def content_disposition(filename: str, attachment: bool = True) -> str:
    """Return the value of Content-Disposition.

    It differs from other responses of this library in `filename`, the ASCII name for old clients. That is as in
    django-downloadview: with `_` for blanks, and with escaped quotes and backslashes.
    """
    ours = disposition_of(filename, attachment=attachment)
    name = shown = client_filename(filename)
    # For a name with a quote, django-downloadview keeps backslashes. A longer one has no such fallback, and normalizing
    # it may take quadratic time.
    if '"' in filename and len(filename) <= 4 * MAX_BYTES:
        shown = filename.rstrip("/").rpartition("/")[2]
        shown = "".join(character for character in shown if unicodedata.category(character) not in ("Cc", "Cf", "Cs"))
    ascii_name = unicodedata.normalize("NFKD", shown).encode("ascii", "ignore").decode("ascii").strip()
    fallback = re.sub(r"\s", "_", ascii_name).replace("/", "_").replace("\\", "\\\\").replace('"', '\\"')
    stem = ascii_name.rpartition(".")[0] or ascii_name
    is_whole = name.isascii() or (re.search("[0-9A-Za-z]", stem) and not ascii_name.startswith("."))
    is_safe = is_whole and fallback.strip(". ") and len(fallback) <= MAX_BYTES and not is_device_name(fallback)
    if not is_safe or f'filename="{fallback}"' in ours:
        return ours
    exact = quote(name, safe="!#$&+-.^_`|~")
    return f"{'attachment' if attachment else 'inline'}; filename=\"{fallback}\"; filename*=UTF-8''{exact}"
