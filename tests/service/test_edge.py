"""`[sources.NAME.edge]`: what the settings refuse, and that the service redirects as they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from downloadview_async import ConfigurationError, signer_kinds
from downloadview_async.service import source_settings
from downloadview_async.service.app import build
from downloadview_async.service.check.run import check
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.settings import Settings
from downloadview_async.testing import call
from tests.live import live
from tests.servers import PROJECT

SECRET = "0123456789abcdef0123456789abcdef"
KEY = (
    ec.generate_private_key(ec.SECP256R1())
    .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    .decode()
)
EDGE = {"kind": "bunny", "url": "https://zone.b-cdn.net/files/", "secret": SECRET}
ROUTE = {"path": "/files/{path:path}", "source": "files", "send": "redirect"}


def settings_of(
    tmp_path: Path, edge: dict[str, Any] | None, environ: dict[str, str] | None = None, **source: Any
) -> Settings:
    (tmp_path / "files").mkdir(exist_ok=True)
    (tmp_path / "files" / "a.zip").write_bytes(b"PK")
    file = tmp_path / "downloadview.toml"
    file.write_text("")
    table = (source or {"type": "path", "root": "files"}) | ({} if edge is None else {"edge": edge})
    tables = {"DOWNLOADVIEW_SOURCES": json.dumps({"files": table}), "DOWNLOADVIEW_ROUTES": json.dumps([ROUTE])}
    return load_settings(file, environ=tables | (environ or {}))


def app_of(tmp_path: Path, edge: dict[str, Any], environ: dict[str, str] | None = None, **source: Any) -> Starlette:
    return build(settings_of(tmp_path, edge, environ, **source))


@pytest.mark.asyncio
@pytest.mark.parametrize("source", [{}, {"type": "storage", "url": "file:files"}], ids=["path", "storage"])
async def test_a_route_redirects_to_the_edge(tmp_path: Path, source: dict[str, Any]) -> None:
    answer = await call(app_of(tmp_path, EDGE, **source), "/files/a.zip")
    assert answer.status == 307
    assert re.fullmatch(
        r"https://zone\.b-cdn\.net/files/a\.zip\?token=HS256-[\w-]{43}&expires=\d{10}", answer.headers["location"]
    )
    assert answer.headers["cache-control"] == "private, max-age=300"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "source",
    [
        {"type": "remote", "url": "https://files.example.org/pub"},
        {"type": "storage", "url": "s3://bucket/top", "options": {"access_key_id": "a", "secret_access_key": "b"}},
        {"type": "storage", "url": "gs://bucket/top", "options": {"skip_signature": "true"}},
        {"type": "storage", "url": "az://box/top", "options": {"account_name": "a", "account_key": "QUJD"}},
    ],
    ids=["remote", "s3", "gcs", "azure"],
)
async def test_without_checks_a_route_redirects_and_asks_no_other_server(
    tmp_path: Path, source: dict[str, Any]
) -> None:
    """None of these servers can be reached here."""
    app = app_of(tmp_path, {**EDGE, "checks": False, "origin": "s3"}, **source)
    answer = await call(app, "/files/sub/a b.pdf")
    assert answer.status == 307
    assert answer.headers["location"].startswith("https://zone.b-cdn.net/files/sub/a%20b.pdf?token=HS256-")
    assert "response-content-type=application%2Fpdf" in answer.headers["location"]


@pytest.mark.asyncio
async def test_secrets_and_keys_come_from_variables(tmp_path: Path) -> None:
    edge = {name: value for name, value in EDGE.items() if name != "secret"}
    app = app_of(tmp_path, edge, {"DOWNLOADVIEW_SOURCES__FILES__EDGE__SECRET": SECRET})
    assert (await call(app, "/files/a.zip")).status == 307
    cloudfront = {"kind": "cloudfront", "url": "https://d111.cloudfront.net/", "key_id": "K2JCJMDEHXQW5F"}
    app = app_of(tmp_path, cloudfront, {"DOWNLOADVIEW_SOURCES__FILES__EDGE__PRIVATE_KEY": KEY})
    assert "&Key-Pair-Id=K2JCJMDEHXQW5F" in (await call(app, "/files/a.zip")).headers["location"]
    (tmp_path / "key.pem").write_text(KEY)
    app = app_of(tmp_path, {**cloudfront, "private_key": "key.pem", "cookies": True})
    answer = await call(app, "/files/a.zip")
    assert answer.headers["location"] == "https://d111.cloudfront.net/a.zip"
    assert answer.headers["set-cookie"].startswith("CloudFront-")


@pytest.mark.asyncio
async def test_a_delegation_key_is_a_function_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "edge_keys.py").write_text(
        "from datetime import UTC, datetime, timedelta\n"
        "def delegation_key():\n"
        "    names = ('signed_oid', 'signed_tid', 'signed_start', 'signed_service', 'signed_version')\n"
        "    until = datetime.now(UTC) + timedelta(hours=2)\n"
        "    return dict.fromkeys(names, 'x') | {'signed_expiry': until.isoformat(), 'value': 'a' * 64}\n"
    )
    url = "https://account.blob.core.windows.net/box/"
    edge = {"kind": "azure", "url": url, "delegation_key": "edge_keys:delegation_key", "expires": 60}
    location = (await call(app_of(tmp_path, edge), "/files/a.zip")).headers["location"]
    assert location.startswith(f"{url}a.zip?sp=r&se=")
    assert "&skoid=x&" in location
    assert "rscd=attachment" in location


def test_secrets_are_not_in_the_repr_of_the_settings(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, {**EDGE, "expires": "1h"})
    assert "zone.b-cdn.net" in repr(settings.sources)
    assert SECRET not in repr(settings)
    edge = source_settings.edge_of(settings.sources["files"])
    assert edge is not None
    assert edge.expires == 3600


WRONG: list[tuple[dict[str, Any] | None, dict[str, Any], str]] = [
    (None, {}, r"routes\[0\].send: 'files' has no presigned URLs .* or \[sources.files.edge\]"),
    ({**EDGE, "kind": "bunnny"}, {}, "sources.files.edge.kind: .* give one of azure, bunny"),
    ({"kind": "bunny", "secret": SECRET}, {}, "sources.files.edge.url: missing"),
    ({**EDGE, "sekret": "x"}, {}, "sources.files.edge.sekret: unknown key: did you mean 'secret'"),
    ({**EDGE, "key_id": "x"}, {}, "sources.files.edge.key_id: bunny.net has no such option: use one of origin, secret"),
    ({**EDGE, "secret": "short"}, {}, "sources.files.edge.secret: shorter than 16 bytes"),
    ({**EDGE, "url": "zone.b-cdn.net"}, {}, "sources.files.edge.url: 'zone.b-cdn.net' is not the URL of an edge"),
    ({**EDGE, "expires": "soon"}, {}, "sources.files.edge.expires: 'soon' is not a time"),
    ({**EDGE, "expires": 0}, {}, "sources.files.edge.expires: 0.0 is not a time"),
    ({**EDGE, "expires": "99y"}, {}, "sources.files.edge.expires: '99y' is not a time"),
    ({**EDGE, "expires": "9999d"}, {}, "sources.files.edge: expires is .* can be valid for 1 to"),
    (EDGE, {"type": "storage", "url": "memory://"}, "sources.files.edge: no other server has the files"),
    (
        EDGE,
        {"type": "storage", "url": "s3://b", "presign": {}},
        "sources.files.edge: a source cannot have both edge and presign",
    ),
    (
        EDGE,
        {"type": "remote", "url": "https://x", "cache": {"path": "cache"}},
        "sources.files.edge: a source cannot have both edge and cache",
    ),
    ({"kind": "azure", "url": "https://a.blob.core.windows.net/", "delegation_key": "nothing:here"}, {}, "imported"),
    (
        {"kind": "cloudfront", "url": "https://x.org/", "key_id": "K2JCJMDEHXQW5F", "private_key": "none.pem"},
        {},
        "sources.files.edge.private_key: '/.*/none.pem' cannot be read",
    ),
]


@pytest.mark.parametrize("edge, source, said", WRONG)
def test_what_does_not_fit_is_refused_at_the_start(
    tmp_path: Path, edge: dict[str, Any] | None, source: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        build(settings_of(tmp_path, edge, **source))
    assert SECRET not in str(caught.value)


def test_the_reference_says_which_kind_takes_which_option() -> None:
    page = (PROJECT / "docs" / "configuration.md").read_text()
    for name in source_settings.SIGNER_OPTIONS:
        takers = [
            f"`{kind.name}`" + (f" (`{default}` unless set)" if (default := kind.options[name].default) else "")
            for kind in signer_kinds().values()
            if name in kind.options
        ]
        assert f"| `{name}` | {', '.join(takers)} |" in page


@pytest.mark.asyncio
@pytest.mark.parametrize("status, result", [(206, "pass"), (403, "FAIL")])
async def test_the_check_follows_the_redirect_with_its_cookies(tmp_path: Path, status: int, result: str) -> None:
    heard: list[dict[str, str]] = []

    async def edge(request: Request) -> Response:
        heard.append(dict(request.headers))
        return Response(b"P", status, {"Content-Range": "bytes 0-0/2"})

    async with live(Starlette(routes=[Route("/{x:path}", edge)])) as at:
        url = f"http://127.0.0.1:{at}/files/"
        cloudfront = {"kind": "cloudfront", "url": url, "key_id": "K2JCJMDEHXQW5F", "private_key": KEY, "cookies": True}
        settings = settings_of(tmp_path, cloudfront)
        async with live(build(settings)) as port:
            direct = f"http://127.0.0.1:{port}"
            lines = [line async for line in check(settings, url=direct, direct=direct)]
    followed = lines[-1]
    assert (followed.result, followed.outcome[:3]) == (result, str(status))
    assert ("[sources.files.edge]" in followed.remedy) == (result == "FAIL")
    assert "CloudFront-Signature=" in heard[0]["cookie"]
    assert not any("Signature" in str(line) for line in lines)
