"""The log of a running service: one line for each thing that it says, whatever clients and functions have in texts."""

import contextlib
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloadview_async.http.log_text import LIMIT, escaped, shown
from downloadview_async.service.logs import LONGEST, one_line
from downloadview_async.service.patient_handler import PatientHandler
from tests.servers import Server, free_port, serving

COMMAND = [sys.executable, "-m", "downloadview_async.cli", "serve"]
EVIL = "evil\nINFO:     fake\r\x1b[31m\x1b]0;title\x07\x9b31m\u202egpj.exe\u2028\x00\x7f"
SETTINGS = """
[sources.files]
type = "path"
root = "files"
[sources.made]
type = "virtual"
factory = "made:make"
[[routes]]
path = "/files/{path:path}"
source = "files"
[[routes]]
path = "/made/{path:path}"
source = "made"
"""
MADE = """
import asyncio, logging
EVIL = {evil!r}
class Evil(Exception):
    def __str__(self):
        return EVIL
class Mute(Exception):
    def __str__(self):
        raise RuntimeError(EVIL)
def stream():
    yield b"a"
    raise ValueError(EVIL)
def make(name):
    if name == "raises":
        raise ValueError(EVIL + "x" * 100_000)
    if name == "chain":
        try:
            raise Evil()
        except Evil as exc:
            error = KeyError(EVIL)
            error.add_note(EVIL + " as a note")
            raise error from exc
    if name == "group":
        raise ExceptionGroup(EVIL, [ValueError(EVIL), Evil()])
    if name == "mute":
        raise Mute()
    if name == "deep":
        return make(name)
    if name == "stream":
        return stream()
    if name == "logs":
        logging.getLogger("some.module").warning("it said %s and %s", EVIL, 3)
        logging.getLogger("some.module").error("not %d" % 1, EVIL)
        return b"logged"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("logs")
    (directory / "files").mkdir()
    (directory / "made.py").write_text(MADE.format(evil=EVIL))
    (directory / "downloadview.toml").write_text(SETTINGS)
    port = free_port()
    with serving([*COMMAND, "--port", str(port)], port, log=directory / "log", cwd=directory) as running:
        yield running
        assert "Logging error" not in running.log


def request(server: Server, target: bytes, *fields: bytes) -> bytes:
    head = b"\r\n".join((b"GET " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *fields, b"", b""))
    with socket.create_connection(("127.0.0.1", int(server.address)), timeout=30) as client:
        client.sendall(head)
        return b"".join(iter(lambda: client.recv(65536), b""))


def logged(server: Server, target: bytes, *fields: bytes, until: str) -> str:
    """Send a request, and return what the log says of it: `until` is a pattern of the last line."""
    before = len(server.log_file.read_bytes())
    request(server, target, *fields)
    while True:
        said = server.log_file.read_bytes()[before:].decode()
        if re.search(until, said):
            break
        assert server.process.poll() is None
    for line in said.splitlines():
        assert line.isprintable(), line
        assert not line.startswith("INFO:     fake"), said
        assert len(line) < 2 * LONGEST + 200, line
    return said


@pytest.mark.parametrize(
    "target", [b"/files/" + b"a" * 60_000, b"/files/" + b"%C3%A9" * 10_000, b"/files/" + b"%0A%1B" * 10_000]
)
def test_a_name_of_60_kilobytes_is_cut(server: Server, target: bytes) -> None:
    said = logged(server, target, until=r'HTTP/1\.1" 404')
    assert len(said) < 6_000
    assert said.count(" characters ...]") == 2  # of the library's line, and in the access log


def test_a_name_on_stock_protocols_is_cut_too(tmp_path: Path) -> None:
    for http in ("h11", "httptools"):
        port = free_port()
        command = [*COMMAND, str(tmp_path), "--port", str(port), "--http", http]
        log = tmp_path / http
        with serving(command, port, log=log) as running:
            said = logged(running, b"/files/" + b"%C3%A9" * 6_000, until=r'HTTP/1\.1" 404')
            assert len(said) < 6_000


def test_so_it_is_for_uvicorn_itself(tmp_path: Path) -> None:
    (tmp_path / "downloadview.toml").write_text(SETTINGS.replace("made:make", "os.path:basename"))
    (tmp_path / "files").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port), "--http", "h11"]
    env = {"DOWNLOADVIEW_CONFIG": str(tmp_path / "downloadview.toml")}
    with serving(command, port, log=tmp_path / "log", env=env) as running:
        said = logged(running, b"/files/" + b"%C3%A9" * 6_000, b"X-Forwarded-For: a\x9bb", until=r'HTTP/1\.1" 404')
        assert len(said) < 6_000
        assert r"a\x9bb" in said


def test_what_a_trusted_proxy_says_of_the_client_is_escaped(server: Server) -> None:
    value = b"1.2.3.4\xc2\x9b31m\x9b\xe2\x80\xae"
    said = logged(server, b"/-/livez", b"X-Forwarded-For: " + value, until=r'HTTP/1\.1" 200')
    assert r"1.2.3.4" in said
    assert r"\x9b31m" in said
    said = logged(server, b"/-/livez", b"X-Forwarded-For: " + b"9" * 50_000, until=r'HTTP/1\.1" 200')
    assert len(said) < 3_000


@pytest.mark.parametrize("name", ["raises", "chain", "group", "mute"])
def test_what_a_function_raises_is_told_on_lines_of_its_traceback(server: Server, name: str) -> None:
    said = logged(server, f"/made/{name}".encode(), until=r"(?m)(^|\| )(made\.)?(ValueError|KeyError|Evil|Mute).*\n")
    assert "Traceback (most recent call last):" in said
    assert 'made.py", line ' in said
    if name != "mute":
        assert r"evil\nINFO:     fake\r\x1b[31m" in said
    if name == "raises":
        assert " characters ...]" in said
    if name == "chain":
        assert "The above exception was the direct cause of the following exception:" in said
        assert "made.Evil: evil" in said
        assert "\\x7f as a note\n" in said


def test_a_deep_traceback_is_cut(server: Server) -> None:
    said = logged(server, b"/made/deep", until="RecursionError")
    assert said.count("\n") < 500


def test_what_ends_a_transfer_is_told_without_controls(server: Server) -> None:
    logged(server, b"/made/stream", until=r"evil\\n|evil\\\\n|Transfer aborted")


def test_other_loggers_are_escaped_too(server: Server) -> None:
    said = logged(server, b"/made/logs", until="cannot be filled in")
    assert r"WARNING:  it said evil\nINFO:     fake" in said


@pytest.mark.parametrize(
    "text, line",
    [
        ("plain", "plain"),
        ("é π 🎈 \\ ' \"", "é π 🎈 \\ ' \""),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[0m\x9b\x7f\x00", r"\x1b[0m\x9b\x7f\x00"),
        ("\u202e\u2066\u200b\ufeff\u2028\u0085", r"\u202e\u2066\u200b\ufeff\u2028\x85"),
        ("\ud800\udce9", r"\ud800\udce9"),
        ("\U000e0041", r"\U000e0041"),
        ("a" * LONGEST, "a" * LONGEST),
        ("a" * (LONGEST + 1), f"{'a' * (LONGEST - 350)}[... 51 characters ...]{'a' * 300}"),
        (
            "\n" * LONGEST,
            f"{chr(92)}n" * (LONGEST // 2 - 175) + f"[... {LONGEST + 50} characters ...]" + f"{chr(92)}n" * 150,
        ),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == one_line(one_line(text)) == line
    assert len(one_line(text)) <= LONGEST


def test_what_the_library_shows_of_a_name() -> None:
    assert shown("a'b\n\x1b é") == ascii("a'b\n\x1b é")
    assert escaped("a\nb") == r"a\nb"
    assert len(shown("é" * 60_000)) < LIMIT + 50
    assert re.fullmatch(r"'(\\xe9)+\\?x?e?[... 0-9a-z\[\]]+.*'", shown("é" * 60_000)) is not None
    assert "[... 239002 characters ...]" in shown("é" * 60_000)


def test_lines_that_nobody_reads_wait_and_are_bounded() -> None:
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    with open(reads, "rb", buffering=0) as reader, open(writes, "w", encoding="utf-8") as stream:
        logger, handler = logging.Logger("test"), PatientHandler(stream)
        logger.addHandler(handler)
        for number in range(3000):
            logger.info("%d %s", number, "x" * 1000)
        received = b""
        while b"were lost" not in received:
            received += reader.read(65536)
        *lines, last = received.decode().splitlines()
        assert [int(line.partition(" ")[0]) for line in lines] == [*range(len(lines))]
        assert last == f"{3000 - len(lines)} lines of the log were lost, because nobody has read it"
        assert 1000 < len(lines) < 1100
        logger.info("again")
        handler.flush()
        assert reader.read(100) == b"again\n"
    logger.info("nobody can read this")  # and it raises no error


def test_lines_on_a_terminal_that_nobody_reads_wait() -> None:
    """A terminal that has room for less than a line is ready to be written to, and would take the rest later."""
    master, terminal = os.openpty()
    with open(master, "rb", buffering=0) as reader, open(terminal, "w", encoding="utf-8") as stream:
        logger, handler = logging.Logger("test"), PatientHandler(stream)
        logger.addHandler(handler)

        def log() -> None:
            for number in range(2000):
                logger.info("%d %s", number, "x" * 150)

        logs = threading.Thread(target=log, daemon=True)
        logs.start()
        logs.join(30)
        has_waited = logs.is_alive()
        received = b""
        while not received.endswith(b"x\r\n") or b"\n1999 " not in received:
            received += reader.read(65536)
        assert not has_waited
        assert [int(line.partition(" ")[0]) for line in received.decode().splitlines()] == [*range(2000)]


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_log_that_nobody_reads_holds_nothing_up(tmp_path: Path, workers: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    port = free_port()
    reads, writes = os.pipe()
    command = [*COMMAND, str(tmp_path / "a.txt"), "--port", str(port), "--workers", workers]
    with subprocess.Popen(command, stdout=writes, stderr=writes, stdin=subprocess.DEVNULL) as process:
        os.close(writes)
        with open(reads, "rb", buffering=0) as reader:
            received = b""
            while b"Listening on" not in received and (part := reader.read(4096)):
                received += part
            fcntl.fcntl(reads, fcntl.F_SETPIPE_SZ, 4096)
            for _ in range(200):
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/files/missing", timeout=10)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/files/a.txt", timeout=10) as answer:
                assert answer.read() == b"a"
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(20) == 0
            finally:
                process.kill()
            assert time.monotonic() - began < 15
