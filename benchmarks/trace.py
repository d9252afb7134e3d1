"""Mixed clients of a site of files: recorded shapes of requests, and the real programs that are installed.

Names are as popular as in a law of Zipf. Clients arrive at random times and wait between their requests, as people do.
"""

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from benchmarks.load import HOST, LoadError

_PATIENCE = 60.0  # seconds without a byte, or for a program
_SKEW = 0.9  # the exponent of Zipf's law
_KIB, _MIB = 1 << 10, 1 << 20
_AGE = 3 * 365 * 86400  # seconds; no file is older


@dataclass(frozen=True, slots=True)
class Site:
    """The names of the files, by kind, the most popular ones first. sizes: bytes by name."""

    pages: list[str]
    styles: list[str]
    images: list[str]
    documents: list[str]
    videos: list[str]
    archives: list[str]
    packages: list[str]
    indexes: list[str]
    feeds: list[str]
    sizes: dict[str, int]


def make_site(files: Path, choice: random.Random) -> Site:
    """Make the files of a site, with the times of the last years, and return their names."""
    sizes: dict[str, int] = {}

    def make(count: int, pattern: str, suffixes: Sequence[str], least: int, most: int) -> list[str]:
        names = []
        for number in range(count):
            name = pattern.format(number) + choice.choice(suffixes)
            sizes[name] = min(most, int(least * choice.lognormvariate(1.2, 1.0)) + least)
            _put(files / name, choice.randbytes(min(sizes[name], _MIB)), sizes[name], choice)
            names.append(name)
        return names

    site = Site(
        pages=make(150, "pages/{}/index", [".html"], 2 * _KIB, 80 * _KIB),
        styles=make(16, "assets/{}.3f9a1c", [".css", ".js", ".woff2"], 8 * _KIB, 300 * _KIB),
        images=make(350, "images/photo {} (größer)", [".jpg", ".webp", ".png", ".svg"], 6 * _KIB, 500 * _KIB),
        documents=make(80, "documents/Bericht {}", [".pdf", ".docx", ".xlsx", ".epub"], 100 * _KIB, 6 * _MIB),
        videos=make(12, "videos/{}", [".mp4", ".webm"], 4 * _MIB, 24 * _MIB),
        archives=make(6, "images/{}-amd64", [".iso", ".tar.zst", ".zip"], 8 * _MIB, 32 * _MIB),
        packages=make(1500, "pool/package-{}", ["-1.0-py3-none-any.whl", ".deb", ".tgz"], 3 * _KIB, 2 * _MIB),
        indexes=make(40, "simple/{}/index", [".html", ".json"], 1 * _KIB, 60 * _KIB),
        feeds=make(4, "feeds/{}", [".xml"], 4 * _KIB, 60 * _KIB),
        sizes=sizes,
    )
    for name in site.pages, site.images, site.documents, site.packages:
        choice.shuffle(name)
    return site


def _put(path: Path, content: bytes, size: int, choice: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    # a file that was unpacked from an archive has a time of whole seconds
    age = choice.randrange(60, _AGE) * 10**9 + choice.choice([0, choice.randrange(10**9)])
    changed = path.stat().st_mtime_ns // 10**9 * 10**9 - age
    os.utime(path, ns=(changed, changed))


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer, whose body was read."""

    status: int
    fields: dict[str, str]


class Connection:
    """A kept connection of one client. It is opened again when it was closed."""

    def __init__(self, port: int, **fields: str) -> None:
        self._port = port
        self._fields = {"host": f"{HOST}:{port}", **fields}
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(
        self, path: str, *conditions: Mapping[str, str], method: str = "GET", at_most: int | None = None
    ) -> Reply:
        """Send a request and read the answer. at_most: bytes of the body after which the client closes the connection.

        conditions: further headers.

        Raises `LoadError` for a status that no client expects.
        """
        fields = {name: value for headers in conditions for name, value in headers.items()}
        async with asyncio.timeout(_PATIENCE):
            for is_new in (self._streams is None, True):
                if is_new:
                    await self.close()
                    self._streams = await asyncio.open_connection(HOST, self._port)
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    return await self._get(path, method, at_most, fields)
        raise LoadError(f"{path}: the connection was closed before the end of the answer")

    async def _get(self, path: str, method: str, at_most: int | None, fields: dict[str, str]) -> Reply:
        assert self._streams is not None
        reader, writer = self._streams
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in {**self._fields, **fields}.items()]
        writer.write("\r\n".join([f"{method} {quote(path)} HTTP/1.1", *lines, "", ""]).encode("latin-1"))
        first, *others = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        answered = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in others)}
        if status not in (200, 206, 304, 404):
            raise LoadError(f"{method} {path}: {first}")
        length = 0 if method == "HEAD" or status == 304 else int(answered.get("content-length", "0"))
        left = length if at_most is None else min(length, at_most)
        while left:
            left -= len(block := await reader.read(min(left, 256 * _KIB)))
            if not block:
                raise asyncio.IncompleteReadError(b"", left)
        is_rest_unread = "transfer-encoding" in answered or (at_most is not None and at_most < length)
        if is_rest_unread:
            await self.close()
        return Reply(status, answered)

    async def close(self) -> None:
        """Close the connection, which another request opens again."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass(slots=True)
class Known:
    """What one browser or program has in its cache: the validators by path."""

    tags: dict[str, str] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)

    def note(self, path: str, reply: Reply) -> None:
        """Keep the validators of an answer."""
        if "etag" in reply.fields:
            self.tags[path] = reply.fields["etag"]
        if "last-modified" in reply.fields:
            self.dates[path] = reply.fields["last-modified"]

    def conditions(self, path: str) -> dict[str, str]:
        """Return the conditions of a request for a path."""
        conditions = {}
        if path in self.tags:
            conditions["if-none-match"] = self.tags[path]
        if path in self.dates:
            conditions["if-modified-since"] = self.dates[path]
        return conditions


class Clients:
    """The recorded shapes. Each is one visit of one client, to files below /files/ of a port."""

    def __init__(self, site: Site, port: int, choice: random.Random) -> None:
        self.site = site
        self.port = port
        self.choice = choice
        self.browsers = [Known() for _ in range(200)]
        self.agents = [Known() for _ in range(40)]
        self._weights: dict[int, list[float]] = {}

    def popular(self, names: list[str]) -> str:
        """Return one of the names, by Zipf's law."""
        ranks = range(1, len(names) + 1)
        if len(names) not in self._weights:
            self._weights[len(names)] = [*itertools.accumulate(1 / rank**_SKEW for rank in ranks)]
        return self.choice.choices(names, cum_weights=self._weights[len(names)])[0]

    async def think(self, least: float, most: float) -> None:
        """Wait for some seconds, as a person does."""
        await asyncio.sleep(self.choice.uniform(least, most))

    @contextlib.asynccontextmanager
    async def connections(self, count: int, **fields: str) -> AsyncIterator[list[Connection]]:
        """Have so many connections, which are closed at the end."""
        opened = [Connection(self.port, **fields) for _ in range(count)]
        try:
            yield opened
        finally:
            for connection in opened:
                await connection.close()

    async def browser(self) -> None:
        """Read some pages, as a person does: a known page is revalidated, and some of its known assets are."""
        known = self.choice.choice([Known(), self.choice.choice(self.browsers)])
        accepted = {"accept_encoding": "gzip, deflate, br, zstd", "accept": "*/*", "user_agent": "Mozilla/5.0"}
        async with self.connections(6, **accepted) as connections:
            for _ in range(self.choice.randint(1, 6)):
                page = self.popular(self.site.pages)
                await self.revalidate(connections[0], known, page)
                assets = random.Random(page)  # a page has the same assets every time
                names = assets.sample(self.site.styles, 5) + assets.sample(self.site.images, assets.randint(1, 12))
                due = [name for name in names if f"/files/{name}" not in known.tags or self.choice.random() < 0.25]
                if self.choice.random() < 0.1:
                    due.append("favicon.ico")

                async def load(connection: Connection, names: list[str]) -> None:
                    for name in names:
                        await self.revalidate(connection, known, name)

                await asyncio.gather(*(load(each, due[number::6]) for number, each in enumerate(connections)))
                await self.think(1, 6)

    async def revalidate(self, connection: Connection, known: Known, name: str) -> None:
        """Request a file with the conditions of a cache."""
        path = f"/files/{name}"
        known.note(path, await connection.get(path, known.conditions(path)))

    async def player(self) -> None:
        """Watch a video: its beginning, its index near the end, then the parts to which the person seeks."""
        name = self.popular(self.site.videos)
        path, size = f"/files/{name}", self.site.sizes[name]
        async with self.connections(1, accept_encoding="identity", user_agent="Mozilla/5.0") as (connection,):
            reply = await connection.get(path, {"range": "bytes=0-"}, at_most=self.choice.randrange(64, 512) * _KIB)
            if_range = {"if-range": reply.fields["etag"]} if "etag" in reply.fields else {}
            await connection.get(path, {"range": f"bytes={size - size // 50}-"}, if_range)
            for _ in range(self.choice.randint(1, 8)):
                start = self.choice.randrange(size)
                read = self.choice.randrange(256, 4096) * _KIB
                await connection.get(path, {"range": f"bytes={start}-"}, if_range, at_most=read)
                await self.think(0.5, 4)

    async def reader(self) -> None:
        """Read a document in a viewer that loads parts of 64 KiB, or download all of it."""
        name = self.popular(self.site.documents)
        path, size = f"/files/{name}", self.site.sizes[name]
        async with self.connections(2, accept_encoding="identity", user_agent="Mozilla/5.0") as connections:
            await connections[0].get(path, at_most=self.choice.choice([64 * _KIB, size]))
            for _ in range(self.choice.randint(0, 10)):
                start = self.choice.randrange(size) // (64 * _KIB) * 64 * _KIB
                span = f"bytes={start}-{min(start + 64 * _KIB, size) - 1}"
                await self.choice.choice(connections).get(path, {"range": span})
                await self.think(0.1, 2)

    async def package_manager(self) -> None:
        """Revalidate indexes, which are mostly known, then download packages, each of them once."""
        known = self.choice.choice(self.agents)
        taken = self.choice.randint(0, 30)
        async with self.connections(2, accept_encoding="identity", user_agent="pip/25.3") as connections:
            for number in range(self.choice.randint(3, 12)):
                await self.revalidate(connections[number % 2], known, self.popular(self.site.indexes))
            for number in range(taken):
                is_popular = self.choice.random() < 0.5
                name = self.popular(self.site.packages) if is_popular else self.choice.choice(self.site.packages)
                await connections[number % 2].get(f"/files/{name}")

    async def download_manager(self) -> None:
        """Look at an archive, then download several parts of it at once, from where the last try ended."""
        name = self.popular(self.site.archives)
        path, size = f"/files/{name}", self.site.sizes[name]
        start = self.choice.choice([0, self.choice.randrange(size)])
        count = self.choice.choice([4, 8, 8, 16])
        async with self.connections(count, user_agent="aria2/1.37.0") as connections:
            reply = await connections[0].get(path, method="HEAD")
            if_range = {"if-range": reply.fields["etag"]} if "etag" in reply.fields else {}
            bounds = [start + (size - start) * number // count for number in range(count + 1)]
            await asyncio.gather(
                *(
                    connection.get(path, {"range": f"bytes={first}-{last - 1}"}, if_range)
                    for connection, first, last in zip(connections, bounds, bounds[1:], strict=False)
                    if first < last
                )
            )

    async def crawler(self) -> None:
        """Request files that few people request, and some that are gone, as a search engine does."""
        async with self.connections(1, user_agent="Googlebot/2.1", accept_encoding="gzip") as (connection,):
            await connection.get("/files/robots.txt")
            for _ in range(self.choice.randint(5, 25)):
                names = self.choice.choice([self.site.pages, self.site.images, self.site.documents])
                path = f"/files/{self.choice.choice(names)}"
                if self.choice.random() < 0.1:
                    path = f"/files/old/{self.choice.randrange(10**6)}.html"
                await connection.get(path, method=self.choice.choice(["HEAD", "GET", "GET"]))
                await self.think(0.1, 1)

    async def feed_reader(self) -> None:
        """Poll a feed."""
        known = self.choice.choice(self.agents)
        async with self.connections(1, user_agent="feed reader") as (connection,):
            await self.revalidate(connection, known, self.popular(self.site.feeds))


_VISITS: dict[Callable[[Clients], Coroutine[None, None, None]], float] = {
    Clients.browser: 50,
    Clients.player: 10,
    Clients.reader: 10,
    Clients.package_manager: 10,
    Clients.download_manager: 3,
    Clients.crawler: 4,
    Clients.feed_reader: 13,
}
"""How many of a hundred visits have each shape."""


async def replay(
    site: Site, port: int, *, seconds: float, visits_per_second: float, seed: int = 1
) -> tuple[int, set[str]]:
    """Have visitors for some seconds. Return how many there were, and which programs, when the last one has left.

    Raises `LoadError` if one of them got what no client expects.
    """
    choice = random.Random(seed)
    clients = Clients(site, port, choice)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    count = 0
    programs: set[str] = set()

    async def run_programs() -> None:
        while loop.time() < end:
            with tempfile.TemporaryDirectory() as scratch:
                for commands in real_clients(site, f"http://{HOST}:{port}/files", choice, Path(scratch)):
                    if shutil.which(commands[0][0]) is not None:
                        programs.add("pip" if "pip" in commands[0] else commands[0][0])
                        directory = tempfile.mkdtemp(dir=scratch)
                        for command in commands:
                            await _run_program(command, directory)

    try:
        async with asyncio.TaskGroup() as visits:
            visits.create_task(run_programs())
            while loop.time() < end:
                (shape,) = choice.choices([*_VISITS], [*_VISITS.values()])
                visits.create_task(shape(clients))
                count += 1
                await asyncio.sleep(choice.expovariate(visits_per_second))
    except* LoadError as failed:
        raise LoadError("; ".join(str(exc) for exc in failed.exceptions)) from failed
    return count, programs


def make_repositories(files: Path) -> None:
    """Make what the programs need: a video, a wheel and a page that links to it, repositories of git and apt."""
    if shutil.which("ffmpeg") is not None:
        picture = ["-f", "lavfi", "-i", "testsrc2=size=320x240:rate=25:duration=20"]
        _run(["ffmpeg", "-v", "error", *picture, "-c:v", "mpeg4", "-q:v", "1", "-g", "25", "real.mp4"], files)
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "init.defaultBranch=main"]
    with tempfile.TemporaryDirectory() as work:
        Path(work, "data").write_bytes(os.urandom(256 * _KIB))
        for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
            _run([*git, *arguments], Path(work))
        _run([*git, "clone", "-q", "--bare", work, "real.git"], files)
        _run([*git, "update-server-info"], files / "real.git")
    wheel = files / "real-1.0-py3-none-any.whl"
    information = {"METADATA": "Metadata-Version: 2.1\nName: real\nVersion: 1.0\n", "RECORD": ""}
    information["WHEEL"] = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in information.items():
            archive.writestr(f"real-1.0.dist-info/{name}", text)
        archive.writestr("real/data", os.urandom(256 * _KIB))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (files / "links.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    fields = {"Package": "real", "Version": "1.0", "Architecture": "all", "Maintainer": "x <x@example.org>"}
    fields |= {"Description": "x", "Filename": "./real.deb", "Size": "1", "SHA256": digest}
    (files / "real.apt").mkdir()
    (files / "real.apt" / "Packages").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    for path in files.rglob("*"):
        if path.is_file() and path.stat().st_mtime > time.time() - 60:  # such a file has no Last-Modified for a second
            os.utime(path, (1_700_000_000,) * 2)


def _run(command: Sequence[str], directory: Path) -> None:
    subprocess.run(command, cwd=directory, check=True, stdin=subprocess.DEVNULL)


def real_clients(site: Site, url: str, choice: random.Random, root: Path) -> Iterator[list[list[str]]]:
    """Yield what each program is called with, one command after the other. root: the directory in which they run."""
    page, image = f"{url}/{site.pages[0]}", f"{url}/{quote(choice.choice(site.images))}"
    archive, document = f"{url}/{site.archives[0]}", f"{url}/{quote(choice.choice(site.documents))}"
    video, second = f"{url}/real.mp4", f"{choice.uniform(1, 18):.2f}"
    curl = ["curl", "-sSf", "-o", "file"]
    etag = ["--etag-save", "etag", "--etag-compare", "etag"]
    yield [[*curl, *etag, page]] * 2
    yield [[*curl, "-R", image], [*curl, "-R", "-z", "file", image]]
    yield [[*curl, "-r", f"0-{choice.randrange(10**5)}", document], [*curl, "-C", "-", document]]
    yield [["wget", "-nv", "-N", page]] * 2
    yield [["wget2", "-nv", "--no-hsts", "--no-ocsp", "--chunk-size=1M", "--max-threads=4", archive]]
    yield [["aria2c", "-q", "-x8", "-s8", "-k1M", "-o", "file", archive]]
    yield [["axel", "-q", "-n", "4", "-o", "file", document]]
    yield [["ffprobe", "-v", "error", video]]
    yield [["ffmpeg", "-v", "error", "-ss", second, "-i", video, "-frames:v", "1", "frame.png"]]
    yield [
        ["mpv", "--no-config", "--no-audio", "--really-quiet", "--vo=null", f"--start={second}", "--frames=9", video]
    ]
    yield [["git", "clone", "-q", f"{url}/real.git", "clone"]]
    pip = ["--isolated", "--no-cache-dir", "--no-deps", "--disable-pip-version-check", "--no-index"]
    yield [[sys.executable, "-m", "pip", "download", "-q", *pip, "-f", f"{url}/links.html", "real"]]
    for name in ("lists/partial", "cache/archives/partial", "sources", "apt.conf.d", "preferences.d", "trusted.gpg.d"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    (root / "sources.list").write_text(f"deb [trusted=yes] {url}/real.apt ./\n")
    options = ["Acquire::Languages=none", "APT::Architecture=amd64", "APT::Sandbox::User=root", "Debug::NoLocking=1"]
    options += [f"Dir::Cache={root}/cache", f"Dir::Etc={root}", "Dir::Etc::sourceparts=sources"]
    options += [f"Dir::State={root}", f"Dir::State::lists={root}/lists", f"Dir::State::status={root}/status"]
    yield [["apt-get", "-q", *(word for option in options for word in ("-o", option)), "update"]] * 2


async def _run_program(command: Sequence[str], directory: str) -> None:
    """Run a program in a directory, and kill one that does not end. Raises `LoadError` if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": directory, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_PATIENCE):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        print(f"ended after {_PATIENCE:.0f} s: {command}", file=sys.stderr, flush=True)
        return
    if process.returncode:
        raise LoadError(f"{command} ended with {process.returncode}: {output.decode(errors='replace')[-500:]}")
