"""`make audit` finds what is wrong with pins and packages, by an index alone; `make sbom` lists what is pinned."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from requirements.audit import Licences, audit
from tests.servers import PROJECT

WHEEL = hashlib.sha256(b"the wheel").hexdigest()
OTHER = hashlib.sha256(b"another wheel").hexdigest()


class Index:
    """A package index on the loopback. files: those of `toy`, as (hash, yanked)."""

    def __init__(self) -> None:
        self.files: list[tuple[str, bool | str]] = [(WHEEL, False)]
        self.is_html = False
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = self.path == "/simple/toy/"
                kind, body = index.page()
                self.send_response(200 if is_known else 404)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body if is_known else b"")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def page(self) -> tuple[str, bytes]:
        if self.is_html:
            yanked: dict[bool | str, str] = {False: "", True: " data-yanked"}
            links = [
                f'<a href="toy.whl#sha256={one}"{yanked.get(why, f" data-yanked={why!r}")}>toy</a>'
                for one, why in self.files
            ]
            return "text/html", "".join(links).encode()
        files = [{"filename": "toy.whl", "hashes": {"sha256": one}, "yanked": why} for one, why in self.files]
        return "application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode()


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    thread = threading.Thread(target=index.server.serve_forever, args=(0.01,))
    thread.start()
    yield index
    index.server.shutdown()
    thread.join()
    index.server.server_close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "packages"
    install(place)
    (tmp_path / "lock.txt").write_text(f"toy==1.0 \\\n    --hash=sha256:{WHEEL}\n")
    return place


def install(place: Path, name: str = "toy", *, licence: str = "License-Expression: MIT") -> None:
    info = place / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (place / f"{name}.py").write_text("toy = 1\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}\n")
    digest = "helrskZG8xkVxlN8nAz0xe8O05SrPzr0iZmCJlo_Sdc"
    (info / "RECORD").write_text(f"{name}.py,sha256={digest},8\n")


def problems(place: Path, index: Index) -> list[str]:
    return audit({str(place): [place.parent / "lock.txt"]}, index.url)


def run(place: Path, index: Index, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "requirements/audit.py", *options, f"{place.parent / 'lock.txt'}={place}"]
    env = {**os.environ, "PIP_INDEX_URL": index.url}
    return subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)


def test_the_command(place: Path, index: Index) -> None:
    done = run(place, index)
    assert (done.returncode, done.stdout, done.stderr) == (0, "audited 1 pins\n", "")
    index.files = [(WHEEL, "it breaks")]
    done = run(place, index)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "toy 1.0 was yanked: it breaks\n1 problems\n")


@pytest.mark.parametrize("is_html", [False, True])
def test_nothing_is_wrong(place: Path, index: Index, is_html: bool) -> None:
    index.is_html = is_html
    assert problems(place, index) == []


@pytest.mark.parametrize("is_html", [False, True])
@pytest.mark.parametrize(
    "files, problem",
    [
        ([(WHEEL, True)], "toy 1.0 was yanked: without a reason"),
        ([(OTHER, False), (WHEEL, "it breaks")], "toy 1.0 was yanked: it breaks"),
        ([(OTHER, False)], "toy 1.0: the index has none of the files that are pinned"),
        ([], "toy 1.0: the index has none of the files that are pinned"),
    ],
)
def test_pins(place: Path, index: Index, files: list[tuple[str, bool | str]], problem: str, is_html: bool) -> None:
    index.files, index.is_html = files, is_html
    assert problems(place, index) == [problem]


@pytest.mark.parametrize(
    "pinned, problem",
    [
        ("toy==1.0", "toy 1.0 is pinned without hashes"),
        (f"foo==1.0 \\\n    --hash=sha256:{WHEEL}", "foo 1.0: the index has none of the files that are pinned"),
        (f"toy==1.1 \\\n    --hash=sha256:{WHEEL}", "toy 1.0 is installed, and 1.1 is pinned"),
    ],
)
def test_lock_files(place: Path, index: Index, pinned: str, problem: str) -> None:
    (place.parent / "lock.txt").write_text(f"{pinned}\n")
    assert problem in problems(place, index)


def test_a_package_that_no_lock_file_has(place: Path, index: Index) -> None:
    install(place, "stray")
    assert problems(place, index) == ["stray 1.0 is installed, and no lock file has it"]


@pytest.mark.parametrize("change", ["edit", "delete"])
def test_files_that_have_changed(place: Path, index: Index, change: str) -> None:
    (place / "toy.py").write_text("toy = 2\n") if change == "edit" else (place / "toy.py").unlink()
    assert problems(place, index) == ["toy 1.0: toy.py changed after the installation"]


@pytest.mark.parametrize(
    "metadata, licence, is_permitted",
    [
        ("License-Expression: MIT", "MIT", True),
        ("License-Expression: GPL-3.0-only OR Apache-2.0", "GPL-3.0-only OR Apache-2.0", True),
        ("License-Expression: Apache-2.0 AND MIT", "Apache-2.0 AND MIT", True),
        ("License-Expression: MIT AND (BSD-3-Clause OR PSF-2.0)", "MIT AND (BSD-3-Clause OR PSF-2.0)", True),
        ("Classifier: License :: OSI Approved :: MIT License", "MIT", True),
        ("License: BSD-3-Clause", "BSD-3-Clause", True),
        ("License-Expression: GPL-3.0-only", "GPL-3.0-only", False),
        ("License-Expression: MIT AND AGPL-3.0-only", "MIT AND AGPL-3.0-only", False),
        ("License-Expression: MIT AND (MIT OR AGPL-3.0-only)", "MIT AND (MIT OR AGPL-3.0-only)", False),
        ("Classifier: License :: OSI Approved :: GNU Affero General Public License v3", None, False),
        ("License: Commercial", "Commercial", False),
        ("Summary: no licence", "", False),
    ],
)
def test_licences(place: Path, index: Index, metadata: str, licence: str | None, is_permitted: bool) -> None:
    info = place / "toy-1.0.dist-info"
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: toy\nVersion: 1.0\n{metadata}\n")
    found = problems(place, index)
    assert (found == []) == is_permitted
    if licence is not None and not is_permitted:
        assert found == [f"toy 1.0 has the licence {licence!r}, which audit.toml does not permit"]


def test_each_name_stands_for_a_permitted_licence() -> None:
    licences = Licences.read()
    assert all(licences.permit(name) for name in [*licences.names.values(), *licences.stated.values()])


def test_the_bill_of_materials(place: Path, index: Index) -> None:
    done = run(place, index, "--sbom", "1.2.3")
    listed = json.loads(done.stdout)
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
    assert listed["metadata"]["component"]["version"] == "1.2.3"
    (toy,) = listed["components"]
    assert (toy["purl"], toy["version"], toy["licenses"]) == ("pkg:pypi/toy@1.0", "1.0", [{"expression": "MIT"}])
    assert toy["properties"] == [{"name": "pinned:sha256", "value": WHEEL}]
