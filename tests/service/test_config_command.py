"""`downloadview config`: what it prints fits the service that `downloadview serve` starts from the same settings."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from downloadview_async.cli import main
from downloadview_async.http.fields import OFFLOAD_HEADERS
from tests.live import Answer, ask, parse
from tests.proxies.conftest import HOSTILE_NAMES, PRIVATE_PAGES, content_of
from tests.proxies.servers import EACH_KIND, KINDS, proxy, readable_directory
from tests.servers import free_port, serving

COMMAND = [sys.executable, "-m", "downloadview_async.cli"]
BY_URI = ("nginx", "caddy", "h2o")
SETTINGS = """
[server]
{server}
[sources.files]
type = "path"
root = "my files"

[sources.reports]
type = "virtual"
factory = "kept_reports:make"

[sources.reports.cache]
path = "cache"

[[routes]]
path = "/files/{{path:path}}"
source = "files"
cache_control = "private"

[[routes]]
path = "/reports/{{name}}"
source = "reports"

[offload]
backend = "{backend}"

[[offload.rules]]
source = "my files"
{files}
[[offload.rules]]
source = "cache"
{cache}
"""


def write_settings(directory: Path, backend: str, server: str = "") -> Path:
    """Write settings with two rules, and what they are about."""
    files, cache = ('target = "/_files/"', 'target = "/_cache/"') if backend in BY_URI else ("", "")
    (directory / "my files").mkdir()
    (directory / "my files" / "ten digits.txt").write_text("0123456789")
    (directory / "kept_reports.py").write_text('def make(name):\n    return f"a report on {name}" * 100\n')
    file = directory / "downloadview.toml"
    file.write_text(SETTINGS.format(server=server, backend=backend, files=files, cache=cache))
    return file


def printed(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, status: int = 0) -> str:
    """Run the command, and return what it prints; of a refusal, what it says on standard error."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOWNLOADVIEW_")}
    command = [*COMMAND, "config", *map(str, arguments)]
    run = subprocess.run(command, cwd=cwd, env=environ | dict(env or {}), capture_output=True, timeout=30)
    assert run.returncode == status, run.stderr
    assert b"Traceback" not in run.stderr
    return (run.stderr if status else run.stdout).decode()


async def ask_socket(path: Path, target: str) -> Answer:
    """Send one request over a Unix socket, and read the whole answer."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
    answer = parse(await reader.read())
    writer.close()
    return answer


@dataclass(frozen=True)
class Pair:
    kind: str
    port: int
    socket: Path

    def get(self, path: str, **headers: str) -> Answer:
        """Ask the proxy."""
        return asyncio.run(ask(self.port, path, headers=headers))


@pytest.fixture(scope="module", params=EACH_KIND)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The service on a Unix socket, below a prefix, and the proxy with the configuration that was printed for it."""
    kind: str = request.param
    with readable_directory() as directory:
        (directory / "run").mkdir()
        (directory / "run").chmod(0o777)
        socket = directory / "run" / "service.sock"
        server = f'uds = "{socket}"\nroot_path = "/down.loads"\nforwarded_allow_ips = "*"'
        config = write_settings(directory, kind, server)
        for name in HOSTILE_NAMES:
            file = directory / "my files" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content_of(name))
        port = free_port()
        with serving([*COMMAND, "serve", "--config", str(config)], str(socket), log=directory / "log"):
            socket.chmod(0o666)
            text = printed(kind, "--config", config, "--listen", f"127.0.0.1:{port}", cwd=directory)
            with proxy(KINDS[kind], directory, 0, port=port, text=lambda *_: text):
                yield Pair(kind, port, socket)


BY_NAME = '[[offload.rules]]\nsource = "files"\n[[offload.rules]]\nsource = "reports"\n'


@pytest.mark.parametrize("rules", [pytest.param("", id="no rule"), pytest.param(BY_NAME, id="by name")])
@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_proxy_sends_the_files_of_each_local_source(kind: str, rules: str) -> None:
    with readable_directory() as directory:
        port, own = free_port(), free_port()
        config = write_settings(directory, kind, f"port = {own}")
        head = config.read_text().partition("[[offload.rules]]")[0]
        config.write_text(head + rules)
        with serving([*COMMAND, "serve", "--config", str(config)], own, log=directory / "log"):
            text = printed(kind, "--config", config, "--listen", f"127.0.0.1:{port}", cwd=directory)
            with proxy(KINDS[kind], directory, 0, port=port, text=lambda *_: text):
                while (direct := asyncio.run(ask(own, "/reports/a.txt"))).body:
                    pass  # it is in the cache a moment after it was sent
                assert OFFLOAD_HEADERS & {*direct.headers}
                assert OFFLOAD_HEADERS & {*asyncio.run(ask(own, "/files/ten%20digits.txt")).headers}
                assert asyncio.run(ask(port, "/reports/a.txt")).body == b"a report on a.txt" * 100
                assert asyncio.run(ask(port, "/files/ten%20digits.txt")).body == b"0123456789"


def test_the_files_of_every_rule_are_sent_by_the_proxy(pair: Pair) -> None:
    answer = pair.get(f"/down.loads/files/{quote('ten digits.txt')}")
    assert (answer.status, answer.body) == (200, b"0123456789")
    assert answer.headers["content-disposition"] == 'attachment; filename="ten digits.txt"'
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["x-content-type-options"] == "nosniff"
    part = pair.get(f"/down.loads/files/{quote('ten digits.txt')}", Range="bytes=3-5")
    assert (part.status, part.body) == (206, b"345")
    report = pair.get("/down.loads/reports/sales.txt")  # which is made, and kept
    assert (report.status, report.body) == (200, b"a report on sales.txt" * 100)
    for path in ("/files/ten%20digits.txt", "/reports/sales.txt"):
        direct = asyncio.run(ask_socket(pair.socket, path))
        while path.startswith("/reports") and direct.body:  # it is complete a moment after it was sent
            direct = asyncio.run(ask_socket(pair.socket, path))
        assert (direct.status, direct.body) == (200, b"")
        assert OFFLOAD_HEADERS & {*direct.headers}
    report = pair.get("/down.loads/reports/sales.txt")
    assert (report.status, report.body) == (200, b"a report on sales.txt" * 100)
    assert not OFFLOAD_HEADERS & {*answer.headers, *report.headers, *part.headers}


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_any_name_comes_through_below_the_prefix(pair: Pair, name: str) -> None:
    answer = pair.get(f"/down.loads/files/{quote(name)}")
    assert (answer.status, answer.body) == (200, content_of(name))


@pytest.mark.parametrize(
    "path",
    [
        f"/files/{quote('ten digits.txt')}",
        f"/down.loadsx/files/{quote('ten digits.txt')}",
        f"/down-loads/files/{quote('ten digits.txt')}",
        f"/{quote('ten digits.txt')}",
        f"/_files/{quote('ten digits.txt')}",
        f"/down.loads/_files/{quote('ten digits.txt')}",
        "/down.loads/files/..%2Fdownloadview.toml",
        "/down.loads/files/../../downloadview.toml",
        "/downloadview.toml",
        "/down.loads/",
        "/down.loads",
        "/",
    ],
)
def test_nothing_else_is_there(pair: Pair, path: str) -> None:
    answer = pair.get(path)
    if path == "/down.loads/":
        assert (answer.status, b"/files/{path:path}" in answer.body) == (200, True)
    else:
        assert answer.status in (400, 403, 404)
        assert b"0123456789" not in answer.body


@pytest.mark.parametrize("path", PRIVATE_PAGES)
def test_the_service_own_pages_are_closed_below_the_prefix(pair: Pair, path: str) -> None:
    answer = pair.get(f"/down.loads{path}")
    assert answer.status in (400, 403 if pair.kind == "lighttpd" else 404)
    assert b"ready" not in answer.body
    assert pair.get(path).status in (400, 403, 404)


def test_whether_the_service_lives_is_no_secret(pair: Pair) -> None:
    assert (pair.get("/down.loads/-/livez").status, pair.get("/down.loads/-/livez?a").body) == (200, b"alive\n")


def run(directory: Path, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command here, with the settings in a directory; return its status and what it says."""
    environ = {"DOWNLOADVIEW_CONFIG": str(directory / "downloadview.toml"), **(env or {})}
    result = CliRunner(env=environ).invoke(main, ["config", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "server, arguments, expected",
    [
        ("", [], "server 127.0.0.1:8000;"),
        ('host = "0.0.0.0"\nport = 9000', [], "server 127.0.0.1:9000;"),
        ('host = "::"', [], "server [::1]:8000;"),
        ('host = "files.internal"', [], "server files.internal:8000;"),
        ('uds = "service.sock"', [], "server unix:{directory}/service.sock;"),
        ("port = 0", ["--service", "service:8000"], "server service:8000;"),
        ("fd = 3", ["--service", "unix:/run/service.sock"], "server unix:/run/service.sock;"),
        ("", ["--listen", "[::]:80"], "listen [::]:80;"),
        ("timeout_keep_alive = 75", [], "keepalive_timeout 74s; "),
        ("stall_timeout = 10.5", [], "send_timeout 11s; "),
        ('root_path = "/downloads"', [], '"~^/downloads(?<'),
        ("", [], 'alias "{directory}/my files/";'),
        ("", [], "alias {directory}/cache/;"),
        ("", ["--relative-to", "{directory}"], 'alias "my files/";'),
        ("", ["--relative-to", "{directory}/cache"], "alias ./;"),
        ("", ["--relative-to", "{directory}/cache"], 'alias "{directory}/my files/";'),
    ],
)
def test_what_the_settings_say_is_in_it(tmp_path: Path, server: str, arguments: list[str], expected: str) -> None:
    write_settings(tmp_path, "nginx", server)
    status, text, said = run(tmp_path, "nginx", *(part.format(directory=tmp_path) for part in arguments))
    assert (status, said) == (0, "")
    assert expected.replace("{directory}", str(tmp_path)) in text


@pytest.mark.parametrize(
    "server, arguments, env, message",
    [
        ("", ["apache"], {}, "offload.backend: apache does not understand the headers for 'nginx': set it to 'apache'"),
        ("", ["nginx"], {"DOWNLOADVIEW_OFFLOAD": "{}"}, "offload.backend: not set, so the service sends all files"),
        (
            "",
            ["nginx"],
            {"DOWNLOADVIEW_OFFLOAD": '{"backend": "nginx"}', "DOWNLOADVIEW_SOURCES": "{}", "DOWNLOADVIEW_ROUTES": "[]"},
            "no source is local, so the proxy sends nothing: add",
        ),
        ("", ["nginx"], {"DOWNLOADVIEW_OFFLOAD__BACKEND": "iis"}, "offload.backend: "),
        ("", ["nginx"], {"DOWNLOADVIEW_SOURCES__FILES__TYPE": "x"}, "sources.files.type: unknown type 'x'"),
        ("port = 0", ["nginx"], {}, "server.port: the port must not change at each start"),
        ("fd = 3", ["nginx"], {}, "server.fd: a proxy needs an address: give it with --service"),
        ('ssl_certfile = "c.pem"', ["nginx"], {}, "server.ssl_certfile: the proxy speaks plain HTTP to the service"),
        ("timeout_keep_alive = 0", ["nginx"], {}, "server.timeout_keep_alive: the application keeps an idle"),
        ('root_path = "/a;b"', ["nginx"], {}, "server.root_path: '/a;b' is not a prefix"),
        ('uds = "a socket"', ["nginx"], {}, "a socket': write a Unix socket as"),
        ('host = "a b"', ["nginx"], {}, "server.host: service: 'a b:8000' is not an address"),
        (
            "",
            ["nginx"],
            {"DOWNLOADVIEW_OFFLOAD": '{"backend": "nginx", "rules": [{"source": "my files", "target": "/x"}]}'},
            "DOWNLOADVIEW_OFFLOAD: offload.rules: the target '/x' is not an internal location",
        ),
        ("", ["nginx", "--listen", "80"], {}, "listen: '80' is not an address"),
        ("", ["nginx", "--service", "http://service"], {}, "service: 'http://service' is not an address"),
        (
            "",
            ["nginx"],
            {"DOWNLOADVIEW_OFFLOAD": '{"backend": "nginx", "rules": [{"source": "my files", "target": "/files/"}]}'},
            "routes[0].path: '/files/{path:path}' is below '/files/', the target of a rule, which clients cannot reach",
        ),
        ("", ["iis"], {}, "'iis' is not one of 'nginx', 'haproxy', 'envoy', 'apache'"),
    ],
)
def test_refusals(tmp_path: Path, server: str, arguments: list[str], env: dict[str, str], message: str) -> None:
    write_settings(tmp_path, "nginx", server)
    status, text, said = run(tmp_path, *arguments, env=env)
    assert (status, text) == (2, "")
    assert message in said
    assert "iis" in arguments or said.count("\n") == 1


def test_a_route_may_have_the_name_of_a_target_that_clients_cannot_see(tmp_path: Path) -> None:
    """For Caddy, which looks for targets in the service's answers alone."""
    write_settings(tmp_path, "caddy")
    offload = '{"backend": "caddy", "rules": [{"source": "my files", "target": "/files/"}]}'
    status, text, _ = run(tmp_path, "caddy", env={"DOWNLOADVIEW_OFFLOAD": offload})
    assert (status, "handle_path /files/*" in text) == (0, True)


def test_without_settings_there_is_nothing_to_print(tmp_path: Path) -> None:
    said = printed("nginx", cwd=tmp_path, status=2)
    assert "give settings with --config" in said
    assert said.count("\n") == 1


def test_the_caddyfile_passes_no_header_on_that_is_meant_for_nginx(tmp_path: Path) -> None:
    """An application may send them, such as Django's X-Accel-Charset, although Caddy obeys one of them alone."""
    write_settings(tmp_path, "caddy")
    offload = '{"backend": "caddy", "rules": [{"source": "my files", "target": "/files/"}]}'
    status, text, _ = run(tmp_path, "caddy", env={"DOWNLOADVIEW_OFFLOAD": offload})
    assert status == 0
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("exclude ")]
    assert lines
    for line in lines:
        excluded = {word.lower() for word in line[1:]}
        assert {name for name in OFFLOAD_HEADERS if name.startswith("x-accel-")} <= excluded
