"""Settings that nobody would write on purpose: each is refused on one line of bounded length, or means something."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from downloadview_async import ConfigurationError
from downloadview_async.cli import main
from downloadview_async.service.app import build, check_databases
from downloadview_async.service.config_loader import CONFIG, load_settings
from downloadview_async.service.logs import LONGEST
from downloadview_async.service.settings import OffloadSettings, RouteSettings, RuleSettings, ServerSettings
from downloadview_async.service.source_settings import (
    CacheSettings,
    EdgeSettings,
    ObjectSettings,
    PathSettings,
    PresignSettings,
    RemoteSettings,
    StorageSettings,
    VirtualSettings,
)
from downloadview_async.service.values import bytes_of, seconds_of

COMMAND = [sys.executable, "-m", "downloadview_async.cli", "serve"]
FILES = '[sources.files]\ntype = "path"\nroot = "files"\n'
ROUTE = '[[routes]]\npath = "/f/{path:path}"\nsource = "files"\n'


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_one_line(said: str) -> None:
    assert said.startswith("downloadview: ")
    assert said.endswith("\n")
    assert said[:-1].isprintable()
    assert len(said) < LONGEST + 100


def refused(directory: Path, text: str | bytes, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run `downloadview serve` on settings that it has to refuse, and return what it says."""
    file = directory / "hostile.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    variables = {CONFIG: None, **(env or {})}  # the command sets it
    result = CliRunner(env=variables).invoke(main, ["serve", "--config", "hostile.toml", *arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (2, "")
    assert_one_line(result.stderr)
    return result.stderr


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "a byte order mark": (
        b"\xef\xbb\xbf[server]\n",
        "not valid TOML: the file begins with a byte order mark of UTF-8: save it as UTF-8 without one",
    ),
    "UTF-16": (
        "[server]\n".encode("utf-16"),
        "not valid TOML: the file begins with a byte order mark of UTF-16: save it as UTF-8 without one",
    ),
    "UTF-16 without a mark": (
        "[server]\n".encode("utf-16-le"),
        "it has NUL characters, as UTF-16 has: save the file as UTF-8",
    ),
    "Latin-1": (
        b'[server]\nhost = "\xe9"\n',
        "not valid TOML: line 2 is not UTF-8: save the file as UTF-8",
    ),
    "a path of Windows": (
        b'[sources.a]\ntype = "path"\nroot = "C:\\data"\n',
        r"a backslash in double quotes begins an escape: write \\, or write the text in single quotes",
    ),
    "another path of Windows": (
        b'[sources.a]\ntype = "path"\nroot = "C:\\users"\r\n',
        "a backslash in double quotes begins an escape",
    ),
    "a text without quotes": (b"[server]\nhost = localhost\n", 'write a text in quotes, such as "files"'),
    "curly quotes": ("[server]\nhost = \u201clocalhost\u201d\n", 'write straight quotes: "'),
    "a colon": (b"[server]\nport: 8000\n", "write = between a key and its value, not :"),
    "JSON": (b'{"server": {"port": 8000}}\n', "it looks like JSON: write [server]"),
    "a NUL": (b"\0", "not valid TOML"),
    "a NUL in a text": (b'[server]\nhost = "\0"\n', "not valid TOML"),
    "lists in lists": (b"a = " + b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
    "tables in tables": (b"a = " + b"{a = " * 10_000 + b"1" + b"}" * 10_000, "nested too deeply"),
    "lists in lists of a known key": (b"[server]\nport = " + b"[" * 900 + b"]" * 900, "nested too deeply"),
    "some tables in tables": (
        b'[sources.a]\ntype="storage"\nurl="s3://x"\noptions = ' + b"{a = " * 150 + b"1" + b"}" * 150,
        "sources.a.options",
    ),
    "dots": (b".".join([b"a"] * 5_000) + b" = 1\n", "a: unknown key"),
    "an integer of thousands of digits": (b"[server]\nport = " + b"9" * 5000, "not valid TOML"),
    "a key twice": (b"a = 1\na = 2\n", "not valid TOML"),
    "a table twice": (b"[server]\n[server]\n", "not valid TOML"),
    "a date that is none": (b"[server]\nport = 2020-13-45\n", "not valid TOML"),
    "a date": (b"[server]\nport = 2020-12-31\n", "server.port: expected int, got"),
    "a list for the server": (b"[[server]]\nport = 1\n", "server: must be a table"),
    "a number for the server": ("server = 3\n", "server: must be a table"),
    "a list for a source": (b'[[sources.files]]\ntype = "path"\n', "sources.files: must be a table"),
    "a table for the routes": (
        '[routes]\npath = "/x"\n',
        "routes: expected array, got object: give tables, each written as [[routes]]",
    ),
    "a table for the rules": ('[offload.rules]\nsource = "x"\n', "offload.rules: expected array, got object"),
    "an escape in a key": ('"a\\u001b[31m\\nb" = 1\n', "a control character in the key 'a\\x1b[31m\\nb'"),
    "an escape in the name of a source": ('[sources."a\\n\\u001b"]\ntype = "path"\n', "a control character in the key"),
    "a direction mark in a value": ('[sources.a]\ntype = "\\u202e"\n', "unknown type '\\u202e'"),
    "an endless key": (
        b"a" * 100_000 + b" = 1\n",
        "unknown key: use one of accounts, archives, content_types, digests, limits, links, log, ",
    ),
    "an endless value": (b'[sources.a]\ntype = "' + b"x" * 100_000 + b'"\n', "characters ...]"),
    "an endless root": (f'[sources.a]\ntype = "path"\nroot = "{"a" * 5000}"\n', "sources.a.root"),
    "a NUL in a root": ('[sources.a]\ntype = "path"\nroot = "a\\u0000b"\n', "sources.a.root: a control character"),
    "a NUL in a cache": (
        '[sources.a]\ntype = "virtual"\nfactory = "m:f"\ncache = {path = "a\\u0000b"}\n',
        "sources.a.cache.path: a control character",
    ),
    "an encoded NUL": ('[sources.a]\ntype = "storage"\nurl = "file:///a%00b"\n', "sources.a.url: a control character"),
    "a line end behind a header": (
        f'{FILES}{ROUTE}cache_control = "private\\n"\n',
        "routes[0].cache_control: a control",
    ),
    "an endless header": (
        f'{FILES}{ROUTE}cache_control = "{"a" * 1025}"\n',
        "cache_control: expected str of length <=",
    ),
    "a URL with half a bracket": ('[sources.a]\ntype = "storage"\nurl = "s3://["\n', "'s3://[' is not a URL (Invalid"),
    "a remote URL with half a bracket": (
        '[sources.a]\ntype = "remote"\nurl = "http://[::1/"\n',
        "'http://[::1/' is not a URL (Invalid IPv6 URL)",
    ),
    "a port that is too large": ('[sources.a]\ntype = "remote"\nurl = "http://h:99999/"\n', "Port out of range"),
    "a port in letters": ('[sources.a]\ntype = "remote"\nurl = "http://h:port/"\n', "is not a URL"),
    "the port 0": ('[sources.a]\ntype = "remote"\nurl = "http://h:0/"\n', "has the port 0"),
    "options of a store that are none": (
        '[sources.a]\ntype = "storage"\nurl = "s3://b"\noptions = {client_options = "x"}\n',
        "sources.a.options.client_options: ",
    ),
    "a century of cache": (
        '[sources.a]\ntype = "virtual"\nfactory = "m:f"\ncache = {path = "c", max_age = "999999999999d"}\n',
        "sources.a.cache.max_age: '999999999999d' is not a time",
    ),
    "an endless age": (
        '[sources.a]\ntype = "virtual"\nfactory = "m:f"\ncache = {path = "c", max_age = inf}\n',
        "sources.a.cache.max_age: inf is not a time",
    ),
    "more bytes than there are": (
        '[sources.a]\ntype = "virtual"\nfactory = "m:f"\ncache = {path = "c", max_bytes = "999999999999999TiB"}\n',
        "sources.a.cache.max_bytes: '999999999999999TiB' is not a size",
    ),
    "a URL that is good for ages": (
        '[sources.a]\ntype = "storage"\nurl = "s3://b"\npresign = {expires = "9999999d"}\n',
        "sources.a.presign.expires: '9999999d' is too long: give at most 7d",
    ),
    "a descriptor that no int has": ("[server]\nfd = 2147483648\n", "server.fd: expected int <= 2147483647"),
    "more workers than processes": ("[server]\nworkers = 99999999999\n", "server.workers: expected int <= 1024"),
    "a backlog that no int has": ("[server]\nbacklog = 2147483648\n", "server.backlog: expected int <= 2147483647"),
    "an empty socket": ('[server]\nuds = ""\n', "server.uds: expected str of length >= 1"),
    **{
        f"{key} = {value}": (f"[server]\n{key} = {value}\n", f"server.{key}: expected ")
        for key, values in {
            "stall_timeout": ("nan", "inf", "-inf", "1e308", "31536001", "0", "-1", "1979-05-27"),
            "timeout_keep_alive": ("99999999999999999999", "31536001", "1.5", "-1"),
            "timeout_graceful_shutdown": ("99999999999999999999", "31536001", "true"),
            "minimum_rate": ("0.5", "inf", "[]", "0", "1000000001", "99999999999999999999"),
        }.items()
        for value in values
    },
    **{
        f"root_path {path}": (f'[server]\nroot_path = "{path}"\n', "server.root_path: ")
        for path in (
            "/",
            "a",
            "/a/",
            "//a",
            "/a//b",
            "/.",
            "/a/..",
            "/é",
            "/٣",
            "/%C3%A9",
            "/a b",
            "/a?b",
            "/a#b",
            "/a\\\\b",
            '/a\\"b',
            "/<a>",
            "/{a}",
            "/a\\n",
            "/a\\u0000",
        )
    },
    **{
        f"database {url}": (
            f'{FILES}[sources.d]\ntype="object"\ndatabase="{url}"\ntable="t"\nkey="k"\nfile="f"\nsource="files"\n',
            "sources.d: the database",
        )
        for url in (
            "x",
            "://",
            "postgresql+asyncpg://h:port/x",
            "postgresql+asyncpg://h:1e3/x",
            "postgresql+asyncpg://[::1/x",
            "sqlite:///d.db",
            "sqlite+aiosqlite:///gone.db",
            "sqlite+aiosqlite:///files",
            "sqlite+aiosqlite:///d.db?timeout=abc",
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_on_one_line(directory: Path, name: str) -> None:
    text, message = HOSTILE[name]
    (directory / "m.py").write_text("def f(name): ...")
    (directory / "d.db").touch()
    assert message in refused(directory, text)


VARIABLES = [
    ("DOWNLOADVIEW_SERVER", "3", "DOWNLOADVIEW_SERVER: server: must be a table"),
    ("DOWNLOADVIEW_SERVER", "[]", "DOWNLOADVIEW_SERVER: server: must be a table"),
    ("DOWNLOADVIEW_SERVER", "{", "DOWNLOADVIEW_SERVER: not valid JSON"),
    ("DOWNLOADVIEW_SERVER", '{"a":' * 10_000, "DOWNLOADVIEW_SERVER: objects or lists are nested too deeply"),
    ("DOWNLOADVIEW_SERVER", "[" * 100_000, "DOWNLOADVIEW_SERVER: objects or lists are nested too deeply"),
    ("DOWNLOADVIEW_SERVER", '{"port": NaN}', "server.port: expected int"),
    ("DOWNLOADVIEW_SERVER", '{"port": null}', "server.port: expected int"),
    ("DOWNLOADVIEW_SERVER", '{"port": %s}' % ("9" * 5000), "DOWNLOADVIEW_SERVER: not valid JSON"),
    ("DOWNLOADVIEW_SERVER", '{"host": "\\u0000"}', "server.host: a control character"),
    ("DOWNLOADVIEW_SERVER__HOST", "a\nb\x1b", "DOWNLOADVIEW_SERVER__HOST: server.host: a control character ('\\n')"),
    ("DOWNLOADVIEW_SERVER__\x1b", "1", "a control character in the key '\\x1b'"),
    ("DOWNLOADVIEW_SERVER__PORT", "9" * 5000, "server.port: expected int"),
    ("DOWNLOADVIEW_SERVER__PORT", "\u0663", "server.port: expected int"),
    ("DOWNLOADVIEW_SERVER__PORT", "8\udcff", "server: '8\\udcff' is not UTF-8"),
    ("DOWNLOADVIEW_SERVER__STALL_TIMEOUT", "\udcff", "server: '\\udcff' is not UTF-8"),
    ("DOWNLOADVIEW_SERVER__A\udcff", "1", "server: 'a\\udcff' is not UTF-8"),
    ("DOWNLOADVIEW_SERVER", '{"port": "\udcff"}', "server: '\\udcff' is not UTF-8"),
    ("DOWNLOADVIEW_A\udcff", "1", "unknown key"),
    ("DOWNLOADVIEW_SERVER__PORT__X", "1", "server.port: expected int, got object"),
    ("DOWNLOADVIEW_SERVER__STALL_TIMEOUT", "inf", "server.stall_timeout: expected float"),
    ("DOWNLOADVIEW_SERVER__STALL_TIMEOUT", "nan", "server.stall_timeout: expected float"),
    ("DOWNLOADVIEW_SOURCES", '{"a": {"type": "path", "root": "\\u0000"}}', "sources.a.root: a control character"),
    ("DOWNLOADVIEW_SOURCES", '{"a\\n": {}}', "a control character in the key 'a\\n'"),
    ("DOWNLOADVIEW_SERVER_" + "_" * 5000 + "PORT", "1", "unknown key: did you mean DOWNLOADVIEW_SERVER__PORT?"),
    ("DOWNLOADVIEW_ROUTES", "[null]", "routes[0]: expected object"),
    ("DOWNLOADVIEW_ROUTES__0__PATH", "x", "routes: expected array"),
    ("DOWNLOADVIEW_OFFLOAD", '{"rules": [1]}', "offload.rules[0]: expected object"),
    ("DOWNLOADVIEW_" + "__".join("A" * 5000), "1", "a: unknown key"),
]


@pytest.mark.parametrize("name, value, message", VARIABLES, ids=range(len(VARIABLES)))
def test_a_hostile_variable_is_refused_on_one_line(directory: Path, name: str, value: str, message: str) -> None:
    assert message in refused(directory, "", env={name: value})


def test_an_option_over_a_server_that_is_no_table(directory: Path) -> None:
    assert "server: must be a table" in refused(directory, "server = 3\n", "--port", "1")


def test_it_is_so_for_the_command_and_for_uvicorn(directory: Path) -> None:
    file = directory / "hostile.toml"
    file.write_bytes(b'"a\\u001b[31m\\nb" = 1\n')
    run = subprocess.run([*COMMAND, "--config", str(file)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert_one_line(run.stderr)


@pytest.mark.parametrize("path", ["", "/downloads", "/a/b.c", "/~a", "/a+b;c=d@e:f", "/..."])
def test_a_root_path_that_needs_no_encoding_is_taken(directory: Path, path: str) -> None:
    assert load_settings(None, environ={"DOWNLOADVIEW_SERVER__ROOT_PATH": path}).server.root_path == path


def test_a_key_of_a_store_may_have_lines(directory: Path) -> None:
    (directory / "s.toml").write_text(
        '[sources.a]\ntype = "storage"\nurl = "gs://b"\n[sources.a.options]\nkey = """a\nb"""'
    )
    source = load_settings("s.toml", environ={}).sources["a"]
    assert isinstance(source, StorageSettings)
    assert source.options == {"key": "a\nb"}


@pytest.mark.parametrize(
    "value, number",
    [
        (0, 0),
        (2**63 - 1, 2**63 - 1),
        (2**63, None),
        (-1, None),
        ("9223372036854775807", 2**63 - 1),
        ("8388607TiB", 8388607 * 2**40),
        ("8388608TiB", None),
        ("1 kB", 1000),
        ("1kB\n", None),
        ("٣", None),
    ],
)
def test_bytes(value: int | str, number: int | None) -> None:
    assert bytes_of(value) == number


@pytest.mark.parametrize(
    "value, number",
    [
        (0, 0.0),
        (1.5, 1.5),
        (float("nan"), None),
        (float("inf"), None),
        (-1, None),
        (1e308, None),
        ("36500d", 36500 * 86400.0),
        ("36501d", None),
        ("1m\n", None),
    ],
)
def test_seconds(value: float | str, number: float | None) -> None:
    assert seconds_of(value) == number


# --- any value of any key

EDGES = {
    "azure": {"secret": "QUJD" * 8, "account": "a"},
    "bunny": {"secret": "s" * 32},
    "cloudflare": {"secret": "s" * 32},
    "cloudfront": {"key_id": "K2JCJMDEHXQW5F", "private_key": "none.pem"},
    "gcs": {"key_id": "GOOG1E", "secret": "s" * 32},
    "hmac": {"secret": "s" * 32},
    "nginx": {"secret": "s" * 32},
}
SECTIONS: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "server": (ServerSettings, {"port": 0}),
    "path": (PathSettings, {"type": "path", "root": "files"}),
    "storage": (StorageSettings, {"type": "storage", "url": "file:files"}),
    "store": (StorageSettings, {"type": "storage", "url": "s3://b", "options": {"skip_signature": True}}),
    "object": (
        ObjectSettings,
        {
            "type": "object",
            "database": "sqlite+aiosqlite:///",
            "table": "t",
            "key": "k",
            "file": "f",
            "source": "files",
        },
    ),
    "remote": (RemoteSettings, {"type": "remote", "url": "http://127.0.0.1:9/"}),
    "virtual": (VirtualSettings, {"type": "virtual", "factory": "os.path:basename"}),
    "cache": (CacheSettings, {"path": "cache"}),
    "presign": (PresignSettings, {}),
    **{
        f"edge {kind}": (EdgeSettings, {"kind": kind, "url": "https://x.org/", **options})
        for kind, options in EDGES.items()
    },
    "routes": (RouteSettings, {"path": "/f/{path:path}", "source": "files"}),
    "offload": (OffloadSettings, {"backend": "nginx"}),
    "rules": (RuleSettings, {"source": "files", "target": "/_files/"}),
}
KEYS = [(section, key) for section, (kind, _) in SECTIONS.items() for key in kind.__struct_fields__]
HARMFUL = {("virtual", "factory"), ("server", "workers"), ("cache", "path"), ("server", "uds")} | {
    (f"edge {kind}", "delegation_key") for kind in EDGES
}
"""What runs the code that it names, or writes where it says."""

texts = st.text(alphabet=st.characters(), max_size=30) | st.sampled_from(
    [
        "/",
        "..",
        "s3://",
        "http://[",
        "http://h:x/",
        "file:",
        "file:%00",
        "\0",
        "a\n",
        "\x1b[0m",
        "{path}",
        "é",
        "*",
        "1d",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(where=st.sampled_from([key for key in KEYS if key not in HARMFUL]), value=values)
def test_any_value_of_any_key_is_taken_or_refused(directory: Path, where: tuple[str, str], value: Any) -> None:
    section, key = where
    tables = {name: {**table, **({key: value} if name == section else {})} for name, (_, table) in SECTIONS.items()}
    sources: dict[str, Any] = {"files": tables["path"]}
    for name in ("storage", "store", "object", "remote", "virtual"):
        sources[name] = tables[name]
    if section == "cache":
        sources["virtual"] |= {"cache": tables["cache"]}
    if section.startswith("edge"):
        sources["files"] |= {"edge": tables[section]}
    if section == "presign":
        sources["store"] |= {"presign": tables["presign"]}
    environ = {
        "DOWNLOADVIEW_SERVER": json.dumps(tables["server"]),
        "DOWNLOADVIEW_SOURCES": json.dumps(sources),
        "DOWNLOADVIEW_ROUTES": json.dumps([tables["routes"]]),
        "DOWNLOADVIEW_OFFLOAD": json.dumps({"rules": [tables["rules"]], **tables["offload"]}),
    }
    with contextlib.suppress(ConfigurationError):  # and nothing else
        settings = load_settings(None, environ=environ)
        build(settings)
        anyio.run(check_databases, settings)


def test_line_ends_of_windows_are_line_ends(directory: Path) -> None:
    (directory / "s.toml").write_bytes((FILES + ROUTE).replace("\n", "\r\n").encode())
    settings = load_settings("s.toml", environ={})
    assert settings.sources == {"files": PathSettings(root=str(directory / "files"))}
    assert [route.path for route in settings.routes] == ["/f/{path:path}"]
