"""The commands `downloadview report` and `downloadview account`, and the settings in [accounts]."""

import csv
import io
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import downloadview_async as dv
from downloadview_async.cli import main
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.proxy_config import config_for
from tests.accounts.test_completion import outcome
from tests.accounts.test_proxy_log import line
from tests.service.loading import FILES

SETTINGS = f"""
[accounts]
database = "sqlite+aiosqlite:///accounts.db"
{FILES}"""
PROXIED = """
[offload]
backend = "nginx"
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Settings, and a database with two downloads of today and one of ten days ago."""
    (tmp_path / "files").mkdir()
    file = tmp_path / "downloadview.toml"
    file.write_text(SETTINGS)
    completions = dv.Completions(f"sqlite+aiosqlite:///{tmp_path / 'accounts.db'}")
    for name, days in (("a.bin", 0), ("a.bin", 0), ("é\n=1+1", 10)):
        completions(outcome(name=name, time=time.time() - days * 86_400))
    delegated = {"spans": (), "sent": 0, "result": "delegated", "delegated_to": "x-accel-redirect"}
    completions(outcome(request_id="a1", name="d.bin", time=time.time(), **delegated))
    completions.close()
    return file


def call(*arguments: str, **environ: str) -> Result:
    return CliRunner(env=environ).invoke(main, arguments)


def test_a_report_as_a_table(settings: Path) -> None:
    result = call("report", "--config", str(settings))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "downloads  answers  bytes  file",
        "        2        2    200  files/a.bin",
        r"        1        1    100  files/é\n=1+1",
    ]
    assert "é" not in call("report", "--config", str(settings), "--since", "7d").stdout
    assert call("report", "--config", str(settings), "--top", "1").stdout.count("\n") == 2


def test_a_report_for_other_programs(settings: Path) -> None:
    rows = list(
        csv.reader(io.StringIO(call("report", "--config", str(settings), "--format", "csv").stdout, newline=""))
    )
    assert rows[0] == ["file", "downloads", "answers", "bytes"]
    assert rows[2][0] == "files/é\n=1+1"
    for by in ("file", "route", "user", "client", "link", "day"):
        printed = json.loads(call("report", "--config", str(settings), "--by", by, "--format", "json").stdout)
        assert all([*row] == [by, "downloads", "answers", "bytes"] for row in printed)
        assert sum(row["downloads"] for row in printed) == (0 if by in ("user", "link") else 3)


def test_a_log_is_counted(settings: Path) -> None:
    log = settings.with_name("my.log")
    log.write_text(line() + "\nsomething else\n")
    os.utime(log, (time.time() - 60,) * 2)
    assert call("account", "--config", str(settings), str(log)).stdout == "counted: 1\n"
    assert call("account", "--config", str(settings), str(log)).stdout == "counted: 0\n"
    assert "files/d.bin" in call("report", "--config", str(settings)).stdout
    by_default = call("account", "--config", str(settings), DOWNLOADVIEW_ACCOUNTS__PROXY_LOG=str(log))
    assert by_default.stdout == "counted: 0\n"


MISTAKES = {
    "no database": (
        ["report"],
        {"DOWNLOADVIEW_ACCOUNTS": "{}"},
        "accounts.database: downloads are counted in a database",
    ),
    "no log": (["account"], {}, "no log: give LOG, or accounts.proxy_log"),
    "a log that is missing": (["account", "none.log"], {}, "none.log: the log cannot be read"),
    "a wrong time": (["report", "--since", "soon"], {}, "--since is 'soon': give a time"),
    "a wrong URL": (["report"], {"DOWNLOADVIEW_ACCOUNTS__DATABASE": "x"}, "accounts.database: the database URL"),
    "a missing directory": (
        ["report"],
        {"DOWNLOADVIEW_ACCOUNTS__DATABASE": "sqlite+aiosqlite:///none/a.db"},
        "accounts.database: the database cannot be used (OperationalError: unable to open",
    ),
    "another time": (["report"], {"DOWNLOADVIEW_ACCOUNTS__KEEP": "0"}, "accounts.keep: '0' is not a time"),
    "a share": (["report"], {"DOWNLOADVIEW_ACCOUNTS__MIN_SHARE": "2"}, "accounts.min_share: "),
    "a log without a database": (
        ["report"],
        {"DOWNLOADVIEW_ACCOUNTS": '{"proxy_log": "a.log"}'},
        "accounts.database: missing: the log of the proxy is counted in a database",
    ),
}


@pytest.mark.parametrize(("arguments", "environ", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(settings: Path, arguments: list[str], environ: dict[str, str], message: str) -> None:
    result = call(*arguments, "--config", str(settings), **environ)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 or arguments == ["account"]


def test_the_settings_of_the_store(settings: Path) -> None:
    from downloadview_async.service.accounts import store_of_completions

    environ = {
        "DOWNLOADVIEW_ACCOUNTS__KEEP": "90d",
        "DOWNLOADVIEW_ACCOUNTS__MIN_SHARE": "0.5",
        "DOWNLOADVIEW_ACCOUNTS__MAX_ROWS": "7",
    }
    store = store_of_completions(load_settings(settings, environ=environ))
    assert store is not None
    assert (store.keep, store.min_share, store.max_rows) == (timedelta(days=90), 0.5, 7)


def test_the_configuration_of_a_proxy_has_the_log_only_if_it_is_wanted(settings: Path) -> None:
    settings.write_text(SETTINGS + PROXIED)
    environ = {"DOWNLOADVIEW_ACCOUNTS__PROXY_LOG": "downloads.log"}

    def configuration(environ: dict[str, str]) -> str:
        loaded = load_settings(settings, environ=environ)
        return config_for(loaded, "nginx", listen="127.0.0.1:1", service=None, relative_to=None)

    assert f"access_log {settings.with_name('downloads.log')} downloads;" in configuration(environ)
    assert "log_format downloads" not in configuration({})
    with pytest.raises(dv.ConfigurationError, match=r"accounts\.proxy_log: .* give an absolute path of letters"):
        configuration({"DOWNLOADVIEW_ACCOUNTS__PROXY_LOG": "a b;.log"})
