"""Links to a folder and all that is below it: what they grant, and that nothing else is granted by a change."""

import base64
import hashlib
import hmac
import re
import time
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from downloadview_async import Grant, LinkExpired, LinkInvalid, MemoryGrantStore, URLSigner
from downloadview_async.policy.folders import MAX_FOLDER, PAGE_PARAMETERS, carried
from tests.policy.tampering import tampered

SECRET = bytes(range(32))
SIGNER = URLSigner({"2026a": SECRET})
FOLDER = b"/files/2026/"
OLD_FILE = b"CW2CXfuIiR-QkESNJ-LZntmcBwFrH42wbNJ6rPgA3gM"
OLD_FOLDER = b"69YBNwe8nK6wZWd7ConkNAKzIkjq2eTytaMf7UfsuLM"
CLIENT = "203.0.113.9"
LINK = SIGNER.sign("/files/2026/", below=True, client="203.0.113.0/24", attachment=True).partition("?")[2].encode()

SEGMENT = st.binary(max_size=6) | st.sampled_from(
    [b"", b".", b"..", b"...", b".. ", b"2026", b"files", b"a\\..\\b", b"\\"]
)
BELOW = st.lists(SEGMENT, max_size=5).map(b"/".join)


def granted(path: bytes, query: bytes, signer: URLSigner = SIGNER, now: float = 0) -> Grant | None:
    try:
        return signer.check(path, query, CLIENT, now)
    except LinkInvalid:
        return None


def is_below(path: bytes) -> bool:
    """Return whether a path is that of the folder or below it: written in another way than in the code."""
    segments = path.split(b"/")
    if segments[:3] != [b"", b"files", b"2026"] or len(segments) < 4 or b"\0" in path:
        return False
    *parents, last = segments[3:]
    parts = [part for segment in (*parents, last) for part in segment.split(b"\\")]
    return b"" not in parents and not {b".", b".."}.intersection(parts)


def test_what_is_granted() -> None:
    grant = granted(FOLDER, LINK)
    assert grant is not None
    assert (grant.folder, grant.attachment, grant.uses, grant.is_shareable) == ("/files/2026/", True, None, False)
    assert LINK.decode("ascii").split("&")[-2] == "b=12"
    assert granted(b"/files/2026/a/b.txt", LINK) == grant
    assert granted(FOLDER, SIGNER.sign("/files/2026/").partition("?")[2].encode()).folder is None  # type: ignore[union-attr]
    top = SIGNER.sign("/", below=True).partition("?")[2].encode()
    assert [granted(path, top) is not None for path in (b"/", b"/a/b", b"//a", b"/../a", b"a")] == [1, 1, 0, 0, 0]


@given(BELOW | st.tuples(st.sampled_from([b"../", b"./", b"sub/", b"%2e%2e/"]), BELOW).map(b"".join))
@example(b"../2026-secret/a")
@example(b"a/..")
@example(b".")
@example(b"a/")
@example(b"a//")
@example(b"/")
@example(b"a\0")
@example(b"..\\a")
@example(b"%2e%2e/a")
def test_a_link_grants_exactly_what_is_below(below: bytes) -> None:
    path = FOLDER + below
    assert (granted(path, LINK) is not None) == is_below(path)


@given(st.lists(SEGMENT, max_size=5).map(b"/".join))
@example(b"/files/2026")
@example(b"/files/2026-secret/a")
@example(b"/files/2026/../secret")
@example(b"/FILES/2026/a")
@example(b"/files/2026./a")
@example(b"/files/2026%2fa")
@example(b"/files//2026/a")
@example(b"//files/2026/a")
@example(b"/x/files/2026/a")
@example(b"/files/")
@example(b"/")
@example(b"")
def test_no_other_path_is_granted(path: bytes) -> None:
    for each in (path, b"/" + path, b"/files/" + path, b"/files/2026" + path):
        assert (granted(each, LINK) is not None) == is_below(each)


@given(st.data())
def test_any_two_folders(data: st.DataObject) -> None:
    """A link for a folder grants a path if and only if the path begins with the folder, and is written in one way."""
    names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=4)
    segments = names.filter(lambda name: name not in (".", ".."))
    folder = data.draw(st.lists(segments, max_size=3))
    path = data.draw(st.just(folder) | st.lists(segments, max_size=3)) + data.draw(st.lists(segments, max_size=2))
    link = SIGNER.sign("".join(f"/{name}" for name in folder) + "/", below=True).partition("?")[2].encode()
    has_dots = any({".", ".."}.intersection(name.split("\\")) for name in path[len(folder) :])
    expected = path[: len(folder)] == folder and not has_dots
    for end in ("", "/"):
        sent = ("".join(f"/{name}" for name in path) + end).encode()
        assert (granted(sent, link) is not None) == (expected and (len(path) > len(folder) or end == "/"))


def test_every_byte_counts() -> None:
    path = b"/files/2026/a.txt"
    accepted = []
    for position in range(len(LINK)):
        for value in range(256):
            changed = LINK[:position] + bytes([value]) + LINK[position + 1 :]
            if changed != LINK and granted(path, changed):
                accepted.append(changed)
    for position in range(len(FOLDER)):
        for value in range(256):
            changed = path[:position] + bytes([value]) + path[position + 1 :]
            if changed != path and granted(changed, LINK):
                accepted.append(changed)
    assert accepted == []


def test_parameters_of_the_link_are_neither_dropped_nor_doubled_nor_moved_nor_written_otherwise() -> None:
    pairs = LINK.split(b"&")
    assert len(pairs) == 7
    for changed in tampered(pairs):
        assert changed != pairs
        assert granted(FOLDER, b"&".join(changed)) is None
    for index, pair in enumerate(pairs):
        name, _, value = pair.partition(b"=")
        for written in (name + b"=%%%02X" % value[0] + value[1:], name + b"=0" + value):
            assert granted(FOLDER, b"&".join([*pairs[:index], written, *pairs[index + 1 :]])) is None
    assert granted(FOLDER, LINK.replace(b"%2F", b"%2f")) is None


@pytest.mark.parametrize(
    "further", ["x=1", "share", "e=1", "", "S=1", "sort%3Dsize", "s%6Frt=size", "Sort=size", "a", "="]
)
def test_unknown_parameters_are_refused(further: str) -> None:
    for query in (LINK + b"&" + further.encode(), further.encode() + b"&" + LINK):
        assert granted(FOLDER, query) is None
        assert granted(FOLDER + b"a.txt", b"sort=size&" + query) is None


@given(
    st.lists(st.tuples(st.sampled_from(sorted(PAGE_PARAMETERS)), st.binary(max_size=9)), max_size=4), st.integers(0, 9)
)
def test_the_parameters_of_the_pages_grant_and_take_nothing(fields: list[tuple[bytes, bytes]], place: int) -> None:
    pairs = LINK.split(b"&")
    added = [name + b"=" + quote(value).encode() for name, value in fields]
    place = min(place, len(pairs))
    query = b"&".join([*added[:2], *pairs[:place], *added[2:], *pairs[place:]])
    assert granted(FOLDER, query) == granted(FOLDER, LINK)
    assert granted(b"/files/2026-secret/", query) is None
    assert carried(query) == LINK


def test_the_two_kinds_of_links_are_never_taken_for_each_other() -> None:
    """A link to one URL may have any query, so it may look like a link to a folder."""
    lookalikes = ["b=12", "k=2026a&i=x&b=12", "k=2026a&i=x&b=12&s=" + "A" * 43, "sort=size&b=12"]
    for further in lookalikes:
        for path in ("/files/2026/", "/files/2026/a.txt"):
            query = SIGNER.sign(path, query=further).partition("?")[2].encode()
            grant = granted(path.encode(), query)
            assert grant is not None
            assert grant.folder is None
            for other in (b"/files/2026/b.txt", b"/files/2026/a.txt/b", FOLDER):
                assert other == path.encode() or granted(other, query) is None
    plain, signature = SIGNER.sign("/files/2026/").partition("?")[2].encode().split(b"&s=")
    assert granted(FOLDER, plain + b"&b=12&s=" + signature) is None
    assert granted(FOLDER, re.sub(b"&b=12", b"", LINK)) is None
    # what a signature of the kind of ordinary links over the parameters of a folder's link would be
    signed = LINK.rpartition(b"&s=")[0]
    fields = (b"downloadview 1", b"GET", FOLDER, signed)
    digest = hmac.digest(SECRET, b"".join(len(field).to_bytes(8) + field for field in fields), hashlib.sha256)
    assert granted(FOLDER, signed + b"&s=" + base64.urlsafe_b64encode(digest).rstrip(b"=")) is None


def test_links_of_earlier_versions_are_verified_as_before() -> None:
    """These were made by the version before links to folders, with the key of this test."""
    whole = b"sort=size&k=2026a&i=AAAAAAAAAAAA&e=4000000000&f=a.txt&s=" + OLD_FILE
    assert granted(b"/files/a.txt", whole) == Grant(
        filename="a.txt", expires=4_000_000_000, link_id="AAAAAAAAAAAA", key_id="2026a"
    )
    folder = b"k=2026a&i=AAAAAAAAAAAA&e=4000000000&s=" + OLD_FOLDER
    assert granted(FOLDER, folder) == Grant(expires=4_000_000_000, link_id="AAAAAAAAAAAA", key_id="2026a")
    for query in (folder, folder + b"&sort=size", b"sort=size&" + folder, folder.replace(b"&s=", b"&b=12&s=")):
        assert granted(FOLDER + b"a.txt", query) is None
        assert query == folder or granted(FOLDER, query) is None


@given(st.binary(max_size=60), st.binary(max_size=80))
def test_junk_is_not_a_link(path: bytes, query: bytes) -> None:
    for each in (query + b"&b=12&s=", b"k=2026a&" + query + b"&b=1&s=" + b"A" * 43, b"k=2026a&i=x&b=12&s=" + query):
        assert granted(path, each) is None
        assert granted(FOLDER + path, each) is None


@pytest.mark.parametrize("length", ["", "0", "00012", "012", "11", "13", "-12", "+12", "1_2", "12.", "99999", "１２"])
def test_no_other_length_is_taken(length: str) -> None:
    assert granted(FOLDER + b"a.txt", LINK.replace(b"&b=12", b"&b=" + length.encode())) is None


def test_a_query_without_end() -> None:
    for query in (b"b=1&" * 20_000 + LINK, LINK + b"&b=1" * 20_000, b"q=x&" * 20_000 + LINK.replace(b"i=", b"i=x")):
        assert granted(FOLDER, query) is None


def test_expiry_and_client_hold_below_as_well() -> None:
    grant = granted(FOLDER + b"a", LINK)
    assert grant is not None
    assert grant.expires is not None
    with pytest.raises(LinkExpired):
        SIGNER.check(FOLDER + b"a", LINK, CLIENT, grant.expires)
    with pytest.raises(LinkInvalid):
        SIGNER.check(FOLDER + b"a", LINK, "198.51.100.1", time.time())


def test_few_links_are_kept_however_many_files_they_lead_to() -> None:
    signer = URLSigner({"2026a": SECRET})
    link = signer.sign("/a/", below=True).partition("?")[2].encode()
    for number in range(3000):
        assert granted(b"/a/%d" % number, b"q=%d&" % number + link, signer)
    assert len(signer._formats["complete"]._verified) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("/files/a.txt", {}, "is not that of a folder"),
        ("/files//a/", {}, "is not that of a folder"),
        ("/files/a\0/", {}, "is not that of a folder"),
        ("/" + "a" * MAX_FOLDER + "/", {}, "is not that of a folder"),
        ("//example.org/", {"base": "https://example.com"}, "is not that of a folder"),
        ("/files/../", {}, "'..'"),
        ("/files/", {"filename": "a.txt"}, "cannot have filename"),
        ("/files/", {"content_type": "text/plain"}, "cannot have content_type"),
        ("/files/", {"uses": 3}, "cannot have uses"),
        ("/files/", {"shareable": True}, "cannot have shareable"),
        ("/files/", {"query": "v=1"}, "cannot have query"),
        ("/files/", {"format": "secure_link"}, "secure_link cannot have below"),
    ],
)
def test_arguments_that_are_refused(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        URLSigner({"a": SECRET}, store=MemoryGrantStore()).sign(path, below=True, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "raw_path, is_allowed",
    [
        (b"/files/2026/a.txt", True),
        (b"/files/2026/sub/%61.txt", True),
        (b"/files/2026/sub%2Fa.txt", False),
        (b"/files/2026/sub%2fa.txt", False),
        (b"/files%2F2026/a.txt", False),
        (b"/files/2026/%2e%2e/secret", False),
        (b"/files/2026/..%2fsecret", False),
        (b"/files/2026%2F..%2Fsecret/", False),
        (b"/files/2026/%2E/a.txt", False),
        (b"/files/2026//a.txt", False),
        (b"/files/2026/%00", False),
        (b"/files/2026/%252e%252e/a", True),  # the name `%2e%2e`, below the folder
    ],
)
async def test_paths_as_servers_pass_them_on(raw_path: bytes, is_allowed: bool) -> None:
    scope = {
        "method": "GET",
        "path": unquote(raw_path.decode()),
        "raw_path": raw_path,
        "query_string": b"view&" + LINK,
        "client": (CLIENT, 1),
    }
    if is_allowed:
        assert (await SIGNER.verify(scope)).folder == "/files/2026/"
    else:
        with pytest.raises(LinkInvalid):
            await SIGNER.verify(scope)


@pytest.mark.asyncio
async def test_revocation_holds_for_all_that_is_below() -> None:
    signer = URLSigner({"2026a": SECRET}, store=MemoryGrantStore())
    links = [signer.sign("/files/2026/", below=True).partition("?")[2].encode() for _ in range(2)]
    scopes = [
        {"method": "GET", "path": f"/files/2026/{name}", "query_string": link}
        for link in links
        for name in ("", "a.txt", "sub/")
    ]
    grants = [await signer.verify(scope) for scope in scopes]
    assert grants[0].link_id is not None
    await signer.revoke(grants[0].link_id)
    for scope in scopes[:3]:
        with pytest.raises(LinkInvalid, match="revoked"):
            await signer.verify(scope)
    for scope in scopes[3:]:
        await signer.verify(scope)
    await signer.revoke("2026a")
    for scope in scopes:
        with pytest.raises(LinkInvalid, match="revoked"):
            await signer.verify(scope)
