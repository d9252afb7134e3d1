"""`proxy_config` on the real proxies: what it prints is taken, and obeyed for any directory, or refused by itself."""

import asyncio
import json
import re
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.http.fields import OFFLOAD_HEADERS
from tests.live import ask, live
from tests.proxies.servers import DEPLOY, KINDS, proxy, readable_directory

PROXIES = [name for name, kind in dv.proxy_kinds().items() if kind.configuration is not None]

ODD = [
    "plain",
    "a blank",
    "a blank at the end ",
    'a "quotation"',
    "an apostrophe's",
    "back`tick",
    "back\\slash",
    "\\n",
    "the end\\",
    'a backslash\\"',
    "back`tick and back\\slash",
    "semi;colon",
    "#hash",
    "50%",
    "%{HOST}",
    "π and é",
    "{brace}",
    "}{",
    "$dollar",
    "${PWD}",
    "{$HOME}",
    "<<rules>>",
    "(a), [b] & *",
    "~",
    "!not",
    "...",
]
REFUSED = {
    "nginx": ["$dollar", "${PWD}", "{$HOME}"],
    "apache": ["${PWD}"],
    "lighttpd": [],
    "caddy": ["%{HOST}", "{brace}", "}{", "${PWD}", "{$HOME}", "back`tick and back\\slash"],
    "h2o": [],
}
"""What a proxy's grammar cannot express."""


def rules_for(kind: str, directories: list[Path]) -> list[dv.Rule]:
    """Return a rule for each directory."""
    return [
        dv.Rule(str(directory), f"/_{index}/" if dv.proxy_kinds()[kind].targets == "uri" else str(directory))
        for index, directory in enumerate(directories)
    ]


async def _scheme(request: Request) -> Response:
    return PlainTextResponse(request.headers["x-forwarded-proto"])


async def _headers(request: Request) -> Response:
    return JSONResponse(request.headers.items())


def _body_of(url: str, trusting: ssl.SSLContext) -> bytes:
    with urllib.request.urlopen(url, context=trusting, timeout=10) as answer:
        body: bytes = answer.read()
        return body


@asynccontextmanager
async def served(kind: str, directories: list[Path]) -> AsyncIterator[int]:
    """Serve each directory below its number, for a proxy; give the port of the service."""
    routes = [
        Route(f"/{index}/{{path:path}}", dv.Download(dv.PathSource(directory), cache_control="private"))
        for index, directory in enumerate(directories)
    ]
    app = Starlette(routes=[*routes, Route("/scheme", _scheme), Route("/headers", _headers)])
    async with live(
        dv.OffloadMiddleware(app, dv.proxy_kinds()[kind].make_backend(rules_for(kind, directories)))
    ) as service:
        yield service


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "nginx" else pytest.mark.slow) for kind in PROXIES]
)
@pytest.mark.parametrize("relative", [False, True])
async def test_every_directory_is_sent_from_or_refused(kind: str, relative: bool) -> None:
    with readable_directory() as root:
        directories = []
        for name in ODD:
            (root / name).mkdir()
            (root / name / "50% of π.txt").write_text(f"from {name}")
            relative_to = str(root) if relative else None
            if name in REFUSED[kind]:
                with pytest.raises(dv.ConfigurationError, match=" cannot have "):
                    dv.proxy_config(kind, rules_for(kind, [root / name]), relative_to=relative_to)
            else:
                directories.append(root / name)

        def text(service: str, listen: str) -> str:
            # H2O ends when the connections to itself have
            options: Any = {"relative_to": relative_to, "idle_seconds": 2}
            made = dv.proxy_config(kind, rules_for(kind, directories), service=service, listen=listen, **options)
            assert (str(root) in made) is not relative
            return made

        async with served(kind, directories) as service:
            with proxy(KINDS[kind], root, service, text=text) as port:
                for index, directory in enumerate(directories):
                    path, content = f"/{index}/{quote('50% of π.txt')}", f"from {directory.name}".encode()
                    direct = await ask(service, path)
                    assert OFFLOAD_HEADERS & {*direct.headers}, directory.name
                    answer = await ask(port, path)
                    assert (answer.status, answer.body) == (200, content), directory.name
                    assert answer.headers["cache-control"] == "private"
                    assert answer.headers["content-disposition"] == direct.headers["content-disposition"]
                    assert (await ask(port, f"/_{index}/{quote('50% of π.txt')}")).status == 404
                    if index > 1:
                        continue  # the first rule, and what is written for each further one
                    head = await ask(port, path, method="HEAD")
                    assert (head.status, head.headers["content-length"]) == (200, str(len(content)))
                    part = await ask(port, path, headers={"Range": "bytes=5-"})
                    assert (part.status, part.body) == (206, content[5:])
                    another = await ask(port, path, headers={"Range": "bytes=5-", "If-Range": '"another"'})
                    assert (another.status, another.body) == (200, content)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", PROXIES)
async def test_the_directory_itself_may_be_where_the_proxy_starts(kind: str) -> None:
    with readable_directory() as root:
        (root / "a.txt").write_text("a")

        def text(service: str, listen: str) -> str:
            rules = rules_for(kind, [root])
            made = dv.proxy_config(kind, rules, service=service, listen=listen, relative_to=f"{root}/")
            assert str(root) not in made
            return made

        async with served(kind, [root]) as service:
            with proxy(KINDS[kind], root, service, text=text) as port:
                assert (await ask(port, "/0/a.txt")).body == b"a"


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", PROXIES)
async def test_headers_that_clients_must_not_send_are_removed(kind: str) -> None:
    with readable_directory() as root:
        (root / "files").mkdir()

        def text(service: str, listen: str) -> str:
            options: Any = {"idle_seconds": 2, "unset": ["X-Remote-User", "X-Role"]}
            return dv.proxy_config(kind, rules_for(kind, [root / "files"]), service=service, listen=listen, **options)

        async with served(kind, [root / "files"]) as service:
            with proxy(KINDS[kind], root, service, text=text) as port:
                sent = {"X-Remote-User": "eve", "x-remote-user": "eve", "X-Role": "admin", "X-Other": "kept"}
                received = json.loads((await ask(port, "/headers", headers=sent)).body)
    values = {name: value for name, value in received if name in ("x-remote-user", "x-role", "x-other") and value}
    assert values == {"x-other": "kept"}


@pytest.mark.parametrize("kind", PROXIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unset": ["X-Remote-User"], "private": "/-/", "prefix": "/a"},
        {"service": "unix:/run/downloadview.sock"},
        {"service": "localhost:9000", "listen": "0.0.0.0:8443"},
        {"service": "[::1]:9000", "listen": "[::1]:8443"},
        {"prefix": "/a.b/~c_d"},
        {"private": "/-/", "public": ["livez", "health.txt"]},
        {"private": "/a.b/c/", "prefix": "/a.b/~c_d"},
        {"idle_seconds": 2, "stall_seconds": 0.5, "max_body_bytes": 1000},
        {"headers": ["X-Robots-Tag", "Vary", "Access-Control-Allow-Origin", f"X-{'a' * 62}"]},
    ],
)
def test_the_proxy_itself_finds_nothing_wrong(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    rules = rules_for(kind, [tmp_path, tmp_path / "another one", DEPLOY])
    if kind in ("nginx", "caddy"):
        rules += [dv.Rule("http://127.0.0.1:9001/pub", "/_plain/"), dv.Rule("https://127.0.0.1/a;b/", "/_secure/")]
    config = tmp_path / Path(KINDS[kind].config).name
    config.write_text(KINDS[kind].moved(dv.proxy_config(kind, rules, **options), tmp_path))
    command = KINDS[kind].check(KINDS[kind].command(tmp_path, config))
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr


FILES = [dv.Rule("/srv/files", "/_files/")]


@pytest.mark.parametrize(
    "kind, rules, options, message",
    [
        ("iis", FILES, {}, "no configuration for 'iis': use one of nginx, apache"),
        ("nginx", [], {}, "at least one rule"),
        ("nginx", [dv.Rule("/srv/files", "/_files")], {}, "slash at both ends"),
        ("nginx", [dv.Rule("/srv/a\nb", "/_files/")], {}, "printable characters"),
        ("h2o", [dv.Rule("/srv/\udce9", "/_files/")], {}, "printable characters"),
        ("nginx", [*FILES, dv.Rule("/srv/more", "/_files/")], {}, "equal to or below '/_files/'"),
        ("nginx", [*FILES, dv.Rule("/srv/more", "/_files/more/")], {}, "more/' is equal to or below '/_files/'"),
        ("caddy", [*FILES, dv.Rule("/srv/more", "/_FILES/")], {}, "Caddy ignores case"),
        ("caddy", [*FILES, dv.Rule("/srv/more", "/_FILES/more/")], {}, "Caddy ignores case"),
        ("h2o", [dv.Rule("/srv/files", "/_whole/a/")], {}, "H2O's configuration needs the target '/_whole/a/' itself"),
        ("h2o", [*FILES, dv.Rule("https://files.example.org/", "/_a/")], {}, "Keep these files in a cache"),
        ("h2o", [dv.Rule("s3://bucket/", "/_a/")], {}, "Keep these files in a cache"),
        ("nginx", [dv.Rule("https://files.example.org;/", "/_files/")], {}, "is not an address"),
        ("caddy", [dv.Rule("https://me:pw@files.example.org/", "/_files/")], {}, "is not an address"),
        ("nginx", [dv.Rule("s3://bucket/", "/_files/")], {}, "no storage is at 's3://bucket/'"),
        ("lighttpd", [dv.Rule("https://files.example.org/", "/srv")], {}, "sends local files"),
        ("apache", [dv.Rule("https://files.example.org/", "/srv")], {}, "sends local files"),
        ("apache", FILES[:0], {}, "at least one rule"),
        ("nginx", FILES, {"service": "8000"}, "service: '8000' is not an address"),
        ("nginx", FILES, {"service": "127.0.0.1:0"}, "is not an address"),
        ("nginx", FILES, {"service": "http://127.0.0.1:8000"}, "is not an address"),
        ("nginx", FILES, {"service": "unix:/run/a b"}, "write a Unix socket as"),
        ("nginx", FILES, {"service": "/run/service.sock"}, "write a Unix socket as"),
        ("nginx", FILES, {"listen": "127.0.0.1:65536"}, "listen: '127.0.0.1:65536' is not an address"),
        ("nginx", FILES, {"listen": "127.0.0.1:80 ssl"}, "is not an address"),
        ("nginx", FILES, {"prefix": "downloads"}, "not a prefix"),
        ("nginx", FILES, {"prefix": "/downloads/"}, "not a prefix"),
        ("nginx", FILES, {"prefix": "/a;b"}, "not a prefix"),
        ("nginx", FILES, {"prefix": "/.."}, "not a prefix"),
        ("nginx", FILES, {"idle_seconds": 1}, "too short for a proxy"),
        ("nginx", FILES, {"stall_seconds": 0}, "more than 0"),
        ("nginx", FILES, {"max_body_bytes": 0}, "more than 0"),
        ("nginx", FILES, {"unset": ["X_Remote_User"]}, "'X_Remote_User' is not the name of a header"),
        ("nginx", FILES, {"unset": ["X-Remote-User;"]}, "is not the name of a header"),
        ("nginx", FILES, {"private": "/-"}, "write a path such as /-/"),
        ("nginx", FILES, {"private": "/a;/"}, "write a path such as /-/"),
        ("nginx", FILES, {"private": "/-/", "public": ["a/b"]}, "names such as livez"),
        ("nginx", [dv.Rule("/srv/files", "/-/files/")], {"private": "/-/"}, "below /-/, where the proxy refuses"),
        ("h2o", [dv.Rule("/srv/files", "/a/-/b/")], {"private": "/-/", "prefix": "/a"}, "below /a/-/, where"),
        ("nginx", FILES, {"headers": "X-Robots-Tag"}, "write a list of names"),
        ("nginx", FILES, {"headers": [""]}, "'' is not the name of a header"),
        ("caddy", FILES, {"headers": ["X-Robots-Tag: noindex"]}, "is not the name of a header"),
        ("nginx", FILES, {"headers": ["X-A\n"]}, "is not the name of a header"),
        ("nginx", FILES, {"headers": ["é"]}, "is not the name of a header"),
        ("nginx", FILES, {"headers": ["X" * 65]}, "is not the name of a header"),
        ("nginx", FILES, {"headers": ["X_A"]}, "'X_A': nginx has no variable for this header"),
        *(
            (kind, FILES, {"headers": ["X-Robots-Tag", name]}, f"{name} describes the file or the message")
            for kind in ("nginx", "caddy")
            for name in (
                "Content-Length",
                "content-type",
                "Content-Range",
                "ETag",
                "Transfer-Encoding",
                "Keep-Alive",
                "X-Accel-Redirect",
                "x-sendfile",
            )
        ),
    ],
)
def test_refusals(kind: Any, rules: list[dv.Rule], options: dict[str, Any], message: str) -> None:
    with pytest.raises(dv.ConfigurationError, match=message):
        dv.proxy_config(kind, rules, **options)


def test_each_location_of_nginx_adds_a_header_once() -> None:
    rules = [*FILES, dv.Rule("/srv/more", "/_more/"), dv.Rule("https://files.example.org/", "/_remote/")]
    text = dv.proxy_config("nginx", rules, headers=["X-Robots-Tag", "x-robots-tag", "Vary", "Set-Cookie", "Expires"])
    assert text.count("add_header X-Robots-Tag $upstream_http_x_robots_tag always;") == 2
    assert text.count("add_header X-Robots-Tag $remote_header1 always;") == 1
    assert text.count("set $remote_header1 $upstream_http_x_robots_tag;") == 1
    assert text.count("proxy_hide_header X-Robots-Tag;") == 1
    assert len(re.findall("(?i)add_header (x-robots-tag|set-cookie|expires)", text)) == 3


@pytest.mark.parametrize("source, alias", [("/", "/"), ("//srv//files//", "/srv/files/"), ("/srv/./a/../b", "/srv/b/")])
def test_a_directory_is_written_without_its_detours(source: str, alias: str) -> None:
    text = dv.proxy_config("nginx", [dv.Rule(source, "/_files/")])
    assert f"            alias {alias};\n" in text


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["nginx", "apache", "lighttpd", "h2o"])  # Caddy gets its certificate itself
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: apt install openssl")
async def test_tls_goes_where_the_comment_says(kind: str) -> None:
    with readable_directory() as root:
        (root / "files").mkdir()
        (root / "files" / "a.txt").write_text("a")
        request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
        files = ["-keyout", str(root / "downloads.key"), "-out", str(root / "downloads.pem")]
        subprocess.run([*request.split(), *files], check=True, capture_output=True)
        (root / "downloads.key").chmod(0o644)

        def text(service: str, listen: str) -> str:
            made = dv.proxy_config(kind, rules_for(kind, [root / "files"]), service=service, listen=listen)
            assert made.count("TLS: ") == 1
            made = re.sub("#(LoadModule|SSL|RequestHeader|server.modules|ssl|  cert|  key|listen)", r"\1", made)
            made = made.replace("/etc/ssl/certs/", f"{root}/").replace("/etc/ssl/private/", f"{root}/")
            return made.replace(f"listen {listen};", "").replace("listen 443 ssl", f"listen {listen} ssl")

        trusting = ssl.create_default_context(cafile=str(root / "downloads.pem"))
        async with served(kind, [root / "files"]) as service:
            with proxy(KINDS[kind], root, service, text=text) as port:
                for path, body in (("/0/a.txt", b"a"), ("/scheme", b"https")):
                    url = f"https://127.0.0.1:{port}{path}"
                    assert await asyncio.to_thread(_body_of, url, trusting) == body
