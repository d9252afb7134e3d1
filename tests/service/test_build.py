import asyncio
import datetime
import decimal
import gc
import logging
import os
import sqlite3
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from starlette.testclient import TestClient
from starlette.types import Message

from downloadview_async import ConfigurationError, TransferAborted
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.database import key_as
from downloadview_async.service.logs import log_aborts_in_one_line
from downloadview_async.service.shutdown import EndsInTime
from tests.service.loading import FILES

TEXT = FILES
DOCUMENTS = """
[sources.documents]
type = "object"
database = "sqlite+aiosqlite:///my demo.db"
table = "documents"
key = "key"
file = "path"
filename = "title"
content_type = "content_type"
source = "files"
[[routes]]
path = "/documents/{key}"
source = "documents"
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return filled(tmp_path)


def filled(directory: Path) -> Path:
    (directory / "files").mkdir()
    (directory / "files" / "a.txt").write_bytes(b"0123456789")
    return directory


def make_database(directory: Path, key_type: str = "TEXT") -> Path:
    path = directory / "my demo.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE documents (key {key_type}, path TEXT, title TEXT, content_type TEXT)")
        connection.executemany(
            "INSERT INTO documents VALUES (?, ?, ?, ?)",
            [
                ("1", "a.txt", "Überblick.txt", "text/x-log"),
                ("2", "", "Empty.txt", None),
                ("3", None, "Null.txt", None),
                ("4", "a.txt", None, None),
                ("5", "gone.txt", "Gone.txt", None),
            ],
        )
        connection.commit()
    return path


@contextmanager
def client_of(directory: Path, text: str, environ: Mapping[str, str] | None = None) -> Iterator[TestClient]:
    file = directory / "downloadview.toml"
    file.write_text(text)
    with TestClient(build(load_settings(file, environ=environ or {}))) as client:
        yield client


def test_a_route_answers_with_its_disposition_and_cache_control(directory: Path) -> None:
    text = f'{TEXT}cache_control = "private, max-age=5"\ndisposition = "inline"'
    with client_of(directory, text) as client:
        answer = client.get("/files/a.txt")
    assert answer.content == b"0123456789"
    assert answer.headers["cache-control"] == "private, max-age=5"
    assert answer.headers["content-disposition"] == 'inline; filename="a.txt"'


@pytest.mark.parametrize(
    "path",
    ["/nope", "/files", "/files/", "/files/gone", "/files/%2e%2e/downloadview.toml", "/-/", "/-/x", "/documents"],
)
def test_every_404_is_the_same(directory: Path, path: str) -> None:
    with client_of(directory, TEXT) as client:
        missing = client.get("/files/missing.txt")
        answer = client.get(path, follow_redirects=False)
    assert (answer.status_code, answer.content, answer.headers) == (404, missing.content, missing.headers)
    assert missing.headers["x-content-type-options"] == "nosniff"


def test_an_unknown_method_is_405_with_allow(directory: Path) -> None:
    with client_of(directory, TEXT) as client:
        for path, allowed in [("/", {"GET", "HEAD"}), ("/files/a.txt", {"GET", "HEAD", "OPTIONS"})]:
            answer = client.post(path)
            assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, allowed)


def test_rows_of_a_database(directory: Path) -> None:
    make_database(directory)
    with client_of(directory, TEXT + DOCUMENTS) as client:
        answer = client.get("/documents/1", headers={"Range": "bytes=2-3"})
        assert (answer.status_code, answer.content) == (206, b"23")
        assert answer.headers["content-type"] == "text/x-log; charset=utf-8"
        assert "filename*=UTF-8''%C3%9Cberblick.txt" in answer.headers["content-disposition"]
        unnamed = client.get("/documents/4")
        assert unnamed.headers["content-disposition"] == 'attachment; filename="a.txt"'
        assert unnamed.headers["content-type"] == "text/plain; charset=utf-8"
        for key in ["2", "3", "5", "6", "", "%00", "1'--", "%ED%A0%80"]:
            assert client.get(f"/documents/{key}").status_code == 404, key


def test_a_key_is_looked_up_as_its_columns_type(directory: Path) -> None:
    make_database(directory, "INTEGER")
    with client_of(directory, TEXT + DOCUMENTS) as client:
        assert client.get("/documents/1").status_code == 200
        for key in ["01x", "+1", "1_0", "1.0", "%D9%A3", "9" * 40]:
            assert client.get(f"/documents/{key}").status_code == 404, key


@pytest.mark.parametrize(
    "key_type, stored, key, others",
    [
        ("DATE", "2026-02-28", "2026-02-28", ["2026-02-29", "x", "1"]),
        ("DATETIME", "2026-02-28 10:30:00.000000", "2026-02-28T10:30:00", ["2026-02-28T10:30:01", "x", "1"]),
        ("NUMERIC(8, 2)", "1.5", "1.50", ["1.51", "x", "NaN", "9" * 400]),
        ("FLOAT", "1.5", "1.5", ["2", "x", "inf", "9" * 400]),
        ("BOOLEAN", "1", "true", ["false", "x", "1"]),
        ("INTEGER", "1", "1", ["9" * 18, "9" * 19, "x"]),
        ("BLOB", "x", None, ["x"]),
    ],
)
def test_a_key_that_the_column_cannot_have_is_missing(
    directory: Path, key_type: str, stored: str, key: str | None, others: list[str]
) -> None:
    with closing(sqlite3.connect(make_database(directory, key_type))) as connection:
        connection.execute("UPDATE documents SET key = ? WHERE title = 'Überblick.txt'", (stored,))
        connection.execute("DELETE FROM documents WHERE title != 'Überblick.txt' OR title IS NULL")
        connection.commit()
    with client_of(directory, TEXT + DOCUMENTS) as client:
        if key is not None:
            assert client.get(f"/documents/{key}").status_code == 200
        for other in others:
            assert client.get(f"/documents/{other}").status_code == 404, other


def test_a_column_without_a_type_is_looked_up_as_text(directory: Path) -> None:
    make_database(directory, "")
    with client_of(directory, TEXT + DOCUMENTS) as client:
        assert client.get("/documents/1").status_code == 200
        assert client.get("/documents/01").status_code == 404


UUID = "0123abcd-4567-89ab-cdef-0123456789ab"


@pytest.mark.parametrize(
    "kind, key, expected",
    [
        (sqlalchemy.Uuid(), UUID, uuid.UUID(UUID)),
        (sqlalchemy.Uuid(), UUID.upper(), uuid.UUID(UUID)),
        (sqlalchemy.Uuid(), UUID.replace("-", ""), None),
        (sqlalchemy.Uuid(), f"{{{UUID}}}", None),
        (sqlalchemy.BigInteger(), "-7", -7),
        (sqlalchemy.BigInteger(), "٣", None),
        (sqlalchemy.BigInteger(), "1" * 19, None),
        (sqlalchemy.String(), "٣", "٣"),
        (sqlalchemy.String(), "a\0b", None),
        (sqlalchemy.types.NullType(), "a", "a"),
        (sqlalchemy.types.NullType(), "a\0b", None),
        (sqlalchemy.String(), "\ud800", None),
        (sqlalchemy.Date(), "2026-02-28", datetime.date(2026, 2, 28)),
        (sqlalchemy.Date(), "2026-02-29", None),
        (sqlalchemy.Date(), "20260228", None),
        (sqlalchemy.Date(), "x", None),
        (sqlalchemy.DateTime(), "2026-02-28T10:30:00", datetime.datetime(2026, 2, 28, 10, 30)),
        (sqlalchemy.DateTime(), "2026-02-28T10:30:00Z", None),
        (sqlalchemy.DateTime(), "2026-02-28", None),
        (sqlalchemy.DateTime(timezone=True), "2026-02-28T10:30:00", None),
        (
            sqlalchemy.DateTime(timezone=True),
            "2026-02-28T10:30:00+00:00",
            datetime.datetime(2026, 2, 28, 10, 30, tzinfo=datetime.UTC),
        ),
        (sqlalchemy.Time(), "10:30:00", datetime.time(10, 30)),
        (sqlalchemy.Time(), "25:00:00", None),
        (sqlalchemy.Numeric(), "-1.50", decimal.Decimal("-1.50")),
        (sqlalchemy.Numeric(), "NaN", None),
        (sqlalchemy.Numeric(), "1e9", None),
        (sqlalchemy.Float(), "1.5", 1.5),
        (sqlalchemy.Float(), "inf", None),
        (sqlalchemy.Float(), "1_0", None),
        (sqlalchemy.Boolean(), "true", True),
        (sqlalchemy.Boolean(), "1", None),
        (sqlalchemy.Enum("new", "old"), "old", "old"),
        (sqlalchemy.Enum("new", "old"), "other", None),
        (sqlalchemy.LargeBinary(), "x", None),
        (sqlalchemy.Interval(), "1", None),
        (sqlalchemy.ARRAY(sqlalchemy.Integer()), "1", None),
    ],
)
def test_keys_are_read_strictly(kind: Any, key: str, expected: Any) -> None:
    assert key_as(kind, key) == expected


def test_the_connection_is_free_while_the_file_is_sent(directory: Path) -> None:
    make_database(directory)
    with client_of(directory, TEXT + DOCUMENTS) as client:
        # more than a pool has, and each of these would keep its own if the session lived as long as the answer
        for _ in range(30):
            with client.stream("GET", "/documents/1") as answer:
                assert answer.status_code == 200
        assert client.get("/-/readyz").status_code == 200


@pytest.mark.parametrize(
    "change, message",
    [
        (('table = "documents"', 'table = "dokuments"'), "has no table 'dokuments': create it, or correct `table`"),
        (('key = "key"', 'key = "kee"'), "no column 'kee': correct `key`, one of key, path, title, content_type"),
        (('file = "path"', 'file = "file"'), "no column 'file': correct `file`"),
        (('filename = "title"', 'filename = "x"'), "no column 'x': correct `filename`"),
        (('content_type = "content_type"', 'content_type = "x"'), "no column 'x': correct `content_type`"),
        (("my demo.db", "gone.db"), "cannot be read (No such file or directory): create it"),
    ],
)
def test_a_table_that_is_not_as_the_settings_say_stops_the_start(
    directory: Path, change: tuple[str, str], message: str
) -> None:
    make_database(directory)
    with pytest.raises(ConfigurationError) as refused, client_of(directory, TEXT + DOCUMENTS.replace(*change)):
        pass
    assert str(refused.value).startswith(f"{directory / 'downloadview.toml'}: sources.documents: ")
    assert message in str(refused.value)
    assert not (directory / "gone.db").exists()


def test_a_file_that_is_no_database_stops_the_start(directory: Path) -> None:
    (directory / "my demo.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(ConfigurationError, match="the database cannot be read"), client_of(directory, TEXT + DOCUMENTS):
        pass


def test_an_object_source_without_sqlalchemy_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "downloadview_async.service.database")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    refused = pytest.raises(ConfigurationError, match=r"sources\.documents\.type: .* install .*sqlalchemy")
    with refused, client_of(directory, TEXT + DOCUMENTS):
        pass


def test_a_failed_start_reports_one_line(directory: Path) -> None:
    make_database(directory)

    async def startup() -> list[Any]:
        file = directory / "downloadview.toml"
        file.write_text(TEXT + DOCUMENTS.replace('table = "documents"', 'table = "gone"'))
        sent: list[Any] = []

        async def receive() -> dict[str, str]:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            sent.append(message)

        app = build(load_settings(file, environ={}))
        with pytest.raises(ConfigurationError):
            await app({"type": "lifespan", "asgi": {}, "state": {}}, receive, send)
        return sent

    (message,) = asyncio.run(startup())
    assert message["type"] == "lifespan.startup.failed"
    assert message["message"].startswith(f"{directory}/downloadview.toml: sources.documents: the database has no table")
    assert "Traceback" not in message["message"]


def test_readyz_names_the_sources_that_fail_and_says_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downloadview_async.service.health._KEPT", 0.0)
    database = make_database(directory)
    text = f'{TEXT}{DOCUMENTS}[sources.media]\ntype = "storage"\nurl = "file:media"\n'
    (directory / "media").mkdir()
    with client_of(directory, text) as client:
        answer = client.get("/-/readyz")
        assert (answer.status_code, answer.text) == (200, "ready\n")
        (directory / "media").rmdir()
        answer = client.get("/-/readyz")
        assert (answer.status_code, answer.text) == (503, "media\n")
        assert client.get("/-/livez").status_code == 200
        database.write_bytes(b"this is no database any more" * 1000)
        answer = client.get("/-/readyz")
        assert (answer.status_code, answer.text) == (503, "documents\nmedia\n")
        assert client.get("/documents/1").status_code == 503
        (directory / "media").mkdir()


def test_readyz_gives_up_on_a_disk_that_hangs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a FIFO stands for the disk: opening it blocks for as long as nobody writes
    fifo = directory / "hung"
    os.mkfifo(fifo)
    monkeypatch.setattr("downloadview_async.service.health._PATIENCE", 0.2)
    monkeypatch.setattr("downloadview_async.service.health._KEPT", 0.0)
    monkeypatch.setattr(os, "scandir", lambda path: fifo.open("rb"))
    with client_of(directory, TEXT) as client:
        try:
            for _ in range(3):
                assert client.get("/-/readyz").status_code == 503
            assert client.get("/files/a.txt").content == b"0123456789"
        finally:
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


RULE = '[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'


@pytest.mark.parametrize(
    "environ, headers",
    [
        ({}, {}),
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"}, {"x-accel-redirect": "/_files/a%20b.txt"}),
        (
            {"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx", "DOWNLOADVIEW_OFFLOAD__LIMIT_RATE": "9"},
            {"x-accel-redirect": "/_files/a%20b.txt", "x-accel-limit-rate": "9"},
        ),
        (
            {"DOWNLOADVIEW_OFFLOAD": '{"backend":"apache","rules":[{"source":"files"}]}'},
            {"x-sendfile": "{directory}/files/a b.txt"},
        ),
        (
            {"DOWNLOADVIEW_OFFLOAD": '{"backend":"apache","encoding":"percent","rules":[{"source":"files"}]}'},
            {"x-sendfile": "{directory}/files/a%20b.txt"},
        ),
        (
            {"DOWNLOADVIEW_OFFLOAD": '{"backend":"lighttpd","rules":[{"source":"files","target":"/mnt/x"}]}'},
            {"x-sendfile": "/mnt/x/a%20b.txt"},
        ),
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": "caddy"}, {"x-accel-redirect": "/_files/a%20b.txt"}),
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": "h2o"}, {"x-reproxy-url": "/_files/a%20b.txt"}),
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": "litespeed"}, {}),
    ],
)
def test_the_backend_gets_its_own_header(directory: Path, environ: dict[str, str], headers: dict[str, str]) -> None:
    (directory / "files" / "a b.txt").write_bytes(b"ab")
    with client_of(directory, TEXT + RULE, environ) as client:
        answer = client.get("/files/a%20b.txt")
        missing = client.get("/files/missing")
    found = {name: value for name, value in answer.headers.items() if name in OFFLOAD_HEADERS}
    assert found == {name: value.format(directory=directory) for name, value in headers.items()}
    assert answer.content == (b"" if headers else b"ab")
    assert missing.status_code == 404
    assert not OFFLOAD_HEADERS & {*missing.headers}


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of the service with a backend."""
    environ = {"DOWNLOADVIEW_OFFLOAD__BACKEND": request.param}
    with client_of(filled(tmp_path_factory.mktemp("backend")), TEXT + RULE, environ) as client:
        yield client


@pytest.mark.parametrize("backend", ["nginx", "apache", "lighttpd", "caddy", "h2o", "litespeed"], indirect=True)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Range": "bytes=0-0"},
        {"Range": "bytes=99-"},
        {"If-None-Match": "*"},
        {"If-Match": '"another"'},
        {"If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"},
        {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:10 GMT"},
    ],
)
def test_an_order_is_in_an_answer_200_alone_and_there_whatever_is_asked(
    backend: TestClient, method: str, headers: dict[str, str]
) -> None:
    for path in ("/files/a.txt", "/files/missing", "/-/livez", "/", "/nothing"):
        answer = backend.request(method, path, headers=headers)
        offloaded = path == "/files/a.txt" and method in ("GET", "HEAD")
        assert bool(OFFLOAD_HEADERS & {*answer.headers}) is offloaded
        if offloaded:
            assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


def test_litespeed_gets_plain_names(directory: Path) -> None:
    with client_of(directory, TEXT + RULE, {"DOWNLOADVIEW_OFFLOAD__BACKEND": "litespeed"}) as client:
        answer = client.get("/files/a.txt")
    assert (answer.headers["x-litespeed-location"], answer.content) == ("/_files/a.txt", b"")


def test_the_directory_of_the_settings_is_on_the_import_path(directory: Path) -> None:
    (directory / "made_beside_the_settings.py").write_text("async def make(name):\n    return f'made {name}'\n")
    text = (
        '[sources.made]\ntype = "virtual"\nfactory = "made_beside_the_settings:make"\n'
        '[[routes]]\npath = "/made/{name}"\nsource = "made"\n'
    )
    with client_of(directory, text) as client:
        assert client.get("/made/x.txt").text == "made x.txt"


@pytest.mark.parametrize(
    "exc, line",
    [
        (TransferAborted("the file shrank\r\nINFO: forged"), "Transfer aborted: the file shrank\\r\\nINFO: forged"),
        (asyncio.CancelledError(), "Transfer aborted: the server stops"),
    ],
)
def test_an_aborted_transfer_is_one_line(caplog: pytest.LogCaptureFixture, exc: BaseException, line: str) -> None:
    logger = logging.getLogger("uvicorn.error")
    log_aborts_in_one_line()
    logger.error("Exception in ASGI application\n", exc_info=exc)
    logger.error("Exception in ASGI application\n", exc_info=ValueError("a bug"))
    ours, bug = caplog.records
    assert (ours.getMessage(), ours.exc_info, ours.levelname) == (line, None, "WARNING")
    assert bug.exc_info is not None  # is still told in full


def test_the_page_escapes_what_the_settings_say_and_links_below_the_root_path(directory: Path) -> None:
    text = f'{TEXT}name = "<b>"\nexample = ["a.txt", "x?y#z/<i>.txt"]\n'
    file = directory / "downloadview.toml"
    file.write_text(text)
    with TestClient(build(load_settings(file, environ={})), root_path="/below it") as client:
        page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<h2>&lt;b&gt;</h2>" in page.text
    assert '<a href="./files/a.txt">a.txt</a>' in page.text
    assert '<a href="./files/x%3Fy%23z/%3Ci%3E.txt">x?y#z/&lt;i&gt;.txt</a>' in page.text
    assert "<script" not in page.text


def test_the_objects_of_the_start_are_not_looked_through_again(directory: Path) -> None:
    (directory / "downloadview.toml").write_text(TEXT)
    gc.unfreeze()
    app = EndsInTime(build(load_settings(directory / "downloadview.toml", environ={})))

    async def start_and_leave() -> None:
        async def receive() -> Message:
            if not is_started.is_set():
                return {"type": "lifespan.startup"}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            kinds.append(message["type"])
            is_started.set()

        is_started = asyncio.Event()
        running = asyncio.create_task(app({"type": "lifespan"}, receive, send))
        await is_started.wait()
        running.cancel()
        await asyncio.wait([running])

    kinds: list[str] = []
    try:
        asyncio.run(start_and_leave())
        assert kinds[0] == "lifespan.startup.complete"
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
