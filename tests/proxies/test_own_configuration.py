"""A user's own configuration with the lines of the documentation keeps our headers; without them, `check` says so."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from downloadview_async.service.app import build
from downloadview_async.service.check.run import check
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.settings import Settings
from tests.live import ask, live, make_old
from tests.pages import DOCS, blocks
from tests.proxies.servers import EACH_KIND, KINDS, readable_directory, running
from tests.servers import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = {
    "nginx": (("howto/nginx.md", "nginx"), ("migration.md", "nginx")),
    "caddy": (("howto/caddy.md", "none"),),
}
"""The pages with lines for a proxy, and the kind of their block. Those of the other proxies need none, or have none."""

KEEPING = ("apache", "lighttpd")
"""The proxies that keep all headers."""

SETTINGS = """
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
[[routes]]
path = "/shown/{{path:path}}"
source = "files"
disposition = "inline"
[offload]
backend = "{kind}"
[[offload.rules]]
source = "files"
{target}
"""
AROUND = {
    "nginx": """
daemon off;
error_log stderr;
pid RUN/nginx.pid;
events {}
http {
    access_log off;
    client_body_temp_path RUN/body;
    proxy_temp_path RUN/proxy;
    fastcgi_temp_path RUN/fastcgi;
    uwsgi_temp_path RUN/uwsgi;
    scgi_temp_path RUN/scgi;
    server {
        listen HOST:PORT;
        location / {
            proxy_pass http://127.0.0.1:8000;
        }
LINES
    }
}
""",
    "caddy": """
{
    admin off
    persist_config off
    storage file_system RUN/caddy
}
http://:PORT {
    bind HOST
LINES
}
""",
    "h2o": """
error-log: /dev/stderr
num-threads: 1
hosts:
  default:
    listen:
      host: HOST
      port: PORT
    reproxy: ON
    paths:
      "/":
        proxy.reverse.url: "http://127.0.0.1:8000/"
      "/_files/":
        file.dir: "/srv/files/"
""",
    "apache": """
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
LoadModule xsendfile_module /usr/lib/apache2/modules/mod_xsendfile.so
ServerName localhost
ErrorLog /dev/stderr
PidFile RUN/apache.pid
DefaultRuntimeDir RUN
Listen HOST:PORT
ProxyPass / http://127.0.0.1:8000/
XSendFile on
XSendFilePath /srv/files/
<Directory /srv/files/>
    Require all granted
</Directory>
""",
    "lighttpd": """
server.document-root = "/nonexistent"
server.port = PORT
server.bind = "HOST"
server.modules = ("mod_proxy")
$HTTP["url"] =~ "" {
    proxy.server = ("" => (("host" => "127.0.0.1", "port" => "8000", "x-sendfile" => "enable",
        "x-sendfile-docroot" => ("/srv/files/"))))
}
""",
}
"""What is around the lines of a page: the least with which each server starts. LINES are those of the page, and the
other words in capitals stand for addresses and directories."""


@dataclass(frozen=True)
class Site:
    kind: str
    directory: Path
    settings: Settings
    service: int

    @contextmanager
    def proxy(self, lines: str) -> Iterator[int]:
        """Run the proxy with these lines, and give its port."""
        port = free_port()
        with readable_directory() as run:
            text = AROUND[self.kind].replace("LINES", lines).replace("HOST:PORT", f"127.0.0.1:{port}")
            for old, new in {
                "PORT": str(port),
                "HOST": "127.0.0.1",
                "RUN": str(run),
                "127.0.0.1:8000": f"127.0.0.1:{self.service}",
                '"8000"': str(self.service),
                "/srv/files": str(self.directory / "files"),
            }.items():
                text = text.replace(old, new)
            config = run / "configuration"
            config.write_text(text)
            command = KINDS[self.kind].command(self.directory, config)
            with running(command, port, directory=self.directory, log=run / "log", stop=KINDS[self.kind].stop):
                yield port

    async def lost(self, port: int) -> dict[tuple[str, str], str]:
        """Return the headers that `check` does not get through the proxy, each with its remedy."""
        url, direct = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{self.service}"
        return {
            (line.request.removesuffix(": headers"), line.outcome.partition(":")[0]): line.remedy
            async for line in check(self.settings, url=url, direct=direct)
            if line.result == "FAIL" and line.request.endswith(": headers")
        }


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=EACH_KIND)
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    kind: str = request.param
    with readable_directory() as directory:
        (directory / "files").mkdir()
        (directory / "files" / "a.txt").write_text("0123456789")
        (directory / "files" / "page.html").write_text("<p>0123456789")
        make_old(directory)
        file = directory / "downloadview.toml"
        target = "" if kind in KEEPING else 'target = "/_files/"'
        file.write_text(SETTINGS.format(kind=kind, target=target))
        settings = load_settings(file, environ={})
        async with live(build(settings)) as service:
            yield Site(kind, directory, settings, service)


def lines_for(kind: str) -> list[str]:
    """Return the lines of each page about a proxy: "" if it needs none."""
    lines = [blocks(DOCS / page, fence) for page, fence in PAGES.get(kind, ())]
    return [text for ((_, text),) in lines] or [""]


async def test_the_lines_keep_what_protects_from_scripts(site: Site) -> None:
    if site.kind == "h2o":
        assert "Do not write `reproxy: ON`" in (DOCS / "howto" / "h2o.md").read_text()
        return
    for lines in lines_for(site.kind):
        with site.proxy(lines) as port:
            for headers, status in (({}, 200), ({"Range": "bytes=0-1"}, 206)):
                answer = await ask(port, "/shown/page.html", headers=headers)
                assert answer.status == status
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
            assert await site.lost(port) == {}


WITHOUT = {
    "nginx": "location /_files/ { internal; alias /srv/files/; }",
    "caddy": """reverse_proxy 127.0.0.1:8000 {
        @offloaded header X-Accel-Redirect *
        handle_response @offloaded {
            method * GET
            rewrite * {rp.header.X-Accel-Redirect}
            uri strip_prefix /_files
            root * /srv/files
            file_server
        }
    }""",
}
"""Lines that look right, and lose headers."""
REMEDIES = {
    "nginx": "add_header Content-Security-Policy $upstream_http_content_security_policy always;` in location /_files/",
    "caddy": "copy_response_headers",
    "h2o": "mruby.handler",
}


async def test_check_finds_that_they_are_lost(site: Site) -> None:
    with site.proxy(WITHOUT.get(site.kind, "")) as port:
        lost = await site.lost(port)
    if site.kind in KEEPING:
        assert lost == {}
        return
    nosniff = lost["GET /files/a.txt", "X-Content-Type-Options"]
    policy = lost["GET /shown/page.html", "Content-Security-Policy"]
    assert "X-Content-Type-Options" in nosniff
    assert REMEDIES[site.kind] in policy
