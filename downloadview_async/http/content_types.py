"""Content types by file name, the same on every machine: a table here, and the table of the standard library."""

import mimetypes
import re
from collections.abc import Mapping

from downloadview_async.errors import wrong_type
from downloadview_async.http.fields import TOKEN_CHAR

DEFAULT = "application/octet-stream"

# Types that the standard library of a supported Python does not know, or knows by an outdated or a wrong name. They are
# those of IANA's registry, or where it has none, the names that nginx and Debian use and that players know.
_TYPES = {
    ".3g2": "video/3gpp2",
    ".3gp": "video/3gpp",
    ".3gpp": "video/3gpp",
    ".3gpp2": "video/3gpp2",
    ".3mf": "model/3mf",
    ".7z": "application/x-7z-compressed",
    ".aac": "audio/aac",
    ".amr": "audio/amr",
    ".apk": "application/vnd.android.package-archive",
    ".apng": "image/apng",
    ".arrow": "application/vnd.apache.arrow.file",
    ".arrows": "application/vnd.apache.arrow.stream",
    ".asf": "video/x-ms-asf",
    ".ass": "text/x-ssa",
    ".asx": "video/x-ms-asf",
    ".atom": "application/atom+xml",
    ".avif": "image/avif",
    ".avifs": "image/avif",
    ".azw3": "application/vnd.amazon.mobi8-ebook",
    ".br": "application/octet-stream",
    ".bz2": "application/x-bzip2",
    ".cab": "application/vnd.ms-cab-compressed",
    ".caf": "audio/x-caf",
    ".cbr": "application/vnd.comicbook-rar",
    ".cbz": "application/vnd.comicbook+zip",
    ".cco": "application/x-cocoa",
    ".cer": "application/pkix-cert",
    ".cjs": "text/javascript",
    ".cmfa": "audio/mp4",
    ".cmfv": "video/mp4",
    ".crl": "application/pkix-crl",
    ".crt": "application/x-x509-ca-cert",
    ".dcm": "application/dicom",
    ".deb": "application/vnd.debian.binary-package",
    ".der": "application/x-x509-ca-cert",
    ".dfxp": "application/ttml+xml",
    ".djv": "image/vnd.djvu",
    ".djvu": "image/vnd.djvu",
    ".dll": "application/vnd.microsoft.portable-executable",
    ".dmg": "application/x-apple-diskimage",
    ".dng": "image/x-adobe-dng",
    ".docm": "application/vnd.ms-word.document.macroEnabled.12",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".dotx": "application/vnd.openxmlformats-officedocument.wordprocessingml.template",
    ".dwg": "image/vnd.dwg",
    ".dxf": "image/vnd.dxf",
    ".ear": "application/java-archive",
    ".eot": "application/vnd.ms-fontobject",
    ".epub": "application/epub+zip",
    ".exe": "application/vnd.microsoft.portable-executable",
    ".exr": "image/aces",
    ".f4v": "video/mp4",
    ".feather": "application/vnd.apache.arrow.file",
    ".fits": "application/fits",
    ".flac": "audio/flac",
    ".flatpakref": "application/vnd.flatpak.ref",
    ".flv": "video/x-flv",
    ".geojson": "application/geo+json",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".gpkg": "application/geopackage+sqlite3",
    ".gpx": "application/gpx+xml",
    ".gz": "application/gzip",
    ".heic": "image/heic",
    ".heics": "image/heic-sequence",
    ".heif": "image/heif",
    ".hqx": "application/mac-binhex40",
    ".htc": "text/x-component",
    ".ico": "image/vnd.microsoft.icon",
    ".ics": "text/calendar",
    ".ipynb": "application/x-ipynb+json",
    ".iso": "application/x-iso9660-image",
    ".jad": "text/vnd.sun.j2me.app-descriptor",
    ".jar": "application/java-archive",
    ".jardiff": "application/x-java-archive-diff",
    ".jfif": "image/jpeg",
    ".jng": "image/x-jng",
    ".jnlp": "application/x-java-jnlp-file",
    ".jp2": "image/jp2",
    ".jpm": "image/jpm",
    ".jpx": "image/jpx",
    ".js": "text/javascript",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".jsonld": "application/ld+json",
    ".jxl": "image/jxl",
    ".jxr": "image/jxr",
    ".kar": "audio/midi",
    ".kml": "application/vnd.google-earth.kml+xml",
    ".kmz": "application/vnd.google-earth.kmz",
    ".ktx": "image/ktx",
    ".ktx2": "image/ktx2",
    ".log": "text/plain",
    ".lz4": "application/x-lz4",
    ".lzma": "application/x-lzma",
    ".m2t": "video/mp2t",
    ".m2ts": "video/mp2t",
    ".m2v": "video/mpeg",
    ".m4a": "audio/mp4",
    ".m4b": "audio/mp4",
    ".m4p": "audio/mp4",
    ".m4r": "audio/mp4",
    ".m4s": "video/iso.segment",
    ".m4v": "video/x-m4v",
    ".map": "application/json",
    ".md": "text/markdown",
    ".meta4": "application/metalink4+xml",
    ".metalink": "application/metalink+xml",
    ".mid": "audio/midi",
    ".midi": "audio/midi",
    ".mjs": "text/javascript",
    ".mk3d": "video/matroska-3d",
    ".mka": "audio/matroska",
    ".mkv": "video/matroska",
    ".mml": "application/mathml+xml",
    ".mng": "video/x-mng",
    ".mobi": "application/x-mobipocket-ebook",
    ".mobileconfig": "application/x-apple-aspen-config",
    ".mobileprovision": "application/x-apple-aspen-mobileprovision",
    ".mp2": "audio/mpeg",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".mp4v": "video/mp4",
    ".mpd": "application/dash+xml",
    ".mpg4": "video/mp4",
    ".mpga": "audio/mpeg",
    ".msi": "application/x-msi",
    ".msp": "application/x-msi",
    ".mts": "video/mp2t",
    ".numbers": "application/vnd.apple.numbers",
    ".odb": "application/vnd.oasis.opendocument.base",
    ".odf": "application/vnd.oasis.opendocument.formula",
    ".odg": "application/vnd.oasis.opendocument.graphics",
    ".odp": "application/vnd.oasis.opendocument.presentation",
    ".ods": "application/vnd.oasis.opendocument.spreadsheet",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".ogv": "video/ogg",
    ".ogx": "application/ogg",
    ".opus": "audio/ogg",
    ".otf": "font/otf",
    ".otg": "application/vnd.oasis.opendocument.graphics-template",
    ".otp": "application/vnd.oasis.opendocument.presentation-template",
    ".ots": "application/vnd.oasis.opendocument.spreadsheet-template",
    ".ott": "application/vnd.oasis.opendocument.text-template",
    ".oxps": "application/oxps",
    ".pages": "application/vnd.apple.pages",
    ".parquet": "application/vnd.apache.parquet",
    ".pdb": "application/x-pilot",
    ".pdf": "application/pdf",
    ".pem": "application/x-x509-ca-cert",
    ".pkpass": "application/vnd.apple.pkpass",
    ".pkpasses": "application/vnd.apple.pkpasses",
    ".pm": "application/x-perl",
    ".potx": "application/vnd.openxmlformats-officedocument.presentationml.template",
    ".ppsx": "application/vnd.openxmlformats-officedocument.presentationml.slideshow",
    ".pptm": "application/vnd.ms-powerpoint.presentation.macroEnabled.12",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".prc": "application/x-pilot",
    ".psd": "image/vnd.adobe.photoshop",
    ".qcow2": "application/x-qemu-disk",
    ".rar": "application/vnd.rar",
    ".rpm": "application/x-redhat-package-manager",
    ".rss": "application/rss+xml",
    ".rtf": "application/rtf",
    ".run": "application/x-makeself",
    ".sea": "application/x-sea",
    ".shtml": "text/html",
    ".sig": "application/pgp-signature",
    ".sit": "application/x-stuffit",
    ".snap": "application/vnd.snap",
    ".spx": "audio/ogg",
    ".sql": "application/sql",
    ".sqlite": "application/vnd.sqlite3",
    ".srt": "application/x-subrip",
    ".ssa": "text/x-ssa",
    ".step": "model/step",
    ".stl": "model/stl",
    ".stp": "model/step",
    ".svg": "image/svg+xml",
    ".svgz": "application/gzip",
    ".tar": "application/x-tar",
    ".tgz": "application/gzip",
    ".tk": "application/x-tcl",
    ".toml": "application/toml",
    ".torrent": "application/x-bittorrent",
    ".ts": "video/mp2t",
    ".ttc": "font/collection",
    ".ttf": "font/ttf",
    ".ttml": "application/ttml+xml",
    ".udeb": "application/vnd.debian.binary-package",
    ".usda": "model/vnd.usda",
    ".usdz": "model/vnd.usdz+zip",
    ".vcf": "text/vcard",
    ".vtt": "text/vtt",
    ".war": "application/java-archive",
    ".wasm": "application/wasm",
    ".wav": "audio/wav",
    ".wbmp": "image/vnd.wap.wbmp",
    ".weba": "audio/webm",
    ".webm": "video/webm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".wma": "audio/x-ms-wma",
    ".wml": "text/vnd.wap.wml",
    ".wmlc": "application/vnd.wap.wmlc",
    ".wmv": "video/x-ms-wmv",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xhtml": "application/xhtml+xml",
    ".xlsb": "application/vnd.ms-excel.sheet.binary.macroEnabled.12",
    ".xlsm": "application/vnd.ms-excel.sheet.macroEnabled.12",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".xltx": "application/vnd.openxmlformats-officedocument.spreadsheetml.template",
    ".xml": "application/xml",
    ".xpi": "application/x-xpinstall",
    ".xps": "application/vnd.ms-xpsdocument",
    ".xspf": "application/xspf+xml",
    ".xz": "application/x-xz",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".z": "application/x-compress",
    ".zip": "application/zip",
    ".zst": "application/zstd",
    ".zsync": "application/x-zsync",
}
# filenames=(): without the mime.types files of the machine
_STANDARD = mimetypes.MimeTypes(filenames=())

_TOKEN = f"{TOKEN_CHAR}++"
# A parameter may be empty: "text/plain;" is valid [RFC 9110 5.6.6, 8.3.1].
_MEDIA_TYPE = re.compile(
    rf'{_TOKEN}/{_TOKEN}(?:[ \t]*+;[ \t]*+(?:{_TOKEN}=(?:{_TOKEN}|"[\t \x21\x23-\x5b\x5d-\x7e]*+"))?)*+'
)
_SUFFIX = re.compile(r"\.[^./\\\x00-\x20\x7f]+")
_CHARSET = re.compile(_TOKEN)

# A browser shows these without running anything in them. A comma is not allowed: a browser takes the last of a list.
_PASSIVE = re.compile(rf"(?:audio|font|image|video)/(?!.*\+xml){_TOKEN}")
# Browsers save other applications than these, which they show, run, or read as whatever the bytes look like.
_SAVED = re.compile(rf"application/(?!.*(?:xml|html|pdf|script|flash|unknown)){_TOKEN}")
_PASSIVE_TYPES = frozenset({"text/plain", "text/csv", "application/json", DEFAULT})


_added: dict[str, str] = {}
changes = 0
"""How often types were added or removed: an answer that was kept before may have another type."""


def add_content_types(types: Mapping[str, str | None]) -> None:
    """Add content types by suffix, such as `{".gcode": "text/x-gcode"}`, for the whole process.

    Call it when the application starts: answers that have been sent do not change. A suffix is one dot and the text
    after the last dot of a name, in any case; an added type wins over the table. None removes a type that was added.

    Raises `ValueError` for a suffix without a dot, with a second dot or with a slash, and for a type that is not a
    media type.
    """
    if not hasattr(types, "items"):
        raise wrong_type("add_content_types takes a dictionary, such as {'.gcode': 'text/x-gcode'}", types)
    for suffix, content_type in types.items():
        if content_type is None:
            continue
        if not isinstance(suffix, str) or not isinstance(content_type, str):
            raise wrong_type(f"the content type of {suffix!r} is text, such as 'text/x-gcode'", content_type)
        if _SUFFIX.fullmatch(suffix) is None:
            raise ValueError(f"{suffix!r} is not a suffix of a file name: write one dot first, as in '.gcode'")
        if valid_content_type(content_type) is None:
            raise ValueError(f"{content_type!r} is not a media type: write it as in 'text/x-gcode'")
    for suffix, content_type in types.items():
        if content_type is None:
            _added.pop(suffix.lower(), None)
        else:
            _added[suffix.lower()] = content_type
    global changes
    changes += 1


def content_types() -> dict[str, str]:
    """Return the Content-Type of each suffix, such as `.txt`, in lower case."""
    known = {suffix.lower(): kind for suffix, kind in _STANDARD.types_map[True].items()} | _TYPES | _added
    return {suffix: with_charset(kind) for suffix, kind in known.items()}


def content_type_for(name: str) -> str:
    """Return the Content-Type of a file called `name`: text with charset=utf-8, everything else without a charset.

    A compressed file has the type of its compression: `x.tar.gz` is application/gzip, without a Content-Encoding.
    """
    stem, _, extension = name.rstrip("/").rpartition("/")[2].rpartition(".")
    suffix = f".{extension}".lower() if stem and extension else ""
    return with_charset(_added.get(suffix) or _TYPES.get(suffix) or _STANDARD.types_map[True].get(suffix) or DEFAULT)


def with_charset(content_type: str, charset: str | None = None) -> str:
    """Return a content type with a charset: the one it has, else the given one, else utf-8 for text, else none.

    A `charset` that is not a valid name is ignored.
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
    """Return whether a browser that shows such a file inline might run something in it: html, svg, xml, pdf, js ...

    Every type that is not known to be passive counts as active.
    """
    essence = content_type.partition(";")[0].strip().lower()
    return essence not in _PASSIVE_TYPES and not _PASSIVE.fullmatch(essence)


def is_rendered(content_type: str) -> bool:
    """Return whether a browser might run something in such a file if nobody tells it to save the file.

    Unlike for `is_active`, archives and other types that browsers always save are safe.
    """
    return is_active(content_type) and not _SAVED.fullmatch(content_type.partition(";")[0].strip().lower())
