"""Downloads as clients make them: begun, cut, resumed at any byte, and compared with the content byte by byte."""

import asyncio
import json
import re
import socket
import time
import zipfile
from dataclasses import dataclass, field
from io import BytesIO
from typing import Literal
from urllib.parse import unquote

from tests.cluster.contents import SHARED, content

Result = Literal["complete", "denied", "refused", "wrong"]
"""complete: the client has all that it wanted. denied: 403, 410 or 429, which is a decision of the service. refused: no
answer, or a 5xx, for as long as the client tried. wrong: not the bytes of the file."""

End = Literal["complete", "denied", "no answer", "5xx", "cut", "stalled", "left", "wrong"]

_PATIENCE = 20.0
_STALLED = 4.0
_DENIED = (403, 404, 410, 429)


@dataclass(slots=True)
class Attempt:
    """One request of a download. Times are of the wall clock."""

    begun: float
    offset: int
    id: str = ""
    """What the request says in `X-Attempt`: the log of the proxy in front has it."""
    ended: float = 0.0
    head: float = 0.0
    """When the head of the answer was there; 0 if none came."""
    status: int = 0
    received: int = 0
    end: End = "no answer"
    version: str = ""


@dataclass(slots=True)
class Download:
    """What a client wants, and what it has got.

    name: of the content; None for a listing or an archive. first, last: the range that it wants; without them, the
    whole file. pace: bytes per second that it takes, until it is cut. leaves: the offset at which it leaves, to come
    back.
    """

    number: int
    kind: str
    path: str
    name: str | None
    address: str
    first: int | None = None
    last: int | None = None
    pace: float = 0.0
    leaves: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    result: Result = "refused"
    problem: str = ""
    etag: str = ""

    @property
    def agent(self) -> str:
        """The User-Agent, which no other download has."""
        return f"cluster/{self.number}"

    @property
    def is_whole(self) -> bool:
        """Whether the client wants the whole file."""
        return self.first is None

    @property
    def cut(self) -> Attempt | None:
        """The first attempt that ended too early, or got no answer from any server."""
        return next((one for one in self.attempts if one.end in ("no answer", "5xx", "cut", "stalled")), None)

    def __str__(self) -> str:
        tries = "... " * (len(self.attempts) > 6) + ", ".join(
            f"{one.end} {one.status} +{one.offset} {one.received} B in {one.ended - one.begun:.2f} s"
            for one in self.attempts[-6:]
        )
        return f"{self.agent} {self.kind} {self.path.partition('?')[0]} {self.result} {self.problem}[{tries}]"


class Driver:
    """Makes downloads at a port, and keeps them."""

    def __init__(self, port: int, agents: int = 0, slack: int = 1) -> None:
        self._patience, self._stalled = _PATIENCE * slack, _STALLED * slack
        self._port = port
        self._numbers = agents
        self._addresses = agents
        self.downloads: list[Download] = []
        self.hurries = False
        """Whether clients take all that they can, to come to their end."""

    def address(self) -> str:
        """Return an address of this machine from which no other client has come."""
        self._addresses += 1
        return f"127.{30 + self._port % 200}.{self._addresses // 250}.{self._addresses % 250 + 1}"

    def download(
        self,
        kind: str,
        path: str,
        name: str | None,
        *,
        address: str = "127.0.0.1",
        first: int | None = None,
        last: int | None = None,
        pace: float = 0.0,
        leaves: int = 0,
    ) -> Download:
        """Return a new download."""
        self._numbers += 1
        new = Download(self._numbers, kind, path, name, address, first, last, pace, leaves)
        self.downloads.append(new)
        return new

    async def fetch(self, download: Download) -> Download:
        """Make requests until the client has what it wants, or is denied it, or has tried for too long."""
        body = bytearray() if download.name is None else None
        have, ends = 0, time.monotonic() + self._patience
        while True:
            attempt = Attempt(time.time(), have, f"{download.number}.{len(download.attempts) + 1}")
            download.attempts.append(attempt)
            try:
                await self._attempt(download, attempt, body)
            except TimeoutError:
                attempt.end = "stalled" if attempt.head else "no answer"
            except (OSError, asyncio.IncompleteReadError) as exc:
                attempt.end = "cut" if attempt.head else "no answer"
                download.problem = f"{exc!r} "
            attempt.ended = time.time()
            have += attempt.received
            if attempt.end in ("complete", "denied", "wrong"):
                download.result = attempt.end
                break
            if time.monotonic() > ends:
                break
            if attempt.end in ("no answer", "5xx"):
                await asyncio.sleep(0.1)
        if download.result == "complete" and body is not None:
            problem = _problem_with(download, bytes(body))
            download.result, download.problem = ("wrong", problem) if problem else ("complete", "")
        return download

    async def _attempt(self, download: Download, attempt: Attempt, body: bytearray | None) -> None:
        start = (download.first or 0) + attempt.offset
        fields = [
            f"GET {download.path} HTTP/1.1",
            "Host: cluster",
            f"User-Agent: {download.agent}",
            f"X-Attempt: {attempt.id}",
            "Connection: close",
        ]
        if attempt.offset or not download.is_whole:
            fields.append(f"Range: bytes={start}-{'' if download.last is None else download.last}")
        if attempt.offset:
            fields.append(f"If-Range: {download.etag}")
        if download.kind == "listing":
            fields.append("Accept: application/json")
        sock = socket.socket()
        sock.setblocking(False)
        if download.pace and download.cut is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        writer = None
        try:
            sock.bind((download.address, 0))
            async with asyncio.timeout(self._patience):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
                reader, writer = await asyncio.open_connection(sock=sock)
                writer.write(("\r\n".join(fields) + "\r\n\r\n").encode())
                raw = await reader.readuntil(b"\r\n\r\n")
            await self._answer(download, attempt, body, start, raw.decode("latin-1"), reader)
        finally:
            if writer is not None:
                writer.transport.abort() if attempt.end == "left" else writer.close()
            sock.close() if writer is None else None

    async def _answer(
        self,
        download: Download,
        attempt: Attempt,
        body: bytearray | None,
        start: int,
        head: str,
        reader: asyncio.StreamReader,
    ) -> None:
        attempt.head = time.time()
        attempt.status = int(head.split(" ", 2)[1])
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
        }
        attempt.version = headers.get("x-version", "")
        size = int(headers["content-length"])
        if attempt.status not in (200, 206):
            await reader.readexactly(size)
            attempt.end = "5xx" if attempt.status >= 500 else "denied" if attempt.status in _DENIED else "wrong"
            return
        problem = _problem_of_head(download, attempt, start, size, headers)
        if problem:
            attempt.end, download.problem = "wrong", f"{problem}: {head!r}"
            return
        download.etag = download.etag or headers.get("etag", "")
        expected = memoryview(content(download.name)) if download.name is not None else None
        began, pace = time.monotonic(), 0.0 if download.cut else download.pace
        while attempt.received < size:
            async with asyncio.timeout(self._stalled):
                block = await reader.read(min(1 << 16, size - attempt.received))
            if not block:
                attempt.end = "cut"
                return
            if expected is None:
                assert body is not None
                body += block
            elif block != expected[start + attempt.received : start + attempt.received + len(block)]:
                attempt.end, download.problem = "wrong", f"other bytes after {start + attempt.received}"
                return
            attempt.received += len(block)
            if download.leaves and attempt.offset < download.leaves <= attempt.offset + attempt.received < size:
                attempt.end = "left"
                return
            if pace and not self.hurries:
                await asyncio.sleep(max(0.0, began + attempt.received / pace - time.monotonic()))
        attempt.end = "complete"


def _problem_of_head(download: Download, attempt: Attempt, start: int, size: int, headers: dict[str, str]) -> str:
    etag = headers.get("etag", "")
    if download.etag and etag != download.etag:
        return f"another entity tag than {download.etag}"
    is_part = attempt.offset > 0 or not download.is_whole
    if attempt.status != (206 if is_part else 200):
        return "a whole file instead of a part" if is_part else "a part instead of the whole file"
    if download.name is None and not is_part:
        return ""
    if is_part:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("content-range", ""))
        is_right = match is not None and int(match[1]) == start and int(match[2]) - int(match[1]) + 1 == size
        return "" if is_right else "another Content-Range"
    return "" if download.name is None or size == len(content(download.name)) else "another size"


def _problem_with(download: Download, body: bytes) -> str:
    """Return what is wrong with a listing or an archive of the folder `dir`, or nothing."""
    names = {name.removeprefix("dir/") for name in SHARED if name.startswith("dir/")}
    try:
        if download.kind == "listing":
            listed = {unquote(entry["name"]) for entry in json.loads(body)["entries"]}
            return "" if listed == names else f"the listing has {listed}"
        with zipfile.ZipFile(BytesIO(body)) as archive:
            files = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    except (ValueError, KeyError, zipfile.BadZipFile) as exc:
        return repr(exc)
    return "" if files == {name: content(f"dir/{name}") for name in names} else f"the archive has {sorted(files)}"
