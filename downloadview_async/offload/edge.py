"""`EdgeRedirect`: redirects clients to a store or CDN by its signed URLs."""

import logging
import os
import time
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit

from downloadview_async.errors import ConfigurationError, WrongType
from downloadview_async.http.content_types import is_rendered
from downloadview_async.offload.base import RedirectHeaders
from downloadview_async.offload.signers.base import RenewingSigner, Signer
from downloadview_async.sources.base import AsyncFile, object_url_of
from downloadview_async.sources.object_store import ObjectStorage

logger = logging.getLogger("downloadview_async")

_PRESENTED = ("content-disposition", "content-type")


class EdgeRedirect:
    """Redirects clients to a store or CDN: `Download(source, redirect=EdgeRedirect("/srv/files", signer))`.

    place: where this application has the files: an absolute directory, an http or https URL, or an `ObjectStorage`. The
    edge has the same files below its URL, under the same names. Files of other places are not redirected.
    signer: see `signer_of`.
    expires: seconds that a URL is valid. A client may cache the redirect for half of what is left of them.

    checks: whether each redirect opens the file first, so that a missing file gives a 404 here. With False, a redirect
    costs no request to a store: the edge answers for a missing file, and the type is that of the file's name.

    A warning in the log tells which headers the URLs cannot carry; files that a browser might run are not redirected
    then, unless the edge gets them from this application.

    Raises `WrongType` for anything that is not a signer, and `ConfigurationError` for an invalid place and a time that
    the signer does not allow.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | ObjectStorage,
        signer: Signer,
        *,
        expires: float = 600,
        checks: bool = True,
    ) -> None:
        if not isinstance(signer, Signer):
            # the value may be a secret, so the message does not show it
            raise WrongType("EdgeRedirect takes a signer, such as signer_of('bunny', ...)")
        if not 1 <= expires <= signer.max_seconds:
            raise ConfigurationError(
                f"expires is {expires!r}: a URL of {signer!r} can be valid for 1 to {signer.max_seconds} seconds"
            )
        self._is_store = isinstance(place, ObjectStorage)
        self._below = _place_of(place)
        self._signer = signer
        self._renews = signer if isinstance(signer, RenewingSigner) else None
        self._expires = int(expires)
        self.is_quick = self._renews is None
        self.is_checked = checks
        lost = [name.title() for name in _PRESENTED if name not in signer.carries]
        if lost and not signer.is_served_alike:
            logger.warning(
                "%r: its URLs cannot carry %s: clients get what the server behind it sends, and files that a browser "
                "might run are sent from here",
                signer,
                " and ".join(lost),
            )

    async def headers_for(self, file: AsyncFile, described: Mapping[str, str]) -> RedirectHeaders | None:
        """Return Location, Cache-Control and Set-Cookie of the redirect, or None: send the file yourself.

        Raises `SourceUnavailable` if the key of the signer has expired, and there is no other one.
        """
        path = _path_below(self._below, object_url_of(file) if self._is_store else file.location)
        if path is None or not self._may_send(described):
            return None
        if self._renews is not None:
            await self._renews.renew()
        carried = {name: described[name] for name in self._signer.carries if name in described}
        signed = self._signer.sign(path, carried, now=time.time(), seconds=self._expires)
        if signed is None:
            return None
        is_stored = "no-store" not in described.get("cache-control", "").lower()
        kept = f"max-age={signed.seconds // 2}" if is_stored else "no-store"
        headers: dict[str, str | tuple[str, ...]] = {"location": signed.url, "cache-control": f"private, {kept}"}
        if signed.cookies:
            headers["set-cookie"] = signed.cookies
        return headers

    def _may_send(self, described: Mapping[str, str]) -> bool:
        """Return whether the edge sends the headers that protect the client, and decode it."""
        carries = self._signer.carries
        if self._signer.is_served_alike:
            return True
        if "content-security-policy" in described:
            return False
        if described.get("content-encoding") == "identity" and "content-encoding" not in carries:
            return False  # it would send a coding that clients cannot use
        # the edge might show a file that our Content-Disposition has the client save
        return carries.issuperset(_PRESENTED) or not is_rendered(described.get("content-type", ""))


def _path_below(place: str, location: str | None) -> str | None:
    """Return the percent-encoded path of a file below a place; None for a file of another place.

    None as well for a path with empty segments, `.` or `..`, which clients and servers on the way may change.
    """
    if location is None or not location.startswith(place):
        return None
    rest = location[len(place) :]
    if place[0] == "/":
        rest = quote(os.fsencode(rest))
    if not {"", ".", ".."}.isdisjoint(unquote(rest).split("/")) or "?" in rest:
        return None
    return rest


def _place_of(place: str | os.PathLike[str] | ObjectStorage) -> str:
    """Return what the locations of all files of a place begin with, up to a slash. Raises `ConfigurationError`."""
    if isinstance(place, ObjectStorage):
        return f"{place.url.rstrip('/')}/"
    path = os.fsdecode(place)
    if os.path.isabs(path):
        return f"{os.path.normpath(path).rstrip('/')}/"
    if urlsplit(path).scheme not in ("http", "https"):
        raise ConfigurationError(
            f"{path!r} is not a place of files: give an absolute directory, an http or https URL, or an ObjectStorage"
        )
    return f"{path.rstrip('/')}/"
