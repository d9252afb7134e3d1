"""`downloadview_async.service:app` under servers of others: made when the server starts it, from the environment."""

import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from downloadview_async.service.config_loader import CONFIG
from tests.servers import PROJECT, free_port, serving
from tests.service.loading import FILES

APP = "downloadview_async.service:app"
SERVERS = {
    "uvicorn": ["--port", "{port}"],
    "hypercorn": ["--bind", "127.0.0.1:{port}"],
    "granian": ["--interface", "asgi", "--port", "{port}"],
    "gunicorn": ["--worker-class", "uvicorn.workers.UvicornWorker", "--bind", "127.0.0.1:{port}"],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(b"0123456789")
    (tmp_path / "downloadview.toml").write_text(FILES)
    return tmp_path


def command_of(server: str, port: int) -> list[str]:
    program = shutil.which(server, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{server} is not installed")
    return [program, *(option.format(port=port) for option in SERVERS[server]), APP]


@pytest.mark.parametrize("server", SERVERS)
def test_it_serves_the_settings_of_the_environment(directory: Path, server: str) -> None:
    port = free_port()
    env = {CONFIG: str(directory / "downloadview.toml")}
    with serving(command_of(server, port), port, log=directory / "log", env=env):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/files/a.txt", timeout=10) as answer:
            assert answer.read() == b"0123456789"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/readyz", timeout=10) as answer:
            assert answer.read() == b"ready\n"


def test_it_serves_the_settings_in_the_current_directory(directory: Path) -> None:
    port = free_port()
    log = directory / "log"
    with (
        serving(command_of("uvicorn", port), port, log=log, cwd=directory),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/files/a.txt", timeout=10) as answer,
    ):
        assert answer.read() == b"0123456789"


@pytest.mark.parametrize("server", ["uvicorn", "granian"])
def test_wrong_settings_are_one_line_in_the_log_of_the_server(directory: Path, server: str) -> None:
    (directory / "bad.toml").write_text("[server]\nprot = 1\n")
    for env, line in {
        "bad.toml": "downloadview: bad.toml: server.prot: unknown key: did you mean 'port'?",
        "": "downloadview: nothing to serve: set DOWNLOADVIEW_CONFIG to the path of the settings file, or give a file ",
    }.items():
        if not env:
            (directory / "downloadview.toml").unlink()
        run = subprocess.run(
            command_of(server, free_port()),
            cwd=directory,
            env={"PYTHONPATH": str(PROJECT)} | ({CONFIG: env} if env else {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode != 0
        assert line in run.stdout + run.stderr
        assert "Traceback" not in run.stdout + run.stderr


def test_hypercorn_tells_of_wrong_settings_without_our_own_traceback(directory: Path) -> None:
    (directory / "downloadview.toml").write_text("[server]\nprot = 1\n")
    run = subprocess.run(
        command_of("hypercorn", free_port()),
        cwd=directory,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "server.prot: unknown key: did you mean 'port'?" in run.stderr
    assert "During handling of the above exception" not in run.stderr
    assert "config_loader" not in run.stderr


def test_importing_it_reads_nothing() -> None:
    code = (
        "import sys\n"
        "from downloadview_async.service import app\n"
        "print(sorted({'msgspec', 'jinja2', 'downloadview_async.service.app'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_it_stays_the_application_when_the_module_of_the_same_name_is_imported() -> None:
    code = (
        "import downloadview_async.service as service\n"
        "first = vars(service)['app']\n"
        "from downloadview_async.service.app import build\n"
        "from downloadview_async.service import app\n"
        "print(app is first is service.app is vars(service)['app'], build.__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True downloadview_async.service.app\n"
