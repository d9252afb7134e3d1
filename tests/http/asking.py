"""A request, a file and the plan that comes of them."""

from downloadview_async.http.dates import parse_http_date
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.plan import Plan, Presentation, make_plan
from downloadview_async.http.request import DownloadRequest

MODIFIED = "Mon, 25 Dec 2023 12:00:00 GMT"
EARLIER = "Mon, 25 Dec 2023 11:59:59 GMT"
LATER = "Mon, 25 Dec 2023 12:00:01 GMT"

CONTENT = b"0123456789"
FILE = FileMetadata(size=10, etag=ETag("v1"), last_modified=parse_http_date(MODIFIED))
EMPTY = FileMetadata(size=0, etag=ETag("v1"), last_modified=parse_http_date(MODIFIED))
STREAM = FileMetadata(etag=ETag("v1"), last_modified=parse_http_date(MODIFIED))
BARE = FileMetadata(size=10)

LARGE = 256 * 1024
"""Characters: what takes quadratic time on a text of this length does not end within a test's limit."""

Fields = list[tuple[str, str]]


def request(fields: Fields, method: str = "GET") -> DownloadRequest:
    raw = [(name.lower().encode("ascii"), value.encode("latin-1")) for name, value in fields]
    return DownloadRequest.from_headers(method, raw)


def answer(
    fields: Fields | None = None,
    *,
    method: str = "GET",
    metadata: FileMetadata = FILE,
    filename: str = "ten.bin",
    attachment: bool = True,
    content_type: str | None = None,
    status: int = 200,
    headers: dict[str, str] | None = None,
    now: float | None = None,
) -> Plan:
    return make_plan(
        request(fields or [], method),
        metadata,
        Presentation(filename=filename, attachment=attachment, content_type=content_type),
        status=status,
        headers=headers,
        now=now,
    )


def body(plan: Plan, content: bytes = CONTENT) -> bytes:
    """The bytes that a client gets by the plan, of a file with this content."""
    return b"".join(
        content if piece is None else content[piece.start : piece.stop] if isinstance(piece, ByteRange) else piece
        for piece in plan.body
    )
