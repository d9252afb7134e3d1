"""The least that a small answer can cost in Python, and what has to be done besides for each request.

    python -m benchmarks.apps.floor_answers PORT [PART...]

Without parts, a request gets the answer that is kept in memory for its bytes. The parts are `json`: a line in a log;
`metrics`: counts and a histogram; `limits`: requests and bytes of a client in their windows; `counts`: downloads by
day, file and client; `signed`: a link that is verified. Each is done in as few steps as possible, for what the
benchmark sends alone, and nothing is written to a database. So no server in Python does for less what a part adds here.
"""

import asyncio
import hashlib
import hmac
import os
import sys
from binascii import b2a_base64
from bisect import bisect
from pathlib import Path
from time import gmtime, monotonic, strftime, time
from typing import Any

import uvloop

from benchmarks.running import SECRET

_FILES = Path(os.environ["BENCH_FILES"])
_PATH = b"/files/10k.bin"
_SECONDS = 0.05  # what is written for each request is written together for this time
_BOUNDS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60]
_MINUTE, _DAY = 60, 86_400
_MOST = 1 << 60
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_IN_LOG = (
    ',"user":null,"link_id":null,"method":"GET","status":200,"result":"completed","reason":null,"kind":"inline",'
    '"path":"/files/10k.bin","bytes":10240,"seconds":'
)
_AT_END = (
    ',"name":"10k.bin","etag":"\\"5f5e100-2800\\"","size":10240,"user_agent":null,"route":"/files/{path:path}",'
    '"source":"files"}'
)

parts = frozenset(sys.argv[2:])
body = (_FILES / _PATH.rpartition(b"/")[2].decode()).read_bytes()
answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n%b" % (
    len(body),
    body,
)
answers: dict[bytes, bytes] = {}
lines: list[str] = []
ids: list[str] = []
requests, sent, buckets = [0], [0], [0] * (len(_BOUNDS) + 1)
windows: dict[str, list[int]] = {}
downloads: dict[tuple[int, bytes, str], int] = {}
log = os.open(os.devnull, os.O_WRONLY)
last_date = -1, ""


def _keyed(byte: int, begin: bytes = b"") -> "hashlib._Hash":
    return hashlib.sha256(bytes(one ^ byte for one in SECRET.encode().ljust(64, b"\0")) + begin)


_INNER = _keyed(0x36, b"".join(len(part).to_bytes(8) + part for part in (b"downloadview 1", b"GET")))
_OUTER = _keyed(0x5C)


def _is_valid(path: bytes, query: bytes) -> bool:
    """Return whether a link has the signature of the key of the benchmark. See `policy/formats/complete.py`."""
    signed, _, signature = query.rpartition(b"&s=")
    inner, outer = _INNER.copy(), _OUTER.copy()
    inner.update(b"".join((len(path).to_bytes(8), path, len(signed).to_bytes(8), signed)))
    outer.update(inner.digest())
    return hmac.compare_digest(b2a_base64(outer.digest(), newline=False)[:-1].translate(_URL_SAFE), signature)


def _date(now: float) -> str:
    global last_date
    millis, text = last_date
    if millis != (whole := int(now * 1000)):
        text = f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(now))}.{whole % 1000:03d}Z"
        last_date = whole, text
    return text


def _write_lines(loop: asyncio.AbstractEventLoop) -> None:
    if lines:
        os.write(log, "\n".join([*lines, ""]).encode("ascii"))
        lines.clear()
    loop.call_later(_SECONDS, _write_lines, loop)


class Least(asyncio.Protocol):
    """Answers each read with the file of 10 KiB: a request comes as a whole."""

    def connection_made(self, transport: Any) -> None:
        """Note the client."""
        self.write = transport.write
        self.client: str = transport.get_extra_info("peername")[0]

    def data_received(self, data: bytes) -> None:
        """Answer, and do what the parts want."""
        began = monotonic()
        if "signed" in parts:
            end = data.index(b"\r\n")
            path, _, query = data[4 : end - 9].partition(b"?")
            if not _is_valid(path, query):
                self.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
                return
            data = path + data[end:]
        self.write(answers.get(data) or self._new(data))
        if not parts:
            return
        now, client = time(), self.client
        if "limits" in parts:
            window = windows.get(client)
            if window is None or window[0] != now // _MINUTE or window[2] != now // _DAY:
                window = windows[client] = [int(now // _MINUTE), _MOST, int(now // _DAY), _MOST]
            window[1] -= 1
            window[3] -= len(body)
            if window[1] < 0 or window[3] < 0:
                raise RuntimeError("the limits of the benchmark are never reached")
        if "counts" in parts:
            download = int(now // _DAY), _PATH, client
            downloads[download] = downloads.get(download, 0) + 1
        seconds = monotonic() - began
        if "metrics" in parts:
            requests[0] += 1
            sent[0] += len(body)
            buckets[bisect(_BOUNDS, seconds)] += 1
        if "json" in parts:
            if not ids:
                digits = os.urandom(8192).hex()
                ids.extend([digits[start : start + 32] for start in range(0, len(digits), 32)])
            lines.append(
                f'{{"time":"{_date(now)}","request_id":"{ids.pop()}","client":"{client}"{_IN_LOG}'
                f'{seconds:.6f},"first_byte":{seconds:.6f}{_AT_END}'
            )

    def _new(self, data: bytes) -> bytes:
        if _PATH not in data:
            return b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        answers[data] = answer
        return answer


async def _main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Least, "127.0.0.1", int(sys.argv[1]))
    _write_lines(loop)
    await server.serve_forever()


uvloop.run(_main())
