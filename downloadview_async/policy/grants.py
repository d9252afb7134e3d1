"""`Grant`: what a request may have, and how the file is presented to it."""

from dataclasses import dataclass

from downloadview_async.errors import wrong_type
from downloadview_async.http.content_types import valid_content_type

GRANT = "downloadview_async.grant"
"""The key of a `Grant` in an ASGI scope: `DownloadResponse` presents the file like that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A request may have the file. A value that is None leaves the choice to the application and the file.

    filename: the name under which the client saves the file. attachment: whether the client saves the file or shows it.
    content_type: the whole Content-Type. expires: until when, in seconds since 1970 UTC; a download that has begun by
    then goes on. is_shareable: whether shared caches may keep the answer until it expires. link_id, key_id: of the link
    that grants this, and of the key that has signed it. uses: how many downloads the link allows in all. folder: the
    path of the folder that the link grants with all that is below it, such as `/files/2026/`; None: it grants one URL.
    user: the name of the user who sends the request.

    Raises `ValueError` for a filename that is not text, and for an invalid content type.
    """

    filename: str | None = None
    attachment: bool | None = None
    content_type: str | None = None
    expires: int | None = None
    is_shareable: bool = False
    link_id: str | None = None
    key_id: str | None = None
    uses: int | None = None
    folder: str | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        """Refuse here, where the decision is made, what could not be sent once it is made."""
        if self.filename is not None and not isinstance(self.filename, str):
            raise ValueError(f"filename is {self.filename!r}: give text")
        if self.expires is not None and not isinstance(self.expires, int | float):
            raise wrong_type("expires takes seconds since the epoch, such as time.timestamp()", self.expires)
        if self.content_type is not None and valid_content_type(self.content_type) is None:
            raise ValueError(
                f"{self.content_type!r} is not a content type: write one such as 'text/html; charset=utf-8'"
            )

    @property
    def is_of_plain_link(self) -> bool:
        """Whether a link grants this, and changes nothing in the answer but Cache-Control, as each link does."""
        return (
            self.link_id is not None
            and self.filename is None
            and self.attachment is None
            and self.content_type is None
            and not self.is_shareable
            and self.uses is None
            and self.user is None
        )

    def cache_control(self, chosen: str | None, now: float) -> str:
        """Return the Cache-Control of the answer.

        chosen: what the application has chosen. It applies to answers without a link, whose default is `private`. An
        answer to a link is `private, no-store`, or, if it may be shared, is kept at most until the link expires.
        """
        if self.link_id is None:
            return chosen or "private"
        if not self.is_shareable:
            return "private, no-store"
        if self.expires is None:
            return chosen or "public"
        return f"public, max-age={max(0, int(self.expires - now))}"
