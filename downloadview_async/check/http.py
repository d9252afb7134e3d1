"""HTTP requests of a check: paths are sent exactly as spelled, and only the start of a body is read."""

import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

import anyio
import httpx2
from starlette.applications import Starlette

from downloadview_async import ConfigurationError, __version__, proxy_kinds

PIECE = 64 << 10
MOST = 3 * PIECE
"""The most bytes to read of one answer."""

_FIELD = re.compile(r"[\w-]+:[\t -~]*", re.ASCII)
_SPACES = re.compile("[ \t]*,[ \t]*")
_OBEYED = [name for kind in proxy_kinds().values() for name in kind.headers]
_ORDER = re.compile("|".join(["x-accel-.+", "x-sendfile.*", "x-offload-target", *_OBEYED]))


class NoAnswerError(Exception):
    """There is no answer, or its body is incomplete."""


class ClosedError(NoAnswerError):
    """The server closed the connection instead of answering, or before the answer ended."""


class UnknownHostError(NoAnswerError):
    """The host name has no address here."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its status, its headers with names in lower case, and the first `MOST` bytes of its body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def get(self, name: str) -> str | None:
        """Return the value of a header, or None; repeated headers are joined by commas."""
        values = [value for known, value in self.headers if known == name.lower()]
        return ", ".join(values) if values else None

    def differs(self, other: "Answer", name: str) -> bool:
        """Return whether a header has another value in another answer. Proxies may change the spaces after commas."""
        one, another = self.get(name), other.get(name)
        return one != another and (not one or not another or _listed(one) != _listed(another))

    @property
    def cookies(self) -> set[str]:
        """The names of the cookies that it sets."""
        return {value.partition("=")[0] for name, value in self.headers if name == "set-cookie"}

    @property
    def place(self) -> SplitResult:
        """The parts of the URL that it redirects to, which are empty if there is no such URL."""
        try:
            return urlsplit(self.get("location") or "")
        except ValueError:
            return urlsplit("")

    @property
    def orders(self) -> dict[str, str]:
        """The offload headers, which only a proxy should see."""
        return {name: value for name, value in self.headers if _ORDER.fullmatch(name)}


def headers_of(given: Sequence[str]) -> dict[str, str]:
    """Return headers that are given as `NAME: VALUE`. Raises `ConfigurationError`."""
    if not all(_FIELD.fullmatch(header) for header in given):
        raise ConfigurationError("--header is NAME: VALUE, such as 'Authorization: Basic YWRhOnNlY3JldA=='")
    return {name: value.strip() for name, _, value in (header.partition(":") for header in given)}


def check_seconds(timeout: float) -> None:
    """Raise `ConfigurationError` for a timeout that is not positive."""
    if not timeout > 0:  # as NaN is, too
        raise ConfigurationError(f"--timeout is {timeout:g}: give seconds, such as 10")


def server_url(url: str) -> SplitResult:
    """Return the parts of a server URL. Raises `ConfigurationError` for another text."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii()
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigurationError(f"{url!r} is not a server URL: give one such as http://127.0.0.1:8080")
    return parts


class Server(Protocol):
    """A server that a check asks: a `Peer`, or an application in this process. headers: of every request."""

    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102

    async def ask(self, target: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request and return the answer. Raises `NoAnswerError`."""
        ...


@dataclass(frozen=True, slots=True)
class Peer:
    """A server, or an application in this process. Redirects are not followed; HTTP_PROXY and the like are ignored.

    headers: of every request, such as the name and password of a user.
    """

    client: httpx2.AsyncClient
    base: str
    path: str
    timeout: float
    headers: Mapping[str, str]
    is_here: bool = False

    @classmethod
    @asynccontextmanager
    async def in_process(cls, app: Starlette, timeout: float, headers: Mapping[str, str]) -> AsyncIterator["Peer"]:
        """Yield a peer that calls an application in this process."""
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
            yield cls(client, "http://localhost", "", timeout, headers, is_here=True)

    @classmethod
    @asynccontextmanager
    async def at(
        cls, url: str, timeout: float, headers: Mapping[str, str] = MappingProxyType({}), *, uds: str | None = None
    ) -> AsyncIterator["Peer"]:
        """Yield a peer for the server at a URL, or behind a Unix socket. timeout: seconds for each whole answer.

        Raises `ConfigurationError` if `url` is not a server URL.
        """
        parts = server_url(url)
        async with _client(parts.scheme, timeout, uds) as client:
            yield cls(client, f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/"), timeout, headers)

    async def ask(
        self, target: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, root: bool = False
    ) -> Answer:
        """Send a request and return the answer, with up to `MOST` bytes of its body.

        target: the path exactly as sent; it is appended to the path of the URL, or with `root` to its host.

        Raises `NoAnswerError`.
        """
        path = target if root else self.path + target
        request = self.client.build_request(
            method,
            self.base + path.replace("../", "%2e%2e/") if self.is_here else self.base,
            headers={"Accept-Encoding": "identity", "User-Agent": f"downloadview-check/{__version__}"}
            | dict(self.headers)
            | dict(headers or {}),
            # the client would normalise a URL, and so remove /../ from it
            extensions=None if self.is_here else {"target": path.encode("ascii")},
        )
        return await _answer_to(request, self.client, self.timeout)


async def follow(url: str, timeout: float, headers: Mapping[str, str]) -> Answer:
    """Send a GET for a URL on another server, with only these headers and Host, on a new connection.

    Raises `UnknownHostError` if the host has no address here, else `NoAnswerError` if there is no answer.
    """
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise NoAnswerError(f"the redirect does not lead to a URL: {exc}") from exc
    try:
        with anyio.fail_after(timeout):
            await anyio.getaddrinfo(parts.hostname or "", parts.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, ValueError) as exc:
        raise UnknownHostError(f"{parts.hostname} has no address here: {exc}") from exc
    base = f"{parts.scheme}://{parts.netloc}"
    target = url.removeprefix(base).partition("#")[0].encode("ascii", "replace")  # unchanged, because it is signed
    request = httpx2.Request("GET", base, headers=dict(headers), extensions={"target": target})
    async with _client(parts.scheme, timeout) as client:
        return await _answer_to(request, client, timeout)


def _listed(value: str) -> str:
    return _SPACES.sub(",", value)


def _client(scheme: str, timeout: float, uds: str | None = None) -> httpx2.AsyncClient:
    """Return a client for one server. Without TLS, it does not read the certificates of the machine."""
    verify = ssl.create_default_context() if scheme == "https" else False
    transport = httpx2.AsyncHTTPTransport(verify=verify, uds=uds, trust_env=False)
    return httpx2.AsyncClient(transport=transport, trust_env=False, timeout=timeout)


async def _answer_to(request: httpx2.Request, client: httpx2.AsyncClient, timeout: float) -> Answer:
    body = bytearray()
    try:
        with anyio.fail_after(timeout):
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                async with aclosing(response.aiter_raw(PIECE)) as blocks:
                    async for block in blocks:
                        body += block
                        if len(body) >= MOST:
                            break
            finally:
                await response.aclose()
    except (TimeoutError, httpx2.TimeoutException):
        raise NoAnswerError(f"no complete answer within {timeout:g} s") from None
    except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError) as exc:
        raise ClosedError(f"the connection was closed: {exc}") from exc
    except (httpx2.HTTPError, OSError) as exc:
        raise NoAnswerError(f"no answer: {type(exc).__name__}: {exc}") from exc
    headers = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw)
    return Answer(response.status_code, headers, bytes(body[:MOST]))
