"""Secrets in files: those of `$CREDENTIALS_DIRECTORY` that have the name of a variable."""

from pathlib import Path

import pytest

from downloadview_async import ConfigurationError
from downloadview_async.service.config_loader import load_settings
from tests.service.loading import FILES, load

PORT = "DOWNLOADVIEW_SERVER__PORT"


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "credentials").mkdir()
    return tmp_path / "credentials"


@pytest.mark.parametrize(
    "text, environ, port",
    [
        ("9000", {}, 9000),
        ("9000\n", {}, 9000),
        ("9000", {PORT: "9001"}, 9001),
    ],
    ids=["alone", "with a line end", "below a variable"],
)
def test_a_file_takes_the_place_of_a_variable(
    tmp_path: Path, credentials: Path, text: str, environ: dict[str, str], port: int
) -> None:
    (credentials / PORT).write_text(text)
    (credentials / "users").write_text("not a setting")
    (credentials / "DOWNLOADVIEW_CONFIG").write_text("not a setting of the file")
    environ = {"CREDENTIALS_DIRECTORY": str(credentials), **environ}
    assert load(tmp_path, f"{FILES}[server]\nport = 8999\n", **environ).server.port == port


def test_only_the_last_line_end_is_left_out(tmp_path: Path, credentials: Path) -> None:
    keys = f"new {'a' * 32}\nold {'b' * 32}\n"
    (credentials / "DOWNLOADVIEW_LINKS__KEYS").write_text(keys)
    settings = load(tmp_path, FILES, CREDENTIALS_DIRECTORY=str(credentials))
    assert settings.links is not None
    assert settings.links.keys == keys.removesuffix("\n")


@pytest.mark.parametrize("directory", ["", None])
def test_without_a_directory_there_are_none(tmp_path: Path, credentials: Path, directory: str | None) -> None:
    (credentials / PORT).write_text("9000")
    environ = {} if directory is None else {"CREDENTIALS_DIRECTORY": directory}
    assert load(tmp_path, FILES, **environ).server.port == 8000


def test_a_wrong_value_is_blamed_on_the_variable(tmp_path: Path, credentials: Path) -> None:
    (credentials / PORT).write_text("s3cret")
    with pytest.raises(ConfigurationError, match=PORT):
        load(tmp_path, FILES, CREDENTIALS_DIRECTORY=str(credentials))


def test_secrets_that_cannot_be_read(tmp_path: Path, credentials: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigurationError, match=r"CREDENTIALS_DIRECTORY: .*\(No such file or directory\)"):
        load_settings(None, environ=environ)
    (credentials / PORT).write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="a file is not UTF-8"):
        load_settings(None, environ={"CREDENTIALS_DIRECTORY": str(credentials)})
