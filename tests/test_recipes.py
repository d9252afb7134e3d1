"""The applications of the pages on frameworks and recipes, each pasted into a file, do what the pages say."""

import csv
import io
import os
import re
import runpy
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from quart import Quart

from tests.live import Answer, ask, live
from tests.servers import PROJECT

pytestmark = pytest.mark.asyncio

HOWTO = PROJECT / "docs" / "howto"


def app_of(page: str, heading: str, number: int = 0) -> dict[str, Any]:
    """Run a block of a page as a script in the current directory, and return what it defines."""
    text = re.split(r"^#{2,3} [A-Z]", (HOWTO / page).read_text().partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    if heading == "FastAPI":  # the code before the first heading below the title
        text = (HOWTO / page).read_text().partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    Path("app.py").write_text(blocks[number])
    return runpy.run_path("app.py")


@asynccontextmanager
async def served(page: str, heading: str, number: int = 0) -> AsyncIterator[int]:
    async with live(app_of(page, heading, number)["app"]) as port:
        yield port


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(answer: Answer) -> tuple[int, bytes]:
    return answer.status, answer.body


# --- FastAPI


async def test_the_invoices_of_the_page_on_fastapi() -> None:
    def as_user(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer token-of-{name}"}

    async with served("fastapi.md", "FastAPI") as port:
        for method in ("GET", "HEAD"):
            answer = await ask(port, "/invoices/1", method=method, headers=as_user("ada"))
            assert answer.status == 200
            assert answer.headers["content-disposition"] == 'attachment; filename="invoice-1.pdf"'
        others = await ask(port, "/invoices/1", headers=as_user("bob"))
        missing = await ask(port, "/invoices/2", headers=as_user("ada"))
        assert look(others) == look(missing) == (404, b'{"detail":"Not Found"}')
        assert (await ask(port, "/invoices/1")).status == 401
        openapi = await ask(port, "/openapi.json")
        assert b"application/octet-stream" in openapi.body


async def test_a_session_of_the_page_on_fastapi(directory: Path) -> None:
    async with served("fastapi.md", "Database sessions") as port:
        assert (await ask(port, "/files/7")).body == b"%PDF-1.7"


async def test_the_temporary_file_of_the_page_on_fastapi(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    (directory / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory / "tmp"))
    async with served("fastapi.md", "Temporary files") as port:
        answer = await ask(port, "/export")
    assert look(answer) == (200, b"number,total\n1,17.50\n")
    assert 'filename="export.csv"' in answer.headers["content-disposition"]
    assert os.listdir(directory / "tmp") == []


async def test_the_directory_of_the_page_on_fastapi() -> None:
    async with served("fastapi.md", "A whole directory") as port:
        assert (await ask(port, "/manuals/start.txt")).status == 404
        assert (await ask(port, "/manuals/start.txt", headers={"X-Member": "yes"})).body == b"Read me first.\n"


# --- Litestar and Quart


@pytest.mark.parametrize("framework", ["Litestar", "Quart"])
async def test_the_invoices_of_litestar_and_quart(framework: str) -> None:
    async with served("litestar-quart.md", framework) as port:
        for method in ("GET", "HEAD"):
            assert (await ask(port, "/invoices/1", method=method)).status == 200
        refused, none = [await ask(port, path) for path in ("/invoices/2", "/elsewhere")]
        assert look(refused) == look(none)
        assert refused.status == 404


async def test_the_manuals_of_litestar() -> None:
    async with served("litestar-quart.md", "A whole directory") as port:
        assert (await ask(port, "/manuals/start.txt")).status == 404
        assert (await ask(port, "/manuals/start.txt", headers={"X-Member": "yes"})).body == b"Read me first.\n"


async def test_the_generated_file_of_litestar() -> None:
    async with served("litestar-quart.md", "A generated file") as port:
        answer = await ask(port, "/squares.csv")
        assert look(answer) == (200, b"number,square\r\n0,0\r\n1,1\r\n2,4\r\n")
        assert answer.headers["content-type"].startswith("text/csv")
        assert (await ask(port, "/squares.csv", method="HEAD")).status == 200


async def test_the_manuals_of_quart() -> None:
    async with served("litestar-quart.md", "The files of a directory") as port:
        member = {"X-Member": "yes"}
        assert (await ask(port, "/manuals/start.txt")).status == 404
        assert look(await ask(port, "/manuals/start.txt", headers={**member, "Range": "bytes=0-3"})) == (206, b"Read")
        assert (await ask(port, "/manuals/start.txt", method="HEAD", headers=member)).status == 200


async def test_a_framework_beside_a_download_gets_its_lifespan(directory: Path) -> None:
    made = app_of("litestar-quart.md", "Other frameworks")
    started = []
    framework = Quart(__name__)
    framework.before_serving(lambda: started.append("Quart"))
    framework.get("/")(lambda: "It works.")
    made["app"].__globals__["other_framework"] = made["router"].default = framework
    (directory / "files" / "a.txt").write_text("Hello\n")
    async with live(made["app"], lifespan="on") as port:
        assert started == ["Quart"]
        assert (await ask(port, "/")).body == b"It works."
        assert look(await ask(port, "/files/a.txt", headers={"Range": "bytes=0-3"})) == (206, b"Hell")
        assert (await ask(port, "/files/none")).status == 404


# --- recipes


async def test_video(directory: Path) -> None:
    async with served("recipes.md", "Video that can be seeked") as port:
        (directory / "videos" / "film.mp4").write_bytes(bytes(range(256)))
        (directory / "videos" / "notes.txt").write_bytes(b"private")
        assert b'src="/videos/film.mp4"' in (await ask(port, "/")).body
        part = await ask(port, "/videos/film.mp4", headers={"Range": "bytes=100-"})
        assert look(part) == (206, bytes(range(100, 256)))
        assert part.headers["content-type"] == "video/mp4"
        assert part.headers["content-disposition"] == 'inline; filename="film.mp4"'
        assert (await ask(port, "/videos/notes.txt")).status == 404


async def test_csv_exports() -> None:
    async with served("recipes.md", "CSV exports") as port:
        answer = await ask(port, "/orders.csv")
        assert (await ask(port, "/orders.csv", method="HEAD")).status == 200
    assert answer.complete
    assert answer.body.startswith("\ufeffid,customer,total\r\n".encode())
    rows = [*csv.reader(io.StringIO(answer.body.decode("utf-8-sig")))]
    assert len(rows) == 10_002
    assert ["0", "'=1+1", "0"] in rows
    assert ["2", "Müller 2", "3.0"] in rows


async def test_a_zip_archive_of_invoices() -> None:
    async with served("recipes.md", "A ZIP archive of invoices") as port:
        whole = await ask(port, "/invoices/2026.zip")
        rest = await ask(port, "/invoices/2026.zip", headers={"Range": "bytes=10-"})
        assert (await ask(port, "/invoices/2025.zip")).status == 404
    assert int(whole.headers["content-length"]) == len(whole.body)
    assert look(rest) == (206, whole.body[10:])
    with zipfile.ZipFile(io.BytesIO(whole.body)) as archive:
        assert archive.namelist() == ["2026/invoice-1.pdf", "2026/invoice-3.pdf"]
        assert archive.read("2026/invoice-1.pdf") == b"%PDF-1.7 invoice 1"
