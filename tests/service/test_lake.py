"""Object stores in the service: settings, what is wrong with them, and downloads from a real S3 server."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from starlette.testclient import TestClient

from downloadview_async.service.app import build
from downloadview_async.service.source_settings import StorageSettings
from tests.s3 import BUCKET, DENIED_ID, KEY_ID, S3, SECRET
from tests.servers import free_port
from tests.service.loading import load, refusal

LAKE = """
[sources.lake]
type = "storage"
url = "s3://downloads/lake"
[sources.lake.options]
endpoint = "http://127.0.0.1:8333"
access_key_id = "AKID"
secret_access_key = "secret"
"""
PRESIGN = """
[sources.lake.presign]
expires = "10m"
public_endpoint = "https://files.example.org"
"""
ROUTE = """
[[routes]]
path = "/lake/{path:path}"
source = "lake"
"""
REDIRECT = f'{ROUTE}send = "redirect"\n'
FILES = '[sources.files]\ntype = "path"\nroot = "files"\n'
FILES_ROUTE = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'
NGINX = '[offload]\nbackend = "nginx"\n'
FILES_RULE = '[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'
LAKE_RULE = '[[offload.rules]]\nsource = "http://127.0.0.1:8333/downloads/"\ntarget = "/_lake/"\n'
S3_RULE = '[[offload.rules]]\nsource = "s3://downloads/lake"\ntarget = "/_lake/"\n'


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()


def test_the_settings_of_a_lake(tmp_path: Path) -> None:
    settings = load(tmp_path, LAKE + PRESIGN + REDIRECT)
    lake = settings.sources["lake"]
    assert isinstance(lake, StorageSettings)
    assert lake.options["endpoint"] == "http://127.0.0.1:8333"
    assert lake.presign is not None
    assert (lake.presign.expires, lake.presign.public_endpoint) == ("10m", "https://files.example.org")
    assert settings.routes[0].send == "redirect"
    build(settings)


def test_secrets_come_from_variables(tmp_path: Path) -> None:
    environ = {
        "DOWNLOADVIEW_SOURCES__LAKE__OPTIONS__SECRET_ACCESS_KEY": "12345",
        "DOWNLOADVIEW_SOURCES__LAKE__OPTIONS__VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "DOWNLOADVIEW_SOURCES__LAKE__PRESIGN__EXPIRES": "1h",
    }
    lake = load(tmp_path, LAKE + ROUTE, **environ).sources["lake"]
    assert isinstance(lake, StorageSettings)
    assert lake.options["secret_access_key"] == "12345"
    assert lake.presign is not None
    assert lake.presign.expires == "1h"
    build(load(tmp_path, LAKE + ROUTE, **environ))


WRONG: list[tuple[str, str, str]] = [
    (f"{LAKE}nonsense = 1\n{ROUTE}", "sources.lake.options.nonsense", "nonsense"),
    (f"{LAKE}max_connections = 1\n{ROUTE}", "sources.lake.options.max_connections", "[sources.lake] itself"),
    (LAKE.replace("s3://downloads/lake", "s3://") + ROUTE, "sources.lake.url", "s3://BUCKET/PREFIX"),
    (f"{LAKE}[sources.lake.presign]\nexpire = 1\n{ROUTE}", "sources.lake.presign.expire", "did you mean 'expires'"),
    (f'{LAKE}[sources.lake.presign]\nexpires = "soon"\n{ROUTE}', "sources.lake.presign.expires", "such as 30s, 10m"),
    (f'{LAKE}[sources.lake.presign]\nexpires = "8d"\n{ROUTE}', "sources.lake.presign", "7 days"),
    (
        f'{LAKE}[sources.lake.presign]\npublic_endpoint = "files.example.org"\n{ROUTE}',
        "sources.lake.presign",
        "https://files.example.org",
    ),
    (LAKE + REDIRECT, "routes[0].send", "add [sources.lake.presign]"),
    (
        f'{LAKE}{PRESIGN}[sources.lake.cache]\npath = "cache"\n{REDIRECT}',
        "sources.lake.presign",
        "cannot have both presign and cache",
    ),
    (f'{FILES}{FILES_ROUTE}send = "redirect"\n', "routes[0].send", "choose proxy or stream"),
    (f'{FILES}{FILES_ROUTE}send = "sometimes"\n', "routes[0].send", "redirect, proxy or stream"),
    (f'{FILES}{FILES_ROUTE}send = "proxy"\n', "routes[0].send", "set offload.backend"),
    (
        f'{FILES}{LAKE}{ROUTE}send = "proxy"\n{NGINX}{FILES_RULE}',
        "routes[0].send",
        "with the source 's3://downloads/lake'",
    ),
    (
        f"{LAKE}{ROUTE}{NGINX}{S3_RULE.replace('downloads/lake', 'downloads/la')}",
        "offload.rules[0].source",
        "(s3://downloads/lake, http://127.0.0.1:8333/downloads/lake)",
    ),
    (f"{LAKE}{ROUTE}{NGINX.replace('nginx', 'apache')}{S3_RULE}", "offload: ", "X-Sendfile sends local files"),
    (f"{LAKE}{ROUTE}{NGINX.replace('nginx', 'h2o')}{S3_RULE}", "offload: ", "Keep these files in a cache"),
    *[
        (
            f'{LAKE}{ROUTE}send = "proxy"\n{NGINX.replace("nginx", backend)}{S3_RULE}',
            "routes[0].send",
            f"{backend} sends only local files, and those of 'lake' are not local: add [sources.lake.cache] and a rule",
        )
        for backend in ("apache", "lighttpd", "h2o", "litespeed")
    ],
    (
        f"{LAKE}{ROUTE}{NGINX}{S3_RULE}".replace('access_key_id = "AKID"\nsecret_access_key = "secret"\n', ""),
        "offload: ",
        "no access_key_id to sign URLs with",
    ),
    (
        '[sources.lake]\ntype = "storage"\nurl = "memory://"\n[sources.lake.options]\na = "b"\n' + ROUTE,
        "options",
        "only s3",
    ),
    (
        '[sources.lake]\ntype = "storage"\nurl = "memory://"\nmax_connections = 1\n' + ROUTE,
        "max_connections",
        "only s3",
    ),
    ('[sources.lake]\ntype = "storage"\nurl = "file:files"\n[sources.lake.presign]\n' + ROUTE, "presign", "only s3"),
    (
        '[sources.lake]\ntype = "storage"\nurl = "gs://bucket"\n[sources.lake.options]\nskip_signature = true\n'
        "[sources.lake.presign]\n" + ROUTE,
        "sources.lake.presign",
        "HMAC",
    ),
    (LAKE.replace('secret_access_key = "secret"\n', "") + PRESIGN + ROUTE, "sources.lake", "ecret"),
]


@pytest.mark.parametrize("text, key, said", WRONG)
def test_what_is_wrong_is_said_at_the_start(
    tmp_path: Path, text: str, key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    refused = refusal(tmp_path, text)
    assert key in refused
    assert said in refused


def test_secrets_are_in_no_error(tmp_path: Path) -> None:
    for text, _, _ in WRONG:
        assert '"secret"' not in refusal(tmp_path, text)


@pytest.mark.parametrize("url", ["s3://downloads/lake", "s3://downloads", "http://127.0.0.1:8333/downloads/"])
def test_rules_for_a_lake_are_accepted(tmp_path: Path, url: str) -> None:
    rule = LAKE_RULE.replace("http://127.0.0.1:8333/downloads/", url)
    build(load(tmp_path, f'{LAKE}{ROUTE}send = "proxy"\n{NGINX}{rule}'))


@pytest.mark.parametrize("backend", ["nginx", "h2o"])
def test_a_rule_for_a_cached_lake_is_for_its_cache(tmp_path: Path, backend: str) -> None:
    sending = f'{ROUTE}send = "proxy"\n{NGINX.replace("nginx", backend)}'
    cached = f'{LAKE}[sources.lake.cache]\npath = "cache"\n{sending}'
    build(load(tmp_path, f'{cached}[[offload.rules]]\nsource = "cache"\ntarget = "/_cache/"\n'))
    assert "no source has files below 's3://downloads/lake'" in refusal(tmp_path, cached + S3_RULE)


@pytest.mark.parametrize("backend", ["nginx", "caddy"])
def test_a_proxy_is_told_what_to_ask_a_real_server_for(s3: S3, tmp_path: Path, backend: str) -> None:
    s3.put("lake/a b/π.txt", b"0123456789", content_type="text/plain")
    app = lake(s3, tmp_path, f'{ROUTE}send = "proxy"\n{NGINX.replace("nginx", backend)}{S3_RULE}')
    with TestClient(app) as client:
        answer = client.get("/lake/a b/π.txt")
        assert (answer.status_code, answer.content, answer.headers["x-accel-redirect"]) == (200, b"", "/_lake/")
        assert client.head("/lake/a b/π.txt").headers["content-length"] == "10"
        assert client.get("/lake/none").status_code == 404
    target = answer.headers["x-offload-target"]
    assert target.startswith(f"/{BUCKET}/lake/a%20b/%CF%80.txt?")
    assert httpx2.get(s3.url + target).content == b"0123456789"


@pytest.mark.parametrize("send, offloaded", [("", True), ('send = "proxy"\n', True), ('send = "stream"\n', False)])
def test_a_route_chooses_how_it_sends(tmp_path: Path, send: str, offloaded: bool) -> None:
    app = build(load(tmp_path, f"{FILES}{FILES_ROUTE}{send}{NGINX}{FILES_RULE}"))
    (tmp_path / "files" / "a.txt").write_text("here")
    with TestClient(app) as client:
        answer = client.get("/files/a.txt")
    assert ("x-accel-redirect" in answer.headers) is offloaded
    assert answer.text == ("" if offloaded else "here")


def lake(s3: S3, directory: Path, more: str, change: tuple[str, str] = ("", "")) -> Any:
    text = LAKE.replace("http://127.0.0.1:8333", s3.url).replace("AKID", KEY_ID).replace('"secret"', f'"{SECRET}"')
    return build(load(directory, text.replace(*change) + more))


def test_downloads_from_a_real_server(s3: S3, tmp_path: Path) -> None:
    s3.put("lake/a b/π.txt", b"0123456789", content_type="text/plain")
    with TestClient(lake(s3, tmp_path, ROUTE)) as client:
        whole = client.get("/lake/a b/π.txt")
        assert (whole.status_code, whole.content) == (200, b"0123456789")
        assert client.get("/lake/a b/π.txt", headers={"Range": "bytes=-2"}).content == b"89"
        assert client.get("/lake/none").status_code == 404
        assert client.get("/lake/../first").status_code == 404


def test_redirects_to_a_real_server(s3: S3, tmp_path: Path) -> None:
    s3.put("lake/a b/π.txt", b"0123456789", content_type="text/plain")
    app = lake(s3, tmp_path, f'[sources.lake.presign]\nexpires = "30s"\n{REDIRECT}disposition = "inline"\n')
    with TestClient(app, follow_redirects=False) as client:
        answer = client.get("/lake/a b/π.txt")
        assert (answer.status_code, answer.headers["cache-control"]) == (307, "private, max-age=15")
        url = answer.headers["location"]
        assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["30"]
        assert urlsplit(url).path.startswith(f"/{BUCKET}/lake/")
        assert client.get("/lake/none").status_code == 404
    fetched = httpx2.get(url)
    assert (fetched.status_code, fetched.content) == (200, b"0123456789")
    assert fetched.headers["content-disposition"].startswith("inline; filename=")


def test_a_wrong_secret_is_a_502_on_a_route_that_redirects_too(
    s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    s3.put("lake/a.txt", b"0123456789")
    more = f'[sources.lake.presign]\nexpires = "30s"\n{REDIRECT}'
    with TestClient(lake(s3, tmp_path, more, (f'"{SECRET}"', '"another"')), follow_redirects=False) as client:
        answer = client.get("/lake/a.txt")
        assert (answer.status_code, answer.text) == (502, "Bad Gateway")
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "the store refuses the bucket or the credentials (SignatureDoesNotMatch)" in record.getMessage()
        ready = client.get("/-/readyz")
        assert (ready.status_code, ready.text) == (503, "lake\n")
    denied = lake(s3, tmp_path, more, (KEY_ID, DENIED_ID))
    with TestClient(denied, follow_redirects=False) as client:  # a store that denies one object may give others
        assert client.get("/lake/a.txt").status_code == 404


@pytest.mark.parametrize("counts", [True, False])
def test_a_redirect_has_the_id_of_the_request_if_downloads_are_counted(s3: S3, tmp_path: Path, counts: bool) -> None:
    s3.put("lake/a.txt", b"0123456789")
    database = '[accounts]\ndatabase = "sqlite+aiosqlite:///accounts.db"\n' if counts else ""
    with TestClient(lake(s3, tmp_path, PRESIGN + REDIRECT + database), follow_redirects=False) as client:
        answer = client.get("/lake/a.txt")
    ids = parse_qs(urlsplit(answer.headers["location"]).query).get("x-request-id", [])
    assert ids == ([answer.headers["x-request-id"]] if counts else [])


def test_readyz_names_a_store_that_cannot_be_reached(s3: S3, tmp_path: Path) -> None:
    with TestClient(lake(s3, tmp_path, ROUTE)) as client:
        answer = client.get("/-/readyz")
        assert (answer.status_code, answer.text) == (200, "ready\n")
    for change in ((s3.url, f"http://127.0.0.1:{free_port()}"), (f'"{SECRET}"', '"another"'), (KEY_ID, DENIED_ID)):
        app = lake(s3, tmp_path, ROUTE, change)
        with TestClient(app) as client:
            answer = client.get("/-/readyz")
            reached = change[0] == KEY_ID  # a store that denies one object may give others
            assert (answer.status_code, answer.text) == ((200, "ready\n") if reached else (503, "lake\n"))
            assert client.get("/-/livez").status_code == 200


def test_readyz_of_a_store_is_no_matter_of_how_many_ask(s3: S3, tmp_path: Path) -> None:
    with TestClient(lake(s3, tmp_path, ROUTE)) as client, ThreadPoolExecutor(60) as askers:
        answers = list(askers.map(lambda _: client.get("/-/readyz").status_code, range(300)))
    assert answers == [200] * 300


def test_readyz_gives_up_on_a_store_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downloadview_async.service.health._PATIENCE", 0.2)
    monkeypatch.setattr("downloadview_async.service.health._KEPT", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        text = LAKE.replace("http://127.0.0.1:8333", url)
        with TestClient(build(load(tmp_path, f'{text}[sources.lake.cache]\npath = "cache"\n{ROUTE}'))) as client:
            for _ in range(3):
                assert client.get("/-/readyz").text == "lake\n"
            (tmp_path / "cache" / "usage").unlink()
            (tmp_path / "cache").rmdir()
            assert client.get("/-/readyz").text == "lake\nlake.cache\n"
