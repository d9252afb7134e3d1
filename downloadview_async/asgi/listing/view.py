"""The view page of a file, `?view`: what a browser can show safely, with links to the files before and after it.

Nothing in a file runs. Text is put into the page as text, whatever it is, images and media are loaded as such, and a
PDF is shown by the viewer of the browser, in a frame with a policy that allows no scripts.
"""

import codecs
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from downloadview_async.asgi.listing.query import fields_of, query_of
from downloadview_async.http.content_types import content_type_for, is_active
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.sources.base import AsyncFile, closing_stream
from downloadview_async.sources.digests.known import Digests

MAX_TEXT_BYTES = 1 << 20
"""Bytes of a text that are shown."""

PDF_POLICY = "default-src 'none'; object-src 'self'; style-src 'unsafe-inline'"
"""The Content-Security-Policy of a PDF in a view page: a sandbox would keep the viewer of Chromium from starting."""

Kind = Literal["image", "video", "audio", "pdf", "text", "other"]

_TEXTS = frozenset(
    f"application/{name}"
    for name in ("json", "xml", "javascript", "x-sh", "x-yaml", "yaml", "toml", "x-ndjson", "sql", "x-httpd-php")
)
_NOT_CHARSETS = frozenset({"punycode", "idna", "unicode-escape", "raw-unicode-escape", "undefined"})
"""Codecs of Python for other things than files: punycode takes half a minute for a MiB."""
_IMAGES = frozenset(f"image/{name}" for name in ("png", "jpeg", "gif", "webp", "avif", "bmp", "x-icon", "svg+xml"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPage:
    """The view page of one file.

    path: of the file below the top. kind: how it is shown. content_type: its media type. size: in bytes, or None.
    modified: None if it is not known. text: of a file of the kind `text`, at most its first MiB. is_cut: whether the
    text is only a part of the file. digest: its SHA-256 in hexadecimal, if that is known. previous, next: the names of
    the files before and after it, or None. link: the parameters of the link to a folder by which the reader has come.
    above: how many folders of the path that link does not lead to. downloads: how often the file was downloaded, or
    None if that is not shown.
    """

    path: str
    kind: Kind
    content_type: str
    size: int | None = None
    modified: datetime | None = None
    text: str = ""
    is_cut: bool = False
    digest: str | None = None
    previous: str | None = None
    next: str | None = None
    link: str = ""
    above: int = 0
    downloads: int | None = None

    @property
    def suffix(self) -> str:
        """The end of the URL of the file: the parameters of a link to a folder, or nothing."""
        return query_of(self.link)

    @property
    def name(self) -> str:
        """The last segment of the path."""
        return self.path.rpartition("/")[2]


def view_of(query_string: bytes) -> Literal["page", "pdf"] | None:
    """Return whether a query asks for the view page, for the PDF that is in it, or for the file itself (None)."""
    value = fields_of(query_string).get("view") if b"view" in query_string else None
    if value == "pdf":
        return "pdf"
    return "page" if value in ("", "1") else None


def kind_of(content_type: str) -> Kind:
    """Return how a file with a media type is shown."""
    essence = content_type.partition(";")[0].strip().lower()
    main = essence.partition("/")[0]
    if essence in _IMAGES:
        return "image"
    if essence == "application/pdf":
        return "pdf"
    if main in ("video", "audio") and not is_active(essence):
        return "video" if main == "video" else "audio"
    if main == "text" or essence in _TEXTS or essence.endswith(("+json", "+xml")):
        return "text"
    return "other"


async def view_page_of(
    file: AsyncFile, path: str, content_type: str | None, digests: Digests | None = None, key: str = ""
) -> ViewPage:
    """Return the view page of a file without its neighbours.

    content_type: instead of that of the file. digests: those of the source, in which the file is called `key`.

    Raises what `AsyncFile.open` raises, and `FileError` if the text cannot be read.
    """
    async with file.open() as opened:
        metadata = opened.metadata if digests is None else await digests.find(key, opened)
        media_type = content_type or metadata.content_type or content_type_for(file.name)
        kind = kind_of(media_type)
        content = bytearray()
        is_coded = any(name == "content-encoding" for name, _ in metadata.headers)
        if kind == "text" and is_coded:
            kind = "other"
        if kind == "text" and metadata.size != 0:
            async with closing_stream(opened.stream(_beginning(metadata))) as chunks:
                async for chunk in chunks:
                    content += chunk
                    if len(content) > MAX_TEXT_BYTES:
                        break
    modified = None if metadata.last_modified is None else datetime.fromtimestamp(metadata.last_modified, UTC)
    is_cut = len(content) > MAX_TEXT_BYTES or (metadata.size or 0) > MAX_TEXT_BYTES
    return ViewPage(
        path=path,
        kind=kind,
        content_type=media_type,
        size=metadata.size,
        modified=modified,
        text=_decoded(bytes(content[:MAX_TEXT_BYTES]), media_type) if kind == "text" else "",
        is_cut=is_cut and kind == "text",
        digest=next((value.hex() for name, value in metadata.digests if name == "sha-256"), None),
    )


def _beginning(metadata: FileMetadata) -> ByteRange | None:
    if metadata.size is None or not metadata.accept_ranges:
        return None
    return ByteRange(0, min(metadata.size, MAX_TEXT_BYTES))


def _decoded(content: bytes, media_type: str) -> str:
    """Return a text by the charset of its media type, by a byte order mark, or as UTF-8."""
    _, _, charset = media_type.lower().partition("charset=")
    names = [charset.partition(";")[0].strip(" \"'") or "utf-8", "utf-8"]
    if content.startswith(codecs.BOM_UTF8):
        names.insert(0, "utf-8-sig")
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        names.insert(0, "utf-16")
    for name in names:
        try:
            if codecs.lookup(name).name not in _NOT_CHARSETS:
                return content.decode(name, "replace")
        except (LookupError, UnicodeError, ValueError):  # LookupError: `base64` and other codecs are not of texts
            continue
    return ""
