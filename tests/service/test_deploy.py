"""What is deployed, as far as it can be checked without a container engine and without being systemd."""

import configparser
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from downloadview_async.cli import main
from downloadview_async.service.config_loader import load_settings
from tests.servers import PROJECT, demo

DEPLOY = PROJECT / "deploy"


def dockerfile() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage."""
    text = (PROJECT / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    stages: list[list[tuple[str, str]]] = []
    for line in filter(str.strip, lines):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest))
    return stages


def test_the_image_is_made_of_files_that_are_here_and_not_ignored() -> None:
    rules = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for name, rest in dockerfile()[0]:
        if name != "COPY":
            continue
        for source in rest.split()[:-1]:
            assert (PROJECT / source).exists(), source
            kept = [rule[1:] for rule in rules if rule.startswith("!")]
            assert any(source == rule or source.startswith(f"{rule}/") for rule in kept), f"{source} is ignored"
    ignored = [rule for rule in rules if not rule.startswith("!")]
    for made in ("app/demo.db", "app/files/large.bin", "downloadview_async/__pycache__"):
        assert any(fnmatch.fnmatch(made, rule) for rule in ignored), made


def test_the_image_is_small_and_unprivileged() -> None:
    build, final = dockerfile()
    assert any(name == "RUN" and "--require-hashes" in rest for name, rest in build)
    instructions = dict(final)
    assert instructions["FROM"].endswith("-slim")
    user = instructions["USER"].partition(":")[0]
    assert int(user) > 0
    assert not any(name == "RUN" for name, _ in final)  # nothing is installed in what is deployed
    assert "/-/livez" in instructions["HEALTHCHECK"]


@pytest.mark.slow
def test_the_health_check_of_the_image_tells_up_from_down(tmp_path: Path) -> None:
    instructions = dict(dockerfile()[1])
    command: list[str] = yaml.safe_load(instructions["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[0] == "python"
    with demo(tmp_path / "log") as server:
        code = command[2].replace(":8000", f":{server.address}")
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def test_the_image_starts_the_command_with_settings_that_it_has() -> None:
    instructions = dockerfile()[1]
    environment = dict(pair.split("=", 1) for name, rest in instructions if name == "ENV" for pair in shlex.split(rest))
    config = Path(environment["DOWNLOADVIEW_CONFIG"])
    assert ("COPY", f"--from=build {config.parent} {config.parent}") in instructions
    settings = load_settings(PROJECT / "app" / config.name, environ=environment)
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 8000)
    command: list[str] = yaml.safe_load(dict(instructions)["CMD"])
    assert command[0] in main.commands


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_the_containers_are_closed() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
    assert "ports" not in compose()["services"]["service"]  # only nginx reaches it: who skips it gets orders, no files
    assert [name for name, service in compose()["services"].items() if "ports" in service] == ["nginx"]


def test_compose_names_what_is_here() -> None:
    services = compose()["services"]
    assert (DEPLOY / services["service"]["build"] / "Dockerfile").is_file()
    volumes = compose()["volumes"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source, _, *mode = volume.split(":")
            assert mode == ([] if (name, source) == ("seaweedfs", "objects") else ["ro"])
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in volumes
    # what the service means by app/files is what nginx sees below its prefix
    assert services["service"]["volumes"] == [services["nginx"]["volumes"][1]]
    environment = {name: str(value) for name, value in services["service"]["environment"].items()}
    settings = load_settings(PROJECT / "app" / "downloadview.toml", environ=environment)
    assert settings.offload.backend == "nginx"
    grace = int(services["service"]["stop_grace_period"].removesuffix("s"))
    assert grace > settings.server.drain_seconds + settings.server.timeout_graceful_shutdown


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt install make")
@pytest.mark.parametrize(
    "environ, mirror",
    [
        ({}, "http://127.0.0.1:8000/files/"),
        ({"DOWNLOADVIEW_SERVER__PORT": "9000"}, "http://127.0.0.1:9000/files/"),
        ({"PORT": "9001", "DOWNLOADVIEW_SERVER__PORT": "9000"}, "http://127.0.0.1:9001/files/"),
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"}, "http://127.0.0.1:8080/files/"),
        ({"DOWNLOADVIEW_OFFLOAD": '{"backend": "apache", "rules": []}'}, "http://127.0.0.1:8080/files/"),
        ({"DOWNLOADVIEW_OFFLOAD": "{}"}, "http://127.0.0.1:8000/files/"),
        ({"DOWNLOADVIEW_OFFLOAD": '{"rules": []}'}, "http://127.0.0.1:8000/files/"),
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": ""}, "http://127.0.0.1:8000/files/"),
        ({"DOWNLOADVIEW_OFFLOAD__LIMIT_RATE": "5"}, "http://127.0.0.1:8000/files/"),
        ({"DOWNLOADVIEW_SOURCES__MIRROR__URL": "http://x/"}, "http://x/"),
    ],
)
def test_make_run_lets_the_mirror_ask_who_has_the_bytes(tmp_path: Path, environ: dict[str, str], mirror: str) -> None:
    (tmp_path / "bin").mkdir()
    for name, script in [("python", "exit 0"), ("downloadview", 'echo "$DOWNLOADVIEW_SOURCES__MIRROR__URL"')]:
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    (tmp_path / "run.done").touch()  # as if everything were installed
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOWNLOADVIEW_", "MAKE"))}
    command = ["make", "--no-print-directory", "run", f"VENV={tmp_path}"]
    run = subprocess.run(command, cwd=PROJECT, env=kept | environ, capture_output=True, text=True, check=True)
    assert run.stdout == f"{mirror}\n"


CONFIGS = ["nginx/nginx.conf", "apache/httpd.conf", "lighttpd/lighttpd.conf", "caddy/Caddyfile", "h2o/h2o.conf"]
CONFIGS += ["kubernetes/overlays/nginx/nginx.conf"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt install make")
def test_the_configurations_are_what_the_command_prints_for_the_demo(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "downloadview"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m downloadview_async.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(program)
    (tmp_path / "run.done").touch()  # as if everything were installed
    for name in CONFIGS:
        (tmp_path / name).parent.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOWNLOADVIEW_", "MAKE"))}
    command = ["make", "--silent", "configs", f"VENV={tmp_path}", f"DEPLOY={tmp_path}"]
    subprocess.run(command, cwd=PROJECT, env=kept, check=True)
    for name in CONFIGS:
        assert (tmp_path / name).read_text() == (DEPLOY / name).read_text(), (
            f"deploy/{name} is not what `downloadview config` prints: run `make configs`, and look at the difference"
        )


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=["="])
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "systemd" / "downloadview.service")
    return parser


def environment_of_unit() -> list[str]:
    """Return all variables; the parser keeps only the last of the lines."""
    text = (DEPLOY / "systemd" / "downloadview.service").read_text()
    return [part for line in re.findall("(?m)^Environment=(.*)", text) for part in line.split()]


def test_the_unit_starts_a_command_that_exists() -> None:
    service = unit()["Service"]
    program, command, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).name == "downloadview"
    main.commands[command].make_context(command, arguments)  # fails for an unknown option
    environ = dict(line.split("=", 1) for line in environment_of_unit() if line.startswith("DOWNLOADVIEW_"))
    server = load_settings(None, environ=environ).server
    assert int(service["TimeoutStopSec"]) > server.drain_seconds + server.timeout_graceful_shutdown
    program, command, *arguments = shlex.split(service["ExecReload"])
    assert Path(program).name == "downloadview"
    made = main.commands[command].make_context(command, arguments)
    assert made.params["pid_file"] == server.pid_file
    assert service["RestartPreventExitStatus"] == "2"


@pytest.mark.parametrize(
    "option", ["DynamicUser", "NoNewPrivileges", "PrivateDevices", "PrivateTmp", "ProtectHome", "RestrictNamespaces"]
)
def test_the_unit_is_hardened(option: str) -> None:
    assert unit()["Service"][option] == "yes"
    assert unit()["Service"]["ProtectSystem"] == "strict"
    assert unit()["Service"]["CapabilityBoundingSet"] == ""


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "downloadview.service").read_text()
    copy = tmp_path / "downloadview.service"
    copy.write_text(text.replace("/opt/downloadview/bin/downloadview", shutil.which("true") or "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_requirements_are_pinned_hashed_and_name_no_place() -> None:
    for name in ("run.txt", "dev.txt", "clients.txt", "deploy.txt", "helm.txt"):
        text = (PROJECT / "requirements" / name).read_text()
        assert "://" not in text
        entries = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ").splitlines()
        for entry in entries:
            assert re.match(r"[a-z0-9-]+==\S+", entry), entry
            assert "--hash=sha256:" in entry, entry


def test_the_development_environment_runs_what_is_deployed() -> None:
    def pinned(name: str) -> set[str]:
        return set(re.findall(r"(?m)^[a-z0-9-]+==\S+", (PROJECT / "requirements" / name).read_text()))

    assert pinned("run.txt") <= pinned("dev.txt")


def test_what_the_service_can_be_set_to_is_installed_with_it() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    # the service has no Django, and traces need the exporter that their administrator chooses
    needed = {re.split("[^a-z0-9-]", one)[0] for name in extras.keys() - {"django", "otel"} for one in extras[name]}
    installed = set(re.findall(r"(?m)^([a-z0-9-]+)==", (PROJECT / "requirements" / "run.txt").read_text()))
    assert needed - installed == set()
