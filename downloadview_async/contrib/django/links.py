"""Signed links in Django: the signer that the settings make, and the link by which a request has come.

A link is that of `policy/signing.py`, but its signature is in the parameter `X-Signature`, before the others: projects
may look for this name, which django-downloadview has given to it.
"""

import asyncio
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signing import BadSignature, SignatureExpired, TimestampSigner
from django.http import HttpRequest
from django.utils.crypto import salted_hmac
from django.utils.module_loading import import_string

from downloadview_async.contrib.django.event_loop import for_request, run_in_background
from downloadview_async.errors import ConfigurationError, LinkExpired, LinkInvalid
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.signing import URLSigner
from downloadview_async.policy.stores.from_url import grant_store_from_url
from downloadview_async.policy.uses import USE, Use

PARAMETER = "X-Signature"
"""The query parameter with the signature."""

SALT = "downloadview_async.contrib.django.links"
"""The salt of links: no other token that the project signs by the same key is accepted as a link."""

_OPTIONS = {"KEYS", "STORE", "WHEN_STORE_FAILS", "STORE_TIMEOUT", "SESSION_SECONDS", "CLIENT_OF"}
_SIGNATURE = re.compile(r"[A-Za-z0-9_-]{43}")  # that of an old link has colons
_REQUEST = "downloadview_async.django_request"
_LINK = "_downloadview_link"

_made: tuple[Any, URLSigner] | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """The link of a request: what it grants, and what counts the download, which is None if nothing does."""

    grant: Grant
    use: Use | None = None

    def cache_control(self, chosen: str | None) -> str:
        """Return the Cache-Control of the answer. chosen: what the application has chosen."""
        return self.grant.cache_control(chosen, time.time())


def sign_url(url: str, **options: Any) -> str:
    """Return a link to a view with `signature_required`: its URL, with a signature in the query.

    url: such as `reverse("report", args=[3])`, or an absolute URL. options: those of `URLSigner.sign`, except `query`
    and `base`: expires_in, until, filename, attachment, content_type, client, shareable, uses.

    Raises `ValueError` for an argument that is refused.
    """
    parts = urlsplit(url)
    link = link_signer().sign(unquote(parts.path, errors="strict"), query=parts.query, **options)
    path, _, query = link.partition("?")
    signed, _, signature = query.rpartition("&s=")
    place = signed.rfind("&k=") + 1
    query = f"{signed[:place]}{PARAMETER}={signature}&{signed[place:]}"
    return urlunsplit((parts.scheme, parts.netloc, path, query, parts.fragment))


def revoke_link(link: str) -> None:
    """Revoke a link: from the next request on, it gives 403. A download that runs goes on.

    link: the link itself, or its id, or the id of a key, whose links are all revoked. Needs a store.

    Raises what `URLSigner.revoke` raises.
    """
    run_in_background(link_signer().revoke(_id_of(link)))


async def arevoke_link(link: str) -> None:
    """Do what `revoke_link` does, in an event loop."""
    # A loop that runs a command ends with it, and so would the connections of the store.
    await asyncio.to_thread(revoke_link, link)


def _id_of(link: str) -> str:
    return parse_qs(urlsplit(link).query).get("i", [link])[-1]


def verify(request: HttpRequest) -> Grant:
    """Return what the link of a request grants, and note it in the request, so that its response is like that.

    Raises `LinkInvalid`, `LinkExpired`, or `SourceUnavailable` if the store does not answer.
    """
    if (grant := _old_grant(request)) is not None:
        return _noted(request, Link(grant))
    scope = _scope_of(request)
    grant = run_in_background(link_signer().verify(scope))
    return _noted(request, Link(grant, scope.get(USE)))


async def averify(request: HttpRequest) -> Grant:
    """Do what `verify` does, in an event loop."""
    if (grant := _old_grant(request)) is not None:
        return _noted(request, Link(grant))
    scope = _scope_of(request)
    grant = await for_request(request, link_signer().verify(scope))
    return _noted(request, Link(grant, scope.get(USE)))


def link_of(request: HttpRequest) -> Link | None:
    """Return the link by which a request has come, if `signature_required` has verified one."""
    link: Link | None = getattr(request, _LINK, None)
    return link


def _noted(request: HttpRequest, link: Link) -> Grant:
    setattr(request, _LINK, link)
    return link.grant


def _scope_of(request: HttpRequest) -> dict[str, Any]:
    """Return what the signer needs of a request, as a scope of ASGI.

    The path is the one that the URLconf gets. The client is that in REMOTE_ADDR, which a middleware may have set.
    """
    address = request.META.get("REMOTE_ADDR")
    return {
        "type": "http",
        "method": request.method,
        "path": request.path,
        "query_string": _query_of(request.META.get("QUERY_STRING", "")).encode(),
        "client": (address, 0) if address else None,
        _REQUEST: request,
    }


def _query_of(query: str) -> str:
    """Return a query as the signer has made it. One that `sign_url` cannot have made is returned unchanged."""
    before, _, rest = query.rpartition(f"{PARAMETER}=")
    signature, _, link = rest.partition("&")
    if before[-1:] in ("", "&") and link.startswith("k=") and "&k=" not in link and _SIGNATURE.fullmatch(signature):
        return f"{before}{link}&s={signature}"
    return query


def _old_grant(request: HttpRequest) -> Grant | None:
    """Return what a link grants that django-downloadview or an earlier version has made, or None for another link.

    Such a link has the path, the time and the signature of Django's `TimestampSigner` in `X-Signature`.

    Raises `LinkExpired` and `LinkInvalid`.
    """
    value = request.GET.get(PARAMETER)
    if value is None or _SIGNATURE.fullmatch(value):
        return None
    try:
        # the signed path is percent-encoded as in the URL, request.path is decoded
        path = unquote(_unsigned(value), errors="strict")
    except SignatureExpired as exc:
        raise LinkExpired("the signature has expired") from exc
    except (BadSignature, ValueError) as exc:
        raise LinkInvalid("there is no valid signature") from exc
    if path != request.path:
        raise LinkInvalid("the signature is of another path")
    return Grant()


def _unsigned(signed: str) -> str:
    expiration = getattr(settings, "DOWNLOADVIEW_URL_EXPIRATION", None)
    try:
        return TimestampSigner(salt=SALT).unsign(signed, max_age=expiration)
    except SignatureExpired:
        raise
    except BadSignature:
        if getattr(settings, "DOWNLOADVIEW_UNSALTED_LINKS", False) is not True:
            raise
    return TimestampSigner().unsign(signed, max_age=expiration)


def link_signer() -> URLSigner:
    """Return the signer of links, as the settings are now. Raises `ImproperlyConfigured`."""
    global _made
    secrets = (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)
    options = getattr(settings, "DOWNLOADVIEW_LINKS", {})
    chosen = secrets, getattr(settings, "DOWNLOADVIEW_URL_EXPIRATION", None), options
    if _made is None or _made[0] != chosen:
        _made = chosen, _signer(*chosen)
    return _made[1]


def _signer(secrets: tuple[str | bytes, ...], expiration: Any, options: Any) -> URLSigner:
    if not isinstance(options, Mapping) or not _OPTIONS.issuperset(options):
        raise ImproperlyConfigured(
            f"settings.DOWNLOADVIEW_LINKS has to be a dictionary with some of these keys: {', '.join(sorted(_OPTIONS))}"
        )
    given = {name.lower(): value for name, value in options.items()}
    keys = given.pop("keys", None) or dict(map(_derived, secrets))
    is_time = expiration is None or isinstance(expiration, timedelta)
    try:
        if isinstance(store := given.get("store"), str | os.PathLike):
            given["store"] = grant_store_from_url(os.fspath(store))
        if (client_of := given.get("client_of")) is not None:
            of_request = import_string(client_of) if isinstance(client_of, str) else client_of
            given["client_of"] = lambda scope: of_request(scope[_REQUEST])
        return URLSigner(keys, max_age=expiration if is_time else timedelta(seconds=expiration), **given)
    except (ConfigurationError, ImportError, TypeError, AttributeError) as exc:
        raise ImproperlyConfigured(f"settings.DOWNLOADVIEW_LINKS or DOWNLOADVIEW_URL_EXPIRATION: {exc}") from exc


def _derived(secret: str | bytes) -> tuple[str, bytes]:
    """Return the id of a key and its secret, both derived from a key of Django."""
    name = salted_hmac(f"{SALT}.id", "", secret=secret, algorithm="sha256").hexdigest()[:8]
    return name, salted_hmac(f"{SALT}.key", "", secret=secret, algorithm="sha256").digest()
