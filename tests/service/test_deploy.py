"""What is deployed, as far as it can be checked without a container engine and without being systemd."""

import configparser
import fnmatch
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from downloadview_async.cli import main
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.source_settings import StorageSettings
from tests.proxies.servers import readable_directory
from tests.servers import PROJECT, demo, free_port, serving

DEPLOY = PROJECT / "deploy"


def dockerfile(path: Path = PROJECT / "Dockerfile") -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage."""
    text = path.read_text()
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
    for name, rest in (instruction for stage in dockerfile() for instruction in stage):
        if name != "COPY" or rest.startswith("--from="):
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


def health_check(instructions: list[tuple[str, str]]) -> list[str]:
    command: list[str] = yaml.safe_load(dict(instructions)["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[0] == "bash"  # it is in the base image, and no Python is started
    return command


@pytest.mark.slow
def test_the_health_check_of_the_image_tells_up_from_down(tmp_path: Path) -> None:
    command = health_check(dockerfile()[1])
    with demo(tmp_path / "log") as server:
        environ = {**os.environ, "DOWNLOADVIEW_SERVER__PORT": str(server.address)}
        assert subprocess.run(command, env=environ).returncode == 0
    assert subprocess.run(command, env=environ, capture_output=True).returncode != 0


@pytest.mark.parametrize("status, healthy", [("200 OK", True), ("503 Service Unavailable", False)])
def test_the_health_check_of_the_image_wants_a_200(status: str, healthy: bool) -> None:
    command = health_check(dockerfile()[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                with client.makefile("rb") as request:
                    assert [request.readline(), request.readline()] == [b"GET /-/livez HTTP/1.0\r\n", b"\r\n"]
                client.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        environ = {**os.environ, "DOWNLOADVIEW_SERVER__PORT": str(listener.getsockname()[1])}
        assert (subprocess.run(command, env=environ).returncode == 0) is healthy
        thread.join()


def entrypoint(tmp_path: Path) -> list[str]:
    """Return the command of the image, with a folder of this test in place of /data."""
    instructions = dockerfile()[1]
    (script,) = [
        rest.split()[0] for name, rest in instructions if name == "COPY" and rest.endswith("/usr/local/bin/entrypoint")
    ]
    assert os.access(PROJECT / script, os.X_OK)
    assert yaml.safe_load(dict(instructions)["ENTRYPOINT"]) == ["entrypoint"]
    text = (PROJECT / script).read_text()
    copy = tmp_path / "entrypoint"
    copy.write_text(text.replace("/data", f"{tmp_path}/data"))
    copy.chmod(0o755)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "downloadview"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m downloadview_async.cli "$@"\n')
    program.chmod(0o755)
    return [str(copy)]


def environment_of_image(tmp_path: Path, port: int) -> dict[str, str]:
    environ = {"DOWNLOADVIEW_CONFIG": "/srv/app/downloadview.toml", "DOWNLOADVIEW_SERVER__PORT": str(port)}
    return {**environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}


def test_the_image_lists_a_folder_that_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "film.mp4").write_bytes(b"frames")
    command, port = entrypoint(tmp_path), free_port()
    arguments: list[str] = yaml.safe_load(dict(dockerfile()[1])["CMD"])
    environ = environment_of_image(tmp_path, port)
    with serving([*command, *arguments], port, log=tmp_path / "log", env=environ) as server:
        with urllib.request.urlopen(f"{server.url}/files/", timeout=30) as answer:
            assert b"film.mp4" in answer.read()
        with urllib.request.urlopen(f"{server.url}/files/film.mp4", timeout=30) as answer:
            assert answer.read() == b"frames"
        check = health_check(dockerfile()[1])
        assert subprocess.run(check, env={**os.environ, **environ}).returncode == 0
    assert "open http://127.0.0.1:8000/files/" in server.log


@pytest.mark.parametrize(
    "arguments, environ, started",
    [
        (["serve"], {}, "serve {data}"),
        (["serve", "--share", "2h", "{data}"], {}, "serve --share 2h {data}"),
        (["serve"], {"DOWNLOADVIEW_CONFIG": "/etc/downloads.toml"}, "serve"),
        (["sign", "/files/a"], {}, "sign /files/a"),
    ],
)
def test_what_the_image_runs(tmp_path: Path, arguments: list[str], environ: dict[str, str], started: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    command = entrypoint(tmp_path)
    (tmp_path / "bin" / "downloadview").write_text('#!/bin/sh\necho "$*"\n')
    given = [argument.format(data=data) for argument in arguments]
    run = subprocess.run(
        [*command, *given], env=environment_of_image(tmp_path, 1) | environ, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{started.format(data=data)}\n"


def test_the_image_without_a_folder_says_how_to_mount_one(tmp_path: Path) -> None:
    command = entrypoint(tmp_path)
    (tmp_path / "bin" / "downloadview").write_text('#!/bin/sh\necho "$*"\n')
    run = subprocess.run(
        [*command, "serve"], env=environment_of_image(tmp_path, 1), capture_output=True, text=True, check=True
    )
    assert run.stdout == "serve\n"
    assert "serving a demo" in run.stderr
    assert "-v /path/of/the/folder:" in run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a command as the user of the image")
def test_the_image_says_which_user_may_not_read_the_folder() -> None:
    with readable_directory() as directory:
        (directory / "data").mkdir(mode=0o700)
        command = entrypoint(directory)
        user = int(dict(dockerfile()[1])["USER"].partition(":")[0])
        run = subprocess.run(
            [*command, "serve"], env=environment_of_image(directory, 1), user=user, group=user, capture_output=True
        )
    assert run.returncode == 2
    assert b"user 10001 may not read" in run.stderr


APP = """
from starlette.applications import Starlette
from starlette.routing import Route
from downloadview_async import Download, PathSource

app = Starlette(routes=[Route("/invoices/{path:path}", Download(PathSource("invoices")))])
"""


def test_the_image_for_an_application_runs_one(tmp_path: Path) -> None:
    build, final = dockerfile(DEPLOY / "docker" / "app.Dockerfile")
    assert any(name == "RUN" and "pip install" in rest for name, rest in build)
    assert not any(name == "RUN" for name, _ in final)
    assert dict(final)["USER"] == dict(dockerfile()[1])["USER"]
    assert dict(final)["FROM"] == dict(dockerfile()[1])["FROM"]
    (tmp_path / "main.py").write_text(APP)
    (tmp_path / "invoices").mkdir()
    (tmp_path / "invoices" / "a.pdf").write_bytes(b"%PDF-1.7")
    port = free_port()
    command = [sys.executable, "-m", *yaml.safe_load(dict(final)["CMD"])]
    command[command.index("8000")] = str(port)
    script = shlex.join(["cd", str(tmp_path)]) + " && exec " + shlex.join(command)
    with serving(["sh", "-c", script], port, log=tmp_path / "log", env={"PYTHONPATH": str(PROJECT)}) as server:
        with urllib.request.urlopen(f"{server.url}/invoices/a.pdf", timeout=30) as answer:
            assert answer.read() == b"%PDF-1.7"
        check = [part.replace("/8000", f"/{port}") for part in health_check(final)]
        assert subprocess.run(check).returncode == 0
    assert subprocess.run(check, capture_output=True).returncode != 0


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


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)
def test_systemd_finds_nothing_wrong_with_the_credentials(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "downloadview.service").read_text()
    copy = tmp_path / "downloadview.service"
    copy.write_text(text.replace("/opt/downloadview/bin/downloadview", shutil.which("true") or "/bin/true"))
    (tmp_path / "downloadview.service.d").mkdir()
    added = tmp_path / "downloadview.service.d" / "credentials.conf"
    added.write_text((DEPLOY / "systemd" / "credentials.conf").read_text())
    checked = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    added.write_text(added.read_text().replace("LoadCredential=users", "LoadCredentials=users"))
    checked = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert "LoadCredentials" in checked.stderr  # it does look at this file


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)
def test_systemd_finds_nothing_wrong_with_the_directories_to_write(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "downloadview.service").read_text()
    copy = tmp_path / "downloadview.service"
    copy.write_text(text.replace("/opt/downloadview/bin/downloadview", shutil.which("true") or "/bin/true"))
    added = tmp_path / "downloadview.service.d" / "writing.conf"
    added.parent.mkdir()
    added.write_text((DEPLOY / "systemd" / "writing.conf").read_text())
    checked = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_credentials_are_settings(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "credentials.conf").read_text()
    secrets = dict(re.findall(r"(?m)^LoadCredential=([^:]+):(.*)$", text))
    assert all(path.startswith("/etc/downloadview/secrets/") for path in secrets.values())
    (tmp_path / "credentials").mkdir()
    for name in secrets:
        value = "a" * 32
        (tmp_path / "credentials" / name).write_text(f"k1 {value}\n" if name.endswith("KEYS") else f"{value}\n")
    config = tmp_path / "downloadview.toml"
    config.write_text(
        '[sources.bucket]\ntype = "storage"\nurl = "s3://bucket"\n'
        '[sources.bucket.options]\naccess_key_id = "k"\nregion = "r"\n'
        '[[routes]]\npath = "/{path:path}"\nsource = "bucket"\n'
    )
    environ = dict(re.findall(r"(?m)^Environment=([^=]+)=(.*)$", text))
    environ = {name: value.replace("%d", f"{tmp_path}/credentials") for name, value in environ.items()}
    settings = load_settings(config, environ={"CREDENTIALS_DIRECTORY": f"{tmp_path}/credentials", **environ})
    assert settings.links is not None
    assert settings.links.keys == f"k1 {'a' * 32}"
    assert settings.users is not None
    assert settings.users.file == f"{tmp_path}/credentials/users"
    bucket = settings.sources["bucket"]
    assert isinstance(bucket, StorageSettings)
    assert bucket.options["secret_access_key"] == "a" * 32


def quadlet() -> dict[str, list[tuple[str, str]]]:
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in (DEPLOY / "podman" / "downloadview.container").read_text().splitlines():
        if line.startswith("["):
            sections[line.strip("[]")] = keys = []
        elif line and not line.startswith(("#", ";")):
            key, equals, value = line.partition("=")
            assert equals, line
            keys.append((key, value))
    return sections


# podman-systemd.unit(5), `[Container]`
QUADLET = re.findall(
    r"\w+",
    """
    AddCapability AddDevice AddHost Annotation AutoUpdate CgroupsMode ContainerName ContainersConfModule DNS DNSOption
    DNSSearch DropCapability Entrypoint Environment EnvironmentFile EnvironmentHost Exec ExposeHostPort GIDMap
    GlobalArgs Group GroupAdd HealthCmd HealthInterval HealthLogDestination HealthMaxLogCount HealthMaxLogSize
    HealthOnFailure HealthRetries HealthStartPeriod HealthStartupCmd HealthStartupInterval HealthStartupRetries
    HealthStartupSuccess HealthStartupTimeout HealthTimeout HostName Image IP IP6 Label LogDriver LogOpt Mask Memory
    Mount Network NetworkAlias NoNewPrivileges Notify PidsLimit Pod PodmanArgs PublishPort Pull ReadOnly ReadOnlyTmpfs
    ReloadCmd ReloadSignal Retry RetryDelay Rootfs RunInit SeccompProfile Secret SecurityLabelDisable
    SecurityLabelFileType SecurityLabelLevel SecurityLabelNested SecurityLabelType ShmSize StartWithPod StopSignal
    StopTimeout SubGIDMap SubUIDMap Sysctl Timezone Tmpfs UIDMap Ulimit Unmask User UserNS Volume WorkingDir
    """,
)


def test_the_quadlet_has_keys_that_podman_knows() -> None:
    sections = quadlet()
    assert list(sections) == ["Unit", "Container", "Service", "Install"]
    keys = [key for key, _ in sections["Container"]]
    assert set(keys) <= set(QUADLET)
    assert {key for key in keys if keys.count(key) > 1} <= {"Environment", "Volume", "Secret", "PublishPort"}
    container = dict(sections["Container"])
    assert container["ReadOnly"] == container["NoNewPrivileges"] == "true"
    assert container["DropCapability"] == "all"
    assert container["PublishPort"].startswith("127.0.0.1:")
    assert container["Volume"].endswith(":/data:ro")


def test_the_quadlet_waits_for_the_service() -> None:
    sections = quadlet()
    variables = (value for key, value in sections["Container"] if key == "Environment")
    environ = dict(value.split("=", 1) for value in variables if value.startswith("DOWNLOADVIEW_"))
    server = load_settings(None, environ=environ).server
    grace = int(dict(sections["Container"])["StopTimeout"])
    assert grace > server.drain_seconds + server.timeout_graceful_shutdown
    assert int(dict(sections["Service"])["TimeoutStopSec"]) > grace
    assert dict(sections["Service"])["RestartPreventExitStatus"] == "2"


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)
def test_systemd_finds_nothing_wrong_with_the_other_sections_of_the_quadlet(tmp_path: Path) -> None:
    lines = [f"ExecStart={shutil.which('true') or '/bin/true'}"]
    text = ""
    for name, keys in quadlet().items():
        if name != "Container":
            own = [f"{key}={value}" for key, value in keys]
            text += "\n".join([f"[{name}]", *own, *(lines if name == "Service" else []), ""])
    copy = tmp_path / "quadlet.service"
    copy.write_text(text)
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
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
