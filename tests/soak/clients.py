"""What clients do: each function is one visit of one client, chosen at random."""

import asyncio
import contextlib
import io
import re
import zipfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from urllib.parse import quote

from downloadview_async.sources.archive import SHARED_SECONDS
from tests.soak.contents import OUTSIDE, Tree, content, is_cleared
from tests.soak.exchange import USER, Connection, Ended, Hangs
from tests.soak.ledger import Ledger, Record, Result
from tests.soak.site import STORED, Site

STALE = 90.0
"""Seconds after which no client gets a replaced version of a cached file: more than any fill and its clients take."""


@dataclass
class World:
    """What all clients and faults share."""

    site: Site
    ledger: Ledger
    random: Random
    tests_stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the load ends, so that clients that only wait do not hold it up."""


@dataclass(slots=True)
class Answer:
    """A record, and the body and head that belong to it."""

    record: Record
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Target:
    """A file by its URL. part: the part of the site that it depends on."""

    path: str
    name: str
    part: str


def source_address(random: Random) -> str:
    """Return an address that a client may come from."""
    return f"127.0.0.{random.randint(2, 250)}"


def target(world: World, *parts: str) -> Target:
    """Choose a file of one of the parts `files`, `mirror`, `store` and `users`."""
    part = world.random.choice(parts or ("files", "files", "files", "mirror", "mirror", "store"))
    if part == "store":
        return Target(f"/store/{STORED}", STORED, "store")
    tree = world.site.origin if part == "mirror" else world.site.files
    name = world.random.choice(tree.names)
    return Target(f"/{part}/{name}", name, "mirror" if part == "mirror" else "files")


async def ask(
    world: World,
    kind: str,
    path: str,
    part: str,
    *,
    method: str = "GET",
    fields: Mapping[str, str] = {},
    connection: Connection | None = None,
    source: str | None = None,
    stop_at: int | None = None,
    resets: bool = False,
    pause: float = 0.0,
    half_closes: bool = False,
) -> Answer:
    """Send a request and read the answer, and check all that holds for any answer.

    stop_at: bytes after which the client leaves, with a reset if it `resets`.
    """
    ledger = world.ledger
    record = ledger.begin(kind, method, path)
    own = connection is None
    used = connection or Connection(world.site, ledger, source=source or source_address(world.random))
    body, result, why = bytearray(), _NOTHING, ""
    try:
        if own:
            await used.open(small_buffers=pause > 0 or stop_at is not None)
        used.send(record, fields)
        if half_closes and used.writer is not None and used.writer.can_write_eof():
            used.writer.write_eof()
        await used.head(record)
        result = "cut"
        await used.body(record, body, most=stop_at, pause=pause)
        size = int(used.headers.get("content-length", len(body)))
        result = "left" if stop_at is not None and len(body) < size and method != "HEAD" else "complete"
    except Ended as exc:
        why = str(exc)
    except Hangs:
        why = "hangs"
        ledger.check("no answer hangs", ledger.excuses(part, record.begun), record)
    except ConnectionRefusedError:
        result = "refused"
    except OSError as exc:
        why = repr(exc)
    finally:
        if result == "left" and resets:
            used.reset()
        elif own or result != "complete":
            used.close()
        ledger.end(record, result)
    _check_any(world, record, bytes(body), part, why, is_again=not own and used.used > 1)
    return Answer(record, bytes(body), dict(used.headers))


_NOTHING: Result = "nothing"
_COMPLETE: Result = "complete"


def _check_any(world: World, record: Record, body: bytes, part: str, why: str, *, is_again: bool) -> None:
    ledger, since = world.ledger, record.begun
    ledger.check("no outside byte", OUTSIDE[:20] not in body, record)
    if record.result in ("refused", "nothing"):
        excused = ledger.excuses("process", since) or ledger.excuses("descriptors", since)
        excused = excused or (is_again and ledger.excuses("restart", since))
        ledger.check("an answer for each request", excused, f"{record}: {why}")
    elif record.result == "cut":
        excused = (
            ledger.excuses(part, since) or ledger.excuses("process", since) or ledger.excuses("descriptors", since)
        )
        ledger.check("no answer is cut", excused or _was_cut(world, record), f"{record}: {why}")
    if record.status >= 500:
        excused = ledger.excuses(f"{part} 5xx", since) or ledger.excuses("descriptors", since)
        excused = excused or (world.site.shape.behind_nginx and ledger.excuses("process", since))
        excused = excused or _changed_archive(world, record) or _was_late(world, record)
        ledger.check("no 5xx without a fault", excused, f"{record}: {body[:200]!r}")


def _was_late(world: World, record: Record) -> bool:
    """Return whether the store of links has not answered in its 2 seconds, as on a machine that does much else."""
    is_late = record.kind.startswith("once") and record.status == 503 and record.ended - record.begun >= 2
    world.ledger.seen["late store of links", "503"] += is_late
    return is_late


def _was_cut(world: World, record: Record) -> bool:
    files = world.site.files
    if _changed_archive(world, record) or _had_too_many_parts(world, record) or _was_replaced(world, record):
        return True
    name = record.path.partition("?")[0].lstrip("/").partition("/")[2]
    return name in files.versions and files.was_cut(name, record.begun, record.ended)


def _had_too_many_parts(world: World, record: Record) -> bool:
    """Return whether the full cache could not take a file of which several parts are wanted: see docs/limits.md."""
    has_many = record.kind == "several ranges" and record.path.startswith("/mirror/")
    world.ledger.seen["several ranges of a full cache", "cut"] += has_many
    return has_many


def _was_replaced(world: World, record: Record) -> bool:
    """Return whether an object was replaced meanwhile of which several parts are wanted: each is one more request."""
    has_parts = record.kind == "several ranges" and record.path.startswith("/store/")
    was_replaced = has_parts and world.ledger.has_begun("object replaced", record.begun)
    world.ledger.seen["several ranges of a replaced object", "cut"] += was_replaced
    return was_replaced


def _changed_archive(world: World, record: Record) -> bool:
    """Return whether a request was for an archive of which a file has changed, or did while its layout was shared."""
    files, since = world.site.files, record.begun - SHARED_SECONDS
    return "archive=" in record.path and any(len(files.lived(name, since, record.ended)) > 1 for name in files.names)


def check_file(world: World, answer: Answer, what: Target, *, may: tuple[int, ...] = (200,)) -> int | None:
    """Check that an answer has bytes of one version of a file, also if it is cut. Return the version's number."""
    record, ledger = answer.record, world.ledger
    if record.status in (200, 206) and record.method == "GET":
        start, size = 0, int(answer.headers.get("content-length", -1))
        if record.status == 206:
            match = re.fullmatch("bytes ([0-9]+)-([0-9]+)/([0-9]+)", answer.headers.get("content-range", ""))
            if not ledger.check("Content-Range", match is not None, answer.headers):
                return None
            assert match is not None
            start, size = int(match[1]), int(match[3])
            length = int(match[2]) + 1 - start
            ledger.check("Content-Length", answer.headers.get("content-length") == str(length), answer.headers)
        number = version_of(world, what, answer.body, start, size, record)
        known = number is not None or _is_mixed(world, what, answer.body, start, size, record)
        ledger.check("bytes of one version", known, f"{record} {answer.headers} {answer.body[:70]!r}")
        return number
    if record.status == 404:
        tree = world.site.origin if what.part == "mirror" else world.site.files
        since = record.begun - (STALE if what.part == "mirror" else 0)
        missing = what.part != "store" and tree.was_missing(what.name, since, record.ended)
        ledger.check("no 404 for a file", missing, record)
    elif record.status and record.status < 500:
        ledger.check("an expected status", record.status in may, f"{record}: {answer.body[:200]!r}")
    return None


def _is_mixed(world: World, what: Target, body: bytes, start: int, size: int, record: Record) -> bool:
    """Return whether a file was cut in place meanwhile: the kernel clears bytes that it has not passed on yet."""
    if what.part == "mirror":
        tree, name = world.site.origin, what.name
        lived = tree.lived(name, record.begun - STALE, record.ended)
        is_mixed = world.ledger.excuses("cleared", record.begun) and any(
            version.size == size and is_cleared(body, content(name, version.number, size)[start:]) for version in lived
        )
    else:
        is_mixed = what.part == "files" and world.site.files.was_cut(what.name, record.begun, record.ended)
    world.ledger.seen["cut in place while it was sent", "mixed"] += is_mixed
    return is_mixed


def version_of(world: World, what: Target, body: bytes, start: int, size: int, record: Record) -> int | None:
    """Return the number of the newest version that these bytes are of."""
    return next(versions_of(world, what, body, start, size, record), None)


def versions_of(world: World, what: Target, body: bytes, start: int, size: int, record: Record) -> Iterator[int]:
    """Yield the numbers of all versions that these bytes are of: a few bytes may be the same in several."""
    if what.part == "store":
        for number in range(world.site.stored, max(0, world.site.stored - 8), -1):
            if size == 900_000 and content(STORED, number, size)[start : start + len(body)] == body:
                yield number
        return
    tree: Tree = world.site.origin if what.part == "mirror" else world.site.files
    since = record.begun - (STALE if what.part == "mirror" else 0)
    for version in tree.matches(what.name, body, start, size, since=since, until=record.ended):
        yield version.number


def limited(world: World) -> tuple[int, int]:
    """Return a random span within the first megabyte."""
    first = world.random.randrange(0, 200_000)
    return first, first + world.random.randrange(0, 400_000)


async def whole(world: World) -> None:
    """Get a whole file."""
    what = target(world)
    check_file(world, await ask(world, "whole", what.path, what.part), what)


async def kept(world: World) -> None:
    """Get files one after another on one connection."""
    connection = Connection(world.site, world.ledger, source=source_address(world.random))
    try:
        await connection.open()
        for _ in range(world.random.randint(2, 6)):
            what = target(world)
            answer = await ask(world, "kept", what.path, what.part, connection=connection)
            check_file(world, answer, what)
            if answer.record.result != "complete" or not connection.is_kept:
                return
    except OSError as exc:
        excused = world.ledger.excuses("descriptors", 0) or world.ledger.excuses("process", 0)
        world.ledger.check("an answer for each request", excused, repr(exc))
    finally:
        connection.close()


async def head(world: World) -> None:
    """Ask for the head alone, and then by its validators."""
    what = target(world)
    answer = await ask(world, "head", what.path, what.part, method="HEAD")
    check_file(world, answer, what)
    if answer.record.status == 200 and (etag := answer.headers.get("etag")):
        again = await ask(world, "conditional", what.path, what.part, fields={"If-None-Match": etag})
        check_file(world, again, what, may=(304,))


async def ranged(world: World) -> None:
    """Get a range."""
    what, (first, last) = target(world), limited(world)
    value = world.random.choice((f"bytes={first}-{last}", f"bytes={first}-", f"bytes=-{last - first + 1}", "bytes=0-0"))
    check_file(world, await ask(world, "range", what.path, what.part, fields={"Range": value}), what, may=(206, 416))


async def several(world: World) -> None:
    """Get several ranges."""
    what = target(world, "files", "mirror", "store")
    spans = [
        (start * 40_000, start * 40_000 + world.random.randrange(1, 9_000))
        for start in range(world.random.randint(2, 6))
    ]
    value = ",".join(f"{first}-{last}" for first, last in spans)
    answer = await ask(world, "several ranges", what.path, what.part, fields={"Range": f"bytes={value}"})
    kind = answer.headers.get("content-type", "")
    if answer.record.status != 206 or not kind.startswith("multipart/"):
        check_file(world, answer, what, may=(206, 416))
        return
    if answer.record.result != "complete":
        return
    boundary = kind.partition("boundary=")[2].strip('"').encode()
    found = []
    for part in answer.body.split(b"--" + boundary)[1:-1]:
        lines, _, body = part.partition(b"\r\n\r\n")
        match = re.search(rb"(?i)content-range: bytes ([0-9]+)-([0-9]+)/([0-9]+)", lines)
        assert match is not None
        first, last, size = (int(value) for value in match.groups())
        body = body[:-2]
        world.ledger.check("length of a part", len(body) == last + 1 - first, answer.record)
        found.append(set(versions_of(world, what, body, first, size, answer.record)))
    ok = bool(found) and bool(set.intersection(*found))
    world.ledger.check("parts of one version", ok, f"{answer.record}: versions {found}")


async def resumed(world: World) -> None:
    """Leave in the middle, and get the rest by the entity tag."""
    what = target(world)
    stop_at = world.random.randrange(1, 300_000)
    first = await ask(world, "begun", what.path, what.part, stop_at=stop_at, resets=world.random.random() < 0.5)
    begun = check_file(world, first, what)
    etag = first.headers.get("etag", "")
    if begun is None or first.record.result != "left" or not etag or etag.startswith("W/"):
        return
    fields = {"Range": f"bytes={len(first.body)}-", "If-Range": etag}
    rest = await ask(world, "resumed", what.path, what.part, fields=fields)
    number = check_file(world, rest, what, may=(206,))
    if rest.record.status == 206 and number is not None:
        same = number == begun or _have_one_tag_of_nginx(world, what, begun, number)
        same = same and rest.headers.get("etag") == etag
        world.ledger.check("a resume is of the same version", same, f"{rest.record}: {begun} and {number}")


def _have_one_tag_of_nginx(world: World, what: Target, *numbers: int) -> bool:
    """Return whether versions were made in one second, which is all that the tag of nginx has: see docs/limits.md."""
    if what.part != "files" or not world.site.shape.behind_nginx:
        return False
    born = [version.born for version in world.site.files.versions[what.name] if version.number in numbers]
    have_one = len(born) >= len(numbers) and max(born) - min(born) < 1
    world.ledger.seen["two versions in a second", "resumed"] += have_one
    return have_one


async def slow(world: World) -> None:
    """Get a file slowly."""
    what = target(world, "files", "mirror", "store")
    answer = await ask(world, "slow", what.path, what.part, pause=world.random.choice((0.02, 0.05)))
    check_file(world, answer, what)


async def stalls(world: World) -> None:
    """Ask for a large file, and read nothing until the server or the end of the load ends the connection."""
    what = Target("/files/large.bin", "large.bin", "files")
    record = world.ledger.begin("stalls", "GET", what.path)
    connection = Connection(world.site, world.ledger, source=source_address(world.random))
    try:
        await connection.open(small_buffers=True)
        connection.send(record)
        with contextlib.suppress(Ended, Hangs):
            await connection.head(record)
        assert connection.writer is not None
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.tests_stop.wait(), world.random.uniform(1, 12))
    except (OSError, RuntimeError):
        pass
    finally:
        connection.reset()
        world.ledger.end(record, "left")


async def leaves(world: World) -> None:
    """Ask, and leave before the answer or in the middle of it."""
    what = target(world)
    if world.random.random() < 0.5:
        stop_at = world.random.choice((1, 1000, 70_000, 500_000))
        answer = await ask(world, "leaves", what.path, what.part, stop_at=stop_at, resets=world.random.random() < 0.7)
        check_file(world, answer, what)
        return
    record = world.ledger.begin("leaves at once", "GET", what.path)
    connection = Connection(world.site, world.ledger, source=source_address(world.random))
    try:
        await connection.open()
        connection.send(record)
        await asyncio.sleep(world.random.choice((0, 0, 0.001, 0.01)))
    except OSError:
        pass
    finally:
        connection.reset() if world.random.random() < 0.5 else connection.close()
        world.ledger.end(record, "left")


async def half_closes(world: World) -> None:
    """Close the sending side after the request."""
    if world.site.shape.behind_nginx:
        return  # for nginx, the client has left then
    what = target(world)
    check_file(world, await ask(world, "half-closes", what.path, what.part, half_closes=True), what)


async def pipelines(world: World) -> None:
    """Send several requests at once."""
    connection = Connection(world.site, world.ledger, source=source_address(world.random))
    what = [target(world, "files") for _ in range(world.random.randint(2, 8))]
    records = [world.ledger.begin("pipelined", "GET", one.path) for one in what]
    left = [*zip(records, what, strict=True)]
    try:
        await connection.open()
        for record in records:
            connection.send(record)
        while left:
            record, one = left[0]
            await connection.head(record)
            body, result = bytearray(), _COMPLETE
            try:
                await connection.body(record, body)
            except (Ended, Hangs):
                result = "cut"
            left.pop(0)
            world.ledger.end(record, result)
            _check_any(world, record, bytes(body), one.part, "pipelined", is_again=True)
            check_file(world, Answer(record, bytes(body), dict(connection.headers)), one)
            if result != "complete" or not connection.is_kept:
                break
    except (OSError, Ended, Hangs):
        pass
    finally:
        connection.close()
        for record, _ in left:
            world.ledger.end(record, "left")


_HOSTILE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /files/a.bin HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /files/a.bin HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /files/%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /files/..%2f..%2foutside/secret.bin HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /files/../outside/secret.bin HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET //files//a.bin HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /files/a.bin HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    b"GET /files/a.bin HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"GET /files/large.bin HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000,
    b"POST /files/a.bin HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"GET /files/a.bin HTTP/1.1\r\nHost: a\r\nRange: bytes=" + b"0-0," * 10_000 + b"1-1\r\n\r\n",
    b"GET /files/a.bin HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    b"\x00" * 4096,
    b"G",
    b"",
    b"GET /files/large.bin HTTP/1.1\r\nHost: a\r\n\r\n\x00\x01junk\r\n\r\n",
    b"GET /users/a.bin HTTP/1.1\r\nHost: a\r\nAuthorization: Basic !!!!\r\n\r\n",
    b"GET /once/a.bin?x=1&x=2&=&%ff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"DELETE /files/a.bin HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /files/a.bin HTTP/1.1\r\nHost: a\r\nX-Accel-Mapping: /=/\r\nX-Sendfile-Type: X-Accel-Redirect\r\n\r\n",
    b"GET /files/leak.bin HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /files/swap/secret.bin HTTP/1.1\r\nHost: a\r\n\r\n" * 20,
]


async def hostile(world: World) -> None:
    """Send bytes that no client should send. Any answer is right that has no outside byte and is no 5xx."""
    begun = asyncio.get_running_loop().time()
    raw = world.random.choice(_HOSTILE)
    if world.random.random() < 0.3:
        mutated = bytearray(raw)
        for _ in range(3):
            if mutated:
                mutated[world.random.randrange(len(mutated))] = world.random.randrange(256)
        raw = bytes(mutated)
    connection = Connection(world.site, world.ledger, source=source_address(world.random))
    got = bytearray()
    try:
        await connection.open()
        assert connection.writer is not None
        connection.writer.write(raw)
        async with asyncio.timeout(world.random.uniform(0.05, 2)):
            while len(got) < 1 << 18:
                got += await connection.block(1 << 16)
    except (OSError, Ended, Hangs, TimeoutError):
        pass
    finally:
        connection.reset() if world.random.random() < 0.5 else connection.close()
    world.ledger.seen["hostile", got[9:12].decode("latin-1") if got[:5] == b"HTTP/" else "nothing"] += 1
    world.ledger.check("no outside byte", OUTSIDE[:20] not in got, raw[:200])
    excused = (
        world.ledger.excuses("descriptors", begun)
        or world.ledger.excuses("process", begun)
        or bytes(got[9:12]) in (b"505", b"501")
    )
    excused = excused or b"/users" in raw
    world.ledger.check("no 5xx for hostile bytes", excused or got[9:10] != b"5", f"{raw[:200]!r}: {bytes(got[:300])!r}")


async def swapped(world: World) -> None:
    """Ask for a file in a directory that is swapped for a link to the outside."""
    path = world.random.choice(("/files/swap/secret.bin", "/files/leak.bin"))
    answer = await ask(world, "swapped", path, "files")
    ok = answer.record.status in (0, 200, 404) or answer.record.status >= 500
    world.ledger.check("an expected status", ok, answer.record)
    if answer.record.status == 200:
        world.ledger.check(
            "no outside byte", answer.body == b"inside\n" * 1000 or answer.record.result != "complete", answer.record
        )


async def handshakes(world: World) -> None:
    """Begin a TLS handshake, and leave."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", world.site.port)
        writer.write(
            b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + world.random.randbytes(world.random.choice((0, 20, 193)))
        )
        await asyncio.sleep(world.random.choice((0, 0.01, 0.3)))
        if world.random.random() < 0.5:
            writer.transport.abort()
        writer.close()
    world.ledger.seen["handshake", "left"] += 1


async def archived(world: World) -> None:
    """Get a folder as an archive: whole, or cut and resumed."""
    path = "/files/dir/?archive=zip"
    if world.random.random() < 0.5:
        first = await ask(world, "archive begun", path, "files", stop_at=world.random.randrange(1, 900_000))
        etag = first.headers.get("etag", "")
        if first.record.status != 200 or not etag or etag.startswith("W/") or first.record.result != "left":
            return
        fields = {"Range": f"bytes={len(first.body)}-", "If-Range": etag}
        answer = await ask(world, "archive resumed", path, "files", fields=fields)
        if answer.record.status == 206:
            answer.body = first.body + answer.body
    else:
        answer = await ask(world, "archive", path, "files")
    ok = answer.record.status in (0, 200, 206) or answer.record.status >= 500
    world.ledger.check("an expected status", ok, answer.record)
    if answer.record.status not in (200, 206) or answer.record.result != "complete":
        return
    tree = world.site.files
    try:
        with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    body, name = archive.read(info), f"dir/{info.filename.rpartition('/')[2]}"
                    since = answer.record.begun - STALE
                    found = tree.match(name, body, 0, len(body), since=since, until=answer.record.ended)
                    world.ledger.check("archived file of one version", found is not None, f"{answer.record}: {name}")
    except (zipfile.BadZipFile, OSError) as exc:
        is_mixed = any(tree.was_cut(name, answer.record.begun - STALE, answer.record.ended) for name in tree.names)
        world.ledger.seen["cut in place while it was sent", "mixed"] += is_mixed
        world.ledger.check("a whole archive", is_mixed, f"{answer.record}: {exc!r}")


async def listed(world: World) -> None:
    """List a folder."""
    form = world.random.choice(("", "?format=json", "?format=jsonl", "?sort=size"))
    answer = await ask(world, "listing", f"/files/dir/{form}", "files")
    if answer.record.status == 200 and answer.record.result == "complete":
        world.ledger.check(
            "a listing has the files", b"d.bin" in answer.body or _changed(world, answer.record), answer.record
        )
    else:
        ok = answer.record.status >= 500 or answer.record.result != "complete"
        world.ledger.check("an expected status", ok, answer.record)


def _changed(world: World, record: Record) -> bool:
    return world.site.files.was_missing("dir/d.bin", record.begun, record.ended)


async def used_once(world: World) -> None:
    """Use a link for one download from several addresses at the same time, and again later."""
    name = world.random.choice(("a.bin", "b.bin", "dir/d.bin"))
    link = world.site.signer.sign(f"/once/{name}", uses=1, expires_in=timedelta(hours=1))
    what = Target(link, name, "files")
    begun = asyncio.get_running_loop().time()
    sources = world.random.sample(range(2, 250), 4)
    answers = await asyncio.gather(
        *(ask(world, "once", link, "files", source=f"127.0.0.{number}") for number in sources)
    )
    good = []
    for answer in answers:
        if answer.record.status != 410:
            check_file(world, answer, what, may=(403,) if world.ledger.excuses("keys", begun) else ())
        good += [answer] if answer.record.status == 200 else []
    world.ledger.check("a link for one download", len(good) <= 1, [answer.record for answer in answers])
    if good:
        source = f"127.0.0.{world.random.choice([n for n in range(2, 250) if n not in sources])}"
        late = await ask(world, "once, late", link, "files", source=source)
        world.ledger.check("a link for one download", late.record.status not in (200, 206), late.record)


async def as_user(world: World) -> None:
    """Get a file as a user, or with a wrong password."""
    what = target(world, "users")
    is_right = world.random.random() < 0.8
    fields = {"Authorization": USER if is_right else "Basic YWRhOndyb25n"}
    source = "127.0.0.1" if is_right else source_address(world.random)
    answer = await ask(world, "user" if is_right else "wrong user", what.path, what.part, fields=fields, source=source)
    if is_right:
        check_file(world, answer, what)
    else:
        ok = answer.record.status in (0, 401, 429) or answer.record.status >= 500
        world.ledger.check("an expected status", ok, answer.record)


async def beyond_limits(world: World) -> None:
    """Ask for more files at once than a client may have."""
    source = source_address(world.random)
    what = Target("/limited/dir/d.bin", "dir/d.bin", "files")
    many = [ask(world, "limited", what.path, what.part, source=source, pause=0.01) for _ in range(4)]
    for answer in await asyncio.gather(*many):
        check_file(world, answer, what, may=(429,))


async def unknown(world: World) -> None:
    """Ask for a file that never was."""
    part = world.random.choice(("files", "mirror"))
    name = f"/{part}/{quote(world.random.choice(('no.bin', 'dir', 'é.bin', 'x' * 300, 'dir/c.bin/x')))}"
    answer = await ask(world, "unknown", name, part)
    ok = answer.record.status in (0, 404, 308 if name == "/files/dir" else 404) or answer.record.status >= 500
    world.ledger.check("an expected status", ok, answer.record)


Visit = Callable[[World], Awaitable[None]]
VISITS: list[Visit] = [
    *(whole, whole, kept, ranged, ranged, several, resumed, resumed, head, slow, stalls, leaves, leaves, half_closes),
    *(pipelines, hostile, hostile, swapped, handshakes, archived, listed, used_once, as_user, beyond_limits, unknown),
]


async def visits(world: World) -> None:
    """Make one visit after another, until the load ends."""
    while not world.tests_stop.is_set() and not world.ledger.problems:
        await world.random.choice(VISITS)(world)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.tests_stop.wait(), world.random.uniform(0, 0.15))
