"""The help of each command, what a newcomer writes instead, and completion in real shells."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from downloadview_async.cli import main, serve
from downloadview_async.service.command import Command
from downloadview_async.service.config_loader import CONFIG
from tests.servers import PROJECT

COMMANDS = {name: command for name, command in main.commands.items() if isinstance(command, Command)}


def error_of(*arguments: str) -> str:
    result = CliRunner(env={CONFIG: None}).invoke(main, arguments)
    assert result.exit_code == 2
    return " ".join(result.stderr.partition("Error: ")[2].split())


def test_every_command_has_examples() -> None:
    assert COMMANDS.keys() == main.commands.keys()
    assert all(command.examples for command in COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_can_be_parsed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("DIRECTORY", "files/2026"):
        (tmp_path / path).mkdir(parents=True)
    for line in COMMANDS[name].examples:
        program, command, *arguments = shlex.split(line.partition(">")[0])
        assert (program, command) == ("downloadview", name)
        COMMANDS[name].make_context(name, arguments)
        assert line in CliRunner().invoke(main, [name, "--help"]).output


def test_every_option_of_serve_is_in_a_group() -> None:
    shown = CliRunner().invoke(main, ["serve", "--help"]).output
    assert shown.partition("\nOptions:\n")[2].split() == ["-h,", "--help", "Show", "this", "message", "and", "exit."]
    for parameter in serve.params:
        assert not isinstance(parameter, click.Option) or parameter.opts[0] in shown


@pytest.mark.parametrize("width", ["20", "60", "80"])
def test_no_short_help_is_cut(width: str) -> None:
    shown = CliRunner(env={"COLUMNS": width}).invoke(main, ["--help"]).output
    assert "..." not in shown.partition("Commands:")[2]
    assert "Revoke a link, or all links of a key, from the next request on." in " ".join(shown.split())


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("serve -p 80", "No such option '-p': write --port"),
        ("serve --bind 0.0.0.0:80", "No such option '--bind': write --host, and the port as --port"),
        ("serve --directory files", "No such option '--directory': write the directory without an option"),
        ("serve files --reload", "No such option '--reload': write --watch"),
        ("serve --wrong", "No such option '--wrong'."),
        ("serve files 8411", "Invalid value for '[PATH]...': '8411' does not exist: for a port use --port 8411"),
        ("serve s.toml", "'s.toml' is a file: for settings use --config s.toml, or else give its directory"),
        ("serve gone.toml", "'gone.toml' does not exist: for settings use --config, with a file that exists"),
        ("files", "No such command 'files'. To serve it: downloadview serve files"),
        ("s.toml", "No such command 's.toml'. To serve it: downloadview serve --config s.toml"),
        ("gone", "No such command 'gone'."),
        ("help", "No such command 'help'. Write: downloadview --help"),
        ("version", "No such command 'version'. Write: downloadview --version"),
        ("config", "Missing argument 'PROXY'. Choose from: nginx, haproxy"),
    ],
)
def test_what_a_newcomer_writes_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "s.toml").touch()
    assert error in error_of(*arguments.split())


def test_a_variable_that_names_no_settings_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner(env={CONFIG: "gone.toml"}).invoke(main, ["serve"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "downloadview: DOWNLOADVIEW_CONFIG: 'gone.toml' does not exist: correct the variable, or unset it, or give "
        "--config\n"
    )
    result = CliRunner(env={CONFIG: ""}).invoke(main, ["serve"])
    assert "nothing to serve: give files or directories, or settings with --config" in result.stderr


def test_the_command_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "downloadview_async", "--version"], capture_output=True, text=True)
    assert run.stdout.startswith("downloadview, version ")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A directory with the command `downloadview`."""
    path = tmp_path / "bin" / "downloadview"
    path.parent.mkdir()
    code = "from downloadview_async.cli import main; main(prog_name='downloadview')"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    path.chmod(0o755)
    return path.parent


COMPLETED = [
    ("downloadview comp", "completion"),
    ("downloadview serve --log-l", "--log-level"),
    ("downloadview serve --log-level wa", "warning"),
    ("downloadview config ca", "caddy"),
    ("downloadview completion fi", "fish"),
]


def completed_by(shell: list[str], script: str, directory: Path) -> list[str]:
    run = subprocess.run(
        [*shell, script],
        env={**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("line, word", COMPLETED)
def test_completion_in_bash(program: Path, line: str, word: str) -> None:
    words = line.split(" ")
    script = (
        'source <(downloadview completion bash); COMPREPLY=(); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_downloadview_completion downloadview; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = f"set -- {shlex.join(words)}; {script}"
    assert completed_by(["bash", "--norc", "-c"], command, program) == [word]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("line, word", COMPLETED)
def test_completion_in_fish(program: Path, line: str, word: str) -> None:
    script = f"downloadview completion fish | source; complete -C {shlex.quote(line)}"
    (found,) = [one for one in completed_by(["fish", "--no-config", "-c"], script, program) if one]
    assert found.partition("\t")[0] == word


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_for_other_shells(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_DOWNLOADVIEW_COMPLETE={shell}_complete" in result.output


def test_descriptions_in_fish_are_not_cut_at_a_comma() -> None:
    env = {"_DOWNLOADVIEW_COMPLETE": "fish_complete", "COMP_WORDS": "downloadview rev", "COMP_CWORD": "rev"}
    result = CliRunner(env=env).invoke(main, prog_name="downloadview")
    assert result.output == "plain,revoke\tRevoke a link, or all links of a key, from the next request on.\n"
    assert 'string split -m 1 ","' in CliRunner().invoke(main, ["completion", "fish"]).output
