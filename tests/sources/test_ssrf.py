"""Which addresses a remote fetch may reach, and that nothing is connected to before that is known."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from downloadview_async import ConfigurationError, RemoteFile, RemoteSource, UpstreamError
from downloadview_async.sources.remote.ssrf import AllowedHosts, is_private, is_public
from tests.live import listening

PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8", "2002:808:808::"]
LOCAL = ["127.0.0.1", "127.255.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "::1", "fd00::1", "::ffff:7f00:1"]
NEVER = [
    *["0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "240.0.0.1", "100.64.0.1", "192.88.99.1", "::"],
    *[
        "fe80::1",
        "ff02::1",
        "fec0::1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:7f00:1::1",
        "5f00::1",
    ],
    *["2001:db8::1", "::127.0.0.1", "::ffff:169.254.169.254", "198.18.0.1", "192.0.2.1"],
]


@pytest.mark.parametrize("text, public", [*[(a, True) for a in PUBLIC], *[(a, False) for a in LOCAL + NEVER]])
def test_is_public(text: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(text)) is public


@pytest.mark.parametrize("text", LOCAL)
def test_a_host_allowed_by_name_may_be_at_a_private_address(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert is_private(address)
    assert AllowedHosts("files.test", ["files.test"]).permits_addresses("files.test", [address])
    assert not AllowedHosts("files.test").permits_addresses("files.test", [address])


@pytest.mark.parametrize("text", ["0.0.0.0", "169.254.169.254", "fe80::1", "::", "::ffff:169.254.169.254", "224.0.0.1"])
def test_link_local_and_special_addresses_need_to_be_allowed_themselves(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert not AllowedHosts("files.test", ["files.test"]).permits_addresses("files.test", [address])
    assert AllowedHosts(text, [text]).permits_addresses(text, [address])


def test_mixed_answers_are_refused_even_for_an_allowed_name() -> None:
    hosts = AllowedHosts("files.test", ["files.test"])
    mixed = [ipaddress.ip_address("8.8.8.8"), ipaddress.ip_address("127.0.0.1")]
    assert not hosts.permits_addresses("files.test", mixed)


@pytest.mark.parametrize("host", ["FILES.test", "files.test.", "files.test"])
def test_spellings_of_an_allowed_host(host: str) -> None:
    assert AllowedHosts("files.test").permits(host)
    assert not AllowedHosts("files.test").permits(f"evil.{host}")
    assert AllowedHosts("[::1]").permits("0:0:0:0:0:0:0:1")


class Listener:
    """A port of the loopback that counts who connects, and answers with whatever a test has put there."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret"
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            self.requests.append(head)
            writer.write(self.answer)
            await writer.drain()


@pytest_asyncio.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    async with listening(listener.serve) as listener.port:
        yield listener


async def fetch(source: RemoteSource, name: str = "x") -> bytes:
    try:
        file = await source.resolve(name)
        async with file.open() as opened:
            return b"".join([chunk async for chunk in opened.stream(None)])
    finally:
        await source.aclose()


FORMS = [
    *["127.0.0.1", "127.1", "0", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:7f00:1]", "[::1]", "localhost"],
    *["127。0。0。1", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "0.0.0.0", "[::]"],
]


@pytest.mark.asyncio
@pytest.mark.parametrize("form", FORMS)
async def test_no_form_of_the_loopback_is_connected_to(listener: Listener, form: str) -> None:
    with pytest.raises(UpstreamError):
        await fetch(RemoteSource(f"http://{form}:{listener.port}/"))
    assert listener.connections == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("form", FORMS)
async def test_no_form_of_the_loopback_is_redirected_to(listener: Listener, form: str) -> None:
    listener.answer = (
        f"HTTP/1.1 302 Found\r\nLocation: http://{form}:{listener.port}/secret\r\nContent-Length: 0\r\n\r\n".encode()
    )
    allowed = "127.0.0.1"
    if form in ("127.0.0.1", "127。0。0。1"):  # the allowed host itself: a redirect for ever
        with pytest.raises(UpstreamError, match="more than 5"):
            await fetch(RemoteSource(f"http://{allowed}:{listener.port}/", allow_hosts=[allowed]))
        return
    with pytest.raises(UpstreamError, match=r"allow|302"):
        await fetch(RemoteSource(f"http://{allowed}:{listener.port}/", allow_hosts=[allowed]))
    assert len(listener.requests) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "target",
    ["https://127.0.0.2/", "ftp://127.0.0.1/x", "file:///etc/passwd", "http://user@127.0.0.1:{port}/", "//evil.test/"],
)
async def test_redirects_elsewhere_are_refused(listener: Listener, target: str) -> None:
    location = target.format(port=listener.port)
    listener.answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with pytest.raises(UpstreamError):
        await fetch(RemoteSource(f"http://127.0.0.1:{listener.port}/", allow_hosts=["127.0.0.1"]))
    assert len(listener.requests) == 1


@pytest.mark.asyncio
async def test_a_name_that_changes_its_address_is_looked_up_once_and_connected_to_as_checked(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name server says a public address first, the loopback ever after."""
    lookups: list[str] = []
    connected: list[str] = []

    def getaddrinfo(host: bytes, port: None, **_: Any) -> list[Any]:
        lookups.append(host.decode())
        address = "93.184.216.34" if len(lookups) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    async def connect(address: str, port: int, **_: Any) -> Any:
        connected.append(address)
        raise OSError("nothing leaves this machine")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("downloadview_async.sources.remote.ssrf.connect", connect)
    with pytest.raises((UpstreamError, OSError)):
        await fetch(RemoteSource(f"http://rebind.test:{listener.port}/"))
    assert lookups == ["rebind.test"]
    assert connected == ["93.184.216.34"]
    assert listener.connections == 0


@pytest.mark.asyncio
async def test_proxies_of_the_environment_are_not_asked(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.port}")
    with pytest.raises(UpstreamError):
        await fetch(RemoteSource("http://192.0.2.1/", connect_timeout=0.2))
    assert listener.connections == 0


@pytest.mark.asyncio
async def test_cookies_of_an_upstream_are_not_kept_for_the_next_request(listener: Listener) -> None:
    listener.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: a=b; Path=/\r\n\r\nok"
    source = RemoteSource(f"http://127.0.0.1:{listener.port}/", allow_hosts=["127.0.0.1"])
    for _ in range(2):
        async with (await source.resolve("x")).open() as opened:
            assert b"".join([chunk async for chunk in opened.stream(None)]) == b"ok"
    await source.aclose()
    assert len(listener.requests) == 2
    assert b"cookie" not in listener.requests[1].lower()


@pytest.mark.asyncio
async def test_a_file_by_url_is_for_public_addresses_only(listener: Listener) -> None:
    with pytest.raises(UpstreamError, match="not allowed"):
        async with RemoteFile(f"http://127.0.0.1:{listener.port}/x").open():
            pass
    assert listener.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "ftp://files.test/",
        "files.test",
        "http://",
        "http://u:p@files.test/",
        "http://files.test/?q",
        "http://x:y/",
        "http://files test/",
        "http://files%20test/",
        "/x",
    ],
)
def test_a_url_that_is_no_upstream_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError):
        RemoteSource(url)


@pytest.mark.parametrize(
    "hosts", ["files.test", ["http://files.test/"], ["files.test:80"], ["files test"], [""], [None]]
)
def test_a_list_that_no_host_could_match_is_refused_at_once(hosts: Any) -> None:
    """Not to be noticed by a 502 for each file."""
    with pytest.raises(ConfigurationError, match="allow_hosts takes a list of hosts"):
        RemoteSource("http://files.test/", allow_hosts=hosts)


@pytest.mark.asyncio
async def test_forms_of_hosts_that_may_be_allowed() -> None:
    hosts = ["files.test", "files_2.test.", "Bücher。test", "127.0.0.1", "::1", "[::1]", "fe80::1%eth0"]
    await RemoteSource("http://files.test/", allow_hosts=hosts).aclose()
