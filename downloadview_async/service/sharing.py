"""`Sharing`: a user of a route makes a signed link to a file or a folder, at its URL with `?share`."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape
from urllib.parse import parse_qs, parse_qsl, unquote_to_bytes, urlsplit

import anyio
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import Access, FileError, URLSigner, download_error, note_facts
from downloadview_async.service.pages import ServicePages

MAX_BODY = 8192
"""Bytes of a form."""

_LIVES = {"1 hour": 3600, "1 day": 86_400, "7 days": 7 * 86_400, "30 days": 30 * 86_400, "1 year": 365 * 86_400}
_LEFT_OUT = (b"accept", b"content-length", b"content-type", b"range", b"transfer-encoding")


class Sharing:
    """Answers `?share` for the users of a route, and passes all other requests on to its `Download`.

    The link is made only if the same user may have the file, as `download` decides. That to a folder leads to all that
    is below it. access: of the users alone. max_age: seconds that a link may be valid. counts: whether the store of
    links can count uses.
    """

    def __init__(
        self, download: ASGIApp, *, access: Access, signer: URLSigner, pages: ServicePages, max_age: float, counts: bool
    ) -> None:
        self.download = download
        """The application that answers all other requests."""
        self._access = access
        self._signer = signer
        self._pages = pages
        self._counts = counts
        self._lives = {text: age for text, age in _LIVES.items() if age < max_age}
        self._lives[_life_text(int(max_age))] = int(max_age)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD", "POST") or not _is_share(scope):
            await self.download(scope, receive, send)
            return
        body = await _body_of(receive) if scope["method"] == "POST" else b""
        if body is None:
            await Response("Content Too Large", 413, {"Connection": "close"}, "text/plain")(scope, receive, send)
            return
        receive = _ended(receive)  # checking a password listens for the client to leave, and must not take the form
        request = Request(scope, receive)
        if scope["method"] == "POST" and not is_from_our_page(request):
            await Response("Forbidden", 403, {"Cache-Control": "private, no-store"}, "text/plain")(scope, receive, send)
            return
        try:
            allowed = await self._access(request, _path_of(scope))
        except FileError as exc:
            await (await download_error(request, exc))(scope, receive, send)
            return
        if not allowed or await self._status(scope) != 200:
            # the answer that a download gets, which tells nothing about links
            await self.download({**scope, "method": "GET", "query_string": b""}, receive, send)
            return
        page = self._made(request, _fields_of(body)) if scope["method"] == "POST" else self._form(scope)
        note_facts(scope, kind="share")  # `_status` has noted how the file would be sent
        headers = {**self._pages.headers, "Cache-Control": "private, no-store", "Referrer-Policy": "same-origin"}
        await HTMLResponse(page, headers=headers)(scope, receive, send)

    async def _status(self, scope: Scope) -> int:
        """Return the status of the file or folder for this user, as `Download` decides about it."""
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        headers = [(name, value) for name, value in scope["headers"] if not name.startswith(b"if-")]
        headers = [(name, value) for name, value in headers if name not in _LEFT_OUT]
        probe = {**scope, "method": "HEAD", "query_string": b"", "headers": headers, "extensions": {}}
        await self.download(probe, _ended(), send)
        return status

    def _form(self, scope: Scope, problem: str = "") -> str:
        name = self._pages.visible(_name_of(scope))
        lives = "".join(f"<option value={age}>{text}</option>" for text, age in self._lives.items())
        uses = (
            "<p><label>How many downloads <input name=uses type=number min=1 max=1000000 placeholder=any></label>"
            if self._counts
            else ""
        )
        of_file = (
            f'{uses}<p><label>Name of the saved file <input name=name value="{escape(name)}" maxlength=255></label>'
        )
        of_folder = "<p class=dim>The link leads to this folder and to everything below it."
        return self._page(
            scope,
            f"<p role=alert>{escape(problem)}</p>"
            * bool(problem)
            + f"<form method=post><p><label>Valid for <select name=expires>{lives}</select></label>"
            f"{of_folder if _is_folder(scope) else of_file}<p><button>Make a link</button> {_back(scope)}</form>",
        )

    def _made(self, request: Request, fields: dict[str, str]) -> str:
        scope = request.scope
        age, name = fields.get("expires", ""), _name_of(scope)
        is_folder = _is_folder(scope)
        uses = fields.get("uses", "").strip() if self._counts and not is_folder else ""
        filename = "" if is_folder else fields.get("name", "").strip()
        if age not in map(str, self._lives.values()):
            return self._form(scope, "Choose for how long the link is valid.")
        if uses and not (uses.isascii() and uses.isdigit() and 1 <= int(uses[:8]) <= 1_000_000 and len(uses) < 8):
            return self._form(scope, "Give a number of downloads from 1 to 1000000, or none.")
        try:
            link = self._signer.sign(
                _path_of(scope),
                expires_in=timedelta(seconds=int(age)),
                uses=int(uses) if uses else None,
                filename=filename if filename not in ("", name, self._pages.visible(name)) else None,
                below=is_folder,
                base=_base_of(request),
            )
        except ValueError as exc:
            return self._form(scope, f"No link can be made: {exc}")
        values = parse_qs(urlsplit(link).query)
        until = datetime.fromtimestamp(int(values["e"][0])).astimezone().isoformat(" ", "minutes")
        counted = f", for {uses} download{'' if uses == '1' else 's'}" if uses else ""
        return self._page(
            scope,
            f'<p><label>Link <input readonly value="{escape(link)}" size=60></label> '
            f'<button data-copy="{escape(link)}" hidden>Copy link</button>'
            f"<p class=dim>Valid until {until}{counted}. Its id is <code>{escape(values['i'][0])}</code>.</p>"
            f"{_qr_code(link)}<p>{_back(scope)}",
        )

    def _page(self, scope: Scope, body: str) -> str:
        name = self._pages.visible(_name_of(scope) or self._pages.title)
        return self._pages.page(f"Share {name}", f"<main><h1>Share <bdi>{escape(name)}</bdi></h1>{body}</main>")


def is_from_our_page(request: Request) -> bool:
    """Return whether a form was sent by a page of this server: another site could use the password that browsers keep.

    Browsers tell it in Sec-Fetch-Site, or where they do not, as with plain HTTP, in Origin.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin", "")
    scheme, _, host = origin.partition("://")
    return scheme in ("http", "https") and bool(host) and host == request.headers.get("host")


def users_in(access: Sequence[str]) -> list[str]:
    """Return the names of the users in the `access` of a route."""
    return [one.removeprefix("user:") for one in access if one.startswith("user:")]


def _is_share(scope: Scope) -> bool:
    query = scope["query_string"]
    return bool(query in (b"share", b"share=", b"share=1"))


async def _body_of(receive: Receive) -> bytes | None:
    """Return the body of a request; None if it is longer than that of a form."""
    body: bytes = b""
    while True:
        message: Message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body


def _fields_of(body: bytes) -> dict[str, str]:
    """Return the fields of a form; none at all of a form with more than ours can have."""
    try:
        return dict(parse_qsl(body.decode("latin-1"), max_num_fields=20))
    except ValueError:
        return {}


def _ended(receive: Receive | None = None) -> Receive:
    """Return the `receive` of a request whose body has been read. receive: tells when the client leaves."""
    is_read = False

    async def receive_end() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if receive is None:
            await anyio.sleep_forever()
            raise AssertionError
        return await receive()

    return receive_end


def _path_of(scope: Scope) -> str:
    """Return the path as `URLSigner.verify` reads it. One that is not UTF-8 gets the 404 of `Download`."""
    sent = scope.get("raw_path")
    return str(scope["path"]) if sent is None else unquote_to_bytes(sent.partition(b"?")[0]).decode(errors="replace")


def _is_folder(scope: Scope) -> bool:
    return _path_of(scope).endswith("/")


def _name_of(scope: Scope) -> str:
    return _path_of(scope).removesuffix("/").rpartition("/")[2]


def _back(scope: Scope) -> str:
    return f'<a href="{"./" if _is_folder(scope) else "?view"}">Back</a>'


def _base_of(request: Request) -> str:
    """Return the scheme and the host by which the user has reached the page."""
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host}" if host else ""


def _life_text(seconds: int) -> str:
    """Return a time in the largest unit of which it is a multiple, such as `36 hours`."""
    units = (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next((unit, length) for unit, length in units if seconds % length == 0)
    count = seconds // length
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _qr_code(link: str) -> str:
    """Return the link as an inline SVG; nothing for one that is too long."""
    import segno  # it takes 1 MiB, and most services make no code

    try:
        code = segno.make(link, error="m", micro=False)
    except segno.DataOverflowError:
        return ""
    return f"<figure>{code.svg_inline(omitsize=True, light='#fff', title='QR code of the link')}</figure>"
