"""`ListingQuery`: what the query of a listing's URL asks for. A parameter with another value is ignored."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from downloadview_async.http.negotiation import preferred_type

Format = Literal["html", "json", "ndjson"]
Sort = Literal["name", "size", "modified", "type"]

FORMATS: dict[str, Format] = {"text/html": "html", "application/json": "json", "application/x-ndjson": "ndjson"}
"""The media types of a listing; the first is that for clients without a preference."""

SORTS: tuple[Sort, ...] = ("name", "size", "modified", "type")

MAX_TEXT = 1024
"""Characters of a `q`, and of the name in a place, above which it is ignored."""

_MAX_FIELDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingQuery:
    """The parameters of a listing.

    text: only names that contain it are listed; upper and lower case are the same. is_deep: whether entries of the
    folders below are listed too. is_descending: the order; folders are always before files. after, before: the place of
    an entry, after or before which the page begins or ends; see `order.place_of`. is_view: whether the names lead to
    the view pages of the files instead of the files. link: the parameters of the link to a folder by which the reader
    has come; each URL of the page carries them.
    """

    format: Format = "html"
    text: str = ""
    is_deep: bool = False
    sort: Sort = "name"
    is_descending: bool = False
    after: str | None = None
    before: str | None = None
    is_view: bool = False
    link: str = ""

    @classmethod
    def of(cls, query_string: bytes, accept: str | None, link: str = "") -> "ListingQuery":
        """Return what a query string and an Accept header ask for; `format` in the query wins over the header."""
        values = fields_of(query_string)
        text = values.get("q", "").strip()
        text = text if len(text) <= MAX_TEXT else ""
        sort: Sort = next((name for name in SORTS if name == values.get("sort")), SORTS[0])
        chosen = next((name for name in FORMATS.values() if name == values.get("format")), None)
        return cls(
            format=chosen or FORMATS[preferred_type(accept, tuple(FORMATS))],
            text=text,
            is_deep=bool(text) and values.get("deep") == "1",
            sort=sort,
            is_descending=values.get("order") == "desc",
            after=values.get("after"),
            before=values.get("before"),
            is_view=values.get("view") in ("", "1"),
            link=link,
        )

    def url(self, *, sort: Sort | None = None, is_descending: bool | None = None, **place: str) -> str:
        """Return the relative URL of this listing in another order, or at another place: `after=`, `before=`."""
        order = (sort or self.sort, self.is_descending if is_descending is None else is_descending)
        parameters = urlencode([*self.filters(), *_order_fields(*order), *place.items()])
        return query_of(parameters, self.suffix.removeprefix("?")) or "./"

    @property
    def suffix(self) -> str:
        """The query of the URL of each entry: of a view page, with the parameters of a link to a folder, or nothing."""
        return query_of("view" if self.is_view else "", self.link)

    def filters(self) -> list[tuple[str, str]]:
        """Return the parameters that choose the entries and their format."""
        fields: list[tuple[str, str]] = [("format", self.format)] if self.format != "html" else []
        if self.text:
            fields.append(("q", self.text))
        return [*fields, ("deep", "1")] if self.is_deep else fields

    def order_fields(self) -> list[tuple[str, str]]:
        """Return the parameters of the order, without those that are the default."""
        return _order_fields(self.sort, self.is_descending)


def query_of(*parameters: str) -> str:
    """Return the query with some parameters, and with the question mark before them; nothing if all are empty."""
    query = "&".join(filter(None, parameters))
    return f"?{query}" if query else ""


def _order_fields(sort: Sort, is_descending: bool) -> list[tuple[str, str]]:
    fields: list[tuple[str, str]] = [] if sort == "name" and not is_descending else [("sort", sort)]
    return [*fields, ("order", "desc")] if is_descending else fields


def fields_of(query_string: bytes) -> dict[str, str]:
    """Return the first value of each parameter; none at all of a query with more than a hundred."""
    try:
        pairs: Iterable[tuple[str, str]] = parse_qsl(
            query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_FIELDS
        )
    except ValueError:
        return {}
    values: dict[str, str] = {}
    for name, value in pairs:
        values.setdefault(name, value)
    return values
