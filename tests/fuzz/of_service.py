"""Settings files, variables, keys files, and what systemd tells in the environment."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from downloadview_async import ConfigurationError
from downloadview_async.service.access import keys_in
from downloadview_async.service.config_loader import PREFIX, load_settings
from downloadview_async.service.logs import LONGEST, one_line
from downloadview_async.service.settings import Settings
from downloadview_async.service.systemd import Notifier, inherited_sockets
from downloadview_async.service.values import bytes_of, seconds_of
from tests.fuzz import inputs as st
from tests.fuzz.inputs import edited_bytes, edited_text
from tests.fuzz.of_policy import scratch
from tests.fuzz.targets import is_printable_ascii, target, target_within
from tests.servers import PROJECT

DEMO = (PROJECT / "app" / "downloadview.toml").read_bytes()
SMALL = b"""[server]
port = 8000
stall_timeout = 60.5
ssl_certfile = "cert.pem"
[sources.files]
type = "path"
root = "files"
digests = ["sha-256"]
[sources.up]
type = "remote"
url = "https://u:p@h.example:8443/a/?b=c"
allow_hosts = ["h.example"]
cache = {path = "cache", max_bytes = "1GiB", max_age = "2h"}
[[routes]]
path = "/f/{path:path}"
source = "files"
list = true
archive = true
[limits]
rate = "20MB/s"
requests = "600/minute"
[links]
keys = "keys"
max_age = "7d"
[users]
file = "users"
[offload]
backend = "nginx"
[[offload.rules]]
source = "files"
target = "/_files/"
[accounts]
database = "a.db"
"""
WORDS = (
    b"[",
    b"]",
    b"[[",
    b'"""',
    b"'''",
    b"{",
    b"}",
    b"1979-05-27T00:00:00Z",
    b"inf",
    b"nan",
    b"true",
    b"0x",
    b"1_000",
    b"\\u0000",
    b"\\U0010ffff",
    b"\\ud800",
    b"\xff\xfe",
    b"[sources.a]\n",
    b"a.b.c = 1\n",
    b"[" * 2000,
    b"{a=" * 2000,
    b"a." * 3000,
)


def refused_in_one_line(exc: ConfigurationError) -> None:
    line = one_line(str(exc))
    assert line.isprintable()
    assert 0 < len(line) <= LONGEST + 100


@target_within(edited_bytes(SMALL, DEMO, words=WORDS), scratch)
def settings_files(content: bytes, directory: Path) -> None:
    file = directory / "s.toml"
    file.write_bytes(content)
    try:
        settings = load_settings(file, environ={})
    except ConfigurationError as exc:
        refused_in_one_line(exc)
        return
    assert isinstance(settings, Settings)
    assert 0 <= settings.server.port <= 65_535
    assert all(route.source in settings.sources for route in settings.routes)


VARIABLES = st.lists(
    st.tuples(
        edited_text(
            "SERVER__PORT",
            "SERVER",
            "SOURCES__FILES__ROOT",
            "ROUTES",
            "OFFLOAD__BACKEND",
            "LIMITS__RATE",
            "SOURCES__UP__CACHE",
            "LINKS__KEYS",
            "ACCOUNTS__KEEP",
            "X",
            words=["__", "_", "SOURCES", "ROUTES__0__PATH"],
        ),
        edited_text(
            "8000", "{}", "[]", '{"port": 1}', '[{"path": "/f", "source": "files"}]', "nginx", "true", "/tmp/x"
        ),
    ),
    max_size=3,
)


@target_within(VARIABLES, scratch, regressions=[[("SERVER__PORT", "8\ud800")], [("SERVER__\ud800", "8")]])
def settings_variables(pairs: list[tuple[str, str]], directory: Path) -> None:
    file = directory / "s.toml"
    file.write_bytes(SMALL)
    try:
        settings = load_settings(file, environ={f"{PREFIX}{name[:1000]}": value for name, value in pairs})
    except ConfigurationError as exc:
        refused_in_one_line(exc)
        return
    assert isinstance(settings, Settings)


@target(edited_text("10GiB", "500MB", "4096", "90s", "2h", "1.5d", "36500d", "9223372036854775807"))
def sizes_and_times(text: str) -> None:
    size, seconds = bytes_of(text), seconds_of(text)
    assert size is None or 0 <= size < 2**63
    assert seconds is None or 0 <= seconds <= 36_500 * 86_400
    if size is not None or seconds is not None:
        assert is_printable_ascii(text)
        assert re.match("[0-9]", text)


SECRET = "s" * 40
KEYS = edited_bytes(
    f"2026a {SECRET}\nold\t{'t' * 40}\n".encode(),
    f"# keys\n\n  2026a {SECRET}  ".encode(),
    words=[b"\xff", b"\x85", b"\x0c"],
)


@target_within(KEYS, scratch, regressions=[b"\xfa2026a " + SECRET.encode(), b"\n" * 300_000])
def keys_files(content: bytes, directory: Path) -> None:
    file = directory / "keys"
    file.write_bytes(content)
    settings = load_settings(None, environ={})
    for keys in (str(file), content.decode("utf-8", "surrogateescape")):
        if "\0" in keys:
            continue  # refused before, with all settings
        try:
            secrets = keys_in(settings, "links.keys", keys)
        except ConfigurationError as exc:
            refused_in_one_line(exc)
            assert SECRET not in str(exc), "a secret is shown"
            continue
        for name, secret in secrets.items():
            assert re.fullmatch("[A-Za-z0-9_.-]{1,64}", name)
            assert len(secret) >= 32
            assert not re.search(r"\s", secret)


NUMBERS = edited_text("1", "0", "3", "-1", "1000000", "00", "+1", " 1", "1 ", "30000000", words=["٣", "²", "९"])


@contextmanager
def environment() -> Iterator[None]:
    """Give a process without the variables of systemd, and take away those that are set."""
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


def set_variable(name: str, value: str) -> bool:
    try:
        os.environ[name] = value
    except (ValueError, UnicodeEncodeError):  # no environment has it
        return False
    return True


@target_within(
    st.tuples(NUMBERS, st.sampled_from(["", "@fuzz", "/nonexistent", "relative", "@" + "x" * 200]), NUMBERS),
    environment,
    regressions=[("1000000", "", "1"), ("1", "@x", "9" * 5000)],
)
def variables_of_systemd(value: tuple[str, str, str], _: None) -> None:
    count, address, interval = value
    is_small = len(count.strip()) < 7 and any(character.isdecimal() and character != "0" for character in count)
    if not is_small and set_variable("LISTEN_FDS", count):  # small numbers are descriptors that this process has
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ["LISTEN_FDNAMES"] = "http"
        try:
            assert inherited_sockets() == []
        except ConfigurationError as exc:
            refused_in_one_line(exc)
        assert "LISTEN_FDS" not in os.environ
    os.environ["NOTIFY_SOCKET"] = address
    if set_variable("WATCHDOG_USEC", interval):
        notifier = Notifier()
        notifier.ready()
        notifier.alive()
        notifier.reloading()
        notifier.reloaded(interval)
        notifier.stopping()
        assert "NOTIFY_SOCKET" not in os.environ
