"""The service's `[sources.NAME.cache]`: what is read, what is refused, and what is served."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from downloadview_async import CachedSource, ConfigurationError, Download
from downloadview_async.service.app import build
from downloadview_async.service.source_settings import CacheSettings, cache_of
from downloadview_async.service.values import bytes_of, seconds_of
from tests.service.loading import load

FACTORY = """
from downloadview_async import VirtualFile

made = []

def make(name):
    def rows():
        made.append(name)
        yield f"{len(made)} {name}"
    return VirtualFile(rows, name=name, max_age=60)
"""
TEXT = """
[sources.reports]
type = "virtual"
factory = "FACTORY:make"
[sources.reports.cache]
path = "cache"
[[routes]]
path = "/reports/{path:path}"
source = "reports"
"""
RULE = '[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "cache"\ntarget = "/_cache/"\n'


@pytest.fixture
def text(tmp_path: Path) -> str:
    factory = f"factory_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{factory}.py").write_text(FACTORY)
    return TEXT.replace("FACTORY", factory)


@contextmanager
def client_of(directory: Path, text: str) -> Iterator[TestClient]:
    with TestClient(build(load(directory, text))) as client:
        yield client


@pytest.mark.parametrize(
    "value, expected",
    [
        *[
            (4096, 4096),
            ("4096", 4096),
            ("1KiB", 1024),
            ("500MB", 500_000_000),
            *[("100kB", 100_000), ("100KB", 100_000)],
            ("10GiB", 10 << 30),
            ("1 TiB", 1 << 40),
        ],
        *[("", None), ("-1", None), ("1.5GiB", None), ("10gib", None), ("GiB", None), ("٣", None), ("1e9", None)],
    ],
)
def test_sizes(value: int | str, expected: int | None) -> None:
    assert bytes_of(value) == expected


@pytest.mark.parametrize(
    "value, expected",
    [
        *[(90, 90.0), (0.5, 0.5), ("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("2h", 7200.0), ("1.5d", 129_600.0)],
        *[("", None), ("-1", None), (-1, None), ("1w", None), ("d", None), ("1e3", None), ("٣", None), ("inf", None)],
    ],
)
def test_times(value: float | str, expected: float | None) -> None:
    assert seconds_of(value) == expected


def test_the_defaults_and_relative_paths(tmp_path: Path, text: str) -> None:
    settings = load(tmp_path, text + RULE)
    expected = CacheSettings(path=str(tmp_path / "cache"), max_bytes=10 << 30, max_age=86_400.0)
    assert cache_of(settings.sources["reports"]) == expected
    assert settings.offload.rules[0].source == str(tmp_path / "cache")
    settings = load(tmp_path, text, DOWNLOADVIEW_SOURCES__REPORTS__CACHE__MAX_BYTES="1MiB")
    cache = cache_of(settings.sources["reports"])
    assert cache is not None
    assert cache.max_bytes == 1 << 20


@pytest.mark.parametrize(
    "change, message",
    [
        ('max_bytes = "much"', "sources.reports.cache.max_bytes: 'much' is not a size"),
        ("max_bytes = 0", "sources.reports.cache.max_bytes: 0 is not a size"),
        ('max_age = "soon"', "sources.reports.cache.max_age: 'soon' is not a time"),
        ("max_ages = 1", "sources.reports.cache.max_ages: unknown key: did you mean 'max_age'"),
        ('[sources.files]\ntype = "path"\nroot = "."', "sources.reports.cache.path: the source 'files' serves"),
        ('[sources.files]\ntype = "path"\nroot = "cache/x"', "sources.reports.cache.path: the source 'files' serves"),
        (
            '[sources.two]\ntype = "remote"\nurl = "https://x.example"\ncache = {path = "cache", max_bytes = 5}',
            "sources.two.cache: the cache '.*' of 'reports' has different limits",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, change: str, message: str) -> None:
    text = text.replace('path = "cache"\n', f'path = "cache"\n{change}\n')
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, text)


def test_a_path_source_has_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"sources\.files\.cache: unknown key"):
        load(tmp_path, '[sources.files]\ntype = "path"\nroot = "."\ncache = {path = "c"}')


def test_a_directory_that_cannot_be_made_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(ConfigurationError, match=r"sources\.reports\.cache\.path: .*cannot be made"):
        build(load(tmp_path, text))


def test_a_cached_source_is_served_and_counted(tmp_path: Path, text: str) -> None:
    with client_of(tmp_path, text) as client:
        assert client.get("/reports/a", headers={"Range": "bytes=0-0"}).text == "1"
        for _ in range(3):
            assert client.get("/reports/a").text == "1 a"
        counters = client.get("/-/cache")
        assert counters.headers["cache-control"] == "no-store"
        counts = {"hits": 3, "misses": 1, "revalidated": 0, "stale": 0, "passed": 0, "bytes": 8192, "evictions": 0}
        assert counters.json() == {"reports": counts}
    with client_of(tmp_path, text) as client:  # after a restart
        assert client.get("/-/cache").json()["reports"]["bytes"] == 8192
        assert client.get("/reports/a").text == "1 a"


def test_without_a_cache_there_is_no_such_page(tmp_path: Path, text: str) -> None:
    text = text.replace('[sources.reports.cache]\npath = "cache"\n', "")
    with client_of(tmp_path, text) as client:
        assert client.get("/-/cache").status_code == 404


def test_a_rule_has_the_proxy_send_what_is_complete(tmp_path: Path, text: str) -> None:
    with client_of(tmp_path, text + RULE) as client:
        first = client.get("/reports/a", headers={"Range": "bytes=0-0"})
        second = client.get("/reports/a")
    assert "x-accel-redirect" not in first.headers or first.text == ""
    name = second.headers["x-accel-redirect"].removeprefix("/_cache/")
    assert (tmp_path / "cache" / name).read_bytes() == b"1 a"


def test_a_route_is_sent_by_a_proxy_that_has_the_cache(tmp_path: Path, text: str) -> None:
    by_proxy = f'{text}send = "proxy"\n'
    build(load(tmp_path, by_proxy + RULE))
    (tmp_path / "files").mkdir()
    other = '[sources.files]\ntype = "path"\nroot = "files"\n' + RULE.replace('"cache"', '"files"')
    with pytest.raises(
        ConfigurationError, match=r"no rule tells the proxy where the files of 'reports' are: .* source '.*/cache'"
    ):
        load(tmp_path, by_proxy + other)


def test_settings_that_share_a_directory_share_no_files(tmp_path: Path, text: str) -> None:
    """Their functions have one name, and are not the same."""
    factory = text.partition('factory = "')[2].partition(":")[0]
    for tenant in ("one", "two"):
        (tmp_path / tenant).mkdir()
        (tmp_path / tenant / f"{factory}_{tenant}.py").write_text(FACTORY.replace("{name}", f"{tenant}'s {{name}}"))
        shared = text.replace(factory, f"{factory}_{tenant}").replace('path = "cache"', 'path = "../cache"')
        with client_of(tmp_path / tenant, shared) as client:
            assert client.get("/reports/a", headers={"Range": "bytes=0-"}).text == f"1 {tenant}'s a"
            (name,) = [source.name for source in sources_of(client) if isinstance(source, CachedSource)]
            assert name.endswith(f" in {tmp_path / tenant}")


@pytest.mark.parametrize(
    "change",
    [
        ('endpoint = "http://127.0.0.1:9"', 'endpoint = "http://127.0.0.1:8"'),
        ('region = "a"', 'region = "b"\nvirtual_hosted_style_request = true'),
        ("s3://bucket", "s3://bucket/prefix"),
    ],
)
def test_another_store_is_another_source(tmp_path: Path, change: tuple[str, str]) -> None:
    lake = (
        '[sources.lake]\ntype = "storage"\nurl = "s3://bucket"\n[sources.lake.options]\nskip_signature = true\n'
        'endpoint = "http://127.0.0.1:9"\nregion = "a"\n[sources.lake.cache]\npath = "cache"\n'
        '[[routes]]\npath = "/{path:path}"\nsource = "lake"\n'
    )
    names = set()
    for text in (lake, lake.replace(*change)):
        with client_of(tmp_path, text) as client:
            names |= {source.name for source in sources_of(client) if isinstance(source, CachedSource)}
    assert len(names) == 2


def sources_of(client: TestClient) -> list[Any]:
    endpoints = [getattr(route, "endpoint", None) for route in client.app.routes]  # type: ignore[attr-defined]
    return [endpoint.source for endpoint in endpoints if isinstance(endpoint, Download)]


def test_a_link_to_the_cache_is_no_directory_to_serve(tmp_path: Path, text: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to("cache")
    served = '[sources.files]\ntype = "path"\nroot = "link"\n'
    with pytest.raises(ConfigurationError, match=r"sources\.reports\.cache\.path: the source 'files' serves"):
        load(tmp_path, text + served)


def test_sources_may_share_a_directory(tmp_path: Path, text: str) -> None:
    more = text.replace("sources.reports", "sources.others").replace("reports", "others")
    with client_of(tmp_path, text + more) as client:
        assert client.get("/reports/a", headers={"Range": "bytes=0-"}).text == "1 a"
        assert client.get("/others/a", headers={"Range": "bytes=0-"}).text == "2 a"
        assert client.get("/reports/a").text == "1 a"
