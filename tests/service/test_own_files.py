"""Lines of the log at the start: files of the service that clients could download, and templates without a use."""

import logging
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from downloadview_async.service.app import build
from tests.service.loading import FILES, load


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "keys").write_text("k 0123456789012345678901234567890123\n")
    (tmp_path / "files" / "keys").write_text("k 0123456789012345678901234567890123\n")
    return tmp_path


def warnings_of(directory: Path, text: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "downloadview_async"), TestClient(build(load(directory, text))):
        return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "table, key, name",
    [
        ('[digests]\nstore = "files/digests.db"', "digests.store", "digests.db"),
        ('[links]\nkeys = "files/keys"', "links.keys", "keys"),
        ('[links]\nkeys = "keys"\nstore = "sqlite:files/links.db"', "links.store", "links.db"),
        ('[archives]\nchecksums = "files/sums.db"', "archives.checksums", "sums.db"),
        ('[log]\npath = "files/log"', "log.path", "log"),
        ('[accounts]\ndatabase = "sqlite+aiosqlite:///files/accounts.db"', "accounts.database", "accounts.db"),
    ],
)
def test_a_file_of_the_service_that_a_route_serves_is_warned_of(
    directory: Path, caplog: pytest.LogCaptureFixture, table: str, key: str, name: str
) -> None:
    (line,) = warnings_of(directory, f"{FILES}{table}\n", caplog)
    assert line == (
        f"{key}: '{directory}/files/{name}' is in a directory that the route '/files/{{path:path}}' serves, so clients "
        f'can download it: move it, or hide it from the route with hide = ["{name}*"]'
    )
    assert warnings_of(directory, f'{FILES}hide = ["{name}*"]\n{table}\n', caplog) == []
    elsewhere = table.replace('"files/', '"').replace(":files/", ":").replace("///files/", "///")
    assert warnings_of(directory, f"{FILES}{elsewhere}\n", caplog) == []


def test_the_settings_beside_the_files_that_they_serve_are_warned_of(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = warnings_of(directory, FILES.replace('"files"', '"."', 1), caplog)
    assert line.startswith(f"the settings: '{directory}/downloadview.toml' is in a directory that the route ")


def test_a_template_without_a_use_is_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    templates = directory / "templates"
    templates.mkdir()
    for name, text in {
        "listing.html": '{% extends "base.html" %}',
        "base.html": '<title>x</title>{% include "parts/foot.html" %}',
        "page.css": "body { color: red }",
        "eror.html": "a page whose name is misspelt",
        "style.css": "a file that nothing sends",
        ".directory": "a file of a desktop",
    }.items():
        (templates / name).write_text(text)
    (templates / "parts").mkdir()
    (templates / "parts" / "foot.html").write_text("<p>foot")
    assert warnings_of(directory, f'{FILES}[pages]\ntemplates = "templates"\n', caplog) == [
        f"pages.templates: '{templates}/eror.html' is not used: did you mean 'error.html'?",
        f"pages.templates: '{templates}/style.css' is not used: use one of error.html, index.html, listing.html, "
        "page.css, page.js, view.html",
    ]
