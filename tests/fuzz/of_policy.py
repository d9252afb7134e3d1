"""Links, the files of users, addresses of clients, names of users from a proxy, and the texts of limits."""

import base64
import ipaddress
import posixpath
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote_to_bytes

from starlette.requests import Request

from downloadview_async import AccessDenied, ConfigurationError, LinkExpired, LinkInvalid, ProxyUsers, URLSigner
from downloadview_async.policy.addresses import PEER, TrustedAddresses, address_of, network_of
from downloadview_async.policy.folders import PAGE_PARAMETERS
from downloadview_async.policy.htpasswd import MAX_COST, PasswordFile
from downloadview_async.policy.limits.amounts import LEAST_RATE, quota_of, rate_of, window_of
from downloadview_async.policy.users import _credentials
from tests.fuzz import inputs as st
from tests.fuzz.inputs import edited, edited_bytes, edited_text
from tests.fuzz.targets import target, target_within

CLIENT = "203.0.113.9"
NOW = 1.0  # before all links expire
SIGNER = URLSigner({"2026a": bytes(range(32)), "old": b"x" * 32})


def parts_of(url: str) -> tuple[bytes, bytes]:
    path, _, query = url.partition("?")
    return unquote_to_bytes(path), query.encode()


def linked(path: str, **options: object) -> tuple[bytes, bytes]:
    return parts_of(SIGNER.sign(path, expires_in=timedelta(hours=1), **options))  # type: ignore[arg-type]


LINKS = [
    linked("/files/a b.pdf"),
    linked("/files/a b.pdf", filename="Q3 & Q4.pdf", attachment=True, content_type="text/plain", client=CLIENT),
    linked("/é/π", shareable=True, query="version=3&x"),
]
SECURE_LINKS = [linked("/a b", format="secure_link"), linked("/files/a", format="secure_link", client=CLIENT)]
FOLDERS = [linked("/files/2026/", below=True), linked("/", below=True)]


def changed(links: list[tuple[bytes, bytes]]) -> st.Input[tuple[int, bytes, bytes]]:
    """Return the number of a link, and a path and a query that may be others than those of the link."""
    paths, queries = zip(*links, strict=True)
    return st.tuples(
        st.integers(0, len(links) - 1),
        edited_bytes(*paths, words=[b"/.", b"/../", b"a/b"]),
        edited_bytes(*queries, words=[b"&e=9999999999", b"&k=old", b"&s=", b"&d=i", b"?"]),
    )


def is_accepted(path: bytes, query: bytes, format_: str) -> bool:
    try:
        grant = SIGNER.check(path, query, CLIENT, NOW, format=format_)
    except (LinkInvalid, LinkExpired):
        return False
    assert grant.expires is not None
    assert grant.key_id == "2026a"
    return True


@target(changed(LINKS))
def links(value: tuple[int, bytes, bytes]) -> None:
    number, path, query = value
    assert is_accepted(path, query, "complete") == ((path, query) in LINKS)
    assert is_accepted(path, LINKS[number][1], "complete") == ((path, LINKS[number][1]) in LINKS)
    assert is_accepted(LINKS[number][0], query, "complete") == ((LINKS[number][0], query) in LINKS)


@target(changed(SECURE_LINKS))
def secure_links(value: tuple[int, bytes, bytes]) -> None:
    number, path, query = value
    assert is_accepted(path, query, "secure_link") == ((path, query) in SECURE_LINKS)
    assert is_accepted(SECURE_LINKS[number][0], query, "secure_link") == (query == SECURE_LINKS[number][1])


@target(
    st.tuples(
        st.integers(0, len(FOLDERS) - 1),
        edited_bytes(b"a.txt", b"b/c", b"../x", b"", words=[b"/../", b"\\..\\", b"/./", b"a/"]),
        edited_bytes(*[query for _, query in FOLDERS], words=[b"&view=1", b"format=json&", b"&q=a", b"&b=1", b"&z=1"]),
    )
)
def links_to_folders(value: tuple[int, bytes, bytes]) -> None:
    number, below, query = value
    folder, signed = FOLDERS[number]
    for path, asked in ((folder + below, signed), (below, signed), (folder + below, query)):
        if not is_accepted(path, asked, "complete"):
            continue
        pairs = [pair for pair in asked.split(b"&") if pair.partition(b"=")[0] not in PAGE_PARAMETERS]
        link = b"&".join(pairs)
        assert link in [query for _, query in FOLDERS]
        inside = {query: folder for folder, query in FOLDERS}[link]
        assert path.startswith(inside)
        normal = posixpath.normpath(path.replace(b"\\", b"/"))
        assert (normal + b"/").startswith(inside), "the path leads out of the folder"


@target(edited_text("/files/a.txt", "/a b/é", "/", "/a%2fb", "/a?b#c", "//host/x"))
def paths_that_are_signed(path: str) -> None:
    try:
        url = SIGNER.sign(path)
    except ValueError:
        return
    assert url.isascii()
    assert not re.search(r"[\x00-\x20\x7f\"<>\\^`{|}]", url)
    assert not url.startswith("//")
    assert is_accepted(*parts_of(url), "complete")
    assert parts_of(url)[0] == path.encode()


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a new directory."""
    with tempfile.TemporaryDirectory(prefix="downloadview-fuzz-") as name:
        yield Path(name).resolve()


HASH = b"$2y$05$" + b"a" * 53
PASSWORDS = edited_bytes(
    b"ada:" + HASH + b"\n", b"# users\n\nada:" + HASH + b"\nbob:" + HASH.replace(b"2y", b"2b"), HASH
)


@target_within(PASSWORDS, scratch)
def password_files(content: bytes, directory: Path) -> None:
    file = directory / "users"
    file.write_bytes(content)
    try:
        hashes = PasswordFile(file).hashes
    except ConfigurationError as exc:
        assert str(exc).isprintable()
        assert HASH.decode()[10:30] not in str(exc), "a hash is shown"
        return
    assert hashes
    for name, value in hashes.items():
        assert ":" not in name
        assert name.encode() + b":" + value in content
        assert re.fullmatch(rb"\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}", value)
        assert 4 <= int(value[4:6]) <= MAX_COST


ADDRESSES = edited_text(
    "203.0.113.9",
    "::1",
    "2001:db8::1",
    "::ffff:10.0.0.7",
    "fe80::1%eth0",
    "10.0.0.0/8",
    "127.1",
    "0x7f.0.0.1",
    "*",
    "010.0.0.7",
    "[::1]",
    "10.0.0.7:80",
    "unix:",
    "1",
)


@target(ADDRESSES)
def addresses(text: str) -> None:
    address, network = address_of(text), network_of(text)
    try:
        expected = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        assert address is None
        assert network == text
        return
    assert address is not None
    assert address in (expected, getattr(expected, "ipv4_mapped", None))
    assert address in ipaddress.ip_network(network)
    assert address_of(str(address)) == address
    trusted = TrustedAddresses(["10.0.0.0/8"])
    assert trusted.has(text) == (address in ipaddress.ip_network("10.0.0.0/8"))


@target(ADDRESSES)
def trusted_addresses(text: str) -> None:
    try:
        trusted = TrustedAddresses([text])
    except ConfigurationError as exc:
        assert str(exc).isprintable()
        return
    assert trusted
    assert trusted.has("192.0.2.1") == (text == "*" or ipaddress.ip_address("192.0.2.1") in ipaddress.ip_network(text))


@target(
    st.tuples(
        st.sampled_from(["10.0.0.7", "10.0.0.8", "", "unix", None]),
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["x-remote-user", "x_remote_user", "X-Remote-User", "x-remote-users", "x-forwarded-for"]
                ),
                edited("ada", "ada,bob", "*", "ada ", "\xc3\xa9"),
            ),
            max_size=3,
        ),
    )
)
def users_of_a_proxy(value: tuple[str | None, list[tuple[str, str]]]) -> None:
    peer, pairs = value
    headers = [(name.encode(), text.encode("latin-1")) for name, text in pairs]
    request = Request({"type": "http", "headers": headers, PEER: peer})
    try:
        user = ProxyUsers("X-Remote-User", trusted=["10.0.0.7"]).user_of(request)
    except AccessDenied:
        return
    assert peer == "10.0.0.7"
    sent = [text for name, text in pairs if name.lower().replace("_", "-") == "x-remote-user"]
    assert len(sent) == 1
    assert user.strip() == user
    assert user not in ("", "*")
    assert "," not in user
    assert user.encode() in sent[0].encode("latin-1")
    assert not re.search("[\x00-\x1f\x7f]", user)


@target(edited_text("20MB/s", "600/minute", "50GB/day", "1000 downloads/day", "1.5kB/s", "20Mbit/s", "1 request/hour"))
def amounts_of_limits(text: str) -> None:
    for parse in (rate_of, window_of, quota_of):
        try:
            amount = parse(text)
        except ConfigurationError as exc:
            assert len(str(exc)) < len(text) * 10 + 200
            continue
        number = amount if isinstance(amount, int) else amount.amount
        assert 1 <= number <= 2**53
        assert re.match("[0-9]", text)
        if parse is rate_of:
            assert number >= LEAST_RATE


BASIC = edited("Basic YWRhOnNlY3JldA==", "basic YWRhOg==", "Basic Og==", "Bearer x", "Basic YWRh", "Basic  w6k6w6k=")


@target(st.lists(BASIC, max_size=2))
def passwords_of_requests(values: list[str]) -> None:
    headers = [(b"authorization", value.encode("latin-1")) for value in values]
    found = _credentials(Request({"type": "http", "headers": headers}))
    if found is None:
        return
    name, password = found
    assert len(values) == 1
    assert name
    assert ":" not in name
    scheme, token = values[0].split()
    assert scheme.lower() == "basic"
    assert base64.b64decode(token) == f"{name}:".encode() + password
    assert not re.search(rb"[\x00-\x1f\x7f]", name.encode() + password)
