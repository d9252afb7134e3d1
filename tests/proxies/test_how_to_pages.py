"""The pages that lead from nothing to a checked installation: their files and commands, as a reader runs them."""

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.pages import DOCS, blocks, file_of
from tests.proxies.servers import KINDS, readable_directory, running
from tests.s3 import BUCKET, KEY_ID, REGION, S3, SECRET
from tests.servers import PROJECT, free_port

pytestmark = pytest.mark.slow

ADA = {"Authorization": "Bearer ada-secret"}
BOB = {"Authorization": "Bearer bob-secret"}


@pytest.fixture
def directory() -> Iterator[Path]:
    with readable_directory() as path:
        yield path


def write_files(page: Path, directory: Path, changes: Mapping[str, str] | None = None) -> None:
    """Write the files of a page into a directory."""
    for _, text in blocks(page, "python"):
        name = file_of(text)
        assert name is not None, "each block of the page is a file"
        for old, new in (changes or {}).items():
            text = text.replace(old, new)
        (directory / name).write_text(text)


def command(page: Path, program: str, changes: Mapping[str, str]) -> list[str]:
    """Return the one command of a page that starts a program, with other ports."""
    lines = "\n".join(text for _, text in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{program} ")]
    for old, new in changes.items():
        line = line.replace(old, new)
    name, *arguments = shlex.split(line)
    module = {"uvicorn": "uvicorn", "downloadview": "downloadview_async.cli"}.get(name)
    return [sys.executable, *(arguments if module is None else ["-m", module, *arguments])]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def get(url: str, headers: Mapping[str, str], method: str = "GET") -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read()


def output_of(command: list[str], directory: Path, environ: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_behind_nginx(directory: Path) -> None:
    page = DOCS / "howto" / "behind-nginx.md"
    (directory / "invoices").mkdir()
    (directory / "invoices" / "1.pdf").write_text("ada's invoice\n")
    write_files(page, directory)
    ports = {
        ":8000": f":{(service := free_port())}",
        "--port 8000": f"--port {service}",
        ":8080": f":{(front := free_port())}",
    }
    environ = environment()
    printed = subprocess.run(
        command(page, "python", {" > nginx.conf": ""}),
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"location /_invoices/ {{\n            internal;\n            alias {directory}/invoices/;" in printed
    for old, new in ports.items():
        printed = printed.replace(old, new)
    config = directory / "nginx.conf"
    config.write_text(KINDS["nginx"].moved(printed, directory))
    nginx = KINDS["nginx"].command(directory, config)
    with (
        running(command(page, "uvicorn", ports), service, directory=directory, log=directory / "log", environ=environ),
        running(nginx, front, directory=directory, log=directory / "nginx.log"),
    ):
        url = f"http://127.0.0.1:{front}"
        assert get(f"{url}/invoices/1", ADA) == (200, b"ada's invoice\n")
        assert get(f"{url}/invoices/1", {**ADA, "Range": "bytes=0-2"}) == (206, b"ada")
        assert get(f"{url}/invoices/1", BOB) == get(f"{url}/invoices/7", ADA) == (404, b'{"detail":"Not Found"}')
        assert get(f"{url}/invoices/1", {})[0] == 401
        assert get(f"{url}/_invoices/1.pdf", ADA)[0] == 404
        assert get(f"http://127.0.0.1:{service}/invoices/1", ADA) == (200, b"")
        report = json.loads(output_of([*command(page, "downloadview", ports), "--json"], directory, environ))
        assert (report["FAIL"], report["skip"]) == (0, 0)
        said = "200, the right bytes, which the service alone does not send"
        assert said in [check["came"] for check in report["checks"]]


def test_from_a_bucket_to_a_private_link(directory: Path, s3: S3) -> None:
    page = DOCS / "howto" / "s3.md"
    write_files(page, directory, {"s3://invoices": f"s3://{BUCKET}"})
    names = set(re.findall(r"\bexport ([^\n]*)", page.read_text()))
    variables = {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_REGION": REGION,
        "LINK_KEY": "k" * 43,
    }
    for name in variables:
        assert any(f"{name}=" in line for line in names)
    environ = environment(**variables)
    subprocess.run(command(page, "python", {}), cwd=directory, env=environ, check=True)
    service = free_port()
    ports = {":8000": f":{service}", "--port 8000": f"--port {service}"}
    with running(command(page, "uvicorn", ports), service, directory=directory, log=directory / "log", environ=environ):
        url = f"http://127.0.0.1:{service}"
        assert get(f"{url}/invoices/1", ADA) == (200, b"ada's invoice\n")
        assert get(f"{url}/invoices/1", BOB)[0] == 404
        assert get(f"{url}/invoices/1/link", BOB, "POST")[0] == 404
        link = json.loads(get(f"{url}/invoices/1/link", ADA, "POST")[1])["link"]
        assert get(f"{url}{link}", {}) == (200, b"ada's invoice\n")
        assert get(f"{url}{link.replace('/1?', '/2?')}", {})[0] == 403
        report = json.loads(output_of([*command(page, "downloadview", ports), "--json"], directory, environ))
        last = report["checks"][-1]
        assert 'Content-Disposition: attachment; filename="invoice 1.pdf"' in last["came"]
