"""Users make signed links to files in a browser: what a link grants, and who may not make one."""

import base64
import html
import re
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import bcrypt
import pytest
from starlette.types import ASGIApp

from downloadview_async.service.app import build
from downloadview_async.service.config_loader import load_settings
from downloadview_async.testing import Recording, call
from tests.browser import CHROMIUM, browse
from tests.live import live

pytestmark = pytest.mark.asyncio
SETTINGS = f"""
[links]
keys = "2026a {"s" * 32}"
max_age = "2d"
STORE
[users]
file = "users"
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
hide = [".*"]
list = true
access = ["signed", "user:ada"]
[[routes]]
path = "/unshared/{{path:path}}"
source = "files"
list = true
access = ["user:ada"]
"""


def auth(name: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:secret".encode()).decode()}


ADA = auth("ada")
OURS = {"Sec-Fetch-Site": "same-origin", "Content-Type": "application/x-www-form-urlencoded", "Host": "x.example"}


@pytest.fixture
def app(tmp_path: Path, request: pytest.FixtureRequest) -> ASGIApp:
    store = getattr(request, "param", "")
    (tmp_path / "files" / "sub").mkdir(parents=True)
    for name in ("a <b>.txt", ".env"):
        (tmp_path / "files" / name).write_text("content")
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (tmp_path / "users").write_text(f"ada:{hashed}\nbob:{hashed}\n")
    (tmp_path / "downloadview.toml").write_text(SETTINGS.replace("STORE", store))
    return build(load_settings(tmp_path / "downloadview.toml", environ={}))


async def post(app: ASGIApp, path: str, headers: dict[str, str], **fields: str) -> Recording:
    body = urlencode(fields).encode()
    return await call(app, path, method="POST", query="share", headers=headers, body=body)


def link_of(page: Recording) -> str:
    match = re.search(r'readonly value="([^"]+)"', page.body.decode())
    assert match is not None, page.body
    return html.unescape(match[1])


async def opened(app: ASGIApp, link: str) -> Recording:
    parts = urlsplit(link)
    return await call(app, parts.path.replace("%20", " ").replace("%3C", "<").replace("%3E", ">"), query=parts.query)


async def test_a_user_makes_a_link(app: ASGIApp) -> None:
    view = await call(app, "/files/a <b>.txt", query="view", headers=ADA)
    assert b'<a href="?share">Share</a>' in view.body
    form = await call(app, "/files/a <b>.txt", query="share", headers=ADA)
    assert form.status == 200
    assert re.findall("<option value=([0-9]+)>", form.body.decode()) == ["3600", "86400", "172800"]
    assert b"name=uses" not in form.body  # there is no store that counts them
    made = await post(app, "/files/a <b>.txt", ADA | OURS, expires="3600", name="Für Bob.txt")
    assert made.status == 200
    assert made.headers["cache-control"] == "private, no-store"
    assert made.body.count(b"<svg") == 1
    assert b"viewBox=" in made.body  # so that a small window shows all of it
    link = link_of(made)
    assert link.startswith("http://x.example/files/a%20%3Cb%3E.txt?k=2026a&")
    answer = await opened(app, link)
    assert (answer.status, answer.body) == (200, b"content")
    assert "F%C3%BCr%20Bob.txt" in answer.headers["content-disposition"]


@pytest.mark.parametrize(
    "max_age, lives",
    [
        ("36h", {"1 hour": 3600, "1 day": 86_400, "36 hours": 129_600}),
        ("5400", {"1 hour": 3600, "90 minutes": 5400}),
        ("1h", {"1 hour": 3600}),
        ("1s", {"1 second": 1}),
        ("365d", {"1 hour": 3600, "1 day": 86_400, "7 days": 604_800, "30 days": 2_592_000, "365 days": 31_536_000}),
    ],
)
async def test_each_life_that_a_user_can_choose_is_what_its_text_says(
    app: ASGIApp, tmp_path: Path, max_age: str, lives: dict[str, int]
) -> None:
    settings = tmp_path / "downloadview.toml"
    settings.write_text(settings.read_text().replace('"2d"', f'"{max_age}"'))
    form = await call(build(load_settings(settings, environ={})), "/files/a <b>.txt", query="share", headers=ADA)
    options = re.findall("<option value=([0-9]+)>([^<]+)</option>", form.body.decode())
    assert {text: int(value) for value, text in options} == lives


@pytest.mark.parametrize("app", ['store = "memory:"'], indirect=True)
async def test_a_link_for_one_download(app: ASGIApp) -> None:
    made = await post(app, "/files/a <b>.txt", ADA | OURS, expires="3600", uses="1", name="")
    assert b"for 1 download." in made.body
    assert "&u=1&" in link_of(made)
    assert (await opened(app, link_of(made))).status == 200
    for uses in ("0", "-1", "x", "9" * 30, "٣"):
        refused = await post(app, "/files/a <b>.txt", ADA | OURS, expires="3600", uses=uses)
        assert b"Give a number of downloads" in refused.body, uses


@pytest.mark.parametrize("app", ['store = "memory:"'], indirect=True)
async def test_a_user_makes_a_link_to_a_folder(app: ASGIApp, tmp_path: Path) -> None:
    (tmp_path / "files" / "sub" / "b.txt").write_text("b")
    listing = (await call(app, "/files/sub/", headers=ADA)).body
    assert b'<a href="?share">Share</a>' in listing
    form = (await call(app, "/files/sub/", query="share", headers=ADA)).body
    assert b"Share <bdi>sub</bdi>" in form
    assert b"name=uses" not in form
    assert b"name=name" not in form
    assert b'<a href="./">Back</a>' in form
    made = await post(app, "/files/sub/", ADA | OURS, expires="3600", uses="1", name="x")  # which are not of folders
    link = link_of(made)
    assert link.startswith("http://x.example/files/sub/?k=2026a&")
    assert made.body.count(b"<svg") == 1
    page = await opened(app, link)
    assert page.status == 200
    assert b"?share" not in page.body
    assert b"b.txt?k=2026a&" in page.body
    assert (await opened(app, link.replace("?", "b.txt?"))).body == b"b"
    view = await opened(app, link.replace("?", "b.txt?view&"))
    assert b"?share" not in view.body
    for path in ("/files/", "/files/a <b>.txt", "/unshared/sub/"):
        assert (await call(app, path, query=urlsplit(link).query)).status in (401, 403)
    for path in ("/files/", "/files/sub/"):  # a link makes no other link
        refused = await post(app, f"{path}", OURS, expires="3600")
        assert refused.status == 401
        for query in (f"share&{urlsplit(link).query}", f"{urlsplit(link).query}&share"):
            answer = await call(app, path, method="POST", query=query, headers=OURS, body=b"expires=3600")
            assert answer.status == 405
            assert (await call(app, path, query=query)).status == 403
    assert b"Share <bdi>files</bdi>" in (await call(app, "/files/", query="share", headers=ADA)).body
    assert (await call(app, "/files/none/", query="share", headers=ADA)).status == 404


async def test_nobody_else_makes_links(app: ASGIApp) -> None:
    for method in ("GET", "POST", "HEAD"):
        for headers, status in (({}, 401), (auth("eve"), 401), (auth("bob"), 404)):
            answer = await call(app, "/files/a <b>.txt", method=method, query="share", headers=OURS | headers)
            assert answer.status == status
            assert b"<form" not in answer.body
    for path in ("/files/none", "/files/.env"):
        answer = await call(app, path, query="share", headers=ADA)
        assert (answer.status, answer.body) == (404, b"Not Found")
        assert (await post(app, path, ADA | OURS, expires="3600")).status == 404
    assert (await call(app, "/files/sub", query="share", headers=ADA)).status == 308
    assert (await post(app, "/unshared/a <b>.txt", ADA | OURS, expires="3600")).status == 405
    assert b"?share" not in (await call(app, "/unshared/a <b>.txt", query="view", headers=ADA)).body


async def test_a_path_that_is_not_utf_8(app: ASGIApp) -> None:
    scope = {"path": "/files/\ufffd", "raw_path": b"/files/%ff"}
    for headers, status in ((OURS, 401), (ADA | OURS, 404)):
        for method in ("GET", "POST"):
            answer = await call(app, "/", method=method, query="share", headers=headers, scope=scope)
            assert answer.status == status


async def test_a_link_makes_no_links(app: ASGIApp) -> None:
    link = urlsplit(link_of(await post(app, "/files/a <b>.txt", ADA | OURS, expires="3600")))
    for query in (f"{link.query}&share", "share"):
        assert (await call(app, "/files/a <b>.txt", method="POST", query=query, headers=OURS)).status in (401, 405)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://x.example"}, 403),
        ({"Origin": "http://x.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://x.example.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 403),
    ],
)
async def test_a_form_of_another_site_is_refused(app: ASGIApp, headers: dict[str, str], status: int) -> None:
    answer = await post(app, "/files/a <b>.txt", {**ADA, "Host": "x.example", **headers}, expires="3600")
    assert answer.status == status
    assert (b"readonly" in answer.body) == (status == 200)


async def test_wrong_fields_show_the_form_again(app: ASGIApp) -> None:
    for fields in ({}, {"expires": "1"}, {"expires": "99999999"}, {"expires": "3600", "name": "a\nb"}):
        answer = await post(app, "/files/a <b>.txt", ADA | OURS, **fields)
        assert (answer.status, b"role=alert" in answer.body) == (200, True)
    for body in (b"expires=" + b"9" * 5000, b"&".join(b"a=1" for _ in range(50))):
        answer = await call(app, "/files/a <b>.txt", method="POST", query="share", headers=ADA | OURS, body=body)
        assert (answer.status, b"role=alert" in answer.body) == (200, True)
    large = await call(app, "/files/a <b>.txt", method="POST", query="share", headers=ADA | OURS, body=b"x" * 10_000)
    assert large.status == 413


async def test_no_name_turns_the_direction_of_the_form(app: ASGIApp, tmp_path: Path) -> None:
    name = "\u202egpj.exe"
    (tmp_path / "files" / name).touch()
    (tmp_path / "files" / "\u2066dir").mkdir()
    for path in (f"/files/{name}", "/files/\u2066dir/"):
        for fields in ({}, {"expires": "3600", "name": "\ufffdgpj.exe"}):
            page = await post(app, path, ADA | OURS, **fields)
            assert page.status == 200
            assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.body.decode()), path
            assert "<bdi>\ufffd" in page.body.decode()
    made = await post(app, f"/files/{name}", ADA | OURS, expires="3600", name="\ufffdgpj.exe")
    assert "f=" not in urlsplit(link_of(made)).query  # the name that the form shows is that of the file


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium")
async def test_in_a_browser(app: ASGIApp, tmp_path: Path) -> None:
    import anyio

    async with live(app) as port:
        url = f"http://ada:secret@127.0.0.1:{port}/files/a%20%3Cb%3E.txt?share"
        seen = await anyio.to_thread.run_sync(browse, url, tmp_path / "p", "--dump-dom", "--enable-logging=stderr")
    assert "Content Security Policy" not in seen
    assert '<form method="post">' in seen
