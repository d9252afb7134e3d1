"""Links that nginx verifies: their text, and what `URLSigner` verifies of them."""

import hashlib
import hmac
import time
from base64 import urlsafe_b64encode
from datetime import timedelta
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from downloadview_async import ConfigurationError, Grant, LinkExpired, LinkInvalid, SignedLinks, URLSigner
from downloadview_async.offload.render import template
from downloadview_async.policy.formats.secure_link import QUERY

KEYS = {"2026b": bytes(range(32)), "2026a": b"x" * 32}
SIGNER = URLSigner(KEYS)


def check(link: str, client: str | None = None, now: float | None = None, signer: URLSigner = SIGNER) -> Grant:
    path, _, query = link.partition("?")
    at = time.time() if now is None else now
    return signer.check(unquote_to_bytes(path), query.encode(), client, at, format="secure_link")


def test_nginx_accepts_the_same_queries() -> None:
    fields = dict.fromkeys(("prefix", "hidden", "directory", "symlinks", "types", "disposition", "headers"), "")
    assert f'($args !~ "^{QUERY}$")' in template("nginx-links.conf", **fields)


def test_the_text_is_what_nginx_hashes() -> None:
    link = SIGNER.sign("/files/a b+é%.txt", client="2001:db8::1", format="secure_link")
    path, _, query = link.partition("?")
    values = dict(pair.split("=") for pair in query.split("&"))
    assert path == "/files/a%20b%2B%C3%A9%25.txt"
    assert list(values) == ["md5", "expires", "key", "client"]
    secret = urlsafe_b64encode(hmac.digest(KEYS["2026b"], b"downloadview secure_link", "sha256")).decode().rstrip("=")
    text = f"{secret} {values['expires']} {path} 2001:db8::1 {secret}"
    assert values["md5"] == urlsafe_b64encode(hashlib.md5(text.encode()).digest()).decode().rstrip("=")
    assert check(link, "2001:db8::1").key_id == "2026b"
    for client in (None, "2001:db8::2", "-"):
        with pytest.raises(LinkInvalid):
            check(link, client)


def test_every_byte_counts() -> None:
    path, _, query = SIGNER.sign("/files/a b.pdf", client="192.0.2.1", format="secure_link").partition("?")
    checked, accepted = unquote_to_bytes(path), []
    for original, is_path in ((checked, True), (query.encode(), False)):
        for position in range(len(original)):
            for value in range(256):
                changed = original[:position] + bytes([value]) + original[position + 1 :]
                if changed == original:
                    continue
                both = (changed, query.encode()) if is_path else (checked, changed)
                try:
                    SIGNER.check(*both, "192.0.2.1", 0, format="secure_link")
                except LinkInvalid:
                    continue
                accepted.append(both)
    assert accepted == []


def test_parameters_are_neither_dropped_nor_doubled_nor_moved() -> None:
    path, _, query = SIGNER.sign("/a", client="192.0.2.1", format="secure_link").partition("?")
    pairs = query.split("&")
    for index, pair in enumerate(pairs):
        others = [*pairs[:index], *pairs[index + 1 :]]
        for changed in (others, [*pairs, pair], [pair, *pairs], [*pairs[:index], pair.upper(), *pairs[index + 1 :]]):
            with pytest.raises(LinkInvalid):
                check(f"{path}?{'&'.join(changed)}", "192.0.2.1")
    for more in ("&", "&x=1", "\n"):
        with pytest.raises(LinkInvalid):
            check(f"{path}?{query}{more}", "192.0.2.1")


def test_a_link_ends() -> None:
    link = SIGNER.sign("/a", expires_in=timedelta(hours=1), format="secure_link")
    expires = check(link).expires
    assert expires is not None
    assert abs(expires - time.time() - 3600) < 60
    assert check(link, now=expires - 1).cache_control("max-age=60", 0) == "private, no-store"
    with pytest.raises(LinkExpired):
        check(link, now=expires)
    with pytest.raises(LinkInvalid):
        check(link.replace("/a?", "/b?"), now=expires)


def test_each_key_verifies_and_each_format_is_another() -> None:
    link = URLSigner({"2026a": KEYS["2026a"]}).sign("/a", format="secure_link")
    assert check(link).key_id == "2026a"
    with pytest.raises(LinkInvalid):
        check(link, signer=URLSigner({"2026a": b"y" * 32}))
    path, _, query = link.partition("?")
    with pytest.raises(LinkInvalid):
        SIGNER.check(path.encode(), query.encode(), None, 0)
    with pytest.raises(LinkInvalid):
        check(SIGNER.sign("/a"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"filename": "b.txt"}, "cannot have filename: nginx sends the name in the path"),
        ({"attachment": False}, "cannot have attachment: nginx sends the disposition of the route"),
        ({"content_type": "text/html"}, "cannot have content_type: nginx takes it"),
        ({"shareable": True}, "cannot have shareable: nginx sends"),
        ({"uses": 1}, "cannot have uses: nginx does not count"),
        ({"client": "192.0.2.0/24"}, "the client 192.0.2.0/24: nginx compares one address"),
    ],
)
def test_options_that_nginx_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SIGNER.sign("/a", format="secure_link", **options)


def test_a_link_without_an_end() -> None:
    with pytest.raises(ValueError, match="has to expire: give expires_in or until"):
        URLSigner(KEYS, max_age=None).sign("/a", format="secure_link")


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="format is 'jwt': give one of complete, secure_link"):
        SIGNER.sign("/a", format="jwt")
    with pytest.raises(ConfigurationError, match="format is 'jwt': give one of complete, secure_link"):
        SignedLinks(SIGNER, format="jwt")


@pytest.mark.parametrize("size", [32, 63, 64, 65, 200])
def test_the_signature_of_the_default_format_is_hmac(size: int) -> None:
    secret = bytes(range(size))
    path, _, query = URLSigner({"a": secret}).sign("/files/a b").partition("?")
    signed, _, signature = query.encode().rpartition(b"&s=")
    parts = (b"downloadview 1", b"GET", unquote_to_bytes(path), signed)
    message = b"".join(len(part).to_bytes(8) + part for part in parts)
    assert signature == urlsafe_b64encode(hmac.digest(secret, message, "sha256")).rstrip(b"=")
