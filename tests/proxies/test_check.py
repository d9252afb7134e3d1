"""`downloadview check`: what is shipped passes on the real proxies, and each misconfiguration is found on one."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.service.app import build
from downloadview_async.service.check.run import Line, check
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.proxy_config import config_for
from downloadview_async.service.settings import Settings
from tests.live import live, make_old
from tests.proxies.conftest import content_of, make_checkout
from tests.proxies.servers import EACH_KIND, KINDS, proxy, readable_directory
from tests.servers import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = """
[sources.files]
type = "path"
root = "app/files"
[sources.copies]
type = "storage"
url = "file:app/files"
[sources.made]
type = "virtual"
factory = "made_for_check:make"
[sources.any]
type = "virtual"
factory = "made_for_check:make_any"
[[routes]]
path = "/files/{path:path}"
source = "files"
cache_control = "private"
[[routes]]
path = "/pages/{path:path}"
source = "copies"
disposition = "inline"
example = ["page.html", "50%25.txt", "a%20b.txt"]
[[routes]]
path = "/large/{path:path}"
source = "files"
example = "large.bin"
[[routes]]
path = "/made/{name}"
source = "made"
example = "report.txt"
[[routes]]
path = "/any/{path:path}"
source = "any"
example = "report.txt"
"""
MADE = """
def make(name):
    return b'made ' * 1000 if name == 'report.txt' else None
def make_any(name):
    return f'hello {name}'
"""
RULES: dict[str | None, str] = {
    None: "",
    **dict.fromkeys(("apache", "lighttpd"), '[[offload.rules]]\nsource = "app/files"\n'),
    **dict.fromkeys(("nginx", "caddy", "h2o"), '[[offload.rules]]\nsource = "app/files"\ntarget = "/_files/"\n'),
}


def settings_of(directory: Path, backend: str | None, more: str = "") -> Settings:
    file = directory / f"{backend}.toml"
    line = "" if backend is None else f'[offload]\nbackend = "{backend}"\n{more}'
    file.write_text(f"{SETTINGS}{line}{RULES[backend]}")
    return load_settings(file, environ={})


@dataclass(frozen=True)
class Site:
    checkout: Path
    kind: str
    settings: Settings
    service: int

    async def check(
        self,
        edit: Callable[[str], str] = str,
        *,
        kind: str | None = None,
        service: int | None = None,
        settings: Settings | None = None,
        text: Callable[[str, str], str] | None = None,
        **options: Any,
    ) -> list[Line]:
        service = service or self.service
        with proxy(KINDS[kind or self.kind], self.checkout, service, text=text, edit=edit) as port:
            lines = check(
                settings or self.settings,
                url=f"http://127.0.0.1:{port}",
                direct=f"http://127.0.0.1:{service}",
                only="files" in options,
                **options,
            )
            return [line async for line in lines]


@asynccontextmanager
async def site(kind: str) -> AsyncIterator[Site]:
    with readable_directory() as directory:
        checkout = make_checkout(directory, "checkout")
        (checkout / "app" / "files" / "large.bin").write_bytes(content_of("large") * 500)
        (checkout / "app" / "stale").mkdir()
        (checkout / "app" / "stale" / "plain.txt").write_bytes(content_of("plain.txt").replace(b"0", b"1"))
        (checkout / "made_for_check.py").write_text(MADE)
        make_old(checkout)
        settings = settings_of(checkout, kind)
        async with live(build(settings)) as service:
            yield Site(checkout, kind, settings, service)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(KINDS))
async def each(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site(request.param) as running:
        yield running


def failures(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.result == "FAIL"]


@pytest.mark.parametrize(
    "each", [pytest.param(kind, marks=[] if kind == "nginx" else pytest.mark.slow) for kind in KINDS], indirect=True
)
async def test_what_is_shipped_passes(each: Site) -> None:
    lines = await each.check()
    assert failures(lines) == []
    assert {line.step for line in lines} == {"source", "application", "proxy", "together"}
    assert [line for line in lines if line.result == "skip"] == []


# --- what is known to go wrong: what is changed of the configuration, and what is said of it

PLAIN = "/files/plain.txt"
PAGE = "/pages/page.html"
LARGE = "/large/large.bin"
MADE_FILE = "/made/report.txt"
NGINX_STREAM = 'proxy_set_header Forwarded "";'
APACHE = "ProxyRequests Off"
APACHE_FILES = 'XSendFilePath "${PWD}/app/files/"'
CADDY = "\trequest_body {"
LIGHTTPD = '    "Forwarded" => "",'
H2O_FILES = '- file.dir: "app/files/"'
H2O_STREAM = "          proxy.header.unset: Forwarded\n"


@dataclass(frozen=True)
class Wrong:
    name: str
    kind: str
    file: str
    edits: tuple[tuple[str, str], ...]
    """What of the configuration is replaced by what. SERVICE stands for the service's port."""
    advice: str
    came: str = ""
    """A part of the failed line, apart from its advice."""


def wrong(name: str, kind: str, file: str, old: str, new: str, advice: str, came: str = "") -> Wrong:
    return Wrong(name, kind, file, ((old, new),), advice, came)


WRONG = [
    wrong("alias without a slash", "nginx", PLAIN, "alias app/files/;", "alias app/files;", "alias {files}/;", ": 404"),
    wrong("another alias", "nginx", PLAIN, "alias app/files/;", "alias app/other/;", "alias {files}/;", ": 404"),
    wrong("stale files", "nginx", PLAIN, "alias app/files/;", "alias app/stale/;", "alias {files}/;", "other bytes"),
    wrong("root for alias", "nginx", PLAIN, "alias app/files/;", "root app/files/;", "alias and not root", ": 404"),
    wrong(
        "another location", "nginx", PLAIN, "location /_files/ {", "location /_other/ {", "location /_files/ {", "404"
    ),
    wrong("not internal", "nginx", PLAIN, "            internal;\n", "", "`internal;`", "GET /_files/plain.txt: 200"),
    Wrong(
        "neither slash nor internal",
        "nginx",
        PLAIN,
        (("location /_files/ {", "location /_files {"), ("            internal;\n", "")),
        "slash at both ends",
        "GET /_files../files/plain.txt: 200",
    ),
    wrong("another service", "nginx", PLAIN, "127.0.0.1:SERVICE", "127.0.0.1:9", "proxy_pass", "502"),
    wrong(
        "orders are ignored",
        "nginx",
        PLAIN,
        NGINX_STREAM,
        f"{NGINX_STREAM} proxy_ignore_headers X-Accel-Redirect;",
        "proxy_ignore_headers",
        "200, no bytes",
    ),
    wrong(
        "nosniff is lost",
        "nginx",
        PLAIN,
        "            add_header X-Content-Type-Options $up",
        "            # $up",
        "add_header X-Content-Type-Options $upstream_http_x_content_type_options always;",
        "X-Content-Type-Options: None",
    ),
    wrong(
        "the sandbox is lost",
        "nginx",
        PAGE,
        "            add_header Content-Security-Policy $up",
        "            # $up",
        "add_header Content-Security-Policy $upstream_http_content_security_policy always;",
        "Content-Security-Policy: None",
    ),
    wrong(
        "nosniff twice",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f"{NGINX_STREAM} add_header X-Content-Type-Options nosniff;",
        "no add_header",
        "nosniff, nosniff",
    ),
    wrong(
        "Cache-Control is made anew",
        "nginx",
        PLAIN,
        "            gzip off;",
        "            gzip off; expires 1d;",
        "expires",
        "Cache-Control: ",
    ),
    wrong(
        "a cookie",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f'{NGINX_STREAM} add_header Set-Cookie "seen=1";',
        "the service does not",
        "Set-Cookie: seen=1",
    ),
    wrong("no ranges", "nginx", PLAIN, "max_ranges 100;", "max_ranges 0;", "max_ranges", "Range: bytes=0-0: 200"),
    wrong(
        "no dates", "nginx", PLAIN, "if_modified_since before;", "if_modified_since off;", "if_modified_since", ": 200"
    ),
    wrong(
        "no validators", "nginx", PLAIN, "gzip off;", "gzip off; etag off; add_header Last-Modified '';", "etag", "no E"
    ),
    wrong(
        "no Range for the service",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f'{NGINX_STREAM} proxy_set_header Range "";',
        "proxy_set_header Range",
        "Range: bytes=0-0: 200",
    ),
    wrong(
        "no If-Range for the service",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f'{NGINX_STREAM} proxy_set_header If-Range "";',
        "If-Range",
        'If-Range: "downloadview-check": 206',
    ),
    wrong(
        "no If-None-Match for the service",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f'{NGINX_STREAM} proxy_set_header If-None-Match "";',
        "proxy_set_header If-None-Match",
        "If-None-Match: ",
    ),
    wrong(
        "compressed",
        "nginx",
        LARGE,
        "gzip off;",
        "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;",
        "gzip off;",
        "Content-Encoding: gzip",
    ),
    wrong(
        "decoded",
        "nginx",
        PLAIN,
        "proxy_pass http://service;",
        "proxy_pass http://service/;",
        "without a slash",
        "x%2F",
    ),
    wrong(
        "decoded for a function that makes a file of any name",
        "nginx",
        "/any/report.txt",
        "proxy_pass http://service;",
        "proxy_pass http://service/;",
        "without a slash",
        "x%2F",
    ),
    wrong(
        "orders of clients",
        "nginx",
        PLAIN,
        "        location / {",
        "        location / { if ($http_x_accel_redirect) { rewrite ^ /nowhere break; }",
        'proxy_set_header X-Accel-Redirect "";',
        "another answer",
    ),
    wrong(
        "another entity tag",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f"{NGINX_STREAM} add_header ETag '\"x\"';",
        "no add_header",
        'ETag: "x" instead of',
    ),
    wrong(
        "a password",
        "nginx",
        MADE_FILE,
        NGINX_STREAM,
        f"{NGINX_STREAM} auth_basic x; auth_basic_user_file /dev/null;",
        "answers 200",
        ": 401",
    ),
    wrong(
        "header fields that are not enough for a long name",
        "nginx",
        PLAIN,
        "proxy_buffer_size 32k;",
        "",
        "proxy_buffer_size 32k;",
        "an answer with header fields of 14333 bytes: 502",
    ),
    wrong(
        "a request line that is not enough for a long name",
        "nginx",
        PLAIN,
        "large_client_header_buffers 4 16k;",
        "",
        "large_client_header_buffers 4 16k;",
        "a request target of 12541 bytes: 414",
    ),
    wrong("short request lines", "apache", PLAIN, "LimitRequestLine 16384", "", "LimitRequestLine 16384", ": 414"),
    wrong(
        "short heads",
        "lighttpd",
        PLAIN,
        "server.max-request-field-size = 32768",
        "",
        "server.max-request-field-size = 32768",
        ": 431",
    ),
    wrong("not enabled", "apache", PLAIN, "XSendFile On", "XSendFile Off", "XSendFile On", "x-sendfile: "),
    Wrong(
        "no module",
        "apache",
        PLAIN,
        (("LoadModule xsendfile_module", "#"), ("\nXSendFile On", ""), ("\nXSendFilePath", "\n#")),
        "LoadModule xsendfile_module",
        "x-sendfile: ",
    ),
    wrong(
        "another directory",
        "apache",
        PLAIN,
        APACHE_FILES,
        'XSendFilePath "/usr/share"',
        "XSendFilePath",
    ),
    wrong("no directory", "apache", PLAIN, APACHE_FILES, "", 'XSendFilePath "{files}"', ": 404"),
    wrong("another service", "apache", PLAIN, "127.0.0.1:SERVICE", "127.0.0.1:9", "ProxyPass / ", ": 503"),
    wrong(
        "no ranges",
        "apache",
        PLAIN,
        "RequestHeader unset Range \"expr=%{REQUEST_METHOD} == 'HEAD'\"",
        "RequestHeader unset Range early",
        "RequestHeader unset Range",
        "Range: bytes=0-0: 200",
    ),
    wrong("nosniff is lost", "apache", PLAIN, APACHE, f"{APACHE}\nHeader unset X-Content-Type-Options", "Header unset"),
    wrong(
        "no conditions", "apache", PLAIN, APACHE, f"{APACHE}\nRequestHeader unset If-None-Match early", "If-None-Match"
    ),
    wrong(
        "a header twice",
        "apache",
        MADE_FILE,
        APACHE,
        f"{APACHE}\nHeader always set Accept-Ranges bytes",
        "no `Header set`",
        "accept-ranges is sent 2 times",
    ),
    wrong(
        "the files are open",
        "apache",
        PLAIN,
        "ProxyPass / ",
        'DocumentRoot "${PWD}/app/files"\nProxyPass /plain.txt !\nProxyPass / ',
        "no DocumentRoot",
        "GET /plain.txt: 200",
    ),
    wrong(
        "compressed",  # but never what mod_xsendfile sends
        "apache",
        MADE_FILE,
        APACHE,
        f"{APACHE}\nLoadModule filter_module ${{modules}}/mod_filter.so\n"
        "LoadModule deflate_module ${modules}/mod_deflate.so\nSetOutputFilter DEFLATE",
        "no-gzip",
        "Content-Encoding: gzip",
    ),
    Wrong(
        "decoded",
        "apache",
        PLAIN,
        (("AllowEncodedSlashes NoDecode", "AllowEncodedSlashes On"), (" nocanon", "")),
        "nocanon",
        "x%2F",
    ),
    wrong(
        "not enabled",
        "lighttpd",
        PLAIN,
        '"x-sendfile" => "enable"',
        '"x-sendfile" => "disable"',
        '"x-sendfile" => "enable"',
    ),
    wrong(
        "another directory",
        "lighttpd",
        PLAIN,
        '(env.PWD + "/app/files/")',
        '(env.PWD + "/app/files-private/")',
        '"x-sendfile-docroot" => ("{files}/")',
        ": 403",
    ),
    wrong(
        "the files are open",
        "lighttpd",
        PLAIN,
        'proxy.server = (""',
        'proxy.server = ("/files/"',
        "proxy.server",
        ": 200",
    ),
    wrong(
        "decoded",
        "lighttpd",
        PLAIN,
        '("url-path-2f-decode" => "disable")',
        '("url-path-2f-decode" => "enable")',
        "url-path-2f-decode",
        "x%2F",
    ),
    wrong(
        "nosniff is lost",
        "lighttpd",
        PLAIN,
        "setenv.set-request-header",
        'setenv.set-response-header = ("X-Content-Type-Options" => "")\nsetenv.set-request-header',
        "setenv.set-response-header",
        "X-Content-Type-Options: None",
    ),
    wrong(
        "no ranges", "lighttpd", PLAIN, "server.tag", 'server.range-requests = "disable"\nserver.tag', "range-requests"
    ),
    wrong("no conditions", "lighttpd", PLAIN, LIGHTTPD, f'{LIGHTTPD} "If-None-Match" => "",', "If-None-Match"),
    wrong("another service", "lighttpd", PLAIN, '"port" => SERVICE', '"port" => 9', "host and port", ": 503"),
    wrong(
        "not enabled",
        "caddy",
        PLAIN,
        "header X-Accel-Redirect *",
        "header X-Nothing *",
        "handle_response",
        "x-accel-re",
    ),
    wrong("another directory", "caddy", PLAIN, "root app/files/\n", "root app\n", "root {files} ", ": 404"),
    wrong(
        "the files are open",
        "caddy",
        PLAIN,
        CADDY,
        f"handle_path /_files/* {{\nroot app/files\nfile_server\n}}\n{CADDY}",
        "handle_response @offloaded",
        "GET /_files/plain.txt: 200",
    ),
    wrong(
        "headers are lost",
        "caddy",
        PLAIN,
        "exclude Connection Content-Length Date Server X-Accel-Redirect",
        "include Content-Type",
        "copy_response_headers",
        "Content-Disposition: None",
    ),
    wrong("stale files", "caddy", PLAIN, "root app/files/\n", "root app/stale\n", "root {files}", "other bytes"),
    wrong(
        "the order is shown",
        "caddy",
        PLAIN,
        "Date Server X-Accel-Redirect",
        "Date Server",
        "exclude Connection Content-Length Date Server x-accel-redirect",
        "200, x-accel-redirect: /_files/plain.txt",
    ),
    wrong("compressed", "caddy", PLAIN, CADDY, f"encode gzip\n{CADDY}", "no `encode`", "Content-Encoding: gzip"),
    wrong(
        "no ranges", "caddy", PLAIN, CADDY, f"request_header -Range\n{CADDY}", "request_header -Range", "bytes=0-0: 200"
    ),
    wrong("no conditions", "caddy", PLAIN, CADDY, f"request_header -If-None-Match\n{CADDY}", "request_header", ": 200"),
    wrong("another service", "caddy", PLAIN, "127.0.0.1:SERVICE", "127.0.0.1:9", "reverse_proxy", ": 502"),
    wrong("not enabled", "h2o", PLAIN, "reproxy: ON", "reproxy: OFF", "reproxy: ON", "x-reproxy-url: "),
    wrong(
        "stale files",
        "h2o",
        PLAIN,
        H2O_FILES,
        "- file.dir: app/stale",
        "file.dir: {files}",
        "other by",
    ),
    wrong("another directory", "h2o", PLAIN, H2O_FILES, "- file.dir: app", "file.dir: {files}", ": 404"),
    wrong(
        "the files are open",
        "h2o",
        PLAIN,
        "      /_files/:\n        - mruby",
        "      /_files/:\n        - file.dir: app/files\n        - mruby",
        "DOWNLOADVIEW_TARGET",
        "GET /_files/plain.txt: 200",
    ),
    wrong("compressed", "h2o", PLAIN, "reproxy: ON", "reproxy: ON\n    compress: ON", "compress: OFF", "-Encoding: "),
    wrong(
        "no ranges for the service",
        "h2o",
        MADE_FILE,
        H2O_STREAM,
        f"{H2O_STREAM}          proxy.header.unset: Range\n",
        "Range",
    ),
    wrong(
        "no conditions for the service",
        "h2o",
        MADE_FILE,
        H2O_STREAM,
        f"{H2O_STREAM}          proxy.header.unset: If-None-Match\n",
        "If-None-Match",
    ),
    wrong(
        "nosniff is lost",
        "h2o",
        PLAIN,
        '["connection", "content-length",',
        '["connection", "x-content-type-options", "content-length",',
        "mruby.handler",
        "X-Content-Type-Options: None",
    ),
    wrong("another service", "h2o", PLAIN, '127.0.0.1:SERVICE/"\n', '127.0.0.1:9/"\n', "proxy.reverse.url", ": 502"),
]


FIRST_OF_EACH = {case.kind: case for case in reversed(WRONG)}.values()


@pytest.mark.parametrize(
    "each, case",
    [
        pytest.param(
            case.kind,
            case,
            id=f"{case.kind}: {case.name}",
            marks=[] if case in FIRST_OF_EACH or case.kind == "lighttpd" else pytest.mark.slow,
        )
        for case in WRONG
    ],
    indirect=["each"],
)
async def test_what_is_wrong_is_found(each: Site, case: Wrong) -> None:
    def edit(text: str) -> str:
        for old, new in case.edits:
            old = old.replace("SERVICE", str(each.service))
            assert old in text, f"nothing to change: {old}"
            text = text.replace(old, new)
        return text

    failed = failures(await each.check(edit, files=[case.file]))
    advice = case.advice.replace("{files}", str(each.checkout / "app" / "files"))
    said = [line for line in failed if advice in line.remedy and case.came in f"{line.request}: {line.outcome}"]
    assert said, failed
    assert advice in failed[0].remedy, "what is said first is what mends it"


# --- settings and proxies that do not fit


async def test_the_service_has_no_backend() -> None:
    async with site("nginx") as here, live(build(settings_of(here.checkout, None))) as service:
        failed = failures(await here.check(service=service, files=[PLAIN]))
    assert [line.step for line in failed] == ["application"]  # what comes by way of the proxy is right
    assert "DOWNLOADVIEW_OFFLOAD__BACKEND=nginx" in failed[0].remedy


async def test_the_service_says_more_than_these_settings() -> None:
    async with site("nginx") as here:
        plain = settings_of(here.checkout, None)
        failed = failures(await here.check(settings=plain, files=[PLAIN]))
    assert [line.step for line in failed] == ["application"]
    assert "stream this file" in failed[0].remedy


async def test_the_service_has_another_target() -> None:
    async with site("nginx") as here:
        file = here.checkout / "other.toml"
        file.write_text((here.checkout / "nginx.toml").read_text().replace("/_files/", "/_other/"))
        other = load_settings(file, environ={})
        async with live(build(other)) as service:
            failed = failures(await here.check(service=service, files=[PLAIN]))
    assert failed[0].step == "application"
    assert "x-accel-redirect: /_files/plain.txt" in failed[0].remedy
    assert failed[1].step == "together"
    assert "404" in failed[1].outcome


@pytest.mark.parametrize(
    "backend, behind",
    [("nginx", "apache"), ("nginx", "lighttpd"), ("nginx", "h2o"), ("apache", "nginx"), ("h2o", "caddy")],
)
async def test_the_backend_is_that_of_another_proxy(backend: str, behind: str) -> None:
    async with site(backend) as here:
        failed = failures(await here.check(kind=behind, files=[PLAIN]))
    assert [line.step for line in failed] == ["together"]
    assert f'backend = "{behind}"' in failed[0].remedy
    assert "0 bytes" in failed[0].outcome


@pytest.mark.slow
@pytest.mark.parametrize("kind, encoding", [("apache", "percent"), ("lighttpd", "raw")])
async def test_the_encoding_is_that_of_another_proxy(kind: str, encoding: str) -> None:
    async with site(kind) as here:
        settings = settings_of(here.checkout, kind, f'encoding = "{encoding}"\n')
        async with live(build(settings)) as service:
            failed = failures(await here.check(service=service, settings=settings))
    assert {(line.step, line.request) for line in failed} >= {("together", "GET /pages/a%2520b.txt")}
    right = "raw" if kind == "apache" else "percent"
    assert {f'encoding = "{right}"' in line.remedy for line in failed} == {True}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the service may read what the proxy may not")
@pytest.mark.parametrize("kind", ["nginx", "apache", "lighttpd", "h2o"])
async def test_the_proxy_may_not_read_the_file(kind: str) -> None:
    async with site(kind) as here:
        files = here.checkout / "app" / "files"
        (files / "closed").mkdir()
        (files / "closed" / "a.txt").write_bytes(b"a")
        (files / "closed.txt").write_bytes(b"a")
        (files / "closed").chmod(0o700)
        (files / "closed.txt").chmod(0o600)
        failed = failures(await here.check(files=["/files/closed/a.txt", "/pages/closed.txt"]))
    assert [line.remedy.split("`")[1] for line in failed] == [
        f"chmod o+x {files}/closed",
        f"chmod o+r {files}/closed.txt",
    ]


async def test_a_rule_that_leads_through_a_link() -> None:
    async with site("nginx") as here:
        (here.checkout / "link").symlink_to(here.checkout / "app" / "files")
        file = here.checkout / "link.toml"
        text = (here.checkout / "nginx.toml").read_text()
        file.write_text(text.replace('url = "file:app/files"', 'url = "file:link"'))
        settings = load_settings(file, environ={})
        async with live(build(settings)) as service:
            lines = await here.check(service=service, settings=settings, files=[PLAIN, PAGE])
    (failed,) = failures(lines)
    assert failed.request == f"GET {PAGE}"
    assert f'source = "{here.checkout}/link"' in failed.remedy


async def test_nothing_listens() -> None:
    async with site("nginx") as here:
        nobody = f"http://127.0.0.1:{free_port()}"
        lines = [line async for line in check(here.settings, url=nobody, direct=nobody, files=[PLAIN], only=True)]
        assert [(line.step, line.result) for line in lines if line.result != "skip"] == [
            ("source", "pass"),
            ("application", "FAIL"),
            ("proxy", "FAIL"),
        ]
        assert "--direct" in lines[-2].remedy
        assert "start the proxy" in lines[-1].remedy
        # a proxy that is checked from elsewhere says what the settings promise of it, with the service out of reach
        with proxy(KINDS["nginx"], here.checkout, here.service) as port:
            url = f"http://127.0.0.1:{port}"
            lines = [line async for line in check(here.settings, url=url, direct=nobody, files=[PLAIN], only=True)]
    assert [line.step for line in failures(lines)] == ["application"]


# --- the headers of routes


MARKED = """
[sources.files]
type = "path"
root = "app/files"
precompressed = ["gzip"]
[sources.made]
type = "virtual"
factory = "made_for_check:make"
[[routes]]
path = "/marked/{path:path}"
source = "files"
example = "plain.txt"
headers = { X-Robots-Tag = "noindex", Link = "</a>; rel=preload, </b>; rel=next", Vary = "Accept-Language" }
cors = { origins = ["https://app.example.org"], credentials = true }
[[routes]]
path = "/made/{name}"
source = "made"
example = "report.txt"
headers = { Referrer-Policy = "no-referrer" }
cors = { origins = ["*"] }
"""


@asynccontextmanager
async def marked(kind: str) -> AsyncIterator[Callable[..., Awaitable[list[Line]]]]:
    """Give a function that checks routes with headers behind a proxy with the printed configuration."""
    async with site(kind) as here:
        file = here.checkout / "marked.toml"
        file.write_text(f'{MARKED}[offload]\nbackend = "{kind}"\n{RULES[kind]}')
        settings = load_settings(file, environ={})

        def text(service: str, listen: str) -> str:
            relative_to = here.checkout if kind == "nginx" else None
            return config_for(settings, kind, listen=listen, service=service, relative_to=relative_to)

        async with live(build(settings)) as service:

            async def checked(*edits: tuple[str, str]) -> list[Line]:
                def edit(made: str) -> str:
                    for old, new in edits:
                        assert old in made, f"nothing to change: {old}"
                        made = made.replace(old, new)
                    return made

                return await here.check(edit, text=text, service=service, settings=settings)

            yield checked


@pytest.mark.parametrize("kind", EACH_KIND)
async def test_the_headers_of_routes_arrive_behind_a_printed_configuration(kind: str) -> None:
    async with marked(kind) as check_it:
        lines = await check_it()
    assert failures(lines) == []
    skipped = [line.outcome for line in lines if line.result == "skip"]
    own = "not checked: lighttpd sends its own 416 without CORS headers"
    assert skipped == ([own] if kind == "lighttpd" else [])
    assert {line.outcome for line in lines if line.request.startswith("OPTIONS ")} == {"200"}


@pytest.mark.parametrize(
    "line",
    [
        "add_header X-Robots-Tag $upstream_http_x_robots_tag always;",
        "add_header Link $upstream_http_link always;",
        "add_header Vary $upstream_http_vary always;",
        "add_header Access-Control-Allow-Origin $upstream_http_access_control_allow_origin always;",
        "add_header Access-Control-Expose-Headers $upstream_http_access_control_expose_headers always;",
    ],
)
async def test_a_line_that_was_removed_is_named(line: str) -> None:
    async with marked("nginx") as check_it:
        failed = failures(await check_it((f"            {line}\n", "")))
    assert failed
    assert {one.route for one in failed} == {"/marked/{path:path}"}
    assert {f"`{line}` in location /_files/" in one.remedy for one in failed} == {True}


@pytest.mark.parametrize(
    "kind, old, new, remedy",
    [
        ("nginx", NGINX_STREAM, f"{NGINX_STREAM} proxy_hide_header Referrer-Policy;", "for Referrer-Policy in the"),
        ("caddy", "header X-Accel-Redirect *", "header X-Nothing *", "handle_response"),
        ("caddy", "Date Server X-A", "Date Server X-Robots-Tag X-A", "`copy_response_headers"),
        (
            "nginx",
            "        location / {",
            "        location / {\n if ($request_method = OPTIONS) { return 405; }",
            "OPTIONS",
        ),
        pytest.param("apache", APACHE, f"{APACHE}\nHeader unset Link", "`Header unset`", marks=pytest.mark.slow),
        pytest.param("h2o", '["connection",', '["connection", "link",', "mruby.handler", marks=pytest.mark.slow),
    ],
)
async def test_a_header_that_is_lost_in_another_way_is_found(kind: str, old: str, new: str, remedy: str) -> None:
    async with marked(kind) as check_it:
        failed = failures(await check_it((old, new)))
    assert failed
    assert remedy in failed[0].remedy


# --- files that are not in a directory of the service


FAR_FILE = "/far/a b.txt"
FAR = """
[sources.far]
type = "remote"
url = "http://127.0.0.1:UPSTREAM/pages/"
allow_hosts = ["127.0.0.1"]
[sources.kept]
type = "remote"
url = "http://127.0.0.1:UPSTREAM/pages/"
allow_hosts = ["127.0.0.1"]
[sources.kept.cache]
path = "cache"
[[routes]]
path = "/far/{path:path}"
source = "far"
example = "a b.txt"
headers = { X-Robots-Tag = "noindex" }
[[routes]]
path = "/kept/{path:path}"
source = "kept"
example = "a b.txt"
[offload]
backend = "nginx"
[[offload.rules]]
source = "http://127.0.0.1:UPSTREAM/pages/"
target = "/_remote/"
[[offload.rules]]
source = "cache"
target = "/_cache/"
"""


@dataclass(frozen=True)
class Far:
    """A site behind nginx with the files of another server, and a cache of them."""

    site: Site
    settings: Settings
    service: int
    upstream: int

    async def check(self, *edits: tuple[str, str], **options: Any) -> list[Line]:
        def edit(text: str) -> str:
            for old, new in edits:
                assert old in text, f"nothing to change: {old}"
                text = text.replace(old, new)
            return text

        def text(service: str, listen: str) -> str:
            return config_for(self.settings, "nginx", listen=listen, service=service, relative_to=None)

        return await self.site.check(edit, text=text, service=self.service, settings=self.settings, **options)


def _as_a_store(app: ASGIApp) -> ASGIApp:
    """Return the application with headers of stores in its answers."""

    async def storing(scope: Scope, receive: Receive, send: Send) -> None:
        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = (b"x-amz-meta-owner", b"x-goog-hash", b"x-ms-version", b"seaweed-x", b"x-amz-request-id")
                message["headers"] = [*message["headers"], *((name, b"ada") for name in names)]
            await send(message)

        await app(scope, receive, said)

    return storing


@asynccontextmanager
async def far(dressed: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> AsyncIterator[Far]:
    async with site("nginx") as here, live(dressed(build(settings_of(here.checkout, None)))) as upstream:
        file = here.checkout / "far.toml"
        file.write_text(FAR.replace("UPSTREAM", str(upstream)))
        settings = load_settings(file, environ={})
        app = build(settings)
        async with app.router.lifespan_context(app), live(app) as service:
            yield Far(here, settings, service, upstream)


@pytest.mark.slow
async def test_files_of_another_server_and_those_of_a_cache() -> None:
    async with far() as here:
        here.site.checkout.joinpath("cache").chmod(0o755)
        first = await here.check()
        lines = await here.check()
        lost = await here.check((f"server 127.0.0.1:{here.upstream};", "server 127.0.0.1:9;"))
        no_ranges = await here.check(("            proxy_set_header Range $", "            # $"), files=[FAR_FILE])
        failing = await here.check(
            (
                "            # Several parts",
                "            if ($http_range) { return 502; }\n            # Several parts",
            ),
            files=[FAR_FILE],
        )
    assert failures(first) == failures(lines) == []
    outcomes = [line.outcome for line in lines if line.step == "application"]
    assert outcomes[0] == "200, x-accel-redirect: /_remote/, x-offload-target: /pages/a%20b.txt, and 0 bytes"
    assert outcomes[1].startswith("200, x-accel-redirect: /_cache/")
    assert "compare the configuration of /_remote/ with `downloadview config`" in failures(lost)[0].remedy
    assert "`proxy_set_header Range ...;`" in failures(no_ranges)[0].remedy
    assert "max_ranges" not in str(no_ranges)
    assert "502" in failures(failing)[0].outcome
    assert "compare the configuration of /_remote/ with `downloadview config`" in failures(failing)[0].remedy


async def test_a_line_that_was_removed_for_files_of_another_server_is_named() -> None:
    async with far() as here:
        line = "            add_header X-Robots-Tag $remote_header1 always;\n"
        failed = failures(await here.check((line, ""), files=[FAR_FILE]))
    assert [line.outcome for line in failed] == ["X-Robots-Tag: None instead of noindex"]
    assert "`set $service_header $upstream_http_x_robots_tag;`" in failed[0].remedy
    assert "`add_header X-Robots-Tag $service_header always;` in `location = /_remote/`" in failed[0].remedy


async def test_headers_of_a_store() -> None:
    async with far(_as_a_store) as here:
        failed = failures(await here.check(files=[FAR_FILE]))
    assert [line.remedy for line in failed] == [
        f"`proxy_hide_header {name};` in `location = /_remote/`"
        for name in ("x-amz-meta-owner", "x-goog-hash", "x-ms-version", "seaweed-x")
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the service may read what the proxy may not")
async def test_the_proxy_may_not_read_what_is_in_the_cache() -> None:
    before = os.umask(0o027)
    try:
        async with far() as here:
            for path in (here.site.checkout, here.site.checkout / "cache"):
                path.chmod(0o755)
            (failed,) = failures(await here.check(files=["/kept/a b.txt"]))
    finally:
        os.umask(before)
    assert failed.outcome == "404"
    cache = here.site.checkout / "cache"
    assert f"`chgrp -R GROUP {cache}`" in failed.remedy
    assert f"not every user may read {cache}/" in failed.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: H2O gives up its rights to nobody")
async def test_the_socket_of_h2o_is_not_for_its_user() -> None:
    async with site("h2o") as here:
        failed = failures(await here.check(lambda text: text.replace("\n      owner: nobody", ""), files=[PLAIN]))
    assert {line.request.split()[0] for line in failed} == {"HEAD", "GET"}
    assert {"`owner: nobody`" in line.remedy for line in failed} == {True}
