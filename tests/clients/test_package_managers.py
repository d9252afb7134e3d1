"""apt, pip and git, whose repositories are files: each finds what it needs, and nothing else, by names it makes up."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from tests.clients.relay import cutting
from tests.clients.running import Transport, digest, run

pytestmark = pytest.mark.slow

MIB = 1 << 20


def _debian_package(directory: Path) -> Path:
    """Make a package of 3 MiB that cannot be compressed."""
    control = directory / "package" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    fields = {"Package": "sample", "Version": "1.0", "Architecture": "all", "Description": "a sample"}
    fields["Maintainer"] = "Nobody <nobody@example.org>"
    control.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    data = directory / "package" / "usr" / "share" / "sample"
    data.mkdir(parents=True)
    (data / "data").write_bytes(os.urandom(3 * MIB))
    run(["dpkg-deb", "--build", "--root-owner-group", "-Znone", "package", "sample_1.0_all.deb"], directory)
    return directory / "sample_1.0_all.deb"


def _apt(transport: Transport, root: Path) -> list[str]:
    """Return the command for an apt that has a root of its own, whose only source is the flat repository."""
    for name in ("lists/partial", "cache/archives/partial", "sources", "apt.conf.d", "preferences.d", "trusted.gpg.d"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    (root / "sources.list").write_text(f"deb [trusted=yes] {transport.url}/repository ./\n")
    options = {
        "Acquire::Languages": "none",
        "Acquire::Retries": "10",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",
        "Debug::NoLocking": "1",
        "Dir::Cache": str(root / "cache"),
        "Dir::Etc": str(root),
        "Dir::Etc::sourceparts": "sources",
        "Dir::State": str(root),
        "Dir::State::lists": str(root / "lists"),
        "Dir::State::status": str(root / "status"),
    }
    if transport.authority is not None:
        options["Acquire::https::CaInfo"] = str(transport.authority)
    return ["apt-get", "-q", *[part for name, value in options.items() for part in ("-o", f"{name}={value}")]]


def test_apt_takes_a_package_of_a_flat_repository(transport: Transport, tmp_path: Path) -> None:
    """A flat repository's files are asked for as /./Packages; the package is resumed where a connection was cut."""
    package = _debian_package(tmp_path)
    transport.put(f"repository/{package.name}", package.read_bytes())
    fields = run(["dpkg-deb", "--field", package.name], tmp_path).strip()
    fields += f"\nFilename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest(package)}\n"
    transport.put("repository/Packages", fields.encode())
    package.unlink()
    with cutting(transport.port, 2 * MIB) as relay:
        apt = _apt(transport.at(relay.address), tmp_path / "root")
        run([*apt, "update"], tmp_path)
        run([*apt, "download", "sample"], tmp_path)
        assert relay.cuts >= 1
    assert digest(package) in fields
    transport.wait_for_answers(f"repository/./{package.name}", 206)


def _wheel(path: Path) -> None:
    """Make a wheel with 2 MiB of data before its metadata."""
    metadata = b"Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {"sample/data": os.urandom(2 * MIB), "sample/__init__.py": b"", "sample-1.0.dist-info/METADATA": metadata}
    members["sample-1.0.dist-info/WHEEL"] = wheel
    record = "".join(f"{name},,\n" for name in [*members, "sample-1.0.dist-info/RECORD"])
    members["sample-1.0.dist-info/RECORD"] = record.encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_pip_installs_a_wheel_whose_metadata_it_reads_by_ranges(transport: Transport, tmp_path: Path) -> None:
    name = "sample-1.0-py3-none-any.whl"
    _wheel(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    transport.put(name, content)
    transport.put("links.html", f'<a href="{name}#sha256={digest(content)}">{name}</a>'.encode())
    command = [sys.executable, "-m", "pip", "install", "--isolated", "--disable-pip-version-check", "--no-cache-dir"]
    command += [*transport.trusting("--cert", "{}"), "--no-index", "-f", f"{transport.url}/links.html"]
    output = run(
        [*command, "--use-feature=fast-deps", "--target", "installed", "sample"],
        tmp_path,
        env={"PIP_CONFIG_FILE": os.devnull},
    )
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert digest(tmp_path / "installed" / "sample" / "data") == digest(archive.read("sample/data"))
    assert "Obtaining dependency information from sample 1.0" in output
    transport.wait_for_answers(name, 206)


def test_git_clones_a_repository_of_plain_files(transport: Transport, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "data").write_bytes(os.urandom(MIB))
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "init.defaultBranch=main"]
    run([*git, "init", "-q", "work"], tmp_path)
    run([*git, "-C", "work", "add", "."], tmp_path)
    run([*git, "-C", "work", "commit", "-q", "-m", "packed"], tmp_path)
    repository = transport.files / "repository.git"
    run([*git, "clone", "-q", "--bare", "work", repository], tmp_path)
    run([*git, "-C", repository, "repack", "-adq"], tmp_path)
    run([*git, "-C", "work", "commit", "-q", "--allow-empty", "-m", "loose"], tmp_path)
    run([*git, "-C", "work", "push", "-q", repository, "main"], tmp_path)
    run([*git, "-C", repository, "update-server-info"], tmp_path)
    for path in [repository, *repository.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # nginx's workers are not root
    trusting = transport.trusting("-c", "http.sslCAInfo={}")
    run([*git, *trusting, "clone", "-q", f"{transport.url}/repository.git", "clone"], tmp_path)
    assert digest(tmp_path / "clone" / "data") == digest(tmp_path / "work" / "data")
    revisions = [run([*git, "-C", name, "rev-parse", "HEAD"], tmp_path) for name in ("work", "clone")]
    assert revisions[0] == revisions[1]
    run([*git, "-C", "clone", "fsck", "--strict"], tmp_path)


def test_the_digest_is_that_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert digest(tmp_path / "file") == hashlib.sha256(b"0123456789").hexdigest()
    assert run(["sha256sum", "file"], tmp_path).split()[0] == digest(tmp_path / "file")
