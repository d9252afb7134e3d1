"""Clients that have an older version of a file and fetch what has changed: they ask for many ranges at once."""

import random
from pathlib import Path

import pytest

from tests.clients.running import PLAIN, Transport, digest, run

# neither can be given an authority to trust: zsync has no TLS, zckdl no option for it
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("transport", PLAIN, indirect=True)]

_BLOCK = 4096


def _versions() -> tuple[bytes, bytes]:
    """Return an older and a newer version of a file, which differ in 12 places."""
    generator = random.Random(20)
    blocks = [generator.randbytes(_BLOCK) for _ in range(500)]
    newer = list(blocks)
    for index in generator.sample(range(500), 12):
        newer[index] = generator.randbytes(_BLOCK)
    return b"".join(blocks), b"".join(newer)


def test_zsync(transport: Transport, tmp_path: Path) -> None:
    older, newer = _versions()
    url = transport.put("file.bin", newer)
    (tmp_path / "older").write_bytes(older)
    run(["zsyncmake", "-b", str(_BLOCK), "-u", url, "-o", "file.zsync", transport.files / "file.bin"], tmp_path)
    transport.put("file.zsync", (tmp_path / "file.zsync").read_bytes())
    output = run(["zsync", "-i", "older", "-o", "file.bin", f"{transport.url}/file.zsync"], tmp_path)
    assert digest(tmp_path / "file.bin") == digest(newer), output
    transport.wait_for_answers("file.bin", 206)


def test_zchunk(transport: Transport, tmp_path: Path) -> None:
    older, newer = _versions()
    for name, content in (("older", older), ("newer", newer)):
        (tmp_path / name).write_bytes(content)
        run(["zck", "-o", f"{name}.zck", name], tmp_path)
    url = transport.put("file.zck", (tmp_path / "newer.zck").read_bytes())
    run(["zckdl", "--fail-no-ranges", "-s", "older.zck", url], tmp_path)
    assert digest(tmp_path / "file.zck") == digest(tmp_path / "newer.zck")
    run(["unzck", "-c", "file.zck"], tmp_path)
    transport.wait_for_answers("file.zck", 206, 2)
