"""A script of another web site reads files, ranges and the statuses of errors through a proxy, in a real browser."""

import asyncio
import html
import json
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.proxy_config import config_for
from tests.browser import CHROMIUM, browse
from tests.live import live, make_old
from tests.proxies.servers import KINDS, proxy, readable_directory
from tests.service.loading import FILES

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]

SETTINGS = (
    FILES
    + """cors = { origins = ["ORIGIN"] }
[[routes]]
path = "/signed/{path:path}"
source = "files"
access = ["signed"]
cors = { origins = ["ORIGIN"] }
[[routes]]
path = "/closed/{path:path}"
source = "files"
[links]
keys = "2026a ssssssssssssssssssssssssssssssss"
[offload]
backend = "KIND"
"""
)
REQUESTS = {
    "whole": ("/files/a.txt", {}),
    "part": ("/files/a.txt", {"Range": "bytes=2-4", "If-Range": '"another"'}),
    "known": ("/files/a.txt", {"If-None-Match": '"another"'}),
    "beyond": ("/files/a.txt", {"Range": "bytes=10-"}),
    "missing": ("/files/missing.txt", {}),
    "refused": ("/signed/a.txt", {"If-None-Match": '"another"'}),
    "closed": ("/closed/a.txt", {}),
}
PAGE = """<pre id="seen"></pre><script>
(async () => {
  const seen = {};
  for (const [name, [path, headers]] of Object.entries(REQUESTS)) {
    try {
      const answer = await fetch("SITE" + path, {headers, cache: "no-store"});
      const body = await answer.text();
      seen[name] = answer.ok ? [answer.status, body, answer.headers.get("Content-Disposition")] : [answer.status];
    } catch (error) { seen[name] = "hidden"; }
  }
  document.getElementById("seen").textContent = JSON.stringify(seen);
  await fetch("/done");
})();
</script><img src="/held">"""


@pytest.mark.parametrize("kind", ["nginx", "caddy", "apache", "h2o"])
async def test_a_script_of_another_site(kind: str, tmp_path: Path) -> None:
    done, page = asyncio.Event(), ""

    async def answer(request: Request) -> Response:
        return HTMLResponse(page)

    async def hold(request: Request) -> Response:  # the page is loaded when its script has ended
        await asyncio.wait_for(done.wait(), 60)
        return Response(status_code=404)

    async def end(request: Request) -> Response:
        done.set()
        return Response("")

    site = Starlette(routes=[Route("/", answer), Route("/held", hold), Route("/done", end)])
    with readable_directory() as directory:
        (directory / "files").mkdir()
        (directory / "files" / "a.txt").write_bytes(b"0123456789")
        make_old(directory)
        async with live(site) as other:
            text = SETTINGS.replace("ORIGIN", f"http://127.0.0.1:{other}").replace("KIND", kind)
            (directory / "downloadview.toml").write_text(text)
            settings = load_settings(directory / "downloadview.toml", environ={})

            def configuration(service: str, listen: str) -> str:
                return config_for(settings, kind, listen=listen, service=service, relative_to=None)

            async with live(build(settings)) as service:
                with proxy(KINDS[kind], directory, service, text=configuration) as port:
                    page = PAGE.replace("REQUESTS", json.dumps(REQUESTS)).replace("SITE", f"http://127.0.0.1:{port}")
                    url = f"http://127.0.0.1:{other}/"
                    shown = await asyncio.to_thread(browse, url, tmp_path / "profile", "--dump-dom")
    match = re.search('<pre id="seen">(.*?)</pre>', shown)
    assert match, shown
    whole = [200, "0123456789", 'attachment; filename="a.txt"']
    assert json.loads(html.unescape(match[1])) == {
        "whole": whole,
        # H2O sends the whole of another version with nothing of the service's answer, as its page says.
        "part": "hidden" if kind == "h2o" else whole,
        "known": whole,
        "beyond": [416],
        "missing": [404],
        "refused": [403],
        "closed": "hidden",
    }
