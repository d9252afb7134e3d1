"""The thumbnails of docs/howto/recipes.md, with Pillow as `make clients` installs it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.servers import PROJECT, free_port, serving

pytestmark = pytest.mark.slow

PACKAGES = Path(sys.prefix) / "clients"
MAKE = "from PIL import Image; Image.new('RGB', (2000, 1000), 'red').save('pictures/red.png')"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    if not (PACKAGES / "PIL").exists():
        pytest.skip(f"Pillow is not installed in {PACKAGES}: make clients")
    page = (PROJECT / "docs" / "howto" / "recipes.md").read_text()
    match = re.search(r"^```python\n# thumbnails\.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert match is not None
    (tmp_path / "app.py").write_text(match[1])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    (tmp_path / "secret.png").write_text("secret")
    env = {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(PROJECT)])}
    subprocess.run([sys.executable, "-c", MAKE], cwd=tmp_path, env={**os.environ, **env}, check=True)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
    with serving(command, port, log=tmp_path / "log", env=env, cwd=tmp_path):
        yield f"http://127.0.0.1:{port}/thumbnails"


def test_a_thumbnail_is_made_once_and_kept(server: str, tmp_path: Path) -> None:
    with httpx2.Client() as client:
        first = client.get(f"{server}/red.png")
        assert (first.status_code, first.headers["content-type"]) == (200, "image/jpeg")
        assert first.headers["content-disposition"] == 'inline; filename="red.jpg"'
        code = "import sys, io; from PIL import Image; print(Image.open(io.BytesIO(sys.stdin.buffer.read())).size)"
        env = {**os.environ, "PYTHONPATH": str(PACKAGES)}
        size = subprocess.run(
            [sys.executable, "-c", code], input=first.content, capture_output=True, env=env, check=True
        )
        assert size.stdout == b"(320, 160)\n"
        (tmp_path / "pictures" / "red.png").unlink()
        again = client.get(f"{server}/red.png", headers={"Range": "bytes=0-9"})
        assert (again.status_code, again.content) == (206, first.content[:10])
        assert client.get(f"{server}/red.png", headers={"If-None-Match": again.headers["etag"]}).status_code == 304


def test_what_is_not_a_picture_gives_404(server: str) -> None:
    with httpx2.Client() as client:
        for name in ("notes.txt", "missing.png", "..%2Fsecret.png"):
            assert client.get(f"{server}/{name}").status_code == 404, name
