"""The service's `archive = true` and `[archives]`: what is read, what is refused, and what is served."""

import io
import os
import sys
import zipfile
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from downloadview_async import ConfigurationError
from downloadview_async.service.app import build
from tests.service.loading import FILES, load

TEXT = f"""{FILES}hide = [".*"]
archive = true
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files/d/.git").mkdir(parents=True)
    (tmp_path / "files/d/a.txt").write_bytes(b"a" * 999)
    (tmp_path / "files/d/.git/config").write_bytes(b"secret")
    return tmp_path


def names_of(content: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(content)).namelist()


def test_a_folder_is_sent(directory: Path) -> None:
    with TestClient(build(load(directory, TEXT))) as client:
        answer = client.get("/files/d/?archive=zip")
        assert names_of(answer.content) == ["d/", "d/a.txt"]
        assert client.get("/files/d/.git/?archive=zip").status_code == 404
        part = client.get("/files/d/?archive=zip", headers={"Range": "bytes=-9"})
        assert (part.status_code, part.content) == (206, answer.content[-9:])


def test_a_hook_decides_about_each_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "files/d/forbidden").mkdir()
    (directory / "files/d/forbidden/secret").touch()
    (directory / "archive_rules.py").write_text("async def may(request, name):\n    return 'forbidden' not in name\n")
    monkeypatch.delitem(sys.modules, "archive_rules", raising=False)
    text = TEXT.replace("archive = true", 'archive = true\naccess = ["hook:archive_rules:may"]')
    with TestClient(build(load(directory, text))) as client:
        assert client.get("/files/d/forbidden/?archive=zip").status_code == 404
        assert names_of(client.get("/files/d/?archive=zip").content) == ["d/", "d/a.txt"]


def test_without_the_setting_there_is_none(directory: Path) -> None:
    with TestClient(build(load(directory, TEXT.replace("archive = true", "")))) as client:
        assert client.get("/files/d/?archive=zip").status_code == 404


@pytest.mark.parametrize(
    "limit, status", [("max_files = 1", 413), ("max_bytes = '1kB'", 413), ("max_bytes = '2kB'", 200), ("", 200)]
)
def test_limits(directory: Path, limit: str, status: int) -> None:
    with TestClient(build(load(directory, f"{TEXT}[archives]\n{limit}\n"))) as client:
        assert client.get("/files/d/?archive=zip").status_code == status


def test_a_browser_gets_a_page_that_says_which_limit_was_reached(directory: Path) -> None:
    with TestClient(build(load(directory, f"{TEXT}[archives]\nmax_files = 1\n"))) as client:
        text = client.get("/files/d/?archive=zip", headers={"Accept": "*/*"}).text
        page = client.get("/files/d/?archive=zip", headers={"Accept": "text/html,*/*;q=0.8"})
    phrase, _, detail = text.partition(": ")
    assert (page.status_code, page.headers["content-type"]) == (413, "text/html; charset=utf-8")
    assert f"<h1>{phrase}</h1><p>{detail[0].upper()}{detail[1:]}." in page.text
    assert int(page.headers["content-length"]) == len(page.content)


def test_checksums_are_kept_in_a_file_beside_the_settings(directory: Path) -> None:
    settings = load(directory, f"{TEXT}[archives]\nchecksums = 'crc.db'\nper_client = 0\n")
    assert settings.archives.checksums == str(directory / "crc.db")
    with TestClient(build(settings)) as client:
        assert client.get("/files/d/?archive=zip").status_code == 200
    assert (directory / "crc.db").is_file()


@pytest.mark.parametrize(
    ("place", "problem"), [("none/crc.db", "/none' is missing"), ("files", "/files' is not a file that can be read")]
)
def test_checksums_that_cannot_be_kept_are_refused(directory: Path, place: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=f"archives\\.checksums: .*{problem}"):
        build(load(directory, f"{TEXT}[archives]\nchecksums = '{place}'\n"))


def test_the_cache_of_a_source_keeps_its_archives(directory: Path) -> None:
    text = TEXT.replace('type = "path"\nroot = "files"', f'type = "storage"\nurl = "file://{directory}/files"')
    text += '[sources.files.cache]\npath = "cache"\n'
    with TestClient(build(load(directory, text))) as client:
        first = client.get("/files/d/?archive=zip").content
        assert names_of(first) == ["d/", "d/a.txt"]
        assert client.get("/files/d/?archive=zip").content == first
        assert client.get("/-/cache").json()["files"]["misses"] >= 1


@pytest.mark.parametrize(
    "text, key, remedy",
    [
        (f"{TEXT}[archives]\nmax_bytes = 'much'\n", "archives.max_bytes", "is not a size"),
        (f"{TEXT}[archives]\nmax_bytes = 0\n", "archives.max_bytes", "is not a size"),
        (f"{TEXT}[archives]\nmax_files = 0\n", "archives.max_files", "files and folders in an archive, 1 or more"),
        (f"{TEXT}[archives]\nper_client = -1\n", "archives.per_client", "archives that a client may get"),
        (f"{TEXT}[archives]\nfiles = 1\n", "archives.files", "unknown key"),
        (TEXT.replace("true", "'zip'"), "routes[0].archive", "true to send folders as ZIP archives"),
    ],
)
def test_mistakes(directory: Path, text: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(directory, text)
    assert f": {key}: " in str(refused.value)
    assert remedy in str(refused.value)


def test_a_source_that_does_not_list_is_refused(directory: Path) -> None:
    (directory / "made.py").write_text("def make(name): ...")
    text = TEXT.replace('type = "path"\nroot = "files"', 'type = "virtual"\nfactory = "made:make"')
    with pytest.raises(ConfigurationError, match=r"routes\[0\]\.archive: the source 'files' cannot list its folders"):
        build(load(directory, text))


@pytest.mark.parametrize("where", ["", "[archives]\nchecksums = 'checksums.db'\n"])
def test_a_directory_whose_name_is_not_utf_8(tmp_path: Path, where: str) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/di\xffr"))
    (directory / "files/d").mkdir(parents=True)
    (directory / "files/d/a.txt").write_bytes(b"a")
    with TestClient(build(load(directory, TEXT + where))) as client:
        for _ in range(2):
            answer = client.get("/files/d/?archive=zip")
            assert (answer.status_code, names_of(answer.content)) == (200, ["d/", "d/a.txt"])
