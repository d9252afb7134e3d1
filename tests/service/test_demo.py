import email.parser
import email.policy
import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import tarfile
import tomllib
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import demo as demo_content
from app import reports
from downloadview_async import ConfigurationError
from tests.servers import PROJECT, Server, demo

FILES = PROJECT / "app" / "files"

curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt install curl")

# what is asked for, the name curl gives it, and the file that it is
DOWNLOADS = [
    ("/files/hello.txt", "hello.txt", "hello.txt"),
    ("/files/report.pdf", "report.pdf", "report.pdf"),
    ("/files/picture.png", "picture.png", "picture.png"),
    ("/files/archive.tar.gz", "archive.tar.gz", "archive.tar.gz"),
    ("/files/na%C3%AFve%20caf%C3%A9.txt", "naive cafe.txt", "naïve café.txt"),
    ("/files/empty.txt", "empty.txt", "empty.txt"),
    ("/files/large.bin", "large.bin", "large.bin"),
    ("/media/large.bin", "large.bin", "large.bin"),
    ("/documents/greeting", "A greeting.txt", "hello.txt"),
    ("/documents/report", "Annual report.pdf", "report.pdf"),
    ("/documents/picture", "Colours.png", "picture.png"),
    ("/mirror/archive.tar.gz", "archive.tar.gz", "archive.tar.gz"),
    ("/mirror/large.bin", "large.bin", "large.bin"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with demo(tmp_path_factory.mktemp("demo") / "log") as running:
        yield running


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, {name.lower(): value for name, value in answer.headers.items()}, answer.read()


@curl
@pytest.mark.parametrize("path, name, file", DOWNLOADS)
def test_curl_saves_the_right_bytes_under_the_right_name(
    server: Server, tmp_path: Path, path: str, name: str, file: str
) -> None:
    subprocess.run(["curl", "-sSf", "-OJ", server.url + path], cwd=tmp_path, check=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == (FILES / file).read_bytes()


@curl
@pytest.mark.parametrize(
    "path, file",
    [
        ("/files/large.bin", "large.bin"),
        ("/media/large.bin", "large.bin"),
        ("/mirror/large.bin", "large.bin"),
        ("/documents/report", "report.pdf"),
    ],
)
def test_curl_resumes(server: Server, tmp_path: Path, path: str, file: str) -> None:
    whole = (FILES / file).read_bytes()
    part = tmp_path / "part"
    part.write_bytes(whole[: len(whole) // 3])
    resumed = subprocess.run(
        ["curl", "-sSf", "-C", "-", "-o", str(part), "-w", "%{http_code}", server.url + path],
        check=True,
        capture_output=True,
        text=True,
    )
    assert resumed.stdout == "206"
    assert part.read_bytes() == whole


@curl
def test_curl_resumes_a_report(server: Server, tmp_path: Path) -> None:
    whole = reports.summary().encode()
    part = tmp_path / "part"
    part.write_bytes(whole[:50])
    subprocess.run(["curl", "-sSf", "-C", "-", "-o", str(part), f"{server.url}/reports/summary.txt"], check=True)
    assert part.read_bytes() == whole


@pytest.mark.parametrize(
    "path, file",
    [(path, file) for path, _, file in DOWNLOADS if file != "empty.txt"],
)
def test_two_parts(server: Server, path: str, file: str) -> None:
    whole = (FILES / file).read_bytes()
    status, headers, body = fetch(server.url + path, Range="bytes=0-9,50-59")
    assert status == 206
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
        b"Content-Type: " + headers["content-type"].encode() + b"\r\n\r\n" + body
    )
    assert message.get_content_type() == "multipart/byteranges"
    parts = list(message.iter_parts())
    assert [part["Content-Range"] for part in parts] == [
        f"bytes 0-9/{len(whole)}",
        f"bytes 50-59/{len(whole)}",
    ]
    boundary = message.get_boundary()
    assert boundary is not None
    raw = [piece.partition(b"\r\n\r\n")[2][:10] for piece in body.split(f"--{boundary}".encode())[1:3]]
    assert raw == [whole[:10], whole[50:60]]


def test_the_health_pages(server: Server) -> None:
    assert fetch(f"{server.url}/-/livez")[::2] == (200, b"alive\n")
    assert fetch(f"{server.url}/-/readyz")[::2] == (200, b"ready\n")


def test_every_route_of_the_settings_has_links_on_the_page_and_each_link_works(server: Server) -> None:
    settings = tomllib.loads((PROJECT / "app" / "downloadview.toml").read_text(encoding="utf-8"))
    _, _, body = fetch(f"{server.url}/")
    page = body.decode()
    links = re.findall(r'href="\.([^"]*)"', page)
    for route in settings["routes"]:
        prefix = route["path"].partition("{")[0]
        of_this_route = [link for link in links if link.startswith(prefix)]
        example = route["example"]
        files = [example] if isinstance(example, str) else example
        assert len(of_this_route) == len(files) + route.get("list", False)
    for link in links:
        request = urllib.request.Request(server.url + link, method="HEAD")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200


@pytest.mark.slow
@curl
def test_all_links_of_the_page_can_be_saved_into_one_directory(server: Server, tmp_path: Path) -> None:
    links = re.findall(r'<li><a href="\.([^"]*)"', fetch(f"{server.url}/")[2].decode())
    for link in links:
        subprocess.run(["curl", "-sSf", "-OJ", server.url + link], cwd=tmp_path, check=True)
    saved = {entry.name for entry in tmp_path.iterdir()}
    assert len(saved) == len(links)
    kinds = {".txt", ".pdf", ".png", ".gz", ".bin"}
    assert {Path(name).suffix for name in saved} == kinds
    assert {"naive cafe.txt", "empty.txt", "large.bin"} <= saved


def test_a_document_without_a_file_is_missing(server: Server) -> None:
    missing = fetch(f"{server.url}/nope")
    draft = fetch(f"{server.url}/documents/draft")
    for answer in (missing, draft):
        for changing in ("date", "x-request-id"):
            answer[1].pop(changing)
    assert draft == missing
    assert draft[0] == 404


def test_unknown_reports_are_missing(server: Server) -> None:
    assert fetch(f"{server.url}/reports/other.txt")[0] == 404


def peak_memory(process: int) -> int:
    """Return the most memory that the process has held, in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is not here: memory cannot be measured")
def test_a_hundred_megabytes_are_made_without_holding_them(server: Server) -> None:
    fetch(f"{server.url}/reports/summary.txt")
    before = peak_memory(server.process.pid)
    digest = hashlib.sha256()
    with urllib.request.urlopen(f"{server.url}/reports/large.txt", timeout=30) as answer:
        assert answer.headers["Content-Length"] == "100000000"
        size = 0
        while chunk := answer.read(1 << 20):
            size += len(chunk)
            digest.update(chunk)
    assert size == 100_000_000
    assert digest.hexdigest() == hashlib.sha256(b"".join(reports.large())).hexdigest()
    assert peak_memory(server.process.pid) - before < 32 * 1024 * 1024


@pytest.mark.slow
def test_the_demo_behind_a_backend_hands_over(tmp_path: Path) -> None:
    with demo(tmp_path / "log", env={"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx"}) as running:
        for path in ["/files/report.pdf", "/media/report.pdf", "/documents/report"]:
            status, headers, body = fetch(running.url + path)
            assert (status, headers["x-accel-redirect"], body) == (200, "/_files/report.pdf", b""), path
        apache = json.dumps({"backend": "apache", "rules": [{"source": "files"}]})
    with demo(tmp_path / "log", env={"DOWNLOADVIEW_OFFLOAD": apache}) as running:
        status, headers, body = fetch(f"{running.url}/files/report.pdf")
        assert (status, headers["x-sendfile"], body) == (200, str(FILES / "report.pdf"), b"")


def make(directory: Path) -> Path:
    (directory / "files").mkdir()
    demo_content.make(directory)
    return directory


def test_the_content_is_made_once(tmp_path: Path) -> None:
    large, database = make(tmp_path) / "files" / "large.bin", tmp_path / "demo.db"
    before = [file.stat() for file in (large, database)]
    demo_content.make(tmp_path)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in (large, database)] == [
        (found.st_ino, found.st_mtime_ns) for found in before
    ]
    assert large.stat().st_size == 24 * 1024 * 1024
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["demo.db", "files"]
    assert [entry.name for entry in (tmp_path / "files").iterdir()] == ["large.bin"]


def test_content_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    large, database = make(tmp_path) / "files" / "large.bin", tmp_path / "demo.db"
    content = large.read_bytes()
    large.write_bytes(content[:1000])
    database.write_bytes(b"half a database")
    demo_content.make(tmp_path)
    assert large.read_bytes() == content
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("SELECT count(*) FROM documents").fetchone() == (len(demo_content.DOCUMENTS),)
    finally:
        connection.close()


def test_content_that_cannot_be_made_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "large.bin").mkdir()
    with pytest.raises(ConfigurationError, match="the demo's content cannot be created"):
        demo_content.make(tmp_path)
    assert [entry.name for entry in (tmp_path / "files").iterdir()] == ["large.bin"]


def test_the_files_are_what_their_names_say() -> None:
    pdf = (FILES / "report.pdf").read_bytes()
    start = int(re.findall(rb"startxref\n(\d+)\n%%EOF", pdf)[-1])
    offsets = [int(offset) for offset in re.findall(rb"(\d{10}) 00000 n ", pdf[start:])]
    assert [pdf[offset:].split(b" obj")[0] for offset in offsets] == [
        b"%d 0" % number for number in range(1, len(offsets) + 1)
    ]
    png = (FILES / "picture.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    position = 8
    while position < len(png):  # every chunk has its own checksum
        length = int.from_bytes(png[position : position + 4])
        body = png[position + 4 : position + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(png[position + 8 + length : position + 12 + length])
        position += 12 + length
    with tarfile.open(FILES / "archive.tar.gz") as archive:
        hello = archive.extractfile("demo/hello.txt")
        assert hello is not None
        assert hello.read() == (FILES / "hello.txt").read_bytes()
    assert (FILES / "empty.txt").stat().st_size == 0
    assert "café" in (FILES / "naïve café.txt").read_text(encoding="utf-8")
