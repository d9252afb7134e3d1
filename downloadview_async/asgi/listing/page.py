"""`Pages`: the pages for people, as HTML that works without a script, from one answer."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from html import escape
from importlib.resources import files
from urllib.parse import parse_qsl, quote

from downloadview_async.asgi.listing.data import is_plain
from downloadview_async.asgi.listing.order import type_of
from downloadview_async.asgi.listing.query import ListingQuery, Sort, query_of
from downloadview_async.asgi.listing.view import ViewPage
from downloadview_async.errors import ConfigurationError, wrong_type
from downloadview_async.sources.listing import Entry

Downloads = Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]
"""Returns how often files were downloaded, by their names in the source. Those that never were may be left out."""

_HEADS: dict[Sort, str] = {"name": "Name", "size": "Size", "modified": "Modified", "type": "Type"}
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingPage:
    """One page of the listing of a folder.

    path: of the folder below the top, without slashes around it; empty for the top. entries: in their order, each with
    its path relative to the folder. files, folders, size: the totals of the whole folder, or of what the query selects;
    size is in bytes, of the files whose size is known, or None for a large folder. preceding, following: how many
    entries are on the pages before and after. previous, next: their relative URLs, or None. is_cut: whether a search
    below has ended at its limits. can_reorder: whether the URL may have another query, which that of a signed link may
    not. archive: the relative URL of the folder as an archive, or None. above: how many folders of the path the reader
    may not open, because a link leads only to those below. downloads: how often the files were downloaded, by their
    paths, or None if that is not shown. rows: what `Pages.rows` has yielded, or None.
    """

    path: str
    query: ListingQuery = field(default_factory=ListingQuery)
    entries: Sequence[tuple[str, Entry]]
    files: int
    folders: int
    size: int | None
    preceding: int = 0
    following: int = 0
    previous: str | None = None
    next: str | None = None
    is_cut: bool = False
    can_reorder: bool = True
    archive: str | None = None
    above: int = 0
    downloads: Mapping[str, int] | None = None
    rows: Sequence[str] | None = None

    @property
    def suffix(self) -> str:
        """The query of the URL of each entry: see `ListingQuery.suffix`."""
        return self.query.suffix


class Pages:
    """How the pages look. A subclass may replace `listing`, the page of a folder, and `view`, that of a file.

        Download(PathSource("files"), listing=Pages(title="Releases", footer="Ask Ada for older ones."))

    title: the name of the top folder. logo: the URL of an image, such as `data:image/png;base64,...` or `/logo.png`.
    footer: a text below each page. style, script: text that replaces the style sheet and the script of the library; an
    empty script leaves it out. downloads: an async function that returns how often files were downloaded, such as
    `CompletionStore.downloads_of`; the pages then show it. They do not if it raises, or takes more than a second.

    Raises `ConfigurationError` for a style or a script that could end its element.
    """

    icon = (
        "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M7 1h2v7h3l-4 "
        "4-4-4h3zM2 13h12v2H2z' fill='%230b5cad'/%3E%3C/svg%3E"
    )
    """The URL of the icon of each page."""

    def __init__(
        self,
        *,
        title: str = "Files",
        logo: str | None = None,
        footer: str | None = None,
        style: str | None = None,
        script: str | None = None,
        downloads: Downloads | None = None,
    ) -> None:
        for name, text in (("title", title), ("logo", logo), ("footer", footer), ("style", style), ("script", script)):
            if text is not None and not isinstance(text, str):
                raise wrong_type(f"{name} takes text", text)
        if downloads is not None and not callable(downloads):
            raise wrong_type("downloads takes an async function, such as CompletionStore(url).downloads_of", downloads)
        self.title = title
        self.downloads = downloads
        self.logo = logo
        self.footer = footer
        self.style = _resource("page.css") if style is None else style
        self.script = _resource("page.js") if script is None else script
        for name, code in (("style", self.style), ("script", self.script)):
            if f"</{name}" in code.lower() or "<!--" in code:
                raise ConfigurationError(f"{name} has '</{name}' or '<!--', which HTML does not allow there: remove it")

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """The headers of each page: its Content-Security-Policy allows this style and this script alone."""
        return self._headers()

    @cached_property
    def view_headers(self) -> Mapping[str, str]:
        """The headers of a view page, which also loads the file that it shows."""
        return self._headers(" media-src 'self'; frame-src 'self';", images="'self' data:")

    @staticmethod
    def visible(name: str) -> str:
        """Return a name as text. What turns the direction of a text is replaced: it makes `exe.jpg` of `gpj.exe`."""
        return _TURNS.sub("\ufffd", name)

    def _headers(self, more: str = "", images: str = "data:") -> Mapping[str, str]:
        script = f" script-src '{_hash(self.script)}';" if self.script else ""
        if self.logo is not None and not self.logo.startswith("data:"):
            images = "'self' data: https:"
        return {
            "Content-Security-Policy": f"default-src 'none'; style-src '{_hash(self.style)}';{script} "
            f"img-src {images};{more} base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    def page(self, title: str, body: str) -> str:
        """Return a whole page. title: text. body: HTML."""
        logo = "" if self.logo is None else f'<img src="{escape(self.logo)}" alt="">'
        footer = "" if not self.footer else f"<footer><p>{escape(self.footer)}</footer>"
        script = f"<script>{self.script}</script>" if self.script else ""
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{shown_name(title)}</title><link rel="icon" href="{self.icon}"><style>{self.style}</style>'
            f"<header>{logo}</header>{body}{footer}{script}"
        )

    def listing(self, page: ListingPage) -> str:
        """Return the page of a folder."""
        name = page.path.rpartition("/")[2]
        title = f"{name} - {self.title}" if name else self.title
        links = [
            None if url is None else (url, text)
            for url, text in ((page.previous, "Previous page"), (page.next, "Next page"))
        ]
        is_below = bool(name) and page.path.count("/") + 1 > page.above  # there are folders above
        body = "".join(
            (
                self.crumbs(page.path, above=page.above, suffix=page.suffix) if is_below else "",
                f"<main><h1><bdi>{shown_name(name or self.title)}</bdi></h1>",
                _search(page.query) if page.can_reorder else "",
                f"<p class=dim>{_totals(page)}",
                f"<p class=actions>{actions}" if (actions := self.folder_actions(page)) else "",
                _table(page, page.rows or self.rows(page)) if page.entries else f"<p>{_nothing(page)}",
                _bar(page.archive),
                _neighbours("Pages", *links),
                "</main>",
            )
        )
        return self.page(title, body)

    def rows(self, page: ListingPage) -> Iterator[str]:
        """Yield the HTML of each entry. Other requests get their turn meanwhile; `listing` gets it as `page.rows`."""
        return _rows(page)

    def view(self, page: ViewPage) -> str:
        """Return the view page of a file."""
        url = f"./{quote(page.name)}"
        shown = query_of("view", page.link)
        details = [page.content_type.partition(";")[0]]
        if page.size is not None:
            details.append(f"{shown_size(page.size)} ({_counted(page.size, 'byte')})")
        if page.modified is not None:
            stamp = f"{page.modified.isoformat('T', 'seconds')[:19]}Z"
            details.append(f"<time datetime={stamp}>{shown_time(page.modified)}</time>")
        if page.downloads is not None:
            details.append(_counted(page.downloads, "download"))
        if page.digest is not None:
            details.append(f"SHA-256 <code>{page.digest}</code>")
        links = [
            None if name is None else (f"./{quote(name)}{shown}", f"{text}: <bdi>{shown_name(name)}</bdi>")
            for name, text in ((page.previous, "Previous"), (page.next, "Next"))
        ]
        body = (
            f"{self.crumbs(page.path, is_file=True, above=page.above, suffix=page.suffix)}"
            f"<main><h1><bdi>{shown_name(page.name)}</bdi></h1>"
            f"<p class=dim>{' &middot; '.join(details)}"
            f"<p class=actions>{self.actions(page)}{_shown(page, url)}{_neighbours('Files', *links)}</main>"
        )
        return self.page(f"{page.name} - {self.title}", body)

    def actions(self, page: ViewPage) -> str:
        """Return the links and buttons of a view page, as HTML."""
        url = f"./{quote(page.name)}{page.suffix}"
        return f'<a href="{url}" download>Download</a> <button data-copy="{url}" hidden>Copy link</button>'

    def folder_actions(self, page: ListingPage) -> str:
        """Return the links above the entries of a folder, as HTML."""
        links = []
        if page.archive is not None:
            thing = "the whole folder " if page.query.text else ""
            links.append(f'<a href="{escape(page.archive)}" download>Download {thing}as zip</a>')
        if page.can_reorder and not all(entry.is_folder for _, entry in page.entries):
            query = replace(page.query, is_view=not page.query.is_view)
            links.append(f'<a href="{escape(query.url())}">{"View" if query.is_view else "Download"} files</a>')
        return " ".join(links)

    def crumbs(self, path: str, *, is_file: bool = False, above: int = 0, suffix: str = "") -> str:
        """Return the links to the folders above.

        path: of a folder or a file, below the top. above, suffix: as in `ListingPage`.
        """
        names = [self.title, *(path.split("/") if path else [])][above:]
        up = len(names) - 1 - is_file
        items = [
            f'<li><a href="{"../" * (up - depth) or "./"}{suffix}"><bdi>{shown_name(name)}</bdi></a>'
            for depth, name in enumerate(names[:-1])
        ]
        items.append(f"<li aria-current=page><bdi>{shown_name(names[-1])}</bdi>")
        return f"<nav aria-label=Folders><ol>{''.join(items)}</ol></nav>"


def shown_name(name: str) -> str:
    """Return a name as HTML: see `Pages.visible`."""
    return escape(_TURNS.sub("\ufffd", name), quote=False)


def shown_size(size: int) -> str:
    """Return a size for people, such as `12 KiB` or `1.5 GiB`."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS))
    value = size / 1024**power
    return f"{value:.1f} {_UNITS[power - 1]}" if value < 9.95 else f"{value:.0f} {_UNITS[power - 1]}"


def shown_time(modified: datetime) -> str:
    """Return a time in UTC as HTML reads it from a `time` element without an attribute: `2026-11-28 10:00Z`."""
    if modified.tzinfo is not UTC:
        modified = modified.astimezone(UTC)
    return f"{modified.isoformat(' ', 'minutes')[:16]}Z"


@lru_cache(maxsize=1024)
def shown_type(media_type: str) -> str:
    """Return a media type in a word for people: `image`, `pdf`, `zip`; empty for one that says nothing."""
    kind, _, name = media_type.partition("/")
    if kind != "application":
        return escape(kind)
    name = name.removeprefix("x-").removeprefix("vnd.")
    return "" if name == "octet-stream" else escape(name if len(name) <= 20 else name.rpartition(".")[2][:20])


def _shown(page: ViewPage, url: str) -> str:
    """Return the file itself as a part of its page. url: that of the file, without a query."""
    name, pdf = shown_name(page.name).replace('"', "&quot;"), url + query_of("view=pdf", page.link)
    url += page.suffix
    match page.kind:
        case "image":
            return f'<figure><img src="{url}" alt="{name}"></figure>'
        case "video" | "audio":
            return f'<figure><{page.kind} src="{url}" controls preload=metadata></{page.kind}></figure>'
        case "pdf":
            return f'<iframe src="{pdf}" title="{name}"></iframe>'
        case "text":
            cut = "<p>Only the first MiB is shown." if page.is_cut else ""
            return f"<pre tabindex=0>\n{escape(page.text, quote=False)}</pre>{cut}"
        case _:
            return "<p>There is no preview of this file."


def _rows(page: ListingPage) -> Iterator[str]:
    # a quoted URL and the parameters of a link need no escapes in HTML; without those there are no quotes either
    start, end = ('"', f'{page.suffix}">') if page.query.link else ("", f"{page.suffix}>")
    downloads, count = page.downloads, ""
    for path, entry in page.entries:
        if downloads is not None:
            count = "<td>" if entry.is_folder else f"<td class=num>{downloads.get(path, 0):,}"
        name, url = (path, path) if is_plain(path) else (shown_name(path), quote(path))
        modified = "" if entry.modified is None else f"<time>{shown_time(entry.modified)}</time>"
        if entry.is_folder:
            yield f"<tr><td><a href={start}{url}/{end}{name}/</a><td><td>{modified}<td>folder{count}"
        else:
            size = "" if entry.size is None else shown_size(entry.size)
            kind = shown_type(type_of(entry))
            yield f"<tr><td><a href={start}{url}{end}{name}</a><td>{size}<td>{modified}<td>{kind}{count}"


def _table(page: ListingPage, rows: Iterable[str]) -> str:
    heads = "".join(_head(page, sort, text) for sort, text in _HEADS.items())
    if page.downloads is not None:
        heads += "<th scope=col class=num>Downloads"
    return f"<table><thead><tr>{heads}<tbody>{chr(10).join(rows)}</table>"


def _head(page: ListingPage, sort: Sort, text: str) -> str:
    query, state = page.query, ""
    is_current = query.sort == sort
    if is_current:
        state = f" aria-sort={'descending' if query.is_descending else 'ascending'}"
    if page.can_reorder:
        url = query.url(sort=sort, is_descending=is_current and not query.is_descending)
        text = f'<a href="{escape(url)}">{text}</a>'
    return f"<th scope=col{state}>{text}"


def _search(query: ListingQuery) -> str:
    fields = [*query.order_fields(), *parse_qsl(query.suffix[1:], keep_blank_values=True)]
    hidden = "".join(f'<input type=hidden name={name} value="{escape(value)}">' for name, value in fields)
    checked = " checked" if query.is_deep else ""
    clear = f'<a href="./{query.suffix}">Show all</a>' if query.text else ""
    return (
        f'<form role=search>{hidden}<input type=search name=q value="{escape(query.text)}" placeholder="Filter" '
        f'aria-label="Filter by name"><button>Search</button><label><input type=checkbox name=deep value=1{checked}> '
        f"in the folders below</label>{clear}</form>"
    )


def _bar(archive: str | None) -> str:
    """Return what the script shows while entries are selected."""
    zip_button = f'<button data-archive="{escape(archive)}">Download as zip</button>' if archive else ""
    return f"<div class=bar hidden><span role=status></span><button>Copy links</button>{zip_button}</div>"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _totals(page: ListingPage) -> str:
    parts = [_counted(page.folders, "folder")] if page.folders else []
    if page.files:
        parts.append(_counted(page.files, "file"))
        if page.size is not None:
            parts.append(shown_size(page.size))
    text = ", ".join(parts) or "0 files"
    if page.query.text:
        text += f" match <q><bdi>{shown_name(page.query.text)}</bdi></q>"
    if page.is_cut:
        text += "; the search has ended early, because there are too many folders and files"
    if page.entries and (page.preceding or page.following):
        first = page.preceding + 1
        text += f"; {first:,} to {page.preceding + len(page.entries):,} are shown"
    return text


def _nothing(page: ListingPage) -> str:
    if page.query.text:
        return "Nothing matches."
    return "There is nothing on this page." if page.preceding or page.following else "This folder is empty."


def _neighbours(label: str, previous: tuple[str, str] | None, following: tuple[str, str] | None) -> str:
    """Return two links in a landmark with this label, or nothing. Each is a URL and HTML."""
    links = [
        f'<a rel={rel} href="{escape(link[0])}">{link[1]}</a>'
        for rel, link in (("prev", previous), ("next", following))
        if link is not None
    ]
    return f"<nav class=pages aria-label={label}>{''.join(links)}</nav>" if links else ""


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
