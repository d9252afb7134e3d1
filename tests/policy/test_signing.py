"""Links: what is signed comes back, and nothing that differs from it in any byte is a link."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async import ConfigurationError, Grant, LinkExpired, LinkInvalid, URLSigner
from tests.policy.tampering import tampered

SECRET = bytes(range(32))
SIGNER = URLSigner({"2026a": SECRET})
EVERYTHING: dict[str, Any] = {
    "expires_in": timedelta(hours=1),
    "filename": "Q3 & Q4 – naïve.pdf",
    "attachment": True,
    "content_type": "text/plain; charset=utf-8",
    "client": "203.0.113.0/24",
    "shareable": True,
}
CLIENT = "203.0.113.9"


def parts_of(url: str) -> tuple[bytes, bytes]:
    path, _, query = url.partition("?")
    return unquote_to_bytes(path), query.encode()


def check(url: str, *, signer: URLSigner = SIGNER, client: str | None = CLIENT, now: float | None = None) -> Grant:
    return signer.check(*parts_of(url), client, time.time() if now is None else now)


def test_what_is_signed_is_granted() -> None:
    began = int(time.time())
    url = SIGNER.sign("/files/a b.pdf", **EVERYTHING)
    grant = check(url)
    assert grant.expires is not None
    assert began + 3600 <= grant.expires <= time.time() + 3600
    assert (grant.filename, grant.attachment) == (EVERYTHING["filename"], True)
    assert (grant.content_type, grant.is_shareable) == (EVERYTHING["content_type"], True)
    assert grant.key_id == "2026a"
    assert grant.link_id == dict(parse_qsl(urlsplit(url).query))["i"]
    assert urlsplit(url).path == "/files/a%20b.pdf"


def test_what_is_not_signed_is_left_open() -> None:
    grant = check(SIGNER.sign("/a", attachment=False))
    assert (grant.filename, grant.attachment, grant.content_type, grant.is_shareable) == (None, False, None, False)
    assert check(SIGNER.sign("/a")).attachment is None
    assert check(URLSigner({"a": SECRET}, max_age=None).sign("/a"), signer=URLSigner({"a": SECRET})).expires is None


def test_two_links_to_one_file_have_different_ids() -> None:
    assert len({check(SIGNER.sign("/a")).link_id for _ in range(100)}) == 100


def test_every_byte_counts() -> None:
    path, query = parts_of(SIGNER.sign("/files/a b.pdf", **EVERYTHING))
    accepted = []
    for position in range(len(query)):
        for value in range(256):
            changed = query[:position] + bytes([value]) + query[position + 1 :]
            if changed != query:
                accepted += is_accepted(path, changed)
    for position in range(len(path)):
        for value in range(256):
            changed = path[:position] + bytes([value]) + path[position + 1 :]
            if changed != path:
                accepted += is_accepted(changed, query)
    assert accepted == []


def is_accepted(path: bytes, query: bytes) -> list[tuple[bytes, bytes]]:
    try:
        SIGNER.check(path, query, CLIENT, 0)
    except LinkInvalid:
        return []
    return [(path, query)]


@pytest.mark.parametrize("further", ["", "version=3&e=x", "k=2026a&i=y&s=z", "&"])
def test_parameters_are_neither_dropped_nor_doubled_nor_moved_nor_written_otherwise(further: str) -> None:
    path, query = parts_of(SIGNER.sign("/a", query=further, **EVERYTHING))
    assert SIGNER.check(path, query, CLIENT, 0).content_type == EVERYTHING["content_type"]
    pairs = [pair for pair in query.split(b"&") if pair]
    assert len(pairs) >= 9
    for changed in tampered(pairs):
        assert is_accepted(path, b"&".join(changed)) == []
    for index, pair in enumerate(pairs):
        written = pair.replace(b"%20", b"+").replace(b"=", b"=%", 1)
        assert is_accepted(path, b"&".join([*pairs[:index], written, *pairs[index + 1 :]])) == []
    lower = query.replace(b"%2F", b"%2f")
    assert lower != query
    assert is_accepted(path, lower) == []


@given(st.binary(max_size=200), st.binary(max_size=400))
def test_junk_is_not_a_link(path: bytes, query: bytes) -> None:
    for each in (query, query + b"&s=", b"k=2026a&" + query, b"k=2026a&i=x&" + query + b"&s=" + b"A" * 43):
        with pytest.raises(LinkInvalid):
            SIGNER.check(path, each, CLIENT, 0)


def test_a_query_without_end_is_not_read() -> None:
    with pytest.raises(LinkInvalid):
        SIGNER.check(b"/a", b"k=2026a&" * 100_000 + b"&s=x", CLIENT, 0)


@given(
    path=st.text(st.characters(exclude_categories=["Cs"]), max_size=50).map(lambda text: "/" + text),
    filename=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=50),
    attachment=st.none() | st.booleans(),
)
def test_any_path_and_name(path: str, filename: str | None, attachment: bool | None) -> None:
    try:
        url = SIGNER.sign(path, filename=filename, attachment=attachment)
    except ValueError:
        is_host = path.startswith("//")  # without a base
        assert is_host or not {".", ".."}.isdisjoint(path.split("/")) or not (filename or "x").strip()
        return
    assert url.isascii()
    assert url.isprintable()
    assert parts_of(url)[0] == path.encode()
    grant = check(url)
    assert (grant.filename, grant.attachment) == (filename, attachment)


def test_the_first_key_signs_and_all_verify() -> None:
    old, new = {"old": SECRET}, {"new": b"n" * 32}
    link = URLSigner(old).sign("/a")
    both = URLSigner({**new, **old})
    assert check(link, signer=both).key_id == "old"
    assert check(both.sign("/a"), signer=URLSigner(new)).key_id == "new"
    with pytest.raises(LinkInvalid):
        check(link, signer=URLSigner(new))
    with pytest.raises(LinkInvalid):  # the same id, another secret
        check(link, signer=URLSigner({"old": b"o" * 32}))


def test_a_link_ends_at_its_second() -> None:
    link = SIGNER.sign("/a", expires_in=timedelta(seconds=60))
    expires = check(link).expires
    assert expires is not None
    assert check(link, now=expires - 0.001).expires == expires
    with pytest.raises(LinkExpired):
        check(link, now=expires)
    path, query = parts_of(link)
    with pytest.raises(LinkInvalid):  # an expired link that was changed tells nothing
        SIGNER.check(path + b"x", query, None, expires)


@pytest.mark.parametrize(
    "client, address, is_valid",
    [
        ("203.0.113.0/24", "203.0.113.255", True),
        ("203.0.113.0/24", "203.0.114.0", False),
        ("203.0.113.7", "203.0.113.7", True),
        ("203.0.113.7", "203.0.113.8", False),
        ("203.0.113.7", "::ffff:203.0.113.7", True),
        ("2001:db8:1:2::/64", "2001:db8:1:2:ffff::1", True),
        ("2001:db8:1:2::/64", "2001:db8:1:3::1", False),
        ("203.0.113.0/24", "2001:db8::1", False),
        ("203.0.113.0/24", None, False),
        ("203.0.113.0/24", "testclient", False),
        ("0.0.0.0/0", "198.51.100.1", True),
    ],
)
def test_a_link_for_a_network(client: str, address: str | None, is_valid: bool) -> None:
    link = SIGNER.sign("/a", client=client)
    if is_valid:
        assert check(link, client=address)
    else:
        with pytest.raises(LinkInvalid):
            check(link, client=address)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({}, "needs a key"),
        ([SECRET], "is not a mapping"),
        ({"a": b"x" * 31}, "the secret of the key 'a' has 31 bytes"),
        ({"a": "é" * 15}, "the secret of the key 'a' has 30 bytes"),
        ({"a b": SECRET}, "'a b' is not the id of a key"),
        ({"": SECRET}, "'' is not the id of a key"),
    ],
)
def test_keys_that_are_refused(keys: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        URLSigner(keys)


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("files/a.txt", {}, "does not begin with a slash"),
        ("https://example.org/a", {}, "does not begin with a slash"),
        ("/files/../a", {}, "'..'"),
        ("//example.org/a", {}, "would name another host"),
        ("/\udc80", {}, "not valid UTF-8"),
        ("/a", {"filename": ""}, "filename is ''"),
        ("/a", {"filename": "a\r\nb"}, "filename is"),
        ("/a", {"content_type": "html"}, "not a content type"),
        ("/a", {"client": "example.org"}, "give an address or a network"),
        ("/a", {"expires_in": timedelta(0)}, "would have expired already: give"),
        ("/a", {"until": datetime(2020, 1, 1, tzinfo=UTC)}, "would have expired already: give"),
        ("/a", {"until": datetime(2020, 1, 1)}, "give a time with a zone"),
        ("/a", {"until": datetime.now(UTC), "expires_in": timedelta(1)}, "no expires_in"),
        ("/a", {"expires_in": timedelta(days=8)}, "more than max_age, 7 days: give"),
        ("/a", {"expires_in": 5}, "expires_in is 5: give a timedelta"),
        ("/a", {"until": "2030-01-01"}, "give a time with a zone"),
        ("/a", {"uses": "1"}, "uses is '1': give a number"),
        ("/a", {"client": 5}, "give an address or a network"),
        ("/a", {"base": "example.org"}, "give a scheme and a host"),
        ("/a", {"base": "https://example.org/?x"}, "give a scheme and a host"),
    ],
)
def test_arguments_that_are_refused(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SIGNER.sign(path, **options)


def test_a_link_until_a_time() -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    assert check(SIGNER.sign("/a", until=until)).expires == until.timestamp()


def test_an_absolute_link() -> None:
    link = SIGNER.sign("/files/a.txt", base="https://example.org/dl/")
    assert link.startswith("https://example.org/dl/files/a.txt?k=2026a&i=")
    assert check(link.removeprefix("https://example.org/dl"))


def test_what_the_url_has_in_its_query_is_signed_as_clients_send_it() -> None:
    link = SIGNER.sign("/a", query='v=1&n=o\'brien "x" #é&q=%2F?')
    query = urlsplit(link).query
    assert query.startswith("v=1&n=o%27brien%20%22x%22%20%23%C3%A9&q=%2F?&k=2026a&i=")
    assert check(link).key_id == "2026a"
    for other in (query.replace("v=1", "v=2"), query.removeprefix("v=1&"), query[query.index("k=") :]):
        assert is_accepted(b"/a", other.encode()) == []


def test_a_link_that_was_valid_is_checked_again() -> None:
    path, query = parts_of(SIGNER.sign("/a.txt", client="192.0.2.0/24", expires_in=timedelta(hours=1)))
    now = time.time()
    for _ in range(2):
        assert SIGNER.check(path, query, "192.0.2.1", now).link_id
        with pytest.raises(LinkExpired):
            SIGNER.check(path, query, "192.0.2.1", now + 3600)
        with pytest.raises(LinkInvalid):
            SIGNER.check(path, query, "198.51.100.1", now)
        with pytest.raises(LinkInvalid):
            SIGNER.check(path + b"x", query, "192.0.2.1", now)
    links = [parts_of(SIGNER.sign(f"/{number}")) for number in range(3000)]
    assert all(SIGNER.check(*link, CLIENT, now).key_id == "2026a" for link in links)
    assert len(SIGNER._formats["complete"]._verified) <= 1024  # type: ignore[attr-defined]
