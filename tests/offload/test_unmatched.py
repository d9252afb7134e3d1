"""The warning about offload rules that cover none of the files that are sent: once, and never for nothing."""

import logging
import os
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import downloadview_async as dv
from downloadview_async.offload.unmatched import MANY
from downloadview_async.testing import call

pytestmark = pytest.mark.asyncio


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    directory.mkdir()
    for number in range(2 * MANY):
        (directory / f"{number}.txt").write_text("content")
    return directory


async def warnings_of(caplog: pytest.LogCaptureFixture, files: Path, rule: str, names: list[str]) -> list[str]:
    backend = dv.XAccelRedirect([dv.Rule(rule, "/_files/")])
    app = dv.OffloadMiddleware(Starlette(routes=[Mount("/", dv.Download(dv.PathSource(files)))]), backend)
    for name in names:
        assert (await call(app, f"/{name}")).status == 200
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_rule_for_a_directory_that_does_not_exist(caplog: pytest.LogCaptureFixture, files: Path) -> None:
    (message,) = await warnings_of(caplog, files, f"{files}-typo", ["0.txt", "1.txt", "0.txt"])
    assert f"no offload rule covers '{files}/0.txt'" in message
    assert f"The rules are for '{files}-typo': '{files}-typo' is not a directory here, so correct it" in message


async def test_a_rule_for_the_same_directory_by_another_path(
    caplog: pytest.LogCaptureFixture, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(files)
    (message,) = await warnings_of(caplog, files, f"{tmp_path}/link", ["0.txt", "1.txt"])
    assert f"'{tmp_path}/link' is '{files}' by another path" in message


async def test_a_rule_for_another_directory_is_told_after_many_files(
    caplog: pytest.LogCaptureFixture, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    names = [f"{number}.txt" for number in range(2 * MANY)]
    assert await warnings_of(caplog, files, f"{tmp_path}/other", names[: MANY - 1] * 2) == []
    (message,) = await warnings_of(caplog, files, f"{tmp_path}/other", names)
    assert f"{MANY} files had no rule, and none had one" in message


async def test_files_beside_those_with_a_rule_are_not_told(
    caplog: pytest.LogCaptureFixture, files: Path, tmp_path: Path
) -> None:
    """An application may offload one directory, and send the files of another itself."""
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "a.txt").touch()
    backend = dv.XAccelRedirect([dv.Rule(tmp_path / "sent", "/_files/")])  # type: ignore[arg-type]
    routes = [
        Mount("/a", dv.Download(dv.PathSource(tmp_path / "sent"))),
        Mount("/b", dv.Download(dv.PathSource(files))),
    ]
    app = dv.OffloadMiddleware(Starlette(routes=routes), backend)
    for path in ["/b/0.txt", "/a/a.txt", *(f"/b/{number}.txt" for number in range(2 * MANY))]:
        assert (await call(app, path)).status == 200
    assert caplog.records == []


async def test_files_of_another_kind_are_not_told(caplog: pytest.LogCaptureFixture, files: Path) -> None:
    backend = dv.XAccelRedirect([dv.Rule("https://files.example.org/", "/_files/")])
    generated = dv.VirtualSource(lambda name: dv.VirtualFile(b"content", name=name))
    for source in (dv.PathSource(files), generated):
        app = dv.OffloadMiddleware(Starlette(routes=[Mount("/", dv.Download(source))]), backend)
        for number in range(2 * MANY):
            assert (await call(app, f"/{number}.txt")).status == 200
    assert caplog.records == []


async def test_foreign_responses_are_told_too(caplog: pytest.LogCaptureFixture, files: Path, tmp_path: Path) -> None:
    """`StaticFiles` resolves symbolic links, so a rule for the link covers none of its files."""
    (tmp_path / "link").symlink_to(files)

    async def one(request: Request) -> FileResponse:
        return FileResponse(files / "0.txt")

    routes = [Mount("/static", StaticFiles(directory=tmp_path / "link")), Route("/one", one)]
    backend = dv.XAccelRedirect([dv.Rule(str(tmp_path / "link"), "/_files/")])
    app = dv.OffloadMiddleware(Starlette(routes=routes), backend, pathsend=True)
    for path in ("/static/0.txt", "/static/1.txt", "/one"):
        assert (await call(app, path)).body == b"content"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "by another path" in message


async def test_a_name_from_a_client_cannot_break_the_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    name = "a\nb\x1b.txt"
    (tmp_path / name).touch()
    backend = dv.XAccelRedirect([dv.Rule("/nowhere/at/all", "/_files/")])
    assert backend.headers_for(dv.LocalFile(os.path.join(tmp_path, name))) is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.isprintable()
