"""Ctrl-C at a real terminal: the service ends in a moment, also while clients download."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import free_port

_MOMENT = 3.0  # seconds; it takes a third of one, and on a busy machine up to one


def _output_until(terminal: int, text: bytes | None) -> bytes:
    """Read from a terminal until a text has come; without one, until the last process at it has ended."""
    said = b""
    while text is None or text not in said:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            assert text is None, said
            break
    return said


def test_a_link_that_only_this_machine_can_open_says_so(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "downloadview_async", "serve", "files", "--port", "0", "--share", "2h"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(theirs)
    )
    os.close(theirs)
    try:
        said = _output_until(ours, b"Listening on")
        assert b"Only this machine can open the link. For others in the network, add --host 0.0.0.0" in said
        os.write(ours, b"\x03")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_service_while_clients_download(tmp_path: Path, workers: str) -> None:
    (tmp_path / "files").mkdir()
    with (tmp_path / "files" / "large.bin").open("wb") as file:
        file.truncate(1 << 30)
    port = free_port()
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "downloadview_async", "serve", "files", "--port", str(port), "--workers", workers]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(theirs)
    )
    os.close(theirs)
    try:
        _output_until(ours, b"Listening on")
        with (
            socket.create_connection(("127.0.0.1", port)) as idle,
            socket.create_connection(("127.0.0.1", port)) as one,
        ):
            idle.sendall(b"GET /-/livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert idle.recv(12) == b"HTTP/1.1 200"
            one.sendall(b"GET /files/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            assert one.recv(12) == b"HTTP/1.1 200"  # and reads nothing more
            begun = time.monotonic()
            os.write(ours, b"\x03")
            said = _output_until(ours, None)
            assert process.wait(30) == 0
            assert time.monotonic() - begun < _MOMENT
        assert b"Ctrl-C: 1 running downloads are cut" in said
        assert b"Traceback" not in said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
