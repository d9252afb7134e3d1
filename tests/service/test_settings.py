import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from downloadview_async import (
    Cache,
    ConfigurationError,
    Download,
    ObjectStorage,
    PathSource,
    RemoteSource,
    proxy_config,
)
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.cli import check
from downloadview_async.service.app import build
from downloadview_async.service.check.run import check as checks
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.schema import description_of
from downloadview_async.service.server import config_for
from downloadview_async.service.settings import RouteSettings, ServerSettings, Settings
from downloadview_async.service.source_settings import (
    CacheSettings,
    ObjectSettings,
    PathSettings,
    RemoteSettings,
    StorageSettings,
    VirtualSettings,
)
from downloadview_async.service.values import bytes_of, seconds_of

FILES = '[sources.files]\ntype = "path"\nroot = "files"\n'
ROUTE = '[[routes]]\npath = "/files/{path:path}"\nsource = "files"\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for settings, with a directory `files` in it."""
    (tmp_path / "files").mkdir()
    return tmp_path


def write(directory: Path, text: str) -> str:
    file = directory / "downloadview.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def load(directory: Path, text: str, environ: dict[str, str] | None = None, **options: Any) -> Settings:
    return load_settings(write(directory, text), environ=environ or {}, options=options)


def test_the_example_of_every_kind(directory: Path) -> None:
    settings = load(
        directory,
        """
        [server]
        host = "0.0.0.0"
        port = 9000
        [sources.files]
        type = "path"
        root = "files"
        symlinks = "deny"
        precompressed = ["br", "gzip"]
        [sources.media]
        type = "storage"
        url = "file:///srv/media"
        [sources.documents]
        type = "object"
        database = "sqlite+aiosqlite:///demo.db"
        table = "documents"
        key = "key"
        file = "path"
        filename = "title"
        content_type = "content_type"
        source = "files"
        [sources.mirror]
        type = "remote"
        url = "http://127.0.0.1:8000/files/"
        allow_hosts = ["127.0.0.1"]
        [sources.reports]
        type = "virtual"
        factory = "reports:make"
        [[routes]]
        path = "/files/{path:path}"
        source = "files"
        disposition = "inline"
        cache_control = "private"
        example = "hello.txt"
        [offload]
        backend = "nginx"
        limit_rate = 1000
        expires = "off"
        [[offload.rules]]
        source = "files"
        target = "/_files/"
        """,
    )
    assert settings.server == ServerSettings(host="0.0.0.0", port=9000)
    assert settings.sources == {
        "files": PathSettings(root=str(directory / "files"), symlinks="deny", precompressed=["br", "gzip"]),
        "media": StorageSettings(url="file:///srv/media"),
        "documents": ObjectSettings(
            database="sqlite+aiosqlite:///demo.db",
            table="documents",
            key="key",
            file="path",
            filename="title",
            content_type="content_type",
            source="files",
        ),
        "mirror": RemoteSettings(url="http://127.0.0.1:8000/files/", allow_hosts=["127.0.0.1"]),
        "reports": VirtualSettings(factory="reports:make"),
    }
    assert settings.routes == [
        RouteSettings(
            path="/files/{path:path}",
            source="files",
            disposition="inline",
            cache_control="private",
            example="hello.txt",
        )
    ]
    assert settings.offload.backend == "nginx"
    assert settings.offload.rules[0].source == str(directory / "files")
    assert (settings.offload.limit_rate, settings.offload.expires) == (1000, "off")


def test_defaults(directory: Path) -> None:
    settings = load(directory, "")
    assert settings.server == ServerSettings()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)
    assert settings.server.timeout_graceful_shutdown == 30
    assert settings.sources == {}
    assert settings.offload.backend is None


@pytest.mark.parametrize(
    "default, function, parameter",
    [
        (ServerSettings().stall_timeout, DownloadProtocol.__init__, "stall_seconds"),
        (ServerSettings().minimum_rate, DownloadProtocol.__init__, "minimum_rate"),
        (ServerSettings().stall_timeout, proxy_config, "stall_seconds"),
        (ServerSettings().timeout_keep_alive, proxy_config, "idle_seconds"),
        (ServerSettings().address, proxy_config, "service"),
        (PathSettings(root="x").symlinks, PathSource, "symlinks"),
        (PathSettings(root="x").names, PathSource, "names"),
        (RemoteSettings(url="x").max_connections, RemoteSource, "max_connections"),
        (RemoteSettings(url="x").connect_timeout, RemoteSource, "connect_timeout"),
        (RemoteSettings(url="x").read_timeout, RemoteSource, "read_timeout"),
        (RemoteSettings(url="x").names, RemoteSource, "names"),
        (bytes_of(CacheSettings(path="x").max_bytes), Cache, "max_bytes"),
        (seconds_of(CacheSettings(path="x").max_age), Cache, "max_age"),
        (RouteSettings(path="x", source="x").disposition == "attachment", Download, "attachment"),
        (next(option.default for option in check.params if option.name == "timeout"), checks, "timeout"),
    ],
)
def test_the_defaults_are_those_of_the_library(default: object, function: Callable[..., Any], parameter: str) -> None:
    assert default == inspect.signature(function).parameters[parameter].default


def test_the_description_of_a_store_names_the_default_of_the_library() -> None:
    (setting,) = (one for one in msgspec.structs.fields(StorageSettings) if one.name == "max_connections")
    default = inspect.signature(ObjectStorage).parameters["max_connections"].default
    assert str(description_of(setting.type)).endswith(f"by default {default}")


@pytest.mark.parametrize(
    "url, expected",
    [
        ("file:files", "file://{directory}/files"),
        ("file:a b", "file://{directory}/a%20b"),
        ("file:../other", "file://{parent}/other"),
        ("file:///srv/media", "file:///srv/media"),
        ("memory://", "memory://"),
    ],
)
def test_a_storage_may_be_beside_the_settings(directory: Path, url: str, expected: str) -> None:
    settings = load(directory, f'[sources.media]\ntype = "storage"\nurl = "{url}"')
    source = settings.sources["media"]
    assert isinstance(source, StorageSettings)
    assert source.url == expected.format(directory=directory, parent=directory.parent)


REFUSED = [
    # what is written, the key, and words of the remedy
    (
        "port = 8000",
        "port",
        "unknown key: write it below [server]",
    ),
    ('root = "files"', "root", "unknown key: write it below [sources.NAME]"),
    ('source = "files"', "source", "unknown key: write it below [[routes]] or [sources.NAME]"),
    ("[source.files]\ntype = 'path'", "source", "did you mean 'sources'?"),
    ('[sources]\ntype = "path"', "sources.type", "a source has a name: write its keys below such as [sources.files]"),
    (f'{FILES}[routes]\npath = "/x"', "routes", "give tables, each written as [[routes]] with two brackets"),
    (
        r"""[sources.a]
type = "path"
root = 'C:\data'""",
        "sources.a.root",
        "is a path of Windows: give one of this system",
    ),
    (
        r"""[log]
path = '\\server\share\log'""",
        "log.path",
        "is a path of Windows",
    ),
    (
        r"""[sources.a]
type = "path"
root = "C:\temp\""""
        + '"',
        "sources.a.root",
        "a control character ('\\t'): write the backslashes in single quotes",
    ),
    ("[servre]", "servre", "did you mean 'server'?"),
    ("[server]\nprot = 1", "server.prot", "did you mean 'port'?"),
    ('[server]\nport = "x"', "server.port", "give a TCP port, 0 to 65535"),
    ("[server]\nport = 70000", "server.port", "give a TCP port, 0 to 65535"),
    ("[server]\nworkers = 0", "server.workers", "1 to 1024"),
    ('[server]\nlog_level = "loud"', "server.log_level", "critical, error, warning"),
    ('[server]\nroot_path = "x/"', "server.root_path", "such as /downloads"),
    ("[server]\naccess_log = 1", "server.access_log", "true to log every request"),
    ("server = 1", "server", "write it as [server]"),
    ("sources = []", "sources", "write it as [sources]"),
    ("[server]\nhost = ''", "server.host", "0.0.0.0"),  # uvicorn would listen on all addresses
    ("offload = 1", "offload", "write it as [offload]"),
    ('routes = "x"', "routes", "expected array"),
    ("[sources]\nfiles = 1", "sources.files", "write it as [sources.files]"),
    ('[sources."a b"]\ntype = "path"', "sources.a b", "use letters, digits"),
    ("[sources.files]\nroot = 'x'", "sources.files.type", "give one of path, storage"),
    ("[sources.files]\ntype = 'paht'", "sources.files.type", "did you mean 'path'?"),
    ("[sources.files]\ntype = 'path'", "sources.files.root", "missing: give a directory"),
    ("[sources.files]\ntype = 'path'\nroot = ''", "sources.files.root", "give a directory"),
    (f"{FILES}rot = 'x'", "sources.files.rot", "did you mean 'root'?"),
    (f"{FILES}symlinks = 'some'", "sources.files.symlinks", "deny, inside or follow"),
    (f"{FILES}precompressed = ['rar']", "sources.files.precompressed[0]", '"br", "zstd" and "gzip"'),
    ("[sources.m]\ntype = 'remote'\nurl = 'http://x/'\nallow_hosts = 'y'", "sources.m.allow_hosts", "a list of hosts"),
    *[
        (
            f"[sources.m]\ntype = 'remote'\nurl = 'http://x/'\nallow_hosts = ['{host}']",
            "sources.m.allow_hosts[0]",
            "hosts",
        )
        for host in ("http://y", "y:80", "y/", "y z", "")
    ],
    ("[sources.m]\ntype = 'remote'\nurl = 'http://x/'\nread_timeout = 0", "sources.m.read_timeout", "more than 0"),
    ("[sources.v]\ntype = 'virtual'\nfactory = 'reports'", "sources.v.factory", "module:function"),
    (f"{FILES}[[routes]]\nsource = 'files'", "routes[0].path", "missing: give a path"),
    (f"{FILES}[[routes]]\npath = '/x/{{p}}'\nsource = 'flies'", "routes[0].source", "did you mean 'files'?"),
    (ROUTE, "routes[0].source", "there is no source 'files': none is defined yet"),
    (f"{FILES}{ROUTE}sorce = 1", "routes[0].sorce", "did you mean 'source'?"),
    (f"{FILES}[[routes]]\npath = '/x'\nsource = 'files'", "routes[0].path", "{path:path}"),
    (f"{FILES}[[routes]]\npath = 'x/{{p}}'\nsource = 'files'", "routes[0].path", "begin it with a slash"),
    (f"{FILES}[[routes]]\npath = '/{{a}}/{{b}}'\nsource = 'files'", "routes[0].path", "one parameter"),
    (f"{FILES}[[routes]]\npath = '/-/{{a}}'\nsource = 'files'", "routes[0].path", "choose another path"),
    (f"{FILES}{ROUTE}{ROUTE}", "routes[1].path", "the path of routes[0] too"),
    (f"{FILES}{ROUTE}{ROUTE.replace('path:', 'name:')}", "routes[1].path", "remove one or change it"),
    (
        f"{FILES}{ROUTE}{ROUTE.replace('{path:path}', '{name}')}",
        "routes[1].path",
        "never reached, because",
    ),
    (f"{FILES}{ROUTE}disposition = 'show'", "routes[0].disposition", "attachment or inline"),
    (f'{FILES}{ROUTE}cache_control = "a\\r\\nb"', "routes[0].cache_control", "remove it"),
    (f'{FILES}{ROUTE}cache_control = ""', "routes[0].cache_control", "omit it to send none"),
    (f"{FILES}{ROUTE}example = [1]", "routes[0].example[0]", "a file, or a list of files"),
    ("[offload]\nbackend = 'caddie'", "offload.backend", "nginx, apache, lighttpd, caddy, h2o or litespeed"),
    ("[offload]\nbakend = 'nginx'", "offload.bakend", "did you mean 'backend'?"),
    ("[offload]\nbackend = 'nginx'", "offload.rules", "no source is local, so the proxy sends nothing"),
    (f"{FILES}[[offload.rules]]\nsource = 'else'", "offload.rules[0].source", "no source has files below"),
    (f"{FILES}[[offload.rules]]\nsource = 'fil'", "offload.rules[0].source", "or remove the rule"),
    (f"{FILES}[[offload.rules]]\nsource = 'http://x/'", "offload.rules[0].source", "no source has files below"),
    (f"{FILES}[[offload.rules]]\nsorce = 'x'", "offload.rules[0].sorce", "did you mean 'source'?"),
    (f"{FILES}[offload]\nexpires = 'on'", "offload.expires", 'a number of seconds, or "off"'),
    (
        f"{FILES}[offload]\nbackend = 'nginx'\n[[offload.rules]]\nsource = './files'",
        "offload.rules[0].target",
        "/_files/",
    ),
    (
        f"{FILES}[offload]\nbackend = 'apache'\nlimit_rate = 1\n[[offload.rules]]\nsource = 'files'",
        "offload.limit_rate",
        "apache has no such option",
    ),
    (
        f"{FILES}[offload]\nbackend='nginx'\nencoding='raw'\n[[offload.rules]]\nsource='files'\ntarget='/_files/'",
        "offload.encoding",
        "remove it",
    ),
    (
        f"{FILES}[offload]\nbackend='caddy'\nencoding='percent'\n[[offload.rules]]\nsource='files'\ntarget='/_files/'",
        "offload.encoding",
        "caddy has no choice of encodings: remove it",
    ),
    (
        f"{FILES}[offload]\nbackend='caddy'\nbuffering=true\n[[offload.rules]]\nsource='files'\ntarget='/_files/'",
        "offload.buffering",
        "caddy has no such option",
    ),
    (
        f"{FILES}[offload]\nbackend='caddy'\n[[offload.rules]]\nsource='files'\ntarget='/_f/'\n"
        "[[offload.rules]]\nsource='files/x'\ntarget='/_F/'",
        "offload.rules[1].target",
        "Caddy ignores case, so '/_F/' is the same as '/_f/'",
    ),
    *[
        (
            f"{FILES}[offload]\nbackend = '{backend}'\n[[offload.rules]]\nsource = './files'",
            "offload.rules[0].target",
            f"{backend} needs an internal location",
        )
        for backend in ("caddy", "h2o", "litespeed")
    ],
]


@pytest.mark.parametrize(
    "backend, rules, expected",
    [
        ("nginx", "", [("files", "/_offload/files/"), ("cache", "/_offload/mirror/")]),
        ("apache", "", [("files", None), ("cache", None)]),
        ("nginx", "[[offload.rules]]\nsource = 'mirror'", [("cache", "/_offload/mirror/")]),
        ("nginx", "[[offload.rules]]\nsource = 'again'\ntarget = '/x/'", [("files", "/x/")]),
        ("apache", "[[offload.rules]]\nsource = 'files'", [("files", None)]),
        ("nginx", "[[offload.rules]]\nsource = 'files/sub'\ntarget = '/x/'", [("files/sub", "/x/")]),
    ],
)
def test_rules_may_name_a_source_or_be_left_out(
    directory: Path, backend: str, rules: str, expected: list[tuple[str, str | None]]
) -> None:
    sources = (
        f"{FILES}[sources.again]\ntype = 'path'\nroot = 'files'\n"
        "[sources.mirror]\ntype = 'remote'\nurl = 'https://example.org/'\n[sources.mirror.cache]\npath = 'cache'\n"
        "[sources.far]\ntype = 'remote'\nurl = 'https://example.org/far/'\n"
    )
    settings = load(directory, f"{sources}[offload]\nbackend = '{backend}'\n{rules}")
    found = [(rule.source, rule.target) for rule in settings.offload.rules]
    assert found == [(str(directory / place), target) for place, target in expected]


def test_a_name_of_a_source_and_of_another_directory_is_not_guessed(directory: Path) -> None:
    (directory / "media").mkdir()
    source = "[sources.media]\ntype = 'path'\nroot = 'files'\n"
    with pytest.raises(ConfigurationError, match=r"write '\./media' for the directory"):
        load(directory, f"{source}[[offload.rules]]\nsource = 'media'")
    with pytest.raises(ConfigurationError, match="no source has files below"):
        load(directory, f"{source}[[offload.rules]]\nsource = './media'")


@pytest.mark.parametrize("text, key, remedy", REFUSED)
def test_a_mistake_is_refused_with_file_key_and_remedy(directory: Path, text: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(directory, text)
    message = str(refused.value)
    assert message.startswith(f"{directory / 'downloadview.toml'}: {key}: ")
    assert remedy in message
    assert "\n" not in message
    assert "regex" not in message


ROUTE_PAIRS = [
    # the first path, the second path, and whether the second is never reached
    ("/f/{p:path}", "/f/{n}", True),
    ("/f/{p:path}", "/f/x/{n:path}", True),
    ("/f/{p:path}", "/f/{n}.sig", True),
    ("/f/{p:path}", "/f/{n:int}", True),
    ("/{p:path}", "/f/{n}", True),
    ("/f/{p:path}.sig", "/f/x/{n}.tar.sig", True),
    ("/f/{n}", "/f/x-{m}", True),
    ("/f/{n}", "/f/{m:uuid}", True),
    ("/f/{n}", "/f/{p:path}", False),
    ("/f/{n}", "/f/x/{m}", False),
    ("/f/{n}", "/f/{m}/x", False),
    ("/f/{n}.sig", "/f/{m}", False),
    ("/f/{n:int}", "/f/{m}", False),
    ("/f/{p:path}/x", "/f/{n}/y", False),
    ("/f/x/{p:path}", "/f/{q:path}", False),
    ("/f/{p:path}", "/g/{n}", False),
]


@pytest.mark.parametrize("first, second, unreached", ROUTE_PAIRS)
def test_a_route_that_is_never_reached_is_refused(directory: Path, first: str, second: str, unreached: bool) -> None:
    text = FILES + "".join(f'[[routes]]\npath = "{path}"\nsource = "files"\n' for path in (first, second))
    if not unreached:
        assert len(load(directory, text).routes) == 2
        return
    with pytest.raises(ConfigurationError) as refused:
        load(directory, text)
    assert str(refused.value).endswith(
        f"routes[1].path: {second!r} is never reached, because {first!r} in routes[0] matches the same paths: write "
        "this route before that one, or remove it"
    )


def object_source(**changes: str) -> str:
    keys = {
        "type": "object",
        "database": "sqlite+aiosqlite:///demo.db",
        "table": "documents",
        "key": "key",
        "file": "path",
        "source": "files",
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in (keys | changes).items()]
    return "\n".join(["[sources.documents]", *lines, ""])


BUILD_REFUSED = [
    ("[sources.files]\ntype = 'path'\nroot = 'gone'", "sources.files.root", "create the directory"),
    ("[sources.m]\ntype = 'storage'\nurl = 'file:gone'", "sources.m.url", "create the directory"),
    ("[sources.m]\ntype = 'storage'\nurl = 'http://bucket'", "sources.m.url", "memory://"),
    *[
        (f"[sources.m]\ntype = 'storage'\nurl = '{url}'\noptions = {{{options}}}", f"sources.m.{key}", problem)
        for url, options, key, problem in (
            ("s3://b", "region = 'x', regin = 'x'", "options.regin", "'regin' is not valid"),
            ("s3://b", "timeout = 'x', region = 'x'", "options.timeout", 'failed to parse "x" as Duration'),
            ("s3://b", "access_key_id = 'x'", "options.access_key_id", "Missing SecretAccessKey"),
            ("s3://b", "timeout = 'x', regin = 'x'", "options", "cannot be used with these options"),
            ("s3://", "region = 'x'", "url", "give s3://BUCKET/PREFIX"),
            ("s3://b", "endpoint = 'store:9000', region = 'x'", "options.endpoint", "such as https://HOST"),
            ("s3://b", "region = 'x', endpoint_url = 'http://store x'", "options.endpoint_url", "such as https://HOST"),
        )
    ],
    ("[sources.m]\ntype = 'remote'\nurl = 'ftp://x/'", "sources.m.url", "http or https"),
    ("[sources.m]\ntype = 'remote'\nurl = 'http://x y/'", "sources.m.url", "http or https"),
    ("[sources.v]\ntype = 'virtual'\nfactory = 'operator:add'", "sources.v.factory", "a function of one argument"),
    ("[sources.m]\ntype = 'remote'\nurl = 'http://u:p@x/'", "sources.m.url", "credentials belong in the headers"),
    ("[sources.v]\ntype = 'virtual'\nfactory = 'no_such_module:make'", "sources.v.factory", "give module:function"),
    ("[sources.v]\ntype = 'virtual'\nfactory = 'json:no_such'", "sources.v.factory", "give module:function"),
    ("[sources.v]\ntype = 'virtual'\nfactory = 'broken_reports:make'", "sources.v.factory", "ZeroDivisionError"),
    ("[sources.v]\ntype = 'virtual'\nfactory = 'string:digits'", "sources.v.factory", "is not a function"),
    (f"{FILES}[[routes]]\npath = '/x/{{p:no}}'\nsource = 'files'", "routes[0].path", "{path:path}"),
    (f"{FILES}{object_source(database='sqlite:///demo.db')}", "sources.documents", "sqlite+aiosqlite:///"),
    (f"{FILES}{object_source(database='sqlite+aiosqlite:///gone.db')}", "sources.documents", "gone.db' cannot be read"),
    (f"{FILES}{object_source(database='nonsense')}", "sources.documents", "asynchronous driver"),
    (f"{FILES}{object_source(database='postgresql+psycopg://h/n')}", "sources.documents", "needs psycopg: install it"),
    (
        f"{FILES}[offload]\nbackend = 'nginx'\n[[offload.rules]]\nsource = 'files'\ntarget = '_files'",
        "offload",
        "with a slash at both ends",
    ),
    (
        f"{FILES}[offload]\nbackend = 'apache'\n[[offload.rules]]\nsource = 'files'\ntarget = 'files'",
        "offload",
        "absolute directory",
    ),
]


@pytest.mark.parametrize("text, key, remedy", BUILD_REFUSED)
def test_what_is_missing_is_refused_when_the_service_is_built(
    directory: Path, text: str, key: str, remedy: str
) -> None:
    (directory / "broken_reports.py").write_text('raise ZeroDivisionError("two\\nlines")')
    (directory / "demo.db").touch()
    settings = load(directory, text)
    with pytest.raises(ConfigurationError) as refused:
        build(settings)
    message = str(refused.value)
    assert message.startswith(f"{directory / 'downloadview.toml'}: {key}: ")
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"source": "flies"}, "sources.documents.source: there is no source 'flies': did you mean 'files'?"),
        ({"source": "documents"}, "sources.documents.source: 'documents' is an object source too"),
    ],
)
def test_the_source_of_an_object_source_is_checked(directory: Path, changes: dict[str, str], remedy: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(directory, FILES + object_source(**changes))
    assert remedy in str(refused.value)


def test_a_file_that_is_missing_or_no_toml_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.toml: the settings file cannot be read .* --config"):
        load_settings(directory / "gone.toml", environ={})
    with pytest.raises(ConfigurationError, match=r"^'': the settings file cannot be read .* DOWNLOADVIEW_CONFIG"):
        load_settings("", environ={})
    with pytest.raises(ConfigurationError, match=r"downloadview\.toml: not valid TOML: .*line 2"):
        load(directory, "[server]\nport = = 1")
    (directory / "latin.toml").write_bytes(b'[server]\nhost = "\xe9"')
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_settings(directory / "latin.toml", environ={})


@pytest.mark.parametrize(
    "environ, key, expected",
    [
        ({"DOWNLOADVIEW_SERVER__PORT": "9000"}, "server.port", 9000),
        ({"DOWNLOADVIEW_SERVER__PROXY_HEADERS": "false"}, "server.proxy_headers", False),
        ({"DOWNLOADVIEW_SERVER__HOST": "10"}, "server.host", "10"),  # text where the setting is text
        ({"DOWNLOADVIEW_SERVER__UDS": "/run/x.sock"}, "server.uds", "/run/x.sock"),
        ({"DOWNLOADVIEW_SERVER": '{"port": 1}'}, "server.port", 1),
        ({"DOWNLOADVIEW_SERVER": '{"port": 1}', "DOWNLOADVIEW_SERVER__PORT": "2"}, "server.port", 2),
        ({"DOWNLOADVIEW_SERVER": '{"host": "::1"}'}, "server.port", 8000),  # the whole table
        ({"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"}, "offload.backend", "nginx"),
        ({"DOWNLOADVIEW_OFFLOAD__EXPIRES": "60"}, "offload.expires", 60),
        ({"DOWNLOADVIEW_OFFLOAD__EXPIRES": "off"}, "offload.expires", "off"),
        ({"DOWNLOADVIEW_OFFLOAD__LIMIT_RATE": "5"}, "offload.limit_rate", 5),
        ({"DOWNLOADVIEW_OFFLOAD__BUFFERING": "false"}, "offload.buffering", False),
        ({"DOWNLOADVIEW_OFFLOAD": '{"backend":"apache","rules":[{"source":"files"}]}'}, "offload.backend", "apache"),
        ({"DOWNLOADVIEW_SOURCES__MY_MIRROR__URL": "http://y/"}, "sources.my-mirror.url", "http://y/"),
        ({"DOWNLOADVIEW_SOURCES__MY_MIRROR__ALLOW_HOSTS": '["y"]'}, "sources.my-mirror.allow_hosts", ["y"]),
        ({"DOWNLOADVIEW_SOURCES__MY_MIRROR__READ_TIMEOUT": "2.5"}, "sources.my-mirror.read_timeout", 2.5),
        ({"DOWNLOADVIEW_SOURCES__MEM": '{"type":"storage","url":"memory://"}'}, "sources.mem.url", "memory://"),
        (
            {"DOWNLOADVIEW_SOURCES__MEM__TYPE": "storage", "DOWNLOADVIEW_SOURCES__MEM__URL": "memory://"},
            "sources.mem.url",
            "memory://",
        ),
        (  # not the misspelt root of `files`: a new source
            {"DOWNLOADVIEW_SOURCES__FILES_ROOT": '{"type":"storage","url":"memory://"}'},
            "sources.files_root.url",
            "memory://",
        ),
        ({"DOWNLOADVIEW_ROUTES": "[]"}, "routes", []),
        ({"DOWNLOADVIEW_CONFIG": "elsewhere.toml", "OTHER": "x"}, "server.port", 8001),
    ],
)
def test_variables_win_over_the_file(directory: Path, environ: dict[str, str], key: str, expected: Any) -> None:
    text = (
        f'[server]\nport = 8001\n{FILES}[sources.my-mirror]\ntype = "remote"\nurl = "http://x/"\n{ROUTE}'
        '[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n'
    )
    found: Any = load(directory, text, environ)
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "environ, message",
    [
        (
            {"DOWNLOADVIEW_SERVER__PROT": "1"},
            "DOWNLOADVIEW_SERVER__PROT: server.prot: unknown key: did you mean 'port'?",
        ),
        ({"DOWNLOADVIEW_PORT": "1"}, "DOWNLOADVIEW_PORT: port: unknown key"),
        ({"DOWNLOADVIEW_SERVRE__PORT": "1"}, "DOWNLOADVIEW_SERVRE__PORT: servre: unknown key: did you mean 'server'?"),
        *[
            ({f"DOWNLOADVIEW_{wrong}": "1"}, f"DOWNLOADVIEW_{wrong}: unknown key: did you mean DOWNLOADVIEW_{right}?")
            for wrong, right in (
                ("SERVER_PORT", "SERVER__PORT"),
                ("SERVER_STALL_TIMEOUT", "SERVER__STALL_TIMEOUT"),
                ("SERVER__STALL__TIMEOUT", "SERVER__STALL_TIMEOUT"),
                ("OFFLOAD_BACKEND", "OFFLOAD__BACKEND"),
                ("SOURCES__FILES_ROOT", "SOURCES__FILES__ROOT"),
                ("SOURCES_FILES__ROOT", "SOURCES__FILES__ROOT"),
                ("SOURCES_FILES", "SOURCES__FILES"),
            )
        ],
        (  # as `make run PORT=x` does it: what is wrong is the port, not the URL with it
            {
                "DOWNLOADVIEW_SERVER__PORT": "x",
                "DOWNLOADVIEW_SOURCES__M": '{"type": "remote", "url": "http://127.0.0.1:x/"}',
            },
            "DOWNLOADVIEW_SERVER__PORT: server.port: expected int, got str: give a TCP port, 0 to 65535",
        ),
        (
            {"DOWNLOADVIEW_SERVER__PORT": "x"},
            "DOWNLOADVIEW_SERVER__PORT: server.port: expected int, got str: give a TCP",
        ),
        ({"DOWNLOADVIEW_SERVER": '{"port": -1}'}, "DOWNLOADVIEW_SERVER: server.port: expected int >= 0"),
        ({"DOWNLOADVIEW_SERVER": '{"port": 1'}, "DOWNLOADVIEW_SERVER: not valid JSON"),
        ({"DOWNLOADVIEW_SERVER": "8000"}, "DOWNLOADVIEW_SERVER: server: must be a table"),
        (
            {"DOWNLOADVIEW_ROUTES__0__PATH": "/x"},
            "routes is not a table: set all of it, as JSON, in DOWNLOADVIEW_ROUTES",
        ),
        ({"DOWNLOADVIEW_SOURCES__FILES__ROOT__X": "x"}, "sources.files.root is not a table"),
        ({"DOWNLOADVIEW_SOURCES__NEW__ROOT": "x"}, "DOWNLOADVIEW_SOURCES__NEW__ROOT: sources.new.type: missing"),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(directory: Path, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(directory, FILES + ROUTE, environ)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "environ, text, message",
    [
        (
            {"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"},
            '[sources.a]\ntype = "remote"\nurl = "http://127.0.0.1:1/"',
            "offload.rules: no source is local, so the proxy sends nothing: add a rule, or remove the backend "
            "(offload.backend comes from DOWNLOADVIEW_OFFLOAD__BACKEND)",
        ),
        (
            {"DOWNLOADVIEW_OFFLOAD__BACKEND": "caddy"},
            f"{FILES}[offload]\nlimit_rate = 1",
            "(offload.backend comes from DOWNLOADVIEW_OFFLOAD__BACKEND)",
        ),
        (
            {"DOWNLOADVIEW_SERVER__WORKERS": "2"},
            '[links]\nkeys = "keys"\nstore = "memory:"',
            "give such as sqlite:links.db (server.workers comes from DOWNLOADVIEW_SERVER__WORKERS)",
        ),
        (
            {"DOWNLOADVIEW_SOURCES__FILES__TYPE": "remote"},
            FILES,
            "(sources.files.type comes from DOWNLOADVIEW_SOURCES__FILES__TYPE)",
        ),
    ],
)
def test_a_variable_that_takes_part_in_a_mistake_of_the_file_is_named(
    directory: Path, environ: dict[str, str], text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(directory, text, environ)
    assert str(refused.value).startswith(f"{directory / 'downloadview.toml'}: ")
    assert str(refused.value).endswith(message)


def test_the_variable_of_uvicorn_is_named_instead_of_the_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "1.2.3")
    with pytest.raises(ConfigurationError, match=r"^FORWARDED_ALLOW_IPS: server\.forwarded_allow_ips: '1.2.3' is not"):
        build(load(directory, f'{FILES}{ROUTE}[users]\nheader = "X-User"\n', {"FORWARDED_ALLOW_IPS": "1.2.3"}))
    text = f'{FILES}{ROUTE}[users]\nheader = "X-User"\n[server]\nforwarded_allow_ips = "4.5"\n'
    with pytest.raises(ConfigurationError, match=r"^.*downloadview\.toml: server\.forwarded_allow_ips: '4.5'"):
        build(load(directory, text, {"FORWARDED_ALLOW_IPS": "1.2.3"}))


def test_the_number_of_workers_of_other_servers_is_ignored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "many")
    settings = load(directory, FILES + ROUTE)
    build(settings)
    assert config_for(None, settings).workers == 1


def test_a_path_may_begin_in_the_home_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory))
    (directory / "settings").mkdir()
    text = '[sources.files]\ntype = "path"\nroot = "~/files"\n[sources.media]\ntype = "storage"\nurl = "file:~/files"\n'
    settings = load(directory / "settings", f'{text}{ROUTE}[log]\npath = "~/log"\n')
    assert settings.sources["files"] == PathSettings(root=str(directory / "files"))
    assert settings.sources["media"] == StorageSettings(url=f"file://{directory}/files")
    assert settings.log is not None
    assert settings.log.path == str(directory / "log")
    build(settings)


def test_the_command_line_wins_over_variables(directory: Path) -> None:
    environ = {"DOWNLOADVIEW_SERVER__PORT": "9000", "DOWNLOADVIEW_SERVER__HOST": "::1"}
    settings = load(directory, "[server]\nport = 8001", environ, port=9001)
    assert (settings.server.port, settings.server.host) == (9001, "::1")
    with pytest.raises(ConfigurationError, match=r"^the command line: server\.port: expected int >= 0"):
        load(directory, "", port=-1)


def test_without_a_file_relative_paths_begin_at_the_current_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    settings = load_settings(None, environ={"DOWNLOADVIEW_SOURCES": '{"files": {"type": "path", "root": "files"}}'})
    assert settings.sources["files"] == PathSettings(root=str(directory / "files"))


def test_the_servers_own_files_begin_at_the_settings_but_those_of_the_command_line_do_not(directory: Path) -> None:
    text = '[server]\nssl_keyfile = "key.pem"\nuds = "../socket"\n'
    server = load(directory, text, {"DOWNLOADVIEW_SERVER__SSL_CERTFILE": "cert.pem"}).server
    assert (server.ssl_keyfile, server.ssl_certfile) == (str(directory / "key.pem"), str(directory / "cert.pem"))
    assert server.uds == str(directory.parent / "socket")
    server = load(directory, text, ssl_keyfile="key.pem", uds=None).server
    assert (server.ssl_keyfile, server.ssl_certfile, server.uds) == ("key.pem", None, None)
    assert load(directory, text, {"DOWNLOADVIEW_SERVER__SSL_KEYFILE": ""}).server.ssl_keyfile == ""


@pytest.mark.parametrize(
    "source",
    [
        "files",
        "files/",
        "files/public",
        ".",
        "{directory}/files",
        "{directory}",
        "http://up.test/",
        "http://up.test/pub",
    ],
)
def test_a_rule_may_be_for_what_a_source_serves_or_a_part_or_more_of_it(directory: Path, source: str) -> None:
    text = (
        f'{FILES}[sources.up]\ntype = "remote"\nurl = "http://up.test/pub/"\n'
        f'[[offload.rules]]\nsource = "{source.format(directory=directory)}"\ntarget = "/_x/"'
    )
    assert load(directory, text).offload.rules[0].target == "/_x/"
