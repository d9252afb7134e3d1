"""The examples, each as a user would run it: under uvicorn, in a process of its own."""

import http.client
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from downloadview_async.testing import assert_download_response, assert_x_accel_redirect
from examples.sqlalchemy_documents import Base, Document
from tests.servers import Server, free_port, serving

MEMBER = {"Authorization": "Bearer a-token"}
CONTENT = b"0123456789" * 1000


@contextmanager
def example(module: str, tmp_path: Path, **environment: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", f"examples.{module}:create_app", "--port", str(port)]
    env = {"EXAMPLE_FILES": str(tmp_path / "files"), "EXAMPLE_TOKEN": "a-token", **environment}
    with serving(command, port, log=tmp_path / "log", env=env) as server:
        yield server


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    (directory / "public").mkdir(parents=True)
    (directory / "für alle.txt").write_bytes(CONTENT)
    (directory / "public" / "open.pdf").write_bytes(CONTENT)
    return directory


APPLICATIONS = pytest.mark.parametrize("module", ["starlette_app", "fastapi_app"])


@APPLICATIONS
def test_an_application_decides_and_the_library_sends(module: str, files: Path, tmp_path: Path) -> None:
    with example(module, tmp_path) as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer another"}):
            refused = client.get("/members/für alle.txt", headers=headers)
            assert refused.status_code == 403
            assert b"0123456789" not in refused.content
        allowed = client.get("/members/für alle.txt", headers=MEMBER)
        assert_download_response(
            allowed, content=CONTENT, filename="für alle.txt", attachment=True, content_type="text/plain"
        )
        assert allowed.headers["cache-control"] == "private"
        part = client.get("/members/für alle.txt", headers={**MEMBER, "Range": "bytes=5-14"})
        assert_download_response(part, status=206, content=b"5678901234")
        head = client.head("/members/für alle.txt", headers=MEMBER)
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(CONTENT)))
        missing = client.get("/members/none.txt", headers=MEMBER)
        assert (missing.status_code, missing.text) == (404, "Not Found")
        assert client.get("/members/none.txt").status_code == 403

        assert_download_response(client.get("/public/open.pdf"), content=CONTENT, filename="open.pdf")
        assert client.get("/public/%2e%2e/für alle.txt").status_code == 404
        assert client.post("/public/open.pdf").status_code == 405


@APPLICATIONS
def test_an_application_hands_over_to_nginx(module: str, files: Path, tmp_path: Path) -> None:
    with (
        example(module, tmp_path, EXAMPLE_OFFLOAD="nginx") as server,
        httpx2.Client(base_url=server.url) as client,
    ):
        refused = client.get("/members/für alle.txt")
        assert refused.status_code == 403
        assert "x-accel-redirect" not in refused.headers
        allowed = client.get("/members/für alle.txt", headers=MEMBER)
        assert_x_accel_redirect(allowed, redirect_url="/_files/f%C3%BCr%20alle.txt", filename="für alle.txt")
        public = client.get("/public/open.pdf")
        assert_x_accel_redirect(public, redirect_url="/_files/public/open.pdf", filename="open.pdf")
        missing = client.get("/members/none.txt", headers=MEMBER)
        assert missing.status_code == 404
        assert "x-accel-redirect" not in missing.headers


@pytest.mark.asyncio
async def test_documents_hold_no_connection_while_their_bytes_flow(files: Path, tmp_path: Path) -> None:
    size = 64 * 1024 * 1024  # more than all socket buffers between the two take
    with (files / "large.bin").open("wb") as large:
        large.truncate(size)
    database = f"sqlite+aiosqlite:///{tmp_path / 'documents.db'}"
    with example("sqlalchemy_documents", tmp_path, EXAMPLE_DATABASE=database) as server:
        engine = create_async_engine(database)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            session.add_all(
                [
                    Document(key="1", path="für alle.txt", title="Jahr π.csv", content_type="text/csv"),
                    Document(key="2", path="large.bin", title="large.bin", content_type=None),
                    Document(key="3", path="", title="not uploaded.txt", content_type=None),
                ]
            )
        await engine.dispose()

        with httpx2.Client(base_url=server.url) as client:
            first = client.get("/documents/1")
            assert_download_response(first, content=CONTENT, filename="Jahr π.csv", content_type="text/csv")
            assert client.get("/documents/3").status_code == 404
            assert client.get("/documents/4").status_code == 404

            assert isinstance(server.address, int)
            with closing(http.client.HTTPConnection("127.0.0.1", server.address)) as slow:
                slow.request("GET", "/documents/2")
                answer = slow.getresponse()
                received = len(answer.read(1000))
                # the transfer is under way, and cannot end: most of it has nowhere to go
                assert client.get("/pool").json() == {"checked_out": 0}
                while block := answer.read(1 << 20):
                    received += len(block)
            assert received == size
