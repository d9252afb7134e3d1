"""The transports over which every client is tried: one set of servers for all of them."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.clients.running import TRANSPORTS, Transport
from tests.proxies.servers import KINDS, proxy, readable_directory
from tests.servers import free_port, serving

SETTINGS = """
[sources.files]
type = "path"
root = "files"
[sources.remote]
type = "remote"
url = "http://127.0.0.1:{upstream}/"
allow_hosts = ["127.0.0.1"]
[sources.cached]
type = "remote"
url = "http://127.0.0.1:{upstream}/"
allow_hosts = ["127.0.0.1"]
[sources.cached.cache]
path = "cache"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
[[routes]]
path = "/remote/{{path:path}}"
source = "remote"
[[routes]]
path = "/cached/{{path:path}}"
source = "cached"
[[offload.rules]]
source = "files"
target = "/_files/"
"""
UPSTREAM = """
daemon off;
error_log stderr;
pid {run}/upstream.pid;
events {{}}
http {{
    client_body_temp_path {run}/upstream-body;
    proxy_temp_path {run}/upstream-proxy;
    fastcgi_temp_path {run}/upstream-fastcgi;
    uwsgi_temp_path {run}/upstream-uwsgi;
    scgi_temp_path {run}/upstream-scgi;
    access_log off;
    server {{
        listen {listen};
        root {files};
    }}
}}
"""
_SERVE = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config"]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority, `ca.pem`, beside a certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("TLS: openssl is not installed")
    directory = tmp_path_factory.mktemp("authority")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=a test's authority", "-addext", "keyUsage=critical,keyCertSign"]
    leaf = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-CA", "ca.pem"]
    leaf += ["-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    for arguments, name in ((subject, "ca"), (leaf, "server")):
        subprocess.run(
            [*made, *arguments, "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=directory,
            check=True,
            capture_output=True,
        )
    return directory / "ca.pem"


@contextmanager
def _transports(authority: Path) -> Iterator[dict[str, Transport]]:
    with readable_directory() as site, ExitStack() as stack:
        files = site / "files"
        files.mkdir()
        logs = {name: site / f"{name}.log" for name in ("plain", "tls", "behind", "nginx", "upstream")}
        upstream = free_port()
        config = site / "upstream.conf"
        config.write_text(UPSTREAM.format(listen=f"127.0.0.1:{upstream}", files=files, run=site))
        stack.enter_context(serving(KINDS["nginx"].command(site, config), upstream, log=logs["upstream"], cwd=site))
        settings = site / "downloadview.toml"
        settings.write_text(SETTINGS.format(upstream=upstream))

        def service(log: str, *options: str, **env: str) -> int:
            port = free_port()
            command = [*_SERVE, str(settings), "--port", str(port), *options]
            stack.enter_context(serving(command, port, log=logs[log], env=env, cwd=site))
            return port

        plain = service("plain")
        tls = ["--ssl-certfile", str(authority.with_name("server.pem"))]
        tls += ["--ssl-keyfile", str(authority.with_name("server.key"))]
        encrypted = service("tls", *tls)
        offloading = {"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"}
        behind = service("behind", **offloading)

        def configuration(where: str, listen: str) -> str:
            command = [sys.executable, "-m", "downloadview_async.cli", "config", "nginx", "--config", str(settings)]
            run = subprocess.run(
                [*command, "--service", where, "--listen", listen],
                env={**os.environ, **offloading},
                check=True,
                capture_output=True,
                encoding="utf-8",
            )
            return run.stdout

        front = stack.enter_context(
            proxy(KINDS["nginx"], site, behind, text=configuration, log=logs["nginx"], port=free_port())
        )
        yield {
            "direct": Transport("http", plain, "files", files, logs["plain"]),
            "remote": Transport("http", plain, "remote", files, logs["plain"]),
            "cached": Transport("http", plain, "cached", files, logs["plain"]),
            "TLS": Transport("https", encrypted, "files", files, logs["tls"], authority),
            "nginx": Transport("http", front, "files", files, logs["nginx"]),
        }


@pytest.fixture(scope="session")
def transports(authority: Path) -> Iterator[dict[str, Transport]]:
    """Every transport, by its name."""
    with _transports(authority) as running:
        yield running


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, transports: dict[str, Transport]) -> Transport:
    """Each transport, with a directory that no other test has asked for."""
    return transports[request.param].below(uuid.uuid4().hex)
