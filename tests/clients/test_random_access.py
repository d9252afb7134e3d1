"""Programs and libraries that read here and there in a large file: rasters, tables, archives and disks."""

import os
import random
import sys
import zipfile
from pathlib import Path

import pytest

from tests.clients.running import Transport, digest, run

pytestmark = pytest.mark.slow

PACKAGES = Path(sys.prefix) / "clients"
"""Where `make clients` installs those that are Python packages: requirements/clients.txt."""


def _python(code: str, directory: Path, *arguments: str | Path, module: str, env: dict[str, str] | None = None) -> str:
    """Run code with the packages that only clients have; the test is skipped where `make clients` has not run."""
    if not (PACKAGES / module).exists():
        pytest.skip(f"{module} is not installed in {PACKAGES}: make clients")
    return run([sys.executable, "-c", code, *arguments], directory, env={"PYTHONPATH": str(PACKAGES), **(env or {})})


def _trusted(transport: Transport, *names: str) -> dict[str, str]:
    return {} if transport.authority is None else dict.fromkeys(names, str(transport.authority))


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiled GeoTIFF of 4 MiB."""
    directory = tmp_path_factory.mktemp("raster")
    (directory / "raster.ppm").write_bytes(b"P6\n1200 1200\n255\n" + random.Random(1).randbytes(1200 * 1200 * 3))
    run(["gdal_translate", "-q", "-co", "TILED=YES", "raster.ppm", "raster.tif"], directory)
    return directory / "raster.tif"


def test_gdal_reads_a_window_of_a_raster(transport: Transport, raster: Path, tmp_path: Path) -> None:
    url = transport.put("raster.tif", raster.read_bytes())
    env = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", **_trusted(transport, "CURL_CA_BUNDLE")}
    for name, source in (("remote", f"/vsicurl/{url}"), ("local", str(raster))):
        window = ["-srcwin", "1000", "900", "150", "150"]
        command = ["gdal_translate", "-q", "-of", "PNM", *window, source, f"{name}.ppm"]
        run(command, tmp_path, env=env)
    assert digest(tmp_path / "remote.ppm") == digest(tmp_path / "local.ppm")
    transport.wait_for_answers("raster.tif", 206, 2)
    assert "Size is 1200, 1200" in run(["gdalinfo", f"/vsicurl/{url}"], tmp_path, env=env)


def test_qemu_img_converts_a_disk(transport: Transport, tmp_path: Path) -> None:
    if not list(Path("/usr/lib").glob("*/qemu/block-curl.so")):
        pytest.skip("qemu-img cannot fetch: apt-get install qemu-utils qemu-block-extra")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(2 << 20) + bytes(1 << 20) + os.urandom(1 << 20))
    run(["qemu-img", "convert", "-O", "qcow2", "disk.raw", "disk.qcow2"], tmp_path)
    url = transport.put("disk.qcow2", (tmp_path / "disk.qcow2").read_bytes())
    # it has no option for an authority
    options = "".join([f'"driver": "{transport.scheme}"', *transport.trusting(', "sslverify": false')])
    source = f'json:{{"driver": "qcow2", "file": {{{options}, "url": "{url}"}}}}'
    assert "virtual size: 4 MiB" in run(["qemu-img", "info", source], tmp_path)
    # -m 1: with several requests at once it hangs now and then, on files that nginx serves by itself as well
    run(["qemu-img", "convert", "-m", "1", "-O", "raw", source, "copy.raw"], tmp_path)
    assert digest(tmp_path / "copy.raw") == digest(disk)
    transport.wait_for_answers("disk.qcow2", 206, 2)


TABLE = """
import sys
import pyarrow, pyarrow.parquet
columns = {name: list(range(start, start + 100_000)) for name, start in (("a", 0), ("b", 7), ("c", 10**9))}
pyarrow.parquet.write_table(pyarrow.table(columns), sys.argv[1], row_group_size=20_000, compression="none")
"""
COLUMN = """
import sys
import fsspec, pyarrow.parquet
with fsspec.open(sys.argv[1], block_size=65536) as opened:
    file = pyarrow.parquet.ParquetFile(opened)
    group = file.read_row_group(3, columns=["b"])
print(file.metadata.num_rows, group.column("b").to_pylist() == list(range(60_007, 80_007)))
"""


def test_pyarrow_reads_a_column(transport: Transport, tmp_path: Path) -> None:
    _python(TABLE, tmp_path, "table.parquet", module="pyarrow")
    url = transport.put("table.parquet", (tmp_path / "table.parquet").read_bytes())
    env = _trusted(transport, "SSL_CERT_FILE")
    assert _python(COLUMN, tmp_path, url, module="pyarrow", env=env) == "100000 True\n"
    transport.wait_for_answers("table.parquet", 206, 2)


MEMBER = """
import sys
import remotezip
with remotezip.RemoteZip(sys.argv[1]) as archive:
    print(archive.namelist())
    archive.extract(sys.argv[2])
"""


def test_remotezip_extracts_a_member(transport: Transport, tmp_path: Path) -> None:
    members = {f"member-{number}": os.urandom(300_000) for number in range(8)}
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    url = transport.put("archive.zip", (tmp_path / "archive.zip").read_bytes())
    env = _trusted(transport, "REQUESTS_CA_BUNDLE")
    assert _python(MEMBER, tmp_path, url, "member-5", module="remotezip.py", env=env) == f"{list(members)}\n"
    assert digest(tmp_path / "member-5") == digest(members["member-5"])
    transport.wait_for_answers("archive.zip", 206, 2)
