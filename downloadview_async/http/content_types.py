"""Content types by file name, the same on every machine: a table pinned here over the standard library's own."""

import mimetypes
import re
from functools import lru_cache
from pathlib import PurePosixPath

DEFAULT = "application/octet-stream"

# What the standard library of one of the supported Pythons does not know, or knows by an outdated name.
_TYPES = {
    ".7z": "application/x-7z-compressed",
    ".aac": "audio/aac",
    ".apk": "application/vnd.android.package-archive",
    ".avif": "image/avif",
    ".bz2": "application/x-bzip2",
    ".br": "application/octet-stream",
    ".deb": "application/vnd.debian.binary-package",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".epub": "application/epub+zip",
    ".flac": "audio/flac",
    ".gz": "application/gzip",
    ".heic": "image/heic",
    ".ico": "image/vnd.microsoft.icon",
    ".ics": "text/calendar",
    ".iso": "application/x-iso9660-image",
    ".jar": "application/java-archive",
    ".js": "text/javascript",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".jxl": "image/jxl",
    ".log": "text/plain",
    ".m4a": "audio/mp4",
    ".m4v": "video/x-m4v",
    ".map": "application/json",
    ".md": "text/markdown",
    ".mjs": "text/javascript",
    ".mkv": "video/matroska",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".odp": "application/vnd.oasis.opendocument.presentation",
    ".ods": "application/vnd.oasis.opendocument.spreadsheet",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".ogv": "video/ogg",
    ".opus": "audio/ogg",
    ".otf": "font/otf",
    ".parquet": "application/vnd.apache.parquet",
    ".pdf": "application/pdf",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".rar": "application/vnd.rar",
    ".rtf": "application/rtf",
    ".sqlite": "application/vnd.sqlite3",
    ".svg": "image/svg+xml",
    ".svgz": "application/gzip",
    ".tar": "application/x-tar",
    ".tgz": "application/gzip",
    ".toml": "application/toml",
    ".ttf": "font/ttf",
    ".wasm": "application/wasm",
    ".wav": "audio/wav",
    ".weba": "audio/webm",
    ".webm": "video/webm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xhtml": "application/xhtml+xml",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".xml": "application/xml",
    ".xz": "application/x-xz",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".z": "application/x-compress",
    ".zip": "application/zip",
    ".zst": "application/zstd",
}
# filenames=(): never the mime.types files of the machine.
_STANDARD = mimetypes.MimeTypes(filenames=())

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
# A parameter may be empty: "text/plain;" is valid [RFC 9110 5.6.6, 8.3.1].
_MEDIA_TYPE = re.compile(
    rf'{_TOKEN}/{_TOKEN}(?:[ \t]*+;[ \t]*+(?:{_TOKEN}=(?:{_TOKEN}|"[\t \x21\x23-\x5b\x5d-\x7e]*+"))?)*+'
)
_CHARSET = re.compile(_TOKEN)

# Shown by a browser without running anything that is in them. No comma: of a list, a browser takes the last type.
_PASSIVE = re.compile(rf"(?:audio|font|image|video)/(?!.*\+xml){_TOKEN}")
_PASSIVE_TYPES = frozenset({"text/plain", "text/csv", "application/json", DEFAULT})


@lru_cache(maxsize=1024)
def content_type_for(name: str) -> str:
    """Return the Content-Type of a file called `name`: text with charset=utf-8, everything else without a charset.

    A compressed file is what it is compressed with: `x.tar.gz` is application/gzip, and has no Content-Encoding.
    """
    suffix = PurePosixPath(name).suffix.lower()
    return with_charset(_TYPES.get(suffix) or _STANDARD.types_map[True].get(suffix) or DEFAULT)


def with_charset(content_type: str, charset: str | None = None) -> str:
    """Return a content type with its charset: its own, else the one given, else utf-8 for text, else none.

    A `charset` that cannot be the name of one counts as none.
    """
    if "charset=" in content_type.lower():
        return content_type
    if charset is not None and not _CHARSET.fullmatch(charset):
        charset = None
    if charset is None and not content_type.lower().startswith("text/"):
        return content_type
    return f"{content_type}; charset={charset or 'utf-8'}"


def valid_content_type(text: str | None) -> str | None:
    """Return `text` if it is a media type with well-formed parameters, else None."""
    return text if text and len(text) <= 255 and _MEDIA_TYPE.fullmatch(text) else None


def is_active(content_type: str) -> bool:
    """Return whether a browser that shows such a file inline might run what is in it: html, svg, xml, pdf, js ...

    Everything that is not known to be passive counts as active.
    """
    essence = content_type.partition(";")[0].strip().lower()
    return essence not in _PASSIVE_TYPES and not _PASSIVE.fullmatch(essence)
