"""`CompletionStore` and `Completions`: sessions and totals in a database that processes share, and lose little of."""

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.accounts import completion_store
from downloadview_async.accounts.completion import delivered
from downloadview_async.accounts.completion_store import Batch, Place, day_of
from downloadview_async.accounts.proxy_log import LogLine
from downloadview_async.testing import call
from tests.accounts.test_completion import outcome
from tests.proxies.servers import readable_directory
from tests.servers import PROJECT, free_port

PIECES = 16
CHUNK = 100
SIZE = PIECES * CHUNK
_PATIENCE = 30.0


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the URL of a PostgreSQL server."""
    pytest.importorskip("asyncpg", reason="PostgreSQL: asyncpg is not installed")
    programs = [*map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), *filter(None, [shutil.which("initdb")])]
    if not programs:
        pytest.skip("PostgreSQL: it is not installed; apt-get install postgresql")
    program, port = Path(programs[0]), free_port()
    options: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    with readable_directory() as directory:
        data = directory / "data"
        data.mkdir(mode=0o700)
        if options:
            shutil.chown(data, "nobody")
        command = [str(program), "-D", str(data), "-A", "trust", "-U", "tests", "-E", "UTF8", "--locale=C"]
        subprocess.run(command, check=True, capture_output=True, cwd=directory, **options)
        command = [str(program.with_name("postgres")), "-D", str(data), "-p", str(port), "-k", str(data)]
        is_ready = [str(program.with_name("pg_isready")), "-h", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL, **options) as server:
            try:
                deadline = time.monotonic() + _PATIENCE
                while subprocess.run(is_ready, capture_output=True).returncode:
                    assert time.monotonic() < deadline, "PostgreSQL does not listen"
                    time.sleep(0.05)
                yield f"postgresql+asyncpg://tests@127.0.0.1:{port}/postgres"
            finally:
                server.send_signal(signal.SIGINT)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'accounts.db'}"
    server: str = request.getfixturevalue("postgres")
    name = f"test_{random.getrandbits(64):x}"

    async def create() -> None:
        import asyncpg  # type: ignore[import-untyped]

        connection = await asyncpg.connect(server.replace("+asyncpg", ""))
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return f"{server.removesuffix('/postgres')}/{name}"


def now_and(**changes: Any) -> dv.Outcome:
    return outcome(**{"time": time.time(), **changes})


def piece(number: int, **changes: Any) -> dv.Outcome:
    span = dv.ByteRange(number * CHUNK, (number + 1) * CHUNK)
    return now_and(size=SIZE, spans=(span,), sent=CHUNK, status=206, **changes)


def report(url: str, by: Any = "file", **options: Any) -> list[dict[str, Any]]:
    async def rows() -> list[dict[str, Any]]:
        store = dv.CompletionStore(url)
        try:
            return await store.report(by, **options)
        finally:
            await store.aclose()

    return asyncio.run(rows())


def counted(url: str, by: Any = "file", **options: Any) -> dict[str, tuple[int, int, int]]:
    return {row[by]: (row["downloads"], row["answers"], row["bytes"]) for row in report(url, by, **options)}


def test_what_is_counted_and_by_what(url: str) -> None:
    completions = dv.Completions(url)
    told = [("ada", "a.bin", "/x"), ("ada", "b.bin", "/x"), ("bob", "a.bin", "/y"), (None, "a.bin", "/x")]
    for user, name, route in told:
        completions(now_and(user=user, name=name, route=route, link_id="L" if user is None else None))
    completions(now_and(name="a.bin", user="eve", sent=10, result="aborted", reason="client-left", route="/y"))
    completions(now_and(source=None, path="/one/c.bin", client="2001:db8::1", route=None))
    completions.close()
    today = f"{time.strftime('%Y-%m-%d', time.gmtime())}"
    assert counted(url) == {"files/a.bin": (3, 4, 310), "files/b.bin": (1, 1, 100), "/one/c.bin": (1, 1, 100)}
    assert counted(url, "route") == {"/x": (3, 3, 300), "/y": (1, 2, 110), "": (1, 1, 100)}
    assert counted(url, "user") == {"ada": (2, 2, 200), "bob": (1, 1, 100), "eve": (0, 1, 10)}
    assert counted(url, "link") == {"L": (1, 1, 100)}
    assert counted(url, "client") == {"192.0.2.7": (4, 5, 410), "2001:db8::1": (1, 1, 100)}
    assert counted(url, "day", since=timedelta(days=1)) == {today: (5, 6, 510)}
    assert [row["file"] for row in report(url, top=1)] == ["files/a.bin"]
    by_both = [(row["user"], row["file"], row["downloads"]) for row in report(url, ("user", "file"))]
    assert by_both == [
        ("ada", "files/a.bin", 1),
        ("ada", "files/b.bin", 1),
        ("bob", "files/a.bin", 1),
        ("eve", "files/a.bin", 0),
    ]
    assert [list(row)[:2] for row in report(url, ("day", "client"))] == [["day", "client"]] * 2
    with pytest.raises(dv.ConfigurationError, match="clients are counted alone, or by day"):
        report(url, ("client", "file"))


@pytest.mark.asyncio
async def test_all_spellings_of_a_name_are_one_file(tmp_path: Path) -> None:
    """Else a client could make any number of rows for one file, and nobody would see how often it was downloaded."""
    (tmp_path / "files/a").mkdir(parents=True)
    for name in ("files/a/b.txt", "files/a/.b"):
        (tmp_path / name).write_bytes(b"0123456789")
    store = dv.CompletionStore(f"sqlite+aiosqlite:///{tmp_path / 'accounts.db'}")
    completions = dv.Completions(store)
    download = dv.Download(dv.PathSource(tmp_path / "files"), source_name="files", listing=True)
    app = dv.Accounts(Starlette(routes=[Route("/{path:path}", download)]), observers=[completions])
    async with completions:
        spellings = {"a/b.txt": "0-2", "./a//b.txt": "3-4", "/a/./b.txt": "5-8", "./././a/b.txt": "9-"}
        for spelling, part in spellings.items():
            assert (await call(app, f"/{spelling}", headers={"Range": f"bytes={part}"})).status == 206, spelling
        assert (await call(app, "//a/.b")).status == 200
    rows = await store.report("file")
    await store.aclose()
    assert [(row["file"], row["downloads"], row["answers"]) for row in rows] == [
        ("files/a/.b", 1, 1),
        ("files/a/b.txt", 1, 4),
    ]


def test_the_downloads_of_files(url: str) -> None:
    async def run() -> None:
        async with dv.Completions(url) as completions:
            for name in ("a", "a", "é\udcff"):
                completions(now_and(name=name))
            completions(now_and(name="a", source="other"))
            completions(piece(0, name="b"))
            await asyncio.to_thread(completions.close)
            names = ["a", "b", "c", "é\udcff", *map(str, range(2000))]
            assert await completions.store.downloads_of("files", names) == {"a": 2, "é\udcff": 1}

    asyncio.run(run())


def test_parts_over_two_days(url: str) -> None:
    completions = dv.Completions(url)
    for number in range(PIECES):
        begun = time.time() - 2 * 86_400 * (1 - number / (PIECES - 1))
        completions(piece(number, time=begun))
        completions.close()
        assert counted(url, "day").popitem()[1][0] == 0 or number == PIECES - 1
    rows = report(url, "day")
    assert [row["downloads"] for row in rows] == [1, *[0] * (len(rows) - 1)]
    assert len(rows) == 3
    assert counted(url)["files/a.bin"] == (1, PIECES, SIZE)


@pytest.mark.parametrize("acknowledged", [40, 0])
def test_a_client_resumes_where_it_is_in_another_process(url: str, acknowledged: int) -> None:
    """An answer of which nothing was acknowledged has no bytes for the report."""
    reset = {"sent": acknowledged, "unacknowledged": 60 - acknowledged, "result": "aborted", "reason": "client-left"}
    for changes in (reset, {"status": 206, "spans": (dv.ByteRange(50, 100),), "sent": 50}):
        completions = dv.Completions(url)
        completions(now_and(**changes))
        completions.close()
    assert counted(url) == {"files/a.bin": (1, 1 + (acknowledged > 0), acknowledged + 50)}


WRITER = """
import random, sys, time
import downloadview_async as dv
from tests.accounts.test_completions import PIECES, piece, now_and
url, worker, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
completions = dv.Completions(url)
print("ready", flush=True)
sys.stdin.readline()
for user in range(20):
    for number in range(PIECES):
        if (number + user) % workers == worker:
            completions(piece(number, user=f"user{user}"))
            completions(piece(number, user=f"lacking{user}")) if number else None
    completions(now_and(name="whole"))
    if user % 5 == 0:
        completions.close()
completions.close()
print("done", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def writers(url: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes that write at the same time, and wait until they are ready."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(number), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_three_processes_count_each_download_once(url: str) -> None:
    with writers(url, 3) as processes:
        for process in processes:
            say(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
    by_user = counted(url, "user")
    assert {user: row[0] for user, row in by_user.items()} == {
        **{f"user{number}": 1 for number in range(20)},
        **{f"lacking{number}": 0 for number in range(20)},
    }
    assert counted(url)["files/whole"][0] == 60


TELLER = """
import itertools, sys, time
import downloadview_async as dv
from tests.accounts.test_completions import now_and
completions = dv.Completions(sys.argv[1])
for number in itertools.count(1):
    completions(now_and(name="whole"))
    print(number, flush=True)
    time.sleep(0.01)
"""


def test_a_process_that_is_killed_loses_at_most_a_second(url: str) -> None:
    report(url)  # creates the tables
    told: list[float] = []
    with subprocess.Popen([sys.executable, "-c", TELLER, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            told.append(time.monotonic())
            if told[-1] - told[0] > 3:
                process.kill()
                break
        killed = time.monotonic()
    counts = counted(url)["files/whole"][0]
    assert sum(at < killed - 1 for at in told) <= counts <= len(told) + 100


def test_it_is_written_while_the_process_runs(url: str) -> None:
    completions = dv.Completions(url)
    report(url)  # creates the tables
    began = time.monotonic()
    completions(now_and())
    while not report(url):
        assert time.monotonic() - began < _PATIENCE
    completions.close()


def test_what_was_not_closed_is_written_at_the_exit(url: str) -> None:
    code = "import sys, downloadview_async as dv\nfrom tests.accounts.test_completions import now_and\n"
    code += "dv.Completions(sys.argv[1])(now_and())"
    subprocess.run([sys.executable, "-c", code, url], check=True, timeout=_PATIENCE)
    assert counted(url) == {"files/a.bin": (1, 1, 100)}


def test_delegated_answers_count_once_when_the_proxy_says_so(url: str) -> None:
    line = LogLine(request_id="1", status=200, sent=100)
    part = LogLine(request_id="2", status=206, sent=50, content_range="bytes 0-49/100")
    place = Place(path="/log", device=2**63 - 1, inode=2**63 - 1, offset=9, head="9 a", time=time.time())

    async def run() -> None:
        async with dv.Completions(url) as completions:
            delegated = {"spans": (), "sent": 0, "result": "delegated", "delegated_to": "x-accel-redirect"}
            for request_id in ("1", "2", "3"):
                completions(now_and(request_id=request_id, **delegated))
            completions(now_and(status=206, spans=(dv.ByteRange(50, 100),), sent=50))
            await asyncio.to_thread(completions.close)
            store = completions.store
            of_another = LogLine(request_id="9", status=200, sent=100)
            assert await store.close_delegated([line, part, of_another], place) == {"1", "2"}
            assert await store.close_delegated([line, part]) == set()
            assert await store.places("/log") == [place]
            await store.close_delegated([], replace(place, offset=10, head="10 b"))
            assert [kept.offset for kept in await store.places("/log")] == [10]

    asyncio.run(run())
    assert counted(url) == {"files/a.bin": (2, 3, 200)}


def test_a_line_that_is_read_before_its_answer_is_written_counts_too(url: str) -> None:
    """The database may fail for a while: then nobody knows whether the process or the reader of the log is first."""
    lines = [
        LogLine(request_id="1", status=200, sent=100),
        LogLine(request_id="2", status=206, sent=300, requested="bytes=0-9,50-99"),
        LogLine(request_id="3", status=200, sent=60, is_cut=True),
        LogLine(request_id="4", status=304, sent=0),
        LogLine(request_id="5", status=200, sent=100),  # of an answer that is not delegated
    ]

    async def run() -> None:
        async with dv.Completions(url) as completions:
            store = completions.store
            for _ in range(2):
                assert await store.close_delegated(lines) == set()
            delegated = {"spans": (), "sent": 0, "result": "delegated", "delegated_to": "x-accel-redirect"}
            for number in (1, 2, 3, 4):
                completions(now_and(request_id=f"{number}", name=f"{number}", **delegated))
            await asyncio.to_thread(completions.close)
            assert await store.close_delegated(lines) == {"4"}
            assert await store.close_delegated(lines) == set()

    asyncio.run(run())
    assert counted(url) == {"files/1": (1, 1, 100), "files/2": (0, 1, 300), "files/3": (0, 1, 60)}


@pytest.mark.parametrize(("age", "kept"), [(60, 1), (7200, 0)])
def test_lines_of_an_old_log_wait_for_no_answer(url: str, tmp_path: Path, age: float, kept: int) -> None:
    """Else counting a month of logs again would fill the database."""
    log = tmp_path / "downloads.log"
    log.write_text('{"request_id":"1","method":"GET","status":200,"bytes":100,"content_range":"","range":""}\n')
    os.utime(log, (time.time() - age,) * 2)

    async def rows() -> int:
        store = dv.CompletionStore(url)
        assert await dv.ProxyLog(log, store).add() == 0
        async with store._reading() as connection:
            found = (await connection.execute(store._tables.lines.select())).all()
        await store.aclose()
        return len(found)

    assert asyncio.run(rows()) == kept


@pytest.mark.parametrize("kind", ["log", "directory"])
def test_the_event_loop_does_not_read_a_log(url: str, tmp_path: Path, kind: str) -> None:
    log = tmp_path / "logs" / "downloads.log"
    log.parent.mkdir()
    log.write_text('{"request_id":"1","method":"GET","status":200,"bytes":100,"content_range":"","range":""}\n')
    calls: dict[str, set[Any]] = {"c_call": {os.pread, os.stat, os.scandir}, "call": {os.walk.__code__}}
    on_loop: list[Any] = []

    def note(frame: Any, event: str, function: Any) -> None:
        called = frame.f_code if event == "call" else function
        if called in calls.get(event, ()):
            on_loop.append(called)

    async def run() -> None:
        async with dv.Completions(url) as completions:
            completions(now_and(request_id="1", spans=(), sent=0, result="delegated", delegated_to="x-accel-redirect"))
            await asyncio.to_thread(completions.close)
            log_of_proxy = dv.ProxyLog(log if kind == "log" else log.parent, completions.store)
            sys.setprofile(note)
            try:
                assert await log_of_proxy.add() == 1
            finally:
                sys.setprofile(None)

    asyncio.run(run())
    assert on_loop == []


def test_rows_are_bounded_by_age_and_number(url: str) -> None:
    async def run() -> None:
        store = dv.CompletionStore(url, keep=timedelta(days=3), max_rows=5)
        for days in (10, 2, 1, 0):
            batch = Batch()
            for number in range(4):
                at = time.time() - days * 86_400
                for one in (
                    now_and(name=f"{number}", time=at, client=f"192.0.2.{number}"),
                    piece(0, user=f"u{days}.{number}", name=f"{number}", time=at),
                    now_and(
                        request_id=f"{days}.{number}", time=at, spans=(), result="delegated", delegated_to="x-sendfile"
                    ),
                ):
                    part = delivered(one)
                    assert part is not None
                    batch.add(part)
            await store.write(batch)
            lines = [LogLine(request_id=f"{days}:{number}", status=200, sent=1) for number in range(4)]
            await store.close_delegated(lines)
        await store.trim()
        tables = store._tables
        async with store._reading() as connection:
            for table in (tables.sessions, tables.delegated, tables.lines, tables.totals, tables.clients):
                assert len((await connection.execute(table.select())).all()) == 5, table.name
        assert max(row["day"] for row in await store.report("day")) == day_of(time.time())
        await store.aclose()

    asyncio.run(run())


def test_while_the_database_fails_answers_wait_and_then_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, file = f"sqlite+aiosqlite:///{tmp_path / 'accounts.db'}", tmp_path / "accounts.db"
    report(url)
    monkeypatch.setattr(completion_store, "_BUSY_SECONDS", 0.01)
    completions = dv.Completions(dv.CompletionStore(url), max_waiting=2)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        completions(now_and())
        deadline = time.monotonic() + _PATIENCE
        while "cannot be counted now" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for name in ("a.bin", "0", "1", "2", "a.bin"):
            completions(now_and(name=name))
        other.execute("ROLLBACK")
    monkeypatch.undo()
    while not counted(url):
        assert time.monotonic() < deadline
    completions.close()
    assert counted(url) == {"files/a.bin": (3, 3, 300), "files/0": (1, 1, 100)}
    assert "2 answers were not counted" in caplog.text


@pytest.mark.slow
def test_a_connection_that_ends_within_a_commit_counts_once(postgres: str, caplog: pytest.LogCaptureFixture) -> None:
    """The transaction is committed then, but nobody says so."""
    port = re.search(r":(\d+)/", postgres)
    assert port is not None
    held: list[bytes] = []
    is_cutting = False

    async def copy(reader: asyncio.StreamReader, to: asyncio.StreamWriter, is_asking: bool) -> None:
        with contextlib.closing(to), contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if is_asking and is_cutting and not held and b"COMMIT" in data:
                    held.append(b"")
                elif not is_asking and held == [b""]:
                    held.append(data)
                    break
                to.write(data)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, upstream = await asyncio.open_connection("127.0.0.1", int(port[1]))
        await asyncio.gather(copy(reader, upstream, True), copy(answers, writer, False))

    async def run() -> None:
        nonlocal is_cutting
        async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as server:
            relay = server.sockets[0].getsockname()[1]
            store = dv.CompletionStore(postgres.replace(port[0], f":{relay}/"))
            async with dv.Completions(store) as completions:
                is_cutting = True
                completions(now_and(name="once.bin"))
                completions(piece(0, name="once.bin"))
                async with asyncio.timeout(_PATIENCE):
                    while "cannot be counted now" not in caplog.text:
                        await asyncio.sleep(0.02)
                completions(now_and(name="once.bin"))

    asyncio.run(run())
    assert b"COMMIT" in held[1], "no answer to a commit was held back"
    assert counted(postgres)["files/once.bin"] == (2, 3, 300)


def test_downloads_count_although_there_were_no_descriptors_for_the_first(tmp_path: Path) -> None:
    """The thread needs some for its event loop."""
    code = f"""
import logging, os, resource, time
import downloadview_async as dv
from tests.accounts.test_completion import outcome
logging.basicConfig(format="%(message)s")
completions = dv.Completions("sqlite+aiosqlite:///{tmp_path}/a.db")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
logged = []
logging.getLogger("downloadview_async").addFilter(lambda record: logged.append(record) or True)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
completions(outcome(time=time.time()))
deadline = time.monotonic() + 60
while not logged and time.monotonic() < deadline:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
completions(outcome(time=time.time(), name="other"))
completions.close()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "Downloads cannot be counted now: [Errno 24] Too many open files\n"
    rows = report(f"sqlite+aiosqlite:///{tmp_path}/a.db", "file")
    assert sorted(row["downloads"] for row in rows) == [1, 1]


def test_an_outcome_costs_no_thread_and_no_wait(url: str) -> None:
    """Only the first one of half a second wakes the thread that writes."""
    completions = dv.Completions(url)
    before = threading.active_count()
    for _ in range(1000):
        completions(now_and(name="HEAD", method="HEAD"))
    assert threading.active_count() == before
    completions.close()
    assert report(url) == []


WRONG = {
    "mysql+aiomysql://h/n": "SQLite or PostgreSQL|needs aiomysql",
    "sqlite:///a.db": "asynchronous driver",
    "sqlite+aiosqlite://": "has to be a file",
    "sqlite+aiosqlite:///:memory:": "has to be a file",
    "nonsense": "cannot be used",
    "postgresql+nothing://h/n": "cannot be used|needs",
}


def test_it_ends_when_it_is_closed_while_its_thread_is_about_to_wait(tmp_path: Path) -> None:
    completions = dv.Completions(dv.CompletionStore(f"sqlite+aiosqlite:///{tmp_path}/accounts.db"))

    class ClosedMeanwhile(threading.Event):
        def clear(self) -> None:
            if not closing.is_alive():
                closing.start()
                assert completions._is_closing.wait(10)
                assert self.wait(10)  # `close` has set both
            super().clear()

    closing = threading.Thread(target=completions.close)
    completions._has_some = ClosedMeanwhile()
    completions(outcome())
    thread = completions._thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
    closing.join()


@pytest.mark.parametrize("url", WRONG)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=WRONG[url]):
        dv.CompletionStore(url)


@pytest.mark.slow
def test_which_errors_of_a_database_server_may_go_away(postgres: str) -> None:
    port = re.search(r":(\d+)/", postgres)
    assert port is not None
    for url, may_recover in (
        (postgres.replace("/postgres", "/none"), False),
        (postgres.replace("tests@", "nobody@"), False),
        (postgres.replace(port[0], f":{free_port()}/"), True),
    ):
        store = dv.CompletionStore(url)
        with pytest.raises(dv.ConfigurationError) as refused:
            asyncio.run(store.check())
        assert store.may_recover(refused.value) is may_recover


@pytest.mark.parametrize(
    "options", [{"min_share": 0}, {"min_share": 1.1}, {"keep": timedelta()}, {"max_rows": 0}], ids=str
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(dv.ConfigurationError):
        dv.CompletionStore("sqlite+aiosqlite:///a.db", **options)


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    store = dv.CompletionStore("sqlite+aiosqlite:///none/accounts.db", directory=tmp_path)
    with pytest.raises(dv.ConfigurationError, match="unable to open"):
        asyncio.run(store.check())
