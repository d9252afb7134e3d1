"""The zero-copy protocol works with each uvicorn from the oldest to the newest, and says so where it does not know."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
import uvicorn

from downloadview_async.asgi.uvicorn.internals import KNOWN_UVICORN, uvicorn_warning
from tests.asgi.ways import OLDEST, needs_the_oldest_uvicorn
from tests.servers import PROJECT

OTHERS = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=PROJECT, env={**OTHERS, **env}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_protocol_passes_its_own_tests_on_the_oldest_uvicorn() -> None:
    needs_the_oldest_uvicorn()
    # Which file system the files are on is nothing to uvicorn; what it makes of bad headers is its own.
    tests = ["tests/asgi/test_server.py", "tests/asgi/test_wire.py", "tests/asgi/test_uvicorn_internals.py"]
    tests += ["-k", "not tmpfs and not breaks and not never_arrives"]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, PYTHONPATH=str(OLDEST))
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_ends_are_the_ones_that_are_tested() -> None:
    needs_the_oldest_uvicorn()
    oldest, newest = KNOWN_UVICORN
    (installed,) = importlib.metadata.distributions(name="uvicorn", path=[str(OLDEST)])
    assert installed.version == oldest
    assert run("-c", "import uvicorn; print(uvicorn.__version__)", PYTHONPATH=str(OLDEST)).stdout.strip() == oldest
    assert f"uvicorn=={oldest} " in (PROJECT / "requirements" / "oldest.txt").read_text()
    if uvicorn.__version__ != oldest:  # as it is when these tests run on the oldest themselves
        assert uvicorn.__version__.split(".")[:2] == newest.split(".")[:2], "test with it, then say so: KNOWN_UVICORN"
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["server"]
    assert f"uvicorn>={re.sub('[.]0$', '', oldest)}" in settings


@pytest.mark.parametrize(
    "version, known",
    [
        ("0.38.0", True),
        ("0.38.7", True),
        ("0.40.0", True),
        ("0.54.0", True),
        ("0.54.9", True),
        ("0.37.1", False),
        ("0.9.0", False),
        ("0.55.0", False),
        ("0.55.0.dev1", False),
        ("0.100.0", False),
        ("1.0", False),
        ("1.40.0", False),
        ("unheard of", False),
    ],
)
def test_which_versions_are_known(version: str, known: bool) -> None:
    assert KNOWN_UVICORN == ("0.38.0", "0.54.0"), "the table is for these"
    warning = uvicorn_warning(version)
    assert (warning is None) == known
    if warning is not None:
        assert version in warning
        assert all(end in warning for end in KNOWN_UVICORN)
        assert "--http httptools" in warning


def test_it_is_said_once_at_start_up() -> None:
    script = "import uvicorn; uvicorn.__version__ = {!r}; import downloadview_async.asgi.server"
    assert run("-c", script.format("0.99.0")).stderr == f"{uvicorn_warning('0.99.0')}\n"
    assert run("-c", script.format(KNOWN_UVICORN[0])).stderr == ""
    assert run("-c", "import downloadview_async.asgi.server").stderr == ""
