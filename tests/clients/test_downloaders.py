"""Command-line clients whose purpose is to download: a whole file, in segments, and over connections that are cut."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.relay import cutting
from tests.clients.running import Transport, digest, run

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = 4 * MIB + 12_345


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@dataclass(frozen=True, slots=True)
class Client:
    """How a client is called: for a whole file, for the rest of one, and for one in several segments at once."""

    whole: Callable[[Transport, str], list[str]]
    """From the transport and the URL, the command that writes the file `file`."""
    resumed: Callable[[Transport, str], list[str]]
    """The same, but it goes on with what is there. It may have to be called again."""
    segmented: Callable[[Transport, str], list[str]] | None = None


def _curl(transport: Transport, *options: str) -> list[str]:
    return ["curl", "-sSf", *transport.trusting("--cacert", "{}"), *options]


def _wget(transport: Transport, *options: str) -> list[str]:
    return ["wget", "-nv", *transport.trusting("--ca-certificate={}"), *options, "-O", "file"]


def _wget2(transport: Transport, *options: str) -> list[str]:
    command = ["wget2", "-nv", "--no-hsts", "--no-ocsp"]  # neither is of use here
    return [*command, *transport.trusting("--ca-certificate={}"), *options]  # -c does not go with -O


def _aria2(transport: Transport, *options: str) -> list[str]:
    command = ["aria2c", "--console-log-level=warn", "--summary-interval=0", "--retry-wait=0", "-m30"]
    return [*command, *transport.trusting("--ca-certificate={}"), *options, "-o", "file"]


def _axel(transport: Transport, *options: str) -> list[str]:
    # it compares the certificate's names with the URL's, but not its addresses
    return ["axel", "-q", *transport.trusting("--insecure"), "-o", "file", *options]


def _lftp(transport: Transport, command: str) -> list[str]:
    settings = ["set net:max-retries 20", "set net:reconnect-interval-base 1", "set net:timeout 5"]
    settings += [
        "set net:reconnect-interval-max 1",
        "set net:limit-rate 4000000",
        *transport.trusting("set ssl:ca-file {}"),
    ]
    return ["lftp", "-c", "; ".join([*settings, command])]


def _rclone(transport: Transport, url: str, *options: str) -> list[str]:
    base, _, name = url.rpartition("/")
    command = ["rclone", "copyto", f":http:{name}", "file", "--http-url", base, "--config", "/dev/null"]
    return [*command, "--low-level-retries", "20", "--retries", "5", *transport.trusting("--ca-cert", "{}"), *options]


CLIENTS = {
    "curl": Client(
        lambda transport, url: [*_curl(transport, "-o", "file"), url],
        lambda transport, url: [*_curl(transport, "-C", "-", "-o", "file"), url],
    ),
    "wget": Client(
        lambda transport, url: [*_wget(transport), url],
        lambda transport, url: [*_wget(transport, "-c", "-t", "20", "--waitretry=0"), url],
    ),
    "wget2": Client(
        lambda transport, url: [*_wget2(transport), url],
        lambda transport, url: [*_wget2(transport, "-c", "-t", "20", "--waitretry=0"), url],
        lambda transport, url: [*_wget2(transport, "--chunk-size=1M", "--max-threads=4"), url],
    ),
    "aria2": Client(
        lambda transport, url: [*_aria2(transport), url],
        lambda transport, url: [*_aria2(transport, "-c"), url],
        # unlimited, its first connection may have the whole file before the others have begun
        lambda transport, url: [
            *_aria2(transport, "-x4", "-s4", "-k1M", "--max-overall-download-limit=4M"),
            url,
        ],
    ),
    "axel": Client(
        lambda transport, url: _axel(transport, "-n", "1", url),
        lambda transport, url: _axel(transport, "-n", "2", url),
        lambda transport, url: _axel(transport, "-n", "4", url),
    ),
    "lftp": Client(
        lambda transport, url: _lftp(transport, f"get1 {url} -o file"),
        lambda transport, url: _lftp(transport, f"get1 -c {url} -o file"),
        # for the same reason
        lambda transport, url: _lftp(
            transport, f"set net:limit-rate 2000000; set net:limit-max 100000; pget -n 4 {url} -o file"
        ),
    ),
    "rclone": Client(
        lambda transport, url: _rclone(transport, url),
        lambda transport, url: _rclone(transport, url),
        lambda transport, url: _rclone(transport, url, "--multi-thread-cutoff", "1M", "--multi-thread-streams", "4"),
    ),
}
SEGMENTED = [name for name, client in CLIENTS.items() if client.segmented is not None]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_whole_file_twice(name: str, transport: Transport, content: bytes, tmp_path: Path) -> None:
    """The second time, a cache has it."""
    client, url = CLIENTS[name], transport.put("file", content)
    for _ in range(2):
        run(client.whole(transport, url), tmp_path)
        assert digest(tmp_path / "file") == digest(content)
        (tmp_path / "file").unlink()


@pytest.mark.parametrize("name", CLIENTS)
def test_over_connections_that_are_cut(name: str, transport: Transport, content: bytes, tmp_path: Path) -> None:
    client, url = CLIENTS[name], transport.put("file", content)
    # a reset of TLS ends axel by SIGPIPE, before it has noted how far it is
    with cutting(transport.port, 3 * MIB // 2, resets=(name, transport.scheme) != ("axel", "https")) as relay:
        through = transport.at(relay.address)
        run(
            client.resumed(through, url.replace(transport.url, through.url)),
            tmp_path,
            tries=20,
            until=lambda: (tmp_path / "file").stat().st_size == len(content),  # wget2 ends a part of a file with 0
        )
        assert relay.cuts >= 1  # how many depends on which of its connections a client uses
    assert digest(tmp_path / "file") == digest(content)
    transport.wait_for_answers("file", 206, 1)


@pytest.mark.parametrize("name", SEGMENTED)
def test_in_segments(name: str, transport: Transport, content: bytes, tmp_path: Path) -> None:
    client, url = CLIENTS[name], transport.put("file", content)
    assert client.segmented is not None
    command = client.segmented(transport, url)
    run(command, tmp_path)
    assert digest(tmp_path / "file") == digest(content)
    transport.wait_for_answers("file", 206, 2)


def test_ranges_of_curl_put_together(transport: Transport, content: bytes, tmp_path: Path) -> None:
    url = transport.put("file", content)
    for span in ("0-999999", "1000000-1000000", "1000001-"):
        run([*_curl(transport, "-r", span, "-o", span), url], tmp_path)
    run([*_curl(transport, "-r", "-777", "-o", "end"), url], tmp_path)
    parts = [(tmp_path / span).read_bytes() for span in ("0-999999", "1000000-1000000", "1000001-")]
    assert digest(b"".join(parts)) == digest(content)
    assert (tmp_path / "end").read_bytes() == content[-777:]


def test_a_part_of_a_file_by_rclone(transport: Transport, content: bytes, tmp_path: Path) -> None:
    transport.put("file", content)
    (tmp_path / "names").write_text("file\n")  # without it, rclone looks into a list of the directory
    command = ["rclone", "cat", ":http:", "--http-url", transport.url, "--config", "/dev/null"]
    command += ["--no-traverse", "--files-from-raw", "names"]
    command += [*transport.trusting("--ca-cert", "{}"), "--offset", "1234567", "--count", "64"]
    # as text: what is not UTF-8 is replaced
    assert run(command, tmp_path) == content[1_234_567 : 1_234_567 + 64].decode(errors="replace")
    transport.wait_for_answers("file", 206, 1)


def test_conditions_of_curl(transport: Transport, content: bytes, tmp_path: Path) -> None:
    url = transport.put("file", content)
    run([*_curl(transport, "--etag-save", "etag", "-R", "-o", "file"), url], tmp_path)
    run([*_curl(transport, "--etag-compare", "etag", "-o", "by-etag"), url], tmp_path)
    run([*_curl(transport, "-z", "file", "-o", "by-date"), url], tmp_path)
    transport.wait_for_answers("file", 304, 2)
    assert digest(tmp_path / "file") == digest(content)
    assert not (tmp_path / "by-date").exists()


@pytest.mark.parametrize("name", ["wget", "aria2"])
def test_a_file_that_is_there_is_not_fetched_again(
    name: str, transport: Transport, content: bytes, tmp_path: Path
) -> None:
    """wget asks for what comes after the end, and is told that there is nothing; aria2 asks by the date."""
    url = transport.put("file", content)
    (tmp_path / "file").write_bytes(content)
    options = {"wget": _wget(transport, "-c"), "aria2": _aria2(transport, "--conditional-get", "--allow-overwrite")}
    run([*options[name], url], tmp_path)
    transport.wait_for_answers("file", {"wget": 416, "aria2": 304}[name])
    assert digest(tmp_path / "file") == digest(content)
