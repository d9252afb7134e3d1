"""Settings as most tests of the service begin, and loading those of a test."""

from pathlib import Path

import pytest

from downloadview_async import ConfigurationError
from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.settings import Settings

FILES = """
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{path:path}"
source = "files"
"""
"""A directory at /files/. What follows without a table belongs to the route."""


def load(directory: Path, text: str, **environ: str) -> Settings:
    """Write the settings file of a directory, and load it."""
    file = directory / "downloadview.toml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ=environ)


def refusal(directory: Path, text: str) -> str:
    """Return the error, of one line, with which the service refuses settings."""
    with pytest.raises(ConfigurationError) as error:
        build(load(directory, text))
    assert "\n" not in str(error.value)
    return str(error.value)
