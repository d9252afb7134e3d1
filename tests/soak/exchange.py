"""One request on a socket, read as strictly as HTTP/1.1 is written."""

import asyncio
import base64
import contextlib
import socket
import ssl
import struct
from collections.abc import Mapping

from tests.soak.ledger import AGENT, Ledger, Record
from tests.soak.site import PATIENCE, Site

WINDOW = 1 << 16
USER = f"Basic {base64.b64encode(b'ada:secret').decode()}"


class Ended(Exception):
    """The connection has ended before the whole answer was there."""


class Hangs(Exception):
    """Nothing has come for `PATIENCE` seconds."""


def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


_TRUSTING = _trusting()


class Connection:
    """A connection of a client. source: the address that it comes from, such as 127.0.0.7."""

    def __init__(self, site: Site, ledger: Ledger, *, source: str = "127.0.0.1", direct: bool = False) -> None:
        self._site = site
        self._ledger = ledger
        self._source = source
        self._port = site.service_port if direct else site.port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None
        self.headers: dict[str, str] = {}
        self.used = 0

    async def open(self, *, small_buffers: bool = False) -> None:
        """Connect. Raises `OSError`."""
        sock = socket.socket()
        sock.setblocking(False)
        try:
            if small_buffers:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            sock.bind((self._source, 0))
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
                tls = _TRUSTING if self._site.shape.tls else None
                self.reader, self.writer = await asyncio.open_connection(
                    sock=sock, ssl=tls, server_hostname="localhost" if tls else None, limit=1 << 17
                )
        except BaseException:
            sock.close()
            raise

    def send(self, record: Record, fields: Mapping[str, str] = {}) -> None:
        """Send a request."""
        assert self.writer is not None
        agent = record.agent if record.number else f"watch{AGENT}"
        lines = [f"{record.method} {record.path} HTTP/1.1", "Host: test", f"User-Agent: {agent}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        self.used += 1

    async def head(self, record: Record) -> None:
        """Read the head of an answer. Raises `Ended`."""
        try:
            async with asyncio.timeout(PATIENCE):
                raw = await self.reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            raise Hangs from None
        except (OSError, asyncio.IncompleteReadError) as exc:
            raise Ended(f"no answer: {exc!r}") from exc
        line, *fields = raw[:-4].decode("latin-1").split("\r\n")
        self.headers = {}
        for field in fields:
            name, _, value = field.partition(":")
            self._ledger.check("no field twice", name.lower() not in self.headers, raw)
            self.headers[name.lower()] = value.strip()
        record.status = int(line.split()[1])
        record.request_id = self.headers.get("x-request-id")

    async def block(self, most: int) -> bytes:
        """Read some bytes. Raises `Ended`, also at the end of the connection."""
        try:
            async with asyncio.timeout(PATIENCE):
                block = await self.reader.read(most)
        except TimeoutError:
            raise Hangs from None
        except OSError as exc:
            raise Ended(repr(exc)) from exc
        if not block:
            raise Ended("the connection has ended")
        return block

    async def body(self, record: Record, into: bytearray, *, most: int | None = None, pause: float = 0.0) -> None:
        """Read the body of an answer, or its first bytes. Raises `Ended`. into: gets what has come, in any case."""
        if record.method == "HEAD" or record.status in (204, 304):
            return
        if self.headers.get("transfer-encoding") == "chunked":
            await self._chunks(record, into)
            return
        size = int(self.headers["content-length"])
        size = size if most is None else min(size, most)
        while len(into) < size:
            block = await self.block(min(WINDOW, size - len(into)))
            into += block
            record.received = len(into)
            if pause:
                await asyncio.sleep(pause)

    async def _chunks(self, record: Record, into: bytearray) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
                    into += (await self.reader.readexactly(size + 2))[:-2]
                    record.received = len(into)
                    if not size:
                        return
        except TimeoutError:
            raise Hangs from None
        except (OSError, asyncio.IncompleteReadError) as exc:
            raise Ended(repr(exc)) from exc

    @property
    def is_kept(self) -> bool:
        """Whether the server keeps the connection open for another request."""
        return self.headers.get("connection", "").lower() != "close" and not self.reader.at_eof()

    def close(self) -> None:
        """Close the connection as programs usually do."""
        if self.writer is not None:
            self.writer.close()

    def reset(self) -> None:
        """Close the connection with a reset."""
        if self.writer is not None:
            sock = self.writer.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):  # a transport that has ended has none any more
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
