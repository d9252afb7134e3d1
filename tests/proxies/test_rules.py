"""Rules and backends as tables: which location becomes which header, and which settings are refused."""

from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

import downloadview_async as dv
from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.rules import RuleTable
from tests.proxies.conftest import HOSTILE_NAMES


class _At:
    """A file of which only the location matters."""

    name = "file"

    def __init__(self, location: str | None) -> None:
        self.location = location

    def open(self, request: dv.DownloadRequest = dv.DownloadRequest()) -> Any:  # noqa: B008
        raise AssertionError("no backend opens a file")


RULES = [
    dv.Rule("/srv/media", "/_media/"),
    dv.Rule("/srv/media/public/", "/_public/"),
    dv.Rule("/srv/./other/../dots", "/_dots/"),
    dv.Rule("//srv//slashes//", "/_slashes/"),
    dv.Rule("http://files.example.org/pub", "/_remote/"),
    dv.Rule("https://files.example.org", "/_secure/"),
]


@pytest.mark.parametrize(
    "location, expected",
    [
        ("/srv/media/a.txt", ("/_media/", "a.txt")),
        ("/srv/media/a/b/c.txt", ("/_media/", "a/b/c.txt")),
        ("/srv/media/public/a.txt", ("/_public/", "a.txt")),
        ("/srv/media/public", ("/_media/", "public")),
        ("/srv/media/public-not/a.txt", ("/_media/", "public-not/a.txt")),
        ("/srv/media/..a", ("/_media/", "..a")),
        ("/srv/media/a.", ("/_media/", "a.")),
        ("/srv/media/...", ("/_media/", "...")),
        ("/srv/dots/a.txt", ("/_dots/", "a.txt")),
        ("/srv/slashes/a.txt", ("/_slashes/", "a.txt")),
        ("http://files.example.org/pub/a.txt", ("/_remote/", "a.txt")),
        ("https://files.example.org/a.txt", ("/_secure/", "a.txt")),
        # what a proxy can open, with room for another directory
        ("/srv/media/" + "a/" * 1939 + "aa", ("/_media/", "a/" * 1939 + "aa")),
        ("/srv/media/" + "a/" * 1939 + "aaa", None),
        ("/srv/media/" + "é" * 2000, None),
        ("http://files.example.org/pub/" + "a" * 4095, ("/_remote/", "a" * 4095)),
        # whole segments
        ("/srv/media-private/a.txt", None),
        ("/srv/medi", None),
        ("/srv/media", None),
        ("/srv/a.txt", None),
        ("/other/srv/media/a.txt", None),
        ("srv/media/a.txt", None),
        ("", None),
        ("http://files.example.org/public/a.txt", None),
        ("http://files.example.org.evil/pub/a.txt", None),
        ("http://user@files.example.org/pub/a.txt", None),
        ("https://files.example.org.evil/a.txt", None),
        # below the source by spelling alone
        ("/srv/media/", None),
        ("/srv/media/../secret", None),
        ("/srv/media/a/../../secret", None),
        ("/srv/media/..", None),
        ("/srv/media/./a.txt", None),
        ("/srv/media/a//b.txt", None),
        ("/srv/media/a/", None),
        # a header value has no line ends
        ("/srv/media/a\r\nX-Accel-Redirect: b", None),
        ("/srv/media/a\0", None),
        ("/srv/media/a\x7f", None),
    ],
)
def test_a_rule_covers_whole_segments_and_the_longest_wins(location: str, expected: tuple[str, str] | None) -> None:
    assert RuleTable(RULES).match(location) == expected
    assert RuleTable(RULES[::-1]).match(location) == expected


def test_the_root_is_a_source() -> None:
    table = RuleTable([dv.Rule("/", "/_all/"), dv.Rule("/srv", "/_srv/")])
    assert table.match("/etc/motd") == ("/_all/", "etc/motd")
    assert table.match("/motd") == ("/_all/", "motd")
    assert table.match("/srv/a") == ("/_srv/", "a")
    assert table.match("http://files.example.org/a") is None


@pytest.mark.parametrize(
    "rules, message",
    [
        ([], "at least one rule"),
        ([dv.Rule("/srv", "/_a/"), dv.Rule("/srv/", "/_b/")], "two offload rules"),
        ([dv.Rule("/srv/media/../x", "/_a/"), dv.Rule("/srv/x", "/_b/")], "two offload rules"),
        ([dv.Rule("media", "/_a/")], "absolute directory"),
        ([dv.Rule("", "/_a/")], "absolute directory"),
        ([dv.Rule("http://", "/_a/")], "absolute directory"),
        ([dv.Rule("ftp://files.example.org/", "/_a/")], "absolute directory"),
        ([dv.Rule("file:///srv/media", "/_a/")], "absolute directory"),
        ([dv.Rule("http://files.example.org/?a=b", "/_a/")], "absolute directory"),
        ([dv.Rule("http://files.example.org/#a", "/_a/")], "absolute directory"),
    ],
)
def test_rules_that_are_refused(rules: list[dv.Rule], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RuleTable(rules)


@pytest.mark.parametrize("make", [dv.XAccelRedirect, dv.XReproxyURL, dv.XLiteSpeedLocation])
@pytest.mark.parametrize("target", ["/_a/", "/_a/b/"])
def test_a_target_is_not_below_another_one(make: Any, target: str) -> None:
    """The proxy would send the file of that name from the directory of the other rule."""
    with pytest.raises(ConfigurationError, match=f"'{target}' is equal to or below '/_a/'"):
        make([dv.Rule("/srv/b", target), dv.Rule("/srv/a", "/_a/")])


# --- nginx

NGINX = dv.XAccelRedirect(RULES)


@pytest.mark.parametrize(
    "location, value",
    [
        ("/srv/media/plain.txt", "/_media/plain.txt"),
        ("/srv/media/a b.txt", "/_media/a%20b.txt"),
        ("/srv/media/50%25.txt", "/_media/50%2525.txt"),
        ("/srv/media/q?.txt", "/_media/q%3F.txt"),
        ("/srv/media/h#.txt", "/_media/h%23.txt"),
        ("/srv/media/π.txt", "/_media/%CF%80.txt"),
        ("/srv/media/a\\b", "/_media/a%5Cb"),
        ("/srv/media/latin-\udce9.txt", "/_media/latin-%E9.txt"),  # bytes that are no UTF-8
        ("/elsewhere/a.txt", None),
        (None, None),
    ],
)
def test_x_accel_redirect_is_a_percent_encoded_uri(location: str | None, value: str | None) -> None:
    assert NGINX.headers_for(_At(location)) == (None if value is None else {"x-accel-redirect": value})


@pytest.mark.parametrize(
    "location, target, asked",
    [
        # a URL is encoded already, and is asked for as it is
        ("http://files.example.org/pub/a%20b.txt", "/_remote/", "/pub/a%20b.txt"),
        ("http://files.example.org/pub/50%2525.txt", "/_remote/", "/pub/50%2525.txt"),
        ("http://files.example.org/pub/q%3F.txt", "/_remote/", "/pub/q%3F.txt"),
        ("http://files.example.org/pub/%252e%252e", "/_remote/", "/pub/%252e%252e"),
        ("http://files.example.org/pub/latin-%E9.txt", "/_remote/", "/pub/latin-%E9.txt"),
        ("http://files.example.org/pub/a%21!.txt", "/_remote/", "/pub/a%21!.txt"),
        ("http://files.example.org/pub/a.txt?version=2&b=%2F", "/_remote/", "/pub/a.txt?version=2&b=%2F"),
        ("https://files.example.org/@evil.example.org/a.txt", "/_secure/", "/@evil.example.org/a.txt"),
        # a proxy might ask for something else
        ("http://files.example.org/pub/a.txt#part", None, None),
        ("http://files.example.org/pub/a%2Fb.txt", None, None),
        ("http://files.example.org/pub/%2e%2e/b.txt", None, None),
        ("http://files.example.org/pub/.%2E/b.txt", None, None),
        ("http://files.example.org/pub/a%0D%0Ab.txt", None, None),
        ("http://files.example.org/pub/a%00.txt", None, None),
        ("http://files.example.org/pub/a b.txt", None, None),
        ("http://files.example.org/pub/{env.HOME}.txt", None, None),
        ("http://files.example.org/pub/a.txt?{env.HOME}", None, None),
        ("http://files.example.org/pub/π.txt", None, None),
    ],
)
def test_what_is_asked_of_another_server_is_beside_a_target_that_is_constant(
    location: str, target: str | None, asked: str | None
) -> None:
    expected = None if target is None else {"x-accel-redirect": target, "x-offload-target": asked}
    assert NGINX.headers_for(_At(location)) == expected


KEY = {"access_key_id": "a", "secret_access_key": "b", "region": "eu-west-1"}


def _store(url: str, **options: Any) -> dv.ObjectStorage:
    return dv.ObjectStorage(url, **(KEY | options))


@pytest.mark.parametrize(
    "source, storages, name, asked",
    [
        ("s3://box/a", [("s3://box/a", {})], "x/50%.txt", "/box/a/x/50%25.txt"),
        ("s3://box/a/", [("s3://box/a/", {})], "x.txt", "/box/a/x.txt"),
        ("s3://box", [("s3://box/a", {})], "x.txt", "/box/a/x.txt"),
        ("s3://box/a/b", [("s3://box/a", {})], "b/x.txt", "/box/a/b/x.txt"),
        ("s3://box/a/b", [("s3://box/a", {})], "bx/x.txt", None),
        ("s3://box/a", [("s3://box/a", {"endpoint": "http://127.0.0.1:8333"})], "x.txt", "/box/a/x.txt"),
        ("s3://box/a", [("s3://box/a", {"virtual_hosted_style_request": True})], "x.txt", "/a/x.txt"),
        ("s3://box", [("s3://box/a", {}), ("s3://box/b", {})], "x.txt", "/box/a/x.txt"),
        ("https://s3.eu-west-1.amazonaws.com/box/", [("s3://box/a", {})], "x.txt", "/box/a/x.txt"),
    ],
)
@pytest.mark.asyncio
async def test_what_is_asked_of_a_store_is_signed(
    source: str, storages: list[tuple[str, dict[str, Any]]], name: str, asked: str | None
) -> None:
    stores = [_store(url, **options) for url, options in storages]
    file = await dv.StorageSource(stores[0]).resolve(name)
    backend = dv.XAccelRedirect([dv.Rule(source, "/_lake/")], storages=stores)
    plain = backend.headers_for(file)
    if asked is None:
        assert plain is None
        return
    assert plain is not None
    assert plain["x-offload-target"] == asked
    signed = await backend.signed(file, plain)
    path, _, query = signed["x-offload-target"].partition("?")
    assert path == asked
    assert {"X-Amz-Credential", "X-Amz-Signature", "X-Amz-Expires"} < parse_qs(query).keys()
    assert {**signed, "x-offload-target": asked} == plain


@pytest.mark.asyncio
async def test_a_url_with_a_query_is_not_signed_once_more() -> None:
    store = _store("s3://box", endpoint="http://h")
    backend, file = dv.XAccelRedirect([dv.Rule("http://h", "/_h/")], storages=[store]), _At("http://h/box/a?X-Amz-x=y")
    headers = backend.headers_for(file)
    assert headers == {"x-accel-redirect": "/_h/", "x-offload-target": "/box/a?X-Amz-x=y"}
    assert await backend.signed(file, headers) == headers


@pytest.mark.parametrize(
    "rules, storages, message",
    [
        (["s3://box"], [], "no storage is at"),
        (["s3://box"], [("s3://boxes", {})], "no storage is at"),
        (["s3://box/a"], [("s3://box/ab", {})], "no storage is at"),
        (["gs://box"], [("gs://box", {"skip_signature": True})], "no storage is at"),
        (["s3://box"], [("s3://box/a", KEY), ("s3://box/b", KEY | {"endpoint": "http://h"})], "more than one endpoint"),
        (["s3://box"], [("s3://box", {})], "no access_key_id"),
        (["https://s3.us-east-1.amazonaws.com/box/"], [("s3://box/a", {})], "no access_key_id"),
        (["s3://box", "https://s3.eu-west-1.amazonaws.com/box"], [("s3://box", KEY)], "two offload rules"),
    ],
)
def test_stores_that_are_refused(
    rules: list[str], storages: list[tuple[str, dict[str, Any]]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    stores = [dv.ObjectStorage(url, **options) for url, options in storages]
    with pytest.raises(ConfigurationError, match=message):
        dv.XAccelRedirect([dv.Rule(source, f"/_{number}/") for number, source in enumerate(rules)], storages=stores)


@pytest.mark.asyncio
async def test_what_needs_no_signature_has_none() -> None:
    public, private = _store("s3://box", skip_signature=True), dv.ObjectStorage("s3://elsewhere")
    backend = dv.XAccelRedirect([dv.Rule("s3://box", "/_lake/"), dv.Rule("/srv", "/_srv/")], storages=[public, private])
    for file in (await dv.StorageSource(public).resolve("a.txt"), _At("/srv/a")):
        headers = backend.headers_for(file)
        assert headers is not None
        assert await backend.signed(file, headers) == headers


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {}),
        ({"buffering": True}, {"x-accel-buffering": "yes"}),
        ({"buffering": False}, {"x-accel-buffering": "no"}),
        ({"charset": "utf-8"}, {"x-accel-charset": "utf-8"}),
        ({"charset": "off"}, {"x-accel-charset": "off"}),
        ({"expires": "off"}, {"x-accel-expires": "off"}),
        ({"expires": 0}, {"x-accel-expires": "0"}),
        ({"expires": 3600}, {"x-accel-expires": "3600"}),
        ({"limit_rate": 0}, {"x-accel-limit-rate": "0"}),
        ({"limit_rate": 1_000_000}, {"x-accel-limit-rate": "1000000"}),
    ],
)
def test_the_options_of_nginx(options: dict[str, Any], expected: dict[str, str]) -> None:
    backend = dv.XAccelRedirect([dv.Rule("/srv", "/_srv/")], **options)
    assert backend.headers_for(_At("/srv/a")) == {"x-accel-redirect": "/_srv/a", **expected}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"charset": ""}, "not a charset"),
        ({"charset": "utf-8\r\nX: y"}, "not a charset"),
        ({"expires": -1}, "expires"),
        ({"expires": 1.5}, "expires"),
        ({"expires": True}, "expires"),
        ({"expires": "3600"}, "expires"),
        ({"limit_rate": -1}, "limit_rate"),
        ({"limit_rate": True}, "limit_rate"),
        ({"limit_rate": "1k"}, "limit_rate"),
    ],
)
def test_options_that_nginx_would_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        dv.XAccelRedirect([dv.Rule("/srv", "/_srv/")], **options)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "/",
        "_srv/",
        "/_srv",
        "_srv",
        "/_srv//",
        "//_srv/",
        "/../",
        "/a/../b/",
        "/./",
        "/.srv/",
        "/a b/",
        "/a%20b/",
        "/a?/",
        "/π/",
        "/_srv/\n",
        "@named",
        "http://files.example.org/",
    ],
)
def test_targets_that_are_no_internal_location(target: str) -> None:
    with pytest.raises(ConfigurationError, match="slash at both ends"):
        dv.XAccelRedirect([dv.Rule("/srv", target)])


# --- H2O and LiteSpeed

LOCAL_RULES = [rule for rule in RULES if rule.source.startswith("/")]


@pytest.mark.parametrize(
    "location, value, plain",
    [
        ("/srv/media/plain_-~.txt", "/_media/plain_-~.txt", True),
        ("/srv/media/public/a/B.1", "/_public/a/B.1", True),
        ("/srv/media/a b.txt", "/_media/a%20b.txt", False),
        ("/srv/media/50%25.txt", "/_media/50%2525.txt", False),
        ("/srv/media/%2e%2e", "/_media/%252e%252e", False),
        ("/srv/media/q?.txt", "/_media/q%3F.txt", False),
        ("/srv/media/a+b;c.txt", "/_media/a%2Bb%3Bc.txt", False),
        ("/srv/media/latin-\udce9.txt", "/_media/latin-%E9.txt", False),
        ("/srv/media-private/a.txt", None, False),
        ("/srv/media/../a.txt", None, False),
        (None, None, False),
    ],
)
def test_an_internal_uri_for_h2o_and_for_litespeed(location: str | None, value: str | None, plain: bool) -> None:
    order = dv.XReproxyURL(LOCAL_RULES).headers_for(_At(location))
    assert order == (None if value is None else {"x-reproxy-url": value})
    # how LiteSpeed reads a percent sign is not known here
    order = dv.XLiteSpeedLocation(LOCAL_RULES).headers_for(_At(location))
    assert order == ({"x-litespeed-location": value} if plain else None)


@pytest.mark.parametrize("backend", [dv.XReproxyURL, dv.XLiteSpeedLocation])
@pytest.mark.parametrize(
    "rule, message",
    [
        (dv.Rule("/srv", "_srv/"), "slash at both ends"),
        (dv.Rule("/srv", "http://127.0.0.1/"), "slash at both ends"),
    ],
)
def test_rules_that_they_do_not_take(backend: Any, rule: dv.Rule, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        backend([rule])


@pytest.mark.parametrize("source", ["https://files.example.org/", "s3://bucket/"])
def test_h2o_sends_local_files(source: str) -> None:
    """What it fetches it breaks off for slow clients: see docs/howto/h2o.md."""
    with pytest.raises(ConfigurationError, match=r"slower than that server\. Keep these files in a cache"):
        dv.XReproxyURL([dv.Rule("/srv", "/_srv/"), dv.Rule(source, "/_remote/")])


def test_litespeed_sends_local_files() -> None:
    with pytest.raises(ConfigurationError, match="not an absolute directory"):
        dv.XLiteSpeedLocation([dv.Rule("http://files.example.org/", "/_srv/")])


# --- Apache and lighttpd


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_x_sendfile_is_the_path_as_the_proxy_reads_it(name: str) -> None:
    rules = [dv.Rule("/srv/media", "/mnt/files of mine")]
    file = _At(f"/srv/media/{name}")
    raw = dv.XSendfile(rules, encoding="raw").headers_for(file)
    if name.endswith(" "):
        assert raw is None  # a header value would lose it
    else:
        assert raw is not None
        assert raw["x-sendfile"].encode("latin-1").decode() == f"/mnt/files of mine/{name}"
    percent = dv.XSendfile(rules, encoding="percent").headers_for(file)
    assert percent is not None
    value = percent["x-sendfile"]
    assert value.startswith("/mnt/files%20of%20mine/")
    assert value.isascii()
    assert not {" ", "?", "#", '"'} & {*value}


@pytest.mark.parametrize(
    "backend",
    [
        dv.XAccelRedirect,
        dv.XReproxyURL,
        dv.XLiteSpeedLocation,
        partial(dv.XSendfile, encoding="raw"),
    ],
    ids=["nginx", "h2o", "litespeed", "apache"],
)
def test_the_sides_of_a_rule_may_be_paths(backend: Any) -> None:
    source: Any = Path("/srv/media")
    (value,) = backend([dv.Rule(source, "/_media/")]).headers_for(_At("/srv/media/a.txt")).values()
    assert value == "/_media/a.txt"
    target: Any = Path("/mnt")
    assert dv.XSendfile([dv.Rule(source, target)], encoding="raw").headers_for(_At("/srv/media/a.txt")) == {
        "x-sendfile": "/mnt/a.txt"
    }


@pytest.mark.parametrize("target", ["/mnt", "/mnt/"])
def test_a_directory_is_the_same_with_and_without_its_slash(target: str) -> None:
    backend = dv.XSendfile([dv.Rule("/srv/", target)], encoding="percent")
    assert backend.headers_for(_At("/srv/a/b")) == {"x-sendfile": "/mnt/a/b"}
    assert backend.headers_for(_At("/srv-private/a")) is None
    assert backend.headers_for(_At(None)) is None


def test_bytes_that_are_no_text_are_sent_as_they_are() -> None:
    rules, file = [dv.Rule("/srv", "/srv")], _At("/srv/latin-\udce9.txt")
    assert dv.XSendfile(rules, encoding="raw").headers_for(file) == {"x-sendfile": "/srv/latin-\xe9.txt"}
    assert dv.XSendfile(rules, encoding="percent").headers_for(file) == {"x-sendfile": "/srv/latin-%E9.txt"}


@pytest.mark.parametrize(
    "rule",
    [
        dv.Rule("/srv", ""),
        dv.Rule("/srv", "mnt/"),
        dv.Rule("/srv", "/mnt/.."),
        dv.Rule("/srv", "/mnt/../etc"),
        dv.Rule("/srv", "/mnt/./a"),
        dv.Rule("/srv", "/mnt\r\nX-Sendfile: /etc"),
        dv.Rule("/srv", "http://files.example.org/"),
        dv.Rule("http://files.example.org/", "/mnt"),
        dv.Rule("srv", "/mnt"),
    ],
)
def test_targets_that_are_no_directory(rule: dv.Rule) -> None:
    with pytest.raises(ConfigurationError, match="absolute directory on both sides"):
        dv.XSendfile([rule], encoding="percent")


def test_an_encoding_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="encoding"):
        dv.XSendfile([dv.Rule("/srv", "/srv")], encoding="utf-8")  # type: ignore[arg-type]
